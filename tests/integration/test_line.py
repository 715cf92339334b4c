"""The whole line through the command line: a bucket of images to a trained, evaluated encoder."""

import os
import random
import signal
import socket
import subprocess
import tarfile
from collections import defaultdict
from pathlib import Path

import pytest
import webdataset

from moco_scale.metrics import read_ledger, read_metrics
from shards import ShardSet, open_store
from tests.integration.conftest import NUM_IMAGES, Line
from tests.support.command import (
    MOCO_SCALE,
    moco_scale,
    on_one_core,
    pretrain_arguments,
    torchrun,
)

pytestmark = [pytest.mark.s3, pytest.mark.usefixtures("s3"), pytest.mark.timeout(600)]

STEPS = 3 * NUM_IMAGES // 16


def test_every_listed_object_is_packed_or_rejected_with_its_reason(line: Line) -> None:
    shard_set = ShardSet.open(line.shard_set)

    rejected = {
        row["uri"].rpartition("/")[2]: row["reason"] for row in shard_set.rejections().to_pylist()
    }

    assert f"listed {NUM_IMAGES + 5} = packed {NUM_IMAGES} + rejected 5" in line.pack_output
    assert shard_set.num_samples == NUM_IMAGES
    duplicate = rejected.pop("copy-of-photo.jpg", None) or rejected.pop("photo 000.jpg")
    assert duplicate == "duplicate"
    assert rejected == {
        "truncated.jpg": "truncated",
        "error-page.jpg": "html_or_xml",
        "empty.png": "empty",
        "bomb.png": "bomb",
    }


# webdataset leaves the tars it has read open, for the garbage collector to close.
@pytest.mark.filterwarnings("ignore:.*unclosed file:ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_tar_and_webdataset_read_the_shards(line: Line, tmp_path: Path) -> None:
    shard_set = ShardSet.open(line.shard_set)
    copies = []
    for name in shard_set.names:
        copies.append(tmp_path / Path(name).name)
        copies[-1].write_bytes(bytes(shard_set.store.read(name)))

    listed = []
    for copy in copies:
        listed += subprocess.run(
            ["tar", "tf", copy], capture_output=True, text=True, check=True, timeout=30
        ).stdout.split()
    samples = list(
        webdataset.WebDataset([str(copy) for copy in copies], shardshuffle=False, empty_check=False)
    )

    assert len(copies) > 1
    assert len(listed) == len(set(listed)) == NUM_IMAGES
    assert len({sample["__key__"] for sample in samples}) == NUM_IMAGES
    with tarfile.open(copies[0]) as tar:
        first = tar.extractfile(tar.getmembers()[0])
        assert first is not None
        assert samples[0]["jpg"] == first.read()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_webdataset_streams_the_shards_straight_from_s3(line: Line) -> None:
    import s3fs  # the other door to the same bucket, by its own settings

    shard_set = ShardSet.open(line.shard_set)
    files = s3fs.S3FileSystem()
    keys = []
    for name in shard_set.names:
        uri = shard_set.store.uri(name)
        with files.open(uri, "rb") as stream:
            keys += [
                sample["fname"] for sample in webdataset.tariterators.tar_file_iterator(stream)
            ]

    assert len(set(keys)) == NUM_IMAGES


def test_a_run_killed_at_a_random_step_consumes_what_an_uninterrupted_one_does(line: Line) -> None:
    straight, killed = f"{line.base}/straight", f"{line.base}/killed"
    whole = moco_scale(
        *pretrain_arguments(line.preset, line.shard_set, straight), before=on_one_core()
    )
    assert whole.returncode == 0, whole.stderr

    arguments = pretrain_arguments(line.preset, line.shard_set, killed)
    command = [*on_one_core(), *MOCO_SCALE, *arguments]
    stop_at = random.randrange(5, 10)
    # The run waits until its lines are read, but for some six of them: so it is killed before its
    # end however late that is.
    ours, theirs = socket.socketpair()
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    with ours, ours.makefile() as lines, subprocess.Popen(command, stdout=theirs) as process:
        theirs.close()
        for printed in lines:
            if not printed.startswith("step") or int(printed.split()[1]) < stop_at:
                continue
            if is_any_whole(killed):  # at step 9 at the latest: the second waits for the first
                process.send_signal(signal.SIGKILL)
                break
    assert process.returncode == -signal.SIGKILL
    assert len(read_ledger(killed)) < STEPS
    again = moco_scale(*arguments, before=on_one_core())

    assert again.returncode == 0, again.stderr
    assert "resum" in again.stdout.lower()
    assert len(read_ledger(straight)) == STEPS
    assert read_ledger(killed) == read_ledger(straight), f"killed at step {stop_at}"


def is_any_whole(run: str) -> bool:
    """Whether there is a checkpoint to go on from."""
    names = [name for page in open_store(run).list() for name in page.column("path").to_pylist()]
    return any(name.endswith(".pt.sha256") for name in names)


def test_two_ranks_consume_disjoint_halves_of_what_one_rank_consumes(line: Line) -> None:
    one, two = f"{line.base}/one-rank", f"{line.base}/two-ranks"
    arguments = ("--optim.epochs", "1")
    alone = moco_scale(
        *pretrain_arguments(line.preset, line.shard_set, one, *arguments), before=on_one_core()
    )
    assert alone.returncode == 0, alone.stderr
    paired = torchrun(2, *pretrain_arguments(line.preset, line.shard_set, two, *arguments))
    assert paired.returncode == 0, paired.stderr

    by_rank = defaultdict(dict)
    for rank in (0, 1):
        store = open_store(f"{two}/ledger/rank-{rank:05}")
        for batch in store.list():
            for path in batch.column("path").to_pylist():
                import json

                for row in map(json.loads, bytes(store.read(path)).splitlines()):
                    by_rank[rank][row["step"]] = row["sample_ids"]

    assert by_rank[0].keys() == by_rank[1].keys() == read_ledger(one).keys()
    for step, ids in read_ledger(one).items():
        assert not set(by_rank[0][step]) & set(by_rank[1][step])
        assert by_rank[0][step] + by_rank[1][step] == list(ids)
    assert read_metrics(two)[-1].world_size == 2


def test_evaluation_and_report_of_a_run(line: Line, tmp_path: Path) -> None:
    run = f"{line.base}/reported"
    trained = moco_scale(
        *pretrain_arguments(line.preset, line.shard_set, run, "--optim.epochs", "1"),
        before=on_one_core(),
    )
    assert trained.returncode == 0, trained.stderr

    scored = moco_scale("evaluate", run, "--labels", "folder", "--k", "5")
    page = moco_scale("report", run, "--out", str(tmp_path / "report.html"))

    assert scored.returncode == 0, scored.stderr
    assert page.returncode == 0, page.stderr
    for row in ("pixels", "random", "trained", "majority"):
        assert row in scored.stdout
    html = (tmp_path / "report.html").read_text()
    for shown in ("html_or_xml", "bomb", "truncated", "trained minus it", "resnet18", "<svg"):
        assert shown in html
    assert "http://" not in html.replace("http://www.w3.org", "").replace(
        os.environ["AWS_ENDPOINT_URL"], ""
    ).replace("http://purl.org", "").replace("http://creativecommons.org", "")
