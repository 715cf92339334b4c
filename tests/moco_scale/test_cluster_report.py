"""The page about what an encoder finds alike: its figures, its files, and hostile names in it."""

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from moco_scale.cluster_report import ClusterConfig, write_cluster_report
from moco_scale.embedding import as_matrix, feature_tables, read_embedding
from moco_scale.errors import ConfigError, EmbedError
from shards import PackConfig, ShardSet, pack
from shards.store import open_store
from tests.support.embeddings import make_embedding, save_run
from tests.support.shard_sets import overwrite, stored

pytestmark = pytest.mark.timeout(240)

HOSTILE = "a&b <img src=x onerror=alert(1)> \"'.png"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ShardSet]:
    """Features of 12 pictures, each there twice with a pixel changed; one has a hostile name."""
    folder = tmp_path_factory.mktemp("pairs")
    bucket = folder / "bucket"
    bucket.mkdir()
    draw = np.random.default_rng(0)
    for number in range(12):
        pixels = draw.integers(0, 256, (40, 40, 3), dtype=np.uint8)
        name = HOSTILE if number == 3 else f"{number:02}.png"
        Image.fromarray(pixels).save(bucket / name)
        pixels[0, 0] ^= 1  # outside of the view: the same features
        Image.fromarray(pixels).save(bucket / f"twin-{number:02}.png")
    pack([str(bucket)], str(folder / "set"), PackConfig(workers=1, max_shard_samples=7))
    save_run(str(folder / "run"), seed=1)
    make_embedding(str(folder / "set"), str(folder / "run"), folder / "to")
    return str(folder / "to"), ShardSet.open(str(folder / "set"))


def report(made: tuple[str, ShardSet], **settings: Any) -> str:
    to, shard_set = made
    config = ClusterConfig(**settings)
    url = write_cluster_report(to, shard_set.url, config, device=torch.device("cpu"))
    return Path(url).read_text()


def test_the_twins_are_the_nearest_pairs(made: tuple[str, ShardSet]) -> None:
    report(made, threshold=0.9999999, clusters=4)

    pairs = pq.read_table(Path(made[0], "pairs.parquet")).to_pylist()
    names = [sorted(Path(row[key]).name for key in ("uri", "other_uri")) for row in pairs]
    twins = [sorted([HOSTILE if n == 3 else f"{n:02}.png", f"twin-{n:02}.png"]) for n in range(12)]
    assert all(twin in names for twin in twins)
    known = made[1].table(["uri"]).to_pydict()
    uris = dict(zip(known["sample_id"], known["uri"], strict=True))
    for row in pairs:
        assert row["uri"] == uris[row["sample_id"]]
        assert row["other_uri"] == uris[row["other_sample_id"]]


def test_each_image_is_in_a_cluster_with_the_cosine_of_its_nearest(
    made: tuple[str, ShardSet],
) -> None:
    report(made, clusters=4)

    rows = pq.read_table(Path(made[0], "clusters.parquet"))
    assert rows.column("sample_id").to_pylist() == list(range(24))
    assert set(rows.column("cluster").to_pylist()) == {0, 1, 2, 3}
    features = np.concatenate(
        [
            as_matrix(table.column("features"))
            for table in feature_tables(open_store(made[0]), read_embedding(made[0]))
        ]
    )
    cosines = features @ features.T
    np.fill_diagonal(cosines, -1)
    found = rows.column("cosine_to_nearest").to_numpy()
    np.testing.assert_allclose(found, cosines.max(1), atol=1e-5)


def test_the_page_needs_no_network_and_names_stay_text(made: tuple[str, ShardSet]) -> None:
    page = report(made, clusters=4)

    assert "<img src=x" not in page
    assert "a&amp;b &lt;img src=x onerror=alert(1)&gt; &#34;&#39;.png" in page
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert len(sources) >= 24
    assert all(source.startswith("data:image/jpeg;base64,") for source in sources)
    assert "24</b><span>images looked at</span>" in page
    assert "A sample" not in page


def test_more_rows_than_are_looked_at_are_sampled_and_the_page_says_so(
    made: tuple[str, ShardSet],
) -> None:
    page = report(made, report_rows=10, clusters=3)

    ids = pq.read_table(Path(made[0], "clusters.parquet")).column("sample_id").to_pylist()
    assert len(set(ids)) == 10
    assert (min(ids), max(ids)) == (0, 23)
    assert "10</b><span>images looked at, of 24</span>" in page
    assert "A sample:</b> 10 of 24 images" in page
    assert "about\n17 % lie in it" in page


def test_the_same_settings_give_the_same_files(made: tuple[str, ShardSet]) -> None:
    names = ("clusters.html", "clusters.parquet", "pairs.parquet")

    report(made, clusters=5, seed=3)
    first = [Path(made[0], name).read_bytes() for name in names]
    report(made, clusters=5, seed=3)

    assert [Path(made[0], name).read_bytes() for name in names] == first


def test_what_cannot_be_decoded_is_on_the_page(made: tuple[str, ShardSet], tmp_path: Path) -> None:
    shutil.copytree(made[1].url, tmp_path / "set")
    own = ShardSet.open(str(tmp_path / "set"))
    broken = overwrite(own, 5, bytes(len(stored(own, 5))), fix_checksum=True)
    run = read_embedding(made[0]).provenance.run
    make_embedding(broken.url, run, tmp_path / "to")

    page = report((str(tmp_path / "to"), broken), clusters=4)

    assert "Not decodable" in page
    assert "23 + not decodable 1" in page


def test_nothing_whole_and_nothing_there(made: tuple[str, ShardSet], tmp_path: Path) -> None:
    with pytest.raises(EmbedError, match="no whole embedding"):
        report((str(tmp_path), made[1]))
    with pytest.raises(ConfigError, match="no cosine"):
        ClusterConfig(threshold=1.5)
    with pytest.raises(ConfigError, match="clusters must be at least 1"):
        ClusterConfig(clusters=0)
