//! Descriptors of one daemon's segments in this process: its own, and those of its clients here. `STAT` counts all that the
//! process has, and other tests open and close theirs meanwhile.

use serde_json::Value;

/// How many there are of the daemon that said `stat`.
pub(crate) fn of(stat: &Value) -> usize {
    let instance = stat["instance"].as_str().unwrap();
    let links = std::fs::read_dir("/proc/self/fd").unwrap();
    let links = links.filter_map(|fd| std::fs::read_link(fd.unwrap().path()).ok());
    let of_it = links.filter(|link| link.to_string_lossy().contains(instance)).count();
    assert!(of_it > 0, "no descriptor names {instance}");
    of_it
}
