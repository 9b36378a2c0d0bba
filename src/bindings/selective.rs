//! `selective_scan` and its gradients: Mamba's recurrence.

use super::array::{Array, ElementType, Layout};
use super::attention::{dispatch_dtype, lse_dtype};
use super::backward::write_all;
use super::named::{Named, check_numbers, numbers_of};
use super::recurrent::typed;
use super::{enter, result, runtime};
use crate::dtype::{DType, Element, Float};
use crate::error::Error;
use crate::kernels::recurrent::Numbers;
use crate::kernels::scan::{
    CHUNK, Factors, Plane, PlaneWriter, SelectiveArgs, SelectiveBackwardArgs, SelectiveGradients, SelectiveOut, SelectiveShape,
    backward, is_plane, selective,
};
use crate::parallel::{PieceWriter, RowWriter};
use crate::simd::{SimdElement, Wide};
use crate::tensor::{Tensor, shape_text};
use half::{bf16, f16};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple};

/// Most rows and channels that are told apart where arrays have no elements.
const MOST: usize = 1 << 24;

/// `[B, D, L]` and `[B, G, N, L]` as `[B, G, C, L]`.
fn four(array: &Array<'_>) -> [[usize; 4]; 2] {
    match (array.shape(), &array.memory.strides[..]) {
        (&[b, c, l], &[sb, sc, sl]) => [[b, 1, c, l], [sb, 0, sc, sl]],
        (&[b, g, c, l], &[sb, sg, sc, sl]) => [[b, g, c, l], [sb, sg, sc, sl]],
        _ => unreachable!("ranks are checked"),
    }
}

/// An array of which channels or steps are contiguous, or a copy that is; one without steps as it is.
fn plane_array<'py>(arg: &'static str, object: &Bound<'py, PyAny>, ranks: &[usize], names: &str) -> PyResult<Array<'py>> {
    let array = Array::import(arg, object, Layout::Any)?;
    if !ranks.contains(&array.shape().len()) {
        let got = shape_text(array.shape());
        return Err(Error::Shape { arg, expected: names.into(), got }.into());
    }
    if array.shape().len() == 2 {
        return Ok(array);
    }
    let [shape, strides] = four(&array);
    if is_plane(shape, strides) { Ok(array) } else { Array::import(arg, object, Layout::Contiguous) }
}

fn plane<'a, T: Element>(array: &'a Array<'_>) -> Result<Plane<'a, T>, Error> {
    let [shape, strides] = four(array);
    Plane::new(array.arg, array.memory.slice(array.arg)?, shape, strides)
}

/// `[D]`, `[D, N]` or `[B, D, N]` as rows of channels, `[B, D, 1, N]`.
fn channels<'a, T: Element>(array: &'a Array<'_>) -> Result<Numbers<'a, T>, Error> {
    fn tensor<'a, E: Element>(array: &'a Array<'_>) -> Result<Tensor<'a, E>, Error> {
        let (shape, strides) = match (array.shape(), &array.memory.strides[..]) {
            (&[d], &[sd]) => ([1, d, 1, 1], [0, sd, 0]),
            (&[d, n], &[sd, _]) => ([1, d, 1, n], [0, sd, 0]),
            (&[b, d, n], &[sb, sd, _]) => ([b, d, 1, n], [sb, sd, 0]),
            _ => unreachable!("ranks are checked"),
        };
        Tensor::new(array.arg, array.memory.slice(array.arg)?, shape, strides)
    }
    typed(array, tensor, tensor)
}

/// The arguments of a call, checked.
struct Call<'py> {
    shape: SelectiveShape,
    u: Array<'py>,
    delta: Array<'py>,
    a: Array<'py>,
    b: Array<'py>,
    c: Array<'py>,
    d: Option<Array<'py>>,
    z: Option<Array<'py>>,
    delta_bias: Option<Array<'py>>,
    initial: Option<Array<'py>>,
    delta_softplus: bool,
}

const FACTORS: &str = "(D, N), (B, N, L) or (B, G, N, L)";

/// `B` or `C`, for inputs `[B, D, L]` and `N` states.
fn factors<'py>(
    arg: &'static str,
    object: &Bound<'py, PyAny>,
    u: &Array<'py>,
    ([batch, channels, steps], states): ([usize; 3], usize),
) -> PyResult<Array<'py>> {
    let array = plane_array(arg, object, &[2, 3, 4], &format!("of rank 2 to 4, {FACTORS}"));
    u.check_kind(array.as_ref().map_or(u, |array| array))?;
    let array = array?;
    let wrong = |expected: String| Error::Shape { arg, expected, got: shape_text(array.shape()) };
    match *array.shape() {
        [_, _] => return numbers_of(arg, object, u, &[channels, states], Layout::Rows),
        [b, n, l] if [b, n, l] != [batch, states, steps] => {
            return Err(wrong(shape_text(&[batch, states, steps])).into());
        }
        [b, g, n, l] if [b, n, l] != [batch, states, steps] || !(g > 0 && channels.is_multiple_of(g)) => {
            return Err(wrong(format!("({batch}, a divisor of {channels}, {states}, {steps})")).into());
        }
        _ => {}
    }
    u.check_same(&array)?;
    Ok(array)
}

impl<'py> Call<'py> {
    fn read([u, delta, a, b, c]: [&Bound<'py, PyAny>; 5], options: &Bound<'py, PyDict>) -> PyResult<Self> {
        let named = Named(options);
        let like_u = |arg: &'static str, object: &Bound<'py, PyAny>, u: &Array<'py>| -> PyResult<Array<'py>> {
            let array = plane_array(arg, object, &[3], "of rank 3, (B, D, L)")?;
            u.check_same(&array)?;
            if array.shape() != u.shape() {
                let expected = format!("{} as u has", shape_text(u.shape()));
                return Err(Error::Shape { arg, expected, got: shape_text(array.shape()) }.into());
            }
            Ok(array)
        };
        let u = plane_array("u", u, &[3], "of rank 3, (B, D, L)")?;
        u.float()?;
        let &[batch, channels, steps] = u.shape() else { unreachable!("the rank is checked") };
        if batch > MOST || channels > MOST {
            return Err(Error::Overflow { arg: "u", got: shape_text(u.shape()) }.into());
        }
        let delta = like_u("delta", delta, &u)?;
        let a = Array::import("A", a, Layout::Rows)?;
        u.check_kind(&a)?;
        let &[_, states] = a.shape() else {
            return Err(Error::Shape { arg: "A", expected: "of rank 2, (D, N)".into(), got: shape_text(a.shape()) }.into());
        };
        if a.shape()[0] != channels {
            let expected = format!("({channels}, N) as u has {channels} channels");
            return Err(Error::Shape { arg: "A", expected, got: shape_text(a.shape()) }.into());
        }
        check_numbers(&a, u.float()?)?;
        let sizes = ([batch, channels, steps], states);
        let (b, c) = (factors("B", b, &u, sizes)?, factors("C", c, &u, sizes)?);
        let groups = |array: &Array<'_>| (array.shape().len() > 2).then(|| four(array)[0][1]);
        if let (Some(of_b), Some(of_c)) = (groups(&b), groups(&c))
            && of_b != of_c
        {
            let expected = format!("with {of_b} groups as B has");
            return Err(Error::Shape { arg: "C", expected, got: shape_text(c.shape()) }.into());
        }
        let groups = groups(&b).or_else(|| groups(&c)).unwrap_or(1);
        Ok(Self {
            shape: SelectiveShape { batch, channels, groups, states, steps },
            d: named.array("D", &u, &[channels], Layout::Any)?,
            z: named.get("z")?.map(|z| like_u("z", &z, &u)).transpose()?,
            delta_bias: named.array("delta_bias", &u, &[channels], Layout::Any)?,
            initial: named.array("initial_state", &u, &[batch, channels, states], Layout::Rows)?,
            delta_softplus: named.flag("delta_softplus")?,
            u,
            delta,
            a,
            b,
            c,
        })
    }

    fn args<T: SimdElement>(&self) -> Result<SelectiveArgs<'_, T>, Error> {
        fn factors<'a, T: Element>(array: &'a Array<'_>) -> Result<Factors<'a, T>, Error> {
            Ok(if array.shape().len() == 2 { Factors::Channels(channels(array)?) } else { Factors::Steps(plane(array)?) })
        }
        Ok(SelectiveArgs {
            shape: self.shape,
            u: plane(&self.u)?,
            delta: plane(&self.delta)?,
            a: channels(&self.a)?,
            b: factors(&self.b)?,
            c: factors(&self.c)?,
            d: self.d.as_ref().map(channels).transpose()?,
            z: self.z.as_ref().map(plane).transpose()?,
            delta_bias: self.delta_bias.as_ref().map(channels).transpose()?,
            delta_softplus: self.delta_softplus,
            initial: self.initial.as_ref().map(channels).transpose()?,
        })
    }

    fn chunks(&self) -> [usize; 4] {
        let SelectiveShape { batch, channels, states, steps, .. } = self.shape;
        [batch, steps.div_ceil(CHUNK), states, channels]
    }

    /// An argument by name.
    fn named(&self, name: &str) -> Option<&Array<'py>> {
        match name {
            "u" => Some(&self.u),
            "delta" => Some(&self.delta),
            "A" => Some(&self.a),
            "B" => Some(&self.b),
            "C" => Some(&self.c),
            "D" => self.d.as_ref(),
            "z" => self.z.as_ref(),
            "delta_bias" => self.delta_bias.as_ref(),
            "initial_state" => self.initial.as_ref(),
            _ => None,
        }
    }
}

fn run<T: SimdElement>(
    py: Python<'_>,
    call: &Call<'_>,
    out: &Array<'_>,
    last: Option<&Array<'_>>,
    checkpoints: Option<&Array<'_>>,
) -> PyResult<()>
where
    T::Acc: Wide,
{
    let args = call.args::<T>()?;
    let SelectiveShape { batch, channels, states, .. } = call.shape;
    let [shape, strides] = four(out);
    let last = last.map(|last| -> Result<_, Error> {
        let strides = [channels * states, states, states];
        Ok(RowWriter::new(last.memory.slice_mut(last.arg)?, [batch, channels, 1, states], strides))
    });
    let checkpoints = checkpoints.map(|checkpoints| -> Result<_, Error> {
        let shape @ [_, chunks, states, channels] = call.chunks();
        let strides = [chunks * states * channels, states * channels, channels];
        Ok(PieceWriter::new(checkpoints.memory.slice_mut(checkpoints.arg)?, shape, strides))
    });
    let out = SelectiveOut {
        out: PlaneWriter::new(out.memory.slice_mut(out.arg)?, shape, strides),
        last: last.transpose()?,
        checkpoints: checkpoints.transpose()?,
    };
    let (level, threads) = (runtime::level()?, runtime::threads(py)?);
    enter::enter(py, || selective(&args, &out, level, threads))
}

/// Outputs, states after the last step, and what `selective_scan_backward` starts from, as far as they are asked for; documented in
/// `subquad.ops.selective_scan`.
#[pyfunction]
#[pyo3(name = "selective_scan")]
#[expect(clippy::too_many_arguments, clippy::type_complexity, reason = "the operator's arguments and results")]
#[expect(non_snake_case, reason = "the operator's names")]
pub fn selective_scan<'py>(
    u: &Bound<'py, PyAny>,
    delta: &Bound<'py, PyAny>,
    A: &Bound<'py, PyAny>,
    B: &Bound<'py, PyAny>,
    C: &Bound<'py, PyAny>,
    options: &Bound<'py, PyDict>,
    return_last_state: bool,
    return_checkpoints: bool,
) -> PyResult<(Bound<'py, PyAny>, Option<Bound<'py, PyAny>>, Option<Bound<'py, PyAny>>)> {
    let py = u.py();
    let call = Call::read([u, delta, A, B, C], options)?;
    let dtype = call.u.float()?;
    let SelectiveShape { batch, channels, states, .. } = call.shape;
    let out = result::empty("out", &call.u, call.u.shape(), dtype)?;
    let wide =
        |wanted: bool, arg, shape: &[usize]| wanted.then(|| result::empty(arg, &call.u, shape, lse_dtype(dtype))).transpose();
    let last = wide(return_last_state, "last_state", &[batch, channels, states])?;
    let checkpoints = wide(return_checkpoints, "checkpoints", &call.chunks())?;
    dispatch_dtype!(dtype, run, py, &call, &out, last.as_ref(), checkpoints.as_ref())?;
    let deliver = |array: Option<Array<'py>>| array.map(|array| result::deliver(&call.u, array)).transpose();
    Ok((result::deliver(&call.u, out)?, deliver(last)?, deliver(checkpoints)?))
}

/// The results of a forward call and their gradients.
struct Results<'py> {
    d_out: Array<'py>,
    d_last: Option<Array<'py>>,
    checkpoints: Array<'py>,
}

/// Gradients that are sums, and rounded at the end.
const SUMS: [&str; 6] = ["A", "B", "C", "D", "delta_bias", "initial_state"];

fn run_backward<T: SimdElement>(
    py: Python<'_>,
    call: &Call<'_>,
    results: &Results<'_>,
    wrt: &[String],
    into: &[Array<'_>],
) -> PyResult<()>
where
    T::Acc: Wide,
{
    let args = SelectiveBackwardArgs {
        forward: call.args::<T>()?,
        d_out: plane(&results.d_out)?,
        d_last: results.d_last.as_ref().map(channels).transpose()?,
        checkpoints: results.checkpoints.memory.slice(results.checkpoints.arg)?,
    };
    let found = |name: &str| wrt.iter().position(|wanted| wanted == name).map(|i| &into[i]);
    let of_inputs =
        |name: &str| found(name).map(|array| Ok::<_, Error>((array.memory.slice_mut::<T>(array.arg)?, four(array)))).transpose();
    let (u, delta, z) = (of_inputs("u")?, of_inputs("delta")?, of_inputs("z")?);
    let mut sums = SUMS.map(|name| found(name).map(|array| vec![T::Acc::ZERO; array.shape().iter().product()]));
    let (level, threads) = (runtime::level()?, runtime::threads(py)?);
    enter::enter(py, || {
        let [a, b, c, d, delta_bias, initial] = sums.each_mut().map(Option::as_deref_mut);
        let [u, delta, z] = [u, delta, z].map(|of| of.map(|(data, [shape, strides])| PlaneWriter::new(data, shape, strides)));
        let gradients = SelectiveGradients { u, delta, z, a, b, c, d, delta_bias, initial };
        backward(&args, gradients, level, threads);
    })?;
    for (name, sums) in SUMS.iter().zip(&sums) {
        if let (Some(array), Some(sums)) = (found(name), sums) {
            write_all(array, sums)?;
        }
    }
    Ok(())
}

/// Gradients of a call of `selective_scan`, in the order of `wrt`.
#[pyfunction]
#[pyo3(name = "selective_scan_backward")]
#[expect(clippy::too_many_arguments, clippy::needless_pass_by_value, reason = "the operator's arguments")]
#[expect(non_snake_case, reason = "the operator's names")]
pub fn selective_scan_backward<'py>(
    d_out: &Bound<'py, PyAny>,
    d_last_state: Option<&Bound<'py, PyAny>>,
    checkpoints: &Bound<'py, PyAny>,
    u: &Bound<'py, PyAny>,
    delta: &Bound<'py, PyAny>,
    A: &Bound<'py, PyAny>,
    B: &Bound<'py, PyAny>,
    C: &Bound<'py, PyAny>,
    wrt: Vec<String>,
    options: &Bound<'py, PyDict>,
) -> PyResult<Bound<'py, PyTuple>> {
    let py = u.py();
    let call = Call::read([u, delta, A, B, C], options)?;
    let dtype = call.u.float()?;
    let SelectiveShape { batch, channels, states, .. } = call.shape;
    let d_out = plane_array("d_out", d_out, &[3], "of rank 3, (B, D, L)")?;
    call.u.check_same(&d_out)?;
    if d_out.shape() != call.u.shape() {
        let (expected, got) = (shape_text(call.u.shape()), shape_text(d_out.shape()));
        return Err(Error::Shape { arg: "d_out", expected, got }.into());
    }
    let wide = |arg, object: &Bound<'py, PyAny>, shape: &[usize], layout| -> PyResult<Array<'py>> {
        let array = numbers_of(arg, object, &call.u, shape, layout)?;
        let acc = lse_dtype(dtype);
        if array.element != ElementType::Float(acc) {
            return Err(Error::DType { arg, expected: acc.to_string(), got: array.element.to_string() }.into());
        }
        Ok(array)
    };
    let results = Results {
        d_out,
        d_last: d_last_state.map(|d_last| wide("d_last_state", d_last, &[batch, channels, states], Layout::Rows)).transpose()?,
        checkpoints: wide("checkpoints", checkpoints, &call.chunks(), Layout::Contiguous)?,
    };
    let mut into = Vec::with_capacity(wrt.len());
    for (i, name) in wrt.iter().enumerate() {
        let array = call.named(name).filter(|_| !wrt[..i].contains(name)).ok_or_else(|| Error::Value {
            arg: "wrt",
            expected: "names of arguments that are given, each at most once".into(),
            got: name.clone(),
        })?;
        into.push(result::empty("gradient", &call.u, array.shape(), array.float()?)?);
    }
    dispatch_dtype!(dtype, run_backward, py, &call, &results, &wrt, &into)?;
    let gradients = into.into_iter().map(|array| result::deliver(&call.u, array)).collect::<PyResult<Vec<_>>>()?;
    PyTuple::new(py, gradients)
}
