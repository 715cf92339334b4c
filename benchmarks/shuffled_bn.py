"""What shuffled batch normalisation does: training curves with it and without, the same seed.

The trainer runs twice on the digits of benchmarks.learning. Without, the keys stay in the order of
the queries, so both views of an image are normalised with the same others. Curves are quoted,
nothing is asserted: `python -m benchmarks.shuffled_bn`; figures go to standard output and, with
--out, into a Markdown file.
"""

import argparse
import contextlib
import csv
import dataclasses
import datetime
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.machine import machine
from demo.images import digits
from moco_scale.config import TrainConfig
from moco_scale.distributed import one_rank
from moco_scale.metrics import StepMetrics
from moco_scale.settings import from_mapping, read_preset
from moco_scale.trainer import RunConfig, Trainer
from pipelines import open_loader
from shards import PackConfig, pack

PRESET = "digits"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=420)
    parser.add_argument("--rows", type=int, default=14, help="of the table")
    parser.add_argument("--bn-sub-batch", type=int, help="another BN group than the preset's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="a Markdown file for the result")
    given = parser.parse_args(arguments)
    # Threads that wait for each other would also wait for whatever else the machine does.
    torch.set_num_threads(1)
    began = time.monotonic()
    found = digits()
    with tempfile.TemporaryDirectory(prefix="moco-bench-") as scratch:
        pack(str(found.folder), f"{scratch}/shards", PackConfig(workers=1))
        labels = Path(scratch, "labels.csv")
        with labels.open("w", newline="") as written:
            csv.writer(written).writerows([("uri", "label"), *found.labels.items()])
        config = _config(given, scratch)
        curves = {}
        for name in ("shuffled", "in order"):
            run = dataclasses.replace(config.run, url=f"{scratch}/{name}", knn_labels=str(labels))
            curves[name] = _train(dataclasses.replace(config, run=run), shuffled=name != "in order")
    minutes = (time.monotonic() - began) / 60
    shown = " ".join(["python -m benchmarks.shuffled_bn", *_flags(given)])
    model, data = config.model, config.data
    lines = [
        "# Training with shuffled batch normalisation, and without",
        "",
        f"`{shown}`, {datetime.date.today().isoformat()}; {machine('torch', 'numpy')}, no GPU, "
        f"one thread; {minutes:.0f} min for both runs.",
        "",
        f"{found.about}; preset `{PRESET}`, the first {given.steps:,} steps, seed {given.seed}. "
        f"{data.global_batch_size} images a step in BN groups of {model.bn_sub_batch}, shuffled "
        f"over {model.shuffle_domain}; queue {model.queue_size:,}.",
        "",
        *_table(curves["shuffled"], curves["in order"]),
    ]
    text = "\n".join(lines)
    print(text)
    if given.out:
        given.out.write_text(text + "\n")
    return 0


def _flags(given: argparse.Namespace) -> list[str]:
    chosen = {
        "steps": given.steps,
        "rows": given.rows,
        "bn-sub-batch": given.bn_sub_batch,
        "seed": given.seed,
    }
    return [f"--{name} {value}" for name, value in chosen.items() if value is not None]


def _config(given: argparse.Namespace, scratch: str) -> TrainConfig:
    preset = from_mapping(TrainConfig, read_preset(PRESET))
    log_every = max(1, given.steps // given.rows)
    sub_batch = given.bn_sub_batch or preset.model.bn_sub_batch
    config = dataclasses.replace(
        preset,
        data=dataclasses.replace(preset.data, shards=(f"{scratch}/shards",)),
        model=dataclasses.replace(preset.model, bn_sub_batch=sub_batch),
        # The schedule is the preset's whole one, of which these are the first steps.
        run=RunConfig(
            url=scratch,
            seed=given.seed,
            max_steps=given.steps,
            log_every=log_every,
            checkpoint_every=log_every * max(1, given.rows // 4),
            device="cpu",
        ),
    )
    config.validate(world_size=1)
    return config


def _train(config: TrainConfig, *, shuffled: bool) -> list[StepMetrics]:
    loader = open_loader(config.data, seed=config.run.seed, rank=0, world_size=1, device_index=None)
    rows: list[StepMetrics] = []

    def show(metrics: StepMetrics) -> None:
        print(f"{config.run.url}: {metrics}", file=sys.stderr, flush=True)
        rows.append(metrics)

    order = mock.patch("moco_scale.model.key_order", _in_order)
    try:
        with contextlib.nullcontext() if shuffled else order:
            Trainer(
                data=config.data,
                model=config.model,
                optim=config.optim,
                run=config.run,
                loader=loader,
                ranks=one_rank(),
                progress=show,
            ).run()
    finally:
        loader.close()
    return rows


def _in_order(*, global_batch_size: int, **_: object) -> NDArray[np.int64]:
    """Instead of `key_order`: the keys' BN groups are the queries' own."""
    return np.arange(global_batch_size)


def _table(shuffled: list[StepMetrics], in_order: list[StepMetrics]) -> list[str]:
    lines = [
        "| steps up to | loss, shuffled | loss, in order | lookup, shuffled | lookup, in order "
        "| kNN, shuffled | kNN, in order |",
        "|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for one, other in zip(shuffled, in_order, strict=True):
        assert one.step == other.step, "both runs log the same steps"
        figures = [f"{row.loss:.3f}" for row in (one, other)]
        figures += [f"{100 * row.lookup_accuracy:.1f} %" for row in (one, other)]
        figures += [
            "" if row.knn_accuracy is None else f"{row.knn_accuracy:.4f}" for row in (one, other)
        ]
        lines.append(f"| {one.step:,} | {' | '.join(figures)} |")
    return lines


if __name__ == "__main__":
    sys.exit(main())
