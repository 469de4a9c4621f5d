//! Memory for values: what is written here is read where it lies.

use std::fmt;
use std::time::Duration;

use super::clock::Clock;
use super::error::ClientError;
use super::held::Held;
use super::leases::{Along, Origin};
use super::primary::Reply;
use super::session::Link;
use super::{Session, stream};
use crate::failpoint::failpoint;
use crate::message::{Extent, Lease, MAX_RELEASES, Message, Purpose};
use crate::segment::Kind;

/// Writable shared memory. Values that lie in it when a table of them is quantized do not cross to the daemon: they are there.
///
/// Writing while a request reads is allowed and gives whatever values were read. The memory is this process's to write for as long
/// as this lives, whatever becomes of the session; dropping it neither blocks nor allocates nor takes a lock.
pub struct Input {
    held: Held,
    address: *mut u8,
}

// SAFETY: the memory at `address` is kept mapped by `held`. Who writes it when is the holder's business, as with any shared
// memory; this type itself never reads or writes it.
#[allow(unsafe_code, reason = "a raw address is what this hands out")]
unsafe impl Send for Input {}
// SAFETY: as above.
#[allow(unsafe_code, reason = "as above")]
unsafe impl Sync for Input {}

impl Input {
    fn new(held: Held) -> Result<Self, ClientError> {
        let base = held.mapping().and_then(|mapping| mapping.as_mut_ptr());
        match base {
            Some(base) => {
                let address = base.wrapping_add(held.extent().offset as usize);
                Ok(Self { held, address })
            }
            None => Err(ClientError::protocol("ALLOC gave a segment that was leased as a result")),
        }
    }

    /// Where the memory begins: aligned to 64 bytes, valid for reads and writes of [`len`](Self::len) bytes while this lives.
    pub fn as_ptr(&self) -> *mut u8 {
        self.address
    }

    /// Bytes, as many as were asked for.
    pub fn len(&self) -> usize {
        self.held.len()
    }

    /// Never: nothing of zero bytes is allocated.
    pub fn is_empty(&self) -> bool {
        self.held.is_empty()
    }

    /// Which extent it is.
    pub fn extent(&self) -> Extent {
        self.held.extent()
    }

    /// The name of its segment, as `/proc/<pid>/maps` shows it.
    pub fn segment_name(&self) -> String {
        self.held.segment_name()
    }
}

impl fmt::Debug for Input {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Input")
            .field("segment", &self.segment_name())
            .field("extent", &self.extent())
            .finish()
    }
}

impl Session {
    /// Writable memory of `bytes` bytes for values. It holds zeros, or what this session wrote there before.
    ///
    /// Waits for memory as [`quantize`](Self::quantize) does: until `timeout`, and not once `interrupted` says so.
    pub fn allocate(
        &self,
        bytes: u64,
        timeout: Option<Duration>,
        interrupted: Option<&(dyn Fn() -> bool + Sync)>,
    ) -> Result<Input, ClientError> {
        let mut clock = Clock::new(timeout, interrupted);
        let link = self.link(&clock)?;
        let (lease, mut fds) = alloc(&link, bytes, Purpose::Input, &mut clock)?;
        if lease.extent.length < bytes {
            link.fail();
            let got = lease.extent.length;
            return Err(ClientError::protocol(format!("ALLOC of {bytes} bytes gave {got}")));
        }
        let origin = Origin { name: "", created: true, kind: Kind::Input };
        link.hold(&lease, &mut fds, &origin, &mut clock).and_then(Input::new)
    }

    /// Has the daemon make memory ready for a result of up to `bytes` bytes, which the next such request of this session finds.
    pub fn warm(
        &self,
        bytes: u64,
        timeout: Option<Duration>,
        interrupted: Option<&(dyn Fn() -> bool + Sync)>,
    ) -> Result<(), ClientError> {
        let mut clock = Clock::new(timeout, interrupted);
        let link = self.link(&clock)?;
        alloc(&link, bytes, Purpose::Warm, &mut clock).map(drop)
    }
}

/// Asks for memory on a lane, where the daemon may wait for it.
fn alloc(
    link: &Link,
    bytes: u64,
    purpose: Purpose,
    clock: &mut Clock<'_>,
) -> Result<(Lease, Vec<std::os::fd::OwnedFd>), ClientError> {
    let mut borrowed = link.lanes().take(link, 0, clock)?;
    let Some(lane) = borrowed.start() else { return Err(ClientError::Closed) };
    let releases = Along::take(link.leases(), MAX_RELEASES);
    let message = Message::Allocate { bytes, purpose, timeout: clock.milliseconds() };
    let outcome = stream::ask(&mut lane.wire, link.primary(), releases, &message, clock);
    let fds = std::mem::take(&mut lane.wire.fds);
    match outcome {
        Ok(reply) => {
            failpoint("client.allocated");
            borrowed.finished();
            match reply? {
                Message::Allocated { lease } => Ok((lease, fds)),
                message => {
                    link.fail();
                    Err(Reply { message, fds }.unexpected("ALLOC"))
                }
            }
        }
        Err(error) => {
            if matches!(error, ClientError::Lost { .. } | ClientError::Protocol(_)) {
                link.fail();
            }
            Err(error)
        }
    }
}
