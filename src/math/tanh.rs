//! `tanh` for vectors.

use super::load::MAX_LANES;
use crate::dtype::Float;
use crate::simd::{Isa, SimdElement, Vector};

/// From here on, `tanh` is 1 in single precision.
const SATURATED: f64 = 9.0;
/// `tanh x = x P(x^2) / Q(x^2)` on `[0, 9]`, minimax in relative error: 2.1e-8, so that the arithmetic decides.
const P: [f64; 5] = [
    0.999_999_979_465_559_4,
    0.133_810_216_334_861_9,
    0.003_495_583_180_358_211_5,
    2.060_899_318_058_115_6e-5,
    1.335_452_320_561_348_7e-8,
];
/// See [`P`].
const Q: [f64; 5] = [1.0, 0.467_143_372_306_064_1, 0.025_876_963_874_688_144, 3.285_626_394_700_981e-4, 7.776_504_853_140_801e-7];

/// `tanh x`, within a few units in the last place of the accumulator; NaN for NaN.
#[inline(always)]
pub fn tanh<T: SimdElement, I: Isa>(x: T::V<I>) -> T::V<I> {
    let [y] = tanh_each::<T, I, 1>([x]);
    y
}

/// [`tanh`] of several vectors in step. Two share a division, which takes as long as all else that one needs.
#[inline(always)]
pub fn tanh_each<T: SimdElement, I: Isa, const N: usize>(x: [T::V<I>; N]) -> [T::V<I>; N] {
    if size_of::<T::Acc>() == size_of::<f64>() {
        let mut results = x;
        for result in &mut results {
            let mut lanes = [T::Acc::ZERO; MAX_LANES];
            result.store(&mut lanes);
            for lane in &mut lanes {
                *lane = T::Acc::from_f64(lane.to_f64().tanh());
            }
            *result = T::V::<I>::load(&lanes);
        }
        return results;
    }
    let splat = |c: f64| T::V::<I>::splat(T::Acc::from_f64(c));
    let (highest, lowest) = (splat(SATURATED), splat(-SATURATED));
    let (mut above, mut below) = (x, x);
    for i in 0..N {
        // The operand order of `max` keeps a NaN, which is none of the neighbour's business.
        let x = lowest.max(x[i]);
        let x = x.select_gt(highest, highest, x);
        let finite = x.max(lowest);
        let square = finite.mul(finite);
        above[i] = x.mul(polynomial::<T, I>(&P, square));
        below[i] = polynomial::<T, I>(&Q, square);
    }
    let mut i = 0;
    while i + 1 < N {
        let reciprocal = splat(1.0).div(below[i].mul(below[i + 1]));
        above[i] = above[i].mul(reciprocal.mul(below[i + 1]));
        above[i + 1] = above[i + 1].mul(reciprocal.mul(below[i]));
        i += 2;
    }
    if i < N {
        above[i] = above[i].div(below[i]);
    }
    above
}

#[inline(always)]
fn polynomial<T: SimdElement, I: Isa>(coefficients: &[f64; 5], x: T::V<I>) -> T::V<I> {
    let mut sum = T::V::<I>::splat(T::Acc::from_f64(coefficients[4]));
    for &c in coefficients[..4].iter().rev() {
        sum = sum.mul_add(x, T::V::<I>::splat(T::Acc::from_f64(c)));
    }
    sum
}
