//! The watcher: one thread that notices clients' deaths and does what has to be done from time to time.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::epoll::{EpollEvent, EpollTimeout};

use crate::hub::Hub;

/// Time between two looks at pools, tickets and idleness; also how long stopping may take here.
const TICK: u16 = 200;
/// How often pools and tickets are looked at.
const HOUSEKEEPING: Duration = Duration::from_secs(1);
/// Most idle segments of a session that one look gives back: memory goes slowly.
const DECAY: usize = 8;

/// Starts the thread.
pub(crate) fn start(hub: Arc<Hub>) -> io::Result<JoinHandle<()>> {
    Builder::new().name("shmq-watcher".to_owned()).spawn(move || watch(&hub))
}

fn watch(hub: &Hub) {
    let mut events = [EpollEvent::empty(); 64];
    let mut idle_since = Instant::now();
    let mut kept_house = Instant::now();
    while !hub.is_stopping() {
        match hub.watch.wait(&mut events, EpollTimeout::from(TICK)) {
            Ok(n) => events[..n].iter().for_each(|event| dead(hub, event.data())),
            Err(Errno::EINTR) => {}
            Err(errno) => {
                tracing::error!("watching clients: {}", errno.desc());
                std::thread::sleep(HOUSEKEEPING);
            }
        }
        if kept_house.elapsed() >= HOUSEKEEPING {
            kept_house = Instant::now();
            keep_house(hub);
        }
        if is_in_use(hub) {
            idle_since = Instant::now();
        } else if hub.config.idle_exit.is_some_and(|after| idle_since.elapsed() >= after) {
            tracing::info!("nobody has used the daemon for {:?}: it ends", idle_since.elapsed());
            hub.request_stop();
            // Asked once is enough.
            idle_since = Instant::now();
        }
    }
}

/// The process of a session has ended. Its sockets may be held open by others, so they are shut down: the
/// threads that serve them then end the session.
fn dead(hub: &Hub, session: u64) {
    let books = hub.books();
    let Some(account) = books.sessions.get(&session) else { return };
    let (session, lanes) = (account.session.clone(), account.lanes.values().cloned().collect::<Vec<_>>());
    drop(books);
    session.connection.shutdown();
    for lane in lanes {
        lane.connection.shutdown();
        lane.wake.signal();
    }
    // The pidfd stays readable: once is enough.
    session.unwatch(hub);
}

fn keep_house(hub: &Hub) {
    let mut books = hub.books();
    books.expire_tickets(hub.config.ticket_ttl);
    let mut cold = Vec::new();
    for account in books.sessions.values_mut() {
        for _ in 0..DECAY {
            let Some((id, _)) = account.pool.take_oldest(hub.config.pool_idle) else { break };
            cold.push(id);
        }
    }
    for id in cold {
        books.retire(id);
    }
}

fn is_in_use(hub: &Hub) -> bool {
    let books = hub.books();
    let held = !books.sessions.is_empty() || books.catalog.len() > 0 || books.tickets.len() > 0;
    drop(books);
    held || hub.connections() > 0 || hub.jobs.load(Ordering::Acquire) > 0
}
