//! What a fork means for a session: the child must leave the parent's connections alone, and memory that both map is not used again.
#![allow(
    unsafe_code,
    reason = "fork handlers, one cell per process and closing copies of descriptors are raw by nature"
)]

use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::sync::Once;
use std::sync::atomic::{AtomicI32, AtomicPtr, AtomicU64, Ordering};

/// Forks that have begun in this process or a forefather.
static STARTED: AtomicU64 = AtomicU64::new(0);
/// Forks that have ended.
static ENDED: AtomicU64 = AtomicU64::new(0);
/// Forks between the first process and this one.
static DEPTH: AtomicU64 = AtomicU64::new(0);
static WATCH: Once = Once::new();

unsafe extern "C" {
    // In every libc of Linux; the libc crate declares it for other systems only.
    fn pthread_atfork(
        prepare: Option<unsafe extern "C" fn()>,
        parent: Option<unsafe extern "C" fn()>,
        child: Option<unsafe extern "C" fn()>,
    ) -> libc::c_int;
}

unsafe extern "C" fn prepare() {
    STARTED.fetch_add(1, Ordering::SeqCst);
}

unsafe extern "C" fn parent() {
    ENDED.fetch_add(1, Ordering::SeqCst);
}

unsafe extern "C" fn child() {
    // Forks of other threads, begun in the parent, never end here.
    ENDED.store(STARTED.load(Ordering::SeqCst), Ordering::SeqCst);
    DEPTH.fetch_add(1, Ordering::SeqCst);
}

/// Begins to count forks. Cheap after the first time.
pub(super) fn watch() {
    WATCH.call_once(|| {
        // SAFETY: the handlers only touch atomics, which is allowed between fork and exec, and this code is never unloaded
        // (Python does not unload extensions). It fails only for want of memory; the process id still tells a child then.
        let _ = unsafe { pthread_atfork(Some(prepare), Some(parent), Some(child)) };
    });
}

/// A process among its forefathers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Process {
    depth: u64,
    // For forks that run no handlers (a raw clone).
    pid: u32,
}

impl Process {
    /// The running one.
    pub(super) fn current() -> Self {
        Self { depth: DEPTH.load(Ordering::Relaxed), pid: std::process::id() }
    }

    /// Whether this is the running one.
    pub(super) fn is_current(self) -> bool {
        self == Self::current()
    }
}

/// A moment in the history of forks.
#[derive(Debug, Clone, Copy)]
pub(super) struct Mark(Option<u64>);

impl Mark {
    /// Now; or, while a fork is under way, a moment before it.
    pub(super) fn now() -> Self {
        // In this order: a fork that begins in between makes the two differ.
        let ended = ENDED.load(Ordering::SeqCst);
        let started = STARTED.load(Ordering::SeqCst);
        Self((ended == started).then_some(started))
    }

    /// Whether there was a fork since.
    pub(super) fn forked(self) -> bool {
        self.0 != Some(STARTED.load(Ordering::SeqCst))
    }
}

/// A value that each process has for itself: a forked child gets a new one.
///
/// The parent's value is never dropped in the child (another thread may have been at work on it), it is leaked.
pub(super) struct PerProcess<T> {
    newest: AtomicPtr<Node<T>>,
}

struct Node<T> {
    process: Process,
    value: T,
}

impl<T: Send + Sync> PerProcess<T> {
    pub(super) fn new(value: T) -> Self {
        watch();
        let node = Box::new(Node { process: Process::current(), value });
        Self { newest: AtomicPtr::new(Box::into_raw(node)) }
    }

    /// This process's value. In the first call after a fork it is made from the parent's.
    pub(super) fn get(&self, inherit: impl FnOnce(&T) -> T) -> &T {
        let newest = self.newest.load(Ordering::Acquire);
        // SAFETY: nodes come from Box::into_raw and live until `self` is dropped, or for ever.
        let node = unsafe { &*newest };
        let process = Process::current();
        if node.process == process {
            return &node.value;
        }
        let made = Box::into_raw(Box::new(Node { process, value: inherit(&node.value) }));
        match self.newest.compare_exchange(newest, made, Ordering::AcqRel, Ordering::Acquire) {
            // SAFETY: as above; `made` is now the newest.
            Ok(_) => unsafe { &(*made).value },
            Err(winner) => {
                // SAFETY: `made` was never shared; the winner is a node as above, made by another thread of this process.
                unsafe {
                    drop(Box::from_raw(made));
                    &(*winner).value
                }
            }
        }
    }
}

impl<T> PerProcess<T> {
    /// Whether the newest value is this process's own.
    pub(super) fn is_current(&self) -> bool {
        // SAFETY: as in `get`.
        unsafe { (*self.newest.load(Ordering::Acquire)).process.is_current() }
    }
}

impl<T> Drop for PerProcess<T> {
    fn drop(&mut self) {
        let newest = *self.newest.get_mut();
        // SAFETY: from Box::into_raw, and nobody borrows from `self` any more. A parent's value stays where it is.
        unsafe {
            if (*newest).process.is_current() {
                drop(Box::from_raw(newest));
            }
        }
    }
}

// SAFETY: it owns its nodes and gives out shared references only.
unsafe impl<T: Send + Sync> Send for PerProcess<T> {}
// SAFETY: as above.
unsafe impl<T: Send + Sync> Sync for PerProcess<T> {}

/// The descriptors of a session, for a child to close its copies of them without touching the parent's values.
#[derive(Debug)]
pub(super) struct Descriptors(Box<[AtomicI32]>);

const EMPTY: i32 = -1;

impl Descriptors {
    pub(super) fn new(room: usize) -> Self {
        Self((0..room).map(|_| AtomicI32::new(EMPTY)).collect())
    }

    /// Notes a descriptor, if there is room (a child then leaks its copy, which is harmless: the parent's shutdown ends both).
    pub(super) fn put(&self, fd: RawFd) -> Option<usize> {
        let swap =
            |slot: &AtomicI32| slot.compare_exchange(EMPTY, fd, Ordering::AcqRel, Ordering::Relaxed).is_ok();
        self.0.iter().position(swap)
    }

    /// Forgets one that is about to be closed.
    pub(super) fn clear(&self, slot: Option<usize>) {
        if let Some(slot) = slot.and_then(|slot| self.0.get(slot)) {
            slot.store(EMPTY, Ordering::Release);
        }
    }

    /// Closes this process's copies of them all. Only for a forked child that will never drop the parent's values.
    pub(super) fn close_copies(&self) {
        for slot in &self.0 {
            match slot.swap(EMPTY, Ordering::AcqRel) {
                EMPTY => {}
                // SAFETY: the owning value is the parent's and is leaked in this process, so that nobody else closes this copy.
                fd => drop(unsafe { OwnedFd::from_raw_fd(fd) }),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use nix::sys::wait::{WaitStatus, waitpid};
    use nix::unistd::{ForkResult, fork};

    use super::*;

    /// Runs `child` in a forked process; it says by true that all is as it should be.
    fn in_child(child: impl FnOnce() -> bool) {
        // SAFETY: the child touches atomics and memory of its own only and leaves by _exit.
        match unsafe { fork() }.unwrap() {
            ForkResult::Child => {
                let code = i32::from(!child());
                // SAFETY: ends the process without running destructors of the parent's values.
                unsafe { libc::_exit(code) }
            }
            ForkResult::Parent { child } => {
                assert_eq!(waitpid(child, None).unwrap(), WaitStatus::Exited(child, 0));
            }
        }
    }

    #[test]
    fn a_fork_taints_what_was_there_and_not_what_comes_after() {
        watch();
        let before = Mark::now();
        in_child(|| before.forked() && !Mark::now().forked());
        assert!(before.forked());
    }

    #[test]
    fn a_child_makes_its_own_value_from_its_parents() {
        let cell = PerProcess::new(1);
        assert_eq!(*cell.get(|_| 100), 1);
        in_child(|| *cell.get(|old| old + 1) == 2 && *cell.get(|_| 100) == 2);
        assert_eq!(*cell.get(|_| 100), 1);
    }

    #[test]
    fn a_child_closes_its_copies_and_the_parent_keeps_its_own() {
        let (reader, writer) = nix::unistd::pipe().unwrap();
        let list = Descriptors::new(2);
        let slot = list.put(std::os::fd::AsRawFd::as_raw_fd(&writer));
        assert_eq!(slot, Some(0));
        assert_eq!(list.put(77), Some(1));
        assert_eq!(list.put(78), None);
        list.clear(Some(1));
        in_child(|| {
            list.close_copies();
            // SAFETY: only asks about a number.
            unsafe { libc::fcntl(std::os::fd::AsRawFd::as_raw_fd(&writer), libc::F_GETFD) == -1 }
        });
        nix::unistd::write(&writer, b"x").unwrap();
        drop(reader);
    }
}
