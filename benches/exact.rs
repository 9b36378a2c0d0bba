//! Exact attention on the shapes of `shapes/exact.toml`, to compare two builds of the kernels:
//!
//! ```text
//! cargo bench --bench exact -- --save-baseline before causal-1024
//! cargo bench --bench exact -- --baseline before causal-1024
//! ```
//!
//! Names are `shape/dtype/threads`; a filter is a regular expression over them. Elements are useful floating-point operations,
//! so that criterion's Gelem/s are GFLOP/s. `SUBQUAD_ISA` lowers the level. With `--test` and under
//! `cargo test --bench exact`, each shape that has `smoke` is run once.

use criterion::{Criterion, Throughput};
use half::{bf16, f16};
use serde::Deserialize;
use std::time::Duration;
use subquad::dtype::{Element, Float};
use subquad::index::Segments;
use subquad::kernels::bias::Bias;
use subquad::kernels::exact::{Blocking, ExactArgs, ExactOut, naive, prefill};
use subquad::kernels::mask::Mask;
use subquad::kernels::score_mod::ScoreMod;
use subquad::parallel::{RowWriter, available_threads};
use subquad::simd::{Level, SimdElement};
use subquad::tensor::{AttnShape, Tensor};

#[derive(Deserialize)]
struct Shapes {
    exact: Vec<Shape>,
}

fn one() -> usize {
    1
}

/// One row of the list; what else is in it is for other benchmarks.
#[derive(Deserialize)]
struct Shape {
    name: String,
    #[serde(default = "one")]
    batch: usize,
    #[serde(default = "one")]
    heads: usize,
    kv_heads: Option<usize>,
    queries: usize,
    keys: Option<usize>,
    head_dim: usize,
    head_dim_v: Option<usize>,
    #[serde(default)]
    causal: bool,
    dtypes: Vec<String>,
    #[serde(default)]
    threads: Vec<usize>,
    #[serde(default)]
    smoke: bool,
}

impl Shape {
    fn sizes(&self) -> AttnShape {
        AttnShape {
            batch: self.batch,
            seqlen_q: self.queries,
            seqlen_k: self.keys.unwrap_or(self.queries),
            num_heads: self.heads,
            num_kv_heads: self.kv_heads.unwrap_or(self.heads),
            head_dim: self.head_dim,
            head_dim_v: self.head_dim_v.unwrap_or(self.head_dim),
        }
    }

    /// Keys that the query at a position from 0 on sees.
    fn mask(&self) -> Mask<'static> {
        if self.causal { Mask::CAUSAL } else { Mask::NONE }
    }

    /// Operations of both products over the pairs of a query and a key that it sees.
    fn useful_flops(&self) -> u64 {
        let s = self.sizes();
        let seen = |token: usize| if self.causal { (s.seqlen_k + token + 1).saturating_sub(s.seqlen_q) } else { s.seqlen_k };
        let visible: usize = (0..s.seqlen_q).map(seen).sum();
        (2 * s.batch * s.num_heads * visible * (s.head_dim + s.head_dim_v)) as u64
    }
}

/// Values in `[-1, 1)`, the same in every build.
fn values<T: Element>(len: usize, seed: u64) -> Vec<T> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 11) as f64 / (1u64 << 52) as f64 - 1.0
    };
    (0..len).map(|_| T::from_acc(T::Acc::from_f64(next()))).collect()
}

struct Case<T: Element> {
    shape: AttnShape,
    mask: Mask<'static>,
    q: Vec<T>,
    k: Vec<T>,
    v: Vec<T>,
    out: Vec<T>,
}

impl<T: SimdElement> Case<T> {
    /// Inputs whose result at `level` was found to be right: wrong results can be fast.
    fn checked(shape: &Shape, level: Level, threads: usize, tolerance: f64) -> Self {
        let (s, mask) = (shape.sizes(), shape.mask());
        let mut case = Self {
            shape: s,
            mask,
            q: values(s.batch * s.seqlen_q * s.num_heads * s.head_dim, 1),
            k: values(s.batch * s.seqlen_k * s.num_kv_heads * s.head_dim, 2),
            v: values(s.batch * s.seqlen_k * s.num_kv_heads * s.head_dim_v, 3),
            out: vec![T::from_acc(T::Acc::from_f64(f64::NAN)); s.batch * s.seqlen_q * s.num_heads * s.head_dim_v],
        };
        case.forward(level, threads);
        case.check(tolerance);
        case
    }

    fn forward(&mut self, level: Level, threads: usize) {
        let s = self.shape;
        let args = args(s, (&self.q, s.seqlen_q), (&self.k, &self.v), self.mask);
        let out = ExactOut { out: rows(&mut self.out, s), lse: None };
        prefill::forward(&args, &out, level, threads, Blocking::default());
    }

    /// The last query sees all keys, masked or not, so that the naive form of it alone is a check of the whole length.
    fn check(&self, tolerance: f64) {
        let (all, last) = (self.shape, AttnShape { seqlen_q: 1, ..self.shape });
        let (q_row, out_row) = (all.num_heads * all.head_dim, all.num_heads * all.head_dim_v);
        let q = &self.q[(all.seqlen_q - 1) * q_row..];
        let mut want = vec![T::zeroed(); all.batch * out_row];
        let args = args(last, (q, all.seqlen_q), (&self.k, &self.v), Mask::NONE);
        naive::forward(&args, &ExactOut { out: rows(&mut want, last), lse: None });
        assert!(self.out.iter().all(|x| x.to_acc().to_f64().is_finite()), "elements are missing or not finite");
        for (batch, want) in want.chunks_exact(out_row).enumerate() {
            let got = &self.out[((batch + 1) * all.seqlen_q - 1) * out_row..][..out_row];
            for (got, want) in got.iter().zip(want) {
                let [got, want] = [got, want].map(|x| x.to_acc().to_f64());
                assert!((got - want).abs() <= tolerance, "{got} != {want}");
            }
        }
    }
}

/// `stored` is the number of queries between two batches in memory.
fn args<'a, T: Element>(
    s: AttnShape,
    (q, stored): (&'a [T], usize),
    (k, v): (&'a [T], &'a [T]),
    mask: Mask<'static>,
) -> ExactArgs<'a, T> {
    let row = s.num_heads * s.head_dim;
    let strides = [stored * row, row, s.head_dim];
    ExactArgs {
        shape: s,
        q: Tensor::new("q", q, [s.batch, s.seqlen_q, s.num_heads, s.head_dim], strides).expect("lengths follow from the shape"),
        k: Tensor::contiguous("k", k, [s.batch, s.seqlen_k, s.num_kv_heads, s.head_dim]).expect("likewise"),
        v: Tensor::contiguous("v", v, [s.batch, s.seqlen_k, s.num_kv_heads, s.head_dim_v]).expect("likewise"),
        segments: Segments::Whole { offset: s.seqlen_k as isize - s.seqlen_q as isize },
        pages: None,
        mask,
        biases: [Bias::None; 2],
        mods: ScoreMod::plain(1.0 / (s.head_dim as f64).sqrt()),
    }
}

fn rows<T>(data: &mut [T], s: AttnShape) -> RowWriter<'_, T> {
    let row = s.num_heads * s.head_dim_v;
    RowWriter::new(data, [s.batch, s.seqlen_q, s.num_heads, s.head_dim_v], [s.seqlen_q * row, row, s.head_dim_v])
}

fn bench<T: SimdElement>(criterion: &mut Criterion, shape: &Shape, level: Level, threads: usize, tolerance: f64) {
    // Built when the filter lets it through, not before: the list holds more inputs than memory may.
    let mut case = None;
    let mut group = criterion.benchmark_group(&shape.name);
    group.throughput(Throughput::Elements(shape.useful_flops()));
    group.bench_function(format!("{}/{threads}", T::DTYPE), |bencher| {
        let case = case.get_or_insert_with(|| Case::<T>::checked(shape, level, threads, tolerance));
        bencher.iter(|| case.forward(level, threads));
    });
    group.finish();
}

fn main() {
    let list = include_str!("shapes/exact.toml");
    let shapes: Shapes = toml::from_str(list).unwrap_or_else(|error| panic!("benches/shapes/exact.toml: {error}"));
    let level = Level::current().unwrap_or_else(|name| panic!("SUBQUAD_ISA: no level is called {name}"));
    // As criterion decides: `cargo bench` passes `--bench`, `cargo test` does not.
    let quick = std::env::args().any(|arg| arg == "--test") || !std::env::args().any(|arg| arg == "--bench");
    // A call of seconds is long enough to be its own average.
    let mut criterion = Criterion::default().sample_size(10).warm_up_time(Duration::from_millis(500)).configure_from_args();
    for shape in shapes.exact.iter().filter(|shape| shape.smoke || !quick) {
        let threads = if shape.threads.is_empty() { &[available_threads()] } else { shape.threads.as_slice() };
        for (dtype, &threads) in shape.dtypes.iter().flat_map(|dtype| threads.iter().map(move |threads| (dtype, threads))) {
            match dtype.as_str() {
                "float32" => bench::<f32>(&mut criterion, shape, level, threads, 1e-5),
                "float64" => bench::<f64>(&mut criterion, shape, level, threads, 1e-13),
                "float16" => bench::<f16>(&mut criterion, shape, level, threads, 1e-3),
                "bfloat16" => bench::<bf16>(&mut criterion, shape, level, threads, 1e-2),
                other => panic!("benches/shapes/exact.toml: {} has the unknown dtype {other}", shape.name),
            }
        }
    }
    criterion.final_summary();
}
