"""What a step costs around its two encoders, beside the published algorithm, and by mechanism.

    python -m benchmarks.step                     all three sections, as Markdown
    python -m benchmarks.step overhead published mechanisms --steps 12

overhead     the whole step with a synthetic loader, against the encoders' passes and SGD alone
published    MoCo as its first code had it (gather all images, clone the queue, EMA a tensor at a
             time), against this one: same mathematics, same batch, 1, 2 and 4 gloo ranks
mechanisms   queue, memory bank and end-to-end (figure 2 of the paper): memory and time by the
             number of images, and what 1e9 would take
"""

import argparse
import contextlib
import copy
import os
import platform
import resource
import statistics
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import Tensor, nn
from torch.nn import functional

from moco_scale import distributed
from moco_scale.distributed import Ranks, all_reduce_flat, one_rank
from moco_scale.encoders import build_encoder
from moco_scale.model import MoCo, ModelConfig
from moco_scale.optim import OptimConfig, build_sgd, step_if
from moco_scale.trainer import RunConfig, Trainer
from pipelines.config import DataConfig
from pipelines.synthetic import SyntheticLoader

SECTIONS = ("overhead", "published", "mechanisms")
RESNET18 = ModelConfig(
    backbone="resnet18", queue_size=65_536, mlp_head=False, bn_sub_batch=8, shuffle_domain=32
)
_WARM_UP = 2


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sections", nargs="*", choices=[[], *SECTIONS], default=[])
    parser.add_argument("--steps", type=int, default=10, help="measured steps of each side")
    parser.add_argument("--view-size", type=int, default=64)
    parser.add_argument("--batch", type=int, default=32, help="images a step, over all ranks")
    parser.add_argument("--rows", type=float, nargs="+", default=[1e4, 1e6])
    parser.add_argument("--backbone", default="resnet50", help="of the section overhead")
    given = parser.parse_args()
    print(
        f"{os.cpu_count()} CPU cores ({platform.machine()}), torch {metadata.version('torch')}, "
        f"load average before {os.getloadavg()[0]:.1f}; `python -m benchmarks.step "
        f"{' '.join(sys.argv[1:])}`"
    )
    for section in given.sections or SECTIONS:
        print(f"\n## {section}\n", flush=True)
        globals()[f"section_{section}"](given)
    return 0


def section_overhead(given: argparse.Namespace) -> None:
    """One process, so that nothing but this project's own work is around the encoders."""
    config = replace(RESNET18, backbone=given.backbone, mlp_head=True)
    data = DataConfig(global_batch_size=given.batch, view_size=given.view_size, mode="synthetic")
    loader = SyntheticLoader(data, seed=0, rank=0, world_size=1, device_index=None)
    trainer = Trainer(
        data=data,
        model=config,
        optim=OptimConfig(),
        run=RunConfig(url=f"memory://{uuid.uuid4()}", log_every=10),
        loader=loader,
        ranks=one_rank(),
    )
    batch = next(loader)
    encoder_q, encoder_k = trainer.model.encoder_q, trainer.model.encoder_k
    assert encoder_k is not None

    sgd = build_sgd(trainer.parameters, OptimConfig(lr=0.0))  # a cost, not a step

    def encoders() -> None:
        trainer.optimizer.zero_grad()
        with torch.no_grad():
            encoder_k(batch.view_k)
        encoder_q(batch.view_q).square().sum().backward()

    def encoders_and_sgd() -> None:
        encoders()
        sgd.step()

    with trainer.stepping():
        times = interleaved(
            {
                "the two encoders": encoders,
                "the two encoders and SGD": encoders_and_sgd,
                "whole step": trainer.advance,
            },
            steps=given.steps,
        )
    alone, whole = times["the two encoders and SGD"], times["whole step"]
    print(f"{given.backbone} at {given.view_size} px, batch {given.batch}, {given.steps} steps\n")
    print("| | median ms | CPU ms |\n|---|---:|---:|")
    for name, (wall, cpu) in times.items():
        print(f"| {name} | {1000 * wall:.1f} | {1000 * cpu:.1f} |")
    print(
        f"\nAround encoders and SGD: {100 * (whole[0] / alone[0] - 1):+.1f} % of wall time, "
        f"{100 * (whole[1] / alone[1] - 1):+.1f} % of CPU time."
    )


def section_published(given: argparse.Namespace) -> None:
    print("| ranks | ratio of step times, published / ours | ms, published | ms, ours | ", end="")
    print("MB a rank receives besides gradients, published | ours | ", end="")
    print("MiB at the peak, published | ours |")
    print("|---:|---:|---:|---:|---:|---:|---:|---:|")
    for world_size in (1, 2, 4):
        timed = spawn(_compare, world_size, given)
        peaks = [max(spawn(_peak, world_size, given, side)) for side in ("published", "ours")]
        walls = {side: max(row[side][0] for row in timed) for side in ("published", "ours")}
        received = {side: timed[0][side][1] for side in ("published", "ours")}
        print(
            f"| {world_size} | {walls['published'] / walls['ours']:.2f} "
            f"| {1000 * walls['published']:.0f} | {1000 * walls['ours']:.0f} "
            f"| {received['published'] / 1e6:.2f} | {received['ours'] / 1e6:.2f} "
            f"| {peaks[0] / 2**20:.0f} | {peaks[1] / 2**20:.0f} |",
            flush=True,
        )


def section_mechanisms(given: argparse.Namespace) -> None:
    print("| mechanism | images N | dictionary, MB | step, ms | at N = 1e9 |")
    print("|---|---:|---:|---:|---|")
    for name in ("queue", "memory_bank", "end_to_end"):
        for rows in given.rows:
            config = replace(RESNET18, dictionary=name)
            size, wall = spawn(_mechanism, 1, given, config, int(rows))[0]
            at_billion = {
                "queue": f"{size / 1e6:.0f} MB",
                "memory_bank": f"{1e9 * config.dim * 4 / 1e9:.0f} GB on every rank",
                "end_to_end": f"no memory; {given.batch - 1} negatives, not {config.queue_size:,}",
            }[name]
            print(
                f"| {name} | {int(rows):,} | {size / 1e6:.1f} | {1000 * wall:.0f} | {at_billion} |",
                flush=True,
            )


def interleaved(
    sides: dict[str, Callable[[], object]], *, steps: int
) -> dict[str, tuple[float, float]]:
    """Median seconds and CPU-seconds of each side, taken in turn."""
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for step in range(_WARM_UP + steps):
        for name, action in sides.items():
            if dist.is_initialized():
                dist.barrier()
            wall, cpu = time.perf_counter(), time.process_time()
            action()
            if step >= _WARM_UP:
                taken[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return {
        name: (statistics.median(w for w, _ in rows), statistics.median(c for _, c in rows))
        for name, rows in taken.items()
    }


class Ours:
    """This project's step, without its loader and log."""

    def __init__(self, config: ModelConfig, ranks: Ranks, *, num_ids: int = 0) -> None:
        encoder = build_encoder(config, seed=0)
        self.model = MoCo(encoder, config, seed=0, ranks=ranks, num_ids=num_ids)
        self.model = self.model.to(memory_format=torch.channels_last)
        self.optimizer = build_sgd(self.model.encoder_q.parameters(), OptimConfig())
        self.ranks = ranks
        self.number = 0

    def step(self, view_q: Tensor, view_k: Tensor, sample_ids: Any) -> None:
        self.optimizer.zero_grad()
        output = self.model.backward(view_q, view_k, sample_ids=sample_ids, step=self.number)
        gradients = [p.grad for p in self.model.encoder_q.parameters() if p.grad is not None]
        is_finite = all_reduce_flat([*gradients, *self.model.statistics()], self.ranks)
        step_if(is_finite, self.optimizer)
        self.model.update(output, is_finite=is_finite)
        self.number += 1


class Published:
    """The algorithm the way its first code had it (moco/builder.py), written anew.

    Batch norm sees a rank's whole batch, so it has as many groups as there are ranks.
    """

    def __init__(self, config: ModelConfig, ranks: Ranks) -> None:
        plain = replace(config, bn_sub_batch=config.shuffle_domain // ranks.world_size)
        self.encoder_q = build_encoder(plain, seed=0)
        self.encoder_k = copy.deepcopy(self.encoder_q).requires_grad_(False)
        self.queue = functional.normalize(torch.randn(config.dim, config.queue_size), dim=0)
        self.pointer = torch.zeros(1, dtype=torch.long)
        self.config = config
        self.ranks = ranks
        self.optimizer = torch.optim.SGD(
            self.encoder_q.parameters(), lr=0.03, momentum=0.9, weight_decay=1e-4
        )
        self.network: nn.Module = self.encoder_q
        if ranks.world_size > 1:
            self.network = nn.parallel.DistributedDataParallel(self.encoder_q)

    def step(self, view_q: Tensor, view_k: Tensor, _: object) -> None:
        q = functional.normalize(self.network(view_q), dim=1)
        with torch.no_grad():
            for of_q, of_k in zip(
                self.encoder_q.parameters(), self.encoder_k.parameters(), strict=True
            ):
                of_k.data = of_k.data * 0.999 + of_q.data * (1 - 0.999)
            everything = self._gather(view_k)
            shuffle = torch.randperm(len(everything))
            if self.ranks.world_size > 1:
                dist.broadcast(shuffle, src=0)
            mine = shuffle.view(self.ranks.world_size, -1)[self.ranks.rank]
            k = functional.normalize(self.encoder_k(everything[mine]), dim=1)
            back = torch.argsort(shuffle).view(self.ranks.world_size, -1)[self.ranks.rank]
            k = self._gather(k)[back]
        l_pos = torch.einsum("nc,nc->n", [q, k]).unsqueeze(-1)
        l_neg = torch.einsum("nc,ck->nk", [q, self.queue.clone().detach()])
        logits = torch.cat([l_pos, l_neg], dim=1) / self.config.temperature
        loss = functional.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long))
        keys = self._gather(k)
        start = int(self.pointer)
        self.queue[:, start : start + len(keys)] = keys.T
        self.pointer[0] = (start + len(keys)) % self.config.queue_size
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch's
        self.optimizer.step()

    def _gather(self, rows: Tensor) -> Tensor:
        if self.ranks.world_size == 1:
            return rows
        parts = [torch.ones_like(rows) for _ in range(self.ranks.world_size)]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)


@contextlib.contextmanager
def counting_bytes() -> Iterator[list[int]]:
    """Bytes that this rank receives in collectives; of an all-reduce, what a ring would bring."""
    received = [0]
    world = dist.get_world_size() if dist.is_initialized() else 1

    def counted(real: Callable[..., Any], size: Callable[..., float]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            received[0] += int(size(*arguments))
            return real(*arguments, **named)

        return call

    def bytes_of(tensor: Tensor) -> int:
        return tensor.numel() * tensor.element_size()

    others = (world - 1) / world
    kinds: dict[str, Callable[..., float]] = {
        "all_gather": lambda parts, _: others * sum(map(bytes_of, parts)),
        "all_gather_into_tensor": lambda out, _: others * bytes_of(out),  # of torch before 2.14
        "all_gather_single": lambda out, _: others * bytes_of(out),
        "all_to_all_single": lambda out, *_: bytes_of(out),
        "all_reduce": lambda tensor, *_: 2 * others * bytes_of(tensor),
        "broadcast": lambda tensor, *_: bytes_of(tensor),
    }
    with contextlib.ExitStack() as patched:
        for name, size in kinds.items():
            if not hasattr(dist, name):
                continue
            call = counted(getattr(dist, name), size)
            patched.enter_context(mock.patch.object(dist, name, call))
        yield received


def _views(given: argparse.Namespace, ranks: Ranks, *, rows: int = 1_000) -> tuple[Any, ...]:
    data = DataConfig(global_batch_size=given.batch, view_size=given.view_size)
    loader = SyntheticLoader(
        data, seed=0, rank=ranks.rank, world_size=ranks.world_size, device_index=None
    )
    batch = next(loader)
    return batch.view_q, batch.view_k, batch.sample_ids % rows


def _config(given: argparse.Namespace, world_size: int) -> ModelConfig:
    groups = max(2, world_size)
    return replace(RESNET18, bn_sub_batch=given.batch // groups, shuffle_domain=given.batch)


def _compare(ranks: Ranks, given: argparse.Namespace) -> dict[str, tuple[float, int]]:
    config = _config(given, ranks.world_size)
    sides = {"published": Published(config, ranks), "ours": Ours(config, ranks)}
    # The published code knew no channels_last.
    plain = tuple(v.contiguous() if isinstance(v, Tensor) else v for v in _views(given, ranks))
    views = {"published": plain, "ours": _views(given, ranks)}
    times = interleaved(
        {name: (lambda name=name: sides[name].step(*views[name])) for name in sides},
        steps=given.steps,
    )
    found = {}
    for name, side in sides.items():
        with counting_bytes() as received:
            side.step(*views[name])
        # Gradients are the same bytes on both sides: DDP's go past the counted calls.
        flat = sum(p.numel() * 4 for p in sides["ours"].model.encoder_q.parameters())
        ours = 2 * flat * (ranks.world_size - 1) // ranks.world_size if name == "ours" else 0
        found[name] = (times[name][0], received[0] - ours)
    return found


def _peak(ranks: Ranks, given: argparse.Namespace, side: str) -> int:
    """Bytes above what the process had before the model."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    config = _config(given, ranks.world_size)
    one = Published(config, ranks) if side == "published" else Ours(config, ranks)
    views = _views(given, ranks)
    for _ in range(4):
        one.step(*views)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024


def _mechanism(
    ranks: Ranks, given: argparse.Namespace, config: ModelConfig, rows: int
) -> tuple[int, float]:
    one = Ours(config, ranks, num_ids=rows)
    views = _views(given, ranks, rows=rows)
    size = sum(b.numel() * b.element_size() for b in one.model.dictionary.buffers())
    times = interleaved({"step": lambda: one.step(*views)}, steps=given.steps)
    return size, times["step"][0]


def spawn(job: Callable[..., Any], world_size: int, *arguments: Any) -> list[Any]:
    """`job(ranks, *arguments)` in fresh processes that form a gloo world; what each returned."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder, context.Pool(world_size) as pool:
        meeting = f"file://{Path(folder) / 'meeting'}"
        waiting = [
            pool.apply_async(_child, (job, rank, world_size, meeting, arguments))
            for rank in range(world_size)
        ]
        return [one.get(timeout=1_800) for one in waiting]


def _child(
    job: Callable[..., Any], rank: int, world_size: int, meeting: str, arguments: tuple[Any, ...]
) -> Any:
    named = {"RANK": rank, "WORLD_SIZE": world_size, "LOCAL_RANK": rank}
    os.environ.update({k: str(v) for k, v in (named | {"LOCAL_WORLD_SIZE": world_size}).items()})
    ranks = distributed.start("cpu", rendezvous=meeting)
    try:
        return job(ranks, *arguments)
    finally:
        distributed.shutdown()


if __name__ == "__main__":
    sys.exit(main())
