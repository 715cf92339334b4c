"""A run or a checkpoint, opened, and the encoder in it: for all that use what was learned."""

from dataclasses import dataclass

from torch import nn

from moco_scale.checkpoint import (
    FOLDER,
    Checkpoint,
    UnfinishedError,
    latest,
    load_checkpoint,
    saved_steps,
)
from moco_scale.config import CONFIG_FILE, TrainConfig
from moco_scale.encoders import build_encoder
from moco_scale.errors import CheckpointError
from moco_scale.settings import from_mapping
from shards.errors import NotFoundError
from shards.store import Store, open_store

_Q = "encoder_q."
_FILES = (".pt", ".pth", ".tar", ".ckpt", ".safetensors")


@dataclass(frozen=True, kw_only=True, slots=True)
class Trained:
    """A checkpoint, with the run around it."""

    run_url: str
    """Empty for a checkpoint that lies in no run."""
    checkpoint: Checkpoint
    config: TrainConfig
    """The settings that the checkpoint was written under."""


def open_trained(url: str) -> Trained:
    """A run's newest checkpoint, or the checkpoint at a URL.

    Raises:
        CheckpointError: there is none, it is torn, or not one of this project.
        ConfigError: its settings are of another version.
    """
    if is_checkpoint(url):
        run_url, checkpoint = _run_around(url), _checkpoint_at(url)
    else:
        store = open_store(url)
        run_url, checkpoint = store.url, _newest(store)
    config = from_mapping(TrainConfig, checkpoint.config)
    return Trained(run_url=run_url, checkpoint=checkpoint, config=config)


def is_checkpoint(url: str) -> bool:
    """By its name: not a run."""
    return url.endswith(_FILES)


def trained_encoder(trained: Trained) -> nn.Module:
    """The query encoder, in evaluation mode, on the CPU.

    Raises:
        CheckpointError: its weights are not those of the architecture that its settings name.
    """
    model, checkpoint = trained.config.model, trained.checkpoint
    encoder = build_encoder(model, seed=trained.config.run.seed)
    weights = {
        name.removeprefix(_Q): tensor
        for name, tensor in checkpoint.model.items()
        if name.startswith(_Q)
    }
    wanted = encoder.state_dict()
    for name in [*wanted, *weights]:
        shapes = [tuple(one[name].shape) if name in one else None for one in (weights, wanted)]
        if shapes[0] != shapes[1]:
            has, needs = ("not there" if one is None else f"of shape {one}" for one in shapes)
            raise CheckpointError(
                f"{checkpoint.url} is of another architecture than its model.backbone "
                f"{model.backbone!r}: {_Q}{name} is {has} in it and {needs} in that; give a "
                "checkpoint that 'moco-scale pretrain' wrote"
            )
    encoder.load_state_dict(weights)
    return encoder.eval()


def _run_around(url: str) -> str:
    folder = url.rpartition("/")[0]
    if folder == FOLDER:
        return "."
    return folder.removesuffix(f"/{FOLDER}") if folder.endswith(f"/{FOLDER}") else ""


def _checkpoint_at(url: str) -> Checkpoint:
    try:
        return load_checkpoint(url)
    except UnfinishedError as err:
        raise CheckpointError(
            f"{url} is no finished checkpoint of a run (it has no .sha256 beside it); of a "
            "published MoCo checkpoint make a run first, with 'moco-scale import'"
        ) from err


def _newest(store: Store) -> Checkpoint:
    more = "let 'moco-scale pretrain' go on until it has written one"
    try:
        if saved_steps(store):
            return latest(store)
        store.head(CONFIG_FILE)
    except UnfinishedError as err:
        raise CheckpointError(f"{err}; {more}") from err
    except NotFoundError as err:
        raise CheckpointError(
            f"no run at {store.url}: it has neither checkpoint nor {CONFIG_FILE}; give a run that "
            "'moco-scale pretrain' wrote, or one of its checkpoints"
        ) from err
    raise CheckpointError(f"the run at {store.url} has no checkpoint yet; {more}")
