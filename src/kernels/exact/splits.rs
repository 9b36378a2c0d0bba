//! How a decode call is cut into pieces along the key axis: by the lengths alone, so that results do not depend on threads.

use super::ExactArgs;
use crate::dtype::Element;
use crate::index::Segment;
use std::ops::Range;

/// Rows of queries of one piece: what the scratch is laid out for.
pub const MAX_ROWS: usize = 32;
/// Pieces of a call: enough to even out what differs between any usual number of threads.
const PIECES: usize = 64;
/// Keys of a piece: fewer are not worth merging, more leave threads idle at the end.
const PIECE_KEYS: Range<usize> = 256..2048;
/// Pieces end at multiples of this, as blocks of keys do.
const STEP: usize = 64;

/// One piece of work.
#[derive(Debug, Clone)]
pub struct Piece {
    /// Its segment.
    pub segment: Segment,
    /// Key/value head.
    pub kv_head: usize,
    /// First query row `(token, head of the group)`.
    pub first_row: usize,
    /// Query rows.
    pub rows: usize,
    /// Keys.
    pub keys: Range<usize>,
    /// Whether other pieces hold the other keys.
    pub partial: bool,
}

/// The cut.
#[derive(Debug)]
pub struct Splits {
    /// First piece of every segment, and the number of pieces.
    starts: Vec<usize>,
    /// Every segment, the keys that its queries see, and its query rows.
    segments: Vec<(Segment, Range<usize>, usize)>,
    chunk: usize,
    kv_heads: usize,
}

impl Splits {
    /// Cuts a call, into at most `num_splits` pieces along the keys if that is given.
    pub fn new<T: Element>(args: &ExactArgs<'_, T>, num_splits: Option<usize>) -> Self {
        let shape = args.shape;
        let kv_heads = shape.num_kv_heads;
        let extent = |segment: usize| {
            let segment = args.segment(segment);
            let rows = segment.q_len * shape.group();
            // Windows of their own may give a head other keys.
            let hulls = (0..if args.mask.is_monotone() { kv_heads.min(1) } else { kv_heads })
                .map(|head| args.hull(&segment, head, 0..rows));
            let union = |a: Range<usize>, b: Range<usize>| {
                if a.is_empty() {
                    b
                } else if b.is_empty() {
                    a
                } else {
                    a.start.min(b.start)..a.end.max(b.end)
                }
            };
            (segment, hulls.reduce(union).unwrap_or(0..0), rows)
        };
        let segments: Vec<_> = (0..args.segment_count()).map(extent).collect();
        let longest = segments.iter().map(|(_, keys, _)| keys.len()).max().unwrap_or(0);
        let total: usize = segments.iter().map(|(_, keys, rows)| keys.len() * rows.div_ceil(MAX_ROWS)).sum();
        let chunk = match num_splits {
            Some(splits) => longest.div_ceil(splits.max(1)),
            None => (total * kv_heads).div_ceil(PIECES).clamp(PIECE_KEYS.start, PIECE_KEYS.end),
        };
        let chunk = chunk.max(1).next_multiple_of(STEP);
        let mut splits = Self { starts: vec![0], segments, chunk, kv_heads };
        for segment in 0..splits.segments.len() {
            let pieces = splits.along_keys(segment) * kv_heads * splits.groups(segment);
            splits.starts.push(splits.starts[segment] + pieces);
        }
        splits
    }

    /// Bundles of rows that share pieces.
    fn groups(&self, segment: usize) -> usize {
        self.segments[segment].2.div_ceil(MAX_ROWS)
    }

    /// Pieces that hold the keys of one segment and head.
    pub fn along_keys(&self, segment: usize) -> usize {
        self.segments[segment].1.len().div_ceil(self.chunk).max(1)
    }

    /// Number of pieces.
    pub fn count(&self) -> usize {
        self.starts[self.starts.len() - 1]
    }

    /// Whether some results are merged from several pieces.
    pub fn merges(&self) -> bool {
        (0..self.segments.len()).any(|segment| self.along_keys(segment) > 1)
    }

    /// Piece `index`: those of the same rows follow each other, along the keys.
    #[inline(always)]
    pub fn piece(&self, index: usize) -> Piece {
        let number = self.starts.partition_point(|&start| start <= index) - 1;
        let index = index - self.starts[number];
        let along_keys = self.along_keys(number);
        let (index, split) = (index / along_keys, index % along_keys);
        let groups = self.groups(number);
        let first_row = index % groups * MAX_ROWS;
        let (segment, Range { start, end }, rows) = self.segments[number].clone();
        let first = start + split * self.chunk;
        Piece {
            segment,
            kv_head: index / groups,
            first_row,
            rows: MAX_ROWS.min(rows - first_row),
            keys: first..end.min(first + self.chunk),
            partial: along_keys > 1,
        }
    }

    /// The first of the pieces along the keys, for each bundle of rows of one head.
    pub fn first_pieces(&self, segment: usize, kv_head: usize) -> impl Iterator<Item = usize> {
        let groups = self.groups(segment);
        let along_keys = self.along_keys(segment);
        let start = self.starts[segment];
        (0..groups).map(move |group| start + (kv_head * groups + group) * along_keys)
    }

    /// Number of segments.
    pub fn segment_count(&self) -> usize {
        self.segments.len()
    }

    /// Keys of all segments.
    pub fn keys(&self) -> usize {
        self.segments.iter().map(|(_, keys, _)| keys.len()).sum()
    }

    /// Number of key/value heads.
    pub fn kv_heads(&self) -> usize {
        self.kv_heads
    }
}
