"""Measures a run's input pipeline and its step: each stage alone, joined, and all together."""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from moco_scale.config import TrainConfig, to_mapping
from moco_scale.distributed import Ranks, barrier, broadcast_object
from moco_scale.errors import ConfigError
from moco_scale.forecast import PLANNED_AT_MOST
from moco_scale.pretrain import open_run_loader
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
    Joined,
    Profile,
    Quantiles,
    Run,
    Verdict,
    about,
)
from moco_scale.recording import Recording, accelerator_of
from moco_scale.trainer import RunConfig, Trainer, silence
from moco_scale.verdict import Model, mean_model, model_of, stage_of, verdict_of
from pipelines.loader import Loader
from pipelines.stages import Stages, Timing
from pipelines.synthetic import HeadspaceLoader
from pipelines.view_maker import ToDevice

_WARM_UP_STEPS = PLANNED_AT_MOST + 4
"""Batches that a loader may have planned ahead, or ready: those come faster than the ones after."""
_WARM_UP_ALONE = 4
_LEAST_STEPS, _MOST_STEPS = 6, 2000
_MOST_TIMES = 6
"""A slow step is measured for so many times the seconds asked for, and no longer."""
_WORTH = 0.05
"""A smaller gain is no advice."""
_NEW_RUN_ONLY = ("data.block_samples", "")
_FOREVER = 2**62


@dataclass(frozen=True, kw_only=True, slots=True)
class ProfileConfig:
    """How long to measure, and what to do about it."""

    seconds: float = 1.0
    """Seconds of each measurement; slow ones take longer."""
    repeats: int = 5
    """How often all stages together are measured; each stage by itself, at most three times."""
    apply: bool = False
    """Change the first flag that is advised, measure the whole again, and say what it gained."""

    def __post_init__(self) -> None:
        if self.seconds <= 0:
            raise ValueError(f"seconds must be above 0, not {self.seconds}")
        if self.repeats < 1:
            raise ValueError(f"repeats must be at least 1, not {self.repeats}")


def profile(
    config: TrainConfig,
    options: ProfileConfig,
    *,
    ranks: Ranks,
    say: Callable[[str], None],
    command: str,
    encoder: Callable[[], nn.Module] | None = None,
    to_device: ToDevice | None = None,
) -> Profile:
    """Measure what `pretrain` would do with these settings; nothing of the run is written.

    All ranks make the same calls; the figures are rank 0's, the whole's are of all ranks.

    Args:
        say: is told what is being measured.
        command: for the profile's head.
        encoder: makes one, instead of that of `config.model`.
        to_device: how the CPU path's views go to the device, instead of `Tensor.to`.

    Raises:
        ConfigError: there is nothing to read (data.mode).
        StoreError, StalledError: the store failed; nothing is written.
    """
    return _Profiler(
        config, options, ranks=ranks, say=say, encoder=encoder, to_device=to_device
    ).profile(command)


class _Profiler:
    def __init__(
        self,
        config: TrainConfig,
        options: ProfileConfig,
        *,
        ranks: Ranks,
        say: Callable[[str], None],
        encoder: Callable[[], nn.Module] | None,
        to_device: ToDevice | None,
    ) -> None:
        if config.data.mode != "stream":
            raise ConfigError(
                f"data.mode {config.data.mode} reads nothing that could be profiled; leave it out"
            )
        self._config = config
        self._options = options
        self._ranks = ranks
        self._say = say if ranks.speaks else silence
        self._encoder = encoder
        self._to_device = to_device
        self._notes: list[str] = []

    def profile(self, command: str) -> Profile:
        ranks, config = self._ranks, self._config
        if ranks.device.type != "cuda":
            self._notes.append(
                "no GPU here: decoding, augmenting and the step are those of the CPU"
            )
        with self._stages(config) as stages:
            alone = list(self._alone(stages))
            joined = list(self._joined(stages, alone))
            alone.append(self._headspace())
            runs = self._whole(config)
            joined.append(self._joined_whole(runs))
            verdict, advised = self._judge(runs, stages, alone)
        alone += advised
        if self._options.apply:
            verdict = self._apply(verdict)
        return Profile(
            about=about(command, accelerator=accelerator_of(ranks)),
            settings=to_mapping(config),
            world_size=ranks.world_size,
            batch_size=stages.batch_size,
            cores=stages.cores,
            alone=tuple(alone),
            joined=tuple(joined),
            runs=tuple(runs),
            verdict=verdict,
            rates=_rates(alone, stages),
            notes=tuple(self._notes),
        )

    # Stages alone, and joined

    @contextmanager
    def _stages(self, config: TrainConfig) -> Iterator[Stages]:
        ranks = self._ranks
        stages = Stages(
            config.data,
            seed=config.run.seed,
            rank=ranks.rank,
            world_size=ranks.world_size,
            device_index=ranks.device_index,
            local_world_size=ranks.local_world_size,
            seconds=self._options.seconds,
            agree=lambda value: broadcast_object(value, ranks),
            to_device=self._to_device,
        )
        with closing(stages):
            yield stages

    def _alone(self, stages: Stages) -> Iterator[Alone]:
        reads = self._config.data.read_threads
        for workers in sorted({1, 4, reads}):
            yield self._one(STORE, workers, partial(stages.store, workers))
        for workers in sorted({1, min(reads, stages.cores)}):
            yield self._one(CHECK, workers, partial(stages.check, workers))
        yield self._one(HAND_OVER, 1, stages.hand_over)
        for workers in sorted({1, stages.num_threads}):
            yield self._one(DECODE, workers, partial(stages.decode, workers))
            yield self._one(AUGMENT, workers, partial(stages.augment, workers))
        if stages.transfer_is_seen:
            yield self._one(TRANSFER, 1, stages.transfer)

    def _one(
        self, stage: str, workers: int, measure: Callable[[], Timing], *, note: str = ""
    ) -> Alone:
        at = f", {workers} at once" if workers > 1 else ""
        self._say(f"{stage} alone{at}{f' ({note})' if note else ''}")
        barrier(self._ranks)
        timings = [measure()]
        # What takes long is measured once.
        while len(timings) < min(3, self._options.repeats) and (
            timings[-1].seconds < 2 * self._options.seconds
        ):
            timings.append(measure())
        return _alone(stage, workers, timings, note=note)

    def _joined(self, stages: Stages, alone: Sequence[Alone]) -> Iterator[Joined]:
        reads = self._config.data.read_threads
        yield _joined_of(next(a for a in alone if a.stage == STORE and a.workers == reads))
        repeats = min(3, self._options.repeats)
        measures: list[tuple[str, Callable[[], list[Timing]]]] = [
            (CHECK, lambda: [stages.checked() for _ in range(repeats)]),
            (HAND_OVER, lambda: stages.streamed(repeats)),
            (DECODE, lambda: stages.decoded(repeats)),
            (AUGMENT, lambda: stages.augmented(repeats)),
        ]
        if stages.transfer_is_seen:
            measures.append((TRANSFER, lambda: stages.transferred(repeats)))
        for stage, measure in measures:
            self._say(f"joined up to {stage}")
            barrier(self._ranks)
            yield _joined(stage, measure())

    # With the trainer

    def _headspace(self) -> Alone:
        """The step that never waits: one batch over and over."""
        self._say("step alone")
        size = self._config.data.global_batch_size
        with self._training(
            self._config, lambda loader: HeadspaceLoader(loader, global_batch_size=size)
        ) as (trainer, _):
            steps = self._steps(trainer, warm_up=_WARM_UP_ALONE)
            cpu_began = time.process_time()
            seconds = [self._advance(trainer) for _ in range(steps)]
            cpu_s = time.process_time() - cpu_began
        per_rank = size // self._ranks.world_size
        rates = sorted(per_rank / one for one in seconds)
        middle = per_rank / statistics.median(seconds)
        return Alone(
            stage=STEP,
            workers=1,
            samples_per_s=middle,
            low=rates[len(rates) // 4],
            high=rates[-1 - len(rates) // 4],
            bytes_per_s=None,
            cpu_s_per_1000=1000 * cpu_s / (per_rank * steps),
            call=Quantiles.of(seconds),
        )

    def _whole(self, config: TrainConfig) -> list[Run]:
        """Repeats of all stages together."""
        self._say("all together")
        with self._training(config, lambda loader: loader) as (trainer, loader):
            steps = self._steps(trainer, warm_up=_WARM_UP_STEPS)
            return [
                self._repeat(trainer, loader, steps=steps) for _ in range(self._options.repeats)
            ]

    def _repeat(self, trainer: Trainer, loader: Loader, *, steps: int) -> Run:
        ranks = self._ranks
        recording = Recording(ranks, loader, first_step=trainer.step + 1, uses_torch=False)
        for _ in range(steps):
            with ranks.spans.of(STEP):
                trainer.advance()
        recording.stop()
        return recording.run(global_batch_size=self._config.data.global_batch_size)

    def _advance(self, trainer: Trainer) -> float:
        began = time.perf_counter()
        trainer.advance()
        if self._ranks.device.type == "cuda":
            torch.cuda.synchronize(self._ranks.device)
        return time.perf_counter() - began

    def _steps(self, trainer: Trainer, *, warm_up: int) -> int:
        """Warm up, and say how many steps a repeat is to have; the same on every rank."""
        seconds, began = self._options.seconds, time.perf_counter()
        took = []
        for _ in range(warm_up):
            took.append(self._advance(trainer))
            enough = time.perf_counter() - began > _MOST_TIMES * seconds and len(took) >= 2
            if broadcast_object(enough, self._ranks):
                break
        # The first steps are no measure: they compile, and wait for the first batch.
        step_s = statistics.median(took[len(took) // 2 :])
        # Each lane enters a block every so many steps: a whole round of them is read evenly.
        least = max(_LEAST_STEPS, self._config.data.block_samples)
        steps = min(_MOST_STEPS, max(least, round(seconds / step_s)))
        if steps * step_s > _MOST_TIMES * seconds:
            steps = max(2, round(_MOST_TIMES * seconds / step_s))
        return broadcast_object(steps, self._ranks)

    @contextmanager
    def _training(
        self, config: TrainConfig, through: Callable[[Loader], Loader]
    ) -> Iterator[tuple[Trainer, Loader]]:
        """A trainer that has begun, in a folder that is gone afterwards."""
        ranks = self._ranks
        loader = through(open_run_loader(config, ranks, to_device=self._to_device))
        with tempfile.TemporaryDirectory(prefix="moco-scale-profile-") as folder, closing(loader):
            trainer = Trainer(
                data=config.data,
                model=config.model,
                optim=replace(config.optim, images=_FOREVER // 4, lr_warmup_steps=0),
                run=_only_steps(config.run, folder),
                loader=loader,
                ranks=ranks,
                encoder=self._encoder() if self._encoder else None,
            )
            with trainer.stepping():
                yield trainer, loader

    def _joined_whole(self, runs: Sequence[Run]) -> Joined:
        world = self._ranks.world_size
        rates = sorted(run.samples_per_s / world for run in runs)
        reads = [stage_of(run, STORE) for run in runs]
        return Joined(
            upto=STEP,
            samples_per_s=statistics.median(rates),
            low=rates[0],
            high=rates[-1],
            bytes_per_s=statistics.median(one.bytes_per_s or 0.0 if one else 0.0 for one in reads),
            cpu_s_per_1000=statistics.median(run.cpu_s_per_1000 for run in runs),
        )

    # What follows

    def _judge(
        self, runs: Sequence[Run], stages: Stages, alone: Sequence[Alone]
    ) -> tuple[Verdict, list[Alone]]:
        share = _share_of_decode(alone, stages) if stages.is_by_dali else None
        models = [model_of(run, cores=stages.cores, share_of_decode=share) for run in runs]
        # Rank 0's, since all ranks go on to measure the same things.
        verdict = broadcast_object(verdict_of(runs, models), self._ranks)
        # A process that waits polls: the CPU-seconds of the work are those of the stages alone.
        model = replace(mean_model(models), cpu_s=_cpu_s(alone, stages))
        advice, advised = self._advise(verdict, model, stages, alone)
        return replace(verdict, advice=tuple(advice)), advised

    def _advise(
        self,
        verdict: Verdict,
        model: Model,
        stages: Stages,
        alone: Sequence[Alone],
    ) -> tuple[list[Advice], list[Alone]]:
        """What could be changed about a stage, each measured by itself; the best first."""
        trials = {
            STORE: self._try_store,
            CHECK: self._try_store,
            DECODE: self._try_views,
            AUGMENT: self._try_views,
            TRANSFER: self._try_transfer,
        }.get(verdict.bound_by)
        found, measured = [], []
        for trial in trials(stages, alone) if trials else ():
            measured += [one for one in (trial.measured,) if one is not None]
            gain = broadcast_object(model.gain(trial.factors), self._ranks)
            if gain >= _WORTH:
                found.append(
                    Advice(
                        stage=verdict.bound_by,
                        flag=trial.flag,
                        now=trial.now,
                        then=trial.then,
                        samples_per_s=verdict.samples_per_s * (1 + gain),
                        gain_frac=gain,
                        why=trial.why,
                    )
                )
        return _best_first(found), measured

    def _try_store(self, stages: Stages, alone: Sequence[Alone]) -> Iterator["_Trial"]:
        data = self._config.data
        now = _find(alone, STORE, data.read_threads)
        for workers in (2 * data.read_threads, 4 * data.read_threads):
            more = self._one(STORE, workers, partial(stages.store, workers))
            yield _Trial(
                flag="data.read_threads",
                now=str(data.read_threads),
                then=str(workers),
                factors={STORE: now.samples_per_s / more.samples_per_s},
                why=f"{more.samples_per_s / now.samples_per_s:.1f} times the reads, alone",
                measured=more,
            )
        for block in sorted({b for b in (64, 256) if b > data.block_samples}):
            more = self._one(
                STORE,
                data.read_threads,
                partial(stages.store, data.read_threads, block=block),
                note=f"blocks of {block} samples",
            )
            yield _Trial(
                flag="data.block_samples",
                now=str(data.block_samples),
                then=str(block),
                factors={
                    STORE: now.samples_per_s
                    / more.samples_per_s
                    * stages.read_amplification(block)
                    / stages.read_amplification(data.block_samples)
                },
                why="fewer, longer reads; another order, so for a new run only",
                measured=more,
            )
        yield from self._try_smaller(stages)

    def _try_views(self, stages: Stages, alone: Sequence[Alone]) -> Iterator["_Trial"]:
        now = stages.num_threads
        before = _both(_find(alone, DECODE, now), _find(alone, AUGMENT, now))
        threads = 2 * now
        while now < stages.cores and threads < 2 * stages.cores:
            workers = min(threads, stages.cores)
            decode = self._one(DECODE, workers, partial(stages.decode, workers))
            augment = self._one(AUGMENT, workers, partial(stages.augment, workers))
            factor = before / _both(decode, augment)
            yield _Trial(
                flag="data.num_threads",
                now=str(now),
                then=str(workers),
                factors={DECODE: factor, AUGMENT: factor},
                why=f"{1 / factor:.1f} times the views, alone; {stages.cores} cores are there",
                measured=decode,
            )
            threads *= 2
        if stages.is_by_dali and self._ranks.device_index is None:
            with self._stages(_with(self._config, "data.loader", "cpu")) as others:
                decode = self._one(DECODE, now, partial(others.decode, now), note="CPU path")
                augment = self._one(AUGMENT, now, partial(others.augment, now), note="CPU path")
            factor = before / _both(decode, augment)
            yield _Trial(
                flag="data.loader",
                now="dali",
                then="cpu",
                factors={DECODE: factor, AUGMENT: factor},
                why="without a GPU the CPU path is faster than DALI",
                measured=augment,
            )
        if stages.is_by_dali and self._ranks.device_index is not None:
            for load in (0.5, 0.8, 0.9):
                other = self._one(
                    DECODE,
                    now,
                    partial(stages.decode, now, hw_decoder_load=load),
                    note=f"hw_decoder_load {load:g}",
                )
                yield _Trial(
                    flag="data.hw_decoder_load",
                    now=f"{self._config.data.hw_decoder_load:g}",
                    then=f"{load:g}",
                    factors={DECODE: _find(alone, DECODE, now).samples_per_s / other.samples_per_s},
                    why="another part of the JPEGs on the GPU's JPEG engine",
                    measured=other,
                )
        yield from self._try_smaller(stages)

    def _try_smaller(self, stages: Stages) -> Iterator["_Trial"]:
        side = 8 * self._config.data.view_size // 7  # 256 for views of 224, as usual
        self._say(f"images resized to a shorter side of {side}")
        factors = stages.smaller(side)
        if factors is not None:
            of_bytes, of_decoding = factors
            yield _Trial(
                flag="",
                now="images as they are",
                then=f"moco-scale pack --resize-side {side}",
                factors={STORE: of_bytes, CHECK: of_bytes, DECODE: of_decoding},
                why=f"{100 * of_bytes:.0f} % of the bytes, {100 * of_decoding:.0f} % of decoding; "
                "crops lose what is finer",
            )

    def _try_transfer(self, stages: Stages, alone: Sequence[Alone]) -> Iterator["_Trial"]:
        now = _find(alone, TRANSFER, 1)
        dtypes = ("float32", "float16", "uint8")
        for dtype in dtypes[dtypes.index(self._config.data.view_dtype) + 1 :]:
            smaller = self._one(
                TRANSFER,
                1,
                partial(stages.transfer, view_dtype=dtype),
                note=f"views of {dtype}",
            )
            yield _Trial(
                flag="data.view_dtype",
                now=self._config.data.view_dtype,
                then=dtype,
                factors={TRANSFER: now.samples_per_s / smaller.samples_per_s},
                why="fewer bytes a view; normalised on the device",
                measured=smaller,
            )

    def _apply(self, verdict: Verdict) -> Verdict:
        """The first advice with a flag, taken, and the whole measured again."""
        advice = list(verdict.advice)
        for number, one in enumerate(advice):
            if not one.flag:
                continue
            self._say(f"applying --{one.flag} {one.then}")
            runs = self._whole(_with(self._config, one.flag, one.then))
            rate = statistics.median(run.samples_per_s for run in runs)
            advice[number] = replace(one, measured_samples_per_s=rate)
            return replace(verdict, advice=tuple(advice))
        self._notes.append("nothing to apply: no flag is advised")
        return verdict


@dataclass(frozen=True, kw_only=True, slots=True)
class _Trial:
    """A change, and what it does to stages."""

    flag: str
    now: str
    then: str
    factors: dict[str, float]
    """Seconds of a stage with it, relative to those without."""
    why: str
    measured: Alone | None = None


def _best_first(found: Sequence[Advice]) -> list[Advice]:
    """Of each flag the smallest change that gives nearly what the best does.

    What fits a run that has begun comes before what needs a new one.
    """
    kept = []
    for flag in dict.fromkeys(one.flag for one in found):
        same = [one for one in found if one.flag == flag]
        most = max(one.gain_frac or 0.0 for one in same)
        kept.append(next(one for one in same if (one.gain_frac or 0.0) >= 0.9 * most))
    return sorted(kept, key=lambda one: (one.flag in _NEW_RUN_ONLY, -(one.gain_frac or 0.0)))


def _alone(stage: str, workers: int, timings: Sequence[Timing], *, note: str) -> Alone:
    rates = sorted(one.samples_per_s for one in timings)
    middle = sorted(timings, key=lambda one: one.samples_per_s)[len(timings) // 2]
    samples = sum(one.samples for one in timings)
    return Alone(
        stage=stage,
        workers=workers,
        samples_per_s=statistics.median(rates),
        low=rates[0],
        high=rates[-1],
        bytes_per_s=middle.bytes_per_s or None,
        cpu_s_per_1000=1000 * sum(one.cpu_s for one in timings) / max(1, samples),
        call=Quantiles.of([second for one in timings for second in one.calls_s]),
        note=note,
    )


def _joined(upto: str, timings: Sequence[Timing]) -> Joined:
    rates = sorted(one.samples_per_s for one in timings)
    samples = sum(one.samples for one in timings)
    return Joined(
        upto=upto,
        samples_per_s=statistics.median(rates),
        low=rates[0],
        high=rates[-1],
        bytes_per_s=statistics.median(one.bytes_per_s for one in timings),
        cpu_s_per_1000=1000 * sum(one.cpu_s for one in timings) / max(1, samples),
    )


def _joined_of(one: Alone) -> Joined:
    return Joined(
        upto=one.stage,
        samples_per_s=one.samples_per_s,
        low=one.low,
        high=one.high,
        bytes_per_s=one.bytes_per_s or 0.0,
        cpu_s_per_1000=one.cpu_s_per_1000,
    )


def _find(alone: Sequence[Alone], stage: str, workers: int) -> Alone:
    return next(a for a in alone if (a.stage, a.workers, a.note) == (stage, workers, ""))


def _both(decode: Alone, augment: Alone) -> float:
    """Samples/s of threads that take turns at the two."""
    return 1 / (1 / decode.samples_per_s + 1 / augment.samples_per_s)


def _cpu_s(alone: Sequence[Alone], stages: Stages) -> float:
    """CPU-seconds of a sample, of all stages as they are set."""
    reads = stages.config.read_threads
    workers = {STORE: reads, CHECK: min(reads, stages.cores), DECODE: stages.num_threads}
    workers[AUGMENT] = stages.num_threads
    return sum(
        one.cpu_s_per_1000 / 1000 for one in alone if one.workers == workers.get(one.stage, 1)
    )


def _share_of_decode(alone: Sequence[Alone], stages: Stages) -> float:
    decode = _find(alone, DECODE, stages.num_threads)
    augment = _find(alone, AUGMENT, stages.num_threads)
    return _both(decode, augment) / decode.samples_per_s


def _rates(alone: Sequence[Alone], stages: Stages) -> dict[str, float | None]:
    """What `forecast` takes: fields of its Rates."""
    config = stages.config
    store = _find(alone, STORE, config.read_threads)
    one_read = _find(alone, STORE, 1)
    step = next(a for a in alone if a.stage == STEP)
    of_views = sum(_find(alone, name, 1).cpu_s_per_1000 for name in (DECODE, AUGMENT))
    of_reads = store.cpu_s_per_1000 + sum(
        _find(alone, name, 1).cpu_s_per_1000 for name in (CHECK, HAND_OVER)
    )
    by_gpu = stages.is_by_dali and stages.device_index is not None
    views_per_s = _both(
        _find(alone, DECODE, stages.num_threads), _find(alone, AUGMENT, stages.num_threads)
    )
    best = max((a for a in alone if a.stage == STORE), key=lambda a: a.bytes_per_s or 0.0)
    latency = one_read.call
    return {
        "step_pairs_per_s": step.samples_per_s,
        "image_bytes": (store.bytes_per_s or 0.0) / store.samples_per_s or None,
        "decode_per_core": None if by_gpu else 1000 / max(of_views, 1e-9),
        "decode_per_gpu": views_per_s if by_gpu else None,
        "read_per_core": 1000 / max(of_reads, 1e-9),
        "node_gb_per_s": (best.bytes_per_s or 0.0) / 1e9 or None,
        "get_latency_s": latency.mean_s if latency else None,
        "get_latency_p99_s": latency.p99_s if latency else None,
    }


def _with(config: TrainConfig, flag: str, value: str) -> TrainConfig:
    """The settings with one flag changed."""
    table, _, name = flag.partition(".")
    section: Any = getattr(config, table)
    kind = type(getattr(section, name))
    return replace(config, **{table: replace(section, **{name: kind(value)})})


def _only_steps(run: RunConfig, folder: str) -> RunConfig:
    """The same run without anything that is written or scored."""
    return replace(
        run,
        url=folder,
        resume="never",
        init="",
        log_every=_FOREVER,
        checkpoint_every=_FOREVER,
        ledger=False,
        knn_labels="",
        tensorboard="",
        profile_steps="",
        torch_profile_ranks=(),
        max_steps=0,
    )
