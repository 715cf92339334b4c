"""Encoded batches through turbo, Pillow, torch and OpenCV: threads, a sample at a time."""

from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.cpu_views import Pixels, decode, draw_view, use_one_thread, write_view
from pipelines.errors import PipelineError
from pipelines.sound import sound_image
from pipelines.spans import AUGMENT, DECODE, MAKE, TRANSFER, Spans
from pipelines.stream import EncodedBatch
from pipelines.view_maker import Repair, ToDevice, Views
from pipelines.views import Draw, affine_colour


class CpuViews:
    """A `ViewMaker` for the CPU: what decodes and draws releases the interpreter's lock."""

    def __init__(
        self,
        draw: Draw,
        *,
        num_views: int,
        view_size: int,
        colour: Literal["exact", "fast"] | None,
        view_dtype: Literal["float32", "float16", "uint8"],
        num_threads: int,
        device_index: int | None,
        spans: Spans | None = None,
        to_device: ToDevice | None = None,
    ) -> None:
        self._draw = draw
        self._spans = spans or Spans()
        self._num_views = num_views
        self._view_size = view_size
        self._colour = colour
        self._view_dtype = view_dtype
        self._num_threads = num_threads
        self._device = torch.device("cpu" if device_index is None else f"cuda:{device_index}")
        self.to_device = to_device or (lambda view: view.to(self._device, non_blocking=True))
        use_one_thread()

    def make(
        self, batches: Iterator[EncodedBatch], repair: Repair
    ) -> Generator[tuple[EncodedBatch, Views], None, None]:
        if self._device.type == "cuda":  # of this thread: else pinned memory is another device's
            torch.cuda.set_device(self._device)
        with ThreadPoolExecutor(self._num_threads, thread_name_prefix="views") as pool:
            for batch in batches:
                made = self._make_one(batch, repair, pool)
                if len(made[0]):
                    yield made
                del batch, made  # the taker's alone, while the next ones are made

    def _make_one(
        self, batch: EncodedBatch, repair: Repair, pool: ThreadPoolExecutor
    ) -> tuple[EncodedBatch, Views]:
        """The batch and its views, after as many repairs as it takes.

        Raises:
            PipelineError: a sound image cannot be decoded either.
        """
        views = [self.empty(len(batch)) for _ in range(self._num_views)]
        faults = self._fill(views, batch, range(len(batch)), pool)
        while faults:
            for place in faults:
                _try_sound_image(batch.data[place], *batch.sizes[place].tolist())
            repaired = repair(batch, faults)
            if len(repaired) == len(batch):  # substitutes; all the other views are made already
                faults = self._fill(views, repaired, faults, pool)
            else:
                assert len(repaired) == len(batch) - len(faults), (
                    "replaced or left out, all of them"
                )
                kept = [place for place in range(len(batch)) if place not in faults]
                views = [view[kept] for view in views]
                faults = {}
            batch = repaired
        with self._spans.of(TRANSFER, samples=len(batch), size_bytes=sum(v.nbytes for v in views)):
            return batch, tuple(self.to_device(view.permute(0, 3, 1, 2)) for view in views)

    def empty(self, count: int) -> Tensor:
        """N x S x S x 3, not filled."""
        shape = (count, self._view_size, self._view_size, 3)
        if self._device.type == "cuda":  # page-locked, so that copying it waits for nothing
            return torch.empty(shape, dtype=getattr(torch, self._view_dtype), pin_memory=True)
        # Not torch.empty: NumPy asks for huge pages, which are there in a fifth of the time.
        return torch.from_numpy(np.empty(shape, dtype=self._view_dtype))

    def decode(self, batch: EncodedBatch, place: int) -> Pixels:
        """One image of a batch, upright.

        Raises:
            ValueError: it cannot be decoded.
        """
        data = batch.data[place]
        width, height = batch.sizes[place].tolist()
        with self._spans.of(DECODE, samples=1, size_bytes=len(data)):
            return decode(data, size=(width, height), orientation=int(batch.orientations[place]))

    def augmenter(self, views: list[Tensor], batch: EncodedBatch) -> Callable[[Pixels, int], None]:
        """What draws the views of a batch's image, given its place, into `views`."""
        params = self._draw(batch.positions, batch.sizes)
        affine = [affine_colour(one) if self._colour == "fast" else None for one in params]
        out = [view.numpy() for view in views]

        def augment(image: Pixels, place: int) -> None:
            with self._spans.of(AUGMENT, samples=1):
                for one, matrices, written in zip(params, affine, out, strict=True):
                    view = draw_view(
                        image,
                        one,
                        place,
                        view_size=self._view_size,
                        colour=self._colour,
                        affine=matrices,
                    )
                    write_view(view, written[place])

        return augment

    def _fill(
        self,
        views: list[Tensor],
        batch: EncodedBatch,
        places: Iterable[int],
        pool: ThreadPoolExecutor,
    ) -> dict[int, str]:
        """Put the views of the samples at `places` there; the reason of each that is bad."""
        augment = self.augmenter(views, batch)

        def fill(place: int) -> str | None:
            try:
                image = self.decode(batch, place)
            except ValueError as err:
                return str(err)
            augment(image, place)
            return None

        wanted = list(places)
        with self._spans.of(MAKE, samples=len(wanted)):
            found = list(zip(wanted, pool.map(fill, wanted), strict=True))
        return {place: reason for place, reason in found if reason is not None}


def _try_sound_image(bad: NDArray[np.uint8], width: int, height: int) -> None:
    sound = sound_image(bad, width=width, height=height)
    try:
        decode(sound, size=(width, height), orientation=1)
    except ValueError as err:
        raise PipelineError(
            f"the CPU's decoder fails on a sound image of {width} x {height} pixels, too, so no "
            f"sample is to blame: {err}; see to memory, or reinstall Pillow and simplejpeg"
        ) from err
