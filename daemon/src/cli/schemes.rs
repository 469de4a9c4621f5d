//! `shmquant schemes`: the number formats.

use std::io::Write;

use serde_json::json;
use shmquant_kernels::{Affine, Mapping, Scheme};

use super::error::CliError;
use super::text::Listing;

/// List the number formats that values can be quantized to
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &Args, out: &mut dyn Write) -> Result<(), CliError> {
    if args.json {
        let all: Vec<_> = Scheme::ALL
            .iter()
            .map(|s| {
                json!({
                    "scheme": s.name(), "bits": s.bits(), "signed": s.signed(),
                    "mapping": s.default_mapping().name(), "mappings": mappings(*s),
                    "granularity": granularity(*s), "description": s.description(),
                })
            })
            .collect();
        return writeln!(out, "{:#}", json!(all)).map_err(CliError::Stdout);
    }
    let mut listing = Listing::new(&["scheme", ">bits", "mapping", "layers", "description"]);
    for s in Scheme::ALL {
        let cells =
            [s.name(), &s.bits().to_string(), &mappings(s).join(", "), granularity(s), s.description()];
        listing.row(cells.map(str::to_owned));
    }
    listing.write(out).map_err(CliError::Stdout)
}

/// Those that the scheme has, its default first.
fn mappings(scheme: Scheme) -> Vec<&'static str> {
    let mut all: Vec<Mapping> =
        Mapping::ALL.into_iter().filter(|m| Affine::new(scheme, Some(*m)).is_ok()).collect();
    all.sort_by_key(|m| *m != scheme.default_mapping());
    all.iter().map(|m| m.name()).collect()
}

/// What a layer gets when none is named.
fn granularity(scheme: Scheme) -> &'static str {
    if scheme.bits() == 8 { "row" } else { "group of 128" }
}
