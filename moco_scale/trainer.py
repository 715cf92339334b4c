"""The run: from batches to checkpoints, on every rank in step."""

import contextlib
import dataclasses
import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from types import FrameType
from typing import Literal

import torch
from torch import Tensor, nn

from moco_scale.checkpoint import (
    Checkpoint,
    check_fits,
    latest,
    load_checkpoint,
    save_checkpoint,
    saved_steps,
)
from moco_scale.distributed import (
    Ranks,
    all_gather_rows,
    all_reduce_flat,
    barrier,
    broadcast_object,
)
from moco_scale.encoders import build_encoder
from moco_scale.errors import CheckpointError, TrainError
from moco_scale.metrics import MetricsLog, StepMetrics, forget_after
from moco_scale.model import MoCo, ModelConfig, StepOutput
from moco_scale.optim import OptimConfig, build_sgd, lr_at, set_lr
from pipelines.config import DataConfig
from pipelines.errors import BadDataError
from pipelines.loader import Batch, Loader
from pipelines.quarantine import ALLOWED_BAD
from shards.errors import UserError
from shards.store import open_store

logger = logging.getLogger(__name__)

EXIT_PREEMPTED = 75
"""Exit code of a run that a signal stopped and that saved itself: start the same command again."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """Where a run lives, how it continues, and what it writes down when."""

    url: str = ""
    """URL or path that the run is written to: config, checkpoints, metrics."""
    seed: int = 0
    """Seed of everything: weights, order of the data, views, shuffle."""
    resume: str = "auto"
    """auto: go on from the newest checkpoint of run.url; never; or the URL of a checkpoint."""
    log_every: int = 10
    """Steps between two rows of metrics."""
    checkpoint_every: int = 500
    """Steps between two checkpoints."""
    keep_checkpoints: int = 3
    """Newest checkpoints that are kept."""
    ledger: bool = False
    """Write down the ids of the samples that every step consumes."""
    max_steps: int = 0
    """Stop after this many steps of the schedule; 0 runs all of it."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto takes CUDA where there is one."""
    bf16: Literal["auto", "on", "off"] = "auto"
    """Encoders in bfloat16 autocast; auto does so on CUDA only."""
    channels_last: bool = True
    """Memory layout of images and convolutions; faster on all devices."""

    def __post_init__(self) -> None:
        for name in ("log_every", "checkpoint_every", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ValueError(f"run.{name} must be at least 1, not {getattr(self, name)}")
        if self.max_steps < 0:
            raise ValueError(f"run.max_steps must be at least 0, not {self.max_steps}")


@dataclass(frozen=True, kw_only=True, slots=True)
class RunResult:
    """How `Trainer.run` ended."""

    step: int
    """Updates made since the start of the run."""
    steps_now: int
    """Updates made by this call; 0 when the run was finished already."""
    preempted: bool
    """Stopped by a signal, and saved: exit with EXIT_PREEMPTED, and the same command goes on."""


class Trainer:
    """Trains a MoCo on what a loader yields; the same numbers at every world size.

    Nothing is written before `run`. All ranks make the same calls in the same order.
    """

    def __init__(
        self,
        *,
        data: DataConfig,
        model: ModelConfig,
        optim: OptimConfig,
        run: RunConfig,
        loader: Loader,
        ranks: Ranks,
        progress: Callable[[StepMetrics], None] | None = None,
        encoder: nn.Module | None = None,
    ) -> None:
        """Build the model, and go back to the checkpoint that run.resume asks for.

        Args:
            data, model, optim, run: the run's settings; they must have been validated together.
            loader: yields this rank's part of each global batch; nobody has taken from it yet.
            ranks: from `distributed.start`.
            progress: is shown every row of metrics, on rank 0.
            encoder: instead of the one that `model` describes; N x 3 x S x S to N x dim.

        Raises:
            CheckpointError: no such checkpoint, one of another architecture, or one where
                run.resume wants none.
            StateError: the checkpoint's position belongs to another shard set or seed.
        """
        self.config = {
            "data": dataclasses.asdict(data),
            "model": dataclasses.asdict(model),
            "optim": dataclasses.asdict(optim),
            "run": dataclasses.asdict(run),
        }
        self.run_config = run
        self.optim_config = optim
        self.data_config = data
        self.loader = loader
        self.ranks = ranks
        self.store = open_store(run.url)
        self.step = 0
        self.resumed_from = ""
        """URL of the checkpoint that this run continues; empty for a new run."""
        encoder = build_encoder(model, seed=run.seed) if encoder is None else encoder
        self.model = MoCo(encoder, model, seed=run.seed, ranks=ranks).to(ranks.device)
        if run.channels_last:
            self.model = self.model.to(memory_format=torch.channels_last)
        self.parameters = list(self.model.encoder_q.parameters())
        self.optimizer = build_sgd(self.parameters, optim)
        self._show = progress if ranks.speaks else None
        self._autocast = run.bf16 == "on" or (run.bf16 == "auto" and ranks.device.type == "cuda")
        self._stop = _StopSignals()
        self._flags = _HostCopy()
        self._sums = _Sums(ranks.device)
        self._resume()

    @property
    def steps_per_epoch(self) -> int:
        """Of the version of the shard set that the run began with."""
        return self.loader.steps_per_epoch

    @property
    def last_step(self) -> int:
        """Steps of the whole run."""
        steps = self.optim_config.epochs * self.steps_per_epoch
        return min(steps, self.run_config.max_steps) if self.run_config.max_steps else steps

    @property
    def finished(self) -> bool:
        """Whether all steps have been made."""
        return self.step >= self.last_step

    def run(self) -> RunResult:
        """Train to the last step, or to the signal that stops all ranks at the same step.

        SIGTERM and SIGUSR1 save and stop; see RunResult.preempted.

        Raises:
            TrainError: the loss or the gradient is not finite.
            BadDataError: more samples had to be replaced than data.max_bad_frac allows.
        """
        first_step = self.step
        if self.finished:
            return RunResult(step=self.step, steps_now=0, preempted=False)
        if self.ranks.speaks:
            forget_after(self.store, self.step)
        barrier(self.ranks)
        self._log = MetricsLog(
            self.store,
            rank=self.ranks.rank,
            ledger=self.run_config.ledger,
            first_step=self.step + 1,
        )
        preempted = False
        with self._stop.listening(), self._log_written():
            self._sums.reset()
            while not self.finished and not preempted:
                preempted = self._train_step()
                saving = self._due(self.run_config.checkpoint_every) or preempted
                if saving or self._due(self.run_config.log_every):
                    self._measure()
                if saving:
                    self._save()
        return RunResult(
            step=self.step,
            steps_now=self.step - first_step,
            preempted=preempted and not self.finished,
        )

    def state_dict(self) -> Checkpoint:
        """Everything that a resume needs."""
        device_type = self.ranks.device.type
        rng = {"cpu": torch.get_rng_state()}
        if device_type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.ranks.device)
        return Checkpoint(
            url="",
            step=self.step,
            model=self.model.state_dict(),
            optimizer=self.optimizer.state_dict(),
            loader=self.loader.state_dict(),
            rng=rng,
            config=self.config,
            versions={name: metadata.version(name) for name in ("moco-scale", "torch")},
            world_size=self.ranks.world_size,
        )

    def load_state_dict(self, checkpoint: Checkpoint) -> None:
        """Go back to a checkpoint; before the first batch only.

        Raises:
            CheckpointError: it is of another architecture.
            StateError: its position belongs to another shard set or seed.
        """
        check_fits(checkpoint, model=self.model.state_dict(), config=self.config)
        self.loader.load_state_dict(checkpoint.loader)
        self.model.load_state_dict(checkpoint.model)
        self.optimizer.load_state_dict(checkpoint.optimizer)
        torch.set_rng_state(checkpoint.rng["cpu"])
        if self.ranks.device.type == "cuda" and "cuda" in checkpoint.rng:
            torch.cuda.set_rng_state(checkpoint.rng["cuda"], self.ranks.device)
        self.step = checkpoint.step
        self.resumed_from = checkpoint.url

    def _train_step(self) -> bool:
        """One update; True when a signal reached any rank."""
        waited = time.perf_counter()
        batch = next(self.loader)
        self._sums.wait_s += time.perf_counter() - waited
        self._log.consumed(self.step + 1, batch)

        set_lr(
            self.optimizer,
            lr_at(self.step, self.optim_config, steps_per_epoch=self.steps_per_epoch),
        )
        self.optimizer.zero_grad()
        output = self._forward(batch)
        output.loss.backward()  # type: ignore[no-untyped-call]  # torch does not type it
        stop, replaced = self._average(num_replaced=batch.num_replaced)
        self.model.commit()
        self.optimizer.step()
        self.model.update(output)

        self.step += 1
        self._sums.add(output, replaced)
        return self._flags.read(stop) > 0

    def _forward(self, batch: Batch) -> StepOutput:
        layout = torch.channels_last if self.run_config.channels_last else torch.contiguous_format
        device = self.ranks.device
        view_q = batch.view_q.to(device, non_blocking=True).contiguous(memory_format=layout)
        view_k = batch.view_k.to(device, non_blocking=True).contiguous(memory_format=layout)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=self._autocast):
            output: StepOutput = self.model(
                view_q, view_k, sample_ids=batch.sample_ids, step=self.step
            )
        return output

    def _average(self, *, num_replaced: int) -> tuple[Tensor, Tensor]:
        """Average gradients and BN statistics over ranks, and with them what ranks must agree on.

        Returns:
            Whether any rank was told to stop (above 0), and the samples replaced over all ranks.
        """
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        agreed = torch.tensor(
            [float(self._stop.received), float(num_replaced)], dtype=gradients[0].dtype
        ).to(self.ranks.device, non_blocking=True)
        all_reduce_flat([*gradients, *self.model.statistics(), agreed], self.ranks)
        return agreed[0], agreed[1] * self.ranks.world_size

    def _due(self, every: int) -> bool:
        return self.step % every == 0 or self.finished

    def _measure(self) -> None:
        """A row of metrics; the one place where the host waits for the device."""
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        grad_norm = torch.nn.utils.get_total_norm(gradients)
        steps, images = self._sums.steps, self._sums.steps * self.data_config.global_batch_size
        # Every rank sees the same figures, so all of them stop, or none.
        rows = all_gather_rows(self._sums.row(grad_norm), self.ranks).cpu()
        loss, accuracy, replaced, norm = (rows[:, :4].mean(dim=0)).tolist()
        wait_s, elapsed_s = rows[:, 4:].amax(dim=0).tolist()
        metrics = StepMetrics(
            step=self.step,
            epoch=self.step / self.steps_per_epoch,
            loss=loss / steps,
            lookup_accuracy=accuracy / steps,
            lr=self.optimizer.param_groups[0]["lr"],
            grad_norm=norm,
            samples_per_s=images / elapsed_s,
            step_s=elapsed_s / steps,
            data_wait_frac=wait_s / elapsed_s,
            queue_filled_frac=min(
                1.0, self.step * self.data_config.global_batch_size / self.model.queue.shape[1]
            ),
            world_size=self.ranks.world_size,
        )
        if self.ranks.speaks:
            self._log.add(metrics)
        if self._show is not None:
            self._show(metrics)
        self._check(metrics, replaced=round(replaced))
        self._sums.reset()

    def _check(self, metrics: StepMetrics, *, replaced: int) -> None:
        """Stop a run that cannot become good; before it is saved."""
        if not (math.isfinite(metrics.loss) and math.isfinite(metrics.grad_norm)):
            raise TrainError(
                f"step {self.step}: loss {metrics.loss}, gradient norm {metrics.grad_norm}; start "
                "again from the last checkpoint with a lower optim.lr or a longer "
                "optim.lr_warmup_steps"
            )
        self._replaced += replaced
        # The loader keeps the same budget for its own rank; this one is for all of them together.
        seen = self.data_config.global_batch_size * (self.step - self._first_counted)
        if self._replaced > max(ALLOWED_BAD, self.data_config.max_bad_frac * seen):
            raise BadDataError(
                f"step {self.step}: {self._replaced} bad samples had to be replaced, more than "
                f"data.max_bad_frac {self.data_config.max_bad_frac} of {seen}; pack the bucket "
                "again, or raise data.max_bad_frac"
            )

    def _save(self) -> None:
        """A checkpoint; the rows that led to it first, so that no step is lost between them."""
        self._log.flush(next_step=self.step + 1)
        if self.ranks.speaks:
            url = save_checkpoint(
                self.store, self.state_dict(), keep=self.run_config.keep_checkpoints
            )
            logger.info("saved %s", url)
        # A rank that left now would make its launcher end the one that is saving.
        barrier(self.ranks)

    def _resume(self) -> None:
        self._replaced = 0
        # Rank 0 looks, so that all ranks go on from the same checkpoint or fail alike.
        found, error = None, None
        if self.ranks.speaks:
            try:
                found = self._find_checkpoint(self.run_config.resume)
            except UserError as err:
                error = err
        url, problem = broadcast_object(
            (found.url if found else "", str(error) if error else ""), self.ranks
        )
        if problem:
            raise error or CheckpointError(problem)
        if url:
            self.load_state_dict(found or load_checkpoint(url))
        self._first_counted = self.step

    def _find_checkpoint(self, asked: str) -> Checkpoint | None:
        """The checkpoint to go on from; None for a new run."""
        steps = saved_steps(self.store)
        if asked == "auto":
            return latest(self.store) if steps else None
        if steps:
            raise CheckpointError(
                f"{self.store.url} already has checkpoints (up to step {steps[-1]}), and "
                f"run.resume is {asked!r}; give another run.url, or run.resume auto"
            )
        return None if asked == "never" else load_checkpoint(asked)

    @contextlib.contextmanager
    def _log_written(self) -> Iterator[None]:
        """Write the rows that are left when training fails; that failure is the one to report."""
        try:
            yield
        except BaseException:
            try:
                self._log.flush(next_step=self.step + 1)
            except UserError as err:
                logger.warning("the last metrics could not be written: %s", err)
            raise


class _StopSignals:
    """Whether SIGTERM or SIGUSR1 has come."""

    def __init__(self) -> None:
        self.received = False

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Take the signals over while inside; only the main thread can."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {
            number: signal.signal(number, self._receive)
            for number in (signal.SIGTERM, signal.SIGUSR1)
        }
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002  signal's signature
        self.received = True


class _HostCopy:
    """Reads a number off the device without stalling it: on an accelerator, one call late."""

    def __init__(self) -> None:
        self._pending: tuple[Tensor, torch.cuda.Event] | None = None

    def read(self, value: Tensor) -> float:
        if value.device.type == "cpu":
            return float(value)
        previous = self._pending
        host = torch.empty((), dtype=value.dtype, pin_memory=True)
        host.copy_(value, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch's
        event.record()
        self._pending = (host, event)
        if previous is None:
            return 0.0
        previous[1].synchronize()  # of the step before: this one is already queued behind it
        return float(previous[0])


class _Sums:
    """Sums since the last row of metrics; those of the device stay there."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.reset()

    def reset(self) -> None:
        self.steps = 0
        self.wait_s = 0.0
        self._loss = torch.zeros((), dtype=torch.float64, device=self._device)
        self._accuracy = torch.zeros_like(self._loss)
        self._replaced = torch.zeros_like(self._loss)
        self._started = time.perf_counter()

    def add(self, output: StepOutput, replaced: Tensor) -> None:
        self.steps += 1
        self._loss += output.loss.detach()
        self._accuracy += output.lookup_accuracy
        self._replaced += replaced

    def row(self, grad_norm: Tensor) -> Tensor:
        """1 x 6: loss, accuracy, replaced, gradient norm, seconds waited, seconds elapsed."""
        summed = torch.stack([self._loss, self._accuracy, self._replaced, grad_norm.double()])
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # the seconds count work, not its launching
        host = torch.tensor([self.wait_s, time.perf_counter() - self._started], dtype=torch.float64)
        return torch.cat([summed, host.to(self._device)]).unsqueeze(0)
