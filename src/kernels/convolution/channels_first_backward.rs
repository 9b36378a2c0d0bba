//! Gradients where tokens are contiguous: the formulas of `tokens_first_backward`, with tokens in the lanes.

use super::args::{ConvArgs, ConvGradients, ConvGradientsOut, Run};
use super::channels_first::{AHEAD, Filter, SPAN, Staged, TOGETHER, stage_past};
use super::plan::runs_of;
use crate::dtype::Float;
use crate::math::load::{MAX_LANES, load_padded, store_output, widen};
use crate::math::silu::silu_slope_each;
use crate::parallel::RowWriter;
use crate::simd::{Isa, SimdElement, Task, Vector, Wide, begins_a_line, prefetch_lines, prefetch_lines_to_write};
use crate::workspace::{Scratch, carve};

/// Tasks are rows of the batch times groups of channels.
pub struct Backward<'a, T: SimdElement> {
    pub args: &'a ConvArgs<'a, T>,
    pub given: &'a ConvGradients<'a, T>,
    pub out: &'a ConvGradientsOut<'a, T>,
    /// Channels of a task.
    pub group: usize,
    /// Sums of each row of the batch for the gradients of filters and biases, `[B, D, 1, W + 1]`.
    pub sums: &'a RowWriter<'a, T::Acc>,
}

/// What is kept of a channel.
struct Line<'s, E> {
    /// Inputs, from `W - 1` tokens before the first one on.
    x: &'s mut [E],
    /// Gradients of sums before the activation, and zeros after the last one.
    g: &'s mut [E],
    /// Sums of the gradients of taps and bias.
    sums: &'s mut [E],
}

impl<T: SimdElement> Task for Backward<'_, T>
where
    T::Acc: Wide,
{
    const MULTIPLIES_BF16: bool = false;

    #[inline(always)]
    fn run<I: Isa>(&self, index: usize) {
        let (shape, runs) = (&self.args.shape, self.args.runs);
        let groups = shape.channels.div_ceil(self.group);
        let (batch, first) = (index / groups, index % groups * self.group);
        // Lines end with whole vectors after what filters reach.
        let len = SPAN + 2 * shape.width + 2 * MAX_LANES;
        let mut scratch = Scratch::take::<T::Acc>(shape.width + 2 * len);
        let mut rest = scratch.as_mut_slice::<T::Acc>();
        let mut filter = Filter { taps: carve(&mut rest, shape.width), bias: T::Acc::ZERO };
        let [x, g] = [(); 2].map(|()| carve(&mut rest, len));
        for channel in first..shape.channels.min(first + self.group) {
            filter.read(self.args, channel);
            let out = self.out.x.row(batch, channel, 0);
            let sums = self.sums.row(batch, channel, 0);
            sums.fill(T::Acc::ZERO);
            let mut line = Line { x: &mut *x, g: &mut *g, sums };
            for run in &runs[runs_of(runs, batch)] {
                self.channel::<I>(run, channel, &filter, &mut line, &mut out[run.first..run.first + run.len]);
            }
        }
    }
}

impl<T: SimdElement> Backward<'_, T>
where
    T::Acc: Wide,
{
    #[inline(always)]
    fn channel<I: Isa>(
        &self,
        run: &Run,
        channel: usize,
        filter: &Filter<'_, T::Acc>,
        line: &mut Line<'_, T::Acc>,
        out: &mut [T],
    ) {
        let (shape, reach) = (&self.args.shape, self.args.shape.width - 1);
        let first_in_state = self.given.first_in_state(shape, run);
        let past_caches = self.out.x.passes_caches() && begins_a_line(out);
        let mut start = 0;
        loop {
            let end = run.len.min(start + SPAN);
            self.gradients_of_sums::<I>(run, channel, filter, line, start);
            if start == 0 {
                self.past(run, channel, filter, line.g);
            }
            if !run.hidden {
                sum_filter::<T, I>(line, end - start, shape.width);
            }
            let mut t = start;
            while t < end {
                let mut dx = T::V::<I>::splat(T::Acc::ZERO);
                for (j, &tap) in filter.taps.iter().enumerate() {
                    dx = T::V::<I>::load(&line.g[t - start + reach - j..]).mul_add(T::V::<I>::splat(tap), dx);
                }
                if !past_caches {
                    prefetch_lines_to_write(out.as_ptr().wrapping_add(t + AHEAD), T::V::<I>::LANES);
                }
                store_output::<T, I>(dx, &mut out[t..end], past_caches);
                t += T::V::<I>::LANES;
            }
            for (token, out) in out.iter_mut().enumerate().take(end).skip(first_in_state.max(start)) {
                let mut dx = self.given.by_state(shape, run, channel, token as isize);
                for (j, &tap) in filter.taps.iter().enumerate() {
                    dx = dx + tap * line.g[token - start + reach - j];
                }
                *out = T::from_acc(dx);
            }
            start = end;
            if start == run.len {
                break;
            }
        }
    }

    /// Gradients of the sums before the activation of a span of tokens and of those that it is reached by.
    #[inline(always)]
    fn gradients_of_sums<I: Isa>(
        &self,
        run: &Run,
        channel: usize,
        filter: &Filter<'_, T::Acc>,
        line: &mut Line<'_, T::Acc>,
        start: usize,
    ) {
        let (args, reach) = (self.args, self.args.shape.width - 1);
        let end = run.len.min(start + SPAN + reach);
        if run.hidden {
            line.g.fill(T::Acc::ZERO);
            return;
        }
        let of_span = run.first + start..run.first + end;
        stage_past(args, run, (channel, start), line.x);
        let x = &args.x.row(run.batch, channel, 0)[of_span.clone()];
        widen::<T, I>(x, &mut line.x[reach..]);
        let d_out = &self.given.d_out.row(run.batch, channel, 0)[of_span];
        let mut t = 0;
        while t + TOGETHER * T::V::<I>::LANES <= d_out.len() {
            for rows in [x, d_out] {
                prefetch_lines(rows.as_ptr().wrapping_add(t + AHEAD), TOGETHER * T::V::<I>::LANES);
            }
            weigh::<T, I, TOGETHER>(args.silu, d_out, filter, line, t);
            t += TOGETHER * T::V::<I>::LANES;
        }
        while t < d_out.len() {
            weigh::<T, I, 1>(args.silu, d_out, filter, line, t);
            t += T::V::<I>::LANES;
        }
        // Also what the last vector wrote beyond the end.
        line.g[d_out.len()..].fill(T::Acc::ZERO);
    }

    /// Writes the gradients of the state before the first token.
    #[inline(always)]
    fn past(&self, run: &Run, channel: usize, filter: &Filter<'_, T::Acc>, g: &[T::Acc]) {
        let (Some(initial), Some(number)) = (&self.out.initial, run.initial) else { return };
        let (shape, reach) = (&self.args.shape, self.args.shape.width - 1);
        for back in 1..=shape.state_len {
            let mut dx = self.given.by_state(shape, run, channel, -(back as isize));
            for (j, &tap) in filter.taps.iter().enumerate().take((reach + 1).saturating_sub(back)) {
                dx = dx + tap * g[reach - back - j];
            }
            initial.row(number, channel, shape.state_len - back)[0] = dx;
        }
    }
}

/// Gradients of the sums before the activation of some vectors of tokens, from `t` on.
#[inline(always)]
fn weigh<T: SimdElement, I: Isa, const N: usize>(
    silu: bool,
    d_out: &[T],
    filter: &Filter<'_, T::Acc>,
    line: &mut Line<'_, T::Acc>,
    t: usize,
) {
    let lanes = T::V::<I>::LANES;
    let mut slopes = [T::V::<I>::splat(T::Acc::from_f64(1.0)); N];
    if silu {
        slopes = silu_slope_each::<T, I, N>(filter.apply::<T, I, N>(&Staged(&line.x[t..])));
    }
    for (i, slope) in slopes.into_iter().enumerate() {
        let at = t + i * lanes;
        load_padded::<T, I>(&d_out[at..]).mul(slope).store(&mut line.g[at..]);
    }
}

/// Adds to the gradients of taps and bias what `count` tokens make.
#[inline(always)]
fn sum_filter<T: SimdElement, I: Isa>(line: &mut Line<'_, T::Acc>, count: usize, width: usize)
where
    T::Acc: Wide,
{
    let lanes = T::V::<I>::LANES;
    let whole = count & !(lanes - 1);
    // Lanes are summed for as many taps as there are.
    for first in (0..=width).step_by(lanes) {
        let last = (first + lanes).min(width + 1);
        let taps = last.min(width) - first;
        let mut block = T::V::<I>::zero_block();
        let sums = block.as_mut();
        let mut i = 0;
        while i + TOGETHER <= taps {
            sums[i..i + TOGETHER].copy_from_slice(&sum_taps::<T, I, TOGETHER>(line, whole, first + i));
            i += TOGETHER;
        }
        while i < taps {
            [sums[i]] = sum_taps::<T, I, 1>(line, whole, first + i);
            i += 1;
        }
        if last > width {
            let mut sum = T::V::<I>::splat(T::Acc::ZERO);
            for t in (0..whole).step_by(lanes) {
                sum = sum.add(T::V::<I>::load(&line.g[t..]));
            }
            sums[taps] = sum;
        }
        let mut found = [T::Acc::ZERO; MAX_LANES];
        T::V::<I>::sum_rows(block).store(&mut found);
        for (j, found) in (first..last).zip(found) {
            let mut total = line.sums[j] + found;
            for t in whole..count {
                total = total + if j < width { line.g[t] * line.x[t + j] } else { line.g[t] };
            }
            line.sums[j] = total;
        }
    }
}

/// Sums for the gradients of `N` taps from `j` on, lane by lane.
#[inline(always)]
fn sum_taps<T: SimdElement, I: Isa, const N: usize>(line: &Line<'_, T::Acc>, whole: usize, j: usize) -> [T::V<I>; N] {
    let lanes = T::V::<I>::LANES;
    let mut sums = [T::V::<I>::splat(T::Acc::ZERO); N];
    let mut t = 0;
    while t < whole {
        let g = T::V::<I>::load(&line.g[t..]);
        let x = &line.x[t + j..][..lanes + N - 1];
        for (i, sum) in sums.iter_mut().enumerate() {
            *sum = g.mul_add(T::V::<I>::load(&x[i..]), *sum);
        }
        t += lanes;
    }
    sums
}
