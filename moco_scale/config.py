"""A training run's settings: defaults < presets, left to right < flags; checked together once."""

import argparse
import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from moco_scale.distributed import check_world
from moco_scale.errors import ConfigError
from moco_scale.model import ModelConfig, check_shuffle
from moco_scale.optim import OptimConfig
from moco_scale.settings import UsageError, from_mapping, parse_flags, read_preset
from moco_scale.trainer import RunConfig
from pipelines.config import DataConfig
from shards.errors import NotFoundError
from shards.store import open_store

CONFIG_FILE = "config.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Pretrain an encoder with MoCo from a shard set.

    Defaults < presets, left to right < flags. `--preset` takes a name (see moco_scale/presets), a
    TOML file or a run's config.json, and may be given several times. `--data URL` is short for
    `--data.shards`, `--out URL` for `--run.url`.
    """

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def validate(self, *, world_size: int) -> None:
        """Check what spans sections, once, after all layers and after the world is known.

        Raises:
            ConfigError: naming the settings that do not fit together.
        """
        data, model = self.data, self.model
        if not any(data.shards) and data.mode != "synthetic":
            raise ConfigError("no shard set: give --data URL (the SHARD_SET of 'moco-scale pack')")
        if not self.run.url:
            raise ConfigError(
                "no place for the run: give --out URL, where checkpoints and metrics go"
            )
        if model.dictionary == "queue" and model.queue_size < model.keys_of_step(
            data.global_batch_size
        ):
            twice = "twice " if model.symmetric else ""
            raise ConfigError(
                f"model.queue_size {model.queue_size} is below {twice}data.global_batch_size "
                f"{data.global_batch_size}, the keys of one step; raise the one or lower the other"
            )
        if model.dictionary == "memory_bank" and len(data.shards) > 1:
            raise ConfigError(
                "model.dictionary memory_bank has a row for each image of one shard set, and "
                f"data.shards has {len(data.shards)}; use model.dictionary queue"
            )
        if model.dictionary == "end_to_end" and self.optim.accumulation > 1:
            raise ConfigError(
                "model.dictionary end_to_end needs all keys of a step at once; "
                "set optim.accumulation to 1, or use model.dictionary queue"
            )
        if data.global_batch_size % model.shuffle_domain:
            raise ConfigError(
                f"data.global_batch_size {data.global_batch_size} is not a multiple of "
                f"model.shuffle_domain {model.shuffle_domain}; change one of them"
            )
        beyond = [rank for rank in self.run.torch_profile_ranks if rank >= world_size]
        if beyond:
            raise ConfigError(
                f"run.torch_profile_ranks has {beyond[0]}, and the {world_size} ranks are counted "
                "from 0"
            )
        check_shuffle(model)
        check_world(
            world_size,
            global_batch_size=data.global_batch_size,
            bn_sub_batch=model.bn_sub_batch,
            accumulation=self.optim.accumulation,
        )


def load_config(arguments: Sequence[str]) -> TrainConfig:
    """The settings of `moco-scale pretrain`, from its arguments.

    Raises:
        UsageError: an unknown flag, or a value that a flag cannot take.
        ConfigError: a preset that does not exist or holds an unknown key or a wrong value.
    """
    default, rest = split_presets(arguments)
    return parse_flags(TrainConfig, rest, prog="moco-scale pretrain", default=default)


def split_presets(arguments: Sequence[str]) -> tuple[TrainConfig, list[str]]:
    """What the presets among the arguments say, and the flags that are left, in their long form.

    Raises:
        UsageError, ConfigError: as `load_config`.
    """
    presets = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    presets.add_argument("--preset", action="append", default=[])
    try:
        found, rest = presets.parse_known_args(list(arguments))
    except SystemExit as err:
        raise UsageError("--preset needs a name or a file") from err
    merged: dict[str, Any] = {}
    for name in found.preset:
        _merge(merged, read_preset(name))
    return from_mapping(TrainConfig, merged), [_long_form(a) for a in rest]


def read_run_config(run_url: str) -> TrainConfig:
    """The settings that a run was started with.

    Raises:
        ConfigError: there is no run at this address.
    """
    try:
        saved = json.loads(bytes(open_store(run_url).read(CONFIG_FILE)))
    except NotFoundError as err:
        raise ConfigError(
            f"no run at {run_url}: it has no {CONFIG_FILE}; give the --out of 'moco-scale pretrain'"
        ) from err
    return from_mapping(TrainConfig, saved)


def to_mapping(config: TrainConfig) -> dict[str, Any]:
    """The settings as JSON-able nested dicts; `from_mapping` gives the same settings back."""
    saved: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return saved


def _merge(into: dict[str, Any], other: Mapping[str, Any]) -> None:
    for key, value in other.items():
        if isinstance(value, Mapping) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value


def _long_form(argument: str) -> str:
    # Not `--run`: before Python 3.12.7 torchrun takes it for its own `--run-path`, also behind -m.
    for short, long in (("--data", "--data.shards"), ("--out", "--run.url")):
        if argument == short or argument.startswith(f"{short}="):
            return long + argument[len(short) :]
    return argument
