//! Exact attention: every level, blocking and thread count against the naive form.
#![allow(clippy::float_cmp, reason = "exact values are meant")]

use half::{bf16, f16};
use proptest::prelude::*;
use subquad::dtype::{Element, Float};
use subquad::kernels::bias::{Bias, BiasView};
use subquad::kernels::exact::{Blocking, ExactArgs, ExactOut, decode, naive, prefill};
use subquad::kernels::mask::Mask;
use subquad::parallel::RowWriter;
use subquad::simd::{Level, SimdElement};
use subquad::tensor::{AttnShape, Tensor};

struct Case<T: Element> {
    shape: AttnShape,
    q: Vec<T>,
    k: Vec<T>,
    v: Vec<T>,
    mask: Mask,
    bias: Vec<f32>,
    visible: Vec<u8>,
    scale: f64,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum BiasKind {
    None,
    Bool,
    Dense,
    PerKey,
}

/// A stream of values in `[-1, 1)`: the tests need variety, not randomness.
struct Stream(u64);
impl Stream {
    fn next(&mut self) -> f64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 11) as f64 / (1u64 << 52) as f64 - 1.0
    }
    fn fill<T: Element>(&mut self, len: usize, width: f64) -> Vec<T> {
        (0..len).map(|_| T::from_acc(T::Acc::from_f64(self.next() * width))).collect()
    }
}

impl<T: SimdElement> Case<T> {
    fn new(shape: AttnShape, mask: Mask, width: f64) -> Self {
        let AttnShape { batch, seqlen_q, seqlen_k, num_heads, num_kv_heads, head_dim, head_dim_v } = shape;
        let mut stream = Stream(42);
        let scores = batch * num_heads * seqlen_q * seqlen_k;
        Self {
            shape,
            q: stream.fill(batch * seqlen_q * num_heads * head_dim, width),
            k: stream.fill(batch * seqlen_k * num_kv_heads * head_dim, width),
            v: stream.fill(batch * seqlen_k * num_kv_heads * head_dim_v, 1.0),
            mask,
            bias: (0..scores).map(|_| stream.next() as f32).collect(),
            visible: (0..scores).map(|_| u8::from(stream.next() > -0.5)).collect(),
            scale: 1.0 / (head_dim.max(1) as f64).sqrt(),
        }
    }

    fn run(&self, kind: BiasKind, form: impl Fn(&ExactArgs<'_, T>, &ExactOut<'_, T>)) -> (Vec<T>, Vec<T::Acc>) {
        let s = self.shape;
        let [h, sq, sk] = [s.num_heads, s.seqlen_q, s.seqlen_k];
        let dense = [h * sq * sk, sq * sk, sk, 1];
        let args = ExactArgs {
            shape: s,
            q: Tensor::contiguous("q", &self.q, [s.batch, sq, h, s.head_dim]).unwrap(),
            k: Tensor::contiguous("k", &self.k, [s.batch, sk, s.num_kv_heads, s.head_dim]).unwrap(),
            v: Tensor::contiguous("v", &self.v, [s.batch, sk, s.num_kv_heads, s.head_dim_v]).unwrap(),
            scale: self.scale,
            mask: self.mask,
            bias: match kind {
                BiasKind::None => Bias::None,
                BiasKind::Bool => Bias::Bool(BiasView { data: &self.visible, strides: dense }),
                BiasKind::Dense => Bias::Single(BiasView { data: &self.bias, strides: dense }),
                BiasKind::PerKey => Bias::Bool(BiasView { data: &self.visible, strides: [sk, 0, 0, 1] }),
            },
            layout: None,
        };
        let nan = T::Acc::from_f64(f64::NAN);
        let mut out = vec![T::from_acc(nan); s.batch * sq * h * s.head_dim_v];
        let mut lse = vec![nan; s.batch * h * sq];
        form(
            &args,
            &ExactOut {
                out: RowWriter::new(
                    &mut out,
                    [s.batch, sq, h, s.head_dim_v],
                    [sq * h * s.head_dim_v, h * s.head_dim_v, s.head_dim_v],
                ),
                lse: Some(RowWriter::new(&mut lse, [s.batch, sq, h, 1], [h * sq, 1, sq])),
            },
        );
        (out, lse)
    }

    fn check(&self, kind: BiasKind, blocking: Blocking, tolerance: f64) {
        let expected = self.run(kind, naive::forward);
        for level in Level::available() {
            let prefill = |threads| self.run(kind, |a, o| prefill::forward(a, o, level, threads, blocking));
            self.compare(&prefill(1), &expected, tolerance, &format!("prefill {} {kind:?} {blocking:?}", level.name()));
            assert_same(&prefill(1).0, &prefill(3).0);
            // Long prefills by the form for few queries would only cost time.
            let splits: &[_] = if self.shape.seqlen_q <= 20 { &[None, Some(1), Some(3)] } else { &[] };
            for &splits in splits {
                let decode = |threads| self.run(kind, |a, o| decode::forward(a, o, level, threads, splits));
                self.compare(&decode(1), &expected, tolerance, &format!("decode {} {kind:?} {splits:?}", level.name()));
                assert_same(&decode(1).0, &decode(3).0);
            }
        }
    }

    fn compare(&self, got: &Results<T>, want: &Results<T>, tolerance: f64, what: &str) {
        let f64s = |x: &[T::Acc]| x.iter().map(|x| x.to_f64()).collect::<Vec<_>>();
        for (part, got, want) in [("out", widen(&got.0), widen(&want.0)), ("lse", f64s(&got.1), f64s(&want.1))] {
            for (i, (x, y)) in got.iter().zip(&want).enumerate() {
                let close = (x - y).abs() <= tolerance * (1.0 + y.abs()) || x == y || (x.is_nan() && y.is_nan());
                assert!(close, "{part}[{i}] {x} != {y} by {what} {:?}", self.shape);
            }
        }
    }
}

type Results<T> = (Vec<T>, Vec<<T as Element>::Acc>);

fn assert_same<T: Element>(one: &[T], other: &[T]) {
    assert_eq!(bytemuck::cast_slice::<T, u8>(one), bytemuck::cast_slice::<T, u8>(other), "threads change bits");
}

fn widen<T: Element>(x: &[T]) -> Vec<f64> {
    x.iter().map(|x| x.to_acc().to_f64()).collect()
}

fn shape(batch: usize, q: usize, k: usize, heads: (usize, usize), dims: (usize, usize)) -> AttnShape {
    AttnShape { batch, seqlen_q: q, seqlen_k: k, num_heads: heads.0, num_kv_heads: heads.1, head_dim: dims.0, head_dim_v: dims.1 }
}

fn masks(s: AttnShape) -> [Mask; 3] {
    [Mask::None, Mask::causal_top_left(), Mask::causal_bottom_right(s.seqlen_q, s.seqlen_k)]
}

const KINDS: [BiasKind; 4] = [BiasKind::None, BiasKind::Bool, BiasKind::Dense, BiasKind::PerKey];
const TINY: Blocking = Blocking { block_q: Some(1), block_k: Some(8) };

fn sweep<T: SimdElement>(tolerance: f64) {
    for (q, k, heads, dims) in [
        (1, 1, (1, 1), (1, 1)),
        (2, 65, (2, 1), (8, 8)),
        (63, 64, (1, 1), (20, 20)),
        (100, 100, (4, 2), (64, 80)),
        (65, 2, (3, 3), (60, 33)),
        (130, 257, (2, 2), (128, 128)),
        (17, 40, (6, 1), (96, 192)),
        (1, 700, (8, 2), (128, 128)),
        (3, 1000, (4, 1), (80, 72)),
        (5, 300, (4, 1), (33, 40)),
        (16, 330, (3, 1), (64, 64)),
    ] {
        let s = shape(2, q, k, heads, dims);
        for mask in masks(s) {
            let case = Case::<T>::new(s, mask, 1.0);
            for kind in KINDS {
                case.check(kind, Blocking::default(), tolerance);
            }
            case.check(BiasKind::None, TINY, tolerance);
        }
    }
}

#[test]
fn float32() {
    sweep::<f32>(2e-6);
}

#[test]
fn float64() {
    sweep::<f64>(1e-14);
}

#[test]
fn float16() {
    sweep::<f16>(1e-3);
}

#[test]
fn bfloat16() {
    sweep::<bf16>(1e-2);
}

#[test]
fn wide_heads_and_long_rows() {
    let s = shape(1, 200, 300, (2, 2), (512, 512));
    Case::<f32>::new(s, Mask::causal_bottom_right(200, 300), 0.5).check(BiasKind::None, Blocking::default(), 3e-6);
    let s = shape(1, 1000, 1000, (1, 1), (64, 64));
    Case::<f32>::new(s, Mask::causal_top_left(), 4.0).check(BiasKind::None, Blocking::default(), 1e-5);
}

#[test]
fn negative_and_zero_scale() {
    for (q, scale) in [(33, -0.7), (33, 0.0), (12, -0.7), (20, -0.7), (12, 0.0)] {
        let s = shape(1, q, 70, (1, 1), (16, 16));
        let mut case = Case::<f32>::new(s, Mask::causal_bottom_right(q, 70), 3.0);
        case.scale = scale;
        case.check(BiasKind::None, Blocking::default(), 2e-6);
        case.check(BiasKind::Dense, Blocking::default(), 2e-6);
        case.mask = Mask::None;
        case.check(BiasKind::None, Blocking::default(), 2e-6);
    }
}

#[test]
fn what_is_seen_propagates() {
    // 3, 16 and 20 rows, whole blocks of keys and a rest: every form of the scores.
    for q in [3, 16, 20] {
        for value in [f32::NAN, f32::INFINITY] {
            for part in 0..3 {
                let mut case = Case::<f32>::new(shape(1, q, 200, (1, 1), (16, 16)), Mask::None, 1.0);
                [&mut case.q, &mut case.k, &mut case.v].into_iter().nth(part).unwrap()[2 * 16 + 5] = value;
                case.check(BiasKind::None, Blocking::default(), 2e-6);
            }
        }
    }
}

#[test]
fn hidden_nan_does_not_leak() {
    let s = shape(1, 70, 70, (1, 1), (16, 16));
    let mut case = Case::<f32>::new(s, Mask::causal_top_left(), 1.0);
    case.k[40 * 16 + 3] = f32::NAN;
    case.v[50 * 16 + 5] = f32::INFINITY;
    case.v[60 * 16 + 5] = f32::NAN;
    case.check(BiasKind::None, Blocking::default(), 2e-6);
    case.check(BiasKind::None, TINY, 2e-6);
    case.visible.iter_mut().enumerate().for_each(|(i, x)| *x = u8::from(![40, 50, 60].contains(&(i % 70))));
    case.mask = Mask::None;
    case.check(BiasKind::PerKey, Blocking::default(), 2e-6);
    case.check(BiasKind::Bool, Blocking::default(), 2e-6);
}

#[test]
fn large_scores_stay_finite() {
    let s = shape(1, 20, 90, (1, 1), (32, 32));
    Case::<f32>::new(s, Mask::None, 300.0).check(BiasKind::None, Blocking::default(), 2e-2);
    Case::<f64>::new(s, Mask::None, 300.0).check(BiasKind::None, Blocking::default(), 1e-10);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn any_shape(
        batch in 0usize..3, q in 0usize..80, k in 0usize..80, kv_heads in 1usize..3, group in 1usize..4,
        dim in 0usize..70, dim_v in 0usize..70, mask in 0usize..3, kind in 0usize..4, tiny: bool,
    ) {
        let s = shape(batch, q, k, (kv_heads * group, kv_heads), (dim, dim_v));
        let case = Case::<f32>::new(s, masks(s)[mask], 1.0);
        case.check(KINDS[kind], if tiny { TINY } else { Blocking::default() }, 3e-6);
        Case::<bf16>::new(s, masks(s)[mask], 1.0).check(KINDS[kind], Blocking::default(), 1e-2);
        Case::<f16>::new(s, masks(s)[mask], 1.0).check(KINDS[kind], Blocking::default(), 1e-3);
        Case::<f64>::new(s, masks(s)[mask], 1.0).check(KINDS[kind], Blocking::default(), 1e-14);
    }
}
