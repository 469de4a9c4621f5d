//! A fork while a result is held. (In a process of its own: a fork taints whatever other tests hold.)

mod peer;

use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, fork};
use peer::{call, done, lease, result, session, small};
use shmquant_protocol::client::ClientError;
use shmquant_protocol::message::Release;

#[test]
#[allow(unsafe_code, reason = "fork is what is tested")]
fn what_was_held_across_a_fork_is_given_back_as_tainted() {
    let (session, daemon) = session();
    let running = call(&session, small(), None);
    let primary = daemon.primary();
    let lane = daemon.lane();
    let (request, _) = lane.hear_quantize();
    let segment = result(20, 6);
    lane.say(request, &done(lease(20, 1, true)), &[segment.fd()]);
    let held = running.join().unwrap().unwrap().held;
    // SAFETY: the child reads memory, drops values of its own and leaves by _exit.
    match unsafe { fork() }.unwrap() {
        ForkResult::Child => {
            let same = held.as_slice().iter().all(|b| *b == 6);
            let refused = matches!(session.ping(), Err(ClientError::Forked));
            drop(held);
            drop(session);
            // SAFETY: ends the process without the destructors of the parent's values.
            unsafe { libc::_exit(i32::from(!(same && refused))) }
        }
        ForkResult::Parent { child } => {
            assert_eq!(waitpid(child, None).unwrap(), WaitStatus::Exited(child, 0));
        }
    }
    drop(held);
    assert_eq!(primary.hear_releases(1), [Release { segment: 20, generation: 1, tainted: true }]);
}
