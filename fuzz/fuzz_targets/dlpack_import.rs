//! Calls from Python with arrays that are broken, odd or sound, and with arguments that are none.
//!
//! ```text
//! cargo install cargo-fuzz
//! PYO3_PYTHON=.venv/bin/python PYTHONPATH=$(echo .venv/lib/python3*/site-packages) PYTHONMALLOC=malloc \
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
mod exporter;
mod plans;

use arbitrary::Arbitrary;
use arrays::{Array, Element, Export, Verdict};
use libfuzzer_sys::{Corpus, fuzz_target};
use plans::{Library, Number, Plan};
use pyo3::exceptions::{PyBufferError, PyMemoryError, PyNotImplementedError, PyOverflowError, PyTypeError, PyValueError};
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::PyDict;
use std::sync::Arc;
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

#[derive(Debug, Arbitrary)]
struct Input {
    call: Call,
    library: Library,
    element: Element,
    sizes: Sizes,
    q: Plan,
    k: Plan,
    v: Plan,
    bias: Option<Bias>,
    causal: Causal,
    scale: Scale,
    threads: Option<Number>,
}

#[derive(Debug, Arbitrary)]
enum Call {
    Attention { return_lse: bool, out: Out },
    Sdpa { leading: Option<u8>, kv_leading: bool, shared_heads: bool, gqa: bool, dropout: Option<f64> },
}

#[derive(Debug, Arbitrary)]
struct Sizes {
    batch: u8,
    queries: u8,
    keys: u8,
    kv_heads: u8,
    group: u8,
    head_dim: u8,
    head_dim_v: u8,
}

#[derive(Debug, Arbitrary)]
struct Bias {
    plan: Plan,
    element: BiasElement,
    /// Axes of extent 1, bit by bit, and how many of the first ones are left out.
    ones: u8,
    dropped: u8,
}

#[derive(Debug, Arbitrary)]
enum BiasElement {
    Same,
    Accumulator,
    Bool,
    Any(Element),
}

#[derive(Debug, Arbitrary)]
enum Out {
    None,
    Fresh(Plan),
    /// One of `q`, `k`, `v` and `bias`.
    Argument(u8),
    NoArray,
}

#[derive(Debug, Arbitrary)]
enum Causal {
    Bool(bool),
    Number(i64),
    None,
}

#[derive(Debug, Arbitrary)]
enum Scale {
    None,
    Float(f64),
    Huge,
    Text,
}

/// The arrays of one call.
struct Arrays {
    q: Arc<Array>,
    k: Arc<Array>,
    v: Arc<Array>,
    bias: Option<Arc<Array>>,
    out: Option<Arc<Array>>,
}

impl Arrays {
    fn all(&self) -> impl Iterator<Item = &Arc<Array>> {
        self.inputs().chain(&self.out)
    }

    fn inputs(&self) -> impl Iterator<Item = &Arc<Array>> {
        [&self.q, &self.k, &self.v].into_iter().chain(&self.bias)
    }
}

impl Input {
    fn make(&self) -> Option<Arrays> {
        let Sizes { batch, queries, keys, kv_heads, group, head_dim, head_dim_v } = self.sizes;
        let [b, sq, sk] = [batch % 3, queries % 20, keys % 40].map(i64::from);
        let (kv_heads, heads) = (i64::from(kv_heads % 3), i64::from(kv_heads % 3) * i64::from(group % 4));
        let (d, dv) = (i64::from(head_dim % 40), i64::from(head_dim_v % 40));
        let shapes = match &self.call {
            Call::Attention { .. } => [vec![b, sq, heads, d], vec![b, sk, kv_heads, d], vec![b, sk, kv_heads, dv]],
            Call::Sdpa { leading, kv_leading, shared_heads, gqa, .. } => {
                let outer: Vec<i64> = leading.iter().flat_map(|n| [i64::from(n % 3), b]).collect();
                let kv_outer = if *kv_leading { outer.clone() } else { vec![1; outer.len()] };
                let kv_heads = if *gqa {
                    kv_heads
                } else if *shared_heads {
                    1
                } else {
                    heads
                };
                let stack = |outer: &[i64], rest: [i64; 3]| [outer, &rest].concat();
                [stack(&outer, [heads, sq, d]), stack(&kv_outer, [kv_heads, sk, d]), stack(&kv_outer, [kv_heads, sk, dv])]
            }
        };
        let scores = match &self.call {
            Call::Attention { .. } => vec![b, heads, sq, sk],
            Call::Sdpa { .. } => [&shapes[0][..shapes[0].len() - 1], &[sk]].concat(),
        };
        let make = |plan: &Plan, element, shape: &[i64]| plan.make(self.library, element, shape).map(Arc::new);
        Some(Arrays {
            q: make(&self.q, self.element, &shapes[0])?,
            k: make(&self.k, self.element, &shapes[1])?,
            v: make(&self.v, self.element, &shapes[2])?,
            bias: match &self.bias {
                None => None,
                Some(bias) => Some(make(&bias.plan, bias.element(self.element), &bias.shape(&scores))?),
            },
            out: match &self.call {
                Call::Attention { out: Out::Fresh(plan), .. } => Some(make(plan, self.element, &[b, sq, heads, dv])?),
                Call::Attention { .. } | Call::Sdpa { .. } => None,
            },
        })
    }

    fn call<'py>(&self, py: Python<'py>, objects: &Objects<'py>) -> PyResult<Bound<'py, PyAny>> {
        let native = py.import("_native")?;
        if let Some(threads) = self.threads {
            let threads = threads.get();
            let set = native.call_method1("set_num_threads", (threads,));
            assert_eq!(set.is_ok(), (1..=1024).contains(&threads), "{threads} threads");
            if threads > 4 {
                // Hundreds of threads show nothing that a few do not.
                native.call_method1("set_num_threads", (2,))?;
            }
        }
        let options = PyDict::new(py);
        match self.scale {
            Scale::None => {}
            Scale::Float(scale) => options.set_item("scale", scale)?,
            Scale::Huge => options.set_item("scale", py.eval(c"10**400", None, None)?)?,
            Scale::Text => options.set_item("scale", "0.5")?,
        }
        let causal = if matches!(self.call, Call::Attention { .. }) { "causal" } else { "is_causal" };
        match self.causal {
            Causal::Bool(is) => options.set_item(causal, is)?,
            Causal::Number(n) => options.set_item(causal, n)?,
            Causal::None => options.set_item(causal, py.None())?,
        }
        let arguments = (&objects.q, &objects.k, &objects.v);
        match &self.call {
            Call::Attention { return_lse, out } => {
                options.set_item("bias", &objects.bias)?;
                options.set_item("return_lse", return_lse)?;
                match out {
                    Out::None => {}
                    Out::Fresh(_) => options.set_item("out", &objects.out)?,
                    Out::Argument(which) => options.set_item("out", objects.input(*which))?,
                    Out::NoArray => options.set_item("out", 7)?,
                }
                native.getattr("attention")?.call(arguments, Some(&options))
            }
            Call::Sdpa { gqa, dropout, .. } => {
                options.set_item("attn_mask", &objects.bias)?;
                options.set_item("enable_gqa", gqa)?;
                options.set_item("dropout_p", dropout.unwrap_or(0.0))?;
                native.getattr("scaled_dot_product_attention")?.call(arguments, Some(&options))
            }
        }
    }

    /// Whether an argument is wrong that is no array.
    fn has_wrong_argument(&self) -> bool {
        let call = match &self.call {
            Call::Attention { out, .. } => matches!(out, Out::NoArray),
            Call::Sdpa { dropout, .. } => {
                let twice = self.bias.is_some() && matches!(self.causal, Causal::Bool(true));
                twice || dropout.is_some_and(|p| p != 0.0)
            }
        };
        call || !matches!(self.causal, Causal::Bool(_)) || !matches!(self.scale, Scale::None | Scale::Float(_))
    }

    /// Whether a call with these arrays has nothing wrong in it.
    fn must_succeed(&self, arrays: &Arrays) -> bool {
        let is_numpy = |array: &Arc<Array>| array.export == Export::NumPy;
        let one_library =
            [&arrays.k, &arrays.v].into_iter().chain(&arrays.out).all(|array| is_numpy(array) == is_numpy(&arrays.q));
        let regular = arrays.all().all(|array| array.regular && array.verdict == Verdict::Sound);
        let out = match &self.call {
            Call::Attention { out: Out::Argument(_) | Out::NoArray, .. } => false,
            _ => arrays.out.as_ref().is_none_or(|out| out.is_plain()),
        };
        let bias = self
            .bias
            .as_ref()
            .is_none_or(|bias| [self.element, self.element.accumulator(), Element::Bool].contains(&bias.element(self.element)));
        // NumPy, which copies what kernels cannot walk through, takes no bfloat16 by DLPack.
        let copied = |array: &Arc<Array>| array.element == Some(Element::BF16) && !is_numpy(array) && !array.is_plain();
        !self.has_wrong_argument()
            && one_library
            && regular
            && out
            && bias
            && self.element != Element::Bool
            && !arrays.inputs().any(copied)
    }

    /// Whether results lie within the range of the values.
    fn is_tame(&self) -> bool {
        match self.scale {
            Scale::None => true,
            Scale::Float(scale) => scale.abs() <= 1e3,
            Scale::Huge | Scale::Text => false,
        }
    }
}

impl Bias {
    fn element(&self, of_inputs: Element) -> Element {
        match self.element {
            BiasElement::Same => of_inputs,
            BiasElement::Accumulator => of_inputs.accumulator(),
            BiasElement::Bool => Element::Bool,
            BiasElement::Any(element) => element,
        }
    }

    fn shape(&self, scores: &[i64]) -> Vec<i64> {
        let dropped = usize::from(self.dropped) % (scores.len() + 1);
        let axes = scores.iter().enumerate().skip(dropped);
        axes.map(|(axis, &n)| if self.ones >> axis & 1 == 1 { 1 } else { n }).collect()
    }
}

/// What the arrays are to Python.
struct Objects<'py> {
    q: Bound<'py, PyAny>,
    k: Bound<'py, PyAny>,
    v: Bound<'py, PyAny>,
    bias: Option<Bound<'py, PyAny>>,
    out: Option<Bound<'py, PyAny>>,
}

impl<'py> Objects<'py> {
    fn new(py: Python<'py>, arrays: &Arrays) -> PyResult<Option<Self>> {
        let optional = |array: &Option<Arc<Array>>| array.as_ref().map(|array| exporter::object(py, array)).transpose();
        let (Some(q), Some(k), Some(v)) =
            (exporter::object(py, &arrays.q)?, exporter::object(py, &arrays.k)?, exporter::object(py, &arrays.v)?)
        else {
            return Ok(None);
        };
        let (bias, out) = (optional(&arrays.bias)?, optional(&arrays.out)?);
        if bias.as_ref().is_some_and(Option::is_none) || out.as_ref().is_some_and(Option::is_none) {
            return Ok(None);
        }
        Ok(Some(Self { q, k, v, bias: bias.flatten(), out: out.flatten() }))
    }

    fn input(&self, which: u8) -> &Bound<'py, PyAny> {
        let bias = self.bias.as_ref().unwrap_or(&self.q);
        [&self.q, &self.k, &self.v, bias][usize::from(which % 4)]
    }
}

/// The common shape of arrays that broadcast against each other.
fn broadcast(shapes: [&[i64]; 3]) -> Option<Vec<i64>> {
    let rank = shapes.iter().map(|shape| shape.len()).max().unwrap_or(0);
    let extent = |shape: &[i64], axis: usize| (axis + shape.len()).checked_sub(rank).map_or(1, |axis| shape[axis]);
    (0..rank)
        .map(|axis| {
            let others: Vec<i64> = shapes.iter().map(|shape| extent(shape, axis)).filter(|&n| n != 1).collect();
            others.iter().all(|n| *n == others[0]).then(|| others.first().copied().unwrap_or(1))
        })
        .collect()
}

/// The shape that a result must have; `None` when the call cannot succeed.
fn expected_shape(call: &Call, arrays: &Arrays) -> Option<Vec<i64>> {
    let [q, k, v] = [&arrays.q, &arrays.k, &arrays.v].map(|array| array.shape.as_slice());
    match call {
        Call::Attention { .. } => match (q, k, v) {
            (&[b, sq, h, _], &[..], &[_, _, _, dv]) => Some(vec![b, sq, h, dv]),
            _ => None,
        },
        Call::Sdpa { gqa, .. } => {
            let split = |shape: &[i64]| shape.len().checked_sub(2).map(|at| (shape[..at].to_vec(), shape[at], shape[at + 1]));
            let ((mut q, sq, _), (mut k, ..), (mut v, _, dv)) = (split(q)?, split(k)?, split(v)?);
            if *gqa && q.last() != k.last() {
                // Heads are shared, not broadcast, and those of the query are what comes out.
                let heads = q.last().copied().unwrap_or(1);
                for outer in [&mut q, &mut k, &mut v] {
                    if outer.is_empty() {
                        outer.push(1);
                    }
                    *outer.last_mut().expect("it has one now") = heads;
                }
            }
            let mut shape = broadcast([&q, &k, &v])?;
            shape.extend([sq, dv]);
            Some(shape)
        }
    }
}

/// Whether a call would finish soon, or must not start.
fn is_affordable(arrays: &Arrays) -> bool {
    let broken = arrays.all().any(|array| matches!(array.verdict, Verdict::Broken(_)));
    let inputs = [&arrays.q, &arrays.k, &arrays.v];
    let rank = inputs.iter().map(|array| array.shape.len()).max().unwrap_or(0);
    let mut work = arrays.k.shape.iter().max().map_or(1, |&n| i128::from(n.max(1)));
    for axis in 0..rank {
        let extents = inputs.iter().filter_map(|array| array.shape.len().checked_sub(axis + 1).map(|axis| array.shape[axis]));
        work = work.saturating_mul(extents.max().unwrap_or(1).max(1).into());
    }
    // Those with a stride of the wrong kind are copied, repeated elements and all.
    let copies = |array: &Arc<Array>| array.shape.iter().fold(1i128, |count, &n| count.saturating_mul(n.into()));
    let small = arrays.all().all(|array| copies(array) <= MOST_COPIED);
    let no_result = arrays.q.shape.split_last().is_some_and(|(_, rows)| rows.contains(&0)) || arrays.v.shape.last() == Some(&0);
    broken || small && (no_result || work <= MOST_WORK)
}

/// The values of a result, once its shape and type are found to be right.
fn values(result: &Bound<'_, PyAny>, shape: &[i64], element: Element) -> PyResult<Vec<f64>> {
    assert_eq!(result.getattr("shape")?.extract::<Vec<i64>>()?, shape, "the shape");
    assert_eq!(result.getattr("dtype")?.getattr("name")?.extract::<String>()?, element.name(), "the type");
    result.call_method1("astype", ("float64",))?.call_method0("ravel")?.call_method0("tolist")?.extract()
}

fn check_result(input: &Input, arrays: &Arrays, objects: &Objects<'_>, result: &Bound<'_, PyAny>) -> PyResult<()> {
    for array in arrays.all() {
        if let Verdict::Broken(reason) = array.verdict {
            panic!("an array was accepted despite {reason}");
        }
    }
    assert!(!input.has_wrong_argument(), "a wrong argument was accepted");
    let shape = expected_shape(&input.call, arrays).expect("shapes that do not go together were accepted");
    let element = arrays.q.element.expect("unknown types are broken");
    let (out, lse) = if matches!(input.call, Call::Attention { return_lse: true, .. }) {
        let (out, lse) = result.extract::<(Bound<'_, PyAny>, Bound<'_, PyAny>)>()?;
        (out, Some(lse))
    } else {
        (result.clone(), None)
    };
    let given = match &input.call {
        Call::Attention { out: Out::Fresh(_), .. } => objects.out.as_ref(),
        Call::Attention { out: Out::Argument(which), .. } => Some(objects.input(*which)),
        Call::Attention { .. } | Call::Sdpa { .. } => None,
    };
    assert!(given.is_none_or(|given| out.is(given)), "another array than `out`");
    let got = match &arrays.out {
        Some(array) => {
            assert_eq!(array.shape, shape, "the shape");
            assert!(!array.repeats(), "elements of `out` share memory");
            // Function tables and legacy capsules have no flags.
            let told = matches!(array.export, Export::Versioned(_) | Export::NumPy);
            assert!(!told || array.flags.is_empty(), "`out` is read-only");
            assert!(array.is_unchanged_between_elements(), "written beside the elements of `out`");
            array.values()
        }
        None if given.is_some() => {
            assert!(shape.contains(&0), "an input was accepted as `out`");
            Vec::new()
        }
        None => values(&out, &shape, element)?,
    };
    if input.is_tame() {
        for x in &got {
            assert!(x.abs() <= 1.01, "{x} is no mean of values in [-1, 1]");
        }
    }
    if let Some(lse) = lse {
        let [b, sq, h, _] = shape[..] else { unreachable!("attention has rank 4") };
        let lse = values(&lse, &[b, h, sq], element.accumulator())?;
        assert!(!input.is_tame() || !lse.iter().any(|x| x.is_nan()), "lse has a NaN");
    }
    Ok(())
}

fn check_error(input: &Input, arrays: &Arrays, error: &PyErr, py: Python<'_>) {
    let named = error.is_instance_of::<PyValueError>(py)
        || error.is_instance_of::<PyTypeError>(py)
        || error.is_instance_of::<PyNotImplementedError>(py)
        || error.is_instance_of::<PyOverflowError>(py)
        || error.is_instance_of::<PyBufferError>(py)
        || error.is_instance_of::<PyMemoryError>(py);
    assert!(named && !error.to_string().contains("internal"), "an exception of a kind that nobody expects: {error}");
    assert!(!input.must_succeed(arrays), "refused with nothing wrong: {error}");
    assert!(arrays.out.as_ref().is_none_or(|out| out.is_unchanged()), "`out` was written before the call was refused");
}

fn run(py: Python<'_>, input: &Input) -> PyResult<Corpus> {
    let Some(arrays) = input.make() else { return Ok(Corpus::Reject) };
    if !is_affordable(&arrays) {
        return Ok(Corpus::Reject);
    }
    let Some(objects) = Objects::new(py, &arrays)? else { return Ok(Corpus::Reject) };
    match input.call(py, &objects) {
        Ok(result) => check_result(input, &arrays, &objects, &result)?,
        Err(error) => check_error(input, &arrays, &error, py),
    }
    assert!(arrays.inputs().all(|array| array.is_unchanged()), "an input was written to");
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
