//! The command `shmquant`.

fn main() {
    std::process::exit(shmquant_daemon::cli::main(std::env::args_os()));
}
