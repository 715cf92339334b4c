"""The benchmarks of loaders and of shuffling, at a size that shows only that they run."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

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
def test_loaders_are_measured_in_every_section(tmp_path: Path) -> None:
    count, result = 128, tmp_path / "result.md"
    photos = tmp_path / f"photos-{WIDTH}x{HEIGHT}-{count}"  # where the benchmark looks for them
    photos.mkdir()
    for number in range(count):
        (photos / f"{number:06}.jpg").write_bytes(picture(number))

    benchmark(
        "loaders",
        *(f"--photos={count}", "--copies=2", "--repeats=1", "--seconds=0.05", "--bounds=1"),
        f"--out={result}",
        env={"MOCO_SCALE_CACHE": str(tmp_path)},
        timeout_s=560,
    )

    text = result.read_text()
    for section in range(1, 7):
        assert f"## {section}. " in text
    assert "nan" not in text
