//! One live session: what hangs on one `HELLO`.

use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use std::os::fd::{AsFd, AsRawFd};

use super::Config;
use super::address::Address;
use super::clock::Clock;
use super::copying::Helpers;
use super::error::ClientError;
use super::fork::{Descriptors, Process};
use super::held::Held;
use super::lane::Lanes;
use super::leases::{Attached, Leases, Origin, lock};
use super::polling::Polling;
use super::primary::{Primary, Reply};
use super::start::{self, Turn};
use crate::chunks::MIN_WINDOW;
use crate::failpoint::failpoint;
use crate::message::{ErrorCode, Lease, MINOR, Message, Target, Welcome};
use crate::segment::{Backing, SegmentError};
use crate::socket::{Connection, MAX_FRAME, SocketError};

/// How long getting to a daemon may take, its start included.
const START_TIME: Duration = Duration::from_secs(20);
/// Between two attempts to reach a daemon that is about to come or go.
const RETRY: Duration = Duration::from_millis(5);
/// How often a descriptor that was lost is asked for again.
const ATTEMPTS: u32 = 3;

/// What is called with bytes done and bytes in all.
pub(super) type Progress<'a> = dyn Fn(u64, u64) + Sync + 'a;

/// The state of one session. Shared by the calls that are running, the housekeeping thread and the owner.
#[derive(Debug)]
pub(super) struct Link {
    process: Process,
    address: Address,
    welcome: Welcome,
    window: u64,
    polling: Polling,
    primary: Primary,
    lanes: Lanes,
    leases: Arc<Leases>,
    helpers: Helpers,
    descriptors: Descriptors,
}

impl Link {
    /// Says hello, starting a daemon if there is none and the configuration has a command for that.
    pub(super) fn connect(config: &Config, limit: Option<Instant>) -> Result<Arc<Self>, ClientError> {
        start::reap();
        let latest = Instant::now() + START_TIME;
        let deadline = limit.map_or(latest, |limit| limit.min(latest));
        let failed = |what: String| ClientError::Connect { address: config.address.to_string(), what };
        // Without a command there is nobody to wait for.
        let startable = config.start.as_ref().zip(config.address.path());
        let mut trouble;
        loop {
            match hello(&config.address, deadline)? {
                Hello::Welcome(connection, welcome) => return Self::new(config, connection, welcome),
                Hello::Nobody(text) => {
                    let Some((command, path)) = startable else { return Err(failed(text)) };
                    trouble = text;
                    match start_once(config, command, path, deadline)? {
                        Some((connection, welcome)) => return Self::new(config, connection, welcome),
                        None => pause(),
                    }
                }
                // It is going down, or was still coming up: its successor is the one we want.
                Hello::Again(text) => {
                    trouble = text;
                    pause();
                }
            }
            if Instant::now() >= deadline {
                return Err(failed(trouble));
            }
        }
    }

    fn new(config: &Config, connection: Connection, welcome: Welcome) -> Result<Arc<Self>, ClientError> {
        if welcome.max_lanes == 0 || welcome.max_window < MIN_WINDOW {
            return Err(ClientError::protocol(format!(
                "WELCOME allows {} lanes and windows of {} bytes",
                welcome.max_lanes, welcome.max_window
            )));
        }
        let backing = if welcome.posix { Backing::Posix } else { Backing::Memfd };
        let most = config.max_lanes.unwrap_or(u32::MAX).clamp(1, welcome.max_lanes);
        let leases = Arc::new(Leases::new(backing, welcome.instance)?);
        let descriptors = Descriptors::new(most.min(1024) as usize + 2);
        descriptors.put(connection.as_fd().as_raw_fd());
        descriptors.put(leases.wake_fd().as_fd().as_raw_fd());
        let poll = if config.poll.unwrap_or(true) { welcome.poll } else { 0 };
        let link = Arc::new(Self {
            process: Process::current(),
            address: config.address.clone(),
            window: config.window.unwrap_or(0).min(welcome.max_window),
            polling: Polling::new(Duration::from_micros(u64::from(poll))),
            primary: Primary::new(connection),
            lanes: Lanes::new(most),
            leases,
            helpers: Helpers::new(),
            descriptors,
            welcome,
        });
        let housekeeper = Arc::clone(&link);
        let thread = std::thread::Builder::new().name("shmquant-client".to_owned()).spawn(move || {
            housekeeper.primary.keep_house(&housekeeper.leases);
            housekeeper.lanes.end(&housekeeper);
        });
        match thread {
            Ok(_) => Ok(link),
            Err(error) => Err(ClientError::Segment(SegmentError::Os {
                what: format!("starting a thread: {error}"),
                errno: nix::errno::Errno::from_raw(error.raw_os_error().unwrap_or(libc::EAGAIN)),
            })),
        }
    }

    pub(super) fn address(&self) -> &Address {
        &self.address
    }

    pub(super) fn welcome(&self) -> &Welcome {
        &self.welcome
    }

    /// Bytes of a lane's window as the owner wants it, 0 for the daemon's default.
    pub(super) fn window(&self) -> u64 {
        self.window
    }

    pub(super) fn polling(&self) -> &Polling {
        &self.polling
    }

    pub(super) fn primary(&self) -> &Primary {
        &self.primary
    }

    pub(super) fn lanes(&self) -> &Lanes {
        &self.lanes
    }

    pub(super) fn leases(&self) -> &Arc<Leases> {
        &self.leases
    }

    pub(super) fn helpers(&self) -> &Helpers {
        &self.helpers
    }

    pub(super) fn descriptors(&self) -> &Descriptors {
        &self.descriptors
    }

    /// Whether it was made by this process.
    pub(super) fn is_ours(&self) -> bool {
        self.process.is_current()
    }

    /// Whether calls can still be made.
    pub(super) fn works(&self) -> bool {
        !self.primary.ended()
    }

    /// Something about the session is broken: the next call makes another.
    pub(super) fn fail(&self) {
        self.primary.fail();
    }

    /// Turns a reply's lease into a hold, asking for its descriptor again if that got lost.
    pub(super) fn hold(
        &self,
        lease: &Lease,
        fds: &mut Vec<std::os::fd::OwnedFd>,
        origin: &Origin<'_>,
        clock: &mut Clock<'_>,
    ) -> Result<Held, ClientError> {
        let attached = self.leases.attach(lease, fds, origin);
        let mut result = match attached {
            Ok(Attached::Held(held)) => return Ok(held),
            Ok(Attached::NoDescriptor) => Err(None),
            Err(error) => Err(Some(error)),
        };
        for _ in 0..ATTEMPTS {
            match result {
                Err(None) => result = self.again(lease, origin, clock),
                _ => break,
            }
        }
        result.map_err(|error| {
            if matches!(error, Some(ClientError::Protocol(_))) {
                self.fail();
            } else {
                self.leases.refuse(lease);
            }
            error.unwrap_or_else(|| {
                let limit = nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE);
                ClientError::Segment(SegmentError::FdLimit {
                    what: format!("receiving segment {}", lease.extent.segment),
                    limit: limit.map_or(0, |(soft, _)| soft),
                })
            })
        })
    }

    /// `OPEN` kind 2, after making room for a descriptor. The reply is one more hold, which takes the first one's place.
    fn again(
        &self,
        lease: &Lease,
        origin: &Origin<'_>,
        clock: &mut Clock<'_>,
    ) -> Result<Held, Option<ClientError>> {
        self.lanes.close_idle(self);
        let open = Message::Open(Target::Again(lease.extent));
        let Reply { message, mut fds } =
            self.primary.ask(&open, "asking for a descriptor", clock).map_err(Some)?;
        match message {
            Message::Opened { lease: second, .. } if second.extent == lease.extent => {
                match self.leases.attach(&second, &mut fds, origin) {
                    Ok(Attached::Held(held)) => {
                        self.leases.refuse(lease);
                        Ok(held)
                    }
                    Ok(Attached::NoDescriptor) => {
                        self.leases.refuse(&second);
                        Err(None)
                    }
                    Err(error) => Err(Some(error)),
                }
            }
            other => Err(Some(ClientError::protocol(format!("OPEN was answered by {other:?}")))),
        }
    }

    /// In a forked child, for the parent's session: closes the copies of its descriptors and touches nothing that another thread
    /// may have been at. The value itself is leaked.
    pub(super) fn abandon(&self) {
        self.descriptors.close_copies();
        self.leases.abandon();
    }
}

/// The session of one process, made when it is needed.
#[derive(Debug, Default)]
pub(super) struct Slot(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    link: Option<Arc<Link>>,
    closed: bool,
}

impl Slot {
    /// A forked child's slot, made from its parent's.
    pub(super) fn inherit(&self) -> Self {
        // Another thread of the parent may have held the lock at the fork; then its descriptors stay open here.
        if let Ok(state) = self.0.try_lock()
            && let Some(link) = &state.link
        {
            link.abandon();
        }
        Self::default()
    }

    /// The live session, which is made if there is none.
    pub(super) fn link(&self, config: &Config, limit: Option<Instant>) -> Result<Arc<Link>, ClientError> {
        let mut state = lock(&self.0);
        if state.closed {
            return Err(ClientError::Closed);
        }
        match &state.link {
            Some(link) if link.works() => return Ok(Arc::clone(link)),
            _ => {}
        }
        let link = Link::connect(config, limit)?;
        state.link = Some(Arc::clone(&link));
        Ok(link)
    }

    /// Ends the session: at once, or with its last hold.
    pub(super) fn close(&self, at_once: bool) {
        let mut state = lock(&self.0);
        state.closed = true;
        if let Some(link) = state.link.take() {
            link.lanes.end(&link);
            link.primary.close(at_once, &link.leases);
        }
    }
}

enum Hello {
    Welcome(Connection, Welcome),
    Nobody(String),
    Again(String),
}

/// One attempt to get a session.
fn hello(address: &Address, deadline: Instant) -> Result<Hello, ClientError> {
    let failed =
        |error: SocketError| ClientError::Connect { address: address.to_string(), what: error.to_string() };
    let connection = match address.connect(deadline) {
        Ok(connection) => connection,
        Err(error @ SocketError::NotListening { .. }) => return Ok(Hello::Nobody(error.to_string())),
        Err(error) => return Err(failed(error)),
    };
    failpoint("client.connected");
    let again = || Ok(Hello::Again("the daemon closed the connection before it answered HELLO".to_owned()));
    let mut frame = Vec::new();
    Message::Hello { minor: MINOR, version: env!("CARGO_PKG_VERSION").to_owned() }.encode(1, &mut frame);
    match connection.send_until(&frame, &[], Some(deadline)) {
        Ok(()) => failpoint("client.hello_sent"),
        Err(SocketError::Closed) => return again(),
        Err(error) => return Err(failed(error)),
    }
    let (mut buffer, mut fds) = (vec![0; MAX_FRAME], Vec::new());
    let len = match connection.recv_spin(&mut buffer, &mut fds, Duration::ZERO, Some(deadline)) {
        Ok(received) => received.len,
        Err(SocketError::Closed) => return again(),
        Err(error) => return Err(failed(error)),
    };
    failpoint("client.hello_received");
    match Message::decode(&buffer[..len]).map_err(|e| ClientError::broken(&e))?.1 {
        Message::Welcome(welcome) => Ok(Hello::Welcome(connection, welcome)),
        Message::Error(failure) if failure.code == ErrorCode::Stopping => Ok(Hello::Again(failure.message)),
        Message::Error(failure) => Err(ClientError::Refused(failure)),
        other => Err(ClientError::protocol(format!("HELLO was answered by {other:?}"))),
    }
}

/// Starts a daemon if it is this process's turn to. `None`: somebody else is at it, or the new daemon has just gone.
fn start_once(
    config: &Config,
    command: &start::StartCommand,
    path: &Path,
    deadline: Instant,
) -> Result<Option<(Connection, Welcome)>, ClientError> {
    let failed = |what: String| ClientError::Connect { address: config.address.to_string(), what };
    let Some(turn) = Turn::take(path).map_err(failed)? else { return Ok(None) };
    // Whoever had the turn before may have started one.
    let mut started = Ok(());
    for attempt in 0..2 {
        match hello(&config.address, deadline)? {
            Hello::Welcome(connection, welcome) => return Ok(Some((connection, welcome))),
            Hello::Again(_) => return Ok(None),
            Hello::Nobody(_) if attempt == 0 => started = start::start(command, path, deadline),
            Hello::Nobody(_) => {}
        }
    }
    drop(turn);
    match started {
        Ok(()) => Ok(None),
        Err(text) => Err(failed(text)),
    }
}

fn pause() {
    std::thread::park_timeout(RETRY);
}
