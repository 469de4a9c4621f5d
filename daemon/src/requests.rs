//! Requests that both kinds of connection take, and the only place that hands out leases in replies.

use std::sync::Arc;
use std::time::SystemTime;

use shmquant_protocol::failpoint::failpoint;
use shmquant_protocol::message::{ErrorCode, Extent, Lease, Message, Target};
use shmquant_protocol::socket::SocketError;

use crate::books::{Books, Granted, gone, too_many_holds};
use crate::catalog::{Dataset, Origin};
use crate::error::Trouble;
use crate::hub::Hub;
use crate::memory::SegmentMemory;
use crate::port::Port;
use crate::session::{Session, random};
use crate::shared;
use crate::stat;

/// A reply, with the hold that has to be taken back if it cannot be delivered.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) message: Message,
    pub(crate) memory: Option<Arc<SegmentMemory>>,
    pub(crate) lease: Option<Lease>,
    ticket: Option<u64>,
}

impl Answer {
    pub(crate) fn plain(message: Message) -> Self {
        Self { message, memory: None, lease: None, ticket: None }
    }

    /// A reply that carries a lease.
    pub(crate) fn leased(message: Message, granted: Granted) -> Self {
        Self { message, lease: Some(granted.lease), memory: granted.memory, ticket: None }
    }
}

/// Serves one message; `Err` ends the connection.
pub(crate) fn serve(
    hub: &Hub,
    session: &Session,
    port: &mut Port<'_>,
    request: u32,
    message: Message,
) -> Result<(), Trouble> {
    match message {
        Message::Release(list) => {
            let mut books = hub.books();
            for release in list {
                books.release(session.id, release);
            }
            Ok(())
        }
        Message::Unmap { segment } => {
            hub.books().unmapped(session.id, segment);
            Ok(())
        }
        message => {
            let answer = answer(hub, session, message);
            deliver(hub, session, port, request, answer)
        }
    }
}

/// Sends an answer or an error; takes an undelivered lease or ticket back.
pub(crate) fn deliver(
    hub: &Hub,
    session: &Session,
    port: &mut Port<'_>,
    request: u32,
    answer: Result<Answer, Trouble>,
) -> Result<(), Trouble> {
    let answer = match answer {
        Ok(answer) => answer,
        Err(trouble) => return port.refuse(request, trouble),
    };
    let Err(error) = port.send(request, &answer.message, answer.memory.as_deref()) else {
        failpoint("daemon.reply_sent");
        return Ok(());
    };
    if let Some(lease) = &answer.lease {
        hub.books().unlease(session.id, lease);
    }
    if let Some(ticket) = answer.ticket {
        // Nobody knows its secret.
        hub.books().end_ticket(ticket);
    }
    match error {
        SocketError::FdsInFlight => {
            let text =
                "too many file descriptors of this user are on their way to processes that do not read";
            port.refuse(request, Trouble::new(ErrorCode::Limit, text, "try again"))
        }
        SocketError::PeerNotReading => {
            tracing::warn!(session = session.id, pid = session.pid, "disconnected: {error}");
            Err(Trouble::Lost)
        }
        _ => Err(Trouble::Lost),
    }
}

fn answer(hub: &Hub, session: &Session, message: Message) -> Result<Answer, Trouble> {
    let plain = |message| Ok(Answer::plain(message));
    match message {
        Message::Open(target) => {
            let (granted, name) = hub.books().open(session.id, target)?;
            failpoint("daemon.opened");
            let message = Message::Opened { lease: granted.lease, name };
            Ok(Answer::leased(message, granted))
        }
        Message::Ticket(extent) => {
            let mut secret = [0; 16];
            random(&mut secret)?;
            let ticket = hub.books().make_ticket(session.id, extent, secret)?;
            failpoint("daemon.ticket_made");
            Ok(Answer { ticket: Some(ticket), ..Answer::plain(Message::Ticketed { ticket, secret }) })
        }
        Message::Publish { extent, replace, name } => {
            shared::publish(hub, session, extent, name, replace)?;
            failpoint("daemon.published");
            plain(Message::Published)
        }
        Message::Drop { name } => {
            hub.books().drop_dataset(&name)?;
            failpoint("daemon.dropped");
            plain(Message::Dropped)
        }
        Message::List { cursor, what } => plain(stat::list(hub, cursor, what)),
        Message::Stat => plain(Message::Stats(stat::stat(hub))),
        Message::Ping => plain(Message::Pong),
        _ => Err(Trouble::protocol("this message has no place on this connection now")),
    }
}

impl Books {
    pub(crate) fn open(&mut self, session: u64, target: Target) -> Result<(Granted, String), Trouble> {
        match target {
            Target::Name(name) => {
                let Some(dataset) = self.catalog.get(&name) else {
                    return Err(no_dataset(&name));
                };
                let extent = dataset.extent;
                Ok((self.lease(session, extent)?, name))
            }
            Target::Ticket(number, secret) => {
                let Some(ticket) = self.tickets.find(number, &secret) else {
                    return Err(Trouble::new(
                        ErrorCode::NotFound,
                        format!("ticket {number} was opened before, has expired or never was"),
                        "a pickled result can be loaded once; publish it by name to share it with many",
                    ));
                };
                let granted = self.lease(session, ticket.extent)?;
                self.end_ticket(number);
                Ok((granted, String::new()))
            }
            Target::Again(extent) => {
                let entry = self.registry.leased_mut(extent.segment, extent.generation);
                let entry = entry.filter(|e| e.leases_of(session) > 0 && e.has(&extent)).ok_or_else(gone)?;
                // Whatever was sent before did not arrive.
                let before = entry.mapped.len();
                entry.mapped.retain(|s| *s != session);
                let sent = entry.mapped.len() < before;
                let granted = self.lease(session, extent);
                if granted.is_err()
                    && sent
                    && let Some(entry) = self.registry.get_mut(extent.segment)
                {
                    entry.mapped.push(session);
                }
                Ok((granted?, String::new()))
            }
        }
    }

    pub(crate) fn make_ticket(
        &mut self,
        session: u64,
        extent: Extent,
        secret: [u8; 16],
    ) -> Result<u64, Trouble> {
        let most = self.max_holds();
        if self.account(session)?.holds >= most {
            return Err(too_many_holds(most));
        }
        let entry = self.registry.complete_mut(extent.segment, extent.generation);
        let entry = entry.filter(|e| e.leases_of(session) > 0 && e.has(&extent)).ok_or_else(gone)?;
        entry.tickets += 1;
        self.account(session)?.holds += 1;
        Ok(self.tickets.add(secret, extent, session))
    }

    /// Removes a ticket and its hold.
    pub(crate) fn end_ticket(&mut self, number: u64) {
        if let Some(ticket) = self.tickets.remove(number) {
            self.ticket_ended(ticket.extent, ticket.sender);
        }
    }

    /// Removes tickets that have expired.
    pub(crate) fn expire_tickets(&mut self, ttl: std::time::Duration) {
        while let Some(ticket) = self.tickets.take_expired(ttl) {
            self.counters.expired_tickets += 1;
            self.ticket_ended(ticket.extent, ticket.sender);
        }
    }

    /// Removes tickets of ended senders beyond what these may leave, at most `batch`; false if there are no more.
    pub(crate) fn drop_orphans(&mut self, batch: usize) -> bool {
        let tickets = self.tickets.take_orphans(self.max_holds(), batch);
        self.counters.expired_tickets += tickets.len() as u64;
        for ticket in &tickets {
            self.ticket_ended(ticket.extent, ticket.sender);
        }
        !tickets.is_empty()
    }

    fn ticket_ended(&mut self, extent: Extent, sender: u64) {
        if let Ok(account) = self.account(sender) {
            account.holds = account.holds.saturating_sub(1);
        }
        if let Some(entry) = self.registry.complete_mut(extent.segment, extent.generation) {
            entry.tickets = entry.tickets.saturating_sub(1);
            self.settle(extent.segment);
        }
    }

    /// Puts a result that the session leases under a name.
    pub(crate) fn publish(
        &mut self,
        session: &Session,
        extent: Extent,
        origin: Origin,
        name: String,
        replace: bool,
        most: u64,
    ) -> Result<(), Trouble> {
        let entry = self.registry.complete_mut(extent.segment, extent.generation);
        entry.filter(|e| e.leases_of(session.id) > 0 && e.has(&extent)).ok_or_else(gone)?;
        if self.is_published(&origin, &name, replace, most)? {
            return Ok(());
        }
        let Some(entry) = self.registry.get_mut(extent.segment) else { return Err(gone()) };
        entry.datasets += 1;
        entry.exposed = true;
        let before = self.catalog.put(Dataset {
            name,
            extent,
            origin,
            created: SystemTime::now(),
            pid: session.pid,
            command: session.command.clone(),
        });
        if let Some(before) = before {
            self.unpublished(&before);
        }
        Ok(())
    }

    /// Whether a result has a name already, or may have it.
    pub(crate) fn is_published(
        &self,
        origin: &Origin,
        name: &str,
        replace: bool,
        most: u64,
    ) -> Result<bool, Trouble> {
        if let Some(there) = self.catalog.get(name) {
            if there.origin.extent == origin.extent {
                return Ok(true);
            }
            if !replace {
                return Err(name_exists(name));
            }
        } else if self.catalog.len() as u64 >= most {
            return Err(Trouble::new(
                ErrorCode::Limit,
                format!("the catalog has {most} datasets, which is the most there can be"),
                "drop datasets that are not needed (`shmquant ls` lists them, `q.drop(name)` drops one)",
            ));
        }
        // The request that holds the flight comes with a fingerprint; others must not take its name.
        if origin.fingerprint.is_none()
            && !replace
            && self.catalog.flights().any(|(flight, _)| flight == name)
        {
            return Err(name_exists(name));
        }
        Ok(false)
    }

    pub(crate) fn drop_dataset(&mut self, name: &str) -> Result<(), Trouble> {
        let dataset = self.catalog.remove(name).ok_or_else(|| no_dataset(name))?;
        self.unpublished(&dataset);
        Ok(())
    }

    fn unpublished(&mut self, dataset: &Dataset) {
        if let Some(entry) = self.registry.get_mut(dataset.extent.segment) {
            entry.datasets = entry.datasets.saturating_sub(1);
            self.settle(dataset.extent.segment);
        }
    }
}

fn no_dataset(name: &str) -> Trouble {
    Trouble::new(ErrorCode::NotFound, format!("no dataset is called {name:?}"), "`shmquant ls` lists them")
}

/// The name belongs to something else.
pub(crate) fn name_exists(name: &str) -> Trouble {
    Trouble::new(
        ErrorCode::NameExists,
        format!("a dataset {name:?} of another spec or source exists"),
        "choose another name, or replace it (replace=True)",
    )
}
