"""Encoded batches through the DALI graph, two at a time, onto the device."""

import io
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia.dali.tensors import TensorCPU, TensorListCPU
from PIL import Image
from torch import Tensor

from pipelines.dali_graph import PREFETCH, build_graph, inputs_of
from pipelines.errors import PipelineError
from pipelines.sound import sound_image
from pipelines.spans import FEED, MAKE, Spans
from pipelines.stream import EncodedBatch
from pipelines.view_maker import Repair, Views
from pipelines.views import Draw, ViewParams, affine_colour, evaluation_views


class DaliViews:
    """A `ViewMaker` that lets DALI decode and draw, on the CPU or on a GPU."""

    def __init__(
        self,
        draw: Draw,
        *,
        batch_size: int,
        num_views: int,
        view_size: int,
        colour: Literal["exact", "fast"] | None,
        view_dtype: Literal["float32", "float16", "uint8"],
        num_threads: int,
        device_index: int | None,
        hw_decoder_load: float,
        spans: Spans | None = None,
    ) -> None:
        self._draw = draw
        self._spans = spans or Spans()
        self._colour = colour
        self._device_index = device_index
        self._num_views = num_views
        self._graph = build_graph(
            batch_size=batch_size,
            num_views=num_views,
            view_size=view_size,
            colour=colour,
            view_dtype=view_dtype,
            num_threads=num_threads,
            hw_decoder_load=hw_decoder_load,
            device_index=device_index,
        )
        self._prime(num_views)

    def make(
        self, batches: Iterator[EncodedBatch], repair: Repair
    ) -> Generator[tuple[EncodedBatch, Views], None, None]:
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
        with self._spans.of(MAKE, samples=len(batch)):
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
            PipelineError: it was no sample.
        """
        result: Views | RuntimeError = error
        while isinstance(result, RuntimeError):
            faults = self._faults(batch)
            if not faults:
                raise _no_samples_fault("a batch and on none of its samples", result) from result
            batch = repair(batch, faults)
            if not len(batch):
                return
            self._start(batch)
            result = self._result()
        yield batch, result

    def _faults(self, batch: EncodedBatch) -> dict[int, str]:
        """Places of the samples that fail when run alone.

        Raises:
            PipelineError: a sound image fails in a bad one's place, too.
        """
        faults = {}
        for place in range(len(batch)):
            one = batch.only(place)
            self._start(one)
            error = self._result()
            if isinstance(error, RuntimeError):
                self._try_sound_image(one)
                faults[place] = f"DALI cannot decode it: {_said(error)}"
        return faults

    def _try_sound_image(self, bad: EncodedBatch) -> None:
        (data,), ((width, height),) = bad.data, bad.sizes.tolist()
        self._start(replace(bad, data=(sound_image(data, width=width, height=height),)))
        result = self._result()
        if isinstance(result, RuntimeError):
            raise _no_samples_fault(
                f"a sound image of {width} x {height} pixels, too", result
            ) from result

    def _start(self, batch: EncodedBatch) -> None:
        size_bytes = sum(map(len, batch.data))
        with self._spans.of(FEED, samples=len(batch), size_bytes=size_bytes):
            self._feed(batch.data, self._draw(batch.positions, batch.sizes))
            self._graph.schedule_run()

    def _feed(self, data: Sequence[NDArray[np.uint8]], views: Sequence[ViewParams]) -> None:
        feed = self._graph.feed_input
        # Views into the blocks: DALI keeps a reference while it needs them.
        feed("encoded", _as_list([TensorCPU(one) for one in data]))
        for view, params in enumerate(views):
            inputs = _inputs(params, colour=self._colour)
            for name in inputs_of(view, colour=self._colour):
                feed(name, inputs[name.removesuffix(f"_{view}")])

    def _prime(self, num_views: int) -> None:
        """Run one tiny image through, as DALI's first run is of PREFETCH batches and not of one."""
        drawn = io.BytesIO()
        Image.new("RGB", (8, 8)).save(drawn, "JPEG")
        data = np.frombuffer(drawn.getvalue(), dtype=np.uint8)
        params = evaluation_views(np.full((1, 2), 8, dtype=np.int32))
        for _ in range(PREFETCH):
            self._feed([data], [params] * num_views)
        self._graph.schedule_run()
        for _ in range(PREFETCH):
            self._graph.outputs()

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
        return tuple(_to_torch(output) for output in outputs) if self._num_views else ()


def _as_list(encoded: list[TensorCPU]) -> Any:
    make: Any = TensorListCPU  # its type stub lacks an argument
    return make(encoded, contiguous=False)


def _to_torch(output: object) -> Tensor:
    """N x 3 x S x S in torch's channels_last order, which is DALI's own: nothing is moved."""
    return torch.from_dlpack(output.as_tensor()).permute(0, 3, 1, 2)  # type: ignore[attr-defined]  # DALI has no types


def _inputs(
    params: ViewParams, *, colour: Literal["exact", "fast"] | None
) -> dict[str, NDArray[Any]]:
    """What the graph may take for a view, by name."""
    start, end = _roi(params)
    inputs: dict[str, NDArray[Any]] = {
        "start": start,
        "end": end,
        "brightness": params.brightness,
        "contrast": params.contrast,
        "saturation": params.saturation,
        "hue": np.trunc(params.hue * 255) / np.float32(255),  # torchvision's steps on Pillow images
        "gray": params.gray,
        "sigma": params.sigma,
    }
    if colour == "fast":
        inputs["matrix"], inputs["pivot"] = affine_colour(params)
    return inputs


def _roi(params: ViewParams) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """First and last corner, y before x; swapped along the axes that are mirrored."""
    corner = params.crop[:, [1, 0]].astype(np.float32)
    opposite = corner + params.crop[:, [3, 2]].astype(np.float32)
    flip = params.flip[:, [1, 0]]
    start, end = np.where(flip, opposite, corner), np.where(flip, corner, opposite)
    return np.ascontiguousarray(start), np.ascontiguousarray(end)  # DALI takes dense arrays only


def _no_samples_fault(what: str, error: RuntimeError) -> PipelineError:
    return PipelineError(
        f"DALI fails on {what}, so no sample is to blame: {_said(error)}; see to memory and the "
        "GPU's driver (nvidia-smi), or take data.loader cpu"
    )


def _said(error: RuntimeError) -> str:
    """Of DALI's many lines the one that says what was wrong."""
    lines = [line.strip() for line in str(error).partition("encountered:")[2].splitlines()]
    return next((line for line in lines if line), str(error).splitlines()[0])[:200]
