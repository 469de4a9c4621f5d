//! What `ls` prints: datasets, results and inputs, who holds them, and what can be mapped by its path.

use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::Outcome;
use crate::data::{read_arrow, write_model};
use crate::native::session_at;
use crate::place::Place;

#[test]
fn a_dataset_is_listed_mapped_and_guarded() -> Outcome {
    let place = Place::new()?;
    write_model(&place.path("m.safetensors"))?;
    let mut daemon = place.serve(&[])?;
    let report =
        place.json(&["quantize", "m.safetensors", "--name", "m/u4", "--scheme", "uint4", "--json"])?;
    assert_eq!((&report["created"], &report["output"]), (&true.into(), &Value::Null));
    // The same again finds it; another spec does not take its name.
    let again = place.json(&[
        "quantize",
        "m.safetensors",
        "m.arrow",
        "--name",
        "m/u4",
        "--scheme",
        "uint4",
        "--json",
    ])?;
    assert_eq!(again["created"], false);
    let taken = place.fails(1, &["quantize", "m.safetensors", "--name", "m/u4", "--scheme", "int8", "-q"])?;
    assert!(taken.contains("m/u4"), "{taken}");

    let all = place.json(&["ls", "--json"])?;
    let dataset = &all["datasets"][0];
    assert_eq!((&dataset["name"], all["datasets"].as_array().map(Vec::len)), (&"m/u4".into(), Some(1)));
    let text = place.ok(&["ls"])?;
    assert!(text.starts_with("name") && text.contains("m/u4"), "{text}");
    // Its path is a file for every reader: this command's own, and arrow's.
    let path = dataset["path"].as_str().ok_or("no path")?;
    assert_eq!(place.json(&["info", path, "--json"])?["rows"], 3);
    assert_eq!(read_arrow(Path::new(path))?.1, read_arrow(&place.path("m.arrow"))?.1);

    let refused = place.fails(1, &["stop"])?;
    assert!(refused.contains("1 dataset") && refused.contains("hint: "), "{refused}");
    assert!(daemon.0.try_wait()?.is_none());
    place.ok(&["stop", "--force"])?;
    assert!(daemon.0.wait()?.success());
    Ok(())
}

#[test]
fn memory_that_a_process_writes_its_values_to_is_listed() -> Outcome {
    let place = Place::new()?;
    let _daemon = place.serve(&[])?;
    let nothing = place.run(&["ls"])?;
    assert_eq!(nothing.stdout, b"");
    assert_eq!(String::from_utf8(nothing.stderr)?, "no datasets, results or inputs\n");

    let session = session_at(&place.path("run/shmquant.sock"), None);
    let input = session.allocate(100_000, None, None)?;
    let all = place.json(&["ls", "--json"])?;
    assert_eq!((&all["datasets"], &all["results"]), (&json!([]), &json!([])));
    let listed = &all["inputs"][0];
    let pid = std::process::id();
    assert_eq!((&listed["state"], &listed["length"]), (&json!("input"), &json!(100_000)));
    assert_eq!((&listed["holders"], &listed["readers"]), (&json!([pid]), &json!(0)));
    let size = listed["size"].as_u64().ok_or("no size")?;
    assert!(size >= 100_000 && listed["age_s"].is_u64() && listed["segment"].is_u64(), "{listed}");
    assert_eq!(all["sessions"][0]["input_bytes"], size);

    let text = place.ok(&["ls"])?;
    let rows: Vec<Vec<&str>> = text.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(rows.len(), 2, "{text}");
    assert_eq!(rows[1][..4], ["-", "input", "97.7", "KiB"], "{text}");
    assert_eq!(rows[1][6], pid.to_string(), "{text}");
    assert!(rows[1][7].starts_with('(') && rows[1].last() == Some(&"-"), "{text}");
    let text = place.ok(&["ls", "--sessions"])?;
    let titles = text.lines().next().unwrap_or_default();
    assert!(titles.contains("inputs") && text.contains(&pid.to_string()), "{text}");

    drop(input);
    let patience = Instant::now() + Duration::from_secs(60);
    while place.json(&["ls", "--json"])?["inputs"] != json!([]) {
        assert!(Instant::now() < patience, "it is listed after its end");
    }
    Ok(())
}
