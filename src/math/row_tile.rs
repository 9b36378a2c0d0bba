//! Products whose results lie in rows, for gradients: `dV += P^T dO` and `dK += dS^T Q` sum over the queries of a panel, `dQ += dS K`
//! over the keys of a block. Weights enter as broadcasts from where scores lie (see [`super::tile`]), the other operand as vectors along
//! its rows.
//!
//! Layouts, in operands; `W` is [`TileKernel::PANEL`]:
//!
//! | buffer | shape |
//! | --- | --- |
//! | rows of queries, of keys | `[rows / DEPTH, row_stride]` |
//! | weights along the keys | `[block_k / DEPTH, W]` |
//! | weights along the queries | `[block_k, along_queries]` |
//! | sums | `[rows, row_stride]` |

use super::load::{is_zero, load_padded, load_rows};
use super::tile::{TileKernel, VectorTiles};
use crate::dtype::Float;
use crate::simd::{Isa, SimdElement, Vector, VectorKernel, tile};
use std::ops::Range;

/// The part of the seam that only gradients need.
pub trait RowKernel<T: SimdElement>: TileKernel<T> {
    /// Rows of sums that are computed together; buffers have room for so many more, which are scratch.
    const ROW_STEP: usize;
    /// Operands from one key to the next in weights along the queries.
    const ALONG_QUERIES: usize;
    /// Whether weights are no operands as they are, and keys as scores need them no rows.
    const FOLDS: bool;

    /// Operands from one row to the next, in operands and in sums.
    fn row_stride(dim: usize) -> usize;
    /// How many packed rows hold `count` rows.
    fn packed_rows(count: usize) -> usize;
    /// Elements of weights along `count` keys.
    fn along_keys_len(count: usize) -> usize;
    /// Packs `count` rows; returns whether all are finite.
    fn pack_rows<'r>(row: impl Fn(usize) -> &'r [T], count: usize, dim: usize, packed: &mut [T::Acc]) -> bool;
    /// Makes operands along the queries, and along the keys, of the weights of `keys`, whose start is a multiple of `DEPTH`; nothing
    /// unless weights fold.
    fn fold(weights: &[T::Acc], keys: Range<usize>, along_queries: &mut [T::Acc], along_keys: Option<&mut [T::Acc]>);
    /// Adds to the sums of `keys` of the block the products of weights along the queries with `queries` packed rows.
    fn add_to_keys(operands: (&[T::Acc], &[T::Acc]), dim: usize, keys: Range<usize>, queries: usize, sums: &mut [T::Acc]);
    /// Adds to the sums of `queries` rows the products of weights along the keys with the packed rows of `keys`, whose start is a
    /// multiple of `DEPTH`.
    fn add_to_queries(operands: (&[T::Acc], &[T::Acc]), dim: usize, queries: usize, keys: Range<usize>, sums: &mut [T::Acc]);
}

/// Most vectors of a panel.
const MAX_VECTORS: usize = 3;
/// Rows of a register tile: by 4 vectors, or by 2 where there are 16 registers, they fill 24 and 12 accumulators.
const ROWS: usize = 6;

impl<T: SimdElement, I: Isa> RowKernel<T> for VectorTiles<I> {
    const ROW_STEP: usize = ROWS;
    const ALONG_QUERIES: usize = {
        let (lanes, vectors) = (<T::V<I> as Vector>::LANES, <Self as TileKernel<T>>::VECTORS);
        vectors.div_ceil(T::Kernel::<I>::DEPTH) * lanes
    };

    const FOLDS: bool = T::Kernel::<I>::DEPTH > 1;

    fn row_stride(dim: usize) -> usize {
        Self::stride::<T>(dim)
    }
    fn packed_rows(count: usize) -> usize {
        count.div_ceil(T::Kernel::<I>::DEPTH)
    }
    fn along_keys_len(count: usize) -> usize {
        <Self as RowKernel<T>>::packed_rows(count) * <Self as TileKernel<T>>::PANEL + ROWS
    }

    #[inline(always)]
    fn pack_rows<'r>(row: impl Fn(usize) -> &'r [T], count: usize, dim: usize, packed: &mut [T::Acc]) -> bool {
        let lanes = T::V::<I>::LANES;
        let depth = T::Kernel::<I>::DEPTH;
        let stride = Self::stride::<T>(dim);
        let zero = T::V::<I>::splat(T::Acc::ZERO);
        // x - x is 0 for finite x and NaN otherwise.
        let mut residue = zero;
        for (j, packed) in packed.chunks_exact_mut(stride).take(count.div_ceil(depth)).enumerate() {
            let first = row(j * depth);
            let second = if depth == 2 && j * depth + 1 < count { row(j * depth + 1) } else { &[] };
            for d in (0..dim).step_by(lanes) {
                let tail = &second[d.min(second.len())..];
                let operands = load_rows::<T, I>([&first[d..], tail]);
                operands.store(&mut packed[d..]);
                if depth == 1 {
                    residue = residue.add(operands.sub(operands));
                } else {
                    // The high half of a pair, with whatever in the low bits, is finite if the second element is.
                    let x = load_padded::<T, I>(&first[d..]);
                    residue = residue.add(x.sub(x)).add(operands.sub(operands));
                }
            }
        }
        is_zero::<T, I>(residue)
    }

    #[inline(always)]
    fn fold(weights: &[T::Acc], keys: Range<usize>, along_queries: &mut [T::Acc], along_keys: Option<&mut [T::Acc]>) {
        let lanes = T::V::<I>::LANES;
        if T::Kernel::<I>::DEPTH == 1 {
            return;
        }
        let panel = <Self as TileKernel<T>>::PANEL;
        let stride = <Self as RowKernel<T>>::ALONG_QUERIES;
        for key in keys.clone() {
            let vectors = load_key::<T, I>(&weights[key * panel..]);
            let row = &mut along_queries[key * stride..][..stride];
            for v in 0..Self::VECTORS.div_ceil(2) {
                let [pairs, _] = T::Kernel::<I>::fold_adjacent([vectors[2 * v], vectors[2 * v + 1]]);
                pairs.store(&mut row[v * lanes..]);
            }
        }
        let Some(along_keys) = along_keys else { return };
        let mut key = keys.start;
        while key < keys.end {
            let first = load_key::<T, I>(&weights[key * panel..]);
            let second = if key + 1 < keys.end {
                load_key::<T, I>(&weights[(key + 1) * panel..])
            } else {
                [T::V::<I>::splat(T::Acc::ZERO); MAX_VECTORS + 1]
            };
            let row = &mut along_keys[key / 2 * panel..][..panel];
            for v in 0..Self::VECTORS {
                T::Kernel::<I>::fold([first[v], second[v]]).store(&mut row[v * lanes..]);
            }
            key += 2;
        }
    }

    #[inline(always)]
    fn add_to_keys((weights, rows): (&[T::Acc], &[T::Acc]), dim: usize, keys: Range<usize>, queries: usize, sums: &mut [T::Acc]) {
        let stride = <Self as RowKernel<T>>::ALONG_QUERIES;
        let weights = &weights[keys.start * stride..];
        let sums = &mut sums[keys.start * Self::stride::<T>(dim)..];
        let depth = queries.div_ceil(T::Kernel::<I>::DEPTH);
        columns::<T, I>((weights, (stride, 1)), (rows, dim), (keys.len(), depth), sums);
    }

    #[inline(always)]
    fn add_to_queries(
        (weights, rows): (&[T::Acc], &[T::Acc]),
        dim: usize,
        queries: usize,
        keys: Range<usize>,
        sums: &mut [T::Acc],
    ) {
        let panel = <Self as TileKernel<T>>::PANEL;
        let depth = T::Kernel::<I>::DEPTH;
        let first = keys.start / depth;
        let (weights, rows) = (&weights[first * panel..], &rows[first * Self::stride::<T>(dim)..]);
        columns::<T, I>((weights, (1, panel)), (rows, dim), (queries, keys.end.div_ceil(depth) - first), sums);
    }
}

/// The weights of a key, and zeros beyond them.
#[inline(always)]
fn load_key<T: SimdElement, I: Isa>(weights: &[T::Acc]) -> [T::V<I>; MAX_VECTORS + 1] {
    let lanes = T::V::<I>::LANES;
    let weights = &weights[..VectorTiles::<I>::VECTORS * lanes];
    let mut vectors = [T::V::<I>::splat(T::Acc::ZERO); MAX_VECTORS + 1];
    for (v, vector) in vectors.iter_mut().enumerate().take(VectorTiles::<I>::VECTORS) {
        *vector = T::V::<I>::load(&weights[v * lanes..]);
    }
    vectors
}

/// All columns of `sums[count][dim]`, as many vectors at a time as there are registers for.
#[inline(always)]
fn columns<T: SimdElement, I: Isa>(
    weights: (&[T::Acc], (usize, usize)),
    (rows, dim): (&[T::Acc], usize),
    (count, depth): (usize, usize),
    sums: &mut [T::Acc],
) {
    let vectors = dim.div_ceil(T::V::<I>::LANES);
    let widest = if I::REGISTERS >= 32 { 4 } else { 2 };
    let mut first = 0;
    while first < vectors {
        // 5 are 3 and 2: one vector alone would not hide the latency.
        let left = vectors - first;
        let step = if left == widest + 1 && widest == 4 { 3 } else { left.min(widest) };
        match step {
            4 => column::<T, I, 4>(weights, (rows, dim), first, (count, depth), sums),
            3 => column::<T, I, 3>(weights, (rows, dim), first, (count, depth), sums),
            2 => column::<T, I, 2>(weights, (rows, dim), first, (count, depth), sums),
            _ => column::<T, I, 1>(weights, (rows, dim), first, (count, depth), sums),
        }
        first += step;
    }
}

/// `N` vectors of all rows, from vector `first` on.
#[inline(always)]
fn column<T: SimdElement, I: Isa, const N: usize>(
    (weights, (row, step)): (&[T::Acc], (usize, usize)),
    (rows, dim): (&[T::Acc], usize),
    first: usize,
    (count, depth): (usize, usize),
    sums: &mut [T::Acc],
) {
    let lanes = T::V::<I>::LANES;
    let stride = VectorTiles::<I>::stride::<T>(dim);
    let at = first * lanes;
    for r in (0..count).step_by(ROWS) {
        let sums = &mut sums[r * stride + at..];
        let mut tile_sums = [[T::V::<I>::splat(T::Acc::ZERO); N]; ROWS];
        for i in 0..ROWS {
            for v in 0..N {
                tile_sums[i][v] = T::V::<I>::load(&sums[i * stride + v * lanes..]);
            }
        }
        let tile_sums = tile::<T, T::Kernel<I>, ROWS, N>(&weights[r * row..], (row, step), &rows[at..], stride, depth, tile_sums);
        for i in 0..ROWS {
            for v in 0..N {
                tile_sums[i][v].store(&mut sums[i * stride + v * lanes..]);
            }
        }
    }
}
