//! Sending and receiving allocate nothing once the caller's buffers have their size.
#![allow(
    unsafe_code,
    clippy::unwrap_used,
    reason = "a counting allocator is unsafe to declare; tests fail by panicking"
)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use shmquant_protocol::socket::{Connection, MAX_FDS, MAX_FRAME};

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

/// The system's allocator, counting for each thread.
struct Counting;

// SAFETY: everything is passed on to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
        // SAFETY: the caller keeps what this function asks for, too.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: the caller keeps what this function asks for, too.
        unsafe { System.dealloc(memory, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

#[test]
fn the_steady_state_allocates_nothing() {
    let (a, b) = Connection::pair().unwrap();
    let mut buf = vec![0; MAX_FRAME];
    let mut fds: Vec<OwnedFd> = Vec::with_capacity(MAX_FDS);
    let frame = vec![1; 1000];
    let lent = [a.as_fd(); MAX_FDS];
    let mut round = |fds: &mut Vec<OwnedFd>| {
        let deadline = Some(Instant::now() + Duration::from_secs(60));
        for count in 0..=MAX_FDS {
            a.send(&frame, &lent[..count]).unwrap();
            assert_eq!(b.recv(&mut buf, fds).unwrap().fds, count);
            a.send_until(&frame, &lent[..count], deadline).unwrap();
            assert_eq!(b.recv_spin(&mut buf, fds, Duration::from_micros(10), deadline).unwrap().fds, count);
        }
        assert!(b.try_recv(&mut buf, fds).unwrap().is_none());
    };
    round(&mut fds);
    let before = ALLOCATIONS.get();
    assert!(before > 0, "the allocator counts");
    for _ in 0..100 {
        round(&mut fds);
    }
    assert_eq!(ALLOCATIONS.get(), before);
}
