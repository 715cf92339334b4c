"""Ports of loopback for servers of a test."""

import contextlib
import socket


def free_ports(count: int) -> list[int]:
    """Ports of loopback that nothing listens on."""
    with contextlib.ExitStack() as stack:
        taken = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in taken:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in taken]


def two_free_ports() -> tuple[int, int]:
    """Two such ports, the second behind the first, as those of the ranks on a host are."""
    while True:
        (first,) = free_ports(1)
        with socket.socket() as second, contextlib.suppress(OSError, OverflowError):
            second.bind(("127.0.0.1", first + 1))
            return first, first + 1
