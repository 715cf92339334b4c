"""Checkpoints in object storage: one object with everything, complete or not there.

checkpoints/step-000000500.pt is what torch.save writes; step-000000500.pt.sha256 beside it, in the
format of sha256sum, is written after it and vouches for it. A checkpoint without, or with another
sum, is taken for torn and passed over.

Inside, the weights are where the published code has them: `state_dict`, its names beginning with
`module.`, and `arch` and `epoch`. So the scripts that people have for linear probes and detection
read these files as they are.
"""

import dataclasses
import hashlib
import io
import logging
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moco_scale.errors import CheckpointError
from shards.errors import NotFoundError
from shards.store import Store, open_store

logger = logging.getLogger(__name__)

FORMAT = 2
FOLDER = "checkpoints"
_PUBLISHED = "module."
"""Before the names of weights in published checkpoints: DistributedDataParallel's."""

_RECIPE = ("recipe", "view_size", "min_crop_area_frac")
"""Settings of `data` that a run keeps, like all of `model`: others may change on the way."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """Everything that a run needs to go on."""

    url: str
    """Where it is; empty before it was saved."""
    step: int
    """Updates made."""
    model: dict[str, Tensor]
    """State dict under the published names: encoder_q.*, encoder_k.*, queue, queue_ptr."""
    optimizer: dict[str, Any]
    loader: dict[str, Any]
    """Position in the data, the same at every world size."""
    config: dict[str, Any]
    """The run's settings as nested dicts."""
    best: tuple[float, int] | None
    """Highest online kNN accuracy so far, and the step that had it."""
    versions: dict[str, str]
    """Of the libraries that wrote it."""
    world_size: int
    """Ranks at the time; any allowed number can go on."""
    skipped_steps: int = 0
    """Of the updates, those that were not finite and changed nothing."""


def save_checkpoint(
    store: Store, checkpoint: Checkpoint, *, keep: int, best: int | None = None
) -> str:
    """Write a checkpoint into a run and return its URL; then delete all but the newest `keep`.

    Args:
        best: step of a checkpoint that is kept, too.
    """
    content = {
        field.name: getattr(checkpoint, field.name)
        for field in dataclasses.fields(checkpoint)
        if field.name not in ("url", "model")
    }
    published = {
        "state_dict": {f"{_PUBLISHED}{name}": one for name, one in checkpoint.model.items()},
        "arch": checkpoint.config["model"]["backbone"],
        "epoch": int(checkpoint.loader.get("epoch", 0)),
    }
    written = io.BytesIO()
    torch.save({"format": FORMAT, **content, **published}, written)
    data = written.getvalue()
    path = checkpoint_path(checkpoint.step)
    digest = hashlib.sha256(data).hexdigest()
    store.put(path, data)
    store.put(f"{path}.sha256", f"{digest}  {path.rpartition('/')[2]}\n".encode())
    # Steps after this one belong to a future that was given up.
    older = [step for step in saved_steps(store) if step < checkpoint.step and step != best]
    stale = [checkpoint_path(step) for step in (older[: 1 - keep] if keep > 1 else older)]
    if stale:
        store.delete([name for path in stale for name in (f"{path}.sha256", path)])
    return store.uri(path)


class CheckpointWriter:
    """Saves in a thread of its own; the step waits only while the tensors are copied to the host.

    One checkpoint at a time: the next waits for the one before.
    """

    def __init__(
        self, store: Store, *, keep: int, saved: Callable[[str], None] | None = None
    ) -> None:
        """
        Args:
            keep: newest checkpoints that stay.
            saved: is told the URL of each checkpoint that is whole, in the thread that wrote it.
        """
        self._store = store
        self._keep = keep
        self._saved = saved
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._running: Future[str] | None = None

    def save(self, checkpoint: Checkpoint, *, best: int | None = None) -> None:
        """Begin to save.

        Raises:
            StoreError: the one before could not be written.
        """
        self.wait()
        copied = dataclasses.replace(
            checkpoint, model=_copied(checkpoint.model), optimizer=_copied(checkpoint.optimizer)
        )
        self._running = self._pool.submit(self._save, copied, best)

    def wait(self) -> None:
        """Until what was begun is written.

        Raises:
            StoreError: it could not be.
        """
        running, self._running = self._running, None
        if running is not None:
            logger.info("saved %s", running.result())

    def close(self) -> None:
        """Wait, and end the thread; an error is for `wait` to tell."""
        self._pool.shutdown(wait=True)

    def _save(self, checkpoint: Checkpoint, best: int | None) -> str:
        url = save_checkpoint(self._store, checkpoint, keep=self._keep, best=best)
        if self._saved is not None:
            self._saved(url)
        return url


def _copied(value: Any) -> Any:
    """The same nested value, its tensors on the host and the caller's no more."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: _copied(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_copied(one) for one in value]
    return value


def checkpoint_path(step: int) -> str:
    """Where a run keeps the checkpoint of a step."""
    return f"{FOLDER}/step-{step:09}.pt"


def saved_steps(store: Store) -> list[int]:
    """Steps that a run has a checkpoint of, complete or not, ascending."""
    try:
        pages = list(store.list(f"{FOLDER}/"))
    except NotFoundError:  # a place that the first write will make
        return []
    names = [path for page in pages for path in page.column("path").to_pylist()]
    stem = f"{FOLDER}/step-"
    return sorted(
        int(name.removeprefix(stem).removesuffix(".pt"))
        for name in names
        if name.startswith(stem) and name.endswith(".pt")
    )


def latest(store: Store) -> Checkpoint:
    """The newest checkpoint of a run that is whole.

    Raises:
        UnfinishedError: there are some, but none of them was written to the end.
        CheckpointError: there is none.
    """
    steps = saved_steps(store)
    if not steps:
        raise CheckpointError(
            f"{store.url} has no checkpoint: give the URL of a run that 'moco-scale pretrain' wrote"
        )
    is_any_finished = False
    for step in reversed(steps):
        try:
            return _load(store, checkpoint_path(step))
        except _TornError as err:
            is_any_finished = is_any_finished or not isinstance(err, UnfinishedError)
            logger.warning("%s; trying the checkpoint before it", err)
    if not is_any_finished:
        raise UnfinishedError(
            f"none of the {len(steps)} checkpoints in {store.uri(FOLDER)} was written to the end"
        )
    raise CheckpointError(
        f"none of the {len(steps)} checkpoints in {store.uri(FOLDER)} is whole; start again with "
        "another run.url"
    )


def load_checkpoint(url: str) -> Checkpoint:
    """The checkpoint at a URL.

    Raises:
        CheckpointError: it is missing, torn, or not a checkpoint of this project.
    """
    folder, _, name = url.rpartition("/")
    try:
        return _load(open_store(folder or "."), name)
    except NotFoundError as err:
        raise CheckpointError(f"no checkpoint at {url}") from err


@dataclass(frozen=True, kw_only=True, slots=True)
class Published:
    """A checkpoint laid out as the published code's, by whomever."""

    model: dict[str, Tensor]
    """By published name."""
    arch: str
    """Name of the backbone; empty where it is not said."""
    is_behind: bool
    """Whether the key encoder is a moving average behind: the published code moves it at the
    beginning of a step, this one at the end."""


def load_weights(url: str) -> tuple[dict[str, Tensor], bool]:
    """`Published.model` and `Published.is_behind` of a checkpoint.

    Raises:
        CheckpointError: see `load_published`.
    """
    found = load_published(url)
    return found.model, found.is_behind


def load_published(url: str) -> Published:
    """A checkpoint of this project or of the published code.

    Raises:
        CheckpointError: there is none, or it has no encoder_q.
    """
    folder, _, name = url.rpartition("/")
    store = open_store(folder or ".")
    try:
        data = bytes(store.read(name))
    except NotFoundError as err:
        raise CheckpointError(f"no checkpoint at {url}") from err
    content = _weights_only(data, url)
    weights = content.get("state_dict") if isinstance(content, dict) else None
    if not isinstance(weights, dict) or not all(
        isinstance(name, str) and isinstance(one, Tensor) for name, one in weights.items()
    ):
        raise CheckpointError(f"{url} has no state_dict: give a checkpoint of a MoCo training run")
    model = {name.removeprefix(_PUBLISHED): tensor for name, tensor in weights.items()}
    if not any(name.startswith("encoder_q.") for name in model):
        raise CheckpointError(
            f"{url} has no encoder_q (but {next(iter(model), 'nothing')}, ...): give a checkpoint "
            "of a MoCo training run"
        )
    arch = content.get("arch")
    return Published(
        model=model,
        arch=arch if isinstance(arch, str) else "",
        is_behind="format" not in content,
    )


def check_fits(
    checkpoint: Checkpoint, *, model: Mapping[str, Tensor], config: Mapping[str, Any]
) -> None:
    """Refuse a checkpoint of another architecture or recipe.

    Args:
        checkpoint: to go on from.
        model: state dict of the model that shall be filled.
        config: this run's settings as nested dicts.

    Raises:
        CheckpointError: naming the first setting or tensor that differs.
    """
    kept = [("model", name) for name in config["model"]] + [("data", name) for name in _RECIPE]
    for section, name in kept:
        wanted = config[section][name]
        saved = checkpoint.config[section].get(name, wanted)  # an older version had no such setting
        if saved != wanted:
            raise CheckpointError(
                f"{checkpoint.url} has {section}.{name} {saved!r}, this run {wanted!r}; set "
                f"{section}.{name} to {saved!r}, or start afresh with another run.url, and with "
                "run.init for the weights"
            )
    advice = "start afresh with another run.url"
    for name in [*model, *checkpoint.model]:
        if name not in checkpoint.model:
            raise CheckpointError(f"{checkpoint.url} has no tensor {name}; {advice}")
        if name not in model:
            raise CheckpointError(f"{checkpoint.url} has {name}, this model has not; {advice}")
        saved_shape, shape = tuple(checkpoint.model[name].shape), tuple(model[name].shape)
        if saved_shape != shape:
            raise CheckpointError(
                f"{checkpoint.url} has {name} of shape {saved_shape}, this model {shape}; {advice}"
            )


def changed_settings(checkpoint: Checkpoint, config: Mapping[str, Any]) -> list[str]:
    """What a run does otherwise from here on, and may: as "optim.lr 0.03 -> 0.06"."""
    names = [("optim", name) for name in config["optim"]]
    names += [("data", name) for name in ("global_batch_size", "colour")]
    pairs = [
        (f"{section}.{name}", checkpoint.config[section].get(name), config[section].get(name))
        for section, name in names
    ]
    return [
        f"{name} {old} -> {new}"
        for name, old, new in pairs
        if None not in (old, new) and old != new
    ]


class _TornError(CheckpointError):
    """It cannot be gone on from, but the one before it may."""


class UnfinishedError(_TornError):
    """Its writing did not come to the end."""


def _weights_only(data: bytes, uri: str) -> Any:
    """What torch.save wrote, if nothing in it could run code."""
    try:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as err:  # of a damaged file torch.load raises nearly anything
        raise CheckpointError(
            f"{uri} is not a checkpoint of weights alone ({type(err).__name__}): it is damaged, or "
            "holds other objects, which could run code; save its state_dict and arch anew"
        ) from err


def _load(store: Store, path: str) -> Checkpoint:
    uri = store.uri(path)
    try:
        digest = bytes(store.read(f"{path}.sha256")).split()[0].decode()
    except (NotFoundError, IndexError) as err:
        store.head(path)  # no checkpoint at all is another error
        raise UnfinishedError(f"{uri} is unfinished (it has no .sha256)") from err
    data = bytes(store.read(path))
    if hashlib.sha256(data).hexdigest() != digest:
        raise _TornError(f"{uri} is torn (its SHA-256 is not the one in .sha256)")
    content = _weights_only(data, uri)
    found = content.pop("format", None) if isinstance(content, dict) else None
    if found != FORMAT:
        raise CheckpointError(
            f"{uri} has checkpoint format {found}, this version reads {FORMAT}; load it with the "
            "version that wrote it"
        )
    weights = content.pop("state_dict")
    del content["arch"], content["epoch"]
    content.pop("rng", None)  # of an older version
    model = {name.removeprefix(_PUBLISHED): tensor for name, tensor in weights.items()}
    checkpoint = Checkpoint(url=uri, model=model, **content)
    momentum = {
        f"momentum {index}": of_parameter["momentum_buffer"]
        for index, of_parameter in checkpoint.optimizer["state"].items()
    }
    for name, tensor in (checkpoint.model | momentum).items():
        if not tensor.isfinite().all():
            raise _TornError(f"{uri} holds numbers that are not finite, in {name}")
    return checkpoint
