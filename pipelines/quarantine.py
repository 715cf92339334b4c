"""Bad samples: recognise them, choose substitutes, write them down, stop past the budget."""

import logging
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import simplejpeg
from numpy.typing import NDArray

from pipelines.errors import BadDataError
from pipelines.hashing import hash_words

logger = logging.getLogger(__name__)

ALLOWED_BAD = 16
"""Bad samples that any budget allows: a rate says nothing before there are some hundred samples."""
_SUBSTITUTES = 5  # what the hash is for; see order.py and views.py for the others
_TRANSPOSED = frozenset((5, 6, 7, 8))  # EXIF orientations that swap width and height


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
    """What was bad so far in this process, against the budget. Safe to use from many threads."""

    def __init__(self, *, max_bad_frac: float) -> None:
        self._max_bad_frac = max_bad_frac
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
            count, allowed = len(self._records), self._max_bad_frac * self._seen
        if count > max(ALLOWED_BAD, allowed):
            raise BadDataError(
                f"{count} of {self._seen} samples were bad, more than data.max_bad_frac "
                f"{self._max_bad_frac} allows; the last in {bad.shard}: {bad.reason}; "
                "run 'moco-scale verify' on the shard set"
            )

    def records(self) -> list[BadSample]:
        with self._lock:
            return list(self._records)


def candidates(
    position: int, member: int, *, num_samples: int, block: int, seed: int
) -> Iterator[int]:
    """Substitutes for a shard's sample `member`, best first: its block's others, then next blocks'.

    A function of the position alone, so that every world size takes the same one.
    """
    num_blocks = -(-num_samples // block)
    for distance in range(num_blocks):
        first = (member // block + distance) % num_blocks * block
        others = np.arange(first, min(first + block, num_samples))
        others = others[others != member]
        if len(others):
            keys = hash_words(seed, _SUBSTITUTES, position, others)
            yield from others[np.argsort(keys, kind="stable")].tolist()


def damage(data: NDArray[np.uint8], *, width: int, height: int, orientation: int) -> str | None:
    """What is wrong with an encoded image, by a look of microseconds; None if it looks sound.

    A crop is drawn for the index's width and height, so an image of another size is bad: DALI
    would not fail on it but smear its edge.
    """
    stored = (height, width) if orientation in _TRANSPOSED else (width, height)
    head = data[:24].tobytes()
    if head[:2] == b"\xff\xd8":
        if data[-2:].tobytes() != b"\xff\xd9" and data.tobytes().rfind(b"\xff\xd9") < 0:
            return "JPEG without an end"
        found = _jpeg_size(data)
        if found is None:
            return "JPEG with a damaged header"
    elif head[:8] == b"\x89PNG\r\n\x1a\n":
        if b"IEND" not in data[-4096:].tobytes():
            return "PNG without an end"
        found = (int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big"))
    elif head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        if len(data) < 8 + int.from_bytes(head[4:8], "little"):
            return "WebP without an end"
        found = stored
    else:
        found = stored  # rare formats: the decoder decides
    if found != stored:
        return f"is {found[0]} x {found[1]} pixels, but the index says {stored[0]} x {stored[1]}"
    return None


def _jpeg_size(data: Any) -> tuple[int, int] | None:
    try:
        height, width, *_ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    return width, height
