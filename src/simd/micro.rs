//! The register tile: `M` broadcast operands times `N` vectors, accumulated over `depth` operands.

use super::{SimdElement, Vector, VectorKernel};

/// `acc[i][v] + sum over d of a[i * a_row + d * a_step] . b[d * b_step ..][v]`, all sums in order of `d`.
///
/// Per step: `N` vector loads and `M` broadcasts feed `M * N` multiply-accumulates, so that with two loads a cycle the tile is
/// bound by arithmetic as soon as `M * N >= M + N`.
///
/// # Panics
/// When an operand lies beyond `a` or `b`.
#[inline(always)]
#[expect(unsafe_code, reason = "bounds of both operands are asserted once, outside the loop")]
pub fn tile<T: SimdElement, K: VectorKernel<T>, const M: usize, const N: usize>(
    a: &[T::Acc],
    (a_row, a_step): (usize, usize),
    b: &[T::Acc],
    b_step: usize,
    depth: usize,
    mut acc: [[K::V; N]; M],
) -> [[K::V; N]; M] {
    let Some(last) = depth.checked_sub(1) else { return acc };
    assert!((M - 1) * a_row + last * a_step < a.len(), "tile: `a` is too short");
    assert!(last * b_step + N * K::V::LANES <= b.len(), "tile: `b` is too short");
    let mut b_at = b.as_ptr();
    let mut a_at = a.as_ptr();
    for _ in 0..depth {
        let mut columns = [K::V::splat(<T::Acc as crate::dtype::Float>::ZERO); N];
        for (v, column) in columns.iter_mut().enumerate() {
            // SAFETY: `b_at` is at step `d <= last`, so `v * LANES + LANES <= N * LANES` elements from it are within `b`.
            *column = K::V::load(unsafe { std::slice::from_raw_parts(b_at.add(v * K::V::LANES), K::V::LANES) });
        }
        for (i, acc) in acc.iter_mut().enumerate() {
            // SAFETY: `a_at` is at step `d <= last`, and `i <= M - 1`.
            let x = K::V::splat(unsafe { *a_at.add(i * a_row) });
            for (sum, &column) in acc.iter_mut().zip(&columns) {
                *sum = K::mul_acc(x, column, *sum);
            }
        }
        a_at = a_at.wrapping_add(a_step);
        b_at = b_at.wrapping_add(b_step);
    }
    acc
}
