//! Vectors from rows that may end within them.

use crate::simd::{Isa, SimdElement, Vector, VectorKernel};

/// Most lanes of any vector.
pub const MAX_LANES: usize = 16;

#[inline(always)]
fn padded_copy<T: SimdElement, const N: usize>(src: &[T]) -> [T; N] {
    let mut buffer = [T::zeroed(); N];
    let n = src.len().min(N);
    buffer[..n].copy_from_slice(&src[..n]);
    buffer
}

/// Loads a vector, with zeros beyond the end of `src`.
#[inline(always)]
pub fn load_padded<T: SimdElement, I: Isa>(src: &[T]) -> T::V<I> {
    if src.len() >= T::V::<I>::LANES { T::load::<I>(src) } else { T::load::<I>(&padded_copy::<T, MAX_LANES>(src)) }
}

/// Loads adjacent operands, with zeros beyond the end of `src`.
#[inline(always)]
pub fn load_row<T: SimdElement, I: Isa>(src: &[T]) -> T::V<I> {
    if src.len() >= T::V::<I>::LANES * T::Kernel::<I>::DEPTH {
        T::Kernel::<I>::load_row(src)
    } else {
        T::Kernel::<I>::load_row(&padded_copy::<T, { 2 * MAX_LANES }>(src))
    }
}

/// Loads operands of two rows, with zeros beyond their ends.
#[inline(always)]
pub fn load_rows<T: SimdElement, I: Isa>([first, second]: [&[T]; 2]) -> T::V<I> {
    let whole = |row: &[T]| row.len() >= T::V::<I>::LANES;
    if whole(first) && (T::Kernel::<I>::DEPTH == 1 || whole(second)) {
        T::Kernel::<I>::load_rows([first, second])
    } else {
        T::Kernel::<I>::load_rows([&padded_copy::<T, MAX_LANES>(first), &padded_copy::<T, MAX_LANES>(second)])
    }
}
