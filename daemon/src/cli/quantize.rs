//! `shmquant quantize IN OUT`: a file through the daemon into a file, or into the catalog.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use arrow_buffer::Buffer;
use bytes::Bytes;
use clap::builder::PossibleValuesParser;
use serde_json::{Value, json};
use shmquant_kernels::{Granularity, Mapping, OnNonFinite, Scheme};
use shmquant_protocol::client::{Held, ItemReport, Options, Quantized, Source};
use shmquant_protocol::descriptor::Body;
use shmquant_protocol::files::arrow_ipc::{self, Batches};
use shmquant_protocol::files::safetensors::{OtherTypes, Skipped};
use shmquant_protocol::message::Naming;
use shmquant_protocol::table::{Output, Override, OverrideSpec, Pattern, Table, TableOptions};

use super::attach::attach;
use super::error::CliError;
use super::input::{Content, Input};
use super::link::Link;
use super::output::{Kind, Sink};
use super::progress::Progress;
use super::text::{Listing, clean};
use super::units;

/// Quantize a safetensors, Arrow IPC or Parquet file
///
/// Every float tensor of a model, every column of float vectors of a table (and the plain float columns that --columns names). The result is an Arrow IPC or Parquet file, by its name; with --name it is published as well, and OUT may be left out.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// File to read; its format is found in its first bytes
    #[arg(value_name = "IN")]
    input: PathBuf,

    /// File to write: .arrow or .parquet
    #[arg(value_name = "OUT", required_unless_present = "name")]
    output: Option<PathBuf>,

    /// Number format (`shmquant schemes` says what each is)
    #[arg(long, default_value = "int8", value_parser = words(&Scheme::ALL.map(Scheme::name)))]
    scheme: String,

    /// Elements that share a scale, along the last axis
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    group_size: Option<u32>,

    /// What shares a scale [default: row; group for layers below 8 bits; tensor for plain columns]
    #[arg(long, value_parser = words(&["tensor", "row", "dimension", "group"]))]
    granularity: Option<String>,

    /// Where codes lie around zero [default: the scheme's]
    #[arg(long, value_parser = words(&Mapping::ALL.map(Mapping::name)))]
    mapping: Option<String>,

    /// What NaN and infinities do
    #[arg(long, default_value = "error", value_parser = words(&["error", "null", "saturate"]))]
    on_nonfinite: String,

    /// Another scheme for a layer or column, or "none" to leave it as it is; NAME may be a pattern ("*embed*") or "re:..."
    #[arg(long = "override", value_name = "NAME=SCHEME")]
    overrides: Vec<String>,

    /// Columns to quantize [default: all of float vectors]
    #[arg(long, value_delimiter = ',', value_name = "A,B")]
    columns: Option<Vec<String>>,

    /// Other columns that the result keeps [default: all]
    #[arg(long, value_delimiter = ',', value_name = "A,B")]
    keep: Option<Vec<String>>,

    /// Count nulls inside vectors and layers as 0
    #[arg(long)]
    nulls_as_zero: bool,

    /// A layer that cannot be quantized becomes a null with an error text, and the others go on
    #[arg(long)]
    continue_on_error: bool,

    /// Refuse a model with tensors that are not of floats, instead of leaving those out
    #[arg(long)]
    strict: bool,

    /// Measure the error of every layer or column
    #[arg(long)]
    metrics: bool,

    /// Publish the result under this name
    #[arg(long)]
    name: Option<String>,

    /// Take the place of another dataset of that name
    #[arg(long, requires = "name")]
    replace: bool,

    /// Give up after this long [default: never]
    #[arg(long, value_parser = units::parse_duration, value_name = "TIME")]
    timeout: Option<Duration>,

    /// Do not start a daemon if none runs
    #[arg(long)]
    no_start: bool,

    /// Say nothing about progress and about what was left out
    #[arg(long, short)]
    quiet: bool,

    /// Print a report as JSON
    #[arg(long)]
    json: bool,
}

fn words(words: &[&'static str]) -> PossibleValuesParser {
    PossibleValuesParser::new(words.iter().copied())
}

pub(super) fn run(args: Args, link: &Link, out: &mut dyn Write) -> Result<(), CliError> {
    // What cannot be written is not worth quantizing.
    let target = args.output.as_deref().map(|path| Kind::of(path).map(|kind| (path, kind))).transpose()?;
    if let Some((path, Kind::Safetensors)) = target {
        return Err(CliError::told(
            format!("{}: quantized values are not written as safetensors", path.display()),
            "end the name with .arrow or .parquet; `shmquant dequantize` makes safetensors of either",
        ));
    }
    let other = if args.strict { OtherTypes::Refuse } else { OtherTypes::Skip };
    let mut input = Input::open(&args.input, other)?;
    let options = options(&args)?;
    let (table, skipped, source) = load(&mut input, &options)?;
    if !args.quiet && !skipped.is_empty() {
        let some: Vec<_> =
            skipped.iter().take(3).map(|s| format!("{} ({})", clean(&s.name), s.dtype)).collect();
        let more = if skipped.len() > 3 { ", ..." } else { "" };
        let count = units::plural(skipped.len() as u64, "tensor");
        eprintln!("left out {count} without floats: {}{more}", some.join(", "));
    }
    let quantized = quantize(&args, link, &table)?;
    // Values of two versions of a file would be worth nothing.
    input.check()?;
    let Quantized { held, report, .. } = quantized;
    let (result_bytes, created) = (held.len() as u64, held.created());
    let file_bytes = match target {
        Some((path, kind)) => Some(write(path, kind, held, &table, source.as_ref())?),
        None => None,
    };
    let source_bytes = table.input_bytes();
    let summary = Summary {
        args: &args,
        table: &table,
        report: &report,
        skipped: &skipped,
        source_bytes,
        result_bytes,
        file_bytes,
        created,
    };
    if args.json { summary.json(out) } else { summary.text(out) }
}

fn options(args: &Args) -> Result<TableOptions, CliError> {
    let word = |what: &str, word: &str| CliError::told(format!("{word:?} is no {what}"), "see --help");
    let scheme = |text: &str| text.parse::<Scheme>().map_err(|_| word("scheme", text));
    let overrides = args.overrides.iter().map(|text| {
        let (pattern, to) = text.rsplit_once('=').ok_or_else(|| {
            CliError::told(
                format!("--override {text:?} has no \"=\""),
                "write it as NAME=SCHEME or NAME=none",
            )
        })?;
        let action = match to {
            "none" => None,
            to => Some(OverrideSpec { scheme: Some(scheme(to)?), ..OverrideSpec::default() }),
        };
        Ok(Override { pattern: Pattern::parse(pattern)?, action })
    });
    Ok(TableOptions {
        scheme: scheme(&args.scheme)?,
        mapping: args
            .mapping
            .as_deref()
            .map(|text| text.parse::<Mapping>().map_err(|_| word("mapping", text)))
            .transpose()?,
        granularity: args
            .granularity
            .as_deref()
            .map(|text| text.parse::<Granularity>().map_err(|_| word("granularity", text)))
            .transpose()?,
        group_size: args.group_size,
        on_nonfinite: args
            .on_nonfinite
            .parse::<OnNonFinite>()
            .map_err(|_| word("policy", &args.on_nonfinite))?,
        nulls_as_zero: args.nulls_as_zero,
        metrics: args.metrics,
        continue_on_error: args.continue_on_error,
        columns: args.columns.clone(),
        named: args.name.is_some(),
        keep: args.keep.clone(),
        overrides: overrides.collect::<Result<_, CliError>>()?,
        ..TableOptions::default()
    })
}

/// The table to quantize, what was left out, and the columns that do not cross.
fn load(
    input: &mut Input,
    options: &TableOptions,
) -> Result<(Table, Vec<Skipped>, Option<Batches>), CliError> {
    match &mut input.content {
        Content::Tensors(tensors) => {
            let layers = std::mem::take(&mut tensors.layers);
            let skipped = std::mem::take(&mut tensors.skipped);
            Ok((Table::from_layers(layers, false, options)?, skipped, None))
        }
        Content::Table(batches) => {
            let table = Table::from_batches(batches.schema.clone(), batches.batches.clone(), options)?;
            Ok((table, Vec::new(), Some(batches.clone())))
        }
    }
}

fn quantize(args: &Args, link: &Link, table: &Table) -> Result<Quantized, CliError> {
    let session = if args.no_start { link.running() } else { link.running_or_started() };
    let progress = Progress::new("quantizing", table.input_bytes(), args.quiet);
    let report = |done, of| progress.set(done, of);
    let named = args.name.as_ref().map(|name| Naming {
        name: name.clone(),
        replace: args.replace,
        digest: table.digest(),
    });
    let options = Options { timeout: args.timeout, named, progress: Some(&report), ..Options::default() };
    Ok(session.quantize(table, &options)?)
}

/// Writes the result and tells the file's size.
fn write(
    path: &Path,
    kind: Kind,
    held: Held,
    table: &Table,
    source: Option<&Batches>,
) -> Result<u64, CliError> {
    let mut sink = Sink::create(path)?;
    let whole = !table.outputs().iter().any(|output| matches!(output, Output::PassThrough { .. }))
        && (table.is_layers() || source.is_none_or(|source| source.schema.metadata().is_empty()));
    if whole && kind == Kind::Arrow {
        // The result is a complete Arrow IPC file already.
        sink.bytes(held.as_slice())?;
        return sink.finish();
    }
    let bytes = Buffer::from(Bytes::from_owner(held));
    let result = arrow_ipc::read_file(path, &bytes)?;
    let result = match source.filter(|_| !whole) {
        Some(source) => attach(path, &result, source, table.outputs())?,
        None => result,
    };
    match kind {
        Kind::Parquet => sink.parquet(&result.schema, &result.batches)?,
        Kind::Arrow | Kind::Safetensors => sink.arrow(&result.schema, &result.batches)?,
    }
    sink.finish()
}

/// What is told about it afterwards.
struct Summary<'a> {
    args: &'a Args,
    table: &'a Table,
    report: &'a [ItemReport],
    skipped: &'a [Skipped],
    source_bytes: u64,
    result_bytes: u64,
    created: bool,
    file_bytes: Option<u64>,
}

impl Summary<'_> {
    /// Names of what was quantized, in the report's order.
    fn items(&self) -> Vec<(&str, &ItemReport)> {
        let items = &self.table.descriptor().items;
        let names =
            items.iter().filter(|item| matches!(item.body, Body::Values(_))).map(|item| item.name.as_str());
        names.zip(self.report).collect()
    }

    fn text(&self, out: &mut dyn Write) -> Result<(), CliError> {
        let what = if self.table.is_layers() { "layer" } else { "column" };
        let place = match (&self.args.output, &self.args.name) {
            (Some(path), None) => path.display().to_string(),
            (Some(path), Some(name)) => format!("{} and dataset {}", path.display(), clean(name)),
            (None, Some(name)) => format!("dataset {}", clean(name)),
            (None, None) => String::new(),
        };
        let percent = 100.0 * self.result_bytes as f64 / (self.source_bytes.max(1)) as f64;
        let values =
            self.table.descriptor().items.iter().filter(|i| matches!(i.body, Body::Values(_))).count();
        let existed = if self.created { "" } else { ", existed already" };
        let line = format!(
            "{place}: {} as {}, {} -> {} ({percent:.0} %){existed}",
            units::plural(values as u64, what),
            self.args.scheme,
            units::bytes(self.source_bytes),
            units::bytes(self.result_bytes),
        );
        writeln!(out, "{line}").map_err(CliError::Stdout)?;
        if self.args.metrics && self.created {
            let mut listing =
                Listing::new(&["name", ">values", ">clipped", ">mse", ">SQNR dB", ">max error", ">cosine"]);
            for (name, r) in self.items() {
                listing.row([
                    name.to_owned(),
                    units::count(r.n),
                    units::count(r.n_clipped),
                    format!("{:.3e}", r.mse),
                    format!("{:.2}", r.sqnr_db),
                    format!("{:.3e}", r.max_abs_err),
                    format!("{:.6}", r.cosine),
                ]);
            }
            listing.write(out).map_err(CliError::Stdout)?;
        }
        Ok(())
    }

    fn json(&self, out: &mut dyn Write) -> Result<(), CliError> {
        let finite = |value: f64| if value.is_finite() { json!(value) } else { Value::Null };
        let items: Vec<_> = self
            .items()
            .into_iter()
            .map(|(name, r)| {
                json!({
                    "name": name, "n": r.n, "n_clipped": r.n_clipped, "n_nonfinite": r.n_nonfinite,
                    "n_degenerate_groups": r.n_degenerate_groups, "n_nulled": r.n_nulled, "mse": finite(r.mse),
                    "sqnr_db": finite(r.sqnr_db), "max_abs_err": finite(r.max_abs_err), "cosine": finite(r.cosine),
                })
            })
            .collect();
        let skipped: Vec<_> = self
            .skipped
            .iter()
            .map(|s| json!({ "name": s.name, "dtype": s.dtype, "shape": s.shape, "bytes": s.bytes }))
            .collect();
        let report = json!({
            "input": self.args.input, "output": self.args.output, "name": self.args.name, "scheme": self.args.scheme,
            "layers": self.table.is_layers(), "input_bytes": self.source_bytes, "result_bytes": self.result_bytes,
            "file_bytes": self.file_bytes, "created": self.created, "items": items, "skipped": skipped,
        });
        writeln!(out, "{report:#}").map_err(CliError::Stdout)
    }
}
