//! Short causal convolutions: each channel has a filter of `W` taps of its own.
//!
//! ```text
//! y_t = bias + sum over j < W of w_j x_(t - W + 1 + j)
//! o_t = y_t, or y_t sigmoid(y_t), + residual_t
//! ```
//!
//! What lies before the first token of a sequence is its state: the last `S >= W - 1` tokens before. Sequences are [`Run`]s of tokens
//! that see no others.
//!
//! | axis that is contiguous | forward | backward | in the lanes |
//! | --- | --- | --- | --- |
//! | channels | `tokens_first` | `tokens_first_backward` | channels |
//! | tokens | `channels_first` | `channels_first_backward` | tokens |
//! | any, few tokens, states in place | `update` | | channels |
//!
//! # Roofline
//!
//! Forward, in float32: 4 bytes of an input come in and 4 of an output go out (and 4 more are read where stores allocate lines), for
//! `2 W` operations and about 20 of the activation. With 16 lanes and `W` = 4 that is 128 bytes for 4 multiply-adds, 14 operations of the
//! activation and 1 division, which keeps the divider for 10 cycles beside them: 13 cycles where nothing waits, or 27 GB/s of a core at
//! 2.8 GHz, about what a core copies. So the kernel is bound by memory as soon as cores share it, and arithmetic must not wait: inputs are
//! read once, outputs are written once, nothing in between is in memory, four vectors go through the activation in step, and lines are
//! requested ahead, those of outputs as well. The half types move half the bytes for the same operations, and are bound by the activation.
//!
//! Backward: `x` and the outputs' gradients come in and the inputs' go out, 12 bytes for `6 W` operations and about 25 of the
//! activation's derivative; sums before the activation are computed anew, which costs `2 W` operations instead of 8 bytes.

mod args;
mod channels_first;
mod channels_first_backward;
pub mod naive;
mod plan;
mod taps;
mod tokens_first;
mod tokens_first_backward;
pub mod update;

pub use args::{ConvArgs, ConvGradients, ConvGradientsOut, ConvOut, ConvShape, FilterGradients, Order, Run, Values, rows_of};

use crate::dtype::Float;
use crate::math::load::MAX_LANES;
use crate::parallel::{RowWriter, for_each_tile};
use crate::simd::{Level, SimdElement, Wide};
use args::BLOCK;
use plan::Plan;
use taps::{Taps, interleaved, place};

/// Calls of fewer inputs than this are over before another thread would start.
const SERIAL: usize = 1 << 16;
/// Inputs of a task, at least.
const TASK: usize = 1 << 17;
/// Tokens of a task of the forward, at least: those before them are read again.
const FEW_TOKENS: usize = 64;
/// Most groups of tokens that keep sums of their own.
const MAX_GROUPS: usize = 64;

fn threads_for<T: SimdElement>(args: &ConvArgs<'_, T>, threads: usize) -> usize {
    let tokens: usize = args.runs.iter().map(|run| run.len).sum();
    if tokens * args.shape.channels < SERIAL { 1 } else { threads }
}

/// Tokens of a task where channels are contiguous.
fn tokens_of_a_task(shape: &ConvShape) -> usize {
    (TASK / BLOCK.min(shape.channels.max(1))).max(FEW_TOKENS)
}

/// Channels of a task where tokens are contiguous.
fn channels_of_a_task(shape: &ConvShape) -> usize {
    (TASK / shape.seqlen.max(1)).clamp(1, MAX_LANES)
}

/// Computes outputs and states with up to `threads` threads.
pub fn forward<T: SimdElement>(args: &ConvArgs<'_, T>, out: &ConvOut<'_, T>, level: Level, threads: usize) {
    let shape = &args.shape;
    if shape.channels == 0 {
        return;
    }
    let threads = threads_for(args, threads);
    match args.order {
        Order::TokensFirst => {
            let plan = Plan::new(args.runs, tokens_of_a_task(shape));
            let taps = Taps::new(shape, &args.weight, args.bias.as_ref());
            let task = tokens_first::Forward { args, out, plan: &plan, taps: &taps };
            for_each_tile(level, threads, plan.len() * shape.channels.div_ceil(BLOCK), &task);
        }
        Order::ChannelsFirst => {
            let group = channels_of_a_task(shape);
            let task = channels_first::Forward { args, out, group };
            for_each_tile(level, threads, shape.batch * shape.channels.div_ceil(group), &task);
        }
    }
}

/// Computes the gradients of all inputs, the residual's aside, which is that of the outputs.
pub fn backward<T: SimdElement>(
    args: &ConvArgs<'_, T>,
    given: &ConvGradients<'_, T>,
    out: &ConvGradientsOut<'_, T>,
    filters: &mut FilterGradients<'_, T::Acc>,
    level: Level,
    threads: usize,
) where
    T::Acc: Wide,
{
    let ConvShape { batch, channels, width, .. } = args.shape;
    if channels == 0 {
        return;
    }
    let threads = threads_for(args, threads);
    match args.order {
        Order::TokensFirst => {
            let tokens: usize = args.runs.iter().map(|run| run.len.max(1)).sum();
            let plan = Plan::new(args.runs, tokens_of_a_task(&args.shape).max(tokens.div_ceil(MAX_GROUPS)));
            let taps = Taps::new(&args.shape, &args.weight, args.bias.as_ref());
            let len = interleaved(channels, width + 1);
            let mut sums = vec![T::Acc::ZERO; plan.len() * len];
            let rows = RowWriter::blocks(&mut sums, [plan.len(), 1, len], [len, len], BLOCK * (width + 1));
            let task = tokens_first_backward::Backward { args, given, out, plan: &plan, taps: &taps, sums: &rows };
            for_each_tile(level, threads, plan.len() * channels.div_ceil(BLOCK), &task);
            drop(rows);
            add_up(filters, &sums, len, width, |channel, j| place(channel, width + 1) + j * MAX_LANES);
        }
        Order::ChannelsFirst => {
            let group = channels_of_a_task(&args.shape);
            let len = channels * (width + 1);
            let mut sums = vec![T::Acc::ZERO; batch * len];
            let rows = RowWriter::new(&mut sums, [batch, channels, 1, width + 1], [len, width + 1, width + 1]);
            let task = channels_first_backward::Backward { args, given, out, group, sums: &rows };
            for_each_tile(level, threads, batch * channels.div_ceil(group), &task);
            drop(rows);
            add_up(filters, &sums, len, width, |channel, j| channel * (width + 1) + j);
        }
    }
}

/// Adds the sums of all groups, which have `len` elements each, in their order.
fn add_up<E: Wide>(
    filters: &mut FilterGradients<'_, E>,
    sums: &[E],
    len: usize,
    width: usize,
    place: impl Fn(usize, usize) -> usize,
) {
    let total = |at: usize| sums.iter().skip(at).step_by(len).fold(E::ZERO, |total, &x| total + x);
    for (channel, bias) in filters.bias.iter_mut().enumerate() {
        for j in 0..width {
            filters.weight[channel * width + j] = total(place(channel, j));
        }
        *bias = total(place(channel, width));
    }
}
