//! Calls, which the fuzzer draws: a function, arrays whose shapes go together before faults change them, and other arguments.

use crate::arrays::{Array, Element, Export, Verdict};
use crate::exporter;
use crate::plans::{Library, Number, Plan};
use arbitrary::Arbitrary;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList};
use std::sync::Arc;

#[derive(Debug, Arbitrary)]
pub struct Input {
    call: Call,
    library: Library,
    element: Element,
    sizes: Sizes,
    /// One for each array that the call takes, in order; the last one again where there are more arrays.
    plans: [Plan; 3],
    more_plans: Vec<Plan>,
    causal: Causal,
    scale: Scale,
    threads: Option<Number>,
}

#[derive(Debug, Arbitrary)]
enum Call {
    Attention { bias: Option<Bias>, return_lse: bool, out: Out },
    Sdpa { bias: Option<Bias>, leading: Option<u8>, kv_leading: bool, shared_heads: bool, gqa: bool, dropout: Option<f64> },
    Cached(Cached),
    Merge { parts: u8, one_more: bool },
}

#[derive(Debug, Arbitrary)]
struct Cached {
    rows: u8,
    appended: Option<u8>,
    /// Pairs and whether they are neighbours.
    rotary: Option<(u8, bool)>,
    lengths: Option<Integers>,
    batch_idx: Option<Integers>,
    leftpad: Option<Integers>,
    /// Pages of a sequence, and which.
    table: Option<(u8, Integers)>,
    splits: Option<Number>,
    window: Option<(Number, Number)>,
    return_lse: bool,
    /// The keys' cache holds the values as well.
    one_cache: bool,
}

/// An argument of lengths, rows or pages.
#[derive(Debug, Arbitrary)]
struct Integers {
    values: [Integer; 4],
    form: Form,
    missing: bool,
}

#[derive(Debug, Clone, Copy, Arbitrary)]
enum Integer {
    /// Taken modulo what fits.
    Valid(u8),
    Any(Number),
}

#[derive(Debug, Clone, Copy, Arbitrary)]
enum Form {
    Int32,
    Int64,
    Every,
    Float,
    List,
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
    element: BiasElement,
    /// Axes of extent 1, bit by bit, and how many of the first ones are left out.
    ones: u8,
    dropped: u8,
}

#[derive(Debug, Arbitrary)]
enum BiasElement {
    Same,
    Single,
    Bool,
    Any(Element),
}

#[derive(Debug, Arbitrary)]
enum Out {
    None,
    Fresh,
    /// One of the other arrays.
    Input(u8),
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

/// An array of a call, under the name of its argument.
pub struct Named {
    pub name: &'static str,
    pub array: Arc<Array>,
    /// Whether a call that succeeds may write to it.
    pub written: bool,
}

/// What comes out of a call that succeeds.
pub struct Expected {
    /// Of the result, `[B, S, H, D]` or what the function has instead.
    pub shape: Vec<i64>,
    /// Of the logarithms of the sums, when they are returned.
    pub lse: Option<Vec<i64>>,
}

fn find<'a>(arrays: &'a [Named], name: &str) -> Option<&'a Array> {
    arrays.iter().find(|named| named.name == name).map(|named| &*named.array)
}

impl Input {
    /// The arrays, or `None` for those that no consumer could tell from what they are not.
    pub fn arrays(&self) -> Option<Vec<Named>> {
        let Sizes { batch, queries, keys, kv_heads, group, head_dim, head_dim_v } = self.sizes;
        let [b, sq, sk] = [batch % 3, queries % 20, keys % 40].map(i64::from);
        let (kv_heads, heads) = (i64::from(kv_heads % 3), i64::from(kv_heads % 3) * i64::from(group % 4));
        let (d, dv) = (i64::from(head_dim % 40), i64::from(head_dim_v % 40));
        let accumulator = if self.element == Element::F64 { Element::F64 } else { Element::F32 };
        let mut wanted: Vec<(&'static str, Element, Vec<i64>, bool)> = Vec::new();
        let mut want = |name, element, shape: &[i64], written| wanted.push((name, element, shape.to_vec(), written));
        match &self.call {
            Call::Attention { bias, out, .. } => {
                want("q", self.element, &[b, sq, heads, d], false);
                want("k", self.element, &[b, sk, kv_heads, d], false);
                want("v", self.element, &[b, sk, kv_heads, dv], false);
                if let Some(bias) = bias {
                    want("bias", bias.element(self.element), &bias.shape(&[b, heads, sq, sk]), false);
                }
                if matches!(out, Out::Fresh) {
                    want("out", self.element, &[b, sq, heads, dv], true);
                }
            }
            Call::Sdpa { bias, leading, kv_leading, shared_heads, gqa, .. } => {
                let outer: Vec<i64> = leading.iter().flat_map(|n| [i64::from(n % 3), b]).collect();
                let kv_outer = if *kv_leading { outer.clone() } else { vec![1; outer.len()] };
                let kv_heads = if *gqa {
                    kv_heads
                } else if *shared_heads {
                    1
                } else {
                    heads
                };
                want("query", self.element, &[&outer[..], &[heads, sq, d]].concat(), false);
                want("key", self.element, &[&kv_outer[..], &[kv_heads, sk, d]].concat(), false);
                want("value", self.element, &[&kv_outer[..], &[kv_heads, sk, dv]].concat(), false);
                if let Some(bias) = bias {
                    let scores = [&outer[..], &[heads, sq, sk]].concat();
                    want("attn_mask", bias.element(self.element), &bias.shape(&scores), false);
                }
            }
            Call::Cached(cached) => {
                let rows = i64::from(cached.rows % 5);
                let written = cached.appended.is_some();
                want("q", self.element, &[b, sq, heads, d], false);
                want("k_cache", self.element, &[rows, sk, kv_heads, d], written);
                if !cached.one_cache {
                    want("v_cache", self.element, &[rows, sk, kv_heads, dv], written);
                }
                if let Some(appended) = cached.appended {
                    let appended = i64::from(appended % 5);
                    want("k", self.element, &[b, appended, kv_heads, d], false);
                    want("v", self.element, &[b, appended, kv_heads, dv], false);
                }
                if let Some((pairs, _)) = cached.rotary {
                    let shape = [sk + 20, i64::from(pairs % 20)];
                    want("rotary_cos", self.element, &shape, false);
                    want("rotary_sin", self.element, &shape, false);
                }
            }
            Call::Merge { parts, one_more } => {
                let parts = usize::from(parts % 3);
                for name in ["out0", "out1", "out2"].into_iter().take(parts + usize::from(*one_more)) {
                    want(name, self.element, &[b, sq, heads, d], false);
                }
                for name in ["lse0", "lse1"].into_iter().take(parts) {
                    want(name, accumulator, &[b, heads, sq], false);
                }
            }
        }
        let plans = self.plans.iter().chain(&self.more_plans).chain(std::iter::repeat(&self.plans[2]));
        wanted
            .into_iter()
            .zip(plans)
            .map(|((name, element, shape, written), plan)| {
                let array = plan.make(self.library, element, &shape)?;
                Some(Named { name, array: Arc::new(array), written })
            })
            .collect()
    }

    /// Calls the function; `None` when an object cannot be made.
    pub fn call<'py>(&self, py: Python<'py>, arrays: &[Named]) -> PyResult<Option<PyResult<Bound<'py, PyAny>>>> {
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
        for named in arrays {
            let Some(object) = exporter::object(py, &named.array)? else { return Ok(None) };
            options.set_item(named.name, object)?;
        }
        let scale = if matches!(self.call, Call::Cached(_)) { "softmax_scale" } else { "scale" };
        let causal = if matches!(self.call, Call::Sdpa { .. }) { "is_causal" } else { "causal" };
        match self.scale {
            Scale::None => {}
            Scale::Float(x) => options.set_item(scale, x)?,
            Scale::Huge => options.set_item(scale, py.eval(c"10**400", None, None)?)?,
            Scale::Text => options.set_item(scale, "0.5")?,
        }
        match self.causal {
            Causal::Bool(is) => options.set_item(causal, is)?,
            Causal::Number(n) => options.set_item(causal, n)?,
            Causal::None => options.set_item(causal, py.None())?,
        }
        let function = match &self.call {
            Call::Attention { return_lse, out, .. } => {
                options.set_item("return_lse", return_lse)?;
                match out {
                    Out::None | Out::Fresh => {}
                    Out::Input(which) => {
                        let name = arrays[usize::from(*which) % arrays.len()].name;
                        options.set_item("out", options.get_item(name)?)?;
                    }
                    Out::NoArray => options.set_item("out", 7)?,
                }
                "attention"
            }
            Call::Sdpa { gqa, dropout, .. } => {
                options.set_item("enable_gqa", gqa)?;
                options.set_item("dropout_p", dropout.unwrap_or(0.0))?;
                "scaled_dot_product_attention"
            }
            Call::Cached(cached) => {
                cached.set_options(&options, arrays)?;
                "attention_with_kvcache"
            }
            Call::Merge { .. } => {
                let list = |prefix| {
                    let names = arrays.iter().map(|named| named.name).filter(|name| name.starts_with(prefix));
                    PyList::new(py, names.map(|name| options.get_item(name)).collect::<PyResult<Vec<_>>>()?)
                };
                return Ok(Some(native.getattr("merge_attention")?.call1((list("out")?, list("lse")?))));
            }
        };
        Ok(Some(native.getattr(function)?.call((), Some(&options))))
    }

    /// Whether an argument is wrong that is no array.
    pub fn has_wrong_argument(&self) -> bool {
        let call = match &self.call {
            Call::Attention { out, .. } => matches!(out, Out::NoArray),
            Call::Sdpa { bias, dropout, .. } => {
                let twice = bias.is_some() && matches!(self.causal, Causal::Bool(true));
                twice || dropout.is_some_and(|p| p != 0.0)
            }
            Call::Cached(cached) => {
                cached.splits.is_some_and(|n| n.get() < 0)
                    || cached.window.is_some_and(|(left, right)| left.get() >= 0 || right.get() >= 0)
                    || cached.batch_idx.is_some() && cached.table.is_some()
            }
            Call::Merge { parts, one_more } => return parts % 3 == 0 || *one_more,
        };
        call || !matches!(self.causal, Causal::Bool(_)) || !matches!(self.scale, Scale::None | Scale::Float(_))
    }

    /// Whether a call with these arrays has nothing wrong in it.
    pub fn must_succeed(&self, arrays: &[Named]) -> bool {
        let is_numpy = |named: &Named| named.array.export == Export::NumPy;
        let one_library = arrays.windows(2).all(|pair| is_numpy(&pair[0]) == is_numpy(&pair[1]));
        let sound = arrays.iter().all(|named| {
            let array = &named.array;
            // NumPy, which copies what kernels cannot walk through, takes no bfloat16 by DLPack.
            let can_be_copied = !named.written && (is_numpy(named) || array.element != Some(Element::BF16));
            // What only speaks DLPack may rely on never changing.
            let can_be_written = !named.written || is_numpy(named);
            let sound = array.regular && array.verdict == Verdict::Sound;
            sound && can_be_written && (can_be_copied || array.is_plain())
        });
        let call = match &self.call {
            Call::Attention { bias, out, .. } => {
                bias.as_ref().is_none_or(|bias| bias.is_sound(self.element)) && matches!(out, Out::None | Out::Fresh)
            }
            Call::Sdpa { bias, .. } => bias.as_ref().is_none_or(|bias| bias.is_sound(self.element)),
            // Its numbers are drawn with no regard to each other.
            Call::Cached(_) => false,
            Call::Merge { .. } => true,
        };
        !self.has_wrong_argument() && one_library && sound && call && self.element != Element::Bool
    }

    /// Whether the call is one to `attention_with_kvcache`.
    pub fn is_cached(&self) -> bool {
        matches!(self.call, Call::Cached(_))
    }

    /// Whether results lie within the range of the values.
    pub fn is_tame(&self) -> bool {
        match self.scale {
            Scale::None => true,
            Scale::Float(scale) => scale.abs() <= 1e3,
            Scale::Huge | Scale::Text => matches!(self.call, Call::Merge { .. }),
        }
    }

    /// The array that a result must be, if it is to be one of the arguments'.
    pub fn target<'a>(&self, arrays: &'a [Named]) -> Option<&'a Named> {
        match &self.call {
            Call::Attention { out: Out::Fresh, .. } => arrays.iter().find(|named| named.name == "out"),
            Call::Attention { out: Out::Input(which), .. } => Some(&arrays[usize::from(*which) % arrays.len()]),
            Call::Attention { .. } | Call::Sdpa { .. } | Call::Cached(_) | Call::Merge { .. } => None,
        }
    }

    /// What must come out of these arrays; `None` when nothing can.
    pub fn expected(&self, arrays: &[Named]) -> Option<Expected> {
        let shape_of = |name| find(arrays, name).map(|array| array.shape.as_slice());
        match &self.call {
            Call::Attention { return_lse, .. } => {
                let (&[b, sq, h, _], &[_, _, _, dv]) = (shape_of("q")?, shape_of("v")?) else { return None };
                Some(Expected { shape: vec![b, sq, h, dv], lse: return_lse.then(|| vec![b, h, sq]) })
            }
            Call::Cached(cached) => {
                let values = if cached.one_cache { "k_cache" } else { "v_cache" };
                let (&[b, sq, h, _], &[_, _, _, dv]) = (shape_of("q")?, shape_of(values)?) else { return None };
                Some(Expected { shape: vec![b, sq, h, dv], lse: cached.return_lse.then(|| vec![b, h, sq]) })
            }
            Call::Merge { .. } => {
                let &[b, sq, h, d] = shape_of("out0")? else { return None };
                Some(Expected { shape: vec![b, sq, h, d], lse: Some(vec![b, h, sq]) })
            }
            Call::Sdpa { gqa, .. } => {
                let split = |shape: &[i64]| shape.len().checked_sub(2).map(|at| (shape[..at].to_vec(), shape[at], shape[at + 1]));
                let (mut q, sq, _) = split(shape_of("query")?)?;
                let (mut k, ..) = split(shape_of("key")?)?;
                let (mut v, _, dv) = split(shape_of("value")?)?;
                let outer = [&mut q, &mut k, &mut v];
                if *gqa && outer.iter().any(|outer| !outer.is_empty()) {
                    // Heads are shared, not broadcast, and those of the query are what comes out.
                    let heads = outer[0].last().copied().unwrap_or(1);
                    for outer in outer {
                        outer.pop();
                        outer.push(heads);
                    }
                }
                let mut shape = broadcast([&q, &k, &v])?;
                shape.extend([sq, dv]);
                Some(Expected { shape, lse: None })
            }
        }
    }
}

impl Cached {
    fn set_options(&self, options: &Bound<'_, PyDict>, arrays: &[Named]) -> PyResult<()> {
        let extent = |name, axis: usize| find(arrays, name).and_then(|array| array.shape.get(axis)).copied().unwrap_or(0);
        let (batch, rows, tokens) = (extent("q", 0), extent("k_cache", 0), extent("k_cache", 1));
        let capacity = self.table.as_ref().map_or(tokens, |(pages, _)| tokens.saturating_mul(i64::from(pages % 4)));
        let sequences = [batch.clamp(0, 8)];
        if let Some(lengths) = &self.lengths {
            options.set_item("cache_seqlens", lengths.object(options.py(), &sequences, capacity.saturating_add(1))?)?;
        }
        if let Some(rows_of) = &self.batch_idx {
            options.set_item("cache_batch_idx", rows_of.object(options.py(), &sequences, rows)?)?;
        }
        if let Some(leftpad) = &self.leftpad {
            options.set_item("cache_leftpad", leftpad.object(options.py(), &sequences, capacity.saturating_add(1))?)?;
        }
        if let Some((pages, table)) = &self.table {
            let shape = [sequences[0], i64::from(pages % 4)];
            options.set_item("block_table", table.object(options.py(), &shape, rows)?)?;
        }
        if let Some((_, interleaved)) = self.rotary {
            options.set_item("rotary_interleaved", interleaved)?;
        }
        if let Some((left, right)) = self.window {
            options.set_item("window_size", (left.get(), right.get()))?;
        }
        if self.one_cache {
            options.set_item("v_cache", options.get_item("k_cache")?)?;
        }
        options.set_item("num_splits", self.splits.map(Number::get))?;
        options.set_item("return_softmax_lse", self.return_lse)
    }
}

impl Integers {
    fn object<'py>(&self, py: Python<'py>, shape: &[i64], limit: i64) -> PyResult<Bound<'py, PyAny>> {
        let count = shape.iter().product::<i64>() - i64::from(self.missing);
        let values = self.values.iter().cycle().take(count.max(0) as usize).map(|value| match *value {
            Integer::Valid(n) => i64::from(n) % limit.max(1),
            Integer::Any(n) => n.get(),
        });
        let values: Vec<i64> = values.collect();
        let dtype = match self.form {
            Form::Every => return Ok(values.first().copied().unwrap_or(0).into_pyobject(py)?.into_any()),
            Form::List => return Ok(PyList::new(py, values)?.into_any()),
            Form::Int32 => "int32",
            Form::Int64 => "int64",
            Form::Float => "float32",
        };
        let array = py.import("numpy")?.call_method1("array", (values, "int64"))?.call_method1("astype", (dtype,))?;
        if self.missing { Ok(array) } else { array.call_method1("reshape", (shape,)) }
    }
}

impl Bias {
    fn element(&self, of_inputs: Element) -> Element {
        match self.element {
            BiasElement::Same => of_inputs,
            BiasElement::Single => Element::F32,
            BiasElement::Bool => Element::Bool,
            BiasElement::Any(element) => element,
        }
    }

    fn is_sound(&self, of_inputs: Element) -> bool {
        [of_inputs, Element::F32, Element::Bool].contains(&self.element(of_inputs))
    }

    fn shape(&self, scores: &[i64]) -> Vec<i64> {
        let dropped = usize::from(self.dropped) % (scores.len() + 1);
        let axes = scores.iter().enumerate().skip(dropped);
        axes.map(|(axis, &n)| if self.ones >> axis & 1 == 1 { 1 } else { n }).collect()
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
