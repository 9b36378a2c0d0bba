//! Softplus attention whose weights are weighed once more: a pass for their sums, and one with what that makes of them.

use super::{Blocking, ExactArgs, ExactOut, weigh};
use crate::dtype::Float;
use crate::kernels::score_mod::{Reweighting, RowTable, ScoreMod};
use crate::parallel::RowWriter;
use crate::simd::{Level, SimdElement};
use crate::tensor::AttnShape;

/// Computes `out` in two passes over the keys.
pub fn forward<T: SimdElement>(
    args: &ExactArgs<'_, T>,
    power: f64,
    out: &ExactOut<'_, T>,
    level: Level,
    threads: usize,
    blocking: Blocking,
) {
    let AttnShape { seqlen_q, num_heads, .. } = args.shape;
    let gains = gains(args, level, threads, blocking);
    let rows = RowTable { data: &gains, strides: [seqlen_q * num_heads, 1, num_heads] };
    let mods = ScoreMod { reweighting: Some(Reweighting { power, gains: Some(rows) }), ..args.mods };
    weigh(&ExactArgs { mods, ..*args }, out, level, threads, blocking);
}

/// What the first weights are multiplied by, `[B, Sq, H]`. No value is read: their width is 0.
fn gains<T: SimdElement>(args: &ExactArgs<'_, T>, level: Level, threads: usize, blocking: Blocking) -> Vec<f64> {
    let AttnShape { batch, seqlen_q, num_heads, .. } = args.shape;
    let first = ExactArgs {
        shape: AttnShape { head_dim_v: 0, ..args.shape },
        v: args.v.without_width(),
        mods: ScoreMod { dropout: None, ..args.mods },
        ..*args
    };
    let mut nothing: [T; 0] = [];
    let mut gains = vec![T::Acc::ZERO; batch * seqlen_q * num_heads];
    let strides = [seqlen_q * num_heads, num_heads, 1];
    let out = ExactOut {
        out: RowWriter::new(&mut nothing, [batch, seqlen_q, num_heads, 0], [0; 3]),
        lse: Some(RowWriter::new(&mut gains, [batch, seqlen_q, num_heads, 1], strides)),
    };
    weigh(&first, &out, level, threads, blocking);
    gains.iter().map(|gain| gain.to_f64()).collect()
}
