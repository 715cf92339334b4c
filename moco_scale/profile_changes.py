"""What has changed between two profiles."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moco_scale.figures import rate
from moco_scale.profile_rows import StageRow, stage_rows
from moco_scale.profiles import STAGES, Alone, Profile

MACHINE = ("machine", "cores a rank", "host")
"""What makes two profiles comparable, or not; the rest that differs is versions."""
_NOT_COMPARED = {"date", "command"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """Something that differs."""

    path: str
    before: str
    """Empty: it was not there."""
    after: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Ratio:
    """Samples/s after over samples/s before."""

    before: float
    after: float
    apart: bool
    """The repeats' ranges, from least to most, do not overlap."""

    @property
    def times(self) -> float:
        """Above 1: it has become faster."""
        return self.after / self.before


@dataclass(frozen=True, kw_only=True, slots=True)
class StageChange:
    """A stage of which at least one of the profiles knows something."""

    stage: str
    workers_before: int | None
    workers_after: int | None
    alone: Ratio | None
    """With the threads in use; None where one of the two did not measure it."""
    in_run: Ratio | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Two profiles beside each other."""

    machine: tuple[Change, ...]
    versions: tuple[Change, ...]
    settings: tuple[Change, ...]
    """World size and batch size of a rank included."""
    stages: tuple[StageChange, ...]
    bound_before: str
    bound_after: str
    """Empty where there is no verdict."""
    whole: Ratio | None
    """Over all ranks."""

    @property
    def same_hardware(self) -> bool:
        """Differences of rates come from the settings, not from another machine."""
        return not any(change.path in MACHINE[:2] for change in self.machine)


def compare(before: Profile, after: Profile) -> Comparison:
    """What differs, and by how much."""
    machines = [_about(profile) for profile in (before, after)]
    differing = list(_changes(*machines))
    rows = [{row.stage: row for row in stage_rows(profile)} for profile in (before, after)]
    return Comparison(
        machine=tuple(change for change in differing if change.path in MACHINE),
        versions=tuple(change for change in differing if change.path not in MACHINE),
        settings=tuple(_changes(_settings(before), _settings(after))),
        stages=tuple(
            _stage_change(stage, *[found.get(stage) for found in rows])
            for stage in STAGES
            if any(stage in found for found in rows)
        ),
        bound_before=before.verdict.bound_by if before.verdict else "",
        bound_after=after.verdict.bound_by if after.verdict else "",
        whole=_whole(before, after),
    )


MARK_MEANS = "* the ranges of the repeats, from least to most, do not overlap"


def on_comparison(found: Comparison) -> list[str]:
    """The whole and its bound, in words; a warning where the hardware differs."""
    lines = []
    if not found.same_hardware:
        lines.append("not the same hardware: the ratios are not those of the settings alone")
    if found.whole is None:
        lines.append("no ratio of the whole: one of the two has no run, or took no sample")
    else:
        lines.append(
            f"the whole: {rate(found.whole.before)} -> {rate(found.whole.after)} samples/s, "
            f"{found.whole.times:.2f} times{' *' if found.whole.apart else ''}"
        )
    before, after = found.bound_before or "not known", found.bound_after or "not known"
    if before == after:
        lines.append(f"bound by {after}, before and after")
    else:
        lines.append(f"bound by {after}; before, by {before}")
    return lines


def ratio_cells(ratio: Ratio | None) -> tuple[str, str, str]:
    """Before, after, times."""
    if ratio is None:
        return "-", "-", "-"
    return rate(ratio.before), rate(ratio.after), times(ratio)


def times(ratio: Ratio) -> str:
    """The ratio, with a mark where the ranges do not overlap."""
    return f"{ratio.times:.2f}{'*' if ratio.apart else ' '}"


def threads(change: StageChange) -> str:
    """How many, before and after where they differ."""
    known = [n for n in (change.workers_before, change.workers_after) if n is not None]
    return "x" + "->".join(str(n) for n in dict.fromkeys(known))


def _about(profile: Profile) -> dict[str, str]:
    about = {name: said for name, said in profile.about.items() if name not in _NOT_COMPARED}
    return {**about, "cores a rank": str(profile.cores)}


def _settings(profile: Profile) -> dict[str, str]:
    found = dict(flat(profile.settings))
    return {**found, "ranks": str(profile.world_size), "batch size": str(profile.batch_size)}


def flat(settings: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, str]]:
    """Settings as lines: data.read_threads and its value."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{path}{name}.")
        else:
            yield f"{path}{name}", str(value)


def _changes(before: Mapping[str, str], after: Mapping[str, str]) -> Iterator[Change]:
    for path in dict.fromkeys((*before, *after)):
        if before.get(path, "") != after.get(path, ""):
            yield Change(path=path, before=before.get(path, ""), after=after.get(path, ""))


def _stage_change(stage: str, before: StageRow | None, after: StageRow | None) -> StageChange:
    alone = in_run = None
    if before is not None and after is not None:
        alone = _alone(before.alone, after.alone)
        in_run = _in_run(before, after)
    return StageChange(
        stage=stage,
        workers_before=before.workers if before else None,
        workers_after=after.workers if after else None,
        alone=alone,
        in_run=in_run,
    )


def _alone(before: Alone | None, after: Alone | None) -> Ratio | None:
    if before is None or after is None:
        return None
    return _ratio(
        (before.low, before.samples_per_s, before.high),
        (after.low, after.samples_per_s, after.high),
    )


def _in_run(before: StageRow, after: StageRow) -> Ratio | None:
    if not before.run_rates or not after.run_rates:
        return None
    return _ratio(before.run_rates, after.run_rates)


def _whole(before: Profile, after: Profile) -> Ratio | None:
    if not before.runs or not after.runs:
        return None
    return _ratio(*[[run.samples_per_s for run in profile.runs] for profile in (before, after)])


def _ratio(before: Sequence[float], after: Sequence[float]) -> Ratio | None:
    """None where nothing was done before: of that there is no ratio."""
    if not statistics.median(before):
        return None
    return Ratio(
        before=statistics.median(before),
        after=statistics.median(after),
        apart=max(before) < min(after) or max(after) < min(before),
    )
