"""An embedding as its readers see it: features of a shard set as Parquet, and what they are.

embedding.json               what the features are of and by; written first
features/000123.parquet      a row a sample; it exists once shard 123 is whole
quarantine/000123.parquet    samples of it that could not be decoded; written before
manifest.json                all of it counted; written last
"""

import dataclasses
import io
import json
import logging
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from moco_scale.errors import EmbedError
from pipelines import BadSample
from shards import ShardSet, open_store
from shards.errors import AlreadyExistsError, NotFoundError
from shards.index import parquet_table
from shards.store import Store

logger = logging.getLogger(__name__)

FORMAT = 1
PROVENANCE_FILE = "embedding.json"
MANIFEST_FILE = "manifest.json"
FEATURES, QUARANTINE = "features", "quarantine"
QUARANTINE_SCHEMA = pa.schema(
    [
        ("sample_id", pa.int64()),
        ("uri", pa.string()),
        ("shard", pa.int32()),
        ("position", pa.int64()),
        ("key", pa.string()),
        ("reason", pa.string()),
    ]
)
"""key: of the sample in its tar, null where that is damaged, too. Others: see `features_schema`."""
_READ_AHEAD = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Provenance:
    """What the features in a place are: embedding.json, and the metadata of each Parquet file."""

    format: int
    run: str
    """As it was given: a run, or one of its checkpoints."""
    checkpoint: str
    step: int
    """Updates that the encoder had seen."""
    weights: str
    """SHA-256 of the encoder's weights."""
    backbone: str
    shard_set: str
    set_id: str
    version: int
    """Of the shard set: what was added or buried later is not in."""
    features: str
    dim: int
    dtype: str
    normalised: bool
    preprocessing: dict[str, Any]
    """What became of an image before the encoder saw it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Embedding:
    """A whole embedding: manifest.json. num_rows + num_quarantined = num_samples."""

    provenance: Provenance
    num_samples: int
    """Live samples of the shard set at its version."""
    num_rows: int
    num_quarantined: int
    """Samples that could not be decoded: listed, with reasons, under quarantine/."""
    num_shards: int
    """Files under features/."""


def read_embedding(to: str) -> Embedding:
    """What a place holds.

    Raises:
        EmbedError: nothing, or not yet all of it.
    """
    store = open_store(to)
    found = read_whole(store)
    if found is None:
        raise EmbedError(
            f"no whole embedding at {store.url}: it has no {MANIFEST_FILE}; run the same "
            "'moco-scale embed' again until it is done"
        )
    return found


def feature_tables(
    store: Store, embedding: Embedding, columns: Sequence[str] | None = None
) -> Iterator[pa.Table]:
    """The rows of each shard in order of their sample_id; some files are read ahead."""

    def read(shard: int) -> pa.Table:
        data = store.read(features_path(shard))
        return parquet_table(data, columns=list(columns) if columns else None)

    with ThreadPoolExecutor(_READ_AHEAD) as pool:
        rest = iter(range(embedding.num_shards))
        ahead = deque(pool.submit(read, shard) for shard in islice(rest, _READ_AHEAD))
        while ahead:
            yield ahead.popleft().result()
            ahead.extend(pool.submit(read, shard) for shard in islice(rest, 1))


def quarantine_tables(store: Store) -> Iterator[pa.Table]:
    """The samples that could not be decoded, of each shard that has any, with QUARANTINE_SCHEMA."""
    for shard in sorted(numbers_in(store, QUARANTINE)):
        yield parquet_table(store.read(quarantine_path(shard)))


def as_matrix(column: pa.ChunkedArray) -> NDArray[Any]:
    """N x D of the column `features`; where it is one chunk, without a copy."""
    parts = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in column.chunks]
    flat = parts[0] if len(parts) == 1 else np.concatenate(parts) if parts else np.zeros(0)
    return flat.reshape(-1, column.type.list_size)


def features_path(shard: int) -> str:
    """Where the features of a shard are."""
    return f"{FEATURES}/{shard:06}.parquet"


def quarantine_path(shard: int) -> str:
    """Where the samples of a shard are that could not be decoded; only if there are any."""
    return f"{QUARANTINE}/{shard:06}.parquet"


def features_schema(dim: int, dtype: str) -> pa.Schema:
    """sample_id: as everywhere, never changes. uri: of the object that the sample was made from.
    shard: its number in the manifest; position: in the shard as it was packed."""
    number = pa.float16() if dtype == "float16" else pa.float32()
    return pa.schema(
        [
            ("sample_id", pa.int64()),
            ("uri", pa.string()),
            ("shard", pa.int32()),
            ("position", pa.int64()),
            ("features", pa.list_(number, dim)),
        ]
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardRows:
    """All that is known of one shard."""

    shard: int
    ids: NDArray[np.int64]
    features: NDArray[np.float32]
    bad: list[BadSample]
    has_list: bool
    """Whether a process that was killed has left a list of bad samples."""


def write_shard(store: Store, about: Provenance, shard_set: ShardSet, rows: ShardRows) -> None:
    """First what could not be used, then the features: they are the commit.

    Raises:
        EmbedError: features that are not finite, naming the first sample.
    """
    shard = rows.shard
    first = int(shard_set.first_ordinal[shard])
    (index,) = shard_set.tables(["uri"], shards=[shard])
    known = index.column("sample_id").to_numpy()
    lost = np.array([one.sample_id for one in rows.bad], dtype=np.int64)
    accounted = np.sort(np.concatenate([rows.ids, lost]))
    assert np.array_equal(accounted, known), "rows + listed = live samples"

    def common(ids: NDArray[np.int64]) -> dict[str, Any]:
        return {
            "sample_id": ids,
            "uri": index.column("uri").take(np.searchsorted(known, ids)).combine_chunks(),
            "shard": np.full(len(ids), shard, dtype=np.int32),
            "position": ids - first,
        }

    schema = features_schema(about.dim, about.dtype)
    columns = common(rows.ids)
    with np.errstate(over="ignore"):  # what does not fit is not finite, and told below
        numbers = rows.features.astype(about.dtype)
    if len(numbers) and not np.isfinite(numbers).all():
        _refuse(numbers, columns["uri"], rows, about)
    flat = pa.array(numbers.reshape(-1), schema.field("features").type.value_type)
    columns["features"] = pa.FixedSizeListArray.from_arrays(flat, about.dim)
    said = {"moco_scale": json.dumps(dataclasses.asdict(about))}
    table = pa.table(columns, schema=schema.with_metadata(said))
    if rows.bad:
        reasons = {"key": [b.key for b in rows.bad], "reason": [b.reason for b in rows.bad]}
        listed = pa.table(common(lost) | reasons, schema=QUARANTINE_SCHEMA)
        store.put(quarantine_path(shard), as_parquet(listed))
    elif rows.has_list:  # they can be read now
        store.delete([quarantine_path(shard)])
    try:
        store.put(features_path(shard), as_parquet(table), create_only=True)
    except AlreadyExistsError:
        logger.info("%s is there already", store.uri(features_path(shard)))


def _refuse(
    numbers: NDArray[np.floating[Any]], uris: pa.Array, rows: ShardRows, about: Provenance
) -> None:
    wrong = np.flatnonzero(~np.isfinite(numbers).all(1))
    place = int(wrong[0])
    cure = "give an earlier checkpoint of the run"
    if np.isfinite(rows.features[place]).all():
        cure = (
            f"they are too large for {about.dtype}: give --dtype float32, or leave --normalise on"
        )
    raise EmbedError(
        f"the features of sample {rows.ids[place]} ({uris[place].as_py()}) by {about.checkpoint} "
        f"are not finite ({len(wrong)} of {len(numbers)} in shard {rows.shard}); {cure}"
    )


def numbers_in(store: Store, folder: str) -> list[int]:
    """The shards that have a file in a folder."""
    try:
        pages = list(store.list(folder))
    except NotFoundError:  # a place that the first write will make
        return []
    names = (path.rpartition("/")[2] for page in pages for path in page.column("path").to_pylist())
    stems = (name.removesuffix(".parquet") for name in names if name.endswith(".parquet"))
    return [int(stem) for stem in stems if stem.isdecimal()]


def read_whole(store: Store) -> Embedding | None:
    """The manifest; None where it is not written yet."""
    saved = _read_json(store, MANIFEST_FILE)
    if saved is None:
        return None
    provenance = _as_provenance(saved.pop("provenance"), where=store.uri(MANIFEST_FILE))
    return Embedding(provenance=provenance, **saved)


def read_provenance(store: Store) -> Provenance | None:
    """What the features there are, whole or not; None where none were begun."""
    saved = _read_json(store, PROVENANCE_FILE)
    return None if saved is None else _as_provenance(saved, where=store.uri(PROVENANCE_FILE))


def _as_provenance(saved: dict[str, Any], *, where: str) -> Provenance:
    if saved.get("format") != FORMAT:
        raise EmbedError(
            f"{where} has format {saved.get('format')}, this version writes {FORMAT}; give "
            "another --to"
        )
    return Provenance(**saved)


def _read_json(store: Store, path: str) -> dict[str, Any] | None:
    try:
        data = bytes(store.read(path))
    except NotFoundError:
        return None
    try:
        found: dict[str, Any] = json.loads(data)
    except ValueError as err:
        raise EmbedError(
            f"{store.uri(path)} is not what 'moco-scale embed' writes; give another --to"
        ) from err
    return found


def as_parquet(table: pa.Table) -> bytes:
    """A file's bytes; the same for the same rows and version of pyarrow."""
    written = io.BytesIO()
    # Features have nothing that repeats, and would only be tried.
    repeated = [name for name in ("shard", "reason") if name in table.column_names]
    pq.write_table(table, written, compression="zstd", use_dictionary=repeated)
    return written.getvalue()
