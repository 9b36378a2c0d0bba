//! Consecutive query rows of one key/value head in the lanes of vectors, and what masks and modifiers do to their scores.

use super::ExactArgs;
use super::cut::{Cut, MAX_VECTORS};
use crate::dtype::Float;
use crate::index::{Query, Segment};
use crate::kernels::bias::Bias;
use crate::math::load::MAX_LANES;
use crate::math::online_softmax::Column;
use crate::math::score_pass;
use crate::simd::{Isa, SimdElement, Vector};
use crate::tensor::Tensor;
use std::ops::Range;

/// Most queries of a panel.
pub const MAX_PANEL: usize = MAX_VECTORS * MAX_LANES;

/// Up to a panel of query rows, one to a lane.
#[derive(Debug, Clone, Copy)]
pub struct Lanes<'a, T: SimdElement> {
    /// The call.
    pub args: &'a ExactArgs<'a, T>,
    /// Their segment.
    pub segment: &'a Segment,
    /// Their key/value head.
    pub kv_head: usize,
    /// The first row, of the rows `(token, head of the group)` of the segment.
    pub first_row: usize,
    /// Number of rows, never 0.
    pub rows: usize,
}

impl<'a, T: SimdElement> Lanes<'a, T> {
    /// The query of a lane; lanes without one stand for the last.
    #[inline(always)]
    pub fn query(&self, lane: usize) -> Query<'a> {
        self.args.query(self.segment, self.kv_head, self.first_row + lane.min(self.rows - 1))
    }

    /// Their rows of a `[B, Sq, H, ..]` array.
    #[inline(always)]
    pub fn rows_of(&self, tensor: &Tensor<'a, T>) -> [&'a [T]; MAX_PANEL] {
        let mut rows: [&[T]; MAX_PANEL] = [&[]; MAX_PANEL];
        for (lane, row) in rows[..self.rows].iter_mut().enumerate() {
            let [batch, head, token] = self.query(lane).at();
            *row = tensor.row(batch, token, head);
        }
        rows
    }

    /// How the mask cuts the block of `count` keys from position `first` on.
    #[inline(always)]
    pub fn cut<I: Isa>(&self, first: usize, count: usize) -> Cut {
        Cut::new(&self.args.mask, (self.rows, T::V::<I>::LANES), (first, count), |lane| self.query(lane))
    }

    /// Turns the scores of `keys` of the block that starts at `first_key` into `-inf` where a row of vector `v` does not see the key.
    #[inline(always)]
    pub fn hide<I: Isa>(&self, (cut, first_key): (&Cut, usize), v: usize, keys: Range<usize>, column: &mut Column<'_, T::Acc>) {
        let lanes = T::V::<I>::LANES;
        let mask = &self.args.mask;
        if mask.ranges.is_none() {
            let (mut starts, mut ends) = ([T::Acc::ZERO; MAX_LANES], [T::Acc::ZERO; MAX_LANES]);
            for lane in 0..lanes {
                let hull = mask.hull(&self.query(v * lanes + lane));
                let limit = |key: usize| T::Acc::from_f64((key as isize - first_key as isize) as f64);
                (starts[lane], ends[lane]) = (limit(hull.start), limit(hull.end));
            }
            let limits = (T::V::<I>::load(&starts), T::V::<I>::load(&ends));
            score_pass::hide_outside::<T, I>(column, keys, cut.full(v), limits);
            return;
        }
        for lane in 0..lanes {
            let positions = first_key + keys.start..first_key + keys.end;
            for key in mask.gaps(&self.query(v * lanes + lane), positions).flatten() {
                column.rows[(key - first_key) * column.stride + lane] = T::Acc::NEG_INFINITY;
            }
        }
    }

    /// Turns the raw scores of `keys` with vector `v` into scaled and modified ones, without what is hidden by the mask; in base 2 if
    /// they are exponents. Returns their maximum before biases. `slopes` gets the derivatives of a soft-cap.
    #[inline(always)]
    pub fn modify<I: Isa>(
        &self,
        first_key: usize,
        v: usize,
        keys: Range<usize>,
        column: &mut Column<'_, T::Acc>,
        slopes: Option<&mut Column<'_, T::Acc>>,
    ) -> T::V<I> {
        let lanes = T::V::<I>::LANES;
        let from = T::Acc::from_f64;
        let args = self.args;
        let query = |lane: usize| self.query(v * lanes + lane);
        let unit = args.unit();
        let factor = args.mods.softcap.map_or(unit, |cap| 1.0 / cap);
        let scale = if args.mods.scale.is_uniform() {
            T::V::<I>::splat(from(args.mods.scale.factor * factor))
        } else {
            score_pass::lanes::<T, I>(|lane| args.scale(&query(lane)) * factor)
        };
        let mut capped = None;
        if let Some(cap) = args.mods.softcap {
            capped = Some(score_pass::softcap::<T, I>(column, keys.clone(), scale, from(unit * cap), slopes));
        }
        let peak = if args.mods.alibi_slopes.is_some() {
            let position = |lane: usize| query(lane).position() - first_key as isize;
            let scale = if capped.is_some() { T::V::<I>::splat(from(1.0)) } else { scale };
            let alibi = score_pass::Alibi {
                scale,
                slope: score_pass::lanes::<T, I>(|lane| args.alibi_slope(&query(lane)) * unit),
                position: score_pass::lanes::<T, I>(|lane| position(lane) as f64),
            };
            score_pass::alibi::<T, I>(column, keys.clone(), &alibi, keys.end as isize <= position(0) + 1)
        } else if let Some(peak) = capped {
            peak
        } else {
            score_pass::scale::<T, I>(column, keys.clone(), scale)
        };
        for bias in args.biases.iter().filter(|bias| !bias.is_none()) {
            for j in keys.clone().step_by(lanes) {
                let count = lanes.min(keys.end - j);
                let block = self.bias_block::<I>(bias, v, first_key + j, count);
                score_pass::add_bias::<T, I>(column, (j, count), &block, from(unit));
            }
        }
        peak
    }

    /// Bias of `count` keys, key by key, for the queries of vector `v`.
    #[inline(always)]
    fn bias_block<I: Isa>(&self, bias: &Bias<'_, T>, v: usize, first_key: usize, count: usize) -> <T::V<I> as Vector>::Block {
        let lanes = T::V::<I>::LANES;
        let mut block = T::V::<I>::zero_block();
        let mut values = [T::Acc::ZERO; MAX_LANES];
        if bias.is_per_key() {
            bias.read([self.segment.q_batch, 0, 0], first_key, &mut values[..count]);
            for (column, &value) in block.as_mut().iter_mut().zip(&values) {
                *column = T::V::<I>::splat(value);
            }
            return block;
        }
        for (i, row) in block.as_mut().iter_mut().enumerate() {
            bias.read(self.query(v * lanes + i).at(), first_key, &mut values[..count]);
            *row = T::V::<I>::load(&values);
        }
        T::V::<I>::transpose(block)
    }
}
