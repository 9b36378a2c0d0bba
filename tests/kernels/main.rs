//! Attention: every level, blocking, form and thread count against the naive form.
#![allow(clippy::float_cmp, reason = "exact values are meant")]

mod case;
mod gradients;
mod modified;
mod second;
mod segments;
#[path = "../common/stream.rs"]
mod stream;

use case::{BiasKind, Case, Seen, shape};
use half::{bf16, f16};
use proptest::prelude::*;
use subquad::kernels::exact::Blocking;
use subquad::kernels::mask::Window;
use subquad::simd::SimdElement;
use subquad::tensor::AttnShape;

fn all_seen(s: AttnShape) -> [Seen; 5] {
    let offset = s.seqlen_k as isize - s.seqlen_q as isize;
    [
        Seen::all(),
        Seen::causal_top_left(),
        Seen::causal_bottom_right(s.seqlen_q, s.seqlen_k),
        Seen::window(offset, 20, 0),
        Seen {
            windows: vec![Window { left: 3, right: 70 }, Window { left: Window::UNBOUNDED, right: -2 }],
            ..Seen::window(offset, 0, 0)
        },
    ]
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
        for seen in all_seen(s) {
            let case = Case::<T>::new(s, seen, 1.0);
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
    Case::<f32>::new(s, Seen::causal_bottom_right(200, 300), 0.5).check(BiasKind::None, Blocking::default(), 3e-6);
    let s = shape(1, 1000, 1000, (1, 1), (64, 64));
    Case::<f32>::new(s, Seen::causal_top_left(), 4.0).check(BiasKind::None, Blocking::default(), 1e-5);
}

#[test]
fn negative_and_zero_scale() {
    for (q, scale) in [(33, -0.7), (33, 0.0), (12, -0.7), (20, -0.7), (12, 0.0)] {
        let s = shape(1, q, 70, (1, 1), (16, 16));
        let mut case = Case::<f32>::new(s, Seen::causal_bottom_right(q, 70), 3.0);
        case.scale = scale;
        case.check(BiasKind::None, Blocking::default(), 2e-6);
        case.check(BiasKind::Dense, Blocking::default(), 2e-6);
        case.seen = Seen::all();
        case.check(BiasKind::None, Blocking::default(), 2e-6);
    }
}

#[test]
fn what_is_seen_propagates() {
    // 3, 16 and 20 rows, whole blocks of keys and a rest: every form of the scores.
    for q in [3, 16, 20] {
        for value in [f32::NAN, f32::INFINITY] {
            for part in 0..3 {
                let mut case = Case::<f32>::new(shape(1, q, 200, (1, 1), (16, 16)), Seen::all(), 1.0);
                [&mut case.q, &mut case.k, &mut case.v].into_iter().nth(part).unwrap()[2 * 16 + 5] = value;
                case.check(BiasKind::None, Blocking::default(), 2e-6);
            }
        }
    }
}

#[test]
fn hidden_nan_does_not_leak() {
    let s = shape(1, 70, 70, (1, 1), (16, 16));
    let mut case = Case::<f32>::new(s, Seen::causal_top_left(), 1.0);
    case.k[40 * 16 + 3] = f32::NAN;
    case.v[50 * 16 + 5] = f32::INFINITY;
    case.v[60 * 16 + 5] = f32::NAN;
    case.check(BiasKind::None, Blocking::default(), 2e-6);
    case.check(BiasKind::None, TINY, 2e-6);
    case.visible.iter_mut().enumerate().for_each(|(i, x)| *x = u8::from(![40, 50, 60].contains(&(i % 70))));
    case.seen = Seen::all();
    case.check(BiasKind::PerKey, Blocking::default(), 2e-6);
    case.check(BiasKind::Bool, Blocking::default(), 2e-6);
}

#[test]
fn large_scores_stay_finite() {
    let s = shape(1, 20, 90, (1, 1), (32, 32));
    Case::<f32>::new(s, Seen::all(), 300.0).check(BiasKind::None, Blocking::default(), 2e-2);
    Case::<f64>::new(s, Seen::all(), 300.0).check(BiasKind::None, Blocking::default(), 1e-10);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn any_shape(
        batch in 0usize..3, q in 0usize..80, k in 0usize..80, kv_heads in 1usize..3, group in 1usize..4,
        dim in 0usize..70, dim_v in 0usize..70, seen in 0usize..5, kind in 0usize..4, tiny: bool,
    ) {
        let s = shape(batch, q, k, (kv_heads * group, kv_heads), (dim, dim_v));
        let case = Case::<f32>::new(s, all_seen(s)[seen].clone(), 1.0);
        case.check(KINDS[kind], if tiny { TINY } else { Blocking::default() }, 3e-6);
        Case::<bf16>::new(s, all_seen(s)[seen].clone(), 1.0).check(KINDS[kind], Blocking::default(), 1e-2);
        Case::<f16>::new(s, all_seen(s)[seen].clone(), 1.0).check(KINDS[kind], Blocking::default(), 1e-3);
        Case::<f64>::new(s, all_seen(s)[seen].clone(), 1.0).check(KINDS[kind], Blocking::default(), 1e-14);
    }
}
