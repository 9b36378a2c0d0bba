//! A chunk by matrix tiles, for rows of bf16 under at most one gate for each token.
//!
//! Queries and keys are operands as they lie in memory: what scales, normalises and fades them are factors of the rows and columns of
//! results. Rounded to bf16 are the products of queries with keys, the state, and what is written. A rule that reads the state has sums of
//! two bf16 of all three: no error of operands is written back, nor left where large corrections cancel in the outputs.

use super::head::{BLOCK, Head, MAX_CHUNK, stride_of};
use super::pairs::Size;
use super::{RecurrentArgs, RecurrentOut, Rule};
use crate::dtype::{DType, Float};
use crate::math::elementwise::{add_scaled, are_finite, decays, multiply, scale, transpose};
use crate::math::load::load_rows;
use crate::math::product::{Start, row_width};
use crate::math::tile_packing::{TILE, pack_matrix, pack_row_parts};
use crate::math::tile_product::multiply_packed;
use crate::math::triangular::substitute;
use crate::simd::{Isa, SimdElement, TileOperands, Vector, Wide};
use crate::workspace::carve;
use bytemuck::{cast_slice, cast_slice_mut};

/// Tokens of one step of tiles; chunks are multiples of it.
pub const STEP: usize = 2 * TILE;

/// Whether chunks of the call are worked on by tiles.
#[inline(always)]
pub fn takes<T: SimdElement, I: Isa>(args: &RecurrentArgs<'_, T>) -> bool {
    let has_tiles = const { I::HAS_TILES && matches!(T::DTYPE, DType::BF16) };
    has_tiles && args.has_plain_rows()
}

/// Pairs of channels, in whole tiles.
fn pairs_of(head_dim: usize) -> usize {
    head_dim.div_ceil(2).next_multiple_of(TILE)
}

/// The buffers of a chunk.
pub struct TileChunk<'s, A> {
    /// `[2 * chunk, pairs]`: queries, then keys.
    readers: &'s mut [A],
    /// `[pairs, chunk]`: keys transposed.
    columns: &'s mut [A],
    /// `[width, chunk]`: keys transposed, in pairs of tokens; the same once more for the second part of what is written.
    keys: &'s mut [A],
    /// `[chunk, chunk]`: of queries, and of keys, with keys.
    products: [&'s mut [A]; 2],
    /// `[chunk, chunk]`: of queries with keys, in two parts side by side.
    met: &'s mut [A],
    /// `[pairs, values]` each: the two parts of the state.
    state: [&'s mut [A]; 2],
    /// `[chunk, values]` each: the two parts of what is written, in pairs of tokens, the second one first; and, the other way round, those of
    /// what has faded to the end of the chunk.
    paired: &'s mut [A],
    faded: &'s mut [A],
    /// `[width]`: what the state fades by.
    alpha: &'s mut [A],
    /// `[chunk, values]` each: what queries read; what is written; that before `beta`.
    sums: &'s mut [A],
    written: &'s mut [A],
    extra: &'s mut [A],
}

/// Elements of the buffers of a chunk.
pub fn tile_chunk_len<T: SimdElement>(args: &RecurrentArgs<'_, T>, chunk: usize) -> usize {
    let (pairs, width) = (pairs_of(args.shape.head_dim), row_width(args.shape.head_dim));
    let values = stride_of(row_width(args.shape.head_dim_v));
    let keys = 2 * chunk * stride_of(pairs) + (pairs + width) * stride_of(chunk);
    keys + 2 * chunk * chunk + width + chunk * stride_of(chunk) + (2 * pairs + 5 * chunk) * values
}

impl<'s, A: Float> TileChunk<'s, A> {
    /// Takes the buffers from what is left of the scratch.
    #[expect(clippy::mut_mut, reason = "what is left of the scratch")]
    pub fn carve<T: SimdElement<Acc = A>>(head: &Head<'_, T>, rest: &mut &'s mut [A]) -> Self {
        let (pairs, chunk) = (pairs_of(head.args.shape.head_dim), head.size.chunk);
        let values = chunk * head.stride_v;
        let mut take = |len: usize| carve(rest, len);
        Self {
            readers: take(2 * chunk * stride_of(pairs)),
            columns: take(pairs * stride_of(chunk)),
            keys: take(head.size.width * stride_of(chunk)),
            products: [take(chunk * chunk), take(chunk * chunk)],
            met: take(chunk * stride_of(chunk)),
            state: [take(pairs * head.stride_v), take(pairs * head.stride_v)],
            paired: take(values),
            faded: take(values),
            alpha: take(head.size.width),
            sums: take(values),
            written: take(values),
            extra: take(values),
        }
    }
}

/// Factors of the rows and columns of a chunk.
struct Weights<A> {
    /// Of queries and keys as they are.
    rows: [[A; MAX_CHUNK]; 2],
    /// What has faded since the start of the chunk, and what will have by its end.
    since: [A; MAX_CHUNK],
    until: [A; MAX_CHUNK],
    /// Of what is written.
    betas: [A; MAX_CHUNK],
}

/// A head at a chunk that is worked on by tiles.
struct Tiled<'h, 'a, T: SimdElement> {
    head: &'h Head<'a, T>,
    /// Sums of the gates before each row, and of all, if there are any.
    gates: Option<&'h [f64; MAX_CHUNK + 1]>,
    /// Whether the rule reads the state.
    reads: bool,
}

/// Computes the outputs of a chunk, and makes the state before it that behind it.
#[inline(always)]
pub fn run<T: SimdElement, I: Isa>(
    head: &Head<'_, T>,
    work: &mut TileChunk<'_, T::Acc>,
    state: &mut [T::Acc],
    out: &RecurrentOut<'_, T>,
) where
    T::Acc: Wide,
{
    let mut sums = [0.0; MAX_CHUNK + 1];
    let fades = head.step_gates(&mut sums);
    let tiled = Tiled { head, gates: fades.then_some(&sums), reads: matches!(head.args.rule, Rule::Delta(_)) };
    let weights = tiled.load_readers::<I>(work);
    head.prefetch_results(out);
    // Tiles wait for what vectors have just stored, and vectors for tiles: neither follows the other at once where that can be helped.
    tiled.pair_keys::<I>(work);
    tiled.pack::<I>(state, head.size.width, work.state.each_mut().map(|part| &mut **part));
    tiled.multiply_readers::<I>(work);
    head.load_values::<I>(head.args.v, work.written);
    tiled.weigh_products::<I>(&weights, work);
    tiled.solve::<I>(&weights, work);
    if let Some(kept) = &out.kept {
        head.store_rows::<I>(work.extra, kept);
    }
    tiled.write::<I>(&weights, work, state);
    head.store_rows::<I>(work.sums, &out.out);
}

/// As [`multiply_packed`], for numbers that are those of tiles.
#[inline(always)]
fn multiply_tiles<A: Wide, I: Isa>(
    start: Start<'_, A>,
    (a, a_stride): (&[A], usize),
    (b, b_stride): (&[A], usize),
    steps: usize,
    (sums, stride): (&mut [A], usize),
    size: [usize; 2],
) {
    let operands = TileOperands { a: cast_slice(a), a_stride, a_step: TILE, b: cast_slice(b), b_stride, steps };
    multiply_packed::<A, I>(start, operands, (sums, stride), size);
}

impl<T: SimdElement> Tiled<'_, '_, T>
where
    T::Acc: Wide,
{
    /// Loads queries and keys, zeros beyond the last ones, and finds the factors of all rows.
    #[inline(always)]
    fn load_readers<I: Isa>(&self, work: &mut TileChunk<'_, T::Acc>) -> Weights<T::Acc> {
        let (head, zeros) = (self.head, [T::Acc::ZERO; MAX_CHUNK]);
        let (pairs, count) = (pairs_of(head.args.shape.head_dim), head.count);
        let stride = stride_of(pairs);
        let mut weights = Weights { rows: [zeros; 2], since: zeros, until: zeros, betas: head.betas() };
        let arrays = [head.args.queries(head.index), head.args.keys(head.index)];
        for (half, (array, factors)) in arrays.into_iter().zip(&mut weights.rows).enumerate() {
            let rows = &mut work.readers[half * head.size.chunk * stride..];
            for first in (0..head.size.rows.next_multiple_of(STEP)).step_by(TILE) {
                let mut squares = T::V::<I>::zero_block();
                for (i, squares) in (first..first + TILE).zip(squares.as_mut()) {
                    let row = &mut rows[i * stride..][..pairs];
                    if i < count {
                        array.prefetch(&head.sequence, (head.first + i).wrapping_add_signed(head.ahead));
                        *squares = array.read_operands::<I>(&head.sequence, head.first + i, row);
                    } else {
                        row.fill(T::Acc::ZERO);
                    }
                }
                let mut sums = [T::Acc::ZERO; TILE];
                T::V::<I>::sum_rows(squares).store(&mut sums);
                for i in first..count.min(first + TILE) {
                    let row = &mut rows[i * stride..][..pairs];
                    let square = sums[i - first].to_f64();
                    factors[i] = T::Acc::from_f64(array.factor_of::<I>(&head.sequence, head.first + i, square, row));
                }
            }
        }
        let rows = head.size.rows;
        if let Some(sums) = self.gates {
            for i in 0..rows {
                weights.since[i] = T::Acc::from_f64(sums[i + 1]);
                weights.until[i] = T::Acc::from_f64(sums[rows] - sums[i + 1]);
            }
        }
        for exponents in [&mut weights.since, &mut weights.until] {
            let given = *exponents;
            decays::<T::Acc, I>(&given[..rows], &mut exponents[..rows]);
        }
        weights
    }

    /// Transposes keys: as they are; and in pairs of tokens, once for each part of what is written.
    #[inline(always)]
    fn pair_keys<I: Isa>(&self, work: &mut TileChunk<'_, T::Acc>) {
        let (size, pairs) = (self.head.size, self.pairs_of_tokens());
        let (row, stride) = (stride_of(size.chunk), stride_of(pairs_of(self.head.args.shape.head_dim)));
        let rows = &work.readers[size.chunk * stride..];
        let of_channels = pairs_of(self.head.args.shape.head_dim);
        transpose::<T::Acc, I>((rows, stride), (&mut *work.columns, row), [size.rows, of_channels]);
        let rows = cast_slice::<T::Acc, T>(rows);
        for first in (0..pairs).step_by(TILE) {
            for d in (0..size.width).step_by(TILE) {
                let mut block = T::V::<I>::zero_block();
                for (i, pair) in block.as_mut().iter_mut().enumerate() {
                    let at = 2 * (first + i) * 2 * stride + d;
                    *pair = load_rows::<T, I>([&rows[at..], &rows[at + 2 * stride..]]);
                }
                let block = T::V::<I>::transpose(block);
                for (i, &operands) in block.as_ref().iter().enumerate() {
                    let keys = &mut work.keys[(d + i) * row + first..];
                    for part in 0..self.parts() {
                        operands.store(&mut keys[part * pairs..]);
                    }
                }
            }
        }
    }

    /// Pairs of tokens, in whole tiles.
    fn pairs_of_tokens(&self) -> usize {
        self.head.size.rows.next_multiple_of(STEP) / 2
    }

    /// Parts of the state and of what is written to it.
    fn parts(&self) -> usize {
        if self.reads { 2 } else { 1 }
    }

    /// Rounds a matrix whose rows lie as those of the values: the state, or what is written.
    #[inline(always)]
    fn pack<I: Isa>(&self, matrix: &[T::Acc], rows: usize, [first, second]: [&mut [T::Acc]; 2]) {
        let (stride, size) = (self.head.stride_v, [rows, self.head.width_v]);
        let (matrix, first, second) = ((cast_slice(matrix), stride), cast_slice_mut(first), cast_slice_mut(second));
        if self.reads {
            pack_matrix::<I, 2>(matrix, size, [first, second], stride);
        } else {
            pack_matrix::<I, 1>(matrix, size, [first], stride);
        }
    }

    /// Products of queries, and of keys if those read, with keys and with the state, which are left in `sums` and `extra`.
    #[inline(always)]
    fn multiply_readers<I: Isa>(&self, work: &mut TileChunk<'_, T::Acc>) {
        let (Size { rows, chunk, .. }, stride_v) = (self.head.size, self.head.stride_v);
        let pairs = pairs_of(self.head.args.shape.head_dim);
        let (stride, steps, of_values) = (stride_of(pairs), pairs / TILE, [rows, self.head.width_v]);
        let [queries, keys] = [0, chunk * stride].map(|at| (&work.readers[at..], stride));
        let columns = (&*work.columns, stride_of(chunk));
        let [first, second] = work.state.each_ref().map(|part| (&**part, stride_v));
        let [of_queries, of_keys] = &mut work.products;
        multiply_tiles::<T::Acc, I>(Start::Zeros, queries, columns, steps, (of_queries, chunk), [rows, rows]);
        let mut start = Start::Zeros;
        if self.reads {
            start = Start::Sums;
            multiply_tiles::<T::Acc, I>(Start::Zeros, keys, columns, steps, (of_keys, chunk), [rows, rows]);
            multiply_tiles::<T::Acc, I>(Start::Zeros, keys, second, steps, (work.extra, stride_v), of_values);
            multiply_tiles::<T::Acc, I>(Start::Zeros, queries, second, steps, (work.sums, stride_v), of_values);
            multiply_tiles::<T::Acc, I>(Start::Sums, keys, first, steps, (work.extra, stride_v), of_values);
        }
        multiply_tiles::<T::Acc, I>(start, queries, first, steps, (work.sums, stride_v), of_values);
    }

    /// Makes products of what they are weighed with: those of queries, rounded, and those of keys as factors of what is written.
    #[inline(always)]
    fn weigh_products<I: Isa>(&self, weights: &Weights<T::Acc>, work: &mut TileChunk<'_, T::Acc>) {
        let (rows, chunk) = (self.head.size.rows, self.head.size.chunk);
        let zeros = [T::Acc::ZERO; MAX_CHUNK];
        let (mut exponents, mut decayed) = (zeros, zeros);
        for i in 0..rows {
            let end = (i / BLOCK + 1) * BLOCK;
            let mut fades = weights.rows[1];
            if let Some(sums) = self.gates {
                for (exponent, before) in exponents[..=i].iter_mut().zip(&sums[1..]) {
                    *exponent = T::Acc::from_f64(sums[i + 1] - before);
                }
                decays::<T::Acc, I>(&exponents[..end], &mut decayed[..end]);
                multiply::<T::Acc, I>(&mut fades[..end], &decayed[..end]);
            }
            let [of_queries, of_keys] = work.products.each_mut().map(|products| &mut products[i * chunk..][..rows]);
            multiply::<T::Acc, I>(&mut of_queries[..end], &fades[..end]);
            scale::<T::Acc, I>(&mut of_queries[..end], weights.rows[0][i]);
            of_queries[i + 1..].fill(T::Acc::ZERO);
            if self.reads {
                // The factors of the system: what each key reads of what is written by earlier ones.
                multiply::<T::Acc, I>(&mut of_keys[..end], &fades[..end]);
                multiply::<T::Acc, I>(&mut of_keys[..end], &weights.betas[..end]);
                scale::<T::Acc, I>(&mut of_keys[..end], T::Acc::ZERO - weights.rows[1][i]);
                of_keys[i..].fill(T::Acc::ZERO);
            }
        }
        let (products, met) = (cast_slice(&*work.products[0]), cast_slice_mut(&mut *work.met));
        for i in 0..rows {
            let (row, packed) = (&products[i * chunk..][..rows], (&mut met[i * stride_of(chunk)..], self.pairs_of_tokens()));
            if self.reads {
                pack_row_parts::<I, 2>(row, packed);
            } else {
                pack_row_parts::<I, 1>(row, packed);
            }
        }
    }

    /// Finds what is written, and fades what queries read of the state.
    #[inline(always)]
    fn solve<I: Isa>(&self, weights: &Weights<T::Acc>, work: &mut TileChunk<'_, T::Acc>) {
        let (rows, width_v, stride_v) = (self.head.size.rows, self.head.width_v, self.head.stride_v);
        for i in 0..rows {
            let at = i * stride_v..i * stride_v + width_v;
            scale::<T::Acc, I>(&mut work.sums[at.clone()], weights.rows[0][i] * weights.since[i]);
            if self.reads {
                let (read, value) = (&mut work.extra[at.clone()], &mut work.written[at]);
                let read_factor = T::Acc::ZERO - weights.rows[1][i] * weights.since[i];
                add_scaled::<T::Acc, I>(value, read_factor, read);
                read.copy_from_slice(value);
            }
        }
        if self.reads {
            substitute::<T::Acc, I>((work.products[1], self.head.size.chunk), (work.extra, stride_v), [rows, width_v]);
            work.written[..rows * stride_v].copy_from_slice(&work.extra[..rows * stride_v]);
        }
        self.head.scale_rows::<I>(work.written, &weights.betas);
    }

    /// Adds to `sums` what queries meet of what is written, fades the state, and writes to it.
    #[inline(always)]
    fn write<I: Isa>(&self, weights: &Weights<T::Acc>, work: &mut TileChunk<'_, T::Acc>, state: &mut [T::Acc]) {
        let (head, Size { rows, width, chunk, .. }) = (self.head, self.head.size);
        let (width_v, stride_v, pairs) = (head.width_v, head.stride_v, self.pairs_of_tokens());
        // Factors of 0 do not hide what is not finite.
        let finite = are_finite::<T::Acc, I>((work.written, stride_v), [rows, width_v]);
        if finite {
            let (second, first) = work.paired.split_at_mut(pairs * stride_v);
            self.pack::<I>(work.written, rows, [first, second]);
        } else {
            head.add_met::<I>(work.products[0], work.written, work.sums);
        }
        let mut factors = weights.rows[1];
        multiply::<T::Acc, I>(&mut factors[..rows], &weights.until[..rows]);
        head.scale_rows::<I>(work.written, &factors);
        self.pack::<I>(work.written, rows, work.faded.split_at_mut(pairs * stride_v).into());
        if finite {
            let (met, size, steps) = ((&*work.met, stride_of(chunk)), [rows, width_v], pairs / TILE);
            if self.reads {
                // Each first part with the second one of the other side.
                multiply_tiles::<T::Acc, I>(Start::Sums, met, (work.paired, stride_v), 2 * steps, (work.sums, stride_v), size);
            }
            let first = (&work.paired[pairs * stride_v..], stride_v);
            multiply_tiles::<T::Acc, I>(Start::Sums, met, first, steps, (work.sums, stride_v), size);
        }
        work.alpha.fill(weights.since[rows - 1]);
        let start = if self.gates.is_some() { Start::Faded(work.alpha) } else { Start::Sums };
        let (keys, faded) = ((&*work.keys, stride_of(chunk)), (&*work.faded, stride_v));
        multiply_tiles::<T::Acc, I>(start, keys, faded, self.parts() * pairs / TILE, (state, stride_v), [width, width_v]);
    }
}
