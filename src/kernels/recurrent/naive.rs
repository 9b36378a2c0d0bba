//! The definition, token by token in f64, kept for ever: every fast form is tested against it.

use super::rows::inverse_length;
use super::{Decay, Numbers, RecurrentArgs, RecurrentOut, Rule};
use crate::dtype::{Element, Float};
use crate::tensor::Tensor;

/// Computes outputs and states.
pub fn forward<T: Element>(args: &RecurrentArgs<'_, T>, out: &RecurrentOut<'_, T>) {
    for number in 0..args.sequences.len() {
        for head in 0..args.shape.num_value_heads {
            attend(args, out, number, head);
        }
    }
}

fn wide<T: Element>(tensor: &Tensor<'_, T>, batch: usize, token: usize, head: usize) -> Vec<f64> {
    tensor.row(batch, token, head).iter().map(|x| x.to_acc().to_f64()).collect()
}

fn numbers<T: Element>(numbers: &Numbers<'_, T>, at: [usize; 3], len: usize) -> Vec<f64> {
    let mut row = vec![T::Acc::ZERO; len];
    numbers.read(at[0], at[1], at[2], &mut row);
    row.iter().map(|x| x.to_f64()).collect()
}

/// `S^T x` of a state `[K, V]`.
fn read(state: &[Vec<f64>], x: &[f64], width: usize) -> Vec<f64> {
    (0..width).map(|n| state.iter().zip(x).map(|(row, x)| row[n] * x).sum()).collect()
}

fn write(state: &mut [Vec<f64>], key: &[f64], value: &[f64]) {
    for (row, key) in state.iter_mut().zip(key) {
        for (s, value) in row.iter_mut().zip(value) {
            *s += key * value;
        }
    }
}

fn attend<T: Element>(args: &RecurrentArgs<'_, T>, out: &RecurrentOut<'_, T>, number: usize, head: usize) {
    let (head_dim, head_dim_v) = (args.shape.head_dim, args.shape.head_dim_v);
    let of = args.shape.head_of(head);
    let sequence = args.sequences[number];
    let flat = out.states.of(number, head, &args.shape);
    let mut rows = vec![T::Acc::ZERO; head_dim * head_dim_v];
    let mut scratch = rows.clone();
    out.states.load(&flat, (number, head), (&mut rows, head_dim_v), &mut scratch);
    let mut state: Vec<Vec<f64>> =
        (0..head_dim).map(|d| rows[d * head_dim_v..(d + 1) * head_dim_v].iter().map(|x| x.to_f64()).collect()).collect();
    for step in 0..sequence.len {
        let (batch, token) = (sequence.batch, sequence.first + step);
        let (mut q, mut k) = (wide(&args.q, batch, token, of), wide(&args.k, batch, token, of));
        for row in [&mut q, &mut k] {
            let factor = if args.l2norm { inverse_length(row) } else { 1.0 };
            for x in row {
                *x *= factor;
            }
        }
        let mut v = wide(&args.v, batch, token, head);
        let before = state.clone();
        let gates = match &args.decay {
            Decay::None => vec![0.0; head_dim],
            Decay::Heads(gates) => vec![gates[head]; head_dim],
            Decay::Steps(gates) => vec![gates.first(batch, token, head).to_f64(); head_dim],
            Decay::Channels(gates) => numbers(gates, [batch, token, head], head_dim),
        };
        for (row, gate) in state.iter_mut().zip(&gates) {
            for s in row {
                *s *= gate.exp();
            }
        }
        match &args.rule {
            Rule::Additive(beta) => {
                let beta = beta.as_ref().map_or(1.0, |beta| beta.first(batch, token, head).to_f64());
                for v in &mut v {
                    *v *= beta;
                }
                write(&mut state, &k, &v);
            }
            Rule::Delta(beta) => {
                let beta = beta.as_ref().map_or(1.0, |beta| beta.first(batch, token, head).to_f64());
                let found = read(&state, &k, head_dim_v);
                let u: Vec<f64> = v.iter().zip(&found).map(|(v, found)| beta * (v - found)).collect();
                write(&mut state, &k, &u);
            }
            Rule::LowRank { a, b } => {
                let found = read(&before, &wide(a, batch, token, of), head_dim_v);
                write(&mut state, &wide(b, batch, token, of), &found);
                write(&mut state, &k, &v);
            }
        }
        let mut o = read(if args.bonus.is_some() { &before } else { &state }, &q, head_dim_v);
        if let Some(bonus) = args.bonus {
            let own: f64 = (0..head_dim).map(|d| q[d] * bonus[of * head_dim + d] * k[d]).sum();
            for (o, v) in o.iter_mut().zip(&v) {
                *o += own * v;
            }
        }
        for (out, o) in out.out.row(batch, token, head).iter_mut().zip(&o) {
            *out = T::from_acc(T::Acc::from_f64(args.scale * o));
        }
    }
    let rows: Vec<T::Acc> = state.iter().flatten().map(|&s| T::Acc::from_f64(s)).collect();
    flat.store(&rows, head_dim_v);
}
