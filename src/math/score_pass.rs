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

/// Maxima that do not wait for each other.
const CHAINS: usize = 4;

/// Applies `pass` to every row of `keys`, with its number, and returns the maximum of the results.
#[inline(always)]
fn for_each_row<T: SimdElement, I: Isa>(
    column: &mut Column<'_, T::Acc>,
    keys: Range<usize>,
    pass: impl Fn(T::V<I>, usize) -> T::V<I>,
) -> T::V<I> {
    let mut peaks = [T::V::<I>::splat(T::Acc::NEG_INFINITY); CHAINS];
    let mut j = keys.start;
    while j < keys.end {
        for (i, peak) in peaks.iter_mut().enumerate() {
            if j + i < keys.end {
                let row = &mut column.rows[(j + i) * column.stride..];
                let s = pass(T::V::<I>::load(row), j + i);
                s.store(row);
                *peak = peak.max(s);
            }
        }
        j += CHAINS;
    }
    peaks[0].max(peaks[1]).max(peaks[2].max(peaks[3]))
}

/// Multiplies by `scale`; returns the maximum.
#[inline(always)]
pub fn scale<T: SimdElement, I: Isa>(column: &mut Column<'_, T::Acc>, keys: Range<usize>, scale: T::V<I>) -> T::V<I> {
    for_each_row::<T, I>(column, keys, |s, _| s.mul(scale))
}

/// `unit * cap * tanh(s * scale / cap)`, where `scale_of_cap` is `scale / cap` and `height` is `unit * cap`; returns the maximum.
/// `slopes` gets the derivatives of `cap * tanh(x / cap)`.
#[inline(always)]
pub fn softcap<T: SimdElement, I: Isa>(
    column: &mut Column<'_, T::Acc>,
    keys: Range<usize>,
    scale_of_cap: T::V<I>,
    height: T::Acc,
    slopes: Option<&mut Column<'_, T::Acc>>,
) -> T::V<I> {
    let height = T::V::<I>::splat(height);
    if let Some(slopes) = slopes {
        let one = T::V::<I>::splat(T::Acc::from_f64(1.0));
        for j in keys.clone() {
            let t = tanh::<T, I>(T::V::<I>::load(&column.rows[j * column.stride..]).mul(scale_of_cap));
            one.sub(t.mul(t)).store(&mut slopes.rows[j * slopes.stride..]);
        }
    }
    for_each_row::<T, I>(column, keys, |s, _| tanh::<T, I>(s.mul(scale_of_cap)).mul(height))
}

/// A linear bias: `-slope * |position - j|` for key `j`, where `position` counts as the keys do.
pub struct Alibi<V> {
    /// Fall of the scores with the distance.
    pub slope: V,
    /// The queries' places among the keys.
    pub position: V,
    /// Whether no key is behind a query.
    pub ahead: bool,
}

/// Multiplies by `scale` and adds a linear bias; returns the maximum.
#[inline(always)]
pub fn alibi<T: SimdElement, I: Isa>(
    column: &mut Column<'_, T::Acc>,
    keys: Range<usize>,
    scale: T::V<I>,
    alibi: &Alibi<T::V<I>>,
) -> T::V<I> {
    let zero = T::V::<I>::splat(T::Acc::ZERO);
    let key = |j: usize| T::V::<I>::splat(T::Acc::from_f64(j as f64));
    if alibi.ahead {
        let start = zero.sub(alibi.slope.mul(alibi.position));
        return for_each_row::<T, I>(column, keys, |s, j| s.mul_add(scale, key(j).mul_add(alibi.slope, start)));
    }
    for_each_row::<T, I>(column, keys, |s, j| {
        let ahead = key(j).sub(alibi.position);
        // Minus the absolute value.
        let distance = zero.sub(ahead.max(zero.sub(ahead)));
        s.mul_add(scale, distance.mul(alibi.slope))
    })
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
    let mut peaks = [T::V::<I>::splat(T::Acc::NEG_INFINITY); CHAINS];
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

/// Replaces each score by its weight, given its lane; those of hidden keys stay `-inf`.
#[inline(always)]
pub fn map<T: SimdElement, I: Isa>(column: &mut Column<'_, T::Acc>, keys: Range<usize>, weight: impl Fn(usize, f64) -> f64) {
    let lanes = T::V::<I>::LANES;
    for j in keys {
        map_row(&mut column.rows[j * column.stride..][..lanes], &weight);
    }
}

/// As [`map`], for scores in a row, given their places.
#[inline(always)]
pub fn map_row<A: Float>(scores: &mut [A], weight: impl Fn(usize, f64) -> f64) {
    for (place, score) in scores.iter_mut().enumerate() {
        if *score != A::NEG_INFINITY {
            *score = A::from_f64(weight(place, score.to_f64()));
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
