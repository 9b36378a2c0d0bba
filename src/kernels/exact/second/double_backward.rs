//! The gradients of the gradients: see the module for why they are derivatives along the direction of the cotangents.

use super::super::backward::BackwardArgs;
use super::super::backward::sums::SumTable;
use super::Direction;
use super::biases::bias_gradient;
use super::jvp::{JvpOut, base, jvp, query_tiles};
use super::tile::{KEY_SUMS, KEYS, ROWS, RowFactors, Tile, TileRows, covering, scratch_len};
use crate::math::product::row_width;
use crate::parallel::{RowWriter, for_each_tile};
use crate::simd::{Isa, Level, Task, Wide};
use crate::tensor::{AttnShape, Tensor};
use crate::workspace::{Scratch, carve};

/// Where the gradients go.
pub struct SecondGradients<'a, T> {
    /// Of the gradient of the output, `[B, Sq, H, Dv]`.
    pub d_out: Option<RowWriter<'a, T>>,
    /// Of queries, `[B, Sq, H, D]`.
    pub q: Option<RowWriter<'a, T>>,
    /// Of keys, `[B, Sk, Hkv, D]`.
    pub k: Option<RowWriter<'a, T>>,
    /// Of values, `[B, Sk, Hkv, Dv]`.
    pub v: Option<RowWriter<'a, T>>,
    /// Of the gradient of the log-sum-exp, as `[B, Sq, H, 1]`.
    pub d_lse: Option<RowWriter<'a, T>>,
}

/// What all passes read.
pub struct Pass<'a, T: Wide> {
    /// The first backward.
    pub args: &'a BackwardArgs<'a, T>,
    /// The cotangents.
    pub direction: &'a Direction<'a, T>,
    /// Derivatives along it of the log-sum-exp, as `[B, Sq, H, 1]`.
    lse_change: Tensor<'a, T>,
    /// And of `delta`.
    delta_change: Tensor<'a, T>,
}

/// Computes the gradients, and adds those of biases up in double precision, with up to `threads` threads. Results do not depend on how many.
///
/// # Panics
/// Never: the arrays made here have the sizes of the call.
pub fn double_backward<T: Wide>(
    args: &BackwardArgs<'_, T>,
    direction: &Direction<'_, T>,
    gradients: &SecondGradients<'_, T>,
    biases: &mut [(SumTable, Vec<f64>)],
    level: Level,
    threads: usize,
) {
    let AttnShape { batch, seqlen_q, seqlen_k, num_heads, num_kv_heads, .. } = args.forward.shape;
    let of_rows = [batch, seqlen_q, num_heads, 1];
    let strides = [seqlen_q * num_heads, num_heads, 1];
    let mut changes = [(); 2].map(|()| vec![T::ZERO; batch * seqlen_q * num_heads]);
    let [lse_change, delta_change] = &mut changes;
    {
        let lse = RowWriter::new(lse_change, of_rows, strides);
        let delta = RowWriter::new(delta_change, of_rows, strides);
        let out = JvpOut { out: gradients.d_out.as_ref(), lse: Some(&lse), product: Some((args.d_out, &delta)) };
        jvp(&args.forward, direction, &out, level, threads);
    }
    let [lse_change, delta_change] =
        [lse_change, delta_change].map(|rows| Tensor::contiguous("lse", rows, of_rows).expect("of that size"));
    if let Some(writer) = &gradients.d_lse {
        for row in 0..batch * seqlen_q * num_heads {
            let (batch, token, head) = (row / strides[0], row / num_heads % seqlen_q, row % num_heads);
            writer.row(batch, token, head).copy_from_slice(lse_change.row(batch, token, head));
        }
    }
    let pass = Pass { args, direction, lse_change, delta_change };
    if let Some(q) = &gradients.q {
        let task = QueryTask { pass: &pass, q, tiles: query_tiles(&args.forward) };
        for_each_tile(level, threads, batch * num_kv_heads * task.tiles, &task);
    }
    if gradients.k.is_some() || gradients.v.is_some() {
        let task = KeyTask { pass: &pass, k: gradients.k.as_ref(), v: gradients.v.as_ref(), tiles: seqlen_k.div_ceil(KEYS) };
        for_each_tile(level, threads, batch * num_kv_heads * task.tiles, &task);
    }
    for (table, sums) in biases {
        bias_gradient(&pass, table, sums, level, threads);
    }
}

impl<T: Wide> Pass<'_, T> {
    /// What the queries of a tile need; gradients of scores are those of products of queries and keys if `scaled`.
    #[inline(always)]
    pub fn factors(&self, rows: &TileRows<'_>, scaled: bool) -> [RowFactors<T>; ROWS] {
        let zero = T::ZERO;
        let mut all = [RowFactors { base: zero, change: zero, delta: zero, delta_change: zero, slope: zero }; ROWS];
        for (i, factors) in all[..rows.count].iter_mut().enumerate() {
            let query = rows.query(&self.args.forward, i);
            let [batch, head, token] = query.at();
            *factors = RowFactors {
                base: base(self.args.lse.row(batch, token, head)[0]),
                change: self.lse_change.row(batch, token, head)[0],
                delta: T::from_f64(self.args.row_state(&query).delta),
                delta_change: self.delta_change.row(batch, token, head)[0],
                slope: T::from_f64(if scaled { self.args.forward.scale(&query) } else { 1.0 }),
            };
        }
        all
    }
}

struct QueryTask<'a, 'd, T: Wide> {
    pass: &'a Pass<'a, T>,
    q: &'a RowWriter<'d, T>,
    tiles: usize,
}

impl<T: Wide> Task for QueryTask<'_, '_, T> {
    const MULTIPLIES_BF16: bool = false;

    #[inline(always)]
    fn run<I: Isa>(&self, index: usize) {
        let (pass, args, direction) = (self.pass, &self.pass.args.forward, self.pass.direction);
        let shape = &args.shape;
        let (head, first) = (index / self.tiles, index % self.tiles * ROWS);
        let (batch, kv_head) = (head / shape.num_kv_heads, head % shape.num_kv_heads);
        let rows = first..(first + ROWS).min(shape.seqlen_q * shape.group());
        let mut scratch = Scratch::take::<T>(scratch_len(shape));
        let mut rest = scratch.as_mut_slice::<T>();
        let mut tile = Tile::carve(&mut rest, shape, direction, true);
        let width = row_width(shape.head_dim);
        let sums = carve(&mut rest, ROWS * width);
        let mut covered = [false; ROWS];
        for (segment, part) in covering(args, batch, rows.clone()) {
            let rows = TileRows { segment: &segment, kv_head, first: part.start, step: 1, count: part.len() };
            let factors = pass.factors(&rows, true);
            sums.fill(T::ZERO);
            tile.load_queries(args, direction, Some(pass.args.d_out), &rows);
            for keys in rows.blocks(args, &(0..usize::MAX)) {
                tile.load_keys(args, direction, (&segment, kv_head), &keys);
                tile.score::<I>(args, direction, &rows, &keys);
                tile.differentiate::<I>(&factors[..rows.count]);
                tile.add_to_queries::<I>(sums, keys.len());
            }
            for i in 0..rows.count {
                let [batch, head, token] = rows.query(args, i).at();
                covered[token * shape.group() + head % shape.group() - first] = true;
                self.q.row(batch, token, head).copy_from_slice(&sums[i * width..][..shape.head_dim]);
            }
        }
        let group = shape.group();
        for row in rows.filter(|row| !covered[row - first]) {
            self.q.row(batch, row / group, kv_head * group + row % group).fill(T::ZERO);
        }
    }
}

struct KeyTask<'a, 'd, T: Wide> {
    pass: &'a Pass<'a, T>,
    k: Option<&'a RowWriter<'d, T>>,
    v: Option<&'a RowWriter<'d, T>>,
    tiles: usize,
}

impl<T: Wide> Task for KeyTask<'_, '_, T> {
    const MULTIPLIES_BF16: bool = false;

    #[inline(always)]
    fn run<I: Isa>(&self, index: usize) {
        let (pass, args, direction) = (self.pass, &self.pass.args.forward, self.pass.direction);
        let shape = &args.shape;
        let (head, first) = (index / self.tiles, index % self.tiles * KEYS);
        let (batch, kv_head) = (head / shape.num_kv_heads, head % shape.num_kv_heads);
        let tokens = first..(first + KEYS).min(shape.seqlen_k);
        let mut scratch = Scratch::take::<T>(scratch_len(shape));
        let mut rest = scratch.as_mut_slice::<T>();
        let mut tile = Tile::carve(&mut rest, shape, direction, true);
        let [k_width, v_width] = [shape.head_dim, shape.head_dim_v].map(row_width);
        let k_sums = carve(&mut rest, KEY_SUMS * k_width);
        let v_sums = carve(&mut rest, KEY_SUMS * v_width);
        k_sums.fill(T::ZERO);
        v_sums.fill(T::ZERO);
        for segment in (0..args.segment_count()).map(|index| args.segment(index)).filter(|segment| segment.k_batch == batch) {
            let start = tokens.start.max(segment.k_first + segment.k_start);
            let end = tokens.end.min(segment.k_first + segment.k_end);
            if start >= end {
                continue;
            }
            let keys = start - segment.k_first..end - segment.k_first;
            tile.load_keys(args, direction, (&segment, kv_head), &keys);
            let all = segment.q_len * shape.group();
            for first_row in (0..all).step_by(ROWS) {
                let count = ROWS.min(all - first_row);
                let rows = TileRows { segment: &segment, kv_head, first: first_row, step: 1, count };
                if rows.blocks(args, &keys).next().is_none() {
                    continue;
                }
                tile.load_queries(args, direction, Some(pass.args.d_out), &rows);
                tile.score::<I>(args, direction, &rows, &keys);
                tile.differentiate::<I>(&pass.factors(&rows, true)[..count]);
                let place = start - first;
                tile.add_to_keys::<I>((&mut k_sums[place * k_width..], &mut v_sums[place * v_width..]), count, keys.len());
            }
        }
        for (i, token) in tokens.enumerate() {
            if let Some(k) = self.k {
                k.row(batch, token, kv_head).copy_from_slice(&k_sums[i * k_width..][..shape.head_dim]);
            }
            if let Some(v) = self.v {
                v.row(batch, token, kv_head).copy_from_slice(&v_sums[i * v_width..][..shape.head_dim_v]);
            }
        }
    }
}
