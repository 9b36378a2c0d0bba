//! `h_t = f_t h_(t-1) + x_t` against its definition, and its gradients against finite differences.

use crate::compare::compare;
use crate::stream::{Stream, widen};
use half::bf16;
use subquad::dtype::Float;
use subquad::kernels::recurrent::{Numbers, Sequence};
use subquad::kernels::scan::linear::{self, Gates, LinearArgs, LinearBackwardArgs, LinearGradients, LinearOut, NumbersOut};
use subquad::parallel::PieceWriter;
use subquad::simd::{Level, SimdElement, Wide};
use subquad::tensor::Tensor;

fn sequences(tokens: usize) -> Vec<Sequence> {
    let third = tokens / 3;
    [(0, third), (third, 0), (third, tokens - third)].map(|(first, len)| Sequence { batch: 0, first, len }).to_vec()
}

/// Outputs and last states of the linear scan in f64.
fn linear_naive(
    x: &[f64],
    g: &[f64],
    gates: Gates,
    initial: &[f64],
    sequences: &[Sequence],
    width: usize,
) -> (Vec<f64>, Vec<f64>) {
    let (mut out, mut last) = (x.to_vec(), initial.to_vec());
    for (n, sequence) in sequences.iter().enumerate() {
        for d in 0..width {
            let h = &mut last[n * width + d];
            for t in sequence.first..sequence.first + sequence.len {
                let g = g[t * width + d];
                *h = (if gates == Gates::Logs { g.exp() } else { g }) * *h + x[t * width + d];
                out[t * width + d] = *h;
            }
        }
    }
    (out, last)
}

fn linear_case<T: SimdElement>(tokens: usize, width: usize, gates: Gates, tolerance: f64)
where
    T::Acc: Wide,
{
    let mut stream = Stream(11);
    let sequences = sequences(tokens);
    let (count, all) = (sequences.len(), [1, tokens, 1, width]);
    let x: Vec<T> = stream.fill(tokens * width, 1.0);
    let g: Vec<T::Acc> = (0..tokens * width)
        .map(|_| {
            let x = 0.5 + 0.5 * stream.next();
            T::Acc::from_f64(if gates == Gates::Logs { -30.0 * x.powi(5) } else { x })
        })
        .collect();
    let initial: Vec<T::Acc> = stream.fill(count * width, 1.0);
    let (d_out, d_last): (Vec<T>, Vec<T::Acc>) = (stream.fill(tokens * width, 1.0), stream.fill(count * width, 1.0));
    let want = linear_naive(&widen(&x), &widen(&g), gates, &widen(&initial), &sequences, width);
    let states = [count, 1, 1, width];
    let strides = [tokens * width, width, width];
    for level in Level::available() {
        let (mut out, mut last) = (vec![T::zeroed(); x.len()], vec![T::Acc::ZERO; count * width]);
        let args = LinearArgs {
            x: Tensor::contiguous("x", &x, all).unwrap(),
            g: Numbers::Acc(Tensor::contiguous("g", &g, all).unwrap()),
            gates,
            initial: Some(Numbers::Acc(Tensor::contiguous("initial_state", &initial, states).unwrap())),
            sequences: &sequences,
        };
        let writers = LinearOut {
            out: PieceWriter::new(&mut out, all, strides),
            last: Some(PieceWriter::new(&mut last, states, [width, width, width])),
        };
        linear::forward(&args, &writers, level, 2);
        drop(writers);
        let what = format!("{tokens} x {width}, {gates:?}, {}", level.name());
        compare(&widen(&out), &want.0, tolerance, &format!("out, {what}"));
        compare(&widen(&last), &want.1, tolerance.min(1e-5), &format!("state, {what}"));

        let (mut d_x, mut d_g, mut d_initial) =
            (vec![T::zeroed(); x.len()], vec![T::Acc::ZERO; x.len()], vec![T::Acc::ZERO; count * width]);
        let backward = LinearBackwardArgs {
            forward: args,
            out: Tensor::contiguous("out", &out, all).unwrap(),
            d_out: Tensor::contiguous("d_out", &d_out, all).unwrap(),
            d_last: Some(Numbers::Acc(Tensor::contiguous("d_last", &d_last, states).unwrap())),
        };
        let into = LinearGradients {
            x: Some(PieceWriter::new(&mut d_x, all, strides)),
            g: Some(NumbersOut::Acc(PieceWriter::new(&mut d_g, all, strides))),
            initial: Some(NumbersOut::Acc(PieceWriter::new(&mut d_initial, states, [width, width, width]))),
        };
        linear::backward(&backward, &into, level, 2);
        drop(into);
        // The adjoint runs the other way: h'_t = d_out_t + f_(t+1) h'_(t+1).
        let (mut of_x, mut of_g, mut of_initial) = (vec![0.0; x.len()], vec![0.0; x.len()], widen(&d_last));
        for (n, sequence) in sequences.iter().enumerate() {
            for d in 0..width {
                let carry = &mut of_initial[n * width + d];
                for t in (sequence.first..sequence.first + sequence.len).rev() {
                    let at = t * width + d;
                    let before = if t > sequence.first { want.0[at - width] } else { initial[n * width + d].to_f64() };
                    let own = d_out[at].to_acc().to_f64() + *carry;
                    let gate = g[at].to_f64();
                    let fade = if gates == Gates::Logs { gate.exp() } else { gate };
                    of_x[at] = own;
                    of_g[at] = own * before * if gates == Gates::Logs { fade } else { 1.0 };
                    *carry = own * fade;
                }
            }
        }
        compare(&widen(&d_x), &of_x, tolerance, &format!("d_x, {what}"));
        compare(&widen(&d_g), &of_g, tolerance, &format!("d_g, {what}"));
        compare(&widen(&d_initial), &of_initial, tolerance, &format!("d_initial, {what}"));
    }
}

#[test]
fn linear_scans() {
    for gates in [Gates::Logs, Gates::Factors] {
        for (tokens, width) in [(1, 1), (7, 20), (130, 300), (40, 16), (0, 5)] {
            linear_case::<f64>(tokens, width, gates, 1e-12);
            linear_case::<f32>(tokens, width, gates, 1e-5);
            linear_case::<bf16>(tokens, width, gates, 1e-2);
        }
    }
}

#[test]
fn infinite_gates_forget() {
    let sequences = [Sequence { batch: 0, first: 0, len: 3 }];
    for level in Level::available() {
        let (x, g) = ([1f32, 2.0, 3.0], [0.0, f32::NEG_INFINITY, 0.0]);
        let mut out = [0f32; 3];
        let args = LinearArgs {
            x: Tensor::contiguous("x", &x, [1, 3, 1, 1]).unwrap(),
            g: Numbers::Acc(Tensor::contiguous("g", &g, [1, 3, 1, 1]).unwrap()),
            gates: Gates::Logs,
            initial: None,
            sequences: &sequences,
        };
        linear::forward(&args, &LinearOut { out: PieceWriter::new(&mut out, [1, 3, 1, 1], [3, 1, 1]), last: None }, level, 1);
        assert_eq!(out, [1.0, 2.0, 5.0]);
    }
}
