//! Masks as their users write them, and what kernels make of them: windows, segments, intervals.

use super::mask::{RowRanges, Window};
use crate::index::Segment;
use std::collections::HashMap;
use std::ops::Range;

/// Document ids of queries or keys, one row for each sequence or one for all.
#[derive(Debug, Clone)]
pub struct Ids {
    /// The ids, row by row.
    pub data: Vec<i64>,
    /// Length of a row.
    pub width: usize,
}

impl Ids {
    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.data.len().checked_div(self.width).unwrap_or(1)
    }

    fn row(&self, batch: usize) -> &[i64] {
        let row = if self.rows() == 1 { 0 } else { batch };
        &self.data[row * self.width..(row + 1) * self.width]
    }
}

/// Tokens of each sequence that are none: a left padding, and what follows the length. One number for all sequences, or one each.
#[derive(Debug, Clone)]
pub struct Padding {
    /// Tokens up to the last, the left padding included.
    pub lengths: Vec<usize>,
    /// Tokens before the first.
    pub leftpad: Vec<usize>,
    /// Whether queries at such places see nothing.
    pub queries: bool,
}

fn of_batch(values: &[usize], batch: usize) -> usize {
    values[if values.len() == 1 { 0 } else { batch }]
}

impl Padding {
    /// Places of the tokens.
    pub fn tokens(&self, batch: usize) -> Range<usize> {
        let start = of_batch(&self.leftpad, batch);
        start..of_batch(&self.lengths, batch).max(start)
    }
}

/// Which keys `j` a query at position `p` sees.
#[derive(Debug, Clone)]
pub enum Rule {
    /// `p - left <= j <= p + right`.
    Window(Window),
    /// `j / size == p / size`.
    Chunked(usize),
    /// `j / size <= p / size`.
    BlockCausal(usize),
    /// `j < length`, by sequence.
    Prefix(Vec<usize>),
    /// Equal ids.
    Document {
        /// Of the queries.
        queries: Ids,
        /// Of the keys.
        keys: Ids,
    },
    /// Keys that are no padding.
    Padding(Padding),
    /// What all of them show.
    And(Vec<Rule>),
    /// What one of them shows.
    Or(Vec<Rule>),
}

type Intervals = Vec<(usize, usize)>;

/// Extents of a call.
#[derive(Debug, Clone, Copy)]
pub struct Extents {
    /// Sequences.
    pub batch: usize,
    /// Queries.
    pub seqlen_q: usize,
    /// Keys.
    pub seqlen_k: usize,
    /// Position of the first query among the keys.
    pub offset: isize,
}

/// A mask without intervals: a window, and one segment for each sequence if some tokens are padding.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Band {
    /// The window.
    pub window: Window,
    /// Segments, unless all sequences are whole.
    pub segments: Option<Vec<Segment>>,
}

impl Rule {
    /// The rule as a band, if it is one.
    pub fn as_band(&self, extents: Extents) -> Option<Band> {
        let mut band = (Window::ALL, None);
        self.narrow(&mut band)?;
        let (window, padding) = band;
        let segments = padding.map(|padding| (0..extents.batch).map(|batch| segment(padding, batch, extents)).collect());
        Some(Band { window, segments })
    }

    fn narrow<'a>(&'a self, band: &mut (Window, Option<&'a Padding>)) -> Option<()> {
        match self {
            Self::Window(window) => {
                band.0 = band.0.within(*window);
            }
            Self::Padding(padding) if band.1.is_none() => band.1 = Some(padding),
            Self::And(rules) => rules.iter().try_for_each(|rule| rule.narrow(band))?,
            Self::Padding(_)
            | Self::Chunked(_)
            | Self::BlockCausal(_)
            | Self::Prefix(_)
            | Self::Document { .. }
            | Self::Or(_) => {
                return None;
            }
        }
        Some(())
    }

    /// The sequences that the rule tells apart: 1 if all are alike.
    fn rows(&self) -> usize {
        match self {
            Self::Window(_) | Self::Chunked(_) | Self::BlockCausal(_) => 1,
            Self::Prefix(lengths) => lengths.len(),
            Self::Document { queries, keys } => queries.rows().max(keys.rows()),
            Self::Padding(padding) => padding.lengths.len().max(padding.leftpad.len()),
            Self::And(rules) | Self::Or(rules) => rules.iter().map(Self::rows).max().unwrap_or(1),
        }
    }

    /// The keys that each query sees.
    pub fn ranges(&self, extents: Extents) -> RowRanges {
        let batches = if self.rows() == 1 { extents.batch.min(1) } else { extents.batch };
        let mut found =
            RowRanges { indptr: vec![0], intervals: Vec::new(), strides: [if batches > 1 { extents.seqlen_q } else { 0 }, 0, 1] };
        for batch in 0..batches {
            let prepared = Prepared::new(self, batch);
            for token in 0..extents.seqlen_q {
                let row = prepared.intervals(token, extents);
                found.intervals.extend(row);
                found.indptr.push(found.intervals.len());
            }
        }
        found
    }
}

fn segment(padding: &Padding, batch: usize, extents: Extents) -> Segment {
    let keys = padding.tokens(batch);
    let (first, last) = if padding.queries {
        let place = |key: usize| (key as isize - extents.offset).clamp(0, extents.seqlen_q as isize) as usize;
        (place(keys.start), place(keys.end))
    } else {
        (0, extents.seqlen_q)
    };
    Segment {
        sequence: batch,
        q_batch: batch,
        q_first: first,
        q_len: last.max(first) - first,
        k_batch: batch,
        k_first: 0,
        k_start: keys.start.min(extents.seqlen_k),
        k_end: keys.end.min(extents.seqlen_k),
        offset: extents.offset + first as isize,
    }
}

/// A rule for one sequence, with the intervals of every document.
enum Prepared<'a> {
    Plain(&'a Rule, usize),
    Document(&'a [i64], HashMap<i64, Intervals>),
    And(Vec<Prepared<'a>>),
    Or(Vec<Prepared<'a>>),
}

impl<'a> Prepared<'a> {
    fn new(rule: &'a Rule, batch: usize) -> Self {
        let all = |rules: &'a [Rule]| rules.iter().map(|rule| Self::new(rule, batch)).collect();
        match rule {
            Rule::And(rules) => Self::And(all(rules)),
            Rule::Or(rules) => Self::Or(all(rules)),
            Rule::Document { queries, keys } => {
                let mut documents: HashMap<i64, Intervals> = HashMap::new();
                for (j, id) in keys.row(batch).iter().enumerate() {
                    let intervals = documents.entry(*id).or_default();
                    match intervals.last_mut() {
                        Some(last) if last.1 == j => last.1 += 1,
                        _ => intervals.push((j, j + 1)),
                    }
                }
                Self::Document(queries.row(batch), documents)
            }
            plain => Self::Plain(plain, batch),
        }
    }

    fn intervals(&self, token: usize, extents: Extents) -> Intervals {
        let position = extents.offset + token as isize;
        let clip = |key: isize| key.clamp(0, extents.seqlen_k as isize) as usize;
        let one = |start: isize, end: isize| {
            let (start, end) = (clip(start), clip(end));
            if start < end { vec![(start, end)] } else { vec![] }
        };
        match self {
            Self::And(rules) => {
                let all = one(0, extents.seqlen_k as isize);
                rules.iter().fold(all, |seen, rule| intersection(&seen, &rule.intervals(token, extents)))
            }
            Self::Or(rules) => union(rules.iter().flat_map(|rule| rule.intervals(token, extents)).collect()),
            Self::Document(ids, documents) => documents.get(&ids[token]).cloned().unwrap_or_default(),
            Self::Plain(rule, batch) => match rule {
                Rule::Window(window) => {
                    one(position.saturating_sub(window.left), position.saturating_add(window.right).saturating_add(1))
                }
                Rule::Chunked(size) => {
                    let first = position.div_euclid(*size as isize).saturating_mul(*size as isize);
                    one(first, first.saturating_add(*size as isize))
                }
                Rule::BlockCausal(size) => {
                    one(0, position.div_euclid(*size as isize).saturating_add(1).saturating_mul(*size as isize))
                }
                Rule::Prefix(lengths) => one(0, isize::try_from(of_batch(lengths, *batch)).unwrap_or(isize::MAX)),
                Rule::Padding(padding) => {
                    let tokens = padding.tokens(*batch);
                    let hidden = padding.queries && !usize::try_from(position).is_ok_and(|position| tokens.contains(&position));
                    if hidden { vec![] } else { one(tokens.start as isize, tokens.end as isize) }
                }
                Rule::Document { .. } | Rule::And(_) | Rule::Or(_) => unreachable!("prepared otherwise"),
            },
        }
    }
}

fn intersection(a: &[(usize, usize)], b: &[(usize, usize)]) -> Intervals {
    let (mut i, mut j) = (0, 0);
    let mut common = Vec::new();
    while let (Some(x), Some(y)) = (a.get(i), b.get(j)) {
        let (start, end) = (x.0.max(y.0), x.1.min(y.1));
        if start < end {
            common.push((start, end));
        }
        if x.1 <= y.1 {
            i += 1;
        } else {
            j += 1;
        }
    }
    common
}

fn union(mut intervals: Intervals) -> Intervals {
    intervals.sort_unstable();
    let mut merged: Intervals = Vec::new();
    for (start, end) in intervals {
        match merged.last_mut() {
            Some(last) if start <= last.1 => last.1 = last.1.max(end),
            _ => merged.push((start, end)),
        }
    }
    merged
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXTENTS: Extents = Extents { batch: 2, seqlen_q: 3, seqlen_k: 6, offset: 3 };

    fn rows(rule: &Rule) -> Vec<Intervals> {
        let ranges = rule.ranges(EXTENTS);
        ranges.indptr.windows(2).map(|at| ranges.intervals[at[0]..at[1]].to_vec()).collect()
    }

    #[test]
    fn rules_are_intervals() {
        let causal = Rule::Window(Window::CAUSAL);
        assert_eq!(rows(&causal), [vec![(0, 4)], vec![(0, 5)], vec![(0, 6)]]);
        assert_eq!(rows(&Rule::And(vec![Rule::Chunked(4), causal.clone()])), [vec![(0, 4)], vec![(4, 5)], vec![(4, 6)]]);
        assert_eq!(rows(&Rule::BlockCausal(2)), [vec![(0, 4)], vec![(0, 6)], vec![(0, 6)]]);
        let near = Rule::Window(Window { left: 0, right: 0 });
        let prefix = rows(&Rule::Or(vec![Rule::Prefix(vec![1, 4]), near]));
        assert_eq!(prefix[..3], [vec![(0, 1), (3, 4)], vec![(0, 1), (4, 5)], vec![(0, 1), (5, 6)]]);
        assert_eq!(prefix[3..], [vec![(0, 4)], vec![(0, 5)], vec![(0, 4), (5, 6)]]);
        let document = Rule::Document {
            queries: Ids { data: vec![7, 8, 9], width: 3 },
            keys: Ids { data: vec![7, 8, 7, 7, 8, 8], width: 6 },
        };
        assert_eq!(rows(&document), [vec![(0, 1), (2, 4)], vec![(1, 2), (4, 6)], vec![]]);
    }

    #[test]
    fn bands_are_found() {
        let window = Rule::Window(Window { left: 2, right: 5 });
        let padding = Rule::Padding(Padding { lengths: vec![6, 5], leftpad: vec![4, 0], queries: true });
        let rule = Rule::And(vec![Rule::And(vec![window, Rule::Window(Window::CAUSAL)]), padding]);
        let band = rule.as_band(EXTENTS).unwrap();
        assert_eq!(band.window, Window { left: 2, right: 0 });
        let segments = band.segments.unwrap();
        assert_eq!((segments[0].q_first, segments[0].q_len, segments[0].offset), (1, 2, 4));
        assert_eq!((segments[1].q_first, segments[1].q_len, segments[1].k_start..segments[1].k_end), (0, 2, 0..5));
        assert_eq!(rows(&rule)[..3], [vec![], vec![(4, 5)], vec![(4, 6)]]);
        assert!(Rule::Or(vec![]).as_band(EXTENTS).is_none());
    }
}
