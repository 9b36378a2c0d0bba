//! AVX-512, with and without AVX512-BF16: 32 registers of 16 f32 or 8 f64.
//!
//! FMA: 2 per cycle, latency 4 (Skylake-SP and later, Zen 5; Zen 4: 1). `vdpbf16ps`: latency 5 to 6; 2 per cycle on Zen 5, 1 on
//! Zen 4 and on Intel. `vscalefps` and `vrndscaleps` are one to two operations each and need no exponent arithmetic.
#![expect(unsafe_code, reason = "intrinsics")]
#![allow(clippy::wildcard_imports, reason = "intrinsics")]
#![expect(
    clippy::undocumented_unsafe_blocks,
    reason = "one argument serves all: the methods run only below `enter` and `enter_bf16`, whose callers proved the features, \
              and every memory access is preceded by a slice of exactly its length"
)]

use super::{Bf16Pairs, Isa, Level, PairDot, Routine, Task, Vector, Widen};
use half::{bf16, f16};
use std::arch::x86_64::*;

/// The instruction set without bf16 arithmetic.
#[derive(Debug, Clone, Copy)]
pub struct Avx512;

/// The instruction set with bf16 dot products.
#[derive(Debug, Clone, Copy)]
pub struct Avx512Bf16;

/// Sixteen f32.
#[derive(Debug, Clone, Copy)]
pub struct F32x16(__m512);

/// Eight f64.
#[derive(Debug, Clone, Copy)]
pub struct F64x8(__m512d);

/// Runs one piece of work in code compiled for AVX-512.
///
/// # Safety
/// The machine has AVX-512 F, BW, CD, DQ and VL, AVX2, FMA and F16C.
#[target_feature(enable = "avx512f,avx512bw,avx512cd,avx512dq,avx512vl,avx2,fma,f16c")]
pub unsafe fn enter(task: &impl Task, index: usize) {
    task.run::<Avx512>(index);
}

/// Runs one piece of work in code compiled for AVX-512 with BF16.
///
/// # Safety
/// As [`enter`], and the machine has AVX512-BF16.
#[target_feature(enable = "avx512bf16,avx512f,avx512bw,avx512cd,avx512dq,avx512vl,avx2,fma,f16c")]
pub unsafe fn enter_bf16(task: &impl Task, index: usize) {
    task.run::<Avx512Bf16>(index);
}

/// Words of two halves in turn.
#[repr(C, align(64))]
struct Words([u16; 32]);

static INTERLEAVED: Words = {
    let mut words = [0; 32];
    let mut i = 0;
    while i < 32 {
        words[i] = (i / 2 + i % 2 * 16) as u16;
        i += 1;
    }
    Words(words)
};

const ROUND_EVEN: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;

impl Vector for F32x16 {
    type Elem = f32;
    type Block = [Self; 16];
    const LANES: usize = 16;
    // Below the smallest denormal, so that `vscalefps` returns 0.
    const EXP2_FLOOR: f32 = -200.0;

    #[inline(always)]
    fn splat(x: f32) -> Self {
        Self(unsafe { _mm512_set1_ps(x) })
    }
    #[inline(always)]
    fn load(src: &[f32]) -> Self {
        let src = &src[..Self::LANES];
        Self(unsafe { _mm512_loadu_ps(src.as_ptr()) })
    }
    #[inline(always)]
    fn store(self, dst: &mut [f32]) {
        let dst = &mut dst[..Self::LANES];
        unsafe { _mm512_storeu_ps(dst.as_mut_ptr(), self.0) }
    }
    #[inline(always)]
    fn store_past_caches(self, dst: &mut [f32]) {
        let dst = &mut dst[..Self::LANES];
        if dst.as_ptr().addr().is_multiple_of(size_of::<Self>()) {
            unsafe { _mm512_stream_ps(dst.as_mut_ptr(), self.0) }
        } else {
            self.store(dst);
        }
    }
    #[inline(always)]
    fn add(self, other: Self) -> Self {
        Self(unsafe { _mm512_add_ps(self.0, other.0) })
    }
    #[inline(always)]
    fn sub(self, other: Self) -> Self {
        Self(unsafe { _mm512_sub_ps(self.0, other.0) })
    }
    #[inline(always)]
    fn mul(self, other: Self) -> Self {
        Self(unsafe { _mm512_mul_ps(self.0, other.0) })
    }
    #[inline(always)]
    fn div(self, other: Self) -> Self {
        Self(unsafe { _mm512_div_ps(self.0, other.0) })
    }
    #[inline(always)]
    fn mul_add(self, factor: Self, addend: Self) -> Self {
        Self(unsafe { _mm512_fmadd_ps(self.0, factor.0, addend.0) })
    }
    #[inline(always)]
    fn max(self, other: Self) -> Self {
        Self(unsafe { _mm512_max_ps(self.0, other.0) })
    }
    #[inline(always)]
    fn select_gt(self, other: Self, yes: Self, no: Self) -> Self {
        Self(unsafe { _mm512_mask_blend_ps(_mm512_cmp_ps_mask::<_CMP_GT_OQ>(self.0, other.0), no.0, yes.0) })
    }
    #[inline(always)]
    fn split_exponent(self) -> (Self, Self) {
        let whole = Self(unsafe { _mm512_roundscale_ps::<ROUND_EVEN>(self.0) });
        (self.sub(whole), whole)
    }
    #[inline(always)]
    fn scale_exponent(self, token: Self) -> Self {
        Self(unsafe { _mm512_scalef_ps(self.0, token.0) })
    }
    #[inline(always)]
    fn zero_block() -> Self::Block {
        [Self::splat(0.0); 16]
    }
    #[inline(always)]
    fn transpose(r: Self::Block) -> Self::Block {
        unsafe {
            let mut quads = [_mm512_setzero_ps(); 16];
            for g in 0..4 {
                let [a, b, c, d] = [r[4 * g].0, r[4 * g + 1].0, r[4 * g + 2].0, r[4 * g + 3].0];
                let low = [_mm512_unpacklo_ps(a, b), _mm512_unpacklo_ps(c, d)];
                let high = [_mm512_unpackhi_ps(a, b), _mm512_unpackhi_ps(c, d)];
                quads[4 * g] = _mm512_shuffle_ps::<0x44>(low[0], low[1]);
                quads[4 * g + 1] = _mm512_shuffle_ps::<0xee>(low[0], low[1]);
                quads[4 * g + 2] = _mm512_shuffle_ps::<0x44>(high[0], high[1]);
                quads[4 * g + 3] = _mm512_shuffle_ps::<0xee>(high[0], high[1]);
            }
            let mut out = r;
            for c in 0..4 {
                let [a, b, x, y] = [quads[c], quads[4 + c], quads[8 + c], quads[12 + c]];
                let even = [_mm512_shuffle_f32x4::<0x88>(a, b), _mm512_shuffle_f32x4::<0x88>(x, y)];
                let odd = [_mm512_shuffle_f32x4::<0xdd>(a, b), _mm512_shuffle_f32x4::<0xdd>(x, y)];
                out[c].0 = _mm512_shuffle_f32x4::<0x88>(even[0], even[1]);
                out[4 + c].0 = _mm512_shuffle_f32x4::<0x88>(odd[0], odd[1]);
                out[8 + c].0 = _mm512_shuffle_f32x4::<0xdd>(even[0], even[1]);
                out[12 + c].0 = _mm512_shuffle_f32x4::<0xdd>(odd[0], odd[1]);
            }
            out
        }
    }
    #[inline(always)]
    fn sum_rows(r: Self::Block) -> Self {
        unsafe {
            let mut quads = [_mm512_setzero_ps(); 4];
            for g in 0..4 {
                let [a, b, c, d] = [r[4 * g].0, r[4 * g + 1].0, r[4 * g + 2].0, r[4 * g + 3].0];
                let first = _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)));
                let second = _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d)));
                let low = _mm512_castpd_ps(_mm512_unpacklo_pd(first, second));
                quads[g] = _mm512_add_ps(low, _mm512_castpd_ps(_mm512_unpackhi_pd(first, second)));
            }
            let (a, b, c, d) = (quads[0], quads[1], quads[2], quads[3]);
            let first = _mm512_add_ps(_mm512_shuffle_f32x4::<0x88>(a, b), _mm512_shuffle_f32x4::<0xdd>(a, b));
            let second = _mm512_add_ps(_mm512_shuffle_f32x4::<0x88>(c, d), _mm512_shuffle_f32x4::<0xdd>(c, d));
            let even = _mm512_shuffle_f32x4::<0x88>(first, second);
            Self(_mm512_add_ps(even, _mm512_shuffle_f32x4::<0xdd>(first, second)))
        }
    }
}

impl Vector for F64x8 {
    type Elem = f64;
    type Block = [Self; 8];
    const LANES: usize = 8;
    const EXP2_FLOOR: f64 = -1200.0;

    #[inline(always)]
    fn splat(x: f64) -> Self {
        Self(unsafe { _mm512_set1_pd(x) })
    }
    #[inline(always)]
    fn load(src: &[f64]) -> Self {
        let src = &src[..Self::LANES];
        Self(unsafe { _mm512_loadu_pd(src.as_ptr()) })
    }
    #[inline(always)]
    fn store(self, dst: &mut [f64]) {
        let dst = &mut dst[..Self::LANES];
        unsafe { _mm512_storeu_pd(dst.as_mut_ptr(), self.0) }
    }
    #[inline(always)]
    fn store_past_caches(self, dst: &mut [f64]) {
        let dst = &mut dst[..Self::LANES];
        if dst.as_ptr().addr().is_multiple_of(size_of::<Self>()) {
            unsafe { _mm512_stream_pd(dst.as_mut_ptr(), self.0) }
        } else {
            self.store(dst);
        }
    }
    #[inline(always)]
    fn add(self, other: Self) -> Self {
        Self(unsafe { _mm512_add_pd(self.0, other.0) })
    }
    #[inline(always)]
    fn sub(self, other: Self) -> Self {
        Self(unsafe { _mm512_sub_pd(self.0, other.0) })
    }
    #[inline(always)]
    fn mul(self, other: Self) -> Self {
        Self(unsafe { _mm512_mul_pd(self.0, other.0) })
    }
    #[inline(always)]
    fn div(self, other: Self) -> Self {
        Self(unsafe { _mm512_div_pd(self.0, other.0) })
    }
    #[inline(always)]
    fn mul_add(self, factor: Self, addend: Self) -> Self {
        Self(unsafe { _mm512_fmadd_pd(self.0, factor.0, addend.0) })
    }
    #[inline(always)]
    fn max(self, other: Self) -> Self {
        Self(unsafe { _mm512_max_pd(self.0, other.0) })
    }
    #[inline(always)]
    fn select_gt(self, other: Self, yes: Self, no: Self) -> Self {
        Self(unsafe { _mm512_mask_blend_pd(_mm512_cmp_pd_mask::<_CMP_GT_OQ>(self.0, other.0), no.0, yes.0) })
    }
    #[inline(always)]
    fn split_exponent(self) -> (Self, Self) {
        let whole = Self(unsafe { _mm512_roundscale_pd::<ROUND_EVEN>(self.0) });
        (self.sub(whole), whole)
    }
    #[inline(always)]
    fn scale_exponent(self, token: Self) -> Self {
        Self(unsafe { _mm512_scalef_pd(self.0, token.0) })
    }
    #[inline(always)]
    fn zero_block() -> Self::Block {
        [Self::splat(0.0); 8]
    }
    #[inline(always)]
    fn transpose(r: Self::Block) -> Self::Block {
        unsafe {
            let mut pairs = [_mm512_setzero_pd(); 8];
            for g in 0..4 {
                pairs[2 * g] = _mm512_unpacklo_pd(r[2 * g].0, r[2 * g + 1].0);
                pairs[2 * g + 1] = _mm512_unpackhi_pd(r[2 * g].0, r[2 * g + 1].0);
            }
            let mut out = r;
            for c in 0..2 {
                let [a, b, x, y] = [pairs[c], pairs[2 + c], pairs[4 + c], pairs[6 + c]];
                let even = [_mm512_shuffle_f64x2::<0x88>(a, b), _mm512_shuffle_f64x2::<0x88>(x, y)];
                let odd = [_mm512_shuffle_f64x2::<0xdd>(a, b), _mm512_shuffle_f64x2::<0xdd>(x, y)];
                out[c].0 = _mm512_shuffle_f64x2::<0x88>(even[0], even[1]);
                out[2 + c].0 = _mm512_shuffle_f64x2::<0x88>(odd[0], odd[1]);
                out[4 + c].0 = _mm512_shuffle_f64x2::<0xdd>(even[0], even[1]);
                out[6 + c].0 = _mm512_shuffle_f64x2::<0xdd>(odd[0], odd[1]);
            }
            out
        }
    }
    #[inline(always)]
    fn sum_rows(r: Self::Block) -> Self {
        unsafe {
            let mut pairs = [_mm512_setzero_pd(); 4];
            for g in 0..4 {
                let (a, b) = (r[2 * g].0, r[2 * g + 1].0);
                pairs[g] = _mm512_add_pd(_mm512_unpacklo_pd(a, b), _mm512_unpackhi_pd(a, b));
            }
            let (a, b, c, d) = (pairs[0], pairs[1], pairs[2], pairs[3]);
            let first = _mm512_add_pd(_mm512_shuffle_f64x2::<0x88>(a, b), _mm512_shuffle_f64x2::<0xdd>(a, b));
            let second = _mm512_add_pd(_mm512_shuffle_f64x2::<0x88>(c, d), _mm512_shuffle_f64x2::<0xdd>(c, d));
            let even = _mm512_shuffle_f64x2::<0x88>(first, second);
            Self(_mm512_add_pd(even, _mm512_shuffle_f64x2::<0xdd>(first, second)))
        }
    }
}

#[inline(always)]
fn load_f16(src: &[f16]) -> F32x16 {
    let src = &src[..F32x16::LANES];
    F32x16(unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(src.as_ptr().cast())) })
}

/// Writes what was rounded, past the caches if asked for.
#[inline(always)]
fn store_halves<T: bytemuck::Pod>(bits: __m256i, dst: &mut [T], past_caches: bool) {
    let dst: *mut __m256i = bytemuck::cast_slice_mut::<T, u16>(&mut dst[..F32x16::LANES]).as_mut_ptr().cast();
    if past_caches && dst.is_aligned() {
        unsafe { _mm256_stream_si256(dst, bits) }
    } else {
        unsafe { _mm256_storeu_si256(dst, bits) }
    }
}

#[inline(always)]
fn store_f16(v: F32x16, dst: &mut [f16], past_caches: bool) {
    store_halves(unsafe { _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(v.0) }, dst, past_caches);
}

/// The bits of `LANES` elements, zero-extended to 32.
#[inline(always)]
fn extend_bf16(src: &[bf16]) -> __m512i {
    let src = &src[..F32x16::LANES];
    unsafe { _mm512_cvtepu16_epi32(_mm256_loadu_si256(src.as_ptr().cast())) }
}

#[inline(always)]
fn load_bf16(src: &[bf16]) -> F32x16 {
    F32x16(unsafe { _mm512_castsi512_ps(_mm512_slli_epi32::<16>(extend_bf16(src))) })
}

/// Rounds to nearest even in the low halves of 32-bit lanes; NaNs stay NaNs.
#[inline(always)]
fn round_bf16(v: F32x16) -> __m512i {
    unsafe {
        let bits = _mm512_castps_si512(v.0);
        let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
        let rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
        // Rounding the payload of a NaN could carry into infinity: quiet it instead.
        let quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x0040_0000));
        let is_nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(v.0, v.0);
        _mm512_srli_epi32::<16>(_mm512_mask_blend_epi32(is_nan, rounded, quiet))
    }
}

#[inline(always)]
fn store_bf16(v: F32x16, dst: &mut [bf16], past_caches: bool) {
    store_halves(unsafe { _mm512_cvtepi32_epi16(round_bf16(v)) }, dst, past_caches);
}

impl Isa for Avx512 {
    const LEVEL: Level = Level::Avx512;
    const REGISTERS: usize = 32;
    type F32 = F32x16;
    type F64 = F64x8;
    type Bf16 = Widen<Self, bf16>;

    #[inline(always)]
    fn load_f16(src: &[f16]) -> F32x16 {
        load_f16(src)
    }
    #[inline(always)]
    fn store_f16(v: F32x16, dst: &mut [f16], past_caches: bool) {
        store_f16(v, dst, past_caches);
    }
    #[inline(always)]
    fn load_bf16(src: &[bf16]) -> F32x16 {
        load_bf16(src)
    }
    #[inline(always)]
    fn store_bf16(v: F32x16, dst: &mut [bf16], past_caches: bool) {
        store_bf16(v, dst, past_caches);
    }
    #[inline(always)]
    fn call<R: Routine>(routine: R) -> R::Output {
        unsafe { call(routine) }
    }
}

#[inline(never)]
#[target_feature(enable = "avx512f,avx512bw,avx512cd,avx512dq,avx512vl,avx2,fma,f16c")]
fn call<R: Routine>(routine: R) -> R::Output {
    routine.run::<Avx512>()
}

impl Isa for Avx512Bf16 {
    const LEVEL: Level = Level::Avx512Bf16;
    const REGISTERS: usize = 32;
    type F32 = F32x16;
    type F64 = F64x8;
    type Bf16 = PairDot<Self>;

    #[inline(always)]
    fn load_f16(src: &[f16]) -> F32x16 {
        load_f16(src)
    }
    #[inline(always)]
    fn store_f16(v: F32x16, dst: &mut [f16], past_caches: bool) {
        store_f16(v, dst, past_caches);
    }
    #[inline(always)]
    fn load_bf16(src: &[bf16]) -> F32x16 {
        load_bf16(src)
    }
    // Not `vcvtneps2bf16`, which flushes denormals: outputs round as they do at every other level.
    #[inline(always)]
    fn store_bf16(v: F32x16, dst: &mut [bf16], past_caches: bool) {
        store_bf16(v, dst, past_caches);
    }
    #[inline(always)]
    fn call<R: Routine>(routine: R) -> R::Output {
        unsafe { call_bf16(routine) }
    }
}

#[inline(never)]
#[target_feature(enable = "avx512bf16,avx512f,avx512bw,avx512cd,avx512dq,avx512vl,avx2,fma,f16c")]
fn call_bf16<R: Routine>(routine: R) -> R::Output {
    routine.run::<Avx512Bf16>()
}

impl Bf16Pairs for Avx512Bf16 {
    #[inline(always)]
    fn dot(a: F32x16, b: F32x16, acc: F32x16) -> F32x16 {
        // SAFETY: `__m512bh` and `__m512` are 512 bits without invalid values.
        let (a, b) = unsafe { (std::mem::transmute::<__m512, __m512bh>(a.0), std::mem::transmute::<__m512, __m512bh>(b.0)) };
        F32x16(unsafe { _mm512_dpbf16_ps(acc.0, a, b) })
    }
    #[inline(always)]
    fn round_pairs(first: F32x16, second: F32x16) -> F32x16 {
        unsafe {
            // Probabilities: the flush of denormals that the conversion does is below every tolerance.
            // SAFETY: as in `dot`; the conversion puts `first` in the low half and `second` in the high half.
            let halves: __m512i = std::mem::transmute(_mm512_cvtne2ps_pbh(second.0, first.0));
            F32x16(_mm512_castsi512_ps(_mm512_permutexvar_epi16(_mm512_load_si512(INTERLEAVED.0.as_ptr().cast()), halves)))
        }
    }
    #[inline(always)]
    fn widen_pairs(pairs: F32x16) -> [F32x16; 2] {
        unsafe {
            let bits = _mm512_castps_si512(pairs.0);
            let second = _mm512_and_si512(bits, _mm512_set1_epi32(!0xffff));
            [F32x16(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(bits))), F32x16(_mm512_castsi512_ps(second))]
        }
    }
    #[inline(always)]
    fn zip(first: &[bf16], second: &[bf16]) -> F32x16 {
        unsafe {
            let high = _mm512_slli_epi32::<16>(extend_bf16(second));
            F32x16(_mm512_castsi512_ps(_mm512_or_si512(extend_bf16(first), high)))
        }
    }
    #[inline(always)]
    fn load_pairs(src: &[bf16]) -> F32x16 {
        let src = &src[..2 * F32x16::LANES];
        F32x16(unsafe { _mm512_loadu_ps(src.as_ptr().cast()) })
    }
    #[inline(always)]
    fn zip_shuffled(first: &[bf16], second: &[bf16]) -> [F32x16; 2] {
        let (first, second) = (&first[..2 * F32x16::LANES], &second[..2 * F32x16::LANES]);
        unsafe {
            let (a, b) = (_mm512_loadu_si512(first.as_ptr().cast()), _mm512_loadu_si512(second.as_ptr().cast()));
            let (low, high) = (_mm512_unpacklo_epi16(a, b), _mm512_unpackhi_epi16(a, b));
            [F32x16(_mm512_castsi512_ps(low)), F32x16(_mm512_castsi512_ps(high))]
        }
    }
    // Unpacking works within 128 bits: each half holds every other four of the elements.
    #[inline(always)]
    fn unshuffle([low, high]: [F32x16; 2]) -> [F32x16; 2] {
        unsafe {
            let first = _mm512_shuffle_f32x4::<0x44>(low.0, high.0);
            let second = _mm512_shuffle_f32x4::<0xee>(low.0, high.0);
            [F32x16(_mm512_shuffle_f32x4::<0xd8>(first, first)), F32x16(_mm512_shuffle_f32x4::<0xd8>(second, second))]
        }
    }
    #[inline(always)]
    fn round_adjacent(first: F32x16, second: F32x16) -> F32x16 {
        // SAFETY: as in `round_pairs`.
        F32x16(unsafe { std::mem::transmute::<__m512bh, __m512>(_mm512_cvtne2ps_pbh(second.0, first.0)) })
    }
}
