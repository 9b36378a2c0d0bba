//! How runs are cut into tasks. Cuts depend on sizes alone, so that results do not depend on the number of threads.

use super::args::Run;
use std::ops::Range;

/// Tokens of a run that are worked through in one go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    /// Number of the run.
    pub run: usize,
    /// First token of the run.
    pub start: usize,
    /// End of the tokens.
    pub end: usize,
}

/// Pieces of all runs, in groups of about as many tokens.
#[derive(Debug)]
pub struct Plan {
    pieces: Vec<Piece>,
    /// Where each group begins, and where the last one ends.
    starts: Vec<usize>,
}

impl Plan {
    /// Cuts runs into groups of up to `tokens` tokens, at least 1. Empty runs count as one token.
    pub fn new(runs: &[Run], tokens: usize) -> Self {
        let (mut pieces, mut starts, mut room) = (Vec::new(), vec![0], tokens);
        for (number, run) in runs.iter().enumerate() {
            let mut start = 0;
            loop {
                if room == 0 {
                    starts.push(pieces.len());
                    room = tokens;
                }
                let end = run.len.min(start + room);
                pieces.push(Piece { run: number, start, end });
                room -= (end - start).max(1);
                start = end;
                if start == run.len {
                    break;
                }
            }
        }
        if !pieces.is_empty() {
            starts.push(pieces.len());
        }
        Self { pieces, starts }
    }

    /// The number of groups.
    pub fn len(&self) -> usize {
        self.starts.len() - 1
    }

    /// The pieces of a group, in order.
    pub fn group(&self, number: usize) -> &[Piece] {
        &self.pieces[self.starts[number]..self.starts[number + 1]]
    }
}

/// The runs of a row of the batch.
pub fn runs_of(runs: &[Run], batch: usize) -> Range<usize> {
    runs.partition_point(|run| run.batch < batch)..runs.partition_point(|run| run.batch <= batch)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_cover_every_token_once() {
        let mut first = 0;
        let runs: Vec<Run> = [5, 0, 130, 1, 64, 0]
            .into_iter()
            .map(|len| {
                first += len;
                Run { batch: 0, first: first - len, len, initial: None, last: None, hidden: false }
            })
            .collect();
        for tokens in [1, 3, 64, 1000] {
            let plan = Plan::new(&runs, tokens);
            let mut seen = vec![Vec::new(); runs.len()];
            for group in 0..plan.len() {
                let pieces = plan.group(group);
                assert!(!pieces.is_empty());
                assert!(pieces.iter().map(|piece| piece.end - piece.start).sum::<usize>() <= tokens);
                for piece in pieces {
                    seen[piece.run].push((piece.start, piece.end));
                }
            }
            for (run, pieces) in runs.iter().zip(seen) {
                assert_eq!((pieces[0].0, pieces.last().unwrap().1), (0, run.len));
                assert!(pieces.windows(2).all(|pair| pair[0].1 == pair[1].0));
            }
        }
        assert_eq!(Plan::new(&[], 7).len(), 0);
    }
}
