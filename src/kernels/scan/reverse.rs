//! Gradients of a chunk of the selective scan: states of a chunk are computed anew from those before it, and gradients run back through them.
//!
//! With `f_t = e^(delta_t A)`, the gradient `y'` of `C^T h + D u`, and the state's own, `h'_t = C_t y'_t + f_(t+1) h'_(t+1)`:
//!
//! ```text
//! u'_t     = delta_t sum over n of B h'_t + D y'_t         B'_t = sum over channels of delta_t u_t h'_t
//! delta'_t = sum over n of (B u_t + A f_t h_(t-1)) h'_t    C'_t = sum over channels of y'_t h_t
//! A'       = sum over t of delta_t f_t h_(t-1) h'_t        D' = sum over t of u_t y'_t
//! ```
//!
//! A state of a vector of channels goes forwards and backwards through a chunk before the next one does, so that what it leaves on the
//! way (`f` and `h`, 8 KiB) stays in L1. Sums over lanes are formed for as many steps as there are lanes at a time.

use super::args::SelectiveBackwardArgs;
use super::block::{Block, Parameters, Reader, Sizes, factor, read_channels, read_factors, settle};
use super::plane::CHUNK;
use crate::math::activation::sigmoid;
use crate::math::elementwise::multiply;
use crate::math::load::load_padded;
use crate::simd::{Isa, SimdElement, Vector, Wide};
use crate::workspace::carve;
use std::f64::consts::LN_2;
use std::ops::Range;

/// What a block of channels keeps in scratch.
pub struct Memory<'s, E> {
    /// Inputs of a chunk; after [`Memory::vector`] their gradients.
    pub u: &'s mut [E],
    /// Likewise of `delta`.
    pub delta: &'s mut [E],
    /// Likewise of `z`.
    pub z: &'s mut [E],
    /// Gradients of states, which chunks hand on.
    pub carry: &'s mut [E],
    /// Sums over all steps, of the rates.
    pub d_a: &'s mut [E],
    /// Sums over all steps, of `D`.
    pub d_d: &'s mut [E],
    /// Sums over all steps, of the biases.
    pub d_bias: &'s mut [E],
    /// Sums over all steps, of factors of channels.
    pub d_factors: [&'s mut [E]; 2],
    /// Sums over the channels of the block for a chunk, of factors of steps, `[N][CHUNK]`.
    pub d_steps: [&'s mut [E]; 2],
    factors: [&'s mut [E]; 2],
    parameters: Parameters<'s, E>,
    /// Derivatives of softplus.
    slopes: &'s mut [E],
    d_y: &'s mut [E],
    /// Of one vector of channels: see [`Chunk`].
    of_vector: [&'s mut [E]; 5],
    before: &'s mut [E],
}

impl<'s, E: Wide> Memory<'s, E> {
    /// Elements that are needed.
    pub fn len(sizes: &Sizes) -> usize {
        let of_vector = 6 * sizes.chunk() + sizes.lanes;
        let of_states = 5 * sizes.all_states() + 2 * sizes.factors() + 2 * sizes.states * CHUNK;
        5 * sizes.chunks() + of_vector + of_states + 4 * sizes.channels()
    }

    /// Cuts scratch into pieces.
    #[inline(always)]
    pub fn new(mut rest: &'s mut [E], sizes: &Sizes) -> Self {
        let rest = &mut rest;
        let mut cut = |len| carve(rest, len);
        Self {
            u: cut(sizes.chunks()),
            delta: cut(sizes.chunks()),
            z: cut(sizes.chunks()),
            slopes: cut(sizes.chunks()),
            d_y: cut(sizes.chunks()),
            of_vector: std::array::from_fn(|_| cut(sizes.chunk())),
            before: cut(sizes.chunk() + sizes.lanes),
            carry: cut(sizes.all_states()),
            d_a: cut(sizes.all_states()),
            d_factors: std::array::from_fn(|_| cut(sizes.all_states())),
            factors: std::array::from_fn(|_| cut(sizes.factors())),
            d_steps: std::array::from_fn(|_| cut(sizes.states * CHUNK)),
            d_bias: cut(sizes.channels()),
            d_d: cut(sizes.channels()),
            parameters: Parameters {
                a: cut(sizes.all_states()),
                delta_bias: cut(sizes.channels()),
                d: cut(sizes.channels()),
                rises: false,
            },
        }
    }

    /// Reads what does not change from step to step, and starts sums.
    #[inline(always)]
    pub fn start<T: SimdElement<Acc = E>, I: Isa>(&mut self, args: &SelectiveBackwardArgs<'_, T>, block: &Block, sizes: &Sizes) {
        self.parameters.read::<T, I>(&args.forward, block, sizes);
        read_channels(args.d_last.as_ref(), block, block.batch, (sizes, sizes.states), self.carry);
        let [d_b, d_c] = &mut self.d_factors;
        for sums in [&mut *self.d_a, &mut *self.d_bias, &mut *self.d_d, &mut **d_b, &mut **d_c] {
            sums.fill(E::ZERO);
        }
    }

    /// Reads a chunk.
    #[inline(always)]
    pub fn read<T: SimdElement<Acc = E>, I: Isa>(
        &mut self,
        args: &SelectiveBackwardArgs<'_, T>,
        block: &Block,
        steps: Range<usize>,
        is_first: (&Sizes, bool),
    ) {
        let (forward, of) = (&args.forward, [block.batch, 0]);
        forward.u.read::<I>(of, block.channels.clone(), steps.clone(), self.u);
        forward.delta.read::<I>(of, block.channels.clone(), steps.clone(), self.delta);
        args.d_out.read::<I>(of, block.channels.clone(), steps.clone(), self.d_y);
        if let Some(z) = &forward.z {
            z.read::<I>(of, block.channels.clone(), steps.clone(), self.z);
        }
        for (factors, into) in [&forward.b, &forward.c].into_iter().zip(&mut self.factors) {
            read_factors::<T, I>(factors, block, steps.clone(), is_first, into);
        }
        settle::<E, I>(self.carry);
        for sums in &mut self.d_steps {
            sums.fill(E::ZERO);
        }
    }

    /// Gradients of chunk `number` of one vector of channels, of `len` elements.
    #[inline(always)]
    pub fn vector<T: SimdElement<Acc = E>, I: Isa>(
        &mut self,
        args: &SelectiveBackwardArgs<'_, T>,
        block: &Block,
        number: usize,
        len: usize,
        (sizes, v): (&Sizes, usize),
    ) {
        let (forward, lanes) = (&args.forward, sizes.lanes);
        let of_vector = v * sizes.chunk()..v * sizes.chunk() + len;
        let of_channels = v * lanes..(v + 1) * lanes;
        let slopes = &mut self.slopes[of_vector.clone()];
        let grows = self.parameters.step_sizes::<T, I>(forward, v, &mut self.delta[of_vector.clone()], Some(&mut *slopes));
        let (u, delta) = (&mut self.u[of_vector.clone()], &mut self.delta[of_vector.clone()]);
        let (d_y, z) = (&mut self.d_y[of_vector.clone()], &mut self.z[of_vector]);
        let d = &self.parameters.d[of_channels.clone()];
        let [inputs, y, entered, faded, fades] = self.of_vector.each_mut().map(|of| &mut of[..len]);
        begin::<E, I>(d, u, delta, inputs, y);
        if forward.z.is_some() {
            gate::<E, I>(d_y, z);
        }
        entered.fill(E::ZERO);
        faded.fill(E::ZERO);
        let y_sums = forward.z.is_some().then_some(&mut *y);
        let before = &mut self.before[..len + lanes];
        let mut chunk = Chunk { delta, inputs, d_y, fades, before, y: y_sums, entered, faded };
        let chunks = forward.shape.steps.div_ceil(CHUNK);
        let first = block.channels.start + v * lanes;
        let channels = first..block.channels.end.min(first + lanes);
        for n in 0..sizes.states {
            let at = v * sizes.state() + n * lanes..v * sizes.state() + (n + 1) * lanes;
            let row = ((block.batch * chunks + number) * sizes.states + n) * forward.shape.channels;
            let state = load_padded::<E, I>(&args.checkpoints[row + channels.start..row + channels.end]);
            let a = E::V::<I>::load(&self.parameters.a[at.clone()]);
            let [b, c] = &self.factors;
            let readers = [Reader::new(&forward.b, b, sizes, v, n), Reader::new(&forward.c, c, sizes, v, n)];
            if grows {
                chunk.replay::<I, true>(state, a, readers);
            } else {
                chunk.replay::<I, false>(state, a, readers);
            }
            let [d_b, d_c] = &mut self.d_factors;
            let own = [&mut self.carry[at.clone()], &mut self.d_a[at.clone()], &mut d_b[at.clone()], &mut d_c[at]];
            let [b_sums, c_sums] = &mut self.d_steps;
            let sums = [&mut b_sums[n * CHUNK..(n + 1) * CHUNK], &mut c_sums[n * CHUNK..(n + 1) * CHUNK]];
            chunk.reverse::<I>(own, a, readers, sums);
        }
        let Chunk { delta, entered, faded, .. } = chunk;
        let sums = [&mut self.d_bias[of_channels.clone()], &mut self.d_d[of_channels.clone()]];
        finish::<E, I>(d, [d_y, entered, faded], forward.delta_softplus.then_some(&*slopes), [u, delta], sums);
        if forward.z.is_some() {
            multiply::<E, I>(z, y);
        }
    }
}

/// What the states of one vector of channels need and leave in a chunk.
struct Chunk<'s, E> {
    /// Sizes of steps.
    delta: &'s mut [E],
    /// Of inputs, times them.
    inputs: &'s [E],
    /// Gradients of outputs.
    d_y: &'s [E],
    /// Of one state: what it fades by.
    fades: &'s mut [E],
    /// Of one state: what it is before each step, and after the last.
    before: &'s mut [E],
    /// Sums over states: outputs, if they are asked for.
    y: Option<&'s mut [E]>,
    /// Sums over states: `B h'`.
    entered: &'s mut [E],
    /// Sums over states: `A f h h'`.
    faded: &'s mut [E],
}

/// `inputs = delta u` and `y = d u`.
#[inline(always)]
fn begin<E: Wide, I: Isa>(d: &[E], u: &[E], delta: &[E], inputs: &mut [E], y: &mut [E]) {
    let d = E::V::<I>::load(d);
    let mut t = 0;
    while t < u.len() {
        let x = E::V::<I>::load(&u[t..]);
        x.mul(d).store(&mut y[t..]);
        x.mul(E::V::<I>::load(&delta[t..])).store(&mut inputs[t..]);
        t += E::V::<I>::LANES;
    }
}

/// Gradients of gated outputs become those of outputs; `z` becomes what the outputs are multiplied by for its gradient.
#[inline(always)]
fn gate<E: Wide, I: Isa>(d_y: &mut [E], z: &mut [E]) {
    let one = E::V::<I>::splat(E::from_f64(1.0));
    let mut t = 0;
    while t < z.len() {
        let (g, x) = (E::V::<I>::load(&d_y[t..]), E::V::<I>::load(&z[t..]));
        let s = sigmoid::<E, I>(x);
        g.mul(x.mul(s)).store(&mut d_y[t..]);
        g.mul(s.mul(x.mul_add(one.sub(s), one))).store(&mut z[t..]);
        t += E::V::<I>::LANES;
    }
}

/// Makes gradients of inputs and of sizes of steps from sums over states, in the place of those.
#[inline(always)]
fn finish<E: Wide, I: Isa>(
    d: &[E],
    [d_y, entered, faded]: [&[E]; 3],
    slopes: Option<&[E]>,
    [u, delta]: [&mut [E]; 2],
    [d_bias, d_d]: [&mut [E]; 2],
) {
    let d = E::V::<I>::load(d);
    let (mut sum_bias, mut sum_d) = (E::V::<I>::load(d_bias), E::V::<I>::load(d_d));
    let mut t = 0;
    while t < u.len() {
        let (x, size) = (E::V::<I>::load(&u[t..]), E::V::<I>::load(&delta[t..]));
        let (g, entered) = (E::V::<I>::load(&d_y[t..]), E::V::<I>::load(&entered[t..]));
        let mut d_size = x.mul_add(entered, E::V::<I>::load(&faded[t..]));
        if let Some(slopes) = slopes {
            d_size = d_size.mul(E::V::<I>::load(&slopes[t..]));
        }
        sum_bias = sum_bias.add(d_size);
        sum_d = g.mul_add(x, sum_d);
        size.mul_add(entered, g.mul(d)).store(&mut u[t..]);
        d_size.store(&mut delta[t..]);
        t += E::V::<I>::LANES;
    }
    sum_bias.store(d_bias);
    sum_d.store(d_d);
}

impl<E: Wide> Chunk<'_, E> {
    /// One state forwards.
    #[inline(always)]
    fn replay<I: Isa, const GROWS: bool>(&mut self, mut h: E::V<I>, a: E::V<I>, [b, c]: [Reader<'_, E>; 2]) {
        let lanes = E::V::<I>::LANES;
        h.store(self.before);
        let mut t = 0;
        while t < self.delta.len() {
            let fade = factor::<E, I, GROWS>(E::V::<I>::load(&self.delta[t..]).mul(a));
            fade.store(&mut self.fades[t..]);
            h = fade.mul_add(h, E::V::<I>::load(&self.inputs[t..]).mul(b.at::<I>(t, 0)));
            h.store(&mut self.before[t + lanes..]);
            if let Some(y) = &mut self.y {
                h.mul_add(c.at::<I>(t, 0), E::V::<I>::load(&y[t..])).store(&mut y[t..]);
            }
            t += lanes;
        }
    }

    /// Its gradient backwards. Adds to what the state owns: its gradient, handed on, and sums over steps of `A` and of factors of channels;
    /// and to the sums over lanes, of each step, of factors of steps.
    #[inline(always)]
    fn reverse<I: Isa>(
        &mut self,
        [own_carry, own_a, own_b, own_c]: [&mut [E]; 4],
        a: E::V<I>,
        [b, c]: [Reader<'_, E>; 2],
        [b_sums, c_sums]: [&mut [E]; 2],
    ) {
        let lanes = E::V::<I>::LANES;
        let (mut carry, mut d_a) = (E::V::<I>::load(own_carry), E::V::<I>::load(own_a));
        let count = self.delta.len() / lanes;
        let rate = a.mul(E::V::<I>::splat(E::from_f64(LN_2)));
        let mut first = (count - 1) / lanes * lanes;
        loop {
            let (mut of_b, mut of_c) = (E::V::<I>::zero_block(), E::V::<I>::zero_block());
            for i in (0..lanes.min(count - first)).rev() {
                let t = (first + i) * lanes;
                let g = E::V::<I>::load(&self.d_y[t..]);
                let gradient = c.at::<I>(t, 0).mul_add(g, carry);
                of_c.as_mut()[i] = g.mul(E::V::<I>::load(&self.before[t + lanes..]));
                of_b.as_mut()[i] = gradient.mul(E::V::<I>::load(&self.inputs[t..]));
                let fade = E::V::<I>::load(&self.fades[t..]);
                let faded = gradient.mul(fade.mul(E::V::<I>::load(&self.before[t..])));
                d_a = faded.mul_add(E::V::<I>::load(&self.delta[t..]), d_a);
                faded.mul_add(rate, E::V::<I>::load(&self.faded[t..])).store(&mut self.faded[t..]);
                gradient.mul_add(b.at::<I>(t, 0), E::V::<I>::load(&self.entered[t..])).store(&mut self.entered[t..]);
                carry = fade.mul(gradient);
            }
            add_products::<E, I>(of_b, b.is_by_step(), &mut b_sums[first..], own_b);
            add_products::<E, I>(of_c, c.is_by_step(), &mut c_sums[first..], own_c);
            if first == 0 {
                break;
            }
            first -= lanes;
        }
        carry.store(own_carry);
        d_a.store(own_a);
    }
}

/// Adds rows, one for each step, to sums over lanes or to sums over steps.
#[inline(always)]
fn add_products<E: Wide, I: Isa>(rows: <E::V<I> as Vector>::Block, by_step: bool, of_steps: &mut [E], of_lanes: &mut [E]) {
    if by_step {
        E::V::<I>::sum_rows(rows).add(E::V::<I>::load(of_steps)).store(of_steps);
    } else {
        let mut sum = E::V::<I>::load(of_lanes);
        for &row in rows.as_ref() {
            sum = sum.add(row);
        }
        sum.store(of_lanes);
    }
}
