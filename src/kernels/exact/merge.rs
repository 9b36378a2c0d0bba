//! Attention over the union of key sets, from the results over each: what split keys, ring attention and prefix reuse stand on.

use super::ExactOut;
use crate::dtype::{Element, Float};
use crate::tensor::Tensor;

/// `lse = log(sum_i exp(lse_i))`, `out = sum_i exp(lse_i - lse) out_i`, in f64.
///
/// `outs` are `[B, S, H, D]`, `lses` `[B, S, H, 1]`. Results over no key (`lse = -inf`) count for nothing, whatever they hold.
pub fn forward<T: Element>(outs: &[Tensor<'_, T>], lses: &[Tensor<'_, T::Acc>], merged: &ExactOut<'_, T>) {
    let Some(first) = outs.first() else { return };
    let [batch, tokens, heads, width] = first.shape();
    let mut sums = vec![0f64; width];
    for row in 0..batch * tokens * heads {
        let (b, t, h) = (row / (tokens * heads), row / heads % tokens, row % heads);
        let lse = |i: usize| lses[i].row(b, t, h)[0].to_f64();
        let top = (0..lses.len()).map(lse).fold(f64::NEG_INFINITY, f64::max);
        let base = if top == f64::NEG_INFINITY { 0.0 } else { top };
        let total: f64 = (0..lses.len()).map(|i| (lse(i) - base).exp()).sum();
        // Over no key at all every weight is 0, and the result with it.
        let shrink = if total == 0.0 { 0.0 } else { 1.0 / total };
        sums.fill(0.0);
        for (i, out) in outs.iter().enumerate() {
            let weight = (lse(i) - base).exp() * shrink;
            if lse(i) != f64::NEG_INFINITY {
                for (sum, x) in sums.iter_mut().zip(out.row(b, t, h)) {
                    *sum += weight * x.to_acc().to_f64();
                }
            }
        }
        for (out, &sum) in merged.out.row(b, t, h).iter_mut().zip(&sums) {
            *out = T::from_acc(T::Acc::from_f64(sum));
        }
        if let Some(lse) = &merged.lse {
            lse.row(b, t, h)[0] = T::Acc::from_f64(base + total.ln());
        }
    }
}
