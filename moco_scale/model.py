"""MoCo: a query encoder, its slow copy, and a dictionary of keys (He et al. 2019, Algorithm 1)."""

import copy
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from moco_scale.batch_shuffle import key_order, shuffle_rows, unshuffle_keys
from moco_scale.dictionary import KeyQueue
from moco_scale.distributed import Ranks
from moco_scale.encoders import BACKBONES
from moco_scale.errors import ConfigError
from moco_scale.group_norm import batch_statistics, commit_statistics
from moco_scale.loss import info_nce


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The method: encoder, dictionary, loss and shuffled batch normalisation."""

    backbone: str = "resnet50"
    """A ResNet of torchvision: resnet18/34/50/101, resnext50_32x4d or wide_resnet50_2."""
    dim: int = 128
    """Length of an embedding."""
    mlp_head: bool = True
    """Head of two layers (v2) instead of one (v1)."""
    stem: Literal["imagenet", "cifar"] = "imagenet"
    """First layers: 7x7 of stride 2 and pooling, or, for images of about 32 px, 3x3 of stride 1."""
    queue_size: int = 65536
    """Keys in the queue (K of the paper); at least data.global_batch_size."""
    momentum: float = 0.999
    """How much of the key encoder stays in a step (m of the paper)."""
    temperature: float = 0.2
    """Divides the cosines before the softmax (tau of the paper)."""
    bn_sub_batch: int = 32
    """Samples that batch normalisation sees together, whatever the batch of a rank is."""
    shuffle_domain: int = 256
    """Samples whose keys are permuted together, in BN groups: a multiple of bn_sub_batch."""

    def __post_init__(self) -> None:
        if self.backbone not in BACKBONES:
            raise ConfigError(
                f"model.backbone {self.backbone!r} is not known; choose {', '.join(BACKBONES)}"
            )
        for name in ("dim", "queue_size", "bn_sub_batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name} must be at least 1, not {getattr(self, name)}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"model.momentum must be in [0, 1), not {self.momentum}")
        if not self.temperature > 0:
            raise ValueError(f"model.temperature must be above 0, not {self.temperature}")


@dataclass(frozen=True, kw_only=True, slots=True)
class StepOutput:
    """What a forward pass gives, for the rest of the step."""

    loss: Tensor
    """Mean over this rank's samples, in nats."""
    lookup_accuracy: Tensor
    """How often this rank's positives score highest among 1 + K, 0-1."""
    q: Tensor
    """N x C, this rank's queries, detached."""
    keys: Tensor
    """The keys of all ranks in position order."""
    sample_ids: NDArray[np.int64]


class MoCo(nn.Module):
    """A step: forward, backward, average gradients and `statistics`, then `commit`, SGD, `update`.

    State-dict names are the published ones: encoder_q.*, encoder_k.*, queue, queue_ptr.
    """

    def __init__(self, encoder: nn.Module, config: ModelConfig, *, seed: int, ranks: Ranks) -> None:
        """
        Args:
            encoder: becomes the query encoder; its copy the key encoder. N x 3 x S x S to N x dim,
                its normalisation layers GroupBatchNorm2d.
            config: of the dictionary, the loss and the shuffle.
            seed: of the queue's first content and of the shuffle.
            ranks: the processes that a batch is divided over.

        Raises:
            ConfigError: the shuffle domain does not consist of at least two whole BN groups.
        """
        super().__init__()
        check_shuffle(config)
        self.encoder_q = encoder
        self.encoder_k = copy.deepcopy(encoder)
        self.encoder_k.requires_grad_(False)
        self.dictionary = KeyQueue(dim=config.dim, queue_size=config.queue_size, seed=seed)
        self.config = config
        self.seed = seed
        self.ranks = ranks
        # The dictionary's buffers carry their published names, without 'dictionary.' before them.
        self.register_state_dict_post_hook(_publish_names)  # type: ignore[no-untyped-call]  # torch's
        self.register_load_state_dict_pre_hook(_accept_published_names)  # type: ignore[no-untyped-call]  # torch's

    @property
    def queue(self) -> Tensor:
        """dim x K."""
        return self.dictionary.queue

    @property
    def queue_ptr(self) -> Tensor:
        """The next column of the queue to be replaced, a tensor of one number."""
        return self.dictionary.queue_ptr

    def forward(
        self, view_q: Tensor, view_k: Tensor, *, sample_ids: NDArray[np.int64], step: int
    ) -> StepOutput:
        """Loss of this rank's samples against the queue as it is; changes nothing but BN's notes.

        Args:
            view_q: N x 3 x S x S, this rank's part of the global batch, in position order.
            view_k: the other view of the same samples.
            sample_ids: N.
            step: number of the step since the start of the run: it seeds the shuffle.
        """
        dtype = self.queue.dtype  # embeddings are compared in full precision under autocast too
        q = functional.normalize(self.encoder_q(view_q).to(dtype), dim=1)
        keys = self._keys(view_k, step=step)
        own = keys[self.ranks.rank * len(q) : (self.ranks.rank + 1) * len(q)]
        with torch.autocast(device_type=q.device.type, enabled=False):
            logits, labels = self.dictionary.logits(q, own, sample_ids)
            loss, accuracy = info_nce(logits, labels, temperature=self.config.temperature)
        return StepOutput(
            loss=loss, lookup_accuracy=accuracy, q=q.detach(), keys=keys, sample_ids=sample_ids
        )

    def statistics(self) -> list[Tensor]:
        """Both encoders' BN statistics of this batch, to be averaged over ranks in place."""
        return batch_statistics(self)

    def commit(self) -> None:
        """Let the (averaged) BN statistics of this batch enter the running ones."""
        commit_statistics(self)

    @torch.no_grad()
    def update(self, output: StepOutput) -> None:
        """After the optimizer: the key encoder follows the query encoder, then keys are enqueued.

        The moving average covers parameters only; BN buffers are each encoder's own.
        """
        torch._foreach_lerp_(
            list(self.encoder_k.parameters()),
            list(self.encoder_q.parameters()),
            1 - self.config.momentum,
        )
        self.dictionary.update(output.q, output.keys, output.sample_ids)

    @torch.no_grad()
    def _keys(self, view_k: Tensor, *, step: int) -> Tensor:
        """The keys of all ranks in position order, encoded in shuffled BN groups."""
        if torch.is_autocast_enabled(view_k.device.type):
            # The first convolution would do it anyway; before the exchange it halves the bytes.
            view_k = view_k.to(torch.get_autocast_dtype(view_k.device.type))
        domain = self.config.shuffle_domain
        order = key_order(
            seed=self.seed,
            step=step,
            global_batch_size=len(view_k) * self.ranks.world_size,
            shuffle_domain=domain,
        )
        shuffled = shuffle_rows(view_k, order, shuffle_domain=domain, ranks=self.ranks)
        keys = functional.normalize(self.encoder_k(shuffled).to(self.queue.dtype), dim=1)
        return unshuffle_keys(keys, order, ranks=self.ranks)


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
