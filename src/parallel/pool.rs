//! Our own threads. The only home of `rayon`.

use arc_swap::ArcSwapOption;
use rayon::{ThreadPool, ThreadPoolBuilder};
use std::sync::Arc;

/// The helpers of the calling thread: one fewer than the threads in use.
struct Pool {
    helpers: usize,
    /// Threads do not survive a fork: a pool of another process is never used.
    process: u32,
    threads: ThreadPool,
}

static POOL: ArcSwapOption<Pool> = ArcSwapOption::const_empty();

fn pool(helpers: usize) -> Option<Arc<Pool>> {
    let process = std::process::id();
    if let Some(pool) = &*POOL.load()
        && pool.process == process
        && pool.helpers == helpers
    {
        return Some(Arc::clone(pool));
    }
    let threads = ThreadPoolBuilder::new().num_threads(helpers).thread_name(|i| format!("subquad-{i}")).build().ok()?;
    let pool = Arc::new(Pool { helpers, process, threads });
    if let Some(old) = POOL.swap(Some(Arc::clone(&pool)))
        && old.process != process
    {
        // Its threads are in the parent, and so may be the holders of its locks: dropping it could wait for ever.
        std::mem::forget(old);
    }
    Some(pool)
}

/// Runs `work` on the calling thread and on up to `needed` of `helpers` others; alone when the system gives no threads.
pub fn run(helpers: usize, needed: usize, work: &(impl Fn() + Sync)) {
    match pool(helpers) {
        None => work(),
        Some(pool) => pool.threads.in_place_scope(|scope| {
            for _ in 0..helpers.min(needed) {
                scope.spawn(|_| work());
            }
            work();
        }),
    }
}
