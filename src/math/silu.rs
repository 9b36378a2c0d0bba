//! `silu x = x sigmoid(x)` for vectors, and its derivative.

use super::exp::exp2_each;
use crate::dtype::Float;
use crate::simd::{Isa, SimdElement, Vector};
use std::f64::consts::LOG2_E;

/// `e^-x`, and `2^most` where it is more.
#[inline(always)]
fn powers_of_minus<T: SimdElement, I: Isa, const N: usize>(x: [T::V<I>; N], most: f64) -> [T::V<I>; N] {
    let splat = |x| T::V::<I>::splat(T::Acc::from_f64(x));
    let mut exponents = x;
    for exponent in &mut exponents {
        // The order of operands keeps a NaN.
        *exponent = splat(-most / LOG2_E).max(*exponent).mul(splat(-LOG2_E));
    }
    exp2_each::<T, I, N>(exponents)
}

/// `x sigmoid(x)`: `x / (1 + e^-x)`, where a power beyond the largest number is infinite and makes 0 of finite `x`.
#[inline(always)]
pub fn silu<T: SimdElement, I: Isa>(x: T::V<I>) -> T::V<I> {
    let [y] = silu_each::<T, I, 1>([x]);
    y
}

/// [`silu`] of several vectors in step, as [`exp2_each`].
#[inline(always)]
pub fn silu_each<T: SimdElement, I: Isa, const N: usize>(x: [T::V<I>; N]) -> [T::V<I>; N] {
    let infinite = if size_of::<T::Acc>() == size_of::<f64>() { 1024.0 } else { 128.0 };
    let one = T::V::<I>::splat(T::Acc::from_f64(1.0));
    let mut y = x;
    for (y, power) in y.iter_mut().zip(powers_of_minus::<T, I, N>(x, infinite)) {
        *y = y.div(one.add(power));
    }
    y
}

/// The derivative of `x sigmoid(x)`, `s (1 + x (1 - s))` with `s = sigmoid(x)`, of several vectors in step. Where it is less than anything
/// it is added to, it is not exactly 0.
#[inline(always)]
pub fn silu_slope_each<T: SimdElement, I: Isa, const N: usize>(x: [T::V<I>; N]) -> [T::V<I>; N] {
    // Powers stay finite, as they are multiplied by what they make 0.
    let largest = if size_of::<T::Acc>() == size_of::<f64>() { 1020.0 } else { 124.0 };
    let one = T::V::<I>::splat(T::Acc::from_f64(1.0));
    let mut slopes = x;
    for (slope, power) in slopes.iter_mut().zip(powers_of_minus::<T, I, N>(x, largest)) {
        let s = one.div(one.add(power));
        *slope = s.mul(slope.mul_add(power.mul(s), one));
    }
    slopes
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::math::load::MAX_LANES;
    use crate::simd::{Level, Task, Wide};
    use std::sync::Mutex;

    /// Points, whether slopes are asked for, and what was found.
    struct All<E: Wide>(Vec<E>, bool, Mutex<Vec<f64>>);
    impl<E: Wide> Task for All<E> {
        const MULTIPLIES_BF16: bool = false;

        #[inline(always)]
        fn run<I: Isa>(&self, _index: usize) {
            for pair in self.0.chunks_exact(2) {
                let x = [E::V::<I>::splat(pair[0]), E::V::<I>::splat(pair[1])];
                let found = if self.1 { silu_slope_each::<E, I, 2>(x) } else { silu_each::<E, I, 2>(x) };
                for y in found {
                    let mut lanes = [E::ZERO; MAX_LANES];
                    y.store(&mut lanes);
                    self.2.lock().unwrap().push(lanes[0].to_f64());
                }
            }
        }
    }

    fn found<E: Wide>(points: &[f64], slopes: bool, level: Level) -> Vec<f64> {
        let all = All(points.iter().map(|&x| E::from_f64(x)).collect(), slopes, Mutex::default());
        level.run(&all, 0);
        all.2.into_inner().unwrap()
    }

    fn check<E: Wide>(tolerance: f64) {
        let points = (-800..800).map(|i| f64::from(i) * 0.1037).collect::<Vec<_>>();
        for level in Level::available() {
            for (&x, got) in points.iter().zip(found::<E>(&points, false, level)) {
                let x = E::from_f64(x).to_f64();
                let want = x / (1.0 + (-x).exp());
                // A rounding error of the exponent is one of the result, times the exponent.
                let tolerance = tolerance * (1.0 + x.abs() / 4.0);
                assert!((got - want).abs() <= tolerance * want.abs(), "{x}: {got} != {want}, {}", level.name());
            }
        }
    }

    #[test]
    fn silu_is_accurate() {
        check::<f32>(4e-7);
        check::<f64>(1e-15);
    }

    fn check_slopes<E: Wide>(tolerance: f64) {
        let points = (-800..800).map(|i| f64::from(i) * 0.1037).collect::<Vec<_>>();
        for level in Level::available() {
            for (&x, got) in points.iter().zip(found::<E>(&points, true, level)) {
                let x = E::from_f64(x).to_f64();
                let s = 1.0 / (1.0 + (-x).exp());
                let want = s * (1.0 + x * (1.0 - s));
                // As for silu; what is added cancels around the least value.
                let tolerance = tolerance * (1.0 + x.abs() / 4.0) * s * (1.0 + x.abs());
                assert!((got - want).abs() <= tolerance, "{x}: {got} != {want}, {}", level.name());
            }
            let far = found::<E>(&[-1e4, 1e4, f64::NAN, 0.0], true, level);
            assert!(far[0].abs() < 1e-30 && far[2].is_nan(), "{far:?}, {}", level.name());
            assert!([far[1] - 1.0, far[3] - 0.5].into_iter().all(|error| error.abs() <= tolerance), "{far:?}, {}", level.name());
        }
    }

    #[test]
    fn slopes_are_accurate() {
        check_slopes::<f32>(4e-7);
        check_slopes::<f64>(1e-15);
    }

    #[test]
    fn what_is_far_from_0_or_not_finite() {
        let points = [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, 0.0, 1e30, -1e30, 2000.0, -2000.0];
        for level in Level::available() {
            for got in [found::<f32>(&points, false, level), found::<f64>(&points, false, level)] {
                assert!(got[0].is_nan() && got[2].is_nan(), "{got:?}, {}", level.name());
                let exact = [got[1], got[3].abs(), got[5].abs(), got[6], got[7].abs()].map(f64::to_bits);
                assert_eq!(exact, [f64::INFINITY, 0.0, 0.0, 2000.0, 0.0].map(f64::to_bits), "{}", level.name());
                assert!((got[4] / 1e30 - 1.0).abs() < 1e-7);
            }
        }
    }
}
