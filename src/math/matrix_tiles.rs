//! The two products of attention by matrix tiles: as in [`super::tile`], with queries in the columns.
//!
//! | buffer | shape, in pairs of bf16; `W` is [`TileKernel::PANEL`] |
//! | --- | --- |
//! | queries | `[head_dim / 2, W]` |
//! | keys | `[block_k, key_stride]` |
//! | values | `[head_dim_v, value_stride]`: transposed, keys in pairs along the rows |
//! | scores, then probabilities | `[block_k, W]` numbers, then `[block_k / 2, W]` |
//! | accumulator | `[head_dim_v, W]` numbers |
//!
//! Tiles are whole: dimensions and keys beyond the last count as zeros.

use super::load::{load_row, load_rows};
use super::tile::{HeadRows, TileKernel, VectorTiles};
use crate::dtype::Float;
use crate::simd::{Isa, SimdElement, TileOperands, Vector};
use std::marker::PhantomData;
use std::ops::Range;

/// Two by two tiles of sums: keys, or dimensions of the values, by queries.
pub struct MatrixTiles<I>(PhantomData<I>);

/// Rows of two tiles.
pub(super) const STEP: usize = 32;
/// Rows, and columns, of a tile.
pub(super) const TILE: usize = 16;
/// Tiles of a panel.
pub(super) const TILES: usize = 2;

/// Elements of a row of so many pairs: whole tiles, and one cache line more so that rows do not share cache sets.
#[inline(always)]
fn stride<T: SimdElement, I: Isa>(pairs: usize) -> usize {
    VectorTiles::<I>::stride::<T>(pairs.next_multiple_of(TILE))
}

/// As [`Isa::multiply_tiles`], for the first tiles of a panel.
#[inline(always)]
fn multiply<T: SimdElement, I: Isa>(
    tiles: usize,
    (a, a_stride): (&[T::Acc], usize),
    (b, steps): (&[T::Acc], usize),
    sums: &mut [T::Acc],
    add: bool,
) {
    let panel = TILES * TILE;
    let (a, b) = (bytemuck::cast_slice(a), bytemuck::cast_slice(b));
    let operands = TileOperands { a, a_stride, a_step: TILE, b, b_stride: panel, steps };
    let sums = bytemuck::cast_slice_mut(sums);
    if tiles == 1 {
        I::multiply_tiles::<2, 1>(operands, sums, panel, add);
    } else {
        I::multiply_tiles::<2, 2>(operands, sums, panel, add);
    }
}

impl<T: SimdElement, I: Isa> TileKernel<T> for MatrixTiles<I> {
    const VECTORS: usize = TILES;
    const PANEL: usize = TILES * TILE;
    const KEY_STEP: usize = STEP;
    const DEPTH: usize = STEP;

    fn queries_len(head_dim: usize) -> usize {
        head_dim.div_ceil(2).next_multiple_of(TILE) * <Self as TileKernel<T>>::PANEL
    }
    fn key_stride(head_dim: usize) -> usize {
        stride::<T, I>(head_dim.div_ceil(2))
    }
    fn keys_len(block_k: usize, head_dim: usize) -> usize {
        block_k.next_multiple_of(STEP) * <Self as TileKernel<T>>::key_stride(head_dim)
    }
    fn values_len(block_k: usize, head_dim_v: usize) -> usize {
        head_dim_v.next_multiple_of(STEP) * stride::<T, I>(block_k.div_ceil(2))
    }
    fn acc_rows(head_dim_v: usize) -> usize {
        head_dim_v.next_multiple_of(STEP)
    }

    #[inline(always)]
    fn pack_queries(rows: &[&[T]], head_dim: usize, packed: &mut [T::Acc]) {
        for tile in 0..TILES {
            for d in (0..head_dim.div_ceil(2)).step_by(TILE) {
                let mut block = T::V::<I>::zero_block();
                for (i, column) in block.as_mut().iter_mut().enumerate() {
                    if let Some(row) = rows.get(tile * TILE + i) {
                        *column = load_row::<T, I>(&row[2 * d..]);
                    }
                }
                let block = T::V::<I>::transpose(block);
                for (i, &column) in block.as_ref().iter().enumerate() {
                    column.store(&mut packed[(d + i) * TILES * TILE + tile * TILE..]);
                }
            }
        }
    }

    #[inline(always)]
    fn pack_keys(rows: &HeadRows<'_, T>, head_dim: usize, packed: &mut [T::Acc]) {
        <VectorTiles<I> as TileKernel<T>>::pack_keys(rows, head_dim, packed);
    }

    #[inline(always)]
    fn pack_values(rows: &HeadRows<'_, T>, head_dim_v: usize, packed: &mut [T::Acc]) -> bool {
        let (height, stride) = (head_dim_v.next_multiple_of(STEP), packed.len() / head_dim_v.next_multiple_of(STEP).max(1));
        let row = |j: usize| if j < rows.count { rows.get(j) } else { &[] };
        for first in (0..rows.count).step_by(STEP) {
            for d in (0..height).step_by(TILE) {
                let mut block = T::V::<I>::zero_block();
                for (i, column) in block.as_mut().iter_mut().enumerate() {
                    let pair = [row(first + 2 * i), row(first + 2 * i + 1)];
                    *column = load_rows::<T, I>(pair.map(|row| row.get(d..).unwrap_or_default()));
                }
                let block = T::V::<I>::transpose(block);
                for (i, &column) in block.as_ref().iter().enumerate() {
                    column.store(&mut packed[(d + i) * stride + first / 2..]);
                }
            }
        }
        rows.are_finite::<I>()
    }

    #[inline(always)]
    fn scores(
        (queries, packed_keys): (&[T::Acc], &[T::Acc]),
        head_dim: usize,
        vectors: Range<usize>,
        keys: Range<usize>,
        scores: &mut [T::Acc],
        peaks: &mut [T::Acc],
    ) {
        let pairs = head_dim.div_ceil(2);
        let (stride, panel, skip) = (stride::<T, I>(pairs), TILES * TILE, vectors.start * TILE);
        let mut highest = [T::V::<I>::splat(T::Acc::NEG_INFINITY); TILES];
        // Maxima are a step late: what a tile has just stored is not in the cache yet.
        let mut j = keys.start;
        while j < keys.end + STEP {
            if j < keys.end {
                let sums = &mut scores[j * panel + skip..];
                if pairs == 0 {
                    sums[..(STEP - 1) * panel + vectors.len() * TILE].fill(T::Acc::ZERO);
                } else {
                    let packed_keys = (&packed_keys[j * stride..], stride);
                    multiply::<T, I>(vectors.len(), packed_keys, (&queries[skip..], pairs.div_ceil(TILE)), sums, false);
                }
            }
            if j > keys.start {
                let stored = j - STEP..keys.end.min(j);
                for row in scores[stored.start * panel + skip..].chunks(panel).take(stored.len()) {
                    for (v, highest) in highest.iter_mut().enumerate().take(vectors.len()) {
                        *highest = highest.max(T::V::<I>::load(&row[v * TILE..]));
                    }
                }
            }
            j += STEP;
        }
        for (v, highest) in highest.into_iter().enumerate().take(vectors.len()) {
            let peak = &mut peaks[skip + v * TILE..];
            T::V::<I>::load(peak).max(highest).store(peak);
        }
    }

    #[inline(always)]
    fn accumulate(
        (probs, packed_values): (&[T::Acc], &[T::Acc]),
        head_dim_v: usize,
        vectors: Range<usize>,
        keys: Range<usize>,
        alpha: Option<&[T::Acc]>,
        acc: &mut [T::Acc],
    ) {
        let (panel, skip) = (TILES * TILE, vectors.start * TILE);
        let height = head_dim_v.next_multiple_of(STEP);
        let stride = packed_values.len() / height.max(1);
        let first = keys.start / 2;
        let probs = (&probs[first * panel + skip..], keys.len().div_ceil(STEP));
        for d in (0..height).step_by(STEP) {
            let sums = &mut acc[d * panel + skip..];
            if let Some(alpha) =
                alpha.filter(|alpha| alpha[skip..][..vectors.len() * TILE].iter().any(|&alpha| alpha != T::Acc::from_f64(1.0)))
            {
                for row in sums.chunks_mut(panel).take(STEP) {
                    for v in 0..vectors.len() {
                        let (row, alpha) = (&mut row[v * TILE..], &alpha[skip + v * TILE..]);
                        T::V::<I>::load(row).mul(T::V::<I>::load(alpha)).store(row);
                    }
                }
            }
            multiply::<T, I>(vectors.len(), (&packed_values[d * stride + first..], stride), probs, sums, true);
        }
    }
}
