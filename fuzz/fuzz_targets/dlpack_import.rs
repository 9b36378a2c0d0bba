//! Calls from Python with arrays that are broken, odd or sound, and with other arguments likewise.
//!
//! ```text
//! cargo install cargo-fuzz
//! PYO3_PYTHON=$PWD/.venv/bin/python PYTHONPATH=$(echo $PWD/.venv/lib/python3*/site-packages) PYTHONMALLOC=malloc \
//! RUSTC_BOOTSTRAP=1 ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 \
//! cargo fuzz run dlpack_import -- -max_total_time=300 -timeout=20 -malloc_limit_mb=1000000
//! ```
//!
//! `RUSTC_BOOTSTRAP=1` makes the stable compiler accept the flags of the sanitizer. Python never frees some of what it allocates,
//! hence no search for leaks; NumPy is asked for results that no machine can hold, hence no limit of one allocation.
//!
//! What holds whatever comes: no crash, no panic, no read or write beyond the memory that a descriptor describes, every export
//! given back once; a result of the right shape, type and range, or an exception of a kind that the documentation names, with
//! outputs untouched. Broken arrays are refused, and calls with nothing wrong in them succeed.

#![no_main]

mod arrays;
mod calls;
mod exporter;
mod plans;

use arrays::{Element, Export, Verdict};
use calls::{Input, Named};
use libfuzzer_sys::{Corpus, fuzz_target};
use pyo3::exceptions::{PyBufferError, PyMemoryError, PyNotImplementedError, PyOverflowError, PyTypeError, PyValueError};
use pyo3::ffi;
use pyo3::prelude::*;
use std::sync::atomic::Ordering;
// Linked for its extension module, which Rust code does not name.
use subquad as _;

/// Work of a call that is let through, in multiplications.
const MOST_WORK: i128 = 1 << 24;
/// Elements of an array that is let through.
const MOST_COPIED: i128 = 1 << 22;

unsafe extern "C" {
    fn PyInit__native() -> *mut ffi::PyObject;
}

/// Whether a call would finish soon, or must not start.
fn is_affordable(input: &Input, arrays: &[Named]) -> bool {
    let broken = arrays.iter().any(|named| matches!(named.array.verdict, Verdict::Broken(_)));
    // Arrays whose last axis has another stride than 1 are copied, repeated elements and all.
    let small = arrays.iter().all(|named| {
        let count = named.array.shape.iter().fold(1i128, |count, &n| count.saturating_mul(n.into()));
        count <= MOST_COPIED
    });
    let shapes = || arrays.iter().take(3).map(|named| named.array.shape.as_slice());
    let rank = shapes().map(<[i64]>::len).max().unwrap_or(0);
    let mut work = shapes().nth(1).and_then(|shape| shape.iter().max()).map_or(1, |&n| i128::from(n.max(1)));
    for axis in 0..rank {
        let extents = shapes().filter_map(|shape| shape.len().checked_sub(axis + 1).map(|axis| shape[axis]));
        work = work.saturating_mul(extents.max().unwrap_or(1).max(1).into());
    }
    // Lengths of sequences are kept even where there is no query.
    let no_rows = !input.is_cached() && shapes().next().and_then(<[i64]>::split_last).is_some_and(|(_, rows)| rows.contains(&0));
    broken || small && (no_rows || work <= MOST_WORK)
}

/// The values of a result, once its shape and type are found to be right.
fn values(result: &Bound<'_, PyAny>, shape: &[i64], element: Element) -> PyResult<Vec<f64>> {
    assert_eq!(result.getattr("shape")?.extract::<Vec<i64>>()?, shape, "the shape");
    assert_eq!(result.getattr("dtype")?.getattr("name")?.extract::<String>()?, element.name(), "the type");
    if shape.contains(&0) {
        // NumPy multiplies the other extents, and has none for such an array of a wider type.
        return Ok(Vec::new());
    }
    result.call_method1("astype", ("float64",))?.call_method0("ravel")?.call_method0("tolist")?.extract()
}

fn check_result(input: &Input, arrays: &[Named], result: &Bound<'_, PyAny>) -> PyResult<()> {
    for Named { name, array, written } in arrays {
        if let Verdict::Broken(reason) = array.verdict {
            panic!("{name} was accepted despite {reason}");
        }
        if *written {
            assert!(!array.repeats(), "{name} was written, where elements share memory");
            // Function tables and legacy capsules have no flags.
            let told = matches!(array.export, Export::Versioned(_) | Export::NumPy);
            assert!(!told || array.flags.is_empty(), "{name} was written, and is read-only");
            assert!(array.is_unchanged_between_elements(), "written beside the elements of {name}");
        } else {
            assert!(array.is_unchanged(), "{name} was written");
        }
    }
    assert!(!input.has_wrong_argument(), "a wrong argument was accepted");
    let expected = input.expected(arrays).expect("shapes that do not go together were accepted");
    let element = arrays[0].array.element.expect("unknown types are broken");
    let (out, lse) = match &expected.lse {
        None => (result.clone(), None),
        Some(shape) => {
            let (out, lse) = result.extract::<(Bound<'_, PyAny>, Bound<'_, PyAny>)>()?;
            (out, Some((lse, shape)))
        }
    };
    let got = match input.target(arrays) {
        Some(target) => {
            assert!(exporter::is_of(&out, &target.array), "the result is no `out`");
            assert!(target.written || expected.shape.contains(&0), "an input was accepted as `out`");
            assert_eq!(target.array.shape, expected.shape, "the shape");
            target.array.values()
        }
        None => values(&out, &expected.shape, element)?,
    };
    if input.is_tame() {
        for x in &got {
            assert!(x.abs() <= 1.01, "{x} is no mean of values in [-1, 1]");
        }
    }
    if let Some((lse, shape)) = lse {
        let lse = values(&lse, shape, if element == Element::F64 { Element::F64 } else { Element::F32 })?;
        assert!(!input.is_tame() || !lse.iter().any(|x| x.is_nan()), "lse has a NaN");
    }
    Ok(())
}

fn check_error(input: &Input, arrays: &[Named], error: &PyErr, py: Python<'_>) {
    let named = error.is_instance_of::<PyValueError>(py)
        || error.is_instance_of::<PyTypeError>(py)
        || error.is_instance_of::<PyNotImplementedError>(py)
        || error.is_instance_of::<PyOverflowError>(py)
        || error.is_instance_of::<PyBufferError>(py)
        || error.is_instance_of::<PyMemoryError>(py);
    assert!(named && !error.to_string().contains("internal"), "an exception of a kind that nobody expects: {error}");
    assert!(!input.must_succeed(arrays), "refused with nothing wrong: {error}");
    for named in arrays {
        assert!(named.array.is_unchanged(), "{} was written before the call was refused: {error}", named.name);
    }
}

fn run(py: Python<'_>, input: &Input) -> PyResult<Corpus> {
    let Some(arrays) = input.arrays() else { return Ok(Corpus::Reject) };
    if !is_affordable(input, &arrays) {
        return Ok(Corpus::Reject);
    }
    match input.call(py, &arrays)? {
        None => return Ok(Corpus::Reject),
        Some(Ok(result)) => check_result(input, &arrays, &result)?,
        Some(Err(error)) => check_error(input, &arrays, &error, py),
    }
    assert_eq!(exporter::ALIVE.load(Ordering::Relaxed), 0, "exports were not given back");
    Ok(Corpus::Keep)
}

fn start() {
    // SAFETY: Python does not run yet, and the name is static.
    let added = unsafe { ffi::PyImport_AppendInittab(c"_native".as_ptr(), Some(PyInit__native)) };
    assert_eq!(added, 0, "the module could not be registered");
    Python::initialize();
    Python::attach(|py| {
        for module in ["_native", "numpy", "ml_dtypes", "ctypes"] {
            py.import(module).unwrap_or_else(|error| panic!("set PYTHONPATH to where NumPy is: {error}"));
        }
    });
}

fuzz_target!(init: start(), |input: Input| -> Corpus {
    Python::attach(|py| run(py, &input).unwrap_or_else(|error| panic!("the target itself failed: {error}")))
});
