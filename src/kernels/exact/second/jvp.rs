//! The derivatives of the output and of its log-sum-exp along a direction.

use super::tile::{KEYS, ROWS, RowFactors, Tile, TileRows, covering, scratch_len};
use super::{Direction, ExactArgs};
use crate::math::exp::exp2;
use crate::math::load::MAX_LANES;
use crate::math::product::row_width;
use crate::parallel::{RowWriter, for_each_tile};
use crate::simd::{Isa, Level, Task, Vector, Wide};
use crate::tensor::Tensor;
use crate::workspace::{Scratch, carve};

/// Where the derivatives go.
pub struct JvpOut<'a, 'd, T> {
    /// Of the output, `[B, Sq, H, Dv]`.
    pub out: Option<&'a RowWriter<'d, T>>,
    /// Of the log-sum-exp, as `[B, Sq, H, 1]`; 0 for a query without a key.
    pub lse: Option<&'a RowWriter<'d, T>>,
    /// Of the product of the output with an array `[B, Sq, H, Dv]`, as `[B, Sq, H, 1]`.
    pub product: Option<(Tensor<'a, T>, &'a RowWriter<'d, T>)>,
}

/// Computes the derivatives with up to `threads` threads. Results do not depend on how many.
pub fn jvp<T: Wide>(
    args: &ExactArgs<'_, T>,
    direction: &Direction<'_, T>,
    out: &JvpOut<'_, '_, T>,
    level: Level,
    threads: usize,
) {
    let task = JvpTask { args, direction, out, tiles: query_tiles(args) };
    for_each_tile(level, threads, args.shape.batch * args.shape.num_kv_heads * task.tiles, &task);
}

/// Tiles of query rows of a key/value head of a sequence.
pub fn query_tiles<T: Wide>(args: &ExactArgs<'_, T>) -> usize {
    (args.shape.seqlen_q * args.shape.group()).div_ceil(ROWS)
}

struct JvpTask<'a, 'd, T: Wide> {
    args: &'a ExactArgs<'a, T>,
    direction: &'a Direction<'a, T>,
    out: &'a JvpOut<'a, 'd, T>,
    tiles: usize,
}

impl<T: Wide> Task for JvpTask<'_, '_, T> {
    const MULTIPLIES_BF16: bool = false;

    #[inline(always)]
    fn run<I: Isa>(&self, index: usize) {
        let (args, shape) = (self.args, &self.args.shape);
        let (head, first) = (index / self.tiles, index % self.tiles * ROWS);
        let (batch, kv_head) = (head / shape.num_kv_heads, head % shape.num_kv_heads);
        let rows = first..(first + ROWS).min(shape.seqlen_q * shape.group());
        let mut scratch = Scratch::take::<T>(scratch_len(shape));
        let mut rest = scratch.as_mut_slice::<T>();
        let mut tile = Tile::carve(&mut rest, shape, self.direction, false);
        let width = row_width(shape.head_dim_v);
        let sums = carve(&mut rest, ROWS * width);
        let mut covered = [false; ROWS];
        for (segment, part) in covering(args, batch, rows.clone()) {
            let rows = TileRows { segment: &segment, kv_head, first: part.start, step: 1, count: part.len() };
            sums.fill(T::ZERO);
            let factors = self.sweep::<I>(&mut tile, &rows, sums);
            for (i, factors) in factors[..rows.count].iter().enumerate() {
                let at = rows.query(args, i).at();
                covered[at[2] * shape.group() + at[1] % shape.group() - first] = true;
                self.write(at, &sums[i * width..][..shape.head_dim_v], factors.change);
            }
        }
        let group = shape.group();
        for row in rows.filter(|row| !covered[row - first]) {
            sums.fill(T::ZERO);
            self.write([batch, kv_head * group + row % group, row / group], &sums[..shape.head_dim_v], T::ZERO);
        }
    }
}

impl<T: Wide> JvpTask<'_, '_, T> {
    /// Adds up the derivatives of the outputs of some queries.
    #[inline(always)]
    fn sweep<I: Isa>(&self, tile: &mut Tile<'_, T>, rows: &TileRows<'_>, sums: &mut [T]) -> [RowFactors<T>; ROWS] {
        let (args, direction) = (self.args, self.direction);
        let place = (rows.segment, rows.kv_head);
        tile.load_queries(args, direction, None, rows);
        let mut running = [Running { m: T::NEG_INFINITY, l: T::ZERO, change: T::ZERO }; ROWS];
        for keys in rows.blocks(args, &(0..usize::MAX)) {
            tile.load_keys(args, direction, place, &keys);
            tile.score::<I>(args, direction, rows, &keys);
            for (i, state) in running[..rows.count].iter_mut().enumerate() {
                let at = i * KEYS..(i + 1) * KEYS;
                state.fold::<I>(&tile.s[at.clone()], &tile.s_dot[at]);
            }
        }
        let zero = T::ZERO;
        let mut factors = [RowFactors { base: zero, change: zero, delta: zero, delta_change: zero, slope: zero }; ROWS];
        for (i, (factors, state)) in factors[..rows.count].iter_mut().zip(&running).enumerate() {
            let (share, lse) = args.close(&rows.query(args, i), state.m, state.l);
            factors.base = base(lse);
            factors.change = T::from_f64(state.change.to_f64() * share.to_f64());
        }
        for keys in rows.blocks(args, &(0..usize::MAX)) {
            tile.load_keys(args, direction, place, &keys);
            tile.score::<I>(args, direction, rows, &keys);
            tile.weigh::<I>(&factors[..rows.count]);
            tile.add_to_outputs::<I>(sums, keys.len());
        }
        factors
    }

    fn write(&self, [batch, head, token]: [usize; 3], out: &[T], lse: T) {
        if let Some(writer) = self.out.out {
            writer.row(batch, token, head).copy_from_slice(out);
        }
        if let Some(writer) = self.out.lse {
            writer.row(batch, token, head)[0] = lse;
        }
        if let Some((other, writer)) = self.out.product {
            let dot: f64 = out.iter().zip(other.row(batch, token, head)).map(|(&x, &y)| x.to_f64() * y.to_f64()).sum();
            writer.row(batch, token, head)[0] = T::from_f64(dot);
        }
    }
}

/// A log-sum-exp in base 2; 0 for none.
pub fn base<T: Wide>(lse: T) -> T {
    if lse == T::NEG_INFINITY { T::ZERO } else { T::from_f64(lse.to_f64() * std::f64::consts::LOG2_E) }
}

/// The online softmax of a query: maximum, sum of weights, and of weights times derivatives of scores.
#[derive(Clone, Copy)]
struct Running<T> {
    m: T,
    l: T,
    change: T,
}

impl<T: Wide> Running<T> {
    #[inline(always)]
    fn fold<I: Isa>(&mut self, s: &[T], s_dot: &[T]) {
        let lanes = T::V::<I>::LANES;
        let zero = T::V::<I>::splat(T::ZERO);
        let lowest = T::V::<I>::splat(T::LOWEST);
        let mut peak = T::V::<I>::splat(T::NEG_INFINITY);
        for s in s.chunks_exact(lanes) {
            peak = peak.max(T::V::<I>::load(s));
        }
        let m = stored::<T, I>(peak)[..lanes].iter().fold(self.m, |m, &x| if x > m { x } else { m });
        let base = if m == T::NEG_INFINITY { T::ZERO } else { m };
        let mut sums = [zero; 2];
        for (s, s_dot) in s.chunks_exact(lanes).zip(s_dot.chunks_exact(lanes)) {
            let s = T::V::<I>::load(s);
            let p = exp2::<T, I>(s.sub(T::V::<I>::splat(base)));
            sums[0] = sums[0].add(lowest.select_gt(s, zero, p));
            sums[1] = sums[1].add(lowest.select_gt(s, zero, p.mul(T::V::<I>::load(s_dot))));
        }
        let alpha = (self.m.to_f64() - base.to_f64()).exp2();
        self.m = m;
        self.l = T::from_f64(self.l.to_f64() * alpha + total::<T, I>(sums[0]));
        self.change = T::from_f64(self.change.to_f64() * alpha + total::<T, I>(sums[1]));
    }
}

#[inline(always)]
fn stored<T: Wide, I: Isa>(v: T::V<I>) -> [T; MAX_LANES] {
    let mut lanes = [T::ZERO; MAX_LANES];
    v.store(&mut lanes);
    lanes
}

#[inline(always)]
fn total<T: Wide, I: Isa>(v: T::V<I>) -> f64 {
    stored::<T, I>(v)[..T::V::<I>::LANES].iter().map(|x| x.to_f64()).sum()
}
