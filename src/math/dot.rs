//! Scores of few queries: dot products along the contiguous axis, reduced across lanes sixteen at a time; with as many queries as
//! lanes, the queries in the lanes.

use super::load::{MAX_LANES, load_row};
use crate::dtype::Float;
use crate::simd::{BLOCK_ROWS, Isa, RowBlock, SimdElement, Vector, VectorKernel, cross_tile, dot_tile};

/// Writes the products of every row of queries with the first `count` keys: `scores[r * scores_stride + j]`.
///
/// `queries` are operands (see [`crate::simd::VectorKernel`]), `rows` rows of `queries_stride`, zero beyond the width of the keys.
/// Up to a vector's lanes beyond the last key are scratch. Keys `ahead` are requested meanwhile.
#[inline(always)]
pub fn scores<T: SimdElement, I: Isa>(
    keys: (&RowBlock<'_, T>, &RowBlock<'_, T>),
    count: usize,
    (queries, queries_stride): (&[T::Acc], usize),
    rows: usize,
    (scores, scores_stride): (&mut [T::Acc], usize),
) {
    let mut row = 0;
    while row < rows {
        let queries = (&queries[row * queries_stride..], queries_stride);
        let scores = (&mut scores[row * scores_stride..], scores_stride);
        // The products of a tile fill the lanes of one vector, and with them 16 accumulators of 32 registers or 8 of 16.
        row += if row == 0 {
            some_rows::<T, I, true>(keys, count, queries, rows, scores)
        } else {
            some_rows::<T, I, false>(keys, count, queries, rows - row, scores)
        };
    }
}

/// Scores some of `rows` rows; returns how many.
#[inline(always)]
fn some_rows<T: SimdElement, I: Isa, const FETCH: bool>(
    keys: (&RowBlock<'_, T>, &RowBlock<'_, T>),
    count: usize,
    queries: (&[T::Acc], usize),
    rows: usize,
    scores: (&mut [T::Acc], usize),
) -> usize {
    match (T::V::<I>::LANES, rows) {
        (16, 4..) => tiles::<T, I, 4, 4, FETCH>(keys, count, queries, scores),
        (16, 2..) => tiles::<T, I, 8, 2, FETCH>(keys, count, queries, scores),
        (16, _) => tiles::<T, I, 16, 1, FETCH>(keys, count, queries, scores),
        (8, 2..) => tiles::<T, I, 4, 2, FETCH>(keys, count, queries, scores),
        (8, _) => tiles::<T, I, 8, 1, FETCH>(keys, count, queries, scores),
        (4, 2..) => tiles::<T, I, 2, 2, FETCH>(keys, count, queries, scores),
        (4, _) => tiles::<T, I, 4, 1, FETCH>(keys, count, queries, scores),
        (lanes, _) => unreachable!("{lanes} lanes"),
    }
}

/// Scores `ROWS` rows; returns how many.
#[inline(always)]
fn tiles<T: SimdElement, I: Isa, const KEYS: usize, const ROWS: usize, const FETCH: bool>(
    keys: (&RowBlock<'_, T>, &RowBlock<'_, T>),
    count: usize,
    (queries, queries_stride): (&[T::Acc], usize),
    (scores, scores_stride): (&mut [T::Acc], usize),
) -> usize {
    let lanes = T::V::<I>::LANES;
    let width = lanes * T::Kernel::<I>::DEPTH;
    let vectors = keys.0.width() / width;
    let mut query_rows: [&[T::Acc]; ROWS] = [&[]; ROWS];
    for (r, row) in query_rows.iter_mut().enumerate() {
        *row = &queries[r * queries_stride..(r + 1) * queries_stride];
    }
    for j in (0..count).step_by(KEYS) {
        let sums = dot_tile::<T, T::Kernel<I>, KEYS, ROWS, FETCH>(keys, j, query_rows, vectors);
        let products = sum_lanes::<T, I, KEYS, ROWS>(&sums);
        for r in 0..ROWS {
            scores[r * scores_stride + j..][..KEYS].copy_from_slice(&products[r * KEYS..][..KEYS]);
        }
    }
    // A pass of its own: within the loop, its calls would drive the sums of the tile out of the registers.
    if vectors * width < keys.0.width() {
        let mut queries = [T::V::<I>::splat(T::Acc::ZERO); ROWS];
        for (query, row) in queries.iter_mut().zip(query_rows) {
            *query = T::V::<I>::load(&row[vectors * lanes..]);
        }
        for j in (0..count).step_by(KEYS) {
            let mut sums = [[T::V::<I>::splat(T::Acc::ZERO); KEYS]; ROWS];
            for i in 0..KEYS {
                let key = load_row::<T, I>(&keys.0.row(j + i)[vectors * width..]);
                for (&query, sums) in queries.iter().zip(&mut sums) {
                    sums[i] = T::Kernel::<I>::mul_acc(key, query, sums[i]);
                }
            }
            let products = sum_lanes::<T, I, KEYS, ROWS>(&sums);
            for r in 0..ROWS {
                for (score, &product) in scores[r * scores_stride + j..][..KEYS].iter_mut().zip(&products[r * KEYS..]) {
                    *score = T::Acc::from_f64(score.to_f64() + product.to_f64());
                }
            }
        }
    }
    ROWS
}

/// The sum over the lanes of each of `ROWS` rows of `KEYS` vectors, row by row.
#[inline(always)]
fn sum_lanes<T: SimdElement, I: Isa, const KEYS: usize, const ROWS: usize>(
    sums: &[[T::V<I>; KEYS]; ROWS],
) -> [T::Acc; MAX_LANES] {
    let mut block = T::V::<I>::zero_block();
    for (r, row) in sums.iter().enumerate() {
        for (i, &sum) in row.iter().enumerate() {
            block.as_mut()[r * KEYS + i] = sum;
        }
    }
    let mut products = [T::Acc::ZERO; MAX_LANES];
    T::V::<I>::sum_rows(block).store(&mut products);
    products
}

/// Vectors of queries for which [`cross_scores`] is the faster form, 1 or 2, if it is: more than half of their lanes are queries.
pub fn cross_vectors<T: SimdElement, I: Isa>(head_dim: usize, rows: usize) -> Option<usize> {
    let lanes = T::V::<I>::LANES;
    let vectors = rows.div_ceil(lanes);
    let fits = T::Kernel::<I>::ROWS_ARE_OPERANDS && I::REGISTERS >= 32 && head_dim.is_multiple_of(T::Kernel::<I>::DEPTH);
    (fits && vectors <= 2 && 2 * rows > lanes).then_some(vectors)
}

/// Writes the products of all keys with `vectors` vectors of queries, those of a key in a row: `scores[j * vectors * LANES + r]`.
///
/// `queries` is `[head_dim / DEPTH, vectors * LANES]`. Keys `ahead` are requested meanwhile.
///
/// # Panics
/// When `vectors` is not 1 or 2.
#[inline(always)]
pub fn cross_scores<T: SimdElement, I: Isa>(
    keys: (&RowBlock<'_, T>, &RowBlock<'_, T>),
    queries: &[T::Acc],
    vectors: usize,
    scores: &mut [T::Acc],
) {
    match vectors {
        1 => cross_tiles::<T, I, 1, 2>(keys, queries, scores),
        2 => cross_tiles::<T, I, 2, 1>(keys, queries, scores),
        other => unreachable!("{other} vectors"),
    }
}

#[inline(always)]
fn cross_tiles<T: SimdElement, I: Isa, const N: usize, const SETS: usize>(
    keys: (&RowBlock<'_, T>, &RowBlock<'_, T>),
    queries: &[T::Acc],
    scores: &mut [T::Acc],
) {
    /// Keys of a tile: with `N * SETS = 2`, 16 accumulators.
    const KEYS: usize = 8;
    let lanes = T::V::<I>::LANES;
    let depth = keys.0.width() / T::Kernel::<I>::DEPTH;
    for j in (0..BLOCK_ROWS).step_by(KEYS) {
        let sums = cross_tile::<T, T::Kernel<I>, KEYS, N, SETS, true>(keys, j, queries, depth);
        for (i, row) in sums.iter().enumerate() {
            for (v, sum) in row.iter().enumerate() {
                sum.store(&mut scores[((j + i) * N + v) * lanes..]);
            }
        }
    }
}
