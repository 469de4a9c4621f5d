//! What goes wrong is told, and leaves nothing behind.

use std::collections::HashMap;
use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::process::Command;

use safetensors::tensor::{Dtype, TensorView};

use crate::Outcome;
use crate::data::{bytes_of, write_model};
use crate::place::Place;

#[test]
fn a_kill_in_the_middle_of_writing_leaves_nothing_behind() -> Outcome {
    let place = Place::new()?;
    write_model(&place.path("m.safetensors"))?;
    let _daemon = place.serve(&[])?;
    let before = place.names()?;
    // The kernel ends a process whose file passes the limit: one block.
    let line = "ulimit -c 0; ulimit -f 1; exec \"$0\" quantize m.safetensors o.arrow -q";
    let mut command = Command::new("sh");
    command.args(["-c", line, env!("CARGO_BIN_EXE_shmquant")]).current_dir(place.dir.path());
    let status = command.env("SHMQUANT_ADDRESS", place.path("run/shmquant.sock")).status()?;
    assert_eq!(status.signal(), Some(nix::sys::signal::Signal::SIGXFSZ as i32), "{status}");
    assert_eq!(place.names()?, before);
    Ok(())
}

#[test]
fn what_goes_wrong_is_told_and_leaves_nothing_behind() -> Outcome {
    let place = Place::new()?;
    write_model(&place.path("m.safetensors"))?;
    fs::write(place.path("junk"), "neither fish nor fowl")?;
    fs::write(place.path("cut.arrow"), b"ARROW1\0\0 and then nothing")?;
    let bad = bytes_of(&[1.0, f32::NAN, 2.0, f32::INFINITY]);
    let view = TensorView::new(Dtype::F32, vec![2, 2], &bad)?;
    fs::write(place.path("nan.safetensors"), safetensors::serialize([("w", view)], None)?)?;
    fs::write(place.path("keep.arrow"), "mine")?;
    let before = place.names()?;

    // Command lines that cannot be understood.
    for args in
        [&["quantize", "m.safetensors"][..], &["nonsense"], &["quantize", "a", "b", "--scheme", "int3"]]
    {
        place.fails(2, args)?;
    }
    assert!(place.ok(&["--help"])?.contains("quantize"));
    assert!(place.ok(&["--version"])?.contains(env!("CARGO_PKG_VERSION")));

    // Nothing runs, and nothing is to be started.
    let error = place.fails(1, &["quantize", "m.safetensors", "o.arrow", "--no-start", "-q"])?;
    assert!(error.contains("hint: ") && error.contains("shmquant.sock"), "{error}");
    let error = place.fails(1, &["ls"])?;
    assert!(error.contains("hint: "), "{error}");

    let _daemon = place.serve(&[])?;
    for (args, what) in [
        (&["quantize", "missing.safetensors", "o.arrow"][..], "missing.safetensors"),
        (&["quantize", "junk", "o.arrow"], "hint: "),
        (&["quantize", "cut.arrow", "o.arrow"], "hint: "),
        (&["quantize", "m.safetensors", "o.txt"], ".parquet"),
        (&["quantize", "m.safetensors", "o.safetensors"], "dequantize"),
        (&["quantize", "m.safetensors", "o.arrow", "--strict"], "ids"),
        (
            &["quantize", "m.safetensors", "o.arrow", "--mapping", "symmetric", "--scheme", "uint4", "-q"],
            "symmetric",
        ),
        (&["quantize", "m.safetensors", "o.arrow", "--override", "norm", "-q"], "NAME=SCHEME"),
        (&["quantize", "m.safetensors", "no/such/dir/o.arrow", "-q"], "no/such/dir"),
        (
            &["quantize", "nan.safetensors", "keep.arrow"],
            "Layer 'w' contains NaN or Inf at index 1 (2 in all, the first is NaN)",
        ),
        (&["dequantize", "m.safetensors", "o.arrow"], "hint: "),
        (&["info", "junk"], "hint: "),
    ] {
        let error = place.fails(1, args)?;
        assert!(error.contains(what), "{args:?}: {error}");
    }
    assert_eq!(fs::read_to_string(place.path("keep.arrow"))?, "mine", "a failure took an older file along");
    let mut after = place.names()?;
    after.retain(|name| name != "run");
    assert_eq!(after, before, "something was left behind");

    // The same with a policy goes through.
    place.ok(&["quantize", "nan.safetensors", "keep.arrow", "--on-nonfinite", "saturate"])?;
    place.ok(&[
        "quantize",
        "m.safetensors",
        "o.arrow",
        "--override",
        "norm=none",
        "--override",
        "b.*=int4",
        "-q",
    ])?;
    let info = place.json(&["info", "o.arrow", "--json"])?;
    let schemes: HashMap<_, _> = info["layers"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|l| Some((l["name"].as_str()?, l["scheme"].as_str()?)))
        .collect();
    assert_eq!(schemes, HashMap::from([("a.weight", "int8"), ("b.weight", "int4"), ("norm", "float32")]));
    Ok(())
}
