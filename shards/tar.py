"""A shard's bytes from its samples: USTAR with fixed headers, so that packing twice is the same."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shards.objects import Bytes

BLOCK = 512
_END = bytes(2 * BLOCK)


@dataclass(frozen=True, kw_only=True, slots=True)
class Member:
    """One file to put into a tar."""

    name: str
    data: Bytes


def sample_key(shard: int, position: int) -> str:
    """12 hex digits, unique in the set. Readers trip over dots, spaces, slashes and long names."""
    assert max(shard, position) < 16**6, "the width of a key is fixed"
    return f"{shard:06x}{position:06x}"


def padded_bytes(size: int) -> int:
    """What a member of `size` bytes takes in a tar: header, data, padding."""
    return BLOCK + -(-size // BLOCK) * BLOCK


def build_tar(members: Sequence[Member]) -> tuple[list[Bytes], NDArray[np.int64]]:
    """The buffers that joined make the tar, and where each member's data starts, in bytes."""
    buffers: list[Bytes] = []
    offsets = np.zeros(len(members), dtype=np.int64)
    position = 0
    for number, member in enumerate(members):
        size = len(member.data)
        buffers += [_header(member.name, size), member.data]
        if size % BLOCK:
            buffers.append(bytes(-size % BLOCK))
        offsets[number] = position + BLOCK
        position += padded_bytes(size)
    buffers.append(_END)
    return buffers, offsets


def _header(name: str, size: int) -> bytes:
    """One regular file, mode 0444, no owner, mtime 0 (POSIX.1-1988, ustar interchange format)."""
    assert len(name) <= 100, "what a USTAR header can say"
    assert size < 8**11, "what a USTAR header can say"
    fields = (
        name.encode("ascii").ljust(100, b"\0"),
        b"0000444\0" + b"0000000\0" + b"0000000\0",
        f"{size:011o}\0".encode(),
        b"00000000000\0",
        b" " * 8,
        b"0",
        bytes(100),
        b"ustar\x0000",
        bytes(32 + 32),
        b"0000000\0" + b"0000000\0",
        bytes(155 + 12),
    )
    header = b"".join(fields)
    checksum = f"{sum(header):06o}\0 ".encode()
    return header[:148] + checksum + header[156:]
