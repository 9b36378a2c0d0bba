//! `delta` of every query: what the gradients of its weights are compared with.

use super::BackwardArgs;
use crate::dtype::{DType, Float};
use crate::math::load::{MAX_LANES, load_padded};
use crate::parallel::{RowWriter, for_each_tile};
use crate::simd::{Isa, Level, SimdElement, Task, Vector};

/// Rows of a task.
pub const ROWS: usize = 256;

struct Deltas<'a, T: SimdElement> {
    args: &'a BackwardArgs<'a, T>,
    out: &'a RowWriter<'a, T::Acc>,
}

/// `delta`, `[B, Sq, H]`.
pub fn deltas<T: SimdElement>(args: &BackwardArgs<'_, T>, level: Level, threads: usize) -> Vec<T::Acc> {
    let [batches, tokens, heads, _] = args.out.shape();
    let rows = batches * tokens * heads;
    let mut deltas = vec![T::Acc::ZERO; rows];
    let out = RowWriter::new(&mut deltas, [1, rows, 1, 1], [rows, 1, 1]);
    for_each_tile(level, threads, rows.div_ceil(ROWS), &Deltas { args, out: &out });
    drop(out);
    deltas
}

impl<T: SimdElement> Task for Deltas<'_, T> {
    const MULTIPLIES_BF16: bool = matches!(T::DTYPE, DType::BF16);

    #[inline(always)]
    fn run<I: Isa>(&self, index: usize) {
        let args = self.args;
        let [batches, tokens, heads, _] = args.out.shape();
        let rows = batches * tokens * heads;
        for row in index * ROWS..((index + 1) * ROWS).min(rows) {
            let (batch, token, head) = (row / heads / tokens, row / heads % tokens, row % heads);
            let (out, d_out) = (args.out.row(batch, token, head), args.d_out.row(batch, token, head));
            let dot = dot::<T, I>(out, d_out);
            self.out.row(0, row, 0)[0] = T::Acc::from_f64(args.state_at([batch, head, token], || dot).delta);
        }
    }
}

#[inline(always)]
fn dot<T: SimdElement, I: Isa>(a: &[T], b: &[T]) -> f64 {
    let lanes = T::V::<I>::LANES;
    let mut sums = T::V::<I>::splat(T::Acc::ZERO);
    for (a, b) in a.chunks(lanes).zip(b.chunks(lanes)) {
        sums = load_padded::<T, I>(a).mul_add(load_padded::<T, I>(b), sums);
    }
    let mut parts = [T::Acc::ZERO; MAX_LANES];
    sums.store(&mut parts);
    parts.iter().map(|part| part.to_f64()).sum()
}
