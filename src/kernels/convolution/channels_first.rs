//! Outputs where tokens are contiguous: tokens in the lanes, one channel after the other.
//!
//! Inputs are widened once into a line of scratch that begins with what lies before them; taps read it at shifted places.

use super::args::{ConvArgs, ConvOut, Run};
use super::plan::runs_of;
use crate::dtype::Float;
use crate::math::load::{MAX_LANES, load_padded, store_padded, widen};
use crate::math::silu::silu;
use crate::simd::{Isa, SimdElement, Task, Vector};
use crate::workspace::{Scratch, carve};

/// Tokens that are staged at a time, so that they stay in L1.
pub(super) const SPAN: usize = 1024;

/// Tasks are rows of the batch times groups of channels.
pub struct Forward<'a, T: SimdElement> {
    pub args: &'a ConvArgs<'a, T>,
    pub out: &'a ConvOut<'a, T>,
    /// Channels of a task.
    pub group: usize,
}

/// The filter of one channel.
pub(super) struct Filter<'s, E> {
    pub taps: &'s mut [E],
    pub bias: E,
}

impl<E: Float> Filter<'_, E> {
    /// Reads the filter of a channel.
    #[inline(always)]
    pub(super) fn read<T: SimdElement<Acc = E>>(&mut self, args: &ConvArgs<'_, T>, channel: usize) {
        for (j, tap) in self.taps.iter_mut().enumerate() {
            *tap = args.weight.get(channel, j, 0);
        }
        self.bias = args.bias.as_ref().map_or(E::ZERO, |bias| bias.get(channel, 0, 0));
    }

    /// `bias + sum_j taps_j line_(t + j)` for the tokens from `t` on.
    #[inline(always)]
    pub(super) fn apply<T: SimdElement<Acc = E>, I: Isa>(&self, line: &[E], t: usize) -> T::V<I> {
        let mut y = T::V::<I>::splat(self.bias);
        // Four taps are the usual: known here, they stay in registers.
        if let &[a, b, c, d] = &*self.taps {
            for (j, tap) in [a, b, c, d].into_iter().enumerate() {
                y = T::V::<I>::load(&line[t + j..]).mul_add(T::V::<I>::splat(tap), y);
            }
            return y;
        }
        for (j, &tap) in self.taps.iter().enumerate() {
            y = T::V::<I>::load(&line[t + j..]).mul_add(T::V::<I>::splat(tap), y);
        }
        y
    }
}

/// Puts what lies before token `at` of a run at the start of a line.
#[inline(always)]
pub(super) fn stage_past<T: SimdElement>(args: &ConvArgs<'_, T>, run: &Run, (channel, at): (usize, usize), line: &mut [T::Acc]) {
    let before = args.shape.width - 1;
    for (j, x) in line[..before].iter_mut().enumerate() {
        *x = args.token(run, channel, (at + j) as isize - before as isize);
    }
}

impl<T: SimdElement> Task for Forward<'_, T> {
    const MULTIPLIES_BF16: bool = false;

    #[inline(always)]
    fn run<I: Isa>(&self, index: usize) {
        let (shape, runs) = (&self.args.shape, self.args.runs);
        let groups = shape.channels.div_ceil(self.group);
        let (batch, first) = (index / groups, index % groups * self.group);
        let mut scratch = Scratch::take::<T::Acc>(2 * shape.width + SPAN + 2 * MAX_LANES);
        let mut rest = scratch.as_mut_slice::<T::Acc>();
        let mut filter = Filter { taps: carve(&mut rest, shape.width), bias: T::Acc::ZERO };
        for channel in first..shape.channels.min(first + self.group) {
            filter.read(self.args, channel);
            let out = self.out.out.row(batch, channel, 0);
            for run in &runs[runs_of(runs, batch)] {
                self.args.write_state(run, self.out.last.as_ref(), channel..channel + 1);
                self.channel::<I>(run, channel, &filter, rest, &mut out[run.first..run.first + run.len]);
            }
        }
    }
}

impl<T: SimdElement> Forward<'_, T> {
    #[inline(always)]
    fn channel<I: Isa>(&self, run: &Run, channel: usize, filter: &Filter<'_, T::Acc>, line: &mut [T::Acc], out: &mut [T]) {
        let args = self.args;
        let of_run = run.first..run.first + run.len;
        let residual = args.residual.as_ref().map(|residual| &residual.row(run.batch, channel, 0)[of_run.clone()]);
        if run.hidden {
            match residual {
                Some(residual) => out.copy_from_slice(residual),
                None => out.fill(T::zeroed()),
            }
            return;
        }
        let (x, before) = (&args.x.row(run.batch, channel, 0)[of_run], args.shape.width - 1);
        stage_past(args, run, (channel, 0), line);
        let mut start = 0;
        while start < run.len {
            let end = run.len.min(start + SPAN);
            widen::<T, I>(&x[start..end], &mut line[before..]);
            let out = &mut out[start..end];
            let mut t = 0;
            while t < out.len() {
                let mut y = filter.apply::<T, I>(line, t);
                if args.silu {
                    y = silu::<T, I>(y);
                }
                if let Some(residual) = residual {
                    y = y.add(load_padded::<T, I>(&residual[start + t..end]));
                }
                store_padded::<T, I>(y, &mut out[t..]);
                t += T::V::<I>::LANES;
            }
            line.copy_within(end - start..end - start + before, 0);
            start = end;
        }
    }
}
