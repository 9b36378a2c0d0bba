//! Higher derivatives against central differences of the naive forms, at every level.

use crate::case::{BiasKind, Case, Mods, Seen, shape};
use crate::stream::Stream;
use subquad::index::{Segment, Segments};
use subquad::kernels::bias::{Bias, BiasView};
use subquad::kernels::exact::backward::sums::SumTable;
use subquad::kernels::exact::backward::{BackwardArgs, Gradients, RowsMut, naive as naive_backward};
use subquad::kernels::exact::second::jvp::JvpOut;
use subquad::kernels::exact::second::{Direction, SecondGradients, check, double_backward, jvp};
use subquad::kernels::exact::{ExactArgs, ExactOut, naive};
use subquad::parallel::RowWriter;
use subquad::simd::Level;
use subquad::tensor::Tensor;

const STEP: f64 = 1e-5;

/// A contiguous `[B, S, H, D]` array.
#[derive(Clone)]
struct Rows {
    data: Vec<f64>,
    shape: [usize; 4],
}

impl Rows {
    fn new(shape: [usize; 4], fill: impl FnOnce(usize) -> Vec<f64>) -> Self {
        Self { data: fill(shape.iter().product()), shape }
    }
    fn nan(shape: [usize; 4]) -> Self {
        Self::new(shape, |len| vec![f64::NAN; len])
    }
    fn tensor(&self) -> Tensor<'_, f64> {
        Tensor::contiguous("x", &self.data, self.shape).unwrap()
    }
    fn rows(&mut self) -> RowsMut<'_, f64> {
        let [_, s, h, d] = self.shape;
        RowsMut { data: &mut self.data, shape: self.shape, strides: [s * h * d, h * d, d] }
    }
    fn writer(&mut self) -> RowWriter<'_, f64> {
        let RowsMut { data, shape, strides } = self.rows();
        RowWriter::new(data, shape, strides)
    }
    fn moved(from: &Tensor<'_, f64>, along: &Self, step: f64) -> Self {
        let data = from.view().iter().zip(&along.data).map(|(x, u)| x + step * u).collect();
        Self { data, shape: along.shape }
    }
    fn check(&self, [plus, minus]: [&Self; 2], what: &str) {
        for (i, (&got, (p, m))) in self.data.iter().zip(plus.data.iter().zip(&minus.data)).enumerate() {
            let want = if p == m { 0.0 } else { (p - m) / (2.0 * STEP) };
            assert!((got - want).abs() <= 1e-7 * (1.0 + want.abs()), "{what}[{i}]: {got} != {want}");
        }
    }
}

/// Output, log-sum-exp, gradients of queries, keys, values, and of a bias by query and key.
fn first(args: &ExactArgs<'_, f64>, d_out: &Rows, d_lse: &Rows, table: &SumTable) -> [Rows; 6] {
    let s = args.shape;
    let (mut out, mut lse) = (Rows::nan(d_out.shape), Rows::nan(d_lse.shape));
    out.data.fill(0.0);
    lse.data.fill(f64::NEG_INFINITY);
    naive::forward(args, &ExactOut { out: out.writer(), lse: Some(lse.writer()) });
    let [mut q, mut k, mut v] = [args.q, args.k, args.v].map(|x| Rows::nan(x.shape()));
    let backward =
        BackwardArgs { forward: *args, out: out.tensor(), lse: lse.tensor(), d_out: d_out.tensor(), d_lse: Some(d_lse.tensor()) };
    naive_backward::backward(&backward, Gradients { q: Some(q.rows()), k: Some(&k.writer()), v: Some(&v.writer()) });
    let mut bias = Rows::nan([1, s.num_heads, s.seqlen_q, s.seqlen_k]);
    naive_backward::score_sums(&backward, table, &mut bias.data);
    [out, lse, q, k, v, bias]
}

fn check_second(args: &ExactArgs<'_, f64>) {
    check(args).unwrap();
    let s = args.shape;
    let mut stream = Stream(7);
    let mut rows = |shape| Rows::new(shape, |len| stream.fill(len, 1.0));
    let [q, k, v] = [args.q, args.k, args.v].map(|x| rows(x.shape()));
    let d_out = rows([s.batch, s.seqlen_q, s.num_heads, s.head_dim_v]);
    let d_lse = rows([s.batch, s.seqlen_q, s.num_heads, 1]);
    let bias = rows([1, s.num_heads, s.seqlen_q, s.seqlen_k]);
    let strides = [0, s.seqlen_q * s.seqlen_k, s.seqlen_k, 1].map(|stride| stride as isize);
    let table = SumTable {
        batches: 1,
        heads: s.num_heads,
        per_head: s.seqlen_q * s.seqlen_k,
        origin: 0,
        token_stride: if s.seqlen_q > 1 { s.seqlen_k as isize } else { 0 },
        key_stride: 1,
        is_slope: false,
    };
    let near = [STEP, -STEP].map(|step| {
        let [q, k, v] = [(&args.q, &q), (&args.k, &k), (&args.v, &v)].map(|(x, u)| Rows::moved(x, u, step));
        let data: Vec<f64> = bias.data.iter().map(|u| step * u).collect();
        let moved = Bias::Input(BiasView { data: &data, origin: 0, strides });
        let args = ExactArgs { q: q.tensor(), k: k.tensor(), v: v.tensor(), biases: [args.biases[0], moved], ..*args };
        first(&args, &d_out, &d_lse, &table)
    });
    let [out, lse, ..] = first(args, &d_out, &d_lse, &table);
    let backward =
        BackwardArgs { forward: *args, out: out.tensor(), lse: lse.tensor(), d_out: d_out.tensor(), d_lse: Some(d_lse.tensor()) };
    let direction = Direction {
        q: Some(q.tensor()),
        k: Some(k.tensor()),
        v: Some(v.tensor()),
        biases: [Bias::None, Bias::Input(BiasView { data: &bias.data, origin: 0, strides })],
    };
    for level in Level::available() {
        let run = |threads| {
            let (mut out, mut lse) = (Rows::nan(d_out.shape), Rows::nan(d_lse.shape));
            {
                let (out, lse) = (out.writer(), lse.writer());
                jvp(args, &direction, &JvpOut { out: Some(&out), lse: Some(&lse), product: None }, level, threads);
            }
            let [mut gq, mut gk, mut gv] = [&q, &k, &v].map(|x| Rows::nan(x.shape));
            let (mut g_out, mut g_lse) = (Rows::nan(d_out.shape), Rows::nan(d_lse.shape));
            let mut biases = [(table, vec![f64::NAN; table.len()])];
            let gradients = SecondGradients {
                d_out: Some(g_out.writer()),
                q: Some(gq.writer()),
                k: Some(gk.writer()),
                v: Some(gv.writer()),
                d_lse: Some(g_lse.writer()),
            };
            double_backward(&backward, &direction, &gradients, &mut biases, level, threads);
            drop(gradients);
            let [(_, data)] = biases;
            [out, lse, gq, gk, gv, Rows { data, ..bias.clone() }, g_out, g_lse]
        };
        let found = run(1);
        for (i, what) in ["out", "lse", "q", "k", "v", "bias"].iter().enumerate() {
            found[i].check([&near[0][i], &near[1][i]], what);
        }
        for (one, other) in [(&found[0], &found[6]), (&found[1], &found[7])].into_iter().chain(found.iter().zip(&run(3))) {
            assert_eq!(bytemuck::cast_slice::<f64, u64>(&one.data), bytemuck::cast_slice::<f64, u64>(&other.data));
        }
    }
}

#[test]
fn derivatives_are_limits() {
    for (q, k, heads, dims) in [
        (1, 1, (1, 1), (1, 1)),
        (1, 70, (4, 2), (8, 5)),
        (17, 65, (6, 2), (20, 33)),
        (65, 17, (2, 2), (3, 64)),
        (5, 9, (40, 1), (16, 16)),
    ] {
        let offset = k as isize - q as isize;
        for seen in [Seen::all(), Seen::causal_bottom_right(q, k), Seen::window(offset, 3, 2)] {
            let mut case = Case::<f64>::new(shape(2, q, k, heads, dims), seen, 1.0);
            for kind in [BiasKind::None, BiasKind::Bool, BiasKind::Dense] {
                case.run(kind, |args, _| check_second(args));
            }
            case.mods = Mods {
                slopes: Some((0..heads.0).map(|head| 0.1 * head as f64).collect()),
                sinks: Some((0..heads.0).map(|head| 0.3 * head as f64 - 1.0).collect()),
                row_scale: Some((0..q).map(|row| 0.5 + 0.1 * row as f64).collect()),
                ..Mods::default()
            };
            case.run(BiasKind::None, |args, _| check_second(args));
        }
    }
}

#[test]
fn sequences_that_are_packed_and_padded() {
    let segment = |sequence, batch, q: (usize, usize), k_first, keys: (usize, usize), offset| Segment {
        sequence,
        q_batch: batch,
        q_first: q.0,
        q_len: q.1,
        k_batch: batch,
        k_first,
        k_start: keys.0,
        k_end: keys.1,
        offset,
    };
    let list = [
        segment(0, 0, (1, 9), 0, (2, 13), 2),
        segment(1, 0, (10, 30), 13, (0, 50), 0),
        segment(2, 1, (0, 40), 5, (0, 0), 0),
        segment(3, 1, (44, 1), 3, (0, 66), 65),
    ];
    let case = Case::<f64>::new(shape(2, 45, 70, (4, 2), (8, 12)), Seen::causal_bottom_right(45, 70), 1.0);
    case.run(BiasKind::None, |args, _| check_second(&ExactArgs { segments: Segments::List(&list), ..*args }));
}
