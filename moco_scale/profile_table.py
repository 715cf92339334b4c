"""A profile in the terminal, 80 columns wide."""

from collections.abc import Iterator

from rich.console import Console
from rich.table import Table
from rich.text import Text

from moco_scale.figures import cpu, megabytes, percent, rate
from moco_scale.profile_changes import (
    MARK_MEANS,
    Comparison,
    compare,
    on_comparison,
    ratio_cells,
    threads,
)
from moco_scale.profile_rows import (
    StageRow,
    on_dali,
    on_stragglers,
    on_use,
    quantiles,
    setup,
    stage_rows,
    what_it_gives,
    what_to_change,
)
from moco_scale.profiles import Joined, Profile, Verdict

_BAR = 36


def print_profile(profile: Profile, console: Console) -> None:
    """The verdict in words, the stages, what to change, and what was not measured."""
    verdict = profile.verdict
    _say(console, *(verdict.lines if verdict else ["no verdict"]), "", setup(profile))
    rows = stage_rows(profile)
    if rows:
        console.print()
        console.print(_stages(rows))
    if any(row.in_run for row in rows):
        console.print("\nIn the run, ms: p50 / p90 / p99")
        console.print(_waits(rows))
    if profile.joined:
        console.print("\nThe stages joined, up to; the longer the bar, the slower")
        console.print(_ladder(profile.joined, "#" if console.options.ascii_only else "█"))
    if verdict:
        _say(console, "", *_advice(verdict))
    after = [on_stragglers(profile), on_use(profile), on_dali(profile), *profile.notes]
    said = [line for line in after if line]
    if said:
        _say(console, "", *said)


def print_comparison(before: Profile, after: Profile, console: Console) -> None:
    """Ratios of the whole and of each stage, then what differs: machine, settings, versions."""
    found = compare(before, after)
    _say(console, *on_comparison(found), "")
    console.print(_ratios(found))
    _say(console, MARK_MEANS)
    for title, changes in (
        ("Machine", found.machine),
        ("Settings", found.settings),
        ("Versions", found.versions),
    ):
        if changes:
            _say(console, "", title)
            _say(
                console,
                *(f"  {one.path}: {one.before or '-'} -> {one.after or '-'}" for one in changes),
            )


def _ratios(found: Comparison) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("stage\nx threads", no_wrap=True)
    for name in ("alone\nbefore", "\nafter", "\ntimes", "in run\nbefore", "\nafter", "\ntimes"):
        table.add_column(name, justify="right", no_wrap=True)
    for one in found.stages:
        table.add_row(
            f"{one.stage} {threads(one)}", *ratio_cells(one.alone), *ratio_cells(one.in_run)
        )
    return table


def _stages(rows: tuple[StageRow, ...]) -> Table:
    # Fits 80 columns.
    table = Table(box=None, pad_edge=False)
    table.add_column("stage\nx threads", no_wrap=True)
    for name in ("alone\nsamples/s", "\nMB/s", "CPU-s\n/1,000", "in run\nsamples/s", "\nMB/s",
                 "CPU-s\n/1,000", "\nbusy"):  # fmt: skip
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        alone, seen = row.alone, row.in_run
        table.add_row(
            f"{row.stage} x{row.workers}",
            rate(alone.samples_per_s) if alone else "-",
            megabytes(alone.bytes_per_s) if alone else "-",
            cpu(alone.cpu_s_per_1000) if alone else "-",
            rate(seen.samples_per_s) if seen else "-",
            megabytes(seen.bytes_per_s) if seen else "-",
            cpu(seen.cpu_s_per_1000) if seen else "-",
            percent(seen.busy_frac) if seen else "-",
        )
    return table


def _waits(rows: tuple[StageRow, ...]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for name in ("a piece of work", "wait to get", "wait to put"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        if row.in_run is not None:
            one = row.in_run
            table.add_row(one.stage, *map(quantiles, (one.call, one.wait_to_get, one.wait_to_put)))
    return table


def _ladder(joined: tuple[Joined, ...], mark: str) -> Table:
    slowest = min(one.samples_per_s for one in joined)
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for name in ("samples/s", "low - high"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for one in joined:
        # Bars of seconds a sample: those of samples/s would hide the stage that matters.
        part = slowest / one.samples_per_s if one.samples_per_s else 1.0
        table.add_row(
            one.upto,
            rate(one.samples_per_s),
            f"{rate(one.low)} - {rate(one.high)}",
            mark * max(1, round(_BAR * part)),
        )
    return table


def _advice(verdict: Verdict) -> Iterator[str]:
    if not verdict.advice:
        yield "no flag is advised"
    for number, one in enumerate(verdict.advice, start=1):
        yield f"{number}. {what_to_change(one)}: {what_it_gives(one, verdict.samples_per_s)}"
        yield f"   {one.why}"


def _say(console: Console, *lines: str) -> None:
    for line in lines:
        # Names come from elsewhere, and a terminal would obey what is in them.
        console.print(Text("".join(c if c.isprintable() else "?" for c in line)))
