"""A shard set as two views of each sample on the device, in an order that a seed alone decides."""

from pipelines.config import DataConfig
from pipelines.errors import (
    BadDataError,
    OrderError,
    PipelineError,
    StalledError,
    StateError,
)
from pipelines.loader import Batch, Loader
from pipelines.order import Order
from pipelines.quarantine import BadSample
from pipelines.stats import LoaderStats
from pipelines.streaming_loader import iterate_once, open_loader
from pipelines.synthetic import SyntheticLoader
from pipelines.views import IMAGE_MEAN, IMAGE_STD

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
