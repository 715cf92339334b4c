"""Many LIST streams see every key once, whatever the keys are called and however they are timed."""

import random
import string
import threading
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import pyarrow as pa
import pytest

from shards.errors import UnreachableError
from shards.keyspace import Order, OutOfOrder, borders, list_ranges
from shards.objects import LISTING
from shards.store import Store, open_store


class PagedStore:
    """Keys in memory, listed in pages as S3 does, each page after `wait_s`."""

    def __init__(
        self, keys: Sequence[str], *, page: int, order: Order = "bytes", wait_s: float = 0
    ) -> None:
        self._compare: Callable[[str], str] = (
            (lambda key: key.replace("/", "\0")) if order == "folders" else lambda key: key
        )
        self.keys = sorted(keys, key=self._compare)
        self.page, self.wait_s = page, wait_s
        self.fail_at: int | None = None
        self.pages = 0
        self.pages_of: Counter[int] = Counter()
        self._count = threading.Lock()

    def list(
        self, prefix: str = "", *, start_after: str | None = None, delimiter: bool = False
    ) -> Iterator[pa.RecordBatch]:
        assert not delimiter
        begin = bisect_right(self.keys, self._compare(start_after or ""), key=self._compare)
        keys = self.keys[begin:]
        if prefix:
            keys = [key for key in keys if key.startswith(f"{prefix}/")]
        for begin in range(0, max(len(keys), 1), self.page):
            time.sleep(self.wait_s)
            with self._count:
                self.pages += 1
                self.pages_of[threading.get_ident()] += 1
                if self.fail_at is not None and self.pages >= self.fail_at:
                    raise UnreachableError("s3://paged: no usable answer")
            found = keys[begin : begin + self.page]
            if found:
                yield rows(found)


def rows(keys: Sequence[str]) -> pa.RecordBatch:
    """A page as obstore shows it: a marker of a folder loses its slash."""
    return pa.RecordBatch.from_pylist(
        [
            {"path": key.removesuffix("/"), "size": 0 if key.endswith("/") else 1, "etag": "e"}
            for key in keys
        ],
        schema=LISTING,
    )


def listed(store: PagedStore, prefix: str = "", **kwargs: Any) -> list[str]:
    found: list[pa.RecordBatch] = []
    list_ranges(cast(Store, store), prefix, found.append, **kwargs)
    return [path for page in found for path in page.column("path").to_pylist()]


def key_spaces(seed: int) -> dict[str, list[str]]:
    draw = random.Random(seed)
    words = lambda letters, longest: "".join(  # noqa: E731
        draw.choice(letters) for _ in range(draw.randint(1, longest))
    )
    spaces = {
        "digits": [f"{number:09d}" for number in range(0, 30_000, 11)],
        "variable digits": [str(number) for number in range(3_000)],
        "long prefix": [f"{'deep/' * 20}image-{number:08d}.jpg" for number in range(3_000)],
        "folders": [f"train/n{c:08d}/n{c:08d}_{i}.JPEG" for c in range(60) for i in range(50)],
        "one huge folder": ["a/1", "zz/9", *(f"b/x/{n:06d}" for n in range(3_000))],
        "hex": [f"{draw.getrandbits(128):032x}" for _ in range(3_000)],
        "two letters": [words("ab", 14) for _ in range(2_000)],
        "near slash": [words("a-/.0", 8).strip("/") for _ in range(3_000)],
        "unicode": [words("aé一二三\U0001f600z~\U0010fffd", 6) for _ in range(3_000)],
        "printable": [words(string.printable[:94].replace("/", ""), 5) for _ in range(3_000)],
        "tildes": ["~" * number for number in range(1, 300)],
        "one": ["only"],
        "none": [],
    }
    clean = {}
    for name, keys in spaces.items():
        good = {k for k in keys if not any(part in ("", ".", "..") for part in k.split("/"))}
        clean[name] = sorted(good)
    return clean


@pytest.mark.timeout(60)
@pytest.mark.parametrize("order", ["bytes", "folders"])
@pytest.mark.parametrize("name", list(key_spaces(0)))
def test_every_key_is_listed_once(name: str, order: Order) -> None:
    for seed, page in enumerate([1, 7, 100]):
        keys = key_spaces(seed)[name][:: 20 if page == 1 else 1]
        store = PagedStore(keys, page=page, order=order)

        found = listed(store, order=order, streams=1 + 5 * seed)

        assert sorted(found) == keys


@pytest.mark.timeout(60)
def test_keys_at_the_borders_themselves_are_listed_once() -> None:
    keys = [f"{number:04d}" for number in range(800)]
    keys += [f"{key}~" for key in keys] + [f"{key}~~" for key in keys]

    for streams in range(1, 9):
        store = PagedStore(keys, page=5)
        assert sorted(listed(store, streams=streams)) == sorted(keys)


@pytest.mark.timeout(60)
def test_a_prefix_is_a_folder_and_paths_stay_whole() -> None:
    keys = [f"{top}/{number:05d}" for top in ("a", "ab", "b") for number in range(1_000)]

    found = listed(PagedStore(keys, page=20), "a")

    assert sorted(found) == [f"a/{number:05d}" for number in range(1_000)]


@pytest.mark.timeout(60)
def test_markers_of_folders_are_listed_alike_whatever_the_borders_are() -> None:
    keys = ["a-/", "a/", "b!c", "b-d", "b/", "c/", "c/x", "d", "d/", *(f"e{n}" for n in range(200))]

    found = {
        tuple(sorted(listed(PagedStore(keys, page=page), streams=streams)))
        for page in (1, 2, 3, 50)
        for streams in (1, 2, 7)
    }

    assert len(found) == 1
    # Left out: a/, which comes as a behind a-; b/, behind b-d; and d/, as the object d is there.
    assert found.pop()[:6] == ("a-", "b!c", "b-d", "c", "c/x", "d")


@pytest.mark.timeout(60)
@pytest.mark.parametrize("seed", range(8))
def test_a_server_with_another_order_is_found_out(seed: int) -> None:
    """Never does a listing end short and look whole."""
    draw = random.Random(seed)
    keys = [f"{draw.choice('ab')}{draw.choice('/-.')}{number:05d}" for number in range(2_000)]
    store = PagedStore(keys, page=draw.choice([3, 30, 300]), order="folders")

    with pytest.raises(OutOfOrder):
        listed(store, order="bytes", streams=draw.choice([1, 4, 16]))


@pytest.mark.timeout(60)
@pytest.mark.parametrize("seed", range(10))
def test_a_border_that_another_order_would_put_elsewhere_is_found_out(seed: int) -> None:
    """3/x comes before 3-000, so a stream up to 3-100 meets it first, and would stop."""
    keys = [f"{first}-{number:03d}" for first in range(10) for number in range(200)]
    keys += ["3/x", "7/x"]
    draw = random.Random(seed)
    store = PagedStore(keys, page=draw.choice([10, 20]), order="folders", wait_s=0.001)

    with pytest.raises(OutOfOrder):
        listed(store, streams=draw.choice([4, 8, 16]))


@pytest.mark.timeout(60)
def test_the_first_error_ends_all_streams() -> None:
    store = PagedStore([f"{number:06d}" for number in range(20_000)], page=10)
    store.fail_at = 40

    with pytest.raises(UnreachableError, match="no usable answer"):
        listed(store, streams=8)
    assert store.pages < 100


@pytest.mark.timeout(60)
def test_an_error_of_the_reader_ends_all_streams() -> None:
    def write(_: pa.RecordBatch) -> None:
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        list_ranges(cast(Store, PagedStore(list(map(str, range(5_000))), page=10)), "", write)


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    "name", ["digits", "variable digits", "long prefix", "folders", "one huge folder", "hex"]
)
def test_the_streams_share_the_work_and_ask_little_more(name: str) -> None:
    keys = key_spaces(0)[name]
    store = PagedStore(keys, page=len(keys) // 150, wait_s=0.01)

    found = listed(store, streams=8)

    assert sorted(found) == keys
    # One stream would take 150 pages, one after the other.
    assert max(store.pages_of.values()) < 75
    assert store.pages < 3 * 150


def test_memory_store_is_listed_in_ranges() -> None:
    store = open_store("memory://keyspace-ranges")
    keys = [f"f{number % 7}/{number:04d}" for number in range(300)]
    for key in keys:
        store.put(key, b"x")
    found: list[pa.RecordBatch] = []

    list_ranges(store, "", found.append, streams=4)

    assert sorted(p for page in found for p in page.column("path").to_pylist()) == sorted(keys)


@pytest.mark.parametrize("climb", [True, False])
def test_borders_lie_strictly_inside(climb: bool) -> None:
    draw = random.Random(7)
    for _ in range(3_000):
        first, at, end = sorted("".join(draw.choices("ab/0.é~", k=6)) for _ in range(3))
        if at == end:
            continue
        upper = draw.choice([end, None])

        cuts = borders(first, at, upper, [first, at], 9, climb=climb)

        assert cuts == sorted(set(cuts))
        assert all(at < cut and (upper is None or cut < upper) for cut in cuts)
        assert len(cuts) <= 9
