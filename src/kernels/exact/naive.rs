//! The definition, query by query, kept for ever: every fast form is tested against it.

use super::{ExactArgs, ExactOut};
use crate::dtype::{Element, Float};
use ndarray::Axis;

/// Computes each row's scores, their softmax, and the weighted sum of the values it sees, all in f64.
pub fn forward<T: Element>(args: &ExactArgs<'_, T>, out: &ExactOut<'_, T>) {
    let (q, k, v) = (args.q.view(), args.k.view(), args.v.view());
    let group = args.shape.group();
    for ((batch, token, head), ()) in ndarray::Array3::<()>::default(q.dim_without_width()).indexed_iter() {
        let keys = args.mask.key_limit(token, args.shape.seqlen_k);
        let mut bias = vec![T::Acc::ZERO; keys];
        args.bias.read([batch, head, token], 0, &mut bias);
        let scores: Vec<f64> = (0..keys)
            .map(|j| {
                let products = q.index_axis(Axis(0), batch);
                let query = products.index_axis(Axis(0), token);
                let dot: f64 = query
                    .index_axis(Axis(0), head)
                    .iter()
                    .zip(k.index_axis(Axis(0), batch).index_axis(Axis(0), j).index_axis(Axis(0), head / group))
                    .map(|(&x, &y)| x.to_acc().to_f64() * y.to_acc().to_f64())
                    .sum();
                if bias[j] == T::Acc::NEG_INFINITY { f64::NEG_INFINITY } else { args.scale * dot + bias[j].to_f64() }
            })
            .collect();
        let m = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let base = if m == f64::NEG_INFINITY { 0.0 } else { m };
        let p: Vec<f64> = scores.iter().map(|s| (s - base).exp()).collect();
        let l: f64 = p.iter().sum();
        for (d, out) in out.out.row(batch, token, head).iter_mut().enumerate() {
            let seen = (0..keys).filter(|&j| scores[j] != f64::NEG_INFINITY);
            let sum: f64 = seen.map(|j| p[j] * v[[batch, j, head / group, d]].to_acc().to_f64()).sum();
            *out = T::from_acc(T::Acc::from_f64(if l == 0.0 { 0.0 } else { sum / l }));
        }
        if let Some(lse) = &out.lse {
            lse.row(batch, token, head)[0] = T::Acc::from_f64(base + l.ln());
        }
    }
}

/// The axes that rows are indexed by.
trait RowAxes {
    fn dim_without_width(&self) -> (usize, usize, usize);
}

impl<T> RowAxes for ndarray::ArrayView4<'_, T> {
    fn dim_without_width(&self) -> (usize, usize, usize) {
        let (batch, token, head, _) = self.dim();
        (batch, token, head)
    }
}
