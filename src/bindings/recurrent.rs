//! `recurrent`: the state-space family, whose operators are named in `subquad.ops`.

use super::array::{Array, ElementType, Layout};
use super::attention::{View, check_memory, dispatch_dtype, lse_dtype, writer};
use super::named::Named;
use super::step_sizes::Making;
use super::varlen::starts;
use super::{enter, result, runtime};
use crate::dtype::{DType, Element, Float};
use crate::error::Error;
use crate::kernels::recurrent::{
    BLOCK, Decay, Form, MAX_CHUNK, Numbers, PerStep, RecurrentArgs, RecurrentOut, RecurrentShape, Rule, Sequence, States, forward,
};
use crate::parallel::RowWriter;
use crate::simd::{SimdElement, Wide};
use crate::tensor::{Tensor, shape_text};
use half::{bf16, f16};
use pyo3::prelude::*;
use pyo3::types::PyDict;

/// Most tokens, heads and sequences that are told apart where arrays have no elements.
const MAX_SEQUENCES: usize = 1 << 24;
/// Elements of a state at most: each task has those of its heads in scratch.
const MAX_STATE: usize = 1 << 22;

/// What is written to the state.
pub enum Writes<'py> {
    Values,
    Corrections,
    LowRank(Box<[Array<'py>; 2]>),
}

/// The arguments of a call, checked.
pub struct Call<'py> {
    pub q: Array<'py>,
    pub k: Array<'py>,
    pub v: Array<'py>,
    pub shape: RecurrentShape,
    pub sequences: Vec<Sequence>,
    pub steps: Option<Array<'py>>,
    pub channels: Option<Array<'py>>,
    pub heads: Option<Vec<f64>>,
    pub writes: Writes<'py>,
    pub beta: Option<Array<'py>>,
    pub making: Option<Making>,
    pub bonus: Option<Vec<f64>>,
    pub initial: Option<Array<'py>>,
    pub in_place: bool,
    pub v_first: bool,
    pub scale: f64,
    pub l2norm: bool,
    pub form: Form,
}

fn shape_of(q: &Array<'_>, k: &Array<'_>, v: &Array<'_>) -> Result<RecurrentShape, Error> {
    let q_shape = View::in_order(q, "[B, T, H, K]")?.shape;
    let k_shape = View::in_order(k, "[B, T, H, K]")?.shape;
    let v_shape = View::in_order(v, "[B, T, HV, V]")?.shape;
    let [batch, seqlen, num_heads, head_dim] = q_shape;
    let [_, _, num_value_heads, head_dim_v] = v_shape;
    let wrong = |arg, expected: String, got: [usize; 4]| Err(Error::Shape { arg, expected, got: shape_text(&got) });
    if k_shape != q_shape {
        return wrong(k.arg, format!("{} as {} has", shape_text(&q_shape), q.arg), k_shape);
    }
    let divides = if num_heads == 0 { num_value_heads == 0 } else { num_value_heads.is_multiple_of(num_heads) };
    if v_shape[..2] != q_shape[..2] || !divides {
        return wrong(v.arg, format!("({batch}, {seqlen}, a multiple of {num_heads}, V) as {} has", q.arg), v_shape);
    }
    if head_dim.saturating_mul(head_dim_v) > MAX_STATE {
        let what = format!("{}: a state of {head_dim} x {head_dim_v}", v.arg);
        return Err(Error::Unsupported { what, instead: format!("states of up to {MAX_STATE} elements are") });
    }
    if batch > MAX_SEQUENCES || num_value_heads > MAX_SEQUENCES {
        return Err(Error::Overflow { arg: v.arg, got: shape_text(&v_shape) });
    }
    Ok(RecurrentShape { batch, seqlen, num_heads, num_value_heads, head_dim, head_dim_v })
}

/// The sequences of a batch, or those that are packed one after the other.
///
/// # Errors
/// [`Error::Shape`], or those of [`starts`].
pub(super) fn sequences(
    cu_seqlens: Option<&Bound<'_, PyAny>>,
    like: &Array<'_>,
    [batch, seqlen]: [usize; 2],
) -> PyResult<Vec<Sequence>> {
    let Some(cu_seqlens) = cu_seqlens else {
        return Ok((0..batch).map(|batch| Sequence { batch, first: 0, len: seqlen }).collect());
    };
    if batch != 1 {
        let one_row = [&[1][..], &like.shape()[1..]].concat();
        let expected = format!("{}, as cu_seqlens is given", shape_text(&one_row));
        return Err(Error::Shape { arg: like.arg, expected, got: shape_text(like.shape()) }.into());
    }
    let starts = starts("cu_seqlens", cu_seqlens, like, Some(seqlen))?;
    Ok(starts.windows(2).map(|pair| Sequence { batch: 0, first: pair[0], len: pair[1] - pair[0] }).collect())
}

/// Gates above 0 would make the state grow without bound.
fn check_gates(gates: &Array<'_>) -> PyResult<()> {
    fn highest<T: Element>(gates: &Array<'_>) -> Result<f64, Error> {
        let data = gates.memory.slice::<T>(gates.arg)?;
        let (shape, strides) = (&gates.memory.shape, &gates.memory.strides);
        let (&width, outer) = shape.split_last().expect("ranks are checked");
        let step = strides[outer.len()];
        let mut highest = f64::NEG_INFINITY;
        for mut row in 0..outer.iter().product::<usize>() {
            let mut start = 0;
            for (&n, &stride) in outer.iter().zip(strides).rev() {
                start += row % n * stride;
                row /= n;
            }
            for i in 0..width {
                highest = highest.max(data[start + i * step].to_acc().to_f64());
            }
        }
        Ok(highest)
    }
    let highest = dispatch_dtype!(gates.float()?, highest, gates)?;
    if highest > 0.0 {
        let expected = "natural logarithms of decays, 0 or below".into();
        return Err(Error::Value { arg: gates.arg, expected, got: highest.to_string() }.into());
    }
    Ok(())
}

impl<'py> Call<'py> {
    /// Reads a call.
    ///
    /// # Errors
    /// Those of each argument.
    pub fn read([q, k, v]: [&Bound<'py, PyAny>; 3], options: &Bound<'py, PyDict>) -> PyResult<Self> {
        let named = Named(options);
        let q = Array::import("q", q, Layout::Rows)?;
        let k = Array::import("k", k, Layout::Rows)?;
        let v = Array::import("v", v, Layout::Rows)?;
        q.float()?;
        q.check_same(&k)?;
        q.check_same(&v)?;
        let shape = shape_of(&q, &k, &v)?;
        let RecurrentShape { batch, seqlen, num_heads, num_value_heads, head_dim, head_dim_v } = shape;
        let sequences = sequences(named.get("cu_seqlens")?.as_ref(), &q, [batch, seqlen])?;

        let steps = named.array("g", &q, &[batch, seqlen, num_value_heads], Layout::Any)?;
        let channels = named.array("gk", &q, &[batch, seqlen, num_value_heads, head_dim], Layout::Rows)?;
        for gates in [&steps, &channels].into_iter().flatten() {
            check_gates(gates)?;
        }
        let heads = named.numbers("g_gamma", &q, &[num_value_heads])?;
        if let Some(gate) = heads.iter().flatten().find(|gate| **gate > 0.0) {
            let expected = "natural logarithms of decays, 0 or below".into();
            return Err(Error::Value { arg: "g_gamma", expected, got: gate.to_string() }.into());
        }
        let given = [steps.as_ref().map(|g| g.arg), channels.as_ref().map(|g| g.arg), heads.as_ref().map(|_| "g_gamma")];
        let given: Vec<&'static str> = given.into_iter().flatten().collect();
        if given.len() > 1 {
            let expected = format!("None, as {} is given", given[0]);
            let arg = if given[1] == "gk" { "gk" } else { "g_gamma" };
            return Err(Error::Value { arg, expected, got: "an array".into() }.into());
        }
        let bonus = named.numbers("u", &q, &[num_heads, head_dim])?;
        let beta = named.array("beta", &q, &[batch, seqlen, num_value_heads], Layout::Any)?;
        let making = Making::read(&named, &q, num_value_heads, (beta.is_some(), given.first()))?;
        let writes = match (named.get("a")?, named.get("b")?) {
            (Some(a), Some(b)) => {
                let read = |arg, object: &Bound<'py, PyAny>| -> PyResult<Array<'py>> {
                    let array = Array::import(arg, object, Layout::Rows)?;
                    q.check_same(&array)?;
                    if array.shape() != q.shape() {
                        let expected = format!("{} as q has", shape_text(q.shape()));
                        return Err(Error::Shape { arg, expected, got: shape_text(array.shape()) }.into());
                    }
                    Ok(array)
                };
                Writes::LowRank(Box::new([read("a", &a)?, read("b", &b)?]))
            }
            (Some(_), None) | (None, Some(_)) => {
                let arg = if named.get("a")?.is_some() { "b" } else { "a" };
                return Err(Error::Kind { arg, expected: "an array, as the other one is".into(), got: "None".into() }.into());
            }
            _ if named.flag("delta")? => Writes::Corrections,
            _ => Writes::Values,
        };
        let v_first = named.flag("state_v_first")?;
        let state = if v_first { [head_dim_v, head_dim] } else { [head_dim, head_dim_v] };
        let state = [sequences.len(), num_value_heads, state[0], state[1]];
        let in_place = named.flag("inplace_final_state")?;
        let layout = if in_place { Layout::InPlace } else { Layout::Contiguous };
        let initial = named.array("initial_state", &q, &state, layout)?;
        if in_place {
            check_in_place(initial.as_ref(), &[&q, &k, &v])?;
        }
        let scale = named.get("scale")?.map_or(Ok(1.0 / (head_dim.max(1) as f64).sqrt()), |scale| scale.extract())?;
        let form = match named.get("chunk_size")? {
            None if named.flag("step")? => Form::Steps,
            None => Form::Auto,
            Some(size) => Form::Chunks(chunk_size(size.extract()?)?),
        };
        Ok(Self {
            shape,
            sequences,
            steps,
            channels,
            heads,
            writes,
            beta,
            making,
            bonus,
            initial,
            in_place,
            v_first,
            scale,
            l2norm: named.flag("use_qk_l2norm_in_kernel")?,
            form,
            q,
            k,
            v,
        })
    }

    /// The arguments of the kernels.
    ///
    /// # Errors
    /// Those of the views.
    pub fn args<T: SimdElement>(&self) -> Result<RecurrentArgs<'_, T>, Error> {
        let making = self.making.as_ref().zip(self.beta.as_ref());
        let decay = match (&self.steps, &self.channels, &self.heads, making) {
            (Some(gates), ..) => Decay::Steps(per_step::<T>(gates)?.into()),
            (_, Some(gates), ..) => Decay::Channels(rows::<T>(gates)?),
            (_, _, Some(gates), _) => Decay::Heads(gates),
            (.., Some((making, steps))) => Decay::Steps(PerStep { numbers: per_step::<T>(steps)?, made: Some(making.gates()) }),
            _ => Decay::None,
        };
        let made = self.making.as_ref().map(Making::factors);
        let beta = || self.beta.as_ref().map(|beta| Ok(PerStep { numbers: per_step::<T>(beta)?, made })).transpose();
        let rule = match &self.writes {
            Writes::LowRank(rows) => {
                let [a, b] = &**rows;
                Rule::LowRank { a: View::in_order(a, "")?.tensor()?, b: View::in_order(b, "")?.tensor()? }
            }
            Writes::Corrections => Rule::Delta(beta()?),
            Writes::Values => Rule::Additive(beta()?),
        };
        Ok(RecurrentArgs {
            shape: self.shape,
            q: View::in_order(&self.q, "")?.tensor()?,
            k: View::in_order(&self.k, "")?.tensor()?,
            v: View::in_order(&self.v, "")?.tensor()?,
            decay,
            rule,
            bonus: self.bonus.as_deref(),
            scale: self.scale,
            l2norm: self.l2norm,
            sequences: &self.sequences,
        })
    }

    fn run<T: SimdElement>(&self, py: Python<'_>, results: &Results<'_>) -> PyResult<()>
    where
        T::Acc: Wide,
    {
        let args = self.args::<T>()?;
        let initial = if self.in_place { None } else { self.initial.as_ref().map(|initial| self.states(initial)).transpose()? };
        let last = if self.in_place { self.initial.as_ref() } else { results.last.as_ref() };
        let last = last.map(|last| self.state_writer(last)).transpose()?;
        let states = States { initial, last, in_place: self.in_place, v_first: self.v_first };
        let rows = |array| writer(&View::in_order(array, "")?);
        let out = RecurrentOut { out: rows(&results.out)?, states, kept: results.kept.as_ref().map(rows).transpose()? };
        let (level, threads, form) = (runtime::level()?, runtime::threads(py)?, self.form);
        enter::enter(py, || forward(&args, &out, form, level, threads))
    }

    /// Whether what is written depends on the state.
    pub fn reads_state(&self) -> bool {
        !matches!(self.writes, Writes::Values)
    }

    /// States as rows of all their elements, and the strides of those.
    fn state_shape(&self) -> [[usize; 4]; 2] {
        let (heads, len) = (self.shape.num_value_heads, self.shape.head_dim * self.shape.head_dim_v);
        [[self.sequences.len(), heads, 1, len], [heads * len, len, len, 1]]
    }

    /// The states of a contiguous array, to be written.
    ///
    /// # Errors
    /// Those of the memory.
    pub fn state_writer<'a, A: Float + Element>(&self, array: &'a Array<'_>) -> Result<RowWriter<'a, A>, Error> {
        let [shape, strides] = self.state_shape();
        Ok(RowWriter::new(array.memory.slice_mut(array.arg)?, shape, [strides[0], strides[1], strides[2]]))
    }

    /// The states of a contiguous array.
    ///
    /// # Errors
    /// Those of the memory.
    pub fn states<'a, T: Element>(&self, array: &'a Array<'_>) -> Result<Numbers<'a, T>, Error> {
        let [shape, _] = self.state_shape();
        typed(
            array,
            |array| Tensor::contiguous(array.arg, array.memory.slice(array.arg)?, shape),
            |array| Tensor::contiguous(array.arg, array.memory.slice(array.arg)?, shape),
        )
    }
}

/// Numbers of the type of the inputs, or of their accumulators.
///
/// # Errors
/// Those of what makes them.
pub(super) fn typed<'a, T: Element>(
    array: &'a Array<'_>,
    input: impl Fn(&'a Array<'_>) -> Result<Tensor<'a, T>, Error>,
    acc: impl Fn(&'a Array<'_>) -> Result<Tensor<'a, T::Acc>, Error>,
) -> Result<Numbers<'a, T>, Error> {
    if array.float()? == T::DTYPE { Ok(Numbers::Input(input(array)?)) } else { Ok(Numbers::Acc(acc(array)?)) }
}

fn rows<'a, T: Element>(array: &'a Array<'_>) -> Result<Numbers<'a, T>, Error> {
    typed(array, |array| View::in_order(array, "")?.tensor(), |array| View::in_order(array, "")?.tensor())
}

/// `[B, T, HV]`, as rows of one element.
fn per_step<'a, T: Element>(array: &'a Array<'_>) -> Result<Numbers<'a, T>, Error> {
    fn view<'a>(array: &'a Array<'_>) -> View<'a> {
        let (&[batch, tokens, heads], &[b, t, h]) = (array.shape(), &array.memory.strides[..]) else {
            unreachable!("shapes are checked")
        };
        View { arg: array.arg, memory: &array.memory, offset: 0, shape: [batch, tokens, heads, 1], strides: [b, t, h] }
    }
    typed(array, |array| view(array).tensor(), |array| view(array).tensor())
}

fn check_in_place(initial: Option<&Array<'_>>, inputs: &[&Array<'_>]) -> PyResult<()> {
    let arg = "initial_state";
    let Some(initial) = initial else {
        let expected = "the states, as inplace_final_state is set".into();
        return Err(Error::Value { arg, expected, got: "None".into() }.into());
    };
    let acc = lse_dtype(initial.float()?);
    if initial.element != ElementType::Float(acc) {
        return Err(Error::DType { arg, expected: acc.to_string(), got: initial.element.to_string() }.into());
    }
    if !initial.is_contiguous() {
        let got = format!("{} with strides {:?}", shape_text(initial.shape()), initial.memory.strides);
        return Err(Error::Shape { arg, expected: "with contiguous elements, to be written in place".into(), got }.into());
    }
    Ok(check_memory(initial, inputs)?)
}

fn chunk_size(size: usize) -> Result<usize, Error> {
    if size == 0 || size > MAX_CHUNK || !size.is_multiple_of(BLOCK) {
        let expected = format!("a multiple of {BLOCK} up to {MAX_CHUNK}");
        return Err(Error::Value { arg: "chunk_size", expected, got: size.to_string() });
    }
    Ok(size)
}

/// Arrays for the results of a call.
struct Results<'py> {
    out: Array<'py>,
    /// The states, unless they are written in place.
    last: Option<Array<'py>>,
    /// What the backward needs.
    kept: Option<Array<'py>>,
}

fn run<T: SimdElement>(py: Python<'_>, call: &Call<'_>, results: &Results<'_>) -> PyResult<()>
where
    T::Acc: Wide,
{
    call.run::<T>(py, results)
}

type Arrays<'py> = (Bound<'py, PyAny>, Option<Bound<'py, PyAny>>, Option<Bound<'py, PyAny>>);

fn compute<'py>(
    inputs: [&Bound<'py, PyAny>; 3],
    options: &Bound<'py, PyDict>,
    [output_final_state, keep]: [bool; 2],
) -> PyResult<Arrays<'py>> {
    let py = options.py();
    let call = Call::read(inputs, options)?;
    let dtype = call.q.float()?;
    let RecurrentShape { num_value_heads, head_dim, head_dim_v, .. } = call.shape;
    let [first, second] = if call.v_first { [head_dim_v, head_dim] } else { [head_dim, head_dim_v] };
    let like_values = |arg| result::empty(arg, &call.q, call.v.shape(), dtype);
    let results = Results {
        out: like_values("out")?,
        last: (output_final_state && !call.in_place)
            .then(|| {
                let shape = [call.sequences.len(), num_value_heads, first, second];
                result::empty("final_state", &call.q, &shape, lse_dtype(dtype))
            })
            .transpose()?,
        kept: keep.then(|| like_values("kept")).transpose()?,
    };
    dispatch_dtype!(dtype, run, py, &call, &results)?;
    let Results { out, last, kept } = results;
    let Call { q, initial, in_place, .. } = call;
    let out = result::deliver(&q, out)?;
    let last = match (last, initial) {
        (Some(last), _) => Some(result::deliver(&q, last)?),
        (None, Some(initial)) if in_place => Some(initial.written()?),
        _ => None,
    };
    Ok((out, last, kept.map(|kept| result::deliver(&q, kept)).transpose()?))
}

/// Outputs, and the states after the last token; documented in `subquad.ops.recurrent`.
#[pyfunction]
pub fn recurrent<'py>(
    q: &Bound<'py, PyAny>,
    k: &Bound<'py, PyAny>,
    v: &Bound<'py, PyAny>,
    options: &Bound<'py, PyDict>,
    output_final_state: bool,
) -> PyResult<(Bound<'py, PyAny>, Option<Bound<'py, PyAny>>)> {
    let (out, last, _) = compute([q, k, v], options, [output_final_state, false])?;
    Ok((out, last))
}

/// As [`recurrent`], with the states, for rules that read the state, and what their backward needs besides: `kept`, like the values.
#[pyfunction]
pub fn recurrent_and_kept<'py>(
    q: &Bound<'py, PyAny>,
    k: &Bound<'py, PyAny>,
    v: &Bound<'py, PyAny>,
    options: &Bound<'py, PyDict>,
) -> PyResult<Arrays<'py>> {
    compute([q, k, v], options, [true, true])
}
