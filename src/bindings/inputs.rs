//! The arguments of `attention`, read once for its forward and its backward.

use super::array::{Array, Layout};
use super::attention::{Call, View};
use super::broadcast;
use super::options::{Given, Negative, Options, WindowSize};
use crate::dtype::DType;
use crate::error::Error;
use crate::tensor::AttnShape;
use pyo3::prelude::*;

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
