//! One panel of queries: its packed rows, its running softmax, and what one block of keys does to them.

use super::ExactOut;
use super::cut::Cut;
use super::lanes::Lanes;
use super::plan::Buffers;
use crate::dtype::Float;
use crate::kernels::bias::Bias;
use crate::kernels::score_mod::Normalizer;
use crate::math::load::{MAX_LANES, store_output};
use crate::math::online_softmax::{Column, Exponential, MaskedExponential, Ready, probabilities, scale_base2, step};
use crate::math::score_pass;
use crate::math::tile::TileKernel;
use crate::simd::{Isa, SimdElement, Vector, VectorKernel, prefetch};
use std::marker::PhantomData;

/// Up to `K::PANEL` consecutive query rows of one key/value head.
pub struct Panel<'a, T: SimdElement, I, K> {
    lanes: Lanes<'a, T>,
    queries: &'a mut [T::Acc],
    acc: &'a mut [T::Acc],
    m: &'a mut [T::Acc],
    l: &'a mut [T::Acc],
    kinds: PhantomData<(I, K)>,
}

impl<'a, T: SimdElement, I: Isa, K: TileKernel<T>> Panel<'a, T, I, K> {
    /// Lays a panel over its part of the scratch.
    #[inline(always)]
    pub fn new(lanes: Lanes<'a, T>, buffers: &Buffers, state: &'a mut [T::Acc]) -> Self {
        let (queries, state) = state.split_at_mut(buffers.queries);
        let (acc, state) = state.split_at_mut(buffers.acc);
        let (m, l) = state.split_at_mut(buffers.lanes);
        Self { lanes, queries, acc, m, l, kinds: PhantomData }
    }

    /// How the mask cuts the block of `count` keys from position `first` on.
    #[inline(always)]
    pub fn cut(&self, first: usize, count: usize) -> Cut {
        self.lanes.cut::<I>(first, count)
    }

    /// Packs the queries and resets the running softmax.
    #[inline(always)]
    pub fn start(&mut self) {
        let Lanes { args, segment, kv_head, first_row, rows } = self.lanes;
        // The next panel's rows are on their way while this one is at work.
        for row in first_row + rows..(first_row + 2 * rows).min(segment.q_len * args.shape.group()) {
            let [batch, head, token] = args.query(segment, kv_head, row).at();
            prefetch(args.q.row(batch, token, head));
        }
        K::pack_queries(&self.lanes.rows_of(&args.q)[..rows], args.shape.head_dim, self.queries);
        self.acc.fill(T::Acc::ZERO);
        self.m.fill(T::Acc::NEG_INFINITY);
        self.l.fill(T::Acc::ZERO);
    }

    /// Attends to one block of packed keys and values, whose first key is at position `first_key`.
    #[inline(always)]
    pub fn attend(
        &mut self,
        (cut, first_key): (&Cut, usize),
        values_are_finite: bool,
        (packed_keys, packed_values): (&[T::Acc], &[T::Acc]),
        (scores, factors): (&mut [T::Acc], &mut [T::Acc]),
        lanes_scratch: &mut [T::Acc],
    ) {
        let lanes = T::V::<I>::LANES;
        let shape = self.lanes.args.shape;
        let (peaks, alphas) = lanes_scratch.split_at_mut(lanes_scratch.len() / 2);
        peaks.fill(T::Acc::NEG_INFINITY);
        for (vectors, keys) in cut.pieces(K::KEY_STEP) {
            if !keys.is_empty() {
                K::scores((self.queries, packed_keys), shape.head_dim, vectors, keys, scores, peaks);
            }
        }
        let splat = T::V::<I>::splat;
        let scale = scale_base2::<T::Acc>(self.lanes.args.mods.scale.factor);
        let exponential = self.lanes.args.mods.normalizer.is_exponential();
        // With a factor that is not positive, the largest score is not the largest product, and a product of -inf hides no key.
        let plain = !self.lanes.args.modifies_scores() && scale > T::Acc::ZERO;
        let uniform = self.lanes.args.mods.scale.is_uniform() && scale > T::Acc::ZERO;
        let hides_by_value = !uniform || !self.lanes.args.biases.iter().all(Bias::is_none);
        let mut masked = false;
        for v in 0..cut.vectors {
            let at = v * lanes;
            let keys = cut.weighed(v, K::DEPTH);
            if keys.is_empty() {
                splat(T::Acc::from_f64(1.0)).store(&mut alphas[at..]);
                continue;
            }
            let cut_here = cut.hides(v, K::KEY_STEP) || hides_by_value;
            masked |= cut_here || cut.splits_operand(v, K::DEPTH);
            let mut column = Column { rows: &mut scores[at..], stride: K::PANEL };
            let peak = if !plain {
                self.modify((cut, first_key), v, &mut column)
            } else if cut_here {
                self.lanes.hide::<I>((cut, first_key), v, keys.clone(), &mut column);
                score_pass::peak::<T, I>(&column, keys.clone())
            } else {
                T::V::<I>::load(&peaks[at..])
            };
            let factors = self.lanes.args.mods.dropout.map(|dropout| {
                let positions = first_key + keys.start..first_key + keys.end;
                let query = |lane| self.lanes.query(at + lane);
                dropout.factors(query, lanes, positions, &mut factors[keys.start * K::PANEL + at..], K::PANEL);
                &factors[at..]
            });
            if !exponential {
                splat(T::Acc::from_f64(1.0)).store(&mut alphas[at..]);
                let sum = probabilities::<T, I, Ready>(&mut column, keys.clone(), (splat(scale), splat(scale)), factors);
                zero_rest::<T, I>(&mut column, keys.end, K::DEPTH);
                T::V::<I>::load(&self.l[at..]).add(sum).store(&mut self.l[at..]);
                continue;
            }
            let scale = splat(if plain { scale } else { T::Acc::from_f64(1.0) });
            let step = step::<T, I>(T::V::<I>::load(&self.m[at..]), peak.mul(scale));
            step.m.store(&mut self.m[at..]);
            step.alpha.store(&mut alphas[at..]);
            let sum = if cut_here {
                probabilities::<T, I, MaskedExponential>(&mut column, keys.clone(), (scale, step.base), factors)
            } else {
                probabilities::<T, I, Exponential>(&mut column, keys.clone(), (scale, step.base), factors)
            };
            zero_rest::<T, I>(&mut column, keys.end, K::DEPTH);
            T::V::<I>::load(&self.l[at..]).mul_add(step.alpha, sum).store(&mut self.l[at..]);
        }
        if masked && !values_are_finite {
            self.accumulate_seen((cut, first_key), scores, alphas);
            return;
        }
        let pieces = cut.pieces(K::DEPTH);
        let mut alpha = Some(&*alphas);
        // A window's first keys are seen by the first vectors only.
        let leading = pieces.iter().find(|(_, keys)| !keys.is_empty()).map_or(0..0, |(vectors, _)| vectors.clone());
        if pieces.iter().any(|(vectors, keys)| !keys.is_empty() && vectors.end > leading.end) {
            self.shrink(&alphas[..cut.vectors * lanes]);
            alpha = None;
        }
        for (vectors, keys) in pieces {
            if !keys.is_empty() {
                K::accumulate((&*scores, packed_values), shape.head_dim_v, vectors, keys, alpha.take(), self.acc);
            }
        }
    }

    /// Multiplies the accumulator by `alphas`.
    #[inline(always)]
    fn shrink(&mut self, alphas: &[T::Acc]) {
        let lanes = T::V::<I>::LANES;
        for row in self.acc.chunks_exact_mut(K::PANEL).take(self.lanes.args.shape.head_dim_v) {
            for at in (0..alphas.len()).step_by(lanes) {
                T::V::<I>::load(&row[at..]).mul(T::V::<I>::load(&alphas[at..])).store(&mut row[at..]);
            }
        }
    }

    /// Turns the raw scores of vector `v` into scaled, modified, masked ones, in base 2 if they are exponents, else into weights;
    /// returns their maximum.
    #[inline(always)]
    fn modify(&self, (cut, first_key): (&Cut, usize), v: usize, column: &mut Column<'_, T::Acc>) -> T::V<I> {
        let args = self.lanes.args;
        let keys = cut.weighed(v, K::DEPTH);
        let peak = self.lanes.modify::<I>(first_key, v, keys.clone(), column, None);
        let hides = cut.hides(v, K::KEY_STEP);
        if !hides && args.biases.iter().all(Bias::is_none) && args.mods.normalizer == Normalizer::Softmax {
            return peak;
        }
        if hides {
            self.lanes.hide::<I>((cut, first_key), v, keys.clone(), column);
        }
        if args.mods.normalizer != Normalizer::Softmax {
            let normalizer = args.mods.normalizer;
            if args.mods.reweighting.is_some_and(|reweighting| reweighting.gains.is_some()) {
                let emphases: [_; MAX_LANES] =
                    std::array::from_fn(|lane| args.emphasis(&self.lanes.query(v * T::V::<I>::LANES + lane)));
                score_pass::map::<T, I>(column, keys.clone(), |lane, score| {
                    emphases[lane].map_or(0.0, |emphasis| emphasis.weigh(normalizer.weight(score)))
                });
            } else {
                score_pass::map::<T, I>(column, keys.clone(), |_, score| normalizer.weight(score));
            }
        }
        score_pass::peak::<T, I>(column, keys)
    }

    /// What `K::accumulate` does, entry by entry and only for keys that a row sees: a hidden key's weight is 0, but 0 times an
    /// infinite or NaN value would not be.
    fn accumulate_seen(&mut self, (cut, first_key): (&Cut, usize), probs: &[T::Acc], alphas: &[T::Acc]) {
        let shape = self.lanes.args.shape;
        let lanes = T::V::<I>::LANES;
        let places = self.lanes.args.places(self.lanes.segment);
        let depth = T::Kernel::<I>::DEPTH;
        for v in 0..cut.vectors {
            for lane in v * lanes..((v + 1) * lanes).min(self.lanes.rows) {
                for d in 0..shape.head_dim_v {
                    let mut sum = self.acc[d * K::PANEL + lane].to_f64() * alphas[lane].to_f64();
                    for j in cut.weighed(v, K::DEPTH) {
                        let operand = probs[j / depth * K::PANEL + lane];
                        let p = T::Kernel::<I>::unfold(operand, j % depth).to_f64();
                        if p.is_sign_positive() {
                            let (batch, token) = places.place(first_key + j);
                            sum += p * self.lanes.args.v.row(batch, token, self.lanes.kv_head)[d].to_acc().to_f64();
                        }
                    }
                    self.acc[d * K::PANEL + lane] = T::Acc::from_f64(sum);
                }
            }
        }
    }

    /// Requests the rows that [`Panel::finish`] writes.
    #[inline(always)]
    pub fn prefetch(&self, out: &ExactOut<'_, T>) {
        for lane in 0..self.lanes.rows {
            let [batch, head, token] = self.lanes.query(lane).at();
            out.out.prefetch(batch, token, head);
        }
    }

    /// Normalises and writes the rows.
    #[inline(always)]
    pub fn finish(&mut self, out: &ExactOut<'_, T>) {
        let lanes = T::V::<I>::LANES;
        let head_dim_v = self.lanes.args.shape.head_dim_v;
        for lane in 0..self.lanes.rows {
            let query = self.lanes.query(lane);
            let (factor, log_sum) = self.lanes.args.close(&query, self.m[lane], self.l[lane]);
            let [batch, head, token] = query.at();
            if let Some(lse) = &out.lse {
                lse.row(batch, token, head)[0] = log_sum;
            }
            self.l[lane] = factor;
        }
        for v in 0..self.lanes.rows.div_ceil(lanes) {
            let shrink = T::V::<I>::load(&self.l[v * lanes..]);
            let filled = lanes.min(self.lanes.rows - v * lanes);
            let mut rows: [&mut [T]; MAX_LANES] = std::array::from_fn(|_| &mut [] as &mut [T]);
            for (i, row) in rows[..filled].iter_mut().enumerate() {
                let [batch, head, token] = self.lanes.query(v * lanes + i).at();
                *row = out.out.row(batch, token, head);
            }
            for d in (0..head_dim_v).step_by(lanes) {
                let mut block = T::V::<I>::zero_block();
                for (i, column) in block.as_mut().iter_mut().enumerate() {
                    *column = T::V::<I>::load(&self.acc[(d + i) * K::PANEL + v * lanes..]).mul(shrink);
                }
                let block = T::V::<I>::transpose(block);
                let count = lanes.min(head_dim_v - d);
                for (row, &values) in rows[..filled].iter_mut().zip(block.as_ref()) {
                    store_output::<T, I>(values, &mut row[d..d + count], out.out.passes_caches());
                }
            }
        }
    }
}

/// Zeroes the weights of what follows on `end` keys, up to a multiple of `step`.
#[inline(always)]
fn zero_rest<T: SimdElement, I: Isa>(column: &mut Column<'_, T::Acc>, end: usize, step: usize) {
    let depth = T::Kernel::<I>::DEPTH;
    for operand in end.div_ceil(depth)..end.next_multiple_of(step) / depth {
        T::V::<I>::splat(T::Acc::ZERO).store(&mut column.rows[operand * column.stride..]);
    }
}
