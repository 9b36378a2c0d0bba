//! Gradients of exact attention, from `(q, k, v, out, lse)` and the gradients of `out` and `lse`: probabilities are computed anew
//! (FlashAttention, Dao et al. 2022; FlashAttention-2, Dao 2023), so that nothing of the size of the scores is ever kept.
//!
//! ```text
//! delta_i = do_i . o_i - dlse_i
//! P_ij    = exp(s_ij - lse_i)
//! dS_ij   = P_ij (do_i . v_j - delta_i)
//! dv_j    = sum over i of P_ij do_i
//! dq_i    = sum over j of dS_ij (ds_ij / d(q_i . k_j)) k_j,   dk_j likewise
//! ```

mod chunk;
mod delta;
pub mod naive;
mod panel;
mod plan;
pub mod sums;

use super::{Blocking, ExactArgs};
use crate::dtype::{DType, Element, Float};
use crate::index::Query;
use crate::kernels::score_mod::Normalizer;
use crate::math::matrix_tiles::MatrixTiles;
use crate::math::tile::VectorTiles;
use crate::parallel::{RowTurns, RowWriter, for_each_tile};
use crate::simd::{Isa, Level, SimdElement, Task};
use crate::tensor::Tensor;
use plan::Plan;
use std::sync::OnceLock;

/// What is differentiated, and the gradient of its results.
#[derive(Debug, Clone, Copy)]
pub struct BackwardArgs<'a, T: Element> {
    /// The call.
    pub forward: ExactArgs<'a, T>,
    /// Its result, `[B, Sq, H, Dv]`.
    pub out: Tensor<'a, T>,
    /// Its log-sum-exp, as `[B, Sq, H, 1]`.
    pub lse: Tensor<'a, T::Acc>,
    /// Gradient of the result.
    pub d_out: Tensor<'a, T>,
    /// Gradient of the log-sum-exp, if that was used.
    pub d_lse: Option<Tensor<'a, T::Acc>>,
}

/// A writable `[B, S, H, D]` array with strides along batch, sequence and head.
pub struct RowsMut<'a, T> {
    /// The elements.
    pub data: &'a mut [T],
    /// Extents.
    pub shape: [usize; 4],
    /// Strides.
    pub strides: [usize; 3],
}

/// Where the gradients of queries, keys and values go.
pub struct Gradients<'a, T: Element> {
    /// `[B, Sq, H, D]`.
    pub q: Option<RowsMut<'a, T>>,
    /// `[B, Sk, Hkv, D]`.
    pub k: Option<&'a RowWriter<'a, T>>,
    /// `[B, Sk, Hkv, Dv]`.
    pub v: Option<&'a RowWriter<'a, T>>,
}

/// What turns the scores of a query into weights and their gradients.
#[derive(Debug, Clone, Copy)]
pub struct RowState {
    /// The log-sum-exp; `-inf` for weights that sum to nothing, which have no gradient.
    pub lse: f64,
    /// `delta` above: what `do . v` is compared with.
    pub delta: f64,
}

impl RowState {
    /// From the log-sum-exp, its gradient, and the product of the output and its gradient.
    #[inline(always)]
    fn new(normalizer: Normalizer, lse: f64, d_lse: f64, dot: impl FnOnce() -> f64) -> Self {
        let delta = if lse == f64::NEG_INFINITY {
            0.0
        } else if normalizer.divides() {
            dot() - d_lse
        } else if d_lse == 0.0 {
            0.0
        } else {
            // lse = ln l, and every weight has its share of l.
            -d_lse * (-lse).exp()
        };
        Self { lse, delta }
    }

    /// What weights that are no exponentials are multiplied by.
    pub fn share(lse: f64, normalizer: Normalizer) -> f64 {
        if lse == f64::NEG_INFINITY {
            0.0
        } else if normalizer.divides() {
            (-lse).exp()
        } else {
            1.0
        }
    }
}

impl<T: Element> BackwardArgs<'_, T> {
    /// The state of a query's row.
    pub fn row_state(&self, query: &Query<'_>) -> RowState {
        let [batch, head, token] = query.at();
        let (out, d_out) = (self.out.row(batch, token, head), self.d_out.row(batch, token, head));
        self.state_at(query.at(), || out.iter().zip(d_out).map(|(&o, &g)| o.to_acc().to_f64() * g.to_acc().to_f64()).sum())
    }

    /// As [`BackwardArgs::row_state`], with the product of the output and its gradient from `dot`.
    #[inline(always)]
    fn state_at(&self, [batch, head, token]: [usize; 3], dot: impl FnOnce() -> f64) -> RowState {
        let lse = self.lse.row(batch, token, head)[0].to_f64();
        let d_lse = self.d_lse.map_or(0.0, |d_lse| d_lse.row(batch, token, head)[0].to_f64());
        // A query that sees no key has an output of zeros, whatever else there is, and a finite log-sum-exp if it has a sink.
        let is_zero = || self.out.row(batch, token, head).iter().all(|o| o.to_acc().to_f64() == 0.0);
        let dot = || match dot() {
            dot if dot.is_nan() && is_zero() => 0.0,
            dot => dot,
        };
        RowState::new(self.forward.mods.normalizer, lse, d_lse, dot)
    }
}

/// Which gradients are wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wanted {
    /// That of the queries.
    pub q: bool,
    /// That of the keys.
    pub k: bool,
    /// That of the values.
    pub v: bool,
}

/// Calls of fewer floating-point operations than this are over before another thread would start.
const SERIAL_FLOPS: usize = 1 << 21;

/// How many threads a call is worth.
pub(super) fn threads_for<T: Element>(args: &ExactArgs<'_, T>, threads: usize) -> usize {
    let shape = args.shape;
    let scores = |segment: usize| {
        let segment = args.segment(segment);
        let rows = segment.q_len * shape.group();
        // Of all rows, the last sees about as many keys as any.
        rows.saturating_mul(args.hull(&segment, 0, rows.saturating_sub(1)..rows).len())
    };
    let scores: usize = (0..args.segment_count()).map(scores).fold(0, usize::saturating_add);
    let flops = scores.saturating_mul(shape.num_kv_heads * 2 * (3 * shape.head_dim + 2 * shape.head_dim_v));
    if flops < SERIAL_FLOPS { 1 } else { threads }
}

/// Computes the gradients of queries, keys and values, with up to `threads` threads. Results do not depend on how many.
///
/// Keys that are in no segment get zeros, and so do queries.
pub fn backward<T: SimdElement>(
    args: &BackwardArgs<'_, T>,
    gradients: Gradients<'_, T>,
    level: Level,
    threads: usize,
    blocking: Blocking,
) {
    let wanted = Wanted { q: gradients.q.is_some(), k: gradients.k.is_some(), v: gradients.v.is_some() };
    let threads = threads_for(&args.forward, threads);
    let plan = plan_at(level, &args.forward, wanted, blocking);
    let deltas = delta::deltas(args, level, threads);
    for (writer, like) in [(gradients.k, args.forward.k), (gradients.v, args.forward.v)] {
        if let Some(writer) = writer {
            clear_uncovered(&args.forward, writer, like.shape());
        }
    }
    let Gradients { q, k, v } = gradients;
    let run = |turns: &RowTurns<'_, T::Acc>| {
        let backward = chunk::Backward { args, deltas: &deltas, query_sums: turns, k, v, wanted, table: None, plan: &plan };
        let work = Work { backward, sums: None };
        for_each_tile(level, threads, plan.tasks.len(), &work);
    };
    let Some(RowsMut { data, shape, strides }) = q else {
        run(&RowTurns::new(&mut [], [0; 4], [0; 3], 0));
        return;
    };
    if size_of::<T>() == size_of::<T::Acc>() {
        // The same type: sums are built where they are wanted.
        let data: &mut [T::Acc] = bytemuck::cast_slice_mut(data);
        let writer = RowWriter::new(&mut *data, shape, strides);
        let rows = shape[0] * shape[1] * shape[2];
        for_each_tile(level, threads, rows.div_ceil(delta::ROWS), &Clear { out: &writer, shape });
        drop(writer);
        run(&RowTurns::new(data, shape, strides, plan.panels()));
        return;
    }
    let [_, tokens, heads, width] = shape;
    // Head by head, as tasks go through them.
    let by_head = [tokens * heads * width, width, tokens * width];
    let mut sums = vec![T::Acc::ZERO; shape.iter().product()];
    run(&RowTurns::new(&mut sums, shape, by_head, plan.panels()));
    let out = RowWriter::new(data, shape, strides);
    let rows = shape[0] * tokens * heads;
    for_each_tile(level, threads, rows.div_ceil(delta::ROWS), &Narrow { sums: &sums, out: &out, shape });
}

/// Writes zeros for keys that no segment holds.
fn clear_uncovered<T: Element>(args: &ExactArgs<'_, T>, writer: &RowWriter<'_, T>, shape: [usize; 4]) {
    let [batches, tokens, heads, _] = shape;
    let mut covered = vec![false; batches * tokens];
    for segment in (0..args.segment_count()).map(|index| args.segment(index)) {
        let first = segment.k_batch * tokens + segment.k_first;
        covered[first + segment.k_start..first + segment.k_end].fill(true);
    }
    for (row, _) in covered.iter().enumerate().filter(|&(_, &covered)| !covered) {
        for head in 0..heads {
            writer.row(row / tokens, row % tokens, head).fill(T::zeroed());
        }
    }
}

/// The cut for the panels of a level.
fn plan_at<T: SimdElement>(level: Level, args: &ExactArgs<'_, T>, wanted: Wanted, blocking: Blocking) -> Plan {
    let plan = OnceLock::new();
    level.run(&Planning { args, wanted, blocking, plan: &plan }, 0);
    plan.into_inner().expect("planned by the task")
}

/// Panels differ between instruction sets, and with them the tasks.
struct Planning<'a, T: SimdElement> {
    args: &'a ExactArgs<'a, T>,
    wanted: Wanted,
    blocking: Blocking,
    plan: &'a OnceLock<Plan>,
}

impl<T: SimdElement> Task for Planning<'_, T> {
    const MULTIPLIES_BF16: bool = matches!(T::DTYPE, DType::BF16);
    const MULTIPLIES_TILES: bool = Self::MULTIPLIES_BF16;

    #[inline(always)]
    fn run<I: Isa>(&self, _index: usize) {
        let (args, wanted, blocking) = (self.args, self.wanted, self.blocking);
        self.plan.get_or_init(|| {
            if const { I::HAS_TILES && Self::MULTIPLIES_TILES } {
                Plan::new::<T, MatrixTiles<I>>(args, wanted, blocking)
            } else {
                Plan::new::<T, VectorTiles<I>>(args, wanted, blocking)
            }
        });
    }
}

/// A task is a chunk, or, where score gradients are summed, all the chunks that a region of the sums needs.
struct Work<'a, T: SimdElement> {
    backward: chunk::Backward<'a, T>,
    sums: Option<sums::Sums<'a, T::Acc>>,
}

impl<T: SimdElement> Task for Work<'_, T> {
    const MULTIPLIES_BF16: bool = matches!(T::DTYPE, DType::BF16);
    const MULTIPLIES_TILES: bool = Self::MULTIPLIES_BF16;

    #[inline(always)]
    fn run<I: Isa>(&self, index: usize) {
        let all = &self.backward.plan.tasks;
        let mut entries: &mut [T::Acc] = &mut [];
        let (mut wide, mut chunks) = (Vec::new(), vec![all.get(index)]);
        if let Some(sums) = &self.sums {
            let (own, own_wide, own_chunks) = sums.task(index, &self.backward);
            (entries, wide) = (own, own_wide);
            chunks = own_chunks.map(Some).collect();
        }
        for task in chunks.into_iter().flatten() {
            if const { I::HAS_TILES && Self::MULTIPLIES_TILES } {
                self.backward.run::<I, MatrixTiles<I>>(task, (&mut wide, entries));
            } else {
                self.backward.run::<I, VectorTiles<I>>(task, (&mut wide, entries));
            }
        }
        for (entry, &sum) in entries.iter_mut().zip(&wide) {
            *entry = T::Acc::from_f64(sum);
        }
    }
}

/// Clears the rows of an array, not what lies between them.
struct Clear<'a, A: Float> {
    out: &'a RowWriter<'a, A>,
    shape: [usize; 4],
}

impl<A: Float> Task for Clear<'_, A> {
    const MULTIPLIES_BF16: bool = false;

    #[inline(always)]
    fn run<I: Isa>(&self, index: usize) {
        for [batch, token, head] in rows_of_task(index, self.shape) {
            self.out.row(batch, token, head).fill(A::ZERO);
        }
    }
}

/// Batch, token and head of the rows of a task, of those of a `[B, S, H, D]` array.
fn rows_of_task(index: usize, [batches, tokens, heads, _]: [usize; 4]) -> impl Iterator<Item = [usize; 3]> {
    let rows = index * delta::ROWS..((index + 1) * delta::ROWS).min(batches * tokens * heads);
    rows.map(move |row| [row / heads / tokens, row / heads % tokens, row % heads])
}

/// Rounds sums of the gradients of queries.
struct Narrow<'a, T: SimdElement> {
    sums: &'a [T::Acc],
    out: &'a RowWriter<'a, T>,
    shape: [usize; 4],
}

impl<T: SimdElement> Task for Narrow<'_, T> {
    const MULTIPLIES_BF16: bool = matches!(T::DTYPE, DType::BF16);

    #[inline(always)]
    fn run<I: Isa>(&self, index: usize) {
        let [_, tokens, heads, width] = self.shape;
        for [batch, token, head] in rows_of_task(index, self.shape) {
            let start = ((batch * heads + head) * tokens + token) * width;
            for (out, &x) in self.out.row(batch, token, head).iter_mut().zip(&self.sums[start..start + width]) {
                *out = T::from_acc(x);
            }
        }
    }
}
