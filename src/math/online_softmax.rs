//! The online softmax: running maximum `m` and sum `l` of every query, in base 2.
//!
//! A query sits in one lane, keys run down the rows: maximum and sum need no work across lanes.

use super::exp::exp2;
use super::load::MAX_LANES;
use super::weigh::MAX_KEYS;
use crate::dtype::Float;
use crate::simd::{Isa, SimdElement, Vector, VectorKernel};
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

/// Turns `keys` rows of scores into rows of probability operands `2^(s * scale - base)`, in place, and returns their sum.
///
/// Operand row `i` holds keys `DEPTH * i ..`; a missing last key counts as probability 0. With `MASKED`, a score of `-inf`
/// becomes `-0`: adding `-0 * v` changes nothing for finite `v`, and marks the entry for the path that non-finite values take.
#[inline(always)]
pub fn probabilities<T: SimdElement, I: Isa, const MASKED: bool>(
    column: &mut Column<'_, T::Acc>,
    keys: usize,
    scale: T::V<I>,
    base: T::V<I>,
) -> T::V<I> {
    let stride = column.stride;
    let zero = T::V::<I>::splat(T::Acc::ZERO);
    let minus_base = zero.sub(base);
    let mut sums = [zero; 2];
    let mut j = 0;
    while j < keys {
        let mut p = [zero; 2];
        let pair = keys - j >= 2;
        p[0] = probability::<T, I, MASKED>(&column.rows[j * stride..], scale, minus_base);
        sums[0] = sums[0].add(p[0]);
        if pair {
            p[1] = probability::<T, I, MASKED>(&column.rows[(j + 1) * stride..], scale, minus_base);
            sums[1] = sums[1].add(p[1]);
        }
        if T::Kernel::<I>::DEPTH == 2 {
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

#[inline(always)]
fn probability<T: SimdElement, I: Isa, const MASKED: bool>(row: &[T::Acc], scale: T::V<I>, minus_base: T::V<I>) -> T::V<I> {
    let s = T::V::<I>::load(row);
    let p = exp2::<T, I>(s.mul_add(scale, minus_base));
    if MASKED { T::V::<I>::splat(T::Acc::LOWEST).select_gt(s, T::V::<I>::splat(T::Acc::MINUS_ZERO), p) } else { p }
}

/// `scale` in base 2.
pub fn scale_base2<A: Float>(scale: f64) -> A {
    A::from_f64(scale * std::f64::consts::LOG2_E)
}

/// Bias in base 2. The lowest numbers, which many use to hide keys, stay finite: a row that has nothing else averages its values.
#[inline(always)]
pub fn finite_bias<T: SimdElement, I: Isa>(bias: T::V<I>) -> T::V<I> {
    let base2 = T::V::<I>::splat(T::Acc::from_f64(std::f64::consts::LOG2_E));
    T::V::<I>::splat(T::Acc::LOWEST).max(bias.mul(base2))
}

/// What one block did to a row.
pub struct RowStep<A> {
    /// The factor that old sums shrink by.
    pub alpha: A,
    /// Whether a key of the block is hidden from the row: its probability is then `-0`.
    pub hides: bool,
}

/// One row's online softmax, keys in the lanes: turns the scores of a block of `keys.0` keys into probabilities, in place, 0 beyond
/// them, and updates maximum and sum. The row sees the keys `keys.1`, less those whose bias is `-inf`.
#[inline(always)]
pub fn row_probabilities<T: SimdElement, I: Isa>(
    scores: &mut [T::Acc],
    (count, seen): (usize, Range<usize>),
    scale: T::Acc,
    bias: Option<&[T::Acc; MAX_KEYS]>,
    m: &mut T::Acc,
    l: &mut T::Acc,
) -> RowStep<T::Acc> {
    let lanes = T::V::<I>::LANES;
    let splat = T::V::<I>::splat;
    let lowest = splat(T::Acc::NEG_INFINITY);
    let whole = bias.is_none() && seen == (0..scores.len());
    let mut peak = lowest;
    for (j, row) in scores.chunks_exact_mut(lanes).enumerate() {
        let mut s = T::V::<I>::load(row).mul(splat(scale));
        if !whole {
            if let Some(bias) = bias {
                let bias = T::V::<I>::load(&bias[j * lanes..]);
                s = s.add(finite_bias::<T, I>(bias));
                // A hidden key's score may be NaN, and NaN + -inf is NaN.
                s = splat(T::Acc::LOWEST).select_gt(bias, lowest, s);
            }
            let position = T::V::<I>::load(&positions::<T::Acc>(j * lanes));
            s = splat(T::Acc::from_f64(seen.end as f64)).select_gt(position, s, lowest);
            s = position.select_gt(splat(T::Acc::from_f64(seen.start as f64 - 1.0)), s, lowest);
        }
        s.store(row);
        peak = peak.max(s);
    }
    let hides = !whole && scores[..count].contains(&T::Acc::NEG_INFINITY);
    let old = *m;
    *m = fold_lanes::<T, I>(peak, old, |x, y| if y > x { y } else { x });
    let base = if *m > T::Acc::NEG_INFINITY { *m } else { T::Acc::ZERO };
    let mut alpha = [T::Acc::ZERO; MAX_LANES];
    exp2::<T, I>(splat(old).sub(splat(base))).store(&mut alpha);
    let mut sums = splat(T::Acc::ZERO);
    for row in scores.chunks_exact_mut(lanes) {
        let s = T::V::<I>::load(row);
        let mut p = exp2::<T, I>(s.sub(splat(base)));
        sums = sums.add(p);
        if !whole {
            p = splat(T::Acc::LOWEST).select_gt(s, splat(T::Acc::MINUS_ZERO), p);
        }
        p.store(row);
    }
    let sum = fold_lanes::<T, I>(sums, T::Acc::ZERO, |x, y| T::Acc::from_f64(x.to_f64() + y.to_f64()));
    *l = T::Acc::from_f64(l.to_f64() * alpha[0].to_f64() + sum.to_f64());
    RowStep { alpha: alpha[0], hides }
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

#[inline(always)]
fn fold_lanes<T: SimdElement, I: Isa>(v: T::V<I>, start: T::Acc, op: impl Fn(T::Acc, T::Acc) -> T::Acc) -> T::Acc {
    let mut lanes = [T::Acc::ZERO; MAX_LANES];
    v.store(&mut lanes);
    let mut result = start;
    for &x in &lanes[..T::V::<I>::LANES] {
        result = op(result, x);
    }
    result
}

/// `ln` of the sum of exponentials, from the running maximum and sum in base 2; `-inf` where no key was seen.
pub fn log_sum_exp<A: Float>(m: A, l: A) -> A {
    // A maximum that `finite_bias` had to hold back is at least as low in base e.
    if m == A::LOWEST {
        return m;
    }
    A::from_f64((m.to_f64() + l.to_f64().log2()) * std::f64::consts::LN_2)
}
