"""Every object of a bucket by many LIST streams at once, each over its own range of keys.

A range is (after, end]: its stream starts behind `after` and stops at the first key past `end`, so
any string may be the border of two ranges and no key is lost or listed twice. Whenever a stream is
idle, what is left of the longest range is cut into as many parts, at borders guessed from the keys
seen. A wrong guess costs one request.
"""

import bisect
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import Literal

import pyarrow as pa

from shards.store import Store

STREAMS = 32
Order = Literal["bytes", "folders"]
"""How a server sorts: by the bytes of the key, as S3 does, or by the parts between slashes, as
servers over a file system do (SeaweedFS): a/c before a-b."""

_SAMPLE = 32  # keys of a page that guesses are made from
_DIGITS = 8  # characters of a border after what both ends of its range share
_CLASSES = ("0123456789", "abcdefghijklmnopqrstuvwxyz", "ABCDEFGHIJKLMNOPQRSTUVWXYZ")
_HEX = "0123456789abcdef"


class OutOfOrder(Exception):
    """The store sorts in another way than assumed; what was listed so far may have gaps."""


def list_ranges(
    store: Store,
    prefix: str,
    write: Callable[[pa.RecordBatch], None],
    *,
    order: Order = "bytes",
    streams: int = STREAMS,
) -> int:
    """Hand every object below the folder `prefix` to `write` once; return the pages it took.

    `write` is called from several threads; pages come in no order.

    Raises:
        OutOfOrder: the store's order is not `order`.
        StoreError: of the first stream that failed.
    """
    return _Scan(store, prefix, write, order=order, streams=streams).run()


def borders(
    first: str, at: str, end: str | None, seen: Sequence[str], count: int, *, climb: bool
) -> list[str]:
    """At most `count` strings between `at` and `end`, ascending, that may cut what is left evenly.

    Args:
        first: first key of the page that ended with `at`.
        end: None if nothing is known of how far the keys go.
        seen: keys that show which characters occur.
        climb: also guess where the folders and names that `at` is in end: finds the end of
            a long common prefix in few steps.
    """
    shared = _shared(at, end) if end is not None else 0
    found: set[str] = set()
    if climb:
        depth = _shared(first, at) + 1
        levels = range(shared, min(depth, len(at)))
        for number in _spread(len(levels), -(-count // 2)):
            found.add(at[: levels[number] + 1])
    ruler = _Ruler(at[:shared], [at, *([end] if end is not None else []), *seen])
    low = ruler.value(at)
    page = max(low - ruler.value(first), 0)
    low, high = low + page, ruler.value(end) if end is not None else ruler.top
    parts = count - len(found) + 1
    found.update(ruler.key(low + (high - low) * part // parts) for part in range(1, parts))
    # Not a name itself: start-after the name of a folder hides the folder on some servers.
    ends = sorted(f"{key}~" for key in found)
    return [key for key in ends if at < key and (end is None or key < end) and _is_path(key)]


class _Ruler:
    """Keys below a prefix as numbers, by the characters that occur at each place."""

    def __init__(self, prefix: str, seen: Sequence[str]) -> None:
        self._prefix = prefix
        begin = len(prefix)
        tails = [key[begin : begin + _DIGITS] for key in seen if key.startswith(prefix)]
        anywhere = _alphabet(chain.from_iterable(seen))
        self._alphabets = [
            _alphabet(tail[place] for tail in tails if place < len(tail)) or anywhere
            for place in range(_DIGITS)
        ]
        self.top = 1
        for letters in self._alphabets:
            self.top *= len(letters) + 1

    def value(self, key: str) -> int:
        value = 0
        tail = key[len(self._prefix) :]
        for place, letters in enumerate(self._alphabets):
            digit = bisect.bisect_left(letters, tail[place]) + 1 if place < len(tail) else 0
            value = value * (len(letters) + 1) + min(digit, len(letters))
        return value

    def key(self, value: int) -> str:
        tail: list[str] = []
        for letters in reversed(self._alphabets):
            value, digit = divmod(value, len(letters) + 1)
            if digit == 0:
                tail.clear()
            else:
                tail.append(letters[digit - 1])
        return self._prefix + "".join(reversed(tail))


class _Range:
    """(after, end] and how far its stream has come; keys as the order compares them."""

    def __init__(self, after: str, end: str | None) -> None:
        self.after = after
        self.end = end
        self.at = after
        self.page: list[str] = []
        self.is_new = False  # has keys that no guess was made from
        self.is_hollow = False  # the range behind it was empty
        self.rows = 0

    def left(self) -> float:
        """Pages left, by a rough guess."""
        if self.end is None:
            return float("inf")
        shared = self.at[: _shared(self.at, self.end)]
        ruler = _Ruler(shared, [*self.page, self.end])
        done = max(ruler.value(self.at) - ruler.value(self.page[0]), 1)
        return (ruler.value(self.end) - ruler.value(self.at)) / done


class _Scan:
    def __init__(
        self,
        store: Store,
        prefix: str,
        write: Callable[[pa.RecordBatch], None],
        *,
        order: Order,
        streams: int,
    ) -> None:
        self._store, self._prefix, self._write = store, prefix, write
        self._order, self._streams = order, streams
        self._state = threading.Condition()
        self._waiting = [_Range("", None)]
        self._active: list[_Range] = []
        self._failed: BaseException | None = None
        self._pages = 0
        # What the range before a border saw behind it, and what the range after it saw first.
        self._last: dict[str, str | None] = {}
        self._first: dict[str, str | None] = {}

    def run(self) -> int:
        with ThreadPoolExecutor(self._streams, thread_name_prefix="list") as threads:
            try:
                for done in [threads.submit(self._work) for _ in range(self._streams)]:
                    done.result()
            except BaseException as err:  # interrupted: let the streams end with their page
                self._fail(err)
                raise
        if self._failed is not None:
            raise self._failed
        return self._pages

    def _work(self) -> None:
        try:
            while (part := self._next()) is not None:
                self._read(part)
        except BaseException as err:
            self._fail(err)

    def _fail(self, err: BaseException) -> None:
        with self._state:
            self._failed = self._failed or err
            self._state.notify_all()

    def _next(self) -> _Range | None:
        with self._state:
            while self._failed is None:
                if self._waiting:
                    self._active.append(self._waiting.pop())
                    return self._active[-1]
                if not self._active:
                    self._state.notify_all()
                    return None
                if not self._split():
                    self._state.wait(1)
            return None

    def _split(self) -> bool:
        """Cut the longest range that has news, for all idle streams at once."""
        idle = self._streams - len(self._active)
        for part in sorted(
            (part for part in self._active if part.is_new), key=_Range.left, reverse=True
        ):
            part.is_new = False
            climb = part.end is None or part.is_hollow
            cuts = borders(part.page[0], part.at, part.end, part.page, idle, climb=climb)
            if not cuts:
                continue
            ends = [*cuts[1:], part.end]
            self._waiting += [_Range(*pair) for pair in zip(cuts, ends, strict=True)][::-1]
            part.end = cuts[0]
            part.is_hollow = False
            self._state.notify_all()
            return True
        return False

    def _read(self, part: _Range) -> None:
        pages = self._store.list(self._prefix, start_after=self._path(part.after) or None)
        beyond: str | None = None
        begun = False
        for page in pages:
            paths = page.column("path").to_pylist()
            keys = [path.replace("/", "\0") for path in paths] if self._folders else paths
            sizes = page.column("size").to_numpy(zero_copy_only=False)
            with self._state:
                if self._failed is not None:
                    return
                self._pages += 1
                kept, beyond = self._within(part, keys, sizes)
                if not begun and (kept or beyond is not None):
                    begun = True
                    self._meet(self._first, part.after, keys[kept[0]] if kept else beyond)
                if kept:
                    step = max(len(kept) // _SAMPLE, 1)
                    part.page = [keys[row] for row in kept[::step]]
                    part.at, part.is_new = keys[kept[-1]], beyond is None
                    part.rows += len(kept)
                    self._state.notify()
            if len(kept) == len(page):
                self._write(page)
            elif kept:
                self._write(page.take(pa.array(kept)))
            if beyond is not None:
                break
        with self._state:
            self._active.remove(part)
            if not begun:
                self._pages += 1
                self._meet(self._first, part.after, None)
            if part.end is not None:
                self._meet(self._last, part.end, beyond)
            if not part.rows:
                for other in self._active:
                    other.is_hollow |= other.end == part.after
            self._state.notify_all()

    @property
    def _folders(self) -> bool:
        return self._order == "folders"

    def _path(self, key: str) -> str:
        return key.replace("\0", "/")

    def _within(
        self, part: _Range, keys: list[str], sizes: Sequence[int]
    ) -> tuple[list[int], str | None]:
        """Rows of a page that are in the range, and the first key past its end."""
        kept: list[int] = []
        at, end = part.at, part.end
        for row, key in enumerate(keys):
            if key <= at:
                if key == at:
                    continue
                # A key that ends with a slash, an empty marker of a folder, is listed without it:
                # it comes later than its name says. It is left out, whatever the borders are.
                if sizes[row] == 0 and key + "/" > at:
                    continue
                raise OutOfOrder(f"{self._path(key)!r} came after {self._path(at)!r}")
            if end is not None and key > end:
                return kept, key
            kept.append(row)
            at = key
        return kept, None

    def _meet(self, side: dict[str, str | None], border: str, key: str | None) -> None:
        """Both neighbours of a border must have seen the same key behind it."""
        side[border] = key
        if border not in self._last or border not in self._first:
            return
        pair = (self._last.pop(border), self._first.pop(border))
        # A bucket that changes while it is listed differs too. What tells another order is a key
        # that the two orders put on different sides of the border.
        if pair[0] != pair[1] and any(key and _is_ambiguous(key, border) for key in pair):
            raise OutOfOrder(f"streams disagree about what follows {self._path(border)!r}")


def _is_ambiguous(key: str, border: str) -> bool:
    place = _shared(key, border)
    pair = {key[place : place + 1].replace("\0", "/"), border[place : place + 1].replace("\0", "/")}
    return "/" in pair and any("" < letter < "/" for letter in pair)


def _is_path(key: str) -> bool:
    return not any(part in ("", ".", "..") for part in key.replace("\0", "/").split("/"))


def _shared(one: str, other: str) -> int:
    """How many characters two strings begin with in common."""
    for place, (mine, its) in enumerate(zip(one, other, strict=False)):
        if mine != its:
            return place
    return min(len(one), len(other))


def _alphabet(letters: Iterable[str]) -> list[str]:
    """Sorted characters: those seen, with the rest of the digits or letters they belong to."""
    seen = set(letters)
    if seen and seen <= set(_HEX) and not seen <= set(_HEX[10:]):
        return list(_HEX if not seen <= set(_HEX[:10]) else _HEX[:10])
    for group in _CLASSES:
        if seen & set(group):
            seen |= set(group)
    return sorted(seen)


def _spread(length: int, count: int) -> list[int]:
    """At most `count` of range(length), evenly, the first among them."""
    return sorted({number * length // count for number in range(count)}) if length else []
