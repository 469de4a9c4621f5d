//! The reaper: one thread that unmaps and closes segments, which takes milliseconds for large ones.

use std::io;
use std::sync::Weak;
use std::sync::mpsc::{Receiver, Sender};
use std::thread::{Builder, JoinHandle};

use shmquant_protocol::segment::Segment;

use crate::hub::Hub;

/// What the reaper is told.
#[derive(Debug)]
pub(crate) enum Dead {
    /// Free this.
    Segment(Segment),
    /// Say when everything before this is gone.
    Until(Sender<()>),
    /// Nothing more will come.
    Stop,
}

/// Starts the thread. The hub is told about every segment that is gone, so that its bytes count as free.
pub(crate) fn start(queue: Receiver<Dead>, hub: Weak<Hub>) -> io::Result<JoinHandle<()>> {
    Builder::new().name("shmq-reaper".to_owned()).spawn(move || {
        loop {
            let segment = match queue.recv() {
                Ok(Dead::Segment(segment)) => segment,
                Ok(Dead::Until(waiter)) => {
                    // Gone, if nobody takes it.
                    let _ = waiter.send(());
                    continue;
                }
                Ok(Dead::Stop) | Err(_) => return,
            };
            let id = segment.name().id;
            drop(segment);
            if let Some(hub) = hub.upgrade() {
                hub.books().reaped(id);
            }
        }
    })
}
