"""Encoded batches through the DALI graph, two at a time, onto the device."""

from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia.dali.tensors import TensorCPU, TensorListCPU
from torch import Tensor

from pipelines.dali_graph import PREFETCH, build_graph
from pipelines.stream import EncodedBatch
from pipelines.view_maker import Repair, Views
from pipelines.views import Draw, ViewParams


class DaliViews:
    """A `ViewMaker` that lets DALI decode and draw, on the CPU or on a GPU."""

    def __init__(
        self,
        draw: Draw,
        *,
        batch_size: int,
        num_views: int,
        view_size: int,
        colour: bool,
        num_threads: int,
        device_index: int | None,
    ) -> None:
        self._draw = draw
        self._colour = colour
        self._device_index = device_index
        self._graph = build_graph(
            batch_size=batch_size,
            num_views=num_views,
            view_size=view_size,
            colour=colour,
            num_threads=num_threads,
            device_index=device_index,
        )

    def make(
        self, batches: Iterator[EncodedBatch], repair: Repair
    ) -> Iterator[tuple[EncodedBatch, Views]]:
        running: deque[EncodedBatch] = deque()
        for batch in batches:
            self._start(batch)
            running.append(batch)
            if len(running) == PREFETCH:
                yield from self._finish(running, repair)
        while running:
            yield from self._finish(running, repair)

    def _finish(
        self, running: deque[EncodedBatch], repair: Repair
    ) -> Iterator[tuple[EncodedBatch, Views]]:
        """The oldest running batch; if it fails, all that run, since results come in order."""
        batch = running.popleft()
        views = self._result()
        if not isinstance(views, RuntimeError):
            yield batch, views
            return
        ended = [(batch, views), *((other, self._result()) for other in list(running))]
        running.clear()
        for one, result in ended:
            if isinstance(result, RuntimeError):
                yield from self._run_repaired(one, result, repair)
            else:
                yield one, result

    def _run_repaired(
        self, batch: EncodedBatch, error: RuntimeError, repair: Repair
    ) -> Iterator[tuple[EncodedBatch, Views]]:
        """DALI fails a batch as a whole: find which samples it was, put others there, run again.

        Raises:
            RuntimeError: DALI's own, if it decodes each sample alone.
        """
        result: Views | RuntimeError = error
        while isinstance(result, RuntimeError):
            faults = self._faults(batch)
            if not faults:
                raise result
            batch = repair(batch, faults)
            if not len(batch):
                return
            self._start(batch)
            result = self._result()
        yield batch, result

    def _faults(self, batch: EncodedBatch) -> dict[int, str]:
        """Places of the samples that fail when run alone."""
        faults = {}
        for place in range(len(batch)):
            self._start(batch.only(place))
            if isinstance(self._result(), RuntimeError):
                faults[place] = "DALI cannot decode it"
        return faults

    def _start(self, batch: EncodedBatch) -> None:
        feed = self._graph.feed_input
        # Views into the blocks: DALI keeps a reference while it needs them.
        encoded = [TensorCPU(data) for data in batch.data]
        feed("encoded", _as_list(encoded))
        for view, params in enumerate(self._draw(batch.positions, batch.sizes)):
            start, end = _roi(params)
            feed(f"start_{view}", start)
            feed(f"end_{view}", end)
            if self._colour:
                feed(f"matrix_{view}", params.matrix)
                feed(f"pivot_{view}", params.pivot)
                feed(f"sigma_{view}", params.sigma)
        self._graph.schedule_run()

    def _result(self) -> Views | RuntimeError:
        """The oldest scheduled batch; buffers are fresh each time, so they go to torch uncopied."""
        try:
            if self._device_index is None:
                outputs = self._graph.outputs()
            else:
                # On the consumer's stream, so that a freed view is not overwritten while in use.
                stream = torch.cuda.current_stream(self._device_index)
                outputs = self._graph.outputs(cuda_stream=stream)
        except RuntimeError as err:
            return err
        return tuple(_to_torch(output) for output in outputs)


def _as_list(encoded: list[TensorCPU]) -> Any:
    make: Any = TensorListCPU  # its type stub lacks an argument
    return make(encoded, contiguous=False)


def _to_torch(output: object) -> Tensor:
    return torch.from_dlpack(output.as_tensor())  # type: ignore[attr-defined]  # DALI has no types


def _roi(params: ViewParams) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """First and last corner, y before x; swapped along the axes that are mirrored."""
    corner = params.crop[:, [1, 0]].astype(np.float32)
    opposite = corner + params.crop[:, [3, 2]].astype(np.float32)
    flip = params.flip[:, [1, 0]]
    return np.where(flip, opposite, corner), np.where(flip, corner, opposite)
