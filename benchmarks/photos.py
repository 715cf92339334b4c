"""Real photos for the benchmarks, cut to the size that is wanted."""

import random
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from PIL import Image

from demo.images import CACHE

WIDTH, HEIGHT, QUALITY = 500, 375, 89
_PROCESSES = 2


def small_photos(count: int) -> Path:
    """A folder of `count` JPEGs of 500 x 375, some 42 kB each; made once."""
    folder = CACHE / f"photos-{WIDTH}x{HEIGHT}-{count}"
    if not folder.exists():
        print(f"cutting {count:,} photos ...", flush=True)
        originals, begun = photo_originals(WIDTH * HEIGHT), folder.with_suffix(".begun")
        begun.mkdir(parents=True, exist_ok=True)
        photos = [begun / f"{number:06}.jpg" for number in range(count)]
        with ProcessPoolExecutor(_PROCESSES) as pool:
            shares = [photos[at :: len(originals)] for at in range(len(originals))]
            list(pool.map(_cut, shares, originals))
        begun.rename(folder)
    return folder


def _cut(photos: Sequence[Path], original: Path) -> None:
    """Random parts of one photo, each at a random scale."""
    with Image.open(original) as opened:
        image = opened.convert("RGB")
    for photo in photos:
        draw = random.Random(photo.name)
        most = min(image.width / WIDTH, image.height / HEIGHT)
        scale = draw.uniform(min(1.0, most / 2), most)  # no two parts of a small photo are equal
        across, down = int(WIDTH * scale), int(HEIGHT * scale)
        left = draw.randint(0, image.width - across)
        top = draw.randint(0, image.height - down)
        box = (left, top, left + across, top + down)
        part = image.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS, box=box)
        part.save(photo, "JPEG", quality=QUALITY)


def photo_originals(pixels: int) -> list[Path]:
    """Photos of at least so many pixels, out of two Debian packages; never committed.

    opencv-doc (Apache-2.0, BSD-3) and plasma-workspace-wallpapers (GPL-2+, CC BY-SA).
    """
    found = []
    for package in ("opencv-doc", "plasma-workspace-wallpapers"):
        folder = CACHE / "unpacked" / package
        if not folder.exists():
            print(f"fetching {package} with apt-get ...", flush=True)
            with tempfile.TemporaryDirectory() as download:
                command = ["apt-get", "download", "-qq", package]
                subprocess.run(command, check=True, cwd=download, stderr=subprocess.DEVNULL)
                (archive,) = Path(download).glob("*.deb")
                folder.parent.mkdir(parents=True, exist_ok=True)
                subprocess.run(["dpkg-deb", "-x", archive, folder], check=True)
        found += sorted(path for path in folder.rglob("*") if _is_photo(path, pixels))
    return found


def _is_photo(path: Path, at_least: int) -> bool:
    """Not a thumbnail, drawing or link: they are PNG, small, or have few bytes a pixel."""
    if path.suffix.lower() not in (".jpg", ".jpeg") or path.is_symlink():
        return False
    with Image.open(path) as image:
        pixels = image.width * image.height
        return image.mode == "RGB" and pixels >= at_least and path.stat().st_size > pixels / 10
