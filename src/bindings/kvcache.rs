//! `attention_with_kvcache`: append to a cache in place, then attend to it.

use super::array::{Array, Layout};
use super::attention::{View, check_memory, dispatch_dtype, lse_dtype, writer};
use super::options::{Given, Negative, Options, WindowSize};
use super::{enter, integers, result, runtime};
use crate::dtype::{DType, Element};
use crate::error::Error;
use crate::index::{KeyLayout, Pages};
use crate::kernels::bias::Bias;
use crate::kernels::exact::{self, ExactArgs, ExactOut, decode};
use crate::kernels::rotary::{Pairing, Rotary};
use crate::parallel::{RowWriter, axes_are_disjoint};
use crate::simd::SimdElement;
use crate::tensor::{AttnShape, Tensor, shape_text};
use half::{bf16, f16};
use pyo3::prelude::*;
use std::collections::HashMap;

/// A call whose arguments fit each other.
struct CachedCall<'a, 'py> {
    shape: AttnShape,
    q: View<'a>,
    caches: [View<'a>; 2],
    /// New keys and values.
    new: Option<[View<'a>; 2]>,
    /// Cosines and sines.
    rotary: Option<[&'a Array<'py>; 2]>,
    pairing: Pairing,
    layout: KeyLayout,
    /// Tokens of each sequence before the new ones.
    lengths: Vec<usize>,
    causal: bool,
    options: Options,
    num_splits: Option<usize>,
    out: View<'a>,
    lse: Option<View<'a>>,
}

fn run<T: SimdElement>(py: Python<'_>, call: &CachedCall<'_, '_>) -> PyResult<()> {
    let shape = call.shape;
    let rotary = match call.rotary {
        None => None,
        Some([cos, sin]) => Some(Rotary::<T> {
            cos: cos.memory.slice(cos.arg)?,
            sin: sin.memory.slice(sin.arg)?,
            pairs: cos.shape()[1],
            pairing: call.pairing,
        }),
    };
    let q: Tensor<'_, T> = call.q.tensor()?;
    let (level, threads) = (runtime::level()?, runtime::threads(py)?);
    let new = call.new.map(|[k, v]| Ok::<_, Error>([k.tensor::<T>()?, v.tensor::<T>()?])).transpose()?;
    if let Some(new) = new {
        let (layout, lengths) = (&call.layout, &call.lengths);
        for (i, (cache, rows)) in call.caches.iter().zip(new).enumerate() {
            let cache = writer::<T>(cache)?;
            let rotary = if i == 0 { rotary } else { None };
            enter::enter(py, || append(&cache, &rows, layout, lengths, rotary))?;
        }
    }
    let rotated = rotary.map(|rotary| rotate_queries(&q, call, rotary));
    let args = ExactArgs::<T> {
        shape,
        q: rotated.as_ref().map_or(Ok(q), |data| Tensor::contiguous("q", data, q.shape()))?,
        k: call.caches[0].tensor()?,
        v: call.caches[1].tensor()?,
        segments: call.options.segments(),
        pages: call.layout.pages.as_ref(),
        mask: call.options.mask(),
        biases: [Bias::None; 2],
        mods: call.options.mods(),
    };
    let out = ExactOut { out: writer(&call.out)?, lse: call.lse.as_ref().map(writer).transpose()? };
    let blocking = runtime::blocking()?;
    let num_splits = call.num_splits;
    enter::enter(py, || match num_splits {
        None => exact::forward(&args, &out, level, threads, blocking),
        splits => decode::forward(&args, &out, level, threads, splits),
    })
}

fn append<T: Element>(
    cache: &RowWriter<'_, T>,
    rows: &Tensor<'_, T>,
    layout: &KeyLayout,
    lengths: &[usize],
    rotary: Option<Rotary<'_, T>>,
) {
    let [batch, tokens, heads, _] = rows.shape();
    for (b, &length) in lengths.iter().enumerate().take(batch) {
        for t in 0..tokens {
            let (row, token) = layout.place(b, length + t);
            for head in 0..heads {
                let (source, target) = (rows.row(b, t, head), cache.row(row, token, head));
                match rotary {
                    Some(rotary) => rotary.rotate(source, length - layout.ranges[b].start + t, target),
                    None => target.copy_from_slice(source),
                }
            }
        }
    }
}

/// Queries at their positions: one after the other under a causal mask, else all at the first new one.
fn rotate_queries<T: Element>(q: &Tensor<'_, T>, call: &CachedCall<'_, '_>, rotary: Rotary<'_, T>) -> Vec<T> {
    let [batch, tokens, heads, width] = q.shape();
    let mut rotated = vec![T::zeroed(); batch * tokens * heads * width];
    for (i, out) in rotated.chunks_exact_mut(width.max(1)).enumerate() {
        let (b, t, head) = (i / (tokens * heads), i / heads % tokens, i % heads);
        let first = call.lengths[b] - call.layout.ranges[b].start;
        rotary.rotate(q.row(b, t, head), if call.causal { first + t } else { first }, out);
    }
    rotated
}

/// Checks that no row or page that is written is used twice.
fn check_collisions(layout: &KeyLayout, lengths: &[usize]) -> Result<(), Error> {
    // Unpaged caches count as one page for each row.
    let page_size = layout.pages.as_ref().map_or(usize::MAX, |pages| pages.page_size);
    let arg = if layout.pages.is_some() { "block_table" } else { "cache_batch_idx" };
    let mut owners: HashMap<usize, (usize, bool)> = HashMap::new();
    for (b, range) in layout.ranges.iter().enumerate() {
        for first in (0..range.end).step_by(page_size) {
            let writes = range.end.min(first.saturating_add(page_size)) > lengths[b];
            let (row, _) = layout.place(b, first);
            match owners.insert(row, (b, writes)) {
                Some((owner, written)) if writes || written => {
                    let got = format!("{row} for sequences {owner} and {b}");
                    let expected = "memory of its own for what is appended to".into();
                    return Err(Error::Value { arg, expected, got });
                }
                _ => {}
            }
        }
    }
    Ok(())
}

/// Checks that keys and values share no memory: side by side in one buffer is fine.
fn check_apart(k: &Array<'_>, v: &Array<'_>) -> Result<(), Error> {
    let [keys, values] = [k, v].map(|array| array.memory.bytes(array.arg, array.itemsize()));
    let (keys, values) = (keys?, values?);
    if keys.start >= values.end || values.start >= keys.end {
        return Ok(());
    }
    let distance = keys.start.abs_diff(values.start);
    let width = k.shape()[3].max(v.shape()[3]);
    let mut axes: Vec<(usize, usize)> = k.memory.strides.iter().copied().zip(k.shape().iter().copied()).take(3).collect();
    axes.push((distance / k.itemsize(), 2));
    let alike = k.memory.strides[..3] == v.memory.strides[..3] && distance.is_multiple_of(k.itemsize());
    if alike && axes_are_disjoint(axes, width) { Ok(()) } else { Err(Error::Overlap { arg: v.arg, other: k.arg }) }
}

fn check_rotary(cos: &Array<'_>, sin: &Array<'_>, q: &Array<'_>, width: usize, positions: usize) -> Result<(), Error> {
    for array in [cos, sin] {
        q.check_same(array)?;
        let fits = matches!(array.shape(), &[rows, pairs] if rows >= positions && 2 * pairs <= width);
        if !fits || array.shape() != cos.shape() || !array.is_contiguous() {
            return Err(Error::Shape {
                arg: array.arg,
                expected: format!("contiguous (at least {positions} positions, at most {} pairs), both alike", width / 2),
                got: shape_text(array.shape()),
            });
        }
    }
    Ok(())
}

/// Most sequences of a call. Arrays of no elements can have any number, and lengths are kept for each.
const MAX_SEQUENCES: usize = 1 << 24;

/// What says where the keys of each sequence lie.
#[derive(Clone, Copy)]
struct LayoutOptions<'a, 'py> {
    cache_seqlens: Option<&'a Bound<'py, PyAny>>,
    cache_batch_idx: Option<&'a Bound<'py, PyAny>>,
    cache_leftpad: Option<&'a Bound<'py, PyAny>>,
    block_table: Option<&'a Bound<'py, PyAny>>,
}

/// The checked layout, and the lengths before `appended` tokens are.
fn key_layout(
    options: LayoutOptions<'_, '_>,
    batch: usize,
    cache: &View<'_>,
    appended: Option<usize>,
) -> PyResult<(KeyLayout, Vec<usize>)> {
    if batch > MAX_SEQUENCES {
        return Err(Error::Overflow { arg: "q", got: format!("{batch} sequences") }.into());
    }
    let LayoutOptions { cache_seqlens, cache_batch_idx, cache_leftpad, block_table } = options;
    let [rows, tokens, ..] = cache.shape;
    let pages = match block_table {
        None => None,
        Some(_) if tokens == 0 => {
            return Err(Error::Shape {
                arg: "k_cache",
                expected: "with pages of at least one token".into(),
                got: shape_text(&cache.shape),
            }
            .into());
        }
        Some(table) => {
            let expected = format!("({batch}, pages of a sequence)");
            let (shape, table) = integers::read("block_table", table, &[Some(batch), None], &expected)?;
            Some(Pages { table, per_sequence: shape[1], page_size: tokens })
        }
    };
    let capacity = pages.as_ref().map_or(tokens, |pages| pages.per_sequence * pages.page_size);
    let chosen = cache_batch_idx.map(|rows| integers::per_sequence("cache_batch_idx", rows, batch)).transpose()?;
    if chosen.is_some() && pages.is_some() {
        let expected = "None, as block_table is given".into();
        return Err(Error::Value { arg: "cache_batch_idx", expected, got: "an array".into() }.into());
    }
    if chosen.is_none() && pages.is_none() && rows < batch {
        let expected = format!("with at least {batch} rows as q has sequences");
        return Err(Error::Shape { arg: "k_cache", expected, got: shape_text(&cache.shape) }.into());
    }
    let lengths = match cache_seqlens {
        Some(lengths) => integers::per_sequence("cache_seqlens", lengths, batch)?,
        None if appended.is_some() => {
            let expected = "the lengths before k and v are appended".into();
            return Err(Error::Value { arg: "cache_seqlens", expected, got: "None".into() }.into());
        }
        None => vec![capacity; batch],
    };
    let starts = match cache_leftpad {
        Some(starts) => integers::per_sequence("cache_leftpad", starts, batch)?,
        None => vec![0; batch],
    };
    if let Some(b) = (0..batch).find(|&b| starts[b] > lengths[b]) {
        let expected = format!("at most the length, {} for sequence {b}", lengths[b]);
        return Err(Error::Value { arg: "cache_leftpad", expected, got: starts[b].to_string() }.into());
    }
    let ranges = (0..batch).map(|b| starts[b]..lengths[b].saturating_add(appended.unwrap_or(0))).collect();
    let layout = KeyLayout { ranges, rows: chosen, pages };
    layout.check(rows, tokens)?;
    Ok((layout, lengths))
}

fn read_splits(given: Option<i64>) -> Result<Option<usize>, Error> {
    let wrong = |n: i64| Error::Value { arg: "num_splits", expected: "None or at least 1".into(), got: n.to_string() };
    given.filter(|&n| n != 0).map(|n| usize::try_from(n).map_err(|_| wrong(n))).transpose()
}

/// FlashAttention's `flash_attn_with_kvcache`; documented in `subquad.ops.kvcache`.
#[pyfunction]
#[pyo3(signature = (q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None,
    cache_batch_idx=None, cache_leftpad=None, block_table=None, softmax_scale=None, causal=false, window_size=None,
    softcap=None, rotary_interleaved=true, alibi_slopes=None, num_splits=None, return_softmax_lse=false, *, sinks=None))]
#[expect(clippy::too_many_arguments, reason = "FlashAttention's signature")]
pub fn attention_with_kvcache<'py>(
    q: &Bound<'py, PyAny>,
    k_cache: &Bound<'py, PyAny>,
    v_cache: &Bound<'py, PyAny>,
    k: Option<&Bound<'py, PyAny>>,
    v: Option<&Bound<'py, PyAny>>,
    rotary_cos: Option<&Bound<'py, PyAny>>,
    rotary_sin: Option<&Bound<'py, PyAny>>,
    cache_seqlens: Option<&Bound<'py, PyAny>>,
    cache_batch_idx: Option<&Bound<'py, PyAny>>,
    cache_leftpad: Option<&Bound<'py, PyAny>>,
    block_table: Option<&Bound<'py, PyAny>>,
    softmax_scale: Option<f64>,
    causal: bool,
    window_size: Option<&Bound<'py, PyAny>>,
    softcap: Option<f64>,
    rotary_interleaved: bool,
    alibi_slopes: Option<&Bound<'py, PyAny>>,
    num_splits: Option<i64>,
    return_softmax_lse: bool,
    sinks: Option<&Bound<'py, PyAny>>,
) -> PyResult<Bound<'py, PyAny>> {
    let py = q.py();
    let q = Array::import("q", q, Layout::Rows)?;
    let k_cache = Array::import("k_cache", k_cache, Layout::InPlace)?;
    let v_cache = Array::import("v_cache", v_cache, Layout::InPlace)?;
    let pair =
        |names: [&'static str; 2], first: Option<&Bound<'py, PyAny>>, second: Option<&Bound<'py, PyAny>>| match (first, second) {
            (None, None) => Ok(None),
            (Some(first), Some(second)) => {
                Ok(Some([Array::import(names[0], first, Layout::Rows)?, Array::import(names[1], second, Layout::Rows)?]))
            }
            (first, _) => {
                let arg = names[usize::from(first.is_some())];
                let other = names[usize::from(first.is_none())];
                Err(PyErr::from(Error::Value { arg, expected: format!("an array, as {other} is one"), got: "None".into() }))
            }
        };
    let new = pair(["k", "v"], k, v)?;
    let rotary = pair(["rotary_cos", "rotary_sin"], rotary_cos, rotary_sin)?;
    let dtype = q.float()?;
    for array in [&k_cache, &v_cache].into_iter().chain(new.iter().flatten()) {
        q.check_same(array)?;
    }
    let q_view = View::in_order(&q, "[B, Sq, H, D]")?;
    let names = if block_table.is_some() { "[pages, page_size, Hkv, D]" } else { "[rows, capacity, Hkv, D]" };
    let caches = [View::in_order(&k_cache, names)?, View::in_order(&v_cache, names)?];
    let [batch, seqlen_q, ..] = q_view.shape;
    let [_, tokens, kv_heads, _] = caches[0].shape;
    if caches[1].shape[..3] != caches[0].shape[..3] {
        let expected = format!("with rows, length and heads {} as k_cache has", shape_text(&caches[0].shape[..3]));
        return Err(Error::Shape { arg: "v_cache", expected, got: shape_text(&caches[1].shape) }.into());
    }

    let appended = new.as_ref().map(|[k, _]| k.shape().get(1).copied().unwrap_or(0));
    let options = LayoutOptions { cache_seqlens, cache_batch_idx, cache_leftpad, block_table };
    let (layout, lengths) = key_layout(options, batch, &caches[0], appended)?;
    let appended = appended.unwrap_or(0);
    let capacity = layout.pages.as_ref().map_or(tokens, |pages| pages.per_sequence * pages.page_size);

    let [_, _, _, head_dim_v] = caches[1].shape;
    let logical = |view: &View<'_>| [batch, capacity, kv_heads, view.shape[3]];
    let shape = AttnShape::new(["q", "k_cache", "v_cache"], q_view.shape, logical(&caches[0]), logical(&caches[1]))?;
    if let Some(new) = &new {
        for (array, cache) in new.iter().zip([&k_cache, &v_cache]) {
            let expected = [batch, appended, kv_heads, cache.shape()[3]];
            if array.shape() != expected {
                return Err(
                    Error::Shape { arg: array.arg, expected: shape_text(&expected), got: shape_text(array.shape()) }.into()
                );
            }
            let mut inputs: Vec<&Array<'_>> = vec![&q];
            inputs.extend(new.iter().chain(rotary.iter().flatten()));
            check_memory(cache, &inputs)?;
        }
        check_apart(&k_cache, &v_cache)?;
        check_collisions(&layout, &lengths)?;
    }
    if let Some([cos, sin]) = &rotary {
        let longest = (0..batch).map(|b| lengths[b] - layout.ranges[b].start).max().unwrap_or(0);
        check_rotary(cos, sin, &q, shape.head_dim, longest + appended.max(if causal { seqlen_q } else { 1 }))?;
    }
    let windows = WindowSize::read(window_size, shape.num_heads, Negative::Unbounded)?;
    let softcap = softcap.filter(|&cap| cap != 0.0);
    let given = Given { softcap, alibi_slopes, sinks, ..Given::default() };
    let mut options = Options::read(&q, &shape, causal, windows, &given)?.with_segments(layout.segments(seqlen_q));
    options.set_scale(softmax_scale);
    let num_splits = read_splits(num_splits)?;

    let out = result::empty("out", &q, &[batch, seqlen_q, shape.num_heads, head_dim_v], dtype)?;
    let lse = return_softmax_lse
        .then(|| result::empty("lse", &q, &[batch, shape.num_heads, seqlen_q], lse_dtype(dtype)))
        .transpose()?;
    let call = CachedCall {
        shape,
        q: q_view,
        caches,
        new: new.as_ref().map(|[k, v]| Ok::<_, Error>([View::in_order(k, "")?, View::in_order(v, "")?])).transpose()?,
        rotary: rotary.as_ref().map(|[cos, sin]| [cos, sin]),
        pairing: if rotary_interleaved { Pairing::Interleaved } else { Pairing::Halves },
        layout,
        lengths,
        causal,
        options,
        num_splits,
        out: View::in_order(&out, "[B, Sq, H, Dv]")?,
        lse: lse.as_ref().map(|lse| View::of_lse(lse, &shape)),
    };
    dispatch_dtype!(dtype, run, py, &call)?;
    drop(call);
    if new.is_some() {
        k_cache.written()?;
        v_cache.written()?;
    }
    let out = result::deliver(&q, out)?;
    match lse {
        None => Ok(out),
        Some(lse) => Ok((out, result::deliver(&q, lse)?).into_pyobject(py)?.into_any()),
    }
}
