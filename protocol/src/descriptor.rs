//! The table descriptor: what is to be quantized and how, without the values (PROTOCOL.md section 4).

mod values;

use arrow_schema::{Field, Metadata};
use shmquant_kernels::{Affine, Granularity, Mapping, OnNonFinite, Scheme};

use crate::field::write_metadata;
use crate::field::{
    NodeData, UnsupportedType, read_data, read_field, read_metadata, write_data, write_field,
};
use crate::wire::{Reader, WireError, Writer};
use values::MAX_ELEMENTS;
pub use values::{Params, Place, Role, Values, Way, params_id};

const MAGIC: u32 = 0x3144_5153;
const METRICS: u8 = 1;
const CONTINUE_ON_ERROR: u8 = 2;
const LARGE_NAMES: u8 = 4;

/// A whole `QUANTIZE` request but for its values.
#[derive(Debug, Clone, PartialEq)]
pub struct Descriptor {
    /// Layers (one row an item) or columns.
    pub table: TableKind,
    /// Compute error metrics while the values are at hand.
    pub metrics: bool,
    /// Layers: a faulty layer becomes a null row with an error text, the others go on.
    pub continue_on_error: bool,
    /// Distinct specs; items refer to them by index.
    pub specs: Vec<Spec>,
    /// The table's schema metadata, for published tables.
    pub metadata: Metadata,
    /// Rows of the table (layers: number of layers).
    pub rows: u64,
    /// Layers, or quantized and kept columns in the table's order.
    pub items: Vec<Item>,
}

/// The two shapes of table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TableKind {
    /// One row a layer; `large_names` if `layer_name` was a large_string.
    Layers {
        /// The result's `layer_name` is large_string.
        large_names: bool,
    },
    /// Vector and plain columns.
    Columns,
}

/// How an item is quantized. Nothing is implied: the client has put in every default.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Spec {
    /// Number format and mapping; `None` keeps a layer as it is.
    pub affine: Option<Affine>,
    /// Over what a range is taken.
    pub granularity: Granularity,
    /// What NaN and infinities do.
    pub on_nonfinite: OnNonFinite,
    /// Codes below 8 bits are packed, first element in the low bits.
    pub packed: bool,
    /// Elements a group; 0 unless the granularity is `Group`.
    pub group_size: u32,
}

/// One layer or column.
#[derive(Debug, Clone, PartialEq)]
pub struct Item {
    /// Layer or column name.
    pub name: String,
    /// What it is.
    pub body: Body,
}

/// What an item is.
#[derive(Debug, Clone, PartialEq)]
pub enum Body {
    /// To be quantized.
    Values(Values),
    /// A column to be copied into a published result.
    Keep {
        /// Its Arrow field.
        field: Field,
        /// Its lengths.
        data: NodeData,
    },
}

/// Why a descriptor was refused.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum DescriptorError {
    /// The bytes break PROTOCOL.md.
    #[error("descriptor: {0}")]
    Wire(#[from] WireError),
    /// A scheme of a newer client.
    #[error("scheme code {0} is not known to this daemon")]
    UnknownScheme(u8),
    /// A combination that NUMERICS does not have, or a size out of range.
    #[error("{name:?}: {what}")]
    Invalid {
        /// Item.
        name: String,
        /// What is wrong with it.
        what: String,
    },
}

impl Spec {
    fn write(&self, w: &mut Writer<'_>) {
        let scheme = self.affine.map_or(0, |a| scheme_code(a.scheme));
        let mapping = match self.affine.map(|a| a.mapping) {
            Some(Mapping::Asymmetric) => 2,
            _ => 1,
        };
        let granularity = match self.granularity {
            Granularity::Tensor => 1,
            Granularity::Row => 2,
            Granularity::Dimension => 3,
            Granularity::Group => 4,
        };
        let on_nonfinite = match self.on_nonfinite {
            OnNonFinite::Error => 0,
            OnNonFinite::Null => 1,
            OnNonFinite::Saturate => 2,
        };
        w.u8(scheme).u8(mapping).u8(granularity).u8(on_nonfinite).u8(u8::from(self.packed)).raw(&[0; 3]);
        w.u32(self.group_size);
    }

    fn read(r: &mut Reader<'_>) -> Result<Self, DescriptorError> {
        let scheme = match r.u8("scheme")? {
            0 => None,
            code => Some(scheme_of(code).ok_or(DescriptorError::UnknownScheme(code))?),
        };
        let mapping = match r.u8("mapping")? {
            1 => Mapping::Symmetric,
            2 => Mapping::Asymmetric,
            value => return Err(bad("mapping", value).into()),
        };
        let granularity = match r.u8("granularity")? {
            1 => Granularity::Tensor,
            2 => Granularity::Row,
            3 => Granularity::Dimension,
            4 => Granularity::Group,
            value => return Err(bad("granularity", value).into()),
        };
        let on_nonfinite = match r.u8("on_nonfinite")? {
            0 => OnNonFinite::Error,
            1 => OnNonFinite::Null,
            2 => OnNonFinite::Saturate,
            value => return Err(bad("on_nonfinite", value).into()),
        };
        let packed = match r.u8("packing")? {
            value @ 0..=1 => value == 1,
            value => return Err(bad("packing", value).into()),
        };
        r.bytes(3, "reserved")?;
        let group_size = r.u32("group_size")?;
        if (group_size == 0) != (granularity != Granularity::Group) {
            return Err(WireError::Value { what: "group_size", value: u64::from(group_size) }.into());
        }
        let affine = scheme.map(|scheme| {
            Affine::new(scheme, Some(mapping))
                .map_err(|e| DescriptorError::Invalid { name: scheme.to_string(), what: e.to_string() })
        });
        Ok(Self { affine: affine.transpose()?, granularity, on_nonfinite, packed, group_size })
    }
}

impl Descriptor {
    /// Appends the descriptor's bytes to `out`; an error is the first kept column that cannot be published.
    pub fn encode(&self, out: &mut Vec<u8>) -> Result<(), (String, UnsupportedType)> {
        let mut w = Writer::new(out);
        let large_names = self.table == TableKind::Layers { large_names: true };
        let flag = |on: bool, bit: u8| if on { bit } else { 0 };
        w.u32(MAGIC).u8(if self.table == TableKind::Columns { 2 } else { 1 });
        w.u8(flag(self.metrics, METRICS)
            | flag(self.continue_on_error, CONTINUE_ON_ERROR)
            | flag(large_names, LARGE_NAMES));
        w.u16(self.specs.len() as u16);
        for spec in &self.specs {
            spec.write(&mut w);
        }
        write_metadata(&mut w, &self.metadata);
        w.u64(self.rows).u32(self.items.len() as u32);
        for item in &self.items {
            item.write(&mut w).map_err(|e| (item.name.clone(), e))?;
        }
        Ok(())
    }

    /// Parses and checks a private copy of a descriptor's bytes.
    pub fn decode(bytes: &[u8]) -> Result<Self, DescriptorError> {
        let mut r = Reader::new(bytes);
        let magic = r.u32("magic")?;
        if magic != MAGIC {
            return Err(WireError::Value { what: "magic", value: u64::from(magic) }.into());
        }
        let table = r.u8("table")?;
        let flags = r.u8("flags")?;
        let table = match table {
            1 => TableKind::Layers { large_names: flags & LARGE_NAMES != 0 },
            2 => TableKind::Columns,
            value => return Err(bad("table", value).into()),
        };
        let n = r.u16("n_specs")?;
        if !(1..=1024).contains(&n) {
            return Err(WireError::Value { what: "n_specs", value: u64::from(n) }.into());
        }
        let specs = (0..n).map(|_| Spec::read(&mut r)).collect::<Result<Vec<_>, _>>()?;
        let metadata = read_metadata(&mut r)?;
        let rows = r.u64("rows")?;
        let n = r.u32("n_items")?;
        let n = r.count(u64::from(n), 21, "items")?;
        let mut items = Vec::with_capacity(n);
        for _ in 0..n {
            items.push(Item::read(&mut r, &specs)?);
        }
        r.finish()?;
        let it = Self {
            table,
            metrics: flags & METRICS != 0,
            continue_on_error: flags & CONTINUE_ON_ERROR != 0,
            specs,
            metadata,
            rows,
            items,
        };
        it.check()?;
        Ok(it)
    }

    /// The items whose values lie in extents, and where.
    pub fn places(&self) -> impl Iterator<Item = (usize, &Values, Place)> {
        self.items.iter().enumerate().filter_map(|(i, item)| match &item.body {
            Body::Values(values) => values.place().map(|place| (i, values, place)),
            Body::Keep { .. } => None,
        })
    }

    /// Whether all values cross as they are.
    pub fn is_streamed(&self) -> bool {
        let streamed = |item: &Item| match &item.body {
            Body::Values(values) => values.way == Way::Streamed,
            Body::Keep { .. } => true,
        };
        self.items.iter().all(streamed)
    }

    /// The same request with all values to be streamed: what it asks for, wherever they lie and whoever encodes them.
    #[must_use]
    pub fn streamed(&self) -> Self {
        let mut it = self.clone();
        for item in &mut it.items {
            if let Body::Values(values) = &mut item.body {
                values.way = Way::Streamed;
            }
        }
        it
    }

    /// The spec of quantized values.
    pub fn spec(&self, values: &Values) -> &Spec {
        &self.specs[values.spec]
    }

    fn check(&self) -> Result<(), DescriptorError> {
        let layers = self.table != TableKind::Columns;
        if self.rows > MAX_ELEMENTS || (layers && self.rows != self.items.len() as u64) {
            return Err(WireError::Value { what: "rows", value: self.rows }.into());
        }
        for item in &self.items {
            let (layer, rows) = match &item.body {
                Body::Values(v) => (v.role == Role::Layer, v.rows),
                Body::Keep { data, .. } => (false, data.length),
            };
            if layer != layers || (!layers && rows != self.rows) {
                let what = format!("has {rows} rows in a table of {}", self.rows);
                return Err(DescriptorError::Invalid { name: item.name.clone(), what });
            }
        }
        Ok(())
    }
}

impl Item {
    fn write(&self, w: &mut Writer<'_>) -> Result<(), UnsupportedType> {
        let role = match &self.body {
            Body::Values(v) => match v.role {
                Role::Layer => 1,
                Role::Vector => 2,
                Role::Plain => 3,
            },
            Body::Keep { .. } => 4,
        };
        w.u8(role).string(&self.name);
        match &self.body {
            Body::Values(v) => v.write(w),
            Body::Keep { field, data } => {
                write_field(w, field)?;
                write_data(w, data);
            }
        }
        Ok(())
    }

    fn read(r: &mut Reader<'_>, specs: &[Spec]) -> Result<Self, DescriptorError> {
        let role = match r.u8("role")? {
            1 => Some(Role::Layer),
            2 => Some(Role::Vector),
            3 => Some(Role::Plain),
            4 => None,
            value => return Err(bad("role", value).into()),
        };
        let name = r.string("name")?.to_owned();
        let body = match role {
            Some(role) => Body::Values(Values::read(r, &name, role, specs)?),
            None => Body::Keep { field: read_field(r, &name, 0)?, data: read_data(r, 0)? },
        };
        Ok(Self { name, body })
    }
}

/// FNV-1a, 64 bits.
pub(crate) fn fnv1a(bytes: impl Iterator<Item = u8>) -> u64 {
    bytes.fold(0xcbf2_9ce4_8422_2325, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0000_0100_0000_01b3))
}

fn scheme_code(scheme: Scheme) -> u8 {
    match scheme {
        Scheme::Int8 => 1,
        Scheme::UInt8 => 2,
        Scheme::Int4 => 3,
        Scheme::UInt4 => 4,
        Scheme::Int2 => 5,
        Scheme::UInt2 => 6,
    }
}

fn scheme_of(code: u8) -> Option<Scheme> {
    Scheme::ALL.iter().copied().find(|s| scheme_code(*s) == code)
}

fn bad(what: &'static str, value: u8) -> WireError {
    WireError::Value { what, value: u64::from(value) }
}
