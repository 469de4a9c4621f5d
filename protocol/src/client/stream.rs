//! The way of the values: descriptor and chunks into the window, `QUANTIZE` and `WROTE` to the daemon, and its answer back.

use std::time::{Duration, Instant};

use super::clock::{Clock, Stop};
use super::copying::Helpers;
use super::error::ClientError;
use super::filling::Filling;
use super::lane::{Event, Lane, Wire};
use super::leases::Along;
use super::polling::{Polling, Turn};
use super::primary::Primary;
use super::report::{ITEM_BYTES, ItemReport};
use super::session::Progress;
use super::source::Source;
use super::window::Window;
use crate::chunks::{ChunkList, MIN_RING};
use crate::descriptor::Descriptor;
use crate::failpoint::failpoint;
use crate::message::{ErrorCode, Failure, Lease, Message, Naming, Quantize};

/// Bytes of values up to which all is written before the request is sent, which makes it one round trip.
const SMALL: u64 = 1 << 20;
/// Bytes of values from which on other threads help.
const LARGE: u64 = 4 << 20;
/// Most bytes between two `WROTE`.
const ANNOUNCE: u64 = 2 << 20;
/// How long a cancelled request may take to be answered.
const AFTERMATH: Duration = Duration::from_secs(10);
/// How long a call waits for its own threads before it looks at the connection again.
const GLANCE: Duration = Duration::from_millis(2);

/// What a request needs besides its lane.
pub(super) struct Request<'a> {
    pub(super) source: &'a dyn Source,
    /// The source's, with the places of values that do not cross.
    pub(super) descriptor: &'a Descriptor,
    pub(super) naming: Option<Naming>,
    pub(super) releases: Along<'a>,
    pub(super) progress: Option<&'a Progress<'a>>,
    pub(super) helpers: &'a Helpers,
    /// For `CANCEL` when all is written.
    pub(super) primary: &'a Primary,
    /// For the reply of a small request.
    pub(super) polling: &'a Polling,
}

/// A request's result; its descriptor, if one came, is in the lane.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) lease: Lease,
    pub(super) report: Vec<ItemReport>,
    /// False if a dataset of that name existed already.
    pub(super) computed: bool,
    /// The caller does not want it any more.
    pub(super) interrupted: bool,
    /// Bytes that were written to the window for it.
    pub(super) bytes_copied: u64,
    /// Bytes that the daemon read elsewhere.
    pub(super) bytes_shared: u64,
}

/// How a request went that came to an end.
pub(super) type Outcome = Result<Answer, ClientError>;

/// Runs one request, whose descriptor is in [`Lane::scratch`]. If this fails itself, the lane cannot be used again.
pub(super) fn run(
    lane: &mut Lane,
    request: Request<'_>,
    clock: &mut Clock<'_>,
) -> Result<Outcome, ClientError> {
    let bytes = lane.scratch.len() as u64;
    let most = lane.window.len() / 4;
    if bytes > most || !lane.write_descriptor() {
        return Ok(Err(ClientError::TooLarge { bytes, most }));
    }
    let list = ChunkList::with_ring(request.descriptor, bytes, lane.window.len(), lane.ring);
    let Ok(chunks) = u32::try_from(list.chunks.len()) else {
        return Ok(Err(ClientError::TooLarge { bytes: u64::MAX, most }));
    };
    let shared = request.descriptor.places().map(|(_, values, _)| values.bytes()).sum();
    let Request { source, descriptor, naming, releases, progress, helpers, primary, polling } = request;
    let timeout = clock.milliseconds();
    let Lane { wire, window, ring: advised, .. } = lane;
    let ring = *advised;
    let ask = move |wire: &mut Wire, ready, clock: &mut Clock<'_>| -> Result<(), ClientError> {
        let message = |releases| {
            Message::Quantize(Quantize { descriptor: bytes, ready, timeout, named: naming, releases, ring })
        };
        releases.send(message, |message| wire.send(message, clock))?;
        failpoint("client.quantize_sent");
        Ok(())
    };
    let total = Amount::of(&list, 0, list.chunks.len());
    let mut stream = Stream {
        list: &list,
        descriptor,
        total,
        shared,
        done: Amount::default(),
        progress,
        primary,
        cancelled: None,
    };
    wire.begin();

    let message = if list.resident && total.work <= SMALL {
        let filling = Filling::new(&list, source, window)?;
        while filling.step() {}
        ask(wire, chunks, clock)?;
        stream.wrote(total);
        let turn = polling.take();
        stream.answer(wire, turn.as_ref().map_or(Duration::ZERO, Turn::length), clock)?
    } else {
        // Before any value is copied: the daemon plans and makes room meanwhile.
        ask(wire, 0, clock)?;
        let filling = Filling::new(&list, source, window)?;
        let mut main = || {
            // On every way out, a panic included: helpers must not wait for ever.
            let _stop = StopOnDrop(&filling);
            stream.pump(wire, &filling, clock)
        };
        // Where others stream, too, they keep the cores busy: this thread is enough, and fewer take turns.
        let alone = ring == 0 || list.resident;
        let streamed =
            if total.work >= LARGE && alone { helpers.with(&|| filling.help(), main) } else { main() };
        match streamed? {
            Some(message) => message,
            None => stream.answer(wire, Duration::ZERO, clock)?,
        }
    };
    failpoint("client.reply_received");
    stream.outcome(window, advised, message, clock)
}

struct StopOnDrop<'a, 'b>(&'a Filling<'b>);

impl Drop for StopOnDrop<'_, '_> {
    fn drop(&mut self) {
        self.0.stop();
    }
}

struct Stream<'a> {
    list: &'a ChunkList,
    descriptor: &'a Descriptor,
    /// All that is to be written.
    total: Amount,
    /// Bytes of values that lie in extents.
    shared: u64,
    /// What was written and announced.
    done: Amount,
    progress: Option<&'a Progress<'a>>,
    primary: &'a Primary,
    cancelled: Option<Stop>,
}

impl Stream<'_> {
    /// Writes and announces until all is written, the call has to stop, or the answer is there (which is then given).
    fn pump(
        &mut self,
        wire: &mut Wire,
        filling: &Filling<'_>,
        clock: &mut Clock<'_>,
    ) -> Result<Option<Message>, ClientError> {
        let all = self.list.chunks.len();
        let (mut announced, mut consumed) = (0, 0);
        // It is this call's own work that takes the time.
        let mut working = false;
        let announce = ANNOUNCE.min(self.list.capacity / 2);
        loop {
            while let Some(event) = wire.look()? {
                if let Some(message) = self.event(event, announced, &mut consumed, filling)? {
                    return Ok(Some(message));
                }
            }
            let late = working && announced < all && clock.is_over();
            if let Some(stop) = clock.check().or(late.then_some(Stop::Deadline)) {
                self.cancelled = Some(stop);
                filling.stop();
                let (lane, request) = (wire.lane, wire.request);
                // The caller's time is over; telling the daemon takes time of its own.
                wire.send(&Message::Cancel { lane, request }, &mut Clock::new(Some(AFTERMATH), None))?;
                failpoint("client.cancel_sent");
                return Ok(None);
            }
            let wrote = filling.step();
            working = wrote;
            // None: a helping thread panicked, and so does this one when all have left.
            let Some(mark) = filling.watermark() else { return Err(ClientError::Cancelled) };
            let fresh = Amount::of(self.list, announced, mark);
            // A daemon that has nothing to do is told at once.
            if mark > announced && (mark == all || !wrote || fresh.bytes >= announce || announced == 0) {
                wire.send(&Message::Wrote { chunks: mark as u32 }, clock)?;
                failpoint("client.wrote");
                announced = mark;
                self.wrote(fresh);
            }
            if announced == all {
                failpoint("client.streamed");
                return Ok(None);
            }
            if wrote || filling.moves_beyond(announced, GLANCE) {
                continue;
            }
            // The window is full: the daemon has the word.
            if let Some(event) = wire.wait(Duration::ZERO, clock.wait_until())?
                && let Some(message) = self.event(event, announced, &mut consumed, filling)?
            {
                return Ok(Some(message));
            }
        }
    }

    fn event(
        &self,
        event: Event,
        announced: usize,
        consumed: &mut usize,
        filling: &Filling<'_>,
    ) -> Result<Option<Message>, ClientError> {
        match event {
            Event::Reply(message) => {
                filling.stop();
                Ok(Some(message))
            }
            Event::Consumed(chunks) => {
                let chunks = chunks as usize;
                if chunks < *consumed || chunks > announced {
                    let text = format!("CONSUMED {chunks} after {consumed}, with {announced} chunks written");
                    return Err(ClientError::protocol(text));
                }
                *consumed = chunks;
                filling.consumed(chunks);
                Ok(None)
            }
        }
    }

    /// Waits for the answer after everything was sent.
    fn answer(
        &mut self,
        wire: &mut Wire,
        spin: Duration,
        clock: &mut Clock<'_>,
    ) -> Result<Message, ClientError> {
        answer(wire, self.primary, &mut self.cancelled, spin, clock)
    }

    fn outcome(
        &self,
        window: &mut Window,
        advised: &mut u64,
        message: Message,
        clock: &Clock<'_>,
    ) -> Result<Outcome, ClientError> {
        match message {
            Message::Done { lease, report, ring } => {
                // What took no round in the window says nothing of a ring.
                if !self.list.resident {
                    if ring > 0 && ring < MIN_RING {
                        return Err(ClientError::protocol(format!("a ring of {ring} bytes was advised")));
                    }
                    *advised = ring;
                }
                let bytes = if report % ITEM_BYTES == 0 { window.read(report) } else { None };
                let Some(bytes) = bytes else {
                    return Err(ClientError::protocol(format!("a report of {report} bytes")));
                };
                let computed = report > 0;
                let bytes_shared = if computed { self.shared } else { 0 };
                // All of it has been read, whether or not it had to be written for that.
                self.report(self.total.work + self.shared);
                let mut report = ItemReport::read_all(&bytes);
                ItemReport::tell_ways(&mut report, self.descriptor, self.list);
                Ok(Ok(Answer {
                    lease,
                    report,
                    computed,
                    bytes_copied: self.done.bytes,
                    bytes_shared,
                    interrupted: self.cancelled == Some(Stop::Interrupted),
                }))
            }
            Message::Error(failure) => Ok(Err(refused(failure, self.cancelled, clock))),
            other => Err(ClientError::protocol(format!("QUANTIZE was answered by {other:?}"))),
        }
    }

    fn wrote(&mut self, fresh: Amount) {
        self.done.bytes += fresh.bytes;
        self.done.work += fresh.work;
        self.report(self.done.work);
    }

    fn report(&self, done: u64) {
        if let Some(progress) = self.progress {
            progress(done, self.total.work + self.shared);
        }
    }
}

/// Gives releases back and asks for something that is no table, on a lane. If this fails itself, the lane cannot be used again.
pub(super) fn ask(
    wire: &mut Wire,
    primary: &Primary,
    releases: Along<'_>,
    message: &Message,
    clock: &mut Clock<'_>,
) -> Result<Result<Message, ClientError>, ClientError> {
    if !releases.is_empty() {
        releases.send(Message::Release, |message| wire.tell(message, clock))?;
    }
    wire.begin();
    wire.send(message, clock)?;
    failpoint("client.asked_on_lane");
    let mut cancelled = None;
    let reply = answer(wire, primary, &mut cancelled, Duration::ZERO, clock)?;
    Ok(match reply {
        Message::Error(failure) => Err(refused(failure, cancelled, clock)),
        reply => Ok(reply),
    })
}

/// Waits for the answer to a request; has it cancelled when the call has to stop.
fn answer(
    wire: &mut Wire,
    primary: &Primary,
    cancelled: &mut Option<Stop>,
    mut spin: Duration,
    clock: &mut Clock<'_>,
) -> Result<Message, ClientError> {
    let mut last = cancelled.map(|stop| (stop, Instant::now() + AFTERMATH));
    loop {
        let until = last.map(|(_, at)| at).or_else(|| clock.wait_until());
        if let Some(Event::Reply(message)) = wire.wait(spin, until)? {
            return Ok(message);
        }
        spin = Duration::ZERO;
        if let Some((stop, at)) = last {
            if Instant::now() >= at {
                return Err(clock.error(stop));
            }
        } else if let Some(stop) = clock.check() {
            *cancelled = Some(stop);
            last = Some((stop, Instant::now() + AFTERMATH));
            let (lane, request) = (wire.lane, wire.request);
            primary.tell(&Message::Cancel { lane, request }, "cancelling a request")?;
            failpoint("client.cancel_sent");
        }
    }
}

fn refused(failure: Box<Failure>, cancelled: Option<Stop>, clock: &Clock<'_>) -> ClientError {
    match cancelled {
        // What the daemon calls CANCELLED has one of these names here.
        Some(stop) if failure.code == ErrorCode::Cancelled => clock.error(stop),
        _ => ClientError::Refused(failure),
    }
}

/// How much several chunks are.
#[derive(Debug, Clone, Copy, Default)]
struct Amount {
    /// Bytes that are written to the window.
    bytes: u64,
    /// Bytes of values that are read for that.
    work: u64,
}

impl Amount {
    /// That of the chunks `from..to`.
    fn of(list: &ChunkList, from: usize, to: usize) -> Self {
        let chunks = list.chunks.get(from..to).unwrap_or_default();
        let crossing = chunks.iter().filter(|c| !c.shared && c.bytes > 0);
        crossing.fold(Self::default(), |sum, c| Self { bytes: sum.bytes + c.bytes, work: sum.work + c.work })
    }
}
