"""Which rank holds the others up.

All ranks of synchronous training have the same step time, for they wait for the slowest in the
collectives. So it is the seconds outside of them that tell the ranks apart.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moco_scale.phases import NOT_OWN
from moco_scale.profiles import RankFigures

_BY_CHANCE = 1e-3
_LEAST_RATIO = 1.2


@dataclass(frozen=True, kw_only=True, slots=True)
class RankSeconds:
    """What each rank tells the others of its steps."""

    host: str
    phases: dict[str, float]
    """Mean seconds of a step."""
    own_s: NDArray[np.float32]
    """Of each step."""

    @classmethod
    def of(cls, host: str, steps: Sequence[dict[str, float]]) -> "RankSeconds":
        """Of `seconds_by_phase`, at least one step."""
        return cls(
            host=host,
            phases={name: statistics.fmean(step[name] for step in steps) for name in steps[0]},
            own_s=np.array([_own_s(step) for step in steps], dtype=np.float32),
        )


def figures_of(told: Sequence[RankSeconds]) -> tuple[RankFigures, ...]:
    """Of what each rank told, in rank order."""
    last = np.argmax([one.own_s for one in told], axis=0)
    return tuple(
        RankFigures(
            rank=rank,
            host=one.host,
            step_s=sum(one.phases.values()),
            own_s=_own_s(one.phases),
            last_frac=float(np.mean(last == rank)),
            phases=one.phases,
        )
        for rank, one in enumerate(told)
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Straggler:
    """The rank that the others wait for."""

    rank: int
    host: str
    ratio: float
    """Its own seconds of a step to those of the median rank."""
    phase: str
    """That takes most of what it needs more."""

    @property
    def line(self) -> str:
        return (
            f"rank {self.rank} on {self.host} holds the others up: {self.ratio:.1f} times the own "
            f"seconds of the median rank, most of it in {self.phase}"
        )


def find_straggler(ranks: Sequence[RankFigures], *, steps: int) -> Straggler | None:
    """The rank that is last in so many steps that it is no chance, and by a fifth or more.

    On a busy machine every rank is late now and then, some by a lot, and a mean of few steps shows
    it. But which one it is changes from step to step: one of n equal ranks is last in 1 of n steps.
    To be named, a rank must be last so often that one of equal ranks would be so in 1 of 1,000
    recordings (of 4 ranks: in 6 of 6 steps, in 13 of 20). As that alone names a rank which is
    always behind by nothing to speak of, like one that writes the log, it must also have
    1.2 times the own seconds of the median of the others. A rank that is late in few steps,
    however much, is not named.
    """
    if len(ranks) < 2:
        return None
    late = max(ranks, key=lambda one: one.last_frac)
    times = round(late.last_frac * steps)
    if len(ranks) * _chance_of_at_least(times, steps, 1 / len(ranks)) > _BY_CHANCE:
        return None
    others = [one for one in ranks if one is not late]
    ratio = late.own_s / max(statistics.median(one.own_s for one in others), 1e-9)
    if ratio < _LEAST_RATIO:
        return None
    more = {
        phase: seconds - statistics.median(one.phases[phase] for one in others)
        for phase, seconds in late.phases.items()
        if phase not in NOT_OWN
    }
    return Straggler(
        rank=late.rank,
        host=late.host,
        ratio=ratio,
        phase=max(more, key=lambda phase: more[phase]),
    )


def _own_s(phases: dict[str, float]) -> float:
    return sum(seconds for name, seconds in phases.items() if name not in NOT_OWN)


def _chance_of_at_least(times: int, steps: int, chance: float) -> float:
    """Of so many successes in independent trials (binomial)."""
    return sum(
        math.comb(steps, count) * chance**count * (1 - chance) ** (steps - count)
        for count in range(times, steps + 1)
    )
