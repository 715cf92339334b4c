"""What a process uses over time: a thread that looks at cores, accelerator, network and buffers."""

import threading
import time
from pathlib import Path
from types import TracebackType

import torch

from moco_scale.profiles import Moment
from pipelines.loader import Loader
from pipelines.spans import STREAM, VIEWS

_EVERY_S = 0.05
_NETWORK = Path("/proc/net/dev")


class Sampler:
    """Takes a `Moment` every 50 ms while entered."""

    def __init__(self, loader: Loader, *, cores: int, device: torch.device | None = None) -> None:
        """
        Args:
            loader: whose buffers are looked at.
            cores: that this process may use.
            device: of the rank; None or the CPU: no accelerator is looked at.
        """
        self.moments: list[Moment] = []
        """Complete when this has been left."""
        self.began_s = 0.0
        """Of `time.perf_counter`: when the moments' seconds begin."""
        self._loader = loader
        self._cores = cores
        self._device = device if device is not None and device.type == "cuda" else None
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sampler", daemon=True)

    def __enter__(self) -> "Sampler":
        self.began_s = time.perf_counter()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._left.set()
        self._thread.join()

    def _run(self) -> None:
        before_s, cpu_s, received = self.began_s, time.process_time(), _received_bytes()
        while not self._left.wait(_EVERY_S):
            now_s, cpu_now_s, received_now = (
                time.perf_counter(),
                time.process_time(),
                _received_bytes(),
            )
            passed_s = now_s - before_s
            rate = None
            if received is not None and received_now is not None:
                rate = (received_now - received) / passed_s
            stats = self._loader.stats()
            ready = {stage.name: stage.ready for stage in stats.stages}
            self.moments.append(
                Moment(
                    second=now_s - self.began_s,
                    cpu_frac=min(1.0, (cpu_now_s - cpu_s) / passed_s / self._cores),
                    gpu_frac=self._gpu_frac(),
                    received_bytes_per_s=rate,
                    held_bytes=stats.stream.held_bytes,
                    stream_ready=ready.get(STREAM, 0),
                    views_ready=ready.get(VIEWS, 0),
                )
            )
            before_s, cpu_s, received = now_s, cpu_now_s, received_now

    def _gpu_frac(self) -> float | None:
        if self._device is None:
            return None
        try:
            return torch.cuda.utilization(self._device) / 100
        except (ModuleNotFoundError, RuntimeError):  # it takes NVML, or its Python module, to tell
            self._device = None
            return None


def _received_bytes() -> int | None:
    """That have come in by all interfaces but the loopback; None where the system does not say."""
    try:
        lines = _NETWORK.read_text().splitlines()[2:]
    except OSError:
        return None
    counters = dict(line.split(":", 1) for line in lines)
    return sum(int(told.split()[0]) for name, told in counters.items() if name.strip() != "lo")
