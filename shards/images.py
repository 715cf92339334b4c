"""Is this a usable image, and what of it is kept: bytes and facts for the index, or a rejection.

Only JPEG is decoded in this process, by libjpeg-turbo. Every other decoder runs in a child process
(`decoder.py`), where a crash costs one object.
"""

import struct
from dataclasses import dataclass
from enum import IntFlag, StrEnum
from typing import Protocol

import simplejpeg

from shards.objects import Bytes


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
    """What a usable image is."""

    max_pixels: int
    min_side: int

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
    """keep, or what was done: flatten_alpha, transcode."""


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
    end = raw.find(b"\xff\xd9", header.first_scan)
    if end < 0:
        return Rejection(reason=Reason.TRUNCATED, detail="no end marker")
    if (scans := raw.count(b"\xff\xda", header.first_scan, end)) > _MOST_SCANS:
        return Rejection(reason=Reason.BOMB, detail=f"{scans} scans, limit {_MOST_SCANS}")
    try:
        # Strict: a warning is an error. Decoding an eighth of the size shows the same damage.
        simplejpeg.decode_jpeg(
            raw,
            colorspace="CMYK" if header.components == 4 else "GRAY",
            strict=True,
            min_factor=8,
            min_height=1,
            min_width=1,
        )
    except ValueError as err:
        said = (str(err).splitlines() or ["damaged"])[0][:200]
        early = "premature end" in said.lower() or "too short" in said.lower()
        return Rejection(reason=Reason.TRUNCATED if early else Reason.CORRUPT, detail=said)
    if header.components == 4:
        return decoder.check(data, "jpeg", rules)
    width, height = header.width, header.height
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
    )


def _read_jpeg_header(raw: bytes) -> _JpegHeader | Rejection:
    """Walk the marker segments up to the first scan (ITU T.81, B.1.1)."""
    at, frame, orientation, has_icc = 2, None, 0, False
    while at + 4 <= len(raw):
        if raw[at] != 0xFF:
            return Rejection(reason=Reason.CORRUPT, detail=f"no marker at byte {at}")
        marker = raw[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
            continue
        if marker == 0x01 or 0xD0 <= marker <= 0xD8:  # markers without a segment
            at += 2
            continue
        if marker == 0xD9:
            return Rejection(reason=Reason.CORRUPT, detail="ends before any scan")
        (length,) = struct.unpack_from(">H", raw, at + 2)
        body = raw[at + 4 : at + 2 + length]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC) and len(body) >= 6:
            frame = (marker & 0x0F, *struct.unpack_from(">BHHB", body))
        elif marker == 0xE1 and body.startswith(b"Exif\0\0") and not orientation:
            orientation = _exif_orientation(body[6:])
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
                orientation=orientation or 1,
                has_icc=has_icc,
                first_scan=at,
            )
        at += 2 + length
    return Rejection(reason=Reason.TRUNCATED, detail="ends inside the header")


def _exif_orientation(tiff: bytes) -> int:
    """Orientation tag of the first directory (EXIF 2.3, 4.6.4); 1 if it is missing or nonsense."""
    try:
        order = {b"II": "<", b"MM": ">"}[tiff[:2]]
        (directory,) = struct.unpack_from(f"{order}I", tiff, 4)
        (entries,) = struct.unpack_from(f"{order}H", tiff, directory)
        for entry in range(entries):
            tag, kind, count, value = struct.unpack_from(
                f"{order}HHIH", tiff, directory + 2 + 12 * entry
            )
            if tag == 0x0112 and kind == 3 and count == 1:
                return int(value) if 1 <= value <= 8 else 1
    except (KeyError, struct.error):
        pass
    return 1
