"""The command line as users run it: real processes, with deadlines."""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

MOCO_SCALE = (sys.executable, "-m", "moco_scale")

TINY = """\
[data]
global_batch_size = 16
view_size = 32
num_threads = 1
[model]
backbone = "resnet18"
dim = 16
queue_size = 64
momentum = 0.9
bn_sub_batch = 4
shuffle_domain = 16
[optim]
lr = 0.03
epochs = 3
[run]
log_every = 1
checkpoint_every = 4
ledger = true
"""
"""A preset small enough for tests: 16 images a step, ResNet-18 at 32 px."""


def on_one_core() -> tuple[str, ...]:
    """Before a command that trains: one core, so one thread.

    Threads that wait for each other take ten times as long when others want the cores, too; and on
    their number depend the bits of a sum.
    """
    return ("taskset", "-c", str(max(os.sched_getaffinity(0))))


def moco_scale(
    *arguments: str,
    before: Sequence[str] = (),
    timeout_s: float = 240,
    env: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run one command to its end and return what it printed."""
    return subprocess.run(
        [*before, *MOCO_SCALE, *arguments],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        env={**os.environ, **(env or {})},
        check=False,
    )


def torchrun(
    processes: int, *arguments: str, timeout_s: float = 240
) -> subprocess.CompletedProcess[str]:
    """The same command under torchrun on this machine."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*launch, "--nproc-per-node", str(processes), "-m", "moco_scale", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=timeout_s, env=os.environ, check=False
    )


def pretrain_arguments(preset: Path, shard_set: str, run: str, *more: str) -> Sequence[str]:
    """The arguments of a tiny training run."""
    return ("pretrain", "--preset", str(preset), "--data", shard_set, "--out", run, *more)
