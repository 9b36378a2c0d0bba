//! From scores and the gradients of weights to weights and the gradients of scores, in columns: one query in each lane.
//!
//! A pass over two buffers of scores that lie in the first-level caches.

use super::load::MAX_LANES;
use super::online_softmax::{Column, WeightForm};
use crate::dtype::Float;
use crate::simd::{Isa, SimdElement, Vector};
use std::ops::Range;

/// What one vector of queries shares.
#[derive(Clone, Copy)]
pub struct QueryState<V> {
    /// Factor of the scores within the exponential.
    pub scale: V,
    /// Subtracted from scaled scores: the log-sum-exp in base 2. Infinite for lanes without a query.
    pub base: V,
    /// Subtracted from the gradients of weights.
    pub delta: V,
    /// Factor of the gradients of scores, if not 1.
    pub slope: Option<V>,
}

/// What differs from key to key; rows lie as the scores do.
#[derive(Clone, Copy)]
pub struct ByKey<'a, A> {
    /// Factors of the gradients of scores.
    pub slopes: Option<&'a [A]>,
    /// Factors of the weights on the way to the output.
    pub factors: Option<&'a [A]>,
}

/// Turns scores into weights and gradients of weights into those of raw scores: `P = 2^(s * scale - base)`, `P (dP - delta) slope`.
///
/// A hidden key gets the weight `-0` and the gradient 0, whatever the others are.
#[inline(always)]
pub fn softmax_gradients<T: SimdElement, I: Isa, W: WeightForm>(
    (scores, gradients): (&mut Column<'_, T::Acc>, &mut Column<'_, T::Acc>),
    keys: Range<usize>,
    query: &QueryState<T::V<I>>,
    by_key: &ByKey<'_, T::Acc>,
) {
    let zero = T::V::<I>::splat(T::Acc::ZERO);
    let lowest = T::V::<I>::splat(T::Acc::LOWEST);
    let minus_base = zero.sub(query.base);
    for j in keys {
        let row = &mut scores.rows[j * scores.stride..];
        let score = T::V::<I>::load(row);
        let weight = W::weight::<T, I>(score, query.scale, minus_base);
        let gradient_row = &mut gradients.rows[j * gradients.stride..];
        let mut of_weight = T::V::<I>::load(gradient_row);
        if let Some(factors) = by_key.factors {
            let factor = T::V::<I>::load(&factors[j * scores.stride..]);
            of_weight = of_weight.mul(factor);
            weight.mul(factor).store(row);
        } else {
            weight.store(row);
        }
        let mut gradient = weight.mul(of_weight.sub(query.delta));
        if let Some(slope) = query.slope {
            gradient = gradient.mul(slope);
        }
        if let Some(slopes) = by_key.slopes {
            gradient = gradient.mul(T::V::<I>::load(&slopes[j * scores.stride..]));
        }
        if W::HIDES {
            gradient = lowest.select_gt(score, zero, gradient);
        }
        gradient.store(gradient_row);
    }
}

/// As [`softmax_gradients`] for weights that are no exponentials: `weigh` gives a score's weight and its derivative, lane by lane.
#[inline(always)]
pub fn other_gradients<T: SimdElement, I: Isa>(
    (scores, gradients): (&mut Column<'_, T::Acc>, &mut Column<'_, T::Acc>),
    keys: Range<usize>,
    query: &QueryState<T::V<I>>,
    by_key: &ByKey<'_, T::Acc>,
    weigh: impl Fn(usize, f64) -> (f64, f64),
) {
    let lanes = T::V::<I>::LANES;
    let (mut deltas, mut row_slopes) = ([T::Acc::ZERO; MAX_LANES], [T::Acc::ZERO; MAX_LANES]);
    query.delta.store(&mut deltas);
    query.slope.unwrap_or(T::V::<I>::splat(T::Acc::from_f64(1.0))).store(&mut row_slopes);
    for j in keys {
        let score_row = &mut scores.rows[j * scores.stride..][..lanes];
        let gradient_row = &mut gradients.rows[j * gradients.stride..][..lanes];
        for (lane, (score, gradient)) in score_row.iter_mut().zip(gradient_row).enumerate() {
            if *score == T::Acc::NEG_INFINITY {
                (*score, *gradient) = (T::Acc::MINUS_ZERO, T::Acc::ZERO);
                continue;
            }
            let (weight, rate) = weigh(lane, score.to_f64());
            let at = |rows: Option<&[T::Acc]>| rows.map_or(1.0, |rows| rows[j * scores.stride + lane].to_f64());
            let (slope, factor) = (row_slopes[lane].to_f64() * at(by_key.slopes), at(by_key.factors));
            let of_weight = factor * gradient.to_f64();
            let change = if rate == 0.0 { 0.0 } else { rate * (of_weight - deltas[lane].to_f64()) * slope };
            (*score, *gradient) = (T::Acc::from_f64(weight * factor), T::Acc::from_f64(change));
        }
    }
}
