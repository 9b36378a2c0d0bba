//! The definition, query by query, kept for ever: every fast form is tested against it.

use super::{ExactArgs, ExactOut};
use crate::dtype::{Element, Float};
use crate::index::Query;
use crate::kernels::score_mod::{Emphasis, Normalizer};

/// Computes each row's scores, their weights, and the weighted sum of the values it sees, all in f64.
pub fn forward<T: Element>(args: &ExactArgs<'_, T>, out: &ExactOut<'_, T>) {
    for segment in (0..args.segment_count()).map(|index| args.segment(index)) {
        for kv_head in 0..args.shape.num_kv_heads {
            for row in 0..segment.q_len * args.shape.group() {
                attend(args, &args.query(&segment, kv_head, row), kv_head, out);
            }
        }
    }
}

/// A score that the mask shows.
pub struct Score {
    /// Position of the key.
    pub key: usize,
    /// The score, modified.
    pub value: f64,
    /// Its derivative with respect to the product of query and key.
    pub slope: f64,
}

/// The scores of a query with the keys that it sees.
pub fn seen_scores<T: Element>(args: &ExactArgs<'_, T>, query: &Query<'_>, kv_head: usize) -> Vec<Score> {
    let at @ [batch, head, token] = query.at();
    let places = args.places(query.segment);
    let q = args.q.row(batch, token, head);
    let scale = args.scale(query);
    let mut seen = Vec::new();
    for j in args.mask.intervals(query, 0..usize::MAX).flatten() {
        let (k_batch, k_token) = places.place(j);
        let dot: f64 =
            q.iter().zip(args.k.row(k_batch, k_token, kv_head)).map(|(&x, &y)| x.to_acc().to_f64() * y.to_acc().to_f64()).sum();
        let mut score = Score { key: j, value: scale * dot, slope: scale };
        if let Some(cap) = args.mods.softcap {
            let capped = (score.value / cap).tanh();
            (score.value, score.slope) = (cap * capped, scale * (1.0 - capped * capped));
        }
        score.value -= args.alibi_slope(query) * query.position().abs_diff(j as isize) as f64;
        let mut hidden = false;
        for bias in &args.biases {
            let mut value = [T::Acc::ZERO];
            bias.read(at, j, &mut value);
            hidden |= value[0] == T::Acc::NEG_INFINITY;
            score.value += value[0].to_f64();
        }
        if !hidden {
            seen.push(score);
        }
    }
    seen
}

fn attend<T: Element>(args: &ExactArgs<'_, T>, query: &Query<'_>, kv_head: usize, out: &ExactOut<'_, T>) {
    let [batch, head, token] = query.at();
    let places = args.places(query.segment);
    let seen = seen_scores(args, query, kv_head);
    let normalizer = args.mods.normalizer;
    let sink = args.mods.sinks.map_or(f64::NEG_INFINITY, |sinks| sinks.get(batch, head, token));
    let m = seen.iter().map(|score| score.value).fold(sink, f64::max);
    let base = if normalizer == Normalizer::Softmax && m != f64::NEG_INFINITY { m } else { 0.0 };
    let weight = |score: f64| match normalizer {
        Normalizer::Softmax => (score - base).exp(),
        other => other.value(score),
    };
    let mut weights: Vec<f64> = seen.iter().map(|score| weight(score.value)).collect();
    if let Some(reweighting) = args.mods.reweighting {
        let keys = args.mask.count(query);
        let emphasis = Emphasis::new(reweighting.power, Emphasis::gain(keys, weights.iter().sum()), keys);
        for weight in &mut weights {
            *weight = emphasis.weigh(*weight);
        }
    }
    let total = weights.iter().sum::<f64>() + (sink - base).exp();
    let shrink = match (normalizer.divides(), total) {
        (false, _) => 1.0,
        (true, 0.0) => 0.0,
        (true, total) => 1.0 / total,
    };
    for (d, out) in out.out.row(batch, token, head).iter_mut().enumerate() {
        let value = |j: usize| {
            let (batch, token) = places.place(j);
            args.v.row(batch, token, kv_head)[d].to_acc().to_f64()
        };
        let kept = |key: usize| args.mods.dropout.map_or(1.0, |dropout| dropout.factor(query, key));
        let sum: f64 = seen.iter().zip(&weights).map(|(score, weight)| weight * kept(score.key) * value(score.key)).sum();
        *out = T::from_acc(T::Acc::from_f64(sum * shrink));
    }
    if let Some(lse) = &out.lse {
        lse.row(batch, token, head)[0] = T::Acc::from_f64(base + total.ln());
    }
}
