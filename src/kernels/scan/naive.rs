//! The definition of the selective scan, step by step in f64, kept for ever: every fast form is tested against it.

use super::args::{Factors, SelectiveArgs, SelectiveOut, SelectiveShape};
use crate::dtype::{Element, Float};
use crate::kernels::recurrent::Numbers;

fn row<T: Element>(numbers: &Numbers<'_, T>, batch: usize, channel: usize, len: usize) -> Vec<f64> {
    let mut row = vec![T::Acc::ZERO; len];
    numbers.read(batch, channel, 0, &mut row);
    row.iter().map(|x| x.to_f64()).collect()
}

fn factors<T: Element>(factors: &Factors<'_, T>, shape: &SelectiveShape, batch: usize, channel: usize, step: usize) -> Vec<f64> {
    match factors {
        Factors::Steps(plane) => {
            let group = channel / (shape.channels / shape.groups);
            (0..shape.states).map(|n| plane.at([batch, group], n, step).to_acc().to_f64()).collect()
        }
        Factors::Channels(numbers) => row(numbers, 0, channel, shape.states),
    }
}

/// Computes outputs and last states.
pub fn forward<T: Element>(args: &SelectiveArgs<'_, T>, out: &SelectiveOut<'_, T>) {
    let shape = &args.shape;
    for batch in 0..shape.batch {
        for channel in 0..shape.channels {
            let a = row(&args.a, 0, channel, shape.states);
            let one = |numbers: &Option<Numbers<'_, T>>| numbers.as_ref().map_or(0.0, |x| x.first(0, channel, 0).to_f64());
            let (d, bias) = (one(&args.d), one(&args.delta_bias));
            let zeros = vec![0.0; shape.states];
            let mut state = args.initial.as_ref().map_or(zeros, |initial| row(initial, batch, channel, shape.states));
            for step in 0..shape.steps {
                let read = |plane: &super::Plane<'_, T>| plane.at([batch, 0], channel, step).to_acc().to_f64();
                let (u, mut delta) = (read(&args.u), read(&args.delta) + bias);
                if args.delta_softplus {
                    delta = delta.max(0.0) + (-delta.abs()).exp().ln_1p();
                }
                let b = factors(&args.b, shape, batch, channel, step);
                let c = factors(&args.c, shape, batch, channel, step);
                let mut y = d * u;
                for (n, h) in state.iter_mut().enumerate() {
                    *h = (delta * a[n]).exp() * *h + delta * b[n] * u;
                    y += c[n] * *h;
                }
                if let Some(z) = args.z.as_ref().map(read) {
                    y *= z / (1.0 + (-z).exp());
                }
                out.out.set([batch, 0], channel, step, T::from_acc(T::Acc::from_f64(y)));
            }
            if let Some(last) = &out.last {
                for (into, h) in last.row(batch, channel, 0).iter_mut().zip(&state) {
                    *into = T::Acc::from_f64(*h);
                }
            }
        }
    }
}
