"""Linear probes against the published protocol written out plainly, and against SciPy."""

import copy
import hashlib
import io

import numpy as np
import pytest
import torch
import torchvision
from scipy.optimize import minimize
from torch import Tensor, nn
from torch.nn import functional

from moco_scale.encoders import build_encoder, pooled_features
from moco_scale.features import Views
from moco_scale.model import ModelConfig
from moco_scale.probe import PAPER, Heads, ProbeRecipe, fit_logistic, probe_views
from pipelines.views import ViewRecipe, recipe_of

STEPS_PER_EPOCH, EPOCHS, CLASSES = 5, 10, 3


def published_probe(
    encoder: nn.Module, batches: list[tuple[Tensor, Tensor]], *, lr: float, seed: int
) -> nn.Linear:
    """main_lincls.py of facebookresearch/moco at 78b69ca, its lines in its order, on one process.

    The model is torchvision's own, with BatchNorm2d, filled with the encoder's weights.
    """
    model = torchvision.models.resnet18(num_classes=CLASSES)
    for name, param in model.named_parameters():
        if name not in ["fc.weight", "fc.bias"]:
            param.requires_grad = False
    torch.manual_seed(seed)
    model.fc.weight.data.normal_(mean=0.0, std=0.01)
    model.fc.bias.data.zero_()
    backbone = {k: v for k, v in encoder.state_dict().items() if not k.startswith("fc.")}
    missing = model.load_state_dict(backbone, strict=False)
    assert set(missing.missing_keys) == {"fc.weight", "fc.bias"}
    criterion = nn.CrossEntropyLoss()
    parameters = list(filter(lambda p: p.requires_grad, model.parameters()))
    assert len(parameters) == 2
    optimizer = torch.optim.SGD(parameters, lr, momentum=0.9, weight_decay=0.0)
    for epoch in range(EPOCHS):
        now = lr
        for milestone in [6, 8]:  # 60 and 80 of 100
            now *= 0.1 if epoch >= milestone else 1.0
        for group in optimizer.param_groups:
            group["lr"] = now
        model.eval()
        for images, target in batches[epoch * STEPS_PER_EPOCH : (epoch + 1) * STEPS_PER_EPOCH]:
            output = model(images)
            loss = criterion(output, target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.fc


@pytest.fixture(scope="module")
def encoder() -> nn.Module:
    """A ResNet-18 whose BN statistics are not those of any one batch."""
    built = build_encoder(ModelConfig(backbone="resnet18", dim=8, bn_sub_batch=4), seed=1)
    draw = torch.Generator().manual_seed(2)
    for layer in built.modules():
        if isinstance(layer, nn.BatchNorm2d):
            assert layer.running_mean is not None
            assert layer.running_var is not None
            layer.running_mean.normal_(0, 0.1, generator=draw)
            layer.running_var.uniform_(0.5, 1.5, generator=draw)
    return built


@pytest.fixture(scope="module")
def batches() -> list[tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(3)
    return [
        (
            torch.randn(8, 3, 32, 32, generator=draw),
            torch.randint(0, CLASSES, (8,), generator=draw),
        )
        for _ in range(EPOCHS * STEPS_PER_EPOCH)
    ]


def fingerprint(module: nn.Module) -> str:
    written = io.BytesIO()
    torch.save(list(module.state_dict().values()), written)
    return hashlib.sha256(written.getvalue()).hexdigest()


def test_the_probe_is_the_published_protocol_weight_for_weight_over_50_steps(
    encoder: nn.Module, batches: list[tuple[Tensor, Tensor]]
) -> None:
    lrs = (30.0, 3.0, 0.1)
    before, fixed = fingerprint(encoder), pooled_features(encoder, batches[0][0])
    recipe = ProbeRecipe(lrs=lrs, epochs=EPOCHS, batch_size=8)
    heads = Heads(recipe, num_features=512, num_classes=CLASSES, seed=4)

    for step, (images, labels) in enumerate(batches):
        with torch.no_grad():
            features = pooled_features(encoder, images)
        heads.step(features, labels, epoch=step // STEPS_PER_EPOCH)

    for lr, head in zip(lrs, heads.layers, strict=True):
        plain = published_probe(encoder, batches, lr=lr, seed=4)
        assert plain.weight.abs().max() > 0.1  # far from where it began
        assert torch.equal(head.weight, plain.weight)
        assert torch.equal(head.bias, plain.bias)
    assert fingerprint(encoder) == before
    assert torch.equal(pooled_features(encoder, batches[0][0]), fixed)


def test_the_papers_recipe() -> None:
    assert (
        ProbeRecipe(
            lrs=(30.0,),
            epochs=100,
            batch_size=256,
            sgd_momentum=0.9,
            weight_decay=0.0,
            milestones=(0.6, 0.8),
            decay=0.1,
        )
        == PAPER
    )
    assert [PAPER.lr_factor(epoch) for epoch in (0, 59, 60, 79, 80, 99)] == pytest.approx(
        [1, 1, 0.1, 0.1, 0.01, 0.01]
    )


def test_the_papers_training_views_are_a_crop_and_a_flip() -> None:
    views = Views(size=224, batch_size=64, loader="cpu", num_threads=1)

    config = probe_views("set", views=views, batch_size=256)

    assert recipe_of(config) == ViewRecipe(
        crop_area_frac=(0.08, 1.0),
        crop_ratio=(3 / 4, 4 / 3),
        flip_horizontal_prob=0.5,
        blur_sigma=(0.1, 2.0),
        blur_prob=0.0,
    )


def test_one_forward_serves_all_heads_as_if_each_were_alone() -> None:
    draw = torch.Generator().manual_seed(0)
    features, labels = torch.randn(64, 5, generator=draw), torch.arange(64) % 2
    together = Heads(ProbeRecipe(lrs=(1.0, 0.1), epochs=4), num_features=5, num_classes=2, seed=0)
    alone = Heads(ProbeRecipe(lrs=(0.1,), epochs=4), num_features=5, num_classes=2, seed=0)

    for epoch in range(4):
        together.step(features, labels, epoch=epoch)
        alone.step(features, labels, epoch=epoch)

    assert torch.equal(together.layers[1].weight, alone.layers[0].weight)
    assert not torch.equal(together.layers[0].weight, alone.layers[0].weight)


def test_heads_go_on_from_what_was_saved() -> None:
    draw = torch.Generator().manual_seed(0)
    features, labels = torch.randn(32, 4, generator=draw), torch.arange(32) % 2
    recipe = ProbeRecipe(lrs=(3.0,), epochs=6)
    straight = Heads(recipe, num_features=4, num_classes=2, seed=0)
    begun = Heads(recipe, num_features=4, num_classes=2, seed=0)
    for epoch in range(6):
        straight.step(features, labels, epoch=epoch)
    for epoch in range(3):
        begun.step(features, labels, epoch=epoch)

    resumed = Heads(recipe, num_features=4, num_classes=2, seed=9)
    resumed.load_state_dict(copy.deepcopy(begun.state_dict()))
    for epoch in range(3, 6):
        resumed.step(features, labels, epoch=epoch)

    assert torch.equal(resumed.layers[0].weight, straight.layers[0].weight)


def test_lbfgs_finds_the_minimum_that_scipy_finds() -> None:
    draw = np.random.default_rng(0)
    features = draw.normal(size=(120, 6)) * np.array([1, 5, 0.1, 1, 1, 2]) + 3
    labels = draw.integers(0, 3, 120)
    penalty = 0.01
    scaled = (features - features.mean(0)) / features.std(0)

    def objective(flat: np.ndarray) -> float:  # type: ignore[type-arg]  # of float64
        weight, bias = flat[:18].reshape(3, 6), flat[18:]
        logits = scaled @ weight.T + bias
        top = logits.max(1, keepdims=True)
        log_sum = top[:, 0] + np.log(np.exp(logits - top).sum(1))
        loss = (log_sum - logits[np.arange(120), labels]).mean()
        return float(loss + penalty / 2 * (weight**2).sum())

    expected = minimize(objective, np.zeros(21), method="BFGS", options={"gtol": 1e-8}).x

    head = fit_logistic(torch.tensor(features), torch.tensor(labels), penalties=(penalty,))

    np.testing.assert_allclose(head.weight.numpy(), expected[:18].reshape(3, 6), atol=1e-4)
    logits = head(torch.tensor(features)).numpy()
    wanted = scaled @ expected[:18].reshape(3, 6).T + expected[18:]
    np.testing.assert_allclose(
        logits - logits.mean(1, keepdims=True), wanted - wanted.mean(1, keepdims=True), atol=1e-3
    )


def test_the_penalty_is_chosen_on_images_that_were_not_fitted() -> None:
    draw = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 2
    # One feature that tells, 200 of noise: without a penalty the fit is perfect and useless.
    telling = labels[:, None] * 1.5 + torch.randn(60, 1, generator=draw)
    features = torch.cat([telling, torch.randn(60, 200, generator=draw)], dim=1)

    chosen = fit_logistic(features, labels, penalties=(1e-6, 1.0))

    assert chosen.penalty == 1.0


def test_a_feature_that_never_changes_does_not_matter() -> None:
    labels = torch.arange(20) % 2
    features = torch.stack([labels.double(), torch.full((20,), 7.0, dtype=torch.float64)], dim=1)

    head = fit_logistic(features, labels, penalties=(0.01,))

    assert head(features).isfinite().all()
    assert (head(features).argmax(1) == labels).all()
    assert functional.cross_entropy(head(features), labels) < 0.5
