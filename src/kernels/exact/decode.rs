//! Decode: few queries against many keys. Keys and values are read once per key/value head, where they lie, and the key axis is
//! split into pieces that are merged (Flash-Decoding, Dao et al. 2023; LeanAttention, Sanovar et al. 2024).
//!
//! ```text
//! for a piece of the keys of one key/value head (a task):      rows: (token, head of the group)
//!   for a block of 64 keys:
//!     s = q K^T                                                 inner products, reduced across lanes; or many rows in the lanes
//!     m, alpha = online softmax step; p = 2^(s * scale - m); o = alpha o + p V
//! for a row of several pieces: merge (o, m, l)
//! ```

use super::splits::{MAX_ROWS, Piece, Splits};
use super::{ExactArgs, ExactOut};
use crate::dtype::{DType, Float};
use crate::index::Query;
use crate::kernels::bias::Bias;
use crate::kernels::score_mod::Normalizer;
use crate::math::dot;
use crate::math::load::{MAX_LANES, load_row};
use crate::math::online_softmax::{
    Column, Exponential, MaskedExponential, Ready, RowPass, column_peak, probabilities, row_peak, row_probabilities, row_scores,
    rows_step, scale_base2, step,
};
use crate::math::score_pass::map_row;
use crate::math::weigh::{self, Probabilities, acc_stride};
use crate::parallel::{RowWriter, for_each_tile};
use crate::simd::{BLOCK_ROWS, Isa, Level, RowBlock, SimdElement, Task, Vector, VectorKernel, prefetch};
use crate::tensor::MAX_HEAD_DIM;
use crate::workspace::{Scratch, padded};
use std::ops::Range;
use std::sync::OnceLock;

/// Calls that read fewer bytes than this are over before another thread would start.
const SERIAL_BYTES: usize = 1 << 18;

struct Decode<'a, T: SimdElement> {
    args: &'a ExactArgs<'a, T>,
    out: &'a ExactOut<'a, T>,
    splits: &'a Splits,
    /// `[1, pieces, MAX_ROWS, acc_stride + 2]`: accumulator, maximum, sum.
    partials: Option<RowWriter<'a, T::Acc>>,
}

/// Computes `out` with up to `threads` threads. Results do not depend on how many.
pub fn forward<T: SimdElement>(
    args: &ExactArgs<'_, T>,
    out: &ExactOut<'_, T>,
    level: Level,
    threads: usize,
    num_splits: Option<usize>,
) {
    let shape = args.shape;
    let splits = Splits::new(args, num_splits);
    let bytes = (splits.keys() * shape.num_kv_heads * (shape.head_dim + shape.head_dim_v)).saturating_mul(size_of::<T>());
    let threads = if bytes < SERIAL_BYTES { 1 } else { threads };
    if !splits.merges() {
        for_each_tile(level, threads, splits.count(), &Decode { args, out, splits: &splits, partials: None });
        return;
    }
    let width = OnceLock::new();
    level.run(&PartialWidth { args, width: &width }, 0);
    let width = width.into_inner().unwrap_or(0);
    let shape_of_partials = [1, splits.count(), MAX_ROWS, width];
    let total = splits.count() * MAX_ROWS * width;
    let mut scratch = Scratch::take::<T::Acc>(total);
    let partials = &mut scratch.as_mut_slice::<T::Acc>()[..total];
    let writer = RowWriter::new(partials, shape_of_partials, [total, MAX_ROWS * width, width]);
    for_each_tile(level, threads, splits.count(), &Decode { args, out, splits: &splits, partials: Some(writer) });
    let merge = Merge { args, out, splits: &splits, partials, width };
    let merged = splits.segment_count() * splits.kv_heads();
    for_each_tile(level, if total * size_of::<T::Acc>() < SERIAL_BYTES { 1 } else { threads }, merged, &merge);
}

/// Vectors, and with them accumulators, differ between instruction sets.
struct PartialWidth<'a, T: SimdElement> {
    args: &'a ExactArgs<'a, T>,
    width: &'a OnceLock<usize>,
}

impl<T: SimdElement> Task for PartialWidth<'_, T> {
    const MULTIPLIES_BF16: bool = matches!(T::DTYPE, DType::BF16);

    #[inline(always)]
    fn run<I: Isa>(&self, _index: usize) {
        self.width.get_or_init(|| acc_stride::<T, I>(self.args.shape.head_dim_v) + 2);
    }
}

/// Where the keys and values of a block lie.
#[derive(Clone, Copy)]
struct Block<'a, T> {
    keys: RowBlock<'a, T>,
    values: RowBlock<'a, T>,
}

impl<T: SimdElement> Task for Decode<'_, T> {
    const MULTIPLIES_BF16: bool = matches!(T::DTYPE, DType::BF16);

    #[inline(always)]
    fn run<I: Isa>(&self, index: usize) {
        let piece = self.splits.piece(index);
        let shape = self.args.shape;
        let lanes = T::V::<I>::LANES;
        let depth = T::Kernel::<I>::DEPTH;
        let query_stride = padded::<T::Acc>(shape.head_dim.div_ceil(depth).next_multiple_of(lanes));
        let stride = acc_stride::<T, I>(shape.head_dim_v);
        let cross = dot::cross_vectors::<T, I>(shape.head_dim, piece.rows);
        let width = cross.unwrap_or(0) * lanes;
        let lengths = [piece.rows * query_stride, query_stride * width, piece.rows.max(width) * BLOCK_ROWS, piece.rows * stride];
        let mut scratch = Scratch::take::<T::Acc>(lengths.iter().sum());
        let (queries, rest) = scratch.as_mut_slice::<T::Acc>().split_at_mut(lengths[0]);
        let (columns, rest) = rest.split_at_mut(lengths[1]);
        let (scores, rest) = rest.split_at_mut(lengths[2]);
        let acc = &mut rest[..lengths[3]];
        for r in 0..piece.rows {
            let [batch, head, token] = self.query(&piece, r).at();
            let row = self.args.q.row(batch, token, head);
            for d in (0..shape.head_dim.div_ceil(depth)).step_by(lanes) {
                load_row::<T, I>(&row[d * depth..]).store(&mut queries[r * query_stride + d..]);
            }
        }
        for (d, column) in columns.chunks_exact_mut(width.max(1)).enumerate() {
            for (r, query) in column.iter_mut().enumerate() {
                *query = if r < piece.rows { queries[r * query_stride + d] } else { T::Acc::ZERO };
            }
        }
        acc.fill(T::Acc::ZERO);
        // Weights that are no exponentials are on the scale of 2^0.
        let m = if self.args.mods.normalizer.is_exponential() { T::Acc::NEG_INFINITY } else { T::Acc::ZERO };
        let mut state = Running { m: [m; MAX_ROWS], l: [T::Acc::ZERO; MAX_ROWS * MAX_LANES], acc };
        let zeros = [T::zeroed(); MAX_HEAD_DIM];
        let zeros = &zeros[..shape.head_dim.max(shape.head_dim_v)];
        let nothing =
            Block { keys: RowBlock::filled(&zeros[..shape.head_dim]), values: RowBlock::filled(&zeros[..shape.head_dim_v]) };
        let mut blocks = [nothing; 2];
        let mut keys = piece.keys.start..piece.keys.end.min(piece.keys.start + BLOCK_ROWS);
        self.find(&piece, &keys, &mut blocks[0]);
        // Later blocks are requested while the one before is at work.
        for rows in [&blocks[0].keys, &blocks[0].values] {
            for place in 0..keys.len() {
                prefetch(rows.row(place));
            }
        }
        while !keys.is_empty() {
            let [current, ahead] = &mut blocks;
            let next = keys.end..piece.keys.end.min(keys.end + BLOCK_ROWS);
            self.find(&piece, &next, ahead);
            match cross {
                Some(vectors) if self.sees_all(&piece, &keys) => {
                    dot::cross_scores::<T, I>((&current.keys, &ahead.keys), columns, vectors, scores);
                    let values = (&current.values, &ahead.values);
                    self.weigh_columns::<I>(piece.rows, vectors, values, scores, &mut state);
                }
                _ => {
                    let operands = (&*queries, query_stride);
                    dot::scores::<T, I>((&current.keys, &ahead.keys), keys.len(), operands, piece.rows, (scores, BLOCK_ROWS));
                    self.weigh::<I>(&piece, &keys, (&mut current.values, &ahead.values), zeros, scores, &mut state);
                }
            }
            keys = next;
            blocks.swap(0, 1);
        }
        for r in 0..piece.rows {
            let acc = &state.acc[r * stride..(r + 1) * stride];
            let l = T::Acc::from_f64(state.l[r * lanes..(r + 1) * lanes].iter().map(|x| x.to_f64()).sum());
            match &self.partials {
                Some(partials) if piece.partial => {
                    let row = partials.row(0, index, r);
                    row[..stride].copy_from_slice(acc);
                    row[stride..].copy_from_slice(&[state.m[r], l]);
                }
                _ => {
                    finish::<T, I>(self.args, self.out, &self.query(&piece, r), acc, (state.m[r], l));
                }
            }
        }
    }
}

/// The running softmax of every row, in base 2.
struct Running<'s, A> {
    m: [A; MAX_ROWS],
    /// `[rows, lanes]`: sums of the keys of each lane.
    l: [A; MAX_ROWS * MAX_LANES],
    /// `[rows, acc_stride]`.
    acc: &'s mut [A],
}

impl<T: SimdElement> Decode<'_, T> {
    /// The query of a row.
    #[inline(always)]
    fn query<'p>(&self, piece: &'p Piece, row: usize) -> Query<'p> {
        self.args.query(&piece.segment, piece.kv_head, piece.first_row + row)
    }

    /// Finds the rows of `keys`.
    #[inline(always)]
    fn find<'z>(&self, piece: &Piece, keys: &Range<usize>, block: &mut Block<'z, T>)
    where
        Self: 'z,
    {
        let places = self.args.places(&piece.segment);
        let mut found = 0;
        while found < keys.len() {
            let ((batch, token), length) = places.run_from(keys.start + found);
            let length = length.min(keys.len() - found);
            let (rows, stride) = self.args.k.rows_from(batch, token, piece.kv_head);
            block.keys.set_run(found, length, rows, stride);
            let (rows, stride) = self.args.v.rows_from(batch, token, piece.kv_head);
            block.values.set_run(found, length, rows, stride);
            found += length;
        }
    }

    /// Whether `keys` are a whole block of which nothing is hidden from any row of the piece, and scores are only scaled.
    #[inline(always)]
    fn sees_all(&self, piece: &Piece, keys: &Range<usize>) -> bool {
        let hull = |row: usize| self.args.mask.hull(&self.query(piece, row));
        keys.len() == BLOCK_ROWS
            && !self.args.modifies_scores()
            && self.args.mask.is_monotone()
            // Later rows see from later and to later.
            && hull(piece.rows - 1).start <= keys.start
            && keys.end <= hull(0).end
    }

    /// What is added to a row's scores, for the keys of a block; whether there is anything.
    #[inline(always)]
    fn read_bias(&self, query: &Query<'_>, block: &Range<usize>, bias: &mut [T::Acc; BLOCK_ROWS]) -> bool {
        let args = self.args;
        let gaps = args.mask.ranges.is_some();
        let slope = args.alibi_slope(query);
        if !gaps && slope == 0.0 && args.biases.iter().all(Bias::is_none) {
            return false;
        }
        let bias = &mut bias[..block.len()];
        bias.fill(T::Acc::ZERO);
        let mut scratch = [T::Acc::ZERO; BLOCK_ROWS];
        for one in args.biases.iter().filter(|bias| !bias.is_none()) {
            one.add(query.at(), block.start, bias, &mut scratch);
        }
        if slope != 0.0 {
            let position = query.position();
            for (key, bias) in block.clone().zip(bias.iter_mut()) {
                let distance = position.abs_diff(key as isize) as f64;
                *bias = T::Acc::from_f64(bias.to_f64() - slope * distance);
            }
        }
        if gaps {
            for gap in args.mask.gaps(query, block.clone()) {
                bias[gap.start - block.start..gap.end - block.start].fill(T::Acc::NEG_INFINITY);
            }
        }
        true
    }

    /// As [`Decode::weigh`], for scores with the rows in `vectors` vectors of lanes and nothing hidden.
    #[inline(always)]
    fn weigh_columns<I: Isa>(
        &self,
        rows: usize,
        vectors: usize,
        values: (&RowBlock<'_, T>, &RowBlock<'_, T>),
        scores: &mut [T::Acc],
        state: &mut Running<'_, T::Acc>,
    ) {
        let lanes = T::V::<I>::LANES;
        let scale = T::V::<I>::splat(scale_base2::<T::Acc>(self.args.mods.scale.factor));
        let mut alphas = [T::Acc::ZERO; MAX_ROWS];
        for first in (0..vectors * lanes).step_by(lanes) {
            let mut column = Column { rows: &mut scores[first..], stride: vectors * lanes };
            let peak = column_peak::<T, I>(&column, BLOCK_ROWS, scale);
            let step = step::<T, I>(T::V::<I>::load(&state.m[first..]), peak);
            step.m.store(&mut state.m[first..]);
            step.alpha.store(&mut alphas[first..]);
            let mut sums = [T::Acc::ZERO; MAX_LANES];
            probabilities::<T, I, Exponential>(&mut column, 0..BLOCK_ROWS, (scale, step.base), None).store(&mut sums);
            for (r, &sum) in (first..rows.min(first + lanes)).zip(&sums) {
                let by_lane = &mut state.l[r * lanes..][..lanes];
                T::V::<I>::load(by_lane).mul(T::V::<I>::splat(alphas[r])).store(by_lane);
                by_lane[0] = T::Acc::from_f64(by_lane[0].to_f64() + sum.to_f64());
            }
        }
        let probs = Probabilities { data: scores, row_stride: 1, key_step: vectors * lanes };
        weigh::accumulate::<T, I>(values, BLOCK_ROWS, probs, &alphas[..rows], state.acc);
    }

    /// Turns a block's scores into probabilities and adds the weighted values.
    #[inline(always)]
    fn weigh<'z, I: Isa>(
        &self,
        piece: &Piece,
        block: &Range<usize>,
        (values, ahead): (&mut RowBlock<'z, T>, &RowBlock<'z, T>),
        zeros: &'z [T],
        scores: &mut [T::Acc],
        state: &mut Running<'_, T::Acc>,
    ) {
        let depth = T::Kernel::<I>::DEPTH;
        let stride = acc_stride::<T, I>(values.width());
        let lanes = T::V::<I>::LANES;
        let from = T::Acc::from_f64;
        let lowest = T::V::<I>::splat(T::Acc::NEG_INFINITY);
        let (unit, mods) = (self.args.unit(), &self.args.mods);
        let factor = mods.softcap.map_or(unit, |cap| 1.0 / cap);
        let mut alphas = [from(1.0); MAX_ROWS];
        let mut cut = false;
        for first in (0..piece.rows).step_by(lanes) {
            let scores = &mut scores[first * BLOCK_ROWS..piece.rows.min(first + lanes) * BLOCK_ROWS];
            let mut peaks = T::V::<I>::zero_block();
            peaks.as_mut().fill(lowest);
            for (r, scores) in scores.chunks_exact_mut(BLOCK_ROWS).enumerate() {
                let query = self.query(piece, first + r);
                let visible = self.args.mask.hull(&query);
                let local = |key: usize| key.clamp(block.start, block.end) - block.start;
                let seen = local(visible.start)..local(visible.end);
                let mut bias = [T::Acc::ZERO; BLOCK_ROWS];
                let biased = self.read_bias(&query, block, &mut bias);
                let pass = RowPass {
                    scale: from(self.args.scale(&query) * factor),
                    cap: mods.softcap.map(|cap| from(unit * cap)),
                    bias: biased.then_some(&bias),
                    unit: from(unit),
                };
                let (peak, hides) = row_scores::<T, I>(scores, (block.len(), seen), pass);
                peaks.as_mut()[r] = peak;
                cut |= hides;
                if mods.normalizer != Normalizer::Softmax {
                    match self.args.emphasis(&query) {
                        Some(emphasis) => map_row(scores, |_, score| emphasis.weigh(mods.normalizer.weight(score))),
                        None => map_row(scores, |_, score| mods.normalizer.weight(score)),
                    }
                    peaks.as_mut()[r] = row_peak::<T, I>(scores);
                }
            }
            if !mods.normalizer.is_exponential() {
                for (r, scores) in scores.chunks_exact_mut(BLOCK_ROWS).enumerate() {
                    row_probabilities::<T, I, Ready>(scores, T::Acc::ZERO, &mut state.l[(first + r) * lanes..][..lanes]);
                }
                continue;
            }
            let step = rows_step::<T, I>(T::V::<I>::load(&state.m[first..]), peaks);
            step.m.store(&mut state.m[first..]);
            step.alpha.store(&mut alphas[first..]);
            let mut bases = [T::Acc::ZERO; MAX_LANES];
            step.base.store(&mut bases);
            for (r, scores) in scores.chunks_exact_mut(BLOCK_ROWS).enumerate() {
                let sums = &mut state.l[(first + r) * lanes..][..lanes];
                T::V::<I>::load(sums).mul(T::V::<I>::splat(alphas[first + r])).store(sums);
                if cut {
                    row_probabilities::<T, I, MaskedExponential>(scores, bases[r], sums);
                } else {
                    row_probabilities::<T, I, Exponential>(scores, bases[r], sums);
                }
            }
        }
        // A last operand of half a pair takes a row of zeros.
        let whole = block.len().next_multiple_of(depth);
        if whole > block.len() {
            values.set(block.len(), zeros);
        }
        if !cut {
            for scores in scores.chunks_exact_mut(BLOCK_ROWS).take(piece.rows) {
                fold::<T, I>(scores, whole);
            }
            let probs = Probabilities { data: scores, row_stride: BLOCK_ROWS, key_step: 1 };
            weigh::accumulate::<T, I>((values, ahead), whole, probs, &alphas[..piece.rows], state.acc);
            return;
        }
        // A hidden key's probability is 0, but 0 times an infinite or NaN value would not be: each row takes what it sees.
        for (r, scores) in scores.chunks_exact_mut(BLOCK_ROWS).take(piece.rows).enumerate() {
            let mut kept = RowBlock::filled(&zeros[..values.width()]);
            let mut count = 0;
            for j in 0..block.len() {
                if scores[j].to_f64().is_sign_positive() {
                    scores[count] = scores[j];
                    kept.set(count, values.row(j));
                    count += 1;
                }
            }
            scores[count..].fill(T::Acc::ZERO);
            let whole = count.next_multiple_of(depth);
            fold::<T, I>(scores, whole);
            let acc = &mut state.acc[r * stride..];
            let probs = Probabilities { data: scores, row_stride: BLOCK_ROWS, key_step: 1 };
            weigh::accumulate::<T, I>((&kept, &kept), whole, probs, &alphas[r..=r], acc);
        }
    }
}

/// Turns `count` probabilities of a row into operands, in place.
#[inline(always)]
fn fold<T: SimdElement, I: Isa>(probs: &mut [T::Acc], count: usize) {
    let lanes = T::V::<I>::LANES;
    let depth = T::Kernel::<I>::DEPTH;
    if depth == 1 {
        return;
    }
    for j in (0..count).step_by(2 * lanes) {
        let pair = [T::V::<I>::load(&probs[j..]), T::V::<I>::load(&probs[j + lanes..])];
        T::Kernel::<I>::fold_adjacent(pair)[0].store(&mut probs[j / depth..]);
    }
}

/// Normalises and writes a row.
#[inline(always)]
fn finish<T: SimdElement, I: Isa>(
    args: &ExactArgs<'_, T>,
    out: &ExactOut<'_, T>,
    query: &Query<'_>,
    acc: &[T::Acc],
    (m, l): (T::Acc, T::Acc),
) {
    let (factor, log_sum) = args.close(query, m, l);
    let [batch, head, token] = query.at();
    weigh::deliver::<T, I>(acc, factor, out.out.row(batch, token, head));
    if let Some(lse) = &out.lse {
        lse.row(batch, token, head)[0] = log_sum;
    }
}

/// Merges the pieces of every row, in the order of the keys.
struct Merge<'a, T: SimdElement> {
    args: &'a ExactArgs<'a, T>,
    out: &'a ExactOut<'a, T>,
    splits: &'a Splits,
    partials: &'a [T::Acc],
    width: usize,
}

impl<T: SimdElement> Task for Merge<'_, T> {
    const MULTIPLIES_BF16: bool = matches!(T::DTYPE, DType::BF16);

    #[inline(always)]
    fn run<I: Isa>(&self, index: usize) {
        let heads = self.splits.kv_heads();
        for first in self.splits.first_pieces(index / heads, index % heads) {
            let piece = self.splits.piece(first);
            if !piece.partial {
                continue;
            }
            for r in 0..piece.rows {
                let query = self.args.query(&piece.segment, piece.kv_head, piece.first_row + r);
                self.row::<I>(first, self.splits.along_keys(index / heads), r, &query);
            }
        }
    }
}

impl<T: SimdElement> Merge<'_, T> {
    #[inline(always)]
    fn row<I: Isa>(&self, first: usize, pieces: usize, r: usize, query: &Query<'_>) {
        let stride = self.width - 2;
        let part = |i: usize| &self.partials[((first + i) * MAX_ROWS + r) * self.width..][..self.width];
        let mut m = T::Acc::NEG_INFINITY;
        for i in 0..pieces {
            let peak = part(i)[stride];
            m = if peak > m { peak } else { m };
        }
        let base = if m > T::Acc::NEG_INFINITY { m.to_f64() } else { 0.0 };
        let mut l = 0.0;
        let mut scratch = Scratch::take::<T::Acc>(stride);
        let acc = &mut scratch.as_mut_slice::<T::Acc>()[..stride];
        acc.fill(T::Acc::ZERO);
        for i in 0..pieces {
            let part = part(i);
            let weight = (part[stride].to_f64() - base).exp2();
            // A piece without visible keys: nothing to add, and 0 times what it holds is not always 0.
            if part[stride + 1] == T::Acc::ZERO {
                continue;
            }
            l += weight * part[stride + 1].to_f64();
            let weight = T::V::<I>::splat(T::Acc::from_f64(weight));
            for d in (0..stride).step_by(T::V::<I>::LANES) {
                let sum = T::V::<I>::load(&part[d..]).mul_add(weight, T::V::<I>::load(&acc[d..]));
                sum.store(&mut acc[d..]);
            }
        }
        finish::<T, I>(self.args, self.out, query, acc, (m, T::Acc::from_f64(l)));
    }
}
