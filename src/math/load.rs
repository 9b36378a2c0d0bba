//! Vectors from rows that may end within them.

use crate::dtype::Float;
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

/// Loads adjacent vectors.
#[inline(always)]
pub fn load_adjacent<V: Vector, const N: usize>(src: &[V::Elem]) -> [V; N] {
    let src = &src[..N * V::LANES];
    let mut vectors = [V::splat(V::Elem::ZERO); N];
    for (i, vector) in vectors.iter_mut().enumerate() {
        *vector = V::load(&src[i * V::LANES..]);
    }
    vectors
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

/// Widens a row, with zeros to the end of the vector that it ends in.
#[inline(always)]
pub fn widen<T: SimdElement, I: Isa>(row: &[T], into: &mut [T::Acc]) {
    let mut d = 0;
    while d < row.len() {
        load_padded::<T, I>(&row[d..]).store(&mut into[d..]);
        d += T::V::<I>::LANES;
    }
}

/// Rounds a row of whole vectors into `out`, as far as that goes.
#[inline(always)]
pub fn narrow<T: SimdElement, I: Isa>(row: &[T::Acc], out: &mut [T]) {
    let mut d = 0;
    while d < out.len() {
        store_padded::<T, I>(T::V::<I>::load(&row[d..]), &mut out[d..]);
        d += T::V::<I>::LANES;
    }
}

/// Rounds a vector into `out`, as far as that goes.
#[inline(always)]
pub fn store_padded<T: SimdElement, I: Isa>(v: T::V<I>, out: &mut [T]) {
    if out.len() >= T::V::<I>::LANES {
        T::store::<I>(v, out);
    } else {
        let mut buffer = [T::zeroed(); MAX_LANES];
        T::store::<I>(v, &mut buffer);
        out.copy_from_slice(&buffer[..out.len()]);
    }
}

/// As [`store_padded`]; whole vectors past the caches if asked for, see [`SimdElement::store_past_caches`].
#[inline(always)]
pub fn store_output<T: SimdElement, I: Isa>(v: T::V<I>, out: &mut [T], past_caches: bool) {
    if past_caches && out.len() >= T::V::<I>::LANES {
        T::store_past_caches::<I>(v, out);
    } else {
        store_padded::<T, I>(v, out);
    }
}

/// Writes `factor` times a row of accumulators, which has whole vectors; past the caches as [`store_output`].
#[inline(always)]
pub fn store_scaled<T: SimdElement, I: Isa>(sums: &[T::Acc], factor: T::Acc, out: &mut [T], past_caches: bool) {
    let lanes = T::V::<I>::LANES;
    let factor = T::V::<I>::splat(factor);
    let mut d = 0;
    while d < out.len() {
        store_output::<T, I>(T::V::<I>::load(&sums[d..]).mul(factor), &mut out[d..], past_caches);
        d += lanes;
    }
}

/// Adds `factor` times a row of accumulators, which has whole vectors, to another.
#[inline(always)]
pub fn add_scaled<T: SimdElement, I: Isa>(sums: &[T::Acc], factor: T::Acc, out: &mut [T::Acc]) {
    let lanes = T::V::<I>::LANES;
    let factors = T::V::<I>::splat(factor);
    let whole = out.len() / lanes * lanes;
    for d in (0..whole).step_by(lanes) {
        T::V::<I>::load(&sums[d..]).mul_add(factors, T::V::<I>::load(&out[d..])).store(&mut out[d..]);
    }
    let (mut buffer, rest) = ([T::Acc::ZERO; MAX_LANES], out.len() - whole);
    if rest > 0 {
        buffer[..rest].copy_from_slice(&out[whole..]);
        T::V::<I>::load(&sums[whole..]).mul_add(factors, T::V::<I>::load(&buffer)).store(&mut buffer);
        out[whole..].copy_from_slice(&buffer[..rest]);
    }
}

/// Adds to `residue`, which is 0 as long as all elements are finite and NaN otherwise.
#[inline(always)]
pub fn add_residue<T: SimdElement, I: Isa>(row: &[T], mut residue: T::V<I>) -> T::V<I> {
    for chunk in row.chunks(T::V::<I>::LANES) {
        let x = load_padded::<T, I>(chunk);
        residue = residue.add(x.sub(x));
    }
    residue
}

/// Whether all lanes are 0.
#[inline(always)]
pub fn is_zero<T: SimdElement, I: Isa>(v: T::V<I>) -> bool {
    let mut lanes = [T::Acc::ZERO; MAX_LANES];
    v.store(&mut lanes);
    lanes.iter().all(|&x| x == T::Acc::ZERO)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::{Level, Task};
    use half::{bf16, f16};
    use std::sync::Mutex;

    /// Of each offset from an aligned address and each length: what was written, and what surrounds it.
    struct AllPlaces<T: SimdElement>(Mutex<Vec<Vec<T>>>);

    /// Elements whose first one begins a cache line.
    #[repr(align(64))]
    struct Lines<T>([T; 48]);

    impl<T: SimdElement> Task for AllPlaces<T> {
        const MULTIPLIES_BF16: bool = false;

        #[inline(always)]
        fn run<I: Isa>(&self, index: usize) {
            let numbers: [T::Acc; MAX_LANES] = std::array::from_fn(|i| T::Acc::from_f64(i as f64 + 1.0));
            for (first, len) in (0..=MAX_LANES).flat_map(|first| (0..=T::V::<I>::LANES).map(move |len| (first, len))) {
                let mut lines = Lines([T::zeroed(); 48]);
                store_output::<T, I>(T::V::<I>::load(&numbers), &mut lines.0[first..first + len], index == 1);
                crate::simd::finish_stores();
                self.0.lock().unwrap().push(lines.0.to_vec());
            }
        }
    }

    fn check<T: SimdElement>() {
        for level in Level::available() {
            let [plain, past] = [0, 1].map(|index| {
                let all = AllPlaces::<T>(Mutex::default());
                level.run(&all, index);
                all.0.into_inner().unwrap()
            });
            let per_offset = plain.len() / (MAX_LANES + 1);
            for (place, (plain, past)) in plain.iter().zip(&past).enumerate() {
                let (first, len) = (place / per_offset, place % per_offset);
                for (i, (plain, past)) in plain.iter().zip(past).enumerate() {
                    let want = if (first..first + len).contains(&i) { (i - first) as f64 + 1.0 } else { 0.0 };
                    let found = [plain, past].map(|x| x.to_acc().to_f64());
                    assert!(found.iter().all(|x| x.to_bits() == want.to_bits()), "{level:?}, {first}, {len}, {i}: {found:?}");
                }
            }
        }
    }

    #[test]
    fn outputs_are_written_wherever_they_lie() {
        check::<f32>();
        check::<f64>();
        check::<bf16>();
        check::<f16>();
    }
}
