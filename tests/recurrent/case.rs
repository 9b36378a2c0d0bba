//! A call of the recurrent engine, with its numbers.

use crate::stream::Stream;
use subquad::dtype::{Element, Float};
use subquad::kernels::recurrent::{Decay, Numbers, RecurrentArgs, RecurrentOut, RecurrentShape, Rule, Sequence, States};
use subquad::parallel::RowWriter;
use subquad::tensor::Tensor;

#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Fades {
    Never,
    ByHead,
    ByStep,
    ByChannel,
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Writes {
    Values,
    ScaledValues,
    ValuesWithBonus,
    Corrections,
    LowRank,
}

#[derive(Clone)]
pub struct Case<T: Element> {
    pub shape: RecurrentShape,
    pub fades: Fades,
    pub writes: Writes,
    pub l2norm: bool,
    pub v_first: bool,
    pub q: Vec<T>,
    pub k: Vec<T>,
    pub v: Vec<T>,
    pub a: Vec<T>,
    pub b: Vec<T>,
    pub gates: Vec<T::Acc>,
    pub head_gates: Vec<f64>,
    pub beta: Vec<T::Acc>,
    pub bonus: Vec<f64>,
    pub initial: Vec<T::Acc>,
    pub sequences: Vec<Sequence>,
}

pub type Results<T> = (Vec<T>, Vec<<T as Element>::Acc>);

impl<T: Element> Case<T> {
    pub fn new(shape: RecurrentShape, (fades, writes): (Fades, Writes), gate: f64) -> Self {
        let mut stream = Stream(5);
        let RecurrentShape { batch, seqlen, num_heads, num_value_heads, head_dim, head_dim_v } = shape;
        let width = (head_dim as f64).sqrt();
        let mut some =
            |len: usize, size: f64| -> Vec<T> { (0..len).map(|_| T::from_acc(T::Acc::from_f64(stream.next() * size))).collect() };
        let of_keys = batch * seqlen * num_heads * head_dim;
        let (q, v) = (some(of_keys, 1.0), some(batch * seqlen * num_value_heads * head_dim_v, 1.0));
        let [k, a, b] = [1.7, 1.0, 1.0].map(|size| some(of_keys, size / width));
        let channels = if fades == Fades::ByChannel { head_dim } else { 1 };
        let mut gate = || -gate * (0.5 + 0.5 * stream.next()).powi(3);
        let gates = (0..batch * seqlen * num_value_heads * channels).map(|_| T::Acc::from_f64(gate())).collect();
        let head_gates = (0..num_value_heads).map(|_| gate()).collect();
        let third = seqlen / 3;
        let sequences = if seqlen > 20 {
            let parts = [(0, third), (third, 0), (third, seqlen - third)];
            (0..batch).flat_map(|batch| parts.map(|(first, len)| Sequence { batch, first, len })).collect()
        } else {
            (0..batch).map(|batch| Sequence { batch, first: 0, len: seqlen }).collect::<Vec<_>>()
        };
        let states = sequences.len() * num_value_heads * head_dim * head_dim_v;
        Self {
            beta: (0..batch * seqlen * num_value_heads).map(|_| T::Acc::from_f64(0.5 + 0.5 * stream.next())).collect(),
            bonus: (0..num_heads * head_dim).map(|_| stream.next()).collect(),
            initial: (0..states).map(|_| T::Acc::from_f64(stream.next())).collect(),
            l2norm: false,
            v_first: false,
            shape,
            fades,
            writes,
            q,
            k,
            v,
            a,
            b,
            gates,
            head_gates,
            sequences,
        }
    }

    /// Calls with the arguments.
    pub fn with_args<R>(&self, with: impl FnOnce(&RecurrentArgs<'_, T>) -> R) -> R {
        let RecurrentShape { batch, seqlen, num_heads, num_value_heads: heads, head_dim, head_dim_v } = self.shape;
        let of_keys = [batch, seqlen, num_heads, head_dim];
        let tensor = |data| Tensor::contiguous("q", data, of_keys).unwrap();
        let per_step = |data| Numbers::Acc(Tensor::contiguous("g", data, [batch, seqlen, heads, 1]).unwrap()).into();
        let beta = Some(per_step(&self.beta));
        let args = RecurrentArgs {
            shape: self.shape,
            q: tensor(&self.q),
            k: tensor(&self.k),
            v: Tensor::contiguous("v", &self.v, [batch, seqlen, heads, head_dim_v]).unwrap(),
            decay: match self.fades {
                Fades::Never => Decay::None,
                Fades::ByHead => Decay::Heads(&self.head_gates),
                Fades::ByStep => Decay::Steps(per_step(&self.gates)),
                Fades::ByChannel => {
                    Decay::Channels(Numbers::Acc(Tensor::contiguous("g", &self.gates, [batch, seqlen, heads, head_dim]).unwrap()))
                }
            },
            rule: match self.writes {
                Writes::Values | Writes::ValuesWithBonus => Rule::Additive(None),
                Writes::ScaledValues => Rule::Additive(beta),
                Writes::Corrections => Rule::Delta(beta),
                Writes::LowRank => Rule::LowRank { a: tensor(&self.a), b: tensor(&self.b) },
            },
            bonus: (self.writes == Writes::ValuesWithBonus).then_some(&self.bonus[..]),
            scale: 0.3,
            l2norm: self.l2norm,
            sequences: &self.sequences,
        };
        with(&args)
    }

    pub fn run(&self, in_place: bool, form: impl Fn(&RecurrentArgs<'_, T>, &RecurrentOut<'_, T>)) -> Results<T> {
        let RecurrentShape { batch, seqlen, num_value_heads: heads, head_dim, head_dim_v, .. } = self.shape;
        let len = head_dim * head_dim_v;
        let states = [self.sequences.len(), heads, 1, len];
        let nan = T::Acc::from_f64(f64::NAN);
        let mut out = vec![T::zeroed(); batch * seqlen * heads * head_dim_v];
        let mut last = if in_place { self.initial.clone() } else { vec![nan; self.initial.len()] };
        let initial = Numbers::Acc(Tensor::contiguous("initial_state", &self.initial, states).unwrap());
        let writers = RecurrentOut {
            out: RowWriter::new(
                &mut out,
                [batch, seqlen, heads, head_dim_v],
                [seqlen * heads * head_dim_v, heads * head_dim_v, head_dim_v],
            ),
            states: States {
                initial: (!in_place).then_some(initial),
                last: Some(RowWriter::new(&mut last, states, [heads * len, len, len])),
                in_place,
                v_first: self.v_first,
            },
            kept: None,
        };
        self.with_args(|args| form(args, &writers));
        drop(writers);
        (out, last)
    }
}

pub fn shape(seqlen: usize, heads: (usize, usize), dims: (usize, usize)) -> RecurrentShape {
    let batch = if seqlen < 20 { 2 } else { 1 };
    RecurrentShape { batch, seqlen, num_heads: heads.0, num_value_heads: heads.1, head_dim: dims.0, head_dim_v: dims.1 }
}
