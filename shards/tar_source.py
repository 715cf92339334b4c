"""Tars as a source: each image in them is a row, with the text beside it as the user's columns."""

import logging
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa

from shards.catalog import CATALOG, rows_of
from shards.errors import SourceError
from shards.images import sniff
from shards.objects import ObjectInfo
from shards.places import Place, Stores, file_of, pinned
from shards.store import Store
from shards.tar import FoundMember, HeaderWindow, read_members

logger = logging.getLogger(__name__)

TEXTS = ("txt", "json", "cls", "caption", "label")
"""Extensions of text that belongs to the image of the same key."""

_IMAGES = {"jpg", "jpeg", "jpe", "jfif", "png", "webp", "gif", "bmp", "dib", "tif", "tiff", "jp2",
           "j2k", "pnm", "ppm", "pgm", "pbm", "avif", "heic", "heif", "ico", "svg"}  # fmt: skip
_MOST_TEXT = 64 << 10
_MOST_OF_A_KEY = 10_000
_ROWS = 10_000
_THREADS = 8
_HEAD = 32
_MOST_TARS = 10_000_000


def is_tar(source: str) -> bool:
    return source.endswith(".tar")


def read_tars(source: str, stores: Stores, write: Callable[[pa.RecordBatch], None]) -> int:
    """Hand a row for each image of a tar, or of all tars of a pattern, to `write`.

    A member is an image by its extension; any other that is no text, by its first bytes. Only
    headers, those bytes and the texts are used. Returns the LIST requests it took.

    Raises:
        SourceError: no tar matches the pattern.
        FormatError: a tar that cannot be read; names the tar, the member and the byte.
    """
    requests = 0
    tars: list[Place] = []
    for name in _braces(source):
        if re.search(r"[*?]", name):
            found, pages = _matches(name, stores)
            tars += found
            requests += pages
        else:
            tars.append(file_of(name))
    if not tars:
        raise SourceError(f"{source}: no tar has such a name; check the pattern")
    opened = [(stores.open(tar.root), tar) for tar in tars]
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="tar") as threads:
        jobs = [threads.submit(_read_tar, store, tar, write) for store, tar in opened]
        try:
            for job in jobs:
                job.result()
        finally:
            for job in jobs:
                job.cancel()
    return requests


def _read_tar(store: Store, tar: Place, write: Callable[[pa.RecordBatch], None]) -> None:
    info = store.head(tar.path)

    def read(start: int, end: int) -> memoryview:
        (found,) = store.read_ranges(tar.path, [start], [end], if_match=pinned(info.etag))
        return memoryview(found)

    window = HeaderWindow(read, info.size)
    rows: list[tuple[FoundMember, dict[str, str]]] = []
    for images, texts in _samples(window, info.size, store.uri(tar.path)):
        rows += [(image, texts) for image in images]
        if len(rows) >= _ROWS:
            write(_batch(tar, info, rows))
            rows = []
    if rows:
        write(_batch(tar, info, rows))


def _samples(
    window: HeaderWindow, size: int, where: str
) -> Iterator[tuple[list[FoundMember], dict[str, str]]]:
    """Images that follow one another with one key, and the texts among them by extension."""
    images: list[FoundMember] = []
    texts: dict[str, str] = {}
    current: str | None = None
    for member in read_members(window, size, where=where):
        folder, slash, name = member.name.rpartition("/")
        stem, _, extension = name.partition(".")
        key, extension = folder + slash + stem, extension.lower()
        if key != current or len(images) >= _MOST_OF_A_KEY:
            if images:
                yield images, texts
            images, texts, current = [], {}, key
        kind = extension.rpartition(".")[2]
        if kind in TEXTS:
            if member.size > _MOST_TEXT:
                logger.warning("%s: %r is longer than 64 KiB; left out", where, member.name)
                continue
            data = bytes(window(member.start, member.start + member.size))
            texts[extension] = data.decode("utf-8", "backslashreplace")
        elif kind in _IMAGES or _looks_like_an_image(window, member):
            images.append(member)
    if images:
        yield images, texts


def _looks_like_an_image(window: HeaderWindow, member: FoundMember) -> bool:
    head = window(member.start, member.start + min(member.size, _HEAD))
    return sniff(bytes(head)) is not None


def _batch(
    tar: Place, info: ObjectInfo, rows: list[tuple[FoundMember, dict[str, str]]]
) -> pa.RecordBatch:
    own = {
        name: pa.array([texts.get(name) for _, texts in rows], pa.string())
        for name in sorted({name for _, texts in rows for name in texts})
    }
    images = [image for image, _ in rows]
    return rows_of(
        tar.root,
        pa.repeat(pa.scalar(tar.path, pa.string()), len(rows)),
        own=own,
        member=pa.array([image.name for image in images], pa.string()),
        start=pa.array([image.start for image in images], pa.int64()),
        size=pa.array([image.size for image in images], pa.int64()),
        etag=pa.repeat(pa.scalar(info.etag or None, pa.string()), len(rows)),
        modified=pa.repeat(pa.scalar(info.modified, CATALOG.field("modified").type), len(rows)),
    )


def _braces(source: str) -> Iterator[str]:
    """{000000..000099} and {a,b} written out, as webdataset and shells do."""
    found = re.search(r"\{([^{}]*)\}", source)
    if found is None:
        yield source
        return
    span = re.fullmatch(r"(\d+)\.\.(\d+)", found[1])
    if span:
        first, last = span.groups()
        if int(last) < int(first) or int(last) - int(first) >= _MOST_TARS:
            raise SourceError(f"{source}: {found[0]} is no range that goes up, or too long a one")
        width = len(first) if first.startswith("0") else 0
        choices: Iterable[str] = (
            str(number).zfill(width) for number in range(int(first), int(last) + 1)
        )
    else:
        choices = found[1].split(",")
    for choice in choices:
        yield from _braces(source[: found.start()] + choice + source[found.end() :])


def _matches(pattern: str, stores: Stores) -> tuple[list[Place], int]:
    """Tars whose whole address fits; a star stands for anything between two slashes."""
    fixed = re.split(r"[*?]", pattern, maxsplit=1)[0].rpartition("/")[0]
    rest = pattern[len(fixed) :].lstrip("/")
    root, inside = file_of(f"{fixed}/_" if fixed or pattern.startswith("/") else "_")
    folder = inside.removesuffix("_")
    signs = {"*": "[^/]*", "?": "[^/]"}
    fits = "".join(signs.get(letter, re.escape(letter)) for letter in folder + rest)
    found, pages = [], 0
    for page in stores.open(root).list(folder.rstrip("/")):
        pages += 1
        paths = page.column("path").to_pylist()
        found += [Place(root, path) for path in paths if re.fullmatch(fits, path, re.DOTALL)]
    return found, max(pages, 1) if "://" in root else 0
