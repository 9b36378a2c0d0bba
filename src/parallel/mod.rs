//! Threads, and the entry into an instruction set.
//!
//! [`for_each_tile`] is the one way to run in parallel and the one way to enter an instruction set, exactly once per task:
//! a closure that a vectorised function hands to a thread pool would be compiled for the baseline.
//!
//! Tasks are handed out one at a time in index order, so that uneven ones even out; a task's result depends on its index alone,
//! which makes results independent of the number of threads.
//!
//! The threads are those of the OpenMP runtime of the host library where there is one ([`openmp`]), else our own (`pool`).

pub mod openmp;
mod pool;
mod rows;
mod turns;

pub use rows::{PieceWriter, RowWriter, axes_are_disjoint, rows_are_disjoint};
pub use turns::{RowTurns, Turn};

use crate::simd::{Level, Task, finish_stores};
use std::cell::Cell;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Largest number of threads that can be asked for.
pub const MAX_THREADS: usize = 1024;

/// The processors that this process may use, cgroup quotas included.
pub fn available_threads() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from).min(MAX_THREADS)
}

thread_local! {
    static IN_TASK: Cell<bool> = const { Cell::new(false) };
}

/// Marks the thread as running tasks until it is dropped, by a panic as well.
struct InTask {
    before: bool,
}

impl InTask {
    fn enter() -> Self {
        Self { before: IN_TASK.replace(true) }
    }
}

impl Drop for InTask {
    fn drop(&mut self) {
        IN_TASK.set(self.before);
    }
}

/// Runs tasks `0..count` at `level` on up to `threads` threads, the calling one included.
///
/// Serial when one thread suffices, when called by a task, and when the system gives no threads.
pub fn for_each_tile(level: Level, threads: usize, count: usize, task: &(impl Task + Sync)) {
    let next = AtomicUsize::new(0);
    let work = || {
        let _inside = InTask::enter();
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            if index >= count {
                break;
            }
            level.run(task, index);
        }
        finish_stores();
    };
    let threads = threads.min(MAX_THREADS);
    if threads.min(count) <= 1 || IN_TASK.get() {
        work();
    } else if let Some(team) = openmp::team_of(threads) {
        team.run(&work);
    } else {
        pool::run(threads - 1, count - 1, &work);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::Isa;
    use std::sync::Mutex;

    struct Collect(Mutex<Vec<usize>>);
    impl Task for Collect {
        const MULTIPLIES_BF16: bool = false;

        #[inline(always)]
        fn run<I: Isa>(&self, index: usize) {
            self.0.lock().unwrap().push(index);
        }
    }

    #[test]
    fn every_task_runs_once_at_any_thread_count() {
        for threads in [1, 2, 5] {
            let seen = Collect(Mutex::new(Vec::new()));
            for_each_tile(Level::Scalar, threads, 100, &seen);
            let mut seen = seen.0.into_inner().unwrap();
            seen.sort_unstable();
            assert_eq!(seen, (0..100).collect::<Vec<_>>());
        }
    }

    struct Nested;
    impl Task for Nested {
        const MULTIPLIES_BF16: bool = false;

        #[inline(always)]
        fn run<I: Isa>(&self, _index: usize) {
            let inner = Collect(Mutex::new(Vec::new()));
            for_each_tile(Level::Scalar, 4, 3, &inner);
            assert_eq!(inner.0.into_inner().unwrap().len(), 3);
        }
    }

    #[test]
    fn nested_calls_finish() {
        for_each_tile(Level::Scalar, 3, 8, &Nested);
    }
}
