"""Packing through the command line, on a real S3 server: kill what you like, same bytes."""

import contextlib
import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from demo.images import spoilers
from demo.local_s3 import LocalS3
from shards import ShardSet
from shards.store import open_store
from tests.integration.conftest import photo
from tests.support.command import MOCO_SCALE, moco_scale
from tests.support.faulty_proxy import Fault, FaultyProxy
from tests.support.ray_cluster import ray_cluster
from tests.support.s3_environment import only_s3

pytestmark = [pytest.mark.s3, pytest.mark.timeout(900)]

NUM_IMAGES = 240
SETTINGS = ("--max-shard-samples", "6", "--seed", "5")
LONGEST_RUN_S = 240


@dataclass(frozen=True)
class Raw:
    """A bucket, and the shard set that packing it without any interruption gives."""

    server: LocalS3
    bucket: str
    out: str
    expected: dict[str, bytes]
    seconds: float


@pytest.fixture(scope="module")
def raw() -> Iterator[Raw]:
    with LocalS3() as server, pytest.MonkeyPatch.context() as patch:
        only_s3(patch, server.environment)
        bucket, out = server.make_bucket("raw-photos"), server.make_bucket("packed")
        store = open_store(bucket)
        photos = {f"{n % 7}/photo {n:03}.jpg": photo(seed=n) for n in range(NUM_IMAGES)}
        photos |= spoilers(photos["0/photo 000.jpg"], good_name="photo.jpg")
        for name, content in photos.items():
            store.put(name, content)
        started = time.monotonic()
        done = moco_scale("pack", bucket, f"{out}/whole", *SETTINGS, "--workers", "1")
        assert done.returncode == 0, done.stderr
        seconds = time.monotonic() - started
        yield Raw(server, bucket, out, contents(f"{out}/whole"), seconds)


def contents(url: str) -> dict[str, bytes]:
    """Everything below a URL."""
    store = open_store(url)
    paths = [path for page in store.list() for path in page.column("path").to_pylist()]
    return {path: bytes(store.read(path)) for path in sorted(paths)}


def test_two_workers_write_the_bytes_that_one_writes(raw: Raw) -> None:
    done = moco_scale("pack", raw.bucket, f"{raw.out}/two", *SETTINGS, "--workers", "2")

    assert done.returncode == 0, done.stderr
    assert len(raw.expected) > 3 * NUM_IMAGES / 6
    assert contents(f"{raw.out}/two") == raw.expected


def test_a_packing_that_is_killed_now_and_then_writes_the_same_bytes(raw: Raw) -> None:
    kill_and_resume(raw, name="killed", kills=4)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_a_packing_that_is_killed_twenty_times_writes_the_same_bytes(raw: Raw) -> None:
    kill_and_resume(raw, name="killed-often", kills=20)


def kill_and_resume(raw: Raw, *, name: str, kills: int) -> None:
    """Kill the packer, a worker or the server at random moments; compare every set that is done."""
    seed = random.randrange(2**32)
    chance = random.Random(seed)
    said = f"seed {seed}"
    sets = killed = 0
    victims = ["packer", "worker", "server"]
    while killed < kills or not sets:
        url = f"{raw.out}/{name}-{sets}"
        command = [*MOCO_SCALE, "pack", raw.bucket, url, *SETTINGS, "--workers", "2"]
        with subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        ) as packer:
            if killed < kills:
                wait_for_start(packer, url)
                time.sleep(chance.uniform(0, 1.5))
                if packer.poll() is None:
                    kill(victims[killed % 3], packer, raw.server, chance)
                    killed += 1
            assert packer.stderr is not None
            error = packer.communicate(timeout=LONGEST_RUN_S)[1]
        assert "Traceback" not in error, f"{said}: {error}"
        if packer.returncode == 0:
            assert contents(url) == raw.expected, said
            sets += 1
    print(f"{said}: {killed} kills, {sets} sets, each byte for byte the uninterrupted one")


def wait_for_start(packer: subprocess.Popen[str], url: str) -> None:
    """Until something was committed here, or the packer has ended."""
    store = open_store(url)
    deadline = time.monotonic() + LONGEST_RUN_S
    while packer.poll() is None and not any(len(page) for page in store.list("_commit")):
        assert time.monotonic() < deadline, "nothing was committed in time"
        time.sleep(0.02)


def kill(
    victim: str, packer: subprocess.Popen[str], server: LocalS3, chance: random.Random
) -> None:
    if victim == "server":
        server.kill()
        time.sleep(0.5)
        server.restart()
    elif victim == "worker" and (workers := descendants(packer.pid)):
        with contextlib.suppress(ProcessLookupError):  # it has just ended by itself
            os.kill(chance.choice(workers), signal.SIGKILL)
    else:
        packer.kill()


def descendants(pid: int) -> list[int]:
    """Workers, the server they are forked from, their decoders; not Python's resource tracker.

    (That one, killed, prints tracebacks of the standard library's.)
    """
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        commands = {int(n): Path(f"/proc/{n}/cmdline").read_bytes() for n in children}
    except FileNotFoundError:
        return []
    ours = [child for child, command in commands.items() if b"resource_tracker" not in command]
    return [one for child in ours for one in (child, *descendants(child))]


def test_a_ray_cluster_that_loses_a_node_writes_the_same_bytes(raw: Raw) -> None:
    url = f"{raw.out}/ray"
    with ray_cluster(nodes=3) as cluster:
        command = [*MOCO_SCALE, "pack", raw.bucket, url, *SETTINGS, "--engine", "ray"]
        with subprocess.Popen(
            [*command, "--ray-address", cluster.address],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        ) as packer:
            wait_for_start(packer, url)
            is_running = packer.poll() is None
            cluster.remove_node(cluster.worker_nodes.copy().pop(), allow_graceful=False)
            error = packer.communicate(timeout=LONGEST_RUN_S)[1]

    assert is_running, "the node must be lost while there is work"
    assert packer.returncode == 0, error
    assert contents(url) == raw.expected


@pytest.mark.parametrize(
    "fault",
    [
        Fault("status", times=1, per_path=True),
        pytest.param(Fault("status", times=1, per_path=True, status=500), marks=pytest.mark.slow),
        Fault("reset", r"\.jpg", times=1, per_path=True),
        Fault("truncate", r"\.jpg", times=1, per_path=True),
        Fault("whole", r"plan/", method="GET", times=1, per_path=True),
        Fault("shift", r"plan/", method="GET", times=1, per_path=True),
        Fault("drip", r"photo 00\d\.jpg", times=1, per_path=True, drip_s=0.0001),
    ],
    ids=lambda fault: f"{fault.kind}-{fault.status}",
)
def test_what_passes_by_itself_changes_no_byte(
    raw: Raw, fault: Fault, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    url = f"{raw.out}/{request.node.callspec.id}"
    with FaultyProxy(raw.server.endpoint, [fault]) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        done = moco_scale("pack", raw.bucket, url, *SETTINGS, "--workers", "1")
        struck = proxy.struck(fault)
        monkeypatch.setenv("AWS_ENDPOINT_URL", raw.server.endpoint)

    assert done.returncode == 0, done.stderr
    assert struck
    assert contents(url) == raw.expected


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (Fault("shift", r"plan/.*part", method="GET"), "plan/g0000/part"),
        (Fault("status", r"photo 11\d", status=403), None),
        (Fault("etag", r"photo 11\d"), None),
    ],
    ids=["wrong ranges", "some are forbidden", "some have changed"],
)
def test_what_does_not_pass_is_an_error_or_a_rejection_with_its_reason(
    raw: Raw,
    fault: Fault,
    said: str | None,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    url = f"{raw.out}/{request.node.callspec.id.replace(' ', '-')}"
    with FaultyProxy(raw.server.endpoint, [fault]) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        done = moco_scale("pack", raw.bucket, url, *SETTINGS, "--workers", "1")
        monkeypatch.setenv("AWS_ENDPOINT_URL", raw.server.endpoint)

    if said is not None:
        assert done.returncode == 1
        assert said in done.stderr
        assert "Traceback" not in done.stderr
        assert "manifest.parquet" not in contents(url)
        return
    assert done.returncode == 0, done.stderr
    rejections = ShardSet.open(url).rejections().to_pylist()
    reasons = {row["uri"].rpartition("/")[2]: row["reason"] for row in rejections}
    reason = "forbidden" if fault.kind == "status" else "changed"
    assert {name for name, why in reasons.items() if why == reason} == {
        f"photo 11{n}.jpg" for n in range(10)
    }
