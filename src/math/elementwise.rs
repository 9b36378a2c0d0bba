//! Arithmetic on rows of whole vectors.

use super::exp::exp2;
use super::load::{MAX_LANES, is_zero};
use crate::dtype::Float;
use crate::simd::{Isa, Routine, SimdElement, Vector};

/// Runs `body` at the start of each vector of `len` elements. Iterators over chunks would divide, which takes longer than short rows.
macro_rules! each_vector {
    ($T:ty, $I:ty, $len:expr, $at:ident, $body:block) => {
        let mut $at = 0;
        while $at < $len {
            $body
            $at += <$T as SimdElement>::V::<$I>::LANES;
        }
    };
}

/// `row *= factor`.
#[inline(always)]
pub fn scale<T: SimdElement, I: Isa>(row: &mut [T::Acc], factor: T::Acc) {
    let factor = T::V::<I>::splat(factor);
    each_vector!(T, I, row.len(), d, {
        T::V::<I>::load(&row[d..]).mul(factor).store(&mut row[d..]);
    });
}

/// What fades below this is gone.
const TINY: f64 = 1e-30;

/// `row *= fade`; what comes near denormals becomes 0.
#[inline(always)]
pub fn fade_away<T: SimdElement, I: Isa>(row: &mut [T::Acc], fade: T::Acc) {
    let (zero, tiny) = (T::V::<I>::splat(T::Acc::ZERO), T::V::<I>::splat(T::Acc::from_f64(TINY)));
    let fade = T::V::<I>::splat(fade);
    each_vector!(T, I, row.len(), d, {
        let x = T::V::<I>::load(&row[d..]).mul(fade);
        // NaN is neither above nor below.
        x.max(zero.sub(x)).select_gt(tiny, x, zero).add(x.sub(x)).store(&mut row[d..]);
    });
}

/// `row *= factors`, element by element.
#[inline(always)]
pub fn multiply<T: SimdElement, I: Isa>(row: &mut [T::Acc], factors: &[T::Acc]) {
    each_vector!(T, I, row.len(), d, {
        T::V::<I>::load(&row[d..]).mul(T::V::<I>::load(&factors[d..])).store(&mut row[d..]);
    });
}

/// `row = factor * (row - other)`.
#[inline(always)]
pub fn subtract_and_scale<T: SimdElement, I: Isa>(row: &mut [T::Acc], other: &[T::Acc], factor: T::Acc) {
    let factor = T::V::<I>::splat(factor);
    each_vector!(T, I, row.len(), d, {
        T::V::<I>::load(&row[d..]).sub(T::V::<I>::load(&other[d..])).mul(factor).store(&mut row[d..]);
    });
}

/// `row += other`.
#[inline(always)]
pub fn add<T: SimdElement, I: Isa>(row: &mut [T::Acc], other: &[T::Acc]) {
    each_vector!(T, I, row.len(), d, {
        T::V::<I>::load(&row[d..]).add(T::V::<I>::load(&other[d..])).store(&mut row[d..]);
    });
}

/// `row += factor * other`.
#[inline(always)]
pub fn add_scaled<T: SimdElement, I: Isa>(row: &mut [T::Acc], factor: T::Acc, other: &[T::Acc]) {
    let factor = T::V::<I>::splat(factor);
    each_vector!(T, I, row.len(), d, {
        T::V::<I>::load(&other[d..]).mul_add(factor, T::V::<I>::load(&row[d..])).store(&mut row[d..]);
    });
}

/// `row += factor * one * other`, element by element.
#[inline(always)]
pub fn add_product_of<T: SimdElement, I: Isa>(row: &mut [T::Acc], one: &[T::Acc], other: &[T::Acc], factor: T::Acc) {
    let factor = T::V::<I>::splat(factor);
    each_vector!(T, I, row.len(), d, {
        let one = T::V::<I>::load(&one[d..]).mul(factor);
        one.mul_add(T::V::<I>::load(&other[d..]), T::V::<I>::load(&row[d..])).store(&mut row[d..]);
    });
}

/// The sum of the products of two rows.
#[inline(always)]
pub fn dot<T: SimdElement, I: Isa>(one: &[T::Acc], other: &[T::Acc]) -> f64 {
    let mut sums = T::V::<I>::splat(T::Acc::ZERO);
    each_vector!(T, I, one.len(), d, {
        sums = T::V::<I>::load(&one[d..]).mul_add(T::V::<I>::load(&other[d..]), sums);
    });
    sum_of_lanes::<T, I>(sums)
}

/// The sum of the products of two matrices, element by element, whose rows are `stride` apart.
#[inline(always)]
pub fn dot_rows<T: SimdElement, I: Isa>([one, other]: [&[T::Acc]; 2], stride: usize, [rows, width]: [usize; 2]) -> f64 {
    // As many sums as additions are on their way.
    let mut sums = [T::V::<I>::splat(T::Acc::ZERO); 8];
    for i in 0..rows {
        let (one, other) = (&one[i * stride..][..width], &other[i * stride..][..width]);
        each_vector!(T, I, width, d, {
            let sum = &mut sums[d / T::V::<I>::LANES % 8];
            *sum = T::V::<I>::load(&one[d..]).mul_add(T::V::<I>::load(&other[d..]), *sum);
        });
    }
    let [a, b, c, d, e, f, g, h] = sums;
    sum_of_lanes::<T, I>(a.add(b).add(c.add(d)).add(e.add(f).add(g.add(h))))
}

/// The sum of a row.
#[inline(always)]
pub fn sum<T: SimdElement, I: Isa>(row: &[T::Acc]) -> f64 {
    let mut sums = T::V::<I>::splat(T::Acc::ZERO);
    each_vector!(T, I, row.len(), d, {
        sums = sums.add(T::V::<I>::load(&row[d..]));
    });
    sum_of_lanes::<T, I>(sums)
}

/// The sum of the lanes.
#[inline(always)]
pub fn sum_of_lanes<T: SimdElement, I: Isa>(sums: T::V<I>) -> f64 {
    let mut lanes = [T::Acc::ZERO; MAX_LANES];
    sums.store(&mut lanes);
    lanes.iter().map(|lane| lane.to_f64()).sum()
}

/// Powers of two below this are 0 to [`decay`]: with products of two of them, nothing comes near denormals, which take hundreds of cycles.
const LEAST_EXPONENT: f64 = -50.0;

/// `2^x` for `x <= 0`, as far as it is more than a rounding error of anything else; NaN for NaN.
#[inline(always)]
pub fn decay<T: SimdElement, I: Isa>(x: T::V<I>) -> T::V<I> {
    let least = T::V::<I>::splat(T::Acc::from_f64(LEAST_EXPONENT));
    least.select_gt(x, T::V::<I>::splat(T::Acc::ZERO), exp2::<T, I>(x))
}

/// Products of decays, in the place of the first ones; 0 below what [`decay`] keeps.
#[inline(always)]
pub fn multiply_decays<T: SimdElement, I: Isa>(row: &mut [T::Acc], factors: &[T::Acc]) {
    let zero = T::V::<I>::splat(T::Acc::ZERO);
    let least = T::V::<I>::splat(T::Acc::from_f64(LEAST_EXPONENT.exp2()));
    each_vector!(T, I, row.len(), d, {
        let product = T::V::<I>::load(&row[d..]).mul(T::V::<I>::load(&factors[d..]));
        least.select_gt(product, zero, product).store(&mut row[d..]);
    });
}

/// `out = 2^exponents`, by [`decay`].
#[inline(always)]
pub fn decays<T: SimdElement, I: Isa>(exponents: &[T::Acc], out: &mut [T::Acc]) {
    each_vector!(T, I, out.len(), d, {
        decay::<T, I>(T::V::<I>::load(&exponents[d..])).store(&mut out[d..]);
    });
}

/// Whether no element of `count` rows is infinite or NaN.
#[inline(always)]
pub fn are_finite<T: SimdElement, I: Isa>((rows, stride): (&[T::Acc], usize), [count, width]: [usize; 2]) -> bool {
    // x - x is 0 for finite x and NaN otherwise; as many sums as additions are on their way take turns.
    let mut residues = [T::V::<I>::splat(T::Acc::ZERO); 4];
    for i in 0..count {
        let row = &rows[i * stride..][..width];
        each_vector!(T, I, width, d, {
            let x = T::V::<I>::load(&row[d..]);
            residues = [residues[1], residues[2], residues[3], residues[0].add(x.sub(x))];
        });
    }
    is_zero::<T, I>(residues[0].add(residues[1]).add(residues[2].add(residues[3])))
}

/// `columns[d][i] = rows[i][d]` for `count` rows and `width` elements of each, both of whole vectors; strides are of each side.
#[inline(always)]
pub fn transpose<T: SimdElement, I: Isa>(rows: (&[T::Acc], usize), columns: (&mut [T::Acc], usize), size: [usize; 2]) {
    I::call(Transpose::<T> { rows, columns, size });
}

struct Transpose<'a, T: SimdElement> {
    rows: (&'a [T::Acc], usize),
    columns: (&'a mut [T::Acc], usize),
    size: [usize; 2],
}

impl<T: SimdElement> Routine for Transpose<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self) {
        let Self { rows: (rows, row_stride), columns: (columns, column_stride), size: [count, width] } = self;
        each_vector!(T, I, count, i, {
            each_vector!(T, I, width, d, {
                let mut block = T::V::<I>::zero_block();
                for (r, row) in block.as_mut().iter_mut().enumerate() {
                    *row = T::V::<I>::load(&rows[(i + r) * row_stride + d..]);
                }
                let block = T::V::<I>::transpose(block);
                for (r, &column) in block.as_ref().iter().enumerate() {
                    column.store(&mut columns[(d + r) * column_stride + i..]);
                }
            });
        });
    }
}
