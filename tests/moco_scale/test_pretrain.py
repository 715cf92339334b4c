"""A process of a run that is told to stop: it saves, and its exit code says so."""

import contextlib
import signal
import subprocess
from pathlib import Path

import pytest

from moco_scale.checkpoint import latest
from moco_scale.errors import EXIT_AGAIN
from shards.store import open_store
from tests.support.command import MOCO_SCALE, TINY, pretrain_arguments


@pytest.mark.timeout(120)
def test_another_signal_after_it_has_saved_does_not_change_the_exit_code(tmp_path: Path) -> None:
    preset, run = tmp_path / "tiny.toml", str(tmp_path / "run")
    preset.write_text(TINY)
    synthetic = ("--data.mode", "synthetic", "--run.log-every", "1", "--model.queue-size", "16")
    command = [*MOCO_SCALE, *pretrain_arguments(preset, "", run, *synthetic)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for printed in process.stdout:
            if printed.startswith("step"):
                process.send_signal(signal.SIGUSR1)
                break
        for printed in process.stdout:
            if printed.startswith("stopped by a signal and saved"):
                break

        # As launchers do to the others as soon as the first of several processes has ended.
        while process.poll() is None:
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=0.01)

    assert process.returncode == EXIT_AGAIN
    assert latest(open_store(run)).step > 0
