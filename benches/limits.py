"""What physics allows on this machine, measured in the same run as everything else."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np


def memcpy(nbytes: int, threads: int) -> Callable[[], None]:
    """Copy ``nbytes`` between two resident buffers by ``threads`` threads (numpy drops the GIL)."""
    src = np.ones(nbytes, dtype=np.uint8)
    dst = np.ones(nbytes, dtype=np.uint8)
    if threads == 1:
        return lambda: np.copyto(dst, src)
    bounds = np.linspace(0, nbytes, threads + 1).astype(int) // 64 * 64
    bounds[-1] = nbytes
    pool = ThreadPoolExecutor(threads)

    def run() -> None:
        parts = [pool.submit(np.copyto, dst[a:b], src[a:b]) for a, b in pairwise(bounds)]
        for part in parts:
            part.result()

    return run


class SocketPeer:
    """An echo process behind a SEQPACKET socket that sleeps between messages: the bare round trip."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.pid = os.fork()
        if self.pid == 0:
            ours.close()
            while data := theirs.recv(4096):
                theirs.send(data)
            os._exit(0)
        theirs.close()
        self.socket = ours

    def __call__(self) -> None:
        self.socket.send(b"x" * 64)
        self.socket.recv(4096)

    def close(self) -> None:
        self.socket.close()
        os.waitpid(self.pid, 0)
