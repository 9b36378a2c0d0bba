//! Sums of products of small matrices, outputs in the lanes.

use super::load::MAX_LANES;
use super::tile_product;
use crate::dtype::{DType, Float};
use crate::simd::{Isa, Routine, SimdElement, Vector, tile};

/// Rows of [`add_product`] come in multiples of this.
pub const ROW_STEP: usize = 4;

/// Elements of a row that [`add_product`] takes: whole vectors of any instruction set.
pub fn row_width(len: usize) -> usize {
    len.next_multiple_of(MAX_LANES)
}

/// A matrix whose elements are broadcast.
#[derive(Clone, Copy)]
pub struct Factors<'a, E> {
    /// From the first element on.
    pub data: &'a [E],
    /// Elements from one row to the next.
    pub row: usize,
    /// Elements from one column to the next.
    pub step: usize,
}

/// A matrix whose rows are read as vectors.
#[derive(Clone, Copy)]
pub struct Rows<'a, E> {
    /// From the first element on.
    pub data: &'a [E],
    /// Elements from one row to the next.
    pub stride: usize,
    /// Whether no element is infinite or NaN. Else factors of 0 hide rows: 0 times NaN counts as 0.
    pub finite: bool,
}

impl<'a, E> Rows<'a, E> {
    /// Rows of which NaN is not hidden.
    pub fn new(data: &'a [E], stride: usize) -> Self {
        Self { data, stride, finite: true }
    }
}

/// `sums[i][n] += sum over k < depth of factors[i][k] * matrix[k][n]`, in order of `k`, for `rows` rows, a multiple of [`ROW_STEP`].
///
/// Rows of `sums` are `stride` apart; `width` elements of each are computed, see [`row_width`].
#[inline(always)]
pub fn add_product<T: SimdElement, I: Isa>(
    factors: Factors<'_, T::Acc>,
    matrix: Rows<'_, T::Acc>,
    (sums, stride): (&mut [T::Acc], usize),
    size: [usize; 3],
) {
    I::call(Product::<T> { start: Start::Sums, matrix, stride, results: &mut [(factors, sums)], size });
}

/// As [`add_product`], in the place of the sums, and as if all were finite.
#[inline(always)]
pub fn set_product<T: SimdElement, I: Isa>(
    factors: Factors<'_, T::Acc>,
    matrix: Rows<'_, T::Acc>,
    (sums, stride): (&mut [T::Acc], usize),
    size: [usize; 3],
) {
    I::call(Product::<T> { start: Start::Zeros, matrix, stride, results: &mut [(factors, sums)], size });
}

/// Factors, and sums of their products.
pub type Pair<'a, 's, E> = (Factors<'a, E>, &'s mut [E]);

/// What sums begin with.
#[derive(Clone, Copy)]
pub enum Start<'a, E> {
    /// Themselves.
    Sums,
    /// Nothing.
    Zeros,
    /// Themselves, each row times a factor.
    Faded(&'a [E]),
    /// Another matrix with the same distance between rows, each row times a factor.
    FadedFrom(&'a [E], &'a [E]),
}

impl<E> Start<'_, E> {
    /// For the block that begins with a row, at an element.
    #[inline(always)]
    pub(super) fn at(self, row: usize, element: usize) -> Self {
        match self {
            Self::Faded(fades) => Self::Faded(&fades[row..]),
            Self::FadedFrom(fades, from) => Self::FadedFrom(&fades[row..], &from[element..]),
            same => same,
        }
    }
}

/// `sums[i][n] = start[i][n] + sum over k < depth of factors[i][k] * matrix[k][n]`, in order of `k`, for one or several pairs of factors and
/// sums.
pub struct Product<'a, 's, T: SimdElement> {
    /// What is added to. If not to sums, all of the matrix counts as finite.
    pub start: Start<'a, T::Acc>,
    /// `[depth, width]`.
    pub matrix: Rows<'a, T::Acc>,
    /// Factors, `[rows, depth]`, and sums, `[rows, width]`.
    pub results: &'a mut [Pair<'a, 's, T::Acc>],
    /// Elements from one row of sums to the next.
    pub stride: usize,
    /// Rows, a multiple of [`ROW_STEP`], depth, and width, see [`row_width`].
    pub size: [usize; 3],
}

impl<T: SimdElement> Routine for Product<'_, '_, T> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self) {
        let Self { start, matrix, results, stride, size } = self;
        if const { I::HAS_TILES && matches!(T::DTYPE, DType::F32) } && tile_product::takes::<T>(results, &matrix, size) {
            tile_product::multiply::<T, I>(start, matrix, results, stride, size);
            return;
        }
        if !matrix.finite && matches!(start, Start::Sums) {
            for (factors, sums) in results {
                add_seen::<T, I>(*factors, matrix, (sums, stride), size);
            }
            return;
        }
        let ([rows, depth, width], lanes) = (size, T::V::<I>::LANES);
        let mut n = 0;
        while n < width {
            // Two vectors of all rows of the matrix stay in L1 while the rows of the factors take turns.
            let columns = Rows { data: matrix.data.get(n..).unwrap_or_default(), ..matrix };
            let two = n + 2 * lanes <= width;
            for (factors, sums) in &mut *results {
                let mut i = 0;
                while i < rows {
                    let factors = Factors { data: &factors.data[i * factors.row..], ..*factors };
                    let start = start.at(i, i * stride + n);
                    let sums = (&mut sums[i * stride + n..], stride);
                    i += match (I::REGISTERS >= 32 && i + 2 * ROW_STEP <= rows, two) {
                        (true, true) => block::<T, I, { 2 * ROW_STEP }, 2>(start, factors, columns, sums, depth),
                        (true, false) => block::<T, I, { 2 * ROW_STEP }, 1>(start, factors, columns, sums, depth),
                        (false, true) => block::<T, I, ROW_STEP, 2>(start, factors, columns, sums, depth),
                        (false, false) => block::<T, I, ROW_STEP, 1>(start, factors, columns, sums, depth),
                    };
                }
            }
            n += if two { 2 * lanes } else { lanes };
        }
    }
}

/// Handles `N` vectors of `M` rows; returns `M`.
#[inline(always)]
fn block<T: SimdElement, I: Isa, const M: usize, const N: usize>(
    start: Start<'_, T::Acc>,
    factors: Factors<'_, T::Acc>,
    matrix: Rows<'_, T::Acc>,
    (sums, stride): (&mut [T::Acc], usize),
    depth: usize,
) -> usize {
    let lanes = T::V::<I>::LANES;
    let mut acc = [[T::V::<I>::splat(T::Acc::ZERO); N]; M];
    for (r, row) in acc.iter_mut().enumerate() {
        for (v, sum) in row.iter_mut().enumerate() {
            let at = r * stride + v * lanes;
            match start {
                Start::Zeros => {}
                Start::Sums => *sum = T::V::<I>::load(&sums[at..]),
                Start::Faded(fades) => *sum = T::V::<I>::load(&sums[at..]).mul(T::V::<I>::splat(fades[r])),
                Start::FadedFrom(fades, from) => *sum = T::V::<I>::load(&from[at..]).mul(T::V::<I>::splat(fades[r])),
            }
        }
    }
    let acc = tile::<T, T::Kernel<I>, M, N>(factors.data, (factors.row, factors.step), matrix.data, matrix.stride, depth, acc);
    for (r, row) in acc.iter().enumerate() {
        for (v, sum) in row.iter().enumerate() {
            sum.store(&mut sums[r * stride + v * lanes..]);
        }
    }
    M
}

#[inline(always)]
fn add_seen<T: SimdElement, I: Isa>(
    factors: Factors<'_, T::Acc>,
    matrix: Rows<'_, T::Acc>,
    (sums, stride): (&mut [T::Acc], usize),
    [rows, depth, width]: [usize; 3],
) {
    let lanes = T::V::<I>::LANES;
    for i in 0..rows {
        let sums = &mut sums[i * stride..][..width];
        for k in 0..depth {
            let factor = factors.data[i * factors.row + k * factors.step];
            if factor == T::Acc::ZERO {
                continue;
            }
            let factor = T::V::<I>::splat(factor);
            let row = &matrix.data[k * matrix.stride..][..width];
            for (sum, row) in sums.chunks_exact_mut(lanes).zip(row.chunks_exact(lanes)) {
                T::V::<I>::load(row).mul_add(factor, T::V::<I>::load(sum)).store(sum);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::{Level, Task};
    use std::sync::Mutex;

    /// Numbers that bf16 holds, so that nothing is rounded but sums.
    fn numbers(len: usize, seed: usize) -> Vec<f32> {
        (0..len).map(|i| ((i * 37 + seed * 11) % 61) as f32 / 16.0 - 1.75).collect()
    }

    /// Twice the same product, once with factors along their rows and once along their columns.
    struct Both {
        size: [usize; 3],
        start: usize,
        found: Mutex<Vec<Vec<f32>>>,
    }

    impl Both {
        fn stride(&self) -> usize {
            self.size[2] + 16
        }
        fn sums(&self) -> Vec<f32> {
            numbers(self.size[0] * self.stride(), 3)
        }
    }

    impl Task for Both {
        const MULTIPLIES_BF16: bool = false;
        const MULTIPLIES_TILES: bool = true;

        #[inline(always)]
        fn run<I: Isa>(&self, _index: usize) {
            let ([rows, depth, _], stride) = (self.size, self.stride());
            let (factors, matrix) = (numbers(rows * depth, 1), numbers(depth * stride, 2));
            let (fades, from) = (numbers(rows, 4), numbers(rows * stride, 5));
            let transposed: Vec<f32> = (0..rows * depth).map(|at| factors[at % rows * depth + at / rows]).collect();
            let start = [Start::Zeros, Start::Sums, Start::Faded(&fades), Start::FadedFrom(&fades, &from)][self.start];
            let (mut one, mut other) = (self.sums(), self.sums());
            I::call(Product::<f32> {
                start,
                matrix: Rows::new(&matrix, stride),
                results: &mut [
                    (Factors { data: &factors, row: depth, step: 1 }, &mut one),
                    (Factors { data: &transposed, row: 1, step: rows }, &mut other),
                ],
                stride,
                size: self.size,
            });
            self.found.lock().unwrap().extend([one, other]);
        }
    }

    #[test]
    fn products_are_those_of_the_definition_at_every_level() {
        let sizes = [[4, 1, 16], [16, 16, 16], [20, 33, 48], [32, 32, 32], [64, 96, 272], [100, 17, 144], [144, 600, 48]];
        for (size, start) in sizes.into_iter().flat_map(|size| (0..4).map(move |start| (size, start))) {
            let [rows, depth, width] = size;
            for level in Level::available() {
                let both = Both { size, start, found: Mutex::default() };
                level.run(&both, 0);
                let (factors, matrix) = (numbers(rows * depth, 1), numbers(depth * both.stride(), 2));
                let (fades, from, sums) = (numbers(rows, 4), numbers(rows * both.stride(), 5), both.sums());
                for found in both.found.lock().unwrap().iter() {
                    for (i, n) in (0..rows).flat_map(|i| (0..width).map(move |n| (i, n))) {
                        let at = i * both.stride() + n;
                        let begin = [0.0, sums[at], fades[i] * sums[at], fades[i] * from[at]][start];
                        let terms =
                            (0..depth).map(|k| f64::from(factors[i * depth + k]) * f64::from(matrix[k * both.stride() + n]));
                        let want = f64::from(begin) + terms.sum::<f64>();
                        let close = (f64::from(found[at]) - want).abs() <= 1e-5 * (1.0 + depth as f64);
                        assert!(close, "{level:?}, {size:?}, start {start}, row {i}, column {n}: {} is not {want}", found[at]);
                    }
                    let beyond = (0..rows).flat_map(|i| (width..both.stride()).map(move |n| (i, n)));
                    assert!(beyond.map(|(i, n)| i * both.stride() + n).all(|at| found[at].to_bits() == sums[at].to_bits()));
                }
            }
        }
    }
}
