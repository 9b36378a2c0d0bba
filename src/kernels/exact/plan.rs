//! How one call is cut into tasks, and a task's scratch into buffers.

use super::ExactArgs;
use crate::math::tile::TileKernel;
use crate::simd::SimdElement;
use crate::workspace::padded;

/// Rows of queries and keys that are worked on at a time. The defaults follow from the shape; tests force tiny ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Blocking {
    /// Rows of queries of one task, over all heads of a group.
    pub block_q: Option<usize>,
    /// Keys that are packed at a time.
    pub block_k: Option<usize>,
}

/// Scratch of one task stays below this, so that it is found in L2 and threads stay within their memory budget.
const SCRATCH_BYTES: usize = 448 * 1024;
/// Scores of one panel and block stay below this, so that they are found in L1.
const SCORE_BYTES: usize = 18 * 1024;
/// Tasks per thread that even out what differs between them.
const TASKS_PER_THREAD: usize = 6;

/// The cut.
#[derive(Debug, Clone, Copy)]
pub struct Plan {
    /// Query rows of one key/value head: `(token, head of the group)`, token by token.
    pub rows: usize,
    /// Rows of one task, a multiple of the panel.
    pub block_q: usize,
    /// Keys of one block.
    pub block_k: usize,
    /// Row blocks of one key/value head.
    pub row_blocks: usize,
    /// Tasks of the call.
    pub tasks: usize,
    heads: usize,
    kv_heads: usize,
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
    /// The accumulator of one panel.
    pub acc: usize,
    /// A running value of one panel: maximum, sum.
    pub lanes: usize,
}

impl Buffers {
    fn new<T: SimdElement, K: TileKernel<T>>(head_dim: usize, head_dim_v: usize, block_k: usize) -> Self {
        let line = padded::<T::Acc>;
        Self {
            queries: line(K::queries_len(head_dim)),
            keys: line(K::keys_len(block_k, head_dim)),
            values: line(K::values_len(block_k, head_dim_v)),
            scores: line(block_k.next_multiple_of(K::KEY_STEP) * K::PANEL),
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
        self.keys + self.values + self.scores + 3 * self.lanes + panels * self.per_panel()
    }
}

impl Plan {
    /// Cuts a call. Block sizes never change results, except that `block_k` groups the sums over keys: it depends on the shape,
    /// the level and `blocking` alone.
    pub fn new<T: SimdElement, K: TileKernel<T>>(args: &ExactArgs<'_, T>, blocking: Blocking, threads: usize) -> (Self, Buffers) {
        let shape = args.shape;
        let row_bytes = K::PANEL * size_of::<T::Acc>();
        let block_k = blocking
            .block_k
            .unwrap_or(SCORE_BYTES / row_bytes)
            .clamp(1, shape.seqlen_k.max(1))
            .next_multiple_of(K::KEY_STEP.max(K::DEPTH));
        let buffers = Buffers::new::<T, K>(shape.head_dim, shape.head_dim_v, block_k);

        let rows = shape.seqlen_q * shape.group();
        let heads = shape.batch * shape.num_kv_heads;
        let fitting = (SCRATCH_BYTES / size_of::<T::Acc>()).saturating_sub(buffers.total(0)) / buffers.per_panel();
        // Fewer rows make more tasks, which even out better, but every task packs the keys anew.
        let enough_tasks = (rows * heads).div_ceil(threads * TASKS_PER_THREAD).div_ceil(K::PANEL);
        let panels = match blocking.block_q {
            Some(block_q) => block_q.div_ceil(K::PANEL),
            None if threads > 1 => fitting.min(enough_tasks.max(2)),
            None => fitting,
        };
        let block_q = panels.clamp(1, rows.div_ceil(K::PANEL).max(1)) * K::PANEL;
        let row_blocks = rows.div_ceil(block_q);
        let plan = Self { rows, block_q, block_k, row_blocks, tasks: row_blocks * heads, heads, kv_heads: shape.num_kv_heads };
        (plan, buffers)
    }

    /// `(batch, key/value head, first row, rows)` of a task. The last rows, which see the most keys under a causal mask, come
    /// first, so that what is left at the end is short.
    pub fn task(&self, index: usize) -> (usize, usize, usize, usize) {
        let first = (self.row_blocks - 1 - index / self.heads) * self.block_q;
        let head = index % self.heads;
        (head / self.kv_heads, head % self.kv_heads, first, self.block_q.min(self.rows - first))
    }
}
