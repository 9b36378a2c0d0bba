//! Activations of vectors, of the accumulators' type.

use super::elementwise::decay;
use super::exp::exp2;
use crate::simd::{Isa, Vector, Wide};
use std::f64::consts::LOG2_E;

/// Powers of two below this are 0: what is near denormals takes hundreds of cycles.
const LEAST_EXPONENT: f64 = -120.0;

/// `e^-|x|`.
#[inline(always)]
fn exp_minus_abs<E: Wide, I: Isa>(x: E::V<I>) -> E::V<I> {
    let splat = |x| E::V::<I>::splat(E::from_f64(x));
    let exponent = x.max(splat(0.0).sub(x)).mul(splat(-LOG2_E));
    splat(LEAST_EXPONENT).select_gt(exponent, splat(0.0), exp2::<E, I>(exponent))
}

/// `ln(1 + w)` for `w` in `[0, 1]`: `2 atanh(w / (2 + w))`, whose series is one of powers of at most 1/9.
#[inline(always)]
fn ln_1p<E: Wide, I: Isa>(w: E::V<I>) -> E::V<I> {
    let splat = |x| E::V::<I>::splat(E::from_f64(x));
    // The first term left out is below half a unit in the last place.
    let terms = if size_of::<E>() == size_of::<f64>() { 16 } else { 7 };
    let s = w.div(w.add(splat(2.0)));
    let square = s.mul(s);
    let mut sum = splat(0.0);
    for k in (0..terms).rev() {
        sum = sum.mul_add(square, splat(2.0 / f64::from(2 * k + 1)));
    }
    sum.mul(s)
}

/// `ln(1 + e^x)`.
#[inline(always)]
pub fn softplus<E: Wide, I: Isa>(x: E::V<I>) -> E::V<I> {
    // The order of operands keeps a NaN.
    E::V::<I>::splat(E::ZERO).max(x).add(ln_1p::<E, I>(exp_minus_abs::<E, I>(x)))
}

/// `1 / (1 + e^-x)`.
#[inline(always)]
pub fn sigmoid<E: Wide, I: Isa>(x: E::V<I>) -> E::V<I> {
    let one = E::V::<I>::splat(E::from_f64(1.0));
    let w = exp_minus_abs::<E, I>(x);
    let high = one.div(one.add(w));
    x.select_gt(E::V::<I>::splat(E::ZERO), high, w.mul(high))
}

/// `2^x`: [`decay`] for `x <= 0`, infinite beyond the largest exponent.
#[inline(always)]
pub fn power<E: Wide, I: Isa>(x: E::V<I>) -> E::V<I> {
    let largest = if size_of::<E>() == size_of::<f64>() { 1023.0 } else { 127.0 };
    let largest = E::V::<I>::splat(E::from_f64(largest));
    let infinite = E::V::<I>::splat(E::from_f64(f64::INFINITY));
    x.select_gt(largest, infinite, decay::<E, I>(x.select_gt(largest, largest, x)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::math::load::MAX_LANES;
    use crate::simd::{Level, Task};
    use std::sync::Mutex;

    struct All<E: Wide>(Vec<E>, Mutex<[Vec<f64>; 3]>);
    impl<E: Wide> Task for All<E> {
        const MULTIPLIES_BF16: bool = false;

        #[inline(always)]
        fn run<I: Isa>(&self, _index: usize) {
            for &x in &self.0 {
                let v = E::V::<I>::splat(x);
                let results = [softplus::<E, I>(v), sigmoid::<E, I>(v), power::<E, I>(v)];
                for (v, into) in results.into_iter().zip(self.1.lock().unwrap().iter_mut()) {
                    let mut lanes = [E::ZERO; MAX_LANES];
                    v.store(&mut lanes);
                    into.push(lanes[0].to_f64());
                }
            }
        }
    }

    fn check<E: Wide>(tolerance: f64) {
        let points = (-800..=800).map(|i| E::from_f64(f64::from(i) * 0.1037)).collect::<Vec<_>>();
        for level in Level::available() {
            let all = All(points.clone(), Mutex::default());
            level.run(&all, 0);
            let [softplus, sigmoid, power] = all.1.into_inner().unwrap();
            for (i, x) in points.iter().map(|x| x.to_f64()).enumerate() {
                // A rounding error of the exponent is one of the result, times the exponent.
                let tolerance = tolerance * (1.0 + x.abs() / 4.0);
                let near = |got: f64, want: f64, least: f64| {
                    assert!((got - want).abs() <= tolerance * want + least, "{x}: {got} != {want}, {}", level.name());
                };
                near(softplus[i], x.max(0.0) + (-x.abs()).exp().ln_1p(), 1e-35);
                near(sigmoid[i], 1.0 / (1.0 + (-x).exp()), 1e-35);
                near(power[i], x.exp2(), 1e-15);
            }
        }
    }

    #[test]
    fn activations_are_accurate() {
        check::<f32>(4e-7);
        check::<f64>(1e-15);
    }

    #[test]
    fn what_is_not_finite() {
        for level in Level::available() {
            let all = All(vec![f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 128.0, 1e9], Mutex::default());
            level.run(&all, 0);
            let [softplus, sigmoid, power] = all.1.into_inner().unwrap();
            assert!(softplus[0].is_nan() && sigmoid[0].is_nan() && power[0].is_nan());
            assert_eq!(softplus[1..3], [f64::INFINITY, 0.0]);
            assert_eq!(sigmoid[1..3], [1.0, 0.0]);
            assert_eq!(power[1..], [f64::INFINITY, 0.0, f64::INFINITY, f64::INFINITY]);
        }
    }
}
