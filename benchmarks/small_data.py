"""Is MoCo worth it on some thousand drawings: three seeds beside all that needs no learning.

Emoji and clip art, packed, trained on without labels and evaluated by the command line, on the
CPU. The recipe is benchmarks/small_data.toml, fixed before the runs that are quoted:
`python -m benchmarks.small_data --out FILE.md`. The same command goes on where it was stopped.
"""

import argparse
import csv
import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from demo.images import ImageSet, clipart, emoji
from moco_scale.evaluation import EVALUATION_FILE, SAMPLES_FILE
from moco_scale.metrics import read_metrics
from moco_scale.scoring import paired_interval

RECIPE = Path(__file__).with_suffix(".toml")
SETS = {"emoji": emoji, "clipart": clipart}
SEEDS = (0, 1, 2)
K = 10
SIDE = 128
_COLUMNS = (("kNN", str(K)), ("linear probe", "L-BFGS"), ("few shots", "5"))
_DRY_IMAGES, _DRY_EPOCHS, _DRY_SEEDS = 160, 2, (0, 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """What is run: the whole, or a little of it."""

    work: Path
    seeds: tuple[int, ...]
    epochs: int | None
    """None: the recipe's."""
    most_images: int | None
    """None: all."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--work", type=Path, default=Path("runs/small_data"), help="for all runs")
    parser.add_argument("--out", type=Path, help="a Markdown file for the result")
    parser.add_argument(
        "--dry-run", action="store_true",
        help=f"{_DRY_IMAGES} images, {_DRY_EPOCHS} epochs: to try this script; not for quoting",
    )  # fmt: skip
    given = parser.parse_args(arguments)
    dry = given.dry_run
    trial = Trial(
        work=given.work / "dry" if dry else given.work,
        seeds=_DRY_SEEDS if dry else SEEDS,
        epochs=_DRY_EPOCHS if dry else None,
        most_images=_DRY_IMAGES if dry else None,
    )
    lines = []
    for name in given.sets:
        lines += [*run_set(name, SETS[name](), trial), ""]
    lines.append(f"{_machine()}. Command: `python -m benchmarks.small_data`.")
    text = "\n".join(lines)
    print(text)
    if given.out:
        given.out.write_text(text + "\n")
    return 0


def run_set(name: str, found: ImageSet, trial: Trial) -> list[str]:
    """Pack, train with each seed, evaluate; the result as Markdown lines."""
    base = trial.work / name
    base.mkdir(parents=True, exist_ok=True)
    shards, labels = base / "shards", base / "labels.csv"
    listed = base / "images.txt"
    paths = sorted(
        str(path.absolute()) for path in found.folder.rglob("*.png") if not path.is_symlink()
    )
    labelled = {str((found.folder / one).absolute()): label for one, label in found.labels.items()}
    if trial.most_images is not None:  # of every class
        every = sorted(labelled)
        paths = every[:: max(1, len(every) // trial.most_images)][: trial.most_images]
    listed.write_text("\n".join(paths) + "\n")
    with labels.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["uri", "label"])
        rows.writerows((path, labelled[path]) for path in paths if path in labelled)
    _call("pack", str(listed), str(shards), "--resize-side", str(SIDE))
    runs = []
    for seed in trial.seeds:
        run = base / f"seed{seed}"
        more = ["--optim.epochs", str(trial.epochs)] if trial.epochs else []
        _call(
            *("pretrain", "--preset", str(RECIPE), "--data", str(shards), "--out", str(run)),
            *("--run.seed", str(seed), *more),
        )
        _call("evaluate", str(run), "--labels", str(labels), "--k", str(K), "200")
        runs.append(run)
    return _table(name, found.about, runs)


def _table(name: str, about: str, runs: list[Path]) -> list[str]:
    results = [json.loads((run / EVALUATION_FILE).read_text()) for run in runs]
    answers = [pq.read_table(run / SAMPLES_FILE) for run in runs]
    first = results[0]
    metrics = [read_metrics(str(run)) for run in runs]
    images = [rows[-1].step * 128 for rows in metrics]
    hours = [_hours(rows) for rows in metrics]
    rate = np.median([row.samples_per_s for rows in metrics for row in rows[1:] or rows])
    lines = [
        f"**{name}** ({about}): {first['num_images']:,} labelled images of "
        f"{len(first['classes'])} classes, the largest {first['majority']:.3f}. "
        f"{len(runs)} seeds, each {images[0]:,} images seen in {np.mean(hours):.2f} h "
        f"({rate:,.0f} images/s); views are drawn from all images of the set.",
        "",
        "| features | kNN, k = 10 | linear probe | 5 a class | trained minus it, kNN [95 %] |"
        " trained minus it, probe [95 %] |",
        "|---|---|---|---|---|---|",
    ]
    for row in (score["features"] for score in first["scores"]):
        taken = results if row == "trained" else results[:1]
        cells = [_cell(taken, row, task, column) for task, column in _COLUMNS]
        intervals = ["", ""]
        if row != "trained":
            intervals = [
                _interval(answers, row, "is_right"),
                _interval(answers, row, "is_right_by_probe_L-BFGS"),
            ]
        lines.append(f"| {row} | {' | '.join(cells + intervals)} |")
    return lines


def _hours(rows: list[Any]) -> float:
    """Of training, as its own rate says it."""
    rates = [row.samples_per_s for row in rows]
    return float(rows[-1].step * 128 / np.median(rates) / 3600)


def _cell(results: list[dict[str, Any]], row: str, task: str, column: str) -> str:
    """Mean and standard deviation over training seeds, or else over initialisations and splits."""
    values, spread = [], None
    for result in results:
        tables = {one["name"]: one["scores"] for one in result["tasks"]} | {"kNN": result["scores"]}
        (score,) = (one for one in tables[task] if one["features"] == row)
        values.append(score["accuracy"][column])
        spread = score["spread"][column]
    if len(values) > 1:
        spread = float(np.std(values, ddof=1))
    return f"{np.mean(values):.3f}" + ("" if spread is None else f" ± {spread:.3f}")


def _interval(answers: list[Any], row: str, column: str) -> str:
    def right(name: str) -> np.ndarray[Any, np.dtype[np.float32]]:
        return np.array([one.column(f"{name}_{column}").to_numpy() for one in answers])

    mean, low, high = paired_interval(right("trained"), right(row), resamples=10000, seed=0)
    return f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"


def _machine() -> str:
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "numpy"))
    return f"{os.cpu_count()} CPU cores ({platform.machine()}), no GPU, {versions}"


def _call(*arguments: str) -> None:
    print("$ moco-scale", *arguments, flush=True)
    started = time.monotonic()
    subprocess.run([sys.executable, "-m", "moco_scale", *arguments], check=True)
    print(f"({time.monotonic() - started:.0f} s)", flush=True)


if __name__ == "__main__":
    sys.exit(main())
