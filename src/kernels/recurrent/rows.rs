//! Rows of inputs as the loops take them, and states on their way in and out.

use super::{RecurrentArgs, Sequence};
use crate::dtype::{Element, Float};
use crate::math::elementwise::{scale, sum_of_lanes};
use crate::math::load::{MAX_LANES, load_padded, load_row, store_output, store_scaled};
use crate::parallel::RowWriter;
use crate::simd::{Isa, SimdElement, Vector, VectorKernel, Wide, prefetch};
use crate::tensor::Tensor;

/// What is added to a squared length before it divides, as in flash-linear-attention.
const L2_EPS: f64 = 1e-6;

/// Products of rows whose squares sum to less than this are far from overflow.
const LARGE_SQUARE: f64 = (1u64 << 60) as f64;

/// Writes one row of inputs, zeros beyond it up to the end of `into`, which has whole vectors.
#[inline(always)]
pub fn load<T: SimdElement, I: Isa>(row: &[T], into: &mut [T::Acc]) {
    let mut d = 0;
    while d < into.len() {
        load_padded::<T, I>(row.get(d..).unwrap_or_default()).store(&mut into[d..]);
        d += T::V::<I>::LANES;
    }
}

/// What brings a row to length 1.
pub fn inverse_length<T: Element>(row: &[T]) -> f64 {
    inverse(row.iter().map(|x| x.to_acc().to_f64().powi(2)).sum())
}

fn inverse(square: f64) -> f64 {
    1.0 / (square + L2_EPS).sqrt()
}

/// As [`inverse_length`], from sums of accumulators as long as those do not overflow.
#[inline(always)]
fn inverse_length_by_vectors<T: SimdElement, I: Isa>(row: &[T]) -> f64 {
    let lanes = T::V::<I>::LANES;
    let mut sums = [T::V::<I>::splat(T::Acc::ZERO); 2];
    let mut d = 0;
    while d < row.len() {
        for sum in &mut sums {
            let x = load_padded::<T, I>(row.get(d..).unwrap_or_default());
            *sum = x.mul_add(x, *sum);
            d += lanes;
        }
    }
    let square = sum_of_lanes::<T, I>(sums[0].add(sums[1]));
    if square.is_finite() { inverse(square) } else { inverse_length(row) }
}

/// The rows of a head of queries or keys.
#[derive(Clone, Copy)]
pub struct HeadRows<'a, T> {
    /// The array.
    pub tensor: Tensor<'a, T>,
    /// Which head of it.
    pub head: usize,
    /// What rows are multiplied by.
    pub factor: f64,
    /// Whether they are divided by their lengths first.
    pub l2norm: bool,
}

impl<T: SimdElement> HeadRows<'_, T> {
    /// Requests the row of a token: rows of one head lie too far apart for the machine to see what comes next.
    #[inline(always)]
    pub fn prefetch(&self, sequence: &Sequence, token: usize) {
        if token < sequence.len {
            prefetch(self.tensor.row(sequence.batch, sequence.first + token, self.head));
        }
    }

    /// Writes the row of a token.
    #[inline(always)]
    pub fn read<I: Isa>(&self, sequence: &Sequence, token: usize, into: &mut [T::Acc])
    where
        T::Acc: Wide,
    {
        load::<T, I>(self.tensor.row(sequence.batch, sequence.first + token, self.head), into);
        let factor = if self.l2norm { self.factor * inverse_length_by_vectors::<T::Acc, I>(into) } else { self.factor };
        if factor.to_bits() != 1f64.to_bits() {
            scale::<T::Acc, I>(into, T::Acc::from_f64(factor));
        }
    }
}

impl<T: SimdElement> HeadRows<'_, T> {
    /// Writes the row of a token as operands of products, zeros beyond it; returns sums of its squares, and only of those if lengths matter.
    #[inline(always)]
    pub fn read_operands<I: Isa>(&self, sequence: &Sequence, token: usize, into: &mut [T::Acc]) -> T::V<I> {
        let row = self.tensor.row(sequence.batch, sequence.first + token, self.head);
        let mut sums = [T::V::<I>::splat(T::Acc::ZERO); 2];
        let mut d = 0;
        while d < into.len() {
            let operands = load_row::<T, I>(row.get(d * T::Kernel::<I>::DEPTH..).unwrap_or_default());
            operands.store(&mut into[d..]);
            if self.l2norm {
                sums = [T::Kernel::<I>::mul_acc(operands, operands, sums[1]), sums[0]];
            }
            d += T::V::<I>::LANES;
        }
        sums[0].add(sums[1])
    }

    /// What the operands of a row are to be multiplied by, given the sum of its squares. A row whose products could overflow before that is
    /// written anew, times a power of two.
    #[inline(always)]
    pub fn factor_of<I: Isa>(&self, sequence: &Sequence, token: usize, square: f64, operands: &mut [T::Acc]) -> f64 {
        if !self.l2norm {
            return self.factor;
        }
        if square < LARGE_SQUARE {
            return self.factor * inverse(square);
        }
        let row = self.tensor.row(sequence.batch, sequence.first + token, self.head);
        let inverse = inverse_length(row);
        let power = if inverse > 0.0 { inverse.log2().floor().exp2() } else { 1.0 };
        for d in (0..operands.len()).step_by(T::V::<I>::LANES) {
            let mut scaled = [T::zeroed(); 2 * MAX_LANES];
            for (scaled, x) in scaled.iter_mut().zip(row.get(d * T::Kernel::<I>::DEPTH..).unwrap_or_default()) {
                *scaled = T::from_acc(T::Acc::from_f64(x.to_acc().to_f64() * power));
            }
            load_row::<T, I>(&scaled).store(&mut operands[d..]);
        }
        self.factor * (inverse / power)
    }
}

impl<'a, T: Element> RecurrentArgs<'a, T> {
    /// The scaled queries of a value head.
    pub(super) fn queries(&self, value_head: usize) -> HeadRows<'a, T> {
        HeadRows { tensor: self.q, head: self.shape.head_of(value_head), factor: self.scale, l2norm: self.l2norm }
    }

    /// The keys of a value head.
    pub(super) fn keys(&self, value_head: usize) -> HeadRows<'a, T> {
        HeadRows { tensor: self.k, factor: 1.0, ..self.queries(value_head) }
    }

    /// Rows of queries' shape as they are.
    pub(super) fn plain(&self, tensor: Tensor<'a, T>, value_head: usize) -> HeadRows<'a, T> {
        HeadRows { tensor, head: self.shape.head_of(value_head), factor: 1.0, l2norm: false }
    }
}

impl<T: SimdElement> HeadRows<'_, T> {
    /// Writes the gradient of a row from that of what [`HeadRows::read`] makes of it.
    #[inline(always)]
    pub fn write_gradient<I: Isa>(&self, (batch, token): (usize, usize), found: &[T::Acc], into: &RowWriter<'_, T>)
    where
        T::Acc: Wide,
    {
        let (into, past_caches) = (into.row(batch, token, self.head), into.passes_caches());
        if !self.l2norm {
            store_scaled::<T, I>(found, T::Acc::from_f64(self.factor), into, past_caches);
            return;
        }
        let (row, lanes) = (self.tensor.row(batch, token, self.head), T::V::<I>::LANES);
        let inverse = inverse_length_by_vectors::<T, I>(row);
        let splat = |x: f64| T::V::<I>::splat(T::Acc::from_f64(x));
        // Of the unit vector `x` and the gradient `g` with respect to it: (g - (g . x) x) / length.
        let (to_unit, factor) = (splat(inverse), splat(self.factor * inverse));
        let mut along = splat(0.0);
        for d in (0..row.len()).step_by(lanes) {
            let x = load_padded::<T, I>(&row[d..]).mul(to_unit);
            along = x.mul_add(T::V::<I>::load(&found[d..]), along);
        }
        let along = splat(-sum_of_lanes::<T, I>(along));
        for d in (0..row.len()).step_by(lanes) {
            let x = load_padded::<T, I>(&row[d..]).mul(to_unit);
            let across = x.mul_add(along, T::V::<I>::load(&found[d..]));
            store_output::<T, I>(across.mul(factor), &mut into[d..], past_caches);
        }
    }
}
