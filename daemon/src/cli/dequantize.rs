//! `shmquant dequantize IN OUT`: from codes back to values, without a daemon.

use std::borrow::Cow;
use std::io::Write;
use std::path::{Path, PathBuf};

use arrow_array::RecordBatch;
use clap::builder::PossibleValuesParser;
use half::bf16;
use serde_json::json;
use shmquant_kernels::FloatType;
use shmquant_protocol::decode;
use shmquant_protocol::files::arrow_ipc::Batches;
use shmquant_protocol::files::safetensors::{OtherTypes, TensorHead, Writer};

use super::error::CliError;
use super::info::{Texts, shape_at};
use super::input::{Content, Input};
use super::output::{Kind, Sink};
use super::progress::Progress;
use super::text::clean;
use super::units;

/// Turn a quantized Arrow IPC or Parquet file back into values
///
/// Layers become a safetensors model, or a table of weights; columns of codes become columns of vectors.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// File to read: a result of `shmquant quantize`, or what became of it
    #[arg(value_name = "IN")]
    input: PathBuf,

    /// File to write: .safetensors, .arrow or .parquet
    #[arg(value_name = "OUT")]
    output: PathBuf,

    /// Type of the values; bfloat16 and source (what each layer was) for safetensors only
    #[arg(long, default_value = "float32", value_parser = PossibleValuesParser::new(DTYPES))]
    dtype: String,

    /// Layers or columns to decode [default: all]
    #[arg(long, value_delimiter = ',', value_name = "A,B")]
    names: Option<Vec<String>>,

    /// Say nothing about progress and about what was left out
    #[arg(long, short)]
    quiet: bool,

    /// Print a report as JSON
    #[arg(long)]
    json: bool,
}

const SOURCE: &str = "source";
const DTYPES: [&str; 5] = ["float16", "bfloat16", "float32", "float64", SOURCE];

pub(super) fn run(args: &Args, out: &mut dyn Write) -> Result<(), CliError> {
    let kind = Kind::of(&args.output)?;
    let input = Input::open(&args.input, OtherTypes::Skip)?;
    let Content::Table(table) = &input.content else {
        return Err(CliError::told(
            format!("{} is a safetensors file, which holds no codes", args.input.display()),
            "`shmquant quantize` makes an Arrow IPC or Parquet file of it",
        ));
    };
    let layers = decode::is_layers(&table.schema);
    let mut sink = Sink::create(&args.output)?;
    let dtype = args.dtype.parse::<FloatType>().ok();
    let (count, left_out) = match (kind, dtype) {
        (Kind::Safetensors, _) if !layers => {
            return Err(CliError::told(
                format!("{} holds columns, and safetensors files hold layers", args.input.display()),
                "end the output's name with .arrow or .parquet",
            ));
        }
        (Kind::Safetensors, dtype) => tensors(args, table, dtype, &mut sink)?,
        (Kind::Arrow | Kind::Parquet, Some(dtype)) if dtype != FloatType::Bf16 => {
            let decoded = decode::table(&table.schema, &table.batches, args.names.as_deref(), dtype);
            let (schema, batches) = decoded.map_err(CliError::decode(&args.input))?;
            match kind {
                Kind::Parquet => sink.parquet(&schema, &batches)?,
                Kind::Arrow | Kind::Safetensors => sink.arrow(&schema, &batches)?,
            }
            (batches.iter().map(|batch| batch.num_rows() as u64).sum(), Vec::new())
        }
        (Kind::Arrow | Kind::Parquet, _) => {
            return Err(CliError::told(
                format!("--dtype {} is for safetensors files only", args.dtype),
                "choose float16, float32 or float64",
            ));
        }
    };
    input.check()?;
    let bytes = sink.finish()?;
    if !args.quiet && !left_out.is_empty() {
        let count = units::plural(left_out.len() as u64, "layer");
        eprintln!("left out {count} without data: {}", clean(&left_out.join(", ")));
    }
    let what = if layers { "layer" } else { "row" };
    let written = if args.json {
        let report = json!({
            "input": args.input, "output": args.output, "dtype": args.dtype, format!("{what}s"): count, "left_out": left_out,
            "input_bytes": input.bytes, "file_bytes": bytes,
        });
        writeln!(out, "{report:#}")
    } else {
        let (path, count) = (args.output.display(), units::plural(count, what));
        writeln!(out, "{path}: {count} as {}, {}", args.dtype, units::bytes(bytes))
    };
    written.map_err(CliError::Stdout)
}

/// One layer after the other, so that no more than one is in memory. Gives their number and the names without data.
fn tensors(
    args: &Args,
    table: &Batches,
    dtype: Option<FloatType>,
    sink: &mut Sink,
) -> Result<(u64, Vec<String>), CliError> {
    let path = args.output.clone();
    let wanted = |name: &str| args.names.as_ref().is_none_or(|names| names.iter().any(|n| n == name));
    let (mut heads, mut rows, mut left_out) = (Vec::new(), Vec::new(), Vec::new());
    for batch in &table.batches {
        let (names, sources) = (Texts::of(batch, "layer_name"), Texts::of(batch, "src_dtype"));
        let codes = batch.column_by_name("quantized_data");
        for row in 0..batch.num_rows() {
            let name = names.get(row).unwrap_or_default();
            if !wanted(&name) {
                continue;
            }
            if codes.is_none_or(|codes| codes.is_null(row)) {
                left_out.push(name);
                continue;
            }
            let dtype = match dtype {
                Some(dtype) => dtype,
                None => source_type(&args.input, &name, sources.get(row))?,
            };
            let one = batch.slice(row, 1);
            let shape = match shape_at(&one, 0).filter(|shape| !shape.is_empty()) {
                // Faults in it are told when the layer is decoded.
                Some(shape) => shape.iter().map(|d| u64::try_from(*d).unwrap_or(0)).collect(),
                None => flat(&args.input, &one)?,
            };
            heads.push(TensorHead { name: name.clone(), dtype, shape });
            rows.push((one, dtype));
        }
    }
    let missing = args.names.iter().flatten().find(|name| {
        let found = heads.iter().any(|head| head.name == **name);
        !found && !left_out.contains(*name)
    });
    if let Some(name) = missing {
        return Err(CliError::told(
            format!("{}: there is no layer {name:?}", args.input.display()),
            "`shmquant info` lists the layers",
        ));
    }
    let bytes = |head: &TensorHead| head.dtype.size() as u64 * head.shape.iter().product::<u64>();
    let total = heads.iter().map(bytes).fold(0, u64::saturating_add);
    let progress = Progress::new("decoding", total, args.quiet);
    let count = heads.len() as u64;
    let metadata = [("format", "pt"), ("producer", concat!("shmquant ", env!("CARGO_PKG_VERSION")))];
    let mut writer = Writer::new(&path, sink.buffered(), heads, &metadata)?;
    let mut done = 0;
    for (one, dtype) in rows {
        // Arrow has no bfloat16; every one of them is a float32.
        let through = if dtype == FloatType::Bf16 { FloatType::F32 } else { dtype };
        let layer = decode::layer(&one, 0, through).map_err(CliError::decode(&args.input))?;
        let values = match dtype {
            FloatType::Bf16 => Cow::Owned(narrowed(&layer.values)),
            _ => Cow::Borrowed(layer.values.as_slice()),
        };
        writer.tensor(&layer.name, &values)?;
        done += values.len() as u64;
        progress.set(done, total);
    }
    writer.finish()?;
    Ok((count, left_out))
}

/// The shape of a layer that was quantized without one: as many values as it has, or a scalar.
fn flat(path: &Path, one: &RecordBatch) -> Result<Vec<u64>, CliError> {
    let layer = decode::layer(one, 0, FloatType::F32).map_err(CliError::decode(path))?;
    let n = (layer.values.len() / FloatType::F32.size()) as u64;
    Ok(if n == 1 { Vec::new() } else { vec![n] })
}

fn source_type(path: &Path, layer: &str, word: Option<String>) -> Result<FloatType, CliError> {
    word.as_deref().and_then(|word| word.parse().ok()).ok_or_else(|| {
        CliError::told(
            format!("{}: layer {layer:?} does not say what type it was", path.display()),
            "choose one with --dtype",
        )
    })
}

/// bfloat16 from float32, to the nearest, ties to even.
fn narrowed(bytes: &[u8]) -> Vec<u8> {
    let (words, _) = bytes.as_chunks::<4>();
    words.iter().flat_map(|word| bf16::from_f32(f32::from_le_bytes(*word)).to_le_bytes()).collect()
}
