//! Files made here, read by the mapped readers; damaged ones, which must be refused and never crash.

use std::collections::HashMap;
use std::error::Error;
use std::fs::{self, File, OpenOptions};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arrow_array::types::{Float32Type, Int8Type};
use arrow_array::{
    Array, ArrayRef, DictionaryArray, FixedSizeListArray, Int64Array, RecordBatch, StringArray,
    StringViewArray,
};
use arrow_buffer::Buffer;
use arrow_ipc::CompressionType;
use arrow_ipc::writer::{FileWriter, IpcWriteOptions, StreamWriter};
use proptest::prelude::*;
use safetensors::tensor::{Dtype, TensorView};
use shmquant_kernels::FloatType;
use shmquant_protocol::files::safetensors::{OtherTypes, TensorHead, Writer};
use shmquant_protocol::files::{
    FileError, Format, MappedFile, arrow_ipc as ipc, detect, safetensors as tensors,
};
use tempfile::TempDir;

type Outcome = Result<(), Box<dyn Error>>;

struct Dir(TempDir);

impl Dir {
    fn new() -> Result<Self, Box<dyn Error>> {
        Ok(Self(TempDir::new()?))
    }

    fn file(&self, name: &str, bytes: &[u8]) -> Result<PathBuf, Box<dyn Error>> {
        let path = self.0.path().join(name);
        fs::write(&path, bytes)?;
        Ok(path)
    }
}

fn bytes_of(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

/// Three tensors of floats and one of integers, as the safetensors crate writes them.
fn model() -> Result<Vec<u8>, Box<dyn Error>> {
    let weights = bytes_of(&(0..15).map(|i| i as f32 - 7.0).collect::<Vec<_>>());
    let half: Vec<u8> = (0..6u16).flat_map(|i| (0x3f80 + i).to_le_bytes()).collect();
    let double: Vec<u8> = [1.5f64, -2.5].iter().flat_map(|v| v.to_le_bytes()).collect();
    let ids: Vec<u8> = (0..4i64).flat_map(i64::to_le_bytes).collect();
    let view = |dtype, shape: &[usize], bytes: &'static [u8]| TensorView::new(dtype, shape.to_vec(), bytes);
    let all = [
        ("layer.weight", view(Dtype::F32, &[3, 5], weights.leak())?),
        ("layer.half", view(Dtype::BF16, &[2, 3], half.leak())?),
        ("layer.double", view(Dtype::F64, &[2], double.leak())?),
        ("position_ids", view(Dtype::I64, &[1, 4], ids.leak())?),
        ("scalar", view(Dtype::F32, &[], 2.0f32.to_le_bytes().to_vec().leak())?),
        ("empty", view(Dtype::F32, &[0, 7], &[])?),
    ];
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    Ok(safetensors::serialize(all, Some(metadata))?)
}

fn table() -> Result<RecordBatch, Box<dyn Error>> {
    let rows = (0..40).map(|i| Some((0..4).map(|j| Some((i * 4 + j) as f32 / 8.0)).collect::<Vec<_>>()));
    let emb = FixedSizeListArray::from_iter_primitive::<Float32Type, _, _>(rows, 4);
    let kind: DictionaryArray<Int8Type> = (0..40).map(|i| ["a", "b", "c"][i % 3]).collect();
    let name: StringArray = (0..40).map(|i| (i % 5 != 0).then(|| format!("row {i}"))).collect();
    let view: StringViewArray =
        (0..40).map(|i| Some(format!("a text that is long enough to lie outside {i}"))).collect();
    Ok(RecordBatch::try_from_iter([
        ("emb", Arc::new(emb) as ArrayRef),
        ("kind", Arc::new(kind)),
        ("name", Arc::new(name)),
        ("view", Arc::new(view)),
        ("id", Arc::new(Int64Array::from_iter_values(0..40))),
    ])?)
}

fn ipc_file(batch: &RecordBatch, options: IpcWriteOptions) -> Result<Vec<u8>, Box<dyn Error>> {
    let mut out = Vec::new();
    let mut writer = FileWriter::try_new_with_options(&mut out, &batch.schema(), options)?;
    writer.write(batch)?;
    writer.write(&batch.slice(3, 11))?;
    writer.finish()?;
    drop(writer);
    Ok(out)
}

fn ipc_stream(batch: &RecordBatch) -> Result<Vec<u8>, Box<dyn Error>> {
    let mut out = Vec::new();
    let mut writer = StreamWriter::try_new(&mut out, &batch.schema())?;
    writer.write(batch)?;
    writer.write(&batch.slice(3, 11))?;
    writer.finish()?;
    drop(writer);
    Ok(out)
}

fn inside(file: &MappedFile, buffer: &Buffer) -> bool {
    let whole = file.buffer().as_ptr_range();
    let part = buffer.as_ptr()..buffer.as_ptr().wrapping_add(buffer.len());
    whole.start <= part.start && part.end <= whole.end
}

#[test]
fn tensors_are_the_mapping() -> Outcome {
    let dir = Dir::new()?;
    let file = MappedFile::open(&dir.file("m.safetensors", &model()?)?)?;
    assert_eq!(file.format()?, Format::Safetensors);
    let read = tensors::read(&file, OtherTypes::Skip)?;
    assert_eq!(read.metadata.get("format").map(String::as_str), Some("pt"));
    assert_eq!(read.skipped.len(), 1);
    let skipped = &read.skipped[0];
    assert_eq!((skipped.name.as_str(), skipped.dtype.as_str()), ("position_ids", "I64"));
    assert_eq!((skipped.shape.as_slice(), skipped.bytes), ([1, 4].as_slice(), 32));
    let by_name: HashMap<_, _> = read.layers.iter().map(|l| (l.name.as_str(), l)).collect();
    assert_eq!(by_name.len(), 5);
    for layer in &read.layers {
        assert!(inside(&file, &layer.values), "{} was copied", layer.name);
    }
    let weights = by_name["layer.weight"];
    assert_eq!((weights.dtype, weights.shape.as_slice()), (FloatType::F32, [3, 5].as_slice()));
    assert_eq!(weights.values.as_slice(), bytes_of(&(0..15).map(|i| i as f32 - 7.0).collect::<Vec<_>>()));
    assert_eq!((by_name["layer.half"].dtype, by_name["layer.half"].values.len()), (FloatType::Bf16, 12));
    assert_eq!(by_name["layer.double"].dtype, FloatType::F64);
    assert_eq!((by_name["scalar"].shape.len(), by_name["scalar"].values.len()), (0, 4));
    assert_eq!((by_name["empty"].shape.as_slice(), by_name["empty"].values.len()), ([0, 7].as_slice(), 0));
    // The values outlive the handle on the file.
    let values = weights.values.clone();
    drop((read, file));
    assert_eq!(values.len(), 60);
    Ok(())
}

#[test]
fn an_integer_tensor_is_named_when_it_is_refused() -> Outcome {
    let dir = Dir::new()?;
    let file = MappedFile::open(&dir.file("m.safetensors", &model()?)?)?;
    let error = tensors::read(&file, OtherTypes::Refuse).map(|_| ()).unwrap_err();
    let text = error.to_string();
    assert!(text.contains("position_ids") && text.contains("I64") && text.contains("hint:"), "{text}");
    Ok(())
}

#[test]
fn what_the_writer_writes_the_crate_reads() -> Outcome {
    let dir = Dir::new()?;
    let path = dir.0.path().join("out.safetensors");
    let (a, b) = (bytes_of(&[1.0, 2.0, 3.0, 4.0]), [0u8, 60, 0, 64]);
    let heads = vec![
        TensorHead { name: "a \"quoted\" ü".to_owned(), dtype: FloatType::F32, shape: vec![2, 2] },
        TensorHead { name: "none".to_owned(), dtype: FloatType::F32, shape: vec![0] },
        TensorHead { name: "b".to_owned(), dtype: FloatType::F16, shape: vec![2] },
    ];
    let mut writer =
        Writer::new(&path, BufWriter::new(File::create(&path)?), heads.clone(), &[("format", "pt")])?;
    writer.tensor("a \"quoted\" ü", &a)?;
    writer.tensor("none", &[])?;
    writer.tensor("b", &b)?;
    writer.finish()?;
    let bytes = fs::read(&path)?;
    let back = safetensors::SafeTensors::deserialize(&bytes)?;
    assert_eq!(back.tensor("a \"quoted\" ü")?.data(), a);
    assert_eq!(back.tensor("a \"quoted\" ü")?.shape(), [2, 2]);
    assert_eq!((back.tensor("b")?.dtype(), back.tensor("b")?.data()), (Dtype::F16, b.as_slice()));
    let own = tensors::read(&MappedFile::open(&path)?, OtherTypes::Refuse)?;
    let names: Vec<_> = own.layers.iter().map(|l| l.name.as_str()).collect();
    assert_eq!(names, ["a \"quoted\" ü", "none", "b"], "file order is the order of writing");

    // Another tensor than the announced one, too few bytes, too few tensors, a name twice.
    assert!(Writer::new(&path, Vec::new(), heads.clone(), &[])?.tensor("b", &b).is_err());
    assert!(Writer::new(&path, Vec::new(), heads.clone(), &[])?.tensor("a \"quoted\" ü", &a[1..]).is_err());
    assert!(Writer::new(&path, Vec::new(), heads.clone(), &[])?.finish().is_err());
    let twice = vec![heads[2].clone(), heads[2].clone()];
    assert!(matches!(Writer::new(&path, Vec::new(), twice, &[]), Err(FileError::DuplicateTensor { .. })));
    Ok(())
}

#[test]
fn an_arrow_file_is_the_mapping() -> Outcome {
    let dir = Dir::new()?;
    let batch = table()?;
    let file = MappedFile::open(&dir.file("t.arrow", &ipc_file(&batch, IpcWriteOptions::default())?)?)?;
    assert_eq!(file.format()?, Format::ArrowFile);
    let read = ipc::read(&file)?;
    assert_eq!((read.batches.len(), read.rows()), (2, 51));
    assert_eq!(read.schema, batch.schema());
    assert_eq!(ipc::schema(&file)?, *batch.schema());
    assert_eq!(read.batches, [batch.clone(), batch.slice(3, 11)]);
    for column in read.batches[0].columns() {
        let mut nodes = vec![column.to_data()];
        while let Some(node) = nodes.pop() {
            assert!(node.buffers().iter().all(|b| b.is_empty() || inside(&file, b)), "a copy: {node:?}");
            nodes.extend(node.child_data().iter().cloned());
        }
    }
    Ok(())
}

#[test]
fn a_compressed_arrow_file_and_a_stream_are_read() -> Outcome {
    let dir = Dir::new()?;
    let batch = table()?;
    for codec in [CompressionType::LZ4_FRAME, CompressionType::ZSTD] {
        let options = IpcWriteOptions::default().try_with_compression(Some(codec))?;
        let file = MappedFile::open(&dir.file("t.feather", &ipc_file(&batch, options)?)?)?;
        assert_eq!(ipc::read(&file)?.batches, [batch.clone(), batch.slice(3, 11)]);
    }
    let file = MappedFile::open(&dir.file("t.arrows", &ipc_stream(&batch)?)?)?;
    assert_eq!(file.format()?, Format::ArrowStream);
    let read = ipc::read(&file)?;
    assert_eq!(read.batches, [batch.clone(), batch.slice(3, 11)]);
    assert_eq!(ipc::schema(&file)?, *batch.schema());
    let emb = read.batches[0].column(0).to_data();
    assert!(inside(&file, &emb.child_data()[0].buffers()[0]), "a stream's values were copied");
    Ok(())
}

#[test]
fn a_file_that_is_written_meanwhile_is_told() -> Outcome {
    let dir = Dir::new()?;
    let path = dir.file("m.safetensors", &model()?)?;
    let file = MappedFile::open(&path)?;
    file.check()?;
    OpenOptions::new().append(true).open(&path)?.write_all(b"more")?;
    let error = file.check().unwrap_err();
    assert!(matches!(&error, FileError::Changed { .. }) && error.to_string().contains("hint:"), "{error}");

    // A file that is replaced by rename stays what it was for whoever has it open.
    let file = MappedFile::open(&path)?;
    fs::rename(dir.file("other", b"other")?, &path)?;
    file.check()?;
    Ok(())
}

#[test]
fn files_that_are_none_of_ours_are_told_apart() -> Outcome {
    let dir = Dir::new()?;
    let error = |path: &Path| match MappedFile::open(path) {
        Ok(file) => file.format().map(|f| f.to_string()).unwrap_or_else(|e| e.to_string()),
        Err(error) => error.to_string(),
    };
    assert!(error(&dir.0.path().join("missing")).contains("missing: cannot open it: "));
    assert!(error(dir.0.path()).contains("not a regular file"));
    assert!(error(&dir.file("empty", b"")?).contains("hint: pickled"));
    assert!(
        error(&dir.file("zip", b"PK\x03\x04 a pickled checkpoint is a zip file")?).contains("hint: pickled")
    );
    assert_eq!(error(&dir.file("p", b"PAR1....")?), "Parquet");
    let file = MappedFile::open(&dir.file("p", b"PAR1....")?)?;
    assert!(matches!(ipc::read(&file), Err(FileError::WrongFormat { .. })));
    assert!(matches!(tensors::read(&file, OtherTypes::Skip), Err(FileError::WrongFormat { .. })));
    Ok(())
}

/// Reads `bytes` by whatever reader takes them; only that it returns matters.
fn read_any(dir: &Dir, bytes: &[u8]) -> Result<u64, FileError> {
    let path = dir.0.path().join("damaged");
    match detect(bytes) {
        Some(Format::ArrowFile) => ipc::read_file(&path, &Buffer::from(bytes)).map(|b| b.rows()),
        Some(Format::ArrowStream) => ipc::read_stream(&path, &Buffer::from(bytes)).map(|b| b.rows()),
        Some(Format::Safetensors) => {
            fs::write(&path, bytes).map_err(|source| FileError::Io {
                path: path.clone(),
                what: "test",
                source,
            })?;
            tensors::read(&MappedFile::open(&path)?, OtherTypes::Skip).map(|t| t.layers.len() as u64)
        }
        _ => Err(FileError::UnknownFormat { path }),
    }
}

#[test]
fn a_file_cut_anywhere_is_refused() -> Outcome {
    let dir = Dir::new()?;
    let batch = table()?;
    for whole in [model()?, ipc_file(&batch, IpcWriteOptions::default())?] {
        assert!(read_any(&dir, &whole).is_ok());
        for cut in 0..whole.len() {
            assert!(read_any(&dir, &whole[..cut]).is_err(), "cut at {cut} of {}", whole.len());
        }
    }
    // A stream has no end mark that must be there: cut between messages it is a shorter stream.
    let stream = ipc_stream(&batch)?;
    for cut in 0..stream.len() {
        assert!(
            read_any(&dir, &stream[..cut]).map_or(true, |rows| [0, 40, 51].contains(&rows)),
            "cut at {cut}"
        );
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn damaged_bytes_are_an_error_or_a_table(
        which in 0usize..3,
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
    ) {
        let batch = table().unwrap();
        let mut bytes = match which {
            0 => model().unwrap(),
            1 => ipc_file(&batch, IpcWriteOptions::default()).unwrap(),
            _ => ipc_stream(&batch).unwrap(),
        };
        for (place, byte) in damage {
            let place = place.index(bytes.len());
            bytes[place] = byte;
        }
        let dir = Dir::new().unwrap();
        let _ = read_any(&dir, &bytes);
    }
}
