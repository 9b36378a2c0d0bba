//! Filters as kernels read them where channels are contiguous: the taps and the bias of 16 channels lie together.

use super::args::{ConvShape, Values};
use crate::dtype::{Element, Float};
use crate::math::load::MAX_LANES;
use std::ops::Range;

/// Filters with the channels in the lanes.
#[derive(Debug)]
pub struct Taps<E> {
    data: Vec<E>,
    width: usize,
}

/// Elements that keep `rows` numbers for each of so many channels, 16 channels together.
pub fn interleaved(channels: usize, rows: usize) -> usize {
    channels.next_multiple_of(MAX_LANES) * rows
}

/// Where row 0 of a channel lies among those of `rows` rows; row `j` is `j * MAX_LANES` further.
#[inline(always)]
pub fn place(channel: usize, rows: usize) -> usize {
    channel / MAX_LANES * MAX_LANES * rows + channel % MAX_LANES
}

/// Writes the taps of some channels, and the bias as one more, interleaved.
#[inline(always)]
pub fn fill<T: Element>(
    data: &mut [T::Acc],
    width: usize,
    channels: Range<usize>,
    weight: &Values<'_, T>,
    bias: Option<&Values<'_, T>>,
) {
    data.fill(T::Acc::ZERO);
    let first = channels.start;
    for channel in channels {
        let taps = &mut data[place(channel - first, width + 1)..];
        for j in 0..width {
            taps[j * MAX_LANES] = weight.get(channel, j, 0);
        }
        if let Some(bias) = bias {
            taps[width * MAX_LANES] = bias.get(channel, 0, 0);
        }
    }
}

impl<E: Float> Taps<E> {
    /// Reads the taps and the bias of all channels.
    pub fn new<T: Element<Acc = E>>(shape: &ConvShape, weight: &Values<'_, T>, bias: Option<&Values<'_, T>>) -> Self {
        let ConvShape { channels, width, .. } = *shape;
        let mut data = vec![E::ZERO; interleaved(channels, width + 1)];
        fill(&mut data, width, 0..channels, weight, bias);
        Self { data, width }
    }

    /// The taps from a channel on: tap `j` is `j * MAX_LANES` further, and the bias the last.
    #[inline(always)]
    pub fn of(&self, channel: usize) -> &[E] {
        &self.data[place(channel, self.width + 1)..]
    }
}
