//! A call with made-up inputs, run by every form.

use crate::stream::{Stream, widen};
use subquad::dtype::{Element, Float};
use subquad::index::Segments;
use subquad::kernels::bias::{Bias, BiasView};
use subquad::kernels::dropout::Dropout;
use subquad::kernels::exact::{self, Blocking, ExactArgs, ExactOut, decode, naive, prefill};
use subquad::kernels::mask::{Mask, RowRanges, Window, Windows};
use subquad::kernels::score_mod::{Normalizer, Reweighting, RowTable, Scale, ScoreMod};
use subquad::parallel::RowWriter;
use subquad::simd::{Level, SimdElement};
use subquad::tensor::{AttnShape, Tensor};

/// Which keys are seen: windows of the heads in turn around positions that start at `offset`, and intervals.
#[derive(Debug, Clone)]
pub struct Seen {
    pub offset: isize,
    pub windows: Vec<Window>,
    pub ranges: Option<RowRanges>,
}

impl Seen {
    pub fn window(offset: isize, left: isize, right: isize) -> Self {
        Self { offset, windows: vec![Window { left, right }], ranges: None }
    }
    pub fn all() -> Self {
        Self { offset: 0, windows: vec![Window::ALL], ranges: None }
    }
    pub fn causal_top_left() -> Self {
        Self { offset: 0, windows: vec![Window::CAUSAL], ranges: None }
    }
    pub fn causal_bottom_right(q: usize, k: usize) -> Self {
        Self { offset: k as isize - q as isize, windows: vec![Window::CAUSAL], ranges: None }
    }
}

/// What changes scores.
#[derive(Debug, Clone, Default)]
pub struct Mods {
    pub softcap: Option<f64>,
    /// By head.
    pub slopes: Option<Vec<f64>>,
    /// By head.
    pub sinks: Option<Vec<f64>>,
    /// By query.
    pub row_scale: Option<Vec<f64>>,
    pub by_length: Option<Vec<f64>>,
    /// Diagonals, the same for all heads.
    pub toeplitz: Option<Vec<f32>>,
    pub normalizer: Normalizer,
    /// A power.
    pub reweight: Option<f64>,
    pub dropout: Option<Dropout>,
}

pub struct Case<T: Element> {
    pub shape: AttnShape,
    pub q: Vec<T>,
    pub k: Vec<T>,
    pub v: Vec<T>,
    pub seen: Seen,
    pub mods: Mods,
    pub bias: Vec<f32>,
    pub visible: Vec<u8>,
    pub scale: f64,
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub enum BiasKind {
    None,
    Bool,
    Dense,
    PerKey,
}

fn table(data: Option<&Vec<f64>>, strides: [usize; 3]) -> Option<RowTable<'_>> {
    data.map(|data| RowTable { data, strides })
}

impl<T: SimdElement> Case<T> {
    pub fn new(shape: AttnShape, seen: Seen, width: f64) -> Self {
        let AttnShape { batch, seqlen_q, seqlen_k, num_heads, num_kv_heads, head_dim, head_dim_v } = shape;
        let mut stream = Stream(42);
        let scores = batch * num_heads * seqlen_q * seqlen_k;
        Self {
            shape,
            q: stream.fill(batch * seqlen_q * num_heads * head_dim, width),
            k: stream.fill(batch * seqlen_k * num_kv_heads * head_dim, width),
            v: stream.fill(batch * seqlen_k * num_kv_heads * head_dim_v, 1.0),
            seen,
            mods: Mods::default(),
            bias: (0..scores).map(|_| stream.next() as f32).collect(),
            visible: (0..scores).map(|_| u8::from(stream.next() > -0.5)).collect(),
            scale: 1.0 / (head_dim.max(1) as f64).sqrt(),
        }
    }

    /// Calls `with` with the arguments.
    pub fn with_args<R>(&self, kind: BiasKind, with: impl FnOnce(&ExactArgs<'_, T>) -> R) -> R {
        let s = self.shape;
        let [h, sq, sk] = [s.num_heads, s.seqlen_q, s.seqlen_k];
        let dense = [h * sq * sk, sq * sk, sk, 1].map(|stride| stride as isize);
        let windows: Vec<Window> = (0..h).map(|head| self.seen.windows[head % self.seen.windows.len()]).collect();
        let args = ExactArgs {
            shape: s,
            q: Tensor::contiguous("q", &self.q, [s.batch, sq, h, s.head_dim]).unwrap(),
            k: Tensor::contiguous("k", &self.k, [s.batch, sk, s.num_kv_heads, s.head_dim]).unwrap(),
            v: Tensor::contiguous("v", &self.v, [s.batch, sk, s.num_kv_heads, s.head_dim_v]).unwrap(),
            segments: Segments::Whole { offset: self.seen.offset },
            pages: None,
            mask: Mask {
                windows: if self.seen.windows.len() == 1 { Windows::One(windows[0]) } else { Windows::PerHead(&windows) },
                ranges: self.seen.ranges.as_ref(),
            },
            biases: [
                match kind {
                    BiasKind::None => Bias::None,
                    BiasKind::Bool => Bias::Bool(BiasView { data: &self.visible, origin: 0, strides: dense }),
                    BiasKind::Dense => Bias::Single(BiasView { data: &self.bias, origin: 0, strides: dense }),
                    BiasKind::PerKey => Bias::Bool(BiasView { data: &self.visible, origin: 0, strides: [sk as isize, 0, 0, 1] }),
                },
                match &self.mods.toeplitz {
                    None => Bias::None,
                    Some(data) => Bias::Single(BiasView { data, origin: sq - 1, strides: [0, 0, -1, 1] }),
                },
            ],
            mods: ScoreMod {
                scale: Scale {
                    factor: self.scale,
                    rows: table(self.mods.row_scale.as_ref(), [0, 0, 1]),
                    by_length: self.mods.by_length.as_deref(),
                },
                softcap: self.mods.softcap,
                alibi_slopes: table(self.mods.slopes.as_ref(), [0, 1, 0]),
                sinks: table(self.mods.sinks.as_ref(), [0, 1, 0]),
                normalizer: self.mods.normalizer,
                reweighting: self.mods.reweight.map(|power| Reweighting { power, gains: None }),
                dropout: self.mods.dropout,
            },
        };
        with(&args)
    }

    /// The result of a form.
    pub fn run(&self, kind: BiasKind, form: impl Fn(&ExactArgs<'_, T>, &ExactOut<'_, T>)) -> Results<T> {
        let s = self.shape;
        let [h, sq] = [s.num_heads, s.seqlen_q];
        let nan = T::Acc::from_f64(f64::NAN);
        let mut out = vec![T::from_acc(nan); s.batch * sq * h * s.head_dim_v];
        let mut lse = vec![nan; s.batch * h * sq];
        let writers = ExactOut {
            out: RowWriter::new(
                &mut out,
                [s.batch, sq, h, s.head_dim_v],
                [sq * h * s.head_dim_v, h * s.head_dim_v, s.head_dim_v],
            ),
            lse: Some(RowWriter::new(&mut lse, [s.batch, sq, h, 1], [h * sq, 1, sq])),
        };
        self.with_args(kind, |args| form(args, &writers));
        drop(writers);
        (out, lse)
    }

    pub fn check(&self, kind: BiasKind, blocking: Blocking, tolerance: f64) {
        let expected = self.run(kind, naive::forward);
        for level in Level::available() {
            let prefill = |threads| self.run(kind, |a, o| prefill::forward(a, o, level, threads, blocking));
            self.compare(&prefill(1), &expected, tolerance, &format!("prefill {} {kind:?} {blocking:?}", level.name()));
            assert_same(&prefill(1).0, &prefill(3).0);
            // Long prefills by the form for few queries would only cost time.
            let splits: &[_] = if self.shape.seqlen_q <= 20 { &[None, Some(1), Some(3)] } else { &[] };
            for &splits in splits {
                let decode = |threads| self.run(kind, |a, o| decode::forward(a, o, level, threads, splits));
                self.compare(&decode(1), &expected, tolerance, &format!("decode {} {kind:?} {splits:?}", level.name()));
                assert_same(&decode(1).0, &decode(3).0);
            }
        }
    }

    /// Checks the entry that chooses the form.
    pub fn check_forward(&self, kind: BiasKind, blocking: Blocking, tolerance: f64) {
        let expected = self.run(kind, naive::forward);
        for level in Level::available() {
            let forward = |threads| self.run(kind, |a, o| exact::forward(a, o, level, threads, blocking));
            self.compare(&forward(1), &expected, tolerance, &format!("forward {} {kind:?} {blocking:?}", level.name()));
            assert_same(&forward(1).0, &forward(3).0);
        }
    }

    /// The result of the prefill at the best level.
    pub fn run_prefill(&self) -> Results<T> {
        let level = Level::available().last().expect("there is always the scalar one");
        self.run(BiasKind::None, |a, o| prefill::forward(a, o, level, 2, Blocking::default()))
    }

    fn compare(&self, got: &Results<T>, want: &Results<T>, tolerance: f64, what: &str) {
        let f64s = |x: &[T::Acc]| x.iter().map(|x| x.to_f64()).collect::<Vec<_>>();
        for (part, got, want) in [("out", widen(&got.0), widen(&want.0)), ("lse", f64s(&got.1), f64s(&want.1))] {
            for (i, (x, y)) in got.iter().zip(&want).enumerate() {
                let close = (x - y).abs() <= tolerance * (1.0 + y.abs()) || x == y || (x.is_nan() && y.is_nan());
                assert!(close, "{part}[{i}] {x} != {y} by {what} {:?}", self.shape);
            }
        }
    }
}

pub type Results<T> = (Vec<T>, Vec<<T as Element>::Acc>);

pub fn assert_same<T: Element>(one: &[T], other: &[T]) {
    assert_eq!(bytemuck::cast_slice::<T, u8>(one), bytemuck::cast_slice::<T, u8>(other), "threads change bits");
}

pub fn shape(batch: usize, q: usize, k: usize, heads: (usize, usize), dims: (usize, usize)) -> AttnShape {
    AttnShape { batch, seqlen_q: q, seqlen_k: k, num_heads: heads.0, num_kv_heads: heads.1, head_dim: dims.0, head_dim_v: dims.1 }
}
