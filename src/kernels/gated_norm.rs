//! Norms of rows by the root of their mean square, that are gated: `y = (x / sqrt(mean(x^2) + eps) * weight + bias) * act(g)`.
//!
//! An element costs 12 bytes in float32 (two read, one written), one exponential and one division: bound by memory from two cores on. A row is
//! read once and written once; in between it lies in L1, widened.

use crate::dtype::{Element, Float};
use crate::kernels::recurrent::Numbers;
use crate::math::activation::sigmoid;
use crate::math::elementwise::dot;
use crate::math::load::{MAX_LANES, narrow, widen};
use crate::parallel::{RowWriter, for_each_tile};
use crate::simd::{Isa, Level, SimdElement, Task, Vector, Wide};
use crate::tensor::Tensor;
use crate::workspace::{Scratch, carve};

/// Elements of a task, at least: weights are laid out once for each.
const TASK: usize = 1 << 14;
/// Calls of fewer elements than this are over before another thread would start.
const SERIAL: usize = 1 << 16;

/// What a gate multiplies with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// `g sigmoid(g)`.
    Silu,
    /// `sigmoid(g)`.
    Sigmoid,
}

/// A call.
#[derive(Debug, Clone, Copy)]
pub struct GatedNormArgs<'a, T: Element> {
    /// Rows, `[A, B, C, D]`.
    pub x: Tensor<'a, T>,
    /// Their gates, `[A, B, C, D]`.
    pub g: Tensor<'a, T>,
    /// Factors, `[1, 1, 1, D]`; 1 if there are none.
    pub weight: Option<Numbers<'a, T>>,
    /// What is added, `[1, 1, 1, D]`; 0 if there is nothing.
    pub bias: Option<Numbers<'a, T>>,
    /// Is added to the mean of squares.
    pub eps: f64,
    /// What a gate multiplies with.
    pub activation: Activation,
}

struct Rows<'a, T: Element> {
    args: &'a GatedNormArgs<'a, T>,
    out: &'a RowWriter<'a, T>,
    per_task: usize,
}

impl<T: SimdElement> Task for Rows<'_, T>
where
    T::Acc: Wide,
{
    const MULTIPLIES_BF16: bool = false;

    #[inline(always)]
    fn run<I: Isa>(&self, index: usize) {
        let [batch, tokens, heads, width] = self.args.x.shape();
        let lanes = <T::Acc as SimdElement>::V::<I>::LANES;
        let whole = width.next_multiple_of(lanes);
        let stride = width.next_multiple_of(MAX_LANES);
        let mut scratch = Scratch::take::<T::Acc>(4 * stride);
        let mut rest = scratch.as_mut_slice::<T::Acc>();
        let (weight, bias) = (carve(&mut rest, stride), carve(&mut rest, stride));
        let (row, gates) = (carve(&mut rest, stride), carve(&mut rest, stride));
        parameter::<T, I>(self.args.weight.as_ref(), T::Acc::from_f64(1.0), weight);
        parameter::<T, I>(self.args.bias.as_ref(), T::Acc::ZERO, bias);
        let first = index * self.per_task;
        for at in first..(first + self.per_task).min(batch * tokens * heads) {
            let (sequence, token, head) = (at / heads / tokens, at / heads % tokens, at % heads);
            widen::<T, I>(self.args.x.row(sequence, token, head), row);
            widen::<T, I>(self.args.g.row(sequence, token, head), gates);
            let mean = dot::<T::Acc, I>(&row[..whole], &row[..whole]) / width as f64;
            let factor = <T::Acc as SimdElement>::V::<I>::splat(T::Acc::from_f64((mean + self.args.eps).sqrt().recip()));
            let mut d = 0;
            while d < width {
                let x = <T::Acc as SimdElement>::V::<I>::load(&row[d..]).mul(factor);
                let weight = <T::Acc as SimdElement>::V::<I>::load(&weight[d..]);
                let x = x.mul_add(weight, <T::Acc as SimdElement>::V::<I>::load(&bias[d..]));
                let gate = <T::Acc as SimdElement>::V::<I>::load(&gates[d..]);
                let x = x.mul(sigmoid::<T::Acc, I>(gate));
                let x = if self.args.activation == Activation::Silu { x.mul(gate) } else { x };
                x.store(&mut row[d..]);
                d += lanes;
            }
            narrow::<T, I>(row, self.out.row(sequence, token, head));
        }
    }
}

/// Widens a parameter; `default` where there is none.
#[inline(always)]
fn parameter<T: SimdElement, I: Isa>(numbers: Option<&Numbers<'_, T>>, default: T::Acc, into: &mut [T::Acc])
where
    T::Acc: Wide,
{
    match numbers {
        None => into.fill(default),
        Some(Numbers::Input(tensor)) => widen::<T, I>(tensor.row(0, 0, 0), into),
        Some(Numbers::Acc(tensor)) => widen::<T::Acc, I>(tensor.row(0, 0, 0), into),
    }
}

/// Computes `[A, B, C, D]` with up to `threads` threads.
pub fn rms_norm_gated<T: SimdElement>(args: &GatedNormArgs<'_, T>, out: &RowWriter<'_, T>, level: Level, threads: usize)
where
    T::Acc: Wide,
{
    let [batch, tokens, heads, width] = args.x.shape();
    let (rows, per_task) = (batch * tokens * heads, TASK.div_ceil(width.max(1)));
    let threads = if rows * width < SERIAL { 1 } else { threads };
    for_each_tile(level, threads, rows.div_ceil(per_task), &Rows { args, out, per_task });
}
