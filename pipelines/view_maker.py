"""The seam between encoded bytes and views: what decodes and augments, DALI or torch."""

from collections.abc import Callable, Generator, Iterator, Mapping
from typing import Protocol, TypeAlias

from torch import Tensor

from pipelines.stream import EncodedBatch

Views: TypeAlias = tuple[Tensor, ...]
"""A view each: N x 3 x S x S float32, normalised, contiguous."""

Repair: TypeAlias = Callable[[EncodedBatch, Mapping[int, str]], EncodedBatch]
"""(batch, reason by place) -> the batch without the samples at those places."""


class ViewMaker(Protocol):
    """Turns encoded batches into views."""

    def make(
        self, batches: Iterator[EncodedBatch], repair: Repair
    ) -> Generator[tuple[EncodedBatch, Views], None, None]:
        """Each batch with its views, in the order of `batches`.

        A batch comes back with the samples that its views show: what could not be decoded was
        given to `repair`. A batch of which nothing is left is left out.
        """
