//! The threads of the host library's OpenMP runtime.
//!
//! PyTorch's threads go on spinning for some milliseconds after each of its operators. Threads of our own would share processors
//! with them: a call that is over in 100 microseconds waits for milliseconds until its helper is scheduled. Where PyTorch is
//! loaded, calls run on those spinning threads instead, as one more of its parallel regions.

use libloading::os::unix::{Library, RTLD_NOW};
use std::any::Any;
use std::ffi::{c_int, c_uint, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Mutex, OnceLock, PoisonError};

/// `GOMP_parallel`: the entry into a parallel region, of GNU's runtime and of those that stand in for it.
type Parallel =
    unsafe extern "C" fn(region: unsafe extern "C" fn(*mut c_void), data: *mut c_void, threads: c_uint, flags: c_uint);
type MaxThreads = unsafe extern "C" fn() -> c_int;

/// The runtime that a library uses.
pub struct OpenMp {
    parallel: Parallel,
    max_threads: MaxThreads,
    /// Its threads do not survive a fork.
    process: u32,
}

/// Linux's flag for opening only what is loaded.
const RTLD_NOLOAD: c_int = 0x4;

static HOST: OnceLock<Option<OpenMp>> = OnceLock::new();

/// Adopts the runtime that a loaded library uses, by the library's name. Only the first call that finds the library counts.
///
/// Nothing is adopted when it uses no such runtime, and in a process that was forked without a new program: the runtime may
/// believe in threads that only the parent has.
pub fn adopt(library: &str) {
    if HOST.get().is_none()
        && let Some(library) = loaded(library)
    {
        HOST.get_or_init(|| if is_forked() { None } else { OpenMp::of(library) });
    }
}

/// A library, if something has loaded it.
#[expect(unsafe_code, reason = "opens a library")]
fn loaded(library: &str) -> Option<Library> {
    // SAFETY: a library that is loaded already is not initialised again.
    unsafe { Library::open(Some(library), RTLD_NOW | RTLD_NOLOAD) }.ok()
}

/// The adopted runtime, where its teams have `threads` threads: with any other number, it would start and end threads on every
/// change.
pub fn team_of(threads: usize) -> Option<&'static OpenMp> {
    let host = HOST.get()?.as_ref()?;
    (host.process == std::process::id() && host.team_size() == threads).then_some(host)
}

/// Whether this process is a fork that runs its parent's program.
fn is_forked() -> bool {
    // Bit of the flags in /proc/<pid>/stat: see `man 5 proc_pid_stat`, and PF_FORKNOEXEC in the kernel.
    const FORKED_NOT_EXECUTED: u64 = 0x40;
    let Ok(stat) = std::fs::read_to_string("/proc/self/stat") else { return true };
    // The second field, a name in parentheses, may hold anything.
    let flags = stat.rsplit(')').next().and_then(|rest| rest.split_whitespace().nth(6)?.parse::<u64>().ok());
    flags.is_none_or(|flags| flags & FORKED_NOT_EXECUTED != 0)
}

#[expect(unsafe_code, reason = "a foreign runtime")]
impl OpenMp {
    fn of(library: Library) -> Option<Self> {
        // SAFETY: the types are those of the runtime's documented interface. The symbols are searched in the library, then in what
        // it depends on, nearest first.
        let (parallel, max_threads) = unsafe {
            (*library.get::<Parallel>(b"GOMP_parallel").ok()?, *library.get::<MaxThreads>(b"omp_get_max_threads").ok()?)
        };
        // The symbols stay valid for as long as the library is loaded.
        std::mem::forget(library);
        Some(Self { parallel, max_threads, process: std::process::id() })
    }

    /// Threads of the next parallel region of the calling thread.
    fn team_size(&self) -> usize {
        // SAFETY: takes nothing and may be called at any time.
        usize::try_from(unsafe { (self.max_threads)() }).unwrap_or(1)
    }

    /// Runs `work` on every thread of a team, the calling one included.
    ///
    /// # Panics
    /// When `work` does, once all threads have finished.
    pub fn run<W: Fn() + Sync>(&self, work: &W) {
        let region = Region { work, panic: Mutex::new(None) };
        let threads = self.team_size() as c_uint;
        // SAFETY: `enter::<W>` gets the region that it expects, which outlives the call, as the runtime returns only when every
        // thread has left; `W: Sync` and the mutex make sharing sound.
        unsafe { (self.parallel)(enter::<W>, (&raw const region).cast_mut().cast(), threads, 0) };
        if let Some(panic) = region.panic.into_inner().unwrap_or_else(PoisonError::into_inner) {
            resume_unwind(panic);
        }
    }
}

struct Region<'a, W> {
    work: &'a W,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

#[expect(unsafe_code, reason = "called by a foreign runtime")]
unsafe extern "C" fn enter<W: Fn() + Sync>(region: *mut c_void) {
    // SAFETY: `run` passes a region of this type, which lives until all threads have left.
    let region = unsafe { &*region.cast::<Region<'_, W>>() };
    // A panic must not unwind through the runtime.
    if let Err(panic) = catch_unwind(AssertUnwindSafe(region.work)) {
        region.panic.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(panic);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[test]
    fn only_loaded_libraries_are_opened() {
        assert!(loaded("libc.so.6").is_some());
        assert!(loaded("libsubquad_no_such_library.so").is_none());
    }

    #[test]
    fn a_library_without_openmp_is_no_host() {
        assert!(OpenMp::of(loaded("libc.so.6").unwrap()).is_none());
    }

    #[test]
    #[expect(unsafe_code, reason = "opens a library")]
    fn a_panic_of_one_thread_is_that_of_the_region() {
        // SAFETY: GNU's runtime may be loaded at any time.
        let Ok(library) = (unsafe { Library::open(Some("libgomp.so.1"), RTLD_NOW) }) else {
            eprintln!("skipped: there is no libgomp.so.1");
            return;
        };
        let host = OpenMp::of(library).expect("GNU's runtime has the interface");
        let finished = AtomicUsize::new(0);
        let all = host.team_size();
        let turn = AtomicUsize::new(0);
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            host.run(&|| {
                assert!(turn.fetch_add(1, Ordering::Relaxed) != 0, "the first");
                finished.fetch_add(1, Ordering::Relaxed);
            });
        }));
        assert_eq!(outcome.unwrap_err().downcast_ref::<&str>(), Some(&"the first"));
        assert_eq!(finished.into_inner(), all - 1);
    }

    #[test]
    fn a_started_program_is_not_forked() {
        assert!(!is_forked());
    }
}
