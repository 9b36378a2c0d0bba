//! Exact attention: `out = softmax(scale * q k^T + bias) v` over the keys that the mask shows, and what is made of that: other score
//! functions, other normalisers.

pub mod backward;
mod cut;
pub mod decode;
mod lanes;
pub mod merge;
pub mod naive;
mod panel;
mod plan;
pub mod prefill;
mod reweighted;
pub mod second;
mod splits;

pub use plan::Blocking;

use super::bias::Bias;
use super::mask::Mask;
use super::score_mod::{Emphasis, Normalizer, Reweighting, ScoreMod};
use crate::dtype::{Element, Float};
use crate::index::{KeyPlaces, Pages, Query, Segment, Segments};
use crate::math::online_softmax::log_sum_exp;
use crate::parallel::RowWriter;
use crate::simd::{Level, SimdElement};
use crate::tensor::{AttnShape, Tensor};
use std::ops::Range;

/// What is attended, and how.
#[derive(Debug, Clone, Copy)]
pub struct ExactArgs<'a, T: Element> {
    /// The sizes, checked. With segments, those of `q`, and the most keys of a segment.
    pub shape: AttnShape,
    /// `[B, Sq, H, D]`.
    pub q: Tensor<'a, T>,
    /// `[B, Sk, Hkv, D]`.
    pub k: Tensor<'a, T>,
    /// `[B, Sk, Hkv, Dv]`.
    pub v: Tensor<'a, T>,
    /// Which queries and keys belong together.
    pub segments: Segments<'a>,
    /// Where keys and values lie, if not row after row.
    pub pages: Option<&'a Pages>,
    /// Which keys are seen.
    pub mask: Mask<'a>,
    /// What is added to scores.
    pub biases: [Bias<'a, T>; 2],
    /// What else changes scores.
    pub mods: ScoreMod<'a>,
}

impl<'a, T: Element> ExactArgs<'a, T> {
    /// Number of segments.
    pub fn segment_count(&self) -> usize {
        match self.segments {
            Segments::Whole { .. } => self.shape.batch,
            Segments::List(list) => list.len(),
        }
    }

    /// Segment `index`.
    #[inline(always)]
    pub fn segment(&self, index: usize) -> Segment {
        match self.segments {
            Segments::Whole { offset } => Segment {
                sequence: index,
                q_batch: index,
                q_first: 0,
                q_len: self.shape.seqlen_q,
                k_batch: index,
                k_first: 0,
                k_start: 0,
                k_end: self.shape.seqlen_k,
                offset,
            },
            Segments::List(list) => list[index],
        }
    }

    /// Where the keys of a segment lie.
    #[inline(always)]
    pub fn places(&self, segment: &Segment) -> KeyPlaces<'a> {
        KeyPlaces { pages: self.pages, batch: segment.k_batch, first: segment.k_first }
    }

    /// Query `row`, of the rows `(token, head of the group)` of a key/value head of a segment.
    #[inline(always)]
    pub fn query<'s>(&self, segment: &'s Segment, kv_head: usize, row: usize) -> Query<'s> {
        let group = self.shape.group();
        // Divisions are slow, and rows are looked up often.
        let (token, member) = if group == 1 { (row, 0) } else { (row / group, row % group) };
        Query { segment, token, head: kv_head * group + member }
    }

    /// From the first to the last key that some of the rows sees.
    pub fn hull(&self, segment: &Segment, kv_head: usize, rows: Range<usize>) -> Range<usize> {
        let hull = |row: usize| self.mask.hull(&self.query(segment, kv_head, row));
        if rows.is_empty() {
            return 0..0;
        }
        if self.mask.is_monotone() {
            let (start, end) = (hull(rows.start).start, hull(rows.end - 1).end);
            return start..end.max(start);
        }
        let seen = rows.map(hull).filter(|hull| !hull.is_empty());
        seen.reduce(|a, b| a.start.min(b.start)..a.end.max(b.end)).unwrap_or(0..0)
    }

    /// The factor of the scores of a query.
    #[inline(always)]
    pub fn scale(&self, query: &Query<'_>) -> f64 {
        let scale = &self.mods.scale;
        let [batch, head, token] = query.at();
        let row = scale.rows.map_or(1.0, |rows| rows.get(batch, head, token));
        let length = scale.by_length.map_or(1.0, |factors| factors[self.mask.count(query)]);
        scale.factor * row * length
    }

    /// The second weighing of a query's weights, if there is one and the first is done.
    #[inline(always)]
    pub fn emphasis(&self, query: &Query<'_>) -> Option<Emphasis> {
        let Reweighting { power, gains } = self.mods.reweighting?;
        let [batch, head, token] = query.at();
        Some(Emphasis::new(power, gains?.get(batch, head, token), self.mask.count(query)))
    }

    /// The slope by which a query's scores fall with the distance; 0 for none.
    #[inline(always)]
    pub fn alibi_slope(&self, query: &Query<'_>) -> f64 {
        self.mods.alibi_slopes.map_or(0.0, |slopes| slopes.get(query.segment.sequence, query.head, query.token))
    }

    /// Whether scores are changed by more than a factor that all share, or are no exponents.
    #[inline(always)]
    pub fn modifies_scores(&self) -> bool {
        let mods = &self.mods;
        !(mods.scale.is_uniform()
            && mods.softcap.is_none()
            && mods.alibi_slopes.is_none()
            && mods.normalizer == Normalizer::Softmax
            && self.biases.iter().all(Bias::is_none))
    }

    /// What one unit of score is in the running softmax: scores are in base 2 where they are exponents.
    #[inline(always)]
    pub fn unit(&self) -> f64 {
        if self.mods.normalizer == Normalizer::Softmax { std::f64::consts::LOG2_E } else { 1.0 }
    }

    /// What a query's accumulator is multiplied by, and its log-sum-exp, from the running maximum and sum.
    #[inline(always)]
    pub fn close(&self, query: &Query<'_>, m: T::Acc, l: T::Acc) -> (T::Acc, T::Acc) {
        let from = T::Acc::from_f64;
        if !self.mods.normalizer.is_exponential() {
            let l = l.to_f64();
            if self.mods.reweighting.is_some_and(|reweighting| reweighting.gains.is_none()) {
                // Its sum is all that the first weighing is for.
                return (T::Acc::ZERO, from(Emphasis::gain(self.mask.count(query), l)));
            }
            let factor = if !self.mods.normalizer.divides() {
                1.0
            } else if l == 0.0 {
                0.0
            } else {
                1.0 / l
            };
            return (from(factor), from(l.ln()));
        }
        let Some(sinks) = self.mods.sinks else {
            // No visible key: the accumulator is 0 and stays 0.
            let factor = if l == T::Acc::ZERO { l } else { from(1.0 / l.to_f64()) };
            return (factor, log_sum_exp(m, l));
        };
        let [batch, head, token] = query.at();
        let sink = sinks.get(batch, head, token);
        if m == T::Acc::NEG_INFINITY {
            return (T::Acc::ZERO, from(sink));
        }
        let sink = sink * std::f64::consts::LOG2_E;
        let base = sink.max(m.to_f64());
        let shrink = (m.to_f64() - base).exp2();
        let total = l.to_f64() * shrink + (sink - base).exp2();
        (from(shrink / total), from((base + total.log2()) * std::f64::consts::LN_2))
    }
}

/// Up to this many query rows of a key/value head are always decoded: a panel of the prefill would be mostly empty.
const FEW_ROWS: usize = 8;
/// From this many keys on, splitting them over threads pays for more rows.
const LONG_KEYS: usize = 512;

fn suits_decode<T: Element>(args: &ExactArgs<'_, T>, segment: &Segment) -> bool {
    let rows = segment.q_len * args.shape.group();
    if args.mods.dropout.is_some() {
        return false;
    }
    rows <= FEW_ROWS || (rows <= splits::MAX_ROWS && args.hull(segment, 0, 0..rows).len() >= LONG_KEYS)
}

/// Computes `out` by the form that suits each segment, with up to `threads` threads. Results do not depend on how many.
///
/// Queries that are in no segment see no key.
pub fn forward<T: SimdElement>(args: &ExactArgs<'_, T>, out: &ExactOut<'_, T>, level: Level, threads: usize, blocking: Blocking) {
    match args.mods.reweighting {
        Some(Reweighting { gains: None, power }) => reweighted::forward(args, power, out, level, threads, blocking),
        _ => weigh(args, out, level, threads, blocking),
    }
}

fn weigh<T: SimdElement>(args: &ExactArgs<'_, T>, out: &ExactOut<'_, T>, level: Level, threads: usize, blocking: Blocking) {
    match args.segments {
        Segments::Whole { .. } => {
            if args.shape.batch > 0 && suits_decode(args, &args.segment(0)) {
                decode::forward(args, out, level, threads, None);
            } else {
                prefill::forward(args, out, level, threads, blocking);
            }
        }
        Segments::List(list) => {
            fill_uncovered(args, list, out);
            let (few, many): (Vec<Segment>, Vec<Segment>) = list.iter().partition(|segment| suits_decode(args, segment));
            if !few.is_empty() {
                decode::forward(&ExactArgs { segments: Segments::List(&few), ..*args }, out, level, threads, None);
            }
            if !many.is_empty() {
                prefill::forward(&ExactArgs { segments: Segments::List(&many), ..*args }, out, level, threads, blocking);
            }
        }
    }
}

fn fill_uncovered<T: Element>(args: &ExactArgs<'_, T>, segments: &[Segment], out: &ExactOut<'_, T>) {
    let nowhere =
        Segment { sequence: 0, q_batch: 0, q_first: 0, q_len: 1, k_batch: 0, k_first: 0, k_start: 0, k_end: 0, offset: 0 };
    let AttnShape { batch, seqlen_q, num_heads, .. } = args.shape;
    let mut covered = vec![false; batch * seqlen_q];
    for segment in segments {
        let first = segment.q_batch * seqlen_q + segment.q_first;
        covered[first..first + segment.q_len].fill(true);
    }
    for (row, _) in covered.iter().enumerate().filter(|&(_, &covered)| !covered) {
        let (batch, token) = (row / seqlen_q, row % seqlen_q);
        let alone = Segment { q_batch: batch, q_first: token, ..nowhere };
        for head in 0..num_heads {
            let query = Query { segment: &alone, token: 0, head };
            out.out.row(batch, token, head).fill(T::zeroed());
            if let Some(lse) = &out.lse {
                lse.row(batch, token, head)[0] = args.close(&query, T::Acc::NEG_INFINITY, T::Acc::ZERO).1;
            }
        }
    }
}

/// Where results go.
pub struct ExactOut<'a, T: Element> {
    /// `[B, Sq, H, Dv]`.
    pub out: RowWriter<'a, T>,
    /// `[B, H, Sq]`, as rows of one element of a `[B, Sq, H, 1]` array.
    pub lse: Option<RowWriter<'a, T::Acc>>,
}
