"""What an encoder finds alike in a shard set: clusters, near-duplicates and loners, on one page."""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import jinja2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from moco_scale.clusters import Clusters, NearPairs, near_pairs, spherical_kmeans
from moco_scale.embedding import (
    Embedding,
    as_matrix,
    feature_tables,
    quarantine_tables,
    read_embedding,
)
from moco_scale.errors import ConfigError, EmbedError
from moco_scale.pictures import Picture, thumbnails
from shards import ShardSet, open_store

PAGE_FILE = "clusters.html"
CLUSTERS_FILE = "clusters.parquet"
PAIRS_FILE = "pairs.parquet"
_KEPT_PAIRS = 1_000_000
_NEAREST, _FARTHEST, _SHOWN_PAIRS, _LONERS, _SHOWN_BAD = 7, 3, 48, 24, 50
_SIDE = 96
_LEVELS = (0.9, 0.95, 0.98, 0.99, 0.999)


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterConfig:
    """What is looked for, of the report."""

    clusters: int = 32
    """Of the report: how many the images are divided into."""
    threshold: float = 0.98
    """Of the report: pairs of at least this cosine are near-duplicates."""
    report_rows: int = 1_000_000
    """Of the report: more images than that are sampled. All pairs of them are compared: twice the
    images take four times as long."""
    seed: int = 0
    """Of the report: of the clusters' beginning."""

    def __post_init__(self) -> None:
        for name, least in (("clusters", 1), ("report_rows", 2)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least}")
        if not -1 <= self.threshold <= 1:
            raise ConfigError(f"threshold {self.threshold} is no cosine: give one of -1 to 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Rows:
    """The images that are looked at; M rows."""

    sample_ids: NDArray[np.int64]
    uris: pa.ChunkedArray
    features: Tensor
    """Unit length, whatever was stored."""


def write_cluster_report(
    to: str,
    shard_set_url: str,
    config: ClusterConfig,
    *,
    device: torch.device,
    progress: Callable[[int, int], None] = lambda _done, _of: None,
) -> str:
    """Write clusters.html, clusters.parquet and pairs.parquet beside the features; the page's URL.

    Args:
        to: URL of a whole embedding.
        shard_set_url: where its images are.
        progress: called with the blocks of pairs done, and all of them.

    Raises:
        EmbedError: the embedding is not whole.
    """
    store = open_store(to)
    embedding = read_embedding(to)
    if not embedding.num_rows:
        raise EmbedError(f"{to} has no features: not one image could be decoded")
    rows = _load(to, embedding, max_rows=config.report_rows)
    features = rows.features.to(device)
    found = spherical_kmeans(features, num_clusters=config.clusters, seed=config.seed)
    pairs = near_pairs(features, threshold=config.threshold, keep=_KEPT_PAIRS, progress=progress)
    store.put(CLUSTERS_FILE, _parquet(_clusters_table(rows, found, pairs)))
    store.put(PAIRS_FILE, _parquet(_pairs_table(rows, pairs)))
    shard_set = ShardSet.open(shard_set_url, version=embedding.provenance.version)
    page = _page(to, embedding, rows, found, pairs, shard_set, config)
    store.put(PAGE_FILE, page.encode())
    return store.uri(PAGE_FILE)


def _load(to: str, embedding: Embedding, *, max_rows: int) -> _Rows:
    """All rows, or so many spread evenly: packing has shuffled them."""
    count = min(embedding.num_rows, max_rows)
    chosen = np.linspace(0, embedding.num_rows - 1, count).astype(np.int64)
    features = torch.empty(count, embedding.provenance.dim)
    ids = np.empty(count, dtype=np.int64)
    uris = []
    passed = filled = 0
    columns = ["sample_id", "uri", "features"]
    for table in feature_tables(open_store(to), embedding, columns):
        low, high = np.searchsorted(chosen, [passed, passed + len(table)])
        part = table.take(pa.array(chosen[low:high] - passed)) if high - low < len(table) else table
        passed += len(table)
        if not len(part):
            continue
        here = slice(filled, filled + len(part))
        matrix = torch.from_numpy(as_matrix(part.column("features")).astype(np.float32))
        features[here] = functional.normalize(matrix, dim=1)
        ids[here] = part.column("sample_id").to_numpy()
        uris.extend(part.column("uri").chunks)
        filled += len(part)
    return _Rows(sample_ids=ids, uris=pa.chunked_array(uris, type=pa.string()), features=features)


def _clusters_table(rows: _Rows, found: Clusters, pairs: NearPairs) -> pa.Table:
    return pa.table(
        {
            "sample_id": rows.sample_ids,
            "uri": rows.uris,
            "cluster": found.of.int().cpu().numpy(),
            "cosine_to_centre": found.cosine.cpu().numpy(),
            "cosine_to_nearest": pairs.nearest.cpu().numpy(),
        }
    )


def _pairs_table(rows: _Rows, pairs: NearPairs) -> pa.Table:
    first, second = pairs.rows.cpu().numpy().T
    return pa.table(
        {
            "sample_id": rows.sample_ids[first],
            "uri": rows.uris.take(pa.array(first)),
            "other_sample_id": rows.sample_ids[second],
            "other_uri": rows.uris.take(pa.array(second)),
            "cosine": pairs.cosine.cpu().numpy(),
        }
    )


def _page(
    to: str,
    embedding: Embedding,
    rows: _Rows,
    found: Clusters,
    pairs: NearPairs,
    shard_set: ShardSet,
    config: ClusterConfig,
) -> str:
    """Object names come from a bucket and are escaped wherever shown."""
    of, nearest = found.of.cpu().numpy(), pairs.nearest.cpu().numpy()
    cosine = found.cosine.cpu().numpy()
    members = [_examples(of, cosine, cluster) for cluster in range(len(found.sizes))]
    shown_pairs = _without_repeats(pairs, most=_SHOWN_PAIRS)
    loners = np.argsort(nearest, kind="stable")[:_LONERS].tolist()
    wanted = {row for near, far in members for row in (*near, *far)}
    wanted |= {row for *pair, _ in shown_pairs for row in pair} | set(loners)
    ids = {row: int(rows.sample_ids[row]) for row in wanted}
    drawn = thumbnails(shard_set, ids.values(), side=_SIDE, loader="cpu")

    def pictures(chosen: Sequence[int]) -> list[Picture]:
        named = ((ids[row], rows.uris[row].as_py()) for row in chosen)
        return [Picture(src=drawn[one], alt=uri) for one, uri in named if one in drawn]

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = (resources.files("moco_scale") / "templates" / "clusters.html").read_text()
    return environment.from_string(template).render(
        embedding=embedding,
        about=embedding.provenance,
        shard_set=shard_set.url,
        where=to,
        looked_at=len(of),
        threshold=config.threshold,
        num_pairs=pairs.count,
        kept_pairs=len(pairs.rows),
        clusters=[
            {
                "size": size,
                "cosine": float(cosine[of == number].mean()),
                "near": pictures(near),
                "far": pictures(far),
            }
            for number, (size, (near, far)) in enumerate(zip(found.sizes, members, strict=True))
            if size
        ],
        levels=[(level, int((nearest >= level).sum())) for level in _LEVELS],
        pairs=[(pictures([one, other]), cosine) for one, other, cosine in shown_pairs],
        loners=[(*pictures([row]), float(nearest[row])) for row in loners if ids[row] in drawn],
        bad=_bad(to, embedding),
    )


def _without_repeats(pairs: NearPairs, *, most: int) -> list[tuple[int, int, float]]:
    """Rows and cosine of the nearest pairs, each row once: ten alike would be 45 pairs."""
    shown: list[tuple[int, int, float]] = []
    seen: set[int] = set()
    for start in range(0, len(pairs.rows), 1024):
        part = slice(start, start + 1024)
        for (one, other), cosine in zip(
            pairs.rows[part].tolist(), pairs.cosine[part].tolist(), strict=True
        ):
            if one not in seen and other not in seen:
                shown.append((one, other, cosine))
                seen |= {one, other}
        if len(shown) >= most:
            break
    return shown[:most]


def _examples(
    of: NDArray[np.int64], cosine: NDArray[np.float32], cluster: int
) -> tuple[list[int], list[int]]:
    """Rows nearest to the centre, and those farthest from it."""
    rows = np.flatnonzero(of == cluster)
    rows = rows[np.argsort(-cosine[rows], kind="stable")]
    near, rest = rows[:_NEAREST], rows[_NEAREST:]
    return near.tolist(), rest[-_FARTHEST:].tolist()


def _bad(to: str, embedding: Embedding) -> list[dict[str, Any]]:
    if not embedding.num_quarantined:
        return []
    found: list[dict[str, Any]] = []
    for table in quarantine_tables(open_store(to)):
        found += table.slice(0, _SHOWN_BAD - len(found)).to_pylist()
        if len(found) == _SHOWN_BAD:
            break
    return found


def _parquet(table: pa.Table) -> bytes:
    written = io.BytesIO()
    pq.write_table(table, written, compression="zstd")
    return written.getvalue()
