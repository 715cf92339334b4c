"""The verdict's arithmetic, on runs whose answer is known."""

import dataclasses

import pytest

from moco_scale.phases import PHASES
from moco_scale.profiles import (
    AUGMENT,
    CHECK,
    DECODE,
    HAND_OVER,
    STEP,
    STORE,
    TRANSFER,
    InRun,
    Quantiles,
    RankFigures,
    Run,
)
from moco_scale.verdict import Model, model_of, verdict_of

STEPS, BATCH, STEP_S = 10, 4, 0.1
WALL_S = STEPS * STEP_S


def waits(frac: float) -> Quantiles:
    """Of a thread that waits for so much of the time, once a step."""
    second = frac * STEP_S
    return Quantiles(count=STEPS, mean_s=second, p50_s=second, p90_s=second, p99_s=second)


def stage(name: str, busy: float, *, workers: int = 1, get: float = 0.0, put: float = 0.0) -> InRun:
    return InRun(
        stage=name,
        workers=workers,
        samples_per_s=BATCH / STEP_S,
        bytes_per_s=None,
        busy_frac=busy,
        cpu_s_per_1000=1.0,
        call=None,
        wait_to_get=waits(get),
        wait_to_put=waits(put),
    )


def run(*stages: InRun, cpu_s: float = 0.001) -> Run:
    return Run(
        steps=STEPS,
        samples_per_s=BATCH / STEP_S,
        cpu_s_per_1000=1000 * cpu_s,
        step=Quantiles(count=STEPS, mean_s=STEP_S, p50_s=STEP_S, p90_s=STEP_S, p99_s=STEP_S),
        stages=stages,
        ranks=(),
        moments=(),
    )


RUNS = {
    STORE: run(
        stage(STORE, 0.9, workers=4),
        stage(CHECK, 0.05, workers=4),
        stage(HAND_OVER, 0.1, get=0.9, put=0.0),
        stage(DECODE, 0.2, workers=2, get=0.7, put=0.0),
        stage(AUGMENT, 0.1, workers=2),
        stage(STEP, 0.5, get=0.5),
    ),
    HAND_OVER: run(
        stage(STORE, 0.2, workers=4),
        stage(HAND_OVER, 0.9, get=0.05, put=0.0),
        stage(DECODE, 0.2, workers=2, get=0.7, put=0.0),
        stage(AUGMENT, 0.1, workers=2),
        stage(STEP, 0.5, get=0.5),
    ),
    DECODE: run(
        stage(STORE, 0.2, workers=4),
        stage(HAND_OVER, 0.1, get=0.1, put=0.8),
        stage(DECODE, 0.7, workers=2, get=0.0, put=0.0),
        stage(AUGMENT, 0.3, workers=2),
        stage(STEP, 0.5, get=0.5),
    ),
    TRANSFER: run(
        stage(STORE, 0.2, workers=4),
        stage(HAND_OVER, 0.1, get=0.1, put=0.8),
        stage(DECODE, 0.2, workers=2, get=0.0, put=0.0),
        stage(AUGMENT, 0.2, workers=2),
        stage(TRANSFER, 0.6),
        stage(STEP, 0.5, get=0.5),
    ),
    STEP: run(
        stage(STORE, 0.2, workers=4),
        stage(HAND_OVER, 0.1, get=0.1, put=0.8),
        stage(DECODE, 0.2, workers=2, get=0.0, put=0.6),
        stage(AUGMENT, 0.2, workers=2),
        stage(STEP, 1.0, get=0.01),
    ),
}


@pytest.mark.parametrize("name", RUNS)
def test_the_stage_that_leaves_no_room_is_named(name: str) -> None:
    model = model_of(RUNS[name], cores=2)

    assert model.bound_by == name
    assert model.samples_per_s == pytest.approx(BATCH / STEP_S, rel=0.02)


def test_dali_does_not_tell_so_decoding_has_the_share_it_has_alone() -> None:
    one = run(stage(DECODE, 1.0), stage(HAND_OVER, 0.1, put=0.9), stage(STEP, 0.2, get=0.8))

    model = model_of(one, cores=2, share_of_decode=0.25)

    assert model.bound_by == AUGMENT
    assert model.seconds[DECODE] == pytest.approx(0.25 * STEP_S / BATCH)


def test_a_gain_ends_where_the_next_thread_or_the_cores_do() -> None:
    model = Model(seconds={STORE: 0.01, DECODE: 0.004, STEP: 0.002}, cpu_s=0.002, cores=2)

    assert model.gain({STORE: 0.8}) == pytest.approx(0.25)
    assert model.gain({STORE: 0.1}) == pytest.approx(1.5)  # then decode's 0.004
    assert model.gain({STEP: 0.1}) == pytest.approx(0.0)
    busy = Model(seconds=model.seconds, cpu_s=0.016, cores=2)
    assert busy.gain({STORE: 0.1}) == pytest.approx(0.25)  # 0.008 s of each core


def test_the_mean_of_repeats_decides_and_the_words_say_how_many_agree() -> None:
    runs = [RUNS[name] for name in (STORE, STORE, DECODE)]

    verdict = verdict_of(runs, [model_of(one, cores=2) for one in runs])

    assert (verdict.bound_by, verdict.agreeing, verdict.repeats) == (STORE, 2, 3)
    assert verdict.lines[0] == "store bounds it at 40 samples/s: 2 of 3 repeats say so, spread 0 %"
    assert verdict.lines[1].startswith("behind it: ")
    assert verdict.lines[-1] == "the step waits 50 % of its time for data"
    assert verdict.limits[0].stage == STORE


def test_busy_cores_are_said_to_be_so() -> None:
    busy = dataclasses.replace(RUNS[DECODE], cpu_s_per_1000=1000 * 0.049)

    verdict = verdict_of([busy], [model_of(busy, cores=2)])

    assert "the 2 cores of a rank are 98 % busy: more threads cannot help" in verdict.lines


def test_a_slow_rank_is_named_before_the_stage_that_it_is_slow_at() -> None:
    def rank(number: int, forward_s: float) -> RankFigures:
        phases = dict.fromkeys(PHASES, 0.0) | {"forward": forward_s, "collectives": 0.1 - forward_s}
        return RankFigures(
            rank=number,
            host=f"host-{number}",
            step_s=0.1,
            own_s=forward_s,
            last_frac=1.0 if forward_s > 0.05 else 0.0,
            phases=phases,
        )

    ranks = (rank(0, 0.02), rank(1, 0.02), rank(2, 0.09), rank(3, 0.02))
    slow = dataclasses.replace(RUNS[STEP], ranks=ranks)

    verdict = verdict_of([slow] * 3, [model_of(slow, cores=2)] * 3)

    assert (verdict.bound_by, verdict.agreeing) == ("rank 2 on host-2", 3)
    assert "holds the others up" in verdict.lines[1]
