"""The one door to object storage: a URL becomes a `Store` that lists, reads, writes and deletes."""

import datetime
import logging
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Protocol, TypeAlias, TypeVar

import boto3
import obstore
import pyarrow as pa
from botocore.exceptions import BotoCoreError
from obstore import exceptions as refused
from obstore.auth.boto3 import Boto3CredentialProvider
from obstore.store import LocalStore, MemoryStore, S3Store, from_url

from shards.errors import (
    AccessError,
    AlreadyExistsError,
    ChangedError,
    NotFoundError,
    StoreError,
    UnreachableError,
)

logger = logging.getLogger(__name__)
T = TypeVar("T")

Bytes: TypeAlias = Any
"""Anything with the buffer protocol: bytes, memoryview, or what a store read without a copy."""

LISTING = pa.schema(
    [
        ("path", pa.string()),
        ("size", pa.int64()),
        ("etag", pa.string()),
        ("modified", pa.timestamp("us", tz="UTC")),
    ]
)
"""Columns of what `Store.list` yields."""

ATTEMPTS = 5
READ_THREADS = 16
_RETRY: Any = {
    "max_retries": 3,
    "backoff": {
        "init_backoff": datetime.timedelta(milliseconds=100),
        "max_backoff": datetime.timedelta(seconds=5),
        "base": 2,
    },
    "retry_timeout": datetime.timedelta(seconds=60),
}
_CLIENT: Any = {"timeout": "60s", "connect_timeout": "5s"}


@dataclass(frozen=True, kw_only=True, slots=True)
class ObjectInfo:
    """What a store says of one object."""

    path: str
    size: int
    etag: str
    modified: datetime.datetime


class Store(Protocol):
    """Objects below one URL. Safe to use from many threads; open it anew in a forked process."""

    url: str
    """The address of the root, without a slash at its end."""

    def uri(self, path: str) -> str:
        """The full address of an object, for messages and the index."""

    def list(self, prefix: str = "", *, start_after: str | None = None) -> Iterator[pa.RecordBatch]:
        """Objects below `prefix`, as batches with the schema LISTING, in the store's order."""

    def head(self, path: str) -> ObjectInfo: ...

    def read(self, path: str, *, if_match: str | None = None) -> Bytes:
        """The whole object. Raises ChangedError if its ETag is not `if_match`."""

    def read_ranges(
        self,
        path: str,
        starts: Sequence[int],
        ends: Sequence[int],
        *,
        if_match: str | None = None,
    ) -> Sequence[Bytes]:
        """Bytes [start, end) for each pair, one request each, several at a time."""

    def put(
        self, path: str, buffers: "Bytes | Sequence[Bytes]", *, create_only: bool = False
    ) -> str:
        """Write a whole object, which appears whole or not at all; return its ETag.

        Raises:
            AlreadyExistsError: `create_only` and the object exists.
        """

    def delete(self, paths: Sequence[str]) -> None:
        """Delete objects; one that is not there is no error."""


def open_store(url: str) -> Store:
    """The store below a URL: s3://bucket/prefix, gs://, az://, http(s)://, file://, memory://, a path.

    Raises:
        AccessError: no credentials to be found.
        StoreError: an unknown scheme.
    """
    scheme, separator, rest = url.partition("://")
    if not separator:
        return _open_local(Path(url))
    if scheme == "file":
        return _open_local(Path("/" + rest.lstrip("/")))
    clean = url.rstrip("/")
    if scheme == "memory":
        return ObjectStore(_memory(rest.strip("/")), url=clean)
    if scheme == "s3":
        bucket, _, prefix = rest.strip("/").partition("/")
        return ObjectStore(_s3(bucket, prefix), url=clean)
    try:
        return ObjectStore(from_url(clean, client_options=_CLIENT, retry_config=_RETRY), url=clean)
    except (refused.BaseError, ValueError) as err:
        raise StoreError(f"{url}: cannot be opened: {_first_line(err)}") from err


class ObjectStore:
    """A `Store` over obstore: s3, gs, az, http, file and memory."""

    def __init__(self, client: Any, *, url: str) -> None:
        self.url = url
        self._client = client

    def uri(self, path: str) -> str:
        return f"{self.url}/{path}"

    def list(self, prefix: str = "", *, start_after: str | None = None) -> Iterator[pa.RecordBatch]:
        pages = self._call(
            self.url,
            lambda: obstore.list(
                self._client,
                prefix or None,
                offset=start_after,
                chunk_size=10_000,
                return_arrow=True,
            ),
        )
        while True:
            page = self._call(self.url, lambda: next(iter(pages), None))
            if page is None:
                return
            found = pa.record_batch(page)
            columns = [
                found.column("path").cast(pa.string()),
                found.column("size").cast(pa.int64()),
                found.column("e_tag").cast(pa.string()),
                found.column("last_modified").cast(pa.timestamp("us", tz="UTC")),
            ]
            yield pa.RecordBatch.from_arrays(columns, schema=LISTING)

    def head(self, path: str) -> ObjectInfo:
        found = self._call(self.uri(path), lambda: obstore.head(self._client, path))
        return ObjectInfo(
            path=path, size=found["size"], etag=_etag(found), modified=found["last_modified"]
        )

    def read(self, path: str, *, if_match: str | None = None) -> Bytes:
        options: Any = {"if_match": if_match} if if_match else {}
        return self._call(
            self.uri(path),
            lambda: memoryview(obstore.get(self._client, path, options=options).bytes()),
        )

    def read_ranges(
        self,
        path: str,
        starts: Sequence[int],
        ends: Sequence[int],
        *,
        if_match: str | None = None,
    ) -> Sequence[Bytes]:
        def one(start: int, end: int) -> Bytes:
            options: Any = {"range": (start, end)}
            if if_match:
                options["if_match"] = if_match

            def fetch() -> Bytes:
                found = memoryview(obstore.get(self._client, path, options=options).bytes())
                if len(found) != end - start:
                    raise _ShortAnswer(f"asked for {end - start} bytes, got {len(found)}")
                return found

            return self._call(self.uri(path), fetch)

        pairs = [(int(start), int(end)) for start, end in zip(starts, ends, strict=True)]
        if len(pairs) == 1:
            return [one(*pairs[0])]
        return list(_threads().map(lambda pair: one(*pair), pairs))

    def put(
        self, path: str, buffers: "Bytes | Sequence[Bytes]", *, create_only: bool = False
    ) -> str:
        whole = b"".join(buffers) if isinstance(buffers, list | tuple) else buffers
        mode: Any = "create" if create_only else "overwrite"
        written = self._call(
            self.uri(path),
            lambda: obstore.put(self._client, path, whole, mode=mode, use_multipart=False),
        )
        return _etag(written)

    def delete(self, paths: Sequence[str]) -> None:
        for path in paths:
            try:
                self._call(self.uri(path), partial(obstore.delete, self._client, path))
            except NotFoundError:
                continue

    def _call(self, where: str, action: Callable[[], T]) -> T:
        """Run one request; retry what may pass, name what will not.

        obstore retries 5xx and refused connections itself; what reaches us as retryable is what it
        gives up on early: bodies cut short and connections reset while reading.
        """
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return action()
            except (refused.BaseError, _ShortAnswer, OSError, ValueError, BotoCoreError) as err:
                known = _translate(err, where)
                if not isinstance(known, UnreachableError) or attempt == ATTEMPTS:
                    raise known from err
                pause = random.uniform(0, 0.2 * 2**attempt)
                logger.warning("%s: attempt %d of %d: %s", where, attempt, ATTEMPTS, known)
                time.sleep(pause)
        raise AssertionError("the last attempt returns or raises")


class _LocalStore(ObjectStore):
    """A folder. It is made by the first write, so that opening a place leaves no trace."""

    def __init__(self, folder: Path) -> None:
        super().__init__(LocalStore(folder) if folder.is_dir() else None, url=str(folder))
        self._folder = folder

    def _call(self, where: str, action: Callable[[], T]) -> T:
        if self._client is None:
            if not self._folder.is_dir():
                raise NotFoundError(f"{self.url}: no such folder; check the path")
            self._client = LocalStore(self._folder)
        return super()._call(where, action)

    def put(
        self, path: str, buffers: "Bytes | Sequence[Bytes]", *, create_only: bool = False
    ) -> str:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as err:
            raise AccessError(f"{self.url}: cannot be written: {err.strerror}") from err
        return super().put(path, buffers, create_only=create_only)


class _ShortAnswer(Exception):
    """A range came back with another length than asked for."""


def _translate(err: Exception, where: str) -> StoreError:
    """An obstore error as one of ours, with the address and what to do."""
    text = _first_line(err)
    if isinstance(err, refused.NotFoundError) or "NoSuchBucket" in str(err):
        what = "no such bucket" if "NoSuchBucket" in str(err) else "no such object"
        return NotFoundError(f"{where}: {what}; check the address")
    denied = ("AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "403 Forbidden")
    if isinstance(err, refused.PermissionDeniedError | refused.UnauthenticatedError) or any(
        word in str(err) for word in denied
    ):
        return AccessError(f"{where}: access denied; check the credentials and their rights")
    if isinstance(err, PermissionError):
        return AccessError(f"{where}: permission denied")
    if isinstance(err, refused.AlreadyExistsError):
        return AlreadyExistsError(f"{where}: exists already")
    if isinstance(err, refused.PreconditionError):
        return ChangedError(f"{where}: changed since it was listed")
    if isinstance(err, BotoCoreError):
        return AccessError(f"{where}: no credentials ({text}); set AWS_ACCESS_KEY_ID or a profile")
    return UnreachableError(f"{where}: no usable answer from the store ({text})")


def _first_line(err: Exception) -> str:
    line = str(err).strip().splitlines()[0] if str(err).strip() else type(err).__name__
    return line if len(line) <= 200 else line[:200] + "..."


def _etag(found: Any) -> str:
    return (found["e_tag"] or "").strip('"')


def _open_local(root: Path) -> ObjectStore:
    absolute = Path(os.path.abspath(root))  # noqa: PTH100  # resolve() would follow the user's links
    return _LocalStore(absolute)


_memory_stores: dict[str, MemoryStore] = {}


def _memory(name: str) -> MemoryStore:
    return _memory_stores.setdefault(name, MemoryStore())


def _s3(bucket: str, prefix: str) -> S3Store:
    """S3 by boto3's rules for credentials, profiles and endpoints, as s3fs follows them."""
    try:
        session = boto3.Session()
        endpoint = session.client(
            "s3", region_name=session.region_name or "us-east-1"
        ).meta.endpoint_url
        return S3Store(
            bucket,
            prefix=prefix or None,
            credential_provider=Boto3CredentialProvider(session),
            endpoint=endpoint,
            region=session.region_name or "us-east-1",
            client_options={**_CLIENT, "allow_http": endpoint.startswith("http:")},
            retry_config=_RETRY,
        )
    except (BotoCoreError, ValueError, refused.BaseError) as err:
        raise AccessError(
            f"s3://{bucket}: no usable credentials or endpoint ({_first_line(err)}); "
            "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile"
        ) from err


@lru_cache(maxsize=1)
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(READ_THREADS, thread_name_prefix="store-read")
