"""Pillow's decoders in a child process: a crash or a hang there costs one object, not the run."""

import atexit
import contextlib
import io
import os
import pickle
import re
import resource
import select
import struct
import subprocess
import sys
import warnings
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from shards import resize
from shards.images import (
    CheckedImage,
    ImageFlag,
    ImageRules,
    Reason,
    Rejection,
    exif_orientation,
    resized_image,
)
from shards.objects import Bytes
from shards.phash import phash

LONGEST_DECODE_S = 120.0

_LOSSY = {"jpeg", "avif", "heic", "jp2"}
_PILLOW_NAMES = {"jp2": "JPEG2000", "pnm": "PPM", "heic": "HEIF"}
_ORIENTATION_TAG = 0x0112
_ALL_MODES = ("RGB", "L", "P", "1", "RGBA", "LA")
# No TIFF, JPEG 2000 or BMP with a palette: training decoders refuse some that Pillow reads.
_KEPT_MODES = {
    "png": _ALL_MODES,
    "webp": _ALL_MODES,
    "pnm": _ALL_MODES,
    "bmp": ("RGB",),
}


@dataclass(frozen=True)
class _Died:
    code: int | None


class Decoder:
    """A child process that decodes, started at the first need and after each crash.

    Not for several threads at once.
    """

    def __init__(self, *, longest_decode_s: float = LONGEST_DECODE_S) -> None:
        self._longest_decode_s = longest_decode_s
        self._child: subprocess.Popen[bytes] | None = None
        atexit.register(self.close)

    def __enter__(self) -> "Decoder":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the child process."""
        atexit.unregister(self.close)
        self._stop()

    def check(self, data: Bytes, found: str, rules: ImageRules) -> CheckedImage | Rejection:
        """Decode an image of the format `found` fully, and rewrite it where training could not.

        A child that dies is no fault of the image until a second one dies of it, too: it may have
        been killed, or memory may have been short for a moment.
        """
        code = None
        for _ in range(2):
            answer = self._ask(data, found, rules)
            if not isinstance(answer, _Died):
                return answer
            code = answer.code
        return _crash(f"the {found} decoder died of it twice, with exit code {code}")

    def _ask(
        self, data: Bytes, found: str, rules: ImageRules
    ) -> "CheckedImage | Rejection | _Died":
        child = self._start()
        assert child.stdin is not None, "a pipe"
        assert child.stdout is not None, "a pipe"
        try:
            pickle.dump((found, rules, len(data)), child.stdin)
            child.stdin.write(data)
            child.stdin.flush()
            if not select.select([child.stdout], [], [], self._longest_decode_s)[0]:
                self._stop()
                return _crash(f"no answer within {self._longest_decode_s:g} s")
            answer: CheckedImage | Rejection = pickle.load(child.stdout)
        except (BrokenPipeError, EOFError, pickle.UnpicklingError):
            return _Died(self._stop())
        if isinstance(answer, CheckedImage) and answer.data is None:
            return replace(answer, data=data)  # kept bytes do not travel back
        return answer

    def _start(self) -> "subprocess.Popen[bytes]":
        if self._child is None:
            package = str(Path(__file__).absolute().parent.parent)
            path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
            # Its standard input closes when this process ends, however that happens; so does it.
            self._child = subprocess.Popen(
                [sys.executable, "-m", "shards.decoder"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": path},
            )
        return self._child

    def _stop(self) -> int | None:
        child, self._child = self._child, None
        if child is None:
            return None
        assert child.stdin is not None, "a pipe"
        assert child.stdout is not None, "a pipe"
        code = child.poll()
        if code is None:
            child.kill()
            code = child.wait(timeout=30)
        with contextlib.suppress(BrokenPipeError):
            child.stdin.close()
        child.stdout.close()
        return code


def serve() -> None:
    """What the child does: read a request, answer it, until the parent is gone."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    requests = sys.stdin.buffer
    with os.fdopen(os.dup(1), "wb") as answers:
        os.dup2(2, 1)  # what a C library prints must not get between the answers
        warnings.simplefilter("ignore")  # the limits are ours, and are checked
        while True:
            try:
                found, rules, size = pickle.load(requests)
            except EOFError:
                return
            pickle.dump(decode(requests.read(size), found, rules), answers)
            answers.flush()


def decode(data: bytes, found: str, rules: ImageRules) -> CheckedImage | Rejection:
    """Check one image with Pillow. `data` of the answer is None where the bytes are kept."""
    if found == "webp" and (size := webp_size(data)) and (refused := rules.refuse(*size)):
        return refused  # Pillow takes memory for the whole canvas just to open one
    try:
        image = Image.open(io.BytesIO(data), formats=[_PILLOW_NAMES.get(found, found.upper())])
    except Image.DecompressionBombError as err:
        return Rejection(reason=Reason.BOMB, detail=_said(err))
    except Exception as err:  # plug-ins raise whatever their parsing meets
        if found == "heic":
            return Rejection(reason=Reason.UNSUPPORTED_FORMAT, detail=found)
        return Rejection(reason=_damage(data, found), detail=f"header: {_said(err)}")
    if refused := rules.refuse(*image.size):
        return refused
    if found == "png" and (broken := _broken_chunk(data)):
        return broken
    try:
        frames = int(getattr(image, "n_frames", 1))
        orientation = int(image.getexif().get(_ORIENTATION_TAG, 1))
        deep = _is_deep(image, data, found)
        turned = _orientation_for_others(data, found) not in (None, orientation)
        image.load()
        if refused := rules.refuse(*image.size):  # some formats show their true size only now
            return refused
        return _settle(
            image,
            found,
            rules,
            orientation=orientation,
            frames=frames,
            disputed=deep or turned,
        )
    except Exception as err:  # as above
        return Rejection(reason=_damage(data, found), detail=_said(err))


def _settle(
    image: Image.Image,
    found: str,
    rules: ImageRules,
    *,
    orientation: int,
    frames: int,
    disputed: bool,
) -> CheckedImage | Rejection:
    """Keep the bytes if every training decoder sees the same in them; rewrite them otherwise."""
    if image.mode == "F" or (image.mode == "I" and found == "tiff"):
        detail = f"{found} with pixels of type {image.mode}, whose range is not known"
        return Rejection(reason=Reason.UNSUPPORTED_FORMAT, detail=detail)
    has_alpha = image.has_transparency_data
    is_opaque = not has_alpha or image.convert("RGBA").getchannel("A").getextrema() == (255, 255)
    too_large = rules.resizes(*image.size)
    if (
        image.mode in _KEPT_MODES.get(found, ())
        and not too_large
        and is_opaque
        and not disputed
        and orientation == 1
        and (frames == 1 or found != "webp")
    ):
        flags = ImageFlag.ICC_PROFILE if image.info.get("icc_profile") else ImageFlag(0)
        flags |= ImageFlag.ALPHA if has_alpha else ImageFlag(0)
        flags |= ImageFlag.ANIMATED if frames > 1 else ImageFlag(0)
        return CheckedImage(
            data=None,
            format=found,
            width=image.width,
            height=image.height,
            orientation=1,
            flags=flags,
            action="keep",
            phash=_phash(image),
        )
    if too_large:
        pixels = np.atleast_3d(np.asarray(_plain(image)))
        height, width = pixels.shape[:2]
        size = resize.resized(width, height, rules.resize_side)
        return resized_image(resize.resize(pixels, size))
    action = "transcode" if is_opaque else "flatten_alpha"
    return _rewrite(image, action=action, is_lossy=found in _LOSSY and is_opaque)


def _rewrite(image: Image.Image, *, action: str, is_lossy: bool) -> CheckedImage:
    """What was lossy as JPEG, all else as PNG."""
    plain = _plain(image)
    written = io.BytesIO()
    if is_lossy:
        plain.save(written, "JPEG", quality=95, subsampling=0)
    else:
        plain.save(written, "PNG", compress_level=6)
    return CheckedImage(
        data=written.getvalue(),
        format="jpeg" if is_lossy else "png",
        width=plain.width,
        height=plain.height,
        orientation=1,
        flags=ImageFlag(0),
        action=action,
        phash=_phash(plain),
    )


def _plain(image: Image.Image) -> Image.Image:
    """The first frame, upright, 8 bits, on white: RGB or L."""
    upright = ImageOps.exif_transpose(image)
    is_gray = upright.mode in ("L", "LA", "1") or upright.mode.startswith("I")
    if upright.mode.startswith("I"):
        wide = np.asarray(upright).astype(np.float64)
        upright = Image.fromarray((wide / 257).round().clip(0, 255).astype(np.uint8))
    if upright.has_transparency_data:
        layer = upright.convert("RGBA")
        white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        upright = Image.alpha_composite(white, layer)
    return upright.convert("L" if is_gray else "RGB")


def _phash(image: Image.Image) -> int:
    return phash(np.asarray(image.convert("L")), size=image.size, averaged=1, orientation=1)


def _is_deep(image: Image.Image, data: bytes, found: str) -> bool:
    """Values other than 8 bits a channel, also where Pillow shows 8 of them."""
    if found == "png":
        return data[24] == 16
    if found == "pnm":
        # Training decoders ignore the greatest value, and take 15 of 15 for almost black.
        fields = re.sub(rb"#[^\r\n]*", b"", data[:1000]).split(maxsplit=4)
        return fields[0] not in (b"P5", b"P6") or fields[3:4] != [b"255"]
    return image.mode.startswith("I")


def _orientation_for_others(data: bytes, found: str) -> int | None:
    """What more lenient decoders read in a chunk that Pillow finds broken, or does not look for."""
    # A WebP chunk has its length behind its name.
    name, skipped = {"webp": (b"EXIF", 8), "png": (b"eXIf", 4)}.get(found, (b"", 0))
    if not name or (at := data.rfind(name)) < 0:
        return None
    return exif_orientation(data[at + skipped :].removeprefix(b"Exif\0\0"))


def webp_size(data: bytes) -> tuple[int, int] | None:
    """Canvas size out of the first chunk (RFC 9649, 2.5 to 2.7)."""
    kind, body = data[12:16], data[20:30]
    if len(body) < 10:
        return None
    if kind == b"VP8X":
        return 1 + int.from_bytes(body[4:7], "little"), 1 + int.from_bytes(body[7:10], "little")
    if kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", body, 1)
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    width, height = struct.unpack_from("<HH", body, 6)
    return width & 0x3FFF, height & 0x3FFF


def _broken_chunk(data: bytes) -> Rejection | None:
    """A critical PNG chunk that is cut short or fails its CRC, which Pillow would not tell."""
    at = 8
    while at + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        end = at + 12 + length
        if end > len(data):
            break
        (crc,) = struct.unpack_from(">I", data, end - 4)
        if not kind[0] & 0x20 and zlib.crc32(data[at + 4 : end - 4]) != crc:
            detail = f"{kind.decode('latin-1')} chunk at byte {at} fails its CRC"
            return Rejection(reason=Reason.CORRUPT, detail=detail)
        if kind == b"IEND":
            return None
        at = end
    return Rejection(reason=Reason.TRUNCATED, detail=f"a chunk is cut short at byte {at}")


def _damage(data: bytes, found: str) -> Reason:
    """Truncated if the format's end is missing, corrupt otherwise."""
    if found == "webp" and len(data) < 8 + int.from_bytes(data[4:8], "little"):
        return Reason.TRUNCATED
    if found == "gif" and not data.endswith(b";"):
        return Reason.TRUNCATED
    if found == "bmp" and len(data) < int.from_bytes(data[2:6], "little"):
        return Reason.TRUNCATED
    return Reason.CORRUPT


def _crash(detail: str) -> Rejection:
    return Rejection(reason=Reason.DECODER_CRASH, detail=detail)


def _said(err: Exception) -> str:
    return (str(err).splitlines() or [type(err).__name__])[0][:200]


if __name__ == "__main__":
    serve()
