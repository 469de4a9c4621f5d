//! The JSON in a codes column's `ARROW:extension:metadata`: every fact that decoding needs (NUMERICS S1).

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Serialize};

/// Value of `ARROW:extension:name` on a column of codes.
pub const EXTENSION_NAME: &str = "shmquant.codes";
/// Arrow's key for the extension's name.
pub const EXTENSION_NAME_KEY: &str = "ARROW:extension:name";
/// Arrow's key for the extension's metadata.
pub const EXTENSION_METADATA_KEY: &str = "ARROW:extension:metadata";
/// Appended to a column's name: its scales, its zero points, the id of its parameters.
pub const SCALE_SUFFIX: &str = "_scale";
/// See [`SCALE_SUFFIX`].
pub const ZERO_POINT_SUFFIX: &str = "_zero_point";
/// See [`SCALE_SUFFIX`].
pub const PARAMS_ID_SUFFIX: &str = "_params_id";

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
    /// Identity of tensor and dimension parameters: 16 hex digits.
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
