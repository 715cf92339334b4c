"""The DALI graph on a GPU: the CPU's pixels, on the device, alive after a bad image."""

from collections.abc import Iterable

import numpy as np
import pytest
import torch

from demo.made_photos import photo_jpeg
from pipelines.stream import EncodedBatch
from pipelines.view_maker import Repair, Views, normalised
from tests.support.encoded_batches import (
    Colour,
    Dtype,
    batch_of,
    drawn_by,
    levels,
    no_repair,
    views_by,
)
from tests.support.shard_sets import picture

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.dali,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
SIZE = 64


@pytest.fixture(scope="module")
def mixed() -> EncodedBatch:
    formats = ["JPEG", "PNG", "WEBP"]
    pictures = [
        picture(i, format=formats[i % 3], orientation=1 + i % 8, gray=i % 5 == 4) for i in range(32)
    ]
    return batch_of([photo_jpeg(number, size=(200, 150)) for number in range(32)] + pictures)


def on_gpu(
    batches: Iterable[EncodedBatch],
    *,
    colour: Colour = "exact",
    view_dtype: Dtype = "uint8",
    repair: Repair = no_repair,
) -> list[tuple[EncodedBatch, Views]]:
    made = views_by(
        "dali",
        drawn_by("v2", view_size=SIZE),
        batches,
        view_size=SIZE,
        colour=colour,
        view_dtype=view_dtype,
        device_index=0,
        repair=repair,
    )
    return list(made)


@pytest.mark.parametrize("colour", ["exact", "fast"])
def test_views_are_those_of_the_cpu(colour: Colour, mixed: EncodedBatch) -> None:
    draw = drawn_by("v2", view_size=SIZE)

    ((_, ours),) = on_gpu([mixed], colour=colour)
    ((_, theirs),) = views_by("cpu", draw, [mixed], view_size=SIZE, colour=colour)

    # What DALI's CPU graph may differ by (tests/pipelines/test_view_pixels.py), and on top of it
    # what a GPU's JPEG decoder rounds elsewhere: a level or two, times the contrast.
    difference = np.abs(
        np.stack([levels(view) for view in ours]) - np.stack([levels(view) for view in theirs])
    )
    assert difference.mean() < 2.0
    assert np.quantile(difference, 0.999) <= 20
    assert difference.mean(axis=(2, 3, 4)).max() < 8


@pytest.mark.parametrize("view_dtype", ["uint8", "float16", "float32"])
def test_views_stay_on_the_device_channels_last_in_the_type_asked_for(
    view_dtype: Dtype, mixed: EncodedBatch
) -> None:
    ((_, views),) = on_gpu([mixed], view_dtype=view_dtype)

    for view in views:
        assert view.device == torch.device("cuda", 0)
        assert view.dtype == getattr(torch, view_dtype)
        assert view.is_contiguous(memory_format=torch.channels_last)
        assert normalised(view).device == view.device


def test_a_bad_image_costs_its_place_and_not_the_pipeline(mixed: EncodedBatch) -> None:
    png = bytearray(picture(1, format="PNG"))
    png[len(png) // 2 : len(png) // 2 + 60] = bytes(60)
    plain = batch_of([picture(number) for number in range(3)])
    bad = batch_of([picture(0), bytes(png), picture(2)])
    seen = []

    def repair(_: EncodedBatch, faults: object) -> EncodedBatch:
        seen.append(faults)
        return plain

    made = on_gpu([plain, bad, mixed, bad, plain], repair=repair)

    assert len(seen) == 2
    assert [batch is plain for batch, _ in made] == [True, True, False, True, True]
    # Only as close as two runs of a GPU's decoder are.
    first, *others = (levels(views[0]) for batch, views in made if batch is plain)
    assert all(np.abs(first - other).mean() < 0.5 for other in others)


def test_views_handed_over_are_not_overwritten_by_later_batches(mixed: EncodedBatch) -> None:
    single = [mixed.only(place) for place in range(10)]
    made = views_by("dali", drawn_by("v2", view_size=SIZE), single, view_size=SIZE, device_index=0)

    kept = [(views[0], views[0].clone()) for _, views in made]

    assert all(torch.equal(view, copy) for view, copy in kept)


def test_the_cpu_path_puts_its_views_on_the_gpu(mixed: EncodedBatch) -> None:
    draw = drawn_by("v2", view_size=SIZE)

    ((_, there),) = views_by("cpu", draw, [mixed], view_size=SIZE, device_index=0)
    ((_, here),) = views_by("cpu", draw, [mixed], view_size=SIZE)

    assert there[0].device == torch.device("cuda", 0)
    assert there[0].is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(there[0].cpu(), here[0])
