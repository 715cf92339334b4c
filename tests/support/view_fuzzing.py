"""Mutated images through the guard and a view maker: a program, so that a crash ends only it."""

import argparse
import dataclasses
import json
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping

import numpy as np
import torch

from demo.made_photos import photo_jpeg
from pipelines.quarantine import damage
from pipelines.stream import EncodedBatch
from tests.shards.test_corpus import mutate
from tests.support.encoded_batches import batch_of, drawn_by, views_by
from tests.support.images import good_images
from tests.support.shard_sets import picture

SIZE = 32
BATCH = 16
SOUND = slice(0, BATCH, 2)
"""Places of images that are the same in every batch; a mutated one stands behind each."""


def main() -> None:
    """Print how often each thing happened, as JSON; fail at the first that must not."""
    parser = argparse.ArgumentParser()
    parser.add_argument("path", choices=["cpu", "dali"])
    parser.add_argument("--batches", type=int, required=True)
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # Pillow's, about what it meets in damaged files
    sound = batch_of([picture(number) for number in range(BATCH)], first_position=0)
    outcomes: Counter[str] = Counter()

    def repair(batch: EncodedBatch, faults: Mapping[int, str]) -> EncodedBatch:
        assert all(place % 2 for place in faults), f"a sound image was refused: {faults}"
        outcomes["refused by the decoder"] += len(faults)
        return _replaced(batch, faults, sound)

    def guarded() -> Iterator[EncodedBatch]:
        for batch in _mutated(sound, options.batches):
            found = {place: _damage(batch, place) for place in range(BATCH)}
            faults = {place: reason for place, reason in found.items() if reason is not None}
            assert all(place % 2 for place in faults), f"a sound image was refused: {faults}"
            outcomes["refused by the guard"] += len(faults)
            outcomes["mutated"] += BATCH // 2
            yield _replaced(batch, faults, sound)

    draw = drawn_by("v2", view_size=SIZE)
    ((_, expected),) = views_by(options.path, draw, [sound], view_size=SIZE)
    made = views_by(options.path, draw, guarded(), view_size=SIZE, batch_size=BATCH, repair=repair)
    for batch, views in made:
        outcomes["batches"] += 1
        assert len(batch) == BATCH, "a batch came back short"
        for view, known in zip(views, expected, strict=True):
            assert torch.equal(view[SOUND], known[SOUND]), "a sound image looks another way"
    print(json.dumps(outcomes))


def _mutated(sound: EncodedBatch, count: int) -> Iterator[EncodedBatch]:
    """Batches of the sound images with mutated ones in between, as the index would know them."""
    kept = [good.data for good in good_images().values() if good.action == "keep"]
    images = [data for data in kept if len(data) < 50_000]
    images += [photo_jpeg(number, size=(100, 80)) for number in range(8)]
    whole = batch_of(images)
    random = np.random.default_rng(0)
    for _ in range(count):
        data, sizes = list(sound.data), sound.sizes.copy()
        orientations = sound.orientations.copy()
        for place in range(1, BATCH, 2):
            one, other = random.integers(len(images), size=2)
            changed = mutate(images[one], images[other], random)
            data[place] = np.frombuffer(changed, dtype=np.uint8)
            sizes[place], orientations[place] = whole.sizes[one], whole.orientations[one]
        yield dataclasses.replace(sound, data=tuple(data), sizes=sizes, orientations=orientations)


def _damage(batch: EncodedBatch, place: int) -> str | None:
    width, height = batch.sizes[place].tolist()
    orientation = int(batch.orientations[place])
    return damage(batch.data[place], width, height, orientation, max_pixels=10**8)


def _replaced(batch: EncodedBatch, faults: Mapping[int, str], sound: EncodedBatch) -> EncodedBatch:
    data, sizes, orientations = list(batch.data), batch.sizes.copy(), batch.orientations.copy()
    for place in faults:
        data[place] = sound.data[place]
        sizes[place], orientations[place] = sound.sizes[place], sound.orientations[place]
    return dataclasses.replace(batch, data=tuple(data), sizes=sizes, orientations=orientations)


if __name__ == "__main__":
    main()
