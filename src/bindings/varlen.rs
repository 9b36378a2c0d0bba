//! `attention_varlen`: sequences packed one after the other, without padding.

use super::array::{Array, Layout};
use super::attention::{View, dispatch_dtype, lse_dtype, writer};
use super::backward::{Differentiable, Results, gradients};
use super::options::{Given, Negative, Options, WindowSize};
use super::{enter, integers, result, runtime};
use crate::dtype::DType;
use crate::error::Error;
use crate::index::{Pages, Segment};
use crate::kernels::bias::Bias;
use crate::kernels::exact::backward::BackwardArgs;
use crate::kernels::exact::backward::sums::SumTable;
use crate::kernels::exact::{self, ExactArgs, ExactOut};
use crate::simd::SimdElement;
use crate::tensor::{AttnShape, shape_text};
use half::{bf16, f16};
use pyo3::prelude::*;
use pyo3::types::PyTuple;

/// The arguments of a call, read once for its forward and its backward.
struct Packed<'py> {
    q: Array<'py>,
    k: Array<'py>,
    v: Array<'py>,
    dtype: DType,
    shape: AttnShape,
    pages: Option<Pages>,
    options: Options,
}

fn run<T: SimdElement>(py: Python<'_>, packed: &Packed<'_>, out: &Array<'_>, lse: Option<&Array<'_>>) -> PyResult<()> {
    let args = packed.args::<T>()?;
    let out = ExactOut {
        out: writer(&as_one_sequence(out, "[total_q, H, Dv]")?)?,
        lse: lse.map(|lse| writer(&packed.of_lse(lse))).transpose()?,
    };
    let (level, threads, blocking) = (runtime::level()?, runtime::threads(py)?, runtime::blocking()?);
    enter::enter(py, || exact::forward(&args, &out, level, threads, blocking))
}

/// A `[tokens, heads, width]` array as one sequence.
fn as_one_sequence<'a>(array: &'a Array<'_>, names: &str) -> Result<View<'a>, Error> {
    let &[tokens, heads, width] = array.shape() else {
        let expected = format!("of rank 3, {names}");
        return Err(Error::Shape { arg: array.arg, expected, got: shape_text(array.shape()) });
    };
    let [s, h, _] = array.memory.strides[..] else { unreachable!("as many strides as extents") };
    Ok(View { arg: array.arg, memory: &array.memory, offset: 0, shape: [1, tokens, heads, width], strides: [0, s, h] })
}

/// Where each sequence starts, and the end: checked against the number of tokens, if that is known.
///
/// # Errors
/// [`Error::Shape`], [`Error::DType`] or [`Error::Value`] naming `arg`.
pub fn starts(arg: &'static str, object: &Bound<'_, PyAny>, like: &Array<'_>, tokens: Option<usize>) -> PyResult<Vec<usize>> {
    like.check_kind(&Array::import(arg, object, Layout::Any)?)?;
    let (shape, starts) = integers::read_signed(arg, object, &[None], "of rank 1, (sequences + 1,)")?;
    let wrong = |expected: String, got: String| PyErr::from(Error::Value { arg, expected, got });
    let Some((&first, &last)) = starts.first().zip(starts.last()) else {
        return Err(Error::Shape { arg, expected: "(sequences + 1,)".into(), got: shape_text(&shape) }.into());
    };
    if first != 0 {
        return Err(wrong("a first element of 0".into(), first.to_string()));
    }
    if let Some(at) = starts.windows(2).position(|pair| pair[1] < pair[0]) {
        return Err(wrong(format!("numbers that do not decrease, at least {}", starts[at]), starts[at + 1].to_string()));
    }
    if let Some(tokens) = tokens
        && usize::try_from(last) != Ok(tokens)
    {
        return Err(wrong(format!("a last element of {tokens}, the number of tokens"), last.to_string()));
    }
    Ok(starts.into_iter().map(|start| start as usize).collect())
}

fn check_longest(arg: &'static str, given: Option<i64>, starts: &[usize]) -> Result<(), Error> {
    let longest = starts.windows(2).map(|pair| pair[1] - pair[0]).max().unwrap_or(0);
    match given {
        Some(most) if usize::try_from(most).map_or(true, |most| most < longest) => {
            Err(Error::Value { arg, expected: format!("at least {longest}, the longest sequence"), got: most.to_string() })
        }
        _ => Ok(()),
    }
}

/// The views of keys and values, and the pages that sequences of those lengths lie on.
fn pages(table: Option<&Bound<'_, PyAny>>, view: &View<'_>, k_starts: &[usize]) -> PyResult<Option<Pages>> {
    let Some(table) = table else { return Ok(None) };
    let [count, page_size, ..] = view.shape;
    if page_size == 0 {
        let expected = "with pages of at least one token".into();
        return Err(Error::Shape { arg: "k", expected, got: shape_text(&view.shape) }.into());
    }
    let batch = k_starts.len() - 1;
    let expected = format!("({batch}, pages of a sequence)");
    let (shape, table) = integers::read("block_table", table, &[Some(batch), None], &expected)?;
    let pages = Pages { table, per_sequence: shape[1], page_size };
    for (sequence, pair) in k_starts.windows(2).enumerate() {
        let length = pair[1] - pair[0];
        if length.div_ceil(page_size) > pages.per_sequence {
            let expected =
                format!("at least {} pages for the {length} tokens of sequence {sequence}", length.div_ceil(page_size));
            return Err(Error::Value { arg: "block_table", expected, got: pages.per_sequence.to_string() }.into());
        }
        pages.check(sequence, length, count)?;
    }
    Ok(Some(pages))
}

/// What can be asked for, as it came.
#[derive(Default)]
struct Asked<'a, 'py> {
    max_seqlens: [Option<i64>; 2],
    softmax_scale: Option<f64>,
    causal: bool,
    window_size: Option<&'a Bound<'py, PyAny>>,
    block_table: Option<&'a Bound<'py, PyAny>>,
    given: Given<'a, 'py>,
}

impl<'py> Packed<'py> {
    fn read(
        [q, k, v]: [&Bound<'py, PyAny>; 3],
        [cu_seqlens_q, cu_seqlens_k]: [&Bound<'py, PyAny>; 2],
        asked: &Asked<'_, 'py>,
    ) -> PyResult<Self> {
        let q = Array::import("q", q, Layout::Rows)?;
        let k = Array::import("k", k, Layout::Rows)?;
        let v = Array::import("v", v, Layout::Rows)?;
        let dtype = q.float()?;
        q.check_same(&k)?;
        q.check_same(&v)?;
        let paged = asked.block_table.is_some();
        let q_view = as_one_sequence(&q, "[total_q, H, D]")?;
        let [k_view, v_view] = key_views(&k, &v, paged)?;
        let [_, total_q, num_heads, _] = q_view.shape;
        if v_view.shape[..3] != k_view.shape[..3] {
            let expected = format!("with tokens and heads {} as k has", shape_text(&k.shape()[..k.shape().len() - 1]));
            return Err(Error::Shape { arg: "v", expected, got: shape_text(v.shape()) }.into());
        }
        let q_starts = starts("cu_seqlens_q", cu_seqlens_q, &q, Some(total_q))?;
        let k_starts = starts("cu_seqlens_k", cu_seqlens_k, &q, if paged { None } else { Some(k_view.shape[1]) })?;
        if k_starts.len() != q_starts.len() {
            let expected = format!("{} as cu_seqlens_q has", shape_text(&[q_starts.len()]));
            return Err(Error::Shape { arg: "cu_seqlens_k", expected, got: shape_text(&[k_starts.len()]) }.into());
        }
        check_longest("max_seqlen_q", asked.max_seqlens[0], &q_starts)?;
        check_longest("max_seqlen_k", asked.max_seqlens[1], &k_starts)?;
        let pages = pages(asked.block_table, &k_view, &k_starts)?;
        let segments = segments(&q_starts, &k_starts, paged);
        let longest = segments.iter().map(|segment| segment.k_end).max().unwrap_or(0);
        let logical = |view: &View<'_>| [1, longest, view.shape[2], view.shape[3]];
        let shape =
            AttnShape::new(["q", "k", "v"], q_view.shape, logical(&k_view), logical(&v_view)).map_err(|error| match error {
                // As the arrays are, not as the kernel sees them.
                Error::Shape { arg, expected, .. } => {
                    let array = if arg == "v" { &v } else { &k };
                    Error::Shape { arg, expected, got: shape_text(array.shape()) }
                }
                other => other,
            })?;
        let windows = WindowSize::read(asked.window_size, num_heads, Negative::Unbounded)?;
        let per_sequence = AttnShape { batch: segments.len(), ..shape };
        let mut options = Options::read(&q, &per_sequence, asked.causal, windows, &asked.given)?.with_segments(segments);
        options.set_scale(asked.softmax_scale);
        Ok(Self { q, k, v, dtype, shape, pages, options })
    }

    /// `[H, total_q]`, as rows of one element of a `[1, total_q, H, 1]` array.
    fn of_lse<'a>(&self, lse: &'a Array<'_>) -> View<'a> {
        let shape = [1, self.shape.seqlen_q, self.shape.num_heads, 1];
        let strides = [0, lse.memory.strides[1], lse.memory.strides[0]];
        View { arg: lse.arg, memory: &lse.memory, offset: 0, shape, strides }
    }
}

fn key_views<'a>(k: &'a Array<'_>, v: &'a Array<'_>, paged: bool) -> Result<[View<'a>; 2], Error> {
    if paged {
        return Ok([View::in_order(k, "[pages, page_size, Hkv, D]")?, View::in_order(v, "[pages, page_size, Hkv, Dv]")?]);
    }
    Ok([as_one_sequence(k, "[total_k, Hkv, D]")?, as_one_sequence(v, "[total_k, Hkv, Dv]")?])
}

fn segments(q_starts: &[usize], k_starts: &[usize], paged: bool) -> Vec<Segment> {
    let pairs = q_starts.windows(2).zip(k_starts.windows(2)).enumerate();
    let segment = |(sequence, (queries, keys)): (usize, (&[usize], &[usize]))| Segment {
        sequence,
        q_batch: 0,
        q_first: queries[0],
        q_len: queries[1] - queries[0],
        k_batch: if paged { sequence } else { 0 },
        k_first: if paged { 0 } else { keys[0] },
        k_start: 0,
        k_end: keys[1] - keys[0],
        offset: (keys[1] - keys[0]) as isize - (queries[1] - queries[0]) as isize,
    };
    pairs.map(segment).collect()
}

impl Packed<'_> {
    fn args<T: SimdElement>(&self) -> Result<ExactArgs<'_, T>, Error> {
        let [k, v] = key_views(&self.k, &self.v, self.pages.is_some())?;
        Ok(ExactArgs {
            shape: self.shape,
            q: as_one_sequence(&self.q, "[total_q, H, D]")?.tensor()?,
            k: k.tensor()?,
            v: v.tensor()?,
            segments: self.options.segments(),
            pages: self.pages.as_ref(),
            mask: self.options.mask(),
            biases: [Bias::None; 2],
            mods: self.options.mods(),
        })
    }
}

/// FlashAttention's `flash_attn_varlen_func`; documented in `subquad.ops.varlen`.
#[pyfunction]
#[pyo3(signature = (q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q=None, max_seqlen_k=None, softmax_scale=None, causal=false,
    window_size=None, softcap=None, alibi_slopes=None, block_table=None, sinks=None, return_lse=false))]
#[expect(clippy::too_many_arguments, reason = "FlashAttention's signature")]
pub fn attention_varlen<'py>(
    q: &Bound<'py, PyAny>,
    k: &Bound<'py, PyAny>,
    v: &Bound<'py, PyAny>,
    cu_seqlens_q: &Bound<'py, PyAny>,
    cu_seqlens_k: &Bound<'py, PyAny>,
    max_seqlen_q: Option<i64>,
    max_seqlen_k: Option<i64>,
    softmax_scale: Option<f64>,
    causal: bool,
    window_size: Option<&Bound<'py, PyAny>>,
    softcap: Option<f64>,
    alibi_slopes: Option<&Bound<'py, PyAny>>,
    block_table: Option<&Bound<'py, PyAny>>,
    sinks: Option<&Bound<'py, PyAny>>,
    return_lse: bool,
) -> PyResult<Bound<'py, PyAny>> {
    let py = q.py();
    let given = Given { softcap: softcap.filter(|&cap| cap != 0.0), alibi_slopes, sinks, ..Given::default() };
    let max_seqlens = [max_seqlen_q, max_seqlen_k];
    let asked = Asked { max_seqlens, softmax_scale, causal, window_size, block_table, given };
    let packed = Packed::read([q, k, v], [cu_seqlens_q, cu_seqlens_k], &asked)?;
    let (q, shape, dtype) = (&packed.q, packed.shape, packed.dtype);
    let out = result::empty("out", q, &[shape.seqlen_q, shape.num_heads, shape.head_dim_v], dtype)?;
    let lse_shape = [shape.num_heads, shape.seqlen_q];
    let lse = return_lse.then(|| result::empty("lse", q, &lse_shape, lse_dtype(dtype))).transpose()?;
    dispatch_dtype!(dtype, run, py, &packed, &out, lse.as_ref())?;
    let out = result::deliver(q, out)?;
    match lse {
        None => Ok(out),
        Some(lse) => Ok((out, result::deliver(q, lse)?).into_pyobject(py)?.into_any()),
    }
}

/// A call with its results and their gradients.
struct Graded<'py> {
    packed: Packed<'py>,
    results: Results<'py>,
}

impl<'py> Differentiable<'py> for Graded<'py> {
    fn like(&self) -> &Array<'py> {
        &self.packed.q
    }

    fn args<T: SimdElement>(&self) -> Result<BackwardArgs<'_, T>, Error> {
        self.results.args(&self.packed.args()?, |out| self.view(out), |lse| self.packed.of_lse(lse))
    }

    fn view<'a>(&self, array: &'a Array<'_>) -> Result<View<'a>, Error> {
        as_one_sequence(array, "[tokens, heads, width]")
    }

    fn table(&self, _name: &str, shape: &[usize]) -> SumTable {
        let batches = if shape.len() == 2 { shape[0] } else { 1 };
        SumTable::slopes(batches, self.packed.shape.num_heads)
    }
}

/// Gradients of `attention_varlen`; documented in `subquad.ops.backward`.
#[pyfunction]
#[expect(clippy::too_many_arguments, reason = "the Python signature")]
#[expect(clippy::needless_pass_by_value, reason = "extracted by PyO3")]
pub fn attention_varlen_backward<'py>(
    d_out: &Bound<'py, PyAny>,
    q: &Bound<'py, PyAny>,
    k: &Bound<'py, PyAny>,
    v: &Bound<'py, PyAny>,
    out: &Bound<'py, PyAny>,
    lse: &Bound<'py, PyAny>,
    d_lse: Option<&Bound<'py, PyAny>>,
    cu_seqlens_q: &Bound<'py, PyAny>,
    cu_seqlens_k: &Bound<'py, PyAny>,
    wrt: Vec<String>,
    softmax_scale: Option<f64>,
    causal: bool,
    window_size: Option<&Bound<'py, PyAny>>,
    softcap: Option<f64>,
    alibi_slopes: Option<&Bound<'py, PyAny>>,
    sinks: Option<&Bound<'py, PyAny>>,
) -> PyResult<Bound<'py, PyTuple>> {
    let given = Given { softcap: softcap.filter(|&cap| cap != 0.0), alibi_slopes, sinks, ..Given::default() };
    let asked = Asked { softmax_scale, causal, window_size, given, ..Asked::default() };
    let packed = Packed::read([q, k, v], [cu_seqlens_q, cu_seqlens_k], &asked)?;
    let AttnShape { seqlen_q, num_heads, head_dim_v, .. } = packed.shape;
    let shapes = (&[seqlen_q, num_heads, head_dim_v][..], &[num_heads, seqlen_q][..]);
    let results = Results::read(&packed.q, [d_out, out, lse], d_lse, shapes)?;
    let objects = [("q", Some(q)), ("k", Some(k)), ("v", Some(v)), ("alibi_slopes", alibi_slopes), ("sinks", sinks)];
    gradients(q.py(), &Graded { packed, results }, &wrt, &objects)
}
