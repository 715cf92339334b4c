"""What DALI executes: one decode, then views whose every parameter is an input."""

from typing import Any

from nvidia.dali import Pipeline, fn, pipeline_def, types

from pipelines.views import IMAGE_MEAN, IMAGE_STD


def build_graph(
    *,
    batch_size: int,
    num_views: int,
    view_size: int,
    colour: bool,
    num_threads: int,
    device_index: int | None,
) -> Pipeline:
    """The graph, ready to run; the same definition on the CPU and on a GPU.

    Inputs, per sample: `encoded`; and for each view number v: `start_v`, `end_v` (2: y, x in
    pixels; start above end mirrors that axis), and with `colour` also `matrix_v`, `pivot_v`
    (3 x 3) and `sigma_v` (0: no blur). Outputs: a view each, 3 x S x S float32, normalised.

    Args:
        batch_size: the most samples that a batch may have.
        colour: whether views differ in colour and blur, and not in their crop alone.
        device_index: the GPU; None for the CPU.
    """
    pipeline: Pipeline = _graph(
        num_views=num_views,
        view_size=view_size,
        colour=colour,
        decoder="cpu" if device_index is None else "mixed",
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


@pipeline_def(enable_conditionals=True)  # type: ignore[untyped-decorator]  # DALI has no types
def _graph(*, num_views: int, view_size: int, colour: bool, decoder: str) -> Any:
    encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1, no_copy=True)
    # Fancy upsampling is what the CPU decoder does; without it a GPU gives other chroma.
    image = fn.decoders.image(
        encoded,
        device=decoder,
        output_type=types.RGB,
        adjust_orientation=True,
        jpeg_fancy_upsampling=True,
    )
    views = []
    for view in range(num_views):
        drawn = _crop(image, view, view_size)
        if colour:
            drawn = _recolour(drawn, view)
        views.append(_normalise(drawn))
    return tuple(views)


def _crop(image: Any, view: int, view_size: int) -> Any:
    return fn.resize(
        image,
        size=[view_size, view_size],
        roi_start=fn.external_source(name=f"start_{view}", dtype=types.FLOAT, ndim=1),
        roi_end=fn.external_source(name=f"end_{view}", dtype=types.FLOAT, ndim=1),
        antialias=True,
    )


def _recolour(image: Any, view: int) -> Any:
    matrix = fn.external_source(name=f"matrix_{view}", dtype=types.FLOAT, ndim=2)
    pivot = fn.external_source(name=f"pivot_{view}", dtype=types.FLOAT, ndim=2)
    sigma = fn.external_source(name=f"sigma_{view}", dtype=types.FLOAT, ndim=0)
    mean = fn.reductions.mean(image, axes=[0, 1], keep_dims=True).cpu()
    shift = fn.squeeze(fn.coord_transform(mean, M=pivot), axes=[0, 1])
    image = fn.coord_transform(image, M=matrix, T=shift, dtype=types.UINT8)
    if sigma > 0.0:  # per sample; DALI refuses to blur by nothing
        image = fn.gaussian_blur(image, sigma=sigma)
    return image


def _normalise(image: Any) -> Any:
    return fn.crop_mirror_normalize(
        image,
        dtype=types.FLOAT,
        output_layout="CHW",
        mean=[255.0 * value for value in IMAGE_MEAN],
        std=[255.0 * value for value in IMAGE_STD],
    )
