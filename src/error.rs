//! Typed errors. Each names the argument, what was expected and what came; `bindings::errors` maps each to one Python exception.

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// Everything a caller can get wrong.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// An array has the wrong rank, extent or head count.
    #[error("{arg}: expected shape {expected}, got {got}")]
    Shape {
        /// Name of the argument.
        arg: &'static str,
        /// What would have been accepted.
        expected: String,
        /// What came.
        got: String,
    },
    /// An array has a dtype that is not supported or differs from `q`'s.
    #[error("{arg}: expected dtype {expected}, got {got}")]
    DType {
        /// Name of the argument.
        arg: &'static str,
        /// What would have been accepted.
        expected: String,
        /// What came.
        got: String,
    },
    /// An argument is not an array, or is of another library than `q`.
    #[error("{arg}: expected {expected}, got {got}")]
    Kind {
        /// Name of the argument.
        arg: &'static str,
        /// What would have been accepted.
        expected: String,
        /// What came.
        got: String,
    },
    /// A number is outside its range.
    #[error("{arg}: expected {expected}, got {got}")]
    Value {
        /// Name of the argument.
        arg: &'static str,
        /// What would have been accepted.
        expected: String,
        /// What came.
        got: String,
    },
    /// An array lives on another device.
    #[error("{arg}: expected a CPU array, got one on {got}; move it first, with `.cpu()` in PyTorch")]
    Device {
        /// Name of the argument.
        arg: &'static str,
        /// The device's name.
        got: String,
    },
    /// The output shares memory with an input.
    #[error("{arg}: expected memory of its own, got memory that overlaps {other}")]
    Overlap {
        /// Name of the argument.
        arg: &'static str,
        /// The argument it overlaps.
        other: &'static str,
    },
    /// The output cannot be written as asked.
    #[error("{arg}: expected a writable array, got {got}")]
    NotWritable {
        /// Name of the argument.
        arg: &'static str,
        /// Why it is refused.
        got: String,
    },
    /// A valid request that this library does not serve.
    #[error("{what} is not supported; {instead}")]
    Unsupported {
        /// What was asked.
        what: String,
        /// What to do about it.
        instead: String,
    },
    /// A size does not fit the machine's address space.
    #[error("{arg}: expected a size that fits in memory, got {got}")]
    Overflow {
        /// Name of the argument.
        arg: &'static str,
        /// The extents that overflow.
        got: String,
    },
}
