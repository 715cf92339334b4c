"""Run a function on several real gloo ranks, and bring results and tracebacks home."""

import math
import multiprocessing
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

from moco_scale import distributed

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["moco_scale.trainer"])  # importing torch takes seconds


def run_distributed(
    fn: Callable[..., Any], world_size: int, *args: object, timeout: float = 180
) -> list[Any]:
    """`fn(ranks, *args)` on `world_size` processes; what each returned, in rank order.

    The ranks meet at a file of their own, so that tests side by side cannot meet each other.

    Raises:
        AssertionError: a rank failed; its traceback is in the message.
        TimeoutError: no answer in time; the ranks are ended.
    """
    with tempfile.TemporaryDirectory() as folder:
        meeting = f"file://{Path(folder) / 'meeting'}"
        processes, ends = [], []
        for rank in range(world_size):
            ours, theirs = _context.Pipe(duplex=False)
            process = _context.Process(
                target=_child, args=(theirs, fn, rank, world_size, meeting, timeout, args)
            )
            process.start()
            theirs.close()
            processes.append(process)
            ends.append(ours)
        try:
            return _collect(ends, deadline=time.monotonic() + timeout)
        finally:
            for process in processes:
                process.join(timeout=2)
                if process.is_alive():
                    process.kill()
                    process.join()
            for end in ends:
                end.close()


def _collect(ends: list[Connection], *, deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(ends):
        waiting = [end for rank, end in enumerate(ends) if rank not in results]
        ready = wait(waiting, timeout=max(0, deadline - time.monotonic()))
        if not ready:
            missing = sorted(set(range(len(ends))) - set(results))
            raise TimeoutError(f"ranks {missing} gave no answer in time")
        answers = [_answer(ends.index(end), end) for end in ready]
        if failures := [answer for answer in answers if answer.failed]:
            # This process may hear of all at once; those after the first have only lost it.
            failures.sort(key=lambda answer: answer.at_s)
            raise AssertionError("\n".join(f"rank {one.rank} {one.value}" for one in failures))
        results.update({answer.rank: answer.value for answer in answers})
    return [results[rank] for rank in range(len(ends))]


class _Answer(NamedTuple):
    """What a rank has said."""

    rank: int
    failed: bool
    at_s: float
    """By a clock that all processes share."""
    value: Any


def _answer(rank: int, end: Connection) -> _Answer:
    try:
        return _Answer(rank, *pickle.loads(end.recv_bytes()))
    except EOFError:
        return _Answer(rank, failed=True, at_s=math.inf, value="died without a word")


def _child(
    end: Connection,
    fn: Callable[..., Any],
    rank: int,
    world_size: int,
    meeting: str,
    timeout: float,
    args: tuple[object, ...],
) -> None:
    import os  # of the child, whose environment stands in for torchrun's

    import torch

    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(world_size),
        GLOO_SOCKET_IFNAME="lo",
    )
    try:
        ranks = distributed.start("cpu", timeout_s=timeout, rendezvous=meeting)
        torch.set_num_threads(1)
        answer = (False, time.monotonic(), fn(ranks, *args))
        distributed.barrier(ranks)
    except BaseException:
        answer = (True, time.monotonic(), f"failed:\n{traceback.format_exc()}")
    # Before leaving the group: the others fail when one leaves, and must not be heard first.
    # As plain bytes: torch's own pickling would share memory with a process that is about to end.
    end.send_bytes(pickle.dumps(answer))
    end.close()
    distributed.shutdown()
