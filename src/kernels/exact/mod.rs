//! Exact attention: `out = softmax(scale * q k^T + bias) v` over the keys that the mask shows.

pub mod naive;
mod panel;
mod plan;
pub mod prefill;

pub use plan::Blocking;

use super::bias::Bias;
use super::mask::Mask;
use crate::dtype::Element;
use crate::parallel::RowWriter;
use crate::tensor::{AttnShape, Tensor};

/// What is attended, and how.
#[derive(Debug, Clone, Copy)]
pub struct ExactArgs<'a, T: Element> {
    /// The sizes, checked.
    pub shape: AttnShape,
    /// `[B, Sq, H, D]`.
    pub q: Tensor<'a, T>,
    /// `[B, Sk, Hkv, D]`.
    pub k: Tensor<'a, T>,
    /// `[B, Sk, Hkv, Dv]`.
    pub v: Tensor<'a, T>,
    /// Factor of the scores.
    pub scale: f64,
    /// Which keys are seen, by position.
    pub mask: Mask,
    /// What is added to scaled scores.
    pub bias: Bias<'a, T>,
}

/// Where results go.
pub struct ExactOut<'a, T: Element> {
    /// `[B, Sq, H, Dv]`.
    pub out: RowWriter<'a, T>,
    /// `[B, H, Sq]`, as rows of one element of a `[B, Sq, H, 1]` array.
    pub lse: Option<RowWriter<'a, T::Acc>>,
}
