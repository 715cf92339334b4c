"""No credentials in anything that is written, printed, or shown by ps."""

import gzip
import os
import subprocess
import threading
import time
import urllib.parse
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from demo.local_s3 import LocalS3
from shards import PackConfig, ShardSet, pack
from shards.errors import AccessError, StoreError
from shards.store import open_store
from tests.integration.conftest import photo
from tests.integration.test_kills import descendants
from tests.support.command import (
    MOCO_SCALE,
    TINY,
    moco_scale,
    on_one_core,
    pretrain_arguments,
)
from tests.support.faulty_proxy import Fault, FaultyProxy
from tests.support.s3_environment import only_s3

pytestmark = [pytest.mark.s3, pytest.mark.timeout(600)]

NUM_IMAGES = 48
NOWHERE = "http://127.0.0.1:1"
"""Behind a proxy that answers everything itself."""
PATIENCE_S = 180.0


class Keys:
    """An identity whose names are found nowhere by chance."""

    def __init__(self) -> None:
        self.access = f"AKIA{uuid.uuid4().hex[:16].upper()}"
        self.secret = f"s{uuid.uuid4().hex}/+{uuid.uuid4().hex[:8]}"

    @property
    def identity(self) -> dict[str, object]:
        return {
            "name": f"user-of-{uuid.uuid4().hex[:6]}",
            "credentials": [{"accessKey": self.access, "secretKey": self.secret}],
            "actions": ["Admin", "Read", "Write", "List"],
        }

    @property
    def env(self) -> dict[str, str]:
        return {"AWS_ACCESS_KEY_ID": self.access, "AWS_SECRET_ACCESS_KEY": self.secret}

    def file(self) -> str:
        """As ~/.aws/credentials has it."""
        return (
            f"[default]\naws_access_key_id = {self.access}\naws_secret_access_key = {self.secret}\n"
        )

    def needles(self) -> list[bytes]:
        quoted = urllib.parse.quote(self.secret, safe="")
        return [one.encode() for one in (self.access, self.secret, quoted)]


@pytest.fixture(scope="module")
def server() -> Iterator[LocalS3]:
    """With a raw bucket; the administrator's keys are in no environment."""
    with LocalS3(identities=[OLD.identity, NEW.identity]) as found:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in found.environment.items():
                patch.setenv(name, value)
            raw = open_store(found.make_bucket("raw-photos"))
            found.make_bucket("training")
            for number in range(NUM_IMAGES):
                raw.put(f"class{number % 2}/{number:03}.jpg", photo(seed=number))
        yield found


OLD, NEW = Keys(), Keys()


@pytest.fixture(autouse=True)
def _nothing_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    only_s3(monkeypatch, {"AWS_REGION": "us-east-1"})


@pytest.fixture
def credentials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A credentials file that boto3 reads, with the old keys."""
    path = tmp_path / "credentials"
    path.write_text(OLD.file())
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(path))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    return path


@pytest.fixture
def preset(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(TINY)
    return path


# What is written.


def leaves(value: object) -> Iterator[str]:
    """Every name and value inside a nested one, as text."""
    if isinstance(value, Mapping):
        for name, one in value.items():
            yield from leaves(name)
            yield from leaves(one)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from leaves(one)
    elif not isinstance(value, torch.Tensor):
        yield str(value)


def forms(path: Path) -> Iterator[bytes]:
    """A file's bytes, and what is in them."""
    data = path.read_bytes()
    yield data
    if path.name.endswith(".gz"):
        yield gzip.decompress(data)
    elif path.name.endswith(".parquet"):
        table = pq.read_table(path)
        yield "\n".join(leaves(table.to_pylist())).encode()
        metadata = table.schema.metadata or {}
        yield b"\n".join([*metadata, *metadata.values()])
    elif path.name.endswith(".pt"):
        yield "\n".join(leaves(torch.load(path, weights_only=True, map_location="cpu"))).encode()


def files_with(keys: Keys, folder: Path) -> list[str]:
    """Files below a folder in which any of the keys is."""
    return [
        str(path.relative_to(folder))
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and any(needle in form for form in forms(path) for needle in keys.needles())
    ]


def watched(
    *command: str, env: Mapping[str, str] | None = None
) -> tuple[subprocess.CompletedProcess[str], dict[str, set[bytes]]]:
    """A command, and all that /proc has shown of it and its children: cmdline, environ."""
    seen: dict[str, set[bytes]] = {"cmdline": set(), "environ": set()}
    with subprocess.Popen(
        [*on_one_core(), *MOCO_SCALE, *command],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, **(env or {})},
    ) as process:  # fmt: skip
        ended = threading.Event()

        def look() -> None:
            while not ended.wait(0.05):  # between two looks
                for pid in [process.pid, *descendants(process.pid)]:
                    for name, found in seen.items():
                        try:
                            found.update(Path(f"/proc/{pid}/{name}").read_bytes().split(b"\0"))
                        except OSError:
                            continue  # it has ended meanwhile

        looking = threading.Thread(target=look)
        looking.start()
        try:
            out, err = process.communicate(timeout=300)
        finally:
            process.kill()
            ended.set()
            looking.join()
    return subprocess.CompletedProcess(command, process.returncode, out, err), seen


def download(server: LocalS3, bucket: str, folder: Path) -> None:
    """All objects of a bucket as files."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        store = open_store(f"s3://{bucket}")
        for page in store.list():
            for path in page.column("path").to_pylist():
                target = folder / path
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(store.read(path))


@pytest.mark.slow
@pytest.mark.usefixtures("credentials")
@pytest.mark.parametrize("handed_over", ["environment", "file"])
def test_no_key_is_in_anything_that_a_line_of_commands_leaves(
    server: LocalS3,
    preset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    handed_over: str,
) -> None:
    env = {}
    if handed_over == "environment":
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
        env = OLD.env
    shard_set, run = (f"s3://training/{handed_over}/{name}" for name in ("shards", "run"))
    local = tmp_path / "local"
    local.mkdir()
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.endpoint)
    monkeypatch.setenv("TMPDIR", str(local))
    more = ("--run.profile-steps", "4:7", "--run.torch-profile-ranks", "0")
    more += ("--run.tensorboard", str(local / "board"))

    for number, command in enumerate(
        [
            ["pack", "s3://raw-photos", shard_set, "--max-shard-samples", "8", "--workers", "2"],
            ["verify", shard_set],
            [*pretrain_arguments(preset, shard_set, run, *more)],
            ["evaluate", run, "--labels", "folder", "--k", "5"],
            ["embed", shard_set, "--run", run, "--to", f"{run}/embedded", "--report"],
            ["report", run, "--out", str(local / "report.html")],
            ["export", run, "--format", "torchvision", "--to", f"{run}/exported"],
        ]
    ):
        done, seen = watched(*command, env=env)
        assert done.returncode == 0, done.stderr
        (local / f"{number}-{command[0]}.txt").write_text(done.stdout + done.stderr)
        for needle in OLD.needles():
            assert not [one for one in seen["cmdline"] if needle in one]
            names = {one.partition(b"=")[0].decode() for one in seen["environ"] if needle in one}
            assert names <= set(env), "only where the user put it"
        assert seen["cmdline"]
        assert any(one.startswith(b"AWS_REGION=") for one in seen["environ"])
    download(server, "training", local / "bucket")

    kinds = {path.suffix for path in local.rglob("*") if path.is_file()}
    assert {".pt", ".parquet", ".jsonl", ".json", ".html", ".gz", ".tar", ".txt"} <= kinds
    assert not files_with(OLD, local)


# What is printed when something fails.


@pytest.mark.parametrize("status", [403, 503])
def test_no_key_is_in_what_a_failing_store_makes_a_command_say(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, status: int
) -> None:
    for name, value in OLD.env.items():
        monkeypatch.setenv(name, value)

    with FaultyProxy(NOWHERE, [Fault("status", status=status)]) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        with pytest.raises(StoreError, match="s3://training/nothing") as failed:
            ShardSet.open("s3://training/nothing", deadline_s=1)

    said = str(failed.value) + caplog.text
    print(said)
    assert ("503 Service Unavailable" if status == 503 else "access denied") in said
    assert not [one for one in OLD.needles() if one in said.encode()]
    assert "Signature" not in said


def test_the_signature_of_a_request_is_not_in_its_error(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    signature = uuid.uuid4().hex
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    # Of all that the project can read, this one alone is signed in its address.
    monkeypatch.setenv("AZURE_STORAGE_SAS_TOKEN", f"sv=2022-11-02&sp=rl&sig={signature}")
    monkeypatch.setenv("AZURE_STORAGE_ENDPOINT", "https://127.0.0.1:1")

    with pytest.raises(StoreError) as failed:
        open_store("az://container/folder", deadline_s=0.5).read("object")

    print(failed.value)
    assert "Error performing GET" in str(failed.value), "there was an address to print"
    assert signature not in str(failed.value)
    assert caplog.records, "it was tried again"
    assert signature not in caplog.text


@pytest.mark.parametrize(
    "url",
    [
        "ftp://user:{secret}@127.0.0.1/photos",
        "zip://photos::sftp://user:{secret}@127.0.0.1:1/photos.zip",
        "https://user:{secret}@127.0.0.1:1/photos",
        "https://127.0.0.1:1/a.jpg?X-Amz-Credential=AKIA&X-Amz-Signature={secret}",
        "https://127.0.0.1:1/c/a.jpg?sv=2022&sig={secret}",
    ],
)
def test_an_address_with_a_secret_in_it_is_refused_and_not_repeated(
    url: str, tmp_path: Path
) -> None:
    secret = uuid.uuid4().hex
    listed = tmp_path / "list.csv"
    listed.write_text(f"uri\n{url.format(secret=secret)}\n")

    with pytest.raises(StoreError, match=r"would be written down") as refused:
        open_store(url.format(secret=secret))
    with pytest.raises(StoreError, match=r"would be written down") as listing:
        pack(str(listed), str(tmp_path / "set"), PackConfig(workers=1))

    print(refused.value)
    assert secret not in str(refused.value)
    assert secret not in str(listing.value)
    assert not [one for one in (tmp_path / "set").rglob("*") if one.is_file()]


# Credentials that change in mid-run.


def signed_by(proxy: FaultyProxy) -> list[str]:
    """The access key of each request."""
    return [
        request.headers["authorization"].partition("Credential=")[2].partition("/")[0]
        for request in proxy.requests
    ]


@pytest.mark.slow
def test_keys_that_are_written_into_the_file_anew_are_used_at_once(
    server: LocalS3, credentials: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FaultyProxy(server.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        store = open_store("s3://training/renewed")
        store.put("object", b"1")
        assert set(signed_by(proxy)) == {OLD.access}

        for broken in ("[default]\naws_access_key_id = only\n", "no such format"):
            credentials.write_text(broken)
            time.sleep(0.2)  # obstore asks for keys ten times a second
            store.read("object")
            assert set(signed_by(proxy)) == {OLD.access}
        credentials.write_text(NEW.file())
        time.sleep(0.2)
        proxy.requests.clear()
        store.read("object")
        store.put("object", b"2")
        open_store("s3://training").head("renewed/object")

        assert set(signed_by(proxy)) == {NEW.access}


@pytest.mark.slow
def test_a_run_goes_on_when_its_keys_are_replaced_in_the_file(
    server: LocalS3, credentials: Path, preset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.endpoint)
    packed = moco_scale("pack", "s3://raw-photos", "s3://training/rotated/shards")
    assert packed.returncode == 0, packed.stderr
    arguments = pretrain_arguments(
        preset, "s3://training/rotated/shards", "s3://training/rotated/run"
    )
    held = Fault("status", r"step-000000004\.pt", method="PUT", status=503)

    with FaultyProxy(server.endpoint, [held]) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        with subprocess.Popen(
            [*on_one_core(), *MOCO_SCALE, *arguments],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        ) as process:  # fmt: skip
            try:
                deadline = time.monotonic() + PATIENCE_S
                while not proxy.struck(held):
                    assert process.poll() is None
                    assert time.monotonic() < deadline
                    time.sleep(0.02)  # between two looks
                credentials.write_text(NEW.file())
                proxy.faults = []
                out, err = process.communicate(timeout=PATIENCE_S)
            finally:
                process.kill()

    print(out, err)
    assert process.returncode == 0, err
    keys = signed_by(proxy)
    assert keys[0] == OLD.access
    assert set(keys[-5:]) == {NEW.access}
    assert keys == sorted(keys, key=[OLD.access, NEW.access].index), "never back to the old ones"


@pytest.mark.usefixtures("credentials")
def test_keys_that_have_expired_are_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with FaultyProxy(NOWHERE, [Fault("status", status=400, code="ExpiredToken")]) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        with pytest.raises(AccessError) as failed:
            open_store("s3://training/run").put("object", b"")

    said = str(failed.value)
    print(said)
    assert said.startswith("s3://training/run/object: access denied; the credentials have expired")
    assert "4 attempts" in said, "renewed ones may be there a moment later"
    assert "\n" not in said


def test_keys_that_nobody_knows_are_not_called_a_missing_right(
    s3_server: LocalS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    stranger = Keys()
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server.endpoint)
    for name, value in stranger.env.items():
        monkeypatch.setenv(name, value)

    with pytest.raises(AccessError, match="does not accept these credentials") as failed:
        open_store("s3://training/run").put("object", b"")

    print(failed.value)
    assert "s3:PutObject" not in str(failed.value)
    assert stranger.access not in str(failed.value)
