"""The seam between data and training: what a loader is, and what a batch holds."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pipelines.quarantine import BadSample
from pipelines.stats import LoaderStats


@dataclass(frozen=True, slots=True)
class Batch:
    """One rank's part of a global batch, in position order."""

    view_q: Tensor
    """N x 3 x S x S on the loader's device, channels_last in memory: the query views. Floats are
    normalised, uint8 is not: `normalised` does that."""
    view_k: Tensor
    """Same shape: the key views, of the same samples in the same order."""
    sample_ids: NDArray[np.int64]
    """N dense ordinals: first ordinal of the shard + position in it; of several shard sets, those
    of number n, counted from 0, begin at n x 2^40."""
    positions: NDArray[np.int64]
    """N global positions since the start of the run; they seed the views and the shuffle."""
    replaced: tuple[BadSample, ...] = ()
    """What was to stand in the batch and was bad; a substitute stands in its place."""

    @property
    def num_replaced(self) -> int:
        return len(self.replaced)


class Loader(Protocol):
    """Yields this rank's part of one global batch after another, epoch after epoch, without end."""

    @property
    def num_ids(self) -> int:
        """Sample ids are below it, as long as the shard set does not grow."""

    @property
    def images(self) -> int:
        """Images taken since the start of the run, over all ranks."""

    @property
    def epoch(self) -> int:
        """Whole epochs taken since the start of the run."""

    @property
    def step_in_epoch(self) -> int:
        """Batches taken of this epoch."""

    @property
    def steps_per_epoch(self) -> int:
        """Global batches in this epoch; the same on every rank, known before the first read."""

    def __iter__(self) -> Iterator[Batch]: ...

    def __next__(self) -> Batch:
        """The next batch. Taking it is what moves the position that `state_dict` reports."""

    def state_dict(self) -> dict[str, Any]:
        """Position in the data as a small JSON-able dict, the same on every rank."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the last batch taken when `state` was saved. Before the first batch only.

        Raises:
            StateError: the state belongs to another shard set, seed, lane count or algorithm.
        """

    def stats(self) -> LoaderStats: ...

    def close(self) -> None:
        """Stop threads and free memory; harmless twice."""
