"""The one command: subcommands, exit codes, and everything that is printed.

Exit codes: 0 done, 1 failed, 2 wrong usage, 75 start it again and it goes on: stopped by a signal
and saved, or another process of the run was lost.
"""

import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from moco_scale import (
    cli_embed,
    cli_evaluate,
    cli_export,
    cli_forecast,
    cli_shards,
    cli_shuffle,
)
from moco_scale.errors import EXIT_AGAIN, LostRankError
from moco_scale.settings import UsageError, parse_flags
from shards.errors import UserError
from shards.objects import shown

if TYPE_CHECKING:  # these load torch, which the commands about shards do without
    from moco_scale.metrics import StepMetrics

console = Console(highlight=False)

USAGE = """\
usage: moco-scale COMMAND ...

Self-supervised pretraining (MoCo) straight from a bucket of raw images.

shards
  pack SOURCE... SHARD_SET   build shards from raw buckets, folders, lists, tars
  index TARS                 make a shard set of tars that somebody else wrote
  info SHARD_SET             what is in it, with a contact sheet
  verify SHARD_SET           every byte against the manifest
  dedup SHARD_SET            bury near-duplicates
  takedown SHARD_SET         bury the samples of given objects
  compact SHARD_SET          erase what is buried
  finalize SHARD_SET         stable names for tools that want a brace pattern
  shuffle SHARD_SET          how well training mixes it, beside other orders
training
  pretrain --data SHARD_SET --out RUN
                             train an encoder; also under torchrun:
                             torchrun --nproc-per-node 8 -m moco_scale pretrain ...
  evaluate RUN --on DATA     kNN, linear probe, few shots, retrieval; beside no learning
  embed SHARD_SET --run RUN --to URL
                             features of every image as Parquet; also under torchrun
  report RUN [RUN ...]       one self-contained HTML page about a run, or several
                             side by side
  profile --data SHARD_SET   which stage is the limit, and which flag to change
  export RUN --format timm --to URL
                             the encoder for torchvision, timm, detectron2, ONNX
  import CHECKPOINT --out RUN
                             a run of a published MoCo checkpoint
  forecast --images N --gpus G ...
                             what a run on a cluster needs, and what runs out first

Everything is a URL (s3://, gs://, az://) or a path.
Each command explains itself: moco-scale COMMAND --help
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the process's exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    commands: dict[str, Callable[[list[str]], int]] = {
        "pack": cli_shards.run_pack,
        "index": cli_shards.run_index,
        "info": cli_shards.run_info,
        "verify": cli_shards.run_verify,
        "dedup": cli_shards.run_dedup,
        "takedown": cli_shards.run_takedown,
        "compact": cli_shards.run_compact,
        "finalize": cli_shards.run_finalize,
        "shuffle": cli_shuffle.run_shuffle,
        "pretrain": _pretrain,
        "evaluate": cli_evaluate.run_evaluate,
        "embed": cli_embed.run_embed,
        "report": _report,
        "profile": _profile,
        "export": cli_export.run_export,
        "import": cli_export.run_import,
        "forecast": cli_forecast.run_forecast,
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
    handler = logging.StreamHandler()
    handler.setFormatter(_OneLine("%(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    try:
        code = commands[name](rest)
        sys.stdout.flush()
        return code
    except UserError as err:
        print(f"moco-scale {name}: error: {shown(str(err))}", file=sys.stderr)
        if isinstance(err, LostRankError):
            return EXIT_AGAIN
        return 2 if isinstance(err, UsageError) else 1
    except BrokenPipeError:  # whoever read the output has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more
        return 1  # as rich does, where it prints
    except OSError as err:  # a scratch folder, a file to write: what stores raise is a UserError
        where = f"{err.filename}: " if err.filename else ""
        print(
            f"moco-scale {name}: error: {shown(f'{where}{err.strerror or err}')}", file=sys.stderr
        )
        return 1
    except KeyboardInterrupt:
        print(f"moco-scale {name}: interrupted", file=sys.stderr)
        return 130


class _OneLine(logging.Formatter):
    """Names of objects are hostile: what does not print is escaped."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return shown(super().formatMessage(record))


def _pretrain(arguments: list[str]) -> int:
    from moco_scale.pretrain import pretrain  # loads torch and, on use, DALI

    if not console.is_terminal:
        return pretrain(arguments, show=_print_step, say=_say)
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(bar_width=None), TimeRemainingColumn(),
        console=console,
    )  # fmt: skip
    task = bar.add_task("waiting for the first steps", total=None)

    def show(metrics: "StepMetrics") -> None:
        _print_step(metrics)
        bar.update(
            task,
            total=metrics.last_step,
            completed=metrics.step,
            description=f"step {metrics.step:,} of {metrics.last_step:,}",
        )

    with bar:
        return pretrain(arguments, show=show, say=_say)


def _print_step(metrics: "StepMetrics") -> None:
    loss = "-" if metrics.loss is None else f"{metrics.loss:.3f}"
    lookup = "-" if metrics.lookup_accuracy is None else f"{100 * metrics.lookup_accuracy:.1f}"
    # Fits 80 columns.
    console.print(
        f"step {metrics.step:>6,}  epoch {metrics.epoch:5.1f}  loss {loss:>6}  "
        f"lookup {lookup:>4} %  {metrics.samples_per_s:6.1f} img/s  "
        f"wait {100 * metrics.data_wait_frac:3.0f} %"
    )
    if metrics.knn_accuracy is not None:
        console.print(f"step {metrics.step:>6,}  online kNN {100 * metrics.knn_accuracy:.1f} %")
    if metrics.skipped_steps:
        console.print(f"step {metrics.step:>6,}  {metrics.skipped_steps} steps were not finite")


def _say(line: str) -> None:
    console.print(line, soft_wrap=True)  # a log keeps its lines whole


def _profile(arguments: list[str]) -> int:
    from moco_scale.cli_profile import run_profile  # loads torch and matplotlib

    return run_profile(arguments)


@dataclass(frozen=True, kw_only=True, slots=True)
class _ReportArguments:
    """One self-contained HTML page: data, training, throughput, evaluation, pictures.

    About one run it is written as report.html into the run. About several it shows them side by
    side: curves over one another, settings that differ, figures in columns.
    """

    runs: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="RUN [RUN ...]")]
    """URLs or paths of one run, or of several."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """A local copy of the page; of several runs, where it goes."""


def _report(arguments: list[str]) -> int:
    from moco_scale.report import write_report  # loads torch and matplotlib

    given = parse_flags(_ReportArguments, arguments, prog="moco-scale report")
    if not given.runs:
        raise UsageError("no run: give the URL of one, or of several; see moco-scale report --help")
    if len(given.runs) > 1 and given.out is None:
        raise UsageError("the page about several runs belongs to none of them: give --out FILE")
    console.print(write_report(given.runs, out=given.out), soft_wrap=True)
    return 0
