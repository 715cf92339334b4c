"""The commands about shard sets, as users type them, on a real S3 server."""

import json
import tarfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from demo.local_s3 import LocalS3
from shards.store import open_store
from tests.integration.conftest import photo
from tests.support.command import moco_scale

pytestmark = [pytest.mark.s3, pytest.mark.usefixtures("s3"), pytest.mark.timeout(600)]


def said(*arguments: str, code: int = 0) -> str:
    done = moco_scale(*arguments)
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout


def report(*arguments: str, code: int = 0) -> dict:  # type: ignore[type-arg]  # JSON
    found: dict = json.loads(said(*arguments, "--json", code=code).splitlines()[-1])  # type: ignore[type-arg]
    return found


def names(url: str) -> Sequence[str]:
    return [path for page in open_store(url).list() for path in page.column("path").to_pylist()]


def test_a_set_is_planned_packed_extended_curated_compacted_and_verified(
    s3: LocalS3, tmp_path: Path
) -> None:
    raw, out = s3.make_bucket("curated-raw"), s3.make_bucket("curated")
    bucket, shard_set = open_store(raw), f"{out}/set"
    for number in range(30):
        bucket.put(f"photo {number:02}.jpg", photo(seed=number))
    pack = ("pack", raw, shard_set, "--max-shard-samples", "8")

    planned = said(*pack, "--dry-run")
    assert "to fetch" in planned
    assert "30 objects" in planned
    assert not any(name.endswith(".tar") for name in names(shard_set))
    events = [json.loads(line) for line in said(*pack, "--json").splitlines()]
    assert [event["event"] for event in events if event["event"] != "progress"] == ["done"]
    assert (events[-1]["listed"], events[-1]["packed"]) == (30, 30)

    bucket.put("photo 30.jpg", photo(seed=30))
    assert "already there 30" in said(*pack, "--add")
    assert report("verify", shard_set, "--level", "decode")["num_faults"] == 0
    assert report("dedup", shard_set, "--distance", "0")["buried"] == 0

    gone = f"{raw}/photo 07.jpg"
    taken = report("takedown", shard_set, "--uri", gone, "--uri", "no-such-uri", code=1)
    assert (taken["buried"], taken["not_found"]) == (1, ["no-such-uri"])
    data = bytes(bucket.read("photo 07.jpg"))
    tars = [name for name in names(shard_set) if name.endswith(".tar")]
    assert any(data in bytes(open_store(shard_set).read(name)) for name in tars)
    assert report("compact", shard_set, "--delete-old")["erased"] == {"takedown": 1}
    tars = [name for name in names(shard_set) if name.endswith(".tar")]
    assert not any(data in bytes(open_store(shard_set).read(name)) for name in tars)
    assert "already there 31" in said(*pack, "--add"), "what was taken down stays away"

    sheet = tmp_path / "sheet.jpg"
    found = report("info", shard_set, "--contact-sheet", str(sheet))
    assert found["num_samples"] == 30
    assert sheet.read_bytes().startswith(b"\xff\xd8")
    assert report("verify", shard_set)["num_faults"] == 0
    first = next(name for name in names(shard_set) if name.endswith(".tar"))
    open_store(shard_set).put(first, b"no tar")
    assert "fault" in said("verify", shard_set, code=1)


def test_tars_of_others_become_a_set_and_other_readers_get_their_indexes(
    s3: LocalS3, tmp_path: Path
) -> None:
    url = f"{s3.make_bucket('adopted')}/tars"
    for shard in range(2):
        with tarfile.open(tmp_path / f"{shard}.tar", "w") as tar:
            for number in range(5):
                file = tmp_path / f"{shard}-{number}.jpg"
                file.write_bytes(photo(seed=10 * shard + number))
                tar.add(file, arcname=file.name)
        open_store(url).put(f"{shard}.tar", (tmp_path / f"{shard}.tar").read_bytes())

    assert "10 adopted" in said("index", url)
    said("index", url, "--write", "idx", "wids")
    said("finalize", url, "--stable-names")

    written = names(url)
    assert "wids.json" in written
    assert {"stable/000000.tar", "stable/000001.tar"} <= set(written)
    assert sum(name.endswith(".idx") for name in written) == 2
    assert report("verify", url, "--level", "decode")["num_faults"] == 0
