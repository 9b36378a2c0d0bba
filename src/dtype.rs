//! Element types of inputs and the wider types that scores and accumulators use.

use bytemuck::Pod;
use half::{bf16, f16};

/// Dtype of an input array.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DType {
    /// IEEE single precision.
    F32,
    /// IEEE double precision.
    F64,
    /// IEEE half precision.
    F16,
    /// bfloat16.
    BF16,
}

impl DType {
    /// The name that NumPy and PyTorch use.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "float32",
            Self::F64 => "float64",
            Self::F16 => "float16",
            Self::BF16 => "bfloat16",
        }
    }
}

impl std::fmt::Display for DType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// A type that attention is computed in.
pub trait Float: Pod + PartialOrd + Send + Sync + std::fmt::Debug + 'static {
    /// 0.
    const ZERO: Self;
    /// Negative infinity, the score of a masked key.
    const NEG_INFINITY: Self;
    /// The lowest finite value.
    const LOWEST: Self;
    /// -0.
    const MINUS_ZERO: Self;
    /// Rounds from double precision.
    fn from_f64(x: f64) -> Self;
    /// Widens exactly.
    fn to_f64(self) -> f64;
}

macro_rules! float {
    ($($t:ty),*) => {$(
        impl Float for $t {
            const ZERO: Self = 0.0;
            const NEG_INFINITY: Self = <$t>::NEG_INFINITY;
            const LOWEST: Self = <$t>::MIN;
            const MINUS_ZERO: Self = -0.0;
            #[inline(always)]
            fn from_f64(x: f64) -> Self {
                x as $t
            }
            #[inline(always)]
            fn to_f64(self) -> f64 {
                self as f64
            }
        }
    )*};
}
float!(f32, f64);

/// A type that inputs and outputs are stored in.
///
/// Scores, running maximum and sum, and accumulators are [`Element::Acc`]: f32 for the types of up to 32 bits, f64 for f64.
pub trait Element: Pod + Send + Sync + std::fmt::Debug + 'static {
    /// The accumulator type.
    type Acc: Float + Element<Acc = Self::Acc>;
    /// The dtype's tag.
    const DTYPE: DType;
    /// Widens exactly.
    fn to_acc(self) -> Self::Acc;
    /// Rounds to nearest even.
    fn from_acc(x: Self::Acc) -> Self;
}

macro_rules! element {
    ($($t:ty, $acc:ty, $tag:ident, $widen:expr, $narrow:expr;)*) => {$(
        impl Element for $t {
            type Acc = $acc;
            const DTYPE: DType = DType::$tag;
            #[inline(always)]
            fn to_acc(self) -> $acc {
                $widen(self)
            }
            #[inline(always)]
            fn from_acc(x: $acc) -> Self {
                $narrow(x)
            }
        }
    )*};
}
element! {
    f32, f32, F32, std::convert::identity, std::convert::identity;
    f64, f64, F64, std::convert::identity, std::convert::identity;
    f16, f32, F16, f16::to_f32, f16::from_f32;
    bf16, f32, BF16, bf16::to_f32, bf16::from_f32;
}
