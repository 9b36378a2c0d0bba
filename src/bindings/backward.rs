//! `attention_backward`: the gradients of `attention`.

use super::array::{Array, Layout};
use super::attention::{View, dispatch_dtype, lse_dtype, writer};
use super::inputs::{Asked, Inputs};
use super::options::Given;
use super::{enter, result, runtime};
use crate::dtype::{DType, Element, Float};
use crate::error::Error;
use crate::kernels::exact::backward::sums::{SumTable, score_sums, sink_sums};
use crate::kernels::exact::backward::{self, BackwardArgs, Gradients, RowsMut};
use crate::parallel::RowWriter;
use crate::simd::SimdElement;
use crate::tensor::{AttnShape, shape_text};
use half::{bf16, f16};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple};

/// What can be differentiated with respect to.
const NAMES: [&str; 7] = ["q", "k", "v", "bias", "relative_bias", "alibi_slopes", "sinks"];

/// The results of the forward and their gradients.
struct Results<'py> {
    d_out: Array<'py>,
    out: Array<'py>,
    lse: Array<'py>,
    d_lse: Option<Array<'py>>,
}

impl<'py> Results<'py> {
    fn read(objects: [&Bound<'py, PyAny>; 3], d_lse: Option<&Bound<'py, PyAny>>, inputs: &Inputs<'py>) -> PyResult<Self> {
        let AttnShape { batch, seqlen_q, num_heads, head_dim_v, .. } = inputs.shape;
        let [d_out, out, lse] = objects;
        let of_out = [batch, seqlen_q, num_heads, head_dim_v];
        let of_lse = [batch, num_heads, seqlen_q];
        let read = |arg, object, layout, shape: &[usize], dtype| {
            let array = Array::import(arg, object, layout)?;
            inputs.q.check_kind(&array)?;
            if array.shape() != shape {
                return Err(Error::Shape { arg, expected: shape_text(shape), got: shape_text(array.shape()) }.into());
            }
            match array.float()? {
                own if own == dtype => Ok(array),
                own => Err(PyErr::from(Error::DType { arg, expected: dtype.to_string(), got: own.to_string() })),
            }
        };
        let wide = lse_dtype(inputs.dtype);
        Ok(Self {
            d_out: read("do", d_out, Layout::Rows, &of_out, inputs.dtype)?,
            out: read("out", out, Layout::Rows, &of_out, inputs.dtype)?,
            lse: read("lse", lse, Layout::Any, &of_lse, wide)?,
            d_lse: d_lse.map(|d_lse| read("dlse", d_lse, Layout::Any, &of_lse, wide)).transpose()?,
        })
    }

    fn args<'a, T: SimdElement>(&'a self, inputs: &'a Inputs<'_>) -> Result<BackwardArgs<'a, T>, Error> {
        let shape = &inputs.shape;
        Ok(BackwardArgs {
            forward: inputs.call()?.args()?,
            out: View::in_order(&self.out, "[B, Sq, H, Dv]")?.tensor()?,
            d_out: View::in_order(&self.d_out, "[B, Sq, H, Dv]")?.tensor()?,
            lse: View::of_lse(&self.lse, shape).tensor()?,
            d_lse: self.d_lse.as_ref().map(|d_lse| View::of_lse(d_lse, shape).tensor()).transpose()?,
        })
    }
}

/// Gradients of queries, keys and values, as far as they are asked for.
fn run<T: SimdElement>(
    py: Python<'_>,
    inputs: &Inputs<'_>,
    results: &Results<'_>,
    into: [Option<&Array<'_>>; 3],
) -> PyResult<()> {
    if into.iter().all(Option::is_none) {
        return Ok(());
    }
    let args = results.args::<T>(inputs)?;
    let [q, k, v] = into;
    let q = q.map(|q| -> Result<_, Error> {
        let View { arg, memory, shape, strides, .. } = View::in_order(q, "[B, S, H, D]")?;
        Ok(RowsMut { data: memory.slice_mut(arg)?, shape, strides })
    });
    let (k, v) = (rows(k)?, rows(v)?);
    let gradients = Gradients { q: q.transpose()?, k: k.as_ref(), v: v.as_ref() };
    let (level, threads, blocking) = (runtime::level()?, runtime::threads(py)?, runtime::blocking()?);
    enter::enter(py, || backward::backward(&args, gradients, level, threads, blocking))
}

fn rows<'a, T: SimdElement>(array: Option<&'a Array<'_>>) -> Result<Option<RowWriter<'a, T>>, Error> {
    array.map(|array| writer(&View::in_order(array, "[B, S, H, D]")?)).transpose()
}

/// The gradient of a bias or of slopes, written to `into`, which is contiguous.
fn run_sums<T: SimdElement>(
    py: Python<'_>,
    inputs: &Inputs<'_>,
    results: &Results<'_>,
    table: &SumTable,
    into: &Array<'_>,
) -> PyResult<()> {
    let args = results.args::<T>(inputs)?;
    let mut sums = vec![T::Acc::ZERO; table.len()];
    let (level, threads, blocking) = (runtime::level()?, runtime::threads(py)?, runtime::blocking()?);
    enter::enter(py, || score_sums(&args, table, &mut sums, level, threads, blocking))?;
    write_all(into, &sums)
}

fn run_sinks<T: SimdElement>(py: Python<'_>, inputs: &Inputs<'_>, results: &Results<'_>, into: &Array<'_>) -> PyResult<()> {
    let args = results.args::<T>(inputs)?;
    let mut sums = vec![0.0; into.shape().iter().product()];
    enter::enter(py, || sink_sums(&args, &mut sums))?;
    write_all(into, &sums)
}

/// Rounds numbers into a contiguous array.
fn write_all<A: Float>(into: &Array<'_>, numbers: &[A]) -> PyResult<()> {
    fn write<T: Element, A: Float>(into: &Array<'_>, numbers: &[A]) -> Result<(), Error> {
        for (out, x) in into.memory.slice_mut::<T>(into.arg)?.iter_mut().zip(numbers) {
            *out = T::from_acc(T::Acc::from_f64(x.to_f64()));
        }
        Ok(())
    }
    match into.float()? {
        DType::F32 => write::<f32, A>(into, numbers)?,
        DType::F64 => write::<f64, A>(into, numbers)?,
        DType::F16 => write::<f16, A>(into, numbers)?,
        DType::BF16 => write::<bf16, A>(into, numbers)?,
    }
    Ok(())
}

/// Where the entries of the argument of that name lie, in an array of that shape.
fn table(name: &str, shape: &[usize], inputs: &Inputs<'_>) -> SumTable {
    let AttnShape { batch, seqlen_q, num_heads, .. } = inputs.shape;
    let flat = SumTable {
        batches: 1,
        heads: if shape.iter().rev().nth(if name == "bias" { 2 } else { 0 }) == Some(&num_heads) { num_heads } else { 1 },
        per_head: 1,
        origin: 0,
        token_stride: 0,
        key_stride: 0,
        is_slope: false,
    };
    match name {
        "alibi_slopes" => {
            let batches = if shape.len() == 2 { shape[0] } else { 1 };
            SumTable { batches: if batches == batch { batches } else { 1 }, is_slope: true, ..flat }
        }
        "relative_bias" => {
            let (heads, width) = (shape[0], shape[1]);
            SumTable { heads, per_head: width, origin: seqlen_q.saturating_sub(1), token_stride: -1, key_stride: 1, ..flat }
        }
        _ => {
            let axis = |from_end: usize| shape.len().checked_sub(from_end).map_or(1, |axis| shape[axis]);
            let [batches, tokens, keys] = [axis(4), axis(2), axis(1)];
            SumTable {
                batches,
                per_head: tokens * keys,
                token_stride: if tokens > 1 { keys as isize } else { 0 },
                key_stride: isize::from(keys > 1),
                ..flat
            }
        }
    }
}

/// Gradients of `attention`; documented in `subquad.ops.backward`.
#[pyfunction]
#[expect(clippy::too_many_arguments, reason = "the Python signature")]
pub fn attention_backward<'py>(
    d_out: &Bound<'py, PyAny>,
    q: &Bound<'py, PyAny>,
    k: &Bound<'py, PyAny>,
    v: &Bound<'py, PyAny>,
    out: &Bound<'py, PyAny>,
    lse: &Bound<'py, PyAny>,
    d_lse: Option<&Bound<'py, PyAny>>,
    wrt: Vec<String>,
    options: &Bound<'py, PyDict>,
) -> PyResult<Bound<'py, PyTuple>> {
    let py = q.py();
    let option = |name: &str| options.get_item(name).map(|found| found.filter(|object| !object.is_none()));
    let [window_size, bias, relative_bias] = [option("window_size")?, option("bias")?, option("relative_bias")?];
    let [scale, length_scale, alibi_slopes] = [option("scale")?, option("length_scale")?, option("alibi_slopes")?];
    let [sinks, normalizer, mask] = [option("sinks")?, option("normalizer")?, option("mask")?];
    let given = Given {
        scale: scale.as_ref(),
        length_scale: length_scale.as_ref(),
        softcap: option("softcap")?.map(|softcap| softcap.extract()).transpose()?,
        alibi_slopes: alibi_slopes.as_ref(),
        sinks: sinks.as_ref(),
        normalizer: normalizer.as_ref(),
        mask: mask.as_ref(),
    };
    let causal = option("causal")?.map_or(Ok(false), |causal| causal.extract())?;
    let asked =
        Asked { causal, window_size: window_size.as_ref(), bias: bias.as_ref(), relative_bias: relative_bias.as_ref(), given };
    let inputs = Inputs::read([q, k, v], &asked)?;
    let results = Results::read([d_out, out, lse], d_lse, &inputs)?;

    let mut made: Vec<Array<'py>> = Vec::with_capacity(wrt.len());
    for (index, name) in wrt.iter().enumerate() {
        if wrt[..index].contains(name) {
            return Err(Error::Value { arg: "wrt", expected: "each name once".into(), got: format!("{name:?} twice") }.into());
        }
        let arg = *NAMES.iter().find(|known| *known == name).ok_or_else(|| Error::Value {
            arg: "wrt",
            expected: format!("names of {}", NAMES.join(", ")),
            got: format!("{name:?}"),
        })?;
        let object = match arg {
            "q" => Some(q),
            "k" => Some(k),
            "v" => Some(v),
            "bias" => bias.as_ref(),
            "relative_bias" => relative_bias.as_ref(),
            "alibi_slopes" => alibi_slopes.as_ref(),
            _ => sinks.as_ref(),
        };
        let of = object.ok_or_else(|| Error::Value {
            arg: "wrt",
            expected: "names of arguments that are given".into(),
            got: format!("{name:?}"),
        })?;
        let of = Array::import(arg, of, Layout::Any)?;
        made.push(result::empty(arg, &inputs.q, of.shape(), of.float()?)?);
    }
    let find = |arg: &str| made.iter().find(|array| array.arg == arg);
    dispatch_dtype!(inputs.dtype, run, py, &inputs, &results, [find("q"), find("k"), find("v")])?;
    for name in ["bias", "relative_bias", "alibi_slopes"] {
        if let Some(into) = find(name) {
            let table = table(name, into.shape(), &inputs);
            dispatch_dtype!(inputs.dtype, run_sums, py, &inputs, &results, &table, into)?;
        }
    }
    if let Some(into) = find("sinks") {
        dispatch_dtype!(inputs.dtype, run_sinks, py, &inputs, &results, into)?;
    }
    let made = made.into_iter().map(|array| result::deliver(&inputs.q, array)).collect::<PyResult<Vec<_>>>()?;
    PyTuple::new(py, made)
}
