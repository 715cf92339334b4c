"""From a raw bucket to a shard set: complete, repeatable, resumable, and honest about the rest."""

import gc
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import webdataset
import xxhash

from demo.local_s3 import LocalS3
from shards import PackConfig, PackReport, ShardSet
from shards import pack as pack_or_plan
from shards.commit import read_marker
from shards.compact import compact
from shards.decoder import Decoder
from shards.errors import (
    AccessError,
    NotFoundError,
    PlanError,
    ShardError,
    SourceError,
    UnreachableError,
)
from shards.folder import FolderStore
from shards.pack import PackProgress, _Objects, pack_shard
from shards.plan import Plan
from shards.store import Store, open_store
from shards.takedown import takedown
from tests.support.images import encode, exif, good_images, jpeg, picture, spoilt_images

SMALL = PackConfig(workers=1, max_shard_samples=5, seed=3)


def fill(folder: Path, contents: dict[str, bytes]) -> str:
    for name, data in contents.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return str(folder)


def photos(count: int) -> dict[str, bytes]:
    """JPEGs, PNGs, turned ones and transparent ones."""
    found = {}
    for n in range(count):
        if n % 5 == 1:
            found[f"class {n % 2}/{n:03}.png"] = encode(picture(n), "PNG")
        elif n % 5 == 2:
            image = picture(n).convert("RGBA")
            image.putalpha(128)
            found[f"class {n % 2}/{n:03}.png"] = encode(image, "PNG")
        else:
            found[f"class {n % 2}/{n:03}.jpg"] = jpeg(n, exif=exif(1 + n % 8))
    return found


def files(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def pack(source: str, destination: str, config: PackConfig, **more: Any) -> PackReport:
    report = pack_or_plan(source, destination, config, **more)
    assert report is not None
    return report


class Stop(BaseException):
    """What a test stops a packing with, as a signal would."""


def stop_after(shards: int) -> Any:
    """A progress function that stops the packing when so many shards are committed."""
    seen = []

    def progress(state: PackProgress) -> None:
        seen.append(state)
        if len(seen) == shards:
            raise Stop

    return progress


def test_every_kind_of_object_is_packed_or_rejected_with_its_reason(tmp_path: Path) -> None:
    good, spoilt = good_images(), spoilt_images()
    source = fill(
        tmp_path / "raw",
        {
            **{f"good/{name}": image.data for name, image in good.items()},
            **{f"spoilt/{name}": data for name, (data, _) in spoilt.items()},
            "again/copy of a jpeg": good["jpeg"].data,
        },
    )

    report = pack(source, str(tmp_path / "set"), PackConfig(workers=1, max_shard_samples=16))

    shard_set = ShardSet.open(str(tmp_path / "set"))
    table = shard_set.table()
    packed = {uri.rpartition("/")[2]: row for row, uri in enumerate(table["uri"].to_pylist())}
    rejected = {
        row["uri"].removeprefix(f"{source}/"): row for row in shard_set.rejections().to_pylist()
    }
    expected = {f"spoilt/{name}": reason for name, (_, reason) in spoilt.items()}
    assert {name: row["reason"] for name, row in rejected.items()} == expected
    assert rejected["spoilt/half.jpg"]["size"] == len(spoilt["half.jpg"][0])
    assert report.listed == len(good) + len(spoilt) + 1 == report.packed + len(rejected)
    assert report.rejected == Counter(row["reason"] for row in rejected.values())
    # A folder's listing does not tell that two files are equal: the later one is a tombstone.
    assert report.dead == {"duplicate": 1}
    assert set(packed) in ({*good}, {*good, "copy of a jpeg"} - {"jpeg"})
    assert report.samples == report.packed - 1 == len(good)
    for name, image in good.items():
        if name in packed:
            row = table.slice(packed[name], 1).to_pylist()[0]
            assert (row["width"], row["height"]) == image.size
            assert (row["format"], row["action"]) == (image.format, image.action)
            assert (row["orientation"], row["source_size"]) == (image.orientation, len(image.data))


def test_the_index_points_at_the_bytes_in_the_tar(tmp_path: Path) -> None:
    contents = photos(12)
    source = fill(tmp_path / "raw", contents)
    pack(source, str(tmp_path / "set"), SMALL)

    shard_set = ShardSet.open(str(tmp_path / "set"))

    keys = []
    for shard, name in enumerate(shard_set.names):
        tar = bytes(shard_set.store.read(name))
        index = shard_set.index(shard)
        with tarfile.open(fileobj=io.BytesIO(tar)) as entries:
            members = entries.getmembers()
        assert [m.offset_data for m in members] == index.offset.tolist()
        assert [m.size for m in members] == index.length.tolist()
        keys += [m.name.partition(".")[0] for m in members]
        for row in range(len(members)):
            data = tar[index.offset[row] : index.offset[row] + index.length[row]]
            assert xxhash.xxh3_64_intdigest(data) == index.checksum[row]
    table = shard_set.table()
    assert table["key"].to_pylist() == keys
    assert table["sample_id"].to_pylist() == list(range(shard_set.num_samples))
    for row in table.to_pylist():
        if row["action"] == "keep":
            assert row["length"] == len(contents[row["uri"].removeprefix(f"{source}/")])


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_plain_webdataset_reads_every_sample(tmp_path: Path) -> None:
    contents = photos(12)
    report = pack(fill(tmp_path / "raw", contents), str(tmp_path / "set"), SMALL)

    names = (tmp_path / "set" / "shards.txt").read_text().split()
    urls = [str(tmp_path / "set" / name) for name in names]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False))

    gc.collect()  # webdataset leaves its files open; let Python complain of that here
    assert len(names) == report.shards > 1
    assert len({sample["__key__"] for sample in samples}) == len(samples) == 12
    kept = {bytes(sample[kind]) for sample in samples for kind in ("jpg", "png") if kind in sample}
    assert {data for name, data in contents.items() if name.endswith("jpg")} <= kept


def test_one_worker_and_two_write_the_same_bytes(tmp_path: Path) -> None:
    source = fill(tmp_path / "raw", photos(17) | {"page.jpg": b"<html>"})

    pack(source, str(tmp_path / "one"), SMALL)
    pack(source, str(tmp_path / "two"), PackConfig(workers=2, max_shard_samples=5, seed=3))

    one = files(tmp_path / "one")
    assert len([name for name in one if name.endswith(".tar")]) == 4
    assert one == files(tmp_path / "two")


def test_a_copied_and_touched_folder_packs_to_the_same_tars(tmp_path: Path) -> None:
    source = fill(tmp_path / "raw", photos(9))
    copy = shutil.copytree(source, tmp_path / "elsewhere" / "copy", copy_function=shutil.copyfile)

    first = pack(source, str(tmp_path / "one"), SMALL)
    second = pack(str(copy), str(tmp_path / "two"), SMALL)

    assert first.set_id == second.set_id
    tars = [
        {name: data for name, data in files(tmp_path / which).items() if name.endswith("tar")}
        for which in ("one", "two")
    ]
    assert tars[0] == tars[1]
    other_seed = pack(source, str(tmp_path / "three"), PackConfig(workers=1, seed=4))
    assert other_seed.set_id != first.set_id


def test_a_packing_that_was_stopped_continues_to_the_same_bytes(tmp_path: Path) -> None:
    source = fill(tmp_path / "raw", photos(23) | {"page.jpg": b"<html>"})
    whole = pack(source, str(tmp_path / "whole"), SMALL)

    for stop in (1, 3, whole.shards):
        cut = tmp_path / f"cut-{stop}"
        with pytest.raises(Stop):
            pack(source, str(cut), SMALL, progress=stop_after(stop))
        with pytest.raises(ShardError, match="no shard set"):
            ShardSet.open(str(cut))
        again = pack(source, str(cut), SMALL)

        assert again.resumed_shards == stop
        assert (again.listed, again.packed, again.set_id) == (
            whole.listed,
            whole.packed,
            whole.set_id,
        )
        assert files(cut) == files(tmp_path / "whole")


def test_a_packing_that_was_killed_continues_to_the_same_bytes(tmp_path: Path) -> None:
    source = fill(tmp_path / "raw", photos(40))
    config = "PackConfig(workers=2, max_shard_samples=2, seed=3)"
    whole = pack(
        source, str(tmp_path / "whole"), PackConfig(workers=1, max_shard_samples=2, seed=3)
    )
    cut = tmp_path / "cut"
    script = f"from shards import PackConfig, pack; pack({source!r}, {str(cut)!r}, {config})"
    with subprocess.Popen([sys.executable, "-c", script], start_new_session=True) as process:
        deadline = time.monotonic() + 60
        while not list((cut / "_commit").glob("*.json")):
            assert process.poll() is None or (cut / "manifest.parquet").exists()
            assert time.monotonic() < deadline
        process.send_signal(signal.SIGKILL)  # its workers must notice by themselves
    _wait_for_group_to_end(process.pid)
    committed = len(list((cut / "_commit").glob("*.json")))

    again = pack(source, str(cut), PackConfig(workers=1, max_shard_samples=2, seed=3))

    assert again.resumed_shards == committed >= 1
    assert again.set_id == whole.set_id
    mine, expected = files(cut), files(tmp_path / "whole")
    assert {name: data for name, data in mine.items() if "unfinished" not in name} == expected


def _wait_for_group_to_end(group: int) -> None:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    os.killpg(group, signal.SIGKILL)
    raise AssertionError("worker processes outlived a killed packing")


def test_a_finished_set_is_left_alone(tmp_path: Path) -> None:
    source = fill(tmp_path / "raw", photos(8) | {"page.jpg": b"<html>"})
    first = pack(source, str(tmp_path / "set"), SMALL)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "set").rglob("*")}
    (tmp_path / "raw" / "new.jpg").write_bytes(jpeg(99))

    again = pack(source, str(tmp_path / "set"), SMALL)

    assert (first.was_complete, again.was_complete) == (False, True)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "set").rglob("*")} == before
    for field in ("url", "set_id", "listed", "packed", "rejected", "shards", "bytes"):
        assert getattr(again, field) == getattr(first, field), field


def test_other_settings_or_another_source_are_refused_with_both_values(tmp_path: Path) -> None:
    source = fill(tmp_path / "raw", photos(6))
    pack(source, str(tmp_path / "set"), SMALL)
    before = files(tmp_path / "set")

    with pytest.raises(PlanError, match=r"seed 3, not 4"):
        pack(source, str(tmp_path / "set"), PackConfig(workers=1, max_shard_samples=5, seed=4))
    other = fill(tmp_path / "other", photos(3))
    with pytest.raises(PlanError) as caught:
        pack(other, str(tmp_path / "set"), SMALL)

    assert source in str(caught.value)
    assert other in str(caught.value)
    assert files(tmp_path / "set") == before


def test_source_and_destination_inside_one_another_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "nothing")
    source = fill(tmp_path / "raw", photos(2))
    (tmp_path / "link").symlink_to(source)

    for one, other in (
        (source, f"{source}/set"),
        (source, str(tmp_path)),
        (source, source),
        (source, f"{tmp_path}/link/set"),
        ("s3://bucket/raw", "s3://bucket/raw/set"),
        ("s3://bucket/raw", "s3://bucket"),
    ):
        with pytest.raises(PlanError, match="lie in one another"):
            pack(one, other, SMALL)
    assert set(files(Path(source))) == set(photos(2))


def test_a_source_without_one_usable_image_leaves_nothing_behind(tmp_path: Path) -> None:
    source = fill(
        tmp_path / "raw", {"a.jpg": b"<html>1", "b.jpg": b"<html>2", "c.jpg": b"", "d": bytes(9)}
    )

    with pytest.raises(SourceError) as caught:
        pack(source, str(tmp_path / "set"), SMALL)

    for said in (source, "html_or_xml 2", "empty 1", "unknown_magic 1"):
        assert said in str(caught.value)
    assert not (tmp_path / "set").exists()


def test_bad_places_are_told_in_one_line_and_nothing_is_written(tmp_path: Path) -> None:
    source = fill(tmp_path / "raw", photos(2))
    (tmp_path / "file").write_bytes(b"in the way")
    (tmp_path / "empty").mkdir()

    for error, one, other, said in (
        (NotFoundError, str(tmp_path / "missing"), str(tmp_path / "set"), "missing"),
        (NotFoundError, str(tmp_path / "file"), str(tmp_path / "set"), "not a folder"),
        (SourceError, str(tmp_path / "empty"), str(tmp_path / "set"), "no objects"),
        (ShardError, source, str(tmp_path / "file"), "destination"),
        (ShardError, source, str(tmp_path / "file" / "set"), "destination"),
    ):
        with pytest.raises(error, match=said) as caught:
            pack(one, other, SMALL)
        assert "\n" not in str(caught.value)
    assert sorted(os.listdir(tmp_path)) == ["empty", "file", "raw"]  # noqa: PTH208


def test_settings_out_of_range_are_refused() -> None:
    for name, value in (
        ("seed", -1),
        ("shard_bytes", 0),
        ("max_shard_samples", 16**6 + 1),
        ("max_pixels", 10**9),
        ("workers", -1),
        ("fetch_threads", 0),
    ):
        with pytest.raises(ValueError, match=name):
            PackConfig(**{name: value})


class MoodyStore:
    """A raw bucket that misbehaves for some of its objects."""

    def __init__(self, inner: Store) -> None:
        self.inner = inner
        self.url, self.uri, self.list, self.head = inner.url, inner.uri, inner.list, inner.head
        self.refuse: set[str] = set()
        self.down: set[str] = set()
        self.reads: Counter[str] = Counter()

    def read(self, path: str, *, if_match: str | None = None) -> Any:
        self.reads[path] += 1
        if path in self.refuse:
            raise AccessError(f"{self.uri(path)}: access denied; check the credentials")
        if path in self.down:
            raise UnreachableError(f"{self.uri(path)}: no usable answer from the store")
        return self.inner.read(path, if_match=if_match)


def planned(tmp_path: Path, contents: dict[str, bytes]) -> tuple[MoodyStore, Store, Plan]:
    """A plan of one shard, stopped before its work: with the raw and the destination store."""
    source = fill(tmp_path / "raw", contents)
    seen: list[Plan] = []
    nothing = pack_or_plan(
        source,
        str(tmp_path / "set"),
        PackConfig(workers=1),
        dry_run=True,
        on_plan=lambda plan, _: seen.append(plan),
    )
    assert nothing is None
    assert seen[0].num_shards == 1
    return MoodyStore(open_store(source)), open_store(str(tmp_path / "set")), seen[0]


def work(raw: MoodyStore, store: Store, plan: Plan, *, threads: int = 4) -> Any:
    with Decoder() as decoder:
        return pack_shard(
            0,
            plan,
            store=store,
            open_source=lambda _: raw,  # type: ignore[arg-type, return-value]
            decoder=decoder,
            fetch_threads=threads,
            fetch_bytes=2**20,
        )


def reasons(marker: Any) -> dict[str, str]:
    return {row.uri.rpartition("/")[2]: row.reason for row in marker.rejected}


def test_objects_deleted_or_replaced_after_the_listing_are_rejected(tmp_path: Path) -> None:
    raw, store, plan = planned(tmp_path, {f"{n}.jpg": jpeg(n) for n in range(4)})
    (tmp_path / "raw" / "1.jpg").unlink()
    (tmp_path / "raw" / "2.jpg").write_bytes(jpeg(77))

    marker = work(raw, store, plan)

    assert reasons(marker) == {"1.jpg": "not_found", "2.jpg": "changed"}
    assert marker.record.samples == 2


def test_a_failure_that_may_pass_commits_nothing(tmp_path: Path) -> None:
    raw, store, plan = planned(tmp_path, {f"{n}.jpg": jpeg(n) for n in range(4)})
    raw.down = {"2.jpg"}

    with pytest.raises(UnreachableError, match=r"2\.jpg"):
        work(raw, store, plan)
    assert not list((tmp_path / "set").glob("_commit/*"))

    raw.down = set()
    assert work(raw, store, plan).record.samples == 4


def test_an_object_that_alone_is_refused_is_forbidden(tmp_path: Path) -> None:
    raw, store, plan = planned(tmp_path, {f"{n}.jpg": jpeg(n) for n in range(6)})
    raw.refuse = {"3.jpg"}

    marker = work(raw, store, plan, threads=1)

    assert reasons(marker) == {"3.jpg": "forbidden"}
    assert raw.reads["3.jpg"] == 2
    assert marker.record.samples == 5


@pytest.mark.parametrize("count", [1, 3, 230])
def test_refusals_only_stop_the_run_and_blame_no_object(tmp_path: Path, count: int) -> None:
    contents = {f"{n:03}.jpg": jpeg(n) for n in range(count)}
    raw, store, plan = planned(tmp_path, contents)
    raw.refuse = set(contents)

    with pytest.raises(AccessError, match="credentials"):
        work(raw, store, plan)

    assert max(raw.reads.values()) == 1, "none was tried twice"
    assert not list((tmp_path / "set").glob("_commit/*"))


def test_credentials_that_expire_on_the_way_blame_no_object(tmp_path: Path) -> None:
    contents = {f"{n:03}.jpg": jpeg(n) for n in range(12)}
    raw, store, plan = planned(tmp_path, contents)

    def expired(path: str) -> Any:
        raise AccessError(f"{path}: access denied; check the credentials")

    raw.head = expired  # type: ignore[method-assign]
    raw.refuse = set(list(contents)[:5])

    with pytest.raises(AccessError, match="credentials"):
        work(raw, store, plan, threads=1)
    assert not list((tmp_path / "set").glob("_commit/*"))


def test_a_worker_that_dies_before_its_marker_changes_nothing(tmp_path: Path) -> None:
    raw, store, plan = planned(tmp_path, {f"{n}.jpg": jpeg(n) for n in range(4)})

    class DiesBeforeMarker:
        def __getattr__(self, name: str) -> Any:
            return getattr(store, name)

        def put(self, path: str, buffers: Any, *, create_only: bool = False) -> str:
            if create_only:
                raise Stop
            return store.put(path, buffers)

    with pytest.raises(Stop):
        work(raw, DiesBeforeMarker(), plan)
    left = [name for name in files(tmp_path / "set") if name.endswith(".tar")]
    report = pack(raw.url, store.url, PackConfig(workers=1))

    assert len(left) == 1
    assert report.resumed_shards == 0
    assert [name for name in files(tmp_path / "set") if name.endswith(".tar")] == left


def test_of_two_workers_on_one_shard_the_first_counts(tmp_path: Path) -> None:
    raw, store, plan = planned(tmp_path, {f"{n}.jpg": jpeg(n) for n in range(4)})
    first = work(raw, store, plan)
    (tmp_path / "raw" / "1.jpg").unlink()

    second = work(raw, store, plan)

    assert second == first == read_marker(store, 0)
    report = pack(raw.url, store.url, PackConfig(workers=1))
    assert (report.packed, report.rejected) == (4, {})


def test_progress_counts_to_the_last_shard(tmp_path: Path) -> None:
    source = fill(tmp_path / "raw", photos(11) | {"empty": b""})
    seen: list[PackProgress] = []

    report = pack(source, str(tmp_path / "set"), SMALL, progress=seen.append)

    assert [state.shards_done for state in seen] == list(range(1, report.shards + 1))
    assert {state.shards for state in seen} == {report.shards}
    assert (seen[-1].packed, seen[-1].rejected) == (11, 0)
    assert seen[-1].bytes == report.bytes


def test_hostile_names_are_packed_and_found_again(tmp_path: Path) -> None:
    names = ["new\nline.jpg", "a.b.c.JPG", "x#1", "p%20q", " ü😀 ", "quote'\".png", "..a", "-rf"]
    source = fill(tmp_path / "raw", {name: jpeg(n) for n, name in enumerate(names)})

    report = pack(source, str(tmp_path / "set"), SMALL)

    table = ShardSet.open(report.url).table(columns=["uri", "key"])
    assert sorted(table["uri"].to_pylist()) == sorted(f"{source}/{name}" for name in names)
    assert all(key.isalnum() and key.isascii() for key in table["key"].to_pylist())


def test_nothing_of_the_plan_or_the_manifest_tells_time_or_worker(tmp_path: Path) -> None:
    source = fill(tmp_path / "raw", photos(4))
    pack(source, str(tmp_path / "set"), SMALL)
    first = files(tmp_path / "set")
    shutil.rmtree(tmp_path / "set")

    pack(source, str(tmp_path / "set"), SMALL)

    assert files(tmp_path / "set") == first
    metadata = pq.read_schema(tmp_path / "set" / "manifest.parquet").metadata
    assert metadata[b"format_version"] == b"1"


@pytest.mark.s3
def test_from_s3_to_s3_with_workers_of_their_own(s3: LocalS3) -> None:
    raw, out = s3.make_bucket("pack-raw"), s3.make_bucket("pack-out")
    contents = photos(14)
    store = open_store(f"{raw}/some/prefix")
    for name, data in contents.items():
        store.put(name, data)
    store.put("copy.jpg", contents["class 0/000.jpg"])
    _put_folder_marker(s3, "pack-raw", "some/prefix/marker/")

    def run(name: str, workers: int) -> PackReport:
        config = PackConfig(workers=workers, max_shard_samples=4)
        return pack(f"{raw}/some/prefix/", f"{out}/{name}", config)

    one, two = run("one", 1), run("two", 2)

    assert one.set_id == two.set_id
    assert one.listed == 16
    assert one.rejected == two.rejected == {"duplicate": 1, "empty": 1}
    table = ShardSet.open(f"{out}/two").table(columns=["uri", "etag"])
    assert all(uri.startswith(f"{raw}/some/prefix/class ") for uri in table["uri"].to_pylist())
    assert all(len(etag) == 32 for etag in table["etag"].to_pylist())


def _put_folder_marker(s3: LocalS3, bucket: str, key: str) -> None:
    import boto3  # the only way to write a name that ends with a slash

    client = boto3.client(
        "s3",
        endpoint_url=s3.endpoint,
        aws_access_key_id=s3.environment["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=s3.environment["AWS_SECRET_ACCESS_KEY"],
        region_name="us-east-1",
    )
    client.put_object(Bucket=bucket, Key=key, Body=b"")


def test_new_and_changed_objects_become_another_generation(tmp_path: Path) -> None:
    contents = photos(12)
    source = fill(tmp_path / "raw", contents | {"page.jpg": b"<html>"})
    first = pack(source, str(tmp_path / "set"), SMALL)
    before = ShardSet.open(first.url).table(["uri"])
    changed = next(name for name in contents if name.endswith("3.jpg"))
    fill(tmp_path / "raw", {"new.jpg": jpeg(501), changed: jpeg(502)})

    added = pack(source, first.url, SMALL, add=True)

    assert (added.generation, added.version, added.set_id) == (1, 2, first.set_id)
    assert (added.listed, added.packed, added.already) == (14, 2, 12)
    assert added.dead == {"superseded": 1}
    after = ShardSet.open(first.url).table(["uri"])
    old = dict(zip(before["uri"].to_pylist(), before["sample_id"].to_pylist(), strict=True))
    new = dict(zip(after["uri"].to_pylist(), after["sample_id"].to_pylist(), strict=True))
    assert set(new) == {*old, f"{source}/new.jpg"}
    assert {uri for uri in old if old[uri] != new[uri]} == {f"{source}/{changed}"}
    assert min(new[f"{source}/new.jpg"], new[f"{source}/{changed}"]) >= 12
    nothing = pack(source, first.url, SMALL, add=True)
    assert (nothing.was_complete, nothing.version, nothing.already) == (True, 2, 14)
    assert not (tmp_path / "set" / "plan" / "g0002").exists()


def test_adding_that_was_stopped_continues_to_the_same_bytes(tmp_path: Path) -> None:
    source = fill(tmp_path / "raw", photos(9))
    for name in ("whole", "cut"):
        pack(source, str(tmp_path / name), SMALL)
    fill(tmp_path / "raw", {f"new/{n}.jpg": jpeg(600 + n) for n in range(12)})
    pack(source, str(tmp_path / "whole"), SMALL, add=True)

    with pytest.raises(Stop):
        pack(source, str(tmp_path / "cut"), SMALL, add=True, progress=stop_after(1))
    assert ShardSet.open(str(tmp_path / "cut")).version == 1
    pack(source, str(tmp_path / "cut"), SMALL, add=True)

    assert files(tmp_path / "cut") == files(tmp_path / "whole")


def test_the_users_columns_of_several_lists_travel_into_the_index(tmp_path: Path) -> None:
    fill(tmp_path / "raw", {f"{n}.jpg": jpeg(n) for n in range(6)})
    (tmp_path / "raw" / "one.csv").write_text("path,label\n0.jpg,cat\n1.jpg,dog\n2.jpg,cat\n")
    (tmp_path / "raw" / "two.csv").write_text("path,caption\n3.jpg,a red car\n4.jpg,\n5.jpg,sea\n")
    sources = [str(tmp_path / "raw" / name) for name in ("one.csv", "two.csv")]

    report = pack_or_plan(sources, str(tmp_path / "set"), SMALL)

    assert report is not None
    assert report.packed == 6
    rows = ShardSet.open(report.url).table(["uri", "label", "caption"]).to_pylist()
    found = {Path(row["uri"]).name: (row["label"], row["caption"]) for row in rows}
    assert found["0.jpg"] == ("cat", None)
    assert found["3.jpg"] == (None, "a red car")


def test_images_are_resized_only_if_they_are_larger(tmp_path: Path) -> None:
    small, large = jpeg(1), jpeg(2)
    source = fill(tmp_path / "raw", {"small.jpg": small, "large.jpg": large})
    side = 40

    report = pack(source, str(tmp_path / "set"), PackConfig(workers=1, resize_side=side))

    shard_set = ShardSet.open(report.url)
    rows = {Path(row["uri"]).name: row for row in shard_set.table().to_pylist()}
    assert {row["action"] for row in rows.values()} == {"resize"}
    assert {min(row["width"], row["height"]) for row in rows.values()} == {side}
    assert rows["large.jpg"]["source_size"] == len(large)
    kept = pack(source, str(tmp_path / "kept"), PackConfig(workers=1, resize_side=4096))
    assert set(ShardSet.open(kept.url).table(["action"])["action"].to_pylist()) == {"keep"}


def test_a_workers_memory_stays_within_its_bounds(tmp_path: Path) -> None:
    bound, size = 4 * 2**20, 2**20
    source = fill(tmp_path / "raw", {f"{n}.bin": os.urandom(size) for n in range(30)})
    raw, held, most = open_store(source), 0, 0

    class Counting:
        url, uri, head = raw.url, raw.uri, raw.head

        def read(self, path: str, *, if_match: str | None = None) -> Any:
            nonlocal held, most
            held += 1
            most = max(most, held)
            return raw.read(path, if_match=if_match)

    seen: list[Plan] = []
    pack_or_plan(
        source,
        str(tmp_path / "set"),
        PackConfig(workers=1),
        dry_run=True,
        on_plan=lambda plan, _: seen.append(plan),
    )
    objects = _Objects(
        seen[0].rows(open_store(str(tmp_path / "set")), 0),
        lambda _: Counting(),  # type: ignore[arg-type, return-value]
        max_object_bytes=2**30,
    )
    for _ in objects.fetch(threads=8, ahead_bytes=bound):
        held -= 1

    assert 1 < most <= bound // size + 1


def served(url: str) -> dict[str, int]:
    """Names of the objects whose samples are served, and their sample ids."""
    rows = ShardSet.open(url).table(["uri"]).to_pylist()
    return {row["uri"].rpartition("/")[2]: row["sample_id"] for row in rows}


def test_content_that_moved_to_another_name_is_served_under_it(tmp_path: Path) -> None:
    pictures = [jpeg(n) for n in range(6)]
    source = fill(tmp_path / "raw", {f"{n}.jpg": pictures[n] for n in range(5)})
    url = pack(source, str(tmp_path / "set"), SMALL).url
    fill(tmp_path / "raw", {f"{n + 1}.jpg": pictures[n] for n in range(5)})
    fill(tmp_path / "raw", {"0.jpg": pictures[5]})

    pack(source, url, SMALL, add=True)

    shard_set = ShardSet.open(url)
    assert set(served(url)) == {f"{n}.jpg" for n in range(6)}
    assert len(set(shard_set.table(["content"])["content"].to_pylist())) == 6


def test_what_was_rejected_and_then_mended_is_packed_once(tmp_path: Path) -> None:
    source = fill(tmp_path / "raw", {"0.jpg": jpeg(0), "m.jpg": b"<html>broken"})
    url = pack(source, str(tmp_path / "set"), SMALL).url
    fill(tmp_path / "raw", {"m.jpg": jpeg(77)})

    first = pack(source, url, SMALL, add=True)
    then = [pack(source, url, SMALL, add=True) for _ in range(2)]

    assert (first.packed, first.already, first.dead) == (1, 1, {})
    assert [(one.was_complete, one.packed, one.version) for one in then] == [(True, 0, 2)] * 2
    assert set(served(url)) == {"0.jpg", "m.jpg"}


def test_a_duplicate_outlives_the_change_of_its_twin(tmp_path: Path) -> None:
    source = fill(tmp_path / "raw", {f"{n}.jpg": jpeg(n) for n in range(4)})
    fill(tmp_path / "raw", {"copy.jpg": jpeg(2)})
    url = pack(source, str(tmp_path / "set"), SMALL).url
    (kept,) = {"2.jpg", "copy.jpg"} & set(served(url))
    (other,) = {"2.jpg", "copy.jpg"} - {kept}
    fill(tmp_path / "raw", {kept: jpeg(60)})

    pack(source, url, SMALL, add=True)
    again = pack(source, url, SMALL, add=True)
    then = pack(source, url, SMALL, add=True)

    assert (again.packed, again.already) == (1, 4)
    assert set(served(url)) == {"0.jpg", "1.jpg", "3.jpg", kept, other}
    assert (then.was_complete, then.packed) == (True, 0)


def test_adding_keeps_what_a_compaction_said_of_the_set(tmp_path: Path) -> None:
    source = fill(tmp_path / "raw", {f"{n}.jpg": jpeg(n) for n in range(8)})
    first = pack(source, str(tmp_path / "set"), SMALL)
    takedown(first.url, [f"{source}/3.jpg"])
    compact(first.url, min_dead_frac=0, workers=1, delete_old=False)
    fill(tmp_path / "raw", {"new.jpg": jpeg(50)})

    added = pack(source, first.url, SMALL, add=True)

    assert (added.packed, added.already, added.set_id) == (1, 8, first.set_id)
    assert json.loads(ShardSet.open(first.url).metadata["erased"]) == {"takedown": 1}
    assert "3.jpg" not in served(first.url)


def test_a_dry_run_that_found_nothing_new_does_not_stop_the_next_one(tmp_path: Path) -> None:
    source = fill(tmp_path / "raw", photos(4))
    url = pack(source, str(tmp_path / "set"), SMALL).url
    assert pack(source, url, SMALL, add=True, dry_run=True).was_complete
    fill(tmp_path / "raw", {"new.jpg": jpeg(50)})

    assert pack(source, url, SMALL, add=True).packed == 1


def test_a_generation_of_other_settings_is_refused(tmp_path: Path) -> None:
    source = fill(tmp_path / "raw", photos(4))
    url = pack(source, str(tmp_path / "set"), SMALL).url

    with pytest.raises(PlanError, match="resize_side 0, not 16"):
        pack(source, url, replace(SMALL, resize_side=16), add=True)


@pytest.mark.parametrize("at", ["shards.txt", "manifest.parquet"])
def test_a_kill_behind_the_new_version_is_healed_by_the_next_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    source = fill(tmp_path / "raw", photos(4))
    url = pack(source, str(tmp_path / "set"), SMALL).url
    fill(tmp_path / "raw", {"new.jpg": jpeg(50)})
    put = FolderStore.put

    def killed(self: Any, path: str, buffers: Any, *, create_only: bool = False) -> str:
        if path == at:
            raise Stop
        return put(self, path, buffers, create_only=create_only)

    with monkeypatch.context() as patch:
        patch.setattr(FolderStore, "put", killed)
        with pytest.raises(Stop):
            pack(source, url, SMALL, add=True)
    again = pack(source, url, SMALL, add=True)

    assert (again.was_complete, again.version) == (True, 2)
    names = (tmp_path / "set" / "shards.txt").read_text().split()
    assert names == ShardSet.open(url).names
    newest = (tmp_path / "set" / "manifests" / "v000002.parquet").read_bytes()
    assert (tmp_path / "set" / "manifest.parquet").read_bytes() == newest


def test_a_killed_clean_up_of_a_hopeless_set_blocks_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = fill(tmp_path / "raw", {f"{n}.jpg": b"<html>%d" % n for n in range(4)})
    delete = FolderStore.delete

    def killed(self: Any, paths: Any) -> None:
        for path in paths:
            if not path.endswith("plan.json"):
                raise Stop
            delete(self, [path])

    with monkeypatch.context() as patch:
        patch.setattr(FolderStore, "delete", killed)
        with pytest.raises(Stop):
            pack(source, str(tmp_path / "set"), SMALL)
    fill(tmp_path / "raw", photos(3))

    assert pack(source, str(tmp_path / "set"), SMALL).packed == 3


@pytest.mark.s3
def test_labels_of_a_list_join_the_objects_of_their_bucket(s3: LocalS3, tmp_path: Path) -> None:
    raw = s3.make_bucket("labelled-raw")
    for n in range(4):
        open_store(raw).put(f"{n}.jpg", jpeg(n))
    labels = "".join(f"{raw}/{n}.jpg,label {n}\n" for n in range(4))
    (tmp_path / "list.csv").write_text("uri,label\n" + labels)

    report = pack_or_plan([raw, str(tmp_path / "list.csv")], str(tmp_path / "set"), SMALL)

    assert report is not None
    assert (report.listed, report.packed, report.rejected) == (8, 4, {"duplicate": 4})
    rows = ShardSet.open(report.url).table(["uri", "label"]).to_pylist()
    assert {row["label"] for row in rows} == {f"label {n}" for n in range(4)}


@pytest.mark.s3
def test_a_new_copy_of_a_packed_object_is_not_served_twice(s3: LocalS3) -> None:
    raw, out = s3.make_bucket("copied-raw"), s3.make_bucket("copied-out")
    for n in range(5):
        open_store(raw).put(f"{n}.jpg", jpeg(n))
    url = pack(raw, f"{out}/set", SMALL).url
    open_store(raw).put("copy of 3.jpg", jpeg(3))

    added = pack(raw, url, SMALL, add=True)

    assert (added.packed, added.samples, added.dead) == (1, 5, {"duplicate": 1})
