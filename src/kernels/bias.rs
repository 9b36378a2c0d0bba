//! Dense masks and additive biases, broadcast by strides, never expanded.

use crate::dtype::{Element, Float};

/// A broadcast `[B, H, Sq, Sk]` array of any strides: 0 along what shares values, negative along the queries of a Toeplitz matrix.
#[derive(Debug, Clone, Copy)]
pub struct BiasView<'a, U> {
    /// The elements.
    pub data: &'a [U],
    /// Place of the element of the first query and key.
    pub origin: usize,
    /// Elements between neighbours along batch, head, query and key.
    pub strides: [isize; 4],
}

impl<'a, U> BiasView<'a, U> {
    /// Position of the first key's element.
    #[inline(always)]
    fn start(&self, [batch, head, token]: [usize; 3]) -> isize {
        let [b, h, t, _] = self.strides;
        self.origin as isize + batch as isize * b + head as isize * h + token as isize * t
    }

    /// The elements of keys `first..first + count`, when they are adjacent.
    #[inline(always)]
    fn adjacent(&self, at: [usize; 3], first: usize, count: usize) -> Option<&'a [U]> {
        let start = self.start(at) as usize + first;
        (self.strides[3] == 1).then(|| &self.data[start..start + count])
    }

    #[inline(always)]
    fn get(&self, at: [usize; 3], key: usize) -> &'a U {
        &self.data[(self.start(at) + key as isize * self.strides[3]) as usize]
    }
}

/// What is added to scaled scores.
#[derive(Debug, Clone, Copy, Default)]
pub enum Bias<'a, T: Element> {
    /// Nothing.
    #[default]
    None,
    /// 0 where the byte is not 0, `-inf` elsewhere.
    Bool(BiasView<'a, u8>),
    /// Values of the inputs' type.
    Input(BiasView<'a, T>),
    /// Single-precision values.
    Single(BiasView<'a, f32>),
}

impl<T: Element> Bias<'_, T> {
    /// Whether there is nothing to add.
    pub fn is_none(&self) -> bool {
        matches!(self, Self::None)
    }

    /// Whether all queries of all heads of a sequence share one row.
    pub fn is_per_key(&self) -> bool {
        match self {
            Self::None => true,
            Self::Bool(view) => view.strides[1..3] == [0, 0],
            Self::Input(view) => view.strides[1..3] == [0, 0],
            Self::Single(view) => view.strides[1..3] == [0, 0],
        }
    }

    /// Adds the values of keys `first..` of one query at `[batch, head, token]` to `out`.
    #[inline(always)]
    pub fn add(&self, at: [usize; 3], first: usize, out: &mut [T::Acc], scratch: &mut [T::Acc]) {
        let scratch = &mut scratch[..out.len()];
        self.read(at, first, scratch);
        for (out, &x) in out.iter_mut().zip(&*scratch) {
            *out = T::Acc::from_f64(out.to_f64() + x.to_f64());
        }
    }

    /// Writes the values of keys `first..` of one query at `[batch, head, token]` to all of `out`.
    #[inline(always)]
    pub fn read(&self, at: [usize; 3], first: usize, out: &mut [T::Acc]) {
        fn fill<U: Copy, A>(view: &BiasView<'_, U>, at: [usize; 3], first: usize, out: &mut [A], widen: impl Fn(U) -> A) {
            if let Some(row) = view.adjacent(at, first, out.len()) {
                for (out, &x) in out.iter_mut().zip(row) {
                    *out = widen(x);
                }
            } else {
                for (j, out) in out.iter_mut().enumerate() {
                    *out = widen(*view.get(at, first + j));
                }
            }
        }
        match self {
            Self::None => out.fill(T::Acc::ZERO),
            Self::Bool(view) => {
                fill(view, at, first, out, |x| if x == 0 { T::Acc::NEG_INFINITY } else { T::Acc::ZERO });
            }
            Self::Input(view) => fill(view, at, first, out, T::to_acc),
            Self::Single(view) => fill(view, at, first, out, |x| T::Acc::from_f64(f64::from(x))),
        }
    }
}
