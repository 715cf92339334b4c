"""What a loader measured, as values with a meaning under each field."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class StageStats:
    """One stage of the loader, a thread of its own; totals since it was opened.

    The stage that waits neither for input nor for room is the one that the others wait for.
    """

    name: str
    batches: int
    """That it has finished."""
    ready: int
    """Of these, how many wait to be taken now. Always at the most: what comes after is slower."""
    work_s: float
    """Seconds of its own work."""
    wait_for_input_s: float
    """Seconds that it waited for what comes before: for `stream` the store, for `views` bytes."""
    wait_for_room_s: float
    """Seconds that it waited because what it had made was not taken. High: it is not the limit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamStats:
    """What was read from the store, and what is in memory."""

    read_bytes: int
    """Bytes that came from the store, of samples and what lies between them."""
    used_bytes: int
    """Bytes of the samples that were handed on."""
    read_requests: int
    """Range requests answered, retries not counted."""
    used_samples: int
    single_reads: int
    """Of the requests, those for one sample alone, because data.buffer_bytes had no room for its
    block."""
    index_reads: int
    """Indexes of shards that had to be there before their blocks."""
    retries: int
    """Attempts of the store that followed a failed one."""
    resumes: int
    """Of these, those that went on at the byte where a body broke off."""
    held_bytes: int
    """Bytes of blocks in memory now, those that batches further on still use included."""
    peak_held_bytes: int
    live_blocks: int
    """Blocks that lanes are in now."""

    @classmethod
    def none(cls) -> "StreamStats":
        """Before anything was read."""
        return cls(
            read_bytes=0, used_bytes=0, read_requests=0, used_samples=0, single_reads=0,
            index_reads=0, retries=0, resumes=0, held_bytes=0, peak_held_bytes=0, live_blocks=0,
        )  # fmt: skip

    @property
    def samples_per_request(self) -> float:
        """Near data.block_samples is ideal; 1: the bound has no room for blocks."""
        return self.used_samples / max(1, self.read_requests)

    @property
    def read_amplification(self) -> float:
        """Bytes read for each byte used; above 1.1: lanes are short, or blocks are read twice."""
        return self.read_bytes / max(1, self.used_bytes)


@dataclass(frozen=True, kw_only=True, slots=True)
class LoaderStats:
    """Totals since the loader was opened, for one rank."""

    samples: int
    """Source images handed to the training step, each counted once though it gives two views."""
    replaced: int
    """Samples that were bad and replaced by a substitute."""
    batch_wait_s: float
    """Seconds the step waited for a finished batch. Near 0: the step is the limit."""
    stages: tuple[StageStats, ...]
    """In the order that a batch goes through them; empty before the first batch."""
    stream: StreamStats
