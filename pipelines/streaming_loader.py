"""Order, stream and views joined into a loader; and a way to see every sample once."""

import logging
import os
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pipelines.ahead import Ahead
from pipelines.config import DataConfig
from pipelines.errors import OrderError, StalledError, StateError
from pipelines.loader import Batch, Loader
from pipelines.mixture import Mixture, Place
from pipelines.order import ALGORITHM, rank_positions
from pipelines.quarantine import BadSample, Quarantine
from pipelines.spans import VIEWS, Spans
from pipelines.stats import LoaderStats, StageStats, StreamStats
from pipelines.stream import EncodedBatch, Need, Source, Stream
from pipelines.synthetic import HeadspaceLoader, SyntheticLoader
from pipelines.view_maker import ToDevice, ViewMaker, Views, open_view_maker
from pipelines.views import Draw, ViewParams, evaluation_views, pair_of_views
from shards import ShardSet
from shards.errors import ShardError

logger = logging.getLogger(__name__)
T = TypeVar("T")

STATE_FORMAT = 2
_CLOSE_S = 10.0
_STORE_PART = 0.7
"""Of the longest wait for a batch: the store gives up before, and says what was wrong. Training's
stores get it of `data.wait_timeout_s`; an evaluation waits as much longer than its shard set's."""
_EVALUATION_BUFFER_BYTES = 1 << 29
_EVALUATION_MAX_PIXELS = DataConfig().max_pixels


def open_loader(
    config: DataConfig,
    *,
    seed: int,
    rank: int,
    world_size: int,
    device_index: int | None,
    local_world_size: int | None = None,
    agree: Callable[[T], T] | None = None,
    spans: Spans | None = None,
    to_device: ToDevice | None = None,
) -> Loader:
    """Two views of each sample of a shard set, in an order that the seed alone decides.

    Args:
        seed: of the order, the views and the substitutes.
        device_index: the GPU that decodes and holds the views; None for the CPU.
        local_world_size: ranks on this machine, which share its cores; None: all of them.
        agree: gives every rank what rank 0 passes to it; all ranks call it at the same steps.
            Without it a world of several ranks stays with the versions of the shard sets that it
            began with, and must have begun with the same.
        spans: take what the loader's threads do, while they are recording.
        to_device: how the CPU path's views go to the device, instead of `Tensor.to`.

    Raises:
        FormatError: there is no shard set at an address of `config.shards`.
        OrderError: too few samples, or a world that cannot share the global batch.
    """
    start, stop = rank_positions(
        0, global_batch_size=config.global_batch_size, rank=rank, world_size=world_size
    )
    if config.mode == "synthetic":
        return SyntheticLoader(
            config, seed=seed, rank=rank, world_size=world_size, device_index=device_index
        )
    if not config.shards:
        raise OrderError("no shard set: data.shards is empty")
    if agree is None and world_size == 1:
        agree = _same
    mixture = open_mixture(config, seed=seed, agree=agree, follow=agree is not None)
    maker = open_training_maker(
        config,
        pair_of_views(config, seed=seed),
        batch_size=stop - start,
        num_views=2,
        num_threads=config.num_threads or threads_of_a_rank(local_world_size or world_size),
        device_index=device_index,
        spans=spans,
        to_device=to_device,
    )
    loader = StreamingLoader(
        mixture,
        maker,
        config=config,
        seed=seed,
        rank=rank,
        world_size=world_size,
        agree=agree,
        spans=spans,
    )
    if config.mode == "headspace":
        return HeadspaceLoader(loader, global_batch_size=config.global_batch_size)
    return loader


def open_mixture(
    config: DataConfig, *, seed: int, agree: Callable[[Any], Any] | None, follow: bool
) -> Mixture:
    """The shard sets of the settings, and which of their samples stands where.

    Args:
        follow: whether each epoch's versions are going to be decided on (`Mixture.decide`).
    """
    return Mixture(
        _open_alike(config.shards, agree, deadline_s=_STORE_PART * config.wait_timeout_s),
        weights=config.weights,
        seed=seed,
        lanes=config.lanes_per_slot * config.global_batch_size,
        block=config.block_samples,
        follow=follow,
    )


def open_training_maker(
    config: DataConfig,
    draw: Draw,
    *,
    batch_size: int,
    num_views: int,
    num_threads: int,
    device_index: int | None,
    spans: Spans | None,
    to_device: ToDevice | None,
) -> ViewMaker:
    """What makes views as the settings want them."""
    return open_view_maker(
        draw,
        loader=config.loader,
        batch_size=batch_size,
        num_views=num_views,
        view_size=config.view_size,
        colour=config.colour,
        view_dtype=config.view_dtype,
        num_threads=num_threads,
        device_index=device_index,
        hw_decoder_load=config.hw_decoder_load,
        spans=spans,
        to_device=to_device,
    )


def open_stream(
    mixture: Mixture,
    place: Place,
    *,
    config: DataConfig,
    seed: int,
    rank: int,
    world_size: int,
    quarantine: Quarantine,
    spans: Spans | None,
) -> Stream:
    """This rank's part of every global batch from a place on, encoded; it is being read already."""
    return Stream(
        mixture.sources,
        needs(mixture, place, config=config, rank=rank, world_size=world_size),
        num_lanes=mixture.lanes // world_size,
        block=config.block_samples,
        seed=seed,
        prefetch_batches=config.prefetch_batches,
        buffer_bytes=config.buffer_bytes,
        max_pixels=config.max_pixels,
        wait_timeout_s=config.wait_timeout_s,
        quarantine=quarantine,
        on_bad="replace",
        read_threads=config.read_threads,
        spans=spans,
    )


def needs(
    mixture: Mixture, place: Place, *, config: DataConfig, rank: int, world_size: int
) -> Iterator[Need]:
    """This rank's part of every global batch from a place on, epoch after epoch."""
    size = config.global_batch_size
    start, stop = rank_positions(0, global_batch_size=size, rank=rank, world_size=world_size)
    while True:
        yield mixture.need(place, start, stop)
        place = mixture.after(place, size, timeout_s=config.wait_timeout_s)


def _same(value: T) -> T:
    return value


def _open_alike(
    urls: tuple[str, ...], agree: Callable[[Any], Any] | None, *, deadline_s: float
) -> list[ShardSet]:
    """The shard sets, at the versions that rank 0 found."""
    found = [ShardSet.open(url, deadline_s=deadline_s) for url in urls]
    if agree is None:
        return found
    versions = agree([one.version for one in found])
    return [
        one if one.version == version else one.at(version)
        for one, version in zip(found, versions, strict=True)
    ]


class StreamingLoader:
    """A `Loader` over shard sets. Reading starts at the first batch asked for."""

    def __init__(
        self,
        mixture: Mixture,
        maker: ViewMaker,
        *,
        config: DataConfig,
        seed: int,
        rank: int,
        world_size: int,
        agree: Callable[[Any], Any] | None,
        spans: Spans | None = None,
    ) -> None:
        self._mixture = mixture
        self._spans = spans
        self._maker = maker
        self._config = config
        self._seed = seed
        self._rank = rank
        self._world_size = world_size
        self._agree = agree
        self._quarantine = Quarantine(max_bad_frac=config.max_bad_frac, world_size=world_size)
        self._place = mixture.start()
        self._samples = 0
        self._replaced = 0
        self._batch_wait_s = 0.0
        self._stream: Stream | None = None
        self._ahead: Ahead[tuple[EncodedBatch, Views]] | None = None
        self._closed = False

    @property
    def num_ids(self) -> int:
        return self._mixture.num_ids

    @property
    def images(self) -> int:
        return self._place.position

    @property
    def epoch(self) -> int:
        return self._place.epoch

    @property
    def step_in_epoch(self) -> int:
        return (self._place.position - self._place.epoch_began) // self._config.global_batch_size

    @property
    def steps_per_epoch(self) -> int:
        return self._place.epoch_length // self._config.global_batch_size

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
        self._decide_versions()
        if self._stream is None or self._ahead is None:
            self._stream = open_stream(
                self._mixture,
                self._place,
                config=self._config,
                seed=self._seed,
                rank=self._rank,
                world_size=self._world_size,
                quarantine=self._quarantine,
                spans=self._spans,
            )
            self._ahead = Ahead(
                self._maker.make(self._stream, self._stream.repair),
                size=max(1, self._config.prefetch_batches),
                name=VIEWS,
                spans=self._spans,
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
        epochs_of_sets = [one.epoch for one in self._place.sets]
        self._place = self._mixture.after(self._place, self._config.global_batch_size)
        if [one.epoch for one in self._place.sets] != epochs_of_sets:
            self._mixture.forget_before(self._place)
        return Batch(
            view_q=view_q,
            view_k=view_k,
            sample_ids=encoded.sample_ids,
            positions=encoded.positions,
            replaced=self._replaced_in(encoded),
        )

    def _replaced_in(self, encoded: EncodedBatch) -> tuple[BadSample, ...]:
        if not encoded.num_replaced:
            return ()
        here = set(encoded.positions.tolist())
        return tuple(one for one in self._quarantine.records() if one.position in here)

    def state_dict(self) -> dict[str, Any]:
        place = self._place
        return {
            **self._identity(),
            "position": place.position,
            "epoch": place.epoch,
            "epoch_began": place.epoch_began,
            "epoch_length": place.epoch_length,
            "sets": self._mixture.state_dict(place),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert self._stream is None, "a position is loaded before the first batch"
        for name, ours in self._identity().items():
            if state.get(name) != ours:
                raise StateError(
                    f"the saved position has {name} {state.get(name)!r}, this run has {ours!r}: "
                    f"{_ADVICE[name]}"
                )
        size = self._config.global_batch_size
        if state["position"] % size:
            raise StateError(
                f"the saved position is after {state['position']} samples, not a multiple of "
                f"data.global_batch_size {size}; choose one that divides it"
            )
        self._place = Place(
            position=state["position"],
            epoch=state["epoch"],
            epoch_began=state["epoch_began"],
            epoch_length=state["epoch_length"],
            sets=self._mixture.load_state_dict(state["sets"]),
        )

    def stats(self) -> LoaderStats:
        return LoaderStats(
            samples=self._samples,
            replaced=self._replaced,
            batch_wait_s=self._batch_wait_s,
            stages=self._stages(),
            stream=self._stream.stats() if self._stream is not None else StreamStats.none(),
        )

    def _stages(self) -> tuple[StageStats, ...]:
        if self._stream is None or self._ahead is None:
            return ()
        views = self._ahead.stats(wait_for_input_s=self._stream.taker_waited_s)
        return (self._stream.stage_stats(), views)

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
            "algorithm": ALGORITHM,
            "seed": self._seed,
            "lanes": self._mixture.lanes,
            "block": self._config.block_samples,
        }

    def _decide_versions(self) -> None:
        """Some batches before a set's next epoch: take its newest version into it, on all ranks.

        Which step that is follows from the place alone, so every rank comes here at the same one.
        It is further ahead than anything is read, so that reading does not wait for it.
        """
        if self._agree is None:
            return
        batches = _DECIDED_AHEAD + 4 * self._config.prefetch_batches
        within = batches * self._config.global_batch_size
        newest: dict[int, int] | None = None
        while due := self._mixture.undecided(self._place, within=within):
            if newest is None:
                newest = self._agree(self._newest() if self._rank == 0 else None)
            self._mixture.decide({(number, epoch): newest[number] for number, epoch in due})

    def _newest(self) -> dict[int, int]:
        """The newest version of each set; the last that was decided where it cannot be had."""
        versions = {}
        for number, known in enumerate(self._mixture.shard_sets):
            # Not the one of now: what was decided for an epoch to come is not to be taken back.
            versions[number] = now = self._mixture.last_decided(self._place, number)
            try:
                found = known.at(None)
            except ShardError as err:
                logger.warning(
                    "the next epoch of %s stays with version %d: %s", known.url, now, err
                )
                continue
            if found.set_id != known.set_id:
                logger.warning(
                    "another shard set lies at %s now; the run stays with version %d of its own",
                    known.url, now,
                )  # fmt: skip
            elif found.version > now:
                logger.info("%s: version %d from an epoch to come on", known.url, found.version)
                versions[number] = found.version
        return versions


_DECIDED_AHEAD = 40  # more than the stream plans
_ADVICE = {
    "format": "it was saved by another version of this program",
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
    loader: Literal["auto", "dali", "cpu"],
    num_threads: int,
    device_index: int | None,
    local_world_size: int = 1,
    shards: Sequence[int] | None = None,
    quarantine: Quarantine | None = None,
) -> Generator[tuple[NDArray[np.int64], Tensor], None, None]:
    """Every sample once, in ordinal order, as the evaluation view: sample ids and N x 3 x S x S.

    The view is the middle of the image, resized and normalised as training views are. Bad samples
    are left out, with a warning each and a count at the end; a batch may be smaller for it.

    Args:
        ordinals: the sample ids wanted, in any order; None for all.
        num_threads: decoding threads; 0 for the cores of this machine divided by its ranks.
        local_world_size: ranks on this machine that do this at the same time.
        shards: numbers of the shards wanted, whole, and one after another; no batch holds samples
            of two. In place of `ordinals`, which for very many samples take memory.
        quarantine: gets the bad samples, those of a batch before the batch is given out.

    Raises:
        StoreError: the store failed for longer than the shard set was opened to bear.
        StalledError: it gave nothing for longer than that.
    """
    wanted = None if ordinals is None else np.unique(ordinals)
    count = shard_set.num_samples if wanted is None else len(wanted)
    needs = _ordinal_needs(shard_set, wanted, batch_size)
    if shards is not None:
        assert ordinals is None, "whole shards, or single samples"
        count = int(shard_set.samples[list(shards)].sum())
        needs = _shard_needs(shard_set, shards, batch_size)
    # A block is one request; where few are wanted, the samples between them are not worth reading.
    is_dense = shards is not None or count * 8 >= shard_set.num_samples
    block = _EVALUATION_BLOCK if is_dense else 1
    quarantine = quarantine or Quarantine(max_bad_frac=1.0, world_size=1)
    maker = open_view_maker(
        _evaluation_draw,
        loader=loader,
        batch_size=batch_size,
        num_views=1,
        view_size=view_size,
        colour=None,
        view_dtype="float32",
        num_threads=num_threads or threads_of_a_rank(local_world_size),
        device_index=device_index,
    )
    stream = Stream(
        {0: Source(shard_set=shard_set, first_id=0)},
        needs,
        num_lanes=1,
        block=block,
        seed=0,
        prefetch_batches=2,
        buffer_bytes=_EVALUATION_BUFFER_BYTES,
        max_pixels=_EVALUATION_MAX_PIXELS,
        wait_timeout_s=shard_set.deadline_s / _STORE_PART,
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
                sources=np.zeros(len(part), dtype=np.int64),
                shards=shards[:batch_size],
                members=part,
            )
            start += len(part)
            shards, members = shards[batch_size:], members[batch_size:]


def _shard_needs(shard_set: ShardSet, shards: Sequence[int], batch_size: int) -> Iterator[Need]:
    start = 0
    for shard in shards:
        count = int(shard_set.samples[shard])
        for first in range(0, count, batch_size):
            members = np.arange(first, min(first + batch_size, count), dtype=np.int64)
            nothing = np.zeros(len(members), dtype=np.int64)
            yield Need(
                positions=np.arange(start, start + len(members), dtype=np.int64),
                lanes=nothing,
                sources=nothing,
                shards=nothing + shard,
                members=members,
            )
            start += len(members)


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


def threads_of_a_rank(local_world_size: int) -> int:
    """The cores of this machine divided by its ranks."""
    return max(1, len(os.sched_getaffinity(0)) // local_world_size)
