//! Outputs that tasks share: each row is written by one of them.

use crate::simd::{LINE, begins_a_line, prefetch_lines_to_write};
use std::marker::PhantomData;
#[cfg(debug_assertions)]
use std::sync::atomic::Ordering;

/// Results of so many bytes would displace what is in the caches, and be displaced before they are read; and of each line that is not
/// there all would be read before it is written.
const LARGE: usize = 8 << 20;

/// A writable `[B, S, H, D]` array whose rows are handed out to tasks, each row to one task.
///
/// Rows of one tile interleave with those of another, which slices cannot express. In debug builds, giving a row twice panics.
pub struct RowWriter<'a, T> {
    start: *mut T,
    shape: [usize; 4],
    strides: [usize; 3],
    /// Elements of the rows of the last head.
    last_width: usize,
    passes_caches: bool,
    #[cfg(debug_assertions)]
    given: Vec<std::sync::atomic::AtomicBool>,
    memory: PhantomData<&'a mut [T]>,
}

#[expect(unsafe_code, reason = "the disjoint row writer")]
// SAFETY: the writer hands out each row once, so that threads never hold the same element; `T` moves between threads.
unsafe impl<T: Send> Sync for RowWriter<'_, T> {}

impl<'a, T> RowWriter<'a, T> {
    /// Wraps `data`; `strides` count elements along batch, sequence and head. The last axis is contiguous.
    ///
    /// # Panics
    /// When rows overlap or reach beyond `data`: callers check with [`rows_are_disjoint`] and [`crate::tensor::extent`].
    pub fn new(data: &'a mut [T], shape: [usize; 4], strides: [usize; 3]) -> Self {
        let [b, s, h] = strides;
        assert!(rows_are_disjoint(shape, strides), "rows overlap");
        let needed = crate::tensor::extent("out", &shape, &[b, s, h, 1]).ok().filter(|&needed| needed <= data.len());
        let bytes = needed.expect("rows reach beyond the data") * size_of::<T>();
        Self {
            start: data.as_mut_ptr(),
            shape,
            strides,
            last_width: shape[3],
            passes_caches: bytes >= LARGE && begins_a_line(data) && strides.into_iter().all(Self::is_in_lines),
            #[cfg(debug_assertions)]
            given: Self::not_given(shape),
            memory: PhantomData,
        }
    }

    /// Wraps `data` as a `[B, S, D]` array whose last axis is handed out in blocks of `width`, the last one of what is left: a row's
    /// head is the number of its block.
    ///
    /// # Panics
    /// As [`RowWriter::new`], and when `width` is 0.
    pub fn blocks(data: &'a mut [T], [batch, seqlen, channels]: [usize; 3], strides: [usize; 2], width: usize) -> Self {
        let whole = Self::new(data, [batch, seqlen, 1, channels], [strides[0], strides[1], 0]);
        let count = channels.div_ceil(width);
        let shape = [batch, seqlen, count, width];
        Self {
            shape,
            strides: [strides[0], strides[1], width],
            passes_caches: whole.passes_caches && Self::is_in_lines(width),
            last_width: channels - count.saturating_sub(1) * width,
            #[cfg(debug_assertions)]
            given: Self::not_given(shape),
            ..whole
        }
    }

    /// Whether a distance of so many elements is one of whole cache lines.
    fn is_in_lines(stride: usize) -> bool {
        stride.is_multiple_of(LINE / size_of::<T>())
    }

    /// Whether rows had better be written past the caches, see [`crate::simd::SimdElement::store_past_caches`]: there are many, and each
    /// begins with a cache line.
    pub fn passes_caches(&self) -> bool {
        self.passes_caches
    }

    #[cfg(debug_assertions)]
    fn not_given([batch, seqlen, heads, _]: [usize; 4]) -> Vec<std::sync::atomic::AtomicBool> {
        std::iter::repeat_with(Default::default).take(batch * seqlen * heads).collect()
    }

    /// The elements of one token of one head. Ask for each row at most once.
    ///
    /// # Panics
    /// When there is no such row; in debug builds, when it was given before.
    #[inline(always)]
    #[expect(unsafe_code, reason = "the disjoint row writer")]
    #[expect(clippy::mut_from_ref, reason = "each row is given once")]
    pub fn row(&self, batch: usize, token: usize, head: usize) -> &mut [T] {
        let [batches, tokens, heads, width] = self.shape;
        assert!(batch < batches && token < tokens && head < heads, "no such row");
        #[cfg(debug_assertions)]
        {
            let given = &self.given[(batch * tokens + token) * heads + head];
            assert!(!given.swap(true, Ordering::Relaxed), "row given twice");
        }
        let offset = batch * self.strides[0] + token * self.strides[1] + head * self.strides[2];
        let width = if head + 1 == heads { self.last_width } else { width };
        // SAFETY: `new` checked that every row lies within the data and that rows are disjoint, and the data is borrowed
        // mutably for 'a. Kernels ask for each row once, which debug builds assert.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(offset), width) }
    }

    /// Starts bringing a row into the cache, to be written, unless rows pass the caches.
    #[inline(always)]
    pub fn prefetch(&self, batch: usize, token: usize, head: usize) {
        if self.passes_caches() {
            return;
        }
        let offset = batch * self.strides[0] + token * self.strides[1] + head * self.strides[2];
        prefetch_lines_to_write(self.start.wrapping_add(offset), self.shape[3]);
    }
}

/// A writable array whose rows are handed out in pieces, each element to one task.
///
/// For arrays whose tasks own columns, or ranges of columns, in many rows.
pub struct PieceWriter<'a, T> {
    start: *mut T,
    shape: [usize; 4],
    strides: [usize; 3],
    #[cfg(debug_assertions)]
    given: Vec<std::sync::atomic::AtomicBool>,
    memory: PhantomData<&'a mut [T]>,
}

#[expect(unsafe_code, reason = "the disjoint piece writer")]
// SAFETY: the writer hands out each element once, so that threads never hold the same one; `T` moves between threads.
unsafe impl<T: Send> Sync for PieceWriter<'_, T> {}

impl<'a, T> PieceWriter<'a, T> {
    /// Wraps `data`; `strides` count elements along the first three axes. The last axis is contiguous.
    ///
    /// # Panics
    /// As [`RowWriter::new`].
    pub fn new(data: &'a mut [T], shape: [usize; 4], strides: [usize; 3]) -> Self {
        let RowWriter { start, .. } = RowWriter::new(data, shape, strides);
        Self {
            start,
            shape,
            strides,
            #[cfg(debug_assertions)]
            given: std::iter::repeat_with(Default::default).take(shape.iter().product()).collect(),
            memory: PhantomData,
        }
    }

    /// Elements `first..first + len` of a row. Ask for each element at most once.
    ///
    /// # Panics
    /// When there are no such elements; in debug builds, when one was given before.
    #[inline(always)]
    #[expect(unsafe_code, reason = "the disjoint piece writer")]
    #[expect(clippy::mut_from_ref, reason = "each element is given once")]
    pub fn piece(&self, [a, b, c]: [usize; 3], first: usize, len: usize) -> &mut [T] {
        let [most_a, most_b, most_c, width] = self.shape;
        assert!(a < most_a && b < most_b && c < most_c && first <= width && len <= width - first, "no such piece");
        #[cfg(debug_assertions)]
        for i in first..first + len {
            let given = &self.given[((a * most_b + b) * most_c + c) * width + i];
            assert!(!given.swap(true, Ordering::Relaxed), "element given twice");
        }
        let offset = a * self.strides[0] + b * self.strides[1] + c * self.strides[2] + first;
        // SAFETY: as for `RowWriter::row`, of a part of the row: the assertion above keeps it within, and kernels ask for each
        // element once, which debug builds assert.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(offset), len) }
    }
}

/// Whether no two rows of a `[B, S, H, D]` array with these batch, sequence and head strides share an element.
///
/// Sufficient, not necessary: the axes must nest, which every view of a contiguous array does.
pub fn rows_are_disjoint(shape: [usize; 4], strides: [usize; 3]) -> bool {
    shape.contains(&0) || axes_are_disjoint((0..3).map(|i| (strides[i], shape[i])).collect(), shape[3])
}

/// Whether no two rows of `width` elements share one, given the stride and extent of every axis they are repeated along.
/// Sufficient, as [`rows_are_disjoint`].
pub fn axes_are_disjoint(mut axes: Vec<(usize, usize)>, width: usize) -> bool {
    axes.retain(|&(_, n)| n > 1);
    axes.sort_unstable();
    let mut reach = width;
    for (stride, n) in axes {
        if stride < reach {
            return false;
        }
        reach += stride * (n - 1);
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disjointness() {
        assert!(rows_are_disjoint([2, 3, 4, 5], [60, 20, 5]));
        assert!(rows_are_disjoint([2, 4, 3, 5], [60, 5, 20]));
        assert!(rows_are_disjoint([1, 3, 1, 5], [0, 7, 0]));
        assert!(!rows_are_disjoint([1, 3, 1, 5], [0, 4, 0]));
        assert!(!rows_are_disjoint([2, 3, 1, 5], [0, 5, 0]));
    }

    #[test]
    fn blocks_cut_the_last_axis() {
        let mut data = [0u8; 2 * 3 * 7];
        let rows = RowWriter::blocks(&mut data, [2, 3, 7], [21, 7], 3);
        let mut number = 0;
        for (batch, token) in (0..2).flat_map(|batch| (0..3).map(move |token| (batch, token))) {
            for (block, width) in [3, 3, 1].into_iter().enumerate() {
                let row = rows.row(batch, token, block);
                assert_eq!(row.len(), width);
                for x in row {
                    *x = number;
                    number += 1;
                }
            }
        }
        assert!(data.iter().enumerate().all(|(i, &x)| i == usize::from(x)));
    }

    #[test]
    fn large_rows_of_whole_lines_pass_the_caches() {
        let lines = LARGE / 64;
        let mut data = vec![0f32; LARGE / 4 / 32 * 33 + 2 * 16];
        let first = data.as_ptr().align_offset(LINE);
        let of = |data: &mut [f32], tokens, width, stride| {
            RowWriter::new(data, [1, tokens, 1, width], [tokens * stride, stride, stride]).passes_caches()
        };
        assert!(of(&mut data[first..], lines, 16, 16));
        assert!(!of(&mut data[first..], lines - 1, 16, 16), "too few");
        assert!(!of(&mut data[first + 1..], lines, 16, 16), "rows begin within lines");
        assert!(!of(&mut data[first..], lines / 2, 32, 33), "so do later rows");
        let blocks =
            |data: &mut [f32], width| RowWriter::blocks(data, [1, lines / 4, 64], [lines * 16, 64], width).passes_caches();
        assert!(blocks(&mut data[first..], 32));
        assert!(!blocks(&mut data[first..], 24), "blocks begin within lines");
    }

    #[test]
    #[cfg(debug_assertions)]
    #[should_panic(expected = "row given twice")]
    fn rows_are_given_once() {
        let mut data = vec![0f32; 6];
        let rows = RowWriter::new(&mut data, [1, 3, 1, 2], [6, 2, 2]);
        rows.row(0, 1, 0)[0] = 1.0;
        rows.row(0, 1, 0)[0] = 2.0;
    }

    #[test]
    fn pieces_of_rows() {
        let mut data = [0f32; 12];
        let pieces = PieceWriter::new(&mut data, [1, 1, 2, 5], [12, 12, 6]);
        pieces.piece([0, 0, 0], 3, 2).fill(1.0);
        pieces.piece([0, 0, 1], 0, 1).fill(2.0);
        pieces.piece([0, 0, 0], 0, 3).fill(3.0);
        drop(pieces);
        assert_eq!(data.map(|x| x as u8), [3, 3, 3, 1, 1, 0, 2, 0, 0, 0, 0, 0]);
    }

    #[test]
    #[should_panic(expected = "no such piece")]
    fn pieces_end_with_rows() {
        PieceWriter::new(&mut [0f32; 12], [1, 1, 2, 5], [12, 12, 6]).piece([0, 0, 0], 4, 2);
    }

    #[test]
    #[cfg(debug_assertions)]
    #[should_panic(expected = "element given twice")]
    fn elements_are_given_once() {
        let mut data = [0f32; 6];
        let pieces = PieceWriter::new(&mut data, [1, 1, 3, 2], [6, 6, 2]);
        pieces.piece([0, 0, 1], 1, 1);
        pieces.piece([0, 0, 1], 0, 2);
    }
}
