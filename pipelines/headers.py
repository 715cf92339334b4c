"""Looks of microseconds at images of the rarer formats that shards hold: WebP, BMP, PNM."""

import re

from shards.decoder import webp_size
from shards.images import sniff

HEADER_BYTES = 1000
"""What of an image these looks need."""

_GAP = rb"(?:\s|#[^\r\n]*[\r\n])+"  # comments count as space (netpbm, ppm(5))
_PNM = re.compile(rb"P([56])" + _GAP + rb"(\d{1,9})" + _GAP + rb"(\d{1,9})" + _GAP + rb"255\s")


def look(head: bytes, *, size: int) -> tuple[int, int] | str:
    """Width and height that the header has, or what is wrong with it.

    What this refuses must not reach a decoder: DALI's for PNM writes beyond its memory when a
    header is damaged, and the process dies of it.

    Args:
        head: the first HEADER_BYTES of the image.
        size: all its bytes.
    """
    match sniff(head):
        case "webp":
            return _look_at_webp(head, size)
        case "bmp":
            return _look_at_bmp(head, size)
        case "pnm":
            return _look_at_pnm(head, size)
    return "not a format that shards hold"


def _look_at_webp(head: bytes, size: int) -> tuple[int, int] | str:
    if size < 8 + int.from_bytes(head[4:8], "little"):
        return "WebP without an end"
    return webp_size(head) or "WebP with a damaged header"


def _look_at_bmp(head: bytes, size: int) -> tuple[int, int] | str:
    if len(head) < 54 or size < int.from_bytes(head[2:6], "little"):
        return "BMP without an end"
    width = int.from_bytes(head[18:22], "little", signed=True)
    height = int.from_bytes(head[22:26], "little", signed=True)
    return width, abs(height)  # below 0: rows from top to bottom


def _look_at_pnm(head: bytes, size: int) -> tuple[int, int] | str:
    found = _PNM.match(head)
    if found is None:
        return "PNM with a damaged header"
    width, height = int(found[2]), int(found[3])
    if size < found.end() + width * height * (3 if found[1] == b"6" else 1):
        return "PNM without an end"
    return width, height
