//! Files in, files out, and back.

use std::fs::{self, File};

use arrow_array::cast::AsArray;
use arrow_array::types::Float32Type;
use arrow_ipc::writer::{FileWriter, StreamWriter};
use parquet::arrow::ArrowWriter;
use safetensors::SafeTensors;
use safetensors::tensor::Dtype;

use crate::Outcome;
use crate::data::{flat, floats_of, largest, read_arrow, read_parquet, table, texts, write_model};
use crate::place::Place;

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
