//! Scratch memory of one thread, kept between calls so that kernels never allocate per tile.

use bytemuck::{Pod, Zeroable};
use std::cell::RefCell;

/// Cache lines, so that every buffer carved from the arena starts on one.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C, align(64))]
struct Line([u8; 64]);

thread_local! {
    static ARENA: RefCell<Vec<Line>> = const { RefCell::new(Vec::new()) };
}

/// Elements of `T` that fill whole cache lines and hold at least `len`.
pub fn padded<T>(len: usize) -> usize {
    let per_line = size_of::<Line>() / size_of::<T>();
    len.div_ceil(per_line) * per_line
}

/// Runs `body` on `len` elements of this thread's scratch. Their content is arbitrary, never uninitialised.
///
/// # Panics
/// When `body` asks for scratch again: the arena has one user at a time.
#[inline(always)]
pub fn with_scratch<T: Pod, R>(len: usize, body: impl FnOnce(&mut [T]) -> R) -> R {
    let lines = len.div_ceil(size_of::<Line>() / size_of::<T>());
    ARENA.with(|arena| {
        let mut arena = arena.borrow_mut();
        if arena.len() < lines {
            arena.resize(lines, Line::zeroed());
        }
        body(&mut bytemuck::cast_slice_mut(&mut arena[..lines])[..len])
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scratch_is_aligned_and_reused() {
        let first = with_scratch::<f32, _>(100, |s| {
            s[0] = 7.0;
            assert_eq!(s.len(), 100);
            s.as_ptr() as usize
        });
        assert_eq!(first % 64, 0);
        assert_eq!(with_scratch::<f64, _>(10, |s| s.as_ptr() as usize), first);
        assert_eq!(padded::<f32>(17), 32);
    }
}
