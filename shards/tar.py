"""Tars: a shard's bytes from its samples, and the members of tars that others wrote.

What is written is USTAR with fixed headers, so that packing twice is the same. What is read is
USTAR, GNU (long names) and PAX.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from shards.errors import FormatError
from shards.objects import Bytes

Sizes = TypeVar("Sizes", int, NDArray[np.int64])

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


def padded_bytes(size: Sizes) -> Sizes:
    """What a member of `size` bytes, or each of many, takes in a tar: header, data, padding."""
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


@dataclass(frozen=True, kw_only=True, slots=True)
class FoundMember:
    """A regular file in somebody's tar."""

    name: str
    """As stored; bytes that are not UTF-8 as \\xNN."""
    start: int
    """First byte of its data in the tar."""
    size: int
    """Bytes of its data."""


def read_members(
    read: Callable[[int, int], Bytes], size: int, *, where: str
) -> Iterator[FoundMember]:
    """The regular files of a tar of `size` bytes, in its order, from its headers.

    Links, folders, devices and sparse files are left out. Ends at the first block of zeros, or
    where the tar ends between two members.

    Args:
        read: gives the bytes [start, end) of the tar; see `HeaderWindow`.
        where: the tar's address, for messages.

    Raises:
        FormatError: a header that cannot be right, or a member beyond the end of the tar; names
            the tar, the member and the byte.
    """
    at = 0
    common: dict[bytes, bytes] = {}
    own: dict[bytes, bytes] = {}
    before = "at its start"
    while at < size:
        if at + BLOCK > size:
            raise FormatError(f"{where}: ends within the header at byte {at}, {before}")
        header = bytes(read(at, at + BLOCK))
        if header.count(0) == BLOCK:
            return
        if not checksum_fits(header):
            raise FormatError(
                f"{where}: no tar header at byte {at}, {before} (its checksum differs)"
            )
        kind = header[156:157]
        length = header_number(header[124:136])
        if length is None:
            raise FormatError(f"{where}: the header at byte {at}, {before}, has no usable size")
        begin = at + BLOCK
        if kind in b"xgLK" or (kind == b"S" and header[482] == 1):
            if begin + length > size:
                raise FormatError(f"{where}: ends within the header at byte {at}, {before}")
            if length > _MOST_HEADER:
                raise FormatError(
                    f"{where}: the header at byte {at}, {before}, says it has {length:,} bytes"
                )
        if kind in b"xg":
            records = pax_records(bytes(read(begin, begin + length)))
            if records is None:
                raise FormatError(f"{where}: a broken PAX header at byte {at}, {before}")
            (own if kind == b"x" else common).update(records)
            at = begin + _padded(length)
            continue
        if kind in b"LK":
            if kind == b"L":
                own[b"path"] = bytes(read(begin, begin + length)).split(b"\0", 1)[0]
            at = begin + _padded(length)
            continue
        facts = common | own
        own = {}
        length = int(facts.get(b"size", length))
        name = facts.get(b"path", short_name(header)).decode("utf-8", "backslashreplace")
        shown = f"member {name!r}, header at byte {at}"
        if kind == b"S":  # old GNU sparse: blocks that go on with the map may follow the header
            goes_on = header[482] == 1
            while goes_on:
                if begin + BLOCK > size:
                    raise FormatError(f"{where}: {shown}: the tar ends within its header")
                goes_on = bytes(read(begin, begin + BLOCK))[504] == 1
                begin += BLOCK
        holds_data = kind not in _WITHOUT_DATA
        if holds_data and begin + length > size:
            raise FormatError(
                f"{where}: {shown}: its data would end at byte {begin + length}, the tar has "
                f"{size}: truncated, or no tar"
            )
        is_folder = name.endswith("/") and kind in b"\0" + b"0"
        is_sparse = any(key.startswith(b"GNU.sparse.") for key in facts)
        if kind in _REGULAR and not is_folder and not is_sparse:
            yield FoundMember(name=name, start=begin, size=length)
        at = begin + (_padded(length) if holds_data else 0)
        before = f"after member {name!r}"


class HeaderWindow:
    """Reads a tar for `read_members`: jumps over big members, reads on through small ones.

    A jump costs a request, which takes as long as some MiB of data. So if the next header is
    near the end of what was read, the next 4 MiB are read in one piece; if not, 16 KiB.
    """

    def __init__(self, read: Callable[[int, int], Bytes], size: int) -> None:
        self._read, self._size = read, size
        self._at = 0
        self._data: Bytes = b""

    def __call__(self, start: int, end: int) -> Bytes:
        read_to = self._at + len(self._data)
        if not self._at <= start <= end <= read_to:
            is_near = len(self._data) > 0 and 0 <= start - read_to < _NEAR
            self._at = start
            stop = max(end, start + (_STREAM if is_near else _JUMP))
            self._data = self._read(start, min(stop, self._size))
        return memoryview(self._data)[start - self._at : end - self._at]


_NEAR = 1 << 20
_STREAM = 4 << 20
_JUMP = 16 << 10
_MOST_HEADER = 16 << 20
_REGULAR = (b"0", b"\0", b"7")
_WITHOUT_DATA = (b"1", b"2", b"3", b"4", b"5", b"6")


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def checksum_fits(block: bytes) -> bool:
    """The sum of all bytes, its own field as spaces; some old programs summed signed bytes."""
    said = header_number(block[148:156])
    rest = block[:148] + b" " * 8 + block[156:]
    total = sum(rest)
    return said is not None and said in (total, total - 256 * sum(byte > 127 for byte in rest))


def header_number(field: bytes) -> int | None:
    """Octal text, or base 256 behind a first byte of 0x80 (GNU)."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    text = field.partition(b"\0")[0].strip()
    return (int(text, 8) if text else 0) if re.fullmatch(rb"[0-7]*", text) else None


def short_name(block: bytes) -> bytes:
    name = block[:100].partition(b"\0")[0]
    prefix = block[345:500].partition(b"\0")[0]
    # GNU's magic has spaces behind it, and other things where the prefix is.
    return prefix + b"/" + name if prefix and block[257:263] == b"ustar\0" else name


def pax_records(text: bytes) -> dict[bytes, bytes] | None:
    """ "length name=value\\n", over and over (POSIX.1-2001, pax header); None if it is not that."""
    records, at = {}, 0
    while at < len(text):
        found = re.compile(rb"(\d{1,7}) ([^=]+)=").match(text, at)
        if found is None:
            return None
        end = at + int(found[1])
        if not found.end() < end <= len(text) or text[end - 1 : end] != b"\n":
            return None
        records[found[2]] = text[found.end() : end - 1]
        at = end
    if b"size" in records and not records[b"size"].isdigit():
        return None
    return records
