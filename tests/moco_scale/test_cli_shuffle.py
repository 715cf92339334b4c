"""`moco-scale shuffle`, as users type it."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.support.command import moco_scale
from tests.support.made_sets import Made, make_set

pytestmark = pytest.mark.timeout(120)

SHARDS, SHARD_SAMPLES = 16, 64


@pytest.fixture
def in_bucket_order(tmp_path: Path) -> str:
    return _made(tmp_path / "in order", np.arange(SHARDS * SHARD_SAMPLES))


@pytest.fixture
def shuffled(tmp_path: Path) -> str:
    return _made(
        tmp_path / "shuffled", np.random.default_rng(0).permutation(SHARDS * SHARD_SAMPLES)
    )


def _made(folder: Path, objects: np.ndarray) -> str:  # type: ignore[type-arg]  # of integers
    samples = [Made(uri=f"raw/{number:06}", data=b"%d" % number) for number in objects]
    shards = [samples[at : at + SHARD_SAMPLES] for at in range(0, len(samples), SHARD_SAMPLES)]
    make_set(str(folder), shards)
    return str(folder)


def test_a_shuffle_at_packing_shows_in_the_bucket_and_not_in_the_shards(
    in_bucket_order: str, shuffled: str
) -> None:
    def sequential(url: str) -> tuple[float, float]:
        done = moco_scale("shuffle", url, "--data.global-batch-size", "64", "--json")
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)["sequential"]
        return found["shards"]["pairs_global"], found["rows"]["pairs_global"]

    of_ordered, of_shuffled = sequential(in_bucket_order), sequential(shuffled)

    expected = (SHARDS * SHARD_SAMPLES - 1) / (SHARD_SAMPLES - 1)
    assert of_ordered == pytest.approx((expected, expected))
    assert of_shuffled == pytest.approx((expected, 1), abs=0.3)


def test_the_table_fits_a_terminal_and_the_picture_is_drawn(shuffled: str, tmp_path: Path) -> None:
    picture = tmp_path / "mixed.png"

    done = moco_scale(
        *("shuffle", shuffled, "--data.global-batch-size", "64", "--world-size", "2"),
        *("--plot", str(picture)),
        env={"COLUMNS": "80"},
    )

    assert done.returncode == 0, done.stderr
    for column in ("this set", "uniform", "sequential", "webdataset"):
        assert column in done.stdout
    table = done.stdout.partition("picture")[0].splitlines()
    assert max(map(len, table)) <= 80
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_it_starts_without_torch(shuffled: str) -> None:
    command = ("-X", "importtime", "-m", "moco_scale", "shuffle", shuffled)

    done = subprocess.run(
        [sys.executable, *command, "--data.global-batch-size", "64"],
        capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "numpy" in loaded
    assert not loaded & {"torch", "nvidia.dali", "matplotlib"}


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--world-size", "3"), "3 ranks cannot share data.global_batch_size 64"),
        (("--epochs", "0"), "epochs must be at least 1"),
        (("--data.global-batch-size", "5000"), "fewer than its 5000 lanes"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(
    shuffled: str, flags: tuple[str, ...], said: str
) -> None:
    given = ("--data.global-batch-size", "64", *flags)

    done = moco_scale("shuffle", shuffled, *given)

    assert done.returncode in (1, 2)
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1
