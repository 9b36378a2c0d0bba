//! The online softmax: running maximum `m` and sum `l` of every query, in base 2.
//!
//! In columns, a query sits in one lane, keys run down the rows: maximum and sum need no work across lanes. In rows, the keys of a
//! query sit in the lanes; sums are kept by lane, and the maxima of as many rows as there are lanes are found together.

use super::exp::exp2;
use super::load::MAX_LANES;
use super::score_pass::biased;
use super::tanh::tanh;
use crate::dtype::Float;
use crate::simd::{BLOCK_ROWS, Isa, SimdElement, Vector, VectorKernel};
use std::ops::Range;

/// Rows of scores of one vector of queries; row `j` is at `j * stride`.
pub struct Column<'a, E> {
    /// Starts at the first row's lanes.
    pub rows: &'a mut [E],
    /// Elements from one row to the next.
    pub stride: usize,
}

/// New maximum, the factor that old sums shrink by, and what is subtracted from scores.
pub struct Step<V> {
    /// The running maximum, `-inf` where no key was seen.
    pub m: V,
    /// `2^(old m - m)`.
    pub alpha: V,
    /// `m`, or 0 where that is `-inf`, so that `-inf - base` is no NaN.
    pub base: V,
}

/// Folds the maximum of new scores into the running one.
#[inline(always)]
pub fn step<T: SimdElement, I: Isa>(m: T::V<I>, peak: T::V<I>) -> Step<T::V<I>> {
    let lowest = T::V::<I>::splat(T::Acc::NEG_INFINITY);
    let new = m.max(peak);
    let base = new.select_gt(lowest, new, T::V::<I>::splat(T::Acc::ZERO));
    Step { m: new, alpha: exp2::<T, I>(m.sub(base)), base }
}

/// The maximum over `keys` rows of `scale` times the scores.
#[inline(always)]
pub fn column_peak<T: SimdElement, I: Isa>(column: &Column<'_, T::Acc>, keys: usize, scale: T::V<I>) -> T::V<I> {
    let mut peaks = [T::V::<I>::splat(T::Acc::NEG_INFINITY); 2];
    for j in (0..keys).step_by(2) {
        for (i, peak) in peaks.iter_mut().enumerate() {
            // The last row of an odd number counts twice.
            let row = (j + i).min(keys - 1) * column.stride;
            *peak = peak.max(T::V::<I>::load(&column.rows[row..]).mul(scale));
        }
    }
    peaks[0].max(peaks[1])
}

/// How a score becomes a weight.
pub trait WeightForm {
    /// Whether keys may be hidden.
    const HIDES: bool;
    /// The weight of each lane; `-0` for a hidden key: adding `-0 * v` changes nothing for finite `v`, and marks the entry for the
    /// path that non-finite values take.
    fn weight<T: SimdElement, I: Isa>(score: T::V<I>, scale: T::V<I>, minus_base: T::V<I>) -> T::V<I>;
}

/// `2^(s * scale - base)`, no key hidden.
pub struct Exponential;
/// `2^(s * scale - base)`, hidden keys `-inf`.
pub struct MaskedExponential;
/// The score itself, hidden keys `-inf`.
pub struct Ready;

impl WeightForm for Exponential {
    const HIDES: bool = false;
    #[inline(always)]
    fn weight<T: SimdElement, I: Isa>(score: T::V<I>, scale: T::V<I>, minus_base: T::V<I>) -> T::V<I> {
        exp2::<T, I>(score.mul_add(scale, minus_base))
    }
}

impl WeightForm for MaskedExponential {
    const HIDES: bool = true;
    #[inline(always)]
    fn weight<T: SimdElement, I: Isa>(score: T::V<I>, scale: T::V<I>, minus_base: T::V<I>) -> T::V<I> {
        let lowest = T::V::<I>::splat(T::Acc::LOWEST);
        // What underflows takes a hundred cycles.
        let exponent = lowest.select_gt(score, T::V::<I>::splat(T::Acc::ZERO), score.mul_add(scale, minus_base));
        lowest.select_gt(score, T::V::<I>::splat(T::Acc::MINUS_ZERO), exp2::<T, I>(exponent))
    }
}

impl WeightForm for Ready {
    const HIDES: bool = true;
    #[inline(always)]
    fn weight<T: SimdElement, I: Isa>(score: T::V<I>, _scale: T::V<I>, _minus_base: T::V<I>) -> T::V<I> {
        T::V::<I>::splat(T::Acc::LOWEST).select_gt(score, T::V::<I>::splat(T::Acc::MINUS_ZERO), score)
    }
}

/// Turns rows of scores into rows of weight operands, in place, and returns the sum of the weights. Operands are multiplied by `factors`,
/// which lie as the scores do.
///
/// `keys` starts at a multiple of `DEPTH`. Operand row `i` holds keys `DEPTH * i ..`; a missing last key counts as weight 0.
#[inline(always)]
pub fn probabilities<T: SimdElement, I: Isa, W: WeightForm>(
    column: &mut Column<'_, T::Acc>,
    keys: Range<usize>,
    (scale, base): (T::V<I>, T::V<I>),
    factors: Option<&[T::Acc]>,
) -> T::V<I> {
    let stride = column.stride;
    let depth = T::Kernel::<I>::DEPTH;
    let zero = T::V::<I>::splat(T::Acc::ZERO);
    let minus_base = zero.sub(base);
    let mut sums = [zero; 2];
    let mut j = keys.start;
    while j < keys.end {
        let mut p = [zero; 2];
        let pair = keys.end - j >= 2;
        p[0] = W::weight::<T, I>(T::V::<I>::load(&column.rows[j * stride..]), scale, minus_base);
        sums[0] = sums[0].add(p[0]);
        if pair {
            p[1] = W::weight::<T, I>(T::V::<I>::load(&column.rows[(j + 1) * stride..]), scale, minus_base);
            sums[1] = sums[1].add(p[1]);
        }
        if let Some(factors) = factors {
            p[0] = p[0].mul(T::V::<I>::load(&factors[j * stride..]));
            if pair {
                p[1] = p[1].mul(T::V::<I>::load(&factors[(j + 1) * stride..]));
            }
        }
        if depth == 2 {
            T::Kernel::<I>::fold(p).store(&mut column.rows[j / 2 * stride..]);
        } else {
            p[0].store(&mut column.rows[j * stride..]);
            if pair {
                p[1].store(&mut column.rows[(j + 1) * stride..]);
            }
        }
        j += 2;
    }
    sums[0].add(sums[1])
}

/// `scale` in base 2.
pub fn scale_base2<A: Float>(scale: f64) -> A {
    A::from_f64(scale * std::f64::consts::LOG2_E)
}

/// What is done to one row of scores. Numbers are in units of `unit`, which makes them base 2 for exponentials.
#[derive(Clone, Copy)]
pub struct RowPass<'a, A> {
    /// Factor of the scores; with a cap, of what enters `tanh`.
    pub scale: A,
    /// `unit * cap`.
    pub cap: Option<A>,
    /// What is added to each key's score.
    pub bias: Option<&'a [A; BLOCK_ROWS]>,
    /// Factor of `bias`.
    pub unit: A,
}

/// Scales and masks one row of scores in place, keys in the lanes, `-inf` where a key of `count` is hidden and beyond them; returns
/// the maximum lane by lane, and whether a key is hidden. The row sees the keys `seen`, less those whose bias is `-inf`.
#[inline(always)]
pub fn row_scores<T: SimdElement, I: Isa>(
    scores: &mut [T::Acc],
    (count, seen): (usize, Range<usize>),
    pass: RowPass<'_, T::Acc>,
) -> (T::V<I>, bool) {
    let lanes = T::V::<I>::LANES;
    let splat = T::V::<I>::splat;
    let lowest = splat(T::Acc::NEG_INFINITY);
    let whole = pass.bias.is_none() && seen == (0..scores.len());
    let mut peak = lowest;
    for (j, row) in scores.chunks_exact_mut(lanes).enumerate() {
        let mut s = T::V::<I>::load(row).mul(splat(pass.scale));
        if let Some(cap) = pass.cap {
            s = tanh::<T, I>(s).mul(splat(cap));
        }
        if !whole {
            if let Some(bias) = pass.bias {
                s = biased::<T, I>(s, T::V::<I>::load(&bias[j * lanes..]), pass.unit);
            }
            let position = T::V::<I>::load(&positions::<T::Acc>(j * lanes));
            s = splat(T::Acc::from_f64(seen.end as f64)).select_gt(position, s, lowest);
            s = position.select_gt(splat(T::Acc::from_f64(seen.start as f64 - 1.0)), s, lowest);
        }
        s.store(row);
        peak = peak.max(s);
    }
    (peak, !whole && scores[..count].contains(&T::Acc::NEG_INFINITY))
}

/// The maximum of a row of scores, lane by lane.
#[inline(always)]
pub fn row_peak<T: SimdElement, I: Isa>(scores: &[T::Acc]) -> T::V<I> {
    let mut peak = T::V::<I>::splat(T::Acc::NEG_INFINITY);
    for row in scores.chunks_exact(T::V::<I>::LANES) {
        peak = peak.max(T::V::<I>::load(row));
    }
    peak
}

/// [`step`] for as many rows as there are lanes, given the maxima of each row lane by lane.
#[inline(always)]
pub fn rows_step<T: SimdElement, I: Isa>(m: T::V<I>, peaks: <T::V<I> as Vector>::Block) -> Step<T::V<I>> {
    let mut peak = T::V::<I>::splat(T::Acc::NEG_INFINITY);
    for &lane in T::V::<I>::transpose(peaks).as_ref() {
        peak = peak.max(lane);
    }
    step::<T, I>(m, peak)
}

/// Turns one row of scores from [`row_scores`] into weights, in place, and adds them to `sums` lane by lane. The weight of a hidden
/// key is `-0`.
#[inline(always)]
pub fn row_probabilities<T: SimdElement, I: Isa, W: WeightForm>(scores: &mut [T::Acc], base: T::Acc, sums: &mut [T::Acc]) {
    let splat = T::V::<I>::splat;
    let one = splat(T::Acc::from_f64(1.0));
    let minus_base = splat(T::Acc::ZERO).sub(splat(base));
    let mut sum = T::V::<I>::load(sums);
    for row in scores.chunks_exact_mut(T::V::<I>::LANES) {
        let p = W::weight::<T, I>(T::V::<I>::load(row), one, minus_base);
        sum = sum.add(p);
        p.store(row);
    }
    sum.store(sums);
}

/// `first`, `first + 1`, ...
#[inline(always)]
fn positions<A: Float>(first: usize) -> [A; MAX_LANES] {
    let mut positions = [A::ZERO; MAX_LANES];
    for (i, position) in positions.iter_mut().enumerate() {
        *position = A::from_f64((first + i) as f64);
    }
    positions
}

/// `ln` of the sum of exponentials, from the running maximum and sum in base 2; `-inf` where no key was seen.
pub fn log_sum_exp<A: Float>(m: A, l: A) -> A {
    // A maximum that `biased` had to hold back is at least as low in base e.
    if m == A::LOWEST {
        return m;
    }
    A::from_f64((m.to_f64() + l.to_f64().log2()) * std::f64::consts::LN_2)
}
