//! Structured masks: which keys a query sees, as data.

use crate::index::Segment;
use std::ops::Range;

/// Keys around a query's own position: from `left` before it to `right` after it, both included.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Window {
    /// Keys before; [`Window::UNBOUNDED`] for all.
    pub left: isize,
    /// Keys after; negative for a window that ends before the query.
    pub right: isize,
}

impl Window {
    /// A side without end, far from what positions overflow at.
    pub const UNBOUNDED: isize = isize::MAX / 4;
    /// All keys.
    pub const ALL: Self = Self { left: Self::UNBOUNDED, right: Self::UNBOUNDED };
    /// The keys up to the query's own position.
    pub const CAUSAL: Self = Self { left: Self::UNBOUNDED, right: 0 };

    /// The part of the window that a causal mask leaves.
    pub fn causal(self) -> Self {
        Self { left: self.left, right: self.right.min(0) }
    }
}

/// A window for all heads, or one for each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Windows<'a> {
    /// For all heads.
    One(Window),
    /// By query head.
    PerHead(&'a [Window]),
}

impl Windows<'_> {
    #[inline(always)]
    fn of(&self, head: usize) -> Window {
        match self {
            Self::One(window) => *window,
            Self::PerHead(windows) => windows[head],
        }
    }
}

/// For each query, disjoint intervals of key positions in ascending order, none of them empty.
#[derive(Debug, Clone)]
pub struct RowRanges {
    /// Where the intervals of each row start, and their number at the end.
    pub indptr: Vec<usize>,
    /// First position, and the position after the last.
    pub intervals: Vec<(usize, usize)>,
    /// Rows from one sequence, query head and query to the next; 0 along what shares rows.
    pub strides: [usize; 3],
}

impl RowRanges {
    #[inline(always)]
    fn row(&self, batch: usize, head: usize, token: usize) -> &[(usize, usize)] {
        let row = batch * self.strides[0] + head * self.strides[1] + token * self.strides[2];
        &self.intervals[self.indptr[row]..self.indptr[row + 1]]
    }
}

/// Keys that queries see: those of a window, and of intervals, where there are any.
#[derive(Debug, Clone, Copy)]
pub struct Mask<'a> {
    /// By the distance between query and key.
    pub windows: Windows<'a>,
    /// By the query.
    pub ranges: Option<&'a RowRanges>,
}

impl Mask<'_> {
    /// All keys.
    pub const NONE: Self = Self { windows: Windows::One(Window::ALL), ranges: None };
    /// The keys up to the query's own position.
    pub const CAUSAL: Self = Self { windows: Windows::One(Window::CAUSAL), ranges: None };

    /// Whether what a later query of any head sees neither starts nor ends before what an earlier one sees, without gaps.
    #[inline(always)]
    pub fn is_monotone(&self) -> bool {
        self.ranges.is_none() && matches!(self.windows, Windows::One(_))
    }

    /// Keys from the first to the last that a query may see by its window, if all heads share one that is bounded, and nothing else
    /// decides.
    pub fn width(&self) -> Option<usize> {
        match (self.windows, self.ranges) {
            (Windows::One(window), None) if window.left < Window::UNBOUNDED && window.right < Window::UNBOUNDED => {
                Some((window.left + window.right + 1).max(0) as usize)
            }
            _ => None,
        }
    }

    #[inline(always)]
    fn band(&self, segment: &Segment, head: usize, token: usize) -> Range<usize> {
        let position = segment.offset + token as isize;
        let window = self.windows.of(head);
        let clip = |bound: isize| bound.clamp(segment.k_start as isize, segment.k_end as isize) as usize;
        let start = clip(position.saturating_sub(window.left));
        start..clip(position.saturating_add(window.right).saturating_add(1)).max(start)
    }

    /// The positions from the first to the last key that a query sees; an empty range if it sees none.
    #[inline(always)]
    pub fn hull(&self, segment: &Segment, head: usize, token: usize) -> Range<usize> {
        let band = self.band(segment, head, token);
        let Some(ranges) = self.ranges else { return band };
        let row = ranges.row(segment.q_batch, head, segment.q_first + token);
        let first = row.partition_point(|&(_, end)| end <= band.start);
        let last = row.partition_point(|&(start, _)| start < band.end);
        if first >= last {
            return band.start..band.start;
        }
        row[first].0.max(band.start)..row[last - 1].1.min(band.end)
    }

    /// The intervals that a query sees, within `keys`.
    #[inline(always)]
    pub fn intervals(
        &self,
        segment: &Segment,
        head: usize,
        token: usize,
        keys: Range<usize>,
    ) -> impl Iterator<Item = Range<usize>> + use<'_> {
        let band = self.band(segment, head, token);
        let bounds = band.start.max(keys.start)..band.end.min(keys.end);
        let row: &[(usize, usize)] = match self.ranges {
            Some(ranges) => ranges.row(segment.q_batch, head, segment.q_first + token),
            None => &[(0, usize::MAX)],
        };
        let first = row.partition_point(|&(_, end)| end <= bounds.start);
        row[first..]
            .iter()
            .map(move |&(start, end)| start.max(bounds.start)..end.min(bounds.end))
            .take_while(|interval| !interval.is_empty())
    }

    /// Number of keys that a query sees.
    pub fn count(&self, segment: &Segment, head: usize, token: usize) -> usize {
        self.intervals(segment, head, token, 0..usize::MAX).map(|interval| interval.len()).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn segment(q_len: usize, keys: Range<usize>, offset: isize) -> Segment {
        Segment {
            sequence: 0,
            q_batch: 0,
            q_first: 0,
            q_len,
            k_batch: 0,
            k_first: 0,
            k_start: keys.start,
            k_end: keys.end,
            offset,
        }
    }

    #[test]
    fn alignments() {
        let hulls = |mask: Mask<'_>, q, k, offset| (0..q).map(|i| mask.hull(&segment(q, 0..k, offset), 0, i)).collect::<Vec<_>>();
        assert_eq!(hulls(Mask::CAUSAL, 2, 4, 0), [0..1, 0..2]);
        assert_eq!(hulls(Mask::CAUSAL, 2, 4, 2), [0..3, 0..4]);
        assert_eq!(hulls(Mask::CAUSAL, 4, 2, -2), [0..0, 0..0, 0..1, 0..2]);
        assert_eq!(hulls(Mask::NONE, 2, 4, 2), [0..4, 0..4]);
        let window = Mask { windows: Windows::One(Window { left: 1, right: 0 }), ranges: None };
        assert_eq!(hulls(window, 3, 5, 2), [1..3, 2..4, 3..5]);
        assert!(window.hull(&segment(1, 0..3, 9), 0, 0).is_empty());
    }

    #[test]
    fn intervals_are_clipped() {
        let ranges = RowRanges { indptr: vec![0, 3, 3], intervals: vec![(0, 2), (4, 6), (8, 9)], strides: [0, 0, 1] };
        let windows = [Window { left: 5, right: 0 }];
        let mask = Mask { windows: Windows::PerHead(&windows), ranges: Some(&ranges) };
        let keys = segment(2, 0..10, 7);
        assert_eq!(mask.hull(&keys, 0, 0), 4..6);
        assert_eq!(mask.intervals(&keys, 0, 0, 0..usize::MAX).collect::<Vec<_>>(), vec![4..6]);
        assert_eq!(mask.intervals(&keys, 0, 0, 5..8).collect::<Vec<_>>(), vec![5..6]);
        assert_eq!(mask.count(&keys, 0, 0), 2);
        assert!(mask.hull(&keys, 0, 1).is_empty());
        assert_eq!(Mask { ranges: Some(&ranges), ..Mask::NONE }.count(&keys, 0, 0), 5);
    }
}
