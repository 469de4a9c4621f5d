//! Accepting connections and finding out what each is: a primary or a lane.

use std::io;
use std::sync::Arc;
use std::thread::{Builder, JoinHandle};
use std::time::Duration;

use shmquant_protocol::failpoint::failpoint;
use shmquant_protocol::message::Message;
use shmquant_protocol::socket::{Connection, Listener, SocketError};

use crate::error::Trouble;
use crate::hub::Hub;
use crate::lane::{self, Join};
use crate::port::Port;
use crate::session;

/// How long a connection may take to say what it is.
const GREETING: Duration = Duration::from_secs(10);

/// Starts the thread that accepts connections.
pub(crate) fn start(hub: Arc<Hub>, listener: Arc<Listener>) -> io::Result<JoinHandle<()>> {
    Builder::new().name("shmq-accept".to_owned()).spawn(move || {
        loop {
            match listener.accept() {
                Ok(connection) => spawn(&hub, connection),
                Err(SocketError::Closed) => return,
                Err(error) => {
                    tracing::error!("{error}");
                    // The kernel is short of something; other threads are about to give some back.
                    std::thread::sleep(Duration::from_millis(10));
                }
            }
            if hub.is_stopping() {
                return;
            }
        }
    })
}

/// Serves a connection on a thread of its own. Without a thread for it, it is closed.
pub(crate) fn spawn(hub: &Arc<Hub>, connection: Connection) {
    let connection = Arc::new(connection);
    let Some(id) = hub.enter(connection.clone()) else {
        tracing::warn!("a connection was refused: too many, or the daemon is stopping");
        return;
    };
    let leave = Leave { hub: hub.clone(), id };
    let served = Builder::new().name("shmq-conn".to_owned()).spawn(move || serve(&leave.hub, &connection));
    if let Err(error) = served {
        // The closure, and with it the entry among the connections, is gone already.
        tracing::error!("a connection was refused: no thread: {error}");
    }
}

/// Takes the connection out when its thread ends, and closes it for good.
struct Leave {
    hub: Arc<Hub>,
    id: u64,
}

impl Drop for Leave {
    fn drop(&mut self) {
        self.hub.leave(self.id);
    }
}

fn serve(hub: &Arc<Hub>, connection: &Arc<Connection>) {
    // `Lost` is how every connection ends; what was worth telling has been told where it happened.
    let _ = greet(hub, connection);
    connection.shutdown();
}

fn greet(hub: &Arc<Hub>, connection: &Arc<Connection>) -> Result<(), Trouble> {
    // A peer of another user is disconnected without a word.
    if let Err(error) = connection.require_same_user() {
        tracing::warn!("a connection was refused: {error}");
        return Err(Trouble::Lost);
    }
    failpoint("daemon.accepted");
    let mut port = Port::new(connection);
    let (request, message) = port.recv_within(GREETING)?;
    match message {
        Ok(Message::Hello { .. }) => {
            failpoint("daemon.hello_received");
            session::serve(hub, connection, &mut port, request)
        }
        Ok(Message::Join { session, token, window }) => {
            lane::serve(hub, connection, &mut port, request, &Join { session, token, window })
        }
        Ok(_) => port.refuse(request, Trouble::protocol("a connection begins with HELLO or JOIN")),
        Err(trouble) => port.refuse(request, trouble),
    }
}
