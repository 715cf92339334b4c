"""Bad samples: recognise them, choose substitutes, write them down, stop past the budget."""

import logging
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import simplejpeg
from numpy.typing import NDArray

from pipelines.errors import BadDataError
from pipelines.hashing import hash_words
from pipelines.headers import HEADER_BYTES, look

logger = logging.getLogger(__name__)

ALLOWED_BAD = 16
"""Bad samples that any budget allows: a rate says nothing before there are some hundred samples."""
_SUBSTITUTES = 5  # what the hash is for; see order.py and views.py for the others
_FIRST_TRANSPOSED = 5  # EXIF orientations from here on swap width and height


@dataclass(frozen=True, kw_only=True, slots=True)
class BadSample:
    """One sample that could not be used, and why."""

    shard: str
    """URI of the tar."""
    key: str | None
    """Sample key, read from the tar's header; None if that is damaged too."""
    sample_id: int
    position: int
    """Global position at which it was to be served."""
    reason: str


class Quarantine:
    """What was bad so far in this process, against the budget. Safe to use from many threads.

    The budget is one for all ranks, and the trainer keeps it, at a step that all of them agree on.
    What ends one rank alone is more than all of them together may have.
    """

    def __init__(self, *, max_bad_frac: float, world_size: int) -> None:
        self._max_bad_frac = max_bad_frac
        self._world_size = world_size
        self._records: list[BadSample] = []
        self._seen = 0
        self._lock = threading.Lock()

    def seen(self, samples: int) -> None:
        """Count samples, good and bad, that the budget is a part of."""
        with self._lock:
            self._seen += samples

    def add(self, bad: BadSample) -> None:
        """Write one down.

        Raises:
            BadDataError: that was one too many.
        """
        logger.warning(
            "bad sample %s (id %d) in %s: %s", bad.key or "?", bad.sample_id, bad.shard, bad.reason
        )
        with self._lock:
            self._records.append(bad)
            count, seen = len(self._records), self._seen * self._world_size
            allowed = self._max_bad_frac * seen
        if count > max(ALLOWED_BAD, allowed):
            raise BadDataError(
                f"{count} of {seen} samples were bad, more than data.max_bad_frac "
                f"{self._max_bad_frac} allows; the last in {bad.shard}: {bad.reason}; "
                "run 'moco-scale verify' on the shard set"
            )

    def records(self) -> list[BadSample]:
        with self._lock:
            return list(self._records)


def candidates(
    position: int,
    shard: int,
    member: int,
    *,
    shard_samples: NDArray[np.int64],
    block: int,
    seed: int,
) -> Iterator[tuple[int, int]]:
    """Substitutes for a sample, as shard and position in it, best first.

    The others of its block, which is in memory; then those of one block of each following shard, or
    of the following blocks of an only shard. A function of the position alone, so that every world
    size takes the same one.
    """
    number = member // block
    num_shards = len(shard_samples)
    distances = max(num_shards, -(-int(shard_samples[shard]) // block) if num_shards == 1 else 1)
    for distance in range(distances):
        here = (shard + distance) % num_shards
        samples = int(shard_samples[here])
        if not samples:
            continue
        first = (number + distance) % -(-samples // block) * block
        others = np.arange(first, min(first + block, samples))
        if not distance:
            others = others[others != member]
        if len(others):
            keys = hash_words(seed, _SUBSTITUTES, position, distance, others)
            for one in others[np.argsort(keys, kind="stable")].tolist():
                yield here, one


def damage(
    data: NDArray[np.uint8], width: int, height: int, orientation: int, *, max_pixels: int
) -> str | None:
    """What is wrong with an encoded image, by a look of microseconds; None if it looks sound.

    A crop is drawn for the index's width and height, so an image of another size is bad: DALI
    would not fail on it but smear its edge. And a header that promises more pixels than the index
    never reaches a decoder.

    Args:
        width, height: of the upright image, by the index.
        orientation: EXIF, 1 to 8.
    """
    if width * height > max_pixels:
        return f"{width} x {height} pixels, more than data.max_pixels {max_pixels:,}"
    if orientation >= _FIRST_TRANSPOSED:
        width, height = height, width
    if len(data) > 1 and data[0] == 0xFF and data[1] == 0xD8:
        if (data[-1] != 0xD9 or data[-2] != 0xFF) and data.tobytes().rfind(b"\xff\xd9") < 0:
            return "JPEG without an end"
        try:
            found_height, found_width, *_ = simplejpeg.decode_jpeg_header(data)
        except ValueError:
            return "JPEG with a damaged header"
    elif data[:8].tobytes() == b"\x89PNG\r\n\x1a\n":
        if b"IEND" not in data[-4096:].tobytes():
            return "PNG without an end"
        found_width = int.from_bytes(data[16:20].tobytes(), "big")
        found_height = int.from_bytes(data[20:24].tobytes(), "big")
    else:
        size = look(data[:HEADER_BYTES].tobytes(), size=len(data))
        if isinstance(size, str):
            return size
        found_width, found_height = size
    if (found_width, found_height) != (width, height):
        return f"is {found_width} x {found_height} pixels, but the index says {width} x {height}"
    return None
