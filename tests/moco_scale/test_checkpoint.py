"""Checkpoints: whole or passed over, the newest kept, other architectures refused."""

import dataclasses
import logging
import re
from contextlib import closing
from pathlib import Path

import pytest
import torch
import torchvision

from moco_scale.checkpoint import (
    Checkpoint,
    CheckpointWriter,
    changed_settings,
    check_fits,
    checkpoint_path,
    latest,
    load_checkpoint,
    load_weights,
    save_checkpoint,
    saved_steps,
)
from moco_scale.distributed import one_rank
from moco_scale.encoders import build_encoder, pooled_features
from moco_scale.errors import CheckpointError
from moco_scale.model import MoCo, ModelConfig
from shards.errors import AccessError
from shards.store import Store, open_store

SETTINGS = {
    "backbone": "resnet18",
    "stem": "imagenet",
    "mlp_head": True,
    "dim": 4,
    "dictionary": "queue",
    "queue_size": 8,
    "momentum": 0.9,
}
DATA = {"recipe": "moco_v2", "view_size": 224, "min_crop_area_frac": 0.2, "global_batch_size": 8}
CONFIG = {"model": SETTINGS, "data": DATA, "optim": {"lr": 0.03, "epochs": 5}}


def checkpoint(step: int) -> Checkpoint:
    return Checkpoint(
        url="",
        step=step,
        model={"encoder_q.fc.weight": torch.full((4, 3), float(step)), "queue": torch.ones(4, 8)},
        optimizer={"state": {0: {"momentum_buffer": torch.ones(3)}}, "param_groups": []},
        loader={"epoch": 1, "set_id": "abc"},
        config=CONFIG,
        best=None,
        versions={"torch": "2"},
        world_size=2,
    )


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "run"))


def test_what_was_saved_comes_back(store: Store) -> None:
    url = save_checkpoint(store, checkpoint(7), keep=3)

    for loaded in (latest(store), load_checkpoint(url)):
        assert loaded.url == url
        assert loaded.step == 7
        assert torch.equal(loaded.model["encoder_q.fc.weight"], torch.full((4, 3), 7.0))
        assert torch.equal(loaded.optimizer["state"][0]["momentum_buffer"], torch.ones(3))
        assert loaded.loader == {"epoch": 1, "set_id": "abc"}
        assert loaded.config == CONFIG
        assert loaded.world_size == 2


@pytest.mark.parametrize(("keep", "kept"), [(1, [4]), (2, [3, 4]), (9, [1, 2, 3, 4])])
def test_the_newest_are_kept(store: Store, keep: int, kept: list[int]) -> None:
    for step in (1, 2, 3, 4):
        save_checkpoint(store, checkpoint(step), keep=keep)

    names = {
        name for page in store.list("checkpoints/") for name in page.column("path").to_pylist()
    }
    assert saved_steps(store) == kept
    assert names == {f"{checkpoint_path(step)}{end}" for step in kept for end in ("", ".sha256")}


def cut_short(store: Store, path: str) -> None:
    store.put(path, bytes(store.read(path))[:-100])


def flip_a_bit(store: Store, path: str) -> None:
    data = bytearray(store.read(path))
    data[len(data) // 2] ^= 1
    store.put(path, bytes(data))


def lose_the_sum(store: Store, path: str) -> None:
    store.delete([f"{path}.sha256"])


def empty_the_sum(store: Store, path: str) -> None:
    store.put(f"{path}.sha256", b"")


@pytest.mark.parametrize("damage", [cut_short, flip_a_bit, lose_the_sum, empty_the_sum])
def test_a_torn_checkpoint_is_passed_over_with_a_warning(
    store: Store, damage, caplog: pytest.LogCaptureFixture
) -> None:
    save_checkpoint(store, checkpoint(1), keep=3)
    save_checkpoint(store, checkpoint(2), keep=3)
    damage(store, checkpoint_path(2))

    with caplog.at_level(logging.WARNING):
        found = latest(store)

    assert found.step == 1
    assert "step-000000002.pt" in caplog.text
    with pytest.raises(CheckpointError, match=r"step-000000002\.pt is (torn|unfinished)"):
        load_checkpoint(store.uri(checkpoint_path(2)))


def test_no_whole_checkpoint_is_an_error_and_so_is_none(store: Store, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has no checkpoint"):
        latest(store)
    with pytest.raises(CheckpointError, match="has no checkpoint"):
        latest(open_store(str(tmp_path / "not yet made")))
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        load_checkpoint(store.uri("checkpoints/step-000000003.pt"))

    save_checkpoint(store, checkpoint(2), keep=3)
    cut_short(store, checkpoint_path(2))
    with pytest.raises(CheckpointError, match="none of the 1 checkpoints"):
        latest(store)


def test_a_pickle_that_runs_code_is_not_loaded(store: Store) -> None:
    import hashlib  # only here: a hand-made checkpoint
    import io

    written = io.BytesIO()
    torch.save({"format": 2, "model": Path("/")}, written)
    data = written.getvalue()
    store.put(checkpoint_path(1), data)
    store.put(f"{checkpoint_path(1)}.sha256", hashlib.sha256(data).hexdigest().encode())

    with pytest.raises(CheckpointError, match="not a checkpoint of weights alone"):
        latest(store)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("backbone", "resnet34"),
        ("dim", 8),
        ("mlp_head", False),
        ("queue_size", 16),
        ("momentum", 0.5),
    ],
)
def test_another_architecture_or_recipe_is_refused_by_its_setting(name: str, value: object) -> None:
    saved = checkpoint(1)
    other = {**CONFIG, "model": {**SETTINGS, name: value}}

    with pytest.raises(
        CheckpointError, match=rf"model\.{name} .*{SETTINGS[name]}.*{value}"
    ) as said:
        check_fits(saved, model=saved.model, config=other)

    assert "\n" not in str(said.value)


def test_what_may_change_on_the_way_is_told() -> None:
    saved = checkpoint(1)
    now = {"model": SETTINGS, "data": {**DATA, "global_batch_size": 4}, "optim": {"lr": 0.06}}

    check_fits(saved, model=saved.model, config=now)

    assert changed_settings(saved, now) == [
        "optim.lr 0.03 -> 0.06",
        "data.global_batch_size 8 -> 4",
    ]


def test_other_tensors_are_refused_by_name() -> None:
    saved = dataclasses.replace(checkpoint(1), url="s3://run/checkpoints/step-000000001.pt")

    for model, word in (
        ({**saved.model, "encoder_q.fc.weight": torch.ones(4, 5)}, r"fc\.weight of shape \(4, 3\)"),
        ({**saved.model, "more": torch.ones(1)}, "no tensor more"),
        ({"queue": saved.model["queue"]}, r"encoder_q\.fc\.weight"),
    ):
        with pytest.raises(CheckpointError, match=word):
            check_fits(saved, model=model, config=CONFIG)


def test_a_writer_saves_what_was_there_though_training_goes_on(store: Store) -> None:
    saved = checkpoint(1)
    with closing(CheckpointWriter(store, keep=3)) as writer:
        writer.save(saved)
        saved.model["encoder_q.fc.weight"].fill_(99)
        saved.optimizer["state"][0]["momentum_buffer"].fill_(99)
        writer.wait()

    found = latest(store)

    assert torch.equal(found.model["encoder_q.fc.weight"], torch.full((4, 3), 1.0))
    assert torch.equal(found.optimizer["state"][0]["momentum_buffer"], torch.ones(3))


def test_what_a_writer_could_not_write_is_an_error_of_the_next_call() -> None:
    class Refusing:
        def put(self, path: str, *_: object) -> str:
            raise AccessError(f"{path}: access denied")

    with closing(CheckpointWriter(Refusing(), keep=3)) as writer:
        writer.save(checkpoint(1))
        with pytest.raises(AccessError, match=r"step-000000001\.pt: access denied"):
            writer.save(checkpoint(2))


def test_a_checkpoint_is_laid_out_as_the_published_ones(store: Store) -> None:
    url = save_checkpoint(store, checkpoint(7), keep=3)

    content = torch.load(url, map_location="cpu", weights_only=True)

    assert set(content["state_dict"]) == {"module.encoder_q.fc.weight", "module.queue"}
    assert (content["arch"], content["epoch"]) == ("resnet18", 1)
    assert load_weights(url)[0].keys() == checkpoint(7).model.keys()
    assert load_weights(url)[1] is False


def test_a_linear_probe_reads_the_query_encoder_into_a_plain_resnet(store: Store) -> None:
    model = saved_resnet50(store)

    # What linear-probe scripts for published checkpoints do: by this prefix, without the head.
    weights = torch.load(store_path(store), map_location="cpu")["state_dict"]
    prefix, head = "module.encoder_q.", "module.encoder_q.fc."
    body = {
        name.removeprefix(prefix): tensor
        for name, tensor in weights.items()
        if name.startswith(prefix) and not name.startswith(head)
    }
    probe = torchvision.models.resnet50().eval()
    missing, unexpected = probe.load_state_dict(body, strict=False)

    assert (set(missing), unexpected) == ({"fc.weight", "fc.bias"}, [])
    images = torch.randn(2, 3, 32, 32)
    probe.fc = torch.nn.Identity()
    with torch.no_grad():
        torch.testing.assert_close(probe(images), pooled_features(model.encoder_q, images))


def test_a_detector_reads_the_query_encoder_under_its_own_names(store: Store) -> None:
    saved_resnet50(store)

    # What scripts for detectron2 make of the names; those of its ResNet-50 are listed in part.
    weights = torch.load(store_path(store), map_location="cpu")["state_dict"]
    prefix = "module.encoder_q."
    names = set()
    for published in weights:
        if published.startswith(prefix):
            name = published.removeprefix(prefix)
            name = name if "layer" in name else f"stem.{name}"
            name = re.sub(r"layer(\d)", lambda found: f"res{int(found[1]) + 1}", name)
            name = re.sub(r"bn(\d)", r"conv\1.norm", name)
            names.add(
                name.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")
            )

    norm = ("weight", "bias", "running_mean", "running_var")
    blocks = [
        f"res{stage}.{n}" for stage, count in ((2, 3), (3, 4), (4, 6), (5, 3)) for n in range(count)
    ]
    convs = [f"{block}.conv{n}" for block in blocks for n in (1, 2, 3)]
    convs += ["stem.conv1", *(f"res{stage}.0.shortcut" for stage in (2, 3, 4, 5))]
    expected = {
        f"{conv}.{end}" for conv in convs for end in ("weight", *(f"norm.{n}" for n in norm))
    }
    assert expected <= names
    assert {name for name in names - expected if "num_batches" not in name} == {
        "stem.fc.0.weight",
        "stem.fc.0.bias",
        "stem.fc.2.weight",
        "stem.fc.2.bias",
    }


def saved_resnet50(store: Store) -> MoCo:
    config = ModelConfig(dim=8, queue_size=8, bn_sub_batch=2, shuffle_domain=4)
    encoder = build_encoder(config, seed=0)
    model = MoCo(encoder, config, seed=0, ranks=one_rank())
    save_checkpoint(store, dataclasses.replace(checkpoint(1), model=model.state_dict()), keep=1)
    return model


def store_path(store: Store) -> str:
    return f"{store.url}/{checkpoint_path(1)}"


def test_weights_of_a_published_checkpoint_are_read(tmp_path: Path) -> None:
    content = {
        "epoch": 200,
        "arch": "resnet50",
        "state_dict": {"module.encoder_q.a": torch.ones(1)},
    }
    torch.save(content, tmp_path / "moco.pth.tar")
    torch.save({"state_dict": {"fc.weight": torch.ones(1)}}, tmp_path / "other.pth.tar")
    (tmp_path / "page.pth.tar").write_text("<html>")

    weights, is_behind = load_weights(str(tmp_path / "moco.pth.tar"))

    assert list(weights) == ["encoder_q.a"]
    assert is_behind
    for name, said in (
        ("other.pth.tar", "no encoder_q"),
        ("page.pth.tar", "not a checkpoint"),
        ("none.pth.tar", "no checkpoint at"),
    ):
        with pytest.raises(CheckpointError, match=said):
            load_weights(str(tmp_path / name))


def test_the_best_is_kept_beside_the_newest(store: Store) -> None:
    for step, best in ((1, 1), (2, 2), (3, 2), (4, 2), (5, 2)):
        save_checkpoint(store, checkpoint(step), keep=2, best=best)

    assert saved_steps(store) == [2, 4, 5]
