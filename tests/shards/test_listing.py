"""Every kind of source becomes rows of one catalog; what cannot be one says so in one line."""

import gzip
import hashlib
import io
import json
import tarfile
import threading
from collections.abc import Iterable
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote_plus

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from demo.local_s3 import LocalS3
from shards.catalog import CATALOG, Catalog
from shards.errors import FormatError, NotFoundError, ShardError, SourceError
from shards.listing import list_objects
from shards.store import Store, open_store

HOSTILE = ["a b", "ü/é 😀.jpg", "x#1", "100%", "%2F", "a+b", "quote\"'", "..a", "~t", "*?", "-rf"]
JPEG = b"\xff\xd8\xff\xe0 picture"
PNG = b"\x89PNG\r\n\x1a\n picture"


@pytest.fixture
def memory(request: pytest.FixtureRequest) -> Store:
    name = "".join(letter for letter in request.node.name if letter.isalnum())
    return open_store(f"memory://listing-{name}")


def rows(catalog: Catalog) -> list[dict[str, Any]]:
    found = [row for batch in catalog.batches() for row in batch.to_pylist()]
    return sorted(found, key=lambda row: (row["root"], row["path"], row["start"] or 0))


def uris(catalog: Catalog) -> list[str]:
    return [f"{row['root']}/{row['path']}" for row in rows(catalog)]


def fill(store: Store, paths: Iterable[str]) -> None:
    for path in paths:
        store.put(path, path.encode())


# Buckets and folders


def test_a_folder_is_walked(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    store = open_store(str(raw))
    fill(store, [*HOSTILE, "new\nline"])

    catalog = list_objects([str(raw)], tmp_path / "catalog")

    assert [row["path"] for row in rows(catalog)] == sorted([*HOSTILE, "new\nline"])
    assert {row["root"] for row in rows(catalog)} == {str(raw)}
    assert catalog.listed == len(HOSTILE) + 1
    assert catalog.bytes == sum(len(path.encode()) for path in [*HOSTILE, "new\nline"])
    assert catalog.list_requests == 0
    assert catalog.schema.equals(CATALOG)
    assert catalog.sources == (str(raw),)


def test_a_url_of_a_folder_is_that_folder(tmp_path: Path) -> None:
    fill(open_store(str(tmp_path / "a b")), ["1"])

    catalog = list_objects([f"file://{tmp_path}/a%20b/"], tmp_path / "catalog")

    assert uris(catalog) == [f"{tmp_path}/a b/1"]


def test_memory_keeps_the_container_as_its_root(memory: Store, tmp_path: Path) -> None:
    fill(memory, HOSTILE)

    catalog = list_objects([memory.url], tmp_path / "catalog")

    assert uris(catalog) == sorted(f"{memory.url}/{path}" for path in HOSTILE)
    assert catalog.list_requests >= 1


@pytest.mark.s3
@pytest.mark.timeout(120)
def test_a_bucket_and_its_prefixes_have_the_bucket_as_root(s3: LocalS3, tmp_path: Path) -> None:
    bucket = s3.make_bucket("list-prefix")
    store = open_store(bucket)
    fill(store, [*(f"raw/{path}" for path in HOSTILE), "rawer/1", "raw2"])

    whole = list_objects([bucket], tmp_path / "whole")
    part = list_objects([f"{bucket}/raw/"], tmp_path / "part")

    expected = sorted(f"{bucket}/raw/{path}" for path in HOSTILE)
    assert uris(part) == expected
    assert uris(whole) == sorted([*expected, f"{bucket}/rawer/1", f"{bucket}/raw2"])
    for row in rows(part):
        assert row["etag"] == hashlib.md5(row["path"].encode()).hexdigest()
        assert row["size"] == len(row["path"].encode())
        assert row["modified"] is not None
        assert row["member"] is None
        assert row["start"] is None


@pytest.mark.s3
@pytest.mark.timeout(180)
def test_a_server_that_sorts_by_folders_is_listed_whole(s3: LocalS3, tmp_path: Path) -> None:
    """SeaweedFS lists a/c before a-b; more than a page of both."""
    bucket = s3.make_bucket("list-order")
    paths = [f"a{sign}{number:04d}" for sign in "/-." for number in range(700)]
    fill(open_store(bucket), paths)

    catalog = list_objects([bucket], tmp_path / "catalog")

    assert [row["path"] for row in rows(catalog)] == sorted(paths)
    assert catalog.listed == len(paths)
    assert len(list((tmp_path / "catalog").iterdir())) == len(catalog.files)


def test_several_sources_make_one_catalog_with_all_columns(memory: Store, tmp_path: Path) -> None:
    fill(memory, ["raw/1", "raw/2"])
    memory.put("list.csv", b"uri,label\nraw/1,cat\n")
    memory.put("list.jsonl", b'{"url": "raw/9", "year": 1999}\n')

    sources = [memory.url, f"{memory.url}/list.csv", f"{memory.url}/list.jsonl"]
    catalog = list_objects(sources, tmp_path / "catalog")

    found = [(row["path"], row["label"], row["year"]) for row in rows(catalog)]
    assert sorted(found, key=str) == sorted(
        [
            ("list.csv", None, None),
            ("list.jsonl", None, None),
            ("raw/1", None, None),
            ("raw/1", "cat", None),
            ("raw/2", None, None),
            ("raw/9", None, "1999"),
        ],
        key=str,
    )
    assert catalog.schema.names == [*CATALOG.names, "label", "year"]
    for file in catalog.files:
        assert pq.read_schema(file).equals(catalog.schema)


def test_progress_counts_up_to_all_rows(memory: Store, tmp_path: Path) -> None:
    fill(memory, map(str, range(30)))
    seen: list[int] = []

    catalog = list_objects([memory.url], tmp_path / "catalog", progress=seen.append)

    assert seen == sorted(seen)
    assert seen[-1] == catalog.listed == 30


# Lists


def table(store: Store, name: str, columns: dict[str, list[str]]) -> None:
    """The same table under a name, in the format that the name says."""
    names, rows = list(columns), list(zip(*columns.values(), strict=True))
    plain = name.removesuffix(".gz")
    if plain.endswith(".parquet"):
        written = io.BytesIO()
        pq.write_table(pa.table(columns), written)
        data = written.getvalue()
    elif plain.endswith(".jsonl"):
        lines = [json.dumps(dict(zip(names, row, strict=True))) for row in rows]
        data = "\n".join(lines).encode()
    else:
        mark = "\t" if plain.endswith(".tsv") else ","
        quoted = [['"' + value.replace('"', '""') + '"' for value in row] for row in [names, *rows]]
        data = "\r\n".join(mark.join(row) for row in quoted).encode()
    store.put(name, gzip.compress(data) if name.endswith(".gz") else data)


FORMATS = ["l.parquet", "l.csv", "l.csv.gz", "l.tsv", "l.tsv.gz", "l.jsonl", "l.jsonl.gz"]


@pytest.mark.parametrize("name", FORMATS)
def test_a_list_in_every_format(name: str, memory: Store, tmp_path: Path) -> None:
    hostile = [*HOSTILE, "new\nline", "a,b\tc"]
    addresses = [f"s3://bucket/{path}" for path in hostile]
    labels = [f"{number:03d}" for number in range(len(hostile))]
    etags = [f'"{number:032x}"' for number in range(len(hostile))]
    table(memory, name, {"uri": addresses, "label": labels, "size": labels, "etag": etags})

    catalog = list_objects([f"{memory.url}/{name}"], tmp_path / "catalog")

    found = {row["path"]: row for row in rows(catalog)}
    assert set(found) == set(hostile)
    for number, path in enumerate(hostile):
        row = found[path]
        assert (row["root"], row["label"], row["size"], row["etag"], row["modified"]) == (
            "s3://bucket",
            f"{number:03d}",
            number,
            f"{number:032x}",
            None,
        )
    assert catalog.bytes == sum(range(len(hostile)))
    assert catalog.list_requests == 0


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_text_file_is_an_address_a_line(end: str, memory: Store, tmp_path: Path) -> None:
    lines = ["https://host/a?w=1#2", "gs://b/c d", "", "e#f.jpg", "trailing "]
    memory.put("l.txt", end.join(lines).encode() + b"\nodd\xff.jpg")

    catalog = list_objects([f"{memory.url}/l.txt"], tmp_path / "catalog")

    assert uris(catalog) == sorted(
        [
            "https://host/a?w=1#2",
            "gs://b/c d",
            f"{memory.url}/e#f.jpg",
            f"{memory.url}/trailing ",
            f"{memory.url}/odd\\xff.jpg",
        ]
    )
    assert all(row["size"] is None for row in rows(catalog))


def test_a_relative_path_is_below_the_folder_of_its_list(tmp_path: Path) -> None:
    lists = tmp_path / "lists"
    lists.mkdir()
    (lists / "l.txt").write_text(
        f"img/1.jpg\n./2.jpg\n../3.jpg\n{lists}/4.jpg\n/data/x/5.jpg\nfile:///data/6%20.jpg\n"
    )

    catalog = list_objects([str(lists / "l.txt")], tmp_path / "catalog")

    top = "/" + tmp_path.parts[1]
    assert {(row["root"], row["path"]) for row in rows(catalog)} == {
        (str(lists), "img/1.jpg"),
        (str(lists), "2.jpg"),
        (top, str((tmp_path / "3.jpg").relative_to(top))),
        (str(lists), "4.jpg"),
        ("/data", "x/5.jpg"),
        ("/data", "6 .jpg"),
    }


@pytest.mark.s3
def test_a_list_in_a_bucket(s3: LocalS3, tmp_path: Path) -> None:
    bucket = s3.make_bucket("list-in-bucket")
    store = open_store(bucket)
    table(store, "lists/l.parquet", {"path": ["a.jpg", "deep/b.jpg"]})

    catalog = list_objects([f"{bucket}/lists/l.parquet"], tmp_path / "catalog")

    assert uris(catalog) == [f"{bucket}/lists/a.jpg", f"{bucket}/lists/deep/b.jpg"]


def test_the_address_is_uri_then_url_then_path_then_key(memory: Store, tmp_path: Path) -> None:
    memory.put("l.csv", b"key,path,url\nk1,/p1,u1\n")

    catalog = list_objects([f"{memory.url}/l.csv"], tmp_path / "catalog")

    (row,) = rows(catalog)
    # The index has a column key of its own, and the catalog one called path.
    assert (row["path"], row["user_path"], row["user_key"]) == ("u1", "/p1", "k1")


def test_names_of_columns_may_be_in_upper_case(memory: Store, tmp_path: Path) -> None:
    """As LAION's are."""
    table(memory, "l.parquet", {"TEXT": ["a cat"], "URL": ["https://host/1"], "Size": ["7"]})

    (row,) = rows(list_objects([f"{memory.url}/l.parquet"], tmp_path / "catalog"))

    assert (row["root"], row["path"], row["size"], row["TEXT"]) == ("https://host", "1", 7, "a cat")


def test_only_the_wanted_columns_travel(memory: Store, tmp_path: Path) -> None:
    memory.put("l.csv", b"uri,label,caption,width\na,1,two,3\n")

    def names(columns: list[str]) -> list[str]:
        source = f"{memory.url}/l.csv"
        return list_objects([source], tmp_path / "c", columns=columns).schema.names[7:]

    assert names(["label", "width"]) == ["label", "user_width"]
    assert names([]) == []
    with pytest.raises(SourceError, match=r"'licence'.*'caption', 'label', 'width'"):
        names(["licence"])


def test_parquet_columns_keep_their_types_and_widen(memory: Store, tmp_path: Path) -> None:
    for name, values in {"a": pa.array([1], pa.int32()), "b": pa.array([0.5])}.items():
        written = io.BytesIO()
        words = pa.array(["w"]).dictionary_encode()
        pq.write_table(pa.table({"uri": [name], "score": values, "word": words}), written)
        memory.put(f"{name}.parquet", written.getvalue())

    sources = [f"{memory.url}/{name}.parquet" for name in "ab"]
    catalog = list_objects(sources, tmp_path / "catalog")

    assert [(row["path"], row["score"]) for row in rows(catalog)] == [("a", 1.0), ("b", 0.5)]
    assert catalog.schema.field("score").type == pa.float64()
    assert catalog.schema.field("word").type == pa.string()


def test_a_long_list_is_streamed(tmp_path: Path) -> None:
    """More than one block, window and row group; rows of a later block bring a column."""
    lines = [json.dumps({"uri": f"s3://b/{n:07d}", "text": "x" * 100}) for n in range(120_000)]
    lines.append(json.dumps({"uri": "s3://b/last", "late": {"a": [1]}}))
    (tmp_path / "l.jsonl").write_text("\n".join(lines))

    catalog = list_objects([str(tmp_path / "l.jsonl")], tmp_path / "catalog")

    assert catalog.listed == 120_001
    paths = [p for b in catalog.batches(["path"]) for p in b.column("path").to_pylist()]
    assert sorted(paths) == [*(f"{n:07d}" for n in range(120_000)), "last"]
    (late,) = [row for row in rows(catalog) if row["path"] == "last"]
    assert late["late"] == '{"a": [1]}'


class QuietHandler(SimpleHTTPRequestHandler):
    """A web server that knows no ranges and gives no ETags."""

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.mark.parametrize("name", ["l.csv", "l.parquet"])
def test_a_list_on_a_web_server(name: str, tmp_path: Path) -> None:
    table(open_store(str(tmp_path)), f"lists/{name}", {"url": ["a.jpg", "https://host/b.jpg"]})
    handler = partial(QuietHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever).start()
        try:
            root = f"http://127.0.0.1:{server.server_port}"
            catalog = list_objects([f"{root}/lists/{name}"], tmp_path / "catalog")
        finally:
            server.shutdown()

    assert uris(catalog) == [f"{root}/lists/a.jpg", "https://host/b.jpg"]


# Inventories


@pytest.mark.s3
@pytest.mark.timeout(120)
@pytest.mark.parametrize("kind", ["CSV", "Parquet"])
def test_an_inventory(kind: str, s3: LocalS3, tmp_path: Path) -> None:
    manifest = make_inventory(s3, kind, f"inventory-{kind.lower()}")

    catalog = list_objects([manifest], tmp_path / "catalog")

    found = rows(catalog)
    assert [row["path"] for row in found] == sorted(HOSTILE)
    assert {row["root"] for row in found} == {"s3://raw-images"}
    assert {row["size"] for row in found} == {7}
    assert {row["etag"] for row in found} == {"0" * 32}
    assert {str(row["modified"]) for row in found} == {"2026-11-06 21:32:00+00:00"}
    assert catalog.list_requests == 0
    assert [path.suffix for path in (tmp_path / "catalog").iterdir()] == [".parquet"]


@pytest.mark.s3
@pytest.mark.timeout(120)
def test_a_damaged_inventory_is_refused(s3: LocalS3, tmp_path: Path) -> None:
    manifest = make_inventory(s3, "CSV", "inventory-damaged")
    root, _, path = manifest.rpartition("/raw-images/")
    store = open_store(root)
    (file,) = json.loads(bytes(store.read(f"raw-images/{path}")))["files"]
    store.put(file["key"], b"half")

    with pytest.raises(SourceError, match=r"part-1.*MD5 is .* the manifest says"):
        list_objects([manifest], tmp_path / "catalog")

    store.delete([file["key"]])
    with pytest.raises(NotFoundError, match="part-1"):
        list_objects([manifest], tmp_path / "catalog")


def make_inventory(s3: LocalS3, kind: str, name: str) -> str:
    """As S3 writes it: older versions and delete markers of every key are in it, too."""
    bucket = s3.make_bucket(name)
    store = open_store(bucket)
    header = {"key": "Key", "version_id": "VersionId", "is_latest": "IsLatest"}
    header |= {"is_delete_marker": "IsDeleteMarker", "size": "Size", "e_tag": "ETag"}
    header |= {"last_modified_date": "LastModifiedDate", "encryption_status": "EncryptionStatus"}
    versions = [
        (key, version, latest, deleted)
        for key in [*HOSTILE, "gone.jpg"]
        for version, latest, deleted in [
            ("v1", False, False),
            ("v2", True, key == "gone.jpg"),
        ]
    ]
    time = "2026-11-06T21:32:00.000Z"
    if kind == "CSV":
        lines = [
            ",".join(
                f'"{value}"'
                for value in (
                    "raw-images", quote_plus(key), version, str(latest).lower(),
                    str(deleted).lower(), "" if deleted else 7, "0" * 32, time, "SSE-KMS",
                )
            )
            for key, version, latest, deleted in versions
        ]  # fmt: skip
        data = gzip.compress("\n".join(lines).encode())
        schema = ", ".join(["Bucket", *header.values()])
    else:
        written = io.BytesIO()
        columns: dict[str, Any] = {
            "bucket": ["raw-images"] * len(versions),
            "key": [key for key, *_ in versions],
            "version_id": [version for _, version, *_ in versions],
            "is_latest": [latest for *_, latest, _ in versions],
            "is_delete_marker": [deleted for *_, deleted in versions],
            "size": pa.array([None if v[3] else 7 for v in versions], pa.int64()),
            "e_tag": ["0" * 32] * len(versions),
            "last_modified_date": pa.array([time] * len(versions)).cast(
                pa.timestamp("ms", tz="UTC")
            ),
            "encryption_status": ["SSE-KMS"] * len(versions),
        }
        pq.write_table(pa.table(columns), written)
        data = written.getvalue()
        schema = "message s3.inventory { required binary bucket (UTF8); ... }"
    key = f"raw-images/daily/data/part-1.{'csv.gz' if kind == 'CSV' else 'parquet'}"
    store.put(key, data)
    md5 = hashlib.md5(data).hexdigest()
    manifest = {
        "sourceBucket": "raw-images",
        "destinationBucket": f"arn:aws:s3:::{bucket.removeprefix('s3://')}",
        "version": "2016-11-30",
        "creationTimestamp": "1514944800000",
        "fileFormat": kind,
        "fileSchema": schema,
        "files": [{"key": key, "size": len(data), "MD5checksum": md5}],
    }
    path = "raw-images/daily/2026-11-06T21-32Z/manifest.json"
    store.put(path, json.dumps(manifest).encode())
    return f"{bucket}/{path}"


# Tars


def tar_of(members: dict[str, bytes], kind: int = tarfile.PAX_FORMAT) -> bytes:
    written = io.BytesIO()
    with tarfile.open(fileobj=written, mode="w", format=kind) as tar:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            entry.mtime = 1.5  # a fraction makes a PAX header for each member, as webdataset's do
            tar.addfile(entry, io.BytesIO(data))
    return written.getvalue()


def test_images_in_a_tar_are_rows_with_the_text_beside_them(memory: Store, tmp_path: Path) -> None:
    data = tar_of(
        {
            "a.jpg": JPEG,
            "a.txt": b"a caption\n",
            "a.json": b'{"x": 1}',
            "b.cls": b"7",
            "b.PNG": PNG,
            "b.mask.png": PNG,
            "c.npy": b"numbers",
            "c.txt": b"without an image",
            "d.bin": JPEG,
            "e.txt": b"x" * (64 * 1024 + 1),
            "e.jpeg": JPEG,
            "deep/a.b/f.jpg": JPEG,
        }
    )
    etag = memory.put("t/one.tar", data)

    catalog = list_objects([f"{memory.url}/t/one.tar"], tmp_path / "catalog")

    found = rows(catalog)
    assert [(r["member"], r["txt"], r["json"], r["cls"]) for r in found] == [
        ("a.jpg", "a caption\n", '{"x": 1}', None),
        ("b.PNG", None, None, "7"),
        ("b.mask.png", None, None, "7"),
        ("d.bin", None, None, None),
        ("e.jpeg", None, None, None),
        ("deep/a.b/f.jpg", None, None, None),
    ]
    for row in found:
        assert f"{row['root']}/{row['path']}" == f"{memory.url}/t/one.tar"
        image = data[row["start"] : row["start"] + row["size"]]
        assert image in (JPEG, PNG)
        assert row["etag"] == etag
    assert catalog.bytes == sum(row["size"] for row in found)


@pytest.mark.parametrize("scheme", ["memory", "folder"])
def test_tars_by_pattern(scheme: str, memory: Store, tmp_path: Path) -> None:
    store = memory if scheme == "memory" else open_store(str(tmp_path / "tars"))
    for number in range(12):
        store.put(f"t/{number:06d}.tar", tar_of({f"{number}.jpg": JPEG}))
    store.put("t/deep/x.tar", tar_of({"x.jpg": JPEG}))
    store.put("t/other.tar", tar_of({"other.jpg": JPEG}))

    def members(pattern: str) -> list[str]:
        catalog = list_objects([f"{store.url}/{pattern}"], tmp_path / "catalog")
        return [row["member"] for row in rows(catalog)]

    assert members("t/{000000..000011}.tar") == [f"{number}.jpg" for number in range(12)]
    assert members("t/00000?.tar") == [f"{number}.jpg" for number in range(10)]
    assert members("t/{other,000003}.tar") == ["3.jpg", "other.jpg"]
    assert members("t/*.tar") == [*(f"{number}.jpg" for number in range(12)), "other.jpg"]
    assert members("*/*/x.tar") == ["x.jpg"]
    with pytest.raises(SourceError, match="no tar has such a name"):
        members("t/z*.tar")
    with pytest.raises(NotFoundError, match=r"000012\.tar"):
        members("t/{000011..000012}.tar")


@pytest.mark.s3
def test_tars_in_a_bucket(s3: LocalS3, tmp_path: Path) -> None:
    bucket = s3.make_bucket("list-tars")
    open_store(bucket).put("set/000000.tar", tar_of({"a.jpg": JPEG * 100_000, "b.jpg": JPEG}))

    catalog = list_objects([f"{bucket}/set/*.tar"], tmp_path / "catalog")

    assert [(r["root"], r["path"], r["member"]) for r in rows(catalog)] == [
        (bucket, "set/000000.tar", "a.jpg"),
        (bucket, "set/000000.tar", "b.jpg"),
    ]
    assert catalog.list_requests == 1


# What is no source


def test_what_is_no_source_is_said_in_one_line(memory: Store, tmp_path: Path) -> None:
    memory.put("notes.csv", b"name,age\nx,1\n")
    memory.put("hole.csv", b"uri,x\na,1\n,2\n")
    memory.put("twice.csv", b"uri,x,x\na,1,2\n")
    written = io.BytesIO()
    pq.write_table(pa.table([["a"], ["b"], ["c"]], names=["uri", "x", "x"]), written)
    memory.put("twice.parquet", written.getvalue())
    memory.put("short.csv", b"uri,x\na\n")
    memory.put("size.csv", b"uri,size\na,big\n")
    memory.put("empty.txt", b"")
    memory.put("blank.txt", b"\n\n")
    memory.put("no.parquet", b"not parquet at all")
    memory.put("no.csv.gz", b"not gzip at all")
    memory.put("no.jsonl", b'{"uri": "a"}\nnot json\n')
    memory.put("list.jsonl", b'["a"]\n')
    memory.put("text.tar", b"no tar " * 1000)
    memory.put("texts.tar", tar_of({"a.txt": b"x"}))
    memory.put("i/manifest.json", b"{}")
    orc = {"sourceBucket": "a", "destinationBucket": "arn:aws:s3:::b", "fileFormat": "ORC"}
    orc |= {"fileSchema": "struct<>", "files": []}
    memory.put("orc/manifest.json", json.dumps(orc).encode())
    expected: dict[str, tuple[type[ShardError], str]] = {
        "notes.csv": (SourceError, "none of its columns is one of uri, url, path, key; it has "),
        "hole.csv": (SourceError, "row 2 has no uri"),
        "twice.csv": (SourceError, "two columns are called 'x'"),
        "twice.parquet": (SourceError, "two columns are called 'x'"),
        "short.csv": (SourceError, "not a readable list"),
        "size.csv": (SourceError, "'size' is no number of bytes"),
        "empty.txt": (SourceError, "has no rows"),
        "blank.txt": (SourceError, "has no rows"),
        "no.parquet": (SourceError, "not a readable list"),
        "no.csv.gz": (SourceError, "not a readable list"),
        "no.jsonl": (SourceError, "not a readable list"),
        "list.jsonl": (SourceError, "no JSON object"),
        "missing.csv": (NotFoundError, "missing.csv"),
        "text.tar": (FormatError, "no tar header at byte 0"),
        "texts.tar": (SourceError, "holds no images"),
        "i/manifest.json": (SourceError, "not the manifest of an S3 Inventory"),
        "orc/manifest.json": (SourceError, "ORC.*Parquet or CSV"),
    }

    for name, (kind, message) in expected.items():
        with pytest.raises(kind, match=message) as caught:
            list_objects([f"{memory.url}/{name}"], tmp_path / "catalog")
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)


def test_places_that_cannot_be_listed(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match="holds no objects"):
        list_objects(["memory://listing-nothing"], tmp_path / "catalog")
    with pytest.raises(SourceError, match="holds no objects"):
        list_objects([str(tmp_path / "empty")], tmp_path / "catalog")
    with pytest.raises(NotFoundError, match="no such folder"):
        list_objects([str(tmp_path / "nowhere")], tmp_path / "catalog")
    with pytest.raises(SourceError, match="a web server cannot be listed"):
        list_objects(["https://host/images/"], tmp_path / "catalog")
