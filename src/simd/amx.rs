//! Intel's matrix tiles (AMX) beside AVX-512 with BF16: eight registers of 16 rows of 64 bytes.
//!
//! `tdpbf16ps` multiplies 16 rows of 32 bf16 with 16 rows of 16 pairs in 16 cycles, eight times as fast as two `vdpbf16ps` a cycle;
//! loading a tile from L1 takes 8. Two by two tiles of sums need four loads for four products.
#![expect(unsafe_code, reason = "instructions that have no intrinsics yet")]

use super::avx512::{Avx512Bf16, F32x16, F64x8};
use super::{Isa, Level, PairDot, Routine, Task, TileOperands, Vector};
use half::{bf16, f16};
use std::arch::{asm, x86_64};
use std::sync::OnceLock;

/// The instruction set: vectors as [`Avx512Bf16`].
#[derive(Debug, Clone, Copy)]
pub struct Amx;

/// Rows of a tile.
const ROWS: usize = 16;
/// Elements of 32 bits in a row of a tile.
const COLUMNS: usize = 16;

/// The state that `ldtilecfg` reads and `sttilecfg` writes.
#[repr(C, align(64))]
struct Configuration {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

impl Configuration {
    const NONE: Self = Self { palette: 0, start_row: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
}

/// All eight tiles whole.
static WHOLE: Configuration = {
    let mut whole = Configuration { palette: 1, ..Configuration::NONE };
    let mut tile = 0;
    while tile < 8 {
        whole.rows[tile] = ROWS as u8;
        whole.row_bytes[tile] = 4 * COLUMNS as u16;
        tile += 1;
    }
    whole
};

/// Puts back what was configured before, by whichever library shares the thread.
struct Configured {
    before: Configuration,
}

impl Configured {
    /// # Safety
    /// The process may use tiles.
    unsafe fn new() -> Self {
        let mut before = Configuration::NONE;
        // SAFETY: both operands are 64 bytes.
        unsafe {
            asm!("sttilecfg [{}]", in(reg) &raw mut before, options(nostack, preserves_flags));
            asm!("ldtilecfg [{}]", in(reg) &raw const WHOLE, options(nostack, preserves_flags));
        }
        Self { before }
    }
}

impl Drop for Configured {
    fn drop(&mut self) {
        // SAFETY: the operand is 64 bytes, of a state that was stored.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const self.before, options(nostack, preserves_flags)) }
    }
}

/// Whether this machine has tiles that multiply bf16, and the kernel lets this process use them: it must be asked, once.
pub fn is_available() -> bool {
    static AVAILABLE: OnceLock<bool> = OnceLock::new();
    *AVAILABLE.get_or_init(|| {
        const BF16: u32 = 1 << 22;
        const TILE: u32 = 1 << 24;
        const REQUEST_PERMISSION: libc::c_long = 0x1023;
        const TILE_DATA: libc::c_long = 18;
        if x86_64::__cpuid(0).eax < 7 {
            return false;
        }
        let features = x86_64::__cpuid_count(7, 0).edx;
        // SAFETY: the request has no pointers.
        features & BF16 != 0
            && features & TILE != 0
            && unsafe { libc::syscall(libc::SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) } == 0
    })
}

/// Runs one piece of work in code compiled for AVX-512 with BF16, with whole tiles configured.
///
/// # Safety
/// As [`super::avx512::enter_bf16`], and [`is_available`].
#[target_feature(enable = "avx512bf16,avx512f,avx512bw,avx512cd,avx512dq,avx512vl,avx2,fma,f16c")]
pub unsafe fn enter(task: &impl Task, index: usize) {
    // SAFETY: promised by the caller.
    let _configured = unsafe { Configured::new() };
    task.run::<Amx>(index);
}

#[inline(never)]
#[target_feature(enable = "avx512bf16,avx512f,avx512bw,avx512cd,avx512dq,avx512vl,avx2,fma,f16c")]
fn call<R: Routine>(routine: R) -> R::Output {
    routine.run::<Amx>()
}

impl Isa for Amx {
    const LEVEL: Level = Level::Amx;
    const REGISTERS: usize = Avx512Bf16::REGISTERS;
    const HAS_TILES: bool = true;
    type F32 = F32x16;
    type F64 = F64x8;
    type Bf16 = PairDot<Avx512Bf16>;

    #[inline(always)]
    fn load_f16(src: &[f16]) -> F32x16 {
        Avx512Bf16::load_f16(src)
    }
    #[inline(always)]
    fn store_f16(v: F32x16, dst: &mut [f16]) {
        Avx512Bf16::store_f16(v, dst);
    }
    #[inline(always)]
    fn load_bf16(src: &[bf16]) -> F32x16 {
        Avx512Bf16::load_bf16(src)
    }
    #[inline(always)]
    fn store_bf16(v: F32x16, dst: &mut [bf16]) {
        Avx512Bf16::store_bf16(v, dst);
    }
    #[inline(always)]
    fn call<R: Routine>(routine: R) -> R::Output {
        // SAFETY: this runs below `enter`, whose caller proved the features.
        unsafe { call(routine) }
    }
    #[inline(always)]
    fn multiply_tiles<const N: usize>(operands: TileOperands<'_>, sums: &mut [f32], stride: usize, add: bool) {
        let TileOperands { a, a_stride, b, b_stride, steps } = operands;
        let (rows, width) = (2 * ROWS, N * F32x16::LANES);
        assert!(steps > 0 && (rows - 1) * a_stride + steps * COLUMNS <= a.len(), "multiply_tiles: `a` is too short");
        assert!((steps * ROWS - 1) * b_stride + width <= b.len(), "multiply_tiles: `b` is too short");
        assert!((rows - 1) * stride + width <= sums.len(), "multiply_tiles: `sums` is too short");
        let bytes = size_of::<f32>();
        let (a, sums) = (a.as_ptr(), sums.as_mut_ptr());
        // SAFETY: the assertions above; this runs below `enter`, which configured whole tiles. Nothing else uses tiles, and none holds a
        // value between two of these.
        unsafe {
            match N {
                1 => asm!(
                    "test {add:e}, {add:e}",
                    "jz 2f",
                    "tileloadd tmm0, [{c} + {c_row}]",
                    "tileloadd tmm2, [{c_low} + {c_row}]",
                    "jmp 3f",
                    "2:",
                    "tilezero tmm0",
                    "tilezero tmm2",
                    "3:",
                    "tileloadd tmm6, [{b} + {b_row}]",
                    "tileloadd tmm4, [{a} + {a_row}]",
                    "tileloadd tmm5, [{a_low} + {a_row}]",
                    "tdpbf16ps tmm0, tmm4, tmm6",
                    "tdpbf16ps tmm2, tmm5, tmm6",
                    "add {a}, 64",
                    "add {a_low}, 64",
                    "add {b}, {b_step}",
                    "dec {steps}",
                    "jnz 3b",
                    "tilestored [{c} + {c_row}], tmm0",
                    "tilestored [{c_low} + {c_row}], tmm2",
                    add = in(reg) u32::from(add),
                    a = inout(reg) a => _,
                    a_low = inout(reg) a.wrapping_add(ROWS * a_stride) => _,
                    a_row = in(reg) a_stride * bytes,
                    b = inout(reg) b.as_ptr() => _,
                    b_row = in(reg) b_stride * bytes,
                    b_step = in(reg) ROWS * b_stride * bytes,
                    c = in(reg) sums,
                    c_low = in(reg) sums.wrapping_add(ROWS * stride),
                    c_row = in(reg) stride * bytes,
                    steps = inout(reg) steps => _,
                    options(nostack),
                ),
                2 => asm!(
                    "test {add:e}, {add:e}",
                    "jz 2f",
                    "tileloadd tmm0, [{c} + {c_row}]",
                    "tileloadd tmm1, [{c} + {c_row} + 64]",
                    "tileloadd tmm2, [{c_low} + {c_row}]",
                    "tileloadd tmm3, [{c_low} + {c_row} + 64]",
                    "jmp 3f",
                    "2:",
                    "tilezero tmm0",
                    "tilezero tmm1",
                    "tilezero tmm2",
                    "tilezero tmm3",
                    "3:",
                    "tileloadd tmm6, [{b} + {b_row}]",
                    "tileloadd tmm4, [{a} + {a_row}]",
                    "tileloadd tmm5, [{a_low} + {a_row}]",
                    "tileloadd tmm7, [{b} + {b_row} + 64]",
                    "tdpbf16ps tmm0, tmm4, tmm6",
                    "tdpbf16ps tmm2, tmm5, tmm6",
                    "tdpbf16ps tmm1, tmm4, tmm7",
                    "tdpbf16ps tmm3, tmm5, tmm7",
                    "add {a}, 64",
                    "add {a_low}, 64",
                    "add {b}, {b_step}",
                    "dec {steps}",
                    "jnz 3b",
                    "tilestored [{c} + {c_row}], tmm0",
                    "tilestored [{c} + {c_row} + 64], tmm1",
                    "tilestored [{c_low} + {c_row}], tmm2",
                    "tilestored [{c_low} + {c_row} + 64], tmm3",
                    add = in(reg) u32::from(add),
                    a = inout(reg) a => _,
                    a_low = inout(reg) a.wrapping_add(ROWS * a_stride) => _,
                    a_row = in(reg) a_stride * bytes,
                    b = inout(reg) b.as_ptr() => _,
                    b_row = in(reg) b_stride * bytes,
                    b_step = in(reg) ROWS * b_stride * bytes,
                    c = in(reg) sums,
                    c_low = in(reg) sums.wrapping_add(ROWS * stride),
                    c_row = in(reg) stride * bytes,
                    steps = inout(reg) steps => _,
                    options(nostack),
                ),
                _ => unreachable!("{N} tiles in a row"),
            }
        }
    }
}
