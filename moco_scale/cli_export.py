"""The commands between this project and others: export and import."""

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from moco_scale.settings import parse_flags


@dataclass(frozen=True, kw_only=True, slots=True)
class _ExportArguments:
    """Write a run's encoder as another library loads it, with a model card beside it.

    Into --to go the weights, README.md (origin, how to load them) and card.json.

    Nothing is written before the file, loaded back, gives the run's features.
    """

    source: Annotated[
        tyro.conf.Positional[str], tyro.conf.arg(name="run|checkpoint", metavar="RUN|CHECKPOINT")
    ]
    """URL or path of a run, whose newest checkpoint is taken, or of one of its checkpoints."""
    format: Literal["torchvision", "timm", "detectron2", "safetensors", "onnx", "official"]
    """torchvision: a state dict for any of its models.
    timm: safetensors for its models, and for ResNets.
    detectron2: a pickle for its ResNets.
    safetensors: names of the backbone's own library.
    onnx: for ONNX Runtime, any batch, the run's view size.
    official: as the published MoCo code saves, key encoder and queue included."""
    to: Annotated[str, tyro.conf.arg(metavar="URL")]
    """URL or path of the folder that is written."""
    license: Annotated[str, tyro.conf.arg(metavar="NAME")] = ""
    """Licence of the weights, for the card; it depends on the images."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _ImportArguments:
    """Make a run of a checkpoint of the published MoCo code, v1 or v2.

    The run is at step 0: optimizer and schedule begin anew.

    Go on: moco-scale pretrain --preset RUN/config.json --data SHARD_SET

    Or score it: moco-scale evaluate RUN --on SHARD_SET
    """

    checkpoint: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="CHECKPOINT")]
    """URL or path of the checkpoint, such as moco_v2_800ep_pretrain.pth.tar."""
    out: Annotated[str, tyro.conf.arg(metavar="RUN")]
    """URL or path of the run."""
    preset: tyro.conf.UseAppendAction[
        Annotated[tuple[str, ...], tyro.conf.arg(metavar="FILE")]
    ] = ()
    """Settings of the run, as pretrain takes them (a name or a file), over those of the recipe that
    the checkpoint's head tells; may be given several times."""
    arch: Annotated[str, tyro.conf.arg(metavar="NAME")] = ""
    """A ResNet's name in torchvision; the checkpoint's own arch when empty."""


def run_export(arguments: list[str]) -> int:
    """`moco-scale export`."""
    given = parse_flags(_ExportArguments, arguments, prog="moco-scale export")
    from moco_scale.export import export  # loads torch

    written = export(given.source, given.format, given.to, license=given.license)
    for url in written.urls:
        print(url)
    print(
        "loaded back, its features differ from the run's by at most "
        f"{written.max_relative_difference:g} of the largest"
    )
    return 0


def run_import(arguments: list[str]) -> int:
    """`moco-scale import`."""
    given = parse_flags(_ImportArguments, arguments, prog="moco-scale import")
    from moco_scale.import_run import import_run  # loads torch

    config = import_run(given.checkpoint, given.out, presets=given.preset, arch=given.arch)
    model = config.model
    print(
        f"{given.out}: {model.backbone}, MoCo {'v2' if model.mlp_head else 'v1'}, embeddings of "
        f"{model.dim}, queue of {model.queue_size:,}"
    )
    print(f"go on: moco-scale pretrain --preset {given.out}/config.json --data SHARD_SET")
    return 0
