"""The benchmarks of loaders and of shuffling, at a size that shows only that they run."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from functools import partial
from importlib import metadata
from pathlib import Path

import pytest

from benchmarks.loader_sides import children_s
from benchmarks.photos import HEIGHT, WIDTH
from tests.support.shard_sets import picture


def benchmark(name: str, *flags: str, env: Mapping[str, str], timeout_s: float) -> str:
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", *flags],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        env={**os.environ, **env},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.timeout(120)
def test_shuffling_is_measured_beside_webdataset_whose_imitation_is_exact(tmp_path: Path) -> None:
    result = tmp_path / "result.md"
    sizes = {"classes": 32, "class-images": 64, "shard-images": 64}
    steps = {"global-batch-size": 32, "world-size": 2, "queue-size": 128}
    flags = [f"--{name}={value}" for name, value in (sizes | steps).items()]

    benchmark("shuffling", *flags, f"--out={result}", env={}, timeout_s=100)

    text = result.read_text()
    assert text.count("imitates webdataset's order exactly") == 2
    (in_bucket,) = [
        line
        for line in text.split("in a row of the bucket**")[1].splitlines()
        if line.startswith("| pair excess, global batch")
    ]
    packed_ours, _, _, ordered_webdataset, *_ = map(float, in_bucket.split("|")[2:-1])
    assert packed_ours == pytest.approx(1, abs=0.1)
    assert ordered_webdataset > 5


@pytest.mark.slow
@pytest.mark.s3
@pytest.mark.dali
@pytest.mark.timeout(580)
@pytest.mark.parametrize(
    "sections",
    [
        {1: "encoded", 2: "requests", 3: "handover", 4: "views", 5: "memory", 6: "order"},
        {7: "epoch", 8: "whole"},
    ],
    ids=["ours", "whole loaders"],
)
def test_loaders_are_measured_in_every_section(tmp_path: Path, sections: dict[int, str]) -> None:
    count, result = 128, tmp_path / "result.md"
    photos = tmp_path / f"photos-{WIDTH}x{HEIGHT}-{count}"  # where the benchmark looks for them
    photos.mkdir()
    for number in range(count):
        (photos / f"{number:06}.jpg").write_bytes(picture(number))

    benchmark(
        "loaders",
        *("--sections", *sections.values()),
        *(f"--photos={count}", "--copies=2", "--repeats=1", "--seconds=0.05", "--bounds=1"),
        f"--out={result}",
        env={"MOCO_SCALE_CACHE": str(tmp_path)},
        timeout_s=560,
    )

    text = result.read_text()
    for number in sections:
        assert f"## {number}. " in text
    assert "nan" not in text
    for package, peer in PEERS.items():
        takes_part = f"\n| {peer}" in text
        if {"encoded", "epoch", "whole"} & {*sections.values()}:
            assert takes_part == installed(package)
            assert (package in text.partition("Left out")[2]) != takes_part


PEERS = {"mosaicml-streaming": "MosaicML Streaming", "litdata": "litData"}


def installed(package: str) -> bool:
    try:
        return bool(metadata.version(package))
    except metadata.PackageNotFoundError:
        return False


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    ("package", "kind"), [("mosaicml-streaming", "mds"), ("litdata", "litdata")]
)
def test_peer_reads_the_same_bytes(tmp_path: Path, package: str, kind: str) -> None:
    if not installed(package):
        pytest.skip(f"{package} is not installed: extra bench")
    photos, in_its_format = tmp_path / "photos", tmp_path / "set"
    photos.mkdir()
    pictures = [picture(number) for number in range(128)]
    for number, one in enumerate(pictures):
        (photos / f"{number:06}.jpg").write_bytes(one)

    run_side = partial(side, caches=tmp_path)
    run_side(f"write_{kind}", photos=str(photos), out=str(in_its_format), copies=2)
    encoded = run_side(f"encoded_{kind}", url=str(in_its_format), samples=2 * 128)
    viewed = run_side(f"loader_{kind}", url=str(in_its_format), samples=2 * 64, workers=2)

    parts = [one.read_bytes() for one in in_its_format.iterdir() if one.name != "index.json"]
    assert len(parts) == 2
    assert all(one in part for part in parts for one in pictures)
    assert encoded["samples"] == 2 * 128
    assert viewed["samples"] == 2 * 64


def side(name: str, *, caches: Path, **given: object) -> dict[str, float]:
    env = {"TMPDIR": str(caches)}
    printed = benchmark("peer_sides", name, json.dumps(given), env=env, timeout_s=75)
    figures: dict[str, float] = json.loads(printed.splitlines()[-1])
    return figures


@pytest.mark.timeout(60)
def test_cpu_seconds_of_processes_below_count_alive_and_dead() -> None:
    busy = "import time\nwhile time.process_time() < 0.5: pass\nprint(flush=True); input()"
    before = children_s()

    with subprocess.Popen(
        [sys.executable, "-c", busy], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        child.stdout.readline()
        alive = children_s() - before
        child.communicate(b"\n")
    dead = children_s() - before

    assert 0.4 < alive <= dead
