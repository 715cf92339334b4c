"""A published MoCo checkpoint as a run of this project: at step 0, to go on from or to score."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from importlib import metadata

from torch import Tensor

from moco_scale.checkpoint import (
    Checkpoint,
    Published,
    load_published,
    save_checkpoint,
    saved_steps,
)
from moco_scale.config import CONFIG_FILE, TrainConfig, load_config, to_mapping
from moco_scale.distributed import one_rank
from moco_scale.encoders import build_encoder
from moco_scale.errors import CheckpointError
from moco_scale.model import MoCo
from shards.errors import NotFoundError
from shards.store import Store, open_store

_Q = "encoder_q."


def import_run(url: str, out: str, *, presets: Sequence[str] = (), arch: str = "") -> TrainConfig:
    """Make a run of a checkpoint that the published code wrote; return the run's settings.

    They are the recipe whose head the checkpoint has (v1: one layer, v2: two), then the presets,
    then what the weights say. The optimizer's state is not taken over: the schedule begins anew.

    Args:
        url: of the checkpoint.
        out: of the run, which must not be there yet.
        presets: as `moco-scale pretrain` takes them.
        arch: the backbone's name; the checkpoint's own `arch` when empty.

    Raises:
        CheckpointError: no checkpoint of that layout, of another architecture, or with numbers that
            are not finite; or there is a run at `out`.
        ConfigError: an unknown backbone or preset.
    """
    store = open_store(out)
    _check_free(store)
    found = load_published(url)
    config = load_config(_arguments(url, out, found, presets=presets, arch=arch))
    model = MoCo(
        build_encoder(config.model, seed=config.run.seed),
        config.model,
        seed=config.run.seed,
        ranks=one_rank(),
    )
    _check_weights(url, found.model, model.state_dict(), backbone=config.model.backbone)
    model.begin_with(found.model, where=url, is_behind=found.is_behind)
    checkpoint = Checkpoint(
        url="",
        step=0,
        model=model.state_dict(),
        optimizer={"state": {}, "param_groups": []},
        loader={},
        config=dataclasses.asdict(config),
        best=None,
        versions={name: metadata.version(name) for name in ("moco-scale", "torch")},
        world_size=1,
    )
    save_checkpoint(store, checkpoint, keep=1)
    store.put(CONFIG_FILE, json.dumps(to_mapping(config), indent=1).encode())
    return config


def _check_free(store: Store) -> None:
    """What an import that was stopped left has no settings, and is written anew."""
    try:
        store.head(CONFIG_FILE)
    except NotFoundError:
        if not [step for step in saved_steps(store) if step > 0]:
            return
    raise CheckpointError(f"there is a run at {store.url} already; give another --out")


def _arguments(
    url: str, out: str, found: Published, *, presets: Sequence[str], arch: str
) -> list[str]:
    """What one would say to `moco-scale pretrain` for a model with these weights."""
    name = arch or found.arch
    if not name:
        raise CheckpointError(f"{url} does not say its arch; give --arch, such as resnet50")
    layers = {end: found.model.get(f"{_Q}fc.{end}weight") for end in ("", "2.")}
    head = next((layer for layer in layers.values() if layer is not None), None)
    if head is None:
        raise CheckpointError(
            f"{url} has neither {_Q}fc (MoCo v1) nor {_Q}fc.2 (v2); import takes ResNets as the "
            "published code saves them, and pretrain --run.init checkpoints of moco-scale"
        )
    _check_queue(url, found.model, dim=len(head))
    has_mlp = layers["2."] is not None
    arguments = ["--preset", "moco_v2_r50" if has_mlp else "moco_v1_r50"]
    for preset in presets:
        arguments += ["--preset", preset]
    arguments += ["--out", out, "--run.init", url, "--model.backbone", name]
    arguments += ["--model.dictionary", "queue", "--model.dim", str(len(head))]
    arguments += ["--model.mlp-head" if has_mlp else "--model.no-mlp-head"]
    first = found.model.get(f"{_Q}conv1.weight")
    is_small = first is not None and first.shape[-1] == 3
    arguments += ["--model.stem", "cifar" if is_small else "imagenet"]
    if "queue" in found.model:
        arguments += ["--model.queue-size", str(found.model["queue"].shape[1])]
    return arguments


def _check_queue(url: str, model: Mapping[str, Tensor], *, dim: int) -> None:
    if ("queue" in model) != ("queue_ptr" in model):
        raise CheckpointError(f"{url} has one of queue and queue_ptr without the other")
    if "queue" in model and (model["queue"].ndim != 2 or len(model["queue"]) != dim):
        raise CheckpointError(
            f"{url} has a queue of shape {tuple(model['queue'].shape)}, not {dim} x K, though its "
            f"embeddings are of {dim}"
        )


def _check_weights(
    url: str, found: Mapping[str, Tensor], ours: Mapping[str, Tensor], *, backbone: str
) -> None:
    for name in [*ours, *found]:
        if not name.startswith(_Q):
            continue
        theirs, wanted = (
            tuple(one[name].shape) if name in one else "missing" for one in (found, ours)
        )
        if theirs != wanted:
            raise CheckpointError(
                f"{url} is not a {backbone}: {name} is {theirs}, and in {backbone} {wanted}; set "
                "--arch to what it is"
            )
    for name, tensor in found.items():
        if name in ours and not tensor.isfinite().all():
            raise CheckpointError(f"{url} holds numbers that are not finite, in {name}")
