"""Some steps of a run recorded as it goes: a trace of each rank, and one profile of all of them."""

import contextlib
import gzip
import logging
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from moco_scale.distributed import Ranks, broadcast_object, gather_objects
from moco_scale.phases import DATA_WAIT, STEP, DeviceSpans, seconds_by_phase
from moco_scale.profiles import Profile, Quantiles, Run, about, in_run, profile_bytes
from moco_scale.sampler import Sampler
from moco_scale.stragglers import RankSeconds, figures_of, find_straggler
from moco_scale.trace import trace_bytes
from moco_scale.verdict import model_of, verdict_of
from pipelines.loader import Loader
from pipelines.spans import VIEWS, Span
from pipelines.streaming_loader import threads_of_a_rank
from shards.errors import StoreError
from shards.store import Store

logger = logging.getLogger(__name__)

FOLDER = "profile"
_PARTS_SHOWN, _RANKS_SHOWN = 4, 8


class StepRecorder:
    """Records the steps of a window, and writes down what it found when they are done.

    All ranks call it at the same steps. Outside the window it does nothing.
    """

    def __init__(
        self,
        window: range,
        *,
        torch_ranks: Sequence[int],
        loader: Loader,
        ranks: Ranks,
        store: Store,
        settings: dict[str, Any],
        say: Callable[[str], None],
    ) -> None:
        """
        Args:
            window: numbers of the steps.
            torch_ranks: those that run torch.profiler, too.
            loader: of this rank; its spans go to `ranks.spans`.
            store: of the run.
            settings: of the run, as nested dicts.
            say: is told what was found, on rank 0.
        """
        self._window = window
        self._torch_ranks = torch_ranks
        self._loader = loader
        self._ranks = ranks
        self._store = store
        self._settings = settings
        self._say = say
        self._recording: Recording | None = None
        self._step = contextlib.ExitStack()

    def begin(self, step: int) -> None:
        """A step begins."""
        if step not in self._window:
            return
        if self._recording is None:
            self._recording = Recording(
                self._ranks,
                self._loader,
                first_step=step,
                uses_torch=self._ranks.rank in self._torch_ranks,
            )
        self._step.enter_context(self._ranks.spans.of(STEP))

    def end(self, step: int, *, is_last: bool) -> None:
        """A step has ended.

        Args:
            is_last: no other follows in this process.
        """
        self._step.close()
        if self._recording is not None and (is_last or step == self._window[-1]):
            recording, self._recording = self._recording, None
            recording.stop()
            self._write(recording, last_step=step)

    def close(self) -> None:
        """Stop without a word: the run has failed, and the other ranks may not answer."""
        self._step.close()
        if self._recording is not None:
            self._recording.abandon()
            self._recording = None

    def _write(self, recording: "Recording", *, last_step: int) -> None:
        ranks = self._ranks
        run = recording.run(global_batch_size=self._settings["data"]["global_batch_size"])
        name = f"{FOLDER}/rank-{ranks.rank:05}"
        files = {
            f"{name}.trace.json.gz": trace_bytes(
                recording.spans,
                recording.sampler.moments,
                rank=ranks.rank,
                host=socket.gethostname(),
                first_thread=recording.thread,
                zero_s=recording.zero_s,
                sampled_from_s=recording.sampler.began_s,
            )
        }
        if recording.torch_trace is not None:
            files[f"{name}.torch.json.gz"] = recording.torch_trace
        lines: list[str] = []
        if ranks.speaks:
            profile = self._profile(run)
            files[f"{FOLDER}/profile.json"] = profile_bytes(profile)
            lines = _in_words(profile, steps=range(recording.first_step, last_step + 1))
        try:
            for path, content in files.items():
                self._store.put(path, content)
        except StoreError as err:  # no reason to end a run
            logger.warning("the profile could not be written: %s", err)
            lines = lines[:-1]
        for line in lines:
            self._say(line.format(folder=self._store.uri(FOLDER)))

    def _profile(self, run: Run) -> Profile:
        ranks = self._ranks
        cores = threads_of_a_rank(ranks.local_world_size)
        return Profile(
            about=about(" ".join(sys.argv), accelerator=accelerator_of(ranks)),
            settings=self._settings,
            world_size=ranks.world_size,
            batch_size=self._settings["data"]["global_batch_size"] // ranks.world_size,
            cores=cores,
            runs=(run,),
            verdict=verdict_of([run], [model_of(run, cores=cores)]),
        )


class Recording:
    """Steps that are being recorded, on one rank; all ranks begin and stop at the same steps.

    Each is to be inside of a span STEP.
    """

    def __init__(self, ranks: Ranks, loader: Loader, *, first_step: int, uses_torch: bool) -> None:
        self.first_step = first_step
        self.thread = threading.current_thread().name
        self.spans: list[Span] = []
        self.steps: list[dict[str, float]] = []
        """Seconds by phase."""
        self.torch_trace: bytes | None = None
        self.end_s = 0.0
        self._ranks = ranks
        # The moment that is 0 in all traces, by the clock that hosts share.
        zero = broadcast_object(time.time(), ranks)
        self.zero_s = time.perf_counter() - (time.time() - zero)
        self.sampler = Sampler(
            loader, cores=threads_of_a_rank(ranks.local_world_size), device=ranks.device
        )
        self._torch = _torch_profiler(ranks.device) if uses_torch else None
        if self._torch is not None:
            self._torch.start()
        self._end_on_device: Callable[[], None] | None = None
        if isinstance(ranks.spans, DeviceSpans):
            self._end_on_device = ranks.spans.begin_on_device()
        self.sampler.__enter__()
        ranks.spans.take()
        ranks.spans.recording = True
        self.start_s = time.perf_counter()
        self.cpu_s = time.process_time()

    def abandon(self) -> None:
        """Stop, without asking the device: what it is busy with may be waiting for a lost rank."""
        self._ranks.spans.recording = False
        self.sampler.__exit__(None, None, None)

    def stop(self) -> None:
        """And look at what was recorded."""
        spans = self._ranks.spans
        spans.recording = False
        if self._end_on_device is not None:
            self._end_on_device()
        self.end_s = time.perf_counter()
        self.cpu_s = time.process_time() - self.cpu_s
        self.sampler.__exit__(None, None, None)
        self.spans = spans.take()
        timed = spans.thread if isinstance(spans, DeviceSpans) else self.thread
        self.steps = seconds_by_phase(self.spans, thread=timed)
        if self._torch is not None:
            self._torch.stop()
            self.torch_trace = _exported(self._torch)

    def run(self, *, global_batch_size: int) -> Run:
        """What was recorded, with the figures of all ranks, which all call this after `stop`."""
        told = RankSeconds.of(socket.gethostname(), self.steps)
        size = global_batch_size // self._ranks.world_size
        seconds = [sum(step.values()) for step in self.steps]
        return Run(
            steps=len(seconds),
            samples_per_s=len(seconds) * global_batch_size / (self.end_s - self.start_s),
            cpu_s_per_1000=1000 * self.cpu_s / (len(seconds) * size),
            step=Quantiles.of(seconds) or _NO_TIME,
            stages=in_run(
                _of_stages(self.spans, self.thread, batch_size=size),
                start_s=self.start_s,
                end_s=self.end_s,
            ),
            ranks=figures_of(gather_objects(told, self._ranks)),
            moments=tuple(self.sampler.moments),
        )


def _of_stages(spans: Iterable[Span], thread: str, *, batch_size: int) -> list[Span]:
    """What `in_run` counts: the loader's spans; and of the step, the part after its wait."""
    found, step = [], None
    for one in sorted(spans, key=lambda one: (one.start_s, -one.end_s)):
        if one.thread != thread or one.name == f"wait for {VIEWS}":
            found.append(one)
        elif one.name == STEP:
            step = one
        elif one.name == DATA_WAIT and step is not None:
            found.append(
                step._replace(start_s=one.end_s, cpu_s=step.cpu_s - one.cpu_s, samples=batch_size)
            )
    return found


def _in_words(profile: Profile, *, steps: range) -> list[str]:
    """What rank 0 says of it; {folder} stands for where it is, in the last line."""
    (run,) = profile.runs
    first = run.ranks[0]
    parts = sorted(first.phases.items(), key=lambda part: -part[1])
    shown = [f"{name} {100 * seconds / first.step_s:.0f} %" for name, seconds in parts]
    lines = [
        f"profile of steps {steps[0]:,} to {steps[-1]:,}: {run.samples_per_s:,.1f} img/s, "
        f"{1000 * run.step.mean_s:,.1f} ms a step (p99 {1000 * run.step.p99_s:,.1f})",
        f"of a step of rank 0: {', '.join(shown[:_PARTS_SHOWN])}",
    ]
    straggler = find_straggler(run.ranks, steps=run.steps)
    if straggler is not None:
        latest = sorted(run.ranks, key=lambda one: -one.own_s)[:_RANKS_SHOWN]
        each = [f"rank {one.rank} {1000 * one.own_s:,.1f}" for one in latest]
        lines += [straggler.line, f"own ms of a step, the most first: {', '.join(each)}"]
    lines.append("in {folder}: profile.json, and a trace of each rank; open it at ui.perfetto.dev")
    return lines


def _torch_profiler(device: torch.device) -> "torch.profiler.profile":
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    return torch.profiler.profile(activities=activities)


def _exported(profiler: "torch.profiler.profile") -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return gzip.compress(path.read_bytes(), compresslevel=3, mtime=0)


def accelerator_of(ranks: Ranks) -> str | None:
    """Its name; None where a rank computes on the CPU."""
    return torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else None


_NO_TIME = Quantiles(count=0, mean_s=0.0, p50_s=0.0, p90_s=0.0, p99_s=0.0)
