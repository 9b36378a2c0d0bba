//! The backward of the chunk form: a sweep forwards that finds the state before each chunk again, and one backwards that takes each chunk
//! apart (`apart.rs`).
//!
//! Neither reads the state: the forward keeps what rules have read of it, so that the first sweep is one product for each chunk. Some
//! heads whose rows lie side by side take turns, as in the forward. Heads of values that share a head of queries and keys are of one
//! task, or, where there are few of those, of several that add to the same sums in a fixed order: so are their gradients.

use super::apart::Apart;
use super::gradient_buffers::{Work, work_len};
use super::head::{Chunk, Head, chunk_len};
use super::pairs::Size;
use super::rows::HeadRows;
use super::{MOST_HEADS, Numbers, RecurrentArgs, Rule, TASKS_PER_THREAD};
use crate::dtype::{DType, Element, Float};
use crate::math::elementwise::add;
use crate::math::product::row_width;
use crate::parallel::{RowTurns, RowWriter, for_each_tile};
use crate::simd::{Isa, Level, SimdElement, Task, Wide};
use crate::tensor::Tensor;
use crate::workspace::{Scratch, carve};

/// A call, its gradients from outside, and where its own go.
pub struct BackwardArgs<'a, T: Element> {
    /// The call.
    pub forward: RecurrentArgs<'a, T>,
    /// The states before the first token, `[N, HV, 1, K * V]`, if there are any.
    pub initial: Option<Numbers<'a, T>>,
    /// What the forward has kept, `[B, T, HV, V]`; see [`super::RecurrentOut::kept`]. Additive rules do without.
    pub kept: Option<Tensor<'a, T>>,
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
    /// Heads of queries and keys of a task.
    turns: usize,
    /// If the value heads of a head of queries and keys are divided among tasks.
    shared: Option<Shared<'a, T::Acc>>,
}

/// What tasks share that divide the value heads of a head of queries and keys among them.
#[derive(Clone, Copy)]
struct Shared<'a, A> {
    /// How many.
    parts: usize,
    /// `[B, T, H, rows * width]`, rows of whole vectors: a place for each sequence, head and chunk.
    sums: &'a RowTurns<'a, A>,
    /// Places of a head.
    places: usize,
}

/// Where there are fewer heads of queries and keys, their value heads are divided.
const FEWEST_TASKS: usize = 16;

/// Bytes of states of a task that stay allocated for the next one; tasks of several heads keep no more.
const MOST_STATES: usize = 16 << 20;

/// Computes all gradients with up to `threads` threads. Results do not depend on how many.
///
/// # Panics
/// When a rule reads the state and nothing was kept.
pub fn backward<T: SimdElement>(
    args: &BackwardArgs<'_, T>,
    gradients: &Gradients<'_, T>,
    chunk: usize,
    level: Level,
    threads: usize,
) where
    T::Acc: Wide,
{
    let (sequences, shape) = (args.forward.sequences, &args.forward.shape);
    assert!(args.kept.is_some() || matches!(args.forward.rule, Rule::Additive(_)), "nothing was kept");
    let Some(longest) = sequences.iter().max_by_key(|sequence| sequence.len) else { return };
    let state = Head::new(&args.forward, *longest, 0, chunk).state_len() * size_of::<T::Acc>();
    let group = shape.num_value_heads / shape.num_heads.max(1);
    let states = group * (longest.len.div_ceil(chunk) + 1) * state;
    let heads = sequences.len() * shape.num_heads;
    let turns = (heads / (TASKS_PER_THREAD * threads.max(1))).min(MOST_STATES / states.max(1)).clamp(1, MOST_HEADS);
    let level = args.forward.level(level);
    // Of the shape alone: sums are grouped by it.
    let parts = group.div_ceil(group.div_ceil(FEWEST_TASKS.div_ceil(heads.max(1))).max(1));
    if parts <= 1 {
        let tasks = sequences.len() * shape.num_heads.div_ceil(turns);
        return for_each_tile(level, threads, tasks, &Sequences { args, gradients, chunk, turns, shared: None });
    }
    let places = longest.len.div_ceil(chunk);
    let width = shared_rows(&args.forward) * row_width(shape.head_dim);
    let mut sums = vec![T::Acc::ZERO; shape.batch * shape.seqlen * shape.num_heads * width];
    let strides = [shape.seqlen * shape.num_heads * width, shape.num_heads * width, width];
    let sums = RowTurns::new(&mut sums, [shape.batch, shape.seqlen, shape.num_heads, width], strides, heads * places);
    let shared = Some(Shared { parts, sums: &sums, places });
    for_each_tile(level, threads, heads * parts, &Sequences { args, gradients, chunk, turns: 1, shared });
}

/// Rows of each token that value heads share: queries and keys, `a` and `b`.
fn shared_rows<T: Element>(args: &RecurrentArgs<'_, T>) -> usize {
    if matches!(args.rule, Rule::LowRank { .. }) { 4 } else { 2 }
}

impl<T: SimdElement> Task for Sequences<'_, T>
where
    T::Acc: Wide,
{
    const MULTIPLIES_BF16: bool = false;
    const MULTIPLIES_TILES: bool = matches!(T::DTYPE, DType::BF16);

    #[inline(always)]
    fn run<I: Isa>(&self, index: usize) {
        let _watch = self.shared.map(|shared| shared.sums.watch());
        let parts = self.shared.map_or(1, |shared| shared.parts);
        let args = &self.args.forward;
        let shape = &args.shape;
        let (index, part) = (index / parts, index % parts);
        let groups = shape.num_heads.div_ceil(self.turns);
        let (number, first) = (index / groups, index % groups * self.turns);
        let group = shape.num_value_heads / shape.num_heads.max(1);
        let sequence = args.sequences[number];
        let start = Head::new(args, sequence, first * group, self.chunk);
        let mut heads = first * group..shape.num_heads.min(first + self.turns) * group;
        let own = group.div_ceil(parts);
        if parts > 1 {
            heads = heads.start + part * own..heads.end.min(heads.start + (part + 1) * own);
        }
        let own = own.min(heads.len());
        let (len, chunks) = (start.state_len(), sequence.len.div_ceil(self.chunk));
        let flat = shape.head_dim * shape.head_dim_v;
        // The state before each chunk, and that after the last one, of each head.
        let count = heads.len() * (chunks + 1) * len;
        let (mut large, mut small);
        let states = if count * size_of::<T::Acc>() > MOST_STATES {
            large = vec![T::Acc::ZERO; count];
            &mut large[..]
        } else {
            small = Scratch::take::<T::Acc>(count);
            &mut small.as_mut_slice()[..count]
        };
        let mut d_states = vec![T::Acc::ZERO; heads.len() * len];
        let mut scratch = Scratch::take::<T::Acc>(chunk_len(args, self.chunk) + work_len(&start) + flat);
        let mut rest = scratch.as_mut_slice::<T::Acc>();
        let flat = carve(&mut rest, flat);
        let mut chunk = Chunk::carve(&start, &mut rest);
        let mut work = Work::carve(&start, &mut rest);
        for (head, (states, d_state)) in heads.clone().zip(states.chunks_mut((chunks + 1) * len).zip(d_states.chunks_mut(len))) {
            states[..len].fill(T::Acc::ZERO);
            load_state(self.args.initial.as_ref(), (number, head), flat, (states, start.stride_v), shape.head_dim_v);
            load_state(self.args.d_last.as_ref(), (number, head), flat, (d_state, start.stride_v), shape.head_dim_v);
        }
        for i in 0..chunks {
            for (head, states) in heads.clone().zip(states.chunks_mut((chunks + 1) * len)) {
                let at = Head { index: head, ..start.at(i * self.chunk) };
                let (before, after) = states[i * len..(i + 2) * len].split_at_mut(len);
                at.load_keys::<I>(&mut chunk);
                at.recall::<I>(self.args.kept, &mut chunk);
                at.fade::<I>(&mut chunk, false);
                at.update_from::<I>(&chunk, before, after);
            }
        }
        let apart = Apart { args: self.args, gradients: self.gradients, number };
        let start = Head { ahead: -start.ahead, ..start };
        for i in (0..chunks).rev() {
            for (member, (head, d_state)) in heads.clone().zip(d_states.chunks_mut(len)).enumerate() {
                let head = Head { index: head, ..start.at(i * self.chunk) };
                let state = &states[(member * (chunks + 1) + i) * len..][..len];
                apart.take::<I>(&head, member % own == 0, (state, d_state), (&mut chunk, &mut work));
                if member % own + 1 == own && self.add_shared::<I>(&head, (number, part), &mut work) {
                    self.write_shared::<I>(&head, &work);
                }
            }
        }
        if let Some(initial) = &self.gradients.initial {
            for (head, d_state) in heads.zip(d_states.chunks(len)) {
                let row = initial.row(number, head, 0);
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
    /// Adds the part's gradients of the rows that value heads share to those of earlier parts; returns whether they are those of all.
    #[inline(always)]
    fn add_shared<I: Isa>(&self, head: &Head<'_, T>, (number, part): (usize, usize), work: &mut Work<'_, T::Acc>) -> bool {
        let Some(Shared { parts, sums, places }) = self.shared else { return true };
        let Size { chunk, width, stride, .. } = head.size;
        let of = self.args.forward.shape.head_of(head.index);
        let place = (number * self.args.forward.shape.num_heads + of) * places + head.first / chunk;
        let mut turn = sums.wait(place, part);
        for i in 0..head.count {
            let row = turn.row(head.sequence.batch, head.sequence.first + head.first + i, of);
            for (total, sum) in work.totals.iter_mut().zip(row.chunks_exact_mut(width.max(1))) {
                let total = &mut total[i * stride..][..width];
                if part > 0 {
                    add::<T::Acc, I>(total, sum);
                }
                sum.copy_from_slice(total);
            }
        }
        part + 1 == parts
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

/// Writes gradients of rows from those of what [`HeadRows::read`] has made of them.
#[inline(always)]
fn write<T: SimdElement, I: Isa>(head: &Head<'_, T>, from: HeadRows<'_, T>, found: &[T::Acc], into: &RowWriter<'_, T>)
where
    T::Acc: Wide,
{
    let Size { width, stride, .. } = head.size;
    for i in 0..head.count {
        let (batch, token) = (head.sequence.batch, head.sequence.first + head.first + i);
        from.write_gradient::<I>((batch, token), &found[i * stride..][..width], into);
    }
}
