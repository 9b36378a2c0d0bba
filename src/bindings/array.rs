//! Arguments: PyTorch tensors, NumPy arrays and whatever speaks DLPack, seen as one type without copying.

use super::dlpack::Memory;
use super::{enter, torch};
use crate::dtype::DType;
use crate::error::Error;
use crate::tensor::{extent, shape_text};
use dlpark::ffi::{DLDataType, DLDataTypeCode, DLDeviceType, DLTensor};
use dlpark::python::consumer::exchange::ExchangeApi;
use dlpark::python::{ImportedDlpack, from_dlpack};
use dlpark::{DlpackFlags, TensorRef};
use numpy::{PyArrayDescrMethods, PyUntypedArray, PyUntypedArrayMethods};
use pyo3::exceptions::{PyException, PyTypeError};
use pyo3::prelude::*;

/// The library that an array belongs to; results are of the same one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// `torch.Tensor`.
    Torch,
    /// `numpy.ndarray`.
    NumPy,
    /// Anything else with `__dlpack__`.
    DLPack,
}

impl Kind {
    /// The kind in words.
    pub fn name(self) -> &'static str {
        match self {
            Self::Torch => "a PyTorch tensor",
            Self::NumPy => "a NumPy array",
            Self::DLPack => "a DLPack array",
        }
    }
}

/// What an array's elements are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ElementType {
    /// One that attention is computed on.
    Float(DType),
    /// One byte, 0 for false.
    Bool,
    /// Any other, by name.
    Other(String),
}

impl std::fmt::Display for ElementType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Float(dtype) => dtype.fmt(f),
            Self::Bool => f.write_str("bool"),
            Self::Other(name) => f.write_str(name),
        }
    }
}

/// An argument.
pub struct Array<'py> {
    /// Name of the argument.
    pub arg: &'static str,
    /// Its library.
    pub kind: Kind,
    /// Its dtype.
    pub element: ElementType,
    /// Its elements.
    pub memory: Memory,
    /// Whether writing is forbidden.
    pub read_only: bool,
    /// The object whose memory this is: the argument, or the copy that was made of it.
    pub object: Bound<'py, PyAny>,
    _export: Option<ImportedDlpack>,
}

/// Whether an object is an array with axes: one of a single element may convert to a number as well.
pub fn has_axes(object: &Bound<'_, PyAny>) -> bool {
    object.getattr("ndim").is_ok_and(|n| n.extract::<usize>().is_ok_and(|n| n > 0))
}

/// What an import may do about strides that kernels do not take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// The last axis must be contiguous: copy otherwise.
    Rows,
    /// Any stride that is not negative.
    Any,
    /// All axes must be contiguous: copy otherwise.
    Contiguous,
    /// The last axis must be contiguous, and copying is of no use.
    InPlace,
}

/// Refuses NumPy's masked arrays: their masks would be ignored without a word.
fn refuse_masked(arg: &'static str, array: &Bound<'_, PyAny>) -> PyResult<()> {
    let is_subclass = !array.get_type().is(array.py().get_type::<PyUntypedArray>());
    if is_subclass && array.hasattr(pyo3::intern!(array.py(), "filled"))? {
        let expected = "a plain array (`filled` gives one; keys are hidden by a bias)".into();
        return Err(Error::Kind { arg, expected, got: "a masked array".into() }.into());
    }
    Ok(())
}

impl<'py> Array<'py> {
    /// Views `object`, or a copy of it where its strides ask for one.
    ///
    /// # Errors
    /// `TypeError` for what is no array, `ValueError` for another device, `NotImplementedError` for tensors that need gradients.
    pub fn import(arg: &'static str, object: &Bound<'py, PyAny>, layout: Layout) -> PyResult<Self> {
        let array = Self::view(arg, object)?;
        match array {
            Ok(array) if array.fits(layout) => Ok(array),
            Ok(array) if layout == Layout::InPlace => Err(Error::Shape {
                arg,
                expected: "with a contiguous last axis".into(),
                got: format!("{} with strides {:?}", crate::tensor::shape_text(&array.memory.shape), array.memory.strides),
            }
            .into()),
            Err(_) if layout == Layout::InPlace => {
                let got = "one that runs backwards, is misaligned or negated".into();
                Err(Error::NotWritable { arg, got }.into())
            }
            Ok(array) => Self::copy(arg, array.kind, object),
            Err(kind) => Self::copy(arg, kind, object),
        }
    }

    fn fits(&self, layout: Layout) -> bool {
        if layout == Layout::Contiguous {
            return self.is_contiguous();
        }
        let shape = &self.memory.shape;
        let any = layout == Layout::Any || shape.contains(&0) || shape.last().is_none_or(|&n| n <= 1);
        any || self.memory.strides.last() == Some(&1)
    }

    fn copy(arg: &'static str, kind: Kind, object: &Bound<'py, PyAny>) -> PyResult<Self> {
        let py = object.py();
        let copy = match kind {
            Kind::Torch => Ok(object.call_method0("resolve_neg")?.call_method0("contiguous")?),
            Kind::NumPy => Ok(object.call_method1("copy", ("C",))?),
            Kind::DLPack => {
                py.import("numpy")?.call_method1("from_dlpack", (object,)).and_then(|view| view.call_method1("copy", ("C",)))
            }
        };
        let expected = || "an array that can be copied to contiguous memory".to_owned();
        let copy = copy.map_err(|error| refusal(arg, expected(), object, error))?;
        let mut array = Self::view(arg, &copy)?.map_err(|_| Error::Kind { arg, expected: expected(), got: type_name(object) })?;
        array.kind = kind;
        Ok(array)
    }

    /// The view, or the kind of an array that has to be copied because its strides are negative or its elements misaligned.
    fn view(arg: &'static str, object: &Bound<'py, PyAny>) -> PyResult<Result<Self, Kind>> {
        enter::find_numpy(object.py())?;
        if let Ok(array) = object.cast::<PyUntypedArray>() {
            refuse_masked(arg, object)?;
            return Ok(numpy_array(arg, object, array).ok_or(Kind::NumPy));
        }
        if !torch::is_tensor(object)? {
            return dlpack_array(arg, object, Kind::DLPack);
        }
        torch::check(arg, object)?;
        if torch::is_negated(object)? {
            return Ok(Err(Kind::Torch));
        }
        dlpack_array(arg, object, Kind::Torch)
    }

    /// The dtype, when it is one that attention is computed on.
    ///
    /// # Errors
    /// [`Error::DType`] otherwise.
    pub fn float(&self) -> Result<DType, Error> {
        match &self.element {
            ElementType::Float(dtype) => Ok(*dtype),
            other => Err(Error::DType {
                arg: self.arg,
                expected: "float32, float64, float16 or bfloat16".into(),
                got: other.to_string(),
            }),
        }
    }

    /// Checks that `other` is of the same library and dtype.
    ///
    /// # Errors
    /// [`Error::Kind`] or [`Error::DType`] otherwise.
    pub fn check_same(&self, other: &Array<'_>) -> Result<(), Error> {
        self.check_kind(other)?;
        if other.element != self.element {
            let expected = format!("{} as {} has", self.element, self.arg);
            return Err(Error::DType { arg: other.arg, expected, got: other.element.to_string() });
        }
        Ok(())
    }

    /// Checks that `other` is of the same library.
    ///
    /// # Errors
    /// [`Error::Kind`] otherwise.
    pub fn check_kind(&self, other: &Array<'_>) -> Result<(), Error> {
        if other.kind == self.kind {
            return Ok(());
        }
        let expected = format!("{} as {} is", self.kind.name(), self.arg);
        Err(Error::Kind { arg: other.arg, expected, got: other.kind.name().into() })
    }

    /// The object, after its memory was written.
    ///
    /// # Errors
    /// What its library raises.
    pub fn written(self) -> PyResult<Bound<'py, PyAny>> {
        if self.kind == Kind::Torch {
            torch::written(&self.object)?;
        }
        Ok(self.object)
    }

    /// Bytes of an element.
    pub fn itemsize(&self) -> usize {
        match self.element {
            ElementType::Float(DType::F64) => 8,
            ElementType::Float(DType::F32) => 4,
            ElementType::Float(DType::F16 | DType::BF16) => 2,
            ElementType::Bool | ElementType::Other(_) => 1,
        }
    }

    /// Whether elements follow each other in order.
    pub fn is_contiguous(&self) -> bool {
        let mut next = 1usize;
        self.memory.shape.iter().zip(&self.memory.strides).rev().all(|(&n, &stride)| {
            let fits = n <= 1 || stride == next;
            next = next.saturating_mul(n);
            fits
        })
    }

    /// Extents.
    pub fn shape(&self) -> &[usize] {
        &self.memory.shape
    }
}

/// What a library's own error about an argument becomes; interrupts stay what they are.
fn refusal(arg: &'static str, expected: String, object: &Bound<'_, PyAny>, error: PyErr) -> PyErr {
    let py = object.py();
    if !error.is_instance_of::<PyException>(py) {
        return error;
    }
    let text = error.value(py).to_string();
    let got = format!("{} ({})", type_name(object), text.lines().next().unwrap_or_default());
    Error::Kind { arg, expected, got }.into()
}

fn type_name(object: &Bound<'_, PyAny>) -> String {
    object.get_type().fully_qualified_name().map_or_else(|_| "an object".into(), |name| name.to_string())
}

fn numpy_array<'py>(arg: &'static str, object: &Bound<'py, PyAny>, array: &Bound<'py, PyUntypedArray>) -> Option<Array<'py>> {
    let dtype = array.dtype();
    let element = match (dtype.kind(), dtype.itemsize()) {
        _ if !dtype.is_native_byteorder().unwrap_or(true) => ElementType::Other(dtype.to_string()),
        (b'f', 2) => ElementType::Float(DType::F16),
        (b'f', 4) => ElementType::Float(DType::F32),
        (b'f', 8) => ElementType::Float(DType::F64),
        (b'b', 1) => ElementType::Bool,
        (_, 2) if dtype.typeobj().name().is_ok_and(|name| name == "bfloat16") => ElementType::Float(DType::BF16),
        _ => ElementType::Other(dtype.to_string()),
    };
    let itemsize = dtype.itemsize();
    let shape = array.shape().to_vec();
    let empty = shape.contains(&0);
    let mut strides = Vec::with_capacity(shape.len());
    for (&stride, &n) in array.strides().iter().zip(&shape) {
        let stride = if n <= 1 || empty { 0 } else { stride };
        let stride = usize::try_from(stride).ok()?;
        if stride % itemsize.max(1) != 0 {
            return None;
        }
        strides.push(stride / itemsize.max(1));
    }
    let flags = array.flags();
    if !flags.aligned && !empty {
        return None;
    }
    Some(Array {
        arg,
        kind: Kind::NumPy,
        element,
        memory: Memory { pointer: array.data_pointer(), shape, strides },
        read_only: !flags.writeable,
        object: object.clone(),
        _export: None,
    })
}

/// The parts of an array object that the `numpy` crate reads by pointer or by attribute.
trait Raw {
    fn data_pointer(&self) -> *mut std::ffi::c_void;
    fn flags(&self) -> Flags;
}

struct Flags {
    aligned: bool,
    writeable: bool,
}

impl Raw for Bound<'_, PyUntypedArray> {
    fn data_pointer(&self) -> *mut std::ffi::c_void {
        super::dlpack::numpy_data(self)
    }
    fn flags(&self) -> Flags {
        let bits = super::dlpack::numpy_flags(self);
        Flags { aligned: bits & numpy::npyffi::NPY_ARRAY_ALIGNED != 0, writeable: bits & numpy::npyffi::NPY_ARRAY_WRITEABLE != 0 }
    }
}

fn dlpack_array<'py>(arg: &'static str, object: &Bound<'py, PyAny>, kind: Kind) -> PyResult<Result<Array<'py>, Kind>> {
    let refused = |error: PyErr| refusal(arg, "a dense CPU array".into(), object, error);
    if let Some(api) = ExchangeApi::from_object(object.as_borrowed())? {
        // Borrowed, not owned: the caller holds the tensor for the whole call.
        let parts =
            api.with_tensor_view_no_sync(object.as_borrowed(), |tensor, _stream| Parts::of(arg, tensor)).map_err(refused)??;
        return Ok(parts.array(arg, object, kind, false, None));
    }
    if !object.hasattr("__dlpack__")? {
        let expected = "a PyTorch tensor, a NumPy array or another object with __dlpack__".into();
        return Err(Error::Kind { arg, expected, got: type_name(object) }.into());
    }
    if let Ok(device) = object.call_method0("__dlpack_device__") {
        let (device_type, _): (i64, i64) = device.extract()?;
        if device_type != i64::from(DLDeviceType::CPU.0) {
            return Err(Error::Device { arg, got: format!("DLPack device type {device_type}") }.into());
        }
    }
    let source = if kind == Kind::Torch { object.call_method0("detach")? } else { object.clone() };
    let export = match from_dlpack(source.as_borrowed(), None, None) {
        Err(error) if kind == Kind::DLPack && error.is_instance_of::<PyTypeError>(object.py()) => {
            // The exporter knows the protocol's first form, which has no versions.
            let capsule = object.call_method0("__dlpack__").map_err(refused)?;
            from_dlpack(capsule.as_borrowed(), None, None).map_err(refused)?
        }
        export => export.map_err(refused)?,
    };
    let parts = {
        let tensor = export.validate().map_err(|error| Error::Kind {
            arg,
            expected: "a valid DLPack tensor".into(),
            got: error.to_string(),
        })?;
        Parts::of_reference(arg, &tensor)?
    };
    let read_only = export.flags().contains(DlpackFlags::READ_ONLY);
    Ok(parts.array(arg, object, kind, read_only, Some(export)))
}

/// What a DLPack descriptor says.
struct Parts {
    element: ElementType,
    memory: Option<Memory>,
}

impl Parts {
    fn of(arg: &'static str, tensor: &DLTensor) -> Result<Self, Error> {
        let (shape, strides) = super::dlpack::extents(arg, tensor)?;
        if tensor.device.device_type != DLDeviceType::CPU {
            return Err(Error::Device { arg, got: format!("DLPack device type {}", tensor.device.device_type.0) });
        }
        Self::new(arg, tensor.dtype, (tensor.data, tensor.byte_offset), &shape, strides.as_deref())
    }

    fn of_reference(arg: &'static str, tensor: &TensorRef<'_>) -> Result<Self, Error> {
        if tensor.device().device_type != DLDeviceType::CPU {
            return Err(Error::Device { arg, got: format!("DLPack device type {}", tensor.device().device_type.0) });
        }
        Self::new(arg, tensor.dtype(), (tensor.data_ptr().cast_mut(), tensor.byte_offset()), tensor.shape(), tensor.strides())
    }

    fn new(
        arg: &'static str,
        dtype: DLDataType,
        (data, byte_offset): (*mut std::ffi::c_void, u64),
        shape: &[i64],
        strides: Option<&[i64]>,
    ) -> Result<Self, Error> {
        let element = match (dtype.code, dtype.bits, dtype.lanes) {
            (DLDataTypeCode::FLOAT, 16, 1) => ElementType::Float(DType::F16),
            (DLDataTypeCode::FLOAT, 32, 1) => ElementType::Float(DType::F32),
            (DLDataTypeCode::FLOAT, 64, 1) => ElementType::Float(DType::F64),
            (DLDataTypeCode::BFLOAT, 16, 1) => ElementType::Float(DType::BF16),
            (DLDataTypeCode::BOOL, 8, 1) => ElementType::Bool,
            (code, bits, lanes) => ElementType::Other(dlpack_dtype_name(code, bits, lanes)),
        };
        let itemsize = (usize::from(dtype.bits) * usize::from(dtype.lanes)).div_ceil(8).max(1);
        let extents = shape.iter().map(|&n| usize::try_from(n)).collect::<Result<Vec<_>, _>>();
        let shape = extents.map_err(|_| Error::Shape {
            arg,
            expected: "with extents that are not negative".into(),
            got: format!("{shape:?}"),
        })?;
        let empty = shape.contains(&0);
        let mut contiguous = vec![1usize; shape.len()];
        for axis in (1..shape.len()).rev() {
            contiguous[axis - 1] = contiguous[axis].saturating_mul(shape[axis]);
        }
        let pointer = data.cast::<u8>().wrapping_add(byte_offset as usize).cast();
        if !empty {
            // Here and not where elements are used: NumPy, which makes copies, believes what it is told.
            if data.is_null() {
                return Err(Error::Kind { arg, expected: "an array with data".into(), got: "a null pointer".into() });
            }
            let steps: Vec<usize> = match strides {
                None => contiguous.clone(),
                Some(strides) => strides.iter().map(|stride| stride.unsigned_abs() as usize).collect(),
            };
            let bytes = extent(arg, &shape, &steps)?.checked_mul(itemsize);
            if bytes.is_none_or(|bytes| isize::try_from(bytes).is_err()) {
                let got = format!("shape {} with strides {steps:?}", shape_text(&shape));
                return Err(Error::Overflow { arg, got });
            }
        }
        let strides: Option<Vec<usize>> = match strides {
            None => Some(contiguous),
            Some(strides) => {
                let used = strides.iter().zip(&shape).map(|(&s, &n)| if n <= 1 || empty { 0 } else { s });
                used.map(|s| usize::try_from(s).ok()).collect()
            }
        };
        let aligned = empty || (pointer as usize).is_multiple_of(itemsize);
        let memory = strides.filter(|_| aligned).map(|strides| Memory { pointer, shape, strides });
        Ok(Self { element, memory })
    }

    fn array<'py>(
        self,
        arg: &'static str,
        object: &Bound<'py, PyAny>,
        kind: Kind,
        read_only: bool,
        export: Option<ImportedDlpack>,
    ) -> Result<Array<'py>, Kind> {
        let memory = self.memory.ok_or(kind)?;
        Ok(Array { arg, kind, element: self.element, memory, read_only, object: object.clone(), _export: export })
    }
}

fn dlpack_dtype_name(code: DLDataTypeCode, bits: u8, lanes: u16) -> String {
    let name = match code {
        DLDataTypeCode::INT => "int",
        DLDataTypeCode::UINT => "uint",
        DLDataTypeCode::FLOAT => "float",
        DLDataTypeCode::BFLOAT => "bfloat",
        DLDataTypeCode::COMPLEX => "complex",
        DLDataTypeCode::BOOL => "bool",
        DLDataTypeCode(other) => return format!("DLPack type code {other} of {bits} bits"),
    };
    if lanes == 1 { format!("{name}{bits}") } else { format!("{name}{bits}x{lanes}") }
}
