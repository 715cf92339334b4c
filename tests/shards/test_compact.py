"""Take-downs, and erasing what is tombstoned: the bytes go, everything else stays as it was."""

import hashlib
import io
import json
import subprocess
import tarfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import xxhash

from demo.local_s3 import LocalS3
from pipelines import DataConfig, iterate_once, open_loader
from shards import ShardSet
from shards.compact import CompactReport, compact, erased_rows
from shards.dedup import bury_duplicates
from shards.errors import FormatError, PlanError, ShardError, SourceError
from shards.folder import FolderStore
from shards.store import open_store
from shards.takedown import read_uris, takedown
from tests.shards.test_tombstones import counts, dead
from tests.support.made_sets import Made, make_set, plain_set, uris
from tests.support.shard_sets import make_shard_set, stored


def run(url: str, *, min_dead_frac: float = 0, delete_old: bool = False) -> CompactReport:
    return compact(url, min_dead_frac=min_dead_frac, workers=1, delete_old=delete_old)


def files(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def data_of(shard_set: ShardSet) -> dict[int, bytes]:
    """Each live sample's bytes as its tar has them, checked, by id."""
    found = {}
    for shard, name in enumerate(shard_set.names):
        tar, index = bytes(shard_set.store.read(name)), shard_set.index(shard)
        for n, position in enumerate(index.position.tolist()):
            data = tar[index.offset[n] : index.end[n]]
            assert xxhash.xxh3_64_intdigest(data) == index.checksum[n]
            found[int(shard_set.first_ordinal[shard]) + position] = data
    return found


def test_a_take_down_buries_every_sample_of_the_object() -> None:
    url = "memory://takedown"
    made = [Made(uri=f"raw/{n % 3}", data=b"%d" % n) for n in range(5)]
    make_set(url, [made[:2], made[2:]])

    report = takedown(url, ["raw/1", "raw/9", "raw/\n8", "raw/1"])

    assert (report.asked, report.buried, report.marked, report.absent) == (3, 2, 0, ())
    assert report.not_found == ("raw/\n8", "raw/9")
    assert uris(ShardSet.open(url)) == {0: "raw/0", 2: "raw/2", 3: "raw/0"}
    assert counts(ShardSet.open(url)) == {"takedown": 2}
    shown = [value for _, value in report.rows()]
    assert "raw/\\n8" in shown
    again = takedown(url, ["raw/1"])
    assert (again.buried, again.version, len(again.absent), again.not_found) == (0, 2, 2, ())
    assert {one.reason for one in again.absent} == {"takedown"}


def test_what_was_a_duplicate_is_told_and_erased_nevertheless() -> None:
    url = "memory://takedown-duplicate"
    plain_set(url, [3]).bury(dead([(0, 1)]))

    report = takedown(url, ["raw/0-1"])

    assert (report.buried, report.marked, report.not_found) == (0, 1, ())
    (absent,) = report.absent
    assert (absent.uri, absent.reason, absent.detail) == ("raw/0-1", "duplicate", "why (0, 1)")
    assert "duplicate, why (0, 1)" in " ".join(value for _, value in report.rows())
    assert run(url, min_dead_frac=1).erased == {"takedown": 1}
    erased = takedown(url, ["raw/0-1"])
    assert (erased.buried, erased.marked, erased.not_found) == (0, 0, ())
    assert [one.reason for one in erased.absent] == ["takedown"]


def test_a_rejected_object_is_not_unknown(tmp_path: Path) -> None:
    shard_set = make_shard_set(tmp_path, count=3, shard_samples=4)
    table = shard_set.rejections()
    row = {"uri": "raw/bad", "size": 1, "etag": None, "reason": "corrupt", "detail": "damage"}
    written = io.BytesIO()
    pq.write_table(table.from_pylist([row], table.schema), written)
    shard_set.store.put("rejections/g0000.parquet", written.getvalue())

    report = takedown(shard_set.url, ["raw/bad"])

    assert [(one.uri, one.reason) for one in report.absent] == [("raw/bad", "corrupt")]
    assert report.not_found == ()


def test_a_list_file_has_a_uri_a_line(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_bytes(b"s3://b/a c.jpg\r\n\n s3://b/\xc3\xa9\n")

    assert read_uris(path) == ["s3://b/a c.jpg", " s3://b/é"]
    path.write_text("\n\n")
    with pytest.raises(SourceError, match="names no URI"):
        read_uris(path)
    with pytest.raises(SourceError, match="not a readable list"):
        read_uris(tmp_path / "nowhere")


def test_the_bytes_are_gone_and_everything_else_is_as_before(tmp_path: Path) -> None:
    url = str(tmp_path / "set")
    before = plain_set(url, [5, 4, 6]).bury(dead([(0, 1), (0, 4), (2, 0)]))
    alive = data_of(before)
    rows = before.table(["uri", "caption"])

    report = run(url, delete_old=True)

    after = ShardSet.open(url)
    assert (report.shards, report.erased, report.still_dead) == (2, {"duplicate": 3}, 0)
    assert (after.version, after.set_id) == (3, before.set_id)
    assert data_of(after) == alive
    assert after.table(["uri", "caption"]).equals(rows)
    assert after.samples.tolist() == before.samples.tolist() == [3, 4, 5]
    assert after.slots.tolist() == [5, 4, 6]
    assert after.names[1] == before.names[1]
    everything = files(tmp_path / "set")
    for gone in (b"data 0 1", b"data 0 4", b"data 2 0"):
        assert not any(gone in data for data in everything.values())
    for name, data in everything.items():
        if name.startswith("index/"):
            captions = pq.read_table(io.BytesIO(data))["caption"].to_pylist()
            assert not {"caption of raw/0-1", "caption of raw/2-0"} & set(captions)
    for record in after.records():
        tar = everything[record.name]
        assert (len(tar), hashlib.sha256(tar).hexdigest()) == (record.bytes, record.sha256)
        assert (record.live, record.tombstones) == (record.samples, None)
        assert record.sha256[:8] in record.name
        assert record.sha256[:8] in record.index
        with tarfile.open(fileobj=io.BytesIO(tar)) as opened:
            assert len(opened.getnames()) == record.samples
    assert (counts(after), json.loads(after.metadata["erased"])) == ({}, {"duplicate": 3})
    assert dict(after.describe().rows())["erased"] == "duplicate 3"


def test_what_was_erased_is_on_record_and_a_second_time_adds_to_it() -> None:
    url = "memory://record"
    plain_set(url, [5, 2]).bury(dead([(0, 3)]))
    run(url)
    ShardSet.open(url).bury(dead([(0, 0), (0, 4)], reason="superseded"))

    report = run(url)

    ((shard, rows),) = erased_rows(ShardSet.open(url))
    assert shard == 0
    assert rows.select(["position", "uri", "etag", "source_size", "reason"]).to_pylist() == [
        {"position": n, "uri": f"raw/0-{n}", "etag": "e", "source_size": 8, "reason": reason}
        for n, reason in ((0, "superseded"), (3, "duplicate"), (4, "superseded"))
    ]
    assert report.erased == {"superseded": 2}
    after = ShardSet.open(url)
    assert uris(after) == {1: "raw/0-1", 2: "raw/0-2", 5: "raw/1-0", 6: "raw/1-1"}
    assert json.loads(after.metadata["erased"]) == {"duplicate": 1, "superseded": 2}
    later = after.bury(dead([(0, 1)]))
    assert (later.samples.tolist(), later.index(0).position.tolist()) == ([1, 2], [2])


def test_only_shards_with_enough_dead_or_a_take_down_are_rewritten() -> None:
    url = "memory://enough"
    shard_set = plain_set(url, [4, 4, 4, 4])
    shard_set = shard_set.bury(dead([(0, 0), (0, 1), (1, 0)]))
    shard_set = shard_set.bury(dead([(2, 0)], reason="takedown"))
    names = shard_set.names

    report = run(url, min_dead_frac=0.5)

    assert (report.shards, report.still_dead) == (2, 1)
    assert report.erased == {"duplicate": 2, "takedown": 1}
    after = ShardSet.open(url)
    assert [a == b for a, b in zip(after.names, names, strict=True)] == [False, True, False, True]
    assert counts(after) == {"duplicate": 1}
    assert run(url, min_dead_frac=0.5).version == after.version
    assert run(url, min_dead_frac=0.25).shards == 1
    with pytest.raises(ShardError, match="from 0 to 1, not 2"):
        run(url, min_dead_frac=2)


def test_a_shard_without_a_live_sample_stays_as_an_empty_tar() -> None:
    url = "memory://emptied"
    plain_set(url, [2, 2, 1]).bury(dead([(0, 0), (0, 1), (2, 0)]))

    run(url, delete_old=True)

    after = ShardSet.open(url)
    assert uris(after) == {2: "raw/1-0", 3: "raw/1-1"}
    assert len(after.names) == len({*after.names}) == 3
    assert bytes(after.store.read(after.names[0])) == bytes(1024)
    assert data_of(after).keys() == {2, 3}


def test_old_files_stay_until_they_are_asked_to_go(tmp_path: Path) -> None:
    url = str(tmp_path / "set")
    plain_set(url, [3, 3]).bury(dead([(1, 2)]))
    reader = ShardSet.open(url)

    told = run(url)

    assert not told.deleted
    assert set(told.old_files) == {reader.names[1], reader.records()[1].index}
    assert told.old_bytes == sum(len(files(tmp_path / "set")[name]) for name in told.old_files)
    assert len(data_of(reader)) == 5, "whoever reads an earlier version reads on"
    gone = run(url, delete_old=True)
    assert (gone.old_files, gone.deleted, gone.shards) == (told.old_files, True, 0)
    assert not set(told.old_files) & files(tmp_path / "set").keys()
    with pytest.raises(FormatError, match="a compaction may have erased it: open the set's newest"):
        ShardSet.open(url, version=1).index(1)
    assert run(url, delete_old=True).old_files == ()
    rows = dict(told.rows())
    assert "earlier version" in rows["to do"]


def test_what_killed_commands_left_goes_too_but_no_shard_in_the_making(tmp_path: Path) -> None:
    url = str(tmp_path / "set")
    shard_set = plain_set(url, [2, 2])
    store = open_store(url)
    store.put("shards/000000-00000000.tar", b"left by a killed packer")
    store.put("shards/000007-00000000.tar", b"of a generation that is being packed")
    store.put("shards/somebody.tar", b"else's")

    report = run(url, delete_old=True)

    assert report.old_files == ("shards/000000-00000000.tar",)
    assert {path for path in files(tmp_path / "set") if path.startswith("shards/")} == {
        *shard_set.names,
        "shards/000007-00000000.tar",
        "shards/somebody.tar",
    }
    # Another compaction that had written this tar, and names it only now, must come too late.
    with pytest.raises(PlanError, match="meanwhile"):
        shard_set.bury(dead([(0, 0)]))


def test_a_foreign_tar_loses_all_members_of_a_sample_and_nothing_else(tmp_path: Path) -> None:
    url = str(tmp_path / "set")
    make_set(url, [[Made(uri=f"raw/{n}", data=b"picture %d" % n) for n in range(3)]])
    (record,) = ShardSet.open(url).records()
    written = io.BytesIO()
    with tarfile.open(fileobj=written, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for n in range(3):
            for ending, data in (("jpg", b"picture %d" % n), ("txt", b"secret %d" % n)):
                name = f"{'long' * 40}/é {n}.{ending}"
                info = tarfile.TarInfo(name)
                info.size = len(data)
                info.pax_headers = {"comment": f"note {n}"}
                tar.addfile(info, io.BytesIO(data))
    data = written.getvalue()
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        offsets = [info.offset_data for info in tar if info.name.endswith("jpg")]
    index = pq.read_table(Path(url, record.index))
    index = index.set_column(0, index.schema.field(0), [offsets])
    pq.write_table(index, Path(url, record.index))
    Path(url, record.name).write_bytes(data)
    adopt(url, sha256=hashlib.sha256(data).hexdigest())
    ShardSet.open(url).bury(dead([(0, 1)], reason="takedown"))

    run(url, delete_old=True)

    after = ShardSet.open(url)
    assert data_of(after) == {0: b"picture 0", 2: b"picture 2"}
    tar_bytes = Path(url, after.names[0]).read_bytes()
    with tarfile.open(fileobj=io.BytesIO(tar_bytes)) as tar:
        found = {info.name.rpartition("/")[2]: tar.extractfile(info) for info in tar}
        texts = {name: file.read() for name, file in found.items() if file is not None}
    assert texts == {
        "é 0.jpg": b"picture 0",
        "é 0.txt": b"secret 0",
        "é 2.jpg": b"picture 2",
        "é 2.txt": b"secret 2",
    }
    assert b"note 1" not in tar_bytes


def adopt(url: str, *, sha256: str) -> None:
    """Put another digest into the only version of the manifest."""
    for path in ("manifest.parquet", "manifests/v000001.parquet"):
        table = pq.read_table(Path(url, path))
        place = table.schema.get_field_index("sha256")
        pq.write_table(table.set_column(place, "sha256", [[sha256]]), Path(url, path))


def test_damage_is_not_laundered(tmp_path: Path) -> None:
    url = str(tmp_path / "set")
    shard_set = plain_set(url, [3]).bury(dead([(0, 0)]))
    path = Path(url, shard_set.names[0])
    tar = bytearray(path.read_bytes())
    tar[-1100] ^= 1
    path.write_bytes(tar)
    before = files(tmp_path / "set")

    with pytest.raises(FormatError, match="not the bytes that the manifest has"):
        run(url, delete_old=True)

    assert files(tmp_path / "set") == before


def test_killed_at_any_write_or_delete_the_set_is_whole_and_a_repeat_finishes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard_set = plain_set(str(tmp_path / "set"), [3, 3, 3])
    shard_set = shard_set.bury(dead([(0, 1), (2, 2)], reason="takedown"))
    alive = data_of(shard_set)
    (tmp_path / "set").rename(tmp_path / "begun")
    subprocess.run(["cp", "-r", tmp_path / "begun", tmp_path / "whole"], check=True)
    run(str(tmp_path / "whole"), delete_old=True)
    put, delete = FolderStore.put, FolderStore.delete
    left = 0

    def step() -> None:
        nonlocal left
        if left == 0:
            raise KeyboardInterrupt
        left -= 1

    def put_or_die(store: FolderStore, *args: Any, **kwargs: Any) -> str:
        step()
        return put(store, *args, **kwargs)

    def delete_or_die(store: FolderStore, paths: list[str]) -> None:
        for path in paths:
            step()
            delete(store, [path])

    died = 0
    for allowed in range(20):
        url = tmp_path / f"killed-{allowed}"
        subprocess.run(["cp", "-r", tmp_path / "begun", url], check=True)
        left = allowed
        with monkeypatch.context() as patched:
            patched.setattr(FolderStore, "put", put_or_die)
            patched.setattr(FolderStore, "delete", delete_or_die)
            try:
                run(str(url), delete_old=True)
            except KeyboardInterrupt:
                died += 1
        assert data_of(ShardSet.open(str(url))) == alive
        run(str(url), delete_old=True)
        assert data_of(ShardSet.open(str(url))) == alive
        ours, whole = files(url), files(tmp_path / "whole")
        for kind in ("shards/", "index/", "erased/"):
            assert {k: v for k, v in ours.items() if k.startswith(kind)} == {
                k: v for k, v in whole.items() if k.startswith(kind)
            }
    assert 10 < died < 20


def test_a_take_down_made_meanwhile_is_not_lost(tmp_path: Path) -> None:
    url = str(tmp_path / "set")
    plain_set(url, [3, 3]).bury(dead([(0, 0), (1, 0)]))

    def takes_down(done: int, _total: int) -> None:
        if done == 1:
            takedown(url, ["raw/1-2"])

    with pytest.raises(PlanError, match="run this command again"):
        compact(url, min_dead_frac=0, workers=1, delete_old=True, progress=takes_down)

    assert sorted(uris(ShardSet.open(url))) == [1, 2, 4]
    run(url, delete_old=True)
    assert sorted(uris(ShardSet.open(url))) == [1, 2, 4]
    assert not any(b"data 1 2" in data for data in files(tmp_path / "set").values())


def served(shard_set: ShardSet, ordinals: list[int] | None = None) -> Iterator[tuple[int, float]]:
    found = iterate_once(
        shard_set,
        ordinals=None if ordinals is None else np.array(ordinals),
        view_size=16,
        batch_size=8,
        loader="cpu",
        num_threads=1,
        device_index=None,
    )
    for ids, view in found:
        yield from zip(ids.tolist(), view.double().sum((1, 2, 3)).tolist(), strict=True)


def epochs(url: str, *, steps: int) -> list[tuple[list[int], float]]:
    config = DataConfig(
        shards=(url,),
        global_batch_size=6,
        block_samples=4,
        view_size=16,
        loader="cpu",
        num_threads=1,
        wait_timeout_s=60,
    )
    with closing(open_loader(config, seed=3, rank=0, world_size=1, device_index=None)) as loader:
        batches = [next(loader) for _ in range(steps)]
    return [(batch.sample_ids.tolist(), float(batch.view_q.double().sum())) for batch in batches]


def test_no_reader_ever_serves_a_dead_sample_and_compaction_changes_no_pixel(
    tmp_path: Path,
) -> None:
    shard_set = make_shard_set(tmp_path, count=50, shard_samples=7)
    url = shard_set.url
    everything = dict(served(shard_set))
    gone = {0, 6, 7, 8, 9, 10, 11, 12, 13, 20, 33, 49}  # all of a shard, first and last of others
    names = shard_set.table(["uri"])
    wanted = [uri for n, uri in enumerate(names["uri"].to_pylist()) if n in gone]
    bytes_gone = [stored(shard_set, n) for n in gone]

    assert takedown(url, wanted).buried == len(gone)

    buried = ShardSet.open(url)
    left = {n: value for n, value in everything.items() if n not in gone}
    assert dict(served(buried)) == left
    assert dict(served(buried, [0, 1, 5, 6, 13, 14, 48, 49])).keys() == {1, 5, 14, 48}
    assert buried.table(["uri"])["sample_id"].to_pylist() == sorted(left)
    order = epochs(url, steps=13)
    assert {n for ids, _ in order for n in ids} <= left.keys()
    assert len({n for ids, _ in order[:6] for n in ids}) == 36

    compact(url, min_dead_frac=0.9, workers=2, delete_old=True)

    assert dict(served(ShardSet.open(url))) == left
    assert epochs(url, steps=13) == order
    everywhere = b"".join(files(Path(url)).values())
    assert not any(data in everywhere for data in bytes_gone)
    assert stored_of(ShardSet.open(url), 14) in everywhere


def stored_of(shard_set: ShardSet, sample_id: int) -> bytes:
    return data_of(shard_set)[sample_id]


@pytest.mark.s3
def test_on_a_real_s3_server_versions_are_exclusive_and_erased_bytes_go(
    s3: LocalS3, tmp_path: Path
) -> None:
    url = s3.make_bucket("compact") + "/set"
    first = plain_set(url, [4, 4, 4])
    second = takedown(url, ["raw/0-1", "raw/2-3"])
    with pytest.raises(PlanError, match="made version 2 meanwhile"):
        first.bury(dead([(1, 1)]))
    store = open_store(url)
    store.put("manifest.parquet", bytes(store.read("manifests/v000001.parquet")))
    alive = data_of(ShardSet.open(url))

    report = compact(url, min_dead_frac=1, workers=2, delete_old=True)

    assert (second.version, report.version, report.shards) == (2, 3, 2)
    assert data_of(ShardSet.open(url)) == alive
    assert len(alive) == 10
    left = [path for page in store.list() for path in page.column("path").to_pylist()]
    assert not any(b"data 0 1" in bytes(store.read(path)) for path in left)
    assert not set(report.old_files) & set(left)
    assert bury_duplicates(ShardSet.open(url), scratch=tmp_path).version == 3
