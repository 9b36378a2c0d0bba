//! The ordered list of instruction sets, their detection, and the crossing into code compiled for one.

use super::{Task, amx, avx2, avx512, portable::Portable};
use std::sync::OnceLock;

/// Instruction sets in ascending order: a machine that has one has all before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Level {
    /// Whatever the compilation target guarantees.
    Scalar,
    /// AVX2, FMA and F16C.
    Avx2,
    /// AVX-512 F, BW, CD, DQ and VL.
    Avx512,
    /// [`Level::Avx512`] and AVX512-BF16.
    Avx512Bf16,
    /// [`Level::Avx512Bf16`] and AMX with BF16.
    Amx,
}

/// The environment variable that lowers the level.
pub const ISA_VARIABLE: &str = "SUBQUAD_ISA";

impl Level {
    /// Every level, ascending.
    pub const ALL: [Self; 5] = [Self::Scalar, Self::Avx2, Self::Avx512, Self::Avx512Bf16, Self::Amx];

    /// The name that [`Level::from_name`] accepts.
    pub fn name(self) -> &'static str {
        match self {
            Self::Scalar => "scalar",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
            Self::Avx512Bf16 => "avx512bf16",
            Self::Amx => "amx",
        }
    }

    /// The level of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|level| level.name() == name)
    }

    /// The highest level of this machine.
    pub fn detected() -> Self {
        static DETECTED: OnceLock<Level> = OnceLock::new();
        *DETECTED.get_or_init(|| {
            let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c");
            let avx512 = avx2
                && is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512cd")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl");
            match (avx2, avx512, avx512 && is_x86_feature_detected!("avx512bf16")) {
                (_, _, true) if amx::is_available() => Self::Amx,
                (_, _, true) => Self::Avx512Bf16,
                (_, true, _) => Self::Avx512,
                (true, ..) => Self::Avx2,
                _ => Self::Scalar,
            }
        })
    }

    /// The levels that this machine can run, ascending.
    pub fn available() -> impl Iterator<Item = Self> {
        Self::ALL.into_iter().filter(|&level| level <= Self::detected())
    }

    /// The fastest level of this machine: the highest, except that Intel's cores form one bf16 dot product in the time of four float32
    /// multiply-adds, which do twice as much, so that widening is faster (measured on Xeons of the fifth generation).
    pub fn preferred() -> Self {
        match Self::detected() {
            Self::Avx512Bf16 if is_intel() => Self::Avx512,
            level => level,
        }
    }

    /// The highest level below that has no matrix tiles, or the level itself: for products whose operands must not be rounded.
    pub fn without_tiles(self) -> Self {
        match self {
            Self::Amx => Self::Avx512,
            Self::Scalar | Self::Avx2 | Self::Avx512 | Self::Avx512Bf16 => self,
        }
    }

    /// The level in use: the preferred one, or one up to the detected that `SUBQUAD_ISA` names, read once.
    ///
    /// # Errors
    /// The variable's value when it names no level.
    pub fn current() -> Result<Self, String> {
        static CURRENT: OnceLock<Result<Level, String>> = OnceLock::new();
        CURRENT
            .get_or_init(|| match std::env::var(ISA_VARIABLE) {
                Ok(name) if !name.is_empty() => Self::from_name(&name).map(|l| l.min(Self::detected())).ok_or(name),
                Err(std::env::VarError::NotUnicode(name)) => Err(name.to_string_lossy().into_owned()),
                _ => Ok(Self::preferred()),
            })
            .clone()
    }

    /// Runs piece `index` of `task` in code compiled for this level.
    ///
    /// # Panics
    /// When the machine lacks the level.
    #[expect(unsafe_code, reason = "calls functions compiled for features that were detected")]
    pub fn run<W: Task>(self, task: &W, index: usize) {
        assert!(self <= Self::detected(), "this machine has no {}", self.name());
        match self {
            Self::Scalar => task.run::<Portable>(index),
            // SAFETY: the assertion above, and `detected` tests exactly the features that `enter` enables.
            Self::Avx2 => unsafe { avx2::enter(task, index) },
            // SAFETY: as above.
            Self::Avx512Bf16 if W::MULTIPLIES_BF16 => unsafe { avx512::enter_bf16(task, index) },
            // SAFETY: as above, and `detected` asked for tiles.
            Self::Amx if W::MULTIPLIES_TILES => unsafe { amx::enter(task, index) },
            // Where there are tiles, cores are Intel's: see `preferred`.
            // SAFETY: as above; machines with bf16 dot products have what `enter` enables.
            Self::Avx512 | Self::Avx512Bf16 | Self::Amx => unsafe { avx512::enter(task, index) },
        }
    }
}

/// Whether Intel made the processor.
fn is_intel() -> bool {
    let leaf = std::arch::x86_64::__cpuid(0);
    [leaf.ebx, leaf.edx, leaf.ecx].map(u32::to_le_bytes).as_flattened() == b"GenuineIntel"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip_and_order_holds() {
        for pair in Level::ALL.windows(2) {
            assert!(pair[0] < pair[1]);
        }
        for level in Level::ALL {
            assert_eq!(Level::from_name(level.name()), Some(level));
        }
        assert_eq!(Level::from_name("sse9"), None);
        assert_eq!(Level::available().next(), Some(Level::Scalar));
        assert!(Level::preferred() <= Level::detected());
    }
}
