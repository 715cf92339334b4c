"""What users get wrong: a line or two that say what, where and what to do; nothing half-written."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from demo.local_s3 import LocalS3
from shards.store import open_store
from tests.integration.conftest import Line
from tests.support.command import MOCO_SCALE, moco_scale, pretrain_arguments
from tests.support.faulty_proxy import Fault, FaultyProxy

pytestmark = [pytest.mark.s3, pytest.mark.usefixtures("s3"), pytest.mark.timeout(600)]


def complaint(*arguments: str, code: int, env: dict[str, str] | None = None) -> str:
    """What a failing command printed, after checking its form."""
    result = moco_scale(*arguments, env=env)
    said = result.stderr.strip()
    assert result.returncode == code, result.stdout + said
    assert "Traceback" not in said
    assert 1 <= len(said.splitlines()) <= 2, said
    return said


def names(url: str) -> Iterator[str]:
    for batch in open_store(url).list():
        yield from batch.column("path").to_pylist()


def test_no_such_bucket(line: Line) -> None:
    said = complaint("pack", "s3://no-such-bucket", f"{line.base}/none", code=1)

    assert "no-such-bucket" in said
    assert not [name for name in names(line.base) if name.startswith("none/")]


def test_wrong_credentials(line: Line) -> None:
    wrong = {"AWS_ACCESS_KEY_ID": "nobody", "AWS_SECRET_ACCESS_KEY": "nothing"}

    said = complaint("pack", line.bucket, f"{line.base}/denied", code=1, env=wrong)

    assert "credentials" in said.lower()
    assert not [name for name in names(line.base) if name.startswith("denied/")]


def test_empty_bucket(s3: LocalS3, line: Line) -> None:
    empty = s3.make_bucket("empty-bucket")

    said = complaint("pack", empty, f"{line.base}/empty", code=1)

    assert "empty-bucket" in said
    assert not [name for name in names(line.base) if name.startswith("empty/")]


def test_a_bucket_without_one_image(s3: LocalS3, line: Line) -> None:
    texts = s3.make_bucket("only-texts")
    for number in range(3):
        open_store(texts).put(f"{number}.jpg", f"<html>{number}</html>".encode())

    said = complaint("pack", texts, f"{line.base}/texts", code=1)

    assert "html_or_xml" in said
    assert not [name for name in names(line.base) if name.startswith("texts/")]


def test_an_unwritable_destination(line: Line, tmp_path: Path) -> None:
    in_the_way = tmp_path / "file"
    in_the_way.write_text("not a folder")

    said = complaint("pack", line.bucket, str(in_the_way / "set"), code=1)
    no_bucket = complaint("pack", line.bucket, "s3://missing-destination/set", code=1)

    assert str(in_the_way) in said
    assert "missing-destination" in no_bucket


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("pack", "a", "b", "--sed", "1"), "--seed"),
        (("pretrain", "--model.quue-size", "1"), "--model.queue-size"),
        (("pretrain", "--optim.epochs", "many"), "--optim.epochs"),
        (("pretrain", "--model.momentum", "2"), "momentum"),
        (("evaluate",), "RUN"),
        (("pak",), "pack"),
    ],
)
def test_a_misspelt_command_line(arguments: tuple[str, ...], expected: str) -> None:
    assert expected.lower() in complaint(*arguments, code=2).lower()


def test_a_misspelt_key_in_a_preset(tmp_path: Path) -> None:
    preset = tmp_path / "mine.toml"
    preset.write_text("[model]\nqueue_sise = 64\n")

    said = complaint("pretrain", "--preset", str(preset), code=1)

    assert "model.queue_sise" in said
    assert "model.queue_size" in said


def test_a_preset_that_does_not_exist() -> None:
    said = complaint("pretrain", "--preset", "moco_v9", code=2)

    assert "moco_v9" in said
    assert "smoke" in said


def test_a_destination_that_may_only_be_read() -> None:
    reader = {
        "name": "reader",
        "credentials": [{"accessKey": "reader", "secretKey": "reader-secret"}],
        "actions": ["Read", "List"],
    }
    with LocalS3(identities=[reader]) as server:
        raw, out = server.make_bucket("some-photos"), server.make_bucket("read-only")
        owner = {**server.environment}
        put = "from shards import open_store; open_store('s3://some-photos').put('a.jpg', b'a')"
        subprocess.run(
            [sys.executable, "-c", put], env={**os.environ, **owner}, check=True, timeout=60
        )
        keys = {"AWS_ACCESS_KEY_ID": "reader", "AWS_SECRET_ACCESS_KEY": "reader-secret"}

        said = complaint("pack", raw, f"{out}/set", code=1, env=owner | keys)

    assert "destination s3://read-only/set" in said
    assert "access denied" in said


def test_a_disk_that_is_full_loses_nothing(line: Line, tmp_path: Path) -> None:
    pack = [*MOCO_SCALE, "pack", line.bucket, str(tmp_path / "set"), "--workers", "1"]
    # No file may grow past 200 KiB: to the program that is a disk without room for a shard.
    limited = subprocess.run(
        ["bash", "-c", 'ulimit -f 200; exec "$@"', "pack", *pack],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip

    assert limited.returncode == 1, limited.stdout
    assert "Traceback" not in limited.stderr
    assert str(tmp_path / "set") in limited.stderr
    assert "too large" in limited.stderr
    assert not list((tmp_path / "set").rglob("*.tar"))
    again = moco_scale("pack", line.bucket, str(tmp_path / "set"), "--workers", "1")
    assert again.returncode == 0, again.stderr
    assert moco_scale("verify", str(tmp_path / "set")).returncode == 0


def test_a_clock_that_is_wrong(line: Line) -> None:
    skewed = Fault("status", status=403, code="RequestTimeTooSkewed")
    with FaultyProxy(os.environ["AWS_ENDPOINT_URL"], [skewed]) as proxy:
        env = {"AWS_ENDPOINT_URL": proxy.endpoint}

        said = complaint("pack", line.bucket, f"{line.base}/skewed", code=1, env=env)

    assert "clock is wrong" in said


def test_no_ray_cluster(line: Line) -> None:
    ray = ("--engine", "ray", "--ray-address", "127.0.0.1:1")

    said = complaint("pack", line.bucket, f"{line.base}/no-ray", *ray, code=1)

    assert "no Ray cluster at 127.0.0.1:1" in said


def test_a_file_that_cannot_be_written(line: Line) -> None:
    said = complaint("info", line.shard_set, "--contact-sheet", "/nowhere/sheet.jpg", code=1)

    assert "/nowhere/sheet.jpg" in said


def test_no_shard_set_at_the_address(line: Line) -> None:
    said = complaint(
        *pretrain_arguments(line.preset, f"{line.base}/nowhere", f"{line.base}/x"), code=1
    )

    assert "nowhere" in said
    assert "moco-scale pack" in said
    assert not [name for name in names(line.base) if name.startswith("x/")]


def test_a_checkpoint_of_another_architecture(line: Line) -> None:
    run = f"{line.base}/architecture"
    short = ("--run.max-steps", "1")
    first = moco_scale(*pretrain_arguments(line.preset, line.shard_set, run, *short))
    assert first.returncode == 0, first.stderr
    before = sorted(names(run))

    said = complaint(
        *pretrain_arguments(line.preset, line.shard_set, run, "--model.backbone", "resnet34"),
        code=1,
    )

    assert "resnet18" in said
    assert "resnet34" in said
    assert sorted(names(run)) == before


def test_fewer_images_than_one_batch(line: Line) -> None:
    said = complaint(
        *pretrain_arguments(
            line.preset,
            line.shard_set,
            f"{line.base}/toobig",
            "--data.global-batch-size",
            "128",
            "--model.queue-size",
            "128",
        ),
        code=1,
    )

    assert "128" in said
    assert "96" in said


def test_help_needs_no_credentials(tmp_path: Path) -> None:
    nothing = {"AWS_ACCESS_KEY_ID": "", "AWS_ENDPOINT_URL": "", "HOME": str(tmp_path)}

    shards = ("pack", "index", "info", "verify", "dedup", "takedown", "compact", "finalize")
    for command in (*shards, "pretrain", "evaluate", "report", "export", "import"):
        shown = moco_scale(command, "--help", env=nothing)
        assert shown.returncode == 0, shown.stderr
        assert "usage" in shown.stdout.lower()


def test_a_reader_that_goes_early_is_no_error(line: Line) -> None:
    reader, writer = os.pipe()
    os.close(reader)  # as `| head` does
    try:
        result = subprocess.run(
            [*MOCO_SCALE, "verify", line.shard_set, "--json"],
            stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60, check=False,
        )  # fmt: skip
    finally:
        os.close(writer)

    assert (result.returncode, result.stderr) == (1, "")
