"""The one door to torch.distributed: who this process is, and the collectives that a step uses.

Every function is a collective: all ranks call it, in the same order. In a world of one they do
nothing, and no process group is needed.
"""

import contextlib
import os
import re
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from torch import Tensor

from moco_scale.errors import ConfigError, LostRankError
from moco_scale.phases import COLLECTIVE, DeviceSpans
from pipelines.spans import Spans

T = TypeVar("T")

DEFAULT_TIMEOUT_S = 600.0

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
SRUN = (
    "SLURM_PROCID",
    "SLURM_STEP_NUM_TASKS",
    "SLURM_LOCALID",
    "SLURM_NODEID",
    "SLURM_JOB_ID",
    "SLURM_STEP_ID",
    "SLURM_RESTART_COUNT",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranks:
    """Who this process is among the processes of the run, in torchrun's words."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    device: torch.device
    """Where this rank's tensors live."""
    spans: Spans = field(default_factory=Spans, compare=False, repr=False)
    """Takes what this process does, while it is recording: collectives, and what step and loader
    put there."""

    @property
    def device_index(self) -> int | None:
        """Number of the accelerator; None on the CPU."""
        return self.device.index

    @property
    def speaks(self) -> bool:
        """Whether this rank prints, and writes what all ranks would write alike."""
        return self.rank == 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where the launcher has put this process among those of the run."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    device_index: int
    """Which of the accelerators that this process sees is its own."""
    rendezvous: str
    """Where the ranks meet, a URL that torch.distributed knows."""


def one_rank(device: torch.device | None = None) -> Ranks:
    """A world of one process, on the CPU unless said otherwise."""
    device = device or torch.device("cpu")
    return Ranks(
        rank=0,
        world_size=1,
        local_rank=0,
        local_world_size=1,
        device=device,
        spans=_spans(device),
    )


def start(
    device: Literal["auto", "cpu", "cuda"],
    *,
    timeout_s: float = DEFAULT_TIMEOUT_S,
    rendezvous: str | None = None,
) -> Ranks:
    """Join the other ranks, as the environment of torchrun or srun says; alone when there is none.

    Sets this process's accelerator, or its number of CPU threads to its part of the cores.

    Args:
        device: auto takes CUDA where there is one.
        timeout_s: longest wait for the other ranks, here and in every collective.
        rendezvous: where the ranks meet, a URL that torch.distributed knows; None: where the
            environment says.

    Raises:
        ConfigError: see `read_environment`, or there is no such device.
        LostRankError: the others did not come in time.
    """
    place = read_environment(os.environ)
    chosen = _device(device, index=place.device_index)
    ranks = Ranks(
        rank=place.rank,
        world_size=place.world_size,
        local_rank=place.local_rank,
        local_world_size=place.local_world_size,
        device=chosen,
        spans=_spans(chosen),
    )
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    else:
        cores = len(os.sched_getaffinity(0))
        torch.set_num_threads(max(1, cores // place.local_world_size))
    if place.world_size > 1:
        meeting = rendezvous or place.rendezvous
        _check_resolves(meeting)
        with _others_answer():
            dist.init_process_group(
                "nccl" if chosen.type == "cuda" else "gloo",
                init_method=meeting,
                rank=place.rank,
                world_size=place.world_size,
                timeout=timedelta(seconds=timeout_s),
                device_id=chosen if chosen.type == "cuda" else None,
            )
    return ranks


def shutdown() -> None:
    """Leave the process group, if there is one; harmless twice."""
    if dist.is_initialized():
        dist.destroy_process_group()


def allowed_worlds(
    *, global_batch_size: int, bn_sub_batch: int, accumulation: int = 1
) -> list[int]:
    """World sizes at which every part of every rank's batch holds whole BN groups, ascending."""
    groups = global_batch_size // bn_sub_batch
    return [world for world in range(1, groups + 1) if groups % (world * accumulation) == 0]


def check_world(
    world_size: int, *, global_batch_size: int, bn_sub_batch: int, accumulation: int = 1
) -> None:
    """Refuse a world that would cut a BN group in two.

    Raises:
        ConfigError: in one line, with the worlds that are allowed.
    """
    if global_batch_size % bn_sub_batch:
        raise ConfigError(
            f"data.global_batch_size {global_batch_size} is not a multiple of "
            f"model.bn_sub_batch {bn_sub_batch}; change one of them"
        )
    allowed = allowed_worlds(
        global_batch_size=global_batch_size, bn_sub_batch=bn_sub_batch, accumulation=accumulation
    )
    groups = global_batch_size // bn_sub_batch
    shared = (
        f"the {groups} BN groups of a step (data.global_batch_size {global_batch_size} / "
        f"model.bn_sub_batch {bn_sub_batch})"
    )
    if not allowed:
        raise ConfigError(
            f"optim.accumulation {accumulation} does not divide {shared}; lower one of them"
        )
    if world_size not in allowed:
        in_parts = f" in {accumulation} parts each (optim.accumulation)" if accumulation > 1 else ""
        raise ConfigError(
            f"{world_size} processes cannot share {shared}{in_parts}; "
            f"start {', '.join(map(str, allowed))}"
        )


def all_reduce_flat(tensors: Sequence[Tensor], ranks: Ranks) -> Tensor:
    """Replace each tensor by its mean over ranks, all in one all-reduce, in the order given.

    One buffer in a fixed order sums in the same order every time, so a resumed run has the same
    bits; DDP's buckets, rebuilt after the first backward, do not promise that.

    Returns:
        A tensor of one bool: whether all of it is finite, on all ranks alike.
    """
    if ranks.world_size == 1:
        return _all_finite(tensors)
    views = [_in_memory_order(tensor) for tensor in tensors]
    flat = torch.cat(views)
    with _collective("all_reduce", ranks):
        dist.all_reduce(flat)
    flat /= ranks.world_size
    torch._foreach_copy_(views, torch.split(flat, [len(view) for view in views]))
    for tensor, view in zip(tensors, views, strict=True):
        if view.data_ptr() != tensor.data_ptr():  # it had no such view, and this is a copy
            tensor.copy_(view.view(tensor.shape))
    return _all_finite([flat])


def _all_finite(tensors: Sequence[Tensor]) -> Tensor:
    """A tensor of one bool, by one number a tensor: its length is finite if all its numbers are.

    (So is not that of numbers beyond 1e19, whose squares overflow: a step of such is as lost.)
    """
    return torch.stack(torch._foreach_norm(list(tensors))).isfinite().all()


def _in_memory_order(tensor: Tensor) -> Tensor:
    """Its numbers as they lie in memory, which for images is not always that of the indices."""
    if tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
        tensor = tensor.permute(0, 2, 3, 1)
    return tensor.reshape(-1)


def all_gather_rows(rows: Tensor, ranks: Ranks) -> Tensor:
    """The rows of all ranks in rank order: n x ... from each gives (n * world_size) x ...

    Gradients of all ranks flow back to the rank whose row it was, added.
    """
    if ranks.world_size == 1:
        return rows
    gathered: Tensor = _AllGather.apply(rows.contiguous(), ranks)
    return gathered


class _AllGather(torch.autograd.Function):
    """See `all_gather_rows`."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        gathered = rows.new_empty((ranks.world_size * rows.shape[0], *rows.shape[1:]))
        # Its name since torch 2.14, where the older one warns.
        gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
        with _collective("all_gather", ranks):
            gather(gathered, rows)
        return gathered

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        summed = gradients[0].contiguous()
        with _collective("all_reduce", ctx.ranks):
            dist.all_reduce(summed)
        return summed.tensor_split(ctx.ranks.world_size)[ctx.ranks.rank], None


def exchange_rows(
    rows: Tensor, *, send_counts: Sequence[int], receive_counts: Sequence[int], ranks: Ranks
) -> Tensor:
    """Send rows to other ranks and get theirs (all-to-all). Needs a process group.

    Args:
        rows: sum(send_counts) x ..., contiguous, ordered by the rank that they go to.
        send_counts: how many of the rows go to each rank.
        receive_counts: how many rows come from each rank.

    Returns:
        sum(receive_counts) x ..., ordered by the rank that they come from.
    """
    # As bytes: gloo does not know every dtype.
    row_bytes = rows.shape[1:].numel() * rows.element_size()
    sent = rows.reshape(-1).view(torch.uint8)
    received = sent.new_empty(sum(receive_counts) * row_bytes)
    with _collective("all_to_all", ranks):
        dist.all_to_all_single(
            received,
            sent,
            output_split_sizes=[count * row_bytes for count in receive_counts],
            input_split_sizes=[count * row_bytes for count in send_counts],
        )
    return received.view(rows.dtype).view(sum(receive_counts), *rows.shape[1:])


def broadcast_object(value: T, ranks: Ranks) -> T:
    """Rank 0's value, on every rank; for small values outside the step."""
    if ranks.world_size == 1:
        return value
    box: list[Any] = [value]
    with _collective("broadcast", ranks):
        dist.broadcast_object_list(box, src=0)
    received: T = box[0]
    return received


def gather_objects(value: T, ranks: Ranks) -> list[T]:
    """The values of all ranks, in rank order, on every rank; for small values outside the step."""
    if ranks.world_size == 1:
        return [value]
    values: list[Any] = [None] * ranks.world_size
    with _collective("all_gather", ranks):
        dist.all_gather_object(values, value)
    return values


def barrier(ranks: Ranks) -> None:
    """Wait until every rank has come here."""
    if ranks.world_size > 1:
        with _collective("barrier", ranks):
            dist.barrier()


@contextlib.contextmanager
def _collective(name: str, ranks: Ranks) -> Iterator[None]:
    """Around a call in which ranks wait for each other."""
    with ranks.spans.of(f"{COLLECTIVE} {name}"), _others_answer():
        yield


@contextlib.contextmanager
def _others_answer() -> Iterator[None]:
    """Around calls of torch.distributed: what they raise says that another rank is gone or silent.

    The backends have no common error for it; gloo raises a bare RuntimeError.
    """
    try:
        yield
    except torch.OutOfMemoryError:  # this rank's own
        raise
    except RuntimeError as err:
        # Of gloo's "[.../pair.cc:538] Connection closed by peer [10.0.0.2]:36614. This is ..."
        said = re.split(r"\. |\n", re.sub(r"^\[[^]]*\] ", "", str(err).strip()))[0]
        raise LostRankError(
            f"another process of the run is gone, or gave no answer within "
            f"run.collective_timeout_s ({said}); start the same command again, as torchrun does: "
            "it goes on from the last checkpoint"
        ) from err


def read_environment(environment: Mapping[str, str]) -> Place:
    """The place that torchrun gave this process, or else srun; a world of one without either.

    torchrun under srun finds both, and its own variables are the nearer. A batch script, and a
    shell on a node, are steps of one task or none.

    Raises:
        ConfigError: a variable is missing, or they contradict each other.
    """
    if "RANK" in environment or "WORLD_SIZE" in environment:
        rank, world_size, local_rank, local_world_size = _numbers(environment, TORCHRUN, "torchrun")
        device_index = local_rank
        rendezvous = "env://"
    elif environment.get("SLURM_STEP_NUM_TASKS", "1") != "1":
        rank, world_size, local_rank, node, *start = _numbers(
            {"SLURM_RESTART_COUNT": "0", **environment}, SRUN, "srun"
        )
        tasks = _tasks_per_node(environment, num_tasks=world_size)
        local_world_size = tasks[node] if 0 <= node < len(tasks) else 0
        device_index = 0 if _sees_only_its_own(environment, local_world_size) else local_rank
        rendezvous = _slurm_rendezvous(environment, *start)
    else:
        rank, world_size, local_rank, local_world_size, device_index = 0, 1, 0, 1, 0
        rendezvous = "env://"
    if not (0 <= rank < world_size and 0 <= local_rank < local_world_size <= world_size):
        raise ConfigError(
            f"the environment calls this process rank {rank} of {world_size} and local rank "
            f"{local_rank} of {local_world_size}, which cannot be; start the ranks with torchrun "
            "or srun, or unset their variables"
        )
    return Place(
        rank=rank,
        world_size=world_size,
        local_rank=local_rank,
        local_world_size=local_world_size,
        device_index=device_index,
        rendezvous=rendezvous,
    )


def _numbers(environment: Mapping[str, str], names: Sequence[str], launcher: str) -> list[int]:
    try:
        return [int(environment[name]) for name in names]
    except KeyError as err:
        raise ConfigError(
            f"the environment has some of {', '.join(names)} but not {err.args[0]}; start the "
            f"ranks with {launcher}, or unset them all"
        ) from err
    except ValueError as err:
        raise ConfigError(f"{', '.join(names)} must be whole numbers: {err}") from err


def _tasks_per_node(environment: Mapping[str, str], *, num_tasks: int) -> list[int]:
    """How many tasks each node of the step has, of Slurm's "2(x3),1"."""
    written = environment.get("SLURM_STEP_TASKS_PER_NODE", "")
    parts = [re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part) for part in written.split(",")]
    counts = [int(part[1]) for part in parts if part for _ in range(int(part[2] or 1))]
    if None in parts or sum(counts) != num_tasks:
        raise ConfigError(
            f"SLURM_STEP_TASKS_PER_NODE {written!r} does not add up to SLURM_STEP_NUM_TASKS "
            f"{num_tasks}; start the ranks with srun"
        )
    return counts


def _sees_only_its_own(environment: Mapping[str, str], local_world_size: int) -> bool:
    """Whether Slurm shows each task one accelerator of several, as with --gpus-per-task=1."""
    seen = environment.get("CUDA_VISIBLE_DEVICES", "")
    on_node = environment.get("SLURM_GPUS_ON_NODE", "")
    shown_one = bool(seen) and "," not in seen
    return shown_one and on_node.isdecimal() and int(on_node) >= local_world_size


def _slurm_rendezvous(environment: Mapping[str, str], job: int, step: int, restart: int) -> str:
    """Where rank 0 waits: on the first node, at a port that other jobs and steps do not take.

    The port lies above those of Slurm's daemons (6817 to 6819) and below those that Linux gives to
    outgoing connections (32768 and up, net.ipv4.ip_local_port_range). A requeued job draws another:
    one that something else holds is not tried for ever.
    """
    host = environment.get("MASTER_ADDR") or _first_host(environment.get("SLURM_STEP_NODELIST", ""))
    drawn = 15000 + (31 * job + step + restart) % 10000
    port = environment.get("MASTER_PORT") or str(drawn)
    if not (port.isdecimal() and 0 < int(port) < 65536):
        raise ConfigError(f"MASTER_PORT {port!r} is no port; give one of 1 to 65535, or unset it")
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


def _first_host(nodes: str) -> str:
    """gpu001 of Slurm's "gpu[001-003,7],big1"."""
    first = re.split(r",(?![^\[]*\])", nodes)[0]  # at a comma outside brackets
    host = re.sub(r"\[(\d+)[^\]]*\]", r"\1", first)
    if not re.fullmatch(r"[\w.-]+", host):
        raise ConfigError(
            f"SLURM_STEP_NODELIST {nodes!r} names no first node; set MASTER_ADDR to its address"
        )
    return host


def _check_resolves(rendezvous: str) -> None:
    """Refuse at once a host without an address: torch would ask again until its time is over."""
    host = urlsplit(rendezvous).hostname
    try:
        if host is not None:
            socket.getaddrinfo(host, None)
    except socket.gaierror as err:
        if err.errno != socket.EAI_AGAIN:  # that may pass
            raise ConfigError(
                f"the first node, {host}, has no address here ({err.strerror}); set MASTER_ADDR"
            ) from err


def _spans(device: torch.device) -> Spans:
    return DeviceSpans(device) if device.type == "cuda" else Spans()


def _device(choice: str, *, index: int) -> torch.device:
    if choice == "cpu" or (choice == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError(
            f"torch finds no CUDA device on this machine; see with nvidia-smi whether there is a "
            f"driver, and one for CUDA {torch.version.cuda} or newer, or give --run.device cpu"
        )
    found = torch.cuda.device_count()
    if index >= found:
        raise ConfigError(
            f"local rank {index} has no CUDA device: {found} found on this machine; start "
            "fewer processes per node"
        )
    return torch.device("cuda", index)
