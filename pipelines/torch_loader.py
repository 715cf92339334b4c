"""Encoded batches through Pillow and torchvision, a thread a sample."""

from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.stream import EncodedBatch
from pipelines.torch_views import decode, draw_view
from pipelines.view_maker import Repair, Views
from pipelines.views import Draw, ViewParams


class TorchViews:
    """A `ViewMaker` for machines without DALI, and the reference for those with it."""

    def __init__(
        self, draw: Draw, *, view_size: int, num_threads: int, device_index: int | None
    ) -> None:
        self._draw = draw
        self._view_size = view_size
        self._num_threads = num_threads
        self._device = torch.device("cpu" if device_index is None else f"cuda:{device_index}")

    def make(
        self, batches: Iterator[EncodedBatch], repair: Repair
    ) -> Generator[tuple[EncodedBatch, Views], None, None]:
        with ThreadPoolExecutor(self._num_threads, thread_name_prefix="decode") as pool:
            for batch in batches:
                good, images = self._decode(batch, repair, pool)
                if not len(good):
                    continue
                params = self._draw(good.positions, good.sizes)
                places = range(len(good))
                drawn = list(
                    pool.map(lambda place: self._views(images[place], params, place), places)  # noqa: B023  # consumed before the next round
                )
                yield (
                    good,
                    tuple(
                        torch.stack(views).to(self._device) for views in zip(*drawn, strict=True)
                    ),
                )

    def _decode(
        self, batch: EncodedBatch, repair: Repair, pool: ThreadPoolExecutor
    ) -> tuple[EncodedBatch, list[Tensor]]:
        """The batch's images, after as many repairs as it takes."""
        while True:
            found = list(pool.map(_try_decode, batch.data, batch.sizes))
            faults = {
                place: str(one) for place, one in enumerate(found) if isinstance(one, ValueError)
            }
            if not faults:
                return batch, [one for one in found if isinstance(one, Tensor)]
            batch = repair(batch, faults)

    def _views(self, image: Tensor, params: tuple[ViewParams, ...], place: int) -> list[Tensor]:
        return [draw_view(image, one, place, view_size=self._view_size) for one in params]


def _try_decode(data: NDArray[np.uint8], size: NDArray[np.int32]) -> Tensor | ValueError:
    try:
        return decode(data, size)
    except ValueError as err:
        return err
