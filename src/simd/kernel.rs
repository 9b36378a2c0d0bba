//! How a vector instruction set multiplies: operands, their packing, and the multiply-accumulate.
//!
//! An *operand* is what one lane of a multiplicand holds: one widened input ([`Widen`], [`VectorKernel::DEPTH`] 1) or a pair of
//! bf16 inputs that are adjacent along the reduced axis ([`PairDot`], depth 2). Operands are kept in the accumulator type; pairs
//! are its bits, and are only ever moved.

use super::{Bf16Pairs, Isa, SimdElement, Vector};
use half::bf16;
use std::marker::PhantomData;

/// Products of inputs of type `T`.
pub trait VectorKernel<T: SimdElement>: 'static {
    /// Vectors of accumulators and operands.
    type V: Vector<Elem = T::Acc>;
    /// Inputs per operand.
    const DEPTH: usize;
    /// Whether operands lie in rows as they are, so that [`VectorKernel::broadcast`] is a single load.
    const ROWS_ARE_OPERANDS: bool;

    /// The operand of the first `DEPTH` elements of a row, in all lanes.
    fn broadcast(src: &[T]) -> Self::V;
    /// Operands of the first `DEPTH * LANES` elements of a row, adjacent along the reduced axis.
    fn load_row(src: &[T]) -> Self::V;
    /// Operands of the first `LANES` elements of `DEPTH` rows that are adjacent along the reduced axis; `rows[DEPTH..]` is ignored.
    fn load_rows(rows: [&[T]; 2]) -> Self::V;
    /// Operands of the first `2 * LANES` elements of `DEPTH` rows, as [`VectorKernel::load_rows`], in an order that
    /// [`VectorKernel::unshuffle`] undoes.
    fn load_rows_shuffled(rows: [&[T]; 2]) -> [Self::V; 2];
    /// Puts accumulators of [`VectorKernel::load_rows_shuffled`] in order.
    fn unshuffle(halves: [Self::V; 2]) -> [Self::V; 2];
    /// Operands of `2 * LANES` probabilities whose keys are adjacent lanes: `2 / DEPTH` vectors, the rest is ignored.
    fn fold_adjacent(probs: [Self::V; 2]) -> [Self::V; 2];
    /// Operands of `DEPTH` vectors of probabilities; `probs[DEPTH..]` is ignored.
    fn fold(probs: [Self::V; 2]) -> Self::V;
    /// What [`VectorKernel::fold`] has rounded its vectors to; `[DEPTH..]` is undefined.
    fn widen(operands: Self::V) -> [Self::V; 2];
    /// Probability `index < DEPTH` of a folded operand.
    fn unfold(operand: T::Acc, index: usize) -> T::Acc;
    /// `acc + a . b`.
    fn mul_acc(a: Self::V, b: Self::V, acc: Self::V) -> Self::V;
}

/// Inputs widened to the accumulator type, products by fused multiply-add.
pub struct Widen<I, T>(PhantomData<(I, T)>);

impl<I: Isa, T: SimdElement> VectorKernel<T> for Widen<I, T> {
    type V = T::V<I>;
    const DEPTH: usize = 1;
    const ROWS_ARE_OPERANDS: bool = size_of::<T>() == size_of::<T::Acc>();

    #[inline(always)]
    fn broadcast(src: &[T]) -> Self::V {
        Self::V::splat(src[0].to_acc())
    }
    #[inline(always)]
    fn load_row(src: &[T]) -> Self::V {
        T::load::<I>(src)
    }
    #[inline(always)]
    fn load_rows(rows: [&[T]; 2]) -> Self::V {
        T::load::<I>(rows[0])
    }
    #[inline(always)]
    fn load_rows_shuffled(rows: [&[T]; 2]) -> [Self::V; 2] {
        let lanes = <Self::V as Vector>::LANES;
        let row = &rows[0][..2 * lanes];
        [T::load::<I>(row), T::load::<I>(&row[lanes..])]
    }
    #[inline(always)]
    fn unshuffle(halves: [Self::V; 2]) -> [Self::V; 2] {
        halves
    }
    #[inline(always)]
    fn fold_adjacent(probs: [Self::V; 2]) -> [Self::V; 2] {
        probs
    }
    #[inline(always)]
    fn fold(probs: [Self::V; 2]) -> Self::V {
        probs[0]
    }
    #[inline(always)]
    fn widen(operands: Self::V) -> [Self::V; 2] {
        [operands; 2]
    }
    #[inline(always)]
    fn unfold(operand: T::Acc, _index: usize) -> T::Acc {
        operand
    }
    #[inline(always)]
    fn mul_acc(a: Self::V, b: Self::V, acc: Self::V) -> Self::V {
        a.mul_add(b, acc)
    }
}

/// Pairs of bf16, products by the instruction set's bf16 dot product.
pub struct PairDot<I>(PhantomData<I>);

impl<I: Bf16Pairs> VectorKernel<bf16> for PairDot<I> {
    type V = I::F32;
    const DEPTH: usize = 2;
    const ROWS_ARE_OPERANDS: bool = true;

    #[inline(always)]
    fn broadcast(src: &[bf16]) -> Self::V {
        I::F32::splat(f32::from_bits(u32::from(src[1].to_bits()) << 16 | u32::from(src[0].to_bits())))
    }
    #[inline(always)]
    fn load_row(src: &[bf16]) -> Self::V {
        I::load_pairs(src)
    }
    #[inline(always)]
    fn load_rows(rows: [&[bf16]; 2]) -> Self::V {
        I::zip(rows[0], rows[1])
    }
    #[inline(always)]
    fn load_rows_shuffled(rows: [&[bf16]; 2]) -> [Self::V; 2] {
        I::zip_shuffled(rows[0], rows[1])
    }
    #[inline(always)]
    fn unshuffle(halves: [Self::V; 2]) -> [Self::V; 2] {
        I::unshuffle(halves)
    }
    #[inline(always)]
    fn fold_adjacent(probs: [Self::V; 2]) -> [Self::V; 2] {
        [I::round_adjacent(probs[0], probs[1]), probs[1]]
    }
    #[inline(always)]
    fn fold(probs: [Self::V; 2]) -> Self::V {
        I::round_pairs(probs[0], probs[1])
    }
    #[inline(always)]
    fn widen(operands: Self::V) -> [Self::V; 2] {
        I::widen_pairs(operands)
    }
    #[inline(always)]
    fn unfold(operand: f32, index: usize) -> f32 {
        f32::from_bits(if index == 0 { operand.to_bits() << 16 } else { operand.to_bits() & 0xffff_0000 })
    }
    #[inline(always)]
    fn mul_acc(a: Self::V, b: Self::V, acc: Self::V) -> Self::V {
        I::dot(a, b, acc)
    }
}
