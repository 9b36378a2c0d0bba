//! Triangular systems of a chunk.

use super::elementwise::add_scaled;
use super::product::{Factors, ROW_STEP, Rows, add_product};
use crate::simd::{Isa, SimdElement};

/// Makes `x` the solution of `x = b + L x` for strictly lower triangular `L`, in place: `x[i] += sum over j < i of factors[i][j] * x[j]`, in
/// order.
///
/// `rows` is a multiple of [`ROW_STEP`], `width` is of whole vectors; rows of `factors` are `row` apart, those of `x` are `stride`.
#[inline(always)]
pub fn substitute<T: SimdElement, I: Isa>(
    (factors, row): (&[T::Acc], usize),
    (x, stride): (&mut [T::Acc], usize),
    [rows, width]: [usize; 2],
) {
    for first in (0..rows).step_by(ROW_STEP) {
        let (done, rest) = x.split_at_mut(first * stride);
        let data = &factors[first * row..];
        add_product::<T, I>(Factors { data, row, step: 1 }, Rows::new(done, stride), (rest, stride), [ROW_STEP, first, width]);
        for i in 1..ROW_STEP {
            let (done, rest) = rest.split_at_mut(i * stride);
            for (j, done) in done.chunks_exact(stride).enumerate() {
                add_scaled::<T, I>(&mut rest[..width], data[i * row + first + j], &done[..width]);
            }
        }
    }
}

/// Makes `x` the solution of `x = b + L^T x` for strictly lower triangular `L`, in place: `x[j] += sum over i > j of factors[i][j] * x[i]`.
///
/// Sizes as for [`substitute`].
#[inline(always)]
pub fn substitute_transposed<T: SimdElement, I: Isa>(
    (factors, row): (&[T::Acc], usize),
    (x, stride): (&mut [T::Acc], usize),
    [rows, width]: [usize; 2],
) {
    for first in (0..rows).step_by(ROW_STEP).rev() {
        let (rest, done) = x.split_at_mut((first + ROW_STEP) * stride);
        let here = &mut rest[first * stride..];
        let depth = rows - first - ROW_STEP;
        if depth > 0 {
            let data = &factors[(first + ROW_STEP) * row + first..];
            add_product::<T, I>(
                Factors { data, row: 1, step: row },
                Rows::new(done, stride),
                (here, stride),
                [ROW_STEP, depth, width],
            );
        }
        for j in (0..ROW_STEP - 1).rev() {
            let (before, after) = here.split_at_mut((j + 1) * stride);
            for i in j + 1..ROW_STEP {
                let factor = factors[(first + i) * row + first + j];
                add_scaled::<T, I>(&mut before[j * stride..][..width], factor, &after[(i - j - 1) * stride..][..width]);
            }
        }
    }
}
