"""Good and spoilt images of every kind that a raw bucket holds, made on the spot."""

import gzip
import io
import struct
import tarfile
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
        "jpeg-restarts": Good(data=jpeg(1, restart_marker_rows=1), format="jpeg"),
        "jpeg-huge-header": Good(data=_huge_header(jpeg(1)), format="jpeg"),
        "jpeg-thumbnail": Good(data=_with_thumbnail(jpeg(1)), format="jpeg"),
        "jpeg-fill-bytes": Good(data=_fill_bytes(jpeg(1)), format="jpeg"),
        "jpeg-ycck": Good(
            data=_ycck(encode(rgb.convert("CMYK"), "JPEG")), format="jpeg", action="transcode"
        ),
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
        "png-two-bits": Good(data=encode(rgb.quantize(4), "PNG", bits=2), format="png"),
        "png-interlaced": Good(data=_interlaced_png(rgb), format="png"),
        "png-transparent-gray": Good(
            data=encode(rgb.convert("L"), "PNG", transparency=90),
            format="png",
            action="flatten_alpha",
        ),
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
        "webp-turned": Good(
            data=encode(rgb, "WEBP", exif=exif(6)), format="png", action="transcode", size=turned
        ),
        "webp-hidden-exif": Good(
            data=_without_flags(encode(rgb, "WEBP", exif=exif(6))), format="png", action="transcode"
        ),
        "gif": Good(data=encode(palette, "GIF"), format="png", action="transcode"),
        "gif-animated": Good(
            data=encode(rgb, "GIF", save_all=True, append_images=frames),
            format="png",
            action="transcode",
        ),
        "avif": Good(data=encode(rgb, "AVIF"), format="jpeg", action="transcode"),
        "avif-alpha": Good(data=encode(clear, "AVIF"), format="png", action="flatten_alpha"),
        "ico": Good(
            data=encode(rgb.resize((32, 32)), "ICO", sizes=[(32, 32)]),
            format="png",
            action="transcode",
            size=(32, 32),
        ),
        "bmp": Good(data=encode(rgb, "BMP"), format="bmp"),
        "bmp-palette": Good(data=encode(palette, "BMP"), format="png", action="transcode"),
        "bmp-one-bit": Good(data=encode(rgb.convert("1"), "BMP"), format="png", action="transcode"),
        "bmp-top-down": Good(data=_bmp(rgb, bits=24, top_down=True), format="bmp"),
        "bmp-32-bit": Good(data=_bmp(rgb, bits=32), format="bmp"),
        "tiff-big-endian": Good(data=_tiff(rgb, order=">"), format="png", action="transcode"),
        "tiff-planar": Good(data=_tiff(rgb, planar=True), format="png", action="transcode"),
        "tiff-white-is-zero": Good(
            data=_tiff(rgb.convert("L"), inverted=True), format="png", action="transcode"
        ),
        "tiff-jpeg": Good(
            data=encode(rgb, "TIFF", compression="jpeg"), format="png", action="transcode"
        ),
        "tiff-packbits": Good(
            data=encode(rgb, "TIFF", compression="packbits"), format="png", action="transcode"
        ),
        "tiff-fax": Good(
            data=encode(rgb.convert("1"), "TIFF", compression="group4"),
            format="png",
            action="transcode",
        ),
        "tiff-alpha": Good(data=encode(clear, "TIFF"), format="png", action="flatten_alpha"),
        "tiff-pages": Good(
            data=encode(rgb.copy(), "TIFF", save_all=True, append_images=[picture(2)]),
            format="png",
            action="transcode",
        ),
        "tiff-turned": Good(
            data=encode(rgb, "TIFF", tiffinfo={274: 6}),
            format="png",
            action="transcode",
            size=turned,
        ),
        "tiff": Good(data=encode(rgb, "TIFF"), format="png", action="transcode"),
        "tiff-lzw": Good(
            data=encode(rgb, "TIFF", compression="tiff_lzw"), format="png", action="transcode"
        ),
        "tiff-deflate": Good(
            data=encode(rgb, "TIFF", compression="tiff_adobe_deflate"),
            format="png",
            action="transcode",
        ),
        "tiff-gray": Good(data=encode(rgb.convert("L"), "TIFF"), format="png", action="transcode"),
        "tiff-16-bit": Good(
            data=encode(Image.fromarray(deep), "TIFF"), format="png", action="transcode"
        ),
        "tiff-palette": Good(data=encode(palette, "TIFF"), format="png", action="transcode"),
        "tiff-cmyk": Good(
            data=encode(rgb.convert("CMYK"), "TIFF"), format="png", action="transcode"
        ),
        "jp2": Good(data=encode(rgb, "JPEG2000"), format="jpeg", action="transcode"),
        "jp2-gray": Good(
            data=encode(rgb.convert("L"), "JPEG2000"), format="jpeg", action="transcode"
        ),
        "ppm": Good(data=encode(rgb, "PPM"), format="pnm"),
        "pgm": Good(data=encode(rgb.convert("L"), "PPM"), format="pnm"),
        "pbm": Good(data=encode(rgb.convert("1"), "PPM"), format="png", action="transcode"),
        "ppm-plain": Good(data=_plain_ppm(rgb), format="png", action="transcode"),
        "ppm-comment": Good(data=encode(rgb, "PPM").replace(b"\n", b"\n# 15\n", 1), format="pnm"),
        "pgm-four-bits": Good(
            data=b"P5\n72 48\n15\n"
            + np.round(np.asarray(rgb.convert("L")) / 17).astype(np.uint8).tobytes(),
            format="png",
            action="transcode",
        ),
        "ppm-ten-bits": Good(
            data=b"P6\n72 48\n1023\n"
            + (np.asarray(rgb).astype(np.uint16) * 4).astype(">u2").tobytes(),
            format="png",
            action="transcode",
        ),
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
    bmp, jp2 = encode(picture(5), "BMP"), encode(picture(5), "JPEG2000")
    return {
        "empty.jpg": (b"", "empty"),
        "page.jpg": (b"<!DOCTYPE html><html></html>", "html_or_xml"),
        "denied.png": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code>', "html_or_xml"),
        "spaces-then-page.jpg": (b"\xef\xbb\xbf \n <HTML>", "html_or_xml"),
        "drawing.svg": (b'<svg xmlns="x"></svg>', "unsupported_format"),
        "drawing-xml.svg": (b'<?xml version="1.0"?>\n<svg></svg>', "unsupported_format"),
        "zeros.jpg": (bytes(1000), "unknown_magic"),
        "noise.jpg": (np.random.default_rng(3).bytes(3000), "unknown_magic"),
        "layers.psd": (b"8BPS\0\x01" + bytes(300), "unknown_magic"),
        "photo.jpg.gz": (gzip.compress(whole), "unknown_magic"),
        "photos.tar": (_tar(whole), "unknown_magic"),
        "photo.jxl": (b"\xff\x0a\x78\x02\x62\x08" + bytes(90), "unknown_magic"),
        "big.tif": (encode(picture(5), "TIFF", big_tiff=True), "unknown_magic"),
        "odd-sampling.jpg": (_odd_sampling(whole), "unsupported_format"),
        "huge-header.gif": (gif[:6] + b"\xff" * 4 + gif[10:], "bomb"),
        "huge-header.bmp": (_patch(bmp, 18, struct.pack("<ii", 60_000, 60_000)), "bomb"),
        "no-width.bmp": (_patch(bmp, 18, struct.pack("<ii", 0, 48)), "corrupt"),
        "huge-header.ppm": (b"P6\n90000 90000\n255\n" + bytes(100), "bomb"),
        "huge-header.jp2": (_huge_jp2(jp2), "bomb"),
        "lying-header.jp2": (
            _patch(jp2, jp2.index(b"\xff\x51") + 6, struct.pack(">II", 60_000, 60_000)),
            "corrupt",
        ),
        "huge-header.tif": (_tiff(picture(5), size=(60_000, 60_000)), "bomb"),
        "no-colours.png": (_png(WIDTH, HEIGHT, zlib.compress(bytes(73 * 48)), colour=3), "corrupt"),
        "text-bomb.png": (
            _png(1, 1, zlib.compress(bytes(4)), text=bytes(90_000_000)),
            "corrupt",
        ),
        "no-frame.ico": (b"\0\0\x01\0\x01\0" + bytes(40), "corrupt"),
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


def _png(
    width: int,
    height: int,
    pixels: bytes,
    *,
    depth: int = 8,
    colour: int = 2,
    interlaced: bool = False,
    text: bytes | None = None,
) -> bytes:
    """A PNG with any pixel data, its checksums right; RGB unless `colour` says otherwise."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced)
    extra = () if text is None else ((b"zTXt", b"Comment\0\0" + zlib.compress(text)),)
    chunks = ((b"IHDR", header), *extra, (b"IDAT", pixels), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


def _deep_png(image: Image.Image) -> bytes:
    """RGB with 16 bits a channel, which Pillow cannot write."""
    pixels = np.asarray(image).astype(">u2") * np.array(257, dtype=">u2")
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    return _png(image.width, image.height, zlib.compress(rows), depth=16)


def _without_flags(webp: bytes) -> bytes:
    """The header's flags say that there is no EXIF (RFC 9649, 2.7)."""
    return _patch(webp, 20, b"\0")


def _huge_webp() -> bytes:
    canvas = (16_000 - 1).to_bytes(3, "little") * 2
    body = b"WEBPVP8X" + struct.pack("<I", 10) + bytes(4) + canvas
    return b"RIFF" + struct.pack("<I", len(body)) + body


def _interlaced_png(image: Image.Image) -> bytes:
    """The seven passes of Adam7 (PNG specification, 8.2), which Pillow cannot write."""
    pixels, rows = np.asarray(image), b""
    passes = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4))
    for x, y, every_x, every_y in (*passes, (1, 0, 2, 2), (0, 1, 1, 2)):
        rows += b"".join(b"\0" + row.tobytes() for row in pixels[y::every_y, x::every_x])
    return _png(image.width, image.height, zlib.compress(rows), interlaced=True)


def _patch(data: bytes, at: int, new: bytes) -> bytes:
    return data[:at] + new + data[at + len(new) :]


def _huge_header(data: bytes) -> bytes:
    """Four segments of 64 kB before the image, one of them nonsense under the name of EXIF."""
    segment = b"\xff\xe1\xff\xff" + b"Exif\0\0" + b"\xff\xd9" * 32763 + b"\0"
    return data[:2] + segment + segment.replace(b"Exif", b"Else") * 3 + data[2:]


def _fill_bytes(data: bytes) -> bytes:
    """0xFF before a marker any number of times (ITU T.81, B.1.1.2)."""
    tables = data.index(b"\xff\xdb")
    return data[:tables] + b"\xff" * 7 + data[tables:]


def _ycck(cmyk: bytes) -> bytes:
    """A JPEG whose Adobe segment says YCCK: strange colours, but whole."""
    transform = cmyk.index(b"Adobe") + 11
    return _patch(cmyk, transform, b"\x02")


def _odd_sampling(data: bytes) -> bytes:
    """Luma sampled less than chroma: legal, but nothing that libjpeg-turbo has a name for."""
    frame = data.index(b"\xff\xc0")
    return _patch(data, frame + 11, bytes([0x11, 0, 2, 0x22]))


def _tar(data: bytes) -> bytes:
    written = io.BytesIO()
    with tarfile.open(fileobj=written, mode="w") as tar:
        member = tarfile.TarInfo("photo.jpg")
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))
    return written.getvalue()


def _plain_ppm(image: Image.Image) -> bytes:
    numbers = " ".join(map(str, np.asarray(image).ravel().tolist()))
    return f"P3\n{image.width} {image.height}\n255\n{numbers}\n".encode()


def _bmp(image: Image.Image, *, bits: int, top_down: bool = False) -> bytes:
    """A BMP of 24 or 32 bits a pixel."""
    pixels = np.asarray(image)[:, :, ::-1]
    if bits == 32:
        pixels = np.dstack([pixels, np.zeros(pixels.shape[:2], np.uint8)])
    assert image.width * bits % 32 == 0, "rows need no padding"
    body = (pixels if top_down else pixels[::-1]).tobytes()
    height = -image.height if top_down else image.height
    header = struct.pack("<IiiHHIIiiII", 40, image.width, height, 1, bits, 0, len(body), 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54 + len(body), 0, 0, 54) + header + body


def _tiff(
    image: Image.Image,
    *,
    order: str = "<",
    planar: bool = False,
    inverted: bool = False,
    size: tuple[int, int] | None = None,
    endless: bool = False,
) -> bytes:
    """An uncompressed TIFF (TIFF 6.0, section 2) of the kinds that Pillow does not write.

    Args:
        size: what the header says, if not the truth.
        endless: the next page is this one.
    """
    pixels = np.atleast_3d(np.asarray(image))
    height, width, channels = pixels.shape
    if inverted:
        pixels = 255 - pixels
    body = (pixels.transpose(2, 0, 1) if planar else pixels).tobytes()
    shown = size or (width, height)
    strips = [8 + at * width * height for at in range(channels)] if planar else [8]
    strip_bytes = [len(body) // len(strips)] * len(strips)
    photometric = 2 if channels == 3 else 0 if inverted else 1
    entries = [
        (256, 4, [shown[0]]),
        (257, 4, [shown[1]]),
        (258, 3, [8] * channels),
        (259, 3, [1]),
        (262, 3, [photometric]),
        (273, 4, strips),
        (277, 3, [channels]),
        (278, 4, [shown[1]]),
        (279, 4, strip_bytes),
        (284, 3, [2 if planar else 1]),
    ]
    at = 8 + len(body)
    behind = at + 2 + 12 * len(entries) + 4
    directory, values = struct.pack(f"{order}H", len(entries)), b""
    for tag, kind, numbers in entries:
        packed = struct.pack(f"{order}{len(numbers)}{'H' if kind == 3 else 'I'}", *numbers)
        if len(packed) > 4:
            values_at = behind + len(values)
            values += packed
            packed = struct.pack(f"{order}I", values_at)
        directory += struct.pack(f"{order}HHI", tag, kind, len(numbers)) + packed.ljust(4, b"\0")
    directory += struct.pack(f"{order}I", at if endless else 0)
    start = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", at)
    return start + body + directory + values


def endless_tiff() -> bytes:
    """A TIFF whose list of pages is a circle."""
    return _tiff(picture(5), endless=True)


def _huge_jp2(data: bytes) -> bytes:
    """Both headers, of the file and of the codestream, name a huge size."""
    size = struct.pack(">II", 60_000, 60_000)
    data = _patch(data, data.index(b"ihdr") + 4, size)
    return _patch(data, data.index(b"\xff\x51") + 6, size)
