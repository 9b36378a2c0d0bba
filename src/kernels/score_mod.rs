//! What is done to scores before they become weights, and how they become weights.

use super::dropout::Dropout;

/// One number for each query of each head, broadcast by strides.
#[derive(Debug, Clone, Copy)]
pub struct RowTable<'a> {
    /// The numbers.
    pub data: &'a [f64],
    /// Elements between neighbours along batch, head and query.
    pub strides: [usize; 3],
}

impl RowTable<'_> {
    /// The number of one query.
    #[inline(always)]
    pub fn get(&self, batch: usize, head: usize, token: usize) -> f64 {
        self.data[batch * self.strides[0] + head * self.strides[1] + token * self.strides[2]]
    }
}

/// The factor of scores.
#[derive(Debug, Clone, Copy)]
pub struct Scale<'a> {
    /// Of all.
    pub factor: f64,
    /// Of each query.
    pub rows: Option<RowTable<'a>>,
    /// Of queries by the number of keys that they see.
    pub by_length: Option<&'a [f64]>,
}

impl Scale<'_> {
    /// One factor for all.
    pub fn uniform(factor: f64) -> Self {
        Self { factor, rows: None, by_length: None }
    }

    /// Whether all queries share the factor.
    #[inline(always)]
    pub fn is_uniform(&self) -> bool {
        self.rows.is_none() && self.by_length.is_none()
    }
}

/// How scores become weights.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub enum Normalizer {
    /// `exp(s)`, divided by their sum.
    #[default]
    Softmax,
    /// `1 / (1 + exp(-s - bias))`.
    Sigmoid {
        /// What is added to scores.
        bias: f64,
    },
    /// `ln(1 + exp(s))`, divided by their sum.
    Softplus,
    /// `max(s, 0)^power`.
    Relu {
        /// The exponent.
        power: f64,
        /// Whether they are divided by their sum.
        normalize: bool,
    },
    /// `|s|^power`, divided by their sum: the softmax of `power * ln |s|`.
    Power {
        /// The exponent.
        power: f64,
    },
}

impl Normalizer {
    /// Whether weights are exponentials that shrink as the maximum grows.
    #[inline(always)]
    pub fn is_exponential(self) -> bool {
        matches!(self, Self::Softmax | Self::Power { .. })
    }

    /// Whether weights are divided by their sum.
    #[inline(always)]
    pub fn divides(self) -> bool {
        !matches!(self, Self::Sigmoid { .. } | Self::Relu { normalize: false, .. })
    }

    /// The weight of a score, where that is no exponential; for `Power`, the logarithm in base 2 of the weight.
    #[inline(always)]
    pub fn weight(self, score: f64) -> f64 {
        match self {
            Self::Softmax => score,
            Self::Sigmoid { bias } => 1.0 / (1.0 + (-score - bias).exp()),
            Self::Softplus => score.max(0.0) + (-score.abs()).exp().ln_1p(),
            Self::Relu { power, .. } => {
                let positive = if score < 0.0 { 0.0 } else { score };
                positive.powf(power)
            }
            Self::Power { power } => power * score.abs().log2(),
        }
    }

    /// The weight of a score, of softmax without its maximum.
    pub fn value(self, score: f64) -> f64 {
        match self {
            Self::Softmax => score.exp(),
            Self::Power { power } => score.abs().powf(power),
            other => other.weight(score),
        }
    }

    /// The derivative of [`Normalizer::value`]; 0 at a kink.
    pub fn rate(self, score: f64) -> f64 {
        match self {
            Self::Softmax => score.exp(),
            Self::Sigmoid { .. } => {
                let weight = self.weight(score);
                weight * (1.0 - weight)
            }
            Self::Softplus => 1.0 / (1.0 + (-score).exp()),
            Self::Relu { power, .. } => {
                if score <= 0.0 {
                    0.0
                } else {
                    power * score.powf(power - 1.0)
                }
            }
            Self::Power { .. } if score == 0.0 => 0.0,
            Self::Power { power } => power * score.abs().powf(power - 1.0).copysign(score),
        }
    }
}

/// Re-weighting spares queries that see up to so many keys.
pub const FEW_KEYS: usize = 3;

/// A second weighing of weights `w` with the sum `l` over `n` keys: `max(n w / l - 1, 0)^power`, without the 1 for few keys.
#[derive(Debug, Clone, Copy)]
pub struct Reweighting<'a> {
    /// The exponent.
    pub power: f64,
    /// `n / l` of each query, once the first weights are summed.
    pub gains: Option<RowTable<'a>>,
}

/// The second weighing of one query's weights.
#[derive(Debug, Clone, Copy)]
pub struct Emphasis {
    power: f64,
    gain: f64,
    threshold: f64,
}

impl Emphasis {
    /// The gain of weights with that sum.
    pub fn gain(keys: usize, sum: f64) -> f64 {
        if sum == 0.0 { 0.0 } else { keys as f64 / sum }
    }

    /// Of a query that sees so many keys.
    pub fn new(power: f64, gain: f64, keys: usize) -> Self {
        Self { power, gain, threshold: if keys > FEW_KEYS { 1.0 } else { 0.0 } }
    }

    /// The new weight.
    #[inline(always)]
    pub fn weigh(&self, weight: f64) -> f64 {
        let lifted = self.gain * weight - self.threshold;
        // NaN goes on.
        if lifted < 0.0 { 0.0 } else { lifted.powf(self.power) }
    }
}

/// What changes scores, beside biases.
#[derive(Debug, Clone, Copy)]
pub struct ScoreMod<'a> {
    /// The factor.
    pub scale: Scale<'a>,
    /// `softcap * tanh(s / softcap)`.
    pub softcap: Option<f64>,
    /// Slopes by batch and head: `-slope * |distance|` is added.
    pub alibi_slopes: Option<RowTable<'a>>,
    /// Logits without a value.
    pub sinks: Option<RowTable<'a>>,
    /// How scores become weights.
    pub normalizer: Normalizer,
    /// What becomes of the weights of softplus.
    pub reweighting: Option<Reweighting<'a>>,
    /// Which weights are dropped on the way to the output.
    pub dropout: Option<Dropout>,
}

impl ScoreMod<'_> {
    /// Softmax of scaled scores.
    pub fn plain(scale: f64) -> Self {
        Self {
            scale: Scale::uniform(scale),
            softcap: None,
            alibi_slopes: None,
            sinks: None,
            normalizer: Normalizer::Softmax,
            reweighting: None,
            dropout: None,
        }
    }
}
