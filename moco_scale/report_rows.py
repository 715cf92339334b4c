"""The tables of a report: a column a run."""

import itertools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from moco_scale.config import TrainConfig, to_mapping
from moco_scale.evaluation import SAMPLES_FILE, Evaluation, Score
from moco_scale.evaluation_page import Table, tables_of
from moco_scale.figures import figure, percent, seconds
from moco_scale.metrics import StepMetrics
from moco_scale.profile_changes import flat
from moco_scale.profiles import Profile
from moco_scale.scoring import paired_interval
from moco_scale.subject import TRAINED
from shards import ShardSet, open_store
from shards.errors import UserError

NOT_EVALUATED = "not evaluated"
_SAME_PLACE = "run.url"
_RESAMPLES = 2000


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportedRun:
    """A run as it was found."""

    name: str
    """Letter, and the end of the URL; empty for one alone."""
    url: str
    config: TrainConfig
    metrics: Sequence[StepMetrics]
    """At least one row."""
    num_bad: int
    """Bad samples that were replaced."""
    shard_sets: Sequence[ShardSet]
    evaluation: Evaluation | None
    profile: Profile | None

    @property
    def letter(self) -> str:
        return self.name.partition(" ")[0]


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """A line of a table."""

    name: str
    cells: tuple[str, ...]
    """One a run."""

    @property
    def differs(self) -> bool:
        return len(set(self.cells)) > 1


def glance(runs: Sequence[ReportedRun]) -> list[Row]:
    """The most important figures."""
    rows = [
        _row("steps", runs, _steps),
        _row("epochs", runs, lambda run: f"{run.metrics[-1].epoch:.1f}"),
        _row("images seen", runs, lambda run: f"{_images_seen(run):,}"),
        _row("loss at the end", runs, lambda run: _shown(run.metrics[-1].loss, ".3f")),
        _row(
            "lookup accuracy at the end",
            runs,
            lambda run: _shown(run.metrics[-1].lookup_accuracy, ".1%"),
        ),
        _row("images/s, median", runs, lambda run: figure(_median(run, "samples_per_s"))),
        _row(
            "of a step waiting for data, median",
            runs,
            lambda run: f"{100 * (_median(run, 'data_wait_frac') or 0):.1f} %",
        ),
    ]
    if any(run.num_bad for run in runs):
        rows.append(_row("bad samples replaced", runs, lambda run: f"{run.num_bad:,}"))
    if any(_skipped(run) for run in runs):
        rows.append(_row("steps not finite, skipped", runs, lambda run: f"{_skipped(run):,}"))
    known = [run.evaluation for run in runs if run.evaluation is not None]
    ks = dict.fromkeys(next(iter(one.scores[0].accuracy)) for one in known)
    rows += [
        Row(name=f"kNN accuracy, k = {k}", cells=tuple(_knn(run.evaluation, k) for run in runs))
        for k in ks
    ]
    return rows


def throughput(runs: Sequence[ReportedRun]) -> list[Row]:
    """How fast it went, and what held it up."""
    return [
        _row("ranks", runs, _worlds),
        _row("images/s, median", runs, lambda run: figure(_median(run, "samples_per_s"))),
        _row("from, to (5 to 95 % of the rows)", runs, _rate_range),
        _row(
            "images/s a rank, median",
            runs,
            lambda run: figure(
                statistics.median(row.samples_per_s / row.world_size for row in _warm(run))
            ),
        ),
        _row("a step on the slowest rank, median", runs, lambda run: _time(_median(run, "step_s"))),
        _row(
            "of a step waiting for data, median; most",
            runs,
            lambda run: (
                f"{percent(_median(run, 'data_wait_frac') or 0)}; "
                f"{percent(max(row.data_wait_frac for row in _warm(run)))}"
            ),
        ),
        _row("time in steps", runs, _time_in_steps),
        _row(
            "held up by saving",
            runs,
            lambda run: seconds(sum(row.checkpoint_stall_ms or 0 for row in run.metrics) / 1000),
        ),
        _row("most memory of a rank", runs, _memory),
    ]


def settings(runs: Sequence[ReportedRun]) -> list[Row]:
    """All settings but the run's place."""
    found = [dict(flat(to_mapping(run.config))) for run in runs]
    names = dict.fromkeys(itertools.chain.from_iterable(found))
    return [
        Row(name=name, cells=tuple(one.get(name, "-") for one in found))
        for name in names
        if name != _SAME_PLACE or len(runs) == 1
    ]


@dataclass(frozen=True, kw_only=True, slots=True)
class Measure:
    """One measure of several runs' evaluations beside each other."""

    name: str
    how: str
    columns: tuple[str, ...]
    """Titles; each has a cell a run."""
    rows: tuple[Row, ...]
    """Of one cell a run for the first column, then those of the next."""


def measures(evaluations: Sequence[Evaluation]) -> list[Measure]:
    """kNN, and the other measures that any of them has."""
    tables = [{table.name: table for table in tables_of(one)} for one in evaluations]
    return [
        _measure([one.get(name) for one in tables])
        for name in dict.fromkeys(itertools.chain.from_iterable(tables))
    ]


def evaluated_alike(runs: Sequence[ReportedRun]) -> list[Row]:
    """What the evaluations differ in; empty where their figures can be compared."""
    rows = [
        _row("images", runs, lambda run: _of(run, lambda one: f"{one.num_images:,}")),
        _row("classes", runs, lambda run: _of(run, lambda one: f"{len(one.classes):,}")),
        _row("learnt from", runs, lambda run: _of(run, lambda one: _identity(one.shards))),
        _row("tested on", runs, lambda run: _of(run, lambda one: _identity(one.test_shards))),
    ]
    skipped = {
        "on",
        "test_on",
        "labels",
        "test_labels",
        "out",
        "batch_size",
        "num_threads",
        "bootstrap",
    }
    found = [dict(flat(run.evaluation.settings)) if run.evaluation else {} for run in runs]
    rows += [
        Row(name=name, cells=tuple(one.get(name, NOT_EVALUATED) for one in found))
        for name in dict.fromkeys(itertools.chain.from_iterable(found))
        if name not in skipped
    ]
    return [row for row in rows if len({cell for cell in row.cells if cell != NOT_EVALUATED}) > 1]


def against_first(runs: Sequence[ReportedRun]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Of each evaluated run but the first of them: by how much it is better, paired over images.

    Empty where they were not evaluated on the same images.
    """
    evaluated = [run for run in runs if run.evaluation is not None]
    if not evaluated:
        return []
    first, *others = evaluated
    known = _answers(first)
    found = []
    for run in others:
        answers = _answers(run)
        if known is None or answers is None or not _same_images(known, answers):
            continue
        columns = [name for name in known.column_names if name.startswith(f"{TRAINED}_is_right")]
        gains = [
            (_title(name, first), _gain(_numbers(answers, name), _numbers(known, name)))
            for name in columns
            if name in answers.column_names
        ]
        found.append((f"{run.name} minus {first.name}", gains))
    return found


def _row(name: str, runs: Sequence[ReportedRun], cell: Callable[[ReportedRun], str]) -> Row:
    return Row(name=name, cells=tuple(cell(run) for run in runs))


def _warm(run: ReportedRun) -> Sequence[StepMetrics]:
    return run.metrics[1:] or run.metrics  # the first row includes start-up


def _median(run: ReportedRun, name: str) -> float | None:
    known = [value for row in _warm(run) if (value := getattr(row, name)) is not None]
    return float(statistics.median(known)) if known else None


def _time(value_s: float | None) -> str:
    return "-" if value_s is None else seconds(value_s)


def _shown(value: float | None, form: str) -> str:
    if value is None:
        return "not finite"
    return format(value, form).replace("%", " %")


def _steps(run: ReportedRun) -> str:
    last = run.metrics[-1]
    is_over = last.last_step is None or last.step >= last.last_step
    return f"{last.step:,}" if is_over else f"{last.step:,} of {last.last_step:,}"


def _images_seen(run: ReportedRun) -> int:
    return run.metrics[-1].step * run.config.data.global_batch_size


def _skipped(run: ReportedRun) -> int:
    return sum(row.skipped_steps or 0 for row in run.metrics)


def _worlds(run: ReportedRun) -> str:
    return ", then ".join(
        f"{size:,}" for size, _ in itertools.groupby(row.world_size for row in run.metrics)
    )


def _rate_range(run: ReportedRun) -> str:
    low, high = np.percentile([row.samples_per_s for row in _warm(run)], [5, 95])
    return f"{figure(float(low))} to {figure(float(high))}"


def _time_in_steps(run: ReportedRun) -> str:
    starts = [0, *(row.step for row in run.metrics)]
    found_s = sum(
        (row.step - start) * (row.step_s or 0)
        for start, row in zip(starts, run.metrics, strict=False)
    )
    return f"{figure(found_s / 3600)} h" if found_s >= 3600 else seconds(found_s)


def _memory(run: ReportedRun) -> str:
    most = max((row.memory_bytes or 0 for row in run.metrics), default=0)
    return f"{figure(most / 2**30)} GiB" if most else "-"


def _knn(evaluation: Evaluation | None, k: str) -> str:
    if evaluation is None:
        return NOT_EVALUATED
    (trained,) = (score for score in evaluation.scores if score.features == TRAINED)
    return f"{trained.accuracy[k]:.3f}" if k in trained.accuracy else "-"


def _of(run: ReportedRun, said: Callable[[Evaluation], str]) -> str:
    return NOT_EVALUATED if run.evaluation is None else said(run.evaluation)


def _identity(url: str) -> str:
    """Of a shard set; its URL where it is no longer there."""
    try:
        return ShardSet.open(url).set_id[:12]
    except UserError:
        return url


def _measure(tables: Sequence[Table | None]) -> Measure:
    known = [table for table in tables if table is not None]
    columns = dict.fromkeys(itertools.chain.from_iterable(_titles(table) for table in known))
    features = dict.fromkeys(score.features for table in known for score in table.scores)
    # Random rows, where only some have them, stay above the trained one.
    names = [*(name for name in features if name != TRAINED), TRAINED]
    cells = [_cells(table) for table in tables]
    return Measure(
        name=known[0].name,
        how=known[0].how,
        columns=tuple(columns),
        rows=tuple(
            Row(
                name=name,
                cells=tuple(one.get((name, column), "-") for column in columns for one in cells),
            )
            for name in names
        ),
    )


def _titles(table: Table) -> list[str]:
    return [*table.columns, f"trained minus it, {table.columns[0]}"]


def _cells(table: Table | None) -> dict[tuple[str, str], str]:
    """By row and title."""
    if table is None:
        return {}
    found = {}
    for score in table.scores:
        first = next(iter(score.accuracy))
        gain = score.gain_of_trained.get(first)
        shown = [
            *(_with_spread(score, column) for column in score.accuracy),
            "" if gain is None else _with_interval(gain),
        ]
        for title, cell in zip(_titles(table), shown, strict=True):
            found[score.features, title] = cell
    return found


def _with_spread(score: Score, column: str) -> str:
    spread = score.spread[column]
    return f"{score.accuracy[column]:.3f}" + ("" if spread is None else f" ± {spread:.3f}")


def _with_interval(gain: tuple[float, float, float]) -> str:
    return f"{gain[0]:+.3f} [{gain[1]:+.3f}, {gain[2]:+.3f}]"


def _answers(run: ReportedRun) -> pa.Table | None:
    """Which image was named rightly, as `moco-scale evaluate` left it."""
    assert run.evaluation is not None
    try:
        saved = open_store(run.url).read(SAMPLES_FILE)
    except UserError:
        return None
    return pq.read_table(pa.BufferReader(saved))


def _same_images(one: pa.Table, other: pa.Table) -> bool:
    return bool(one.select(["sample_id", "label"]).equals(other.select(["sample_id", "label"])))


def _numbers(answers: pa.Table, name: str) -> NDArray[np.float32]:
    found: NDArray[np.float32] = answers.column(name).to_numpy().astype(np.float32)
    return found


def _gain(better: NDArray[np.float32], worse: NDArray[np.float32]) -> str:
    return _with_interval(paired_interval(better, worse, resamples=_RESAMPLES, seed=0))


def _title(column: str, run: ReportedRun) -> str:
    assert run.evaluation is not None
    probe = column.removeprefix(f"{TRAINED}_is_right").removeprefix("_by_probe_")
    if probe:
        return f"linear probe, {probe}"
    return f"kNN, k = {next(iter(run.evaluation.scores[0].accuracy))}"
