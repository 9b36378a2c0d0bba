//! Scratch memory of one thread, kept between calls so that kernels never allocate per tile.

use bytemuck::{Pod, Zeroable};
use std::cell::RefCell;

/// Cache lines, so that every buffer carved from the arena starts on one.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C, align(64))]
struct Line([u8; 64]);

/// Cuts `len` elements off.
#[expect(clippy::mut_mut, reason = "what is left of the scratch")]
pub fn carve<'s, T>(rest: &mut &'s mut [T], len: usize) -> &'s mut [T] {
    let (cut, left) = std::mem::take(rest).split_at_mut(len);
    *rest = left;
    cut
}

thread_local! {
    static ARENAS: RefCell<Vec<Vec<Line>>> = const { RefCell::new(Vec::new()) };
}

/// Elements of `T` that fill whole cache lines and hold at least `len`.
pub fn padded<T>(len: usize) -> usize {
    let per_line = size_of::<Line>() / size_of::<T>();
    len.div_ceil(per_line) * per_line
}

/// This thread's scratch, borrowed until it is dropped.
///
/// A guard, not a function that takes a closure: the closure would be compiled for the baseline instruction set.
pub struct Scratch {
    lines: Vec<Line>,
}

impl Scratch {
    /// At least `len` elements of `T`. Their content is arbitrary, never uninitialised.
    ///
    /// A thread that asks again before it has dropped the first gets other memory, which is kept as well.
    pub fn take<T: Pod>(len: usize) -> Self {
        let mut lines = ARENAS.with_borrow_mut(|arenas| arenas.pop().unwrap_or_default());
        let needed = len.div_ceil(size_of::<Line>() / size_of::<T>());
        if lines.len() < needed {
            // Growing would keep what is of no use until it is copied.
            drop(lines);
            lines = vec![Line::zeroed(); needed];
        }
        Self { lines }
    }

    /// The memory as elements of `T`.
    #[inline(always)]
    pub fn as_mut_slice<T: Pod>(&mut self) -> &mut [T] {
        bytemuck::cast_slice_mut(&mut self.lines)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        ARENAS.with_borrow_mut(|arenas| arenas.push(std::mem::take(&mut self.lines)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scratch_is_aligned_and_reused() {
        let mut scratch = Scratch::take::<f32>(100);
        let first = scratch.as_mut_slice::<f32>().as_ptr() as usize;
        assert!(scratch.as_mut_slice::<f32>().len() >= 100);
        assert_eq!(first % 64, 0);
        drop(scratch);
        let mut again = Scratch::take::<f64>(10);
        assert_eq!(again.as_mut_slice::<f64>().as_ptr() as usize, first);
        let mut nested = Scratch::take::<f64>(10);
        assert_ne!(nested.as_mut_slice::<f64>().as_ptr() as usize, first);
        assert_eq!(padded::<f32>(17), 32);
    }
}
