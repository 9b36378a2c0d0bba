//! Some more tokens of sequences whose states are kept in the caller's memory: decoding.
//!
//! A task takes a block of channels through all rows of the batch, so that filters are laid out once. States and tokens become rows with
//! the channels in the lanes, whatever order the caller's arrays have.

use super::args::{ConvShape, Values};
use super::taps::{fill, place};
use crate::math::load::{MAX_LANES, store_padded};
use crate::math::silu::silu;
use crate::parallel::{RowWriter, for_each_tile};
use crate::simd::{Isa, Level, SimdElement, Task, Vector};
use crate::workspace::{Scratch, carve};

/// Channels of a task.
const BLOCK: usize = 256;
/// Calls with less work than so many inputs, taps and elements of states are over before another thread would start.
const SERIAL: usize = 1 << 16;

/// Which state a row of the batch continues.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Slot {
    /// Number of the state; `None`: there is none, and outputs are 0.
    pub state: Option<usize>,
    /// How many tokens a circular state has seen, of which token `t` lies at `t % S`; `None`: states are shifted.
    pub seen: Option<usize>,
}

/// A call.
pub struct UpdateArgs<'a, T: SimdElement> {
    /// The sizes.
    pub shape: ConvShape,
    /// `[B, D, T]`.
    pub x: Values<'a, T>,
    /// `[D, W, 1]`.
    pub weight: Values<'a, T>,
    /// `[D, 1, 1]`.
    pub bias: Option<Values<'a, T>>,
    /// Whether outputs are `y sigmoid(y)`.
    pub silu: bool,
    /// One for each row of the batch; no state occurs twice.
    pub slots: &'a [Slot],
}

/// Where results go.
pub struct UpdateOut<'a, T> {
    /// `[B, T, D]` in blocks: [`outputs`] makes it.
    pub out: RowWriter<'a, T>,
    /// The states: rows of `[N, D, 1, S]`.
    pub states: RowWriter<'a, T>,
}

/// The outputs, contiguous `[B, T, D]`, as tasks ask for them.
pub fn outputs<'a, T>(data: &'a mut [T], shape: &ConvShape) -> RowWriter<'a, T> {
    let ConvShape { batch, channels, seqlen, .. } = *shape;
    RowWriter::blocks(data, [batch, seqlen, channels], [seqlen * channels, channels], BLOCK)
}

struct Blocks<'a, T: SimdElement> {
    args: &'a UpdateArgs<'a, T>,
    out: &'a UpdateOut<'a, T>,
}

impl<T: SimdElement> Task for Blocks<'_, T> {
    const MULTIPLIES_BF16: bool = false;

    #[inline(always)]
    fn run<I: Isa>(&self, index: usize) {
        let ConvShape { channels, seqlen, width, .. } = self.args.shape;
        let first = index * BLOCK;
        let own = BLOCK.min(channels - first);
        let stride = own.next_multiple_of(MAX_LANES);
        let mut scratch = Scratch::take::<T::Acc>(stride * (2 * width + seqlen));
        let mut rest = scratch.as_mut_slice::<T::Acc>();
        let taps = carve(&mut rest, stride * (width + 1));
        let rows = carve(&mut rest, stride * (width - 1 + seqlen));
        fill(taps, width, first..first + own, &self.args.weight, self.args.bias.as_ref());
        for (batch, slot) in self.args.slots.iter().enumerate() {
            let Some(state) = slot.state else {
                for token in 0..seqlen {
                    self.out.out.row(batch, token, index).fill(T::zeroed());
                }
                continue;
            };
            for c in 0..own {
                for t in 0..seqlen {
                    rows[(width - 1 + t) * stride + c] = self.args.x.get(batch, first + c, t);
                }
                let state = self.out.states.row(state, first + c, 0);
                self.advance(slot.seen, state, (&mut rows[c..], stride));
            }
            for token in 0..seqlen {
                let out = self.out.out.row(batch, token, index);
                let mut d = 0;
                while d < own {
                    let taps = &taps[place(d, width + 1)..];
                    let mut y = T::V::<I>::load(&taps[width * MAX_LANES..]);
                    for j in 0..width {
                        let x = T::V::<I>::load(&rows[(token + j) * stride + d..]);
                        y = x.mul_add(T::V::<I>::load(&taps[j * MAX_LANES..]), y);
                    }
                    if self.args.silu {
                        y = silu::<T, I>(y);
                    }
                    store_padded::<T, I>(y, &mut out[d..]);
                    d += T::V::<I>::LANES;
                }
            }
        }
    }
}

impl<T: SimdElement> Blocks<'_, T> {
    /// Puts what lies before the tokens of a channel in front of them, and the tokens into the state.
    #[inline(always)]
    fn advance(&self, seen: Option<usize>, state: &mut [T], (line, stride): (&mut [T::Acc], usize)) {
        let (before, tokens, len) = (self.args.shape.width - 1, self.args.shape.seqlen, state.len());
        if len == 0 {
            return;
        }
        if let Some(seen) = seen {
            let start = seen % len + len - before;
            for j in 0..before {
                line[j * stride] = state[(start + j) % len].to_acc();
            }
            for t in tokens.saturating_sub(len)..tokens {
                state[(seen % len + t) % len] = T::from_acc(line[(before + t) * stride]);
            }
            return;
        }
        for j in 0..before {
            line[j * stride] = state[len - before + j].to_acc();
        }
        let kept = len.saturating_sub(tokens);
        state.copy_within(len - kept.., 0);
        for (s, x) in state.iter_mut().enumerate().skip(kept) {
            *x = T::from_acc(line[(before + tokens + s - len) * stride]);
        }
    }
}

/// Computes outputs, and moves the states on, with up to `threads` threads.
pub fn update<T: SimdElement>(args: &UpdateArgs<'_, T>, out: &UpdateOut<'_, T>, level: Level, threads: usize) {
    let ConvShape { batch, channels, seqlen, width, state_len } = args.shape;
    let threads = if channels * (batch * (seqlen + state_len) + width) < SERIAL { 1 } else { threads };
    for_each_tile(level, threads, channels.div_ceil(BLOCK), &Blocks { args, out });
}
