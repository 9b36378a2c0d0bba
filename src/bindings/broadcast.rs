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
    let missing = target.len().checked_sub(memory.shape.len())?;
    let mut strides = vec![0; target.len()];
    for (axis, (&n, &stride)) in memory.shape.iter().zip(&memory.strides).enumerate() {
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
        expected: format!("one that broadcasts to {}", shape_text(target)),
        got: shape_text(array.shape()),
    })?;
    let empty = target.contains(&0);
    let outer = target.len() - 4;
    let offset: usize = leading.iter().chain([&0, &head]).zip(&strides).map(|(i, stride)| i * stride).sum();
    let strides: [usize; 4] = std::array::from_fn(|axis| strides[outer + axis]);
    match &array.element {
        ElementType::Float(dtype) if empty && [T::DTYPE, DType::F32].contains(dtype) => Ok(Bias::None),
        ElementType::Bool if empty => Ok(Bias::None),
        ElementType::Bool => Ok(Bias::Bool(BiasView { data: &array.memory.slice(arg)?[offset..], strides })),
        ElementType::Float(dtype) if *dtype == T::DTYPE => {
            Ok(Bias::Input(BiasView { data: &array.memory.slice(arg)?[offset..], strides }))
        }
        ElementType::Float(DType::F32) => Ok(Bias::Single(BiasView { data: &array.memory.slice(arg)?[offset..], strides })),
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
