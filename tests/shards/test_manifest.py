"""A shard set as its readers see it."""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shards import PackConfig, ShardSet, pack
from shards.errors import FormatError
from shards.index import HOT, SCHEMA
from shards.store import open_store
from tests.support.images import encode, jpeg, picture


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve images, two of them with the same bytes, a rejection, three shards."""
    folder = tmp_path_factory.mktemp("manifest")
    (folder / "raw").mkdir()
    for n in range(11):
        data = encode(picture(n), "PNG") if n == 4 else jpeg(n)
        (folder / "raw" / f"{n}.jpg").write_bytes(data)
    (folder / "raw" / "page.jpg").write_bytes(b"<html>")
    (folder / "raw" / "copy.jpg").write_bytes(jpeg(3))
    pack(str(folder / "raw"), str(folder / "set"), PackConfig(workers=1, max_shard_samples=5))
    return folder / "set"


def test_a_set_knows_its_shards_and_ordinals(packed: Path) -> None:
    shard_set = ShardSet.open(str(packed))

    assert shard_set.num_samples == 11
    assert len(shard_set.names) == len(shard_set.samples) == 3
    assert shard_set.slots.tolist() == [5, 5, 2]
    assert shard_set.first_ordinal.tolist() == [0, 5, 10]
    assert shard_set.names == sorted(shard_set.names)
    assert all((packed / name).is_file() for name in shard_set.names)
    assert (packed / "shards.txt").read_text().split() == shard_set.names
    assert shard_set.version == 1
    assert json.loads(shard_set.metadata["rejected"]) == {"html_or_xml": 1}
    assert json.loads(shard_set.metadata["dead"]) == {"duplicate": 1}
    assert json.loads(shard_set.metadata["sources"]) == [str(packed.parent / "raw")]


def test_the_index_on_disk_is_the_documented_one(packed: Path) -> None:
    (first, *_) = sorted((packed / "index").iterdir())

    schema = pq.read_schema(first)

    names = "offset length checksum width height format orientation key uri etag source_size flags"
    assert schema.names == [*names.split(), "action", "content", "phash"]
    assert schema.equals(SCHEMA)
    assert schema.names[:7] == HOT
    index = ShardSet.open(str(packed)).index(0)
    assert (index.offset.dtype, index.checksum.dtype) == (np.int64, np.uint64)
    assert (index.width.dtype, index.orientation.dtype) == (np.int32, np.uint8)
    assert set(index.format.tolist()) <= {"jpeg", "png"}
    assert (index.end - index.offset == index.length).all()


def test_a_table_joins_all_indexes_in_ordinal_order(packed: Path) -> None:
    shard_set = ShardSet.open(str(packed))

    table = shard_set.table(columns=["uri", "width"])

    assert table.column_names == ["uri", "width", "sample_id"]
    assert len(table) == 11
    assert set(table["sample_id"].to_pylist()) < set(range(12))
    assert table["sample_id"].to_pylist() == sorted(table["sample_id"].to_pylist())
    widths = np.concatenate([shard_set.index(n).width for n in range(3)])
    assert table["width"].to_pylist() == widths.tolist()


def test_the_description_counts_everything(packed: Path) -> None:
    found = ShardSet.open(str(packed)).describe()

    assert (found.num_samples, found.num_shards) == (11, 3)
    assert found.formats == {"jpeg": 10, "png": 1}
    assert found.actions == {"keep": 11}
    assert found.rejected == {"html_or_xml": 1}
    assert found.dead == {"duplicate": 1}
    assert found.sides == (48, 48, 48)
    assert found.side_counts == {"below 64": 11}
    assert found.total_bytes == sum(path.stat().st_size for path in packed.glob("shards/*.tar"))
    assert {"samples": "11", "rejected": "html_or_xml 1"}.items() <= dict(found.rows()).items()


def test_the_id_is_the_content_and_not_the_place(packed: Path, tmp_path: Path) -> None:
    copy = open_store("memory://copied-set")
    for path in packed.rglob("*"):
        if path.is_file():
            copy.put(path.relative_to(packed).as_posix(), path.read_bytes())

    assert ShardSet.open("memory://copied-set").set_id == ShardSet.open(str(packed)).set_id
    raw = tmp_path / "raw"
    raw.mkdir()
    (raw / "one.jpg").write_bytes(jpeg(1))
    pack(str(raw), str(tmp_path / "set"), PackConfig(workers=1))
    assert ShardSet.open(str(tmp_path / "set")).set_id != ShardSet.open(str(packed)).set_id


def damaged(packed: Path, name: str) -> str:
    url = f"memory://damaged-{name}"
    store = open_store(url)
    for path in packed.rglob("*"):
        if path.is_file():
            store.put(path.relative_to(packed).as_posix(), path.read_bytes())
    return url


def test_what_is_no_shard_set_is_told_in_one_line(packed: Path, tmp_path: Path) -> None:
    newer = damaged(packed, "newer")
    table = pq.read_table(packed / "manifest.parquet")
    written = io.BytesIO()
    pq.write_table(table.replace_schema_metadata({"format_version": "9"}), written)
    open_store(newer).put("manifest.parquet", written.getvalue())
    torn = damaged(packed, "torn")
    open_store(torn).put("manifest.parquet", b"PAR1 but no more")
    other = damaged(packed, "other")
    written = io.BytesIO()
    pq.write_table(pa.table({"fruit": ["apple"]}), written)
    open_store(other).put("manifest.parquet", written.getvalue())

    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "00000.tar").write_bytes(b"somebody else's")

    for url, said in (
        (str(tmp_path), "moco-scale pack"),
        (str(tmp_path / "foreign"), "moco-scale index"),
        (str(tmp_path / "nowhere"), "moco-scale pack"),
        (newer, "format version 9"),
        (torn, "not a readable manifest"),
        (other, "not a readable manifest"),
    ):
        with pytest.raises(FormatError, match=said) as caught:
            ShardSet.open(url)
        assert url in str(caught.value)
        assert "\n" not in str(caught.value)


def test_an_index_that_does_not_fit_is_refused(packed: Path) -> None:
    url = damaged(packed, "index")
    shard_set = ShardSet.open(url)
    indexes = sorted(path.relative_to(packed).as_posix() for path in packed.glob("index/*"))
    swapped = (packed / indexes[2]).read_bytes()

    open_store(url).put(indexes[0], swapped)
    with pytest.raises(FormatError, match=indexes[0]):
        shard_set.index(0)
    open_store(url).put(indexes[1], b"no parquet")
    with pytest.raises(FormatError, match=indexes[1]):
        shard_set.index(1)
