"""The one command: subcommands, exit codes, and everything that is printed.

Exit codes: 0 done, 1 failed, 2 wrong usage, 75 stopped by a signal and saved (start it again).
"""

import contextlib
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from moco_scale.settings import UsageError, parse_flags
from shards.errors import UserError
from shards.pack import PackConfig, PackProgress, PackReport, pack

if TYPE_CHECKING:  # these load torch, which pack and info do without
    from moco_scale.evaluate import Evaluation
    from moco_scale.metrics import StepMetrics

console = Console(highlight=False)

USAGE = """\
usage: moco-scale COMMAND ...

Self-supervised pretraining (MoCo) straight from a bucket of raw images.

  pack SOURCE SHARD_SET      build shards from a raw bucket or folder
  info SHARD_SET             what is in a shard set
  pretrain --data SHARD_SET --out RUN
                             train an encoder; also under torchrun:
                             torchrun --nproc-per-node 8 -m moco_scale pretrain ...
  evaluate RUN --labels CSV  kNN beside pixels and a random encoder
  report RUN                 one self-contained HTML page about a run

Everything is a URL (s3://, gs://, az://) or a path.
Each command explains itself: moco-scale COMMAND --help
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the process's exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    commands: dict[str, Callable[[list[str]], int]] = {
        "pack": _pack,
        "info": _info,
        "pretrain": _pretrain,
        "evaluate": _evaluate,
        "report": _report,
    }
    if not given or given[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
        return 0 if given else 2
    name, rest = given[0], given[1:]
    if name not in commands:
        print(
            f"moco-scale: unknown command {name!r}; known: {', '.join(commands)}", file=sys.stderr
        )
        return 2
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        return commands[name](rest)
    except UserError as err:
        print(f"moco-scale {name}: error: {err}", file=sys.stderr)
        return 2 if isinstance(err, UsageError) else 1
    except KeyboardInterrupt:
        print(f"moco-scale {name}: interrupted", file=sys.stderr)
        return 130


@dataclass(frozen=True, kw_only=True, slots=True)
class _PackArguments:
    """Build shards from a raw bucket or folder: checked, deduplicated, shuffled WebDataset tars.

    Running the same command again continues where it stopped.
    """

    source: tyro.conf.Positional[str]
    """Bucket, prefix or folder of images: s3://bucket/prefix, gs://, az://, or a path."""
    shard_set: tyro.conf.Positional[str]
    """Where the shards go: a URL or a path, empty or begun by this same command."""
    config: tyro.conf.OmitArgPrefixes[PackConfig] = field(default_factory=PackConfig)


def _pack(arguments: list[str]) -> int:
    given = parse_flags(_PackArguments, arguments, prog="moco-scale pack")
    with _progress("packing") as advance:

        def show(progress: PackProgress) -> None:
            advance(progress.done, progress.total)

        report = pack(given.source, given.shard_set, given.config, progress=show)
    _print_pack_report(report)
    return 0


def _print_pack_report(report: PackReport) -> None:
    if report.was_complete:
        console.print("already complete, nothing done")
    rate = report.packed / report.seconds if report.seconds else 0.0
    console.print(
        f"listed {report.listed:,} = packed {report.packed:,} + rejected "
        f"{sum(report.rejected.values()):,}"
    )
    for reason, count in sorted(report.rejected.items(), key=lambda item: -item[1]):
        console.print(f"  {count:>8,}  {reason}")
    console.print(
        f"{report.shards:,} shards, {_size(report.bytes)}, {report.seconds:.1f} s "
        f"({rate:,.0f} images/s)\n{report.url}  set {report.set_id[:12]}"
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _InfoArguments:
    """What is in a shard set: counts, sizes, formats, what was rejected and why."""

    shard_set: tyro.conf.Positional[str]
    """URL or path of the shard set."""


def _info(arguments: list[str]) -> int:
    from shards.manifest import ShardSet  # kept beside its use: reads the set

    given = parse_flags(_InfoArguments, arguments, prog="moco-scale info")
    shard_set = ShardSet.open(given.shard_set)
    found = shard_set.describe()
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, value in found.rows():
        table.add_row(name, value)
    console.print(table)
    return 0


def _pretrain(arguments: list[str]) -> int:
    from moco_scale.pretrain import pretrain  # loads torch and, on use, DALI

    return pretrain(arguments, show=_print_step, say=_say)


def _print_step(metrics: "StepMetrics") -> None:
    # Fits 80 columns.
    console.print(
        f"step {metrics.step:>6,}  epoch {metrics.epoch:5.1f}  loss {metrics.loss:6.3f}  "
        f"lookup {100 * metrics.lookup_accuracy:4.1f} %  {metrics.samples_per_s:6.1f} img/s  "
        f"wait {100 * metrics.data_wait_frac:3.0f} %"
    )


def _say(line: str) -> None:
    console.print(line)


def _evaluate(arguments: list[str]) -> int:
    from moco_scale.evaluate import EvaluateConfig, evaluate  # loads torch

    @dataclass(frozen=True, kw_only=True, slots=True)
    class EvaluateArguments:
        """Score a run's encoder by kNN, beside pixels and the encoder at random initialisation."""

        run: tyro.conf.Positional[str]
        """URL or path of the run."""
        config: tyro.conf.OmitArgPrefixes[EvaluateConfig] = field(default_factory=EvaluateConfig)

    given = parse_flags(EvaluateArguments, arguments, prog="moco-scale evaluate")
    _print_evaluation(evaluate(given.run, given.config))
    return 0


def _print_evaluation(evaluation: "Evaluation") -> None:
    ks = list(evaluation.scores[0].accuracy)
    table = Table(
        title=f"leave-one-out kNN, {evaluation.num_images:,} images of "
        f"{len(evaluation.classes)} classes, step {evaluation.step:,}",
        title_justify="left",
        box=None,
        pad_edge=False,
    )
    table.add_column("features")
    for k in ks:
        table.add_column(f"k={k}", justify="right")
    table.add_column(f"trained minus it, k={ks[0]} [95 %]", justify="right")
    table.add_row("majority class", *[f"{evaluation.majority:.3f}" for _ in ks], "")
    for score in evaluation.scores:
        gain = score.gain_of_trained.get(ks[0])
        shown = f"{gain[0]:+.3f} [{gain[1]:+.3f}, {gain[2]:+.3f}]" if gain else ""
        table.add_row(score.features, *[f"{score.accuracy[k]:.3f}" for k in ks], shown)
    console.print(table)
    if evaluation.num_labels_unused or evaluation.num_unlabelled:
        console.print(
            f"labels without an image in the set: {evaluation.num_labels_unused:,}; "
            f"images without a label: {evaluation.num_unlabelled:,}"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class _ReportArguments:
    """One self-contained HTML page about a run, written as report.html into the run."""

    run: tyro.conf.Positional[str]
    """URL or path of the run."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """A local copy of the page."""


def _report(arguments: list[str]) -> int:
    from moco_scale.report import write_report  # loads torch and matplotlib

    given = parse_flags(_ReportArguments, arguments, prog="moco-scale report")
    console.print(write_report(given.run, out=given.out))
    return 0


@contextlib.contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal, a line now and then elsewhere."""
    if not console.is_terminal:
        last = -1

        def line(done: int, total: int) -> None:
            nonlocal last
            tenth = 10 * done // max(total, 1)
            if tenth > last:
                last = tenth
                console.print(f"{what}: {done:,} of {total:,}")

        yield line
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _size(count: int) -> str:
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"
