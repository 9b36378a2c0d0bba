//! The step form: one token after the other, for decoding and short sequences.
//!
//! The state is gone through twice for each token, some vectors of columns at a time: once for what the token reads to know what it
//! writes, once to fade it, write to it, and read it by the query. Both times request a part of the next head's state, so that memory
//! never waits for arithmetic.

use super::rows::load;
use super::{Decay, RecurrentArgs, RecurrentOut, Rule};
use crate::dtype::Float;
use crate::math::elementwise::{decays, multiply, scale};
use crate::math::load::{MAX_LANES, load_adjacent, store_scaled};
use crate::math::product::row_width;
use crate::simd::{Isa, SimdElement, Vector, Wide, prefetch_lines};
use crate::workspace::{Scratch, carve};
use std::f64::consts::LOG2_E;

/// Works through sequence `number` for a value head, token by token.
#[inline(always)]
pub fn run<T: SimdElement, I: Isa>(args: &RecurrentArgs<'_, T>, out: &RecurrentOut<'_, T>, number: usize, head: usize)
where
    T::Acc: Wide,
{
    let (head_dim, head_dim_v) = (args.shape.head_dim, args.shape.head_dim_v);
    let (width, width_v) = (row_width(head_dim), row_width(head_dim_v));
    let mut scratch = Scratch::take::<T::Acc>(head_dim * (width_v + head_dim_v) + 6 * width + 2 * width_v);
    let mut rest = scratch.as_mut_slice::<T::Acc>();
    let state = carve(&mut rest, head_dim * width_v);
    let given = carve(&mut rest, head_dim * head_dim_v);
    let mut token = Token {
        query: carve(&mut rest, width),
        key: carve(&mut rest, width),
        reader: carve(&mut rest, width),
        other: carve(&mut rest, width),
        fade: carve(&mut rest, width),
        value: carve(&mut rest, width_v),
        bonus: carve(&mut rest, width),
        beta: T::Acc::ZERO,
    };
    let sums = carve(&mut rest, width_v);

    let mut flat = out.states.of(number, head, &args.shape);
    if flat.is_in_rows(width_v)
        && let Some(last) = flat.last.take()
    {
        // Worked on where the caller wants it.
        if !out.states.in_place {
            match &out.states.initial {
                Some(initial) => initial.read(number, head, 0, last),
                None => last.fill(T::Acc::ZERO),
            }
        }
        tokens::<T, I>(args, out, (number, head), &mut token, (last, sums));
        return;
    }
    out.states.load(&flat, (number, head), (state, width_v), given);
    tokens::<T, I>(args, out, (number, head), &mut token, (state, sums));
    flat.store(state, width_v);
}

/// What one token brings, in whole vectors.
struct Token<'s, E> {
    query: &'s mut [E],
    key: &'s mut [E],
    /// What reads the state before it fades.
    reader: &'s mut [E],
    /// Where the low-rank part is written.
    other: &'s mut [E],
    /// By channel.
    fade: &'s mut [E],
    value: &'s mut [E],
    /// Factors of what the query reads of its own token.
    bonus: &'s mut [E],
    beta: E,
}

#[inline(always)]
fn tokens<T: SimdElement, I: Isa>(
    args: &RecurrentArgs<'_, T>,
    out: &RecurrentOut<'_, T>,
    (number, head): (usize, usize),
    token: &mut Token<'_, T::Acc>,
    (state, sums): (&mut [T::Acc], &mut [T::Acc]),
) where
    T::Acc: Wide,
{
    let lanes = T::V::<I>::LANES;
    let sequence = args.sequences[number];
    for step in 0..sequence.len {
        let at = sequence.first + step;
        token.load::<T, I>(args, number, head, step);
        let width_v = token.value.len();
        let mut first = 0;
        while first < width_v {
            let left = (width_v - first) / lanes;
            let sums = &mut sums[first..];
            let state = (&mut state[first..], width_v);
            first += lanes
                * match left {
                    8.. if I::REGISTERS >= 32 => columns::<T, I, 8>(args, token, first, state, sums),
                    4.. => columns::<T, I, 4>(args, token, first, state, sums),
                    2.. => columns::<T, I, 2>(args, token, first, state, sums),
                    _ => columns::<T, I, 1>(args, token, first, state, sums),
                };
        }
        store_scaled::<T, I>(sums, T::Acc::from_f64(1.0), out.out.row(sequence.batch, at, head), false);
    }
}

impl<E: Wide> Token<'_, E> {
    #[inline(always)]
    fn load<T: SimdElement<Acc = E>, I: Isa>(&mut self, args: &RecurrentArgs<'_, T>, number: usize, head: usize, step: usize) {
        let sequence = &args.sequences[number];
        let (batch, at) = (sequence.batch, sequence.first + step);
        args.queries(head).read::<I>(sequence, step, self.query);
        args.keys(head).read::<I>(sequence, step, self.key);
        load::<T, I>(args.v.row(batch, at, head), self.value);
        match &args.decay {
            Decay::None => self.fade.fill(E::from_f64(1.0)),
            Decay::Heads(gates) => self.fade_all::<I>(gates[head]),
            Decay::Steps(gates) => self.fade_all::<I>(gates.first(batch, at, head).to_f64()),
            Decay::Channels(gates) => {
                // Nothing else is in the reader yet.
                self.reader.fill(E::ZERO);
                gates.read(batch, at, head, self.reader);
                scale::<E, I>(self.reader, E::from_f64(LOG2_E));
                decays::<E, I>(self.reader, self.fade);
            }
        }
        match &args.rule {
            Rule::Additive(None) => {}
            Rule::Additive(Some(beta)) => scale::<E, I>(self.value, beta.first(batch, at, head)),
            Rule::Delta(beta) => {
                self.beta = beta.as_ref().map_or(E::from_f64(1.0), |beta| beta.first(batch, at, head));
                self.reader.copy_from_slice(self.key);
                multiply::<E, I>(self.reader, self.fade);
            }
            Rule::LowRank { a, b } => {
                args.plain(*a, head).read::<I>(sequence, step, self.reader);
                args.plain(*b, head).read::<I>(sequence, step, self.other);
            }
        }
        if let Some(bonus) = args.bonus {
            let bonus = &bonus[args.shape.head_of(head) * args.shape.head_dim..];
            for (d, out) in self.bonus.iter_mut().enumerate().take(args.shape.head_dim) {
                *out = self.query[d] * self.key[d] * E::from_f64(bonus[d]);
            }
        }
    }

    /// The same for all channels.
    #[inline(always)]
    fn fade_all<I: Isa>(&mut self, gate: f64) {
        let mut fade = [E::ZERO; MAX_LANES];
        decays::<E, I>(&[E::from_f64(gate * LOG2_E); MAX_LANES], &mut fade);
        self.fade.fill(fade[0]);
    }
}

/// `N` vectors of columns of the state, from column `first` of the values on; returns `N`.
#[inline(always)]
fn columns<T: SimdElement, I: Isa, const N: usize>(
    args: &RecurrentArgs<'_, T>,
    token: &Token<'_, T::Acc>,
    first: usize,
    (state, stride): (&mut [T::Acc], usize),
    sums: &mut [T::Acc],
) -> usize {
    let lanes = T::V::<I>::LANES;
    let splat = T::V::<I>::splat;
    let zero = splat(T::Acc::ZERO);
    let head_dim = args.shape.head_dim;
    let mut written: [T::V<I>; N] = load_adjacent(&token.value[first..]);
    let mut read = [zero; N];
    let reads = !matches!(args.rule, Rule::Additive(_));
    let (next, requested) = (head_dim * stride, N * lanes / if reads { 2 } else { 1 });
    if reads {
        for (row, &reader) in state.chunks(stride).zip(&token.reader[..head_dim]) {
            prefetch_lines(row.as_ptr().wrapping_add(next), requested);
            for (v, read) in read.iter_mut().enumerate() {
                *read = T::V::<I>::load(&row[v * lanes..]).mul_add(splat(reader), *read);
            }
        }
    }
    let low_rank = matches!(args.rule, Rule::LowRank { .. });
    if let Rule::Delta(_) = args.rule {
        for (written, read) in written.iter_mut().zip(&read) {
            *written = written.sub(*read).mul(splat(token.beta));
        }
    }
    let bonus = args.bonus.is_some();
    let mut found = [zero; N];
    for (d, row) in state.chunks_mut(stride).enumerate().take(head_dim) {
        prefetch_lines(row.as_ptr().wrapping_add(next + N * lanes - requested), requested);
        let (fade, key, query) = (splat(token.fade[d]), splat(token.key[d]), splat(token.query[d]));
        for v in 0..N {
            let row = &mut row[v * lanes..];
            let before = T::V::<I>::load(row);
            let mut state = before.mul(fade);
            if low_rank {
                state = read[v].mul_add(splat(token.other[d]), state);
            }
            state = written[v].mul_add(key, state);
            state.store(row);
            found[v] = if bonus {
                before.mul_add(query, written[v].mul_add(splat(token.bonus[d]), found[v]))
            } else {
                state.mul_add(query, found[v])
            };
        }
    }
    for (v, found) in found.iter().enumerate() {
        found.store(&mut sums[v * lanes..]);
    }
    N
}
