"""Anybody's WebDataset tars become a shard set, or are refused with tar, member and byte."""

import io
import json
import shutil
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
import xxhash
from webdataset.tariterators import base_plus_ext

from demo.local_s3 import LocalS3
from pipelines import DataConfig, open_loader
from pipelines.streaming_loader import StreamingLoader
from shards import PackConfig, ShardSet, pack
from shards.adopt import AdoptProgress, AdoptReport, adopt, split_name
from shards.errors import ChangedError, FormatError, PlanError, SourceError
from shards.export import finalize_stable_names, write_wids
from shards.scan import ScanError, TarScan, next_member
from shards.store import open_store
from shards.verify import verify
from tests.support.images import encode, exif, jpeg, picture

Members = Iterable[tuple[str, bytes]]


def write_tar(path: Path, members: Members, *, format: int = tarfile.USTAR_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members:
            facts = tarfile.TarInfo(name)
            facts.size = len(data)
            tar.addfile(facts, io.BytesIO(data))
    return path


def pictures(first: int, count: int) -> list[tuple[str, bytes]]:
    return [(f"{number:06}.jpg", jpeg(number)) for number in range(first, first + count)]


def adopted(source: Path | str, **options: bool) -> AdoptReport:
    return adopt(str(source), workers=1, **options)


def served(url: str) -> dict[str, bytes]:
    """Every live sample's bytes by its key, cut out of the tars as the index says."""
    shard_set = ShardSet.open(url)
    found = {}
    for shard, name in enumerate(shard_set.names):
        index = shard_set.index(shard)
        tar = bytes(shard_set.tars.read(name))
        path = shard_set.records()[shard].index
        keys = pq.read_table(pa.BufferReader(bytes(shard_set.store.read(path))))["key"]
        for place, position in enumerate(index.position.tolist()):
            data = tar[int(index.offset[place]) : int(index.end[place])]
            assert xxhash.xxh3_64_intdigest(data) == index.checksum[place]
            found[f"{name}:{keys[position].as_py()}"] = data
    return found


def trained_ids(url: str, *, steps: int) -> list[int]:
    """Sample ids that the training stream gives in some steps of 6, sorted; all must be sound."""
    config = DataConfig(
        shards=(url,),
        global_batch_size=6,
        block_samples=4,
        view_size=24,
        loader="cpu",
        num_threads=1,
        wait_timeout_s=30,
        max_bad_frac=0.01,
    )
    loader = open_loader(config, seed=1, rank=0, world_size=1, device_index=None)
    assert isinstance(loader, StreamingLoader)
    try:
        found = [i for _ in range(steps) for i in next(loader).sample_ids.tolist()]
        assert loader.stats().replaced == 0
    finally:
        loader.close()
    return sorted(found)


def test_what_webdatasets_own_writer_wrote_is_adopted_and_trains(tmp_path: Path) -> None:
    images = {f"{shard}/{n:04}": jpeg(100 * shard + n) for shard in range(3) for n in range(10)}
    for shard in range(3):
        with webdataset.TarWriter(str(tmp_path / f"{shard}.tar")) as writer:
            for key, data in images.items():
                if key.startswith(f"{shard}/"):
                    writer.write({"__key__": key, "jpg": data, "cls": shard, "json": {"n": key}})
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.tar")}

    report = adopted(tmp_path)

    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.tar")} == before
    assert (report.tars, report.listed, report.samples) == (3, 30, 30)
    assert report.columns == ("cls", "json")
    assert served(report.url) == {f"{key[0]}.tar:{key}": data for key, data in images.items()}
    shard_set = ShardSet.open(str(tmp_path))
    table = shard_set.table(columns=["key", "cls", "json", "uri", "content", "width", "action"])
    assert table["cls"].to_pylist() == [key[0] for key in images]
    assert json.loads(table["json"][0].as_py()) == {"n": "0/0000"}
    assert table["uri"][0].as_py() == f"{tmp_path}/0.tar#0/0000.jpg"
    assert table["content"][0].as_py() == xxhash.xxh3_128_digest(images["0/0000"])
    assert set(table["action"].to_pylist()) == {"keep"}
    assert shard_set.describe().num_samples == 30
    for level in ("list", "decode"):
        assert verify(str(tmp_path), level=level, seed=0, workers=1).faults == ()
    assert trained_ids(str(tmp_path), steps=5) == list(range(30))


def test_img2datasets_shards_are_adopted_with_captions(tmp_path: Path) -> None:
    for shard in range(2):
        members = []
        for n in range(4):
            key = f"{shard:05}{n:04}"
            facts = json.dumps({"caption": f"no. {n}", "url": "http://x"}).encode()
            members += [
                (f"{key}.jpg", jpeg(n)),
                (f"{key}.json", facts),
                (f"{key}.txt", b"caf\xc3\xa9"),
            ]
        write_tar(tmp_path / f"{shard:05}.tar", members, format=tarfile.GNU_FORMAT)
        pq.write_table(pa.table({"key": ["x"]}), tmp_path / f"{shard:05}.parquet")
        (tmp_path / f"{shard:05}_stats.json").write_text("{}")

    report = adopted(tmp_path)

    assert (report.tars, report.samples, report.columns) == (2, 8, ("json", "txt"))
    assert set(ShardSet.open(report.url).table(columns=["txt"])["txt"].to_pylist()) == {"café"}


@pytest.mark.parametrize(
    "name",
    [
        "./a.jpg",
        "dir.v1/a b.jpg",
        "a.jpg",
        "a.JPG",
        "img.v1.jpg",
        "ü" * 30 + "/é.jpg",
        "d" * 90 + "/" + "n" * 60 + ".jpg",
    ],
)
@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_odd_names_are_addressed(tmp_path: Path, name: str, format: int) -> None:
    write_tar(tmp_path / "x.tar", [(name, jpeg(1)), ("z.jpg", jpeg(2))], format=format)

    report = adopted(tmp_path)

    key = split_name(name)
    assert key is not None
    assert served(report.url) == {f"x.tar:{key[0]}": jpeg(1), "x.tar:z": jpeg(2)}
    assert verify(report.url, level="bytes", seed=0, workers=1).is_sound


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_are_addressed(tmp_path: Path, format: int) -> None:
    long = ["n" * 300 + ".jpg", "d" * 120 + "/" + "n" * 130 + ".jpg"]
    members = [(name, jpeg(n)) for n, name in enumerate(long)]
    write_tar(tmp_path / "x.tar", members, format=format)

    report = adopted(tmp_path)

    assert list(served(report.url)) == [f"x.tar:{name[:-4]}" for name in long]
    uris = ShardSet.open(report.url).table(columns=["uri"])["uri"].to_pylist()
    assert uris == [f"{tmp_path}/x.tar#{name}" for name in long]
    assert verify(report.url, level="bytes", seed=0, workers=1).is_sound


def test_keys_are_those_of_webdataset() -> None:
    names = ["a.jpg", "./a.b.jpg", "d.1/a.seg.png", "x y.JPG", "a/b/c.txt", "noext", "d.1/noext"]
    for name in names:
        base, extension = base_plus_ext(name)
        ours = split_name(name)
        assert ours == (None if base is None else (base, extension.lower()))
    assert split_name("d/._a.jpg") is None
    assert split_name("__meta__") is None


def test_a_sample_is_its_image_whatever_lies_beside_it(tmp_path: Path) -> None:
    members = [
        ("a.npy", b"\x93NUMPY" + bytes(100)),
        ("a.jpg", jpeg(1)),
        ("a.mask", encode(picture(1), "PNG")),
        ("a.caption.txt", b"one"),
        ("b.img", encode(picture(2), "PNG")),
        ("b.txt", b"x" * 70_000),
        ("c.depth", encode(picture(3), "PNG")),
        ("c.webp", encode(picture(3), "WEBP")),
        ("d.txt", b"BM is no bitmap here"),
        ("d.jpg", jpeg(4)),
    ]
    write_tar(tmp_path / "x.tar", members)

    report = adopted(tmp_path)

    assert list(served(report.url).values()) == [members[n][1] for n in (1, 4, 7, 9)]
    table = ShardSet.open(report.url).table(columns=["caption.txt", "txt"])
    assert table["caption.txt"].to_pylist() == ["one", None, None, None]
    assert table["txt"].to_pylist() == [None, None, None, "BM is no bitmap here"]


def test_what_training_cannot_use_is_counted_with_its_reason(tmp_path: Path) -> None:
    clear = picture(1).convert("RGBA")
    clear.putalpha(90)
    members = [
        ("good.jpg", jpeg(0)),
        ("cut.jpg", jpeg(1)[:500]),
        ("page.jpg", b"<html>"),
        ("turned.png", encode(picture(1), "PNG", exif=exif(6))),
        ("clear.png", encode(clear, "PNG")),
        ("gif.gif", encode(picture(1), "GIF")),
        ("words.txt", b"no image here"),
        ("turned-jpeg.jpg", jpeg(2, exif=exif(6))),
    ]
    write_tar(tmp_path / "x.tar", members)

    report = adopted(tmp_path)

    wanted = {"html_or_xml": 1, "truncated": 1, "unknown_magic": 1, "unsupported_format": 3}
    assert report.rejected == wanted
    assert (report.listed, report.samples) == (8, 2)
    rejections = ShardSet.open(report.url).rejections().to_pylist()
    assert [row["uri"].partition("#")[2] for row in rejections] == sorted(
        ["cut.jpg", "page.jpg", "turned.png", "clear.png", "gif.gif", "words.txt"]
    )
    assert "'moco-scale pack'" in next(r for r in rejections if "clear" in r["uri"])["detail"]
    index = ShardSet.open(report.url).index(0)
    assert (index.width.tolist(), index.orientation.tolist()) == ([72, 48], [1, 6])
    assert verify(report.url, level="decode", seed=0, workers=1).is_sound


def test_folders_links_and_hidden_files_are_no_samples(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for kind, name in (
            (tarfile.DIRTYPE, "d"),
            (tarfile.SYMTYPE, "l.jpg"),
            (tarfile.LNKTYPE, "h.jpg"),
        ):
            facts = tarfile.TarInfo(name)
            facts.type = kind
            facts.linkname = "d/a.jpg"
            tar.addfile(facts)
        unknown = tarfile.TarInfo("vendor.jpg")
        unknown.type, unknown.size = b"Z", len(jpeg(1))
        tar.addfile(unknown, io.BytesIO(jpeg(1)))
        for name in ("d/._a.jpg", "README", "__info__", "d/a.jpg"):
            facts = tarfile.TarInfo(name)
            facts.size = len(jpeg(1))
            tar.addfile(facts, io.BytesIO(jpeg(1)))

    report = adopted(tmp_path)

    assert list(served(report.url)) == ["x.tar:d/a"]
    assert report.ignored_members == 7


def one_field(path: Path, at: int, value: bytes) -> None:
    """Another field in the header at a byte of a tar, with the right checksum."""
    data = bytearray(path.read_bytes())
    header = at // 512 * 512
    data[at : at + len(value)] = value
    data[header + 148 : header + 156] = b" " * 8
    data[header + 148 : header + 156] = f"{sum(data[header : header + 512]):06o}\0 ".encode()
    path.write_bytes(data)


two = pictures(0, 2)
SECOND = 512 + -(-len(two[0][1]) // 512) * 512  # where the second member of such a tar begins


@pytest.mark.parametrize(
    ("members", "what", "member", "byte"),
    [
        ([("a.jpg", jpeg(0)), ("a.png", b"x")], "a second image of the key 'a'", "a.png", SECOND),
        ([("a.1.jpg", jpeg(0)), ("a.2.jpg", b"")], "a second image", "a.2.jpg", SECOND),
        ([("a.jpg", jpeg(0)), ("a.JPG", b"")], "a second .jpg of the key 'a'", "a.JPG", SECOND),
        ([("a.x", jpeg(0)), ("a.y", jpeg(1))], "a second image", "a.y", SECOND),
        (
            [("a.jpg", jpeg(0)), ("b.jpg", b""), ("a.txt", b"")],
            "the key 'a' again",
            "a.txt",
            SECOND + 512,
        ),
        ([("a.jpg", jpeg(0)), ("b\n.jpg", b"")], "control character", "b\n.jpg", SECOND),
    ],
)  # fmt: skip
def test_samples_that_cannot_be_right_are_refused_with_member_and_byte(
    tmp_path: Path, members: Members, what: str, member: str, byte: int
) -> None:
    write_tar(tmp_path / "a.tar", pictures(0, 1))
    write_tar(tmp_path / "x.tar", members)

    with pytest.raises(ScanError) as caught:
        adopted(tmp_path)

    assert what in str(caught.value)
    assert (caught.value.where, caught.value.member) == (f"{tmp_path}/x.tar", member)
    assert caught.value.byte == byte
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "manifest.parquet").exists()


def damage_cut(path: Path) -> int:
    path.write_bytes(path.read_bytes()[: SECOND + 512 + 100])
    return SECOND


def damage_no_end(path: Path) -> int:
    size = SECOND + 512 + -(-len(two[1][1]) // 512) * 512
    path.write_bytes(path.read_bytes()[:size])
    return size


def damage_header(path: Path) -> int:
    data = bytearray(path.read_bytes())
    data[SECOND] ^= 1
    path.write_bytes(data)
    return SECOND


def damage_joined(path: Path) -> int:
    path.write_bytes(path.read_bytes() + path.read_bytes())
    return -1


def damage_sparse(path: Path) -> int:
    one_field(path, SECOND + 156, b"S")
    return SECOND


def damage_name(path: Path) -> int:
    one_field(path, SECOND, b"\xff\xfe")
    return SECOND


def damage_size(path: Path) -> int:
    one_field(path, SECOND + 124, b"98765432109\0")
    return SECOND


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (damage_cut, "cut short"),
        (damage_no_end, "without the zero blocks of a tar's end"),
        (damage_header, "checksum is wrong"),
        (damage_joined, "bytes behind its end mark"),
        (damage_sparse, "sparse"),
        (damage_name, "not UTF-8"),
        (damage_size, "size is no number"),
    ],
)
def test_a_damaged_tar_is_refused_with_its_byte(tmp_path: Path, damage: object, what: str) -> None:
    path = write_tar(tmp_path / "x.tar", two)
    assert callable(damage)
    byte = damage(path)

    with pytest.raises(ScanError, match=what) as caught:
        adopted(tmp_path)

    assert byte in (-1, caught.value.byte)
    assert not (tmp_path / "manifest.parquet").exists()


@pytest.mark.parametrize("mode", ["w:gz", "w:bz2", "w:xz"])
def test_compressed_tars_are_refused_whatever_their_name(tmp_path: Path, mode: str) -> None:
    with tarfile.open(tmp_path / "x.tar", mode) as tar:
        tar.addfile(tarfile.TarInfo("a.jpg"))
    with pytest.raises(ScanError, match="compressed by"):
        adopted(tmp_path)
    (tmp_path / "x.tar").rename(tmp_path / "x.tar.gz")
    with pytest.raises(FormatError, match="a compressed tar"):
        adopted(tmp_path)


def test_a_sparse_pax_tar_is_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        facts = tarfile.TarInfo("a.jpg")
        facts.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.name": "a.jpg"}
        tar.addfile(facts)

    with pytest.raises(ScanError, match="sparse"):
        adopted(tmp_path)


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("", ["a/0.tar", "a/1.tar", "b/0.tar"]),
        ("a", ["0.tar", "1.tar"]),
        ("a/1.tar", ["1.tar"]),
        ("a/*.tar", ["0.tar", "1.tar"]),
        ("*/0.tar", ["a/0.tar", "b/0.tar"]),
        ("{a,b}/0.tar", ["a/0.tar", "b/0.tar"]),
        ("a/{0..1}.tar", ["0.tar", "1.tar"]),
        ("a/[1-9].tar", ["1.tar"]),
        ("*.tar", None),
        ("a/{0..2}.tar", None),
        ("c", None),
    ],
)
def test_patterns_and_prefixes_name_the_tars(
    tmp_path: Path, pattern: str, names: list[str] | None
) -> None:
    for number, name in enumerate(("a/0.tar", "a/1.tar", "b/0.tar")):
        write_tar(tmp_path / name, pictures(number, 1))
    source = f"{tmp_path}/{pattern}"

    if names is None:
        with pytest.raises(
            (SourceError, FormatError, Exception), match=r"not there|no tar|no such"
        ):
            adopted(source)
        return
    report = adopted(source)

    assert ShardSet.open(report.url).names == names


def test_an_interrupted_adoption_reads_only_what_is_left(tmp_path: Path) -> None:
    for number in range(3):
        write_tar(tmp_path / f"{number}.tar", pictures(number, 3))
    write_tar(tmp_path / "2.tar", [("a.jpg", jpeg(0)), ("a.png", b"")])
    with pytest.raises(FormatError):
        adopted(tmp_path)
    assert not (tmp_path / "manifest.parquet").exists()
    kept = {path: path.read_bytes() for path in tmp_path.glob("index/*")}
    assert len(kept) == 2
    write_tar(tmp_path / "2.tar", pictures(2, 3))
    seen: list[AdoptProgress] = []

    report = adopt(str(tmp_path), workers=1, progress=seen.append)

    assert report.resumed_tars == 2
    assert [(step.done, step.total) for step in seen] == [(3, 3)]
    shutil.rmtree(tmp_path / "index")
    (tmp_path / "manifest.parquet").rename(tmp_path / "first.parquet")
    shutil.rmtree(tmp_path / "manifests")
    adopt(str(tmp_path), workers=2)
    assert (tmp_path / "manifest.parquet").read_bytes() == (tmp_path / "first.parquet").read_bytes()
    assert {path: path.read_bytes() for path in kept} == kept


def test_a_changed_tar_is_read_again_and_only_with_overwrite(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", pictures(0, 3))
    write_tar(tmp_path / "1.tar", pictures(3, 3))
    before = adopted(tmp_path)
    dead = {"shard": [0, 1], "position": [1, 2], "reason": ["takedown", "duplicate"]}
    table = pa.table({**dead, "detail": ["", ""]})
    ShardSet.open(str(tmp_path)).bury(
        table.set_column(0, "shard", table["shard"].cast(pa.int32())).set_column(
            1, "position", table["position"].cast(pa.int32())
        )
    )
    assert adopted(tmp_path).was_complete
    write_tar(tmp_path / "1.tar", pictures(6, 3))
    write_tar(tmp_path / "2.tar", pictures(9, 3))

    with pytest.raises(PlanError, match="new or changed"):
        adopted(tmp_path)
    report = adopted(tmp_path, overwrite=True)

    assert (report.resumed_tars, report.version, report.was_complete) == (1, 3, False)
    assert before.set_id != report.set_id
    found = ShardSet.open(str(tmp_path))
    assert found.samples.tolist() == [2, 3, 3]  # what was dead in 0.tar is
    assert json.loads(found.metadata["dead"]) == {"takedown": 1}
    assert verify(report.url, level="decode", seed=0, workers=1).is_sound
    (tmp_path / "2.tar").unlink()
    with pytest.raises(PlanError, match="are gone"):
        adopted(tmp_path)


def test_a_tar_that_changes_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", pictures(0, 3))
    store = open_store(str(tmp_path))
    etag = store.head("0.tar").etag
    write_tar(tmp_path / "0.tar", pictures(4, 3))
    with TarScan(store, "0.tar", size=100, etag=etag) as scan, pytest.raises(ChangedError):
        next_member(scan)


def test_tars_that_stay_where_nobody_may_write_are_adopted_elsewhere(tmp_path: Path) -> None:
    for shard in range(2):
        write_tar(tmp_path / "raw" / f"{shard}.tar", pictures(6 * shard, 6))
    before = sorted((tmp_path / "raw").iterdir())
    home = str(tmp_path / "set")

    report = adopt(str(tmp_path / "raw"), home, workers=2)

    assert report.url == home
    assert sorted((tmp_path / "raw").iterdir()) == before
    assert list(served(home).values()) == [jpeg(n) for n in range(12)]
    assert trained_ids(home, steps=2) == list(range(12))
    assert verify(home, level="decode", seed=0, workers=2).is_sound
    assert adopt(str(tmp_path / "raw"), home, workers=1).was_complete
    write_tar(tmp_path / "other" / "0.tar", pictures(0, 1))
    with pytest.raises(PlanError, match="another destination"):
        adopt(str(tmp_path / "other"), home, workers=1)
    with pytest.raises(PlanError, match="adopt the copies"):
        finalize_stable_names(home)
    write_wids(home)
    shards = json.loads(Path(home, "wids.json").read_text())["shardlist"]
    assert [shard["url"] for shard in shards] == [str(path) for path in before]


def test_tars_without_a_usable_sample_are_left_out(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", [])
    write_tar(tmp_path / "1.tar", pictures(0, 2))
    write_tar(tmp_path / "2.tar", [("a.jpg", b"<html>")])

    report = adopted(tmp_path)

    assert ShardSet.open(report.url).names == ["1.tar"]
    assert (report.tars, report.empty_tars, report.listed) == (3, 2, 3)
    assert adopted(tmp_path).was_complete
    assert verify(report.url, level="list", seed=0, workers=1).is_sound


def test_no_usable_sample_at_all_leaves_nothing_behind(tmp_path: Path) -> None:
    write_tar(tmp_path / "2.tar", [("a.jpg", b"<html>")])

    with pytest.raises(SourceError, match="html_or_xml 1"):
        adopted(tmp_path)

    assert [path.name for path in tmp_path.iterdir()] == ["2.tar"]


def test_a_packed_set_is_not_adopted(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "a.jpg").write_bytes(jpeg(1))
    pack(str(tmp_path / "raw"), str(tmp_path / "set"), PackConfig(workers=1))

    with pytest.raises(PlanError, match="was packed"):
        adopted(tmp_path / "set", overwrite=True)


def test_a_packed_set_that_lost_its_index_can_be_adopted(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    for number in range(5):
        (tmp_path / "raw" / f"{number}.jpg").write_bytes(jpeg(number))
    pack(str(tmp_path / "raw"), str(tmp_path / "set"), PackConfig(workers=1))
    before = ShardSet.open(str(tmp_path / "set")).index(0)

    report = adopted(tmp_path / "set" / "shards")

    after = ShardSet.open(report.url).index(0)
    for name in ("offset", "length", "checksum", "width", "height", "orientation"):
        assert np.array_equal(getattr(before, name), getattr(after, name))


@pytest.mark.s3
def test_tars_in_a_bucket_are_adopted_in_place(s3: LocalS3, tmp_path: Path) -> None:
    url = s3.make_bucket("adopt")
    store = open_store(url)
    for number in range(3):
        path = write_tar(tmp_path / "x.tar", pictures(5 * number, 5), format=tarfile.PAX_FORMAT)
        store.put(f"set/{number:05}.tar", path.read_bytes())

    report = adopt(f"{url}/set/{{00000..00002}}.tar", workers=2)

    assert report.url == f"{url}/set"
    assert len(served(report.url)) == 15
    etags = ShardSet.open(report.url).table(columns=["etag", "uri"])
    assert etags["etag"][0].as_py() == store.head("set/00000.tar").etag
    assert etags["uri"][0].as_py() == f"{url}/set/00000.tar#000000.jpg"
    assert adopt(f"{url}/set", workers=1).was_complete
    assert verify(report.url, level="bytes", seed=0, workers=1).is_sound
