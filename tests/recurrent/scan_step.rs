//! Single steps in place against their definition.

use crate::compare::compare;
use crate::stream::{Stream, widen};
use half::bf16;
use subquad::dtype::Float;
use subquad::kernels::scan::step::{Parameter, States, StepArgs, StepShape, Strided, update};
use subquad::parallel::{PieceWriter, RowWriter};
use subquad::simd::{Level, SimdElement, Wide};
use subquad::tensor::Tensor;

fn step_case<T: SimdElement>(shape: StepShape, constant: bool, half_states: bool, tolerance: f64)
where
    T::Acc: Wide,
{
    let StepShape { batch, heads, groups, channels, states } = shape;
    let mut stream = Stream(5);
    let (of_row, rates) = (batch * heads * channels, heads * channels * states);
    let (x, z, dt): (Vec<T>, Vec<T>, Vec<T>) = (stream.fill(of_row, 1.0), stream.fill(of_row, 2.0), stream.fill(of_row, 1.0));
    let a: Vec<T::Acc> = (0..rates).map(|_| T::Acc::from_f64(-1.0 - stream.next())).collect();
    let (b, c): (Vec<T>, Vec<T>) = (stream.fill(batch * groups * states, 1.0), stream.fill(batch * groups * states, 1.0));
    let (d, bias): (Vec<T::Acc>, Vec<T::Acc>) = (stream.fill(heads * channels, 1.0), stream.fill(heads * channels, 1.0));
    // One state more than rows, the last row without one.
    let rows: Vec<Option<usize>> = (0..batch).map(|row| (row + 1 < batch).then_some(batch - row)).collect();
    let before: Vec<T::Acc> = stream.fill::<T>((batch + 1) * rates, 1.0).into_iter().map(T::to_acc).collect();
    let per_channel = [heads * channels, channels, 1, 0];
    let strides_a = if constant { [0, channels, 1, 0] } else { [0, channels * states, states, 1] };
    let inputs = |data| Strided::new("x", data, [batch, heads, channels, 1], per_channel).unwrap();
    let parameter = |data| Parameter::Acc(Strided::new("D", data, [1, heads, channels, 1], [0, channels, 1, 0]).unwrap());
    let args = StepArgs {
        shape,
        x: inputs(&x),
        dt: Parameter::Input(inputs(&dt)),
        a: Parameter::Acc(Strided::new("A", &a, [1, heads, channels, states], strides_a).unwrap()),
        b: Tensor::contiguous("B", &b, [batch, 1, groups, states]).unwrap(),
        c: Tensor::contiguous("C", &c, [batch, 1, groups, states]).unwrap(),
        d: Some(parameter(&d)),
        z: Some(inputs(&z)),
        dt_bias: Some(parameter(&bias)),
        dt_softplus: true,
        rows: &rows,
    };
    let (mut want_out, mut want_state) = (vec![0.0; of_row], widen(&before));
    for (row, number) in rows.iter().enumerate() {
        let Some(number) = number else { continue };
        for head in 0..heads {
            for p in 0..channels {
                let (at, of) = ((row * heads + head) * channels + p, head * channels + p);
                let size = (dt[at].to_acc().to_f64() + bias[of].to_f64()).exp().ln_1p();
                let input = x[at].to_acc().to_f64();
                let mut y = d[of].to_f64() * input;
                for n in 0..states {
                    let rate = a[if constant { of } else { of * states + n }].to_f64();
                    let factor = (row * groups + head / (heads / groups)) * states + n;
                    let h = &mut want_state[number * rates + of * states + n];
                    *h = (size * rate).exp() * *h + size * input * b[factor].to_acc().to_f64();
                    y += *h * c[factor].to_acc().to_f64();
                }
                let gate = z[at].to_acc().to_f64();
                want_out[at] = y * gate / (1.0 + (-gate).exp());
            }
        }
    }
    let in_states = [batch + 1, heads, channels, states];
    let strides = [rates, channels * states, states];
    for level in Level::available() {
        let mut out = vec![T::from_acc(T::Acc::from_f64(f64::NAN)); of_row];
        let pieces = PieceWriter::new(&mut out, [batch, 1, heads, channels], [heads * channels, heads * channels, channels]);
        let got = if half_states {
            let mut states: Vec<T> = before.iter().map(|&x| T::from_acc(x)).collect();
            update(&args, &States::Input(RowWriter::new(&mut states, in_states, strides)), &pieces, level, 2);
            widen(&states)
        } else {
            let mut states = before.clone();
            update(&args, &States::Acc(RowWriter::new(&mut states, in_states, strides)), &pieces, level, 2);
            widen(&states)
        };
        drop(pieces);
        let what = format!("{shape:?} {constant} {half_states} {}", level.name());
        compare(&widen(&out), &want_out, tolerance, &format!("out, {what}"));
        compare(&got, &want_state, if half_states { tolerance } else { tolerance.min(1e-5) }, &format!("state, {what}"));
    }
}

#[test]
fn single_steps() {
    for (heads, groups, channels, states) in [(1, 1, 5, 1), (4, 2, 20, 16), (2, 1, 100, 20), (1, 1, 16, 0)] {
        let shape = StepShape { batch: 3, heads, groups, channels, states };
        for constant in [false, true] {
            step_case::<f64>(shape, constant, false, 1e-12);
            for half_states in [false, true] {
                step_case::<f32>(shape, constant, half_states, 1e-5);
                step_case::<bf16>(shape, constant, half_states, 2e-2);
            }
        }
    }
    // Enough for several threads.
    step_case::<f32>(StepShape { batch: 2, heads: 8, groups: 1, channels: 64, states: 128 }, true, false, 1e-5);
}
