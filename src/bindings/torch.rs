//! What sets a PyTorch tensor apart from plain memory. PyTorch is never imported for the question.

use crate::error::Error;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::PyType;

/// Whether `object` is a `torch.Tensor`.
pub fn is_tensor(object: &Bound<'_, PyAny>) -> PyResult<bool> {
    static TENSOR: PyOnceLock<Py<PyType>> = PyOnceLock::new();
    let py = object.py();
    if TENSOR.get(py).is_none() {
        let Some(torch) = loaded(py, "torch")? else { return Ok(false) };
        // A half-imported torch has no Tensor yet.
        let Ok(tensor) = torch.getattr("Tensor") else { return Ok(false) };
        TENSOR.set(py, tensor.cast_into::<PyType>()?.unbind()).ok();
    }
    TENSOR.get(py).map_or(Ok(false), |tensor| object.is_instance(tensor.bind(py)))
}

/// The module of that name, if something has imported it.
pub fn loaded<'py>(py: Python<'py>, name: &str) -> PyResult<Option<Bound<'py, PyAny>>> {
    static MODULES: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    let modules = MODULES.get_or_try_init(py, || py.import("sys")?.getattr("modules").map(Bound::unbind))?;
    modules.bind(py).call_method1(pyo3::intern!(py, "get"), (name,)).map(|module| (!module.is_none()).then_some(module))
}

/// A function or module of PyTorch, looked up once.
fn known<'py>(py: Python<'py>, slot: &'static PyOnceLock<Py<PyAny>>, path: &[&str]) -> PyResult<Bound<'py, PyAny>> {
    let object = slot.get_or_try_init(py, || {
        let mut object = py.import("torch")?.into_any();
        for name in path {
            object = object.getattr(*name)?;
        }
        Ok::<_, PyErr>(object.unbind())
    })?;
    Ok(object.bind(py).clone())
}

/// Refuses tensors whose data is elsewhere, or whose result would silently lose its derivative.
pub fn check(arg: &'static str, tensor: &Bound<'_, PyAny>) -> PyResult<()> {
    static GRAD_ENABLED: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    static FORWARD_AD: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    let py = tensor.py();
    if !tensor.getattr(pyo3::intern!(py, "is_cpu"))?.is_truthy()? {
        return Err(Error::Device { arg, got: tensor.getattr("device")?.str()?.to_string() }.into());
    }
    let unsupported = |what: &str, instead: &str| Error::Unsupported { what: format!("{arg}: {what}"), instead: instead.into() };
    if tensor.getattr(pyo3::intern!(py, "requires_grad"))?.is_truthy()?
        && known(py, &GRAD_ENABLED, &["is_grad_enabled"])?.call0()?.is_truthy()?
    {
        let instead = "this function is forward only: call it under torch.no_grad(), or on tensor.detach()";
        return Err(unsupported("a tensor that requires grad", instead).into());
    }
    // Within `dual_level`, a tensor that carries a tangent looks like any other.
    let forward_ad = known(py, &FORWARD_AD, &["autograd", "forward_ad"])?;
    if forward_ad.getattr(pyo3::intern!(py, "_current_level")).is_ok_and(|level| level.extract::<i64>().is_ok_and(|n| n >= 0)) {
        let dual = forward_ad.call_method1("unpack_dual", (tensor,))?;
        if !dual.getattr("tangent")?.is_none() {
            return Err(unsupported("a dual tensor", "this function has no forward-mode derivative").into());
        }
    }
    Ok(())
}

/// Whether the memory holds the negatives of the elements.
pub fn is_negated(tensor: &Bound<'_, PyAny>) -> PyResult<bool> {
    tensor.call_method0(pyo3::intern!(tensor.py(), "is_neg"))?.is_truthy()
}

/// Tells autograd that a tensor was written, so that a backward pass that needs its old content fails rather than uses the new.
pub fn written(tensor: &Bound<'_, PyAny>) -> PyResult<()> {
    static INCREMENT: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    let py = tensor.py();
    known(py, &INCREMENT, &["autograd", "graph", "increment_version"])?.call1((tensor,)).map(|_| ())
}
