//! The arguments of `attention`, read once for its forward and its backward.

use super::array::{Array, Layout};
use super::attention::{Call, View};
use super::broadcast;
use super::options::{Given, Negative, Options, WindowSize};
use crate::dtype::DType;
use crate::error::Error;
use crate::tensor::AttnShape;
use pyo3::prelude::*;
use pyo3::types::PyDict;

/// What can be asked for beside queries, keys and values, as it came.
#[derive(Default)]
pub struct Asked<'a, 'py> {
    /// Whether queries see no later keys.
    pub causal: bool,
    /// A window, or one for each head.
    pub window_size: Option<&'a Bound<'py, PyAny>>,
    /// An array that broadcasts to `[B, H, Sq, Sk]`.
    pub bias: Option<&'a Bound<'py, PyAny>>,
    /// An array `[H or 1, Sq + Sk - 1]`.
    pub relative_bias: Option<&'a Bound<'py, PyAny>>,
    /// All else.
    pub given: Given<'a, 'py>,
}

/// What can be asked for, by name.
pub struct Named<'py> {
    causal: bool,
    softcap: Option<f64>,
    window_size: Option<Bound<'py, PyAny>>,
    scale: Option<Bound<'py, PyAny>>,
    length_scale: Option<Bound<'py, PyAny>>,
    dropout_p: f64,
    dropout_seed: Option<Bound<'py, PyAny>>,
    normalizer: Option<Bound<'py, PyAny>>,
    mask: Option<Bound<'py, PyAny>>,
    /// An array that broadcasts to `[B, H, Sq, Sk]`.
    pub bias: Option<Bound<'py, PyAny>>,
    /// An array `[H or 1, Sq + Sk - 1]`.
    pub relative_bias: Option<Bound<'py, PyAny>>,
    /// An array `[H]` or `[B, H]`.
    pub alibi_slopes: Option<Bound<'py, PyAny>>,
    /// An array `[H]`, or one that broadcasts to `[B, H, Sq]`.
    pub sinks: Option<Bound<'py, PyAny>>,
}

impl<'py> Named<'py> {
    /// Reads a dictionary of keyword arguments of `attention`.
    ///
    /// # Errors
    /// `TypeError` for a flag or a number that is none.
    pub fn read(options: &Bound<'py, PyDict>) -> PyResult<Self> {
        let option = |name: &str| options.get_item(name).map(|found| found.filter(|object| !object.is_none()));
        Ok(Self {
            causal: option("causal")?.map_or(Ok(false), |causal| causal.extract())?,
            softcap: option("softcap")?.map(|softcap| softcap.extract()).transpose()?,
            window_size: option("window_size")?,
            scale: option("scale")?,
            length_scale: option("length_scale")?,
            dropout_p: option("dropout_p")?.map_or(Ok(0.0), |dropout_p| dropout_p.extract())?,
            dropout_seed: option("dropout_seed")?,
            normalizer: option("normalizer")?,
            mask: option("mask")?,
            bias: option("bias")?,
            relative_bias: option("relative_bias")?,
            alibi_slopes: option("alibi_slopes")?,
            sinks: option("sinks")?,
        })
    }

    /// The same, as all entries ask.
    pub fn asked(&self) -> Asked<'_, 'py> {
        Asked {
            causal: self.causal,
            window_size: self.window_size.as_ref(),
            bias: self.bias.as_ref(),
            relative_bias: self.relative_bias.as_ref(),
            given: Given {
                scale: self.scale.as_ref(),
                length_scale: self.length_scale.as_ref(),
                softcap: self.softcap,
                alibi_slopes: self.alibi_slopes.as_ref(),
                sinks: self.sinks.as_ref(),
                dropout_p: self.dropout_p,
                dropout_seed: self.dropout_seed.as_ref(),
                normalizer: self.normalizer.as_ref(),
                mask: self.mask.as_ref(),
            },
        }
    }
}

/// The arguments, checked.
pub struct Inputs<'py> {
    /// Queries.
    pub q: Array<'py>,
    /// Keys.
    pub k: Array<'py>,
    /// Values.
    pub v: Array<'py>,
    /// Bias or mask.
    pub bias: Option<Array<'py>>,
    /// Bias by distance.
    pub relative_bias: Option<Array<'py>>,
    /// The sizes.
    pub shape: AttnShape,
    /// The type of queries, keys and values.
    pub dtype: DType,
    /// All else.
    pub options: Options,
    /// `[B, H, Sq, Sk]`.
    pub scores: [usize; 4],
}

impl<'py> Inputs<'py> {
    /// Reads and checks all arguments.
    ///
    /// # Errors
    /// Those of each.
    pub fn read([q, k, v]: [&Bound<'py, PyAny>; 3], asked: &Asked<'_, 'py>) -> PyResult<Self> {
        let q = Array::import("q", q, Layout::Rows)?;
        let k = Array::import("k", k, Layout::Rows)?;
        let v = Array::import("v", v, Layout::Rows)?;
        let import =
            |arg, object: Option<&Bound<'py, PyAny>>| object.map(|object| Array::import(arg, object, Layout::Any)).transpose();
        let (bias, relative_bias) = (import("bias", asked.bias)?, import("relative_bias", asked.relative_bias)?);
        let dtype = q.float()?;
        q.check_same(&k)?;
        q.check_same(&v)?;
        let [q_view, k_view, v_view] = views(&q, &k, &v)?;
        let shape = AttnShape::new(["q", "k", "v"], q_view.shape, k_view.shape, v_view.shape)?;
        let AttnShape { batch, seqlen_q, seqlen_k, num_heads, .. } = shape;
        let scores = [batch, num_heads, seqlen_q, seqlen_k];
        if let Some(bias) = &bias {
            q.check_kind(bias)?;
            broadcast::check_bias(bias, &scores, dtype)?;
        }
        if let Some(bias) = &relative_bias {
            q.check_kind(bias)?;
            broadcast::check_toeplitz(bias, [num_heads, seqlen_q, seqlen_k], dtype)?;
        }
        let windows = WindowSize::read(asked.window_size, num_heads, Negative::Refused)?;
        let options = Options::read(&q, &shape, asked.causal, windows, &asked.given)?;
        Ok(Self { q, k, v, bias, relative_bias, shape, dtype, options, scores })
    }

    /// What the kernels are called with.
    ///
    /// # Errors
    /// None: ranks were checked.
    pub fn call(&self) -> Result<Call<'_>, Error> {
        let [q, k, v] = views(&self.q, &self.k, &self.v)?;
        Ok(Call {
            shape: self.shape,
            q,
            k,
            v,
            bias: (self.bias.as_ref(), &self.scores, &[], 0),
            relative_bias: self.relative_bias.as_ref(),
            options: &self.options,
        })
    }
}

fn views<'a>(q: &'a Array<'_>, k: &'a Array<'_>, v: &'a Array<'_>) -> Result<[View<'a>; 3], Error> {
    Ok([View::in_order(q, "[B, Sq, H, D]")?, View::in_order(k, "[B, Sk, Hkv, D]")?, View::in_order(v, "[B, Sk, Hkv, Dv]")?])
}
