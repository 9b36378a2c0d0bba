//! The definition, token by token in f64, kept for ever: every fast form is tested against it.

use super::args::{BLOCK, ConvArgs, ConvOut, ConvShape, Order};
use super::update::UpdateArgs;
use crate::dtype::{Element, Float};
use crate::simd::SimdElement;

fn activate(y: f64, silu: bool) -> f64 {
    if silu { y / (1.0 + (-y).exp()) } else { y }
}

/// Computes outputs and states.
pub fn forward<T: Element>(args: &ConvArgs<'_, T>, out: &ConvOut<'_, T>) {
    let ConvShape { batch, channels, seqlen, width, .. } = args.shape;
    let mut outputs = vec![0.0; batch * channels * seqlen];
    for run in args.runs {
        args.write_state(run, out.last.as_ref(), 0..channels);
        for channel in 0..channels {
            for at in 0..run.len {
                let mut y = args.bias.as_ref().map_or(0.0, |bias| bias.get(channel, 0, 0).to_f64());
                for j in 0..width {
                    let token = (at + j + 1) as isize - width as isize;
                    y += args.weight.get(channel, j, 0).to_f64() * args.token(run, channel, token).to_f64();
                }
                y = if run.hidden { 0.0 } else { activate(y, args.silu) };
                outputs[(run.batch * channels + channel) * seqlen + run.first + at] = y;
            }
        }
    }
    let (rows, heads) = match args.order {
        Order::TokensFirst => (seqlen, channels.div_ceil(BLOCK)),
        Order::ChannelsFirst => (channels, 1),
    };
    for (b, row) in (0..batch).flat_map(|b| (0..rows).map(move |row| (b, row))) {
        for head in 0..heads {
            for (i, out) in out.out.row(b, row, head).iter_mut().enumerate() {
                let column = head * BLOCK + i;
                let (channel, token) = if args.order == Order::TokensFirst { (column, row) } else { (row, column) };
                let residual = args.residual.as_ref().map_or(0.0, |residual| residual.row(b, row, 0)[column].to_acc().to_f64());
                let y = outputs[(b * channels + channel) * seqlen + token] + residual;
                *out = T::from_acc(T::Acc::from_f64(y));
            }
        }
    }
}

/// Computes outputs, `[B, T, D]`, and moves states on, `[N, D, S]`.
pub fn update<T: SimdElement>(args: &UpdateArgs<'_, T>, states: &mut [f64]) -> Vec<f64> {
    let ConvShape { batch, channels, seqlen, width, state_len } = args.shape;
    let mut outputs = vec![0.0; batch * seqlen * channels];
    for (b, slot) in args.slots.iter().enumerate() {
        let Some(number) = slot.state else { continue };
        for channel in 0..channels {
            let state = &mut states[(number * channels + channel) * state_len..][..state_len];
            // The place of a token, counted from the first new one.
            let place = |token: isize| match slot.seen {
                Some(seen) => (seen as isize + token).rem_euclid(state_len as isize) as usize,
                None => (state_len as isize + token) as usize,
            };
            let mut line: Vec<f64> = (0..width - 1).map(|j| state[place(j as isize + 1 - width as isize)]).collect();
            line.extend((0..seqlen).map(|t| args.x.get(b, channel, t).to_f64()));
            for t in 0..seqlen {
                let taps = (0..width).map(|j| args.weight.get(channel, j, 0).to_f64());
                let bias = args.bias.as_ref().map_or(0.0, |bias| bias.get(channel, 0, 0).to_f64());
                let y = bias + taps.zip(&line[t..]).map(|(tap, x)| tap * x).sum::<f64>();
                outputs[(b * seqlen + t) * channels + channel] = activate(y, args.silu);
            }
            for (t, &x) in line[width - 1..].iter().enumerate().take(if state_len > 0 { seqlen } else { 0 }) {
                if slot.seen.is_some() {
                    state[place(t as isize)] = x;
                } else {
                    state.rotate_left(1);
                    state[state_len - 1] = x;
                }
            }
        }
    }
    outputs
}
