"""A process of a run that is told to stop, or whose GPU is too small."""

import contextlib
import signal
import subprocess
from pathlib import Path

import pytest
import torch

from moco_scale.checkpoint import latest
from moco_scale.errors import EXIT_AGAIN, TrainError
from moco_scale.pretrain import pretrain
from moco_scale.trainer import Trainer
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


def test_a_gpu_that_is_too_small_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: Trainer) -> None:
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79.11 "
            "GiB of which 4.19 MiB is free. Including non-PyTorch memory, this process has 79 GiB"
        )

    monkeypatch.setattr(Trainer, "run", fail)
    preset = tmp_path / "tiny.toml"
    preset.write_text(TINY)
    synthetic = ("--data.mode", "synthetic", "--run.device", "cpu")
    arguments = pretrain_arguments(preset, "", str(tmp_path / "run"), *synthetic)[1:]

    with pytest.raises(TrainError) as raised:
        pretrain(arguments, show=lambda _: None, say=lambda _: None)

    assert str(raised.value).startswith(
        "rank 0: CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of "
        "79.11 GiB of which 4.19 MiB is free; raise optim.accumulation"
    )
