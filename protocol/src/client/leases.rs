//! What a session holds: mappings by segment, holds on extents, and their way back.

use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use nix::sys::eventfd::{EfdFlags, EventFd};

use super::error::ClientError;
use super::fork::{Mark, Process};
use super::held::Held;
use super::ranges::Ranges;
use super::returns::{Return, ReturnQueue};
use crate::descriptor::{Body, Descriptor, Item, Place, Way};
use crate::failpoint::failpoint;
use crate::message::{Extent, Lease, Message, Release};
use crate::segment::{Backing, Kind, Mapping, fd_refused};

/// The leases of one session.
#[derive(Debug)]
pub(super) struct Leases {
    process: Process,
    backing: Backing,
    instance: u64,
    cache: Mutex<Cache>,
    queue: ReturnQueue,
    /// Taken from the queue, but too many for one frame.
    backlog: Mutex<Vec<Release>>,
    /// Holds that were taken and whose return has not been taken from the queue.
    live: AtomicU64,
    /// The housekeeping thread sleeps without a timeout and wants to be woken.
    asleep: AtomicBool,
    /// Nobody takes from the queue any more.
    ended: AtomicBool,
    wake: EventFd,
}

#[derive(Debug, Default)]
struct Cache {
    segments: HashMap<u64, Known>,
    /// Segments that the daemon wants unmapped and that still have views.
    leaving: Vec<(u64, Weak<Mapping>)>,
    /// Where values may lie without being copied.
    ranges: Ranges,
}

#[derive(Debug)]
struct Known {
    mapping: Arc<Mapping>,
    /// The newest generation that was leased.
    generation: u64,
}

/// Address and bytes of an item's values, see [`Source::lies_at`](super::Source::lies_at).
pub(super) type Lies<'a> = &'a dyn Fn(usize) -> Option<(usize, usize)>;

/// How this session came by a lease.
#[derive(Debug, Clone, Copy)]
pub(super) struct Origin<'a> {
    /// The name under which it was made or opened; empty if there is none.
    pub(super) name: &'a str,
    /// This very call had it computed.
    pub(super) created: bool,
    /// Result or input, which decides how it is mapped.
    pub(super) kind: Kind,
}

/// A lease that was checked and has its memory, or one whose descriptor was lost on the way.
pub(super) enum Attached {
    Held(Held),
    /// The descriptor has to be sent again (`OPEN` kind 2).
    NoDescriptor,
}

impl Leases {
    pub(super) fn new(backing: Backing, instance: u64) -> Result<Self, ClientError> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let wake =
            EventFd::from_flags(flags).map_err(|errno| fd_refused("making an eventfd".to_owned(), errno))?;
        Ok(Self {
            process: Process::current(),
            backing,
            instance,
            cache: Mutex::default(),
            queue: ReturnQueue::default(),
            backlog: Mutex::default(),
            live: AtomicU64::new(0),
            asleep: AtomicBool::new(false),
            ended: AtomicBool::new(false),
            wake,
        })
    }

    pub(super) fn backing(&self) -> Backing {
        self.backing
    }

    pub(super) fn instance(&self) -> u64 {
        self.instance
    }

    /// The eventfd that wakes the housekeeping thread.
    pub(super) fn wake_fd(&self) -> &EventFd {
        &self.wake
    }

    /// Turns a reply's lease into a hold on mapped memory. Every number in it is compared before it is used.
    pub(super) fn attach(
        self: &Arc<Self>,
        lease: &Lease,
        fds: &mut Vec<OwnedFd>,
        origin: &Origin<'_>,
    ) -> Result<Attached, ClientError> {
        let extent = lease.extent;
        let end = extent.offset.checked_add(extent.length);
        if end.is_none_or(|end| end > lease.segment_size) {
            return Err(ClientError::protocol(format!(
                "bytes {} + {} of segment {} were leased, which has {}",
                extent.offset, extent.length, extent.segment, lease.segment_size
            )));
        }
        let fresh = match fds.pop() {
            Some(fd) => {
                let (fd, size) = (fd.as_fd(), lease.segment_size);
                Some(Arc::new(match origin.kind {
                    Kind::Input => Mapping::inherited(fd, size, self.backing)?,
                    _ => Mapping::read_only(fd, size, self.backing)?,
                }))
            }
            None => None,
        };
        failpoint("client.mapped");
        fds.clear();
        // What is replaced is unmapped after the lock, which other threads want.
        let mut replaced = None;
        let mapping = {
            let mut guard = self.cache();
            let cache = &mut *guard;
            let mapping = match (cache.segments.get_mut(&extent.segment), fresh) {
                (Some(known), fresh) => {
                    if extent.generation < known.generation
                        || known.mapping.len() as u64 != lease.segment_size
                    {
                        return Err(ClientError::protocol(format!(
                            "segment {} of {} bytes, generation {}, came back as {} bytes, generation {}",
                            extent.segment,
                            known.mapping.len(),
                            known.generation,
                            lease.segment_size,
                            extent.generation
                        )));
                    }
                    known.generation = extent.generation;
                    if let Some(fresh) = fresh {
                        replaced = Some(std::mem::replace(&mut known.mapping, fresh));
                    }
                    Arc::clone(&known.mapping)
                }
                (None, Some(mapping)) => {
                    let known = Known { mapping: Arc::clone(&mapping), generation: extent.generation };
                    cache.segments.insert(extent.segment, known);
                    mapping
                }
                (None, None) => return Ok(Attached::NoDescriptor),
            };
            cache.ranges.add(address_of(&mapping, extent), extent);
            mapping
        };
        drop(replaced);
        self.live.fetch_add(1, Ordering::SeqCst);
        failpoint("client.leased");
        let release = Release { segment: extent.segment, generation: extent.generation, tainted: false };
        let address = address_of(&mapping, extent);
        let back = Return::new(release, mapping, address);
        Ok(Attached::Held(Held::new(Arc::clone(self), back, lease, origin, Mark::now())))
    }

    /// Takes a hold back. Called from [`Held`]'s drop, on any thread: never blocks, and sends nothing but a wake-up to a sleeper.
    pub(super) fn give_back(&self, back: Box<Return>) {
        if !self.process.is_current() {
            // The hold is the parent's, which gives it back itself. Here only the memory goes.
            return;
        }
        self.queue.push(back);
        if self.ended.load(Ordering::SeqCst) {
            drop(self.queue.take());
        } else if self.asleep.load(Ordering::SeqCst) && self.asleep.swap(false, Ordering::SeqCst) {
            self.wake();
        }
    }

    /// Gives back a hold that never became a [`Held`].
    pub(super) fn refuse(&self, lease: &Lease) {
        let release =
            Release { segment: lease.extent.segment, generation: lease.extent.generation, tainted: false };
        lock(&self.backlog).push(release);
        self.wake();
    }

    /// Moves up to `most` returned holds into `out`.
    pub(super) fn take(&self, out: &mut Vec<Release>, most: usize) {
        let mut backlog = lock(&self.backlog);
        let mut mappings = Vec::new();
        let mut cache = None;
        for back in self.queue.take() {
            self.live.fetch_sub(1, Ordering::SeqCst);
            let ranges = &mut cache.get_or_insert_with(|| self.cache()).ranges;
            ranges.remove(back.address, &back.release);
            backlog.push(back.release);
            // Nearly always the cache has it, too, and this is a decrement.
            if Arc::strong_count(&back.mapping) == 1 {
                mappings.push(back.mapping);
            }
        }
        drop(cache);
        let n = backlog.len().min(most);
        out.extend(backlog.drain(..n));
        drop(backlog);
        drop(mappings);
    }

    /// The request with the places of those values that lie in extents of this session; `None` if there are none.
    pub(super) fn placed(&self, descriptor: &Descriptor, at: Lies<'_>) -> Option<Descriptor> {
        let places = self.places(descriptor, at);
        if places.is_empty() {
            return None;
        }
        let mut placed = descriptor.clone();
        for (item, place) in places {
            if let Some(Body::Values(values)) = placed.items.get_mut(item).map(|item| &mut item.body) {
                values.way = Way::Placed(place);
            }
        }
        Some(placed)
    }

    fn places(&self, descriptor: &Descriptor, at: Lies<'_>) -> Vec<(usize, Place)> {
        let cache = self.cache();
        if cache.ranges.is_empty() {
            return Vec::new();
        }
        let place = |(i, item): (usize, &Item)| {
            let Body::Values(values) = &item.body else { return None };
            if values.null_count > 0 || values.elements() == 0 {
                return None;
            }
            let (address, bytes) = at(i).filter(|(_, bytes)| *bytes as u64 == values.bytes())?;
            let place = cache.ranges.find(address, bytes)?;
            // Values that are not aligned cross as all others do.
            let from = place.extent.offset + place.offset;
            from.is_multiple_of(values.dtype.size() as u64).then_some((i, place))
        };
        descriptor.items.iter().enumerate().filter_map(place).collect()
    }

    /// Puts back what could not be sent, for the housekeeping thread's next tick.
    pub(super) fn untake(&self, list: Vec<Release>) {
        lock(&self.backlog).extend(list);
        self.wake();
    }

    /// Holds that live, the returned but not yet taken ones included.
    pub(super) fn live(&self) -> u64 {
        self.live.load(Ordering::SeqCst)
    }

    /// Wakes the housekeeping thread.
    pub(super) fn wake(&self) {
        // The only refusal is a counter at its limit, which wakes as well.
        let _ = self.wake.write(1);
    }

    /// Announces sleep without end, unless there is something to do.
    pub(super) fn may_sleep(&self) -> bool {
        self.asleep.store(true, Ordering::SeqCst);
        let nothing =
            self.queue.is_empty() && lock(&self.backlog).is_empty() && self.cache().leaving.is_empty();
        if !nothing {
            self.asleep.store(false, Ordering::SeqCst);
        }
        nothing
    }

    /// The daemon wants a segment unmapped. True if that is done; else it is once the last view has gone, see [`left`](Self::left).
    pub(super) fn unmap(&self, segment: u64) -> bool {
        let known = self.cache().segments.remove(&segment);
        let Some(Known { mapping, .. }) = known else { return true };
        match Arc::try_unwrap(mapping) {
            Ok(mapping) => {
                drop(mapping);
                true
            }
            Err(mapping) => {
                let weak = Arc::downgrade(&mapping);
                drop(mapping);
                self.cache().leaving.push((segment, weak));
                false
            }
        }
    }

    /// Segments that were to be unmapped and now are.
    pub(super) fn left(&self) -> Vec<u64> {
        let mut cache = self.cache();
        let (gone, stay) =
            std::mem::take(&mut cache.leaving).into_iter().partition(|(_, m)| m.strong_count() == 0);
        cache.leaving = stay;
        let gone: Vec<(u64, Weak<Mapping>)> = gone;
        gone.into_iter().map(|(segment, _)| segment).collect()
    }

    /// The session is over: idle mappings go, those with views stay as long as these.
    pub(super) fn end(&self) {
        self.ended.store(true, Ordering::SeqCst);
        drop(self.queue.take());
        let mut cache = self.cache();
        cache.ranges.clear();
        let segments = std::mem::take(&mut cache.segments);
        drop(cache);
        drop(segments);
    }

    /// In a forked child: drops the mappings that no inherited view needs, if no thread of the parent was at them.
    pub(super) fn abandon(&self) {
        let segments = self.cache.try_lock().map(|mut cache| std::mem::take(&mut cache.segments));
        drop(segments);
    }

    fn cache(&self) -> MutexGuard<'_, Cache> {
        lock(&self.cache)
    }
}

/// Returned holds that a request takes along. Whatever becomes of it before it is sent, a panic of its source included, those
/// that are still here go back.
pub(super) struct Along<'a> {
    leases: &'a Leases,
    list: Vec<Release>,
}

impl<'a> Along<'a> {
    /// Whether there are none.
    pub(super) fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    /// Takes up to `most`.
    pub(super) fn take(leases: &'a Leases, most: usize) -> Self {
        let mut list = Vec::new();
        leases.take(&mut list, most);
        Self { leases, list }
    }

    /// Sends a message with them in it; those of one that could not be sent go back.
    pub(super) fn send(
        mut self,
        message: impl FnOnce(Vec<Release>) -> Message,
        send: impl FnOnce(&Message) -> Result<(), ClientError>,
    ) -> Result<(), ClientError> {
        let message = message(std::mem::take(&mut self.list));
        let sent = send(&message);
        if sent.is_err() {
            self.list = match message {
                Message::Quantize(quantize) => quantize.releases,
                Message::Release(list) => list,
                _ => Vec::new(),
            };
        }
        sent
    }
}

impl Drop for Along<'_> {
    fn drop(&mut self) {
        if !self.list.is_empty() {
            self.leases.untake(std::mem::take(&mut self.list));
        }
    }
}

/// Where an extent that was compared with its mapping begins.
fn address_of(mapping: &Mapping, extent: Extent) -> usize {
    mapping.as_ptr() as usize + extent.offset as usize
}

/// A lock whose holders never leave it half-changed.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_sleeps_over_what_is_still_to_be_sent() {
        let leases = Leases::new(Backing::Memfd, 1).unwrap();
        assert!(leases.may_sleep());
        leases.asleep.store(false, Ordering::SeqCst);
        let list: Vec<_> = (0..3).map(|segment| Release { segment, generation: 1, tainted: false }).collect();
        leases.untake(list.clone());
        assert!(!leases.may_sleep() && !leases.asleep.load(Ordering::SeqCst));
        // Who sleeps already is woken.
        assert_eq!(leases.wake_fd().read(), Ok(1));
        // A request takes some along; the rest still keeps it awake, and so do these when it is not sent.
        let along = Along::take(&leases, 2);
        assert_eq!(along.list, list[..2]);
        assert!(!leases.may_sleep());
        drop(along);
        assert_eq!(leases.wake_fd().read(), Ok(1));
        let refused = Along::take(&leases, 3).send(Message::Release, |_| Err(ClientError::Closed));
        assert!(refused.is_err() && !leases.may_sleep());
        let mut sent = None;
        let told = Along::take(&leases, 3).send(Message::Release, |message| {
            sent = Some(message.clone());
            Ok(())
        });
        assert!(told.is_ok() && leases.may_sleep());
        assert!(matches!(sent, Some(Message::Release(list)) if list.len() == 3));
    }
}
