"""The run: from batches to checkpoints, on every rank in step."""

import contextlib
import dataclasses
import logging
import math
import resource
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from types import FrameType
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from moco_scale.checkpoint import (
    Checkpoint,
    CheckpointWriter,
    UnfinishedError,
    changed_settings,
    check_fits,
    latest,
    load_checkpoint,
    load_weights,
    saved_steps,
)
from moco_scale.distributed import (
    Ranks,
    all_gather_rows,
    all_reduce_flat,
    barrier,
    broadcast_object,
)
from moco_scale.encoders import build_encoder, check_encoder
from moco_scale.errors import CheckpointError, ConfigError, LostRankError, TrainError
from moco_scale.knn import OnlineKnn
from moco_scale.metrics import MetricsLog, StepMetrics, forget_after, open_board
from moco_scale.model import MoCo, ModelConfig, StepOutput
from moco_scale.optim import (
    OptimConfig,
    SchedulePosition,
    build_sgd,
    load_sgd,
    lr_at,
    set_lr,
    step_if,
    steps_left,
)
from moco_scale.phases import ALL_REDUCE, CHECKPOINT, DATA_WAIT, MEASURE, OPTIMIZER
from moco_scale.recording import StepRecorder
from pipelines.config import DataConfig
from pipelines.errors import BadDataError
from pipelines.hashing import hash_words
from pipelines.loader import Batch, Loader
from pipelines.quarantine import ALLOWED_BAD
from pipelines.spans import TRANSFER
from shards import ShardSet
from shards.errors import UserError
from shards.store import open_store

logger = logging.getLogger(__name__)

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""They save and stop a run."""

_MOST_PROFILED = 1000
"""Steps that are profiled: every span of them is kept in memory, and in the trace."""
_DRAWS = 0xA0
"""So that these numbers differ from others drawn from the same seed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """Where a run lives, how it continues, and what it writes down when."""

    url: str = ""
    """URL or path that the run is written to: config, checkpoints, metrics."""
    seed: int = 0
    """Seed of everything: weights, order of the data, views, shuffle."""
    init: str = ""
    """URL of a checkpoint whose weights a new run begins with: another run's, or a published one
    of the same architecture. Everything else (optimizer, position, schedule) begins anew."""
    resume: str = "auto"
    """auto: go on from the newest checkpoint of run.url; never; or the URL of another run's
    checkpoint, which a run without checkpoints of its own goes on from."""
    log_every: int = 10
    """Steps between two rows of metrics."""
    checkpoint_every: int = 500
    """Steps between two checkpoints."""
    keep_checkpoints: int = 3
    """Newest checkpoints that are kept."""
    ledger: bool = False
    """Write down the ids of the samples that every step consumes."""
    knn_labels: str = ""
    """Labels for an online kNN score with every checkpoint: the URL of a CSV with the header
    uri,label, or 'folder'; none: no score."""
    knn_shards: str = ""
    """The labelled shard set; data.shards when empty."""
    knn_images: int = 2000
    """Labelled images that are scored."""
    tensorboard: str = ""
    """Local folder for TensorBoard, which needs the extra of that name; empty: none."""
    max_steps: int = 0
    """Stop after this many steps of the schedule; 0 runs all of it."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto takes CUDA where there is one."""
    bf16: Literal["auto", "on", "off"] = "auto"
    """Encoders in bfloat16 autocast; auto does so on CUDA only."""
    channels_last: bool = True
    """Memory layout of images and convolutions; faster on all devices."""
    compile: bool = False
    """Compile the encoders with torch.compile: a minute or more at the start. Worth a trial on an
    accelerator; on CPU cores it gains nothing (ResNet-18: 1.00 to 1.03 times as fast)."""
    collective_timeout_s: float = 600.0
    """Longest wait for the other processes, in seconds; one that holds the others up for longer,
    be it for its data, is taken for lost, and all end with exit code 75 to be started again."""
    profile_steps: str = ""
    """Steps to be profiled, as first:last, both included: figures of all ranks and a trace of each
    are written under profile/ in the run. Empty: none."""
    torch_profile_ranks: tuple[int, ...] = ()
    """Ranks that run torch.profiler over the same steps, too. It slows them."""
    metrics_port: int = 0
    """Port of an endpoint for Prometheus, /metrics; of the ranks on a host each has its own: this
    plus its local rank. 0: none."""
    metrics_address: str = "0.0.0.0"
    """Address that the endpoints listen at; 127.0.0.1: reached from the same host only."""

    @property
    def profiled(self) -> range:
        """The numbers of the steps to be profiled."""
        return _range_of(self.profile_steps)

    def __post_init__(self) -> None:
        for name in ("log_every", "checkpoint_every", "keep_checkpoints", "knn_images"):
            if getattr(self, name) < 1:
                raise ValueError(f"run.{name} must be at least 1, not {getattr(self, name)}")
        if self.max_steps < 0:
            raise ValueError(f"run.max_steps must be at least 0, not {self.max_steps}")
        if not 0 <= self.metrics_port < 2**16:
            raise ValueError(f"run.metrics_port is 0 to {2**16 - 1}, not {self.metrics_port}")
        if not self.profiled and self.torch_profile_ranks:
            raise ValueError("run.torch_profile_ranks needs the steps: give run.profile_steps")
        if any(rank < 0 for rank in self.torch_profile_ranks):
            raise ValueError(
                f"run.torch_profile_ranks are counted from 0, not {min(self.torch_profile_ranks)}"
            )


def _range_of(steps: str) -> range:
    """Of `first:last`, both included.

    Raises:
        ValueError: it is something else.
    """
    if not steps:
        return range(0)
    first, colon, last = steps.partition(":")
    if not (colon and first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
        raise ValueError(
            f"run.profile_steps is first:last, such as 101:150, counted from 1, not {steps!r}"
        )
    found = range(int(first), int(last) + 1)
    if len(found) > _MOST_PROFILED:
        raise ValueError(
            f"run.profile_steps {steps} are {len(found):,} steps; at most {_MOST_PROFILED:,} are "
            "kept in memory and in a trace"
        )
    return found


@dataclass(frozen=True, kw_only=True, slots=True)
class RunResult:
    """How `Trainer.run` ended."""

    step: int
    """Updates made since the start of the run."""
    steps_now: int
    """Updates made by this call; 0 when the run was finished already."""
    preempted: bool
    """Stopped by a signal, and saved: exit with errors.EXIT_AGAIN, and the same command goes on."""


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
        say: Callable[[str], None] | None = None,
        saved: Callable[[str], None] | None = None,
        encoder: nn.Module | None = None,
    ) -> None:
        """Build the model, and go back to the checkpoint that run.resume asks for.

        Args:
            data, model, optim, run: the run's settings; they must have been validated together.
            loader: yields this rank's part of each global batch; nobody has taken from it yet.
            ranks: from `distributed.start`. Where run.profile_steps shall show the loader's
                threads, too, it was opened with the same `ranks.spans`.
            progress: is shown every row of metrics, on rank 0.
            say: is told what a profile has found, on rank 0.
            saved: is told the URL of each checkpoint that is whole, on rank 0, in another thread.
            encoder: instead of the one that `model` describes; N x 3 x S x S to N x dim.

        Raises:
            ConfigError: the backbone does not take views of data.view_size.
            CheckpointError: no such checkpoint, one of another architecture or recipe, or one
                where run.resume wants none.
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
        if encoder is None:
            encoder = build_encoder(model, seed=run.seed)
            check_encoder(encoder, model, view_size=data.view_size)
        uses_bf16 = run.bf16 == "on" or (run.bf16 == "auto" and ranks.device.type == "cuda")
        self.model = MoCo(
            encoder,
            model,
            seed=run.seed,
            ranks=ranks,
            num_ids=loader.num_ids,
            autocast=torch.bfloat16 if uses_bf16 else None,
        ).to(ranks.device)
        if run.channels_last:
            self.model = self.model.to(memory_format=torch.channels_last)
        if run.compile:
            self.model.compile_encoders()
        self.parameters = list(self.model.encoder_q.parameters())
        self.optimizer = build_sgd(self.parameters, optim)
        self._show = progress if ranks.speaks else None
        self._saved = saved
        self._knn = self._open_knn()
        self._best: tuple[float, int] | None = None
        self._stop = _StopSignals()
        self._flags = _Flags()
        self._save_due = False
        self._skipped = self._skipped_in_a_row = 0
        self._sums = _Sums(ranks.device)
        self._recorder = StepRecorder(
            run.profiled,
            torch_ranks=run.torch_profile_ranks,
            loader=loader,
            ranks=ranks,
            store=self.store,
            settings=self.config,
            say=say or silence,
        )
        self._resume()

    @property
    def position(self) -> SchedulePosition:
        """Where the run is in its data. Its `step` is the run's, unless the shard set has grown or
        shrunk between epochs."""
        loader = self.loader
        return SchedulePosition(
            step=loader.epoch * loader.steps_per_epoch + loader.step_in_epoch,
            images=loader.images,
            steps_per_epoch=loader.steps_per_epoch,
            global_batch_size=self.data_config.global_batch_size,
        )

    @property
    def last_step(self) -> int:
        """Steps of the whole run, if the epochs to come are as long as this one."""
        last = self.step + steps_left(self.position, self.optim_config)
        return min(last, self.run_config.max_steps) if self.run_config.max_steps else last

    @property
    def finished(self) -> bool:
        """Whether all steps have been made."""
        return self.step >= self.last_step

    def run(self) -> RunResult:
        """Train to the last step, or to the signal that stops all ranks at the same step.

        SIGTERM and SIGUSR1 save and stop; see RunResult.preempted.

        Raises:
            TrainError: too many steps had a loss or a gradient that is not finite.
            BadDataError: more samples had to be replaced than data.max_bad_frac allows.
        """
        first_step = self.step
        if self.finished:
            return RunResult(step=self.step, steps_now=0, preempted=False)
        preempted = False
        with self.stepping():
            while not self.finished and not preempted:
                preempted = self.advance()
            self._writer.wait()
            # A rank that left now would make its launcher end the one that is saving.
            barrier(self.ranks)
        return RunResult(
            step=self.step,
            steps_now=self.step - first_step,
            preempted=preempted and not self.finished,
        )

    @contextlib.contextmanager
    def stepping(self) -> Iterator[None]:
        """Signals, log and checkpoints are ready for `advance` while inside, on all ranks."""
        if self.ranks.speaks:
            forget_after(self.store, self.step)
        barrier(self.ranks)
        self._log = MetricsLog(
            self.store,
            rank=self.ranks.rank,
            ledger=self.run_config.ledger,
            first_step=self.step + 1,
        )
        self._writer = CheckpointWriter(
            self.store, keep=self.run_config.keep_checkpoints, saved=self._saved
        )
        self._board = open_board(self.run_config.tensorboard if self.ranks.speaks else "")
        with (
            self._stop.listening(),
            self._log_written(),
            contextlib.closing(self._writer),
            contextlib.closing(self._recorder),
        ):
            self._sums.reset()
            yield

    def advance(self) -> bool:
        """One step, with the row of metrics and the checkpoint that are due after it.

        Returns:
            Whether any rank was told by a signal to stop; then it has been saved.
        """
        self._recorder.begin(self.step + 1)
        preempted = self._advance()
        self._recorder.end(self.step, is_last=preempted or self.finished)
        return preempted

    def _advance(self) -> bool:
        """See `advance`."""
        self._train_step()
        self._save_due = self._save_due or self._due(self.run_config.checkpoint_every)
        preempted = self._hear(of_all=self._save_due)
        # It waits for a step with effect: the ones before may be what broke this one. But for what
        # will not be.
        saving = preempted or self.finished or (self._save_due and not self._skipped_in_a_row)
        if saving or self._due(self.run_config.log_every):
            with self.ranks.spans.of(MEASURE):
                self._measure(scoring=saving and not preempted)
        if saving:
            with self.ranks.spans.of(CHECKPOINT):
                self._save()
        return preempted

    def state_dict(self) -> Checkpoint:
        """Everything that a resume needs."""
        return Checkpoint(
            url="",
            step=self.step,
            model=self.model.state_dict(),
            optimizer=self.optimizer.state_dict(),
            loader=self.loader.state_dict(),
            config=self.config,
            best=self._best,
            skipped_steps=self._skipped,
            versions={name: metadata.version(name) for name in ("moco-scale", "torch")},
            world_size=self.ranks.world_size,
        )

    def load_state_dict(self, checkpoint: Checkpoint) -> None:
        """Go back to a checkpoint; before the first batch only.

        Raises:
            CheckpointError: it is of another architecture or recipe.
            StateError: its position belongs to another shard set or seed.
        """
        check_fits(checkpoint, model=self.model.state_dict(), config=self.config)
        if checkpoint.loader:  # an import has taken nothing yet
            self.loader.load_state_dict(checkpoint.loader)
        self.model.load_state_dict(checkpoint.model)
        load_sgd(self.optimizer, checkpoint.optimizer)
        self.step = checkpoint.step
        self._best = checkpoint.best
        self._skipped = checkpoint.skipped_steps
        self.resumed_from = checkpoint.url
        changed = changed_settings(checkpoint, self.config)
        if changed and self.ranks.speaks:
            logger.warning("not as %s was made: %s", checkpoint.url, ", ".join(changed))

    def _train_step(self) -> None:
        """One update."""
        lr = lr_at(self.position, self.optim_config)
        waited = time.perf_counter()
        with self.ranks.spans.of(DATA_WAIT):
            batch = next(self.loader)
        self._sums.wait_s += time.perf_counter() - waited
        self._log.consumed(self.step + 1, batch)

        # What dropout draws is a function of the step and the rank, in a resumed run, too.
        drawn = hash_words(self.run_config.seed, _DRAWS, self.step, self.ranks.rank)
        torch.manual_seed(int(drawn[0] >> 1))
        with self.ranks.spans.of(OPTIMIZER):
            set_lr(self.optimizer, lr)
            self.optimizer.zero_grad()
        output = self._backward(batch)
        with self.ranks.spans.of(ALL_REDUCE):
            agreed, is_finite = self._average(num_replaced=batch.num_replaced)
        with self.ranks.spans.of(OPTIMIZER):
            step_if(is_finite, self.optimizer)
        self.model.update(output, is_finite=is_finite)

        self.step += 1
        self._sums.add(output, replaced=agreed[1], is_finite=is_finite)
        self._last_output = output
        flags = torch.stack([agreed[0], (~is_finite).to(agreed.dtype)])
        self._flags.put(flags, _Taken(self.step, batch.positions, batch.sample_ids))

    def _backward(self, batch: Batch) -> StepOutput:
        layout = torch.channels_last if self.run_config.channels_last else torch.contiguous_format
        with self.ranks.spans.of(TRANSFER):
            view_q, view_k = (
                view.to(self.ranks.device, non_blocking=True).contiguous(memory_format=layout)
                for view in (batch.view_q, batch.view_k)
            )
        return self.model.backward(
            view_q,
            view_k,
            sample_ids=batch.sample_ids,
            step=self.step,
            accumulation=self.optim_config.accumulation,
        )

    def _average(self, *, num_replaced: int) -> tuple[Tensor, Tensor]:
        """Average gradients and BN statistics over ranks, and with them what ranks must agree on.

        Returns:
            Whether any rank was told to stop (above 0) and the samples replaced over all ranks;
            and whether all that was averaged is finite, which is the same on every rank.
        """
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        agreed = torch.tensor(
            [float(self._stop.received), float(num_replaced)], dtype=gradients[0].dtype
        ).to(self.ranks.device, non_blocking=True)
        is_finite = all_reduce_flat([*gradients, *self.model.statistics(), agreed], self.ranks)
        return agreed * self.ranks.world_size, is_finite

    def _hear(self, *, of_all: bool) -> bool:
        """Hear of steps that had no effect, and whether any rank was told by a signal to stop.

        Args:
            of_all: of the last step, too, which an accelerator may still be busy with.
        """
        told_to_stop = False
        for (stop, skipped), taken in self._flags.take(of_all=of_all):
            told_to_stop = told_to_stop or stop > 0
            if skipped:
                self._note_skipped(taken)
            else:
                self._skipped_in_a_row = 0
        if told_to_stop and not of_all:
            self._hear(of_all=True)
        return told_to_stop

    def _note_skipped(self, taken: "_Taken") -> None:
        """Write down the samples of a step that had no effect; stop if there are too many."""
        self._skipped += 1
        self._skipped_in_a_row += 1
        self._log.skipped(taken.step, positions=taken.positions, sample_ids=taken.sample_ids)
        logger.warning(
            "step %d: not finite (loss, gradient or statistics); it has changed nothing", taken.step
        )
        optim = self.optim_config
        if self._skipped_in_a_row > optim.max_skipped_steps:
            which = f"{self._skipped_in_a_row} steps in a row were not finite, more than "
            setting = "optim.max_skipped_steps"
        elif self._skipped > max(optim.max_skipped_steps, optim.max_skipped_frac * taken.step):
            which = f"{self._skipped} steps were not finite, more than "
            setting = f"optim.max_skipped_frac {optim.max_skipped_frac:g} of them"
        else:
            return
        raise TrainError(
            f"step {taken.step}: {which}{setting}; {self.store.url}/skipped names their samples: "
            "start again from the last checkpoint with a lower optim.lr or a longer "
            "optim.lr_warmup_steps"
        )

    def _due(self, every: int) -> bool:
        return self.step % every == 0 or self.finished

    def _measure(self, *, scoring: bool) -> None:
        """A row of metrics; the one place where the host waits for the device."""
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        grad_norm = torch.nn.utils.get_total_norm(gradients)
        steps, images = self._sums.steps, self._sums.steps * self.data_config.global_batch_size
        # Every rank sees the same figures, so all of them stop, or none.
        rows = all_gather_rows(self._sums.row(grad_norm), self.ranks).cpu()
        loss, accuracy, replaced, norm, finite = (rows[:, :5].mean(dim=0)).tolist()
        wait_s, stall_s, elapsed_s, memory_bytes = rows[:, 5:].amax(dim=0).tolist()
        score = None
        if self._knn is not None and scoring:
            score = self._knn.accuracy(self.model.encoder_q)
            if self._best is None or score > self._best[0]:
                self._best = (score, self.step)
        health = self.model.health(self._last_output) if self.ranks.speaks else {}
        metrics = StepMetrics(
            step=self.step,
            epoch=self.position.step / self.position.steps_per_epoch,
            loss=loss / finite if finite else None,
            lookup_accuracy=accuracy / finite if finite else None,
            lr=self.optimizer.param_groups[0]["lr"],
            grad_norm=norm if math.isfinite(norm) else None,
            samples_per_s=images / elapsed_s,
            step_s=elapsed_s / steps,
            data_wait_frac=wait_s / elapsed_s,
            checkpoint_stall_ms=1000 * stall_s,
            queue_filled_frac=self.model.filled_frac(
                self.position.images - self._skipped * self.data_config.global_batch_size
            ),
            world_size=self.ranks.world_size,
            last_step=self.last_step,
            skipped_steps=steps - round(finite),
            queue_age_steps=self.model.oldest_key(
                self.step, global_batch_size=self.data_config.global_batch_size
            ),
            memory_bytes=round(memory_bytes),
            alignment=health.get("alignment"),
            uniformity=health.get("uniformity"),
            effective_rank=health.get("effective_rank"),
            duplicate_key_frac=health.get("duplicate_key_frac"),
            knn_accuracy=score,
        )
        if self.ranks.speaks:
            self._log.add(metrics)
        if self._board is not None:
            self._board.add(metrics)
        if self._show is not None:
            self._show(metrics)
        self._check(replaced=round(replaced))
        self._sums.reset()

    def _check(self, *, replaced: int) -> None:
        """Stop a run whose data are too bad; before it is saved."""
        self._replaced += replaced
        # The loader keeps the same budget for its own rank; this one is for all of them together.
        seen = self.data_config.global_batch_size * (self.step - self._first_counted)
        if self._replaced > max(ALLOWED_BAD, self.data_config.max_bad_frac * seen):
            raise BadDataError(
                f"step {self.step}: {self._replaced} bad samples had to be replaced, more than "
                f"data.max_bad_frac {self.data_config.max_bad_frac} of {seen}; "
                f"{self.store.url}/quarantine lists them: pack the bucket again, or raise "
                "data.max_bad_frac"
            )

    def _save(self) -> None:
        """A checkpoint; the rows that led to it first, so that no step is lost between them."""
        began = time.perf_counter()
        self._save_due = False
        self._log.flush(next_step=self.step + 1)
        barrier(self.ranks)  # a checkpoint whose rows a lost rank still held would leave a gap
        if self.ranks.speaks:
            best = self._best[1] if self._best else None
            self._writer.save(self.state_dict(), best=best)
        self._sums.stall_s += time.perf_counter() - began

    def _open_knn(self) -> OnlineKnn | None:
        run, data = self.run_config, self.data_config
        if not run.knn_labels:
            return None
        shards = run.knn_shards or (data.shards[0] if data.shards else "")
        if not shards:
            raise ConfigError("run.knn_labels needs a shard set: give run.knn_shards")
        return OnlineKnn(
            ShardSet.open(shards),
            run.knn_labels,
            num_images=run.knn_images,
            view_size=data.view_size,
            loader=data.loader,
            ranks=self.ranks,
        )

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
        elif self.run_config.init:
            weights, is_behind = load_weights(self.run_config.init)
            self.model.begin_with(weights, where=self.run_config.init, is_behind=is_behind)
        self._first_counted = self.step

    def _find_checkpoint(self, asked: str) -> Checkpoint | None:
        """The checkpoint to go on from; None for a new run."""
        own = self._own_checkpoint()
        if own is None:
            return None if asked in ("auto", "never") else load_checkpoint(asked)
        # Of another's, too: this run went on from it, was stopped since, and is started again.
        if asked == "auto" or (asked != "never" and own.config["run"]["resume"] == asked):
            return own
        raise CheckpointError(
            f"{self.store.url} already has checkpoints (up to step {own.step}), and "
            f"run.resume is {asked!r}; give another run.url, or run.resume auto"
        )

    def _own_checkpoint(self) -> Checkpoint | None:
        if not saved_steps(self.store):
            return None
        try:
            return latest(self.store)
        except UnfinishedError as err:  # it was stopped while it wrote its first
            logger.warning("%s; beginning anew", err)
            return None

    @contextlib.contextmanager
    def _log_written(self) -> Iterator[None]:
        """Write the rows that are left when training fails; that failure is the one to report."""
        try:
            yield
        except LostRankError:  # the next start makes these steps again, and must not wait for this
            raise
        except BaseException:
            try:
                self._log.flush(next_step=self.step + 1)
            except UserError as err:
                logger.warning("the last metrics could not be written: %s", err)
            raise


def silence(_: str) -> None:
    """For who does not listen."""


def _most_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


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
        before = {number: signal.signal(number, self._receive) for number in STOP_SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002  signal's signature
        self.received = True


class _Taken(NamedTuple):
    """What a step took."""

    step: int
    positions: NDArray[np.int64]
    sample_ids: NDArray[np.int64]


class _Flags:
    """Flags of steps, read off the device without stalling it: on an accelerator, a step late."""

    def __init__(self) -> None:
        self._pending: deque[tuple[Tensor, torch.cuda.Event | None, _Taken]] = deque()

    def put(self, flags: Tensor, taken: _Taken) -> None:
        """Begin to copy a step's flags to the host."""
        event = None
        if flags.device.type != "cpu":
            copied = torch.empty(flags.shape, dtype=flags.dtype, pin_memory=True)
            flags = copied.copy_(flags, non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch's
            event.record()
        self._pending.append((flags, event, taken))

    def take(self, *, of_all: bool) -> Iterator[tuple[list[float], _Taken]]:
        """The flags that have come, by step.

        Args:
            of_all: wait for the last step's.
        """
        while self._pending:
            flags, event, taken = self._pending[0]
            if event is not None:
                if len(self._pending) == 1 and not of_all:
                    return
                event.synchronize()  # of the step before: the last one is queued behind it
            self._pending.popleft()
            yield flags.tolist(), taken


class _Sums:
    """Sums since the last row of metrics; those of the device stay there."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.reset()

    def reset(self) -> None:
        self.steps = 0
        self.wait_s = 0.0
        self.stall_s = 0.0
        """Seconds that saving held the step up."""
        self._loss = torch.zeros((), dtype=torch.float64, device=self._device)
        self._accuracy = torch.zeros_like(self._loss)
        self._replaced = torch.zeros_like(self._loss)
        self._finite = torch.zeros_like(self._loss)
        self._started = time.perf_counter()

    def add(self, output: StepOutput, *, replaced: Tensor, is_finite: Tensor) -> None:
        self.steps += 1
        # A loss that is not finite makes the gradient so: such a step counts in neither mean.
        self._loss += torch.where(is_finite, output.loss, 0.0)
        self._accuracy += torch.where(is_finite, output.lookup_accuracy, 0.0)
        self._replaced += replaced
        self._finite += is_finite

    def row(self, grad_norm: Tensor) -> Tensor:
        """1 x 9: loss, accuracy, replaced, gradient norm and finite steps; seconds that were
        waited for data, held up by saving, and passed; bytes of memory."""
        summed = torch.stack(
            [self._loss, self._accuracy, self._replaced, grad_norm.double(), self._finite]
        )
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # the seconds count work, not its launching
        elapsed_s = time.perf_counter() - self._started
        seconds = [self.wait_s, self.stall_s, elapsed_s]
        host = torch.tensor([*seconds, _most_memory(self._device)], dtype=torch.float64)
        return torch.cat([summed, host.to(self._device)]).unsqueeze(0)
