//! What a selective scan is made of.

use super::plane::{Plane, PlaneWriter};
use crate::dtype::Element;
use crate::kernels::recurrent::Numbers;
use crate::parallel::{PieceWriter, RowWriter};

/// The sizes of a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SelectiveShape {
    /// Batch size.
    pub batch: usize,
    /// Channels, `D`.
    pub channels: usize,
    /// Groups of as many consecutive channels, `G`, that share factors of steps; divides `channels`.
    pub groups: usize,
    /// Numbers in the state of a channel, `N`.
    pub states: usize,
    /// Steps, `L`.
    pub steps: usize,
}

/// What inputs enter the states by, or states are read by.
#[derive(Debug, Clone, Copy)]
pub enum Factors<'a, T: Element> {
    /// A factor for each step and state: `[B, G, N, L]`.
    Steps(Plane<'a, T>),
    /// The same for all steps, for each channel: `[1, D, 1, N]`.
    Channels(Numbers<'a, T>),
}

/// A call.
#[derive(Debug, Clone, Copy)]
pub struct SelectiveArgs<'a, T: Element> {
    /// The sizes.
    pub shape: SelectiveShape,
    /// Inputs, `[B, 1, D, L]`.
    pub u: Plane<'a, T>,
    /// Sizes of steps, `[B, 1, D, L]`.
    pub delta: Plane<'a, T>,
    /// Rates of decay, `[1, D, 1, N]`.
    pub a: Numbers<'a, T>,
    /// What inputs enter the states by.
    pub b: Factors<'a, T>,
    /// What states are read by.
    pub c: Factors<'a, T>,
    /// What inputs enter the outputs by, `[1, D, 1, 1]`.
    pub d: Option<Numbers<'a, T>>,
    /// Outputs are multiplied by `z sigmoid(z)`, `[B, 1, D, L]`.
    pub z: Option<Plane<'a, T>>,
    /// Added to the sizes of steps, `[1, D, 1, 1]`.
    pub delta_bias: Option<Numbers<'a, T>>,
    /// Whether softplus is taken of them after that.
    pub delta_softplus: bool,
    /// States before the first step, `[B, D, 1, N]`; zeros if there are none.
    pub initial: Option<Numbers<'a, T>>,
}

/// Where results go.
pub struct SelectiveOut<'a, T: Element> {
    /// `[B, 1, D, L]`.
    pub out: PlaneWriter<'a, T>,
    /// States after the last step, `[B, D, 1, N]`.
    pub last: Option<RowWriter<'a, T::Acc>>,
    /// States before each chunk of [`super::CHUNK`] steps, `[B, chunks, N, D]`: what the backward pass starts from.
    pub checkpoints: Option<PieceWriter<'a, T::Acc>>,
}

/// What the backward pass is given.
#[derive(Debug, Clone, Copy)]
pub struct SelectiveBackwardArgs<'a, T: Element> {
    /// The forward call.
    pub forward: SelectiveArgs<'a, T>,
    /// Gradient of the outputs, `[B, 1, D, L]`.
    pub d_out: Plane<'a, T>,
    /// Gradient of the states after the last step, `[B, D, 1, N]`.
    pub d_last: Option<Numbers<'a, T>>,
    /// What the forward pass has left, `[B, chunks, N, D]`.
    pub checkpoints: &'a [T::Acc],
}

/// Where gradients go, as far as they are asked for.
#[derive(Default)]
pub struct SelectiveGradients<'a, T: Element> {
    /// `[B, 1, D, L]`.
    pub u: Option<PlaneWriter<'a, T>>,
    /// `[B, 1, D, L]`.
    pub delta: Option<PlaneWriter<'a, T>>,
    /// `[B, 1, D, L]`.
    pub z: Option<PlaneWriter<'a, T>>,
    /// `[D, N]`.
    pub a: Option<&'a mut [T::Acc]>,
    /// `[B, G, N, L]` or `[D, N]`, as the factors are.
    pub b: Option<&'a mut [T::Acc]>,
    /// As `b`.
    pub c: Option<&'a mut [T::Acc]>,
    /// `[D]`.
    pub d: Option<&'a mut [T::Acc]>,
    /// `[D]`.
    pub delta_bias: Option<&'a mut [T::Acc]>,
    /// `[B, D, N]`.
    pub initial: Option<&'a mut [T::Acc]>,
}
