//! Diagonal recurrences: every level and thread count against the naive form, gradients against its finite differences.

use crate::stream::{Stream, widen};
use half::{bf16, f16};
use subquad::dtype::{Element, Float};
use subquad::kernels::recurrent::{Numbers, Sequence};
use subquad::kernels::scan::linear::{self, Gates, LinearArgs, LinearBackwardArgs, LinearGradients, LinearOut, NumbersOut};
use subquad::kernels::scan::step::{Parameter, States, StepArgs, StepShape, Strided, update};
use subquad::kernels::scan::{
    CHUNK, Factors, Plane, PlaneWriter, SelectiveArgs, SelectiveBackwardArgs, SelectiveGradients, SelectiveOut, SelectiveShape,
    backward, naive, selective,
};
use subquad::parallel::{PieceWriter, RowWriter};
use subquad::simd::{Level, SimdElement, Wide};
use subquad::tensor::Tensor;

fn compare(got: &[f64], want: &[f64], tolerance: f64, what: &str) {
    assert_eq!(got.len(), want.len(), "{what}");
    let largest = want.iter().fold(1e-3, |most: f64, y| most.max(y.abs()));
    for (i, (x, y)) in got.iter().zip(want).enumerate() {
        assert!((x - y).abs() <= tolerance * largest, "[{i}] {x} != {y}: {what}");
    }
}

/// Which of the options a case has.
#[derive(Debug, Clone, Copy)]
#[expect(clippy::struct_excessive_bools, reason = "options of the operator")]
struct Kind {
    steps_b: bool,
    steps_c: bool,
    gated: bool,
    softplus: bool,
    by_channels: bool,
}

const PLAIN: Kind = Kind { steps_b: true, steps_c: true, gated: false, softplus: true, by_channels: false };

#[derive(Clone)]
struct Case<T: Element> {
    shape: SelectiveShape,
    kind: Kind,
    u: Vec<T>,
    delta: Vec<T>,
    z: Vec<T>,
    a: Vec<T::Acc>,
    steps: [Vec<T>; 2],
    channels: [Vec<T::Acc>; 2],
    d: Vec<T::Acc>,
    bias: Vec<T::Acc>,
    initial: Vec<T::Acc>,
}

impl<T: SimdElement> Case<T>
where
    T::Acc: Wide,
{
    fn new(shape: SelectiveShape, kind: Kind, decay: f64) -> Self {
        let SelectiveShape { batch, channels, groups, states, steps } = shape;
        let mut stream = Stream(7);
        let inputs = batch * channels * steps;
        let factors = batch * groups * states * steps;
        // Without softplus, sizes of steps are below 0 as often as above it.
        let decay = if kind.softplus { decay } else { 0.02 * decay };
        Self {
            u: stream.fill(inputs, 1.0),
            delta: stream.fill(inputs, 1.0),
            z: stream.fill(inputs, 3.0),
            a: (0..channels * states).map(|_| T::Acc::from_f64(-decay * (0.5 + 0.5 * stream.next()))).collect(),
            steps: [stream.fill(factors, 1.0), stream.fill(factors, 1.0)],
            channels: [stream.fill(channels * states, 1.0), stream.fill(channels * states, 1.0)],
            d: stream.fill(channels, 1.0),
            bias: stream.fill(channels, 1.0),
            initial: stream.fill(batch * channels * states, 1.0),
            shape,
            kind,
        }
    }

    fn inputs(&self) -> ([usize; 4], [usize; 4]) {
        let SelectiveShape { batch, channels, steps, .. } = self.shape;
        let all = channels * steps;
        ([batch, 1, channels, steps], if self.kind.by_channels { [all, all, 1, channels] } else { [all, all, steps, 1] })
    }

    fn plane<'a>(&self, data: &'a [T]) -> Plane<'a, T> {
        let (shape, strides) = self.inputs();
        Plane::new("u", data, shape, strides).unwrap()
    }

    fn writer<'a>(&self, data: &'a mut [T]) -> PlaneWriter<'a, T> {
        let (shape, strides) = self.inputs();
        PlaneWriter::new(data, shape, strides)
    }

    fn args(&self) -> SelectiveArgs<'_, T> {
        let SelectiveShape { batch, channels, groups, states, steps } = self.shape;
        let rows = |data, batch, width| Numbers::Acc(Tensor::contiguous("A", data, [batch, channels, 1, width]).unwrap());
        let factors = |i: usize, by_step| {
            if by_step {
                Factors::Steps(Plane::contiguous("B", &self.steps[i], [batch, groups, states, steps]).unwrap())
            } else {
                Factors::Channels(rows(&self.channels[i], 1, states))
            }
        };
        SelectiveArgs {
            shape: self.shape,
            u: self.plane(&self.u),
            delta: self.plane(&self.delta),
            a: rows(&self.a, 1, states),
            b: factors(0, self.kind.steps_b),
            c: factors(1, self.kind.steps_c),
            d: Some(rows(&self.d, 1, 1)),
            z: self.kind.gated.then(|| self.plane(&self.z)),
            delta_bias: Some(rows(&self.bias, 1, 1)),
            delta_softplus: self.kind.softplus,
            initial: Some(rows(&self.initial, batch, states)),
        }
    }

    fn run(&self, form: impl Fn(&SelectiveArgs<'_, T>, &SelectiveOut<'_, T>)) -> (Vec<T>, Vec<T::Acc>, Vec<T::Acc>) {
        let SelectiveShape { batch, channels, states, steps, .. } = self.shape;
        let chunks = steps.div_ceil(CHUNK);
        let nan = T::Acc::from_f64(f64::NAN);
        let mut out = vec![T::from_acc(nan); self.u.len()];
        let mut last = vec![nan; self.initial.len()];
        let mut checkpoints = vec![T::Acc::ZERO; batch * chunks * states * channels];
        let writers = SelectiveOut {
            out: self.writer(&mut out),
            last: Some(RowWriter::new(&mut last, [batch, channels, 1, states], [channels * states, states, states])),
            checkpoints: Some(PieceWriter::new(
                &mut checkpoints,
                [batch, chunks, states, channels],
                [chunks * states * channels, states * channels, channels],
            )),
        };
        form(&self.args(), &writers);
        drop(writers);
        (out, last, checkpoints)
    }

    fn check(&self, tolerance: f64) {
        let want = self.run(naive::forward);
        for level in Level::available() {
            let run = |threads| self.run(|args, out| selective(args, out, level, threads));
            let (got, again) = (run(1), run(3));
            let what = format!("{:?} {:?} {}", self.shape, self.kind, level.name());
            compare(&widen(&got.0), &widen(&want.0), tolerance, &format!("out, {what}"));
            compare(&widen(&got.1), &widen(&want.1), tolerance, &format!("state, {what}"));
            assert!(
                bytemuck::cast_slice::<_, u8>(&got.0) == bytemuck::cast_slice::<_, u8>(&again.0),
                "threads change bits: {what}"
            );
            assert!(
                bytemuck::cast_slice::<_, u8>(&got.2) == bytemuck::cast_slice::<_, u8>(&again.2),
                "threads change bits: {what}"
            );
        }
    }
}

fn shape(batch: usize, channels: usize, groups: usize, states: usize, steps: usize) -> SelectiveShape {
    SelectiveShape { batch, channels, groups, states, steps }
}

fn kinds() -> impl Iterator<Item = Kind> {
    (0..16).map(|bits| Kind {
        steps_b: bits & 1 > 0,
        steps_c: bits & 2 > 0,
        gated: bits & 4 > 0,
        softplus: bits & 8 > 0,
        by_channels: bits == 5 || bits == 15,
    })
}

fn sweep<T: SimdElement>(tolerance: f64)
where
    T::Acc: Wide,
{
    for shape in
        [shape(1, 1, 1, 1, 1), shape(2, 20, 2, 5, 63), shape(1, 40, 1, 16, 65), shape(2, 33, 3, 4, 130), shape(1, 7, 7, 3, 0)]
    {
        for kind in kinds() {
            Case::<T>::new(shape, kind, 1.0).check(tolerance);
        }
    }
    // Blocks of several vectors.
    Case::<T>::new(shape(2, 700, 1, 3, 70), PLAIN, 1.0).check(tolerance);
}

#[test]
fn every_option_in_double_precision() {
    sweep::<f64>(1e-12);
}

#[test]
fn every_option() {
    sweep::<f32>(1e-5);
}

#[test]
fn every_option_in_half_precision() {
    sweep::<bf16>(1e-2);
    sweep::<f16>(2e-3);
}

#[test]
fn strong_and_weak_decays() {
    for decay in [1e-6, 30.0, 1000.0] {
        for kind in [PLAIN, Kind { softplus: false, ..PLAIN }] {
            let mut case = Case::<f32>::new(shape(1, 20, 1, 8, 200), kind, decay);
            // Sizes of steps below 0 make strong decays grow beyond all bounds.
            case.delta.iter_mut().for_each(|x| *x = x.abs());
            case.bias.iter_mut().for_each(|x| *x = x.abs());
            case.check(2e-5);
        }
    }
}

#[test]
fn states_that_fade_to_nothing_stay_there() {
    let mut case = Case::<f32>::new(shape(1, 16, 1, 4, 1000), PLAIN, 3.0);
    case.u.fill(0.0);
    case.a.fill(-2.0);
    let (out, last, _) = case.run(|args, out| selective(args, out, Level::detected(), 1));
    assert!(last.iter().all(|&x| x == 0.0));
    for row in out.chunks(1000) {
        assert!(row[0] != 0.0);
        // What takes hundreds of cycles is over with the chunk that it begins in.
        let mut slow = row.iter().enumerate().filter(|(_, x)| x.is_subnormal()).map(|(t, _)| t / CHUNK);
        let first = slow.next();
        assert!(slow.all(|chunk| Some(chunk) == first));
    }
}

/// Gradients of `sum(weights * out) + sum(other * last)`, by name.
fn gradients<T: SimdElement>(
    case: &Case<T>,
    weights: &[T],
    other: &[T::Acc],
    level: Level,
    threads: usize,
) -> Vec<(&'static str, Vec<f64>)>
where
    T::Acc: Wide,
{
    let SelectiveShape { batch, channels, states, .. } = case.shape;
    let (_, _, checkpoints) = case.run(|args, out| selective(args, out, level, threads));
    let args = SelectiveBackwardArgs {
        forward: case.args(),
        d_out: case.plane(weights),
        d_last: Some(Numbers::Acc(Tensor::contiguous("d_last", other, [batch, channels, 1, states]).unwrap())),
        checkpoints: &checkpoints,
    };
    let [mut u, mut delta, mut z] = [(); 3].map(|()| vec![T::zeroed(); case.u.len()]);
    let sums = |len| vec![T::Acc::from_f64(f64::NAN); len];
    let factors = |i: usize, by_step| if by_step { case.steps[i].len() } else { case.channels[i].len() };
    let (mut b, mut c) = (sums(factors(0, case.kind.steps_b)), sums(factors(1, case.kind.steps_c)));
    let (mut a, mut d, mut bias, mut initial) = (sums(case.a.len()), sums(channels), sums(channels), sums(case.initial.len()));
    let into = SelectiveGradients {
        u: Some(case.writer(&mut u)),
        delta: Some(case.writer(&mut delta)),
        z: case.kind.gated.then(|| case.writer(&mut z)),
        a: Some(&mut a),
        b: Some(&mut b),
        c: Some(&mut c),
        d: Some(&mut d),
        delta_bias: Some(&mut bias),
        initial: Some(&mut initial),
    };
    backward(&args, into, level, threads);
    let mut found = vec![("u", widen(&u)), ("delta", widen(&delta))];
    if case.kind.gated {
        found.push(("z", widen(&z)));
    }
    found.extend([("A", widen(&a)), ("B", widen(&b)), ("C", widen(&c)), ("D", widen(&d)), ("bias", widen(&bias))]);
    found.push(("initial", widen(&initial)));
    found
}

impl Case<f64> {
    fn argument(&mut self, name: &str) -> &mut Vec<f64> {
        match name {
            "u" => &mut self.u,
            "delta" => &mut self.delta,
            "z" => &mut self.z,
            "A" => &mut self.a,
            "B" if self.kind.steps_b => &mut self.steps[0],
            "B" => &mut self.channels[0],
            "C" if self.kind.steps_c => &mut self.steps[1],
            "C" => &mut self.channels[1],
            "D" => &mut self.d,
            "bias" => &mut self.bias,
            _ => &mut self.initial,
        }
    }

    fn loss(&self, weights: &[f64], other: &[f64]) -> f64 {
        let (out, last, _) = self.run(naive::forward);
        let sum = |x: &[f64], w: &[f64]| x.iter().zip(w).map(|(x, w)| x * w).sum::<f64>();
        sum(&out, weights) + sum(&last, other)
    }
}

#[test]
fn gradients_are_finite_differences() {
    const STEP: f64 = 1e-5;
    for (shape, kinds) in [(shape(2, 5, 1, 3, 9), kinds().collect::<Vec<_>>()), (shape(1, 18, 2, 2, 70), vec![PLAIN])] {
        for kind in kinds {
            let mut case = Case::<f64>::new(shape, kind, 1.0);
            let mut stream = Stream(3);
            let (weights, other): (Vec<f64>, Vec<f64>) = (stream.fill(case.u.len(), 1.0), stream.fill(case.initial.len(), 1.0));
            for (name, got) in gradients(&case, &weights, &other, Level::detected(), 2) {
                let every = (got.len() / 40).max(1);
                for i in (0..got.len()).step_by(every) {
                    let x = case.argument(name)[i];
                    let [high, low] = [STEP, -STEP].map(|step| {
                        case.argument(name)[i] = x + step;
                        case.loss(&weights, &other)
                    });
                    case.argument(name)[i] = x;
                    let want = (high - low) / (2.0 * STEP);
                    assert!((got[i] - want).abs() <= 1e-6 * want.abs().max(1.0), "{name}[{i}] {} != {want}: {kind:?}", got[i]);
                }
            }
        }
    }
}

#[test]
fn gradients_of_all_levels_types_and_threads() {
    for (shape, kind) in [
        (shape(2, 40, 2, 5, 130), Kind { gated: true, ..PLAIN }),
        (shape(1, 700, 1, 4, 65), PLAIN),
        (shape(2, 33, 1, 6, 100), Kind { steps_b: false, steps_c: false, softplus: false, by_channels: true, gated: true }),
    ] {
        let case = Case::<f64>::new(shape, kind, 1.0);
        let mut stream = Stream(3);
        let (weights, other): (Vec<f64>, Vec<f64>) = (stream.fill(case.u.len(), 1.0), stream.fill(case.initial.len(), 1.0));
        let want = gradients(&case, &weights, &other, Level::Scalar, 1);
        let single = Case::<f32>::new(shape, kind, 1.0);
        let narrow = |x: &[f64]| x.iter().map(|&x| x as f32).collect::<Vec<_>>();
        for level in Level::available() {
            let found = gradients(&case, &weights, &other, level, 3);
            assert_eq!(found, gradients(&case, &weights, &other, level, 1), "threads change bits");
            for ((name, got), (_, want)) in found.iter().zip(&want) {
                compare(got, want, 1e-11, &format!("{name}, f64, {}", level.name()));
            }
            let found = gradients(&single, &narrow(&weights), &narrow(&other), level, 2);
            for ((name, got), (_, want)) in found.iter().zip(&want) {
                compare(got, want, 5e-5, &format!("{name}, f32, {}", level.name()));
            }
        }
    }
}

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
