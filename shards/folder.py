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
import shutil
import threading
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
from shards.objects import LISTING, Allocate, Bytes, ObjectInfo, StoreStats, allocated

logger = logging.getLogger(__name__)

UNFINISHED = ".moco-scale-unfinished-"
_ROWS_PER_BATCH = 10_000
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}


class FolderStore:
    """Files below a folder, which the first write makes; links are followed.

    A listing walks each real folder once. One inside the root is listed under its own path, one
    outside under the first link to it; other links to it, and links to what is above the root, are
    not followed: a warning names each, and `unfollowed_links` is how many there were.

    A name that is not UTF-8 is listed, and read, with its odd bytes as \\xNN. The ETag of
    a file is its modification time, size and inode: it tells a change, not the content.
    """

    def __init__(self, folder: Path) -> None:
        self.url = str(folder)
        self._folder = folder
        self._made = False
        self._unfollowed: set[str] = set()
        self._lock = threading.Lock()
        self._requests = self._read_bytes = self._written_bytes = 0

    @property
    def unfollowed_links(self) -> int:
        return len(self._unfollowed)

    def stats(self) -> StoreStats:
        with self._lock:
            return StoreStats(
                requests=self._requests,
                retries=0,
                resumes=0,
                throttles=0,
                read_bytes=self._read_bytes,
                written_bytes=self._written_bytes,
            )

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
        walked: set[tuple[int, int]] = set()
        for row in self._walk(top, f"{prefix}/" if prefix else "", walked, deep=not delimiter):
            if start_after is None or (row if isinstance(row, str) else row.path) > start_after:
                rows.append(row)
            if len(rows) == _ROWS_PER_BATCH:
                yield _batch(rows)
                rows = []
        if rows:
            yield _batch(rows)

    def head(self, path: str) -> ObjectInfo:
        self._count()
        with self._errors(path):
            return _info(path, self._file(path).stat())

    def read(self, path: str, *, if_match: str | None = None) -> Bytes:
        with self._errors(path), self._file(path).open("rb") as file:
            self._check(path, os.fstat(file.fileno()), if_match)
            data = file.read()
        self._count(read=len(data))
        return data

    def read_ranges(
        self,
        path: str,
        starts: Sequence[int],
        ends: Sequence[int],
        *,
        if_match: str | None = None,
        allocate: Allocate = allocated,
    ) -> Sequence[Bytes]:
        found = []
        with self._errors(path), self._file(path).open("rb", buffering=0) as file:
            self._check(path, os.fstat(file.fileno()), if_match)
            for start, end in zip(map(int, starts), map(int, ends), strict=True):
                data, filled = allocate(end - start), 0
                file.seek(start)
                while filled < len(data):
                    came = file.readinto(data[filled:])
                    if not came:
                        raise ChangedError(f"{self.uri(path)}: ends before byte {end}")
                    filled += came
                found.append(data)
        self._count(read=sum(map(len, found)))
        return found

    def put(
        self, path: str, buffers: "Bytes | Sequence[Bytes]", *, create_only: bool = False
    ) -> str:
        target = self._file(path)
        with self._errors(path):
            if not self._folder.is_dir():
                self._folder.mkdir(parents=True, exist_ok=True)  # threads may race
                self._made = True
            target.parent.mkdir(parents=True, exist_ok=True)
            unfinished = target.parent / f"{UNFINISHED}{uuid.uuid4().hex}"
            parts: Sequence[Bytes] = buffers if isinstance(buffers, list | tuple) else [buffers]
            try:
                with unfinished.open("xb") as file:
                    written = sum(file.write(part) for part in parts)
                    file.flush()
                    os.fsync(file.fileno())
                    etag = _etag(os.fstat(file.fileno()))
                if create_only:
                    _link(unfinished, target)
                else:
                    unfinished.replace(target)
            finally:
                unfinished.unlink(missing_ok=True)
        self._count(written=written)
        return etag

    def copy(self, source: str, target: str) -> None:
        place = self._file(target)
        with self._errors(source):
            place.parent.mkdir(parents=True, exist_ok=True)
            unfinished = place.parent / f"{UNFINISHED}{uuid.uuid4().hex}"
            try:
                shutil.copyfile(self._file(source), unfinished)
                with unfinished.open("rb") as file:
                    os.fsync(file.fileno())
                unfinished.replace(place)
            finally:
                unfinished.unlink(missing_ok=True)

    def delete(self, paths: Sequence[str]) -> None:
        """Folders that this empties go too, as in an object store, which has none."""
        for path in paths:
            self._count()
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
        self, folder: Path, prefix: str, walked: set[tuple[int, int]], *, deep: bool
    ) -> "Iterator[ObjectInfo | str]":
        """Files in the order of their paths; when not deep, names of folders with a slash, too."""
        self._count()
        with self._errors(prefix):
            own = folder.stat()
            if (own.st_dev, own.st_ino) in walked:
                self._leave_out(folder, "listed already under another name")
                return
            walked.add((own.st_dev, own.st_ino))
            with os.scandir(folder) as entries:
                named = sorted((_shown(e.name) + "/" * e.is_dir(), e) for e in entries)
        for name, entry in named:
            if entry.name.startswith(UNFINISHED):
                continue
            if name.endswith("/"):
                if entry.is_symlink() and self._is_reached_without(entry.path):
                    continue
                if not deep:
                    yield prefix + name
                    continue
                yield from self._walk(Path(entry.path), prefix + name, walked, deep=True)
                continue
            try:
                is_file, found = entry.is_file(), entry.stat()
            except OSError as err:  # a link into nowhere, or gone since the scan
                logger.warning("%s: not listed: %s", entry.path, err.strerror)
                continue
            if is_file:
                yield _info(prefix + name, found)

    def _is_reached_without(self, link: str) -> bool:
        """Whether a link to a folder shows nothing new, or the whole root anew."""
        real, root = os.path.realpath(link), os.path.realpath(self._folder)
        if Path(real).is_relative_to(root):
            self._leave_out(link, "leads to a folder inside the root, which is listed by itself")
            return True
        if Path(root).is_relative_to(real):
            self._leave_out(link, "leads to a folder above the root")
            return True
        return False

    def _leave_out(self, folder: Path | str, why: str) -> None:
        self._unfollowed.add(str(folder))
        logger.warning("%s: not followed: %s", folder, why)

    def _count(self, *, read: int = 0, written: int = 0) -> None:
        with self._lock:
            self._requests += 1
            self._read_bytes += read
            self._written_bytes += written

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
