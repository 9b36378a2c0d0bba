//! The two products of attention on one panel of queries and one block of keys.
//!
//! Both are computed transposed, with queries in the lanes: `S^T = K Q^T` and `O^T += V^T P^T`. The score matrix that the first
//! writes is then the operand that the second reads, softmax needs no work across lanes, and only queries and outputs are ever
//! transposed, once each. Keys and values enter as broadcasts, so that they are packed by copying rows.
//!
//! Layouts, in operands (see [`crate::simd::VectorKernel`]); `W` is [`TileKernel::PANEL`]:
//!
//! | buffer | shape |
//! | --- | --- |
//! | queries | `[head_dim / DEPTH, W]` |
//! | keys | `[block_k, key_stride]` |
//! | values | `[block_k / DEPTH, value_stride]` |
//! | scores, then probabilities | `[block_k, W]`, then `[block_k / DEPTH, W]` |
//! | accumulator | `[head_dim_v, W]` |

use super::load::{add_residue, is_zero, load_row};
use super::row_tile::RowKernel;
use crate::dtype::Float;
use crate::index::KeyPlaces;
use crate::simd::{Isa, SimdElement, Vector, VectorKernel, prefetch, tile};
use crate::tensor::Tensor;
use crate::workspace::padded;
use std::marker::PhantomData;
use std::ops::Range;

/// Keys or values of one head at consecutive positions.
#[derive(Debug, Clone, Copy)]
pub struct HeadRows<'a, T> {
    /// The keys or values.
    pub tensor: Tensor<'a, T>,
    /// Where they lie.
    pub places: KeyPlaces<'a>,
    /// Key/value head.
    pub head: usize,
    /// First position.
    pub first: usize,
    /// Number of rows.
    pub count: usize,
}

impl<'a, T: Copy> HeadRows<'a, T> {
    /// Row `i < count`.
    #[inline(always)]
    pub fn get(&self, i: usize) -> &'a [T] {
        let (batch, token) = self.places.place(self.first + i);
        self.tensor.row(batch, token, self.head)
    }

    /// Whether no element of the rows is infinite or NaN.
    #[inline(always)]
    pub fn are_finite<I: Isa>(&self) -> bool
    where
        T: SimdElement,
    {
        let mut residue = T::V::<I>::splat(T::Acc::ZERO);
        for i in 0..self.count {
            residue = add_residue::<T, I>(self.get(i), residue);
        }
        is_zero::<T, I>(residue)
    }

    /// The same head's rows at `positions`.
    #[inline(always)]
    pub fn moved(&self, positions: &Range<usize>) -> Self {
        Self { first: positions.start, count: positions.len(), ..*self }
    }

    /// Starts bringing part `part` of `parts` into the cache.
    #[inline(always)]
    pub fn prefetch(&self, part: usize, parts: usize) {
        for i in self.count * part / parts..self.count * (part + 1) / parts {
            prefetch(self.get(i));
        }
    }
}

/// The seam between attention and the units that multiply: vectors today, matrix tiles beside them.
///
/// An implementation owns the packed layouts of its operands. `vectors` names the vectors of a panel that take part: under a
/// causal mask the first ones see fewer keys than the last.
pub trait TileKernel<T: SimdElement>: 'static {
    /// Vectors of queries in a panel.
    const VECTORS: usize;
    /// Queries in a panel.
    const PANEL: usize;
    /// Keys are scored in multiples of this; rows beyond the last key are scratch.
    const KEY_STEP: usize;
    /// A multiple of this many keys makes whole operands.
    const DEPTH: usize;

    /// Elements of a packed panel of queries.
    fn queries_len(head_dim: usize) -> usize;
    /// Elements of a packed key.
    fn key_stride(head_dim: usize) -> usize;
    /// Elements of a packed block of keys.
    fn keys_len(block_k: usize, head_dim: usize) -> usize;
    /// Elements of a packed block of values.
    fn values_len(block_k: usize, head_dim_v: usize) -> usize;
    /// Rows of an accumulator, each of [`TileKernel::PANEL`] elements.
    fn acc_rows(head_dim_v: usize) -> usize;

    /// Packs up to `PANEL` query rows; missing ones count as zeros.
    fn pack_queries(rows: &[&[T]], head_dim: usize, packed: &mut [T::Acc]);
    /// Packs a block of keys.
    fn pack_keys(rows: &HeadRows<'_, T>, head_dim: usize, packed: &mut [T::Acc]);
    /// Packs a block of values; returns whether all are finite.
    fn pack_values(rows: &HeadRows<'_, T>, head_dim_v: usize, packed: &mut [T::Acc]) -> bool;
    /// Scores of `keys` of the block, whose start is a multiple of `KEY_STEP`; raises `peaks[v]` to their maximum, vector by vector.
    fn scores(
        packed: (&[T::Acc], &[T::Acc]),
        head_dim: usize,
        vectors: Range<usize>,
        keys: Range<usize>,
        scores: &mut [T::Acc],
        peaks: &mut [T::Acc],
    );
    /// Shrinks the accumulator by `alpha`, where given, and adds the products of `keys` of the block, whose start is a multiple
    /// of `DEPTH`.
    fn accumulate(
        operands: (&[T::Acc], &[T::Acc]),
        head_dim_v: usize,
        vectors: Range<usize>,
        keys: Range<usize>,
        alpha: Option<&[T::Acc]>,
        acc: &mut [T::Acc],
    );
}

/// Register tiles of vectors.
pub struct VectorTiles<I>(PhantomData<I>);

/// Keys of a register tile and vectors of queries: with 32 registers, 8 by 3 fill 24 accumulators, three columns and a broadcast.
const LONG: (usize, usize) = (8, 3);
/// With 16 registers, 6 by 2 leave two columns and two broadcasts; 4 by 3 would need one register more, and the accumulator that
/// the compiler then keeps in memory halves the speed.
const SHORT: (usize, usize) = (6, 2);

impl<I: Isa> VectorTiles<I> {
    const STEP: usize = if I::REGISTERS >= 32 { LONG.0 } else { SHORT.0 };
    pub(super) const VECTORS: usize = if I::REGISTERS >= 32 { LONG.1 } else { SHORT.1 };

    /// Elements of a packed row of `dim` operands: whole vectors, and one cache line more so that rows do not share cache sets.
    #[inline(always)]
    pub(super) fn stride<T: SimdElement>(dim: usize) -> usize {
        padded::<T::Acc>(dim) + padded::<T::Acc>(1)
    }
}

impl<T: SimdElement, I: Isa> TileKernel<T> for VectorTiles<I> {
    const VECTORS: usize = Self::VECTORS;
    const PANEL: usize = Self::VECTORS * T::V::<I>::LANES;
    const KEY_STEP: usize = Self::STEP;
    const DEPTH: usize = T::Kernel::<I>::DEPTH;

    fn queries_len(head_dim: usize) -> usize {
        padded::<T::Acc>(head_dim.div_ceil(T::Kernel::<I>::DEPTH) * <Self as TileKernel<T>>::PANEL)
    }
    fn key_stride(head_dim: usize) -> usize {
        Self::stride::<T>(head_dim.div_ceil(T::Kernel::<I>::DEPTH))
    }
    fn keys_len(block_k: usize, head_dim: usize) -> usize {
        block_k.next_multiple_of(Self::STEP) * <Self as TileKernel<T>>::key_stride(head_dim)
    }
    fn values_len(block_k: usize, head_dim_v: usize) -> usize {
        block_k.div_ceil(T::Kernel::<I>::DEPTH) * Self::stride::<T>(head_dim_v)
    }
    fn acc_rows(head_dim_v: usize) -> usize {
        padded::<T::Acc>(head_dim_v.next_multiple_of(Self::STEP))
    }

    #[inline(always)]
    fn pack_queries(rows: &[&[T]], head_dim: usize, packed: &mut [T::Acc]) {
        let lanes = T::V::<I>::LANES;
        let panel = <Self as TileKernel<T>>::PANEL;
        let depth = T::Kernel::<I>::DEPTH;
        let operands = head_dim.div_ceil(depth);
        for v in 0..Self::VECTORS {
            for d in (0..operands).step_by(lanes) {
                let mut block = T::V::<I>::zero_block();
                for (i, column) in block.as_mut().iter_mut().enumerate() {
                    if let Some(row) = rows.get(v * lanes + i) {
                        *column = load_row::<T, I>(&row[d * depth..]);
                    }
                }
                let block = T::V::<I>::transpose(block);
                for (i, &column) in block.as_ref().iter().take(operands - d).enumerate() {
                    column.store(&mut packed[(d + i) * panel + v * lanes..]);
                }
            }
        }
    }

    #[inline(always)]
    fn pack_keys(rows: &HeadRows<'_, T>, head_dim: usize, packed: &mut [T::Acc]) {
        let lanes = T::V::<I>::LANES;
        let depth = T::Kernel::<I>::DEPTH;
        let operands = head_dim.div_ceil(depth);
        let stride = Self::stride::<T>(operands);
        for (j, packed) in packed.chunks_exact_mut(stride).take(rows.count).enumerate() {
            let row = rows.get(j);
            for d in (0..operands).step_by(lanes) {
                load_row::<T, I>(&row[d * depth..]).store(&mut packed[d..]);
            }
        }
    }

    #[inline(always)]
    fn pack_values(rows: &HeadRows<'_, T>, head_dim_v: usize, packed: &mut [T::Acc]) -> bool {
        Self::pack_rows(|j| rows.get(j), rows.count, head_dim_v, packed)
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
        let depth = head_dim.div_ceil(T::Kernel::<I>::DEPTH);
        let skip = vectors.start * T::V::<I>::LANES;
        // Rows without an element have no packed form to skip into.
        let queries = queries.get(skip..).unwrap_or_default();
        let (scores, peaks) = (&mut scores[skip..], &mut peaks[skip..]);
        match (Self::STEP, vectors.len()) {
            (8, 3) => score_tiles::<T, I, 8, 3>(queries, packed_keys, depth, keys, scores, peaks),
            (8, 2) => score_tiles::<T, I, 8, 2>(queries, packed_keys, depth, keys, scores, peaks),
            (8, 1) => score_tiles::<T, I, 8, 1>(queries, packed_keys, depth, keys, scores, peaks),
            (6, 2) => score_tiles::<T, I, 6, 2>(queries, packed_keys, depth, keys, scores, peaks),
            (6, 1) => score_tiles::<T, I, 6, 1>(queries, packed_keys, depth, keys, scores, peaks),
            (step, count) => unreachable!("{count} vectors by {step} keys"),
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
        let depth = T::Kernel::<I>::DEPTH;
        let skip = vectors.start * T::V::<I>::LANES;
        let first = keys.start / depth;
        let probs = &probs[first * <Self as TileKernel<T>>::PANEL + skip..];
        let values = &packed_values[first * Self::stride::<T>(head_dim_v)..];
        let count = keys.end.div_ceil(depth) - first;
        let (alpha, acc) = (alpha.map(|alpha| &alpha[skip..]), acc.get_mut(skip..).unwrap_or_default());
        match (Self::STEP, vectors.len()) {
            (8, 3) => value_tiles::<T, I, 8, 3>(probs, values, head_dim_v, count, alpha, acc),
            (8, 2) => value_tiles::<T, I, 8, 2>(probs, values, head_dim_v, count, alpha, acc),
            (8, 1) => value_tiles::<T, I, 8, 1>(probs, values, head_dim_v, count, alpha, acc),
            (6, 2) => value_tiles::<T, I, 6, 2>(probs, values, head_dim_v, count, alpha, acc),
            (6, 1) => value_tiles::<T, I, 6, 1>(probs, values, head_dim_v, count, alpha, acc),
            (step, count) => unreachable!("{count} vectors by {step} dimensions"),
        }
    }
}

#[inline(always)]
fn score_tiles<T: SimdElement, I: Isa, const M: usize, const N: usize>(
    queries: &[T::Acc],
    packed_keys: &[T::Acc],
    depth: usize,
    keys: Range<usize>,
    scores: &mut [T::Acc],
    peaks: &mut [T::Acc],
) {
    let lanes = T::V::<I>::LANES;
    let panel = VectorTiles::<I>::VECTORS * lanes;
    let stride = VectorTiles::<I>::stride::<T>(depth);
    let mut highest = [T::V::<I>::splat(T::Acc::NEG_INFINITY); N];
    let mut j = keys.start;
    while j < keys.end {
        let zeros = [[T::V::<I>::splat(T::Acc::ZERO); N]; M];
        let block = &packed_keys[j * stride..];
        let sums = tile::<T, T::Kernel<I>, M, N>(block, (stride, 1), queries, panel, depth, zeros);
        let whole = j + M <= keys.end;
        for i in 0..M {
            let row = &mut scores[(j + i) * panel..];
            for v in 0..N {
                sums[i][v].store(&mut row[v * lanes..]);
                if whole || j + i < keys.end {
                    highest[v] = highest[v].max(sums[i][v]);
                }
            }
        }
        j += M;
    }
    for v in 0..N {
        let peak = &mut peaks[v * lanes..];
        T::V::<I>::load(peak).max(highest[v]).store(peak);
    }
}

#[inline(always)]
fn value_tiles<T: SimdElement, I: Isa, const M: usize, const N: usize>(
    probs: &[T::Acc],
    packed_values: &[T::Acc],
    head_dim_v: usize,
    depth: usize,
    alpha: Option<&[T::Acc]>,
    acc: &mut [T::Acc],
) {
    let lanes = T::V::<I>::LANES;
    let panel = VectorTiles::<I>::VECTORS * lanes;
    let stride = VectorTiles::<I>::stride::<T>(head_dim_v);
    let mut d = 0;
    while d < head_dim_v {
        let mut sums = [[T::V::<I>::splat(T::Acc::ZERO); N]; M];
        for i in 0..M {
            for v in 0..N {
                let old = T::V::<I>::load(&acc[(d + i) * panel + v * lanes..]);
                sums[i][v] = match alpha {
                    Some(alpha) => old.mul(T::V::<I>::load(&alpha[v * lanes..])),
                    None => old,
                };
            }
        }
        let sums = tile::<T, T::Kernel<I>, M, N>(&packed_values[d..], (1, stride), probs, panel, depth, sums);
        for i in 0..M {
            for v in 0..N {
                sums[i][v].store(&mut acc[(d + i) * panel + v * lanes..]);
            }
        }
        d += M;
    }
}
