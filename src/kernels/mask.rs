//! Structured masks: which keys a query sees, as data.

/// Keys that queries see, by position alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Mask {
    /// All keys.
    #[default]
    None,
    /// Query `i` sees keys `j <= i + offset`.
    Causal {
        /// Position of the first query among the keys; negative when there are more queries than keys.
        offset: isize,
    },
}

impl Mask {
    /// The first query sees the first key only.
    ///
    /// ```text
    /// 2 queries, 4 keys:  x . . .
    ///                     x x . .
    /// ```
    pub fn causal_top_left() -> Self {
        Self::Causal { offset: 0 }
    }

    /// The last query sees all keys.
    ///
    /// ```text
    /// 2 queries, 4 keys:  x x x .
    ///                     x x x x
    /// ```
    pub fn causal_bottom_right(seqlen_q: usize, seqlen_k: usize) -> Self {
        Self::Causal { offset: seqlen_k as isize - seqlen_q as isize }
    }

    /// Query `token` sees keys `0..key_limit`, the limit never beyond `seqlen_k`.
    #[inline(always)]
    pub fn key_limit(self, token: usize, seqlen_k: usize) -> usize {
        match self {
            Self::None => seqlen_k,
            Self::Causal { offset } => (token as isize + offset + 1).clamp(0, seqlen_k as isize) as usize,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn alignments() {
        let limits = |mask: Mask, q, k| (0..q).map(|i| mask.key_limit(i, k)).collect::<Vec<_>>();
        assert_eq!(limits(Mask::causal_top_left(), 2, 4), [1, 2]);
        assert_eq!(limits(Mask::causal_bottom_right(2, 4), 2, 4), [3, 4]);
        assert_eq!(limits(Mask::causal_bottom_right(4, 2), 4, 2), [0, 0, 1, 2]);
        assert_eq!(limits(Mask::None, 2, 4), [4, 4]);
    }
}
