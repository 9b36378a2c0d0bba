//! A block of channels: what a task of the selective scan works on, in vectors of channels.

use super::args::{Factors, SelectiveArgs, SelectiveShape};
use super::plane::CHUNK;
use crate::dtype::{Element, Float};
use crate::kernels::recurrent::Numbers;
use crate::math::activation::{power, sigmoid, softplus};
use crate::math::elementwise::{decay, fade_away};
use crate::math::load::MAX_LANES;
use crate::simd::{Isa, SimdElement, Vector, Wide};
use std::f64::consts::LOG2_E;
use std::ops::Range;

/// Channels of a block are a multiple of this, and so much more than one vector that a visit to rows of channels brings whole lines.
const LEAST_WIDTH: usize = MAX_LANES;
const MOST_WIDTH: usize = 4 * LEAST_WIDTH;
/// A call has at least so many blocks if its channels suffice.
const FEW_BLOCKS: usize = 32;

/// How the channels of a call are cut into blocks: by the sizes alone.
#[derive(Debug, Clone, Copy)]
pub struct Blocks {
    channels: usize,
    width: usize,
    of_group: usize,
    groups: usize,
    batch: usize,
}

/// A block.
#[derive(Debug, Clone)]
pub struct Block {
    /// Row of the batch.
    pub batch: usize,
    /// Its group.
    pub group: usize,
    /// Its number among the blocks of the group.
    pub number: usize,
    /// Its channels.
    pub channels: Range<usize>,
}

impl Blocks {
    /// Those of a call.
    pub fn new(shape: &SelectiveShape) -> Self {
        let channels = shape.channels / shape.groups.max(1);
        let least = shape.batch * shape.groups * channels.div_ceil(LEAST_WIDTH);
        let width = (least / FEW_BLOCKS * LEAST_WIDTH).clamp(LEAST_WIDTH, MOST_WIDTH);
        Self { channels, width, of_group: channels.div_ceil(width), groups: shape.groups, batch: shape.batch }
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.batch * self.groups * self.of_group
    }

    /// One of them, those of a group one after the other.
    #[inline(always)]
    pub fn get(&self, index: usize) -> Block {
        let (number, of) = (index % self.of_group, index / self.of_group);
        let (group, batch) = (of % self.groups, of / self.groups);
        let first = number * self.width;
        let channels = group * self.channels + first..group * self.channels + self.channels.min(first + self.width);
        Block { batch, group, number, channels }
    }
}

/// Sizes of what a block keeps in scratch, counted in elements.
#[derive(Debug, Clone, Copy)]
pub struct Sizes {
    /// Lanes of a vector.
    pub lanes: usize,
    /// Vectors of channels.
    pub vectors: usize,
    /// States of a channel.
    pub states: usize,
}

impl Sizes {
    /// For vectors of so many lanes.
    #[inline(always)]
    pub fn new(block: &Block, states: usize, lanes: usize) -> Self {
        Self { lanes, vectors: block.channels.len().div_ceil(lanes), states }
    }

    /// A number for each channel.
    pub fn channels(&self) -> usize {
        self.vectors * self.lanes
    }

    /// A chunk of one vector of channels.
    pub fn chunk(&self) -> usize {
        CHUNK * self.lanes
    }

    /// A chunk of all channels.
    pub fn chunks(&self) -> usize {
        self.vectors * self.chunk()
    }

    /// The states of one vector of channels.
    pub fn state(&self) -> usize {
        self.states * self.lanes
    }

    /// The states of all channels.
    pub fn all_states(&self) -> usize {
        self.vectors * self.state()
    }

    /// Factors, of a chunk of steps or of channels.
    pub fn factors(&self) -> usize {
        (self.states.div_ceil(self.lanes) * self.chunk()).max(self.all_states())
    }
}

/// Writes rows of numbers of each channel, `[_, D, 1, N]`, to `into`, `[vector of channels][N][lanes]`; 0 beyond the channels.
#[inline(always)]
pub fn read_channels<T: Element>(
    numbers: Option<&Numbers<'_, T>>,
    block: &Block,
    batch: usize,
    (sizes, count): (&Sizes, usize),
    into: &mut [T::Acc],
) {
    into[..sizes.channels() * count].fill(T::Acc::ZERO);
    let Some(numbers) = numbers else { return };
    for (i, channel) in block.channels.clone().enumerate() {
        let into = &mut into[i / sizes.lanes * count * sizes.lanes + i % sizes.lanes..];
        let mut put = |n: usize, x| into[n * sizes.lanes] = x;
        match numbers {
            Numbers::Input(tensor) => tensor.row(batch, channel, 0).iter().enumerate().for_each(|(n, x)| put(n, x.to_acc())),
            Numbers::Acc(tensor) => tensor.row(batch, channel, 0).iter().enumerate().for_each(|(n, &x)| put(n, x)),
        }
    }
}

/// The inverse of [`read_channels`], for the row of one channel, number `i` of its block.
#[inline(always)]
pub fn write_channel<E: Float>(from: &[E], i: usize, lanes: usize, into: &mut [E]) {
    let from = &from[i / lanes * into.len() * lanes + i % lanes..];
    for (n, x) in into.iter_mut().enumerate() {
        *x = from[n * lanes];
    }
}

/// Reads factors of a chunk; those of channels are read with the first one that is worked on.
#[inline(always)]
pub fn read_factors<T: SimdElement, I: Isa>(
    factors: &Factors<'_, T>,
    block: &Block,
    steps: Range<usize>,
    (sizes, is_first): (&Sizes, bool),
    into: &mut [T::Acc],
) {
    match factors {
        Factors::Steps(plane) => plane.read::<I>([block.batch, block.group], 0..sizes.states, steps, into),
        Factors::Channels(numbers) if is_first => read_channels(Some(numbers), block, 0, (sizes, sizes.states), into),
        Factors::Channels(_) => {}
    }
}

/// Factors in scratch, as the loops over the steps of one vector of channels read them.
#[derive(Clone, Copy)]
pub struct Reader<'s, E> {
    data: &'s [E],
    by_step: bool,
}

impl<'s, E: Wide> Reader<'s, E> {
    /// Of vector `v` of the channels, from state `n` on.
    #[inline(always)]
    pub fn new<T: Element>(factors: &Factors<'_, T>, data: &'s [E], sizes: &Sizes, v: usize, n: usize) -> Self {
        match factors {
            Factors::Steps(_) => Self { data: &data[n / sizes.lanes * sizes.chunk() + n % sizes.lanes..], by_step: true },
            Factors::Channels(_) => Self { data: &data[v * sizes.state() + n * sizes.lanes..], by_step: false },
        }
    }

    /// Whether there is a factor for each step.
    pub fn is_by_step(&self) -> bool {
        self.by_step
    }

    /// For the step at `t`, counted in elements, and the state that is `i` beyond the first.
    #[inline(always)]
    pub fn at<I: Isa>(&self, t: usize, i: usize) -> E::V<I> {
        if self.by_step { E::V::<I>::splat(self.data[t + i]) } else { E::V::<I>::load(&self.data[i * E::V::<I>::LANES..]) }
    }
}

/// `2^x`; for exponents that are 0 or below unless `GROWS`.
#[inline(always)]
pub fn factor<E: Wide, I: Isa, const GROWS: bool>(x: E::V<I>) -> E::V<I> {
    if GROWS { power::<E, I>(x) } else { decay::<E, I>(x) }
}

/// Whether some number is above 0, or not a number.
#[inline(always)]
pub fn any_above_0<E: Wide, I: Isa>(numbers: &[E], sign: f64) -> bool {
    let sign = E::V::<I>::splat(E::from_f64(sign));
    let mut most = E::V::<I>::splat(E::ZERO);
    let mut i = 0;
    while i < numbers.len() {
        most = most.max(E::V::<I>::load(&numbers[i..]).mul(sign));
        i += E::V::<I>::LANES;
    }
    let mut lanes = [E::ZERO; MAX_LANES];
    most.store(&mut lanes);
    lanes.iter().any(|&x| x > E::ZERO)
}

/// The parameters of a block in scratch.
pub struct Parameters<'s, E> {
    /// Rates in units of exponents of 2, `[vector of channels][N][lanes]`.
    pub a: &'s mut [E],
    /// Added to the sizes of steps.
    pub delta_bias: &'s mut [E],
    /// What inputs enter the outputs by.
    pub d: &'s mut [E],
    /// Whether some rate is above 0.
    pub rises: bool,
}

impl<E: Wide> Parameters<'_, E> {
    /// Reads those of a block.
    #[inline(always)]
    pub fn read<T: SimdElement<Acc = E>, I: Isa>(&mut self, args: &SelectiveArgs<'_, T>, block: &Block, sizes: &Sizes) {
        read_channels(Some(&args.a), block, 0, (sizes, sizes.states), self.a);
        crate::math::elementwise::scale::<E, I>(self.a, E::from_f64(LOG2_E));
        self.rises = any_above_0::<E, I>(self.a, 1.0);
        read_channels(args.delta_bias.as_ref(), block, 0, (sizes, 1), self.delta_bias);
        read_channels(args.d.as_ref(), block, 0, (sizes, 1), self.d);
    }

    /// Turns `delta` of a chunk of vector `v` into sizes of steps, and writes their derivatives to `slopes` if there are any; returns
    /// whether states may grow.
    #[inline(always)]
    pub fn step_sizes<T: SimdElement<Acc = E>, I: Isa>(
        &self,
        args: &SelectiveArgs<'_, T>,
        v: usize,
        delta: &mut [E],
        mut slopes: Option<&mut [E]>,
    ) -> bool {
        let lanes = E::V::<I>::LANES;
        let bias = E::V::<I>::load(&self.delta_bias[v * lanes..]);
        let mut t = 0;
        while t < delta.len() {
            let mut x = E::V::<I>::load(&delta[t..]).add(bias);
            if args.delta_softplus {
                if let Some(slopes) = &mut slopes {
                    sigmoid::<E, I>(x).store(&mut slopes[t..]);
                }
                x = softplus::<E, I>(x);
            }
            x.store(&mut delta[t..]);
            t += lanes;
        }
        self.rises || (!args.delta_softplus && any_above_0::<E, I>(delta, -1.0))
    }
}

/// States before the first step; what comes near denormals is 0 from here on.
#[inline(always)]
pub fn settle<E: Wide, I: Isa>(state: &mut [E]) {
    fade_away::<E, I>(state, E::from_f64(1.0));
}
