"""Features of a whole shard set: one Parquet file a shard, by as many processes as there are.

See embedding.py for what lies there. A shard's features depend on nothing but the shard, so neither
kills nor the number of processes change them.
"""

import dataclasses
import hashlib
import json
import logging
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from moco_scale.distributed import Ranks, broadcast_object
from moco_scale.embedding import (
    FEATURES,
    FORMAT,
    MANIFEST_FILE,
    PROVENANCE_FILE,
    QUARANTINE,
    Embedding,
    Provenance,
    ShardRows,
    numbers_in,
    quarantine_path,
    read_provenance,
    read_whole,
    write_shard,
)
from moco_scale.encoders import pooled_features
from moco_scale.errors import CheckpointError, ConfigError, EmbedError
from moco_scale.trained import Trained, open_trained, trained_encoder
from pipelines import IMAGE_MEAN, IMAGE_STD, BadSample, iterate_once
from pipelines.quarantine import Quarantine
from shards import ShardSet, UserError, open_store
from shards.errors import AlreadyExistsError
from shards.objects import Bytes
from shards.store import Store

logger = logging.getLogger(__name__)
T = TypeVar("T")

_READ_AHEAD = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class EmbedConfig:
    """Which features, and how they are made and stored."""

    features: Literal["pooled", "projected"] = "pooled"
    """pooled: what the backbone gives and the head takes (2048 numbers in a ResNet-50), for probes,
    neighbours and clusters; projected: what the loss compares (model.dim numbers, 128)."""
    dtype: Literal["float32", "float16"] = "float32"
    """Of the stored numbers."""
    normalise: bool = True
    """To unit length: then an inner product is a cosine."""
    view_size: int = 0
    """Height and width of the centre crop, in pixels; 0 takes the run's view size."""
    batch_size: int = 256
    """Images per forward pass."""
    num_threads: int = 0
    """Decoding threads of each process; 0 takes its part of the machine's cores."""
    loader: Literal["auto", "dali", "cpu"] = "auto"
    """What decodes; auto takes DALI on a GPU."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the encoder runs; auto takes CUDA where there is one."""

    def __post_init__(self) -> None:
        for name, least in (("batch_size", 1), ("view_size", 0), ("num_threads", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least}")


@dataclass(frozen=True, kw_only=True, slots=True)
class EmbedProgress:
    """How far this process is with its part of the shards."""

    samples_done: int
    samples: int
    shards_done: int
    shards: int
    quarantined: int


def embed(
    shard_set_url: str,
    run: str,
    to: str,
    config: EmbedConfig,
    *,
    ranks: Ranks,
    progress: Callable[[EmbedProgress], None],
    say: Callable[[str], None],
) -> Embedding | None:
    """Make this rank's part of the features that are not there yet.

    All ranks agree once, at the beginning; from then on none waits for another.

    Args:
        run: URL of a run, whose newest checkpoint is taken, or of a checkpoint (.pt).
        to: URL where the features go, or are in part.
        say: called with a line now and then, on rank 0.

    Returns:
        The whole embedding, on the rank that found all shards there; None where others go on.

    Raises:
        EmbedError: an empty set, features of something else in the place, features not finite.
        CheckpointError: no checkpoint, or its weights are not its architecture's.
        FormatError: no shard set at the address.
    """
    store = open_store(to)
    work = _on_rank_0(ranks, lambda: _begin(store, shard_set_url, run, config))
    shard_set = ShardSet.open(shard_set_url, version=work.provenance.version)
    if ranks.speaks:
        _say_begin(work, shard_set, ranks, say)
    if (whole := read_whole(store)) is not None:
        return whole if ranks.speaks else None
    mine = work.missing[ranks.rank :: ranks.world_size]
    if mine:
        encoder = trained_encoder(open_trained(work.provenance.checkpoint)).to(ranks.device)
        _embed_shards(store, work, shard_set, mine, encoder, config, ranks, progress)
    return _finish(store, shard_set, work.provenance)


@torch.inference_mode()
def features_of(
    encoder: nn.Module, images: Tensor, *, features: Literal["pooled", "projected"], normalise: bool
) -> Tensor:
    """N x D float32 of N x 3 x S x S normalised views; see `EmbedConfig`."""
    found = pooled_features(encoder, images) if features == "pooled" else encoder(images)
    found = found.float()
    return functional.normalize(found, dim=1) if normalise else found


@dataclass(frozen=True, kw_only=True, slots=True)
class _Work:
    """What rank 0 found, for all ranks."""

    provenance: Provenance
    missing: list[int]
    """Numbers of the shards without features."""
    quarantined: list[int]
    """Of these, those that a killed process has left a list of bad samples of."""
    newest_version: int


def _on_rank_0(ranks: Ranks, decide: Callable[[], T]) -> T:
    """What rank 0 decides, on every rank; its error, too. A collective."""
    found: T | UserError | None = None
    if ranks.rank == 0:
        try:
            found = decide()
        except UserError as err:
            found = err
    found = broadcast_object(found, ranks)
    if isinstance(found, UserError):
        raise found
    assert found is not None, "rank 0 has decided something"
    return found


def _begin(store: Store, shard_set_url: str, run: str, config: EmbedConfig) -> _Work:
    """Check everything, and write down what the features of this place are to be."""
    newest = shard_set = ShardSet.open(shard_set_url)
    before = read_provenance(store)
    if before is not None and before.set_id == newest.set_id:
        shard_set = newest.at(before.version)
    if not shard_set.num_samples:
        raise EmbedError(f"{shard_set.url} has no live samples: there is nothing to embed")
    trained = _opened(run, before, where=store.url)
    provenance = _provenance(run, trained, shard_set, config)
    if before is None:
        if numbers_in(store, FEATURES):
            raise EmbedError(
                f"{store.uri(FEATURES)} holds files without a {PROVENANCE_FILE} beside it that "
                "says what they are; give another --to"
            )
        saved = json.dumps(dataclasses.asdict(provenance), indent=1).encode()
        try:
            store.put(PROVENANCE_FILE, saved, create_only=True)
        except AlreadyExistsError:  # another command was as fast; or it is ours, by a retry
            before = read_provenance(store)
    if before is not None:
        _check_same(before, provenance, where=store.url)
    there = set(numbers_in(store, FEATURES))
    missing = [shard for shard in range(len(shard_set.names)) if shard not in there]
    return _Work(
        provenance=before or provenance,
        missing=missing,
        quarantined=sorted(set(numbers_in(store, QUARANTINE)) & set(missing)),
        newest_version=newest.version,
    )


def _opened(run: str, before: Provenance | None, *, where: str) -> Trained:
    """What was asked for; of a run its newest checkpoint, or that which the features were begun
    with."""
    if before is None or before.run != run:
        return open_trained(run)
    try:
        return open_trained(before.checkpoint)
    except CheckpointError as err:
        raise EmbedError(
            f"{where} was begun with {before.checkpoint}, which is gone or torn; give another --to "
            "for the features of a newer one"
        ) from err


def _provenance(run: str, trained: Trained, shard_set: ShardSet, config: EmbedConfig) -> Provenance:
    encoder, backbone = trained_encoder(trained), trained.config.model.backbone
    view_size = config.view_size or trained.config.data.view_size
    return Provenance(
        format=FORMAT,
        run=run,
        checkpoint=trained.checkpoint.url,
        step=trained.checkpoint.step,
        weights=_digest(encoder),
        backbone=backbone,
        shard_set=shard_set.url,
        set_id=shard_set.set_id,
        version=shard_set.version,
        features=config.features,
        dim=_dim(encoder, config, backbone=backbone, view_size=view_size),
        dtype=config.dtype,
        normalised=config.normalise,
        preprocessing={
            "crop": "middle square with 7/8 of the shorter side",
            "view_size": view_size,
            "mean": list(IMAGE_MEAN),
            "std": list(IMAGE_STD),
        },
    )


def _digest(encoder: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in encoder.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _dim(encoder: nn.Module, config: EmbedConfig, *, backbone: str, view_size: int) -> int:
    try:
        found = features_of(
            encoder,
            torch.zeros(1, 3, view_size, view_size),
            features=config.features,
            normalise=config.normalise,
        )
    except (RuntimeError, AssertionError, ValueError) as err:
        raise EmbedError(
            f"{backbone} does not take views of {view_size} px: {str(err).splitlines()[0]}; "
            "choose another --view-size"
        ) from err
    return found.shape[1]


_SAME = {
    "format": "the format",
    "set_id": "the shard set",
    "version": "the shard set's version",
    "weights": "the encoder",
    "features": "--features",
    "dim": "the number of features",
    "dtype": "--dtype",
    "normalised": "--normalise",
    "preprocessing": "--view-size",
}
"""What all features of a place have in common, by the name of `Provenance`."""


def _check_same(before: Provenance, now: Provenance, *, where: str) -> None:
    for name, title in _SAME.items():
        old, new = getattr(before, name), getattr(now, name)
        if old == new:
            continue
        if name in ("set_id", "version"):
            old, new = (f"{p.shard_set} ({p.set_id[:12]}, v{p.version})" for p in (before, now))
        elif name == "weights":
            old, new = (f"{p.checkpoint} ({p.weights[:12]})" for p in (before, now))
        elif name == "preprocessing":
            old, new = before.preprocessing["view_size"], now.preprocessing["view_size"]
        raise EmbedError(
            f"{where} holds features of something else: {title} is {old} there and {new} now; "
            "give another --to"
        )


def _say_begin(work: _Work, shard_set: ShardSet, ranks: Ranks, say: Callable[[str], None]) -> None:
    about = work.provenance
    todo = int(shard_set.samples[work.missing].sum())
    form = f"{about.dim} x {about.dtype}{', unit length' if about.normalised else ''}"
    # Each fits 80 columns.
    say(f"encoder: {about.backbone} after step {about.step:,}")
    say(f"features: {about.features}, {form}")
    say(
        f"to do: {todo:,} of {shard_set.num_samples:,} images, {len(work.missing):,} of "
        f"{len(shard_set.names):,} shards"
    )
    if ranks.world_size > 1:
        say(f"shared by {ranks.world_size} x {ranks.device.type}; what follows is one's part")
    if work.newest_version > about.version:
        say(
            f"the set is at version {work.newest_version} now, this place stays at "
            f"{about.version}; a new --to takes it"
        )


def _embed_shards(
    store: Store,
    work: _Work,
    shard_set: ShardSet,
    shards: Sequence[int],
    encoder: nn.Module,
    config: EmbedConfig,
    ranks: Ranks,
    progress: Callable[[EmbedProgress], None],
) -> None:
    quarantine = Quarantine(max_bad_frac=1.0, world_size=1)
    bad = _BadByShard(shard_set, quarantine)
    total = int(shard_set.samples[list(shards)].sum())
    done = num_shards = 0

    def advance(samples: int) -> None:
        nonlocal done
        done += samples
        progress(
            EmbedProgress(
                samples_done=done,
                samples=total,
                shards_done=num_shards,
                shards=len(shards),
                quarantined=bad.count,
            )
        )

    batches = iterate_once(
        shard_set,
        ordinals=None,
        shards=shards,
        view_size=work.provenance.preprocessing["view_size"],
        batch_size=config.batch_size,
        loader=config.loader,
        num_threads=config.num_threads,
        device_index=ranks.device_index,
        local_world_size=ranks.local_world_size,
        quarantine=quarantine,
    )

    def encoded() -> Iterator[tuple[NDArray[np.int64], Tensor]]:
        for ids, images in batches:
            # Stays on the device until its shard is whole: so the host decodes while it computes.
            yield (
                ids,
                features_of(encoder, images, features=config.features, normalise=config.normalise),
            )
            advance(len(ids))

    with closing(batches), _Writer() as writer:
        for shard, ids, features in _whole_shards(encoded(), shard_set, shards):
            lost = bad.of(shard)
            rows = ShardRows(
                shard=shard,
                ids=ids,
                features=features.cpu().numpy(),
                bad=lost,
                has_list=shard in work.quarantined,
            )
            writer.write(partial(write_shard, store, work.provenance, shard_set, rows))
            num_shards += 1
            advance(len(lost))


def _whole_shards(
    batches: Iterator[tuple[NDArray[np.int64], Tensor]],
    shard_set: ShardSet,
    shards: Sequence[int],
) -> Iterator[tuple[int, NDArray[np.int64], Tensor]]:
    """Each of the shards in turn, with the samples of it that there are, perhaps none."""
    waiting = deque(shards)
    parts: list[tuple[NDArray[np.int64], Tensor]] = []

    def joined() -> tuple[int, NDArray[np.int64], Tensor]:
        ids = [part[0] for part in parts] or [np.zeros(0, dtype=np.int64)]
        rows = [part[1] for part in parts] or [torch.zeros(0)]
        parts.clear()
        return waiting.popleft(), np.concatenate(ids), torch.cat(rows)

    for ids, features in batches:
        shard = _shard_of(shard_set, int(ids[0]))
        while waiting[0] != shard:
            yield joined()
        parts.append((ids, features))
    while waiting:
        yield joined()


def _shard_of(shard_set: ShardSet, sample_id: int) -> int:
    return int(np.searchsorted(shard_set.first_ordinal, sample_id, side="right")) - 1


class _BadByShard:
    """The bad samples so far; those of a shard are all there when a batch of a later one is."""

    def __init__(self, shard_set: ShardSet, quarantine: Quarantine) -> None:
        self._set = shard_set
        self._quarantine = quarantine
        self._by_shard: defaultdict[int, list[BadSample]] = defaultdict(list)
        self.count = 0

    def of(self, shard: int) -> list[BadSample]:
        """In order of their ids."""
        records = self._quarantine.records()
        for one in records[self.count :]:
            self._by_shard[_shard_of(self._set, one.sample_id)].append(one)
        self.count = len(records)
        return sorted(self._by_shard.pop(shard, []), key=lambda one: one.sample_id)


class _Writer:
    """Writes in a thread of its own, one thing at a time, while the next is made."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="embed-write")
        self._running: Future[None] | None = None

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._wait()
        finally:
            self._pool.shutdown(wait=True)

    def write(self, job: Callable[[], None]) -> None:
        """Begin with it. Raises what the one before came to."""
        self._wait()
        self._running = self._pool.submit(job)

    def _wait(self) -> None:
        running, self._running = self._running, None
        if running is not None:
            running.result()


def _finish(store: Store, shard_set: ShardSet, provenance: Provenance) -> Embedding | None:
    """Write the manifest, if all shards are there by now."""
    if not set(numbers_in(store, FEATURES)) >= set(range(len(shard_set.names))):
        return None
    with ThreadPoolExecutor(_READ_AHEAD) as pool:
        paths = map(quarantine_path, numbers_in(store, QUARANTINE))
        lost = sum(pool.map(lambda path: _num_rows(store.read(path)), paths))
    whole = Embedding(
        provenance=provenance,
        num_samples=shard_set.num_samples,
        num_rows=shard_set.num_samples - lost,  # each file was written with all that is not listed
        num_quarantined=lost,
        num_shards=len(shard_set.names),
    )
    try:
        saved = json.dumps(dataclasses.asdict(whole), indent=1).encode()
        store.put(MANIFEST_FILE, saved, create_only=True)
    except AlreadyExistsError:  # another rank came here at the same time
        return None
    return whole


def _num_rows(data: Bytes) -> int:
    count: int = pq.ParquetFile(pa.BufferReader(data), pre_buffer=False).metadata.num_rows
    return count
