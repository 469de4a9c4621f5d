//! The Rust client: sessions with a daemon, values in, results in shared memory out.
//!
//! A [`Session`] is a cheap handle that any thread may use. It connects when first used, and again after a fork or when the
//! daemon was started anew. A result is a [`Held`]: bytes of an Arrow IPC file in shared memory, given back when it is dropped.

mod address;
mod clock;
mod copying;
mod encoding;
mod error;
mod filling;
mod fork;
mod held;
mod input;
mod lane;
mod leases;
mod polling;
mod primary;
mod ranges;
mod report;
mod returns;
mod session;
mod source;
mod start;
mod stream;
mod sync;
mod window;

use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

pub use address::{ADDRESS_VARIABLE, Address, Connector, default_address};
pub use error::ClientError;
pub use held::Held;
pub use input::Input;
pub use report::ItemReport;
pub use source::Source;
pub use start::StartCommand;

use crate::failpoint::failpoint;
use crate::message::{Extent, Listing, MAX_RELEASES, Message, Naming, Target, Welcome};
use crate::segment::{Kind, Mapping};
use clock::Clock;
use fork::{PerProcess, Process};
use leases::{Along, Origin};
use primary::Reply;
use session::{Link, Slot};
use stream::Request;

/// How long a request about something else than values may take. The daemon answers them from memory.
const SHORT_REQUEST: Duration = Duration::from_secs(30);

/// How a session finds its daemon and what it asks of it.
#[derive(Debug, Clone)]
pub struct Config {
    /// Where the daemon is.
    pub address: Address,
    /// How to start one if none is there; `None` makes that an error.
    pub start: Option<StartCommand>,
    /// Bytes of a lane's window; `None` is the daemon's default.
    pub window: Option<u64>,
    /// Most lanes, which is the number of requests at a time; `None` is what the daemon allows.
    pub max_lanes: Option<u32>,
    /// Whether to poll for replies before sleeping; `None` is as the daemon says.
    pub poll: Option<bool>,
}

impl Default for Config {
    /// The daemon that the environment names; none is started.
    fn default() -> Self {
        Self { address: Address::from_env(), start: None, window: None, max_lanes: None, poll: None }
    }
}

/// What a single request wants.
#[derive(Default)]
pub struct Options<'a> {
    /// How long it may take; `None` is as long as it takes.
    pub timeout: Option<Duration>,
    /// Publish the result under a name.
    pub named: Option<Naming>,
    /// Called by the calling thread with the bytes of values that are done, and with all there are.
    pub progress: Option<&'a (dyn Fn(u64, u64) + Sync)>,
    /// Asked about every 50 ms while the call works or waits; true cancels it.
    pub interrupted: Option<&'a (dyn Fn() -> bool + Sync)>,
}

/// A result and what the daemon says about each of its items.
#[derive(Debug)]
pub struct Quantized {
    /// The result's memory.
    pub held: Held,
    /// One for each quantized item, in order; empty if the named result existed already.
    pub report: Vec<ItemReport>,
    /// Bytes that crossed to the daemon: codes and parameters, values that it encoded, columns that go along.
    pub bytes_copied: u64,
    /// Bytes of values that the daemon read where they lay.
    pub bytes_shared: u64,
}

/// A handle on this process's session with a daemon. Clones share the session.
#[derive(Clone)]
pub struct Session {
    shared: Arc<Shared>,
}

struct Shared {
    config: Config,
    home: Process,
    slot: PerProcess<Slot>,
}

impl Session {
    /// A session that connects when it is first used.
    pub fn new(config: Config) -> Self {
        let slot = PerProcess::new(Slot::default());
        Self { shared: Arc::new(Shared { config, home: Process::current(), slot }) }
    }

    /// Connects now, if it is not connected, and gives what the daemon said.
    pub fn connect(&self) -> Result<Welcome, ClientError> {
        self.link(&Clock::new(None, None)).map(|link| link.welcome().clone())
    }

    /// Quantizes a table.
    pub fn quantize(&self, source: &dyn Source, options: &Options<'_>) -> Result<Quantized, ClientError> {
        let mut clock = Clock::new(options.timeout, options.interrupted);
        let link = self.link(&clock)?;
        let mut descriptor = Vec::new();
        let placed = link.leases().placed(source.descriptor(), &|item| source.lies_at(item));
        let asked = placed.as_ref().unwrap_or(source.descriptor());
        let encoded = asked.encode(&mut descriptor);
        encoded.map_err(|(column, kind)| ClientError::Column { column, kind })?;
        let bytes = descriptor.len() as u64;
        let most = link.welcome().max_window / 4;
        if bytes > most {
            return Err(ClientError::TooLarge { bytes, most });
        }
        let mut borrowed = link.lanes().take(&link, bytes * 4, &mut clock)?;
        let Some(lane) = borrowed.start() else { return Err(ClientError::Closed) };
        lane.scratch = descriptor;
        let releases = Along::take(link.leases(), MAX_RELEASES);
        let request = Request {
            source,
            descriptor: asked,
            naming: options.named.clone(),
            releases,
            progress: options.progress,
            helpers: link.helpers(),
            primary: link.primary(),
            polling: link.polling(),
        };
        let outcome = stream::run(lane, request, &mut clock);
        let mut fds = std::mem::take(&mut lane.wire.fds);
        let answer = match outcome {
            Ok(outcome) => {
                let protocol = matches!(&outcome, Err(ClientError::Refused(f)) if f.code == crate::message::ErrorCode::Protocol);
                if !protocol {
                    borrowed.finished();
                }
                outcome?
            }
            Err(error) => {
                if matches!(error, ClientError::Lost { .. } | ClientError::Protocol(_)) {
                    link.fail();
                }
                return Err(error);
            }
        };
        // The lane is free for others while the result is mapped.
        drop(borrowed);
        let name = options.named.as_ref().map_or("", |naming| naming.name.as_str());
        let created = name.is_empty() || answer.computed;
        let origin = Origin { name, created, kind: Kind::Result };
        let held = link.hold(&answer.lease, &mut fds, &origin, &mut clock)?;
        if answer.interrupted {
            return Err(ClientError::Cancelled);
        }
        let stream::Answer { report, bytes_copied, bytes_shared, .. } = answer;
        Ok(Quantized { held, report, bytes_copied, bytes_shared })
    }

    /// Opens a published result.
    pub fn open(&self, name: &str) -> Result<Held, ClientError> {
        self.open_target(Target::Name(name.to_owned()))
    }

    /// Takes the hold that a ticket carries.
    pub fn open_ticket(&self, ticket: u64, secret: [u8; 16]) -> Result<Held, ClientError> {
        self.open_target(Target::Ticket(ticket, secret))
    }

    /// Makes a ticket: a hold that another process of the user can take, also after this one has ended.
    pub fn ticket(&self, held: &Held) -> Result<(u64, [u8; 16]), ClientError> {
        let (link, extent) = self.link_of(held, "passed on")?;
        let reply = ask(&link, &Message::Ticket(extent), "making a ticket")?;
        match reply.message {
            Message::Ticketed { ticket, secret } => {
                failpoint("client.ticket_made");
                Ok((ticket, secret))
            }
            _ => Err(unexpected(&link, &reply, "TICKET")),
        }
    }

    /// Publishes a result under a name.
    pub fn publish(&self, held: &Held, name: &str, replace: bool) -> Result<(), ClientError> {
        let (link, extent) = self.link_of(held, "published")?;
        let message = Message::Publish { extent, replace, name: name.to_owned() };
        let reply = ask(&link, &message, "publishing a result")?;
        match reply.message {
            Message::Published => {
                failpoint("client.published");
                held.published(name);
                Ok(())
            }
            _ => Err(unexpected(&link, &reply, "PUBLISH")),
        }
    }

    /// A private writable mapping of the whole segment of a result: a page that is written to becomes this process's own, nobody
    /// else sees it. Valid for as long as `held` is; pages not written to follow the segment.
    pub fn private_mapping(&self, held: &Held) -> Result<Mapping, ClientError> {
        let (link, extent) = self.link_of(held, "mapped again")?;
        let reply = ask(&link, &Message::Open(Target::Again(extent)), "asking for a descriptor")?;
        let Reply { message: Message::Opened { lease, .. }, mut fds } = reply else {
            return Err(unexpected(&link, &reply, "OPEN"));
        };
        let size = lease.segment_size;
        let mapped =
            fds.last().map(|fd| Mapping::private_writable(fd.as_fd(), size, link.leases().backing()));
        // The reply came with one more hold, which goes back at once; a descriptor that was lost is asked for again with it.
        drop(link.hold(&lease, &mut fds, &opened(""), &mut short())?);
        match mapped {
            Some(mapping) => Ok(mapping?),
            None => Err(ClientError::protocol("OPEN for a descriptor was answered without one")),
        }
    }

    /// Takes a name out of the catalog. Whoever reads the dataset goes on reading it.
    pub fn drop_dataset(&self, name: &str) -> Result<(), ClientError> {
        let link = self.link(&short())?;
        let reply = ask(&link, &Message::Drop { name: name.to_owned() }, "dropping a dataset")?;
        match reply.message {
            Message::Dropped => Ok(()),
            _ => Err(unexpected(&link, &reply, "DROP")),
        }
    }

    /// Lists datasets, results or sessions, each as a JSON object.
    pub fn list(&self, what: Listing) -> Result<Vec<String>, ClientError> {
        let link = self.link(&short())?;
        let mut all = Vec::new();
        let mut cursor = 0;
        loop {
            let reply = ask(&link, &Message::List { cursor, what }, "listing")?;
            let Message::Listed { cursor: next, entries } = reply.message else {
                return Err(unexpected(&link, &reply, "LIST"));
            };
            let stuck = next == cursor && entries.is_empty();
            all.extend(entries);
            if next == 0 || stuck {
                return Ok(all);
            }
            cursor = next;
        }
    }

    /// The daemon's statistics, a JSON object.
    pub fn stat(&self) -> Result<String, ClientError> {
        let link = self.link(&short())?;
        let reply = ask(&link, &Message::Stat, "asking for statistics")?;
        match reply.message {
            Message::Stats(text) => Ok(text),
            _ => Err(unexpected(&link, &reply, "STAT")),
        }
    }

    /// Asks whether the daemon answers.
    pub fn ping(&self) -> Result<(), ClientError> {
        let link = self.link(&short())?;
        let reply = ask(&link, &Message::Ping, "asking for a sign of life")?;
        match reply.message {
            Message::Pong => Ok(()),
            _ => Err(unexpected(&link, &reply, "PING")),
        }
    }

    /// Ends the session, for all clones. Results stay readable for as long as they are held.
    pub fn close(&self) {
        self.shared.slot.get(Slot::inherit).close(true);
    }

    fn open_target(&self, target: Target) -> Result<Held, ClientError> {
        let mut clock = short();
        let link = self.link(&clock)?;
        let reply = link.primary().ask(&Message::Open(target), "opening a result", &mut clock)?;
        let Reply { message: Message::Opened { lease, ref name }, .. } = reply else {
            return Err(unexpected(&link, &reply, "OPEN"));
        };
        failpoint("client.opened");
        let (name, mut fds) = (name.clone(), reply.fds);
        link.hold(&lease, &mut fds, &opened(&name), &mut clock)
    }

    fn link(&self, clock: &Clock<'_>) -> Result<Arc<Link>, ClientError> {
        let shared = &*self.shared;
        if matches!(shared.config.address, Address::InProcess(_)) && !shared.home.is_current() {
            return Err(ClientError::Forked);
        }
        shared.slot.get(Slot::inherit).link(&shared.config, clock.deadline())
    }

    fn link_of(&self, held: &Held, what: &'static str) -> Result<(Arc<Link>, Extent), ClientError> {
        let link = self.link(&short())?;
        if held.is_of(link.leases()) {
            Ok((link, held.extent()))
        } else {
            Err(ClientError::OtherSession { what })
        }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // A parent's session is the parent's to end.
        if self.slot.is_current() {
            self.slot.get(Slot::inherit).close(false);
        }
    }
}

impl std::fmt::Debug for Session {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Session").field("config", &self.shared.config).finish_non_exhaustive()
    }
}

fn short() -> Clock<'static> {
    Clock::new(Some(SHORT_REQUEST), None)
}

/// A result that some other call computed.
fn opened(name: &str) -> Origin<'_> {
    Origin { name, created: false, kind: Kind::Result }
}

fn ask(link: &Link, message: &Message, what: &'static str) -> Result<Reply, ClientError> {
    link.primary().ask(message, what, &mut short())
}

fn unexpected(link: &Link, reply: &Reply, what: &'static str) -> ClientError {
    link.fail();
    reply.unexpected(what)
}
