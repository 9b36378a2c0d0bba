//! Lengths, rows and page numbers: small integer arrays, copied out.

use super::array::{Array, ElementType, Layout, has_axes};
use crate::error::Error;
use crate::tensor::shape_text;
use pyo3::prelude::*;
use pyo3::types::PyBool;

/// A negative number: beyond every limit that lengths, rows and pages have.
pub const NEGATIVE: usize = usize::MAX;

/// Reads an int32 or int64 array of that shape; `None` in `shape` takes any extent. Returns the shape and the elements in order.
///
/// # Errors
/// [`Error::DType`] or [`Error::Shape`], or those of the import.
pub fn read_signed(
    arg: &'static str,
    object: &Bound<'_, PyAny>,
    shape: &[Option<usize>],
    expected: &str,
) -> PyResult<(Vec<usize>, Vec<i64>)> {
    let array = Array::import(arg, object, Layout::Any)?;
    let got = array.shape();
    if got.len() != shape.len() || got.iter().zip(shape).any(|(&n, &wanted)| wanted.is_some_and(|wanted| wanted != n)) {
        return Err(Error::Shape { arg, expected: expected.into(), got: shape_text(got) }.into());
    }
    let values: Vec<i64> = match &array.element {
        ElementType::Other(name) if name == "int32" => {
            let data = array.memory.slice::<i32>(arg)?;
            places(&array).map(|at| i64::from(data[at])).collect()
        }
        ElementType::Other(name) if name == "int64" => {
            let data = array.memory.slice::<i64>(arg)?;
            places(&array).map(|at| data[at]).collect()
        }
        other => {
            return Err(Error::DType { arg, expected: "int32 or int64".into(), got: other.to_string() }.into());
        }
    };
    Ok((got.to_vec(), values))
}

/// As [`read_signed`], with [`NEGATIVE`] for what is below 0.
///
/// # Errors
/// As [`read_signed`].
pub fn read(
    arg: &'static str,
    object: &Bound<'_, PyAny>,
    shape: &[Option<usize>],
    expected: &str,
) -> PyResult<(Vec<usize>, Vec<usize>)> {
    let (shape, values) = read_signed(arg, object, shape, expected)?;
    Ok((shape, values.into_iter().map(|x| usize::try_from(x).unwrap_or(NEGATIVE)).collect()))
}

/// Positions of the elements of a one- or two-dimensional array, in order.
fn places<'a>(array: &'a Array<'_>) -> impl Iterator<Item = usize> + 'a {
    let (shape, strides) = (&array.memory.shape, &array.memory.strides);
    let columns = shape.last().copied().unwrap_or(0);
    let rows = if shape.len() == 2 { shape[0] } else { 1 };
    let row_stride = if shape.len() == 2 { strides[0] } else { 0 };
    let stride = strides.last().copied().unwrap_or(0);
    (0..rows).flat_map(move |i| (0..columns).map(move |j| i * row_stride + j * stride))
}

/// One number for every sequence, from an array or from one integer for all.
///
/// # Errors
/// As [`read`], and [`Error::Value`] for a negative number.
pub fn per_sequence(arg: &'static str, object: &Bound<'_, PyAny>, batch: usize) -> PyResult<Vec<usize>> {
    // An array of one element converts to an integer as well, but says nothing of the other sequences.
    let values = match object.extract::<i64>() {
        Ok(n) if !has_axes(object) && !object.is_instance_of::<PyBool>() => vec![usize::try_from(n).unwrap_or(NEGATIVE); batch],
        _ => read(arg, object, &[Some(batch)], &format!("({batch},), one for each sequence"))?.1,
    };
    if values.contains(&NEGATIVE) {
        return Err(Error::Value { arg, expected: "numbers of at least 0".into(), got: "a negative number".into() }.into());
    }
    Ok(values)
}
