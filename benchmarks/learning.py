"""Does training help: kNN of the trained encoder minus the random one, three seeds, paired.

The set and the recipe are fixed here, in a commit before the run whose figures are quoted.
It runs the command line from a bucket to a table: `python -m benchmarks.learning`. Figures go to
standard output and, with --out, into a Markdown file.
"""

import argparse
import csv
import io
import json
import os
import platform
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from demo.images import digits
from demo.local_s3 import LocalS3
from moco_scale.evaluation import EVALUATION_FILE, SAMPLES_FILE
from moco_scale.scoring import paired_interval
from shards.store import open_store

PRESET = "digits"
SEEDS = (0, 1, 2)
K = 10


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="a Markdown file for the result")
    parser.add_argument("--epochs", type=int, help="shorter, to try this script; not for quoting")
    given = parser.parse_args()
    started = time.monotonic()
    with LocalS3() as server:
        os.environ.update(server.environment)
        lines = trial(server, epochs=given.epochs)
    minutes = (time.monotonic() - started) / 60
    lines += ["", f"{minutes:.0f} min in all; {_machine()}."]
    text = "\n".join(lines)
    print(text)
    if given.out:
        given.out.write_text(text + "\n")
    return 0


def trial(server: LocalS3, *, epochs: int | None) -> list[str]:
    """Pack, train with each seed, evaluate; return the result as Markdown lines."""
    found = digits()
    raw, base = server.make_bucket("digits-raw"), server.make_bucket("digits-out")
    store = open_store(raw)
    for path in sorted(found.folder.iterdir()):
        store.put(path.name, path.read_bytes())
    table = io.StringIO()
    rows = csv.writer(table)
    rows.writerow(["uri", "label"])
    rows.writerows((store.uri(name), label) for name, label in found.labels.items())
    open_store(base).put("labels.csv", table.getvalue().encode())
    _call("pack", raw, f"{base}/shards")
    results = []
    for seed in SEEDS:
        run = f"{base}/seed{seed}"
        more = ["--optim.epochs", str(epochs)] if epochs else []
        _call(
            *("pretrain", "--preset", PRESET, "--data", f"{base}/shards", "--out", run),
            *("--run.seed", str(seed), *more),
        )
        _call(
            *("evaluate", run, "--labels", f"{base}/labels.csv", "--seeds", "0"),
            *("--k", str(K), "200", "--probe", "none"),
        )
        result = json.loads(bytes(open_store(run).read(EVALUATION_FILE)))
        rows = pq.read_table(pa.BufferReader(bytes(open_store(run).read(SAMPLES_FILE))))
        result["right"] = rows.to_pydict()
        results.append(result)
    return _table(results, about=found.about)


def _table(results: list[dict], *, about: str) -> list[str]:  # type: ignore[type-arg]  # JSON
    names = [score["features"] for score in results[0]["scores"]]
    lines = [f"{about}; preset `{PRESET}`, step {results[0]['step']:,}, seeds {SEEDS}.", ""]
    lines += [f"| features | kNN accuracy, k = {K}: mean (each seed) |", "|---|---|"]
    right = {}
    for index, name in enumerate(names):
        values = [result["scores"][index]["accuracy"][str(K)] for result in results]
        each = ", ".join(f"{value:.4f}" for value in values)
        lines.append(f"| {name} | {np.mean(values):.4f} ({each}) |")
        right[name] = np.array([result["right"][f"{name}_is_right"] for result in results])
    for name in names:
        if name != "trained":
            mean, low, high = paired_interval(
                right["trained"], right[name], resamples=10000, seed=0
            )
            lines.append("")
            lines.append(
                f"trained minus {name}: {mean:+.4f}, paired bootstrap over images "
                f"95 % interval [{low:+.4f}, {high:+.4f}]"
            )
    return lines


def _machine() -> str:
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "numpy"))
    return f"{os.cpu_count()} CPU cores ({platform.machine()}), no GPU, {versions}"


def _call(*arguments: str) -> None:
    print("$ moco-scale", *arguments, flush=True)
    subprocess.run([sys.executable, "-m", "moco_scale", *arguments], check=True)


if __name__ == "__main__":
    sys.exit(main())
