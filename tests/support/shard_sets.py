"""Small real shard sets on disk, and ways to damage them."""

import io
import random
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from numpy.typing import NDArray
from PIL import Image

from shards import PackConfig, ShardSet, pack
from shards.errors import UnreachableError
from shards.objects import Allocate, allocated


def picture(
    number: int, *, format: str = "JPEG", orientation: int = 1, gray: bool = False
) -> bytes:
    """An encoded image of some 80 x 100 pixels, another for each number."""
    rng = np.random.default_rng(number)
    width, height = (int(side) for side in rng.integers(60, 120, size=2))
    coarse = rng.integers(0, 256, size=(6, 8, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    if gray:
        image = image.convert("L")
    exif = Image.Exif()
    exif[0x0112] = orientation
    written = io.BytesIO()
    image.save(written, format, exif=exif)
    return written.getvalue()


def make_shard_set(folder: Path, *, count: int, shard_samples: int) -> ShardSet:
    """`count` images, a seventh of them PNG and some with an EXIF orientation, in shards."""
    bucket = folder / "bucket"
    bucket.mkdir(parents=True)
    for number in range(count):
        name, format = (
            (f"{number:04}.png", "PNG") if number % 7 == 3 else (f"{number:04}.jpg", "JPEG")
        )
        turned = 1 + number % 8 if number % 5 == 0 else 1
        (bucket / name).write_bytes(picture(number, format=format, orientation=turned))
    pack(
        str(bucket),
        str(folder / "set"),
        PackConfig(workers=1, max_shard_samples=shard_samples),
    )
    return ShardSet.open(str(folder / "set"))


def locate(shard_set: ShardSet, sample_id: int) -> tuple[int, int]:
    """Shard, and position in it."""
    shard = int(np.searchsorted(shard_set.first_ordinal, sample_id, side="right")) - 1
    return shard, sample_id - int(shard_set.first_ordinal[shard])


def stored(shard_set: ShardSet, sample_id: int) -> bytes:
    """A sample's bytes as they lie in the tar."""
    shard, member = locate(shard_set, sample_id)
    index = shard_set.index(shard)
    start = int(index.offset[member])
    tar = Path(shard_set.url, shard_set.names[shard]).read_bytes()
    return tar[start : start + int(index.length[member])]


def overwrite(
    shard_set: ShardSet, sample_id: int, data: bytes, *, fix_checksum: bool = False
) -> ShardSet:
    """Put other bytes of the same length in a sample's place; the set opened again."""
    shard, member = locate(shard_set, sample_id)
    start = int(shard_set.index(shard).offset[member])
    assert len(data) == int(shard_set.index(shard).length[member])
    path = Path(shard_set.url, shard_set.names[shard])
    tar = bytearray(path.read_bytes())
    tar[start : start + len(data)] = data
    path.write_bytes(tar)
    if fix_checksum:
        number = path.name.partition("-")[0]
        (index,) = Path(shard_set.url, "index").glob(f"{number}-*.parquet")
        table = pq.read_table(index)
        sums: NDArray[np.uint64] = table.column("checksum").to_numpy().copy()
        sums[member] = xxhash.xxh3_64_intdigest(data)
        place = table.schema.get_field_index("checksum")
        pq.write_table(table.set_column(place, table.schema.field(place), pa.array(sums)), index)
    return ShardSet.open(shard_set.url)


def flip_a_byte(data: bytes) -> bytes:
    """The same image with one byte in its middle changed."""
    changed = bytearray(data)
    changed[len(changed) // 2] ^= 0xFF
    return bytes(changed)


def undecodable(shard_set: ShardSet, sample_id: int) -> bytes:
    """A PNG of the sample's size and length whose frame is sound and whose pixels are not."""
    data = bytearray(stored(shard_set, sample_id))
    assert data.startswith(b"\x89PNG"), "choose a PNG"
    middle = len(data) // 2
    data[middle - 40 : middle + 40] = bytes(80)
    return bytes(data)


class FaultyStore:
    """A store that counts, delays, damages or refuses range reads before the real one answers."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.url = inner.url
        self.requests: list[tuple[str, int, int]] = []
        self.hold = threading.Event()
        """Reads wait until it is set."""
        self.hold.set()
        self.asked = threading.Event()
        """Set by the first read."""
        self.refuse_after: int | None = None
        """Number of reads that succeed before all others fail."""
        self.flip_first_answers = False
        """Whether the first answer that holds a range has a byte changed."""
        self.longest_wait_s = 0.0
        """Answers wait at random, for up to so long."""
        self.whole_reads: list[tuple[str, str]] = []
        """Path, and name of the thread, of the objects that were read whole: indexes."""

    def uri(self, path: str) -> str:
        return str(self.inner.uri(path))

    def stats(self) -> Any:
        return self.inner.stats()

    def head(self, path: str) -> Any:
        return self.inner.head(path)

    def read(self, path: str, *, if_match: str | None = None) -> Any:
        self.whole_reads.append((path, threading.current_thread().name))
        return self.inner.read(path, if_match=if_match)

    def read_ranges(
        self,
        path: str,
        starts: Sequence[int],
        ends: Sequence[int],
        *,
        if_match: str | None = None,
        allocate: Allocate = allocated,
    ) -> Any:
        self.asked.set()
        assert self.hold.wait(60), "a test forgot to let reads go on"
        (wanted,) = [(path, s, e) for s, e in zip(starts, ends, strict=True)]
        if self.longest_wait_s:
            time.sleep(random.uniform(0, self.longest_wait_s))
        known = any(path == p and s <= wanted[1] and wanted[2] <= e for p, s, e in self.requests)
        self.requests.append(wanted)
        if self.refuse_after is not None and len(self.requests) > self.refuse_after:
            raise UnreachableError(f"{self.uri(path)}: no usable answer from the store (test)")
        found = self.inner.read_ranges(path, starts, ends, if_match=if_match, allocate=allocate)
        if self.flip_first_answers and not known:
            return [flip_a_byte(bytes(one)) for one in found]
        return found
