//! Plain Rust: the lowest level and the one that Miri and valgrind can follow. Four lanes, which any compiler maps to SSE2.

use super::{Isa, Level, Routine, Vector, Widen};
use crate::dtype::{Element, Float};
use half::{bf16, f16};

const LANES: usize = 4;

/// Four lanes.
#[derive(Debug, Clone, Copy)]
pub struct Lanes<E>([E; LANES]);

/// The portable instruction set.
#[derive(Debug, Clone, Copy)]
pub struct Portable;

/// What the lane types have beyond [`Float`].
pub trait PortableFloat: Float {
    /// Exponents at or below this flush to 0.
    const FLOOR: Self;
    /// `x * y + z` in two roundings: a fused one is a library call on the baseline.
    fn mul_add_unfused(x: Self, y: Self, z: Self) -> Self;
    fn add(x: Self, y: Self) -> Self;
    fn sub(x: Self, y: Self) -> Self;
    fn mul(x: Self, y: Self) -> Self;
    fn div(x: Self, y: Self) -> Self;
    fn round_even(self) -> Self;
    /// `2^self` for an integral value in `[FLOOR, max exponent]`, 0 at `FLOOR`.
    fn exp2_integral(self) -> Self;
}

impl PortableFloat for f32 {
    const FLOOR: Self = -127.0;
    #[inline(always)]
    fn mul_add_unfused(x: Self, y: Self, z: Self) -> Self {
        x * y + z
    }
    #[inline(always)]
    fn add(x: Self, y: Self) -> Self {
        x + y
    }
    #[inline(always)]
    fn sub(x: Self, y: Self) -> Self {
        x - y
    }
    #[inline(always)]
    fn mul(x: Self, y: Self) -> Self {
        x * y
    }
    #[inline(always)]
    fn div(x: Self, y: Self) -> Self {
        x / y
    }
    #[inline(always)]
    fn round_even(self) -> Self {
        // Adding 1.5 * 2^23 leaves no fractional bits; valid for |self| < 2^22.
        (self + 12_582_912.0) - 12_582_912.0
    }
    #[inline(always)]
    fn exp2_integral(self) -> Self {
        Self::from_bits(((self as i32 + 127) << 23) as u32)
    }
}

impl PortableFloat for f64 {
    const FLOOR: Self = -1023.0;
    #[inline(always)]
    fn mul_add_unfused(x: Self, y: Self, z: Self) -> Self {
        x * y + z
    }
    #[inline(always)]
    fn add(x: Self, y: Self) -> Self {
        x + y
    }
    #[inline(always)]
    fn sub(x: Self, y: Self) -> Self {
        x - y
    }
    #[inline(always)]
    fn mul(x: Self, y: Self) -> Self {
        x * y
    }
    #[inline(always)]
    fn div(x: Self, y: Self) -> Self {
        x / y
    }
    #[inline(always)]
    fn round_even(self) -> Self {
        (self + 6_755_399_441_055_744.0) - 6_755_399_441_055_744.0
    }
    #[inline(always)]
    fn exp2_integral(self) -> Self {
        Self::from_bits(((self as i64 + 1023) << 52) as u64)
    }
}

impl<E: PortableFloat> Lanes<E> {
    #[inline(always)]
    fn map2(self, other: Self, op: impl Fn(E, E) -> E) -> Self {
        Self(std::array::from_fn(|i| op(self.0[i], other.0[i])))
    }
}

impl<E: PortableFloat> Vector for Lanes<E> {
    type Elem = E;
    type Block = [Self; LANES];
    const LANES: usize = LANES;
    const EXP2_FLOOR: E = E::FLOOR;

    #[inline(always)]
    fn splat(x: E) -> Self {
        Self([x; LANES])
    }
    #[inline(always)]
    fn load(src: &[E]) -> Self {
        Self(std::array::from_fn(|i| src[i]))
    }
    #[inline(always)]
    fn store(self, dst: &mut [E]) {
        dst[..LANES].copy_from_slice(&self.0);
    }
    #[inline(always)]
    fn add(self, other: Self) -> Self {
        self.map2(other, E::add)
    }
    #[inline(always)]
    fn sub(self, other: Self) -> Self {
        self.map2(other, E::sub)
    }
    #[inline(always)]
    fn mul(self, other: Self) -> Self {
        self.map2(other, E::mul)
    }
    #[inline(always)]
    fn div(self, other: Self) -> Self {
        self.map2(other, E::div)
    }
    #[inline(always)]
    fn mul_add(self, factor: Self, addend: Self) -> Self {
        Self(std::array::from_fn(|i| E::mul_add_unfused(self.0[i], factor.0[i], addend.0[i])))
    }
    #[inline(always)]
    fn max(self, other: Self) -> Self {
        self.map2(other, |x, y| if x > y { x } else { y })
    }
    #[inline(always)]
    fn select_gt(self, other: Self, yes: Self, no: Self) -> Self {
        Self(std::array::from_fn(|i| if self.0[i] > other.0[i] { yes.0[i] } else { no.0[i] }))
    }
    #[inline(always)]
    fn split_exponent(self) -> (Self, Self) {
        let whole = Self(self.0.map(E::round_even));
        (self.sub(whole), Self(whole.0.map(E::exp2_integral)))
    }
    #[inline(always)]
    fn scale_exponent(self, token: Self) -> Self {
        self.mul(token)
    }
    #[inline(always)]
    fn zero_block() -> Self::Block {
        [Self::splat(E::ZERO); LANES]
    }
    #[inline(always)]
    fn transpose(block: Self::Block) -> Self::Block {
        std::array::from_fn(|j| Self(std::array::from_fn(|i| block[i].0[j])))
    }
    #[inline(always)]
    fn sum_rows(block: Self::Block) -> Self {
        let [a, b, c, d] = Self::transpose(block);
        a.add(b).add(c.add(d))
    }
}

impl Isa for Portable {
    const LEVEL: Level = Level::Scalar;
    const REGISTERS: usize = 16;
    type F32 = Lanes<f32>;
    type F64 = Lanes<f64>;
    type Bf16 = Widen<Self, bf16>;

    #[inline(always)]
    fn load_f16(src: &[f16]) -> Self::F32 {
        Lanes(std::array::from_fn(|i| src[i].to_acc()))
    }
    #[inline(always)]
    fn store_f16(v: Self::F32, dst: &mut [f16], _past_caches: bool) {
        dst[..LANES].copy_from_slice(&v.0.map(f16::from_acc));
    }
    #[inline(always)]
    fn load_bf16(src: &[bf16]) -> Self::F32 {
        Lanes(std::array::from_fn(|i| src[i].to_acc()))
    }
    #[inline(always)]
    fn store_bf16(v: Self::F32, dst: &mut [bf16], _past_caches: bool) {
        dst[..LANES].copy_from_slice(&v.0.map(bf16::from_acc));
    }
    #[inline(never)]
    fn call<R: Routine>(routine: R) -> R::Output {
        routine.run::<Self>()
    }
}
