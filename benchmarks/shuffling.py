"""How well training mixes a bucket whose classes lie side by side: our order and webdataset's.

Small images, a folder a class, are packed by `pack`, which shuffles; and written in the bucket's
order by webdataset's own ShardWriter, and adopted by `index`. Of both sets the quality under our
order is computed, and under webdataset's defaults, whose own code reads the same tars.
`python -m benchmarks.shuffling`; figures go to standard output and, with --out, into a Markdown
file.
"""

import argparse
import contextlib
import datetime
import io
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from unittest import mock

import numpy as np
import webdataset
from PIL import Image

from benchmarks.machine import machine
from moco_scale.cli_shuffle import bucket_places, measure, rows_of
from pipelines.order import Order
from pipelines.shuffle_quality import (
    WEBDATASET_BUFFER,
    WEBDATASET_SHARDS,
    WEBDATASET_WORKERS,
    Batches,
    ByOrder,
    Integers,
    Recorded,
    Sequential,
    Served,
    Uniform,
    in_turns,
    webdataset_epoch,
    webdataset_seed,
)
from shards import PackConfig, ShardSet, pack
from shards.adopt import adopt

SEED, EPOCHS, BLOCK, WORKERS = 0, 2, 64, 2
_SIDE, _QUALITY = 16, 50


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--classes", type=int, default=128)
    parser.add_argument("--class-images", type=int, default=1024, help="of each class")
    parser.add_argument("--shard-images", type=int, default=1024)
    parser.add_argument("--global-batch-size", type=int, default=512)
    parser.add_argument("--world-size", type=int, default=8)
    parser.add_argument("--queue-size", type=int, default=8192)
    parser.add_argument("--out", type=Path, help="a Markdown file for the result")
    given = parser.parse_args()
    batches = Batches(
        global_batch_size=given.global_batch_size,
        world_size=given.world_size,
        queue_size=given.queue_size,
    )
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="moco-bench-") as scratch:
        lines = _report(
            Path(scratch),
            classes=given.classes,
            class_images=given.class_images,
            shard_images=given.shard_images,
            batches=batches,
        )
    command = " ".join(["python -m benchmarks.shuffling", *_without_out(sys.argv[1:])])
    head = [
        "# Shuffling of a bucket whose classes lie side by side",
        "",
        f"`{command}`, {datetime.date.today().isoformat()}; {machine('webdataset', 'numpy')}; "
        f"{time.perf_counter() - began:.0f} s. No figure depends on the speed of the machine.",
        "",
    ]
    text = "\n".join(head + lines)
    print(text)
    if given.out:
        given.out.write_text(text + "\n")
    return 0


def _without_out(arguments: Sequence[str]) -> list[str]:
    place = arguments.index("--out") if "--out" in arguments else len(arguments)
    return [*arguments[:place], *arguments[place + 2 :]]


def _report(
    scratch: Path, *, classes: int, class_images: int, shard_images: int, batches: Batches
) -> list[str]:
    bucket = scratch / "bucket"
    _fill(bucket, classes=classes, class_images=class_images)
    config = PackConfig(workers=WORKERS, max_shard_samples=shard_images)
    pack(str(bucket), str(scratch / "packed"), config)
    _write_in_order(bucket, scratch / "in-order", shard_images)
    adopt(str(scratch / "in-order"), workers=WORKERS)
    sets = {
        "packed": ShardSet.open(str(scratch / "packed")),
        "bucket order": ShardSet.open(str(scratch / "in-order")),
    }
    size = classes * class_images
    assert all(one.num_samples == size for one in sets.values()), "an image is missing"
    found, notes = {}, []
    for name, shard_set in sets.items():
        order = Order(shard_set.samples, seed=SEED, lanes=batches.global_batch_size, block=BLOCK)
        recorded = [_run_webdataset(shard_set, batches, epoch=epoch) for epoch in range(EPOCHS)]
        imitated = [
            webdataset_epoch(shard_set.samples, batches, seed=SEED, epoch=epoch)
            for epoch in range(EPOCHS)
        ]
        is_equal = all(map(np.array_equal, recorded, imitated))
        notes.append(
            f"{name}: `moco-scale shuffle` imitates webdataset's order "
            f"{'exactly' if is_equal else 'WRONGLY'}."
        )
        ways: dict[str, Served] = {
            "ours": ByOrder(order, shard_set.samples),
            "webdataset": Recorded(recorded, num_samples=size),
        }
        if name == "bucket order":
            ways["sequential"] = Sequential(size, epoch_length=order.epoch_length)
            ways["uniform"] = Uniform(size, epoch_length=order.epoch_length, seed=SEED)
        places = bucket_places(shard_set)
        for way, served in ways.items():
            found[f"{name}, {way}"] = measure(
                served,
                shard_set.samples,
                batches,
                places=places,
                row=BLOCK,
                block=BLOCK,
                epochs=EPOCHS,
            )
    lines = [
        f"{classes} classes of {class_images:,} images, one folder after the other; shards of "
        f"{shard_images:,}; global batch {batches.global_batch_size:,}, {batches.world_size} ranks,"
        f" a queue of {batches.queue_size:,}, blocks of {BLOCK}, {EPOCHS} epochs, seed {SEED}.",
        "",
        "*packed*: by `pack`, which shuffles. *bucket order*: webdataset's ShardWriter over the "
        "sorted listing, adopted by `index`. *ours*: slot lanes, as many as the global batch. "
        f"*webdataset*: `WebDataset(shardshuffle={WEBDATASET_SHARDS}, "
        f"nodesplitter=split_by_node).shuffle({WEBDATASET_BUFFER})`, run in {WEBDATASET_WORKERS} "
        "workers a rank, one after another by its variables RANK and WORKER, batches taken from "
        "the workers in turn; the buffer's clock seed is replaced by a fixed one.",
        "",
        "| | " + " | ".join(found) + " |",
        "|---|" + "---:|" * len(found),
    ]
    for name, figures in rows_of(found, row=BLOCK):
        cells = figures or [""] * len(found)
        lines.append(f"| {name if figures else f'**{name.lower()}**'} | {' | '.join(cells)} |")
    return [*lines, "", *notes]


def _fill(bucket: Path, *, classes: int, class_images: int) -> None:
    rng = np.random.default_rng(SEED)
    for label in range(classes):
        folder = bucket / f"class-{label:04}"
        folder.mkdir(parents=True)
        pixels = rng.integers(0, 256, size=(class_images, _SIDE, _SIDE, 3), dtype=np.uint8)
        for number in range(class_images):
            written = io.BytesIO()
            Image.fromarray(pixels[number]).save(written, "JPEG", quality=_QUALITY)
            (folder / f"{number:06}.jpg").write_bytes(written.getvalue())


def _write_in_order(bucket: Path, folder: Path, shard_images: int) -> None:
    folder.mkdir()
    pattern = str(folder / "%06d.tar")
    with webdataset.ShardWriter(pattern, maxcount=shard_images, verbose=0) as writer:
        for number, path in enumerate(sorted(bucket.rglob("*.jpg"))):
            writer.write({"__key__": f"{number:09}", "jpg": path.read_bytes()})


def _run_webdataset(shard_set: ShardSet, batches: Batches, *, epoch: int) -> Integers:
    """What webdataset itself serves of a set's tars in an epoch, by our sample numbers."""
    urls = [str(Path(shard_set.url, name)) for name in shard_set.names]
    rows = zip(urls, shard_set.tables(["key"]), strict=True)
    known = [(url, key) for url, table in rows for key in table.column("key").to_pylist()]
    numbers = {one: number for number, one in enumerate(known)}

    def samples_of(rank: int, worker: int) -> Iterator[int]:
        variables = {
            "RANK": str(rank),
            "WORLD_SIZE": str(batches.world_size),
            "WORKER": str(worker),
            "NUM_WORKERS": str(WEBDATASET_WORKERS),
        }
        draw = Random(webdataset_seed(seed=SEED, epoch=epoch, rank=rank, worker=worker))
        with mock.patch.dict(os.environ, variables), _quiet():
            served = webdataset.WebDataset(
                urls,
                shardshuffle=WEBDATASET_SHARDS,
                nodesplitter=webdataset.split_by_node,
                seed=SEED,
                empty_check=False,
            ).shuffle(WEBDATASET_BUFFER, rng=draw)
            for sample in served:
                yield numbers[sample["__url__"], sample["__key__"]]

    found = in_turns(samples_of, batches)
    if found is None:
        raise SystemExit("fewer shards than ranks: webdataset serves no global batch")
    return found


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """webdataset leaves the tars it has read open, for the garbage collector to close."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        yield


if __name__ == "__main__":
    sys.exit(main())
