"""Loaders that read little or nothing: what the trainer does when it never waits for data."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipelines.config import DataConfig
from pipelines.errors import StateError
from pipelines.hashing import hash_words
from pipelines.loader import Batch, Loader
from pipelines.order import rank_positions
from pipelines.stats import LoaderStats, StreamStats

STEPS_PER_EPOCH = 1_000
"""Of the synthetic loader, which has no samples to count."""


class SyntheticLoader:
    """A `Loader` of random views that depend on (seed, position, view) alone: no file is read."""

    def __init__(
        self,
        config: DataConfig,
        *,
        seed: int,
        rank: int,
        world_size: int,
        device_index: int | None,
    ) -> None:
        self._config = config
        self._seed = seed
        self._start, self._stop = rank_positions(
            0, global_batch_size=config.global_batch_size, rank=rank, world_size=world_size
        )
        self._device = torch.device("cpu" if device_index is None else f"cuda:{device_index}")
        self._taken = 0
        self._samples = 0
        size = config.view_size
        drawn = torch.randn(
            (2, 3, size, size), generator=torch.Generator().manual_seed(seed % 2**63)
        )
        self._base = drawn.to(self._device, memory_format=torch.channels_last)

    @property
    def num_ids(self) -> int:
        return STEPS_PER_EPOCH * self._config.global_batch_size

    @property
    def images(self) -> int:
        return self._taken * self._config.global_batch_size

    @property
    def epoch(self) -> int:
        return self._taken // STEPS_PER_EPOCH

    @property
    def step_in_epoch(self) -> int:
        return self._taken % STEPS_PER_EPOCH

    @property
    def steps_per_epoch(self) -> int:
        return STEPS_PER_EPOCH

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        before = self._taken * self._config.global_batch_size
        positions = np.arange(before + self._start, before + self._stop, dtype=np.int64)
        self._taken += 1
        self._samples += len(positions)
        return Batch(
            view_q=self._views(positions, view=0),
            view_k=self._views(positions, view=1),
            sample_ids=positions % self.num_ids,
            positions=positions,
        )

    def state_dict(self) -> dict[str, Any]:
        return {"format": "synthetic", "seed": self._seed, "taken": self._taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._taken = _taken(state, self.state_dict())

    def stats(self) -> LoaderStats:
        return _only_samples(self._samples)

    def close(self) -> None:
        """There is nothing to close."""

    def _views(self, positions: NDArray[np.int64], *, view: int) -> torch.Tensor:
        """Fixed noise, brighter or darker by an amount of each position's own."""
        words = hash_words(self._seed, positions, view)
        shift = torch.from_numpy((words >> np.uint64(40)).astype(np.float32) / 2**23 - 1)
        views = self._base[view] + shift.to(self._device)[:, None, None, None]
        if self._config.view_dtype == "uint8":
            views = (views * 64 + 128).clamp(0, 255)
        dtype: torch.dtype = getattr(torch, self._config.view_dtype)
        return views.to(dtype, memory_format=torch.channels_last)


class HeadspaceLoader:
    """A `Loader` that takes one real batch and hands it out for ever, under new positions.

    Against the real loader it shows how much of a step is waiting for data.
    """

    def __init__(self, loader: Loader, *, global_batch_size: int) -> None:
        self._loader = loader
        self._per_step = global_batch_size
        self._batch: Batch | None = None
        self._taken = 0
        self._samples = 0

    @property
    def num_ids(self) -> int:
        return self._loader.num_ids

    @property
    def images(self) -> int:
        return self._taken * self._per_step

    @property
    def epoch(self) -> int:
        return self._taken // self.steps_per_epoch

    @property
    def step_in_epoch(self) -> int:
        return self._taken % self.steps_per_epoch

    @property
    def steps_per_epoch(self) -> int:
        return self._loader.steps_per_epoch

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._batch is None:
            self._batch = next(self._loader)
            self._loader.close()
        batch = self._batch
        self._samples += len(batch.positions)
        before = self._taken * self._per_step
        self._taken += 1
        return Batch(
            view_q=batch.view_q,
            view_k=batch.view_k,
            sample_ids=batch.sample_ids,
            positions=batch.positions + before,
        )

    def state_dict(self) -> dict[str, Any]:
        return {"format": "headspace", "taken": self._taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._taken = _taken(state, self.state_dict())

    def stats(self) -> LoaderStats:
        return _only_samples(self._samples)

    def close(self) -> None:
        self._loader.close()


def _taken(state: dict[str, Any], ours: dict[str, Any]) -> int:
    """How many batches a saved position is after.

    Raises:
        StateError: it was saved by another kind of loader, or with another seed.
    """
    for name in ours.keys() - {"taken"}:
        if state.get(name) != ours[name]:
            raise StateError(
                f"the saved position has {name} {state.get(name)!r}, this run has {ours[name]!r}: "
                "keep data.mode and run.seed as they were"
            )
    taken: int = state["taken"]
    return taken


def _only_samples(count: int) -> LoaderStats:
    return LoaderStats(
        samples=count, replaced=0, batch_wait_s=0.0, stages=(), stream=StreamStats.none()
    )
