//! One panel of queries: what its scores with a block of keys, and their gradients, are.

use super::super::cut::Cut;
use super::super::lanes::Lanes;
use super::plan::Buffers;
use super::{BackwardArgs, RowState};
use crate::dtype::Float;
use crate::kernels::bias::Bias;
use crate::kernels::score_mod::Normalizer;
use crate::math::gradient_pass::{ByKey, QueryState, other_gradients, softmax_gradients};
use crate::math::load::MAX_LANES;
use crate::math::online_softmax::{Column, Exponential, MaskedExponential, scale_base2};
use crate::math::row_tile::RowKernel;
use crate::math::score_pass;
use crate::simd::{Isa, SimdElement, Vector};
use std::marker::PhantomData;
use std::ops::Range;

/// Scores of a panel with a block of keys, and all that becomes of them.
pub struct ScoreBuffers<'s, A> {
    /// Scores, then weights, `[block_k, PANEL]`.
    pub weights: &'s mut [A],
    /// Gradients of weights, then of raw scores.
    pub gradients: &'s mut [A],
    /// Derivatives of a soft-cap.
    pub slopes: &'s mut [A],
    /// What weights are multiplied by, if some are dropped.
    pub factors: &'s mut [A],
}

/// Keys and values of a block, packed, from position `first` on.
#[derive(Clone, Copy)]
pub struct PackedBlock<'s, A> {
    /// Keys, as scores need them.
    pub keys: &'s [A],
    /// Values, likewise.
    pub values: &'s [A],
    /// Position of the first.
    pub first: usize,
    /// How many.
    pub count: usize,
}

/// Which keys of a block were computed, and whether some of them count as hidden for some lane.
pub struct Computed {
    /// Keys, counted from the block's first.
    pub keys: Range<usize>,
    /// Whether products may hold entries whose weight is 0 because they are hidden.
    pub hides: bool,
}

/// What gradients are taken with respect to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Of {
    /// The products of queries and keys, but for the factor that all share.
    Products,
    /// Scores as biases leave them.
    Scores,
}

/// Up to `K::PANEL` queries of one key/value head, packed.
pub struct GradientPanel<'a, 's, T: SimdElement, I, K> {
    /// Its rows.
    pub lanes: Lanes<'a, T>,
    queries: &'s mut [T::Acc],
    d_outs: &'s mut [T::Acc],
    base: &'s mut [T::Acc],
    delta: &'s mut [T::Acc],
    kinds: PhantomData<(I, K)>,
}

impl<'a, 's, T: SimdElement, I: Isa, K: RowKernel<T>> GradientPanel<'a, 's, T, I, K> {
    /// Packs a panel into `scratch`, from which it takes what it needs.
    #[inline(always)]
    pub fn new(
        args: &BackwardArgs<'a, T>,
        deltas: &[T::Acc],
        buffers: &Buffers,
        lanes: Lanes<'a, T>,
        scratch: &'s mut [T::Acc],
    ) -> Self {
        let (queries, scratch) = scratch.split_at_mut(buffers.queries);
        let (d_outs, scratch) = scratch.split_at_mut(buffers.d_outs);
        let (base, delta) = scratch.split_at_mut(buffers.lanes);
        let shape = args.forward.shape;
        for (tensor, dim, packed) in
            [(&args.forward.q, shape.head_dim, &mut *queries), (&args.d_out, shape.head_dim_v, &mut *d_outs)]
        {
            K::pack_queries(&lanes.rows_of(tensor)[..lanes.rows], dim, packed);
        }
        let unit = args.forward.unit();
        for lane in 0..K::PANEL {
            if lane >= lanes.rows {
                // Weights are 0.
                (base[lane], delta[lane]) = (T::Acc::from_f64(f64::INFINITY), T::Acc::ZERO);
                continue;
            }
            let [batch, head, token] = lanes.query(lane).at();
            let lse = args.lse.row(batch, token, head)[0].to_f64();
            // Weights that sum to nothing have no gradient.
            base[lane] = T::Acc::from_f64(if lse == f64::NEG_INFINITY { f64::INFINITY } else { lse * unit });
            delta[lane] = deltas[(batch * shape.seqlen_q + token) * shape.num_heads + head];
        }
        Self { lanes, queries, d_outs, base, delta, kinds: PhantomData }
    }

    /// Computes weights and gradients of the keys of a block that some row sees. Those of lanes without a query are zeros, and so are
    /// rows of the buffers up to the next multiple of `ROW_STEP` from the first key.
    #[inline(always)]
    pub fn compute(&self, block: &PackedBlock<'_, T::Acc>, of: Of, buffers: &mut ScoreBuffers<'_, T::Acc>) -> Option<Computed> {
        let args = self.lanes.args;
        let cut = self.lanes.cut::<I>(block.first, block.count);
        let keys = seen_keys(&cut, K::KEY_STEP)?;
        let vectors = 0..cut.vectors;
        let mut peaks = [T::Acc::NEG_INFINITY; super::super::lanes::MAX_PANEL];
        let shape = args.shape;
        for (operands, dim, products) in [
            ((&*self.queries, block.keys), shape.head_dim, &mut *buffers.weights),
            ((&*self.d_outs, block.values), shape.head_dim_v, &mut *buffers.gradients),
        ] {
            K::scores(operands, dim, vectors.clone(), keys.clone(), products, &mut peaks);
        }
        let mut computed = Computed { hides: self.lanes.rows < K::PANEL, keys: keys.clone() };
        computed.hides |= !keys.end.is_multiple_of(K::DEPTH) && keys.end < block.count;
        for v in vectors {
            let full = cut.full(v);
            let hides = full.start > keys.start || full.end < keys.end;
            computed.hides |= hides | !args.biases.iter().all(Bias::is_none);
            self.weigh((&cut, block.first), (v, hides), keys.clone(), of, buffers);
        }
        let filled = keys.start + keys.len().next_multiple_of(K::ROW_STEP);
        for rows in [&mut *buffers.weights, &mut *buffers.gradients] {
            rows[keys.end * K::PANEL..filled * K::PANEL].fill(T::Acc::ZERO);
            // Vectors without a query.
            for row in rows[keys.start * K::PANEL..keys.end * K::PANEL].chunks_exact_mut(K::PANEL) {
                row[cut.vectors * T::V::<I>::LANES..].fill(T::Acc::ZERO);
            }
        }
        Some(computed)
    }

    /// Turns scores and gradients of weights of vector `v` into weights and gradients of scores.
    #[inline(always)]
    fn weigh(
        &self,
        (cut, first_key): (&Cut, usize),
        (v, hides): (usize, bool),
        keys: Range<usize>,
        of: Of,
        buffers: &mut ScoreBuffers<'_, T::Acc>,
    ) {
        let width = T::V::<I>::LANES;
        let at = v * width;
        let stride = K::PANEL;
        let mut scores = Column { rows: &mut buffers.weights[at..], stride };
        let mut gradients = Column { rows: &mut buffers.gradients[at..], stride };
        let mut slopes = (!buffers.slopes.is_empty()).then(|| Column { rows: &mut buffers.slopes[at..], stride });
        let args = self.lanes.args;
        let mods = &args.mods;
        let splat = |x: f64| T::V::<I>::splat(T::Acc::from_f64(x));
        let scale = scale_base2::<T::Acc>(mods.scale.factor);
        // A product of -inf hides no key where the factor is not positive.
        let plain = !args.modifies_scores() && scale > T::Acc::ZERO;
        if !plain {
            self.lanes.modify::<I>(first_key, v, keys.clone(), &mut scores, slopes.as_mut());
        }
        if hides {
            self.lanes.hide::<I>((cut, first_key), v, keys.clone(), &mut scores);
        }
        let factors = mods.dropout.map(|dropout| {
            let positions = first_key + keys.start..first_key + keys.end;
            let query = |lane| self.lanes.query(at + lane);
            dropout.factors(query, width, positions, &mut buffers.factors[keys.start * stride + at..], stride);
            &buffers.factors[at..]
        });
        let mut slope = None;
        if of == Of::Products && !mods.scale.is_uniform() {
            slope = Some(score_pass::lanes::<T, I>(|lane| args.scale(&self.lanes.query(at + lane))));
        }
        let query = QueryState {
            scale: if plain { T::V::<I>::splat(scale) } else { splat(1.0) },
            base: T::V::<I>::load(&self.base[at..]),
            delta: T::V::<I>::load(&self.delta[at..]),
            slope,
        };
        let slopes = slopes.as_ref().filter(|_| of == Of::Products).map(|slopes| &*slopes.rows);
        let by_key = ByKey { slopes, factors };
        let columns = (&mut scores, &mut gradients);
        if mods.normalizer != Normalizer::Softmax {
            let mut shares = [0.0; MAX_LANES];
            for (lane, share) in shares[..width].iter_mut().enumerate() {
                let lse = self.base[at + lane].to_f64();
                *share = if lse == f64::INFINITY { 0.0 } else { RowState::share(lse, mods.normalizer) };
            }
            other_gradients::<T, I>(columns, keys, &query, &by_key, |lane, score| {
                (mods.normalizer.value(score) * shares[lane], mods.normalizer.rate(score) * shares[lane])
            });
        } else if hides || !plain {
            softmax_gradients::<T, I, MaskedExponential>(columns, keys, &query, &by_key);
        } else {
            softmax_gradients::<T, I, Exponential>(columns, keys, &query, &by_key);
        }
    }
}

/// From the first to the last key of a block that some row of a panel sees, from a multiple of `step` on.
#[inline(always)]
fn seen_keys(cut: &Cut, step: usize) -> Option<Range<usize>> {
    let seen = (0..cut.vectors).map(|v| cut.weighed(v, step)).filter(|keys| !keys.is_empty());
    seen.reduce(|a, b| a.start.min(b.start)..a.end.max(b.end))
}
