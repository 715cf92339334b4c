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
from moco_scale.encoders import pooled_features
from moco_scale.errors import ExportError
from moco_scale.evaluation import EVALUATION_FILE
from moco_scale.export_formats import Encoder, check_format
from moco_scale.model_card import CARD_FILE, PAGE_FILE, card_of, page_of
from moco_scale.trained import Trained, open_trained, trained_encoder
from shards.errors import NotFoundError, UserError
from shards.store import Store, open_store


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
    trained = open_trained(url)
    module = trained_encoder(trained)
    encoder = _encoder_of(trained, module)
    chosen = check_format(format, encoder)
    with torch.no_grad():
        images = _noise(encoder.view_size)
        expected = pooled_features(module, images)
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
        run_url=trained.run_url,
        checkpoint=trained.checkpoint,
        config=trained.config,
        evaluation=_evaluation_of(trained),
        license=license,
        num_features=expected.shape[1],
        num_parameters=sum(
            one.numel() for name, one in module.named_parameters() if name in encoder.body
        ),
        has_batch_norm=any(
            isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in module.modules()
        ),
        head_path=str(module.head_path),
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


def _evaluation_of(trained: Trained) -> dict[str, Any] | None:
    """What `moco-scale evaluate` left in the run, if it is of this checkpoint."""
    if not trained.run_url:
        return None
    try:
        saved = bytes(open_store(trained.run_url).read(EVALUATION_FILE))
    except NotFoundError:
        return None
    found: dict[str, Any] = json.loads(saved)
    return found if found.get("step") == trained.checkpoint.step else None


def _encoder_of(trained: Trained, module: nn.Module) -> Encoder:
    head = f"{module.head_path}."
    # A run on channels_last saves its weights so; not every library takes them.
    return Encoder(
        model=trained.config.model,
        view_size=trained.config.data.view_size,
        body={
            name: tensor.contiguous()
            for name, tensor in module.state_dict().items()
            if not name.startswith(head)
        },
        state={name: tensor.contiguous() for name, tensor in trained.checkpoint.model.items()},
        epoch=int(trained.checkpoint.loader.get("epoch", 0)),
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
