"""Folders of images in classes, and runs whose encoder was never trained."""

import io
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from moco_scale.checkpoint import Checkpoint, save_checkpoint
from moco_scale.config import CONFIG_FILE, TrainConfig, to_mapping
from moco_scale.encoders import build_encoder
from moco_scale.metrics import MetricsLog, StepMetrics
from moco_scale.model import ModelConfig
from moco_scale.trainer import RunConfig
from pipelines import DataConfig
from shards.store import open_store

COLOURS = {"blue": (40, 60, 200), "green": (40, 180, 60), "red": (200, 50, 40)}


def coloured(colour: tuple[int, int, int], *, seed: int, size: tuple[int, int] = (48, 40)) -> bytes:
    """A PNG of a few blots in and around one colour."""
    draw = np.random.default_rng(seed)
    blots = draw.normal(colour, 45, (4, 5, 3)).clip(0, 255).astype(np.uint8)
    written = io.BytesIO()
    Image.fromarray(blots).resize(size, Image.Resampling.BICUBIC).save(written, "PNG")
    return written.getvalue()


def make_folders(folder: Path, *, each: int, seed: int = 0) -> Path:
    """A folder a colour, `each` images in it of several sizes."""
    for number, (name, colour) in enumerate(COLOURS.items()):
        (folder / name).mkdir(parents=True)
        for one in range(each):
            size = (40 + 3 * (one % 5), 36 + 2 * (one % 7))
            data = coloured(colour, seed=seed + 1000 * number + one, size=size)
            (folder / name / f"{name} {one:02}.png").write_bytes(data)
    return folder


def make_run(
    url: Path,
    shards: str,
    *,
    weights: dict[str, Tensor] | None = None,
    backbone: str = "resnet18",
    view_size: int = 32,
    seed: int = 0,
    batch: int = 16,
    queue: int = 64,
) -> str:
    """A run with one checkpoint, of the encoder as it begins or of these weights; its URL."""
    config = TrainConfig(
        data=DataConfig(
            shards=(shards,),
            global_batch_size=batch,
            view_size=view_size,
            loader="cpu",
            num_threads=1,
        ),
        model=ModelConfig(
            backbone=backbone, dim=8, queue_size=queue, bn_sub_batch=4, shuffle_domain=batch
        ),
        run=RunConfig(url=str(url), seed=seed),
    )
    encoder = weights or build_encoder(config.model, seed=5).state_dict()
    store = open_store(str(url))
    store.put(CONFIG_FILE, json.dumps(to_mapping(config)).encode())
    checkpoint = Checkpoint(
        url="",
        step=3,
        model={f"encoder_q.{name}": tensor for name, tensor in encoder.items()},
        optimizer={"state": {0: {"momentum_buffer": torch.ones(3)}}, "param_groups": []},
        loader={"epoch": 0},
        config=to_mapping(config),
        best=None,
        versions={"torch": str(torch.__version__)},
        world_size=1,
    )
    save_checkpoint(store, checkpoint, keep=1)
    return str(url)


def add_metrics(run: str, *, rows: int = 12, samples_per_s: float = 100.0) -> None:
    """Figures as of a run of so many rows, ten steps a row, which learned something."""
    log = MetricsLog(open_store(run), rank=0, ledger=False, first_step=1)
    for row in range(1, rows + 1):
        log.add(
            StepMetrics(
                step=10 * row,
                epoch=row / 2,
                loss=4.0 - row / 8,
                lookup_accuracy=row / (2 * rows),
                lr=0.03 * (1 - row / (rows + 1)),
                grad_norm=1 + row / 10,
                samples_per_s=samples_per_s * (0.5 if row == 1 else 1 + 0.01 * (row % 3)),
                step_s=16 / samples_per_s,
                data_wait_frac=0.02 * (row % 4),
                checkpoint_stall_ms=20.0 if row % 6 == 0 else 0.0,
                queue_filled_frac=1.0,
                world_size=1,
                last_step=10 * rows,
                skipped_steps=0,
                queue_age_steps=4.0,
                memory_bytes=3 << 29,
                alignment=1.2,
                uniformity=-1.5 - row / 20,
                effective_rank=2 + row / 4,
                duplicate_key_frac=0.1,
                knn_accuracy=0.5 + row / 100 if row % 6 == 0 else None,
            )
        )
    log.flush(next_step=10 * rows + 1)
