"""The input pipeline beside its peers: encoded samples, requests, hand-over, views, memory, order.

Photos of 500 x 375 are packed once into .cache; each figure comes from a process of its own
(benchmarks/loader_sides.py and peer_sides.py), sides take turns, medians are quoted.
`python -m benchmarks.loaders` runs all sections; figures go to standard output and into a Markdown
file. MosaicML Streaming and litData take part where they are installed (extra `bench`). Linux only.
"""

import argparse
import datetime
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.loader_peers import (
    epoch,
    image_folder,
    installed_peers,
    left_out,
    sides_of_peers,
    whole,
)
from benchmarks.loader_places import (
    SHARD_IMAGES,
    Places,
    Sizes,
    figures_of,
    in_turns,
    make_places,
    per_cpu_s,
    per_s,
    rate_table,
)
from benchmarks.loader_sides import BATCH, BLOCK, READ_THREADS, Figures
from benchmarks.machine import machine
from benchmarks.photos import HEIGHT, WIDTH
from demo.local_s3 import LocalS3
from shards import ShardSet

MIB = 1 << 20
SAMPLES, SHARDS = 1_000_000_000, 200_000  # of the order
RANKS, SHARE = 8, 512


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--photos", type=int, default=4000)
    parser.add_argument("--copies", type=int, default=17, help="of each tar, in the shard set")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each rate")
    parser.add_argument("--bounds", type=int, nargs="+", default=[64, 256, 1024], help="MiB")
    parser.add_argument("--out", type=Path, default=_result(), help="a Markdown file")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the server is stopped then too
    sizes = Sizes(
        photos=given.photos,
        copies=given.copies,
        repeats=given.repeats,
        seconds=given.seconds,
        bounds=tuple(given.bounds),
    )
    began, load_before = time.perf_counter(), os.getloadavg()[0]
    with LocalS3() as server:
        os.environ.update(server.environment)
        places = make_places(server, sizes)
        lines = [line for name in given.sections for line in [*SECTIONS[name](places, sizes), ""]]
    head = [
        "# Loaders on the CPU",
        "",
        f"`{' '.join(['python -m benchmarks.loaders', *sys.argv[1:]])}`, "
        f"{datetime.date.today().isoformat()}, {(time.perf_counter() - began) / 60:.0f} min; "
        + machine(*_PACKAGES, *installed_peers().values())
        + f"; load average {load_before:.1f} before, {os.getloadavg()[0]:.1f} after.",
        "",
        f"{sizes.photos:,} photos of {WIDTH} x {HEIGHT}, mean {places.mean_bytes / 1e3:.1f} kB, in "
        f"shards of {SHARD_IMAGES}; the shard set, and every peer's list, names each tar "
        f"{sizes.copies} times, so all is read from the page cache. S3 is SeaweedFS on loopback, "
        f"on the same cores. Blocks of {BLOCK} samples. CPU-seconds are of the client process with "
        "all its threads and of the processes it starts, behind imports and warm-up. Sides take "
        f"turns, each in a process of its own; medians of {sizes.repeats} (smallest to largest).",
        "",
    ]
    text = "\n".join(head + lines).rstrip()
    print(text)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(text + "\n")
    return 0


_PACKAGES = (
    "nvidia-dali-cuda120", "torch", "torchvision", "pillow", "opencv-python-headless",
    "simplejpeg", "webdataset", "obstore", "numpy",
)  # fmt: skip


def _result() -> Path:
    name = f"loaders_cpu{os.cpu_count()}_{datetime.date.today():%Y%m}.md"
    return Path(__file__).parent / "results" / name


def _ratio(
    found: Mapping[str, list[Figures]],
    ours: str,
    theirs: str,
    rate: Callable[[Figures], float],
) -> float:
    """Median of the ratios of runs that followed each other."""
    pairs = zip(found[ours], found[theirs], strict=True)
    return statistics.median(rate(mine) / rate(other) for mine, other in pairs)


def encoded(places: Places, sizes: Sizes) -> list[str]:
    """Encoded samples out of shards, on one core."""
    wds, dali = "webdataset, local", "DALI readers.webdataset, local"
    ours, bare = "ours, S3", "bare obstore, S3"
    seconds: dict[str, Any] = {"seconds": sizes.seconds}
    tars = {"tars": places.local_tars * sizes.copies, **seconds}
    idx = {"idx": places.idx * sizes.copies}
    peers = sides_of_peers("encoded", places, copies=sizes.copies, **seconds)
    found = in_turns(
        {
            "ours, local": ("encoded_ours", {"url": places.local, **seconds}),
            wds: ("encoded_webdataset", tars),
            dali: ("encoded_dali", {"touch": True, **tars, **idx}),
            f"{dali}, not touched": ("encoded_dali", {"touch": False, **tars, **idx}),
            **{f"{peer}, local": side for peer, side in peers.items()},
            "files of their own, torchvision's ImageFolder, local": (
                "encoded_files",
                {"folder": image_folder(places), **seconds},
            ),
            "pread and checksum alone, local": (
                "encoded_pread",
                {"url": places.local, **seconds},
            ),
            ours: ("encoded_ours", {"url": places.s3, **seconds}),
            bare: ("encoded_obstore", {"url": places.s3, **seconds}),
        },
        sizes.repeats,
    )
    return [
        "## 1. Encoded samples out of shards, one core",
        "",
        f"Ours: `Stream` in `Order`'s order, {BATCH} lanes, every sample's checksum compared, "
        f"batches of {BATCH}. webdataset: `WebDataset(tars, shardshuffle=False)`, bytes of jpg, no "
        "shuffling. DALI: `fn.readers.webdataset` with `.idx`, batches of "
        f"{BATCH}, one thread, no shuffling, nothing decoded. MosaicML Streaming, litData: their "
        "`StreamingDataset` of a local folder, in the process itself, `shuffle=False`, a column of "
        "bytes. Files: `ImageFolder` with a loader that reads bytes, in order. Bare obstore: "
        f"`get_range` of random blocks of {BLOCK} samples, {READ_THREADS} threads. Each side's "
        "consumer reads a byte of every page, as a decoder must; *not touched*: without that, DALI "
        "hands out mapped files that nobody has read.",
        "",
        *rate_table(found, what="samples"),
        *left_out(),
        "",
        "| ratio | per CPU-second | per second | target |",
        "|---|---:|---:|---|",
        *[
            f"| {mine} / {other} | {_ratio(found, mine, other, per_cpu_s):.2f} "
            f"| {_ratio(found, mine, other, per_s):.2f} | {target} |"
            for mine, other, target in (
                ("ours, local", wds, "at least 10 per CPU-second"),
                ("ours, local", dali, "at least 1"),
                (ours, bare, "at least 0.85"),
            )
        ],
    ]


def requests(places: Places, sizes: Sizes) -> list[str]:
    """GETs and read amplification, over one epoch."""
    del sizes
    shard_set = ShardSet.open(places.local)
    total = shard_set.num_samples
    tar = places.mean_bytes / float(np.mean(shard_set.index(0).length))
    lines = [
        "## 2. Requests and bytes for a sample",
        "",
        "One epoch of one rank from local disk, a lane for each place of the batch. Formula: a "
        f"lane of L samples that begins anywhere in a block of {BLOCK} touches L + {BLOCK} - 1 "
        f"samples; tar headers and padding make it {100 * (tar - 1):.1f} % more. It is less where "
        "lanes are in one block at the same time.",
        "",
        "| lanes | blocks a lane | samples per GET | read amplification | by the formula |",
        "|---:|---:|---:|---:|---:|",
    ]
    for blocks in (32, 16, 4, 1):
        lanes = max(1, total // (blocks * BLOCK))
        room = 4 * lanes * BLOCK * int(places.mean_bytes)
        run = figures_of("gets", {"url": places.local, "lanes": lanes, "buffer_bytes": room})
        length = run["lane_samples"]
        lines.append(
            f"| {lanes:,} | {length / BLOCK:.1f} | {run['samples'] / run['requests']:.1f} "
            f"| {run['amplification']:.3f} | {tar * (length + BLOCK - 1) / length:.3f} |"
        )
    return [*lines, "", "Targets: 30 samples per GET; 1.1 where a lane has 16 blocks or more."]


def handover(places: Places, sizes: Sizes) -> list[str]:
    """From views into blocks to DALI's input."""
    batch = 256
    found = in_turns(
        {"fed": ("handover", {"url": places.local, "batch": batch, "repeats": 64})}, sizes.repeats
    )["fed"]
    fed, ran = (
        statistics.median(run[name] for run in found) for name in ("fed_us", "fed_and_run_us")
    )
    return [
        "## 3. Hand-over to DALI",
        "",
        f"`TensorListCPU` of views into blocks, batches of {batch}, `no_copy`: {fed:.1f} us a "
        f"sample to feed (target: at most 5), {ran:.1f} with a run of a graph that does nothing.",
    ]


def views(places: Places, sizes: Sizes) -> list[str]:
    """Two views of 224 px, MoCo v2's recipe, one thread on one core."""
    at = {"url": places.local, "seconds": 2 * sizes.seconds}
    ours = "our CPU path, exact colour"
    found = in_turns(
        {
            ours: ("views_ours", {"loader": "cpu", "colour": "exact", **at}),
            "our DALI graph on the CPU, exact colour": (
                "views_ours",
                {"loader": "dali", "colour": "exact", **at},
            ),
            "our DALI graph on the CPU, fast colour": (
                "views_ours",
                {"loader": "dali", "colour": "fast", **at},
            ),
            "torchvision transforms on PIL images": ("views_torchvision", {"on": "pil", **at}),
            "torchvision v2 on tensors": ("views_torchvision", {"on": "tensors", **at}),
        },
        sizes.repeats,
    )
    targets = (("torchvision transforms on PIL images", 1.8), ("torchvision v2 on tensors", 2.5))
    return [
        f"## 4. Two views of 224 px from JPEGs of {WIDTH} x {HEIGHT}, one core, one thread",
        "",
        "MoCo v2's recipe: crop of 20 to 100 % of the area, colour jitter 0.4, 0.4, 0.4, 0.1 at "
        "0.8, gray at 0.2, blur of sigma 0.1 to 2 at 0.5, flip, normalised floats. Decoded once "
        "for both views by each side. torchvision: MoCo's own transforms (blur by Pillow); on "
        "tensors `decode_jpeg` and v2's transforms of the same names (blur with a kernel of 23). "
        "Samples, not views, are counted; no collation, no worker processes.",
        "",
        *rate_table(found, what="samples"),
        "",
        "| ratio | per CPU-second | target |",
        "|---|---:|---|",
        *[
            f"| {ours} / {other} | {_ratio(found, ours, other, per_cpu_s):.2f} "
            f"| at least {target} |"
            for other, target in targets
        ],
    ]


def memory(places: Places, sizes: Sizes) -> list[str]:
    """Peak memory against the bound."""
    block_bytes = BLOCK * places.mean_bytes
    lines = [
        "## 5. Peak memory",
        "",
        "Peak resident memory above what stood before the first block, of one process on all cores "
        "that reads and drops batches, a lane for each place of the batch, six blocks a lane; "
        "lanes so that the blocks that are live at once take some 80 % of the bound; in the last "
        "rows three times the bound.",
        "",
        "| from | bound, MiB | lanes | live blocks, MiB | peak, MiB | peak / bound "
        "| samples per GET |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    cases = [*[(bound, 0.8) for bound in sizes.bounds], (sizes.bounds[0], 3.0)]
    for shown, url in (("local", places.local), ("S3", places.s3)):
        for bound, full in cases:
            lanes = max(1, round(full * bound * MIB / block_bytes))
            given = {"url": url, "lanes": lanes, "buffer_bytes": bound * MIB, "steps": 6 * BLOCK}
            run = figures_of("memory", given)
            peak = run["peak_bytes"] / MIB
            lines.append(
                f"| {shown} | {bound:,} | {lanes} | {lanes * block_bytes / MIB:,.0f} "
                f"| {peak:,.0f} | {peak / bound:.2f} | {run['samples'] / run['requests']:.1f} |"
            )
    return [*lines, "", "Target: at most 1.10; a bound too small costs GETs only."]


def order(places: Places, sizes: Sizes) -> list[str]:
    """The order of a billion samples."""
    del places
    given = {"samples": SAMPLES, "shards": SHARDS, "ranks": RANKS, "share": SHARE}
    found = in_turns({"order": ("order", given)}, sizes.repeats)["order"]
    middle = {name: statistics.median(run[name] for run in found) for name in found[0]}
    return [
        f"## 6. The order of {SAMPLES:,} samples in {SHARDS:,} shards",
        "",
        f"Uneven shards; global batch and lanes {RANKS * SHARE:,}; {SHARE} samples of one rank.",
        "",
        "| | | target |",
        "|---|---:|---|",
        f"| build, first epoch laid out | {1e3 * middle['build_s']:.0f} ms | under 100 ms |",
        f"| peak memory | {middle['peak_bytes'] / 1e6:.0f} MB | under 200 MB |",
        f"| first {SHARE} in the middle of another epoch, laid out anew "
        f"| {1e3 * middle['resumed_cpu_s']:.0f} ms CPU | under 50 ms |",
        f"| each next {SHARE} | {1e3 * middle['batch_s']:.2f} ms (slowest of 200: "
        f"{1e3 * middle['slowest_batch_s']:.2f}) | under 5 ms |",
    ]


SECTIONS = {
    "encoded": encoded,
    "requests": requests,
    "handover": handover,
    "views": views,
    "memory": memory,
    "order": order,
    "epoch": epoch,
    "whole": whole,
}

if __name__ == "__main__":
    sys.exit(main())
