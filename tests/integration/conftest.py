"""A small uncurated bucket, and the shard set packed from it, on a real S3 server."""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from demo.images import spoilers
from demo.local_s3 import LocalS3
from shards.store import open_store
from tests.support.command import TINY, moco_scale
from tests.support.s3_environment import only_s3

NUM_IMAGES = 96


@dataclass(frozen=True)
class Line:
    """What the tests of the whole line share."""

    bucket: str
    shard_set: str
    base: str
    preset: Path
    pack_output: str


@pytest.fixture(scope="session")
def line(s3_server: LocalS3, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Line]:
    with pytest.MonkeyPatch.context() as patch:
        only_s3(patch, s3_server.environment)
        bucket, base = s3_server.make_bucket("line-raw"), s3_server.make_bucket("line-out")
        raw = open_store(bucket)
        photos = {f"class{i % 2}/photo {i:03}.jpg": photo(seed=i) for i in range(NUM_IMAGES)}
        for name, content in photos.items():
            raw.put(name, content)
        first = next(iter(photos.values()))
        for name, content in spoilers(first, good_name="photo.jpg").items():
            raw.put(name, content)
        preset = tmp_path_factory.mktemp("line") / "tiny.toml"
        preset.write_text(TINY)
        shard_set = f"{base}/shards"
        packed = moco_scale("pack", bucket, shard_set, "--shard-bytes", "200000", "--seed", "3")
        assert packed.returncode == 0, packed.stderr
        yield Line(bucket, shard_set, base, preset, packed.stdout)


def photo(*, seed: int) -> bytes:
    """A small JPEG with structure at several scales, different for every seed."""
    draw = np.random.default_rng(seed)
    coarse = Image.fromarray(draw.integers(0, 255, (6, 8, 3), dtype=np.uint8))
    fine = draw.normal(0, 12, (60 + seed % 7, 80, 3))
    smooth = np.asarray(coarse.resize((80, 60 + seed % 7), Image.Resampling.BICUBIC), dtype=float)
    pixels = (smooth + fine).clip(0, 255).astype(np.uint8)
    drawn = io.BytesIO()
    Image.fromarray(pixels).save(drawn, "JPEG", quality=90)
    return drawn.getvalue()
