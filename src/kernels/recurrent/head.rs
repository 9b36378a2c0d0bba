//! One head of one sequence at a chunk: what it is worked on with, and the stages of the work.

use super::pairs::{ChannelScratch, Fade, Gates, Left, Right, Size};
use super::rows::HeadRows;
use super::{Decay, PerStep, RecurrentArgs, RecurrentOut, Rule, Sequence};
use crate::dtype::Float;
use crate::math::elementwise::{are_finite, multiply, scale, subtract_and_scale};
use crate::math::load::{MAX_LANES, store_scaled};
use crate::math::product::{Factors, Product, ROW_STEP, Rows, Start, add_product, row_width};
use crate::math::triangular::substitute;
use crate::parallel::RowWriter;
use crate::simd::{Isa, SimdElement, Wide};
use crate::tensor::Tensor;
use crate::workspace::carve;
use std::f64::consts::LOG2_E;

/// Rows that share a factor when gates are of channels; chunks are of whole blocks.
pub const BLOCK: usize = MAX_LANES;
/// The longest chunk.
pub const MAX_CHUNK: usize = 64;

/// A gate in base 2. Below the bound nothing is left, and sums of an infinite one would have no difference.
fn step_gate(gate: f64) -> f64 {
    if gate < -1e4 { -1e4 * LOG2_E } else { gate * LOG2_E }
}

/// One head of one sequence, and the chunk it is at.
#[derive(Clone, Copy)]
pub struct Head<'a, T: SimdElement> {
    pub args: &'a RecurrentArgs<'a, T>,
    pub sequence: Sequence,
    /// Which value head.
    pub index: usize,
    pub size: Size,
    /// Columns of the values, in whole vectors.
    pub width_v: usize,
    /// Elements from one row of values, or of the state, to the next.
    pub stride_v: usize,
    /// Tokens from a row to the one that is requested when it is loaded.
    pub ahead: isize,
    /// First token.
    pub first: usize,
    /// Tokens.
    pub count: usize,
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
pub fn stride_of(width: usize) -> usize {
    width + MAX_LANES
}

/// The buffers of a chunk.
pub struct Chunk<'s, A> {
    /// Queries, and what reads for the rule; faded from the start of the chunk once it is prepared.
    pub lefts: [Left<'s, A>; 2],
    /// Keys, and where the low-rank part is written; their columns fade to the end of the chunk.
    pub rights: [Right<'s, A>; 2],
    /// How many of `lefts` and `rights` there are.
    pub counts: [usize; 2],
    /// `[width]`: what the state fades by.
    pub alpha: &'s mut [A],
    /// `[chunk, stride_v]`: what is written by the keys.
    pub written: &'s mut [A],
    /// `[chunk, stride_v]`: what the low-rank part reads and writes; what others write before `beta`.
    pub extra: &'s mut [A],
    /// `[chunk, stride_v]`.
    pub sums: &'s mut [A],
    /// What each query reads of its own token, where it reads the state before that.
    pub bonus: [A; MAX_CHUNK],
    /// Factors of what is written; 1 where there are none, 0 beyond the last token.
    pub betas: [A; MAX_CHUNK],
    /// `[chunk, stride]`: gates of channels, in base 2.
    pub gates: &'s mut [A],
    /// `[chunk, chunk]`: the triangular system.
    pub system: &'s mut [A],
    pub scratch: ChannelScratch<'s, A>,
}

/// Elements of the buffers of a chunk.
pub fn chunk_len<T: SimdElement>(args: &RecurrentArgs<'_, T>, chunk: usize) -> usize {
    let (width, width_v) = (row_width(args.shape.head_dim), row_width(args.shape.head_dim_v));
    let [reads, writes] = seconds(&args.rule).map(usize::from);
    let (stride, stride_v) = (stride_of(width), stride_of(width_v));
    let rows = (3 + reads + writes) * chunk * stride;
    let columns = (2 + writes) * chunk * width;
    let products = ((1 + reads) * (1 + writes) + reads) * chunk * chunk;
    let channels = (MAX_CHUNK / BLOCK + 3) * width;
    rows + columns + products + channels + 3 * chunk * stride_v
}

impl<'s, A: Float> Chunk<'s, A> {
    #[expect(clippy::mut_mut, reason = "what is left of the scratch")]
    pub fn carve<T: SimdElement<Acc = A>>(head: &Head<'_, T>, rest: &mut &'s mut [A]) -> Self {
        let Size { chunk, width, stride, .. } = head.size;
        let [reads, writes] = seconds(&head.args.rule);
        let low_rank = matches!(head.args.rule, Rule::LowRank { .. });
        let exclusive = head.args.bonus.is_some();
        let mut take = |wanted: bool, len: usize| carve(rest, if wanted { len } else { 0 });
        let square = chunk * chunk;
        let of_queries = [take(true, square), take(writes, square)];
        let of_readers = [take(reads, square), take(reads && writes, square)];
        let (panel, columns, values) = (chunk * stride, chunk * width, chunk * head.stride_v);
        Self {
            system: take(reads, square),
            lefts: [
                Left { rows: take(true, panel), exclusive, strict: exclusive, products: of_queries },
                Left { rows: take(reads, panel), exclusive: low_rank, strict: true, products: of_readers },
            ],
            rights: [
                Right { rows: take(true, panel), columns: take(true, columns) },
                Right { rows: take(writes, panel), columns: take(writes, columns) },
            ],
            counts: [1 + usize::from(reads), 1 + usize::from(writes)],
            gates: take(true, panel),
            scratch: ChannelScratch {
                columns: take(true, columns),
                blocks: take(true, MAX_CHUNK / BLOCK * width),
                total: take(true, width),
                ratio: take(true, width),
            },
            alpha: take(true, width),
            written: take(true, values),
            extra: take(true, values),
            sums: take(true, values),
            bonus: [A::ZERO; MAX_CHUNK],
            betas: [A::ZERO; MAX_CHUNK],
        }
    }
}

impl<'a, T: SimdElement> Head<'a, T>
where
    T::Acc: Wide,
{
    /// A head before its first chunk.
    pub fn new(args: &'a RecurrentArgs<'a, T>, sequence: Sequence, head: usize, chunk: usize) -> Self {
        let (width, width_v) = (row_width(args.shape.head_dim), row_width(args.shape.head_dim_v));
        let size = Size { rows: 0, chunk, width, stride: stride_of(width) };
        Self {
            args,
            sequence,
            index: head,
            size,
            width_v,
            stride_v: stride_of(width_v),
            ahead: chunk as isize,
            first: 0,
            count: 0,
        }
    }

    /// The head at the chunk from token `first` on.
    pub fn at(mut self, first: usize) -> Self {
        self.first = first;
        self.count = self.size.chunk.min(self.sequence.len - first);
        self.size.rows = self.count.next_multiple_of(BLOCK);
        self
    }

    /// Elements of a state, `[width, stride_v]`.
    pub fn state_len(&self) -> usize {
        self.size.width * self.stride_v
    }

    /// Loads all rows, and the values.
    #[inline(always)]
    pub fn load_rows<I: Isa>(&self, work: &mut Chunk<'_, T::Acc>) {
        self.load_keys::<I>(work);
        self.load_readers::<I>(work);
        self.load_values::<I>(self.args.v, work.written);
    }

    /// Loads the rows that are written, and the factors of what is.
    #[inline(always)]
    pub fn load_keys<I: Isa>(&self, work: &mut Chunk<'_, T::Acc>) {
        self.load::<I>(self.args.keys(self.index), work.rights[0].rows);
        if let Rule::LowRank { b, .. } = &self.args.rule {
            self.load::<I>(self.args.plain(*b, self.index), work.rights[1].rows);
        }
        work.betas = self.betas();
    }

    /// Loads the rows that read, after those that are written.
    #[inline(always)]
    pub fn load_readers<I: Isa>(&self, work: &mut Chunk<'_, T::Acc>) {
        self.load::<I>(self.args.queries(self.index), work.lefts[0].rows);
        match &self.args.rule {
            Rule::Additive(_) => {}
            Rule::Delta(_) => {
                let len = self.size.rows * self.size.stride;
                work.lefts[1].rows[..len].copy_from_slice(&work.rights[0].rows[..len]);
            }
            Rule::LowRank { a, .. } => self.load::<I>(self.args.plain(*a, self.index), work.lefts[1].rows),
        }
        work.bonus = self.bonus(work.lefts[0].rows, work.rights[0].rows);
    }

    /// Fades the rows that are loaded, and forms the products of those that read.
    #[inline(always)]
    pub fn fade<I: Isa>(&self, work: &mut Chunk<'_, T::Acc>, readers: bool) {
        let mut sums = [0.0; MAX_CHUNK + 1];
        let gates = self.gates::<I>(&mut sums, work.gates);
        let [lefts, rights] = work.counts;
        let (lefts, rights) = (&mut work.lefts[..if readers { lefts } else { 0 }], &mut work.rights[..rights]);
        I::call(Fade { size: self.size, gates, lefts, rights, scratch: &mut work.scratch, alpha: work.alpha });
    }

    /// Finds what is written, from the values and what is read of the state; leaves what queries read of that in `sums`.
    #[inline(always)]
    pub fn solve<I: Isa>(&self, state: &[T::Acc], work: &mut Chunk<'_, T::Acc>) {
        let (Size { rows, chunk, .. }, stride_v, width_v) = (self.size, self.stride_v, self.width_v);
        self.read::<I>(state, work);
        match &self.args.rule {
            Rule::Additive(None) => {}
            Rule::Additive(Some(_)) => self.scale_rows::<I>(work.written, &work.betas),
            Rule::Delta(_) => {
                for i in 0..rows {
                    let at = i * stride_v..i * stride_v + width_v;
                    let (value, read) = (&mut work.written[at.clone()], &mut work.extra[at]);
                    subtract_and_scale::<T::Acc, I>(value, read, T::Acc::from_f64(1.0));
                    read.copy_from_slice(value);
                    let system = &mut work.system[i * chunk..][..rows];
                    system.copy_from_slice(&work.lefts[1].products[0][i * chunk..][..rows]);
                    multiply::<T::Acc, I>(system, &work.betas[..rows]);
                    scale::<T::Acc, I>(system, T::Acc::from_f64(-1.0));
                }
                substitute::<T::Acc, I>((work.system, chunk), (work.extra, stride_v), [rows, width_v]);
                work.written[..rows * stride_v].copy_from_slice(&work.extra[..rows * stride_v]);
                self.scale_rows::<I>(work.written, &work.betas);
            }
            Rule::LowRank { .. } => {
                self.add_met::<I>(work.lefts[1].products[0], work.written, work.extra);
                substitute::<T::Acc, I>((work.lefts[1].products[1], chunk), (work.extra, stride_v), [rows, width_v]);
            }
        }
    }

    /// What [`Head::solve`] has found, from the rows that [`super::RecurrentOut::kept`] has of it.
    #[inline(always)]
    pub fn recall<I: Isa>(&self, kept: Option<Tensor<'_, T>>, work: &mut Chunk<'_, T::Acc>) {
        let kept = || kept.expect("what rules read of the state was kept");
        match &self.args.rule {
            Rule::Additive(None) => self.load_values::<I>(self.args.v, work.written),
            Rule::Additive(Some(_)) => self.load_values::<I>(self.args.v, work.extra),
            Rule::Delta(_) => self.load_values::<I>(kept(), work.extra),
            Rule::LowRank { .. } => {
                self.load_values::<I>(self.args.v, work.written);
                self.load_values::<I>(kept(), work.extra);
            }
        }
        if matches!(self.args.rule, Rule::Additive(Some(_)) | Rule::Delta(_)) {
            let len = self.size.rows * self.stride_v;
            work.written[..len].copy_from_slice(&work.extra[..len]);
            self.scale_rows::<I>(work.written, &work.betas);
        }
    }

    /// Writes rows of values.
    #[inline(always)]
    pub fn store_rows<I: Isa>(&self, rows: &[T::Acc], into: &RowWriter<'_, T>) {
        for i in 0..self.count {
            let row = into.row(self.sequence.batch, self.sequence.first + self.first + i, self.index);
            let one = T::Acc::from_f64(1.0);
            store_scaled::<T, I>(&rows[i * self.stride_v..][..self.width_v], one, row, into.passes_caches());
        }
    }

    /// Requests the rows of the chunk in an array of results: there is time until they are written.
    #[inline(always)]
    pub fn prefetch<E>(&self, results: &RowWriter<'_, E>, head: usize) {
        for i in 0..self.count {
            results.prefetch(self.sequence.batch, self.sequence.first + self.first + i, head);
        }
    }

    /// As [`Head::prefetch`], of the forward.
    #[inline(always)]
    pub fn prefetch_results(&self, out: &RecurrentOut<'_, T>) {
        for rows in [Some(&out.out), out.kept.as_ref()].into_iter().flatten() {
            self.prefetch(rows, self.index);
        }
    }

    /// Multiplies rows of values by a factor each.
    #[inline(always)]
    pub fn scale_rows<I: Isa>(&self, rows: &mut [T::Acc], factors: &[T::Acc; MAX_CHUNK]) {
        for (i, row) in rows.chunks_exact_mut(self.stride_v).enumerate().take(self.size.rows) {
            scale::<T::Acc, I>(&mut row[..self.width_v], factors[i]);
        }
    }

    /// Fades the state, and writes to it.
    #[inline(always)]
    pub fn update<I: Isa>(&self, work: &Chunk<'_, T::Acc>, state: &mut [T::Acc]) {
        self.write::<I>(work, Start::Faded(work.alpha), state);
    }

    /// Makes the state behind the chunk of that before it.
    #[inline(always)]
    pub fn update_from<I: Isa>(&self, work: &Chunk<'_, T::Acc>, before: &[T::Acc], after: &mut [T::Acc]) {
        self.write::<I>(work, Start::FadedFrom(work.alpha, before), after);
    }

    #[inline(always)]
    fn write<I: Isa>(&self, work: &Chunk<'_, T::Acc>, mut start: Start<'_, T::Acc>, state: &mut [T::Acc]) {
        for (right, written) in work.rights[..work.counts[1]].iter().zip([&*work.written, &*work.extra]) {
            let factors = Factors { data: right.columns, row: self.size.chunk, step: 1 };
            I::call(Product::<T::Acc> {
                start: std::mem::replace(&mut start, Start::Sums),
                matrix: Rows::new(written, self.stride_v),
                results: &mut [(factors, &mut *state)],
                stride: self.stride_v,
                size: [self.args.shape.head_dim.next_multiple_of(ROW_STEP), self.size.rows, self.width_v],
            });
        }
    }

    /// The rows of a chunk, zeros beyond the last one.
    #[inline(always)]
    fn load<I: Isa>(&self, from: HeadRows<'_, T>, into: &mut [T::Acc]) {
        for (i, row) in into.chunks_exact_mut(self.size.stride).enumerate().take(self.size.rows) {
            let row = &mut row[..self.size.width];
            if i < self.count {
                from.prefetch(&self.sequence, (self.first + i).wrapping_add_signed(self.ahead));
                from.read::<I>(&self.sequence, self.first + i, row);
            } else {
                row.fill(T::Acc::ZERO);
            }
        }
    }

    /// Rows of an array of the values' shape, zeros beyond the last one.
    #[inline(always)]
    pub fn load_values<I: Isa>(&self, tensor: Tensor<'_, T>, into: &mut [T::Acc]) {
        let values = HeadRows { tensor, head: self.index, factor: 1.0, l2norm: false };
        for (i, row) in into.chunks_exact_mut(self.stride_v).enumerate().take(self.size.rows) {
            let row = &mut row[..self.width_v];
            if i < self.count {
                values.prefetch(&self.sequence, (self.first + i).wrapping_add_signed(self.ahead));
                values.read::<I>(&self.sequence, self.first + i, row);
            } else {
                row.fill(T::Acc::ZERO);
            }
        }
    }

    /// What each query reads of its own token, where it reads the state before that.
    fn bonus(&self, queries: &[T::Acc], keys: &[T::Acc]) -> [T::Acc; MAX_CHUNK] {
        let mut found = [T::Acc::ZERO; MAX_CHUNK];
        if let Some(bonus) = self.args.bonus {
            let width = self.args.shape.head_dim;
            let bonus = &bonus[self.args.shape.head_of(self.index) * width..][..width];
            let rows = queries.chunks_exact(self.size.stride).zip(keys.chunks_exact(self.size.stride));
            for (found, (query, key)) in found.iter_mut().zip(rows).take(self.count) {
                let terms = bonus.iter().zip(query.iter().zip(key)).map(|(u, (q, k))| u * q.to_f64() * k.to_f64());
                *found = T::Acc::from_f64(terms.sum());
            }
        }
        found
    }

    /// The gates of the chunk; those of channels are read into the buffer.
    #[inline(always)]
    pub fn gates<'g, I: Isa>(&self, sums: &'g mut [f64; MAX_CHUNK + 1], into: &'g mut [T::Acc]) -> Gates<'g, T::Acc> {
        if let Decay::Channels(gates) = &self.args.decay {
            for (i, row) in into.chunks_exact_mut(self.size.stride).enumerate().take(self.size.rows) {
                let row = &mut row[..self.size.width];
                row.fill(T::Acc::ZERO);
                if i < self.count {
                    gates.read(self.sequence.batch, self.sequence.first + self.first + i, self.index, row);
                    scale::<T::Acc, I>(row, T::Acc::from_f64(LOG2_E));
                }
            }
            return Gates::Channels(into);
        }
        if self.step_gates(sums) { Gates::Steps(sums) } else { Gates::None }
    }

    /// Sums of the gates before each row, and of all, in base 2, unless they are of channels; returns whether there are any.
    #[inline(always)]
    pub fn step_gates(&self, sums: &mut [f64; MAX_CHUNK + 1]) -> bool {
        let (token, count) = (self.sequence.first + self.first, self.count);
        match &self.args.decay {
            Decay::None | Decay::Channels(_) => return false,
            Decay::Heads(gates) => {
                for i in 0..MAX_CHUNK {
                    sums[i + 1] = sums[i] + if i < count { step_gate(gates[self.index]) } else { 0.0 };
                }
            }
            Decay::Steps(gates) => {
                for i in 0..MAX_CHUNK {
                    let gate = |i| step_gate(gates.first(self.sequence.batch, token + i, self.index).to_f64());
                    sums[i + 1] = sums[i] + if i < count { gate(i) } else { 0.0 };
                }
            }
        }
        true
    }

    /// Factors of what is written; 1 where there are none, 0 beyond the last token.
    pub fn betas(&self) -> [T::Acc; MAX_CHUNK] {
        let beta: Option<&PerStep<'_, T>> = match &self.args.rule {
            Rule::Additive(beta) | Rule::Delta(beta) => beta.as_ref(),
            Rule::LowRank { .. } => None,
        };
        let Sequence { batch, first, .. } = self.sequence;
        let one = |i| beta.map_or(T::Acc::from_f64(1.0), |beta| beta.first(batch, first + self.first + i, self.index));
        std::array::from_fn(|i| if i < self.count { one(i) } else { T::Acc::ZERO })
    }

    /// What the faded queries read of the state, into `sums`, and what else reads, into `extra`.
    #[inline(always)]
    fn read<I: Isa>(&self, state: &[T::Acc], work: &mut Chunk<'_, T::Acc>) {
        let Size { rows, stride, .. } = self.size;
        let [queries, readers] = work.lefts.each_ref().map(|left| Factors { data: &*left.rows, row: stride, step: 1 });
        I::call(Product::<T::Acc> {
            start: Start::Zeros,
            matrix: Rows::new(state, self.stride_v),
            results: &mut [(queries, &mut *work.sums), (readers, &mut *work.extra)][..work.counts[0]],
            stride: self.stride_v,
            size: [rows, self.args.shape.head_dim, self.width_v],
        });
    }

    /// Adds what rows meet of what is written in the chunk.
    #[inline(always)]
    pub fn add_met<I: Isa>(&self, products: &[T::Acc], written: &[T::Acc], sums: &mut [T::Acc]) {
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
