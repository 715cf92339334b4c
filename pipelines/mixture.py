"""Several shard sets as one stream: each in lanes, an order, epochs and versions of its own."""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.errors import OrderError, StalledError, StateError
from pipelines.hashing import hash_words
from pipelines.order import Order
from pipelines.stream import Need, Source
from shards import ShardSet
from shards.errors import FormatError

_SETS = 6  # what the hash is for; see order.py, views.py and quarantine.py for the others
_IDS_PER_SET_BITS = 40


@dataclass(frozen=True, kw_only=True, slots=True)
class SetPlace:
    """Where the stream is in one of its shard sets."""

    version: int
    """Of the set, for the whole of this epoch."""
    epoch: int
    """Epochs of this set before this one."""
    began: int
    """Lane step of the stream at which this epoch began."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """A position in the stream; the same on every rank."""

    position: int
    """Samples of all ranks since the start of the run."""
    epoch: int
    epoch_began: int
    """Position at which the epoch began."""
    epoch_length: int
    """Its positions: the samples that all sets had when it began, less than a lane step missing."""
    sets: tuple[SetPlace, ...]


class Mixture:
    """Lane l of the stream is lane j of one of the sets, for the whole of a run.

    A set of weight w has w in so many of the lanes as its share comes to, spread evenly among the
    others', so every global batch holds the sets in the same proportion, and every rank's part
    nearly so. Each set goes through its own epochs; a lane step takes one sample of each lane. At
    the start of an epoch of its own a set may enter another version; `decide` says which.
    """

    def __init__(
        self,
        shard_sets: Sequence[ShardSet],
        *,
        weights: Sequence[float],
        seed: int,
        lanes: int,
        block: int,
        follow: bool,
    ) -> None:
        """Args:
            shard_sets: each at the version that its first epoch has.
            weights: relative; empty for the sets' numbers of samples.
            lanes: of all sets together.
            follow: whether `decide` is going to be called before each set's next epoch.

        Raises:
            OrderError: too few samples, or a set of so little weight that it gets no lane.
        """
        self._seed = seed
        self._block = block
        self._follow = follow
        self._opened: dict[tuple[int, int], _Opened] = {}
        self._decided: dict[tuple[int, int], int] = {}
        self._changed = threading.Condition()
        self._weights = tuple(weights)
        self._next_source = 0
        self.shard_sets = list(shard_sets)
        self.lanes = lanes
        self.sources: dict[int, Source] = {}
        """What `Need.sources` numbers: each version of each set that is in use."""
        self._deal([one.num_samples for one in shard_sets])

    def _deal(self, samples: Sequence[int]) -> None:
        # A set of no samples gets a lane, so that its order says what is wrong.
        weights = self._weights or [max(1, count) for count in samples]
        shares = share_lanes(self.lanes, weights)
        if not self._weights and len(shares) <= self.lanes:
            while 0 in shares:  # no set is so small beside the others that it is left out
                shares[shares.index(0)] += 1
                shares[shares.index(max(shares))] -= 1
        self._set_lanes(shares)
        for number in range(len(self.shard_sets)):
            if not self.lanes_of[number]:
                raise OrderError(
                    f"{self.shard_sets[number].url} gets none of the {self.lanes} lanes, so small "
                    "is its share; raise its data.weights, or data.lanes_per_slot"
                )
            self._opened_at(number, self.shard_sets[number].version)

    def _set_lanes(self, lanes_of: Sequence[int]) -> None:
        self.lanes_of = list(lanes_of)
        """How many lanes each set has."""
        self._lane_set = interleave(lanes_of)
        # How many lanes of each set lie before each lane.
        self._before = np.zeros((len(lanes_of), self.lanes + 1), dtype=np.int64)
        for number in range(len(lanes_of)):
            np.cumsum(self._lane_set == number, out=self._before[number, 1:])

    @property
    def num_ids(self) -> int:
        """Sample ids are below it, as long as no set grows."""
        sources = list(self.sources.values())
        return max(one.first_id + int(one.shard_set.slots.sum()) for one in sources)

    def start(self) -> Place:
        """The place before the first sample."""
        sets = tuple(SetPlace(version=one.version, epoch=0, began=0) for one in self.shard_sets)
        return Place(position=0, epoch=0, epoch_began=0, epoch_length=self._length(sets), sets=sets)

    def need(self, place: Place, start: int, stop: int) -> Need:
        """What stands at positions [start, stop) of the global batch that begins at `place`."""
        assert 0 <= start < stop <= self.lanes, "a global batch is at most one lane step"
        first_lane = place.position % self.lanes + start
        lanes = np.arange(first_lane, first_lane + stop - start, dtype=np.int64)
        owner = self._lane_set[lanes]
        sources, shards, members = (np.empty(len(lanes), dtype=np.int64) for _ in range(3))
        for number, one in enumerate(place.sets):
            low, high = self._before[number, [lanes[0], lanes[-1] + 1]].tolist()
            if low == high:
                continue
            opened = self._opened_at(number, one.version)
            step = place.position // self.lanes - one.began
            base = step * self.lanes_of[number]
            found = opened.order.samples(one.epoch, base + low, base + high)
            mine = owner == number
            sources[mine] = opened.source
            shards[mine], members[mine] = found
        return Need(
            positions=place.position + np.arange(start, stop, dtype=np.int64),
            lanes=lanes,
            sources=sources,
            shards=shards,
            members=members,
        )

    def after(self, place: Place, samples: int, *, timeout_s: float = 0.0) -> Place:
        """The place `samples` later; they must divide the lanes.

        Args:
            timeout_s: how long to wait for the version of an epoch that begins there.

        Raises:
            StalledError: it was not decided in that time.
        """
        position = place.position + samples
        if position % self.lanes:
            return replace(place, position=position)
        step = position // self.lanes
        sets = tuple(
            self._next_epoch(number, one, step, timeout_s)
            if step - one.began == self._lane_length(number, one.version)
            else one
            for number, one in enumerate(place.sets)
        )
        if position - place.epoch_began < place.epoch_length:
            return replace(place, position=position, sets=sets)
        return Place(
            position=position,
            epoch=place.epoch + 1,
            epoch_began=position,
            epoch_length=self._length(sets),
            sets=sets,
        )

    def undecided(self, place: Place, *, within: int) -> list[tuple[int, int]]:
        """Set and epoch of each epoch that begins within so many samples, its version not decided.

        Of each set the first such epoch alone: how long that is, and so when the one after it
        begins, only its version tells.
        """
        found = []
        for number, one in enumerate(place.sets) if self._follow else ():
            version, epoch, end = one.version, one.epoch, one.began
            while True:
                end += self._lane_length(number, version)
                epoch += 1
                if end * self.lanes - place.position > within:
                    break
                if (number, epoch) not in self._decided:
                    found.append((number, epoch))
                    break
                version = self._decided[number, epoch]
        return found

    def last_decided(self, place: Place, number: int) -> int:
        """The version that a set has in the last epoch that is decided on."""
        one = place.sets[number]
        return [one.version, *self._decided_after(number, one.epoch)][-1]

    def decide(self, versions: Mapping[tuple[int, int], int]) -> None:
        """Let an epoch of a set have a version, by set and epoch.

        Raises:
            FormatError: there is no such version.
            OrderError: it has fewer samples than the set has lanes.
        """
        for (number, epoch), version in versions.items():
            self._opened_at(number, version)
            with self._changed:
                self._decided[number, epoch] = version
                self._changed.notify_all()

    def forget_before(self, place: Place) -> None:
        """Let go of the versions and decisions that nothing from `place` on can need."""
        with self._changed:
            used = {(number, one.version) for number, one in enumerate(place.sets)}
            epochs = {number: one.epoch for number, one in enumerate(place.sets)}
            self._decided = {
                key: version for key, version in self._decided.items() if key[1] > epochs[key[0]]
            }
            used |= {(key[0], version) for key, version in self._decided.items()}
            for key in [key for key in self._opened if key not in used]:
                del self.sources[self._opened.pop(key).source]

    def state_dict(self, place: Place) -> list[dict[str, Any]]:
        """What a resume needs to know of each set."""
        return [
            {
                "set_id": self.shard_sets[number].set_id,
                "lanes": self.lanes_of[number],
                "version": one.version,
                "epoch": one.epoch,
                "began": one.began,
                "next_versions": self._decided_after(number, one.epoch),
            }
            for number, one in enumerate(place.sets)
        ]

    def _decided_after(self, number: int, epoch: int) -> list[int]:
        """Versions of the following epochs, as far as they are decided."""
        found: list[int] = []
        while (number, epoch + 1 + len(found)) in self._decided:
            found.append(self._decided[number, epoch + 1 + len(found)])
        return found

    def load_state_dict(self, saved: Sequence[Mapping[str, Any]]) -> tuple[SetPlace, ...]:
        """Go back to the versions, and the lanes, that a run had.

        Raises:
            StateError: these are other sets, or a version is gone.
        """
        if len(saved) != len(self.shard_sets):
            raise StateError(
                f"the saved position has {len(saved)} shard sets, this run has "
                f"{len(self.shard_sets)}: give the data.shards that the run was started with"
            )
        for number, one in enumerate(saved):
            ours = self.shard_sets[number]
            if one["set_id"] != ours.set_id:
                raise StateError(
                    f"the saved position has set_id {one['set_id']!r}, this run has "
                    f"{ours.set_id!r} at {ours.url}: the shards have changed; start a new run, or "
                    "point data.shards at the old set"
                )
            if self._weights and one["lanes"] != self.lanes_of[number]:
                raise StateError(
                    f"the saved position has {one['lanes']} lanes for {ours.url}, this run has "
                    f"{self.lanes_of[number]}: keep data.weights as it was"
                )
        self._opened.clear()
        self._decided.clear()
        self.sources.clear()
        self._set_lanes([one["lanes"] for one in saved])
        for number, one in enumerate(saved):
            for version in (one["version"], *one["next_versions"]):
                try:
                    self._opened_at(number, version)
                except FormatError as err:
                    raise StateError(
                        f"the saved position has version {version}, this run has "
                        f"{self.shard_sets[number].version} of {self.shard_sets[number].url}: the "
                        "shard set has no such version (any more); start a new run"
                    ) from err
            for epoch, version in enumerate(one["next_versions"], start=one["epoch"] + 1):
                self._decided[number, epoch] = version
        return tuple(
            SetPlace(version=one["version"], epoch=one["epoch"], began=one["began"])
            for one in saved
        )

    def _next_epoch(self, number: int, one: SetPlace, step: int, timeout_s: float) -> SetPlace:
        key = (number, one.epoch + 1)
        with self._changed:
            if self._follow and not self._changed.wait_for(
                lambda: key in self._decided, timeout=timeout_s
            ):
                raise StalledError(
                    f"{self.shard_sets[number].url}: nothing decided for {timeout_s:g} s which "
                    f"version epoch {key[1]} is to have; the training step takes no batches"
                )
            version = self._decided.get(key, one.version)
        return SetPlace(version=version, epoch=one.epoch + 1, began=step)

    def _length(self, sets: Sequence[SetPlace]) -> int:
        total = sum(
            self._opened_at(number, one.version).num_samples for number, one in enumerate(sets)
        )
        return total // self.lanes * self.lanes

    def _lane_length(self, number: int, version: int) -> int:
        opened = self._opened_at(number, version)
        return opened.order.epoch_length // self.lanes_of[number]

    def _opened_at(self, number: int, version: int) -> "_Opened":
        with self._changed:
            key = (number, version)
            if key in self._opened:
                return self._opened[key]
            shard_set = self.shard_sets[number]
            if shard_set.version != version:
                shard_set = shard_set.at(version)
            seed = int(hash_words(self._seed, _SETS, number)[0]) if number else self._seed
            order = Order(
                shard_set.samples, seed=seed, lanes=self.lanes_of[number], block=self._block
            )
            source = self._next_source  # never used again: the stream remembers things by it
            self._next_source += 1
            self.sources[source] = Source(shard_set=shard_set, first_id=number << _IDS_PER_SET_BITS)
            opened = _Opened(order=order, source=source, num_samples=shard_set.num_samples)
            self._opened[key] = opened
            return opened


@dataclass(frozen=True, kw_only=True, slots=True)
class _Opened:
    """A version of a set in use."""

    order: Order
    source: int
    num_samples: int


def share_lanes(lanes: int, weights: Sequence[float]) -> list[int]:
    """The lanes in proportion to the weights: rounded down, the rest to the largest remainders.

    Raises:
        OrderError: a weight is not above 0.
    """
    if min(weights) <= 0 or not np.isfinite(weights).all():
        raise OrderError(f"data.weights must be above 0, not {', '.join(map(str, weights))}")
    exact = [lanes * weight / sum(weights) for weight in weights]
    shares = [int(share) for share in exact]
    by_remainder = sorted(range(len(weights)), key=lambda one: (shares[one] - exact[one], one))
    for number in by_remainder[: lanes - sum(shares)]:
        shares[number] += 1
    return shares


def interleave(counts: Sequence[int]) -> NDArray[np.int64]:
    """Each number as often as its count says, as evenly spread as can be."""
    numbers = np.repeat(np.arange(len(counts)), counts)
    places = np.concatenate([(np.arange(count) + 0.5) / count for count in counts if count])
    return numbers[np.lexsort((numbers, places))]
