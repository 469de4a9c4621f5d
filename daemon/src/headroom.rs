//! How much memory this process may still take: the host's available memory and its cgroups' limits.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use nix::sys::statvfs::statvfs;
use shmquant_protocol::segment::Backing;

/// What the system says about memory, all in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Headroom {
    /// `MemAvailable` of the host.
    pub(crate) host: u64,
    /// What the tightest of our memory cgroups still lets us take; `None` without a limit.
    pub(crate) cgroup: Option<u64>,
    /// What the file system of the segments still takes; `None` without one.
    pub(crate) files: Option<u64>,
}

/// What was read last. It takes descriptors to read, and where a process has used up its own, "nobody knows"
/// must not become "there is no limit".
static LAST_HOST: AtomicU64 = AtomicU64::new(u64::MAX);
static LAST_CGROUP: AtomicU64 = AtomicU64::new(u64::MAX);

impl Headroom {
    /// Reads it anew.
    pub(crate) fn read(backing: Backing) -> Self {
        let files = match backing {
            Backing::Memfd => None,
            Backing::Posix => statvfs("/dev/shm")
                .ok()
                .and_then(|stat| stat.blocks_available().checked_mul(stat.fragment_size())),
        };
        let cgroup = cgroups(Path::new("/"));
        let Some(host) = host_available() else {
            let last = LAST_CGROUP.load(Ordering::Relaxed);
            let cgroup = Some(last).filter(|last| *last < u64::MAX);
            return Self { host: LAST_HOST.load(Ordering::Relaxed), cgroup, files };
        };
        LAST_HOST.store(host, Ordering::Relaxed);
        LAST_CGROUP.store(cgroup.unwrap_or(u64::MAX), Ordering::Relaxed);
        Self { host, cgroup, files }
    }

    /// Bytes that may still be taken by limits that are not shared out: they are what they say.
    pub(crate) fn hard(&self) -> u64 {
        self.cgroup.unwrap_or(u64::MAX).min(self.files.unwrap_or(u64::MAX))
    }
}

/// All memory of the host.
pub(crate) fn host_total() -> u64 {
    meminfo("MemTotal:").unwrap_or(1 << 62)
}

fn host_available() -> Option<u64> {
    meminfo("MemAvailable:")
}

fn meminfo(key: &str) -> Option<u64> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(key))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim_end().parse().ok()?;
    kib.checked_mul(1024)
}

/// The least headroom of all memory cgroups that this process is in, parents included.
fn cgroups(root: &Path) -> Option<u64> {
    let text = fs::read_to_string(root.join("proc/self/cgroup")).ok()?;
    let mut least = None;
    for line in text.lines() {
        let mut parts = line.splitn(3, ':');
        let (Some(_), Some(controllers), Some(path)) = (parts.next(), parts.next(), parts.next()) else {
            continue;
        };
        let found = if controllers.is_empty() {
            let unified = ["sys/fs/cgroup", "sys/fs/cgroup/unified"].map(|dir| root.join(dir));
            let mount = unified.into_iter().find(|dir| dir.join("cgroup.controllers").exists());
            mount.and_then(|mount| tightest(&mount, path, &V2))
        } else if controllers.split(',').any(|c| c == "memory") {
            tightest(&root.join("sys/fs/cgroup/memory"), path, &V1)
        } else {
            None
        };
        least = match (least, found) {
            (Some(a), Some(b)) => Some(u64::min(a, b)),
            (a, b) => a.or(b),
        };
    }
    least
}

struct Files {
    limit: &'static str,
    usage: &'static str,
    /// Page cache that the kernel drops before it kills anybody.
    inactive: &'static str,
}

const V2: Files = Files { limit: "memory.max", usage: "memory.current", inactive: "inactive_file " };
const V1: Files = Files {
    limit: "memory.limit_in_bytes",
    usage: "memory.usage_in_bytes",
    inactive: "total_inactive_file ",
};

/// Walks from the process's group up to the mount. Inside a container the path may be that of the host:
/// then only the mount itself is there, and it is ours.
fn tightest(mount: &Path, path: &str, files: &Files) -> Option<u64> {
    let mut dir: PathBuf = mount.join(path.trim_start_matches('/'));
    let mut least = None;
    while dir.starts_with(mount) {
        if let Some(free) = headroom_of(&dir, files) {
            least = Some(least.map_or(free, |l: u64| l.min(free)));
        }
        if !dir.pop() {
            break;
        }
    }
    least
}

fn headroom_of(dir: &Path, files: &Files) -> Option<u64> {
    let number = |name: &str| fs::read_to_string(dir.join(name)).ok()?.trim().parse::<u64>().ok();
    // "max", or v1's page-rounded 2^63, are no limit.
    let limit = number(files.limit).filter(|limit| *limit < 1 << 60)?;
    let usage = number(files.usage)?;
    let inactive = fs::read_to_string(dir.join("memory.stat")).ok().and_then(|text| {
        text.lines().find_map(|line| line.strip_prefix(files.inactive)?.trim().parse::<u64>().ok())
    });
    // Shared memory is not in inactive_file, so this is cache only. A margin stays: page tables, stacks and
    // private copies are charged to the same group.
    let margin = (limit / 16).min(64 << 20);
    let used = usage.saturating_sub(inactive.unwrap_or(0));
    Some(limit.saturating_sub(used).saturating_sub(margin))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(root: &Path, path: &str, text: &str) {
        let path = root.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    #[test]
    fn the_tightest_group_counts() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        write(root, "proc/self/cgroup", "0::/a/b\n");
        write(root, "sys/fs/cgroup/cgroup.controllers", "memory\n");
        write(root, "sys/fs/cgroup/a/memory.max", "1600000000\n");
        write(root, "sys/fs/cgroup/a/memory.current", "1000000000\n");
        write(root, "sys/fs/cgroup/a/memory.stat", "anon 5\ninactive_file 200000000\n");
        write(root, "sys/fs/cgroup/a/b/memory.max", "max\n");
        write(root, "sys/fs/cgroup/a/b/memory.current", "900000000\n");
        assert_eq!(cgroups(root), Some(800_000_000 - (64 << 20)));
        write(root, "sys/fs/cgroup/a/b/memory.max", "960000000\n");
        assert_eq!(cgroups(root), Some(0));
    }

    #[test]
    fn version_one_and_foreign_paths() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        write(root, "proc/self/cgroup", "4:cpu,memory:/docker/abc\n1:name=systemd:/\n");
        write(root, "sys/fs/cgroup/memory/memory.limit_in_bytes", "1048576000\n");
        write(root, "sys/fs/cgroup/memory/memory.usage_in_bytes", "48576000\n");
        assert_eq!(cgroups(root), Some(1_000_000_000 - 1_048_576_000 / 16));
        write(root, "sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n");
        assert_eq!(cgroups(root), None);
    }

    #[test]
    fn this_host_tells() {
        let seen = Headroom::read(Backing::Posix);
        assert!(seen.host < u64::MAX && seen.hard() < u64::MAX);
        assert_eq!(Headroom::read(Backing::Memfd).files, None);
    }
}
