"""Ports that follow each other, as those of the ranks on a host do."""

import contextlib
import socket

from tests.support.slurm import free_ports


def two_free_ports() -> tuple[int, int]:
    """Ports of loopback that nothing listens on, the second behind the first."""
    while True:
        (first,) = free_ports(1)
        with socket.socket() as second, contextlib.suppress(OSError, OverflowError):
            second.bind(("127.0.0.1", first + 1))
            return first, first + 1
