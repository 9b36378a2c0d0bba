//! Weighted sums of values for few queries: outputs in the lanes, one broadcast probability per query and key.

use super::load::MAX_LANES;
use crate::dtype::Float;
use crate::simd::{BLOCK_ROWS, Isa, RowBlock, SimdElement, Vector, VectorKernel, weigh_tile};

/// Probabilities as operands.
#[derive(Clone, Copy)]
pub struct Probabilities<'a, E> {
    /// From the first row's first key on.
    pub data: &'a [E],
    /// Elements from one row to the next.
    pub row_stride: usize,
    /// Elements from one operand of a row to the next.
    pub key_step: usize,
}

/// Elements of an accumulator row: whole pairs of vectors.
pub fn acc_stride<T: SimdElement, I: Isa>(head_dim_v: usize) -> usize {
    head_dim_v.next_multiple_of(2 * T::V::<I>::LANES)
}

/// `acc[r] = alpha[r] * acc[r] + probs[r] . values` for `alpha.len()` rows, in the order of `load_rows_shuffled`.
///
/// The first `count` values are weighed, whole operands of them. Values `ahead` are requested meanwhile.
#[inline(always)]
pub fn accumulate<T: SimdElement, I: Isa>(
    (values, ahead): (&RowBlock<'_, T>, &RowBlock<'_, T>),
    count: usize,
    probs: Probabilities<'_, T::Acc>,
    alpha: &[T::Acc],
    acc: &mut [T::Acc],
) {
    let width = 2 * T::V::<I>::LANES;
    let head_dim_v = values.width();
    let whole = head_dim_v / width * width;
    let stride = acc_stride::<T, I>(head_dim_v);
    let mut first = 0;
    while first < whole {
        // Two pairs of vectors by four rows are 16 accumulators; one pair where there are 16 registers in all.
        first += if I::REGISTERS >= 32 && first + 2 * width <= whole {
            columns::<T, I, 2>((values, ahead), count, (first, first), probs, alpha, (acc, stride))
        } else {
            columns::<T, I, 1>((values, ahead), count, (first, first), probs, alpha, (acc, stride))
        };
    }
    if whole < head_dim_v {
        let mut tails = [[T::zeroed(); 2 * MAX_LANES]; BLOCK_ROWS];
        for (place, tail) in tails.iter_mut().enumerate().take(count) {
            tail[..head_dim_v - whole].copy_from_slice(&values.row(place)[whole..]);
        }
        let mut rows = RowBlock::filled(&tails[0]);
        rows.set_run(0, BLOCK_ROWS, tails.as_flattened(), 2 * MAX_LANES);
        columns::<T, I, 1>((&rows, &rows), count, (0, whole), probs, alpha, (acc, stride));
    }
}

/// Handles `HALF` pairs of vectors of all rows; returns how many elements.
#[inline(always)]
fn columns<T: SimdElement, I: Isa, const HALF: usize>(
    values: (&RowBlock<'_, T>, &RowBlock<'_, T>),
    count: usize,
    (first, column): (usize, usize),
    probs: Probabilities<'_, T::Acc>,
    alpha: &[T::Acc],
    (acc, stride): (&mut [T::Acc], usize),
) -> usize {
    let mut row = 0;
    while row < alpha.len() {
        let probs = Probabilities { data: &probs.data[row * probs.row_stride..], ..probs };
        let acc = (&mut acc[row * stride + column..], stride);
        let alpha = &alpha[row..];
        row += if row == 0 {
            some_rows::<T, I, HALF, true>(values, (count, first), probs, alpha, acc)
        } else {
            some_rows::<T, I, HALF, false>(values, (count, first), probs, alpha, acc)
        };
    }
    HALF * 2 * T::V::<I>::LANES
}

/// Handles some of `alpha.len()` rows; returns how many.
#[inline(always)]
fn some_rows<T: SimdElement, I: Isa, const HALF: usize, const FETCH: bool>(
    values: (&RowBlock<'_, T>, &RowBlock<'_, T>),
    places: (usize, usize),
    probs: Probabilities<'_, T::Acc>,
    alpha: &[T::Acc],
    acc: (&mut [T::Acc], usize),
) -> usize {
    match alpha.len() {
        4.. => tile::<T, I, 4, HALF, FETCH>(values, places, probs, alpha, acc),
        2.. => tile::<T, I, 2, HALF, FETCH>(values, places, probs, alpha, acc),
        _ => tile::<T, I, 1, HALF, FETCH>(values, places, probs, alpha, acc),
    }
}

#[inline(always)]
fn tile<T: SimdElement, I: Isa, const ROWS: usize, const HALF: usize, const FETCH: bool>(
    values: (&RowBlock<'_, T>, &RowBlock<'_, T>),
    (count, first): (usize, usize),
    probs: Probabilities<'_, T::Acc>,
    alpha: &[T::Acc],
    (acc, stride): (&mut [T::Acc], usize),
) -> usize {
    let lanes = T::V::<I>::LANES;
    let mut sums = [[[T::V::<I>::splat(T::Acc::ZERO); 2]; HALF]; ROWS];
    let mut rows: [&[T::Acc]; ROWS] = [&[]; ROWS];
    for r in 0..ROWS {
        rows[r] = &probs.data[r * probs.row_stride..];
        for h in 0..HALF {
            for (half, sum) in sums[r][h].iter_mut().enumerate() {
                *sum = T::V::<I>::load(&acc[r * stride + (2 * h + half) * lanes..]).mul(T::V::<I>::splat(alpha[r]));
            }
        }
    }
    let sums = weigh_tile::<T, T::Kernel<I>, ROWS, HALF, FETCH>(values, count, first, (rows, probs.key_step), sums);
    for (r, row) in sums.iter().enumerate() {
        for (h, halves) in row.iter().enumerate() {
            for (half, sum) in halves.iter().enumerate() {
                sum.store(&mut acc[r * stride + (2 * h + half) * lanes..]);
            }
        }
    }
    ROWS
}

/// Writes `factor` times an accumulator row as output.
#[inline(always)]
pub fn deliver<T: SimdElement, I: Isa>(acc: &[T::Acc], factor: T::Acc, out: &mut [T]) {
    let lanes = T::V::<I>::LANES;
    let factor = T::V::<I>::splat(factor);
    for d in (0..out.len()).step_by(2 * lanes) {
        let halves = [T::V::<I>::load(&acc[d..]), T::V::<I>::load(&acc[d + lanes..])];
        let out = &mut out[d..];
        let mut buffer = [T::zeroed(); 2 * MAX_LANES];
        for (half, values) in T::Kernel::<I>::unshuffle(halves).into_iter().enumerate() {
            T::store::<I>(values.mul(factor), &mut buffer[half * lanes..]);
        }
        let count = out.len().min(2 * lanes);
        out[..count].copy_from_slice(&buffer[..count]);
    }
}
