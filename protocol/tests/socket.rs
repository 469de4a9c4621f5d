//! Connections, with real sockets, descriptors, processes and kills.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "tests fail by panicking, and a child says that it is through"
)]

mod child;

use std::fs::{self, File, Permissions};
use std::io::{self, IoSlice, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use nix::unistd::{Pid, getegid, geteuid};
use shmquant_protocol::socket::{
    Connection, LOCK_SUFFIX, Listener, MAX_FDS, MAX_FRAME, Received, SocketError,
};

fn soon() -> Option<Instant> {
    Some(Instant::now() + Duration::from_secs(60))
}

/// Sends what `Connection::send` refuses to.
fn send_raw(to: &Connection, frame: &[u8], fds: &[RawFd]) {
    let rights = [ControlMessage::ScmRights(fds)];
    let control = if fds.is_empty() { &[][..] } else { &rights };
    let fd = to.as_fd().as_raw_fd();
    sendmsg::<()>(fd, &[IoSlice::new(frame)], control, MsgFlags::MSG_DONTWAIT, None).unwrap();
}

/// Whether no process holds a writing end of this pipe any more.
fn is_at_end(mut pipe: io::PipeReader) -> bool {
    let mut polled = [PollFd::new(pipe.as_fd(), PollFlags::POLLIN)];
    poll(&mut polled, PollTimeout::ZERO).unwrap() == 1 && pipe.read(&mut [0]).unwrap() == 0
}

fn ids(fd: impl AsFd) -> (u64, u64) {
    let meta = File::from(fd.as_fd().try_clone_to_owned().unwrap()).metadata().unwrap();
    (meta.dev(), meta.ino())
}

#[test]
fn frames_keep_their_borders_and_their_descriptors() {
    let (a, b) = Connection::pair().unwrap();
    let files: Vec<File> = (0..MAX_FDS).map(|_| tempfile::tempfile().unwrap()).collect();
    for count in 0..=MAX_FDS {
        let lent: Vec<BorrowedFd<'_>> = files[..count].iter().map(AsFd::as_fd).collect();
        a.send(&vec![count as u8; count + 1], &lent).unwrap();
    }
    let (mut buf, mut fds) = ([0xEE; MAX_FRAME], vec![tempfile::tempfile().unwrap().into()]);
    for count in 0..=MAX_FDS {
        let received = b.recv(&mut buf, &mut fds).unwrap();
        assert_eq!(received, Received { len: count + 1, fds: count });
        assert!(buf[..=count].iter().all(|byte| *byte == count as u8));
        assert_eq!(fds.len(), count);
        for (fd, file) in fds.iter().zip(&files) {
            assert_eq!(ids(fd), ids(file));
            let flags = FdFlag::from_bits_retain(fcntl(fd, FcntlArg::F_GETFD).unwrap());
            assert!(flags.contains(FdFlag::FD_CLOEXEC));
        }
    }
    assert_eq!(b.try_recv(&mut buf, &mut fds).unwrap(), None);
}

#[test]
fn only_frames_of_the_protocol_are_sent() {
    let (a, b) = Connection::pair().unwrap();
    let mut buf = vec![0; MAX_FRAME];
    for len in [0, MAX_FRAME + 1, 10 * MAX_FRAME] {
        let refused = a.send(&vec![1; len], &[]).unwrap_err();
        assert!(matches!(refused, SocketError::BadFrameLength { len: l, .. } if l == len), "{refused}");
    }
    let refused = a.send(&[1], &[a.as_fd(); MAX_FDS + 1]).unwrap_err();
    assert!(matches!(refused, SocketError::TooManyFds { count: 9, max: 8 }), "{refused}");
    assert_eq!(b.try_recv(&mut buf, &mut Vec::new()).unwrap(), None, "nothing went out");

    let longest: Vec<u8> = (0..MAX_FRAME).map(|i| (i * 7) as u8).collect();
    a.send(&longest, &[]).unwrap();
    assert_eq!(b.recv(&mut buf, &mut Vec::new()).unwrap().len, MAX_FRAME);
    assert_eq!(buf, longest);
}

#[test]
fn what_breaks_the_protocol_is_told_apart_and_leaves_no_descriptor() {
    let _closed_is_closed = child::no_forks();
    let (a, b) = Connection::pair().unwrap();
    let (mut buf, mut fds) = ([0; 16], Vec::new());
    let pipe = || {
        let (reader, writer) = io::pipe().unwrap();
        (reader, OwnedFd::from(writer))
    };
    // Longer than the buffer.
    let (reader, writer) = pipe();
    a.send(&[1; 17], &[writer.as_fd()]).unwrap();
    drop(writer);
    let error = b.recv(&mut buf, &mut fds).unwrap_err();
    assert!(matches!(error, SocketError::FrameTruncated { len: 17, room: 16 }), "{error}");
    assert!(fds.is_empty() && is_at_end(reader));
    // More descriptors than a frame may have.
    let (reader, writer) = pipe();
    send_raw(&a, &[1; 4], &[writer.as_raw_fd(); MAX_FDS + 1]);
    drop(writer);
    let error = b.recv(&mut buf, &mut fds).unwrap_err();
    assert!(matches!(error, SocketError::TooManyFdsReceived { max: MAX_FDS }), "{error}");
    assert!(fds.is_empty() && is_at_end(reader));
    // The connection is as good as before.
    a.send(b"next", &[]).unwrap();
    assert_eq!(b.recv(&mut buf, &mut fds).unwrap(), Received { len: 4, fds: 0 });
    // Empty.
    let (reader, writer) = pipe();
    send_raw(&a, &[], &[writer.as_raw_fd()]);
    drop(writer);
    let error = b.recv(&mut buf, &mut fds).unwrap_err();
    assert!(matches!(error, SocketError::Closed), "{error}");
    assert!(fds.is_empty() && is_at_end(reader));
}

#[test]
fn a_peer_that_does_not_read_is_an_error_and_never_waited_for() {
    let (a, b) = Connection::pair().unwrap();
    for frame in [vec![1; 1], vec![2; MAX_FRAME]] {
        let mut sent = 0;
        let error = loop {
            match a.send(&frame, &[]) {
                Ok(()) => sent += 1,
                Err(error) => break error,
            }
        };
        assert!(matches!(error, SocketError::PeerNotReading), "{error}");
        assert!(sent >= 2, "{sent} frames of {} bytes", frame.len());
        let deadline = Some(Instant::now() + Duration::from_millis(5));
        let error = a.send_until(&frame, &[], deadline).unwrap_err();
        assert!(matches!(error, SocketError::Deadline { .. }), "{error}");
        // It reads on: so does the sender.
        std::thread::scope(|scope| {
            let sender = scope.spawn(|| a.send_until(&frame, &[], soon()));
            let mut buf = vec![0; MAX_FRAME];
            for _ in 0..=sent {
                assert_eq!(b.recv(&mut buf, &mut Vec::new()).unwrap().len, frame.len());
            }
            sender.join().unwrap().unwrap();
        });
    }
}

#[test]
fn shutdown_wakes_whoever_waits() {
    let mut buf = [0; 16];
    for how in 0..4 {
        let (a, _b) = Connection::pair().unwrap();
        let (ready, started) = mpsc::channel();
        std::thread::scope(|scope| {
            let a = &a;
            let waiter = scope.spawn(move || {
                let (mut buf, mut fds) = ([0; 16], Vec::new());
                ready.send(()).unwrap();
                match how {
                    0 => a.recv(&mut buf, &mut fds).map(drop),
                    1 => a.recv_spin(&mut buf, &mut fds, Duration::from_micros(50), None).map(drop),
                    2 => a.recv_spin(&mut buf, &mut fds, Duration::ZERO, soon()).map(drop),
                    _ => loop {
                        if let Err(error) = a.send_until(&[1; 1000], &[], soon()) {
                            break Err(error);
                        }
                    },
                }
            });
            started.recv().unwrap();
            a.shutdown();
            a.shutdown();
            let error = waiter.join().unwrap().unwrap_err();
            assert!(matches!(error, SocketError::Closed), "{how}: {error}");
        });
        assert!(matches!(a.send(&[1], &[]).unwrap_err(), SocketError::Closed));
        assert!(matches!(a.recv(&mut buf, &mut Vec::new()).unwrap_err(), SocketError::Closed));
    }
}

#[test]
fn what_was_sent_before_the_end_arrives() {
    let _closed_is_closed = child::no_forks();
    let (a, b) = Connection::pair().unwrap();
    let (mut buf, mut fds) = ([0; 16], Vec::new());
    a.send(b"last words", &[a.as_fd()]).unwrap();
    drop(a);
    assert_eq!(b.recv(&mut buf, &mut fds).unwrap(), Received { len: 10, fds: 1 });
    // The end that travelled still holds the connection open.
    assert_eq!(b.try_recv(&mut buf, &mut Vec::new()).unwrap(), None);
    fds.clear();
    for _ in 0..2 {
        assert!(matches!(b.try_recv(&mut buf, &mut fds).unwrap_err(), SocketError::Closed));
        assert!(matches!(b.send(&[1], &[]).unwrap_err(), SocketError::Closed));
    }
    // An end that is closed with frames unread resets the connection, which is an end, too.
    let (a, b) = Connection::pair().unwrap();
    b.send(b"unread", &[]).unwrap();
    drop(a);
    assert!(matches!(b.recv(&mut buf, &mut fds).unwrap_err(), SocketError::Closed));
}

#[test]
fn waiting_ends_at_the_deadline_or_with_the_frame() {
    let (a, b) = Connection::pair().unwrap();
    let (mut buf, mut fds) = ([0; 16], Vec::new());
    for spin in [Duration::ZERO, Duration::from_micros(50), Duration::from_millis(20)] {
        for wait in [Duration::ZERO, Duration::from_millis(5)] {
            let deadline = Instant::now() + wait;
            let error = a.recv_spin(&mut buf, &mut fds, spin, Some(deadline)).unwrap_err();
            assert!(matches!(error, SocketError::Deadline { .. }), "{error}");
            assert!(Instant::now() >= deadline);
        }
        // What is there already is taken, also after the deadline.
        b.send(b"x", &[]).unwrap();
        a.recv_spin(&mut buf, &mut fds, spin, Some(Instant::now())).unwrap();
        for deadline in [None, soon()] {
            std::thread::scope(|scope| {
                let waiter = scope.spawn(|| a.recv_spin(&mut [0; 16], &mut Vec::new(), spin, deadline));
                b.send(b"yy", &[]).unwrap();
                assert_eq!(waiter.join().unwrap().unwrap().len, 2);
            });
        }
    }
}

#[test]
fn both_directions_work_at_once() {
    const FRAMES: u32 = 20_000;
    let (a, b) = Connection::pair().unwrap();
    std::thread::scope(|scope| {
        for (from, to) in [(&a, &b), (&b, &a)] {
            scope.spawn(move || {
                for i in 0..FRAMES {
                    let fds: &[BorrowedFd<'_>] = if i % 100 == 0 { &[from.as_fd()] } else { &[] };
                    from.send_until(&i.to_le_bytes(), fds, soon()).unwrap();
                }
            });
            scope.spawn(move || {
                let (mut buf, mut fds) = ([0; 8], Vec::new());
                for i in 0..FRAMES {
                    let received = to.recv_spin(&mut buf, &mut fds, Duration::ZERO, soon()).unwrap();
                    assert_eq!(buf[..received.len], i.to_le_bytes());
                    assert_eq!(fds.len(), usize::from(i % 100 == 0));
                }
            });
        }
    });
}

#[test]
fn only_sockets_of_the_right_type_become_connections() {
    let (stream, _other) = std::os::unix::net::UnixStream::pair().unwrap();
    for fd in [OwnedFd::from(stream), tempfile::tempfile().unwrap().into()] {
        assert!(matches!(Connection::from_fd(fd).unwrap_err(), SocketError::Os { .. }));
    }
    let (a, b) = Connection::pair().unwrap();
    let a = Connection::from_fd(a.into()).unwrap();
    a.send(b"still works", &[]).unwrap();
    assert_eq!(b.recv(&mut [0; 16], &mut Vec::new()).unwrap().len, 11);
}

#[test]
fn a_receiver_without_free_descriptors_is_told_so() {
    child::play("receive-without-descriptors");
}

#[test]
fn a_listener_without_free_descriptors_turns_clients_away() {
    child::play("accept-without-descriptors");
}

struct Address {
    dir: tempfile::TempDir,
    path: PathBuf,
}

fn address() -> Address {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("run/shmquant-1.sock");
    Address { dir, path }
}

fn mode(path: &Path) -> u32 {
    fs::symlink_metadata(path).unwrap().mode() & 0o7777
}

#[test]
fn a_listener_is_private_and_alone() {
    let _closed_is_closed = child::no_forks();
    let Address { dir: _dir, path } = address();
    assert!(matches!(Connection::connect(&path).unwrap_err(), SocketError::NotListening { .. }));
    let listener = Listener::bind(&path).unwrap();
    assert_eq!((mode(&path), mode(path.parent().unwrap())), (0o600, 0o700));
    for _ in 0..3 {
        let error = Listener::bind(&path).unwrap_err();
        assert!(matches!(error, SocketError::AlreadyServed { .. }), "{error}");
        let client = Connection::connect_until(&path, soon()).unwrap();
        let served = listener.accept().unwrap();
        client.send(b"hello", &[]).unwrap();
        assert_eq!(served.recv(&mut [0; 8], &mut Vec::new()).unwrap().len, 5);
        for (end, other) in [(&client, &served), (&served, &client)] {
            let peer = end.require_same_user().unwrap();
            assert_eq!(peer, other.peer_cred().unwrap());
            assert_eq!((peer.uid, peer.gid), (geteuid().as_raw(), getegid().as_raw()));
            assert_eq!(peer.pid.unsigned_abs(), std::process::id());
        }
    }
    drop(listener);
    assert!(!path.exists());
    assert!(matches!(Connection::connect(&path).unwrap_err(), SocketError::NotListening { .. }));
    Listener::bind(&path).unwrap();
}

#[test]
fn one_of_many_that_start_at_once_gets_the_address() {
    let _closed_is_closed = child::no_forks();
    let Address { dir: _dir, path } = address();
    for _ in 0..50 {
        let made: Vec<_> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..4).map(|_| scope.spawn(|| Listener::bind(&path))).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        let (won, lost): (Vec<_>, Vec<_>) = made.into_iter().partition(Result::is_ok);
        assert_eq!(won.len(), 1, "{lost:?}");
        assert!(lost.iter().all(|lost| matches!(lost, Err(SocketError::AlreadyServed { .. }))), "{lost:?}");
        Connection::connect(&path).unwrap();
    }
}

#[test]
fn the_address_of_a_killed_daemon_is_taken_over() {
    let Address { dir: _dir, path } = address();
    let (ours, theirs) = Connection::pair().unwrap();
    let mut daemon = child::spawn("listen-until-killed", theirs.into());
    ours.send(path.to_str().unwrap().as_bytes(), &[]).unwrap();
    ours.recv(&mut [0; 8], &mut Vec::new()).unwrap();
    assert!(matches!(Listener::bind(&path).unwrap_err(), SocketError::AlreadyServed { .. }));
    // A cleaner of old files takes the lock file away: the living daemon still keeps its address.
    let mut lock = path.clone().into_os_string();
    lock.push(LOCK_SUFFIX);
    fs::remove_file(lock).unwrap();
    assert!(matches!(Listener::bind(&path).unwrap_err(), SocketError::AlreadyServed { .. }));
    daemon.kill().unwrap();
    daemon.wait().unwrap();
    let _closed_is_closed = child::no_forks();
    assert!(path.exists(), "kill -9 leaves the socket");
    let listener = Listener::bind(&path).unwrap();
    Connection::connect(&path).unwrap();
    // Another's file at our address is not ours to remove.
    fs::remove_file(&path).unwrap();
    fs::write(&path, "another's").unwrap();
    drop(listener);
    assert!(matches!(Listener::bind(&path).unwrap_err(), SocketError::NotASocket { .. }));
    assert_eq!(fs::read_to_string(&path).unwrap(), "another's");
}

#[test]
fn unsafe_places_are_refused() {
    let Address { dir, path } = address();
    let run = path.parent().unwrap();
    fs::create_dir(run).unwrap();
    for open in [0o755, 0o770, 0o702, 0o1777] {
        fs::set_permissions(run, Permissions::from_mode(open)).unwrap();
        let error = Listener::bind(&path).unwrap_err();
        assert!(matches!(error, SocketError::UnsafeDirectory { .. }), "{open:o}: {error}");
        assert_eq!(fs::read_dir(run).unwrap().count(), 0, "nothing was made there");
    }
    if geteuid().is_root() {
        fs::set_permissions(run, Permissions::from_mode(0o700)).unwrap();
        std::os::unix::fs::chown(run, Some(12_345), None).unwrap();
        let error = Listener::bind(&path).unwrap_err();
        assert!(matches!(error, SocketError::UnsafeDirectory { .. }), "{error}");
    }
    let long = dir.path().join("x".repeat(120));
    assert!(matches!(Listener::bind(&long).unwrap_err(), SocketError::PathTooLong { .. }));
    assert!(matches!(Connection::connect(&long).unwrap_err(), SocketError::PathTooLong { .. }));
}

#[test]
fn shutdown_of_a_listener_wakes_accept() {
    let Address { dir: _dir, path } = address();
    let listener = Listener::bind(&path).unwrap();
    let (ready, started) = mpsc::channel();
    std::thread::scope(|scope| {
        let waiter = scope.spawn(|| {
            ready.send(()).unwrap();
            listener.accept()
        });
        started.recv().unwrap();
        listener.shutdown();
        assert!(matches!(waiter.join().unwrap().unwrap_err(), SocketError::Closed));
    });
    assert!(matches!(Connection::connect(&path).unwrap_err(), SocketError::NotListening { .. }));
}

#[test]
fn connecting_to_a_daemon_that_never_accepts_ends_at_the_deadline() {
    let Address { dir: _dir, path } = address();
    fs::create_dir(path.parent().unwrap()).unwrap();
    // Ours have a queue too long to fill in a test.
    let listener = short_queue(&path);
    let mut held = Vec::new();
    let error = loop {
        match Connection::connect_until(&path, Some(Instant::now() + Duration::from_millis(20))) {
            Ok(connection) => held.push(connection),
            Err(error) => break error,
        }
    };
    assert!(matches!(error, SocketError::Deadline { .. }), "{error}");
    drop(listener);
}

fn short_queue(path: &Path) -> OwnedFd {
    use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket};
    let fd = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None).unwrap();
    bind(fd.as_raw_fd(), &UnixAddr::new(path).unwrap()).unwrap();
    listen(&fd, Backlog::new(1).unwrap()).unwrap();
    fd
}

#[test]
fn the_death_of_a_peer_is_seen_though_its_child_holds_the_socket() {
    let Address { dir: _dir, path } = address();
    let listener = Listener::bind(&path).unwrap();
    let (ours, theirs) = Connection::pair().unwrap();
    let mut client = child::spawn("connect-and-fork", theirs.into());
    ours.send(path.to_str().unwrap().as_bytes(), &[]).unwrap();
    let served = listener.accept().unwrap();
    assert_eq!(served.peer_cred().unwrap().pid.unsigned_abs(), client.id());
    let pidfd = served.peer_pidfd().unwrap();
    let (mut buf, mut fds) = ([0; 8], Vec::new());
    let received = served.recv(&mut buf, &mut fds).unwrap();
    let grandchild = i32::from_le_bytes(buf[..received.len].try_into().unwrap());

    let has_ended = |timeout: PollTimeout| {
        poll(&mut [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)], timeout).unwrap() == 1
    };
    assert!(!has_ended(PollTimeout::ZERO));
    client.kill().unwrap();
    assert!(has_ended(PollTimeout::from(60_000_u16)));
    assert_eq!(served.try_recv(&mut buf, &mut fds).unwrap(), None, "no EOF: the grandchild lives");
    client.wait().unwrap();
    kill(Pid::from_raw(grandchild), Signal::SIGKILL).unwrap();
    assert!(matches!(served.recv(&mut buf, &mut fds).unwrap_err(), SocketError::Closed));
    assert!(
        matches!(served.peer_pidfd(), Ok(_) | Err(SocketError::PeerGone)),
        "kernels differ, and both answers say it"
    );
}

#[test]
fn child() {
    let Some(role) = child::role() else { return };
    match role.as_str() {
        "receive-without-descriptors" => receive_without_descriptors(),
        "accept-without-descriptors" => accept_without_descriptors(),
        "listen-until-killed" => listen_until_killed(),
        "connect-and-fork" => connect_and_fork(),
        other => panic!("no such role: {other}"),
    }
    println!("{}", child::done(&role));
}

fn open_fds() -> usize {
    fs::read_dir("/proc/self/fd").unwrap().count()
}

fn receive_without_descriptors() {
    let (a, b) = Connection::pair().unwrap();
    let (mut buf, mut fds) = ([0; 16], Vec::new());
    let files: Vec<File> = (0..3).map(|_| tempfile::tempfile().unwrap()).collect();
    let lent: Vec<BorrowedFd<'_>> = files.iter().map(AsFd::as_fd).collect();
    let before = open_fds();
    for free in 0..3 {
        a.send(b"three files", &lent).unwrap();
        let (limit, error) =
            child::with_free_fds(free, |limit| (limit, b.recv(&mut buf, &mut fds).unwrap_err()));
        assert!(matches!(error, SocketError::FdsLost { len: 11, limit: l } if l == limit), "{error}");
        assert_eq!(&buf[..11], b"three files", "the frame itself is there");
        assert!(fds.is_empty());
        assert_eq!(open_fds(), before, "those that came were closed");
    }
    a.send(b"three files", &lent).unwrap();
    let received = child::with_free_fds(3, |_| b.recv(&mut buf, &mut fds).unwrap());
    assert_eq!(received, Received { len: 11, fds: 3 });
}

fn accept_without_descriptors() {
    let Address { dir: _dir, path } = address();
    let listener = Listener::bind(&path).unwrap();
    let before = open_fds();
    for _ in 0..3 {
        let client = Connection::connect(&path).unwrap();
        let (limit, error) = child::with_free_fds(0, |limit| (limit, listener.accept().unwrap_err()));
        assert!(matches!(error, SocketError::FdLimit { limit: l, .. } if l == limit), "{error}");
        let error = client.recv_spin(&mut [0; 8], &mut Vec::new(), Duration::ZERO, soon()).unwrap_err();
        assert!(matches!(error, SocketError::Closed), "{error}");
    }
    assert_eq!(open_fds(), before);
    let client = Connection::connect(&path).unwrap();
    listener.accept().unwrap().send(b"welcome", &[]).unwrap();
    assert_eq!(client.recv(&mut [0; 8], &mut Vec::new()).unwrap().len, 7);
}

fn stdin() -> Connection {
    Connection::from_fd(io::stdin().as_fd().try_clone_to_owned().unwrap()).unwrap()
}

fn path_from(parent: &Connection) -> PathBuf {
    let mut buf = [0; 256];
    let received = parent.recv(&mut buf, &mut Vec::new()).unwrap();
    PathBuf::from(std::str::from_utf8(&buf[..received.len]).unwrap())
}

fn listen_until_killed() {
    let parent = stdin();
    let _listener = Listener::bind(&path_from(&parent)).unwrap();
    parent.send(b"ready", &[]).unwrap();
    // Until the parent kills us, or is itself gone.
    let _ = parent.recv(&mut [0; 8], &mut Vec::new());
}

fn connect_and_fork() {
    let parent = stdin();
    let connection = Connection::connect(&path_from(&parent)).unwrap();
    let held = connection.as_fd().try_clone_to_owned().unwrap();
    let mut sleep = Command::new("sleep");
    let grandchild = sleep.arg("300").stdin(Stdio::from(held)).stdout(Stdio::null()).stderr(Stdio::null());
    let mut grandchild = grandchild.spawn().unwrap();
    connection.send(&grandchild.id().to_le_bytes(), &[]).unwrap();
    // Until the parent kills us, or is itself gone.
    let _ = parent.recv(&mut [0; 8], &mut Vec::new());
    grandchild.kill().unwrap();
    grandchild.wait().unwrap();
}

#[test]
fn last_words_are_heard_from_a_peer_that_did_not_listen() {
    let _closed_is_closed = child::no_forks();
    for blocking in [true, false] {
        let (a, b) = Connection::pair().unwrap();
        a.send(b"never read", &[]).unwrap();
        b.send(b"first", &[]).unwrap();
        b.send(b"last words", &[]).unwrap();
        // It closes with a frame in its queue: the kernel tells `a` of a reset before anything else.
        drop(b);
        let (mut buf, mut fds) = ([0; 64], Vec::new());
        let mut next = || match blocking {
            true => a.recv(&mut buf, &mut fds).map(|received| buf[..received.len].to_vec()),
            false => a.try_recv(&mut buf, &mut fds).map(|received| buf[..received.unwrap().len].to_vec()),
        };
        assert_eq!(next().unwrap(), b"first");
        assert_eq!(next().unwrap(), b"last words");
        assert!(matches!(next().unwrap_err(), SocketError::Closed));
        assert!(matches!(next().unwrap_err(), SocketError::Closed));
    }
}
