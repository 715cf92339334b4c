"""What stores say of objects: one object's facts, and the columns of a listing."""

import datetime
from dataclasses import dataclass
from typing import Any, TypeAlias

import pyarrow as pa

Bytes: TypeAlias = Any
"""Anything with the buffer protocol: bytes, memoryview, or what a store read without a copy."""

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
