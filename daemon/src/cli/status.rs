//! `shmquant status`: how the daemon is doing.

use std::io::Write;

use serde_json::Value;
use shmquant_protocol::client::ClientError;

use super::error::CliError;
use super::link::Link;
use super::text::clean;
use super::units;

/// Show how the daemon is doing
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &Args, link: &Link, out: &mut dyn Write) -> Result<(), CliError> {
    let session = link.running();
    let facts = parse(&session.stat()?)?;
    session.close();
    let written = if args.json { writeln!(out, "{facts:#}") } else { out.write_all(text(&facts).as_bytes()) };
    written.map_err(CliError::Stdout)
}

/// Datasets in the catalog, by `STAT`'s text.
pub(super) fn datasets(stat: &str) -> Result<u64, CliError> {
    Ok(parse(stat)?["datasets"].as_u64().unwrap_or(0))
}

/// `STAT`'s text.
pub(super) fn parse(stat: &str) -> Result<Value, CliError> {
    Ok(serde_json::from_str(stat).map_err(|error| ClientError::Protocol(format!("STAT: {error}")))?)
}

fn text(facts: &Value) -> String {
    let word = |name: &str| facts[name].as_str().map(|text| clean(text).into_owned()).unwrap_or_default();
    let number = |name: &str| facts[name].as_u64().unwrap_or(0);
    let count = |name: &str| units::count(number(name));
    let mut uses: Vec<_> = facts["bytes_by_use"].as_object().into_iter().flatten().collect();
    uses.retain(|(_, bytes)| bytes.as_u64().is_some_and(|bytes| bytes > 0));
    let uses: Vec<_> = uses
        .iter()
        .map(|(name, bytes)| format!("{} {name}", units::bytes(bytes.as_u64().unwrap_or(0))))
        .collect();
    let mut memory = units::bytes(number("bytes"));
    // It is worked out when memory is first needed.
    if number("budget") > 0 {
        memory = format!("{memory} of {}", units::bytes(number("budget")));
    }
    let lines = [
        (
            "daemon",
            format!(
                "{} (pid {}), up {}, {} worker threads, {} segments",
                word("version"),
                number("pid"),
                units::age(number("uptime_s") as f64),
                count("workers"),
                word("backing"),
            ),
        ),
        ("address", word("address")),
        ("memory", memory),
        ("", uses.join(", ")),
        (
            "in use",
            format!("{} sessions, {} lanes, {} leases", count("sessions"), count("lanes"), count("leases")),
        ),
        (
            "catalog",
            format!(
                "{} datasets, {} tickets ({} of ended processes)",
                count("datasets"),
                count("tickets"),
                count("orphans"),
            ),
        ),
        (
            "requests",
            format!(
                "{} done, {} running, {} waiting for memory, {} refused",
                count("requests"),
                count("jobs"),
                count("waiting"),
                count("refused"),
            ),
        ),
        ("reuse", format!("recycled {} times, retired {} times", count("recycled"), count("retired"))),
    ];
    let lines = lines.iter().filter(|(_, text)| !text.is_empty());
    lines.map(|(name, text)| format!("{name:<9} {text}\n")).collect()
}
