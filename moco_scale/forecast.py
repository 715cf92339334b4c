"""What a cluster would need to train on so many images, and which resource runs out first.

Every resource allows each GPU at most so many samples/s. The smallest of these is what is reached
(`Scale.samples_per_s`), and its name is what bounds the run. A GPU, or rank, takes b samples a
step; b is the same at every number of GPUs, because the step rate is only known for it.

    GPU step          the stated rate
    host cores        cores of a node / its GPUs / core-seconds a sample
    GPU decode        the stated rate
    node network      bytes/s of a node / its GPUs / bytes read for a sample
    store bandwidth   bytes/s of the store / GPUs / bytes read for a sample
    store requests    GET/s of all prefixes / GPUs / GETs for a sample
    reads in flight   W / (GETs for a sample x mean latency)
    read tail         see below

Bytes and GETs for a sample: a lane of L = images / lanes samples touches at most L + block - 1
(pipelines/order.py; measured in benchmarks/results/loaders_cpu2_202611.md, section 2), so the read
amplification is a = (L + block - 1) / L, and a / block GETs bring a sample. Where the blocks of a
rank's lanes exceed its buffer, a part of the samples costs a GET each, by the stream's own rule.

Reads in flight: Little's law (Little 1961, Operations Research 9, 383), reads under way = reads/s x
latency. Under way are at most W: the reading threads, or the GETs of the batches planned ahead.

Read tail: a batch's reads begin P steps before it is needed (`_Reads.steps_hidden`), so that reads
of up to P s, where s is the step's time, cost nothing. Take one read in a hundred to last the 99th
percentile p, the others to be on time, and all to be independent; every rank waits for the latest.
A step has such a read with q = 1 - 0.99^(reads of all ranks): the tail at scale (Dean and Barroso
2013, CACM 56(2)). It stalls the step by p - P s; the reads that began before the stall gain as
much, so that none of the next P - 1 batches stalls again. From one stall to the next there are thus
P - 1 + 1/q steps, and a step takes

    s + max(0, p - P s) / (P - 1 + 1/q)

With s = 0, b over this is the tail's own limit. What is slower than p is not in it. Against a
simulation of the stream's planning (tests/moco_scale/test_forecast.py) a step is within 5 % where
the mean latency is below P s; above it the stream plans further ahead, and waits down to half as
long as this says.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

from moco_scale.errors import ConfigError
from shards.bill import TAR_BYTES_PER_OBJECT, Prices

GPUS = (8, 64, 512)
"""Numbers of GPUs that are always shown."""
MOST_GPUS = 1_000_000
"""Nothing is looked for beyond."""
READ_PER_CORE = 27_000.0
"""Samples/s that a core reads out of S3 and checks, where no other rate is stated: measured on an
AMD EPYC in benchmarks/results/loaders_cpu2_202611.md, section 1."""
PLANNED_AHEAD, PLANNED_AT_MOST = 8, 32
"""Of pipelines/stream.py: batches whose reads begin before they are needed, and how many they may
be while reads are late."""
ASSUMPTIONS = (
    "a GPU takes as many samples a step, at the same rate, at any number",
    "the step rate has all-reduce in it; GPU decoding takes nothing from it",
    "the stated network is for reading alone; nothing leaves the region",
    "retries, index reads, short blocks at shards' ends, checkpoints: none",
    "of 100 reads one lasts the p99, none longer; reads are independent",
)
"""What a forecast takes for granted."""

_BYTES_PER_NUMBER = 4  # queue and memory bank are float32
_HOURS_PER_MONTH = 730.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """What is to be trained."""

    images: float
    """Images in the shard set."""
    gpus: int
    """GPUs of the run; the same is shown for 8, 64 and 512."""
    global_batch_size: int
    """Samples per step over these GPUs; other numbers of GPUs take as many each."""
    epochs: float | None = None
    """Passes over the images. Give this or images_seen."""
    images_seen: float | None = None
    """Images that the run takes, repeats counted."""
    queue_size: int = 65_536
    """Keys in MoCo's queue (K)."""
    dim: int = 128
    """Numbers in an embedding."""

    def __post_init__(self) -> None:
        _check_positive(self)
        if self.images != int(self.images):
            raise ConfigError(f"images must be a whole number, not {self.images:g}")
        if (self.epochs is None) == (self.images_seen is None):
            raise ConfigError("give either epochs or images_seen: how long the run is")
        if self.global_batch_size % self.gpus:
            raise ConfigError(
                f"global_batch_size {self.global_batch_size} is not a multiple of gpus "
                f"{self.gpus}; change one of them"
            )

    @property
    def seen(self) -> float:
        """Images that the run takes, repeats counted."""
        return self.images * self.epochs if self.epochs is not None else self.images_seen or 0.0

    @property
    def batch_size(self) -> int:
        """Samples per step of one GPU."""
        return self.global_batch_size // self.gpus


@dataclass(frozen=True, kw_only=True, slots=True)
class Rates:
    """Measured or stated rates; None is not known, and then never found to be the limit."""

    step_pairs_per_s: float | None = None
    """Images (pairs of views) per second that one GPU trains on when it never waits."""
    image_bytes: float | None = None
    """Mean bytes of an encoded image in the shards."""
    decode_per_core: float | None = None
    """Samples per second that one core decodes and draws two views of."""
    decode_per_gpu: float | None = None
    """The same of one GPU, where GPUs decode."""
    read_per_core: float | None = None
    """Samples per second that one core reads from the store and checks; not stated: 27,000."""
    node_gb_per_s: float | None = None
    """GB/s (1e9 bytes) that one node reads from the store, by its network."""
    store_gb_per_s: float | None = None
    """GB/s (1e9 bytes) that the store gives in all."""
    get_latency_s: float | None = None
    """Mean seconds from asking for a block to its last byte."""
    get_latency_p99_s: float | None = None
    """The same: 99 of 100 reads take at most this long."""

    def __post_init__(self) -> None:
        _check_positive(self)
        if self.decode_per_core is not None and self.decode_per_gpu is not None:
            raise ConfigError("give decode_per_core or decode_per_gpu: one of them decodes")
        mean, p99 = self.get_latency_s, self.get_latency_p99_s
        if mean is not None and p99 is not None and p99 < mean:
            raise ConfigError(f"get_latency_p99_s {p99:g} is below the mean get_latency_s {mean:g}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Cluster:
    """The machines, and what the store promises."""

    gpus_per_node: int = 8
    """GPUs in a machine."""
    cores_per_node: int | None = None
    """Cores of a machine for reading and decoding; None is not known."""
    prefixes: int = 1
    """Prefixes (partitions of the store) that the shards' names are spread over."""
    gets_per_s_per_prefix: float = 5_500.0
    """GET/s of each. S3 promises at least 5,500 (user guide, optimizing-performance)."""

    def __post_init__(self) -> None:
        _check_positive(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """Settings of the stream; the defaults are those of `moco-scale pretrain`."""

    reads_in_flight: int = 16
    """Threads of a rank that read."""
    block_samples: int = 64
    """Consecutive samples of a shard that one range request reads."""
    lanes_per_slot: int = 1
    """Lanes = lanes_per_slot x global_batch_size."""
    buffer_bytes: int = 1 << 30
    """Bound on encoded bytes held per rank, in flight and ready."""
    prefetch_batches: int = 2
    """Batches that each of the two stages has ready ahead of the step."""

    def __post_init__(self) -> None:
        _check_positive(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class Inputs:
    """All that a forecast depends on."""

    run: Run
    rates: Rates
    cluster: Cluster = field(default_factory=Cluster)
    reading: Reading = field(default_factory=Reading)
    prices: Prices = field(default_factory=Prices)

    def __post_init__(self) -> None:
        _check_positive(self.prices, zero=True)
        for name in ("step_pairs_per_s", "image_bytes"):
            if getattr(self.rates, name) is None:
                raise ConfigError(f"{name} is not known: state it, or give a file of rates with it")
        why = self.why_not(self.run.gpus)
        if why:
            raise ConfigError(f"{why}; lower global_batch_size")

    def why_not(self, gpus: int) -> str | None:
        """Why so many GPUs cannot train, each with the samples of this run's."""
        batch = gpus * self.run.batch_size
        lanes = batch * self.reading.lanes_per_slot
        if lanes > self.run.images:
            return f"the {self.run.images:,.0f} images are fewer than the {lanes:,} lanes"
        if batch > self.run.queue_size:
            return f"the global batch {batch:,} is above queue_size {self.run.queue_size:,}"
        return None


@dataclass(frozen=True, kw_only=True, slots=True)
class Limit:
    """What one resource allows."""

    resource: str
    samples_per_s_per_gpu: float
    used_frac: float
    """Part of it that the forecast rate uses; about 1 at what bounds the run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scale:
    """The forecast for one number of GPUs. Needs are what is needed for no GPU to wait."""

    gpus: int
    nodes: int
    global_batch_size: int
    samples_per_s: float
    """Images per second that are reached over all GPUs."""
    hours: float
    gpu_hours_per_million: float
    """GPU-hours for a million images."""
    bound_by: str
    """The resource that allows least."""
    wait_frac: float
    """Part of the time that GPUs wait."""
    tail_wait_frac: float
    """Of it, for late reads."""
    node_gb_per_s_needed: float
    """Of the node with the most GPUs."""
    store_gb_per_s_needed: float
    gets_per_s_needed: float
    gets_needed_frac: float
    """Of the limit of all prefixes."""
    cores_per_gpu_needed: float | None
    """None where the decoding rate of a core is not known."""
    read_amplification: float
    """Samples read for one used, at most."""
    single_reads_frac: float
    """Part of the samples that cost a GET each, because the lanes' blocks exceed the buffer."""
    p99_latency_s_needed: float
    """Longest latency that reading ahead hides."""
    storage_usd: float
    """Of the shards, for the hours of the run."""
    requests_usd: float
    """Of the GETs of the run."""
    limits: tuple[Limit, ...]
    """Of each known resource, the lowest first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Knee:
    """Where a resource begins to bound."""

    resource: str
    gpus: int | None
    """The first number of GPUs at which it does; None: at no number that can train."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Forecast:
    """What `forecast` finds."""

    asked: Scale
    scales: tuple[Scale, ...]
    """8, 64 and 512 GPUs and the asked number, ascending, without those that cannot train."""
    knees: tuple[Knee, ...]
    """Of each resource alone: from how many GPUs on it holds up the step; the first first."""
    takes_over: Knee | None
    """What bounds instead of the asked number's limit as GPUs are added, and from how many on."""
    not_known: tuple[str, ...]
    """Resources that nothing was stated of."""
    notes: tuple[str, ...]
    """What was left out, and why."""
    queue_bytes: float
    """Of MoCo's queue, on every GPU."""
    bank_bytes: float
    """Of a memory bank of all images, on every GPU."""
    storage_usd_per_month: float


def forecast(inputs: Inputs) -> Forecast:
    """What the run needs and how long it takes, at several numbers of GPUs."""
    run = inputs.run
    counts = sorted({*GPUS, run.gpus})
    reasons = {count: inputs.why_not(count) for count in counts}
    asked = at_gpus(inputs, run.gpus)
    knees = [_knee(inputs, name) for name in _limits(inputs, run.gpus) if name != STEP]
    known = {limit.resource for limit in asked.limits}
    decoders = {DECODE: inputs.rates.decode_per_gpu is None}
    return Forecast(
        asked=asked,
        scales=tuple(at_gpus(inputs, count) for count in counts if not reasons[count]),
        knees=tuple(sorted(knees, key=lambda knee: knee.gpus or math.inf)),
        takes_over=_takes_over(inputs),
        not_known=tuple(n for n in RESOURCES if n not in known and not decoders.get(n)),
        notes=tuple(f"not {count} GPUs: {why}" for count, why in reasons.items() if why),
        queue_bytes=float(run.queue_size * run.dim * _BYTES_PER_NUMBER),
        bank_bytes=run.images * run.dim * _BYTES_PER_NUMBER,
        storage_usd_per_month=_storage_usd_per_month(inputs),
    )


def at_gpus(inputs: Inputs, gpus: int) -> Scale:
    """The forecast for one number of GPUs, each with the samples of the asked run's."""
    run, cluster = inputs.run, inputs.cluster
    reads = _reads(inputs, gpus)
    limits = _limits(inputs, gpus)
    bound_by = min(limits, key=lambda name: limits[name])
    without_tail = min(rate for name, rate in limits.items() if name != TAIL)
    per_gpu = _with_tail(inputs, gpus, without_tail)
    full = limits[STEP]
    on_node = min(gpus, cluster.gpus_per_node)
    hours = run.seen / (gpus * per_gpu) / 3600
    core_s = _core_s(inputs.rates)
    gets_per_s = gpus * full * reads.gets
    return Scale(
        gpus=gpus,
        nodes=-(-gpus // cluster.gpus_per_node),
        global_batch_size=gpus * run.batch_size,
        samples_per_s=gpus * per_gpu,
        hours=hours,
        gpu_hours_per_million=gpus * hours / run.seen * 1e6,
        bound_by=bound_by,
        wait_frac=1 - per_gpu / full,
        tail_wait_frac=1 - per_gpu / without_tail,
        node_gb_per_s_needed=on_node * full * reads.bytes / 1e9,
        store_gb_per_s_needed=gpus * full * reads.bytes / 1e9,
        gets_per_s_needed=gets_per_s,
        gets_needed_frac=gets_per_s / (cluster.prefixes * cluster.gets_per_s_per_prefix),
        cores_per_gpu_needed=None if core_s is None else full * core_s,
        read_amplification=reads.amplification,
        single_reads_frac=reads.single_frac,
        p99_latency_s_needed=reads.steps_hidden * run.batch_size / full,
        storage_usd=_storage_usd_per_month(inputs) * hours / _HOURS_PER_MONTH,
        requests_usd=run.seen * reads.gets * inputs.prices.gets_per_1000 / 1000,
        limits=tuple(
            Limit(resource=name, samples_per_s_per_gpu=rate, used_frac=per_gpu / rate)
            for name, rate in sorted(limits.items(), key=lambda item: item[1])
        ),
    )


STEP, CORES, DECODE, NETWORK = "GPU step", "host cores", "GPU decode", "node network"
BANDWIDTH, REQUESTS = "store bandwidth", "store requests"
IN_FLIGHT, TAIL = "reads in flight", "read tail"
RESOURCES = (STEP, CORES, DECODE, NETWORK, BANDWIDTH, REQUESTS, IN_FLIGHT, TAIL)


def _limits(inputs: Inputs, gpus: int) -> dict[str, float]:
    """Samples/s that each known resource allows one GPU; none grows with the number of GPUs."""
    rates, cluster = inputs.rates, inputs.cluster
    reads = _reads(inputs, gpus)
    on_node = min(gpus, cluster.gpus_per_node)
    core_s = _core_s(rates)
    found: dict[str, float | None] = dict.fromkeys(RESOURCES)
    found[STEP] = rates.step_pairs_per_s
    if cluster.cores_per_node is not None and core_s is not None:
        found[CORES] = cluster.cores_per_node / on_node / core_s
    found[DECODE] = rates.decode_per_gpu
    if rates.node_gb_per_s is not None:
        found[NETWORK] = rates.node_gb_per_s * 1e9 / on_node / reads.bytes
    if rates.store_gb_per_s is not None:
        found[BANDWIDTH] = rates.store_gb_per_s * 1e9 / gpus / reads.bytes
    found[REQUESTS] = cluster.prefixes * cluster.gets_per_s_per_prefix / gpus / reads.gets
    if rates.get_latency_s is not None:
        found[IN_FLIGHT] = reads.in_flight / (reads.gets * rates.get_latency_s)
    if rates.get_latency_p99_s is not None:
        stalls_apart = _steps_between_stalls(inputs, gpus)
        found[TAIL] = inputs.run.batch_size * stalls_apart / rates.get_latency_p99_s
    return {name: rate for name, rate in found.items() if rate is not None}


@dataclass(frozen=True, kw_only=True, slots=True)
class _Reads:
    """What bringing in one sample takes."""

    amplification: float
    single_frac: float
    bytes: float
    gets: float
    in_flight: float
    """GETs of one rank that can be under way."""
    steps_hidden: float
    """Steps from the beginning of a batch's reads to its use. The first of the planned batches is
    made while each of two stages has prefetch_batches ready and one more in its hands."""


def _reads(inputs: Inputs, gpus: int) -> _Reads:
    run, reading = inputs.run, inputs.reading
    block, batch, room = reading.block_samples, run.batch_size, reading.buffer_bytes
    sample_bytes = _sample_bytes(inputs)
    rank_lanes = batch * reading.lanes_per_slot
    lane = run.images / (gpus * rank_lanes)
    amplification = (lane + block - 1) / lane
    # The rule of Stream._divide_room.
    blocks_bytes = rank_lanes * block * sample_bytes
    single_frac = 0.0
    if blocks_bytes + rank_lanes * sample_bytes > room:
        for_blocks = max(0.0, room - PLANNED_AHEAD * batch * sample_bytes)
        single_frac = max(0.0, 1 - for_blocks / blocks_bytes)
    gets = (1 - single_frac) * amplification / block + single_frac
    read_bytes = sample_bytes * ((1 - single_frac) * amplification + single_frac)
    if single_frac:
        fitting = float(PLANNED_AHEAD)
    else:
        fitting = max(1.0, (room - blocks_bytes) / (batch * read_bytes))
    return _Reads(
        amplification=amplification,
        single_frac=single_frac,
        bytes=read_bytes,
        gets=gets,
        in_flight=min(reading.reads_in_flight, min(PLANNED_AT_MOST, fitting) * batch * gets),
        steps_hidden=min(PLANNED_AHEAD, fitting) - 1 + 2 * (reading.prefetch_batches + 1),
    )


def _steps_between_stalls(inputs: Inputs, gpus: int) -> float:
    reads = _reads(inputs, gpus)
    reads_per_step = gpus * inputs.run.batch_size * reads.gets
    late_frac = -math.expm1(reads_per_step * math.log(0.99))
    return reads.steps_hidden - 1 + 1 / late_frac


def _with_tail(inputs: Inputs, gpus: int, samples_per_s: float) -> float:
    """The rate of one GPU when late reads stall it, too."""
    p99_s = inputs.rates.get_latency_p99_s
    if p99_s is None:
        return samples_per_s
    batch = inputs.run.batch_size
    step_s = batch / samples_per_s
    late_s = max(0.0, p99_s - _reads(inputs, gpus).steps_hidden * step_s)
    return batch / (step_s + late_s / _steps_between_stalls(inputs, gpus))


def _knee(inputs: Inputs, resource: str) -> Knee:
    """From how many GPUs on a resource, by itself, gives less than the step takes."""

    def is_short(gpus: int) -> bool:
        limits = _limits(inputs, gpus)
        return limits[resource] < limits[STEP]

    return Knee(resource=resource, gpus=_first(is_short, 1, _most_gpus(inputs)))


def _takes_over(inputs: Inputs) -> Knee | None:
    """What is below the asked number's limit first when GPUs are added."""
    gpus = inputs.run.gpus
    limits = _limits(inputs, gpus)
    now = min(limits, key=lambda name: limits[name])

    def is_below(resource: str) -> Callable[[int], bool]:
        def check(count: int) -> bool:
            there = _limits(inputs, count)
            return there[resource] < there[now]

        return check

    most = _most_gpus(inputs)
    found = [(_first(is_below(name), gpus + 1, most), name) for name in limits if name != now]
    first = min(((count, name) for count, name in found if count is not None), default=None)
    return None if first is None else Knee(resource=first[1], gpus=first[0])


def _first(is_so: Callable[[int], bool], low: int, high: int) -> int | None:
    """The first number from `low` to `high` for which it is so; from there on it stays so."""
    if low > high or not is_so(high):
        return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if is_so(middle) else (middle + 1, high)
    return low


def _most_gpus(inputs: Inputs) -> int:
    run = inputs.run
    by_lanes = int(run.images) // (run.batch_size * inputs.reading.lanes_per_slot)
    return min(by_lanes, run.queue_size // run.batch_size, MOST_GPUS)


def _core_s(rates: Rates) -> float | None:
    """Core-seconds of a sample."""
    read_s = 1 / (rates.read_per_core or READ_PER_CORE)
    if rates.decode_per_gpu is not None:
        return read_s
    return None if rates.decode_per_core is None else read_s + 1 / rates.decode_per_core


def _sample_bytes(inputs: Inputs) -> float:
    """Of a sample in its tar."""
    assert inputs.rates.image_bytes is not None, "checked with the inputs"
    return inputs.rates.image_bytes + TAR_BYTES_PER_OBJECT


def _storage_usd_per_month(inputs: Inputs) -> float:
    return inputs.run.images * _sample_bytes(inputs) / 2**30 * inputs.prices.gib_month


def _check_positive(values: Any, *, zero: bool = False) -> None:
    """Refuse numbers that are not finite and above 0 (or, if `zero`, at least 0)."""
    for one in fields(values):
        value = getattr(values, one.name)
        if value is None or (0 < value < math.inf) or (zero and value == 0):
            continue
        right = "finite" if value == math.inf else "at least 0" if zero else "above 0"
        raise ConfigError(f"{one.name} must be {right}, not {value:g}")
