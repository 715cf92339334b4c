"""A run with an encoder that is quickly loaded, and its features of a set."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moco_scale.checkpoint import Checkpoint, save_checkpoint
from moco_scale.config import TrainConfig, to_mapping
from moco_scale.distributed import Ranks, one_rank
from moco_scale.embed import EmbedConfig, EmbedProgress, embed
from moco_scale.embedding import Embedding
from moco_scale.encoders import build_encoder
from moco_scale.model import ModelConfig
from pipelines import DataConfig
from shards.store import open_store

MODEL = ModelConfig(
    backbone="shufflenet_v2_x0_5",  # small, and quick to load
    dim=16,
    queue_size=64,
    bn_sub_batch=4,
    shuffle_domain=16,
    mlp_head=True,
)
POOLED = 1024
"""Numbers that its backbone gives."""
SMALL = EmbedConfig(batch_size=3, num_threads=1, device="cpu", loader="cpu")


def save_run(
    url: str, *, seed: int, step: int = 7, change: Callable[[dict[str, Any]], None] | None = None
) -> str:
    """A run with one checkpoint of an encoder that has seen nothing; the checkpoint's URL."""
    config = TrainConfig(model=MODEL, data=DataConfig(view_size=32))
    weights = build_encoder(MODEL, seed=seed).state_dict()
    model: dict[str, Any] = {f"encoder_q.{name}": one for name, one in weights.items()}
    if change is not None:
        change(model)
    checkpoint = Checkpoint(
        url="",
        step=step,
        model=model,
        optimizer={"state": {}, "param_groups": []},
        loader={},
        config=to_mapping(config),
        best=None,
        versions={},
        world_size=1,
    )
    return save_checkpoint(open_store(url), checkpoint, keep=9)


def make_embedding(
    shard_set: str,
    run: str,
    to: Path | str,
    *,
    ranks: Ranks | None = None,
    progress: Callable[[EmbedProgress], None] = lambda _: None,
    said: list[str] | None = None,
    **settings: Any,
) -> Embedding | None:
    return embed(
        shard_set,
        run,
        str(to),
        dataclasses.replace(SMALL, **settings),
        ranks=ranks or one_rank(),
        progress=progress,
        say=(said if said is not None else []).append,
    )
