"""One tar from front to back, in bounded pieces: what verify and adopt read."""

import hashlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

from shards.errors import FormatError
from shards.objects import Bytes
from shards.store import Store
from shards.tar import BLOCK, checksum_fits, header_number, pax_records, short_name

PIECE_BYTES = 8 * 2**20
_AHEAD = 2
_MOST_HEADER_BYTES = 2**20  # of a long name or a PAX header; real ones take a block or two
_PACKED = (
    (b"\x1f\x8b", "gzip"),
    (b"BZh", "bzip2"),
    (b"\xfd7zXZ\x00", "xz"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"\x04\x22\x4d\x18", "lz4"),
    (b"PK\x03\x04", "zip"),
)


class ScanError(FormatError):
    """A tar that is not sound at one byte of it."""

    def __init__(self, where: str, what: str, *, byte: int, member: str | None = None) -> None:
        named = f" (member {member!r})" if member is not None else ""
        super().__init__(f"{where}: byte {byte}{named}: {what}")
        self.where, self.what, self.byte, self.member = where, what, byte, member

    def __reduce__(self) -> tuple[object, ...]:  # out of a worker process with all it says
        return _scan_error, (self.where, self.what, self.byte, self.member)


def _scan_error(where: str, what: str, byte: int, member: str | None) -> ScanError:
    return ScanError(where, what, byte=byte, member=member)


@dataclass(frozen=True, kw_only=True, slots=True)
class FoundMember:
    """What one header says, and the extended ones in front of it."""

    name: str
    start: int
    """Byte of the first of its headers."""
    offset: int
    """Byte of its data."""
    size: int
    is_file: bool
    """A regular one: not a folder, link or device."""


class TarScan:
    """The bytes of one tar in order, each fetched once; a piece or two are read ahead."""

    def __init__(self, store: Store, path: str, *, size: int, etag: str | None) -> None:
        """Args:
        size: of the tar, in bytes, as listed.
        etag: as listed; every read asks for this one.
        """
        self.where = store.uri(path)
        self.size = size
        self.position = 0
        """First byte that was not taken yet."""
        self._store, self._path, self._etag = store, path, etag
        self._digest = hashlib.sha256()
        self._starts = iter(range(0, size, PIECE_BYTES))
        self._piece = memoryview(b"")
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="tar-scan")
        self._ahead: deque[Future[memoryview]] = deque()
        self._fetch_ahead()

    def __enter__(self) -> "TarScan":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def take(self, count: int) -> Iterator[memoryview]:
        """The next `count` bytes in pieces, without a copy; fewer where the tar ends.

        Raises:
            StoreError: also if the tar is no longer the one that was listed.
        """
        while count > 0 and self.position < self.size:
            if not len(self._piece):
                self._piece = self._ahead.popleft().result()
                self._fetch_ahead()
            part = self._piece[:count]
            self._piece = self._piece[len(part) :]
            self.position += len(part)
            count -= len(part)
            yield part

    def read(self, count: int) -> Bytes:
        """The next `count` bytes as one buffer; fewer where the tar ends."""
        parts = list(self.take(count))
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def skip_to(self, byte: int) -> None:
        """Pass over what lies before `byte`."""
        for _ in self.take(byte - self.position):
            pass

    def sha256(self) -> str:
        """Of the whole tar; reads what is left of it."""
        self.skip_to(self.size)
        return self._digest.hexdigest()

    def _fetch_ahead(self) -> None:
        for start in islice(self._starts, _AHEAD - len(self._ahead)):
            self._ahead.append(self._pool.submit(self._fetch, start))

    def _fetch(self, start: int) -> memoryview:
        end = min(start + PIECE_BYTES, self.size)
        (data,) = self._store.read_ranges(self._path, [start], [end], if_match=self._etag)
        self._digest.update(data)  # one thread, so in order
        return memoryview(data)


def next_member(scan: TarScan) -> FoundMember | None:
    """Read the headers of the next member; None at the end mark, whose first block is then taken.

    USTAR, GNU (long names, large sizes), PAX and the oldest tars are understood. The data is left
    to the caller, who takes it and its padding, or skips to the next multiple of 512.

    Raises:
        ScanError: no header begins here, or the tar is cut short, compressed, sparse or in volumes.
    """
    start = scan.position
    long_name: bytes | None = None
    long_size: int | None = None
    while True:
        at = scan.position
        block = bytes(scan.read(BLOCK))
        if at == 0 and (packer := next((n for magic, n in _PACKED if block.startswith(magic)), "")):
            raise ScanError(scan.where, f"compressed by {packer}; unpack it first", byte=0)
        if len(block) < BLOCK:
            raise ScanError(
                scan.where, "ends without the zero blocks of a tar's end: cut short", byte=at
            )
        if not block.strip(b"\0"):
            if at != start:
                raise ScanError(scan.where, "a long name without a member behind it", byte=at)
            return None
        if not checksum_fits(block):
            raise ScanError(scan.where, "no tar header: its checksum is wrong", byte=at)
        kind, size = block[156:157], header_number(block[124:136])
        if size is None or size < 0:
            raise ScanError(scan.where, "the header's size is no number", byte=at)
        if kind in b"xgLK":
            text = _extended(scan, size, at=at)
            if kind == b"L":
                long_name = text.rstrip(b"\0")
            elif kind in b"xg":
                known = pax_records(text)
                if known is None:
                    raise ScanError(scan.where, "a damaged PAX header", byte=at)
                if any(name.startswith(b"GNU.sparse") for name in known):
                    raise ScanError(scan.where, "sparse; write the tar again without", byte=at)
                if kind == b"x":
                    long_name = known.get(b"path", long_name)
                    long_size = int(known[b"size"]) if b"size" in known else long_size
            continue
        raw = long_name if long_name is not None else short_name(block)
        try:
            name = raw.decode()
        except UnicodeDecodeError as err:
            raise ScanError(scan.where, f"a name that is not UTF-8: {raw!r}", byte=at) from err
        if kind in b"SMV":
            what = "sparse" if kind == b"S" else "part of a tar in several volumes"
            raise ScanError(scan.where, f"{what}; write the tar again", byte=at, member=name)
        is_file = kind in b"07\0" and not (kind == b"\0" and name.endswith("/"))
        size = long_size if long_size is not None else size
        if kind in b"123456":  # links, devices, folders: what their size says is not there
            size = 0
        if scan.position + size > scan.size:
            what = f"cut short: {size:,} bytes of data, {scan.size - scan.position:,} are there"
            raise ScanError(scan.where, what, byte=at, member=name)
        return FoundMember(name=name, start=start, offset=scan.position, size=size, is_file=is_file)


def padding(size: int) -> int:
    """Bytes between the end of a member's data and the next header."""
    return -size % BLOCK


def _extended(scan: TarScan, size: int, *, at: int) -> bytes:
    if size > _MOST_HEADER_BYTES:
        raise ScanError(scan.where, f"an extended header of {size:,} bytes", byte=at)
    text = bytes(scan.read(size))
    scan.skip_to(scan.position + padding(size))
    if len(text) < size:
        raise ScanError(scan.where, "cut short inside an extended header", byte=at)
    return text
