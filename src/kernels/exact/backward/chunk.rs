//! One chunk of keys: its packed rows, the sums of its gradients, and what one panel of queries adds to them.

use super::super::lanes::Lanes;
use super::panel::{Computed, GradientPanel, Of, PackedBlock, ScoreBuffers};
use super::plan::{ChunkTask, Plan};
use super::sums::SumTable;
use super::{BackwardArgs, Wanted};
use crate::dtype::{Element, Float};
use crate::index::Segment;
use crate::math::load::{add_scaled, store_scaled};
use crate::math::row_tile::RowKernel;
use crate::math::tile::HeadRows;
use crate::parallel::{RowTurns, RowWriter};
use crate::simd::{Isa, SimdElement, prefetch};
use crate::workspace::Scratch;
use std::ops::Range;

/// So many rows before a gradient is written, its lines are requested.
const ROWS_AHEAD: usize = 8;

/// What the tasks of a call share.
pub struct Backward<'a, T: SimdElement> {
    /// The call.
    pub args: &'a BackwardArgs<'a, T>,
    /// `delta` of every query, `[B, Sq, H]`.
    pub deltas: &'a [T::Acc],
    /// Sums of the gradients of queries.
    pub query_sums: &'a RowTurns<'a, T::Acc>,
    /// Where the gradients of keys go.
    pub k: Option<&'a RowWriter<'a, T>>,
    /// Where those of values go.
    pub v: Option<&'a RowWriter<'a, T>>,
    /// What is wanted.
    pub wanted: Wanted,
    /// Whether the gradients of scores are summed, and nothing else.
    pub table: Option<&'a SumTable>,
    /// The cut.
    pub plan: &'a Plan,
}

/// Packed keys and values, and where they come from.
struct Chunk<'s, T: SimdElement> {
    positions: Range<usize>,
    keys: &'s [T::Acc],
    key_rows: &'s [T::Acc],
    values: &'s [T::Acc],
    finite: bool,
}

/// Sums of gradients, as rows.
struct Sums<'s, A> {
    keys: &'s mut [A],
    values: &'s mut [A],
    queries: &'s mut [A],
}

/// Rows of a panel, packed.
struct PanelRows<'s, A> {
    queries: &'s mut [A],
    d_outs: &'s mut [A],
}

/// What a panel is computed in.
struct Workspace<'s, A> {
    rows: PanelRows<'s, A>,
    scores: ScoreBuffers<'s, A>,
    folded: Folded<'s, A>,
}

/// Weights and gradients as operands, where they are none as they are.
struct Folded<'s, A> {
    weights: &'s mut [A],
    gradients: &'s mut [A],
    along_keys: &'s mut [A],
}

impl<T: SimdElement> Backward<'_, T> {
    /// Runs a task. With a table, score gradients are summed into the wide entries, if there are any, else into the others.
    #[inline(always)]
    pub fn run<I: Isa, K: RowKernel<T>>(&self, task: &ChunkTask, (wide, entries): (&mut [f64], &mut [T::Acc])) {
        let _watch = self.query_sums.watch();
        let (forward, plan, buffers) = (&self.args.forward, self.plan, &self.plan.buffers);
        let shape = forward.shape;
        let segment = forward.segment(task.segment);
        let total = buffers.total();
        let mut scratch = Scratch::take::<T::Acc>(total);
        let scratch = &mut scratch.as_mut_slice::<T::Acc>()[..total];
        let (keys, scratch) = scratch.split_at_mut(buffers.keys);
        let (key_rows, scratch) = scratch.split_at_mut(buffers.key_rows);
        let (values, scratch) = scratch.split_at_mut(buffers.values);
        let (key_sums, scratch) = scratch.split_at_mut(buffers.key_sums);
        let (value_sums, scratch) = scratch.split_at_mut(buffers.value_sums);
        let (query_sums, scratch) = scratch.split_at_mut(buffers.query_sums);
        let (query_rows, scratch) = scratch.split_at_mut(buffers.query_rows);
        let (d_out_rows, scratch) = scratch.split_at_mut(buffers.d_out_rows);
        let (weights, scratch) = scratch.split_at_mut(buffers.scores);
        let (gradients, scratch) = scratch.split_at_mut(buffers.scores);
        let (slopes, scratch) = scratch.split_at_mut(buffers.slopes);
        let (factors, scratch) = scratch.split_at_mut(buffers.factors);
        let (folded_weights, scratch) = scratch.split_at_mut(buffers.along_queries);
        let (folded_gradients, scratch) = scratch.split_at_mut(buffers.along_queries);
        let (along_keys, scratch) = scratch.split_at_mut(buffers.along_keys);

        let positions = plan.positions(task, &segment);
        let places = forward.places(&segment);
        let rows = HeadRows { tensor: forward.k, places, head: task.kv_head, first: positions.start, count: positions.len() };
        let value_rows = HeadRows { tensor: forward.v, ..rows };
        rows.prefetch(0, 1);
        value_rows.prefetch(0, 1);
        let mut finite = true;
        // One site for each piece of vector code: it is compiled for every type and level.
        for (rows, dim, packed) in [(&rows, shape.head_dim, &mut *keys), (&value_rows, shape.head_dim_v, &mut *values)] {
            K::pack_keys(rows, dim, packed);
            finite &= rows.are_finite::<I>();
        }
        if !key_rows.is_empty() {
            K::pack_rows(|j| rows.get(j), rows.count, shape.head_dim, key_rows);
        }
        let chunk = Chunk::<T> { positions: positions.clone(), keys, key_rows, values, finite };
        let mut sums = Sums { keys: key_sums, values: value_sums, queries: query_sums };
        sums.keys.fill(T::Acc::ZERO);
        sums.values.fill(T::Acc::ZERO);
        let mut workspace = Workspace {
            rows: PanelRows { queries: query_rows, d_outs: d_out_rows },
            scores: ScoreBuffers { weights, gradients, slopes, factors },
            folded: Folded { weights: folded_weights, gradients: folded_gradients, along_keys },
        };

        let all_rows = segment.q_len * shape.group();
        let panels = all_rows.div_ceil(K::PANEL);
        for p in 0..panels {
            let rows = p * K::PANEL..((p + 1) * K::PANEL).min(all_rows);
            let hull = forward.hull(&segment, task.kv_head, rows.clone());
            let Some(before) = plan.turns_before(&hull, task.chunk) else { continue };
            let lanes =
                Lanes { args: forward, segment: &segment, kv_head: task.kv_head, first_row: rows.start, rows: rows.len() };
            let panel = GradientPanel::<T, I, K>::new(self.args, self.deltas, buffers, lanes, scratch);
            // The rows of one head may lie apart by all heads: hardware prefetchers do not see them coming.
            for row in if self.wanted.q { rows.clone() } else { 0..0 } {
                let [batch, head, token] = forward.query(&segment, task.kv_head, row).at();
                self.query_sums.prefetch(batch, token, head);
            }
            for row in rows.end..(rows.end + K::PANEL).min(all_rows) {
                let [batch, head, token] = forward.query(&segment, task.kv_head, row).at();
                prefetch(forward.q.row(batch, token, head));
                prefetch(self.args.d_out.row(batch, token, head));
            }
            let entries = (&mut *wide, &mut *entries);
            self.visit(&chunk, &panel, &mut workspace, &mut sums, entries);
            if self.wanted.q {
                let mut turn = self.query_sums.wait(plan.place(task, p, panels), before);
                let factor = self.shared_factor();
                for (lane, sums) in sums.queries.chunks_exact(K::row_stride(shape.head_dim)).take(lanes.rows).enumerate() {
                    let [batch, head, token] = lanes.query(lane).at();
                    add_scaled::<T, I>(sums, factor, turn.row(batch, token, head));
                }
            }
        }
        self.deliver::<I, K>(&chunk, &segment, task.kv_head, &sums);
    }

    /// The factor of the gradients of queries and keys that is not in those of products.
    fn shared_factor(&self) -> T::Acc {
        let scale = &self.args.forward.mods.scale;
        T::Acc::from_f64(if scale.is_uniform() { scale.factor } else { 1.0 })
    }

    /// Adds what a panel has to do with the chunk to all sums.
    #[inline(always)]
    fn visit<I: Isa, K: RowKernel<T>>(
        &self,
        chunk: &Chunk<'_, T>,
        panel: &GradientPanel<'_, '_, T, I, K>,
        Workspace { rows, scores, folded }: &mut Workspace<'_, T::Acc>,
        sums: &mut Sums<'_, T::Acc>,
        (wide, entries): (&mut [f64], &mut [T::Acc]),
    ) {
        let (wanted, lanes) = (self.wanted, panel.lanes);
        let shape = lanes.args.shape;
        let mut finite = chunk.finite;
        let (q, d_out) = (lanes.rows_of(&self.args.forward.q), lanes.rows_of(&self.args.d_out));
        for (wanted, from, dim, packed) in
            [(wanted.k, &q, shape.head_dim, &mut *rows.queries), (wanted.v, &d_out, shape.head_dim_v, &mut *rows.d_outs)]
        {
            if wanted {
                finite &= K::pack_rows(|lane| from[lane], lanes.rows, dim, packed);
            }
        }
        sums.queries.fill(T::Acc::ZERO);
        let (key_stride, value_stride) = (K::row_stride(shape.head_dim), K::row_stride(shape.head_dim_v));
        for first in (0..chunk.positions.len()).step_by(self.plan.block_k) {
            let count = self.plan.block_k.min(chunk.positions.len() - first);
            let block = PackedBlock {
                keys: &chunk.keys[first * K::key_stride(shape.head_dim)..],
                values: &chunk.values[first * K::key_stride(shape.head_dim_v)..],
                first: chunk.positions.start + first,
                count,
            };
            let of = if self.table.is_some() { Of::Scores } else { Of::Products };
            let Some(Computed { keys, hides }) = panel.compute(&block, of, scores) else { continue };
            if let Some(table) = self.table {
                for lane in 0..lanes.rows {
                    let (query, found) = (lanes.query(lane), &scores.gradients[lane..]);
                    if wide.is_empty() {
                        table.add(&query, shape.group(), (found, K::PANEL), (keys.clone(), block.first), entries);
                    } else {
                        table.add(&query, shape.group(), (found, K::PANEL), (keys.clone(), block.first), wide);
                    }
                }
                continue;
            }
            let key_sums = sums.keys.get_mut(first * key_stride..).unwrap_or_default();
            let value_sums = sums.values.get_mut(first * value_stride..).unwrap_or_default();
            if hides && !finite {
                let mut sums = Sums { keys: key_sums, values: value_sums, queries: sums.queries };
                self.add_seen::<I, K>(panel, block.first, keys, scores, &mut sums);
                continue;
            }
            let filled = keys.start..keys.start + keys.len().next_multiple_of(K::ROW_STEP);
            let mut operands = (&*scores.weights, &*scores.gradients, &*scores.gradients);
            if K::FOLDS {
                K::fold(scores.weights, filled.clone(), folded.weights, None);
                let along_keys = wanted.q.then_some(&mut *folded.along_keys);
                K::fold(scores.gradients, filled, folded.gradients, along_keys);
                operands = (&*folded.weights, &*folded.gradients, &*folded.along_keys);
            }
            let (weights, gradients, along_keys) = operands;
            for (wanted, operands, dim, sums) in [
                (wanted.v, (weights, &*rows.d_outs), shape.head_dim_v, &mut *value_sums),
                (wanted.k, (gradients, &*rows.queries), shape.head_dim, &mut *key_sums),
            ] {
                if wanted {
                    K::add_to_keys(operands, dim, keys.clone(), lanes.rows, sums);
                }
            }
            if wanted.q {
                let all = if K::FOLDS { chunk.key_rows } else { chunk.keys };
                let key_rows = &all[K::packed_rows(first) * key_stride..];
                K::add_to_queries((along_keys, key_rows), shape.head_dim, lanes.rows, keys, sums.queries);
            }
        }
    }

    /// What the products do, entry by entry and only for keys that a row sees: the weight of a hidden key is 0, but 0 times an infinite
    /// or NaN row would not be.
    fn add_seen<I: Isa, K: RowKernel<T>>(
        &self,
        panel: &GradientPanel<'_, '_, T, I, K>,
        first_key: usize,
        keys: Range<usize>,
        scores: &ScoreBuffers<'_, T::Acc>,
        sums: &mut Sums<'_, T::Acc>,
    ) {
        fn add<T: Element>(sums: &mut [T::Acc], factor: f64, row: &[T]) {
            for (sum, &x) in sums.iter_mut().zip(row) {
                *sum = T::Acc::from_f64(sum.to_f64() + factor * x.to_acc().to_f64());
            }
        }
        let (lanes, wanted) = (panel.lanes, self.wanted);
        let shape = lanes.args.shape;
        let places = lanes.args.places(lanes.segment);
        let (key_stride, value_stride) = (K::row_stride(shape.head_dim), K::row_stride(shape.head_dim_v));
        for lane in 0..lanes.rows {
            let [batch, head, token] = lanes.query(lane).at();
            for j in keys.clone() {
                let (weight, gradient) =
                    (scores.weights[j * K::PANEL + lane].to_f64(), scores.gradients[j * K::PANEL + lane].to_f64());
                if weight.is_sign_negative() {
                    continue;
                }
                let (k_batch, k_token) = places.place(first_key + j);
                if wanted.v {
                    add(&mut sums.values[j * value_stride..], weight, self.args.d_out.row(batch, token, head));
                }
                if wanted.k {
                    add(&mut sums.keys[j * key_stride..], gradient, lanes.args.q.row(batch, token, head));
                }
                if wanted.q {
                    let key = lanes.args.k.row(k_batch, k_token, lanes.kv_head);
                    add(&mut sums.queries[lane * key_stride..], gradient, key);
                }
            }
        }
    }

    /// Writes the gradients of keys and values.
    #[inline(always)]
    fn deliver<I: Isa, K: RowKernel<T>>(&self, chunk: &Chunk<'_, T>, segment: &Segment, kv_head: usize, sums: &Sums<'_, T::Acc>) {
        let shape = self.args.forward.shape;
        let places = self.args.forward.places(segment);
        let one = T::Acc::from_f64(1.0);
        for (writer, sums, dim, factor) in
            [(self.k, &*sums.keys, shape.head_dim, self.shared_factor()), (self.v, &*sums.values, shape.head_dim_v, one)]
        {
            let Some(writer) = writer else { continue };
            let place = |j: usize| places.place(chunk.positions.start + j);
            for (j, sums) in sums.chunks_exact(K::row_stride(dim)).take(chunk.positions.len()).enumerate() {
                let (batch, token) = place((j + ROWS_AHEAD).min(chunk.positions.len() - 1));
                writer.prefetch(batch, token, kv_head);
                let (batch, token) = place(j);
                store_scaled::<T, I>(sums, factor, writer.row(batch, token, kv_head), writer.passes_caches());
            }
        }
    }
}
