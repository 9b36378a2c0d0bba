//! Arrays to pass: descriptors, sound or broken, with the memory that they describe.

use arbitrary::Arbitrary;
use dlpark::DlpackFlags;
use dlpark::ffi::{DLDataType, DLDataTypeCode, DLDevice, DLDeviceType, DLPackVersion, DLTensor};
use half::{bf16, f16};
use std::alloc::{Layout, alloc, dealloc, handle_alloc_error};
use std::ptr::{NonNull, null_mut};

/// Bytes of the largest array that gets memory.
const LARGEST: i128 = 1 << 20;

/// Integers at which arithmetic breaks.
#[derive(Debug, Clone, Copy, Arbitrary)]
pub enum Number {
    Small(i8),
    NearPower { exponent: u8, distance: i8 },
    NearNegativePower { exponent: u8, distance: i8 },
}

impl Number {
    pub fn get(self) -> i64 {
        match self {
            Self::Small(n) => n.into(),
            Self::NearPower { exponent, distance } => (1i64 << (exponent % 64)).wrapping_add(distance.into()),
            Self::NearNegativePower { exponent, distance } => (-1i64 << (exponent % 64)).wrapping_add(distance.into()),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Arbitrary)]
pub enum Element {
    F32,
    F64,
    F16,
    BF16,
    Bool,
}

impl Element {
    fn dtype(self) -> DLDataType {
        let (code, bits) = match self {
            Self::F32 => (DLDataTypeCode::FLOAT, 32),
            Self::F64 => (DLDataTypeCode::FLOAT, 64),
            Self::F16 => (DLDataTypeCode::FLOAT, 16),
            Self::BF16 => (DLDataTypeCode::BFLOAT, 16),
            Self::Bool => (DLDataTypeCode::BOOL, 8),
        };
        DLDataType { code, bits, lanes: 1 }
    }

    fn of(dtype: DLDataType) -> Option<Self> {
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

    /// Scores and sums of inputs of this type.
    pub fn accumulator(self) -> Self {
        if self == Self::F64 { Self::F64 } else { Self::F32 }
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

/// Which exports a call mixes: random ones would rarely be of one library.
#[derive(Debug, Clone, Copy, Arbitrary)]
pub enum Library {
    Dlpack,
    NumPy,
    Mixed,
}

/// How the elements of a sound array lie.
#[derive(Debug, Clone, Copy, Arbitrary)]
pub struct Arrangement {
    order: Order,
    /// A gap after each axis' elements, bit by bit.
    gaps: u8,
    /// The last axis takes every second element.
    spread: bool,
    /// Axes that run backwards, bit by bit.
    reversed: u8,
    /// Axes that repeat one element, bit by bit.
    repeated: u8,
    /// Strides are left out where that is allowed.
    implied: bool,
}

#[derive(Debug, Clone, Copy, Arbitrary)]
enum Order {
    Rows,
    HeadsFirst,
    LastTwoSwapped,
    Backwards,
}

/// What is wrong, or odd, about a descriptor.
#[derive(Debug, Clone, Copy, Arbitrary)]
pub enum Fault {
    Extent {
        axis: u8,
        n: Number,
    },
    Stride {
        axis: u8,
        step: Number,
    },
    MoreAxes(u8),
    FewerAxes(u8),
    NegativeRank(i32),
    Type {
        code: u8,
        bits: u8,
        lanes: u16,
    },
    NullData,
    NullShape,
    Misaligned(u8),
    /// The descriptor's pointer lies this far before the first element, wrapping around.
    ByteOffset(Number),
    Device {
        kind: u32,
        id: i32,
    },
    /// What `__dlpack_device__` says, whatever the descriptor says.
    ReportedDevice {
        kind: i64,
        id: i64,
    },
    NoDeviceMethod,
    MajorVersion(u32),
    ReadOnly,
    Capsule(CapsuleFault),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Arbitrary)]
pub enum CapsuleFault {
    OtherName,
    Consumed,
    NotOne,
    Raises,
}

impl Fault {
    /// Whether a NumPy array can have it.
    fn is_for_numpy(&self) -> bool {
        matches!(
            self,
            Self::Extent { .. }
                | Self::Stride { .. }
                | Self::MoreAxes(_)
                | Self::FewerAxes(_)
                | Self::Type { .. }
                | Self::Misaligned(_)
                | Self::ReadOnly
        )
    }
}

/// An array that is to be made.
#[derive(Debug, Clone, Arbitrary)]
pub struct Plan {
    export: Export,
    arrangement: Arrangement,
    /// The first three are applied.
    faults: Vec<Fault>,
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
    /// Elements from one to the next along each axis.
    strides: Option<Vec<i64>>,
    memory: Memory,
    first: usize,
    /// Bytes of `memory` that belong to an element; `None` for too many elements to list.
    elements: Option<Vec<usize>>,
}

// SAFETY: the pointers lead into memory that the array owns; one thread at a time uses it.
unsafe impl Send for Array {}
// SAFETY: as above.
unsafe impl Sync for Array {}

/// Memory without a byte to spare, so that a sanitizer sees what lies beyond.
struct Memory {
    start: NonNull<u8>,
    layout: Layout,
    before: Vec<u8>,
}

impl Memory {
    /// Every byte 255: a NaN in each floating-point type, so that an element that is none of the array's shows in the result.
    fn new(len: usize) -> Self {
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

impl Plan {
    /// The array of that shape, or `None` when it would describe more memory than there is, in a way that nobody can detect.
    pub fn make(&self, library: Library, element: Element, shape: &[i64]) -> Option<Array> {
        let export = match (library, self.export) {
            (Library::NumPy, _) => Export::NumPy,
            (Library::Dlpack, Export::NumPy) => Export::Legacy,
            (_, export) => export,
        };
        let applies = |fault: &Fault| export != Export::NumPy || fault.is_for_numpy();
        let faults: Vec<Fault> = self.faults.iter().copied().take(3).filter(applies).collect();
        let mut shape = shape.to_vec();
        let mut dtype = element.dtype();
        for fault in &faults {
            match *fault {
                Fault::Extent { axis, n } if !shape.is_empty() => {
                    let axis = usize::from(axis) % shape.len();
                    shape[axis] = n.get();
                }
                // Beyond 64 axes, which is NumPy's limit.
                Fault::MoreAxes(n) => shape.splice(0..0, std::iter::repeat_n(1, usize::from(n % 70))).for_each(drop),
                Fault::FewerAxes(n) => drop(shape.drain(..usize::from(n).min(shape.len()))),
                Fault::Type { code, bits, lanes } => dtype = DLDataType { code: DLDataTypeCode(code), bits, lanes },
                _ => {}
            }
        }
        let mut strides = self.arrangement.strides(&shape);
        for fault in &faults {
            if let Fault::Stride { axis, step } = *fault
                && let Some(strides) = strides.as_mut().filter(|strides| !strides.is_empty())
            {
                let axis = usize::from(axis) % strides.len();
                strides[axis] = step.get();
            }
        }
        let needs_strides = matches!(export, Export::Versioned(minor) if minor >= 2);
        if needs_strides && strides.is_none() {
            strides = Some(contiguous(&shape));
        }
        Some(realise(export, &faults, dtype, shape, strides)?.with_values())
    }
}

/// The array with those faults that are not in its extents, strides and type.
fn realise(export: Export, faults: &[Fault], dtype: DLDataType, shape: Vec<i64>, strides: Option<Vec<i64>>) -> Option<Array> {
    let element = Element::of(dtype);
    let itemsize = (i128::from(dtype.bits) * i128::from(dtype.lanes) + 7) / 8;
    let negative = shape.iter().any(|&n| n < 0);
    let empty = shape.contains(&0);
    let (lowest, highest) = reach(&shape, strides.as_deref().unwrap_or(&contiguous(&shape)));
    let mut bytes = if empty { 0 } else { (highest - lowest + 1) * itemsize };
    let mut verdict = match () {
        () if negative => Verdict::Broken("a negative extent"),
        () if bytes > isize::MAX as i128 => Verdict::Broken("more bytes than can be addressed"),
        () if bytes > LARGEST => return None,
        () if element.is_none() => Verdict::Broken("an unknown type"),
        () => Verdict::Sound,
    };
    let without_memory = negative || bytes > LARGEST;
    if without_memory {
        bytes = 0;
    }
    let mut array = Array {
        export,
        regular: faults.is_empty(),
        verdict,
        element,
        tensor: DLTensor {
            data: null_mut(),
            device: DLDevice { device_type: DLDeviceType::CPU, device_id: 0 },
            ndim: shape.len() as i32,
            dtype,
            shape: null_mut(),
            strides: null_mut(),
            byte_offset: 0,
        },
        version: DLPackVersion { major: 1, minor: if let Export::Versioned(minor) = export { minor.into() } else { 3 } },
        flags: DlpackFlags::empty(),
        capsule: None,
        reported_device: Some((1, 0)),
        strides,
        memory: Memory::new(0),
        first: 0,
        elements: None,
        shape,
    };
    let (mut misaligned, mut offset, mut null) = (0usize, 0u64, false);
    let by_method = export != Export::Exchange;
    let (mut device, mut reported) = (true, true);
    let mut broken = |reason| verdict = Verdict::Broken(reason);
    for fault in faults {
        match *fault {
            Fault::NegativeRank(rank) => {
                array.tensor.ndim = rank | i32::MIN;
                broken("a negative rank");
            }
            Fault::NullData => null = true,
            Fault::Misaligned(n) => misaligned = usize::from(n % 64),
            Fault::ByteOffset(n) => offset = n.get() as u64,
            Fault::Device { kind, id } => {
                array.tensor.device = DLDevice { device_type: DLDeviceType(kind), device_id: id };
                device = kind == 1;
            }
            Fault::ReportedDevice { kind, id } => {
                array.reported_device = Some((kind, id));
                reported = kind == 1;
            }
            Fault::NoDeviceMethod => {
                array.reported_device = None;
                reported = true;
            }
            Fault::MajorVersion(major) => array.version.major = major,
            Fault::ReadOnly => array.flags = DlpackFlags::READ_ONLY,
            Fault::Capsule(fault) => array.capsule = Some(fault),
            Fault::NullShape
            | Fault::Extent { .. }
            | Fault::Stride { .. }
            | Fault::MoreAxes(_)
            | Fault::FewerAxes(_)
            | Fault::Type { .. } => {}
        }
    }
    let null_shape = faults.iter().any(|fault| matches!(fault, Fault::NullShape)) && array.tensor.ndim > 0;
    if null_shape {
        broken("no extents");
    }
    if !device || (by_method && !reported) {
        broken("another device");
    }
    if null && !empty {
        broken("no data");
    }
    if matches!(export, Export::Versioned(_)) && array.version.major != 1 {
        broken("an unknown version");
    }
    if by_method && array.capsule.is_some() {
        broken("no capsule");
    }
    let odd = array.tensor.device.device_id != 0 || array.reported_device.is_none_or(|(_, id)| id != 0);
    let odd = odd || misaligned > 0 || offset > 256 || array.shape.len() > 8 || (null && offset > 0);
    if verdict == Verdict::Sound && odd {
        verdict = Verdict::Odd;
    }
    array.verdict = verdict;
    let front = misaligned + if offset <= 256 { offset as usize } else { 0 };
    array.memory = Memory::new(front + bytes as usize);
    array.tensor.byte_offset = offset;
    if !null {
        let first = front + if empty || without_memory { 0 } else { (-lowest * itemsize) as usize };
        array.tensor.data = array.memory.start.as_ptr().wrapping_add(first).wrapping_sub(offset as usize).cast();
        array.first = first;
        array.elements = array.places(first, itemsize as usize);
    }
    if !null_shape {
        array.tensor.shape = array.shape.as_mut_ptr();
    }
    if let Some(strides) = &mut array.strides {
        array.tensor.strides = strides.as_mut_ptr();
    }
    Some(array)
}

impl Arrangement {
    /// `None` for strides that are left out.
    fn strides(self, shape: &[i64]) -> Option<Vec<i64>> {
        if self.implied {
            return None;
        }
        let rank = shape.len();
        let mut order: Vec<usize> = (0..rank).collect();
        match self.order {
            Order::HeadsFirst if rank >= 3 => order.swap(rank - 3, rank - 2),
            Order::LastTwoSwapped if rank >= 2 => order.swap(rank - 2, rank - 1),
            Order::Backwards => order.reverse(),
            Order::Rows | Order::HeadsFirst | Order::LastTwoSwapped => {}
        }
        let bit = |bits: u8, axis: usize| axis < 8 && bits >> axis & 1 == 1;
        let mut step = 1 + i64::from(self.spread);
        let mut strides = vec![0; rank];
        for &axis in order.iter().rev() {
            let sign = if bit(self.reversed, axis) { -1 } else { 1 };
            strides[axis] = if bit(self.repeated, axis) { 0 } else { step.wrapping_mul(sign) };
            if !bit(self.repeated, axis) {
                step = step.wrapping_mul(shape[axis].max(1)).wrapping_add(i64::from(bit(self.gaps, axis)));
            }
        }
        Some(strides)
    }
}

fn contiguous(shape: &[i64]) -> Vec<i64> {
    let mut strides = vec![1i64; shape.len()];
    for axis in (1..shape.len()).rev() {
        strides[axis - 1] = strides[axis].saturating_mul(shape[axis].max(1));
    }
    strides
}

/// Positions of the lowest and the highest element, the first one at 0.
fn reach(shape: &[i64], strides: &[i64]) -> (i128, i128) {
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
    fn places(&self, first: usize, itemsize: usize) -> Option<Vec<usize>> {
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

    fn with_values(mut self) -> Self {
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
