//! Diagonal recurrences: every level and thread count against the naive form, gradients against its finite differences.

use crate::compare::compare;
use crate::stream::{Stream, widen};
use half::{bf16, f16};
use subquad::dtype::{Element, Float};
use subquad::kernels::recurrent::Numbers;
use subquad::kernels::scan::{
    CHUNK, Factors, Plane, PlaneWriter, SelectiveArgs, SelectiveBackwardArgs, SelectiveGradients, SelectiveOut, SelectiveShape,
    backward, naive, selective,
};
use subquad::parallel::{PieceWriter, RowWriter};
use subquad::simd::{Level, SimdElement, Wide};
use subquad::tensor::Tensor;

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
