"""The readers that people have give the same bytes for the same keys as our index says."""

import os
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import webdataset
import xxhash

from shards import PackConfig, ShardSet, pack
from shards.export import write_idx
from shards.images import EXTENSIONS
from tests.support.images import good_images, jpeg

Samples = dict[str, bytes]
NUM_JPEGS = 20


@pytest.fixture(scope="module")
def shard_set(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """Every kind of image that is packed, and some JPEGs, in shards of seven."""
    raw = tmp_path_factory.mktemp("readers")
    for name, good in good_images().items():
        (raw / f"{name}.bin").write_bytes(good.data)
    for number in range(NUM_JPEGS):
        (raw / f"photo {number}.jpg").write_bytes(jpeg(100 + number))
    target = tmp_path_factory.mktemp("packed") / "shards"
    pack(str(raw), str(target), PackConfig(seed=1, workers=1, max_shard_samples=7))
    return ShardSet.open(str(target))


@pytest.fixture(scope="module")
def tars(shard_set: ShardSet) -> list[Path]:
    root = Path(shard_set.store.url)
    return [root / path for path in (root / "shards.txt").read_text().split()]


@pytest.fixture(scope="module")
def expected(shard_set: ShardSet, tars: list[Path]) -> Samples:
    """Member name -> bytes, cut out of the tars by the index and checked by its checksums."""
    samples = {}
    for tar, rows in zip(tars, shard_set.tables(), strict=True):
        data = tar.read_bytes()
        for row in rows.to_pylist():
            image = data[row["offset"] : row["offset"] + row["length"]]
            assert xxhash.xxh3_64_intdigest(image) == row["checksum"]
            samples[f"{row['key']}.{EXTENSIONS[row['format']]}"] = image
    assert len(samples) == shard_set.num_samples
    assert {Path(name).suffix for name in samples} == {
        ".jpg",
        ".png",
        ".webp",
        ".bmp",
        ".pnm",
    }
    return samples


def test_tar_reads_them(tars: list[Path], expected: Samples, tmp_path: Path) -> None:
    for tar in tars:
        subprocess.run(["tar", "xf", tar, "-C", tmp_path], check=True, timeout=60)

    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == expected


def test_tarfile_reads_them(tars: list[Path], expected: Samples) -> None:
    samples = {}
    for path in tars:
        with tarfile.open(path) as tar:
            for member in tar:
                content = tar.extractfile(member)
                assert content is not None
                samples[member.name] = content.read()

    assert samples == expected


# webdataset leaves the closing of its files to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_webdataset_reads_them(tars: list[Path], expected: Samples) -> None:
    dataset = webdataset.WebDataset([str(tar) for tar in tars], shardshuffle=False)

    samples = {
        f"{sample['__key__']}.{field}": content
        for sample in dataset
        for field, content in sample.items()
        if not field.startswith("__")
    }

    assert samples == expected
    assert list(samples) == list(expected)


@pytest.mark.dali
def test_dali_reads_them_without_an_index(tars: list[Path], expected: Samples) -> None:
    assert list(dali_reads(tars, batch_size=5)) == list(expected.values())


@pytest.mark.dali
def test_dali_reads_them_with_our_index(
    shard_set: ShardSet, tars: list[Path], expected: Samples
) -> None:
    write_idx(shard_set.url)
    indexes = [Path(shard_set.url, "idx", tar.with_suffix(".idx").name) for tar in tars]

    assert list(dali_reads(tars, batch_size=5, indexes=indexes)) == list(expected.values())


def dali_reads(
    tars: list[Path], *, batch_size: int, indexes: list[Path] | None = None
) -> Iterator[bytes]:
    """The images in DALI's order; its reader has no keys to give."""
    fn = pytest.importorskip("nvidia.dali.fn")
    from nvidia.dali import pipeline_def

    @pipeline_def(batch_size=batch_size, num_threads=1, device_id=None, prefetch_queue_depth=1)
    def graph() -> object:
        return fn.readers.webdataset(
            paths=[str(tar) for tar in tars],
            index_paths=[str(index) for index in indexes or []],
            ext=";".join(EXTENSIONS.values()),
            missing_component_behavior="error",
            name="reader",
        )

    pipe = graph()
    pipe.build()
    left = pipe.epoch_size("reader")
    while left > 0:
        (batch,) = pipe.run()
        for at in range(min(left, batch_size)):
            yield np.asarray(batch[at]).tobytes()
        left -= batch_size


@pytest.mark.timeout(240)
def test_hugging_face_datasets_reads_them(
    tars: list[Path], expected: Samples, tmp_path: Path
) -> None:
    # In a process of its own: it reads its settings once, when it is imported.
    result = hugging_face(tars, tmp_path, fields=sorted(EXTENSIONS.values()))

    assert result == {name: xxhash.xxh3_64_hexdigest(data) for name, data in expected.items()}


@pytest.mark.timeout(240)
def test_hugging_face_datasets_needs_no_features_for_a_set_of_one_format(tmp_path: Path) -> None:
    raw, target = tmp_path / "raw", tmp_path / "packed"
    raw.mkdir()
    for number in range(NUM_JPEGS):
        (raw / f"{number}.jpg").write_bytes(jpeg(number))
    pack(str(raw), str(target), PackConfig(workers=1, max_shard_samples=7))
    tars = sorted((target / "shards").glob("*.tar"))

    result = hugging_face(tars, tmp_path, fields=[])

    packed = {xxhash.xxh3_64_hexdigest(path.read_bytes()) for path in raw.iterdir()}
    assert set(result.values()) == packed
    assert len(result) == NUM_JPEGS


_HUGGING_FACE = """
import sys
import xxhash
from datasets import Features, Image, Value, load_dataset

fields, tars = sys.argv[1], sys.argv[2:]
features = None
if fields:
    # What it infers from the first five samples holds for a set of one format only.
    names = {"__key__": Value("string"), "__url__": Value("string")}
    features = Features({**names, **{name: Image(decode=False) for name in fields.split(",")}})
samples = load_dataset(
    "webdataset", data_files=tars, split="train", streaming=True, features=features
).decode(False)
for sample in samples:
    for name, content in sample.items():
        if not name.startswith("__") and content is not None:
            print(f"{sample['__key__']}.{name}", xxhash.xxh3_64_hexdigest(content["bytes"]))
"""


def hugging_face(tars: list[Path], cache: Path, *, fields: list[str]) -> dict[str, str]:
    """Member name -> digest of the bytes that `datasets` gives."""
    done = subprocess.run(
        [sys.executable, "-c", _HUGGING_FACE, ",".join(fields), *map(str, tars)],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(cache / "hf")},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    return dict(line.split() for line in done.stdout.splitlines())
