"""S3 by boto3: its credentials and regions, and the keys that obstore cannot address."""

import contextlib
import datetime
import os
import re
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import boto3
import pyarrow as pa
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from shards.backoff import WrongAnswer
from shards.objects import LISTING, ObjectInfo

__all__ = [
    "Credentials",
    "OddKeys",
    "bucket_region",
    "is_odd",
    "machine_region",
    "session_and_client",
]

_ODD = re.compile(r"[\x00-\x1f\x7f]|//|(^|/)\.\.?(/|$)|^/|/$")


def is_odd(key: str) -> bool:
    """Whether obstore refuses a key, or would read another one (it drops slashes at the ends)."""
    if (
        key.isprintable()
        and "//" not in key
        and "/." not in key
        and not key.startswith((".", "/"))
        and not key.endswith("/")
    ):
        return False  # nearly all keys, and cheaper than the expression
    return _ODD.search(key) is not None


class Credentials:
    """A boto3 session's credentials for obstore.

    obstore keeps what it is given until five minutes before it expires, and boto3 renews what
    expires in time if it is asked. So each answer is called short-lived: obstore then asks again,
    at most ten times a second, and keys that were replaced are used at once. (obstore's own
    provider lets it keep a key for 25 minutes, of which boto3 promises ten.)

    What boto3 reads out of a file it never reads again, but such files are written anew by whoever
    rotates keys, as Kubernetes does with a Secret: so they are looked at here.
    """

    def __init__(self, session: boto3.Session) -> None:
        found = session.get_credentials()
        if found is None:
            raise ValueError("no credentials found")
        self._credentials = found
        self._seen = _written_at() if found.method in _OF_FILES else None

    def __call__(self) -> Any:
        if self._seen is not None and (now := _written_at()) != self._seen:
            # A file that is half written, or gone for a moment, is looked at again.
            with contextlib.suppress(BotoCoreError):
                found = boto3.Session().get_credentials()
                if found is not None:
                    self._credentials, self._seen = found, now
        frozen = self._credentials.get_frozen_credentials()
        return {
            "access_key_id": frozen.access_key,
            "secret_access_key": frozen.secret_key,
            "token": frozen.token,
            "expires_at": datetime.datetime.now(datetime.UTC) + datetime.timedelta(minutes=4),
        }


_OF_FILES = ("shared-credentials-file", "config-file")


def _written_at() -> list[int]:
    """When the files that hold keys were written; 0 for one that is not there."""
    names = {
        "AWS_SHARED_CREDENTIALS_FILE": "~/.aws/credentials",
        "AWS_CONFIG_FILE": "~/.aws/config",
    }
    found = []
    for variable, default in names.items():
        try:
            path = Path(os.environ.get(variable) or default).expanduser()
            found.append(path.stat().st_mtime_ns)
        except OSError:
            found.append(0)
    return found


def session_and_client(*, read_timeout_s: float) -> tuple[boto3.Session, Any]:
    """A session by today's settings, and its S3 client; made once for each state of them.

    Raises:
        BotoCoreError, ValueError: no usable settings.
    """
    settings = (item for item in os.environ.items() if item[0].startswith("AWS_"))
    state = (os.environ.get("HOME"), *sorted(settings), *_written_at())
    return _session_and_client(state, read_timeout_s)


@lru_cache(maxsize=8)
def _session_and_client(_settings: tuple[Any, ...], read_timeout_s: float) -> tuple[Any, Any]:
    session = boto3.Session()
    # Some 0.1 s of CPU time, which is why it is kept.
    client = session.client(
        "s3",
        region_name=machine_region() or "us-east-1",
        config=Config(
            connect_timeout=5,
            read_timeout=read_timeout_s,
            retries={"total_max_attempts": 1},  # `Requests` tries again
            response_checksum_validation="when_required",
            max_pool_connections=32,
        ),
    )
    return session, client


class OddKeys:
    """Lists and reads what obstore cannot, below a prefix of one bucket. One request a call."""

    def __init__(self, client: Any, bucket: str, prefix: str, *, requester_pays: bool) -> None:
        self._client = client
        self._bucket = bucket
        self._root = f"{prefix}/" if prefix else ""
        self._payer = {"RequestPayer": "requester"} if requester_pays else {}
        self.everything = bool(prefix) and is_odd(prefix)
        """Whether the prefix itself is one, and so each key below it."""

    def head(self, path: str) -> ObjectInfo:
        found = self._client.head_object(Bucket=self._bucket, Key=self._root + path, **self._payer)
        return ObjectInfo(
            path=path,
            size=found["ContentLength"],
            etag=found["ETag"].strip('"'),
            modified=found["LastModified"],
        )

    def get(
        self, path: str, *, if_match: str | None, span: tuple[int, int] | None
    ) -> tuple[bytes, str, int]:
        """Bytes, ETag and whole size of an object, of which `span` [start, end) is read."""
        asked: dict[str, Any] = dict(self._payer)
        if if_match:
            asked["IfMatch"] = f'"{if_match}"'
        if span is not None:
            asked["Range"] = f"bytes={span[0]}-{span[1] - 1}"
        found = self._client.get_object(Bucket=self._bucket, Key=self._root + path, **asked)
        with contextlib.closing(found["Body"]) as body:
            data = body.read()
        size = found["ContentLength"]
        if span is not None:
            answered = re.fullmatch(rf"bytes {span[0]}-\d+/(\d+)", found.get("ContentRange", ""))
            if answered is None:
                raise WrongAnswer(f"asked for bytes from {span[0]}, got others")
            size = int(answered[1])
        return data, found["ETag"].strip('"'), size

    def page(
        self, prefix: str, *, start_after: str | None, token: str | None, delimiter: bool = False
    ) -> tuple[pa.RecordBatch, str | None, bool]:
        """A thousand objects, what to go on with (None: that was all), and if a key is odd.

        A folder's marker loses its slash, as obstore lists it.
        """
        asked: dict[str, Any] = {"Prefix": self._folder(prefix), **self._payer}
        if token is not None:
            asked["ContinuationToken"] = token
        elif start_after is not None:
            asked["StartAfter"] = self._root + start_after
        if delimiter:
            asked["Delimiter"] = "/"
        found = self._client.list_objects_v2(Bucket=self._bucket, **asked)
        rows: list[dict[str, Any]] = []
        odd = False
        for entry in found.get("Contents", []):
            path = entry["Key"][len(self._root) :]
            if path.endswith("/") and not is_odd(path[:-1]):
                path = path[:-1]
            odd = odd or is_odd(path) or "\ufffd" in path
            rows.append(
                {
                    "path": path,
                    "size": entry["Size"],
                    "etag": entry.get("ETag", "").strip('"') or None,
                    "modified": entry["LastModified"],
                }
            )
        rows += [
            {"path": entry["Prefix"][len(self._root) :]}
            for entry in found.get("CommonPrefixes", [])
        ]
        batch = pa.RecordBatch.from_pylist(rows, schema=LISTING)
        return batch, found.get("NextContinuationToken"), odd

    def begin_with_a_slash(self) -> bool:
        """Whether there are such keys at the root, of which obstore's listing loses the slash."""
        if self._root:
            return False
        found = self._client.list_objects_v2(
            Bucket=self._bucket, Prefix="/", MaxKeys=1, **self._payer
        )
        return bool(found.get("Contents"))

    def _folder(self, prefix: str) -> str:
        whole = self._root + prefix
        return whole if not whole or whole.endswith("/") else whole + "/"


def bucket_region(url: str) -> str | None:
    """The region of an S3 bucket; None for other schemes and where it cannot be known.

    Asks once, with a short deadline, and never raises: it is for a warning.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("s3", "s3a") or not parts.netloc:
        return None
    brief = Config(connect_timeout=3, read_timeout=5, retries={"total_max_attempts": 1})
    try:
        client = boto3.Session().client("s3", region_name=machine_region(), config=brief)
        headers = client.head_bucket(Bucket=parts.netloc)["ResponseMetadata"]["HTTPHeaders"]
    except ClientError as err:  # 301 and 403 carry the header too
        headers = err.response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    except (BotoCoreError, ValueError, OSError):
        return None
    found = headers.get("x-amz-bucket-region")
    return str(found) if found else None


def machine_region() -> str | None:
    """The region this process is set up for; no metadata server is asked."""
    try:
        # AWS_REGION is what newer SDKs read; boto3 knows AWS_DEFAULT_REGION and profiles only.
        return os.environ.get("AWS_REGION") or boto3.Session().region_name
    except BotoCoreError:
        return None
