//! What a call of the convolution is made of.

use crate::dtype::Element;
use crate::error::Result;
use crate::parallel::RowWriter;
use crate::tensor::{Tensor, extent};

/// The sizes of a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ConvShape {
    /// Batch size of the arrays.
    pub batch: usize,
    /// Channels, `D`.
    pub channels: usize,
    /// Tokens, `T`.
    pub seqlen: usize,
    /// Taps of a filter, `W`, at least 1.
    pub width: usize,
    /// Tokens that a state holds, `S`, at least `W - 1`.
    pub state_len: usize,
}

/// Which axis of inputs and outputs is contiguous.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// Channels: arrays are `[B, T, 1, D]`.
    TokensFirst,
    /// Tokens: arrays are `[B, D, 1, T]`.
    ChannelsFirst,
}

#[derive(Debug, Clone, Copy)]
enum Numbers<'a, T: Element> {
    Input(&'a [T]),
    Acc(&'a [T::Acc]),
}

/// Numbers of the inputs' type or of the accumulators', read one by one: up to three axes of any strides.
#[derive(Debug, Clone, Copy)]
pub struct Values<'a, T: Element> {
    data: Numbers<'a, T>,
    strides: [usize; 3],
}

impl<'a, T: Element> Values<'a, T> {
    /// Views numbers of the inputs' type.
    ///
    /// # Panics
    /// When the last one lies beyond `data`.
    ///
    /// # Errors
    /// [`crate::error::Error::Overflow`] when its position has no `usize`.
    pub fn of_inputs(arg: &'static str, data: &'a [T], shape: [usize; 3], strides: [usize; 3]) -> Result<Self> {
        assert!(extent(arg, &shape, &strides)? <= data.len(), "{arg} reaches beyond the data");
        Ok(Self { data: Numbers::Input(data), strides })
    }

    /// Views numbers of the accumulators' type.
    ///
    /// # Panics
    /// As [`Values::of_inputs`].
    ///
    /// # Errors
    /// As [`Values::of_inputs`].
    pub fn of_sums(arg: &'static str, data: &'a [T::Acc], shape: [usize; 3], strides: [usize; 3]) -> Result<Self> {
        assert!(extent(arg, &shape, &strides)? <= data.len(), "{arg} reaches beyond the data");
        Ok(Self { data: Numbers::Acc(data), strides })
    }

    /// One of them.
    #[inline(always)]
    pub fn get(&self, i: usize, j: usize, k: usize) -> T::Acc {
        let at = i * self.strides[0] + j * self.strides[1] + k * self.strides[2];
        match self.data {
            Numbers::Input(data) => data[at].to_acc(),
            Numbers::Acc(data) => data[at],
        }
    }
}

/// Consecutive tokens that see no others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// Row of the batch.
    pub batch: usize,
    /// First token.
    pub first: usize,
    /// Number of tokens.
    pub len: usize,
    /// The state that lies before the first token; `None`: zeros.
    pub initial: Option<usize>,
    /// The state that is written after the last token.
    pub last: Option<usize>,
    /// Whether outputs are 0 whatever the inputs are.
    pub hidden: bool,
}

/// A call.
#[derive(Debug, Clone, Copy)]
pub struct ConvArgs<'a, T: Element> {
    /// The sizes.
    pub shape: ConvShape,
    /// How `x`, `residual` and results lie.
    pub order: Order,
    /// Inputs.
    pub x: Tensor<'a, T>,
    /// Filters, `[D, W, 1]`; the last tap belongs to the current token.
    pub weight: Values<'a, T>,
    /// `[D, 1, 1]`.
    pub bias: Option<Values<'a, T>>,
    /// What is added to the outputs, as `x`.
    pub residual: Option<Tensor<'a, T>>,
    /// `[N, D, S]`, the token before the first one last. `None`: zeros.
    pub initial: Option<Values<'a, T>>,
    /// Whether outputs are `y sigmoid(y)`.
    pub silu: bool,
    /// Ascending by row of the batch and token; they cover all tokens.
    pub runs: &'a [Run],
}

impl<T: Element> ConvArgs<'_, T> {
    /// What lies `back` tokens before the first one of a run, 1 or more and at most `S`.
    #[inline(always)]
    pub(super) fn past(&self, run: &Run, channel: usize, back: usize) -> T::Acc {
        match (&self.initial, run.initial) {
            (Some(initial), Some(number)) => initial.get(number, channel, self.shape.state_len - back),
            _ => <T::Acc as bytemuck::Zeroable>::zeroed(),
        }
    }

    /// Token `at` of a run, which may lie up to `S` before its first one.
    #[inline(always)]
    pub(super) fn token(&self, run: &Run, channel: usize, at: isize) -> T::Acc {
        let Ok(at) = usize::try_from(at) else { return self.past(run, channel, at.unsigned_abs()) };
        let token = run.first + at;
        match self.order {
            Order::TokensFirst => self.x.row(run.batch, token, 0)[channel].to_acc(),
            Order::ChannelsFirst => self.x.row(run.batch, channel, 0)[token].to_acc(),
        }
    }

    /// Writes the state after a run for some channels.
    #[inline(always)]
    pub(super) fn write_state(&self, run: &Run, last: Option<&RowWriter<'_, T>>, channels: std::ops::Range<usize>) {
        let (Some(last), Some(number)) = (last, run.last) else { return };
        let state_len = self.shape.state_len;
        for channel in channels {
            for s in 0..state_len {
                let at = (run.len + s) as isize - state_len as isize;
                last.row(number, channel, s)[0] = T::from_acc(self.token(run, channel, at));
            }
        }
    }
}

/// Where results go.
pub struct ConvOut<'a, T> {
    /// Outputs, as `x`: [`rows_of`] makes it.
    pub out: RowWriter<'a, T>,
    /// States after the last tokens: rows of one element of `[N, D, S, 1]`.
    pub last: Option<RowWriter<'a, T>>,
}

/// The results of a call, and their gradients.
#[derive(Debug, Clone, Copy)]
pub struct ConvGradients<'a, T: Element> {
    /// Gradients of the outputs, as `x`.
    pub d_out: Tensor<'a, T>,
    /// Gradients of the last states, `[N, D, S]`.
    pub d_last: Option<Values<'a, T>>,
}

impl<T: Element> ConvGradients<'_, T> {
    /// What reaches token `at` of a run, which may lie up to `S` before its first one, through the state after it.
    #[inline(always)]
    pub(super) fn by_state(&self, shape: &ConvShape, run: &Run, channel: usize, at: isize) -> T::Acc {
        let place = at + shape.state_len as isize - run.len as isize;
        match (&self.d_last, run.last, usize::try_from(place)) {
            (Some(d_last), Some(number), Ok(place)) => d_last.get(number, channel, place),
            _ => <T::Acc as bytemuck::Zeroable>::zeroed(),
        }
    }

    /// The first token of a run that the state after it holds.
    #[inline(always)]
    pub(super) fn first_in_state(&self, shape: &ConvShape, run: &Run) -> usize {
        if self.d_last.is_some() && run.last.is_some() { run.len.saturating_sub(shape.state_len) } else { run.len }
    }
}

/// Where the gradients of inputs and states go.
pub struct ConvGradientsOut<'a, T: Element> {
    /// As `x`: [`rows_of`] makes it.
    pub x: RowWriter<'a, T>,
    /// Rows of one element of `[N, D, S, 1]`, zeros before: what no run begins with is not written.
    pub initial: Option<RowWriter<'a, T::Acc>>,
}

/// The gradients of filters.
#[derive(Debug)]
pub struct FilterGradients<'a, E> {
    /// `[D, W]`.
    pub weight: &'a mut [E],
    /// `[D]`.
    pub bias: &'a mut [E],
}

/// Channels that a task works on where they are contiguous; four times as many are slower by a twentieth.
pub(super) const BLOCK: usize = 512;

/// The rows of a result that lies in that order, as tasks ask for them: `data` is contiguous.
pub fn rows_of<'a, T>(data: &'a mut [T], order: Order, shape: &ConvShape) -> RowWriter<'a, T> {
    let ConvShape { batch, channels, seqlen, .. } = *shape;
    match order {
        Order::TokensFirst => RowWriter::blocks(data, [batch, seqlen, channels], [seqlen * channels, channels], BLOCK),
        Order::ChannelsFirst => RowWriter::new(data, [batch, channels, 1, seqlen], [channels * seqlen, seqlen, seqlen]),
    }
}
