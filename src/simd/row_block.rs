//! Places of a block of rows: found and checked once, then read by register tiles without further checks.

use std::marker::PhantomData;

/// Rows of a block.
pub const BLOCK_ROWS: usize = 64;

/// [`BLOCK_ROWS`] rows of one width. Every place holds a row at all times; what counts is up to the user.
#[derive(Clone, Copy)]
pub struct RowBlock<'a, T> {
    /// Each points to `width` elements that are borrowed for `'a`.
    starts: [*const T; BLOCK_ROWS],
    width: usize,
    memory: PhantomData<&'a [T]>,
}

impl<'a, T> RowBlock<'a, T> {
    /// A block that holds `row` in every place.
    pub fn filled(row: &'a [T]) -> Self {
        Self { starts: [row.as_ptr(); BLOCK_ROWS], width: row.len(), memory: PhantomData }
    }

    /// Elements of a row.
    #[inline(always)]
    pub fn width(&self) -> usize {
        self.width
    }

    /// The row in a place.
    ///
    /// # Panics
    /// When there is no such place.
    #[inline(always)]
    #[expect(unsafe_code, reason = "rows are checked when they are set")]
    pub fn row(&self, place: usize) -> &'a [T] {
        // SAFETY: every start was taken from a slice of at least `width` elements that lives for `'a`.
        unsafe { std::slice::from_raw_parts(self.starts[place], self.width) }
    }

    /// Where the row in a place starts.
    #[inline(always)]
    pub(super) fn start(&self, place: usize) -> *const T {
        self.starts[place]
    }

    /// Puts a row in a place.
    ///
    /// # Panics
    /// When there is no such place, or the row is too short.
    #[inline(always)]
    pub fn set(&mut self, place: usize, row: &'a [T]) {
        self.starts[place] = row[..self.width].as_ptr();
    }

    /// Puts `count` rows, the starts of which lie `stride` elements apart, in the places from `first` on.
    ///
    /// # Panics
    /// When a place or a row lies beyond the end.
    #[inline(always)]
    pub fn set_run(&mut self, first: usize, count: usize, rows: &'a [T], stride: usize) {
        let Some(last) = count.checked_sub(1) else { return };
        assert!(last.checked_mul(stride).and_then(|start| start.checked_add(self.width)).is_some_and(|end| end <= rows.len()));
        for (i, start) in self.starts[first..first + count].iter_mut().enumerate() {
            *start = rows.as_ptr().wrapping_add(i * stride);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_found_again() {
        let (data, zeros): (Vec<u32>, _) = ((0..100).collect(), [0; 3]);
        let mut block = RowBlock::filled(&zeros);
        block.set_run(1, 4, &data[2..], 10);
        block.set(7, &data[50..60]);
        assert_eq!(block.row(0), [0, 0, 0]);
        assert_eq!(block.row(1), [2, 3, 4]);
        assert_eq!(block.row(4), [32, 33, 34]);
        assert_eq!(block.row(7), [50, 51, 52]);
    }

    #[test]
    #[should_panic(expected = "assertion failed")]
    fn runs_end_within_the_data() {
        let (data, zeros) = ([0; 32], [0; 3]);
        RowBlock::filled(&zeros).set_run(0, 4, &data, 10);
    }
}
