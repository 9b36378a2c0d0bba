//! Score modifiers, normalisers and intervals, alone and together.

use crate::case::{BiasKind, Case, Mods, Seen, shape};
use crate::stream::Stream;
use half::bf16;
use subquad::kernels::exact::Blocking;
use subquad::kernels::mask::{RowRanges, Window};
use subquad::kernels::score_mod::Normalizer;
use subquad::simd::SimdElement;

type Sizes = (usize, usize, (usize, usize), (usize, usize));

/// Queries, keys, heads and widths: few and many queries, groups, keys of several blocks.
const SHAPES: [Sizes; 5] = [
    (1, 700, (4, 2), (64, 40)),
    (5, 130, (3, 3), (20, 20)),
    (16, 600, (2, 1), (64, 64)),
    (100, 100, (4, 2), (40, 64)),
    (130, 257, (2, 1), (64, 33)),
];
const TINY: Blocking = Blocking { block_q: Some(1), block_k: Some(8) };

pub fn all_mods(queries: usize, keys: usize) -> Vec<Mods> {
    let mut stream = Stream(7);
    let mut some = |len: usize| (0..len).map(|_| stream.next()).collect::<Vec<f64>>();
    let (slopes, sinks, rows) = (some(4), some(4), some(queries));
    let toeplitz: Vec<f32> = some(queries + keys - 1).iter().map(|&x| x as f32).collect();
    let by_length: Vec<f64> = (0..=keys).map(|n| 1.0 + 0.1 * (n as f64).ln_1p()).collect();
    let one = |mods: Mods| mods;
    vec![
        one(Mods { softcap: Some(2.0), ..Mods::default() }),
        one(Mods { slopes: Some(slopes.iter().map(|x| 0.05 * (1.0 + x)).collect()), ..Mods::default() }),
        one(Mods { sinks: Some(sinks.clone()), ..Mods::default() }),
        one(Mods { row_scale: Some(rows.clone()), by_length: Some(by_length.clone()), ..Mods::default() }),
        one(Mods { toeplitz: Some(toeplitz.clone()), ..Mods::default() }),
        Mods {
            softcap: Some(3.0),
            slopes: Some(vec![0.02; 4]),
            sinks: Some(sinks),
            row_scale: Some(rows),
            by_length: Some(by_length),
            toeplitz: Some(toeplitz),
            ..Mods::default()
        },
    ]
}

pub fn all_normalizers() -> [Normalizer; 6] {
    [
        Normalizer::Sigmoid { bias: -1.5 },
        Normalizer::Softplus,
        Normalizer::Relu { power: 1.0, normalize: true },
        Normalizer::Relu { power: 2.0, normalize: false },
        Normalizer::Power { power: 2.0 },
        Normalizer::Power { power: 4.0 },
    ]
}

pub fn gaps(queries: usize, keys: usize) -> Seen {
    let mut ranges = RowRanges { indptr: vec![0], intervals: vec![], strides: [0, 0, 1] };
    for token in 0..queries {
        // A prefix, a stretch in the middle that moves, nothing at all for some.
        let middle = (keys / 3 + token).min(keys);
        let row = [(0, keys.min(5 + token % 3)), (middle, keys.min(middle + 70)), (keys.max(2) - 2, keys)];
        let mut end = 0;
        for (start, stop) in row.into_iter().filter(|_| token % 11 != 3) {
            let start = start.max(end);
            if start < stop {
                ranges.intervals.push((start, stop));
                end = stop;
            }
        }
        ranges.indptr.push(ranges.intervals.len());
    }
    Seen { ranges: Some(ranges), ..Seen::all() }
}

fn sweep<T: SimdElement>(tolerance: f64) {
    for (q, k, heads, dims) in SHAPES {
        let s = shape(2, q, k, heads, dims);
        let seen = [Seen::causal_bottom_right(q, k), Seen::window(k as isize - q as isize, 40, 3), gaps(q, k)];
        for mods in all_mods(q, k) {
            for seen in &seen {
                let case = Case::<T> { mods: mods.clone(), ..Case::new(s, seen.clone(), 1.0) };
                case.check(BiasKind::None, Blocking::default(), tolerance);
                case.check(BiasKind::Dense, TINY, tolerance);
            }
        }
    }
}

#[test]
fn modified_scores() {
    sweep::<f32>(4e-6);
    sweep::<bf16>(2e-2);
}

#[test]
fn modified_scores_in_double_precision() {
    sweep::<f64>(1e-13);
}

#[test]
fn normalizers() {
    for (q, k, heads, dims) in SHAPES {
        let s = shape(1, q, k, heads, dims);
        for normalizer in all_normalizers() {
            for seen in [Seen::all(), Seen::window(k as isize - q as isize, 40, 3), gaps(q, k)] {
                // Sums that are not divided grow with the number of keys.
                let tolerance = if normalizer.divides() { 1.0 } else { 20.0 };
                let case = Case::<f32> { mods: Mods { normalizer, ..Mods::default() }, ..Case::new(s, seen.clone(), 1.0) };
                case.check(BiasKind::None, Blocking::default(), 1e-5 * tolerance);
                case.check(BiasKind::Bool, TINY, 1e-5 * tolerance);
                let case = Case::<f64> { mods: Mods { normalizer, ..Mods::default() }, ..Case::new(s, seen, 1.0) };
                case.check(BiasKind::None, Blocking::default(), 1e-13 * tolerance);
            }
        }
    }
}

#[test]
fn reweighted_softplus() {
    for (q, k, heads, dims) in SHAPES {
        let s = shape(2, q, k, heads, dims);
        for seen in [Seen::causal_bottom_right(q, k), Seen::window(k as isize - q as isize, 40, 3), gaps(q, k)] {
            let mods = Mods { normalizer: Normalizer::Softplus, reweight: Some(3.0), ..Mods::default() };
            let case = Case::<f64> { mods: mods.clone(), ..Case::new(s, seen.clone(), 1.0) };
            case.check_forward(BiasKind::None, Blocking::default(), 1e-11);
            case.check_forward(BiasKind::Dense, TINY, 1e-11);
            let case = Case::<f32> { mods, ..Case::new(s, seen, 1.0) };
            case.check_forward(BiasKind::Bool, TINY, 1e-4);
        }
    }
}

#[test]
fn gaps_hide_what_is_not_finite() {
    for q in [3, 90] {
        let mut case = Case::<f32>::new(shape(1, q, 300, (2, 1), (16, 16)), gaps(q, 300), 1.0);
        // Before the middle of the first query, hence of all.
        case.k[60 * 16 + 3] = f32::NAN;
        case.v[61 * 16 + 5] = f32::INFINITY;
        case.v[62 * 16 + 5] = f32::NAN;
        let (out, _) = case.run_prefill();
        assert!(out.iter().all(|x| x.is_finite()));
        case.check(BiasKind::None, Blocking::default(), 2e-6);
        case.seen = Seen { windows: vec![Window { left: 5, right: 5 }], ..Seen::window(150, 0, 0) };
        case.check(BiasKind::None, TINY, 2e-6);
    }
}

#[test]
fn sinks_alone_give_zeros() {
    let seen = Seen::window(0, 0, -1);
    let mut case = Case::<f32>::new(shape(1, 3, 40, (1, 1), (8, 8)), seen, 1.0);
    case.mods.sinks = Some(vec![0.25]);
    let (out, lse) = case.run_prefill();
    assert!(out[..8].iter().all(|&x| x == 0.0));
    assert!((lse[0] - 0.25).abs() < 1e-6);
    case.check(BiasKind::None, Blocking::default(), 2e-6);
}
