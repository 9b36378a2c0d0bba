//! What a recurrent call is made of.

use crate::dtype::{Element, Float};
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

/// What is made of step sizes as they are read: nothing for each token is in memory but what the caller has.
#[derive(Debug, Clone, Copy)]
pub struct StepSizes<'a> {
    /// `[HV]`: added first.
    pub bias: Option<&'a [f64]>,
    /// Whether softplus is taken after that.
    pub softplus: bool,
    /// What they are clipped to after that.
    pub limits: [f64; 2],
    /// `[HV]`: factors, after that.
    pub rates: Option<&'a [f64]>,
}

impl StepSizes<'_> {
    /// Of one step size of a head.
    pub fn of(&self, head: usize, given: f64) -> f64 {
        let x = given + self.bias.map_or(0.0, |bias| bias[head]);
        let x = if self.softplus { x.max(0.0) + (-x.abs()).exp().ln_1p() } else { x };
        let [least, most] = self.limits;
        // NaN is within all limits.
        let x = if x < least {
            least
        } else if x > most {
            most
        } else {
            x
        };
        self.rates.map_or(x, |rates| x * rates[head])
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

/// A number for each token of each head, `[B, T, HV, 1]`, or what is made of it.
#[derive(Debug, Clone, Copy)]
pub struct PerStep<'a, T: Element> {
    /// The numbers.
    pub numbers: Numbers<'a, T>,
    /// If they are step sizes.
    pub made: Option<StepSizes<'a>>,
}

impl<'a, T: Element> From<Numbers<'a, T>> for PerStep<'a, T> {
    fn from(numbers: Numbers<'a, T>) -> Self {
        Self { numbers, made: None }
    }
}

impl<T: Element> PerStep<'_, T> {
    /// The number of one token of one head.
    #[inline(always)]
    pub fn first(&self, batch: usize, token: usize, head: usize) -> T::Acc {
        let number = self.numbers.first(batch, token, head);
        self.made.as_ref().map_or(number, |made| T::Acc::from_f64(made.of(head, number.to_f64())))
    }
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
    Steps(PerStep<'a, T>),
    /// By a gate for each token and channel of the keys: `[B, T, HV, K]`.
    Channels(Numbers<'a, T>),
}

/// What is written to the state.
#[derive(Debug, Clone, Copy)]
pub enum Rule<'a, T: Element> {
    /// `beta k v^T`; `beta` is `[B, T, HV, 1]`, or 1.
    Additive(Option<PerStep<'a, T>>),
    /// `beta k (v - S^T k)^T`, of the faded state; `beta` is `[B, T, HV, 1]`, or 1.
    Delta(Option<PerStep<'a, T>>),
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn step_sizes_are_those_of_the_definition() {
        let (bias, rates) = ([0.0, 0.5], [-2.0, -0.25]);
        let all = StepSizes { bias: Some(&bias), softplus: true, limits: [0.1, 3.0], rates: Some(&rates) };
        for x in [-800.0, -30.0, -1.0, 0.0, 0.7, 20.0, 800.0] {
            for head in 0..2 {
                let y: f64 = x + bias[head];
                let softplus = if y > 30.0 { y } else { (1.0 + y.exp()).ln() };
                let want = softplus.clamp(0.1, 3.0) * rates[head];
                assert!((all.of(head, x) - want).abs() < 1e-12, "{x}: {} is not {want}", all.of(head, x));
            }
        }
        let none = StepSizes { bias: None, softplus: false, limits: [0.0, f64::INFINITY], rates: None };
        assert_eq!([-1.5, 0.0, 2.5].map(|x| none.of(0, x).to_bits()), [0.0f64, 0.0, 2.5].map(f64::to_bits));
        let open = StepSizes { limits: [0.0, f64::INFINITY], rates: None, ..all };
        assert!(none.of(0, f64::NAN).is_nan() && open.of(0, f64::NAN).is_nan());
        assert!((open.of(0, -40.0) / (-40f64).exp() - 1.0).abs() < 1e-12);
    }
}
