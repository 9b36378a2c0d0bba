//! `attention_jvp` and `attention_double_backward`: derivatives along tangents, and the gradients of the gradients.

use super::array::{Array, ElementType, Layout};
use super::attention::{View, lse_dtype, writer};
use super::backward::{Dense, Differentiable, rows, write_all};
use super::inputs::{Inputs, Named};
use super::{broadcast, enter, result, runtime};
use crate::dtype::DType;
use crate::error::Error;
use crate::kernels::exact::second::jvp::JvpOut;
use crate::kernels::exact::second::{self, Direction, SecondGradients};
use crate::simd::Wide;
use crate::tensor::{AttnShape, Tensor, shape_text};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyString};

/// What has tangents, and how those, and the cotangents of its gradient, are called in errors.
const DIRECTIONS: [[&str; 3]; 5] = [
    ["q", "tangents['q']", "cotangents['q']"],
    ["k", "tangents['k']", "cotangents['k']"],
    ["v", "tangents['v']", "cotangents['v']"],
    ["bias", "tangents['bias']", "cotangents['bias']"],
    ["relative_bias", "tangents['relative_bias']", "cotangents['relative_bias']"],
];

/// What gradients can be differentiated with respect to; biases if asked.
const NAMES: [&str; 7] = ["do", "q", "k", "v", "dlse", "bias", "relative_bias"];

fn unknown(arg: &'static str, known: &[&str], got: &str) -> PyErr {
    Error::Value { arg, expected: format!("names of {}", known.join(", ")), got: format!("{got:?}") }.into()
}

/// Tangents or cotangents, in the order of [`DIRECTIONS`].
struct Directions<'py>([Option<Array<'py>>; 5]);

impl<'py> Directions<'py> {
    fn read(arg: &'static str, objects: &Bound<'py, PyDict>, inputs: &Inputs<'py>) -> PyResult<Self> {
        let column = if arg == "tangents" { 1 } else { 2 };
        let mut read = [const { None }; 5];
        for (name, object) in objects {
            let name = name.cast::<PyString>().map_err(PyErr::from)?.to_cow()?.into_owned();
            let known = || DIRECTIONS.map(|[name, ..]| name);
            let index = known().iter().position(|known| *known == name).ok_or_else(|| unknown(arg, &known(), &name))?;
            if !object.is_none() {
                read[index] = Some(Self::import(DIRECTIONS[index][column], index, &object, inputs)?);
            }
        }
        Ok(Self(read))
    }

    fn import(arg: &'static str, index: usize, object: &Bound<'py, PyAny>, inputs: &Inputs<'py>) -> PyResult<Array<'py>> {
        let of = match index {
            0 => Some(&inputs.q),
            1 => Some(&inputs.k),
            2 => Some(&inputs.v),
            3 => inputs.bias.as_ref(),
            _ => inputs.relative_bias.as_ref(),
        };
        let array = Array::import(arg, object, if index < 3 { Layout::Rows } else { Layout::Any })?;
        let Some(of) = of.filter(|of| of.element != ElementType::Bool) else {
            let expected = format!("None, as {} is not given as numbers", DIRECTIONS[index][0]);
            return Err(Error::Value { arg, expected, got: "an array".into() }.into());
        };
        of.check_same(&array)?;
        if array.shape() != of.shape() {
            let expected = format!("{} as {} has", shape_text(of.shape()), of.arg);
            return Err(Error::Shape { arg, expected, got: shape_text(array.shape()) }.into());
        }
        Ok(array)
    }

    fn direction<'a, T: Wide>(&'a self, inputs: &'a Inputs<'_>) -> Result<Direction<'a, T>, Error> {
        let AttnShape { num_heads, seqlen_q, seqlen_k, .. } = inputs.shape;
        let [q, k, v, bias, relative_bias] = &self.0;
        Ok(Direction {
            q: tensor(q.as_ref())?,
            k: tensor(k.as_ref())?,
            v: tensor(v.as_ref())?,
            biases: [
                broadcast::bias(bias.as_ref(), &inputs.scores, &[], 0)?,
                broadcast::toeplitz(relative_bias.as_ref(), [num_heads, seqlen_q, seqlen_k])?,
            ],
        })
    }
}

/// Runs a generic function for a type that has higher derivatives.
macro_rules! dispatch_wide {
    ($dtype:expr, $function:ident, $($argument:expr),*) => {
        match $dtype {
            DType::F32 => $function::<f32>($($argument),*),
            DType::F64 => $function::<f64>($($argument),*),
            half @ (DType::F16 | DType::BF16) => Err(Error::Unsupported {
                what: format!("q: {half} with higher derivatives"),
                instead: "float32 and float64 are".into(),
            }.into()),
        }
    };
}

fn tensor<'a, T: Wide>(array: Option<&'a Array<'_>>) -> Result<Option<Tensor<'a, T>>, Error> {
    array.map(|array| View::in_order(array, "[B, S, H, D]")?.tensor()).transpose()
}

fn run_jvp<T: Wide>(
    py: Python<'_>,
    inputs: &Inputs<'_>,
    directions: &Directions<'_>,
    out: &Array<'_>,
    lse: &Array<'_>,
) -> PyResult<()> {
    let (args, direction) = (inputs.call()?.args::<T>()?, directions.direction::<T>(inputs)?);
    second::check(&args)?;
    let (out, lse) = (writer(&View::in_order(out, "[B, Sq, H, Dv]")?)?, writer(&View::of_lse(lse, &inputs.shape))?);
    let out = JvpOut { out: Some(&out), lse: Some(&lse), product: None };
    let (level, threads) = (runtime::level()?, runtime::threads(py)?);
    enter::enter(py, || second::jvp(&args, &direction, &out, level, threads))
}

/// The derivatives of the output and of its log-sum-exp along tangents of `q`, `k`, `v`, `bias` and `relative_bias`.
#[pyfunction]
pub fn attention_jvp<'py>(
    q: &Bound<'py, PyAny>,
    k: &Bound<'py, PyAny>,
    v: &Bound<'py, PyAny>,
    tangents: &Bound<'py, PyDict>,
    options: &Bound<'py, PyDict>,
) -> PyResult<(Bound<'py, PyAny>, Bound<'py, PyAny>)> {
    let py = q.py();
    let named = Named::read(options)?;
    let inputs = Inputs::read([q, k, v], &named.asked())?;
    let directions = Directions::read("tangents", tangents, &inputs)?;
    let AttnShape { batch, seqlen_q, num_heads, head_dim_v, .. } = inputs.shape;
    let out = result::empty("out", &inputs.q, &[batch, seqlen_q, num_heads, head_dim_v], inputs.dtype)?;
    let lse = result::empty("lse", &inputs.q, &[batch, num_heads, seqlen_q], lse_dtype(inputs.dtype))?;
    dispatch_wide!(inputs.dtype, run_jvp, py, &inputs, &directions, &out, &lse)?;
    Ok((result::deliver(&inputs.q, out)?, result::deliver(&inputs.q, lse)?))
}

fn run_double_backward<T: Wide>(
    py: Python<'_>,
    call: &Dense<'_>,
    directions: &Directions<'_>,
    made: &[(&'static str, Array<'_>)],
) -> PyResult<()> {
    let (args, direction) = (call.args::<T>()?, directions.direction::<T>(&call.inputs)?);
    second::check(&args.forward)?;
    let find = |name: &str| made.iter().find(|(made, _)| *made == name).map(|(_, array)| array);
    let biases: Vec<_> = ["bias", "relative_bias"].into_iter().filter_map(|name| find(name).map(|array| (name, array))).collect();
    let tables = biases.iter().map(|(name, array)| call.table(name, array.shape()));
    let mut sums: Vec<_> = tables.map(|table| (table, vec![0.0; table.len()])).collect();
    let gradients = SecondGradients {
        d_out: rows(call, find("do"))?,
        q: rows(call, find("q"))?,
        k: rows(call, find("k"))?,
        v: rows(call, find("v"))?,
        d_lse: find("dlse").map(|array| writer(&View::of_lse(array, &call.inputs.shape))).transpose()?,
    };
    let (level, threads) = (runtime::level()?, runtime::threads(py)?);
    enter::enter(py, || second::double_backward(&args, &direction, &gradients, &mut sums, level, threads))?;
    for ((_, array), (_, sums)) in biases.iter().zip(&sums) {
        write_all(array, sums)?;
    }
    Ok(())
}

/// The gradients, by name, of the product of `attention_backward`'s gradients with `cotangents`: with respect to `do`, `q`, `k`, `v` and
/// `dlse`, or what of these, `bias` and `relative_bias` is named in `wrt`.
#[pyfunction]
#[pyo3(signature = (d_out, q, k, v, out, lse, d_lse, cotangents, options, wrt=None))]
#[expect(clippy::too_many_arguments, reason = "the Python signature")]
pub fn attention_double_backward<'py>(
    d_out: &Bound<'py, PyAny>,
    q: &Bound<'py, PyAny>,
    k: &Bound<'py, PyAny>,
    v: &Bound<'py, PyAny>,
    out: &Bound<'py, PyAny>,
    lse: &Bound<'py, PyAny>,
    d_lse: Option<&Bound<'py, PyAny>>,
    cotangents: &Bound<'py, PyDict>,
    options: &Bound<'py, PyDict>,
    wrt: Option<Vec<String>>,
) -> PyResult<Bound<'py, PyDict>> {
    let py = q.py();
    let named = Named::read(options)?;
    let call = Dense::read([q, k, v], [d_out, out, lse], d_lse, &named)?;
    let inputs = &call.inputs;
    let directions = Directions::read("cotangents", cotangents, inputs)?;
    let AttnShape { batch, seqlen_q, num_heads, head_dim_v, .. } = inputs.shape;
    let wrt = wrt.unwrap_or_else(|| NAMES[..5].iter().map(ToString::to_string).collect());
    let mut made = Vec::with_capacity(wrt.len());
    for (index, name) in wrt.iter().enumerate() {
        if wrt[..index].contains(name) {
            return Err(Error::Value { arg: "wrt", expected: "each name once".into(), got: format!("{name:?} twice") }.into());
        }
        let name = *NAMES.iter().find(|known| *known == name).ok_or_else(|| unknown("wrt", &NAMES, name))?;
        let of = match name {
            "q" => Some(&inputs.q),
            "k" => Some(&inputs.k),
            "v" => Some(&inputs.v),
            "bias" => inputs.bias.as_ref(),
            "relative_bias" => inputs.relative_bias.as_ref(),
            _ => None,
        };
        let (shape, dtype) = match (name, of) {
            ("do", _) => (vec![batch, seqlen_q, num_heads, head_dim_v], inputs.dtype),
            ("dlse", _) => (vec![batch, num_heads, seqlen_q], lse_dtype(inputs.dtype)),
            (_, Some(of)) => (of.shape().to_vec(), of.float()?),
            (_, None) => {
                let expected = "names of arguments that are given".into();
                return Err(Error::Value { arg: "wrt", expected, got: format!("{name:?}") }.into());
            }
        };
        made.push((name, result::empty(name, &inputs.q, &shape, dtype)?));
    }
    dispatch_wide!(inputs.dtype, run_double_backward, py, &call, &directions, &made)?;
    let gradients = PyDict::new(py);
    for (name, array) in made {
        gradients.set_item(name, result::deliver(&inputs.q, array)?)?;
    }
    Ok(gradients)
}
