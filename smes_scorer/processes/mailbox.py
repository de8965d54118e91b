"""Messages between the processes of a service, each with descriptors of memory or of a way to answer.

Every process has a box that it alone reads, and every other may put messages into it. Boxes are made before the
processes are, and outlive them: what was sent to one that ended is read, and left, by the next.
"""

import os
import select
import socket
import time
from collections.abc import Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import Any

import msgspec

from smes.model.shared_rows import Place, ShadowPlace, TablePlaces

_MOST_BYTES = 256 * 1024
_MOST_DESCRIPTORS = 64
_ROOM = 1024 * 1024


class Generation(msgspec.Struct, frozen=True, tag=True):
    """The loader tells a worker what to serve from now on. With descriptors of the places, in their order.

    Attributes:
        incarnation: Of the worker that this is for.
        loader: Incarnation of the loader; its numbers of memory are its own.
        track: Which model.
        number: Of the generation.
        table, shadows: Where the rows are.
        dense: Where everything else of the version is (:mod:`smes_scorer.processes.version_block`).
        places: Of all descriptors.
    """

    incarnation: int
    loader: int
    track: int
    number: int
    table: TablePlaces
    shadows: tuple[ShadowPlace, ...]
    dense: Place
    places: tuple[Place, ...]


class Status(msgspec.Struct, frozen=True, tag=True):
    """The loader tells a worker how loading goes.

    Attributes:
        track: Which model.
        problem: As of :attr:`smes_scorer.hot_swap.HotSwap.problem`.
        refused: As of :meth:`smes_scorer.refused.Refused.summary`.
        holds: Whether the model may answer: an arm of held candidates only while it is held.
    """

    track: int
    problem: str | None
    refused: dict[str, dict[str, Any]]
    holds: bool


class FirstAnswered(msgspec.Struct, frozen=True, tag=True):
    """A worker tells the loader that it answered with a version for the first time, and when."""

    track: int
    lineage: str
    version: int
    now_ms: int


class Lend(msgspec.Struct, frozen=True, tag=True):
    """A worker that has just started asks another one for what that serves, in case no process can load it now.

    Attributes:
        worker, incarnation: Of the one that asks.
    """

    worker: int
    incarnation: int


class Tell(msgspec.Struct, frozen=True, tag=True):
    """Somebody asks for the figures of a process. With the descriptor of a socket for the answer."""


Text = Generation | Status | FirstAnswered | Lend | Tell
_DECODER = msgspec.json.Decoder(Text)


@dataclass
class Message:
    """What somebody said, and the descriptors that came with it, which the receiver closes."""

    text: Text
    descriptors: tuple[int, ...]

    def close(self) -> None:
        """Close the descriptors."""
        for descriptor in self.descriptors:
            os.close(descriptor)
        self.descriptors = ()

    def answer(self, text: bytes, timeout_s: float = 1.0) -> None:
        """Answer a message of :meth:`Mailbox.ask`. Whether somebody still waits does not matter."""
        (descriptor,), self.descriptors = self.descriptors, ()
        with closing(socket.socket(fileno=descriptor)) as way, suppress(OSError):
            way.settimeout(timeout_s)
            way.sendall(text)


class Mailbox:
    """A box for messages of one process. Any process and thread may put messages; one thread takes them."""

    def __init__(self) -> None:
        self._out, self._in = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._out.setblocking(False)
        self._in.setblocking(False)
        self._out.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _ROOM)

    def put(self, text: Text, descriptors: Sequence[int] = ()) -> bool:
        """Send a message, or not if there is no room for it. Never waits. Returns whether it was sent."""
        try:
            socket.send_fds(self._out, [msgspec.json.encode(text)], descriptors)
        except OSError:  # no room; or more descriptors on their way than this user may have
            return False
        return True

    def take(self, timeout_s: float) -> Message | None:
        """The next message; None if none came in time."""
        if timeout_s > 0 and not select.select([self._in], [], [], timeout_s)[0]:
            return None
        try:
            text, descriptors, _, _ = socket.recv_fds(self._in, _MOST_BYTES, _MOST_DESCRIPTORS)
        except BlockingIOError:
            return None
        return Message(_DECODER.decode(text), tuple(descriptors))

    def ask(self, timeout_s: float) -> bytes | None:
        """Ask for the figures of the box's process; None if there is no answer in time."""
        until_s = time.monotonic() + timeout_s
        ours, theirs = socket.socketpair()
        with closing(ours):
            with closing(theirs):
                if not self.put(Tell(), [theirs.fileno()]):
                    return None
            pieces: list[bytes] = []
            while (left_s := until_s - time.monotonic()) > 0:
                ours.settimeout(left_s)
                try:
                    piece = ours.recv(1 << 16)
                except OSError:  # too late, or whoever was asked has ended
                    return None
                if not piece:
                    return b"".join(pieces) or None
                pieces.append(piece)
        return None
