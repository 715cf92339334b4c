"""Any fsspec file system as a `Store`: sftp, ftp, hf, github, zip and whatever else it knows."""

import contextlib
import datetime
import logging
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import pyarrow as pa
from fsspec.core import url_to_fs
from fsspec.registry import known_implementations, registry
from fsspec.spec import AbstractFileSystem

from shards.backoff import DEADLINE_S, FEW, Refusal, Requests, WrongAnswer, limiter_of
from shards.errors import (
    AccessError,
    AlreadyExistsError,
    ChangedError,
    NotFoundError,
    StoreError,
    UnreachableError,
)
from shards.folder import UNFINISHED
from shards.objects import LISTING, Allocate, Bytes, ObjectInfo, StoreStats, allocated

logger = logging.getLogger(__name__)
T = TypeVar("T")

_ROWS_PER_BATCH = 10_000
_ETAGS = ("ETag", "etag", "md5", "content_md5", "md5Hash", "checksum", "sha256", "sha", "blob_id")
_MODIFIED = ("mtime", "LastModified", "last_modified", "modified", "updated", "date_time")
_TWICE_IS_WRONG = (TypeError, AttributeError, AssertionError, NameError)


def knows(scheme: str) -> bool:
    """Whether fsspec has a file system of that name, installed or not."""
    return scheme in known_implementations or scheme in registry


class FsspecStore:
    """Files below an fsspec URL, chained ones (zip://inside::s3://bucket/x.zip) included.

    The ETag is the file system's own checksum if it has one, else made of time and size; where
    neither is known there is none, and `if_match` is not checked. A write goes beside its target
    and is moved there where the file system can move, and is one call where not. `create_only` is
    weaker than elsewhere: two processes at one moment may both win, with a whole object each.

    Most file systems are not made for threads: their calls are made one at a time.

    Raises:
        StoreError: the file system cannot be made: its package, host or archive is missing.
    """

    def __init__(self, url: str, *, deadline_s: float = DEADLINE_S) -> None:
        first, chained, rest = url.partition("::")
        self._url, self._chain = first.rstrip("/"), chained + rest
        if self._url.endswith(":"):  # the root of an archive
            self._url = first
        self.url = self._url + self._chain
        self._requests = Requests(
            limiter_of(self.url), caught=(Exception,), judge=_judge, deadline_s=deadline_s
        )
        self._fs, root = self._requests.run(self.url, lambda _: url_to_fs(self.url), right="")
        self._root = str(self._fs._strip_protocol(root)).rstrip("/")
        self._alone: contextlib.AbstractContextManager[Any] = (
            contextlib.nullcontext() if self._fs.async_impl else threading.Lock()
        )
        self._creating = threading.Lock()
        self._moves = type(self._fs).mv is not AbstractFileSystem.mv

    def uri(self, path: str) -> str:
        slash = "" if self._url.endswith("/") else "/"
        return f"{self._url}{slash}{path}{self._chain}"

    def stats(self) -> StoreStats:
        return self._requests.stats()

    def list(
        self, prefix: str = "", *, start_after: str | None = None, delimiter: bool = False
    ) -> Iterator[pa.RecordBatch]:
        prefix = prefix.strip("/")
        if prefix:
            self._file(prefix)
        rows = []
        top = f"{prefix}/" if prefix else ""
        for row in self._walk(top, start_after or "", deep=not delimiter):
            rows.append(row)
            if len(rows) == _ROWS_PER_BATCH:
                yield pa.RecordBatch.from_pylist(rows, schema=LISTING)
                rows = []
        if rows:
            yield pa.RecordBatch.from_pylist(rows, schema=LISTING)

    def head(self, path: str) -> ObjectInfo:
        found = self._info(path)
        return ObjectInfo(
            path=path,
            size=-1 if found.get("size") is None else int(found["size"]),
            etag=_etag(found) or "",
            modified=_modified(found) or datetime.datetime.fromtimestamp(0, datetime.UTC),
        )

    def read(self, path: str, *, if_match: str | None = None) -> Bytes:
        file = self._file(path)
        data: bytes = self._run(path, lambda: self._fs.cat_file(file), reads=True)
        self._check(path, if_match)
        return data

    def read_ranges(
        self,
        path: str,
        starts: Sequence[int],
        ends: Sequence[int],
        *,
        if_match: str | None = None,
        allocate: Allocate = allocated,  # noqa: ARG002  fsspec has memory of its own
    ) -> Sequence[Bytes]:
        file = self._file(path)
        found = []
        for start, end in zip(map(int, starts), map(int, ends), strict=True):

            def part(start: int = start, end: int = end) -> bytes:
                data: bytes = self._fs.cat_file(file, start=start, end=end)
                if len(data) != end - start:
                    size = self._fs.info(file).get("size")
                    if size is not None and size < end:
                        raise ChangedError(
                            f"{self.uri(path)}: ends before byte {end}; it is not what was indexed"
                        )
                    raise WrongAnswer(f"asked for {end - start} bytes, got {len(data)}")
                return data

            found.append(self._run(path, part, reads=True))
        self._check(path, if_match)
        return found

    def put(
        self, path: str, buffers: "Bytes | Sequence[Bytes]", *, create_only: bool = False
    ) -> str:
        file = self._file(path)
        parts: Sequence[Bytes] = buffers if isinstance(buffers, list | tuple) else [buffers]
        data = b"".join(parts)
        if create_only:
            with self._creating:
                if self._run(path, lambda: self._fs.exists(file)):
                    raise AlreadyExistsError(f"{self.uri(path)}: exists already")
                self._run(path, lambda: self._write(file, data))
        else:
            self._run(path, lambda: self._write(file, data))
        self._requests.count(written=len(data))
        return _etag(self._info(path)) or ""

    def copy(self, source: str, target: str) -> None:
        self.put(target, self.read(source))

    def delete(self, paths: Sequence[str]) -> None:
        for path in paths:
            with contextlib.suppress(NotFoundError):
                self._delete(path)

    def _delete(self, path: str) -> None:
        file = self._file(path)
        self._run(path, lambda: self._fs.rm_file(file))

    def _write(self, file: str, data: bytes) -> None:
        folder, _, name = file.rpartition("/")
        if folder:
            self._fs.makedirs(folder, exist_ok=True)
        if not self._moves:
            self._fs.pipe_file(file, data)
            return
        unfinished = f"{folder}/{UNFINISHED}{uuid.uuid4().hex}" if folder else UNFINISHED + name
        try:
            self._fs.pipe_file(unfinished, data)
            self._fs.mv(unfinished, file)
        except BaseException:
            with contextlib.suppress(Exception):  # the first error is the one to tell
                self._fs.rm_file(unfinished)
            raise

    def _walk(self, prefix: str, start_after: str, *, deep: bool) -> Iterator[dict[str, Any]]:
        """Files in the order of their paths; when not deep, folders with a slash, too."""
        where = self._root + "/" + prefix if self._root else prefix
        try:
            entries = self._run(prefix, lambda: self._ls(where.rstrip("/")))
        except NotFoundError:
            if prefix:
                return  # an object store has no folders that could be missing
            raise NotFoundError(f"{self.url}: no such folder; check the address") from None
        for path, entry in self._named(entries):
            if path.rpartition("/")[2].startswith(UNFINISHED) or not path.startswith(prefix):
                continue
            if path.endswith("/"):
                if deep and (path > start_after or start_after.startswith(path)):
                    yield from self._walk(path, start_after, deep=True)
                elif not deep and path > start_after:
                    yield {"path": path}
            elif entry["type"] != "file":
                logger.warning("%s: not listed: neither file nor folder", self.uri(path))
            elif path > start_after:
                yield {
                    "path": path,
                    "size": entry.get("size"),
                    "etag": _etag(entry),
                    "modified": _modified(entry),
                }

    def _ls(self, where: str) -> Any:
        self._fs.invalidate_cache()  # else what was written since is not there
        return self._fs.ls(where or self._fs.root_marker, detail=True)

    def _named(self, entries: Any) -> Sequence[tuple[str, dict[str, Any]]]:
        named = []
        for entry in entries:
            name = str(self._fs._strip_protocol(entry["name"])).strip("/")
            path = name[len(self._root.strip("/")) :].lstrip("/")
            if path:
                named.append((path + "/" * (entry["type"] == "directory"), entry))
        return sorted(named, key=lambda pair: pair[0])

    def _file(self, path: str) -> str:
        if not path or any(part in ("", ".", "..") for part in path.split("/")) or "\0" in path:
            raise StoreError(f"{self.url}: {path!r} is no path of an object")
        return f"{self._root}/{path}" if self._root else path

    def _info(self, path: str) -> dict[str, Any]:
        file = self._file(path)

        def ask() -> dict[str, Any]:
            self._fs.invalidate_cache()
            found: dict[str, Any] = self._fs.info(file)
            if found["type"] == "directory":
                raise FileNotFoundError(path)
            return found

        return self._run(path, ask)

    def _check(self, path: str, if_match: str | None) -> None:
        """After a read: what is still unchanged then was so while it was read."""
        if if_match is None:
            return
        etag = _etag(self._info(path))
        if etag and etag != if_match.strip('"'):
            raise ChangedError(f"{self.uri(path)}: changed since it was listed")

    def _run(self, path: str, action: Callable[[], T], *, reads: bool = False) -> T:
        def alone(_: int) -> T:
            with self._alone:
                return action()

        where = self.uri(path) if path else self.url
        return self._requests.run(where, alone, right="", reads=reads)


def _judge(err: Exception, where: str, _right: str) -> Refusal:
    """File systems raise what they like: builtin errors, or their client's, often with a status."""
    if isinstance(err, StoreError):
        return Refusal(error=err, attempts=1)
    if isinstance(err, _TWICE_IS_WRONG):
        raise err
    text = str(err).strip().splitlines()[0][:200] if str(err).strip() else type(err).__name__
    answer = getattr(err, "response", err)
    status = getattr(answer, "status_code", getattr(answer, "status", None))
    if isinstance(err, FileNotFoundError | IsADirectoryError | KeyError) or status == 404:
        return Refusal(error=NotFoundError(f"{where}: no such object"), attempts=1)
    if isinstance(err, PermissionError) or status in (401, 403):
        return Refusal(
            error=AccessError(f"{where}: access denied ({text}); check the credentials"), attempts=1
        )
    if isinstance(err, FileExistsError):
        return Refusal(error=AlreadyExistsError(f"{where}: exists already"), attempts=1)
    if isinstance(err, ImportError | NotImplementedError):
        return Refusal(error=StoreError(f"{where}: cannot be done here: {text}"), attempts=1)
    error = UnreachableError(f"{where}: no usable answer from the store ({text})")
    if status in (429, 503):
        return Refusal(error=error, attempts=None, throttled=True)
    if isinstance(err, ConnectionError | TimeoutError) or (status is not None and status >= 500):
        return Refusal(error=error, attempts=None)
    return Refusal(error=error, attempts=FEW)


def _etag(info: dict[str, Any]) -> str | None:
    for name in _ETAGS:
        if info.get(name):
            return str(info[name]).strip('"')
    if info.get("CRC") is not None:  # of a member of a zip
        return f"{info['CRC']:08x}-{info['size']:x}"
    modified = _modified(info)
    if modified is None or info.get("size") is None:
        return None
    return f"{round(modified.timestamp() * 1e6):x}-{info['size']:x}"


def _modified(info: dict[str, Any]) -> datetime.datetime | None:
    found = next((info[name] for name in _MODIFIED if info.get(name)), None)
    if isinstance(found, int | float):
        return datetime.datetime.fromtimestamp(found, datetime.UTC)
    if isinstance(found, tuple):  # of a zip: local time of nobody knows where
        found = datetime.datetime(*found[:6])
    if isinstance(found, str):
        try:
            found = datetime.datetime.fromisoformat(found)
        except ValueError:
            return None
    if isinstance(found, datetime.datetime):
        return found if found.tzinfo else found.replace(tzinfo=datetime.UTC)
    return None
