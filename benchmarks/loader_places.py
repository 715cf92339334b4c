"""Where the sides of `benchmarks.loaders` find the photos, and how they are run and shown."""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from benchmarks import peer_sides
from benchmarks.loader_sides import Figures
from benchmarks.photos import small_photos
from demo.images import CACHE
from demo.local_s3 import LocalS3
from shards import PackConfig, ShardSet, pack
from shards.export import write_idx
from shards.manifest import publish
from shards.store import open_store

SHARD_IMAGES = 500  # no multiple of a block: a shard's last block is short, as it is in life
SIDE_LIMIT_S = 300

Sides: TypeAlias = Mapping[str, tuple[str, Mapping[str, Any]]]
"""As a table names them: the side's name, and what it is given."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """How much is measured."""

    photos: int
    copies: int
    """Times that the shard set names each of its tars."""
    repeats: int
    seconds: float
    """Of each rate, behind the warm-up."""
    bounds: tuple[int, ...]
    """MiB that the stream may hold."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Places:
    """The shard set, where the sides find it."""

    photos: Path
    """The files themselves."""
    local: str
    s3: str
    bucket: str
    tars: list[str]
    """Names, each once."""
    idx: list[str]
    """Local paths, one for each of `tars`."""
    mean_bytes: float

    @property
    def local_tars(self) -> list[str]:
        return [f"{self.local}/{name}" for name in self.tars]

    @property
    def s3_tars(self) -> list[str]:
        return [f"{self.s3}/{name}" for name in self.tars]


def make_places(server: LocalS3, sizes: Sizes) -> Places:
    folder = (CACHE / f"loader-set-{sizes.photos}x{sizes.copies}").absolute()
    if not (folder / "idx").exists():
        shutil.rmtree(folder, ignore_errors=True)
        config = PackConfig(max_shard_samples=SHARD_IMAGES)
        pack(str(small_photos(sizes.photos).absolute()), str(folder), config)
        write_idx(str(folder))
        packed = ShardSet.open(str(folder))
        records = packed.records() * sizes.copies
        publish(packed.store, records, packed.metadata, version=packed.version + 1)
    shard_set = ShardSet.open(str(folder))
    bucket = server.make_bucket("loaders")
    once = shard_set.records()[: len(shard_set.names) // sizes.copies]
    return Places(
        photos=small_photos(sizes.photos).absolute(),
        local=str(folder),
        s3=uploaded(folder, bucket),
        bucket=bucket,
        tars=list(shard_set.names[: len(once)]),
        idx=[str(folder / "idx" / f"{Path(one.index).stem}.idx") for one in once],
        mean_bytes=shard_set.total_bytes / shard_set.num_samples,
    )


def uploaded(folder: Path, bucket: str) -> str:
    """Its URL there."""
    url = f"{bucket}/{folder.name}"
    store = open_store(url)
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        store.put(path.relative_to(folder).as_posix(), path.read_bytes())
    return url


def figures_of(
    name: str, given: Mapping[str, Any], *, cores: Sequence[int] | None = None
) -> Figures:
    """Run a side to its end, on some cores only if they are given."""
    pinned = ["taskset", "-c", ",".join(map(str, cores))] if cores else []
    module = "peer_sides" if name in peer_sides.SIDES else "loader_sides"
    command = [*pinned, sys.executable, "-m", f"benchmarks.{module}", name, json.dumps(given)]
    root = Path(__file__).absolute().parent.parent
    with tempfile.TemporaryDirectory(dir=_memory(), ignore_cleanup_errors=True) as caches:
        done = subprocess.run(
            command,
            cwd=root,
            env={**os.environ, "TMPDIR": caches},
            capture_output=True,
            text=True,
            timeout=SIDE_LIMIT_S,
            check=False,
        )
    if done.returncode:
        raise SystemExit(f"{name}: exit code {done.returncode}\n{done.stderr[-3000:]}")
    found: Figures = json.loads(done.stdout.splitlines()[-1])
    print(f"{name} {json.dumps({k: v for k, v in given.items() if k not in _LONG})[:60]}: {found}")
    sys.stdout.flush()
    return found


def _memory() -> Path | None:
    """Where what the peers download costs no disk writes, if there is room."""
    memory = Path("/dev/shm")
    return memory if memory.is_dir() and shutil.disk_usage(memory).free > 8 << 30 else None


_LONG = ("tars", "idx", "url")


def in_turns(sides: Sides, repeats: int, *, cores: int | None = 1) -> dict[str, list[Figures]]:
    """Each side `repeats` times on so many cores."""
    found = defaultdict(list)
    for _ in range(repeats):
        for shown, (name, given) in sides.items():
            on = sorted(os.sched_getaffinity(0))[:cores]
            found[shown].append(figures_of(name, given, cores=on))
    return found


def per_cpu_s(run: Figures) -> float:
    return run["samples"] / run["cpu_s"]


def per_s(run: Figures) -> float:
    return run["samples"] / run["wall_s"]


def rate_table(found: Mapping[str, list[Figures]], *, what: str) -> list[str]:
    lines = [
        f"| | {what} per CPU-second | {what} per second | cores busy |",
        "|---|---:|---:|---:|",
    ]
    for shown, runs in found.items():
        busy = statistics.median(run["cpu_s"] / run["wall_s"] for run in runs)
        lines.append(
            f"| {shown} | {spread(map(per_cpu_s, runs))} | {spread(map(per_s, runs))} "
            f"| {busy:.2f} |"
        )
    return lines


def spread(values: Iterator[float]) -> str:
    known = list(values)
    return f"{statistics.median(known):,.0f} ({min(known):,.0f} to {max(known):,.0f})"
