"""A loader without files: the right shapes at no cost, which shows the trainer's own ceiling."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from pipelines.config import DataConfig
from pipelines.errors import StateError
from pipelines.hashing import hash_words
from pipelines.loader import Batch
from pipelines.order import rank_positions
from pipelines.stats import LoaderStats


class SyntheticLoader:
    """A `Loader` of random views that depend on (seed, position, view) alone."""

    def __init__(
        self,
        config: DataConfig,
        *,
        seed: int,
        rank: int,
        world_size: int,
        device_index: int | None,
        steps_per_epoch: int,
    ) -> None:
        rank_positions(
            0, global_batch_size=config.global_batch_size, rank=rank, world_size=world_size
        )
        self.steps_per_epoch = steps_per_epoch
        self._config = config
        self._seed = seed
        self._rank = rank
        self._world_size = world_size
        self._device = torch.device("cpu" if device_index is None else f"cuda:{device_index}")
        self._taken = 0
        self._samples = 0
        shape = (2, 3, config.view_size, config.view_size)
        drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed % 2**63))
        self._base = drawn.to(self._device)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        start, stop = rank_positions(
            self._taken,
            global_batch_size=self._config.global_batch_size,
            rank=self._rank,
            world_size=self._world_size,
        )
        positions = np.arange(start, stop, dtype=np.int64)
        self._taken += 1
        self._samples += len(positions)
        return Batch(
            view_q=self._views(positions, view=0),
            view_k=self._views(positions, view=1),
            sample_ids=positions % (self.steps_per_epoch * self._config.global_batch_size),
            positions=positions,
            num_replaced=0,
        )

    def state_dict(self) -> dict[str, Any]:
        return {"format": "synthetic", "seed": self._seed, "taken": self._taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in ("format", "seed"):
            ours = self.state_dict()[name]
            if state.get(name) != ours:
                raise StateError(
                    f"the saved position has {name} {state.get(name)!r}, this run has {ours!r}"
                )
        self._taken = state["taken"]

    def stats(self) -> LoaderStats:
        return LoaderStats(
            samples=self._samples,
            replaced=0,
            read_bytes=0,
            read_requests=0,
            read_wait_s=0.0,
            decode_s=0.0,
            batch_wait_s=0.0,
        )

    def close(self) -> None:
        """There is nothing to close."""

    def _views(self, positions: np.ndarray[Any, np.dtype[np.int64]], *, view: int) -> torch.Tensor:
        """Fixed noise, brighter or darker by an amount of each position's own."""
        words = hash_words(self._seed, positions, view)
        shift = torch.from_numpy((words >> np.uint64(40)).astype(np.float32) / 2**23 - 1)
        return self._base[view] + shift.to(self._device)[:, None, None, None]
