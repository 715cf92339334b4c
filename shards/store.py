"""The one door to object storage: a URL becomes a `Store` that lists, reads, writes and deletes."""

import datetime
import logging
import os
import random
import re
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Protocol, TypeVar
from urllib.parse import unquote

import boto3
import obstore
import pyarrow as pa
import pyarrow.compute as pc
from botocore.exceptions import BotoCoreError
from obstore import exceptions as refused
from obstore.auth.boto3 import Boto3CredentialProvider
from obstore.store import MemoryStore, S3Store, from_url

from shards.errors import (
    AccessError,
    AlreadyExistsError,
    ChangedError,
    NotFoundError,
    StoreError,
    UnreachableError,
)
from shards.folder import FolderStore
from shards.objects import LISTING, Bytes, ObjectInfo

__all__ = ["LISTING", "Bytes", "ObjectInfo", "ObjectStore", "Store", "open_store"]

logger = logging.getLogger(__name__)
T = TypeVar("T")

ATTEMPTS = 4
READ_THREADS = 16
_LIST_CHUNK = 10_000
_RETRY: Any = {
    "max_retries": 10,
    "backoff": {
        "init_backoff": datetime.timedelta(milliseconds=100),
        "max_backoff": datetime.timedelta(seconds=15),
        "base": 2,
    },
    "retry_timeout": datetime.timedelta(seconds=180),
}
# Two clients a store: a read that stalls for half a minute is dead, but while a shard is uploaded
# nothing is read for as long as that takes.
_READING: Any = {"connect_timeout": "5s", "read_timeout": "30s", "timeout": "600s"}
_WRITING: Any = {"connect_timeout": "5s", "timeout": "600s"}


class Store(Protocol):
    """Objects below one URL. Safe to use from many threads; open it anew in another process.

    Every error is a StoreError with the full address and what to do, after all retries. `if_match`
    is an ETag as `list`, `head` and `put` give it.
    """

    url: str
    """The address of the root, without a slash at its end."""

    def uri(self, path: str) -> str:
        """The full address of an object, for messages and the index."""

    def list(
        self, prefix: str = "", *, start_after: str | None = None, delimiter: bool = False
    ) -> Iterator[pa.RecordBatch]:
        """Objects below the folder `prefix`, as batches with the schema LISTING.

        Args:
            start_after: leave out paths up to this one, in the order of their bytes.
            delimiter: one level only: its objects and, with a slash and no size, its folders.

        Raises:
            NotFoundError: no such bucket, or no such folder.
        """

    def head(self, path: str) -> ObjectInfo:
        """Facts of one object."""

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
        """Bytes [start, end) for each pair, one request each, several at a time.

        Raises:
            ChangedError: the ETag is not `if_match`, or the object ends before a range does.
        """

    def put(
        self, path: str, buffers: "Bytes | Sequence[Bytes]", *, create_only: bool = False
    ) -> str:
        """Write a whole object, which appears whole or not at all; return its ETag.

        Raises:
            AlreadyExistsError: `create_only` and it exists, perhaps by a retry of this call.
        """

    def delete(self, paths: Sequence[str]) -> None:
        """Delete objects; one that is not there is no error."""


def open_store(url: str) -> Store:
    """The store below a URL: s3://bucket/prefix, gs, az, http(s), file and memory alike, or a path.

    Opening reads nothing and leaves no trace. memory:// stores of one name are one, in a process.

    Raises:
        AccessError: no credentials to be found.
        StoreError: the address cannot be one, or its scheme is unknown.
    """
    scheme, separator, rest = url.partition("://")
    if not separator:
        if not url or re.match(r"(s3|gs|az|https?|file|memory):", url):
            raise StoreError(f"{url!r} is no address; give s3://bucket/prefix or a path")
        return _open_folder(url)
    if scheme == "file":
        return _open_folder("/" + unquote(rest).lstrip("/"))
    if not rest.strip("/"):
        raise StoreError(f"{url!r} names no bucket; give {scheme}://bucket/prefix")
    clean = url.rstrip("/")
    if scheme == "memory":
        memory = _memory(rest.strip("/"))
        return ObjectStore(memory, memory, url=clean)
    if scheme == "s3":
        bucket, _, prefix = rest.strip("/").partition("/")
        return ObjectStore(*_s3(bucket, prefix), url=clean)
    try:
        clients = [
            from_url(clean, client_options=options, retry_config=_RETRY)
            for options in (_READING, _WRITING)
        ]
    except (refused.BaseError, ValueError) as err:
        raise StoreError(f"{url}: cannot be opened: {_first_line(err)}") from err
    return ObjectStore(*clients, url=clean)


class ObjectStore:
    """A `Store` over obstore: s3, gs, az, http and memory."""

    def __init__(self, reader: Any, writer: Any, *, url: str) -> None:
        self.url = url
        self._reader = reader
        self._writer = writer

    def uri(self, path: str) -> str:
        return f"{self.url}/{path}"

    def list(
        self, prefix: str = "", *, start_after: str | None = None, delimiter: bool = False
    ) -> Iterator[pa.RecordBatch]:
        if delimiter:
            yield from self._list_level(prefix, start_after)
            return
        attempt, last = 1, start_after
        pages: Iterator[Any] | None = None
        while True:
            try:
                if pages is None:
                    pages = iter(
                        obstore.list(
                            self._reader,
                            prefix or None,
                            offset=last,
                            chunk_size=_LIST_CHUNK,
                            return_arrow=True,
                        )
                    )
                page = next(pages, None)
            except (refused.BaseError, OSError, ValueError, BotoCoreError) as err:
                # A listing that failed is over: it would end early, as if that had been all. Begin
                # again behind the last path; stores list in that order.
                self._pause(err, self.url, attempt)
                attempt, pages = attempt + 1, None
                continue
            if page is None:
                return
            found = _listing(page)
            if last is not None:
                found = found.filter(pc.greater(found.column("path"), last))
            if len(found):
                attempt = 1
                if not isinstance(self._reader, MemoryStore):  # lists in no order, never fails
                    last = pc.max(found.column("path")).as_py()
                yield found

    def head(self, path: str) -> ObjectInfo:
        found = self._call(self.uri(path), lambda: obstore.head(self._reader, path))
        return ObjectInfo(
            path=path, size=found["size"], etag=_etag(found), modified=found["last_modified"]
        )

    def read(self, path: str, *, if_match: str | None = None) -> Bytes:
        options = _match(if_match)
        return self._call(
            self.uri(path),
            lambda: memoryview(obstore.get(self._reader, path, options=options).bytes()),
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
            options: Any = {"range": (start, end), **_match(if_match)}

            def fetch() -> Bytes:
                answer = obstore.get(self._reader, path, options=options)
                if answer.meta["size"] < end:
                    raise ChangedError(
                        f"{self.uri(path)}: ends before byte {end}; it is not what was indexed"
                    )
                found = memoryview(answer.bytes())
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
        mode: Any = "create" if create_only else "overwrite"
        written = self._call(
            self.uri(path),
            lambda: obstore.put(self._writer, path, buffers, mode=mode, use_multipart=False),
        )
        return _etag(written)

    def delete(self, paths: Sequence[str]) -> None:
        for path in paths:
            try:
                self._call(self.uri(path), partial(obstore.delete, self._writer, path))
            except NotFoundError:
                continue

    def _list_level(self, prefix: str, start_after: str | None) -> Iterator[pa.RecordBatch]:
        found = self._call(
            self.url,
            lambda: obstore.list_with_delimiter(self._reader, prefix or None, return_arrow=True),
        )
        folders = [{"path": f"{folder}/"} for folder in found["common_prefixes"]]
        rows = [_listing(page) for page in pa.table(found["objects"]).to_batches()]
        rows.append(pa.RecordBatch.from_pylist(folders, schema=LISTING))
        level = pa.Table.from_batches(rows).sort_by("path")
        if start_after is not None:
            level = level.filter(pc.greater(level.column("path"), start_after))
        yield from level.combine_chunks().to_batches()

    def _call(self, where: str, action: Callable[[], T]) -> T:
        """Run one request; retry what may pass, name what will not."""
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return action()
            except (refused.BaseError, _ShortAnswer, OSError, ValueError, BotoCoreError) as err:
                self._pause(err, where, attempt)
        raise AssertionError("the last attempt returns or raises")

    def _pause(self, err: Exception, where: str, attempt: int) -> None:
        """Wait before another attempt, or raise the error as one of ours.

        obstore retries 429, 5xx and refused connections itself, with back-off. What it gives up
        early and we try again are answers cut short and connections reset while reading.
        """
        known = _translate(err, where)
        tried = re.search(r"after [1-9]\d* retries", str(err)) is not None
        if not isinstance(known, UnreachableError) or tried or attempt >= ATTEMPTS:
            raise known from err
        logger.warning("%s: attempt %d of %d: %s", where, attempt, ATTEMPTS, known)
        time.sleep(random.uniform(0, 0.2 * 2**attempt))


class _ShortAnswer(Exception):
    """A range came back with another length than asked for."""


def _translate(err: Exception, where: str) -> StoreError:
    """An obstore error as one of ours, with the address and what to do."""
    said, text = str(err), _first_line(err)

    def says(*words: str) -> bool:
        return any(word in said for word in words)

    if isinstance(err, BotoCoreError):
        return AccessError(f"{where}: no credentials ({text}); set AWS_ACCESS_KEY_ID or a profile")
    # obstore raises FileNotFoundError itself, not its own NotFoundError.
    if isinstance(err, refused.NotFoundError | FileNotFoundError) or says("NoSuchBucket"):
        what = "no such bucket" if says("NoSuchBucket") else "no such object"
        return NotFoundError(f"{where}: {what}; check the address")
    if isinstance(
        err, refused.PermissionDeniedError | refused.UnauthenticatedError | PermissionError
    ) or says(*_DENIED):
        return AccessError(f"{where}: access denied; check the credentials and their rights")
    if isinstance(err, refused.AlreadyExistsError):
        return AlreadyExistsError(f"{where}: exists already")
    if isinstance(err, refused.PreconditionError):
        return ChangedError(f"{where}: changed since it was listed")
    if says("416 Range Not Satisfiable", "StartTooLarge"):
        return ChangedError(f"{where}: ends before the range; it is not what was indexed")
    if says("PermanentRedirect", "AuthorizationHeaderMalformed", "301 Moved"):
        return StoreError(f"{where}: the bucket is in another region; set AWS_REGION to it")
    if isinstance(err, refused.InvalidPathError) or says("Could not parse path"):
        return StoreError(
            f"{where}: an object's name has an empty part, '.', '..' or a control character, which "
            f"cannot be read: {text}; rename it, or give a prefix without it"
        )
    if isinstance(err, refused.NotSupportedError | refused.UnknownConfigurationKeyError):
        return StoreError(f"{where}: this store cannot do that ({text})")
    return UnreachableError(f"{where}: no usable answer from the store ({text})")


_DENIED = (
    "AccessDenied",
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "ExpiredToken",
    "InvalidToken",
    "403 Forbidden",
)


def _first_line(err: Exception) -> str:
    line = str(err).strip().splitlines()[0] if str(err).strip() else type(err).__name__
    return line if len(line) <= 200 else line[:200] + "..."


def _listing(page: Any) -> pa.RecordBatch:
    found = pa.record_batch(page)
    columns = [
        found.column("path").cast(pa.string()),
        found.column("size").cast(pa.int64()),
        pc.utf8_trim(found.column("e_tag").cast(pa.string()), '"'),
        found.column("last_modified").cast(pa.timestamp("us", tz="UTC")),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=LISTING)


def _etag(found: Any) -> str:
    return (found["e_tag"] or "").strip('"')


def _match(etag: str | None) -> Any:
    return {"if_match": '"' + etag.strip('"') + '"'} if etag else {}


def _open_folder(path: str) -> FolderStore:
    return FolderStore(Path(os.path.abspath(path)))  # noqa: PTH100  # resolve() would follow links


_memory_stores: dict[str, MemoryStore] = {}


def _memory(name: str) -> MemoryStore:
    return _memory_stores.setdefault(name, MemoryStore())


def _s3(bucket: str, prefix: str) -> tuple[S3Store, S3Store]:
    """S3 by boto3's rules for credentials, profiles and endpoints, as s3fs follows them."""
    try:
        session = boto3.Session()
        # AWS_REGION is what newer SDKs read; boto3 knows AWS_DEFAULT_REGION only.
        region = session.region_name or os.environ.get("AWS_REGION") or "us-east-1"
        endpoint = session.client("s3", region_name=region).meta.endpoint_url
        provider = Boto3CredentialProvider(session)

        def client(options: Any) -> S3Store:
            return S3Store(
                bucket,
                prefix=prefix or None,
                credential_provider=provider,
                endpoint=endpoint,
                region=region,
                client_options=options | {"allow_http": endpoint.startswith("http:")},
                retry_config=_RETRY,
            )

        return client(_READING), client(_WRITING)
    except (BotoCoreError, ValueError, refused.BaseError) as err:
        raise AccessError(
            f"s3://{bucket}: no usable credentials or endpoint ({_first_line(err)}); "
            "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile"
        ) from err


@lru_cache(maxsize=1)
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(READ_THREADS, thread_name_prefix="store-read")
