//! Products of small float32 matrices by matrix tiles, operands rounded to bf16.

use super::elementwise::scale;
use super::product::{Factors, Pair, Rows, Start};
use super::tile_packing::{TILE, pack_columns, pack_matrix, pack_rows};
use crate::simd::{Isa, SimdElement, TileOperands, Vector};
use crate::workspace::Scratch;
use bytemuck::{cast_slice, cast_slice_mut};

/// Rows, depth and columns that are packed at a time: both operands stay in L2.
const BLOCK: [usize; 3] = [128, 512, 256];

/// Whether tiles are worth their packing, and can be packed.
#[inline(always)]
pub fn takes<T: SimdElement>(
    results: &[Pair<'_, '_, T::Acc>],
    matrix: &Rows<'_, T::Acc>,
    [rows, depth, width]: [usize; 3],
) -> bool {
    let packable = |factors: &Factors<'_, T::Acc>| factors.step == 1 || factors.row == 1;
    rows.min(depth).min(width) >= TILE && matrix.finite && results.iter().all(|(factors, _)| packable(factors))
}

/// As [`super::product::Product`], for a matrix that is finite.
#[inline(always)]
pub fn multiply<T: SimdElement, I: Isa>(
    start: Start<'_, T::Acc>,
    matrix: Rows<'_, T::Acc>,
    results: &mut [Pair<'_, '_, T::Acc>],
    stride: usize,
    [rows, depth, width]: [usize; 3],
) {
    let pairs = depth.min(BLOCK[1]).div_ceil(2).next_multiple_of(TILE);
    // One line more, so that rows do not share the sets of a cache.
    let (a_stride, b_stride) = (pairs + TILE, width.min(BLOCK[2]) + TILE);
    let (a_len, b_len) = (rows.min(BLOCK[0]).next_multiple_of(TILE) * a_stride, pairs * b_stride);
    let mut scratch = Scratch::take::<f32>(a_len + b_len);
    let (a, b) = scratch.as_mut_slice::<f32>().split_at_mut(a_len);
    for k in (0..depth).step_by(BLOCK[1]) {
        let count = BLOCK[1].min(depth - k);
        for n in (0..width).step_by(BLOCK[2]) {
            let columns = BLOCK[2].min(width - n);
            let data = (cast_slice(&matrix.data[k * matrix.stride + n..]), matrix.stride);
            pack_matrix::<I, 1>(data, [count, columns], [&mut *b], b_stride);
            for (factors, sums) in &mut *results {
                for i in (0..rows).step_by(BLOCK[0]) {
                    let rows = BLOCK[0].min(rows - i);
                    let data = cast_slice(&factors.data[i * factors.row + k * factors.step..]);
                    if factors.step == 1 {
                        pack_rows::<I>(data, factors.row, [rows, count], (a, a_stride));
                    } else {
                        pack_columns::<I>(data, factors.step, [rows, count], (a, a_stride));
                    }
                    let at = i * stride + n;
                    let sums = &mut sums[at..];
                    let start = if k > 0 { Start::Sums } else { start.at(i, at) };
                    let operands = TileOperands { a, a_stride, a_step: TILE, b, b_stride, steps: count.div_ceil(2 * TILE) };
                    multiply_packed::<T, I>(start, operands, (sums, stride), [rows, columns]);
                }
            }
        }
    }
}

/// Puts what sums begin with in their place.
#[inline(always)]
fn begin<T: SimdElement, I: Isa>(start: Start<'_, T::Acc>, (sums, stride): (&mut [T::Acc], usize), [rows, columns]: [usize; 2]) {
    match start {
        Start::Zeros | Start::Sums => {}
        Start::Faded(fades) => {
            for (row, &fade) in sums.chunks_mut(stride).zip(fades).take(rows) {
                scale::<T, I>(&mut row[..columns], fade);
            }
        }
        Start::FadedFrom(fades, from) => {
            for ((row, from), &fade) in sums.chunks_mut(stride).zip(from.chunks(stride)).zip(fades).take(rows) {
                let fade = T::V::<I>::splat(fade);
                for n in (0..columns).step_by(TILE) {
                    T::V::<I>::load(&from[n..]).mul(fade).store(&mut row[n..]);
                }
            }
        }
    }
}

/// Sums of products of packed operands: whole tiles of columns, any number of rows.
#[inline(always)]
pub fn multiply_packed<T: SimdElement, I: Isa>(
    start: Start<'_, T::Acc>,
    operands: TileOperands<'_>,
    (sums, stride): (&mut [T::Acc], usize),
    [rows, columns]: [usize; 2],
) {
    let add = !matches!(start, Start::Zeros);
    let mut i = 0;
    while i < rows {
        let height = if i + 2 * TILE <= rows { 2 * TILE } else { TILE.min(rows - i) };
        // A block is begun before the last one is multiplied, so that its rows are there and nothing waits for what was just stored.
        let first = columns.min(2 * TILE);
        begin::<T, I>(start.at(i, i * stride), (&mut sums[i * stride..], stride), [height, first]);
        let mut n = 0;
        while n < columns {
            let width = if n + 2 * TILE <= columns { 2 * TILE } else { TILE };
            let next = n + width;
            if next < columns {
                let at = i * stride + next;
                let ahead = (columns - next).min(2 * TILE);
                begin::<T, I>(start.at(i, at), (&mut sums[at..], stride), [height, ahead]);
            }
            let operands = TileOperands { a: &operands.a[i * operands.a_stride..], b: &operands.b[n..], ..operands };
            let sums = cast_slice_mut(&mut sums[i * stride + n..]);
            match (height, width == 2 * TILE) {
                (32, true) => I::multiply_tiles::<2, 2>(operands, sums, stride, add),
                (32, false) => I::multiply_tiles::<2, 1>(operands, sums, stride, add),
                (16, true) => I::multiply_tiles::<1, 2>(operands, sums, stride, add),
                (16, false) => I::multiply_tiles::<1, 1>(operands, sums, stride, add),
                _ => last_rows::<I>(operands, (sums, stride), [height, width], add),
            }
            n = next;
        }
        i += height;
    }
}

/// Rows that end within a tile.
#[inline(always)]
fn last_rows<I: Isa>(operands: TileOperands<'_>, (sums, stride): (&mut [f32], usize), [rows, width]: [usize; 2], add: bool) {
    let mut whole = [0.0; 2 * TILE * TILE];
    let copied = || (0..rows).map(|i| (i * 2 * TILE, i * stride));
    for (to, from) in copied() {
        whole[to..to + width].copy_from_slice(&sums[from..from + width]);
    }
    if width == TILE {
        I::multiply_tiles::<1, 1>(operands, &mut whole, 2 * TILE, add);
    } else {
        I::multiply_tiles::<1, 2>(operands, &mut whole, 2 * TILE, add);
    }
    for (from, to) in copied() {
        sums[to..to + width].copy_from_slice(&whole[from..from + width]);
    }
}
