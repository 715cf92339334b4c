"""Whatever is wrong with a shard set is found, at its place, and nothing else is said."""

import hashlib
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash

from demo.local_s3 import LocalS3
from shards import ShardSet
from shards.errors import FormatError, UnreachableError
from shards.images import EXTENSIONS
from shards.store import open_store
from shards.tar import BLOCK, build_tar
from shards.tar import Member as TarMember
from shards.verify import Fault as Found
from shards.verify import Level, VerifyConfig, VerifyProgress, VerifyReport, verify
from tests.support.faulty_proxy import Fault, FaultyProxy
from tests.support.shard_sets import make_shard_set, stored, undecodable


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """60 samples in 3 shards, and one object that was rejected."""
    folder = tmp_path_factory.mktemp("verify")
    (folder / "bucket").mkdir()
    shard_set = make_shard_set(folder / "made", count=60, shard_samples=20)
    assert shard_set.num_samples == 60
    return shard_set


@pytest.fixture
def own(template: ShardSet, tmp_path: Path) -> ShardSet:
    """A copy to be damaged."""
    return ShardSet.open(str(shutil.copytree(template.url, tmp_path / "set")))


def check(shard_set: ShardSet, level: Level = "bytes", **options: Any) -> VerifyReport:
    return verify(shard_set.url, level=level, **({"seed": 0, "workers": 1} | options))


def bury(shard_set: ShardSet, *dead: tuple[int, int]) -> ShardSet:
    rows = [
        {"shard": shard, "position": position, "reason": "takedown", "detail": ""}
        for shard, position in dead
    ]
    texts = [("reason", pa.string()), ("detail", pa.string())]
    schema = pa.schema([("shard", pa.int32()), ("position", pa.int32()), *texts])
    return shard_set.bury(pa.Table.from_pylist(rows, schema=schema))


def tar(shard_set: ShardSet, shard: int) -> Path:
    return Path(shard_set.url, shard_set.names[shard])


def index(shard_set: ShardSet, shard: int) -> Path:
    return Path(shard_set.url, shard_set.records()[shard].index)


def rows(shard_set: ShardSet, shard: int) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = pq.read_table(index(shard_set, shard)).to_pylist()
    return found


def change(path: Path, at: int, new: bytes | None = None) -> None:
    """Other bytes at one place of a file; one flipped byte if none are given."""
    data = bytearray(path.read_bytes())
    data[at : at + len(new or b"x")] = new if new is not None else bytes([data[at] ^ 0xFF])
    path.write_bytes(data)


def change_manifest(shard_set: ShardSet, shard: int, **fields: object) -> None:
    """Other values in a row of the manifest, and of its version, so that they agree."""
    path = Path(shard_set.url, "manifest.parquet")
    table = pq.read_table(path)
    listed = table.to_pylist()
    listed[shard] |= fields
    pq.write_table(pa.Table.from_pylist(listed, schema=table.schema), path)
    shutil.copy(path, Path(shard_set.url, "manifests", f"v{shard_set.version:06}.parquet"))


def change_metadata(shard_set: ShardSet, **fields: str) -> None:
    path = Path(shard_set.url, "manifest.parquet")
    table = pq.read_table(path)
    pq.write_table(table.replace_schema_metadata(shard_set.metadata | fields), path)
    shutil.copy(path, Path(shard_set.url, "manifests", f"v{shard_set.version:06}.parquet"))


def without_sums(report: VerifyReport) -> list[Found]:
    return [fault for fault in report.faults if "sha256" not in fault.what]


@pytest.mark.parametrize("level", ["list", "bytes", "decode"])
def test_a_set_with_tombstones_and_two_versions_is_sound(own: ShardSet, level: Level) -> None:
    twice = bury(bury(own, (0, 3), (2, 19)), (0, 4))

    report = check(twice, level)

    assert twice.version == 3
    assert report.faults == ()
    assert report.is_sound
    assert report.orphans == ()
    assert (report.shards, report.samples) == (3, 57)
    assert report.read_samples == (0 if level == "list" else 60)
    assert dict(report.rows())["faults"] == "none"


@pytest.mark.parametrize("keeps_part", [True, False])
def test_a_compacted_shard_is_sound(own: ShardSet, keeps_part: bool) -> None:
    buried = bury(own, (1, 7), (1, 8))
    old, table = tar(own, 1), pq.read_table(index(own, 1))
    data = old.read_bytes()
    kept = [row | {"position": n} for n, row in enumerate(table.to_pylist()) if n != 7]
    members = [
        TarMember(
            name=f"{row['key']}.{EXTENSIONS[row['format']]}",
            data=data[row["offset"] : row["offset"] + row["length"]],
        )
        for row in kept
    ]
    buffers, offsets = build_tar(members)
    written = b"".join(bytes(buffer) for buffer in buffers)
    schema = table.schema.append(pa.field("position", pa.int32()))
    rewritten = pa.Table.from_pylist(kept, schema=schema)
    rewritten = rewritten.set_column(0, "offset", pa.array(offsets))
    Path(own.url, "shards/000001-12345678.tar").write_bytes(written)
    pq.write_table(rewritten, Path(own.url, "index/000001-12345678.parquet"))
    change_manifest(
        buried,
        1,
        name="shards/000001-12345678.tar",
        index="index/000001-12345678.parquet",
        bytes=len(written),
        sha256=hashlib.sha256(written).hexdigest(),
        samples=19,
        live=18 if keeps_part else 19,
        tombstones="tombstones/v000003-00000.parquet" if keeps_part else None,
    )
    dead = {"shard": ["shards/000001-12345678.tar"] * 2, "position": [7, 8]}
    part = pa.table({**dead, "reason": ["takedown"] * 2, "detail": ["", ""]})
    pq.write_table(part, Path(own.url, "tombstones/v000003-00000.parquet"))
    names = ShardSet.open(own.url).names
    Path(own.url, "shards.txt").write_text("".join(f"{name}\n" for name in names))
    old.unlink()

    report = check(buried, "decode")

    assert report.faults == ()
    assert report.read_samples == 59


def test_two_workers_say_the_same_and_progress_counts_shards(own: ShardSet) -> None:
    change(tar(own, 2), rows(own, 2)[5]["offset"] + 9)
    change(tar(own, 0), rows(own, 0)[5]["offset"] + 9)
    seen: list[VerifyProgress] = []

    two = check(own, workers=2, progress=seen.append)

    assert two.faults == check(own).faults
    assert [fault.shard for fault in without_sums(two)] == [own.names[0], own.names[2]]
    assert [(step.done, step.total) for step in seen] == [(1, 3), (2, 3), (3, 3)]


def test_a_flipped_byte_of_data_is_found_even_in_a_tombstoned_sample(own: ShardSet) -> None:
    buried = bury(own, (1, 7))
    row = rows(own, 1)[7]
    change(tar(own, 1), row["offset"] + 100)

    assert check(buried, "list").is_sound
    report = check(buried)

    (fault,) = without_sums(report)
    assert (fault.shard, fault.key, fault.byte) == (own.names[1], row["key"], row["offset"])
    assert "not those of the index" in fault.what
    assert not report.is_sound
    assert report.num_faults == 2
    assert report.read_samples == 60
    assert any(name == "fault" and row["key"] in text for name, text in report.rows())


@pytest.mark.parametrize("at", [0, 100, 124, 148, 156, 257, 400])
def test_a_flipped_byte_of_a_header_hides_no_other_fault(own: ShardSet, at: int) -> None:
    first, second = rows(own, 0)[4], rows(own, 0)[5]
    change(tar(own, 0), first["offset"] - BLOCK + at)
    change(tar(own, 0), second["offset"] + 50)

    header, data = without_sums(check(own))

    assert (header.key, header.byte) == (first["key"], first["offset"] - BLOCK)
    assert (data.key, data.byte) == (second["key"], second["offset"])


def test_a_header_of_zeros_is_not_taken_for_the_end(own: ShardSet) -> None:
    row = rows(own, 0)[0]
    change(tar(own, 0), row["offset"] - BLOCK, bytes(BLOCK))

    report = check(own)

    (fault,) = without_sums(report)
    assert (fault.key, fault.byte, fault.what) == (row["key"], 0, "zeros in place of a header")
    assert report.read_samples == 60


def change_header(path: Path, start: int, at: int, field: bytes) -> None:
    """Another field in the header at `start`, with the right checksum."""
    header = bytearray(path.read_bytes()[start : start + BLOCK])
    header[at : at + len(field)] = field
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    change(path, start, bytes(header))


@pytest.mark.parametrize(
    ("at", "field", "what"),
    [
        (0, b"f" * 12, "names 'ffffffffffff."),
        (12, b".gif", ".gif'"),
        (124, b"00000070000\0", "says 28,672 bytes"),
        (156, b"2", "not a file's"),
    ],
)
def test_a_sound_header_that_says_something_else_is_found(
    own: ShardSet, at: int, field: bytes, what: str
) -> None:
    row = rows(own, 1)[3]
    change_header(tar(own, 1), row["offset"] - BLOCK, at, field)

    report = check(own)

    assert {(fault.key, fault.byte) for fault in without_sums(report)} == {
        (row["key"], row["offset"] - BLOCK)
    }
    assert any(what in fault.what for fault in report.faults)
    assert report.read_samples == 60


def test_padding_and_end_blocks_count(own: ShardSet) -> None:
    row = next(row for row in rows(own, 0) if row["length"] % BLOCK)
    end = row["offset"] + row["length"]
    change(tar(own, 0), end)
    size = tar(own, 2).stat().st_size
    change(tar(own, 2), size - 10)

    padding, mark = without_sums(check(own))

    assert (padding.key, padding.byte) == (row["key"], end)
    assert "padding" in padding.what
    assert (mark.shard, mark.byte) == (own.names[2], size - 10)
    assert "end mark" in mark.what


def test_a_member_that_the_index_does_not_name_is_found(own: ShardSet) -> None:
    path = tar(own, 0)
    end = path.stat().st_size - 2 * BLOCK
    extra, _ = build_tar([TarMember(name="extra.jpg", data=b"12345")])
    path.write_bytes(path.read_bytes()[:end] + b"".join(extra))

    faults = without_sums(check(own))

    assert [fault.byte for fault in faults] == [end + 2 * BLOCK, end]
    assert "bytes" in faults[0].what  # the listing
    assert "'extra.jpg' is not in its index" in faults[1].what


def test_swapped_indexes_are_found_at_every_sample(own: ShardSet) -> None:
    ours, other = index(own, 0).read_bytes(), index(own, 1).read_bytes()
    index(own, 0).write_bytes(other)
    index(own, 1).write_bytes(ours)

    report = check(own)

    assert {fault.shard for fault in report.faults} == {own.names[0], own.names[1]}
    assert len({(fault.shard, fault.key) for fault in report.faults if fault.key}) == 40
    assert check(own, "list").is_sound


def test_a_cut_tar_is_found_by_the_listing_and_each_lost_sample_by_the_bytes(own: ShardSet) -> None:
    row = rows(own, 1)[12]
    path, cut = tar(own, 1), row["offset"] + 20
    whole = path.stat().st_size
    path.write_bytes(path.read_bytes()[:cut])

    (fault,) = check(own, "list").faults
    assert (fault.shard, fault.byte) == (own.names[1], cut)
    assert f"{cut:,} bytes, the manifest says {whole:,}" in fault.what
    lost = [fault for fault in check(own).faults if "beyond the end" in fault.what]
    assert [fault.key for fault in lost] == [row["key"] for row in rows(own, 1)[12:]]
    assert any("cut short" in fault.what for fault in check(own).faults)


@pytest.mark.parametrize("level", ["list", "bytes"])
@pytest.mark.parametrize(
    ("missing", "what"),
    [
        (lambda s: s.names[1], "missing"),
        (lambda s: s.records()[1].index, "its index {} is missing"),
        (lambda s: s.records()[1].tombstones, "its tombstones {} are missing"),
        (lambda _: "_commit/000001.json", "no marker commits it"),
    ],
)
def test_a_missing_file_is_one_fault_of_its_shard(
    own: ShardSet, level: Level, missing: Callable[[ShardSet], str], what: str
) -> None:
    buried = bury(own, (1, 2))
    path = missing(buried)
    Path(own.url, path).unlink()

    (fault,) = check(buried, level).faults

    assert fault.shard == own.names[1]
    assert what.format(path) in fault.what


@pytest.mark.parametrize(
    ("path", "what"),
    [
        ("shards.txt", "missing"),
        ("manifests/v000001.parquet", "its own version, is missing"),
        ("rejections/g0000.parquet", "missing; the manifest counts 1"),
    ],
)
def test_a_missing_small_file_is_named(own: ShardSet, path: str, what: str) -> None:
    generation = {
        "generation": 0,
        "listed": 61,
        "packed": 60,
        "already": 0,
        "rejected": {"empty": 1},
    }
    change_metadata(own, generations=json.dumps([generation]))
    written = io.BytesIO()
    pq.write_table(pa.table({"reason": ["empty"]}), written)
    Path(own.url, "rejections/g0000.parquet").write_bytes(written.getvalue())
    assert check(own, "list").is_sound
    Path(own.url, path).unlink()

    (fault,) = check(own, "list").faults

    assert what in fault.what


def test_unreadable_small_files_are_faults_of_their_shard(own: ShardSet) -> None:
    buried = bury(own, (1, 2))
    index(own, 0).write_bytes(b"no parquet")
    part = buried.records()[1].tombstones
    assert part is not None
    Path(own.url, part).write_bytes(b"no parquet")
    Path(own.url, "_commit/000002.json").write_bytes(b"{")

    faults = check(buried).faults

    assert [fault.shard for fault in faults] == [
        "_commit/000002.json",
        own.names[1],
        own.names[0],
    ]


@pytest.mark.parametrize(
    ("fields", "what", "levels"),
    [
        ({"bytes": 5}, "the manifest says 5", ("list", "bytes")),
        ({"sha256": "0" * 64}, "sha256 is", ("list", "bytes")),
        ({"live": 19}, "19 live ones in the manifest", ("list", "bytes")),
        ({"samples": 19, "live": 19}, "index has 20 rows, the manifest says 19", ("bytes",)),
        ({"name": "shards/other.tar"}, "missing", ("list",)),
        ({"slots": 21, "live": 19}, "20 live rows in its index", ("bytes",)),
        ({"slots": 21}, "slots is 21 in the manifest, 20 in", ("list",)),
        ({"generation": 1}, "generation 1 has shards, but no account", ("list",)),
    ],
)
def test_a_wrong_row_of_the_manifest_is_found(
    own: ShardSet, fields: dict[str, object], what: str, levels: tuple[Level, ...]
) -> None:
    change_manifest(own, 1, **fields)

    for level in levels:
        report = check(own, level)
        assert any(what in fault.what for fault in report.faults), report.faults
        assert {fault.shard for fault in report.faults} <= {
            own.names[1],
            "manifest.parquet",
            "shards/other.tar",
            "shards.txt",
        }


def test_a_manifest_that_is_not_its_version_is_found(own: ShardSet) -> None:
    bury(own, (0, 1))
    shutil.copy(
        Path(own.url, "manifests/v000001.parquet"), Path(own.url, "manifests/v000002.parquet")
    )

    (fault,) = check(own, "list").faults

    assert "differs from manifests/v000002.parquet" in fault.what


def test_what_is_named_twice_is_found(own: ShardSet) -> None:
    change_manifest(own, 1, name=own.names[0], index=own.records()[0].index)

    what = " ".join(fault.what for fault in check(own, "list").faults)

    assert f"names {own.names[0]} 2 times" in what
    assert f"names {own.records()[0].index} 2 times" in what


@pytest.mark.parametrize(
    ("change_it", "what"),
    [
        ({"listed": 61}, "61 listed, but 60 packed"),
        ({"listed": 61, "packed": 61}, "61 packed, other than its shards hold"),
        ({"listed": 61, "rejected": {"empty": 1}}, "other rejections"),
    ],
)
def test_an_account_that_does_not_add_up_is_found(
    own: ShardSet, change_it: dict[str, Any], what: str
) -> None:
    (generation,) = json.loads(own.metadata["generations"])
    change_metadata(own, generations=json.dumps([generation | change_it]))

    faults = check(own, "list").faults

    assert any(what in fault.what for fault in faults)


def test_orphans_are_counted_and_are_no_faults(own: ShardSet) -> None:
    orphan = Path(own.url, "shards/000001-ffffffff.tar")
    shutil.copy(tar(own, 1), orphan)
    buried = bury(own, (0, 1))

    report = check(buried, "list")

    assert report.is_sound
    assert report.orphans == ("shards/000001-ffffffff.tar",)
    assert report.orphan_bytes == orphan.stat().st_size
    assert ("safe to delete", "shards/000001-ffffffff.tar") in list(report.rows())


def test_a_shard_that_only_an_older_version_names_is_no_orphan(own: ShardSet) -> None:
    path = Path(own.url, "manifests/v000001.parquet")
    table = pq.read_table(path)
    older = table.to_pylist()
    older[0]["name"] = "shards/000000-eeeeeeee.tar"
    buried = bury(own, (0, 1))
    pq.write_table(pa.Table.from_pylist(older, schema=table.schema), path)
    shutil.copy(tar(own, 0), Path(own.url, "shards/000000-eeeeeeee.tar"))

    assert check(buried, "list").orphans == ()


def test_an_index_that_names_impossible_places_is_found(own: ShardSet) -> None:
    table = pq.read_table(index(own, 0))
    places = table.column("offset").to_pylist()
    wrong = [places[0], places[1] + 1, places[2] + BLOCK, *places[3:]]
    pq.write_table(table.set_column(0, "offset", pa.array(wrong)), index(own, 0))

    found = {(fault.key, fault.what) for fault in without_sums(check(own))}

    key = [row["key"] for row in rows(own, 0)]
    assert (key[1], "no member can begin at this byte, which the index names") in found
    assert (key[2], "no member begins here") in found
    assert not any(other in key[3:] for other, _ in found)


def test_decoding_finds_what_checksums_cannot(own: ShardSet) -> None:
    number = next(n for n in range(20) if stored(own, n).startswith(b"\x89PNG"))
    data, row = undecodable(own, number), rows(own, 0)[number]
    path = index(own, 0)
    table = pq.read_table(path)
    sums = table.column("checksum").to_pylist()
    sums[number] = xxhash.xxh3_64_intdigest(data)
    widths = table.column("width").to_pylist()
    widths[number - 1] += 1
    for name, values in (("checksum", sums), ("width", widths)):
        place = table.schema.get_field_index(name)
        field = table.schema.field(place)
        table = table.set_column(place, field, pa.array(values, field.type))
    pq.write_table(table, path)
    change(tar(own, 0), row["offset"], data)

    assert without_sums(check(own)) == []
    wide, broken = without_sums(check(own, "decode"))

    assert wide.key == rows(own, 0)[number - 1]["key"]
    assert "width is" in wide.what
    assert (broken.key, broken.byte) == (row["key"], row["offset"])
    assert "does not decode: corrupt" in broken.what


def test_a_fraction_is_chosen_by_the_seed(own: ShardSet) -> None:
    change(tar(own, 1), rows(own, 1)[0]["offset"])

    reports = [check(own, sample_frac=0.3, seed=seed) for seed in range(8)]

    assert {report.read_shards for report in reports} == {1}
    assert {report.is_sound for report in reports} == {True, False}
    assert check(own, sample_frac=0.3, seed=3).faults == reports[3].faults
    assert check(own, sample_frac=0.34, seed=0).read_shards == 2
    with pytest.raises(ValueError, match="sample_frac must be above 0"):
        VerifyConfig(sample_frac=0)


def test_no_set_at_all_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="no shard set"):
        verify(str(tmp_path), level="list", seed=0, workers=1)


@pytest.mark.s3
def test_a_network_failure_is_an_error_and_no_fault(
    s3: LocalS3, own: ShardSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = s3.make_bucket("verify")
    for path in Path(own.url).rglob("*"):
        if path.is_file():
            open_store(url).put(path.relative_to(own.url).as_posix(), path.read_bytes())
    assert verify(url, level="decode", seed=0, workers=1).is_sound

    # A wrong answer is given up after a few attempts, a broken connection after minutes.
    with FaultyProxy(s3.endpoint, [Fault("shift", r"\.tar", method="GET")]) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        with pytest.raises(UnreachableError, match=r"\.tar"):
            verify(url, level="bytes", seed=0, workers=1)
