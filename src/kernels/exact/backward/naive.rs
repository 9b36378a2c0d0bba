//! The definition, query by query, kept for ever: every fast form is tested against it.

use super::super::naive::{Score, seen_scores};
use super::sums::SumTable;
use super::{BackwardArgs, Gradients, RowState, RowsMut};
use crate::dtype::{Element, Float};
use crate::index::Query;
use crate::kernels::score_mod::Normalizer;
use crate::parallel::RowWriter;

/// Computes all gradients in f64.
pub fn backward<T: Element>(args: &BackwardArgs<'_, T>, gradients: Gradients<'_, T>) {
    let shape = args.forward.shape;
    let mut dq = Rows::new([shape.batch, shape.seqlen_q, shape.num_heads, shape.head_dim]);
    let mut dk = Rows::new([shape.batch, shape.seqlen_k, shape.num_kv_heads, shape.head_dim]);
    let mut dv = Rows::new([shape.batch, shape.seqlen_k, shape.num_kv_heads, shape.head_dim_v]);
    let forward = &args.forward;
    for_each_score(args, |query, found| {
        let [batch, head, token] = query.at();
        let kv_head = head / shape.group();
        let (k_batch, k_token) = forward.places(query.segment).place(found.score.key);
        let (q, k) = (forward.q.row(batch, token, head), forward.k.row(k_batch, k_token, kv_head));
        dv.add([k_batch, k_token, kv_head], found.weight, args.d_out.row(batch, token, head));
        dq.add([batch, token, head], found.d_score * found.score.slope, k);
        dk.add([k_batch, k_token, kv_head], found.d_score * found.score.slope, q);
    });
    let q = gradients.q.map(|RowsMut { data, shape, strides }| RowWriter::new(data, shape, strides));
    for (rows, writer) in [(&dq, q.as_ref()), (&dk, gradients.k), (&dv, gradients.v)] {
        if let Some(writer) = writer {
            rows.write(writer);
        }
    }
}

/// A score, its weight, and its gradient.
pub struct ScoreGradient {
    /// The score.
    pub score: Score,
    /// What the value is multiplied by.
    pub weight: f64,
    /// The gradient of the modified score.
    pub d_score: f64,
}

/// Calls `visit` for every score that the mask shows.
pub fn for_each_score<T: Element>(args: &BackwardArgs<'_, T>, mut visit: impl FnMut(&Query<'_>, &ScoreGradient)) {
    let forward = &args.forward;
    let normalizer = forward.mods.normalizer;
    for segment in (0..forward.segment_count()).map(|index| forward.segment(index)) {
        for kv_head in 0..forward.shape.num_kv_heads {
            for row in 0..segment.q_len * forward.shape.group() {
                let query = forward.query(&segment, kv_head, row);
                let [batch, head, token] = query.at();
                let state = args.row_state(&query);
                let d_out = args.d_out.row(batch, token, head);
                for score in seen_scores(forward, &query, kv_head) {
                    let (k_batch, k_token) = forward.places(&segment).place(score.key);
                    let value = forward.v.row(k_batch, k_token, kv_head);
                    let kept = forward.mods.dropout.map_or(1.0, |dropout| dropout.factor(&query, score.key));
                    let d_weight: f64 = d_out.iter().zip(value).map(|(&g, &v)| g.to_acc().to_f64() * v.to_acc().to_f64()).sum();
                    let (weight, rate) = if normalizer == Normalizer::Softmax {
                        let weight = if state.lse == f64::NEG_INFINITY { 0.0 } else { (score.value - state.lse).exp() };
                        (weight, weight)
                    } else {
                        let share = RowState::share(state.lse, normalizer);
                        (normalizer.value(score.value) * share, normalizer.rate(score.value) * share)
                    };
                    let d_score = if rate == 0.0 { 0.0 } else { rate * (kept * d_weight - state.delta) };
                    visit(&query, &ScoreGradient { score, weight: kept * weight, d_score });
                }
            }
        }
    }
}

/// Sums the gradients of all scores that an entry takes part in.
pub fn score_sums<T: Element>(args: &BackwardArgs<'_, T>, table: &SumTable, sums: &mut [T::Acc]) {
    let mut wide = vec![0.0; sums.len()];
    for_each_score(args, |query, found| {
        let ([_, head, token], batch, key) = (query.at(), query.segment.sequence, found.score.key);
        let row = if table.batches == 1 { 0 } else { batch } * table.heads + if table.heads == 1 { 0 } else { head };
        let at = table.origin as isize + token as isize * table.token_stride + key as isize * table.key_stride;
        let factor = if table.is_slope { -(query.position().abs_diff(key as isize) as f64) } else { 1.0 };
        wide[row * table.per_head + at as usize] += factor * found.d_score;
    });
    for (sum, &x) in sums.iter_mut().zip(&wide) {
        *sum = T::Acc::from_f64(x);
    }
}

/// Sums by row of a `[B, S, H, D]` array.
struct Rows {
    shape: [usize; 4],
    data: Vec<f64>,
}

impl Rows {
    fn new(shape: [usize; 4]) -> Self {
        Self { shape, data: vec![0.0; shape.iter().product()] }
    }

    fn start(&self, [batch, token, head]: [usize; 3]) -> usize {
        let [_, tokens, heads, width] = self.shape;
        ((batch * tokens + token) * heads + head) * width
    }

    fn add<T: Element>(&mut self, at: [usize; 3], factor: f64, row: &[T]) {
        let start = self.start(at);
        for (sum, &x) in self.data[start..].iter_mut().zip(row) {
            *sum += factor * x.to_acc().to_f64();
        }
    }

    fn write<T: Element>(&self, writer: &RowWriter<'_, T>) {
        let [batches, tokens, heads, _] = self.shape;
        for batch in 0..batches {
            for token in 0..tokens {
                for head in 0..heads {
                    let start = self.start([batch, token, head]);
                    for (out, &x) in writer.row(batch, token, head).iter_mut().zip(&self.data[start..]) {
                        *out = T::from_acc(T::Acc::from_f64(x));
                    }
                }
            }
        }
    }
}
