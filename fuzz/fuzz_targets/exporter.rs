//! Python objects that export an [`Array`], and keep count of what consumers have not given back.

use crate::arrays::{Array, CapsuleFault, Export};
use dlpark::ffi::{
    DLDeviceType, DLManagedTensor, DLManagedTensorVersioned, DLPackExchangeAPI, DLPackExchangeAPIHeader, DLPackVersion, DLTensor,
};
use pyo3::exceptions::PyBufferError;
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple};
use std::ffi::{CStr, c_int, c_void};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Managed tensors that were handed out and not deleted.
pub static ALIVE: AtomicUsize = AtomicUsize::new(0);

/// An exporter with both methods.
#[pyclass(frozen)]
pub struct Exporter(Arc<Array>);

/// An exporter of the protocol's first edition, whose method takes a stream and nothing else.
#[pyclass(frozen)]
pub struct PlainExporter(Arc<Array>);

/// An exporter from before `__dlpack_device__`.
#[pyclass(frozen)]
pub struct OldExporter(Arc<Array>);

/// An exporter with the function table of DLPack 1.3.
#[pyclass(frozen)]
pub struct Exchanger(Arc<Array>);

/// The Python object that stands for `array`; `None` when NumPy refuses to make it.
pub fn object<'py>(py: Python<'py>, array: &Arc<Array>) -> PyResult<Option<Bound<'py, PyAny>>> {
    let shared = Arc::clone(array);
    let object = match array.export {
        Export::NumPy => return Ok(numpy(py, array).ok()),
        Export::Exchange => Bound::new(py, Exchanger(shared))?.into_any(),
        Export::Legacy | Export::Versioned(_) if array.reported_device.is_none() => {
            Bound::new(py, OldExporter(shared))?.into_any()
        }
        Export::Legacy if array.plain_method => Bound::new(py, PlainExporter(shared))?.into_any(),
        Export::Legacy | Export::Versioned(_) => Bound::new(py, Exporter(shared))?.into_any(),
    };
    Ok(Some(object))
}

/// Whether `object` is what [`object`] made of `array`.
pub fn is_of(object: &Bound<'_, PyAny>, array: &Arc<Array>) -> bool {
    let same = |other: &Arc<Array>| Arc::ptr_eq(other, array);
    let address = || object.getattr("ctypes")?.getattr("data")?.extract::<usize>();
    object.cast::<Exporter>().is_ok_and(|object| same(&object.get().0))
        || object.cast::<OldExporter>().is_ok_and(|object| same(&object.get().0))
        || object.cast::<PlainExporter>().is_ok_and(|object| same(&object.get().0))
        || object.cast::<Exchanger>().is_ok_and(|object| same(&object.get().0))
        || array.export == Export::NumPy && address().is_ok_and(|address| address == array.memory().0 + array.memory().2)
}

fn numpy<'py>(py: Python<'py>, array: &Array) -> PyResult<Bound<'py, PyAny>> {
    const OTHERS: [&str; 9] = [">f4", "i4", "c8", "S0", "V3", "longdouble", "M8[s]", "U1", "f4,f4"];
    let numpy = py.import("numpy")?;
    let dtype = match array.element {
        Some(element) if element.name() == "bfloat16" => py.import("ml_dtypes")?.getattr("bfloat16")?,
        Some(element) => element.name().into_pyobject(py)?.into_any(),
        None => OTHERS[usize::from(array.tensor.dtype.code.0) % OTHERS.len()].into_pyobject(py)?.into_any(),
    };
    let dtype = numpy.getattr("dtype")?.call1((dtype,))?;
    let itemsize: i64 = dtype.getattr("itemsize")?.extract()?;
    let (address, len, first) = array.memory();
    let buffer = py.import("ctypes")?.getattr("c_char")?.mul(len)?.call_method1("from_address", (address,))?;
    let strides: Vec<i64> = array.strides().iter().map(|stride| stride.wrapping_mul(itemsize)).collect();
    let options = PyDict::new(py);
    options.set_item("dtype", dtype)?;
    options.set_item("buffer", buffer)?;
    options.set_item("offset", first)?;
    options.set_item("strides", PyTuple::new(py, strides)?)?;
    let result = numpy.getattr("ndarray")?.call((PyTuple::new(py, &array.shape)?,), Some(&options))?;
    if !array.flags.is_empty() {
        result.getattr("flags")?.setattr("writeable", false)?;
    }
    Ok(result)
}

#[pymethods]
impl Exporter {
    #[pyo3(signature = (**_options))]
    fn __dlpack__<'py>(&self, py: Python<'py>, _options: Option<&Bound<'py, PyDict>>) -> PyResult<Bound<'py, PyAny>> {
        capsule(py, &self.0)
    }

    fn __dlpack_device__(&self) -> (i64, i64) {
        self.0.reported_device.unwrap_or((1, 0))
    }
}

#[pymethods]
impl PlainExporter {
    #[pyo3(signature = (*, stream = None))]
    fn __dlpack__<'py>(&self, py: Python<'py>, stream: Option<&Bound<'py, PyAny>>) -> PyResult<Bound<'py, PyAny>> {
        assert!(stream.is_none(), "a stream on the CPU");
        capsule(py, &self.0)
    }

    fn __dlpack_device__(&self) -> (i64, i64) {
        self.0.reported_device.unwrap_or((1, 0))
    }
}

#[pymethods]
impl OldExporter {
    #[pyo3(signature = (**_options))]
    fn __dlpack__<'py>(&self, py: Python<'py>, _options: Option<&Bound<'py, PyDict>>) -> PyResult<Bound<'py, PyAny>> {
        capsule(py, &self.0)
    }
}

#[pymethods]
impl Exchanger {
    #[classattr]
    fn __dlpack_c_exchange_api__(py: Python<'_>) -> PyResult<Py<PyAny>> {
        static TABLE: Table = Table(DLPackExchangeAPI {
            header: DLPackExchangeAPIHeader { version: DLPackVersion { major: 1, minor: 3 }, prev_api: std::ptr::null_mut() },
            managed_tensor_allocator: None,
            managed_tensor_from_py_object_no_sync: Some(give),
            managed_tensor_to_py_object_no_sync: None,
            dltensor_from_py_object_no_sync: Some(lend),
            current_work_stream: Some(no_stream),
        });
        let table = (&raw const TABLE.0).cast_mut().cast();
        // SAFETY: the table and the name are static.
        unsafe {
            Bound::from_owned_ptr_or_err(py, ffi::PyCapsule_New(table, c"dlpack_exchange_api".as_ptr(), None)).map(Bound::unbind)
        }
    }

    #[pyo3(signature = (**_options))]
    fn __dlpack__<'py>(&self, py: Python<'py>, _options: Option<&Bound<'py, PyDict>>) -> PyResult<Bound<'py, PyAny>> {
        capsule(py, &self.0)
    }

    fn __dlpack_device__(&self) -> (i64, i64) {
        self.0.reported_device.unwrap_or((1, 0))
    }
}

struct Table(DLPackExchangeAPI);

// SAFETY: nobody writes to the table.
unsafe impl Sync for Table {}

/// The array behind an [`Exchanger`].
///
/// # Safety
/// `object` is one, and the interpreter is held.
unsafe fn behind(object: *mut c_void) -> Arc<Array> {
    // SAFETY: the caller's promise.
    let object = unsafe { Bound::from_borrowed_ptr(Python::assume_attached(), object.cast()) };
    Arc::clone(&object.cast::<Exchanger>().expect("the table is that of Exchanger").get().0)
}

unsafe extern "C" fn lend(object: *mut c_void, out: *mut DLTensor) -> c_int {
    // SAFETY: consumers pass an object of the table's type and a place for the descriptor.
    unsafe { out.write(behind(object).tensor) };
    0
}

unsafe extern "C" fn give(object: *mut c_void, out: *mut *mut DLManagedTensorVersioned) -> c_int {
    // SAFETY: as in `lend`.
    unsafe { out.write(versioned(&behind(object))) };
    0
}

unsafe extern "C" fn no_stream(_kind: DLDeviceType, _id: i32, out: *mut *mut c_void) -> c_int {
    // SAFETY: consumers pass a place for the stream.
    unsafe { out.write(std::ptr::null_mut()) };
    0
}

/// Both are told by their deleters, and deleted as the boxes that they are.
fn legacy(array: &Arc<Array>) -> *mut DLManagedTensor {
    unsafe extern "C" fn delete(managed: *mut DLManagedTensor) {
        // SAFETY: consumers delete once what `legacy` made.
        let managed = unsafe { Box::from_raw(managed) };
        release(managed.manager_ctx);
    }
    Box::into_raw(Box::new(DLManagedTensor { dl_tensor: array.tensor, manager_ctx: hold(array), deleter: Some(delete) }))
}

fn versioned(array: &Arc<Array>) -> *mut DLManagedTensorVersioned {
    unsafe extern "C" fn delete(managed: *mut DLManagedTensorVersioned) {
        // SAFETY: consumers delete once what `versioned` made.
        let managed = unsafe { Box::from_raw(managed) };
        release(managed.manager_ctx);
    }
    Box::into_raw(Box::new(DLManagedTensorVersioned {
        version: array.version,
        manager_ctx: hold(array),
        deleter: Some(delete),
        flags: array.flags,
        dl_tensor: array.tensor,
    }))
}

fn hold(array: &Arc<Array>) -> *mut c_void {
    ALIVE.fetch_add(1, Ordering::Relaxed);
    Arc::into_raw(Arc::clone(array)).cast_mut().cast()
}

fn release(context: *mut c_void) {
    ALIVE.fetch_sub(1, Ordering::Relaxed);
    // SAFETY: `hold` made it.
    drop(unsafe { Arc::from_raw(context.cast::<Array>()) });
}

const LEGACY: &CStr = c"dltensor";
const VERSIONED: &CStr = c"dltensor_versioned";
const ODD_LEGACY: &CStr = c"tensor";
const USED_LEGACY: &CStr = c"used_dltensor";
const USED_VERSIONED: &CStr = c"used_dltensor_versioned";

fn capsule<'py>(py: Python<'py>, array: &Arc<Array>) -> PyResult<Bound<'py, PyAny>> {
    let is_legacy = array.export == Export::Legacy;
    let (pointer, name): (*mut c_void, _) = match array.capsule {
        Some(CapsuleFault::Raises) => return Err(PyBufferError::new_err("not today")),
        Some(CapsuleFault::NotOne) => return Ok(py.None().into_bound(py)),
        Some(CapsuleFault::OtherName) => (legacy(array).cast(), ODD_LEGACY),
        // As a consumer leaves it, which has the tensor by then.
        Some(CapsuleFault::Consumed) => (std::ptr::dangling_mut(), if is_legacy { USED_LEGACY } else { USED_VERSIONED }),
        None if is_legacy => (legacy(array).cast(), LEGACY),
        None => (versioned(array).cast(), VERSIONED),
    };
    // SAFETY: the name is static, the pointer is not null, and `unused` knows by the name what it is.
    unsafe { Bound::from_owned_ptr_or_err(py, ffi::PyCapsule_New(pointer, name.as_ptr(), Some(unused))) }
}

/// Deletes what no consumer took.
unsafe extern "C" fn unused(capsule: *mut ffi::PyObject) {
    // SAFETY: Python passes the capsule that it is about to free, and a name says what its pointer is.
    unsafe {
        let name = CStr::from_ptr(ffi::PyCapsule_GetName(capsule));
        let pointer = ffi::PyCapsule_GetPointer(capsule, name.as_ptr());
        if name == LEGACY || name == ODD_LEGACY {
            let managed = pointer.cast::<DLManagedTensor>();
            (*managed).deleter.expect("legacy sets it")(managed);
        } else if name == VERSIONED {
            let managed = pointer.cast::<DLManagedTensorVersioned>();
            (*managed).deleter.expect("versioned sets it")(managed);
        }
    }
}
