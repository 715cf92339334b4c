"""A raw bucket of images into a set of WebDataset shards, and the set as its readers see it."""

from shards.errors import ShardError, UserError
from shards.index import ShardIndex
from shards.manifest import ShardSet
from shards.pack import PackConfig, PackReport, pack
from shards.store import Store, open_store

__all__ = [
    "PackConfig",
    "PackReport",
    "ShardError",
    "ShardIndex",
    "ShardSet",
    "Store",
    "UserError",
    "open_store",
    "pack",
]
