//! One panel of queries: its packed rows, its running softmax, and what one block of keys does to them.

use super::plan::Buffers;
use super::{ExactArgs, ExactOut};
use crate::dtype::Float;
use crate::math::load::MAX_LANES;
use crate::math::online_softmax::{Column, finite_bias, log_sum_exp, probabilities, scale_base2, step};
use crate::math::tile::TileKernel;
use crate::simd::{Isa, SimdElement, Vector, VectorKernel};
use std::marker::PhantomData;

/// Most vectors of a panel.
const MAX_VECTORS: usize = 3;
/// Most queries of a panel.
const MAX_PANEL: usize = MAX_VECTORS * MAX_LANES;

/// Up to `K::PANEL` consecutive query rows of one key/value head.
pub struct Panel<'a, T: SimdElement, I, K> {
    args: &'a ExactArgs<'a, T>,
    batch: usize,
    kv_head: usize,
    first_row: usize,
    rows: usize,
    queries: &'a mut [T::Acc],
    acc: &'a mut [T::Acc],
    m: &'a mut [T::Acc],
    l: &'a mut [T::Acc],
    kinds: PhantomData<(I, K)>,
}

/// How a mask cuts a block of keys for one panel. Keys count from the block's first.
pub struct Cut {
    first_key: usize,
    /// Vectors of the panel with rows in them.
    vectors: usize,
    /// Keys that some row of a vector sees; ascending.
    seen: [usize; MAX_VECTORS],
    /// Keys that every row of a vector sees.
    full: [usize; MAX_VECTORS],
}

impl Cut {
    #[inline(always)]
    pub fn new<T: SimdElement, I: Isa, K: TileKernel<T>>(panel: &Panel<'_, T, I, K>, first_key: usize, count: usize) -> Self {
        let lanes = T::V::<I>::LANES;
        let vectors = panel.rows.div_ceil(lanes);
        let mut cut = Self { first_key, vectors, seen: [0; MAX_VECTORS], full: [0; MAX_VECTORS] };
        for v in 0..vectors {
            let limit = |lane| panel.key_limit(lane).saturating_sub(first_key).min(count);
            cut.full[v] = limit(v * lanes);
            cut.seen[v] = limit(((v + 1) * lanes).min(panel.rows) - 1);
        }
        cut
    }

    /// Whether no row sees a key.
    #[inline(always)]
    pub fn is_empty(&self) -> bool {
        self.seen[self.vectors - 1] == 0
    }

    /// Whether vector `v` computes a key that some of its rows do not see, when pieces begin at multiples of `step`.
    #[inline(always)]
    fn hides(&self, v: usize, step: usize) -> bool {
        self.full[v] < self.seen[v].next_multiple_of(step).min(self.seen[self.vectors - 1])
    }

    /// `(first vector, keys)` of the pieces that vectors from the first on compute, when pieces begin at multiples of `step`.
    #[inline(always)]
    fn pieces(&self, step: usize) -> [(usize, std::ops::Range<usize>); MAX_VECTORS] {
        let last = self.seen[self.vectors - 1];
        let mut start = 0;
        std::array::from_fn(|v| {
            let end = if v < self.vectors { self.seen[v].next_multiple_of(step).min(last) } else { start };
            let piece = start.min(end)..end;
            start = end;
            (v, piece)
        })
    }
}

impl<'a, T: SimdElement, I: Isa, K: TileKernel<T>> Panel<'a, T, I, K> {
    /// Lays a panel over its part of the scratch.
    #[inline(always)]
    pub fn new(
        args: &'a ExactArgs<'a, T>,
        buffers: &Buffers,
        state: &'a mut [T::Acc],
        (batch, kv_head): (usize, usize),
        first_row: usize,
        rows: usize,
    ) -> Self {
        let (queries, state) = state.split_at_mut(buffers.queries);
        let (acc, state) = state.split_at_mut(buffers.acc);
        let (m, l) = state.split_at_mut(buffers.lanes);
        Self { args, batch, kv_head, first_row, rows, queries, acc, m, l, kinds: PhantomData }
    }

    /// `(token, head)` of a lane.
    #[inline(always)]
    fn position(&self, lane: usize) -> (usize, usize) {
        let group = self.args.shape.group();
        let row = self.first_row + lane;
        (row / group, self.kv_head * group + row % group)
    }

    #[inline(always)]
    fn key_limit(&self, lane: usize) -> usize {
        self.args.mask.key_limit(self.position(lane).0, self.args.shape.seqlen_k)
    }

    /// Packs the queries and resets the running softmax.
    #[inline(always)]
    pub fn start(&mut self) {
        let mut rows: [&[T]; MAX_PANEL] = [&[]; MAX_PANEL];
        for (lane, row) in rows[..self.rows].iter_mut().enumerate() {
            let (token, head) = self.position(lane);
            *row = self.args.q.row(self.batch, token, head);
        }
        K::pack_queries(&rows[..self.rows], self.args.shape.head_dim, self.queries);
        self.acc.fill(T::Acc::ZERO);
        self.m.fill(T::Acc::NEG_INFINITY);
        self.l.fill(T::Acc::ZERO);
    }

    /// Attends to one block of packed keys and values.
    #[inline(always)]
    pub fn attend(
        &mut self,
        cut: &Cut,
        values_are_finite: bool,
        (packed_keys, packed_values): (&[T::Acc], &[T::Acc]),
        scores: &mut [T::Acc],
        lanes_scratch: &mut [T::Acc],
    ) {
        let lanes = T::V::<I>::LANES;
        let shape = self.args.shape;
        let (peaks, lanes_scratch) = lanes_scratch.split_at_mut(lanes_scratch.len() / 3);
        let (alphas, _) = lanes_scratch.split_at_mut(peaks.len());
        peaks.fill(T::Acc::NEG_INFINITY);
        for (v, keys) in cut.pieces(K::KEY_STEP) {
            if !keys.is_empty() {
                K::scores((self.queries, packed_keys), shape.head_dim, v..cut.vectors, keys, scores, peaks);
            }
        }
        let scale = scale_base2::<T::Acc>(self.args.scale);
        let splat = T::V::<I>::splat;
        // Otherwise the largest score is not the largest product, and a product of -inf hides no key.
        let plain = self.args.bias.is_none() && scale > T::Acc::ZERO;
        let mut masked = false;
        for v in 0..cut.vectors {
            let at = v * lanes;
            let cut_here = !plain || cut.hides(v, K::KEY_STEP);
            masked |= cut_here;
            let (peak, scale) = match (plain, cut_here) {
                (true, false) => (T::V::<I>::load(&peaks[at..]).mul(splat(scale)), splat(scale)),
                (true, true) => (self.hide(cut, v, scores).mul(splat(scale)), splat(scale)),
                (false, _) => (self.modify(cut, v, scores), splat(T::Acc::from_f64(1.0))),
            };
            let step = step::<T, I>(T::V::<I>::load(&self.m[at..]), peak);
            step.m.store(&mut self.m[at..]);
            step.alpha.store(&mut alphas[at..]);
            let mut column = Column { rows: &mut scores[at..], stride: K::PANEL };
            let sum = if cut_here {
                probabilities::<T, I, true>(&mut column, cut.seen[v], scale, step.base)
            } else {
                probabilities::<T, I, false>(&mut column, cut.seen[v], scale, step.base)
            };
            T::V::<I>::load(&self.l[at..]).mul_add(step.alpha, sum).store(&mut self.l[at..]);
        }
        if masked && !values_are_finite {
            self.accumulate_seen(cut, scores, alphas);
            return;
        }
        let mut alpha = Some(&*alphas);
        for (v, keys) in cut.pieces(K::DEPTH) {
            if !keys.is_empty() {
                let operands = (&*scores, packed_values);
                K::accumulate(operands, shape.head_dim_v, v..cut.vectors, keys, alpha.take(), self.acc);
            }
        }
    }

    /// Number of the block's keys that each query of vector `v` sees.
    #[inline(always)]
    fn limits(&self, cut: &Cut, v: usize) -> T::V<I> {
        let lanes = T::V::<I>::LANES;
        let mut limits = [T::Acc::ZERO; MAX_LANES];
        for (lane, limit) in limits[..lanes].iter_mut().enumerate() {
            let lane = (v * lanes + lane).min(self.rows - 1);
            *limit = T::Acc::from_f64(self.key_limit(lane).saturating_sub(cut.first_key) as f64);
        }
        T::V::<I>::load(&limits)
    }

    /// Turns the scores of hidden keys of vector `v` into `-inf`; returns the maximum of the others.
    #[inline(always)]
    fn hide(&self, cut: &Cut, v: usize, scores: &mut [T::Acc]) -> T::V<I> {
        let at = v * T::V::<I>::LANES;
        let lowest = T::V::<I>::splat(T::Acc::NEG_INFINITY);
        let limits = self.limits(cut, v);
        let mut peak = lowest;
        for j in 0..cut.full[v] {
            peak = peak.max(T::V::<I>::load(&scores[j * K::PANEL + at..]));
        }
        for j in cut.full[v]..cut.seen[v] {
            let row = &mut scores[j * K::PANEL + at..];
            let position = T::V::<I>::splat(T::Acc::from_f64(j as f64));
            let s = limits.select_gt(position, T::V::<I>::load(row), lowest);
            peak = peak.max(s);
            s.store(row);
        }
        peak
    }

    /// Turns the raw scores of vector `v` into scaled, biased, masked ones in base 2; returns their maximum.
    #[inline(always)]
    fn modify(&self, cut: &Cut, v: usize, scores: &mut [T::Acc]) -> T::V<I> {
        let lanes = T::V::<I>::LANES;
        let splat = T::V::<I>::splat;
        let lowest = splat(T::Acc::NEG_INFINITY);
        let scale = splat(scale_base2::<T::Acc>(self.args.scale));
        let limits = self.limits(cut, v);
        let mut peak = lowest;
        for j in (0..cut.seen[v]).step_by(lanes) {
            let count = lanes.min(cut.seen[v] - j);
            let bias = self.bias_block(v, cut.first_key + j, count);
            for (i, &bias) in bias.as_ref().iter().take(count).enumerate() {
                let row = &mut scores[(j + i) * K::PANEL + v * lanes..];
                let mut s = T::V::<I>::load(row).mul(scale);
                if !self.args.bias.is_none() {
                    s = s.add(finite_bias::<T, I>(bias));
                    // A hidden key's score may be NaN, and NaN + -inf is NaN.
                    s = splat(T::Acc::LOWEST).select_gt(bias, lowest, s);
                }
                s = limits.select_gt(splat(T::Acc::from_f64((j + i) as f64)), s, lowest);
                peak = peak.max(s);
                s.store(row);
            }
        }
        peak
    }

    /// Bias of `count` keys, key by key, for the queries of vector `v`.
    #[inline(always)]
    fn bias_block(&self, v: usize, first_key: usize, count: usize) -> <T::V<I> as Vector>::Block {
        let lanes = T::V::<I>::LANES;
        let mut block = T::V::<I>::zero_block();
        if self.args.bias.is_none() {
            return block;
        }
        let mut values = [T::Acc::ZERO; MAX_LANES];
        if self.args.bias.is_per_key() {
            self.args.bias.read([self.batch, 0, 0], first_key, &mut values[..count]);
            for (column, &value) in block.as_mut().iter_mut().zip(&values) {
                *column = T::V::<I>::splat(value);
            }
            return block;
        }
        for (i, row) in block.as_mut().iter_mut().enumerate() {
            let (token, head) = self.position((v * lanes + i).min(self.rows - 1));
            self.args.bias.read([self.batch, head, token], first_key, &mut values[..count]);
            *row = T::V::<I>::load(&values);
        }
        T::V::<I>::transpose(block)
    }

    /// What `K::accumulate` does, entry by entry and only for keys that a row sees: a hidden key's probability is 0, but 0 times
    /// an infinite or NaN value would not be.
    fn accumulate_seen(&mut self, cut: &Cut, probs: &[T::Acc], alphas: &[T::Acc]) {
        let shape = self.args.shape;
        let lanes = T::V::<I>::LANES;
        for v in 0..cut.vectors {
            for lane in v * lanes..((v + 1) * lanes).min(self.rows) {
                for d in 0..shape.head_dim_v {
                    let mut sum = self.acc[d * K::PANEL + lane].to_f64() * alphas[lane].to_f64();
                    for j in 0..cut.seen[v] {
                        let operand = probs[j / K::DEPTH * K::PANEL + lane];
                        let p = T::Kernel::<I>::unfold(operand, j % K::DEPTH).to_f64();
                        if p.is_sign_positive() {
                            let value = self.args.v.row(self.batch, cut.first_key + j, self.kv_head)[d];
                            sum += p * value.to_acc().to_f64();
                        }
                    }
                    self.acc[d * K::PANEL + lane] = T::Acc::from_f64(sum);
                }
            }
        }
    }

    /// Divides by the sums and writes the rows.
    #[inline(always)]
    pub fn finish(&mut self, out: &ExactOut<'_, T>) {
        let lanes = T::V::<I>::LANES;
        let head_dim_v = self.args.shape.head_dim_v;
        for lane in 0..self.rows {
            let (token, head) = self.position(lane);
            if let Some(lse) = &out.lse {
                lse.row(self.batch, token, head)[0] = log_sum_exp(self.m[lane], self.l[lane]);
            }
            // No visible key: the accumulator is 0 and stays 0.
            let l = self.l[lane];
            self.l[lane] = if l == T::Acc::ZERO { l } else { T::Acc::from_f64(1.0 / l.to_f64()) };
        }
        let zeros = [T::zeroed(); MAX_LANES];
        for v in 0..self.rows.div_ceil(lanes) {
            let shrink = T::V::<I>::load(&self.l[v * lanes..]);
            let filled = lanes.min(self.rows - v * lanes);
            let mut rows: [&mut [T]; MAX_LANES] = std::array::from_fn(|_| &mut [] as &mut [T]);
            for (i, row) in rows[..filled].iter_mut().enumerate() {
                let (token, head) = self.position(v * lanes + i);
                *row = out.out.row(self.batch, token, head);
            }
            for d in (0..head_dim_v).step_by(lanes) {
                let mut block = T::V::<I>::zero_block();
                for (i, column) in block.as_mut().iter_mut().enumerate() {
                    *column = T::V::<I>::load(&self.acc[(d + i) * K::PANEL + v * lanes..]).mul(shrink);
                }
                let block = T::V::<I>::transpose(block);
                let count = lanes.min(head_dim_v - d);
                for (row, &values) in rows[..filled].iter_mut().zip(block.as_ref()) {
                    if count == lanes {
                        T::store::<I>(values, &mut row[d..]);
                    } else {
                        let mut buffer = zeros;
                        T::store::<I>(values, &mut buffer);
                        row[d..].copy_from_slice(&buffer[..count]);
                    }
                }
            }
        }
    }
}
