//! The decays of a chunk: what they make of its rows, and the products of its rows with each other under them.
//!
//! A product of rows `i >= j` is weighed, channel by channel, with `e^{G_i - G_j} <= 1`. One factor for each row would not do:
//! `e^{-G_j}` overflows. With one gate for all channels the products are weighed after they are summed. With a gate for each
//! channel, rows are taken in blocks of [`BLOCK`]: left rows fade from the start of their block, right rows to the end of theirs,
//! and what lies between is a factor of each channel. Within a block, right rows are brought back to its start, as long as the block
//! fades by no more than [`LIMIT`]; the channels that fade more are summed pair by pair.

use super::head::{BLOCK, MAX_CHUNK};
use crate::math::elementwise::{add, add_scaled, decay, decays, fade_away, multiply, multiply_decays, scale, transpose};
use crate::math::load::MAX_LANES;
use crate::math::product::{Factors, Rows, add_product, set_product};
use crate::simd::{Isa, Routine, Vector, Wide};

/// Powers of two by which right rows are brought back at most: their exponents are then exact to `LIMIT` units in the last place of 1.
pub const LIMIT: f64 = 16.0;

/// The sizes of a chunk.
#[derive(Clone, Copy)]
pub struct Size {
    /// Rows that are computed: whole blocks.
    pub rows: usize,
    /// Elements from one row of a square matrix, or of a transposed one, to the next: the longest chunk.
    pub chunk: usize,
    /// Channels of the keys, in whole vectors.
    pub width: usize,
    /// Elements from one row to the next.
    pub stride: usize,
}

/// Rows that read: what they meet has faded up to their own step, or to the one before.
pub struct Left<'s, E> {
    /// `[chunk, stride]`; then faded from the start of the chunk.
    pub rows: &'s mut [E],
    /// Whether the step of the row itself does not fade what it meets.
    pub exclusive: bool,
    /// Whether a row does not meet what is written in its own step.
    pub strict: bool,
    /// Products with the right rows, `[chunk, chunk]` each; 0 above the diagonal within blocks, undefined beyond.
    pub products: [&'s mut [E]; 2],
}

impl<E> Left<'_, E> {
    /// How many rows from the first on row `i` meets.
    fn met(&self, i: usize) -> usize {
        if self.strict { i } else { i + 1 }
    }
}

/// Rows that are written.
pub struct Right<'s, E> {
    /// `[chunk, stride]`; scratch afterwards.
    pub rows: &'s mut [E],
    /// `[width, chunk]`: the rows transposed; then faded to the end of the chunk.
    pub columns: &'s mut [E],
}

/// The gates of a chunk, in base 2.
#[derive(Clone, Copy)]
pub enum Gates<'s, E> {
    /// None at all.
    None,
    /// Sums of the gates before each row, and of all.
    Steps(&'s [f64; MAX_CHUNK + 1]),
    /// `[chunk, stride]`, rows of zeros beyond the last one.
    Channels(&'s [E]),
}

/// Scratch for gates of channels.
pub struct ChannelScratch<'s, E> {
    /// `[width, chunk]`.
    pub columns: &'s mut [E],
    /// `[MAX_CHUNK / BLOCK, width]`: what each block fades by.
    pub blocks: &'s mut [E],
    /// `[width]`.
    pub total: &'s mut [E],
    /// `[width]`.
    pub ratio: &'s mut [E],
}

/// Computes the products of left and right rows, then fades the rows.
pub struct Fade<'c, 's, E> {
    pub size: Size,
    pub gates: Gates<'c, E>,
    pub lefts: &'c mut [Left<'s, E>],
    pub rights: &'c mut [Right<'s, E>],
    pub scratch: &'c mut ChannelScratch<'s, E>,
    /// `[width]`: what the state fades by is written here.
    pub alpha: &'c mut [E],
}

impl<E: Wide> Routine for Fade<'_, '_, E> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self) {
        let Self { size, gates, lefts, rights, scratch, alpha } = self;
        match gates {
            Gates::None => {
                alpha.fill(E::from_f64(1.0));
                by_step::<E, I>(size, None, lefts, rights);
            }
            Gates::Steps(sums) => {
                alpha.fill(power::<E, I>(sums[size.rows]));
                by_step::<E, I>(size, Some(sums), lefts, rights);
            }
            Gates::Channels(gates) => by_channel::<E, I>(size, gates, lefts, rights, scratch, alpha),
        }
    }
}

/// `2^x` for `x <= 0`.
#[inline(always)]
pub fn power<E: Wide, I: Isa>(x: f64) -> E {
    let mut lanes = [E::ZERO; MAX_LANES];
    decay::<E, I>(E::V::<I>::splat(E::from_f64(x))).store(&mut lanes);
    lanes[0]
}

#[inline(always)]
fn by_step<E: Wide, I: Isa>(
    size: Size,
    sums: Option<&[f64; MAX_CHUNK + 1]>,
    lefts: &mut [Left<'_, E>],
    rights: &mut [Right<'_, E>],
) {
    let Size { rows, chunk, width, stride } = size;
    for right in rights.iter_mut() {
        transpose::<E, I>((right.rows, stride), (right.columns, chunk), [rows, width]);
    }
    // Tiles form more products than are met in the time that packing takes twice.
    let block = if I::HAS_TILES { rows } else { BLOCK };
    for left in lefts.iter_mut() {
        for (products, right) in left.products.iter_mut().zip(rights.iter()) {
            for first in (0..rows).step_by(block) {
                let products = &mut products[first * chunk..];
                let factors = Factors { data: &left.rows[first * stride..], row: stride, step: 1 };
                let matrix = Rows::new(right.columns, chunk);
                set_product::<E, I>(factors, matrix, (products, chunk), [block, width, first + block]);
            }
        }
    }
    let mut weights = [E::ZERO; MAX_CHUNK];
    for left in lefts.iter_mut() {
        for i in 0..rows {
            let (met, end) = (left.met(i), (i / BLOCK + 1) * BLOCK);
            if let Some(sums) = sums {
                let own = if left.exclusive { sums[i] } else { sums[i + 1] };
                for (weight, before) in weights[..met].iter_mut().zip(&sums[1..]) {
                    *weight = E::from_f64(own - before);
                }
                weights[met..end].fill(E::ZERO);
                let exponents = weights;
                decays::<E, I>(&exponents[..end], &mut weights[..end]);
                scale::<E, I>(&mut left.rows[i * stride..][..width], power::<E, I>(own));
            }
            for products in left.products.iter_mut().take(rights.len()) {
                let row = &mut products[i * chunk..][..end];
                if sums.is_some() {
                    multiply::<E, I>(row, &weights[..end]);
                }
                row[met..].fill(E::ZERO);
            }
        }
    }
    if let Some(sums) = sums {
        let mut exponents = [E::ZERO; MAX_CHUNK];
        for (exponent, before) in exponents[..rows].iter_mut().zip(&sums[1..]) {
            *exponent = E::from_f64(sums[rows] - before);
        }
        decays::<E, I>(&exponents[..rows], &mut weights[..rows]);
        for right in rights.iter_mut() {
            for column in right.columns.chunks_exact_mut(chunk).take(width) {
                multiply::<E, I>(&mut column[..rows], &weights[..rows]);
            }
        }
    }
}

#[inline(always)]
fn by_channel<E: Wide, I: Isa>(
    size: Size,
    gates: &[E],
    lefts: &mut [Left<'_, E>],
    rights: &mut [Right<'_, E>],
    scratch: &mut ChannelScratch<'_, E>,
    alpha: &mut [E],
) {
    let Size { rows, chunk, width, stride } = size;
    let (count, read) = (rights.len(), !lefts.is_empty());
    alpha.fill(E::from_f64(1.0));
    for (block, first) in (0..rows).step_by(BLOCK).enumerate() {
        let span = first * stride..(first + BLOCK) * stride;
        let gates = &gates[span.clone()];
        sum_rows::<E, I>((gates, stride), &mut *scratch.total);
        for left in lefts.iter_mut() {
            for products in left.products.iter_mut().take(count) {
                products[first * chunk..][..BLOCK * chunk].fill(E::ZERO);
            }
        }
        for d in (0..width).filter(|&d| read && scratch.total[d].to_f64() < -LIMIT) {
            let fades = fades_of::<E, I>(gates, (d, stride));
            for (number, right) in rights.iter().enumerate() {
                let right = &right.rows[span.clone()];
                strong_channel::<E, I>(lefts, (number, right), &fades, (d, first), &size);
            }
        }
        decays::<E, I>(scratch.total, &mut scratch.blocks[block * width..][..width]);
        for left in lefts.iter_mut() {
            fade_forwards::<E, I>(gates, (&mut left.rows[span.clone()], stride), width, left.exclusive);
        }
        for right in rights.iter_mut() {
            fade_backwards::<E, I>(gates, (&mut right.rows[span.clone()], stride), width);
        }
        for right in rights.iter_mut() {
            let columns = (&mut right.columns[first..], chunk);
            transpose::<E, I>((&right.rows[span.clone()], stride), columns, [BLOCK, width]);
        }
        for (number, right) in rights.iter().enumerate().filter(|_| read) {
            for from in (0..=block).rev() {
                next_ratio::<E, I>((block, from), scratch.blocks, scratch.total, scratch.ratio);
                scaled_block(scratch.ratio, (right.columns, scratch.columns, chunk), from);
            }
            for left in lefts.iter_mut() {
                let factors = Factors { data: &left.rows[span.start..], row: stride, step: 1 };
                let sums = (&mut left.products[number][first * chunk..], chunk);
                add_product::<E, I>(factors, Rows::new(scratch.columns, chunk), sums, [BLOCK, width, first + BLOCK]);
            }
        }
        for left in lefts.iter_mut() {
            for i in first..first + BLOCK {
                let met = left.met(i);
                for products in left.products.iter_mut().take(count) {
                    products[i * chunk..][met..first + BLOCK].fill(E::ZERO);
                }
                multiply::<E, I>(&mut left.rows[i * stride..][..width], alpha);
            }
        }
        multiply_decays::<E, I>(alpha, &scratch.blocks[block * width..][..width]);
    }
    for right in rights.iter_mut() {
        to_the_end::<E, I>(&scratch.blocks[..rows / BLOCK * width], width, scratch.ratio, (&mut *right.columns, chunk));
    }
}

/// The sum of all rows.
#[inline(always)]
pub fn sum_rows<E: Wide, I: Isa>((rows, stride): (&[E], usize), sums: &mut [E]) {
    sums.fill(E::ZERO);
    for row in rows.chunks_exact(stride) {
        add::<E, I>(sums, &row[..sums.len()]);
    }
}

/// Fades the rows of a block from its start. Sums are of the gates between, never differences of sums: what one strong gate has rounded
/// away, others would miss.
#[inline(always)]
pub fn fade_forwards<E: Wide, I: Isa>(gates: &[E], (rows, stride): (&mut [E], usize), width: usize, exclusive: bool) {
    for d in (0..width).step_by(E::V::<I>::LANES) {
        let mut sum = E::V::<I>::splat(E::ZERO);
        for i in 0..BLOCK {
            let at = i * stride + d;
            let before = sum;
            sum = sum.add(E::V::<I>::load(&gates[at..]));
            let row = &mut rows[at..];
            E::V::<I>::load(row).mul(decay::<E, I>(if exclusive { before } else { sum })).store(row);
        }
    }
}

/// Fades the rows of a block to its end.
#[inline(always)]
pub fn fade_backwards<E: Wide, I: Isa>(gates: &[E], (rows, stride): (&mut [E], usize), width: usize) {
    for d in (0..width).step_by(E::V::<I>::LANES) {
        let mut sum = E::V::<I>::splat(E::ZERO);
        for i in (0..BLOCK).rev() {
            let at = i * stride + d;
            let row = &mut rows[at..];
            E::V::<I>::load(row).mul(decay::<E, I>(sum)).store(row);
            sum = sum.add(E::V::<I>::load(&gates[at..]));
        }
    }
}

/// What a channel fades by in each row of a block.
#[inline(always)]
pub fn fades_of<E: Wide, I: Isa>(gates: &[E], (channel, stride): (usize, usize)) -> [E; BLOCK] {
    let exponents: [E; BLOCK] = std::array::from_fn(|i| gates[i * stride + channel]);
    let mut fades = exponents;
    decays::<E, I>(&exponents, &mut fades);
    fades
}

/// Adds the products of one channel of the block from row `first` on with right rows `number`, pair by pair.
#[inline(always)]
fn strong_channel<E: Wide, I: Isa>(
    lefts: &mut [Left<'_, E>],
    (number, right): (usize, &[E]),
    fades: &[E; BLOCK],
    (channel, first): (usize, usize),
    size: &Size,
) {
    // What was written, faded up to the row that reads; what is not yet written is 0.
    let mut writes = [E::ZERO; BLOCK];
    for (i, &fade) in fades.iter().enumerate() {
        let before = writes;
        fade_away::<E, I>(&mut writes, fade);
        writes[i] = right[i * size.stride + channel];
        for left in lefts.iter_mut() {
            let read = left.rows[(first + i) * size.stride + channel];
            let met = if left.exclusive { &before } else { &writes };
            add_scaled::<E, I>(&mut left.products[number][(first + i) * size.chunk + first..][..BLOCK], read, met);
        }
    }
}

/// What leads rows of block `from`, faded to its end, to the start of block `to`, where that is not more than can be brought back; from the
/// ratio of block `from + 1`.
#[inline(always)]
pub fn next_ratio<E: Wide, I: Isa>((to, from): (usize, usize), blocks: &[E], total: &[E], ratio: &mut [E]) {
    let width = ratio.len();
    if from == to {
        for (ratio, (&fade, &total)) in ratio.iter_mut().zip(blocks[to * width..].iter().zip(total)) {
            *ratio = if total.to_f64() < -LIMIT { E::ZERO } else { E::from_f64(1.0) / fade };
        }
    } else if from + 1 == to {
        ratio.fill(E::from_f64(1.0));
    } else {
        multiply_decays::<E, I>(ratio, &blocks[(from + 1) * width..][..width]);
    }
}

#[inline(always)]
fn scaled_block<E: Wide>(ratio: &[E], (columns, out, chunk): (&[E], &mut [E], usize), block: usize) {
    for (d, &ratio) in ratio.iter().enumerate() {
        let at = d * chunk + block * BLOCK;
        for (out, &x) in out[at..at + BLOCK].iter_mut().zip(&columns[at..at + BLOCK]) {
            *out = x * ratio;
        }
    }
}

/// Fades columns from the end of their blocks to the end of the last one.
#[inline(always)]
fn to_the_end<E: Wide, I: Isa>(blocks: &[E], width: usize, ratio: &mut [E], (columns, chunk): (&mut [E], usize)) {
    ratio.fill(E::from_f64(1.0));
    for block in (0..blocks.len() / width).rev() {
        for (d, &ratio) in ratio.iter().enumerate() {
            let at = d * chunk + block * BLOCK;
            scale::<E, I>(&mut columns[at..at + BLOCK], ratio);
        }
        multiply_decays::<E, I>(ratio, &blocks[block * width..][..width]);
    }
}
