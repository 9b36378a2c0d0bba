//! `merge_attention`.

use super::array::{Array, Layout};
use super::attention::{View, dispatch_dtype, lse_dtype, writer};
use super::{enter, result};
use crate::dtype::{DType, Element};
use crate::error::Error;
use crate::kernels::exact::{ExactOut, merge};
use crate::tensor::{AttnShape, shape_text};
use half::{bf16, f16};
use pyo3::prelude::*;

struct MergeCall<'a> {
    outs: Vec<View<'a>>,
    lses: Vec<View<'a>>,
    out: View<'a>,
    lse: View<'a>,
}

fn run<T: Element>(py: Python<'_>, call: &MergeCall<'_>) -> PyResult<()> {
    let outs = call.outs.iter().map(View::tensor::<T>).collect::<Result<Vec<_>, _>>()?;
    let lses = call.lses.iter().map(View::tensor::<T::Acc>).collect::<Result<Vec<_>, _>>()?;
    let merged = ExactOut { out: writer(&call.out)?, lse: Some(writer(&call.lse)?) };
    enter::enter(py, || merge::forward(&outs, &lses, &merged))
}

/// Merges results over disjoint sets of keys; documented in `subquad.ops.kvcache`.
#[pyfunction]
#[expect(clippy::needless_pass_by_value, reason = "what Python's arguments become")]
pub fn merge_attention<'py>(
    outs: Vec<Bound<'py, PyAny>>,
    lses: Vec<Bound<'py, PyAny>>,
) -> PyResult<(Bound<'py, PyAny>, Bound<'py, PyAny>)> {
    let import = |arg, objects: &[Bound<'py, PyAny>], layout| {
        objects.iter().map(|object| Array::import(arg, object, layout)).collect::<PyResult<Vec<_>>>()
    };
    if outs.is_empty() || outs.len() != lses.len() {
        let got = format!("{} and {}", outs.len(), lses.len());
        return Err(Error::Value { arg: "lses", expected: "as many as outs, at least one".into(), got }.into());
    }
    let outs = import("outs", &outs, Layout::Rows)?;
    let lses = import("lses", &lses, Layout::Any)?;
    let like = &outs[0];
    let dtype = like.float()?;
    let views = outs.iter().map(|out| View::in_order(out, "[B, S, H, D]")).collect::<Result<Vec<_>, _>>()?;
    let shape = views[0].shape;
    let [batch, seqlen_q, num_heads, _] = shape;
    let sizes = AttnShape::new(["outs", "outs", "outs"], shape, shape, shape)?;
    let lse_shape = [batch, num_heads, seqlen_q];
    for out in &outs {
        like.check_same(out)?;
        if out.shape() != shape {
            return Err(Error::Shape { arg: "outs", expected: shape_text(&shape), got: shape_text(out.shape()) }.into());
        }
    }
    for lse in &lses {
        if lse.kind != like.kind || lse.float()? != lse_dtype(dtype) {
            let expected = format!("{} of the library of outs", lse_dtype(dtype));
            return Err(Error::DType { arg: "lses", expected, got: lse.element.to_string() }.into());
        }
        if lse.shape() != lse_shape {
            return Err(Error::Shape { arg: "lses", expected: shape_text(&lse_shape), got: shape_text(lse.shape()) }.into());
        }
    }
    let out = result::empty("out", like, &shape, dtype)?;
    let lse = result::empty("lse", like, &lse_shape, lse_dtype(dtype))?;
    let call = MergeCall {
        lses: lses.iter().map(|lse| View::of_lse(lse, &sizes)).collect(),
        outs: views,
        out: View::in_order(&out, "[B, S, H, D]")?,
        lse: View::of_lse(&lse, &sizes),
    };
    dispatch_dtype!(dtype, run, like.object.py(), &call)?;
    drop(call);
    Ok((result::deliver(like, out)?, result::deliver(like, lse)?))
}
