"""A store before a faulty server: the right bytes or the right error, in time."""

import datetime
import json
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

import boto3
import pytest

from demo.local_s3 import LocalS3
from shards.backoff import Limiter
from shards.errors import (
    AccessError,
    ChangedError,
    NotFoundError,
    StoreError,
    UnreachableError,
)
from shards.store import Store, bucket_region, machine_region, open_store
from tests.support.faulty_proxy import Fault, FaultyProxy, Kind

CONTENT = bytes(range(256)) * 40
ODD = ["tab\there", "new\nline", "bell\x07", "del\x7f", "return\r"]


@pytest.fixture
def bucket(s3: LocalS3, request: pytest.FixtureRequest) -> str:
    name = "".join(c for c in request.node.name if c.isalnum())[-40:].lower()
    url = s3.make_bucket("f" + name)
    open_store(url).put("object", CONTENT)
    return url


@pytest.fixture
def behind(
    s3: LocalS3, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., tuple[Store, FaultyProxy]]]:
    """A store behind a proxy with these faults, which answered once already."""
    proxies: list[FaultyProxy] = []

    def start(*faults: Fault, deadline_s: float = 20) -> tuple[Store, FaultyProxy]:
        proxy = FaultyProxy(s3.endpoint)
        proxies.append(proxy.__enter__())
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        store = open_store(bucket, deadline_s=deadline_s)
        store.head("object")
        proxy.faults = list(faults)
        return store, proxy

    yield start
    for proxy in proxies:
        proxy.__exit__(None, None, None)


@contextmanager
def within(seconds: float) -> Iterator[None]:
    begun = time.monotonic()
    yield
    assert time.monotonic() - begun < seconds


def paths(store: Store, prefix: str = "", **options: object) -> list[str]:
    return [p for page in store.list(prefix, **options) for p in page.column("path").to_pylist()]


def everything(store: Store) -> None:
    """Read, head, ranges, list and write, each with the right outcome."""
    assert bytes(store.read("object")) == CONTENT
    assert store.head("object").size == len(CONTENT)
    found = store.read_ranges("object", [0, 1000, 5], [10, 9000, 6])
    assert [bytes(part) for part in found] == [CONTENT[:10], CONTENT[1000:9000], CONTENT[5:6]]
    assert "object" in paths(store)
    assert store.put("written", b"new")
    assert bytes(store.read("written")) == b"new"


@pytest.mark.s3
@pytest.mark.parametrize("headers", [{}, {"Retry-After": "1"}], ids=["bare", "retry-after"])
@pytest.mark.parametrize("status", [503, 429, 500])
def test_passing_errors_of_a_server_are_tried_again(
    behind: Callable[..., tuple[Store, FaultyProxy]], status: int, headers: dict[str, str]
) -> None:
    fault = Fault("status", status=status, headers=headers, times=2, per_path=True)
    store, proxy = behind(fault)

    with within(20):
        everything(store)

    stats = store.stats()
    assert proxy.struck(fault) == stats.retries >= 6
    assert stats.throttles == (0 if status == 500 else stats.retries)


@pytest.mark.s3
@pytest.mark.parametrize("kind", ["reset", "truncate"])
def test_answers_cut_short_are_asked_for_again(
    behind: Callable[..., tuple[Store, FaultyProxy]], kind: Kind
) -> None:
    fault = Fault(kind, times=2, per_path=True)
    store, proxy = behind(fault)

    with within(20):
        everything(store)

    assert proxy.struck(fault) >= 6


@pytest.mark.s3
@pytest.mark.parametrize("kind", ["whole", "shift"])
def test_an_answer_to_another_range_is_never_taken(
    behind: Callable[..., tuple[Store, FaultyProxy]], kind: Kind
) -> None:
    once = Fault(kind, times=1)
    store, proxy = behind(once)
    assert bytes(store.read_ranges("object", [100], [200])[0]) == CONTENT[100:200]
    assert proxy.struck(once) == 1

    proxy.faults = [Fault(kind)]
    with within(15), pytest.raises(UnreachableError, match="object"):
        store.read_ranges("object", [100], [200])


@pytest.mark.s3
@pytest.mark.parametrize("kind", ["drip", "stall"])
def test_an_answer_that_drips_is_given_up_and_asked_for_again(
    behind: Callable[..., tuple[Store, FaultyProxy]], kind: Kind
) -> None:
    once = Fault(kind, times=1)
    store, proxy = behind(once, deadline_s=1.5)

    with within(10):
        assert bytes(store.read("object")) == CONTENT

    assert proxy.struck(once) == 1
    proxy.faults = [Fault(kind)]
    with within(25), pytest.raises(UnreachableError, match="object"):
        store.read("object")


@pytest.mark.s3
def test_an_object_that_changed_is_not_read_though_the_server_ignores_if_match(
    behind: Callable[..., tuple[Store, FaultyProxy]],
) -> None:
    store, proxy = behind()
    listed = next(iter(store.list())).column("etag")[0].as_py()
    assert bytes(store.read("object", if_match=listed)) == CONTENT

    proxy.faults = [Fault("etag")]

    for read in (
        lambda: store.read("object", if_match=listed),
        lambda: store.read_ranges("object", [0, 7], [5, 9], if_match=listed),
    ):
        with within(5), pytest.raises(ChangedError, match="object"):
            read()


@pytest.mark.s3
def test_a_refusal_in_the_middle_is_told_at_once(
    behind: Callable[..., tuple[Store, FaultyProxy]],
) -> None:
    store, proxy = behind()
    everything(store)
    proxy.faults = [Fault("status", status=403)]
    before = store.stats().retries

    for ask in (
        lambda: store.read("object"),
        lambda: store.head("object"),
        lambda: store.read_ranges("object", [0], [1]),
        lambda: store.put("new", b"."),
        lambda: paths(store),
    ):
        with within(2), pytest.raises(AccessError, match="credentials"):
            ask()
    assert store.stats().retries == before


@pytest.mark.s3
def test_a_server_that_never_recovers_ends_in_an_error_in_time(
    behind: Callable[..., tuple[Store, FaultyProxy]], caplog: pytest.LogCaptureFixture
) -> None:
    store, _ = behind(Fault("status", status=503), deadline_s=2)

    with caplog.at_level(logging.WARNING), within(10), pytest.raises(UnreachableError) as caught:
        store.read("object")

    assert "attempts in" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(caplog.records) == 1, "one line now and then, not one a request"


@pytest.mark.s3
def test_a_throttled_root_is_asked_by_fewer_at_a_time(
    behind: Callable[..., tuple[Store, FaultyProxy]],
) -> None:
    store, proxy = behind(Fault("status", status=503, times=60))

    with within(60), ThreadPoolExecutor(32) as pool:
        found = list(pool.map(lambda _: bytes(store.read("object")), range(100)))

    assert found == [CONTENT] * 100
    assert store.stats().throttles == 60
    assert proxy.asked("/object") == 161  # one of them to begin with
    assert store._requests._limiter.limit < 32  # type: ignore[attr-defined]


@pytest.mark.timeout(60)
def test_the_limit_is_halved_once_an_overload_raised_slowly_and_never_blocks_for_good() -> None:
    limiter = Limiter(most=64)
    for _ in range(40):
        limiter.enter()
    for _ in range(40):
        limiter.leave(answered=True, throttled=True)
    assert limiter.limit == 20, "forty answers of one moment tell of one overload"

    peak, running, lock = 0, 0, threading.Lock()

    def work(_: int) -> None:
        nonlocal peak, running
        limiter.enter()
        with lock:
            running += 1
            peak = max(peak, running)
        time.sleep(0.0005)  # what a request takes
        with lock:
            running -= 1
        limiter.leave(answered=True)

    with within(30), ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(3000)))
    assert limiter.limit == 64

    limiter, peak = Limiter(most=2), 0
    with within(30), ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(400)))
    assert peak == 2
    begun = time.perf_counter()
    for _ in range(10_000):
        limiter.enter()
        limiter.leave(answered=True)
    assert time.perf_counter() - begun < 2


@pytest.mark.s3
def test_statistics_count_what_was_moved(bucket: str) -> None:
    store = open_store(bucket)
    store.read("object")
    store.read_ranges("object", [0, 10], [5, 20])
    store.put("other", [b"abc", memoryview(b"de")])

    found = store.stats()

    assert (found.requests, found.retries, found.throttles) == (4, 0, 0)
    assert (found.read_bytes, found.written_bytes) == (len(CONTENT) + 15, 5)


@pytest.mark.s3
@pytest.mark.parametrize("pays", [True, False])
def test_requester_pays_is_said_with_every_request(
    s3: LocalS3, bucket: str, monkeypatch: pytest.MonkeyPatch, pays: bool
) -> None:
    put_by_boto3(s3, bucket, "folder/tab\there", b"odd")
    with FaultyProxy(s3.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        store = open_store(bucket, requester_pays=pays)
        everything(store)
        assert "folder/tab\there" in paths(store)
        store.read("folder/tab\there")
        store.head("folder/tab\there")
        paths(store, delimiter=True)
        store.delete(["written"])

    said = {request.headers.get("x-amz-request-payer") for request in proxy.requests}
    assert {request.method for request in proxy.requests} >= {"GET", "HEAD", "PUT"}
    assert said == ({"requester"} if pays else {None})
    assert open_store("memory://pays", requester_pays=True).put("a", b"")


@pytest.mark.s3
def test_keys_that_obstore_cannot_address_are_listed_and_read(
    s3: LocalS3, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(bucket)
    names = [f"{number:05}" for number in range(1200)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: store.put(f"sub/{name}", b"."), names))
    for key in ODD:
        put_by_boto3(s3, bucket, key, key.encode())
        put_by_boto3(s3, bucket, f"sub/00600/{key}", key.encode())
    everything_there = sorted(
        ["object", *ODD, *(f"sub/{n}" for n in names), *(f"sub/00600/{key}" for key in ODD)]
    )

    assert paths(store) == everything_there
    assert paths(store, start_after="sub/00600/tab\t") == [
        p for p in everything_there if p > "sub/00600/tab\t"
    ]
    assert paths(store, "sub") == [p for p in everything_there if p.startswith("sub/")]
    assert paths(store, delimiter=True) == sorted(["object", "sub/", *ODD])
    assert paths(open_store(f"{bucket}/sub/00600")) == sorted(ODD)
    put_by_boto3(s3, bucket, "chime/x\x07", b".")  # the server lists it as another key
    assert paths(store, "chime") == ["chime/x\x07"]
    assert paths(store, "chime", delimiter=True) == ["chime/x\x07"]
    everything_there = sorted([*everything_there, "chime/x\x07"])
    for key in ODD:
        info = store.head(key)
        assert (info.size, info.path) == (len(key), key)
        assert bytes(store.read(key, if_match=info.etag)) == key.encode()
        parts = store.read_ranges(key, [0, 2], [3, 4], if_match=info.etag)
        assert [bytes(part) for part in parts] == [key.encode()[:3], key.encode()[2:4]]
        with pytest.raises(ChangedError):
            store.read(key, if_match="0" * 32)
        with pytest.raises(ChangedError):
            store.read_ranges(key, [0], [1], if_match="0" * 32)
        with pytest.raises(ChangedError, match="ends before"):
            store.read_ranges(key, [1], [100])
        for write in (
            lambda key=key: store.put(key, b"."),
            lambda key=key: store.delete([key]),
            lambda: open_store(f"{bucket}/sub//deep").put("new", b"."),
            lambda: open_store(f"{bucket}/a\tb").put("new", b"."),
        ):
            with pytest.raises(StoreError, match="control character"):
                write()
    assert paths(store) == everything_there
    with pytest.raises(NotFoundError, match="no such object"):
        store.read("not\tthere")
    with FaultyProxy(s3.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        for fault in (
            Fault("status", status=503, times=2),
            Fault("truncate", times=2),
            Fault("shift", times=2),
            Fault("whole", times=2),
        ):
            behind_it = open_store(bucket)
            proxy.faults = [fault]
            assert bytes(behind_it.read_ranges(ODD[0], [1], [6])[0]) == ODD[0].encode()[1:6]
            assert behind_it.stats().retries == fault.times
        proxy.faults = [Fault("status", status=403)]
        with pytest.raises(AccessError):
            open_store(bucket).read(ODD[0])


def test_keys_with_empty_and_dotted_parts_are_listed_and_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # SeaweedFS cleans such keys away; Amazon keeps them.
    keys = [f"a/{number:05}" for number in range(3500)]
    keys += ["/lead", "a//b", "a/00700/", "a/01000/../x", "a/./y", "a/03100//", "..", "z/.", "zz"]
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    with keys_only_server(keys) as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        store = open_store("s3://any", deadline_s=5)
        shown = sorted(key if key != "a/00700/" else "a/00700" for key in {*keys} - {"a/00700/"})

        assert [p for p in paths(store) if p != "a/00700"] == [p for p in shown if p != "a/00700"]
        assert paths(store, "a") == sorted(
            key.removesuffix("/") if key == "a/00700/" else key
            for key in keys
            if key.startswith("a/")
        )
        assert paths(store, delimiter=True) == ["..", "/", "a/", "z/", "zz"]
        assert paths(store, "/") == ["/lead"]
        assert paths(store, "a", delimiter=True)[:2] == ["a/./", "a//"]
        assert paths(store, "a//") == ["a//b"]
        assert paths(open_store("s3://any/a/01000/..", deadline_s=5)) == ["x"]
        for key in keys[3500:]:
            assert bytes(store.read(key)) == key.encode()
            assert bytes(store.read_ranges(key, [0], [1])[0]) == key.encode()[:1]
    with keys_only_server(["/lead", "a", "b"]) as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        store = open_store("s3://any", deadline_s=5)
        assert paths(store) == ["/lead", "a", "b"]
        assert paths(store, delimiter=True) == ["/", "a", "b"]


@pytest.mark.s3
def test_keys_that_were_replaced_are_used_by_the_next_request(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, s3: LocalS3
) -> None:
    for name in s3.environment:
        monkeypatch.delenv(name)
    both = ["Admin", "Read", "Write", "List"]
    identities = [
        {
            "name": name,
            "credentials": [{"accessKey": name, "secretKey": f"{name}-secret"}],
            "actions": both,
        }
        for name in ("first", "second")
    ]
    handed_out = tmp_path / "keys.json"
    log = tmp_path / "log"
    program = tmp_path / "hand_out.py"
    program.write_text(
        "import sys\n"
        f"open({str(log)!r}, 'a').write('asked\\n')\n"
        f"sys.stdout.write(open({str(handed_out)!r}).read())\n"
    )
    (tmp_path / "config").write_text(
        f"[default]\nregion = us-east-1\ncredential_process = {sys.executable} {program}\n"
    )
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))

    def hand_out(name: str, *, seconds: int) -> None:
        until = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=seconds)
        keys = {"Version": 1, "AccessKeyId": name, "SecretAccessKey": f"{name}-secret"}
        handed_out.write_text(json.dumps(keys | {"Expiration": until.isoformat()}))

    with LocalS3(identities=identities) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.endpoint)
        server.make_bucket("renewed")
        with FaultyProxy(server.endpoint) as proxy:
            monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
            hand_out("first", seconds=300)
            store = open_store("s3://renewed")
            store.put("object", CONTENT)
            hand_out("second", seconds=3600)
            time.sleep(0.3)  # obstore asks for keys ten times a second

            everything(store)

            used = [r.headers["authorization"].split("Credential=")[1] for r in proxy.requests]
            assert used[0].startswith("first/")
            assert all(key.startswith("second/") for key in used[-5:])
            asked = len(log.read_text().splitlines())
            everything(store)
            assert len(log.read_text().splitlines()) == asked, "good for an hour: not asked again"


@pytest.mark.s3
def test_regions_are_told_or_not_known_and_never_an_error(
    s3: LocalS3, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert machine_region() == "us-east-1"
    assert bucket_region("memory://a") is bucket_region("/a/folder") is None
    with within(10):
        assert bucket_region("s3://no-such-bucket") is None
    with FaultyProxy(s3.endpoint, answer_headers={"x-amz-bucket-region": "eu-west-3"}) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        assert bucket_region(f"{bucket}/some/prefix") == "eu-west-3"
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
        assert bucket_region(bucket) == "eu-west-3", "a refusal names it too"
    with within(20):
        assert bucket_region(bucket) is None, "the proxy is gone"
    monkeypatch.delenv("AWS_REGION")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")
    assert machine_region() is None
    monkeypatch.setenv("AWS_DEFAULT_REGION", "ap-south-1")
    assert machine_region() == "ap-south-1"


def put_by_boto3(s3: LocalS3, bucket: str, key: str, data: bytes) -> None:
    client = boto3.client("s3", endpoint_url=s3.endpoint)
    client.put_object(Bucket=bucket.removeprefix("s3://"), Key=key, Body=data)


@contextmanager
def keys_only_server(keys: list[str]) -> Iterator[str]:
    """As much of S3 as lists and reads these keys as they are; an object holds its own key."""
    ordered = sorted(keys)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_GET(self) -> None:
            split = urlsplit(self.path)
            key = unquote(split.path).removeprefix("/any").removeprefix("/")
            if "list-type" in split.query:
                query = {k: v[0] for k, v in parse_qs(split.query).items()}
                self.answer(200, listing(ordered, query).encode(), {})
                return
            if key not in ordered:
                self.answer(404, b"<Error><Code>NoSuchKey</Code></Error>", {})
                return
            whole, data, headers, status = key.encode(), key.encode(), {}, 200
            if "Range" in self.headers:
                start, end = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
                data, status = whole[start : end + 1], 206
                headers = {"Content-Range": f"bytes {start}-{end}/{len(whole)}"}
            self.answer(status, data, headers)

        def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            always = {"ETag": '"e"', "Last-Modified": "Wed, 21 Oct 2015 07:28:00 GMT"}
            length = {"Content-Length": str(len(body))}
            for name, value in (always | length | headers).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join(timeout=10)
        server.server_close()


def listing(ordered: list[str], query: dict[str, str]) -> str:
    after = query.get("continuation-token") or query.get("start-after", "")
    prefix, limit = query.get("prefix", ""), int(query.get("max-keys", 1000))
    rows: dict[str, str] = {}
    last, more = after, False
    for key in ordered:
        if key <= after or not key.startswith(prefix):
            continue
        folder, slash, _ = key[len(prefix) :].partition(query.get("delimiter", "\0"))
        name = prefix + folder + slash
        if len(rows) == limit and name not in rows:
            more = True
            break
        last = key
        rows[name] = (
            f"<CommonPrefixes><Prefix>{escape(name)}</Prefix></CommonPrefixes>"
            if slash
            else f"<Contents><Key>{escape(key)}</Key><Size>{len(key)}</Size><ETag>e</ETag>"
            "<LastModified>2015-10-21T07:28:00Z</LastModified></Contents>"
        )
    token = f"<NextContinuationToken>{escape(last)}</NextContinuationToken>" if more else ""
    return (
        f"<ListBucketResult><IsTruncated>{str(more).lower()}</IsTruncated>{token}"
        f"{''.join(rows.values())}</ListBucketResult>"
    )
