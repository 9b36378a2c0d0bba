//! `attention`: `[B, S, H, D]`, and the call into the kernels that all exact entries share.

use super::array::{Array, Kind, Layout, has_axes};
use super::broadcast;
use super::dlpack::Memory;
use super::inputs::{Asked, Inputs};
use super::options::{Given, Options};
use super::{enter, result, runtime};
use crate::dtype::{DType, Element};
use crate::error::Error;
use crate::kernels::exact::{self, ExactArgs, ExactOut};
use crate::parallel::{RowWriter, axes_are_disjoint};
use crate::simd::SimdElement;
use crate::tensor::{AttnShape, Tensor, shape_text};
use half::{bf16, f16};
use pyo3::prelude::*;

/// Runs a generic function for the type of a dtype.
macro_rules! dispatch_dtype {
    ($dtype:expr, $function:ident, $($argument:expr),*) => {
        match $dtype {
            DType::F32 => $function::<f32>($($argument),*),
            DType::F64 => $function::<f64>($($argument),*),
            DType::F16 => $function::<f16>($($argument),*),
            DType::BF16 => $function::<bf16>($($argument),*),
        }
    };
}
pub(super) use dispatch_dtype;

/// A `[B, S, H, D]` view of an argument: which of its axes are which.
#[derive(Clone, Copy)]
pub struct View<'a> {
    /// Name of the argument.
    pub arg: &'static str,
    /// Its elements.
    pub memory: &'a Memory,
    /// Elements to skip.
    pub offset: usize,
    /// Extents.
    pub shape: [usize; 4],
    /// Strides along batch, sequence and head.
    pub strides: [usize; 3],
}

impl<'a> View<'a> {
    /// The axes in their own order.
    ///
    /// # Errors
    /// [`Error::Shape`] when there are not four.
    pub fn in_order(array: &'a Array<'_>, names: &str) -> Result<Self, Error> {
        let shape: [usize; 4] = array.shape().try_into().map_err(|_| Error::Shape {
            arg: array.arg,
            expected: format!("of rank 4, {names}"),
            got: shape_text(array.shape()),
        })?;
        let [b, s, h, _] = array.memory.strides[..] else { unreachable!("as many strides as extents") };
        Ok(Self { arg: array.arg, memory: &array.memory, offset: 0, shape, strides: [b, s, h] })
    }

    /// One of the heads.
    pub fn head(self, head: usize) -> Self {
        let [batch, length, heads, width] = self.shape;
        let offset = self.offset + head * self.strides[2];
        Self { offset, shape: [batch, length, heads.min(1), width], ..self }
    }

    /// `[B, H, Sq]`, as rows of one element of a `[B, Sq, H, 1]` array.
    pub fn of_lse(lse: &'a Array<'_>, shape: &AttnShape) -> Self {
        let [b, h, s] = lse.memory.strides[..] else { unreachable!("of rank 3") };
        let shape = [shape.batch, shape.seqlen_q, shape.num_heads, 1];
        Self { arg: lse.arg, memory: &lse.memory, offset: 0, shape, strides: [b, s, h] }
    }

    /// The elements.
    ///
    /// # Errors
    /// Those of the memory and of the extents.
    pub fn tensor<T: Element>(&self) -> Result<Tensor<'a, T>, Error> {
        let data = self.memory.slice(self.arg)?;
        Tensor::new(self.arg, &data[self.offset.min(data.len())..], self.shape, self.strides)
    }
}

/// One exact attention call on four-dimensional views.
pub struct Call<'a> {
    /// The sizes, checked.
    pub shape: AttnShape,
    /// Queries.
    pub q: View<'a>,
    /// Keys.
    pub k: View<'a>,
    /// Values.
    pub v: View<'a>,
    /// The additive or boolean mask with the shape it broadcasts to, and the place along its leading axes and
    /// heads.
    pub bias: (Option<&'a Array<'a>>, &'a [usize], &'a [usize], usize),
    /// Diagonals of an additive Toeplitz matrix for each head.
    pub relative_bias: Option<&'a Array<'a>>,
    /// All else.
    pub options: &'a Options,
}

impl<'a> Call<'a> {
    /// The arguments for the element type.
    ///
    /// # Errors
    /// Those of the views and of the mask.
    pub fn args<T: SimdElement>(&self) -> Result<ExactArgs<'a, T>, Error> {
        Ok(ExactArgs {
            shape: self.shape,
            q: self.q.tensor()?,
            k: self.k.tensor()?,
            v: self.v.tensor()?,
            segments: self.options.segments(),
            pages: None,
            mask: self.options.mask(),
            biases: [
                broadcast::bias(self.bias.0, self.bias.1, self.bias.2, self.bias.3)?,
                broadcast::toeplitz(self.relative_bias, [self.shape.num_heads, self.shape.seqlen_q, self.shape.seqlen_k])?,
            ],
            mods: self.options.mods(),
        })
    }
}

/// Computes a call's result, `[B, Sq, H, Dv]`, and its log-sum-exp, `[B, Sq, H, 1]`.
///
/// # Errors
/// Those of the arguments.
pub fn run<T: SimdElement>(py: Python<'_>, call: &Call<'_>, out: &View<'_>, lse: Option<&View<'_>>) -> PyResult<()> {
    let args = call.args::<T>()?;
    let out = ExactOut { out: writer(out)?, lse: lse.map(writer).transpose()? };
    let (level, threads, blocking) = (runtime::level()?, runtime::threads(py)?, runtime::blocking()?);
    enter::enter(py, || exact::forward(&args, &out, level, threads, blocking))
}

/// The rows of a result.
///
/// # Errors
/// Those of the memory.
pub fn writer<'a, T: bytemuck::Pod>(view: &View<'a>) -> Result<RowWriter<'a, T>, Error> {
    let data = view.memory.slice_mut(view.arg)?;
    let offset = view.offset.min(data.len());
    Ok(RowWriter::new(&mut data[offset..], view.shape, view.strides))
}

/// Dtype of log-sum-exps.
pub fn lse_dtype(dtype: DType) -> DType {
    if dtype == DType::F64 { DType::F64 } else { DType::F32 }
}

/// Checks a caller's output array.
///
/// # Errors
/// [`Error::Shape`], [`Error::DType`], [`Error::Kind`], [`Error::NotWritable`] or [`Error::Overlap`].
fn check_out(out: &Array<'_>, shape: &[usize; 4], q: &Array<'_>, inputs: &[&Array<'_>]) -> Result<(), Error> {
    if out.shape() != shape {
        let expected = shape_text(shape);
        return Err(Error::Shape { arg: out.arg, expected, got: shape_text(out.shape()) });
    }
    q.check_same(out)?;
    check_memory(out, inputs)
}

/// Checks that an array can be written, each element once, without changing an input.
///
/// # Errors
/// [`Error::NotWritable`] or [`Error::Overlap`].
pub fn check_memory(out: &Array<'_>, inputs: &[&Array<'_>]) -> Result<(), Error> {
    if out.kind == Kind::DLPack {
        let got = format!("{}, which may rely on never changing", out.kind.name());
        return Err(Error::NotWritable { arg: out.arg, got });
    }
    if out.read_only {
        return Err(Error::NotWritable { arg: out.arg, got: "a read-only one".into() });
    }
    let strides = &out.memory.strides;
    let (&width, outer) = out.shape().split_last().expect("ranks are checked");
    let axes = strides.iter().copied().zip(outer.iter().copied()).collect();
    if !out.shape().contains(&0) && !axes_are_disjoint(axes, width) {
        let got = format!("strides {strides:?}, under which elements share memory");
        return Err(Error::NotWritable { arg: out.arg, got });
    }
    for input in inputs {
        let [ours, theirs] = [out, *input].map(|array| array.memory.bytes(array.arg, array.itemsize()));
        let (ours, theirs) = (ours?, theirs?);
        if !ours.is_empty() && !theirs.is_empty() && ours.start < theirs.end && theirs.start < ours.end {
            return Err(Error::Overlap { arg: out.arg, other: input.arg });
        }
    }
    Ok(())
}

/// `softmax(scale * q k^T + bias) v`; documented in `subquad.ops.exact`.
#[pyfunction]
#[pyo3(signature = (q, k, v, *, causal=false, window_size=None, mask=None, scale=None, bias=None, relative_bias=None,
    softcap=None, alibi_slopes=None, sinks=None, length_scale=None, normalizer=None, dropout_p=0.0, dropout_seed=None,
    return_lse=false, out=None))]
#[expect(clippy::too_many_arguments, reason = "the Python signature")]
pub fn attention<'py>(
    q: &Bound<'py, PyAny>,
    k: &Bound<'py, PyAny>,
    v: &Bound<'py, PyAny>,
    causal: bool,
    window_size: Option<&Bound<'py, PyAny>>,
    mask: Option<&Bound<'py, PyAny>>,
    scale: Option<&Bound<'py, PyAny>>,
    bias: Option<&Bound<'py, PyAny>>,
    relative_bias: Option<&Bound<'py, PyAny>>,
    softcap: Option<f64>,
    alibi_slopes: Option<&Bound<'py, PyAny>>,
    sinks: Option<&Bound<'py, PyAny>>,
    length_scale: Option<&Bound<'py, PyAny>>,
    normalizer: Option<&Bound<'py, PyAny>>,
    dropout_p: f64,
    dropout_seed: Option<&Bound<'py, PyAny>>,
    return_lse: bool,
    out: Option<&Bound<'py, PyAny>>,
) -> PyResult<Bound<'py, PyAny>> {
    let py = q.py();
    let given = Given { scale, length_scale, softcap, alibi_slopes, sinks, dropout_p, dropout_seed, normalizer, mask };
    let inputs = Inputs::read([q, k, v], &Asked { causal, window_size, bias, relative_bias, given })?;
    let (q, dtype, shape) = (&inputs.q, inputs.dtype, inputs.shape);
    let AttnShape { batch, seqlen_q, num_heads, head_dim_v, .. } = shape;
    let out_shape = [batch, seqlen_q, num_heads, head_dim_v];
    let given = out.map(|out| Array::import("out", out, Layout::InPlace)).transpose()?;
    if let Some(out) = &given {
        let tables = [("scale", scale), ("alibi_slopes", alibi_slopes), ("sinks", sinks), ("length_scale", length_scale)];
        let tables =
            tables.into_iter().filter_map(|(arg, table)| table.filter(|table| has_axes(table)).map(|table| (arg, table)));
        let tables = tables.map(|(arg, table)| Array::import(arg, table, Layout::Any)).collect::<PyResult<Vec<_>>>()?;
        let mut others = vec![q, &inputs.k, &inputs.v];
        others.extend(inputs.bias.iter().chain(&inputs.relative_bias).chain(&tables));
        check_out(out, &out_shape, q, &others)?;
    }
    let fresh = given.is_none();
    let out = given.map_or_else(|| result::empty("out", q, &out_shape, dtype), Ok)?;
    let lse = return_lse.then(|| result::empty("lse", q, &[batch, num_heads, seqlen_q], lse_dtype(dtype))).transpose()?;
    let (out_view, lse_view) = (View::in_order(&out, "[B, Sq, H, Dv]")?, lse.as_ref().map(|lse| View::of_lse(lse, &shape)));
    dispatch_dtype!(dtype, run, py, &inputs.call()?, &out_view, lse_view.as_ref())?;
    let out = if fresh { result::deliver(q, out)? } else { out.written()? };
    match lse {
        None => Ok(out),
        Some(lse) => Ok((out, result::deliver(q, lse)?).into_pyobject(py)?.into_any()),
    }
}
