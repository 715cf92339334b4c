"""The forecast beside runs that this machine can make: pinned ranks, a sleeping step, a slow store.

Two ranks, each on a core of its own with one decoding thread, stream photos, decode them and draw
two views; the step sleeps, so that it takes nothing from the cores. Their store is the local disk
behind a limit that both share, or behind a latency. For each of three resources (host cores, store
bandwidth, reads in flight) the step is set to 0.5, 0.8, 1.25 and 2 times what the resource allows:
12 settings, half of them on either side of the knee. Rates are measured first, then all forecasts
are written to a file, then the runs are made. `python -m benchmarks.forecasting`: some 5 minutes.
"""

import argparse
import datetime
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.machine import machine
from benchmarks.photos import small_photos
from moco_scale.forecast import (
    BANDWIDTH,
    CORES,
    IN_FLIGHT,
    STEP,
    Cluster,
    Inputs,
    Rates,
    Reading,
    Run,
    forecast,
)
from pipelines import DataConfig
from shards import PackConfig, ShardSet, pack

RANKS, BATCH, BLOCK, READ_THREADS, VIEW = 2, 16, 16, 2, 64
PHOTOS = 4000
TIMES = (0.5, 0.8, 1.25, 2.0)
SLOW_SAMPLES_PER_S = 250.0
"""That the slow store allows each rank; well below what a core decodes."""
SEED, DEADLINE_S = 0, 60.0
WARM_UP = 48  # batches: every lane has been through a block, and what was planned ahead is taken


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One run."""

    resource: str
    times: float
    """The step's rate, relative to what the resource allows."""
    step_s: float
    bytes_per_s: float | None = None
    latency_s: float | None = None


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=8.0, help="of each run")
    parser.add_argument("--predictions", type=Path, default=Path("forecasts.json"))
    parser.add_argument("--out", type=Path, help="a Markdown file for the result")
    given = parser.parse_args(arguments)
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < RANKS:
        print(f"needs {RANKS} cores, and there are {len(cores)}", file=sys.stderr)
        return 1
    began, load = time.monotonic(), os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="moco-bench-") as scratch:
        pack(str(small_photos(PHOTOS)), f"{scratch}/set", PackConfig(workers=2))
        rates = measured_rates(f"{scratch}/set")
        settings = list(settings_across(rates))
        inputs = [inputs_of(one, rates) for one in settings]
        predicted = [forecast(one).asked for one in inputs]
        given.predictions.write_text(
            json.dumps(
                [
                    {**asdict(one), "samples_per_s": p.samples_per_s, "bound_by": p.bound_by}
                    for one, p in zip(settings, predicted, strict=True)
                ],
                indent=1,
            )
        )
        print(f"forecasts are in {given.predictions}; now the runs", flush=True)
        found = []
        for one in settings:
            found.append(run(f"{scratch}/set", one, seconds=given.seconds))
            print(f"{one.resource} x {one.times}: {found[-1]}", flush=True)
    lines = list(table(settings, predicted, found, rates))
    lines += [
        "",
        f"{(time.monotonic() - began) / 60:.0f} min; load average {load:.1f} before, "
        f"{os.getloadavg()[0]:.1f} after.",
    ]
    print("\n".join(lines))
    if given.out is not None:
        head = [
            "# Forecast and run on the CPU",
            "",
            f"`python -m benchmarks.forecasting`, {datetime.date.today()}; "
            f"{machine('torch', 'numpy', 'opencv-python-headless', 'simplejpeg')}.",
            "",
        ]
        given.out.write_text("\n".join([*head, *lines]) + "\n")
    return 0


def data_config(url: str) -> DataConfig:
    return DataConfig(
        shards=(url,),
        global_batch_size=RANKS * BATCH,
        block_samples=BLOCK,
        view_size=VIEW,
        loader="cpu",
        num_threads=1,
        read_threads=READ_THREADS,
        wait_timeout_s=DEADLINE_S,
    )


def measured_rates(url: str) -> dict[str, float]:
    """What one core reads, decodes and draws a second, and the bytes of a photo."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        found: dict[str, float] = pool.apply(_measure, (url,))
    return found


def _measure(url: str) -> dict[str, float]:
    import torch

    from pipelines.stages import Stages

    _pin(0)
    torch.set_num_threads(1)
    stages = Stages(
        data_config(url),
        seed=SEED,
        rank=0,
        world_size=RANKS,
        device_index=None,
        local_world_size=RANKS,
        seconds=2.0,
    )
    views = statistics.median(one.cpu_s / one.samples for one in stages.augmented(3))
    reads = statistics.median(one.cpu_s / one.samples for one in stages.streamed(3))
    stages.close()
    shard_set = ShardSet.open(url)
    return {
        "decode_per_core": 1 / (views - reads),
        "read_per_core": 1 / reads,
        "image_bytes": shard_set.total_bytes / shard_set.num_samples,
    }


def settings_across(rates: dict[str, float]) -> list[Setting]:
    """Twelve of them."""
    unlimited = forecast(inputs_of(Setting(resource=CORES, times=1.0, step_s=1e-6), rates)).asked
    on_cores = unlimited.samples_per_s / RANKS
    read_bytes = rates["image_bytes"] * unlimited.read_amplification
    gets = unlimited.read_amplification / BLOCK
    found = []
    for times in TIMES:
        step_s = BATCH / (times * on_cores)
        found.append(Setting(resource=CORES, times=times, step_s=step_s))
    for times in TIMES:
        step_s = BATCH / (times * SLOW_SAMPLES_PER_S)
        bandwidth = SLOW_SAMPLES_PER_S * RANKS * read_bytes
        found.append(Setting(resource=BANDWIDTH, times=times, step_s=step_s, bytes_per_s=bandwidth))
    for times in TIMES:
        step_s = BATCH / (times * SLOW_SAMPLES_PER_S)
        latency_s = READ_THREADS / (gets * SLOW_SAMPLES_PER_S)
        found.append(Setting(resource=IN_FLIGHT, times=times, step_s=step_s, latency_s=latency_s))
    return found


def inputs_of(setting: Setting, rates: dict[str, float]) -> Inputs:
    return Inputs(
        run=Run(images=PHOTOS, gpus=RANKS, global_batch_size=RANKS * BATCH, epochs=1),
        rates=Rates(
            step_pairs_per_s=BATCH / setting.step_s,
            store_gb_per_s=None if setting.bytes_per_s is None else setting.bytes_per_s / 1e9,
            get_latency_s=setting.latency_s,
            **rates,
        ),
        cluster=Cluster(gpus_per_node=RANKS, cores_per_node=RANKS, gets_per_s_per_prefix=1e9),
        reading=Reading(reads_in_flight=READ_THREADS, block_samples=BLOCK),
    )


def run(url: str, setting: Setting, *, seconds: float) -> dict[str, Any]:
    """Samples/s of all ranks, and what the spans of the rank that waited most say is the limit."""
    context = multiprocessing.get_context("spawn")
    together, free_at = context.Barrier(RANKS), context.Value("d", 0.0)
    results = context.Queue()
    steps = WARM_UP + max(24, round(seconds / max(setting.step_s, 0.02)))
    ranks = [
        context.Process(target=_train, args=(url, rank, setting, steps, together, free_at, results))
        for rank in range(RANKS)
    ]
    for one in ranks:
        one.start()
    found = [results.get(timeout=10 * DEADLINE_S) for _ in ranks]
    for one in ranks:
        one.join(DEADLINE_S)
    wall_s = max(one["wall_s"] for one in found)
    counted = steps - WARM_UP
    # A step begins when the slowest has its batch.
    waiting = sum(map(max, *(one["waits_s"] for one in found))) / wall_s
    thread = max(found, key=lambda one: sum(one["waits_s"]))["thread"]
    return {
        "samples_per_s": RANKS * BATCH * counted / wall_s,
        "waiting": waiting,
        "between": 1 - counted * setting.step_s / wall_s - waiting,
        "bound_by": STEP if waiting < 0.05 else _RESOURCE[thread],
    }


_RESOURCE = {"views": CORES, "stream": "store"}


class _SlowStore:
    """Reads of tars behind a latency, or a limit that all ranks share."""

    def __init__(self, inner: Any, setting: Setting, free_at: Any) -> None:
        self._inner = inner
        self._setting = setting
        self._free_at = free_at

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def read_ranges(self, path: str, starts: Any, ends: Any, **more: Any) -> Any:
        found = self._inner.read_ranges(path, starts, ends, **more)
        if path.endswith(".tar"):
            time.sleep(self._setting.latency_s or 0.0)
            if self._setting.bytes_per_s is not None:
                size = sum(end - start for start, end in zip(starts, ends, strict=True))
                with self._free_at.get_lock():
                    free_at = max(self._free_at.value, time.monotonic())
                    self._free_at.value = free_at + size / self._setting.bytes_per_s
                    until = self._free_at.value
                time.sleep(max(0.0, until - time.monotonic()))
        return found


def _pin(rank: int) -> None:
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[rank]})


def _train(
    url: str, rank: int, setting: Setting, steps: int, together: Any, free_at: Any, results: Any
) -> None:
    _pin(rank)
    import torch

    from moco_scale.profiles import Quantiles, in_run
    from moco_scale.profiles import Run as ProfiledRun
    from moco_scale.verdict import model_of
    from pipelines.mixture import Mixture
    from pipelines.spans import VIEWS, Span, Spans
    from pipelines.streaming_loader import StreamingLoader, open_training_maker
    from pipelines.views import pair_of_views

    torch.set_num_threads(1)
    config, spans = data_config(url), Spans()
    shard_set = ShardSet.open(url)
    shard_set.store = _SlowStore(shard_set.store, setting, free_at)
    mixture = Mixture(
        [shard_set], weights=(), seed=SEED, lanes=RANKS * BATCH, block=BLOCK, follow=False
    )
    maker = open_training_maker(
        config,
        pair_of_views(config, seed=SEED),
        batch_size=BATCH,
        num_views=2,
        num_threads=1,
        device_index=None,
        spans=spans,
        to_device=None,
    )
    loader = StreamingLoader(
        mixture,
        maker,
        config=config,
        seed=SEED,
        rank=rank,
        world_size=RANKS,
        agree=None,
        spans=spans,
    )
    own, first_s = [], 0.0
    for step in range(steps):
        next(loader)
        together.wait(DEADLINE_S)
        began_s = time.perf_counter()
        if step == WARM_UP:
            first_s, spans.recording = began_s, True
        time.sleep(setting.step_s)
        own.append(Span("step", "step", began_s, time.perf_counter(), 0.0, BATCH, 0))
    last_s = time.perf_counter()
    spans.recording = False
    loader.close()
    counted, taken = steps - WARM_UP, spans.take()
    wall_s = last_s - first_s
    mean = Quantiles.of([wall_s / counted])
    assert mean is not None
    seen = ProfiledRun(
        steps=counted,
        samples_per_s=0.0,
        cpu_s_per_1000=0.0,
        step=mean,
        stages=in_run([*taken, *own], start_s=first_s, end_s=last_s),
        ranks=(),
        moments=(),
    )
    model = model_of(seen, cores=1)
    results.put(
        {
            "wall_s": wall_s,
            # For batches that were not there; not what the core did for others in the meantime.
            "waits_s": [one.seconds for one in taken if one.name == f"wait for {VIEWS}"],
            "thread": max(_RESOURCE, key=lambda name: model.threads[name]),
        }
    )


def table(
    settings: Sequence[Setting],
    predicted: Sequence[Any],
    found: Sequence[dict[str, Any]],
    rates: dict[str, float],
) -> Sequence[str]:
    """The result as Markdown."""
    lines = [
        f"{RANKS} ranks of batch {BATCH}, each on its own core with one decoding thread and "
        f"{READ_THREADS} reads under way; blocks of {BLOCK} of {PHOTOS:,} photos of 500 x 375, two "
        f"views of {VIEW} px; the step sleeps. Waiting: the slowest rank of each step, for a batch "
        "that was not there. Between: the rest of the time outside of the step, since a core that "
        "decodes is not given back at once. Measured before: a core decodes and draws "
        f"{rates['decode_per_core']:,.0f} and reads {rates['read_per_core']:,.0f} samples/s. All "
        "forecasts were on disk before the first run.",
        "",
        "| resource | step's rate / its | forecast, samples/s | run | error | limit forecast | "
        "limit found | waiting for data | between |",
        "|---|---:|---:|---:|---:|---|---|---:|---:|",
    ]
    errors, right = [], 0
    for setting, forecasted, one in zip(settings, predicted, found, strict=True):
        error = forecasted.samples_per_s / one["samples_per_s"] - 1
        errors.append(abs(error))
        is_right = one["bound_by"] == {
            BANDWIDTH: "store",
            IN_FLIGHT: "store",
        }.get(forecasted.bound_by, forecasted.bound_by)
        right += is_right
        lines.append(
            f"| {setting.resource} | {setting.times:g} | {forecasted.samples_per_s:,.0f} | "
            f"{one['samples_per_s']:,.0f} | {100 * error:+.0f} % | {forecasted.bound_by} | "
            f"{one['bound_by']} | {100 * one['waiting']:.0f} % | {100 * one['between']:.0f} % |"
        )
    return [
        *lines,
        "",
        f"Median error {100 * statistics.median(errors):.0f} %, largest "
        f"{100 * max(errors):.0f} %; the limit is right in {right} of {len(settings)}.",
    ]


if __name__ == "__main__":
    sys.exit(main())
