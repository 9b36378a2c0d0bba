//! Prefill: many queries against many keys, tile by tile, with the online softmax (Milakov & Gimelshein 2018; FlashAttention,
//! Dao et al. 2022), transposed (see [`crate::math::tile`]).
//!
//! ```text
//! for a block of query rows of one key/value head (a task):     rows: (token, head of the group), token by token
//!   pack the queries into panels of W lanes
//!   for a block of keys that some row sees:
//!     pack keys and values                                      once for all panels, that is for all heads of the group
//!     for a panel that sees some of them:
//!       S^T = K Q^T; m, alpha = online softmax step; P^T = 2^(S^T * scale - m); O^T = alpha O^T + V^T P^T
//!   O = transpose(O^T) / l
//! ```
//!
//! 1. Blocks of which a panel sees no key are not computed, and at the edges of a mask each vector of a panel starts and stops at
//!    its own keys.
//! 2. Mask code runs on blocks that a mask cuts, nowhere else.
//! 3. The scale enters with the exponential, where it costs nothing; scores are in base 2.

use super::lanes::Lanes;
use super::panel::Panel;
use super::plan::{Plan, RowTask};
use super::{Blocking, ExactArgs, ExactOut};
use crate::dtype::DType;
use crate::index::Segment;
use crate::math::matrix_tiles::MatrixTiles;
use crate::math::tile::{HeadRows, TileKernel, VectorTiles};
use crate::parallel::for_each_tile;
use crate::simd::{Isa, Level, SimdElement, Task};
use crate::workspace::Scratch;
use std::ops::Range;
use std::sync::OnceLock;

/// Calls of fewer floating-point operations than this are over before another thread would start.
const SERIAL_FLOPS: usize = 1 << 21;

struct Prefill<'a, T: SimdElement> {
    args: &'a ExactArgs<'a, T>,
    out: &'a ExactOut<'a, T>,
    plan: &'a Plan,
}

/// Computes `out` with up to `threads` threads. Results do not depend on how many.
pub fn forward<T: SimdElement>(args: &ExactArgs<'_, T>, out: &ExactOut<'_, T>, level: Level, threads: usize, blocking: Blocking) {
    let shape = args.shape;
    let scores = |segment: usize| {
        let segment = args.segment(segment);
        let rows = segment.q_len * shape.group();
        // Of all rows, the last sees about as many keys as any.
        rows.saturating_mul(args.hull(&segment, 0, rows.saturating_sub(1)..rows).len())
    };
    let scores: usize = (0..args.segment_count()).map(scores).fold(0, usize::saturating_add);
    let flops = scores.saturating_mul(shape.num_kv_heads * 2 * (shape.head_dim + shape.head_dim_v));
    let threads = if flops < SERIAL_FLOPS { 1 } else { threads };
    let plan = OnceLock::new();
    level.run(&Planning { args, blocking, threads, plan: &plan }, 0);
    let Some(plan) = plan.into_inner() else { return };
    for_each_tile(level, threads, plan.tasks.len(), &Prefill { args, out, plan: &plan });
}

/// Panels differ between instruction sets, and with them the tasks.
struct Planning<'a, T: SimdElement> {
    args: &'a ExactArgs<'a, T>,
    blocking: Blocking,
    threads: usize,
    plan: &'a OnceLock<Plan>,
}

impl<T: SimdElement> Task for Planning<'_, T> {
    const MULTIPLIES_BF16: bool = matches!(T::DTYPE, DType::BF16);
    const MULTIPLIES_TILES: bool = Self::MULTIPLIES_BF16;

    #[inline(always)]
    fn run<I: Isa>(&self, _index: usize) {
        let (args, blocking, threads) = (self.args, self.blocking, self.threads);
        self.plan.get_or_init(|| {
            if const { I::HAS_TILES && Self::MULTIPLIES_TILES } {
                Plan::new::<T, MatrixTiles<I>>(args, blocking, threads)
            } else {
                Plan::new::<T, VectorTiles<I>>(args, blocking, threads)
            }
        });
    }
}

impl<T: SimdElement> Task for Prefill<'_, T> {
    const MULTIPLIES_BF16: bool = matches!(T::DTYPE, DType::BF16);
    const MULTIPLIES_TILES: bool = Self::MULTIPLIES_BF16;

    #[inline(always)]
    fn run<I: Isa>(&self, index: usize) {
        if const { I::HAS_TILES && Self::MULTIPLIES_TILES } {
            self.rows::<I, MatrixTiles<I>>(self.plan.tasks[index]);
        } else {
            self.rows::<I, VectorTiles<I>>(self.plan.tasks[index]);
        }
    }
}

impl<T: SimdElement> Prefill<'_, T> {
    #[inline(always)]
    fn rows<I: Isa, K: TileKernel<T>>(&self, task: RowTask) {
        let (args, buffers, block_k) = (self.args, &self.plan.buffers, self.plan.block_k);
        let shape = args.shape;
        let segment = args.segment(task.segment);
        let rows = task.first_row..task.first_row + task.rows;
        let panels = task.rows.div_ceil(K::PANEL);
        let seen = args.hull(&segment, task.kv_head, rows.clone());
        let slots = self.plan.slots.min(panels);
        let total = buffers.total(slots);
        let mut scratch = Scratch::take::<T::Acc>(total);
        let (packed_keys, scratch) = scratch.as_mut_slice()[..total].split_at_mut(buffers.keys);
        let (packed_values, scratch) = scratch.split_at_mut(buffers.values);
        let (scores, scratch) = scratch.split_at_mut(buffers.scores);
        let (factors, scratch) = scratch.split_at_mut(buffers.factors);
        let (lanes, state) = scratch.split_at_mut(2 * buffers.lanes);
        // Blocks begin at multiples of their length, whatever the task: how sums are grouped does not depend on it.
        let first = seen.start / block_k * block_k;
        let places = args.places(&segment);
        let mut keys = HeadRows { tensor: args.k, places, head: task.kv_head, first, count: 0 };
        let mut values = HeadRows { tensor: args.v, ..keys };
        let mut next = self.next_block(&segment, &task, first..seen.end);
        (keys, values) = (keys.moved(&next), values.moved(&next));
        for part in 0..panels {
            keys.prefetch(part, panels);
            values.prefetch(part, panels);
        }
        let hulls: Vec<Range<usize>> =
            (0..panels).map(|p| args.hull(&segment, task.kv_head, panel_rows::<T, K>(&task, p))).collect();
        while !next.is_empty() {
            K::pack_keys(&keys, shape.head_dim, packed_keys);
            let finite = K::pack_values(&values, shape.head_dim_v, packed_values);
            let block = next;
            next = self.next_block(&segment, &task, block.start + block_k..seen.end);
            (keys, values) = (keys.moved(&next), values.moved(&next));
            let sees = |hull: &Range<usize>| !hull.is_empty() && hull.start < block.end && block.start < hull.end;
            let at_work = hulls.iter().filter(|hull| sees(hull)).count();
            for (part, (p, hull)) in hulls.iter().enumerate().filter(|(_, hull)| sees(hull)).enumerate() {
                keys.prefetch(part, at_work);
                values.prefetch(part, at_work);
                let state = &mut state[p % slots * buffers.per_panel()..][..buffers.per_panel()];
                let mut panel = self.panel::<I, K>(state, (&segment, &task), p);
                // A panel is set up when it is first needed and written when it is done: between, it stays in the cache.
                if block.start <= hull.start {
                    panel.start();
                }
                if hull.end <= block.end {
                    panel.prefetch(self.out);
                }
                let cut = panel.cut(block.start, block.len());
                if !cut.is_empty() {
                    panel.attend((&cut, block.start), finite, (packed_keys, packed_values), (scores, factors), lanes);
                }
                if hull.end <= block.end {
                    panel.finish(self.out);
                }
            }
        }
        for (p, _) in hulls.iter().enumerate().filter(|(_, hull)| hull.is_empty()) {
            let mut panel = self.panel::<I, K>(&mut state[..buffers.per_panel()], (&segment, &task), p);
            panel.start();
            panel.finish(self.out);
        }
    }

    /// The first block of `keys`, which begin with one, of which some row of the task sees a key; empty if there is none.
    #[inline(always)]
    fn next_block(&self, segment: &Segment, task: &RowTask, keys: Range<usize>) -> Range<usize> {
        let block_k = self.plan.block_k;
        let mut first = keys.start;
        while first < keys.end {
            let block = first..keys.end.min(first + block_k);
            if self.args.mask.is_monotone() || self.is_seen(segment, task, &block) {
                return block;
            }
            first += block_k;
        }
        keys.end..keys.end
    }

    fn is_seen(&self, segment: &Segment, task: &RowTask, keys: &Range<usize>) -> bool {
        (task.first_row..task.first_row + task.rows)
            .any(|row| self.args.mask.intervals(&self.args.query(segment, task.kv_head, row), keys.clone()).next().is_some())
    }

    #[inline(always)]
    fn panel<'s, I: Isa, K: TileKernel<T>>(
        &'s self,
        state: &'s mut [T::Acc],
        (segment, task): (&'s Segment, &RowTask),
        p: usize,
    ) -> Panel<'s, T, I, K> {
        let rows = panel_rows::<T, K>(task, p);
        let lanes = Lanes { args: self.args, segment, kv_head: task.kv_head, first_row: rows.start, rows: rows.len() };
        Panel::new(lanes, &self.plan.buffers, state)
    }
}

/// Rows of a panel of a task.
#[inline(always)]
fn panel_rows<T: SimdElement, K: TileKernel<T>>(task: &RowTask, p: usize) -> Range<usize> {
    let first = task.first_row + p * K::PANEL;
    first..(first + K::PANEL).min(task.first_row + task.rows)
}
