//! Segments: padded batches, sequences packed one after the other, pages.

use crate::stream::Stream;
use subquad::index::{Pages, Segment, Segments};
use subquad::kernels::bias::Bias;
use subquad::kernels::exact::{self, Blocking, ExactArgs, ExactOut, naive};
use subquad::kernels::mask::Mask;
use subquad::kernels::score_mod::ScoreMod;
use subquad::parallel::RowWriter;
use subquad::simd::Level;
use subquad::tensor::{AttnShape, Tensor};

const HEADS: usize = 4;
const KV_HEADS: usize = 2;
const WIDTH: usize = 24;

struct Packed {
    queries: usize,
    q: Vec<f32>,
    /// `[batch, tokens, heads, width]`.
    k: Vec<f32>,
    v: Vec<f32>,
    cache: [usize; 2],
    segments: Vec<Segment>,
    pages: Option<Pages>,
}

impl Packed {
    fn new(queries: usize, cache: [usize; 2], segments: Vec<Segment>, pages: Option<Pages>) -> Self {
        let mut stream = Stream(3);
        let mut some = |len: usize| (0..len).map(|_| stream.next() as f32).collect::<Vec<_>>();
        let rows = cache[0] * cache[1] * KV_HEADS;
        let (q, k, v) = (some(queries * HEADS * WIDTH), some(rows * WIDTH), some(rows * WIDTH));
        Self { queries, q, k, v, cache, segments, pages }
    }

    fn run(&self, form: impl Fn(&ExactArgs<'_, f32>, &ExactOut<'_, f32>)) -> (Vec<f32>, Vec<f32>) {
        let longest = self.segments.iter().map(|segment| segment.k_end).max().unwrap_or(0);
        let shape = AttnShape {
            batch: 1,
            seqlen_q: self.queries,
            seqlen_k: longest,
            num_heads: HEADS,
            num_kv_heads: KV_HEADS,
            head_dim: WIDTH,
            head_dim_v: WIDTH,
        };
        let [batch, tokens] = self.cache;
        let args = ExactArgs {
            shape,
            q: Tensor::contiguous("q", &self.q, [1, self.queries, HEADS, WIDTH]).unwrap(),
            k: Tensor::contiguous("k", &self.k, [batch, tokens, KV_HEADS, WIDTH]).unwrap(),
            v: Tensor::contiguous("v", &self.v, [batch, tokens, KV_HEADS, WIDTH]).unwrap(),
            segments: Segments::List(&self.segments),
            pages: self.pages.as_ref(),
            mask: Mask::CAUSAL,
            biases: [Bias::None; 2],
            mods: ScoreMod::plain(0.3),
        };
        let mut out = vec![f32::NAN; self.queries * HEADS * WIDTH];
        let mut lse = vec![f32::NAN; self.queries * HEADS];
        let strides = [self.queries * HEADS * WIDTH, HEADS * WIDTH, WIDTH];
        form(
            &args,
            &ExactOut {
                out: RowWriter::new(&mut out, [1, self.queries, HEADS, WIDTH], strides),
                lse: Some(RowWriter::new(&mut lse, [1, self.queries, HEADS, 1], [HEADS * self.queries, 1, self.queries])),
            },
        );
        (out, lse)
    }

    fn check(&self) {
        let (out, lse) = self.run(naive::forward);
        for level in Level::available() {
            let fast = |threads| self.run(|a, o| exact::forward(a, o, level, threads, Blocking::default()));
            let (fast_out, fast_lse) = fast(1);
            assert_eq!(
                fast(3).0.iter().map(|x| x.to_bits()).collect::<Vec<_>>(),
                fast_out.iter().map(|x| x.to_bits()).collect::<Vec<_>>()
            );
            let covered = |row: usize| self.segments.iter().any(|s| (s.q_first..s.q_first + s.q_len).contains(&row));
            for (i, (x, y)) in fast_out.iter().zip(&out).enumerate() {
                let expected = if covered(i / (HEADS * WIDTH)) { *y } else { 0.0 };
                assert!((x - expected).abs() <= 2e-6 * (1.0 + expected.abs()), "out[{i}] {x} != {expected} at {}", level.name());
            }
            for (i, (x, y)) in fast_lse.iter().zip(&lse).enumerate() {
                let expected = if covered(i % self.queries) { *y } else { f32::NEG_INFINITY };
                assert!(*x == expected || (x - expected).abs() <= 2e-6 * (1.0 + expected.abs()), "lse[{i}] {x} != {expected}");
            }
        }
    }
}

/// Queries and keys packed one after the other, as many keys as `lengths` say.
fn packed(lengths: &[(usize, usize)]) -> Vec<Segment> {
    let (mut q_first, mut k_first) = (0, 0);
    let mut segments = Vec::new();
    for &(q_len, keys) in lengths {
        let offset = keys as isize - q_len as isize;
        segments.push(Segment { sequence: 0, q_batch: 0, q_first, q_len, k_batch: 0, k_first, k_start: 0, k_end: keys, offset });
        q_first += q_len;
        k_first += keys;
    }
    segments
}

#[test]
fn packed_sequences() {
    let lengths = [(1, 700), (60, 60), (0, 5), (130, 200), (3, 0), (2, 2), (50, 20), (16, 600)];
    let (queries, keys) = lengths.iter().fold((0, 0), |(a, b), &(q, k)| (a + q, b + k));
    Packed::new(queries, [1, keys], packed(&lengths), None).check();
}

#[test]
fn queries_in_no_segment() {
    let segments = vec![
        Segment { sequence: 0, q_batch: 0, q_first: 7, q_len: 30, k_batch: 0, k_first: 0, k_start: 4, k_end: 40, offset: 10 },
        Segment { sequence: 0, q_batch: 0, q_first: 40, q_len: 2, k_batch: 0, k_first: 0, k_start: 0, k_end: 9, offset: 7 },
    ];
    Packed::new(45, [1, 40], segments, None).check();
}

#[test]
fn pages_in_prefill_and_decode() {
    let pages = Pages { table: vec![5, 0, 3, 1, 2, 7, 6, 4], per_sequence: 4, page_size: 16 };
    let segments = vec![
        Segment { sequence: 0, q_batch: 0, q_first: 0, q_len: 50, k_batch: 0, k_first: 0, k_start: 0, k_end: 61, offset: 11 },
        Segment { sequence: 0, q_batch: 0, q_first: 50, q_len: 1, k_batch: 1, k_first: 0, k_start: 3, k_end: 50, offset: 49 },
    ];
    Packed::new(51, [8, 16], segments, Some(pages)).check();
}
