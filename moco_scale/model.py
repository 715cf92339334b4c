"""MoCo: a query encoder, its slow copy, and a dictionary of keys (He et al. 2019, Algorithm 1)."""

import copy
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from moco_scale.batch_shuffle import key_order, shuffle_rows, unshuffle_keys
from moco_scale.dictionary import EndToEnd, KeyQueue, MemoryBank
from moco_scale.distributed import Ranks
from moco_scale.encoders import check_backbone
from moco_scale.errors import CheckpointError, ConfigError
from moco_scale.group_norm import batch_statistics, begin_statistics, commit_statistics
from moco_scale.health import embedding_health
from moco_scale.phases import BACKWARD, BN_SHUFFLE, ENQUEUE, FORWARD, KEY_UPDATE
from pipelines.view_maker import normalised

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The method: encoder, dictionary, loss and shuffled batch normalisation."""

    backbone: str = "resnet50"
    """An image classifier of torchvision, by its name, or of timm, as timm/NAME."""
    dim: int = 128
    """Length of an embedding."""
    mlp_head: bool = True
    """Head of two layers (v2) instead of one (v1)."""
    stem: Literal["imagenet", "cifar"] = "imagenet"
    """First layers: 7x7 of stride 2 and pooling, or, for images of about 32 px, 3x3 of stride 1."""
    dictionary: Literal["queue", "memory_bank", "end_to_end"] = "queue"
    """Mechanism of the paper's figure 2; queue is MoCo, the others are what it is compared with."""
    symmetric: bool = False
    """Each view is query and key in turn: two losses a step, added; twice the cost."""
    queue_size: int = 65536
    """Negatives (K of the paper): the queue's keys, or rows drawn from the memory bank. At least
    the keys that a step enqueues."""
    momentum: float = 0.999
    """How much of the key encoder stays in a step (m of the paper)."""
    temperature: float = 0.2
    """Divides the cosines before the softmax (tau of the paper)."""
    bn_sub_batch: int = 32
    """Samples that batch normalisation sees together, whatever the batch of a rank is."""
    shuffle_domain: int = 256
    """Samples whose keys are permuted together, in BN groups: a multiple of bn_sub_batch."""

    def __post_init__(self) -> None:
        check_backbone(self.backbone)
        for name in ("dim", "queue_size", "bn_sub_batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name} must be at least 1, not {getattr(self, name)}")
        if self.symmetric and self.dictionary == "memory_bank":
            raise ConfigError(
                "model.symmetric has no meaning with model.dictionary memory_bank, which encodes "
                "no keys; leave it off"
            )
        if not 0 <= self.momentum < 1:
            raise ValueError(f"model.momentum must be in [0, 1), not {self.momentum}")
        if not self.temperature > 0:
            raise ValueError(f"model.temperature must be above 0, not {self.temperature}")

    def keys_of_step(self, global_batch_size: int) -> int:
        """Keys that a step encodes, over all ranks."""
        return global_batch_size * (2 if self.symmetric else 1)

    def negatives(self, global_batch_size: int) -> int:
        """Keys that a query is told apart from; guessing costs ln(1 + this) nats."""
        return global_batch_size - 1 if self.dictionary == "end_to_end" else self.queue_size


@dataclass(frozen=True, kw_only=True, slots=True)
class StepOutput:
    """What is left of a step's forward and backward passes."""

    loss: Tensor
    """Mean over this rank's samples (and both halves of a symmetric loss), in nats."""
    lookup_accuracy: Tensor
    """How often this rank's positives score highest among 1 + K, 0-1."""
    q: Tensor
    """This rank's queries, detached; of a symmetric loss, those of one half behind the other's."""
    keys: Tensor | None
    """The keys of all ranks in position order, detached; of a symmetric loss likewise. None where
    the dictionary needs none."""
    sample_ids: NDArray[np.int64]
    """Of `q`."""


class MoCo(nn.Module):
    """A step: `backward`, average gradients and `statistics`, then SGD, then `update`.

    State-dict names are the published ones: encoder_q.*, encoder_k.*, queue, queue_ptr. (A memory
    bank has `bank` instead of the last three, end-to-end training encoder_q alone.)
    """

    def __init__(
        self,
        encoder: nn.Module,
        config: ModelConfig,
        *,
        seed: int,
        ranks: Ranks,
        num_ids: int = 0,
        autocast: torch.dtype | None = None,
    ) -> None:
        """
        Args:
            encoder: becomes the query encoder; its copy the key encoder. N x 3 x S x S to N x dim,
                its normalisation layers GroupBatchNorm2d.
            config: of the dictionary, the loss and the shuffle.
            seed: of the dictionary's first content and of the shuffle.
            ranks: the processes that a batch is divided over.
            num_ids: sample ids are below it; a memory bank has so many rows.
            autocast: what the encoders compute in; None for the dtype of their weights.

        Raises:
            ConfigError: the shuffle domain does not consist of at least two whole BN groups.
        """
        super().__init__()
        check_shuffle(config)
        self.encoder_q = encoder
        self.dictionary = _dictionary(config, seed=seed, num_ids=num_ids, ranks=ranks)
        self.encoder_k: nn.Module | None = None
        if self.dictionary.needs_key_encoder:
            self.encoder_k = copy.deepcopy(encoder).requires_grad_(False)
        self.config = config
        self.seed = seed
        self.ranks = ranks
        self._autocast = autocast
        # The dictionary's buffers carry their published names, without 'dictionary.' before them.
        self.register_state_dict_post_hook(_publish_names)  # type: ignore[no-untyped-call]  # torch's
        self.register_load_state_dict_pre_hook(_accept_published_names)  # type: ignore[no-untyped-call]  # torch's

    def compile_encoders(self) -> None:
        """Compile both with torch.compile, in place: names of weights stay.

        Raises:
            ConfigError: torch.compile does not work on this machine.
        """
        _check_compiler(next(self.parameters()).device)
        for encoder in (self.encoder_q, self.encoder_k):
            if encoder is not None:
                encoder.compile()

    @property
    def queue(self) -> Tensor:
        """dim x K."""
        return cast(KeyQueue, self.dictionary).queue

    @property
    def queue_ptr(self) -> Tensor:
        """The next column of the queue to be replaced, a tensor of one number."""
        return cast(KeyQueue, self.dictionary).queue_ptr

    @torch.no_grad()
    def begin_with(self, weights: Mapping[str, Tensor], *, where: str, is_behind: bool) -> None:
        """Take the encoders of another run, and its queue if it is as large.

        Args:
            weights: by published name; without encoder_k, the key encoder begins as encoder_q.
            where: they are from, for messages.
            is_behind: let the key encoder follow once, as the published code does first of all.

        Raises:
            CheckpointError: an encoder of another architecture.
        """
        own = dict(self.named_parameters()) | dict(self.named_buffers())
        has_keys = any(name.startswith("encoder_k.") for name in weights)
        for name, tensor in own.items():
            kind, _, rest = name.partition(".")
            if kind not in ("encoder_q", "encoder_k"):
                continue
            source = f"encoder_q.{rest}" if kind == "encoder_k" and not has_keys else name
            if source not in weights or weights[source].shape != tensor.shape:
                found = tuple(weights[source].shape) if source in weights else "missing"
                raise CheckpointError(
                    f"{where}: {source} is {found}, this model's is {tuple(tensor.shape)}; set "
                    "model.backbone, model.dim and model.mlp_head as they were"
                )
            tensor.copy_(weights[source])
        if self.config.dictionary == "queue" and "queue" in weights:
            if weights["queue"].shape == self.queue.shape:
                self.queue.copy_(weights["queue"])
                self.queue_ptr.copy_(weights["queue_ptr"])
            else:
                logger.warning("%s: its queue is of another size; the run begins with noise", where)
        if is_behind and has_keys:
            self._follow(torch.ones((), dtype=torch.bool, device=self.ranks.device))

    def filled_frac(self, images: int) -> float:
        """Part of the queue that holds real keys after so many images; 1 without a queue."""
        if self.config.dictionary != "queue":
            return 1.0
        return min(1.0, self.config.keys_of_step(images) / self.config.queue_size)

    def oldest_key(self, steps: int, *, global_batch_size: int) -> float:
        """Age in steps of the queue's oldest key after so many steps; 0 without a queue."""
        if self.config.dictionary != "queue":
            return 0.0
        keys = self.config.keys_of_step(global_batch_size)
        return min(float(steps), self.config.queue_size / keys)

    def health(self, output: StepOutput) -> dict[str, float]:
        """See `embedding_health`; of rank 0, whose queries are the first keys' own."""
        count = len(output.q) // (2 if self.config.symmetric else 1)
        keys = output.keys
        if keys is not None:
            keys = keys[: count * self.ranks.world_size]
        if not output.q.isfinite().all() or (keys is not None and not keys.isfinite().all()):
            return {}
        if self.config.dictionary != "queue" or output.keys is None:
            return embedding_health(output.q[:count], keys, None)
        last = len(output.keys)
        before = self.queue_ptr - last + torch.arange(last, device=self.queue.device)
        newest = before % self.queue.shape[1]
        return embedding_health(output.q[:count], keys, self.queue, newest=newest)

    def backward(
        self,
        view_q: Tensor,
        view_k: Tensor,
        *,
        sample_ids: NDArray[np.int64],
        step: int,
        accumulation: int = 1,
    ) -> StepOutput:
        """Gradients of this rank's samples against the dictionary as it is.

        Changes nothing but gradients and BN's notes of the batch.

        Args:
            view_q: N x 3 x S x S, this rank's part of the global batch, in position order.
            view_k: the other view of the same samples.
            sample_ids: N.
            step: number of the step since the start of the run: it seeds the shuffle.
            accumulation: parts that the queries, and the keys, go through the encoders in.
        """
        begin_statistics(self)
        halves = (
            [(view_q, view_k), (view_k, view_q)] if self.config.symmetric else [(view_q, view_k)]
        )
        count = len(view_q)
        part = count // accumulation
        assert part * accumulation == count, "accumulation divides a rank's batch: see check_world"
        q, keys, figures = [], [], []
        spans = self.ranks.spans
        for half, (of_q, of_k) in enumerate(halves):
            with spans.of(FORWARD, samples=count):
                k = self._keys(of_k, step=step, half=half, part=part)
            for start in range(0, count, part):
                rows = slice(start, start + part)
                with spans.of(FORWARD, samples=part):
                    queries = self._encode(self.encoder_q, of_q[rows])
                    loss, accuracy = self.dictionary.loss(
                        queries,
                        k,
                        sample_ids[rows],
                        rows=slice(
                            self.ranks.rank * count + start, self.ranks.rank * count + start + part
                        ),
                        step=step,
                        temperature=self.config.temperature,
                    )
                # The halves' losses are added, as in the published code, the parts' averaged.
                with spans.of(BACKWARD, samples=part):
                    (loss / accumulation).backward()  # type: ignore[no-untyped-call]  # torch's
                figures.append(torch.stack([loss.detach(), accuracy]))
                q.append(queries.detach())
            if k is not None:
                keys.append(k.detach())
        loss, accuracy = torch.stack(figures).mean(dim=0)
        return StepOutput(
            loss=loss,
            lookup_accuracy=accuracy,
            q=torch.cat(q),
            keys=torch.cat(keys) if keys else None,
            sample_ids=np.tile(sample_ids, len(halves)),
        )

    def statistics(self) -> list[Tensor]:
        """Both encoders' BN statistics of this batch, to be averaged over ranks in place."""
        return batch_statistics(self)

    @torch.no_grad()
    def update(self, output: StepOutput, *, is_finite: Tensor) -> None:
        """After the optimizer: BN's running statistics, the key encoder, then the dictionary.

        The moving average covers parameters only; BN buffers are each encoder's own.

        Args:
            is_finite: a tensor of one bool, the same on all ranks; where it is false, nothing of
                the model changes.
        """
        commit_statistics(self, is_finite=is_finite)
        with self.ranks.spans.of(KEY_UPDATE):
            self._follow(is_finite)
        with self.ranks.spans.of(ENQUEUE):
            self.dictionary.update(output.q, output.keys, output.sample_ids, is_finite=is_finite)

    def _follow(self, is_finite: Tensor) -> None:
        """One step of the key encoder's moving average."""
        if self.encoder_k is None:
            return
        followed: list[Tensor] = list(self.encoder_k.parameters())
        # A weight on the device, so that the host need not know whether the step counts.
        weight = (1 - self.config.momentum) * is_finite.to(followed[0].dtype)
        torch._foreach_lerp_(followed, [*self.encoder_q.parameters()], [weight] * len(followed))

    def _keys(self, views: Tensor, *, step: int, half: int, part: int) -> Tensor | None:
        """The keys of all ranks in position order, encoded in shuffled BN groups."""
        if self.encoder_k is None and not self.dictionary.keys_need_grad:
            return None
        if self._autocast is not None and views.dtype.itemsize > self._autocast.itemsize:
            views = views.to(self._autocast)  # the encoder would; before the exchange it is cheaper
        domain = self.config.shuffle_domain
        order = key_order(
            seed=self.seed,
            step=step,
            half=half,
            global_batch_size=len(views) * self.ranks.world_size,
            shuffle_domain=domain,
        )
        with self.ranks.spans.of(BN_SHUFFLE):
            shuffled = shuffle_rows(views, order, shuffle_domain=domain, ranks=self.ranks)
        encoder = self.encoder_q if self.encoder_k is None else self.encoder_k
        with torch.set_grad_enabled(self.dictionary.keys_need_grad):
            encoded = [self._encode(encoder, rows) for rows in torch.split(shuffled, part)]
            with self.ranks.spans.of(BN_SHUFFLE):
                return unshuffle_keys(torch.cat(encoded), order, ranks=self.ranks)

    def _encode(self, encoder: nn.Module, views: Tensor) -> Tensor:
        """N x C, unit length, in the precision of the weights whatever the encoder computes in."""
        weights = next(encoder.parameters())
        with torch.autocast(
            views.device.type, dtype=self._autocast, enabled=self._autocast is not None
        ):
            embedded: Tensor = encoder(normalised(views))
        return functional.normalize(embedded.to(weights.dtype), dim=1)


def _check_compiler(device: torch.device) -> None:
    """Compile something small: without a C compiler the first step would end in a traceback."""
    plus_one = torch.compile(_plus_one, options={"fx_graph_cache": False})
    try:
        plus_one(torch.zeros(8, device=device))
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as err:  # torch's and triton's have nothing else in common
        lines = str(err).splitlines()
        told = next((line for line in lines if "error: " in line), lines[0])
        raise ConfigError(
            f"run.compile: torch.compile does not work on this machine ({told.strip()}); install "
            "a C++ compiler and Python's headers (Debian: g++ libpython3-dev), or give "
            "--run.no-compile"
        ) from err


def _plus_one(numbers: Tensor) -> Tensor:
    return numbers + 1


def _dictionary(
    config: ModelConfig, *, seed: int, num_ids: int, ranks: Ranks
) -> KeyQueue | MemoryBank | EndToEnd:
    if config.dictionary == "queue":
        return KeyQueue(dim=config.dim, queue_size=config.queue_size, seed=seed)
    if config.dictionary == "memory_bank":
        return MemoryBank(
            dim=config.dim,
            num_rows=num_ids,
            num_negatives=config.queue_size,
            seed=seed,
            ranks=ranks,
        )
    return EndToEnd()


def check_shuffle(config: ModelConfig) -> None:
    """Refuse a shuffle that shuffles nothing.

    Raises:
        ConfigError: the domain is not at least two whole BN groups.
    """
    groups, rest = divmod(config.shuffle_domain, config.bn_sub_batch)
    if rest or groups < 2:
        raise ConfigError(
            f"model.shuffle_domain {config.shuffle_domain} must be at least two times "
            f"model.bn_sub_batch {config.bn_sub_batch} and a multiple of it: within one BN group a "
            "shuffle hides nothing"
        )


_PREFIX = "dictionary."


def _publish_names(
    module: nn.Module,  # noqa: ARG001  torch's signature
    state: dict[str, Any],
    prefix: str,
    metadata: dict[str, Any],  # noqa: ARG001  torch's signature
) -> None:
    inner = prefix + _PREFIX
    for name in [name for name in state if name.startswith(inner)]:
        state[prefix + name.removeprefix(inner)] = state.pop(name)


def _accept_published_names(
    module: nn.Module,
    state: dict[str, Any],
    prefix: str,
    *_torch: object,
) -> None:
    for name, _ in module.get_submodule("dictionary").named_buffers():
        if prefix + name in state:
            state[f"{prefix}{_PREFIX}{name}"] = state.pop(prefix + name)
