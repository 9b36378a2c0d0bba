//! Strided views with named axes, and the one place where shapes are checked.

use crate::error::{Error, Result};
use ndarray::{ArrayView4, ShapeBuilder};

/// A read-only `[B, S, H, D]` array: any strides, except that the last axis is contiguous.
#[derive(Debug, Clone, Copy)]
pub struct Tensor<'a, T> {
    data: &'a [T],
    shape: [usize; 4],
    strides: [usize; 3],
}

impl<'a, T> Tensor<'a, T> {
    /// Views `data`; `strides` count elements along batch, sequence and head.
    ///
    /// # Errors
    /// [`Error::Shape`] when the last element lies beyond `data`, [`Error::Overflow`] when its position has no `usize`.
    pub fn new(arg: &'static str, data: &'a [T], shape: [usize; 4], strides: [usize; 3]) -> Result<Self> {
        let needed = extent(arg, &shape, &[strides[0], strides[1], strides[2], 1])?;
        if needed > data.len() {
            return Err(Error::Shape {
                arg,
                expected: format!("of at most {} elements", data.len()),
                got: format!("{} with strides {strides:?}", shape_text(&shape)),
            });
        }
        Ok(Self { data, shape, strides })
    }

    /// Views `data` as a contiguous `[B, S, H, D]` array.
    ///
    /// # Errors
    /// As [`Tensor::new`].
    pub fn contiguous(arg: &'static str, data: &'a [T], shape: [usize; 4]) -> Result<Self> {
        Self::new(arg, data, shape, [shape[1] * shape[2] * shape[3], shape[2] * shape[3], shape[3]])
    }

    /// The same rows, of no elements.
    pub fn without_width(self) -> Self {
        let [batch, length, heads, _] = self.shape;
        Self { shape: [batch, length, heads, 0], ..self }
    }

    /// `[B, S, H, D]`.
    pub fn shape(&self) -> [usize; 4] {
        self.shape
    }

    /// The `head_dim` elements of one token of one head.
    #[inline(always)]
    pub fn row(&self, batch: usize, token: usize, head: usize) -> &'a [T] {
        let start = batch * self.strides[0] + token * self.strides[1] + head * self.strides[2];
        &self.data[start..start + self.shape[3]]
    }

    /// The elements from one row on, and how many lie from each token to the next.
    #[inline(always)]
    pub fn rows_from(&self, batch: usize, token: usize, head: usize) -> (&'a [T], usize) {
        let start = batch * self.strides[0] + token * self.strides[1] + head * self.strides[2];
        (&self.data[start..], self.strides[1])
    }

    /// The same array for `ndarray`.
    ///
    /// # Panics
    /// Never: the constructor checked the extent.
    pub fn view(&self) -> ArrayView4<'a, T> {
        let [b, s, h] = self.strides;
        if self.shape.contains(&0) {
            // No element needs a place, but strides that could lie beyond the data are refused.
            return ArrayView4::from_shape(self.shape, &[]).expect("as many elements as data");
        }
        ArrayView4::from_shape(self.shape.strides([b, s, h, 1]), self.data).expect("checked by Tensor::new")
    }
}

/// Number of elements from the first to the last one, 0 for an empty array.
///
/// # Errors
/// [`Error::Overflow`] when it has no `isize`.
pub fn extent(arg: &'static str, shape: &[usize], strides: &[usize]) -> Result<usize> {
    let overflow = || Error::Overflow { arg, got: format!("shape {} with strides {strides:?}", shape_text(shape)) };
    let mut count = 1usize;
    let mut last = 0usize;
    let mut empty = false;
    for (&n, &stride) in shape.iter().zip(strides) {
        empty |= n == 0;
        let n = n.max(1);
        count = count.checked_mul(n).ok_or_else(overflow)?;
        last = stride.checked_mul(n - 1).and_then(|reach| last.checked_add(reach)).ok_or_else(overflow)?;
    }
    if isize::try_from(count).is_err() || isize::try_from(last).is_err() {
        return Err(overflow());
    }
    Ok(if empty { 0 } else { last + 1 })
}

/// `(2, 3, 4)`, as Python prints it.
pub fn shape_text(shape: &[usize]) -> String {
    let inner = shape.iter().map(usize::to_string).collect::<Vec<_>>().join(", ");
    if shape.len() == 1 { format!("({inner},)") } else { format!("({inner})") }
}

/// The sizes of one attention call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AttnShape {
    /// Batch size.
    pub batch: usize,
    /// Queries per sequence.
    pub seqlen_q: usize,
    /// Keys per sequence.
    pub seqlen_k: usize,
    /// Query heads.
    pub num_heads: usize,
    /// Key and value heads; divides `num_heads`.
    pub num_kv_heads: usize,
    /// Width of queries and keys.
    pub head_dim: usize,
    /// Width of values and outputs.
    pub head_dim_v: usize,
}

/// Widest head that the kernels' scratch is laid out for.
pub const MAX_HEAD_DIM: usize = 1024;

impl AttnShape {
    /// Checks the shapes of `q` `[B, Sq, H, D]`, `k` `[B, Sk, Hkv, D]` and `v` `[B, Sk, Hkv, Dv]` against each other.
    ///
    /// # Errors
    /// [`Error::Shape`] naming the first argument that does not fit, [`Error::Unsupported`] for heads wider than
    /// [`MAX_HEAD_DIM`], [`Error::Overflow`] when the output or the score matrix cannot be indexed.
    pub fn new(names: [&'static str; 3], q: [usize; 4], k: [usize; 4], v: [usize; 4]) -> Result<Self> {
        let [q_name, k_name, v_name] = names;
        let mismatch = |arg, expected: String, got: [usize; 4]| Err(Error::Shape { arg, expected, got: shape_text(&got) });
        let [batch, seqlen_q, num_heads, head_dim] = q;
        let [_, seqlen_k, num_kv_heads, _] = k;
        let head_dim_v = v[3];
        if k[0] != batch {
            return mismatch(k_name, format!("with batch size {batch} as {q_name} has"), k);
        }
        if k[3] != head_dim {
            return mismatch(k_name, format!("with head_dim {head_dim} as {q_name} has"), k);
        }
        if v[..3] != k[..3] {
            let [b, s, h] = [k[0], k[1], k[2]];
            return mismatch(v_name, format!("with batch {b}, length {s} and {h} heads as {k_name} has"), v);
        }
        let divides = if num_kv_heads == 0 { num_heads == 0 } else { num_heads % num_kv_heads == 0 };
        if !divides {
            return mismatch(k_name, format!("with a head count that divides {q_name}'s {num_heads}"), k);
        }
        for (arg, dim) in [(q_name, head_dim), (v_name, head_dim_v)] {
            if dim > MAX_HEAD_DIM {
                return Err(Error::Unsupported {
                    what: format!("{arg}: head_dim {dim}"),
                    instead: format!("heads of 1 to {MAX_HEAD_DIM} are"),
                });
            }
        }
        extent("out", &[batch, seqlen_q, num_heads, head_dim_v], &[0; 4])?;
        extent("lse", &[batch, num_heads, seqlen_q], &[0; 3])?;
        Ok(Self { batch, seqlen_q, seqlen_k, num_heads, num_kv_heads, head_dim, head_dim_v })
    }

    /// `1 / sqrt(head_dim)`; 1 for heads without width, whose scores are 0.
    pub fn default_scale(&self) -> f64 {
        1.0 / (self.head_dim.max(1) as f64).sqrt()
    }

    /// Query heads that share one key/value head.
    pub fn group(&self) -> usize {
        self.num_heads / self.num_kv_heads.max(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strided_rows_are_found() {
        let data: Vec<f32> = (0u16..48).map(f32::from).collect();
        let t = Tensor::new("q", &data, [1, 2, 3, 4], [0, 4, 16]).unwrap();
        assert_eq!(t.row(0, 1, 2), &[36.0, 37.0, 38.0, 39.0]);
        assert_eq!(t.view()[[0, 1, 2, 3]].to_bits(), 39f32.to_bits());
    }

    #[test]
    fn short_data_is_refused() {
        let data = [0f32; 10];
        assert!(matches!(Tensor::contiguous("k", &data, [1, 3, 1, 4]), Err(Error::Shape { arg: "k", .. })));
    }

    #[test]
    fn overflow_is_refused() {
        assert!(matches!(extent("q", &[1 << 40, 1 << 40], &[0, 0]), Err(Error::Overflow { .. })));
        assert_eq!(extent("q", &[3, 0, 5], &[5, 5, 1]), Ok(0));
    }
}
