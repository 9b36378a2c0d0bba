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
        if let Some(pages) = &self.pages {
            let page = pages.table[batch * pages.per_sequence + token / pages.page_size];
            return (page, token % pages.page_size);
        }
        (self.rows.as_ref().map_or(batch, |rows| rows[batch]), token)
    }

    /// As [`KeyLayout::place`], and how many tokens from that one on lie one after the other.
    #[inline(always)]
    pub fn run_from(&self, batch: usize, token: usize) -> ((usize, usize), usize) {
        let place = self.place(batch, token);
        (place, self.pages.as_ref().map_or(usize::MAX, |pages| pages.page_size - place.1))
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
                let table = &pages.table[batch * pages.per_sequence..][..range.end.div_ceil(pages.page_size)];
                if let Some(page) = table.iter().find(|&&page| page >= rows) {
                    let got = if *page == usize::MAX { "a negative number".into() } else { page.to_string() };
                    return value(
                        "block_table",
                        format!("pages from 0 to {}", rows as isize - 1),
                        format!("{got} for sequence {batch}"),
                    );
                }
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
        assert_eq!(layout.run_from(0, 17), ((1, 1), 15));
        assert!(layout.check(4, 16).is_ok());
        assert!(matches!(layout.check(3, 16), Err(Error::Value { arg: "block_table", .. })));
        layout.ranges[1] = 0..33;
        assert!(matches!(layout.check(4, 16), Err(Error::Value { arg: "cache_seqlens", .. })));
        let layout = KeyLayout { ranges: vec![0..1, 0..0], rows: Some(vec![5, 0]), pages: None };
        assert_eq!(layout.place(0, 7), (5, 7));
        assert!(matches!(layout.check(5, 8), Err(Error::Value { arg: "cache_batch_idx", .. })));
    }
}
