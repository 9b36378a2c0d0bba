//! Scores of few queries: dot products along the contiguous axis, reduced across lanes sixteen at a time.

use super::load::{MAX_LANES, load_row};
use crate::simd::{Isa, SimdElement, Vector, VectorKernel, dot_tile};

/// Writes the products of every row of queries with every key: `scores[r * scores_stride + j]`.
///
/// `queries` are operands (see [`crate::simd::VectorKernel`]), `rows` rows of `queries_stride`, zero beyond `head_dim`. Up to a
/// vector's lanes beyond the last key are scratch. Keys `ahead`, as many, are requested meanwhile.
#[inline(always)]
pub fn scores<T: SimdElement, I: Isa>(
    (keys, ahead): (&[&[T]], &[&[T]]),
    (queries, queries_stride): (&[T::Acc], usize),
    head_dim: usize,
    rows: usize,
    (scores, scores_stride): (&mut [T::Acc], usize),
) {
    let mut row = 0;
    while row < rows {
        let queries = (&queries[row * queries_stride..], queries_stride);
        let scores = (&mut scores[row * scores_stride..], scores_stride);
        // The products of a tile fill the lanes of one vector, and with them 16 accumulators of 32 registers or 8 of 16.
        row += if row == 0 {
            some_rows::<T, I, true>((keys, ahead), queries, head_dim, rows, scores)
        } else {
            some_rows::<T, I, false>((keys, keys), queries, head_dim, rows - row, scores)
        };
    }
}

/// Scores some of `rows` rows; returns how many.
#[inline(always)]
fn some_rows<T: SimdElement, I: Isa, const FETCH: bool>(
    keys: (&[&[T]], &[&[T]]),
    queries: (&[T::Acc], usize),
    head_dim: usize,
    rows: usize,
    scores: (&mut [T::Acc], usize),
) -> usize {
    match (T::V::<I>::LANES, rows) {
        (16, 4..) => tiles::<T, I, 4, 4, FETCH>(keys, queries, head_dim, scores),
        (16, 2..) => tiles::<T, I, 8, 2, FETCH>(keys, queries, head_dim, scores),
        (16, _) => tiles::<T, I, 16, 1, FETCH>(keys, queries, head_dim, scores),
        (8, 2..) => tiles::<T, I, 4, 2, FETCH>(keys, queries, head_dim, scores),
        (8, _) => tiles::<T, I, 8, 1, FETCH>(keys, queries, head_dim, scores),
        (4, 2..) => tiles::<T, I, 2, 2, FETCH>(keys, queries, head_dim, scores),
        (4, _) => tiles::<T, I, 4, 1, FETCH>(keys, queries, head_dim, scores),
        (lanes, _) => unreachable!("{lanes} lanes"),
    }
}

/// Scores `ROWS` rows; returns how many.
#[inline(always)]
fn tiles<T: SimdElement, I: Isa, const KEYS: usize, const ROWS: usize, const FETCH: bool>(
    (keys, ahead): (&[&[T]], &[&[T]]),
    (queries, queries_stride): (&[T::Acc], usize),
    head_dim: usize,
    (scores, scores_stride): (&mut [T::Acc], usize),
) -> usize {
    let lanes = T::V::<I>::LANES;
    let width = lanes * T::Kernel::<I>::DEPTH;
    let vectors = head_dim / width;
    let mut query_rows: [&[T::Acc]; ROWS] = [&[]; ROWS];
    for (r, row) in query_rows.iter_mut().enumerate() {
        *row = &queries[r * queries_stride..(r + 1) * queries_stride];
    }
    for j in (0..keys.len()).step_by(KEYS) {
        let (mut tile, mut next): ([&[T]; KEYS], [&[T]; KEYS]) = ([&[]; KEYS], [&[]; KEYS]);
        for i in 0..KEYS {
            let last = (j + i).min(keys.len() - 1);
            (tile[i], next[i]) = (keys[last], ahead[last]);
        }
        let mut sums = dot_tile::<T, T::Kernel<I>, KEYS, ROWS, FETCH>(tile, next, query_rows, vectors);
        if vectors * width < head_dim {
            for (i, key) in tile.iter().enumerate() {
                let key = load_row::<T, I>(&key[vectors * width..]);
                for (query, sums) in query_rows.iter().zip(&mut sums) {
                    sums[i] = T::Kernel::<I>::mul_acc(key, T::V::<I>::load(&query[vectors * lanes..]), sums[i]);
                }
            }
        }
        let mut block = T::V::<I>::zero_block();
        for (r, row) in sums.iter().enumerate() {
            for (i, &sum) in row.iter().enumerate() {
                block.as_mut()[r * KEYS + i] = sum;
            }
        }
        let mut products = [<T::Acc as crate::dtype::Float>::ZERO; MAX_LANES];
        T::V::<I>::sum_rows(block).store(&mut products);
        for r in 0..ROWS {
            scores[r * scores_stride + j..][..KEYS].copy_from_slice(&products[r * KEYS..][..KEYS]);
        }
    }
    ROWS
}
