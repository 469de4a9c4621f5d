//! What the kernel says of the mappings of one instance's segments in this process.

use std::fs;

/// The values of a field of each of the mappings, in the order of their addresses.
pub(crate) fn fields(instance: u64, field: &str) -> Vec<String> {
    let text = fs::read_to_string("/proc/self/smaps").unwrap();
    let hex = format!("{instance:016x}");
    let mut ours = false;
    let mut found = Vec::new();
    for line in text.lines() {
        if line.split_whitespace().next().is_some_and(|word| word.contains('-')) {
            ours = line.contains(&hex);
        } else if ours && let Some(value) = line.strip_prefix(field) {
            found.push(value.trim().to_owned());
        }
    }
    found
}
