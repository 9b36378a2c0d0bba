//! The door between Python and the kernels: the GIL is released, no panic gets through.

use pyo3::PyResult;
use pyo3::Python;
use pyo3::exceptions::PyRuntimeError;
use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// A reference that crosses the door with the GIL released.
///
/// The arrays behind it stay alive because the Python caller holds them for the whole call.
pub fn enter(py: Python<'_>, work: impl FnOnce() + Send) -> PyResult<()> {
    py.detach(|| catch_unwind(AssertUnwindSafe(work)))
        .map_err(|panic| PyRuntimeError::new_err(format!("internal error in subquad, please report it: {}", text(&*panic))))
}

fn text(panic: &(dyn Any + Send)) -> &str {
    panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("unknown")
}
