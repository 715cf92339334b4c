"""The one door to object storage: memory, folders with hostile names, and a real S3 server."""

import logging
import os
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem
from fsspec.spec import AbstractFileSystem

from demo.local_s3 import LocalS3
from shards.errors import (
    AccessError,
    AlreadyExistsError,
    ChangedError,
    NotFoundError,
    StoreError,
    UnreachableError,
)
from shards.folder import FolderStore
from shards.store import Store, open_store
from tests.support.faulty_proxy import Fault, FaultyProxy

HOSTILE = [
    "a b.jpg",
    "ü/é 😀.jpg",
    "x#1",
    "h#a.png",
    "p%20q.jpg",
    "100%.jpg",
    "%2F.jpg",
    ".hidden",
    "a\\b.jpg",
    "tab\tq.jpg",
    "new\nline.jpg",
    "\x01control.jpg",
    "q?.jpg",
    "trailing ",
    "~t",
    "*.jpg",
    "[x].jpg",
    "quote\"'.jpg",
    "..a",
    "a..b/c.d.jpg",
    "\\xff literal.jpg",
    "-rf",
]


class MovingFiles(DirFileSystem):  # type: ignore[misc]
    """An fsspec file system in this process, as sftp is one elsewhere: files that can be moved."""

    protocol = "movingfiles"
    top = ""

    def __init__(self) -> None:
        Path(self.top).mkdir(exist_ok=True)
        super().__init__(path=self.top, fs=LocalFileSystem())


class PlainFiles(MovingFiles):
    """One whose files cannot be moved."""

    protocol = "plainfiles"
    mv = AbstractFileSystem.mv


for scheme in (MovingFiles, PlainFiles):
    fsspec.register_implementation(scheme.protocol, scheme, clobber=True)


@pytest.fixture
def fsspec_top(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where the two keep their files during one test."""
    for scheme in (MovingFiles, PlainFiles):
        scheme.clear_instance_cache()
    monkeypatch.setattr(MovingFiles, "top", str(tmp_path / "top"))
    return tmp_path / "top"


@pytest.fixture(
    params=[
        "memory",
        "folder",
        "movingfiles",
        "plainfiles",
        pytest.param("s3", marks=pytest.mark.s3),
    ]
)
def store(request: pytest.FixtureRequest, tmp_path: Path, fsspec_top: Path) -> Store:
    """The same promises for each kind of store."""
    if request.param.endswith("files"):
        fsspec_top.joinpath("some/prefix").mkdir(parents=True)
        return open_store(f"{request.param}://some/prefix")
    name = "".join(c for c in request.node.name if c.isalnum())[-40:].lower()
    if request.param == "s3":
        server: LocalS3 = request.getfixturevalue("s3")
        return open_store(f"{server.make_bucket('b' + name)}/some/prefix")
    return open_store(f"memory://{name}" if request.param == "memory" else str(tmp_path / "root"))


def paths(store: Store, prefix: str = "", **options: object) -> list[str]:
    return [p for page in store.list(prefix, **options) for p in page.column("path").to_pylist()]


def test_what_is_put_is_read_listed_and_deleted(store: Store) -> None:
    written = store.put("folder/a.bin", [b"one ", memoryview(b"two"), b"", b" three"])
    store.put("folder/b c.bin", b"x" * 1000)

    rows = [row for page in store.list() for row in page.to_pylist()]
    info = store.head("folder/a.bin")

    assert bytes(store.read("folder/a.bin")) == b"one two three"
    assert sorted((row["path"], row["size"]) for row in rows) == [
        ("folder/a.bin", 13),
        ("folder/b c.bin", 1000),
    ]
    assert {row["etag"] for row in rows if row["size"] == 13} == {written} == {info.etag}
    assert '"' not in written
    assert (info.path, info.size) == ("folder/a.bin", 13)
    assert all(row["modified"].tzinfo is not None for row in rows)
    store.delete(["folder/a.bin", "folder/a.bin", "never/there"])
    assert paths(store) == ["folder/b c.bin"]
    with pytest.raises(NotFoundError, match=r"folder/a\.bin"):
        store.read("folder/a.bin")


def test_listing_by_prefix_start_and_level(store: Store) -> None:
    for name in ("a/1", "a/2", "a-b/3", "a/c/4", "z"):
        store.put(name, b".")

    assert sorted(paths(store, "a")) == ["a/1", "a/2", "a/c/4"]
    # a-b/3 comes after a/1 on the S3 server of the tests, which lists folder by folder.
    assert sorted({*paths(store, start_after="a/1")} - {"a-b/3"}) == ["a/2", "a/c/4", "z"]
    assert paths(store, delimiter=True) == ["a-b/", "a/", "z"]
    assert paths(store, "a", delimiter=True) == ["a/1", "a/2", "a/c/"]
    assert paths(store, "nothing/here") == []


def test_a_create_only_write_has_one_winner(store: Store) -> None:
    store.put("before", b".")
    gate = threading.Barrier(6)

    def write(number: int) -> bool:
        gate.wait(timeout=30)
        try:
            store.put("marker", f"writer {number}".encode(), create_only=True)
        except AlreadyExistsError:
            return False
        return True

    with ThreadPoolExecutor(6) as pool:
        won = list(pool.map(write, range(6)))

    assert won.count(True) == 1
    assert bytes(store.read("marker")) == f"writer {won.index(True)}".encode()


def test_reads_are_bound_to_an_etag(store: Store) -> None:
    first = store.put("object", b"first content")

    assert bytes(store.read("object", if_match=first)) == b"first content"
    assert [bytes(r) for r in store.read_ranges("object", [0], [5], if_match=first)] == [b"first"]
    time.sleep(0.01)  # a file's ETag is its time and size
    store.put("object", b"second content")
    for read in (
        lambda: store.read("object", if_match=first),
        lambda: store.read_ranges("object", [0, 3], [5, 9], if_match=first),
    ):
        with pytest.raises(ChangedError, match="object"):
            read()


def test_ranges_come_back_in_order_and_never_short(store: Store) -> None:
    content = bytes(range(256)) * 40
    store.put("object", content)
    starts, ends = [9000, 0, 5, 5, 10_239], [9100, 1, 6, 5000, 10_240]

    found = store.read_ranges("object", starts, ends)

    assert [bytes(part) for part in found] == [
        content[a:b] for a, b in zip(starts, ends, strict=True)
    ]
    for start, end in ((10_000, 10_241), (20_000, 20_001)):
        begun = time.monotonic()
        with pytest.raises(ChangedError, match="object"):
            store.read_ranges("object", [0, start], [1, end])
        assert time.monotonic() - begun < 2, "a retry cannot help"


def test_addresses_that_cannot_be_one_are_refused(tmp_path: Path) -> None:
    for url in ("", "s3:/bucket", "s3://", "memory://", "nonsense://bucket/x"):
        with pytest.raises(StoreError) as caught:
            open_store(url)
        assert "\n" not in str(caught.value)
    with pytest.raises(StoreError, match=r"unknown scheme 'nonsense'"):
        open_store("nonsense://bucket/x")

    assert open_store(f"file://{tmp_path}/a%20b").url == f"{tmp_path}/a b"
    assert open_store(f"{tmp_path}/x/../y/").url == f"{tmp_path}/y"
    assert open_store("memory://name/").url == "memory://name"


def test_an_archive_is_read_by_fsspec_and_never_written(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for name in ("cats/b.jpg", "cats/a.jpg", "dogs/c.jpg", "top.jpg"):
            archive.writestr(name, name * 10)
    store = open_store(f"zip://::{tmp_path}/images.zip")
    cats = open_store(f"zip://cats::{tmp_path}/images.zip")

    row = next(iter(store.list())).to_pylist()[0]

    assert paths(store) == ["cats/a.jpg", "cats/b.jpg", "dogs/c.jpg", "top.jpg"]
    assert paths(store, start_after="cats/a.jpg") == ["cats/b.jpg", "dogs/c.jpg", "top.jpg"]
    assert paths(store, "cats") == ["cats/a.jpg", "cats/b.jpg"]
    assert paths(store, delimiter=True) == ["cats/", "dogs/", "top.jpg"]
    assert paths(cats) == ["a.jpg", "b.jpg"]
    assert bytes(cats.read("a.jpg")) == b"cats/a.jpg" * 10
    assert cats.uri("a.jpg") == f"zip://cats/a.jpg::{tmp_path}/images.zip"
    assert bytes(store.read(row["path"], if_match=row["etag"])) == b"cats/a.jpg" * 10
    with pytest.raises(ChangedError, match="changed"):
        store.read(row["path"], if_match="another")
    with pytest.raises(NotFoundError, match=r"no\.jpg"):
        store.read("no.jpg")
    with pytest.raises(StoreError, match="new"):
        store.put("new", b".")


def test_what_fsspec_cannot_open_is_said_in_one_line(tmp_path: Path) -> None:
    for url in (f"zip://::{tmp_path}/missing.zip", "root://host/path", "gdrive://folder"):
        with pytest.raises(StoreError) as caught:
            open_store(url, deadline_s=1)
        assert "\n" not in str(caught.value)
        assert url in str(caught.value)


def test_an_fsspec_write_that_fails_leaves_the_old_object_and_no_litter(
    fsspec_top: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store("movingfiles://set")
    store.put("object", b"old")
    half_written = LocalFileSystem.pipe_file

    def breaks_off(self: LocalFileSystem, path: str, value: bytes, **options: object) -> None:
        half_written(self, path, value[: len(value) // 2], **options)
        raise OSError("the line went dead")

    monkeypatch.setattr(LocalFileSystem, "pipe_file", breaks_off)

    with pytest.raises(UnreachableError, match="the line went dead"):
        store.put("object", b"new and longer")

    assert bytes(store.read("object")) == b"old"
    assert [p.name for p in (fsspec_top / "set").iterdir()] == ["object"]


def test_a_folder_with_hostile_names_reads_back_what_it_lists(tmp_path: Path) -> None:
    for name in HOSTILE:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    bad = os.fsencode(tmp_path) + b"/not \xff utf-8.jpg"
    with open(bad, "wb") as file:  # noqa: PTH123  # a Path holds no such name as bytes
        file.write(b"bytes")
    store = open_store(str(tmp_path))

    listed = paths(store)

    assert sorted(listed) == listed, "in the order of the paths"
    assert set(listed) == {*HOSTILE, "not \\xff utf-8.jpg"}
    assert bytes(store.read("not \\xff utf-8.jpg")) == b"bytes"
    for name in HOSTILE:
        assert bytes(store.read(name)) == name.encode()
        assert bytes(store.read_ranges(name, [0], [1])[0]) == name.encode()[:1]


def test_a_folder_follows_links_but_never_in_circles(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    (root / "sub").mkdir(parents=True)
    outside.mkdir()
    (outside / "far.jpg").write_bytes(b"far")
    (root / "near.jpg").write_bytes(b"near")
    (root / "link.jpg").symlink_to(root / "near.jpg")
    (root / "broken.jpg").symlink_to(tmp_path / "nowhere")
    (root / "linked").symlink_to(outside)
    (root / "sub" / "circle").symlink_to(root)
    os.mkfifo(root / "pipe")
    store = open_store(str(root))

    with caplog.at_level(logging.WARNING):
        assert paths(store) == ["link.jpg", "linked/far.jpg", "near.jpg"]

    assert bytes(store.read("linked/far.jpg")) == b"far"
    assert "circle" in caplog.text
    assert "broken.jpg" in caplog.text


def test_a_folder_is_walked_once_whatever_links_lead_to_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    (root / "real" / "deep").mkdir(parents=True)
    (outside / "sub").mkdir(parents=True)
    (root / "real" / "deep" / "a.jpg").write_bytes(b"a")
    (outside / "sub" / "b.jpg").write_bytes(b"b")
    (root / "first").symlink_to(outside)
    (root / "second").symlink_to(outside)
    (root / "third").symlink_to(outside / "sub")
    (outside / "sub" / "itself").symlink_to(outside / "sub")
    (root / "before-real").symlink_to(root / "real")  # sorted first, but real paths win
    (root / "real" / "parent").symlink_to("..")
    (root / "up").symlink_to(tmp_path)
    store = open_store(str(root))

    with caplog.at_level(logging.WARNING):
        assert paths(store) == ["first/sub/b.jpg", "real/deep/a.jpg"]

    left_out = ["before-real", "real/parent", "up", "second", "third", "first/sub/itself"]
    assert isinstance(store, FolderStore)
    assert store.unfollowed_links == len(left_out) == len(caplog.records)
    assert all(f"{root}/{name}: not followed" in caplog.text for name in left_out)
    assert paths(store, delimiter=True)[-1:] == ["third/"]
    assert paths(store, "before-real") == ["before-real/deep/a.jpg"], "asked for by name"


def test_a_folder_lets_no_path_out(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"secret")
    store = open_store(str(tmp_path / "root"))

    for path in ("../secret", "a/../../secret", "/etc/passwd", "", "a//b", "./a", "nul\0"):
        with pytest.raises(StoreError):
            store.put(path, b"x")
        with pytest.raises(StoreError):
            store.read(path)

    assert (tmp_path / "secret").read_bytes() == b"secret"


def test_opening_a_folder_leaves_no_trace_and_writing_no_litter(tmp_path: Path) -> None:
    root = tmp_path / "deep" / "root"
    store = open_store(str(root))

    with pytest.raises(NotFoundError, match="no such folder"):
        paths(store)
    assert not root.exists()
    store.put("a/b/c", b"1")
    with pytest.raises(AlreadyExistsError):
        store.put("a/b/c", b"2", create_only=True)
    with pytest.raises(AccessError, match="in the way"):
        store.put("a/b/c/d", b"3")
    assert [p.relative_to(root).as_posix() for p in root.rglob("*")] == ["a", "a/b", "a/b/c"]
    store.delete(["a/b/c"])
    assert not root.exists()


def test_an_unfinished_write_is_not_listed(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    store.put("whole", b"1")
    left_by_a_kill = tmp_path / ".moco-scale-unfinished-0"
    left_by_a_kill.write_bytes(b"ha")

    assert paths(store) == ["whole"]


@pytest.mark.s3
def test_s3_complaints_name_the_place_and_what_to_do(
    s3: LocalS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = s3.make_bucket("complaints")
    open_store(bucket).put("object", b".")

    missing = open_store("s3://no-such-bucket-here")
    for ask in (lambda: paths(missing), lambda: missing.read("x")):
        with pytest.raises(NotFoundError, match=r"s3://no-such-bucket-here.*no such bucket"):
            ask()
    with pytest.raises(NotFoundError, match=r"s3://complaints/absent.*no such object"):
        open_store(bucket).read("absent")

    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    refused = open_store(bucket)
    for ask in (
        lambda: paths(refused),
        lambda: refused.read("object"),
        lambda: refused.put("object", b"2"),
        lambda: refused.delete(["object"]),
    ):
        with pytest.raises(AccessError, match=r"s3://complaints.*credentials"):
            ask()


@pytest.mark.s3
def test_s3_without_credentials_says_so_at_once(
    s3: LocalS3, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    del s3  # only for its environment, which this test takes away
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")

    with pytest.raises(AccessError, match="AWS_ACCESS_KEY_ID"):
        open_store("s3://some-bucket")


@pytest.mark.s3
def test_a_dead_endpoint_fails_in_bounded_time(
    s3: LocalS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    del s3
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    begun = time.monotonic()

    with pytest.raises(UnreachableError, match="s3://some-bucket") as caught:
        paths(open_store("s3://some-bucket"))

    assert time.monotonic() - begun < 60
    assert "\n" not in str(caught.value)


@pytest.mark.s3
def test_s3_credentials_may_come_from_a_profile(
    s3: LocalS3, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bucket = s3.make_bucket("by-profile")
    secrets = tmp_path / "credentials"
    secrets.write_text(
        "[work]\n"
        f"aws_access_key_id = {s3.environment['AWS_ACCESS_KEY_ID']}\n"
        f"aws_secret_access_key = {s3.environment['AWS_SECRET_ACCESS_KEY']}\n"
    )
    settings = tmp_path / "config"
    settings.write_text(f"[profile work]\nregion = us-east-1\nendpoint_url = {s3.endpoint}\n")
    for name in s3.environment:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(secrets))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(settings))
    monkeypatch.setenv("AWS_PROFILE", "work")

    open_store(bucket).put("object", b"by profile")

    assert bytes(open_store(bucket).read("object")) == b"by profile"


@pytest.mark.s3
def test_a_long_s3_listing_comes_in_pages_and_whole(s3: LocalS3) -> None:
    store = open_store(s3.make_bucket("many-objects"))
    names = [f"{number:05}" for number in range(1100)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: store.put(name, b""), names))

    assert paths(store) == names
    assert paths(store, start_after="01050") == names[1051:]


@pytest.mark.s3
def test_answers_that_break_off_are_asked_for_again(
    s3: LocalS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(s3.make_bucket("broken-answers"))
    names = [f"{number:05}" for number in range(1500)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: store.put(name, name.encode()), names))
    content = bytes(range(256)) * 400
    store.put("object", content)
    # Asked for again, the second page is the first one behind the last path.
    second_page = Fault("truncate", "continuation-token", times=1)
    again = Fault("truncate", "start-after", times=1)
    first_looks = Fault("truncate", "/object", times=2)

    with FaultyProxy(s3.endpoint, [second_page, again, first_looks]) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        faulty = open_store("s3://broken-answers")
        assert paths(faulty) == [*names, "object"]
        assert bytes(faulty.read("object")) == content
        proxy.faults.append(Fault("truncate", "/object", times=3))
        found = faulty.read_ranges("object", [10, 50_000], [20_000, 90_000])
        assert [bytes(part) for part in found] == [content[10:20_000], content[50_000:90_000]]
    assert proxy.struck(second_page) == proxy.struck(again) == 1
    assert proxy.struck(first_looks) == 2
    assert faulty.stats().retries == 7


@pytest.mark.s3
def test_answers_that_always_break_off_end_in_an_error_and_never_in_less(
    s3: LocalS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(s3.make_bucket("always-broken"))
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: store.put(f"{number:05}", b"12345678"), range(1100)))

    faults = [Fault("truncate", "continuation-token"), Fault("truncate", "start-after")]
    with FaultyProxy(s3.endpoint, faults) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        faulty = open_store("s3://always-broken", deadline_s=2)
        with pytest.raises(UnreachableError, match="s3://always-broken") as caught:
            paths(faulty)
    assert "\n" not in str(caught.value)
