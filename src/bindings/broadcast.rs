//! Broadcasting, by strides: an axis of extent 1 is repeated with stride 0.

use super::array::{Array, ElementType};
use super::attention::dispatch_dtype;
use super::dlpack::Memory;
use crate::dtype::{DType, Element};
use crate::error::{Error, Result};
use crate::kernels::bias::{Bias, BiasView};
use crate::tensor::shape_text;
use half::{bf16, f16};

/// Strides of `memory` seen as an array of shape `target`, aligned at the last axes; `None` when it does not broadcast.
pub fn strides_for(memory: &Memory, target: &[usize]) -> Option<Vec<usize>> {
    strides_of(&memory.shape, &memory.strides, target)
}

/// Strides of an array of that shape and strides seen as one of shape `target`; as [`strides_for`].
pub fn strides_of(shape: &[usize], own: &[usize], target: &[usize]) -> Option<Vec<usize>> {
    let missing = target.len().checked_sub(shape.len())?;
    let mut strides = vec![0; target.len()];
    for (axis, (&n, &stride)) in shape.iter().zip(own).enumerate() {
        let wanted = target[missing + axis];
        if n == wanted {
            strides[missing + axis] = if n == 1 { 0 } else { stride };
        } else if n != 1 {
            return None;
        }
    }
    Some(strides)
}

/// The common shape of arrays that broadcast against each other; `None` when they do not.
pub fn common(shapes: &[&[usize]]) -> Option<Vec<usize>> {
    let rank = shapes.iter().map(|shape| shape.len()).max().unwrap_or(0);
    let mut common = vec![1; rank];
    for shape in shapes {
        for (&n, target) in shape.iter().rev().zip(common.iter_mut().rev()) {
            match (n, *target) {
                (1, _) => {}
                (n, 1) => *target = n,
                (n, t) if n == t => {}
                _ => return None,
            }
        }
    }
    Some(common)
}

/// A mask or bias, broadcast to `target` `[.., H, Sq, Sk]`; views start at one place along the leading axes, and at
/// a head.
///
/// # Errors
/// [`Error::Shape`] when it does not broadcast, [`Error::DType`] when it is neither boolean, nor of `T`, nor float32.
pub fn bias<'a, T: Element>(array: Option<&Array<'_>>, target: &[usize], leading: &[usize], head: usize) -> Result<Bias<'a, T>> {
    let Some(array) = array else { return Ok(Bias::None) };
    let arg = array.arg;
    let strides = strides_for(&array.memory, target).ok_or_else(|| Error::Shape {
        arg,
        expected: format!("that broadcasts to {}", shape_text(target)),
        got: shape_text(array.shape()),
    })?;
    let empty = target.contains(&0);
    let outer = target.len() - 4;
    let origin: usize = leading.iter().chain([&0, &head]).zip(&strides).map(|(i, stride)| i * stride).sum();
    let strides: [isize; 4] = std::array::from_fn(|axis| strides[outer + axis] as isize);
    view_bias(array, empty, origin, strides)
}

/// The Toeplitz matrix of which row `h` of `array` `[H or 1, Sq + Sk - 1]` holds the diagonals of head `h`, from bottom left to top
/// right.
///
/// # Errors
/// [`Error::Shape`], or [`Error::DType`] as [`bias`].
pub fn toeplitz<'a, T: Element>(array: Option<&Array<'_>>, [heads, seqlen_q, seqlen_k]: [usize; 3]) -> Result<Bias<'a, T>> {
    let Some(array) = array else { return Ok(Bias::None) };
    let diagonals = (seqlen_q + seqlen_k).saturating_sub(1);
    match array.shape() {
        &[rows, width] if (rows == heads || rows == 1) && width == diagonals => {}
        got => {
            let expected = format!("({heads}, {diagonals}) or (1, {diagonals})");
            return Err(Error::Shape { arg: array.arg, expected, got: shape_text(got) });
        }
    }
    if array.element == ElementType::Bool {
        let expected = if T::DTYPE == DType::F32 { "float32".into() } else { format!("{} or float32", T::DTYPE) };
        return Err(Error::DType { arg: array.arg, expected, got: array.element.to_string() });
    }
    let empty = heads == 0 || seqlen_q == 0 || seqlen_k == 0;
    let [by_head, step] = [array.memory.strides[0] as isize, array.memory.strides[1] as isize];
    let by_head = if array.shape()[0] == 1 { 0 } else { by_head };
    view_bias(array, empty, seqlen_q.saturating_sub(1) * step as usize, [0, by_head, -step, step])
}

fn view_bias<'a, T: Element>(array: &Array<'_>, empty: bool, origin: usize, strides: [isize; 4]) -> Result<Bias<'a, T>> {
    let arg = array.arg;
    match &array.element {
        ElementType::Float(dtype) if empty && [T::DTYPE, DType::F32].contains(dtype) => Ok(Bias::None),
        ElementType::Bool if empty => Ok(Bias::None),
        ElementType::Bool => Ok(Bias::Bool(BiasView { data: array.memory.slice(arg)?, origin, strides })),
        ElementType::Float(dtype) if *dtype == T::DTYPE => {
            Ok(Bias::Input(BiasView { data: array.memory.slice(arg)?, origin, strides }))
        }
        ElementType::Float(DType::F32) => Ok(Bias::Single(BiasView { data: array.memory.slice(arg)?, origin, strides })),
        other => {
            let own = if T::DTYPE == DType::F32 { String::new() } else { format!(", {}", T::DTYPE) };
            Err(Error::DType { arg, expected: format!("bool{own} or float32"), got: other.to_string() })
        }
    }
}

/// Checks what [`bias`] would, before results are allocated.
///
/// # Errors
/// As [`bias`].
pub fn check_bias(array: &Array<'_>, target: &[usize], dtype: DType) -> Result<()> {
    fn check<T: Element>(array: &Array<'_>, target: &[usize]) -> Result<()> {
        bias::<T>(Some(array), target, &[], 0).map(|_| ())
    }
    dispatch_dtype!(dtype, check, array, target)
}

/// Checks what [`toeplitz`] would, before results are allocated.
///
/// # Errors
/// As [`toeplitz`].
pub fn check_toeplitz(array: &Array<'_>, extents: [usize; 3], dtype: DType) -> Result<()> {
    fn check<T: Element>(array: &Array<'_>, extents: [usize; 3]) -> Result<()> {
        toeplitz::<T>(Some(array), extents).map(|_| ())
    }
    dispatch_dtype!(dtype, check, array, extents)
}
