//! The backward of the chunk form: a sweep forwards that keeps the state before each chunk, and one backwards that takes each chunk apart
//! again.
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
//! rows and gates. Heads of values that share a head of queries and keys take turns, and their gradients are summed in order.

use super::gradient_buffers::{Work, work_len};
use super::head::{Chunk, Head, MAX_CHUNK, chunk_len};
use super::pairs::Size;
use super::rows::HeadRows;
use super::unfade::{LeftGradient, RightGradient, Unfade};
use super::{BLOCK, Decay, Numbers, RecurrentArgs, Rule};
use crate::dtype::{Element, Float};
use crate::math::elementwise::{add, add_scaled, dot, scale, sum, transpose};
use crate::math::load::store_scaled;
use crate::math::product::{Factors, ROW_STEP, Rows, add_product};
use crate::math::triangular::substitute_transposed;
use crate::parallel::{RowWriter, for_each_tile};
use crate::simd::{Isa, Level, SimdElement, Task, Wide};
use crate::tensor::Tensor;
use crate::workspace::{Scratch, carve};

/// A call, its gradients from outside, and where its own go.
pub struct BackwardArgs<'a, T: Element> {
    /// The call.
    pub forward: RecurrentArgs<'a, T>,
    /// The states before the first token, `[N, HV, 1, K * V]`, if there are any.
    pub initial: Option<Numbers<'a, T>>,
    /// Of the outputs, `[B, T, HV, V]`.
    pub d_out: Tensor<'a, T>,
    /// Of the states after the last token, if anything depends on them.
    pub d_last: Option<Numbers<'a, T>>,
}

/// Gradients. What is not there is not written.
pub struct Gradients<'a, T: Element> {
    /// `[B, T, H, K]`.
    pub q: RowWriter<'a, T>,
    /// `[B, T, H, K]`.
    pub k: RowWriter<'a, T>,
    /// `[B, T, HV, V]`.
    pub v: RowWriter<'a, T>,
    /// `[B, T, HV, 1]` for gates of heads and steps, `[B, T, HV, K]` for those of channels.
    pub gates: Option<RowWriter<'a, T::Acc>>,
    /// `[B, T, HV, 1]`.
    pub beta: Option<RowWriter<'a, T::Acc>>,
    /// Of `a` and `b`, `[B, T, H, K]`.
    pub low_rank: Option<[RowWriter<'a, T>; 2]>,
    /// For each sequence and chunk, `[N, HV, chunks, K]`.
    pub bonus: Option<RowWriter<'a, T::Acc>>,
    /// `[N, HV, 1, K * V]`.
    pub initial: Option<RowWriter<'a, T::Acc>>,
}

struct Sequences<'a, T: Element> {
    args: &'a BackwardArgs<'a, T>,
    gradients: &'a Gradients<'a, T>,
    chunk: usize,
}

/// Computes all gradients with up to `threads` threads. Results do not depend on how many.
pub fn backward<T: SimdElement>(
    args: &BackwardArgs<'_, T>,
    gradients: &Gradients<'_, T>,
    chunk: usize,
    level: Level,
    threads: usize,
) where
    T::Acc: Wide,
{
    let tasks = args.forward.sequences.len() * args.forward.shape.num_heads;
    for_each_tile(level, threads, tasks, &Sequences { args, gradients, chunk });
}

impl<T: SimdElement> Task for Sequences<'_, T>
where
    T::Acc: Wide,
{
    const MULTIPLIES_BF16: bool = false;

    #[inline(always)]
    fn run<I: Isa>(&self, index: usize) {
        let args = &self.args.forward;
        let shape = &args.shape;
        let (number, of) = (index / shape.num_heads, index % shape.num_heads);
        let group = shape.num_value_heads / shape.num_heads.max(1);
        let sequence = args.sequences[number];
        let start = Head::new(args, sequence, of * group, self.chunk);
        let (len, chunks) = (start.state_len(), sequence.len.div_ceil(self.chunk));
        let flat = shape.head_dim * shape.head_dim_v;
        // The state before each chunk, and that after the last one, of each head of the group.
        let mut states = vec![T::Acc::ZERO; group * (chunks + 1) * len];
        let mut d_states = vec![T::Acc::ZERO; group * len];
        let mut scratch = Scratch::take::<T::Acc>(chunk_len(args, self.chunk) + work_len(&start) + flat);
        let mut rest = scratch.as_mut_slice::<T::Acc>();
        let flat = carve(&mut rest, flat);
        let mut chunk = Chunk::carve(&start, &mut rest);
        let mut work = Work::carve(&start, &mut rest);
        for member in 0..group {
            let head = of * group + member;
            let states = &mut states[member * (chunks + 1) * len..][..(chunks + 1) * len];
            load_state(self.args.initial.as_ref(), (number, head), flat, (states, start.stride_v), shape.head_dim_v);
            load_state(
                self.args.d_last.as_ref(),
                (number, head),
                flat,
                (&mut d_states[member * len..][..len], start.stride_v),
                shape.head_dim_v,
            );
            for i in 0..chunks {
                let at = Head { index: head, ..start.at(i * self.chunk) };
                let (before, after) = states[i * len..(i + 2) * len].split_at_mut(len);
                at.load_rows::<I>(&mut chunk, false);
                at.fade::<I>(&mut chunk, false);
                at.solve::<I>(before, &mut chunk);
                after.copy_from_slice(before);
                at.update::<I>(&chunk, after);
            }
        }
        for i in (0..chunks).rev() {
            for member in 0..group {
                let head = Head { index: of * group + member, ..start.at(i * self.chunk) };
                let state = &states[(member * (chunks + 1) + i) * len..][..len];
                let d_state = &mut d_states[member * len..][..len];
                self.chunk::<I>(&head, member == 0, number, (state, d_state), (&mut chunk, &mut work));
            }
            self.write_shared::<I>(&start.at(i * self.chunk), &work);
        }
        if let Some(initial) = &self.gradients.initial {
            for member in 0..group {
                let row = initial.row(number, of * group + member, 0);
                let d_state = &d_states[member * len..][..len];
                for (row, state) in row.chunks_exact_mut(shape.head_dim_v.max(1)).zip(d_state.chunks_exact(start.stride_v)) {
                    row.copy_from_slice(&state[..row.len()]);
                }
            }
        }
    }
}

fn load_state<T: Element>(
    from: Option<&Numbers<'_, T>>,
    (number, head): (usize, usize),
    flat: &mut [T::Acc],
    (rows, stride): (&mut [T::Acc], usize),
    width: usize,
) {
    if let Some(from) = from {
        from.read(number, head, 0, flat);
        for (row, out) in flat.chunks_exact(width.max(1)).zip(rows.chunks_exact_mut(stride)) {
            out[..width].copy_from_slice(row);
        }
    }
}

impl<T: SimdElement> Sequences<'_, T>
where
    T::Acc: Wide,
{
    /// Takes a chunk of a value head apart: `d_state` is of the state behind it, and becomes that of the state before it.
    #[inline(always)]
    fn chunk<I: Isa>(
        &self,
        head: &Head<'_, T>,
        is_first: bool,
        number: usize,
        (state, d_state): (&[T::Acc], &mut [T::Acc]),
        (chunk, work): (&mut Chunk<'_, T::Acc>, &mut Work<'_, T::Acc>),
    ) {
        let Size { rows, width, stride, .. } = head.size;
        let [lefts, rights] = chunk.counts;
        head.load_rows::<I>(chunk, true);
        for i in 0..lefts {
            work.lefts[i][..rows * stride].copy_from_slice(&chunk.lefts[i].rows[..rows * stride]);
        }
        for i in 0..rights {
            work.rights[i][..rows * stride].copy_from_slice(&chunk.rights[i].rows[..rows * stride]);
        }
        work.values[..rows * head.stride_v].copy_from_slice(&chunk.written[..rows * head.stride_v]);
        head.fade::<I>(chunk, true);
        head.solve::<I>(state, chunk);
        head.load_values::<I>(self.args.d_out, work.d_out);

        of_written::<T, I>(head, d_state, chunk, work);
        of_alpha::<T, I>(head, (state, d_state), chunk, work.end);
        // Now of the state before the chunk.
        for (d, row) in d_state.chunks_exact_mut(head.stride_v).enumerate().take(width) {
            scale::<T::Acc, I>(&mut row[..head.width_v], chunk.alpha[d]);
        }
        self.of_rule::<I>(head, state, (chunk, work));
        of_readers::<T, I>(head, (state, d_state), 0, chunk, work);
        if lefts > 1 {
            of_readers::<T, I>(head, (state, d_state), 1, chunk, work);
        }
        unfade::<T, I>(head, chunk, work);
        self.write_own::<I>(head, number, chunk, work);
        let own = [&*work.d_lefts[0], &*work.d_rights[0], &*work.d_lefts[1], &*work.d_rights[1]];
        let delta = matches!(self.args.forward.rule, Rule::Delta(_));
        for (i, (total, own)) in work.totals.iter_mut().zip(own).enumerate() {
            if (i == 2 && (lefts < 2 || delta)) || (i == 3 && rights < 2) {
                continue;
            }
            if is_first {
                total[..rows * stride].fill(T::Acc::ZERO);
            }
            add::<T::Acc, I>(&mut total[..rows * stride], &own[..rows * stride]);
        }
        if delta {
            add::<T::Acc, I>(&mut work.totals[1][..rows * stride], &work.d_lefts[1][..rows * stride]);
        }
    }

    /// What the rule makes of the gradients of what is written; leaves those of its readings in `chunk.sums`.
    #[inline(always)]
    fn of_rule<I: Isa>(
        &self,
        head: &Head<'_, T>,
        _state: &[T::Acc],
        (chunk, work): (&mut Chunk<'_, T::Acc>, &mut Work<'_, T::Acc>),
    ) {
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
                products_of::<T, I>(head, (chunk.sums, work.written[0]), true, work.d_products[1][0]);
            }
            Rule::LowRank { .. } => {
                let system = (&*chunk.lefts[1].products[1], row);
                substitute_transposed::<T::Acc, I>(system, (work.d_written[1], stride_v), [rows, width_v]);
                chunk.sums[..rows * stride_v].copy_from_slice(&work.d_written[1][..rows * stride_v]);
                products_of::<T, I>(head, (chunk.sums, work.written[1]), true, work.d_products[1][1]);
                products_of::<T, I>(head, (chunk.sums, work.written[0]), true, work.d_products[1][0]);
                add_met_transposed::<T, I>(head, chunk.lefts[1].products[0], chunk.sums, work.d_written[0]);
            }
        }
    }

    /// Writes the gradients of what each value head has of its own.
    #[inline(always)]
    fn write_own<I: Isa>(&self, head: &Head<'_, T>, number: usize, chunk: &mut Chunk<'_, T::Acc>, work: &mut Work<'_, T::Acc>) {
        let (Size { width, stride, .. }, stride_v, width_v) = (head.size, head.stride_v, head.width_v);
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
                let before = if matches!(args.rule, Rule::Delta(_)) { &*chunk.extra } else { &*work.values };
                beta.row(batch, token, head.index)[0] = T::Acc::from_f64(dot::<T::Acc, I>(d_written, &before[at.clone()]));
            }
            store_scaled::<T, I>(d_written, chunk.betas[i], self.gradients.v.row(batch, token, head.index));
            if let Some(gates) = &self.gradients.gates {
                let (row, found) = (gates.row(batch, token, head.index), &work.gates[i * stride..][..width]);
                if by_channel {
                    row.copy_from_slice(&found[..row.len()]);
                } else {
                    row[0] = T::Acc::from_f64(sum::<T::Acc, I>(found));
                }
            }
        }
        if let Some(row) = self.gradients.bonus.as_ref().map(|bonus| bonus.row(number, head.index, head.first / head.size.chunk))
        {
            for (out, x) in row.iter_mut().zip(&bonus) {
                *out = T::Acc::from_f64(*x);
            }
        }
    }

    /// Writes the gradients of the rows that value heads share.
    #[inline(always)]
    fn write_shared<I: Isa>(&self, head: &Head<'_, T>, work: &Work<'_, T::Acc>) {
        let args = &self.args.forward;
        let [queries, keys, readers, others] = &work.totals;
        write::<T, I>(head, args.queries(head.index), queries, &self.gradients.q);
        write::<T, I>(head, args.keys(head.index), keys, &self.gradients.k);
        if let (Rule::LowRank { a, b }, Some([d_a, d_b])) = (&args.rule, &self.gradients.low_rank) {
            write::<T, I>(head, args.plain(*a, head.index), readers, d_a);
            write::<T, I>(head, args.plain(*b, head.index), others, d_b);
        }
    }
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
    let mut left = [
        LeftGradient { rows: &*work.lefts[0], gradient: first, exclusive: chunk.lefts[0].exclusive, products: [a, b] },
        LeftGradient { rows: &*work.lefts[1], gradient: second, exclusive: chunk.lefts[1].exclusive, products: [c, d] },
    ];
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

/// Writes gradients of rows from those of what [`HeadRows::read`] has made of them.
#[inline(always)]
fn write<T: SimdElement, I: Isa>(head: &Head<'_, T>, from: HeadRows<'_, T>, found: &[T::Acc], into: &RowWriter<'_, T>)
where
    T::Acc: Wide,
{
    let Size { width, stride, .. } = head.size;
    for i in 0..head.count {
        let (batch, token) = (head.sequence.batch, head.sequence.first + head.first + i);
        let row = into.row(batch, token, from.head);
        from.write_gradient::<I>((batch, token), &found[i * stride..][..width], row);
    }
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
    let (Size { rows, chunk: row, width, stride }, stride_v, width_v) = (head.size, head.stride_v, head.width_v);
    let head_dim = head.args.shape.head_dim;
    transpose::<T::Acc, I>((d_state, stride_v), (work.columns, stride), [width, width_v]);
    let written = [&*chunk.written, &*chunk.extra];
    for (i, right) in chunk.rights[..chunk.counts[1]].iter().enumerate() {
        transpose::<T::Acc, I>((written[i], stride_v), (work.written[i], row), [rows, width_v]);
        products_of::<T, I>(head, (work.d_out, work.written[i]), chunk.lefts[0].strict, work.d_products[0][i]);
        let sums = &mut *work.d_written[i];
        sums[..rows * stride_v].fill(T::Acc::ZERO);
        let factors = Factors { data: right.columns, row: 1, step: row };
        add_product::<T::Acc, I>(factors, Rows::new(d_state, stride_v), (sums, stride_v), [rows, head_dim, width_v]);
        add_met_transposed::<T, I>(head, chunk.lefts[0].products[i], work.d_out, sums);
        let gradient = &mut *work.d_rights[i];
        gradient[..rows * stride].fill(T::Acc::ZERO);
        let factors = Factors { data: written[i], row: stride_v, step: 1 };
        add_product::<T::Acc, I>(factors, Rows::new(work.columns, stride), (gradient, stride), [rows, width_v, width]);
    }
}

/// The gradient of what the state fades by, times that.
#[inline(always)]
fn of_alpha<T: SimdElement, I: Isa>(
    head: &Head<'_, T>,
    (state, d_state): (&[T::Acc], &[T::Acc]),
    chunk: &Chunk<'_, T::Acc>,
    end: &mut [T::Acc],
) where
    T::Acc: Wide,
{
    for (d, end) in end.iter_mut().enumerate() {
        let at = d * head.stride_v..d * head.stride_v + head.width_v;
        *end = T::Acc::from_f64(dot::<T::Acc, I>(&state[at.clone()], &d_state[at])) * chunk.alpha[d];
    }
}

/// Gradients of rows `number` that read the state, and of the state, from those of what they read.
#[inline(always)]
fn of_readers<T: SimdElement, I: Isa>(
    head: &Head<'_, T>,
    (state, d_state): (&[T::Acc], &mut [T::Acc]),
    number: usize,
    chunk: &Chunk<'_, T::Acc>,
    work: &mut Work<'_, T::Acc>,
) where
    T::Acc: Wide,
{
    let (Size { rows, width, stride, .. }, stride_v, width_v) = (head.size, head.stride_v, head.width_v);
    if number == 0 {
        transpose::<T::Acc, I>((state, stride_v), (work.columns, stride), [width, width_v]);
    }
    let read = if number == 0 { &*work.d_out } else { &*chunk.sums };
    let gradient = &mut *work.d_lefts[number];
    gradient[..rows * stride].fill(T::Acc::ZERO);
    let factors = Factors { data: read, row: stride_v, step: 1 };
    add_product::<T::Acc, I>(factors, Rows::new(work.columns, stride), (gradient, stride), [rows, width_v, width]);
    let factors = Factors { data: chunk.lefts[number].rows, row: 1, step: stride };
    let size = [head.args.shape.head_dim.next_multiple_of(ROW_STEP), rows, width_v];
    add_product::<T::Acc, I>(factors, Rows::new(read, stride_v), (d_state, stride_v), size);
}

/// Gradients of products, 0 where rows do not meet.
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
        products[..BLOCK * chunk].fill(T::Acc::ZERO);
        let factors = Factors { data: &d_sums[first * head.stride_v..], row: head.stride_v, step: 1 };
        let size = [BLOCK, head.width_v, first + BLOCK];
        add_product::<T::Acc, I>(factors, Rows::new(written, chunk), (products, chunk), size);
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
