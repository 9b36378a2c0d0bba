//! The backward pass of the selective scan: who computes what, and where gradients go.
//!
//! A task is a block of channels, chunks of steps from the last to the first. Blocks of a group add to its sums over channels (`B'` and
//! `C'`) in turn, so that bits do not depend on the number of threads.

use super::args::{Factors, SelectiveBackwardArgs, SelectiveGradients, SelectiveShape};
use super::block::{Block, Blocks, Sizes, write_channel};
use super::plane::{CHUNK, PlaneWriter};
use super::reverse::Memory;
use crate::dtype::{Element, Float};
use crate::math::elementwise::add;
use crate::parallel::{RowTurns, RowWriter, for_each_tile};
use crate::simd::{Isa, Level, SimdElement, Task, Vector, Wide};
use crate::workspace::Scratch;

/// Sums over channels of a chunk of each group.
struct Turns<'a, E>(Option<RowTurns<'a, E>>);

impl<'a, E: Float> Turns<'a, E> {
    fn new(sums: &'a mut [E], shape: &SelectiveShape) -> Self {
        let (rows, chunks, width) = (shape.batch * shape.groups, shape.steps.div_ceil(CHUNK), shape.states * CHUNK);
        let turns = (!sums.is_empty())
            .then(|| RowTurns::new(sums, [rows, chunks, 1, width], [chunks * width, width, width], rows * chunks));
        Self(turns)
    }
}

/// What tasks write.
struct Sinks<'a, T: Element> {
    u: Option<PlaneWriter<'a, T>>,
    delta: Option<PlaneWriter<'a, T>>,
    z: Option<PlaneWriter<'a, T>>,
    /// One for each row of the batch, `[B, D, 1, N]` or `[B, D, 1, 1]`.
    a: Option<RowWriter<'a, T::Acc>>,
    d: Option<RowWriter<'a, T::Acc>>,
    delta_bias: Option<RowWriter<'a, T::Acc>>,
    initial: Option<RowWriter<'a, T::Acc>>,
    /// Of factors of channels, likewise.
    of_channels: [Option<RowWriter<'a, T::Acc>>; 2],
    /// Of factors of steps.
    of_steps: [Turns<'a, T::Acc>; 2],
}

struct Backward<'a, T: SimdElement> {
    args: &'a SelectiveBackwardArgs<'a, T>,
    sinks: &'a Sinks<'a, T>,
}

/// Computes gradients with up to `threads` threads.
///
/// # Panics
/// When a slice is shorter than what belongs into it.
pub fn backward<T: SimdElement>(
    args: &SelectiveBackwardArgs<'_, T>,
    gradients: SelectiveGradients<'_, T>,
    level: Level,
    threads: usize,
) where
    T::Acc: Wide,
{
    let shape = &args.forward.shape;
    let SelectiveShape { batch, channels, groups, states, steps } = *shape;
    let chunks = steps.div_ceil(CHUNK);
    let zeros = |wanted: bool, len: usize| vec![T::Acc::ZERO; if wanted { len } else { 0 }];
    let factors = [&args.forward.b, &args.forward.c];
    let SelectiveGradients { u, delta, z, a, b, c, d, delta_bias, initial } = gradients;
    let of_factors = [b, c];
    let wanted: [_; 2] = std::array::from_fn(|i| (of_factors[i].is_some(), matches!(factors[i], Factors::Steps(_))));
    let mut of_a = zeros(a.is_some(), batch * channels * states);
    let [mut of_d, mut of_bias] = [&d, &delta_bias].map(|x| zeros(x.is_some(), batch * channels));
    let mut of_channels = wanted.map(|(wanted, by_step)| zeros(wanted && !by_step, batch * channels * states));
    let mut of_steps = wanted.map(|(wanted, by_step)| zeros(wanted && by_step, batch * groups * chunks * states * CHUNK));
    {
        let [b_channels, c_channels] = &mut of_channels;
        let [b_steps, c_steps] = &mut of_steps;
        let sinks = Sinks::<T> {
            u,
            delta,
            z,
            a: rows(&mut of_a, shape, states),
            d: rows(&mut of_d, shape, 1),
            delta_bias: rows(&mut of_bias, shape, 1),
            initial: initial.and_then(|initial| rows(initial, shape, states)),
            of_channels: [rows(b_channels, shape, states), rows(c_channels, shape, states)],
            of_steps: [Turns::new(b_steps, shape), Turns::new(c_steps, shape)],
        };
        for_each_tile(level, threads, Blocks::new(shape).count(), &Backward { args, sinks: &sinks });
    }
    for (into, from) in [(a, &of_a), (d, &of_d), (delta_bias, &of_bias)] {
        sum_rows_of_batch(into, from);
    }
    for (i, into) in of_factors.into_iter().enumerate() {
        if wanted[i].1 {
            in_order(into, &of_steps[i], shape);
        } else {
            sum_rows_of_batch(into, &of_channels[i]);
        }
    }
}

/// `[B, D, 1, width]`, if there are any.
fn rows<'a, E>(data: &'a mut [E], shape: &SelectiveShape, width: usize) -> Option<RowWriter<'a, E>> {
    let channels = shape.channels;
    (!data.is_empty()).then(|| RowWriter::new(data, [shape.batch, channels, 1, width], [channels * width, width, width]))
}

fn sum_rows_of_batch<E: Wide>(into: Option<&mut [E]>, from: &[E]) {
    let Some(into) = into else { return };
    into.fill(E::ZERO);
    for row in from.chunks(into.len().max(1)) {
        for (sum, &x) in into.iter_mut().zip(row) {
            *sum = *sum + x;
        }
    }
}

/// Chunks, `[B * G, chunks, N, CHUNK]`, as `[B, G, N, L]`.
fn in_order<E: Float>(into: Option<&mut [E]>, from: &[E], shape: &SelectiveShape) {
    let Some(into) = into else { return };
    let SelectiveShape { states, steps, .. } = *shape;
    let chunks = steps.div_ceil(CHUNK);
    for (row, into) in into.chunks_mut(steps.max(1)).enumerate() {
        let (of, n) = (row / states, row % states);
        for (chunk, into) in into.chunks_mut(CHUNK).enumerate() {
            into.copy_from_slice(&from[((of * chunks + chunk) * states + n) * CHUNK..][..into.len()]);
        }
    }
}

impl<T: SimdElement> Task for Backward<'_, T>
where
    T::Acc: Wide,
{
    const MULTIPLIES_BF16: bool = false;

    #[inline(always)]
    fn run<I: Isa>(&self, index: usize) {
        let _watch = self.sinks.of_steps.each_ref().map(|turns| turns.0.as_ref().map(RowTurns::watch));
        let shape = &self.args.forward.shape;
        let block = Blocks::new(shape).get(index);
        let sizes = Sizes::new(&block, shape.states, T::V::<I>::LANES);
        run::<T, I>(self.args, self.sinks, &block, &sizes);
    }
}

#[inline(always)]
fn run<T: SimdElement, I: Isa>(args: &SelectiveBackwardArgs<'_, T>, sinks: &Sinks<'_, T>, block: &Block, sizes: &Sizes)
where
    T::Acc: Wide,
{
    let mut scratch = Scratch::take::<T::Acc>(Memory::<T::Acc>::len(sizes));
    let mut memory = Memory::new(scratch.as_mut_slice::<T::Acc>(), sizes);
    memory.start::<T, I>(args, block, sizes);
    let shape = &args.forward.shape;
    let chunks = shape.steps.div_ceil(CHUNK);
    for number in (0..chunks).rev() {
        let steps = number * CHUNK..shape.steps.min((number + 1) * CHUNK);
        memory.read::<T, I>(args, block, steps.clone(), (sizes, number + 1 == chunks));
        for v in 0..sizes.vectors {
            memory.vector::<T, I>(args, block, number, steps.len() * sizes.lanes, (sizes, v));
        }
        for (sink, from) in [(&sinks.u, &*memory.u), (&sinks.delta, &*memory.delta), (&sinks.z, &*memory.z)] {
            if let Some(sink) = sink {
                sink.write::<I>([block.batch, 0], block.channels.clone(), steps.clone(), from);
            }
        }
        let group = block.batch * shape.groups + block.group;
        for (turns, sums) in sinks.of_steps.iter().zip(&memory.d_steps) {
            if let Some(turns) = &turns.0 {
                let mut turn = turns.wait(group * chunks + number, block.number);
                add::<T::Acc, I>(turn.row(group, number, 0), sums);
            }
        }
    }
    let [d_b, d_c] = &memory.d_factors;
    for (sink, from) in [
        (&sinks.a, &*memory.d_a),
        (&sinks.d, &*memory.d_d),
        (&sinks.delta_bias, &*memory.d_bias),
        (&sinks.initial, &*memory.carry),
        (&sinks.of_channels[0], &**d_b),
        (&sinks.of_channels[1], &**d_c),
    ] {
        let Some(sink) = sink else { continue };
        for (i, channel) in block.channels.clone().enumerate() {
            write_channel(from, i, sizes.lanes, sink.row(block.batch, channel, 0));
        }
    }
}
