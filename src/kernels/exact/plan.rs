//! How one call is cut into tasks, and a task's scratch into buffers.

use super::ExactArgs;
use crate::index::Segments;
use crate::math::tile::TileKernel;
use crate::simd::SimdElement;
use crate::workspace::padded;
use std::cmp::Reverse;

/// Rows of queries and keys that are worked on at a time. The defaults follow from the shape; tests force tiny ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Blocking {
    /// Rows of queries of one task, over all heads of a group.
    pub block_q: Option<usize>,
    /// Keys that are packed at a time.
    pub block_k: Option<usize>,
}

/// Scratch of one task stays below this: what is streamed once per block of keys may lie beyond L2, the packed block itself and
/// the panel at work fit, and a thread stays within its memory budget.
const SCRATCH_BYTES: usize = 1 << 20;
/// Scores of one panel and block stay below this, so that they are found in L1.
pub const SCORE_BYTES: usize = 18 * 1024;
/// Tasks that one thread's share of the last heads is cut into, to even out what differs between threads.
const FINE_TASKS_PER_THREAD: usize = 8;
/// Panels of a fine task: fewer would spend too much of their time on packing keys and values.
const FINE_PANELS: usize = 3;

/// A task: consecutive rows `(token, head of the group)` of one key/value head of a segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RowTask {
    /// The segment.
    pub segment: usize,
    /// The key/value head.
    pub kv_head: usize,
    /// First row.
    pub first_row: usize,
    /// Rows, never none.
    pub rows: usize,
}

/// The cut.
///
/// Every task packs the keys and values anew, so tasks are as large as the scratch allows; but the last heads are cut finely, so
/// that threads finish together.
#[derive(Debug)]
pub struct Plan {
    /// Keys of one block.
    pub block_k: usize,
    /// The buffers of a task.
    pub buffers: Buffers,
    /// Panels of a task that are at work at the same time, at most: so many have a place in the scratch, and take turns.
    pub slots: usize,
    /// The tasks, in the order in which they are handed out.
    pub tasks: Vec<RowTask>,
}

/// Lengths of a task's buffers, in accumulator elements; each starts on a cache line.
#[derive(Debug, Clone, Copy)]
pub struct Buffers {
    /// One packed panel of queries.
    pub queries: usize,
    /// The packed block of keys.
    pub keys: usize,
    /// The packed block of values.
    pub values: usize,
    /// The scores of one panel and block.
    pub scores: usize,
    /// What the weights of one panel and block are multiplied by, if some are dropped.
    pub factors: usize,
    /// The accumulator of one panel.
    pub acc: usize,
    /// A running value of one panel: maximum, sum.
    pub lanes: usize,
}

impl Buffers {
    fn new<T: SimdElement, K: TileKernel<T>>(args: &ExactArgs<'_, T>, block_k: usize) -> Self {
        let line = padded::<T::Acc>;
        let (head_dim, head_dim_v) = (args.shape.head_dim, args.shape.head_dim_v);
        let scores = line(block_k.next_multiple_of(K::KEY_STEP) * K::PANEL);
        Self {
            queries: line(K::queries_len(head_dim)),
            keys: line(K::keys_len(block_k, head_dim)),
            values: line(K::values_len(block_k, head_dim_v)),
            scores,
            factors: if args.mods.dropout.is_some() { scores } else { 0 },
            acc: line(K::acc_rows(head_dim_v) * K::PANEL),
            lanes: line(K::PANEL),
        }
    }

    /// Elements that each panel of a task keeps.
    pub fn per_panel(&self) -> usize {
        self.queries + self.acc + 2 * self.lanes
    }

    /// Elements of a task with that many panels: blocks and scores are shared.
    pub fn total(&self, panels: usize) -> usize {
        self.keys + self.values + self.scores + self.factors + 2 * self.lanes + panels * self.per_panel()
    }
}

impl Plan {
    /// Cuts a call. Tasks never change results; `block_k`, which groups the sums over keys, depends on the shape, the level and
    /// `blocking` alone.
    pub fn new<T: SimdElement, K: TileKernel<T>>(args: &ExactArgs<'_, T>, blocking: Blocking, threads: usize) -> Self {
        let shape = args.shape;
        let row_bytes = K::PANEL * size_of::<T::Acc>();
        let block_k = blocking
            .block_k
            .unwrap_or(SCORE_BYTES / row_bytes)
            .clamp(1, shape.seqlen_k.max(1))
            .next_multiple_of(K::KEY_STEP.max(K::DEPTH));
        let buffers = Buffers::new::<T, K>(args, block_k);
        let fitting = (SCRATCH_BYTES / size_of::<T::Acc>()).saturating_sub(buffers.total(0)) / buffers.per_panel();
        // Panels under a window are done before later ones begin: a task of any length has room for those in between.
        let at_work = args.mask.width().map(|width| {
            let tokens = width.saturating_add(block_k + K::PANEL);
            tokens.saturating_mul(shape.group()).div_ceil(K::PANEL) + 2
        });
        let (slots, most) = match at_work.filter(|&panels| panels <= fitting) {
            Some(panels) => (panels, usize::MAX),
            None => (usize::MAX, fitting.max(1) * K::PANEL),
        };
        let most = blocking.block_q.map_or(most, |block_q| block_q.next_multiple_of(K::PANEL));

        let rows_of = |segment: usize| args.segment(segment).q_len * shape.group();
        let mut order: Vec<usize> = (0..args.segment_count()).filter(|&segment| rows_of(segment) > 0).collect();
        if let Segments::List(list) = args.segments {
            // What is short comes last, so that little is left when threads finish.
            order
                .sort_by_key(|&segment| Reverse(list[segment].q_len.saturating_mul(list[segment].k_end - list[segment].k_start)));
        }
        let heads = order.len() * shape.num_kv_heads;
        let fine_heads = if threads > 1 { threads.min(heads) } else { 0 };
        let fine_tasks = (threads * FINE_TASKS_PER_THREAD).div_ceil(fine_heads.max(1));
        let mut tasks = Vec::new();
        let all_heads = order.iter().flat_map(|&segment| (0..shape.num_kv_heads).map(move |head| (segment, head)));
        for (index, (segment, kv_head)) in all_heads.enumerate() {
            let rows = rows_of(segment);
            let fewest = rows.div_ceil(most);
            let finest = rows.div_ceil(FINE_PANELS * K::PANEL).max(fewest);
            let wanted = if index < heads - fine_heads { fewest } else { fine_tasks.clamp(fewest, finest) };
            // About so many tasks, as even as panels allow. The last rows, which see the most keys under a causal mask, come first.
            let block_q = rows.div_ceil(K::PANEL).div_ceil(wanted) * K::PANEL;
            for first_row in (0..rows).step_by(block_q).rev() {
                tasks.push(RowTask { segment, kv_head, first_row, rows: block_q.min(rows - first_row) });
            }
        }
        Self { block_k, buffers, slots, tasks }
    }
}
