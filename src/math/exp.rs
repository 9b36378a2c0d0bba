//! `2^x` for vectors.

use crate::simd::{Isa, SimdElement, Vector};

/// `2^x` for `x <= 0`: exactly 0 at and below the vector's floor and for `-inf`, NaN for NaN.
///
/// The relative error is that of `T::EXP2` plus two roundings: enough for results that are stored as `T`.
#[inline(always)]
pub fn exp2<T: SimdElement, I: Isa>(x: T::V<I>) -> T::V<I> {
    // The operand order of `max` keeps a NaN.
    let (f, token) = T::V::<I>::splat(T::V::<I>::EXP2_FLOOR).max(x).split_exponent();
    let degree = T::EXP2.len() - 1;
    let mut sum = T::V::<I>::splat(T::EXP2[degree]);
    for &c in T::EXP2[..degree].iter().rev() {
        sum = sum.mul_add(f, T::V::<I>::splat(c));
    }
    sum.scale_exponent(token)
}
