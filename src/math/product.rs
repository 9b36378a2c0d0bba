//! Sums of products of small matrices, outputs in the lanes.

use super::load::MAX_LANES;
use crate::dtype::Float;
use crate::simd::{Isa, SimdElement, Vector, tile};

/// Rows of [`add_product`] come in multiples of this.
pub const ROW_STEP: usize = 4;

/// Elements of a row that [`add_product`] takes: whole vectors of any instruction set.
pub fn row_width(len: usize) -> usize {
    len.next_multiple_of(MAX_LANES)
}

/// A matrix whose elements are broadcast.
#[derive(Clone, Copy)]
pub struct Factors<'a, E> {
    /// From the first element on.
    pub data: &'a [E],
    /// Elements from one row to the next.
    pub row: usize,
    /// Elements from one column to the next.
    pub step: usize,
}

/// `sums[i][n] += sum over k < depth of factors[i][k] * matrix[k][n]`, in order of `k`, for `rows` rows, a multiple of [`ROW_STEP`].
///
/// `width` is the length of the rows of `matrix` and of `sums`; see [`row_width`]. Where the matrix is not `finite`, factors of 0 hide
/// its rows: 0 times NaN counts as 0.
#[inline(always)]
pub fn add_product<T: SimdElement, I: Isa>(
    factors: Factors<'_, T::Acc>,
    (matrix, finite): (&[T::Acc], bool),
    sums: &mut [T::Acc],
    [rows, depth, width]: [usize; 3],
) {
    let lanes = T::V::<I>::LANES;
    if !finite {
        return add_seen::<T, I>(factors, matrix, sums, [rows, depth, width]);
    }
    for i in (0..rows).step_by(ROW_STEP) {
        let factors = Factors { data: &factors.data[i * factors.row..], ..factors };
        let mut n = 0;
        while n < width {
            let sums = &mut sums[i * width + n..];
            let matrix = &matrix[n..];
            n += if I::REGISTERS >= 32 && n + 4 * lanes <= width {
                columns::<T, I, 4>(factors, matrix, sums, depth, width)
            } else if n + 2 * lanes <= width {
                columns::<T, I, 2>(factors, matrix, sums, depth, width)
            } else {
                columns::<T, I, 1>(factors, matrix, sums, depth, width)
            };
        }
    }
}

/// Handles `N` vectors of [`ROW_STEP`] rows; returns how many elements of each.
#[inline(always)]
fn columns<T: SimdElement, I: Isa, const N: usize>(
    factors: Factors<'_, T::Acc>,
    matrix: &[T::Acc],
    sums: &mut [T::Acc],
    depth: usize,
    width: usize,
) -> usize {
    let lanes = T::V::<I>::LANES;
    let mut acc = [[T::V::<I>::splat(T::Acc::ZERO); N]; ROW_STEP];
    for (r, row) in acc.iter_mut().enumerate() {
        for (v, sum) in row.iter_mut().enumerate() {
            *sum = T::V::<I>::load(&sums[r * width + v * lanes..]);
        }
    }
    let acc = tile::<T, T::Kernel<I>, ROW_STEP, N>(factors.data, (factors.row, factors.step), matrix, width, depth, acc);
    for (r, row) in acc.iter().enumerate() {
        for (v, sum) in row.iter().enumerate() {
            sum.store(&mut sums[r * width + v * lanes..]);
        }
    }
    N * lanes
}

#[inline(always)]
fn add_seen<T: SimdElement, I: Isa>(
    factors: Factors<'_, T::Acc>,
    matrix: &[T::Acc],
    sums: &mut [T::Acc],
    [rows, depth, width]: [usize; 3],
) {
    let lanes = T::V::<I>::LANES;
    for i in 0..rows {
        let sums = &mut sums[i * width..(i + 1) * width];
        for k in 0..depth {
            let factor = factors.data[i * factors.row + k * factors.step];
            if factor == T::Acc::ZERO {
                continue;
            }
            let factor = T::V::<I>::splat(factor);
            for (sum, row) in sums.chunks_exact_mut(lanes).zip(matrix[k * width..(k + 1) * width].chunks_exact(lanes)) {
                T::V::<I>::load(row).mul_add(factor, T::V::<I>::load(sum)).store(sum);
            }
        }
    }
}
