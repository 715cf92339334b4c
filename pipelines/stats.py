"""What a loader measured, as values with a meaning under each field."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class LoaderStats:
    """Totals since the loader was opened, for one rank."""

    samples: int
    """Source images handed to the training step, each counted once though it gives two views."""
    replaced: int
    """Samples that were bad and replaced by a substitute."""
    read_bytes: int
    """Bytes that came from the store."""
    read_requests: int
    """Range requests sent; samples / read_requests near block_samples is ideal."""
    read_wait_s: float
    """Seconds that decoding waited for bytes. High: the store or the network is the limit."""
    decode_s: float
    """Seconds decoding and augmenting. High while read_wait_s is low: add decoding threads."""
    batch_wait_s: float
    """Seconds the step waited for a finished batch. Near 0: the step is the limit."""
