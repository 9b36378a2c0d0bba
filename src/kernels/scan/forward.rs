//! The forward pass of the selective scan.

use super::args::{SelectiveArgs, SelectiveOut};
use super::block::{Block, Blocks, Parameters, Reader, Sizes, factor, read_channels, read_factors, settle, write_channel};
use super::plane::CHUNK;
use crate::math::activation::sigmoid;
use crate::math::load::load_adjacent;
use crate::simd::{Isa, SimdElement, Task, Vector, Wide};
use crate::workspace::{Scratch, carve};

/// States that are worked on at a time: they stay in registers for all steps of a chunk. Divides the lanes of every vector.
const TOGETHER: usize = 4;

/// A task for each block of channels.
pub struct Forward<'a, T: SimdElement> {
    /// The call.
    pub args: &'a SelectiveArgs<'a, T>,
    /// Where results go.
    pub out: &'a SelectiveOut<'a, T>,
}

impl<T: SimdElement> Task for Forward<'_, T>
where
    T::Acc: Wide,
{
    const MULTIPLIES_BF16: bool = false;

    #[inline(always)]
    fn run<I: Isa>(&self, index: usize) {
        let lanes = T::V::<I>::LANES;
        let block = Blocks::new(&self.args.shape).get(index);
        run::<T, I>(self.args, self.out, &block, &Sizes::new(&block, self.args.shape.states, lanes));
    }
}

#[inline(always)]
fn run<T: SimdElement, I: Isa>(args: &SelectiveArgs<'_, T>, out: &SelectiveOut<'_, T>, block: &Block, sizes: &Sizes)
where
    T::Acc: Wide,
{
    let mut scratch =
        Scratch::take::<T::Acc>(3 * sizes.chunks() + 2 * sizes.all_states() + 2 * sizes.factors() + 2 * sizes.channels());
    let mut rest = scratch.as_mut_slice::<T::Acc>();
    let [u, delta, y] = std::array::from_fn(|_| carve(&mut rest, sizes.chunks()));
    let state = carve(&mut rest, sizes.all_states());
    let [b, c] = std::array::from_fn(|_| carve(&mut rest, sizes.factors()));
    let mut parameters = Parameters {
        a: carve(&mut rest, sizes.all_states()),
        delta_bias: carve(&mut rest, sizes.channels()),
        d: carve(&mut rest, sizes.channels()),
        rises: false,
    };
    parameters.read::<T, I>(args, block, sizes);
    read_channels(args.initial.as_ref(), block, block.batch, (sizes, sizes.states), state);

    let of = [block.batch, 0];
    for first in (0..args.shape.steps).step_by(CHUNK) {
        let steps = first..args.shape.steps.min(first + CHUNK);
        let len = steps.len() * sizes.lanes;
        args.u.read::<I>(of, block.channels.clone(), steps.clone(), u);
        args.delta.read::<I>(of, block.channels.clone(), steps.clone(), delta);
        read_factors::<T, I>(&args.b, block, steps.clone(), (sizes, first == 0), b);
        read_factors::<T, I>(&args.c, block, steps.clone(), (sizes, first == 0), c);
        settle::<T::Acc, I>(state);
        store_checkpoint(out, block, first / CHUNK, sizes, state);
        for v in 0..sizes.vectors {
            let at = v * sizes.chunk();
            let delta = &mut delta[at..at + len];
            let grows = parameters.step_sizes::<T, I>(args, v, delta, None);
            let (u, y) = (&mut u[at..at + len], &mut y[at..at + len]);
            enter::<T::Acc, I>(&parameters.d[v * sizes.lanes..], delta, u, y);
            let of_states = v * sizes.state()..(v + 1) * sizes.state();
            let (a, state) = (&parameters.a[of_states.clone()], &mut state[of_states]);
            let mut n = 0;
            while n < sizes.states {
                let factors = [Reader::new(&args.b, &*b, sizes, v, n), Reader::new(&args.c, &*c, sizes, v, n)];
                let (a, state) = (&a[n * sizes.lanes..], &mut state[n * sizes.lanes..]);
                n += match (sizes.states - n >= TOGETHER, grows) {
                    (true, false) => scan::<T::Acc, I, TOGETHER, false>(a, state, factors, delta, u, y),
                    (true, true) => scan::<T::Acc, I, TOGETHER, true>(a, state, factors, delta, u, y),
                    (false, _) => scan::<T::Acc, I, 1, true>(a, state, factors, delta, u, y),
                };
            }
        }
        if let Some(z) = &args.z {
            z.read::<I>(of, block.channels.clone(), steps.clone(), u);
            for v in 0..sizes.vectors {
                let at = v * sizes.chunk();
                gate::<T::Acc, I>(&u[at..at + len], &mut y[at..at + len]);
            }
        }
        out.out.write::<I>(of, block.channels.clone(), steps, y);
    }
    if let Some(last) = &out.last {
        for (i, channel) in block.channels.clone().enumerate() {
            write_channel(state, i, sizes.lanes, last.row(block.batch, channel, 0));
        }
    }
}

#[inline(always)]
fn store_checkpoint<T: SimdElement>(out: &SelectiveOut<'_, T>, block: &Block, chunk: usize, sizes: &Sizes, state: &[T::Acc]) {
    let Some(checkpoints) = &out.checkpoints else { return };
    for n in 0..sizes.states {
        let row = checkpoints.piece([block.batch, chunk, n], block.channels.start, block.channels.len());
        for (v, row) in row.chunks_mut(sizes.lanes).enumerate() {
            row.copy_from_slice(&state[v * sizes.state() + n * sizes.lanes..][..row.len()]);
        }
    }
}

/// `y = d u` and `u = delta u`.
#[inline(always)]
fn enter<E: Wide, I: Isa>(d: &[E], delta: &[E], u: &mut [E], y: &mut [E]) {
    let d = E::V::<I>::load(d);
    let mut t = 0;
    while t < u.len() {
        let x = E::V::<I>::load(&u[t..]);
        x.mul(d).store(&mut y[t..]);
        x.mul(E::V::<I>::load(&delta[t..])).store(&mut u[t..]);
        t += E::V::<I>::LANES;
    }
}

/// `y = y z sigmoid(z)`.
#[inline(always)]
fn gate<E: Wide, I: Isa>(z: &[E], y: &mut [E]) {
    let mut t = 0;
    while t < y.len() {
        let z = E::V::<I>::load(&z[t..]);
        E::V::<I>::load(&y[t..]).mul(z.mul(sigmoid::<E, I>(z))).store(&mut y[t..]);
        t += E::V::<I>::LANES;
    }
}

/// `N` states of one vector of channels through the steps of a chunk; returns `N`.
#[inline(always)]
fn scan<E: Wide, I: Isa, const N: usize, const GROWS: bool>(
    a: &[E],
    state: &mut [E],
    [b, c]: [Reader<'_, E>; 2],
    delta: &[E],
    inputs: &[E],
    y: &mut [E],
) -> usize {
    let lanes = E::V::<I>::LANES;
    let a: [E::V<I>; N] = load_adjacent(a);
    let mut h: [E::V<I>; N] = load_adjacent(state);
    let mut t = 0;
    while t < y.len() {
        let (delta, input) = (E::V::<I>::load(&delta[t..]), E::V::<I>::load(&inputs[t..]));
        let mut sum = E::V::<I>::load(&y[t..]);
        for i in 0..N {
            h[i] = factor::<E, I, GROWS>(delta.mul(a[i])).mul_add(h[i], input.mul(b.at::<I>(t, i)));
            sum = h[i].mul_add(c.at::<I>(t, i), sum);
        }
        sum.store(&mut y[t..]);
        t += lanes;
    }
    for (i, h) in h.iter().enumerate() {
        h.store(&mut state[i * lanes..]);
    }
    N
}
