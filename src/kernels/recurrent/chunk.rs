//! The chunk form: some heads of one sequence, chunk after chunk.

use super::head::{Chunk, Head, chunk_len};
use super::states::Flat;
use super::tile_chunk::{self, TileChunk, tile_chunk_len};
use super::{MOST_HEADS, RecurrentArgs, RecurrentOut};
use crate::math::elementwise::add_scaled;
use crate::simd::{Isa, SimdElement, Wide};
use crate::workspace::Scratch;
use std::ops::Range;

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
    let (shape, sequence) = (&args.shape, args.sequences[number]);
    let tiled = tile_chunk::takes::<T, I>(args);
    let size = if tiled { size.next_multiple_of(tile_chunk::STEP) } else { size };
    let start = Head::new(args, sequence, 0, size);
    let (len, stride_v) = (start.state_len(), start.stride_v);
    let rest = if tiled { tile_chunk_len(args, size) } else { chunk_len(args, size) };
    let rest = rest.max(shape.head_dim * shape.head_dim_v);
    let mut scratch = Scratch::take::<T::Acc>(heads.len() * len + rest);
    let (states, mut rest) = scratch.as_mut_slice::<T::Acc>().split_at_mut(heads.len() * len);
    let mut flats: [Option<Flat<'_, T::Acc>>; MOST_HEADS] = [const { None }; MOST_HEADS];
    for (i, head) in heads.clone().enumerate() {
        let flat = out.states.of(number, head, shape);
        let state = (&mut states[i * len..][..len], stride_v);
        out.states.load(&flat, (number, head), state, &mut rest[..shape.head_dim * shape.head_dim_v]);
        flats[i] = Some(flat);
    }
    let mut work =
        if tiled { Buffers::Tiles(TileChunk::carve(&start, &mut rest)) } else { Buffers::Rows(Chunk::carve(&start, &mut rest)) };
    for first in (0..sequence.len).step_by(size) {
        for (i, number) in heads.clone().enumerate() {
            let head = Head { index: number, ..start.at(first) };
            let state = &mut states[i * len..][..len];
            match &mut work {
                Buffers::Tiles(work) => tile_chunk::run::<T, I>(&head, work, state, out),
                Buffers::Rows(work) => of_rows::<T, I>(&head, work, state, out),
            }
        }
    }
    for (i, flat) in flats.into_iter().flatten().enumerate() {
        flat.store(&states[i * len..][..len], stride_v);
    }
}

enum Buffers<'s, A> {
    Rows(Chunk<'s, A>),
    Tiles(TileChunk<'s, A>),
}

/// Computes the outputs of a chunk, and makes the state before it that behind it.
#[inline(always)]
fn of_rows<T: SimdElement, I: Isa>(
    head: &Head<'_, T>,
    work: &mut Chunk<'_, T::Acc>,
    state: &mut [T::Acc],
    out: &RecurrentOut<'_, T>,
) where
    T::Acc: Wide,
{
    head.load_rows::<I>(work);
    head.prefetch_results(out);
    head.fade::<I>(work, true);
    head.solve::<I>(state, work);
    if let Some(kept) = &out.kept {
        head.store_rows::<I>(work.extra, kept);
    }
    output::<T, I>(head, work, out);
    head.update::<I>(work, state);
}

/// Writes the outputs, from what queries read of the state.
#[inline(always)]
fn output<T: SimdElement, I: Isa>(head: &Head<'_, T>, work: &mut Chunk<'_, T::Acc>, out: &RecurrentOut<'_, T>)
where
    T::Acc: Wide,
{
    let queries = &work.lefts[0];
    head.add_met::<I>(queries.products[0], work.written, work.sums);
    if work.counts[1] > 1 {
        head.add_met::<I>(queries.products[1], work.extra, work.sums);
    }
    for i in 0..head.count {
        let sums = &mut work.sums[i * head.stride_v..][..head.width_v];
        if head.args.bonus.is_some() {
            add_scaled::<T::Acc, I>(sums, work.bonus[i], &work.written[i * head.stride_v..][..head.width_v]);
        }
    }
    head.store_rows::<I>(work.sums, &out.out);
}
