"""What a run tells Prometheus: read over HTTP, as Prometheus does."""

import math
import time
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from moco_scale.cli import main
from moco_scale.distributed import Ranks, one_rank
from moco_scale.errors import ConfigError
from moco_scale.exporter import Exporter, open_exporter
from moco_scale.metrics import StepMetrics, read_metrics
from tests.moco_scale.test_metrics import row
from tests.moco_scale.test_trainer import build
from tests.support.command import TINY, pretrain_arguments
from tests.support.distributed import run_distributed
from tests.support.ports import two_free_ports

LOOPBACK = "127.0.0.1"


@pytest.fixture
def exporter() -> Iterator[Exporter]:
    with closing(Exporter(one_rank(), address=LOOPBACK, port=0)) as opened:
        yield opened


def ignore(_: StepMetrics) -> None:
    """For rows that nobody is to see."""


def scraped(exporter: Exporter) -> dict[str, float]:
    """Values by name, and by its labels without the rank where there are others."""
    url = f"http://{LOOPBACK}:{exporter.port}/metrics"
    with urllib.request.urlopen(url, timeout=10) as answer:
        page = answer.read().decode()
    values = {}
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            labels = [value for name, value in sample.labels.items() if name != "rank"]
            name = sample.name.removeprefix("moco_scale_")
            values[name if name == "build_info" else " ".join([name, *labels])] = sample.value
    return values


def test_a_run_tells_what_its_newest_row_says_and_what_it_has_counted(
    exporter: Exporter, tmp_path: Path
) -> None:
    url = str(tmp_path / "run")
    trainer = build(url, progress=exporter.hearing(ignore), saved=exporter.saved)
    exporter.watch(trainer)
    before = scraped(exporter)
    trainer.run()

    found = scraped(exporter)

    newest = read_metrics(url)[-1]
    assert before["step"] == 0
    assert "loss" not in before
    assert found["step"] == found["last_step"] == 12
    assert found["images_total"] == 12 * 16
    assert found["loss"] == newest.loss
    assert found["learning_rate"] == newest.lr
    assert found["queue_filled_ratio"] == 1
    assert found["queue_age_steps"] == newest.queue_age_steps == 2.5
    assert found["guessing_loss"] == pytest.approx(math.log(41))
    assert found["ranks"] == found["build_info"] == 1
    assert found["store_requests_total run"] == trainer.store.stats().requests > 0
    assert found["process_start_time_seconds"] <= time.time()


def test_the_time_of_a_checkpoint_is_that_at_which_it_was_whole(
    exporter: Exporter, tmp_path: Path
) -> None:
    times = []

    def saved(url: str) -> None:
        exporter.saved(url)
        times.append(scraped(exporter)["last_checkpoint_timestamp_seconds"])

    trainer = build(str(tmp_path / "run"), saved=saved)
    exporter.watch(trainer)
    began = scraped(exporter)["last_checkpoint_timestamp_seconds"]
    trainer.run()

    assert len(times) == 3  # after 5, 10 and 12 steps
    assert began < times[0] < times[1] < times[2] <= time.time()


def test_steps_that_are_not_finite_are_counted_and_their_loss_is_not_a_number(
    exporter: Exporter, tmp_path: Path
) -> None:
    heard = exporter.hearing(ignore)
    exporter.watch(build(str(tmp_path / "run")))

    heard(replace(row(1), knn_accuracy=0.5))
    heard(replace(row(2), loss=None, grad_norm=None, alignment=None, skipped_steps=2))
    found = scraped(exporter)

    assert math.isnan(found["loss"])
    assert math.isnan(found["gradient_norm"])
    assert found["skipped_steps_total"] == 2
    assert found["checkpoint_stall_seconds_total"] == pytest.approx(0.006)
    assert found["knn_accuracy_ratio"] == 0.5  # of the newest row that has one
    assert found["alignment"] == 0.5


def test_bad_samples_are_counted(exporter: Exporter, tmp_path: Path) -> None:
    trainer = build(str(tmp_path / "run"), num_replaced=1, max_bad_frac=1)
    exporter.watch(trainer)
    trainer.run()

    assert scraped(exporter)["quarantined_samples_total"] == 12


def test_only_rank_0_tells_what_is_the_same_for_all(tmp_path: Path) -> None:
    ranks = replace(one_rank(), rank=1)
    with closing(Exporter(ranks, address=LOOPBACK, port=0)) as exporter:
        exporter.watch(build(str(tmp_path / "run")))
        exporter.hearing(ignore)
        found = scraped(exporter)

    assert found["step"] == found["images_total"] == 0
    assert not found.keys() & {"ranks", "loss", "last_checkpoint_timestamp_seconds"}


def test_a_closed_exporter_leaves_its_port() -> None:
    first = Exporter(one_rank(), address=LOOPBACK, port=0)
    port = first.port
    scraped(first)
    first.close()

    with closing(open_exporter(one_rank(), address=LOOPBACK, port=port)) as second:
        assert scraped(second)["build_info"] == 1


def refusal(ranks: Ranks, port: int) -> str:
    with pytest.raises(ConfigError) as caught:
        open_exporter(ranks, address=LOOPBACK, port=port)
    return str(caught.value)


@pytest.mark.timeout(120)
def test_all_ranks_name_the_one_that_cannot_listen() -> None:
    first, second = two_free_ports()
    with closing(Exporter(one_rank(), address=LOOPBACK, port=second)):
        said = run_distributed(refusal, 2, first)

    assert said[0] == said[1]
    assert f"rank 1 cannot listen at 127.0.0.1:{second} (Address already in use)" in said[0]


def test_a_port_in_use_is_one_line_and_nothing_is_written(
    exporter: Exporter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    preset, run = tmp_path / "tiny.toml", tmp_path / "run"
    preset.write_text(TINY)
    endpoint = ("--run.metrics-address", LOOPBACK, "--run.metrics-port", str(exporter.port))
    synthetic = ("--data.mode", "synthetic")

    code = main([*pretrain_arguments(preset, "", str(run), *synthetic, *endpoint)])

    (line,) = capsys.readouterr().err.splitlines()
    assert code == 1
    assert line.startswith(
        f"moco-scale pretrain: error: run.metrics_port: rank 0 cannot listen at "
        f"127.0.0.1:{exporter.port} (Address already in use); give another port"
    )
    assert not run.exists()
