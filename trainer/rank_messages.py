"""Arrays and figures as bytes, for messages between the ranks of one training."""

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np

from smes.arrays import Arrays
from smes.events import ExampleBlock


def pack(arrays: Arrays) -> bytes:
    """Arrays as one message."""
    columns = {name: (a.dtype.str, a.shape, np.ascontiguousarray(a).tobytes()) for name, a in arrays.items()}
    return msgspec.msgpack.encode(columns)


def unpack(message: bytes) -> Arrays:
    """The inverse of :func:`pack`; the arrays cannot be written to."""
    columns: dict[str, Any] = msgspec.msgpack.decode(message)
    return {name: np.frombuffer(data, np.dtype(kind)).reshape(shape) for name, (kind, shape, data) in columns.items()}


def slim(examples: ExampleBlock) -> Arrays:
    """The columns of some examples without their features; of their ids the user's alone."""
    arrays = examples.arrays()
    return {**arrays, "ids": arrays["ids"][:, :1], "numerics": arrays["numerics"][:, :0]}


def joined(parts: Sequence[Arrays]) -> ExampleBlock:
    """The examples of all parts, in their order."""
    return ExampleBlock.concat([ExampleBlock(**part) for part in parts])
