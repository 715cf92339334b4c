"""The exit code of torchrun with ours around it; workers are a shell's one-liners."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.hosts import wait_until

LAUNCH = (sys.executable, "-m", "moco_scale.launch", "--standalone", "--no-python", "sh", "-c")


@pytest.mark.parametrize(("worker", "launcher"), [(0, 0), (75, 75), (2, 2)])
def test_the_exit_code_is_that_of_the_workers(worker: int, launcher: int) -> None:
    done = subprocess.run(
        [*LAUNCH, f"exit {worker}"], capture_output=True, text=True, timeout=90, check=False
    )

    assert done.returncode == launcher, done.stderr
    assert "Traceback" not in done.stderr
    assert ("start the same command again" in done.stderr) == (launcher == 75)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_reaches_the_workers_and_asks_for_another_start(
    tmp_path: Path, number: signal.Signals
) -> None:
    ready, saved = tmp_path / "ready", tmp_path / "saved"
    name = number.name.removeprefix("SIG")
    script = f"trap 'touch {saved}; exit 75' {name}; touch {ready}; while :; do sleep 0.1; done"
    with subprocess.Popen([*LAUNCH, script], stderr=subprocess.PIPE, text=True) as process:
        wait_until(ready.exists, timeout_s=60, what="the worker")

        process.send_signal(number)
        _, said = process.communicate(timeout=60)

    assert process.returncode == 75
    assert saved.exists()
    assert f"stopped by {number.name}" in said
