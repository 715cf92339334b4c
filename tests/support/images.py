"""Good and spoilt images of every kind that a raw bucket holds, made on the spot."""

import io
import struct
import zlib
from dataclasses import dataclass

import numpy as np
from PIL import Image

from demo.images import png_bomb

WIDTH, HEIGHT = 72, 48


@dataclass(frozen=True, kw_only=True, slots=True)
class Good:
    """An image that must be packed, and what must become of it."""

    data: bytes
    format: str
    """Of the packed bytes."""
    action: str = "keep"
    size: tuple[int, int] = (WIDTH, HEIGHT)
    """Upright."""
    orientation: int = 1


def picture(
    seed: int = 0, *, mode: str = "RGB", size: tuple[int, int] = (WIDTH, HEIGHT)
) -> Image.Image:
    """A smooth picture with some noise; another for each seed."""
    draw = np.random.default_rng(seed)
    coarse = Image.fromarray(draw.integers(0, 256, (4, 6, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC), dtype=float)
    pixels = (smooth + draw.normal(0, 4, smooth.shape)).clip(0, 255).astype(np.uint8)
    return Image.fromarray(pixels).convert(mode)


def encode(image: Image.Image, format: str, **options: object) -> bytes:
    """An image as the bytes of a file."""
    written = io.BytesIO()
    image.save(written, format, **options)
    return written.getvalue()


def jpeg(seed: int = 0, **options: object) -> bytes:
    """A JPEG; another for each seed."""
    return encode(picture(seed), "JPEG", quality=90, **options)


def exif(orientation: int) -> bytes:
    """EXIF with nothing but an orientation."""
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags.tobytes()


def good_images() -> dict[str, Good]:
    """Every kind of image that is packed, by name."""
    rgb = picture(1)
    clear = rgb.convert("RGBA")
    clear.putalpha(Image.linear_gradient("L").resize(rgb.size))
    opaque = rgb.convert("RGBA")
    deep = (np.asarray(rgb.convert("L")).astype(np.uint16) * 257).astype(np.uint16)
    gray_alpha = clear.convert("LA")
    palette = rgb.quantize(64)
    frames = [picture(seed) for seed in (2, 3)]
    turned = (HEIGHT, WIDTH)
    mpo = io.BytesIO()
    rgb.save(mpo, "MPO", save_all=True, append_images=[frames[0]])
    return {
        "jpeg": Good(data=jpeg(1), format="jpeg"),
        "jpeg-progressive": Good(data=jpeg(1, progressive=True), format="jpeg"),
        "jpeg-gray": Good(data=encode(picture(1, mode="L"), "JPEG"), format="jpeg"),
        "jpeg-422": Good(data=jpeg(1, subsampling=1), format="jpeg"),
        "jpeg-one-pixel": Good(
            data=encode(picture(size=(1, 1)), "JPEG"), format="jpeg", size=(1, 1)
        ),
        "jpeg-thin": Good(
            data=encode(picture(size=(3, 500)), "JPEG"), format="jpeg", size=(3, 500)
        ),
        "jpeg-orientation-3": Good(data=jpeg(1, exif=exif(3)), format="jpeg", orientation=3),
        "jpeg-orientation-6": Good(
            data=jpeg(1, exif=exif(6)), format="jpeg", orientation=6, size=turned
        ),
        "jpeg-orientation-nonsense": Good(data=jpeg(1, exif=exif(77)), format="jpeg"),
        "jpeg-tail": Good(data=jpeg(1) + bytes(range(256)) * 20, format="jpeg"),
        "jpeg-two-frames": Good(data=mpo.getvalue(), format="jpeg"),
        "jpeg-cmyk": Good(
            data=encode(rgb.convert("CMYK"), "JPEG"), format="jpeg", action="transcode"
        ),
        "jpeg-cmyk-turned": Good(
            data=encode(rgb.convert("CMYK"), "JPEG", exif=exif(8)),
            format="jpeg",
            action="transcode",
            size=turned,
        ),
        "png": Good(data=encode(rgb, "PNG"), format="png"),
        "png-gray": Good(data=encode(rgb.convert("L"), "PNG"), format="png"),
        "png-one-bit": Good(data=encode(rgb.convert("1"), "PNG"), format="png"),
        "png-palette": Good(data=encode(palette, "PNG"), format="png"),
        "png-opaque": Good(data=encode(opaque, "PNG"), format="png"),
        "png-alpha": Good(data=encode(clear, "PNG"), format="png", action="flatten_alpha"),
        "png-gray-alpha": Good(
            data=encode(gray_alpha, "PNG"), format="png", action="flatten_alpha"
        ),
        "png-palette-transparent": Good(
            data=encode(palette, "PNG", transparency=3), format="png", action="flatten_alpha"
        ),
        "png-16-bit": Good(
            data=encode(Image.fromarray(deep), "PNG"), format="png", action="transcode"
        ),
        "png-16-bit-rgb": Good(data=_deep_png(rgb), format="png", action="transcode"),
        "png-turned": Good(
            data=encode(rgb, "PNG", exif=exif(6)), format="png", action="transcode", size=turned
        ),
        "png-animated": Good(
            data=encode(rgb, "PNG", save_all=True, append_images=frames), format="png"
        ),
        "webp": Good(data=encode(rgb, "WEBP"), format="webp"),
        "webp-lossless": Good(data=encode(rgb, "WEBP", lossless=True), format="webp"),
        "webp-alpha": Good(data=encode(clear, "WEBP"), format="png", action="flatten_alpha"),
        "webp-animated": Good(
            data=encode(rgb, "WEBP", save_all=True, append_images=frames),
            format="png",
            action="transcode",
        ),
        "gif": Good(data=encode(palette, "GIF"), format="png", action="transcode"),
        "gif-animated": Good(
            data=encode(rgb, "GIF", save_all=True, append_images=frames),
            format="png",
            action="transcode",
        ),
        "avif": Good(data=encode(rgb, "AVIF"), format="jpeg", action="transcode"),
        "ico": Good(
            data=encode(rgb.resize((32, 32)), "ICO", sizes=[(32, 32)]),
            format="png",
            action="transcode",
            size=(32, 32),
        ),
        "bmp": Good(data=encode(rgb, "BMP"), format="bmp"),
        "bmp-palette": Good(data=encode(palette, "BMP"), format="bmp"),
        "bmp-one-bit": Good(data=encode(rgb.convert("1"), "BMP"), format="bmp"),
        "tiff": Good(data=encode(rgb, "TIFF"), format="tiff"),
        "tiff-lzw": Good(data=encode(rgb, "TIFF", compression="tiff_lzw"), format="tiff"),
        "tiff-deflate": Good(
            data=encode(rgb, "TIFF", compression="tiff_adobe_deflate"), format="tiff"
        ),
        "tiff-gray": Good(data=encode(rgb.convert("L"), "TIFF"), format="tiff"),
        "tiff-16-bit": Good(
            data=encode(Image.fromarray(deep), "TIFF"), format="png", action="transcode"
        ),
        "tiff-palette": Good(data=encode(palette, "TIFF"), format="png", action="transcode"),
        "tiff-cmyk": Good(
            data=encode(rgb.convert("CMYK"), "TIFF"), format="png", action="transcode"
        ),
        "jp2": Good(data=encode(rgb, "JPEG2000"), format="jp2"),
        "jp2-gray": Good(data=encode(rgb.convert("L"), "JPEG2000"), format="jp2"),
        "ppm": Good(data=encode(rgb, "PPM"), format="pnm"),
        "pgm": Good(data=encode(rgb.convert("L"), "PPM"), format="pnm"),
        "pgm-16-bit": Good(
            data=b"P5\n72 48\n65535\n" + deep.astype(">u2").tobytes(),
            format="png",
            action="transcode",
        ),
    }


def spoilt_images() -> dict[str, tuple[bytes, str]]:
    """What must be rejected, by name: the bytes and the reason."""
    whole, png, webp = jpeg(5), encode(picture(5), "PNG"), encode(picture(5), "WEBP")
    noisy = encode(Image.effect_noise((200, 150), 90).convert("RGB"), "JPEG", quality=95)
    with_thumbnail = _with_thumbnail(noisy)
    gif, avif = encode(picture(5), "GIF"), encode(picture(5), "AVIF")
    return {
        "empty.jpg": (b"", "empty"),
        "page.jpg": (b"<!DOCTYPE html><html></html>", "html_or_xml"),
        "denied.png": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code>', "html_or_xml"),
        "spaces-then-page.jpg": (b"\xef\xbb\xbf \n <HTML>", "html_or_xml"),
        "drawing.svg": (b'<svg xmlns="x"></svg>', "unsupported_format"),
        "drawing-xml.svg": (b'<?xml version="1.0"?>\n<svg></svg>', "unsupported_format"),
        "zeros.jpg": (bytes(1000), "unknown_magic"),
        "document.pdf": (b"%PDF-1.4\n" + bytes(200), "unknown_magic"),
        "archive.jpg": (b"PK\x03\x04" + bytes(100), "unknown_magic"),
        "video.mp4": (b"\0\0\0\x18ftypmp42" + bytes(100), "unknown_magic"),
        "photo.heic": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(80), "unsupported_format"),
        "three-bytes.jpg": (b"\xff\xd8\xff", "truncated"),
        "half.jpg": (noisy[: len(noisy) // 2], "truncated"),
        "no-end.jpg": (whole[:-2], "truncated"),
        "half-with-thumbnail.jpg": (with_thumbnail[: len(with_thumbnail) // 2], "truncated"),
        "half-header.jpg": (whole[:300], "truncated"),
        "half-with-end.jpg": (noisy[: len(noisy) // 2] + b"\xff\xd9", "truncated"),
        "zero-tail.jpg": (noisy[: len(noisy) // 2] + bytes(len(noisy) // 2), "truncated"),
        "overwritten.jpg": (_overwrite(noisy, len(noisy) // 2, 200), "corrupt"),
        "no-height.jpg": (_jpeg_size(whole, WIDTH, 0), "corrupt"),
        "huge-header.jpg": (_jpeg_size(whole, 65_500, 65_500), "bomb"),
        "scans.jpg": (_many_scans(jpeg(5, progressive=True)), "bomb"),
        "arithmetic.jpg": (
            whole.replace(b"\xff\xc0\x00\x11", b"\xff\xc9\x00\x11"),
            "unsupported_format",
        ),
        "half.png": (png[: len(png) // 2], "truncated"),
        "no-end.png": (png[:-12], "truncated"),
        "bad-crc.png": (_overwrite(png, len(png) // 2, 4), "corrupt"),
        "bad-pixels.png": (_png(WIDTH, HEIGHT, b"not deflated"), "corrupt"),
        "too-few-rows.png": (_png(WIDTH, HEIGHT, zlib.compress(bytes(73 * 3))), "corrupt"),
        "bomb.png": (png_bomb(side=12_000), "bomb"),
        "huge-header.png": (_png(100_000, 100_000, zlib.compress(b"0")), "bomb"),
        "half.webp": (webp[: len(webp) // 2], "truncated"),
        "bad.webp": (_overwrite(webp, 24, 60), "corrupt"),
        "huge-canvas.webp": (_huge_webp(), "bomb"),
        "half.gif": (gif[: len(gif) // 2], "truncated"),
        "half.avif": (avif[: len(avif) // 2], "corrupt"),
        "half.bmp": (encode(picture(5), "BMP")[:3000], "truncated"),
        "half.tif": (encode(picture(5), "TIFF")[:3000], "corrupt"),
        "half.jp2": (encode(picture(5), "JPEG2000")[:600], "corrupt"),
        "half.ppm": (encode(picture(5), "PPM")[:3000], "corrupt"),
        "float.tif": (
            encode(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"),
            "unsupported_format",
        ),
    }


def _overwrite(data: bytes, at: int, count: int) -> bytes:
    noise = np.random.default_rng(0).integers(1, 255, count, dtype=np.uint8).tobytes()
    return data[:at] + noise + data[at + count :]


def _jpeg_size(data: bytes, width: int, height: int) -> bytes:
    frame = data.index(b"\xff\xc0")
    return data[: frame + 5] + struct.pack(">HH", height, width) + data[frame + 9 :]


def _many_scans(progressive: bytes) -> bytes:
    """The last scan, two hundred times over."""
    start = progressive.rindex(b"\xff\xda")
    return progressive[:-2] + progressive[start:-2] * 200 + progressive[-2:]


def _with_thumbnail(data: bytes) -> bytes:
    """A JPEG whose header carries a whole one, end marker and all."""
    inner = jpeg(9)
    body = b"Exif\0\0" + b"II*\0\x08\0\0\0\0\0\0\0\0\0" + inner
    return data[:2] + b"\xff\xe1" + struct.pack(">H", 2 + len(body)) + body + data[2:]


def _png(width: int, height: int, pixels: bytes, *, depth: int = 8) -> bytes:
    """An RGB PNG with any pixel data, its checksums right."""
    header = struct.pack(">IIBBBBB", width, height, depth, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", pixels), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


def _deep_png(image: Image.Image) -> bytes:
    """RGB with 16 bits a channel, which Pillow cannot write."""
    pixels = np.asarray(image).astype(">u2") * np.array(257, dtype=">u2")
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    return _png(image.width, image.height, zlib.compress(rows), depth=16)


def _huge_webp() -> bytes:
    canvas = (16_000 - 1).to_bytes(3, "little") * 2
    body = b"WEBPVP8X" + struct.pack("<I", 10) + bytes(4) + canvas
    return b"RIFF" + struct.pack("<I", len(body)) + body
