//! Masks and normalisers as `subquad.masks` and `subquad.normalizers` lower them: tuples of a name and what belongs to it.

use super::integers::{self, NEGATIVE, read_signed};
use crate::error::Error;
use crate::kernels::mask::{RowRanges, Window};
use crate::kernels::mask_rules::{Band, Extents, Ids, Padding, Rule};
use crate::kernels::score_mod::{Normalizer, Reweighting};
use pyo3::prelude::*;
use pyo3::types::{PyString, PyTuple};

const MASK: &str = "mask";

/// What a mask comes down to.
pub enum Lowered {
    /// A window, and segments for what is padded.
    Band(Band),
    /// Intervals of keys for each query.
    Ranges(RowRanges),
}

fn unknown(arg: &'static str, module: &str, object: &Bound<'_, PyAny>) -> PyErr {
    let got = object.get_type().qualname().map_or_else(|_| "another object".into(), |name| name.to_string());
    Error::Kind { arg, expected: format!("None or an object of {module}"), got }.into()
}

fn named<'py>(object: &Bound<'py, PyAny>) -> Option<(String, Bound<'py, PyTuple>)> {
    let tuple = object.cast::<PyTuple>().ok()?;
    let name = tuple.get_item(0).ok()?.cast_into::<PyString>().ok()?.to_string();
    Some((name, tuple.clone()))
}

fn wrong(arg: &'static str, expected: String, got: String) -> PyErr {
    Error::Value { arg, expected, got }.into()
}

/// Reads a mask for a call of these extents.
///
/// # Errors
/// [`Error::Kind`], [`Error::Shape`] or [`Error::Value`] naming `mask`.
pub fn read(object: &Bound<'_, PyAny>, extents: Extents, heads: usize) -> PyResult<Lowered> {
    if object.hasattr("kv_num_blocks")? {
        let lower = object.py().import("subquad.torch.block_mask")?.getattr("intervals")?;
        let parts = lower.call1((object, extents.seqlen_q, extents.seqlen_k))?.cast_into::<PyTuple>()?;
        return Ok(Lowered::Ranges(intervals(&parts, extents, heads)?));
    }
    let rule = rule(object, extents)?;
    Ok(rule.as_band(extents).map_or_else(|| Lowered::Ranges(rule.ranges(extents)), Lowered::Band))
}

fn rule(object: &Bound<'_, PyAny>, extents: Extents) -> PyResult<Rule> {
    let Some((name, parts)) = named(object) else { return Err(unknown(MASK, "subquad.masks", object)) };
    let part = |index: usize| parts.get_item(index);
    let all = |index: usize| -> PyResult<Vec<Rule>> { part(index)?.try_iter()?.map(|one| rule(&one?, extents)).collect() };
    Ok(match name.as_str() {
        "causal" => Rule::Window(Window::CAUSAL),
        "window" => {
            let side = |index: usize| -> PyResult<isize> {
                Ok(part(index)?.extract::<Option<i64>>()?.map_or(Window::UNBOUNDED, Window::side))
            };
            Rule::Window(Window { left: side(1)?, right: side(2)? })
        }
        "chunked" => Rule::Chunked(part(1)?.extract()?),
        "block_causal" => Rule::BlockCausal(part(1)?.extract()?),
        "prefix" => Rule::Prefix(per_sequence("lengths", &part(1)?, extents)?),
        "document" => {
            let queries = ids("ids", &part(1)?, extents.batch, extents.seqlen_q, "queries")?;
            let keys = part(2)?;
            let (arg, keys) = if keys.is_none() { ("ids", part(1)?) } else { ("key_ids", keys) };
            Rule::Document { queries, keys: ids(arg, &keys, extents.batch, extents.seqlen_k, "keys")? }
        }
        "padding" => {
            let lengths = per_sequence("lengths", &part(1)?, extents)?;
            let leftpad = part(2)?;
            let leftpad = if leftpad.is_none() { vec![0] } else { per_sequence("leftpad", &leftpad, extents)? };
            Rule::Padding(Padding { lengths, leftpad, queries: part(3)?.extract()? })
        }
        "and" => Rule::And(all(1)?),
        "or" => Rule::Or(all(1)?),
        _ => return Err(unknown(MASK, "subquad.masks", object)),
    })
}

fn per_sequence(arg: &'static str, object: &Bound<'_, PyAny>, extents: Extents) -> PyResult<Vec<usize>> {
    let batch = extents.batch;
    let (shape, values) = integers::read(arg, object, &[None], "one number, or one for each sequence")?;
    if shape[0] != 1 && shape[0] != batch {
        let expected = format!("one number, or one for each of {batch} sequences");
        return Err(wrong(arg, expected, format!("{} numbers", shape[0])));
    }
    if values.contains(&NEGATIVE) {
        return Err(wrong(arg, "numbers of at least 0".into(), "a negative number".into()));
    }
    Ok(values)
}

fn ids(arg: &'static str, object: &Bound<'_, PyAny>, batch: usize, length: usize, whose: &str) -> PyResult<Ids> {
    let rank = object.getattr("ndim")?.extract::<usize>()?;
    let expected = format!("document ids of {length} {whose}, of one or of {batch} sequences");
    let (shape, data) = if rank == 1 {
        read_signed(arg, object, &[Some(length)], &expected)?
    } else {
        read_signed(arg, object, &[None, Some(length)], &expected)?
    };
    if rank == 2 && shape[0] != 1 && shape[0] != batch {
        return Err(wrong(arg, expected, format!("{} sequences", shape[0])));
    }
    Ok(Ids { data, width: length })
}

/// Intervals of every query, as `(indptr, [[start, end], ..], sequences, heads)`.
fn intervals(parts: &Bound<'_, PyTuple>, extents: Extents, heads: usize) -> PyResult<RowRanges> {
    let (batches, per_batch): (usize, usize) = (parts.get_item(2)?.extract()?, parts.get_item(3)?.extract()?);
    if (batches != 1 && batches != extents.batch) || (per_batch != 1 && per_batch != heads) {
        let expected = format!("1 or {} sequences and 1 or {heads} heads", extents.batch);
        return Err(wrong(MASK, expected, format!("{batches} sequences and {per_batch} heads")));
    }
    let rows = batches * per_batch * extents.seqlen_q;
    let (_, indptr) = integers::read(MASK, &parts.get_item(0)?, &[Some(rows + 1)], &format!("{} row starts", rows + 1))?;
    let (shape, bounds) = integers::read(MASK, &parts.get_item(1)?, &[None, Some(2)], "intervals [n, 2]")?;
    let intervals: Vec<(usize, usize)> = bounds.chunks_exact(2).map(|bounds| (bounds[0], bounds[1])).collect();
    let ordered = indptr[0] == 0 && indptr[rows] == shape[0] && indptr.windows(2).all(|at| at[0] <= at[1]);
    let row_is_right = |row: &[(usize, usize)]| {
        row.iter().all(|&(start, end)| start < end && end <= extents.seqlen_k)
            && row.windows(2).all(|pair| pair[0].1 <= pair[1].0)
    };
    if !ordered || !indptr.windows(2).all(|at| row_is_right(&intervals[at[0]..at[1]])) {
        return Err(wrong(MASK, "ascending, disjoint intervals of keys".into(), "others".into()));
    }
    let by_head = if per_batch == 1 { 0 } else { extents.seqlen_q };
    let by_batch = if batches == 1 { 0 } else { per_batch * extents.seqlen_q };
    Ok(RowRanges { indptr, intervals, strides: [by_batch, by_head, 1] })
}

/// Reads a normaliser, and what becomes of its weights.
///
/// # Errors
/// [`Error::Kind`] naming `normalizer`.
pub fn normalizer(object: &Bound<'_, PyAny>) -> PyResult<(Normalizer, Option<Reweighting<'static>>)> {
    let Some((name, parts)) = named(object) else { return Err(unknown("normalizer", "subquad.normalizers", object)) };
    let normalizer = match name.as_str() {
        "sigmoid" => Normalizer::Sigmoid { bias: parts.get_item(1)?.extract()? },
        "softplus" => Normalizer::Softplus,
        "relu" => Normalizer::Relu { power: parts.get_item(1)?.extract()?, normalize: parts.get_item(2)?.extract()? },
        "power" => Normalizer::Power { power: parts.get_item(1)?.extract()? },
        _ => return Err(unknown("normalizer", "subquad.normalizers", object)),
    };
    let reweighting = match normalizer {
        Normalizer::Softplus if parts.len() > 1 => Some(Reweighting { power: parts.get_item(1)?.extract()?, gains: None }),
        _ => None,
    };
    Ok((normalizer, reweighting))
}
