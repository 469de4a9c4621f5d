//! Idle exit: a daemon that nobody uses ends by itself; a session, a ticket or a dataset keeps it.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a failed expectation is how a test reports")]

mod raw;

use std::path::PathBuf;
use std::sync::mpsc::{Receiver, TryRecvError, channel};
use std::time::Duration;

use raw::{Client, Lane, Raw, layer};
use shmquant_daemon::{Config, Daemon};
use shmquant_protocol::chunks::MIN_WINDOW;
use shmquant_protocol::message::{Message, Target};
use shmquant_protocol::socket::Connection;
use tempfile::TempDir;

const IDLE: Duration = Duration::from_secs(1);
/// After this a daemon that has not ended does not.
const PATIENCE: Duration = Duration::from_secs(60);

/// A daemon that runs on a thread of its own.
struct Running {
    address: PathBuf,
    ended: Receiver<()>,
    _dir: TempDir,
}

impl Running {
    fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let address = dir.path().join("run/d.sock");
        let config = Config {
            address: address.clone(),
            workers: 1,
            window: MIN_WINDOW,
            idle_exit: Some(IDLE),
            ..Config::default()
        };
        let daemon = Daemon::start(config).unwrap();
        let (send, ended) = channel();
        std::thread::spawn(move || {
            daemon.run();
            let _ = send.send(());
        });
        Self { address, ended, _dir: dir }
    }

    /// One with a client: on a busy machine a daemon may have ended before anybody came.
    fn with_client() -> (Self, Client) {
        loop {
            let running = Self::start();
            let client = Connection::connect(&running.address).ok();
            if let Some(client) = client.and_then(|connection| Client::greet(Raw::over(connection)).ok()) {
                return (running, client);
            }
        }
    }

    fn raw(&self) -> Raw {
        Raw::over(Connection::connect(&self.address).unwrap())
    }

    /// Others that were idle from later on have ended, and this one has not.
    fn assert_outlives_others(&self) {
        for _ in 0..2 {
            Self::start().assert_ends();
            assert_eq!(self.ended.try_recv(), Err(TryRecvError::Empty));
        }
    }

    fn assert_ends(self) {
        self.ended.recv_timeout(PATIENCE).unwrap();
        assert!(Connection::connect(&self.address).is_err());
    }
}

#[test]
fn nobody_came() {
    Running::start().assert_ends();
}

#[test]
fn a_session_keeps_it_even_if_it_does_nothing() {
    let (running, client) = Running::with_client();
    running.assert_outlives_others();
    drop(client);
    running.assert_ends();
}

#[test]
fn a_ticket_keeps_it_until_it_is_opened() {
    let (running, mut client) = Running::with_client();
    let mut lane = Lane::join(running.raw(), &client.welcome, 0).unwrap();
    let (lease, _) = lane.quantize(&layer(4096)).unwrap();
    let Message::Ticketed { ticket, secret } = client.ask(&Message::Ticket(lease.extent)).unwrap().0 else {
        panic!()
    };
    drop((client, lane));
    running.assert_outlives_others();
    let mut client = Client::over(running.raw());
    let opened = client.ask(&Message::Open(Target::Ticket(ticket, secret))).unwrap();
    assert!(matches!(opened, (Message::Opened { .. }, Some(_))), "{opened:?}");
    drop(client);
    running.assert_ends();
}

#[test]
fn a_dataset_keeps_it_until_it_is_dropped() {
    let (running, mut client) = Running::with_client();
    let mut lane = Lane::join(running.raw(), &client.welcome, 0).unwrap();
    let (lease, _) = lane.quantize(&layer(4096)).unwrap();
    let name = "kept".to_owned();
    client.ask(&Message::Publish { extent: lease.extent, replace: false, name: name.clone() }).unwrap();
    drop((client, lane));
    running.assert_outlives_others();
    let mut client = Client::over(running.raw());
    client.ask(&Message::Open(Target::Name(name.clone()))).unwrap();
    client.ask(&Message::Drop { name }).unwrap();
    drop(client);
    running.assert_ends();
}
