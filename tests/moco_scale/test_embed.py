"""Features of a shard set: every live sample once, whatever happens on the way."""

import dataclasses
import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.nn import functional

from moco_scale.distributed import Ranks
from moco_scale.embed import EmbedConfig, EmbedProgress
from moco_scale.embedding import (
    as_matrix,
    feature_tables,
    features_path,
    quarantine_path,
    read_embedding,
)
from moco_scale.encoders import build_encoder, pooled_features
from moco_scale.errors import ConfigError, EmbedError
from pipelines import iterate_once
from shards import PackConfig, ShardSet, pack
from shards.errors import UserError
from shards.store import open_store
from tests.support.digests import digests
from tests.support.distributed import run_distributed
from tests.support.embeddings import MODEL, POOLED, make_embedding, save_run
from tests.support.shard_sets import (
    flip_a_byte,
    make_shard_set,
    overwrite,
    stored,
    undecodable,
)

pytestmark = pytest.mark.timeout(240)

COUNT, SHARD_SAMPLES = 50, 8  # seven shards, the last of two


@pytest.fixture(scope="module")
def shard_set(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    return make_shard_set(tmp_path_factory.mktemp("set"), count=COUNT, shard_samples=SHARD_SAMPLES)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    url = str(tmp_path_factory.mktemp("run") / "run")
    save_run(url, seed=1)
    return url


@pytest.fixture
def own_set(shard_set: ShardSet, tmp_path: Path) -> ShardSet:
    """A copy that a test may damage."""
    shutil.copytree(shard_set.url, tmp_path / "own")
    return ShardSet.open(str(tmp_path / "own"))


def table(to: Path | str) -> pa.Table:
    return pa.concat_tables(feature_tables(open_store(str(to)), read_embedding(str(to))))


def digests_of(to: Path) -> dict[str, str]:
    """Of all that is not provenance."""
    return digests(to, to.rglob("*.parquet"))


def test_there_is_a_row_for_each_sample_with_its_uri_and_place(
    shard_set: ShardSet, run: str, tmp_path: Path
) -> None:
    seen: list[EmbedProgress] = []

    whole = make_embedding(shard_set.url, run, tmp_path / "to", progress=seen.append)

    assert whole is not None
    assert (whole.num_samples, whole.num_rows, whole.num_quarantined) == (COUNT, COUNT, 0)
    assert whole == read_embedding(str(tmp_path / "to"))
    rows = table(tmp_path / "to")
    known = shard_set.table(["uri"])
    assert rows.column("sample_id").to_pylist() == list(range(COUNT))
    assert rows.column("uri").to_pylist() == known.column("uri").to_pylist()
    places = list(zip(rows["shard"].to_pylist(), rows["position"].to_pylist(), strict=True))
    assert places == [divmod(sample, SHARD_SAMPLES) for sample in range(COUNT)]
    assert rows.schema.field("features").type == pa.list_(pa.float32(), POOLED)
    assert seen[-1] == EmbedProgress(
        samples_done=COUNT, samples=COUNT, shards_done=7, shards=7, quarantined=0
    )


@pytest.mark.parametrize("features", ["pooled", "projected"])
@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_features_are_what_the_encoder_gives_for_the_evaluation_view(
    features: str, normalise: bool, dtype: str, shard_set: ShardSet, run: str, tmp_path: Path
) -> None:
    encoder = build_encoder(MODEL, seed=1).eval()
    (ids, images), *_ = iterate_once(
        shard_set,
        ordinals=None,
        view_size=32,
        batch_size=COUNT,
        loader="cpu",
        num_threads=1,
        device_index=None,
    )
    with torch.inference_mode():
        wanted = pooled_features(encoder, images) if features == "pooled" else encoder(images)
    if normalise:
        wanted = functional.normalize(wanted, dim=1)

    make_embedding(
        shard_set.url, run, tmp_path, features=features, normalise=normalise, dtype=dtype,
    )  # fmt: skip

    found = as_matrix(table(tmp_path).column("features"))
    assert found.dtype == dtype
    assert found.shape == (len(ids), POOLED if features == "pooled" else 16)
    scale = float(wanted.abs().max())
    tolerance = 1e-5 if dtype == "float32" else 1e-3
    np.testing.assert_allclose(found / scale, wanted.numpy() / scale, rtol=0, atol=tolerance)


def test_the_matrix_of_a_file_is_no_copy(shard_set: ShardSet, run: str, tmp_path: Path) -> None:
    make_embedding(shard_set.url, run, tmp_path)
    column = pq.read_table(tmp_path / features_path(0)).column("features")

    matrix = as_matrix(column)

    assert matrix.flags.c_contiguous
    assert matrix.dtype == np.float32
    *_, numbers = column.chunk(0).values.buffers()
    assert np.shares_memory(matrix, np.frombuffer(numbers, dtype=np.float32))


class _KilledError(Exception):
    pass


def test_stopped_after_any_batch_it_ends_with_the_same_bytes(
    shard_set: ShardSet, run: str, tmp_path: Path
) -> None:
    make_embedding(shard_set.url, run, tmp_path / "once")
    stops = 0

    def stop(now: EmbedProgress) -> None:
        nonlocal stops
        if now.shards_done == 2 or now.samples_done == 1 + 3 * stops:
            stops += 1
            raise _KilledError

    for _ in range(20):
        try:
            make_embedding(shard_set.url, run, tmp_path / "often", progress=stop)
        except _KilledError:
            assert not (tmp_path / "often/manifest.json").exists()
            continue
        break

    assert stops >= 3
    assert digests_of(tmp_path / "often") == digests_of(tmp_path / "once")
    assert read_embedding(str(tmp_path / "often")) == read_embedding(str(tmp_path / "once"))


def _dies(_: Ranks, shard_set: str, run: str, to: str, after: int) -> None:
    batches = 0

    def kill(_: EmbedProgress) -> None:
        nonlocal batches
        batches += 1
        if batches == after:
            os.kill(os.getpid(), signal.SIGKILL)

    make_embedding(shard_set, run, to, progress=kill)


@pytest.mark.timeout(300)  # eleven processes that load torch, on a busy machine
def test_killed_ten_times_it_ends_with_the_same_bytes(
    run: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("kills")
    many = make_shard_set(folder, count=120, shard_samples=3)  # a batch and its end: 2 calls each
    make_embedding(many.url, run, folder / "once")
    draw = np.random.default_rng(5)
    there = []

    for _ in range(10):
        after = int(draw.integers(1, 9))
        with pytest.raises(AssertionError, match="died without a word"):
            run_distributed(_dies, 1, many.url, run, str(folder / "killed"), after)
        assert not (folder / "killed/manifest.json").exists()
        there.append(len(list((folder / "killed").glob("features/*.parquet"))))
    assert there == sorted(there)
    assert 5 < there[-1] < len(many.names)
    make_embedding(many.url, run, folder / "killed")

    assert digests_of(folder / "killed") == digests_of(folder / "once")
    assert read_embedding(str(folder / "killed")) == read_embedding(str(folder / "once"))


def test_what_is_whole_is_left_as_it_is(shard_set: ShardSet, run: str, tmp_path: Path) -> None:
    first = make_embedding(shard_set.url, run, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}

    assert make_embedding(shard_set.url, run, tmp_path) == first
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def _embed_on(ranks: Ranks, shard_set: str, run: str, to: str) -> bool:
    return make_embedding(shard_set, run, to, ranks=ranks) is not None


@pytest.mark.parametrize("world_size", [2, 3])
def test_more_ranks_make_the_same_bytes(
    world_size: int, shard_set: ShardSet, run: str, tmp_path: Path
) -> None:
    make_embedding(shard_set.url, run, tmp_path / "one")

    found_whole = run_distributed(
        _embed_on, world_size, shard_set.url, run, str(tmp_path / "more"), timeout=90
    )

    assert sum(found_whole) == 1
    assert digests_of(tmp_path / "more") == digests_of(tmp_path / "one")
    assert read_embedding(str(tmp_path / "more")).num_rows == COUNT


def _rank_0_is_done_first(ranks: Ranks, shard_set: str, run: str, to: str) -> bool:
    is_done = Path(f"{to}-rank-0-is-done")
    deadline = time.monotonic() + 60

    def wait(_: EmbedProgress) -> None:
        while ranks.rank == 1 and not is_done.exists():
            assert time.monotonic() < deadline, "rank 0 waits for rank 1"
            time.sleep(0.01)  # between two looks

    found_whole = make_embedding(shard_set, run, to, ranks=ranks, progress=wait) is not None
    is_done.touch()
    return found_whole


def test_no_rank_waits_and_the_last_one_writes_the_manifest(
    shard_set: ShardSet, run: str, tmp_path: Path
) -> None:
    found_whole = run_distributed(
        _rank_0_is_done_first, 2, shard_set.url, run, str(tmp_path / "to"), timeout=90
    )

    assert found_whole == [False, True]


def _fails_alike(ranks: Ranks, shard_set: str, run: str, to: str) -> str:
    with pytest.raises(EmbedError) as caught:
        make_embedding(shard_set, run, to, ranks=ranks, dtype="float16")
    return str(caught.value)


def test_all_ranks_end_with_the_same_error(shard_set: ShardSet, run: str, tmp_path: Path) -> None:
    make_embedding(shard_set.url, run, tmp_path)

    said = run_distributed(_fails_alike, 2, shard_set.url, run, str(tmp_path))

    assert said[0] == said[1]
    assert "--dtype is float32 there and float16 now" in said[0]


def test_samples_that_cannot_be_decoded_are_listed_with_reasons(
    own_set: ShardSet, run: str, tmp_path: Path
) -> None:
    png = next(i for i in range(COUNT) if stored(own_set, i).startswith(b"\x89PNG"))
    lost = {png, *range(32, 40)}  # one of a shard, and one shard altogether
    broken = overwrite(own_set, png, undecodable(own_set, png), fix_checksum=True)
    for sample in lost - {png}:
        nothing = bytes(len(stored(broken, sample)))
        broken = overwrite(broken, sample, nothing, fix_checksum=True)

    whole = make_embedding(broken.url, run, tmp_path / "to")

    assert whole is not None
    assert (whole.num_samples, whole.num_quarantined) == (COUNT, len(lost))
    rows = table(tmp_path / "to")
    assert rows.column("sample_id").to_pylist() == sorted(set(range(COUNT)) - lost)
    assert pq.read_table(tmp_path / "to" / features_path(4)).num_rows == 0
    listed = pa.concat_tables(
        [pq.read_table(tmp_path / "to" / quarantine_path(shard)) for shard in sorted({png // 8, 4})]
    )
    assert sorted(listed.column("sample_id").to_pylist()) == sorted(lost)
    uris = broken.table(["uri"]).column("uri").to_pylist()
    for row in listed.to_pylist():
        assert row["uri"] == uris[row["sample_id"]]
        assert divmod(row["sample_id"], SHARD_SAMPLES) == (row["shard"], row["position"])
        assert row["reason"]


def test_a_list_of_a_killed_process_goes_if_the_samples_can_be_read_after_all(
    own_set: ShardSet, run: str, tmp_path: Path
) -> None:
    sound = stored(own_set, 3)
    broken = overwrite(own_set, 3, flip_a_byte(sound))
    make_embedding(broken.url, run, tmp_path / "to")
    # As a kill between the two writes leaves it.
    (tmp_path / "to" / features_path(0)).unlink()
    (tmp_path / "to/manifest.json").unlink()
    overwrite(broken, 3, sound)

    whole = make_embedding(broken.url, run, tmp_path / "to")

    assert whole is not None
    assert (whole.num_rows, whole.num_quarantined) == (COUNT, 0)
    assert not (tmp_path / "to" / quarantine_path(0)).exists()


def test_buried_samples_have_no_rows_and_a_shard_of_them_has_an_empty_file(
    own_set: ShardSet, run: str, tmp_path: Path
) -> None:
    dead = [0, *range(8, 16)]
    shards, positions = np.divmod(np.array(dead, dtype=np.int32), SHARD_SAMPLES)
    reasons = pa.array(["duplicate"] * len(dead))
    buried = own_set.bury(
        pa.table({"shard": shards, "position": positions, "reason": reasons, "detail": reasons})
    )

    whole = make_embedding(buried.url, run, tmp_path / "to")

    assert whole is not None
    assert (whole.num_samples, whole.num_rows) == (COUNT - 9, COUNT - 9)
    assert whole.provenance.version == 2
    assert table(tmp_path / "to")["sample_id"].to_pylist() == [
        i for i in range(COUNT) if i not in dead
    ]


def test_what_was_begun_goes_on_with_its_version_and_its_checkpoint(
    own_set: ShardSet, tmp_path: Path
) -> None:
    run, to = str(tmp_path / "run"), tmp_path / "to"
    first = save_run(run, seed=1, step=7)

    def stop(now: EmbedProgress) -> None:
        if now.shards_done == 3:
            raise _KilledError

    with pytest.raises(_KilledError):
        make_embedding(own_set.url, run, to, progress=stop)
    save_run(run, seed=2, step=9)
    own_set.bury(
        pa.table(
            {
                "shard": pa.array([0], pa.int32()),
                "position": pa.array([1], pa.int32()),
                "reason": ["duplicate"],
                "detail": [""],
            }
        )
    )
    said: list[str] = []

    whole = make_embedding(own_set.url, run, to, said=said)

    assert whole is not None
    assert (whole.provenance.step, whole.provenance.version) == (7, 1)
    assert whole.provenance.checkpoint == first
    assert whole.num_rows == COUNT
    assert any("version 2 now" in line for line in said)


def refused(*arguments: Any, match: str, **settings: Any) -> None:
    """One line, and the place is as it was."""
    place = Path(arguments[2])
    before = sorted(place.rglob("*"))
    with pytest.raises(UserError, match=match) as caught:
        make_embedding(*arguments, **settings)
    assert len(str(caught.value).splitlines()) == 1
    assert sorted(place.rglob("*")) == before


def test_an_empty_set(own_set: ShardSet, run: str, tmp_path: Path) -> None:
    shards = np.repeat(np.arange(7, dtype=np.int32), own_set.slots)
    positions = np.concatenate([np.arange(n, dtype=np.int32) for n in own_set.slots])
    reasons = pa.array(["duplicate"] * COUNT)
    own_set.bury(
        pa.table({"shard": shards, "position": positions, "reason": reasons, "detail": reasons})
    )

    refused(own_set.url, run, tmp_path / "to", match="no live samples")


def test_no_set_no_run_no_checkpoint(shard_set: ShardSet, run: str, tmp_path: Path) -> None:
    to = tmp_path / "to"

    refused(str(tmp_path / "no-set"), run, to, match="no shard set at")
    refused(shard_set.url, str(tmp_path / "no-run"), to, match="no run at")
    refused(shard_set.url, f"{run}/checkpoints/step-000000099.pt", to, match="no checkpoint at")


def test_a_checkpoint_of_a_foreign_architecture(shard_set: ShardSet, tmp_path: Path) -> None:
    def narrow(model: dict[str, Any]) -> None:
        model["encoder_q.conv5.0.weight"] = torch.zeros(8, 192, 1, 1)

    def other(model: dict[str, Any]) -> None:
        for name in [name for name in model if name.startswith("encoder_q.stage")]:
            model[name.replace("stage", "layer")] = model.pop(name)

    save_run(str(tmp_path / "narrow"), seed=1, change=narrow)
    save_run(str(tmp_path / "other"), seed=1, change=other)
    foreign = tmp_path / "resnet18.pth"
    torch.save({"fc.weight": torch.zeros(3)}, foreign)
    to = tmp_path / "to"

    refused(
        shard_set.url, str(tmp_path / "narrow"), to,
        match=r"another architecture .* encoder_q.conv5.0.weight .* \(8, 192, 1, 1\)",
    )  # fmt: skip
    refused(
        shard_set.url, str(tmp_path / "other"), to, match="another architecture .* is not there"
    )
    refused(shard_set.url, str(foreign), to, match="no finished checkpoint of a run")


def test_a_size_that_the_backbone_does_not_take(
    shard_set: ShardSet, run: str, tmp_path: Path
) -> None:
    refused(shard_set.url, run, tmp_path / "to", view_size=-1, match="view_size must be")
    # A last pooling of nothing: other backbones have a fixed size.
    with pytest.raises(ConfigError, match="batch_size"):
        EmbedConfig(batch_size=0)


def test_features_that_are_not_finite_name_the_sample(shard_set: ShardSet, tmp_path: Path) -> None:
    run, to = str(tmp_path / "run"), tmp_path / "to"
    save_run(run, seed=1)
    make_embedding(shard_set.url, run, tmp_path / "small", features="projected", normalise=False)
    rows = as_matrix(table(tmp_path / "small").column("features"))
    middle = rows.mean(0)  # of what an encoder that has learned nothing gives for any image
    largest = np.abs(rows - middle).max(1)
    worst = int(largest.argmax())
    second = float(np.sort(largest)[-2])

    def enlarge(model: dict[str, Any]) -> None:
        # So that one sample alone is beyond the 65,504 that float16 takes.
        factor = 65_504 * 2 / (float(largest[worst]) + second)
        model["encoder_q.fc.2.bias"] = factor * (
            model["encoder_q.fc.2.bias"] - torch.from_numpy(middle)
        )
        model["encoder_q.fc.2.weight"] = factor * model["encoder_q.fc.2.weight"]

    save_run(str(tmp_path / "large"), seed=1, change=enlarge)
    uri = shard_set.table(["uri"]).column("uri")[worst].as_py()

    with pytest.raises(EmbedError, match="not finite") as caught:
        make_embedding(
            shard_set.url, str(tmp_path / "large"), to,
            features="projected", normalise=False, dtype="float16",
        )  # fmt: skip

    said = str(caught.value)
    assert f"sample {worst} ({uri})" in said
    assert f"1 of {SHARD_SAMPLES} in shard {worst // SHARD_SAMPLES}" in said
    assert "--dtype float32" in said
    assert not (to / features_path(worst // SHARD_SAMPLES)).exists()
    assert not (to / "manifest.json").exists()


def test_an_encoder_that_overflows_is_told_from_a_dtype_that_is_too_small(
    shard_set: ShardSet, tmp_path: Path
) -> None:
    def overflow(model: dict[str, Any]) -> None:
        model["encoder_q.conv5.1.weight"] = model["encoder_q.conv5.1.weight"] * 3e38
        model["encoder_q.conv1.1.weight"] = model["encoder_q.conv1.1.weight"] * 1e10

    save_run(str(tmp_path / "run"), seed=1, change=overflow)

    with pytest.raises(EmbedError, match=r"sample \d+ .* not finite .* earlier checkpoint"):
        make_embedding(shard_set.url, str(tmp_path / "run"), tmp_path / "to")


def test_images_of_all_sizes_have_features_and_one_beyond_the_limit_is_listed(
    run: str, tmp_path: Path
) -> None:
    from PIL import Image

    bucket = tmp_path / "bucket"
    bucket.mkdir()
    sizes = [(9, 400), (640, 480), (64, 64), (33, 7), (120, 121), (2000, 30)]
    draw = np.random.default_rng(0)
    for number, (width, height) in enumerate(sizes):
        coarse = draw.integers(0, 256, (5, 7, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((width, height)).save(bucket / f"{number}.png")
    pack([str(bucket)], str(tmp_path / "set"), PackConfig(workers=1))

    packed = ShardSet.open(str(tmp_path / "set"))
    whole = make_embedding(packed.url, run, tmp_path / "to")

    assert whole is not None
    assert whole.num_rows == whole.num_samples == packed.num_samples >= 4


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"features": "projected"}, "--features is pooled there and projected now"),
        ({"dtype": "float16"}, "--dtype is float32 there and float16 now"),
        ({"normalise": False}, "--normalise is True there and False now"),
        ({"view_size": 48}, "--view-size is 32 there and 48 now"),
    ],
)
def test_a_place_of_other_features(
    settings: dict[str, Any], match: str, shard_set: ShardSet, run: str, tmp_path: Path
) -> None:
    make_embedding(shard_set.url, run, tmp_path)

    refused(shard_set.url, run, tmp_path, match=match, **settings)


def test_a_place_of_another_run_or_another_set(
    shard_set: ShardSet, run: str, tmp_path: Path
) -> None:
    to = tmp_path / "to"
    make_embedding(shard_set.url, run, to)
    save_run(str(tmp_path / "run"), seed=2)
    other = make_shard_set(tmp_path / "other", count=9, shard_samples=8)

    refused(shard_set.url, str(tmp_path / "run"), to, match="the encoder is .* there")
    refused(other.url, run, to, match="the shard set is .* there")


def test_a_copy_of_the_run_is_the_same_encoder(
    shard_set: ShardSet, run: str, tmp_path: Path
) -> None:
    first = make_embedding(shard_set.url, run, tmp_path / "to")
    shutil.copytree(run, tmp_path / "copy")

    assert make_embedding(shard_set.url, str(tmp_path / "copy"), tmp_path / "to") == first


def test_a_place_of_files_that_nothing_explains(
    shard_set: ShardSet, run: str, tmp_path: Path
) -> None:
    make_embedding(shard_set.url, run, tmp_path)
    (tmp_path / "embedding.json").unlink()

    refused(shard_set.url, run, tmp_path, match="without a embedding.json")

    (tmp_path / "embedding.json").write_text("{}")
    refused(shard_set.url, run, tmp_path, match="has format None")


def test_an_embedding_that_is_not_whole_is_not_read(tmp_path: Path) -> None:
    with pytest.raises(EmbedError, match="no whole embedding"):
        read_embedding(str(tmp_path))


def test_each_file_says_what_it_is(shard_set: ShardSet, run: str, tmp_path: Path) -> None:
    whole = make_embedding(shard_set.url, run, tmp_path)

    said = pq.read_schema(tmp_path / features_path(2)).metadata[b"moco_scale"]

    assert whole is not None
    assert json.loads(said) == dataclasses.asdict(whole.provenance)
    assert json.loads(said) == json.loads((tmp_path / "embedding.json").read_text())
