//! Short convolutions: both orders of memory against the definition, gradients against its finite differences, updates.

use crate::stream::{Stream, widen};
use half::{bf16, f16};
use subquad::dtype::{Element, Float};
use subquad::kernels::convolution::update::{Slot, UpdateArgs, UpdateOut, outputs, update};
use subquad::kernels::convolution::{
    ConvArgs, ConvGradients, ConvGradientsOut, ConvOut, ConvShape, FilterGradients, Order, Run, Values, backward, forward, naive,
    rows_of,
};
use subquad::parallel::RowWriter;
use subquad::simd::{Level, SimdElement, Wide};
use subquad::tensor::Tensor;

const ORDERS: [Order; 2] = [Order::TokensFirst, Order::ChannelsFirst];

/// A call in `[B, D, T]`, whatever the order of memory is.
#[derive(Debug, Clone)]
struct Case<T: Element> {
    shape: ConvShape,
    x: Vec<T>,
    weight: Vec<T>,
    bias: Option<Vec<T::Acc>>,
    residual: Option<Vec<T>>,
    initial: Option<Vec<T>>,
    silu: bool,
    runs: Vec<Run>,
    states: usize,
}

/// How the tokens of a batch are cut.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Cuts {
    /// Each row is a sequence.
    Rows,
    /// Packed sequences, one of them empty and one of a single token.
    Packed,
    /// Rows of several runs, one of them hidden, of which the last one is in the state.
    Numbered,
}

fn runs_of(shape: &ConvShape, cuts: Cuts) -> (Vec<Run>, usize) {
    let ConvShape { batch, seqlen, .. } = *shape;
    let third = seqlen / 3;
    let bounds: Vec<usize> = match cuts {
        Cuts::Rows => vec![0, seqlen],
        Cuts::Packed => vec![0, third, third, (third + 1).min(seqlen), seqlen],
        Cuts::Numbered => vec![0, third, 2 * third, seqlen],
    };
    let (mut runs, mut states) = (Vec::new(), 0);
    for batch in 0..batch {
        let count = bounds.len() - 1;
        for (i, pair) in bounds.windows(2).enumerate() {
            let first_of_row = cuts == Cuts::Packed || i == 0;
            let last_of_row = cuts == Cuts::Packed || i + 1 == count;
            let hidden = cuts == Cuts::Numbered && i == 1;
            let (initial, last) = (first_of_row.then_some(states), last_of_row.then_some(states));
            runs.push(Run { batch, first: pair[0], len: pair[1] - pair[0], initial, last, hidden });
            states += usize::from(last_of_row);
        }
    }
    (runs, states)
}

impl<T: Element> Case<T> {
    fn new(shape: ConvShape, cuts: Cuts, [biased, silu, added, continued]: [bool; 4]) -> Self {
        let mut stream = Stream(11);
        let mut some = |len: usize| stream.fill::<T>(len, 2.0);
        let ConvShape { batch, channels, seqlen, width, state_len } = shape;
        let (runs, states) = runs_of(&shape, cuts);
        Self {
            x: some(batch * channels * seqlen),
            weight: some(channels * width),
            bias: biased.then(|| some(channels).into_iter().map(Element::to_acc).collect()),
            residual: added.then(|| some(batch * channels * seqlen)),
            initial: continued.then(|| some(states * channels * state_len)),
            shape,
            silu,
            runs,
            states,
        }
    }

    /// `[B, D, T]` as it lies in memory.
    fn laid_out(&self, order: Order, data: &[T]) -> Vec<T> {
        let ConvShape { batch, channels, seqlen, .. } = self.shape;
        let mut out = data.to_vec();
        if order == Order::TokensFirst {
            for ((b, d), t) in
                (0..batch).flat_map(|b| (0..channels).map(move |d| (b, d))).flat_map(|bd| (0..seqlen).map(move |t| (bd, t)))
            {
                out[(b * seqlen + t) * channels + d] = data[(b * channels + d) * seqlen + t];
            }
        }
        out
    }

    fn tensor<'a>(&self, order: Order, data: &'a [T]) -> Tensor<'a, T> {
        let ConvShape { batch, channels, seqlen, .. } = self.shape;
        let shape = if order == Order::TokensFirst { [batch, seqlen, 1, channels] } else { [batch, channels, 1, seqlen] };
        Tensor::contiguous("x", data, shape).unwrap()
    }

    fn with_args<R>(&self, order: Order, call: impl FnOnce(&ConvArgs<'_, T>) -> R) -> R {
        let ConvShape { channels, width, state_len, .. } = self.shape;
        let x = self.laid_out(order, &self.x);
        let residual = self.residual.as_ref().map(|residual| self.laid_out(order, residual));
        call(&ConvArgs {
            shape: self.shape,
            order,
            x: self.tensor(order, &x),
            weight: Values::of_inputs("weight", &self.weight, [channels, width, 1], [width, 1, 1]).unwrap(),
            bias: self.bias.as_ref().map(|bias| Values::of_sums("bias", bias, [channels, 1, 1], [1, 1, 1]).unwrap()),
            residual: residual.as_ref().map(|residual| self.tensor(order, residual)),
            initial: self.initial.as_ref().map(|initial| {
                let strides = [channels * state_len, state_len, 1];
                Values::of_inputs("initial", initial, [self.states, channels, state_len], strides).unwrap()
            }),
            silu: self.silu,
            runs: &self.runs,
        })
    }

    /// Outputs as they lie in memory, and states.
    fn run(&self, order: Order, form: impl Fn(&ConvArgs<'_, T>, &ConvOut<'_, T>)) -> (Vec<T>, Vec<T>) {
        let ConvShape { channels, state_len, .. } = self.shape;
        let nan = T::from_acc(T::Acc::from_f64(f64::NAN));
        let mut out = vec![nan; self.x.len()];
        let mut last = vec![nan; self.states * channels * state_len];
        let writers = ConvOut { out: rows_of(&mut out, order, &self.shape), last: Some(self.state_rows(&mut last)) };
        self.with_args(order, |args| form(args, &writers));
        drop(writers);
        (out, last)
    }

    fn state_rows<'a, E>(&self, data: &'a mut [E]) -> RowWriter<'a, E> {
        let ConvShape { channels, state_len, .. } = self.shape;
        RowWriter::new(data, [self.states, channels, state_len, 1], [channels * state_len, state_len, 1])
    }
}

impl<T: SimdElement> Case<T> {
    fn check(&self, tolerance: f64) {
        for order in ORDERS {
            let want = self.run(order, naive::forward);
            for level in Level::available() {
                let run = |threads| self.run(order, |args, out| forward(args, out, level, threads));
                let (got, again) = (run(1), run(3));
                let what = format!("{order:?} {} {:?} {:?}", level.name(), self.shape, self.runs);
                compare(&widen(&got.0), &widen(&want.0), tolerance, &what);
                assert_eq!(bits(&got.1), bits(&want.1), "states are copies: {what}");
                assert_eq!(bits(&got.0), bits(&again.0), "threads change bits: {what}");
                assert_eq!(bits(&got.1), bits(&again.1), "threads change bits: {what}");
            }
        }
    }
}

fn bits<T: Element>(x: &[T]) -> &[u8] {
    bytemuck::cast_slice(x)
}

fn compare(got: &[f64], want: &[f64], tolerance: f64, what: &str) {
    assert_eq!(got.len(), want.len());
    for (i, (x, y)) in got.iter().zip(want).enumerate() {
        assert!((x - y).abs() <= tolerance * y.abs().max(1.0), "[{i}] {x} != {y}: {what}");
    }
}

fn shape(batch: usize, channels: usize, seqlen: usize, width: usize, extra: usize) -> ConvShape {
    ConvShape { batch, channels, seqlen, width, state_len: width - 1 + extra }
}

/// Lengths of rows around vectors and tiles, filters that are unrolled and not, blocks and spans that end within.
fn shapes() -> Vec<ConvShape> {
    let mut shapes = Vec::new();
    for width in [1, 2, 3, 4, 7, 20] {
        for (channels, seqlen) in [(1, 1), (3, 2), (5, 9), (16, 4), (20, 33), (67, 70)] {
            shapes.push(shape(2, channels, seqlen, width, usize::from(channels % 2 == 0)));
        }
    }
    shapes
}

fn sweep<T: SimdElement>(tolerance: f64) {
    for (i, shape) in shapes().into_iter().enumerate() {
        for cuts in [Cuts::Rows, Cuts::Packed, Cuts::Numbered] {
            for options in [[false; 4], [true; 4], [i % 2 == 0, true, i % 3 == 0, true]] {
                Case::<T>::new(shape, cuts, options).check(tolerance);
            }
        }
    }
}

#[test]
fn outputs_in_double_precision() {
    sweep::<f64>(1e-13);
}

#[test]
fn outputs_in_single_precision() {
    sweep::<f32>(3e-6);
}

#[test]
fn outputs_in_half_precision() {
    // A unit in the last place.
    sweep::<bf16>(8e-3);
    sweep::<f16>(1e-3);
}

#[test]
fn more_than_a_block_and_a_span() {
    for shape in [shape(1, 2100, 5, 4, 0), shape(1, 2048, 150, 3, 1), shape(1, 2, 2100, 4, 0), shape(2, 3, 1024, 2, 0)] {
        for cuts in [Cuts::Rows, Cuts::Packed] {
            let case = Case::<f32>::new(shape, cuts, [true; 4]);
            case.check(3e-6);
            gradients(&case, 2e-5);
        }
    }
}

#[test]
fn activations_of_large_numbers() {
    for silu in [false, true] {
        let mut case = Case::<f32>::new(shape(1, 33, 20, 2, 0), Cuts::Rows, [false, silu, false, false]);
        for (i, x) in case.x.iter_mut().enumerate() {
            *x = [-300.0, -88.0, -20.0, -1e-30, 0.0, 1e-30, 20.0, 88.0, 300.0, 1e30][i * 7 % 10];
        }
        case.check(3e-6);
    }
}

/// Gradients of every input of `sum(out * d_out) + sum(last * d_last)`, in `[B, D, T]`, `[D, W]`, `[D]` and `[N, D, S]`.
fn gradients_of<T: SimdElement>(case: &Case<T>, order: Order, seeds: &[Vec<T>; 2], level: Level, threads: usize) -> [Vec<f64>; 4]
where
    T::Acc: Wide,
{
    let ConvShape { batch, channels, seqlen, width, state_len } = case.shape;
    let nan = T::Acc::from_f64(f64::NAN);
    let mut x = vec![T::from_acc(nan); case.x.len()];
    let (mut weight, mut bias) = (vec![nan; channels * width], vec![nan; channels]);
    let mut initial = vec![T::Acc::ZERO; case.states * channels * state_len];
    let d_out = case.laid_out(order, &seeds[0]);
    let strides = [channels * state_len, state_len, 1];
    let given = ConvGradients {
        d_out: case.tensor(order, &d_out),
        d_last: Some(Values::of_inputs("d_last", &seeds[1], [case.states, channels, state_len], strides).unwrap()),
    };
    let out = ConvGradientsOut {
        x: rows_of(&mut x, order, &case.shape),
        initial: case.initial.is_some().then(|| case.state_rows(&mut initial)),
    };
    let mut filters = FilterGradients { weight: &mut weight, bias: &mut bias };
    case.with_args(order, |args| backward(args, &given, &out, &mut filters, level, threads));
    drop(out);
    let mut in_order = x.clone();
    if order == Order::TokensFirst {
        for (i, to) in in_order.iter_mut().enumerate() {
            let (b, d, t) = (i / (channels * seqlen), i / seqlen % channels, i % seqlen);
            *to = x[(b * seqlen + t) * channels + d];
        }
    }
    assert_eq!(x.len(), batch * channels * seqlen);
    let wide = |x: &[T::Acc]| x.iter().map(|x| x.to_f64()).collect();
    [widen(&in_order), wide(&weight), wide(&bias), wide(&initial)]
}

/// Directional derivatives of the definition in f64, by differences of the fourth order, against gradients of every level and order.
fn gradients<T: SimdElement>(case: &Case<T>, tolerance: f64)
where
    T::Acc: Wide,
{
    let mut stream = Stream(3);
    let states = case.states * case.shape.channels * case.shape.state_len;
    let seeds = [stream.fill::<T>(case.x.len(), 1.0), stream.fill::<T>(states, 1.0)];
    let wide = |x: &[T]| widen(x);
    let exact = Case::<f64> {
        shape: case.shape,
        x: wide(&case.x),
        weight: wide(&case.weight),
        bias: Some(case.bias.as_ref().map_or(vec![0.0; case.shape.channels], |bias| bias.iter().map(|x| x.to_f64()).collect())),
        residual: case.residual.as_ref().map(|residual| wide(residual)),
        initial: Some(case.initial.as_ref().map_or(vec![0.0; states], |initial| wide(initial))),
        silu: case.silu,
        runs: case.runs.clone(),
        states: case.states,
    };
    let [d_out, d_last] = [wide(&seeds[0]), wide(&seeds[1])];
    let loss = |case: &Case<f64>| {
        let (out, last) = case.run(Order::ChannelsFirst, naive::forward);
        let dot = |x: &[f64], y: &[f64]| x.iter().zip(y).map(|(x, y)| x * y).sum::<f64>();
        dot(&out, &d_out) + dot(&last, &d_last)
    };
    let mut found = Vec::new();
    for order in ORDERS {
        for level in Level::available() {
            let got = gradients_of(case, order, &seeds, level, 1);
            let again = gradients_of(case, order, &seeds, level, 3);
            let what = format!("{order:?} {} {:?} {:?}", level.name(), case.shape, case.runs);
            assert_eq!(got, again, "threads change bits: {what}");
            found.push((what, got));
        }
    }
    for which in 0..if case.initial.is_some() { 4 } else { 3 } {
        let len = found[0].1[which].len();
        let direction: Vec<f64> = (0..len).map(|_| stream.next()).collect();
        let at = |step: f64| {
            let mut moved = exact.clone();
            let target = match which {
                0 => &mut moved.x,
                1 => &mut moved.weight,
                2 => moved.bias.as_mut().unwrap(),
                _ => moved.initial.as_mut().unwrap(),
            };
            for (x, d) in target.iter_mut().zip(&direction) {
                *x += step * d;
            }
            loss(&moved)
        };
        let e = 1e-3;
        let want = (8.0 * (at(e) - at(-e)) - (at(2.0 * e) - at(-2.0 * e))) / (12.0 * e);
        for (what, got) in &found {
            let terms = || got[which].iter().zip(&direction).map(|(g, d)| g * d);
            let size = terms().map(f64::abs).sum::<f64>().max(1e-2);
            let got: f64 = terms().sum();
            assert!((got - want).abs() <= tolerance * size, "gradient {which}: {got} != {want}: {what}");
        }
    }
}

fn sweep_gradients<T: SimdElement>(tolerance: f64)
where
    T::Acc: Wide,
{
    for (i, shape) in shapes().into_iter().enumerate() {
        for cuts in [Cuts::Rows, Cuts::Packed, Cuts::Numbered] {
            for options in [[false; 4], [true; 4], [i % 2 == 0, i % 3 == 0, false, i % 2 == 1]] {
                gradients(&Case::<T>::new(shape, cuts, options), tolerance);
            }
        }
    }
}

#[test]
fn gradients_in_double_precision() {
    sweep_gradients::<f64>(1e-8);
}

#[test]
fn gradients_in_single_precision() {
    sweep_gradients::<f32>(1e-5);
}

#[test]
fn gradients_in_half_precision() {
    sweep_gradients::<bf16>(1e-2);
    sweep_gradients::<f16>(2e-3);
}

fn check_update<T: SimdElement>(shape: ConvShape, circular: bool, silu: bool, tolerance: f64) {
    let mut stream = Stream(29);
    let mut some = |len: usize| stream.fill::<T>(len, 2.0);
    let ConvShape { batch, channels, seqlen, width, state_len } = shape;
    let (x, weight, bias) = (some(batch * channels * seqlen), some(channels * width), some(channels));
    let states = some((batch + 1) * channels * state_len);
    // The second row has no state, the others have them in another order.
    let slot = |b: usize| Slot { state: (b != 1).then_some(batch - b), seen: circular.then_some(3 * b + 2) };
    let slots: Vec<Slot> = (0..batch).map(slot).collect();
    let args = UpdateArgs {
        shape,
        x: Values::of_inputs("x", &x, [batch, channels, seqlen], [channels * seqlen, seqlen, 1]).unwrap(),
        weight: Values::of_inputs("weight", &weight, [channels, width, 1], [width, 1, 1]).unwrap(),
        bias: Some(Values::of_inputs("bias", &bias, [channels, 1, 1], [1, 1, 1]).unwrap()),
        silu,
        slots: &slots,
    };
    let mut want_states = widen(&states);
    let want = naive::update(&args, &mut want_states);
    for level in Level::available() {
        for threads in [1, 3] {
            let mut out = vec![T::from_acc(T::Acc::from_f64(f64::NAN)); x.len()];
            let mut moved = states.clone();
            let writers = UpdateOut {
                out: outputs(&mut out, &shape),
                states: RowWriter::new(
                    &mut moved,
                    [batch + 1, channels, 1, state_len],
                    [channels * state_len, state_len, state_len],
                ),
            };
            update(&args, &writers, level, threads);
            drop(writers);
            let what = format!("{shape:?} circular {circular} {} {threads}", level.name());
            compare(&widen(&out), &want, tolerance, &what);
            assert_eq!(widen(&moved), want_states, "{what}");
        }
    }
}

#[test]
fn updates() {
    for width in [1, 2, 3, 4, 6] {
        for (channels, seqlen) in [(1, 1), (20, 1), (33, 3), (300, 9)] {
            for extra in [0, 1, 4] {
                for circular in [false, true] {
                    let shape = shape(3, channels, seqlen, width, extra);
                    check_update::<f64>(shape, circular, true, 1e-13);
                    check_update::<f32>(shape, circular, false, 3e-6);
                    check_update::<bf16>(shape, circular, true, 8e-3);
                    check_update::<f16>(shape, circular, true, 1e-3);
                }
            }
        }
    }
    check_update::<f32>(shape(4, 8192, 2, 4, 0), false, true, 3e-6);
}
