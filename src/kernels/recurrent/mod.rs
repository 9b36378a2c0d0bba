//! Recurrent attention: a state `S` `[K, V]` for each value head that fades, is written to, and is read by the query of every token.
//!
//! ```text
//! S_t = D_t S_{t-1} + k_t u_t^T + b_t z_t^T       D_t = diag(exp(g_t)): 1, a number, or one for each channel of the keys
//! o_t = scale * S_t^T q_t
//! ```
//!
//! | rule | `u` | `z` |
//! | --- | --- | --- |
//! | additive | `beta v` | |
//! | delta | `beta (v - (D_t S_{t-1})^T k)` | |
//! | low rank | `v` | `S_{t-1}^T a` |
//!
//! A new operator is a combination of [`Decay`] and [`Rule`], not a loop of its own.
//!
//! # Chunks
//!
//! With the running sums `G` of the gates within a chunk, and `S` the state before it,
//!
//! ```text
//! u_i = beta_i (v_i - (k_i e^{G_i})^T S - sum over j < i of A_ij u_j)      A_ij = sum over d of k_id k_jd e^{G_id - G_jd}
//! o_i = (q_i e^{G_i})^T S + sum over j <= i of P_ij u_j                    P_ij = sum over d of q_id k_jd e^{G_id - G_jd}
//! S   = e^{G_C} S + sum over j of (k_j e^{G_C - G_j}) u_j^T
//! ```
//!
//! so that all but a triangular system of the chunk's length are products of matrices: `6 K V + 2 C (K + V)` operations for each token
//! with the delta rule, `4 K V + C (K + V)` without. `pairs` forms `A` and `P` without ever dividing by a small decay.
//!
//! The state and all sums are of the accumulators' type. Results do not depend on the number of threads.

mod apart;
mod args;
pub mod backward;
mod chunk;
mod gradient_buffers;
mod head;
pub mod naive;
mod pairs;
mod rows;
mod states;
mod step;
mod tile_chunk;
mod unfade;

pub use args::{Decay, Numbers, PerStep, RecurrentArgs, RecurrentShape, Rule, Sequence, StepSizes};
pub use head::{BLOCK, MAX_CHUNK};
pub use states::States;

use crate::dtype::{DType, Element};
use crate::parallel::{RowWriter, for_each_tile};
use crate::simd::{Isa, Level, SimdElement, Task, Wide};

/// Where results go.
pub struct RecurrentOut<'a, T: Element> {
    /// `[B, T, HV, V]`.
    pub out: RowWriter<'a, T>,
    /// The states.
    pub states: States<'a, T>,
    /// `[B, T, HV, V]`: what the backward needs of rules that read the state: what is written before `beta` (delta), or what is read (low
    /// rank). Sequences are worked through in chunks then.
    pub kept: Option<RowWriter<'a, T>>,
}

/// Sequences of up to so many tokens are worked through one by one: a chunk would be mostly empty.
const FEW_TOKENS: usize = 8;

/// How tokens are worked through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// As the length of a sequence asks for.
    Auto,
    /// In chunks of so many tokens, a multiple of [`BLOCK`] up to [`MAX_CHUNK`]; matrix tiles take the next multiple of two blocks.
    Chunks(usize),
    /// One by one.
    Steps,
}

/// Heads whose rows lie side by side take turns, chunk by chunk: so many share the pages of memory that they lie on.
const MOST_HEADS: usize = 8;
/// So many tasks for each thread even out what differs between threads.
const TASKS_PER_THREAD: usize = 4;

struct Heads<'a, T: Element> {
    args: &'a RecurrentArgs<'a, T>,
    out: &'a RecurrentOut<'a, T>,
    form: Form,
    /// Heads of a task.
    group: usize,
}

/// Calls of fewer floating-point operations than this are over before another thread would start.
const SERIAL_FLOPS: usize = 1 << 21;

/// The chunk of [`Form::Auto`].
const CHUNK: usize = 32;
/// The same with matrix tiles, to which products within a chunk are cheaper than passes over the state.
const TILES_CHUNK: usize = 64;

impl<T: SimdElement> Task for Heads<'_, T>
where
    T::Acc: Wide,
{
    const MULTIPLIES_BF16: bool = false;
    const MULTIPLIES_TILES: bool = matches!(T::DTYPE, DType::BF16);

    #[inline(always)]
    fn run<I: Isa>(&self, index: usize) {
        let heads = self.args.shape.num_value_heads;
        let groups = heads.div_ceil(self.group);
        let number = index / groups;
        let first = index % groups * self.group;
        let heads = first..heads.min(first + self.group);
        let few = self.args.sequences[number].len <= FEW_TOKENS;
        let usual = if tile_chunk::takes::<T, I>(self.args) { TILES_CHUNK } else { CHUNK };
        let chunk = match self.form {
            Form::Chunks(size) => Some(size),
            _ if self.out.kept.is_some() => Some(usual),
            Form::Steps => None,
            Form::Auto => (!few).then_some(usual),
        };
        match chunk {
            Some(size) => chunk::run::<T, I>(self.args, self.out, number, heads, size),
            None => {
                for head in heads {
                    step::run::<T, I>(self.args, self.out, number, head);
                }
            }
        }
    }
}

/// Computes outputs and states with up to `threads` threads.
///
/// # Panics
/// When the size of chunks is not a multiple of [`BLOCK`] up to [`MAX_CHUNK`].
pub fn forward<T: SimdElement>(args: &RecurrentArgs<'_, T>, out: &RecurrentOut<'_, T>, form: Form, level: Level, threads: usize)
where
    T::Acc: Wide,
{
    if let Form::Chunks(size) = form {
        assert!(size > 0 && size.is_multiple_of(BLOCK) && size <= MAX_CHUNK, "chunks of {size} tokens");
    }
    let heads = args.shape.num_value_heads;
    let level = if T::DTYPE == DType::BF16 && args.has_plain_rows() { level } else { args.level(level) };
    let tokens: usize = args.sequences.iter().map(|sequence| sequence.len).sum();
    let flops = 4 * tokens * heads * args.shape.head_dim * args.shape.head_dim_v;
    let threads = if flops < SERIAL_FLOPS { 1 } else { threads };
    let group = (args.sequences.len() * heads / (TASKS_PER_THREAD * threads.max(1))).clamp(1, MOST_HEADS);
    for_each_tile(level, threads, args.sequences.len() * heads.div_ceil(group), &Heads { args, out, form, group });
}
