//! Takes a chunk apart: from the gradients of its outputs and of the state behind it, to those of its inputs and of the state before it.
//!
//! With `dS` the gradient of the state behind a chunk, `K` its written rows faded to its end, `P` the products of its queries with them:
//!
//! ```text
//! dU = P^T dO + K dS                  dP = dO U^T            dK = U dS^T           dQ = dO S^T
//! f  = dU - A^T (beta f)              dA = -beta f U^T       dbeta_i = f_i . u_i / beta_i       dv = beta f        (delta rule)
//! dS = e^{G_C} dS + Q^T dO - (K e^G)^T (beta f)
//! ```
//!
//! where `Q` and `K e^G` are the rows that read the state. `unfade.rs` makes of the gradients of faded rows and products those of
//! rows and gates.

use super::backward::{BackwardArgs, Gradients};
use super::gradient_buffers::{Work, columns_stride};
use super::head::{Chunk, Head, MAX_CHUNK};
use super::pairs::{Left, Size};
use super::unfade::{LeftGradient, RightGradient, Unfade};
use super::{BLOCK, Decay, Rule};
use crate::dtype::{Element, Float};
use crate::math::elementwise::{add, add_scaled, dot, dot_rows, scale, transpose};
use crate::math::load::store_scaled;
use crate::math::product::{Factors, Product, ROW_STEP, Rows, Start, add_product, set_product};
use crate::math::triangular::substitute_transposed;
use crate::simd::{Isa, SimdElement, Wide};

/// What chunks of a sequence are taken apart with.
pub struct Apart<'a, T: Element> {
    pub args: &'a BackwardArgs<'a, T>,
    pub gradients: &'a Gradients<'a, T>,
    /// Of the sequence.
    pub number: usize,
}

impl<T: SimdElement> Apart<'_, T>
where
    T::Acc: Wide,
{
    /// Takes a chunk of a value head apart: `d_state` is of the state behind it, and becomes that of the state before it.
    #[inline(always)]
    pub fn take<I: Isa>(
        &self,
        head: &Head<'_, T>,
        is_first: bool,
        (state, d_state): (&[T::Acc], &mut [T::Acc]),
        (chunk, work): (&mut Chunk<'_, T::Acc>, &mut Work<'_, T::Acc>),
    ) {
        let Size { rows, stride, .. } = head.size;
        let [lefts, rights] = chunk.counts;
        head.load_keys::<I>(chunk);
        head.load_readers::<I>(chunk);
        for (raw, left) in work.lefts.iter_mut().zip(&chunk.lefts[..lefts]) {
            raw[..rows * stride].copy_from_slice(&left.rows[..rows * stride]);
        }
        for (raw, right) in work.rights.iter_mut().zip(&chunk.rights[..rights]) {
            raw[..rows * stride].copy_from_slice(&right.rows[..rows * stride]);
        }
        head.fade::<I>(chunk, true);
        head.recall::<I>(self.args.kept, chunk);
        head.load_values::<I>(self.args.d_out, work.d_out);

        head.prefetch(&self.gradients.v, head.index);
        for rows in [&self.gradients.q, &self.gradients.k] {
            head.prefetch(rows, head.args.shape.head_of(head.index));
        }
        of_written::<T, I>(head, d_state, chunk, work);
        of_alpha::<T, I>(head, (state, d_state), chunk, work.end);
        self.of_rule::<I>(head, (chunk, work));
        of_readers::<T, I>(head, (state, d_state), chunk, work);
        unfade::<T, I>(head, chunk, work);
        self.write_own::<I>(head, chunk, work);
        let delta = matches!(self.args.forward.rule, Rule::Delta(_));
        if delta {
            add::<T::Acc, I>(&mut work.d_rights[0][..rows * stride], &work.d_lefts[1][..rows * stride]);
        }
        let own = [&*work.d_lefts[0], &*work.d_rights[0], &*work.d_lefts[1], &*work.d_rights[1]];
        let count = if rights > 1 { 4 } else { 2 };
        for (total, own) in work.totals.iter_mut().zip(own).take(count) {
            if is_first {
                total[..rows * stride].copy_from_slice(&own[..rows * stride]);
            } else {
                add::<T::Acc, I>(&mut total[..rows * stride], &own[..rows * stride]);
            }
        }
    }

    /// What the rule makes of the gradients of what is written; leaves those of its readings in `chunk.sums`.
    #[inline(always)]
    fn of_rule<I: Isa>(&self, head: &Head<'_, T>, (chunk, work): (&mut Chunk<'_, T::Acc>, &mut Work<'_, T::Acc>)) {
        let (Size { rows, chunk: row, .. }, stride_v, width_v) = (head.size, head.stride_v, head.width_v);
        match &self.args.forward.rule {
            Rule::Additive(_) => {}
            Rule::Delta(_) => {
                // The system of the forward had a factor for each column, this one has one for each row.
                for i in 0..rows {
                    let system = &mut chunk.system[i * row..][..rows];
                    system.copy_from_slice(&chunk.lefts[1].products[0][i * row..][..rows]);
                    scale::<T::Acc, I>(system, T::Acc::ZERO - chunk.betas[i]);
                }
                substitute_transposed::<T::Acc, I>((chunk.system, row), (work.d_written[0], stride_v), [rows, width_v]);
                // Readings were subtracted: -beta f.
                chunk.sums[..rows * stride_v].copy_from_slice(&work.d_written[0][..rows * stride_v]);
                for i in 0..rows {
                    let factor = T::Acc::ZERO - chunk.betas[i];
                    scale::<T::Acc, I>(&mut chunk.sums[i * stride_v..][..width_v], factor);
                }
                products_of::<T, I>(head, (chunk.sums, &*work.written), true, work.d_products[1][0]);
            }
            Rule::LowRank { .. } => {
                let system = (&*chunk.lefts[1].products[1], row);
                substitute_transposed::<T::Acc, I>(system, (work.d_written[1], stride_v), [rows, width_v]);
                chunk.sums[..rows * stride_v].copy_from_slice(&work.d_written[1][..rows * stride_v]);
                products_of::<T, I>(head, (chunk.sums, &work.written[row..]), true, work.d_products[1][1]);
                products_of::<T, I>(head, (chunk.sums, &*work.written), true, work.d_products[1][0]);
                add_met_transposed::<T, I>(head, chunk.lefts[1].products[0], chunk.sums, work.d_written[0]);
            }
        }
    }

    /// Writes the gradients of what each value head has of its own.
    #[inline(always)]
    fn write_own<I: Isa>(&self, head: &Head<'_, T>, chunk: &mut Chunk<'_, T::Acc>, work: &mut Work<'_, T::Acc>) {
        let (Size { stride, .. }, stride_v, width_v) = (head.size, head.stride_v, head.width_v);
        let args = &self.args.forward;
        let by_channel = matches!(args.decay, Decay::Channels(_));
        let mut bonus = vec![0.0; if args.bonus.is_some() { args.shape.head_dim } else { 0 }];
        for i in 0..head.count {
            let (batch, token) = (head.sequence.batch, head.sequence.first + head.first + i);
            let at = i * stride_v..i * stride_v + width_v;
            let d_written = &mut work.d_written[0][at.clone()];
            if let Some(u) = args.bonus {
                let d_out = &work.d_out[at.clone()];
                add_scaled::<T::Acc, I>(d_written, chunk.bonus[i], d_out);
                let of_bonus = T::Acc::from_f64(dot::<T::Acc, I>(d_out, &chunk.written[at.clone()]));
                let u = &u[args.shape.head_of(head.index) * args.shape.head_dim..][..args.shape.head_dim];
                for (d, &u) in u.iter().enumerate() {
                    let (query, key) = (work.lefts[0][i * stride + d], work.rights[0][i * stride + d]);
                    bonus[d] += of_bonus.to_f64() * query.to_f64() * key.to_f64();
                    let factor = of_bonus * T::Acc::from_f64(u);
                    work.d_lefts[0][i * stride + d] = work.d_lefts[0][i * stride + d] + factor * key;
                    work.d_rights[0][i * stride + d] = work.d_rights[0][i * stride + d] + factor * query;
                }
            }
            if let Some(beta) = &self.gradients.beta {
                beta.row(batch, token, head.index)[0] = T::Acc::from_f64(dot::<T::Acc, I>(d_written, &chunk.extra[at]));
            }
            let values = &self.gradients.v;
            store_scaled::<T, I>(d_written, chunk.betas[i], values.row(batch, token, head.index), values.passes_caches());
            if let Some(gates) = &self.gradients.gates {
                let row = gates.row(batch, token, head.index);
                let at = if by_channel { i * stride } else { i };
                row.copy_from_slice(&work.gates[at..at + row.len()]);
            }
        }
        if let Some(row) =
            self.gradients.bonus.as_ref().map(|bonus| bonus.row(self.number, head.index, head.first / head.size.chunk))
        {
            for (out, x) in row.iter_mut().zip(&bonus) {
                *out = T::Acc::from_f64(*x);
            }
        }
    }
}

fn of_left<'w, E>(
    rows: &'w [E],
    gradient: &'w mut [E],
    left: &'w mut Left<'_, E>,
    products: [&'w mut [E]; 2],
) -> LeftGradient<'w, E> {
    let [first, second] = &mut left.products;
    LeftGradient { rows, gradient, exclusive: left.exclusive, met: [first, second], products }
}

/// Makes gradients of faded rows and products those of rows and gates.
#[inline(always)]
fn unfade<T: SimdElement, I: Isa>(head: &Head<'_, T>, chunk: &mut Chunk<'_, T::Acc>, work: &mut Work<'_, T::Acc>)
where
    T::Acc: Wide,
{
    let [lefts, rights] = chunk.counts;
    let mut sums = [0.0; MAX_CHUNK + 1];
    let gates = head.gates::<I>(&mut sums, chunk.gates);
    let [first, second] = &mut work.d_lefts;
    let [of_first, of_second] = &mut work.d_products;
    let [a, b] = of_first;
    let [c, d] = of_second;
    let [queries, readers] = &mut chunk.lefts;
    let mut left = [of_left(&*work.lefts[0], first, queries, [a, b]), of_left(&*work.lefts[1], second, readers, [c, d])];
    let [first, second] = &mut work.d_rights;
    let mut right =
        [RightGradient { rows: &*work.rights[0], gradient: first }, RightGradient { rows: &*work.rights[1], gradient: second }];
    I::call(Unfade {
        size: head.size,
        gates,
        lefts: &mut left[..lefts],
        rights: &mut right[..rights],
        scratch: &mut work.unfade,
        end: work.end,
        gate_gradient: work.gates,
    });
}

/// Gradients of what is written, of the products of the queries, and of written rows faded to the end; from those of the outputs and of the
/// state behind the chunk.
#[inline(always)]
fn of_written<T: SimdElement, I: Isa>(
    head: &Head<'_, T>,
    d_state: &[T::Acc],
    chunk: &mut Chunk<'_, T::Acc>,
    work: &mut Work<'_, T::Acc>,
) where
    T::Acc: Wide,
{
    let (Size { rows, chunk: row, .. }, stride_v, width_v) = (head.size, head.stride_v, head.width_v);
    let head_dim = head.args.shape.head_dim;
    let rights = chunk.counts[1];
    let written = [&*chunk.written, &*chunk.extra];
    through_state::<T, I>(head, d_state, &written[..rights], (work.written, work.columns), &mut work.d_rights);
    for (i, right) in chunk.rights[..rights].iter().enumerate() {
        let columns = &work.written[i * row..];
        products_of::<T, I>(head, (work.d_out, columns), chunk.lefts[0].strict, work.d_products[0][i]);
        let sums = &mut *work.d_written[i];
        let factors = Factors { data: right.columns, row: 1, step: row };
        set_product::<T::Acc, I>(factors, Rows::new(d_state, stride_v), (sums, stride_v), [rows, head_dim, width_v]);
        add_met_transposed::<T, I>(head, chunk.lefts[0].products[i], work.d_out, sums);
    }
}

/// Rows of values times a state, into rows of keys. The transposed rows, side by side, are left in the first scratch.
///
/// The state is a factor: it is gone through once, and what is transposed are the rows on both sides of it.
#[inline(always)]
fn through_state<T: SimdElement, I: Isa>(
    head: &Head<'_, T>,
    state: &[T::Acc],
    rows: &[&[T::Acc]],
    (transposed, columns): (&mut [T::Acc], &mut [T::Acc]),
    into: &mut [&mut [T::Acc]; 2],
) where
    T::Acc: Wide,
{
    let (Size { rows: count, chunk, width, stride }, stride_v, width_v) = (head.size, head.stride_v, head.width_v);
    let row = columns_stride(chunk);
    for (i, rows) in rows.iter().enumerate() {
        transpose::<T::Acc, I>((rows, stride_v), (&mut transposed[i * chunk..], row), [count, width_v]);
    }
    let depth = head.args.shape.head_dim_v;
    for i in 0..rows.len() {
        let factors = Factors { data: state, row: stride_v, step: 1 };
        let matrix = Rows::new(&transposed[i * chunk..], row);
        let size = [head.args.shape.head_dim.next_multiple_of(ROW_STEP), depth, count];
        set_product::<T::Acc, I>(factors, matrix, (&mut columns[i * chunk..], row), size);
    }
    for (i, into) in into.iter_mut().enumerate().take(rows.len()) {
        transpose::<T::Acc, I>((&columns[i * chunk..], row), (into, stride), [width, count]);
    }
}

/// The gradient of what the state fades by, times that: for each channel, or for all in the first place.
#[inline(always)]
fn of_alpha<T: SimdElement, I: Isa>(
    head: &Head<'_, T>,
    (state, d_state): (&[T::Acc], &[T::Acc]),
    chunk: &Chunk<'_, T::Acc>,
    end: &mut [T::Acc],
) where
    T::Acc: Wide,
{
    match head.args.decay {
        Decay::None => {}
        Decay::Heads(_) | Decay::Steps(_) => {
            end[0] = T::Acc::from_f64(dot_rows::<T::Acc, I>(
                [state, d_state],
                head.stride_v,
                [head.args.shape.head_dim, head.width_v],
            )) * chunk.alpha[0];
        }
        Decay::Channels(_) => {
            for (d, end) in end.iter_mut().enumerate() {
                let at = d * head.stride_v..d * head.stride_v + head.width_v;
                *end = T::Acc::from_f64(dot::<T::Acc, I>(&state[at.clone()], &d_state[at])) * chunk.alpha[d];
            }
        }
    }
}

/// Gradients of the rows that read the state, from those of what they read; makes that of the state behind the chunk that of the one
/// before it.
#[inline(always)]
fn of_readers<T: SimdElement, I: Isa>(
    head: &Head<'_, T>,
    (state, d_state): (&[T::Acc], &mut [T::Acc]),
    chunk: &Chunk<'_, T::Acc>,
    work: &mut Work<'_, T::Acc>,
) where
    T::Acc: Wide,
{
    let (Size { rows, stride, .. }, stride_v, width_v) = (head.size, head.stride_v, head.width_v);
    let read = [&*work.d_out, &*chunk.sums];
    let read = &read[..chunk.counts[0]];
    through_state::<T, I>(head, state, read, (work.read, work.columns), &mut work.d_lefts);
    let mut start = Start::Faded(chunk.alpha);
    for (left, read) in chunk.lefts.iter().zip(read) {
        let factors = Factors { data: left.rows, row: 1, step: stride };
        I::call(Product::<T::Acc> {
            start: std::mem::replace(&mut start, Start::Sums),
            matrix: Rows::new(read, stride_v),
            results: &mut [(factors, &mut *d_state)],
            stride: stride_v,
            size: [head.args.shape.head_dim.next_multiple_of(ROW_STEP), rows, width_v],
        });
    }
}

/// Gradients of products, 0 where rows do not meet. What is written is transposed.
#[inline(always)]
fn products_of<T: SimdElement, I: Isa>(
    head: &Head<'_, T>,
    (d_sums, written): (&[T::Acc], &[T::Acc]),
    strict: bool,
    into: &mut [T::Acc],
) where
    T::Acc: Wide,
{
    let Size { rows, chunk, .. } = head.size;
    for first in (0..rows).step_by(BLOCK) {
        let products = &mut into[first * chunk..];
        let factors = Factors { data: &d_sums[first * head.stride_v..], row: head.stride_v, step: 1 };
        let size = [BLOCK, head.width_v, first + BLOCK];
        let written = Rows::new(written, columns_stride(chunk));
        set_product::<T::Acc, I>(factors, written, (&mut *products, chunk), size);
        for i in 0..BLOCK {
            let met = first + i + usize::from(!strict);
            products[i * chunk..][met..first + BLOCK].fill(T::Acc::ZERO);
        }
    }
}

/// Adds to what is written in each row what the rows that meet it have.
#[inline(always)]
fn add_met_transposed<T: SimdElement, I: Isa>(
    head: &Head<'_, T>,
    products: &[T::Acc],
    rows_that_meet: &[T::Acc],
    sums: &mut [T::Acc],
) where
    T::Acc: Wide,
{
    let (Size { rows, chunk, .. }, stride_v) = (head.size, head.stride_v);
    for first in (0..rows).step_by(BLOCK) {
        let factors = Factors { data: &products[first * chunk + first..], row: 1, step: chunk };
        let matrix = Rows::new(&rows_that_meet[first * stride_v..], stride_v);
        let sums = (&mut sums[first * stride_v..], stride_v);
        add_product::<T::Acc, I>(factors, matrix, sums, [BLOCK, rows - first, head.width_v]);
    }
}
