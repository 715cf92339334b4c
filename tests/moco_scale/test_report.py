"""The page about a run, and about several side by side; what users get wrong about it."""

import dataclasses
import html
import json
import logging
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import markupsafe
import numpy as np
import pytest
import torch

from moco_scale.checkpoint import checkpoint_path
from moco_scale.cli import main
from moco_scale.distributed import one_rank
from moco_scale.evaluate import EvaluateConfig, evaluate
from moco_scale.evaluation import EVALUATION_FILE, read_evaluation
from moco_scale.profiles import write_profile
from moco_scale.report import build_report
from moco_scale.report_plots import Curve, curves_plot
from shards import PackConfig, open_store, pack
from tests.support import browser
from tests.support.made_profile import HOSTILE, store_bound_profile
from tests.support.made_runs import add_metrics, coloured, make_folders, make_run

pytestmark = pytest.mark.timeout(240)

QUICK = EvaluateConfig(k=(3, 10), seeds=(0,), draws=1, bootstrap=50, num_threads=1)
MARKUP = "<script>document.title='caught'<"  # of folders and files: no slash


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs that were evaluated on the set they read, one of them profiled; one that was not."""
    torch.set_num_threads(1)  # it comes before what is set for each test
    folder = tmp_path_factory.mktemp("report")
    raw = make_folders(folder / "raw", each=8)
    (raw / MARKUP).mkdir()
    for number in range(4):
        (raw / MARKUP / f"{MARKUP}{number}.png").write_bytes(
            coloured((90, 90, 90), seed=7000 + number)
        )
    shards = str(folder / "shards")
    pack(str(raw), shards, PackConfig(workers=1))
    small = "shufflenet_v2_x0_5"
    first = make_run(folder / "first", shards, backbone=small)
    second = make_run(folder / "second", shards, backbone="shufflenet_v2_x1_0", seed=3)
    bare = make_run(folder / "bare", shards, backbone=small, queue=32, batch=8)
    for number, run in enumerate((first, second, bare)):
        add_metrics(run, rows=12 - number, samples_per_s=100.0 * (1 + number))
    for run in (first, second):
        assert evaluate(run, QUICK, ranks=one_rank()) is not None
    write_profile(store_bound_profile(hostname=HOSTILE), folder / "first/profile/profile.json")
    return folder


@pytest.fixture(scope="module")
def page(place: Path) -> str:
    return build_report([str(place / "first")])


@pytest.fixture(scope="module")
def beside(place: Path) -> str:
    return build_report([str(place / name) for name in ("first", "second", "bare")])


def text(page: str) -> str:
    """What is read: no markup, no drawings, one space between words."""
    drawn = re.sub(r"<(style|svg)\b.*?</\1>", " ", page, flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", drawn)).split())


def section(page: str, title: str) -> str:
    (found,) = re.findall(rf"<h2>{title}</h2>(.*?)</section>", page, flags=re.DOTALL)
    return str(found)


def test_the_page_of_a_run_has_data_training_throughput_evaluation_and_pictures(page: str) -> None:
    titles = re.findall("<h2>(.*?)</h2>", page)

    assert titles == [
        "Learning", "Embeddings and optimizer", "Throughput", "Evaluation", "Failures",
        "Nearest neighbours", "What the encoder sees", "Data", "All settings",
    ]  # fmt: skip
    speed = text(section(page, "Throughput"))
    assert "images/s, median 101" in speed
    assert "time in steps 19.2 s" in speed
    assert "held up by saving 40.0 ms" in speed
    assert "most memory of a rank 1.5 GiB" in speed
    assert "store bounds it at 5,920 samples/s: 3 of 3 repeats say so, spread 5 %" in speed
    assert "data.read_threads: 16 -> 32" in speed
    assert "the step by phase" in section(page, "Throughput")
    scores = text(section(page, "Evaluation"))
    for measure in ("Nearest neighbours (kNN)", "Linear probe", "Few shots", "Retrieval"):
        assert measure in scores
    for row in ("pixels", "colours", "HOG", "random", "random, BN as initialised", "trained"):
        assert re.search(rf"\b{row} [01]\.\d\d\d", scores), row
    assert "by the checkpoint of step 3 (the run has gone on to step 120)" in scores
    for pictures in ("Failures", "Nearest neighbours", "What the encoder sees"):
        assert section(page, pictures).count('src="data:image/jpeg') >= 8
    data = text(section(page, "Data"))
    assert "Listed 28 = packed 28 + rejected 0" in data
    assert "nothing was rejected" in data


def test_what_is_not_there_is_said(place: Path) -> None:
    page = build_report([str(place / "bare")])

    said = text(page)
    assert f"Not evaluated: run moco-scale evaluate {place / 'bare'} --on DATA" in said
    assert "Not profiled: moco-scale pretrain ... --run.profile-steps" in said
    assert "trained minus it" not in said


def test_pictures_of_a_set_that_is_gone_are_missing_with_the_reason(
    place: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(place / "first", run)
    saved = json.loads((run / EVALUATION_FILE).read_text())
    saved |= {"shards": str(tmp_path / "gone"), "test_shards": str(tmp_path / "gone")}
    (run / EVALUATION_FILE).write_text(json.dumps(saved))

    page = build_report([str(run)])

    said = text(section(page, " Pictures of the evaluation"))
    assert "There are none: " in said
    assert str(tmp_path / "gone") in said
    assert "Linear probe" in text(section(page, "Evaluation"))


def test_an_evaluation_is_read_as_it_was_made(place: Path) -> None:
    found = read_evaluation(open_store(str(place / "first")))

    made = evaluate(str(place / "first"), QUICK, ranks=one_rank())
    assert found is not None
    assert made is not None
    assert dataclasses.replace(found, settings={}) == dataclasses.replace(made, settings={})


# Several


def test_runs_lie_beside_each_other(beside: str) -> None:
    glance = text(section(beside, "At a glance"))
    assert "A first B second C bare" in glance
    assert "steps 120 110 100" in glance
    assert "images seen 1,920 1,760 800" in glance
    assert "images/s, median 101 202 303" in glance
    assert re.search(r"kNN accuracy, k = 3 0\.\d+ 0\.\d+ not evaluated", glance)
    assert "ranks 1 1 1" in text(section(beside, "Throughput"))
    assert "A first Profile of some steps store bounds it" in text(section(beside, "Throughput"))


def test_settings_that_differ_and_no_others_are_told(beside: str) -> None:
    rows = re.findall(r"<td>([\w.]+)</td>", section(beside, "What differs"))

    assert rows == [
        "data.global_batch_size", "model.backbone", "model.queue_size", "model.shuffle_domain",
        "run.seed",
    ]  # fmt: skip
    names = "shufflenet_v2_x0_5 shufflenet_v2_x1_0 shufflenet_v2_x0_5"
    assert f"model.backbone {names}" in text(section(beside, "What differs"))


def test_curves_of_all_runs_lie_over_one_another(place: Path, beside: str) -> None:
    for title in ("Learning", "Embeddings and optimizer", "Throughput"):
        for drawing in re.findall(r'<svg [^>]*aria-label="([^"]*)"', section(beside, title)):
            if not drawing.startswith("the step by phase"):
                assert all(name in drawing for name in ("A first", "B second", "C bare")), drawing
    # Runs of other batches are laid over one another by images.
    assert ">images seen</text>" in section(beside, "Learning")
    alike = build_report([str(place / "first"), str(place / "second")])
    assert ">step</text>" in section(alike, "Learning")
    assert ">images seen</text>" not in alike


def test_losses_among_other_numbers_of_keys_are_not_compared(place: Path, beside: str) -> None:
    said = text(section(beside, "Learning"))

    assert "The losses cannot be compared" in said
    assert "65 keys in A first, 65 keys in B second, 33 keys in C bare." in said
    alike = build_report([str(place / "first"), str(place / "second")])
    assert "cannot be compared" not in text(section(alike, "Learning"))


def test_evaluations_lie_beside_each_other_with_the_difference_over_the_same_images(
    place: Path, beside: str
) -> None:
    said = text(section(beside, "Evaluation"))

    assert "C bare is not evaluated: run moco-scale evaluate" in said
    for row in ("pixels", "random, BN as initialised", "trained"):
        assert re.search(rf"\b{row} [01]\.\d\d\d", said), row
    first, second = (read_evaluation(open_store(str(place / name))) for name in ("first", "second"))
    assert first is not None
    assert second is not None
    knn = [one.scores[-1].accuracy["3"] for one in (first, second)]
    assert f"trained {knn[0]:.3f} {knn[1]:.3f} " in said
    assert f"B second minus A first {knn[1] - knn[0]:+.3f} [" in said
    assert section(beside, "Nearest neighbours").count("A first") == len(first.neighbours)


def test_evaluations_on_other_images_are_not_compared(place: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(place / "second", other)
    images = make_folders(tmp_path / "images", each=3, seed=50)
    settings = dataclasses.replace(QUICK, on=str(images), probe="none", k=(2,))
    assert evaluate(str(other), settings, ranks=one_rank()) is not None

    said = text(section(build_report([str(place / "first"), str(other)]), "Evaluation"))

    assert "Not evaluated alike, so these figures cannot be compared across runs" in said
    assert "images 28 9" in said
    assert "k [3, 10] [2]" in said
    assert "minus A first" not in said


def test_a_long_run_has_a_small_page() -> None:
    noise = np.random.default_rng(0).normal(5, 1, 100_000).tolist()
    points = [(float(step), value) for step, value in enumerate(noise)]

    plot = curves_plot("loss", [Curve(name="long", points=points)], across="step")

    assert plot is not None
    assert len(plot) < 60_000
    assert curves_plot("loss", [], across="step") is None


# As a page


def test_pages_need_no_network_and_run_nothing(page: str, beside: str) -> None:
    for one in (page, beside):
        assert "<script" not in one
        assert not re.search(r'(?:src|href)="(?!data:|#)', one)
        assert not re.search(r"url\((?!#)|@import", one)
        ids = re.findall(r'<clipPath id="([^"]+)"', one)
        assert len(ids) == len(set(ids))
    assert str(markupsafe.escape(MARKUP)) in page


@pytest.mark.skipif(browser.CHROMIUM is None, reason="no Chromium here")
def test_pages_are_readable_in_a_browser_at_a_desk_and_on_a_phone(
    page: str, beside: str, tmp_path: Path
) -> None:
    seen, console = browser.look(
        [(one, width) for one in (page, beside) for width in (1280, 390)], tmp_path, timeout_s=90
    )

    assert console == []
    assert [one.title for one in seen[::2]] == [
        "MoCo on 28 images: shufflenet_v2_x0_5", "MoCo, 3 runs side by side",
    ]  # fmt: skip
    for one in seen:
        assert one.needed <= one.width
        assert one.smallest >= 9.0
        assert one.scripts == 0
        assert one.drawings == 12


# What is refused


def one_line(
    arguments: Sequence[str | Path], capsys: pytest.CaptureFixture[str], *, code: int = 1
) -> str:
    logging.getLogger().handlers.clear()
    found = main(["report", *map(str, arguments)])
    said = capsys.readouterr().err.strip()
    assert found == code, said
    assert len(said.splitlines()) == 1, said
    return said


def test_what_is_no_run(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = make_run(tmp_path / "empty", str(place / "shards"))
    first, out = place / "first", ("--out", tmp_path / "page.html")

    assert "no run at" in one_line([tmp_path / "nowhere"], capsys)
    assert "no run at" in one_line([place / "shards"], capsys)
    assert "is a checkpoint" in one_line([first / checkpoint_path(3)], capsys)
    assert "has no metrics yet" in one_line([empty], capsys)
    assert f"no run at {place / 'shards'}" in one_line([first, place / "shards", *out], capsys)
    assert not (tmp_path / "page.html").exists()


def test_a_command_that_says_too_little_or_too_much(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second, out = place / "first", place / "second", ("--out", tmp_path / "page.html")

    assert "give the URL of one" in one_line([], capsys, code=2)
    assert "give --out FILE" in one_line([first, second], capsys, code=2)
    assert "is given twice" in one_line([first, f"{first}/", *out], capsys)
    assert "give at most 6" in one_line([*[first] * 7, *out], capsys)


def test_a_damaged_file_in_a_run(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(place / "first", run)
    saved = (run / EVALUATION_FILE).read_text()

    for damaged in (saved[:50], "[]", saved.replace('"grid"', '"gird"')):
        (run / EVALUATION_FILE).write_text(damaged)
        assert "run 'moco-scale evaluate' again" in one_line([run], capsys)
    (run / EVALUATION_FILE).write_text(saved)
    (run / "profile/profile.json").write_text("{}")
    assert "is not a profile" in one_line([run], capsys)


def test_the_command_says_where_the_page_is(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [str(place / "first"), str(place / "second")]
    out = tmp_path / "a folder" / "page.html"

    assert main(["report", *runs, "--out", str(out)]) == 0
    assert main(["report", runs[0]]) == 0

    assert capsys.readouterr().out.splitlines() == [str(out), f"{runs[0]}/report.html"]
    assert "MoCo, 2 runs side by side" in out.read_text()
    assert "MoCo on 28 images" in Path(runs[0], "report.html").read_text()
    assert not Path(runs[1], "report.html").exists()
