//! States on their way in and out: rows of the channels of the keys for the loops, whatever the caller's order is.

use super::{Numbers, RecurrentShape};
use crate::dtype::{Element, Float};
use crate::parallel::RowWriter;

/// Where states come from and go to.
pub struct States<'a, T: Element> {
    /// Those before the first token, `[N, HV, 1, K * V]`; zeros if there are none. Ignored in place.
    pub initial: Option<Numbers<'a, T>>,
    /// Those after the last token, likewise, unless nobody asks.
    pub last: Option<RowWriter<'a, T::Acc>>,
    /// Whether `last` holds the states before the first token.
    pub in_place: bool,
    /// Whether states are `[V, K]`, not `[K, V]`.
    pub v_first: bool,
}

/// The state of one head of one sequence, as the caller has it.
pub struct Flat<'o, E> {
    /// Where the state after the last token goes.
    pub last: Option<&'o mut [E]>,
    key_stride: usize,
    value_stride: usize,
    sizes: [usize; 2],
}

impl<T: Element> States<'_, T> {
    /// The state of a head of sequence `number`.
    pub fn of(&self, number: usize, head: usize, shape: &RecurrentShape) -> Flat<'_, T::Acc> {
        let sizes @ [keys, values] = [shape.head_dim, shape.head_dim_v];
        let (key_stride, value_stride) = if self.v_first { (1, keys) } else { (values, 1) };
        Flat { last: self.last.as_ref().map(|last| last.row(number, head, 0)), key_stride, value_stride, sizes }
    }

    /// Writes the state before the first token to rows that are `stride` apart, zeros beyond them. `scratch` holds `K * V`.
    #[inline(always)]
    pub fn load(
        &self,
        flat: &Flat<'_, T::Acc>,
        (number, head): (usize, usize),
        (rows, stride): (&mut [T::Acc], usize),
        scratch: &mut [T::Acc],
    ) {
        rows.fill(T::Acc::ZERO);
        let source = match (&flat.last, &self.initial) {
            (Some(last), _) if self.in_place => &**last,
            (_, Some(initial)) => {
                initial.read(number, head, 0, scratch);
                &*scratch
            }
            _ => return,
        };
        let [keys, values] = flat.sizes;
        for (d, row) in rows.chunks_exact_mut(stride.max(1)).enumerate().take(keys) {
            for (n, s) in row[..values].iter_mut().enumerate() {
                *s = source[d * flat.key_stride + n * flat.value_stride];
            }
        }
    }
}

impl<E: Float> Flat<'_, E> {
    /// Whether rows of the caller's are those of the loops, `width` wide.
    pub fn is_in_rows(&self, width: usize) -> bool {
        self.value_stride == 1 && self.key_stride == width
    }

    /// Writes the state after the last token, if somebody asks.
    pub fn store(self, rows: &[E], stride: usize) {
        let Some(last) = self.last else { return };
        let [keys, values] = self.sizes;
        for (d, row) in rows.chunks_exact(stride.max(1)).enumerate().take(keys) {
            for (n, &s) in row[..values].iter().enumerate() {
                last[d * self.key_stride + n * self.value_stride] = s;
            }
        }
    }
}
