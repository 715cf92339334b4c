"""Packing a bucket, side by side with img2dataset and a webdataset loop: CPU-seconds and wall.

All read the same photos from one S3 server on this machine and write tars to it. What counts is
the CPU time of the client with all its descendants, the server apart; runs are interleaved, their
medians compared. `python -m benchmarks.packing`; figures go to standard output and, with --out,
into a Markdown file. Linux only.
"""

import argparse
import contextlib
import ctypes
import dataclasses
import datetime
import functools
import hashlib
import io
import multiprocessing
import os
import platform
import random
import resource
import signal
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
import venv
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from unittest import mock

import xxhash
from PIL import Image

from benchmarks.photos import photo_originals
from demo.images import CACHE
from demo.local_s3 import LocalS3
from shards.pack import PackConfig, pack
from shards.store import Store, open_store
from shards.tar import padded_bytes

PIXELS, QUALITY = 200_000, 94
SHARDS, WORKERS = 4, 2
FEW = 16  # images of the small bucket that shows what a run costs before its first image
IMG2DATASET, IMG2DATASET_THREADS = "img2dataset==1.47.0", 64
RUN_LIMIT_S = 1200
TARGETS = (("a", "c", 5), ("a", "d", 8), ("b", "e", 4), ("a", "f", None))
"""Ours, whose, at least how many times its images per CPU-second."""

SHARD_WRITER_LOOP = """
import os, sys
import s3fs, webdataset
source, destination, shard_images = sys.argv[1], sys.argv[2], int(sys.argv[3])
files = s3fs.S3FileSystem()
def upload(tar):
    files.put_file(tar, destination + "/" + os.path.basename(tar))
    os.remove(tar)
with webdataset.ShardWriter("%06d.tar", maxcount=shard_images, post=upload, verbose=0) as writer:
    for number, path in enumerate(files.find(source)):
        writer.write({"__key__": f"{number:09}", "jpg": files.cat_file(path)})
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Bucket:
    """The images, as each contender wants to be told of them."""

    url: str
    url_list: Path
    """Their HTTP addresses, a line each."""
    md5: tuple[str, ...]
    """Of each image, sorted."""
    shard_bytes: int
    shard_images: int

    @property
    def images(self) -> int:
        return len(self.md5)


@dataclass(frozen=True, kw_only=True, slots=True)
class Contender:
    """One way to pack."""

    name: str
    keeps_bytes: bool
    command: Callable[[Bucket, str], list[str]]
    """The command line that packs a bucket to a URL."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Used:
    """What a command and all its descendants took."""

    cpu_s: float
    wall_s: float


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=3000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", default="abcdef", help="rows to run, as in 'ac'")
    parser.add_argument("--out", type=Path, help="a Markdown file for the result")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the server is stopped then too
    photos = _photos(given.images)
    contenders = {key: found for key, found in _contenders().items() if key in given.only}
    with LocalS3() as server, tempfile.TemporaryDirectory(prefix="moco-bench-") as scratch:
        os.environ.update(server.environment)
        os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # img2dataset's import would ask the network
        text = "\n".join(_report(server, photos, contenders, Path(scratch), given.repeats))
    print(text)
    if given.out:
        given.out.write_text(text + "\n")
    return 0


def _contenders() -> dict[str, Contender]:
    def ours(*flags: str) -> Callable[[Bucket, str], list[str]]:
        return lambda bucket, to: [
            *(sys.executable, "-m", "moco_scale", "pack", bucket.url, to),
            *("--workers", str(WORKERS), "--shard-bytes", str(bucket.shard_bytes), *flags),
        ]

    def img2dataset(*flags: str) -> Callable[[Bucket, str], list[str]]:
        return lambda bucket, to: [
            *(str(_img2dataset()), f"--url_list={bucket.url_list}", f"--output_folder={to}"),
            *("--output_format=webdataset", f"--processes_count={WORKERS}"),
            *(f"--thread_count={IMG2DATASET_THREADS}", *flags),
            f"--number_sample_per_shard={bucket.shard_images}",
        ]

    def loop(bucket: Bucket, to: str) -> list[str]:
        arguments = [bucket.url, to, str(bucket.shard_images)]
        return [sys.executable, "-c", SHARD_WRITER_LOOP, *arguments]

    found = {
        "a": Contender(name="moco-scale pack", keeps_bytes=True, command=ours()),
        "b": Contender(
            name="moco-scale pack --resize-side 256",
            keeps_bytes=False,
            command=ours("--resize-side", "256"),
        ),
        "c": Contender(
            name="img2dataset --disable_all_reencoding",
            keeps_bytes=True,
            command=img2dataset("--disable_all_reencoding=True"),
        ),
        "d": Contender(
            name="img2dataset, its defaults (256, border)",
            keeps_bytes=False,
            command=img2dataset(),
        ),
        "e": Contender(
            name="img2dataset --resize_mode keep_ratio --image_size 256",
            keeps_bytes=False,
            command=img2dataset("--resize_mode=keep_ratio", "--image_size=256"),
        ),
        "f": Contender(name="webdataset.ShardWriter, s3fs", keeps_bytes=True, command=loop),
    }
    if "resize_side" not in {setting.name for setting in dataclasses.fields(PackConfig)}:
        del found["b"]
    return found


def _report(
    server: LocalS3,
    photos: Sequence[Path],
    contenders: dict[str, Contender],
    scratch: Path,
    repeats: int,
) -> list[str]:
    many = _fill(server, "photos", photos, scratch)
    few = _fill(server, "few", photos[:FEW], scratch)
    out = server.make_bucket("packed")
    load_before = os.getloadavg()[0]
    used: dict[tuple[str, str], list[Used]] = defaultdict(list)
    ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER: orphans are ours to count
    for repeat in range(repeats):
        for key, contender in contenders.items():
            for bucket in (few, many):
                to = f"{out}/{key}{repeat}-{bucket.images}"
                took = _measured(contender.command(bucket, to), scratch)
                _check_and_remove(contender, bucket, to)
                used[key, bucket.url].append(took)
                print(
                    f"{repeat + 1}/{repeats} {key} {bucket.images:,} images: "
                    f"{took.cpu_s:.1f} CPU-s, {took.wall_s:.1f} s",
                    flush=True,
                )
    sizes = [photo.stat().st_size for photo in photos]
    lines = [
        "# Packing from S3 to S3",
        "",
        f"`python -m benchmarks.packing --images {len(photos)} --repeats {repeats}`, "
        f"{datetime.date.today().isoformat()}; {_machine()}; load average {load_before:.1f} "
        f"before, {os.getloadavg()[0]:.1f} after (the server and others share the cores: "
        "CPU-seconds compare, wall only roughly).",
        "",
        f"{len(photos):,} JPEG photos of {PIXELS / 1e6:g} Mpx, mean "
        f"{statistics.mean(sizes) / 1e3:.0f} kB; {SHARDS} shards, {WORKERS} workers each (the loop "
        "has one). CPU-seconds are of the client and all its descendants. Start-up is a run over "
        f"{FEW} images. Medians of {repeats} interleaved runs (smallest to largest).",
        "",
        *_table(contenders, used, many, few),
        "",
        *_ratios(contenders, used, many, few),
        "",
        *_breakdown(many, out),
    ]
    return lines


def _fill(server: LocalS3, name: str, photos: Sequence[Path], scratch: Path) -> Bucket:
    url = server.make_bucket(name)
    store = open_store(url)
    md5, padded = [], 0
    for photo in photos:
        data = photo.read_bytes()
        store.put(photo.name, data)
        md5.append(hashlib.md5(data).hexdigest())
        padded += padded_bytes(len(data))
    url_list = scratch / f"{name}.txt"
    url_list.write_text("".join(f"{server.filer}/buckets/{name}/{p.name}\n" for p in photos))
    shards = min(SHARDS, WORKERS if len(photos) <= FEW else SHARDS)
    return Bucket(
        url=url,
        url_list=url_list,
        md5=tuple(sorted(md5)),
        shard_bytes=padded // shards + 200_000,  # so that the last images begin no further shard
        shard_images=-(-len(photos) // shards),
    )


def _measured(command: Sequence[str], folder: Path) -> Used:
    """Run a command in `folder` to its end, and to that of all that it left behind.

    A process counts for whoever waits for it; those that nobody waited for come to us, as their
    subreaper. All of them stay in one process group, by which they are found.
    """
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    said = folder / "said.txt"
    with said.open("wb") as log:
        process = subprocess.Popen(
            command, cwd=folder, stdout=log, stderr=log, process_group=0, env=_environment()
        )
        try:
            code = process.wait(timeout=RUN_LIMIT_S)
            wall_s = time.perf_counter() - began
            _wait_for_orphans(process.pid)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    if code:
        raise SystemExit(f"{command}: exit code {code}\n{said.read_text(errors='replace')[-3000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Used(cpu_s=cpu_s, wall_s=wall_s)


def _environment() -> dict[str, str]:
    """Ours, with this checkout importable from any folder."""
    return {**os.environ, "PYTHONPATH": str(Path(__file__).absolute().parent.parent)}


def _wait_for_orphans(group: int) -> None:
    deadline = time.monotonic() + 30
    while True:
        try:
            found, _ = os.waitpid(-group, os.WNOHANG)
        except ChildProcessError:
            return
        if time.monotonic() > deadline:
            raise TimeoutError("a command ended, but a process that it started did not")
        if not found:
            time.sleep(0.05)


def _check_and_remove(contender: Contender, bucket: Bucket, to: str) -> None:
    """A figure counts only if every image is there, the same to the byte if bytes are kept."""
    store = open_store(to)
    md5 = sorted(
        hashlib.md5(image).hexdigest()
        for path in _tars(store)
        for image in _images(bytes(store.read(path)))
    )
    if len(md5) != bucket.images or (contender.keeps_bytes and tuple(md5) != bucket.md5):
        raise SystemExit(f"{contender.name}: {len(md5)} of {bucket.images} images, or other bytes")
    store.delete(_paths(store))


def _tars(store: Store) -> list[str]:
    return [path for path in _paths(store) if path.endswith(".tar")]


def _paths(store: Store) -> list[str]:
    return [path for page in store.list() for path in page.column("path").to_pylist()]


def _images(tar: bytes) -> Iterator[bytes]:
    with tarfile.open(fileobj=io.BytesIO(tar)) as members:
        for member in members:
            if member.name.endswith(".jpg"):
                content = members.extractfile(member)
                assert content is not None, "a file has content"
                yield content.read()


def _cpu_s(used: dict[tuple[str, str], list[Used]], key: str, bucket: Bucket) -> float:
    return statistics.median(run.cpu_s for run in used[key, bucket.url])


def _rates(
    used: dict[tuple[str, str], list[Used]], key: str, many: Bucket, few: Bucket
) -> tuple[float, float]:
    """Images per CPU-second: of the whole run, and of what each image adds to the small run."""
    whole, start = _cpu_s(used, key, many), _cpu_s(used, key, few)
    return many.images / whole, (many.images - few.images) / (whole - start)


def _table(
    contenders: dict[str, Contender],
    used: dict[tuple[str, str], list[Used]],
    many: Bucket,
    few: Bucket,
) -> list[str]:
    lines = [
        "| | what | CPU-s | wall s | images per CPU-s | start-up, CPU-s "
        "| images per CPU-s after start-up |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for key, contender in contenders.items():
        runs = used[key, many.url]
        whole, after = _rates(used, key, many, few)
        kept = "bytes kept" if contender.keeps_bytes else "re-encoded"
        lines.append(
            f"| {key} | {contender.name} ({kept}) | {_spread([run.cpu_s for run in runs])} "
            f"| {_spread([run.wall_s for run in runs])} | {whole:,.0f} "
            f"| {_cpu_s(used, key, few):.1f} | {after:,.0f} |"
        )
    if "b" not in contenders:
        lines += ["", "b is missing: this version of pack does not resize, or --only left it out."]
    return lines


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def _ratios(
    contenders: dict[str, Contender],
    used: dict[tuple[str, str], list[Used]],
    many: Bucket,
    few: Bucket,
) -> list[str]:
    lines = [
        "| images per CPU-second | whole run | after start-up | target |",
        "|---|---:|---:|---:|",
    ]
    for ours, theirs, target in TARGETS:
        if ours in contenders and theirs in contenders:
            pairs = zip(_rates(used, ours, many, few), _rates(used, theirs, many, few), strict=True)
            whole, after = (mine / other for mine, other in pairs)
            wanted = f"at least {target}" if target else "-"
            lines.append(f"| {ours} / {theirs} | {whole:.1f} | {after:.1f} | {wanted} |")
    return lines


def _breakdown(bucket: Bucket, out: str) -> list[str]:
    """Where the CPU time of our row a goes, in a process of its own with one worker."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        found = pool.submit(_profile, bucket, out).result(timeout=RUN_LIMIT_S)
    total = sum(found.values())
    of_worker = total - sum(found[stage] for stage in _ONCE)
    assembly = found["tar and index, hashing apart"]
    lines = [
        f"Where the CPU time of a goes: one worker, {total:.2f} CPU-s after imports. Tar and "
        f"index, hashing apart: {assembly / of_worker:.1%} of what a worker takes (target: at most "
        "5 %).",
        "",
        "| | ms per image | share |",
        "|---|---:|---:|",
    ]
    for name, cpu_s in found.items():
        lines.append(f"| {name} | {1e3 * cpu_s / bucket.images:.3f} | {cpu_s / total:.1%} |")
    return lines


_ONCE = ("open stores", "list and plan")
_STAGES = {
    "open stores": ("shards.pack.open_store", "shards.manifest.open_store"),
    "list and plan": ("shards.pack.list_objects", "shards.pack.make_plan"),
    "check: header and strict scan": ("shards.pack.check_image",),
    "tar and index, hashing apart": ("shards.pack._assemble",),
}


def _profile(bucket: Bucket, out: str) -> dict[str, float]:
    """CPU-seconds by stage.

    The thread that checks and assembles is timed in its functions. Fetching is in other threads and
    in those of the store's client: what the process takes beside that thread, but for writing,
    which like hashing is measured by doing it again.
    """
    config = PackConfig(workers=1, shard_bytes=bucket.shard_bytes)
    pack(bucket.url, f"{out}/warm", config)
    found = dict.fromkeys(_STAGES, 0.0)
    with contextlib.ExitStack() as patches:
        for stage, places in _STAGES.items():
            for place in places:
                module, _, name = place.rpartition(".")  # a package may hide it: shards.pack is
                original = getattr(sys.modules[module], name)
                timed = _timed(original, found, stage)
                patches.enter_context(mock.patch.object(sys.modules[module], name, timed))
        process, thread = time.process_time(), time.thread_time()
        pack(bucket.url, f"{out}/profiled", config)
        process, thread = time.process_time() - process, time.thread_time() - thread
    store = open_store(f"{out}/profiled")
    tars = [bytes(store.read(path)) for path in _tars(store)]
    images = [image for tar in tars for image in _images(tar)]
    began = time.process_time()
    for image in images:  # the checksum, and what the content key takes
        xxhash.xxh3_64_intdigest(image)
    of_each = time.process_time() - began
    for tar in tars:
        hashlib.sha256(tar)
    found["hash"] = time.process_time() - began
    found["tar and index, hashing apart"] -= of_each
    began, began_thread = time.process_time(), time.thread_time()
    for number, tar in enumerate(tars):
        store.put(f"again/{number}", tar)
    found["put"] = time.process_time() - began
    put_elsewhere = found["put"] - (time.thread_time() - began_thread)
    found["fetch"] = process - thread - put_elsewhere
    return found | {"rest": process - sum(found.values())}


def _timed(
    function: Callable[..., object], took: dict[str, float], stage: str
) -> Callable[..., object]:
    @functools.wraps(function)
    def timed(*given: object, **named: object) -> object:
        began = time.thread_time()
        try:
            return function(*given, **named)
        finally:
            took[stage] += time.thread_time() - began

    return timed


@functools.cache
def _img2dataset() -> Path:
    """img2dataset's command in a virtual environment of its own, made at the first need."""
    folder = CACHE.absolute() / "img2dataset"
    command = folder / "bin" / "img2dataset"
    if not command.exists():
        print(f"installing {IMG2DATASET} ...", flush=True)
        venv.create(folder, with_pip=True, clear=True)
        pip = [folder / "bin" / "python", "-m", "pip", "install", "--quiet"]
        subprocess.run([*pip, IMG2DATASET, "s3fs"], check=True, stderr=subprocess.DEVNULL)
    return command


def _photos(count: int) -> list[Path]:
    """`count` JPEGs like those of ImageNet, cut out of photos of two Debian packages.

    opencv-doc (Apache-2.0, BSD-3) and plasma-workspace-wallpapers (GPL-2+, CC BY-SA); never
    committed.
    """
    folder = CACHE / f"photos-{count}"
    if not folder.exists():
        print(f"cutting {count:,} photos ...", flush=True)
        originals, begun = photo_originals(PIXELS), folder.with_suffix(".begun")
        begun.mkdir(parents=True, exist_ok=True)
        photos = [begun / f"{number:06}.jpg" for number in range(count)]
        with ProcessPoolExecutor(WORKERS) as pool:
            shares = [photos[at :: len(originals)] for at in range(len(originals))]
            list(pool.map(_cut, shares, originals))
        begun.rename(folder)
    return sorted(folder.iterdir())


def _cut(photos: Sequence[Path], original: Path) -> None:
    """Random parts of one photo, each at a random scale, all of the same number of pixels."""
    with Image.open(original) as opened:
        image = opened.convert("RGB")
    for photo in photos:
        draw = random.Random(photo.name)
        ratio = draw.choice([4 / 3, 3 / 4, 3 / 2, 1])
        width = round((PIXELS * ratio) ** 0.5)
        height = PIXELS // width
        most = min(image.width / width, image.height / height)
        scale = draw.uniform(min(1.0, most / 2), most)  # no two parts of a small photo are equal
        across, down = int(width * scale), int(height * scale)
        left = draw.randint(0, image.width - across)
        top = draw.randint(0, image.height - down)
        box = (left, top, left + across, top + down)
        part = image.resize((width, height), Image.Resampling.LANCZOS, box=box)
        part.save(photo, "JPEG", quality=QUALITY)


def _machine() -> str:
    versions = [f"{name} {metadata.version(name)}" for name in ("obstore", "webdataset", "s3fs")]
    models = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return (
        f"{os.cpu_count()} cores of {models[0] if models else platform.machine()}, "
        f"Python {platform.python_version()}, {IMG2DATASET.replace('==', ' ')}, "
        f"{', '.join(versions)}"
    )


if __name__ == "__main__":
    sys.exit(main())
