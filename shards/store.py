"""The one door to object storage: a URL becomes a `Store` that lists, reads, writes and deletes."""

import os
import re
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import unquote

import obstore
import pyarrow as pa
import pyarrow.compute as pc
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    HTTPClientError,
    IncompleteReadError,
)
from botocore.exceptions import ConnectionError as BotoConnectionError
from obstore import exceptions as refused
from obstore.store import MemoryStore, S3Store, from_url

from shards.backoff import DEADLINE_S, FEW, Refusal, Requests, WrongAnswer, limiter_of
from shards.boto_s3 import (
    Credentials,
    OddKeys,
    bucket_region,
    is_odd,
    machine_region,
    session_and_client,
)
from shards.errors import (
    AccessError,
    AlreadyExistsError,
    ChangedError,
    NotFoundError,
    StoreError,
    UnreachableError,
)
from shards.folder import FolderStore
from shards.fsspec_store import FsspecStore, knows
from shards.objects import LISTING, Allocate, Bytes, ObjectInfo, StoreStats, allocated

__all__ = [
    "LISTING",
    "SECRET",
    "Bytes",
    "ObjectInfo",
    "ObjectStore",
    "Store",
    "StoreStats",
    "bucket_region",
    "machine_region",
    "open_store",
    "refuse_secrets",
]

READ_THREADS = 16
_LIST_CHUNK = 1_000  # one answer of S3: who stops early has asked for no more than it read
_LIST_PAGE = 1000
_CHUNK_BYTES = 2**18
_NO_RETRY: Any = {"max_retries": 0}  # `Requests` tries again: it sees, counts and slows down


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
            start_after: leave out paths up to this one, in the store's own order: by their bytes,
                or, where a server lists a file system, folder by folder (a/c before a-b).
            delimiter: one level only: its objects and, with a slash and no size, its folders, as
                `prefix` takes them.

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
        allocate: Allocate = allocated,
    ) -> Sequence[Bytes]:
        """Bytes [start, end) for each pair, one request each, several at a time.

        Args:
            allocate: gives the memory that they are to be in, perhaps used before.

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

    def copy(self, source: str, target: str) -> None:
        """Write an object again under another path; of a bucket, without its bytes coming here."""

    def delete(self, paths: Sequence[str]) -> None:
        """Delete objects; one that is not there is no error."""

    def stats(self) -> StoreStats:
        """What this store was asked for so far, by all threads of this process."""


def open_store(url: str, *, requester_pays: bool = False, deadline_s: float = DEADLINE_S) -> Store:
    """The store below a URL: s3://bucket/prefix, gs, az, http(s), file and memory alike, or a path.

    Any other scheme is one of fsspec's. Opening reads nothing of an object store and leaves no
    trace. memory:// stores of one name are one, in a process.

    Args:
        requester_pays: agree to be charged for requests, on S3; elsewhere without effect.
        deadline_s: how long a request that fails in passing is tried again.

    Raises:
        AccessError: no credentials to be found.
        StoreError: the address cannot be one, has a secret in it, or its scheme is unknown.
    """
    refuse_secrets(url)
    scheme, separator, rest = url.partition("://")
    if not separator:
        if not url or re.match(r"(s3|gs|az|https?|file|memory):", url):
            raise StoreError(f"{url!r} is no address; give s3://bucket/prefix or a path")
        return _open_folder(url)
    if scheme == "file":
        return _open_folder("/" + unquote(rest).lstrip("/"))
    if "::" in url or (not _obstore_knows(scheme) and knows(scheme)):
        return FsspecStore(url, deadline_s=deadline_s)
    if not _obstore_knows(scheme):
        raise StoreError(
            f"{url}: unknown scheme {scheme!r}; give s3://bucket/prefix, another scheme of "
            "obstore or fsspec, or a path"
        )
    if not rest.strip("/"):
        raise StoreError(f"{url!r} names no bucket; give {scheme}://bucket/prefix")
    clean = url.rstrip("/")
    if scheme == "memory":
        memory = _memory(rest.strip("/"))
        return ObjectStore([memory], memory, url=clean, root=clean, deadline_s=deadline_s)
    if scheme in ("s3", "s3a"):
        return _open_s3(clean, requester_pays=requester_pays, deadline_s=deadline_s)
    plain: Any = {"allow_http": True} if scheme == "http" else {}
    try:
        clients = [
            from_url(clean, client_options=options | plain, retry_config=_NO_RETRY)
            for options in _timeouts(deadline_s)
        ]
    except (refused.BaseError, ValueError) as err:
        raise StoreError(f"{url}: cannot be opened: {_first_line(err)}") from err
    root = "/".join(clean.split("/")[:3])
    return ObjectStore(clients[:-1], clients[-1], url=clean, root=root, deadline_s=deadline_s)


def refuse_secrets(url: str) -> None:
    """Addresses are written into manifests and logs, so nothing secret may be in one.

    Raises:
        StoreError: a password before the host, or a signature behind the path.
    """
    for part in url.split("::"):
        if re.match(SECRET, part):
            bare = re.sub(r"(?<=://)[^/@]*@", "...@", part.partition("?")[0])
            raise StoreError(
                f"{bare}: a password or signature in an address would be written down in manifests "
                "and logs; give it where the store's client looks for it (AWS_ACCESS_KEY_ID, "
                "AZURE_STORAGE_SAS_TOKEN, FSSPEC_FTP_PASSWORD, ...)"
            )


SECRET = (
    r"(?i)^([a-z0-9+.-]+://[^/@]*:[^/@]*@"
    r"|https?://[^?]*\?(.*&)?(X-(Amz|Goog)-(Signature|Credential)|Signature|sig)=)"
)
"""What an address begins with that has a secret in it; a regular expression of Python and RE2."""


class ObjectStore:
    """A `Store` over obstore: s3, gs, az, http and memory.

    Args:
        readers: the client of each attempt; the last serves all further ones.
        root: what one limit of concurrent requests is for: endpoint and bucket.
        odd_keys: reads what obstore cannot address; only S3 has it.
    """

    def __init__(
        self,
        readers: Sequence[Any],
        writer: Any,
        *,
        url: str,
        root: str,
        deadline_s: float,
        odd_keys: OddKeys | None = None,
    ) -> None:
        self.url = url
        self._readers = readers
        self._writer = writer
        self._odd_keys = odd_keys
        self._starts_with_slash: bool | None = None if odd_keys else False
        self._requests = Requests(
            limiter_of(root), caught=_CAUGHT, judge=_judge, deadline_s=deadline_s
        )

    def uri(self, path: str) -> str:
        return f"{self.url}/{path}"

    def stats(self) -> StoreStats:
        return self._requests.stats()

    def list(
        self, prefix: str = "", *, start_after: str | None = None, delimiter: bool = False
    ) -> Iterator[pa.RecordBatch]:
        if delimiter:
            yield from self._list_level(prefix, start_after)
            return
        last = start_after
        if self._is_odd_listing(prefix, start_after):
            last = yield from self._list_odd(prefix, start_after, whole=True)
            return
        pages: Iterator[Any] | None = None
        fresh = True

        def next_page(attempt: int) -> Any:
            nonlocal pages, fresh
            if pages is None or attempt > 1:
                # A listing that failed is over: it would end early, as if that had been all. Begin
                # again behind the last path, in the store's own order, which need not be by bytes.
                pages, fresh = self._pages(prefix, last), True
            return next(pages, None)

        while True:
            try:
                page = self._requests.run(self.url, next_page, right=_LIST)
                if page is None:
                    return
                found = _listing(page)
                if self._odd_keys and _has_replaced(found):
                    raise _OddKeyError
            except _OddKeyError:
                if self._odd_keys is None:
                    raise
                last = yield from self._list_odd(prefix, last, whole=False)
                if last is None:
                    return
                pages = None
                continue
            self._requests.count(requests=max(0, (len(found) - 1) // _LIST_PAGE))
            if fresh and last is not None:
                found = found.filter(pc.not_equal(found.column("path"), last))
            fresh = False
            if len(found):
                if not isinstance(self._writer, MemoryStore):  # lists in no order, never fails
                    last = found.column("path")[-1].as_py()
                yield found

    def head(self, path: str) -> ObjectInfo:
        if self._odd_keys and self._is_odd(path):
            odd_keys = self._odd_keys
            return self._requests.run(self.uri(path), lambda _: odd_keys.head(path), right=_READ)
        found = self._requests.run(
            self.uri(path), lambda attempt: obstore.head(self._reader(attempt), path), right=_READ
        )
        return ObjectInfo(
            path=path, size=found["size"], etag=_etag(found), modified=found["last_modified"]
        )

    def read(self, path: str, *, if_match: str | None = None) -> Bytes:
        if self._odd_keys and self._is_odd(path):
            return self._read_odd(path, None, if_match)
        body = _Body(path, None, if_match)
        return self._requests.run(
            self.uri(path), lambda attempt: self._receive(body, attempt), right=_READ, reads=True
        )

    def read_ranges(
        self,
        path: str,
        starts: Sequence[int],
        ends: Sequence[int],
        *,
        if_match: str | None = None,
        allocate: Allocate = allocated,
    ) -> Sequence[Bytes]:
        odd = self._odd_keys is not None and self._is_odd(path)

        def one(start: int, end: int) -> Bytes:
            if odd:
                return self._read_odd(path, (start, end), if_match)
            body = _Body(path, (start, end), if_match, allocate)
            return self._requests.run(
                self.uri(path),
                lambda attempt: self._receive(body, attempt),
                right=_READ,
                reads=True,
            )

        pairs = [(int(start), int(end)) for start, end in zip(starts, ends, strict=True)]
        if len(pairs) == 1:
            return [one(*pairs[0])]
        return list(_threads().map(lambda pair: one(*pair), pairs))

    def _receive(self, body: "_Body", attempt: int) -> memoryview:
        """What is missing of a body; after one that broke off, from the byte that was reached."""
        if body.is_whole:  # what broke was its end: a range of nothing would bring everything
            return body.received
        options: Any = _match(body.etag)
        if body.wanted is not None:
            options |= {"range": body.wanted}
        try:
            answer = obstore.get(self._reader(attempt), body.path, options=options)
        except refused.NotSupportedError as err:
            if not body.is_of_whole:
                raise
            body.begin_again()  # a web server without ranges: everything anew
            raise WrongAnswer(f"the rest of a body that broke off: {_first_line(err)}") from err
        meta = answer.meta
        if body.etag:
            self._check(body.path, _etag(meta), body.etag)
        wanted = body.wanted
        if wanted is None:
            body.begin(0, meta["size"])
        self._check_end(body.path, meta["size"], body.end)
        # An empty object's range is what it likes.
        if wanted is not None and tuple(answer.range) != wanted and meta["size"]:
            raise WrongAnswer(f"asked for bytes {wanted}, got {tuple(answer.range)}")
        if body.filled:
            self._requests.count(resumes=1)
        body.etag = body.etag or _etag(meta)
        try:
            # A small one in one go: a stream costs more than it could save.
            is_small = body.end - body.start - body.filled <= _CHUNK_BYTES
            for chunk in [answer.bytes()] if is_small else answer.stream(_CHUNK_BYTES):
                body.add(chunk)
        finally:
            if not body.etag and not body.is_whole:
                body.begin_again()  # whether the rest is of the same object, nobody could tell
        if not body.is_whole:
            raise WrongAnswer(f"the body ends {body.end - body.start - body.filled} bytes early")
        return body.received

    def put(
        self, path: str, buffers: "Bytes | Sequence[Bytes]", *, create_only: bool = False
    ) -> str:
        self._refuse_odd(path)
        mode: Any = "create" if create_only else "overwrite"
        written = self._requests.run(
            self.uri(path),
            lambda _: obstore.put(self._writer, path, buffers, mode=mode, use_multipart=False),
            right=_WRITE,
        )
        parts: Sequence[Bytes] = buffers if isinstance(buffers, list | tuple) else [buffers]
        self._requests.count(written=sum(memoryview(part).nbytes for part in parts))
        return _etag(written)

    def copy(self, source: str, target: str) -> None:
        self._requests.run(
            self.uri(source),
            lambda _: obstore.copy(self._writer, source, target),
            right=f"{_READ}, and {_WRITE} for {target}",
        )

    def delete(self, paths: Sequence[str]) -> None:
        for path in paths:
            self._refuse_odd(path)
            try:
                self._delete(path)
            except NotFoundError:
                continue

    def _delete(self, path: str) -> None:
        self._requests.run(
            self.uri(path), lambda _: obstore.delete(self._writer, path), right=_DELETE
        )

    def _refuse_odd(self, path: str) -> None:
        """Odd keys are others' and only read: obstore would write beside some of them."""
        if self._is_odd(path):
            raise _OddKeyError(f"{self.uri(path)}: {_WHAT_IS_ODD}; write under another name")

    def _reader(self, attempt: int) -> Any:
        return self._readers[min(attempt, len(self._readers)) - 1]

    def _pages(self, prefix: str, start_after: str | None) -> Iterator[Any]:
        return iter(
            obstore.list(
                self._readers[0],
                prefix or None,
                offset=start_after,
                chunk_size=_LIST_CHUNK,
                return_arrow=True,
            )
        )

    def _list_level(self, prefix: str, start_after: str | None) -> Iterator[pa.RecordBatch]:
        level = None if self._is_odd_listing(prefix, None) else self._level(prefix)
        if level is None:
            # The rest is sorted as S3 sorts: objects and folders of a page are two lists.
            rows = list(self._odd_pages(prefix, None, delimiter=True))
            level = pa.Table.from_batches([page for page, _ in rows], schema=LISTING)
        level = level.sort_by("path")
        if start_after is not None:
            level = level.filter(pc.greater(level.column("path"), start_after))
        yield from level.combine_chunks().to_batches()

    def _level(self, prefix: str) -> pa.Table | None:
        """Objects and folders of one level; None if a key among them is odd and can be read."""
        try:
            found = self._requests.run(
                self.url,
                lambda _: obstore.list_with_delimiter(
                    self._readers[0], prefix or None, return_arrow=True
                ),
                right=_LIST,
            )
        except _OddKeyError:
            if self._odd_keys is None:
                raise
            return None
        folders = [{"path": f"{folder}/"} for folder in found["common_prefixes"]]
        rows = [_listing(page) for page in pa.table(found["objects"]).to_batches()]
        rows.append(pa.RecordBatch.from_pylist(folders, schema=LISTING))
        if self._odd_keys and any(_has_replaced(page) for page in rows):
            return None
        return pa.Table.from_batches(rows)

    def _is_odd(self, path: str) -> bool:
        return self._odd_keys is not None and (self._odd_keys.everything or is_odd(path))

    def _is_odd_listing(self, prefix: str, start_after: str | None) -> bool:
        """Whether a listing must be boto3's from its start."""
        if self._odd_keys is None:
            return False
        named = prefix[:-1] if prefix != "/" and prefix.endswith("/") else prefix
        if self._is_odd(named) or (start_after is not None and self._is_odd(start_after)):
            return True
        if prefix or (start_after is not None and start_after >= "0"):  # what follows the slash
            return False
        if self._starts_with_slash is None:
            odd_keys = self._odd_keys
            self._starts_with_slash = self._requests.run(
                self.url, lambda _: odd_keys.begin_with_a_slash(), right=_LIST
            )
        return self._starts_with_slash

    def _list_odd(
        self, prefix: str, start_after: str | None, *, whole: bool
    ) -> Generator[pa.RecordBatch, None, str | None]:
        """List by boto3 past the odd keys; return the path to go on behind, None at the end."""
        past = False
        for page, odd in self._odd_pages(prefix, start_after):
            if len(page):
                yield page
                if past and not odd and not whole:
                    last: str = page.column("path")[-1].as_py()
                    return last
            past = past or odd
        return None

    def _odd_pages(
        self, prefix: str, start_after: str | None, *, delimiter: bool = False
    ) -> Iterator[tuple[pa.RecordBatch, bool]]:
        odd_keys = self._odd_keys
        assert odd_keys is not None
        token: str | None = None

        def ask(_: int) -> tuple[pa.RecordBatch, str | None, bool]:
            return odd_keys.page(prefix, start_after=start_after, token=token, delimiter=delimiter)

        while True:
            page, token, odd = self._requests.run(self.url, ask, right=_LIST)
            yield page, odd
            if token is None:
                return

    def _read_odd(self, path: str, span: tuple[int, int] | None, if_match: str | None) -> Bytes:
        odd_keys = self._odd_keys
        assert odd_keys is not None

        def fetch(_: int) -> bytes:
            data, etag, size = odd_keys.get(path, if_match=if_match, span=span)
            if if_match:
                self._check(path, etag, if_match)
            if span is not None:
                self._check_end(path, size, span[1])
                _check_length(data, span[1] - span[0])
            return data

        return self._requests.run(self.uri(path), fetch, right=_READ, reads=True)

    def _check(self, path: str, etag: str, wanted: str) -> None:
        # Some gateways and web servers do not know If-Match.
        if etag and etag != wanted.strip('"'):
            raise ChangedError(f"{self.uri(path)}: changed since it was listed")

    def _check_end(self, path: str, size: int, end: int) -> None:
        if size < end:
            raise ChangedError(
                f"{self.uri(path)}: ends before byte {end}; it is not what was indexed"
            )


class _Body:
    """Bytes [start, end) of an object, as far as they have come.

    Args:
        span: None for the whole object, whose size the first answer tells.
        etag: what it must have; else the first answer's, from then on.
    """

    def __init__(
        self,
        path: str,
        span: tuple[int, int] | None,
        etag: str | None,
        allocate: Allocate = allocated,
    ) -> None:
        self.path = path
        self.etag = etag
        self.is_of_whole = span is None
        self._allocate = allocate
        self.start = self.end = self.filled = 0
        self._buffer: memoryview | None = None
        if span is not None:
            self.begin(*span)

    def begin(self, start: int, end: int) -> None:
        if self._buffer is None or len(self._buffer) != end - start:
            self._buffer = self._allocate(end - start)
        self.start, self.end = start, end

    def begin_again(self) -> None:
        self.filled = 0

    @property
    def wanted(self) -> tuple[int, int] | None:
        """The range to ask for; None for a whole object of which nothing has come."""
        if self.is_of_whole and not self.filled:
            return None
        return self.start + self.filled, self.end

    @property
    def is_whole(self) -> bool:
        """Whether all has come."""
        return self._buffer is not None and self.filled == self.end - self.start

    @property
    def received(self) -> memoryview:
        assert self._buffer is not None, "some of it has come"
        return self._buffer

    def add(self, chunk: Bytes) -> None:
        assert self._buffer is not None, "begun before bytes come"
        stop = self.filled + len(chunk)
        if stop > len(self._buffer):
            raise WrongAnswer(f"more than the {len(self._buffer)} bytes that were asked for")
        self._buffer[self.filled : stop] = memoryview(chunk)
        self.filled = stop


class _OddKeyError(StoreError):
    """A key that obstore cannot address."""


_CAUGHT = (refused.BaseError, WrongAnswer, OSError, ValueError, BotoCoreError, ClientError)


def _judge(err: Exception, where: str, right: str) -> Refusal:
    """An exception of obstore or boto3 as one of ours, and whether another attempt may help."""
    error = _translate(err, where, right)
    status, said = _status(err), str(err)
    if "ExpiredToken" in said or "RequestExpired" in said:
        return Refusal(error=error, attempts=FEW)  # renewed ones may be there already
    if not isinstance(error, UnreachableError):
        return Refusal(error=error, attempts=1)
    if isinstance(err, WrongAnswer) or any(words in said for words in _WRONG):
        return Refusal(error=error, attempts=FEW)
    if status in (429, 503) or "SlowDown" in said:
        return Refusal(error=error, attempts=None, throttled=True)
    passing = status is None or status in (408, 425, 500, 502, 504) or "RequestTimeout" in said
    return Refusal(error=error, attempts=None if passing else 1)


def _status(err: Exception) -> int | None:
    """The HTTP status of an answer; None where there was no answer, or not a whole one."""
    if isinstance(err, ClientError):
        status: int | None = err.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        return status
    found = re.search(r"non-2xx status code: (\d{3})", str(err))
    return int(found[1]) if found else None


def _translate(err: Exception, where: str, right: str) -> StoreError:
    """With the address and what to do.

    Args:
        right: what the request needs, by its name in S3.
    """
    status, said, text = _status(err), str(err), _first_line(err)

    def says(*words: str) -> bool:
        return any(word in said for word in words)

    if isinstance(err, BotoCoreError) and not isinstance(
        err, HTTPClientError | BotoConnectionError | IncompleteReadError
    ):
        return AccessError(f"{where}: no credentials ({text}); set AWS_ACCESS_KEY_ID or a profile")
    # obstore raises FileNotFoundError itself, not its own NotFoundError.
    if status == 404 or isinstance(err, refused.NotFoundError | FileNotFoundError):
        what = "no such bucket" if says("NoSuchBucket") else "no such object"
        return NotFoundError(f"{where}: {what}; check the address")
    if says("RequestTimeTooSkewed"):
        return AccessError(f"{where}: refused, because this machine's clock is wrong; set it")
    if says("ExpiredToken", "RequestExpired"):
        return AccessError(f"{where}: access denied; the credentials have expired: renew them")
    if code := next((code for code in _UNKNOWN if code in said), None):
        return AccessError(
            f"{where}: access denied; the store does not accept these credentials ({code}): check "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or the profile"
        )
    if (
        status in (401, 403)
        or isinstance(
            err, refused.PermissionDeniedError | refused.UnauthenticatedError | PermissionError
        )
        or says("AccessDenied")
    ):
        needed = right if where.startswith(("s3:", "s3a:")) else right.removeprefix("s3:")
        return AccessError(
            f"{where}: access denied; check the credentials, and that their policy allows {needed}"
        )
    if says("ConditionalRequestConflict", "OperationAborted"):  # 409: another write is under way
        return UnreachableError(f"{where}: another write is under way")
    if isinstance(err, refused.AlreadyExistsError):
        return AlreadyExistsError(f"{where}: exists already")
    if status == 412 or isinstance(err, refused.PreconditionError):
        return ChangedError(f"{where}: changed since it was listed")
    if status == 416 or says("StartTooLarge"):
        return ChangedError(f"{where}: ends before the range; it is not what was indexed")
    if status == 301 or says("AuthorizationHeaderMalformed", "redirect without LOCATION"):
        return StoreError(f"{where}: the bucket is in another region; set AWS_REGION to it")
    if isinstance(err, refused.InvalidPathError) or says("Could not parse path"):
        return _OddKeyError(
            f"{where}: {_WHAT_IS_ODD}: {text}; rename it, or give a prefix without it"
        )
    if isinstance(err, refused.NotSupportedError | refused.UnknownConfigurationKeyError):
        return StoreError(f"{where}: this store cannot do that ({text})")
    return UnreachableError(f"{where}: no usable answer from the store ({text})")


_WHAT_IS_ODD = "a name with an empty part, '.', '..' or a control character cannot be used here"
_UNKNOWN = ("InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "InvalidClientTokenId")
_LIST, _READ, _WRITE = "s3:ListBucket", "s3:GetObject", "s3:PutObject"
_DELETE = "s3:DeleteObject"
_WRONG = ("Received non-partial response", "source: UnexpectedRange", "Got invalid list response")


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


def _has_replaced(page: pa.RecordBatch) -> bool:
    """Whether a name has U+FFFD: some servers write it for what XML cannot hold."""
    return bool(pc.any(pc.match_substring(page.column("path"), "\ufffd")).as_py())


def _check_length(found: Bytes, wanted: int) -> None:
    if len(found) != wanted:
        raise WrongAnswer(f"asked for {wanted} bytes, got {len(found)}")


def _etag(found: Any) -> str:
    etag: str = found["e_tag"] or ""
    return "" if etag.startswith("W/") else etag.strip('"')  # a weak one promises no bytes


def _match(etag: str | None) -> Any:
    return {"if_match": '"' + etag.strip('"') + '"'} if etag else {}


def _open_folder(path: str) -> FolderStore:
    return FolderStore(Path(os.path.abspath(path)))  # noqa: PTH100  # resolve() would follow links


_memory_stores: dict[str, MemoryStore] = {}


def _memory(name: str) -> MemoryStore:
    return _memory_stores.setdefault(name, MemoryStore())


def _obstore_knows(scheme: str) -> bool:
    try:
        return scheme == "memory" or bool(obstore.parse_scheme(f"{scheme}://bucket"))
    except (refused.BaseError, ValueError):
        return False


def _timeouts(deadline_s: float) -> list[Any]:
    """Client options of a first attempt to read, of a further one, and of writing.

    A read that stalls is dead, but while a shard is uploaded nothing is read for as long as that
    takes. A first answer that drips is given up early: another connection is mostly faster; what
    is really that large gets its time then.
    """
    connect, stall = min(5.0, deadline_s / 6), min(30.0, deadline_s / 6)
    patient = {"connect_timeout": _ms(connect), "timeout": _ms(3 * deadline_s)}
    reading = patient | {"read_timeout": _ms(stall)}
    return [reading | {"timeout": _ms(deadline_s / 3)}, reading, patient]


def _ms(seconds: float) -> str:
    return f"{max(1, round(seconds * 1000))}ms"


def _open_s3(url: str, *, requester_pays: bool, deadline_s: float) -> ObjectStore:
    """S3 by boto3's rules for credentials, profiles and endpoints, as s3fs follows them."""
    bucket, _, prefix = url.partition("://")[2].partition("/")
    try:
        session, boto = session_and_client(read_timeout_s=min(30.0, deadline_s / 6))
        odd_keys = OddKeys(boto, bucket, prefix, requester_pays=requester_pays)
        endpoint, region = boto.meta.endpoint_url, boto.meta.region_name
        credentials = Credentials(session)

        def client(options: Any) -> S3Store:
            return S3Store(
                bucket,
                prefix=None if odd_keys.everything else prefix or None,
                credential_provider=credentials,
                endpoint=endpoint,
                region=region,
                request_payer=requester_pays,
                client_options=options | {"allow_http": endpoint.startswith("http:")},
                retry_config=_NO_RETRY,
            )

        *readers, writer = [client(options) for options in _timeouts(deadline_s)]
    except (BotoCoreError, ValueError, refused.BaseError) as err:
        raise AccessError(
            f"s3://{bucket}: no usable credentials or endpoint ({_first_line(err)}); "
            "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile"
        ) from err
    return ObjectStore(
        readers,
        writer,
        url=url,
        root=f"{endpoint}/{bucket}",
        deadline_s=deadline_s,
        odd_keys=odd_keys,
    )


@lru_cache(maxsize=1)
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(READ_THREADS, thread_name_prefix="store-read")
