//! Arrays as a producer has them: a descriptor, the memory that it describes, and what is known to be wrong with it.

use arbitrary::Arbitrary;
use dlpark::DlpackFlags;
use dlpark::ffi::{DLDataType, DLDataTypeCode, DLPackVersion, DLTensor};
use half::{bf16, f16};
use std::alloc::{Layout, alloc, dealloc, handle_alloc_error};
use std::ptr::NonNull;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Arbitrary)]
pub enum Element {
    F32,
    F64,
    F16,
    BF16,
    Bool,
}

impl Element {
    pub fn dtype(self) -> DLDataType {
        let (code, bits) = match self {
            Self::F32 => (DLDataTypeCode::FLOAT, 32),
            Self::F64 => (DLDataTypeCode::FLOAT, 64),
            Self::F16 => (DLDataTypeCode::FLOAT, 16),
            Self::BF16 => (DLDataTypeCode::BFLOAT, 16),
            Self::Bool => (DLDataTypeCode::BOOL, 8),
        };
        DLDataType { code, bits, lanes: 1 }
    }

    pub fn of(dtype: DLDataType) -> Option<Self> {
        [Self::F32, Self::F64, Self::F16, Self::BF16, Self::Bool].into_iter().find(|element| element.dtype() == dtype)
    }

    /// NumPy's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "float32",
            Self::F64 => "float64",
            Self::F16 => "float16",
            Self::BF16 => "bfloat16",
            Self::Bool => "bool",
        }
    }

    fn write(self, x: f64, to: &mut [u8]) {
        match self {
            Self::F32 => to.copy_from_slice(&(x as f32).to_ne_bytes()),
            Self::F64 => to.copy_from_slice(&x.to_ne_bytes()),
            Self::F16 => to.copy_from_slice(&f16::from_f64(x).to_ne_bytes()),
            Self::BF16 => to.copy_from_slice(&bf16::from_f64(x).to_ne_bytes()),
            Self::Bool => to[0] = u8::from(x > 0.0),
        }
    }

    fn read(self, from: &[u8]) -> f64 {
        let two = || [from[0], from[1]];
        match self {
            Self::F32 => f32::from_ne_bytes(from.try_into().expect("4 bytes")).into(),
            Self::F64 => f64::from_ne_bytes(from.try_into().expect("8 bytes")),
            Self::F16 => f16::from_ne_bytes(two()).to_f64(),
            Self::BF16 => bf16::from_ne_bytes(two()).to_f64(),
            Self::Bool => from[0].into(),
        }
    }
}

/// How the array reaches the library.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Arbitrary)]
pub enum Export {
    /// A capsule named `dltensor`.
    Legacy,
    /// A capsule named `dltensor_versioned`, of version 1 and this minor version.
    Versioned(u8),
    /// The function table of DLPack 1.3, which lends a descriptor.
    Exchange,
    /// As a NumPy array.
    NumPy,
}

/// What is wrong with the capsule.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Arbitrary)]
pub enum CapsuleFault {
    OtherName,
    Consumed,
    NotOne,
    Raises,
}

/// What a consumer has to say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Nothing is wrong with the array itself.
    Sound,
    /// It is unusual, and may be refused.
    Odd,
    /// It must be refused, for this reason.
    Broken(&'static str),
}

/// An array that was made.
pub struct Array {
    pub export: Export,
    /// Whether it was planned without a fault.
    pub regular: bool,
    pub verdict: Verdict,
    pub element: Option<Element>,
    /// As many extents as there are, whatever `tensor.ndim` says.
    pub shape: Vec<i64>,
    pub tensor: DLTensor,
    pub version: DLPackVersion,
    pub flags: DlpackFlags,
    pub capsule: Option<CapsuleFault>,
    pub reported_device: Option<(i64, i64)>,
    /// Whether `__dlpack__` takes no version.
    pub plain_method: bool,
    /// Elements from one to the next along each axis.
    pub strides: Option<Vec<i64>>,
    pub memory: Memory,
    pub first: usize,
    /// Bytes of `memory` that belong to an element; `None` for too many elements to list.
    pub elements: Option<Vec<usize>>,
}

// SAFETY: the pointers lead into memory that the array owns; one thread at a time uses it.
unsafe impl Send for Array {}
// SAFETY: as above.
unsafe impl Sync for Array {}

/// Memory without a byte to spare, so that a sanitizer sees what lies beyond.
pub struct Memory {
    pub start: NonNull<u8>,
    layout: Layout,
    before: Vec<u8>,
}

impl Memory {
    /// Every byte 255: a NaN in each floating-point type, so that an element that is none of the array's shows in the result.
    pub fn new(len: usize) -> Self {
        let layout = Layout::from_size_align(len.max(1), 64).expect("sizes are limited");
        // SAFETY: the layout is not empty.
        let start = NonNull::new(unsafe { alloc(layout) }).unwrap_or_else(|| handle_alloc_error(layout));
        // SAFETY: `layout` was allocated.
        unsafe { start.write_bytes(255, layout.size()) };
        Self { start, layout, before: Vec::new() }
    }

    #[expect(clippy::mut_from_ref, reason = "foreign code writes to it as well; no two slices are alive at a time")]
    fn bytes(&self) -> &mut [u8] {
        // SAFETY: allocated and initialised by `new`.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.layout.size()) }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: allocated by `new` with this layout.
        unsafe { dealloc(self.start.as_ptr(), self.layout) };
    }
}

pub fn contiguous(shape: &[i64]) -> Vec<i64> {
    let mut strides = vec![1i64; shape.len()];
    for axis in (1..shape.len()).rev() {
        strides[axis - 1] = strides[axis].saturating_mul(shape[axis].max(1));
    }
    strides
}

/// Positions of the lowest and the highest element, the first one at 0.
pub fn reach(shape: &[i64], strides: &[i64]) -> (i128, i128) {
    let (mut lowest, mut highest) = (0i128, 0i128);
    for (&n, &stride) in shape.iter().zip(strides) {
        let last = (i128::from(n) - 1).max(0) * i128::from(stride);
        *(if last < 0 { &mut lowest } else { &mut highest }) += last;
    }
    (lowest, highest)
}

impl Array {
    /// Strides, those that are left out included.
    pub fn strides(&self) -> Vec<i64> {
        self.strides.clone().unwrap_or_else(|| contiguous(&self.shape))
    }

    /// The address and length of its memory, and the byte at which the first element is.
    pub fn memory(&self) -> (usize, usize, usize) {
        (self.memory.start.as_ptr() as usize, self.memory.layout.size(), self.first)
    }

    /// Where in memory each element starts.
    pub fn places(&self, first: usize, itemsize: usize) -> Option<Vec<usize>> {
        let strides = self.strides();
        let count = self.shape.iter().try_fold(1i64, |count, &n| count.checked_mul(n)).filter(|n| (0..=1 << 18).contains(n))?;
        if matches!(self.verdict, Verdict::Broken(_)) {
            return None;
        }
        Some(
            (0..count)
                .map(|mut flat| {
                    let mut at = first as i64;
                    for (&n, &stride) in self.shape.iter().zip(&strides).rev() {
                        at += flat % n * stride * itemsize as i64;
                        flat /= n;
                    }
                    at as usize
                })
                .collect(),
        )
    }

    pub fn with_values(mut self) -> Self {
        let bytes = self.memory.bytes();
        if let (Some(places), Some(element)) = (&self.elements, self.element) {
            let size = usize::from(element.dtype().bits / 8);
            let mut state = 1u32;
            for &at in places {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                element.write(f64::from(state >> 8) / f64::from(1u32 << 23) - 1.0, &mut bytes[at..at + size]);
            }
        } else if self.elements.is_none() {
            bytes.fill(0);
        }
        self.memory.before = bytes.to_vec();
        self
    }

    /// Whether every byte is what it was.
    pub fn is_unchanged(&self) -> bool {
        self.memory.bytes() == self.memory.before.as_slice()
    }

    /// Whether no byte was written but those of elements.
    pub fn is_unchanged_between_elements(&self) -> bool {
        let (Some(places), Some(element)) = (&self.elements, self.element) else { return true };
        let mut inside = vec![false; self.memory.before.len()];
        for &at in places {
            inside[at..at + usize::from(element.dtype().bits / 8)].fill(true);
        }
        let mut bytes = self.memory.bytes().iter().zip(&self.memory.before).zip(inside);
        bytes.all(|((now, before), inside)| inside || now == before)
    }

    /// The elements, in order.
    pub fn values(&self) -> Vec<f64> {
        let (Some(places), Some(element)) = (&self.elements, self.element) else { return Vec::new() };
        let size = usize::from(element.dtype().bits / 8);
        let bytes = self.memory.bytes();
        places.iter().map(|&at| element.read(&bytes[at..at + size])).collect()
    }

    /// Whether it is row-major without a gap, or empty.
    pub fn is_plain(&self) -> bool {
        self.shape.contains(&0) || self.strides() == contiguous(&self.shape)
    }

    /// Whether elements share memory.
    pub fn repeats(&self) -> bool {
        let mut places = self.elements.clone().unwrap_or_default();
        places.sort_unstable();
        places.windows(2).any(|pair| pair[0] == pair[1])
    }
}
