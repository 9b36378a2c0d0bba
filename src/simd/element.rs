//! Which vectors and which product form serve an element type on an instruction set.

use super::{Isa, Vector, VectorKernel, Widen};
use crate::dtype::{Element, Float};
use half::{bf16, f16};
use std::ops::{Add, Div, Mul, Sub};

/// An [`Element`] that vectors can be loaded from and stored to.
pub trait SimdElement: Element {
    /// Vectors of the accumulator type.
    type V<I: Isa>: Vector<Elem = Self::Acc>;
    /// How products are formed.
    type Kernel<I: Isa>: VectorKernel<Self, V = Self::V<I>>;
    /// Coefficients of `2^f` on `[-1/2, 1/2]`, ascending, minimax in relative error among those of constant term 1: `2^0`
    /// is exact, so that sums whose maximum stays are not rescaled. Well below half a unit in the last place of the output type.
    const EXP2: &'static [Self::Acc];

    /// Widens the first `LANES` elements.
    fn load<I: Isa>(src: &[Self]) -> Self::V<I>;
    /// Rounds into the first `LANES` elements.
    fn store<I: Isa>(v: Self::V<I>, dst: &mut [Self]);
    /// As [`SimdElement::store`], see [`Vector::store_past_caches`].
    fn store_past_caches<I: Isa>(v: Self::V<I>, dst: &mut [Self]);
}

/// A type that is its own accumulator.
pub trait Wide:
    SimdElement<Acc = Self> + Float + Add<Output = Self> + Sub<Output = Self> + Mul<Output = Self> + Div<Output = Self>
{
}
impl Wide for f32 {}
impl Wide for f64 {}

/// Relative error 1.1e-7.
#[expect(clippy::approx_constant, reason = "coefficients")]
const EXP2_F32: &[f32] = &[1.0, 0.693_147, 0.240_222_42, 0.055_507_336, 0.009_671_513, 0.001_326_472_7];
/// Relative error 2.9e-6, for the half types. One degree less would do for results in bfloat16, but not for their log-sum-exp.
const EXP2_HALF: &[f32] = &[1.0, 0.693_124_2, 0.240_240_99, 0.055_906_426, 0.009_582_853];
/// Relative error 3.1e-18.
#[expect(clippy::excessive_precision, clippy::approx_constant, reason = "coefficients")]
const EXP2_F64: &[f64] = &[
    1.0,
    0.693_147_180_559_945_33,
    0.240_226_506_959_101_562,
    0.055_504_108_664_819_921_5,
    0.009_618_129_107_588_335_08,
    0.001_333_355_814_678_994_98,
    0.000_154_035_304_625_146_13,
    1.525_273_349_896_080_46e-5,
    1.321_543_308_959_462_9e-6,
    1.017_819_803_332_852_77e-7,
    7.074_105_626_245_659_37e-9,
    4.435_280_944_610_336_16e-10,
];

impl SimdElement for f32 {
    type V<I: Isa> = I::F32;
    type Kernel<I: Isa> = Widen<I, f32>;
    const EXP2: &'static [f32] = EXP2_F32;
    #[inline(always)]
    fn load<I: Isa>(src: &[f32]) -> I::F32 {
        I::F32::load(src)
    }
    #[inline(always)]
    fn store<I: Isa>(v: I::F32, dst: &mut [f32]) {
        v.store(dst);
    }
    #[inline(always)]
    fn store_past_caches<I: Isa>(v: I::F32, dst: &mut [f32]) {
        v.store_past_caches(dst);
    }
}

impl SimdElement for f64 {
    type V<I: Isa> = I::F64;
    type Kernel<I: Isa> = Widen<I, f64>;
    const EXP2: &'static [f64] = EXP2_F64;
    #[inline(always)]
    fn load<I: Isa>(src: &[f64]) -> I::F64 {
        I::F64::load(src)
    }
    #[inline(always)]
    fn store<I: Isa>(v: I::F64, dst: &mut [f64]) {
        v.store(dst);
    }
    #[inline(always)]
    fn store_past_caches<I: Isa>(v: I::F64, dst: &mut [f64]) {
        v.store_past_caches(dst);
    }
}

impl SimdElement for f16 {
    type V<I: Isa> = I::F32;
    type Kernel<I: Isa> = Widen<I, f16>;
    const EXP2: &'static [f32] = EXP2_HALF;
    #[inline(always)]
    fn load<I: Isa>(src: &[f16]) -> I::F32 {
        I::load_f16(src)
    }
    #[inline(always)]
    fn store<I: Isa>(v: I::F32, dst: &mut [f16]) {
        I::store_f16(v, dst, false);
    }
    #[inline(always)]
    fn store_past_caches<I: Isa>(v: I::F32, dst: &mut [f16]) {
        I::store_f16(v, dst, true);
    }
}

impl SimdElement for bf16 {
    type V<I: Isa> = I::F32;
    type Kernel<I: Isa> = I::Bf16;
    const EXP2: &'static [f32] = EXP2_HALF;
    #[inline(always)]
    fn load<I: Isa>(src: &[bf16]) -> I::F32 {
        I::load_bf16(src)
    }
    #[inline(always)]
    fn store<I: Isa>(v: I::F32, dst: &mut [bf16]) {
        I::store_bf16(v, dst, false);
    }
    #[inline(always)]
    fn store_past_caches<I: Isa>(v: I::F32, dst: &mut [bf16]) {
        I::store_bf16(v, dst, true);
    }
}
