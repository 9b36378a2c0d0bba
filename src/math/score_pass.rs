//! What is done to scores on the way to weights, in columns: one query in each lane, keys down the rows.
//!
//! Each function is a pass over scores that lie in the first-level cache: two loads and a store for a vector of scores, next to the
//! `2 * head_dim` cycles of its products.

use super::load::MAX_LANES;
use super::online_softmax::Column;
use super::tanh::{tanh, tanh_each};
use crate::dtype::Float;
use crate::simd::{Isa, SimdElement, Vector};
use std::ops::Range;

/// Maxima that do not wait for each other.
const CHAINS: usize = 4;

/// What becomes of vectors of scores.
///
/// No closure: those are compiled for no instruction set, unless the compiler chooses to inline them. Implementations mark
/// [`Pass::apply`] `#[inline(always)]`.
trait Pass<V> {
    /// The scores of the keys at `places` of the block.
    fn apply(&self, scores: [V; CHAINS], places: [V; CHAINS]) -> [V; CHAINS];
}

/// Applies `pass` to every row of `keys`, and returns the maximum of the results.
#[inline(always)]
fn for_each_row<T: SimdElement, I: Isa>(
    column: &mut Column<'_, T::Acc>,
    keys: Range<usize>,
    pass: &impl Pass<T::V<I>>,
) -> T::V<I> {
    let stride = column.stride;
    let number = |x: usize| T::V::<I>::splat(T::Acc::from_f64(x as f64));
    let mut peaks = [T::V::<I>::splat(T::Acc::NEG_INFINITY); CHAINS];
    let mut places = [number(keys.start); CHAINS];
    for (i, place) in places.iter_mut().enumerate() {
        *place = place.add(number(i));
    }
    let whole = keys.end - keys.len() % CHAINS;
    for j in (keys.start..whole).step_by(CHAINS) {
        let rows = &mut column.rows[j * stride..][..(CHAINS - 1) * stride + T::V::<I>::LANES];
        let mut scores = places;
        for (i, score) in scores.iter_mut().enumerate() {
            *score = T::V::<I>::load(&rows[i * stride..]);
        }
        let scores = pass.apply(scores, places);
        for i in 0..CHAINS {
            scores[i].store(&mut rows[i * stride..]);
            peaks[i] = peaks[i].max(scores[i]);
            places[i] = places[i].add(number(CHAINS));
        }
    }
    if whole < keys.end {
        let mut scores = [T::V::<I>::splat(T::Acc::ZERO); CHAINS];
        for (j, score) in (whole..keys.end).zip(&mut scores) {
            *score = T::V::<I>::load(&column.rows[j * stride..]);
        }
        for (j, score) in (whole..keys.end).zip(pass.apply(scores, places)) {
            score.store(&mut column.rows[j * stride..]);
            peaks[0] = peaks[0].max(score);
        }
    }
    peaks[0].max(peaks[1]).max(peaks[2].max(peaks[3]))
}

struct Scale<V>(V);

impl<V: Vector> Pass<V> for Scale<V> {
    #[inline(always)]
    fn apply(&self, mut scores: [V; CHAINS], _: [V; CHAINS]) -> [V; CHAINS] {
        for score in &mut scores {
            *score = score.mul(self.0);
        }
        scores
    }
}

/// Multiplies by `scale`; returns the maximum.
#[inline(always)]
pub fn scale<T: SimdElement, I: Isa>(column: &mut Column<'_, T::Acc>, keys: Range<usize>, scale: T::V<I>) -> T::V<I> {
    for_each_row::<T, I>(column, keys, &Scale(scale))
}

/// `height * tanh(s * scale_of_cap)`.
struct Softcap<T: SimdElement, I: Isa> {
    scale_of_cap: T::V<I>,
    height: T::V<I>,
}

impl<T: SimdElement, I: Isa> Pass<T::V<I>> for Softcap<T, I> {
    #[inline(always)]
    fn apply(&self, mut scores: [T::V<I>; CHAINS], _: [T::V<I>; CHAINS]) -> [T::V<I>; CHAINS] {
        for score in &mut scores {
            *score = score.mul(self.scale_of_cap);
        }
        scores = tanh_each::<T, I, CHAINS>(scores);
        for score in &mut scores {
            *score = score.mul(self.height);
        }
        scores
    }
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
    for_each_row::<T, I>(column, keys, &Softcap::<T, I> { scale_of_cap, height })
}

/// A linear bias: `-slope * |position - j|` for key `j`, where `position` counts as the keys do.
pub struct Alibi<V> {
    /// What scores are multiplied by before.
    pub scale: V,
    /// Fall of the scores with the distance.
    pub slope: V,
    /// The queries' places among the keys.
    pub position: V,
}

impl<V: Vector> Pass<V> for Alibi<V> {
    #[inline(always)]
    fn apply(&self, mut scores: [V; CHAINS], places: [V; CHAINS]) -> [V; CHAINS] {
        let zero = V::splat(V::Elem::ZERO);
        for (score, place) in scores.iter_mut().zip(&places) {
            let ahead = place.sub(self.position);
            // Minus the absolute value.
            let distance = zero.sub(ahead.max(zero.sub(ahead)));
            *score = score.mul_add(self.scale, distance.mul(self.slope));
        }
        scores
    }
}

/// [`Alibi`] where no key is behind a query.
struct Rising<V> {
    scale: V,
    slope: V,
    /// The bias of key 0.
    start: V,
}

impl<V: Vector> Pass<V> for Rising<V> {
    #[inline(always)]
    fn apply(&self, mut scores: [V; CHAINS], places: [V; CHAINS]) -> [V; CHAINS] {
        for (score, place) in scores.iter_mut().zip(&places) {
            *score = score.mul_add(self.scale, place.mul_add(self.slope, self.start));
        }
        scores
    }
}

/// Scales and adds a linear bias; returns the maximum. `ahead` says that no key is behind a query.
#[inline(always)]
pub fn alibi<T: SimdElement, I: Isa>(
    column: &mut Column<'_, T::Acc>,
    keys: Range<usize>,
    alibi: &Alibi<T::V<I>>,
    ahead: bool,
) -> T::V<I> {
    let &Alibi { scale, slope, position } = alibi;
    if ahead {
        let start = T::V::<I>::splat(T::Acc::ZERO).sub(slope.mul(position));
        return for_each_row::<T, I>(column, keys, &Rising { scale, slope, start });
    }
    for_each_row::<T, I>(column, keys, alibi)
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
