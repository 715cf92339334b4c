"""Three roles under the policies of deploy/policies: each does its work, and nothing else.

SeaweedFS evaluates the policies as they are, once the names in them are filled in.
"""

import contextlib
import json
import os
import re
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import boto3
import pytest

from demo.local_s3 import LocalS3
from moco_scale.metrics import read_ledger
from shards.errors import AccessError
from shards.store import Store, open_store
from tests.integration.conftest import photo
from tests.support.command import (
    MOCO_SCALE,
    TINY,
    moco_scale,
    on_one_core,
    pretrain_arguments,
)
from tests.support.faulty_proxy import Fault, FaultyProxy, Request
from tests.support.s3_environment import only_s3

pytestmark = [pytest.mark.s3, pytest.mark.timeout(600)]

POLICIES = Path(__file__).parents[2] / "deploy/policies"
NAMES = {
    "RAW_BUCKET": "raw-photos",
    "SET_BUCKET": "training",
    "SET_PREFIX": "shards/photos",
    "RUN_BUCKET": "training",
    "RUN_PREFIX": "runs/first",
}
RAW, SET, RUN = "s3://raw-photos", "s3://training/shards/photos", "s3://training/runs/first"
ROLES = ("packer", "trainer", "reader")
NUM_IMAGES = 48
PATIENCE_S = 180.0


def policy(role: str) -> str:
    """A role's policy with the names of this test in it."""
    text = (POLICIES / f"{role}.json").read_text()
    for name, value in NAMES.items():
        text = text.replace(name, value)
    return text


@dataclass(frozen=True)
class Place:
    """A server that knows the three roles, and a proxy before it that sees what they ask for."""

    server: LocalS3
    proxy: FaultyProxy

    def env(self, role: str) -> dict[str, str]:
        return {
            "AWS_ACCESS_KEY_ID": role,
            "AWS_SECRET_ACCESS_KEY": f"{role}-secret",
            "AWS_ENDPOINT_URL": self.proxy.endpoint,
        }

    def run(self, role: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        return moco_scale(*arguments, before=on_one_core(), env=self.env(role))


@contextlib.contextmanager
def place() -> Iterator[Place]:
    """With the administrator's keys in the environment, and both buckets."""
    identities = [
        {
            "name": role,
            "credentials": [{"accessKey": role, "secretKey": f"{role}-secret"}],
            "policyNames": [role],
        }
        for role in ROLES
    ]
    policies = {role: policy(role) for role in ROLES}
    with (
        LocalS3(identities=identities, policies=policies) as server,
        pytest.MonkeyPatch.context() as patch,
        FaultyProxy(server.endpoint) as proxy,
    ):
        only_s3(patch, server.environment)
        for bucket in (NAMES["RAW_BUCKET"], NAMES["SET_BUCKET"]):
            server.make_bucket(bucket)
        yield Place(server, proxy)


def everything() -> dict[str, bytes]:
    """All objects of both buckets, as the administrator reads them."""
    found = {}
    for bucket in (RAW, "s3://training"):
        store = open_store(bucket)
        for page in store.list():
            for path in page.column("path").to_pylist():
                found[store.uri(path)] = bytes(store.read(path))
    return found


# What is granted is what is used.


def granted(role: str) -> set[tuple[str, str]]:
    """(action, place) of a role's policy."""
    found = set()
    for statement in json.loads(policy(role))["Statement"]:
        actions, resources = statement["Action"], statement["Resource"]
        for resource in [resources] if isinstance(resources, str) else resources:
            where = resource.removeprefix("arn:aws:s3:::")
            if "Condition" in statement:
                where += "/" + statement["Condition"]["StringLike"]["s3:prefix"]
            for action in [actions] if isinstance(actions, str) else actions:
                found.add((action, place_of(where)))
    return found


def used(requests: Sequence[Request]) -> set[tuple[str, str]]:
    """(action, place) that requests take on AWS."""
    found = set()
    for request in requests:
        path, _, query = request.path.partition("?")
        bucket, _, key = path.lstrip("/").partition("/")
        if request.method == "POST":
            assert query == "delete", "multipart would take rights of its own"
            named = re.findall(rb"<Key>(.+?)</Key>", request.posted)
            found |= {("s3:DeleteObject", place_of(f"{bucket}/{one.decode()}")) for one in named}
            continue
        if not key:
            assert request.method in ("GET", "HEAD"), request
            prefix = parse_qs(query).get("prefix", [""])[0]
            found.add(("s3:ListBucket", place_of(f"{bucket}/{prefix}")))
            continue
        action = {"PUT": "s3:PutObject", "GET": "s3:GetObject", "HEAD": "s3:GetObject"}
        found.add((action[request.method], place_of(f"{bucket}/{key}")))
    return found


def place_of(where: str) -> str:
    for url, name in ((RAW, "raw"), (SET, "set"), (RUN, "run")):
        if f"s3://{where}/".startswith(f"{url}/"):
            return name
    return where


# What is forbidden.


@pytest.fixture(scope="module")
def filled() -> Iterator[Place]:
    """An object in each place."""
    with place() as found:
        open_store(RAW).put("photo.jpg", photo(seed=1))
        for url in (SET, RUN):
            open_store(url).put("object", b"content")
        open_store("s3://training").put("elsewhere", b"secret")
        yield found


def list_all(store: Store) -> list[Any]:
    return list(store.list())


def put_new(store: Store) -> object:
    return store.put("new", b"new")


def put_once(store: Store) -> object:
    return store.put("new", b"new", create_only=True)


def overwrite(store: Store) -> object:
    return store.put("object", b"other")


def delete(store: Store) -> object:
    return store.delete(["object"])


def read(store: Store) -> object:
    return store.read("object")


def read_photo(store: Store) -> object:
    return store.read_ranges("photo.jpg", [0], [5])


def head_photo(store: Store) -> object:
    return store.head("photo.jpg")


def delete_photo(store: Store) -> object:
    return store.delete(["photo.jpg"])


def overwrite_photo(store: Store) -> object:
    return store.put("photo.jpg", b"other")


def copy(store: Store) -> object:
    return store.copy("object", "copied")


def read_elsewhere(store: Store) -> object:
    return store.read("elsewhere")


FORBIDDEN: list[tuple[str, Callable[[Store], object], str, str]] = [
    ("packer", put_new, RAW, "s3:PutObject"),
    ("packer", overwrite_photo, RAW, "s3:PutObject"),
    ("packer", delete_photo, RAW, "s3:DeleteObject"),
    ("packer", list_all, RUN, "s3:ListBucket"),
    ("packer", read, RUN, "s3:GetObject"),
    ("packer", put_once, RUN, "s3:PutObject"),
    ("packer", read_elsewhere, "s3://training", "s3:GetObject"),
    ("trainer", list_all, RAW, "s3:ListBucket"),
    ("trainer", read_photo, RAW, "s3:GetObject"),
    ("trainer", head_photo, RAW, "s3:GetObject"),
    ("trainer", put_new, RAW, "s3:PutObject"),
    ("trainer", list_all, SET, "s3:ListBucket"),
    ("trainer", put_new, SET, "s3:PutObject"),
    ("trainer", overwrite, SET, "s3:PutObject"),
    ("trainer", delete, SET, "s3:DeleteObject"),
    ("trainer", copy, SET, "s3:PutObject"),
    ("trainer", list_all, "s3://training", "s3:ListBucket"),
    ("trainer", put_new, "s3://training/runs/second", "s3:PutObject"),
    ("reader", read_photo, RAW, "s3:GetObject"),
    ("reader", list_all, RAW, "s3:ListBucket"),
    ("reader", put_new, SET, "s3:PutObject"),
    ("reader", put_once, RUN, "s3:PutObject"),
    ("reader", overwrite, RUN, "s3:PutObject"),
    ("reader", delete, RUN, "s3:DeleteObject"),
    ("reader", list_all, "s3://training/shards", "s3:ListBucket"),
]


@pytest.mark.parametrize(
    ("role", "action", "url", "right"),
    FORBIDDEN,
    ids=[f"{role}-{action.__name__}-{url[5:]}" for role, action, url, _ in FORBIDDEN],
)
def test_a_role_is_refused_what_is_not_its_work_and_told_the_right(
    filled: Place,
    monkeypatch: pytest.MonkeyPatch,
    role: str,
    action: Callable[[Store], object],
    url: str,
    right: str,
) -> None:
    before = everything()
    with monkeypatch.context() as patch:
        for name, value in filled.env(role).items():
            patch.setenv(name, value)
        with pytest.raises(AccessError) as refused:
            action(open_store(url))

    said = str(refused.value)
    assert said.startswith(url)
    assert "access denied" in said
    assert right in said
    assert "\n" not in said
    assert everything() == before


def test_nobody_in_particular_is_allowed_nothing(filled: Place) -> None:
    before = everything()

    for url in (RAW, f"{RAW}/photo.jpg", f"{SET}/object", f"{RUN}/object", "s3://training"):
        address = url.replace("s3://", f"{filled.server.endpoint}/")
        for method in ("GET", "HEAD", "PUT", "DELETE"):
            with pytest.raises(urllib.error.HTTPError, match="403") as refused:
                urllib.request.urlopen(
                    urllib.request.Request(address, method=method), timeout=PATIENCE_S
                )
            refused.value.close()
    assert everything() == before


@pytest.mark.parametrize("action", ["create_bucket", "put_bucket_policy", "delete_bucket"])
@pytest.mark.parametrize("role", ROLES)
def test_no_role_may_touch_a_bucket_itself(filled: Place, role: str, action: str) -> None:
    client = boto3.client(
        "s3",
        endpoint_url=filled.server.endpoint,
        aws_access_key_id=role,
        aws_secret_access_key=f"{role}-secret",
    )
    more = {"Policy": policy("packer")} if action == "put_bucket_policy" else {}
    bucket = "another" if action == "create_bucket" else "training"

    with pytest.raises(client.exceptions.ClientError, match="AccessDenied"):
        getattr(client, action)(Bucket=bucket, **more)


def test_a_command_under_the_wrong_role_says_what_it_lacks_in_one_line(filled: Place) -> None:
    lists = filled.run("trainer", "pack", RAW, f"{RUN}/packed")
    writes = filled.run("packer", "pack", RAW, "s3://training/shards/others")

    for done, where, right in (
        (lists, RAW, "s3:ListBucket"),
        (writes, "s3://training/shards/others", "s3:ListBucket"),
    ):
        print(done.stderr)
        assert done.returncode == 1
        (line,) = done.stderr.strip().splitlines()
        assert line.startswith("moco-scale pack: error: ")
        assert f"{where}: access denied" in line
        assert right in line


@pytest.mark.usefixtures("filled")
def test_unfinished_uploads_end_by_the_lifecycle_rule() -> None:
    rules = json.loads((POLICIES / "lifecycle.json").read_text())
    client = boto3.client("s3")  # checks the rules against Amazon's model of the call

    client.put_bucket_lifecycle_configuration(Bucket="training", LifecycleConfiguration=rules)

    (kept,) = client.get_bucket_lifecycle_configuration(Bucket="training")["Rules"]
    assert kept["Status"] == "Enabled"
    assert kept["AbortIncompleteMultipartUpload"] == {"DaysAfterInitiation": 2}


# The work of each.


@dataclass(frozen=True)
class Worked:
    """What each role asked for while it did its work, and what it printed."""

    place: Place
    requests: dict[str, list[Request]]
    printed: dict[str, str]


@pytest.fixture(scope="module")
def worked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worked]:
    folder = tmp_path_factory.mktemp("roles")
    preset = folder / "tiny.toml"
    preset.write_text(TINY + "keep_checkpoints = 1\n")
    with place() as found:
        raw = open_store(RAW)
        for number in range(NUM_IMAGES):
            raw.put(f"class{number % 2}/{number:03}.jpg", photo(seed=number))
        work = Worked(found, {}, {})
        training = [*pretrain_arguments(preset, SET, RUN)]
        for role, do in (
            ("packer", lambda: pack(work)),
            ("trainer", lambda: train(work, training)),
            ("reader", lambda: read_all(work, folder)),
        ):
            found.proxy.requests.clear()
            do()
            work.requests[role] = list(found.proxy.requests)
        yield work


def pack(work: Worked) -> None:
    command = ["pack", RAW, SET, "--max-shard-samples", "8", "--workers", "1"]
    held = Fault("status", r"/shards/00000[2-9].*\.tar", method="PUT")
    kill_held(work, "packer", command, held, until=f"{SET}/_commit/000001.json")

    done = work.place.run("packer", *command)
    work.printed["packer"] += done.stdout + done.stderr
    assert done.returncode == 0, done.stderr


def train(work: Worked, command: list[str]) -> None:
    held = Fault("status", r"checkpoints/step-000000008\.pt", method="PUT")
    whole = f"{RUN}/checkpoints/step-000000004.pt.sha256"
    kill_held(work, "trainer", command, held, until=whole)

    done = work.place.run("trainer", *command)
    work.printed["trainer"] += done.stdout + done.stderr
    assert done.returncode == 0, done.stderr
    for more in (["evaluate", RUN, "--labels", "folder", "--k", "5"], ["report", RUN]):
        done = work.place.run("trainer", *more)
        work.printed[f"trainer {more[0]}"] = done.stdout + done.stderr
        assert done.returncode == 0, done.stderr


def read_all(work: Worked, folder: Path) -> None:
    for command in (
        ["verify", SET, "--level", "decode"],
        ["info", SET],
        ["evaluate", RUN, "--labels", "folder", "--k", "5", "--out", str(folder / "scores")],
        ["embed", SET, "--run", RUN, "--to", str(folder / "features")],
    ):
        done = work.place.run("reader", *command)
        work.printed[f"reader {command[0]}"] = done.stdout + done.stderr
        assert done.returncode == 0, done.stderr


def kill_held(work: Worked, role: str, command: Sequence[str], held: Fault, *, until: str) -> None:
    """Start a command, hold it up at a request, and kill it once an object is there."""
    work.place.proxy.faults = [held]
    folder, _, name = until.rpartition("/")
    store = open_store(folder)
    env = {**os.environ, **work.place.env(role)}
    with subprocess.Popen(
        [*on_one_core(), *MOCO_SCALE, *command],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env,
    ) as process:  # fmt: skip
        try:
            deadline = time.monotonic() + PATIENCE_S
            while not (
                work.place.proxy.struck(held)
                and any(name in page.column("path").to_pylist() for page in store.list())
            ):
                assert process.poll() is None, process.communicate()
                assert time.monotonic() < deadline, "waited in vain"
                time.sleep(0.02)  # between two looks
        finally:
            process.kill()
            work.printed[role] = process.communicate()[0]
    work.place.proxy.faults = []


@pytest.mark.slow
@pytest.mark.parametrize("role", ROLES)
def test_a_role_uses_every_right_that_its_policy_gives_and_no_other(
    worked: Worked, role: str
) -> None:
    print(worked.printed)

    assert used(worked.requests[role]) == granted(role)


@pytest.mark.slow
def test_the_packer_and_the_trainer_went_on_where_they_were_killed(worked: Worked) -> None:
    puts = [one.path for one in worked.requests["packer"] if one.method == "PUT"]
    for shard in ("000000", "000001"):
        assert len([path for path in puts if f"/shards/photos/shards/{shard}-" in path]) == 1
    assert f"packed {NUM_IMAGES} + rejected 0" in worked.printed["packer"]
    assert "resuming after step 4" in worked.printed["trainer"]
    assert sorted(read_ledger(RUN)) == list(range(1, 3 * NUM_IMAGES // 16 + 1))


@pytest.mark.slow
def test_training_under_the_readers_policy_names_the_right_that_it_lacks(
    worked: Worked, tmp_path: Path
) -> None:
    preset = tmp_path / "tiny.toml"
    preset.write_text(TINY.replace("epochs = 3", "epochs = 4"))

    done = worked.place.run("reader", *pretrain_arguments(preset, SET, RUN))

    print(done.stderr)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1] == (
        f"moco-scale pretrain: error: {RUN}/config.json: access denied; check the credentials, "
        "and that their policy allows s3:PutObject"
    )
