"""The one page about a run: self-contained HTML that needs no network to look at."""

import dataclasses
import io
import json
import math
import platform
from collections.abc import Sequence
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import numpy as np
from matplotlib.figure import Figure

from moco_scale.config import TrainConfig, read_run_config, to_mapping
from moco_scale.errors import TrainError
from moco_scale.evaluate import EVALUATION_FILE
from moco_scale.metrics import (
    StepMetrics,
    read_metrics,
    read_quarantine,
    what_figures_mean,
)
from moco_scale.pictures import Picture, data_url, pictures_of, to_pixels
from pipelines import open_loader
from shards import ShardSet, open_store
from shards.errors import NotFoundError

REPORT_FILE = "report.html"
_SHOWN_REJECTIONS = 50
_SHOWN_PAIRS = 24
_HEALTH = {
    "alignment": "alignment",
    "uniformity": "uniformity",
    "effective_rank": "effective rank",
    "duplicate_key_frac": "duplicate keys, part of all",
    "knn_accuracy": "online kNN accuracy",
}
"""Titles of the curves about the embeddings, by their name in the metrics."""


def write_report(run_url: str, *, out: Path | None = None) -> str:
    """Write report.html into the run, and to `out` if given; return where it is.

    Raises:
        TrainError: there is no run, or it has no metrics yet.
    """
    page = build_report(run_url).encode()
    store = open_store(run_url)
    store.put(REPORT_FILE, page)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_bytes(page)
    return str(out) if out is not None else store.uri(REPORT_FILE)


def build_report(run_url: str) -> str:
    """The page as HTML. Object names come from a bucket and are escaped wherever shown."""
    config = read_run_config(run_url)
    metrics = read_metrics(run_url)
    if not metrics:
        raise TrainError(f"{run_url} has no metrics yet: the first are written with a checkpoint")
    if not config.data.shards:
        raise TrainError(f"{run_url} has read no shard set (data.mode {config.data.mode})")
    shard_sets = [ShardSet.open(url) for url in config.data.shards]
    shard_set, num_samples = shard_sets[0], sum(one.num_samples for one in shard_sets)
    evaluation = _read_evaluation(run_url)
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = (resources.files("moco_scale") / "templates" / "report.html").read_text()
    return environment.from_string(template).render(
        title=f"MoCo on {num_samples:,} images: {config.model.backbone}",
        run_url=run_url,
        tiles=_tiles(metrics, config, evaluation, num_bad=len(read_quarantine(run_url))),
        negatives=config.model.negatives(config.data.global_batch_size),
        full_step=math.ceil(_steps_to_fill(config)),
        chance_loss=_chance_loss(config),
        meanings=_meanings(),
        world_size=metrics[-1].world_size,
        evaluation=evaluation,
        ks=list(evaluation["scores"][0]["accuracy"]) if evaluation else [],
        neighbours=_neighbours(evaluation, config) if evaluation else [],
        views=_view_pairs(config),
        recipe=config.data.recipe,
        view_size=config.data.view_size,
        source=", ".join(json.loads(shard_set.metadata["sources"])) or "shards made elsewhere",
        shards_url=", ".join(one.url for one in shard_sets),
        packed=num_samples,
        config=to_mapping(config),
        versions=_versions(),
        **_plots(metrics, config),
        **_data_section(shard_set),
    )


def _tiles(
    metrics: Sequence[StepMetrics],
    config: TrainConfig,
    evaluation: dict[str, Any] | None,
    *,
    num_bad: int,
) -> list[tuple[str, str]]:
    last = metrics[-1]
    warm = metrics[1:] or metrics  # the first rows include start-up
    rate = float(np.median([row.samples_per_s for row in warm]))
    wait = float(np.median([row.data_wait_frac for row in warm]))
    tiles = [
        (f"{last.step:,}", f"steps, {last.epoch:.1f} epochs"),
        (f"{last.step * config.data.global_batch_size:,}", "images seen"),
        (_shown(last.loss, ".3f"), "loss at the end"),
        (_shown(last.lookup_accuracy, ".1%"), "lookup accuracy at the end"),
        (f"{rate:,.0f}", "images/s, median"),
        (f"{100 * wait:.1f} %", "of a step waiting for data, median"),
    ]
    if num_bad:
        tiles.append((f"{num_bad:,}", "bad samples replaced"))
    skipped = sum(row.skipped_steps for row in metrics)
    if skipped:
        tiles.append((f"{skipped:,}", "steps not finite, skipped"))
    if evaluation:
        k = next(iter(evaluation["scores"][0]["accuracy"]))
        trained = {row["features"]: row["accuracy"][k] for row in evaluation["scores"]}["trained"]
        tiles.append((f"{trained:.3f}", f"kNN accuracy, k = {k}"))
    return tiles


def _shown(value: float | None, form: str) -> str:
    if value is None:
        return "not finite"
    return format(value, form).replace("%", " %")


def _chance_loss(config: TrainConfig) -> float:
    return math.log(1 + config.model.negatives(config.data.global_batch_size))


def _steps_to_fill(config: TrainConfig) -> float:
    if config.model.dictionary != "queue":
        return 0.0
    return config.model.queue_size / config.model.keys_of_step(config.data.global_batch_size)


def _meanings() -> list[tuple[str, str]]:
    """A line for each figure of the metrics that is drawn here, from where they are declared."""
    drawn = ("loss", "lookup_accuracy", "lr", "grad_norm", *_HEALTH)
    said = what_figures_mean()
    return [(name.replace("_", " "), said[name]) for name in drawn]


def _plots(metrics: Sequence[StepMetrics], config: TrainConfig) -> dict[str, Any]:
    def curve(name: str, title: str, *, scale: float = 1.0, **options: Any) -> str:
        rows = [(row.step, getattr(row, name)) for row in metrics]
        known = [(step, scale * value) for step, value in rows if value is not None]
        return _plot(known, title, **options) if known else ""

    filled = _steps_to_fill(config) or None
    health = [curve(name, title) for name, title in _HEALTH.items()]
    return {
        "loss_plot": curve("loss", "loss (InfoNCE)", at=filled, level=_chance_loss(config)),
        "accuracy_plot": curve("lookup_accuracy", "lookup accuracy, %", scale=100, at=filled),
        "rate_plot": curve("samples_per_s", "images/s", from_zero=True),
        "wait_plot": curve(
            "data_wait_frac", "% of step waiting for data", scale=100, from_zero=True
        ),
        "health_plots": [
            plot
            for plot in (*health, curve("grad_norm", "gradient norm"), curve("lr", "learning rate"))
            if plot
        ],
    }


def _plot(
    points: Sequence[tuple[int, float]],
    name: str,
    *,
    at: float | None = None,
    level: float | None = None,
    from_zero: bool = False,
) -> str:
    """One curve as an SVG element."""
    steps, values = zip(*points, strict=True)
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 9}):
        figure = Figure(figsize=(5.0, 2.7), layout="constrained")
        axes = figure.add_subplot()
        marker = "o" if len(steps) == 1 else None
        axes.plot(steps, values, color="#1f6feb", linewidth=1.6, marker=marker)
        if level is not None:
            axes.axhline(level, color="#b35900", linewidth=1, linestyle=":")
            axes.annotate(
                "guessing",
                (1, level),
                xycoords=("axes fraction", "data"),
                ha="right",
                va="bottom",
                color="#b35900",
            )
        if at is not None:
            axes.axvline(at, color="#5c6b7a", linewidth=1, linestyle="--")
            # Scaled to what comes behind the line: against random keys everything looks easy.
            rows = zip([0, *steps], values, strict=False)
            shown = [value for before, value in rows if before >= at]
            if shown:
                shown += [level] if level is not None else []
                room = 0.05 * (max(shown) - min(shown)) or 1.0
                axes.set_ylim(min(shown) - room, max(shown) + room)
        if from_zero:
            axes.set_ylim(bottom=0)
        axes.set_title(name, loc="left", fontsize=10)
        axes.set_xlabel("step")
        axes.grid(alpha=0.25)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        drawn = io.StringIO()
        figure.savefig(drawn, format="svg", metadata={"Date": None})
    text = drawn.getvalue()
    return text[text.index("<svg") :]


def _view_pairs(config: TrainConfig) -> list[tuple[str, str]]:
    """The run's first views, drawn again: they are a function of the seed and the position."""
    data = dataclasses.replace(config.data, mode="stream", view_dtype="float32")
    loader = open_loader(data, seed=config.run.seed, rank=0, world_size=1, device_index=None)
    try:
        batch = next(iter(loader))
    finally:
        loader.close()
    shown = min(_SHOWN_PAIRS, len(batch.view_q))
    queries, keys = to_pixels(batch.view_q[:shown]), to_pixels(batch.view_k[:shown])
    return [(data_url(q), data_url(k)) for q, k in zip(queries, keys, strict=True)]


def _neighbours(evaluation: dict[str, Any], config: TrainConfig) -> list[list[Picture]]:
    rows = [[int(query), *found] for query, found in evaluation["neighbours"].items()]
    wanted = {sample for row in rows for sample in row}
    on = ShardSet.open(evaluation["shards"])
    pictures = pictures_of(on, wanted, loader=config.data.loader)
    return [[pictures[sample] for sample in row if sample in pictures] for row in rows]


def _data_section(shard_set: ShardSet) -> dict[str, Any]:
    rejections = shard_set.rejections()
    counts: dict[str, int] = json.loads(shard_set.metadata["rejected"])
    return {
        "listed": int(shard_set.metadata["listed"]),
        "rejected": sorted(counts.items(), key=lambda item: (-item[1], item[0])),
        "rejections": rejections.slice(0, _SHOWN_REJECTIONS).to_pylist(),
        "description": list(shard_set.describe().rows()),
    }


def _read_evaluation(run_url: str) -> dict[str, Any] | None:
    try:
        loaded: dict[str, Any] = json.loads(bytes(open_store(run_url).read(EVALUATION_FILE)))
    except NotFoundError:
        return None
    return loaded


def _versions() -> list[tuple[str, str]]:
    names = ("moco-scale", "torch", "torchvision", "nvidia-dali-cuda120", "nvidia-dali-cuda130",
             "pyarrow", "obstore", "numpy", "pillow")  # fmt: skip
    found = [("python", platform.python_version())]
    for name in names:
        try:
            found.append((name, metadata.version(name)))
        except metadata.PackageNotFoundError:
            continue
    return found
