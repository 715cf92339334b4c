"""Planted bottlenecks: the profiler names each, and what it advises gains what it says."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch import Tensor, nn

from demo.local_s3 import LocalS3
from moco_scale.cli import main
from moco_scale.config import TrainConfig, load_config
from moco_scale.distributed import one_rank
from moco_scale.profiler import ProfileConfig, profile
from moco_scale.profiles import (
    AUGMENT,
    CHECK,
    DECODE,
    HAND_OVER,
    STEP,
    STORE,
    TRANSFER,
    Profile,
    read_profile,
)
from pipelines.view_maker import ToDevice
from shards import PackConfig, pack
from tests.support.command import moco_scale
from tests.support.faulty_proxy import Fault, FaultyProxy
from tests.support.images import encode, picture

BATCH = 16
SECONDS, REPEATS = 0.2, 3
RUNS = 10


class Tiny(nn.Module):
    """An encoder that takes no time, or as long as it is told to."""

    def __init__(self, sleep_s: float = 0.0) -> None:
        super().__init__()
        self._sleep_s = sleep_s
        self.pool = nn.AdaptiveAvgPool2d(4)
        self.fc = nn.Linear(3 * 4 * 4, 32)

    def forward(self, views: Tensor) -> Tensor:
        time.sleep(self._sleep_s / 2)  # two encoders a step
        embedded: Tensor = self.fc(self.pool(views).flatten(1))
        return embedded


@dataclass(frozen=True, kw_only=True)
class Plant:
    """What is made slow, and what is to be said of it."""

    bound_by: str
    flags: tuple[str, ...] = ()
    faults: tuple[Fault, ...] = ()
    """Of the store; none: from local disk."""
    images: str = "small"
    step_s: float = 0.0
    to_device: ToDevice | None = None
    flag: str = ""
    """That is to be advised."""
    view_size: int = 32


def slow_copy(bytes_per_s: float) -> ToDevice:
    def copy(view: Tensor) -> Tensor:
        time.sleep(view.nbytes / bytes_per_s)
        return view

    return copy


TARS = r"\.tar"
PLANTS = {
    "store of 1 MB/s": Plant(
        bound_by=STORE,
        flags=("--data.block_samples", "4"),
        faults=(Fault("slow", method="GET", path=TARS, bytes_per_s=1e6),),
    ),
    "store 50 ms away": Plant(
        bound_by=STORE,
        flags=("--data.block_samples", "4", "--data.read_threads", "2"),
        faults=(Fault("slow", method="GET", path=TARS, delay_s=0.05),),
        flag="data.read_threads",
    ),
    "decode without threads": Plant(
        bound_by=DECODE, images="large", flags=("--data.num_threads", "1"), flag="data.num_threads"
    ),
    "slow augmentation": Plant(bound_by=AUGMENT, view_size=224),
    "slow copy to the device": Plant(
        bound_by=TRANSFER,
        to_device=slow_copy(2e6),
        flags=("--data.view_size", "64"),
        flag="data.view_dtype",
    ),
    "slow step": Plant(bound_by=STEP, step_s=0.1),
}


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Shard sets on disk: small images, and large ones of which decoding takes longest."""
    found = {}
    for name, count, size in (("small", 400, (90, 80)), ("large", 40, (1600, 1200))):
        folder = tmp_path_factory.mktemp(name)
        bucket = folder / "bucket"
        bucket.mkdir()
        for number in range(count):
            image = picture(number, size=size)
            if name == "large":  # noise is what makes decoding dear
                noise = np.random.default_rng(number).integers(-40, 40, (*size[::-1], 1))
                pixels = (np.asarray(image).astype(int) + noise).clip(0, 255)
                image = Image.fromarray(pixels.astype(np.uint8))
            (bucket / f"{number:04}.jpg").write_bytes(encode(image, "JPEG", quality=90))
        pack(str(bucket), str(folder / "set"), PackConfig(workers=1, max_shard_samples=100))
        found[name] = str(folder / "set")
    return found


@contextmanager
def planted(
    plant: Plant, sets: dict[str, str], s3: LocalS3, monkeypatch: pytest.MonkeyPatch, bucket: str
) -> Iterator[str]:
    """The shard set's address, its store as the plant wants it."""
    if not plant.faults:
        yield sets[plant.images]
        return
    s3.make_bucket(bucket)
    _copy(Path(sets[plant.images]), f"s3://{bucket}/set")
    with FaultyProxy(s3.endpoint, plant.faults) as proxy, monkeypatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        yield f"s3://{bucket}/set"


def _copy(folder: Path, url: str) -> None:
    from shards.store import open_store

    store = open_store(url)
    for path in folder.rglob("*"):
        if path.is_file():
            store.put(str(path.relative_to(folder)), path.read_bytes())


def settings(plant: Plant, url: str) -> TrainConfig:
    return load_config(
        [
            "--data", url, "--out", "unused", "--run.device", "cpu",
            "--data.global_batch_size", str(BATCH), "--data.view_size", str(plant.view_size),
            "--model.dim", "32", "--model.queue_size", "64", "--model.bn_sub_batch", "8",
            "--model.shuffle_domain", str(BATCH),
            *plant.flags,
        ]
    )  # fmt: skip


def profiled(plant: Plant, url: str, *, apply: bool = False) -> Profile:
    began = time.perf_counter()

    def say(line: str) -> None:
        print(f"{time.perf_counter() - began:5.1f} s  {line}")

    return profile(
        settings(plant, url),
        ProfileConfig(seconds=SECONDS, repeats=REPEATS, apply=apply),
        ranks=one_rank(),
        say=say,
        command="pytest",
        encoder=lambda: Tiny(plant.step_s),
        to_device=plant.to_device,
    )


@pytest.mark.s3
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", ["store of 1 MB/s", "slow step"])  # all: the slow test below
def test_a_planted_bottleneck_is_found_by_name(
    name: str, sets: dict[str, str], s3: LocalS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant = PLANTS[name]

    with planted(plant, sets, s3, monkeypatch, f"once-{list(PLANTS).index(name)}") as url:
        found = profiled(plant, url)

    assert found.verdict is not None
    assert found.verdict.bound_by == plant.bound_by, found.verdict


@pytest.mark.slow
@pytest.mark.s3
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", PLANTS)
def test_it_is_found_in_ten_of_ten_runs(
    name: str,
    sets: dict[str, str],
    s3: LocalS3,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    plant = PLANTS[name]

    with planted(plant, sets, s3, monkeypatch, f"ten-{list(PLANTS).index(name)}") as url:
        found = [profiled(plant, url).verdict for _ in range(RUNS)]

    named = [one.bound_by for one in found if one is not None]
    agreeing = [f"{one.agreeing}/{one.repeats}" for one in found if one is not None]
    with capsys.disabled():
        print(f"\n{name}: {named.count(plant.bound_by)} of {RUNS}; repeats {', '.join(agreeing)}")
    assert named == [plant.bound_by] * RUNS


@pytest.mark.slow
@pytest.mark.s3
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", [name for name, plant in PLANTS.items() if plant.flag])
def test_what_is_advised_gains_what_was_predicted(
    name: str,
    sets: dict[str, str],
    s3: LocalS3,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    plant = PLANTS[name]

    with planted(plant, sets, s3, monkeypatch, f"apply-{list(PLANTS).index(name)}") as url:
        found = profiled(plant, url, apply=True).verdict

    assert found is not None
    (applied,) = [one for one in found.advice if one.measured_samples_per_s is not None]
    assert applied.samples_per_s is not None
    assert applied.measured_samples_per_s is not None
    gained = applied.measured_samples_per_s / found.samples_per_s - 1
    with capsys.disabled():
        print(
            f"\n{name}: --{applied.flag} {applied.now} -> {applied.then}: predicted "
            f"{applied.gain_frac:+.0%}, gained {gained:+.0%} ({found.samples_per_s:,.0f} -> "
            f"{applied.measured_samples_per_s:,.0f} samples/s, predicted "
            f"{applied.samples_per_s:,.0f})"
        )
    assert applied.flag == plant.flag
    assert applied.gain_frac is not None
    assert gained == pytest.approx(applied.gain_frac, rel=0.25)


def command(*arguments: str) -> list[str]:
    return [
        "profile", "--preset", "smoke", "--run.device", "cpu",
        "--data.global_batch_size", "16", "--data.view_size", "32",
        "--model.shuffle_domain", "16", "--model.bn_sub_batch", "8", "--model.queue_size", "64",
        "--seconds", "0.1", "--repeats", "2", *arguments,
    ]  # fmt: skip


@pytest.mark.timeout(300)
def test_the_command_prints_a_verdict_and_leaves_a_profile_and_a_page(
    sets: dict[str, str], tmp_path: Path
) -> None:
    done = moco_scale(*command("--data", sets["small"], "--to", str(tmp_path / "found")))

    assert done.returncode == 0, done.stderr
    assert "bounds it at" in done.stdout
    assert "no GPU here" in done.stdout
    assert sorted(one.name for one in (tmp_path / "found").iterdir()) == [
        "profile.html",
        "profile.json",
    ]
    saved = read_profile(tmp_path / "found" / "profile.json")
    assert {one.stage for one in saved.alone} == {STORE, CHECK, HAND_OVER, DECODE, AUGMENT, STEP}
    assert [one.upto for one in saved.joined] == [STORE, CHECK, HAND_OVER, DECODE, AUGMENT, STEP]
    assert len(saved.runs) == 2
    assert not Path("not-written").exists()

    shown = moco_scale(
        "profile", "--show", str(tmp_path / "found" / "profile.json"),
        "--html", str(tmp_path / "page.html"),
    )  # fmt: skip
    assert shown.returncode == 0, shown.stderr
    assert "bounds it at" in shown.stdout
    assert "</html>" in (tmp_path / "page.html").read_text()

    rates = moco_scale(
        "forecast", "--rates", str(tmp_path / "found" / "profile.json"),
        "--images", "1e6", "--gpus", "8", "--global-batch-size", "256", "--epochs", "1",
    )  # fmt: skip
    assert rates.returncode == 0, rates.stderr
    assert "runs out first" in rates.stdout


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--data", "{empty}"], "run 'moco-scale index'"),
        (["--data", "{small}", "--data.mode", "synthetic"], "reads nothing that could be profiled"),
        (["--data", "{small}", "--seconds", "0"], "seconds must be above 0"),
        (["--data", "{small}", "--to", "{file}"], "cannot be written to"),
        (["--compare", "{file}", "{file}"], "cannot be read as JSON"),
        (["--compare", "{empty}/a.json", "{file}"], "no profile at"),
        (["--show", "{file}"], "cannot be read as JSON"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str],
    said: str,
    sets: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "000000.tar").touch()
    (tmp_path / "file").write_text("not JSON")
    places = {"empty": tmp_path / "empty", "file": tmp_path / "file", "small": sets["small"]}
    given = [one.format(**places) for one in arguments]
    reads = {"--compare", "--show"} & set(given)
    whole = ["profile", *given] if reads else command("--to", str(tmp_path), *given)

    code = main(whole)

    assert code in (1, 2)
    (error,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert said in error
    assert not (tmp_path / "profile.json").exists()


@pytest.mark.s3
@pytest.mark.timeout(300)
def test_a_store_that_dies_leaves_one_line_and_no_profile(
    sets: dict[str, str], s3: LocalS3, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    dies = Fault("status", method="GET", path=TARS, skip=200, status=503)
    with planted(Plant(bound_by="", faults=(dies,)), sets, s3, monkeypatch, "dies") as url:
        done = moco_scale(
            *command("--data", url, "--to", str(tmp_path), "--data.wait_timeout_s", "5")
        )

    assert done.returncode == 1
    (error,) = [line for line in done.stderr.splitlines() if "profile: error:" in line]
    assert "503" in error
    assert not (tmp_path / "profile.json").exists()
