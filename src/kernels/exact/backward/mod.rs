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

pub mod naive;
pub mod sums;

use super::ExactArgs;
use crate::dtype::{Element, Float};
use crate::index::Query;
use crate::kernels::score_mod::Normalizer;
use crate::parallel::RowWriter;
use crate::simd::{Level, SimdElement};
use crate::tensor::Tensor;

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

/// Where the gradients of queries, keys and values go.
pub struct Gradients<'a, T: Element> {
    /// `[B, Sq, H, D]`.
    pub q: Option<RowWriter<'a, T>>,
    /// `[B, Sk, Hkv, D]`.
    pub k: Option<RowWriter<'a, T>>,
    /// `[B, Sk, Hkv, Dv]`.
    pub v: Option<RowWriter<'a, T>>,
}

/// What turns the scores of a query into weights and their gradients.
#[derive(Debug, Clone, Copy)]
pub struct RowState {
    /// The log-sum-exp; 0 for a query without a key.
    pub lse: f64,
    /// `delta` above: what `do . v` is compared with.
    pub delta: f64,
}

impl RowState {
    /// What weights that are no exponentials are multiplied by.
    pub fn share(&self, normalizer: Normalizer) -> f64 {
        if normalizer.divides() { (-self.lse).exp() } else { 1.0 }
    }
}

impl<T: Element> BackwardArgs<'_, T> {
    /// The state of a query's row.
    pub fn row_state(&self, query: &Query<'_>) -> RowState {
        let [batch, head, token] = query.at();
        let lse = self.lse.row(batch, token, head)[0].to_f64();
        let normalizer = self.forward.mods.normalizer;
        let d_lse = self.d_lse.map_or(0.0, |d_lse| d_lse.row(batch, token, head)[0].to_f64());
        if lse == f64::NEG_INFINITY {
            return RowState { lse: 0.0, delta: 0.0 };
        }
        if !normalizer.divides() {
            // lse = ln l, and every weight has its share of l.
            let share = if d_lse == 0.0 { 0.0 } else { (-lse).exp() };
            return RowState { lse, delta: -d_lse * share };
        }
        let (out, d_out) = (self.out.row(batch, token, head), self.d_out.row(batch, token, head));
        let dot: f64 = out.iter().zip(d_out).map(|(&o, &g)| o.to_acc().to_f64() * g.to_acc().to_f64()).sum();
        RowState { lse, delta: dot - d_lse }
    }
}

/// Computes the gradients of queries, keys and values.
pub fn backward<T: SimdElement>(args: &BackwardArgs<'_, T>, gradients: &Gradients<'_, T>, _level: Level, _threads: usize) {
    naive::backward(args, gradients);
}
