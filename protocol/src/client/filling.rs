//! Which thread writes which chunk, and how far the window is written without a gap.
#![allow(unsafe_code, reason = "chunks are disjoint parts of a window")]

use std::ops::Range;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::encoding::Encoding;
use super::error::ClientError;
use super::leases::lock;
use super::source::Source;
use super::window::Window;
use crate::chunks::{Action, Chunk, ChunkList};
use crate::failpoint::failpoint;

/// Bytes of values that a thread takes at a time: several small chunks, or one large one.
const RUN: u64 = 256 << 10;

/// The values of one request on their way into a window.
pub(super) struct Filling<'a> {
    list: &'a ChunkList,
    encoding: Encoding<'a>,
    window: &'a Window,
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    /// The first chunk that nobody has taken.
    next: usize,
    /// The first chunk that may not be written yet.
    limit: usize,
    /// The runs that are being written: few, one a thread.
    running: Vec<Run>,
    stopped: bool,
    /// Threads that wait for a change: without any, nobody is woken, which would be a system call.
    waiting: usize,
    /// The source panicked: its chunk will never be written.
    failed: bool,
}

impl<'a> Filling<'a> {
    /// Nothing is written yet. Fails if a chunk would not lie in the window, which only a wrong list can cause.
    pub(super) fn new(
        list: &'a ChunkList,
        source: &'a dyn Source,
        window: &'a Window,
    ) -> Result<Self, ClientError> {
        let inside = |at: u64, bytes: u64| at.checked_add(bytes).is_some_and(|end| end <= window.len());
        let all = list
            .chunks
            .iter()
            .all(|c| c.at >= list.base && inside(c.at, c.bytes) && c.bytes <= list.capacity);
        if !all {
            return Err(ClientError::TooLarge { bytes: list.base, most: window.len() / 4 });
        }
        let state = State {
            next: 0,
            limit: list.writable(0),
            running: Vec::with_capacity(8),
            stopped: false,
            waiting: 0,
            failed: false,
        };
        let encoding = Encoding::new(source, list);
        Ok(Self { list, encoding, window, state: Mutex::new(state), changed: Condvar::new() })
    }

    /// The daemon is done with all chunks below `consumed`.
    pub(super) fn consumed(&self, consumed: usize) {
        let limit = self.list.writable(consumed);
        let mut state = lock(&self.state);
        if limit > state.limit {
            state.limit = limit;
            self.wake(state);
        }
    }

    /// Nothing more is to be written. Runs that have begun are finished.
    pub(super) fn stop(&self) {
        let mut state = lock(&self.state);
        state.stopped = true;
        self.wake(state);
    }

    /// Writes one run. False if there is none to take now.
    pub(super) fn step(&self) -> bool {
        let run = self.claim(&mut lock(&self.state));
        match run {
            Some(run) => {
                self.write(run);
                true
            }
            None => false,
        }
    }

    /// What a helping thread does until all is written or it is stopped.
    pub(super) fn help(&self) {
        loop {
            let mut state = lock(&self.state);
            let run = loop {
                if state.stopped || state.next >= self.list.chunks.len() {
                    return;
                }
                match self.claim(&mut state) {
                    Some(run) => break run,
                    None => {
                        state.waiting += 1;
                        state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                        state.waiting -= 1;
                    }
                }
            };
            drop(state);
            self.write(run);
        }
    }

    /// All chunks below this one are in the window; `None` if the source panicked on some thread.
    pub(super) fn watermark(&self) -> Option<usize> {
        let state = lock(&self.state);
        (!state.failed).then(|| state.running.iter().map(|run| run.first).min().unwrap_or(state.next))
    }

    /// Whether more than the chunks below `mark` is written or being written; waits a little for threads that are at it.
    ///
    /// Both are looked at together: a thread that ended since `mark` was asked for must not be missed.
    pub(super) fn moves_beyond(&self, mark: usize, at_most: Duration) -> bool {
        let mut state = lock(&self.state);
        if state.running.is_empty() {
            // What was held back by ranges that were being looked for may be taken now.
            let free = !state.stopped && state.next < state.limit.min(self.list.chunks.len());
            return free || state.next != mark || state.failed;
        }
        state.waiting += 1;
        state = self.changed.wait_timeout(state, at_most).unwrap_or_else(PoisonError::into_inner).0;
        state.waiting -= 1;
        true
    }

    /// Wakes whoever waits for what the caller has just changed.
    fn wake(&self, state: MutexGuard<'_, State>) {
        let waiting = state.waiting;
        drop(state);
        if waiting > 0 {
            self.changed.notify_all();
        }
    }

    fn claim(&self, state: &mut State) -> Option<Range<usize>> {
        let first = state.next;
        let (mut work, mut scans) = (0, false);
        while state.next < state.limit && work < RUN && !state.stopped {
            let chunk = self.list.chunks.get(state.next)?;
            let scanning = || scans || state.running.iter().any(|run| run.scans);
            if chunk.action == Action::Encode && !is_idle(chunk) && scanning() {
                break;
            }
            if !is_idle(chunk) {
                work += chunk.work;
                scans |= chunk.action == Action::Scan;
            }
            state.next += 1;
        }
        if first == state.next {
            return None;
        }
        state.running.push(Run { first, scans });
        Some(first..state.next)
    }

    fn write(&self, run: Range<usize>) {
        let first = run.start;
        // Taken off the list on every way out: a source that panics must not leave others waiting.
        let _done = Done { filling: self, first };
        for chunk in self.list.chunks.get(run).unwrap_or_default() {
            if is_idle(chunk) {
                continue;
            }
            // SAFETY: a chunk is taken by one thread, and the list gives those that may be written at the same time (none of
            // which the daemon has yet to consume) disjoint places.
            if let Some(part) = unsafe { self.window.part(chunk.at, chunk.bytes) } {
                self.encoding.write(chunk, part);
                failpoint("client.chunk_filled");
            }
        }
    }
}

/// Chunks that one thread took together.
struct Run {
    first: usize,
    /// Some of them look for ranges: codes that need them have to wait.
    scans: bool,
}

/// Nothing of it crosses.
fn is_idle(chunk: &Chunk) -> bool {
    chunk.shared || chunk.bytes == 0
}

struct Done<'a, 'b> {
    filling: &'a Filling<'b>,
    first: usize,
}

impl Drop for Done<'_, '_> {
    fn drop(&mut self) {
        let mut state = lock(&self.filling.state);
        state.running.retain(|run| run.first != self.first);
        if std::thread::panicking() {
            // What was not written must never be announced.
            state.stopped = true;
            state.failed = true;
        }
        self.filling.wake(state);
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use shmquant_kernels::{Affine, FloatType, Granularity, OnNonFinite, Scheme};

    use super::*;
    use crate::chunks::{Chunk, MIN_WINDOW};
    use crate::descriptor::{Body, Descriptor, Item, Role, Spec, TableKind, Values, Way};
    use crate::segment::{Backing, Kind, Segment, SegmentName};

    /// Layers whose chunks are filled with the low byte of their index in the list.
    struct Numbered {
        descriptor: Descriptor,
        fills: AtomicUsize,
    }

    impl Source for Numbered {
        fn descriptor(&self) -> &Descriptor {
            &self.descriptor
        }

        fn fill(&self, chunk: &Chunk, out: &mut [u8]) {
            assert_eq!(out.len() as u64, chunk.work);
            self.fills.fetch_add(1, Ordering::Relaxed);
            out.fill(mark_of(chunk));
        }
    }

    fn mark_of(chunk: &Chunk) -> u8 {
        (chunk.item as u8).wrapping_mul(31) ^ (chunk.first >> 10) as u8
    }

    fn layers(granularity: Granularity, sizes: &[u64]) -> Numbered {
        let affine = Some(Affine::new(Scheme::Int8, None).unwrap());
        let group_size = if granularity == Granularity::Group { 32 } else { 0 };
        let spec = Spec { affine, granularity, on_nonfinite: OnNonFinite::Error, packed: false, group_size };
        let item = |(i, n): (usize, &u64)| Item {
            name: format!("layer {i}"),
            body: Body::Values(Values {
                role: Role::Layer,
                spec: 0,
                dtype: FloatType::F32,
                null: false,
                rows: 1,
                k: *n,
                null_count: 0,
                shape: vec![],
                params: None,
                way: Way::Streamed,
            }),
        };
        let descriptor = Descriptor {
            table: TableKind::Layers { large_names: false },
            metrics: false,
            continue_on_error: false,
            specs: vec![spec],
            metadata: Default::default(),
            rows: sizes.len() as u64,
            items: sizes.iter().enumerate().map(item).collect(),
        };
        Numbered { descriptor, fills: AtomicUsize::new(0) }
    }

    fn window() -> Window {
        let name = SegmentName { instance: 0xc1, kind: Kind::Window, id: 3 };
        let segment = Segment::create(Backing::Memfd, &name, MIN_WINDOW).unwrap();
        Window::map(segment.fd().as_fd(), MIN_WINDOW, Backing::Memfd).unwrap()
    }

    fn list_of(source: &Numbered) -> ChunkList {
        let mut bytes = Vec::new();
        source.descriptor.encode(&mut bytes).unwrap();
        ChunkList::new(&source.descriptor, bytes.len() as u64, MIN_WINDOW)
    }

    fn is_written(window: &Window, chunk: &Chunk) -> bool {
        // SAFETY: nobody writes this chunk's place now.
        let part = unsafe { window.part(chunk.at, chunk.bytes) }.unwrap();
        part.iter().all(|b| *b == mark_of(chunk))
    }

    #[test]
    fn a_resident_table_is_written_once_and_its_second_pass_not_at_all() {
        let source = layers(Granularity::Tensor, &[300_000, 7, 0, 300_000]);
        let (list, window) = (list_of(&source), window());
        assert!(list.resident && list.chunks.iter().any(|c| c.shared));
        let filling = Filling::new(&list, &source, &window).unwrap();
        while filling.step() {}
        assert_eq!(filling.watermark(), Some(list.chunks.len()));
        let written = list.chunks.iter().filter(|c| !c.shared);
        assert_eq!(source.fills.load(Ordering::Relaxed), written.clone().count());
        assert!(written.into_iter().all(|c| is_written(&window, c)));
    }

    #[test]
    fn several_threads_leave_no_gap_below_the_watermark_and_overwrite_nothing_unread() {
        let sizes: Vec<u64> = (0..40).map(|i| 1000 + 20_011 * i).collect();
        let source = layers(Granularity::Tensor, &sizes);
        let (list, window) = (list_of(&source), window());
        assert!(!list.resident);
        let filling = Filling::new(&list, &source, &window).unwrap();
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| filling.help());
            }
            // The daemon's part: read what is announced, one chunk after the other.
            let mut consumed = 0;
            while consumed < list.chunks.len() {
                let mark = filling.watermark().unwrap();
                assert!(mark <= list.writable(consumed));
                for chunk in &list.chunks[consumed..mark] {
                    assert!(is_written(&window, chunk), "{chunk:?}");
                }
                if mark > consumed {
                    consumed = mark.min(consumed + 3);
                    filling.consumed(consumed);
                }
                std::thread::park_timeout(Duration::from_micros(200));
            }
        });
        assert_eq!(source.fills.load(Ordering::Relaxed), list.chunks.len());
    }

    /// The same for values that are encoded here.
    fn encoded(granularity: Granularity, sizes: &[u64]) -> Numbered {
        let mut source = layers(granularity, sizes);
        for item in &mut source.descriptor.items {
            let Body::Values(values) = &mut item.body else { continue };
            values.way = Way::Encoded;
        }
        source
    }

    #[test]
    fn codes_wait_for_ranges_and_are_not_forgotten_when_these_are_there() {
        let source = encoded(Granularity::Tensor, &[1 << 20]);
        let (list, window) = (list_of(&source), window());
        let filling = Filling::new(&list, &source, &window).unwrap();
        let scans = list.chunks.iter().filter(|c| c.action == Action::Scan).count();
        assert!(list.resident && scans == 4 && list.chunks.len() == 8);
        // Another thread is at the first ranges.
        let first = filling.claim(&mut lock(&filling.state)).unwrap();
        while filling.step() {}
        assert_eq!((filling.watermark(), lock(&filling.state).next), (Some(0), scans));
        assert!(filling.moves_beyond(0, Duration::ZERO), "it is being worked on");
        filling.write(first);
        let mark = filling.watermark().unwrap();
        assert_eq!(mark, scans);
        assert!(filling.moves_beyond(mark, Duration::ZERO), "the codes are to be had");
        while filling.step() {}
        assert_eq!(filling.watermark(), Some(list.chunks.len()));
        assert!(!filling.moves_beyond(list.chunks.len(), Duration::ZERO));
        filling.stop();
        assert!(!filling.moves_beyond(list.chunks.len(), Duration::ZERO));
    }

    #[test]
    fn several_threads_encode_two_passes_in_the_right_order() {
        for _ in 0..50 {
            let source = encoded(Granularity::Tensor, &[1 << 20, 300_000, 7, 800_000]);
            let (list, window) = (list_of(&source), window());
            let filling = Filling::new(&list, &source, &window).unwrap();
            std::thread::scope(|scope| {
                (0..3).for_each(|_| drop(scope.spawn(|| filling.help())));
            });
            assert_eq!(filling.watermark(), Some(list.chunks.len()));
            let alone = Filling::new(&list, &source, &window).unwrap();
            let read = || -> Vec<Vec<u8>> {
                let part = |c: &Chunk| {
                    // SAFETY: nobody writes now.
                    unsafe { window.part(c.at, c.bytes) }.unwrap().to_vec()
                };
                list.chunks.iter().map(part).collect()
            };
            let together = read();
            while alone.step() {}
            assert!(together == read());
        }
    }

    #[test]
    fn who_is_stopped_takes_no_more() {
        let source = layers(Granularity::Row, &[8 << 20]);
        let (list, window) = (list_of(&source), window());
        let filling = Filling::new(&list, &source, &window).unwrap();
        assert!(filling.step());
        filling.stop();
        assert!(!filling.step());
        filling.help();
        assert_eq!(filling.watermark(), Some(1));
    }

    #[test]
    fn a_list_for_another_window_is_refused() {
        let source = layers(Granularity::Row, &[1 << 20, 1 << 20]);
        let window = window();
        let mut bytes = Vec::new();
        source.descriptor.encode(&mut bytes).unwrap();
        let list = ChunkList::new(&source.descriptor, bytes.len() as u64, 4 * MIN_WINDOW);
        assert!(Filling::new(&list, &source, &window).is_err());
    }

    #[test]
    fn what_a_panicking_source_left_out_is_never_announced() {
        struct Broken(Numbered);
        impl Source for Broken {
            fn descriptor(&self) -> &Descriptor {
                &self.0.descriptor
            }
            fn fill(&self, _: &Chunk, _: &mut [u8]) {
                panic!("the source is broken");
            }
        }
        let source = Broken(layers(Granularity::Row, &[1 << 20]));
        let (list, window) = (list_of(&source.0), window());
        let filling = Filling::new(&list, &source, &window).unwrap();
        std::thread::scope(|scope| {
            assert!(scope.spawn(|| filling.help()).join().is_err());
        });
        assert_eq!(filling.watermark(), None);
        assert!(!filling.step());
    }
}
