"""What DALI executes: one decode, then views whose every parameter is an input."""

from typing import Any, Literal

from nvidia.dali import Pipeline, fn, math, pipeline_def, types

from pipelines.views import IMAGE_MEAN, IMAGE_STD


def build_graph(
    *,
    batch_size: int,
    num_views: int,
    view_size: int,
    colour: Literal["exact", "fast"] | None,
    view_dtype: Literal["float32", "float16", "uint8"],
    num_threads: int,
    hw_decoder_load: float,
    device_index: int | None,
) -> Pipeline:
    """The graph, ready to run; the same definition on the CPU and on a GPU.

    Inputs, per sample: `encoded`, and for each view number v the `inputs_of` it. Outputs: a view
    each, S x S x 3, normalised unless it is of bytes. Nothing goes back from the GPU to the host,
    and nothing is drawn: every choice is an input that lies on the host, conditions included.

    Args:
        batch_size: the most samples that a batch may have.
        colour: None: views differ in their crop and flip alone, neither in colour nor in blur.
        hw_decoder_load: part of the JPEGs that go to a GPU's JPEG engine, where it has one.
        device_index: the GPU; None for the CPU.
    """
    pipeline: Pipeline = _graph(
        num_views=num_views,
        view_size=view_size,
        colour=colour,
        view_dtype=view_dtype,
        hw_decoder_load=hw_decoder_load,
        device="cpu" if device_index is None else "gpu",
        batch_size=batch_size,
        num_threads=num_threads,
        device_id=device_index,
        prefetch_queue_depth=PREFETCH,
        seed=0,  # nothing in the graph draws
    )
    pipeline.build()
    return pipeline


PREFETCH = 2
"""Batches that DALI works on at once."""


def inputs_of(
    view: int, *, colour: Literal["exact", "fast"] | None
) -> dict[str, tuple[types.DALIDataType, int]]:
    """Names of what the graph takes for one view; type and number of dimensions of each.

    `start` and `end` are corners of the crop, y before x, in pixels of the upright image; start
    above end mirrors that axis. The others are those of `ViewParams`, or of `affine_colour`.
    """
    inputs = {"start": (types.FLOAT, 1), "end": (types.FLOAT, 1)}
    if colour == "exact":
        names = ("brightness", "contrast", "saturation", "hue")
        inputs |= dict.fromkeys(names, (types.FLOAT, 0)) | {"gray": (types.BOOL, 0)}
    elif colour == "fast":
        inputs |= {"matrix": (types.FLOAT, 2), "pivot": (types.FLOAT, 2)}
    if colour is not None:
        inputs["sigma"] = (types.FLOAT, 0)
    return {f"{name}_{view}": kind for name, kind in inputs.items()}


@pipeline_def(enable_conditionals=True)  # type: ignore[untyped-decorator]  # DALI has no types
def _graph(
    *,
    num_views: int,
    view_size: int,
    colour: Literal["exact", "fast"] | None,
    view_dtype: Literal["float32", "float16", "uint8"],
    hw_decoder_load: float,
    device: Literal["cpu", "gpu"],
) -> Any:
    encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1, no_copy=True)
    # Fancy upsampling is what the CPU decoder does; without it a GPU gives other chroma.
    image = fn.decoders.image(
        encoded,
        device="cpu" if device == "cpu" else "mixed",
        output_type=types.RGB,
        adjust_orientation=True,
        jpeg_fancy_upsampling=True,
        hw_decoder_load=hw_decoder_load,
    )
    if not num_views:
        return image.shape()  # to see how long decoding alone takes
    views = []
    for view in range(num_views):
        given = {
            name.removesuffix(f"_{view}"): fn.external_source(
                name=name, dtype=dtype, ndim=ndim, no_copy=True
            )
            for name, (dtype, ndim) in inputs_of(view, colour=colour).items()
        }
        drawn = fn.resize(
            image,
            size=[view_size, view_size],
            roi_start=given["start"],
            roi_end=given["end"],
            antialias=True,
        )
        if colour == "exact":
            drawn = _recolour(drawn, given, device)
        elif colour == "fast":
            drawn = _recolour_fast(drawn, given["matrix"], given["pivot"])
        if colour is not None:
            drawn = _blur(drawn, given["sigma"])
        views.append(_finish(drawn, view_dtype))
    return tuple(views)


# As in cpu_views.py: Pillow and torchvision round down, DALI to the nearest.
_ROUND_DOWN = -0.4995


# Conditions are per sample: DALI runs a branch on those samples only that take it.


def _recolour(image: Any, given: dict[str, Any], device: str) -> Any:
    """torchvision's steps on a Pillow image; each one's result is cut to 0-255 and to whole levels.

    Not fn.color_twist: its contrast pivots on 128, its hue turns in another colour space, and
    nothing is cut between the steps.
    """
    brightness, contrast, saturation = given["brightness"], given["contrast"], given["saturation"]
    hue, gray = given["hue"], given["gray"]
    if brightness != 1.0:
        image = fn.brightness_contrast(
            image, brightness=brightness, brightness_shift=_ROUND_DOWN / 255
        )
    if contrast != 1.0:
        # The mean stays where it is: as an argument of an operator it would have to go to the host.
        middle = math.floor(fn.reductions.mean(_gray(image)) + 0.5)
        image = fn.cast(
            image * contrast + (middle * (1.0 - contrast) + _ROUND_DOWN), dtype=types.UINT8
        )
    if saturation != 1.0:
        image = fn.cast(
            image * saturation + (_gray(image) * (1.0 - saturation) + _ROUND_DOWN),
            dtype=types.UINT8,
        )
    if hue != 0.0:
        image = _shift_hue(image, hue, device)
    if gray:
        image = fn.cat(_gray(image), _gray(image), _gray(image), axis=2)
    return image


def _gray(image: Any) -> Any:
    return fn.color_space_conversion(image, image_type=types.RGB, output_type=types.GRAY)


def _shift_hue(image: Any, turns: Any, device: str) -> Any:
    """HSV's hue moved on, saturation and value kept (Smith 1978): DALI has no such operator.

    With the hue in sixths of a turn, each channel is a trapezoid between the smallest and the
    largest: red clamp(|hue - 3| - 1), green clamp(2 - |hue - 2|), blue clamp(2 - |hue - 4|).
    """

    def per_channel(red: float, green: float, blue: float) -> Any:
        return fn.constant(  # type: ignore[attr-defined]  # made at import
            fdata=[red, green, blue], shape=[1, 1, 3], device=device
        )

    values = fn.cast(image, dtype=types.FLOAT)
    red, green, blue = values[:, :, 0:1], values[:, :, 1:2], values[:, :, 2:3]
    largest = math.max(math.max(red, green), blue)
    smallest = math.min(math.min(red, green), blue)
    chroma = largest - smallest
    some = math.max(chroma, 1e-3)  # gray has no hue, and shows none either
    is_red, is_green = largest == red, largest == green
    sixths = is_red * (green - blue) + (1 - is_red) * (
        is_green * (blue - red + 2 * some) + (1 - is_green) * (red - green + 4 * some)
    )
    hue = sixths / some + 6 * turns
    hue = hue - 6 * math.floor(hue * (1 / 6))
    slope = per_channel(1, -1, -1) * math.abs(hue - per_channel(3, 2, 4))
    part = math.clamp(per_channel(-1, 2, 2) + slope, 0, 1)
    return fn.cast(smallest + chroma * part, dtype=types.UINT8)


def _recolour_fast(image: Any, matrix: Any, pivot: Any) -> Any:
    shift = fn.coord_transform(fn.reductions.mean(image, axes=[0, 1], keep_dims=True), M=pivot)
    return fn.cast(fn.coord_transform(image, M=matrix) + shift, dtype=types.UINT8)


def _blur(image: Any, sigma: Any) -> Any:
    if sigma > 0.0:  # DALI refuses to blur by nothing
        image = fn.gaussian_blur(image, sigma=sigma)
    return image


def _finish(image: Any, view_dtype: Literal["float32", "float16", "uint8"]) -> Any:
    """One dense tensor a batch, height x width x channel: what torch calls channels_last."""
    if view_dtype == "uint8":
        return fn.crop_mirror_normalize(image, dtype=types.UINT8, output_layout="HWC")
    return fn.crop_mirror_normalize(
        image,
        dtype=types.FLOAT if view_dtype == "float32" else types.FLOAT16,
        output_layout="HWC",
        mean=[255.0 * value for value in IMAGE_MEAN],
        std=[255.0 * value for value in IMAGE_STD],
    )
