//! Operands of matrix tiles: pairs of bf16 that are adjacent along the reduced axis, as the bits of f32.

use super::load::load_padded;
use crate::simd::{Isa, Vector, VectorKernel};

/// Rows, and columns, of a tile; pairs of operands of one step.
pub const TILE: usize = 16;

/// Packs factors whose rows are contiguous: pairs along them, zeros to the end of the last tiles.
#[inline(always)]
pub fn pack_rows<I: Isa>(data: &[f32], row: usize, [rows, depth]: [usize; 2], (packed, stride): (&mut [f32], usize)) {
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

/// Packs a row of pairs along it, `width` of them in each part, zeros beyond it. Each part is what those before it have rounded away.
#[inline(always)]
pub fn pack_row_parts<I: Isa, const PARTS: usize>(row: &[f32], (packed, width): (&mut [f32], usize)) {
    for pair in (0..width).step_by(TILE) {
        let mut rest = [
            load_padded::<f32, I>(row.get(2 * pair..).unwrap_or_default()),
            load_padded::<f32, I>(row.get(2 * pair + TILE..).unwrap_or_default()),
        ];
        for part in 0..PARTS {
            let rounded = I::Bf16::widen(I::Bf16::fold(rest));
            I::Bf16::fold_adjacent(rounded)[0].store(&mut packed[part * width + pair..]);
            rest = [rest[0].sub(rounded[0]), rest[1].sub(rounded[1])];
        }
    }
}

/// As [`pack_rows`], for factors whose columns are contiguous, `step` apart.
#[inline(always)]
pub fn pack_columns<I: Isa>(data: &[f32], step: usize, [rows, depth]: [usize; 2], (packed, stride): (&mut [f32], usize)) {
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

/// Packs a matrix, `row` elements from one row to the next: pairs of rows, zeros beyond the last one to the end of the last tiles. Each part
/// is what those before it have rounded away.
#[inline(always)]
pub fn pack_matrix<I: Isa, const PARTS: usize>(
    (data, row): (&[f32], usize),
    [depth, columns]: [usize; 2],
    mut parts: [&mut [f32]; PARTS],
    stride: usize,
) {
    for pair in 0..depth / 2 {
        let (first, second) = (&data[2 * pair * row..][..columns], &data[(2 * pair + 1) * row..][..columns]);
        let mut n = 0;
        while n < columns {
            pack_pair::<I, PARTS>([I::F32::load(&first[n..]), I::F32::load(&second[n..])], &mut parts, pair * stride + n);
            n += TILE;
        }
    }
    if depth % 2 == 1 {
        for n in (0..columns).step_by(TILE) {
            let last = I::F32::load(&data[(depth - 1) * row + n..]);
            pack_pair::<I, PARTS>([last, I::F32::splat(0.0)], &mut parts, depth / 2 * stride + n);
        }
    }
    for pair in depth.div_ceil(2)..depth.next_multiple_of(2 * TILE) / 2 {
        for part in &mut parts {
            part[pair * stride..][..columns].fill(0.0);
        }
    }
}

#[inline(always)]
fn pack_pair<I: Isa, const PARTS: usize>(mut rest: [I::F32; 2], parts: &mut [&mut [f32]; PARTS], at: usize) {
    for (i, part) in parts.iter_mut().enumerate() {
        let packed = I::Bf16::fold(rest);
        packed.store(&mut part[at..]);
        if i + 1 < PARTS {
            let rounded = I::Bf16::widen(packed);
            rest = [rest[0].sub(rounded[0]), rest[1].sub(rounded[1])];
        }
    }
}
