"""A shard set as two views of each sample on the device, in an order that a seed alone decides."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from pipelines.config import DataConfig
from pipelines.errors import (
    BadDataError,
    OrderError,
    PipelineError,
    StalledError,
    StateError,
)
from pipelines.order import Order
from pipelines.quarantine import BadSample
from pipelines.stats import LoaderStats
from pipelines.views import IMAGE_MEAN, IMAGE_STD

if TYPE_CHECKING:
    from pipelines.loader import Batch, Loader
    from pipelines.streaming_loader import iterate_once, open_loader
    from pipelines.synthetic import SyntheticLoader

__all__ = [
    "BadDataError",
    "BadSample",
    "Batch",
    "DataConfig",
    "IMAGE_MEAN",
    "IMAGE_STD",
    "Loader",
    "LoaderStats",
    "Order",
    "OrderError",
    "PipelineError",
    "StalledError",
    "StateError",
    "SyntheticLoader",
    "iterate_once",
    "open_loader",
]

_LOAD_TORCH = {
    "Batch": "pipelines.loader",
    "Loader": "pipelines.loader",
    "SyntheticLoader": "pipelines.synthetic",
    "iterate_once": "pipelines.streaming_loader",
    "open_loader": "pipelines.streaming_loader",
}


def __getattr__(name: str) -> Any:
    """What loads torch, when it is first used: the order and `moco-scale shuffle` do without."""
    if name not in _LOAD_TORCH:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(import_module(_LOAD_TORCH[name]), name)
    return found
