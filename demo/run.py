"""`make demo`: a bucket of images becomes an encoder and a report, by the commands a user types."""

import argparse
import csv
import io
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

from demo.images import elpv, spoilers
from demo.local_s3 import LocalS3
from shards.errors import UserError
from shards.store import open_store


def main() -> int:
    parser = argparse.ArgumentParser(prog="make demo", description=__doc__)
    parser.add_argument("--images", default="", help="folder or URL; solar cells when empty")
    parser.add_argument("--to", default="runs/demo", help="where the report goes")
    parser.add_argument("--processes", type=int, default=1, help="training processes")
    given = parser.parse_args()
    out = Path(given.to)
    if out.exists():
        shutil.rmtree(out)  # a demo starts anew
    out.mkdir(parents=True)
    started = time.monotonic()
    try:
        with ExitStack() as stack:
            _run(stack, images=given.images, out=out, processes=given.processes)
    except UserError as err:
        print(f"demo: error: {err}", file=sys.stderr)
        return 1
    except subprocess.CalledProcessError as err:
        print(f"demo: this command failed with {err.returncode}: {shlex.join(err.cmd)}")
        return 1
    print(f"\nDone in {(time.monotonic() - started) / 60:.1f} min. Open the report in a browser:")
    print(f"  {(out / 'report.html').absolute()}")
    return 0


def _run(stack: ExitStack, *, images: str, out: Path, processes: int) -> None:
    environment = dict(os.environ)
    if images.startswith("s3://"):
        # One endpoint a process: with the images on your S3, shards and run stay in a folder.
        source, base, labels = images, str(out.absolute()), "folder"
    else:
        print("Starting a local S3 server (SeaweedFS) ...", flush=True)
        server = stack.enter_context(LocalS3())
        environment |= server.environment
        os.environ.update(server.environment)
        base = server.make_bucket("training")
        if images:
            source, labels = images, "folder"
        else:
            source = server.make_bucket("raw-images")
            labels = _fill_bucket(source, base)
    shard_set, run = f"{base}/shards", f"{base}/run"
    if processes > 1:
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        launch += ["--nproc-per-node", str(processes), "-m", "moco_scale"]
    else:
        launch = [sys.executable, "-m", "moco_scale"]
    one = [sys.executable, "-m", "moco_scale"]
    _call([*one, "pack", source, shard_set], environment)
    _call([*one, "info", shard_set], environment)
    _call(
        [*launch, "pretrain", "--preset", "smoke", "--data", shard_set, "--out", run], environment
    )
    try:
        _call([*one, "evaluate", run, "--labels", labels, "--seeds", "0"], environment)
    except subprocess.CalledProcessError:
        if not images:
            raise
        print("No evaluation: it needs images in folders named by their class.", flush=True)
    _call([*one, "report", run, "--out", str(out / "report.html")], environment)


def _fill_bucket(bucket: str, base: str) -> str:
    """Put real images and what spoils every bucket into it; return the URL of the labels."""
    found = elpv()
    paths = sorted(found.folder.iterdir())
    raw = open_store(bucket)
    for path in paths:
        raw.put(f"cells/{path.name}", path.read_bytes())
    for name, content in spoilers(paths[0].read_bytes(), good_name=paths[0].name).items():
        raw.put(name, content)
    print(f"{bucket}: {found.about}, and five spoilt objects", flush=True)
    labels = {raw.uri(f"cells/{name}"): label for name, label in found.labels.items()}
    return _put_labels(base, labels)


def _put_labels(base: str, labels: Mapping[str, str]) -> str:
    written = io.StringIO()
    rows = csv.writer(written)
    rows.writerow(["uri", "label"])
    rows.writerows(sorted(labels.items()))
    open_store(base).put("labels.csv", written.getvalue().encode())
    return f"{base}/labels.csv"


def _call(command: list[str], environment: Mapping[str, str]) -> None:
    shown = shlex.join(command).replace(f"{sys.executable} -m moco_scale", "moco-scale")
    print(f"\n$ {shown.replace(sys.executable, 'python')}", flush=True)
    started = time.monotonic()
    subprocess.run(command, env=environment, check=True)
    print(f"({time.monotonic() - started:.0f} s)", flush=True)


if __name__ == "__main__":
    sys.exit(main())
