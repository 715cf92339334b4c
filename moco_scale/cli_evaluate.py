"""The command evaluate: its arguments, its progress, and its tables on a terminal."""

import logging
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from moco_scale.settings import parse_flags
from shards.store import open_store

if TYPE_CHECKING:  # it loads torch
    from moco_scale.evaluation import Evaluation, Score

console = Console(highlight=False)
logger = logging.getLogger(__name__)

_LINE_EVERY_S = 10.0
_LONGEST_WAIT_S = 24 * 3600.0


def run_evaluate(arguments: list[str]) -> int:
    """`moco-scale evaluate`: 0 when the tables are written."""
    from moco_scale.distributed import shutdown, start  # these load torch
    from moco_scale.evaluate import EvaluateConfig, evaluate
    from moco_scale.evaluation import PAGE_FILE

    @dataclass(frozen=True, kw_only=True, slots=True)
    class EvaluateArguments:
        """Score an encoder by kNN, a linear probe, few shots and retrieval, beside no learning.

        The same command again goes on: features are kept beside the run. Under torchrun the ranks
        divide the images. It leaves evaluation.json, evaluation.html and evaluation.parquet.
        """

        subject: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN|CHECKPOINT")]
        """URL or path of a run, whose newest checkpoint is taken, or of one checkpoint."""
        html: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
        """A local copy of evaluation.html."""
        config: tyro.conf.OmitArgPrefixes[EvaluateConfig] = field(default_factory=EvaluateConfig)

    given = parse_flags(EvaluateArguments, arguments, prog="moco-scale evaluate")
    # While the first packs, the others wait; one that is gone is noticed at once all the same.
    ranks = start("auto", timeout_s=_LONGEST_WAIT_S)
    try:
        with _Progress(speaks=ranks.speaks) as progress:
            evaluation = evaluate(given.subject, given.config, ranks=ranks, show=progress.show)
        if evaluation is None:
            return 0
        store = open_store(evaluation.url)
        if given.html is not None:
            given.html.parent.mkdir(parents=True, exist_ok=True)
            given.html.write_bytes(bytes(store.read(PAGE_FILE)))
        print_evaluation(evaluation)
        console.print(str(given.html or store.uri(PAGE_FILE)), soft_wrap=True)
        return 0
    finally:
        shutdown()


class _Progress:
    """A bar on a terminal, a line every ten seconds elsewhere, silent on the other ranks."""

    def __init__(self, *, speaks: bool) -> None:
        self._speaks = speaks
        self._bar: Progress | None = None
        self._said = time.monotonic()

    def __enter__(self) -> "_Progress":
        if self._speaks and console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"), BarColumn(bar_width=None), MofNCompleteColumn(),
                console=console, transient=True,
            )  # fmt: skip
            self._task = self._bar.add_task("starting", total=None)
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, what: str, done: int, total: int) -> None:
        if self._bar is not None:
            self._bar.update(self._task, description=what, completed=done, total=total)
        elif self._speaks and time.monotonic() - self._said >= _LINE_EVERY_S:
            self._said = time.monotonic()
            console.print(f"{what}: {done:,} of {total:,}")


def print_evaluation(evaluation: "Evaluation") -> None:
    """The tables, as text."""
    how = (
        "leave-one-out kNN"
        if evaluation.shards == evaluation.test_shards
        else f"kNN among {evaluation.num_learnt_from:,} images"
    )
    console.print(
        f"{evaluation.backbone}, step {evaluation.step:,}: {evaluation.num_images:,} images of "
        f"{len(evaluation.classes)} classes; always the majority class: {evaluation.majority:.3f}"
    )
    _print_table(how, evaluation.scores, prefix="k=")
    for task in evaluation.tasks:
        shots = task.name == "few shots"
        _print_table(task.name, task.scores, suffix=" a class" if shots else "")
    if evaluation.num_labels_unused or evaluation.num_unlabelled:
        console.print(
            f"labels without an image in the set: {evaluation.num_labels_unused:,}; "
            f"images without a label: {evaluation.num_unlabelled:,}"
        )


def _print_table(
    title: str, scores: "tuple[Score, ...]", *, prefix: str = "", suffix: str = ""
) -> None:
    columns = list(scores[0].accuracy)
    table = Table(title=f"\n{title}", title_justify="left", box=None, pad_edge=False)
    table.add_column("features")
    for column in columns:
        table.add_column(f"{prefix}{column}{suffix}", justify="right")
    table.add_column(f"trained minus it, {prefix}{columns[0]} [95 %]", justify="right")
    for score in scores:
        gain = score.gain_of_trained.get(columns[0])
        shown = f"{gain[0]:+.3f} [{gain[1]:+.3f}, {gain[2]:+.3f}]" if gain else ""
        cells = [_cell(score, column) for column in columns]
        table.add_row(score.features, *cells, shown)
    console.print(table)


def _cell(score: "Score", column: str) -> str:
    spread = score.spread[column]
    return f"{score.accuracy[column]:.3f}" + ("" if spread is None else f" ±{spread:.3f}")
