//! Rows that several tasks add to, in a fixed order: sums whose bits do not depend on which thread comes first.

use super::rows::rows_are_disjoint;
use crate::simd::prefetch_lines;
use std::marker::PhantomData;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// Looks at a turn this often before it gives the processor away.
const SPINS: usize = 1 << 10;

/// A writable `[B, S, H, D]` array. Each of its rows belongs to one *place*; the tasks that add to a place take turns.
///
/// Tasks are handed out in order ([`super::for_each_tile`]): a task that only waits for earlier ones is never waited for in vain.
pub struct RowTurns<'a, T> {
    start: *mut T,
    shape: [usize; 4],
    strides: [usize; 3],
    taken: Vec<AtomicUsize>,
    failed: AtomicBool,
    #[cfg(debug_assertions)]
    owners: Vec<AtomicUsize>,
    memory: PhantomData<&'a mut [T]>,
}

#[expect(unsafe_code, reason = "rows that tasks take turns with")]
// SAFETY: the rows of a place are only reached through its `Turn`, of which there is one at a time; `T` moves between threads.
unsafe impl<T: Send> Sync for RowTurns<'_, T> {}

impl<'a, T> RowTurns<'a, T> {
    /// Wraps `data`; `strides` count elements along batch, sequence and head. The last axis is contiguous.
    ///
    /// # Panics
    /// When rows overlap or reach beyond `data`.
    pub fn new(data: &'a mut [T], shape: [usize; 4], strides: [usize; 3], places: usize) -> Self {
        let [b, s, h] = strides;
        assert!(rows_are_disjoint(shape, strides), "rows overlap");
        assert!(
            crate::tensor::extent("out", &shape, &[b, s, h, 1]).is_ok_and(|needed| needed <= data.len()),
            "rows reach beyond the data"
        );
        Self {
            start: data.as_mut_ptr(),
            shape,
            strides,
            taken: std::iter::repeat_with(Default::default).take(places).collect(),
            failed: AtomicBool::new(false),
            #[cfg(debug_assertions)]
            owners: std::iter::repeat_with(|| AtomicUsize::new(usize::MAX)).take(shape[0] * shape[1] * shape[2]).collect(),
            memory: PhantomData,
        }
    }

    /// Waits until `before` turns of a place are over, and takes the next.
    ///
    /// # Panics
    /// When the turn was taken already, or when a task has panicked, whose turn would never come.
    pub fn wait(&self, place: usize, before: usize) -> Turn<'_, 'a, T> {
        let mut spins = 0;
        loop {
            let taken = self.taken[place].load(Ordering::Acquire);
            if taken == before {
                return Turn { turns: self, place };
            }
            assert!(taken < before, "turn taken twice");
            assert!(!self.failed.load(Ordering::Relaxed), "another task has failed");
            spins += 1;
            if spins < SPINS {
                std::hint::spin_loop();
            } else {
                std::thread::yield_now();
            }
        }
    }

    /// Starts bringing a row into the cache.
    #[inline(always)]
    pub fn prefetch(&self, batch: usize, token: usize, head: usize) {
        let offset = batch * self.strides[0] + token * self.strides[1] + head * self.strides[2];
        prefetch_lines(self.start.wrapping_add(offset), self.shape[3]);
    }

    /// To be held by each task while it runs: if that panics, those that wait for it do so too.
    pub fn watch(&self) -> Watch<'_> {
        Watch(&self.failed)
    }
}

/// See [`RowTurns::watch`].
pub struct Watch<'t>(&'t AtomicBool);

impl Drop for Watch<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.store(true, Ordering::Relaxed);
        }
    }
}

/// The right to add to the rows of a place, over when it is dropped.
pub struct Turn<'t, 'a, T> {
    turns: &'t RowTurns<'a, T>,
    place: usize,
}

impl<T> Turn<'_, '_, T> {
    /// The elements of one token of one head, which must belong to the place.
    ///
    /// # Panics
    /// When there is no such row; in debug builds, when it was asked for as another place's.
    #[inline(always)]
    #[expect(unsafe_code, reason = "rows that tasks take turns with")]
    pub fn row(&mut self, batch: usize, token: usize, head: usize) -> &mut [T] {
        let RowTurns { start, shape: [batches, tokens, heads, width], strides, .. } = self.turns;
        assert!(batch < *batches && token < *tokens && head < *heads, "no such row");
        #[cfg(debug_assertions)]
        {
            let owner = &self.turns.owners[(batch * tokens + token) * heads + head];
            let before = owner.swap(self.place, Ordering::Relaxed);
            assert!(before == usize::MAX || before == self.place, "row of another place");
        }
        let offset = batch * strides[0] + token * strides[1] + head * strides[2];
        // SAFETY: `new` checked that every row lies within the data and that rows are disjoint, and the data is borrowed mutably
        // for 'a. Rows belong to one place, which debug builds assert, and a place has one turn at a time.
        unsafe { std::slice::from_raw_parts_mut(start.add(offset), *width) }
    }
}

impl<T> Drop for Turn<'_, '_, T> {
    fn drop(&mut self) {
        self.turns.taken[self.place].fetch_add(1, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::parallel::for_each_tile;
    use crate::simd::{Isa, Level, Task};

    struct InOrder<'t, 'a>(&'t RowTurns<'a, f32>, usize);
    impl Task for InOrder<'_, '_> {
        const MULTIPLIES_BF16: bool = false;

        #[inline(always)]
        fn run<I: Isa>(&self, index: usize) {
            let _watch = self.0.watch();
            assert!(index != self.1, "this task fails");
            for place in 0..8 {
                let mut turn = self.0.wait(place, index);
                let x = &mut turn.row(0, place, 0)[0];
                // Of the order of tasks, sums of such terms keep every bit.
                *x = *x / 2.0 + index as f32;
            }
        }
    }

    #[test]
    fn turns_come_in_order() {
        let run = |threads| {
            let mut data = [0f32; 8];
            for_each_tile(Level::Scalar, threads, 20, &InOrder(&RowTurns::new(&mut data, [1, 8, 1, 1], [8, 1, 1], 8), 20));
            data.map(f32::to_bits)
        };
        assert_eq!(run(1), run(4));
        assert!(f32::from_bits(run(1)[7]) > 36.0);
    }

    #[test]
    fn a_task_that_fails_lets_nobody_wait() {
        let failed = std::panic::catch_unwind(|| {
            let mut data = [0f32; 8];
            for_each_tile(Level::Scalar, 3, 20, &InOrder(&RowTurns::new(&mut data, [1, 8, 1, 1], [8, 1, 1], 8), 5));
        });
        assert!(failed.is_err());
    }
}
