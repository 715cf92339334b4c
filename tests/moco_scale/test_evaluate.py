"""Evaluation of an encoder on real images, and what users get wrong about it."""

import dataclasses
import json
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from moco_scale import features
from moco_scale.checkpoint import checkpoint_path
from moco_scale.cli import main
from moco_scale.distributed import Ranks, one_rank
from moco_scale.encoders import build_encoder
from moco_scale.evaluate import EvaluateConfig, evaluate
from moco_scale.evaluation import (
    EVALUATION_FILE,
    PAGE_FILE,
    SAMPLES_FILE,
    Evaluation,
    read_evaluation,
)
from moco_scale.features import FOLDER
from moco_scale.labels import join_labels
from moco_scale.model import ModelConfig
from moco_scale.subject import FRESH, RANDOM, TRAINED
from shards import PackConfig, ShardSet, open_store, pack
from shards.errors import UserError
from shards.lists import is_list
from shards.takedown import takedown
from tests.support.digests import digests
from tests.support.distributed import run_distributed
from tests.support.made_runs import COLOURS, coloured, make_folders, make_run

pytestmark = pytest.mark.timeout(240)

EACH = 14
QUICK = EvaluateConfig(k=(3, 10), seeds=(0, 1), draws=2, bootstrap=50, num_threads=1, probe="none")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folders(tmp_path_factory.mktemp("raw") / "images", each=EACH)


@pytest.fixture(scope="module")
def shards(folders: Path) -> str:
    url = str(folders.parent / "shards")
    pack(str(folders), url, PackConfig(workers=1))
    return url


@pytest.fixture(autouse=True)
def _one_core(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The command takes a thread a core: with other programs beside it they wait for each other."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    yield
    torch.set_num_threads(1)


@pytest.fixture
def run(tmp_path: Path, shards: str) -> str:
    return make_run(tmp_path / "run", shards)


def scored(url: str, **changes: Any) -> Evaluation:
    found = evaluate(url, dataclasses.replace(QUICK, **changes), ranks=one_rank())
    assert found is not None
    return found


def test_every_table_has_the_trained_encoder_beside_what_needs_no_learning(run: str) -> None:
    found = scored(run, probe="lbfgs")

    expected = ["pixels", "colours", "HOG", RANDOM, FRESH, TRAINED]
    assert [score.features for score in found.scores] == expected
    assert [task.name for task in found.tasks] == ["linear probe", "few shots", "retrieval"]
    for task in found.tasks:
        assert [score.features for score in task.scores] == expected
    assert found.num_images == 3 * EACH
    assert found.majority == pytest.approx(1 / 3)
    by_name = {score.features: score for score in found.scores}
    assert by_name["colours"].accuracy["3"] > 0.9  # the classes are colours
    assert by_name["random"].spread["3"] is not None  # two initialisations
    assert by_name[FRESH].spread["3"] is None  # the first of them
    assert by_name["trained"].spread["3"] is None  # one checkpoint, no split
    assert by_name["trained"].gain_of_trained == {}
    low, high = by_name["pixels"].gain_of_trained["3"][1:]
    assert low <= by_name["trained"].accuracy["3"] - by_name["pixels"].accuracy["3"] <= high
    assert json.loads(Path(run, EVALUATION_FILE).read_text())["num_images"] == 3 * EACH
    assert sum(count for *_, count in found.confusion) == 3 * EACH


def test_the_random_encoder_is_the_runs_own_before_training(run: str, shards: str) -> None:
    """An encoder whose checkpoint is its initialisation, BN statistics estimated, scores as it."""
    begun = build_encoder(ModelConfig(backbone="resnet18", dim=8, bn_sub_batch=4), seed=0)
    for name, buffer in begun.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            assert not buffer.isnan().any()
    fresh = make_run(Path(run).parent / "fresh", shards, weights=begun.state_dict())

    found = scored(fresh, seeds=(0,))

    by_name = {score.features: score for score in found.scores}
    assert by_name["random"].spread["3"] is None
    # With BN as initialised it is the checkpoint itself; with estimated statistics it is another.
    assert by_name[FRESH].accuracy == by_name[TRAINED].accuracy
    assert set(by_name[FRESH].gain_of_trained.values()) == {(0.0, 0.0, 0.0)}
    kept = sorted(Path(fresh, FOLDER).rglob("*.parquet"))
    assert len(kept) == len(set(digests(Path(fresh), kept).values())) == 5


def test_an_encoder_without_batch_normalisation_has_one_random_row(
    tmp_path: Path, shards: str
) -> None:
    vit = make_run(tmp_path / "vit", shards, backbone="timm/test_vit", view_size=160)

    found = scored(vit)

    names = [score.features for score in found.scores]
    assert names == ["pixels", "colours", "HOG", RANDOM, TRAINED]
    assert found.scores[3].spread["3"] is not None


def test_features_are_made_once(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first = scored(run)
    written = {path: path.stat().st_mtime_ns for path in Path(run, FOLDER).rglob("*.parquet")}
    assert written
    monkeypatch.setattr("moco_scale.features.iterate_once", None)  # nothing is decoded again

    again = scored(run, k=(3, 5))

    assert {path: path.stat().st_mtime_ns for path in written} == written
    assert again.scores[0].accuracy["3"] == first.scores[0].accuracy["3"]


def test_an_interrupted_evaluation_makes_only_what_is_missing(
    run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moco_scale.features._CHUNK", 10)
    whole = scored(run)
    kept = sorted(Path(run, FOLDER).rglob("*.parquet"))
    for path in kept[::3]:
        path.unlink()

    again = scored(run)

    assert sorted(Path(run, FOLDER).rglob("*.parquet")) == kept
    assert dataclasses.replace(again, checkpoint="") == dataclasses.replace(whole, checkpoint="")


def test_an_evaluation_leaves_the_encoder_and_its_features_bit_identical(run: str) -> None:
    first = scored(run, probe="paper", probe_epochs=2, probe_batch_size=16)
    kept = sorted(Path(run, FOLDER).rglob("*.parquet"))
    before = digests(Path(run), kept)
    for path in kept:
        path.unlink()

    again = scored(run, probe="paper", probe_epochs=2, probe_batch_size=16)

    assert digests(Path(run), kept) == before
    assert again.tasks[0] == first.tasks[0]
    assert list(first.tasks[0].scores[0].accuracy) == ["lr 30", "lr 10", "lr 3", "lr 1", "lr 0.3"]


def test_a_probe_that_was_interrupted_ends_as_one_that_was_not(
    run: str, tmp_path: Path, shards: str
) -> None:
    other = make_run(tmp_path / "other", shards)
    settings: dict[str, Any] = {
        "probe": "paper",
        "probe_epochs": 4,
        "probe_batch_size": 16,
        "seeds": (0,),
    }
    whole = scored(run, **settings)

    class Stop(Exception):
        pass

    def stop(what: str, done: int, _: int) -> None:
        if what.startswith("linear probe") and done == 2:
            raise Stop

    config = dataclasses.replace(QUICK, **settings)
    with pytest.raises(Stop):
        evaluate(other, config, ranks=one_rank(), show=stop)
    again = scored(other, **settings)

    assert again.tasks[0] == whole.tasks[0]


def on_a_rank(ranks: Ranks, url: str) -> Evaluation | None:
    torch.set_num_threads(1)
    features._CHUNK = 10  # so that both have some
    return evaluate(url, QUICK, ranks=ranks)


def test_two_ranks_divide_the_images_and_say_what_one_says(
    run: str, tmp_path: Path, shards: str
) -> None:
    other = make_run(tmp_path / "other", shards)
    whole = scored(run)

    first, second = run_distributed(on_a_rank, 2, other)

    assert second is None
    assert first.scores == whole.scores
    assert first.tasks == whole.tasks


def test_one_set_is_learnt_from_and_another_tested(run: str, tmp_path: Path) -> None:
    on = make_folders(tmp_path / "on", each=8, seed=1)
    test_on = make_folders(tmp_path / "test", each=5, seed=77)
    (test_on / "violet").mkdir()
    (test_on / "violet" / "a.png").write_bytes(coloured((150, 0, 200), seed=1))

    found = scored(run, on=str(on), test_on=str(test_on), probe="lbfgs")

    assert (found.num_learnt_from, found.num_images, found.num_unlabelled) == (24, 15, 1)
    assert [task.num_tested for task in found.tasks] == [15, 15, 15]
    colours = next(score for score in found.scores if score.features == "colours")
    assert colours.accuracy["3"] > 0.8
    rows = pq.read_table(Path(run, SAMPLES_FILE))
    assert rows.column("trained_is_right").null_count == 24


def test_retrieval_by_name_finds_the_same_picture_in_the_other_set(
    run: str, tmp_path: Path
) -> None:
    wrong = dict(zip(COLOURS, [*list(COLOURS)[1:], "blue"], strict=True))
    for number, (name, colour) in enumerate(COLOURS.items()):
        # In the test set the pictures of a colour lie in another's folder.
        for place, size in ((f"on/{name}", (48, 40)), (f"test/{wrong[name]}", (47, 41))):
            (tmp_path / place).mkdir(parents=True)
            for one in range(4):
                data = coloured(colour, seed=100 * number + one, size=size)
                (tmp_path / place / f"{name}{one}.png").write_bytes(data)
    sets = {"on": str(tmp_path / "on"), "test_on": str(tmp_path / "test")}

    for match, recall in (("name", 1.0), ("label", 0.0)):
        found = scored(run, match=match, **sets)

        (retrieval,) = (task for task in found.tasks if task.name == "retrieval")
        pixels = next(score for score in retrieval.scores if score.features == "pixels")
        assert pixels.accuracy["R@1"] == recall
        assert pixels.accuracy["R@1"] <= pixels.accuracy["R@5"] <= pixels.accuracy["R@10"]


@pytest.mark.parametrize("ending", [".csv", ".parquet"])
def test_a_list_of_images_and_labels(run: str, folders: Path, tmp_path: Path, ending: str) -> None:
    paths = sorted(folders.rglob("*.png"))
    labels = ["warm" if path.parent.name == "red" else "cold" for path in paths]
    where = tmp_path / f"list{ending}"
    assert is_list(str(where))
    table = pa.table({"uri": [str(path) for path in paths], "label": labels})
    if ending == ".csv":
        lines = [f"{row['uri']},{row['label']}" for row in table.to_pylist()]
        where.write_text("\n".join(["uri,label", *lines, "/nowhere/at all.png,warm"]))
    else:
        pq.write_table(table, where)

    found = scored(run, on=str(where))

    assert found.classes == {"cold": 2 * EACH, "warm": EACH}


def test_labels_are_joined_on_a_shard_set_from_csv_or_parquet(shards: str, tmp_path: Path) -> None:
    table = pa.table(
        {"uri": ["red/red 00.png", "blue/blue 00.png", "gone.png"], "label": [1, 2, 1]}
    )
    pq.write_table(table, tmp_path / "labels.parquet")
    (tmp_path / "labels.csv").write_text(
        "uri,label\nred/red 00.png,1\nblue/blue 00.png,2\ngone.png,1\n"
    )

    for name in ("labels.parquet", "labels.csv"):
        found = join_labels(ShardSet.open(shards), str(tmp_path / name))

        assert found.classes == ("1", "2")
        assert (len(found.labels), found.num_unused, found.num_unlabelled) == (2, 1, 3 * EACH - 2)


def test_an_image_that_cannot_be_decoded_is_left_out(run: str, tmp_path: Path) -> None:
    raw = make_folders(tmp_path / "raw", each=6)
    url = str(tmp_path / "set")
    pack(str(raw), url, PackConfig(workers=1))
    from tests.support.shard_sets import overwrite, undecodable  # needs the packed set

    damaged = overwrite(
        ShardSet.open(url), 4, undecodable(ShardSet.open(url), 4), fix_checksum=True
    )

    found = scored(run, on=damaged.url)

    assert found.num_images == 17


def test_the_command_prints_its_tables_and_leaves_json_and_page(
    run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.html"

    code = main(
        ["evaluate", f"{run}/{checkpoint_path(3)}", "--k", "3", "--seeds", "0", "1", "--draws", "2",
         "--bootstrap", "20", "--html", str(page)]
    )  # fmt: skip

    said = capsys.readouterr().out
    assert code == 0
    for shown in (
        "trained",
        "random",
        FRESH,
        "HOG",
        "linear probe",
        "few shots",
        "retrieval",
        "majority",
    ):
        assert shown in said
    assert read_evaluation(open_store(run)) is not None
    html = page.read_text()
    assert html == Path(run, PAGE_FILE).read_text()
    assert "data:image/jpeg" in html
    assert "Confusions" in html
    for address in ("http://", "https://"):
        assert address not in html


def one_line(arguments: Sequence[str], capsys: pytest.CaptureFixture[str], *, code: int = 1) -> str:
    logging.getLogger().handlers.clear()
    found = main(["evaluate", *arguments, "--num-threads", "1"])
    said = capsys.readouterr().err.strip()
    assert found == code, said
    assert len(said.splitlines()) == 1, said
    assert said.startswith("moco-scale evaluate: error: ")
    return said


def test_labels_for_images_that_are_not_there(
    run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "labels.csv").write_text("uri,label\nx/1.png,a\nx/2.png,b\n")

    said = one_line([run, "--labels", str(tmp_path / "labels.csv")], capsys)
    nowhere = one_line([run, "--labels", str(tmp_path / "no.csv")], capsys)
    empty_list = tmp_path / "empty.csv"
    empty_list.write_text("uri,label\n")
    empty = one_line([run, "--labels", str(empty_list)], capsys)
    as_data = one_line([run, "--on", str(tmp_path / "labels.csv")], capsys)

    assert "none of the 2 labels" in said
    assert "x/1.png" in said
    assert "no.csv" in nowhere
    assert "holds no label" in empty
    assert "labels.csv" in as_data or "x/1.png" in as_data


def test_one_class(run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "raw" / "red"
    folder.mkdir(parents=True)
    for number in range(4):
        (folder / f"{number}.png").write_bytes(coloured(COLOURS["red"], seed=number))

    said = one_line([run, "--on", str(tmp_path / "raw")], capsys)

    assert "all 4 labels are 'red'" in said
    assert "two classes" in said


def test_features_that_are_not_finite(
    tmp_path: Path, shards: str, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = build_encoder(
        ModelConfig(backbone="resnet18", dim=8, bn_sub_batch=4), seed=0
    ).state_dict()
    weights["layer4.1.bn2.weight"] = torch.full_like(weights["layer4.1.bn2.weight"], 3e38)
    run = make_run(tmp_path / "run", shards, weights=weights)

    said = one_line([run], capsys)

    assert "trained features of 42 of 42 images are not finite" in said
    assert ".png" in said


def test_images_of_many_resolutions_are_one_size(run: str, tmp_path: Path) -> None:
    for number, side in enumerate((1, 7, 33, 500)):
        for name, colour in COLOURS.items():
            (tmp_path / "raw" / name).mkdir(parents=True, exist_ok=True)
            data = coloured(colour, seed=number, size=(side, 2 * side + number))
            (tmp_path / "raw" / name / f"{side}.png").write_bytes(data)

    found = scored(run, on=str(tmp_path / "raw"))

    assert found.num_images == 12


def test_an_empty_set(
    run: str, shards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "nothing").mkdir()
    emptied = str(tmp_path / "emptied")
    pack(shards.removesuffix("shards") + "images", emptied, PackConfig(workers=1))
    takedown(emptied, ShardSet.open(emptied).table(columns=["uri"]).column("uri").to_pylist())

    folder = one_line([run, "--on", str(tmp_path / "nothing")], capsys)
    buried = one_line([run, "--on", emptied], capsys)

    assert str(tmp_path / "nothing") in folder
    assert "holds no image" in buried


def test_a_checkpoint_of_a_foreign_architecture(
    tmp_path: Path, shards: str, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = build_encoder(
        ModelConfig(backbone="resnet34", dim=8, bn_sub_batch=4), seed=0
    ).state_dict()
    other = make_run(tmp_path / "other", shards, weights=weights)
    torch.save({"arch": "resnet50", "state_dict": {}}, tmp_path / "published.pth")
    (tmp_path / "torn.pt").write_bytes(b"not a checkpoint")
    (tmp_path / "torn.pt.sha256").write_text("0  torn.pt\n")

    said = one_line([other], capsys)
    published = one_line([str(tmp_path / "published.pth")], capsys)
    torn = one_line([str(tmp_path / "torn.pt")], capsys)
    missing = one_line([str(tmp_path / "missing.pt")], capsys)
    no_run = one_line([str(tmp_path / "nowhere")], capsys)

    assert "another architecture than its model.backbone 'resnet18'" in said
    assert "layer1.2.conv1.weight" in said
    assert "moco-scale import" in published
    assert "torn" in torn
    assert "missing.pt" in missing
    assert "no run at" in no_run


def test_classes_that_the_sets_do_not_share(
    run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("cats", "dogs"):
        (tmp_path / "pets" / name).mkdir(parents=True)
        for number in range(3):
            data = coloured((90, 90, 90), seed=len(name) * 100 + number + ord(name[0]))
            (tmp_path / "pets" / name / f"{number}.png").write_bytes(data)

    said = one_line([run, "--test-on", str(tmp_path / "pets")], capsys)
    by_name = one_line([run, "--match", "name"], capsys)
    usage = one_line([run, "--k", "0"], capsys, code=2)

    assert "'cats'" in said
    assert "'blue'" in said
    assert "--test-on" in by_name
    assert "k must be at least 1" in usage


def test_user_errors_are_the_projects_own(run: str) -> None:
    with pytest.raises(UserError):
        scored(run, on="/nowhere/at/all")
