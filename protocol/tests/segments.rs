//! The contract of segments, on both backings: whole, zero, resident, gone without a trace; and every limit
//! that can be hit is an error that names it.
#![allow(
    unsafe_code,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "tests look at shared memory through raw pointers, fail by panicking and say what they skip"
)]

mod child;
mod smaps;

use std::collections::hash_map::RandomState;
use std::fs::{self, File};
use std::hash::{BuildHasher, Hasher};
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;

use memmap2::MmapOptions;
use nix::fcntl::{FallocateFlags, FcntlArg, FdFlag, fallocate, fcntl};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::unistd::ftruncate;
use shmquant_protocol::segment::{
    Backing, Kind, Mapping, Segment, SegmentError, SegmentName, ignore_sigxfsz, open_read_only,
};

const BACKINGS: [Backing; 2] = [Backing::Memfd, Backing::Posix];
const KINDS: [Kind; 3] = [Kind::Result, Kind::Window, Kind::Input];
const PAGE: usize = 4096;

fn fresh_instance() -> u64 {
    RandomState::new().build_hasher().finish()
}

fn fresh(kind: Kind) -> SegmentName {
    SegmentName { instance: fresh_instance(), kind, id: 1 }
}

fn create(backing: Backing, kind: Kind, size: u64) -> Segment {
    Segment::create(backing, &fresh(kind), size).unwrap()
}

fn bytes(segment: &Segment) -> Vec<u8> {
    read(segment.as_ptr(), segment.len())
}

fn mapped(mapping: &Mapping) -> Vec<u8> {
    read(mapping.as_ptr(), mapping.len())
}

fn read(start: *const u8, len: usize) -> Vec<u8> {
    // SAFETY: both callers pass all of a mapping that they hold.
    (0..len).map(|i| unsafe { start.add(i).read_volatile() }).collect()
}

fn fill(segment: &Segment, value: u8) {
    // SAFETY: all of the segment's own mapping, which nobody has a reference into.
    unsafe { segment.as_ptr().write_bytes(value, segment.len()) }
}

fn write(mapping: &Mapping, value: u8, len: usize) {
    assert!(len <= mapping.len());
    // SAFETY: inside the mapping, which is writable, and nobody has a reference into it.
    unsafe { mapping.as_mut_ptr().unwrap().write_bytes(value, len) }
}

/// Everything this process and `/dev/shm` hold of an instance: descriptors, mappings, names.
fn traces(instance: u64) -> Vec<String> {
    let hex = format!("{instance:016x}");
    let links = fs::read_dir("/proc/self/fd").unwrap().filter_map(|fd| fs::read_link(fd.ok()?.path()).ok());
    let fds = links.map(|link| format!("fd {}", link.display()));
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    let maps = maps.lines().map(|line| format!("map {line}")).collect::<Vec<_>>();
    let names =
        fs::read_dir("/dev/shm").unwrap().filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let names = names.map(|name| format!("name {name}"));
    fds.chain(maps).chain(names).filter(|trace| trace.contains(&hex)).collect()
}

#[test]
fn a_new_segment_is_whole_zero_and_private_to_this_process() {
    for backing in BACKINGS {
        for kind in KINDS {
            for size in [1, 4095, 4096, 4097, 65_536, (3 << 20) + 5] {
                let segment = create(backing, kind, size);
                assert_eq!(segment.len() as u64, size);
                assert_eq!(segment.backing(), backing);
                assert_eq!(segment.name().kind, kind);
                assert_eq!(segment.as_ptr() as usize % PAGE, 0);
                assert_eq!(segment.missing_bytes().unwrap(), 0, "{segment:?}");
                assert!(bytes(&segment).iter().all(|byte| *byte == 0));
                let flags = FdFlag::from_bits_retain(fcntl(segment.fd(), FcntlArg::F_GETFD).unwrap());
                assert!(flags.contains(FdFlag::FD_CLOEXEC), "{segment:?}");
            }
        }
    }
}

#[test]
fn results_and_windows_are_resident_and_inputs_only_reserved() {
    for backing in BACKINGS {
        for (kind, kib) in [(Kind::Result, 1024), (Kind::Window, 1024), (Kind::Input, 0)] {
            let segment = create(backing, kind, 1 << 20);
            let rss = smaps::fields(segment.name().instance, "Rss:");
            assert_eq!(rss, [format!("{kib} kB")], "{segment:?}");
            let blocks = File::from(segment.fd().try_clone_to_owned().unwrap()).metadata().unwrap().blocks();
            assert!(blocks * 512 >= 1 << 20, "{segment:?} is reserved");
        }
    }
}

#[test]
fn readers_see_what_the_owner_writes_while_it_writes() {
    for backing in BACKINGS {
        let segment = create(backing, Kind::Result, 10_000);
        let reader = Mapping::read_only(segment.fd(), 10_000, backing).unwrap();
        let by_path = fs::read(segment.path()).unwrap();
        assert_eq!(by_path, vec![0; 10_000]);
        for value in [1, 2, 255] {
            fill(&segment, value);
            assert_eq!(mapped(&reader), vec![value; 10_000]);
        }
        assert_eq!(fs::read(segment.path()).unwrap(), vec![255; 10_000]);
        assert!(reader.as_mut_ptr().is_none());
        // The memory outlives the owner for whoever maps it.
        drop(segment);
        assert_eq!(mapped(&reader), vec![255; 10_000]);
    }
}

#[test]
fn clients_write_windows_and_inputs_and_keep_them_from_forked_children() {
    for backing in BACKINGS {
        for kind in [Kind::Window, Kind::Input] {
            let segment = create(backing, kind, 8192);
            let client = Mapping::read_write(segment.fd(), 8192, backing).unwrap();
            client.prefault().unwrap();
            write(&client, 7, 8192);
            assert_eq!(bytes(&segment), vec![7; 8192]);
            let flags = smaps::fields(segment.name().instance, "VmFlags:");
            // "dc": do not copy on fork. The client's has it, the daemon's (which never forks) has not.
            let kept = flags.iter().filter(|flags| flags.split(' ').any(|flag| flag == "dc")).count();
            assert_eq!((flags.len(), kept), (2, 1), "{flags:?}");
        }
    }
}

#[test]
fn a_private_view_can_be_written_without_anybody_noticing() {
    for backing in BACKINGS {
        let segment = create(backing, Kind::Result, 2 * PAGE as u64);
        fill(&segment, 1);
        let private = Mapping::private_writable(segment.fd(), 2 * PAGE as u64, backing).unwrap();
        private.prefault().unwrap();
        write(&private, 9, 1);
        assert_eq!(bytes(&segment), vec![1; 2 * PAGE]);
        fill(&segment, 2);
        let seen = mapped(&private);
        assert_eq!((seen[0], seen[1], seen[PAGE]), (9, 1, 2), "a written page is ours, the others follow");
    }
}

#[test]
fn nothing_is_left_of_a_dropped_segment() {
    for backing in BACKINGS {
        for kind in KINDS {
            let segment = create(backing, kind, 1 << 16);
            let instance = segment.name().instance;
            assert!(!traces(instance).is_empty());
            drop(segment);
            assert_eq!(traces(instance), Vec::<String>::new());
        }
    }
}

#[test]
fn absurd_sizes_are_refused_before_they_hurt() {
    for backing in BACKINGS {
        for kind in KINDS {
            let name = fresh(kind);
            for size in [0, u64::MAX, 1 << 63] {
                let refused = Segment::create(backing, &name, size).unwrap_err();
                assert!(matches!(refused, SegmentError::BadSize { size: s, .. } if s == size), "{refused}");
            }
            let refused = Segment::create(backing, &name, 1 << 50).unwrap_err();
            let SegmentError::NoRoom { size, available: Some(available), .. } = refused else {
                panic!("{refused}");
            };
            assert!(size == 1 << 50 && available < size);
            assert_eq!(traces(name.instance), Vec::<String>::new());
        }
    }
}

#[test]
fn mappings_refuse_what_could_end_in_sigbus() {
    for backing in BACKINGS {
        let segment = create(backing, Kind::Window, 5000);
        for make in [Mapping::read_only, Mapping::read_write, Mapping::private_writable] {
            assert_eq!(make(segment.fd(), 5000, backing).unwrap().len(), 5000);
            assert_eq!(make(segment.fd(), 64, backing).unwrap().len(), 64);
            assert!(matches!(
                make(segment.fd(), 5001, backing).unwrap_err(),
                SegmentError::TooShort { expected: 5001, actual: 5000 }
            ));
            for len in [0, 1 << 63, u64::MAX] {
                assert!(matches!(
                    make(segment.fd(), len, backing).unwrap_err(),
                    SegmentError::BadSize { size, .. } if size == len
                ));
            }
        }
    }
    // Neither a file, nor /dev/shm, nor a memfd that is not sealed passes for one that is.
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&[1; 100]).unwrap();
    let posix = create(Backing::Posix, Kind::Result, 100);
    let open = memfd(100);
    for fd in [file.as_fd(), posix.fd(), open.as_fd(), File::open("/dev/null").unwrap().as_fd()] {
        let refused = Mapping::read_only(fd, 100, Backing::Memfd).unwrap_err();
        assert!(matches!(refused, SegmentError::NotSealed { .. }), "{refused}");
    }
}

fn memfd(size: i64) -> OwnedFd {
    let flags = nix::sys::memfd::MFdFlags::MFD_CLOEXEC | nix::sys::memfd::MFdFlags::MFD_ALLOW_SEALING;
    let fd = nix::sys::memfd::memfd_create("not ours", flags).unwrap();
    ftruncate(&fd, size).unwrap();
    fd
}

#[test]
fn holes_that_a_client_punches_are_seen_and_filled() {
    for backing in BACKINGS {
        for kind in [Kind::Window, Kind::Input] {
            let segment = create(backing, kind, 16 * PAGE as u64);
            fill(&segment, 3);
            let punch = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
            fallocate(segment.fd(), punch, PAGE as i64, 3 * PAGE as i64).unwrap();
            assert_eq!(segment.missing_bytes().unwrap(), 3 * PAGE as u64);
            segment.refill().unwrap();
            assert_eq!(segment.missing_bytes().unwrap(), 0);
            let after = bytes(&segment);
            assert!(after[PAGE..4 * PAGE].iter().all(|byte| *byte == 0));
            assert!(after[..PAGE].iter().chain(&after[4 * PAGE..]).all(|byte| *byte == 3));
        }
        let result = create(backing, Kind::Result, PAGE as u64);
        assert!(matches!(result.refill().unwrap_err(), SegmentError::Unsupported { .. }));
    }
}

#[test]
fn a_posix_name_is_taken_found_and_read_only() {
    let first = create(Backing::Posix, Kind::Result, 4096);
    fill(&first, 5);
    let again = Segment::create(Backing::Posix, first.name(), 8192).unwrap_err();
    assert!(matches!(again, SegmentError::NameTaken { .. }), "{again}");
    let found = open_read_only(first.name()).unwrap();
    assert_eq!(mapped(&Mapping::read_only(found.as_fd(), 4096, Backing::Posix).unwrap()), vec![5; 4096]);
    for fd in [found.as_fd(), first.fd()] {
        let refused = Mapping::read_write(fd, 4096, Backing::Posix).unwrap_err();
        assert!(matches!(refused, SegmentError::Os { errno: nix::Error::EACCES, .. }), "{refused}");
    }
    assert_eq!(fs::metadata(first.path()).unwrap().mode() & 0o777, 0o600);
    let name = *first.name();
    drop(first);
    assert!(matches!(open_read_only(&name).unwrap_err(), SegmentError::NotFound { .. }));
}

#[test]
fn the_file_size_limit_is_an_error_and_not_a_signal() {
    child::play("file-size-limit");
}

#[test]
fn running_out_of_descriptors_is_an_error_at_every_step() {
    child::play("descriptor-limit");
}

#[test]
fn running_out_of_address_space_is_an_error() {
    child::play("address-space-limit");
}

#[test]
fn running_out_of_mappings_is_an_error() {
    child::play("mapping-limit");
}

#[test]
fn a_daemon_without_standard_input_leaves_no_posix_segment_behind() {
    child::play("no-standard-input");
}

#[test]
fn a_full_dev_shm_is_an_error() {
    child::play_beside_small_dev_shm("full-dev-shm", "1m");
}

/// What the children do; without a role it is nothing.
#[test]
fn child() {
    let Some(role) = child::role() else { return };
    match role.as_str() {
        "file-size-limit" => file_size_limit(),
        "descriptor-limit" => descriptor_limit(),
        "address-space-limit" => address_space_limit(),
        "mapping-limit" => mapping_limit(),
        "no-standard-input" => no_standard_input(),
        "full-dev-shm" => full_dev_shm(),
        other => panic!("no such role: {other}"),
    }
    println!("{}", child::done(&role));
}

fn open_fds() -> usize {
    fs::read_dir("/proc/self/fd").unwrap().count()
}

fn file_size_limit() {
    // Soft only, so that it can be raised again; SIGXFSZ still kills at this point.
    let (_, hard) = getrlimit(Resource::RLIMIT_FSIZE).unwrap();
    setrlimit(Resource::RLIMIT_FSIZE, 1 << 16, hard).unwrap();
    for backing in BACKINGS {
        let name = fresh(Kind::Result);
        let before = open_fds();
        let refused = Segment::create(backing, &name, (1 << 16) + 1).unwrap_err();
        assert!(
            matches!(refused, SegmentError::FileSizeLimit { size: 65_537, limit: 65_536, .. }),
            "{refused}"
        );
        assert_eq!((open_fds(), traces(name.instance)), (before, Vec::new()));
        drop(Segment::create(backing, &name, 1 << 16).unwrap());
    }
    ignore_sigxfsz().unwrap();
    assert_eq!(ftruncate(memfd(0), 1 << 20).unwrap_err(), nix::Error::EFBIG);
}

fn descriptor_limit() {
    for backing in BACKINGS {
        let (mut refusals, mut free) = (0, 0);
        loop {
            let name = fresh(Kind::Result);
            let before = open_fds();
            let (limit, made) =
                child::with_free_fds(free, |limit| (limit, Segment::create(backing, &name, 1 << 16)));
            match made {
                Ok(segment) => {
                    assert!(!traces(name.instance).is_empty());
                    drop(segment);
                    break;
                }
                Err(refused) => {
                    let right = matches!(refused, SegmentError::FdLimit { limit: l, .. } if l == limit);
                    assert!(right, "{backing}, {free} free: {refused}");
                    assert_eq!((open_fds(), traces(name.instance)), (before, Vec::new()));
                    refusals += 1;
                }
            }
            free += 1;
            assert!(free < 8, "never succeeds");
        }
        assert!(refusals >= 1);
    }
}

fn address_space_limit() {
    let statm = fs::read_to_string("/proc/self/statm").unwrap();
    let used: u64 = statm.split(' ').next().unwrap().parse().unwrap();
    let limit = used * PAGE as u64 + (8 << 20);
    let (_, hard) = getrlimit(Resource::RLIMIT_AS).unwrap();
    for backing in BACKINGS {
        let name = fresh(Kind::Result);
        let before = open_fds();
        setrlimit(Resource::RLIMIT_AS, limit, hard).unwrap();
        let refused = Segment::create(backing, &name, 16 << 20).unwrap_err();
        let small = create(backing, Kind::Result, 1 << 16);
        let too_much = Mapping::read_only(memfd(16 << 20).as_fd(), 16 << 20, Backing::Posix).unwrap_err();
        setrlimit(Resource::RLIMIT_AS, hard, hard).unwrap();
        for refused in [refused, too_much] {
            assert!(
                matches!(refused, SegmentError::AddressSpace { size: 16_777_216, limit: Some(l), .. } if l == limit),
                "{refused}"
            );
        }
        drop(small);
        assert_eq!((open_fds(), traces(name.instance)), (before, Vec::new()));
    }
}

fn mapping_limit() {
    let limit: u64 = fs::read_to_string("/proc/sys/vm/max_map_count").unwrap().trim().parse().unwrap();
    if limit > 1 << 20 {
        println!("skipped: {limit} mappings are too many to use up in a test");
        return;
    }
    let page = memfd(PAGE as i64);
    let mut held = Vec::with_capacity(1 << 20);
    // The same page every time, so that the kernel cannot merge neighbours.
    while let Ok(map) = MmapOptions::new().len(PAGE).map_raw_read_only(&page) {
        held.push(map);
    }
    for backing in BACKINGS {
        let name = fresh(Kind::Result);
        let before = open_fds();
        let refused = Segment::create(backing, &name, 1 << 16).unwrap_err();
        assert!(matches!(refused, SegmentError::MapLimit { limit: l, .. } if l == limit), "{refused}");
        assert_eq!((open_fds(), traces(name.instance)), (before, Vec::new()));
    }
    held.truncate(held.len() - 8);
    for backing in BACKINGS {
        drop(create(backing, Kind::Result, 1 << 16));
    }
}

fn no_standard_input() {
    nix::unistd::close(0).unwrap();
    let name = fresh(Kind::Window);
    let segment = Segment::create(Backing::Posix, &name, 1 << 16).unwrap();
    assert_eq!(traces(name.instance).len(), 3, "one descriptor, one mapping, one name");
    drop(segment);
    assert_eq!(traces(name.instance), Vec::<String>::new());
}

fn full_dev_shm() {
    let (before, name) = (open_fds(), fresh(Kind::Result));
    for size in [1 << 20, (1 << 20) + 1, 64 << 20] {
        let filler = create(Backing::Posix, Kind::Window, 1 << 16);
        let refused = Segment::create(Backing::Posix, &name, size).unwrap_err();
        let SegmentError::NoRoom { size: s, available: Some(available), place, .. } = refused else {
            panic!("{refused}");
        };
        assert!(s == size && available < 1 << 20 && place == "/dev/shm", "{available} in {place}");
        drop(filler);
        assert_eq!((open_fds(), traces(name.instance)), (before, Vec::new()));
        drop(Segment::create(Backing::Posix, &name, 1 << 19).unwrap());
    }
    // Two that each fit but not together race for the room: whatever happens, it is typed.
    let taken = create(Backing::Posix, Kind::Window, (1 << 20) - (1 << 16));
    let punch = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    fallocate(taken.fd(), punch, 0, 1 << 19).unwrap();
    let other = create(Backing::Posix, Kind::Window, 1 << 19);
    let refused = taken.refill().unwrap_err();
    assert!(matches!(refused, SegmentError::NoRoom { .. }), "{refused}");
    drop(other);
    taken.refill().unwrap();
    // A memfd is not limited by the mount.
    drop(create(Backing::Memfd, Kind::Result, 4 << 20));
}
