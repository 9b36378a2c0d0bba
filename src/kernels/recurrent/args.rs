//! What a recurrent call is made of.

use crate::dtype::Element;
use crate::simd::Level;
use crate::tensor::Tensor;

/// The sizes of a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RecurrentShape {
    /// Batch size of the arrays.
    pub batch: usize,
    /// Tokens.
    pub seqlen: usize,
    /// Heads of queries and keys; divides `num_value_heads`.
    pub num_heads: usize,
    /// Heads of values, gates and states.
    pub num_value_heads: usize,
    /// Width of queries and keys, `K`.
    pub head_dim: usize,
    /// Width of values, `V`.
    pub head_dim_v: usize,
}

impl RecurrentShape {
    /// The query and key head that a value head reads.
    pub fn head_of(&self, value_head: usize) -> usize {
        value_head / (self.num_value_heads / self.num_heads.max(1)).max(1)
    }
}

/// Numbers beside queries, keys and values: of their type, or of their accumulators'.
#[derive(Debug, Clone, Copy)]
pub enum Numbers<'a, T: Element> {
    /// Of the type of the inputs.
    Input(Tensor<'a, T>),
    /// Of the type of accumulators.
    Acc(Tensor<'a, T::Acc>),
}

impl<T: Element> Numbers<'_, T> {
    /// Writes the numbers of one token of one head.
    #[inline(always)]
    pub fn read(&self, batch: usize, token: usize, head: usize, into: &mut [T::Acc]) {
        match self {
            Self::Input(tensor) => {
                for (out, &x) in into.iter_mut().zip(tensor.row(batch, token, head)) {
                    *out = x.to_acc();
                }
            }
            Self::Acc(tensor) => {
                let row = tensor.row(batch, token, head);
                into[..row.len()].copy_from_slice(row);
            }
        }
    }

    /// The first number of one token of one head.
    #[inline(always)]
    pub fn first(&self, batch: usize, token: usize, head: usize) -> T::Acc {
        match self {
            Self::Input(tensor) => tensor.row(batch, token, head)[0].to_acc(),
            Self::Acc(tensor) => tensor.row(batch, token, head)[0],
        }
    }
}

/// How the state fades from one token to the next. Gates are natural logarithms, 0 or below.
#[derive(Debug, Clone, Copy)]
pub enum Decay<'a, T: Element> {
    /// It does not.
    None,
    /// By a constant for each value head.
    Heads(&'a [f64]),
    /// By a gate for each token: `[B, T, HV, 1]`.
    Steps(Numbers<'a, T>),
    /// By a gate for each token and channel of the keys: `[B, T, HV, K]`.
    Channels(Numbers<'a, T>),
}

/// What is written to the state.
#[derive(Debug, Clone, Copy)]
pub enum Rule<'a, T: Element> {
    /// `beta k v^T`; `beta` is `[B, T, HV, 1]`, or 1.
    Additive(Option<Numbers<'a, T>>),
    /// `beta k (v - S^T k)^T`, of the faded state; `beta` is `[B, T, HV, 1]`, or 1.
    Delta(Option<Numbers<'a, T>>),
    /// `k v^T + b (S^T a)^T`, of the state before it fades; both `[B, T, H, K]`.
    LowRank {
        /// What is read.
        a: Tensor<'a, T>,
        /// Where it is written.
        b: Tensor<'a, T>,
    },
}

/// Consecutive tokens that share a state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sequence {
    /// Row of the batch.
    pub batch: usize,
    /// First token.
    pub first: usize,
    /// Number of tokens.
    pub len: usize,
}

/// A call.
#[derive(Debug, Clone, Copy)]
pub struct RecurrentArgs<'a, T: Element> {
    /// The sizes.
    pub shape: RecurrentShape,
    /// `[B, T, H, K]`.
    pub q: Tensor<'a, T>,
    /// `[B, T, H, K]`.
    pub k: Tensor<'a, T>,
    /// `[B, T, HV, V]`.
    pub v: Tensor<'a, T>,
    /// How the state fades.
    pub decay: Decay<'a, T>,
    /// What is written.
    pub rule: Rule<'a, T>,
    /// `[H, K]`: queries read the state before the token is written, and the token by itself with these factors.
    pub bonus: Option<&'a [f64]>,
    /// Factor of the outputs.
    pub scale: f64,
    /// Whether queries and keys are divided by their lengths.
    pub l2norm: bool,
    /// The sequences, by the number of their state.
    pub sequences: &'a [Sequence],
}

impl<T: Element> RecurrentArgs<'_, T> {
    /// The level at which rows that are faded are multiplied. What rules read of the state they write back to it: with a `beta` of 2 nothing
    /// that matrix tiles have rounded ever fades.
    pub fn level(&self, level: Level) -> Level {
        match self.rule {
            Rule::Additive(_) => level,
            Rule::Delta(_) | Rule::LowRank { .. } => level.without_tiles(),
        }
    }

    /// Whether all that is made of queries and keys are factors of theirs, so that products can be of the rows as they are.
    pub fn has_plain_rows(&self) -> bool {
        let sizes = [self.shape.head_dim, self.shape.head_dim_v];
        let plain = !matches!(self.decay, Decay::Channels(_)) && !matches!(self.rule, Rule::LowRank { .. });
        plain && self.bonus.is_none() && !sizes.contains(&0)
    }
}
