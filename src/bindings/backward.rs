//! `attention_backward`: the gradients of `attention`.

use super::array::{Array, Layout};
use super::attention::{View, dispatch_dtype, lse_dtype, writer};
use super::inputs::{Inputs, Named};
use super::{enter, result, runtime};
use crate::dtype::{DType, Element, Float};
use crate::error::Error;
use crate::kernels::exact::ExactArgs;
use crate::kernels::exact::backward::sums::{SumTable, score_sums, sink_sums};
use crate::kernels::exact::backward::{self, BackwardArgs, Gradients, RowsMut};
use crate::parallel::RowWriter;
use crate::simd::SimdElement;
use crate::tensor::{AttnShape, shape_text};
use half::{bf16, f16};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple};

/// A forward call with its results and their gradients.
pub trait Differentiable<'py> {
    /// Queries, whose library results belong to.
    fn like(&self) -> &Array<'py>;
    /// The arguments of the kernels.
    ///
    /// # Errors
    /// Those of the views.
    fn args<T: SimdElement>(&self) -> Result<BackwardArgs<'_, T>, Error>;
    /// A gradient of queries, keys or values as `[B, S, H, D]`.
    ///
    /// # Errors
    /// [`Error::Shape`] for another rank.
    fn view<'a>(&self, array: &'a Array<'_>) -> Result<View<'a>, Error>;
    /// Where the entries of a bias or of slopes lie, in an array of that shape.
    fn table(&self, name: &str, shape: &[usize]) -> SumTable;
}

/// The results of the forward and their gradients.
pub struct Results<'py> {
    d_out: Array<'py>,
    out: Array<'py>,
    lse: Array<'py>,
    d_lse: Option<Array<'py>>,
}

impl<'py> Results<'py> {
    /// Reads `do`, `out`, `lse` and `dlse` of a call on `q` with results of those shapes.
    ///
    /// # Errors
    /// Those of each.
    pub fn read(
        q: &Array<'py>,
        [d_out, out, lse]: [&Bound<'py, PyAny>; 3],
        d_lse: Option<&Bound<'py, PyAny>>,
        (of_out, of_lse): (&[usize], &[usize]),
    ) -> PyResult<Self> {
        let dtype = q.float()?;
        let read = |arg, object, layout, shape: &[usize], dtype| {
            let array = Array::import(arg, object, layout)?;
            q.check_kind(&array)?;
            if array.shape() != shape {
                return Err(Error::Shape { arg, expected: shape_text(shape), got: shape_text(array.shape()) }.into());
            }
            match array.float()? {
                own if own == dtype => Ok(array),
                own => Err(PyErr::from(Error::DType { arg, expected: dtype.to_string(), got: own.to_string() })),
            }
        };
        let wide = lse_dtype(dtype);
        Ok(Self {
            d_out: read("do", d_out, Layout::Rows, of_out, dtype)?,
            out: read("out", out, Layout::Rows, of_out, dtype)?,
            lse: read("lse", lse, Layout::Any, of_lse, wide)?,
            d_lse: d_lse.map(|d_lse| read("dlse", d_lse, Layout::Any, of_lse, wide)).transpose()?,
        })
    }

    /// The arguments of the kernels; views are of results, and of log-sum-exps.
    ///
    /// # Errors
    /// Those of the views.
    pub fn args<'a, T: SimdElement>(
        &'a self,
        forward: &ExactArgs<'a, T>,
        of_out: impl Fn(&'a Array<'_>) -> Result<View<'a>, Error>,
        of_lse: impl Fn(&'a Array<'_>) -> View<'a>,
    ) -> Result<BackwardArgs<'a, T>, Error> {
        Ok(BackwardArgs {
            forward: *forward,
            out: of_out(&self.out)?.tensor()?,
            d_out: of_out(&self.d_out)?.tensor()?,
            lse: of_lse(&self.lse).tensor()?,
            d_lse: self.d_lse.as_ref().map(|d_lse| of_lse(d_lse).tensor()).transpose()?,
        })
    }
}

/// The rows of a gradient, if it is asked for.
///
/// # Errors
/// Those of the memory.
pub fn rows<'a, 'py, T: SimdElement>(
    call: &impl Differentiable<'py>,
    array: Option<&'a Array<'_>>,
) -> Result<Option<RowWriter<'a, T>>, Error> {
    array.map(|array| writer(&call.view(array)?)).transpose()
}

/// Gradients of queries, keys and values, as far as they are asked for.
fn run<'py, T: SimdElement>(py: Python<'_>, call: &impl Differentiable<'py>, into: [Option<&Array<'_>>; 3]) -> PyResult<()> {
    if into.iter().all(Option::is_none) {
        return Ok(());
    }
    let args = call.args::<T>()?;
    let [q, k, v] = into;
    let q = q.map(|q| -> Result<_, Error> {
        let View { arg, memory, shape, strides, .. } = call.view(q)?;
        Ok(RowsMut { data: memory.slice_mut(arg)?, shape, strides })
    });
    let (k, v) = (rows(call, k)?, rows(call, v)?);
    let gradients = Gradients { q: q.transpose()?, k: k.as_ref(), v: v.as_ref() };
    let (level, threads, blocking) = (runtime::level()?, runtime::threads(py)?, runtime::blocking()?);
    enter::enter(py, || backward::backward(&args, gradients, level, threads, blocking))
}

/// The gradient of a bias or of slopes, written to `into`, which is contiguous.
fn run_sums<'py, T: SimdElement>(
    py: Python<'_>,
    call: &impl Differentiable<'py>,
    table: &SumTable,
    into: &Array<'_>,
) -> PyResult<()> {
    let args = call.args::<T>()?;
    let mut sums = vec![T::Acc::ZERO; table.len()];
    let (level, threads, blocking) = (runtime::level()?, runtime::threads(py)?, runtime::blocking()?);
    enter::enter(py, || score_sums(&args, table, &mut sums, level, threads, blocking))?;
    write_all(into, &sums)
}

fn run_sinks<'py, T: SimdElement>(py: Python<'_>, call: &impl Differentiable<'py>, into: &Array<'_>) -> PyResult<()> {
    let args = call.args::<T>()?;
    let mut sums = vec![0.0; into.shape().iter().product()];
    enter::enter(py, || sink_sums(&args, &mut sums))?;
    write_all(into, &sums)
}

/// Rounds numbers into a contiguous array.
///
/// # Errors
/// Those of the memory.
pub fn write_all<A: Float>(into: &Array<'_>, numbers: &[A]) -> PyResult<()> {
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

/// The gradients of the arguments of the names in `wrt`, of which `objects` are those that have one.
///
/// # Errors
/// [`Error::Value`] for names that are not among the objects, given twice, or whose argument is not given.
pub fn gradients<'py>(
    py: Python<'py>,
    call: &impl Differentiable<'py>,
    wrt: &[String],
    objects: &[(&'static str, Option<&Bound<'py, PyAny>>)],
) -> PyResult<Bound<'py, PyTuple>> {
    let wrong = |expected: String, got: String| PyErr::from(Error::Value { arg: "wrt", expected, got });
    let mut made = Vec::with_capacity(wrt.len());
    for (index, name) in wrt.iter().enumerate() {
        if wrt[..index].contains(name) {
            return Err(wrong("each name once".into(), format!("{name:?} twice")));
        }
        let Some((arg, object)) = objects.iter().find(|(known, _)| known == name) else {
            let names: Vec<_> = objects.iter().map(|(name, _)| *name).collect();
            return Err(wrong(format!("names of {}", names.join(", ")), format!("{name:?}")));
        };
        let object = object.ok_or_else(|| wrong("names of arguments that are given".into(), format!("{name:?}")))?;
        let of = Array::import(arg, object, Layout::Any)?;
        made.push(result::empty(arg, call.like(), of.shape(), of.float()?)?);
    }
    let find = |arg: &str| made.iter().find(|array| array.arg == arg);
    let dtype = call.like().float()?;
    dispatch_dtype!(dtype, run, py, call, [find("q"), find("k"), find("v")])?;
    for name in ["bias", "relative_bias", "alibi_slopes"] {
        if let Some(into) = find(name) {
            let table = call.table(name, into.shape());
            dispatch_dtype!(dtype, run_sums, py, call, &table, into)?;
        }
    }
    if let Some(into) = find("sinks") {
        dispatch_dtype!(dtype, run_sinks, py, call, into)?;
    }
    let made = made.into_iter().map(|array| result::deliver(call.like(), array)).collect::<PyResult<Vec<_>>>()?;
    PyTuple::new(py, made)
}

/// A call of `attention`.
pub struct Dense<'py> {
    /// Its arguments.
    pub inputs: Inputs<'py>,
    results: Results<'py>,
}

impl<'py> Dense<'py> {
    /// Reads the arguments of a call, its results and their gradients.
    ///
    /// # Errors
    /// Those of each.
    pub fn read(
        qkv: [&Bound<'py, PyAny>; 3],
        results: [&Bound<'py, PyAny>; 3],
        d_lse: Option<&Bound<'py, PyAny>>,
        named: &Named<'py>,
    ) -> PyResult<Self> {
        let inputs = Inputs::read(qkv, &named.asked())?;
        if inputs.options.mods().reweighting.is_some() {
            let (what, instead) = ("normalizer: the gradient of Softplus(reweight=...)", "that of Softplus() is");
            return Err(Error::Unsupported { what: what.into(), instead: instead.into() }.into());
        }
        let AttnShape { batch, seqlen_q, num_heads, head_dim_v, .. } = inputs.shape;
        let shapes = (&[batch, seqlen_q, num_heads, head_dim_v][..], &[batch, num_heads, seqlen_q][..]);
        let results = Results::read(&inputs.q, results, d_lse, shapes)?;
        Ok(Self { inputs, results })
    }
}

impl<'py> Differentiable<'py> for Dense<'py> {
    fn like(&self) -> &Array<'py> {
        &self.inputs.q
    }

    fn args<T: SimdElement>(&self) -> Result<BackwardArgs<'_, T>, Error> {
        let forward = self.inputs.call()?.args()?;
        self.results.args(&forward, |out| self.view(out), |lse| View::of_lse(lse, &self.inputs.shape))
    }

    fn view<'a>(&self, array: &'a Array<'_>) -> Result<View<'a>, Error> {
        View::in_order(array, "[B, S, H, D]")
    }

    fn table(&self, name: &str, shape: &[usize]) -> SumTable {
        let AttnShape { seqlen_q, .. } = self.inputs.shape;
        let axis = |from_end: usize| shape.len().checked_sub(from_end).map_or(1, |axis| shape[axis]);
        match name {
            "alibi_slopes" => SumTable::slopes(axis(2), axis(1)),
            "relative_bias" => SumTable {
                heads: shape[0],
                per_head: shape[1],
                origin: seqlen_q.saturating_sub(1),
                token_stride: -1,
                key_stride: 1,
                batches: 1,
                is_slope: false,
            },
            _ => {
                let (tokens, keys) = (axis(2), axis(1));
                SumTable {
                    batches: axis(4),
                    heads: axis(3),
                    per_head: tokens * keys,
                    origin: 0,
                    token_stride: if tokens > 1 { keys as isize } else { 0 },
                    key_stride: isize::from(keys > 1),
                    is_slope: false,
                }
            }
        }
    }
}

/// Gradients of `attention`; documented in `subquad.ops.backward`.
#[pyfunction]
#[expect(clippy::too_many_arguments, reason = "the Python signature")]
#[expect(clippy::needless_pass_by_value, reason = "extracted by PyO3")]
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
    let named = Named::read(options)?;
    let call = Dense::read([q, k, v], [d_out, out, lse], d_lse, &named)?;
    let objects = [
        ("q", Some(q)),
        ("k", Some(k)),
        ("v", Some(v)),
        ("bias", named.bias.as_ref()),
        ("relative_bias", named.relative_bias.as_ref()),
        ("alibi_slopes", named.alibi_slopes.as_ref()),
        ("sinks", named.sinks.as_ref()),
    ];
    gradients(q.py(), &call, &wrt, &objects)
}
