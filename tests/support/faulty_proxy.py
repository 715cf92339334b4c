"""A proxy before a real S3 server that fails on purpose, as networks and servers do.

    faults = [
        Fault("status", path=r"/bucket/a\\.jpg", status=503, times=2),
        Fault("reset", path="list-type=2", skip=1, times=1),      # the second page of a listing
        Fault("drip", method="GET", times=1, per_path=True),       # every first look at an object
    ]
    with FaultyProxy(s3.endpoint, faults) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        ...
    assert proxy.struck(faults[0]) == 2

The first fault of the list that fits a request strikes it; `proxy.faults` may be changed at any
time. `proxy.requests` is what was asked, in order.
"""

import http.client
import re
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Literal
from urllib.parse import unquote, urlsplit

import boto3

from demo.local_s3 import ACCESS_KEY, SECRET_KEY

_PIECE = 1 << 14
Kind = Literal["status", "reset", "truncate", "whole", "shift", "etag", "drip", "stall", "slow"]


@dataclass(frozen=True, eq=False)
class Fault:
    """What goes wrong with which requests.

    kind:
        status    the server is not asked; `status` with `headers` and an S3 error body
        reset     half of the body, then a TCP reset
        truncate  half of the body under the whole Content-Length, then an orderly end
        whole     200 and the whole object, though a range was asked for
        shift     another range than asked for, and a Content-Range that says so
        etag      the right answer under an ETag that is not the object's
        drip      the body byte by byte, `drip_s` apart
        stall     headers, and then nothing until the client leaves
        slow      the right answer, `delay_s` late, all struck bodies together at `bytes_per_s`
    """

    kind: Kind
    path: str = ""
    """A regular expression, searched in the path with its query, both percent-decoded."""
    method: str | None = None
    """The only method to strike; None: each."""
    skip: int = 0
    """So many fitting requests pass before the first that is struck."""
    times: int | None = None
    """So many are struck; None: all."""
    per_path: bool = False
    """Count `skip` and `times` for each path (without query) by itself."""
    status: int = 503
    code: str = ""
    """S3's error code; empty: the usual one of the status."""
    headers: Mapping[str, str] = field(default_factory=dict)
    drip_s: float = 0.05
    delay_s: float = 0.0
    bytes_per_s: float | None = None


@dataclass(frozen=True)
class Request:
    """What a client asked."""

    method: str
    path: str
    """With its query, percent-decoded."""
    headers: Mapping[str, str]
    """Names in lower case."""
    posted: bytes = b""
    """The body of a POST, which names the objects to be deleted."""


class FaultyProxy:
    """`with FaultyProxy(endpoint, faults) as proxy:` forwards `proxy.endpoint` to a real server.

    Args:
        answer_headers: added to each answer that is passed on.
    """

    def __init__(
        self,
        endpoint: str,
        faults: Sequence[Fault] = (),
        *,
        answer_headers: Mapping[str, str] | None = None,
    ) -> None:
        self.faults = list(faults)
        self.requests: list[Request] = []
        self._target = urlsplit(endpoint)
        self._answer_headers = dict(answer_headers or {})
        self._lock = threading.Lock()
        self._fitted: Counter[tuple[Fault, str]] = Counter()
        self._struck: Counter[Fault] = Counter()
        self._free_at = 0.0
        self._closing = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def struck(self, fault: Fault) -> int:
        """How many requests a fault has struck so far."""
        with self._lock:
            return self._struck[fault]

    def asked(self, path: str = "", method: str | None = None) -> int:
        """How many requests there were whose path has this regular expression."""
        with self._lock:
            return sum(
                method in (None, request.method) and re.search(path, request.path) is not None
                for request in self.requests
            )

    def __enter__(self) -> "FaultyProxy":
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._closing.set()
        self._server.shutdown()
        self._thread.join(timeout=10)
        self._server.server_close()

    def _choose(self, request: Request) -> Fault | None:
        with self._lock:
            self.requests.append(request)
            for fault in self.faults:
                if fault.method not in (None, request.method):
                    continue
                if not re.search(fault.path, request.path):
                    continue
                counted = (fault, request.path.partition("?")[0] if fault.per_path else "")
                self._fitted[counted] += 1
                number = self._fitted[counted] - fault.skip
                if number >= 1 and (fault.times is None or number <= fault.times):
                    self._struck[fault] += 1
                    return fault
        return None

    def _wait_for_room(self, size: int, bytes_per_s: float) -> None:
        """Until so many bytes may go, behind those that others were promised."""
        with self._lock:
            self._free_at = max(self._free_at, time.perf_counter()) + size / bytes_per_s
            until = self._free_at
        self._closing.wait(max(0.0, until - time.perf_counter()))

    def _forward(
        self, handler: BaseHTTPRequestHandler, sent: bytes, fault: Fault | None
    ) -> tuple[int, dict[str, str], bytes]:
        if fault is not None and fault.kind == "status":
            code = {403: "AccessDenied", 404: "NoSuchKey", 429: "SlowDown", 503: "SlowDown"}
            name = fault.code or code.get(fault.status, "InternalError")
            said = f"<?xml version='1.0'?><Error><Code>{name}</Code></Error>".encode()
            return fault.status, dict(fault.headers), said
        host, port = str(self._target.hostname), self._target.port
        upstream = http.client.HTTPConnection(host, port, timeout=30)
        try:
            # The signature covers Host, so it goes on as it came.
            upstream.request(handler.command, handler.path, sent, dict(handler.headers))
            answer = upstream.getresponse()
            body = answer.read()
        finally:
            upstream.close()
        dropped = {"transfer-encoding", "connection", "content-length"}
        if fault is not None and fault.kind == "etag":
            dropped.add("etag")
        kept = {n: v for n, v in answer.getheaders() if n.lower() not in dropped}
        kept |= self._answer_headers
        if handler.command == "HEAD":
            kept["Content-Length"] = answer.getheader("Content-Length") or "0"
        if fault is not None and fault.kind == "etag":
            kept["ETag"] = '"00000000000000000000000000000000"'
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", handler.headers.get("Range") or "")
        if fault is None or fault.kind not in ("whole", "shift") or asked is None:
            return answer.status, kept, body
        whole = self._whole(handler.path)
        kept = {n: v for n, v in kept.items() if n.lower() != "content-range"}
        if fault.kind == "whole":
            return 200, kept, whole
        start, end = int(asked[1]) + 1, int(asked[2]) + 1
        return (
            206,
            kept | {"Content-Range": f"bytes {start}-{end}/{len(whole)}"},
            whole[start : end + 1],
        )

    def _whole(self, path: str) -> bytes:
        # Range is signed too, so the whole object takes a request of the proxy's own.
        client = boto3.client(
            "s3",
            endpoint_url=self._target.geturl(),
            aws_access_key_id=ACCESS_KEY,
            aws_secret_access_key=SECRET_KEY,
            region_name="us-east-1",
        )
        bucket, _, key = unquote(urlsplit(path).path).lstrip("/").partition("/")
        found: bytes = client.get_object(Bucket=bucket, Key=key)["Body"].read()
        return found


def _handler(proxy: FaultyProxy) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def forward(self) -> None:
            headers = {name.lower(): value for name, value in self.headers.items()}
            sent = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            posted = sent if self.command == "POST" else b""
            fault = proxy._choose(Request(self.command, unquote(self.path), headers, posted))
            status, answer, body = proxy._forward(self, sent, fault)
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(body))} | answer).items():
                self.send_header(name, value)
            try:
                self.end_headers()
                self._send(b"" if self.command == "HEAD" else body, fault)
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True  # the client has left

        def _send(self, body: bytes, fault: Fault | None) -> None:
            kind = None if fault is None else fault.kind
            if kind in ("reset", "truncate"):
                self.wfile.write(body[: len(body) // 2])
                self.close_connection = True
                if kind == "reset":
                    self.wfile.flush()
                    linger = struct.pack("ii", 1, 0)  # closing then resets
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                    self.connection.close()
            elif kind == "stall":
                proxy._closing.wait(60)
                self.close_connection = True
            elif kind == "drip":
                assert fault is not None
                for at in range(len(body)):
                    if proxy._closing.wait(fault.drip_s):
                        self.close_connection = True
                        return
                    self.wfile.write(body[at : at + 1])
            elif kind == "slow":
                assert fault is not None
                proxy._closing.wait(fault.delay_s)
                for at in range(0, len(body), _PIECE):
                    if fault.bytes_per_s is not None:
                        proxy._wait_for_room(len(body[at : at + _PIECE]), fault.bytes_per_s)
                    self.wfile.write(body[at : at + _PIECE])
            else:
                self.wfile.write(body)

        do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = forward

        def log_message(self, *_: object) -> None:
            """Quiet."""

    return Handler
