//! What the machine can do at most: the measures that benchmarks compare with.

use super::array::{Array, Layout};
use super::dlpack::Memory;
use super::{enter, runtime};
use crate::error::Error;
use crate::parallel::for_each_tile;
use crate::simd::{Isa, Level, ProbeKind, Task, peak_flops_loop, sum_bytes};
use pyo3::prelude::*;
use std::time::{Duration, Instant};

fn named_level(name: Option<&str>) -> Result<Level, Error> {
    let Some(name) = name else { return runtime::level() };
    let expected = || format!("one of {}", Level::available().map(Level::name).collect::<Vec<_>>().join(", "));
    let known = Level::from_name(name).filter(|&level| level <= Level::detected());
    known.ok_or_else(|| Error::Value { arg: "level", expected: expected(), got: name.into() })
}

/// Runs the same measurement on every thread.
struct EachThread<F>(F);

impl<F: Fn()> Task for EachThread<F> {
    const MULTIPLIES_BF16: bool = false;

    #[inline(always)]
    fn run<I: Isa>(&self, _index: usize) {
        (self.0)();
    }
}

/// Repeats `round`, which returns the work it did, on `threads` threads for `seconds`; returns the best rate of all together.
fn best_rate(py: Python<'_>, threads: usize, seconds: f64, round: impl Fn() -> f64 + Sync) -> PyResult<f64> {
    let seconds = Duration::try_from_secs_f64(seconds)
        .ok()
        .filter(|s| *s <= Duration::from_secs(600))
        .ok_or_else(|| Error::Value { arg: "seconds", expected: "0 to 600".into(), got: seconds.to_string() })?;
    let mut best = 0f64;
    enter::enter(py, || {
        let end = Instant::now() + seconds;
        loop {
            let work = std::sync::Mutex::new(0f64);
            let start = Instant::now();
            let each = EachThread(|| {
                let done = round();
                *work.lock().unwrap_or_else(std::sync::PoisonError::into_inner) += done;
            });
            for_each_tile(Level::Scalar, threads, threads, &each);
            let elapsed = start.elapsed().as_secs_f64();
            best = best.max(work.into_inner().unwrap_or(0.0) / elapsed);
            if Instant::now() >= end {
                break;
            }
        }
    })?;
    Ok(best)
}

/// Floating-point operations per second of a loop that touches registers only.
#[pyfunction]
#[pyo3(signature = (kind, level=None, seconds=0.1, num_threads=None))]
pub fn probe_peak(py: Python<'_>, kind: &str, level: Option<&str>, seconds: f64, num_threads: Option<i64>) -> PyResult<f64> {
    const ROUNDS: usize = 1 << 17;
    let level = named_level(level)?;
    let kind = match kind {
        "f32" => ProbeKind::F32,
        "f64" => ProbeKind::F64,
        "bf16" if level >= Level::Avx512Bf16 => ProbeKind::Bf16,
        "bf16" => {
            let expected = "a level with bf16 dot products for kind bf16".into();
            return Err(Error::Value { arg: "level", expected, got: level.name().into() }.into());
        }
        other => {
            return Err(Error::Value { arg: "kind", expected: "f32, f64 or bf16".into(), got: other.into() }.into());
        }
    };
    best_rate(py, runtime::thread_count(num_threads, py)?, seconds, || peak_flops_loop(level, kind, ROUNDS))
}

/// Sums pieces of memory, one in each task.
struct SumPieces<'a> {
    level: Level,
    pieces: Vec<&'a [f32]>,
}

impl Task for SumPieces<'_> {
    const MULTIPLIES_BF16: bool = false;

    #[inline(always)]
    fn run<I: Isa>(&self, index: usize) {
        sum_bytes(self.level, self.pieces[index]);
    }
}

/// Bytes per second at which all threads together read the memory of `arrays` once.
#[pyfunction]
#[pyo3(signature = (arrays, num_threads=None))]
#[expect(clippy::needless_pass_by_value, reason = "what Python's arguments become")]
pub fn probe_read(py: Python<'_>, arrays: Vec<Bound<'_, PyAny>>, num_threads: Option<i64>) -> PyResult<f64> {
    /// Elements of a piece: enough that handing it out costs nothing, little enough that threads finish together.
    const PIECE: usize = 1 << 16;
    let (level, threads) = (runtime::level()?, runtime::thread_count(num_threads, py)?);
    let arrays = arrays.iter().map(|array| Array::import("arrays", array, Layout::Any)).collect::<PyResult<Vec<_>>>()?;
    let mut pieces = Vec::new();
    for array in &arrays {
        let itemsize = array.itemsize();
        let whole = array.memory.extent(array.arg)?.checked_mul(itemsize);
        let bytes = Memory { shape: vec![whole.unwrap_or(usize::MAX)], strides: vec![1], ..array.memory.clone() };
        let (_, floats, _) = bytemuck::pod_align_to::<u8, f32>(bytes.slice(array.arg)?);
        pieces.extend(floats.chunks(PIECE));
    }
    let bytes: usize = pieces.iter().map(|piece| size_of_val(*piece)).sum();
    let mut seconds = 0.0;
    enter::enter(py, || {
        let start = Instant::now();
        let count = pieces.len();
        for_each_tile(Level::Scalar, threads, count, &SumPieces { level, pieces });
        seconds = start.elapsed().as_secs_f64();
    })?;
    Ok(bytes as f64 / seconds)
}
