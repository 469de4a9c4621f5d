//! `shmquant ls`: datasets, and the results and inputs that processes hold.

use std::collections::HashMap;
use std::io::Write;

use serde_json::{Value, json};
use shmquant_protocol::client::{ClientError, Session};
use shmquant_protocol::message::Listing as What;

use super::error::CliError;
use super::link::Link;
use super::text::{self, Listing};
use super::units;

/// Letters of a command line that are shown.
const COMMAND: usize = 40;

/// List datasets, and the results and inputs that processes hold
///
/// A dataset's path can be mapped by any Arrow reader; what has no name has none. The holder is who made a dataset, or the processes that hold a result. An input is memory that a process writes its values to.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// List processes instead: what each holds and how much memory it takes
    #[arg(long)]
    sessions: bool,

    /// Print JSON: datasets, results, inputs and sessions, with everything that is known about them
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &Args, link: &Link, out: &mut dyn Write) -> Result<(), CliError> {
    let session = link.running();
    // One after another, so something may come or go in between; nothing here adds them up.
    let datasets = list(&session, What::Datasets)?;
    let results = list(&session, What::Results)?;
    let inputs = list(&session, What::Inputs)?;
    let mut sessions = list(&session, What::Sessions)?;
    session.close();
    // Whoever asks is there only for asking.
    let own = u64::from(std::process::id());
    sessions.retain(|session| session["pid"].as_u64() != Some(own));
    if args.json {
        let all = json!({ "datasets": datasets, "results": results, "inputs": inputs, "sessions": sessions });
        return writeln!(out, "{all:#}").map_err(CliError::Stdout);
    }
    let unnamed = results.iter().filter(|result| result["dataset"] != Value::Bool(true)).chain(&inputs);
    let listing =
        if args.sessions { of_sessions(&sessions) } else { of_memory(&datasets, unnamed, &sessions) };
    if listing.is_empty() {
        let what =
            if args.sessions { "no process uses the daemon" } else { "no datasets, results or inputs" };
        eprintln!("{what}");
        return Ok(());
    }
    listing.write(out).map_err(CliError::Stdout)
}

fn list(session: &Session, what: What) -> Result<Vec<Value>, CliError> {
    let parse = |text: &String| {
        serde_json::from_str(text).map_err(|error| ClientError::Protocol(format!("LIST: {error}")))
    };
    Ok(session.list(what)?.iter().map(parse).collect::<Result<_, _>>()?)
}

fn of_memory<'a>(
    datasets: &[Value],
    unnamed: impl Iterator<Item = &'a Value>,
    sessions: &[Value],
) -> Listing {
    let commands: HashMap<u64, &str> =
        sessions.iter().filter_map(|s| Some((s["pid"].as_u64()?, s["command"].as_str()?))).collect();
    let holder = |pid: u64, command: Option<&str>| match command {
        Some(command) if !command.is_empty() => format!("{pid} ({})", text::shortened(command, COMMAND)),
        _ => pid.to_string(),
    };
    let mut listing = Listing::new(&["name", "state", ">size", ">age", "holder", "path"]);
    for dataset in datasets {
        let maker = dataset["pid"].as_u64().map(|pid| holder(pid, dataset["command"].as_str()));
        listing.row([
            word(dataset, "name"),
            word(dataset, "state"),
            size(dataset, "length"),
            age(dataset),
            maker.unwrap_or_default(),
            word(dataset, "path"),
        ]);
    }
    for entry in unnamed {
        let pids = entry["holders"].as_array().into_iter().flatten().filter_map(Value::as_u64);
        let holders: Vec<_> = pids.map(|pid| holder(pid, commands.get(&pid).copied())).collect();
        listing.row([
            "-".to_owned(),
            word(entry, "state"),
            size(entry, "length"),
            age(entry),
            holders.join(", "),
            "-".to_owned(),
        ]);
    }
    listing
}

fn of_sessions(sessions: &[Value]) -> Listing {
    let mut listing = Listing::new(&[
        ">pid", "command", ">age", ">lanes", ">results", ">held", ">inputs", ">pool", ">windows",
    ]);
    for session in sessions {
        let number = |name: &str| session[name].as_u64().map_or(String::new(), units::count);
        listing.row([
            session["pid"].to_string(),
            text::shortened(session["command"].as_str().unwrap_or("-"), COMMAND).into_owned(),
            age(session),
            number("lanes"),
            number("results"),
            size(session, "bytes"),
            size(session, "input_bytes"),
            size(session, "pool_bytes"),
            size(session, "window_bytes"),
        ]);
    }
    listing
}

fn word(entry: &Value, name: &str) -> String {
    entry[name].as_str().unwrap_or("-").to_owned()
}

fn size(entry: &Value, name: &str) -> String {
    entry[name].as_u64().map_or_else(|| "-".to_owned(), units::bytes)
}

fn age(entry: &Value) -> String {
    entry["age_s"].as_f64().map_or_else(|| "-".to_owned(), units::age)
}
