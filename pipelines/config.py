"""The data section of a run's settings; apart from the loaders, so that reading it needs none."""

from dataclasses import dataclass
from typing import Literal

HW_DECODER_LOAD = 0.65
"""DALI's default. Published figures: 0.9 is no faster from end to end and waits longer at worst.
Not measured here; benchmarks/gpu_input.py measures it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Where the samples come from, how they are batched and how a view is drawn."""

    shards: tuple[str, ...] = ()
    """URL or path of the shard set (the folder that holds manifest.parquet), or of several."""
    weights: tuple[float, ...] = ()
    """Share of each of several shard sets in every batch, relative; none: by their samples."""
    global_batch_size: int = 256
    """Samples per step over all ranks."""
    lanes_per_slot: int = 1
    """Lanes A = lanes_per_slot x global_batch_size; fixed for the life of a run."""
    block_samples: int = 64
    """Consecutive samples of a shard that one range request reads."""
    recipe: Literal["v1", "v2", "v2_gray", "cifar", "digits", "crop_flip"] = "v2"
    """Augmentation: the paper's (v1), MoCo v2's, v2 for grey images with no upright, digits, or
    crop and flip alone, as linear probes are trained."""
    view_size: int = 224
    """Height and width of a view, in pixels."""
    min_crop_area_frac: float = 0.2
    """Smallest part of the image's area that a random crop may cover."""
    colour: Literal["exact", "fast"] = "exact"
    """Colour jitter step by step as torchvision's, or as one matrix a view (other hue, no clipping
    between the steps)."""
    view_dtype: Literal["float32", "float16", "uint8"] = "float32"
    """Of the views as they are handed over: floats are normalised, uint8 is not yet."""
    loader: Literal["auto", "dali", "cpu"] = "auto"
    """What decodes and augments; auto takes DALI on a GPU."""
    mode: Literal["stream", "headspace", "synthetic"] = "stream"
    """stream; or, to find out who is the limit: headspace trains on the first batch for ever,
    synthetic reads nothing at all."""
    num_threads: int = 0
    """Decoding threads per rank; 0 takes the cores of this machine divided by its ranks."""
    hw_decoder_load: float = HW_DECODER_LOAD
    """Part of the JPEGs that go to the GPU's JPEG engine, 0 to 1, where DALI decodes on a GPU that
    has one."""
    read_threads: int = 16
    """Reads from the store that each rank may have under way."""
    prefetch_batches: int = 2
    """Batches that are made ready ahead of the step."""
    buffer_bytes: int = 1 << 30
    """Bound on encoded bytes held per rank, in flight and ready."""
    max_pixels: int = 89_478_485
    """Images of more pixels (width x height) are bad: they never reach a decoder."""
    max_bad_frac: float = 0.01
    """The run stops when more than this part of the samples had to be replaced."""
    wait_timeout_s: float = 120.0
    """Longest wait for a batch before the loader reports its stages and raises. A request to the
    store is tried again for 0.7 of it."""

    def __post_init__(self) -> None:
        for name in (
            "global_batch_size",
            "lanes_per_slot",
            "block_samples",
            "view_size",
            "read_threads",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"data.{name} must be at least 1, not {getattr(self, name)}")
        if not 0 <= self.hw_decoder_load <= 1:
            raise ValueError(f"data.hw_decoder_load must be in [0, 1], not {self.hw_decoder_load}")
        if self.weights and len(self.weights) != len(self.shards):
            raise ValueError(
                f"data.weights has {len(self.weights)} numbers for {len(self.shards)} data.shards; "
                "give one for each, or none"
            )
        if len(set(self.shards)) < len(self.shards):
            raise ValueError("data.shards names a shard set twice; give it a larger data.weights")
        if not 0 < self.min_crop_area_frac <= 1:
            raise ValueError(
                f"data.min_crop_area_frac must be in (0, 1], not {self.min_crop_area_frac}"
            )
