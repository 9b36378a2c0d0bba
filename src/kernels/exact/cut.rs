//! How a mask cuts a block of keys for one panel of queries.

use crate::index::Query;
use crate::kernels::mask::Mask;
use std::ops::Range;

/// Most vectors of a panel.
pub const MAX_VECTORS: usize = 3;

/// `(vectors, keys)`: what is computed in one piece.
pub type Piece = (Range<usize>, Range<usize>);

/// Keys of a block, counted from its first, by vector of a panel. Neither starts nor ends go back from one vector to the next.
pub struct Cut {
    /// Vectors of the panel with rows in them.
    pub vectors: usize,
    /// Keys of the block.
    count: usize,
    /// From the first to the last key that some row of a vector sees.
    seen: [(usize, usize); MAX_VECTORS],
    /// Keys that every row of a vector sees.
    full: [(usize, usize); MAX_VECTORS],
}

impl Cut {
    /// Cuts the block of `count` keys from position `first` on, for `rows` rows of which `query` gives each.
    #[inline(always)]
    pub fn new<'q>(
        mask: &Mask<'_>,
        (rows, lanes): (usize, usize),
        (first, count): (usize, usize),
        query: impl Fn(usize) -> Query<'q>,
    ) -> Self {
        let vectors = rows.div_ceil(lanes);
        let mut cut = Self { vectors, count, seen: [(0, 0); MAX_VECTORS], full: [(0, 0); MAX_VECTORS] };
        let local = |key: usize| key.clamp(first, first + count) - first;
        let hull = |lane: usize| {
            let hull = mask.hull(&query(lane));
            (local(hull.start), local(hull.end))
        };
        for v in 0..vectors {
            let (from, to) = (v * lanes, ((v + 1) * lanes).min(rows) - 1);
            if mask.is_monotone() {
                let (earliest, latest) = (hull(from), hull(to));
                cut.seen[v] = (earliest.0, latest.1);
                cut.full[v] = (latest.0, earliest.1);
            } else {
                let (mut seen, mut full) = ((count, 0), (0, count));
                for query in (from..=to).map(&query) {
                    let mut intervals = mask.intervals(&query, first..first + count);
                    let Some(leading) = intervals.next() else {
                        full = (count, 0);
                        continue;
                    };
                    let trailing = intervals.last();
                    let (start, end) = (local(leading.start), local(trailing.as_ref().unwrap_or(&leading).end));
                    seen = (seen.0.min(start), seen.1.max(end));
                    full = if trailing.is_none() { (full.0.max(start), full.1.min(end)) } else { (count, 0) };
                }
                cut.seen[v] = (seen.0, seen.1.max(seen.0));
                cut.full[v] = full;
            }
        }
        for v in (1..vectors).rev() {
            cut.seen[v - 1].0 = cut.seen[v - 1].0.min(cut.seen[v].0);
        }
        for v in 1..vectors {
            cut.seen[v].1 = cut.seen[v].1.max(cut.seen[v - 1].1);
        }
        cut
    }

    /// Whether no row sees a key.
    #[inline(always)]
    pub fn is_empty(&self) -> bool {
        self.seen[..self.vectors].iter().all(|&(start, end)| start >= end)
    }

    /// Keys that vector `v` computes when pieces begin at multiples of `step`.
    #[inline(always)]
    pub fn computed(&self, v: usize, step: usize) -> Range<usize> {
        let (start, end) = self.seen[v];
        if start >= end {
            return 0..0;
        }
        start / step * step..end.next_multiple_of(step).min(self.last())
    }

    /// Keys from a multiple of `depth` on to the last one that a row of vector `v` sees.
    #[inline(always)]
    pub fn weighed(&self, v: usize, depth: usize) -> Range<usize> {
        let (start, end) = self.seen[v];
        if start < end { start / depth * depth..end } else { 0..0 }
    }

    /// Keys that all rows of vector `v` see.
    #[inline(always)]
    pub fn full(&self, v: usize) -> Range<usize> {
        let (start, end) = self.full[v];
        start..end.max(start)
    }

    /// Whether vector `v` computes a key that some of its rows do not see, when pieces begin at multiples of `step`.
    #[inline(always)]
    pub fn hides(&self, v: usize, step: usize) -> bool {
        let computed = self.computed(v, step);
        let (start, end) = self.full[v];
        !computed.is_empty() && (computed.start < start || end < computed.end)
    }

    /// Whether the last operand of vector `v` holds a key of the block beyond the last that a row sees.
    #[inline(always)]
    pub fn splits_operand(&self, v: usize, depth: usize) -> bool {
        let end = self.weighed(v, depth).end;
        !end.is_multiple_of(depth) && end < self.count
    }

    /// One more than the last key that some row sees.
    #[inline(always)]
    fn last(&self) -> usize {
        self.seen[self.vectors - 1].1
    }

    /// What is computed when pieces begin at multiples of `step`; in the order of the keys, some of them empty.
    #[inline(always)]
    pub fn pieces(&self, step: usize) -> [Piece; 2 * MAX_VECTORS] {
        let mut bounds = [self.last(); 2 * MAX_VECTORS + 1];
        let mut ends = [(0, 0); MAX_VECTORS];
        for v in 0..self.vectors {
            let keys = self.computed(v, step);
            ends[v] = (keys.start, keys.end);
            // An empty range cuts nothing.
            (bounds[2 * v], bounds[2 * v + 1]) = if keys.is_empty() { (self.last(), self.last()) } else { ends[v] };
        }
        bounds.sort_unstable();
        std::array::from_fn(|i| {
            let keys = bounds[i]..bounds[i + 1];
            let takes_part = |&v: &usize| ends[v].0 <= keys.start && keys.start < ends[v].1;
            let first = (0..self.vectors).find(takes_part).unwrap_or(0);
            let last = (0..self.vectors).rev().find(takes_part).map_or(first, |v| v + 1);
            if first < last { (first..last, keys) } else { (0..0, 0..0) }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::index::Segment;
    use crate::kernels::mask::{Window, Windows};

    fn segment(keys: usize) -> Segment {
        Segment { sequence: 0, q_batch: 0, q_first: 0, q_len: 12, k_batch: 0, k_first: 0, k_start: 0, k_end: keys, offset: 0 }
    }

    fn cut(mask: &Mask<'_>, keys: usize, block: (usize, usize)) -> Cut {
        let segment = segment(keys);
        Cut::new(mask, (12, 4), block, |token| Query { segment: &segment, token, head: 0 })
    }

    #[test]
    fn the_pieces_of_a_window_cover_what_each_vector_sees() {
        let mask = Mask { windows: Windows::One(Window { left: 3, right: 0 }), ranges: None };
        let cut = cut(&mask, 12, (0, 12));
        assert_eq!((0..3).map(|v| cut.weighed(v, 1)).collect::<Vec<_>>(), [0..4, 1..8, 5..12]);
        assert_eq!((0..3).map(|v| cut.full(v)).collect::<Vec<_>>(), [0..1, 4..5, 8..9]);
        for step in [1, 2, 4, 8] {
            let mut covered = [[0; 12]; 3];
            for (vectors, keys) in cut.pieces(step) {
                for v in vectors {
                    keys.clone().for_each(|j| covered[v][j] += 1);
                }
            }
            for (v, row) in covered.iter().enumerate() {
                for (j, &times) in row.iter().enumerate() {
                    assert_eq!(times, usize::from(cut.computed(v, step).contains(&j)), "vector {v}, key {j}, step {step}");
                }
            }
        }
    }

    #[test]
    fn blocks_beyond_a_mask_are_empty() {
        let mask = Mask { windows: Windows::One(Window { left: 3, right: 0 }), ranges: None };
        assert!(cut(&mask, 64, (12, 12)).is_empty());
        let causal = cut(&Mask::CAUSAL, 64, (4, 8));
        assert!(!causal.is_empty() && causal.computed(0, 1).is_empty());
        let pieces: Vec<_> = causal.pieces(1).into_iter().filter(|(_, keys)| !keys.is_empty()).collect();
        assert_eq!(pieces, [(1..3, 0..4), (2..3, 4..8)]);
        assert!(!cut(&Mask::NONE, 64, (0, 8)).hides(1, 8));
        let ahead = Mask { windows: Windows::One(Window { left: Window::UNBOUNDED, right: 10 }), ranges: None };
        assert!(!cut(&ahead, 7, (0, 7)).splits_operand(0, 2));
        assert!(causal.splits_operand(1, 3) && !causal.splits_operand(1, 2));
    }
}
