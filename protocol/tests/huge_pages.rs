//! Huge pages behind segments where the kernel gives them, and the same segments where it does not.
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
use std::hash::{BuildHasher, Hasher};
use std::num::NonZeroUsize;

use nix::fcntl::{FallocateFlags, FcntlArg, SealFlag, fallocate, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};
use nix::sys::prctl::set_thp_disable;
use nix::unistd::{Whence, ftruncate, lseek};
use shmquant_protocol::segment::{Backing, Kind, Mapping, Segment, SegmentError, SegmentName};

const BACKINGS: [Backing; 2] = [Backing::Memfd, Backing::Posix];
const KINDS: [Kind; 3] = [Kind::Result, Kind::Window, Kind::Input];
const PAGE: usize = 4096;
const HUGE: usize = 2 << 20;

fn fresh(kind: Kind) -> SegmentName {
    SegmentName { instance: RandomState::new().build_hasher().finish(), kind, id: 1 }
}

fn create(backing: Backing, kind: Kind, size: usize) -> Segment {
    Segment::create(backing, &fresh(kind), size as u64).unwrap()
}

fn bytes(start: *const u8, len: usize) -> Vec<u8> {
    let mut bytes = vec![0xEE; len];
    // SAFETY: the callers pass all of a mapping that they hold; nobody writes to it meanwhile.
    unsafe { bytes.as_mut_ptr().copy_from_nonoverlapping(start, len) };
    bytes
}

fn fill(segment: &Segment, value: u8) {
    // SAFETY: all of the segment's own mapping, which nobody has a reference into.
    unsafe { segment.as_ptr().write_bytes(value, segment.len()) }
}

/// Bytes of each mapping of the segment in this process that are mapped by huge pages.
fn mapped_huge(segment: &Segment) -> Vec<usize> {
    let sizes = smaps::fields(segment.name().instance, "ShmemPmdMapped:");
    sizes.iter().map(|size| size.strip_suffix(" kB").unwrap().parse::<usize>().unwrap() << 10).collect()
}

/// Whether this kernel makes huge pages of shared memory at all: tried without any of our code.
fn offered() -> bool {
    const MADV_COLLAPSE: i32 = 25;
    let fd = memfd_create("offered", MFdFlags::MFD_CLOEXEC).unwrap();
    ftruncate(&fd, HUGE as i64).unwrap();
    let (len, room) = (NonZeroUsize::new(HUGE).unwrap(), NonZeroUsize::new(2 * HUGE).unwrap());
    // SAFETY: the reservation is new, the mapping lies inside it, and both go with its munmap; nothing else refers to either.
    unsafe {
        let start = mmap_anonymous(None, room, ProtFlags::PROT_NONE, MapFlags::MAP_PRIVATE).unwrap();
        let place = NonZeroUsize::new((start.as_ptr() as usize).next_multiple_of(HUGE));
        let prot = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        let memory = mmap(place, len, prot, MapFlags::MAP_SHARED | MapFlags::MAP_FIXED, &fd, 0).unwrap();
        memory.cast::<u8>().write(1);
        let collapsed = libc::madvise(memory.as_ptr(), HUGE, MADV_COLLAPSE) == 0;
        munmap(start, room.get()).unwrap();
        collapsed
    }
}

/// Everything that a segment promises, whatever its pages are.
fn check_whole(segment: &Segment) {
    assert_eq!(segment.missing_bytes().unwrap(), 0, "{segment:?}");
    let hole = lseek(segment.fd(), 0, Whence::SeekHole).unwrap();
    if segment.name().kind != Kind::Input {
        assert_eq!(hole as usize, segment.len(), "{segment:?}");
        let resident = format!("{} kB", segment.len().next_multiple_of(PAGE) >> 10);
        assert_eq!(smaps::fields(segment.name().instance, "Rss:"), [resident], "{segment:?}");
    }
    assert!(bytes(segment.as_ptr(), segment.len()).iter().all(|byte| *byte == 0), "{segment:?}");
    if segment.backing() == Backing::Memfd {
        let seals = SealFlag::from_bits_retain(fcntl(segment.fd(), FcntlArg::F_GET_SEALS).unwrap());
        let fixed = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
        assert!(seals.contains(fixed), "{seals:?}");
        let result = segment.name().kind == Kind::Result;
        assert_eq!(seals.contains(SealFlag::F_SEAL_FUTURE_WRITE), result, "{seals:?}");
    }
}

#[test]
fn new_segments_are_of_huge_pages_as_far_as_these_fit() {
    for backing in BACKINGS {
        for kind in KINDS {
            for size in [HUGE - 1, HUGE, 8 << 20, (8 << 20) + 5, (16 << 20) - PAGE, 35 << 20] {
                let whole = size / HUGE * HUGE;
                // Huge pages that are dear are left alone. Each try makes some of them, and these are cheap in the next one.
                for tries in 1.. {
                    let before = offered();
                    let segment = create(backing, kind, size);
                    check_whole(&segment);
                    assert!(size < HUGE || (segment.as_ptr() as usize).is_multiple_of(HUGE), "{segment:?}");
                    let mapped = mapped_huge(&segment);
                    assert!(mapped.len() == 1 && mapped[0] <= whole, "{segment:?}: {mapped:?}");
                    if mapped == [whole] {
                        break;
                    }
                    if !before || !offered() {
                        println!("no huge pages here: {segment:?} has {mapped:?} of {whole} bytes in them");
                        break;
                    }
                    assert!(tries < 100, "{segment:?} has {mapped:?} of {whole} bytes in huge pages");
                }
            }
        }
    }
}

#[test]
fn clients_map_huge_pages_as_what_they_are() {
    let size = (8 << 20) + 5;
    for backing in BACKINGS {
        for kind in KINDS {
            let segment = create(backing, kind, size);
            let daemon = mapped_huge(&segment)[0];
            let mut makers = vec![Mapping::read_only, Mapping::private_writable];
            if kind.is_client_writable() {
                makers.extend([Mapping::read_write, Mapping::inherited]);
            }
            for make in makers {
                let client = make(segment.fd(), size as u64, backing).unwrap();
                assert!((client.as_ptr() as usize).is_multiple_of(HUGE), "{client:?}");
                client.prefault().unwrap();
                assert_eq!(mapped_huge(&segment), [daemon; 2], "{client:?}");
                assert_eq!(bytes(client.as_ptr(), size), vec![0; size]);
            }
        }
    }
}

#[test]
fn a_private_view_of_huge_pages_copies_what_is_written() {
    let segment = create(Backing::Memfd, Kind::Result, 2 * HUGE);
    fill(&segment, 1);
    let private = Mapping::private_writable(segment.fd(), 2 * HUGE as u64, Backing::Memfd).unwrap();
    private.prefault().unwrap();
    // SAFETY: inside the mapping, which is writable, and nobody has a reference into it.
    unsafe { private.as_mut_ptr().unwrap().add(PAGE).write_bytes(9, PAGE) };
    assert_eq!(bytes(segment.as_ptr(), segment.len()), vec![1; 2 * HUGE]);
    fill(&segment, 2);
    let seen = bytes(private.as_ptr(), private.len());
    assert!(seen[PAGE..2 * PAGE].iter().all(|byte| *byte == 9));
    assert!(seen[..PAGE].iter().chain(&seen[2 * PAGE..]).all(|byte| *byte == 2));
}

#[test]
fn holes_in_huge_pages_are_seen_and_filled() {
    let punch = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    for backing in BACKINGS {
        for kind in [Kind::Window, Kind::Input] {
            for hole in [3 * PAGE..5 * PAGE, HUGE - PAGE..HUGE + PAGE, HUGE..3 * HUGE, 0..4 * HUGE] {
                let segment = create(backing, kind, 4 * HUGE);
                fill(&segment, 3);
                let client = Mapping::inherited(segment.fd(), 4 * HUGE as u64, backing).unwrap();
                client.prefault().unwrap();
                fallocate(segment.fd(), punch, hole.start as i64, hole.len() as i64).unwrap();
                // Where the kernel cannot split a huge page it clears the part: zeros as well, and nothing is missing.
                assert!([0, hole.len() as u64].contains(&segment.missing_bytes().unwrap()));
                segment.refill().unwrap();
                assert_eq!(segment.missing_bytes().unwrap(), 0);
                for seen in [bytes(segment.as_ptr(), 4 * HUGE), bytes(client.as_ptr(), 4 * HUGE)] {
                    assert!(seen[hole.clone()].iter().all(|byte| *byte == 0));
                    assert!(seen[..hole.start].iter().chain(&seen[hole.end..]).all(|byte| *byte == 3));
                }
                fill(&segment, 4);
                assert_eq!(bytes(client.as_ptr(), 4 * HUGE), vec![4; 4 * HUGE]);
            }
        }
    }
}

#[test]
fn without_huge_pages_all_is_the_same() {
    child::play("no-huge-pages");
}

#[test]
fn a_dev_shm_that_is_too_small_for_huge_pages_is_an_error_and_no_signal() {
    child::play_beside_small_dev_shm("small-dev-shm", "7m");
}

/// What the children do; without a role it is nothing.
#[test]
fn child() {
    let Some(role) = child::role() else { return };
    match role.as_str() {
        "no-huge-pages" => no_huge_pages(),
        "small-dev-shm" => small_dev_shm(),
        other => panic!("no such role: {other}"),
    }
    println!("{}", child::done(&role));
}

fn no_huge_pages() {
    // For this process only: from here on the kernel refuses as one does that knows of no huge pages.
    set_thp_disable(true).unwrap();
    assert!(!offered());
    for backing in BACKINGS {
        for kind in KINDS {
            for size in [HUGE, (8 << 20) + 5, 35 << 20] {
                let segment = create(backing, kind, size);
                check_whole(&segment);
                assert_eq!(mapped_huge(&segment), [0], "{segment:?}");
                let client = Mapping::read_only(segment.fd(), size as u64, backing).unwrap();
                fill(&segment, 5);
                assert_eq!(bytes(client.as_ptr(), size), vec![5; size]);
            }
        }
    }
}

fn small_dev_shm() {
    // To the last page.
    let full = create(Backing::Posix, Kind::Result, 7 << 20);
    check_whole(&full);
    drop(full);
    // Pieces of huge pages that fit alone and not together: several at once all see the room, and some do not get it.
    let (mut made, mut refused) = (0, 0);
    for _ in 0..50 {
        let results: Vec<_> = std::thread::scope(|scope| {
            let create = || Segment::create(Backing::Posix, &fresh(Kind::Window), 5 << 20);
            let threads: Vec<_> = (0..4).map(|_| scope.spawn(create)).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        for result in &results {
            match result {
                Ok(segment) => {
                    check_whole(segment);
                    made += 1;
                }
                Err(SegmentError::NoRoom { place: "/dev/shm", .. }) => refused += 1,
                Err(other) => panic!("{other}"),
            }
        }
    }
    println!("{made} made, {refused} refused");
    assert!(refused >= 150, "two of them do not fit together");
    check_whole(&create(Backing::Posix, Kind::Window, 5 << 20));
}
