//! Where the keys of a sequence lie, when that is not simply row after row of one array.

use crate::error::{Error, Result};
use std::ops::Range;

/// Pages of a cache: token `t` of sequence `b` is token `t % page_size` of page `table[b][t / page_size]`.
#[derive(Debug, Clone)]
pub struct Pages {
    /// Page numbers, sequence by sequence.
    pub table: Vec<usize>,
    /// Pages of a sequence.
    pub per_sequence: usize,
    /// Tokens of a page.
    pub page_size: usize,
}

impl Pages {
    /// Page and token within it of token `token` of sequence `sequence`.
    #[inline(always)]
    pub fn place(&self, sequence: usize, token: usize) -> (usize, usize) {
        (self.table[sequence * self.per_sequence + token / self.page_size], token % self.page_size)
    }

    /// Checks that the first `tokens` tokens of a sequence lie on pages below `count`.
    ///
    /// # Errors
    /// [`Error::Value`] naming `block_table`.
    pub fn check(&self, sequence: usize, tokens: usize, count: usize) -> Result<()> {
        let table = &self.table[sequence * self.per_sequence..][..tokens.div_ceil(self.page_size)];
        let Some(page) = table.iter().find(|&&page| page >= count) else { return Ok(()) };
        let got = if *page == usize::MAX { "a negative number".into() } else { page.to_string() };
        let expected = format!("pages from 0 to {}", count as isize - 1);
        Err(Error::Value { arg: "block_table", expected, got: format!("{got} for sequence {sequence}") })
    }
}

/// Queries that stand one after the other, and the keys that they may see.
///
/// Keys count from the segment's own first key: that is their position. Query `i` is at position `offset + i`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// Its sequence, by which slopes are looked up.
    pub sequence: usize,
    /// Index along the first axis of the queries.
    pub q_batch: usize,
    /// Token of the first query.
    pub q_first: usize,
    /// Number of queries.
    pub q_len: usize,
    /// Index along the first axis of keys and values; with pages, the row of the table.
    pub k_batch: usize,
    /// Token of the key at position 0.
    pub k_first: usize,
    /// Position of the first key that any query may see.
    pub k_start: usize,
    /// Position after the last key that any query may see.
    pub k_end: usize,
    /// Position of the first query; negative when there are more queries than keys.
    pub offset: isize,
}

/// A query, as its segment counts.
#[derive(Debug, Clone, Copy)]
pub struct Query<'a> {
    /// Its segment.
    pub segment: &'a Segment,
    /// Its number in the segment.
    pub token: usize,
    /// Its head.
    pub head: usize,
}

impl Query<'_> {
    /// `[batch, head, token]`, as arrays of the whole call count.
    #[inline(always)]
    pub fn at(&self) -> [usize; 3] {
        [self.segment.q_batch, self.head, self.segment.q_first + self.token]
    }

    /// Its position among the keys of the segment.
    #[inline(always)]
    pub fn position(&self) -> isize {
        self.segment.offset + self.token as isize
    }
}

/// The segments of a call.
#[derive(Debug, Clone, Copy)]
pub enum Segments<'a> {
    /// Each sequence of the batch whole, its first query at position `offset`.
    Whole {
        /// Position of the first query.
        offset: isize,
    },
    /// These.
    List(&'a [Segment]),
}

/// Where the keys of one segment lie.
#[derive(Debug, Clone, Copy)]
pub struct KeyPlaces<'a> {
    /// Pages, for a paged cache.
    pub pages: Option<&'a Pages>,
    /// Index along the first axis, or row of the table of pages.
    pub batch: usize,
    /// Token of the key at position 0.
    pub first: usize,
}

impl KeyPlaces<'_> {
    /// Indices along the first two axes of the key at `position`.
    #[inline(always)]
    pub fn place(&self, position: usize) -> (usize, usize) {
        match self.pages {
            None => (self.batch, self.first + position),
            Some(pages) => pages.place(self.batch, position),
        }
    }

    /// As [`KeyPlaces::place`], and how many keys from that one on lie one after the other.
    #[inline(always)]
    pub fn run_from(&self, position: usize) -> ((usize, usize), usize) {
        let place = self.place(position);
        (place, self.pages.map_or(usize::MAX, |pages| pages.page_size - place.1))
    }
}

/// The keys of each sequence of a call.
#[derive(Debug, Clone)]
pub struct KeyLayout {
    /// Tokens that the last query of each sequence sees: after the left padding, up to the length.
    pub ranges: Vec<Range<usize>>,
    /// The row of the cache that holds each sequence; `None` for its own.
    pub rows: Option<Vec<usize>>,
    /// Pages, for a paged cache.
    pub pages: Option<Pages>,
}

impl KeyLayout {
    /// The indices along the first two axes of the cache of token `token` of sequence `batch`.
    #[inline(always)]
    pub fn place(&self, batch: usize, token: usize) -> (usize, usize) {
        KeyPlaces { pages: self.pages.as_ref(), batch: self.row(batch), first: 0 }.place(token)
    }

    fn row(&self, batch: usize) -> usize {
        self.rows.as_ref().map_or(batch, |rows| rows[batch])
    }

    /// One segment for each sequence, of `seqlen_q` queries that end with the last key.
    pub fn segments(&self, seqlen_q: usize) -> Vec<Segment> {
        let segment = |(batch, range): (usize, &Range<usize>)| Segment {
            sequence: batch,
            q_batch: batch,
            q_first: 0,
            q_len: seqlen_q,
            k_batch: self.row(batch),
            k_first: 0,
            k_start: range.start,
            k_end: range.end,
            offset: range.end as isize - seqlen_q as isize,
        };
        self.ranges.iter().enumerate().map(segment).collect()
    }

    /// Checks that every token of every range has a place in a cache of `rows` by `tokens`.
    ///
    /// # Errors
    /// [`Error::Value`] naming the argument that points beyond the cache.
    pub fn check(&self, rows: usize, tokens: usize) -> Result<()> {
        let value = |arg, expected: String, got: String| Err(Error::Value { arg, expected, got });
        let capacity = self.pages.as_ref().map_or(tokens, |pages| pages.per_sequence * pages.page_size);
        for (batch, range) in self.ranges.iter().enumerate() {
            if range.end > capacity {
                let got = format!("{} for sequence {batch}", range.end);
                return value("cache_seqlens", format!("lengths of at most the capacity, {capacity}"), got);
            }
            if let Some(pages) = &self.pages {
                pages.check(batch, range.end, rows)?;
            }
        }
        if let Some(row) = self.rows.iter().flatten().find(|&&row| row >= rows) {
            let got = if *row == usize::MAX { "a negative number".into() } else { row.to_string() };
            return value("cache_batch_idx", format!("rows from 0 to {}", rows as isize - 1), got);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_and_rows_are_found() {
        let pages = Pages { table: vec![3, 1, 0, 2], per_sequence: 2, page_size: 16 };
        let mut layout = KeyLayout { ranges: vec![0..20, 0..32], rows: None, pages: Some(pages) };
        assert_eq!(layout.place(0, 17), (1, 1));
        assert_eq!(layout.place(1, 0), (0, 0));
        let places = KeyPlaces { pages: layout.pages.as_ref(), batch: 0, first: 0 };
        assert_eq!(places.run_from(17), ((1, 1), 15));
        assert_eq!(KeyPlaces { pages: None, batch: 3, first: 5 }.place(2), (3, 7));
        assert!(layout.check(4, 16).is_ok());
        assert!(matches!(layout.check(3, 16), Err(Error::Value { arg: "block_table", .. })));
        layout.ranges[1] = 0..33;
        assert!(matches!(layout.check(4, 16), Err(Error::Value { arg: "cache_seqlens", .. })));
        let layout = KeyLayout { ranges: vec![0..1, 0..0], rows: Some(vec![5, 0]), pages: None };
        assert_eq!(layout.place(0, 7), (5, 7));
        assert!(matches!(layout.check(5, 8), Err(Error::Value { arg: "cache_batch_idx", .. })));
    }
}
