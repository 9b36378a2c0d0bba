//! `h_t = f_t h_(t-1) + x_t` in each channel: HGRN's recurrence, whose gates are logarithms, and Griffin's, whose gates are factors.
//!
//! A token of a channel costs 12 bytes (float32: two read, one written), one exponential and one multiply-add: bound by memory from two
//! cores on. Tokens go by one after the other, a block of channels at a time, whose states stay in L1.

use crate::dtype::{Element, Float};
use crate::kernels::recurrent::{Numbers, Sequence};
use crate::math::activation::power;
use crate::math::elementwise::fade_away;
use crate::math::load::{MAX_LANES, narrow, widen};
use crate::parallel::{PieceWriter, for_each_tile};
use crate::simd::{Isa, Level, SimdElement, Task, Vector, Wide};
use crate::tensor::Tensor;
use crate::workspace::{Scratch, carve};
use std::f64::consts::LOG2_E;
use std::ops::Range;

/// Most channels of a task: a kilobyte of each row, whose pages are looked up once.
const MOST_WIDTH: usize = 256;
/// A call has at least so many tasks if its channels suffice.
const FEW_TASKS: usize = 32;
/// Tokens between two looks for states that come near denormals.
const SETTLE: usize = 64;

/// What gates are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Gates {
    /// Natural logarithms of factors.
    Logs,
    /// Factors.
    Factors,
}

/// A call.
#[derive(Debug, Clone, Copy)]
pub struct LinearArgs<'a, T: Element> {
    /// Inputs, `[B, T, 1, D]`.
    pub x: Tensor<'a, T>,
    /// Gates, `[B, T, 1, D]`.
    pub g: Numbers<'a, T>,
    /// What they are.
    pub gates: Gates,
    /// States before the first token, `[N, 1, 1, D]`; zeros if there are none.
    pub initial: Option<Numbers<'a, T>>,
    /// The sequences, by the number of their state.
    pub sequences: &'a [Sequence],
}

/// Where results go.
pub struct LinearOut<'a, T: Element> {
    /// States after each token, `[B, T, 1, D]`.
    pub out: PieceWriter<'a, T>,
    /// Those after the last, `[N, 1, 1, D]`.
    pub last: Option<PieceWriter<'a, T::Acc>>,
}

/// What the backward pass is given.
#[derive(Debug, Clone, Copy)]
pub struct LinearBackwardArgs<'a, T: Element> {
    /// The forward call, of which inputs are not read.
    pub forward: LinearArgs<'a, T>,
    /// Its outputs, `[B, T, 1, D]`.
    pub out: Tensor<'a, T>,
    /// Their gradient.
    pub d_out: Tensor<'a, T>,
    /// That of the states after the last token, `[N, 1, 1, D]`.
    pub d_last: Option<Numbers<'a, T>>,
}

/// Numbers that are written: of the type of inputs or of accumulators.
pub enum NumbersOut<'a, T: Element> {
    /// Of the type of inputs.
    Input(PieceWriter<'a, T>),
    /// Of the type of accumulators.
    Acc(PieceWriter<'a, T::Acc>),
}

/// Where gradients go, as far as they are asked for.
pub struct LinearGradients<'a, T: Element> {
    /// Of inputs, `[B, T, 1, D]`.
    pub x: Option<PieceWriter<'a, T>>,
    /// Of gates, `[B, T, 1, D]`.
    pub g: Option<NumbersOut<'a, T>>,
    /// Of states before the first token, `[N, 1, 1, D]`.
    pub initial: Option<NumbersOut<'a, T>>,
}

/// Tasks: a block of channels of a sequence.
#[derive(Debug, Clone, Copy)]
struct Blocks {
    channels: usize,
    width: usize,
}

impl Blocks {
    fn new(sequences: usize, channels: usize) -> Self {
        let least = sequences * channels.div_ceil(MAX_LANES);
        Self { channels, width: (least / FEW_TASKS * MAX_LANES).clamp(MAX_LANES, MOST_WIDTH) }
    }

    fn per_sequence(&self) -> usize {
        self.channels.div_ceil(self.width)
    }

    /// The sequence and the channels of a task.
    #[inline(always)]
    fn get(&self, index: usize) -> (usize, Range<usize>) {
        let first = index % self.per_sequence() * self.width;
        (index / self.per_sequence(), first..self.channels.min(first + self.width))
    }
}

/// Computes outputs and last states with up to `threads` threads.
pub fn forward<T: SimdElement>(args: &LinearArgs<'_, T>, out: &LinearOut<'_, T>, level: Level, threads: usize)
where
    T::Acc: Wide,
{
    let sequences = args.sequences.len();
    let blocks = Blocks::new(sequences, args.x.shape()[3]);
    for_each_tile(level, threads, sequences * blocks.per_sequence(), &Forward { args, out, blocks });
}

/// Computes gradients with up to `threads` threads.
pub fn backward<T: SimdElement>(args: &LinearBackwardArgs<'_, T>, into: &LinearGradients<'_, T>, level: Level, threads: usize)
where
    T::Acc: Wide,
{
    let sequences = args.forward.sequences.len();
    let blocks = Blocks::new(sequences, args.out.shape()[3]);
    for_each_tile(level, threads, sequences * blocks.per_sequence(), &Backward { args, into, blocks });
}

/// Some numbers of a row, widened.
#[inline(always)]
fn read<T: SimdElement, I: Isa>(
    numbers: &Numbers<'_, T>,
    [batch, token]: [usize; 2],
    channels: &Range<usize>,
    into: &mut [T::Acc],
) where
    T::Acc: Wide,
{
    match numbers {
        Numbers::Input(tensor) => widen::<T, I>(&tensor.row(batch, token, 0)[channels.clone()], into),
        Numbers::Acc(tensor) => widen::<T::Acc, I>(&tensor.row(batch, token, 0)[channels.clone()], into),
    }
}

impl<T: SimdElement> NumbersOut<'_, T>
where
    T::Acc: Wide,
{
    #[inline(always)]
    fn write<I: Isa>(&self, [batch, token]: [usize; 2], channels: &Range<usize>, from: &[T::Acc]) {
        match self {
            Self::Input(pieces) => narrow::<T, I>(from, pieces.piece([batch, token, 0], channels.start, channels.len())),
            Self::Acc(pieces) => narrow::<T::Acc, I>(from, pieces.piece([batch, token, 0], channels.start, channels.len())),
        }
    }
}

#[inline(always)]
fn factor<E: Wide, I: Isa>(gates: Gates, g: E::V<I>) -> E::V<I> {
    match gates {
        Gates::Logs => power::<E, I>(g.mul(E::V::<I>::splat(E::from_f64(LOG2_E)))),
        Gates::Factors => g,
    }
}

struct Forward<'a, T: Element> {
    args: &'a LinearArgs<'a, T>,
    out: &'a LinearOut<'a, T>,
    blocks: Blocks,
}

impl<T: SimdElement> Task for Forward<'_, T>
where
    T::Acc: Wide,
{
    #[inline(always)]
    fn run<I: Isa>(&self, index: usize) {
        let (number, channels) = self.blocks.get(index);
        let (args, sequence) = (self.args, self.args.sequences[number]);
        let width = channels.len().next_multiple_of(MAX_LANES);
        let mut scratch = Scratch::take::<T::Acc>(3 * width);
        let mut rest = scratch.as_mut_slice::<T::Acc>();
        let [x, g, state] = std::array::from_fn(|_| carve(&mut rest, width));
        for row in [&mut *x, &mut *g, &mut *state] {
            row.fill(T::Acc::ZERO);
        }
        if let Some(initial) = &args.initial {
            read::<T, I>(initial, [number, 0], &channels, state);
        }
        for t in 0..sequence.len {
            let token = sequence.first + t;
            if t % SETTLE == 0 {
                fade_away::<T::Acc, I>(state, T::Acc::from_f64(1.0));
            }
            widen::<T, I>(&args.x.row(sequence.batch, token, 0)[channels.clone()], x);
            read::<T, I>(&args.g, [sequence.batch, token], &channels, g);
            advance::<T::Acc, I>(args.gates, x, g, state);
            narrow::<T, I>(state, self.out.out.piece([sequence.batch, token, 0], channels.start, channels.len()));
        }
        if let Some(last) = &self.out.last {
            let last = last.piece([number, 0, 0], channels.start, channels.len());
            last.copy_from_slice(&state[..channels.len()]);
        }
    }
}

#[inline(always)]
fn advance<E: Wide, I: Isa>(gates: Gates, x: &[E], g: &[E], state: &mut [E]) {
    let mut d = 0;
    while d < state.len() {
        let fade = factor::<E, I>(gates, E::V::<I>::load(&g[d..]));
        fade.mul_add(E::V::<I>::load(&state[d..]), E::V::<I>::load(&x[d..])).store(&mut state[d..]);
        d += E::V::<I>::LANES;
    }
}

struct Backward<'a, T: Element> {
    args: &'a LinearBackwardArgs<'a, T>,
    into: &'a LinearGradients<'a, T>,
    blocks: Blocks,
}

impl<T: SimdElement> Task for Backward<'_, T>
where
    T::Acc: Wide,
{
    #[inline(always)]
    fn run<I: Isa>(&self, index: usize) {
        let (number, channels) = self.blocks.get(index);
        let (args, sequence) = (self.args, self.args.forward.sequences[number]);
        let width = channels.len().next_multiple_of(MAX_LANES);
        let mut scratch = Scratch::take::<T::Acc>(4 * width);
        let mut rest = scratch.as_mut_slice::<T::Acc>();
        let [gradient, g, before, carry] = std::array::from_fn(|_| carve(&mut rest, width));
        for row in [&mut *gradient, &mut *g, &mut *before, &mut *carry] {
            row.fill(T::Acc::ZERO);
        }
        if let Some(d_last) = &args.d_last {
            read::<T, I>(d_last, [number, 0], &channels, carry);
        }
        for t in (0..sequence.len).rev() {
            let at = [sequence.batch, sequence.first + t];
            if t % SETTLE == 0 {
                fade_away::<T::Acc, I>(carry, T::Acc::from_f64(1.0));
            }
            widen::<T, I>(&args.d_out.row(at[0], at[1], 0)[channels.clone()], gradient);
            read::<T, I>(&args.forward.g, at, &channels, g);
            if t > 0 {
                widen::<T, I>(&args.out.row(at[0], at[1] - 1, 0)[channels.clone()], before);
            } else if let Some(initial) = &args.forward.initial {
                read::<T, I>(initial, [number, 0], &channels, before);
            } else {
                before.fill(T::Acc::ZERO);
            }
            retreat::<T::Acc, I>(args.forward.gates, gradient, g, before, carry);
            if let Some(x) = &self.into.x {
                narrow::<T, I>(gradient, x.piece([at[0], at[1], 0], channels.start, channels.len()));
            }
            if let Some(into) = &self.into.g {
                into.write::<I>(at, &channels, g);
            }
        }
        if let Some(initial) = &self.into.initial {
            initial.write::<I>([number, 0], &channels, carry);
        }
    }
}

/// Gradients of outputs become those of states, and gates become their gradients.
#[inline(always)]
fn retreat<E: Wide, I: Isa>(gates: Gates, gradient: &mut [E], g: &mut [E], before: &[E], carry: &mut [E]) {
    let mut d = 0;
    while d < carry.len() {
        let fade = factor::<E, I>(gates, E::V::<I>::load(&g[d..]));
        let own = E::V::<I>::load(&gradient[d..]).add(E::V::<I>::load(&carry[d..]));
        let of_factor = own.mul(E::V::<I>::load(&before[d..]));
        let of_gate = if gates == Gates::Logs { of_factor.mul(fade) } else { of_factor };
        own.store(&mut gradient[d..]);
        of_gate.store(&mut g[d..]);
        own.mul(fade).store(&mut carry[d..]);
        d += E::V::<I>::LANES;
    }
}
