//! The door between Python and the kernels: the GIL is released, no panic gets through.

use numpy::PyUntypedArray;
use pyo3::PyResult;
use pyo3::Python;
use pyo3::exceptions::PyRuntimeError;
use pyo3::sync::PyOnceLock;
use pyo3::type_object::PyTypeInfo;
use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// A reference that crosses the door with the GIL released.
///
/// The arrays behind it stay alive because the Python caller holds them for the whole call.
pub fn enter(py: Python<'_>, work: impl FnOnce() + Send) -> PyResult<()> {
    py.detach(|| catch_unwind(AssertUnwindSafe(work)))
        .map_err(|panic| PyRuntimeError::new_err(format!("internal error in subquad, please report it: {}", text(&*panic))))
}

/// Finds NumPy's array interface, once. That runs Python code, and an error there, such as an interrupt, is a panic in the `numpy` crate.
///
/// # Errors
/// What importing NumPy raises.
pub fn find_numpy(py: Python<'_>) -> PyResult<()> {
    static FOUND: PyOnceLock<()> = PyOnceLock::new();
    let found = FOUND.get_or_try_init(py, || {
        // What the crate imports, here with its own errors.
        py.import("numpy.lib")?;
        catch_unwind(AssertUnwindSafe(|| drop(PyUntypedArray::type_object(py))))
            .map_err(|panic| PyRuntimeError::new_err(format!("NumPy was not found: {}", text(&*panic))))
    });
    found.copied()
}

fn text(panic: &(dyn Any + Send)) -> &str {
    panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("unknown")
}
