"""The encoder that is evaluated, and the same network before training, as extractors."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray

from moco_scale.encoders import build_encoder, check_encoder
from moco_scale.features import Extract, Extractor, Views, encoder_key, encoder_output
from moco_scale.group_norm import GroupBatchNorm2d, estimate_bn_statistics
from moco_scale.labels import LabelledSamples
from moco_scale.model import ModelConfig
from moco_scale.trained import Trained, trained_encoder
from pipelines import iterate_once
from shards import ShardSet

TRAINED, RANDOM, FRESH = "trained", "random", "random, BN as initialised"
"""Names of rows in the tables."""

_STATISTICS_IMAGES = 2048


class Encoders:
    """The trained encoder and the random ones, as extractors."""

    def __init__(
        self,
        trained: Trained,
        *,
        seeds: Sequence[int],
        output: Literal["pooled", "embedding"],
        views: Views,
        device: torch.device,
    ) -> None:
        """
        Args:
            seeds: the random encoders are those of the run's seed + each of these.

        Raises:
            CheckpointError: the checkpoint is not of the architecture that the settings name.
            ConfigError: the encoder does not take views of this size.
        """
        self._model: ModelConfig = trained.config.model
        self._seeds = [trained.config.run.seed + seed for seed in seeds]
        self._output = output
        self._views = views
        self._device = device
        encoder = trained_encoder(trained)
        check_encoder(encoder, self._model, view_size=views.size)
        self._trained = encoder.to(device)
        self._has_bn = any(isinstance(layer, GroupBatchNorm2d) for layer in encoder.modules())
        self._key = encoder_key(self._trained, self._output)
        # One function object, so that all who look through this encoder share its forward pass.
        extracting = encoder_output(self._trained, self._output)
        self.trained = Extractor(name=TRAINED, key=self._key, open=lambda: extracting)

    def check_unchanged(self) -> None:
        """The published code's sanity check: an evaluation moves no weight and no statistic."""
        now = encoder_key(self._trained, self._output)
        assert now == self._key, "the encoder is not what it was before the evaluation"

    def random(self, shard_set: ShardSet, labelled: LabelledSamples) -> list[Extractor]:
        """The same network before training, for each seed, BN statistics estimated on some images.

        As initialised, they are 0 and 1, which no data has. That some images are told apart better
        with those all the same is why the first seed's network is there with them, too.
        """
        count = min(_STATISTICS_IMAGES, len(labelled.sample_ids))
        places = np.linspace(0, len(labelled.sample_ids) - 1, count).astype(np.int64)
        chosen = labelled.sample_ids[places]
        told = [shard_set.set_id, xxhash.xxh3_64_hexdigest(chosen.tobytes()), self._views.size]
        if not self._has_bn:  # nothing to estimate
            return [self._as_built(f"{RANDOM} {seed}", seed) for seed in self._seeds]
        return [
            *(self._random(seed, shard_set, chosen, told) for seed in self._seeds),
            self._as_built(FRESH, self._seeds[0]),
        ]

    def _as_built(self, name: str, seed: int) -> Extractor:
        encoder = build_encoder(self._model, seed=seed)
        extract = encoder_output(encoder.to(self._device).eval(), self._output)
        return Extractor(name=name, key=encoder_key(encoder, self._output), open=lambda: extract)

    def _random(
        self, seed: int, shard_set: ShardSet, chosen: NDArray[np.int64], told: Sequence[object]
    ) -> Extractor:
        fresh = build_encoder(self._model, seed=seed)
        opened: list[Extract] = []

        def open_encoder() -> Extract:
            if not opened:
                encoder = fresh.to(self._device)
                batches = iterate_once(
                    shard_set,
                    ordinals=chosen,
                    view_size=self._views.size,
                    batch_size=self._views.batch_size,
                    loader=self._views.loader,
                    num_threads=self._views.num_threads,
                    device_index=self._device.index,
                )
                estimate_bn_statistics(encoder, (images for _, images in batches))
                opened.append(encoder_output(encoder, self._output))
            return opened[0]

        return Extractor(
            name=f"{RANDOM} {seed}",
            key=encoder_key(fresh, self._output, *told),
            open=open_encoder,
        )
