//! Gradients of what takes part in many scores: biases, slopes, sinks.

use super::super::Blocking;
use super::chunk::Backward;
use super::plan::ChunkTask;
use super::{BackwardArgs, Wanted, Work, delta, plan_at, threads_for};
use crate::dtype::{Element, Float};
use crate::index::Query;
use crate::parallel::{RowTurns, RowWriter, for_each_tile};
use crate::simd::{Level, SimdElement};
use std::ops::Range;

/// Where the entries of a bias, or of slopes, lie: `[batches, heads, per_head]`.
#[derive(Debug, Clone, Copy)]
pub struct SumTable {
    /// 1, or the number of sequences.
    pub batches: usize,
    /// 1, or the number of query heads.
    pub heads: usize,
    /// Entries of a head.
    pub per_head: usize,
    /// The entry of the first query and key.
    pub origin: usize,
    /// Entries from one query to the next.
    pub token_stride: isize,
    /// Entries from one key to the next.
    pub key_stride: isize,
    /// Whether the entry is the factor of minus the distance of query and key.
    pub is_slope: bool,
}

impl SumTable {
    /// Slopes of those numbers of sequences and heads.
    pub fn slopes(batches: usize, heads: usize) -> Self {
        Self { batches, heads, per_head: 1, origin: 0, token_stride: 0, key_stride: 0, is_slope: true }
    }

    /// Number of entries.
    pub fn len(&self) -> usize {
        self.batches * self.heads * self.per_head
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Regions up to this are summed in double precision before they are rounded.
const WIDE_BYTES: usize = 1 << 20;

/// Sums the gradients of all scores that an entry takes part in, with up to `threads` threads. Results do not depend on how many.
///
/// Scores are computed once more, by as many tasks as the table has sequences and groups of heads.
pub fn score_sums<T: SimdElement>(
    args: &BackwardArgs<'_, T>,
    table: &SumTable,
    sums: &mut [T::Acc],
    level: Level,
    threads: usize,
    blocking: Blocking,
) {
    let shape = args.forward.shape;
    let heads = if table.heads == 1 { 1 } else { shape.num_kv_heads };
    let owners = table.batches * heads;
    if table.is_empty() || owners == 0 {
        return;
    }
    let region = table.len() / owners;
    let threads = threads_for(&args.forward, threads);
    let deltas = delta::deltas(args, level, threads);
    let wanted = Wanted { q: false, k: false, v: false };
    let plan = plan_at(level, &args.forward, wanted, blocking);
    let out = RowWriter::new(sums, [table.batches, 1, heads, region], [heads * region, 0, region]);
    let turns = RowTurns::new(&mut [], [0; 4], [0; 3], 0);
    let backward =
        Backward { args, deltas: &deltas, query_sums: &turns, k: None, v: None, wanted, table: Some(table), plan: &plan };
    let work = Work { backward, sums: Some(Sums { out: &out, heads, region }) };
    for_each_tile(level, threads, owners, &work);
}

/// Where sums go, each task's to a region of its own.
pub struct Sums<'a, A> {
    out: &'a RowWriter<'a, A>,
    /// 1, or the number of key/value heads.
    heads: usize,
    /// Entries of a task.
    region: usize,
}

impl<A: Float> Sums<'_, A> {
    /// The entries of a task; wide ones, if those are summed in double precision; and which chunks it visits.
    pub fn task<'s, T: SimdElement<Acc = A>>(
        &'s self,
        index: usize,
        backward: &'s Backward<'_, T>,
    ) -> (&'s mut [A], Vec<f64>, impl Iterator<Item = &'s ChunkTask>) {
        let (batch, head) = (index / self.heads, index % self.heads);
        let entries = self.out.row(batch, 0, head);
        entries.fill(A::ZERO);
        let wide = vec![0.0; if self.region * size_of::<f64>() <= WIDE_BYTES { self.region } else { 0 }];
        let table = backward.table;
        let chunks = backward.plan.tasks.iter().filter(move |task| {
            let own_batch =
                table.is_none_or(|table| table.batches == 1) || backward.args.forward.segment(task.segment).sequence == batch;
            own_batch && (self.heads == 1 || task.kv_head == head)
        });
        (entries, wide, chunks)
    }
}

impl SumTable {
    /// Adds the gradients of one query's scores: those of `keys`, counted from position `first`, `stride` apart.
    pub fn add<A: Float, B: Float>(
        &self,
        query: &Query<'_>,
        group: usize,
        (gradients, stride): (&[B], usize),
        (keys, first): (Range<usize>, usize),
        entries: &mut [A],
    ) {
        let [_, head, token] = query.at();
        let member = if self.heads == 1 { 0 } else { head % group };
        let origin = (member * self.per_head + self.origin) as isize + token as isize * self.token_stride;
        for j in keys {
            let position = (first + j) as isize;
            let factor = if self.is_slope { -(query.position().abs_diff(position) as f64) } else { 1.0 };
            let entry = &mut entries[(origin + position * self.key_stride) as usize];
            *entry = A::from_f64(entry.to_f64() + factor * gradients[j * stride].to_f64());
        }
    }
}

/// Sums the gradients of the sink of every query into `sums`, which lie as the sinks do.
pub fn sink_sums<T: Element>(args: &BackwardArgs<'_, T>, sums: &mut [f64]) {
    let Some(sinks) = args.forward.mods.sinks else { return };
    let forward = &args.forward;
    for segment in (0..forward.segment_count()).map(|index| forward.segment(index)) {
        for kv_head in 0..forward.shape.num_kv_heads {
            for row in 0..segment.q_len * forward.shape.group() {
                let query = forward.query(&segment, kv_head, row);
                let [batch, head, token] = query.at();
                let sink = sinks.get(batch, head, token);
                let state = args.row_state(&query);
                if sink != f64::NEG_INFINITY {
                    let place: usize = [batch, head, token].iter().zip(sinks.strides).map(|(i, stride)| i * stride).sum();
                    sums[place] -= (sink - state.lse).exp() * state.delta;
                }
            }
        }
    }
}
