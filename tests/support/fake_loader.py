"""A loader without files: every view is a function of its position, as the real ones' are."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from moco_scale.distributed import Ranks
from pipelines.loader import Batch
from pipelines.quarantine import BadSample
from pipelines.stats import LoaderStats, StreamStats


def bad_sample(position: int) -> BadSample:
    """One that was bad at this position."""
    return BadSample(
        shard="s3://bucket/shards/00000.tar",
        key="000000001",
        sample_id=int(position) % 7,
        position=int(position),
        reason="its bytes are not those of the index (checksum)",
    )


class FakeLoader:
    """Random small images, drawn from the position alone; a `Loader`."""

    def __init__(
        self,
        ranks: Ranks,
        *,
        global_batch_size: int,
        steps_per_epoch: int = 4,
        size: int = 8,
        dtype: torch.dtype = torch.float32,
        num_replaced: int = 0,
    ) -> None:
        self.steps_per_epoch = steps_per_epoch
        self.taken = 0
        self.closed = False
        self._ranks = ranks
        self._batch = global_batch_size
        self._size = size
        self._dtype = dtype
        self._num_replaced = num_replaced

    @property
    def num_ids(self) -> int:
        return self.steps_per_epoch * self._batch

    @property
    def images(self) -> int:
        return self.taken * self._batch

    @property
    def epoch(self) -> int:
        return self.taken // self.steps_per_epoch

    @property
    def step_in_epoch(self) -> int:
        return self.taken % self.steps_per_epoch

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        part = self._batch // self._ranks.world_size
        start = self.taken * self._batch + self._ranks.rank * part
        positions = np.arange(start, start + part, dtype=np.int64)
        self.taken += 1
        return Batch(
            view_q=self._views(positions, view=0),
            view_k=self._views(positions, view=1),
            sample_ids=positions * 7 % (self.steps_per_epoch * self._batch),
            positions=positions,
            replaced=tuple(bad_sample(position) for position in positions[: self._num_replaced]),
        )

    def state_dict(self) -> dict[str, Any]:
        return {"taken": self.taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert self.taken == 0
        self.taken = state["taken"]

    def stats(self) -> LoaderStats:
        samples = self.taken * self._batch // self._ranks.world_size
        return LoaderStats(
            samples=samples,
            replaced=self.taken * self._num_replaced,
            batch_wait_s=0.0,
            stages=(),
            stream=StreamStats.none(),
        )

    def close(self) -> None:
        self.closed = True

    def _views(self, positions: np.ndarray[Any, Any], *, view: int) -> torch.Tensor:
        shape = (3, self._size, self._size)
        drawn = [
            torch.randn(
                shape,
                generator=torch.Generator().manual_seed(2 * int(position) + view),
                dtype=torch.float64,
            )
            for position in positions
        ]
        return torch.stack(drawn).to(self._dtype)
