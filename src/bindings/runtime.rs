//! Threads and level. The environment is read here and in `simd::level`.

use super::torch::loaded;
use crate::error::Error;
use crate::kernels::exact::Blocking;
use crate::parallel::{MAX_THREADS, available_threads, openmp};
use crate::simd::Level;
use pyo3::prelude::*;
use pyo3::types::PyDict;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};

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
    // Asked in any case: PyTorch sets up a thread's number of threads when it is first asked for it.
    let torch = loaded(py, "torch")?.and_then(|torch| torch.call_method0(pyo3::intern!(py, "get_num_threads")).ok());
    if torch.is_some() {
        openmp::adopt("libtorch_cpu.so");
    }
    let chosen = CHOSEN.load(Ordering::Relaxed);
    if chosen > 0 {
        return Ok(chosen);
    }
    if let Some(n) = VARIABLE.get_or_init(|| from_environment("SUBQUAD_NUM_THREADS", MAX_THREADS)).clone()? {
        return Ok(n);
    }
    if let Some(count) = torch {
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

/// The threads that a caller asked for, else those of the next call.
///
/// # Errors
/// [`Error::Value`] when the number is out of range.
pub fn thread_count(num_threads: Option<i64>, py: Python<'_>) -> PyResult<usize> {
    match num_threads {
        None => threads(py),
        Some(n) => Ok(number("num_threads", format!("an integer from 1 to {MAX_THREADS}"), &n.to_string(), MAX_THREADS)?),
    }
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
