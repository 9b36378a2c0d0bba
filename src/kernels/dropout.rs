//! Dropout of weights: which ones follows from the place of query and key, not from the order of work.

use crate::dtype::Float;
use crate::index::Query;
use crate::math::load::MAX_LANES;
use crate::math::philox::philox;
use std::ops::Range;

/// Keys whose fate one counter decides.
const KEYS: usize = 4;

/// Weights become 0 with a probability, and are divided by that of the others.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Dropout {
    /// From 0 to below 1.
    pub probability: f64,
    /// What makes calls differ.
    pub seed: u64,
}

impl Dropout {
    /// What the weight of a query and the key at `position` is multiplied by.
    pub fn factor(&self, query: &Query<'_>, position: usize) -> f64 {
        let mut factors = [0.0];
        self.factors(|_| *query, 1, position..position + 1, &mut factors, 1);
        factors[0]
    }

    /// The factors of `lanes` queries and the keys at `positions`: those of a key lie side by side in `factors`, keys are `stride` apart.
    #[inline(always)]
    pub fn factors<'q, A: Float>(
        &self,
        query: impl Fn(usize) -> Query<'q>,
        lanes: usize,
        positions: Range<usize>,
        factors: &mut [A],
        stride: usize,
    ) {
        let kept = A::from_f64(1.0 / (1.0 - self.probability));
        let threshold = (self.probability * (1u64 << 32) as f64) as u64;
        let (mut tokens, mut heads, mut sequences) = ([0; MAX_LANES], [0; MAX_LANES], [0; MAX_LANES]);
        for (lane, token) in tokens[..lanes].iter_mut().enumerate() {
            let query = query(lane);
            let at = query.at();
            (*token, heads[lane], sequences[lane]) = (at[2] as u32, at[1] as u32, query.segment.sequence as u32);
        }
        let mut block = positions.start / KEYS;
        while block * KEYS < positions.end {
            let counters = [[block as u32; MAX_LANES], tokens, heads, sequences];
            for (i, numbers) in philox(counters, self.seed).iter().enumerate() {
                let position = block * KEYS + i;
                if positions.contains(&position) {
                    let row = &mut factors[(position - positions.start) * stride..][..lanes];
                    for (factor, &number) in row.iter_mut().zip(numbers) {
                        *factor = if u64::from(number) < threshold { A::ZERO } else { kept };
                    }
                }
            }
            block += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::index::Segment;

    #[test]
    fn places_decide_and_the_share_is_right() {
        let segment =
            Segment { sequence: 3, q_batch: 3, q_first: 0, q_len: 64, k_batch: 3, k_first: 0, k_start: 0, k_end: 500, offset: 0 };
        let query = |token| Query { segment: &segment, token, head: 2 };
        let dropout = Dropout { probability: 0.25, seed: 7 };
        let mut factors = vec![0f32; 500 * 16];
        dropout.factors(query, 16, 0..500, &mut factors, 16);
        let dropped = factors.iter().filter(|&&x| x == 0.0).count();
        assert!((1800..2200).contains(&dropped), "{dropped} of 8000");
        for (lane, position) in [(0, 0), (3, 17), (15, 499), (9, 250)] {
            let factor = dropout.factor(&query(lane), position) as f32;
            assert!((factor - factors[position * 16 + lane]).abs() < 1e-9);
        }
        let mut part = vec![0f32; 7 * 20];
        dropout.factors(|lane| query(lane + 5), 4, 101..108, &mut part, 20);
        assert_eq!(part[2 * 20 + 3].to_bits(), factors[103 * 16 + 8].to_bits());
        let other = Dropout { seed: 8, ..dropout };
        let bits = |dropout: Dropout| (0..100).map(|position| dropout.factor(&query(0), position).to_bits()).collect::<Vec<_>>();
        assert_ne!(bits(other), bits(dropout));
    }
}
