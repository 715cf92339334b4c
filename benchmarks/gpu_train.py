"""The whole line on one GPU: shards -> DALI -> MoCo v2, ResNet-50 at 224 px, bf16.

    python -m benchmarks.gpu_train                 on a GPU, some three minutes
    python -m benchmarks.gpu_train --device cpu --backbone resnet18 --view-size 32 --batch 32 ...

Made-up photos are packed into a folder; then the trainer runs three times: from the shards, with
one batch replayed (headspace), and with views that cost nothing (synthetic). What the first is
slower than the second is the input pipeline's.
"""

import argparse
import datetime
import platform
import statistics
import sys
import tempfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Literal

import torch

from demo.made_photos import photo_jpeg
from moco_scale.distributed import one_rank
from moco_scale.metrics import StepMetrics
from moco_scale.model import ModelConfig
from moco_scale.optim import OptimConfig
from moco_scale.trainer import RunConfig, Trainer
from pipelines import open_loader
from pipelines.config import DataConfig
from shards import PackConfig, pack

# Dense bf16 FLOPS by the vendor's data sheets; a GPU that is not listed gives no MFU.
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
# Of a forward pass of one 224 px image; a pair costs a forward and a backward (twice that) of the
# query, and a forward of the key.
FORWARD_FLOPS = {"resnet50": 8.2e9, "resnet18": 3.6e9}
_WARM_UP_ROWS = 2
Mode = Literal["stream", "headspace", "synthetic"]
MODES: tuple[Mode, ...] = ("stream", "headspace", "synthetic")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--backbone", default="resnet50")
    parser.add_argument("--view-size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--photos", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--log-every", type=int, default=20)
    parser.add_argument("--queue-size", type=int, default=65_536)
    parser.add_argument("--threads", type=int, default=8, help="DALI's, or decoding threads")
    given = parser.parse_args(arguments)
    if given.device == "cuda" and not torch.cuda.is_available():
        print("there is no GPU here: give --device cpu to try the script out", file=sys.stderr)
        return 1
    print(_head(given))
    print("| | pairs/s | ms a step | waiting for data | MFU | GiB at the peak |")
    print("|---|---:|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as folder:
        shards = _shards(Path(folder), photos=given.photos)
        for mode in MODES:
            rows = _train(given, shards, f"{folder}/{mode}", mode=mode)[_WARM_UP_ROWS:]
            print(f"| {mode} | {_row(given, rows)} |", flush=True)
    return 0


def _head(given: argparse.Namespace) -> str:
    device = torch.cuda.get_device_name() if given.device == "cuda" else platform.machine()
    versions = ", ".join(
        f"{name} {metadata.version(name)}" for name in ("torch", "torchvision", "numpy")
    )
    return (
        f"{device}, {datetime.date.today().isoformat()}, {versions}; {given.backbone} at "
        f"{given.view_size} px, batch {given.batch}, {given.steps} steps, "
        f"queue {given.queue_size}; "
        f"`python -m benchmarks.gpu_train {' '.join(sys.argv[1:])}`\n"
    )


def _shards(folder: Path, *, photos: int) -> str:
    bucket = folder / "bucket"
    bucket.mkdir()
    for number in range(photos):
        # As many pictures as are quick to make; the bytes behind an image's end make it another.
        data = photo_jpeg(number % 256) + number.to_bytes(4, "big")
        (bucket / f"{number:06}.jpg").write_bytes(data)
    pack(str(bucket), str(folder / "set"), PackConfig(shard_bytes=2**26))
    return str(folder / "set")


def _train(given: argparse.Namespace, shards: str, url: str, *, mode: Mode) -> list[StepMetrics]:
    on_gpu = given.device == "cuda"
    device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    data = DataConfig(
        shards=(shards,),
        global_batch_size=given.batch,
        view_size=given.view_size,
        num_threads=given.threads,
        mode=mode,
        view_dtype="float16" if on_gpu else "float32",
    )
    loader = open_loader(
        data, seed=0, rank=0, world_size=1, device_index=device.index if on_gpu else None
    )
    shown: list[StepMetrics] = []
    try:
        Trainer(
            data=data,
            model=ModelConfig(
                backbone=given.backbone,
                queue_size=given.queue_size,
                bn_sub_batch=given.batch // 8,
                shuffle_domain=given.batch,
            ),
            optim=OptimConfig(epochs=10_000),
            run=RunConfig(
                url=url, max_steps=given.steps, log_every=given.log_every, checkpoint_every=10**9
            ),
            loader=loader,
            ranks=one_rank(device),
            progress=shown.append,
        ).run()
    finally:
        loader.close()
    return shown


def _row(given: argparse.Namespace, rows: Sequence[StepMetrics]) -> str:
    pairs_per_s = statistics.median(row.samples_per_s for row in rows)
    wait = statistics.median(row.data_wait_frac for row in rows)
    mfu = "not known"
    peak = next((p for name, p in PEAK_FLOPS.items() if name in _device_name(given)), None)
    if peak and given.backbone in FORWARD_FLOPS:
        flops = 4 * FORWARD_FLOPS[given.backbone] * (given.view_size / 224) ** 2
        mfu = f"{100 * pairs_per_s * flops / peak:.1f} %"
    return (
        f"{pairs_per_s:,.0f} | {1000 * statistics.median(row.step_s for row in rows):.1f} "
        f"| {100 * wait:.1f} % | {mfu} | {rows[-1].memory_bytes / 2**30:.2f}"
    )


def _device_name(given: argparse.Namespace) -> str:
    return torch.cuda.get_device_name() if given.device == "cuda" else ""


if __name__ == "__main__":
    sys.exit(main())
