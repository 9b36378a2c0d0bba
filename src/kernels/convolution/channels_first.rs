//! Outputs where tokens are contiguous: tokens in the lanes, one channel after the other.
//!
//! Taps read inputs at shifted places: where they lie, or, if they have to be widened or filters reach before the run, in a line of
//! scratch that begins with what lies before them.

use super::args::{ConvArgs, ConvOut, Run};
use super::plan::runs_of;
use crate::dtype::Float;
use crate::math::load::{MAX_LANES, load_adjacent, load_padded, store_output, widen};
use crate::math::silu::silu_each;
use crate::simd::{Isa, SimdElement, Task, Vector, begins_a_line, prefetch_lines, prefetch_lines_to_write};
use crate::workspace::{Scratch, carve};

/// Tokens that are staged at a time, so that they stay in L1.
pub(super) const SPAN: usize = 1024;
/// How many tokens ahead inputs and outputs are requested; beyond the end that is in the next channel's.
pub(super) const AHEAD: usize = SPAN;
/// Vectors of tokens that are worked on in step.
pub(super) const TOGETHER: usize = 4;

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

    /// `bias + sum_j taps_j x_j` for some vectors of tokens.
    #[inline(always)]
    pub(super) fn apply<T: SimdElement<Acc = E>, I: Isa, const N: usize>(&self, x: &impl Reach<T>) -> [T::V<I>; N] {
        let mut y = [T::V::<I>::splat(self.bias); N];
        // Four taps are the usual: known here, they stay in registers.
        if let &[a, b, c, d] = &*self.taps {
            for (j, tap) in [a, b, c, d].into_iter().enumerate() {
                for (y, x) in y.iter_mut().zip(x.load::<I, N>(j)) {
                    *y = x.mul_add(T::V::<I>::splat(tap), *y);
                }
            }
            return y;
        }
        for (j, &tap) in self.taps.iter().enumerate() {
            for (y, x) in y.iter_mut().zip(x.load::<I, N>(j)) {
                *y = x.mul_add(T::V::<I>::splat(tap), *y);
            }
        }
        y
    }
}

/// What a filter reads, from the place of its first tap on.
///
/// No closure: those are compiled for no instruction set, unless the compiler chooses to inline them. Implementations mark
/// [`Reach::load`] `#[inline(always)]`.
pub(super) trait Reach<T: SimdElement> {
    /// Adjacent vectors that belong to tap `j`.
    fn load<I: Isa, const N: usize>(&self, j: usize) -> [T::V<I>; N];
}

/// A line of scratch.
pub(super) struct Staged<'x, A>(pub &'x [A]);

impl<T: SimdElement> Reach<T> for Staged<'_, T::Acc> {
    #[inline(always)]
    fn load<I: Isa, const N: usize>(&self, j: usize) -> [T::V<I>; N] {
        load_adjacent(&self.0[j..])
    }
}

/// Inputs, which may end within the only vector.
struct InPlace<'x, T>(&'x [T]);

impl<T: SimdElement> Reach<T> for InPlace<'_, T> {
    #[inline(always)]
    fn load<I: Isa, const N: usize>(&self, j: usize) -> [T::V<I>; N] {
        if N == 1 {
            return [load_padded::<T, I>(&self.0[j..]); N];
        }
        let x = &self.0[j..][..N * T::V::<I>::LANES];
        let mut vectors = [T::load::<I>(x); N];
        for (i, vector) in vectors.iter_mut().enumerate().skip(1) {
            *vector = T::load::<I>(&x[i * T::V::<I>::LANES..]);
        }
        vectors
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
        let own = &runs[runs_of(runs, batch)];
        for channel in first..shape.channels.min(first + self.group) {
            filter.read(self.args, channel);
            let out = self.out.out.row(batch, channel, 0);
            for run in own {
                self.args.write_state(run, self.out.last.as_ref(), channel..channel + 1);
                self.channel::<I>(run, channel, &filter, rest, &mut out[run.first..run.first + run.len]);
            }
        }
    }
}

/// The tokens of a run of one channel.
struct Tokens<'r, T> {
    x: &'r [T],
    residual: Option<&'r [T]>,
    out: &'r mut [T],
    silu: bool,
    past_caches: bool,
}

impl<T: SimdElement> Tokens<'_, T> {
    /// Activates vectors of sums, adds the residual, and writes the tokens from `t` on, as far as they go if it is one vector.
    #[inline(always)]
    fn finish<I: Isa, const N: usize>(&mut self, mut y: [T::V<I>; N], t: usize) {
        let lanes = T::V::<I>::LANES;
        let end = if N == 1 { self.out.len() } else { t + N * lanes };
        if self.silu {
            y = silu_each::<T, I, N>(y);
        }
        if let Some(residual) = self.residual {
            let residual = &residual[t..end];
            for (i, y) in y.iter_mut().enumerate() {
                *y = y.add(load_padded::<T, I>(&residual[i * lanes..]));
            }
        }
        let out = &mut self.out[t..end];
        for (i, y) in y.into_iter().enumerate() {
            store_output::<T, I>(y, &mut out[i * lanes..], self.past_caches);
        }
    }

    /// Requests the inputs and outputs that follow soon after `len` tokens from `t` on.
    #[inline(always)]
    fn request(&self, t: usize, len: usize) {
        prefetch_lines(self.x.as_ptr().wrapping_add(t + AHEAD), len);
        if !self.past_caches {
            prefetch_lines_to_write(self.out.as_ptr().wrapping_add(t + AHEAD), len);
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
        let (lanes, together) = (T::V::<I>::LANES, TOGETHER * T::V::<I>::LANES);
        let past_caches = self.out.out.passes_caches() && begins_a_line(out);
        let mut tokens = Tokens { x, residual, out, silu: args.silu, past_caches };
        stage_past(args, run, (channel, 0), line);
        // Inputs that need not be widened are staged only where filters reach before the run.
        let widened = size_of::<T>() < size_of::<T::Acc>();
        let staged = if widened { run.len } else { run.len.min(before.next_multiple_of(together)) };
        let (mut start, mut t) = (0, 0);
        while start < staged {
            let end = staged.min(start + SPAN);
            widen::<T, I>(&x[start..end], &mut line[before..]);
            while t + together <= end {
                tokens.request(t, together);
                let y = filter.apply::<T, I, TOGETHER>(&Staged(&line[t - start..]));
                tokens.finish::<I, TOGETHER>(y, t);
                t += together;
            }
            while t < end {
                let y = filter.apply::<T, I, 1>(&Staged(&line[t - start..]));
                tokens.finish::<I, 1>(y, t);
                t += lanes;
            }
            if end < staged {
                line.copy_within(end - start..end - start + before, 0);
            }
            start = end;
        }
        while t + together <= x.len() {
            tokens.request(t, together);
            let y = filter.apply::<T, I, TOGETHER>(&InPlace(&x[t - before..]));
            tokens.finish::<I, TOGETHER>(y, t);
            t += together;
        }
        while t < x.len() {
            let y = filter.apply::<T, I, 1>(&InPlace(&x[t - before..]));
            tokens.finish::<I, 1>(y, t);
            t += lanes;
        }
    }
}
