//! Structured masks: which keys a query sees, as data.

use crate::index::Query;
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

    /// So many keys, no more than what counts as all.
    pub fn side(keys: i64) -> isize {
        (keys as isize).min(Self::UNBOUNDED)
    }

    /// What both windows show.
    pub fn within(self, other: Self) -> Self {
        Self { left: self.left.min(other.left), right: self.right.min(other.right) }
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
    fn row(&self, query: &Query<'_>) -> &[(usize, usize)] {
        let row: usize = query.at().iter().zip(self.strides).map(|(i, stride)| i * stride).sum();
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

impl<'m> Mask<'m> {
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
    fn band(&self, query: &Query<'_>) -> Range<usize> {
        let (segment, position) = (query.segment, query.position());
        let window = self.windows.of(query.head);
        let clip = |bound: isize| bound.clamp(segment.k_start as isize, segment.k_end as isize) as usize;
        let start = clip(position.saturating_sub(window.left));
        start..clip(position.saturating_add(window.right).saturating_add(1)).max(start)
    }

    /// The positions from the first to the last key that a query sees; an empty range if it sees none.
    #[inline(always)]
    pub fn hull(&self, query: &Query<'_>) -> Range<usize> {
        let band = self.band(query);
        let Some(ranges) = self.ranges else { return band };
        let row = ranges.row(query);
        let first = row.partition_point(|&(_, end)| end <= band.start);
        let last = row.partition_point(|&(start, _)| start < band.end);
        if first >= last {
            return band.start..band.start;
        }
        row[first].0.max(band.start)..row[last - 1].1.min(band.end)
    }

    /// The intervals that a query sees, within `keys`.
    #[inline(always)]
    pub fn intervals<'s>(&'s self, query: &Query<'_>, keys: Range<usize>) -> impl Iterator<Item = Range<usize>> + use<'s, 'm> {
        let band = self.band(query);
        let bounds = band.start.max(keys.start)..band.end.min(keys.end);
        let row: &[(usize, usize)] = match self.ranges {
            Some(ranges) => ranges.row(query),
            None => &[(0, usize::MAX)],
        };
        let first = row.partition_point(|&(_, end)| end <= bounds.start);
        row[first..]
            .iter()
            .map(move |&(start, end)| start.max(bounds.start)..end.min(bounds.end))
            .take_while(|interval| !interval.is_empty())
    }

    /// What lies between the intervals that a query sees, within `keys`; some of it empty.
    #[inline(always)]
    pub fn gaps<'s>(&'s self, query: &Query<'_>, keys: Range<usize>) -> impl Iterator<Item = Range<usize>> + use<'s, 'm> {
        let (mut next, end) = (keys.start, keys.end);
        self.intervals(query, keys).chain(std::iter::once(end..end)).map(move |seen| {
            let gap = next..seen.start;
            next = seen.end;
            gap
        })
    }

    /// Number of keys that a query sees.
    pub fn count(&self, query: &Query<'_>) -> usize {
        self.intervals(query, 0..usize::MAX).map(|interval| interval.len()).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::index::Segment;

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
        let hulls = |mask: Mask<'_>, q, k, offset| {
            (0..q).map(|token| mask.hull(&Query { segment: &segment(q, 0..k, offset), token, head: 0 })).collect::<Vec<_>>()
        };
        assert_eq!(hulls(Mask::CAUSAL, 2, 4, 0), [0..1, 0..2]);
        assert_eq!(hulls(Mask::CAUSAL, 2, 4, 2), [0..3, 0..4]);
        assert_eq!(hulls(Mask::CAUSAL, 4, 2, -2), [0..0, 0..0, 0..1, 0..2]);
        assert_eq!(hulls(Mask::NONE, 2, 4, 2), [0..4, 0..4]);
        let window = Mask { windows: Windows::One(Window { left: 1, right: 0 }), ranges: None };
        assert_eq!(hulls(window, 3, 5, 2), [1..3, 2..4, 3..5]);
        assert!(window.hull(&Query { segment: &segment(1, 0..3, 9), token: 0, head: 0 }).is_empty());
    }

    #[test]
    fn intervals_are_clipped() {
        let ranges = RowRanges { indptr: vec![0, 3, 3], intervals: vec![(0, 2), (4, 6), (8, 9)], strides: [0, 0, 1] };
        let windows = [Window { left: 5, right: 0 }];
        let mask = Mask { windows: Windows::PerHead(&windows), ranges: Some(&ranges) };
        let keys = segment(2, 0..10, 7);
        let query = Query { segment: &keys, token: 0, head: 0 };
        assert_eq!(mask.hull(&query), 4..6);
        assert_eq!(mask.intervals(&query, 0..usize::MAX).collect::<Vec<_>>(), vec![4..6]);
        assert_eq!(mask.intervals(&query, 5..8).collect::<Vec<_>>(), vec![5..6]);
        assert_eq!(mask.gaps(&query, 3..9).collect::<Vec<_>>(), vec![3..4, 6..9]);
        assert_eq!(mask.count(&query), 2);
        assert!(mask.hull(&Query { token: 1, ..query }).is_empty());
        assert_eq!(Mask { ranges: Some(&ranges), ..Mask::NONE }.count(&query), 5);
    }
}
