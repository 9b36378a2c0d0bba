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

/// Scratch of one task stays below this: what is streamed once per block of keys may lie beyond L2, the packed block itself and
/// the panel at work fit, and a thread stays within its memory budget.
const SCRATCH_BYTES: usize = 1 << 20;
/// Scores of one panel and block stay below this, so that they are found in L1.
const SCORE_BYTES: usize = 18 * 1024;
/// Tasks that one thread's share of the last heads is cut into, to even out what differs between threads.
const FINE_TASKS_PER_THREAD: usize = 8;
/// Panels of a fine task: fewer would spend too much of their time on packing keys and values.
const FINE_PANELS: usize = 3;

/// A run of key/value heads whose rows are cut alike.
#[derive(Debug, Clone, Copy)]
struct Cutting {
    heads: usize,
    /// Rows of one task, a multiple of the panel.
    block_q: usize,
    /// Tasks of one head.
    row_blocks: usize,
}

impl Cutting {
    /// Cuts heads of `rows` rows into about `row_blocks` tasks each, as even as panels allow.
    fn new(heads: usize, rows: usize, row_blocks: usize, panel: usize) -> Self {
        let panels = rows.div_ceil(panel);
        let block_q = panels.div_ceil(row_blocks.clamp(1, panels.max(1))).max(1) * panel;
        Self { heads, block_q, row_blocks: rows.div_ceil(block_q) }
    }

    fn tasks(&self) -> usize {
        self.heads * self.row_blocks
    }
}

/// The cut.
///
/// Every task packs the keys and values anew, so tasks are as large as the scratch allows; but the last heads are cut finely, so
/// that threads finish together.
#[derive(Debug, Clone, Copy)]
pub struct Plan {
    /// Query rows of one key/value head: `(token, head of the group)`, token by token.
    rows: usize,
    /// Keys of one block.
    pub block_k: usize,
    coarse: Cutting,
    fine: Cutting,
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
    /// Cuts a call. Tasks never change results; `block_k`, which groups the sums over keys, depends on the shape, the level and
    /// `blocking` alone.
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
        let most = blocking.block_q.map_or(fitting.max(1) * K::PANEL, |block_q| block_q.next_multiple_of(K::PANEL));
        let fine_heads = if threads > 1 { threads.min(heads) } else { 0 };
        let fine_tasks = (threads * FINE_TASKS_PER_THREAD).div_ceil(fine_heads.max(1));
        let fewest = rows.div_ceil(most);
        let finest = rows.div_ceil(FINE_PANELS * K::PANEL).max(fewest);
        let plan = Self {
            rows,
            block_k,
            coarse: Cutting::new(heads - fine_heads, rows, fewest, K::PANEL),
            fine: Cutting::new(fine_heads, rows, fine_tasks.clamp(fewest, finest), K::PANEL),
            kv_heads: shape.num_kv_heads,
        };
        (plan, buffers)
    }

    /// Number of tasks of the call.
    pub fn tasks(&self) -> usize {
        self.coarse.tasks() + self.fine.tasks()
    }

    /// `(batch, key/value head, first row, rows)` of a task. Tasks of a head follow each other, so that its keys and values stay
    /// in the cache; the last rows, which see the most keys under a causal mask, come first, so that what is left at the end is
    /// short.
    pub fn task(&self, index: usize) -> (usize, usize, usize, usize) {
        let (cutting, first_head, index) = match index.checked_sub(self.coarse.tasks()) {
            None => (&self.coarse, 0, index),
            Some(index) => (&self.fine, self.coarse.heads, index),
        };
        let head = first_head + index / cutting.row_blocks;
        let first = (cutting.row_blocks - 1 - index % cutting.row_blocks) * cutting.block_q;
        (head / self.kv_heads, head % self.kv_heads, first, cutting.block_q.min(self.rows - first))
    }
}
