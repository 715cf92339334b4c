"""Figures of a run that is under way, for Prometheus: each rank answers at a port of its own.

Nothing is added to a step. A scrape reads, in a thread of its own, what trainer, loader and stores
count anyway. Each rank tells what it alone knows, so that there is an answer, too, while the ranks
wait for one of them and nothing can be gathered; rank 0 tells besides what the rows of metrics say.
Which run it is, is for the scraper to add, as a label `run` (deploy/observability).
"""

import contextlib
import math
import platform
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from typing import TYPE_CHECKING
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, ProcessCollector, start_http_server
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from moco_scale.distributed import Ranks, gather_objects
from moco_scale.errors import ConfigError
from moco_scale.metrics import StepMetrics, what_figures_mean

if TYPE_CHECKING:
    from moco_scale.trainer import Trainer

PREFIX = "moco_scale_"

_GAUGES = {
    "last_step": "last_step",
    "epoch": "epoch",
    "loss": "loss",
    "lookup_accuracy": "lookup_accuracy_ratio",
    "lr": "learning_rate",
    "grad_norm": "gradient_norm",
    "step_s": "step_seconds",
    "queue_filled_frac": "queue_filled_ratio",
    "queue_age_steps": "queue_age_steps",
    "memory_bytes": "peak_memory_bytes",
    "alignment": "alignment",
    "uniformity": "uniformity",
    "effective_rank": "effective_rank",
    "duplicate_key_frac": "duplicate_keys_ratio",
    "knn_accuracy": "knn_accuracy_ratio",
}
"""Names, after PREFIX, of what a row of metrics says, by field of StepMetrics."""
_NONE_IS_NAN = ("loss", "grad_norm")
"""Where None means that it was not finite; elsewhere, that this row does not tell."""


class Exporter:
    """An endpoint that tells Prometheus about this rank until it is closed."""

    def __init__(self, ranks: Ranks, *, address: str, port: int) -> None:
        """Listen.

        Args:
            port: 0 takes a free one.

        Raises:
            OSError: not at this address and port.
        """
        self._ranks = ranks
        registry = CollectorRegistry()
        self._figures = _Figures(ranks)
        registry.register(self._figures)
        ProcessCollector(registry=registry)
        self._server: WSGIServer
        self._thread: threading.Thread
        self._server, self._thread = start_http_server(port, addr=address, registry=registry)

    @property
    def port(self) -> int:
        return self._server.server_port

    def watch(self, trainer: "Trainer") -> None:
        """Tell what this trainer does; it is about to begin."""
        self._figures.saved_at = time.time()
        self._figures.trainer = trainer  # last: with it, scrapes begin to tell of both

    def hearing(self, show: Callable[[StepMetrics], None]) -> Callable[[StepMetrics], None]:
        """`show`, and the rows that it is shown are told, too."""

        def heard(metrics: StepMetrics) -> None:
            self._figures.add(metrics)
            show(metrics)

        return heard

    def saved(self, _: str) -> None:
        """A checkpoint is whole."""
        self._figures.saved_at = time.time()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def open_exporter(ranks: Ranks, *, address: str, port: int) -> Exporter:
    """An endpoint at `port` + local rank; all ranks call this, and fail alike.

    Raises:
        ConfigError: one of the ranks could not listen.
    """
    with contextlib.ExitStack() as opened:
        problem, own = "", port + ranks.local_rank
        try:
            exporter = Exporter(ranks, address=address, port=own)
            opened.enter_context(contextlib.closing(exporter))
        except (OSError, OverflowError) as err:
            reason = (err.strerror if isinstance(err, OSError) else None) or err
            problem = f"rank {ranks.rank} cannot listen at {address}:{own} ({reason})"
        problems = [one for one in gather_objects(problem, ranks) if one]
        if problems:
            raise ConfigError(
                f"run.metrics_port: {problems[0]}; give another port, or 0 for none (each rank "
                "of a host takes the next one)"
            )
        opened.pop_all()
    return exporter


class _Figures(Collector):
    """What is told at a scrape."""

    def __init__(self, ranks: Ranks) -> None:
        self.trainer: Trainer | None = None
        self.saved_at = 0.0
        """Unix time."""
        self._ranks = ranks
        self._meanings = {
            field: text.replace("None:", "NaN:") for field, text in what_figures_mean().items()
        }
        self._row: Mapping[str, float] = {}
        self._skipped = 0
        self._stall_s = 0.0

    def add(self, metrics: StepMetrics) -> None:
        """The newest row; a figure that it does not tell stays as it was."""
        row = dict(self._row)
        for field in _GAUGES:
            value = getattr(metrics, field)
            if value is None and field in _NONE_IS_NAN:
                value = math.nan
            if value is not None:
                row[field] = value
        self._skipped += metrics.skipped_steps
        self._stall_s += metrics.checkpoint_stall_ms / 1000
        self._row = row  # at once: a scrape may be reading the one before

    def collect(self) -> Iterator[Metric]:
        yield InfoMetricFamily(
            f"{PREFIX}build",
            "What this rank runs with.",
            value={
                "rank": str(self._ranks.rank),
                "version": metadata.version("moco-scale"),
                "torch": metadata.version("torch"),
                "python": platform.python_version(),
                "device": self._ranks.device.type,
            },
        )
        if self.trainer is None:
            return
        yield from self._of_rank(self.trainer)
        if self._ranks.speaks:
            yield from self._of_run(self.trainer)

    def _of_rank(self, trainer: "Trainer") -> Iterator[Metric]:
        loader = trainer.loader.stats()
        stream, run = loader.stream, trainer.store.stats()
        rank = {"rank": str(self._ranks.rank)}
        yield _gauge(
            "step",
            "Updates of this rank since the start of the run.",
            rank,
            trainer.step,
        )
        yield _gauge("held_bytes", "Bytes of shards in memory.", rank, stream.held_bytes)
        for name, meaning, value in (
            ("images", "Source images given to the step, once each though of two views.",
             loader.samples),
            ("quarantined_samples", "Bad samples that were replaced.", loader.replaced),
            ("data_wait_seconds", "Seconds that the step has waited for a batch.",
             loader.batch_wait_s),
            ("read_bytes", "Bytes of shards that came from the store.", stream.read_bytes),
        ):  # fmt: skip
            yield _counter(name, meaning, [(rank, value)])
        data, own = {**rank, "store": "data"}, {**rank, "store": "run"}
        answered = stream.read_requests + stream.index_reads
        yield _counter(
            "store_requests",
            "Requests to the store of the shards and to that of the run, retries included.",
            [(data, answered + stream.retries), (own, run.requests)],
        )
        yield _counter(
            "store_retries",
            "Of the requests, those that followed a failed one.",
            [(data, stream.retries), (own, run.retries)],
        )
        yield _counter(
            "loader_seconds",
            "Seconds of each thread of the loader. The one that waits neither for input nor for "
            "room is the limit, unless the step waits for no data.",
            [
                ({**rank, "stage": stage.name, "state": state}, seconds)
                for stage in loader.stages
                for state, seconds in (
                    ("work", stage.work_s),
                    ("wait_for_input", stage.wait_for_input_s),
                    ("wait_for_room", stage.wait_for_room_s),
                )
            ],
        )

    def _of_run(self, trainer: "Trainer") -> Iterator[Metric]:
        negatives = trainer.model.config.negatives(trainer.data_config.global_batch_size)
        yield _gauge("ranks", "Ranks that take part.", {}, self._ranks.world_size)
        yield _gauge(
            "guessing_loss", "Loss of an encoder that tells nothing apart.", {},
            math.log1p(negatives),
        )  # fmt: skip
        yield _gauge(
            "last_checkpoint_timestamp_seconds",
            "Unix time at which a checkpoint was last whole; before this process's first, at "
            "which it began to train. What was done since is lost if it is killed.",
            {},
            self.saved_at,
        )
        yield _counter(
            "skipped_steps", "Steps that were not finite and changed nothing.",
            [({}, self._skipped)],
        )  # fmt: skip
        yield _counter(
            "checkpoint_stall_seconds", "Seconds that saving has held the steps up.",
            [({}, self._stall_s)],
        )  # fmt: skip
        for field, value in self._row.items():
            yield _gauge(_GAUGES[field], self._meanings[field], {}, value)


def _gauge(name: str, meaning: str, labels: Mapping[str, str], value: float) -> GaugeMetricFamily:
    family = GaugeMetricFamily(f"{PREFIX}{name}", meaning, labels=list(labels))
    family.add_metric(list(labels.values()), value)
    return family


def _counter(
    name: str, meaning: str, values: list[tuple[Mapping[str, str], float]]
) -> CounterMetricFamily:
    """Values by labels."""
    family = CounterMetricFamily(
        f"{PREFIX}{name}", meaning, labels=list(values[0][0]) if values else []
    )
    for labels, value in values:
        family.add_metric(list(labels.values()), value)
    return family
