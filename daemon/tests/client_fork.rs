//! A client that forks. (In a process of its own: a fork taints whatever other tests hold.)

#[path = "../../protocol/tests/layers/mod.rs"]
mod layers;
mod native;

use layers::Layers;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, fork};
use shmquant_daemon::{Config, Daemon};
use shmquant_protocol::chunks::MIN_WINDOW;
use shmquant_protocol::client::Options;

#[test]
#[allow(unsafe_code, reason = "fork is what is tested")]
fn a_forked_child_has_a_session_of_its_own_and_the_parent_keeps_its_own() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("run").join("a.sock");
    let config = Config { address: path.clone(), workers: 2, window: MIN_WINDOW, ..Config::default() };
    let _daemon = Daemon::start(config).unwrap();
    let session = native::session_at(&path, None);
    let small = || session.quantize(&Layers::new(&[5000]), &Options::default());
    let large = || session.quantize(&Layers::new(&[4 << 20]), &Options::default());
    let held = small().unwrap().held;
    large().unwrap();
    let before = session.connect().unwrap();
    let bytes = held.as_slice().to_vec();
    for _ in 0..3 {
        // SAFETY: the child uses the session and memory of its own and leaves by _exit.
        match unsafe { fork() }.unwrap() {
            ForkResult::Child => {
                let ours = session.connect().is_ok_and(|w| w.session != before.session);
                let works = small().is_ok_and(|r| r.held.as_slice() == bytes) && large().is_ok();
                let same = held.as_slice() == bytes;
                drop(held);
                session.close();
                let code = i32::from(!ours) | i32::from(!works) << 1 | i32::from(!same) << 2;
                // SAFETY: ends the process without the destructors of the parent's values.
                unsafe { libc::_exit(code) }
            }
            ForkResult::Parent { child } => {
                assert_eq!(waitpid(child, None).unwrap(), WaitStatus::Exited(child, 0));
            }
        }
    }
    assert_eq!(session.connect().unwrap(), before);
    // Tainted: what the child may still map is not used again.
    let segment = held.extent().segment;
    drop(held);
    for _ in 0..20 {
        let again = small().unwrap().held;
        assert_ne!(again.extent().segment, segment);
    }
}
