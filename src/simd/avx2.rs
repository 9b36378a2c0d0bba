//! AVX2 with FMA and F16C: 16 registers of 8 f32 or 4 f64.
//!
//! FMA: 2 per cycle, latency 4 (Zen 2 to 5, Haswell and later). Loads: 2 per cycle (Zen 3 and later: 3).
#![expect(unsafe_code, reason = "intrinsics")]
#![allow(clippy::wildcard_imports, reason = "intrinsics")]
#![expect(
    clippy::undocumented_unsafe_blocks,
    reason = "one argument serves all: `Avx2` methods run only below `enter`, whose caller proved the features, \
              and every memory access is preceded by a slice of exactly its length"
)]

use super::{Isa, Level, Routine, Task, Vector, Widen};
use half::{bf16, f16};
use std::arch::x86_64::*;

/// The instruction set.
#[derive(Debug, Clone, Copy)]
pub struct Avx2;

/// Eight f32.
#[derive(Debug, Clone, Copy)]
pub struct F32x8(__m256);

/// Four f64.
#[derive(Debug, Clone, Copy)]
pub struct F64x4(__m256d);

/// Runs one piece of work in code compiled for AVX2.
///
/// # Safety
/// The machine has AVX2, FMA and F16C.
#[target_feature(enable = "avx2,fma,f16c")]
pub unsafe fn enter(task: &impl Task, index: usize) {
    task.run::<Avx2>(index);
}

/// 1.5 * 2^23 + 127: adding it rounds to an integer whose biased exponent is in the low bits.
const MAGIC_F32: f32 = 12_582_912.0 + 127.0;
/// 1.5 * 2^52 + 1023, likewise.
const MAGIC_F64: f64 = 6_755_399_441_055_744.0 + 1023.0;

impl Vector for F32x8 {
    type Elem = f32;
    type Block = [Self; 8];
    const LANES: usize = 8;
    const EXP2_FLOOR: f32 = -127.0;

    #[inline(always)]
    fn splat(x: f32) -> Self {
        Self(unsafe { _mm256_set1_ps(x) })
    }
    #[inline(always)]
    fn load(src: &[f32]) -> Self {
        let src = &src[..Self::LANES];
        Self(unsafe { _mm256_loadu_ps(src.as_ptr()) })
    }
    #[inline(always)]
    fn store(self, dst: &mut [f32]) {
        let dst = &mut dst[..Self::LANES];
        unsafe { _mm256_storeu_ps(dst.as_mut_ptr(), self.0) }
    }
    #[inline(always)]
    fn store_past_caches(self, dst: &mut [f32]) {
        let dst = &mut dst[..Self::LANES];
        if dst.as_ptr().addr().is_multiple_of(size_of::<Self>()) {
            unsafe { _mm256_stream_ps(dst.as_mut_ptr(), self.0) }
        } else {
            self.store(dst);
        }
    }
    #[inline(always)]
    fn add(self, other: Self) -> Self {
        Self(unsafe { _mm256_add_ps(self.0, other.0) })
    }
    #[inline(always)]
    fn sub(self, other: Self) -> Self {
        Self(unsafe { _mm256_sub_ps(self.0, other.0) })
    }
    #[inline(always)]
    fn mul(self, other: Self) -> Self {
        Self(unsafe { _mm256_mul_ps(self.0, other.0) })
    }
    #[inline(always)]
    fn div(self, other: Self) -> Self {
        Self(unsafe { _mm256_div_ps(self.0, other.0) })
    }
    #[inline(always)]
    fn mul_add(self, factor: Self, addend: Self) -> Self {
        Self(unsafe { _mm256_fmadd_ps(self.0, factor.0, addend.0) })
    }
    #[inline(always)]
    fn max(self, other: Self) -> Self {
        Self(unsafe { _mm256_max_ps(self.0, other.0) })
    }
    #[inline(always)]
    fn select_gt(self, other: Self, yes: Self, no: Self) -> Self {
        Self(unsafe { _mm256_blendv_ps(no.0, yes.0, _mm256_cmp_ps::<_CMP_GT_OQ>(self.0, other.0)) })
    }
    #[inline(always)]
    fn split_exponent(self) -> (Self, Self) {
        unsafe {
            let magic = _mm256_set1_ps(MAGIC_F32);
            let shifted = _mm256_add_ps(self.0, magic);
            let fraction = _mm256_sub_ps(self.0, _mm256_sub_ps(shifted, magic));
            let power = _mm256_slli_epi32::<23>(_mm256_castps_si256(shifted));
            (Self(fraction), Self(_mm256_castsi256_ps(power)))
        }
    }
    #[inline(always)]
    fn scale_exponent(self, token: Self) -> Self {
        self.mul(token)
    }
    #[inline(always)]
    fn zero_block() -> Self::Block {
        [Self::splat(0.0); 8]
    }
    #[inline(always)]
    fn transpose(r: Self::Block) -> Self::Block {
        unsafe {
            let mut quads = [Self::splat(0.0); 8];
            for g in 0..2 {
                let [a, b, c, d] = [r[4 * g].0, r[4 * g + 1].0, r[4 * g + 2].0, r[4 * g + 3].0];
                let low = [_mm256_unpacklo_ps(a, b), _mm256_unpacklo_ps(c, d)];
                let high = [_mm256_unpackhi_ps(a, b), _mm256_unpackhi_ps(c, d)];
                quads[4 * g].0 = _mm256_shuffle_ps::<0x44>(low[0], low[1]);
                quads[4 * g + 1].0 = _mm256_shuffle_ps::<0xee>(low[0], low[1]);
                quads[4 * g + 2].0 = _mm256_shuffle_ps::<0x44>(high[0], high[1]);
                quads[4 * g + 3].0 = _mm256_shuffle_ps::<0xee>(high[0], high[1]);
            }
            let mut out = quads;
            for c in 0..4 {
                out[c].0 = _mm256_permute2f128_ps::<0x20>(quads[c].0, quads[4 + c].0);
                out[4 + c].0 = _mm256_permute2f128_ps::<0x31>(quads[c].0, quads[4 + c].0);
            }
            out
        }
    }
    #[inline(always)]
    fn sum_rows(r: Self::Block) -> Self {
        unsafe {
            let mut pairs = [_mm256_setzero_ps(); 4];
            for g in 0..4 {
                pairs[g] = _mm256_hadd_ps(r[2 * g].0, r[2 * g + 1].0);
            }
            let low = _mm256_hadd_ps(pairs[0], pairs[1]);
            let high = _mm256_hadd_ps(pairs[2], pairs[3]);
            let first = _mm256_permute2f128_ps::<0x20>(low, high);
            Self(_mm256_add_ps(first, _mm256_permute2f128_ps::<0x31>(low, high)))
        }
    }
}

impl Vector for F64x4 {
    type Elem = f64;
    type Block = [Self; 4];
    const LANES: usize = 4;
    const EXP2_FLOOR: f64 = -1023.0;

    #[inline(always)]
    fn splat(x: f64) -> Self {
        Self(unsafe { _mm256_set1_pd(x) })
    }
    #[inline(always)]
    fn load(src: &[f64]) -> Self {
        let src = &src[..Self::LANES];
        Self(unsafe { _mm256_loadu_pd(src.as_ptr()) })
    }
    #[inline(always)]
    fn store(self, dst: &mut [f64]) {
        let dst = &mut dst[..Self::LANES];
        unsafe { _mm256_storeu_pd(dst.as_mut_ptr(), self.0) }
    }
    #[inline(always)]
    fn store_past_caches(self, dst: &mut [f64]) {
        let dst = &mut dst[..Self::LANES];
        if dst.as_ptr().addr().is_multiple_of(size_of::<Self>()) {
            unsafe { _mm256_stream_pd(dst.as_mut_ptr(), self.0) }
        } else {
            self.store(dst);
        }
    }
    #[inline(always)]
    fn add(self, other: Self) -> Self {
        Self(unsafe { _mm256_add_pd(self.0, other.0) })
    }
    #[inline(always)]
    fn sub(self, other: Self) -> Self {
        Self(unsafe { _mm256_sub_pd(self.0, other.0) })
    }
    #[inline(always)]
    fn mul(self, other: Self) -> Self {
        Self(unsafe { _mm256_mul_pd(self.0, other.0) })
    }
    #[inline(always)]
    fn div(self, other: Self) -> Self {
        Self(unsafe { _mm256_div_pd(self.0, other.0) })
    }
    #[inline(always)]
    fn mul_add(self, factor: Self, addend: Self) -> Self {
        Self(unsafe { _mm256_fmadd_pd(self.0, factor.0, addend.0) })
    }
    #[inline(always)]
    fn max(self, other: Self) -> Self {
        Self(unsafe { _mm256_max_pd(self.0, other.0) })
    }
    #[inline(always)]
    fn select_gt(self, other: Self, yes: Self, no: Self) -> Self {
        Self(unsafe { _mm256_blendv_pd(no.0, yes.0, _mm256_cmp_pd::<_CMP_GT_OQ>(self.0, other.0)) })
    }
    #[inline(always)]
    fn split_exponent(self) -> (Self, Self) {
        unsafe {
            let magic = _mm256_set1_pd(MAGIC_F64);
            let shifted = _mm256_add_pd(self.0, magic);
            let fraction = _mm256_sub_pd(self.0, _mm256_sub_pd(shifted, magic));
            let power = _mm256_slli_epi64::<52>(_mm256_castpd_si256(shifted));
            (Self(fraction), Self(_mm256_castsi256_pd(power)))
        }
    }
    #[inline(always)]
    fn scale_exponent(self, token: Self) -> Self {
        self.mul(token)
    }
    #[inline(always)]
    fn zero_block() -> Self::Block {
        [Self::splat(0.0); 4]
    }
    #[inline(always)]
    fn transpose(r: Self::Block) -> Self::Block {
        unsafe {
            let low = [_mm256_unpacklo_pd(r[0].0, r[1].0), _mm256_unpacklo_pd(r[2].0, r[3].0)];
            let high = [_mm256_unpackhi_pd(r[0].0, r[1].0), _mm256_unpackhi_pd(r[2].0, r[3].0)];
            [
                Self(_mm256_permute2f128_pd::<0x20>(low[0], low[1])),
                Self(_mm256_permute2f128_pd::<0x20>(high[0], high[1])),
                Self(_mm256_permute2f128_pd::<0x31>(low[0], low[1])),
                Self(_mm256_permute2f128_pd::<0x31>(high[0], high[1])),
            ]
        }
    }
    #[inline(always)]
    fn sum_rows(r: Self::Block) -> Self {
        unsafe {
            let low = _mm256_hadd_pd(r[0].0, r[1].0);
            let high = _mm256_hadd_pd(r[2].0, r[3].0);
            let first = _mm256_permute2f128_pd::<0x20>(low, high);
            Self(_mm256_add_pd(first, _mm256_permute2f128_pd::<0x31>(low, high)))
        }
    }
}

/// Writes what was rounded, past the caches if asked for.
#[inline(always)]
fn store_halves<T: bytemuck::Pod>(bits: __m128i, dst: &mut [T], past_caches: bool) {
    let dst: *mut __m128i = bytemuck::cast_slice_mut::<T, u16>(&mut dst[..F32x8::LANES]).as_mut_ptr().cast();
    if past_caches && dst.is_aligned() { unsafe { _mm_stream_si128(dst, bits) } } else { unsafe { _mm_storeu_si128(dst, bits) } }
}

impl Isa for Avx2 {
    const LEVEL: Level = Level::Avx2;
    const REGISTERS: usize = 16;
    type F32 = F32x8;
    type F64 = F64x4;
    type Bf16 = Widen<Self, bf16>;

    #[inline(always)]
    fn load_f16(src: &[f16]) -> F32x8 {
        let src = &src[..F32x8::LANES];
        F32x8(unsafe { _mm256_cvtph_ps(_mm_loadu_si128(src.as_ptr().cast())) })
    }
    #[inline(always)]
    fn store_f16(v: F32x8, dst: &mut [f16], past_caches: bool) {
        store_halves(unsafe { _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(v.0) }, dst, past_caches);
    }
    #[inline(always)]
    fn load_bf16(src: &[bf16]) -> F32x8 {
        let src = &src[..F32x8::LANES];
        unsafe {
            let wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(src.as_ptr().cast()));
            F32x8(_mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide)))
        }
    }
    #[inline(always)]
    fn store_bf16(v: F32x8, dst: &mut [bf16], past_caches: bool) {
        unsafe {
            let bits = _mm256_castps_si256(v.0);
            let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
            let rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
            // Rounding the payload of a NaN could carry into infinity: quiet it instead.
            let quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x0040_0000));
            let is_nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(v.0, v.0));
            let high = _mm256_srli_epi32::<16>(_mm256_blendv_epi8(rounded, quiet, is_nan));
            let packed = _mm256_packus_epi32(high, high);
            let low_half = _mm256_permute4x64_epi64::<0b1000>(packed);
            store_halves(_mm256_castsi256_si128(low_half), dst, past_caches);
        }
    }
    #[inline(always)]
    fn call<R: Routine>(routine: R) -> R::Output {
        unsafe { call(routine) }
    }
}

#[inline(never)]
#[target_feature(enable = "avx2,fma,f16c")]
fn call<R: Routine>(routine: R) -> R::Output {
    routine.run::<Avx2>()
}
