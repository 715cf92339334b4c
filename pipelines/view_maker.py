"""The seam between encoded bytes and views: what decodes and augments, DALI or the CPU path."""

import importlib.util
import logging
from collections.abc import Callable, Generator, Iterator, Mapping
from functools import cache
from typing import Literal, Protocol, TypeAlias

import torch
from torch import Tensor

from pipelines.config import HW_DECODER_LOAD
from pipelines.errors import PipelineError
from pipelines.spans import Spans
from pipelines.stream import EncodedBatch
from pipelines.views import IMAGE_MEAN, IMAGE_STD, Draw

logger = logging.getLogger(__name__)

Views: TypeAlias = tuple[Tensor, ...]
"""A view each: N x 3 x S x S, channels_last in memory. Floats are normalised, bytes are not."""

ToDevice: TypeAlias = Callable[[Tensor], Tensor]
"""Views in (page-locked) memory -> the same on the device."""

Repair: TypeAlias = Callable[[EncodedBatch, Mapping[int, str]], EncodedBatch]
"""(batch, reason by place) -> the batch with others at those places, or shorter by them."""


class ViewMaker(Protocol):
    """Turns encoded batches into views."""

    def make(
        self, batches: Iterator[EncodedBatch], repair: Repair
    ) -> Generator[tuple[EncodedBatch, Views], None, None]:
        """Each batch with its views, in the order of `batches`.

        A batch comes back with the samples that its views show: what could not be decoded was
        given to `repair`. A batch of which nothing is left is left out.
        """


def open_view_maker(
    draw: Draw,
    *,
    loader: Literal["auto", "dali", "cpu"],
    batch_size: int,
    num_views: int,
    view_size: int,
    colour: Literal["exact", "fast"] | None,
    view_dtype: Literal["float32", "float16", "uint8"],
    num_threads: int,
    device_index: int | None,
    hw_decoder_load: float = HW_DECODER_LOAD,
    spans: Spans | None = None,
    to_device: ToDevice | None = None,
) -> ViewMaker:
    """What makes views of at most `batch_size` samples at a time, as the settings want it.

    Args:
        draw: the parameters of `num_views` views.
        loader: auto takes DALI on a GPU; without one the CPU path is several times as fast.
        colour: None: views differ in their crop and flip alone, neither in colour nor in blur.
        num_threads: that decode; on the CPU they draw, too.
        device_index: the GPU that is to hold the views; None for the CPU.
        hw_decoder_load: part of the JPEGs that go to a GPU's JPEG engine, where it has one.
        to_device: how the CPU path's views go to the device, instead of `Tensor.to`.

    Raises:
        PipelineError: DALI is asked for and not installed.
    """
    has_dali = _has_dali()
    if loader == "dali" and not has_dali:
        raise PipelineError(
            "data.loader dali needs DALI: pip install nvidia-dali-cuda120 (or -cuda130), or take "
            "data.loader cpu"
        )
    if loader == "auto" and device_index is not None and not has_dali:
        logger.warning(
            "DALI is not installed, so views are drawn on the CPU and copied to the GPU, which is "
            "much slower: pip install nvidia-dali-cuda120 (or -cuda130)"
        )
    if is_by_dali(loader, device_index=device_index):
        # Deferred: --help and the CPU path must work without DALI.
        from pipelines.dali_loader import DaliViews

        logger.info("views by DALI on %s", "the CPU" if device_index is None else "the GPU")
        return DaliViews(
            draw,
            batch_size=batch_size,
            num_views=num_views,
            view_size=view_size,
            colour=colour,
            view_dtype=view_dtype,
            num_threads=num_threads,
            device_index=device_index,
            hw_decoder_load=hw_decoder_load,
            spans=spans,
        )
    # Deferred: OpenCV and Pillow are not needed beside DALI.
    from pipelines.cpu_loader import CpuViews

    logger.info("views by OpenCV on the CPU")
    return CpuViews(
        draw,
        num_views=num_views,
        view_size=view_size,
        colour=colour,
        view_dtype=view_dtype,
        num_threads=num_threads,
        device_index=device_index,
        spans=spans,
        to_device=to_device,
    )


def is_by_dali(loader: Literal["auto", "dali", "cpu"], *, device_index: int | None) -> bool:
    """Whether DALI makes the views, and not the CPU path."""
    return loader == "dali" or (loader == "auto" and device_index is not None and _has_dali())


def _has_dali() -> bool:
    return importlib.util.find_spec("nvidia") is not None and (
        importlib.util.find_spec("nvidia.dali") is not None
    )


def normalised(view: Tensor) -> Tensor:
    """A view of any `data.view_dtype` as encoders take it: normalised float32, on its device."""
    if view.dtype == torch.float16:  # too coarse for weights in float32 without autocast
        return view.float()
    if view.dtype != torch.uint8:
        return view
    mean, std = _mean_and_std(view.device)
    return view.float().sub_(mean).div_(std)


@cache  # once a device: making a tensor of numbers there would wait for it
def _mean_and_std(device: torch.device) -> tuple[Tensor, Tensor]:
    mean, std = (
        torch.tensor([255 * value for value in values], device=device)[:, None, None]
        for values in (IMAGE_MEAN, IMAGE_STD)
    )
    return mean, std
