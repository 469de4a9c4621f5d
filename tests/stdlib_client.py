"""A second client of the daemon, written from `protocol/PROTOCOL.md` and with the standard library alone.

It is here to prove the page: whatever this client cannot do with the page's words is missing from the page.
It is also the shortest complete answer to "what must a client in another language do". It is in four files,
by the page's sections: `stdlib_messages` (1, 3), `stdlib_descriptor` (4 to 6), `stdlib_client` (2, 7) and
`stdlib_arrow` (8).
"""

import array
import hashlib
import mmap
import os
import socket

from stdlib_descriptor import ceil64, cut, place
from stdlib_messages import (
    DATASETS,
    INPUT,
    LEASE_FD,
    MAX_FDS,
    MAX_FRAME,
    NAMED,
    NO_TIMEOUT,
    OPEN_AGAIN,
    OPEN_NAME,
    OPEN_TICKET,
    REPLACE,
    WARM,
    DaemonError,
    decode,
    encode,
    release_of,
    unpack,
)

REPORT = (
    "n:Q n_clipped:Q n_nonfinite:Q n_degenerate_groups:Q n_nulled:Q "
    "mse:d sqnr_db:d max_abs_err:d cosine:d reserved:Q"
)


def default_address():
    """Where the daemon listens unless told otherwise."""
    if address := os.environ.get("SHMQUANT_ADDRESS"):
        return address
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    folder = os.path.join(runtime, "shmquant") if runtime else f"/tmp/shmquant-{os.getuid()}"
    return os.path.join(folder, "shmquant-1.sock")


def digest_of(sources):
    """This client's word for values; another hash than that of the project's clients."""
    digest = hashlib.blake2b(digest_size=16)
    for stream in (stream for streams in sources for stream in streams):
        digest.update(stream)
    return digest.digest()


class Connection:
    """A connection with its requests; what comes between a request and its reply goes to `notice`."""

    def __init__(self, address, timeout=30.0):
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.settimeout(timeout)
        self.socket.connect(address)
        self.requests = 0

    def send(self, name, request=0, /, **values):
        """Send a message."""
        self.socket.send(encode(name, request, **values))

    def ask(self, name, /, **values):
        """Send a request, without waiting; gives its number."""
        self.requests += 1
        self.send(name, self.requests, **values)
        return self.requests

    def receive(self):
        """Receive one message and its file descriptors; `ConnectionError` when the peer has closed."""
        room, flags = socket.CMSG_SPACE(4 * MAX_FDS), socket.MSG_CMSG_CLOEXEC
        try:
            raw, ancillary, got, _ = self.socket.recvmsg(MAX_FRAME, room, flags)
        except ConnectionResetError:
            # The daemon closed without reading all that was sent to it. What it had said is still here.
            raw, ancillary, got, _ = self.socket.recvmsg(MAX_FRAME, room, flags)
        fds = array.array("i")
        for level, kind, data in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
        if got & (socket.MSG_CTRUNC | socket.MSG_TRUNC):
            raise OSError("file descriptors or bytes of a frame were lost on the way")
        if not raw:
            raise ConnectionError("the daemon closed the connection")
        return (*decode(raw), list(fds))

    def answer(self, request, notice=None):
        """Wait for a request's reply; gives its fields and file descriptors."""
        while True:
            name, number, values, fds = self.receive()
            if name == "ERROR" and number == request:
                raise DaemonError(values)
            if name.endswith(" reply") and number == request:
                return values, fds
            if notice is not None:
                notice(name, number, values)

    def call(self, name, /, **values):
        """Send a request and wait for its reply."""
        return self.answer(self.ask(name, **values), self.notice)

    def notice(self, name, number, values):
        """Take a message that is no reply to what was asked; replies that came too late are dropped."""

    def close(self):
        """Close the connection."""
        self.socket.close()


class Session(Connection):
    """The primary connection, and what the session holds."""

    def __init__(self, address=None):
        super().__init__(address or default_address())
        self.hello, _ = self.call("HELLO", minor=0, library="stdlib client")
        self.segments = {}  # segment: its mapping

    def lane(self, window=0):
        """Open a lane; a window of 0 bytes means the daemon's default."""
        return Lane(self, window)

    def notice(self, name, number, values):
        """Drop the mapping of a segment that the daemon wants back, unless someone still looks at it."""
        if name == "UNMAP":
            mapping = self.segments.pop(values["segment"], None)
            try:
                if mapping is not None:
                    mapping.close()
                self.send("UNMAP", segment=values["segment"])
            except BufferError:
                self.segments[values["segment"]] = mapping

    def listen(self):
        """Hear the notices that came while nothing was asked: who never does keeps memory from everybody."""
        patience = self.socket.gettimeout()
        self.socket.settimeout(0)
        try:
            while True:
                self.notice(*self.receive()[:3])
        except BlockingIOError:
            return
        finally:
            self.socket.settimeout(patience)

    def attach(self, lease, fds, access=mmap.PROT_READ):
        """Map the lease's segment if it is new, and give a view of the extent."""
        extent = lease["extent"]
        if lease["flags"] & LEASE_FD:
            mapping = mmap.mmap(fds[0], lease["segment_size"], prot=access)
            self.segments[extent["segment"]] = mapping
        for fd in fds:
            os.close(fd)
        begin = extent["offset"]
        return memoryview(self.segments[extent["segment"]])[begin : begin + extent["length"]]

    def release(self, *leases, tainted=False):
        """Give back one hold of each lease."""
        self.send("RELEASE", releases=[release_of(lease, tainted) for lease in leases])

    def open(self, name="", ticket=None, again=None):
        """Open a dataset by name, a result by ticket, or have an own lease's descriptor sent again."""
        if ticket is not None:
            reply, fds = self.call("OPEN", kind=OPEN_TICKET, **ticket)
        elif again is not None:
            reply, fds = self.call("OPEN", kind=OPEN_AGAIN, extent=again["extent"])
        else:
            reply, fds = self.call("OPEN", kind=OPEN_NAME, name=name)
        return reply["lease"], self.attach(reply["lease"], fds), reply["name"]

    def ticket(self, lease):
        """Make a ticket that another session opens the lease with."""
        return self.call("TICKET", extent=lease["extent"])[0]

    def publish(self, lease, name, replace=False):
        """Give a result a name."""
        self.call("PUBLISH", extent=lease["extent"], flags=REPLACE if replace else 0, name=name)

    def drop(self, name):
        """Forget a dataset's name."""
        self.call("DROP", name=name)

    def list(self, what=DATASETS):
        """List datasets, leased results or sessions, as JSON texts."""
        entries, cursor = [], 0
        while True:
            reply, _ = self.call("LIST", cursor=cursor, what=what)
            entries += reply["entries"]
            cursor = reply["cursor"]
            if cursor == 0:
                return entries

    def stat(self):
        """The daemon's state, as a JSON text."""
        return self.call("STAT")[0]["stat"]

    def ping(self):
        """Ask whether it is there."""
        self.call("PING")

    def bye(self):
        """End the session."""
        self.send("BYE")
        self.close()


class Lane(Connection):
    """A further connection of a session, with its window."""

    def __init__(self, session, window):
        super().__init__(session.socket.getpeername())
        self.session = session
        hello = session.hello
        reply, fds = self.call("JOIN", session=hello["session"], token=hello["token"], window=window)
        self.lane, self.size = reply["lane"], reply["size"]
        self.window = mmap.mmap(fds[0], self.size)
        for fd in fds:
            os.close(fd)
        self.consumed_notices = 0
        # What the daemon advised last, in bytes; 0 is all of the window.
        self.ring = 0

    def quantize(
        self, descriptor, sources, name=None, replace=False, timeout=NO_TIMEOUT, releases=(), digest=None
    ):
        """Quantize `sources` (per item, its streams); gives the lease, its view and the reports.

        Values are bytes, those of an encoded item a callable that makes a chunk's findings. A name's digest
        is made from the streams unless it is given.
        """
        self.session.listen()
        raw = descriptor.encode()
        if len(raw) > self.size // 4:
            raise ValueError(f"a descriptor of {len(raw)} bytes in a window of {self.size}")
        chunks = cut(descriptor)
        ring = place(chunks, len(raw), self.size, self.ring)
        self.window[: len(raw)] = raw
        written = self._write(chunks, sources, 0, 0, ring)
        values = {"descriptor": len(raw), "ready": written, "timeout": timeout, "releases": releases}
        values["ring"] = self.ring
        if name is not None:
            values |= {"flags": NAMED | (REPLACE if replace else 0), "name": name}
            values["digest"] = digest or digest_of(sources)
        request = self.ask("QUANTIZE", **values)

        def consumed(message, number, notice):
            nonlocal written
            if message != "CONSUMED" or number != request:
                return
            self.consumed_notices += 1
            before = written
            written = self._write(chunks, sources, written, notice["chunks"], ring)
            if written > before:
                self.send("WROTE", request, chunks=written)

        reply, fds = self.answer(request, consumed)
        if ring is not None:
            self.ring = reply["ring"]
        view = self.session.attach(reply["lease"], fds)
        return reply["lease"], view, [self._report(i) for i in range(reply["report"] // 80)]

    def allocate(self, nbytes, timeout=NO_TIMEOUT):
        """Ask for memory that both sides have; gives its lease and the memory, to be written."""
        reply, fds = self.call("ALLOC", bytes=nbytes, purpose=INPUT, timeout=timeout)
        view = self.session.attach(reply["lease"], fds, mmap.PROT_READ | mmap.PROT_WRITE)
        return reply["lease"], view

    def warm(self, nbytes):
        """Have memory made ready for a result."""
        self.call("ALLOC", bytes=nbytes, purpose=WARM, timeout=NO_TIMEOUT)

    def _write(self, chunks, sources, written, consumed, ring):
        """Write every chunk that may be written; gives the new watermark."""
        while written < len(chunks):
            chunk = chunks[written]
            freed = chunks[min(consumed, written)].start
            if ring is not None and chunk.start + ceil64(chunk.bytes) - freed > ring:
                break
            if chunk.bytes and not (ring is None and chunk.repeats):
                source, begin = sources[chunk.item][chunk.stream], chunk.begin
                if callable(source):
                    source, begin = source(chunk), 0
                taken = memoryview(source).cast("B")[begin : begin + chunk.bytes]
                self.window[chunk.at : chunk.at + chunk.bytes] = taken
            written += 1
        return written

    def _report(self, index):
        """Section 7: the report of one quantized item."""
        raw = self.window[80 * index : 80 * index + 80]
        return unpack(REPORT, raw)

    def close(self):
        """Unmap the window and close the connection."""
        self.window.close()
        super().close()
