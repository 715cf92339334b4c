"""Which stage bounds the whole, what would bound it next, and what a change would give.

Three threads hand batches on, each a bounded number ahead: the stream's, which plans batches and
waits for their blocks; the one that makes views; and the step's. The one with the most seconds of
its own for a sample holds the other two up, so the whole takes as many. A thread's own seconds are
those in which it waits neither for the one before it nor for room behind it:

    stream   the time less its waits for room; that is: hand-over, and waiting for reads, which is
             the store's and the checks', in proportion to what the reading threads do
    views    the time less its waits for the stream and for room; that is: transfer, and decode and
             augment in proportion to what the decoding threads do
    step     the time less its waits for views

Of the thread with the most, the part with the most is what bounds the whole. A change is predicted
by multiplying one part by what the stage alone gained by it; the whole then takes what the longest
thread takes, and never less than all CPU-seconds of a sample divided by the cores.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from moco_scale.profiles import (
    AUGMENT,
    CHECK,
    DECODE,
    HAND_OVER,
    STEP,
    STORE,
    TRANSFER,
    InRun,
    Limit,
    Quantiles,
    Run,
    Verdict,
)
from moco_scale.stragglers import find_straggler

_BUSY = 0.85
"""Of the cores: above it there is no room for more threads."""
THREADS = {
    "stream": (HAND_OVER, STORE, CHECK),
    "views": (DECODE, AUGMENT, TRANSFER),
    "step": (STEP,),
}
"""The stages that each of the three threads waits for or is at work in."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """One rank's own seconds of a sample, by stage."""

    seconds: Mapping[str, float]
    cpu_s: float
    """CPU-seconds of a sample, of everything."""
    cores: int

    @property
    def threads(self) -> dict[str, float]:
        """Seconds of a sample that each thread has of its own."""
        return {
            name: sum(self.seconds.get(stage, 0.0) for stage in stages)
            for name, stages in THREADS.items()
        }

    @property
    def bound_by(self) -> str:
        """The stage that takes most of the thread that takes longest."""
        threads = self.threads
        longest = max(threads, key=lambda name: threads[name])
        return max(THREADS[longest], key=lambda stage: self.seconds.get(stage, 0.0))

    @property
    def samples_per_s(self) -> float:
        """What the longest thread allows; or the cores."""
        seconds = max(*self.threads.values(), self.cpu_s / self.cores, 1e-12)
        return 1 / seconds

    def with_factors(self, factors: Mapping[str, float]) -> "Model":
        """The same, where stages take so many times as long."""
        return Model(
            seconds={
                stage: seconds * factors.get(stage, 1.0) for stage, seconds in self.seconds.items()
            },
            cpu_s=self.cpu_s,
            cores=self.cores,
        )

    def gain(self, factors: Mapping[str, float]) -> float:
        """Part by which the whole is predicted to be faster."""
        return self.with_factors(factors).samples_per_s / self.samples_per_s - 1


def model_of(run: Run, *, cores: int, share_of_decode: float | None = None) -> Model:
    """What one repeat says of the rank that it shows.

    Args:
        cores: that the rank may use.
        share_of_decode: of the seconds that DALI takes, which does not tell them apart; None where
            the decoding threads told.
    """
    stages = {one.stage: one for one in run.stages}
    wall_s = run.steps * run.step.mean_s
    samples = max(1.0, stages[STEP].samples_per_s * wall_s) if STEP in stages else 1.0

    def thread_s(stage: str) -> float:
        one = stages.get(stage)
        return 0.0 if one is None else one.busy_frac * one.workers * wall_s

    found: dict[str, float] = {}
    step = stages.get(STEP)
    found[STEP] = wall_s - _total(step.wait_to_get if step else None)
    views = stages.get(DECODE)
    if views is not None:
        own = max(0.0, wall_s - _total(views.wait_to_get) - _total(views.wait_to_put))
        found[TRANSFER] = min(own, thread_s(TRANSFER))
        decode_s, augment_s = thread_s(DECODE), thread_s(AUGMENT)
        share = decode_s / max(decode_s + augment_s, 1e-12)
        if share_of_decode is not None:
            share = share_of_decode
        found[DECODE] = share * (own - found[TRANSFER])
        found[AUGMENT] = (1 - share) * (own - found[TRANSFER])
    stream = stages.get(HAND_OVER)
    if stream is not None:
        own = max(0.0, wall_s - _total(stream.wait_to_put))
        # Not the sum of its waits: those at the ends of a repeat are not recorded.
        waits_s = own - min(own, thread_s(HAND_OVER))
        read_s, check_s = thread_s(STORE), thread_s(CHECK)
        share = read_s / max(read_s + check_s, 1e-12)
        found[HAND_OVER] = own - waits_s
        found[STORE], found[CHECK] = share * waits_s, (1 - share) * waits_s
    return Model(
        seconds={stage: seconds / samples for stage, seconds in found.items()},
        cpu_s=run.cpu_s_per_1000 / 1000,
        cores=cores,
    )


def wait_frac_of(run: Run) -> float:
    """Part of the time that the step waited for data."""
    step = stage_of(run, STEP)
    return _total(step.wait_to_get if step else None) / max(run.steps * run.step.mean_s, 1e-12)


def _total(waits: Quantiles | None) -> float:
    return 0.0 if waits is None else waits.count * waits.mean_s


def mean_model(models: Sequence[Model]) -> Model:
    """The mean of several repeats."""
    stages = dict.fromkeys(stage for one in models for stage in one.seconds)
    return Model(
        seconds={
            stage: float(np.mean([one.seconds.get(stage, 0.0) for one in models]))
            for stage in stages
        },
        cpu_s=float(np.mean([one.cpu_s for one in models])),
        cores=models[0].cores,
    )


def limits_of(model: Model, *, world_size: int) -> tuple[Limit, ...]:
    """What each stage would allow if it alone were the limit, the lowest first.

    Decoding and augmenting take turns in the same threads, as do reads and checks: each of them is
    shown with what the other leaves it.
    """
    found = [
        Limit(stage=stage, samples_per_s=world_size / max(model.threads[name], 1e-12))
        for name, stages in THREADS.items()
        for stage in [max(stages, key=lambda one: model.seconds.get(one, 0.0))]
        if model.threads[name] > 0
    ]
    return tuple(sorted(found, key=lambda one: one.samples_per_s))


def verdict_of(runs: Sequence[Run], models: Sequence[Model]) -> Verdict:
    """What repeats of the whole say, without advice: on rank 0, or of any rank for itself.

    Args:
        models: of each of the runs.
    """
    model = mean_model(models)
    world_size = max(1, len(runs[0].ranks))
    stragglers = [find_straggler(run.ranks, steps=run.steps) for run in runs]
    named = [f"rank {one.rank} on {one.host}" for one in stragglers if one is not None]
    rates = sorted(run.samples_per_s for run in runs)
    rate = statistics.median(rates)
    bound_by = model.bound_by
    agreeing = sum(one.bound_by == bound_by for one in models)
    lines = []
    if len(named) > len(runs) / 2:
        bound_by = statistics.mode(named)
        agreeing = named.count(bound_by)
        lines.append(next(one.line for one in stragglers if one is not None))
    spread = (rates[-1] - rates[0]) / max(rate, 1e-12)
    lines.insert(
        0,
        f"{bound_by} bounds it at {rate:,.0f} samples/s: {agreeing} of {len(runs)} repeats say so, "
        f"spread {100 * spread:.0f} %",
    )
    limits = limits_of(model, world_size=world_size)
    behind = [one for one in limits if one.stage != bound_by]
    if behind:
        times = behind[0].samples_per_s / max(rate, 1e-12)
        lines.append(
            f"behind it: {behind[0].stage}, some {behind[0].samples_per_s:,.0f} samples/s "
            f"({times:.1f} times as many)"
        )
    busy = rate / world_size * model.cpu_s / model.cores
    if busy > _BUSY:
        lines.append(
            f"the {model.cores} cores of a rank are {100 * min(1.0, busy):.0f} % busy: more "
            "threads cannot help"
        )
    wait_frac = statistics.mean(wait_frac_of(run) for run in runs)
    lines.append(f"the step waits {100 * wait_frac:.0f} % of its time for data")
    return Verdict(
        bound_by=bound_by,
        agreeing=agreeing,
        repeats=len(runs),
        spread_frac=spread,
        samples_per_s=rate,
        limits=limits,
        lines=tuple(lines),
        advice=(),
    )


def stage_of(run: Run, stage: str) -> InRun | None:
    """A stage of a repeat; None if nothing was seen of it."""
    return next((one for one in run.stages if one.stage == stage), None)
