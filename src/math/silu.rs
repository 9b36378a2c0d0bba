//! `silu x = x sigmoid(x)` for vectors, and its derivative.

use super::exp::exp2;
use crate::dtype::Float;
use crate::simd::{Isa, SimdElement, Vector};
use std::f64::consts::LOG2_E;

/// `e^-|x|`, which never overflows.
#[inline(always)]
fn exp_of_minus_abs<T: SimdElement, I: Isa>(x: T::V<I>) -> T::V<I> {
    let minus = T::V::<I>::splat(T::Acc::ZERO).sub(x);
    // The larger one, negated; NaN stays NaN.
    let abs = x.max(minus);
    exp2::<T, I>(abs.mul(T::V::<I>::splat(T::Acc::from_f64(-LOG2_E))))
}

/// `x sigmoid(x)`.
#[inline(always)]
pub fn silu<T: SimdElement, I: Isa>(x: T::V<I>) -> T::V<I> {
    let (zero, one) = (T::V::<I>::splat(T::Acc::ZERO), T::V::<I>::splat(T::Acc::from_f64(1.0)));
    let e = exp_of_minus_abs::<T, I>(x);
    x.mul(x.select_gt(zero, one, e)).div(one.add(e))
}

/// The derivative of `x sigmoid(x)`, `s (1 + x (1 - s))` with `s = sigmoid(x)`.
#[inline(always)]
pub fn silu_slope<T: SimdElement, I: Isa>(x: T::V<I>) -> T::V<I> {
    let (zero, one) = (T::V::<I>::splat(T::Acc::ZERO), T::V::<I>::splat(T::Acc::from_f64(1.0)));
    let e = exp_of_minus_abs::<T, I>(x);
    let larger = one.div(one.add(e));
    let smaller = larger.mul(e);
    let (s, rest) = (x.select_gt(zero, larger, smaller), x.select_gt(zero, smaller, larger));
    s.mul(x.mul_add(rest, one))
}
