"""What stores say: one object's facts, the columns of a listing, and what it took."""

import datetime
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import pyarrow as pa

Bytes: TypeAlias = Any
"""Anything with the buffer protocol: bytes, memoryview, or what a store read without a copy."""

Allocate: TypeAlias = Callable[[int], memoryview]
"""Memory of so many bytes, to be written into; its items are bytes."""


def allocated(size: int) -> memoryview:
    """Fresh memory. Not a bytearray, which would be filled with zeros first."""
    return np.empty(size, dtype=np.uint8).data


LISTING = pa.schema(
    [
        ("path", pa.string()),
        ("size", pa.int64()),
        ("etag", pa.string()),
        ("modified", pa.timestamp("us", tz="UTC")),
    ]
)
"""Columns of what `Store.list` yields. etag: without quotes; null where a store has none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ObjectInfo:
    """What a store says of one object."""

    path: str
    size: int
    etag: str
    modified: datetime.datetime


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreStats:
    """What one store was asked for since it was opened, all threads together."""

    requests: int
    """Attempts, retries included; a listing counts one for each thousand objects."""
    retries: int
    """Attempts that followed a failed one of the same request."""
    resumes: int
    """Of the retries, those that went on at the byte where a body broke off."""
    throttles: int
    """Answers that said to slow down (429, 503)."""
    read_bytes: int
    written_bytes: int


class RejectedObject(NamedTuple):
    """An object that was listed and is not packed."""

    uri: str
    size: int | None
    """Bytes; None where the listing did not say."""
    etag: str | None
    reason: str
    """One of `shards.images.Reason`."""
    detail: str


def shown(name: str) -> str:
    """A name fit for a terminal or a log: what does not print is escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)
