"""A relay between client and daemon, in the client's process, that counts what crosses."""

from __future__ import annotations

import array
import contextlib
import os
import socket
import threading
from collections import Counter
from pathlib import Path

from stdlib_messages import MAX_FDS, MAX_FRAME, MESSAGES

CLIENT, DAEMON = "client", "daemon"


class Relay:
    """Listens on a socket of its own and hands every frame on to the daemon's, descriptors included.

    It has to run in the client's process: who may join a session is told by the peer's process id.
    """

    def __init__(self, address: str, daemon: str) -> None:
        self.address = address
        self.frames: Counter[tuple[str, str]] = Counter()
        self.descriptors = 0
        self._daemon = daemon
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(address)
        Path(address).chmod(0o600)
        self._listener.listen()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            daemon = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            daemon.connect(self._daemon)
            for sender, source, sink in ((CLIENT, client, daemon), (DAEMON, daemon, client)):
                threading.Thread(target=self._hand_on, args=(sender, source, sink), daemon=True).start()

    def _hand_on(self, sender: str, source: socket.socket, sink: socket.socket) -> None:
        room = socket.CMSG_SPACE(4 * MAX_FDS)
        try:
            while True:
                raw, ancillary, _, _ = source.recvmsg(MAX_FRAME, room, socket.MSG_CMSG_CLOEXEC)
                if not raw:
                    break
                fds = array.array("i")
                for _, _, data in ancillary:
                    fds.frombytes(data)
                # Counted before it is handed on: who has the reply sees its count.
                self.frames[sender, MESSAGES[int.from_bytes(raw[2:4], "little")][0]] += 1
                self.descriptors += len(fds)
                try:
                    socket.send_fds(sink, [raw], fds) if fds else sink.send(raw)
                finally:
                    for fd in fds:
                        os.close(fd)
        except OSError:
            pass  # an end is gone: so is the connection
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Take no more connections; those that are there go on until an end closes."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
