//! `causal_conv1d_update`: some more tokens, with states in the caller's memory.

use super::array::{Array, ElementType, Layout};
use super::attention::dispatch_dtype;
use super::convolution::{check_writable, filters, values};
use super::{enter, integers, result, runtime};
use crate::dtype::DType;
use crate::error::Error;
use crate::kernels::convolution::ConvShape;
use crate::kernels::convolution::update::{Slot, UpdateArgs, UpdateOut, outputs, update};
use crate::parallel::RowWriter;
use crate::simd::SimdElement;
use crate::tensor::shape_text;
use half::{bf16, f16};
use pyo3::prelude::*;

/// The arguments of a call, checked.
struct Call<'py> {
    shape: ConvShape,
    x: Array<'py>,
    weight: Array<'py>,
    bias: Option<Array<'py>>,
    states: Array<'py>,
    silu: bool,
    slots: Vec<Slot>,
}

/// Which state each row of the batch continues: no two of them the same one.
fn chosen(object: Option<&Bound<'_, PyAny>>, like: &Array<'_>, [batch, states]: [usize; 2]) -> PyResult<Vec<Option<usize>>> {
    let arg = "conv_state_indices";
    let Some(object) = object else { return Ok((0..batch).map(Some).collect()) };
    like.check_kind(&Array::import(arg, object, Layout::Any)?)?;
    let (_, numbers) = integers::read_signed(arg, object, &[Some(batch)], &format!("({batch},), one for each sequence"))?;
    let mut taken = vec![false; states];
    let slot = |number: i64| {
        let Ok(slot) = usize::try_from(number) else { return Ok(None) };
        let wrong = |expected: String| Error::Value { arg, expected, got: number.to_string() };
        let state = taken.get_mut(slot).ok_or_else(|| wrong(format!("numbers below {states}, the states of conv_state")))?;
        if std::mem::replace(state, true) {
            return Err(wrong("a state of its own for each sequence".into()));
        }
        Ok(Some(slot))
    };
    Ok(numbers.into_iter().map(slot).collect::<Result<_, Error>>()?)
}

fn run<T: SimdElement>(py: Python<'_>, call: &Call<'_>, out: &Array<'_>) -> PyResult<()> {
    let ConvShape { channels, state_len, .. } = call.shape;
    let (memory, arg) = (&call.states.memory, call.states.arg);
    let count = call.states.shape()[0];
    let &[outer, inner, step] = &memory.strides[..] else { unreachable!("ranks are checked") };
    let data = memory.slice_mut::<T>(arg)?;
    let args = |slots| -> Result<_, Error> {
        Ok(UpdateArgs {
            shape: call.shape,
            x: values::<T>(&call.x)?,
            weight: values(&call.weight)?,
            bias: call.bias.as_ref().map(values).transpose()?,
            silu: call.silu,
            slots,
        })
    };
    let out = outputs(out.memory.slice_mut::<T>(out.arg)?, &call.shape);
    let (level, threads) = (runtime::level()?, runtime::threads(py)?);
    if step == 1 || state_len <= 1 {
        let args = args(&call.slots[..])?;
        let out = UpdateOut { out, states: RowWriter::new(data, [count, channels, 1, state_len], [outer, inner, 0]) };
        return enter::enter(py, || update(&args, &out, level, threads));
    }
    // Those that are needed, with the tokens of a channel together, and back again.
    let mut next = 0..;
    let given: Vec<usize> = call.slots.iter().filter_map(|slot| slot.state).collect();
    let slots: Vec<Slot> = call.slots.iter().map(|slot| Slot { state: slot.state.and_then(|_| next.next()), ..*slot }).collect();
    let args = args(&slots[..])?;
    let rows = given.iter().flat_map(|state| (0..channels).map(move |channel| state * outer + channel * inner));
    let places: Vec<usize> = rows.flat_map(|row| (0..state_len).map(move |s| row + s * step)).collect();
    let mut together: Vec<T> = places.iter().map(|&at| data[at]).collect();
    let len = channels * state_len;
    let states = RowWriter::new(&mut together, [given.len(), channels, 1, state_len], [len, state_len, 0]);
    let out = UpdateOut { out, states };
    enter::enter(py, || update(&args, &out, level, threads))?;
    drop(out);
    for (at, x) in places.into_iter().zip(together) {
        data[at] = x;
    }
    Ok(())
}

/// Outputs of some more tokens, `[B, T, D]`, or `[B, D]` as `x`; documented in `subquad.ops.convolution`.
#[pyfunction]
pub fn causal_conv1d_update<'py>(
    x: &Bound<'py, PyAny>,
    conv_state: &Bound<'py, PyAny>,
    weight: &Bound<'py, PyAny>,
    bias: Option<&Bound<'py, PyAny>>,
    silu: bool,
    cache_seqlens: Option<&Bound<'py, PyAny>>,
    conv_state_indices: Option<&Bound<'py, PyAny>>,
) -> PyResult<Bound<'py, PyAny>> {
    let py = x.py();
    let x = Array::import("x", x, Layout::Any)?;
    let dtype = x.float()?;
    let (batch, channels, seqlen) = match *x.shape() {
        [batch, channels] => (batch, channels, 1),
        [batch, channels, seqlen] => (batch, channels, seqlen),
        ref got => {
            let expected = "of rank 2 or 3, [B, D] or [B, D, T]".into();
            return Err(Error::Shape { arg: "x", expected, got: shape_text(got) }.into());
        }
    };
    let (weight, bias, width) = filters(&x, channels, weight, bias)?;
    let arg = "conv_state";
    let states = Array::import(arg, conv_state, Layout::Any)?;
    let count = if conv_state_indices.is_none() { batch.to_string() } else { "N".into() };
    let expected = format!("({count}, {channels}, S) with S of at least {}, as a filter has {width} taps", width - 1);
    let (count, state_len) = match *states.shape() {
        [count, own, len] if own == channels && len + 1 >= width && (conv_state_indices.is_some() || count == batch) => {
            (count, len)
        }
        ref got => return Err(Error::Shape { arg, expected, got: shape_text(got) }.into()),
    };
    if states.element != ElementType::Float(dtype) {
        let expected = format!("{dtype} as x has");
        return Err(Error::DType { arg, expected, got: states.element.to_string() }.into());
    }
    x.check_kind(&states)?;
    let mut inputs = vec![&x, &weight];
    inputs.extend(&bias);
    check_writable(&states, conv_state, &inputs)?;
    let chosen = chosen(conv_state_indices, &x, [batch, count])?;
    let seen = cache_seqlens.map(|seen| integers::per_sequence("cache_seqlens", seen, batch)).transpose()?;
    let slots =
        chosen.into_iter().enumerate().map(|(b, state)| Slot { state, seen: seen.as_ref().map(|seen| seen[b]) }).collect();
    let shape = ConvShape { batch, channels, seqlen, width, state_len };
    let out_shape = if x.shape().len() == 2 { vec![batch, channels] } else { vec![batch, seqlen, channels] };
    let out = result::empty("out", &x, &out_shape, dtype)?;
    let call = Call { shape, x, weight, bias, states, silu, slots };
    dispatch_dtype!(dtype, run, py, &call, &out)?;
    let Call { x, states, .. } = call;
    states.written()?;
    result::deliver(&x, out)
}
