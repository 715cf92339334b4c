"""What a profile shows, row by row: the same for the terminal and for the page."""

import statistics
from dataclasses import dataclass

from moco_scale.figures import figure, gain, milliseconds, percent, rate, seconds
from moco_scale.profiles import (
    AUGMENT,
    DECODE,
    STAGES,
    STORE,
    Advice,
    Alone,
    InRun,
    Profile,
    Quantiles,
    RankFigures,
    Run,
)

UNEVEN = 1.05
"""A rank that has so many times the median's own time of a step is a straggler."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StageRow:
    """A stage by itself and in the run; what was not seen is None."""

    stage: str
    workers: int
    """Threads in use: alone as the settings have them, or else those seen in the run."""
    alone: Alone | None
    in_run: InRun | None
    """Of the middle repeat."""
    run_rates: tuple[float, ...]
    """Samples/s of the repeats in which it was seen."""


def stage_rows(profile: Profile) -> tuple[StageRow, ...]:
    """The stages of which anything is known, in the order that a sample goes through them."""
    middle = middle_run(profile)
    found = []
    for stage in STAGES:
        in_runs = [one for run in profile.runs for one in run.stages if one.stage == stage]
        seen = None
        if middle is not None:
            seen = next((one for one in middle.stages if one.stage == stage), None)
        alone = alone_in_use(profile, stage)
        if alone is None and not in_runs:
            continue
        workers = [one.workers for one in (alone, seen, *in_runs) if one is not None]
        found.append(
            StageRow(
                stage=stage,
                workers=workers[0],
                alone=alone,
                in_run=seen,
                run_rates=tuple(one.samples_per_s for one in in_runs),
            )
        )
    return tuple(found)


def alone_in_use(profile: Profile, stage: str) -> Alone | None:
    """The stage by itself with as many threads as the run has: those that the settings say, or
    that were seen in the run; else the most that were tried."""
    tried = [one for one in profile.alone if one.stage == stage and not one.note]
    wanted = {one.workers for run in profile.runs for one in run.stages if one.stage == stage}
    data = profile.settings.get("data")
    if stage == STORE and isinstance(data, dict) and "read_threads" in data:
        wanted = {data["read_threads"]}
    in_use = [one for one in tried if one.workers in wanted]
    return max(in_use or tried, key=lambda one: one.workers, default=None)


def middle_run(profile: Profile) -> Run | None:
    """The repeat with the median samples/s, or the one below it; None without a run."""
    runs = sorted(profile.runs, key=lambda run: run.samples_per_s)
    return runs[(len(runs) - 1) // 2] if runs else None


def own_times(profile: Profile) -> tuple[RankFigures, ...]:
    """The ranks of the middle repeat, the one with the most time of its own first."""
    run = middle_run(profile)
    ranks = run.ranks if run is not None else ()
    return tuple(sorted(ranks, key=lambda one: -one.own_s))


def on_stragglers(profile: Profile) -> str:
    """A sentence about the slowest rank; empty where there is none to compare with."""
    ranks = own_times(profile)
    if len(ranks) < 2:
        return ""
    slowest, median_s = ranks[0], statistics.median(one.own_s for one in ranks)
    if slowest.own_s <= UNEVEN * median_s:
        return (
            f"no straggler: the {len(ranks)} ranks have {seconds(ranks[-1].own_s)} to "
            f"{seconds(slowest.own_s)} of their own a step"
        )
    return (
        f"straggler: rank {slowest.rank} on {slowest.host} has {seconds(slowest.own_s)} of its own "
        f"a step, {slowest.own_s / max(median_s, 1e-12):.1f} times the median of {len(ranks)} ranks"
    )


def on_use(profile: Profile) -> str:
    """A sentence about what the sampler saw, means over all repeats; empty without moments."""
    moments = [one for run in profile.runs for one in run.moments]
    if not moments:
        return ""
    parts = [f"CPU {percent(statistics.mean(one.cpu_frac for one in moments))} busy"]
    gpu = [one.gpu_frac for one in moments if one.gpu_frac is not None]
    if gpu:
        parts.append(f"GPU {percent(statistics.mean(gpu))} busy")
    received = [one.received_bytes_per_s for one in moments if one.received_bytes_per_s is not None]
    if received:
        parts.append(f"{figure(statistics.mean(received) / 1e6)} MB/s from the network")
    parts.append(f"at most {figure(max(one.held_bytes for one in moments) / 1e6)} MB held")
    return ", ".join(parts)


def on_dali(profile: Profile) -> str:
    """Why the run has no row for augmenting; empty where it has."""
    rows = {row.stage: row for row in stage_rows(profile)}
    decode, augment = rows.get(DECODE), rows.get(AUGMENT)
    if decode is None or augment is None or decode.in_run is None or augment.in_run is not None:
        return ""
    return f"in the run, {DECODE} has {AUGMENT} in it: DALI does not tell them apart"


def setup(profile: Profile) -> str:
    """Ranks, batch and machine in a line."""
    ranks = "1 rank" if profile.world_size == 1 else f"{profile.world_size:,} ranks"
    cores = "1 core" if profile.cores == 1 else f"{profile.cores:,} cores"
    machine = profile.about.get("machine", "not known")
    return f"{ranks} of {profile.batch_size:,} samples a step and {cores}; machine: {machine}"


def what_to_change(advice: Advice) -> str:
    """The flag, from what to what."""
    return f"{advice.flag or 'no flag'}: {advice.now} -> {advice.then}"


def what_it_gives(advice: Advice, whole: float) -> str:
    """The prediction, and what was measured of it.

    Args:
        whole: samples/s as it is.
    """
    if advice.samples_per_s is None or advice.gain_frac is None:
        said = "gain not predicted"
    else:
        said = f"predicted {rate(advice.samples_per_s)} samples/s, {gain(advice.gain_frac)}"
    if advice.measured_samples_per_s is not None:
        measured = advice.measured_samples_per_s
        said += f"; measured {rate(measured)} samples/s, {gain(measured / max(whole, 1e-12) - 1)}"
    return said


def quantiles(waits: Quantiles | None) -> str:
    """Milliseconds, p50 / p90 / p99."""
    if waits is None:
        return "-"
    return " / ".join(map(milliseconds, (waits.p50_s, waits.p90_s, waits.p99_s)))
