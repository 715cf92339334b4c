"""The command that makes features of a whole shard set: embed."""

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated

import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from moco_scale.cli_shards import counting
from moco_scale.settings import parse_flags

if TYPE_CHECKING:  # these load torch
    from moco_scale.distributed import Ranks
    from moco_scale.embed import EmbedProgress
    from moco_scale.embedding import Embedding

console = Console(highlight=False)

_LINE_EVERY_S = 10.0


def run_embed(arguments: list[str]) -> int:
    """`moco-scale embed`, alone or as one of torchrun's processes."""
    from moco_scale import distributed  # these load torch
    from moco_scale.cluster_report import ClusterConfig, write_cluster_report
    from moco_scale.embed import EmbedConfig, embed

    @dataclass(frozen=True, kw_only=True, slots=True)
    class EmbedArguments:
        """Features of all images of a shard set, as Parquet that DuckDB, pandas and faiss read.

        A file a shard, with what could not be decoded listed beside; see moco_scale/README.md.
        Killed, and started again, it goes on; under torchrun the processes share the shards.
        """

        shard_set: tyro.conf.Positional[str]
        """URL or path of the shard set."""
        run: Annotated[str, tyro.conf.arg(metavar="RUN|CHECKPOINT", aliases=["--encoder"])]
        """URL of a run, of which the newest checkpoint is taken, or of a checkpoint (.pt). Under
        torchrun say --encoder: before Python 3.12.7 it takes --run for its own."""
        to: Annotated[str, tyro.conf.arg(metavar="URL")]
        """Where the features go."""
        report: bool = False
        """Then also clusters.html: clusters, near-duplicates and loners, with pictures."""
        config: tyro.conf.OmitArgPrefixes[EmbedConfig] = field(default_factory=EmbedConfig)
        clusters: tyro.conf.OmitArgPrefixes[ClusterConfig] = field(default_factory=ClusterConfig)

    given = parse_flags(EmbedArguments, arguments, prog="moco-scale embed")
    ranks = distributed.start(given.config.device)
    try:
        with _Shown(ranks) as shown:
            whole = embed(
                given.shard_set,
                given.run,
                given.to,
                given.config,
                ranks=ranks,
                progress=shown.advance,
                say=shown.say,
            )
        if whole is None:
            return 0  # the rank that finishes last says how it ended
        _print_whole(whole, given.to)
        if given.report:
            with counting("near-duplicates") as advance:
                page = write_cluster_report(
                    given.to,
                    given.shard_set,
                    given.clusters,
                    device=ranks.device,
                    progress=advance,
                )
            console.print(Text(page), soft_wrap=True)
        return 0
    finally:
        distributed.shutdown()


def _print_whole(whole: "Embedding", to: str) -> None:
    console.print(
        f"samples {whole.num_samples:,} = rows {whole.num_rows:,} + not decodable "
        f"{whole.num_quarantined:,}"
    )
    console.print(Text(f"{to}  {whole.num_shards:,} Parquet files"), soft_wrap=True)


class _Shown:
    """Rank 0's part of the work: a bar on a terminal, a line every ten seconds elsewhere."""

    def __init__(self, ranks: "Ranks") -> None:
        self._ranks = ranks
        self._started = self._last = time.monotonic()
        self._bar: Progress | None = None

    def __enter__(self) -> "_Shown":
        if self._ranks.speaks and console.is_terminal:
            self._bar = Progress(
                BarColumn(bar_width=None),
                TextColumn("{task.description}"),
                TimeRemainingColumn(compact=True),
                console=console,
                transient=True,
                expand=True,
            )
            self._task = self._bar.add_task("starting ...", total=None)
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def say(self, line: str) -> None:
        console.print(Text(line), soft_wrap=True)

    def advance(self, now: "EmbedProgress") -> None:
        if not self._ranks.speaks:
            return
        rate = now.samples_done / max(time.monotonic() - self._started, 1e-9)
        lost = f"  {now.quarantined:,} bad" if now.quarantined else ""
        said = (
            f"{now.samples_done:,}/{now.samples:,} images  {now.shards_done:,}/{now.shards:,} "
            f"shards  {rate:,.0f}/s{lost}"
        )
        if self._bar is not None:
            self._bar.update(
                self._task, description=said, completed=now.samples_done, total=now.samples
            )
        elif time.monotonic() - self._last >= _LINE_EVERY_S or now.shards_done == now.shards:
            self._last = time.monotonic()
            console.print(said)
