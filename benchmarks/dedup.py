"""Near-duplicates among random hashes: seconds, CPU-seconds and memory of `shards.hamming`.

So many random 64-bit hashes, of which a part are copies of others with up to D bits flipped; each
size in a process of its own. `python -m benchmarks.dedup` prints a Markdown table.
"""

import argparse
import multiprocessing
import os
import platform
import resource
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

import numpy as np

from shards.hamming import KEPT, keep_first

PLANTED_FRAC = 0.05


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hashes", type=float, nargs="+", default=[1e6, 1e7])
    parser.add_argument("--distance", type=int, nargs="+", default=[6])
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    print(
        f"{os.cpu_count()} CPU cores ({platform.machine()}), {given.threads} threads, numpy "
        f"{metadata.version('numpy')}; load average before {os.getloadavg()[0]:.1f}.\n"
    )
    print("| hashes | distance | wall s | CPU-s | peak memory, MiB | found |")
    print("|---:|---:|---:|---:|---:|---:|")
    context = multiprocessing.get_context("spawn")
    for count in given.hashes:
        for distance in given.distance:
            # A process each: the input is made in another one, so that its memory does not count.
            with tempfile.TemporaryDirectory() as name, context.Pool(1, maxtasksperchild=1) as pool:
                pool.apply(write_input, (int(count), distance, Path(name)))
                row = pool.apply(measure, (int(count), distance, given.threads, Path(name)))
            print(f"| {row} |", flush=True)
    return 0


def write_input(count: int, distance: int, folder: Path) -> None:
    """Hashes and ranks, as files."""
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**64, count, dtype=np.uint64)
    planted = int(PLANTED_FRAC * count)
    copies = hashes[:planted].copy()
    for _ in range(distance):
        copies ^= np.uint64(1) << rng.integers(0, 64, planted, dtype=np.uint64)
    hashes[-planted:] = copies
    hashes = np.unique(hashes)
    hashes.tofile(folder / "hashes")
    rng.permutation(len(hashes)).astype(np.uint64).tofile(folder / "ranks")


def measure(count: int, distance: int, threads: int, folder: Path) -> str:
    """One row of the table."""
    began, cpu = time.perf_counter(), time.process_time()
    first, _ = keep_first(
        np.memmap(folder / "hashes", dtype=np.uint64, mode="r"),
        np.memmap(folder / "ranks", dtype=np.uint64, mode="r"),
        distance=distance,
        scratch=folder,
        threads=threads,
    )
    wall, cpu = time.perf_counter() - began, time.process_time() - cpu
    found = np.count_nonzero(first != KEPT)
    return f"{count:,} | {distance} | {wall:.1f} | {cpu:.1f} | {_peak_mib():,.0f} | {found:,}"


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    sys.exit(main())
