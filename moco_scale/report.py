"""The one page about a run, or several side by side: HTML that needs no network to look at."""

import dataclasses
import json
import math
import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from markupsafe import Markup

from moco_scale.config import TrainConfig, read_run_config
from moco_scale.drawing import COLOURS
from moco_scale.errors import TrainError
from moco_scale.evaluation import Evaluation, read_evaluation
from moco_scale.evaluation_page import Pictured, most_confused, pictured, tables_of
from moco_scale.metrics import read_metrics, read_quarantine, what_figures_mean
from moco_scale.pages import render
from moco_scale.pictures import Picture, data_url, to_pixels
from moco_scale.profile_plots import step_plot
from moco_scale.profile_rows import on_stragglers, on_use, what_it_gives, what_to_change
from moco_scale.profiles import read_profile
from moco_scale.recording import FOLDER as PROFILE
from moco_scale.report_plots import MOST_CURVES, Curve, curves_plot
from moco_scale.report_rows import (
    ReportedRun,
    against_first,
    evaluated_alike,
    glance,
    measures,
    settings,
    throughput,
)
from moco_scale.trained import is_checkpoint
from pipelines import open_loader
from shards import ShardSet, open_store
from shards.errors import NotFoundError, UserError

REPORT_FILE = "report.html"
_LETTERS = "ABCDEF"
_SHOWN_REJECTIONS = 50
_SHOWN_PAIRS, _SHOWN_PAIRS_OF_MANY = 24, 8
_HEALTH = {
    "alignment": "alignment",
    "uniformity": "uniformity",
    "effective_rank": "effective rank",
    "duplicate_key_frac": "duplicate keys, part of all",
    "knn_accuracy": "online kNN accuracy",
}
"""Titles of the curves about the embeddings, by their name in the metrics."""


def write_report(run_urls: Sequence[str], *, out: Path | None) -> str:
    """Write the page, and return where it is.

    Args:
        run_urls: of one run, which gets it as report.html; or of several.
        out: a local file for it, too; several runs need one.

    Raises:
        TrainError: there is no run, it has no metrics yet, or one is given twice.
        ConfigError: a damaged profile in a run.
        EvaluationError: a damaged evaluation in a run.
    """
    page = build_report(run_urls).encode()
    where = ""
    if len(run_urls) == 1:
        store = open_store(run_urls[0])
        store.put(REPORT_FILE, page)
        where = store.uri(REPORT_FILE)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_bytes(page)
        where = str(out)
    return where


def build_report(run_urls: Sequence[str]) -> str:
    """The page as HTML. Object names come from a bucket and are escaped wherever shown."""
    runs = _read_runs(run_urls)
    return render(
        "report.html",
        title=_title(runs),
        runs=runs,
        colours=COLOURS,
        is_one=len(runs) == 1,
        glance=glance(runs),
        throughput=throughput(runs),
        settings=settings(runs),
        negatives=[_negatives(run.config) for run in runs],
        chance_losses=[_chance_loss(run.config) for run in runs],
        full_step=math.ceil(_steps_to_fill(runs[0].config)),
        meanings=_meanings(),
        profiles=[_profiled(run) for run in runs if run.profile is not None],
        views=_views(runs),
        data=_data(runs),
        versions=_versions(),
        **_plots(runs),
        **_evaluated(runs),
    )


def _read_runs(urls: Sequence[str]) -> list[ReportedRun]:
    if len(urls) > MOST_CURVES:
        raise TrainError(f"{len(urls)} runs are too many for one page: give at most {MOST_CURVES}")
    places = [open_store(url).url.rstrip("/") for url in urls]
    for url, place in zip(urls, places, strict=True):
        if places.count(place) > 1:
            raise TrainError(f"{url} is given twice; give each run once")
    return [_read_run(url, name=name) for url, name in zip(urls, _names(places), strict=True)]


def _names(urls: Sequence[str]) -> list[str]:
    """A letter, and as much of the URL's end as tells them apart."""
    if len(urls) == 1:
        return [""]
    parts = [url.rstrip("/").split("/") for url in urls]
    depth = 1
    while len({tuple(one[-depth:]) for one in parts}) < len(parts):
        depth += 1
    ends = ["/".join(one[-depth:]) for one in parts]
    return [f"{letter} {end}" for letter, end in zip(_LETTERS, ends, strict=False)]


def _read_run(url: str, *, name: str) -> ReportedRun:
    if is_checkpoint(url):
        raise TrainError(f"{url} is a checkpoint, and a report is about a run; give its run")
    config = read_run_config(url)
    metrics = read_metrics(url)
    if not metrics:
        raise TrainError(f"{url} has no metrics yet: the first are written with a checkpoint")
    if not config.data.shards:
        raise TrainError(f"{url} has read no shard set (data.mode {config.data.mode})")
    store = open_store(url)
    profile = f"{PROFILE}/profile.json"
    try:
        store.head(profile)
    except NotFoundError:
        found = None
    else:
        found = read_profile(store.uri(profile))
    return ReportedRun(
        name=name,
        url=url,
        config=config,
        metrics=metrics,
        num_bad=len(read_quarantine(url)),
        shard_sets=[ShardSet.open(one) for one in config.data.shards],
        evaluation=read_evaluation(store),
        profile=found,
    )


def _title(runs: Sequence[ReportedRun]) -> str:
    if len(runs) > 1:
        return f"MoCo, {len(runs)} runs side by side"
    num_samples = sum(one.num_samples for one in runs[0].shard_sets)
    return f"MoCo on {num_samples:,} images: {runs[0].config.model.backbone}"


def _negatives(config: TrainConfig) -> int:
    return config.model.negatives(config.data.global_batch_size)


def _chance_loss(config: TrainConfig) -> float:
    return math.log(1 + _negatives(config))


def _steps_to_fill(config: TrainConfig) -> float:
    if config.model.dictionary != "queue":
        return 0.0
    return config.model.queue_size / config.model.keys_of_step(config.data.global_batch_size)


def _meanings() -> list[tuple[str, str]]:
    """A line for each figure of the metrics that is drawn here, from where they are declared."""
    drawn = ("loss", "lookup_accuracy", "lr", "grad_norm", *_HEALTH)
    said = what_figures_mean()
    return [(name.replace("_", " "), said[name]) for name in drawn]


def _plots(runs: Sequence[ReportedRun]) -> dict[str, Any]:
    # A step of a larger batch is not the same step.
    by_images = len({run.config.data.global_batch_size for run in runs}) > 1

    def curves(
        name: str, title: str, *, scale: float = 1.0, filling: bool = False, **options: Any
    ) -> Markup | None:
        found = []
        for run in runs:
            unit = run.config.data.global_batch_size if by_images else 1
            rows = [(unit * row.step, getattr(row, name)) for row in run.metrics]
            points = [(step, scale * value) for step, value in rows if value is not None]
            filled_at = unit * _steps_to_fill(run.config) if filling else 0.0
            if points:
                guessing = _chance_loss(run.config) if name == "loss" else None
                found.append(
                    Curve(
                        name=run.name,
                        points=points,
                        filled_at=filled_at or None,
                        guessing=guessing,
                    )
                )
        return curves_plot(title, found, across="images seen" if by_images else "step", **options)

    health = [curves(name, title) for name, title in _HEALTH.items()]
    others = [curves("grad_norm", "gradient norm"), curves("lr", "learning rate")]
    return {
        "loss_plot": curves("loss", "loss (InfoNCE)", filling=True),
        "accuracy_plot": curves("lookup_accuracy", "lookup accuracy, %", scale=100, filling=True),
        "health_plots": [plot for plot in (*health, *others) if plot is not None],
        "rate_plot": curves("samples_per_s", "images/s", from_zero=True),
        "wait_plot": curves(
            "data_wait_frac", "% of step waiting for data", scale=100, from_zero=True
        ),
    }


def _profiled(run: ReportedRun) -> dict[str, Any]:
    """What the profile in the run says, in lines and one plot."""
    profile = run.profile
    assert profile is not None
    verdict = profile.verdict
    lines = [*(verdict.lines if verdict else ()), on_stragglers(profile), on_use(profile)]
    advice = verdict.advice if verdict else ()
    return {
        "name": run.name,
        "lines": [line for line in lines if line],
        "advice": [
            (what_to_change(one), what_it_gives(one, verdict.samples_per_s if verdict else 0.0))
            for one in advice
        ],
        "plot": step_plot(profile),
        "file": f"{run.url.rstrip('/')}/{PROFILE}/profile.json",
    }


def _evaluated(runs: Sequence[ReportedRun]) -> dict[str, Any]:
    """Tables of what was evaluated, and what there is to look at."""
    differing = evaluated_alike(runs)
    drawn = [(run, _pictured(run.evaluation, run.config)) for run in runs if run.evaluation]
    alone = runs[0].evaluation if len(runs) == 1 else None
    return {
        "evaluation": alone,
        "tables": tables_of(alone) if alone else [],
        "confused": most_confused(alone) if alone else [],
        "evaluated": [run for run in runs if run.evaluation is not None],
        "measures": measures([run.evaluation for run in runs if run.evaluation is not None]),
        "evaluated_otherwise": differing,
        "against_first": [] if differing else against_first(runs),
        "pictured": drawn,
        "neighbours": [] if differing else _beside(drawn),
    }


def _pictured(evaluation: Evaluation, config: TrainConfig) -> Pictured | str:
    """The pictures, or why there are none."""
    try:
        return pictured(evaluation, loader=config.data.loader)
    except UserError as err:
        return str(err)


def _beside(
    drawn: Sequence[tuple[ReportedRun, Pictured | str]],
) -> list[tuple[Picture, list[tuple[str, list[Picture]]]]]:
    """Of the same images each run's nearest: the images are chosen by the set alone."""
    known = [(run.name, found.neighbours) for run, found in drawn if isinstance(found, Pictured)]
    return [
        (row[0][0], [(name, near) for (name, _), (_, near) in zip(known, row, strict=True)])
        for row in zip(*(found for _, found in known), strict=False)
    ]


def _views(runs: Sequence[ReportedRun]) -> list[dict[str, Any]]:
    """Query and key views of each run; once for those that see the same."""
    most = _SHOWN_PAIRS if len(runs) == 1 else _SHOWN_PAIRS_OF_MANY
    found: dict[tuple[tuple[str, str], ...], dict[str, Any]] = {}
    for run in runs:
        pairs, data = tuple(_view_pairs(run.config, most=most)), run.config.data
        about = {"recipe": data.recipe, "size": data.view_size, "pairs": pairs}
        found.setdefault(pairs, {**about, "readers": []})["readers"].append(run.name)
    return list(found.values())


def _view_pairs(config: TrainConfig, *, most: int) -> list[tuple[str, str]]:
    """The run's first views, drawn again: they are a function of the seed and the position."""
    data = dataclasses.replace(config.data, mode="stream", view_dtype="float32")
    loader = open_loader(data, seed=config.run.seed, rank=0, world_size=1, device_index=None)
    try:
        batch = next(iter(loader))
    finally:
        loader.close()
    shown = min(most, len(batch.view_q))
    queries, keys = to_pixels(batch.view_q[:shown]), to_pixels(batch.view_k[:shown])
    return [(data_url(q), data_url(k)) for q, k in zip(queries, keys, strict=True)]


def _data(runs: Sequence[ReportedRun]) -> list[dict[str, Any]]:
    """Each shard set once, with the runs that read it."""
    sets = {one.url: one for run in runs for one in run.shard_sets}
    found = []
    for url, shard_set in sets.items():
        counts: dict[str, int] = json.loads(shard_set.metadata["rejected"])
        listed, rejected = int(shard_set.metadata["listed"]), sum(counts.values())
        found.append(
            {
                "url": url,
                "readers": [run.name for run in runs if url in {s.url for s in run.shard_sets}],
                "source": ", ".join(json.loads(shard_set.metadata["sources"]))
                or "shards made elsewhere",
                "listed": listed,
                "rejected": rejected,
                "counts": sorted(counts.items(), key=lambda item: (-item[1], item[0])),
                "rejections": shard_set.rejections().slice(0, _SHOWN_REJECTIONS).to_pylist(),
                "description": list(shard_set.describe().rows()),
            }
        )
    return found


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
