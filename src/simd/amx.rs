//! Intel's matrix tiles (AMX) beside AVX-512 with BF16: eight registers of 16 rows of 64 bytes.
//!
//! `tdpbf16ps` multiplies 16 rows of 32 bf16 with 16 rows of 16 pairs in 16 cycles, eight times as fast as two `vdpbf16ps` a cycle;
//! loading a tile from L1 takes 8. Two by two tiles of sums need four loads for four products.
#![expect(unsafe_code, reason = "instructions that have no intrinsics yet")]

use super::avx512::{Avx512Bf16, F32x16, F64x8};
use super::{Isa, Level, PairDot, Routine, Task, TileOperands};
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

/// One loop over the operands of tiles `[number row offset]` of sums, each step of which is `step`. Nothing else uses tiles, and none
/// holds a value between two of these.
macro_rules! multiply {
    ($operands:expr, $sums:expr, $stride:expr, $add:expr; [$($tile:literal $row:literal $offset:literal),*] [$($step:literal),*]) => {{
        let (TileOperands { a, a_stride, a_step, b, b_stride, steps }, bytes) = ($operands, size_of::<f32>());
        let (a, sums) = (a.as_ptr(), $sums.as_mut_ptr());
        asm!(
            "/* {a_low} {c_low} */",
            "test {add:e}, {add:e}",
            "jz 2f",
            $(concat!("tileloadd tmm", $tile, ", [{", $row, "} + {c_row} ", $offset, "]"),)*
            "jmp 3f",
            "2:",
            $(concat!("tilezero tmm", $tile),)*
            "3:",
            $($step,)*
            "add {a}, {a_step}",
            "add {a_low}, {a_step}",
            "add {b}, {b_step}",
            "dec {steps}",
            "jnz 3b",
            $(concat!("tilestored [{", $row, "} + {c_row} ", $offset, "], tmm", $tile),)*
            add = in(reg) u32::from($add),
            a = inout(reg) a => _,
            a_low = inout(reg) a.wrapping_add(ROWS * a_stride) => _,
            a_row = in(reg) a_stride * bytes,
            a_step = in(reg) a_step * bytes,
            b = inout(reg) b.as_ptr() => _,
            b_row = in(reg) b_stride * bytes,
            b_step = in(reg) ROWS * b_stride * bytes,
            c = in(reg) sums,
            c_low = in(reg) sums.wrapping_add(ROWS * $stride),
            c_row = in(reg) $stride * bytes,
            steps = inout(reg) steps => _,
            options(nostack),
        )
    }};
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
    fn store_f16(v: F32x16, dst: &mut [f16], past_caches: bool) {
        Avx512Bf16::store_f16(v, dst, past_caches);
    }
    #[inline(always)]
    fn load_bf16(src: &[bf16]) -> F32x16 {
        Avx512Bf16::load_bf16(src)
    }
    #[inline(always)]
    fn store_bf16(v: F32x16, dst: &mut [bf16], past_caches: bool) {
        Avx512Bf16::store_bf16(v, dst, past_caches);
    }
    #[inline(always)]
    fn call<R: Routine>(routine: R) -> R::Output {
        // SAFETY: this runs below `enter`, whose caller proved the features.
        unsafe { call(routine) }
    }
    #[inline(always)]
    fn multiply_tiles<const M: usize, const N: usize>(operands: TileOperands<'_>, sums: &mut [f32], stride: usize, add: bool) {
        let TileOperands { a, a_stride, a_step, b, b_stride, steps } = operands;
        let (rows, width) = (M * ROWS, N * COLUMNS);
        let last = steps.checked_sub(1).expect("multiply_tiles: no operands");
        assert!((rows - 1) * a_stride + last * a_step + COLUMNS <= a.len(), "multiply_tiles: `a` is too short");
        assert!((steps * ROWS - 1) * b_stride + width <= b.len(), "multiply_tiles: `b` is too short");
        assert!((rows - 1) * stride + width <= sums.len(), "multiply_tiles: `sums` is too short");
        // SAFETY: the assertions above; this runs below `enter`, which configured whole tiles.
        unsafe {
            match (M, N) {
                (1, 1) => multiply!(operands, sums, stride, add;
                    [0 "c" ""]
                    ["tileloadd tmm6, [{b} + {b_row}]", "tileloadd tmm4, [{a} + {a_row}]", "tdpbf16ps tmm0, tmm4, tmm6"]),
                (1, 2) => multiply!(operands, sums, stride, add;
                [0 "c" "", 1 "c" "+ 64"]
                [
                    "tileloadd tmm4, [{a} + {a_row}]", "tileloadd tmm6, [{b} + {b_row}]", "tileloadd tmm7, [{b} + {b_row} + 64]",
                    "tdpbf16ps tmm0, tmm4, tmm6", "tdpbf16ps tmm1, tmm4, tmm7"
                ]),
                (2, 1) => multiply!(operands, sums, stride, add;
                [0 "c" "", 2 "c_low" ""]
                [
                    "tileloadd tmm6, [{b} + {b_row}]", "tileloadd tmm4, [{a} + {a_row}]", "tileloadd tmm5, [{a_low} + {a_row}]",
                    "tdpbf16ps tmm0, tmm4, tmm6", "tdpbf16ps tmm2, tmm5, tmm6"
                ]),
                (2, 2) => multiply!(operands, sums, stride, add;
                [0 "c" "", 1 "c" "+ 64", 2 "c_low" "", 3 "c_low" "+ 64"]
                [
                    "tileloadd tmm6, [{b} + {b_row}]", "tileloadd tmm4, [{a} + {a_row}]", "tileloadd tmm5, [{a_low} + {a_row}]",
                    "tileloadd tmm7, [{b} + {b_row} + 64]",
                    "tdpbf16ps tmm0, tmm4, tmm6", "tdpbf16ps tmm2, tmm5, tmm6",
                    "tdpbf16ps tmm1, tmm4, tmm7", "tdpbf16ps tmm3, tmm5, tmm7"
                ]),
                _ => unreachable!("{M} by {N} tiles"),
            }
        }
    }
}
