//! Products of small float32 matrices by matrix tiles, operands rounded to bf16.

use super::elementwise::scale;
use super::load::load_padded;
use super::product::{Factors, Pair, Rows, Start};
use crate::simd::{Isa, SimdElement, TileOperands, Vector, VectorKernel};
use crate::workspace::Scratch;
use bytemuck::{cast_slice, cast_slice_mut};

/// Rows, and columns, of a tile; pairs of operands of one step.
const TILE: usize = 16;
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
            pack_matrix::<I>(cast_slice(&matrix.data[k * matrix.stride + n..]), matrix.stride, [count, columns], (b, b_stride));
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
                    tiles::<T, I>(start, operands, (sums, stride), [rows, columns]);
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

/// Products of packed operands.
#[inline(always)]
fn tiles<T: SimdElement, I: Isa>(
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

/// Packs factors whose rows are contiguous: pairs along them, zeros to the end of the last tiles.
#[inline(always)]
fn pack_rows<I: Isa>(data: &[f32], row: usize, [rows, depth]: [usize; 2], (packed, stride): (&mut [f32], usize)) {
    let whole = depth / (2 * TILE) * TILE;
    for (i, packed) in packed.chunks_exact_mut(stride).enumerate().take(rows.next_multiple_of(TILE)) {
        if i >= rows {
            packed.fill(0.0);
            continue;
        }
        let from = &data[i * row..][..depth];
        for (packed, from) in packed[..whole].chunks_exact_mut(TILE).zip(from.chunks_exact(2 * TILE)) {
            I::Bf16::fold_adjacent([I::F32::load(from), I::F32::load(&from[TILE..])])[0].store(packed);
        }
        if 2 * whole < depth {
            let rest = &from[2 * whole..];
            let halves = [load_padded::<f32, I>(rest), load_padded::<f32, I>(rest.get(TILE..).unwrap_or_default())];
            I::Bf16::fold_adjacent(halves)[0].store(&mut packed[whole..]);
        }
    }
}

/// As [`pack_rows`], for factors whose columns are contiguous, `step` apart.
#[inline(always)]
fn pack_columns<I: Isa>(data: &[f32], step: usize, [rows, depth]: [usize; 2], (packed, stride): (&mut [f32], usize)) {
    for k in (0..depth).step_by(2 * TILE) {
        for i in (0..rows).step_by(TILE) {
            let mut block = I::F32::zero_block();
            for (pair, operand) in block.as_mut().iter_mut().enumerate() {
                let mut halves = [I::F32::splat(0.0); 2];
                for (half, column) in halves.iter_mut().zip(k + 2 * pair..depth) {
                    *half = load_padded::<f32, I>(&data[column * step..][i..rows.min(i + TILE)]);
                }
                *operand = I::Bf16::fold(halves);
            }
            let block = I::F32::transpose(block);
            for (packed, &operands) in packed[i * stride..].chunks_mut(stride).zip(block.as_ref()) {
                operands.store(&mut packed[k / 2..]);
            }
        }
    }
}

/// Packs a matrix: pairs of rows, zeros beyond the last one to the end of the last tiles.
#[inline(always)]
fn pack_matrix<I: Isa>(data: &[f32], row: usize, [depth, columns]: [usize; 2], (packed, stride): (&mut [f32], usize)) {
    let zeros = [0.0; BLOCK[2]];
    for (pair, packed) in packed.chunks_exact_mut(stride).enumerate().take(depth.next_multiple_of(2 * TILE) / 2) {
        let [first, second] = [2 * pair, 2 * pair + 1].map(|k| if k < depth { &data[k * row..] } else { &zeros });
        let rows = first[..columns].chunks_exact(TILE).zip(second[..columns].chunks_exact(TILE));
        for (packed, (first, second)) in packed[..columns].chunks_exact_mut(TILE).zip(rows) {
            I::Bf16::fold([I::F32::load(first), I::F32::load(second)]).store(packed);
        }
    }
}
