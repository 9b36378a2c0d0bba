//! `tanh` for vectors.

use super::load::MAX_LANES;
use crate::dtype::Float;
use crate::simd::{Isa, SimdElement, Vector};

/// From here on, `tanh` is 1 in single precision.
const SATURATED: f64 = 9.0;
/// `tanh x = x P(x^2) / Q(x^2)` on `[0, 9]`, minimax in relative error: 6.6e-9, so that the arithmetic decides.
const P: [f64; 7] = [
    0.999_999_993_388_633_1,
    0.130_840_104_914_880_05,
    0.003_103_956_648_972_436,
    1.115_431_271_198_325e-5,
    -2.022_524_317_820_806_8e-8,
    5.277_956_518_470_708e-11,
    -8.488_730_704_797_176e-14,
];
/// See [`P`].
const Q: [f64; 4] = [1.0, 0.464_173_375_934_227_75, 0.024_495_180_134_184_075, 0.000_254_614_584_752_761_3];

/// `tanh x`, within a few units in the last place of the accumulator; NaN for NaN.
#[inline(always)]
pub fn tanh<T: SimdElement, I: Isa>(x: T::V<I>) -> T::V<I> {
    if size_of::<T::Acc>() == size_of::<f64>() {
        let mut lanes = [T::Acc::ZERO; MAX_LANES];
        x.store(&mut lanes);
        for lane in &mut lanes {
            *lane = T::Acc::from_f64(lane.to_f64().tanh());
        }
        return T::V::<I>::load(&lanes);
    }
    let splat = |c: f64| T::V::<I>::splat(T::Acc::from_f64(c));
    let zero = splat(0.0);
    // The operand order of `max` keeps a NaN.
    let x = splat(-SATURATED).max(x);
    let x = zero.sub(splat(-SATURATED).max(zero.sub(x)));
    let square = x.mul(x);
    x.mul(polynomial::<T, I, 7>(&P, square)).div(polynomial::<T, I, 4>(&Q, square))
}

#[inline(always)]
fn polynomial<T: SimdElement, I: Isa, const N: usize>(coefficients: &[f64; N], x: T::V<I>) -> T::V<I> {
    let mut sum = T::V::<I>::splat(T::Acc::from_f64(coefficients[N - 1]));
    for &c in coefficients[..N - 1].iter().rev() {
        sum = sum.mul_add(x, T::V::<I>::splat(T::Acc::from_f64(c)));
    }
    sum
}
