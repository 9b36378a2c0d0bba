//! The buffers in which the backward takes a chunk apart.

use super::BLOCK;
use super::head::{Head, MAX_CHUNK};
use super::pairs::Size;
use super::unfade::UnfadeScratch;
use crate::dtype::Float;
use crate::math::load::MAX_LANES;
use crate::simd::SimdElement;
use crate::workspace::carve;

/// Buffers of the gradients of a chunk.
pub struct Work<'s, A> {
    /// Raw rows: queries and what reads for the rule; keys and where the low-rank part is written. `[chunk, stride]` each.
    pub lefts: [&'s mut [A]; 2],
    pub rights: [&'s mut [A]; 2],
    pub d_lefts: [&'s mut [A]; 2],
    pub d_rights: [&'s mut [A]; 2],
    /// `[chunk, chunk]` of each left with each right.
    pub d_products: [[&'s mut [A]; 2]; 2],
    /// Sums over value heads of the gradients of queries, keys, `a` and `b`, `[chunk, stride]` each.
    pub totals: [&'s mut [A]; 4],
    pub gates: &'s mut [A],
    pub end: &'s mut [A],
    pub unfade: UnfadeScratch<'s, A>,
    /// `[chunk, stride_v]` each: gradients of outputs, and of what is written by each right.
    pub d_out: &'s mut [A],
    pub d_written: [&'s mut [A]; 2],
    /// `[width, columns_stride]`: gradients of rows of keys transposed; zeros beyond the channels of the keys.
    pub columns: &'s mut [A],
    /// `[width_v, columns_stride]` each: what is written, and gradients of what is read, transposed.
    pub written: &'s mut [A],
    pub read: &'s mut [A],
}

/// Elements from one row to the next where rows of a chunk are transposed and lie side by side: one vector more than they need, so that
/// they do not share the sets of a cache.
pub fn columns_stride(chunk: usize) -> usize {
    2 * chunk + MAX_LANES
}

/// Elements of the buffers.
pub fn work_len<T: SimdElement>(head: &Head<'_, T>) -> usize {
    let Size { chunk, width, stride, .. } = head.size;
    18 * chunk * stride
        + 2 * BLOCK * stride
        + 4 * chunk * chunk
        + (MAX_CHUNK / BLOCK + 3) * width
        + 3 * chunk * head.stride_v
        + (width + 2 * head.width_v) * columns_stride(chunk)
}

impl<'s, A: Float> Work<'s, A> {
    #[expect(clippy::mut_mut, reason = "what is left of the scratch")]
    /// Takes the buffers from what is left of the scratch.
    pub fn carve<T: SimdElement<Acc = A>>(head: &Head<'_, T>, rest: &mut &'s mut [A]) -> Self {
        let Size { chunk, width, stride, .. } = head.size;
        let mut take = |len: usize| carve(rest, len);
        let panel = chunk * stride;
        Self {
            lefts: [take(panel), take(panel)],
            rights: [take(panel), take(panel)],
            d_lefts: [take(panel), take(panel)],
            d_rights: [take(panel), take(panel)],
            d_products: [[take(chunk * chunk), take(chunk * chunk)], [take(chunk * chunk), take(chunk * chunk)]],
            totals: [take(panel), take(panel), take(panel), take(panel)],
            gates: take(panel),
            end: take(width),
            unfade: UnfadeScratch {
                faded: [take(panel), take(panel)],
                readers: [take(BLOCK * stride), take(BLOCK * stride)],
                brought: take(panel),
                sums: take(panel),
                blocks: take(MAX_CHUNK / BLOCK * width),
                total: take(width),
                ratio: take(width),
            },
            d_out: take(chunk * head.stride_v),
            d_written: [take(chunk * head.stride_v), take(chunk * head.stride_v)],
            columns: {
                let columns = take(width * columns_stride(chunk));
                columns.fill(A::ZERO);
                columns
            },
            written: take(head.width_v * columns_stride(chunk)),
            read: take(head.width_v * columns_stride(chunk)),
        }
    }
}
