//! What attention can be asked for beside queries, keys and values, checked and owned for the time of a call.

use super::array::{Array, ElementType, Layout};
use super::attention::dispatch_dtype;
use super::{broadcast, integers, masks};
use crate::dtype::{DType, Element, Float};
use crate::error::Error;
use crate::index::{Segment, Segments};
use crate::kernels::dropout::Dropout;
use crate::kernels::mask::{Mask, RowRanges, Window, Windows};
use crate::kernels::mask_rules::Extents;
use crate::kernels::score_mod::{Normalizer, Reweighting, RowTable, Scale, ScoreMod};
use crate::tensor::{AttnShape, shape_text};
use half::{bf16, f16};
use pyo3::prelude::*;
use pyo3::types::{PyBool, PyFloat, PyInt, PyString};

/// One number for each query of each head, broadcast.
struct Table {
    data: Vec<f64>,
    strides: [usize; 3],
}

impl Table {
    /// Copies an array of numbers and broadcasts it to `target`.
    fn read(arg: &'static str, object: &Bound<'_, PyAny>, like: &Array<'_>, target: [usize; 3], align: Align) -> PyResult<Self> {
        let dtypes: &[DType] = match align {
            Align::Heads if like.float()? == DType::F64 => &[DType::F32, DType::F64],
            Align::Heads => &[DType::F32],
            Align::HeadsOrRows => &[DType::F32, like.float()?],
            Align::Rows => &[DType::F32, DType::F64, like.float()?],
        };
        let (data, given) = numbers(arg, object, like, dtypes)?;
        let shape = match (align, given.len()) {
            (Align::Heads | Align::HeadsOrRows, 1) => vec![1, given[0], 1],
            (Align::Heads, 2) => vec![given[0], given[1], 1],
            _ => given.clone(),
        };
        let fits = if align == Align::Heads { (1..3).contains(&given.len()) } else { (1..4).contains(&given.len()) };
        let mut strides = vec![1; shape.len()];
        for axis in (1..shape.len()).rev() {
            strides[axis - 1] = strides[axis] * shape[axis];
        }
        let broadcast = if fits { broadcast::strides_of(&shape, &strides, &target) } else { None };
        let strides = broadcast.ok_or_else(|| Error::Shape {
            arg,
            expected: match align {
                Align::Heads => format!("({},) or ({}, {})", target[1], target[0], target[1]),
                Align::HeadsOrRows => format!("({},), or that broadcasts to {}", target[1], shape_text(&target)),
                Align::Rows => format!("that broadcasts to {}", shape_text(&target)),
            },
            got: shape_text(&given),
        })?;
        Ok(Self { data, strides: [strides[0], strides[1], strides[2]] })
    }

    /// The one number that all elements are, if so.
    fn constant(&self) -> Option<f64> {
        let first = *self.data.first()?;
        self.data.iter().all(|x| x.to_bits() == first.to_bits()).then_some(first)
    }

    fn view(&self) -> RowTable<'_> {
        RowTable { data: &self.data, strides: self.strides }
    }
}

/// Which axes an array of few axes has.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Align {
    /// `[H]` or `[B, H]`.
    Heads,
    /// `[H]`, or the last of `[B, H, Sq]`.
    HeadsOrRows,
    /// The last of `[B, H, Sq]`.
    Rows,
}

/// The elements of an array of floating-point numbers, in order, and its shape.
///
/// # Errors
/// [`Error::Kind`] or [`Error::DType`], or those of the import.
pub fn numbers(
    arg: &'static str,
    object: &Bound<'_, PyAny>,
    like: &Array<'_>,
    dtypes: &[DType],
) -> PyResult<(Vec<f64>, Vec<usize>)> {
    fn copy<T: Element>(array: &Array<'_>) -> Result<Vec<f64>, Error> {
        let data = array.memory.slice::<T>(array.arg)?;
        let (shape, strides) = (&array.memory.shape, &array.memory.strides);
        let count: usize = shape.iter().product();
        let at = |mut flat: usize| {
            let mut place = 0;
            for (&n, &stride) in shape.iter().zip(strides).rev() {
                place += flat % n * stride;
                flat /= n;
            }
            data[place].to_acc().to_f64()
        };
        Ok((0..count).map(at).collect())
    }
    let array = Array::import(arg, object, Layout::Any)?;
    like.check_kind(&array)?;
    let data = match array.element {
        ElementType::Float(dtype) if dtypes.contains(&dtype) => dispatch_dtype!(dtype, copy, &array)?,
        ref other => {
            let mut names: Vec<&str> = dtypes.iter().map(|dtype| dtype.name()).collect();
            names.dedup();
            return Err(Error::DType { arg, expected: names.join(" or "), got: other.to_string() }.into());
        }
    };
    Ok((data, array.shape().to_vec()))
}

/// A window for all heads, or for each.
pub enum WindowSize {
    /// For all.
    One(Window),
    /// For each.
    PerHead(Vec<Window>),
}

/// What a negative size of a window means.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Negative {
    /// An error.
    Refused,
    /// No bound, as in FlashAttention.
    Unbounded,
}

const WINDOW_SIZE: &str = "window_size";

fn shown(object: &Bound<'_, PyAny>) -> String {
    object.repr().map_or_else(|_| "another object".into(), |text| text.to_string())
}

fn no_window(object: &Bound<'_, PyAny>) -> Error {
    let expected = "None or a pair, each an integer or None".into();
    Error::Kind { arg: WINDOW_SIZE, expected, got: shown(object) }
}

fn side(side: &Bound<'_, PyAny>, negative: Negative) -> Result<isize, Error> {
    if side.is_none() {
        return Ok(Window::UNBOUNDED);
    }
    if side.is_instance_of::<PyBool>() || !side.hasattr("__index__").unwrap_or(false) {
        return Err(no_window(side));
    }
    let expected = match negative {
        Negative::Refused => "sides that are None or integers of at least 0",
        Negative::Unbounded => "sides that are None or integers",
    };
    match side.extract::<i64>() {
        Ok(n) if n >= 0 => Ok(Window::side(n)),
        Ok(_) if negative == Negative::Unbounded => Ok(Window::UNBOUNDED),
        _ => Err(Error::Value { arg: WINDOW_SIZE, expected: expected.into(), got: shown(side) }),
    }
}

fn pair(sides: &[Bound<'_, PyAny>], negative: Negative) -> Result<Window, Error> {
    Ok(Window { left: side(&sides[0], negative)?, right: side(&sides[1], negative)? })
}

impl WindowSize {
    /// Reads a pair, or one for each head.
    ///
    /// # Errors
    /// [`Error::Kind`], [`Error::Shape`] or [`Error::Value`] naming `window_size`.
    pub fn read(object: Option<&Bound<'_, PyAny>>, heads: usize, negative: Negative) -> PyResult<Self> {
        let Some(object) = object else { return Ok(Self::One(Window::ALL)) };
        if object.hasattr("ndim")? {
            let expected = format!("({heads}, 2), a pair for each head");
            let (_, sides) = integers::read_signed(WINDOW_SIZE, object, &[Some(heads), Some(2)], &expected)?;
            if let Some(n) = sides.iter().find(|&&n| n < -1 && negative == Negative::Refused) {
                let expected = "integers of at least 0, or -1 for no bound".into();
                return Err(Error::Value { arg: WINDOW_SIZE, expected, got: n.to_string() }.into());
            }
            let bound = |n: i64| if n < 0 { Window::UNBOUNDED } else { Window::side(n) };
            let windows = sides.chunks_exact(2).map(|sides| Window { left: bound(sides[0]), right: bound(sides[1]) });
            return Ok(Self::of_heads(windows.collect()));
        }
        if object.is_instance_of::<PyString>() {
            return Err(no_window(object).into());
        }
        let items = object.try_iter().and_then(Iterator::collect::<PyResult<Vec<_>>>).map_err(|_| no_window(object))?;
        let nested: Option<Vec<Vec<Bound<'_, PyAny>>>> =
            items.iter().map(|item| item.try_iter().ok().and_then(|sides| sides.collect::<PyResult<_>>().ok())).collect();
        match nested {
            Some(pairs) if !pairs.is_empty() || heads == 0 => {
                if pairs.iter().any(|sides| sides.len() != 2) {
                    return Err(no_window(object).into());
                }
                if pairs.len() != heads {
                    let expected = format!("{heads} pairs, one for each head");
                    return Err(Error::Value { arg: WINDOW_SIZE, expected, got: pairs.len().to_string() }.into());
                }
                Ok(Self::of_heads(pairs.iter().map(|sides| pair(sides, negative)).collect::<Result<_, _>>()?))
            }
            _ if items.len() == 2 => Ok(Self::One(pair(&items, negative)?)),
            _ => Err(no_window(object).into()),
        }
    }

    /// What all heads share is one window.
    fn of_heads(windows: Vec<Window>) -> Self {
        match windows.split_first() {
            Some((&first, rest)) if rest.iter().all(|&window| window == first) => Self::One(first),
            _ => Self::PerHead(windows),
        }
    }

    fn within(self, other: Window) -> Self {
        match self {
            Self::One(window) => Self::One(window.within(other)),
            Self::PerHead(windows) => Self::PerHead(windows.into_iter().map(|window| window.within(other)).collect()),
        }
    }
}

/// The arguments, as they came.
#[derive(Default)]
pub struct Given<'a, 'py> {
    /// A number or an array.
    pub scale: Option<&'a Bound<'py, PyAny>>,
    /// An array `[Sk + 1]`.
    pub length_scale: Option<&'a Bound<'py, PyAny>>,
    /// A positive number.
    pub softcap: Option<f64>,
    /// An array `[H]` or `[B, H]`.
    pub alibi_slopes: Option<&'a Bound<'py, PyAny>>,
    /// An array `[H]`, or one that broadcasts to `[B, H, Sq]`.
    pub sinks: Option<&'a Bound<'py, PyAny>>,
    /// A number from 0 to below 1.
    pub dropout_p: f64,
    /// A number that fits into 64 bits.
    pub dropout_seed: Option<&'a Bound<'py, PyAny>>,
    /// A lowered normaliser.
    pub normalizer: Option<&'a Bound<'py, PyAny>>,
    /// A lowered mask.
    pub mask: Option<&'a Bound<'py, PyAny>>,
}

/// The arguments, checked.
pub struct Options {
    windows: WindowSize,
    ranges: Option<RowRanges>,
    segments: Option<Vec<Segment>>,
    offset: isize,
    scale: f64,
    scale_rows: Option<Table>,
    length_scale: Option<Vec<f64>>,
    softcap: Option<f64>,
    alibi_slopes: Option<Table>,
    sinks: Option<Table>,
    normalizer: Normalizer,
    reweighting: Option<Reweighting<'static>>,
    dropout: Option<Dropout>,
}

impl Options {
    /// Scaled scores, and a window around the position that `offset` gives the first query.
    pub fn plain(shape: &AttnShape, scale: Option<f64>, window: Window, offset: isize) -> Self {
        Self {
            windows: WindowSize::One(window),
            ranges: None,
            segments: None,
            offset,
            scale: scale.unwrap_or(shape.default_scale()),
            scale_rows: None,
            length_scale: None,
            softcap: None,
            alibi_slopes: None,
            sinks: None,
            normalizer: Normalizer::Softmax,
            reweighting: None,
            dropout: None,
        }
    }

    /// Checks all arguments against the sizes of a call whose last query is at the position of the last key.
    ///
    /// # Errors
    /// Those of each argument.
    pub fn read(like: &Array<'_>, shape: &AttnShape, causal: bool, windows: WindowSize, given: &Given<'_, '_>) -> PyResult<Self> {
        let rows = [shape.batch, shape.num_heads, shape.seqlen_q];
        let offset = shape.seqlen_k as isize - shape.seqlen_q as isize;
        let mut options = Self::plain(shape, None, Window::ALL, offset);
        options.windows = if causal { windows.within(Window::CAUSAL) } else { windows };
        if let Some(scale) = given.scale {
            let is_number = scale.is_instance_of::<PyFloat>() || scale.is_instance_of::<PyInt>();
            match scale.extract::<f64>() {
                Ok(number) if is_number || !scale.hasattr("ndim")? => options.scale = number,
                _ => {
                    let table = Table::read("scale", scale, like, rows, Align::Rows)?;
                    options.scale = table.constant().unwrap_or(1.0);
                    options.scale_rows = table.constant().is_none().then_some(table);
                }
            }
        }
        if let Some(factors) = given.length_scale {
            let (data, got) = numbers("length_scale", factors, like, &[DType::F32, DType::F64, like.float()?])?;
            if got != [shape.seqlen_k + 1] {
                let expected = format!("({},), a factor for each number of keys from 0", shape.seqlen_k + 1);
                return Err(Error::Shape { arg: "length_scale", expected, got: shape_text(&got) }.into());
            }
            options.length_scale = Some(data);
        }
        options.softcap = softcap(given.softcap)?;
        let table = |arg, object: Option<&Bound<'_, PyAny>>, align| {
            object.map(|object| Table::read(arg, object, like, rows, align)).transpose()
        };
        options.alibi_slopes = table("alibi_slopes", given.alibi_slopes, Align::Heads)?;
        options.sinks = table("sinks", given.sinks, Align::HeadsOrRows)?;
        if let Some(normalizer) = given.normalizer {
            (options.normalizer, options.reweighting) = masks::normalizer(normalizer)?;
        }
        options.dropout = dropout(given.dropout_p, given.dropout_seed)?;
        if options.sinks.is_some() && options.normalizer != Normalizer::Softmax {
            let expected = "None, as the normalizer is not softmax".into();
            return Err(Error::Value { arg: "sinks", expected, got: "an array".into() }.into());
        }
        if let Some(mask) = given.mask {
            let extents = Extents { batch: shape.batch, seqlen_q: shape.seqlen_q, seqlen_k: shape.seqlen_k, offset };
            match masks::read(mask, extents, shape.num_heads)? {
                masks::Lowered::Band(band) => {
                    options.windows = options.windows.within(band.window);
                    options.segments = band.segments;
                }
                masks::Lowered::Ranges(ranges) => options.ranges = Some(ranges),
            }
        }
        Ok(options)
    }

    /// Sets the factor of all scores, if one is given.
    pub fn set_scale(&mut self, scale: Option<f64>) {
        self.scale = scale.unwrap_or(self.scale);
    }

    /// The segments that a caller has made.
    pub fn with_segments(self, segments: Vec<Segment>) -> Self {
        Self { segments: Some(segments), ..self }
    }

    /// Which keys are seen.
    pub fn mask(&self) -> Mask<'_> {
        let windows = match &self.windows {
            WindowSize::One(window) => Windows::One(*window),
            WindowSize::PerHead(windows) => Windows::PerHead(windows),
        };
        Mask { windows, ranges: self.ranges.as_ref() }
    }

    /// Which queries and keys belong together.
    pub fn segments(&self) -> Segments<'_> {
        self.segments.as_ref().map_or(Segments::Whole { offset: self.offset }, |list| Segments::List(list))
    }

    /// What changes scores.
    pub fn mods(&self) -> ScoreMod<'_> {
        ScoreMod {
            scale: Scale {
                factor: self.scale,
                rows: self.scale_rows.as_ref().map(Table::view),
                by_length: self.length_scale.as_deref(),
            },
            softcap: self.softcap,
            alibi_slopes: self.alibi_slopes.as_ref().map(Table::view),
            sinks: self.sinks.as_ref().map(Table::view),
            normalizer: self.normalizer,
            reweighting: self.reweighting,
            dropout: self.dropout,
        }
    }
}

fn dropout(probability: f64, seed: Option<&Bound<'_, PyAny>>) -> PyResult<Option<Dropout>> {
    let wrong = |arg, expected: &str, got: String| PyErr::from(Error::Value { arg, expected: expected.into(), got });
    if !(0.0..1.0).contains(&probability) {
        return Err(wrong("dropout_p", "a number from 0 to below 1", probability.to_string()));
    }
    if probability == 0.0 {
        return Ok(None);
    }
    let Some(seed) = seed else {
        return Err(wrong("dropout_seed", "an integer, as dropout_p is above 0", "None".into()));
    };
    let seed = seed.extract().map_err(|_| wrong("dropout_seed", "an integer from 0 to below 2**64", seed.to_string()))?;
    Ok(Some(Dropout { probability, seed }))
}

/// Checks a soft-cap.
///
/// # Errors
/// [`Error::Value`] when it is not a positive number.
pub fn softcap(cap: Option<f64>) -> Result<Option<f64>, Error> {
    match cap {
        Some(cap) if !(cap > 0.0 && cap.is_finite()) => {
            Err(Error::Value { arg: "softcap", expected: "None or a positive number".into(), got: cap.to_string() })
        }
        cap => Ok(cap),
    }
}
