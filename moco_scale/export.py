"""A run's encoder as a file that another library loads, with a card that says where it is from.

Before anything is written the file is loaded as its library loads it, and must give the features
of the run. (detectron2's is read back under torchvision's names.)
"""

import contextlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moco_scale.card_code import Facts
from moco_scale.checkpoint import FOLDER, Checkpoint, UnfinishedError, latest, load_checkpoint
from moco_scale.config import TrainConfig
from moco_scale.encoders import build_encoder, pooled_features
from moco_scale.errors import CheckpointError, ExportError
from moco_scale.evaluate import EVALUATION_FILE
from moco_scale.export_formats import Encoder, check_format
from moco_scale.model_card import CARD_FILE, PAGE_FILE, card_of, page_of
from moco_scale.settings import from_mapping
from shards.errors import NotFoundError, UserError
from shards.store import Store, open_store


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """What is exported."""

    run_url: str
    """Empty for a checkpoint that lies in no run."""
    checkpoint: Checkpoint
    config: TrainConfig
    evaluation: dict[str, Any] | None
    """Of this checkpoint, as `moco-scale evaluate` left it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Exported:
    """What was written."""

    urls: tuple[str, ...]
    """The weights, the page and the card."""
    max_relative_difference: float
    """Of the features that the written file and the run give, at most; a power of ten, or 0."""


def export(url: str, format: str, to: str, *, license: str = "") -> Exported:
    """Write the encoder of a run or of a checkpoint in one of `FORMATS` into the folder `to`.

    Args:
        url: of a run, whose newest checkpoint is taken, or of one of its checkpoints.
        format: one of `FORMATS`.
        to: URL or path of a folder. The same export may be there already, in part or whole.
        license: of the weights, for the card.

    Raises:
        CheckpointError: there is no checkpoint, it is torn, or of another architecture.
        ExportError: the format is not for this backbone, a library is missing, or another export
            is in the place.
    """
    source = open_source(url)
    trained = _trained(source)
    encoder = _encoder_of(source, trained)
    chosen = check_format(format, encoder)
    with torch.no_grad():
        images = _noise(encoder.view_size)
        expected = pooled_features(trained, images)
        try:
            data = chosen.write(encoder)
            found = chosen.read(data, encoder)(images)
        except (RuntimeError, ValueError) as err:
            # A layer that it cannot express, or has under another name.
            raise ExportError(
                f"{format} does not take a {encoder.model.backbone}: {_one_line(err)}; "
                "choose another format"
            ) from err
    facts = Facts(
        format=format,
        file=f"{encoder.name}{chosen.suffix}",
        data=data,
        max_relative_difference=_difference(found, expected, tolerance=chosen.tolerance),
        run_url=source.run_url,
        checkpoint=source.checkpoint,
        config=source.config,
        evaluation=source.evaluation,
        license=license,
        num_features=expected.shape[1],
        num_parameters=sum(
            one.numel() for name, one in trained.named_parameters() if name in encoder.body
        ),
        has_batch_norm=any(
            isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in trained.modules()
        ),
        head_path=str(trained.head_path),
    )
    card = card_of(facts)
    files = {
        facts.file: data,
        PAGE_FILE: page_of(facts, card).encode(),
        CARD_FILE: (json.dumps(card, indent=1) + "\n").encode(),
    }
    store = open_store(to)
    put_all(store, files)
    return Exported(
        urls=tuple(store.uri(name) for name in files),
        max_relative_difference=facts.max_relative_difference,
    )


def open_source(url: str) -> Source:
    """A checkpoint with its run around it.

    Raises:
        CheckpointError: there is none at this address.
    """
    if url.endswith((".pt", ".pth", ".tar")):
        checkpoint = _checkpoint_at(url)
        run_url, folder, _ = url.rpartition(f"/{FOLDER}/")
        run_url = run_url if folder else ""
    else:
        store = open_store(url)
        checkpoint, run_url = latest(store), store.url
    return Source(
        run_url=run_url,
        checkpoint=checkpoint,
        config=from_mapping(TrainConfig, checkpoint.config),
        evaluation=_evaluation_of(run_url, checkpoint.step) if run_url else None,
    )


def put_all(store: Store, files: Mapping[str, bytes]) -> None:
    """Write files in this order, all or none; those that are there already must be the same.

    Raises:
        ExportError: one is there already and is another.
    """
    missing = []
    for name, data in files.items():
        try:
            there = bytes(store.read(name))
        except NotFoundError:
            missing.append(name)
            continue
        if there != data:
            raise ExportError(
                f"{store.uri(name)} is there already, and is another; give another --to"
            )
    try:
        for name in missing:
            store.put(name, files[name])
    except BaseException:
        with contextlib.suppress(UserError):
            store.delete(missing)
        raise


def _checkpoint_at(url: str) -> Checkpoint:
    try:
        return load_checkpoint(url)
    except UnfinishedError as err:
        raise CheckpointError(
            f"{url} is no finished checkpoint of a run (it has no .sha256); of a published "
            "checkpoint make a run first, with 'moco-scale import'"
        ) from err


def _evaluation_of(run_url: str, step: int) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = json.loads(bytes(open_store(run_url).read(EVALUATION_FILE)))
    except NotFoundError:
        return None
    return found if found.get("step") == step else None


def _trained(source: Source) -> nn.Module:
    encoder = build_encoder(source.config.model, seed=0)
    prefix = "encoder_q."
    weights = {
        name.removeprefix(prefix): tensor
        for name, tensor in source.checkpoint.model.items()
        if name.startswith(prefix)
    }
    try:
        encoder.load_state_dict(weights)
    except (RuntimeError, ValueError) as err:
        raise CheckpointError(
            f"{source.checkpoint.url} is not a {source.config.model.backbone}: {_one_line(err)}"
        ) from err
    return encoder.eval()


def _encoder_of(source: Source, trained: nn.Module) -> Encoder:
    head = f"{trained.head_path}."
    # A run on channels_last saves its weights so; not every library takes them.
    return Encoder(
        model=source.config.model,
        view_size=source.config.data.view_size,
        body={
            name: tensor.contiguous()
            for name, tensor in trained.state_dict().items()
            if not name.startswith(head)
        },
        state={name: tensor.contiguous() for name, tensor in source.checkpoint.model.items()},
        epoch=int(source.checkpoint.loader.get("epoch", 0)),
    )


def _difference(found: Tensor, expected: Tensor, *, tolerance: float) -> float:
    """Relative to the largest feature; rounded up to a power of ten, for an export made again on
    other cores must have the same card.

    Raises:
        ExportError: it is above the tolerance.
    """
    if torch.equal(found, expected):
        return 0.0
    difference = float((found - expected).abs().max() / expected.abs().max())
    if not difference <= tolerance:
        raise ExportError(
            f"loaded back, it gives other features (by {difference:.1g} of the largest); choose "
            "another format"
        )
    return float(f"1e{math.ceil(math.log10(difference))}")


def _noise(size: int) -> Tensor:
    return torch.randn((2, 3, size, size), generator=torch.Generator().manual_seed(0))


def _one_line(err: Exception) -> str:
    return " ".join(str(err).split())[:200]
