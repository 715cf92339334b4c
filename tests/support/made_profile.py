"""Profiles as `moco-scale profile` writes them, made up: for what shows and compares them."""

import dataclasses

import numpy as np

from moco_scale.config import TrainConfig, to_mapping
from moco_scale.profiles import (
    AUGMENT,
    CHECK,
    DECODE,
    HAND_OVER,
    STEP,
    STORE,
    TRANSFER,
    Advice,
    Alone,
    InRun,
    Joined,
    Limit,
    Moment,
    Profile,
    Quantiles,
    RankFigures,
    Run,
    Verdict,
)

HOSTILE = "<script>document.title='caught'</script>&\"'\x1b[2J $x_{"
"""Of a host or an object: markup for a page, and control characters for a terminal."""

_ALONE = {  # samples/s of one thread, threads in use, MB of 1,000 samples
    STORE: (260.0, 16, 110.0),
    CHECK: (24_000.0, 8, 110.0),
    HAND_OVER: (190_000.0, 1, 110.0),
    DECODE: (310.0, 8, 110.0),
    AUGMENT: (420.0, 8, None),
    TRANSFER: (61_000.0, 1, 602.0),
    STEP: (2_900.0, 1, None),
}


def minimal_profile() -> Profile:
    """Nothing was measured at all."""
    return Profile(about={}, settings={}, world_size=1, batch_size=32, cores=1)


def store_bound_profile(*, hostname: str = "node-b", times: float = 1.0) -> Profile:
    """Four ranks with a GPU each, a store that is too slow, rank 3 a straggler.

    Args:
        hostname: of the straggler.
        times: of the whole's samples/s.
    """
    rate = 1_480.0 * times
    return Profile(
        about={
            "date": "2026-11-25T12:00:00+00:00",
            "command": "moco-scale profile --preset moco_v2_r50 --data.shards s3://bucket/set",
            "host": "node-a",
            "machine": "96 cores, x86_64, NVIDIA H100 80GB HBM3",
            "python": "3.11.7",
            "torch": "2.14.1",
        },
        settings=to_mapping(TrainConfig()),
        world_size=4,
        batch_size=256,
        cores=8,
        alone=tuple(_alone()),
        joined=tuple(
            Joined(
                upto=stage,
                samples_per_s=rate * extra,
                low=0.93 * rate * extra,
                high=1.05 * rate * extra,
                bytes_per_s=110e3 * rate * extra,
                cpu_s_per_1000=cpu_s,
            )
            for stage, extra, cpu_s in (
                (STORE, 1.12, 0.05),
                (CHECK, 1.11, 0.09),
                (HAND_OVER, 1.09, 0.1),
                (DECODE, 1.08, 3.1),
                (AUGMENT, 1.07, 5.2),
                (TRANSFER, 1.05, 5.3),
                (STEP, 1.0, 5.6),
            )
        ),
        runs=tuple(_run(rate * part, hostname) for part in (0.98, 1.0, 1.03)),
        verdict=_verdict(4 * rate, hostname),
        rates={
            "step_pairs_per_s": 2_900.0,
            "image_bytes": 110e3,
            "decode_per_core": 180.0,
            "decode_per_gpu": None,
            "read_per_core": 11_000.0,
            "node_gb_per_s": 0.18,
            "get_latency_s": 0.06,
            "get_latency_p99_s": 0.41,
        },
        notes=("the link of each host was not measured: no second store was given",),
    )


def cpu_bound_profile() -> Profile:
    """One rank without a GPU, nothing told of the network; decoding is the limit."""
    made = store_bound_profile(times=0.3)
    config = TrainConfig()
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, num_threads=2))
    run = made.runs[0]
    moments = tuple(
        dataclasses.replace(one, cpu_frac=0.97, gpu_frac=None, received_bytes_per_s=None)
        for one in run.moments
    )
    run = dataclasses.replace(
        run, samples_per_s=run.samples_per_s / 4, ranks=run.ranks[:1], moments=moments
    )
    rate = run.samples_per_s
    return dataclasses.replace(
        made,
        about={**made.about, "machine": "2 cores, x86_64, no GPU", "host": "desk"},
        settings=to_mapping(config),
        world_size=1,
        cores=2,
        runs=(run,),
        verdict=Verdict(
            bound_by=DECODE,
            agreeing=1,
            repeats=1,
            spread_frac=0.0,
            samples_per_s=rate,
            limits=(Limit(stage=DECODE, samples_per_s=rate),),
            lines=(
                f"decode bounds it at {rate:,.0f} samples/s: 1 of 1 repeats say so, spread 0 %",
            ),
            advice=(),
        ),
        rates={"step_pairs_per_s": None, "image_bytes": 110e3},
        notes=("no GPU: transfer was not measured",),
    )


def _alone() -> list[Alone]:
    found = []
    for stage, (one_thread, most, mb_per_1000) in _ALONE.items():
        for workers in sorted({1, min(4, most), most}):
            rate = one_thread * workers**0.85
            found.append(
                Alone(
                    stage=stage,
                    workers=workers,
                    samples_per_s=rate,
                    low=0.94 * rate,
                    high=1.06 * rate,
                    bytes_per_s=None if mb_per_1000 is None else 1e3 * mb_per_1000 * rate,
                    cpu_s_per_1000={STORE: 0.05}.get(stage, 1000 / one_thread),
                    call=_quantiles(workers / rate, count=900),
                )
            )
    found.append(
        Alone(
            stage=STORE,
            workers=32,
            samples_per_s=3_900.0,
            low=3_700.0,
            high=4_050.0,
            bytes_per_s=429e6,
            cpu_s_per_1000=0.05,
            call=_quantiles(0.06, count=900),
            note="32 reads at once",
        )
    )
    return found


def _run(rate: float, hostname: str) -> Run:
    step_s = 256 / rate
    steps = 40
    waits = {STEP: (0.49 * step_s, None), DECODE: (0.6 * step_s, 2e-6)}
    waits[HAND_OVER] = (0.9 * step_s, 1e-6)
    return Run(
        steps=steps,
        samples_per_s=4 * rate,
        cpu_s_per_1000=9.0,
        step=_quantiles(step_s, count=steps),
        stages=tuple(
            InRun(
                stage=stage,
                workers=most,
                samples_per_s=rate,
                bytes_per_s=None if mb_per_1000 is None else 1e3 * mb_per_1000 * rate,
                busy_frac=min(1.0, rate / (one_thread * most**0.85)) if stage != STORE else 0.99,
                cpu_s_per_1000=0.05
                if stage == STORE
                else 0.0
                if stage == STEP
                else 1000 / one_thread,
                call=_quantiles(most**0.15 / one_thread, count=900),
                wait_to_get=_waits(waits.get(stage, (None, None))[0], steps),
                wait_to_put=_waits(waits.get(stage, (None, None))[1], steps),
            )
            for stage, (one_thread, most, mb_per_1000) in _ALONE.items()
        ),
        ranks=tuple(
            _rank(number, step_s, "node-a" if number < 2 else hostname) for number in range(4)
        ),
        moments=tuple(
            Moment(
                second=number * steps * step_s / 20,
                cpu_frac=0.7 + 0.02 * (number % 5),
                gpu_frac=0.45 + 0.03 * (number % 4),
                received_bytes_per_s=160e6 + 4e6 * (number % 3),
                held_bytes=(400 + 9 * number) * 1_000_000,
                stream_ready=number % 2,
                views_ready=0,
            )
            for number in range(20)
        ),
    )


def _rank(rank: int, step_s: float, hostname: str) -> RankFigures:
    own = {
        "data_wait": 0.45,
        "transfer": 0.01,
        "forward": 0.18 if rank < 3 else 0.29,
        "bn_shuffle": 0.02,
        "backward": 0.15,
        "optimizer": 0.02,
        "key_update": 0.02,
        "enqueue": 0.005,
    }
    shared = 1 - sum(own.values())
    phases = {name: part * step_s for name, part in own.items()}
    phases |= {"all_reduce": 0.8 * shared * step_s, "other": 0.2 * shared * step_s}
    return RankFigures(
        rank=rank,
        host=hostname,
        step_s=step_s,
        last_frac=0.85 if rank == 3 else 0.05,
        own_s=step_s * (1 - 0.8 * shared - own["bn_shuffle"]),
        phases=phases,
    )


def _verdict(rate: float, hostname: str) -> Verdict:
    return Verdict(
        bound_by=STORE,
        agreeing=3,
        repeats=3,
        spread_frac=0.05,
        samples_per_s=rate,
        limits=(
            Limit(stage=STORE, samples_per_s=rate),
            Limit(stage=DECODE, samples_per_s=1.3 * rate),
            Limit(stage=STEP, samples_per_s=1.96 * rate),
        ),
        lines=(
            f"store bounds it at {rate:,.0f} samples/s: 3 of 3 repeats say so, spread 5 %",
            f"rank 3 on {hostname} is slower than the others",
        ),
        advice=(
            Advice(
                stage=STORE,
                flag="data.read_threads",
                now="16",
                then="32",
                samples_per_s=1.3 * rate,
                gain_frac=0.3,
                why="1.4 times the bytes, alone",
                measured_samples_per_s=1.24 * rate,
            ),
            Advice(
                stage=STORE,
                flag="",
                now="images as they are",
                then="moco-scale pack --resize-side 256",
                samples_per_s=None,
                gain_frac=None,
                why="18 % of the bytes, 31 % of decoding; crops lose what is finer",
            ),
        ),
    )


def _waits(mean_s: float | None, count: int) -> Quantiles | None:
    return None if mean_s is None else _quantiles(mean_s, count=count)


def _quantiles(mean_s: float, *, count: int) -> Quantiles:
    rng = np.random.default_rng(count)
    found = Quantiles.of(mean_s * rng.lognormal(-0.18, 0.6, count))
    assert found is not None
    return found
