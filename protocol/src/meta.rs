//! The JSON in a codes column's `ARROW:extension:metadata`: every fact that decoding needs (NUMERICS S1).

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Serialize};
use shmquant_kernels::{Granularity, Mapping};

use crate::descriptor::{Role, Spec, fnv1a};

/// Value of `ARROW:extension:name` on a column of codes.
pub const EXTENSION_NAME: &str = "shmquant.codes";
/// Arrow's key for the extension's name.
pub const EXTENSION_NAME_KEY: &str = "ARROW:extension:name";
/// Arrow's key for the extension's metadata.
pub const EXTENSION_METADATA_KEY: &str = "ARROW:extension:metadata";

/// A result column beside a column of codes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Companion {
    /// Its scales.
    Scale,
    /// Its zero points.
    ZeroPoint,
    /// Which spec and parameters each row was made with.
    ParamsId,
}

impl Companion {
    /// All of them: names that no other column may have.
    pub const ALL: [Self; 3] = [Self::Scale, Self::ZeroPoint, Self::ParamsId];

    /// What its name appends to that of the codes.
    pub const fn suffix(self) -> &'static str {
        match self {
            Self::Scale => "_scale",
            Self::ZeroPoint => "_zero_point",
            Self::ParamsId => "_params_id",
        }
    }

    /// Its name beside the column `codes`.
    pub fn of(self, codes: &str) -> String {
        format!("{codes}{}", self.suffix())
    }
}

/// The columns that follow a column of codes.
///
/// What joins tables looks at Arrow types and keeps the first table's metadata for all. Rows of bytes and their ranges
/// say in their types all that decoding needs; a group's size, or how many codes a packed row has, they do not.
pub fn companions(role: Role, spec: &Spec) -> &'static [Companion] {
    use Companion::{ParamsId, Scale, ZeroPoint};
    let asymmetric = spec.affine.is_some_and(|a| a.mapping == Mapping::Asymmetric);
    match (role, spec.granularity, asymmetric) {
        (Role::Layer, _, _) => &[],
        // A constant zero point costs a byte a row, and every plain column then reads the same way.
        (Role::Plain, _, _) => &[Scale, ZeroPoint],
        (_, Granularity::Tensor | Granularity::Dimension, _) => &[ParamsId],
        (_, Granularity::Row, true) if !is_packed(spec) => &[Scale, ZeroPoint],
        (_, Granularity::Row, false) if !is_packed(spec) => &[Scale],
        (_, _, true) => &[Scale, ZeroPoint, ParamsId],
        (_, _, false) => &[Scale, ParamsId],
    }
}

/// Whether a byte holds several codes.
fn is_packed(spec: &Spec) -> bool {
    spec.packed && spec.affine.is_some_and(|a| a.bits < 8)
}

/// The word for how codes lie in bytes.
pub fn packing(spec: &Spec) -> &'static str {
    if is_packed(spec) { "lsb" } else { "none" }
}

/// What the rows of a [`Companion::ParamsId`] hold: FNV-1a 64 over the text
/// `scheme|mapping|granularity|dim|group_size|packing`, absent numbers 0, and, of ranges that are in the metadata,
/// `|` and their [`params_id`](crate::descriptor::params_id) in 16 hex digits.
pub fn facts_id(spec: &Spec, dim: Option<u64>, params: Option<u64>) -> u64 {
    let (scheme, mapping) =
        spec.affine.map(|a| (a.scheme.to_string(), a.mapping.to_string())).unwrap_or_default();
    let (granularity, dim, group) = (spec.granularity, dim.unwrap_or(0), spec.group_size);
    let mut text = format!("{scheme}|{mapping}|{granularity}|{dim}|{group}|{}", packing(spec));
    if let Some(params) = params {
        text.push_str(&format!("|{params:016x}"));
    }
    fnv1a(text.bytes())
}

/// How a column of codes decodes. Depends on spec and parameters only, never on one batch's data.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CodesMeta {
    /// Version of this layout: 1.
    pub v: u32,
    /// Scheme word.
    pub scheme: String,
    /// `affine`.
    pub kind: String,
    /// `symmetric` or `asymmetric`.
    pub mapping: String,
    /// `tensor`, `row`, `dimension` or `group`.
    pub granularity: String,
    /// Elements of a vector; absent for a plain column.
    pub dim: Option<u64>,
    /// Elements of a group.
    pub group_size: Option<u64>,
    /// Smallest code.
    pub qmin: i32,
    /// Largest code.
    pub qmax: i32,
    /// `none` (a byte a code) or `lsb`.
    pub packing: String,
    /// Where the scales are.
    pub scale: ParamSource,
    /// Where the zero points are.
    pub zero_point: ParamSource,
    /// What each row of the [`Companion::ParamsId`] must hold (see [`facts_id`]), in 16 hex digits; absent without one.
    pub params_id: Option<String>,
    /// Tensor and dimension parameters of a vector column.
    pub params_b64: Option<ParamsBase64>,
    /// Type of the original values.
    pub src_dtype: String,
    /// The decoding formula: `(q-zp)*scale`.
    pub decode: String,
}

/// Where one kind of parameter is found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ParamSource {
    /// In the column of this name.
    Column(String),
    /// The same for every value.
    Const(i32),
    /// In `params_b64` under this key.
    Params(String),
}

/// Parameters inside the metadata: base64 of little-endian f32.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ParamsBase64 {
    /// One scale for the tensor, or one a dimension.
    pub scale: String,
    /// Zero points, integral f32; absent when symmetric.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub zero_point: Option<String>,
}

impl CodesMeta {
    /// The JSON text.
    pub fn to_json(&self) -> String {
        // Strings and numbers only: serialising cannot fail.
        serde_json::to_string(self).unwrap_or_default()
    }

    /// Parses the JSON text; `None` if it is not this layout.
    pub fn from_json(text: &str) -> Option<Self> {
        serde_json::from_str(text).ok().filter(|m: &Self| m.v == 1)
    }

    /// The columns that decoding the column `codes` needs beside it.
    pub fn columns(&self, codes: &str) -> Vec<String> {
        let stored = [&self.scale, &self.zero_point].into_iter().filter_map(|source| match source {
            ParamSource::Column(name) => Some(name.clone()),
            _ => None,
        });
        let id = self.params_id.iter().map(|_| self.companion(Companion::ParamsId, codes));
        stored.chain(id).collect()
    }

    /// A companion's name. The codes may have been renamed since: where the metadata name the scales, theirs counts.
    pub(crate) fn companion(&self, which: Companion, codes: &str) -> String {
        let base = match &self.scale {
            ParamSource::Column(name) => name.strip_suffix(Companion::Scale.suffix()),
            _ => None,
        };
        which.of(base.unwrap_or(codes))
    }
}

/// Base64 of little-endian f32 values.
pub fn encode_f32(values: impl IntoIterator<Item = f32>) -> String {
    let bytes: Vec<u8> = values.into_iter().flat_map(f32::to_le_bytes).collect();
    STANDARD.encode(bytes)
}

/// The values of [`encode_f32`]'s text.
pub fn decode_f32(text: &str) -> Option<Vec<f32>> {
    let bytes = STANDARD.decode(text).ok()?;
    let (words, rest) = bytes.as_chunks::<4>();
    rest.is_empty().then(|| words.iter().map(|w| f32::from_le_bytes(*w)).collect())
}

#[cfg(test)]
mod tests {
    use shmquant_kernels::{Affine, OnNonFinite, Scheme};

    use super::*;

    /// Computed by another implementation (`tests/stdlib_oracle.py`).
    #[test]
    fn the_id_of_a_spec_is_as_published() {
        let spec = Spec {
            affine: Affine::new(Scheme::UInt4, None).ok(),
            granularity: Granularity::Group,
            on_nonfinite: OnNonFinite::Error,
            packed: true,
            group_size: 8,
        };
        assert_eq!(facts_id(&spec, Some(16), None), 0x10f9_bcd2_cbca_708e);
        let spec = Spec { granularity: Granularity::Tensor, group_size: 0, ..spec };
        assert_eq!(facts_id(&spec, Some(16), Some(0xab)), 0x61fa_7936_7a14_37f5);
    }
}
