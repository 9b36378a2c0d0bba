//! Arrays of numbers beside the inputs of recurrent operators and convolutions.

use super::array::{Array, ElementType, Layout};
use super::attention::lse_dtype;
use super::options::numbers;
use crate::dtype::DType;
use crate::error::Error;
use crate::tensor::shape_text;
use pyo3::prelude::*;
use pyo3::types::PyDict;

/// What is given beside the inputs, by name.
pub struct Named<'a, 'py>(pub &'a Bound<'py, PyDict>);

impl<'py> Named<'_, 'py> {
    /// An argument that is not `None`.
    pub(super) fn get(&self, arg: &str) -> PyResult<Option<Bound<'py, PyAny>>> {
        Ok(self.0.get_item(arg)?.filter(|object| !object.is_none()))
    }

    /// A flag, False where it is not given.
    pub(super) fn flag(&self, arg: &str) -> PyResult<bool> {
        self.get(arg)?.map_or(Ok(false), |flag| flag.extract())
    }

    /// An array of exactly that shape, of the dtype of `like` or of its accumulators.
    pub(super) fn array(
        &self,
        arg: &'static str,
        like: &Array<'py>,
        shape: &[usize],
        layout: Layout,
    ) -> PyResult<Option<Array<'py>>> {
        self.get(arg)?.map(|object| numbers_of(arg, &object, like, shape, layout)).transpose()
    }

    /// Numbers of exactly that shape, of the dtype of `like`, float32 or float64.
    pub(super) fn numbers(&self, arg: &'static str, like: &Array<'py>, shape: &[usize]) -> PyResult<Option<Vec<f64>>> {
        let Some(object) = self.get(arg)? else { return Ok(None) };
        let (data, got) = numbers(arg, &object, like, &[DType::F32, DType::F64, like.float()?])?;
        if got != shape {
            return Err(Error::Shape { arg, expected: shape_text(shape), got: shape_text(&got) }.into());
        }
        Ok(Some(data))
    }
}

/// An array of exactly that shape, of the dtype of `like` or of its accumulators.
///
/// # Errors
/// Those of the import, [`Error::Kind`], [`Error::Shape`] or [`Error::DType`].
pub(super) fn numbers_of<'py>(
    arg: &'static str,
    object: &Bound<'py, PyAny>,
    like: &Array<'py>,
    shape: &[usize],
    layout: Layout,
) -> PyResult<Array<'py>> {
    let array = Array::import(arg, object, layout)?;
    like.check_kind(&array)?;
    if array.shape() != shape {
        return Err(Error::Shape { arg, expected: shape_text(shape), got: shape_text(array.shape()) }.into());
    }
    check_numbers(&array, like.float()?)?;
    Ok(array)
}

/// Checks that numbers beside inputs of a dtype are of that, or of the dtype of its accumulators.
///
/// # Errors
/// [`Error::DType`].
pub(super) fn check_numbers(array: &Array<'_>, own: DType) -> Result<(), Error> {
    let acc = lse_dtype(own);
    if array.element == ElementType::Float(own) || array.element == ElementType::Float(acc) {
        return Ok(());
    }
    let expected = if own == acc { own.to_string() } else { format!("{own} or {acc}") };
    Err(Error::DType { arg: array.arg, expected, got: array.element.to_string() })
}
