"""Labelled images: a shard set with labels joined on; folders and lists become one first."""

import csv
import io
import json
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from numpy.typing import NDArray

from moco_scale.distributed import Ranks, barrier
from moco_scale.errors import EvaluationError
from shards import PackConfig, ShardSet, open_store, pack
from shards.errors import NotFoundError
from shards.lists import is_list
from shards.manifest import MANIFEST
from shards.pack import PackProgress

logger = logging.getLogger(__name__)

FOLDER = "folder"
"""Instead of a list of labels: the class is the folder that an image lies in."""
_COLUMN = "label"


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelledSamples:
    """Which samples of a shard set have which label."""

    sample_ids: NDArray[np.int64]
    """M ordinals, ascending."""
    labels: NDArray[np.int64]
    """M numbers of classes."""
    classes: tuple[str, ...]
    uris: tuple[str, ...]
    """M addresses of the images that were packed."""
    num_unlabelled: int
    num_unused: int


def open_images(
    url: str,
    *,
    packed_below: str,
    ranks: Ranks,
    progress: Callable[[PackProgress], None] | None = None,
) -> ShardSet:
    """The shard set at an address; a folder, or a list of images, is packed into one first.

    Packing drops exact duplicates and what no decoder reads, as it does for training; asked again,
    it adds what is new. A collective: the first rank packs, the others wait.

    Args:
        packed_below: URL below which packed sets are kept.

    Raises:
        SourceError: no object, or not one usable image.
    """
    folder, _, name = url.rstrip("/").rpartition("/")
    key = url.rstrip("/")
    if is_list(url):
        # Another list at the same address may say other labels of the same images.
        try:
            key += open_store(folder or ".").head(name).etag
        except NotFoundError as err:
            raise EvaluationError(f"no list of images at {url}") from err
    elif _is_there(url, MANIFEST):
        return ShardSet.open(url)
    target = f"{packed_below.rstrip('/')}/{xxhash.xxh3_64_hexdigest(key.encode())}"
    if ranks.speaks:
        was_packed = _is_there(target, MANIFEST)
        pack(url, target, PackConfig(), add=was_packed and not is_list(url), progress=progress)
    barrier(ranks)
    return ShardSet.open(target)


def join_labels(shard_set: ShardSet, labels: str) -> LabelledSamples:
    """Join labels on the samples by uri.

    A list's uri is an object's full URI, or its path below the source that was packed.

    Args:
        labels: URL of a CSV or Parquet with the columns uri and label; 'folder'; or empty: the
            column `label` that was packed with the images if there is one, else the folders.

    Raises:
        EvaluationError: the labels cannot be read, match no image, or are all the same.
    """
    table = shard_set.table(columns=["uri", _COLUMN] if not labels else ["uri"])
    uris: list[str] = table.column("uri").to_pylist()
    if not uris:
        raise EvaluationError(f"{shard_set.url} holds no image; pack some, or give another set")
    ids = table.column("sample_id").to_numpy()
    found: list[str | None]
    if not labels and _COLUMN in table.column_names:
        found = [_text(label) for label in table.column(_COLUMN).to_pylist()]
        named, num_labels = f"the column {_COLUMN} of {shard_set.url}", len(uris)
    elif labels in ("", FOLDER):
        found = [PurePosixPath(uri).parent.name for uri in uris]
        named, num_labels = f"the folders of {shard_set.url}", len(uris)
    else:
        by_uri = _read_labels(labels)
        sources = [f"{one.rstrip('/')}/" for one in json.loads(shard_set.metadata["sources"])]
        found = [_label(uri, by_uri, sources) for uri in uris]
        named, num_labels = labels, len(by_uri)
        if not any(label is not None for label in found):
            raise EvaluationError(
                f"none of the {len(by_uri)} labels in {labels} names an image of {shard_set.url}: "
                f"a label's uri is like {next(iter(by_uri), '(none)')!r}, an image's {uris[0]!r}"
            )
    matched = np.array([label is not None for label in found], dtype=bool)
    classes = tuple(sorted({label for label in found if label is not None}))
    if len(classes) < 2:
        only = repr(classes[0]) if classes else "empty"
        raise EvaluationError(
            f"{named}: all {int(matched.sum())} labels are {only}; an evaluation needs two classes"
        )
    numbers = {name: number for number, name in enumerate(classes)}
    return LabelledSamples(
        sample_ids=ids[matched],
        labels=np.array([numbers[label] for label in found if label is not None], dtype=np.int64),
        classes=classes,
        uris=tuple(uri for uri, label in zip(uris, found, strict=True) if label is not None),
        num_unlabelled=int((~matched).sum()),
        num_unused=max(0, num_labels - int(matched.sum())) if labels not in ("", FOLDER) else 0,
    )


def _is_there(url: str, path: str) -> bool:
    try:
        open_store(url).head(path)
    except NotFoundError:
        return False
    return True


def _label(uri: str, by_uri: Mapping[str, str], sources: Sequence[str]) -> str | None:
    if uri in by_uri:
        return by_uri[uri]
    below = (uri.removeprefix(source) for source in sources if uri.startswith(source))
    return next((by_uri[path] for path in below if path in by_uri), None)


def _text(label: object) -> str | None:
    return None if label in (None, "") else str(label)


def _read_labels(url: str) -> dict[str, str]:
    folder, _, name = url.rpartition("/")
    try:
        data = bytes(open_store(folder or ".").read(name))
    except NotFoundError as err:
        raise EvaluationError(f"no list of labels at {url}") from err
    if name.endswith(".parquet"):
        rows = _parquet_rows(data, url)
    else:
        text = data.decode("utf-8-sig", "replace")
        reader = csv.DictReader(io.StringIO(text))
        if not {"uri", "label"} <= set(reader.fieldnames or ()):
            raise EvaluationError(
                f"{url}: the first line must be 'uri,label', not {text.partition(chr(10))[0]!r}"
            )
        rows = {row["uri"]: _text(row["label"]) for row in reader}
    labels = {uri: label for uri, label in rows.items() if label is not None}
    if not labels:
        raise EvaluationError(f"{url} holds no label; give a list with the columns uri and label")
    logger.info("%s: %d labels of %d classes", url, len(labels), len(Counter(labels.values())))
    return labels


def _parquet_rows(data: bytes, url: str) -> dict[str, str | None]:
    try:
        table = pq.read_table(pa.BufferReader(data))
    except pa.ArrowException as err:
        raise EvaluationError(f"{url} is not readable as Parquet: {err}") from err
    if not {"uri", "label"} <= set(table.column_names):
        raise EvaluationError(
            f"{url} must have the columns uri and label, not {', '.join(table.column_names)}"
        )
    uris, labels = table.column("uri").to_pylist(), table.column("label").to_pylist()
    return {uri: _text(label) for uri, label in zip(uris, labels, strict=True)}
