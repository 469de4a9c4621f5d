//! What `STAT` and `LIST` say, as JSON.

use std::sync::atomic::Ordering;
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};
use shmquant_protocol::message::{Listing, Message};
use shmquant_protocol::segment::Kind;

use crate::books::Books;
use crate::catalog::Dataset;
use crate::hub::Hub;
use crate::life::{Life, ResultLife};
use crate::registry::Entry;

/// Bytes of entries in one page of a list: with the frame's own parts well below the longest frame.
const PAGE: usize = 60_000;
/// Most holders that an entry names.
const HOLDERS: usize = 16;

/// The daemon's state in numbers.
pub(crate) fn stat(hub: &Hub) -> String {
    // Before the books: a session leaves them before its connection ends, so there never are more sessions than connections.
    let connections = hub.connections();
    let books = hub.books();
    let (mut leases, mut leased, mut pooled, mut windows, mut inputs) = (0, 0, 0, 0, 0);
    let (mut filling, mut named, mut ticketed) = (0, 0, 0);
    for entry in books.registry.iter() {
        leases += entry.leases.iter().map(|(_, n)| u64::from(*n)).sum::<u64>();
        match entry.life {
            _ if entry.is_free() => pooled += entry.size,
            Life::Result(ResultLife::Filling) => filling += entry.size,
            Life::Result(ResultLife::Complete) if entry.datasets > 0 => named += entry.size,
            Life::Result(ResultLife::Complete) if entry.is_on_its_way() => ticketed += entry.size,
            Life::Result(ResultLife::Complete) => leased += entry.size,
            Life::Window(_) if entry.life.is_retired() => {}
            Life::Window(_) if entry.is_input() => inputs += entry.size,
            Life::Window(_) => windows += entry.size,
            _ => {}
        }
    }
    let lanes: usize = books.sessions.values().map(|a| a.lanes.len()).sum();
    let counters = books.counters;
    let mut value = json!({
        "version": env!("CARGO_PKG_VERSION"),
        "pid": std::process::id(),
        "instance": format!("{:016x}", hub.instance),
        "address": hub.config.address.to_string_lossy(),
        "backing": hub.config.backing.to_string(),
        "workers": hub.config.workers,
        "uptime_s": hub.started.elapsed().as_secs(),
        "budget": books.admission.limit(),
        "bytes": books.charged(),
        "bytes_by_use": {
            "results": leased, "datasets": named, "tickets": ticketed, "filling": filling, "pools": pooled, "windows": windows,
            "inputs": inputs, "leaving": books.registry.leaving(), "growing": books.admission.growing(),
        },
        "segments": books.registry.len(),
        "sessions": books.sessions.len(),
        "lanes": lanes,
        "leases": leases,
        "tickets": books.tickets.len(),
        "orphans": books.tickets.orphans(),
        "datasets": books.catalog.len(),
        "waiting": books.admission.waiting(),
        "refused": books.admission.refused,
        "requests": counters.requests,
        "bytes_copied": counters.bytes_copied,
        "bytes_shared": counters.bytes_shared,
        "recycled": counters.recycled,
        "retired": counters.retired,
        "stray_releases": counters.stray_releases,
        "expired_tickets": counters.expired_tickets,
    });
    drop(books);
    value["jobs"] = hub.jobs.load(Ordering::Acquire).into();
    value["runs"] = hub.engine.runs().into();
    value["connections"] = connections.into();
    value["fds"] = std::fs::read_dir("/proc/self/fd").map_or(0, Iterator::count).into();
    value.to_string()
}

/// One page of a list: entries after `cursor`, and the cursor of the next page.
pub(crate) fn list(hub: &Hub, cursor: u64, what: Listing) -> Message {
    let books = hub.books();
    let mut page = Page { entries: Vec::new(), bytes: 0, last: cursor, more: false };
    match what {
        Listing::Datasets => {
            for (serial, dataset) in books.catalog.after(cursor) {
                if !page.push(serial, || dataset_entry(&books, dataset)) {
                    break;
                }
            }
            // On the last page, what is still being made.
            if !page.more {
                for (name, since) in books.catalog.flights() {
                    let flight = json!({"name": name, "state": "filling", "age_s": age(since)});
                    if !page.push(page.last, || flight) {
                        page.more = false;
                        break;
                    }
                }
            }
        }
        Listing::Results => {
            page.push_segments(&books, |e| e.is_complete() && !e.leases.is_empty(), result_entry);
        }
        Listing::Inputs => {
            page.push_segments(&books, |e| e.is_input() && e.is_leasable() && e.is_held(), input_entry);
        }
        Listing::Sessions => {
            for id in books.sessions.range(cursor.saturating_add(1)..).map(|(id, _)| *id) {
                if !page.push(id, || session_entry(&books, id)) {
                    break;
                }
            }
        }
    }
    Message::Listed { cursor: if page.more { page.last } else { 0 }, entries: page.entries }
}

struct Page {
    entries: Vec<String>,
    bytes: usize,
    last: u64,
    more: bool,
}

impl Page {
    /// Adds an entry; false if it is for the next page.
    fn push(&mut self, cursor: u64, entry: impl FnOnce() -> Value) -> bool {
        let text = entry().to_string();
        if self.bytes + text.len() + 4 > PAGE {
            self.more = true;
            return false;
        }
        self.bytes += text.len() + 4;
        self.entries.push(text);
        self.last = cursor;
        true
    }

    /// Adds segments of one kind, in the order of their numbers.
    fn push_segments(
        &mut self,
        books: &Books,
        wanted: impl Fn(&Entry) -> bool,
        show: fn(&Books, &Entry) -> Value,
    ) {
        let after = self.last;
        let mut entries: Vec<_> = books.registry.iter().filter(|e| e.id > after && wanted(e)).collect();
        entries.sort_by_key(|e| e.id);
        for entry in entries {
            if !self.push(entry.id, || show(books, entry)) {
                break;
            }
        }
    }
}

fn dataset_entry(books: &Books, dataset: &Dataset) -> Value {
    let entry = books.registry.get(dataset.extent.segment);
    json!({
        "name": dataset.name,
        "state": entry.map_or("gone", |e| e.life.word()),
        "size": entry.map_or(0, |e| e.size),
        "length": dataset.extent.length,
        "path": entry.and_then(|e| e.memory.as_ref()?.path()).map(|p| p.to_string_lossy().into_owned()),
        "age_s": age(dataset.created),
        "created": seconds(dataset.created),
        "pid": dataset.pid,
        "command": dataset.command,
        "holders": entry.map_or(Value::Null, |e| holders(books, e)),
    })
}

fn result_entry(books: &Books, entry: &Entry) -> Value {
    json!({
        "segment": entry.id,
        "generation": entry.generation,
        "state": entry.life.word(),
        "size": entry.size,
        "length": entry.length(),
        "results": entry.parts.len(),
        "age_s": entry.since.elapsed().as_secs(),
        "created": seconds(entry.created),
        "tickets": entry.tickets,
        "dataset": entry.datasets > 0,
        "holders": holders(books, entry),
    })
}

fn input_entry(books: &Books, entry: &Entry) -> Value {
    json!({
        "segment": entry.id,
        "generation": entry.generation,
        "state": "input",
        "size": entry.size,
        "length": entry.length(),
        "age_s": age(entry.created),
        "created": seconds(entry.created),
        "readers": entry.readers,
        "holders": holders(books, entry),
    })
}

fn session_entry(books: &Books, id: u64) -> Value {
    let Some(account) = books.sessions.get(&id) else { return Value::Null };
    let entries = account.segments.iter().filter_map(|segment| books.registry.get(*segment));
    let (mut results, mut bytes, mut windows, mut inputs) = (0, 0, 0, 0);
    for entry in entries {
        match entry.kind {
            Kind::Window if !entry.life.is_retired() => windows += entry.size,
            Kind::Input if entry.leases_of(id) > 0 => inputs += entry.size,
            _ if entry.leases_of(id) > 0 => {
                results += 1;
                bytes += entry.size;
            }
            _ => {}
        }
    }
    json!({
        "session": id,
        "pid": account.session.pid,
        "command": account.session.command,
        "age_s": age(account.session.started),
        "lanes": account.lanes.len(),
        "results": results,
        "bytes": bytes,
        "pool_bytes": account.pool.bytes(),
        "window_bytes": windows,
        "input_bytes": inputs,
        "holds": account.holds,
    })
}

fn holders(books: &Books, entry: &Entry) -> Value {
    let pids = entry.leases.iter().filter_map(|(s, _)| books.sessions.get(s).map(|a| a.session.pid));
    pids.take(HOLDERS).collect::<Vec<_>>().into()
}

fn age(since: SystemTime) -> u64 {
    since.elapsed().map_or(0, |age| age.as_secs())
}

fn seconds(at: SystemTime) -> f64 {
    at.duration_since(UNIX_EPOCH).map_or(0.0, |d| d.as_secs_f64())
}
