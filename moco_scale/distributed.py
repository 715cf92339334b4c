"""The one door to torch.distributed: who this process is, and the collectives that a step uses.

Every function is a collective: all ranks call it, in the same order. In a world of one they do
nothing, and no process group is needed.
"""

import contextlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from moco_scale.errors import ConfigError, LostRankError

T = TypeVar("T")

DEFAULT_TIMEOUT_S = 600.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranks:
    """Who this process is among the processes of the run, in torchrun's words."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    device: torch.device
    """Where this rank's tensors live."""

    @property
    def device_index(self) -> int | None:
        """Number of the accelerator; None on the CPU."""
        return self.device.index

    @property
    def speaks(self) -> bool:
        """Whether this rank prints, and writes what all ranks would write alike."""
        return self.rank == 0


def one_rank(device: torch.device | None = None) -> Ranks:
    """A world of one process, on the CPU unless said otherwise."""
    return Ranks(
        rank=0,
        world_size=1,
        local_rank=0,
        local_world_size=1,
        device=device or torch.device("cpu"),
    )


def start(
    device: Literal["auto", "cpu", "cuda"],
    *,
    timeout_s: float = DEFAULT_TIMEOUT_S,
    rendezvous: str = "env://",
) -> Ranks:
    """Join the other ranks, as torchrun's environment says; alone when there is none.

    Sets this process's accelerator, or its number of CPU threads to its part of the cores.

    Args:
        device: auto takes CUDA where there is one.
        timeout_s: longest wait for the other ranks, here and in every collective.
        rendezvous: where the ranks meet, a URL that torch.distributed knows.

    Raises:
        ConfigError: the environment is torchrun's only in part, or there is no such device.
        LostRankError: the others did not come in time.
    """
    rank, world_size, local_rank, local_world_size = _read_environment(os.environ)
    chosen = _device(device, local_rank=local_rank)
    ranks = Ranks(
        rank=rank,
        world_size=world_size,
        local_rank=local_rank,
        local_world_size=local_world_size,
        device=chosen,
    )
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    else:
        cores = len(os.sched_getaffinity(0))
        torch.set_num_threads(max(1, cores // local_world_size))
    if world_size > 1:
        with _others_answer():
            dist.init_process_group(
                "nccl" if chosen.type == "cuda" else "gloo",
                init_method=rendezvous,
                rank=rank,
                world_size=world_size,
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
    with _others_answer():
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
        with _others_answer():
            dist.all_gather_into_tensor(gathered, rows)
        return gathered

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        summed = gradients[0].contiguous()
        with _others_answer():
            dist.all_reduce(summed)
        return summed.tensor_split(ctx.ranks.world_size)[ctx.ranks.rank], None


def exchange_rows(
    rows: Tensor, *, send_counts: Sequence[int], receive_counts: Sequence[int]
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
    with _others_answer():
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
    with _others_answer():
        dist.broadcast_object_list(box, src=0)
    received: T = box[0]
    return received


def barrier(ranks: Ranks) -> None:
    """Wait until every rank has come here."""
    if ranks.world_size > 1:
        with _others_answer():
            dist.barrier()


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


def _read_environment(environment: Mapping[str, str]) -> tuple[int, int, int, int]:
    """(rank, world size, local rank, local world size); a world of one without RANK."""
    if "RANK" not in environment and "WORLD_SIZE" not in environment:
        return 0, 1, 0, 1
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    try:
        rank, world_size, local_rank, local_world_size = (int(environment[n]) for n in names)
    except KeyError as err:
        raise ConfigError(
            f"the environment has some of {', '.join(names)} but not {err.args[0]}; start the "
            "ranks with torchrun, or unset them all"
        ) from err
    except ValueError as err:
        raise ConfigError(f"{', '.join(names)} must be whole numbers: {err}") from err
    return rank, world_size, local_rank, local_world_size


def _device(choice: str, *, local_rank: int) -> torch.device:
    if choice == "cpu" or (choice == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if local_rank >= found:
        raise ConfigError(
            f"local rank {local_rank} has no CUDA device: {found} found on this machine; start "
            "fewer processes per node, or give --run.device cpu"
        )
    return torch.device("cuda", local_rank)
