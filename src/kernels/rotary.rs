//! Rotary position embedding (RoFormer, Su et al. 2021), applied to rows as they enter a cache.

use crate::dtype::{Element, Float};

/// Which elements of a row are rotated together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pairing {
    /// Elements `2 i` and `2 i + 1` (GPT-J).
    Interleaved,
    /// Elements `i` and `i + rotary_dim / 2` (GPT-NeoX, Llama).
    Halves,
}

/// Cosines and sines of every position: `[positions, rotary_dim / 2]` each, contiguous.
#[derive(Debug, Clone, Copy)]
pub struct Rotary<'a, T> {
    /// Cosines.
    pub cos: &'a [T],
    /// Sines.
    pub sin: &'a [T],
    /// Pairs of a row.
    pub pairs: usize,
    /// Which elements make a pair.
    pub pairing: Pairing,
}

impl<T: Element> Rotary<'_, T> {
    /// Rotates the first `2 * pairs` elements of `row` by the angles of `position`; the others are copied.
    pub fn rotate(&self, row: &[T], position: usize, out: &mut [T]) {
        out.copy_from_slice(row);
        let angles = position * self.pairs..(position + 1) * self.pairs;
        for (i, (cos, sin)) in self.cos[angles.clone()].iter().zip(&self.sin[angles]).enumerate() {
            let (first, second) = match self.pairing {
                Pairing::Interleaved => (2 * i, 2 * i + 1),
                Pairing::Halves => (i, i + self.pairs),
            };
            let [x, y, cos, sin] = [row[first], row[second], *cos, *sin].map(|x| x.to_acc().to_f64());
            out[first] = T::from_acc(T::Acc::from_f64(x * cos - y * sin));
            out[second] = T::from_acc(T::Acc::from_f64(x * sin + y * cos));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quarter_turn_swaps_each_pair() {
        let row = [1f32, 2.0, 3.0, 4.0, 5.0];
        let mut out = [0f32; 5];
        let rotary = |pairing| Rotary { cos: &[1.0, 1.0, 0.0, 0.0], sin: &[0.0, 0.0, 1.0, 1.0], pairs: 2, pairing };
        rotary(Pairing::Interleaved).rotate(&row, 1, &mut out);
        assert_eq!(out.map(f32::to_bits), [-2f32, 1.0, -4.0, 3.0, 5.0].map(f32::to_bits));
        rotary(Pairing::Halves).rotate(&row, 1, &mut out);
        assert_eq!(out.map(f32::to_bits), [-3f32, -4.0, 1.0, 2.0, 5.0].map(f32::to_bits));
        rotary(Pairing::Halves).rotate(&row, 0, &mut out);
        assert_eq!(out.map(f32::to_bits), row.map(f32::to_bits));
    }
}
