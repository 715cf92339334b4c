"""Decoding and two views on a GPU: images/s over threads, hardware decoder's share and colour.

`python -m benchmarks.gpu_input`: makes JPEGs of 500 x 375, measures every combination in a process
of its own (DALI's memory pools never shrink) and prints one table; about five minutes. `--device
cpu` runs a few combinations of the same graph without a GPU, to try the program out.
"""

import argparse
import dataclasses
import itertools
import json
import pickle
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from demo.made_photos import photo_jpeg
from pipelines.config import DataConfig
from pipelines.stream import EncodedBatch
from pipelines.views import pair_of_views

WIDTH, HEIGHT = 500, 375
VIEW_SIZE = 224
WARM_UP_BATCHES = 6
"""Not measured: memory pools grow, and the first batches are under way already."""
LONGEST_S = 120.0
Device = Literal["cuda", "cpu"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One combination to measure."""

    colour: Literal["exact", "fast"]
    num_threads: int
    hw_decoder_load: float


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--images", type=int, default=512, help="different ones that are made")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--batches", type=int, default=40, help="measured of each combination")
    parser.add_argument("--out", type=Path, help="a Markdown file to add the table to")
    parser.add_argument("--case", help=argparse.SUPPRESS)  # the measured process
    parser.add_argument("--photos", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.case:
        case = Case(**json.loads(given.case))
        photos = pickle.loads(given.photos.read_bytes())
        print(json.dumps(_measure(case, photos, given.device, given.batch_size, given.batches)))
        return 0
    if given.device == "cuda" and not torch.cuda.is_available():
        print("there is no GPU here, so nothing was measured; --device cpu tries the program out")
        return 1
    report = _heading(given.device, given.images, given.batch_size, given.batches)
    report += _table(given.device, given.images, given.batch_size, given.batches)
    if given.out:
        with given.out.open("a") as file:
            file.write(report)
    return 0


def _cases(device: Device) -> Iterator[Case]:
    threads = (2, 4, 8, 16) if device == "cuda" else (1, 2)
    loads = (0.0, 0.65, 0.9, 1.0) if device == "cuda" else (0.0,)
    for colour, num_threads, load in itertools.product(("exact", "fast"), threads, loads):
        yield Case(colour=colour, num_threads=num_threads, hw_decoder_load=load)


def _heading(device: Device, images: int, batch_size: int, batches: int) -> str:
    named = torch.cuda.get_device_name() if device == "cuda" else "no GPU, DALI's CPU graph"
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "numpy"))
    dali = [found for found in metadata.distributions() if "nvidia-dali" in found.name]
    heading = (
        f"\n## {named}, {datetime.now(UTC):%Y-%m-%d}\n\n"
        f"{platform.platform()}, {versions}, "
        f"{', '.join(f'{one.name} {one.version}' for one in dali)}. "
        f"{images} JPEGs of {WIDTH} x {HEIGHT}, two {VIEW_SIZE} px views of each, MoCo v2, "
        f"float16; {batches} batches of {batch_size} after {WARM_UP_BATCHES} that do not count.\n\n"
        "| colour | threads | hw_decoder_load | images/s | host CPU-s per 1,000 | GPU MiB | "
        "a bad image |\n|---|---|---|---|---|---|---|\n"
    )
    print(heading, end="", flush=True)
    return heading


def _table(device: Device, images: int, batch_size: int, batches: int) -> str:
    rows = ""
    with tempfile.TemporaryDirectory() as folder:
        photos = Path(folder, "photos")
        made = [photo_jpeg(number, size=(WIDTH, HEIGHT)) for number in range(images)]
        photos.write_bytes(pickle.dumps(made))
        for case in _cases(device):
            command = [sys.executable, "-m", "benchmarks.gpu_input", "--device", device]
            command += ["--batch-size", str(batch_size), "--batches", str(batches)]
            command += ["--photos", str(photos), "--case", json.dumps(dataclasses.asdict(case))]
            row = (
                f"| {case.colour} | {case.num_threads} | {case.hw_decoder_load:g} "
                f"| {_run(command)} |\n"
            )
            print(row, end="", flush=True)
            rows += row
    return rows


def _run(command: list[str]) -> str:
    """The figures of one combination as cells, or what went wrong: the others still count."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=LONGEST_S, check=False
        )
    except subprocess.TimeoutExpired:
        return f"nothing within {LONGEST_S:g} s | | |"
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["nothing"])[-1][:200]
        return f"failed with {done.returncode}: {said} | | |"
    found = json.loads(done.stdout.splitlines()[-1])
    memory = f"{found['gpu_mib']:.0f}" if found["gpu_mib"] is not None else "-"
    return (
        f"{found['images_per_s']:.0f} | {found['cpu_s_per_1000']:.2f} | {memory} "
        f"| {found['bad_image']}"
    )


def _measure(
    case: Case, photos: list[bytes], device: Device, batch_size: int, batches: int
) -> dict[str, Any]:
    """Decode and draw `batches` batches; then one with a damaged image in it, and one more."""
    from pipelines.dali_loader import DaliViews  # deferred: to say that there is no GPU needs none

    free_before = torch.cuda.mem_get_info()[0] if device == "cuda" else 0
    maker = DaliViews(
        pair_of_views(DataConfig(recipe="v2", view_size=VIEW_SIZE), seed=0),
        batch_size=batch_size,
        num_views=2,
        view_size=VIEW_SIZE,
        colour=case.colour,
        view_dtype="float16",
        num_threads=case.num_threads,
        device_index=0 if device == "cuda" else None,
        hw_decoder_load=case.hw_decoder_load,
    )
    made = maker.make(_batches(photos, batch_size, WARM_UP_BATCHES + batches), _no_repair)
    for _ in range(WARM_UP_BATCHES):
        next(made)
    _wait(device)
    began, cpu_began = time.perf_counter(), time.process_time()
    for _, views in made:  # noqa: B007  # held until the next ones are there, as a step does
        pass
    _wait(device)
    wall_s, cpu_s = time.perf_counter() - began, time.process_time() - cpu_began
    free_after = torch.cuda.mem_get_info()[0] if device == "cuda" else 0
    count = batches * batch_size
    return {
        "images_per_s": count / wall_s,
        "cpu_s_per_1000": 1000 * cpu_s / count,
        "gpu_mib": (free_before - free_after) / 2**20 if device == "cuda" else None,
        "bad_image": _after_a_bad_image(maker, photos, batch_size),
    }


def _after_a_bad_image(maker: Any, photos: list[bytes], batch_size: int) -> str:
    """Whether batches go on behind an image that is cut short, and only its place was replaced."""
    (whole,) = _batches(photos, batch_size, 1)
    cut = whole.data[1][: len(whole.data[1]) // 2]
    damaged = dataclasses.replace(whole, data=(whole.data[0], cut, *whole.data[2:]))
    seen: list[list[int]] = []

    def repair(_: EncodedBatch, faults: Mapping[int, str]) -> EncodedBatch:
        seen.append(list(faults))
        return whole

    try:
        came = sum(1 for _ in maker.make(iter([whole, damaged, whole]), repair))
    except RuntimeError as err:
        return f"ends it: {str(err).splitlines()[0][:80]}"
    return "survived" if came == 3 and seen == [[1]] else f"{came} of 3 batches, repaired {seen}"


def _batches(photos: list[bytes], batch_size: int, count: int) -> Iterator[EncodedBatch]:
    """The photos over and over, at new positions each time."""
    encoded = [np.frombuffer(photo, dtype=np.uint8) for photo in photos]
    for start in range(0, count * batch_size, batch_size):
        positions = np.arange(start, start + batch_size)
        yield EncodedBatch(
            data=tuple(encoded[place] for place in positions % len(encoded)),
            sample_ids=positions,
            positions=positions,
            sizes=np.tile(np.array([WIDTH, HEIGHT], dtype=np.int32), (batch_size, 1)),
            orientations=np.ones(batch_size, dtype=np.uint8),
            num_replaced=0,
            shards=np.zeros(batch_size, dtype=np.int64),
            members=positions,
            tries=np.zeros(batch_size, dtype=np.int64),
        )


def _no_repair(_: EncodedBatch, faults: Mapping[int, str]) -> EncodedBatch:
    raise RuntimeError(f"sound images were refused: {faults}")


def _wait(device: Device) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    sys.exit(main())
