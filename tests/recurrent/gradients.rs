//! The backward of recurrent attention against differences of the definition, in double precision.

use crate::case::{Case, Fades, Writes, shape};
use crate::stream::Stream;
use subquad::kernels::recurrent::backward::{BackwardArgs, Gradients, backward};
use subquad::kernels::recurrent::{Form, Numbers, RecurrentOut, RecurrentShape, States, forward, naive};
use subquad::parallel::RowWriter;
use subquad::simd::Level;
use subquad::tensor::Tensor;

/// What has a gradient.
const NAMES: [&str; 9] = ["q", "k", "v", "a", "b", "gates", "beta", "bonus", "initial"];

fn argument<'c>(case: &'c mut Case<f64>, name: &str) -> &'c mut Vec<f64> {
    match name {
        "q" => &mut case.q,
        "k" => &mut case.k,
        "v" => &mut case.v,
        "a" => &mut case.a,
        "b" => &mut case.b,
        "gates" if case.fades == Fades::ByHead => &mut case.head_gates,
        "gates" => &mut case.gates,
        "beta" => &mut case.beta,
        "bonus" => &mut case.bonus,
        _ => &mut case.initial,
    }
}

fn has(case: &Case<f64>, name: &str) -> bool {
    match name {
        "a" | "b" => case.writes == Writes::LowRank,
        "gates" => case.fades != Fades::Never,
        "beta" => matches!(case.writes, Writes::ScaledValues | Writes::Corrections),
        "bonus" => case.writes == Writes::ValuesWithBonus,
        _ => true,
    }
}

fn writer(data: &mut [f64], shape: [usize; 4]) -> RowWriter<'_, f64> {
    let [_, seqlen, heads, width] = shape;
    RowWriter::new(data, shape, [seqlen * heads * width, heads * width, width])
}

struct Check {
    case: Case<f64>,
    /// Gradients from outside.
    d_out: Vec<f64>,
    d_last: Vec<f64>,
}

impl Check {
    fn new(case: Case<f64>) -> Self {
        let mut stream = Stream(99);
        let mut some = |len: usize| (0..len).map(|_| stream.next()).collect::<Vec<f64>>();
        Self { d_out: some(case.v.len()), d_last: some(case.initial.len()), case }
    }

    /// What the gradients from outside are of.
    fn loss(&self, case: &Case<f64>) -> f64 {
        let (out, last) = case.run(false, naive::forward);
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
        dot(&out, &self.d_out) + dot(&last, &self.d_last)
    }

    /// All gradients, in the order of [`NAMES`].
    fn gradients(&self, chunk: usize, level: Level, threads: usize) -> Vec<Vec<f64>> {
        let case = &self.case;
        let RecurrentShape { batch, seqlen, num_heads, num_value_heads: heads, head_dim, head_dim_v } = case.shape;
        let (count, len) = (case.sequences.len(), head_dim * head_dim_v);
        let chunks = seqlen.div_ceil(chunk);
        let gates = if case.fades == Fades::ByChannel { head_dim } else { 1 };
        let zeros = |len: usize| vec![0.0; len];
        let (mut q, mut k, mut v) = (zeros(case.q.len()), zeros(case.k.len()), zeros(case.v.len()));
        let (mut a, mut b, mut g) = (zeros(case.a.len()), zeros(case.b.len()), zeros(batch * seqlen * heads * gates));
        let (mut beta, mut bonus, mut initial) =
            (zeros(case.beta.len()), zeros(count * heads * chunks * head_dim), zeros(case.initial.len()));
        let states = [count, heads, 1, len];
        let of_keys = |data| {
            let strides = [seqlen * num_heads * head_dim, num_heads * head_dim, head_dim];
            RowWriter::new(data, [batch, seqlen, num_heads, head_dim], strides)
        };
        let of_values = |width| [batch, seqlen, heads, width];
        let gradients = Gradients {
            q: of_keys(&mut q),
            k: of_keys(&mut k),
            v: writer(&mut v, of_values(head_dim_v)),
            gates: has(case, "gates").then(|| writer(&mut g, of_values(gates))),
            beta: has(case, "beta").then(|| writer(&mut beta, of_values(1))),
            low_rank: has(case, "a").then(|| [of_keys(&mut a), of_keys(&mut b)]),
            bonus: has(case, "bonus").then(|| {
                let strides = [heads * chunks * head_dim, chunks * head_dim, head_dim];
                RowWriter::new(&mut bonus, [count, heads, chunks, head_dim], strides)
            }),
            initial: Some(RowWriter::new(&mut initial, states, [heads * len, len, len])),
        };
        case.with_args(|args| {
            let state = |data| Some(Numbers::Acc(Tensor::contiguous("state", data, states).unwrap()));
            let (mut out, mut kept) = (zeros(case.v.len()), zeros(case.v.len()));
            let writers = RecurrentOut {
                out: writer(&mut out, of_values(head_dim_v)),
                states: States { initial: state(&case.initial), last: None, in_place: false, v_first: false },
                kept: Some(writer(&mut kept, of_values(head_dim_v))),
            };
            forward(args, &writers, Form::Auto, level, threads);
            drop(writers);
            let args = BackwardArgs {
                forward: *args,
                initial: state(&case.initial),
                kept: Some(Tensor::contiguous("kept", &kept, [batch, seqlen, heads, head_dim_v]).unwrap()),
                d_out: Tensor::contiguous("do", &self.d_out, [batch, seqlen, heads, head_dim_v]).unwrap(),
                d_last: state(&self.d_last),
            };
            backward(&args, &gradients, chunk, level, threads);
        });
        drop(gradients);
        if case.fades == Fades::ByHead {
            g = (0..heads).map(|head| g.iter().skip(head).step_by(heads).sum()).collect();
        }
        let mut by_head = vec![0.0; num_heads * head_dim];
        for (row, part) in bonus.chunks_exact(head_dim).enumerate() {
            let head = case.shape.head_of(row / chunks % heads);
            for (sum, x) in by_head[head * head_dim..].iter_mut().zip(part) {
                *sum += x;
            }
        }
        vec![q, k, v, a, b, g, beta, by_head, initial]
    }

    fn check(&self, chunk: usize, what: &str) {
        let level = Level::available().last().expect("there is always the scalar one");
        let found = self.gradients(chunk, level, 2);
        for (name, found) in NAMES.iter().zip(&found).filter(|(name, _)| has(&self.case, name)) {
            let mut stream = Stream(7 + name.len() as u64);
            let direction: Vec<f64> = found.iter().map(|_| stream.next()).collect();
            let along = |step: f64| {
                let mut case = self.case.clone();
                for (x, d) in argument(&mut case, name).iter_mut().zip(&direction) {
                    *x += step * d;
                }
                self.loss(&case)
            };
            let step = 1e-5;
            let near = along(step) - along(-step);
            let expected = (8.0 * near - along(2.0 * step) + along(-2.0 * step)) / (12.0 * step);
            let terms = found.iter().zip(&direction).map(|(x, d)| x * d);
            let scale = terms.clone().map(f64::abs).sum::<f64>().max(1e-2);
            let sum: f64 = terms.sum();
            assert!((sum - expected).abs() <= 1e-6 * scale, "{name}: {sum} != {expected}: chunk {chunk} {what}");
        }
        for other in Level::available() {
            for threads in [1, 3] {
                let again = self.gradients(chunk, other, threads);
                for (name, (one, other)) in NAMES.iter().zip(found.iter().zip(&again)) {
                    let largest = one.iter().fold(1e-3, |most: f64, x| most.max(x.abs()));
                    let close = one.iter().zip(other).all(|(x, y)| (x - y).abs() <= 1e-11 * largest);
                    assert!(close, "{name} at another level: chunk {chunk} {what}");
                }
            }
        }
    }
}

#[test]
fn every_decay_and_rule() {
    let all = [Writes::Values, Writes::ScaledValues, Writes::ValuesWithBonus, Writes::Corrections, Writes::LowRank];
    for (seqlen, heads, dims) in [(5, (1, 1), (8, 8)), (40, (1, 2), (16, 20)), (70, (2, 2), (20, 12))] {
        for fades in [Fades::Never, Fades::ByHead, Fades::ByStep, Fades::ByChannel] {
            for writes in all {
                for gate in if fades == Fades::Never { &[0.0][..] } else { &[0.1, 3.0, 30.0] } {
                    let check = Check::new(Case::new(shape(seqlen, heads, dims), (fades, writes), *gate));
                    for chunk in [16, 64] {
                        check.check(chunk, &format!("{fades:?} {writes:?} {gate} {seqlen}"));
                    }
                }
            }
        }
    }
}

#[test]
fn through_lengths() {
    let mut case = Case::new(shape(40, (1, 2), (16, 12)), (Fades::ByChannel, Writes::Corrections), 0.3);
    case.l2norm = true;
    Check::new(case).check(32, "l2norm");
}
