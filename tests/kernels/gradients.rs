//! Gradients: every level, blocking and thread count against the naive form.

use crate::case::{BiasKind, Case, Mods, Seen, assert_same, shape};
use crate::modified::{all_mods, all_normalizers, gaps};
use crate::stream::{Stream, widen};
use half::bf16;
use subquad::dtype::{Element, Float};
use subquad::kernels::dropout::Dropout;
use subquad::kernels::exact::backward::sums::{SumTable, score_sums};
use subquad::kernels::exact::backward::{BackwardArgs, Gradients, RowsMut, backward, naive};
use subquad::kernels::exact::{self, Blocking};
use subquad::kernels::score_mod::Normalizer;
use subquad::parallel::RowWriter;
use subquad::simd::{Level, SimdElement};
use subquad::tensor::Tensor;

type Sizes = (usize, usize, (usize, usize), (usize, usize));

const SHAPES: [Sizes; 7] = [
    (1, 1, (1, 1), (1, 1)),
    (3, 300, (4, 1), (80, 72)),
    (17, 40, (6, 1), (96, 33)),
    (65, 64, (2, 2), (20, 20)),
    (100, 100, (4, 2), (64, 80)),
    (130, 257, (2, 1), (33, 128)),
    (70, 3, (2, 2), (16, 16)),
];
const TINY: Blocking = Blocking { block_q: Some(1), block_k: Some(8) };

/// Inputs of the backward of a case.
struct Graded<T: Element> {
    case: Case<T>,
    kind: BiasKind,
    out: Vec<T>,
    lse: Vec<T::Acc>,
    d_out: Vec<T>,
    d_lse: Vec<T::Acc>,
}

impl<T: SimdElement> Graded<T> {
    fn new(case: Case<T>, kind: BiasKind) -> Self {
        let (out, lse) = case.run(kind, exact::naive::forward);
        let mut stream = Stream(3);
        let (d_out, d_lse) = (stream.fill(out.len(), 1.0), stream.fill(lse.len(), 1.0));
        Self { case, kind, out, lse, d_out, d_lse }
    }

    fn with_args<R>(&self, with: impl FnOnce(&BackwardArgs<'_, T>) -> R) -> R {
        let s = self.case.shape;
        let (of_out, of_lse) = ([s.batch, s.seqlen_q, s.num_heads, s.head_dim_v], [s.batch, s.seqlen_q, s.num_heads, 1]);
        let by_head = [s.num_heads * s.seqlen_q, 1, s.seqlen_q];
        self.case.with_args(self.kind, |forward| {
            with(&BackwardArgs {
                forward: *forward,
                out: Tensor::contiguous("out", &self.out, of_out).unwrap(),
                lse: Tensor::new("lse", &self.lse, of_lse, by_head).unwrap(),
                d_out: Tensor::contiguous("do", &self.d_out, of_out).unwrap(),
                d_lse: Some(Tensor::new("dlse", &self.d_lse, of_lse, by_head).unwrap()),
            })
        })
    }

    /// The wanted gradients, one after the other.
    fn gradients(&self, wanted: [bool; 3], form: impl FnOnce(&BackwardArgs<'_, T>, Gradients<'_, T>)) -> Vec<T> {
        let s = self.case.shape;
        let shapes = [
            [s.batch, s.seqlen_q, s.num_heads, s.head_dim],
            [s.batch, s.seqlen_k, s.num_kv_heads, s.head_dim],
            [s.batch, s.seqlen_k, s.num_kv_heads, s.head_dim_v],
        ];
        let strides = shapes.map(|[_, s, h, d]| [s * h * d, h * d, d]);
        let nan = T::from_acc(T::Acc::from_f64(f64::NAN));
        let mut data = shapes.map(|shape| vec![nan; shape.iter().product()]);
        let [q, k, v] = &mut data;
        let (k, v) = (RowWriter::new(k, shapes[1], strides[1]), RowWriter::new(v, shapes[2], strides[2]));
        let gradients = Gradients {
            q: wanted[0].then(|| RowsMut { data: q, shape: shapes[0], strides: strides[0] }),
            k: wanted[1].then_some(&k),
            v: wanted[2].then_some(&v),
        };
        self.with_args(|args| form(args, gradients));
        drop((k, v));
        data.into_iter().zip(wanted).filter(|(_, wanted)| *wanted).flat_map(|(data, _)| data).collect()
    }

    fn check(&self, blocking: Blocking, tolerance: f64) {
        let all = [true; 3];
        let expected = widen(&self.gradients(all, naive::backward));
        let largest = expected.iter().copied().filter(|x| x.is_finite()).fold(1.0, |a: f64, b| a.max(b.abs()));
        for level in Level::available() {
            let fast = |threads, wanted| self.gradients(wanted, |a, g| backward(a, g, level, threads, blocking));
            let got = fast(1, all);
            for (i, (x, y)) in widen(&got).iter().zip(&expected).enumerate() {
                let close = (x - y).abs() <= tolerance * largest || (x.is_nan() && y.is_nan());
                assert!(close, "gradient[{i}] {x} != {y} at {} {:?} {blocking:?} {:?}", level.name(), self.kind, self.case.shape);
            }
            assert_same(&got, &fast(3, all));
            let parts = [[true, false, false], [false, true, false], [false, false, true]];
            assert_same(&got, &parts.map(|wanted| fast(2, wanted)).concat());
        }
    }

    fn check_sums(&self, tolerance: f64) {
        let s = self.case.shape;
        let flat = SumTable { batches: 1, heads: 1, per_head: 1, origin: 0, token_stride: 0, key_stride: 0, is_slope: false };
        let (q, k) = (s.seqlen_q, s.seqlen_k);
        let dense = SumTable { per_head: q * k, token_stride: k as isize, key_stride: 1, ..flat };
        let tables = [
            SumTable { batches: s.batch, heads: s.num_heads, ..dense },
            SumTable { heads: s.num_heads, ..dense },
            SumTable { batches: s.batch, per_head: k, key_stride: 1, ..flat },
            SumTable { heads: s.num_heads, per_head: q + k - 1, origin: q - 1, token_stride: -1, key_stride: 1, ..flat },
            SumTable { batches: s.batch, heads: s.num_heads, is_slope: true, ..flat },
        ];
        for table in tables {
            let mut expected = vec![T::Acc::ZERO; table.len()];
            self.with_args(|args| naive::score_sums(args, &table, &mut expected));
            let expected: Vec<f64> = expected.iter().map(|x| x.to_f64()).collect();
            let largest = expected.iter().fold(1.0, |a: f64, b| a.max(b.abs()));
            for level in Level::available() {
                let fast = |threads, blocking| {
                    let mut sums = vec![T::Acc::from_f64(f64::NAN); table.len()];
                    self.with_args(|args| score_sums(args, &table, &mut sums, level, threads, blocking));
                    sums
                };
                for blocking in [Blocking::default(), TINY] {
                    let got = fast(1, blocking);
                    for (i, (x, y)) in got.iter().zip(&expected).enumerate() {
                        let x = x.to_f64();
                        assert!((x - y).abs() <= tolerance * largest, "{table:?}[{i}] {x} != {y} at {} {s:?}", level.name());
                    }
                    assert_same(&got, &fast(3, blocking));
                }
            }
        }
    }
}

fn all_seen(q: usize, k: usize) -> [Seen; 4] {
    let offset = k as isize - q as isize;
    [Seen::all(), Seen::causal_bottom_right(q, k), Seen::window(offset, 20, 3), gaps(q, k)]
}

fn sweep<T: SimdElement>(tolerance: f64) {
    for (q, k, heads, dims) in SHAPES {
        for seen in all_seen(q, k) {
            let graded = |kind| Graded::new(Case::<T>::new(shape(2, q, k, heads, dims), seen.clone(), 1.0), kind);
            graded(BiasKind::None).check(Blocking::default(), tolerance);
            graded(BiasKind::None).check(TINY, tolerance);
            graded(BiasKind::Bool).check(Blocking::default(), tolerance);
        }
    }
}

#[test]
fn float32() {
    sweep::<f32>(3e-6);
}

#[test]
fn float64() {
    sweep::<f64>(1e-14);
}

// float16 differs from float32 in how it is loaded and stored, which forward tests: compiling it takes a minute.
#[test]
fn bfloat16() {
    sweep::<bf16>(2e-2);
}

#[test]
fn modified_scores() {
    for (q, k, heads, dims) in [SHAPES[1], SHAPES[4], SHAPES[5]] {
        for mods in all_mods(q, k) {
            for seen in all_seen(q, k) {
                let case = Case::<f32> { mods: mods.clone(), ..Case::new(shape(2, q, k, heads, dims), seen.clone(), 1.0) };
                Graded::new(case, BiasKind::Dense).check(TINY, 1e-5);
                let case = Case::<f64> { mods: mods.clone(), ..Case::new(shape(2, q, k, heads, dims), seen, 1.0) };
                Graded::new(case, BiasKind::None).check(Blocking::default(), 1e-13);
            }
        }
    }
}

#[test]
fn normalizers() {
    for (q, k, heads, dims) in [SHAPES[3], SHAPES[5]] {
        for normalizer in all_normalizers() {
            for seen in all_seen(q, k) {
                let case = Case::<f64>::new(shape(1, q, k, heads, dims), seen, 1.0);
                let case = Case { mods: Mods { normalizer, ..Mods::default() }, ..case };
                Graded::new(case, BiasKind::None).check(Blocking::default(), 1e-12);
            }
        }
    }
}

#[test]
fn dropout() {
    for (q, k, heads, dims) in [SHAPES[3], SHAPES[5]] {
        for (seen, probability) in all_seen(q, k).into_iter().zip([0.1, 0.5, 0.9, 0.25]) {
            let dropout = Some(Dropout { probability, seed: 0x1234_5678_9abc_def0 });
            let case = Case::<f32>::new(shape(2, q, k, heads, dims), seen, 1.0);
            let case = Case { mods: Mods { dropout, softcap: Some(3.0), ..Mods::default() }, ..case };
            case.check(BiasKind::Dense, TINY, 5e-6);
            Graded::new(case, BiasKind::Dense).check(TINY, 1e-5);
        }
        let mods = Mods { dropout: Some(Dropout { probability: 0.3, seed: 1 }), ..Mods::default() };
        let sigmoid = Mods { normalizer: Normalizer::Sigmoid { bias: 0.5 }, ..mods.clone() };
        for mods in [mods, sigmoid] {
            let case = Case::<f64> { mods, ..Case::new(shape(2, q, k, heads, dims), Seen::all(), 1.0) };
            case.check(BiasKind::None, Blocking::default(), 1e-13);
            let graded = Graded::new(case, BiasKind::None);
            graded.check(Blocking::default(), 1e-13);
            graded.check_sums(1e-13);
        }
    }
}

#[test]
fn biases_and_slopes() {
    for (q, k, heads, dims) in [SHAPES[1], SHAPES[3], SHAPES[4]] {
        for seen in all_seen(q, k) {
            let mods = Mods { softcap: Some(2.0), slopes: Some(vec![0.02, 0.01, 0.05, 0.1]), ..Mods::default() };
            let case = Case::<f64> { mods: mods.clone(), ..Case::new(shape(2, q, k, heads, dims), seen.clone(), 1.0) };
            Graded::new(case, BiasKind::Dense).check_sums(1e-13);
            let case = Case::<f32> { mods, ..Case::new(shape(2, q, k, heads, dims), seen, 1.0) };
            Graded::new(case, BiasKind::Dense).check_sums(1e-5);
        }
    }
}

#[test]
fn hidden_rows_that_are_not_finite_have_no_influence() {
    for q in [3, 90] {
        let mut case = Case::<f32>::new(shape(1, q, 300, (2, 1), (16, 16)), gaps(q, 300), 1.0);
        // Before the middle of the first query, hence of all.
        case.k[60 * 16 + 3] = f32::NAN;
        case.v[61 * 16 + 5] = f32::INFINITY;
        case.v[62 * 16 + 5] = f32::NAN;
        let graded = Graded::new(case, BiasKind::None);
        let level = Level::available().last().expect("there is always the scalar one");
        let got = graded.gradients([true; 3], |a, g| backward(a, g, level, 2, Blocking::default()));
        assert!(got.iter().all(|x| x.is_finite()));
        graded.check(Blocking::default(), 3e-6);
        graded.check(TINY, 3e-6);
    }
}
