"""How long planning takes and how much memory it needs, on a made-up catalog of any size.

`python -m benchmarks.planning --rows 10_000_000`: nothing is listed and nothing fetched. A catalog
is written as Parquet into a temporary folder, planned in a process of its own into a folder beside
it, and removed. Figures go to standard output and, with --out, to the end of a Markdown file.
"""

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from resource import RUSAGE_CHILDREN, RUSAGE_SELF, getrusage

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from shards.catalog import CATALOG, Catalog
from shards.plan import FOLDER, PlanSettings, make_plan
from shards.store import open_store

SOURCE = "s3://raw-images-of-the-benchmark"
ROWS_PER_FILE = 10**6
DUPLICATES = 0.03
_DIGITS = np.frombuffer(b"0123456789abcdef", np.uint8)
SETTINGS = PlanSettings(
    sources=(SOURCE,),
    seed=0,
    shard_bytes=256 * 2**20,
    max_shard_samples=16384,
    max_object_bytes=256 * 2**20,
    max_pixels=89_478_485,
    min_side=1,
    resize_side=0,
    columns=None,
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, required=True)
    parser.add_argument(
        "--placeholders",
        type=float,
        default=0.0,
        help="fraction of rows with one and the same content",
    )
    parser.add_argument("--folder", type=Path, help="where to work; default: the temporary folder")
    parser.add_argument("--machine", default=f"{os.cpu_count()} CPU cores", help="for the heading")
    parser.add_argument("--out", type=Path, help="a Markdown file to add the table to")
    parser.add_argument("--plan", type=Path, help=argparse.SUPPRESS)  # the measured process
    given = parser.parse_args()
    if given.plan:
        print(_measure(given.plan))
        return 0
    with tempfile.TemporaryDirectory(prefix="planning-", dir=given.folder) as folder:
        write_catalog(Path(folder, "catalog"), given.rows, given.placeholders)
        again = [sys.executable, "-m", "benchmarks.planning", "--rows", str(given.rows)]
        found = subprocess.run(
            [*again, "--plan", folder], check=True, stdout=subprocess.PIPE, text=True
        )
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("pyarrow", "numpy"))
    text = (
        f"## {given.rows:,} rows\n\n{given.machine}, {platform.machine()}, Python "
        f"{platform.python_version()}, {versions}; {datetime.now(UTC):%Y-%m-%d}. "
        f"Command: `python -m benchmarks.planning --rows {given.rows} "
        f"--placeholders {given.placeholders}`\n\n{found.stdout}"
    )
    print(text)
    if given.out:
        with given.out.open("a") as file:
            file.write(f"\n{text}")
    return 0


def write_catalog(folder: Path, rows: int, placeholders: float) -> None:
    """Keys as people have them, log-normal sizes around 90 kB, 3 % copies of other objects.

    Args:
        placeholders: fraction of all rows that are copies of one object.
    """
    folder.mkdir()
    for first in range(0, rows, ROWS_PER_FILE):
        count = min(ROWS_PER_FILE, rows - first)
        numbers = np.arange(first, first + count)
        rng = np.random.default_rng(first)
        # A copy has the content of one of the first objects, wherever it is.
        is_copy = rng.random(count) < DUPLICATES
        content = np.where(is_copy, rng.integers(0, max(1, rows // 20), count), numbers)
        content[rng.random(count) < placeholders] = 0
        columns = [
            pa.array([SOURCE] * count),
            _text(
                "photos/2026/",
                _digits(numbers // 5000, 10, 6),
                "/",
                _digits(_mixed(numbers, 5), 16, 8),
                "-",
                _digits(numbers, 10, 10),
                ".jpg",
            ),
            pa.nulls(count, pa.string()),
            pa.nulls(count, pa.int64()),
            pa.array(_sizes(content)),
            _text(_digits(_mixed(content, 3), 16, 16), _digits(_mixed(content, 4), 16, 16)),
            pa.array(numbers * 10**6, pa.timestamp("us", tz="UTC")),
        ]
        path = folder / f"{first // ROWS_PER_FILE:05}.parquet"
        pq.write_table(
            pa.table(columns, schema=CATALOG),
            path,
            compression="zstd",
            use_dictionary=["root"],
            row_group_size=2**17,
        )


def _sizes(content: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]  # integers
    """Normal deviates out of two hashes of the content, so that copies have the size of it."""
    one, two = ((_mixed(content, salt) >> np.uint64(11)) / 2**53 for salt in (1, 2))
    normal = np.sqrt(-2 * np.log(1 - one)) * np.cos(2 * np.pi * two)
    return np.exp(11.1 + 0.8 * normal).astype(np.int64)


def _digits(numbers: np.ndarray, base: int, count: int) -> np.ndarray:  # type: ignore[type-arg]
    """The last so many digits of each number, as a matrix of ASCII."""
    places = [numbers // numbers.dtype.type(base**place) for place in reversed(range(count))]
    return _DIGITS[np.stack(places, axis=1) % numbers.dtype.type(base)]


def _text(*pieces: "str | np.ndarray") -> pa.Array:  # type: ignore[type-arg]  # ASCII
    """Strings of one length, out of matrices of ASCII and what is the same in all."""
    count = max(len(piece) for piece in pieces if not isinstance(piece, str))
    columns = [
        np.tile(np.frombuffer(piece.encode(), np.uint8), (count, 1))
        if isinstance(piece, str)
        else piece
        for piece in pieces
    ]
    text = np.concatenate(columns, axis=1)
    ends = np.arange(count + 1, dtype=np.int32) * np.int32(text.shape[1])
    return pa.StringArray.from_buffers(count, pa.py_buffer(ends), pa.py_buffer(text.tobytes()))


def _mixed(content: np.ndarray, salt: int) -> np.ndarray:  # type: ignore[type-arg]  # integers
    """splitmix64."""
    z = content.astype(np.uint64) * np.uint64(8) + np.uint64(salt)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _measure(folder: Path) -> str:
    files = tuple(sorted((folder / "catalog").iterdir()))
    listed = sum(pq.read_metadata(path).num_rows for path in files)
    catalog = Catalog(
        files=files, schema=CATALOG, listed=listed, bytes=0, list_requests=0, sources=(SOURCE,)
    )
    store = open_store(str(folder / "plan"))
    before, started = _cpu_s(), time.perf_counter()
    plan = make_plan(catalog, SETTINGS, store=store, scratch=folder)
    wall_s, cpu_s = time.perf_counter() - started, _cpu_s() - before
    saved = sum(path.stat().st_size for path in (folder / "plan" / FOLDER).rglob("*.parquet"))
    read_started = time.perf_counter()
    for number in range(0, plan.num_shards, max(1, plan.num_shards // 100)):
        plan.rows(store, number)
    read_s = (time.perf_counter() - read_started) / min(100, plan.num_shards)
    rows = [
        ("wall", f"{wall_s:.1f} s"),
        ("CPU", f"{cpu_s:.1f} CPU-s ({cpu_s / listed * 1e6:.2f} µs a row)"),
        ("rows/s", f"{listed / wall_s:,.0f}; {listed / cpu_s:,.0f} per CPU-s"),
        ("peak resident (getrusage)", f"{_peak_kib() / 2**20:.2f} GiB"),
        ("peak resident (VmHWM)", f"{_high_water_kib() / 2**20:.2f} GiB"),
        ("catalog on disk", f"{sum(path.stat().st_size for path in files) / 2**20:,.0f} MiB"),
        ("plan on disk", f"{saved / 2**20:,.0f} MiB, {len(plan.parts)} parts"),
        ("planned", f"{plan.planned:,} objects in {plan.num_shards:,} shards"),
        ("dropped", f"{plan.dropped:,}"),
        ("one shard's rows", f"{read_s * 1e3:.1f} ms"),
        ("plan id", plan.plan_id),
    ]
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows), ""])


def _cpu_s() -> float:
    used = [getrusage(who) for who in (RUSAGE_SELF, RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def _peak_kib() -> int:
    return max(getrusage(who).ru_maxrss for who in (RUSAGE_SELF, RUSAGE_CHILDREN))


def _high_water_kib() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


if __name__ == "__main__":
    sys.exit(main())
