//! Scores of some queries with some keys, their derivatives along a direction, and what both become.

use super::{Direction, ExactArgs};
use crate::index::{Query, Segment};
use crate::kernels::bias::Bias;
use crate::math::elementwise;
use crate::math::exp::exp2;
use crate::math::product::{Factors, ROW_STEP, Rows, add_product, row_width};
use crate::simd::{Isa, Vector, Wide};
use crate::tensor::{AttnShape, Tensor};
use crate::workspace::carve;
use std::ops::Range;

/// Most queries of a tile.
pub const ROWS: usize = 32;
/// Most keys of a tile.
pub const KEYS: usize = 64;
/// Rows of sums over keys: those of a tile may start anywhere, and end with whole steps.
pub const KEY_SUMS: usize = KEYS + ROW_STEP;

/// Query rows of a key/value head of a segment.
#[derive(Clone, Copy)]
pub struct TileRows<'a> {
    /// The segment.
    pub segment: &'a Segment,
    /// The head.
    pub kv_head: usize,
    /// The first row, as [`ExactArgs::query`] counts.
    pub first: usize,
    /// Rows from one to the next.
    pub step: usize,
    /// How many.
    pub count: usize,
}

impl<'a> TileRows<'a> {
    /// Query `i` of the tile.
    #[inline(always)]
    pub fn query<T: Wide>(&self, args: &ExactArgs<'_, T>, i: usize) -> Query<'a> {
        args.query(self.segment, self.kv_head, self.first + i * self.step)
    }

    /// The keys, within `keys`, from the first to the last that some of the queries sees, in blocks.
    pub fn blocks<T: Wide>(&self, args: &ExactArgs<'_, T>, keys: &Range<usize>) -> impl Iterator<Item = Range<usize>> + use<T> {
        let rows = self.first..self.first + (self.count - 1) * self.step + 1;
        let hull = args.hull(self.segment, self.kv_head, rows);
        let (start, end) = (hull.start.max(keys.start), hull.end.min(keys.end));
        (start..end).step_by(KEYS).map(move |first| first..end.min(first + KEYS))
    }
}

/// The segments that cover some of the query rows, or keys, of a sequence, each with what it covers.
pub fn covering<T: Wide>(args: &ExactArgs<'_, T>, batch: usize, rows: Range<usize>) -> Vec<(Segment, Range<usize>)> {
    let group = args.shape.group();
    let part = |segment: Segment| {
        let (first, end) = (segment.q_first * group, (segment.q_first + segment.q_len) * group);
        let part = rows.start.max(first)..rows.end.min(end);
        (segment.q_batch == batch && !part.is_empty()).then(|| (segment, part.start - first..part.end - first))
    };
    (0..args.segment_count()).filter_map(|index| part(args.segment(index))).collect()
}

/// Rows of an array, side by side and filled up with zeros, and their transpose where that is a factor.
struct Operand<'s, T> {
    rows: &'s mut [T],
    columns: Option<&'s mut [T]>,
    width: usize,
    finite: bool,
}

impl<'s, T: Wide> Operand<'s, T> {
    #[expect(clippy::mut_mut, reason = "what is left of the scratch")]
    fn carve(rest: &mut &'s mut [T], capacity: usize, width: usize, transposed: bool) -> Self {
        let rows = carve(rest, capacity * row_width(width));
        let columns = transposed.then(|| carve(rest, width * row_width(capacity)));
        Self { rows, columns, width: row_width(width), finite: true }
    }

    fn matrix(&self) -> Rows<'_, T> {
        Rows { data: self.rows, stride: self.width, finite: self.finite }
    }

    #[inline(always)]
    fn load<'r>(&mut self, rows: impl Iterator<Item = &'r [T]>) {
        self.finite = true;
        let mut count = 0;
        if let Some(columns) = &mut self.columns {
            columns.fill(T::ZERO);
        }
        for (i, row) in rows.enumerate() {
            let out = &mut self.rows[i * self.width..(i + 1) * self.width];
            out[..row.len()].copy_from_slice(row);
            out[row.len()..].fill(T::ZERO);
            for &x in row {
                self.finite &= x.to_f64().is_finite();
            }
            if let Some(columns) = &mut self.columns {
                for (d, &x) in row.iter().enumerate() {
                    columns[d * KEYS + i] = x;
                }
            }
            count += 1;
        }
        self.rows[count * self.width..].fill(T::ZERO);
    }
}

/// What a query needs to turn scores into weights and gradients.
#[derive(Clone, Copy)]
pub struct RowFactors<T> {
    /// The log-sum-exp, in base 2; 0 for a query without a key.
    pub base: T,
    /// Its derivative along the direction.
    pub change: T,
    /// `delta`: what gradients of weights are compared with.
    pub delta: T,
    /// Its derivative along the direction.
    pub delta_change: T,
    /// The factor of gradients of scores.
    pub slope: T,
}

/// Operands and scores of a tile.
pub struct Tile<'s, T> {
    q: Operand<'s, T>,
    q_dot: Option<Operand<'s, T>>,
    d_out: Option<Operand<'s, T>>,
    k: Operand<'s, T>,
    k_dot: Option<Operand<'s, T>>,
    v: Operand<'s, T>,
    v_dot: Option<Operand<'s, T>>,
    /// Scores in base 2, `-inf` where hidden; then weights. `[ROWS, KEYS]`.
    pub s: &'s mut [T],
    /// Derivatives of scores along the direction; then of weights.
    pub s_dot: &'s mut [T],
    /// Gradients of weights; then of scores.
    pub g: &'s mut [T],
    /// Their derivatives along the direction; then of gradients of scores.
    pub g_dot: &'s mut [T],
    bias: &'s mut [T],
}

/// Elements of scratch of a tile, and of sums over its queries and keys.
pub fn scratch_len(shape: &AttnShape) -> usize {
    let (d, d_v) = (row_width(shape.head_dim), row_width(shape.head_dim_v));
    let operands = ROWS * (2 * d + d_v) + 2 * KEYS * (2 * d + 2 * d_v);
    operands + 4 * ROWS * KEYS + KEYS + KEY_SUMS * (d + d_v)
}

impl<'s, T: Wide> Tile<'s, T> {
    /// A tile in `rest`; `gradients` if there is a gradient of the output.
    #[expect(clippy::mut_mut, reason = "what is left of the scratch")]
    pub fn carve(rest: &mut &'s mut [T], shape: &AttnShape, direction: &Direction<'_, T>, gradients: bool) -> Self {
        let (d, d_v) = (shape.head_dim, shape.head_dim_v);
        Self {
            q: Operand::carve(rest, ROWS, d, false),
            q_dot: direction.q.map(|_| Operand::carve(rest, ROWS, d, false)),
            d_out: gradients.then(|| Operand::carve(rest, ROWS, d_v, false)),
            k: Operand::carve(rest, KEYS, d, true),
            k_dot: direction.k.map(|_| Operand::carve(rest, KEYS, d, true)),
            v: Operand::carve(rest, KEYS, d_v, gradients),
            v_dot: direction.v.map(|_| Operand::carve(rest, KEYS, d_v, gradients)),
            s: carve(rest, ROWS * KEYS),
            s_dot: carve(rest, ROWS * KEYS),
            g: carve(rest, ROWS * KEYS),
            g_dot: carve(rest, ROWS * KEYS),
            bias: carve(rest, KEYS),
        }
    }

    /// Reads queries, and the gradients of their outputs.
    #[inline(always)]
    pub fn load_queries(
        &mut self,
        args: &ExactArgs<'_, T>,
        direction: &Direction<'_, T>,
        d_out: Option<Tensor<'_, T>>,
        rows: &TileRows<'_>,
    ) {
        let arrays = [(Some(&mut self.q), Some(args.q)), (self.q_dot.as_mut(), direction.q), (self.d_out.as_mut(), d_out)];
        for (operand, array) in arrays {
            if let (Some(operand), Some(array)) = (operand, array) {
                operand.load((0..rows.count).map(|i| {
                    let [batch, head, token] = rows.query(args, i).at();
                    array.row(batch, token, head)
                }));
            }
        }
    }

    /// Reads keys and values at the positions `keys` of a segment.
    #[inline(always)]
    pub fn load_keys(
        &mut self,
        args: &ExactArgs<'_, T>,
        direction: &Direction<'_, T>,
        (segment, kv_head): (&Segment, usize),
        keys: &Range<usize>,
    ) {
        let places = args.places(segment);
        let arrays = [
            (Some(&mut self.k), Some(args.k)),
            (self.k_dot.as_mut(), direction.k),
            (Some(&mut self.v), Some(args.v)),
            (self.v_dot.as_mut(), direction.v),
        ];
        for (operand, array) in arrays {
            if let (Some(operand), Some(array)) = (operand, array) {
                operand.load(keys.clone().map(|j| {
                    let (batch, token) = places.place(j);
                    array.row(batch, token, kv_head)
                }));
            }
        }
    }

    /// Computes scores and gradients of weights, with their derivatives along the direction, of what was read.
    #[inline(always)]
    pub fn score<I: Isa>(
        &mut self,
        args: &ExactArgs<'_, T>,
        direction: &Direction<'_, T>,
        rows: &TileRows<'_>,
        keys: &Range<usize>,
    ) {
        let count = rows.count;
        let AttnShape { head_dim: d, head_dim_v: d_v, .. } = args.shape;
        for sums in [&mut *self.s, self.s_dot, self.g, self.g_dot] {
            sums.fill(T::ZERO);
        }
        add_scores::<T, I>(Some(&self.q), Some(&self.k), self.s, [count, d]);
        add_scores::<T, I>(self.q_dot.as_ref(), Some(&self.k), self.s_dot, [count, d]);
        add_scores::<T, I>(Some(&self.q), self.k_dot.as_ref(), self.s_dot, [count, d]);
        add_scores::<T, I>(self.d_out.as_ref(), Some(&self.v), self.g, [count, d_v]);
        add_scores::<T, I>(self.d_out.as_ref(), self.v_dot.as_ref(), self.g_dot, [count, d_v]);
        for i in 0..rows.count {
            let query = rows.query(args, i);
            self.modify::<I>(args, direction, (&query, i), keys);
        }
    }

    /// Scales, biases and masks a row.
    #[inline(always)]
    fn modify<I: Isa>(
        &mut self,
        args: &ExactArgs<'_, T>,
        direction: &Direction<'_, T>,
        (query, i): (&Query<'_>, usize),
        keys: &Range<usize>,
    ) {
        let unit = std::f64::consts::LOG2_E;
        let scale = args.scale(query);
        let (s, s_dot) = (&mut self.s[i * KEYS..(i + 1) * KEYS], &mut self.s_dot[i * KEYS..(i + 1) * KEYS]);
        elementwise::scale::<T, I>(s, T::from_f64(scale * unit));
        elementwise::scale::<T, I>(s_dot, T::from_f64(scale));
        let bias = &mut *self.bias;
        let read = |from: &Bias<'_, T>, bias: &mut [T]| {
            from.read(query.at(), keys.start, &mut bias[..keys.len()]);
            bias[keys.len()..].fill(T::ZERO);
        };
        for from in args.biases.iter().filter(|bias| !bias.is_none()) {
            read(from, bias);
            add_biases::<T, I>(s, bias, T::from_f64(unit));
        }
        for from in direction.biases.iter().filter(|bias| !bias.is_none()) {
            read(from, bias);
            add_biases::<T, I>(s_dot, bias, T::from_f64(1.0));
        }
        let slope = args.alibi_slope(query);
        if slope != 0.0 {
            for (j, bias) in bias.iter_mut().enumerate() {
                *bias = T::from_f64(-slope * query.position().abs_diff((keys.start + j) as isize) as f64);
            }
            add_biases::<T, I>(s, bias, T::from_f64(unit));
        }
        for gap in args.mask.gaps(query, keys.clone()).filter(|gap| !gap.is_empty()) {
            s[gap.start - keys.start..gap.end - keys.start].fill(T::NEG_INFINITY);
        }
        s[keys.len()..].fill(T::NEG_INFINITY);
    }

    /// Turns the scores of the tile into weights and their derivatives along the direction.
    #[inline(always)]
    pub fn weigh<I: Isa>(&mut self, rows: &[RowFactors<T>]) {
        let lanes = T::V::<I>::LANES;
        let zero = T::V::<I>::splat(T::ZERO);
        let lowest = T::V::<I>::splat(T::LOWEST);
        for (i, row) in rows.iter().enumerate() {
            let (base, change) = (T::V::<I>::splat(row.base), T::V::<I>::splat(row.change));
            for at in (i * KEYS..(i + 1) * KEYS).step_by(lanes) {
                let score = T::V::<I>::load(&self.s[at..]);
                let p = exp2::<T, I>(score.sub(base));
                let w = p.mul(T::V::<I>::load(&self.s_dot[at..]).sub(change));
                lowest.select_gt(score, zero, p).store(&mut self.s[at..]);
                lowest.select_gt(score, zero, w).store(&mut self.s_dot[at..]);
            }
        }
        self.s[rows.len() * KEYS..].fill(T::ZERO);
        self.s_dot[rows.len() * KEYS..].fill(T::ZERO);
    }

    /// As [`Tile::weigh`], and the gradients of weights into those of scores and their derivatives.
    #[inline(always)]
    pub fn differentiate<I: Isa>(&mut self, rows: &[RowFactors<T>]) {
        let lanes = T::V::<I>::LANES;
        let zero = T::V::<I>::splat(T::ZERO);
        let lowest = T::V::<I>::splat(T::LOWEST);
        for (i, row) in rows.iter().enumerate() {
            let (base, change) = (T::V::<I>::splat(row.base), T::V::<I>::splat(row.change));
            let (delta, delta_change) = (T::V::<I>::splat(row.delta), T::V::<I>::splat(row.delta_change));
            let slope = T::V::<I>::splat(row.slope);
            for at in (i * KEYS..(i + 1) * KEYS).step_by(lanes) {
                let score = T::V::<I>::load(&self.s[at..]);
                let p = exp2::<T, I>(score.sub(base));
                let s_dot = T::V::<I>::load(&self.s_dot[at..]).sub(change);
                let g = T::V::<I>::load(&self.g[at..]).sub(delta);
                let g_dot = g.mul_add(s_dot, T::V::<I>::load(&self.g_dot[at..]).sub(delta_change));
                let scaled = p.mul(slope);
                lowest.select_gt(score, zero, p).store(&mut self.s[at..]);
                lowest.select_gt(score, zero, p.mul(s_dot)).store(&mut self.s_dot[at..]);
                lowest.select_gt(score, zero, scaled.mul(g)).store(&mut self.g[at..]);
                lowest.select_gt(score, zero, scaled.mul(g_dot)).store(&mut self.g_dot[at..]);
            }
        }
        for part in [&mut *self.s, self.s_dot, self.g, self.g_dot] {
            part[rows.len() * KEYS..].fill(T::ZERO);
        }
    }

    /// Adds weighted values, and their derivatives, to those of the queries' outputs along the direction.
    #[inline(always)]
    pub fn add_to_outputs<I: Isa>(&self, sums: &mut [T], keys: usize) {
        add_over_keys::<T, I>(self.s_dot, &self.v, sums, keys);
        if let Some(v_dot) = &self.v_dot {
            add_over_keys::<T, I>(self.s, v_dot, sums, keys);
        }
    }

    /// Adds to the derivatives of the queries' gradients.
    #[inline(always)]
    pub fn add_to_queries<I: Isa>(&self, sums: &mut [T], keys: usize) {
        add_over_keys::<T, I>(self.g_dot, &self.k, sums, keys);
        if let Some(k_dot) = &self.k_dot {
            add_over_keys::<T, I>(self.g, k_dot, sums, keys);
        }
    }

    /// Adds to the derivatives of the gradients of keys and values.
    #[inline(always)]
    pub fn add_to_keys<I: Isa>(&self, (k_sums, v_sums): (&mut [T], &mut [T]), rows: usize, keys: usize) {
        add_over_rows::<T, I>(self.g_dot, Some(&self.q), k_sums, [keys, rows]);
        add_over_rows::<T, I>(self.g, self.q_dot.as_ref(), k_sums, [keys, rows]);
        add_over_rows::<T, I>(self.s_dot, self.d_out.as_ref(), v_sums, [keys, rows]);
    }
}

/// Adds the products of `count` queries and all keys.
#[inline(always)]
fn add_scores<T: Wide, I: Isa>(
    queries: Option<&Operand<'_, T>>,
    keys: Option<&Operand<'_, T>>,
    sums: &mut [T],
    [count, depth]: [usize; 2],
) {
    if let (Some(queries), Some(columns)) = (queries, keys.and_then(|keys| keys.columns.as_ref())) {
        let factors = Factors { data: queries.rows, row: queries.width, step: 1 };
        let size = [count.next_multiple_of(ROW_STEP), depth, KEYS];
        add_product::<T, I>(factors, Rows::new(columns, KEYS), (sums, KEYS), size);
    }
}

#[inline(always)]
fn add_over_keys<T: Wide, I: Isa>(factors: &[T], operand: &Operand<'_, T>, sums: &mut [T], keys: usize) {
    let factors = Factors { data: factors, row: KEYS, step: 1 };
    add_product::<T, I>(factors, operand.matrix(), (sums, operand.width), [ROWS, keys, operand.width]);
}

#[inline(always)]
fn add_over_rows<T: Wide, I: Isa>(factors: &[T], operand: Option<&Operand<'_, T>>, sums: &mut [T], [keys, rows]: [usize; 2]) {
    if let Some(operand) = operand {
        let factors = Factors { data: factors, row: 1, step: KEYS };
        let size = [keys.next_multiple_of(ROW_STEP), rows, operand.width];
        add_product::<T, I>(factors, operand.matrix(), (sums, operand.width), size);
    }
}

/// `row + unit * bias`; `-inf` where the bias is, whatever the score.
#[inline(always)]
fn add_biases<T: Wide, I: Isa>(row: &mut [T], bias: &[T], unit: T) {
    let lanes = T::V::<I>::LANES;
    let (unit, lowest) = (T::V::<I>::splat(unit), T::V::<I>::splat(T::LOWEST));
    let hidden = T::V::<I>::splat(T::NEG_INFINITY);
    for (x, bias) in row.chunks_exact_mut(lanes).zip(bias.chunks_exact(lanes)) {
        let bias = T::V::<I>::load(bias);
        lowest.select_gt(bias, hidden, bias.mul_add(unit, T::V::<I>::load(x))).store(x);
    }
}
