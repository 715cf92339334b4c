"""The loader's stages by themselves, and joined one after the other: how fast is each?

What is measured is the code that training runs, on the run's own samples, in the run's own order.
"""

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from pipelines.ahead import Ahead
from pipelines.blocks import BlockReader, Bytes, Held
from pipelines.config import DataConfig
from pipelines.cpu_views import Pixels, decode
from pipelines.mixture import Mixture
from pipelines.order import rank_positions
from pipelines.quarantine import Quarantine
from pipelines.spans import ASSEMBLE, PLAN, VIEWS, Spans
from pipelines.stream import EncodedBatch, Stream
from pipelines.streaming_loader import (
    needs,
    open_mixture,
    open_stream,
    open_training_maker,
    threads_of_a_rank,
)
from pipelines.view_maker import ToDevice, ViewMaker, is_by_dali
from pipelines.views import Draw, ViewParams, pair_of_views
from shards.resize import encode, resize, resized

_KEPT_SAMPLES, _KEPT_BYTES, _PIXEL_BYTES = 512, 1 << 26, 1 << 28
"""Most samples, encoded bytes and decoded bytes that are kept in memory to be used again."""
_WARM_UP_BATCHES = 12
"""That a stream plans ahead and has ready: as many come faster, or slower, than those after."""
_CLOSE_S = 10.0
_MOST_TIMES = 6
"""A measurement goes on until it has seen enough, but no more times as long as it was asked to."""
_RESIZED_SAMPLES = 48
_BLOCKS, _BLOCK_BATCHES = 256, 4096
"""Blocks that are read over and over, and batches in which so many are looked for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """One measurement of one stage, or of several joined."""

    samples_per_s: float
    seconds: float
    samples: int
    size_bytes: int
    """Of what it took in; 0 where that says nothing."""
    cpu_s: float
    """CPU-seconds of this process."""
    calls_s: tuple[float, ...]
    """Seconds of each call: a range read, a block, an image, a batch."""

    @property
    def bytes_per_s(self) -> float:
        return self.size_bytes * self.samples_per_s / max(1, self.samples)


class Stages:
    """Measures one rank's loader in parts. `close` it: it holds threads and blocks."""

    def __init__(
        self,
        config: DataConfig,
        *,
        seed: int,
        rank: int,
        world_size: int,
        device_index: int | None,
        local_world_size: int,
        seconds: float,
        agree: Callable[[Any], Any] | None = None,
        to_device: ToDevice | None = None,
    ) -> None:
        """
        Args:
            config, seed, rank, world_size, device_index, local_world_size, agree, to_device: as of
                `open_loader`.
            seconds: of each measurement.

        Raises:
            FormatError: there is no shard set at an address of `config.shards`.
            OrderError: too few samples, or a world that cannot share the global batch.
        """
        self.config = config
        self.batch_size = config.global_batch_size // world_size
        self.num_threads = config.num_threads or threads_of_a_rank(local_world_size)
        self.cores = threads_of_a_rank(local_world_size)
        """Of this machine, divided by its ranks."""
        self.seconds = seconds
        self._seed = seed
        self._rank, self._world_size = rank, world_size
        self.device_index = device_index
        self._to_device = to_device
        self._agree = agree
        self._mixture = open_mixture(config, seed=seed, agree=agree, follow=False)
        rank_positions(
            0, global_batch_size=config.global_batch_size, rank=rank, world_size=world_size
        )
        self._blocks = _Blocks(self._mixture, config, rank=rank, world_size=world_size)
        self._in_memory: list[tuple[Held, Bytes]] = []
        self._kept: list[EncodedBatch] | None = None
        self._images: list[tuple[EncodedBatch, dict[int, Pixels]]] | None = None
        self.is_by_dali = is_by_dali(config.loader, device_index=device_index)

    def close(self) -> None:
        """Let go of what is kept; harmless twice."""
        self._kept = self._images = None
        self._in_memory = []

    def read_amplification(self, block: int) -> float:
        """Samples read for one used, at most, with blocks of so many: see pipelines/order.py."""
        lane = self._mixture.start().epoch_length / self._mixture.lanes
        return (lane + block - 1) / lane

    # Alone

    def store(self, workers: int, *, block: int | None = None) -> Timing:
        """Range reads of blocks, so many under way at once.

        Args:
            block: samples of a block; None: as in the settings.
        """
        blocks = self._blocks if block is None else self._blocks_of(block)

        def read(_: int) -> tuple[int, int]:
            held = blocks.next()
            blocks.reader.load(held)
            return held.stop - held.first, held.size

        return _in_threads(read, workers=workers, seconds=self.seconds)

    def check(self, workers: int) -> Timing:
        """Samples cut out of blocks in memory, checksums compared, headers looked at."""
        loaded = self._loaded()

        def check(number: int) -> tuple[int, int]:
            held, buffer = loaded[number % len(loaded)]
            self._blocks.reader.checked(held, buffer)
            return held.stop - held.first, held.size

        return _in_threads(check, workers=workers, seconds=self.seconds)

    def decode(self, workers: int, *, hw_decoder_load: float | None = None) -> Timing:
        """Encoded images in memory to pixels."""
        if self.is_by_dali:
            return self._dali(workers, _no_views, num_views=0, hw_decoder_load=hw_decoder_load)
        places = self._places()
        maker = self._cpu_maker()

        def decode_one(number: int) -> tuple[int, int]:
            batch, place = places[number % len(places)]
            maker.decode(batch, place)
            return 1, len(batch.data[place])

        return _in_threads(decode_one, workers=workers, seconds=self.seconds)

    def augment(self, workers: int) -> Timing:
        """Pixels in memory to two views: of DALI what the views add to decoding."""
        if self.is_by_dali:
            return _less(self.views(workers), self.decode(workers))
        maker, images = self._cpu_maker(), self._decoded()
        drawing = []
        for batch, pixels in images:
            views = [maker.empty(len(batch)) for _ in range(2)]
            drawing += [
                (maker.augmenter(views, batch), image, place) for place, image in pixels.items()
            ]

        def augment_one(number: int) -> tuple[int, int]:
            augment, image, place = drawing[number % len(drawing)]
            augment(image, place)
            return 1, 0

        return _in_threads(augment_one, workers=workers, seconds=self.seconds)

    def views(self, workers: int) -> Timing:
        """Encoded batches in memory to views, decoding and augmenting together."""
        draw = pair_of_views(self.config, seed=self._seed)
        return self._dali(workers, draw, num_views=2, hw_decoder_load=None)

    @property
    def transfer_is_seen(self) -> bool:
        """Whether there is a device that the host moves views to: DALI makes them on its own."""
        if self.is_by_dali:
            return False
        return self.device_index is not None or self._to_device is not None

    def transfer(self, *, view_dtype: str | None = None) -> Timing:
        """A batch's two views from host memory to the device.

        Args:
            view_dtype: as of data.view_dtype; None: as in the settings.
        """
        config = self.config if view_dtype is None else replace(self.config, view_dtype=view_dtype)  # type: ignore[arg-type]  # one of its literals
        maker = self._cpu_maker(config)
        views = [maker.empty(self.batch_size).zero_().permute(0, 3, 1, 2) for _ in range(2)]
        size_bytes = sum(view.nbytes for view in views)

        def transfer(_: int) -> tuple[int, int]:
            for view in views:
                maker.to_device(view)
            if self.device_index is not None:
                torch.cuda.synchronize(self.device_index)
            return self.batch_size, size_bytes

        return _in_threads(transfer, workers=1, seconds=self.seconds)

    # Joined

    def checked(self) -> Timing:
        """Reads and checks, in as many threads as the settings say."""

        def read(_: int) -> tuple[int, int]:
            held = self._blocks.next()
            self._blocks.reader.read(held)
            return held.stop - held.first, held.size

        return _in_threads(read, workers=self.config.read_threads, seconds=self.seconds)

    def streamed(self, repeats: int) -> list[Timing]:
        """Encoded batches out of the stream."""
        with closing(self._stream(None)) as stream:
            return _taken(iter(stream), _size_of, seconds=self.seconds, repeats=repeats)

    def hand_over(self) -> Timing:
        """Planning and putting together, by the CPU-seconds of their one thread in the stream.

        They cannot run without the stages before them.
        """
        spans = Spans()
        with closing(self._stream(spans)) as stream:
            _taken(iter(stream), _size_of, seconds=0.0, repeats=1)
            spans.recording = True
            (timing,) = _taken(iter(stream), _size_of, seconds=self.seconds, repeats=1)
            spans.recording = False
        own = [one for one in spans.take() if one.name in (PLAN, ASSEMBLE)]
        cpu_s = sum(one.cpu_s for one in own)
        samples = sum(one.samples for one in own if one.name == ASSEMBLE)
        return replace(
            timing,
            samples_per_s=samples / max(cpu_s, 1e-9),
            samples=samples,
            cpu_s=cpu_s,
            calls_s=tuple(one.seconds for one in own if one.name == ASSEMBLE),
        )

    def decoded(self, repeats: int) -> list[Timing]:
        """The stream, and its samples decoded."""
        return self._made(_no_views, num_views=0, on_device=True, repeats=repeats)

    def augmented(self, repeats: int) -> list[Timing]:
        """The stream, and its samples as views, in host memory where the CPU makes them."""
        draw = pair_of_views(self.config, seed=self._seed)
        return self._made(draw, num_views=2, on_device=self.is_by_dali, repeats=repeats)

    def transferred(self, repeats: int) -> list[Timing]:
        """All of the loader, with a step that takes no time."""
        draw = pair_of_views(self.config, seed=self._seed)
        return self._made(draw, num_views=2, on_device=True, repeats=repeats)

    def smaller(self, side: int) -> tuple[float, float] | None:
        """What resizing to a shorter side when packing would save.

        Returns:
            Bytes of a sample, and decoding seconds, each relative to those of now; None where no
            sample is larger.
        """
        places = self._places()
        before_bytes = after_bytes = 0
        before_s = after_s = 0.0
        chosen = places[:: max(1, len(places) // _RESIZED_SAMPLES)]
        resizes = False
        for batch, place in chosen:
            data = batch.data[place]
            width, height = batch.sizes[place].tolist()
            size = (width, height)
            try:
                pixels, took_s = _timed(data, size, int(batch.orientations[place]))
            except ValueError:
                continue
            smaller, smaller_s = data, took_s
            if min(size) > side:
                resizes = True
                size = resized(width, height, side)
                smaller = np.frombuffer(encode(resize(pixels, size)), dtype=np.uint8)
                _, smaller_s = _timed(smaller, size, 1)
            before_bytes, after_bytes = before_bytes + len(data), after_bytes + len(smaller)
            before_s, after_s = before_s + took_s, after_s + smaller_s
        return (after_bytes / before_bytes, after_s / before_s) if resizes else None

    # What they are made of

    def _made(self, draw: Draw, *, num_views: int, on_device: bool, repeats: int) -> list[Timing]:
        with ExitStack() as stack:
            stream = stack.enter_context(closing(self._stream(None)))
            maker = self._maker(
                draw,
                num_views=num_views,
                num_threads=self.num_threads,
                on_device=on_device,
            )
            ahead = Ahead(
                maker.make(stream, stream.repair),
                size=max(1, self.config.prefetch_batches),
                name=VIEWS,
            )
            stack.callback(ahead.close, timeout_s=_CLOSE_S)
            stack.callback(stream.close)
            batches = iter(lambda: ahead.get(timeout_s=self.config.wait_timeout_s), None)
            return _taken(
                batches,
                lambda made: _size_of(made[0]),
                seconds=self.seconds,
                repeats=repeats,
                device_index=self.device_index if on_device else None,
            )

    def _stream(self, spans: Spans | None) -> Stream:
        return open_stream(
            self._mixture,
            self._mixture.start(),
            config=self.config,
            seed=self._seed,
            rank=self._rank,
            world_size=self._world_size,
            quarantine=Quarantine(
                max_bad_frac=self.config.max_bad_frac, world_size=self._world_size
            ),
            spans=spans,
        )

    def _maker(
        self,
        draw: Draw,
        *,
        num_views: int,
        num_threads: int,
        on_device: bool,
        hw_decoder_load: float | None = None,
    ) -> ViewMaker:
        config = self.config
        if hw_decoder_load is not None:
            config = replace(config, hw_decoder_load=hw_decoder_load)
        return open_training_maker(
            config,
            draw,
            batch_size=self.batch_size,
            num_views=num_views,
            num_threads=num_threads,
            device_index=self.device_index if on_device else None,
            spans=None,
            to_device=self._to_device if on_device else None,
        )

    def _cpu_maker(self, config: DataConfig | None = None) -> Any:
        from pipelines.cpu_loader import CpuViews  # deferred: OpenCV is not needed beside DALI

        used = config or self.config
        return CpuViews(
            pair_of_views(used, seed=self._seed),
            num_views=2,
            view_size=used.view_size,
            colour=used.colour,
            view_dtype=used.view_dtype,
            num_threads=self.num_threads,
            device_index=self.device_index,
            to_device=self._to_device,
        )

    def _dali(
        self, workers: int, draw: Draw, *, num_views: int, hw_decoder_load: float | None
    ) -> Timing:
        maker = self._maker(
            draw,
            num_views=num_views,
            num_threads=workers,
            on_device=True,
            hw_decoder_load=hw_decoder_load,
        )
        made = maker.make(itertools.cycle(self._batches()), _no_repair)
        with closing(made):
            (timing,) = _taken(
                made,
                lambda one: _size_of(one[0]),
                seconds=self.seconds,
                repeats=1,
                device_index=self.device_index,
            )
        return timing

    def _loaded(self) -> list[tuple[Held, Bytes]]:
        """Some blocks, as many as come in a while."""
        if not self._in_memory:
            until = time.perf_counter() + _MOST_TIMES * self.seconds
            with ThreadPoolExecutor(self.config.read_threads) as pool:
                while not self._in_memory or (
                    time.perf_counter() < until
                    and sum(held.size for held, _ in self._in_memory) < _KEPT_BYTES
                    and len(self._in_memory) < _BLOCKS
                ):
                    some = [self._blocks.next() for _ in range(self.config.read_threads)]
                    found = pool.map(self._blocks.reader.load, some)
                    self._in_memory += zip(some, found, strict=True)
        return self._in_memory

    def _batches(self) -> list[EncodedBatch]:
        """Some of the run's first batches, as many as come in a while."""
        if self._kept is None:
            until = time.perf_counter() + _MOST_TIMES * self.seconds
            self._kept, size, samples = [], 0, 0
            with closing(self._stream(None)) as stream:
                for batch in stream:
                    # Copies: views would hold whole blocks.
                    data = tuple(np.array(one) for one in batch.data)
                    self._kept.append(replace(batch, data=data))
                    size, samples = size + sum(map(len, data)), samples + len(batch)
                    if samples >= _KEPT_SAMPLES or size >= _KEPT_BYTES:
                        break
                    if len(self._kept) >= 2 and time.perf_counter() > until:
                        break
        return self._kept

    def _places(self) -> list[tuple[EncodedBatch, int]]:
        return [(batch, place) for batch in self._batches() for place in range(len(batch))]

    def _decoded(self) -> list[tuple[EncodedBatch, dict[int, Pixels]]]:
        """Some of them as pixels, as many as memory is meant for."""
        if self._images is None:
            self._images, size = [], 0
            maker = self._cpu_maker()
            for batch in self._batches():
                pixels: dict[int, Pixels] = {}
                for place in range(len(batch)):
                    with suppress(ValueError):
                        pixels[place] = maker.decode(batch, place)
                        size += pixels[place].nbytes
                    if size >= _PIXEL_BYTES:
                        break
                self._images.append((batch, pixels))
                if size >= _PIXEL_BYTES:
                    break
        return self._images

    def _blocks_of(self, block: int) -> "_Blocks":
        config = replace(self.config, block_samples=block)
        mixture = open_mixture(config, seed=self._seed, agree=self._agree, follow=False)
        return _Blocks(mixture, config, rank=self._rank, world_size=self._world_size)


class _Blocks:
    """The blocks that a rank's lanes enter first, over and over; for many threads."""

    def __init__(self, mixture: Mixture, config: DataConfig, *, rank: int, world_size: int) -> None:
        self.reader = BlockReader(
            mixture.sources, max_pixels=config.max_pixels, buffer_bytes=config.buffer_bytes
        )
        block = config.block_samples
        wanted = needs(mixture, mixture.start(), config=config, rank=rank, world_size=world_size)
        keys: dict[tuple[int, int, int], None] = {}
        for need, _ in zip(wanted, range(_BLOCK_BATCHES), strict=False):
            blocks = (need.members // block).tolist()
            keys.update(
                dict.fromkeys(zip(need.sources.tolist(), need.shards.tolist(), blocks, strict=True))
            )
            if len(keys) >= _BLOCKS:
                break
        sets = {number: one.shard_set for number, one in mixture.sources.items()}
        self._places = []
        shards = list(dict.fromkeys((source, shard) for source, shard, _ in keys))
        with ThreadPoolExecutor(config.read_threads) as pool:
            indexes = list(pool.map(lambda one: sets[one[0]].index(one[1]), shards))
        self.reader.indexes.update(zip(shards, indexes, strict=True))
        for source, shard, number in list(keys)[:_BLOCKS]:
            stop = min(number * block + block, int(sets[source].samples[shard]))
            self._places.append((source, shard, number * block, stop))
        self._numbers = itertools.count()

    def next(self) -> Held:
        return self.reader.hold(*self._places[next(self._numbers) % len(self._places)])


def _no_views(_positions: Any, _sizes: Any) -> tuple[ViewParams, ...]:
    return ()


def _no_repair(_batch: EncodedBatch, _faults: Any) -> EncodedBatch:
    raise AssertionError("these samples have been decoded before")


def _size_of(batch: EncodedBatch) -> tuple[int, int]:
    return len(batch), sum(map(len, batch.data))


def _timed(data: Bytes, size: tuple[int, int], orientation: int) -> tuple[Pixels, float]:
    """Pixels, and the least seconds of three times."""
    took = []
    for _ in range(3):
        began = time.perf_counter()
        pixels = decode(data, size=size, orientation=orientation)
        took.append(time.perf_counter() - began)
    return pixels, min(took)


def _less(whole: Timing, part: Timing) -> Timing:
    """What is left of one after another by the seconds of a sample."""
    seconds = 1 / whole.samples_per_s - 1 / part.samples_per_s
    cpu_s = whole.cpu_s / whole.samples - part.cpu_s / part.samples
    return replace(
        whole,
        samples_per_s=1 / max(seconds, 1e-9),
        size_bytes=0,
        cpu_s=max(0.0, cpu_s) * whole.samples,
        calls_s=(),
    )


def _in_threads(work: Callable[[int], tuple[int, int]], *, workers: int, seconds: float) -> Timing:
    """So many threads that call `work` with 0, 1, 2 ... for so long, and at least once each.

    Each has its own rate, from its first call to the end of its last, so that those that end late
    do not make the others look slower.
    """
    numbers = itertools.count()
    rates, calls_s, samples, sizes = [], [], [], []
    errors: list[BaseException] = []
    begin = threading.Barrier(workers + 1)

    def run() -> None:
        done = size_bytes = 0
        begin.wait()
        began = ended = time.perf_counter()
        try:
            while ended < began + seconds or not done:
                count, size = work(next(numbers))
                now = time.perf_counter()
                calls_s.append(now - ended)
                ended = now
                done, size_bytes = done + count, size_bytes + size
        except BaseException as err:
            errors.append(err)
        else:
            rates.append(done / (ended - began))
            samples.append(done)
            sizes.append(size_bytes)

    threads = [
        threading.Thread(target=run, name=f"stage-{number}", daemon=True)
        for number in range(workers)
    ]
    for thread in threads:
        thread.start()
    begin.wait()
    began, cpu_began = time.perf_counter(), time.process_time()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return Timing(
        samples_per_s=sum(rates),
        seconds=time.perf_counter() - began,
        samples=sum(samples),
        size_bytes=sum(sizes),
        cpu_s=time.process_time() - cpu_began,
        calls_s=tuple(calls_s),
    )


def _taken(
    batches: Iterator[Any],
    size_of: Callable[[Any], tuple[int, int]],
    *,
    seconds: float,
    repeats: int,
    device_index: int | None = None,
) -> list[Timing]:
    """Take batches as they come, for so many seconds a repeat, after a warm-up."""
    warm_until = time.perf_counter() + max(seconds, 0.1) * _MOST_TIMES
    for _, _ in zip(range(_WARM_UP_BATCHES), batches, strict=False):
        if time.perf_counter() > warm_until:
            break
    found = []
    for _ in range(repeats):
        began, cpu_began = time.perf_counter(), time.process_time()
        ended, samples, size_bytes = began, 0, 0
        calls_s: list[float] = []
        while ended < began + seconds or not _is_enough(len(calls_s), ended - began, seconds):
            count, size = size_of(next(batches))
            if device_index is not None:
                torch.cuda.synchronize(device_index)
            now = time.perf_counter()
            calls_s.append(now - ended)
            ended = now
            samples, size_bytes = samples + count, size_bytes + size
        found.append(
            Timing(
                samples_per_s=samples / (ended - began),
                seconds=ended - began,
                samples=samples,
                size_bytes=size_bytes,
                cpu_s=time.process_time() - cpu_began,
                calls_s=tuple(calls_s),
            )
        )
    return found


def _is_enough(batches: int, passed_s: float, seconds: float) -> bool:
    """Batches come in bursts: four tell more than one, if they do not take for ever."""
    return batches >= 4 or (batches >= 1 and passed_s > _MOST_TIMES * seconds)
