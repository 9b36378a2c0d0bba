//! `rms_norm_gated`: norms of rows that are gated.

use super::array::{Array, Layout};
use super::attention::dispatch_dtype;
use super::named::numbers_of;
use super::recurrent::typed;
use super::{enter, result, runtime};
use crate::dtype::{DType, Element};
use crate::error::Error;
use crate::kernels::gated_norm::{Activation, GatedNormArgs, rms_norm_gated as compute};
use crate::parallel::RowWriter;
use crate::simd::{SimdElement, Wide};
use crate::tensor::{Tensor, shape_text};
use half::{bf16, f16};
use pyo3::prelude::*;

/// The arguments of a call, checked.
struct Call<'py> {
    x: Array<'py>,
    g: Array<'py>,
    weight: Option<Array<'py>>,
    bias: Option<Array<'py>>,
    eps: f64,
    activation: Activation,
}

/// Up to four axes as rows of `[A, B, C, D]`: the extents, and the strides of the first three.
fn row_axes(array: &Array<'_>) -> ([usize; 4], [usize; 3]) {
    let (mut shape, mut strides) = ([1; 4], [0; 4]);
    let missing = 4 - array.shape().len();
    shape[missing..].copy_from_slice(array.shape());
    strides[missing..].copy_from_slice(&array.memory.strides);
    let [a, b, c, _] = strides;
    (shape, [a, b, c])
}

fn rows<'a, E: Element>(array: &'a Array<'_>) -> Result<Tensor<'a, E>, Error> {
    let (shape, strides) = row_axes(array);
    Tensor::new(array.arg, array.memory.slice(array.arg)?, shape, strides)
}

fn run<T: SimdElement>(py: Python<'_>, call: &Call<'_>, out: &Array<'_>) -> PyResult<()>
where
    T::Acc: Wide,
{
    let args = GatedNormArgs::<T> {
        x: rows(&call.x)?,
        g: rows(&call.g)?,
        weight: call.weight.as_ref().map(|weight| typed(weight, rows, rows)).transpose()?,
        bias: call.bias.as_ref().map(|bias| typed(bias, rows, rows)).transpose()?,
        eps: call.eps,
        activation: call.activation,
    };
    let (shape, strides) = row_axes(out);
    let out = RowWriter::new(out.memory.slice_mut(out.arg)?, shape, strides);
    let (level, threads) = (runtime::level()?, runtime::threads(py)?);
    enter::enter(py, || compute(&args, &out, level, threads))
}

/// `x / sqrt(mean(x^2) + eps) * weight + bias`, times the activation of `g`; documented in `subquad.ops.gated_norm`.
#[pyfunction]
pub fn rms_norm_gated<'py>(
    x: &Bound<'py, PyAny>,
    g: &Bound<'py, PyAny>,
    weight: Option<&Bound<'py, PyAny>>,
    bias: Option<&Bound<'py, PyAny>>,
    silu: bool,
    eps: f64,
) -> PyResult<Bound<'py, PyAny>> {
    let py = x.py();
    let x = Array::import("x", x, Layout::Rows)?;
    let dtype = x.float()?;
    let &[.., width] = x.shape() else {
        return Err(Error::Shape { arg: "x", expected: "of rank 1 to 4".into(), got: shape_text(x.shape()) }.into());
    };
    if x.shape().len() > 4 {
        return Err(Error::Shape { arg: "x", expected: "of rank 1 to 4".into(), got: shape_text(x.shape()) }.into());
    }
    let g = Array::import("g", g, Layout::Rows)?;
    x.check_same(&g)?;
    if g.shape() != x.shape() {
        let expected = format!("{} as x has", shape_text(x.shape()));
        return Err(Error::Shape { arg: "g", expected, got: shape_text(g.shape()) }.into());
    }
    let weight = weight.map(|weight| numbers_of("weight", weight, &x, &[width], Layout::Rows)).transpose()?;
    let bias = bias.map(|bias| numbers_of("bias", bias, &x, &[width], Layout::Rows)).transpose()?;
    let activation = if silu { Activation::Silu } else { Activation::Sigmoid };
    let out = result::empty("out", &x, x.shape(), dtype)?;
    let call = Call { x, g, weight, bias, eps, activation };
    dispatch_dtype!(dtype, run, py, &call, &out)?;
    result::deliver(&call.x, out)
}
