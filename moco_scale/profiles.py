"""A profile: what was measured of the input pipeline and the step, and what follows from it.

The file is JSON: {"format": "moco-scale profile", "version": 1} and the fields of `Profile`, whose
docstrings are the schema. Written by `moco-scale profile` and by `pretrain` with run.profile_steps,
read by `moco-scale profile --compare` and `moco-scale forecast --rates`.
"""

import contextlib
import dataclasses
import datetime
import json
import os
import platform
import socket
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from moco_scale.errors import ConfigError
from moco_scale.settings import from_mapping
from pipelines.spans import Span
from shards.errors import NotFoundError
from shards.store import open_store

_PACKAGES = (
    "moco-scale", "torch", "torchvision", "numpy", "obstore", "opencv-python-headless",
    "simplejpeg", "nvidia-dali-cuda120", "nvidia-dali-cuda130",
)  # fmt: skip
PROFILE_FORMAT, VERSION = "moco-scale profile", 1

STORE, CHECK, HAND_OVER = "store", "check", "hand-over"
DECODE, AUGMENT, TRANSFER, STEP = "decode", "augment", "transfer", "step"
STAGES = {
    STORE: "range reads from the store",
    CHECK: "samples cut out of a block, checksums, headers",
    HAND_OVER: "batches planned, and put together of blocks",
    DECODE: "encoded bytes to pixels",
    AUGMENT: "pixels to two views",
    TRANSFER: "views to the device",
    STEP: "the training step, when it never waits",
}
"""In the order that a sample goes through them."""


HISTOGRAM_EDGES_S = tuple((10 ** (np.arange(17) / 2 - 6)).tolist())
"""Half decades, from 1 us to 100 s."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Quantiles:
    """Of a number of durations, in seconds."""

    count: int
    mean_s: float
    p50_s: float
    p90_s: float
    p99_s: float
    histogram: tuple[int, ...] = ()
    """How many in each half decade from 1 us to 100 s; what is beyond is in the first or last."""

    @classmethod
    def of(cls, seconds: Sequence[float]) -> "Quantiles | None":
        """None of none."""
        if not len(seconds):
            return None
        p50, p90, p99 = np.quantile(seconds, [0.5, 0.9, 0.99]).tolist()
        edges = HISTOGRAM_EDGES_S
        counts, _ = np.histogram(np.clip(seconds, edges[0], edges[-1]), bins=edges)
        return cls(
            count=len(seconds),
            mean_s=float(np.mean(seconds)),
            p50_s=p50,
            p90_s=p90,
            p99_s=p99,
            histogram=tuple(counts.tolist()),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Alone:
    """A stage by itself: its input is there at once, and nobody waits for its output."""

    stage: str
    workers: int
    """Threads that did it at once: of `store` the reads under way."""
    samples_per_s: float
    """Median of the repeats."""
    low: float
    high: float
    """Least and most samples/s of the repeats."""
    bytes_per_s: float | None
    """That it took in; None where that says nothing."""
    cpu_s_per_1000: float
    """CPU-seconds of this process for 1,000 samples."""
    call: Quantiles | None
    """Of one call: a range read, a block, an image, a batch, a step."""
    note: str = ""
    """What was different from the settings: another block size, bytes for views."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Joined:
    """The stages up to one, one after the other, as the loader runs them; then the whole."""

    upto: str
    """The last stage; `step`: all of it with the trainer."""
    samples_per_s: float
    low: float
    high: float
    bytes_per_s: float
    """Encoded bytes."""
    cpu_s_per_1000: float


@dataclass(frozen=True, kw_only=True, slots=True)
class InRun:
    """A stage while everything runs together, on one rank."""

    stage: str
    workers: int
    """Threads that were seen at it."""
    samples_per_s: float
    bytes_per_s: float | None
    busy_frac: float
    """Part of the time that it was at work, of all of its threads together, 0-1. Near 1: it has no
    room left."""
    cpu_s_per_1000: float
    call: Quantiles | None
    """Of one piece of work; see `Alone.call`."""
    wait_to_get: Quantiles | None
    """Waits for what comes before it, one a piece."""
    wait_to_put: Quantiles | None
    """Waits because what it had made was not taken."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Moment:
    """What a sampler saw at one time of a run."""

    second: float
    """Since the run's first step."""
    cpu_frac: float
    """Of the machine's cores that this process may use, 0-1."""
    gpu_frac: float | None
    """0-1; None without a GPU."""
    received_bytes_per_s: float | None
    """From the network, of the whole machine; None where it is not told."""
    held_bytes: int
    """Of encoded samples in memory, on their way included: at most data.buffer_bytes."""
    stream_ready: int
    views_ready: int
    """Batches that wait to be taken, behind each of the two stages."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RankFigures:
    """One rank's mean seconds of a step, by phase."""

    rank: int
    host: str
    step_s: float
    own_s: float
    """Of it, outside of collectives, checkpoints and rows of metrics: what the others would wait
    for."""
    last_frac: float
    """Part of the steps in which no rank's own seconds were more, 0-1. Of equal ranks, 1 by their
    number."""
    phases: dict[str, float]
    """Those of `phases.PHASES`. Each second counts once, so that they add up to the step: forward
    is without its bn_shuffle, and none is with its collectives, which stand by themselves."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """Some steps of everything together."""

    steps: int
    samples_per_s: float
    """Over all ranks."""
    cpu_s_per_1000: float
    """CPU-seconds of rank 0's process for 1,000 of its samples."""
    step: Quantiles
    stages: tuple[InRun, ...]
    """Of rank 0."""
    ranks: tuple[RankFigures, ...]
    moments: tuple[Moment, ...]
    """Of rank 0."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Limit:
    """What one stage would allow by itself, as it is set."""

    stage: str
    samples_per_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Advice:
    """A flag to change, and what that is predicted to give."""

    stage: str
    flag: str
    """Such as data.read_threads; empty: no flag does it."""
    now: str
    then: str
    samples_per_s: float | None
    """Predicted of the whole. None: it was not measured."""
    gain_frac: float | None
    """Predicted: 0.5 is half as fast again."""
    why: str
    measured_samples_per_s: float | None = None
    """Of the whole with it, by --apply."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """Which stage bounds the whole, and what to do."""

    bound_by: str
    """A stage; or `rank N on HOST`."""
    agreeing: int
    """Of the repeats, those that say so."""
    repeats: int
    spread_frac: float
    """Of the repeats: (most - least) / median samples/s."""
    samples_per_s: float
    """Of the whole, over all ranks: median of the repeats."""
    limits: tuple[Limit, ...]
    """Of every stage that could be measured, the lowest first."""
    lines: tuple[str, ...]
    """The same in words."""
    advice: tuple[Advice, ...]
    """The most promising first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Profile:
    """All that a profile says."""

    about: dict[str, str]
    """Date, command, machine, versions."""
    settings: dict[str, Any]
    """Those of the run, as `pretrain` saves them."""
    world_size: int
    batch_size: int
    """Samples a step and rank."""
    cores: int
    """That this process may use."""
    alone: tuple[Alone, ...] = ()
    joined: tuple[Joined, ...] = ()
    runs: tuple[Run, ...] = ()
    """Repeats."""
    verdict: Verdict | None = None
    rates: dict[str, float | None] = field(default_factory=dict)
    """What `moco-scale forecast` takes: fields of `forecast.Rates`."""
    notes: tuple[str, ...] = ()
    """What was not measured, and why."""


def about(command: str, *, accelerator: str | None) -> dict[str, str]:
    """The head of a profile: when, what, where, with which versions."""
    versions = {}
    for name in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command,
        "host": socket.gethostname(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, {accelerator or 'no GPU'}",
        "python": platform.python_version(),
        **versions,
    }


def profile_bytes(profile: Profile) -> bytes:
    """The file."""
    saved = {"format": PROFILE_FORMAT, "version": VERSION, **dataclasses.asdict(profile)}
    return (json.dumps(saved, indent=1) + "\n").encode()


def write_profile(profile: Profile, path: Path) -> None:
    """Write it whole, or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.unfinished")
    beside.write_bytes(profile_bytes(profile))
    beside.replace(path)


def read_profile(path: Path | str) -> Profile:
    """
    Args:
        path: of the file, or its URL.

    Raises:
        ConfigError: there is none, it is of another format or version, or has an unknown key.
    """
    folder, _, name = str(path).rpartition("/")
    try:
        is_url = "://" in folder
        saved = json.loads(
            bytes(open_store(folder).read(name)) if is_url else Path(path).read_bytes()
        )
    except (FileNotFoundError, NotFoundError) as err:
        raise ConfigError(f"no profile at {path}") from err
    except (OSError, ValueError) as err:
        raise ConfigError(f"{path} cannot be read as JSON: {err}") from err
    if not isinstance(saved, dict) or saved.pop("format", None) != PROFILE_FORMAT:
        raise ConfigError(f'{path} is not a profile: its "format" is not "{PROFILE_FORMAT}"')
    version = saved.pop("version", None)
    if version != VERSION or isinstance(version, bool):
        raise ConfigError(
            f"{path} is of version {version!r}, and this moco-scale reads version {VERSION}; "
            "profile again, or use the moco-scale that wrote it"
        )
    try:
        return from_mapping(Profile, saved)
    except (ConfigError, TypeError) as err:
        raise ConfigError(f"{path}: {err}") from err


_PARTS = {
    STORE: ("read",),
    CHECK: ("check",),
    HAND_OVER: ("plan", "assemble"),
    DECODE: ("decode",),
    AUGMENT: ("augment",),
    TRANSFER: ("transfer",),
    STEP: ("step",),
}
"""Names of the spans in which a stage is at work."""
_GETS = {HAND_OVER: "wait for read", DECODE: "wait for stream", STEP: "wait for views"}
_PUTS = {HAND_OVER: "stream waits for room", DECODE: "views waits for room"}


def in_run(spans: Sequence[Span], *, start_s: float, end_s: float) -> tuple[InRun, ...]:
    """The stages as the spans of one process show them, between two times of `perf_counter`.

    Work that began before or goes on after counts with the part that lies inside.
    """
    wall_s = end_s - start_s
    by_name: dict[str, list[Span]] = defaultdict(list)
    for one in spans:
        if one.end_s > start_s and one.start_s < end_s:
            by_name[one.name].append(one)

    def waits(name: str | None) -> Quantiles | None:
        return Quantiles.of([one.seconds for one in by_name.get(name or "", ())])

    found = []
    for stage, names in _PARTS.items():
        if stage == DECODE and not by_name.get("decode"):
            names = ("make", "feed")  # DALI does not tell decoding from augmenting
        work = [one for name in names for one in by_name.get(name, ())]
        if not work:
            continue
        inside = [
            (min(one.end_s, end_s) - max(one.start_s, start_s)) / max(one.seconds, 1e-9)
            for one in work
        ]
        busy_s = sum(part * one.seconds for part, one in zip(inside, work, strict=True))
        cpu_s = sum(part * one.cpu_s for part, one in zip(inside, work, strict=True))
        size_bytes = sum(part * one.size_bytes for part, one in zip(inside, work, strict=True))
        # A stage of several parts takes each sample through all of them.
        samples = sum(
            part * one.samples
            for part, one in zip(inside, work, strict=True)
            if one.name == names[0]
        )
        workers = len({one.thread for one in work})
        found.append(
            InRun(
                stage=stage,
                workers=workers,
                samples_per_s=samples / wall_s,
                bytes_per_s=size_bytes / wall_s if size_bytes else None,
                busy_frac=min(1.0, busy_s / wall_s / workers),
                cpu_s_per_1000=1000 * cpu_s / samples if samples else 0.0,
                call=Quantiles.of([one.seconds for one in work]),
                wait_to_get=waits(_GETS.get(stage)),
                wait_to_put=waits(_PUTS.get(stage)),
            )
        )
    return tuple(found)
