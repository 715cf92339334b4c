"""A local folder as a `Store`: hostile names, links and crashes included.

Not obstore's LocalStore: there, one control character in one name ends the whole listing, and
files named like `photo#1` are invisible.
"""

import contextlib
import datetime
import errno
import logging
import os
import re
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa

from shards.errors import (
    AccessError,
    AlreadyExistsError,
    ChangedError,
    NotFoundError,
    StoreError,
)
from shards.objects import LISTING, Bytes, ObjectInfo

logger = logging.getLogger(__name__)

_UNFINISHED = ".moco-scale-unfinished-"
_ROWS_PER_BATCH = 10_000
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}


class FolderStore:
    """Files below a folder, which the first write makes; links are followed.

    A name that is not UTF-8 is listed, and read, with its odd bytes as \\xNN. The ETag of
    a file is its modification time, size and inode: it tells a change, not the content.
    """

    def __init__(self, folder: Path) -> None:
        self.url = str(folder)
        self._folder = folder
        self._made = False

    def uri(self, path: str) -> str:
        return f"{self.url}/{path}"

    def list(
        self, prefix: str = "", *, start_after: str | None = None, delimiter: bool = False
    ) -> Iterator[pa.RecordBatch]:
        if not self._folder.is_dir():
            what = "not a folder" if self._folder.exists() else "no such folder"
            raise NotFoundError(f"{self.url}: {what}; check the path")
        prefix = prefix.strip("/")
        top = self._file(prefix) if prefix else self._folder
        if not top.is_dir():
            return
        rows: list[ObjectInfo | str] = []
        for row in self._walk(top, f"{prefix}/" if prefix else "", above=(), deep=not delimiter):
            if start_after is None or (row if isinstance(row, str) else row.path) > start_after:
                rows.append(row)
            if len(rows) == _ROWS_PER_BATCH:
                yield _batch(rows)
                rows = []
        if rows:
            yield _batch(rows)

    def head(self, path: str) -> ObjectInfo:
        with self._errors(path):
            return _info(path, self._file(path).stat())

    def read(self, path: str, *, if_match: str | None = None) -> Bytes:
        with self._errors(path), self._file(path).open("rb") as file:
            self._check(path, os.fstat(file.fileno()), if_match)
            return file.read()

    def read_ranges(
        self,
        path: str,
        starts: Sequence[int],
        ends: Sequence[int],
        *,
        if_match: str | None = None,
    ) -> Sequence[Bytes]:
        found = []
        with self._errors(path), self._file(path).open("rb") as file:
            self._check(path, os.fstat(file.fileno()), if_match)
            for start, end in zip(starts, ends, strict=True):
                file.seek(int(start))
                data = file.read(int(end) - int(start))
                if len(data) != end - start:
                    raise ChangedError(f"{self.uri(path)}: ends before byte {end}")
                found.append(data)
        return found

    def put(
        self, path: str, buffers: "Bytes | Sequence[Bytes]", *, create_only: bool = False
    ) -> str:
        target = self._file(path)
        with self._errors(path):
            if not self._folder.is_dir():
                self._folder.mkdir(parents=True)
                self._made = True
            target.parent.mkdir(parents=True, exist_ok=True)
            unfinished = target.parent / f"{_UNFINISHED}{uuid.uuid4().hex}"
            try:
                with unfinished.open("xb") as file:
                    parts: Sequence[Bytes] = (
                        buffers if isinstance(buffers, list | tuple) else [buffers]
                    )
                    for part in parts:
                        file.write(part)
                    file.flush()
                    os.fsync(file.fileno())
                    etag = _etag(os.fstat(file.fileno()))
                if create_only:
                    _link(unfinished, target)
                else:
                    unfinished.replace(target)
            finally:
                unfinished.unlink(missing_ok=True)
        return etag

    def delete(self, paths: Sequence[str]) -> None:
        """Folders that this empties go too, as in an object store, which has none."""
        for path in paths:
            target = self._file(path)
            with self._errors(path):
                target.unlink(missing_ok=True)
            for folder in target.parents:
                if folder == self._folder and not self._made:
                    break
                try:
                    folder.rmdir()
                except OSError:
                    break  # not empty, or not there
                if folder == self._folder:
                    break

    def _walk(
        self, folder: Path, prefix: str, *, above: tuple[tuple[int, int], ...], deep: bool
    ) -> "Iterator[ObjectInfo | str]":
        """Files in the order of their paths; when not deep, names of folders with a slash, too."""
        with self._errors(prefix):
            own = folder.stat()
            if (own.st_dev, own.st_ino) in above:
                logger.warning("%s: a link to a folder above itself; not followed", folder)
                return
            with os.scandir(folder) as entries:
                named = sorted((_shown(e.name) + "/" * e.is_dir(), e) for e in entries)
        for name, entry in named:
            if entry.name.startswith(_UNFINISHED):
                continue
            if name.endswith("/"):
                if not deep:
                    yield prefix + name
                    continue
                inside = (*above, (own.st_dev, own.st_ino))
                yield from self._walk(Path(entry.path), prefix + name, above=inside, deep=True)
                continue
            try:
                is_file, found = entry.is_file(), entry.stat()
            except OSError as err:  # a link into nowhere, or gone since the scan
                logger.warning("%s: not listed: %s", entry.path, err.strerror)
                continue
            if is_file:
                yield _info(prefix + name, found)

    def _file(self, path: str) -> Path:
        if not path or any(part in ("", ".", "..") for part in path.split("/")) or "\0" in path:
            raise StoreError(f"{self.url}: {path!r} is no path of an object")
        literal = self._folder / path
        if "\\x" in path and not os.path.lexists(literal):
            escaped = re.sub(
                rb"\\x([89a-f][0-9a-f])", lambda m: bytes.fromhex(m[1].decode()), path.encode()
            )
            return self._folder / os.fsdecode(escaped)
        return literal

    def _check(self, path: str, found: os.stat_result, if_match: str | None) -> None:
        if if_match is not None and if_match.strip('"') != _etag(found):
            raise ChangedError(f"{self.uri(path)}: changed since it was listed")

    @contextlib.contextmanager
    def _errors(self, path: str) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, IsADirectoryError) as err:
            raise NotFoundError(f"{self.uri(path)}: no such file; check the path") from err
        except PermissionError as err:
            raise AccessError(f"{self.uri(path)}: permission denied; check its rights") from err
        except FileExistsError as err:
            if err.filename2 is None:  # a file where a folder is needed
                raise AccessError(f"{self.uri(path)}: a file is in the way of a folder") from err
            raise AlreadyExistsError(f"{self.uri(path)}: exists already") from err
        except NotADirectoryError as err:
            raise AccessError(f"{self.uri(path)}: a file is in the way of a folder") from err
        except OSError as err:
            raise StoreError(f"{self.uri(path)}: {err.strerror or err}") from err


def _link(unfinished: Path, target: Path) -> None:
    """Give a finished file its name, unless the name is taken."""
    try:
        os.link(unfinished, target)
    except OSError as err:
        if err.errno not in _NO_LINKS:
            raise
        if os.path.lexists(target):
            raise FileExistsError(
                errno.EEXIST, "exists", str(unfinished), None, str(target)
            ) from err
        # A file system without hard links: two racing writers may both win, with whole files.
        unfinished.replace(target)


def _shown(name: str) -> str:
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _etag(found: os.stat_result) -> str:
    return f"{found.st_mtime_ns:x}-{found.st_size:x}-{found.st_ino:x}"


def _info(path: str, found: os.stat_result) -> ObjectInfo:
    modified = datetime.datetime.fromtimestamp(found.st_mtime, datetime.UTC)
    return ObjectInfo(path=path, size=found.st_size, etag=_etag(found), modified=modified)


def _batch(rows: "Sequence[ObjectInfo | str]") -> pa.RecordBatch:
    empty = {"size": None, "etag": None, "modified": None}
    columns = [
        {"path": row, **empty}
        if isinstance(row, str)
        else {"path": row.path, "size": row.size, "etag": row.etag, "modified": row.modified}
        for row in rows
    ]
    return pa.RecordBatch.from_pylist(columns, schema=LISTING)
