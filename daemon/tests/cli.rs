//! The command from end to end: the real binary, a real daemon on a socket of its own, real files.

use std::collections::HashMap;
use std::error::Error;
use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::Arc;

use arrow_array::cast::AsArray;
use arrow_array::types::{Float32Type, Int8Type};
use arrow_array::{
    ArrayRef, DictionaryArray, FixedSizeListArray, Float32Array, Int64Array, RecordBatch, StringArray,
};
use arrow_ipc::reader::FileReader;
use arrow_ipc::writer::{FileWriter, StreamWriter};
use arrow_schema::{Field, Schema, SchemaRef};
use parquet::arrow::ArrowWriter;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};
use serde_json::Value;
use tempfile::TempDir;

type Outcome = Result<(), Box<dyn Error>>;

/// A directory with a daemon's address in it. The daemon, if one runs in the end, is stopped.
struct Place {
    dir: TempDir,
}

/// A daemon in the foreground.
struct Served(Child);

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
    fn new() -> Result<Self, Box<dyn Error>> {
        Ok(Self { dir: TempDir::new()? })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_shmquant"));
        command.args(args).current_dir(self.dir.path()).stdin(Stdio::null());
        command.env("SHMQUANT_ADDRESS", self.path("run/shmquant.sock")).env_remove("SHMQUANT_LOG");
        command
    }

    fn run(&self, args: &[&str]) -> Result<Output, Box<dyn Error>> {
        Ok(self.command(args).output()?)
    }

    /// Standard output of a command that must succeed.
    fn ok(&self, args: &[&str]) -> Result<String, Box<dyn Error>> {
        let output = self.run(args)?;
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{args:?}: {}: {errors}", output.status);
        Ok(String::from_utf8(output.stdout)?)
    }

    fn json(&self, args: &[&str]) -> Result<Value, Box<dyn Error>> {
        Ok(serde_json::from_str(&self.ok(args)?)?)
    }

    /// Standard error of a command that must fail with `status`, and print nothing as data.
    fn fails(&self, status: i32, args: &[&str]) -> Result<String, Box<dyn Error>> {
        let output = self.run(args)?;
        let errors = String::from_utf8(output.stderr)?;
        assert_eq!(output.status.code(), Some(status), "{args:?}: {errors}");
        assert_eq!(String::from_utf8(output.stdout)?, "", "{args:?}");
        assert!(errors.starts_with("error: "), "{errors}");
        Ok(errors)
    }

    /// A daemon in the foreground, ready.
    fn serve(&self, options: &[&str]) -> Result<Served, Box<dyn Error>> {
        let args: Vec<_> = ["serve"].iter().chain(options).copied().collect();
        let mut child = self.command(&args).stdout(Stdio::piped()).stderr(Stdio::null()).spawn()?;
        let out = child.stdout.take().ok_or("no standard output")?;
        let served = Served(child);
        let mut line = String::new();
        BufReader::new(out).read_line(&mut line)?;
        assert_eq!(line, "ready\n");
        Ok(served)
    }

    fn names(&self) -> Result<Vec<String>, Box<dyn Error>> {
        let mut names = Vec::new();
        for entry in fs::read_dir(self.dir.path())? {
            names.push(entry?.file_name().to_string_lossy().into_owned());
        }
        names.sort();
        Ok(names)
    }
}

/// Floats that look random and are the same every time.
fn noise(n: usize, seed: u64) -> Vec<f32> {
    let mut random = fastrand::Rng::with_seed(seed);
    (0..n).map(|_| random.f32() * 2.0 - 1.0).collect()
}

fn bytes_of(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

fn floats_of(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
}

type Tensors = HashMap<String, (Vec<usize>, Vec<f32>)>;

/// A small model: matrices, a vector, and a tensor of integers.
fn write_model(path: &Path) -> Result<Tensors, Box<dyn Error>> {
    let shapes = [("a.weight", vec![48, 300]), ("b.weight", vec![3, 5, 7]), ("norm", vec![300])];
    let model: Tensors = shapes
        .into_iter()
        .enumerate()
        .map(|(i, (name, shape))| {
            let values = noise(shape.iter().product(), i as u64 + 1);
            (name.to_owned(), (shape, values))
        })
        .collect();
    let data: Vec<_> =
        model.iter().map(|(name, (shape, v))| (name.clone(), shape.clone(), bytes_of(v))).collect();
    let ids: Vec<u8> = (0..4i64).flat_map(i64::to_le_bytes).collect();
    let mut views = vec![("ids".to_owned(), TensorView::new(Dtype::I64, vec![4], &ids)?)];
    for (name, shape, bytes) in &data {
        views.push((name.clone(), TensorView::new(Dtype::F32, shape.clone(), bytes)?));
    }
    fs::write(path, safetensors::serialize(views, None)?)?;
    Ok(model)
}

/// Vectors, a plain float column, and columns that are none of the daemon's business.
fn table() -> Result<(SchemaRef, Vec<RecordBatch>), Box<dyn Error>> {
    let batch = |from: i64, rows: i64| -> Result<RecordBatch, Box<dyn Error>> {
        let values = noise(rows as usize * 24, from as u64 + 7);
        let vectors = values.chunks(24).map(|row| Some(row.iter().copied().map(Some).collect::<Vec<_>>()));
        let emb = FixedSizeListArray::from_iter_primitive::<Float32Type, _, _>(vectors, 24);
        let kind: DictionaryArray<Int8Type> =
            (from..from + rows).map(|i| if i % 2 == 0 { "even" } else { "odd" }).collect();
        let text: StringArray =
            (from..from + rows).map(|i| (i % 7 != 0).then(|| format!("row {i}"))).collect();
        Ok(RecordBatch::try_from_iter_with_nullable([
            ("id", Arc::new(Int64Array::from_iter_values(from..from + rows)) as ArrayRef, false),
            ("emb", Arc::new(emb), true),
            ("kind", Arc::new(kind), true),
            ("text", Arc::new(text), true),
            ("price", Arc::new(Float32Array::from_iter_values(noise(rows as usize, 99))), true),
        ])?)
    };
    let batches = vec![batch(0, 70)?, batch(70, 1)?, batch(71, 130)?];
    let fields: Vec<Field> = batches[0].schema().fields().iter().map(|f| f.as_ref().clone()).collect();
    let metadata = HashMap::from([("origin".to_owned(), "a test".to_owned())]);
    let schema = Arc::new(Schema::new_with_metadata(fields, metadata));
    let batches = batches.into_iter().map(|b| b.with_schema(schema.clone())).collect::<Result<_, _>>()?;
    Ok((schema, batches))
}

fn read_arrow(path: &Path) -> Result<(SchemaRef, RecordBatch), Box<dyn Error>> {
    let reader = FileReader::try_new(File::open(path)?, None)?;
    let schema = reader.schema();
    let batches = reader.collect::<Result<Vec<_>, _>>()?;
    Ok((schema.clone(), arrow_select::concat::concat_batches(&schema, &batches)?))
}

fn read_parquet(path: &Path) -> Result<(SchemaRef, RecordBatch), Box<dyn Error>> {
    let builder = ParquetRecordBatchReaderBuilder::try_new(File::open(path)?)?;
    // The reader's own schema is without the table's metadata.
    let schema = builder.schema().clone();
    let batches = builder.build()?.collect::<Result<Vec<_>, _>>()?;
    Ok((schema.clone(), arrow_select::concat::concat_batches(&schema, &batches)?))
}

/// Values of a column of vectors, flat.
fn flat(batch: &RecordBatch, name: &str) -> Vec<f32> {
    let column = &batch[name];
    let child = column.as_fixed_size_list().values().clone();
    child.as_primitive::<Float32Type>().values().to_vec()
}

/// Rows of a column as texts, whatever dictionary they come from.
fn texts(batch: &RecordBatch, name: &str) -> Vec<Option<String>> {
    let column = &batch[name];
    if let Some(dictionary) = column.as_dictionary_opt::<Int8Type>() {
        let values = dictionary.values().as_string::<i32>();
        return dictionary.keys().iter().map(|k| k.map(|k| values.value(k as usize).to_owned())).collect();
    }
    column.as_string::<i32>().iter().map(|t| t.map(str::to_owned)).collect()
}

fn largest(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

#[test]
fn a_model_goes_to_codes_and_back() -> Outcome {
    let place = Place::new()?;
    let model = write_model(&place.path("m.safetensors"))?;
    let mut daemon = place.serve(&["--budget", "256MiB", "--workers", "2"])?;

    let status = place.json(&["status", "--json"])?;
    assert_eq!(status["pid"].as_u64(), Some(u64::from(daemon.0.id())));
    assert_eq!((&status["workers"], &status["backing"]), (&2.into(), &"memfd".into()));
    assert!(place.ok(&["status"])?.contains("memfd segments"));

    let args = ["quantize", "m.safetensors", "m.arrow", "--scheme", "int8", "--metrics", "--json"];
    let report = place.json(&args)?;
    assert_eq!(report["layers"], true);
    assert_eq!(report["skipped"][0]["name"], "ids");
    assert_eq!(report["items"].as_array().map(Vec::len), Some(3));
    for item in report["items"].as_array().into_iter().flatten() {
        let cosine = item["cosine"].as_f64().unwrap_or(0.0);
        assert!((0.9999..=1.0).contains(&cosine), "{item}");
    }
    let info = place.json(&["info", "m.arrow", "--json"])?;
    assert_eq!((&info["kind"], &info["rows"]), (&"layers".into(), &3.into()));
    for layer in info["layers"].as_array().into_iter().flatten() {
        assert_eq!((&layer["scheme"], &layer["decodes"]), (&"int8".into(), &true.into()));
        let shape: Vec<usize> = serde_json::from_value(layer["shape"].clone())?;
        assert_eq!(Some(&shape), model.get(layer["name"].as_str().unwrap_or("")).map(|(shape, _)| shape));
    }
    assert!(place.ok(&["info", "m.arrow"])?.contains("48 x 300"));

    place.ok(&["dequantize", "m.arrow", "back.safetensors"])?;
    let bytes = fs::read(place.path("back.safetensors"))?;
    let back = SafeTensors::deserialize(&bytes)?;
    assert_eq!(back.len(), 3);
    for (name, (shape, values)) in &model {
        let tensor = back.tensor(name)?;
        assert_eq!((tensor.shape(), tensor.dtype()), (shape.as_slice(), Dtype::F32));
        let error = largest(&floats_of(tensor.data()), values);
        // Half a step of a row whose largest magnitude is at most 1.
        assert!(error > 0.0 && error <= 0.5 / 127.0 + 1e-6, "{name}: {error}");
    }

    // Another type, one layer only, another container.
    place.ok(&["dequantize", "m.arrow", "half.safetensors", "--dtype", "bfloat16", "--names", "norm"])?;
    let bytes = fs::read(place.path("half.safetensors"))?;
    let half = SafeTensors::deserialize(&bytes)?;
    assert_eq!(
        (half.len(), half.tensor("norm")?.dtype(), half.tensor("norm")?.data().len()),
        (1, Dtype::BF16, 600)
    );
    place.ok(&["quantize", "m.safetensors", "m.parquet", "--scheme", "uint4", "--group-size", "32", "-q"])?;
    place.ok(&["dequantize", "m.parquet", "w.arrow"])?;
    let (_, weights) = read_arrow(&place.path("w.arrow"))?;
    assert_eq!(weights.num_rows(), 3);
    let names = weights.column_by_name("layer_name").ok_or("no names")?.as_string::<i32>().clone();
    for row in 0..3 {
        let values = weights.column_by_name("weights").ok_or("no weights")?.as_list::<i32>().value(row);
        let values = values.as_primitive::<Float32Type>().values().to_vec();
        let error = largest(&values, &model[names.value(row)].1);
        assert!(error > 0.5 / 127.0 && error <= 1.0 / 15.0 + 1e-6, "{}: {error}", names.value(row));
    }

    // SIGTERM, the end awaited.
    let output = place.run(&["stop"])?;
    assert!(output.status.success() && String::from_utf8(output.stderr)?.starts_with("stopped the daemon"));
    assert!(daemon.0.wait()?.success());
    assert!(place.fails(1, &["status"])?.contains("hint: "));
    assert!(place.run(&["stop"])?.status.success(), "stopping what does not run");
    Ok(())
}

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
fn vectors_keep_their_company_in_every_format() -> Outcome {
    let place = Place::new()?;
    let (schema, batches) = table()?;
    let whole = arrow_select::concat::concat_batches(&schema, &batches)?;
    // A file has room for one dictionary, a stream replaces it.
    let mut file = FileWriter::try_new(File::create(place.path("t.arrow"))?, &schema)?;
    file.write(&whole)?;
    file.finish()?;
    let mut stream = StreamWriter::try_new(File::create(place.path("t.arrows"))?, &schema)?;
    let mut parquet = ArrowWriter::try_new(File::create(place.path("t.parquet"))?, schema.clone(), None)?;
    for batch in &batches {
        stream.write(batch)?;
        parquet.write(batch)?;
    }
    stream.finish()?;
    parquet.close()?;
    let _daemon = place.serve(&[])?;

    for input in ["t.arrow", "t.arrows", "t.parquet"] {
        for output in ["out.arrow", "out.parquet"] {
            place.ok(&["quantize", input, output, "--scheme", "int8", "-q"])?;
            let read = if output.ends_with("arrow") { read_arrow } else { read_parquet };
            let (out, batch) = read(&place.path(output))?;
            let names: Vec<_> = out.fields().iter().map(|f| f.name().as_str()).collect();
            assert_eq!(names, ["id", "emb", "emb_scale", "kind", "text", "price"], "{input} {output}");
            assert_eq!(out.metadata().get("origin").map(String::as_str), Some("a test"), "{input} {output}");
            for name in ["kind", "text"] {
                assert_eq!(texts(&batch, name), texts(&whole, name), "{input} {output}");
            }
            assert_eq!(batch.column_by_name("id"), whole.column_by_name("id"));

            let info = place.json(&["info", output, "--json"])?;
            let codes = &info["columns"][1]["codes"];
            assert_eq!(
                (&codes["scheme"], &codes["decodes"]),
                (&"int8".into(), &true.into()),
                "{input} {output}"
            );

            place.ok(&["dequantize", output, "back.arrow"])?;
            let (back, values) = read_arrow(&place.path("back.arrow"))?;
            let names: Vec<_> = back.fields().iter().map(|f| f.name().as_str()).collect();
            assert_eq!(names, ["id", "emb", "kind", "text", "price"], "{input} {output}");
            let error = largest(&flat(&values, "emb"), &flat(&whole, "emb"));
            assert!(error > 0.0 && error <= 0.5 / 127.0 + 1e-6, "{input} {output}: {error}");
        }
    }

    // A plain column, fewer companions, and a dataset that has them all inside.
    place.ok(&["quantize", "t.arrow", "p.arrow", "--columns", "emb,price", "--keep", "id", "-q"])?;
    let (out, _) = read_arrow(&place.path("p.arrow"))?;
    assert!(
        out.index_of("price_scale").is_ok() && out.index_of("id").is_ok() && out.index_of("text").is_err()
    );
    place.ok(&["quantize", "t.arrow", "n.arrow", "--name", "t", "-q"])?;
    let (out, batch) = read_arrow(&place.path("n.arrow"))?;
    assert!(out.index_of("kind").is_ok());
    assert_eq!(texts(&batch, "text"), texts(&whole, "text"));
    Ok(())
}

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
            "Layer 'w' contains NaN or Inf at index 1 (2 in all)",
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
