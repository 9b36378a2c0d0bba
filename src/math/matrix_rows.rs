//! Gradients by matrix tiles: as in [`super::row_tile`].
//!
//! | buffer | shape, in pairs of bf16 |
//! | --- | --- |
//! | rows of queries, of keys | `[rows / 2, row_stride]` |
//! | weights along the queries | `[block_k, W / 2]` |
//! | weights along the keys | `[block_k / 32, W, 16]`: transposed, so that queries are the rows |
//! | sums | `[rows, row_stride]` numbers |
//!
//! Tiles are whole: rows beyond the last one count as zeros.

use super::load::{load_adjacent, load_rows};
use super::matrix_tiles::{MatrixTiles, STEP, TILE, TILES};
use super::row_tile::RowKernel;
use super::tile::TileKernel;
use crate::dtype::Float;
use crate::simd::{Isa, SimdElement, TileOperands, Vector, VectorKernel};
use bytemuck::{cast_slice, cast_slice_mut};
use std::ops::Range;

/// Numbers of weights along the keys for [`STEP`] of them.
const BLOCK: usize = TILES * TILE * TILE;

/// Adds products to all columns of two tiles of rows.
#[inline(always)]
fn add_columns<I: Isa>(operands: TileOperands<'_>, dim: usize, sums: &mut [f32]) {
    let stride = operands.b_stride;
    for d in (0..dim).step_by(2 * TILE) {
        let operands = TileOperands { b: &operands.b[d..], ..operands };
        if d + TILE < dim {
            I::multiply_tiles::<2, 2>(operands, &mut sums[d..], stride, true);
        } else {
            I::multiply_tiles::<2, 1>(operands, &mut sums[d..], stride, true);
        }
    }
}

impl<T: SimdElement, I: Isa> RowKernel<T> for MatrixTiles<I> {
    const ROW_STEP: usize = STEP;
    const ALONG_QUERIES: usize = TILES * TILE / 2;
    const FOLDS: bool = true;

    fn row_stride(dim: usize) -> usize {
        // One line more, so that rows do not share cache sets.
        dim.next_multiple_of(TILE) + TILE
    }
    fn packed_rows(count: usize) -> usize {
        count.next_multiple_of(STEP) / 2
    }
    fn along_keys_len(count: usize) -> usize {
        count.div_ceil(STEP) * BLOCK
    }

    #[inline(always)]
    fn pack_rows<'r>(row: impl Fn(usize) -> &'r [T], count: usize, dim: usize, packed: &mut [T::Acc]) -> bool {
        let stride = <Self as RowKernel<T>>::row_stride(dim);
        let pairs = <Self as RowKernel<T>>::packed_rows(count);
        let zero = T::V::<I>::splat(T::Acc::ZERO);
        // x - x is 0 for finite x and NaN otherwise; the high half of a pair, with whatever in the low bits, is finite if its element is.
        let mut residue = zero;
        for (pair, packed) in packed.chunks_exact_mut(stride).enumerate().take(pairs) {
            let first = if 2 * pair < count { row(2 * pair) } else { &[] };
            let second = if 2 * pair + 1 < count { row(2 * pair + 1) } else { &[] };
            for d in (0..dim).step_by(TILE) {
                let [first, second] = [first, second].map(|row| row.get(d..).unwrap_or_default());
                let operands = load_rows::<T, I>([first, second]);
                operands.store(&mut packed[d..]);
                let swapped = load_rows::<T, I>([second, first]);
                residue = residue.add(operands.sub(operands)).add(swapped.sub(swapped));
            }
        }
        let mut lanes = [T::Acc::ZERO; TILE];
        residue.store(&mut lanes);
        lanes.iter().all(|&x| x == T::Acc::ZERO)
    }

    #[inline(always)]
    fn fold(weights: &[T::Acc], keys: Range<usize>, along_queries: &mut [T::Acc], along_keys: Option<&mut [T::Acc]>) {
        let (panel, width) = (<Self as TileKernel<T>>::PANEL, <Self as RowKernel<T>>::ALONG_QUERIES);
        for key in keys.clone() {
            let [pairs, _] = T::Kernel::<I>::fold_adjacent(load_adjacent(&weights[key * panel..]));
            pairs.store(&mut along_queries[key * width..]);
        }
        let Some(along_keys) = along_keys else { return };
        for first in keys.step_by(STEP) {
            let own = &mut along_keys[first / STEP * BLOCK..][..BLOCK];
            for (tile, own) in own.chunks_exact_mut(TILE * TILE).enumerate() {
                let mut block = T::V::<I>::zero_block();
                for (pair, operands) in block.as_mut().iter_mut().enumerate() {
                    let at = (first + 2 * pair) * panel + tile * TILE;
                    *operands = T::Kernel::<I>::fold([T::V::<I>::load(&weights[at..]), T::V::<I>::load(&weights[at + panel..])]);
                }
                let block = T::V::<I>::transpose(block);
                for (own, operands) in own.chunks_exact_mut(TILE).zip(block.as_ref()) {
                    operands.store(own);
                }
            }
        }
    }

    #[inline(always)]
    fn add_to_keys(
        (weights, rows): (&[T::Acc], &[T::Acc]),
        dim: usize,
        keys: Range<usize>,
        _queries: usize,
        sums: &mut [T::Acc],
    ) {
        let (width, stride) = (<Self as RowKernel<T>>::ALONG_QUERIES, <Self as RowKernel<T>>::row_stride(dim));
        for first in keys.step_by(STEP) {
            let a = cast_slice(&weights[first * width..]);
            let operands = TileOperands { a, a_stride: width, a_step: TILE, b: cast_slice(rows), b_stride: stride, steps: 1 };
            add_columns::<I>(operands, dim, cast_slice_mut(&mut sums[first * stride..]));
        }
    }

    #[inline(always)]
    fn add_to_queries(
        (weights, rows): (&[T::Acc], &[T::Acc]),
        dim: usize,
        _queries: usize,
        keys: Range<usize>,
        sums: &mut [T::Acc],
    ) {
        let stride = <Self as RowKernel<T>>::row_stride(dim);
        let operands = TileOperands {
            a: cast_slice(&weights[keys.start / STEP * BLOCK..]),
            a_stride: TILE,
            a_step: BLOCK,
            b: cast_slice(&rows[keys.start / 2 * stride..]),
            b_stride: stride,
            steps: keys.len().div_ceil(STEP),
        };
        add_columns::<I>(operands, dim, cast_slice_mut(sums));
    }
}
