"""Features of labelled images by several extractors: decoded once, and kept for later."""

import io
import json
import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor, nn

from moco_scale import baselines
from moco_scale.distributed import Ranks, barrier
from moco_scale.encoders import pooled_features
from moco_scale.errors import EvaluationError
from moco_scale.labels import LabelledSamples
from pipelines import iterate_once
from shards import ShardSet, Store
from shards.errors import NotFoundError

logger = logging.getLogger(__name__)

Show = Callable[[str, int, int], None]
"""Is told what is done, how much of it, and of how much."""
Extract = Callable[[Tensor], Tensor]
"""Features N x D of N x 3 x S x S normalised views."""

FOLDER = "features"
_FORMAT = 1
_CHUNK = 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class Extractor:
    """One way to make features of an image."""

    name: str
    key: str
    """Of all that the features depend on beside the images: the encoder's weights and output."""
    open: Callable[[], Extract]
    """Is called when features have to be made."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Views:
    """How images become tensors."""

    size: int
    batch_size: int
    loader: Literal["auto", "dali", "cpu"]
    num_threads: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Features:
    """Of those labelled images that could be decoded."""

    rows: NDArray[np.int64]
    """Places of the images among the labelled ones, ascending."""
    by_name: dict[str, Tensor]
    """M x D of each extractor, on the CPU, as they were made: not normalised."""


def baseline_extractors() -> list[Extractor]:
    """What needs no learning."""
    functions: dict[str, Extract] = {
        "pixels": baselines.pixels,
        "colours": baselines.colour_histogram,
        "HOG": baselines.hog,
    }

    def opened(function: Extract) -> Callable[[], Extract]:
        return lambda: function

    return [
        Extractor(name=name, key=f"{name}-{baselines.VERSION}", open=opened(function))
        for name, function in functions.items()
    ]


def encoder_key(encoder: nn.Module, *more: object) -> str:
    """Digest of an encoder's weights and of what else its features depend on."""
    digest = xxhash.xxh3_128(json.dumps(more).encode())
    for name, tensor in encoder.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def encoder_output(encoder: nn.Module, output: Literal["pooled", "embedding"]) -> Extract:
    """What enters the head, or what leaves it; the encoder in evaluation mode."""
    if output == "pooled":
        return lambda images: pooled_features(encoder, images)
    encoder.eval()
    return encoder


def extract(
    shard_set: ShardSet,
    labelled: LabelledSamples,
    extractors: Sequence[Extractor],
    *,
    views: Views,
    cache: Store,
    ranks: Ranks,
    show: Show,
) -> Features:
    """Features of all labelled images; what the cache holds is not made again.

    The ranks divide the images and leave their features in the cache, a Parquet of some thousand
    images at a time, which is also what an interrupted evaluation goes on from. A collective.

    Raises:
        EvaluationError: a feature is not finite, or no image could be decoded.
    """
    ids = labelled.sample_ids
    chunks = [ids[start : start + _CHUNK] for start in range(0, len(ids), _CHUNK)]
    cached = _listed(cache)

    def is_missing(one: Extractor, chunk: NDArray[np.int64]) -> bool:
        return _path(one, shard_set, chunk, views.size) not in cached

    mine = [
        chunk
        for chunk in chunks[ranks.rank :: ranks.world_size]
        if any(is_missing(one, chunk) for one in extractors)
    ]
    wanted = [one for one in extractors if any(is_missing(one, chunk) for chunk in mine)]
    extracts = {one.name: one.open() for one in wanted}
    for chunk, sample_ids, made in _make(
        shard_set, mine, extracts, views=views, ranks=ranks, show=show
    ):
        for one in wanted:
            _refuse_non_finite(made[one.name], sample_ids, name=one.name, labelled=labelled)
        for one in wanted:
            path = _path(one, shard_set, chunk, views.size)
            cache.put(path, _as_parquet(sample_ids, made[one.name]))
    barrier(ranks)
    by_name, kept = {}, ids[:0]
    for one in extractors:
        paths = (_path(one, shard_set, chunk, views.size) for chunk in chunks)
        parts = [part for part in map(_from_parquet, map(cache.read, paths)) if len(part[0])]
        if not parts:
            raise EvaluationError(
                f"none of the {len(ids)} labelled images of {shard_set.url} could be decoded; "
                "run 'moco-scale verify --level decode'"
            )
        kept = np.concatenate([found for found, _ in parts])
        by_name[one.name] = torch.from_numpy(np.concatenate([rows for _, rows in parts]))
    return Features(rows=np.searchsorted(ids, kept), by_name=by_name)


def _make(
    shard_set: ShardSet,
    chunks: Sequence[NDArray[np.int64]],
    extracts: Mapping[str, Extract],
    *,
    views: Views,
    ranks: Ranks,
    show: Show,
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64], dict[str, NDArray[np.float32]]]]:
    """Each chunk, the ids in it that could be decoded, and their features: one stream of all."""
    if not chunks:
        return
    wanted = np.concatenate(chunks)
    batches = iterate_once(
        shard_set,
        ordinals=wanted,
        view_size=views.size,
        batch_size=views.batch_size,
        loader=views.loader,
        num_threads=views.num_threads,
        device_index=ranks.device_index,
        local_world_size=ranks.local_world_size,
    )
    ids = np.zeros(0, dtype=np.int64)
    rows: dict[str, NDArray[np.float32]] = {}
    waiting = deque(chunks)
    done = 0
    for found, images in batches:
        made = _features(extracts, images)
        ids = np.concatenate([ids, found])
        rows = {
            name: np.concatenate([rows[name], new]) if name in rows else new
            for name, new in made.items()
        }
        done += len(found)
        show("features", done, len(wanted))
        while waiting and len(ids) and waiting[0][-1] <= ids[-1]:
            chunk = waiting.popleft()
            count = int(np.searchsorted(ids, chunk[-1], side="right"))
            yield chunk, ids[:count], {name: part[:count] for name, part in rows.items()}
            ids, rows = ids[count:], {name: part[count:] for name, part in rows.items()}
    for number, chunk in enumerate(waiting):  # their last images could not be decoded
        last = np.searchsorted(ids, chunk[-1], side="right") if number < len(waiting) - 1 else None
        empty = {name: np.zeros((0, 1), dtype=np.float32) for name in extracts}
        yield chunk, ids[:last], {name: part[:last] for name, part in (rows or empty).items()}
        ids, rows = ids[last:], {name: part[last:] for name, part in rows.items()}


@torch.inference_mode()
def _features(extracts: Mapping[str, Extract], images: Tensor) -> dict[str, NDArray[np.float32]]:
    return {name: make(images).float().cpu().numpy() for name, make in extracts.items()}


def _refuse_non_finite(
    features: NDArray[np.float32],
    sample_ids: NDArray[np.int64],
    *,
    name: str,
    labelled: LabelledSamples,
) -> None:
    with np.errstate(over="ignore", invalid="ignore"):
        # Numbers whose squares overflow have no length that could be made 1.
        lengths: NDArray[np.float32] = np.square(features).sum(axis=1)
    is_bad = ~np.isfinite(lengths)
    if is_bad.any():
        place = int(np.searchsorted(labelled.sample_ids, sample_ids[is_bad.argmax()]))
        raise EvaluationError(
            f"{name} features of {int(is_bad.sum())} of {len(is_bad)} images are not finite, the "
            f"first of {labelled.uris[place]}; evaluate an earlier checkpoint of the run"
        )


def _path(one: Extractor, shard_set: ShardSet, chunk: NDArray[np.int64], view_size: int) -> str:
    digest = xxhash.xxh3_128(f"{_FORMAT} {shard_set.set_id} {view_size}".encode())
    digest.update(chunk.astype("<i8").tobytes())
    return f"{FOLDER}/{one.key}/{digest.hexdigest()}.parquet"


def _listed(cache: Store) -> set[str]:
    try:
        pages = list(cache.list(f"{FOLDER}/"))
    except NotFoundError:
        return set()
    return {path for page in pages for path in page.column("path").to_pylist()}


def _as_parquet(sample_ids: NDArray[np.int64], features: NDArray[np.float32]) -> bytes:
    width = features.shape[1]
    rows = pa.FixedSizeListArray.from_arrays(pa.array(features.ravel()), max(width, 1))
    written = io.BytesIO()
    table = pa.table({"sample_id": sample_ids, "features": rows})
    pq.write_table(table, written, compression="zstd", use_dictionary=False)
    return written.getvalue()


def _from_parquet(data: object) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    table = pq.read_table(pa.BufferReader(data))
    rows = table.column("features").combine_chunks()
    width = rows.type.list_size
    flat = rows.flatten().to_numpy(zero_copy_only=False).astype(np.float32, copy=False)
    return table.column("sample_id").to_numpy(), flat.reshape(-1, width)
