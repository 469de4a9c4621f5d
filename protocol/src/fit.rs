//! Ranges found on some data and used on other: scales and zero points that many tables share.

use std::collections::BTreeMap;

use arrow_array::RecordBatch;
use arrow_schema::SchemaRef;
use serde::{Deserialize, Serialize};
use shmquant_kernels::{
    Affine, DomainParams, Fault, Granularity, Mapping, NoFlushing, OnNonFinite, Range, Scheme,
    Values as Floats, params_from_ranges, scan,
};

use crate::chunks::{Action, CHUNK_BYTES, Chunk};
use crate::client::Source;
use crate::descriptor::{Body, Item, Params, Role, Spec, Values, params_id};
use crate::meta::{decode_f32, encode_f32};
use crate::table::{Details, InputError, LayerInput, Table, TableOptions};

/// Scales and zero points by column or layer, with the scheme they belong to.
#[derive(Debug, Clone, PartialEq)]
pub struct TableParams {
    affine: Affine,
    granularity: Granularity,
    entries: BTreeMap<String, Entry>,
}

#[derive(Debug, Clone, PartialEq)]
struct Entry {
    params: Params,
    /// What they were computed from; absent where only scales are known.
    ranges: Option<Vec<Range>>,
}

impl TableParams {
    /// Smallest and largest values of a table, per tensor, row or dimension: `options` say which columns and which
    /// scheme. Without a granularity: layers `row`, vectors `dimension`, plain columns always `tensor`.
    pub fn fit(
        schema: SchemaRef,
        batches: Vec<RecordBatch>,
        options: &TableOptions,
    ) -> Result<Self, InputError> {
        Self::fit_with(options, |options| Table::from_batches(schema, batches, options))
    }

    /// The same for layers that lie in memory one by one.
    pub fn fit_layers(layers: Vec<LayerInput>, options: &TableOptions) -> Result<Self, InputError> {
        Self::fit_with(options, |options| Table::from_layers(layers, false, options))
    }

    fn fit_with(
        options: &TableOptions,
        table: impl FnOnce(&TableOptions) -> Result<Table, InputError>,
    ) -> Result<Self, InputError> {
        let argument = |details: Details| InputError::Argument(Box::new(details));
        if options.granularity == Some(Granularity::Group) || options.group_size.is_some() {
            let what = "ranges of groups fit only the values they were found on";
            let details = InputError::argument("granularity", what).value("group");
            return Err(argument(
                details.hint("granularity=\"dimension\", \"tensor\" or, for layers, \"row\""),
            ));
        }
        if options.params.is_some() {
            return Err(argument(InputError::argument("params", "fit finds params, it takes none")));
        }
        if options.overrides.iter().any(|o| o.action.is_some()) {
            let details = InputError::argument("overrides", "all params of one fit have the same scheme");
            return Err(argument(details.hint("an override of None leaves a layer out")));
        }
        let affine = Affine::new(options.scheme, options.mapping)
            .map_err(|e| argument(InputError::argument("mapping", e.to_string())))?;
        let mut options = options.clone();
        options.named = false;
        options.continue_on_error = false;
        options.part_of_stream = false;
        // Plain columns alone have no choice, and nothing else asks about it.
        let granularity = options.granularity;
        options.granularity = None;
        let table = table(&options)?;
        let granularity = granularity.unwrap_or_else(|| default_granularity(&table));
        let mut entries = BTreeMap::new();
        for (index, item) in table.descriptor().items.iter().enumerate() {
            let Body::Values(values) = &item.body else { continue };
            if values.null || table.descriptor().spec(values).affine.is_none() {
                continue;
            }
            let own = if values.role == Role::Plain { Granularity::Tensor } else { granularity };
            let spec = Spec { granularity: own, group_size: 0, ..*table.descriptor().spec(values) };
            let ranges = ranges(&table, index as u32, item, values, &spec)?;
            let entry = Entry::of(&item.name, ranges, &affine)?;
            if entries.insert(item.name.clone(), entry).is_some() {
                let what = format!("layer '{}' occurs more than once", item.name);
                return Err(InputError::Value(Box::new(Details {
                    layer: Some(item.name.clone()),
                    ..Details::new(what)
                })));
            }
        }
        Ok(Self { affine, granularity, entries })
    }

    /// Params known by their scales and zero points alone (those of an earlier result); they cannot be merged.
    pub fn from_scales(
        affine: Affine,
        granularity: Granularity,
        entries: impl IntoIterator<Item = (String, Vec<f32>, Vec<i32>)>,
    ) -> Result<Self, InputError> {
        let mut all = BTreeMap::new();
        for (name, scales, zero_points) in entries {
            check_scales(&name, &scales, &zero_points, &affine)?;
            let params = Params { id: params_id(&scales, &zero_points), scales, zero_points };
            all.insert(name, Entry { params, ranges: None });
        }
        Ok(Self { affine, granularity, entries: all })
    }

    /// The ranges of both: what `fit` over the data of both would have found.
    pub fn merge(&self, other: &Self) -> Result<Self, InputError> {
        let argument = |what: String| InputError::Argument(Box::new(InputError::argument("params", what)));
        if self.affine != other.affine || self.granularity != other.granularity {
            let word = |p: &Self| format!("{} {} {}", p.scheme(), p.mapping(), p.granularity);
            return Err(argument(format!("params for {} and {} do not merge", word(self), word(other))));
        }
        let mut entries = self.entries.clone();
        for (name, theirs) in &other.entries {
            let Some(ours) = entries.get(name) else {
                entries.insert(name.clone(), theirs.clone());
                continue;
            };
            let (Some(a), Some(b)) = (&ours.ranges, &theirs.ranges) else {
                return Err(argument(format!(
                    "params of '{name}' hold scales without ranges: they do not merge"
                )));
            };
            if a.len() != b.len() {
                return Err(argument(format!("params of '{name}' have {} and {} ranges", a.len(), b.len())));
            }
            let mut ranges = a.clone();
            ranges.iter_mut().zip(b).for_each(|(range, other)| range.merge(*other));
            entries.insert(name.clone(), Entry::of(name, ranges, &self.affine)?);
        }
        Ok(Self { entries, ..self.clone() })
    }

    /// Number format.
    pub fn scheme(&self) -> Scheme {
        self.affine.scheme
    }

    /// Symmetric or asymmetric.
    pub fn mapping(&self) -> Mapping {
        self.affine.mapping
    }

    /// Over what the ranges were taken.
    pub fn granularity(&self) -> Granularity {
        self.granularity
    }

    /// Columns or layers.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }

    /// How many.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Scales and zero points of one column or layer.
    pub fn get(&self, name: &str) -> Option<&Params> {
        self.entries.get(name).map(|e| &e.params)
    }

    /// The only ones, whatever their name.
    pub fn sole(&self) -> Option<&Params> {
        let mut all = self.entries.values();
        all.next().filter(|_| all.next().is_none()).map(|e| &e.params)
    }

    /// The ranges behind the scales, as (smallest, largest) with zero inside.
    pub fn ranges(&self, name: &str) -> Option<&[Range]> {
        self.entries.get(name)?.ranges.as_deref()
    }

    /// JSON text; numbers are base64 of little-endian f32, so nothing is rounded.
    pub fn to_json(&self) -> String {
        let entry = |e: &Entry| EntryJson {
            scale: encode_f32(e.params.scales.iter().copied()),
            zero_point: encode_f32(e.params.zero_points.iter().map(|z| *z as f32)),
            min: e.ranges.as_ref().map(|r| encode_f32(r.iter().map(|r| r.min))),
            max: e.ranges.as_ref().map(|r| encode_f32(r.iter().map(|r| r.max))),
            params_id: format!("{:016x}", e.params.id),
        };
        let json = ParamsJson {
            v: 1,
            scheme: self.scheme().to_string(),
            mapping: self.mapping().to_string(),
            granularity: self.granularity.to_string(),
            params: self.entries.iter().map(|(name, e)| (name.clone(), entry(e))).collect(),
        };
        // Strings only: serialising cannot fail.
        serde_json::to_string(&json).unwrap_or_default()
    }

    /// Reads [`Self::to_json`]'s text; what does not fit together is refused.
    pub fn from_json(text: &str) -> Result<Self, InputError> {
        let fail = |what: String| InputError::Argument(Box::new(InputError::argument("params", what)));
        let json: ParamsJson =
            serde_json::from_str(text).map_err(|e| fail(format!("this is no params JSON: {e}")))?;
        if json.v != 1 {
            return Err(fail(format!("params of version {} are not known, this is version 1", json.v)));
        }
        let word = |e: Fault| fail(e.to_string());
        let scheme: Scheme = json.scheme.parse().map_err(word)?;
        let mapping: Mapping = json.mapping.parse().map_err(word)?;
        let granularity: Granularity = json.granularity.parse().map_err(word)?;
        if granularity == Granularity::Group {
            return Err(fail("params of granularity group do not exist".to_owned()));
        }
        let affine = Affine::new(scheme, Some(mapping)).map_err(word)?;
        let mut entries = BTreeMap::new();
        for (name, e) in json.params {
            let numbers =
                |text: &str| decode_f32(text).ok_or_else(|| fail(format!("params of '{name}' are damaged")));
            let scales = numbers(&e.scale)?;
            let zero_points: Vec<i32> = numbers(&e.zero_point)?.into_iter().map(|z| z as i32).collect();
            check_scales(&name, &scales, &zero_points, &affine)?;
            let ranges = match (&e.min, &e.max) {
                (Some(min), Some(max)) => {
                    let (min, max) = (numbers(min)?, numbers(max)?);
                    if min.len() != scales.len() || max.len() != scales.len() {
                        return Err(fail(format!(
                            "params of '{name}' have {} scales, {} ranges",
                            scales.len(),
                            min.len()
                        )));
                    }
                    Some(min.into_iter().zip(max).map(|(min, max)| Range { min, max }).collect())
                }
                _ => None,
            };
            let id = params_id(&scales, &zero_points);
            if format!("{id:016x}") != e.params_id {
                return Err(fail(format!("params of '{name}' are damaged: their id is not {}", e.params_id)));
            }
            entries.insert(name, Entry { params: Params { id, scales, zero_points }, ranges });
        }
        Ok(Self { affine, granularity, entries })
    }
}

#[derive(Serialize, Deserialize)]
struct ParamsJson {
    v: u32,
    scheme: String,
    mapping: String,
    granularity: String,
    params: BTreeMap<String, EntryJson>,
}

#[derive(Serialize, Deserialize)]
struct EntryJson {
    scale: String,
    zero_point: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    min: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    max: Option<String>,
    params_id: String,
}

impl Entry {
    fn of(name: &str, ranges: Vec<Range>, affine: &Affine) -> Result<Self, InputError> {
        let DomainParams { scales, zero_points, .. } =
            params_from_ranges(&ranges, affine).map_err(|(i, _)| {
                let Range { min, max } = ranges[i];
                let what = format!("'{name}': the range {min:e} to {max:e} at {i} overflows float32");
                let details = InputError::column(name, what).hint("a symmetric scheme needs no range");
                InputError::Value(Box::new(Details { index: Some(i as u64), ..details }))
            })?;
        let params = Params { id: params_id(&scales, &zero_points), scales, zero_points };
        Ok(Self { params, ranges: Some(ranges) })
    }
}

fn check_scales(name: &str, scales: &[f32], zero_points: &[i32], affine: &Affine) -> Result<(), InputError> {
    let fail = |what: String| Err(InputError::Argument(Box::new(InputError::argument("params", what))));
    if scales.len() != zero_points.len() {
        return fail(format!(
            "params of '{name}' have {} scales, {} zero points",
            scales.len(),
            zero_points.len()
        ));
    }
    if let Some(i) = scales.iter().position(|s| !(s.is_finite() && *s > 0.0)) {
        return fail(format!(
            "params of '{name}': scale {} at {i} is not a positive finite number",
            scales[i]
        ));
    }
    if let Some(i) = zero_points.iter().position(|z| !(affine.qmin..=affine.qmax).contains(z)) {
        return fail(format!(
            "params of '{name}': zero point {} at {i} is outside the codes",
            zero_points[i]
        ));
    }
    Ok(())
}

fn default_granularity(table: &Table) -> Granularity {
    let roles = table.descriptor().items.iter().filter_map(|i| match &i.body {
        Body::Values(v) => Some(v.role),
        Body::Keep { .. } => None,
    });
    let (mut layers, mut vectors) = (false, false);
    for role in roles {
        layers |= role == Role::Layer;
        vectors |= role == Role::Vector;
    }
    match (layers, vectors) {
        (true, _) => Granularity::Row,
        (_, true) => Granularity::Dimension,
        _ => Granularity::Tensor,
    }
}

/// The ranges of one item, read through the same door as the daemon reads it.
fn ranges(
    table: &Table,
    index: u32,
    item: &Item,
    values: &Values,
    spec: &Spec,
) -> Result<Vec<Range>, InputError> {
    let layout = values.layout(spec);
    let mut ranges = vec![Range::EMPTY; layout.n_params() as usize];
    let size = values.dtype.size() as u64;
    let most = (CHUNK_BYTES / size).max(1);
    // A dropped row must be seen whole.
    let run = match (spec.on_nonfinite, values.k) {
        (OnNonFinite::Null, k) if k > 0 => k * (most / k).max(1),
        _ => most,
    };
    let elements = values.elements();
    let mut scratch = vec![0; (run.min(elements) * size) as usize];
    let mut fault: Option<Fault> = None;
    let _exact = NoFlushing::new();
    let mut first = 0;
    while first < elements {
        let count = run.min(elements - first);
        let bytes = count * size;
        let part = &mut scratch[..bytes as usize];
        let chunk = Chunk {
            item: index,
            action: Action::Scan,
            first,
            count,
            bytes,
            work: bytes,
            at: 0,
            start: 0,
            shared: false,
        };
        table.fill(&chunk, part);
        let touched = layout.param_range(first, count);
        let touched = &mut ranges[touched.start as usize..touched.end as usize];
        match scan(Floats::from_bytes(part, values.dtype), first, &layout, spec.on_nonfinite, touched) {
            Ok(()) => {}
            Err(Fault::NonFinite { index, count, value }) => match &mut fault {
                Some(Fault::NonFinite { count: all, .. }) => *all += count,
                Some(_) => {}
                None => fault = Some(Fault::NonFinite { index, count, value }),
            },
            Err(other) => fault = fault.or(Some(other)),
        }
        first += count;
    }
    match fault {
        None => Ok(ranges),
        Some(fault) => Err(place(fault, item, values)),
    }
}

/// A kernel's fault in the words of tables.
fn place(fault: Fault, item: &Item, values: &Values) -> InputError {
    let name = &item.name;
    let k = values.k.max(1);
    let at =
        |index: u64| if values.role == Role::Layer { (None, index) } else { (Some(index / k), index % k) };
    let subject = |row: Option<u64>| match row {
        None => format!("Layer '{name}'"),
        Some(row) => format!("column '{name}' row {row}"),
    };
    let (what, row, index, value, hint) = match fault {
        Fault::NonFinite { index, count, value } => {
            let (row, index) = at(index);
            let what = format!(
                "{} contains NaN or Inf at index {index} ({count} in all, the first is {value})",
                subject(row)
            );
            (
                what,
                row,
                index,
                value.to_string(),
                "on_nonfinite=\"null\" drops the row, \"saturate\" clips it",
            )
        }
        Fault::Overflow { index, value } => {
            let (row, index) = at(index);
            let what =
                format!("{} has the value {value:e} at index {index}, too large for float32", subject(row));
            (what, row, index, value.to_string(), "scale the values down first")
        }
        other => return InputError::Value(Box::new(InputError::column(name, other.to_string()))),
    };
    let layer = values.role == Role::Layer;
    InputError::Value(Box::new(Details {
        column: (!layer).then(|| name.clone()),
        layer: layer.then(|| name.clone()),
        row,
        index: Some(index),
        value: Some(value),
        hint: Some(hint.to_owned()),
        ..Details::new(what)
    }))
}
