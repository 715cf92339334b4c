"""Is this a usable image, and what do we keep of it: bytes and facts for the index, or a rejection."""

import io
import warnings
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import simplejpeg
from PIL import Image, ImageOps

from shards.store import Bytes


class Reason(StrEnum):
    """Why an object is not packed. The list is fixed: tools may rely on it."""

    EMPTY = "empty"
    """No bytes; folder markers too."""
    HTML_OR_XML = "html_or_xml"
    """A web page or an error message under an image's name."""
    UNKNOWN_FORMAT = "unknown_format"
    """The first bytes belong to no image format that is known here."""
    UNSUPPORTED_FORMAT = "unsupported_format"
    """An image format that can neither be decoded nor rewritten (SVG, HEIC without a plug-in)."""
    TRUNCATED = "truncated"
    """The image ends early."""
    CORRUPT = "corrupt"
    """The decoder found damage."""
    BOMB = "bomb"
    """More pixels than max_pixels, read from the header before any decoding."""
    TOO_SMALL = "too_small"
    """Shorter side below min_side."""
    DUPLICATE = "duplicate"
    """The same bytes as another object, which is kept."""
    NOT_FOUND = "not_found"
    """Deleted between listing and fetching."""
    CHANGED = "changed"
    """Replaced between listing and fetching."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rejection:
    """Why an object was left out."""

    reason: Reason
    detail: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageRules:
    """What a usable image is."""

    max_pixels: int
    min_side: int


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckedImage:
    """An image that every later stage can decode."""

    data: Bytes
    """The bytes to pack: the original ones unless `action` says otherwise."""
    format: str
    """jpeg, png, webp, bmp, tiff, jp2 or pnm, by the first bytes of `data`."""
    width: int
    """Upright: EXIF orientation applied."""
    height: int
    orientation: int
    """EXIF orientation of `data`, 1 to 8."""
    action: str
    """keep, or what was done: flatten_alpha, transcode."""


EXTENSIONS = {
    "jpeg": "jpg",
    "png": "png",
    "webp": "webp",
    "bmp": "bmp",
    "tiff": "tif",
    "jp2": "jp2",
    "pnm": "pnm",
}
"""Formats that training decodes, with the extension of their tar members."""

_REWRITTEN = {"gif": "GIF", "avif": "AVIF", "ico": "ICO", "heic": "HEIF"}
_PILLOW_NAMES = {"jpeg": "JPEG", "jp2": "JPEG2000", "pnm": "PPM"}
_MARKUP = (b"<!doctype", b"<html", b"<?xml", b"<error", b"<head", b"<body", b"<svg")
_ORIENTATION_TAG = 0x0112
_TRANSPOSED = {5, 6, 7, 8}


def check_image(data: Bytes, rules: ImageRules) -> CheckedImage | Rejection:
    """Header first, pixel limit before any decoding, then a full decode by the strictest decoder."""
    if not len(data):
        return Rejection(reason=Reason.EMPTY, detail="0 bytes")
    head = bytes(data[:512])
    found = sniff(head)
    if found is None:
        text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
        if text.startswith(_MARKUP):
            if b"<svg" in text:
                return Rejection(reason=Reason.UNSUPPORTED_FORMAT, detail="svg")
            return Rejection(reason=Reason.HTML_OR_XML, detail="starts like a web page")
        return Rejection(reason=Reason.UNKNOWN_FORMAT, detail=f"starts with {head[:8].hex()}")
    with warnings.catch_warnings():
        # Pillow warns of large images and odd EXIF; the limits here are ours and are checked.
        warnings.simplefilter("ignore")
        return _check(data, found, rules)


def sniff(head: bytes) -> str | None:
    """The image format by its first bytes, whatever the name says; None if none is known."""
    for start, name in _MAGIC:
        if head.startswith(start):
            return name
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "webp"
    if head[:1] == b"P" and head[1:2] in b"123456" and head[2:3].isspace():
        return "pnm"
    if head[4:8] == b"ftyp":
        brands = head[8:32]
        if b"avif" in brands or b"avis" in brands:
            return "avif"
        if any(brand in brands for brand in (b"heic", b"heix", b"mif1", b"hevc")):
            return "heic"
    return None


_MAGIC = (
    (b"\xff\xd8\xff", "jpeg"),
    (b"\x89PNG\r\n\x1a\n", "png"),
    (b"GIF87a", "gif"),
    (b"GIF89a", "gif"),
    (b"BM", "bmp"),
    (b"II*\x00", "tiff"),
    (b"MM\x00*", "tiff"),
    (b"\x00\x00\x00\x0cjP  ", "jp2"),
    (b"\x00\x00\x01\x00", "ico"),
)


def _check(data: Bytes, found: str, rules: ImageRules) -> CheckedImage | Rejection:
    try:
        image = Image.open(io.BytesIO(data), formats=[_pillow_name(found)])
    except Exception as err:  # Pillow's plug-ins raise whatever their parsing meets
        if found in ("heic", "avif"):
            return Rejection(reason=Reason.UNSUPPORTED_FORMAT, detail=found)
        if isinstance(err, Image.DecompressionBombError):
            return Rejection(reason=Reason.BOMB, detail=str(err)[:200])
        return Rejection(reason=_damage(data, found), detail=f"header: {_said(err)}")
    width, height = image.size
    if width * height > rules.max_pixels:
        detail = f"{width} x {height} = {width * height:,} pixels, limit {rules.max_pixels:,}"
        return Rejection(reason=Reason.BOMB, detail=detail)
    if min(width, height) < rules.min_side:
        detail = f"{width} x {height}, shorter side below {rules.min_side}"
        return Rejection(reason=Reason.TOO_SMALL, detail=detail)
    try:
        orientation = int(image.getexif().get(_ORIENTATION_TAG, 1))
        if found == "jpeg" and image.mode in ("RGB", "L"):
            # Strict: a warning is an error. Decoding an eighth of the size shows the same damage.
            simplejpeg.decode_jpeg(
                data, colorspace="GRAY", strict=True, min_factor=8, min_height=1, min_width=1
            )
        else:
            image.load()
    except Exception as err:  # as above
        return Rejection(reason=_damage(data, found), detail=_said(err))
    if orientation not in range(1, 9):
        orientation = 1
    has_alpha = image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info
    plain = image.mode in ("RGB", "L", "P", "1") and not has_alpha
    if found in EXTENSIONS and plain:
        if orientation in _TRANSPOSED:
            width, height = height, width
        return CheckedImage(
            data=data,
            format=found,
            width=width,
            height=height,
            orientation=orientation,
            action="keep",
        )
    return _rewrite(image, action="flatten_alpha" if has_alpha else "transcode")


def _rewrite(image: Image.Image, *, action: str) -> CheckedImage:
    """The first frame, upright, 8-bit RGB on white, as PNG: no loss, and every decoder reads it."""
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I") or upright.mode == "F":
        wide = np.asarray(upright, dtype=np.float64)
        span = 65535.0 if upright.mode.startswith("I") else max(float(wide.max()), 1.0)
        upright = Image.fromarray((wide * (255.0 / span)).round().clip(0, 255).astype(np.uint8))
    if upright.mode in ("RGBA", "LA", "PA") or "transparency" in upright.info:
        layer = upright.convert("RGBA")
        white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        upright = Image.alpha_composite(white, layer)
    rgb = upright.convert("RGB")
    written = io.BytesIO()
    rgb.save(written, "PNG", compress_level=6)
    return CheckedImage(
        data=written.getvalue(),
        format="png",
        width=rgb.width,
        height=rgb.height,
        orientation=1,
        action=action,
    )


def _damage(data: Bytes, found: str) -> Reason:
    """Truncated if the format's end marker is missing, corrupt otherwise."""
    tail = bytes(data[-65536:])
    if found == "jpeg" and b"\xff\xd9" not in tail:
        return Reason.TRUNCATED
    if found == "png" and b"IEND" not in tail:
        return Reason.TRUNCATED
    if found == "webp" and len(data) < 8 + int.from_bytes(bytes(data[4:8]), "little"):
        return Reason.TRUNCATED
    if found == "gif" and not tail.endswith(b";"):
        return Reason.TRUNCATED
    return Reason.CORRUPT


def _pillow_name(found: str) -> str:
    return _PILLOW_NAMES.get(found) or _REWRITTEN.get(found) or found.upper()


def _said(err: Exception) -> str:
    return (str(err).splitlines() or [type(err).__name__])[0][:200]
