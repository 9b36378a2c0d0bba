//! Hints that memory will be read or written soon, and the end of stores that pass the caches.

/// Bytes of a cache line.
pub const LINE: usize = 64;

/// Starts bringing the cache line of an address into L2. The address need not be valid.
#[inline(always)]
#[expect(unsafe_code, reason = "an intrinsic without a safe form")]
pub fn prefetch_line<T>(address: *const T) {
    use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
    // SAFETY: a prefetch is a hint that never faults, and every x86-64 has it.
    unsafe { _mm_prefetch::<_MM_HINT_T1>(address.cast()) };
}

/// Starts bringing the cache lines of `data` into L2.
///
/// Rows of one head lie apart by all heads: hardware prefetchers, which stop at the end of a page, do not see them coming.
#[inline(always)]
pub fn prefetch<T>(data: &[T]) {
    prefetch_lines(data.as_ptr(), data.len());
}

/// As [`prefetch`], for `len` elements that others may be writing. The address need not be valid.
#[inline(always)]
pub fn prefetch_lines<T>(start: *const T, len: usize) {
    let start = start.cast::<u8>();
    for at in (0..len * size_of::<T>()).step_by(LINE) {
        prefetch_line(start.wrapping_add(at));
    }
}

/// Starts making the cache lines of `len` elements this core's own, for stores: one that misses waits in the store buffer, which holds up
/// all that come after it. The address need not be valid.
#[inline(always)]
#[expect(unsafe_code, reason = "an instruction without an intrinsic")]
pub fn prefetch_lines_to_write<T>(start: *const T, len: usize) {
    let start = start.cast::<u8>();
    for at in (0..len * size_of::<T>()).step_by(LINE) {
        // SAFETY: a prefetch is a hint that never faults; a processor without this one does nothing.
        unsafe { std::arch::asm!("prefetchw [{}]", in(reg) start.wrapping_add(at), options(nostack, preserves_flags, readonly)) };
    }
}

/// Whether a row begins where a cache line does.
#[inline(always)]
pub fn begins_a_line<T>(row: &[T]) -> bool {
    row.as_ptr().addr().is_multiple_of(LINE)
}

/// Makes the stores of [`super::Vector::store_past_caches`] visible before those that follow: they may else be seen after what tells other
/// threads that they are done.
#[inline(always)]
#[expect(unsafe_code, reason = "an intrinsic without a safe form")]
pub fn finish_stores() {
    // SAFETY: every x86-64 has it.
    unsafe { std::arch::x86_64::_mm_sfence() };
}
