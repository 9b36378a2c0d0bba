//! The online softmax: running maximum `m` and sum `l` of every query, in base 2.
//!
//! A query sits in one lane, keys run down the rows: maximum and sum need no work across lanes.

use super::exp::exp2;
use crate::dtype::Float;
use crate::simd::{Isa, SimdElement, Vector, VectorKernel};

/// Rows of scores of one vector of queries; row `j` is at `j * stride`.
pub struct Column<'a, E> {
    /// Starts at the first row's lanes.
    pub rows: &'a mut [E],
    /// Elements from one row to the next.
    pub stride: usize,
}

/// New maximum, the factor that old sums shrink by, and what is subtracted from scores.
pub struct Step<V> {
    /// The running maximum, `-inf` where no key was seen.
    pub m: V,
    /// `2^(old m - m)`.
    pub alpha: V,
    /// `m`, or 0 where that is `-inf`, so that `-inf - base` is no NaN.
    pub base: V,
}

/// Folds the maximum of new scores into the running one.
#[inline(always)]
pub fn step<T: SimdElement, I: Isa>(m: T::V<I>, peak: T::V<I>) -> Step<T::V<I>> {
    let lowest = T::V::<I>::splat(T::Acc::NEG_INFINITY);
    let new = m.max(peak);
    let base = new.select_gt(lowest, new, T::V::<I>::splat(T::Acc::ZERO));
    Step { m: new, alpha: exp2::<T, I>(m.sub(base)), base }
}

/// Turns `keys` rows of scores into rows of probability operands `2^(s * scale - base)`, in place, and returns their sum.
///
/// Operand row `i` holds keys `DEPTH * i ..`; a missing last key counts as probability 0. With `MASKED`, a score of `-inf`
/// becomes `-0`: adding `-0 * v` changes nothing for finite `v`, and marks the entry for the path that non-finite values take.
#[inline(always)]
pub fn probabilities<T: SimdElement, I: Isa, const MASKED: bool>(
    column: &mut Column<'_, T::Acc>,
    keys: usize,
    scale: T::V<I>,
    base: T::V<I>,
) -> T::V<I> {
    let stride = column.stride;
    let zero = T::V::<I>::splat(T::Acc::ZERO);
    let minus_base = zero.sub(base);
    let mut sums = [zero; 2];
    let mut j = 0;
    while j < keys {
        let mut p = [zero; 2];
        let pair = keys - j >= 2;
        p[0] = probability::<T, I, MASKED>(&column.rows[j * stride..], scale, minus_base);
        sums[0] = sums[0].add(p[0]);
        if pair {
            p[1] = probability::<T, I, MASKED>(&column.rows[(j + 1) * stride..], scale, minus_base);
            sums[1] = sums[1].add(p[1]);
        }
        if T::Kernel::<I>::DEPTH == 2 {
            T::Kernel::<I>::fold(p).store(&mut column.rows[j / 2 * stride..]);
        } else {
            p[0].store(&mut column.rows[j * stride..]);
            if pair {
                p[1].store(&mut column.rows[(j + 1) * stride..]);
            }
        }
        j += 2;
    }
    sums[0].add(sums[1])
}

#[inline(always)]
fn probability<T: SimdElement, I: Isa, const MASKED: bool>(row: &[T::Acc], scale: T::V<I>, minus_base: T::V<I>) -> T::V<I> {
    let s = T::V::<I>::load(row);
    let p = exp2::<T, I>(s.mul_add(scale, minus_base));
    if MASKED { T::V::<I>::splat(T::Acc::LOWEST).select_gt(s, T::V::<I>::splat(T::Acc::MINUS_ZERO), p) } else { p }
}

/// `ln` of the sum of exponentials, from the running maximum and sum in base 2; `-inf` where no key was seen.
pub fn log_sum_exp<A: Float>(m: A, l: A) -> A {
    A::from_f64((m.to_f64() + l.to_f64().log2()) * std::f64::consts::LN_2)
}
