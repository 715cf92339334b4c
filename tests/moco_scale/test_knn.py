"""The online kNN score: the same whatever the number of ranks, and not for fewer images."""

from pathlib import Path

import pytest
import torch

from moco_scale.distributed import Ranks, one_rank
from moco_scale.encoders import build_encoder
from moco_scale.errors import EvaluationError
from moco_scale.knn import OnlineKnn
from moco_scale.model import ModelConfig
from shards import ShardSet
from tests.support.distributed import run_distributed
from tests.support.shard_sets import make_shard_set, overwrite, stored


def score(ranks: Ranks, url: str, labels: str) -> float:
    torch.set_num_threads(1)
    config = ModelConfig(backbone="resnet18", dim=8, bn_sub_batch=2, shuffle_domain=4)
    online = OnlineKnn(
        ShardSet.open(url),
        labels,
        num_images=1000,
        view_size=32,
        loader="cpu",
        ranks=ranks,
    )
    return online.accuracy(build_encoder(config, seed=0))


def label(folder: Path, count: int) -> str:
    """So many of the set's images, in two classes."""
    rows = [
        f"{number:04}.{'png' if number % 7 == 3 else 'jpg'},{number % 2}" for number in range(count)
    ]
    path = folder / f"{count}.csv"
    path.write_text("\n".join(["uri,label", *rows]))
    return str(path)


def test_the_score_is_that_of_one_rank_in_a_larger_world_also_where_a_part_is_damaged(
    tmp_path: Path,
) -> None:
    shard_set = make_shard_set(tmp_path, count=24, shard_samples=8)
    labels = label(tmp_path, 24)
    whole = score(one_rank(), shard_set.url, labels)
    assert run_distributed(score, 2, shard_set.url, labels) == pytest.approx([whole] * 2, abs=0.05)

    for number in range(12):  # all of what the first of two ranks looks at
        nothing = bytes(len(stored(shard_set, number)))
        shard_set = overwrite(shard_set, number, nothing, fix_checksum=True)
    half = score(one_rank(), shard_set.url, labels)
    assert run_distributed(score, 2, shard_set.url, labels) == pytest.approx([half] * 2, abs=0.05)


def score_or_error(ranks: Ranks, url: str, labels: str) -> str:
    with pytest.raises(EvaluationError) as caught:
        score(ranks, url, labels)
    return str(caught.value)


def test_fewer_labelled_images_than_ranks_are_refused(tmp_path: Path) -> None:
    shard_set = make_shard_set(tmp_path, count=12, shard_samples=8)

    said = run_distributed(score_or_error, 3, shard_set.url, label(tmp_path, 2))

    assert all("2 labelled images" in one and "3 processes" in one for one in said)
