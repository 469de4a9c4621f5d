//! Named steps of both life cycles at which a test can have the process killed.
//!
//! Only debug builds have them; in release builds [`failpoint`] is empty. `SHMQUANT_FAILPOINT=name` makes the process kill
//! itself with SIGKILL where it first comes by `name`, `name:3` where it does so for the third time. `@path` waits for a file of that
//! name with such a text in it, counts from then on, and renames the file to `path.hit` before the kill.

/// The environment variable that arms one of them.
pub const VARIABLE: &str = "SHMQUANT_FAILPOINT";

/// Every name, clients' first. A test demands that a process dies at each of them.
pub const ALL: &[&str] = &[
    // The client: a session begins.
    "client.connected",
    "client.hello_sent",
    "client.hello_received",
    // A lane begins.
    "client.lane_connected",
    "client.join_sent",
    "client.join_received",
    "client.window_mapped",
    // A request.
    "client.descriptor_half_written",
    "client.quantize_sent",
    "client.chunk_filled",
    "client.wrote",
    "client.streamed",
    "client.cancel_sent",
    "client.reply_received",
    "client.mapped",
    "client.leased",
    "client.asked_on_lane",
    "client.allocated",
    // Sharing.
    "client.asked",
    "client.answered",
    "client.ticket_made",
    "client.opened",
    "client.published",
    // The way back.
    "client.release_sent",
    "client.unmapped",
    "client.unmap_answered",
    "client.bye_sent",
    // The daemon: connections begin.
    "daemon.accepted",
    "daemon.hello_received",
    "daemon.session_opened",
    "daemon.welcomed",
    "daemon.lane_entered",
    "daemon.window_made",
    "daemon.joined",
    // A request.
    "daemon.quantize_received",
    "daemon.descriptor_copied",
    "daemon.planned",
    "daemon.name_reserved",
    "daemon.admitted",
    "daemon.segment_made",
    "daemon.filling",
    "daemon.chunk_started",
    "daemon.chunk_ended",
    "daemon.consumed_sent",
    "daemon.completing",
    "daemon.file_written",
    "daemon.completed",
    "daemon.leased",
    "daemon.reply_sent",
    "daemon.aborted",
    "daemon.input_made",
    "daemon.allocated",
    "daemon.warmed",
    "daemon.pinned",
    "daemon.unpinned",
    // Sharing.
    "daemon.ticket_made",
    "daemon.copied",
    "daemon.opened",
    "daemon.published",
    "daemon.dropped",
    // The way back.
    "daemon.released",
    "daemon.recycled",
    "daemon.retired",
    "daemon.unmap_sent",
    "daemon.unmapped",
    "daemon.reaped",
    "daemon.lane_ended",
    "daemon.session_ended",
    "daemon.session_forgotten",
    // The daemon's own beginning and end.
    "daemon.bound",
    "daemon.sweeping",
    "daemon.announced",
    "daemon.assembled",
    "daemon.serving",
    "daemon.stopping",
    "daemon.closed",
    "daemon.emptied",
];

/// A step that a test may make the last one of this process. `name` is one of [`ALL`].
#[inline(always)]
pub fn failpoint(name: &'static str) {
    #[cfg(debug_assertions)]
    armed::pass(name);
    #[cfg(not(debug_assertions))]
    let _ = name;
}

/// How often this process has come by each name so far; empty in release builds.
pub fn passed() -> Vec<(&'static str, u64)> {
    #[cfg(debug_assertions)]
    return armed::passed();
    #[cfg(not(debug_assertions))]
    Vec::new()
}

#[cfg(debug_assertions)]
mod armed {
    use std::path::PathBuf;
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicU64, Ordering};

    use nix::sys::signal::{Signal, kill};
    use nix::unistd::Pid;

    use super::{ALL, VARIABLE};

    static COUNTS: [AtomicU64; ALL.len()] = [const { AtomicU64::new(0) }; ALL.len()];
    static TRIGGER: OnceLock<Trigger> = OnceLock::new();
    static ARMED: OnceLock<Armed> = OnceLock::new();

    enum Trigger {
        Never,
        Text(String),
        File(PathBuf),
    }

    struct Armed {
        name: String,
        left: AtomicU64,
    }

    pub(super) fn pass(name: &'static str) {
        let at = ALL.iter().position(|n| *n == name);
        debug_assert!(at.is_some(), "{name} is not in the list of failpoints");
        if let Some(count) = at.and_then(|at| COUNTS.get(at)) {
            count.fetch_add(1, Ordering::Relaxed);
        }
        let trigger = TRIGGER.get_or_init(trigger);
        let armed = match (ARMED.get(), trigger) {
            (Some(armed), _) => armed,
            (None, Trigger::Never) => return,
            (None, Trigger::Text(text)) => ARMED.get_or_init(|| parse(text)),
            (None, Trigger::File(path)) => match std::fs::read_to_string(path) {
                Ok(text) => ARMED.get_or_init(|| parse(&text)),
                Err(_) => return,
            },
        };
        // The last of the hits that were asked for is the one that takes the count to 0.
        if armed.name == name && armed.left.fetch_sub(1, Ordering::SeqCst) == 1 {
            if let Trigger::File(path) = trigger {
                let mut hit = path.clone().into_os_string();
                hit.push(".hit");
                let _ = std::fs::rename(path, hit);
            }
            let _ = kill(Pid::this(), Signal::SIGKILL);
            loop {
                std::thread::park();
            }
        }
    }

    pub(super) fn passed() -> Vec<(&'static str, u64)> {
        ALL.iter().zip(&COUNTS).map(|(name, count)| (*name, count.load(Ordering::Relaxed))).collect()
    }

    fn trigger() -> Trigger {
        match std::env::var(VARIABLE) {
            Ok(text) if text.is_empty() => Trigger::Never,
            Ok(text) => match text.strip_prefix('@') {
                Some(path) => Trigger::File(path.into()),
                None => Trigger::Text(text),
            },
            Err(_) => Trigger::Never,
        }
    }

    fn parse(text: &str) -> Armed {
        let (name, count) = text.trim().split_once(':').unwrap_or((text.trim(), "1"));
        Armed { name: name.to_owned(), left: AtomicU64::new(count.parse().unwrap_or(1)) }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn names_are_told_apart() {
        assert_eq!(ALL.iter().collect::<HashSet<_>>().len(), ALL.len());
        assert!(ALL.iter().all(|name| name.starts_with("client.") || name.starts_with("daemon.")));
    }

    #[test]
    fn what_is_passed_is_counted_in_debug_builds() {
        let count = || passed().iter().find(|(name, _)| *name == "client.bye_sent").map(|(_, n)| *n);
        let before = count();
        failpoint("client.bye_sent");
        if cfg!(debug_assertions) {
            assert!(count() > before);
        } else {
            assert_eq!(before, None);
        }
    }
}
