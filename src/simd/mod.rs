//! Instruction sets. The only home of `std::arch`.
//!
//! An algorithm is written once, generic over [`Isa`], and entered through [`Level::run`], which crosses into code compiled
//! for that instruction set. Everything below the crossing is `#[inline(always)]`: a function that is not would be compiled for
//! the baseline and call every intrinsic.

mod amx;
mod avx2;
mod avx512;
mod element;
mod kernel;
mod level;
mod micro;
mod portable;
mod prefetch;
mod probe;
mod row_block;

pub use element::{SimdElement, Wide};
pub use kernel::{PairDot, VectorKernel, Widen};
pub use level::Level;
pub use micro::{cross_tile, dot_tile, tile, weigh_tile};
pub use prefetch::{LINE, begins_a_line, finish_stores, prefetch, prefetch_lines, prefetch_lines_to_write};
pub use probe::{ProbeKind, peak_flops_loop, sum_bytes};
pub use row_block::{BLOCK_ROWS, RowBlock};

use crate::dtype::Float;
use half::{bf16, f16};

/// A register of floating-point lanes.
///
/// Loads and stores take slices of at least [`Vector::LANES`] elements, of any alignment.
pub trait Vector: Copy + 'static {
    /// Lane type.
    type Elem: Float;
    /// `LANES` registers, the unit of [`Vector::transpose`].
    type Block: Copy + AsRef<[Self]> + AsMut<[Self]>;
    /// Lanes of a register.
    const LANES: usize;
    /// Arguments of `2^x` are clamped to this; anything at or below it comes out as exactly 0.
    const EXP2_FLOOR: Self::Elem;

    /// All lanes equal to `x`.
    fn splat(x: Self::Elem) -> Self;
    /// Reads the first `LANES` elements.
    fn load(src: &[Self::Elem]) -> Self;
    /// Writes the first `LANES` elements.
    fn store(self, dst: &mut [Self::Elem]);
    /// As [`Vector::store`], past the caches where the address is one of whole registers; other threads see it after [`finish_stores`].
    #[inline(always)]
    fn store_past_caches(self, dst: &mut [Self::Elem]) {
        self.store(dst);
    }
    /// `self + other`.
    fn add(self, other: Self) -> Self;
    /// `self - other`.
    fn sub(self, other: Self) -> Self;
    /// `self * other`.
    fn mul(self, other: Self) -> Self;
    /// `self / other`.
    fn div(self, other: Self) -> Self;
    /// `self * factor + addend`, fused where the level can.
    fn mul_add(self, factor: Self, addend: Self) -> Self;
    /// The larger lane; `other` where either is NaN.
    fn max(self, other: Self) -> Self;
    /// `yes` where `self > other`, else `no`, also where either is NaN.
    fn select_gt(self, other: Self, yes: Self, no: Self) -> Self;
    /// Splits `x` in `[EXP2_FLOOR, max exponent]` into a fraction in `[-1/2, 1/2]` and a token of its integral part.
    fn split_exponent(self) -> (Self, Self);
    /// `self * 2^n` for the token of `n`.
    fn scale_exponent(self, token: Self) -> Self;
    /// A block of zeros.
    fn zero_block() -> Self::Block;
    /// Lane `j` of register `i` becomes lane `i` of register `j`.
    fn transpose(block: Self::Block) -> Self::Block;
    /// Lane `i` is the sum of the lanes of register `i`.
    fn sum_rows(block: Self::Block) -> Self;
}

/// An instruction set.
pub trait Isa: Copy + Send + Sync + 'static {
    /// Its rank among the levels.
    const LEVEL: Level;
    /// Vector registers: bounds the accumulators of a register tile.
    const REGISTERS: usize;
    /// Whether [`Isa::multiply_tiles`] is there.
    const HAS_TILES: bool = false;
    /// f32 lanes.
    type F32: Vector<Elem = f32>;
    /// f64 lanes.
    type F64: Vector<Elem = f64>;
    /// How products of bf16 inputs are formed.
    type Bf16: VectorKernel<bf16, V = Self::F32>;

    /// Widens the first `F32::LANES` elements.
    fn load_f16(src: &[f16]) -> Self::F32;
    /// Rounds to nearest even into the first `F32::LANES` elements; past the caches if asked for, as [`Vector::store_past_caches`].
    fn store_f16(v: Self::F32, dst: &mut [f16], past_caches: bool);
    /// Widens the first `F32::LANES` elements.
    fn load_bf16(src: &[bf16]) -> Self::F32;
    /// As [`Isa::store_f16`].
    fn store_bf16(v: Self::F32, dst: &mut [bf16], past_caches: bool);
    /// Calls a routine, compiled for this instruction set.
    fn call<R: Routine>(routine: R) -> R::Output;
    /// `sums[i][n] = sum over k of a[i][k] . b[k][n]` for `16 * M` rows and `16 * N` columns, `M` and `N` 1 or 2; each row of the sums
    /// begins `stride` elements after the last. With `add`, what they hold is added to.
    ///
    /// # Panics
    /// When an operand lies beyond its slice, or the instruction set has no tiles.
    #[inline(always)]
    fn multiply_tiles<const M: usize, const N: usize>(operands: TileOperands<'_>, sums: &mut [f32], stride: usize, add: bool) {
        let _ = (operands, sums, stride, add);
        unreachable!("no matrix tiles");
    }
}

/// Matrices of pairs of bf16 that are adjacent along the reduced axis; pairs travel as the bits of f32.
#[derive(Debug, Clone, Copy)]
pub struct TileOperands<'a> {
    /// `[16 * M, 16 * steps]`.
    pub a: &'a [f32],
    /// Elements from one row of `a` to the next.
    pub a_stride: usize,
    /// Elements from the 16 columns of `a` of one step to those of the next.
    pub a_step: usize,
    /// `[16 * steps, 16 * N]`.
    pub b: &'a [f32],
    /// Elements from one row of `b` to the next.
    pub b_stride: usize,
    /// Pairs that are summed over, in units of 16; not 0.
    pub steps: usize,
}

/// An instruction set with dot products of bf16 pairs. Packed pairs travel as the bits of f32 lanes.
pub trait Bf16Pairs: Isa {
    /// `acc + a.0 * b.0 + a.1 * b.1` per lane; denormals count as 0.
    fn dot(a: Self::F32, b: Self::F32, acc: Self::F32) -> Self::F32;
    /// Rounds two vectors to bf16 and interleaves them lane by lane.
    fn round_pairs(first: Self::F32, second: Self::F32) -> Self::F32;
    /// The two vectors whose lanes are interleaved.
    fn widen_pairs(pairs: Self::F32) -> [Self::F32; 2];
    /// Interleaves the first `F32::LANES` elements of two rows.
    fn zip(first: &[bf16], second: &[bf16]) -> Self::F32;
    /// Reads `F32::LANES` adjacent pairs.
    fn load_pairs(src: &[bf16]) -> Self::F32;
    /// Interleaves the first `2 * F32::LANES` elements of two rows, in an order that [`Bf16Pairs::unshuffle`] undoes.
    fn zip_shuffled(first: &[bf16], second: &[bf16]) -> [Self::F32; 2];
    /// Puts what was computed from [`Bf16Pairs::zip_shuffled`] in order.
    fn unshuffle(halves: [Self::F32; 2]) -> [Self::F32; 2];
    /// Rounds two vectors to bf16; the pairs are of adjacent lanes.
    fn round_adjacent(first: Self::F32, second: Self::F32) -> Self::F32;
}

/// Work that is written once for every instruction set.
///
/// Implementations mark [`Task::run`] `#[inline(always)]`.
pub trait Task {
    /// Whether it multiplies bfloat16, so that an instruction set with dot products of it makes a difference. Else nothing is compiled for
    /// that.
    const MULTIPLIES_BF16: bool;
    /// Whether it multiplies matrix tiles where there are some, so that operands of its products may be rounded to bf16. All tasks of a
    /// call must say the same: what one packs or sums, another reads.
    const MULTIPLIES_TILES: bool = false;

    /// Does piece `index` of the work with instruction set `I`.
    fn run<I: Isa>(&self, index: usize);
}

/// A part of tasks that is compiled once for each instruction set, where what is inlined is compiled anew in every place: for what takes
/// much longer than a call.
///
/// Implementations mark [`Routine::run`] `#[inline(always)]`.
pub trait Routine {
    /// What it returns.
    type Output;
    /// Does the work with instruction set `I`.
    fn run<I: Isa>(self) -> Self::Output;
}
