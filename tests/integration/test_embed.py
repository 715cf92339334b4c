"""`moco-scale embed` as users run it: killed and started again, on two ranks, read by other tools.

    KILLS_SEED=123 python -m pytest -m slow -s tests/integration/test_embed.py

draws again the moments of the test that printed this seed.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from random import Random

import duckdb
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from demo.local_s3 import LocalS3
from moco_scale.embedding import feature_tables, features_path, read_embedding
from shards.store import open_store
from tests.support.command import MOCO_SCALE, moco_scale
from tests.support.digests import digests
from tests.support.embeddings import POOLED, make_embedding, save_run
from tests.support.shard_sets import flip_a_byte, make_shard_set, overwrite, stored

pytestmark = pytest.mark.timeout(240)

COUNT, SHARD_SAMPLES = 96, 4
BAD = 17
ONE_CORE = ("taskset", "-c", str(max(os.sched_getaffinity(0))))
SETTINGS = ("--batch-size", "3", "--device", "cpu", "--num-threads", "1")


def on_one_core(*command: str) -> subprocess.CompletedProcess[str]:
    """With one thread, so: the bits of a sum depend on how many there are."""
    return subprocess.run(
        [*ONE_CORE, *command], capture_output=True, text=True, timeout=400, check=False
    )


class Place:
    """A set with one bad sample, a run, and the features of it made at once."""

    def __init__(self, folder: Path) -> None:
        made = make_shard_set(folder, count=COUNT, shard_samples=SHARD_SAMPLES)
        overwrite(made, BAD, flip_a_byte(stored(made, BAD)))
        self.shard_set, self.run = made.url, str(folder / "run")
        self.folder = folder
        self.shards = len(made.names)
        save_run(self.run, seed=1)
        done = on_one_core(*MOCO_SCALE, *self.arguments("once"))
        assert done.returncode == 0, done.stderr
        self.printed = done.stdout

    def arguments(self, to: str) -> list[str]:
        to = str(self.folder / to)
        return ["embed", self.shard_set, "--encoder", self.run, "--to", to, *SETTINGS]

    def files(self, to: str) -> dict[str, str]:
        """Digests of the Parquet files of a target, and its manifest."""
        folder = self.folder / to
        return digests(folder, [*folder.glob("*/*.parquet"), folder / "manifest.json"])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("embed"))


def test_it_says_what_it_makes_and_accounts_for_every_sample(place: Place) -> None:
    said = place.printed

    assert "encoder: shufflenet_v2_x0_5 after step 7" in said
    assert "features: pooled, 1024 x float32, unit length" in said
    assert f"samples {COUNT} = rows {COUNT - 1} + not decodable 1" in said
    for line in said.splitlines():
        assert len(line) <= 80 or str(place.folder) in line, line
    (listed,) = pq.read_table(
        place.folder / f"once/quarantine/{BAD // SHARD_SAMPLES:06}.parquet"
    ).to_pylist()
    assert listed["sample_id"] == BAD
    assert "checksum" in listed["reason"]


def test_two_ranks_make_what_one_makes_and_the_last_of_them_the_report(place: Place) -> None:
    two = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = on_one_core(
        *two, "-m", "moco_scale", *place.arguments("two"), "--report", "--clusters", "4"
    )

    assert done.returncode == 0, done.stderr
    assert "shared by 2 x cpu" in done.stdout
    assert done.stdout.count("not decodable 1") == 1
    page = place.folder / "two/clusters.html"
    assert str(page) in done.stdout
    assert f"{COUNT - 1}</b><span>images looked at" in page.read_text()
    assert place.files("two") == place.files("once")


def test_duckdb_reads_it(place: Place) -> None:
    files = str(place.folder / "once/features/*.parquet")
    connection = duckdb.connect()

    count, shards, least, most = connection.sql(
        f"SELECT count(*), count(DISTINCT shard), min(len(features)), max(len(features)) "
        f"FROM '{files}'"
    ).fetchall()[0]
    nearest = connection.sql(
        f"SELECT b.sample_id FROM '{files}' a, '{files}' b WHERE a.sample_id = 3 ORDER BY "
        f"array_inner_product(a.features::FLOAT[{POOLED}], b.features::FLOAT[{POOLED}]) DESC"
    ).fetchall()

    assert (count, shards, least, most) == (COUNT - 1, place.shards, POOLED, POOLED)
    assert nearest[0] == (3,)


def test_pandas_reads_it(place: Place) -> None:
    frame = pd.read_parquet(place.folder / "once/features")

    assert list(frame.columns) == ["sample_id", "uri", "shard", "position", "features"]
    assert sorted(frame["sample_id"]) == [i for i in range(COUNT) if i != BAD]
    matrix = np.stack(frame["features"].to_list())
    assert matrix.shape == (COUNT - 1, POOLED)
    np.testing.assert_allclose(np.linalg.norm(matrix, axis=1), 1, rtol=1e-5)


_FAISS = """
import json, sys
import faiss, numpy as np, pyarrow.parquet as pq

table = pq.read_table(sys.argv[1]).combine_chunks()
column = table.column("features").chunk(0)
matrix = column.flatten().to_numpy().reshape(len(table), -1)  # no copy
index = faiss.IndexFlatIP(matrix.shape[1])
index.add(matrix)
found, rows = index.search(matrix[:5], 2)
ids = table.column("sample_id").to_numpy()
print(json.dumps([ids[:5].tolist(), ids[rows[:, 0]].tolist(), found[:, 0].tolist()]))
"""
"""In a process of its own: faiss brings another OpenMP than torch."""


def test_faiss_reads_it(place: Place) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _FAISS, str(place.folder / "once/features")],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )

    assert done.returncode == 0, done.stderr
    asked, found, cosines = json.loads(done.stdout)
    assert found == asked
    assert cosines == pytest.approx([1] * 5, abs=1e-5)


def test_a_wrong_command_says_so_in_a_line(place: Place, tmp_path: Path) -> None:
    foreign = tmp_path / "official.pth.tar"
    foreign.write_bytes(b"no checkpoint")
    to = tmp_path / "to"

    failed = moco_scale("embed", place.shard_set, "--encoder", str(foreign), "--to", str(to))

    assert failed.returncode == 1
    assert f"{foreign} is no finished checkpoint of a run" in failed.stderr
    assert "Traceback" not in failed.stderr
    assert len(failed.stderr.strip().splitlines()) == 1, failed.stderr
    assert not to.exists()


@pytest.mark.s3
def test_from_and_to_a_bucket(s3: LocalS3, place: Place, tmp_path: Path) -> None:
    bucket = s3.make_bucket("embed-test")
    small = make_shard_set(tmp_path, count=10, shard_samples=6)
    for local, name in ((small.url, "set"), (place.run, "run")):
        for path in Path(local).rglob("*.*"):
            open_store(f"{bucket}/{name}").put(str(path.relative_to(local)), path.read_bytes())
    to = f"{bucket}/to"

    whole = make_embedding(f"{bucket}/set", f"{bucket}/run", to)

    assert whole is not None
    assert whole == read_embedding(to)
    make_embedding(small.url, place.run, tmp_path / "to")
    for shard, table in enumerate(feature_tables(open_store(to), whole)):
        ours, theirs = table, pq.read_table(tmp_path / "to" / features_path(shard))
        assert ours == theirs


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_killed_at_ten_random_moments_it_ends_with_the_same_files(tmp_path: Path) -> None:
    seed = int(os.environ.get("KILLS_SEED", time.time_ns() % 2**32))
    print(f"\nKILLS_SEED={seed}")
    draw = Random(seed)
    made = make_shard_set(tmp_path, count=400, shard_samples=4)
    run, to = str(tmp_path / "run"), tmp_path / "to"
    save_run(run, seed=1)
    command = [*MOCO_SCALE, "embed", made.url, "--run", run, *SETTINGS]
    began = time.monotonic()
    once = on_one_core(*command, "--to", str(tmp_path / "once"))
    once_s = time.monotonic() - began
    assert once.returncode == 0, once.stderr

    def num_files() -> int:
        return len(list(to.glob("features/*.parquet")))

    moments = ["start"] * 4 + ["work"] * 6
    draw.shuffle(moments)
    after = []
    for moment in moments:
        before = num_files()
        process = subprocess.Popen(
            [*ONE_CORE, *command, "--to", str(to)], stdout=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 120
        while moment == "work" and num_files() == before:
            assert time.monotonic() < deadline, "no new file for two minutes"
            assert process.poll() is None, "it ended by itself"
            time.sleep(0.002)  # between two looks
        time.sleep(draw.uniform(0, once_s / 2 if moment == "start" else once_s / 50))
        process.kill()
        assert process.wait(60) == -signal.SIGKILL, "it ended before the kill"
        after.append(num_files())
    print(f"files after each kill: {after} of {len(made.names)}")
    done = on_one_core(*command, "--to", str(to))

    assert done.returncode == 0, done.stderr
    assert len(set(after)) > 5
    names = sorted(str(p.relative_to(to)) for p in to.rglob("*.parquet"))
    assert names == sorted(features_path(shard) for shard in range(len(made.names)))
    for name in [*names, "manifest.json"]:
        assert (to / name).read_bytes() == (tmp_path / "once" / name).read_bytes(), name
