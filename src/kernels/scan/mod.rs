//! Diagonal recurrences: states of which each fades by itself.
//!
//! | form | equation | what for |
//! | --- | --- | --- |
//! | [`selective`] and [`backward()`] | `h_t = e^(delta_t A) h_(t-1) + delta_t B_t u_t`, `y_t = C_t^T h_t + D u_t` | Mamba |
//! | [`step`] | one step of it, in place | decoding, Mamba and Mamba-2 |
//! | [`linear`] | `h_t = f_t h_(t-1) + x_t` | HGRN, Griffin |
//!
//! # Selective scan
//!
//! A step of a channel costs `N` exponentials and `6 N` operations, and moves 12 bytes (float32; 16 with a gate): bound by arithmetic.
//! Channels sit in the lanes, so that nothing is summed across lanes; states stay in registers for the 64 steps of a chunk, four at a
//! time. For each vector of a state and step:
//!
//! | | operations | cycles of two ports |
//! | --- | --- | --- |
//! | `2^x`: scale, compare, round (2), subtract, 5 FMA, scale by the exponent (2) | 12 | 6 |
//! | `B` times the input, state, output | 3 | 1.5 |
//!
//! With 5,120 channels of 16 states and 256 steps, that is 1.3 million vectors with AVX-512, 10 million cycles. Around it, per vector
//! of channels and step: transposes from `[D, L]` (4 operations an array), softplus (30), the gate (25): as much as 4 states.
//! The states in the lanes, the other choice, would take a sum across lanes for every output and leave lanes empty when `N` is not a
//! multiple of theirs.
//!
//! States and sums are of the accumulators' type, exponentials as well. What comes near denormals, which take hundreds of cycles, is set
//! to 0 between chunks. Results do not depend on the number of threads.
//!
//! The backward pass starts from the states before each chunk, which the forward pass leaves if it is asked to, `N / 64` of the size of
//! `u` in float32, and computes those in between anew, a chunk at a time.

mod args;
mod backward;
mod block;
mod forward;
pub mod linear;
pub mod naive;
mod plane;
mod reverse;
pub mod step;

pub use args::{Factors, SelectiveArgs, SelectiveBackwardArgs, SelectiveGradients, SelectiveOut, SelectiveShape};
pub use backward::backward;
pub use plane::{CHUNK, Plane, PlaneWriter, is_plane};

use crate::parallel::for_each_tile;
use crate::simd::{Level, SimdElement, Wide};

/// Computes outputs, last states and checkpoints with up to `threads` threads.
pub fn selective<T: SimdElement>(args: &SelectiveArgs<'_, T>, out: &SelectiveOut<'_, T>, level: Level, threads: usize)
where
    T::Acc: Wide,
{
    for_each_tile(level, threads, block::Blocks::new(&args.shape).count(), &forward::Forward { args, out });
}
