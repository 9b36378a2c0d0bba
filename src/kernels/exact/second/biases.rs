//! The gradients of the gradients with respect to what is added to scores.

use super::super::backward::sums::SumTable;
use super::double_backward::Pass;
use super::tile::{KEYS, ROWS, Tile, TileRows, covering, scratch_len};
use crate::parallel::{RowWriter, for_each_tile};
use crate::simd::{Isa, Level, Task, Wide};
use crate::workspace::Scratch;
use std::ops::Range;

/// Adds up the derivatives of the gradients of all scores that an entry of the table takes part in.
///
/// # Panics
/// When `sums` is not of the table's length.
pub fn bias_gradient<T: Wide>(pass: &Pass<'_, T>, table: &SumTable, sums: &mut [f64], level: Level, threads: usize) {
    let shape = &pass.args.forward.shape;
    // A bias by query is cut into rows of tokens.
    let rows = if table.token_stride > 0 { shape.seqlen_q } else { 1 };
    if table.is_empty() || rows == 0 {
        return;
    }
    let width = table.per_head / rows;
    let strides = [table.heads * table.per_head, width, table.per_head];
    let sums = RowWriter::new(sums, [table.batches, rows, table.heads, width], strides);
    let task = BiasTask { pass, table, sums, rows, width, tiles: rows.div_ceil(ROWS) };
    for_each_tile(level, threads, table.batches * table.heads * task.tiles, &task);
}

struct BiasTask<'a, 'd, T: Wide> {
    pass: &'a Pass<'a, T>,
    table: &'a SumTable,
    sums: RowWriter<'d, f64>,
    rows: usize,
    width: usize,
    tiles: usize,
}

fn of(extent: usize, index: usize, all: usize) -> Range<usize> {
    if extent == 1 { 0..all } else { index..index + 1 }
}

impl<T: Wide> Task for BiasTask<'_, '_, T> {
    const MULTIPLIES_BF16: bool = false;

    #[inline(always)]
    fn run<I: Isa>(&self, index: usize) {
        let (pass, args, direction) = (self.pass, &self.pass.args.forward, self.pass.direction);
        let (shape, table) = (&args.shape, self.table);
        let group = shape.group();
        let (place, first) = (index / self.tiles, index % self.tiles * ROWS);
        let (table_batch, table_head) = (place / table.heads, place % table.heads);
        let rows = first..(first + ROWS).min(self.rows);
        let (origin, tokens) = if self.rows > 1 { (first as isize, rows.clone()) } else { (0, 0..shape.seqlen_q) };
        let mut sums = Scratch::take::<f64>(rows.len() * self.width);
        let sums = &mut sums.as_mut_slice::<f64>()[..rows.len() * self.width];
        sums.fill(0.0);
        let mut scratch = Scratch::take::<T>(scratch_len(shape));
        let mut tile = Tile::carve(&mut scratch.as_mut_slice::<T>(), shape, direction, true);
        for batch in of(table.batches, table_batch, shape.batch) {
            for (segment, part) in covering(args, batch, tokens.start * group..tokens.end * group) {
                for head in of(table.heads, table_head, shape.num_heads) {
                    let kv_head = head / group;
                    for first in (part.start..part.end).step_by(ROWS * group) {
                        let count = ((part.end - first) / group).min(ROWS);
                        let rows = TileRows { segment: &segment, kv_head, first: first + head % group, step: group, count };
                        let factors = pass.factors(&rows, false);
                        tile.load_queries(args, direction, Some(pass.args.d_out), &rows);
                        for keys in rows.blocks(args, &(0..usize::MAX)) {
                            tile.load_keys(args, direction, (&segment, kv_head), &keys);
                            tile.score::<I>(args, direction, &rows, &keys);
                            tile.differentiate::<I>(&factors[..count]);
                            for (i, row) in tile.g_dot.chunks_exact(KEYS).take(count).enumerate() {
                                let token = rows.query(args, i).at()[2] as isize - origin;
                                let start = table.origin as isize + token * table.token_stride;
                                for (key, x) in keys.clone().zip(row) {
                                    sums[(start + key as isize * table.key_stride) as usize] += x.to_f64();
                                }
                            }
                        }
                    }
                }
            }
        }
        for (row, sums) in rows.zip(sums.chunks_exact(self.width.max(1))) {
            self.sums.row(table_batch, row, table_head).copy_from_slice(sums);
        }
    }
}
