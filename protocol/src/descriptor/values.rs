//! The values of one layer or column: shape, type, parameters that are given, and how they come to their codes.

use shmquant_kernels::{FloatType, Granularity, Layout, OnNonFinite};

use super::{DescriptorError, Spec, bad, fnv1a};
use crate::findings;
use crate::message::{Extent, read_extent, write_extent};
use crate::wire::{Reader, WireError, Writer};

const NULL_LAYER: u8 = 1;
const EXTENT: u8 = 2;
const ENCODED: u8 = 4;
/// Largest product of sizes that is believed: keeps every later sum far from 2^63.
pub(super) const MAX_ELEMENTS: u64 = 1 << 46;

/// Shape and type of the values of one item.
#[derive(Debug, Clone, PartialEq)]
pub struct Values {
    /// Layer, vector or plain.
    pub role: Role,
    /// Index into [`Descriptor::specs`].
    pub spec: usize,
    /// Type of the values.
    pub dtype: FloatType,
    /// A layer without weights.
    pub null: bool,
    /// Rows: all but the last axis of a layer, vectors, or values of a plain column.
    pub rows: u64,
    /// Elements a row.
    pub k: u64,
    /// Null rows (vectors, plain).
    pub null_count: u64,
    /// A layer's shape, as given; empty if none was.
    pub shape: Vec<i64>,
    /// Parameters to use instead of those of the data.
    pub params: Option<Params>,
    /// What of them comes to the daemon.
    pub way: Way,
}

/// How the values of one item come to their codes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// They cross through the window, and the daemon encodes them.
    Streamed,
    /// The client encodes them where they lie, and what it found crosses ([`findings`](crate::findings)).
    Encoded,
    /// The daemon encodes them where they lie, and nothing crosses.
    Placed(Place),
}

/// Values in an extent that the session holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// Memory that the client allocated, or a result.
    pub extent: Extent,
    /// First byte of the first element, from the extent's start.
    pub offset: u64,
}

/// What kind of values an item has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// A row of a layers table.
    Layer,
    /// A column of equal-length vectors.
    Vector,
    /// A plain float column.
    Plain,
}

/// Given scales and zero points.
#[derive(Debug, Clone, PartialEq)]
pub struct Params {
    /// Their identity: FNV-1a 64 over scales and zero points (see [`params_id`]).
    pub id: u64,
    /// One scale a domain.
    pub scales: Vec<f32>,
    /// One zero point a domain.
    pub zero_points: Vec<i32>,
}

impl Values {
    /// Elements in all.
    pub fn elements(&self) -> u64 {
        self.rows * self.k
    }

    /// How the elements lie, for the kernels.
    pub fn layout(&self, spec: &Spec) -> Layout {
        Layout {
            rows: self.rows,
            k: self.k,
            group: u64::from(spec.group_size),
            granularity: spec.granularity,
            pad_rows: self.role != Role::Layer,
            packed: spec.packed,
        }
    }

    /// Bytes of all elements.
    pub fn bytes(&self) -> u64 {
        self.elements() * self.dtype.size() as u64
    }

    /// Where they lie, if the daemon has that memory.
    pub fn place(&self) -> Option<Place> {
        match self.way {
            Way::Placed(place) => Some(place),
            Way::Streamed | Way::Encoded => None,
        }
    }

    /// What the kernels do with NaN and infinities.
    pub fn policy(&self, spec: &Spec) -> OnNonFinite {
        match spec.on_nonfinite {
            // One such value takes the whole layer away, so there is nothing to leave out of its ranges.
            OnNonFinite::Null if self.role == Role::Layer => OnNonFinite::Saturate,
            other => other,
        }
    }

    fn check(&self, name: &str, spec: &Spec) -> Result<(), DescriptorError> {
        let fail = |what: String| Err(DescriptorError::Invalid { name: name.to_owned(), what });
        if self.rows.checked_mul(self.k).is_none_or(|n| n > MAX_ELEMENTS) {
            return fail(format!("{} x {} elements are more than 2^46", self.rows, self.k));
        }
        if self.null_count > self.rows || (self.role == Role::Layer && self.null_count != 0) {
            return fail(format!("{} nulls in {} rows", self.null_count, self.rows));
        }
        if self.null && (self.role != Role::Layer || self.elements() != 0) {
            return fail("a null layer has no elements".to_owned());
        }
        match self.role {
            Role::Layer => {}
            Role::Vector if self.k > i32::MAX as u64 => {
                return fail(format!("dimension {} passes 2^31", self.k));
            }
            Role::Vector | Role::Plain if spec.affine.is_none() => {
                return fail("only a layer can stay as it is".to_owned());
            }
            Role::Plain if self.k != 1 || spec.granularity != Granularity::Tensor || spec.packed => {
                return fail("a plain column has granularity tensor and no packing".to_owned());
            }
            _ => {}
        }
        if !self.shape.is_empty() {
            let product = self.shape.iter().try_fold(1u64, |n, d| n.checked_mul(u64::try_from(*d).ok()?));
            let last = self.shape.last().and_then(|d| u64::try_from(*d).ok());
            if product != Some(self.elements()) || (last != Some(self.k) && !self.null) {
                return fail(format!(
                    "shape {:?} does not hold {} x {} elements",
                    self.shape, self.rows, self.k
                ));
            }
        }
        if self.way == Way::Encoded && !findings::fit(self, spec) {
            return fail(
                "this is nothing that a client encodes: there are no values, or too few for each parameter"
                    .to_owned(),
            );
        }
        if let Way::Placed(place) = &self.way {
            if self.null_count != 0 || self.elements() == 0 {
                return fail("only values without nulls, and at least one, can lie in an extent".to_owned());
            }
            let end = place.offset.checked_add(self.bytes());
            if end.is_none_or(|end| end > place.extent.length) {
                return fail(format!(
                    "{} bytes at {} do not lie in an extent of {}",
                    self.bytes(),
                    place.offset,
                    place.extent.length
                ));
            }
            let from = place.extent.offset.checked_add(place.offset);
            if from.is_none_or(|from| !from.is_multiple_of(self.dtype.size() as u64)) {
                return fail(format!("{} values at {} are not aligned", self.dtype, place.offset));
            }
        }
        if let Some(params) = &self.params {
            let want = self.layout(spec).n_params();
            let (scales, zeros) = (params.scales.len() as u64, params.zero_points.len() as u64);
            if spec.affine.is_none() || scales != want || zeros != want {
                return fail(format!(
                    "{scales} scales and {zeros} zero points were given, {want} are needed"
                ));
            }
            let affine = spec.affine.as_ref();
            if let Some(i) = params.scales.iter().position(|s| !(s.is_finite() && *s > 0.0)) {
                return fail(format!(
                    "given scale {} at {i} is not a positive finite number",
                    params.scales[i]
                ));
            }
            let inside = |z: &i32| affine.is_some_and(|a| (a.qmin..=a.qmax).contains(z));
            if let Some(i) = params.zero_points.iter().position(|z| !inside(z)) {
                return fail(format!(
                    "given zero point {} at {i} is outside the codes",
                    params.zero_points[i]
                ));
            }
        }
        Ok(())
    }

    pub(super) fn write(&self, w: &mut Writer<'_>) {
        let dtype = match self.dtype {
            FloatType::F16 => 1,
            FloatType::Bf16 => 2,
            FloatType::F32 => 3,
            FloatType::F64 => 4,
        };
        let null = if self.null { NULL_LAYER } else { 0 };
        let way = match self.way {
            Way::Streamed => 0,
            Way::Encoded => ENCODED,
            Way::Placed(_) => EXTENT,
        };
        w.u16(self.spec as u16).u8(dtype).u8(null | way);
        w.u64(self.rows).u64(self.k).u64(self.null_count).u8(self.shape.len() as u8);
        for d in &self.shape {
            w.i64(*d);
        }
        match &self.params {
            None => {
                w.u64(0);
            }
            Some(p) => {
                w.u64(p.scales.len() as u64).u64(p.id);
                for s in &p.scales {
                    w.f32(*s);
                }
                for z in &p.zero_points {
                    w.i32(*z);
                }
            }
        }
        if let Way::Placed(place) = &self.way {
            write_extent(w, &place.extent);
            w.u64(place.offset);
        }
    }

    pub(super) fn read(
        r: &mut Reader<'_>,
        name: &str,
        role: Role,
        specs: &[Spec],
    ) -> Result<Self, DescriptorError> {
        let spec = usize::from(r.u16("spec")?);
        let Some(its_spec) = specs.get(spec) else {
            return Err(WireError::Value { what: "spec", value: spec as u64 }.into());
        };
        let dtype = match r.u8("dtype")? {
            1 => FloatType::F16,
            2 => FloatType::Bf16,
            3 => FloatType::F32,
            4 => FloatType::F64,
            value => return Err(bad("dtype", value).into()),
        };
        let flags = r.u8("flags")?;
        let null = flags & NULL_LAYER != 0;
        let rows = r.u64("rows")?;
        let k = r.u64("k")?;
        let null_count = r.u64("null_count")?;
        let ndim = r.u8("ndim")?;
        let shape = (0..ndim).map(|_| r.i64("shape")).collect::<Result<_, _>>()?;
        let n_params = r.u64("n_params")?;
        let params = match r.count(n_params, 8, "params")? {
            0 => None,
            n => Some(Params {
                id: r.u64("params_id")?,
                scales: (0..n).map(|_| r.f32("scale")).collect::<Result<_, _>>()?,
                zero_points: (0..n).map(|_| r.i32("zero_point")).collect::<Result<_, _>>()?,
            }),
        };
        let way = match flags & (EXTENT | ENCODED) {
            0 => Way::Streamed,
            ENCODED => Way::Encoded,
            EXTENT => Way::Placed(Place { extent: read_extent(r)?, offset: r.u64("offset")? }),
            _ => return Err(bad("flags", flags).into()),
        };
        let values = Self { role, spec, dtype, null, rows, k, null_count, shape, params, way };
        values.check(name, its_spec)?;
        Ok(values)
    }
}

/// Identity of a set of parameters: FNV-1a 64 over the scales' bytes, then the zero points' (i32), little-endian.
pub fn params_id(scales: &[f32], zero_points: &[i32]) -> u64 {
    let bytes =
        scales.iter().flat_map(|s| s.to_le_bytes()).chain(zero_points.iter().flat_map(|z| z.to_le_bytes()));
    fnv1a(bytes)
}
