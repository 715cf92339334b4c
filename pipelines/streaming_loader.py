"""Order, stream and views joined into a loader; and a way to see every sample once."""

import importlib.util
import logging
import os
import time
from collections.abc import Generator, Iterator
from contextlib import closing
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.ahead import Ahead
from pipelines.config import DataConfig
from pipelines.errors import StalledError, StateError
from pipelines.loader import Batch, Loader
from pipelines.order import ALGORITHM, Order, rank_positions
from pipelines.quarantine import BadSample, Quarantine
from pipelines.stats import LoaderStats
from pipelines.stream import EncodedBatch, Need, Stream
from pipelines.view_maker import ViewMaker, Views
from pipelines.views import Draw, ViewParams, evaluation_views, pair_of_views
from shards import ShardSet
from shards.errors import FormatError

logger = logging.getLogger(__name__)

STATE_FORMAT = 1
_CLOSE_S = 10.0
_EVALUATION_TIMEOUT_S = 120.0
_EVALUATION_BUFFER_BYTES = 1 << 29


def open_loader(
    config: DataConfig, *, seed: int, rank: int, world_size: int, device_index: int | None
) -> Loader:
    """Two views of each sample of a shard set, in an order that the seed alone decides.

    Args:
        seed: of the order, the views and the substitutes.
        device_index: the GPU that decodes and holds the views; None for the CPU.

    Raises:
        FormatError: there is no shard set at `config.shards`.
        OrderError: too few samples, or a world that cannot share the global batch.
    """
    start, stop = rank_positions(
        0, global_batch_size=config.global_batch_size, rank=rank, world_size=world_size
    )
    shard_set = ShardSet.open(config.shards)
    order = Order(
        shard_set.samples,
        seed=seed,
        lanes=config.lanes_per_slot * config.global_batch_size,
        block=config.block_samples,
    )
    maker = _view_maker(
        pair_of_views(config, seed=seed),
        loader=config.loader,
        batch_size=stop - start,
        num_views=2,
        view_size=config.view_size,
        colour=True,
        num_threads=config.num_threads or _threads_of_a_rank(world_size, device_index),
        device_index=device_index,
    )
    return StreamingLoader(
        shard_set, order, maker, config=config, seed=seed, rank=rank, world_size=world_size
    )


class StreamingLoader:
    """A `Loader` over a shard set. Reading starts at the first batch asked for."""

    def __init__(
        self,
        shard_set: ShardSet,
        order: Order,
        maker: ViewMaker,
        *,
        config: DataConfig,
        seed: int,
        rank: int,
        world_size: int,
    ) -> None:
        self._set = shard_set
        self._order = order
        self._maker = maker
        self._config = config
        self._seed = seed
        self._rank = rank
        self._world_size = world_size
        self._quarantine = Quarantine(max_bad_frac=config.max_bad_frac)
        self._epoch = 0
        self._consumed = 0
        self._position = 0
        self._samples = 0
        self._replaced = 0
        self._read_wait_s = 0.0
        self._making_s = 0.0
        self._batch_wait_s = 0.0
        self._stream: Stream | None = None
        self._ahead: Ahead[tuple[EncodedBatch, Views]] | None = None
        self._closed = False

    @property
    def steps_per_epoch(self) -> int:
        return self._order.epoch_length // self._config.global_batch_size

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        """The next batch.

        Raises:
            StalledError: none came within data.wait_timeout_s.
            StoreError: the store failed for good.
            BadDataError: more samples were bad than data.max_bad_frac allows.
        """
        if self._closed:
            raise StopIteration
        began = time.perf_counter()
        if self._stream is None or self._ahead is None:
            self._stream = self._open_stream()
            self._ahead = Ahead(
                self._make(self._stream), size=max(1, self._config.prefetch_batches), name="views"
            )
        try:
            encoded, (view_q, view_k) = self._ahead.get(timeout_s=self._config.wait_timeout_s)
        except TimeoutError:
            raise StalledError(
                f"no batch for {self._config.wait_timeout_s:g} s; views: {self._ahead.num_ready} "
                f"batches ready; stream: {self._stream.describe()}"
            ) from None
        self._batch_wait_s += time.perf_counter() - began
        self._samples += len(encoded)
        self._replaced += encoded.num_replaced
        self._advance()
        return Batch(
            view_q=view_q,
            view_k=view_k,
            sample_ids=encoded.sample_ids,
            positions=encoded.positions,
            num_replaced=encoded.num_replaced,
        )

    def state_dict(self) -> dict[str, Any]:
        return {
            **self._identity(),
            "epoch": self._epoch,
            "consumed": self._consumed,
            "position": self._position,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert self._stream is None, "a position is loaded before the first batch"
        self._go_back_to(state.get("version"))
        for name, ours in self._identity().items():
            if state.get(name) != ours:
                raise StateError(
                    f"the saved position has {name} {state.get(name)!r}, this run has {ours!r}: "
                    f"{_ADVICE[name]}"
                )
        size = self._config.global_batch_size
        if state["consumed"] % size:
            raise StateError(
                f"the saved position is {state['consumed']} samples into its epoch, not a multiple "
                f"of data.global_batch_size {size}; choose one that divides it"
            )
        self._epoch = state["epoch"]
        self._consumed = state["consumed"]
        self._position = state["position"]

    def _go_back_to(self, version: object) -> None:
        """Open the version of the shard set that a run began with: it never changes."""
        if version == self._set.version or not isinstance(version, int):
            return
        try:
            self._set = ShardSet.open(self._set.url, version=version)
        except FormatError:
            return  # the comparison that follows says what is wrong
        self._order = Order(
            self._set.samples, seed=self._seed, lanes=self._order.lanes, block=self._order.block
        )

    def stats(self) -> LoaderStats:
        return LoaderStats(
            samples=self._samples,
            replaced=self._replaced,
            read_bytes=self._stream.read_bytes if self._stream else 0,
            read_requests=self._stream.read_requests if self._stream else 0,
            read_wait_s=self._read_wait_s,
            decode_s=max(0.0, self._making_s - self._read_wait_s),
            batch_wait_s=self._batch_wait_s,
        )

    def quarantined(self) -> list[BadSample]:
        """The samples that this rank had to replace so far, those read ahead included."""
        return self._quarantine.records()

    def close(self) -> None:
        self._closed = True
        if self._stream is not None:
            self._stream.close()
        if self._ahead is not None and not self._ahead.close(timeout_s=_CLOSE_S):
            logger.warning("the thread that makes views did not end in %g s", _CLOSE_S)

    def _identity(self) -> dict[str, Any]:
        """What must be the same for a saved position to mean anything; the world is not in it."""
        return {
            "format": STATE_FORMAT,
            "set_id": self._set.set_id,
            "version": self._set.version,
            "algorithm": ALGORITHM,
            "seed": self._seed,
            "lanes": self._order.lanes,
            "block": self._order.block,
        }

    def _advance(self) -> None:
        self._consumed += self._config.global_batch_size
        self._position += self._config.global_batch_size
        if self._consumed == self._order.epoch_length:
            self._epoch, self._consumed = self._epoch + 1, 0

    def _open_stream(self) -> Stream:
        return Stream(
            self._set,
            self._needs(self._epoch, self._consumed, self._position),
            block=self._config.block_samples,
            seed=self._seed,
            prefetch_batches=self._config.prefetch_batches,
            buffer_bytes=self._config.buffer_bytes,
            wait_timeout_s=self._config.wait_timeout_s,
            quarantine=self._quarantine,
            on_bad="replace",
        )

    def _needs(self, epoch: int, consumed: int, position: int) -> Iterator[Need]:
        """This rank's part of every global batch from here on, epoch after epoch."""
        while True:
            before = position - consumed  # positions of the epochs before this one
            for batch in range(consumed // self._config.global_batch_size, self.steps_per_epoch):
                start, stop = rank_positions(
                    batch,
                    global_batch_size=self._config.global_batch_size,
                    rank=self._rank,
                    world_size=self._world_size,
                )
                shards, members = self._order.samples(epoch, start, stop)
                places = np.arange(start, stop, dtype=np.int64)
                yield Need(
                    positions=before + places,
                    lanes=places % self._order.lanes,
                    shards=shards,
                    members=members,
                )
            epoch, consumed = epoch + 1, 0
            position = before + self._order.epoch_length

    def _make(self, stream: Stream) -> Generator[tuple[EncodedBatch, Views], None, None]:
        """Views of the stream's batches, with the time that reading and making them took."""
        with closing(self._maker.make(self._timed(stream), stream.repair)) as made:
            while True:
                began = time.perf_counter()
                item = next(made, None)
                if item is None:
                    return
                self._making_s += time.perf_counter() - began
                yield item

    def _timed(self, stream: Stream) -> Iterator[EncodedBatch]:
        while True:
            began = time.perf_counter()
            try:
                batch = next(stream)
            except StopIteration:
                return
            self._read_wait_s += time.perf_counter() - began
            yield batch


_ADVICE = {
    "format": "it was saved by another version of this program",
    "set_id": "the shards have changed; start a new run, or point data.shards at the old set",
    "version": "the shard set has no such version (any more); start a new run",
    "algorithm": "it was saved by another version of this program",
    "seed": "continue with the seed that the run was started with",
    "lanes": "keep data.lanes_per_slot x data.global_batch_size as it was",
    "block": "keep data.block_samples as it was",
}


def iterate_once(
    shard_set: ShardSet,
    *,
    ordinals: NDArray[np.int64] | None,
    view_size: int,
    batch_size: int,
    loader: Literal["auto", "dali", "torch"],
    num_threads: int,
    device_index: int | None,
) -> Generator[tuple[NDArray[np.int64], Tensor], None, None]:
    """Every sample once, in ordinal order, as the evaluation view: sample ids and N x 3 x S x S.

    The view is the middle of the image, resized and normalised as training views are. Bad samples
    are left out, with a warning each and a count at the end; a batch may be smaller for it.

    Args:
        ordinals: the sample ids wanted, in any order; None for all.
        num_threads: decoding threads; 0 for the cores of this machine.

    Raises:
        StoreError, StalledError
    """
    wanted = None if ordinals is None else np.unique(ordinals)
    count = shard_set.num_samples if wanted is None else len(wanted)
    # A block is one request; where few are wanted, the samples between them are not worth reading.
    block = _EVALUATION_BLOCK if count * 8 >= shard_set.num_samples else 1
    quarantine = Quarantine(max_bad_frac=1.0)
    maker = _view_maker(
        _evaluation_draw,
        loader=loader,
        batch_size=batch_size,
        num_views=1,
        view_size=view_size,
        colour=False,
        num_threads=num_threads or _threads_of_a_rank(1, device_index),
        device_index=device_index,
    )
    stream = Stream(
        shard_set,
        _ordinal_needs(shard_set, wanted, batch_size),
        block=block,
        seed=0,
        prefetch_batches=2,
        buffer_bytes=_EVALUATION_BUFFER_BYTES,
        wait_timeout_s=_EVALUATION_TIMEOUT_S,
        quarantine=quarantine,
        on_bad="drop",
    )
    try:
        non_empty = (batch for batch in stream if len(batch))
        with closing(maker.make(non_empty, stream.repair)) as made:
            for batch, (view,) in made:
                yield batch.sample_ids, view
    finally:
        stream.close()
    if quarantine.records():
        logger.warning(
            "%d of %d samples of %s could not be used",
            len(quarantine.records()), count, shard_set.url,
        )  # fmt: skip


_EVALUATION_BLOCK = 64


def _evaluation_draw(
    _positions: NDArray[np.int64], sizes: NDArray[np.int32]
) -> tuple[ViewParams, ...]:
    return (evaluation_views(sizes),)


def _ordinal_needs(
    shard_set: ShardSet, ordinals: NDArray[np.int64] | None, batch_size: int
) -> Iterator[Need]:
    shards = members = np.zeros(0, dtype=np.int64)
    start = 0
    for shard, found in _live_members(shard_set, ordinals):
        shards = np.append(shards, np.full(len(found), shard))
        members = np.append(members, found)
        is_last = shard == len(shard_set.names) - 1
        while len(members) >= batch_size or (is_last and len(members)):
            part = members[:batch_size]
            yield Need(
                positions=np.arange(start, start + len(part), dtype=np.int64),
                lanes=np.zeros(len(part), dtype=np.int64),  # one lane: it walks through the set
                shards=shards[:batch_size],
                members=part,
            )
            start += len(part)
            shards, members = shards[batch_size:], members[batch_size:]


def _live_members(
    shard_set: ShardSet, ordinals: NDArray[np.int64] | None
) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Of every shard the numbers of the live samples that are wanted, ascending; all for None."""
    for shard, first in enumerate(shard_set.first_ordinal.tolist()):
        if ordinals is None:
            yield shard, np.arange(shard_set.samples[shard])
            continue
        low, high = np.searchsorted(ordinals, [first, first + shard_set.slots[shard]])
        if low == high:
            yield shard, np.zeros(0, dtype=np.int64)
            continue
        is_wanted = np.isin(shard_set.index(shard).position, ordinals[low:high] - first)
        yield shard, np.flatnonzero(is_wanted)


def _view_maker(
    draw: Draw,
    *,
    loader: Literal["auto", "dali", "torch"],
    batch_size: int,
    num_views: int,
    view_size: int,
    colour: bool,
    num_threads: int,
    device_index: int | None,
) -> ViewMaker:
    has_dali = importlib.util.find_spec("nvidia") is not None and (
        importlib.util.find_spec("nvidia.dali") is not None
    )
    if loader == "dali" or (loader == "auto" and has_dali):
        # Deferred: --help and the torch path must work without DALI.
        from pipelines.dali_loader import DaliViews

        logger.info("views by DALI on %s", "the CPU" if device_index is None else "the GPU")
        return DaliViews(
            draw,
            batch_size=batch_size,
            num_views=num_views,
            view_size=view_size,
            colour=colour,
            num_threads=num_threads,
            device_index=device_index,
        )
    # Deferred: torchvision takes a second to import, and is not needed beside DALI.
    from pipelines.torch_loader import TorchViews

    logger.info("views by Pillow and torchvision on the CPU")
    return TorchViews(draw, view_size=view_size, num_threads=num_threads, device_index=device_index)


def _threads_of_a_rank(world_size: int, device_index: int | None) -> int:
    """The cores of this machine divided by its ranks: one a GPU, or else all of them."""
    ranks = world_size if device_index is None else min(world_size, torch.cuda.device_count())
    return max(1, len(os.sched_getaffinity(0)) // max(1, ranks))
