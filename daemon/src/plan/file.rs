//! Where everything lies in the result: an Arrow IPC file whose buffers are 64-byte aligned from its start.

use arrow_schema::Schema;
use shmquant_protocol::chunks::ALIGN;
use shmquant_protocol::message::{ErrorCode, Failure};

use super::ipc;

/// A buffer of the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct BufferId(usize);

/// An array (of a column, or inside one) of the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct NodeId(usize);

/// A message with a body.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct MessageId(usize);

/// A place inside a buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) buffer: BufferId,
    /// Bytes from the buffer's start.
    pub(crate) offset: u64,
}

#[derive(Debug, Clone, Copy)]
struct Node {
    length: u64,
    nulls: u64,
    validity: Option<BufferId>,
}

#[derive(Debug, Clone, Copy)]
struct Buffer {
    at: u64,
    bytes: u64,
}

#[derive(Debug, Default)]
struct Message {
    dictionary: Option<i64>,
    rows: u64,
    nodes: Vec<NodeId>,
    buffers: Vec<BufferId>,
    variadic: Vec<i64>,
    /// Place and bytes of the head, prefix and padding included.
    head: (u64, u64),
    /// Place and bytes of the body.
    body: (u64, u64),
}

/// The finished layout.
#[derive(Debug)]
pub(crate) struct File {
    nodes: Vec<Node>,
    buffers: Vec<Buffer>,
    /// Dictionaries first.
    messages: Vec<Message>,
    /// Bytes of the schema message's head, which begins after the magic.
    schema: u64,
    footer: u64,
    length: u64,
}

/// A file being laid out: the arrays are known, their places are not.
#[derive(Debug, Default)]
pub(crate) struct Builder {
    nodes: Vec<Node>,
    buffers: Vec<Buffer>,
    messages: Vec<Message>,
    dictionaries: i64,
    total: u64,
}

impl Builder {
    /// A record batch of so many rows.
    pub(crate) fn batch(&mut self, rows: u64) -> MessageId {
        self.message(None, rows)
    }

    /// The values of the next dictionary, in the order of the schema's fields.
    pub(crate) fn dictionary(&mut self, rows: u64) -> MessageId {
        let id = self.dictionaries;
        self.dictionaries += 1;
        self.message(Some(id), rows)
    }

    fn message(&mut self, dictionary: Option<i64>, rows: u64) -> MessageId {
        self.messages.push(Message { dictionary, rows, ..Message::default() });
        MessageId(self.messages.len() - 1)
    }

    /// An array with a validity buffer of `validity` bytes (0: never null).
    pub(crate) fn node(&mut self, m: MessageId, length: u64, nulls: u64, validity: u64) -> NodeId {
        let node = self.bare_node(m, length, nulls);
        let buffer = self.buffer(m, validity);
        self.nodes[node.0].validity = Some(buffer);
        node
    }

    /// An array of type null: it has no buffers.
    pub(crate) fn bare_node(&mut self, m: MessageId, length: u64, nulls: u64) -> NodeId {
        let id = NodeId(self.nodes.len());
        self.nodes.push(Node { length, nulls, validity: None });
        self.messages[m.0].nodes.push(id);
        id
    }

    /// The next buffer of the last array.
    pub(crate) fn buffer(&mut self, m: MessageId, bytes: u64) -> BufferId {
        let id = BufferId(self.buffers.len());
        self.buffers.push(Buffer { at: 0, bytes });
        self.messages[m.0].buffers.push(id);
        self.total = self.total.saturating_add(bytes.checked_next_multiple_of(ALIGN).unwrap_or(u64::MAX));
        id
    }

    /// Says that the last array is of a view type with so many data buffers.
    pub(crate) fn variadic(&mut self, m: MessageId, count: i64) {
        self.messages[m.0].variadic.push(count);
    }

    /// The validity buffer of an array.
    pub(crate) fn validity(&self, node: NodeId) -> Option<BufferId> {
        self.nodes[node.0].validity
    }

    /// Refuses what is larger than `most` even without metadata, before anything of that size is built.
    pub(crate) fn check(&self, metadata: u64, most: u64) -> Result<(), Failure> {
        let total = self.total.saturating_add(metadata);
        if total > most { Err(too_large(total, most)) } else { Ok(()) }
    }

    /// Gives everything its place.
    pub(crate) fn place(mut self, schema: &Schema, most: u64) -> Result<File, Failure> {
        self.check(0, most)?;
        // A stable sort: record batches keep their order behind the dictionaries.
        self.messages.sort_by_key(|m| m.dictionary.is_none());
        let begin = ipc::MAGIC.len() as u64;
        let schema_bytes = padded_head(begin, ipc::schema(schema).len() as u64);
        let mut at = begin + schema_bytes;
        for message in &mut self.messages {
            let body: u64 =
                message.buffers.iter().map(|b| self.buffers[b.0].bytes.next_multiple_of(ALIGN)).sum();
            message.body.1 = body;
            let head = encode_head(message, &self.buffers, &self.nodes, |n| n.nulls, |_, b| b.bytes);
            message.head = (at, padded_head(at, head.len() as u64));
            at += message.head.1;
            message.body.0 = at;
            for id in &message.buffers {
                let buffer = &mut self.buffers[id.0];
                buffer.at = at;
                at += buffer.bytes.next_multiple_of(ALIGN);
            }
        }
        let footer = at + ipc::END.len() as u64;
        let mut file = File {
            nodes: self.nodes,
            buffers: self.buffers,
            messages: self.messages,
            schema: schema_bytes,
            footer,
            length: 0,
        };
        file.length = footer + file.footer(schema).len() as u64 + ipc::TRAILER;
        // Lengths of metadata are i32 in the format.
        if file.length > most || file.length - footer > i32::MAX as u64 || schema_bytes > i32::MAX as u64 {
            return Err(too_large(file.length, most));
        }
        Ok(file)
    }
}

impl File {
    /// Bytes of the whole file.
    pub(crate) fn length(&self) -> u64 {
        self.length
    }

    /// Arrays, for tables of null counts.
    pub(crate) fn null_counts(&self) -> Vec<u64> {
        self.nodes.iter().map(|n| n.nulls).collect()
    }

    /// Bytes of every buffer.
    pub(crate) fn buffer_bytes(&self) -> Vec<u64> {
        self.buffers.iter().map(|b| b.bytes).collect()
    }

    /// Place and bytes of a buffer.
    pub(crate) fn buffer(&self, id: BufferId) -> (u64, u64) {
        let buffer = self.buffers[id.0];
        (buffer.at, buffer.bytes)
    }

    /// Place in the file.
    pub(crate) fn at(&self, place: Place) -> u64 {
        self.buffers[place.buffer.0].at + place.offset
    }

    /// Validity buffer and length of an array.
    pub(crate) fn node(&self, id: NodeId) -> (Option<BufferId>, u64) {
        let node = &self.nodes[id.0];
        (node.validity, node.length)
    }

    /// All buffers with place, bytes and index into [`File::buffer_bytes`].
    pub(crate) fn buffers(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        self.buffers.iter().map(|b| (b.at, b.bytes))
    }

    /// Place and padded bytes of the schema's head.
    pub(crate) fn schema(&self) -> (u64, u64) {
        (ipc::MAGIC.len() as u64, self.schema)
    }

    /// Every message's head: its place, its padded bytes and its flatbuffer, given null counts and bytes used.
    pub(crate) fn heads<'a>(
        &'a self,
        nulls: &'a [u64],
        used: &'a [u64],
    ) -> impl Iterator<Item = (u64, u64, Vec<u8>)> + 'a {
        self.messages.iter().map(|m| {
            let count = |i: NodeId| nulls[i.0];
            let bytes = |i: BufferId| used[i.0];
            let nodes: Vec<_> = m.nodes.iter().map(|i| (self.nodes[i.0].length, count(*i))).collect();
            let buffers: Vec<_> =
                m.buffers.iter().map(|i| (self.buffers[i.0].at - m.body.0, bytes(*i))).collect();
            let head = ipc::Head {
                dictionary: m.dictionary,
                rows: m.rows,
                nodes: &nodes,
                buffers: &buffers,
                variadic: &m.variadic,
                body: m.body.1,
            };
            (m.head.0, m.head.1, ipc::head(&head))
        })
    }

    /// Place of the marker that ends the messages; the footer follows it.
    pub(crate) fn end(&self) -> u64 {
        self.footer - ipc::END.len() as u64
    }

    /// The footer's flatbuffer.
    pub(crate) fn footer(&self, schema: &Schema) -> Vec<u8> {
        let (dictionaries, batches): (Vec<_>, Vec<_>) =
            self.messages.iter().partition(|m| m.dictionary.is_some());
        let block = |m: &&Message| (m.head.0, m.head.1, m.body.1);
        let dictionaries: Vec<_> = dictionaries.iter().map(block).collect();
        let batches: Vec<_> = batches.iter().map(block).collect();
        ipc::footer(schema, &dictionaries, &batches)
    }
}

impl BufferId {
    /// Index into [`File::buffer_bytes`].
    pub(crate) fn index(self) -> usize {
        self.0
    }
}

impl NodeId {
    /// Index into [`File::null_counts`].
    pub(crate) fn index(self) -> usize {
        self.0
    }
}

impl Place {
    /// The start of a buffer.
    pub(crate) fn start(buffer: BufferId) -> Self {
        Self { buffer, offset: 0 }
    }
}

fn encode_head(
    m: &Message,
    buffers: &[Buffer],
    nodes: &[Node],
    nulls: impl Fn(&Node) -> u64,
    bytes: impl Fn(BufferId, &Buffer) -> u64,
) -> Vec<u8> {
    let nodes: Vec<_> = m.nodes.iter().map(|i| (nodes[i.0].length, nulls(&nodes[i.0]))).collect();
    let buffers: Vec<_> = m.buffers.iter().map(|i| (0, bytes(*i, &buffers[i.0]))).collect();
    ipc::head(&ipc::Head {
        dictionary: m.dictionary,
        rows: m.rows,
        nodes: &nodes,
        buffers: &buffers,
        variadic: &m.variadic,
        body: m.body.1,
    })
}

/// Bytes of a message's head at `at`, padded so that its body is aligned.
fn padded_head(at: u64, flatbuffer: u64) -> u64 {
    (at + ipc::PREFIX + flatbuffer).next_multiple_of(ALIGN) - at
}

fn too_large(need: u64, most: u64) -> Failure {
    let message = format!("the result needs {need} bytes, {most} are allowed");
    Failure::new(
        ErrorCode::NoRoom,
        message,
        "quantize the table in parts, or give the daemon a larger budget",
    )
}
