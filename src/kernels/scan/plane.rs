//! Channels by steps, on their way in and out: vectors of channels for the loops, whichever axis is contiguous for the caller.

use crate::dtype::Element;
use crate::error::{Error, Result};
use crate::math::load::{load_padded, store_padded};
use crate::parallel::PieceWriter;
use crate::simd::{Isa, SimdElement, Vector};
use crate::tensor::{extent, shape_text};
use std::ops::Range;

/// Steps that the loops take between two visits of the caller's memory.
pub const CHUNK: usize = 64;

/// Which axis of `[B, G, C, L]` is contiguous.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Order {
    Steps,
    Channels,
}

impl Order {
    fn of(shape: [usize; 4], strides: [usize; 4]) -> Option<Self> {
        let [_, _, channels, steps] = shape;
        match (strides[2], strides[3]) {
            (_, 1) if steps > 1 => Some(Self::Steps),
            (1, _) => Some(Self::Channels),
            _ if steps <= 1 => Some(Self::Steps),
            _ if channels <= 1 => Some(Self::Channels),
            _ => None,
        }
    }
}

/// A read-only `[B, G, C, L]` array of `L` steps of `C` channels: any strides, except that channels or steps are contiguous.
#[derive(Debug, Clone, Copy)]
pub struct Plane<'a, T> {
    data: &'a [T],
    order: Order,
    strides: [usize; 4],
}

/// Whether an array of such strides can be a [`Plane`].
pub fn is_plane(shape: [usize; 4], strides: [usize; 4]) -> bool {
    shape.contains(&0) || Order::of(shape, strides).is_some()
}

impl<'a, T> Plane<'a, T> {
    /// Views `data`.
    ///
    /// # Errors
    /// [`Error::Shape`] when neither channels nor steps are contiguous or the last element lies beyond `data`,
    /// [`Error::Overflow`] when its position has no `usize`.
    pub fn new(arg: &'static str, data: &'a [T], shape: [usize; 4], strides: [usize; 4]) -> Result<Self> {
        let wrong = |expected| Error::Shape { arg, expected, got: format!("{} with strides {strides:?}", shape_text(&shape)) };
        let order = if shape.contains(&0) { Some(Order::Steps) } else { Order::of(shape, strides) };
        let order = order.ok_or_else(|| wrong("with contiguous channels or steps".into()))?;
        if extent(arg, &shape, &strides)? > data.len() {
            return Err(wrong(format!("of at most {} elements", data.len())));
        }
        Ok(Self { data, order, strides })
    }

    /// Views `data` as a contiguous array.
    ///
    /// # Errors
    /// As [`Plane::new`].
    pub fn contiguous(arg: &'static str, data: &'a [T], shape: [usize; 4]) -> Result<Self> {
        Self::new(arg, data, shape, contiguous_strides(shape))
    }

    fn offset(&self, [b, g]: [usize; 2], channel: usize, step: usize) -> usize {
        b * self.strides[0] + g * self.strides[1] + channel * self.strides[2] + step * self.strides[3]
    }
}

/// Strides of an array whose elements follow each other in order.
pub fn contiguous_strides([_, g, c, l]: [usize; 4]) -> [usize; 4] {
    [g.saturating_mul(c).saturating_mul(l), c.saturating_mul(l), l, 1]
}

impl<T: Element> Plane<'_, T> {
    /// One element.
    pub fn at(&self, of: [usize; 2], channel: usize, step: usize) -> T {
        self.data[self.offset(of, channel, step)]
    }
}

impl<T: SimdElement> Plane<'_, T> {
    /// Writes up to [`CHUNK`] steps of some channels to `into`, `[vector of channels][CHUNK][lanes]`; lanes beyond the channels are 0.
    #[inline(always)]
    pub fn read<I: Isa>(&self, of: [usize; 2], channels: Range<usize>, steps: Range<usize>, into: &mut [T::Acc]) {
        let lanes = T::V::<I>::LANES;
        let count = steps.len();
        for (v, first) in channels.clone().step_by(lanes).enumerate() {
            let into = &mut into[v * CHUNK * lanes..(v + 1) * CHUNK * lanes];
            let width = lanes.min(channels.end - first);
            match self.order {
                Order::Channels => {
                    let mut start = self.offset(of, first, steps.start);
                    let mut t = 0;
                    while t < count * lanes {
                        load_padded::<T, I>(&self.data[start..start + width]).store(&mut into[t..]);
                        start += self.strides[3];
                        t += lanes;
                    }
                }
                Order::Steps => {
                    let mut t = 0;
                    while t < count {
                        let mut block = T::V::<I>::zero_block();
                        let mut start = self.offset(of, first, steps.start + t);
                        for row in &mut block.as_mut()[..width] {
                            *row = load_padded::<T, I>(&self.data[start..start + lanes.min(count - t)]);
                            start += self.strides[2];
                        }
                        let block = T::V::<I>::transpose(block);
                        for (i, row) in block.as_ref().iter().enumerate() {
                            row.store(&mut into[(t + i) * lanes..]);
                        }
                        t += lanes;
                    }
                }
            }
        }
    }
}

/// A writable [`Plane`], each element written by one task.
pub struct PlaneWriter<'a, T> {
    pieces: PieceWriter<'a, T>,
    order: Order,
}

impl<'a, T> PlaneWriter<'a, T> {
    /// Wraps `data`.
    ///
    /// # Panics
    /// When neither channels nor steps are contiguous, or as [`PieceWriter::new`].
    pub fn new(data: &'a mut [T], shape: [usize; 4], strides: [usize; 4]) -> Self {
        let order = if shape.contains(&0) { Order::Steps } else { Order::of(shape, strides).expect("a contiguous axis") };
        let ([b, g, c, l], [sb, sg, sc, sl]) = (shape, strides);
        let pieces = match order {
            Order::Steps => PieceWriter::new(data, shape, [sb, sg, sc]),
            Order::Channels => PieceWriter::new(data, [b, g, l, c], [sb, sg, sl]),
        };
        Self { pieces, order }
    }

    /// Wraps `data` as a contiguous array.
    ///
    /// # Panics
    /// As [`PlaneWriter::new`].
    pub fn contiguous(data: &'a mut [T], shape: [usize; 4]) -> Self {
        Self::new(data, shape, contiguous_strides(shape))
    }
}

impl<T: Element> PlaneWriter<'_, T> {
    /// Writes one element.
    pub fn set(&self, [b, g]: [usize; 2], channel: usize, step: usize, x: T) {
        let piece = match self.order {
            Order::Steps => self.pieces.piece([b, g, channel], step, 1),
            Order::Channels => self.pieces.piece([b, g, step], channel, 1),
        };
        piece[0] = x;
    }
}

impl<T: SimdElement> PlaneWriter<'_, T> {
    /// Writes what [`Plane::read`] would read.
    #[inline(always)]
    pub fn write<I: Isa>(&self, [b, g]: [usize; 2], channels: Range<usize>, steps: Range<usize>, from: &[T::Acc]) {
        let lanes = T::V::<I>::LANES;
        let count = steps.len();
        for (v, first) in channels.clone().step_by(lanes).enumerate() {
            let from = &from[v * CHUNK * lanes..(v + 1) * CHUNK * lanes];
            let width = lanes.min(channels.end - first);
            match self.order {
                Order::Channels => {
                    for t in 0..count {
                        let row = self.pieces.piece([b, g, steps.start + t], first, width);
                        store_padded::<T, I>(T::V::<I>::load(&from[t * lanes..]), row);
                    }
                }
                Order::Steps => {
                    let mut t = 0;
                    while t < count {
                        let mut block = T::V::<I>::zero_block();
                        for (i, row) in block.as_mut().iter_mut().enumerate() {
                            *row = T::V::<I>::load(&from[(t + i) * lanes..]);
                        }
                        let block = T::V::<I>::transpose(block);
                        for (i, &row) in block.as_ref()[..width].iter().enumerate() {
                            let piece = self.pieces.piece([b, g, first + i], steps.start + t, lanes.min(count - t));
                            store_padded::<T, I>(row, piece);
                        }
                        t += lanes;
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dtype::Float;
    use crate::simd::{Level, Task};

    struct Copy<'a>(Plane<'a, f32>, PlaneWriter<'a, f32>, [usize; 2]);
    impl Task for Copy<'_> {
        const MULTIPLIES_BF16: bool = false;

        #[inline(always)]
        fn run<I: Isa>(&self, _index: usize) {
            let [channels, steps] = self.2;
            let mut block = vec![f32::ZERO; channels.div_ceil(I::F32::LANES) * CHUNK * I::F32::LANES];
            self.0.read::<I>([0, 0], 0..channels, 0..steps, &mut block);
            self.1.write::<I>([0, 0], 0..channels, 0..steps, &block);
        }
    }

    #[test]
    fn either_axis_may_be_contiguous() {
        for shape in [[1, 1, 5, 7], [1, 1, 40, 64], [1, 1, 16, 33], [1, 1, 1, 3], [1, 1, 9, 1]] {
            let [_, _, channels, steps] = shape;
            let count = channels * steps;
            let data: Vec<f32> = (0..count).map(|i| i as f32).collect();
            for level in Level::available() {
                for strides in [[count, count, steps, 1], [count, count, 1, channels]] {
                    for other in [[count, count, steps, 1], [count, count, 1, channels]] {
                        let mut copy = vec![f32::NAN; count];
                        let plane = Plane::new("u", &data, shape, strides).unwrap();
                        level.run(&Copy(plane, PlaneWriter::new(&mut copy, shape, other), [channels, steps]), 0);
                        let copy = Plane::new("u", &copy, shape, other).unwrap();
                        for c in 0..channels {
                            for t in 0..steps {
                                assert_eq!(plane.at([0, 0], c, t).to_bits(), copy.at([0, 0], c, t).to_bits());
                            }
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn other_strides_are_refused() {
        let data = [0f32; 64];
        assert!(!is_plane([1, 1, 2, 3], [0, 0, 6, 2]));
        assert!(matches!(Plane::new("u", &data, [1, 1, 2, 3], [0, 0, 6, 2]), Err(Error::Shape { arg: "u", .. })));
        assert!(matches!(Plane::new("u", &data, [1, 1, 9, 9], [0, 0, 9, 1]), Err(Error::Shape { arg: "u", .. })));
    }
}
