//! One step of a state space in place: `h = e^(delta A) h + delta x B^T`, `y = h C + D x`, times `z sigmoid(z)`.
//!
//! Bound by reading and writing the states once. States are in the lanes, as they lie in memory; sums over them are formed for as many
//! channels as there are lanes at a time.

use crate::dtype::{Element, Float};
use crate::error::{Error, Result};
use crate::math::activation::{power, sigmoid, softplus};
use crate::math::load::{MAX_LANES, load_padded, narrow, store_padded, widen};
use crate::parallel::{PieceWriter, RowWriter, for_each_tile};
use crate::simd::{Isa, Level, SimdElement, Task, Vector, Wide};
use crate::tensor::{Tensor, extent, shape_text};
use crate::workspace::{Scratch, carve};
use std::f64::consts::LOG2_E;

/// Channels of a task.
const WIDTH: usize = 64;
/// Calls of fewer numbers in states than this are over before another thread would start.
const SERIAL: usize = 1 << 17;

/// The sizes of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StepShape {
    /// Rows of inputs.
    pub batch: usize,
    /// Heads, `H`.
    pub heads: usize,
    /// Groups of heads that share `B` and `C`; divides `heads`.
    pub groups: usize,
    /// Channels of a head, `P`.
    pub channels: usize,
    /// States of a channel, `N`.
    pub states: usize,
}

/// A `[B, H, P, N]` array of any strides, 0 among them.
#[derive(Debug, Clone, Copy)]
pub struct Strided<'a, T> {
    data: &'a [T],
    strides: [usize; 4],
}

impl<'a, T> Strided<'a, T> {
    /// Views `data`.
    ///
    /// # Errors
    /// [`Error::Shape`] when the last element lies beyond `data`, [`Error::Overflow`] when its position has no `usize`.
    pub fn new(arg: &'static str, data: &'a [T], shape: [usize; 4], strides: [usize; 4]) -> Result<Self> {
        if extent(arg, &shape, &strides)? > data.len() {
            let got = format!("{} with strides {strides:?}", shape_text(&shape));
            return Err(Error::Shape { arg, expected: format!("of at most {} elements", data.len()), got });
        }
        Ok(Self { data, strides })
    }

    #[inline(always)]
    fn offset(&self, [b, h, p]: [usize; 3]) -> usize {
        b * self.strides[0] + h * self.strides[1] + p * self.strides[2]
    }
}

/// Parameters: of the type of inputs, or of accumulators.
#[derive(Debug, Clone, Copy)]
pub enum Parameter<'a, T: Element> {
    /// Of the type of inputs.
    Input(Strided<'a, T>),
    /// Of the type of accumulators.
    Acc(Strided<'a, T::Acc>),
}

impl<T: Element> Parameter<'_, T> {
    #[inline(always)]
    fn at(&self, of: [usize; 3]) -> T::Acc {
        match self {
            Self::Input(strided) => strided.data[strided.offset(of)].to_acc(),
            Self::Acc(strided) => strided.data[strided.offset(of)],
        }
    }

    /// Whether all states of a channel have the same number.
    fn is_constant(&self) -> bool {
        match self {
            Self::Input(strided) => strided.strides[3] == 0,
            Self::Acc(strided) => strided.strides[3] == 0,
        }
    }

    #[inline(always)]
    fn row(&self, of: [usize; 3], into: &mut [T::Acc]) {
        match self {
            Self::Input(strided) => {
                for (n, x) in into.iter_mut().enumerate() {
                    *x = strided.data[strided.offset(of) + n * strided.strides[3]].to_acc();
                }
            }
            Self::Acc(strided) if strided.strides[3] == 1 => {
                into.copy_from_slice(&strided.data[strided.offset(of)..][..into.len()]);
            }
            Self::Acc(strided) => {
                for (n, x) in into.iter_mut().enumerate() {
                    *x = strided.data[strided.offset(of) + n * strided.strides[3]];
                }
            }
        }
    }
}

/// The states, `[S, H, P, N]`.
pub enum States<'a, T: Element> {
    /// Of the type of inputs.
    Input(RowWriter<'a, T>),
    /// Of the type of accumulators.
    Acc(RowWriter<'a, T::Acc>),
}

/// A step.
pub struct StepArgs<'a, T: Element> {
    /// The sizes.
    pub shape: StepShape,
    /// Inputs, `[B, H, P, 1]`.
    pub x: Strided<'a, T>,
    /// Sizes of steps, `[B, H, P, 1]`.
    pub dt: Parameter<'a, T>,
    /// Rates of decay, `[1, H, P, N]`.
    pub a: Parameter<'a, T>,
    /// What inputs enter the states by, `[B, 1, G, N]`.
    pub b: Tensor<'a, T>,
    /// What states are read by, `[B, 1, G, N]`.
    pub c: Tensor<'a, T>,
    /// What inputs enter the outputs by, `[1, H, P, 1]`.
    pub d: Option<Parameter<'a, T>>,
    /// Outputs are multiplied by `z sigmoid(z)`, `[B, H, P, 1]`.
    pub z: Option<Strided<'a, T>>,
    /// Added to the sizes of steps, `[1, H, P, 1]`.
    pub dt_bias: Option<Parameter<'a, T>>,
    /// Whether softplus is taken of them after that.
    pub dt_softplus: bool,
    /// The state that each row of inputs belongs to, no two the same; rows without one have outputs of 0.
    pub rows: &'a [Option<usize>],
}

/// Updates states and computes outputs, `[B, 1, H, P]`, with up to `threads` threads.
pub fn update<T: SimdElement>(
    args: &StepArgs<'_, T>,
    states: &States<'_, T>,
    out: &PieceWriter<'_, T>,
    level: Level,
    threads: usize,
) where
    T::Acc: Wide,
{
    let StepShape { batch, heads, channels, states: n, .. } = args.shape;
    let threads = if batch * heads * channels * n < SERIAL { 1 } else { threads };
    for_each_tile(level, threads, batch * heads * channels.div_ceil(WIDTH), &Update { args, states, out });
}

struct Update<'a, T: Element> {
    args: &'a StepArgs<'a, T>,
    states: &'a States<'a, T>,
    out: &'a PieceWriter<'a, T>,
}

impl<T: SimdElement> Task for Update<'_, T>
where
    T::Acc: Wide,
{
    const MULTIPLIES_BF16: bool = false;

    #[inline(always)]
    fn run<I: Isa>(&self, index: usize) {
        let StepShape { heads, groups, channels, states, .. } = self.args.shape;
        let per_head = channels.div_ceil(WIDTH);
        let (first, of) = (index % per_head * WIDTH, index / per_head);
        let (head, batch) = (of % heads, of / heads);
        let out = self.out.piece([batch, 0, head], first, WIDTH.min(channels - first));
        let Some(number) = self.args.rows[batch] else {
            out.fill(T::zeroed());
            return;
        };
        let width = states.next_multiple_of(MAX_LANES);
        let mut scratch = Scratch::take::<T::Acc>(3 * width);
        let mut rest = scratch.as_mut_slice::<T::Acc>();
        let [b, c, rates] = std::array::from_fn(|_| carve(&mut rest, width));
        let group = head / (heads / groups);
        widen::<T, I>(self.args.b.row(batch, 0, group), b);
        widen::<T, I>(self.args.c.row(batch, 0, group), c);
        rates.fill(T::Acc::ZERO);
        for (i, out) in out.chunks_mut(T::V::<I>::LANES).enumerate() {
            let place = [batch, head, first + i * T::V::<I>::LANES];
            let sizes = Sizes::new::<T, I>(self.args, place, out.len());
            let mut sums = [T::Acc::ZERO; MAX_LANES];
            let work = Channels { args: self.args, number, place, count: out.len(), sizes: &sizes, b, c };
            match self.states {
                States::Input(rows) => work.run::<T, I>(rows, rates, &mut sums),
                States::Acc(rows) => work.run::<T::Acc, I>(rows, rates, &mut sums),
            }
            sizes.close::<T, I>(self.args, place, &mut sums, out);
        }
    }
}

/// What the channels of one vector bring.
struct Sizes<E> {
    x: [E; MAX_LANES],
    /// Sizes of steps.
    dt: [E; MAX_LANES],
    /// Times the inputs.
    inputs: [E; MAX_LANES],
    /// What all states of a channel fade by, if that is the same.
    fades: Option<[E; MAX_LANES]>,
}

impl<E: Wide> Sizes<E> {
    #[inline(always)]
    fn new<T: SimdElement<Acc = E>, I: Isa>(args: &StepArgs<'_, T>, [batch, head, first]: [usize; 3], count: usize) -> Self {
        let [mut x, mut dt, mut rates] = [[E::ZERO; MAX_LANES]; 3];
        let is_constant = args.shape.states > 0 && args.a.is_constant();
        for i in 0..count {
            let (of, parameter) = ([batch, head, first + i], [0, head, first + i]);
            x[i] = args.x.data[args.x.offset(of)].to_acc();
            dt[i] = args.dt.at(of);
            if let Some(bias) = &args.dt_bias {
                dt[i] = dt[i] + bias.at(parameter);
            }
            if is_constant {
                rates[i] = args.a.at(parameter);
            }
        }
        let mut sizes = E::V::<I>::load(&dt);
        if args.dt_softplus {
            sizes = softplus::<E, I>(sizes);
        }
        let mut inputs = [E::ZERO; MAX_LANES];
        sizes.store(&mut dt);
        sizes.mul(E::V::<I>::load(&x)).store(&mut inputs);
        let exponents = E::V::<I>::load(&rates).mul(sizes).mul(E::V::<I>::splat(E::from_f64(LOG2_E)));
        power::<E, I>(exponents).store(&mut rates);
        Self { x, dt, inputs, fades: is_constant.then_some(rates) }
    }

    /// Makes outputs of sums over states.
    #[inline(always)]
    fn close<T: SimdElement<Acc = E>, I: Isa>(
        &self,
        args: &StepArgs<'_, T>,
        [batch, head, first]: [usize; 3],
        sums: &mut [E; MAX_LANES],
        out: &mut [T],
    ) {
        if let Some(d) = &args.d {
            for (i, sum) in sums.iter_mut().enumerate().take(out.len()) {
                *sum = *sum + d.at([0, head, first + i]) * self.x[i];
            }
        }
        if let Some(z) = &args.z {
            let mut gates = [E::ZERO; MAX_LANES];
            for (i, gate) in gates.iter_mut().enumerate().take(out.len()) {
                *gate = z.data[z.offset([batch, head, first + i])].to_acc();
            }
            let z = E::V::<I>::load(&gates);
            E::V::<I>::load(sums).mul(z.mul(sigmoid::<E, I>(z))).store(sums);
        }
        narrow::<T, I>(sums, out);
    }
}

/// The channels of one vector, whose states are rows of memory.
struct Channels<'s, 'a, T: Element> {
    args: &'s StepArgs<'a, T>,
    number: usize,
    place: [usize; 3],
    count: usize,
    sizes: &'s Sizes<T::Acc>,
    b: &'s [T::Acc],
    c: &'s [T::Acc],
}

impl<T: SimdElement> Channels<'_, '_, T>
where
    T::Acc: Wide,
{
    #[inline(always)]
    fn run<S: SimdElement<Acc = T::Acc>, I: Isa>(
        &self,
        rows: &RowWriter<'_, S>,
        rates: &mut [T::Acc],
        sums: &mut [T::Acc; MAX_LANES],
    ) {
        let [_, head, first] = self.place;
        let states = self.args.shape.states;
        let mut block = S::V::<I>::zero_block();
        for i in 0..self.count {
            if self.sizes.fades.is_none() {
                self.args.a.row([0, head, first + i], &mut rates[..states]);
            }
            let row = rows.row(self.number, head, first + i);
            let sum = self.channel::<S, I>(i, row, rates);
            block.as_mut()[i] = S::V::<I>::load(&sum);
        }
        S::V::<I>::sum_rows(block).store(sums);
    }

    /// Updates the states of one channel; returns sums over them, for each lane.
    #[inline(always)]
    fn channel<S: SimdElement<Acc = T::Acc>, I: Isa>(&self, i: usize, row: &mut [S], rates: &[T::Acc]) -> [T::Acc; MAX_LANES] {
        let lanes = S::V::<I>::LANES;
        let splat = <T::Acc as SimdElement>::V::<I>::splat;
        let log2_e = T::Acc::from_f64(LOG2_E);
        let (input, exponent) = (splat(self.sizes.inputs[i]), splat(self.sizes.dt[i] * log2_e));
        let mut sum = splat(T::Acc::ZERO);
        let mut n = 0;
        while n < row.len() {
            let fade = match &self.sizes.fades {
                Some(fades) => splat(fades[i]),
                None => power::<T::Acc, I>(load::<T::Acc, I>(&rates[n..]).mul(exponent)),
            };
            // By way of memory, as vectors of two types are of one type in fact only.
            let mut state = [T::Acc::ZERO; MAX_LANES];
            load_padded::<S, I>(&row[n..]).store(&mut state);
            let next = fade.mul_add(load::<T::Acc, I>(&state), input.mul(load::<T::Acc, I>(&self.b[n..])));
            sum = next.mul_add(load::<T::Acc, I>(&self.c[n..]), sum);
            next.store(&mut state);
            let end = row.len().min(n + lanes);
            store_padded::<S, I>(S::V::<I>::load(&state), &mut row[n..end]);
            n += lanes;
        }
        let mut sums = [T::Acc::ZERO; MAX_LANES];
        sum.store(&mut sums);
        sums
    }
}

#[inline(always)]
fn load<E: Wide, I: Isa>(from: &[E]) -> E::V<I> {
    E::V::<I>::load(from)
}
