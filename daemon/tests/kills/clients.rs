//! Clients are killed at every step, and the daemon has what it had before.

use std::collections::HashMap;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use shmquant_daemon::{Config, serve_main};
use shmquant_protocol::chunks::MIN_WINDOW;
use shmquant_protocol::client::Held;
use shmquant_protocol::failpoint;
use shmquant_protocol::message::{ErrorCode, Listing};

use crate::life::{SMALL, Ticket, live, passed};
use crate::native::{check, session_at};
use crate::neighbours;
use crate::place::{Holdings, Neighbour, PATIENCE, Place, Served, Witness, maps, private_kib, wait_until};

const ROLE: &str = "SHMQUANT_TEST_ROLE";
const NUMBER: &str = "SHMQUANT_TEST_NUMBER";
const TICKET: &str = "SHMQUANT_TEST_TICKET";
/// How many clients are killed; `make soak` asks for more.
const KILLS: &str = "SHMQUANT_KILLS";
pub(crate) const USUAL_KILLS: usize = 200;
/// Clients that live at the same time.
const BATCH: usize = 4;
/// At these a ticket may have been made of which nobody has heard: it lasts until it expires.
const TICKET_LOST: &[&str] = &["client.asked", "client.answered", "client.ticket_made"];

/// A failpoint and at which of its hits.
type Point = (&'static str, u64);

/// What this process is to do as somebody's child.
pub(crate) fn play() {
    match std::env::var(ROLE).as_deref() {
        Ok("life") => live_here(),
        Ok(neighbours::ROLE) => neighbours::play(),
        Ok("short tickets") => {
            let ticket_ttl = Duration::from_secs(1);
            let budget = Some(512 << 20);
            serve_main(Config { ticket_ttl, workers: 2, window: MIN_WINDOW, budget, ..Config::default() })
                .unwrap();
        }
        _ => {}
    }
}

/// This program as a child that plays a role.
pub(crate) fn role(role: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "child", "--nocapture", "--test-threads=1"]).env(ROLE, role);
    command
}

fn live_here() {
    use std::io::Write;
    let say = |text: String| {
        let mut out = std::io::stdout().lock();
        writeln!(out, "\n{text}").and_then(|()| out.flush()).unwrap();
    };
    let variable = |name: &str| std::env::var(name).ok();
    let number = variable(NUMBER).unwrap().parse().unwrap();
    let given = variable(TICKET).map(|text| parse_ticket(&text));
    let path = std::env::var_os("SHMQUANT_ADDRESS").unwrap();
    let session = session_at(Path::new(&path), None);
    live(&session, number, given, &say).unwrap();
    // Both ways to say goodbye: at once, and with the last hold.
    if number % 2 == 0 {
        session.close();
    } else {
        drop(session);
        wait_until("goodbye", || if passed("client.bye_sent") > 0 { Ok(()) } else { Err("not said".into()) });
    }
    for (name, count) in failpoint::passed() {
        say(format!("passed {name} {count}"));
    }
    say("done".to_owned());
}

fn parse_ticket(text: &str) -> Ticket {
    let (number, secret) = text.split_once(' ').unwrap();
    (number.parse().unwrap(), secret.parse::<u128>().unwrap().to_le_bytes())
}

/// How a client's life went.
struct Lived {
    number: u64,
    killed: bool,
    lines: Vec<String>,
}

impl Lived {
    /// Lets a client live until it comes by the `hit`th `name`.
    fn run(path: &Path, number: u64, given: Option<Ticket>, point: Option<Point>) -> Self {
        let mut command = role("life");
        command.env("SHMQUANT_ADDRESS", path).env(NUMBER, number.to_string());
        if let Some((ticket, secret)) = given {
            command.env(TICKET, format!("{ticket} {}", u128::from_le_bytes(secret)));
        }
        if let Some((name, hit)) = point {
            command.env(failpoint::VARIABLE, format!("{name}:{hit}"));
        }
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let child = command.spawn().unwrap();
        let pid = Pid::from_raw(child.id().cast_signed());
        let (ended, watch) = mpsc::channel::<()>();
        let output = std::thread::scope(|scope| {
            // A client that hangs shows it by SIGTERM instead of SIGKILL.
            scope.spawn(move || {
                if watch.recv_timeout(PATIENCE) == Err(mpsc::RecvTimeoutError::Timeout) {
                    let _ = kill(pid, Signal::SIGTERM);
                }
            });
            let output = child.wait_with_output().unwrap();
            drop(ended);
            output
        });
        let lines: Vec<String> = String::from_utf8_lossy(&output.stdout).lines().map(str::to_owned).collect();
        let killed = output.status.signal() == Some(Signal::SIGKILL as i32) && point.is_some();
        let done = output.status.success() && lines.iter().any(|line| line == "done");
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(killed || done, "{point:?}: {}\n{lines:#?}\n{errors}", output.status);
        Self { number, killed, lines }
    }

    fn said(&self, what: &str) -> bool {
        self.lines.iter().any(|line| line == what)
    }

    fn ticket(&self) -> Option<Ticket> {
        self.lines.iter().find_map(|line| line.strip_prefix("ticket ")).map(parse_ticket)
    }

    fn passed(&self) -> HashMap<String, u64> {
        let lines = self.lines.iter().filter_map(|line| line.strip_prefix("passed "));
        lines
            .filter_map(|line| line.split_once(' '))
            .map(|(n, c)| (n.to_owned(), c.parse().unwrap()))
            .collect()
    }
}

/// A daemon, who watches it, and how often lives come by each failpoint.
struct Stage {
    place: Place,
    served: Served,
    witness: Witness,
    neighbour: Neighbour,
    lives: u64,
    /// Whether a ticket may expire under the eyes of those who would open it.
    short: bool,
}

impl Stage {
    fn new(place: Place, served: Served, short: bool) -> Self {
        let witness = Witness::new(session_at(&place.socket(), None));
        let neighbour = Neighbour::new(&place.socket());
        neighbour.work();
        Self { place, served, witness, neighbour, lives: 0, short }
    }

    fn holdings(&self) -> Holdings {
        Holdings::of(&self.witness.session, self.served.pid())
    }

    /// A base line that stays: the same twice, with work in between.
    fn settled(&self) -> Holdings {
        Holdings::at_rest(&self.witness.session, self.served.pid(), || self.neighbour.work())
    }

    /// Lets clients live at the same time, each up to its failpoint, and gives back what documented holds they left.
    fn run(&mut self, points: &[Option<Point>]) -> Vec<Lived> {
        let path = self.place.socket();
        let tickets: Vec<_> = points.iter().map(|_| (!self.short).then(|| self.give())).collect();
        let first = self.lives;
        self.lives += points.len() as u64;
        let connections = self.holdings().connections();
        let lived: Vec<Lived> = std::thread::scope(|scope| {
            let mut threads = Vec::new();
            for ((number, point), given) in (first..).zip(points).zip(&tickets) {
                let path = &path;
                threads.push(scope.spawn(move || Lived::run(path, number, *given, *point)));
            }
            self.neighbour.work();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        self.witness.check();
        // What a client sent before it died may still be on its way, and make a dataset.
        wait_until("the connections of the dead end", || {
            let now = self.holdings();
            if now.connections() <= connections { Ok(()) } else { Err(format!("{now:?}")) }
        });
        for (life, given) in lived.iter().zip(tickets) {
            self.inherit(life, given);
        }
        lived
    }

    fn give(&self) -> Ticket {
        self.witness.session.ticket(&self.witness.held).unwrap()
    }

    /// Takes over the holds that outlive a client, each of which has to be there, and drops them.
    fn inherit(&self, life: &Lived, given: Option<Ticket>) {
        let open = |(ticket, secret): Ticket, must: bool| -> Option<Held> {
            match self.witness.session.open_ticket(ticket, secret) {
                Ok(held) => Some(held),
                Err(error) if !must && error.code() == Some(ErrorCode::NotFound) => None,
                Err(error) => panic!("a ticket of life {} does not open: {error}", life.number),
            }
        };
        // The witness's own: consumed by the client, or still there.
        if let Some(given) = given
            && let Some(held) = open(given, false)
        {
            assert!(!life.said("opened"), "a ticket opened twice");
            self.witness.check_copy(&held);
        }
        // The client's: made by somebody who is dead by now.
        if let Some(ticket) = life.ticket()
            && let Some(held) = open(ticket, !self.short)
        {
            check(&held, SMALL);
        }
        let prefix = format!("life-{}/", life.number);
        let session = &self.witness.session;
        let mut names = Vec::new();
        for entry in session.list(Listing::Datasets).unwrap() {
            let entry: serde_json::Value = serde_json::from_str(&entry).unwrap();
            let name = entry["name"].as_str().unwrap();
            // What is still filling goes with its request.
            if name.starts_with(&prefix) && entry["state"] == "complete" {
                names.push(name.to_owned());
            }
        }
        if life.said("published") && !life.said("dropping") {
            assert!(names.contains(&format!("{prefix}a")), "a dataset went with its maker: {names:?}");
        }
        for name in names {
            match session.open(&name) {
                Ok(held) => check(&held, SMALL),
                // Dropped by requests of the dead that were still under way.
                Err(error) => assert_eq!(error.code(), Some(ErrorCode::NotFound), "{error}"),
            }
            if let Err(error) = session.drop_dataset(&name) {
                assert_eq!(error.code(), Some(ErrorCode::NotFound), "{error}");
            }
        }
    }

    /// How often a life comes by each failpoint.
    fn measure(&mut self) -> HashMap<String, u64> {
        let lived = self.run(&[None, None]);
        let mut counts = HashMap::new();
        for (name, count) in lived.iter().flat_map(Lived::passed) {
            let most: &mut u64 = counts.entry(name).or_default();
            *most = (*most).max(count);
        }
        counts
    }

    /// Kills `kills` clients at the named failpoints in turn, early ones and late ones, and after each batch compares.
    fn kill_all(&mut self, names: &[&'static str], kills: usize, each: impl Fn(&Self, &str)) {
        let counts = self.measure();
        let rounds = kills.div_ceil(names.len()) as u64;
        let mut points = Vec::new();
        for i in 0..kills {
            let (name, round) = (names[i % names.len()], (i / names.len()) as u64);
            let count = counts.get(name).copied().unwrap_or(0);
            assert!(count > 0, "no life comes by {name}: {counts:?}");
            points.push((name, 1 + round * count / rounds));
        }
        let mut died: HashMap<&str, usize> = HashMap::new();
        let mut attempts = 0;
        while !points.is_empty() {
            attempts += 1;
            assert!(attempts < 10 * kills, "these are never met: {points:?}");
            let batch: Vec<_> = points.drain(..points.len().min(BATCH)).collect();
            let wanted: Vec<_> = batch.iter().map(|point| Some(*point)).collect();
            for (life, (name, hit)) in self.run(&wanted).iter().zip(&batch) {
                if life.killed {
                    *died.entry(name).or_default() += 1;
                } else {
                    // Lives differ a little: one that came by less often is lived again, up to an earlier hit.
                    points.push((name, (hit / 2).max(1)));
                }
            }
            each(self, &format!("{batch:?}"));
        }
        assert_eq!(died.values().sum::<usize>(), kills);
        assert!(names.iter().all(|name| died.contains_key(name)), "{died:?}");
    }
}

pub(crate) fn kills() -> usize {
    std::env::var(KILLS).ok().map_or(USUAL_KILLS, |text| text.parse().unwrap())
}

#[test]
fn a_client_killed_anywhere_leaves_nothing_behind() {
    let place = Place::new();
    let served = Served::start(place.command());
    let mut stage = Stage::new(place, served, false);
    let base = stage.settled();
    let names: Vec<&str> = failpoint::ALL.iter().copied().filter(|n| n.starts_with("client.")).collect();
    let names: Vec<&str> = names.into_iter().filter(|name| !TICKET_LOST.contains(name)).collect();
    let total = kills();
    // A part of them is killed in the test below.
    let kills = total - total / 8;
    let pid = stage.served.pid();
    let sizes = std::cell::RefCell::new(Vec::new());
    stage.kill_all(&names, kills, |stage, batch| {
        stage.neighbour.work();
        base.wait_for(&stage.witness.session, pid, batch);
        stage.witness.check();
        sizes.borrow_mut().push((maps(pid).lines().count(), private_kib(pid)));
    });
    // Heaps and stacks of the C library come and go, but they do not become ever more.
    let sizes = sizes.into_inner();
    let (early, late) = sizes.split_at(sizes.len() / 2);
    let most = |of: &[(usize, usize)]| {
        (of.iter().map(|(lines, _)| *lines).max().unwrap(), of.iter().map(|(_, kib)| *kib).max().unwrap())
    };
    let ((lines, kib), (lines_late, kib_late)) = (most(early), most(late));
    assert!(lines_late <= lines + 40 && kib_late <= kib + (16 << 10), "{sizes:?}");
}

#[test]
fn a_ticket_that_nobody_heard_of_lasts_until_it_expires() {
    let place = Place::new();
    let mut command = role("short tickets");
    place.prepare(&mut command);
    let served = Served::start(command);
    let mut stage = Stage::new(place, served, true);
    let base = stage.settled();
    let pid = stage.served.pid();
    stage.kill_all(TICKET_LOST, (kills() / 8).max(TICKET_LOST.len()), |stage, _| {
        stage.neighbour.work();
        stage.witness.check();
    });
    base.wait_for(&stage.witness.session, pid, "tickets have expired");
}
