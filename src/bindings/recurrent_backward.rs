//! `recurrent_backward`: the gradients of `recurrent`.

use super::array::{Array, Layout};
use super::attention::{View, dispatch_dtype, lse_dtype, writer};
use super::backward::write_all;
use super::recurrent::{Call, Writes};
use super::{enter, result, runtime};
use crate::dtype::{DType, Float};
use crate::error::Error;
use crate::kernels::recurrent::backward::{BackwardArgs, Gradients, backward};
use crate::kernels::recurrent::{Form, RecurrentShape};
use crate::parallel::RowWriter;
use crate::simd::{SimdElement, Wide};
use crate::tensor::shape_text;
use half::{bf16, f16};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple};

/// Tokens of a chunk where none are asked for.
const CHUNK: usize = 64;
/// That with gates of channels, which are worth more than the states that it takes to have fewer of them.
const CHUNK_OF_CHANNELS: usize = 32;

/// A call, the gradients of its results, and arrays for those of its arguments.
struct Backward<'py> {
    call: Call<'py>,
    d_out: Array<'py>,
    d_last: Option<Array<'py>>,
    kept: Option<Array<'py>>,
    /// Of queries, keys and values, then of what else is given.
    found: Vec<Array<'py>>,
}

impl<'py> Backward<'py> {
    fn read(call: Call<'py>, d_out: &Bound<'py, PyAny>, [d_last, kept]: [Option<&Bound<'py, PyAny>>; 2]) -> PyResult<Self> {
        let q = &call.q;
        let read = |arg, object, layout, shape: &[usize], dtype: DType| {
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
        let dtype = q.float()?;
        let wide = lse_dtype(dtype);
        let d_out = read("d_out", d_out, Layout::Rows, call.v.shape(), dtype)?;
        let kept = kept.map(|kept| read("kept", kept, Layout::Rows, call.v.shape(), dtype)).transpose()?;
        if kept.is_none() && call.reads_state() {
            let expected = "what recurrent_and_kept returns, as the rule reads the state".into();
            return Err(Error::Value { arg: "kept", expected, got: "None".into() }.into());
        }
        let RecurrentShape { batch, seqlen, num_value_heads, head_dim, head_dim_v, .. } = call.shape;
        let states = [call.sequences.len(), num_value_heads, head_dim, head_dim_v];
        let d_last = d_last.map(|d_last| read("d_final_state", d_last, Layout::Contiguous, &states, wide)).transpose()?;
        let mut found = Vec::new();
        let mut add = |arg, shape: &[usize], dtype| -> PyResult<()> {
            found.push(result::empty(arg, q, shape, dtype)?);
            Ok(())
        };
        add("q", q.shape(), dtype)?;
        add("k", q.shape(), dtype)?;
        add("v", call.v.shape(), dtype)?;
        let steps = [batch, seqlen, num_value_heads];
        if call.steps.is_some() || call.heads.is_some() {
            add("g", &steps, wide)?;
        }
        if call.channels.is_some() {
            add("gk", &[batch, seqlen, num_value_heads, head_dim], wide)?;
        }
        if call.beta.is_some() {
            add("beta", &steps, wide)?;
        }
        if matches!(call.writes, Writes::LowRank(_)) {
            add("a", q.shape(), dtype)?;
            add("b", q.shape(), dtype)?;
        }
        if call.bonus.is_some() {
            add("u", &[call.shape.num_heads, head_dim], wide)?;
        }
        if call.initial.is_some() {
            add("initial_state", &states, wide)?;
        }
        Ok(Self { call, d_out, d_last, kept, found })
    }

    fn find(&self, arg: &str) -> Option<&Array<'py>> {
        self.found.iter().find(|array| array.arg == arg)
    }

    fn rows<T: SimdElement>(&self, arg: &str) -> Result<Option<RowWriter<'_, T>>, Error> {
        self.find(arg).map(rows).transpose()
    }

    fn per_step<A: SimdElement>(&self, arg: &str) -> Result<Option<RowWriter<'_, A>>, Error> {
        let RecurrentShape { batch, seqlen, num_value_heads: heads, .. } = self.call.shape;
        let write = |array: &'_ Array<'_>| {
            let data = array.memory.slice_mut(array.arg)?;
            Ok(RowWriter::new(data, [batch, seqlen, heads, 1], [seqlen * heads, heads, 1]))
        };
        self.find(arg).map(write).transpose()
    }

    fn run<T: SimdElement>(&self, py: Python<'_>) -> PyResult<()>
    where
        T::Acc: Wide,
    {
        let call = &self.call;
        let RecurrentShape { num_heads, num_value_heads, head_dim, .. } = call.shape;
        let chunk = match call.form {
            Form::Chunks(chunk) => chunk,
            _ if call.channels.is_some() => CHUNK_OF_CHANNELS,
            _ => CHUNK,
        };
        let args = BackwardArgs {
            forward: call.args::<T>()?,
            initial: call.initial.as_ref().map(|initial| call.states(initial)).transpose()?,
            kept: self.kept.as_ref().map(|kept| View::in_order(kept, "")?.tensor()).transpose()?,
            d_out: View::in_order(&self.d_out, "")?.tensor()?,
            d_last: self.d_last.as_ref().map(|last| call.states(last)).transpose()?,
        };
        // Parts of the gradient of the bonus, by sequence, value head and chunk.
        let chunks = call.sequences.iter().map(|sequence| sequence.len.div_ceil(chunk)).max().unwrap_or(0);
        let parts = if call.bonus.is_some() { call.sequences.len() * num_value_heads * chunks * head_dim } else { 0 };
        let mut parts = vec![T::Acc::ZERO; parts];
        let [q, k, v] = [0, 1, 2].map(|i| rows(&self.found[i]));
        let gradients = Gradients {
            q: q?,
            k: k?,
            v: v?,
            gates: match self.rows("gk")? {
                Some(gates) => Some(gates),
                None => self.per_step("g")?,
            },
            beta: self.per_step("beta")?,
            low_rank: self.rows("a")?.zip(self.rows("b")?).map(|(a, b)| [a, b]),
            bonus: call.bonus.is_some().then(|| {
                let strides = [num_value_heads * chunks * head_dim, chunks * head_dim, head_dim];
                RowWriter::new(&mut parts, [call.sequences.len(), num_value_heads, chunks, head_dim], strides)
            }),
            initial: self.find("initial_state").map(|initial| call.state_writer(initial)).transpose()?,
        };
        let (level, threads) = (runtime::level()?, runtime::threads(py)?);
        enter::enter(py, || backward(&args, &gradients, chunk, level, threads))?;
        drop(gradients);
        if let Some(u) = self.find("u") {
            let group = num_value_heads / num_heads.max(1);
            let mut sums = vec![0.0; num_heads * head_dim];
            for (i, part) in parts.iter().enumerate() {
                let (head, channel) = (i / (chunks * head_dim) % num_value_heads / group, i % head_dim);
                sums[head * head_dim + channel] += part.to_f64();
            }
            write_all(u, &sums)?;
        }
        Ok(())
    }
}

fn rows<'a, T: SimdElement>(array: &'a Array<'_>) -> Result<RowWriter<'a, T>, Error> {
    writer(&View::in_order(array, "")?)
}

fn run<T: SimdElement>(py: Python<'_>, call: &Backward<'_>) -> PyResult<()>
where
    T::Acc: Wide,
{
    call.run::<T>(py)
}

/// Gradients, from those of the results and what the call has kept (`given`), by the names in `wrt`, of arguments that are given; that of `g_gamma` is one for each token, `[B, T, HV]`. States are
/// `[N, HV, K, V]`.
#[pyfunction]
#[expect(clippy::needless_pass_by_value, reason = "extracted by PyO3")]
pub fn recurrent_backward<'py>(
    q: &Bound<'py, PyAny>,
    k: &Bound<'py, PyAny>,
    v: &Bound<'py, PyAny>,
    given: (Bound<'py, PyAny>, Option<Bound<'py, PyAny>>, Option<Bound<'py, PyAny>>),
    options: &Bound<'py, PyDict>,
    wrt: Vec<String>,
) -> PyResult<Bound<'py, PyTuple>> {
    let py = q.py();
    let call = Call::read([q, k, v], options)?;
    if call.v_first || call.in_place {
        let arg = if call.in_place { "inplace_final_state" } else { "state_v_first" };
        return Err(Error::Value { arg, expected: "False".into(), got: "True".into() }.into());
    }
    if call.making.is_some() {
        return Err(Error::Value { arg: "step_rates", expected: "None".into(), got: "an array".into() }.into());
    }
    let dtype = call.q.float()?;
    let (d_out, d_final_state, kept) = &given;
    let backward = Backward::read(call, d_out, [d_final_state.as_ref(), kept.as_ref()])?;
    dispatch_dtype!(dtype, run, py, &backward)?;
    let result = |name: &String| {
        let arg = if name == "g_gamma" { "g" } else { name };
        let found = backward.find(arg).ok_or_else(|| {
            let expected = "names of arguments that are given and have gradients".into();
            PyErr::from(Error::Value { arg: "wrt", expected, got: format!("{name:?}") })
        })?;
        Ok(found.object.clone())
    };
    PyTuple::new(py, wrt.iter().map(result).collect::<PyResult<Vec<_>>>()?)
}
