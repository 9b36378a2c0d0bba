//! Outputs where channels are contiguous: channels in the lanes, four tokens at a time.
//!
//! Seven rows of inputs make four rows of outputs of a filter of four taps, so that an output takes 3 loads. Rows are gone along from
//! end to end, and the next four of inputs and outputs are requested meanwhile: they lie on pages of their own.

use super::args::{BLOCK, ConvArgs, ConvOut};
use super::plan::{Piece, Plan};
use super::taps::{Taps, interleaved};
use crate::dtype::Float;
use crate::math::load::{MAX_LANES, load_padded, store_output};
use crate::math::silu::silu_each;
use crate::simd::{Isa, LINE, SimdElement, Task, Vector, prefetch_lines, prefetch_lines_to_write};
use crate::workspace::Scratch;
use std::ops::Range;

/// Tokens of a tile.
pub(super) const TILE: usize = 4;
/// Most taps that are unrolled.
pub(super) const MOST_TAPS: usize = 4;
/// Rows of inputs of a tile.
pub(super) const WINDOW: usize = TILE + MOST_TAPS - 1;

/// Tasks are groups of pieces times blocks of channels.
pub struct Forward<'a, T: SimdElement> {
    pub args: &'a ConvArgs<'a, T>,
    pub out: &'a ConvOut<'a, T>,
    pub plan: &'a Plan,
    pub taps: &'a Taps<T::Acc>,
}

impl<T: SimdElement> Task for Forward<'_, T> {
    const MULTIPLIES_BF16: bool = false;

    #[inline(always)]
    fn run<I: Isa>(&self, index: usize) {
        let channels = self.args.shape.channels;
        let blocks = channels.div_ceil(BLOCK);
        let block = index % blocks;
        let past_caches = self.out.out.passes_caches();
        let block = Block { number: block, first: block * BLOCK, width: BLOCK.min(channels - block * BLOCK), past_caches };
        for piece in self.plan.group(index / blocks) {
            self.piece::<I>(piece, &block);
        }
    }
}

/// Channels of a task.
struct Block {
    number: usize,
    first: usize,
    width: usize,
    past_caches: bool,
}

impl Block {
    fn channels(&self) -> Range<usize> {
        self.first..self.first + self.width
    }
}

impl<T: SimdElement> Forward<'_, T> {
    #[inline(always)]
    fn piece<I: Isa>(&self, piece: &Piece, block: &Block) {
        let args = self.args;
        let run = &args.runs[piece.run];
        if piece.end == run.len {
            args.write_state(run, self.out.last.as_ref(), block.channels());
        }
        if run.hidden {
            for at in piece.start..piece.end {
                let row = self.out.out.row(run.batch, run.first + at, block.number);
                match &args.residual {
                    Some(residual) => row.copy_from_slice(&residual.row(run.batch, run.first + at, 0)[block.channels()]),
                    None => row.fill(T::zeroed()),
                }
            }
            return;
        }
        let mut at = piece.start;
        while at < piece.end.min(args.shape.width - 1) {
            self.first_row::<I>(piece, block, at);
            at += 1;
        }
        match args.shape.width {
            2 => self.rows::<I, 2>(piece, block, at),
            3 => self.rows::<I, 3>(piece, block, at),
            4 => self.rows::<I, 4>(piece, block, at),
            _ => self.rows::<I, 0>(piece, block, at),
        }
    }

    /// A token whose filter reaches before the run.
    #[inline(always)]
    fn first_row<I: Isa>(&self, piece: &Piece, block: &Block, at: usize) {
        let (args, lanes) = (self.args, T::V::<I>::LANES);
        let (run, width) = (&args.runs[piece.run], args.shape.width);
        let mut scratch = Scratch::take::<T::Acc>(interleaved(block.width, width));
        let rows = scratch.as_mut_slice::<T::Acc>();
        let stride = block.width.next_multiple_of(MAX_LANES);
        for (j, row) in rows.chunks_mut(stride).take(width).enumerate() {
            for (x, channel) in row.iter_mut().zip(block.channels()) {
                *x = args.token(run, channel, (at + j + 1) as isize - width as isize);
            }
        }
        let mut out = [self.out.out.row(run.batch, run.first + at, block.number)];
        let mut d = 0;
        while d < block.width {
            let taps = self.taps.of(block.first + d);
            let mut y = T::V::<I>::load(&taps[width * MAX_LANES..]);
            for j in 0..width {
                y = T::V::<I>::load(&rows[j * stride + d..]).mul_add(T::V::<I>::load(&taps[j * MAX_LANES..]), y);
            }
            self.finish::<I, 1>([y], piece, (at, block), (&mut out, d));
            d += lanes;
        }
    }

    /// Tokens from `at` on, whose filters stay within the run.
    #[inline(always)]
    fn rows<I: Isa, const W: usize>(&self, piece: &Piece, block: &Block, mut at: usize) {
        while at + TILE <= piece.end {
            self.tile::<I, TILE, W>(piece, block, at);
            at += TILE;
        }
        while at < piece.end {
            self.tile::<I, 1, W>(piece, block, at);
            at += 1;
        }
    }

    /// `R` tokens; `W` is the number of taps, or 0.
    #[inline(always)]
    fn tile<I: Isa, const R: usize, const W: usize>(&self, piece: &Piece, block: &Block, at: usize) {
        let run = &self.args.runs[piece.run];
        let mut out: [&mut [T]; R] = std::array::from_fn(|r| self.out.out.row(run.batch, run.first + at + r, block.number));
        let width = if W > 0 { W } else { self.args.shape.width };
        let (data, stride) = self.args.x.rows_from(run.batch, run.first + at + 1 - width, 0);
        let data = &data[block.first..];
        let rows: [&[T]; WINDOW] = std::array::from_fn(|i| &data[i.min(R + width - 2) * stride..][..block.width]);
        let (lanes, whole) = (T::V::<I>::LANES, block.width & !(T::V::<I>::LANES - 1));
        let next = at + R + TILE <= piece.end;
        let x_ahead = data.as_ptr().wrapping_add((R + width - 1) * stride);
        let out_ahead = out.each_ref().map(|row| row.as_ptr().wrapping_add(R * self.args.shape.channels));
        let mut d = 0;
        while d < whole {
            // Once for each line, which may hold several vectors.
            if next && d.is_multiple_of(LINE / size_of::<T>()) {
                for (r, out) in out_ahead.into_iter().enumerate() {
                    prefetch_lines(x_ahead.wrapping_add(r * stride + d), lanes);
                    if !block.past_caches {
                        prefetch_lines_to_write(out.wrapping_add(d), lanes);
                    }
                }
            }
            let y = if W > 0 {
                self.sums::<I, R, W>(rows.map(|row| &row[d..d + lanes]), block.first + d)
            } else {
                self.sums_of_any_width::<I, R>((&data[d..], stride), block.first + d)
            };
            self.finish::<I, R>(y, piece, (at, block), (&mut out, d));
            d += lanes;
        }
        if d < block.width {
            let y = if W > 0 {
                self.sums::<I, R, W>(rows.map(|row| &row[d..]), block.first + d)
            } else {
                self.sums_of_any_width::<I, R>((&data[d..], stride), block.first + d)
            };
            self.finish::<I, R>(y, piece, (at, block), (&mut out, d));
        }
    }

    /// One vector of `R` tokens from rows that begin with its channels.
    #[inline(always)]
    fn sums<I: Isa, const R: usize, const W: usize>(&self, rows: [&[T]; WINDOW], channel: usize) -> [T::V<I>; R] {
        let mut window = [T::V::<I>::splat(T::Acc::ZERO); WINDOW];
        for (x, row) in window.iter_mut().zip(rows).take(R + W - 1) {
            *x = load_padded::<T, I>(row);
        }
        let taps = &self.taps.of(channel)[..W * MAX_LANES + T::V::<I>::LANES];
        let mut y = [T::V::<I>::load(&taps[W * MAX_LANES..]); R];
        for j in 0..W {
            let tap = T::V::<I>::load(&taps[j * MAX_LANES..]);
            for r in 0..R {
                y[r] = window[r + j].mul_add(tap, y[r]);
            }
        }
        y
    }

    /// One vector of `R` tokens by any number of taps, from the first row on.
    #[inline(always)]
    fn sums_of_any_width<I: Isa, const R: usize>(&self, (data, stride): (&[T], usize), channel: usize) -> [T::V<I>; R] {
        let (taps, width) = (self.taps.of(channel), self.args.shape.width);
        let mut y = [T::V::<I>::load(&taps[width * MAX_LANES..]); R];
        for j in 0..width {
            let tap = T::V::<I>::load(&taps[j * MAX_LANES..]);
            for (r, y) in y.iter_mut().enumerate() {
                *y = load_padded::<T, I>(&data[(r + j) * stride..]).mul_add(tap, *y);
            }
        }
        y
    }

    /// Activates, adds the residual, and writes the channels from `d` of a block on.
    #[inline(always)]
    fn finish<I: Isa, const R: usize>(
        &self,
        mut y: [T::V<I>; R],
        piece: &Piece,
        (at, block): (usize, &Block),
        (out, d): (&mut [&mut [T]; R], usize),
    ) {
        if self.args.silu {
            y = silu_each::<T, I, R>(y);
        }
        if let Some(residual) = &self.args.residual {
            let run = &self.args.runs[piece.run];
            for (r, y) in y.iter_mut().enumerate() {
                let row = residual.row(run.batch, run.first + at + r, 0);
                *y = y.add(load_padded::<T, I>(&row[block.first + d..]));
            }
        }
        for (y, out) in y.into_iter().zip(out) {
            store_output::<T, I>(y, &mut out[d..], block.past_caches);
        }
    }
}
