"""Images of a shard set inside a self-contained page."""

import base64
import io
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from pipelines import IMAGE_MEAN, IMAGE_STD, iterate_once
from shards import ShardSet

_SIDE = 96


@dataclass(frozen=True, kw_only=True, slots=True)
class Picture:
    """An image inside the page."""

    src: str
    """data: URL of a JPEG."""
    alt: str


def pictures_of(
    shard_set: ShardSet, sample_ids: Iterable[int], *, loader: Literal["auto", "dali", "cpu"]
) -> dict[int, Picture]:
    """The evaluation view of each sample at 96 pixels; one that cannot be decoded is missing."""
    drawn = thumbnails(shard_set, sample_ids, side=_SIDE, loader=loader)
    table = shard_set.table(columns=["uri"])
    is_wanted = pa.array(np.isin(table.column("sample_id").to_numpy(), list(drawn)))
    named = table.filter(is_wanted).to_pydict()
    uris = dict(zip(named["sample_id"], named["uri"], strict=True))
    return {
        sample: Picture(src=src, alt=uris[sample].rpartition("/")[2])
        for sample, src in drawn.items()
    }


def thumbnails(
    shard_set: ShardSet,
    sample_ids: Iterable[int],
    *,
    side: int,
    loader: Literal["auto", "dali", "cpu"],
) -> dict[int, str]:
    """data: URLs of evaluation views, by sample id; what cannot be decoded is left out."""
    batches = iterate_once(
        shard_set,
        ordinals=np.array(sorted(set(sample_ids)), dtype=np.int64),
        view_size=side,
        batch_size=64,
        loader=loader,
        num_threads=1,
        device_index=None,
    )
    return {
        sample: data_url(image)
        for ids, images in batches
        for sample, image in zip(ids.tolist(), to_pixels(images), strict=True)
    }


def to_pixels(images: Tensor) -> NDArray[np.uint8]:
    """N x S x S x 3 bytes out of N x 3 x S x S normalised floats."""
    values = images.permute(0, 2, 3, 1).float().cpu().numpy()
    unit = values * np.asarray(IMAGE_STD) + np.asarray(IMAGE_MEAN)
    pixels: NDArray[np.uint8] = (255 * unit).round().clip(0, 255).astype(np.uint8)
    return pixels


def data_url(pixels: NDArray[np.uint8]) -> str:
    """S x S x 3 bytes as a JPEG in a data: URL."""
    drawn = io.BytesIO()
    Image.fromarray(pixels).save(drawn, "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(drawn.getvalue()).decode()
