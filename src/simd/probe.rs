//! Register-only loops that reach the machine's peak, for benches to measure kernels against.

use super::{Isa, Level, SimdElement, Task, TileOperands, Vector, VectorKernel};
use crate::dtype::DType;
use crate::workspace::Scratch;
use half::bf16;
use std::hint::black_box;

/// Which arithmetic a probe runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProbeKind {
    /// f32 multiply-add.
    F32,
    /// f64 multiply-add.
    F64,
    /// Matrix tiles of bf16; at levels without them the bf16 dot product, or the f32 multiply-add.
    Bf16,
}

/// Accumulators: enough to hide a latency of 6 cycles at 2 a cycle, few enough for 16 registers.
const CHAINS: usize = 12;

/// Steps of tiles in a round, whose operands stay in L1.
const STEPS: usize = 4;

struct Peak<T> {
    rounds: usize,
    element: std::marker::PhantomData<T>,
}

/// Two by two tiles, over and over.
#[inline(always)]
fn multiply_tiles<I: Isa>(rounds: usize) {
    let mut scratch = Scratch::take::<f32>(2 * STEPS * 32 * 16 + 32 * 32);
    let (a, rest) = scratch.as_mut_slice::<f32>().split_at_mut(STEPS * 32 * 16);
    let (b, sums) = rest.split_at_mut(STEPS * 32 * 16);
    a.fill(0.0);
    b.fill(0.0);
    for _ in 0..rounds {
        let operands = TileOperands { a: &*a, a_stride: STEPS * 16, a_step: 16, b: &*b, b_stride: 32, steps: STEPS };
        I::multiply_tiles::<2, 2>(operands, sums, 32, false);
    }
}

impl<T: SimdElement> Task for Peak<T> {
    const MULTIPLIES_BF16: bool = matches!(T::DTYPE, DType::BF16);
    const MULTIPLIES_TILES: bool = Self::MULTIPLIES_BF16;

    #[inline(always)]
    fn run<I: Isa>(&self, _index: usize) {
        if const { I::HAS_TILES && Self::MULTIPLIES_TILES } {
            multiply_tiles::<I>(self.rounds);
            return;
        }
        let zero = <T::Acc as crate::dtype::Float>::ZERO;
        let x = black_box(T::V::<I>::splat(zero));
        let mut sums = [x; CHAINS];
        for _ in 0..self.rounds {
            for sum in &mut sums {
                *sum = T::Kernel::<I>::mul_acc(x, x, *sum);
            }
        }
        black_box(sums);
    }
}

/// Runs `rounds` dependent steps of every chain; returns the floating-point operations done.
pub fn peak_flops_loop(level: Level, kind: ProbeKind, rounds: usize) -> f64 {
    fn go<T: SimdElement>(level: Level, rounds: usize) {
        level.run(&Peak::<T> { rounds, element: std::marker::PhantomData }, 0);
    }
    /// Products of a round.
    struct Width<'a>(ProbeKind, &'a std::cell::Cell<usize>);
    impl Task for Width<'_> {
        const MULTIPLIES_BF16: bool = true;
        const MULTIPLIES_TILES: bool = true;

        #[inline(always)]
        fn run<I: Isa>(&self, _index: usize) {
            self.1.set(match self.0 {
                ProbeKind::F32 => CHAINS * I::F32::LANES,
                ProbeKind::F64 => CHAINS * I::F64::LANES,
                ProbeKind::Bf16 if I::HAS_TILES => 32 * 32 * 32 * STEPS,
                ProbeKind::Bf16 => CHAINS * I::F32::LANES * I::Bf16::DEPTH,
            });
        }
    }
    match kind {
        ProbeKind::F32 => go::<f32>(level, rounds),
        ProbeKind::F64 => go::<f64>(level, rounds),
        ProbeKind::Bf16 => go::<bf16>(level, rounds),
    }
    let width = std::cell::Cell::new(0);
    level.run(&Width(kind, &width), 0);
    2.0 * (rounds * width.get()) as f64
}

struct Sum<'a> {
    data: &'a [f32],
}

impl Task for Sum<'_> {
    const MULTIPLIES_BF16: bool = false;

    #[inline(always)]
    fn run<I: Isa>(&self, _index: usize) {
        let mut sums = [I::F32::splat(0.0); 8];
        for chunk in self.data.chunks_exact(8 * I::F32::LANES) {
            for (i, sum) in sums.iter_mut().enumerate() {
                *sum = sum.add(I::F32::load(&chunk[i * I::F32::LANES..]));
            }
        }
        black_box(sums);
    }
}

/// Reads every element once, as fast as the level can.
pub fn sum_bytes(level: Level, data: &[f32]) {
    level.run(&Sum { data }, 0);
}
