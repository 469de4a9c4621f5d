//! One `QUANTIZE`: descriptor, plan, admission, job, streaming, completion, lease.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use shmquant_protocol::chunks::MIN_RING;
use shmquant_protocol::descriptor::Descriptor;
use shmquant_protocol::failpoint::failpoint;
use shmquant_protocol::message::{ErrorCode, Message, Naming, Quantize};
use shmquant_protocol::segment::Kind;
use shmquant_protocol::socket::SocketError;

use crate::books::Granted;
use crate::catalog::{Fingerprint, Found, Origin};
use crate::ending;
use crate::engine::{Observer, Outcome, Run, Work};
use crate::error::Trouble;
use crate::growth::{Made, Wanted, obtain};
use crate::hub::Hub;
use crate::inputs::Pins;
use crate::job::Job;
use crate::lane::{Answered, Current, Lane, Window, deadline, stopping};
use crate::memory::{copy_in, copy_out, poison};
use crate::plan::{Plan, Plans, refuse};
use crate::pool::class_of;
use crate::requests::{Answer, name_exists};
use crate::session::Busy;
use crate::shared;

/// Requests of at most so many bytes run on the lane's own thread: waking a worker costs more.
const INLINE: u64 = 256 << 10;
/// What the rings of all requests that stream at once should take together: half of a common last-level cache. Where it is
/// more, what crosses goes to memory and back between being written and being read.
const RINGS: u64 = 16 << 20;
/// The largest ring beside others, who have something to do whenever this one waits. Who is alone does not, and uses the whole window.
const LARGEST_RING: u64 = 4 << 20;

/// What a lane keeps between its requests.
#[derive(Debug, Default)]
pub(crate) struct Kept {
    descriptor: Vec<u8>,
    plans: Plans,
}

impl Kept {
    /// One wide table must not keep its descriptor's memory for ever.
    pub(crate) fn shrink(&mut self) {
        if self.descriptor.capacity() > 1 << 20 {
            self.descriptor = Vec::new();
        }
    }
}

/// Works on one request to its answer.
pub(crate) fn quantize(
    current: &mut Current<'_, '_>,
    window: &Window,
    asked: Quantize,
    kept: &mut Kept,
) -> Answered {
    let hub = current.hub;
    let session = current.lane.session.clone();
    {
        let mut books = hub.books();
        books.counters.requests += 1;
        for release in &asked.releases {
            books.release(session.id, *release);
        }
    }
    if hub.is_stopping() {
        return Err(stopping());
    }
    let _busy = Busy::new(hub);
    let deadline = deadline(asked.timeout);
    let Kept { descriptor: scratch, plans } = kept;
    copy_descriptor(window, asked.descriptor, scratch)?;
    failpoint("daemon.descriptor_copied");
    let plan = match plans.get(scratch, asked.ring) {
        Some(plan) => plan,
        None => {
            let descriptor = Descriptor::decode(scratch)?;
            let most = hub.most_result();
            let made = Plan::new(descriptor, asked.descriptor, window.size, asked.ring, most)?;
            let plan = Arc::new(made);
            plans.put(scratch, asked.ring, &plan);
            plan
        }
    };
    failpoint("daemon.planned");
    let flow = Arc::new(Flow::new(current.lane.clone(), plan.clone(), current.request));
    current.flow = Some(flow.clone());
    current.wrote(asked.ready)?;

    let pins = Pins::new(hub, session.id, plan.descriptor())?;
    let flight = match &asked.named {
        None => None,
        Some(naming) => {
            let fingerprint = fingerprint(naming.digest, plan.descriptor(), scratch)?;
            match reserve_name(current, naming, fingerprint, deadline)? {
                Reserved::Existing(granted) => {
                    let message = Message::Done { lease: granted.lease, report: 0, ring: asked.ring };
                    return Ok(Answer::leased(message, granted));
                }
                Reserved::Mine(flight) => Some(flight),
            }
        }
    };

    let filling = allocate(current, plan.result_bytes(), flight.is_some(), deadline)?;
    let (input, output) = (window.memory.clone(), filling.taken.memory.clone());
    let job = Arc::new(Job::new(plan.clone(), input, &pins.sources, output, filling.taken.offset)?);
    run(current, &flow, &job)?;
    // No chunk runs any more: what the client has given back meanwhile is free.
    drop(pins);
    failpoint("daemon.completing");
    let complete = job.complete()?;
    failpoint("daemon.file_written");
    let report = complete.report.len() as u64;
    if !copy_in(&*window.memory, &complete.report) || complete.length > plan.result_bytes() {
        tracing::error!(report, complete.length, "a job's report or file is longer than was planned");
        return Err(Trouble::new(ErrorCode::Internal, "the result is longer than was planned", ""));
    }
    // Only what has its segment to itself can be published, and so be mapped by a path.
    let whole = !is_small(plan.result_bytes(), flight.is_some());
    let length =
        if whole { ending::repeat(&*filling.taken.memory, complete.length) } else { Some(complete.length) };
    let Some(length) = length else {
        tracing::error!(complete.length, "a job's file does not end with a footer");
        return Err(Trouble::new(ErrorCode::Internal, "the result has no end", ""));
    };
    let granted = finish(current, &plan, filling, length, flight, asked.named)?;
    failpoint("daemon.leased");
    let ring = advised_ring(hub, &plan);
    Ok(Answer::leased(Message::Done { lease: granted.lease, report, ring }, granted))
}

fn copy_descriptor(window: &Window, bytes: u64, scratch: &mut Vec<u8>) -> Result<(), Trouble> {
    let most = window.size / 4;
    if bytes > most {
        return Err(Trouble::new(
            ErrorCode::Limit,
            format!("the table's description takes {bytes} bytes, a window of this size has room for {most}"),
            "ask for a larger window, or quantize fewer layers or columns at once",
        ));
    }
    // From here on only the private copy is looked at.
    if !copy_out(&*window.memory, 0, bytes as usize, scratch) {
        return Err(Trouble::new(
            ErrorCode::NoRoom,
            format!("no memory for {bytes} bytes of description"),
            "",
        ));
    }
    Ok(())
}

// Names.

/// What a named request asks for, wherever its values lie.
fn fingerprint(digest: [u8; 16], descriptor: &Descriptor, bytes: &[u8]) -> Result<Fingerprint, Trouble> {
    if descriptor.is_streamed() {
        return Ok(Fingerprint::new(digest, bytes));
    }
    let mut streamed = Vec::with_capacity(bytes.len());
    let encoded = descriptor.streamed().encode(&mut streamed);
    encoded.map_err(|(name, _)| refuse(ErrorCode::Unsupported, &name, "cannot be published"))?;
    Ok(Fingerprint::new(digest, &streamed))
}

enum Reserved<'a> {
    Existing(Granted),
    Mine(Flight<'a>),
}

/// A name that this request is making; let go of, with or without a dataset, when dropped.
struct Flight<'a> {
    hub: &'a Hub,
    name: String,
    fingerprint: Fingerprint,
}

impl Drop for Flight<'_> {
    fn drop(&mut self) {
        let mut books = self.hub.books();
        books.catalog.land(&self.name);
        books.wake_waiting();
    }
}

fn reserve_name<'a>(
    current: &mut Current<'a, '_>,
    naming: &Naming,
    fingerprint: Fingerprint,
    deadline: Option<Instant>,
) -> Result<Reserved<'a>, Trouble> {
    let hub = current.hub;
    let _waiting = Waiting { hub, lane: current.lane };
    loop {
        current.go_on()?;
        {
            let mut books = hub.books();
            match books.catalog.reserve(&naming.name, fingerprint, naming.replace) {
                Found::Mine => {
                    failpoint("daemon.name_reserved");
                    return Ok(Reserved::Mine(Flight { hub, name: naming.name.clone(), fingerprint }));
                }
                Found::Taken => return Err(name_exists(&naming.name)),
                Found::Existing(extent) => {
                    return Ok(Reserved::Existing(books.lease(current.lane.session.id, extent)?));
                }
                Found::InFlight => books.add_waiting(current.lane),
            }
        }
        if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
            return Err(Trouble::new(
                ErrorCode::Deadline,
                format!("dataset {:?} is still being made by another request", naming.name),
                "allow more time",
            ));
        }
        current.wait(deadline)?;
    }
}

/// A lane among those that are woken when something comes free.
struct Waiting<'a> {
    hub: &'a Hub,
    lane: &'a Arc<Lane>,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.hub.books().remove_waiting(self.lane);
    }
}

// Memory.

/// Segments are whole pages.
const PAGE: u64 = 4096;

fn allocate<'a>(
    current: &mut Current<'a, '_>,
    bytes: u64,
    named: bool,
    deadline: Option<Instant>,
) -> Result<Made<'a>, Trouble> {
    let hub = current.hub;
    let session = current.lane.session.id;
    let small = is_small(bytes, named);
    // A dataset stays and is never recycled: it gets memory of its own size, not a class's, nor a larger free segment.
    let size = match (small, named) {
        (true, _) => Some(shared::SEGMENT),
        (_, true) => Some(bytes.next_multiple_of(PAGE)),
        _ => class_of(bytes),
    };
    let Some(size) = size else {
        return Err(Trouble::new(ErrorCode::NoRoom, format!("a result of {bytes} bytes cannot exist"), ""));
    };
    let behind = if small { hub.books().take_part(session, bytes)? } else { None };
    let filling = match behind {
        Some(taken) => Made::new(hub, taken),
        None => obtain(current, Wanted { kind: Kind::Result, size, pooled: !named }, deadline)?,
    };
    if small && filling.taken.offset == 0 {
        hub.books().share(session, &filling.taken, bytes);
    }
    if filling.taken.recycled {
        poison(&*filling.taken.memory);
    }
    failpoint("daemon.filling");
    Ok(filling)
}

/// Whether a result shares its segment.
fn is_small(bytes: u64, named: bool) -> bool {
    bytes <= shared::MOST && !named
}

// Work.

fn run(current: &mut Current<'_, '_>, flow: &Arc<Flow>, job: &Arc<Job>) -> Result<(), Trouble> {
    let hub = current.hub;
    let list = flow.plan.chunks();
    let total = flow.plan.streamed_bytes().saturating_add(flow.plan.shared_bytes());
    // Few bytes in very many chunks may still take more room than the window has: then somebody has to consume.
    let small = list.resident && (list.chunks.len() <= 1 || total <= INLINE);
    while small && current.ready < list.chunks.len() {
        current.wait(None)?;
        current.go_on()?;
    }
    if small {
        let inline = || (0..job.len()).take_while(|_| !job.stop_early()).for_each(|chunk| job.run(chunk));
        return match catch_unwind(AssertUnwindSafe(inline)) {
            Ok(()) => Ok(()),
            Err(_) => Err(broken()),
        };
    }
    let run = hub.engine.submit(current.lane.session.id, job.clone(), current.ready, flow.clone());
    let watched = Watched { current, run, flow: flow.clone() };
    watched.follow()
}

fn broken() -> Trouble {
    tracing::error!("a chunk panicked");
    Trouble::new(ErrorCode::Internal, "a chunk of the request failed in the daemon", "see the daemon's log")
}

/// A run that does not outlive its request: window and result are given back after its last chunk.
struct Watched<'c, 'a, 'p> {
    current: &'c mut Current<'a, 'p>,
    run: Arc<Run>,
    flow: Arc<Flow>,
}

impl Watched<'_, '_, '_> {
    fn follow(self) -> Result<(), Trouble> {
        let engine = &self.current.hub.engine;
        let mut ready = self.current.ready;
        loop {
            match self.run.outcome() {
                Outcome::Running => {}
                Outcome::Complete => return Ok(()),
                Outcome::Cancelled => return self.current.go_on(),
                Outcome::Broken => return Err(broken()),
            }
            self.current.wait(None)?;
            if self.current.cancelled {
                engine.cancel(&self.run);
            }
            if self.current.ready > ready {
                ready = self.current.ready;
                engine.ready(&self.run, ready);
            }
        }
    }
}

impl Drop for Watched<'_, '_, '_> {
    fn drop(&mut self) {
        if self.run.outcome() == Outcome::Running {
            self.current.hub.engine.cancel(&self.run);
            while self.run.outcome() == Outcome::Running {
                self.current.wait_deaf();
            }
        }
        self.flow.close();
    }
}

/// The ring that a request which streams had better use next time: windows that are filled and read at once share the cache.
fn advised_ring(hub: &Hub, plan: &Plan) -> u64 {
    if plan.chunks().resident {
        return 0;
    }
    match hub.engine.runs() as u64 {
        0 => 0,
        others => (RINGS / (others + 1)).clamp(MIN_RING, LARGEST_RING),
    }
}

/// A request's way through the window: what the client may write, and how far it has been told that all is read.
pub(crate) struct Flow {
    lane: Arc<Lane>,
    plan: Arc<Plan>,
    request: u32,
    told: Mutex<usize>,
}

impl Flow {
    fn new(lane: Arc<Lane>, plan: Arc<Plan>, request: u32) -> Self {
        Self { lane, plan, request, told: Mutex::new(0) }
    }

    /// Chunks that the client may have written by what it was told last.
    pub(crate) fn writable(&self) -> usize {
        let told = *self.told.lock().unwrap_or_else(PoisonError::into_inner);
        self.plan.chunks().writable(told)
    }

    /// Nothing is sent from here on: a worker may be late, and the request is about to be answered.
    fn close(&self) {
        *self.told.lock().unwrap_or_else(PoisonError::into_inner) = usize::MAX;
    }
}

impl Observer for Flow {
    fn progress(&self, watermark: usize) {
        let list = self.plan.chunks();
        if list.resident {
            return;
        }
        // Under its lock, so that watermarks go out in order whichever worker is faster.
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        if watermark <= *told || list.freed(*told, watermark) < list.notice {
            return;
        }
        *told = watermark;
        let mut frame = Vec::with_capacity(32);
        Message::Consumed { chunks: watermark as u32 }.encode(self.request, &mut frame);
        match self.lane.connection.send(&frame, &[]) {
            Ok(()) | Err(SocketError::Closed) => failpoint("daemon.consumed_sent"),
            Err(error) => {
                tracing::warn!(session = self.lane.session.id, "a lane is disconnected: {error}");
                self.lane.connection.shutdown();
            }
        }
    }

    fn ended(&self) {
        self.lane.wake.signal();
    }
}

// The end.

/// Completes the extent, gives the lease and, if it has a name, publishes: one step for everybody else.
fn finish(
    current: &Current<'_, '_>,
    plan: &Plan,
    filling: Made<'_>,
    length: u64,
    flight: Option<Flight<'_>>,
    named: Option<Naming>,
) -> Result<Granted, Trouble> {
    let hub = current.hub;
    let session = &current.lane.session;
    let mut books = hub.books();
    books.counters.bytes_copied += plan.streamed_bytes();
    books.counters.bytes_shared += plan.shared_bytes();
    let extent = books.complete(&filling.taken, length)?;
    let id = filling.keep();
    failpoint("daemon.completed");
    let granted = books.lease(session.id, extent);
    let mut granted = match granted {
        Ok(granted) => granted,
        Err(trouble) => {
            books.settle(id);
            return Err(trouble);
        }
    };
    if let (Some(flight), Some(naming)) = (&flight, named) {
        let most = hub.config.max_datasets;
        let origin = Origin { extent, fingerprint: Some(flight.fingerprint) };
        match books.publish(session, extent, origin, naming.name, naming.replace, most) {
            Ok(()) => granted.lease.dataset = true,
            Err(trouble) => {
                books.unlease(session.id, &granted.lease);
                return Err(trouble);
            }
        }
    }
    // Before the flight lands: it takes the lock, too.
    drop(books);
    drop(flight);
    Ok(granted)
}
