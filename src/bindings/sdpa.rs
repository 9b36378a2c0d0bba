//! `scaled_dot_product_attention` with PyTorch's signature and meaning: `[..., H, L, E]`, causal from the top left.

use super::array::{Array, Layout};
use super::attention::{Call, View, dispatch_dtype, run};
use super::options::Options;
use super::{broadcast, result};
use crate::dtype::DType;
use crate::error::Error;
use crate::kernels::mask::Window;
use crate::tensor::{AttnShape, shape_text};
use half::{bf16, f16};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

/// `[..., H, L, E]`, with the axes that come before the last two broadcast to those of the result.
struct Stack<'a> {
    array: &'a Array<'a>,
    /// Extents: leading axes, batch, head, length, width.
    shape: Vec<usize>,
    strides: Vec<usize>,
}

impl<'a> Stack<'a> {
    fn new(array: &'a Array<'a>, leading: &[usize], heads: usize) -> Result<Self, Error> {
        let [.., length, width] = array.shape()[..] else { unreachable!("ranks are checked") };
        let mut shape = leading.to_vec();
        shape.extend([heads, length, width]);
        let mismatch = || Error::Shape {
            arg: array.arg,
            expected: format!("that broadcasts to {}", shape_text(&shape)),
            got: shape_text(array.shape()),
        };
        let strides = broadcast::strides_for(&array.memory, &shape).ok_or_else(mismatch)?;
        Ok(Self { array, shape, strides })
    }

    fn view(&self, leading: &[usize]) -> View<'a> {
        let outer = leading.len();
        let [batch, head, length, width] = self.shape[outer..] else { unreachable!("four axes are left") };
        let [b, h, l, _] = self.strides[outer..] else { unreachable!("as many strides as extents") };
        let offset = leading.iter().zip(&self.strides).map(|(i, stride)| i * stride).sum();
        View { arg: self.array.arg, memory: &self.array.memory, offset, shape: [batch, length, head, width], strides: [b, l, h] }
    }
}

/// Every index below `extents`, last axis fastest.
fn indices(extents: &[usize]) -> impl Iterator<Item = Vec<usize>> + '_ {
    let count: usize = extents.iter().product();
    (0..count).map(move |mut flat| {
        let mut index = vec![0; extents.len()];
        for (place, &n) in index.iter_mut().zip(extents).rev() {
            *place = flat % n;
            flat /= n;
        }
        index
    })
}

/// Checks ranks and heads; returns the broadcast axes before the heads, at least one of them, and the head counts.
fn leading_axes(q: &Array<'_>, k: &Array<'_>, v: &Array<'_>, enable_gqa: bool) -> Result<(Vec<usize>, [usize; 3]), Error> {
    for array in [q, k, v] {
        if array.shape().len() < 2 {
            return Err(Error::Shape {
                arg: array.arg,
                expected: "of rank 2 or more, [..., H, L, E]".into(),
                got: shape_text(array.shape()),
            });
        }
    }
    let split = |array: &Array<'_>| -> (Vec<usize>, usize) {
        let shape = &array.shape()[..array.shape().len() - 2];
        shape.split_last().map_or((vec![], 1), |(&heads, leading)| (leading.to_vec(), heads))
    };
    let [(q_leading, q_heads), (k_leading, k_heads), (v_leading, v_heads)] = [split(q), split(k), split(v)];
    let mismatch =
        |array: &Array<'_>, expected: String| Error::Shape { arg: array.arg, expected, got: shape_text(array.shape()) };
    let mut leading = q_leading.clone();
    for (array, own) in [(k, &k_leading), (v, &v_leading)] {
        leading = broadcast::common(&[&leading, own])
            .ok_or_else(|| mismatch(array, format!("leading axes that broadcast with {}'s {}", q.arg, shape_text(&q_leading))))?;
    }
    if leading.is_empty() {
        leading.push(1);
    }
    let axis = |array: &Array<'_>, from_end: usize| array.shape()[array.shape().len() - from_end];
    if axis(k, 1) != axis(q, 1) {
        return Err(mismatch(k, format!("with head_dim {} as query has", axis(q, 1))));
    }
    if axis(v, 2) != axis(k, 2) {
        return Err(mismatch(v, format!("with length {} as key has", axis(k, 2))));
    }
    if enable_gqa {
        for (array, heads) in [(k, k_heads), (v, v_heads)] {
            if heads == 0 && q_heads > 0 || heads > 0 && q_heads % heads != 0 {
                return Err(mismatch(array, format!("with a head count that divides query's {q_heads}")));
            }
        }
        return Ok((leading, [q_heads, k_heads, v_heads]));
    }
    let heads = broadcast::common(&[&[q_heads], &[k_heads], &[v_heads]]).ok_or_else(|| {
        let (array, heads) = if k_heads != q_heads && k_heads != 1 { (k, k_heads) } else { (v, v_heads) };
        mismatch(array, format!("with {q_heads} heads as query has (pass enable_gqa=True to share {heads})"))
    })?[0];
    Ok((leading, [heads; 3]))
}

/// PyTorch's function of that name; documented in `subquad.ops.exact`.
#[pyfunction]
#[pyo3(signature = (query, key, value, attn_mask=None, dropout_p=0.0, is_causal=false, scale=None, enable_gqa=false))]
#[expect(clippy::too_many_arguments, reason = "PyTorch's signature")]
pub fn scaled_dot_product_attention<'py>(
    query: &Bound<'py, PyAny>,
    key: &Bound<'py, PyAny>,
    value: &Bound<'py, PyAny>,
    attn_mask: Option<&Bound<'py, PyAny>>,
    dropout_p: f64,
    is_causal: bool,
    scale: Option<f64>,
    enable_gqa: bool,
) -> PyResult<Bound<'py, PyAny>> {
    let py = query.py();
    if dropout_p != 0.0 {
        return Err(Error::Unsupported {
            what: format!("dropout_p: dropout with probability {dropout_p}"),
            instead: "pass 0.0, or call torch.nn.functional.scaled_dot_product_attention".into(),
        }
        .into());
    }
    if is_causal && attn_mask.is_some() {
        return Err(PyValueError::new_err("attn_mask: expected None when is_causal=True, got a mask"));
    }
    let q = Array::import("query", query, Layout::Rows)?;
    let k = Array::import("key", key, Layout::Rows)?;
    let v = Array::import("value", value, Layout::Rows)?;
    let mask = attn_mask.map(|mask| Array::import("attn_mask", mask, Layout::Any)).transpose()?;
    let dtype = q.float()?;
    q.check_same(&k)?;
    q.check_same(&v)?;
    let (leading, [heads, k_heads, v_heads]) = leading_axes(&q, &k, &v, enable_gqa)?;
    let stacks = [Stack::new(&q, &leading, heads)?, Stack::new(&k, &leading, k_heads)?, Stack::new(&v, &leading, v_heads)?];
    let outer = &leading[..leading.len() - 1];
    let first = vec![0; outer.len()];
    // Keys and values that group the heads differently are taken head by head.
    let (by_head, turns) = if k_heads == v_heads { (false, 1) } else { (true, heads) };
    let view = |i: usize, index: &[usize], head: usize| {
        let view = stacks[i].view(index);
        if by_head { view.head(head * [heads, k_heads, v_heads][i] / heads.max(1)) } else { view }
    };
    let [q_view, k_view, v_view] = [0, 1, 2].map(|i| view(i, &first, 0));
    let shape = AttnShape::new(["query", "key", "value"], q_view.shape, k_view.shape, v_view.shape)?;

    let mut scores = leading.clone();
    scores.extend([heads, shape.seqlen_q, shape.seqlen_k]);
    if let Some(mask) = &mask {
        q.check_kind(mask)?;
        broadcast::check_bias(mask, &scores, dtype)?;
    }
    // The result has as many axes as the broadcast inputs: none that only `leading_axes` added.
    let rank = [&q, &k, &v].map(|array| array.shape().len()).into_iter().max().unwrap_or(0);
    let mut full = leading.clone();
    full.extend([heads, shape.seqlen_q, shape.head_dim_v]);
    let result = result::empty("out", &q, &full[full.len() - rank..], dtype)?;
    let out = Stack::new(&result, &leading, heads)?;
    // An empty result needs no call, however many leading axes it has.
    let outer: &[usize] = if full.contains(&0) { &[0] } else { outer };
    let window = if is_causal { Window::CAUSAL } else { Window::ALL };
    let options = Options::plain(&shape, scale, window, 0);
    for (index, head) in indices(outer).flat_map(|index| (0..turns).map(move |head| (index.clone(), head))) {
        let [q, k, v] = [0, 1, 2].map(|i| view(i, &index, head));
        let whole = out.view(&index);
        let call = Call { shape, q, k, v, bias: (mask.as_ref(), &scores, &index, head), relative_bias: None, options: &options };
        let out = if by_head { whole.head(head) } else { whole };
        dispatch_dtype!(dtype, run, py, &call, &out, None)?;
    }
    let like = &q;
    drop(out);
    result::deliver(like, result)
}
