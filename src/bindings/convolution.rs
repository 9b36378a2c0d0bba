//! `causal_conv1d` and its gradients.

use super::array::{Array, Layout};
use super::attention::{check_memory, dispatch_dtype};
use super::named::numbers_of;
use super::varlen::starts;
use super::{enter, integers, result, runtime};
use crate::dtype::{DType, Element};
use crate::error::Error;
use crate::kernels::convolution::{
    ConvArgs, ConvGradients, ConvGradientsOut, ConvOut, ConvShape, FilterGradients, Order, Run, Values, backward, forward,
    rows_of,
};
use crate::parallel::RowWriter;
use crate::simd::{SimdElement, Wide};
use crate::tensor::{Tensor, shape_text};
use half::{bf16, f16};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple};

/// Widest filter.
const MAX_WIDTH: usize = 1024;
/// Most rows of a batch that are told apart where arrays have no elements.
const MAX_SEQUENCES: usize = 1 << 24;

/// Filters, `[D, W]`, and biases, `[D]`, that go with inputs of so many channels.
///
/// # Errors
/// Those of [`numbers_of`], and [`Error::Unsupported`] for wide filters.
pub fn filters<'py>(
    x: &Array<'py>,
    channels: usize,
    weight: &Bound<'py, PyAny>,
    bias: Option<&Bound<'py, PyAny>>,
) -> PyResult<(Array<'py>, Option<Array<'py>>, usize)> {
    let expected = || format!("({channels}, W) with W of 1 or more, a filter for each channel of {}", x.arg);
    let width = match *Array::import("weight", weight, Layout::Any)?.shape() {
        [own, width] if own == channels && width > 0 => width,
        ref got => return Err(Error::Shape { arg: "weight", expected: expected(), got: shape_text(got) }.into()),
    };
    if width > MAX_WIDTH {
        let instead = format!("filters of 1 to {MAX_WIDTH} taps are");
        return Err(Error::Unsupported { what: format!("weight: a filter of {width} taps"), instead }.into());
    }
    let weight = numbers_of("weight", weight, x, &[channels, width], Layout::Any)?;
    let bias = bias.map(|bias| numbers_of("bias", bias, x, &[channels], Layout::Any)).transpose()?;
    Ok((weight, bias, width))
}

/// Reads an array of up to three axes, each number by itself.
///
/// # Errors
/// Those of the memory.
pub fn values<'a, T: Element>(array: &'a Array<'_>) -> Result<Values<'a, T>, Error> {
    let (mut shape, mut strides) = ([1; 3], [0; 3]);
    shape[..array.shape().len()].copy_from_slice(array.shape());
    strides[..array.shape().len()].copy_from_slice(&array.memory.strides);
    let (arg, memory) = (array.arg, &array.memory);
    if array.float()? == T::DTYPE {
        Values::of_inputs(arg, memory.slice(arg)?, shape, strides)
    } else {
        Values::of_sums(arg, memory.slice(arg)?, shape, strides)
    }
}

fn option<'py>(options: &Bound<'py, PyDict>, name: &str) -> PyResult<Option<Bound<'py, PyAny>>> {
    Ok(options.get_item(name)?.filter(|object| !object.is_none()))
}

/// The arguments of a call, checked.
struct Call<'py> {
    shape: ConvShape,
    order: Order,
    x: Array<'py>,
    weight: Array<'py>,
    bias: Option<Array<'py>>,
    residual: Option<Array<'py>>,
    initial: Option<Array<'py>>,
    silu: bool,
    runs: Vec<Run>,
    /// Number of states.
    states: usize,
}

/// Runs of tokens with the same number, row by row. What was before the first token is of sequence 0; negative numbers are of none.
fn numbered_runs(numbers: &[i64], [batch, seqlen]: [usize; 2]) -> Vec<Run> {
    let mut runs = Vec::new();
    for row in 0..batch {
        let numbers = &numbers[row * seqlen..(row + 1) * seqlen];
        let mut first = 0;
        for run in numbers.chunk_by(|a, b| a == b) {
            let initial = (first == 0 && run[0] == 0).then_some(row);
            let last = (first + run.len() == seqlen).then_some(row);
            runs.push(Run { batch: row, first, len: run.len(), initial, last, hidden: run[0] < 0 });
            first += run.len();
        }
        if seqlen == 0 {
            runs.push(Run { batch: row, first, len: 0, initial: Some(row), last: Some(row), hidden: false });
        }
    }
    runs
}

impl<'py> Call<'py> {
    fn read(x: &Bound<'py, PyAny>, weight: &Bound<'py, PyAny>, options: &Bound<'py, PyDict>) -> PyResult<Self> {
        let flag = |name| option(options, name)?.map_or(Ok(false), |flag| flag.extract());
        let order = if flag("tokens_first")? { Order::TokensFirst } else { Order::ChannelsFirst };
        let x = Array::import("x", x, Layout::Rows)?;
        x.float()?;
        let &[batch, rows, columns] = x.shape() else {
            let names = if order == Order::TokensFirst { "[B, T, D]" } else { "[B, D, T]" };
            return Err(Error::Shape { arg: "x", expected: format!("of rank 3, {names}"), got: shape_text(x.shape()) }.into());
        };
        if batch > MAX_SEQUENCES {
            return Err(Error::Overflow { arg: "x", got: shape_text(x.shape()) }.into());
        }
        let (seqlen, channels) = if order == Order::TokensFirst { (rows, columns) } else { (columns, rows) };
        let (weight, bias, width) = filters(&x, channels, weight, option(options, "bias")?.as_ref())?;
        let state_len = if flag("full_state")? { width } else { width - 1 };
        let shape = ConvShape { batch, channels, seqlen, width, state_len };
        let (runs, states) = runs(&x, &shape, options)?;
        let residual = option(options, "residual")?.map(|residual| same_as_x("residual", &residual, &x)).transpose()?;
        let initial = option(options, "initial_state")?;
        let initial = initial
            .map(|initial| numbers_of("initial_state", &initial, &x, &[states, channels, state_len], Layout::Any))
            .transpose()?;
        Ok(Self { shape, order, x, weight, bias, residual, initial, silu: flag("silu")?, runs, states })
    }

    fn state_shape(&self) -> [usize; 3] {
        [self.states, self.shape.channels, self.shape.state_len]
    }

    fn args<T: Element>(&self) -> Result<ConvArgs<'_, T>, Error> {
        Ok(ConvArgs {
            shape: self.shape,
            order: self.order,
            x: rows(&self.x)?,
            weight: values(&self.weight)?,
            bias: self.bias.as_ref().map(values).transpose()?,
            residual: self.residual.as_ref().map(rows).transpose()?,
            initial: self.initial.as_ref().map(values).transpose()?,
            silu: self.silu,
            runs: &self.runs,
        })
    }

    /// The caller's array for the states after the last tokens.
    fn final_states(&self, object: &Bound<'py, PyAny>) -> PyResult<Array<'py>> {
        let arg = "final_state";
        let shape = self.state_shape();
        let array = Array::import(arg, object, Layout::Any)?;
        if array.shape() != shape {
            return Err(Error::Shape { arg, expected: shape_text(&shape), got: shape_text(array.shape()) }.into());
        }
        self.x.check_same(&array)?;
        let mut inputs = vec![&self.x, &self.weight];
        inputs.extend(self.bias.iter().chain(&self.residual).chain(&self.initial));
        check_writable(&array, object, &inputs)?;
        Ok(array)
    }
}

/// Checks that a caller's array of three axes can be written, each element once, without changing an input.
///
/// # Errors
/// Those of [`check_memory`], and [`Error::NotWritable`] where `array` is a copy.
pub fn check_writable(array: &Array<'_>, object: &Bound<'_, PyAny>, inputs: &[&Array<'_>]) -> Result<(), Error> {
    if !array.object.is(object) {
        let got = "one that runs backwards, is misaligned or negated".into();
        return Err(Error::NotWritable { arg: array.arg, got });
    }
    check_memory(array, inputs)
}

/// The runs of a call, and the number of its states.
fn runs(x: &Array<'_>, shape: &ConvShape, options: &Bound<'_, PyDict>) -> PyResult<(Vec<Run>, usize)> {
    let ConvShape { batch, seqlen, .. } = *shape;
    let (cu_seqlens, seq_idx) = (option(options, "cu_seqlens")?, option(options, "seq_idx")?);
    let Some(cu_seqlens) = cu_seqlens else {
        let Some(seq_idx) = seq_idx else {
            let run = |row| Run { batch: row, first: 0, len: seqlen, initial: Some(row), last: Some(row), hidden: false };
            return Ok(((0..batch).map(run).collect(), batch));
        };
        x.check_kind(&Array::import("seq_idx", &seq_idx, Layout::Any)?)?;
        let expected = format!("({batch}, {seqlen}), the number of each token's sequence");
        let (_, numbers) = integers::read_signed("seq_idx", &seq_idx, &[Some(batch), Some(seqlen)], &expected)?;
        return Ok((numbered_runs(&numbers, [batch, seqlen]), batch));
    };
    if seq_idx.is_some() {
        let expected = "None, as cu_seqlens is given".into();
        return Err(Error::Value { arg: "seq_idx", expected, got: "an array".into() }.into());
    }
    if batch != 1 {
        let one_row = [&[1][..], &x.shape()[1..]].concat();
        let expected = format!("{}, as cu_seqlens is given", shape_text(&one_row));
        return Err(Error::Shape { arg: x.arg, expected, got: shape_text(x.shape()) }.into());
    }
    let starts = starts("cu_seqlens", &cu_seqlens, x, Some(seqlen))?;
    let run = |(number, pair): (usize, &[usize])| Run {
        batch: 0,
        first: pair[0],
        len: pair[1] - pair[0],
        initial: Some(number),
        last: Some(number),
        hidden: false,
    };
    Ok((starts.windows(2).enumerate().map(run).collect(), starts.len() - 1))
}

/// An array of the library, dtype and shape of `x`.
fn same_as_x<'py>(arg: &'static str, object: &Bound<'py, PyAny>, x: &Array<'py>) -> PyResult<Array<'py>> {
    let array = Array::import(arg, object, Layout::Rows)?;
    x.check_same(&array)?;
    if array.shape() != x.shape() {
        let expected = format!("{} as {} has", shape_text(x.shape()), x.arg);
        return Err(Error::Shape { arg, expected, got: shape_text(array.shape()) }.into());
    }
    Ok(array)
}

/// An array of three axes whose last one is contiguous.
fn rows<'a, T: Element>(array: &'a Array<'_>) -> Result<Tensor<'a, T>, Error> {
    let (&[a, b, width], &[outer, inner, _]) = (array.shape(), &array.memory.strides[..]) else {
        unreachable!("ranks are checked")
    };
    Tensor::new(array.arg, array.memory.slice(array.arg)?, [a, b, 1, width], [outer, inner, 0])
}

fn run_forward<T: SimdElement>(py: Python<'_>, call: &Call<'_>, out: &Array<'_>, last: Option<&Array<'_>>) -> PyResult<()> {
    let args = call.args::<T>()?;
    let [states, channels, len] = call.state_shape();
    let last = last.map(|last| -> Result<_, Error> {
        let &[n, d, s] = &last.memory.strides[..] else { unreachable!("ranks are checked") };
        Ok(RowWriter::new(last.memory.slice_mut(last.arg)?, [states, channels, len, 1], [n, d, s]))
    });
    let out = ConvOut { out: rows_of(out.memory.slice_mut::<T>(out.arg)?, call.order, &call.shape), last: last.transpose()? };
    let (level, threads) = (runtime::level()?, runtime::threads(py)?);
    enter::enter(py, || forward(&args, &out, level, threads))
}

/// Outputs, and the states after the last tokens; documented in `subquad.ops.convolution`.
#[pyfunction]
pub fn causal_conv1d<'py>(
    x: &Bound<'py, PyAny>,
    weight: &Bound<'py, PyAny>,
    options: &Bound<'py, PyDict>,
    output_final_state: bool,
) -> PyResult<(Bound<'py, PyAny>, Option<Bound<'py, PyAny>>)> {
    let py = x.py();
    let call = Call::read(x, weight, options)?;
    let dtype = call.x.float()?;
    let given = option(options, "final_state")?.map(|object| call.final_states(&object)).transpose()?;
    let fresh = (output_final_state && given.is_none())
        .then(|| result::empty("final_state", &call.x, &call.state_shape(), dtype))
        .transpose()?;
    let out = result::empty("out", &call.x, call.x.shape(), dtype)?;
    dispatch_dtype!(dtype, run_forward, py, &call, &out, given.as_ref().or(fresh.as_ref()))?;
    let out = result::deliver(&call.x, out)?;
    let last = match (given, fresh) {
        (Some(given), _) => Some(given.written()?),
        (None, Some(fresh)) => Some(result::deliver(&call.x, fresh)?),
        (None, None) => None,
    };
    Ok((out, last))
}

/// Gradients by the names of what they are of, as [`run_backward`] leaves them.
struct Found<'py> {
    x: Array<'py>,
    weight: Array<'py>,
    bias: Option<Array<'py>>,
    initial: Option<Array<'py>>,
}

fn run_backward<T: SimdElement>(
    py: Python<'_>,
    call: &Call<'_>,
    (d_out, d_last): (&Array<'_>, Option<&Array<'_>>),
    found: &Found<'_>,
) -> PyResult<()>
where
    T::Acc: Wide,
{
    let args = call.args::<T>()?;
    let given = ConvGradients { d_out: rows(d_out)?, d_last: d_last.map(values).transpose()? };
    let [states, channels, len] = call.state_shape();
    let zeros = |len: usize| vec![<T::Acc as bytemuck::Zeroable>::zeroed(); len];
    let (mut weight, mut bias) = (zeros(channels * call.shape.width), zeros(channels));
    let mut initial = zeros(if found.initial.is_some() { states * channels * len } else { 0 });
    let initial_rows =
        found.initial.as_ref().map(|_| RowWriter::new(&mut initial, [states, channels, len, 1], [channels * len, len, 1]));
    let x = rows_of(found.x.memory.slice_mut::<T>(found.x.arg)?, call.order, &call.shape);
    let (level, threads) = (runtime::level()?, runtime::threads(py)?);
    let out = ConvGradientsOut { x, initial: initial_rows };
    let mut filters = FilterGradients { weight: &mut weight, bias: &mut bias };
    enter::enter(py, || backward(&args, &given, &out, &mut filters, level, threads))?;
    drop(out);
    write::<T>(&found.weight, &weight)?;
    if let Some(array) = &found.bias {
        write::<T>(array, &bias)?;
    }
    if let Some(array) = &found.initial {
        write::<T>(array, &initial)?;
    }
    Ok(())
}

/// Writes sums to a contiguous array of the type of the inputs or of the sums.
fn write<T: Element>(array: &Array<'_>, sums: &[T::Acc]) -> Result<(), Error> {
    if array.float()? == T::DTYPE {
        for (to, &x) in array.memory.slice_mut::<T>(array.arg)?.iter_mut().zip(sums) {
            *to = T::from_acc(x);
        }
    } else {
        array.memory.slice_mut::<T::Acc>(array.arg)?.copy_from_slice(sums);
    }
    Ok(())
}

/// The gradients of what `wrt` names: `x`, `weight`, `bias`, `initial_state`; `options` are those of the forward.
#[pyfunction]
#[expect(clippy::needless_pass_by_value, reason = "extracted by PyO3")]
pub fn causal_conv1d_backward<'py>(
    d_out: &Bound<'py, PyAny>,
    d_final_state: Option<&Bound<'py, PyAny>>,
    x: &Bound<'py, PyAny>,
    weight: &Bound<'py, PyAny>,
    wrt: Vec<String>,
    options: &Bound<'py, PyDict>,
) -> PyResult<Bound<'py, PyTuple>> {
    let py = x.py();
    let call = Call::read(x, weight, options)?;
    let dtype = call.x.float()?;
    let d_out = same_as_x("d_out", d_out, &call.x)?;
    let d_last =
        d_final_state.map(|object| numbers_of("d_final_state", object, &call.x, &call.state_shape(), Layout::Any)).transpose()?;
    let like = |arg, array: &Array<'py>| result::empty(arg, &call.x, array.shape(), array.float()?);
    let found = Found {
        x: like("dx", &call.x)?,
        weight: like("dweight", &call.weight)?,
        bias: call.bias.as_ref().map(|bias| like("dbias", bias)).transpose()?,
        initial: call.initial.as_ref().map(|initial| like("dinitial_state", initial)).transpose()?,
    };
    dispatch_dtype!(dtype, run_backward, py, &call, (&d_out, d_last.as_ref()), &found)?;
    let mut gradients =
        [("x", Some(found.x)), ("weight", Some(found.weight)), ("bias", found.bias), ("initial_state", found.initial)];
    let delivered = wrt.iter().map(|name| {
        let one = gradients.iter_mut().find(|(known, _)| known == name).and_then(|(_, gradient)| gradient.take());
        let one = one.ok_or_else(|| Error::Value {
            arg: "wrt",
            expected: "names of arguments that are given, each once, of x, weight, bias and initial_state".into(),
            got: name.clone(),
        })?;
        result::deliver(&call.x, one)
    });
    PyTuple::new(py, delivered.collect::<PyResult<Vec<_>>>()?)
}
