//! The gradients of the decays of a chunk: from those of faded rows, of their products and of what the state fades by, to those of the
//! rows and the gates. The inverse of [`super::pairs`].
//!
//! Whatever the way it is computed, a product of rows `i >= j` is proportional to `e^{G_i - G_j}`, so that the gradient of `G_i` is the sum
//! of the rows that read times their gradients, less that of rows that are written.

use super::head::{BLOCK, MAX_CHUNK};
use super::pairs::{Gates, LIMIT, Size, fade_backwards, fade_forwards, fades_of, next_ratio, power, sum_rows};
use crate::math::elementwise::{add, add_product_of, add_scaled, decays, dot, fade_away, multiply, multiply_decays, scale, sum};
use crate::math::product::{Factors, Rows, add_product};
use crate::simd::{Isa, Routine, Wide};

/// Rows that read, and gradients.
pub struct LeftGradient<'s, E> {
    /// `[chunk, stride]`: the rows as they are.
    pub rows: &'s [E],
    /// `[chunk, stride]`: of the faded rows; then of the rows.
    pub gradient: &'s mut [E],
    /// As in the forward.
    pub exclusive: bool,
    /// `[chunk, chunk]` with each right: the products as they were in the forward; scratch afterwards.
    pub met: [&'s mut [E]; 2],
    /// `[chunk, chunk]` with each right: of the products, 0 where rows do not meet; scratch afterwards.
    pub products: [&'s mut [E]; 2],
}

/// Rows that are written, and gradients.
pub struct RightGradient<'s, E> {
    /// `[chunk, stride]`: the rows as they are.
    pub rows: &'s [E],
    /// `[chunk, stride]`: of the rows faded to the end of the chunk; then of the rows.
    pub gradient: &'s mut [E],
}

/// Scratch.
pub struct UnfadeScratch<'s, E> {
    /// `[chunk, stride]` each: what is written, faded to the end of its block.
    pub faded: [&'s mut [E]; 2],
    /// `[BLOCK, stride]` each: what reads, faded from the start of its block.
    pub readers: [&'s mut [E]; 2],
    /// `[chunk, stride]`.
    pub brought: &'s mut [E],
    /// `[chunk, stride]`.
    pub sums: &'s mut [E],
    /// `[MAX_CHUNK / BLOCK, width]`: what each block fades by.
    pub blocks: &'s mut [E],
    /// `[width]`.
    pub total: &'s mut [E],
    /// `[width]`.
    pub ratio: &'s mut [E],
}

/// Computes the gradients of rows and gates.
pub struct Unfade<'c, 's, 'w, E> {
    pub size: Size,
    pub gates: Gates<'c, E>,
    pub lefts: &'c mut [LeftGradient<'s, E>],
    pub rights: &'c mut [RightGradient<'s, E>],
    pub scratch: &'c mut UnfadeScratch<'w, E>,
    /// The gradient of what the state fades by, times that: `[width]` for gates of channels, else one number.
    pub end: &'c mut [E],
    /// Of the gates: `[chunk, stride]` for those of channels, `[chunk]` for those of steps.
    pub gate_gradient: &'c mut [E],
}

impl<E: Wide> Routine for Unfade<'_, '_, '_, E> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self) {
        let Self { size, gates, lefts, rights, scratch, end, gate_gradient } = self;
        match gates {
            Gates::None => {}
            Gates::Steps(sums) => by_step::<E, I>(size, sums, lefts, rights, (end, gate_gradient)),
            Gates::Channels(gates) => {
                by_channel::<E, I>(size, gates, lefts, rights, scratch, end);
                of_channels::<E, I>(size, lefts, rights, (end, gate_gradient));
                return;
            }
        }
        of_products::<E, I>(size, lefts, rights);
    }
}

/// Adds the gradients of products to those of their rows, where one weight belongs to each.
#[inline(always)]
fn of_products<E: Wide, I: Isa>(size: Size, lefts: &mut [LeftGradient<'_, E>], rights: &mut [RightGradient<'_, E>]) {
    let Size { rows, chunk, width, stride } = size;
    for left in lefts.iter_mut() {
        for (products, right) in left.products.iter().zip(rights.iter_mut()) {
            for first in (0..rows).step_by(BLOCK) {
                let factors = Factors { data: &products[first * chunk..], row: chunk, step: 1 };
                let gradient = (&mut left.gradient[first * stride..], stride);
                add_product::<E, I>(factors, Rows::new(right.rows, stride), gradient, [BLOCK, first + BLOCK, width]);
                let factors = Factors { data: &products[first * chunk + first..], row: 1, step: chunk };
                let gradient = (&mut right.gradient[first * stride..], stride);
                let readers = Rows::new(&left.rows[first * stride..], stride);
                add_product::<E, I>(factors, readers, gradient, [BLOCK, rows - first, width]);
            }
        }
    }
}

/// From gradients of faded rows and products to those of the rows as they are, all but what products add, and of the gates.
///
/// The gradient of a gate is the sum of all that fades across it: pairs of a row before it that is written and one behind it that reads,
/// rows behind it that read the state before the chunk, rows before it that are written to the end, and that state itself. As
/// a difference of what reads and what is written it would cancel.
#[inline(always)]
fn by_step<E: Wide, I: Isa>(
    size: Size,
    sums: &[f64; MAX_CHUNK + 1],
    lefts: &mut [LeftGradient<'_, E>],
    rights: &mut [RightGradient<'_, E>],
    (end, gate_gradient): (&[E], &mut [E]),
) {
    let Size { rows, chunk, width, stride } = size;
    let mut writes = [0.0; MAX_CHUNK + 1];
    for i in 0..rows {
        let factor = power::<E, I>(sums[rows] - sums[i + 1]);
        writes[i + 1] = writes[i];
        for right in rights.iter_mut() {
            let gradient = &mut right.gradient[i * stride..][..width];
            scale::<E, I>(gradient, factor);
            writes[i + 1] += dot::<E, I>(gradient, &right.rows[i * stride..][..width]);
        }
    }
    let (mut exponents, mut weights) = ([E::ZERO; MAX_CHUNK], [E::ZERO; MAX_CHUNK]);
    let mut reads = [0.0; MAX_CHUNK + 1];
    for i in 0..rows {
        let last = (i / BLOCK + 1) * BLOCK;
        for left in lefts.iter_mut() {
            let own = if left.exclusive { sums[i] } else { sums[i + 1] };
            for (exponent, before) in exponents[..last].iter_mut().zip(&sums[1..]) {
                *exponent = E::from_f64((own - before).min(0.0));
            }
            decays::<E, I>(&exponents[..last], &mut weights[..last]);
            let row = i * chunk..i * chunk + last;
            for (products, met) in left.products.iter_mut().zip(left.met.iter_mut()).take(rights.len()) {
                multiply::<E, I>(&mut met[row.clone()], &products[row.clone()]);
                multiply::<E, I>(&mut products[row.clone()], &weights[..last]);
            }
            let gradient = &mut left.gradient[i * stride..][..width];
            scale::<E, I>(gradient, power::<E, I>(own));
            reads[i + usize::from(!left.exclusive)] += dot::<E, I>(gradient, &left.rows[i * stride..][..width]);
        }
    }
    let mut behind = end[0].to_f64();
    let mut pairs = [E::ZERO; MAX_CHUNK];
    for i in (0..rows).rev() {
        for left in lefts.iter() {
            let reader = if left.exclusive { i + 1 } else { i };
            if reader < rows {
                let last = (reader / BLOCK + 1) * BLOCK;
                for met in left.met.iter().take(rights.len()) {
                    add::<E, I>(&mut pairs[..last], &met[reader * chunk..][..last]);
                }
            }
        }
        // Rows from this one on are not before its gate, nor before those of earlier ones.
        pairs[i..].fill(E::ZERO);
        behind += reads[i + 1];
        gate_gradient[i] = E::from_f64(behind + writes[i] + sum::<E, I>(&pairs[..i.next_multiple_of(BLOCK)]));
    }
}

/// The gradients of gates of channels.
#[inline(always)]
fn of_channels<E: Wide, I: Isa>(
    size: Size,
    lefts: &[LeftGradient<'_, E>],
    rights: &[RightGradient<'_, E>],
    (end, gate_gradient): (&mut [E], &mut [E]),
) {
    let Size { rows, width, stride, .. } = size;
    // From the last row on, `end` is the gradient of the sum of the gates up to a row.
    for i in (0..rows).rev() {
        let at = |i: usize| i * stride..i * stride + width;
        for right in rights {
            add_product_of::<E, I>(end, &right.rows[at(i)], &right.gradient[at(i)], E::from_f64(-1.0));
        }
        for left in lefts {
            let reader = if left.exclusive { i + 1 } else { i };
            if reader < rows {
                add_product_of::<E, I>(end, &left.rows[at(reader)], &left.gradient[at(reader)], E::from_f64(1.0));
            }
        }
        gate_gradient[at(i)].copy_from_slice(end);
    }
}

#[inline(always)]
fn by_channel<E: Wide, I: Isa>(
    size: Size,
    gates: &[E],
    lefts: &mut [LeftGradient<'_, E>],
    rights: &mut [RightGradient<'_, E>],
    scratch: &mut UnfadeScratch<'_, E>,
    end: &mut [E],
) {
    let Size { rows, chunk, width, stride } = size;
    let one = E::from_f64(1.0);
    for (block, first) in (0..rows).step_by(BLOCK).enumerate() {
        sum_rows::<E, I>((&gates[first * stride..(first + BLOCK) * stride], stride), scratch.total);
        decays::<E, I>(scratch.total, &mut scratch.blocks[block * width..][..width]);
    }
    within_blocks::<E, I>(size, gates, lefts, rights, scratch, end);
    for (block, first) in (0..rows).step_by(BLOCK).enumerate() {
        let here = &gates[first * stride..(first + BLOCK) * stride];
        sum_rows::<E, I>((here, stride), scratch.total);
        for (left, readers) in lefts.iter().zip(scratch.readers.iter_mut()) {
            readers.copy_from_slice(&left.rows[first * stride..(first + BLOCK) * stride]);
            fade_forwards::<E, I>(here, (readers, stride), width, left.exclusive);
        }
        for (number, right) in rights.iter_mut().enumerate() {
            // What is written, at the start of this block.
            for from in (0..=block).rev() {
                next_ratio::<E, I>((block, from), scratch.blocks, scratch.total, scratch.ratio);
                for i in from * BLOCK..(from + 1) * BLOCK {
                    let row = &mut scratch.brought[i * stride..][..width];
                    row.copy_from_slice(&scratch.faded[number][i * stride..][..width]);
                    multiply::<E, I>(row, scratch.ratio);
                }
            }
            scratch.sums[..(first + BLOCK) * stride].fill(E::ZERO);
            for (left, readers) in lefts.iter_mut().zip(scratch.readers.iter()) {
                let products = &left.products[number][first * chunk..];
                let factors = Factors { data: products, row: chunk, step: 1 };
                let gradient = (&mut left.gradient[first * stride..], stride);
                add_product::<E, I>(factors, Rows::new(scratch.brought, stride), gradient, [BLOCK, first + BLOCK, width]);
                let factors = Factors { data: products, row: 1, step: chunk };
                let sums = (&mut *scratch.sums, stride);
                add_product::<E, I>(factors, Rows::new(readers, stride), sums, [first + BLOCK, BLOCK, width]);
            }
            for from in (0..=block).rev() {
                next_ratio::<E, I>((block, from), scratch.blocks, scratch.total, scratch.ratio);
                for i in from * BLOCK..(from + 1) * BLOCK {
                    let at = i * stride..i * stride + width;
                    add_product_of::<E, I>(&mut right.gradient[at.clone()], &scratch.sums[at], scratch.ratio, one);
                }
            }
        }
    }
    for first in (0..rows).step_by(BLOCK) {
        let here = &gates[first * stride..(first + BLOCK) * stride];
        for left in lefts.iter_mut() {
            fade_forwards::<E, I>(here, (&mut left.gradient[first * stride..], stride), width, left.exclusive);
        }
        for right in rights.iter_mut() {
            fade_backwards::<E, I>(here, (&mut right.gradient[first * stride..], stride), width);
        }
        sum_rows::<E, I>((here, stride), scratch.total);
        for d in (0..width).filter(|&d| scratch.total[d].to_f64() < -LIMIT) {
            let fades = fades_of::<E, I>(here, (d, stride));
            for (number, right) in rights.iter_mut().enumerate() {
                strong_channel::<E, I>(lefts, (number, right), &fades, (d, first), &size);
            }
        }
    }
}

/// From gradients of rows that are faded from the start, or to the end, of the chunk to those within their own block. Adds to `end`, and
/// leaves the rows that are written, faded to the end of their block.
#[inline(always)]
fn within_blocks<E: Wide, I: Isa>(
    size: Size,
    gates: &[E],
    lefts: &mut [LeftGradient<'_, E>],
    rights: &mut [RightGradient<'_, E>],
    scratch: &mut UnfadeScratch<'_, E>,
    end: &mut [E],
) {
    let Size { rows, width, stride, .. } = size;
    let one = E::from_f64(1.0);
    scratch.ratio.fill(one);
    for (block, first) in (0..rows).step_by(BLOCK).enumerate() {
        for left in lefts.iter_mut() {
            for i in first..first + BLOCK {
                multiply::<E, I>(&mut left.gradient[i * stride..][..width], scratch.ratio);
            }
        }
        multiply_decays::<E, I>(scratch.ratio, &scratch.blocks[block * width..][..width]);
    }
    for (right, faded) in rights.iter_mut().zip(scratch.faded.iter_mut()) {
        faded[..rows * stride].copy_from_slice(&right.rows[..rows * stride]);
        scratch.ratio.fill(one);
        for (block, first) in (0..rows).step_by(BLOCK).enumerate().rev() {
            let here = &gates[first * stride..(first + BLOCK) * stride];
            fade_backwards::<E, I>(here, (&mut faded[first * stride..], stride), width);
            for i in first..first + BLOCK {
                let gradient = &mut right.gradient[i * stride..][..width];
                multiply::<E, I>(gradient, scratch.ratio);
                add_product_of::<E, I>(end, gradient, &faded[i * stride..][..width], one);
            }
            multiply_decays::<E, I>(scratch.ratio, &scratch.blocks[block * width..][..width]);
        }
    }
}

/// Adds the gradients of one channel of the block from row `first` on, pair by pair.
#[inline(always)]
fn strong_channel<E: Wide, I: Isa>(
    lefts: &mut [LeftGradient<'_, E>],
    (number, right): (usize, &mut RightGradient<'_, E>),
    fades: &[E; BLOCK],
    (channel, first): (usize, usize),
    size: &Size,
) {
    let at = |i: usize| (first + i) * size.stride + channel;
    let written: [E; BLOCK] = std::array::from_fn(|i| right.rows[at(i)]);
    let (mut weights, mut sums) = ([E::ZERO; BLOCK], [E::ZERO; BLOCK]);
    for (i, &fade) in fades.iter().enumerate() {
        let before = weights;
        fade_away::<E, I>(&mut weights, fade);
        weights[i] = E::from_f64(1.0);
        for left in lefts.iter_mut() {
            let mut terms = if left.exclusive { before } else { weights };
            multiply::<E, I>(&mut terms, &left.products[number][(first + i) * size.chunk + first..][..BLOCK]);
            add_scaled::<E, I>(&mut sums, left.rows[at(i)], &terms);
            let mut gradient = left.gradient[at(i)];
            for (&term, &written) in terms.iter().zip(&written) {
                gradient = gradient + term * written;
            }
            left.gradient[at(i)] = gradient;
        }
    }
    for (i, &sum) in sums.iter().enumerate() {
        right.gradient[at(i)] = right.gradient[at(i)] + sum;
    }
}
