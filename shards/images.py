"""Is this a usable image, and what of it is kept: bytes and facts for the index, or a rejection.

Only JPEG is decoded in this process, by libjpeg-turbo. Every other decoder runs in a child process
(`decoder.py`), where a crash costs one object.
"""

import struct
from dataclasses import dataclass
from enum import IntFlag, StrEnum
from typing import Protocol

import numpy as np
import simplejpeg
from numpy.typing import NDArray

from shards import resize
from shards.objects import Bytes
from shards.phash import phash, squares


class Reason(StrEnum):
    """Why an object is not packed. The list is fixed: tools may rely on it."""

    EMPTY = "empty"
    """No bytes; folder markers too."""
    HTML_OR_XML = "html_or_xml"
    """A web page or an error message under an image's name."""
    UNKNOWN_MAGIC = "unknown_magic"
    """The first bytes belong to no image format that is known here."""
    UNSUPPORTED_FORMAT = "unsupported_format"
    """Can neither be decoded in training nor rewritten: SVG, HEIC, 12-bit JPEG, float TIFF, ..."""
    TRUNCATED = "truncated"
    """The image ends early."""
    CORRUPT = "corrupt"
    """The decoder found damage."""
    BOMB = "bomb"
    """More pixels than max_pixels, by the header, before any decoding; or absurdly many scans."""
    TOO_SMALL = "too_small"
    """Shorter side below min_side."""
    TOO_LARGE = "too_large"
    """More bytes than max_object_bytes; never fetched."""
    DECODER_CRASH = "decoder_crash"
    """The decoder died or hung on it, in a process of its own."""
    DUPLICATE = "duplicate"
    """The same bytes as another object, which is kept."""
    NOT_FOUND = "not_found"
    """Deleted between listing and fetching."""
    CHANGED = "changed"
    """Replaced between listing and fetching."""
    FORBIDDEN = "forbidden"
    """The credentials may read other objects, but not this one."""


class ImageFlag(IntFlag):
    """Facts of a packed image that some readers care about."""

    PROGRESSIVE = 1
    """A progressive JPEG: two to three times the decoding time, and never in hardware."""
    ICC_PROFILE = 2
    """Carries a colour profile, which training decoders ignore."""
    ALPHA = 4
    """Has an alpha channel, opaque everywhere."""
    ANIMATED = 8
    """Has more frames or pages; the first one counts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rejection:
    """Why an object was left out."""

    reason: Reason
    detail: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageRules:
    """What a usable image is, and how large it may stay."""

    max_pixels: int
    min_side: int
    resize_side: int
    """An image whose shorter side is larger is resized to this; 0 keeps every size."""

    def resizes(self, width: int, height: int) -> bool:
        """Whether an image of this size is too large to be kept as it is."""
        return 0 < self.resize_side < min(width, height)

    def refuse(self, width: int, height: int) -> Rejection | None:
        """A rejection if the header's size breaks the rules."""
        size = f"{width} x {height}"
        if width < 1 or height < 1:
            return Rejection(reason=Reason.CORRUPT, detail=f"header says {size}")
        if width * height > self.max_pixels:
            detail = f"{size} = {width * height:,} pixels, limit {self.max_pixels:,}"
            return Rejection(reason=Reason.BOMB, detail=detail)
        if min(width, height) < self.min_side:
            detail = f"{size}, shorter side below {self.min_side}"
            return Rejection(reason=Reason.TOO_SMALL, detail=detail)
        return None


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckedImage:
    """An image that every later stage can decode."""

    data: Bytes
    """The bytes to pack: the original ones unless `action` says otherwise."""
    format: str
    """A key of EXTENSIONS, by the first bytes of `data`."""
    width: int
    """Upright: EXIF orientation applied."""
    height: int
    orientation: int
    """EXIF orientation of `data`, 1 to 8; other than 1 in a JPEG only."""
    flags: ImageFlag
    action: str
    """keep, or what was done: flatten_alpha, transcode, resize."""
    phash: int
    """Perceptual hash of the picture, upright; 64 bits."""


class PixelDecoder(Protocol):
    """Decodes whatever is not a plain JPEG; `decoder.Decoder` does it in a child process."""

    def check(self, data: Bytes, found: str, rules: ImageRules) -> CheckedImage | Rejection: ...


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
_MARKUP = (b"<!doctype", b"<html", b"<?xml", b"<error", b"<head", b"<body", b"<svg", b"<!--")
_MOST_SCANS = 100


def check_image(data: Bytes, rules: ImageRules, decoder: PixelDecoder) -> CheckedImage | Rejection:
    """Format by the first bytes, limits by the header before any decoding, then a strict decode."""
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
        return Rejection(reason=Reason.UNKNOWN_MAGIC, detail=f"starts with {head[:8].hex()}")
    if found == "jpeg":
        return _check_jpeg(data, rules, decoder)
    return decoder.check(data, found, rules)


def sniff(head: bytes) -> str | None:
    """The image format by its first bytes, whatever the name says; None if none is known."""
    for start, name in _MAGIC:
        if head.startswith(start):
            return name
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "webp"
    if (
        head[:1] == b"P"
        and head[1:2] in (b"1", b"2", b"3", b"4", b"5", b"6")
        and head[2:3]
        in (
            b" ",
            b"\t",
            b"\n",
            b"\r",
        )
    ):
        return "pnm"
    if head[4:8] == b"ftyp":
        brands = head[8:32]
        if b"avif" in brands or b"avis" in brands:
            return "avif"
        if any(brand in brands for brand in (b"heic", b"heix", b"mif1", b"hevc")):
            return "heic"
    return None


@dataclass(frozen=True, kw_only=True, slots=True)
class _JpegHeader:
    width: int
    height: int
    components: int
    precision: int
    process: int
    """Low nibble of the SOF marker: 0 and 1 sequential, 2 progressive, others are rare."""
    orientation: int
    has_icc: bool
    first_scan: int
    """Byte of the first SOS marker."""


def _check_jpeg(data: Bytes, rules: ImageRules, decoder: PixelDecoder) -> CheckedImage | Rejection:
    raw = bytes(data)
    header = _read_jpeg_header(raw)
    if isinstance(header, Rejection):
        return header
    if refused := rules.refuse(header.width, header.height):
        return refused
    if header.precision != 8 or header.process > 2 or header.components not in (1, 3, 4):
        detail = (
            f"jpeg process {header.process}, {header.precision} bits, "
            f"{header.components} components"
        )
        return Rejection(reason=Reason.UNSUPPORTED_FORMAT, detail=detail)
    # Behind the first scan: the thumbnail in an EXIF header has an end marker of its own.
    # From the back, where it nearly always is.
    if raw.rfind(b"\xff\xd9", header.first_scan) < 0:
        return Rejection(reason=Reason.TRUNCATED, detail="no end marker")
    # Decoders read one scan only if that is sequential and has all components (its fifth byte).
    if header.process == 2 or raw[header.first_scan + 4] < header.components:
        end = raw.find(b"\xff\xd9", header.first_scan)
        if (scans := raw.count(b"\xff\xda", header.first_scan, end)) > _MOST_SCANS:
            return Rejection(reason=Reason.BOMB, detail=f"{scans} scans, limit {_MOST_SCANS}")
    width, height = header.width, header.height
    if header.components == 4:
        damage = _decode_jpeg(raw, "CMYK", -(-width // 8), -(-height // 8))
        return damage if isinstance(damage, Rejection) else decoder.check(data, "jpeg", rules)
    if rules.resizes(width, height):
        return _resize_jpeg(raw, header, rules.resize_side)
    averaged = min(squares(width, height), 8)
    gray = _decode_jpeg(raw, "GRAY", -(-width // averaged), -(-height // averaged))
    if isinstance(gray, Rejection):
        return gray
    hashed = phash(
        gray[..., 0], size=(width, height), averaged=averaged, orientation=header.orientation
    )
    if header.orientation >= 5:  # 5 to 8 lie on their side
        width, height = height, width
    flags = ImageFlag.PROGRESSIVE if header.process == 2 else ImageFlag(0)
    return CheckedImage(
        data=data,
        format="jpeg",
        width=width,
        height=height,
        orientation=header.orientation,
        flags=flags | (ImageFlag.ICC_PROFILE if header.has_icc else ImageFlag(0)),
        action="keep",
        phash=hashed,
    )


def _resize_jpeg(raw: bytes, header: _JpegHeader, side: int) -> CheckedImage | Rejection:
    size = resize.resized(header.width, header.height, side)
    colorspace = "GRAY" if header.components == 1 else "RGB"
    decoded = _decode_jpeg(raw, colorspace, *resize.decoded(header.width, header.height, side))
    if isinstance(decoded, Rejection):
        return decoded
    return resized_image(resize.upright(resize.resize(decoded, size), header.orientation))


def resized_image(pixels: NDArray[np.uint8]) -> CheckedImage:
    """What is packed of an image that was resized to these pixels, H x W x 3 or 1, upright."""
    height, width = pixels.shape[:2]
    return CheckedImage(
        data=resize.encode(pixels),
        format="jpeg",
        width=width,
        height=height,
        orientation=1,
        flags=ImageFlag(0),
        action="resize",
        phash=phash(resize.gray(pixels), size=(width, height), averaged=1, orientation=1),
    )


def _decode_jpeg(
    raw: bytes, colorspace: str, width: int, height: int
) -> NDArray[np.uint8] | Rejection:
    """Pixels at the smallest scale that is not below this size, or what is wrong with them.

    Strict: a warning is an error. Every scale shows the same damage, an eighth of the size too.
    """
    try:
        pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(
            raw, colorspace=colorspace, strict=True, min_width=width, min_height=height
        )
    except ValueError as err:
        said = (str(err).splitlines() or ["damaged"])[0][:200]
        if "subsampling" in said:  # whole, but libjpeg-turbo's interface has no name for it
            return Rejection(reason=Reason.UNSUPPORTED_FORMAT, detail=said)
        early = "premature end" in said.lower() or "too short" in said.lower()
        return Rejection(reason=Reason.TRUNCATED if early else Reason.CORRUPT, detail=said)
    return pixels


def _read_jpeg_header(raw: bytes) -> _JpegHeader | Rejection:
    """Walk the marker segments up to the first scan (ITU T.81, B.1.1)."""
    at, frame, orientation, has_icc = 2, None, 1, False
    while at + 4 <= len(raw):
        if raw[at] != 0xFF:
            return Rejection(reason=Reason.CORRUPT, detail=f"no marker at byte {at}")
        marker = raw[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
            continue
        if marker == 0x01 or 0xD0 <= marker <= 0xD8:  # no segment follows, and none belongs here
            return Rejection(reason=Reason.CORRUPT, detail=f"stray marker at byte {at}")
        if marker == 0xD9:
            return Rejection(reason=Reason.CORRUPT, detail="ends before any scan")
        (length,) = struct.unpack_from(">H", raw, at + 2)
        body = raw[at + 4 : at + 2 + length]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC) and len(body) >= 6:
            frame = (marker & 0x0F, *struct.unpack_from(">BHHB", body))
        elif marker == 0xE1 and body.startswith(b"Exif\0\0"):
            orientation = exif_orientation(body[6:]) or orientation  # the last one counts
        elif marker == 0xE2 and body.startswith(b"ICC_PROFILE\0"):
            has_icc = True
        elif marker == 0xDA:
            if frame is None:
                return Rejection(reason=Reason.CORRUPT, detail="a scan before any frame header")
            process, precision, height, width, components = frame
            return _JpegHeader(
                width=width,
                height=height,
                components=components,
                precision=precision,
                process=process,
                orientation=orientation,
                has_icc=has_icc,
                first_scan=at,
            )
        at += 2 + length
    return Rejection(reason=Reason.TRUNCATED, detail="ends inside the header")


def exif_orientation(tiff: bytes) -> int | None:
    """Orientation tag of the first directory (EXIF 2.3, 4.6.4); 1 if nonsense, None if missing.

    As lenient as DALI, whose upright size the index must name: type and count of the tag are not
    looked at, and anything but II is big-endian.
    """
    order = "<" if tiff[:2] == b"II" else ">"
    try:
        magic, directory = struct.unpack_from(f"{order}HI", tiff, 2)
        if magic != 42:
            return None
        (entries,) = struct.unpack_from(f"{order}H", tiff, directory)
        for entry in range(entries):
            tag, value = struct.unpack_from(f"{order}H6xH", tiff, directory + 2 + 12 * entry)
            if tag == 0x0112:
                return int(value) if 1 <= value <= 8 else 1
    except struct.error:
        pass
    return None
