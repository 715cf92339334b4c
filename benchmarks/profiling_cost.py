"""What run.profile_steps costs: the same steps recorded and not, in pairs.

    python -m benchmarks.profiling_cost                     the smoke preset at 64 px, 8 pairs
    python -m benchmarks.profiling_cost --view-size 32 --steps 6 --pairs 2

Each side of a pair is a run of its own on the same made-up photos, with the CPU loader, whose
threads record two spans a sample: the most that there are. Two steps warm up; the rest is measured,
to the end of what is written. The sides take turns to be first.
"""

import argparse
import datetime
import shlex
import statistics
import sys
import tempfile
import time
import timeit
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.machine import machine
from demo.made_photos import photo_jpeg
from moco_scale.config import TrainConfig, load_config
from moco_scale.distributed import one_rank
from moco_scale.trainer import Trainer
from pipelines import open_loader
from pipelines.spans import Spans
from shards import PackConfig, pack

_WARM_UP = 2
_SPANS_OF_A_STEP = 15
"""That the trainer asks for, without those of the loader."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """Seconds of a run's measured steps."""

    wall_s: float
    cpu_s: float


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--view-size", type=int, default=64)
    parser.add_argument("--photos", type=int, default=512)
    parser.add_argument("--steps", type=int, default=16, help="measured steps of each run")
    parser.add_argument("--pairs", type=int, default=8)
    given = parser.parse_args(arguments)
    command = shlex.join(["python", "-m", "benchmarks.profiling_cost", *sys.argv[1:]])
    print(f"{machine('torch', 'numpy')}; {datetime.date.today().isoformat()}; `{command}`\n")
    with tempfile.TemporaryDirectory() as folder:
        config = _config(Path(folder), given)
        off, on = [], []
        for pair in range(given.pairs):
            sides = [(off, ""), (on, f"{_WARM_UP + 1}:{_WARM_UP + given.steps}")]
            for side, window in sides if pair % 2 else sides[::-1]:
                side.append(_train(config, window=window, url=f"{folder}/{pair}-{len(window)}"))
    print(_table(off, on, steps=given.steps))
    print(f"\nOff: {1e6 * _asking_s():.1f} us a step, for {_SPANS_OF_A_STEP} spans not recorded.")
    return 0


def _config(folder: Path, given: argparse.Namespace) -> TrainConfig:
    bucket = folder / "bucket"
    bucket.mkdir()
    for number in range(given.photos):
        # As many pictures as are quick to make; the bytes behind an image's end make it another.
        data = photo_jpeg(number % 64) + number.to_bytes(4, "big")
        (bucket / f"{number:06}.jpg").write_bytes(data)
    pack(str(bucket), str(folder / "set"), PackConfig())
    size, steps = str(given.view_size), str(_WARM_UP + given.steps)
    return load_config(
        [
            *("--preset", "smoke", "--data", str(folder / "set"), "--data.loader", "cpu"),
            *("--data.view-size", size, "--run.max-steps", steps),
        ]
    )


def _train(config: TrainConfig, *, window: str, url: str) -> Cost:
    ranks = one_rank()
    loader = open_loader(
        config.data, seed=0, rank=0, world_size=1, device_index=None, spans=ranks.spans
    )
    with closing(loader):
        trainer = Trainer(
            data=config.data,
            model=config.model,
            optim=config.optim,
            run=replace(config.run, url=url, profile_steps=window),
            loader=loader,
            ranks=ranks,
        )
        with trainer.stepping():
            for _ in range(_WARM_UP):
                trainer.advance()
            wall_s, cpu_s = time.perf_counter(), time.process_time()
            while not trainer.finished:
                trainer.advance()
            wall_s, cpu_s = time.perf_counter() - wall_s, time.process_time() - cpu_s
    assert (Path(url) / "profile").exists() == bool(window), "recorded, or not, as it was asked"
    return Cost(wall_s=wall_s, cpu_s=cpu_s)


def _table(off: list[Cost], on: list[Cost], *, steps: int) -> str:
    rows = [
        "| a step | off, median ms | on, median ms | more, median of pairs | least to most |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, field in (("CPU", "cpu_s"), ("wall", "wall_s")):
        without = [getattr(one, field) for one in off]
        with_it = [getattr(one, field) for one in on]
        more = [100 * (b / a - 1) for a, b in zip(without, with_it, strict=True)]
        rows.append(
            f"| {name} | {1000 * statistics.median(without) / steps:.1f} "
            f"| {1000 * statistics.median(with_it) / steps:.1f} "
            f"| {statistics.median(more):+.2f} % | {min(more):+.2f} to {max(more):+.2f} % |"
        )
    return "\n".join(rows)


def _asking_s() -> float:
    """Seconds that a step asks for spans when nothing records."""
    spans, times = Spans(), 20_000

    def ask() -> None:
        with spans.of("step"):
            pass

    return _SPANS_OF_A_STEP * timeit.timeit(ask, number=times) / times


if __name__ == "__main__":
    raise SystemExit(main())
