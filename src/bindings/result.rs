//! Results: allocated by the library that the query belongs to, so that its allocator, its settings and its types apply.

use super::array::{Array, Kind, Layout};
use crate::dtype::DType;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple};

/// A new array of `shape` for results that go with `like`. NumPy stands in for libraries that only speak DLPack: see [`deliver`].
///
/// # Errors
/// What the library raises when it cannot allocate.
pub fn empty<'py>(arg: &'static str, like: &Array<'py>, shape: &[usize], dtype: DType) -> PyResult<Array<'py>> {
    let py = like.object.py();
    let shape = PyTuple::new(py, shape)?;
    let same = like.float().is_ok_and(|own| own == dtype);
    let object = match like.kind {
        Kind::Torch if same => like.object.call_method1(pyo3::intern!(py, "new_empty"), (shape,))?,
        Kind::Torch => {
            let options = PyDict::new(py);
            options.set_item("dtype", py.import("torch")?.getattr(dtype.name())?)?;
            like.object.call_method("new_empty", (shape,), Some(&options))?
        }
        Kind::NumPy if same => numpy_empty(py)?.call1((shape, like.object.getattr(pyo3::intern!(py, "dtype"))?))?,
        Kind::NumPy | Kind::DLPack => numpy_empty(py)?.call1((shape, numpy_dtype(py, dtype)?))?,
    };
    let array = Array::import(arg, &object, Layout::InPlace)?;
    array.memory.prefer_huge_pages(arg, array.itemsize())?;
    Ok(array)
}

fn numpy_empty(py: Python<'_>) -> PyResult<Bound<'_, PyAny>> {
    static EMPTY: pyo3::sync::PyOnceLock<Py<PyAny>> = pyo3::sync::PyOnceLock::new();
    let empty = EMPTY.get_or_try_init(py, || py.import("numpy")?.getattr("empty").map(Bound::unbind))?;
    Ok(empty.bind(py).clone())
}

fn numpy_dtype(py: Python<'_>, dtype: DType) -> PyResult<Bound<'_, PyAny>> {
    match dtype {
        DType::BF16 => py.import("ml_dtypes")?.getattr("bfloat16"),
        DType::F32 | DType::F64 | DType::F16 => py.import("numpy")?.getattr(dtype.name()),
    }
}

/// The result as the library of `like` knows it.
///
/// # Errors
/// What the library raises when it refuses the array.
pub fn deliver<'py>(like: &Array<'py>, result: Array<'py>) -> PyResult<Bound<'py, PyAny>> {
    if like.kind == Kind::DLPack && like.object.hasattr("__array_namespace__")? {
        return like.object.call_method0("__array_namespace__")?.call_method1("asarray", (result.object,));
    }
    Ok(result.object)
}
