//! A place for commands: a directory, the address of its daemon, and what they say there.

use std::error::Error;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};

use serde_json::Value;
use tempfile::TempDir;

/// A directory with a daemon's address in it. The daemon, if one runs in the end, is stopped.
pub(crate) struct Place {
    pub(crate) dir: TempDir,
}

/// A daemon in the foreground.
pub(crate) struct Served(pub(crate) Child);

impl Drop for Served {
    fn drop(&mut self) {
        // It has ended already in a test that went well.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = self.command(&["stop", "--force"]).output();
    }
}

impl Place {
    pub(crate) fn new() -> Result<Self, Box<dyn Error>> {
        Ok(Self { dir: TempDir::new()? })
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_shmquant"));
        command.args(args).current_dir(self.dir.path()).stdin(Stdio::null());
        command.env("SHMQUANT_ADDRESS", self.path("run/shmquant.sock")).env_remove("SHMQUANT_LOG");
        command
    }

    pub(crate) fn run(&self, args: &[&str]) -> Result<Output, Box<dyn Error>> {
        Ok(self.command(args).output()?)
    }

    /// Standard output of a command that must succeed.
    pub(crate) fn ok(&self, args: &[&str]) -> Result<String, Box<dyn Error>> {
        let output = self.run(args)?;
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{args:?}: {}: {errors}", output.status);
        Ok(String::from_utf8(output.stdout)?)
    }

    pub(crate) fn json(&self, args: &[&str]) -> Result<Value, Box<dyn Error>> {
        Ok(serde_json::from_str(&self.ok(args)?)?)
    }

    /// Standard error of a command that must fail with `status`, and print nothing as data.
    pub(crate) fn fails(&self, status: i32, args: &[&str]) -> Result<String, Box<dyn Error>> {
        let output = self.run(args)?;
        let errors = String::from_utf8(output.stderr)?;
        assert_eq!(output.status.code(), Some(status), "{args:?}: {errors}");
        assert_eq!(String::from_utf8(output.stdout)?, "", "{args:?}");
        assert!(errors.starts_with("error: "), "{errors}");
        Ok(errors)
    }

    /// A daemon in the foreground, ready.
    pub(crate) fn serve(&self, options: &[&str]) -> Result<Served, Box<dyn Error>> {
        let args: Vec<_> = ["serve"].iter().chain(options).copied().collect();
        let mut child = self.command(&args).stdout(Stdio::piped()).stderr(Stdio::null()).spawn()?;
        let out = child.stdout.take().ok_or("no standard output")?;
        let served = Served(child);
        let mut line = String::new();
        BufReader::new(out).read_line(&mut line)?;
        assert_eq!(line, "ready\n");
        Ok(served)
    }

    pub(crate) fn names(&self) -> Result<Vec<String>, Box<dyn Error>> {
        let mut names = Vec::new();
        for entry in fs::read_dir(self.dir.path())? {
            names.push(entry?.file_name().to_string_lossy().into_owned());
        }
        names.sort();
        Ok(names)
    }
}
