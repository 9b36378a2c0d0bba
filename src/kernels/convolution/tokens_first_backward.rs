//! Gradients where channels are contiguous.
//!
//! With `g_t` the gradient of a token's sum before its activation, `dx_s = sum_j w_j g_(s + W - 1 - j)` and
//! `dw_j = sum_t g_t x_(t - W + 1 + j)`. Tokens are gone through once; the last `W - 1` rows of `g` and the sums of the filters' gradients
//! are kept, and the gradient of an input is done `W - 1` tokens after it.

use super::args::{BLOCK, ConvArgs, ConvGradients, ConvGradientsOut, Run};
use super::plan::{Piece, Plan};
use super::taps::{Taps, place};
use super::tokens_first::{TILE, WINDOW};
use crate::dtype::Float;
use crate::math::load::{MAX_LANES, load_padded, store_output, store_padded, widen};
use crate::math::silu::silu_slope_each;
use crate::parallel::RowWriter;
use crate::simd::{Isa, SimdElement, Task, Vector, Wide, prefetch_lines};
use crate::workspace::{Scratch, carve};

/// Tasks are groups of pieces times blocks of channels.
pub struct Backward<'a, T: SimdElement> {
    pub args: &'a ConvArgs<'a, T>,
    pub given: &'a ConvGradients<'a, T>,
    pub out: &'a ConvGradientsOut<'a, T>,
    pub plan: &'a Plan,
    pub taps: &'a Taps<T::Acc>,
    /// Sums of each group for the gradients of filters and biases, interleaved, block by block.
    pub sums: &'a RowWriter<'a, T::Acc>,
}

/// Channels of a task and what is kept of them.
struct Block<'s, E> {
    number: usize,
    first: usize,
    width: usize,
    past_caches: bool,
    /// Rows of `g` of the `W - 1` tokens before, interleaved.
    before: &'s mut [E],
    /// Sums of the gradients of filters and biases, interleaved.
    sums: &'s mut [E],
    /// `W` rows of inputs.
    rows: &'s mut [E],
    /// A gradient of inputs.
    gradient: &'s mut [E],
}

impl<E> Block<'_, E> {
    fn channels(&self) -> std::ops::Range<usize> {
        self.first..self.first + self.width
    }
}

impl<T: SimdElement> Task for Backward<'_, T>
where
    T::Acc: Wide,
{
    const MULTIPLIES_BF16: bool = false;

    #[inline(always)]
    fn run<I: Isa>(&self, index: usize) {
        let (channels, width) = (self.args.shape.channels, self.args.shape.width);
        let blocks = channels.div_ceil(BLOCK);
        let (group, number) = (index / blocks, index % blocks);
        let first = number * BLOCK;
        let own = BLOCK.min(channels - first);
        let stride = own.next_multiple_of(MAX_LANES);
        let mut scratch = Scratch::take::<T::Acc>(stride * 2 * width);
        let mut rest = scratch.as_mut_slice::<T::Acc>();
        let mut block = Block {
            number,
            first,
            width: own,
            past_caches: self.out.x.passes_caches(),
            before: carve(&mut rest, stride * (width - 1)),
            sums: self.sums.row(group, 0, number),
            rows: carve(&mut rest, stride * width),
            gradient: carve(&mut rest, stride),
        };
        block.sums.fill(T::Acc::ZERO);
        for piece in self.plan.group(group) {
            match width {
                2 => self.piece::<I, 2>(piece, &mut block),
                3 => self.piece::<I, 3>(piece, &mut block),
                4 => self.piece::<I, 4>(piece, &mut block),
                _ => self.piece::<I, 0>(piece, &mut block),
            }
        }
    }
}

impl<T: SimdElement> Backward<'_, T>
where
    T::Acc: Wide,
{
    /// Tokens of a run, and as many after them as their filters reach; `W` is the number of taps, or 0.
    #[inline(always)]
    fn piece<I: Isa, const W: usize>(&self, piece: &Piece, block: &mut Block<'_, T::Acc>) {
        let shape = &self.args.shape;
        let (run, reach) = (&self.args.runs[piece.run], shape.width - 1);
        block.before.fill(T::Acc::ZERO);
        if piece.start == 0 {
            // What no filter reads may still be in the state after the run.
            block.gradient.fill(T::Acc::ZERO);
            for back in reach + 1..=shape.state_len {
                self.finish_past(run, block, back);
            }
        }
        // Tokens of tiles have all they need within the run, and what they finish is in no state.
        let last = if run.hidden { 0 } else { piece.end.min(self.given.first_in_state(shape, run) + reach) };
        let mut at = piece.start;
        while at < piece.end + reach {
            if W > 0 && at >= piece.start + reach && at + TILE <= last {
                self.tile::<I, W>(run, block, at);
                at += TILE;
            } else {
                self.step::<I>(piece, block, at);
                at += 1;
            }
        }
    }

    /// One token, wherever it lies.
    #[inline(always)]
    fn step<I: Isa>(&self, piece: &Piece, block: &mut Block<'_, T::Acc>, at: usize) {
        let (args, lanes) = (self.args, T::V::<I>::LANES);
        let (run, width) = (&args.runs[piece.run], args.shape.width);
        let (reach, stride) = (width - 1, block.gradient.len());
        let is_live = at < run.len && !run.hidden;
        let mut d_out: &[T] = &[];
        if is_live {
            self.stage::<I>(run, block, at);
            d_out = &self.given.d_out.row(run.batch, run.first + at, 0)[block.channels()];
        }
        let mut d = 0;
        while d < block.width {
            let taps = self.taps.of(block.first + d);
            let mut g = T::V::<I>::splat(T::Acc::ZERO);
            if is_live {
                g = load_padded::<T, I>(&d_out[d..]);
                if args.silu {
                    let mut y = T::V::<I>::load(&taps[width * MAX_LANES..]);
                    for j in 0..width {
                        y = T::V::<I>::load(&block.rows[j * stride + d..]).mul_add(T::V::<I>::load(&taps[j * MAX_LANES..]), y);
                    }
                    let [slope] = silu_slope_each::<T, I, 1>([y]);
                    g = g.mul(slope);
                }
                if at < piece.end {
                    let sums = &mut block.sums[place(d, width + 1)..];
                    for j in 0..width {
                        let sum = &mut sums[j * MAX_LANES..];
                        g.mul_add(T::V::<I>::load(&block.rows[j * stride + d..]), T::V::<I>::load(sum)).store(sum);
                    }
                    let sum = &mut sums[width * MAX_LANES..];
                    T::V::<I>::load(sum).add(g).store(sum);
                }
            }
            let mut dx = g.mul(T::V::<I>::load(taps));
            let before = &mut block.before[place(d, reach).min(reach * stride)..];
            for j in 1..width {
                let older = T::V::<I>::load(&before[(reach - j) * MAX_LANES..]);
                dx = older.mul_add(T::V::<I>::load(&taps[j * MAX_LANES..]), dx);
            }
            for i in 1..reach {
                T::V::<I>::load(&before[i * MAX_LANES..]).store(&mut before[(i - 1) * MAX_LANES..]);
            }
            if reach > 0 {
                g.store(&mut before[(reach - 1) * MAX_LANES..]);
            }
            dx.store(&mut block.gradient[d..]);
            d += lanes;
        }
        match at.checked_sub(reach) {
            Some(done) if done >= piece.start => self.finish::<I>(run, block, done),
            None if piece.start == 0 => self.finish_past(run, block, reach - at),
            // It belongs to the piece before.
            Some(_) | None => {}
        }
    }

    /// Reads the inputs of a filter.
    #[inline(always)]
    fn stage<I: Isa>(&self, run: &Run, block: &mut Block<'_, T::Acc>, at: usize) {
        let (width, stride) = (self.args.shape.width, block.gradient.len());
        let channels = block.channels();
        for (j, row) in block.rows.chunks_mut(stride).take(width).enumerate() {
            if let Some(token) = (at + j + 1).checked_sub(width) {
                widen::<T, I>(&self.args.x.row(run.batch, run.first + token, 0)[channels.clone()], row);
                continue;
            }
            row.fill(T::Acc::ZERO);
            for (x, channel) in row.iter_mut().zip(channels.clone()) {
                *x = self.args.past(run, channel, width - 1 - at - j);
            }
        }
    }

    /// Writes the gradient of a token.
    #[inline(always)]
    fn finish<I: Isa>(&self, run: &Run, block: &mut Block<'_, T::Acc>, token: usize) {
        if token >= self.given.first_in_state(&self.args.shape, run) {
            let channels = block.channels();
            for (dx, channel) in block.gradient.iter_mut().zip(channels) {
                *dx = *dx + self.given.by_state(&self.args.shape, run, channel, token as isize);
            }
        }
        let out = self.out.x.row(run.batch, run.first + token, block.number);
        let mut d = 0;
        while d < block.width {
            store_padded::<T, I>(T::V::<I>::load(&block.gradient[d..]), &mut out[d..]);
            d += T::V::<I>::LANES;
        }
    }

    /// Writes the gradient of what lies `back` tokens before the first one.
    #[inline(always)]
    fn finish_past(&self, run: &Run, block: &Block<'_, T::Acc>, back: usize) {
        let (Some(initial), Some(number)) = (&self.out.initial, run.initial) else { return };
        let shape = &self.args.shape;
        for (&dx, channel) in block.gradient.iter().zip(block.channels()) {
            let by_state = self.given.by_state(shape, run, channel, -(back as isize));
            initial.row(number, channel, shape.state_len - back)[0] = dx + by_state;
        }
    }

    /// Some tokens whose filters, and whose gradients, stay within the run.
    #[inline(always)]
    fn tile<I: Isa, const W: usize>(&self, run: &Run, block: &mut Block<'_, T::Acc>, at: usize) {
        let lanes = T::V::<I>::LANES;
        let whole = block.width & !(lanes - 1);
        let first = run.first + at;
        let mut out: [&mut [T]; TILE] = std::array::from_fn(|r| self.out.x.row(run.batch, first + r + 1 - W, block.number));
        let next = [&self.args.x, &self.given.d_out].map(|rows| rows.rows_from(run.batch, first, 0));
        let ahead = at + 2 * TILE <= run.len;
        let mut d = 0;
        while d < whole {
            self.columns::<I, W>(run, block, (at, d), &mut out);
            if ahead {
                for (data, stride) in next {
                    for r in TILE..2 * TILE {
                        prefetch_lines(data.as_ptr().wrapping_add(r * stride + block.first + d), lanes);
                    }
                }
            }
            d += lanes;
        }
        if d < block.width {
            self.columns::<I, W>(run, block, (at, d), &mut out);
        }
    }

    /// One vector of channels of a tile.
    #[inline(always)]
    fn columns<I: Isa, const W: usize>(
        &self,
        run: &Run,
        block: &mut Block<'_, T::Acc>,
        (at, d): (usize, usize),
        out: &mut [&mut [T]; TILE],
    ) {
        let zero = T::V::<I>::splat(T::Acc::ZERO);
        let channel = block.first + d;
        let taps = self.taps.of(channel);
        let (x, x_stride) = self.args.x.rows_from(run.batch, run.first + at + 1 - W, 0);
        let (d_out, d_stride) = self.given.d_out.rows_from(run.batch, run.first + at, 0);
        let mut window = [zero; WINDOW];
        for (i, x_row) in window.iter_mut().enumerate().take(TILE + W - 1) {
            *x_row = load_padded::<T, I>(&x[i * x_stride + channel..]);
        }
        let mut g = [zero; TILE];
        for (r, g) in g.iter_mut().enumerate() {
            *g = load_padded::<T, I>(&d_out[r * d_stride + channel..]);
        }
        if self.args.silu {
            let mut y = [T::V::<I>::load(&taps[W * MAX_LANES..]); TILE];
            for j in 0..W {
                let tap = T::V::<I>::load(&taps[j * MAX_LANES..]);
                for r in 0..TILE {
                    y[r] = window[r + j].mul_add(tap, y[r]);
                }
            }
            for (g, slope) in g.iter_mut().zip(silu_slope_each::<T, I, TILE>(y)) {
                *g = g.mul(slope);
            }
        }
        let sums = &mut block.sums[place(d, W + 1)..];
        for j in 0..W {
            let mut sum = T::V::<I>::load(&sums[j * MAX_LANES..]);
            for r in 0..TILE {
                sum = g[r].mul_add(window[r + j], sum);
            }
            sum.store(&mut sums[j * MAX_LANES..]);
        }
        let sum = &mut sums[W * MAX_LANES..];
        T::V::<I>::load(sum).add(g[0].add(g[1]).add(g[2].add(g[3]))).store(sum);
        // Gradients of the sums from `W - 1` tokens before on.
        let before = &mut block.before[place(d, W - 1)..];
        let mut all = [zero; WINDOW];
        for i in 0..W - 1 {
            all[i] = T::V::<I>::load(&before[i * MAX_LANES..]);
        }
        all[W - 1..W - 1 + TILE].copy_from_slice(&g);
        let mut dx = [zero; TILE];
        for j in 0..W {
            let tap = T::V::<I>::load(&taps[j * MAX_LANES..]);
            for r in 0..TILE {
                dx[r] = all[r + W - 1 - j].mul_add(tap, dx[r]);
            }
        }
        for i in 0..W - 1 {
            all[TILE + i].store(&mut before[i * MAX_LANES..]);
        }
        for (dx, out) in dx.into_iter().zip(out) {
            store_output::<T, I>(dx, &mut out[d..], block.past_caches);
        }
    }
}
