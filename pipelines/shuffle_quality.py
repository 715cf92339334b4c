"""How well an order of the samples is shuffled, in numbers, beside a uniform one and none at all.

Contrastive learning suffers when images that lay side by side in storage meet in one batch, in one
queue, or again and again. What "side by side" means is a `Neighbours`: the same shard, or a few
objects next to each other in the bucket.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from random import Random
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from pipelines.order import Order

T = TypeVar("T")
Integers = NDArray[np.int64]

WHOLE_SAMPLES = 1 << 23
"""Larger epochs are not looked at as a whole, but in evenly spaced windows."""
_WINDOW_SAMPLES = 1 << 20  # looked at in each epoch, in windows of a queue's length
_FEWEST_WINDOWS = 4
_MOST_BINS, _BIN_SAMPLES = 64, 8  # of the chi-square: so many samples of a batch a bin, expected


@dataclass(frozen=True, kw_only=True, slots=True)
class Batches:
    """How the positions of an epoch fall into global batches and ranks."""

    global_batch_size: int
    world_size: int
    queue_size: int
    """Keys of earlier samples that a query is told apart from."""

    @property
    def batch_size(self) -> int:
        return self.global_batch_size // self.world_size

    @property
    def queue_batches(self) -> int:
        """Global batches that the queue holds, one at least."""
        return max(1, self.queue_size // self.global_batch_size)


class Served(Protocol):
    """Which samples an epoch serves, by their number in storage order, 0 to num_samples - 1."""

    num_samples: int
    epoch_length: int

    def numbers(self, epoch: int, start: int, stop: int) -> Integers:
        """The samples at positions [start, stop) of an epoch."""


class ByOrder:
    """What an `Order` serves."""

    def __init__(self, order: Order, shard_samples: Integers) -> None:
        self._order = order
        self._first = np.cumsum(shard_samples) - shard_samples
        self.num_samples = int(shard_samples.sum())
        self.epoch_length = order.epoch_length

    def numbers(self, epoch: int, start: int, stop: int) -> Integers:
        shards, members = self._order.samples(epoch, start, stop)
        return self._first[shards] + members


class Sequential:
    """Storage order, the same in each epoch."""

    def __init__(self, num_samples: int, *, epoch_length: int) -> None:
        self.num_samples = num_samples
        self.epoch_length = epoch_length

    def numbers(self, epoch: int, start: int, stop: int) -> Integers:
        del epoch
        return np.arange(start, stop, dtype=np.int64)


class Uniform:
    """A random permutation each epoch; of more than WHOLE_SAMPLES, draws with replacement."""

    def __init__(self, num_samples: int, *, epoch_length: int, seed: int) -> None:
        self.num_samples = num_samples
        self.epoch_length = epoch_length
        self._seed = seed
        self._drawn: tuple[int, Integers] | None = None

    def numbers(self, epoch: int, start: int, stop: int) -> Integers:
        if self.num_samples > WHOLE_SAMPLES:
            rng = np.random.default_rng((self._seed, epoch, start))
            return rng.integers(self.num_samples, size=stop - start)
        if self._drawn is None or self._drawn[0] != epoch:
            rng = np.random.default_rng((self._seed, epoch))
            self._drawn = epoch, rng.permutation(self.num_samples)
        return self._drawn[1][start:stop]


class Recorded:
    """What some other loader served, epoch by epoch."""

    def __init__(self, epochs: Sequence[Integers], *, num_samples: int) -> None:
        self.num_samples = num_samples
        self.epoch_length = min(len(epoch) for epoch in epochs)
        self._epochs = epochs

    def numbers(self, epoch: int, start: int, stop: int) -> Integers:
        return self._epochs[epoch][start:stop]


@dataclass(frozen=True, kw_only=True, slots=True)
class Neighbours:
    """Samples that lay side by side: groups of consecutive places."""

    ends: Integers
    """The place after each group's last, ascending."""
    places: Integers | None
    """Of each sample by its number; None: the number itself."""

    @classmethod
    def of_shards(cls, shard_samples: Integers) -> "Neighbours":
        """The samples of a shard."""
        return cls(ends=np.cumsum(shard_samples), places=None)

    @classmethod
    def in_rows_of(cls, length: int, places: Integers) -> "Neighbours":
        """So many samples with consecutive places; the last group may have fewer."""
        ends = np.append(np.arange(length, len(places), length), len(places))
        return cls(ends=ends.astype(np.int64), places=places)

    def place(self, numbers: Integers) -> Integers:
        return numbers if self.places is None else self.places[numbers]

    def group(self, numbers: Integers) -> Integers:
        return np.searchsorted(self.ends, self.place(numbers), side="right").astype(np.int64)

    def chance(self) -> float:
        """That two samples drawn at random are of one group."""
        sizes = np.diff(self.ends, prepend=0).astype(np.float64)
        return float((sizes * (sizes - 1)).sum() / (sizes.sum() * (sizes.sum() - 1)))


@dataclass(frozen=True, kw_only=True, slots=True)
class Mixing:
    """How neighbours are kept apart. An excess is how often two samples are neighbours, over how
    often two of a uniform permutation are: 1 is ideal. None: it cannot be told."""

    pairs_global: float | None
    """Excess in a global batch."""
    pairs_rank: float | None
    """Excess in a rank's part of it."""
    pairs_queue: float | None
    """Excess over as many consecutive global batches as the queue holds."""
    groups_global: float
    """Groups (shards) that a global batch comes from."""
    groups_rank: float
    chi_square: float
    """Of the places in a global batch, over its degrees of freedom: 1 if they are random, less if
    they are more even than that, more if they crowd."""
    lag_1: float
    """Correlation of a sample's place with that of the next one: 0 is ideal, 1 is storage order."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Epochs:
    """What whole epochs show."""

    mates: float | None
    """How often two samples of a global batch meet again in the next epoch, over chance."""
    reach: float
    """Different samples that a rank sees in all epochs, over the samples that it takes."""
    live_shards: int
    """Most shards that are begun and not finished at one time."""
    live_blocks: int
    """Most blocks that a rank holds, if it holds each from its first use to its last."""
    read_amplification: float
    """Samples in the blocks that each rank reads, over the samples it takes, if it holds each block
    from its first use to its last. (The stream lets a block go when a lane has left it, so it reads
    the block at the border of two lanes twice.)"""


def mixing(served: Served, neighbours: Neighbours, batches: Batches, *, epochs: int) -> Mixing:
    """Measured in the first `epochs` epochs: all of their batches, or some 2^20 samples of each."""
    size = batches.global_batch_size
    chance = neighbours.chance()
    windows = list(_windows(served, batches, epochs))
    groups = [neighbours.group(window) for window in windows]
    places = [neighbours.place(window) for window in windows]
    of_parts = {}
    for part in (size, batches.batch_size, len(windows[0])):
        found = [_pairs(one, part, len(neighbours.ends)) for one in groups]
        possible = sum(len(one) * (part - 1) for one in groups)
        pairs, distinct = (sum(counted) for counted in zip(*found, strict=True))
        excess = pairs / possible / chance if possible and chance else None
        of_parts[part] = excess, distinct * part / sum(len(one) for one in groups)
    last = served.num_samples - 1
    products = [(one[:-1] - last / 2) * (one[1:] - last / 2) for one in places if len(one) > 1]
    variance = last * (last + 2) / 12
    return Mixing(
        pairs_global=of_parts[size][0],
        pairs_rank=of_parts[batches.batch_size][0],
        pairs_queue=of_parts[len(windows[0])][0],
        groups_global=of_parts[size][1],
        groups_rank=of_parts[batches.batch_size][1],
        chi_square=float(
            np.mean([_chi_square(one.reshape(-1, size), served.num_samples) for one in places])
        ),
        lag_1=float(np.mean(np.concatenate(products)) / variance) if products else 0.0,
    )


def _windows(served: Served, batches: Batches, epochs: int) -> Iterator[Integers]:
    """Runs of as many global batches as the queue holds, evenly spaced over each epoch."""
    size = batches.global_batch_size
    available = served.epoch_length // size
    assert available, "an order serves one global batch at least"
    length = min(batches.queue_batches, available)
    wanted = max(_FEWEST_WINDOWS, _WINDOW_SAMPLES // (length * size))
    count = min(wanted, available // length)
    for epoch in range(epochs):
        for first in np.linspace(0, available - length, count).astype(int).tolist():
            yield served.numbers(epoch, first * size, (first + length) * size)


def _pairs(groups: Integers, part: int, num_groups: int) -> tuple[int, int]:
    """Ordered pairs of one group in the same part, and groups in a part summed over the parts."""
    keys = np.arange(len(groups)) // part * num_groups + groups
    _, counts = np.unique(keys, return_counts=True)
    return int((counts * (counts - 1)).sum()), len(counts)


def _chi_square(places: Integers, num_samples: int) -> float:
    """Mean over the batches (rows) of chi-square over its degrees of freedom."""
    count, size = places.shape
    bins = min(_MOST_BINS, max(2, size // _BIN_SAMPLES), num_samples)
    if bins < 2:
        return 0.0
    begins = -(-np.arange(bins + 1) * num_samples // bins)
    expected = size * np.diff(begins) / num_samples
    keys = np.arange(count)[:, np.newaxis] * bins + places * bins // num_samples
    seen = np.bincount(keys.ravel(), minlength=count * bins).reshape(count, bins)
    return float(((seen - expected) ** 2 / expected).sum(axis=1).mean() / (bins - 1))


def over_epochs(
    served: Served, shard_samples: Integers, batches: Batches, *, block: int, epochs: int
) -> Epochs | None:
    """Measured over whole epochs; None if they are too large for that (WHOLE_SAMPLES)."""
    size, world_size = batches.global_batch_size, batches.world_size
    length = served.epoch_length // size * size
    if served.num_samples > WHOLE_SAMPLES:
        return None
    position = np.arange(length)
    batch, rank = position // size, position % size // batches.batch_size
    drawn = [served.numbers(epoch, 0, length) for epoch in range(epochs)]
    shard_of = np.repeat(np.arange(len(shard_samples)), shard_samples)
    block_of, block_samples = _blocks(shard_samples, block)
    live_shards = live_blocks = read = 0
    for numbers in drawn:
        _, first, last = _lives(shard_of[numbers], position)
        live_shards = max(live_shards, _most_live(first, last))
        keys, first, last = _lives(rank * len(block_samples) + block_of[numbers], batch)
        read += int(block_samples[keys % len(block_samples)].sum())
        cuts = np.searchsorted(keys, np.arange(world_size + 1) * len(block_samples)).tolist()
        for begin, end in pairwise(cuts):
            live_blocks = max(live_blocks, _most_live(first[begin:end], last[begin:end]))
    of_ranks = np.concatenate([rank * served.num_samples + numbers for numbers in drawn])
    again = [
        _mates(*pair, batch_size=size, num_samples=served.num_samples) for pair in pairwise(drawn)
    ]
    known = [one for one in again if one is not None]
    return Epochs(
        mates=float(np.mean(known)) if known else None,
        reach=len(np.unique(of_ranks)) / len(of_ranks),
        live_shards=live_shards,
        live_blocks=live_blocks,
        read_amplification=read / len(of_ranks),
    )


def _blocks(shard_samples: Integers, block: int) -> tuple[Integers, Integers]:
    """The block of each sample, and how many samples each block has."""
    of_shard = -(-shard_samples // block)
    first_sample = np.cumsum(shard_samples) - shard_samples
    first_block = np.cumsum(of_shard) - of_shard
    member = np.arange(shard_samples.sum()) - np.repeat(first_sample, shard_samples)
    block_of = np.repeat(first_block, shard_samples) + member // block
    return block_of, np.bincount(block_of, minlength=int(of_shard.sum()))


def _lives(keys: Integers, when: Integers) -> tuple[Integers, Integers, Integers]:
    """Each key once, ascending, with its first and last entry in `when`, which ascends."""
    order = np.argsort(keys, kind="stable")
    found = keys[order]
    begins = np.flatnonzero(np.diff(found, prepend=-1))
    ends = np.append(begins[1:], len(found)) - 1
    return found[begins], when[order[begins]], when[order[ends]]


def _most_live(first: Integers, last: Integers) -> int:
    """Most intervals [first, last] that share a point: some beginning is one."""
    begun = np.arange(1, len(first) + 1)
    return int((begun - np.searchsorted(np.sort(last), np.sort(first))).max(initial=0))


def _mates(before: Integers, after: Integers, *, batch_size: int, num_samples: int) -> float | None:
    """How often samples of one batch of `before` meet in one of `after`, over chance."""
    batches = len(after) // batch_size
    batch_after = np.full(num_samples, -1, dtype=np.int64)
    batch_after[after] = np.arange(len(after)) // batch_size
    met = batch_after[before]
    is_there = met >= 0
    batch_before = np.arange(len(before)) // batch_size
    keys = batch_before[is_there] * batches + met[is_there]
    _, counts = np.unique(keys, return_counts=True)
    there = np.bincount(batch_before[is_there], minlength=batches)
    chance = (batch_size - 1) / (len(after) - 1)
    possible = float((there * (there - 1)).sum()) * chance
    return float((counts * (counts - 1)).sum()) / possible if possible else None


WEBDATASET_WORKERS, WEBDATASET_BUFFER, WEBDATASET_SHARDS = 8, 1000, 100
_WEBDATASET_INITIAL = 100


def webdataset_epoch(
    shard_samples: Integers, batches: Batches, *, seed: int, epoch: int
) -> Integers | None:
    """What webdataset 1.0's `WebDataset(shardshuffle=100).shuffle(1000)` serves by its own rules.

    Shards are dealt to the ranks, then to the 8 workers of each, and only then shuffled: with one
    seed in all epochs, which is its default. See `in_turns` for the batches. None if some rank
    gets none.
    """
    ends = np.cumsum(shard_samples).tolist()
    spans = [range(e - count, e) for e, count in zip(ends, shard_samples.tolist(), strict=True)]

    def samples_of(rank: int, worker: int) -> Iterator[int]:
        dealt = spans[rank :: batches.world_size][worker::WEBDATASET_WORKERS]
        shards = _through_buffer(iter(dealt), WEBDATASET_SHARDS, Random(seed))
        samples = (number for span in shards for number in span)
        draw = Random(webdataset_seed(seed=seed, epoch=epoch, rank=rank, worker=worker))
        return _through_buffer(samples, WEBDATASET_BUFFER, draw)

    return in_turns(samples_of, batches)


def webdataset_seed(*, seed: int, epoch: int, rank: int, worker: int) -> str:
    """Of a worker's sample buffer; webdataset takes the clock."""
    return f"{seed} {epoch} {rank} {worker}"


def in_turns(samples_of: Callable[[int, int], Iterator[int]], batches: Batches) -> Integers | None:
    """The global batches that come of a data loader in each rank, as one row of sample numbers.

    A batch of a rank is of one worker; workers take turns, those that have no whole batch left
    drop out. Batches that some rank has not are left out; None if that leaves none.

    Args:
        samples_of: of a rank and its worker, in order.
    """
    ranks = []
    for rank in range(batches.world_size):
        parts = []
        for worker in range(WEBDATASET_WORKERS):
            samples = np.fromiter(samples_of(rank, worker), dtype=np.int64)
            whole = samples[: len(samples) // batches.batch_size * batches.batch_size]
            parts.append(whole.reshape(-1, batches.batch_size))
        turn = np.concatenate([np.arange(len(part)) for part in parts])
        ranks.append(np.concatenate(parts)[np.argsort(turn, kind="stable")])
    steps = min(len(rank) for rank in ranks)
    return np.concatenate([rank[:steps] for rank in ranks], axis=1).ravel() if steps else None


def _through_buffer(items: Iterator[T], size: int, draw: Random) -> Iterator[T]:
    """webdataset.filters.shuffle: until the buffer is full, two go in for each that comes out."""
    held: list[T] = []
    for item in items:
        held.append(item)
        if len(held) < size:
            held.extend(islice(items, 1))
        if len(held) >= min(_WEBDATASET_INITIAL, size):
            yield _taken(held, draw)
    while held:
        yield _taken(held, draw)


def _taken(held: list[T], draw: Random) -> T:
    place = draw.randint(0, len(held) - 1)
    held[place], taken = held[-1], held[place]
    held.pop()
    return taken
