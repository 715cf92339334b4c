"""Where things are: addresses of objects as (root, path), and stores opened once each."""

import io
import os
import posixpath
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote_to_bytes

from shards.errors import ChangedError
from shards.objects import ObjectInfo
from shards.store import Store, open_store, refuse_secrets

HOSTED = ("s3", "gs", "az", "http", "https")
"""Schemes whose root is scheme://host, so that it does not matter which prefix was named."""

_WINDOW = 8 << 20


class Place(NamedTuple):
    """An object: what `open_store` opens, and the path below it."""

    root: str
    path: str


def folder_of(source: str) -> Place:
    """A bucket, prefix, folder or container; the path is empty where the root is all of it."""
    scheme, separator, _ = source.partition("://")
    if separator and scheme not in (*HOSTED, "file"):
        return Place(source.rstrip("/"), "")
    root, path = _split(source)
    return Place(root, path.strip("/"))


def file_of(source: str) -> Place:
    """One object that was named in full, or a folder above some."""
    root, path = _split(source)
    if path:
        return Place(root, path)
    root, _, path = root.rpartition("/")
    return Place(root or "/", path)


def _split(source: str) -> Place:
    refuse_secrets(source)
    scheme, separator, rest = source.partition("://")
    if not separator:
        return Place(str(_absolute(source)), "")
    if scheme == "file":
        return Place(str(_absolute("/" + _unquoted(rest).lstrip("/"))), "")
    host, _, path = rest.partition("/")
    return Place(f"{scheme}://{host}", path)


def place_of(uri: str, beside: Place) -> Place:
    """An address out of a list; a relative one is below the folder of the list, `beside`."""
    scheme, separator, rest = uri.partition("://")
    if separator and scheme != "file":
        return _split(uri)
    is_local = "://" not in beside.root
    if separator:
        uri = "/" + _unquoted(rest).lstrip("/")
    elif not is_local or not uri.startswith("/"):
        path = posixpath.join(posixpath.dirname(beside.path), uri.lstrip("/"))
        if {".", ".."}.isdisjoint(path.split("/")):
            return Place(beside.root, path)
        if not is_local:
            return Place(beside.root, posixpath.normpath(path))
        uri = posixpath.normpath(posixpath.join(beside.root, path))
    if is_local and uri.startswith(f"{beside.root}/"):
        return Place(beside.root, uri[len(beside.root) + 1 :])
    top, _, path = uri.lstrip("/").partition("/")
    return Place(f"/{top}", path) if path else Place("/", top)


class Stores:
    """Opens each root once."""

    def __init__(self, *, requester_pays: bool) -> None:
        self._options: dict[str, Any] = {"requester_pays": True} if requester_pays else {}
        self._open: dict[str, Store] = {}

    def open(self, root: str) -> Store:
        if root not in self._open:
            self._open[root] = open_store(root, **self._options)
        return self._open[root]


class StoreFile(io.RawIOBase):
    """An object as a file to read and seek in, by range reads of 8 MiB; pinned to one ETag."""

    def __init__(self, store: Store, path: str) -> None:
        super().__init__()
        self.info: ObjectInfo = store.head(path)
        self._store, self._path = store, path
        self._at = 0
        self._window: Any = b""
        self._window_at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self.info.size}[whence]
        self._at = base + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        out = memoryview(buffer).cast("B")
        if self._at >= self.info.size or not len(out):
            return 0
        begin = self._at - self._window_at
        if not 0 <= begin < len(self._window):
            self._window_at = self._fetch()
            begin = self._at - self._window_at
        part = memoryview(self._window)[begin : begin + len(out)]
        out[: len(part)] = part
        self._at += len(part)
        return len(part)

    def _fetch(self) -> int:
        """Read on, as far as a window goes; return where it begins."""
        etag, size = pinned(self.info.etag), self.info.size
        if size <= _WINDOW:  # some web servers know no ranges
            self._window = self._store.read(self._path, if_match=etag)
            if len(self._window) != size:
                raise ChangedError(f"{self._store.uri(self._path)}: changed while it was read")
            return 0
        end = min(self._at + _WINDOW, size)
        (self._window,) = self._store.read_ranges(self._path, [self._at], [end], if_match=etag)
        return self._at


def pinned(etag: str) -> str | None:
    """An ETag to give as if_match; weak ones, which web servers make, match nothing there."""
    return etag if etag and not etag.startswith("W/") else None


def _absolute(path: str) -> Path:
    return Path(os.path.abspath(path))  # noqa: PTH100  # resolve() would follow links


def _unquoted(path: str) -> str:
    return unquote_to_bytes(path).decode("utf-8", "backslashreplace")
