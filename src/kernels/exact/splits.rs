//! How a decode call is cut into pieces along the key axis: by the lengths alone, so that results do not depend on threads.

use super::ExactArgs;
use crate::dtype::Element;
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
    /// Sequence.
    pub batch: usize,
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
    /// First piece of every sequence, and the number of pieces.
    starts: Vec<usize>,
    keys: Vec<Range<usize>>,
    chunk: usize,
    rows: usize,
    kv_heads: usize,
}

impl Splits {
    /// Cuts a call, into at most `num_splits` pieces along the keys if that is given.
    pub fn new<T: Element>(args: &ExactArgs<'_, T>, num_splits: Option<usize>) -> Self {
        let shape = args.shape;
        let last = shape.seqlen_q.saturating_sub(1);
        let keys: Vec<_> = (0..shape.batch).map(|batch| args.visible(batch, last)).collect();
        let rows = shape.seqlen_q * shape.group();
        let groups = rows.div_ceil(MAX_ROWS);
        let longest = keys.iter().map(Range::len).max().unwrap_or(0);
        let total: usize = keys.iter().map(Range::len).sum();
        let chunk = match num_splits {
            Some(splits) => longest.div_ceil(splits.max(1)),
            None => (total * shape.num_kv_heads * groups).div_ceil(PIECES).clamp(PIECE_KEYS.start, PIECE_KEYS.end),
        };
        let chunk = chunk.max(1).next_multiple_of(STEP);
        let mut splits = Self { starts: vec![0], keys, chunk, rows, kv_heads: shape.num_kv_heads };
        for batch in 0..shape.batch {
            let pieces = splits.along_keys(batch) * shape.num_kv_heads * groups;
            splits.starts.push(splits.starts[batch] + pieces);
        }
        splits
    }

    /// Pieces that hold the keys of one sequence and head.
    pub fn along_keys(&self, batch: usize) -> usize {
        self.keys[batch].len().div_ceil(self.chunk).max(1)
    }

    /// Number of pieces.
    pub fn count(&self) -> usize {
        self.starts[self.starts.len() - 1]
    }

    /// Whether some results are merged from several pieces.
    pub fn merges(&self) -> bool {
        (0..self.keys.len()).any(|batch| self.along_keys(batch) > 1)
    }

    /// Piece `index`: those of the same rows follow each other, along the keys.
    #[inline(always)]
    pub fn piece(&self, index: usize) -> Piece {
        let batch = self.starts.partition_point(|&start| start <= index) - 1;
        let index = index - self.starts[batch];
        let along_keys = self.along_keys(batch);
        let (index, split) = (index / along_keys, index % along_keys);
        let groups = self.rows.div_ceil(MAX_ROWS);
        let first_row = index % groups * MAX_ROWS;
        let Range { start, end } = self.keys[batch].clone();
        let first = start + split * self.chunk;
        Piece {
            batch,
            kv_head: index / groups,
            first_row,
            rows: MAX_ROWS.min(self.rows - first_row),
            keys: first..end.min(first + self.chunk),
            partial: along_keys > 1,
        }
    }

    /// The first of the pieces along the keys, for each group of rows of one head.
    pub fn first_pieces(&self, batch: usize, kv_head: usize) -> impl Iterator<Item = usize> {
        let groups = self.rows.div_ceil(MAX_ROWS);
        let along_keys = self.along_keys(batch);
        let start = self.starts[batch];
        (0..groups).map(move |group| start + (kv_head * groups + group) * along_keys)
    }

    /// Number of key/value heads.
    pub fn kv_heads(&self) -> usize {
        self.kv_heads
    }
}
