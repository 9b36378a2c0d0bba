//! Gradients of what takes part in many scores: biases, slopes, sinks.

use super::BackwardArgs;
use super::naive::for_each_score;
use crate::dtype::{Element, Float};

/// Where the entries of a bias, or of slopes, lie: `[batches, heads, per_head]`.
#[derive(Debug, Clone, Copy)]
pub struct SumTable {
    /// 1, or the batch size.
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
    /// Number of entries.
    pub fn len(&self) -> usize {
        self.batches * self.heads * self.per_head
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Sums the gradients of all scores that an entry takes part in.
pub fn score_sums<T: Element>(args: &BackwardArgs<'_, T>, table: &SumTable, sums: &mut [T::Acc]) {
    let mut wide = vec![0.0; sums.len()];
    for_each_score(args, |query, found| {
        let ([batch, head, token], key) = (query.at(), found.score.key);
        let row = if table.batches == 1 { 0 } else { batch } * table.heads + if table.heads == 1 { 0 } else { head };
        let at = table.origin as isize + token as isize * table.token_stride + key as isize * table.key_stride;
        let factor = if table.is_slope { -(query.position().abs_diff(key as isize) as f64) } else { 1.0 };
        wide[row * table.per_head + at as usize] += factor * found.d_score;
    });
    for (sum, &x) in sums.iter_mut().zip(&wide) {
        *sum = T::Acc::from_f64(x);
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
                if sink != f64::NEG_INFINITY {
                    let state = args.row_state(&query);
                    let place: usize = [batch, head, token].iter().zip(sinks.strides).map(|(i, stride)| i * stride).sum();
                    sums[place] -= (sink - state.lse).exp() * state.delta;
                }
            }
        }
    }
}
