//! Starting daemons, and what needs none: the list of schemes and the doctor.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::Outcome;
use crate::data::write_model;
use crate::native::session_at;
use crate::place::Place;

#[test]
fn a_daemon_is_started_when_it_is_needed_and_in_the_background() -> Outcome {
    let place = Place::new()?;
    write_model(&place.path("m.safetensors"))?;
    place.ok(&["quantize", "m.safetensors", "o.arrow", "-q"])?;
    let pid = place.json(&["status", "--json"])?["pid"].as_u64().ok_or("no pid")?;
    // It has left this process's session and directory, and has a log.
    assert_eq!(fs::read_link(format!("/proc/{pid}/cwd"))?, Path::new("/"));
    assert!(place.path("run/shmquant.log").exists());
    // A second one is refused, the first one goes on.
    let error = place.fails(1, &["serve", "--detach"])?;
    assert!(error.contains("already serves"), "{error}");
    let error = place.fails(1, &["serve"])?;
    assert!(error.contains("already serves"), "{error}");
    assert_eq!(place.json(&["status", "--json"])?["pid"].as_u64(), Some(pid));
    place.ok(&["stop"])?;

    place.ok(&[
        "serve",
        "--detach",
        "--workers",
        "1",
        "--backing",
        "memfd",
        "--log",
        "own.log",
        "--no-poll",
    ])?;
    let status = place.json(&["status", "--json"])?;
    assert_eq!(status["workers"], 1);
    assert_ne!(status["pid"].as_u64(), Some(pid));
    assert!(place.path("own.log").exists());
    place.ok(&["stop"])?;
    Ok(())
}

#[test]
fn the_list_of_schemes_needs_nothing() -> Outcome {
    let place = Place::new()?;
    let schemes = place.json(&["schemes", "--json"])?;
    let words: Vec<_> =
        schemes.as_array().into_iter().flatten().filter_map(|s| s["scheme"].as_str()).collect();
    assert_eq!(words, ["int8", "uint8", "int4", "uint4", "int2", "uint2"]);
    // Whoever has read enough closes the pipe; that is no fault.
    let mut child = place.command(&["schemes"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    drop(child.stdout.take());
    assert!(child.wait()?.success());
    Ok(())
}

/// State of one check, and what it says, in the doctor's JSON.
fn check<'a>(report: &'a Value, name: &str) -> (&'a str, &'a str) {
    let found = report["checks"].as_array().into_iter().flatten().find(|check| check["check"] == name);
    found.map_or(("missing", ""), |c| (c["state"].as_str().unwrap_or(""), c["found"].as_str().unwrap_or("")))
}

#[test]
fn the_doctor_looks_tries_and_changes_nothing() -> Outcome {
    let place = Place::new()?;
    let healthy = place.json(&["doctor", "--json"])?;
    for name in
        ["kernel", "segments", "seals", "pidfd", "descriptors", "directory", "daemon", "PID namespace"]
    {
        assert_eq!(check(&healthy, name).0, "ok", "{name}: {healthy:#}");
    }
    assert!(check(&healthy, "daemon").1.contains("none runs"));
    assert!(place.names()?.is_empty(), "not even a directory was made");

    // A daemon that runs is found, a killed one's socket is told from it.
    let mut served = place.serve(&[])?;
    let running = place.json(&["doctor", "--json"])?;
    assert_eq!(check(&running, "daemon").0, "ok");
    assert!(check(&running, "daemon").1.contains(&format!("process {} serves", served.0.id())));
    served.0.kill()?;
    served.0.wait()?;
    let stale = place.json(&["doctor", "--json"])?;
    assert_eq!((stale["state"].as_str(), check(&stale, "daemon").0), (Some("warn"), "warn"), "{stale:#}");
    assert!(check(&stale, "daemon").1.contains("left of a dead daemon"));
    let text = place.ok(&["doctor"])?;
    assert!(text.contains("warn  daemon") && text.contains("the next daemon takes its place"), "{text}");

    // What a daemon cannot work with: the limits of the shell, and a directory that others look into.
    let script = "ulimit -n 40; ulimit -f 1024; exec \"$0\" doctor --json";
    let mut limited = Command::new("sh");
    limited.args(["-c", script, env!("CARGO_BIN_EXE_shmquant")]);
    limited.env("SHMQUANT_ADDRESS", place.path("run/shmquant.sock"));
    let limited = limited.output()?;
    assert_eq!(limited.status.code(), Some(1));
    let report: Value = serde_json::from_slice(&limited.stdout)?;
    assert_eq!(report["state"], "fail");
    assert_eq!(check(&report, "descriptors"), ("fail", "RLIMIT_NOFILE is 40"));
    assert_eq!(check(&report, "file size").0, "fail");
    let errors = String::from_utf8(limited.stderr)?;
    assert!(
        errors.starts_with("error: a daemon cannot work here: descriptors, file size\nhint: "),
        "{errors}"
    );

    let open = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    fs::set_permissions(place.path("run"), open)?;
    let output = place.run(&["doctor", "--json"])?;
    assert_eq!(output.status.code(), Some(1));
    let report: Value = serde_json::from_slice(&output.stdout)?;
    assert_eq!(check(&report, "directory").0, "fail");
    assert!(check(&report, "directory").1.ends_with("has mode 755"));
    Ok(())
}

#[test]
fn a_daemon_takes_as_many_processes_and_lanes_as_it_was_told() -> Outcome {
    let place = Place::new()?;
    let _daemon = place.serve(&["--max-sessions", "1", "--max-lanes", "3"])?;
    let session = session_at(&place.path("run/shmquant.sock"), None);
    assert_eq!(session.connect()?.max_lanes, 3);
    let error = place.fails(1, &["status"])?;
    assert!(error.contains("1 processes are connected") && error.contains("--max-sessions"), "{error}");
    session.close();
    let patience = Instant::now() + Duration::from_secs(60);
    while !place.run(&["status"])?.status.success() {
        assert!(Instant::now() < patience, "the place of a session that has ended is not free");
    }
    place.fails(2, &["serve", "--max-lanes", "0"])?;
    Ok(())
}

#[test]
fn a_command_looks_for_the_daemon_where_clients_look() -> Outcome {
    let place = Place::new()?;
    // No absolute path, so not the runtime directory of anybody's.
    let mut command = place.command(&["doctor", "--json"]);
    command.env_remove("SHMQUANT_ADDRESS").env("XDG_RUNTIME_DIR", "relative");
    let report: Value = serde_json::from_slice(&command.output()?.stdout)?;
    let found = check(&report, "directory").1;
    assert!(found.starts_with(&format!("/tmp/shmquant-{} ", nix::unistd::geteuid())), "{found}");
    Ok(())
}
