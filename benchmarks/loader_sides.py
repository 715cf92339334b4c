"""What `benchmarks.loaders` runs, each side in a process of its own, on one core or on all.

`python -m benchmarks.loader_sides NAME JSON` runs one side and prints its figures as JSON. Imports
are in the sides, so that none pays for another's.
"""

import io
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

BLOCK, BATCH, PREFETCH, SEED = 64, 64, 2, 0
READ_THREADS = 16  # as many as the stream has
_WARM_UP = BLOCK  # batches: every lane has been through a block
_WARM_UP_VIEWS = 2  # batches: what is allocated once is allocated
_PAGE = 4096

Figures = dict[str, float]


def main() -> int:
    return run_side(SIDES)


def run_side(sides: Mapping[str, Callable[..., Figures]]) -> int:
    name, given = sys.argv[1], json.loads(sys.argv[2])
    print(json.dumps(sides[name](**given)))
    return 0


def _touched(data: Any) -> int:
    """Read a byte of each page, as whoever decodes it must: what is only mapped is read now."""
    import numpy as np

    return int(np.frombuffer(data, dtype=np.uint8)[::_PAGE].max() >= 0)


def measured(
    batches: Iterator[int],
    *,
    seconds: float | None = None,
    samples: int | None = None,
    warm_up: int = _WARM_UP,
) -> Figures:
    """Samples and what they cost: over `seconds` or more, or so many `samples` or more.

    Args:
        batches: the samples of each, without end.
        warm_up: batches before the seconds begin; samples are counted from the first one.
    """
    if seconds is not None:
        for _ in itertools.islice(batches, warm_up):
            pass
    children, cpu, wall, done = children_s(), time.process_time(), time.perf_counter(), 0
    while time.perf_counter() - wall < seconds if seconds is not None else done < (samples or 0):
        done += next(batches)
    return {
        "samples": done,
        "wall_s": time.perf_counter() - wall,
        "cpu_s": time.process_time() - cpu + children_s() - children,
    }


def children_s() -> float:
    """CPU-seconds of all processes below this one, those included that have ended."""
    parent, ticks = {}, {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended since; its parent has its ticks
            continue
        process = int(stat.parent.name)
        parent[process], ticks[process] = int(fields[1]), sum(map(int, fields[11:15]))
    here, below = {os.getpid()}, set[int]()
    while here := {process for process in parent if parent[process] in here}:
        below |= here
    ended = os.times()
    alive = sum(ticks[process] for process in below) / os.sysconf("SC_CLK_TCK")
    return ended.children_user + ended.children_system + alive


def _stream(
    url: str, *, lanes: int, buffer_bytes: int, first_step: int = 0, steps: int | None = None
) -> Any:
    """Our stream of one rank over epoch 0, and the epochs behind it if `steps` is None."""
    import numpy as np

    from pipelines.order import Order
    from pipelines.quarantine import Quarantine
    from pipelines.stream import Need, Source, Stream
    from shards import ShardSet

    shard_set = ShardSet.open(url)
    order = Order(shard_set.samples, seed=SEED, lanes=lanes, block=BLOCK)

    def needs() -> Iterator[Need]:
        a_lane = order.epoch_length // lanes
        numbers = itertools.count(first_step) if steps is None else range(first_step, steps)
        for step in numbers:
            epoch, start = step // a_lane, step % a_lane * lanes
            shards, members = order.samples(epoch, start, start + lanes)
            yield Need(
                positions=step * lanes + np.arange(lanes),
                lanes=np.arange(lanes),
                sources=np.zeros(lanes, dtype=np.int64),
                shards=shards,
                members=members,
            )

    return Stream(
        {0: Source(shard_set=shard_set, first_id=0)},
        needs(),
        num_lanes=lanes,
        block=BLOCK,
        seed=SEED,
        prefetch_batches=PREFETCH,
        buffer_bytes=buffer_bytes,
        max_pixels=10**8,
        wait_timeout_s=120.0,
        quarantine=Quarantine(max_bad_frac=0.0, world_size=1),
        on_bad="replace",
    )


# 1 and 7. Encoded samples out of shards, for some seconds or so many of them: `measured`'s span.


def encoded_touched(photos: Iterator[Any], **span: Any) -> Figures:
    return measured(map(_touched, photos), **span)


def encoded_ours(*, url: str, **span: Any) -> Figures:
    stream = _stream(url, lanes=BATCH, buffer_bytes=1 << 30)
    try:
        return measured((sum(map(_touched, batch.data)) for batch in stream), **span)
    finally:
        stream.close()


def encoded_webdataset(*, tars: list[str], **span: Any) -> Figures:
    import webdataset

    samples = passes(webdataset.WebDataset(tars, shardshuffle=False))
    return encoded_touched((one["jpg"] for one in samples), **span)


def passes(samples: Iterable[Any]) -> Iterator[Any]:
    while True:
        yield from samples


def encoded_dali(*, tars: list[str], idx: list[str], touch: bool = True, **span: Any) -> Figures:
    from nvidia.dali import fn, pipeline_def

    @pipeline_def(batch_size=BATCH, num_threads=1, device_id=None)  # type: ignore[untyped-decorator]  # DALI has no types
    def graph() -> Any:
        return fn.readers.webdataset(paths=tars, index_paths=idx, ext=["jpg"])

    pipeline = graph()
    pipeline.build()

    def batches() -> Iterator[int]:
        while True:
            (encoded,) = pipeline.run()
            yield sum(map(_touched, encoded)) if touch else len(encoded)

    return measured(batches(), **span)


def encoded_pread(*, url: str, seconds: float) -> Figures:
    """What no loader can beat that copies and checks: blocks by pread, each sample's checksum."""
    import numpy as np
    import xxhash

    from shards import ShardSet

    shard_set = ShardSet.open(url)
    files = [os.open(Path(url, name), os.O_RDONLY) for name in shard_set.names]
    rng = np.random.default_rng(SEED)

    def blocks() -> Iterator[int]:
        while True:
            shard = int(rng.integers(len(files)))
            index = shard_set.index(shard)
            first = BLOCK * int(rng.integers(len(index.offset) // BLOCK))
            here = slice(first, first + BLOCK)
            start = int(index.offset[first])
            block = memoryview(os.pread(files[shard], int(index.end[here][-1]) - start, start))
            begins, ends = (index.offset[here] - start).tolist(), (index.end[here] - start).tolist()
            sums = index.checksum[here].tolist()
            for begin, end, checksum in zip(begins, ends, sums, strict=True):
                assert xxhash.xxh3_64_intdigest(block[begin:end]) == checksum
            yield BLOCK

    return measured(blocks(), seconds=seconds)


def encoded_obstore(*, url: str, seconds: float) -> Figures:
    """The blocks that our stream would read, one after another, by the client alone."""
    from concurrent.futures import ThreadPoolExecutor

    import numpy as np
    import obstore
    from obstore.store import S3Store

    from shards import ShardSet

    shard_set = ShardSet.open(url)
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    store = S3Store(
        bucket,
        prefix=prefix,
        endpoint=os.environ["AWS_ENDPOINT_URL"],
        client_options={"allow_http": True},
    )
    rng = np.random.default_rng(SEED)

    def blocks() -> Iterator[tuple[int, str, int, int]]:
        while True:
            shard = int(rng.integers(len(shard_set.names)))
            index = shard_set.index(shard)
            first = BLOCK * int(rng.integers(len(index.offset) // BLOCK))
            end = int(index.end[first + BLOCK - 1])
            yield BLOCK, shard_set.names[shard], int(index.offset[first]), end

    def read(block: tuple[int, str, int, int]) -> int:
        samples, name, start, end = block
        _touched(obstore.get_range(store, name, start=start, end=end))
        return samples

    wanted = blocks()
    with ThreadPoolExecutor(READ_THREADS) as pool:

        def answers() -> Iterator[int]:
            running = [pool.submit(read, one) for one in itertools.islice(wanted, READ_THREADS)]
            while True:
                yield running.pop(0).result()
                running.append(pool.submit(read, next(wanted)))

        return measured(answers(), seconds=seconds)


# 2. Requests, and bytes read, for the samples used.


def gets(*, url: str, lanes: int, buffer_bytes: int) -> Figures:
    """One epoch of one rank."""
    from pipelines.order import Order
    from shards import ShardSet

    shard_set = ShardSet.open(url)
    order = Order(shard_set.samples, seed=SEED, lanes=lanes, block=BLOCK)
    steps = order.epoch_length // lanes
    stream = _stream(url, lanes=lanes, buffer_bytes=buffer_bytes, steps=steps)
    try:
        for _ in stream:
            pass
        stats = stream.stats()
        return {
            "samples": stats.used_samples,
            "lane_samples": steps,
            "requests": stats.read_requests,
            "amplification": stats.read_amplification,
        }
    finally:
        stream.close()


# 3. Hand-over to DALI.


def handover(*, url: str, batch: int, repeats: int) -> Figures:
    """Microseconds a sample from views into blocks to DALI's input, as our feed does it."""
    import statistics

    from nvidia.dali import fn, pipeline_def, types
    from nvidia.dali.tensors import TensorCPU, TensorListCPU

    @pipeline_def(batch_size=batch, num_threads=1, device_id=None, prefetch_queue_depth=1)  # type: ignore[untyped-decorator]  # DALI has no types
    def graph() -> Any:
        return fn.external_source(name="encoded", dtype=types.UINT8, ndim=1, no_copy=True)

    pipeline = graph()
    pipeline.build()
    make: Any = TensorListCPU
    took, ran = [], []
    batches = itertools.cycle(_encoded_batches(url, 4, batch=batch))
    for encoded in itertools.islice(batches, repeats):
        began = time.perf_counter()
        tensors = make([TensorCPU(one) for one in encoded.data], contiguous=False)
        pipeline.feed_input("encoded", tensors)
        took.append(time.perf_counter() - began)
        pipeline.run()
        ran.append(time.perf_counter() - began)
    return {
        "fed_us": 1e6 * statistics.median(took) / batch,
        "fed_and_run_us": 1e6 * statistics.median(ran) / batch,
    }


# 4. Two views of 224 px on the CPU.


def _encoded_batches(url: str, count: int, *, batch: int = BATCH) -> list[Any]:
    stream = _stream(url, lanes=batch, buffer_bytes=1 << 30)
    try:
        return list(itertools.islice(stream, count))
    finally:
        stream.close()


def views_ours(*, url: str, loader: str, colour: str, seconds: float) -> Figures:
    from pipelines.config import DataConfig
    from pipelines.view_maker import open_view_maker
    from pipelines.views import pair_of_views

    config = DataConfig(recipe="v2", view_size=224, colour=colour)  # type: ignore[arg-type]  # a Literal
    maker = open_view_maker(
        pair_of_views(config, seed=SEED),
        loader=loader,  # type: ignore[arg-type]  # a Literal
        batch_size=BATCH,
        num_views=2,
        view_size=224,
        colour=colour,  # type: ignore[arg-type]  # a Literal
        view_dtype="float32",
        num_threads=1,
        device_index=None,
    )
    batches = itertools.cycle(_encoded_batches(url, 8))
    made = (len(done) for done, _ in maker.make(batches, _no_repair))
    return measured(made, seconds=seconds, warm_up=_WARM_UP_VIEWS)


def _no_repair(batch: Any, faults: Any) -> Any:
    raise AssertionError(f"all {len(batch)} photos can be decoded: {faults}")


def transforms_of_moco(size: int) -> Any:
    """MoCo v2's as its main_moco.py has them, of a PIL image."""
    import random

    from PIL import Image, ImageFilter
    from torchvision import transforms

    def blur(image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(radius=random.uniform(0.1, 2.0)))

    return transforms.Compose(
        [
            transforms.RandomResizedCrop(size, scale=(0.2, 1.0)),
            transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            transforms.RandomGrayscale(p=0.2),
            transforms.RandomApply([blur], p=0.5),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(mean=_MEAN, std=_STD),
        ]
    )


_MEAN, _STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def views_torchvision(*, url: str, on: str, seconds: float) -> Figures:
    """MoCo's transforms; on tensors, v2's of the same names."""
    import numpy as np
    import torch
    from PIL import Image
    from torchvision.io import decode_jpeg
    from torchvision.transforms import v2

    torch.set_num_threads(1)
    of_pil = transforms_of_moco(224)
    of_tensors = v2.Compose(
        [
            v2.RandomResizedCrop(224, scale=(0.2, 1.0), antialias=True),
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            v2.RandomGrayscale(p=0.2),
            v2.RandomApply([v2.GaussianBlur(kernel_size=23, sigma=(0.1, 2.0))], p=0.5),
            v2.RandomHorizontalFlip(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(mean=_MEAN, std=_STD),
        ]
    )
    encoded = [np.array(one) for batch in _encoded_batches(url, 8) for one in batch.data]

    def pairs() -> Iterator[int]:
        for one in itertools.cycle(encoded):
            if on == "pil":
                image = Image.open(io.BytesIO(one.tobytes())).convert("RGB")
                view_q, view_k = of_pil(image), of_pil(image)
            else:
                pixels = decode_jpeg(torch.from_numpy(one))
                view_q, view_k = of_tensors(pixels), of_tensors(pixels)
            assert view_q.shape == view_k.shape == (3, 224, 224)
            yield 1

    return measured(pairs(), seconds=seconds)


# 5. Memory.


def memory(*, url: str, lanes: int, buffer_bytes: int, steps: int) -> Figures:
    """Peak resident memory while the stream runs, above what importing and opening took."""
    stream = _stream(url, lanes=lanes, buffer_bytes=1 << 20, steps=2)
    next(stream)  # the client's connections and the like count as baseline, blocks do not
    stream.close()
    del stream
    Path("/proc/self/clear_refs").write_text("5")  # peak := what is resident now
    before = _status("VmRSS")
    stream = _stream(url, lanes=lanes, buffer_bytes=buffer_bytes, steps=steps)
    try:
        samples = sum(len(batch) for batch in stream)
        return {
            "held_bytes": stream.stats().peak_held_bytes,
            "peak_bytes": _status("VmHWM") - before,
            "samples": samples,
            "requests": stream.stats().read_requests,
        }
    finally:
        stream.close()


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return 1024 * int(line.split()[1])
    raise AssertionError("Linux says it")


# 6. The order.


def order(*, samples: int, shards: int, ranks: int, share: int) -> Figures:
    """Build it, enter an epoch's middle as a resumed run does, go on. One rank's part of each
    global batch."""
    import statistics

    import numpy as np

    from pipelines.order import Order

    mean = samples // shards
    sizes = np.random.default_rng(SEED).integers(mean // 2, mean + mean // 2, size=shards)
    sizes[0] += samples - sizes.sum() if samples > sizes.sum() - sizes[0] else 0
    lanes = ranks * share
    Order(np.full(8, BLOCK * lanes), seed=SEED, lanes=lanes, block=BLOCK).samples(0, 0, lanes)
    Path("/proc/self/clear_refs").write_text("5")
    before, wall = _status("VmRSS"), time.perf_counter()
    order = Order(sizes, seed=SEED, lanes=lanes, block=BLOCK)
    order.samples(0, 0, 1)
    build_s = time.perf_counter() - wall
    step = order.epoch_length // lanes // 2
    cpu = time.process_time()
    order.samples(3, step * lanes, step * lanes + share)
    resumed_s = time.process_time() - cpu
    took = []
    for number in range(step + 1, step + 201):
        wall = time.perf_counter()
        order.samples(3, number * lanes, number * lanes + share)
        took.append(time.perf_counter() - wall)
    return {
        "samples": int(sizes.sum()),
        "build_s": build_s,
        "peak_bytes": _status("VmHWM") - before,
        "resumed_cpu_s": resumed_s,
        "batch_s": statistics.median(took),
        "slowest_batch_s": max(took),
    }


SIDES: dict[str, Callable[..., Figures]] = {
    "encoded_ours": encoded_ours,
    "encoded_webdataset": encoded_webdataset,
    "encoded_dali": encoded_dali,
    "encoded_pread": encoded_pread,
    "encoded_obstore": encoded_obstore,
    "gets": gets,
    "handover": handover,
    "views_ours": views_ours,
    "views_torchvision": views_torchvision,
    "memory": memory,
    "order": order,
}

if __name__ == "__main__":
    sys.exit(main())
