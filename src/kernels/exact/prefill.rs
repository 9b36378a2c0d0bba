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
//! 1. Blocks beyond a panel's last visible key are never computed, and at the diagonal each vector of a panel stops at its own
//!    last key.
//! 2. Mask code runs on blocks that a mask cuts, nowhere else.
//! 3. The scale enters with the exponential, where it costs nothing; scores are in base 2.

use super::panel::{Cut, Panel};
use super::plan::{Buffers, Plan};
use super::{Blocking, ExactArgs, ExactOut};
use crate::math::tile::{HeadRows, TileKernel, VectorTiles};
use crate::parallel::for_each_tile;
use crate::simd::{Isa, Level, SimdElement, Task};
use crate::workspace::Scratch;

/// Calls of fewer floating-point operations than this are over before another thread would start.
const SERIAL_FLOPS: usize = 1 << 21;

struct Prefill<'a, T: SimdElement> {
    args: &'a ExactArgs<'a, T>,
    out: &'a ExactOut<'a, T>,
    blocking: Blocking,
    threads: usize,
}

/// Computes `out` with up to `threads` threads. Results do not depend on how many.
pub fn forward<T: SimdElement>(args: &ExactArgs<'_, T>, out: &ExactOut<'_, T>, level: Level, threads: usize, blocking: Blocking) {
    let shape = args.shape;
    let flops = (shape.batch * shape.num_heads * shape.seqlen_q)
        .saturating_mul(shape.seqlen_k)
        .saturating_mul(2 * (shape.head_dim + shape.head_dim_v));
    let threads = if flops < SERIAL_FLOPS { 1 } else { threads };
    let prefill = Prefill { args, out, blocking, threads };
    let count = std::sync::OnceLock::new();
    level.run(&CountTasks { prefill: &prefill, count: &count }, 0);
    for_each_tile(level, threads, count.into_inner().unwrap_or(0), &prefill);
}

/// Panels differ between instruction sets, and with them the number of tasks.
struct CountTasks<'a, T: SimdElement> {
    prefill: &'a Prefill<'a, T>,
    count: &'a std::sync::OnceLock<usize>,
}

impl<T: SimdElement> Task for CountTasks<'_, T> {
    #[inline(always)]
    fn run<I: Isa>(&self, _index: usize) {
        self.count.get_or_init(|| self.prefill.plan::<VectorTiles<I>>().0.tasks());
    }
}

impl<T: SimdElement> Task for Prefill<'_, T> {
    #[inline(always)]
    fn run<I: Isa>(&self, index: usize) {
        self.rows::<I, VectorTiles<I>>(index);
    }
}

impl<T: SimdElement> Prefill<'_, T> {
    fn plan<K: TileKernel<T>>(&self) -> (Plan, Buffers) {
        Plan::new::<T, K>(self.args, self.blocking, self.threads)
    }

    #[inline(always)]
    fn rows<I: Isa, K: TileKernel<T>>(&self, index: usize) {
        let (plan, buffers) = self.plan::<K>();
        let (batch, kv_head, first_row, rows) = plan.task(index);
        let shape = self.args.shape;
        let group = shape.group();
        let panels = rows.div_ceil(K::PANEL);
        let last_token = (first_row + rows - 1) / group;
        let key_end = self.args.mask.key_limit(last_token, shape.seqlen_k);
        let total = buffers.total(panels);
        let mut scratch = Scratch::take::<T::Acc>(total);
        let (packed_keys, scratch) = scratch.as_mut_slice()[..total].split_at_mut(buffers.keys);
        let (packed_values, scratch) = scratch.split_at_mut(buffers.values);
        let (scores, scratch) = scratch.split_at_mut(buffers.scores);
        let (lanes, state) = scratch.split_at_mut(3 * buffers.lanes);
        let first = 0;
        let count = plan.block_k.min(key_end);
        let mut keys = HeadRows { tensor: self.args.k, batch, head: kv_head, first, count };
        let mut values = HeadRows { tensor: self.args.v, batch, head: kv_head, first, count };
        for (p, state) in state.chunks_exact_mut(buffers.per_panel()).enumerate() {
            keys.prefetch(p, panels);
            values.prefetch(p, panels);
            self.panel::<I, K>(&buffers, state, (batch, kv_head), first_row, rows, p).start();
        }
        while keys.count > 0 {
            K::pack_keys(&keys, shape.head_dim, packed_keys);
            let finite = K::pack_values(&values, shape.head_dim_v, packed_values);
            let (first_key, count) = (keys.first, keys.count);
            (keys, values) = (keys.following(key_end), values.following(key_end));
            for (p, state) in state.chunks_exact_mut(buffers.per_panel()).enumerate() {
                keys.prefetch(p, panels);
                values.prefetch(p, panels);
                let mut panel = self.panel::<I, K>(&buffers, state, (batch, kv_head), first_row, rows, p);
                let cut = Cut::new(&panel, first_key, count);
                if cut.is_empty() {
                    continue;
                }
                panel.attend(&cut, finite, (packed_keys, packed_values), scores, lanes);
            }
        }
        for (p, state) in state.chunks_exact_mut(buffers.per_panel()).enumerate() {
            self.panel::<I, K>(&buffers, state, (batch, kv_head), first_row, rows, p).finish(self.out);
        }
    }

    #[inline(always)]
    fn panel<'s, I: Isa, K: TileKernel<T>>(
        &'s self,
        buffers: &Buffers,
        state: &'s mut [T::Acc],
        (batch, kv_head): (usize, usize),
        first_row: usize,
        rows: usize,
        p: usize,
    ) -> Panel<'s, T, I, K> {
        let first = first_row + p * K::PANEL;
        Panel::new(self.args, buffers, state, (batch, kv_head), first, K::PANEL.min(rows - p * K::PANEL))
    }
}
