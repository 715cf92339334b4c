"""What a profile's rates say of more GPUs: a forecast under stated assumptions."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moco_scale.errors import ConfigError
from moco_scale.forecast import (
    ASSUMPTIONS,
    Cluster,
    Forecast,
    Inputs,
    Rates,
    Reading,
    Run,
    forecast,
)
from moco_scale.profiles import Profile
from moco_scale.settings import from_mapping

_IMAGES = 1e9
_GPUS_PER_NODE = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Scaling:
    """A forecast, or why there is none."""

    found: Forecast | None
    step_per_s: float
    assumptions: tuple[str, ...]
    missing: str
    """Empty where there is a forecast."""


def scaling_of(profile: Profile) -> Scaling:
    """For 1, 8, 64 and 512 GPUs, each with what one rank of the profile had."""
    try:
        inputs = _inputs(profile)
        return Scaling(
            found=forecast(inputs),
            step_per_s=inputs.rates.step_pairs_per_s or 0.0,
            assumptions=(*_assumed(inputs, profile), *ASSUMPTIONS),
            missing="",
        )
    except ConfigError as err:
        return Scaling(found=None, step_per_s=0.0, assumptions=(), missing=str(err))


def _inputs(profile: Profile) -> Inputs:
    data, model = _table(profile, "data"), _table(profile, "model")
    known = {
        name: data[name]
        for name in ("block_samples", "lanes_per_slot", "buffer_bytes", "prefetch_batches")
        if name in data
    }
    if "read_threads" in data:
        known["reads_in_flight"] = data["read_threads"]
    has_queue = "queue_size" in model and model.get("dictionary", "queue") == "queue"
    queue = {"queue_size": model["queue_size"]} if has_queue else {}
    run = {"images": _IMAGES, "gpus": 1, "global_batch_size": profile.batch_size, "epochs": 1.0}
    return Inputs(
        run=from_mapping(Run, {**run, **queue}),
        rates=from_mapping(Rates, profile.rates, path="rates."),
        cluster=Cluster(
            gpus_per_node=_GPUS_PER_NODE, cores_per_node=_GPUS_PER_NODE * profile.cores
        ),
        reading=from_mapping(Reading, known),
    )


def _table(profile: Profile, name: str) -> Mapping[str, Any]:
    table = profile.settings.get(name)
    return table if isinstance(table, Mapping) else {}


def _assumed(inputs: Inputs, profile: Profile) -> tuple[str, ...]:
    rates, cluster = inputs.rates, inputs.cluster
    lines = [
        f'a "GPU" is what one rank had here: {profile.cores} cores of '
        f"{profile.about.get('machine', 'machine not known')}",
        f"{_GPUS_PER_NODE} GPUs a node; {_IMAGES / 1e6:,.0f} million images, seen once",
        f"{cluster.gets_per_s_per_prefix:,.0f} GET/s, of {cluster.prefixes} prefix",
    ]
    if rates.node_gb_per_s is not None:
        lines.append(f"a node reads {rates.node_gb_per_s:.3g} GB/s: as much as one rank did here")
    return tuple(lines)
