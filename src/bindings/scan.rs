//! `selective_state_update`, one step of a state space in place, and `linear_scan`, HGRN's and Griffin's recurrence.

use super::array::{Array, Layout};
use super::attention::{check_memory, dispatch_dtype, lse_dtype};
use super::named::{Named, check_numbers, numbers_of};
use super::recurrent::{sequences, typed};
use super::{enter, integers, result, runtime};
use crate::dtype::{DType, Element};
use crate::error::Error;
use crate::kernels::recurrent::{Numbers, Sequence};
use crate::kernels::scan::linear::{self, Gates, LinearArgs, LinearBackwardArgs, LinearGradients, LinearOut, NumbersOut};
use crate::kernels::scan::step::{Parameter, States, StepArgs, StepShape, Strided, update};
use crate::parallel::{PieceWriter, RowWriter};
use crate::simd::{SimdElement, Wide};
use crate::tensor::{Tensor, shape_text};
use half::{bf16, f16};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple};
use std::collections::HashSet;

/// The arguments of a step, checked.
struct Step<'py> {
    shape: StepShape,
    state: Array<'py>,
    x: Array<'py>,
    dt: Array<'py>,
    a: Array<'py>,
    b: Array<'py>,
    c: Array<'py>,
    d: Option<Array<'py>>,
    z: Option<Array<'py>>,
    dt_bias: Option<Array<'py>>,
    dt_softplus: bool,
    rows: Vec<Option<usize>>,
}

/// The state that each row of inputs belongs to.
fn rows(indices: Option<&Bound<'_, PyAny>>, batch: usize, states: usize) -> PyResult<Vec<Option<usize>>> {
    let arg = "state_batch_indices";
    let Some(indices) = indices else { return Ok((0..batch).map(Some).collect()) };
    let (_, indices) = integers::read_signed(arg, indices, &[Some(batch)], &format!("({batch},), one for each row of x"))?;
    let mut seen = HashSet::new();
    let row = |index: i64| match usize::try_from(index) {
        Err(_) => Ok(None),
        Ok(row) if row < states && seen.insert(row) => Ok(Some(row)),
        Ok(row) => {
            let expected = format!("numbers of {states} states, each at most once, or negative ones");
            Err(Error::Value { arg, expected, got: row.to_string() }.into())
        }
    };
    indices.into_iter().map(row).collect()
}

impl<'py> Step<'py> {
    fn read([state, x, dt, a, b, c]: [&Bound<'py, PyAny>; 6], options: &Bound<'py, PyDict>) -> PyResult<Self> {
        let named = Named(options);
        let x = Array::import("x", x, Layout::Any)?;
        let dtype = x.float()?;
        let state = Array::import("state", state, Layout::InPlace)?;
        x.check_kind(&state)?;
        check_numbers(&state, dtype)?;
        let (count, heads, channels, states) = match *state.shape() {
            [count, channels, states] => (count, None, channels, states),
            [count, heads, channels, states] => (count, Some(heads), channels, states),
            _ => {
                let expected = "of rank 3 or 4, (S, D, N) or (S, H, D, N)".into();
                return Err(Error::Shape { arg: "state", expected, got: shape_text(state.shape()) }.into());
            }
        };
        let of_head: Vec<usize> = heads.into_iter().chain([channels]).collect();
        let indices = named.get("state_batch_indices")?;
        let batch = if indices.is_none() { count } else { x.shape().first().copied().unwrap_or(0) };
        let of_row: Vec<usize> = std::iter::once(batch).chain(of_head.iter().copied()).collect();
        if x.shape() != of_row {
            let rows = if indices.is_none() { count.to_string() } else { "B".into() };
            let expected =
                if heads.is_some() { format!("({rows}, {}, {channels})", of_head[0]) } else { format!("({rows}, {channels})") };
            let expected = format!("{expected} as state has");
            return Err(Error::Shape { arg: "x", expected, got: shape_text(x.shape()) }.into());
        }
        let rates: Vec<usize> = of_head.iter().copied().chain([states]).collect();
        let factors = |arg, object: &Bound<'py, PyAny>| -> PyResult<Array<'py>> {
            let array = Array::import(arg, object, Layout::Rows)?;
            x.check_same(&array)?;
            let (fits, expected) = match (heads, array.shape()) {
                (None, shape) => (shape == [batch, states], shape_text(&[batch, states])),
                (Some(heads), &[b, g, n]) => (
                    b == batch && n == states && g > 0 && heads.is_multiple_of(g),
                    format!("({batch}, a divisor of {heads}, {states})"),
                ),
                (Some(heads), _) => (false, format!("({batch}, a divisor of {heads}, {states})")),
            };
            if !fits {
                return Err(Error::Shape { arg, expected, got: shape_text(array.shape()) }.into());
            }
            Ok(array)
        };
        let (b, c) = (factors("B", b)?, factors("C", c)?);
        if b.shape() != c.shape() {
            let expected = format!("{} as B has", shape_text(b.shape()));
            return Err(Error::Shape { arg: "C", expected, got: shape_text(c.shape()) }.into());
        }
        let groups = if heads.is_some() { b.shape()[1] } else { 1 };
        let rows = rows(indices.as_ref(), batch, count)?;
        let z = named.array("z", &x, &of_row, Layout::Any)?;
        if let Some(z) = &z {
            x.check_same(z)?;
        }
        let step = Self {
            shape: StepShape { batch, heads: heads.unwrap_or(1), groups, channels, states },
            dt: numbers_of("dt", dt, &x, &of_row, Layout::Any)?,
            a: numbers_of("A", a, &x, &rates, Layout::Any)?,
            d: named.array("D", &x, &of_head, Layout::Any)?,
            dt_bias: named.array("dt_bias", &x, &of_head, Layout::Any)?,
            dt_softplus: named.flag("dt_softplus")?,
            state,
            x,
            b,
            c,
            z,
            rows,
        };
        let others = [Some(&step.x), Some(&step.dt), Some(&step.a), Some(&step.b), Some(&step.c)];
        let options = [step.d.as_ref(), step.z.as_ref(), step.dt_bias.as_ref()];
        check_memory(&step.state, &others.into_iter().chain(options).flatten().collect::<Vec<_>>())?;
        Ok(step)
    }

    /// Strides of an array as one of `[B, H, P, N]`, whose axes from `first` on it has; without heads there is one.
    fn strides(&self, array: &Array<'_>, first: usize, last: usize) -> [usize; 4] {
        let has_heads = self.state.shape().len() == 4;
        let mut strides = [0; 4];
        let axes = (first..=last).filter(|&axis| axis != 1 || has_heads);
        for (axis, &stride) in axes.zip(&array.memory.strides) {
            strides[axis] = stride;
        }
        strides
    }

    fn strided<'a, T: Element>(&self, array: &'a Array<'_>, first: usize, last: usize) -> Result<Strided<'a, T>, Error> {
        let StepShape { batch, heads, channels, states, .. } = self.shape;
        let all = [batch, heads, channels, states];
        let shape = std::array::from_fn(|axis| if (first..=last).contains(&axis) { all[axis] } else { 1 });
        Strided::new(array.arg, array.memory.slice(array.arg)?, shape, self.strides(array, first, last))
    }

    fn parameter<'a, T: Element>(&self, array: &'a Array<'_>, first: usize, last: usize) -> Result<Parameter<'a, T>, Error> {
        Ok(if array.float()? == T::DTYPE {
            Parameter::Input(self.strided(array, first, last)?)
        } else {
            Parameter::Acc(self.strided(array, first, last)?)
        })
    }

    fn factors<'a, T: Element>(&self, array: &'a Array<'_>) -> Result<Tensor<'a, T>, Error> {
        let StepShape { batch, groups, states, .. } = self.shape;
        let strides = &array.memory.strides;
        let of_group = if array.shape().len() == 3 { strides[1] } else { 0 };
        Tensor::new(array.arg, array.memory.slice(array.arg)?, [batch, 1, groups, states], [strides[0], 0, of_group])
    }

    fn states<E: Element>(&self) -> Result<RowWriter<'_, E>, Error> {
        let StepShape { heads, channels, states, .. } = self.shape;
        let [s, h, p, _] = self.strides(&self.state, 0, 3);
        Ok(RowWriter::new(self.state.memory.slice_mut("state")?, [self.state.shape()[0], heads, channels, states], [s, h, p]))
    }

    fn run<T: SimdElement>(&self, py: Python<'_>, out: &Array<'_>) -> PyResult<()>
    where
        T::Acc: Wide,
    {
        let of_channels = |array| self.parameter(array, 1, 2);
        let args = StepArgs::<T> {
            shape: self.shape,
            x: self.strided(&self.x, 0, 2)?,
            dt: self.parameter(&self.dt, 0, 2)?,
            a: self.parameter(&self.a, 1, 3)?,
            b: self.factors(&self.b)?,
            c: self.factors(&self.c)?,
            d: self.d.as_ref().map(of_channels).transpose()?,
            z: self.z.as_ref().map(|z| self.strided(z, 0, 2)).transpose()?,
            dt_bias: self.dt_bias.as_ref().map(of_channels).transpose()?,
            dt_softplus: self.dt_softplus,
            rows: &self.rows,
        };
        let states = if self.state.float()? == T::DTYPE { States::Input(self.states()?) } else { States::Acc(self.states()?) };
        let StepShape { batch, heads, channels, .. } = self.shape;
        let shape = [batch, 1, heads, channels];
        let out = PieceWriter::new(out.memory.slice_mut(out.arg)?, shape, [heads * channels, heads * channels, channels]);
        let (level, threads) = (runtime::level()?, runtime::threads(py)?);
        enter::enter(py, || update(&args, &states, &out, level, threads))
    }
}

fn run_step<T: SimdElement>(py: Python<'_>, step: &Step<'_>, out: &Array<'_>) -> PyResult<()>
where
    T::Acc: Wide,
{
    step.run::<T>(py, out)
}

/// One step of a state space, the states in place; documented in `subquad.ops.selective_scan`.
#[pyfunction]
#[expect(non_snake_case, reason = "the operator's names")]
pub fn selective_state_update<'py>(
    state: &Bound<'py, PyAny>,
    x: &Bound<'py, PyAny>,
    dt: &Bound<'py, PyAny>,
    A: &Bound<'py, PyAny>,
    B: &Bound<'py, PyAny>,
    C: &Bound<'py, PyAny>,
    options: &Bound<'py, PyDict>,
) -> PyResult<Bound<'py, PyAny>> {
    let py = x.py();
    let step = Step::read([state, x, dt, A, B, C], options)?;
    let dtype = step.x.float()?;
    let out = result::empty("out", &step.x, step.x.shape(), dtype)?;
    dispatch_dtype!(dtype, run_step, py, &step, &out)?;
    let Step { state, x, .. } = step;
    state.written()?;
    result::deliver(&x, out)
}

/// `[B, T, D]` or `[N, D]`, as rows of `[B, T, 1, D]` or `[N, 1, 1, D]`.
fn row_axes(array: &Array<'_>) -> [[usize; 4]; 2] {
    match (array.shape(), &array.memory.strides[..]) {
        (&[b, t, d], &[sb, st, _]) => [[b, t, 1, d], [sb, st, 0, 1]],
        (&[n, d], &[sn, _]) => [[n, 1, 1, d], [sn, 0, 0, 1]],
        _ => unreachable!("ranks are checked"),
    }
}

fn row_tensor<'a, E: Element>(array: &'a Array<'_>) -> Result<Tensor<'a, E>, Error> {
    let [shape, [a, b, c, _]] = row_axes(array);
    Tensor::new(array.arg, array.memory.slice(array.arg)?, shape, [a, b, c])
}

fn row_numbers<'a, T: Element>(array: &'a Array<'_>) -> Result<Numbers<'a, T>, Error> {
    typed(array, row_tensor, row_tensor)
}

fn row_pieces<'a, E: Element>(array: &Array<'_>) -> Result<PieceWriter<'a, E>, Error> {
    let [shape, [a, b, c, _]] = row_axes(array);
    Ok(PieceWriter::new(array.memory.slice_mut(array.arg)?, shape, [a, b, c]))
}

fn row_numbers_out<'a, T: Element>(array: &Array<'_>) -> Result<NumbersOut<'a, T>, Error> {
    Ok(if array.float()? == T::DTYPE { NumbersOut::Input(row_pieces(array)?) } else { NumbersOut::Acc(row_pieces(array)?) })
}

/// The arguments of a linear scan, checked; `x` is a result in the backward pass.
struct Linear<'py> {
    x: Array<'py>,
    g: Array<'py>,
    initial: Option<Array<'py>>,
    gates: Gates,
    sequences: Vec<Sequence>,
}

impl<'py> Linear<'py> {
    fn read(
        (arg, x): (&'static str, &Bound<'py, PyAny>),
        g: &Bound<'py, PyAny>,
        initial: Option<&Bound<'py, PyAny>>,
        cu_seqlens: Option<&Bound<'py, PyAny>>,
        log_gates: bool,
    ) -> PyResult<Self> {
        let x = Array::import(arg, x, Layout::Rows)?;
        x.float()?;
        let &[batch, tokens, channels] = x.shape() else {
            return Err(Error::Shape { arg, expected: "of rank 3, (B, T, D)".into(), got: shape_text(x.shape()) }.into());
        };
        if batch > MOST || channels > MOST {
            return Err(Error::Overflow { arg, got: shape_text(x.shape()) }.into());
        }
        let g = numbers_of("g", g, &x, x.shape(), Layout::Rows)?;
        let sequences = sequences(cu_seqlens, &x, [batch, tokens])?;
        let shape = [sequences.len(), channels];
        let initial = initial.map(|initial| numbers_of("initial_state", initial, &x, &shape, Layout::Rows)).transpose()?;
        Ok(Self { x, g, initial, gates: if log_gates { Gates::Logs } else { Gates::Factors }, sequences })
    }

    fn args<T: Element>(&self) -> Result<LinearArgs<'_, T>, Error> {
        Ok(LinearArgs {
            x: row_tensor(&self.x)?,
            g: row_numbers(&self.g)?,
            gates: self.gates,
            initial: self.initial.as_ref().map(row_numbers).transpose()?,
            sequences: &self.sequences,
        })
    }
}

/// Most rows and channels that are told apart where arrays have no elements.
const MOST: usize = 1 << 24;

fn run_linear<T: SimdElement>(py: Python<'_>, call: &Linear<'_>, out: &Array<'_>, last: Option<&Array<'_>>) -> PyResult<()>
where
    T::Acc: Wide,
{
    let args = call.args::<T>()?;
    let out = LinearOut { out: row_pieces(out)?, last: last.map(row_pieces).transpose()? };
    let (level, threads) = (runtime::level()?, runtime::threads(py)?);
    enter::enter(py, || linear::forward(&args, &out, level, threads))
}

/// `h_t = f_t h_(t-1) + x_t` and the last `h` of each sequence; documented in `subquad.ops.hgrn`.
#[pyfunction]
pub fn linear_scan<'py>(
    x: &Bound<'py, PyAny>,
    g: &Bound<'py, PyAny>,
    initial_state: Option<&Bound<'py, PyAny>>,
    cu_seqlens: Option<&Bound<'py, PyAny>>,
    log_gates: bool,
    output_final_state: bool,
) -> PyResult<(Bound<'py, PyAny>, Option<Bound<'py, PyAny>>)> {
    let py = x.py();
    let call = Linear::read(("x", x), g, initial_state, cu_seqlens, log_gates)?;
    let dtype = call.x.float()?;
    let out = result::empty("out", &call.x, call.x.shape(), dtype)?;
    let shape = [call.sequences.len(), call.x.shape()[2]];
    let last = output_final_state.then(|| result::empty("final_state", &call.x, &shape, lse_dtype(dtype))).transpose()?;
    dispatch_dtype!(dtype, run_linear, py, &call, &out, last.as_ref())?;
    let last = last.map(|last| result::deliver(&call.x, last)).transpose()?;
    Ok((result::deliver(&call.x, out)?, last))
}

fn run_linear_backward<T: SimdElement>(
    py: Python<'_>,
    call: &Linear<'_>,
    d_out: &Array<'_>,
    d_last: Option<&Array<'_>>,
    wrt: &[String],
    into: &[Array<'_>],
) -> PyResult<()>
where
    T::Acc: Wide,
{
    let forward = call.args::<T>()?;
    let d_last = d_last.map(row_numbers).transpose()?;
    let args = LinearBackwardArgs { forward, out: forward.x, d_out: row_tensor(d_out)?, d_last };
    let found = |name: &str| wrt.iter().position(|wanted| wanted == name).map(|i| &into[i]);
    let gradients = LinearGradients {
        x: found("x").map(row_pieces).transpose()?,
        g: found("g").map(row_numbers_out).transpose()?,
        initial: found("initial_state").map(row_numbers_out).transpose()?,
    };
    let (level, threads) = (runtime::level()?, runtime::threads(py)?);
    enter::enter(py, || linear::backward(&args, &gradients, level, threads))
}

/// Gradients of a call of `linear_scan`, in the order of `wrt`.
#[pyfunction]
#[expect(clippy::too_many_arguments, clippy::needless_pass_by_value, reason = "the operator's arguments")]
pub fn linear_scan_backward<'py>(
    d_out: &Bound<'py, PyAny>,
    d_final_state: Option<&Bound<'py, PyAny>>,
    out: &Bound<'py, PyAny>,
    g: &Bound<'py, PyAny>,
    initial_state: Option<&Bound<'py, PyAny>>,
    cu_seqlens: Option<&Bound<'py, PyAny>>,
    log_gates: bool,
    wrt: Vec<String>,
) -> PyResult<Bound<'py, PyTuple>> {
    let py = out.py();
    let call = Linear::read(("out", out), g, initial_state, cu_seqlens, log_gates)?;
    let dtype = call.x.float()?;
    let d_out = numbers_of("d_out", d_out, &call.x, call.x.shape(), Layout::Rows)?;
    call.x.check_same(&d_out)?;
    let shape = [call.sequences.len(), call.x.shape()[2]];
    let d_last = d_final_state.map(|d_last| numbers_of("d_final_state", d_last, &call.x, &shape, Layout::Rows)).transpose()?;
    let mut into = Vec::with_capacity(wrt.len());
    for (i, name) in wrt.iter().enumerate() {
        let array = match &name[..] {
            "x" => Some(&call.x),
            "g" => Some(&call.g),
            "initial_state" => call.initial.as_ref(),
            _ => None,
        };
        let array = array.filter(|_| !wrt[..i].contains(name)).ok_or_else(|| Error::Value {
            arg: "wrt",
            expected: "names of arguments that are given, each at most once".into(),
            got: name.clone(),
        })?;
        into.push(result::empty("gradient", &call.x, array.shape(), array.float()?)?);
    }
    dispatch_dtype!(dtype, run_linear_backward, py, &call, &d_out, d_last.as_ref(), &wrt, &into)?;
    let gradients = into.into_iter().map(|array| result::deliver(&call.x, array)).collect::<PyResult<Vec<_>>>()?;
    PyTuple::new(py, gradients)
}
