"""Damaged images of all kinds: no crash, and the sound ones beside them are shown as ever."""

import json
import subprocess
import sys

import pytest

from tests.support.encoded_batches import Path

paths = pytest.mark.parametrize("path", ["cpu", pytest.param("dali", marks=pytest.mark.dali)])


@paths
@pytest.mark.timeout(120)
def test_320_mutated_images_crash_nothing_and_spoil_no_batch(path: Path) -> None:
    fuzz(path, batches=40, timeout_s=100)


@pytest.mark.slow
@paths
@pytest.mark.timeout(1500)
def test_10000_mutated_images_crash_nothing_and_spoil_no_batch(path: Path) -> None:
    fuzz(path, batches=1250, timeout_s=1400)


def fuzz(path: Path, *, batches: int, timeout_s: float) -> None:
    command = [sys.executable, "-m", "tests.support.view_fuzzing", path]
    run = subprocess.run(
        [*command, "--batches", str(batches)],
        capture_output=True,
        encoding="utf-8",
        errors="replace",  # decoders print bytes of what is damaged
        timeout=timeout_s,
        check=False,
    )

    assert run.returncode == 0, run.stderr[-3000:]
    outcomes = json.loads(run.stdout)
    print(f"{path}: {outcomes}")
    assert outcomes["batches"] == batches
    assert outcomes["mutated"] == 8 * batches
    assert outcomes["refused by the guard"] > batches
    assert outcomes["refused by the decoder"] > batches / 2
