//! The one place where errors become Python exceptions.

use crate::error::Error;
use pyo3::PyErr;
use pyo3::exceptions::{PyNotImplementedError, PyOverflowError, PyTypeError, PyValueError};

impl From<Error> for PyErr {
    fn from(error: Error) -> Self {
        let message = error.to_string();
        match error {
            Error::Shape { .. }
            | Error::Value { .. }
            | Error::Device { .. }
            | Error::Overlap { .. }
            | Error::NotWritable { .. } => PyValueError::new_err(message),
            Error::DType { .. } | Error::Kind { .. } => PyTypeError::new_err(message),
            Error::Unsupported { .. } => PyNotImplementedError::new_err(message),
            Error::Overflow { .. } => PyOverflowError::new_err(message),
        }
    }
}
