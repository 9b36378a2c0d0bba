//! What is done to scores on the way to weights, in columns: one query in each lane, keys down the rows.
//!
//! Each function is a pass over scores that lie in the first-level cache: two loads and a store for a vector of scores, next to the
//! `2 * head_dim` cycles of its products.

use super::load::MAX_LANES;
use super::online_softmax::Column;
use super::tanh::tanh;
use crate::dtype::Float;
use crate::simd::{Isa, SimdElement, Vector};
use std::ops::Range;

/// Multiplies by `scale`.
#[inline(always)]
pub fn scale<T: SimdElement, I: Isa>(column: &mut Column<'_, T::Acc>, keys: Range<usize>, scale: T::V<I>) {
    for j in keys {
        let row = &mut column.rows[j * column.stride..];
        T::V::<I>::load(row).mul(scale).store(row);
    }
}

/// `unit * cap * tanh(s * scale / cap)`, where `scale_of_cap` is `scale / cap` and `height` is `unit * cap`.
#[inline(always)]
pub fn softcap<T: SimdElement, I: Isa>(
    column: &mut Column<'_, T::Acc>,
    keys: Range<usize>,
    scale_of_cap: T::V<I>,
    height: T::Acc,
) {
    let height = T::V::<I>::splat(height);
    for j in keys {
        let row = &mut column.rows[j * column.stride..];
        tanh::<T, I>(T::V::<I>::load(row).mul(scale_of_cap)).mul(height).store(row);
    }
}

/// Adds `-slope * |position - j|`, where `position` counts as the keys do.
#[inline(always)]
pub fn alibi<T: SimdElement, I: Isa>(column: &mut Column<'_, T::Acc>, keys: Range<usize>, slope: T::V<I>, position: T::V<I>) {
    let zero = T::V::<I>::splat(T::Acc::ZERO);
    for j in keys {
        let row = &mut column.rows[j * column.stride..];
        let ahead = T::V::<I>::splat(T::Acc::from_f64(j as f64)).sub(position);
        // Minus the absolute value.
        let distance = zero.sub(ahead.max(zero.sub(ahead)));
        distance.mul_add(slope, T::V::<I>::load(row)).store(row);
    }
}

/// Adds the bias of `count` keys from row `first` on, in units of `unit`; what it hides becomes `-inf`.
#[inline(always)]
pub fn add_bias<T: SimdElement, I: Isa>(
    column: &mut Column<'_, T::Acc>,
    (first, count): (usize, usize),
    bias: &<T::V<I> as Vector>::Block,
    unit: T::Acc,
) {
    for (i, &bias) in bias.as_ref().iter().take(count).enumerate() {
        let row = &mut column.rows[(first + i) * column.stride..];
        biased::<T, I>(T::V::<I>::load(row), bias, unit).store(row);
    }
}

/// A score and its bias. The lowest numbers, which many use to hide keys, stay finite: a row that has nothing else averages its
/// values. A hidden key's score may be NaN, and NaN + -inf is NaN: it becomes `-inf`.
#[inline(always)]
pub fn biased<T: SimdElement, I: Isa>(score: T::V<I>, bias: T::V<I>, unit: T::Acc) -> T::V<I> {
    let lowest = T::V::<I>::splat(T::Acc::LOWEST);
    let finite = lowest.max(bias.mul(T::V::<I>::splat(unit)));
    lowest.select_gt(bias, T::V::<I>::splat(T::Acc::NEG_INFINITY), score.add(finite))
}

/// Makes the scores of keys outside of `[start, end)` `-inf`, lane by lane; `full` is within all of the ranges.
#[inline(always)]
pub fn hide_outside<T: SimdElement, I: Isa>(
    column: &mut Column<'_, T::Acc>,
    keys: Range<usize>,
    full: Range<usize>,
    (start, end): (T::V<I>, T::V<I>),
) {
    let lowest = T::V::<I>::splat(T::Acc::NEG_INFINITY);
    let one = T::V::<I>::splat(T::Acc::from_f64(1.0));
    let before_start = start.sub(one);
    let full = full.start.clamp(keys.start, keys.end)..full.end.clamp(keys.start, keys.end);
    for j in (keys.start..full.start).chain(full.end.max(full.start)..keys.end) {
        let row = &mut column.rows[j * column.stride..];
        let position = T::V::<I>::splat(T::Acc::from_f64(j as f64));
        let seen = position.select_gt(before_start, T::V::<I>::load(row), lowest);
        end.select_gt(position, seen, lowest).store(row);
    }
}

/// The maximum over `keys`.
#[inline(always)]
pub fn peak<T: SimdElement, I: Isa>(column: &Column<'_, T::Acc>, keys: Range<usize>) -> T::V<I> {
    /// Maxima that do not wait for each other.
    const CHAINS: usize = 4;
    let lowest = T::V::<I>::splat(T::Acc::NEG_INFINITY);
    let mut peaks = [lowest; CHAINS];
    let whole = keys.end - keys.len() % CHAINS;
    for j in (keys.start..whole).step_by(CHAINS) {
        for (i, peak) in peaks.iter_mut().enumerate() {
            *peak = peak.max(T::V::<I>::load(&column.rows[(j + i) * column.stride..]));
        }
    }
    for j in whole..keys.end {
        peaks[0] = peaks[0].max(T::V::<I>::load(&column.rows[j * column.stride..]));
    }
    peaks[0].max(peaks[1]).max(peaks[2].max(peaks[3]))
}

/// Replaces each score by its weight; those of hidden keys stay `-inf`.
#[inline(always)]
pub fn map<T: SimdElement, I: Isa>(column: &mut Column<'_, T::Acc>, keys: Range<usize>, weight: impl Fn(f64) -> f64) {
    let lanes = T::V::<I>::LANES;
    for j in keys {
        map_row(&mut column.rows[j * column.stride..][..lanes], &weight);
    }
}

/// As [`map`], for scores in a row.
#[inline(always)]
pub fn map_row<A: Float>(scores: &mut [A], weight: impl Fn(f64) -> f64) {
    for score in scores {
        if *score != A::NEG_INFINITY {
            *score = A::from_f64(weight(score.to_f64()));
        }
    }
}

/// One value for each lane.
#[inline(always)]
pub fn lanes<T: SimdElement, I: Isa>(value: impl Fn(usize) -> f64) -> T::V<I> {
    let mut values = [T::Acc::ZERO; MAX_LANES];
    for (lane, slot) in values[..T::V::<I>::LANES].iter_mut().enumerate() {
        *slot = T::Acc::from_f64(value(lane));
    }
    T::V::<I>::load(&values)
}
