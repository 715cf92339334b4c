"""Shard sets with the samples that a test wants, made without packing images."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import xxhash

from shards import ShardSet
from shards.commit import commit_shard
from shards.index import SCHEMA, write_index
from shards.manifest import publish
from shards.store import open_store
from shards.tar import Member, build_tar, sample_key


@dataclass(frozen=True, kw_only=True, slots=True)
class Made:
    """One sample."""

    uri: str
    data: bytes = b"not looked at"
    phash: int | None = None
    width: int = 100
    height: int = 100


def make_set(url: str, shards: Sequence[Sequence[Made]]) -> ShardSet:
    """A set of these samples, as packing would have left it; content is the hash of the data."""
    store = open_store(url)
    if "://" in url:
        assert not list(store.list()), "another test has used this address"
    records = []
    for number, samples in enumerate(shards):
        members = [
            Member(name=f"{sample_key(number, place)}.jpg", data=sample.data)
            for place, sample in enumerate(samples)
        ]
        tar, offsets = build_tar(members)
        columns = {
            "offset": offsets,
            "length": [len(sample.data) for sample in samples],
            "checksum": [xxhash.xxh3_64_intdigest(sample.data) for sample in samples],
            "width": np.array([sample.width for sample in samples], dtype=np.int32),
            "height": np.array([sample.height for sample in samples], dtype=np.int32),
            "format": ["jpeg"] * len(samples),
            "orientation": np.ones(len(samples), dtype=np.uint8),
            "key": [member.name.partition(".")[0] for member in members],
            "uri": [sample.uri for sample in samples],
            "etag": ["e"] * len(samples),
            "source_size": [len(sample.data) for sample in samples],
            "flags": np.zeros(len(samples), dtype=np.uint32),
            "action": ["keep"] * len(samples),
            "content": [xxhash.xxh3_128_digest(sample.data) for sample in samples],
            "phash": pa.array([sample.phash for sample in samples], pa.uint64()),
        }
        table = pa.table(columns, schema=SCHEMA)
        captions = pa.array([f"caption of {sample.uri}" for sample in samples])
        marker = commit_shard(
            store,
            number,
            tar=tar,
            index=write_index(table.append_column("caption", captions)),
            samples=len(samples),
            generation=0,
            rejected=[],
        )
        assert marker.record is not None
        records.append(marker.record)
    about = {"generation": 0, "listed": 0, "packed": 0, "already": 0, "rejected": {}}
    metadata = {
        "sources": "[]", "rejected": "{}", "dead": "{}", "generations": json.dumps([about])
    }  # fmt: skip
    publish(store, records, metadata, version=1)
    return ShardSet.open(url)


def plain_set(url: str, sizes: Sequence[int]) -> ShardSet:
    """A set of distinct samples, so many a shard."""
    return make_set(
        url,
        [
            [Made(uri=f"raw/{shard}-{n}", data=f"data {shard} {n}".encode()) for n in range(size)]
            for shard, size in enumerate(sizes)
        ],
    )


def uris(shard_set: ShardSet) -> dict[int, str]:
    """The uri of each live sample, by id."""
    table = shard_set.table(["uri"])
    return dict(zip(table["sample_id"].to_pylist(), table["uri"].to_pylist(), strict=True))
