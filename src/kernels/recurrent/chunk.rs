//! The chunk form: one head of one sequence, chunk after chunk.

use super::pairs::{ChannelScratch, Gates, Left, Right, Size, fade};
use super::rows::HeadRows;
use super::states::Flat;
use super::{Decay, MOST_HEADS, RecurrentArgs, RecurrentOut, Rule, Sequence};
use crate::dtype::Float;
use crate::math::elementwise::{add_scaled, are_finite, scale, subtract_and_scale};
use crate::math::load::{MAX_LANES, store_scaled};
use crate::math::product::{Factors, ROW_STEP, Rows, add_product, row_width, scale_and_add};
use crate::math::triangular::substitute;
use crate::simd::{Isa, SimdElement, Wide};
use crate::workspace::{Scratch, carve};
use std::f64::consts::LOG2_E;
use std::ops::Range;

/// Rows that share a factor when gates are of channels; chunks are of whole blocks.
pub const BLOCK: usize = MAX_LANES;
/// The longest chunk.
pub const MAX_CHUNK: usize = 64;

/// Works through sequence `number` for some value heads, which take turns, in chunks of `size` tokens.
#[inline(always)]
pub fn run<T: SimdElement, I: Isa>(
    args: &RecurrentArgs<'_, T>,
    out: &RecurrentOut<'_, T>,
    number: usize,
    heads: Range<usize>,
    size: usize,
) where
    T::Acc: Wide,
{
    let shape = &args.shape;
    let sequence = args.sequences[number];
    let (width, width_v) = (row_width(shape.head_dim), row_width(shape.head_dim_v));
    let state_len = width * stride_of(width_v);
    let mut scratch = Scratch::take::<T::Acc>(heads.len() * state_len + scratch_len(args, size));
    let (states, rest) = scratch.as_mut_slice::<T::Acc>().split_at_mut(heads.len() * state_len);
    let mut work = Work::<T> {
        args,
        out,
        sequence,
        head: 0,
        size: Size { rows: 0, chunk: size, width, stride: stride_of(width) },
        width_v,
        stride_v: stride_of(width_v),
    };
    let mut flats: [Option<Flat<'_, T::Acc>>; MOST_HEADS] = [const { None }; MOST_HEADS];
    for (i, head) in heads.clone().enumerate() {
        let flat = out.states.of(number, head, shape);
        let state = (&mut states[i * state_len..][..state_len], work.stride_v);
        out.states.load(&flat, (number, head), state, &mut rest[..shape.head_dim * shape.head_dim_v]);
        flats[i] = Some(flat);
    }
    for first in (0..sequence.len).step_by(size) {
        let count = size.min(sequence.len - first);
        work.size.rows = count.next_multiple_of(BLOCK);
        for (i, head) in heads.clone().enumerate() {
            work.head = head;
            work.chunk::<I>(first, count, &mut states[i * state_len..][..state_len], rest);
        }
    }
    for (i, flat) in flats.into_iter().flatten().enumerate() {
        flat.store(&states[i * state_len..][..state_len], work.stride_v);
    }
}

/// A gate in base 2. Below the bound nothing is left, and sums of an infinite one would have no difference.
fn step_gate(gate: f64) -> f64 {
    if gate < -1e4 { -1e4 * LOG2_E } else { gate * LOG2_E }
}

/// One head of one sequence.
struct Work<'a, T: SimdElement> {
    args: &'a RecurrentArgs<'a, T>,
    out: &'a RecurrentOut<'a, T>,
    sequence: Sequence,
    head: usize,
    size: Size,
    /// Columns of the values, in whole vectors.
    width_v: usize,
    /// Elements from one row of values, or of the state, to the next.
    stride_v: usize,
}

/// Rows that read beside the queries, and rows that are written beside the keys.
fn seconds<T: SimdElement>(rule: &Rule<'_, T>) -> [bool; 2] {
    match rule {
        Rule::Additive(_) => [false, false],
        Rule::Delta(_) => [true, false],
        Rule::LowRank { .. } => [true, true],
    }
}

/// One vector more than a row has, so that rows do not share the sets of a cache.
fn stride_of(width: usize) -> usize {
    width + MAX_LANES
}

fn scratch_len<T: SimdElement>(args: &RecurrentArgs<'_, T>, chunk: usize) -> usize {
    let (width, width_v) = (row_width(args.shape.head_dim), row_width(args.shape.head_dim_v));
    let [reads, writes] = seconds(&args.rule).map(usize::from);
    let (stride, stride_v) = (stride_of(width), stride_of(width_v));
    let rows = (3 + reads + writes) * chunk * stride;
    let columns = (2 + writes) * chunk * width;
    let products = (1 + reads) * (1 + writes) * chunk * chunk;
    let channels = (MAX_CHUNK / BLOCK + 3) * width;
    let values = 3 * chunk * stride_v;
    (rows + columns + products + channels + values).max(args.shape.head_dim * args.shape.head_dim_v)
}

impl<T: SimdElement> Work<'_, T>
where
    T::Acc: Wide,
{
    /// Works through `count` tokens; the state is `[width, stride_v]`.
    #[inline(always)]
    fn chunk<I: Isa>(&self, first: usize, count: usize, state: &mut [T::Acc], mut rest: &mut [T::Acc]) {
        let (args, size, width_v, stride_v) = (self.args, self.size, self.width_v, self.stride_v);
        let Size { rows, chunk, width, stride } = size;
        let [reads, writes] = seconds(&args.rule);
        let mut square = |wanted: bool| carve(&mut rest, if wanted { chunk * chunk } else { 0 });
        let products = [[square(true), square(writes)], [square(reads), square(reads && writes)]];
        let mut panel = |wanted: bool| carve(&mut rest, if wanted { chunk * stride } else { 0 });
        let [queries, readers, keys, others, gate_rows] = [true, reads, true, writes, true].map(&mut panel);
        let mut columns = |wanted: bool| carve(&mut rest, if wanted { chunk * width } else { 0 });
        let [key_columns, other_columns, back] = [true, writes, true].map(&mut columns);
        let mut scratch = ChannelScratch {
            columns: back,
            blocks: carve(&mut rest, MAX_CHUNK / BLOCK * width),
            total: carve(&mut rest, width),
            ratio: carve(&mut rest, width),
        };
        let alpha = carve(&mut rest, width);
        let mut values = || carve(&mut rest, chunk * stride_v);
        let [written, extra, sums] = [values(), values(), values()];

        self.load::<I>(args.queries(self.head), first, count, queries);
        self.load::<I>(args.keys(self.head), first, count, keys);
        match &args.rule {
            Rule::Additive(_) => {}
            Rule::Delta(_) => readers[..rows * stride].copy_from_slice(&keys[..rows * stride]),
            Rule::LowRank { a, b } => {
                self.load::<I>(args.plain(*a, self.head), first, count, readers);
                self.load::<I>(args.plain(*b, self.head), first, count, others);
            }
        }
        self.load_values::<I>(first, count, written);
        let bonus = self.bonus(queries, keys, count);
        let mut sums_of_gates = [0.0; MAX_CHUNK + 1];
        let gates = self.gates::<I>((first, count), &mut sums_of_gates, gate_rows);

        let exclusive = args.bonus.is_some();
        let low_rank = matches!(args.rule, Rule::LowRank { .. });
        let [of_queries, of_readers] = products;
        let mut lefts = [
            Left { rows: queries, exclusive, strict: exclusive, products: of_queries },
            Left { rows: readers, exclusive: low_rank, strict: true, products: of_readers },
        ];
        let mut rights = [Right { rows: keys, columns: key_columns }, Right { rows: others, columns: other_columns }];
        let (lefts, rights) = (&mut lefts[..=usize::from(reads)], &mut rights[..=usize::from(writes)]);
        fade::<T::Acc, I>(size, gates, lefts, rights, &mut scratch, alpha);

        // `extra` becomes what is written beside the values: the readings of the low-rank part.
        match &args.rule {
            Rule::Additive(None) => {}
            Rule::Additive(Some(beta)) => {
                for (i, row) in written.chunks_exact_mut(stride_v).enumerate().take(count) {
                    scale::<T::Acc, I>(row, beta.first(self.sequence.batch, self.sequence.first + first + i, self.head));
                }
            }
            Rule::Delta(beta) => {
                let left = &mut lefts[1];
                self.read::<I>(state, left.rows, sums);
                for i in 0..rows {
                    let beta = self.beta(beta.as_ref(), first, i, count);
                    let (read, value) = (&sums[i * stride_v..][..width_v], &mut written[i * stride_v..][..width_v]);
                    subtract_and_scale::<T::Acc, I>(value, read, beta);
                    scale::<T::Acc, I>(&mut left.products[0][i * chunk..][..rows], T::Acc::ZERO - beta);
                }
                substitute::<T::Acc, I>((left.products[0], chunk), (written, stride_v), [rows, width_v]);
            }
            Rule::LowRank { .. } => {
                let left = &lefts[1];
                self.read::<I>(state, left.rows, extra);
                self.add_met::<I>(left.products[0], written, extra);
                substitute::<T::Acc, I>((left.products[1], chunk), (extra, stride_v), [rows, width_v]);
            }
        }
        self.read::<I>(state, lefts[0].rows, sums);
        self.add_met::<I>(lefts[0].products[0], written, sums);
        if low_rank {
            self.add_met::<I>(lefts[0].products[1], extra, sums);
        }
        for i in 0..count {
            let sums = &mut sums[i * stride_v..][..width_v];
            if exclusive {
                add_scaled::<T::Acc, I>(sums, bonus[i], &written[i * stride_v..][..width_v]);
            }
            let row = self.out.out.row(self.sequence.batch, self.sequence.first + first + i, self.head);
            store_scaled::<T, I>(sums, T::Acc::from_f64(1.0), row);
        }
        let mut alpha = Some(&*alpha);
        for (right, written) in rights.iter().zip([&*written, &*extra]) {
            let factors = Factors { data: right.columns, row: chunk, step: 1 };
            let size = [args.shape.head_dim.next_multiple_of(ROW_STEP), rows, width_v];
            scale_and_add::<T::Acc, I>(alpha.take(), factors, Rows::new(written, stride_v), (&mut *state, stride_v), size);
        }
    }

    /// The rows of a chunk, zeros beyond the last one.
    #[inline(always)]
    fn load<I: Isa>(&self, from: HeadRows<'_, T>, first: usize, count: usize, into: &mut [T::Acc]) {
        for (i, row) in into.chunks_exact_mut(self.size.stride).enumerate().take(self.size.rows) {
            let row = &mut row[..self.size.width];
            if i < count {
                from.prefetch(&self.sequence, first + i + self.size.chunk);
                from.read::<I>(&self.sequence, first + i, row);
            } else {
                row.fill(T::Acc::ZERO);
            }
        }
    }

    #[inline(always)]
    fn load_values<I: Isa>(&self, first: usize, count: usize, into: &mut [T::Acc]) {
        let values = HeadRows { tensor: self.args.v, head: self.head, factor: 1.0, l2norm: false };
        for (i, row) in into.chunks_exact_mut(self.stride_v).enumerate().take(self.size.rows) {
            let row = &mut row[..self.width_v];
            if i < count {
                values.prefetch(&self.sequence, first + i + self.size.chunk);
                values.read::<I>(&self.sequence, first + i, row);
            } else {
                row.fill(T::Acc::ZERO);
            }
        }
    }

    /// What each query reads of its own token, where it reads the state before that.
    fn bonus(&self, queries: &[T::Acc], keys: &[T::Acc], count: usize) -> [T::Acc; MAX_CHUNK] {
        let mut found = [T::Acc::ZERO; MAX_CHUNK];
        if let Some(bonus) = self.args.bonus {
            let width = self.args.shape.head_dim;
            let bonus = &bonus[self.args.shape.head_of(self.head) * width..][..width];
            let rows = queries.chunks_exact(self.size.stride).zip(keys.chunks_exact(self.size.stride));
            for (found, (query, key)) in found.iter_mut().zip(rows).take(count) {
                let terms = bonus.iter().zip(query.iter().zip(key)).map(|(u, (q, k))| u * q.to_f64() * k.to_f64());
                *found = T::Acc::from_f64(terms.sum());
            }
        }
        found
    }

    #[inline(always)]
    fn gates<'g, I: Isa>(
        &self,
        (first, count): (usize, usize),
        sums: &'g mut [f64; MAX_CHUNK + 1],
        into: &'g mut [T::Acc],
    ) -> Gates<'g, T::Acc> {
        let (batch, head) = (self.sequence.batch, self.head);
        let token = self.sequence.first + first;
        match &self.args.decay {
            Decay::None => return Gates::None,
            Decay::Heads(gates) => {
                for i in 0..MAX_CHUNK {
                    sums[i + 1] = sums[i] + if i < count { step_gate(gates[head]) } else { 0.0 };
                }
            }
            Decay::Steps(gates) => {
                for i in 0..MAX_CHUNK {
                    let gate = if i < count { step_gate(gates.first(batch, token + i, head).to_f64()) } else { 0.0 };
                    sums[i + 1] = sums[i] + gate;
                }
            }
            Decay::Channels(gates) => {
                for (i, row) in into.chunks_exact_mut(self.size.stride).enumerate().take(self.size.rows) {
                    let row = &mut row[..self.size.width];
                    row.fill(T::Acc::ZERO);
                    if i < count {
                        gates.read(batch, token + i, head, row);
                        scale::<T::Acc, I>(row, T::Acc::from_f64(LOG2_E));
                    }
                }
                return Gates::Channels(into);
            }
        }
        Gates::Steps(sums)
    }

    #[inline(always)]
    fn beta(&self, beta: Option<&super::Numbers<'_, T>>, first: usize, i: usize, count: usize) -> T::Acc {
        match beta {
            _ if i >= count => T::Acc::ZERO,
            None => T::Acc::from_f64(1.0),
            Some(beta) => beta.first(self.sequence.batch, self.sequence.first + first + i, self.head),
        }
    }

    /// What faded rows read of the state.
    #[inline(always)]
    fn read<I: Isa>(&self, state: &[T::Acc], left: &[T::Acc], into: &mut [T::Acc]) {
        let Size { rows, stride, .. } = self.size;
        into[..rows * self.stride_v].fill(T::Acc::ZERO);
        let factors = Factors { data: left, row: stride, step: 1 };
        let state = Rows::new(state, self.stride_v);
        add_product::<T::Acc, I>(factors, state, (into, self.stride_v), [rows, self.args.shape.head_dim, self.width_v]);
    }

    /// Adds what rows meet of what is written in the chunk.
    #[inline(always)]
    fn add_met<I: Isa>(&self, products: &[T::Acc], written: &[T::Acc], sums: &mut [T::Acc]) {
        let Size { rows, chunk, .. } = self.size;
        // Within a block, rows that are not met have factors of 0, which must hide what is not finite.
        let finite = are_finite::<T::Acc, I>((written, self.stride_v), [rows, self.width_v]);
        for first in (0..rows).step_by(BLOCK) {
            let factors = Factors { data: &products[first * chunk..], row: chunk, step: 1 };
            let sums = (&mut sums[first * self.stride_v..], self.stride_v);
            let size = [BLOCK, first + BLOCK, self.width_v];
            add_product::<T::Acc, I>(factors, Rows { finite, ..Rows::new(written, self.stride_v) }, sums, size);
        }
    }
}
