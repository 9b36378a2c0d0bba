//! Higher derivatives of exact attention in float32 and float64: along a direction, that is for tangents of all inputs, the derivative
//! of the result (forward mode) and that of its gradients. With a dot for the derivative along the direction:
//!
//! ```text
//! S'_ij    = scale (q'_i . k_j + q_i . k'_j) + bias'_ij
//! lse'_i   = sum over j of P_ij S'_ij
//! W_ij     = P'_ij = P_ij (S'_ij - lse'_i)
//! o'_i     = sum over j of W_ij v_j + P_ij v'_j
//! g_ij     = do_i . v_j,  g'_ij = do_i . v'_j
//! delta_i  = do_i . o_i - dlse_i,  delta'_i = do_i . o'_i
//! dS_ij    = P_ij (g_ij - delta_i)
//! dS'_ij   = P_ij ((g_ij - delta_i) (S'_ij - lse'_i) + g'_ij - delta'_i)
//! dq'_i    = scale sum over j of dS'_ij k_j + dS_ij k'_j,  dk'_j likewise over i with q
//! dv'_j    = sum over i of W_ij do_i
//! ```
//!
//! The gradients of the gradients are these: with `L = do . o + dlse . lse`, the product of cotangents `u` with `dL/dx` is the
//! derivative of `L` along `u`, whose gradients with respect to `(do, q, k, v, dlse, bias)` are `(o', dq', dk', dv', lse', dS')`.
//!
//! Tiles of queries and keys are computed anew in every sweep; what is kept is two numbers for each query.

pub mod biases;
pub mod double_backward;
pub mod jvp;
mod tile;

pub use double_backward::{SecondGradients, double_backward};
pub use jvp::jvp;

use super::ExactArgs;
use crate::dtype::Element;
use crate::error::{Error, Result};
use crate::kernels::bias::Bias;
use crate::kernels::score_mod::Normalizer;
use crate::tensor::Tensor;

/// Tangents of the inputs, or cotangents of their gradients; what is missing is 0.
#[derive(Debug, Clone, Copy)]
pub struct Direction<'a, T: Element> {
    /// `[B, Sq, H, D]`.
    pub q: Option<Tensor<'a, T>>,
    /// `[B, Sk, Hkv, D]`.
    pub k: Option<Tensor<'a, T>>,
    /// `[B, Sk, Hkv, Dv]`.
    pub v: Option<Tensor<'a, T>>,
    /// Of what is added to scores.
    pub biases: [Bias<'a, T>; 2],
}

/// Refuses what has no higher derivatives.
///
/// # Errors
/// [`Error::Unsupported`] naming the argument.
pub fn check<T: Element>(args: &ExactArgs<'_, T>) -> Result<()> {
    let refused = |arg: &str| {
        Err(Error::Unsupported {
            what: format!("{arg} with higher derivatives"),
            instead: "those of softmax over scaled, masked and biased scores are".into(),
        })
    };
    match args {
        _ if args.mods.softcap.is_some() => refused("softcap"),
        _ if args.mods.normalizer != Normalizer::Softmax => refused("normalizer"),
        _ if args.mods.dropout.is_some() => refused("dropout_p"),
        _ if args.pages.is_some() => refused("block_table"),
        _ => Ok(()),
    }
}
