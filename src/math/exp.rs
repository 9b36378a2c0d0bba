//! `2^x` for vectors.

use crate::simd::{Isa, SimdElement, Vector};

/// `2^x`: exactly 0 at and below the vector's floor and for `-inf`, NaN for NaN; `x` is at most the least power that is infinite.
///
/// The relative error is that of `T::EXP2` plus two roundings: enough for results that are stored as `T`.
#[inline(always)]
pub fn exp2<T: SimdElement, I: Isa>(x: T::V<I>) -> T::V<I> {
    let [power] = exp2_each::<T, I, 1>([x]);
    power
}

/// [`exp2`] of several vectors in step: one alone is a chain of operations that wait for each other, and a processor does not look far
/// enough ahead to find the next one.
#[inline(always)]
pub fn exp2_each<T: SimdElement, I: Isa, const N: usize>(x: [T::V<I>; N]) -> [T::V<I>; N] {
    let (mut fractions, mut tokens) = (x, x);
    for i in 0..N {
        // The operand order of `max` keeps a NaN.
        (fractions[i], tokens[i]) = T::V::<I>::splat(T::V::<I>::EXP2_FLOOR).max(x[i]).split_exponent();
    }
    let degree = T::EXP2.len() - 1;
    let mut sums = [T::V::<I>::splat(T::EXP2[degree]); N];
    for &c in T::EXP2[..degree].iter().rev() {
        for i in 0..N {
            sums[i] = sums[i].mul_add(fractions[i], T::V::<I>::splat(c));
        }
    }
    for i in 0..N {
        sums[i] = sums[i].scale_exponent(tokens[i]);
    }
    sums
}
