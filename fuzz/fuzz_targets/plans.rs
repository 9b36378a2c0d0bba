//! Plans of arrays, which the fuzzer draws: how elements lie, and what is to be wrong.

use crate::arrays::{Array, CapsuleFault, Element, Export, Memory, Verdict, contiguous, reach};
use arbitrary::Arbitrary;
use dlpark::DlpackFlags;
use dlpark::ffi::{DLDataType, DLDataTypeCode, DLDevice, DLDeviceType, DLPackVersion, DLTensor};
use std::ptr::null_mut;

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
    /// `__dlpack__` takes no options.
    PlainMethod,
    MajorVersion(u32),
    ReadOnly,
    Capsule(CapsuleFault),
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
    let mut bytes = if empty { 0 } else { (highest - lowest + 1).saturating_mul(itemsize) };
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
        plain_method: false,
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
            Fault::PlainMethod => array.plain_method = true,
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
