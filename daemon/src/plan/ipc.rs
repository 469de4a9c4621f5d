//! The flatbuffers of an Arrow IPC file: schema, batch and dictionary messages, footer.

use arrow_ipc as ipc;
use arrow_ipc::convert::IpcSchemaEncoder;
use arrow_ipc::writer::{DictionaryTracker, IpcDataGenerator, IpcWriteOptions};
use arrow_schema::Schema;
use flatbuffers::FlatBufferBuilder;

/// First bytes of the file, padded to eight; also its last six.
pub(crate) const MAGIC: [u8; 8] = *b"ARROW1\0\0";
/// Bytes before a message's flatbuffer: the continuation marker and the length.
pub(crate) const PREFIX: u64 = 8;
/// Bytes of the marker that ends the messages.
pub(crate) const END: [u8; 8] = [0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0];
/// Bytes after the footer's flatbuffer: its length and the magic.
pub(crate) const TRAILER: u64 = 10;

/// What a batch or dictionary message says about its body.
#[derive(Debug)]
pub(crate) struct Head<'a> {
    /// The dictionary's id; a record batch has none.
    pub(crate) dictionary: Option<i64>,
    pub(crate) rows: u64,
    /// Length and null count of each node.
    pub(crate) nodes: &'a [(u64, u64)],
    /// Place in the body and bytes of each buffer.
    pub(crate) buffers: &'a [(u64, u64)],
    /// Data buffers of each view column.
    pub(crate) variadic: &'a [i64],
    pub(crate) body: u64,
}

/// The schema message's flatbuffer.
pub(crate) fn schema(schema: &Schema) -> Vec<u8> {
    let mut tracker = DictionaryTracker::new(false);
    IpcDataGenerator::default()
        .schema_to_bytes_with_dictionary_tracker(schema, &mut tracker, &IpcWriteOptions::default())
        .ipc_message
}

/// A batch or dictionary message's flatbuffer. Its size depends on the numbers of nodes and buffers, on whether there
/// are rows and a body, and on nothing else.
pub(crate) fn head(head: &Head<'_>) -> Vec<u8> {
    let mut fbb = FlatBufferBuilder::new();
    let nodes: Vec<_> =
        head.nodes.iter().map(|(n, nulls)| ipc::FieldNode::new(*n as i64, *nulls as i64)).collect();
    let buffers: Vec<_> =
        head.buffers.iter().map(|(at, n)| ipc::Buffer::new(*at as i64, *n as i64)).collect();
    let buffers = fbb.create_vector(&buffers);
    let nodes = fbb.create_vector(&nodes);
    let variadic = (!head.variadic.is_empty()).then(|| fbb.create_vector(head.variadic));
    let mut batch = ipc::RecordBatchBuilder::new(&mut fbb);
    batch.add_length(head.rows as i64);
    batch.add_nodes(nodes);
    batch.add_buffers(buffers);
    if let Some(variadic) = variadic {
        batch.add_variadicBufferCounts(variadic);
    }
    let batch = batch.finish();
    let (kind, header) = match head.dictionary {
        None => (ipc::MessageHeader::RecordBatch, batch.as_union_value()),
        Some(id) => {
            let mut dictionary = ipc::DictionaryBatchBuilder::new(&mut fbb);
            dictionary.add_id(id);
            dictionary.add_data(batch);
            (ipc::MessageHeader::DictionaryBatch, dictionary.finish().as_union_value())
        }
    };
    let mut message = ipc::MessageBuilder::new(&mut fbb);
    message.add_version(ipc::MetadataVersion::V5);
    message.add_header_type(kind);
    message.add_bodyLength(head.body as i64);
    message.add_header(header);
    let root = message.finish();
    fbb.finish(root, None);
    fbb.finished_data().to_vec()
}

/// The footer's flatbuffer; blocks are (place, bytes of the head with its prefix, bytes of the body).
pub(crate) fn footer(
    schema: &Schema,
    dictionaries: &[(u64, u64, u64)],
    batches: &[(u64, u64, u64)],
) -> Vec<u8> {
    let block = |(at, head, body): &(u64, u64, u64)| ipc::Block::new(*at as i64, *head as i32, *body as i64);
    let mut fbb = FlatBufferBuilder::new();
    let dictionaries = fbb.create_vector(&dictionaries.iter().map(block).collect::<Vec<_>>());
    let batches = fbb.create_vector(&batches.iter().map(block).collect::<Vec<_>>());
    let mut tracker = DictionaryTracker::new(false);
    let schema =
        IpcSchemaEncoder::new().with_dictionary_tracker(&mut tracker).schema_to_fb_offset(&mut fbb, schema);
    let mut footer = ipc::FooterBuilder::new(&mut fbb);
    footer.add_version(ipc::MetadataVersion::V5);
    footer.add_schema(schema);
    footer.add_dictionaries(dictionaries);
    footer.add_recordBatches(batches);
    let root = footer.finish();
    fbb.finish(root, None);
    fbb.finished_data().to_vec()
}
