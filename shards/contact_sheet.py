"""A picture of what is in a shard set: some of its images, side by side."""

import io

import numpy as np
from PIL import Image, ImageOps

from shards.manifest import ShardSet

_GAP = 4


def contact_sheet(shard_set: ShardSet, *, columns: int, rows: int, side: int, seed: int) -> bytes:
    """A JPEG of columns x rows images, drawn at random, each fitted into side x side pixels.

    The images were decoded when they were packed; what has been damaged since stays blank.
    """
    count = min(columns * rows, shard_set.num_samples)
    drawn = np.random.default_rng(seed).choice(shard_set.num_samples, size=count, replace=False)
    ends = np.cumsum(shard_set.samples)
    sheet = Image.new("RGB", (columns * (side + _GAP) + _GAP, rows * (side + _GAP) + _GAP), "white")
    for place, number in enumerate(sorted(drawn.tolist())):
        shard = int(np.searchsorted(ends, number, side="right"))
        member = number - int(ends[shard] - shard_set.samples[shard])
        thumbnail = _thumbnail(shard_set, shard, member, side=side)
        left = _GAP + place % columns * (side + _GAP) + (side - thumbnail.width) // 2
        top = _GAP + place // columns * (side + _GAP) + (side - thumbnail.height) // 2
        sheet.paste(thumbnail, (left, top))
    written = io.BytesIO()
    sheet.save(written, "JPEG", quality=88)
    return written.getvalue()


def _thumbnail(shard_set: ShardSet, shard: int, member: int, *, side: int) -> Image.Image:
    index = shard_set.index(shard)
    start, end = int(index.offset[member]), int(index.end[member])
    (data,) = shard_set.tars.read_ranges(shard_set.names[shard], [start], [end])
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.draft("RGB", (side, side))
            upright = ImageOps.exif_transpose(image).convert("RGB")
    except OSError:
        return Image.new("RGB", (side, side), "lightgray")
    upright.thumbnail((side, side))
    return upright
