"""A run or a checkpoint is opened in one place, with the same words for every command."""

import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moco_scale.checkpoint import checkpoint_path
from moco_scale.cli import main
from moco_scale.errors import CheckpointError
from moco_scale.trained import open_trained, trained_encoder
from shards import PackConfig, pack
from tests.support.embeddings import save_run
from tests.support.made_runs import make_folders, make_run

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    url = tmp_path_factory.mktemp("run") / "run"
    save_run(str(url), seed=1, step=5)
    save_run(str(url), seed=1, step=7)
    return url


def test_of_a_run_the_newest_is_opened_and_a_checkpoint_knows_its_run(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    older = checkpoint_path(5)
    for name in (older, f"{older}.sha256"):
        shutil.copy(run / name, tmp_path)

    newest = open_trained(str(run))
    one = open_trained(str(run / older))
    alone = open_trained(str(tmp_path / Path(older).name))
    monkeypatch.chdir(run)
    inside = open_trained(older)

    assert (newest.checkpoint.step, newest.run_url) == (7, str(run))
    assert (one.checkpoint.step, one.run_url) == (5, str(run))
    assert (alone.checkpoint.step, alone.run_url) == (5, "")
    assert (inside.checkpoint.step, inside.run_url) == (5, ".")
    encoder = trained_encoder(newest)
    assert not encoder.training
    weights = newest.checkpoint.model
    assert all(torch.equal(weights[f"encoder_q.{n}"], w) for n, w in encoder.state_dict().items())


def nothing(_: Path) -> str:
    return "no run at"


def settings_alone(place: Path) -> str:
    place.mkdir()
    (place / "config.json").write_text("{}")
    return "has no checkpoint yet"


def unfinished(place: Path) -> str:
    save_run(str(place), seed=1)
    (place / f"{checkpoint_path(7)}.sha256").unlink()
    return "none of the 1 checkpoints .* was written to the end; let 'moco-scale pretrain' go on"


def torn(place: Path) -> str:
    save_run(str(place), seed=1)
    (place / checkpoint_path(7)).write_bytes(b"half")
    return "none of the 1 checkpoints .* is whole"


def foreign(place: Path) -> str:
    def narrow(model: dict[str, torch.Tensor]) -> None:
        model["encoder_q.conv5.0.weight"] = torch.zeros(8, 192, 1, 1)

    save_run(str(place), seed=1, change=narrow)
    return r"another architecture .*: encoder_q.conv5.0.weight is of shape \(8, 192, 1, 1\) in it"


@pytest.mark.parametrize("make", [nothing, settings_alone, unfinished, torn, foreign])
def test_what_cannot_be_opened_is_said_alike(make: Callable[[Path], str], tmp_path: Path) -> None:
    place = tmp_path / "run"
    said = make(place)

    with pytest.raises(CheckpointError, match=said) as caught:
        trained_encoder(open_trained(str(place)))

    assert len(str(caught.value).splitlines()) == 1
    assert str(place) in str(caught.value)


def test_every_command_says_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards = str(tmp_path / "shards")
    pack(str(make_folders(tmp_path / "raw", each=2)), shards, PackConfig(workers=1))
    weights = {"conv1.weight": torch.zeros(1)}
    other = make_run(tmp_path / "other", shards, weights=weights)
    torch.save({"state_dict": {}}, tmp_path / "published.pth.tar")
    to = str(tmp_path / "to")

    for subject in (str(tmp_path / "nowhere"), str(tmp_path / "published.pth.tar"), other):
        said = {}
        for command in (
            ["evaluate", subject, "--on", shards],
            ["export", subject, "--format", "safetensors", "--to", to],
            ["embed", shards, "--run", subject, "--to", to],
        ):
            logging.getLogger().handlers.clear()
            assert main(command) == 1
            (line,) = capsys.readouterr().err.splitlines()
            said[command[0]] = line.removeprefix(f"moco-scale {command[0]}: error: ")

        assert len(set(said.values())) == 1, said
