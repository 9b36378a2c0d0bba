//! Foreign memory: the one place where an array's pointer becomes a slice.

use crate::error::{Error, Result};
use crate::tensor::extent;
use bytemuck::Pod;
use numpy::{PyUntypedArray, PyUntypedArrayMethods};
use pyo3::Bound;
use std::ffi::c_void;

/// Where an array's elements are. Strides count elements and are not negative.
#[derive(Debug, Clone)]
pub struct Memory {
    /// The first element.
    pub pointer: *mut c_void,
    /// Extents.
    pub shape: Vec<usize>,
    /// Elements between neighbours along each axis.
    pub strides: Vec<usize>,
}

impl Memory {
    /// Elements from the first to the last.
    ///
    /// # Errors
    /// [`Error::Overflow`] when they cannot be counted.
    pub fn extent(&self, arg: &'static str) -> Result<usize> {
        extent(arg, &self.shape, &self.strides)
    }

    /// The bytes from the first element to the last one's end.
    ///
    /// # Errors
    /// As [`Memory::extent`].
    pub fn bytes(&self, arg: &'static str, itemsize: usize) -> Result<std::ops::Range<usize>> {
        let start = self.pointer as usize;
        let end = self.extent(arg)?.checked_mul(itemsize).and_then(|len| start.checked_add(len));
        let end = end.filter(|&end| isize::try_from(end - start).is_ok());
        Ok(start..end.ok_or_else(|| Error::Overflow { arg, got: crate::tensor::shape_text(&self.shape) })?)
    }

    /// The elements from the first to the last.
    ///
    /// # Errors
    /// [`Error::Overflow`] when their bytes cannot be counted, [`Error::Kind`] when the pointer is not one to `T`.
    #[expect(unsafe_code, reason = "foreign memory")]
    pub fn slice<'a, T: Pod>(&self, arg: &'static str) -> Result<&'a [T]> {
        let len = self.checked_len::<T>(arg)?;
        if len == 0 {
            return Ok(&[]);
        }
        // SAFETY: the exporter promises `shape` and `strides` elements behind `pointer`, alive while its object is, which the
        // caller of the binding holds; the pointer is aligned and not null, the length fits; every bit pattern is a `T`.
        Ok(unsafe { std::slice::from_raw_parts(self.pointer.cast::<T>(), len) })
    }

    /// The elements from the first to the last, for writing.
    ///
    /// # Errors
    /// As [`Memory::slice`].
    #[expect(unsafe_code, reason = "foreign memory")]
    pub fn slice_mut<'a, T: Pod>(&self, arg: &'static str) -> Result<&'a mut [T]> {
        let len = self.checked_len::<T>(arg)?;
        if len == 0 {
            return Ok(&mut []);
        }
        // SAFETY: as in `slice`; the callers have refused read-only arrays and those that overlap an input.
        Ok(unsafe { std::slice::from_raw_parts_mut(self.pointer.cast::<T>(), len) })
    }

    /// Asks the system for huge pages behind a large new array, as NumPy does for its own: touching every small page for the first
    /// time takes as long as a tenth of windowed attention. Where the system declines, nothing is lost.
    #[expect(unsafe_code, reason = "foreign memory")]
    pub fn prefer_huge_pages(&self, arg: &'static str, itemsize: usize) -> Result<()> {
        const LARGE: usize = 4 << 20;
        const PAGE: usize = 4096;
        let bytes = self.bytes(arg, itemsize)?;
        let skipped = bytes.start.next_multiple_of(PAGE) - bytes.start;
        let len = bytes.len().saturating_sub(skipped) / PAGE * PAGE;
        if len >= LARGE {
            let start = self.pointer.cast::<u8>().wrapping_add(skipped).cast();
            // SAFETY: whole pages within an array that the caller has just made; the advice does not change what they hold.
            unsafe { libc::madvise(start, len, libc::MADV_HUGEPAGE) };
        }
        Ok(())
    }

    fn checked_len<T>(&self, arg: &'static str) -> Result<usize> {
        self.bytes(arg, size_of::<T>())?;
        let len = self.extent(arg)?;
        if len > 0 && (self.pointer.is_null() || !(self.pointer as usize).is_multiple_of(align_of::<T>())) {
            let got = format!("address {:#x}", self.pointer as usize);
            return Err(Error::Kind { arg, expected: "aligned memory".into(), got });
        }
        Ok(len)
    }
}

/// Shape and strides of a descriptor that was borrowed from its producer.
///
/// # Errors
/// [`Error::Shape`] when the rank is negative or the arrays are missing.
#[expect(unsafe_code, reason = "foreign memory")]
pub fn extents(arg: &'static str, tensor: &dlpark::ffi::DLTensor) -> Result<(Vec<i64>, Option<Vec<i64>>)> {
    let rank = usize::try_from(tensor.ndim).ok().filter(|&rank| rank == 0 || !tensor.shape.is_null());
    let Some(rank) = rank else {
        return Err(Error::Shape { arg, expected: "of a described rank".into(), got: format!("rank {}", tensor.ndim) });
    };
    if rank == 0 {
        return Ok((Vec::new(), Some(Vec::new())));
    }
    // SAFETY: the protocol promises `ndim` extents behind a `shape` that is not null, valid during the borrow.
    let shape = unsafe { std::slice::from_raw_parts(tensor.shape, rank) }.to_vec();
    // SAFETY: likewise for strides.
    let strides = (!tensor.strides.is_null()).then(|| unsafe { std::slice::from_raw_parts(tensor.strides, rank) }.to_vec());
    Ok((shape, strides))
}

/// Address of a NumPy array's first element.
#[expect(unsafe_code, reason = "foreign memory")]
pub fn numpy_data(array: &Bound<'_, PyUntypedArray>) -> *mut c_void {
    // SAFETY: `as_array_ptr` points to the array object, which `array` keeps alive.
    unsafe { (*array.as_array_ptr()).fields.data.cast() }
}

/// A NumPy array's flags, as `NPY_ARRAY_*`.
#[expect(unsafe_code, reason = "foreign memory")]
pub fn numpy_flags(array: &Bound<'_, PyUntypedArray>) -> std::ffi::c_int {
    // SAFETY: as in `numpy_data`.
    unsafe { (*array.as_array_ptr()).fields.flags }
}
