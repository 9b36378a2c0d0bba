//! Exact attention: `out = softmax(scale * q k^T + bias) v` over the keys that the mask shows.

pub mod decode;
pub mod merge;
pub mod naive;
mod panel;
mod plan;
pub mod prefill;
mod splits;

pub use plan::Blocking;

use super::bias::Bias;
use super::mask::Mask;
use crate::dtype::Element;
use crate::index::KeyLayout;
use crate::parallel::RowWriter;
use crate::simd::{Level, SimdElement};
use crate::tensor::{AttnShape, Tensor};
use std::ops::Range;

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
    /// Where the keys of each sequence lie; `None` for all of `k`, row after row.
    pub layout: Option<&'a KeyLayout>,
}

impl<T: Element> ExactArgs<'_, T> {
    /// Keys that query `token` of sequence `batch` sees. With a layout, a causal mask lets the last query see all keys.
    #[inline(always)]
    pub fn visible(&self, batch: usize, token: usize) -> Range<usize> {
        let Some(layout) = self.layout else { return 0..self.mask.key_limit(token, self.shape.seqlen_k) };
        let range = &layout.ranges[batch];
        let end = match self.mask {
            Mask::None => range.end,
            Mask::Causal { .. } => (range.end + token + 1).saturating_sub(self.shape.seqlen_q),
        };
        range.start.min(end)..end
    }

    /// Indices of a key along the first two axes of `k` and `v`, and how many keys from that one on lie one after the other.
    #[inline(always)]
    pub fn run_from(&self, batch: usize, token: usize) -> ((usize, usize), usize) {
        self.layout.map_or(((batch, token), usize::MAX), |layout| layout.run_from(batch, token))
    }
}

/// Up to this many query rows of a key/value head are always decoded: a panel of the prefill would be mostly empty.
const FEW_ROWS: usize = 8;
/// From this many keys on, splitting them over threads pays for more rows.
const LONG_KEYS: usize = 512;

/// Computes `out` by the form that suits the shape, with up to `threads` threads. Results do not depend on how many.
pub fn forward<T: SimdElement>(args: &ExactArgs<'_, T>, out: &ExactOut<'_, T>, level: Level, threads: usize, blocking: Blocking) {
    let shape = args.shape;
    let rows = shape.seqlen_q * shape.group();
    let few = rows <= FEW_ROWS || (rows <= splits::MAX_ROWS && shape.seqlen_k >= LONG_KEYS);
    if few || args.layout.is_some() {
        decode::forward(args, out, level, threads, None);
    } else {
        prefill::forward(args, out, level, threads, blocking);
    }
}

/// Where results go.
pub struct ExactOut<'a, T: Element> {
    /// `[B, Sq, H, Dv]`.
    pub out: RowWriter<'a, T>,
    /// `[B, H, Sq]`, as rows of one element of a `[B, Sq, H, 1]` array.
    pub lse: Option<RowWriter<'a, T::Acc>>,
}
