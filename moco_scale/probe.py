"""Linear classifiers on frozen features: the published protocol, and L-BFGS as the fast way."""

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from moco_scale.features import Extract, Show, Views
from pipelines import DataConfig, open_loader
from shards import Store
from shards.errors import NotFoundError

PENALTIES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Weights of the squared length of the classifier, among which `fit_logistic` chooses."""
_HELD_OUT = 5
_MOST_LBFGS_STEPS = 200
_STEPS_TO_CHOOSE = 30
_MOST_PRODUCTS_OF_A_THREAD = 10**8


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbeRecipe:
    """SGD on a linear classifier. The defaults are the paper's (He et al. 2019, section 4.1).

    The encoder is frozen in evaluation mode: its BN uses, and never moves, the running statistics.
    """

    lrs: tuple[float, ...] = (30.0,)
    """A head for each, trained on the same features."""
    epochs: int = 100
    batch_size: int = 256
    """Another batch size needs other learning rates."""
    sgd_momentum: float = 0.9
    weight_decay: float = 0.0
    milestones: tuple[float, ...] = (0.6, 0.8)
    """Parts of the epochs after which the learning rate is multiplied by `decay`."""
    decay: float = 0.1

    def lr_factor(self, epoch: int) -> float:
        """What the learning rate is multiplied by in an epoch, counted from 0."""
        passed = sum(epoch >= round(part * self.epochs) for part in self.milestones)
        return self.decay**passed


PAPER = ProbeRecipe()


def probe_views(shards: str, *, views: Views, batch_size: int) -> DataConfig:
    """The protocol's training views: a random crop of 8 to 100 % of the area, and a flip."""
    return DataConfig(
        shards=(shards,),
        recipe="crop_flip",
        min_crop_area_frac=0.08,
        global_batch_size=batch_size,
        view_size=views.size,
        loader=views.loader,
        num_threads=views.num_threads,
    )


class Heads:
    """Linear classifiers that share one forward pass of the encoder, a learning rate each."""

    def __init__(
        self,
        recipe: ProbeRecipe,
        *,
        num_features: int,
        num_classes: int,
        seed: int,
        device: torch.device | None = None,
    ) -> None:
        """Weights are drawn from N(0, 0.01), the same for every head; biases are 0."""
        self.recipe = recipe
        draw = torch.Generator().manual_seed(seed)
        start = torch.empty(num_classes, num_features).normal_(0.0, 0.01, generator=draw)
        self.layers = nn.ModuleList()
        for _ in recipe.lrs:
            layer = nn.Linear(num_features, num_classes, device="meta").to_empty(device="cpu")
            layer.weight.data.copy_(start)
            layer.bias.data.zero_()
            self.layers.append(layer.to(device))
        self._sgd = torch.optim.SGD(
            [
                {"params": list(layer.parameters()), "lr": lr}
                for layer, lr in zip(self.layers, recipe.lrs, strict=True)
            ],
            momentum=recipe.sgd_momentum,
            weight_decay=recipe.weight_decay,
        )

    def step(self, features: Tensor, labels: Tensor, *, epoch: int) -> None:
        """One update of every head.

        Args:
            features: N x D of the frozen encoder, as they enter its head: not normalised.
            labels: N class numbers.
        """
        for group, lr in zip(self._sgd.param_groups, self.recipe.lrs, strict=True):
            group["lr"] = lr * self.recipe.lr_factor(epoch)
        losses = [functional.cross_entropy(layer(features), labels) for layer in self.layers]
        self._sgd.zero_grad()
        torch.autograd.backward(losses)
        self._sgd.step()

    @torch.no_grad()
    def guesses(self, features: Tensor) -> list[Tensor]:
        """Of each head, N class numbers; -1 where a head that diverged says nothing."""
        found = []
        for layer in self.layers:
            logits = layer(features)
            found.append(torch.where(logits.isfinite().all(1), logits.argmax(1), -1))
        return found

    def state_dict(self) -> dict[str, Any]:
        return {"layers": self.layers.state_dict(), "sgd": self._sgd.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.layers.load_state_dict(state["layers"])
        self._sgd.load_state_dict(state["sgd"])


class Rebatcher:
    """Rows in batches of one size, whatever comes in."""

    def __init__(self, batch_size: int) -> None:
        self._batch_size = batch_size
        self._held: list[tuple[Tensor, Tensor]] = []

    def push(self, features: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches that are full with these rows."""
        self._held.append((features, labels))
        while sum(len(part) for _, part in self._held) >= self._batch_size:
            rows, classes = self.rest()
            self._held = [(rows[self._batch_size :], classes[self._batch_size :])]
            yield rows[: self._batch_size], classes[: self._batch_size]

    def rest(self) -> tuple[Tensor, Tensor]:
        """What fills no batch, and is not held any more."""
        rows, classes = (torch.cat(column) for column in zip(*self._held, strict=True))
        self._held.clear()
        return rows, classes


@dataclass(frozen=True, kw_only=True, slots=True)
class Learner:
    """One set of heads: what it looks at, and which images it may learn from."""

    name: str
    extract: Extract
    """Frozen; learners that share it share its forward pass."""
    heads: Heads
    may_learn: NDArray[np.bool_]
    """N, of the labelled images."""


def train_heads(
    learners: Sequence[Learner],
    config: DataConfig,
    *,
    sample_ids: NDArray[np.int64],
    labels: NDArray[np.int64],
    recipe: ProbeRecipe,
    seed: int,
    device: torch.device,
    saved: Store,
    path: str,
    show: Show,
) -> None:
    """Train heads on random views as the paper does; what an interrupted training saved goes on.

    An epoch leaves out the few images that fill no batch of the loader, others each time.

    Args:
        config: see `probe_views`.
        sample_ids: N, ascending: the labelled images of the set.
        labels: their class numbers.
        seed: of the order and the views.
        path: of the state in `saved`, written after every epoch.
    """
    loader = open_loader(config, seed=seed, rank=0, world_size=1, device_index=device.index)
    with closing(loader):
        first = _go_on(learners, loader, saved, path)
        for epoch in range(first, recipe.epochs):
            waiting = [Rebatcher(recipe.batch_size) for _ in learners]
            for _ in range(loader.steps_per_epoch):
                batch = next(loader)
                places = np.searchsorted(sample_ids, batch.sample_ids)
                places[places == len(sample_ids)] = 0
                is_labelled = sample_ids[places] == batch.sample_ids
                features = _features_once(learners, batch.view_q)
                for learner, rows in zip(learners, waiting, strict=True):
                    wanted = np.flatnonzero(is_labelled & learner.may_learn[places])
                    found = features[id(learner.extract)][torch.from_numpy(wanted).to(device)]
                    truth = torch.from_numpy(labels[places[wanted]]).to(device)
                    for full in rows.push(found, truth):
                        learner.heads.step(*full, epoch=epoch)
            for learner, rows in zip(learners, waiting, strict=True):
                last = rows.rest()
                if len(last[1]):
                    learner.heads.step(*last, epoch=epoch)
            written = io.BytesIO()
            heads = [learner.heads.state_dict() for learner in learners]
            torch.save({"epoch": epoch + 1, "heads": heads, "loader": loader.state_dict()}, written)
            saved.put(path, written.getvalue())
            show("linear probe, epochs", epoch + 1, recipe.epochs)


def _go_on(learners: Sequence[Learner], loader: Any, saved: Store, path: str) -> int:
    """Fill heads and loader with what was saved; the epoch to begin with."""
    try:
        data = bytes(saved.read(path))
    except NotFoundError:
        return 0
    state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    for learner, heads in zip(learners, state["heads"], strict=True):
        learner.heads.load_state_dict(heads)
    loader.load_state_dict(state["loader"])
    return int(state["epoch"])


@torch.no_grad()
def _features_once(learners: Sequence[Learner], images: Tensor) -> Mapping[int, Tensor]:
    extracts: dict[int, Callable[[Tensor], Tensor]] = {
        id(learner.extract): learner.extract for learner in learners
    }
    return {number: extract(images).float() for number, extract in extracts.items()}


@dataclass(frozen=True, kw_only=True, slots=True)
class Logistic:
    """A fitted multinomial logistic regression."""

    weight: Tensor
    """C x D, of features whose training rows have mean 0 and standard deviation 1."""
    bias: Tensor
    """C."""
    mean: Tensor
    """D, of the training rows."""
    scale: Tensor
    """D, their standard deviation."""
    penalty: float
    """The chosen one."""

    def __call__(self, features: Tensor) -> Tensor:
        """N x C logits of N x D features."""
        return functional.linear((features - self.mean) / self.scale, self.weight, self.bias)


def fit_logistic(
    features: Tensor,
    labels: Tensor,
    *,
    penalties: Sequence[float] = PENALTIES,
    num_classes: int | None = None,
) -> Logistic:
    """Minimise cross-entropy + penalty / 2 x squared weights by L-BFGS, on standardised features.

    Of several penalties the one is taken that does best on a fifth of the rows, held out while it
    is chosen, and all rows are fitted with it.

    Args:
        features: N x D.
        labels: N class numbers.
        num_classes: None: the largest label and one.
    """
    classes = num_classes or int(labels.max()) + 1
    mean = features.mean(0)
    scale = features.std(0, correction=0)
    scale = torch.where(scale > 1e-6 * scale.max(), scale, torch.ones_like(scale))
    scaled = (features - mean) / scale
    chosen = penalties[0]
    if len(penalties) > 1:
        # Interleaved within classes: each has its part on both sides.
        order = torch.argsort(labels, stable=True)
        is_held = torch.zeros(len(labels), dtype=torch.bool, device=labels.device)
        is_held[order[_HELD_OUT - 1 :: _HELD_OUT]] = True
        right: list[float] = []
        start = scaled.new_zeros(classes, 1 + scaled.shape[1])
        descending = sorted(penalties, reverse=True)
        for penalty in descending:  # each begins where the stronger one ended
            start = _minimise(
                scaled[~is_held], labels[~is_held], start, penalty, steps=_STEPS_TO_CHOOSE
            )
            guess = (scaled[is_held] @ start[:, 1:].T + start[:, 0]).argmax(1)
            right.append(float((guess == labels[is_held]).double().mean()))
        chosen = descending[max(range(len(right)), key=right.__getitem__)]
    zero = scaled.new_zeros(classes, 1 + scaled.shape[1])
    found = _minimise(scaled, labels, zero, chosen, steps=_MOST_LBFGS_STEPS)
    return Logistic(weight=found[:, 1:], bias=found[:, 0], mean=mean, scale=scale, penalty=chosen)


def _minimise(
    scaled: Tensor, labels: Tensor, start: Tensor, penalty: float, *, steps: int
) -> Tensor:
    """C x (1 + D): bias and weights."""
    with _few_threads(scaled.numel() * len(start)):
        return _search(scaled, labels, start, penalty, steps=steps)


@contextmanager
def _few_threads(products: int) -> Iterator[None]:
    """So small products take one thread: several would wait for each other, and for others."""
    threads = torch.get_num_threads()
    if products < _MOST_PRODUCTS_OF_A_THREAD:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _search(scaled: Tensor, labels: Tensor, start: Tensor, penalty: float, *, steps: int) -> Tensor:
    both = start.clone().requires_grad_()
    search = torch.optim.LBFGS(
        [both], max_iter=steps, history_size=10, tolerance_grad=1e-7,
        tolerance_change=torch.finfo(both.dtype).eps,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure() -> float:
        search.zero_grad()
        loss = functional.cross_entropy(scaled @ both[:, 1:].T + both[:, 0], labels)
        loss = loss + penalty / 2 * both[:, 1:].square().sum()
        torch.autograd.backward(loss)
        return float(loss.detach())

    search.step(closure)  # type: ignore[no-untyped-call]  # torch has no types for it
    return both.detach()
