"""The commands about shard sets: pack, index, info, verify, dedup, takedown, compact, finalize."""

import dataclasses
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from moco_scale.settings import UsageError, parse_flags
from shards.adopt import AdoptConfig, AdoptProgress, adopt
from shards.bill import Bill, Prices, estimate
from shards.catalog import Catalog
from shards.compact import compact
from shards.contact_sheet import contact_sheet
from shards.dedup import DedupProgress, dedup
from shards.export import finalize_stable_names, write_idx, write_wids
from shards.manifest import ShardSet
from shards.pack import PackConfig, PackProgress, PackReport, pack
from shards.plan import Plan
from shards.store import bucket_region, machine_region
from shards.takedown import read_uris, takedown
from shards.verify import VerifyConfig, VerifyProgress, verify

console = Console(highlight=False)

_LINE_EVERY_S = 10.0
_IMAGES_PER_CORE_S = 700.0


@dataclass(frozen=True, kw_only=True, slots=True)
class _PackArguments:
    """Build shards from raw images: checked, deduplicated, shuffled WebDataset tars.

    A SOURCE is a bucket, prefix or folder; an S3 Inventory (its manifest.json); a list of URIs
    (.parquet, .csv, .tsv, .jsonl, .txt); or tars (a .tar, PREFIX/*.tar, {000..099}.tar). There may
    be several; the SHARD_SET comes last. The same command again continues where it stopped.
    """

    places: tyro.conf.Positional[
        Annotated[tuple[str, ...], tyro.conf.arg(metavar="SOURCE... SHARD_SET")]
    ]
    """Where the images are, and where the shards go: URLs or paths."""
    add: bool = False
    """Pack what is new or has changed at the sources, as another generation of a finished set."""
    dry_run: bool = False
    """Stop when the plan is made and its bill shown."""
    json: bool = False
    """Events for machines on standard output, one JSON object a line."""
    config: tyro.conf.OmitArgPrefixes[PackConfig] = field(default_factory=PackConfig)
    images_per_core_s: float = _IMAGES_PER_CORE_S
    """For the bill: images that one core packs in a second."""
    network_mb_s: float | None = None
    """For the bill: what the network brings and takes, MB/s, each way."""
    prices: Prices = field(default_factory=Prices)


def run_pack(arguments: list[str]) -> int:
    """`moco-scale pack`: 0 when the set is complete or planned."""
    given = parse_flags(_PackArguments, arguments, prog="moco-scale pack")
    if len(given.places) < 2:
        raise UsageError("give at least one SOURCE and then the SHARD_SET; see --help")
    *sources, shard_set = given.places
    shown = _JsonProgress() if given.json else _PackProgress()

    def show_plan(plan: Plan, catalog: Catalog) -> None:
        shown.plan(_bill(plan, catalog, given))

    with shown:
        report = pack(
            sources,
            shard_set,
            given.config,
            add=given.add,
            dry_run=given.dry_run,
            on_plan=show_plan,
            progress=shown.advance,
        )
    if report is None:
        shown.planned()
    else:
        shown.done(report)
    return 0


def _bill(plan: Plan, catalog: Catalog, given: _PackArguments) -> Bill:
    speed = given.network_mb_s
    return estimate(
        plan,
        catalog,
        workers=given.config.workers or os.cpu_count() or 1,
        images_per_core_s=given.images_per_core_s,
        network_bytes_per_s=None if speed is None else speed * 1e6,
        prices=given.prices,
        source_regions={source: bucket_region(source) for source in plan.settings.sources},
        machine_region=machine_region(),
    )


class _PackProgress:
    """A bar on a terminal, a line every ten seconds elsewhere."""

    def __init__(self) -> None:
        self._started = self._last = time.monotonic()
        self._bar: Progress | None = None

    def __enter__(self) -> "_PackProgress":
        if console.is_terminal:
            self._bar = Progress(
                BarColumn(bar_width=None),
                TextColumn("{task.description}"),
                TimeElapsedColumn(),
                TextColumn("eta"),
                TimeRemainingColumn(compact=True),
                console=console,
                transient=True,
                expand=True,
            )
            self._task = self._bar.add_task("listing ...", total=None)
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def plan(self, bill: Bill) -> None:
        print_rows(bill.rows())

    def advance(self, now: PackProgress) -> None:
        rates = _rates(now, time.monotonic() - self._started)
        said = (
            f"{now.shards_done:,}/{now.shards:,} shards  {rates['images_per_s']:,.0f} img/s  "
            f"{rates['mb_per_s']:,.1f} MB/s  {now.rejected:,} rejected"
        )
        if now.throttles:
            said += f"  {now.throttles:,} throttled"
        if self._bar is not None:
            self._bar.update(
                self._task, description=said, completed=now.shards_done, total=now.shards
            )
        elif time.monotonic() - self._last >= _LINE_EVERY_S or now.shards_done == now.shards:
            self._last = time.monotonic()
            console.print(said)

    def planned(self) -> None:
        console.print("planned; the same command without --dry-run does the work")

    def done(self, report: PackReport) -> None:
        if report.was_complete:
            console.print("already complete, nothing done")
        already = f" + already there {report.already:,}" if report.already else ""
        console.print(
            f"listed {report.listed:,} = packed {report.packed:,} + rejected "
            f"{sum(report.rejected.values()):,}{already}"
        )
        for reason, count in sorted(report.rejected.items(), key=lambda item: -item[1]):
            console.print(f"  {count:>8,}  {reason}")
        for reason, count in report.dead.items():
            console.print(f"packed, but not served: {count:,} {reason}")
        rate = report.packed / report.seconds if report.seconds else 0.0
        console.print(
            f"{report.shards:,} shards, {size(report.bytes)}, {report.seconds:.1f} s "
            f"({rate:,.0f} images/s)"
        )
        console.print(
            Text(f"{report.url}  set {report.set_id[:12]} version {report.version}"), soft_wrap=True
        )


class _JsonProgress(_PackProgress):
    """The same as events."""

    def __enter__(self) -> "_JsonProgress":
        return self

    def plan(self, bill: Bill) -> None:
        _event("plan", dataclasses.asdict(bill))

    def advance(self, now: PackProgress) -> None:
        rates = _rates(now, time.monotonic() - self._started)
        _event("progress", dataclasses.asdict(now) | rates)

    def planned(self) -> None:
        _event("planned", {})

    def done(self, report: PackReport) -> None:
        _event("done", dataclasses.asdict(report))


def _rates(now: PackProgress, seconds: float) -> dict[str, float]:
    seconds = max(seconds, 1e-9)
    return {
        "images_per_s": (now.packed + now.rejected) / seconds,
        "mb_per_s": now.bytes / 1e6 / seconds,
    }


def _event(name: str, facts: dict[str, Any]) -> None:
    print(json.dumps({"event": name, **facts}), flush=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class _IndexArguments:
    """Make a shard set of tars that somebody else wrote, or write other readers' indexes of a set.

    The tars stay as they are: each is read once, and an index and a manifest are put beside them.
    """

    shard_set: tyro.conf.Positional[str]
    """The tars: a folder, a prefix, or a pattern; with --write, a shard set."""
    to: str | None = None
    """Where index and manifest go, if they cannot lie beside the tars."""
    config: tyro.conf.OmitArgPrefixes[AdoptConfig] = field(default_factory=AdoptConfig)
    write: tuple[Literal["idx", "wids"], ...] = ()
    """Write idx (DALI's readers.webdataset) or wids, and nothing else."""
    json: bool = False
    """The report as JSON."""


def run_index(arguments: list[str]) -> int:
    """`moco-scale index`."""
    given = parse_flags(_IndexArguments, arguments, prog="moco-scale index")
    for kind in given.write:
        _report(
            write_idx(given.shard_set) if kind == "idx" else write_wids(given.shard_set), given.json
        )
    if given.write:
        return 0
    with counting("indexing", quiet=given.json) as advance:

        def show(now: AdoptProgress) -> None:
            advance(now.done, now.total)

        report = adopt(
            given.shard_set,
            given.to,
            overwrite=given.config.overwrite,
            workers=given.config.workers,
            progress=show,
        )
    return _report(report, given.json)


@dataclass(frozen=True, kw_only=True, slots=True)
class _InfoArguments:
    """What is in a shard set: counts, sizes, formats, what was rejected and why."""

    shard_set: tyro.conf.Positional[str]
    """URL or path of the shard set."""
    contact_sheet: Path | None = None
    """A JPEG file to write: 48 of the images, drawn at random."""
    json: bool = False
    """As JSON."""


def run_info(arguments: list[str]) -> int:
    """`moco-scale info`."""
    given = parse_flags(_InfoArguments, arguments, prog="moco-scale info")
    shard_set = ShardSet.open(given.shard_set)
    _report(shard_set.describe(), given.json)
    if given.contact_sheet is not None:
        sheet = contact_sheet(shard_set, columns=8, rows=6, side=120, seed=0)
        given.contact_sheet.write_bytes(sheet)
        if not given.json:
            console.print(f"contact sheet  {given.contact_sheet}", soft_wrap=True)
    return 0


@dataclass(frozen=True, kw_only=True, slots=True)
class _VerifyArguments:
    """Compare a shard set with its manifest. Exit code 1 if anything is wrong."""

    shard_set: tyro.conf.Positional[str]
    """URL or path of the shard set."""
    config: tyro.conf.OmitArgPrefixes[VerifyConfig] = field(default_factory=VerifyConfig)
    json: bool = False
    """The report as JSON."""


def run_verify(arguments: list[str]) -> int:
    """`moco-scale verify`: 1 if a fault was found."""
    given = parse_flags(_VerifyArguments, arguments, prog="moco-scale verify")
    with counting("verifying", quiet=given.json) as advance:

        def show(now: VerifyProgress) -> None:
            advance(now.done, now.total)

        report = verify(
            given.shard_set,
            level=given.config.level,
            sample_frac=given.config.sample_frac,
            seed=given.config.seed,
            workers=given.config.workers,
            progress=show,
        )
    _report(report, given.json)
    return 0 if report.is_sound else 1


@dataclass(frozen=True, kw_only=True, slots=True)
class _DedupArguments:
    """Bury near-duplicates: images at most DISTANCE bits of their perceptual hash from a kept one.

    Of each group the largest image is kept. No tar is rewritten: training leaves the others out.
    """

    shard_set: tyro.conf.Positional[str]
    """URL or path of the shard set."""
    distance: int = 4
    """Bits of 64, 0 to 16. 0: only what looks the same; 8 finds crops of some per cent."""
    dry_run: bool = False
    """Say what would be buried, and bury nothing."""
    scratch: Path | None = None
    """Local folder for temporary files; None: the system's."""
    json: bool = False
    """The report as JSON."""


def run_dedup(arguments: list[str]) -> int:
    """`moco-scale dedup`."""
    given = parse_flags(_DedupArguments, arguments, prog="moco-scale dedup")
    scratch = given.scratch or Path(tempfile.gettempdir())
    with counting("comparing", quiet=given.json) as advance:

        def show(now: DedupProgress) -> None:
            advance(now.done, now.total, now.stage)

        report = dedup(
            given.shard_set,
            distance=given.distance,
            dry_run=given.dry_run,
            scratch=scratch,
            progress=show,
        )
    return _report(report, given.json)


@dataclass(frozen=True, kw_only=True, slots=True)
class _TakedownArguments:
    """Bury the samples that were made from given objects. `compact` then erases their bytes."""

    shard_set: tyro.conf.Positional[str]
    """URL or path of the shard set."""
    uri: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """The object's URI, as the index has it; may be given several times."""
    uris: Path | None = None
    """A file with a URI a line."""
    json: bool = False
    """The report as JSON."""


def run_takedown(arguments: list[str]) -> int:
    """`moco-scale takedown`: 1 if a URI is not known to the set."""
    given = parse_flags(_TakedownArguments, arguments, prog="moco-scale takedown")
    uris = [*given.uri, *(read_uris(given.uris) if given.uris else [])]
    if not uris:
        raise UsageError("give --uri URI or --uris FILE: the objects to take down")
    report = takedown(given.shard_set, uris)
    _report(report, given.json)
    return 1 if report.not_found else 0


@dataclass(frozen=True, kw_only=True, slots=True)
class _CompactArguments:
    """Erase the bytes of buried samples: shards with enough of them are written anew.

    Shards with a sample that was taken down are always rewritten. Sample ids do not change.
    """

    shard_set: tyro.conf.Positional[str]
    """URL or path of the shard set."""
    min_dead_frac: float = 0.2
    """Rewrite a shard from this part of buried samples on; 0: with any."""
    delete_old: bool = False
    """Delete the tars that were replaced. Runs that opened an earlier version will fail."""
    workers: int = 0
    """Processes; 0 takes the cores of this machine."""
    json: bool = False
    """The report as JSON."""


def run_compact(arguments: list[str]) -> int:
    """`moco-scale compact`."""
    given = parse_flags(_CompactArguments, arguments, prog="moco-scale compact")
    with counting("compacting", quiet=given.json) as advance:
        report = compact(
            given.shard_set,
            min_dead_frac=given.min_dead_frac,
            workers=given.workers,
            delete_old=given.delete_old,
            progress=advance,
        )
    return _report(report, given.json)


@dataclass(frozen=True, kw_only=True, slots=True)
class _FinalizeArguments:
    """Copy the tars to names without a hole, for tools that want a brace pattern."""

    shard_set: tyro.conf.Positional[str]
    """URL or path of the shard set."""
    stable_names: bool = False
    """stable/000000.tar and on, copied inside the store."""
    json: bool = False
    """The report as JSON."""


def run_finalize(arguments: list[str]) -> int:
    """`moco-scale finalize`."""
    given = parse_flags(_FinalizeArguments, arguments, prog="moco-scale finalize")
    if not given.stable_names:
        raise UsageError("say what shall be done: --stable-names")
    with counting("copying", quiet=given.json) as advance:
        report = finalize_stable_names(given.shard_set, progress=advance)
    return _report(report, given.json)


def _report(report: Any, as_json: bool) -> int:
    """Print a report dataclass, for people or for machines."""
    if as_json:
        print(json.dumps(dataclasses.asdict(report)), flush=True)
    else:
        print_rows(report.rows())
    return 0


def print_rows(rows: Iterable[tuple[str, str]]) -> None:
    """Names and values, in two columns; no value is taken for markup."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(Text(name), Text(value))
    console.print(table)


@contextmanager
def counting(what: str, *, quiet: bool = False) -> Iterator[Callable[..., None]]:
    """A bar on a terminal, a line now and then elsewhere; call it with done, total and a stage."""
    if quiet:
        yield lambda *_: None
        return
    if not console.is_terminal:
        last = time.monotonic()

        def line(done: int, total: int, stage: str = what) -> None:
            nonlocal last
            if time.monotonic() - last >= _LINE_EVERY_S:
                last = time.monotonic()
                console.print(f"{stage}: {done:,} of {total:,}")

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

        def move(done: int, total: int, stage: str = what) -> None:
            bar.update(task, description=stage, completed=done, total=total)

        yield move


def size(count: int) -> str:
    """A number of bytes for people."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"
