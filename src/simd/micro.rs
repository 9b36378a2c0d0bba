//! The register tile: `M` broadcast operands times `N` vectors, accumulated over `depth` operands.

use super::{RowBlock, SimdElement, Vector, VectorKernel, prefetch::prefetch_line};

/// `acc[i][v] + sum over d of a[i * a_row + d * a_step] . b[d * b_step ..][v]`, all sums in order of `d`.
///
/// Per step: `N` vector loads and `M` broadcasts feed `M * N` multiply-accumulates, so that with two loads a cycle the tile is
/// bound by arithmetic as soon as `M * N >= M + N`.
///
/// # Panics
/// When an operand lies beyond `a` or `b`.
#[inline(always)]
#[expect(unsafe_code, reason = "bounds of both operands are asserted once, outside the loop")]
pub fn tile<T: SimdElement, K: VectorKernel<T>, const M: usize, const N: usize>(
    a: &[T::Acc],
    (a_row, a_step): (usize, usize),
    b: &[T::Acc],
    b_step: usize,
    depth: usize,
    mut acc: [[K::V; N]; M],
) -> [[K::V; N]; M] {
    let Some(last) = depth.checked_sub(1) else { return acc };
    assert!((M - 1) * a_row + last * a_step < a.len(), "tile: `a` is too short");
    assert!(last * b_step + N * K::V::LANES <= b.len(), "tile: `b` is too short");
    let mut b_at = b.as_ptr();
    let mut a_at = a.as_ptr();
    let rows: [usize; M] = std::array::from_fn(|i| i * a_row);
    // What the compiler knows to be evenly spaced it makes by adding, row after row: a chain of additions, which takes longer than the
    // arithmetic of two vectors.
    let rows = if N > 2 || a_row == 1 { rows } else { std::hint::black_box(rows) };
    for _ in 0..depth {
        let mut columns = [K::V::splat(<T::Acc as crate::dtype::Float>::ZERO); N];
        for (v, column) in columns.iter_mut().enumerate() {
            // SAFETY: `b_at` is at step `d <= last`, so `v * LANES + LANES <= N * LANES` elements from it are within `b`.
            *column = K::V::load(unsafe { std::slice::from_raw_parts(b_at.add(v * K::V::LANES), K::V::LANES) });
        }
        for (i, acc) in acc.iter_mut().enumerate() {
            // SAFETY: `a_at` is at step `d <= last`, and `i <= M - 1`.
            let x = K::V::splat(unsafe { *a_at.add(rows[i]) });
            for (sum, &column) in acc.iter_mut().zip(&columns) {
                *sum = K::mul_acc(x, column, *sum);
            }
        }
        a_at = a_at.wrapping_add(a_step);
        b_at = b_at.wrapping_add(b_step);
    }
    acc
}

/// Dot products of the `KEYS` rows from `first` on with `ROWS` rows of operands over whole vectors: lane-wise partial sums.
///
/// Per step: `KEYS` loads from memory, `ROWS` operand loads and `KEYS * ROWS` multiply-accumulates. With `FETCH`, every load of a
/// key requests the same vector of a key `ahead`: evenly spread, requests keep the memory busy and never fill its queues.
///
/// # Panics
/// When a row is shorter than `vectors` vectors.
#[inline(always)]
#[expect(unsafe_code, reason = "bounds of all rows are asserted once, outside the loop")]
pub fn dot_tile<T: SimdElement, K: VectorKernel<T>, const KEYS: usize, const ROWS: usize, const FETCH: bool>(
    (keys, ahead): (&RowBlock<'_, T>, &RowBlock<'_, T>),
    first: usize,
    queries: [&[T::Acc]; ROWS],
    vectors: usize,
) -> [[K::V; KEYS]; ROWS] {
    let lanes = K::V::LANES;
    let width = lanes * K::DEPTH;
    let mut sums = [[K::V::splat(<T::Acc as crate::dtype::Float>::ZERO); KEYS]; ROWS];
    assert!(keys.width() / width >= vectors, "dot_tile: keys are too short");
    assert!(queries.iter().all(|row| row.len() / lanes >= vectors), "dot_tile: a query is too short");
    let starts: [_; KEYS] = std::array::from_fn(|i| (keys.start(first + i), ahead.start(first + i)));
    for d in 0..vectors {
        for (i, (key, ahead)) in starts.iter().enumerate() {
            if FETCH {
                prefetch_line(ahead.wrapping_add(d * width));
            }
            // SAFETY: `d < vectors`, and a row holds that many vectors of `width` elements.
            let key = K::load_row(unsafe { std::slice::from_raw_parts(key.add(d * width), width) });
            for (query, sums) in queries.iter().zip(&mut sums) {
                // SAFETY: likewise.
                let query = K::V::load(unsafe { std::slice::from_raw_parts(query.as_ptr().add(d * lanes), lanes) });
                sums[i] = K::mul_acc(key, query, sums[i]);
            }
        }
    }
    sums
}

/// Dot products of the `KEYS` rows from `first` on with `N` vectors of operands, the products of a row in the lanes: `queries` is
/// `[depth, N * LANES]`. `FETCH` as in [`dot_tile`].
///
/// Per step: `N` operand loads and `KEYS` broadcasts from memory for `KEYS * N` multiply-accumulates, and nothing to reduce. Steps
/// take turns on `SETS` sets of accumulators: eight alone would wait for each other.
///
/// # Panics
/// When a row is shorter than `depth` operands, or `queries` is.
#[inline(always)]
#[expect(unsafe_code, reason = "bounds of all rows are asserted once, outside the loop")]
pub fn cross_tile<T: SimdElement, K: VectorKernel<T>, const KEYS: usize, const N: usize, const SETS: usize, const FETCH: bool>(
    (keys, ahead): (&RowBlock<'_, T>, &RowBlock<'_, T>),
    first: usize,
    queries: &[T::Acc],
    depth: usize,
) -> [[K::V; N]; KEYS] {
    let lanes = K::V::LANES;
    assert!(keys.width() / K::DEPTH >= depth, "cross_tile: keys are too short");
    assert!(queries.len() / (N * lanes) >= depth, "cross_tile: queries are too short");
    let mut sets = [[[K::V::splat(<T::Acc as crate::dtype::Float>::ZERO); N]; KEYS]; SETS];
    let starts: [_; KEYS] = std::array::from_fn(|i| keys.start(first + i));
    // One vector of a row is one cache line.
    for line in (0..depth).step_by(lanes) {
        if FETCH {
            for i in 0..KEYS {
                prefetch_line(ahead.start(first + i).wrapping_add(line * K::DEPTH));
            }
        }
        let end = depth.min(line + lanes);
        let mut d = line;
        while d + SETS <= end {
            for (s, sums) in sets.iter_mut().enumerate() {
                // SAFETY: `d + s < depth`, and the assertions above.
                unsafe { cross_step::<T, K, KEYS, N>(&starts, queries, d + s, sums) };
            }
            d += SETS;
        }
        while d < end {
            // SAFETY: `d < depth`, and the assertions above.
            unsafe { cross_step::<T, K, KEYS, N>(&starts, queries, d, &mut sets[0]) };
            d += 1;
        }
    }
    let mut total = sets[0];
    for set in &sets[1..] {
        for (total, sum) in total.as_flattened_mut().iter_mut().zip(set.as_flattened()) {
            *total = total.add(*sum);
        }
    }
    total
}

/// Step `d` of [`cross_tile`].
///
/// # Safety
/// Rows hold more than `d` operands, and `queries` more than `d` rows of `N * LANES`.
#[inline(always)]
#[expect(unsafe_code, reason = "bounds are asserted once, by the caller")]
unsafe fn cross_step<T: SimdElement, K: VectorKernel<T>, const KEYS: usize, const N: usize>(
    starts: &[*const T; KEYS],
    queries: &[T::Acc],
    d: usize,
    sums: &mut [[K::V; N]; KEYS],
) {
    let lanes = K::V::LANES;
    let mut columns = sums[0];
    for (v, column) in columns.iter_mut().enumerate() {
        // SAFETY: promised by the caller.
        *column = K::V::load(unsafe { std::slice::from_raw_parts(queries.as_ptr().add((d * N + v) * lanes), lanes) });
    }
    for (key, sums) in starts.iter().zip(sums) {
        // SAFETY: promised by the caller.
        let key = K::broadcast(unsafe { std::slice::from_raw_parts(key.add(d * K::DEPTH), K::DEPTH) });
        for (sum, &column) in sums.iter_mut().zip(&columns) {
            *sum = K::mul_acc(key, column, *sum);
        }
    }
}

/// `acc[r][v] + sum over k < count of probs[r][k * key_step] . values[k][first..][v]`, `2 * HALF` vectors wide, in the order of
/// [`VectorKernel::load_rows_shuffled`]. `FETCH` as in [`dot_tile`].
///
/// # Panics
/// When values end before the last vector, or `probs` has too few operands in a row.
#[inline(always)]
#[expect(unsafe_code, reason = "bounds of all rows are asserted before they are read")]
pub fn weigh_tile<T: SimdElement, K: VectorKernel<T>, const ROWS: usize, const HALF: usize, const FETCH: bool>(
    (values, ahead): (&RowBlock<'_, T>, &RowBlock<'_, T>),
    count: usize,
    first: usize,
    (probs, key_step): ([&[T::Acc]; ROWS], usize),
    mut acc: [[[K::V; 2]; HALF]; ROWS],
) -> [[[K::V; 2]; HALF]; ROWS] {
    let width = 2 * K::V::LANES;
    let steps = count / K::DEPTH;
    let last = steps.saturating_sub(1).saturating_mul(key_step);
    assert!(probs.iter().all(|row| row.len() > last), "weigh_tile: too few probabilities");
    assert!(values.width().checked_sub(first).is_some_and(|rest| rest >= HALF * width), "weigh_tile: values are too short");
    for k in 0..steps {
        let pair = [k * K::DEPTH, k * K::DEPTH + K::DEPTH - 1];
        for h in 0..HALF {
            let column = first + h * width;
            if FETCH {
                for row in &pair[..K::DEPTH] {
                    let row = ahead.start(*row).wrapping_add(column);
                    prefetch_line(row);
                    if width * size_of::<T>() > 64 {
                        prefetch_line(row.wrapping_add(width / 2));
                    }
                }
            }
            // SAFETY: `column + width <= first + HALF * width`, which every row reaches.
            let rows = pair.map(|row| unsafe { std::slice::from_raw_parts(values.start(row).add(column), width) });
            let columns = K::load_rows_shuffled(rows);
            for (row, acc) in probs.iter().zip(&mut acc) {
                // SAFETY: `k < steps`, and every row has that many operands.
                let p = K::V::splat(unsafe { *row.as_ptr().add(k * key_step) });
                acc[h][0] = K::mul_acc(p, columns[0], acc[h][0]);
                acc[h][1] = K::mul_acc(p, columns[1], acc[h][1]);
            }
        }
    }
    acc
}
