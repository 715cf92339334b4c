"""A shard set that this folder's tests read and do not change."""

import shutil
from pathlib import Path

import pytest

from shards import ShardSet
from tests.support.shard_sets import make_shard_set


@pytest.fixture(scope="session")
def shard_set(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """150 samples in 5 shards."""
    return make_shard_set(tmp_path_factory.mktemp("shared"), count=150, shard_samples=34)


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """60 samples in 3 shards, to be copied."""
    return make_shard_set(tmp_path_factory.mktemp("template"), count=60, shard_samples=20)


@pytest.fixture
def own_shard_set(template: ShardSet, tmp_path: Path) -> ShardSet:
    """60 samples in 3 shards, to be damaged."""
    return ShardSet.open(str(shutil.copytree(template.url, tmp_path / "set")))
