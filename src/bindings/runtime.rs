//! Threads, level and probes. The environment is read here and in `simd::level`.

use super::torch::loaded;
use crate::error::Error;
use crate::kernels::exact::Blocking;
use crate::parallel::{MAX_THREADS, available_threads, for_each_tile};
use crate::simd::{Isa, Level, ProbeKind, Task, peak_flops_loop, sum_bytes};
use pyo3::prelude::*;
use pyo3::types::PyDict;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// The number that `set_num_threads` was given, 0 before.
static CHOSEN: AtomicUsize = AtomicUsize::new(0);

fn number(arg: &'static str, expected: String, value: &str, limit: usize) -> Result<usize, Error> {
    match value.trim().parse() {
        Ok(n) if (1..=limit).contains(&n) => Ok(n),
        _ => Err(Error::Value { arg, expected, got: value.into() }),
    }
}

fn from_environment(arg: &'static str, limit: usize) -> Result<Option<usize>, Error> {
    let expected = || format!("an integer from 1 to {limit}");
    match std::env::var(arg) {
        Ok(value) if !value.is_empty() => number(arg, expected(), &value, limit).map(Some),
        Err(std::env::VarError::NotUnicode(value)) => {
            Err(Error::Value { arg, expected: expected(), got: value.to_string_lossy().into_owned() })
        }
        _ => Ok(None),
    }
}

/// Threads of the next call: those chosen, else `SUBQUAD_NUM_THREADS`, else PyTorch's when it is loaded, else the processors
/// that the process may use.
///
/// # Errors
/// [`Error::Value`] when the variable is no thread count.
pub fn threads(py: Python<'_>) -> PyResult<usize> {
    static VARIABLE: OnceLock<Result<Option<usize>, Error>> = OnceLock::new();
    let chosen = CHOSEN.load(Ordering::Relaxed);
    if chosen > 0 {
        return Ok(chosen);
    }
    if let Some(n) = VARIABLE.get_or_init(|| from_environment("SUBQUAD_NUM_THREADS", MAX_THREADS)).clone()? {
        return Ok(n);
    }
    if let Some(torch) = loaded(py, "torch")?
        && let Ok(count) = torch.call_method0(pyo3::intern!(py, "get_num_threads"))
    {
        return Ok(count.extract::<usize>()?.clamp(1, MAX_THREADS));
    }
    Ok(available_threads())
}

/// The level in use.
///
/// # Errors
/// [`Error::Value`] when `SUBQUAD_ISA` names none.
pub fn level() -> Result<Level, Error> {
    Level::current().map_err(|got| Error::Value {
        arg: "SUBQUAD_ISA",
        expected: format!("one of {}", Level::ALL.map(Level::name).join(", ")),
        got,
    })
}

/// Block sizes forced by `SUBQUAD_BLOCK_Q` and `SUBQUAD_BLOCK_K`, for tests.
///
/// # Errors
/// [`Error::Value`] when a variable is no block size.
pub fn blocking() -> Result<Blocking, Error> {
    static BLOCKING: OnceLock<Result<Blocking, Error>> = OnceLock::new();
    BLOCKING
        .get_or_init(|| {
            Ok(Blocking {
                block_q: from_environment("SUBQUAD_BLOCK_Q", 1 << 12)?,
                block_k: from_environment("SUBQUAD_BLOCK_K", 1 << 12)?,
            })
        })
        .clone()
}

/// Sets the number of threads of later calls.
#[pyfunction]
pub fn set_num_threads(num_threads: i64) -> PyResult<()> {
    let got = num_threads.to_string();
    let n = number("num_threads", format!("an integer from 1 to {MAX_THREADS}"), &got, MAX_THREADS)?;
    CHOSEN.store(n, Ordering::Relaxed);
    Ok(())
}

/// The number of threads of the next call.
#[pyfunction]
pub fn get_num_threads(py: Python<'_>) -> PyResult<usize> {
    threads(py)
}

/// Version, build and run-time settings.
#[pyfunction]
pub fn config(py: Python<'_>) -> PyResult<Bound<'_, PyDict>> {
    // A wrong variable is best noticed here, not in the first call.
    blocking()?;
    let config = PyDict::new(py);
    config.set_item("version", env!("CARGO_PKG_VERSION"))?;
    config.set_item("profile", if cfg!(debug_assertions) { "debug" } else { "release" })?;
    config.set_item("level", level()?.name())?;
    config.set_item("detected_level", Level::detected().name())?;
    config.set_item("levels", Level::available().map(Level::name).collect::<Vec<_>>())?;
    config.set_item("num_threads", threads(py)?)?;
    config.set_item("available_threads", available_threads())?;
    Ok(config)
}

fn named_level(name: Option<&str>) -> Result<Level, Error> {
    let Some(name) = name else { return level() };
    let expected = || format!("one of {}", Level::available().map(Level::name).collect::<Vec<_>>().join(", "));
    let known = Level::from_name(name).filter(|&level| level <= Level::detected());
    known.ok_or_else(|| Error::Value { arg: "level", expected: expected(), got: name.into() })
}

/// Runs the same measurement on every thread.
struct EachThread<F>(F);

impl<F: Fn()> Task for EachThread<F> {
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
    super::enter::enter(py, || {
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

fn thread_count(num_threads: Option<i64>, py: Python<'_>) -> PyResult<usize> {
    match num_threads {
        None => threads(py),
        Some(n) => Ok(number("num_threads", format!("an integer from 1 to {MAX_THREADS}"), &n.to_string(), MAX_THREADS)?),
    }
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
    best_rate(py, thread_count(num_threads, py)?, seconds, || peak_flops_loop(level, kind, ROUNDS))
}

/// Bytes per second at which all threads together read `bytes` bytes each their share of, again and again.
#[pyfunction]
#[pyo3(signature = (bytes, seconds=0.1, num_threads=None))]
pub fn probe_read_bandwidth(py: Python<'_>, bytes: usize, seconds: f64, num_threads: Option<i64>) -> PyResult<f64> {
    const LIMIT: usize = 1 << 34;
    if !(1 << 12..=LIMIT).contains(&bytes) {
        return Err(Error::Value { arg: "bytes", expected: format!("4096 to {LIMIT}"), got: bytes.to_string() }.into());
    }
    let (level, threads) = (level()?, thread_count(num_threads, py)?);
    let data = vec![1f32; bytes / size_of::<f32>()];
    let share = data.len() / threads;
    let turn = AtomicUsize::new(0);
    best_rate(py, threads, seconds, || {
        let at = turn.fetch_add(1, Ordering::Relaxed) % threads * share;
        sum_bytes(level, &data[at..at + share]);
        (share * size_of::<f32>()) as f64
    })
}
