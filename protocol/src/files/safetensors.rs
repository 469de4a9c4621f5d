//! safetensors files: tensors to quantize, read where they lie, and tensors written one after another.

use std::collections::{HashMap, HashSet};
use std::fmt::Write as _;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use ::safetensors::tensor::{Dtype, Metadata, SafeTensors, TensorInfo};
use shmquant_kernels::FloatType;

use super::{FileError, Format, MappedFile};
use crate::table::LayerInput;

/// What to do about a tensor that is not of floats (an index, a mask, codes).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OtherTypes {
    /// Leave it out and name it in [`Tensors::skipped`].
    Skip,
    /// Refuse the file, naming the tensor.
    Refuse,
}

/// The tensors of a file, in the order in which they lie in it.
#[derive(Debug)]
pub struct Tensors {
    /// Those that can be quantized; their values are the mapping.
    pub layers: Vec<LayerInput>,
    /// Those that cannot.
    pub skipped: Vec<Skipped>,
    /// The file's own key-value pairs (`__metadata__`).
    pub metadata: HashMap<String, String>,
}

/// A tensor that was left out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Skipped {
    /// Its name.
    pub name: String,
    /// Its type, as safetensors writes it (`I64`).
    pub dtype: String,
    /// Its shape.
    pub shape: Vec<u64>,
    /// Its bytes.
    pub bytes: u64,
}

/// Reads the header of a mapped safetensors file. Nothing that grows with the values is read or copied.
pub fn read(file: &MappedFile, other: OtherTypes) -> Result<Tensors, FileError> {
    let path = file.path();
    if file.format()? != Format::Safetensors {
        return Err(FileError::WrongFormat { path: path.to_owned(), expected: Format::Safetensors });
    }
    // This also proves that every tensor lies inside the file, and that its bytes are those of its shape.
    let (header, metadata) = SafeTensors::read_metadata(file.buffer())
        .map_err(|error| FileError::damaged(path, format!("safetensors header: {error}")))?;
    let start = header + size_of::<u64>();
    let mut tensors = Tensors {
        layers: Vec::new(),
        skipped: Vec::new(),
        metadata: metadata.metadata().clone().unwrap_or_default(),
    };
    for (name, info) in in_file_order(&metadata) {
        let (from, to) = info.data_offsets;
        match float_type(info.dtype) {
            Some(dtype) => tensors.layers.push(LayerInput {
                name,
                values: file.buffer().slice_with_length(start + from, to - from),
                dtype,
                shape: shape(info).map_err(|what| FileError::damaged(path, what))?,
            }),
            None if other == OtherTypes::Skip => tensors.skipped.push(Skipped {
                name,
                dtype: info.dtype.to_string(),
                shape: info.shape.iter().map(|d| *d as u64).collect(),
                bytes: (to - from) as u64,
            }),
            None => {
                let dtype = info.dtype.to_string();
                return Err(FileError::UnsupportedTensor { path: path.to_owned(), name, dtype });
            }
        }
    }
    Ok(tensors)
}

/// By offset; tensors without elements share theirs with the next one, so the name decides between them.
fn in_file_order(metadata: &Metadata) -> Vec<(String, &TensorInfo)> {
    let mut tensors: Vec<_> = metadata.tensors().into_iter().collect();
    tensors.sort_by(|(a_name, a), (b_name, b)| (a.data_offsets, a_name).cmp(&(b.data_offsets, b_name)));
    tensors
}

fn float_type(dtype: Dtype) -> Option<FloatType> {
    match dtype {
        Dtype::F16 => Some(FloatType::F16),
        Dtype::BF16 => Some(FloatType::Bf16),
        Dtype::F32 => Some(FloatType::F32),
        Dtype::F64 => Some(FloatType::F64),
        _ => None,
    }
}

fn shape(info: &TensorInfo) -> Result<Vec<i64>, String> {
    let dimension = |d: &usize| i64::try_from(*d).map_err(|_| format!("dimension {d} passes 2^63"));
    info.shape.iter().map(dimension).collect()
}

/// A tensor that is going to be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorHead {
    /// Its name.
    pub name: String,
    /// Type of its elements.
    pub dtype: FloatType,
    /// Its shape; its product, times the size of an element, is what must be written.
    pub shape: Vec<u64>,
}

/// Writes a safetensors file tensor by tensor, so that no more than one has to be in memory.
#[derive(Debug)]
pub struct Writer<W> {
    path: PathBuf,
    out: W,
    heads: std::vec::IntoIter<(String, u64)>,
}

impl<W: Write> Writer<W> {
    /// Writes the header. The tensors must follow in this order, through [`Writer::tensor`]; `path` is for errors.
    pub fn new(
        path: &Path,
        mut out: W,
        heads: Vec<TensorHead>,
        metadata: &[(&str, &str)],
    ) -> Result<Self, FileError> {
        let mut header = String::from("{\"__metadata__\":");
        let pairs: serde_json::Map<String, serde_json::Value> =
            metadata.iter().map(|(k, v)| ((*k).to_owned(), (*v).into())).collect();
        header.push_str(&serde_json::Value::Object(pairs).to_string());
        let mut names = HashSet::new();
        let mut sizes = Vec::with_capacity(heads.len());
        let mut offset = 0u64;
        for head in heads {
            if head.name == "__metadata__" || !names.insert(head.name.clone()) {
                return Err(FileError::DuplicateTensor { path: path.to_owned(), name: head.name });
            }
            let bytes = head.shape.iter().try_fold(head.dtype.size() as u64, |n, d| n.checked_mul(*d));
            let end = bytes.and_then(|bytes| offset.checked_add(bytes)).ok_or_else(|| {
                FileError::damaged(
                    path,
                    format!("tensor {:?} of shape {:?} is too large", head.name, head.shape),
                )
            })?;
            let name = serde_json::Value::from(head.name.as_str());
            let shape = serde_json::Value::from(head.shape);
            // Writing to a String cannot fail.
            let _ = write!(
                header,
                ",{name}:{{\"dtype\":\"{}\",\"shape\":{shape},\"data_offsets\":[{offset},{end}]}}",
                dtype_word(head.dtype)
            );
            sizes.push((head.name, end - offset));
            offset = end;
        }
        header.push('}');
        // The tensors start at a multiple of 8.
        while header.len() % 8 != 0 {
            header.push(' ');
        }
        let written = out
            .write_all(&(header.len() as u64).to_le_bytes())
            .and_then(|()| out.write_all(header.as_bytes()));
        written.map_err(FileError::io(path, "cannot write"))?;
        Ok(Self { path: path.to_owned(), out, heads: sizes.into_iter() })
    }

    /// Writes the values of the next tensor, which must be the announced one in full.
    pub fn tensor(&mut self, name: &str, values: &[u8]) -> Result<(), FileError> {
        match self.heads.next() {
            Some((head, size)) if head == name && size == values.len() as u64 => {
                self.out.write_all(values).map_err(FileError::io(&self.path, "cannot write"))
            }
            head => {
                let what = format!("{name:?} of {} bytes came where {head:?} was announced", values.len());
                Err(FileError::io(&self.path, "cannot write")(io::Error::new(
                    io::ErrorKind::InvalidInput,
                    what,
                )))
            }
        }
    }

    /// Gives the output back once every announced tensor has been written.
    pub fn finish(mut self) -> Result<W, FileError> {
        if let Some((name, _)) = self.heads.next() {
            let error =
                io::Error::new(io::ErrorKind::InvalidInput, format!("tensor {name:?} was not written"));
            return Err(FileError::io(&self.path, "cannot write")(error));
        }
        self.out.flush().map_err(FileError::io(&self.path, "cannot write"))?;
        Ok(self.out)
    }
}

fn dtype_word(dtype: FloatType) -> &'static str {
    match dtype {
        FloatType::F16 => "F16",
        FloatType::Bf16 => "BF16",
        FloatType::F32 => "F32",
        FloatType::F64 => "F64",
    }
}
