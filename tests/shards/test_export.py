"""Other readers read a set through what is exported for them, and get the same bytes."""

import gc
import io
import json
import tarfile
import warnings
from pathlib import Path

import pyarrow as pa
import pytest
import webdataset
from braceexpand import braceexpand

from demo.local_s3 import LocalS3
from shards import ShardSet
from shards.adopt import adopt
from shards.errors import FormatError
from shards.export import finalize_stable_names, write_idx, write_wids
from shards.store import open_store
from tests.support.images import jpeg
from tests.support.shard_sets import make_shard_set, stored


@pytest.fixture
def packed(tmp_path: Path) -> ShardSet:
    """30 samples in 3 shards; JPEG and PNG."""
    return make_shard_set(tmp_path / "packed", count=30, shard_samples=10)


def bury(shard_set: ShardSet, *dead: tuple[int, int]) -> ShardSet:
    columns = {
        "shard": pa.array([shard for shard, _ in dead], pa.int32()),
        "position": pa.array([position for _, position in dead], pa.int32()),
        "reason": ["takedown"] * len(dead),
        "detail": [""] * len(dead),
    }
    return shard_set.bury(pa.table(columns))


def live(shard_set: ShardSet) -> list[bytes]:
    ids = shard_set.table(columns=["key"])["sample_id"].to_pylist()
    return [stored(shard_set, sample_id) for sample_id in ids]


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for name, data in members:
            facts = tarfile.TarInfo(name)
            facts.size = len(data)
            tar.addfile(facts, io.BytesIO(data))


def read_with_dali(
    tars: list[Path], indexes: list[Path], extensions: str, count: int
) -> list[bytes]:
    """What readers.webdataset gives through the index files, sample by sample."""
    from nvidia.dali import fn, pipeline_def

    @pipeline_def(batch_size=1, num_threads=1, device_id=None)
    def reading() -> object:
        return fn.readers.webdataset(
            paths=[str(path) for path in tars],
            index_paths=[str(path) for path in indexes],
            ext=[extensions],
        )

    pipeline = reading()
    pipeline.build()
    (size,) = [meta["epoch_size"] for meta in pipeline.reader_meta().values()]
    assert size == count
    return [bytes(pipeline.run()[0].at(0)) for _ in range(size)]


@pytest.mark.dali
def test_dali_reads_the_live_samples_through_its_index_files(packed: ShardSet) -> None:
    everything = [stored(packed, n) for n in range(30)]
    buried = bury(packed, (0, 2), (0, 3), (2, 9))

    report = write_idx(packed.url)

    assert (report.files, report.samples, report.left_out) == (3, 27, ())
    tars = [Path(packed.url, name) for name in packed.names]
    indexes = [Path(packed.url, "idx", f"{tar.stem}.idx") for tar in tars]
    found = read_with_dali(tars, indexes, "jpg;png", 27)
    assert found == [data for n, data in enumerate(everything) if n not in (2, 3, 29)]
    first = indexes[0].read_text().splitlines()
    assert first[0] == "v1.2 8"
    row = buried.index(0)
    assert first[1].split()[1:3] == [str(row.offset[0]), str(row.length[0])]
    assert first[1].endswith("000000000000.jpg")


@pytest.mark.dali
def test_dali_reads_adopted_tars_with_spaces_and_long_names(tmp_path: Path) -> None:
    names = ["a b.jpg", "x" * 150 + ".jpg", "d/c.JPG"]
    members = [(name, jpeg(n)) for n, name in enumerate(names)]
    write_tar(tmp_path / "0.tar", [*members, ("d/c.txt", b"words"), ("gone.jpg", b"<html>")])
    write_tar(tmp_path / "1.tar", [("plain#1.jpg", jpeg(7))])
    adopt(str(tmp_path), workers=1)

    write_idx(str(tmp_path))

    texts = [(tmp_path / "idx" / f"{n}.idx").read_text() for n in range(2)]
    assert texts[0].startswith("v1.1 3\njpg ")
    assert texts[1] == f"v1.2 1\njpg 512 {len(jpeg(7))} plain#1.jpg\n"
    tars = [tmp_path / f"{n}.tar" for n in range(2)]
    indexes = [tmp_path / "idx" / f"{n}.idx" for n in range(2)]
    found = read_with_dali(tars, indexes, "jpg", 4)
    assert found == [jpeg(0), jpeg(1), jpeg(2), jpeg(7)]


def test_a_tar_without_live_samples_has_no_index_file(packed: ShardSet) -> None:
    write_idx(packed.url)
    assert len(list(Path(packed.url, "idx").iterdir())) == 3
    bury(packed, *((1, n) for n in range(10)))

    report = write_idx(packed.url)

    assert report.left_out == (packed.names[1],)
    assert report.samples == 20
    left = sorted(path.stem for path in Path(packed.url, "idx").iterdir())
    assert left == [Path(packed.names[n]).stem for n in (0, 2)]


def test_an_extension_with_a_space_is_refused(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", [("a.my photo.jpg", jpeg(0))])
    adopt(str(tmp_path), workers=1)

    with pytest.raises(FormatError, match="space in its extension"):
        write_idx(str(tmp_path))


def test_wids_json_is_as_wids_specs_says(packed: ShardSet) -> None:
    bury(packed, (0, 2))

    report = write_wids(packed.url)

    assert (report.shards, report.samples) == (3, 30)
    found = json.loads(Path(packed.url, "wids.json").read_text())
    assert found["__kind__"] == "wids-shard-index-v1"
    assert found["wids_version"] == 1
    assert found["name"] == packed.set_id
    assert "base" not in found
    for shard in found["shardlist"]:
        tar = Path(shard["url"])
        assert shard["filesize"] == tar.stat().st_size
        with tarfile.open(tar) as opened:
            assert shard["nsamples"] == len(opened.getnames())
    assert [shard["url"] for shard in found["shardlist"]] == [
        f"{packed.url}/{name}" for name in packed.names
    ]


def test_wids_counts_every_sample_of_an_adopted_tar(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", [("a.jpg", jpeg(0)), ("a.txt", b""), ("b.jpg", b"<html>")])
    adopt(str(tmp_path), workers=1)

    write_wids(str(tmp_path))

    (shard,) = json.loads((tmp_path / "wids.json").read_text())["shardlist"]
    assert shard["nsamples"] == 2


def test_stable_names_are_what_a_brace_pattern_expands_to(packed: ShardSet) -> None:
    seen: list[tuple[int, int]] = []

    report = finalize_stable_names(packed.url, progress=lambda *step: seen.append(step))

    assert report.pattern == f"{packed.url}/stable/{{000000..000002}}.tar"
    assert seen == [(1, 3), (2, 3), (3, 3)]
    copies = [Path(path) for path in braceexpand(report.pattern)]
    for copy, name in zip(copies, packed.names, strict=True):
        assert copy.read_bytes() == Path(packed.url, name).read_bytes()
    reader = webdataset.WebDataset(report.pattern, shardshuffle=False)
    # It leaves its files to the garbage collector.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        found = [sample.get("jpg") or sample["png"] for sample in reader]
        gc.collect()
    assert found == live(packed)
    assert sorted(Path(packed.url, "stable").iterdir()) == copies


def test_stable_names_have_no_holes_and_no_leftovers(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", [("a.jpg", jpeg(0))])
    write_tar(tmp_path / "1.tar", [("a.jpg", b"<html>")])
    write_tar(tmp_path / "2.tar", [("b.jpg", jpeg(1))])
    adopt(str(tmp_path), workers=1)
    (tmp_path / "stable").mkdir()
    (tmp_path / "stable" / "000002.tar").write_bytes(b"of an earlier version")

    report = finalize_stable_names(str(tmp_path))

    assert report.pattern == f"{tmp_path}/stable/{{000000..000001}}.tar"
    copies = sorted((tmp_path / "stable").iterdir())
    assert [path.name for path in copies] == ["000000.tar", "000001.tar"]
    assert copies[1].read_bytes() == (tmp_path / "2.tar").read_bytes()
    assert adopt(str(tmp_path), workers=1).was_complete  # the copies are no tars of their own


@pytest.mark.s3
def test_in_a_bucket_tars_are_copied_by_the_server_and_only_once(
    s3: LocalS3, packed: ShardSet
) -> None:
    url = s3.make_bucket("stable")
    store = open_store(url)
    for path in Path(packed.url).rglob("*"):
        if path.is_file():
            store.put(path.relative_to(packed.url).as_posix(), path.read_bytes())
    store.put("stable/000007.tar", b"of an earlier version")

    first, second = finalize_stable_names(url), finalize_stable_names(url)

    assert first.pattern == f"{url}/stable/{{000000..000002}}.tar"
    assert (first.copied, second.copied) == (3, 0)
    for number, name in enumerate(packed.names):
        assert bytes(store.read(f"stable/{number:06}.tar")) == bytes(store.read(name))
    (page,) = store.list("stable")
    assert len(page) == 3
