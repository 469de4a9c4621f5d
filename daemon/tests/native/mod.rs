//! The Rust client's sessions at the daemons of these tests, and what a result of [`Layers`](crate::layers) is.
#![allow(dead_code, reason = "each test file uses its part")]
#![allow(clippy::unwrap_used, reason = "a failed expectation is how a test reports")]

use std::io::{Cursor, Error, ErrorKind};
use std::path::Path;
use std::sync::Arc;

use arrow_array::cast::AsArray;
use arrow_ipc::reader::FileReader;
use shmquant_daemon::{Config, Daemon};
use shmquant_protocol::client::{Address, Config as ClientConfig, Held, Session, StartCommand};

/// A daemon in this process.
pub(crate) fn daemon(config: Config) -> Arc<Daemon> {
    Arc::new(Daemon::in_process(config).unwrap())
}

/// A session at a daemon in this process, for as long as that lives.
pub(crate) fn session(daemon: &Arc<Daemon>) -> Session {
    let daemon = Arc::downgrade(daemon);
    let gone = || Error::from(ErrorKind::ConnectionRefused);
    let connect = move || daemon.upgrade().ok_or_else(gone)?.connect();
    let address = Address::InProcess(Arc::new(connect));
    Session::new(ClientConfig { address, ..ClientConfig::default() })
}

/// A session at a socket.
pub(crate) fn session_at(path: &Path, start: Option<StartCommand>) -> Session {
    let address = Address::Path(path.to_owned());
    Session::new(ClientConfig { address, start, ..ClientConfig::default() })
}

/// The values are whole numbers from -127 to 127, so that the scale is 1 and each is its own code.
pub(crate) fn check(held: &Held, sizes: &[u64]) {
    let mut layer = 0;
    for batch in FileReader::try_new(Cursor::new(held.as_slice()), None).unwrap() {
        let batch = batch.unwrap();
        for codes in batch.column_by_name("quantized_data").unwrap().as_binary::<i32>().iter() {
            let codes = codes.unwrap();
            assert_eq!(codes.len() as u64, sizes[layer]);
            let wrong = |(i, code): (usize, &u8)| i16::from(code.cast_signed()) != (i % 255) as i16 - 127;
            assert_eq!(codes.iter().enumerate().find(|code| wrong(*code)), None, "layer {layer}");
            layer += 1;
        }
    }
    assert_eq!(layer, sizes.len());
}
