//! How a backward call is cut into tasks, and a task's scratch into buffers.

use super::super::{Blocking, ExactArgs};
use super::Wanted;
use crate::index::{Segment, Segments};
use crate::kernels::exact::plan::SCORE_BYTES;
use crate::math::row_tile::RowKernel;
use crate::simd::SimdElement;
use crate::workspace::padded;
use std::cmp::Reverse;
use std::ops::Range;

/// Packed keys and values of a task, and the sums of their gradients, stay below this, so that they are found in L2 beside the panel
/// at work.
const CHUNK_BYTES: usize = 640 * 1024;
/// Calls are cut into about so many tasks, if that leaves each a block of keys.
const FEWEST_TASKS: usize = 32;

/// A task: a chunk of the keys of one key/value head of a segment. It visits the queries that see one of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChunkTask {
    /// The segment.
    pub segment: usize,
    /// The key/value head.
    pub kv_head: usize,
    /// Number of the chunk, counted from the key at position 0.
    pub chunk: usize,
}

/// The cut. It depends on the shape, the level and the blocking alone.
#[derive(Debug)]
pub struct Plan {
    /// Keys of one block.
    pub block_k: usize,
    /// Keys of a chunk, a multiple of `block_k`.
    pub chunk_k: usize,
    /// The buffers of a task.
    pub buffers: Buffers,
    /// The tasks, in the order in which they are handed out: the chunks of a head from the last to the first.
    pub tasks: Vec<ChunkTask>,
    /// Number of the first panel of each segment, all key/value heads counted.
    first_panel: Vec<usize>,
}

/// Lengths of a task's buffers, in accumulator elements; each starts on a cache line.
#[derive(Debug, Clone, Copy)]
pub struct Buffers {
    /// Keys of a chunk, as scores need them.
    pub keys: usize,
    /// Keys of a chunk as rows, if that is another layout.
    pub key_rows: usize,
    /// Values of a chunk.
    pub values: usize,
    /// Sums of the gradients of keys.
    pub key_sums: usize,
    /// Sums of the gradients of values.
    pub value_sums: usize,
    /// Queries of a panel, transposed.
    pub queries: usize,
    /// Gradients of the outputs of a panel, transposed.
    pub d_outs: usize,
    /// Queries of a panel as rows.
    pub query_rows: usize,
    /// Gradients of the outputs of a panel as rows.
    pub d_out_rows: usize,
    /// Sums of the gradients of the queries of a panel.
    pub query_sums: usize,
    /// A number for each query of a panel.
    pub lanes: usize,
    /// Scores of a panel and block.
    pub scores: usize,
    /// Derivatives of a soft-cap, if there is one.
    pub slopes: usize,
    /// What weights are multiplied by, if some are dropped.
    pub factors: usize,
    /// Weights of a panel and block along the queries, if scores are no operands.
    pub along_queries: usize,
    /// Gradients of scores along the keys, likewise.
    pub along_keys: usize,
}

impl Buffers {
    fn new<T: SimdElement, K: RowKernel<T>>(args: &ExactArgs<'_, T>, wanted: Wanted, chunk_k: usize, block_k: usize) -> Self {
        let line = padded::<T::Acc>;
        let (d, dv) = (args.shape.head_dim, args.shape.head_dim_v);
        let rows = |rows: usize, dim: usize| line((rows + K::ROW_STEP) * K::row_stride(dim));
        let only = |condition: bool, len: usize| if condition { len } else { 0 };
        let folds = K::FOLDS;
        let block_rows = block_k.next_multiple_of(K::KEY_STEP) + K::ROW_STEP;
        Self {
            keys: line(K::keys_len(chunk_k, d)),
            key_rows: only(folds && wanted.q, rows(K::packed_rows(chunk_k), d)),
            values: line(K::keys_len(chunk_k, dv)),
            key_sums: only(wanted.k, rows(chunk_k, d)),
            value_sums: only(wanted.v, rows(chunk_k, dv)),
            queries: line(K::queries_len(d)),
            d_outs: line(K::queries_len(dv)),
            query_rows: only(wanted.k, rows(K::packed_rows(K::PANEL), d)),
            d_out_rows: only(wanted.v, rows(K::packed_rows(K::PANEL), dv)),
            query_sums: only(wanted.q, rows(K::PANEL, d)),
            lanes: line(K::PANEL),
            scores: line(block_rows * K::PANEL),
            slopes: only(args.mods.softcap.is_some(), line(block_rows * K::PANEL)),
            factors: only(args.mods.dropout.is_some(), line(block_rows * K::PANEL)),
            along_queries: only(folds, line(block_rows * K::ALONG_QUERIES)),
            along_keys: only(folds && wanted.q, line(K::along_keys_len(block_rows))),
        }
    }

    /// Elements of a task.
    pub fn total(&self) -> usize {
        self.keys
            + self.key_rows
            + self.values
            + self.key_sums
            + self.value_sums
            + self.queries
            + self.d_outs
            + self.query_rows
            + self.d_out_rows
            + self.query_sums
            + 2 * self.lanes
            + 2 * self.scores
            + self.slopes
            + self.factors
            + 2 * self.along_queries
            + self.along_keys
    }
}

impl Plan {
    /// Cuts a call.
    pub fn new<T: SimdElement, K: RowKernel<T>>(args: &ExactArgs<'_, T>, wanted: Wanted, blocking: Blocking) -> Self {
        let shape = args.shape;
        let block_k = blocking
            .block_k
            .unwrap_or(SCORE_BYTES / (K::PANEL * size_of::<T::Acc>()))
            .clamp(1, shape.seqlen_k.max(1))
            .next_multiple_of(K::KEY_STEP.max(K::DEPTH));
        let of_block = Buffers::new::<T, K>(args, wanted, block_k, block_k);
        let block_bytes =
            size_of::<T::Acc>() * (of_block.keys + of_block.key_rows + of_block.values + of_block.key_sums + of_block.value_sums);
        let keys_of = |segment: usize| {
            let segment = args.segment(segment);
            segment.k_start..segment.k_end
        };
        let all_blocks: usize = (0..args.segment_count()).map(|segment| keys_of(segment).len().div_ceil(block_k)).sum();
        let fitting = CHUNK_BYTES / block_bytes.max(1);
        let blocks = if blocking.block_k.is_some() { 2 } else { fitting.min(all_blocks * shape.num_kv_heads / FEWEST_TASKS) };
        let chunk_k = block_k * blocks.max(1);

        let panels_of = |segment: usize| (args.segment(segment).q_len * shape.group()).div_ceil(K::PANEL);
        let mut first_panel = Vec::with_capacity(args.segment_count());
        let mut panels = 0;
        for segment in 0..args.segment_count() {
            first_panel.push(panels);
            panels += panels_of(segment) * shape.num_kv_heads;
        }
        first_panel.push(panels);

        let mut order: Vec<usize> = (0..args.segment_count()).collect();
        if let Segments::List(list) = args.segments {
            // What is short comes last, so that little is left when threads finish.
            order.sort_by_key(|&segment| Reverse(list[segment].q_len.saturating_mul(keys_of(segment).len())));
        }
        let mut tasks = Vec::new();
        for &segment in &order {
            let chunks = chunks_of(&keys_of(segment), chunk_k);
            for kv_head in 0..shape.num_kv_heads {
                // Under a causal mask the first queries see the first chunks only: in this order, a task finds the turns that it
                // waits for taken.
                tasks.extend(chunks.clone().rev().map(|chunk| ChunkTask { segment, kv_head, chunk }));
            }
        }
        Self { block_k, chunk_k, buffers: Buffers::new::<T, K>(args, wanted, chunk_k, block_k), tasks, first_panel }
    }

    /// Positions of the keys of a task.
    pub fn positions(&self, task: &ChunkTask, segment: &Segment) -> Range<usize> {
        let first = task.chunk * self.chunk_k;
        first.max(segment.k_start)..(first + self.chunk_k).min(segment.k_end)
    }

    /// Number of panels of all segments and key/value heads.
    pub fn panels(&self) -> usize {
        self.first_panel.last().copied().unwrap_or(0)
    }

    /// The number of panel `panel` of the `count` panels of a key/value head of a segment.
    pub fn place(&self, task: &ChunkTask, panel: usize, count: usize) -> usize {
        self.first_panel[task.segment] + task.kv_head * count + panel
    }

    /// How many turns at the sums of queries that see `keys` are taken before a chunk's; `None` if it takes none.
    pub fn turns_before(&self, keys: &Range<usize>, chunk: usize) -> Option<usize> {
        let chunks = chunks_of(keys, self.chunk_k);
        chunks.contains(&chunk).then(|| chunks.end - 1 - chunk)
    }
}

/// The chunks in which keys lie.
fn chunks_of(keys: &Range<usize>, chunk_k: usize) -> Range<usize> {
    if keys.is_empty() { 0..0 } else { keys.start / chunk_k..keys.end.div_ceil(chunk_k) }
}
