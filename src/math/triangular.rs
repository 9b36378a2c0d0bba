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
