//! The command `shmquant`: one file a command. The native binary and the Python extension both run it from here.
//!
//! Data goes to standard output, everything else to standard error; nothing here ends the process, the caller does that
//! with the status returned: 0 done, 1 an error, 2 a command line that cannot be understood.

use std::ffi::OsString;
use std::io::{self, BufWriter, Write};
use std::path::PathBuf;

use clap::{Parser, Subcommand};
use shmquant_protocol::client::{ClientError, StartCommand};

mod attach;
mod dequantize;
mod doctor;
mod error;
mod info;
mod input;
mod link;
mod ls;
mod output;
mod progress;
mod quantize;
mod schemes;
mod serve;
mod status;
mod stop;
mod text;
mod units;

use error::CliError;
use link::Link;

/// How long a daemon that was started for one command stays when nobody uses it.
const IDLE_EXIT: &str = "60s";

/// Quantizes Arrow data as a shared service of this host.
#[derive(Debug, Parser)]
#[command(name = "shmquant", version, propagate_version = true, subcommand_required = true)]
struct Cli {
    /// Socket of the daemon [default: in $XDG_RUNTIME_DIR/shmquant, else in /tmp/shmquant-<uid>]
    #[arg(long, global = true, env = "SHMQUANT_ADDRESS", value_name = "PATH", hide_env_values = true)]
    address: Option<PathBuf>,

    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Serve(serve::Args),
    Status(status::Args),
    Ls(ls::Args),
    Stop(stop::Args),
    Quantize(quantize::Args),
    Dequantize(dequantize::Args),
    Info(info::Args),
    Schemes(schemes::Args),
    Doctor(doctor::Args),
}

/// Runs the command line `args`, the program's name first, in a process whose executable is the command itself.
pub fn main(args: impl IntoIterator<Item = OsString>) -> i32 {
    // Without an executable to start there is no auto-start; every other command works.
    let program = std::env::current_exe().map(PathBuf::into_os_string).unwrap_or_else(|_| "shmquant".into());
    main_with(args, start_command(program, Vec::new()))
}

/// Runs the command line `args`, the program's name first; `start` starts a daemon where a command needs one.
pub fn main_with(args: impl IntoIterator<Item = OsString>, start: StartCommand) -> i32 {
    let cli = match Cli::try_parse_from(args) {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version go to standard output, faults to standard error; nothing is left to do if neither takes it.
            let _ = error.print();
            return error.exit_code();
        }
    };
    // Not locked: a daemon lives inside this call.
    let mut out = BufWriter::new(io::stdout());
    let result = run(cli, start, &mut out).and_then(|()| out.flush().map_err(CliError::Stdout));
    match result {
        Ok(()) => 0,
        // Whoever reads our output has seen enough (`shmquant ls | head -1`).
        Err(CliError::Stdout(error)) if error.kind() == io::ErrorKind::BrokenPipe => 0,
        Err(error) => {
            // What was found out before the error is worth having.
            let _ = out.flush();
            eprintln!("error: {error}");
            if let CliError::Client(ClientError::Connect { .. }) = error {
                eprintln!(
                    "hint: `shmquant serve --detach` starts one; `shmquant quantize` does so by itself"
                );
            }
            1
        }
    }
}

/// The command that starts a daemon for one use: `program` with `before`, then `serve` and its options.
pub fn start_command(program: impl Into<OsString>, before: Vec<OsString>) -> StartCommand {
    let serve = ["serve", serve::DETACHED, "--idle-exit", IDLE_EXIT].map(OsString::from);
    StartCommand { program: program.into(), args: before.into_iter().chain(serve).collect() }
}

fn run(cli: Cli, start: StartCommand, out: &mut dyn Write) -> Result<(), CliError> {
    // Commands on files alone go without an address, so a bad one does not concern them.
    let link = || Link::new(cli.address, start);
    match cli.command {
        Command::Serve(args) => serve::run(args, &link()?),
        Command::Status(args) => status::run(&args, &link()?, out),
        Command::Ls(args) => ls::run(&args, &link()?, out),
        Command::Stop(args) => stop::run(&args, &link()?),
        Command::Quantize(args) => quantize::run(args, &link()?, out),
        Command::Dequantize(args) => dequantize::run(&args, out),
        Command::Info(args) => info::run(&args, out),
        Command::Schemes(args) => schemes::run(&args, out),
        Command::Doctor(args) => doctor::run(&args, &link()?, out),
    }
}
