"""Exports: each loads in its library as its card says, and gives the same features."""

import argparse
import ast
import contextlib
import dataclasses
import hashlib
import json
import os
import pickle
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import safetensors.torch
import timm
import torch
import torchvision
import yaml
from PIL import Image
from torch import Tensor, nn

from demo.local_s3 import LocalS3
from moco_scale.card_code import detectron2_settings
from moco_scale.checkpoint import Checkpoint, latest, load_weights, save_checkpoint
from moco_scale.cli import main
from moco_scale.config import CONFIG_FILE, TrainConfig, to_mapping
from moco_scale.distributed import one_rank
from moco_scale.encoders import build_encoder, pooled_features
from moco_scale.export import put_all
from moco_scale.export_formats import detectron2_name
from moco_scale.metrics import read_metrics
from moco_scale.model import MoCo, ModelConfig
from moco_scale.settings import from_mapping
from moco_scale.trainer import RunConfig
from pipelines.config import DataConfig
from shards import ShardSet
from shards.errors import StoreError
from shards.folder import FolderStore
from shards.store import open_store
from tests.support.command import TINY, moco_scale
from tests.support.digests import digests
from tests.support.made_sets import uris
from tests.support.shard_sets import make_shard_set

ROOT = Path(__file__).parent.parent.parent
STEP = 12
POSITION = 200
EVALUATION = {
    "checkpoint": "",
    "step": STEP,
    "shards": "s3://labelled/set",
    "num_images": 300,
    "scores": [
        {"features": "random", "accuracy": {"10": 0.25, "200": 0.2}, "gain_of_trained": {}},
        {"features": "trained", "accuracy": {"10": 0.75, "200": 0.5}, "gain_of_trained": {}},
    ],
}


def make_run(
    folder: Path, backbone: str, *, step: int = STEP, view_size: int = 64, **model: Any
) -> Path:
    """A run with one checkpoint, whose weights and BN statistics nobody would begin with."""
    small: dict[str, Any] = {"dim": 8, "queue_size": 32, "bn_sub_batch": 2, "shuffle_domain": 4}
    config = TrainConfig(
        data=DataConfig(
            shards=("s3://photos/set",), global_batch_size=16, recipe="v2", view_size=view_size
        ),
        model=ModelConfig(backbone=backbone, **(small | model)),
        run=RunConfig(url=str(folder)),
    )
    moco = MoCo(build_encoder(config.model, seed=1), config.model, seed=1, ranks=one_rank())
    draw = torch.Generator().manual_seed(2)
    for name, buffer in moco.named_buffers():
        drawn = torch.rand(buffer.shape, generator=draw)
        if name.endswith("running_mean"):
            buffer.copy_(0.2 * (drawn - 0.5))
        elif name.endswith("running_var"):
            buffer.copy_(drawn + 0.5)
    # As a run on channels_last leaves them.
    weights = {
        name: tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor
        for name, tensor in moco.state_dict().items()
    }
    checkpoint = Checkpoint(
        url="",
        step=step,
        model=weights,
        optimizer={"state": {}, "param_groups": []},
        loader={
            "position": POSITION,
            "epoch": 3,
            "sets": [{"set_id": "0123456789abcdef0123", "version": 4}],
        },
        config=to_mapping(config),
        best=None,
        versions={"moco-scale": "0.1.0", "torch": "2"},
        world_size=2,
    )
    store = open_store(str(folder))
    save_checkpoint(store, checkpoint, keep=3)
    store.put(CONFIG_FILE, json.dumps(to_mapping(config)).encode())
    return folder


@pytest.fixture(scope="module")
def resnet_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("resnet") / "run", "resnet18")


@pytest.fixture(scope="module")
def resnet50_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("resnet50") / "run", "resnet50")


@pytest.fixture(scope="module")
def vit_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("vit") / "run", "timm/test_vit", view_size=160)


def encoder_of(run: Path) -> nn.Module:
    checkpoint = latest(open_store(str(run)))
    config = from_mapping(TrainConfig, checkpoint.config)
    encoder = build_encoder(config.model, seed=0)
    prefix = "encoder_q."
    encoder.load_state_dict(
        {
            name.removeprefix(prefix): tensor
            for name, tensor in checkpoint.model.items()
            if name.startswith(prefix)
        }
    )
    return encoder.eval()


def pretrain(*flags: str) -> int:
    """On one core: a run takes as many threads as it has, and would wait for other programs'."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        return main(["pretrain", *flags])
    finally:
        os.sched_setaffinity(0, cores)


def export(run: Path, format: str, to: Path, *more: str) -> Path:
    """The folder that was written."""
    assert main(["export", str(run), "--format", format, "--to", str(to), *more]) == 0
    return to


def card_of(folder: Path) -> dict[str, Any]:
    card: dict[str, Any] = json.loads((folder / "card.json").read_text())
    return card


def file_of(folder: Path) -> Path:
    return folder / card_of(folder)["export"]["file"]


def assert_same_features(
    model: nn.Module, run: Path, *, size: int = 64, tolerance: float = 1e-6
) -> None:
    """Within `tolerance` of the largest feature."""
    images = torch.randn(3, 3, size, size)
    with torch.no_grad():
        expected = pooled_features(encoder_of(run), images)
        found = model.eval()(images)
    assert found.shape == expected.shape
    assert expected.abs().max() > 0
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


# --- each format in its library ---------------------------------------------------------------


def test_torchvision_loads_all_but_the_head(resnet_run: Path, tmp_path: Path) -> None:
    folder = export(resnet_run, "torchvision", tmp_path / "out")
    weights = torch.load(folder / "resnet18.pth", weights_only=True)

    model = torchvision.models.resnet18()
    missing, unexpected = model.load_state_dict(weights, strict=False)
    model.fc = nn.Identity()
    model.load_state_dict(weights, strict=True)

    assert (missing, unexpected) == (["fc.weight", "fc.bias"], [])
    assert_same_features(model, resnet_run)


@pytest.mark.parametrize(
    ("backbone", "head", "stem"),
    [("mobilenet_v3_small", "classifier.3", "imagenet"), ("resnet18", "fc", "cifar")],
)
def test_torchvision_loads_other_backbones(
    backbone: str, head: str, stem: str, tmp_path: Path
) -> None:
    run = make_run(tmp_path / "run", backbone, stem=stem)
    folder = export(run, "torchvision", tmp_path / "out")

    model = torchvision.models.get_model(backbone)
    model.set_submodule(head, nn.Identity())
    if stem == "cifar":
        model.conv1 = nn.Conv2d(3, 64, 3, stride=1, padding=1, bias=False)
        model.maxpool = nn.Identity()
    model.load_state_dict(torch.load(file_of(folder), weights_only=True), strict=True)

    assert_same_features(model, run)
    assert_snippets_work(folder, run)


def test_timm_loads_a_resnet_of_torchvision(resnet_run: Path, tmp_path: Path) -> None:
    folder = export(resnet_run, "timm", tmp_path / "out")
    path = str(folder / "resnet18.safetensors")

    model = timm.create_model("resnet18", num_classes=0, checkpoint_path=path)
    again = timm.create_model("resnet18", num_classes=0)
    again.load_state_dict(safetensors.torch.load_file(path), strict=True)

    assert_same_features(model, resnet_run)
    assert_same_features(again, resnet_run)


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "test_efficientnet", "test_convnext"])
def test_timm_loads_its_own(name: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", f"timm/{name}", view_size=160)
    folder = export(run, "timm", tmp_path / "out")

    model = timm.create_model(name, num_classes=0, checkpoint_path=str(file_of(folder)))

    assert_same_features(model, run, size=160)


def test_a_resnet_of_timm_goes_to_torchvision_too(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "timm/resnet18")
    folder = export(run, "official", tmp_path / "out")
    assert_snippets_work(folder, run)
    assert_snippets_work(export(run, "torchvision", tmp_path / "tv"), run)


def test_safetensors_has_the_names_of_the_library(vit_run: Path, tmp_path: Path) -> None:
    folder = export(vit_run, "safetensors", tmp_path / "out")

    model = timm.create_model("test_vit", num_classes=0)
    model.load_state_dict(safetensors.torch.load_file(folder / "test_vit.safetensors"), strict=True)

    assert_same_features(model, vit_run, size=160)


@pytest.mark.parametrize("of", ["resnet", "vit"])
def test_onnx_runtime_takes_any_batch(
    of: str, resnet_run: Path, vit_run: Path, tmp_path: Path
) -> None:
    run, size = (resnet_run, 64) if of == "resnet" else (vit_run, 160)
    folder = export(run, "onnx", tmp_path / "out")
    assert_snippets_work(folder, run)
    data = file_of(folder).read_bytes()

    proto = onnx.load_from_string(data)
    onnx.checker.check_model(proto, full_check=True)
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])

    assert [(one.domain, one.version) for one in proto.opset_import] == [("", 18)]
    (taken,) = session.get_inputs()
    assert (taken.name, taken.shape) == ("images", ["batch", 3, size, size])
    for count in (1, 5):
        images = torch.randn(count, 3, size, size)
        (found,) = session.run(["features"], {"images": images.numpy()})
        expected = pooled_features(encoder_of(run), images).detach().numpy()
        assert found.shape == expected.shape
        assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()
    # The exporter notes for each node the file and the line that it comes from.
    assert b".py" not in data


def test_official_loads_as_the_published_linear_probe_does(
    resnet50_run: Path, tmp_path: Path
) -> None:
    folder = export(resnet50_run, "official", tmp_path / "out")
    content = torch.load(folder / "resnet50.pth.tar", map_location="cpu", weights_only=True)

    # main_lincls.py: keep encoder_q up to the head, without its prefix; strict=False.
    state_dict = content["state_dict"]
    for k in list(state_dict.keys()):
        if k.startswith("module.encoder_q") and not k.startswith("module.encoder_q.fc"):
            state_dict[k[len("module.encoder_q.") :]] = state_dict[k]
        del state_dict[k]
    model = torchvision.models.__dict__[content["arch"]]()
    missing, unexpected = model.load_state_dict(state_dict, strict=False)
    model.fc = nn.Identity()
    model.load_state_dict(state_dict, strict=True)

    assert content["epoch"] == 3
    assert (set(missing), unexpected) == ({"fc.weight", "fc.bias"}, [])
    assert_same_features(model, resnet50_run)


def test_official_keeps_all_that_training_needs(resnet_run: Path, tmp_path: Path) -> None:
    folder = export(resnet_run, "official", tmp_path / "out")
    saved = latest(open_store(str(resnet_run))).model

    weights, is_behind = load_weights(str(file_of(folder)))

    assert not is_behind
    assert weights.keys() == saved.keys()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in weights.items())


def test_detectron2_has_the_names_of_its_resnets(resnet50_run: Path, tmp_path: Path) -> None:
    folder = export(resnet50_run, "detectron2", tmp_path / "out")
    assert blocks(folder, "yaml") == [
        "\n".join(detectron2_settings("resnet50", "resnet50.pkl")) + "\n"
    ]
    data = (folder / "resnet50.pkl").read_bytes()
    content = pickle.loads(data)

    assert (content["__author__"], content["matching_heuristics"]) == ("moco-scale", True)
    assert {type(array) for array in content["model"].values()} == {np.ndarray}
    assert set(content["model"]) == detectron2_resnet50()
    # The name of this module changed in numpy 2, and detectron2 is mostly used with numpy 1.
    assert b"numpy._core" not in data
    assert b"numpy.core.multiarray\n_reconstruct" in data


def test_detectron2_has_the_weights_where_the_published_converter_puts_them(
    resnet_run: Path, tmp_path: Path
) -> None:
    official = file_of(export(resnet_run, "official", tmp_path / "official"))
    content = pickle.loads(file_of(export(resnet_run, "detectron2", tmp_path / "d2")).read_bytes())

    # convert-pretrain-to-detectron2.py
    expected = {}
    for name, tensor in torch.load(official, weights_only=True)["state_dict"].items():
        if name.startswith("module.encoder_q.") and ".fc." not in name:
            k = name.replace("module.encoder_q.", "")
            if "layer" not in k:
                k = "stem." + k
            for t in [1, 2, 3, 4]:
                k = k.replace(f"layer{t}", f"res{t + 1}")
            for t in [1, 2, 3]:
                k = k.replace(f"bn{t}", f"conv{t}.norm")
            k = k.replace("downsample.0", "shortcut")
            k = k.replace("downsample.1", "shortcut.norm")
            expected[k] = tensor.numpy()

    assert content["model"].keys() == expected.keys()
    for name, array in expected.items():
        assert np.array_equal(content["model"][name], array), name


def test_detectron2_itself_loads_it(resnet50_run: Path, tmp_path: Path) -> None:
    pytest.importorskip("detectron2")
    from detectron2.checkpoint.c2_model_loading import align_and_update_state_dicts
    from detectron2.config import get_cfg
    from detectron2.layers import ShapeSpec
    from detectron2.modeling.backbone import build_resnet_backbone

    folder = export(resnet50_run, "detectron2", tmp_path / "out")
    cfg = get_cfg()
    (tmp_path / "d2.yaml").write_text(blocks(folder, "yaml")[0])
    cfg.merge_from_file(str(tmp_path / "d2.yaml"))
    cfg.MODEL.RESNETS.NORM = "BN"  # SyncBN's kernels are for GPUs
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res5"]
    backbone = build_resnet_backbone(cfg, ShapeSpec(channels=3))
    content = pickle.loads(file_of(folder).read_bytes())["model"]
    tensors = {name: torch.from_numpy(np.asarray(array)) for name, array in content.items()}
    aligned = align_and_update_state_dicts(backbone.state_dict(), tensors, c2_conversion=False)
    backbone.load_state_dict(aligned, strict=True)

    class Pooled(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            pooled: Tensor = backbone(images)["res5"].mean(dim=(2, 3))
            return pooled

    backbone.eval()
    assert_same_features(Pooled(), resnet50_run, tolerance=1e-5)


def detectron2_resnet50() -> set[str]:
    """Names in detectron2's own ResNet-50 with trained BN, as `state_dict` gives them."""
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    stages = ((2, 3), (3, 4), (4, 6), (5, 3))
    convs = [f"res{s}.{n}.conv{c}" for s, count in stages for n in range(count) for c in (1, 2, 3)]
    convs += ["stem.conv1", *(f"res{s}.0.shortcut" for s, _ in stages)]
    return {f"{conv}.{end}" for conv in convs for end in ("weight", *(f"norm.{n}" for n in norm))}


def test_names_of_detectron2() -> None:
    assert detectron2_name("conv1.weight") == "stem.conv1.weight"
    assert detectron2_name("bn1.running_var") == "stem.conv1.norm.running_var"
    assert detectron2_name("layer4.2.bn3.bias") == "res5.2.conv3.norm.bias"
    assert detectron2_name("layer1.0.downsample.1.weight") == "res2.0.shortcut.norm.weight"


# --- the card ---------------------------------------------------------------------------------


def blocks(folder: Path, language: str) -> list[str]:
    text = (folder / "README.md").read_text()
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.S | re.M)


def assert_snippets_work(folder: Path, run: Path) -> None:
    """The card's Python, as it stands, gives the run's features of a photo beside it."""
    noise = np.random.default_rng(0).integers(0, 255, (80, 120, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "photo.jpg")
    names: dict[str, Any] = {}
    with contextlib.chdir(folder):
        for block in blocks(folder, "python"):
            exec(block, names)
    images, features = names["images"], torch.as_tensor(names["features"]).detach()
    size = card_of(folder)["input"]["size"]
    expected = pooled_features(encoder_of(run), images).detach()
    assert images.shape == (1, 3, size, size)
    assert expected.abs().max() > 0
    assert (features - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("format", ["torchvision", "timm", "safetensors", "official"])
def test_the_lines_of_the_card_load_it(format: str, resnet_run: Path, tmp_path: Path) -> None:
    assert_snippets_work(export(resnet_run, format, tmp_path / "out"), resnet_run)


@pytest.mark.parametrize("format", ["timm", "safetensors"])
def test_the_lines_of_the_card_load_a_vit(format: str, vit_run: Path, tmp_path: Path) -> None:
    assert_snippets_work(export(vit_run, format, tmp_path / "out"), vit_run)


@pytest.mark.parametrize(
    ("backbone", "resnets"),
    [
        ("resnet50", {"DEPTH": 50}),
        ("resnet18", {"DEPTH": 18, "RES2_OUT_CHANNELS": 64}),
        ("resnext50_32x4d", {"DEPTH": 50, "NUM_GROUPS": 32, "WIDTH_PER_GROUP": 4}),
        ("wide_resnet50_2", {"DEPTH": 50, "WIDTH_PER_GROUP": 128}),
    ],
)
def test_the_card_has_the_settings_of_detectron2(backbone: str, resnets: dict[str, int]) -> None:
    settings = yaml.safe_load("\n".join(detectron2_settings(backbone, f"{backbone}.pkl")))

    # Base-RCNN-C4-BN.yaml and the *_moco.yaml of the published code
    assert settings == {
        "MODEL": {
            "WEIGHTS": f"{backbone}.pkl",
            "PIXEL_MEAN": [123.675, 116.28, 103.53],
            "PIXEL_STD": [58.395, 57.12, 57.375],
            "BACKBONE": {"FREEZE_AT": 0},
            "RESNETS": {"STRIDE_IN_1X1": False, "NORM": "SyncBN", **resnets},
        },
        "INPUT": {"FORMAT": "RGB"},
    }


def test_the_card_says_where_the_weights_come_from(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "resnet18")
    store = open_store(str(run))
    url = latest(store).url
    store.put("evaluation.json", json.dumps(EVALUATION | {"checkpoint": url}).encode())
    folder = export(run, "torchvision", tmp_path / "out", "--license", "CC-BY-4.0")
    card, page = card_of(folder), (folder / "README.md").read_text()

    weights = file_of(folder).read_bytes()
    assert (card["format"], card["version"]) == ("moco-scale model card", 1)
    assert card["export"]["sha256"] == hashlib.sha256(weights).hexdigest()
    assert card["export"]["bytes"] == len(weights)
    assert card["export"]["max_relative_difference"] <= 1e-6
    assert card["source"] == {"run": str(run), "checkpoint": url}
    assert card["data"] == [{"url": "s3://photos/set", "id": "0123456789abcdef0123", "version": 4}]
    assert card["training"]["steps"] == STEP
    assert card["training"]["images_seen"] == POSITION
    assert card["training"]["settings"]["model"]["backbone"] == "resnet18"
    assert card["encoder"] == {
        "backbone": "resnet18",
        "stem": "imagenet",
        "features": 512,
        "parameters": 11_176_512,
        "bn_sub_batch": 2,
    }
    assert card["input"] == {
        "size": 64,
        "resize": 73,
        "channels": "RGB",
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
    }
    assert card["evaluation"]["scores"] == EVALUATION["scores"]
    assert card["license"] == "CC-BY-4.0"
    page = " ".join(page.split())
    for said in (
        "CC-BY-4.0", "s3://photos/set", "0123456789ab, version 4", "200 images", "12 steps",
        "| trained | 0.750 | 0.500 |", "RGB", "0.485, 0.456, 0.406", "evaluation mode",
    ):  # fmt: skip
        assert said in page


def test_the_card_says_what_is_not_known(vit_run: Path, tmp_path: Path) -> None:
    folder = export(vit_run, "timm", tmp_path / "out")
    card, page = card_of(folder), (folder / "README.md").read_text()

    assert card["evaluation"] is None
    assert card["license"] is None
    assert "not evaluated" in page
    assert "no licence is stated" in " ".join(page.split())


def test_the_card_has_every_table_of_an_evaluation(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "timm/test_vit", view_size=160)
    task = {
        "name": "linear probe",
        "how": "SGD on frozen features.",
        "scores": [
            {"features": "trained", "accuracy": {"top-1": 0.625}, "spread": {"top-1": 0.0125}}
        ],
    }
    more = {"tasks": [task], "failures": [{"sample_id": 3}], "test_shards": "s3://test/set"}
    open_store(str(run)).put("evaluation.json", json.dumps(EVALUATION | more).encode())

    folder = export(run, "timm", tmp_path / "out")
    card, page = card_of(folder), (folder / "README.md").read_text()

    assert "300 images of s3://test/set" in page
    assert "linear probe: SGD on frozen features." in page
    assert "| trained | 0.625 \u00b1 0.013 |" in page
    assert card["evaluation"]["tasks"] == [task]
    assert "failures" not in card["evaluation"]


def test_scores_of_another_checkpoint_are_not_on_the_card(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "timm/test_vit", view_size=160)
    store = open_store(str(run))
    store.put("evaluation.json", json.dumps(EVALUATION | {"step": STEP - 1}).encode())

    folder = export(run, "timm", tmp_path / "out")

    assert card_of(folder)["evaluation"] is None


# --- what is exported, and where to -----------------------------------------------------------


def test_a_checkpoint_is_exported_by_its_url(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "timm/test_vit", step=5, view_size=160)
    older = latest(open_store(str(run)))
    name = "encoder_q.norm.weight"
    save_checkpoint(
        open_store(str(run)),
        dataclasses.replace(older, step=6, model=older.model | {name: 2 * older.model[name]}),
        keep=3,
    )

    newest = export(run, "timm", tmp_path / "newest")
    folder = export(Path(older.url), "timm", tmp_path / "older")

    assert card_of(newest)["training"]["steps"] == 6
    assert card_of(folder)["training"]["steps"] == 5
    assert card_of(folder)["source"]["run"] == str(run)
    weights = safetensors.torch.load_file(file_of(folder))
    assert torch.equal(weights["norm.weight"], older.model[name])


@pytest.mark.parametrize("format", ["torchvision", "timm", "detectron2", "onnx"])
def test_an_export_started_again_finds_its_own_bytes(
    format: str, resnet_run: Path, tmp_path: Path
) -> None:
    folder = export(resnet_run, format, tmp_path / "out")
    before = digests(folder, folder.iterdir())
    (folder / "card.json").unlink()  # as if it had been killed before its last file

    export(resnet_run, format, folder)

    assert digests(folder, folder.iterdir()) == before
    assert len(before) == 3


@pytest.mark.s3
def test_an_export_goes_to_a_bucket(s3: LocalS3, vit_run: Path) -> None:
    url = f"{s3.make_bucket('exports')}/one"
    assert main(["export", str(vit_run), "--format", "timm", "--to", url]) == 0

    weights = safetensors.torch.load(bytes(open_store(url).read("test_vit.safetensors")))
    timm.create_model("test_vit", num_classes=0).load_state_dict(weights, strict=True)


# --- import -----------------------------------------------------------------------------------


def published(folder: Path, *, mlp: bool, whole: bool, **changes: Any) -> Path:
    """A checkpoint as main_moco.py writes it (whole), or as the published files are."""
    encoder = torchvision.models.resnet18(num_classes=16)
    if mlp:
        encoder.fc = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), encoder.fc)
    state = {f"module.encoder_q.{name}": one for name, one in encoder.state_dict().items()}
    if whole:
        keys = {
            name: one * 0.5 if one.is_floating_point() else one
            for name, one in encoder.state_dict().items()
        }
        state |= {f"module.encoder_k.{name}": one for name, one in keys.items()}
        state["module.queue"] = nn.functional.normalize(torch.randn(16, 64), dim=0)
        state["module.queue_ptr"] = torch.tensor([32])
    content = {"epoch": 200, "arch": "resnet18", "state_dict": state | changes.pop("state", {})}
    if whole:
        content["optimizer"] = {"state": {}, "param_groups": [{"lr": 0.03, "params": [0, 1]}]}
    path = folder / "published.pth.tar"
    # The published files are as old as the format before the present one.
    torch.save(content | changes, path, _use_new_zipfile_serialization=whole)
    return path


@pytest.fixture
def preset(tmp_path: Path) -> str:
    path = tmp_path / "tiny.toml"
    path.write_text(TINY)
    return str(path)


@pytest.mark.parametrize("mlp", [False, True])
@pytest.mark.parametrize("whole", [False, True])
def test_a_published_checkpoint_becomes_a_run(mlp: bool, whole: bool, tmp_path: Path) -> None:
    source = published(tmp_path, mlp=mlp, whole=whole)
    state = torch.load(source, weights_only=True)["state_dict"]
    run = tmp_path / "run"

    assert main(["import", str(source), "--out", str(run)]) == 0

    checkpoint = latest(open_store(str(run)))
    config = from_mapping(TrainConfig, json.loads((run / CONFIG_FILE).read_text()))
    assert checkpoint.step == 0
    assert checkpoint.config == dataclasses.asdict(config)
    model = config.model
    assert (model.backbone, model.dim, model.mlp_head) == ("resnet18", 16, mlp)
    assert model.queue_size == (64 if whole else 65_536)
    assert model.temperature == (0.2 if mlp else 0.07)  # the recipe of the layout
    assert config.data.recipe == ("v2" if mlp else "v1")
    assert config.run.init == str(source)
    for name, tensor in state.items():
        if "encoder_k" in name and "running" not in name and "num_batches" not in name:
            # Published code moves the key encoder at the beginning of a step, ours at the end.
            of_q = state[name.replace("encoder_k", "encoder_q")]
            tensor = tensor.lerp(of_q, 1 - model.momentum)
        torch.testing.assert_close(checkpoint.model[name.removeprefix("module.")], tensor)


def test_pretraining_goes_on_from_an_import_as_from_run_init(tmp_path: Path, preset: str) -> None:
    source = published(tmp_path, mlp=True, whole=True)
    imported, begun = tmp_path / "imported", tmp_path / "begun"
    synthetic = ("--data.mode", "synthetic", "--run.max-steps", "2")

    assert main(["import", str(source), "--out", str(imported), "--preset", preset]) == 0
    saved = str(imported / CONFIG_FILE)
    assert pretrain("--preset", saved, *synthetic) == 0
    assert pretrain("--preset", saved, "--out", str(begun), *synthetic) == 0

    one, other = (latest(open_store(str(run))) for run in (imported, begun))
    assert one.step == other.step == 2
    assert one.loader == other.loader
    assert all(torch.equal(tensor, other.model[name]) for name, tensor in one.model.items())
    assert not torch.equal(
        one.model["encoder_q.conv1.weight"],
        torch.load(source, weights_only=True)["state_dict"]["module.encoder_q.conv1.weight"],
    )


def test_an_import_is_exported_as_it_came(tmp_path: Path, preset: str) -> None:
    source = published(tmp_path, mlp=True, whole=False)
    assert main(["import", str(source), "--out", str(tmp_path / "run"), "--preset", preset]) == 0

    folder = export(tmp_path / "run", "official", tmp_path / "out")

    came = torch.load(source, weights_only=True)["state_dict"]
    went = torch.load(file_of(folder), weights_only=True)["state_dict"]
    assert all(torch.equal(went[name], tensor) for name, tensor in came.items())
    assert str(source) in (folder / "README.md").read_text()


@pytest.mark.s3
def test_an_import_into_a_bucket_goes_on_there(s3: LocalS3, tmp_path: Path, preset: str) -> None:
    run = f"{s3.make_bucket('imports')}/run"
    source = published(tmp_path, mlp=True, whole=False)
    steps = ("--data.mode", "synthetic", "--run.max-steps", "1")

    assert main(["import", str(source), "--out", run, "--preset", preset]) == 0
    assert pretrain("--preset", f"{run}/{CONFIG_FILE}", *steps) == 0

    assert latest(open_store(run)).step == 1


def test_an_import_is_evaluated(tmp_path: Path, preset: str) -> None:
    shard_set, labels = labelled_set(tmp_path)
    source, run = published(tmp_path, mlp=False, whole=True), str(tmp_path / "run")
    assert main(["import", str(source), "--out", run, "--preset", preset]) == 0

    assert main(["evaluate", run, "--on", shard_set.url, "--labels", labels, "--k", "3"]) == 0

    assert json.loads(bytes(open_store(run).read("evaluation.json")))["step"] == 0


def labelled_set(folder: Path) -> tuple[ShardSet, str]:
    """24 images, and the labels of two classes."""
    shard_set = make_shard_set(folder / "data", count=24, shard_samples=24)
    labels = folder / "labels.csv"
    rows = [f"{uri},{'ab'[number % 2]}" for number, uri in uris(shard_set).items()]
    labels.write_text("\n".join(["uri,label", *rows]))
    return shard_set, str(labels)


# --- a backbone without batch normalisation ---------------------------------------------------


def test_a_vit_trains_is_evaluated_and_exported(tmp_path: Path, preset: str) -> None:
    shard_set, labels = labelled_set(tmp_path)
    run = tmp_path / "run"
    flags = ("--model.backbone", "timm/test_vit", "--data.view-size", "160")
    steps = ("--optim.epochs", "3", "--run.log-every", "1")

    trained = pretrain(
        "--preset", preset, "--data", shard_set.url, "--out", str(run), *flags, *steps
    )
    assert trained == 0
    assert main(["evaluate", str(run), "--labels", labels, "--k", "3"]) == 0
    folders = {
        format: export(run, format, tmp_path / format) for format in ("timm", "safetensors", "onnx")
    }

    losses = [row.loss for row in read_metrics(str(run))]
    assert len(losses) == 3
    assert all(loss is not None and np.isfinite(loss) for loss in losses)
    encoder = encoder_of(run)
    assert not [
        one for one in encoder.modules() if isinstance(one, nn.modules.batchnorm._BatchNorm)
    ]
    begun = build_encoder(ModelConfig(backbone="timm/test_vit", dim=16), seed=0)
    assert not torch.equal(next(encoder.parameters()), next(begun.parameters()))
    model = timm.create_model(
        "test_vit", num_classes=0, checkpoint_path=str(file_of(folders["timm"]))
    )
    assert_same_features(model, run, size=160)
    card = card_of(folders["onnx"])
    assert card["evaluation"]["step"] == 3
    assert card["data"][0]["id"] == shard_set.set_id
    assert card["encoder"]["bn_sub_batch"] is None
    assert "no batch normalisation" in (folders["onnx"] / "README.md").read_text()


# --- what is refused --------------------------------------------------------------------------


def refused(capsys: pytest.CaptureFixture[str], *arguments: str | Path, code: int = 1) -> str:
    """The one line that a command ends with."""
    capsys.readouterr()
    assert main([str(one) for one in arguments]) == code
    printed = capsys.readouterr()
    assert not printed.out
    assert len(printed.err.splitlines()) == 1, printed.err
    return printed.err


@pytest.mark.parametrize(
    ("of", "format", "said"),
    [
        ("vit", "detectron2", "detectron2 is for ResNets, not for timm/test_vit"),
        ("vit", "official", "official is for ResNets"),
        ("vit", "torchvision", "formats for it: timm, safetensors, onnx"),
        ("cifar", "timm", "model.stem cifar; formats for it: torchvision, safetensors, onnx"),
    ],
)
def test_a_format_that_does_not_fit_is_refused(
    of: str,
    format: str,
    said: str,
    vit_run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = vit_run if of == "vit" else make_run(tmp_path / "run", "resnet18", stem="cifar")
    out = tmp_path / "out"

    assert said in refused(capsys, "export", run, "--format", format, "--to", out)
    assert not out.exists()


def test_another_export_in_the_place_is_not_touched(
    vit_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "README.md").write_text("mine")

    said = refused(capsys, "export", vit_run, "--format", "timm", "--to", out)

    assert f"{out}/README.md" in said
    assert "--to" in said
    assert [path.name for path in out.iterdir()] == ["README.md"]
    assert (out / "README.md").read_text() == "mine"


class FullStore(FolderStore):
    """Has no space for the last file."""

    def put(self, path: str, buffers: Any, *, create_only: bool = False) -> str:
        if path == "card.json":
            raise StoreError("no space left")
        return super().put(path, buffers, create_only=create_only)


def test_what_cannot_be_written_to_the_end_is_taken_away(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(b"ours, of a try before")

    with pytest.raises(StoreError, match="no space left"):
        put_all(
            FullStore(tmp_path),
            {"weights": b"ours, of a try before", "README.md": b"page", "card.json": b"card"},
        )

    assert [path.name for path in tmp_path.iterdir()] == ["weights"]


def test_a_missing_library_is_named(
    vit_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)

    said = refused(capsys, "export", vit_run, "--format", "onnx", "--to", tmp_path / "out")

    assert "pip install 'moco-scale[export]'" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("nowhere", "no run at"),
        ("nowhere/step.pt", "no checkpoint at"),
        ("published.pth.tar", "'moco-scale import'"),
    ],
)
def test_what_is_no_run_is_not_exported(
    source: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    published(tmp_path, mlp=True, whole=False)

    printed = refused(
        capsys, "export", tmp_path / source, "--format", "timm", "--to", tmp_path / "out"
    )

    assert said in printed
    assert not (tmp_path / "out").exists()


def test_weights_that_are_not_numbers_are_not_exported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run", "timm/test_vit", view_size=160)
    good = latest(open_store(str(run)))
    good.model["encoder_q.norm.weight"][3] = torch.nan
    save_checkpoint(open_store(str(run)), good, keep=1)

    said = refused(capsys, "export", good.url, "--format", "timm", "--to", tmp_path / "out")

    assert "not finite, in encoder_q.norm.weight" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"state_dict": {"module.base_encoder.conv1.weight": torch.ones(1)}}, "no encoder_q"),
        ({"arch": "vit_small"}, "'vit_small' is not known"),
        ({"arch": "resnet50"}, "set --arch"),
        ({"arch": None}, "give --arch"),
        ({"optimizer": argparse.Namespace(lr=0.03)}, "could run code"),
        ({"state": {"module.queue": torch.ones(8, 4)}}, "queue of shape (8, 4), not 16 x K"),
        ({"state": {"module.encoder_q.conv1.weight": torch.full((64, 3, 7, 7), torch.nan)}},
         "not finite, in encoder_q.conv1.weight"),
        ({"state": {"module.encoder_q.layer9.weight": torch.ones(1)}}, "layer9"),
    ],
)  # fmt: skip
def test_a_foreign_checkpoint_is_not_imported(
    changes: dict[str, Any], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = published(tmp_path, mlp=True, whole=True, **changes)

    assert said in refused(capsys, "import", source, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("content", [b"", b"<html>", b"PK\x03\x04", b"\x80\x02}q\x00."])
def test_a_damaged_checkpoint_is_not_imported(
    content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "moco.pth.tar").write_bytes(content)

    said = refused(capsys, "import", tmp_path / "moco.pth.tar", "--out", tmp_path / "run")

    assert "moco.pth.tar is not a checkpoint of weights alone" in said
    assert not (tmp_path / "run").exists()


def test_an_import_does_not_touch_a_run_that_is_there(
    resnet_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = published(tmp_path, mlp=True, whole=False)
    before = {path: path.stat().st_mtime_ns for path in resnet_run.rglob("*")}

    said = refused(capsys, "import", source, "--out", resnet_run)

    assert str(resnet_run) in said
    assert {path: path.stat().st_mtime_ns for path in resnet_run.rglob("*")} == before


# --- the rest ---------------------------------------------------------------------------------


def test_pickles_are_never_trusted() -> None:
    """Every torch.load says weights_only=True; nothing is unpickled otherwise."""
    checked = 0
    for package in ("shards", "pipelines", "moco_scale", "demo", "benchmarks", "examples"):
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if not isinstance(node, ast.Call):
                    continue
                called = ast.unparse(node.func)
                if called == "torch.load":
                    said = {word.arg: ast.unparse(word.value) for word in node.keywords}
                    assert said.get("weights_only") == "True", f"{path}:{node.lineno}"
                    checked += 1
    assert checked >= 2


@pytest.mark.parametrize("command", ["export", "import"])
def test_help_fits_a_terminal(command: str) -> None:
    shown = moco_scale(command, "--help", env={"COLUMNS": "80"})

    assert shown.returncode == 0, shown.stderr
    assert max(map(len, shown.stdout.splitlines())) <= 80
    for flag in ("--format", "--to") if command == "export" else ("--out", "--preset"):
        assert flag in shown.stdout
