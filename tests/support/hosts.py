"""Hosts of a small network on this machine, each a network namespace; needs root.

    with Network(["store", "first", "second"]) as network:
        process = network["second"].start([...], log=path)     # a Popen; runs in the namespace
        network["second"].link_down()                           # the cable is out
        network["second"].kill()                                # the machine is off

The bridge between them has a namespace of its own, and an address in this process's, so that tests
reach what the hosts serve. Names and addresses are drawn at random: networks side by side do not
meet. What one leaves behind because its process was killed is removed by the next.
"""

import contextlib
import ipaddress
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

NAMESPACES = Path("/run/netns")
_ETC = Path("/etc/netns")  # of each namespace, what `ip netns exec` lays over /etc
_PREFIX = "moco"


def why_not() -> str:
    """Why this machine cannot have such networks; empty where it can."""
    if os.geteuid() != 0:
        return "needs root, for network namespaces"
    if shutil.which("ip") is None:
        return "needs the command 'ip' (iproute2)"
    name = f"{_PREFIX}-{os.getpid()}-try-{os.urandom(3).hex()}"
    # A container's root may lack the capabilities.
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if made.returncode:
        return f"network namespaces are not allowed here: {made.stderr.strip()}"
    _ip("netns", "del", name)
    return ""


class Host:
    """One host of a `Network`."""

    def __init__(self, *, namespace: str, address: str, port: str, switch: str, core: int) -> None:
        self.namespace = namespace
        self.address = address
        self.enter = ("ip", "netns", "exec", namespace)
        """Before a command: runs it on this host."""
        self._port = port
        self._switch = switch
        self._core = core

    def start(
        self, command: Sequence[str], *, log: Path, env: Mapping[str, str] | None = None
    ) -> "subprocess.Popen[bytes]":
        """Start a command on this host; what it prints is appended to `log`."""
        with log.open("ab") as written:
            return subprocess.Popen(
                # As machines do, hosts have cores of their own; threads of two programs that spin
                # on the same cores, each waiting for all of its own, take ten times as long.
                [*self.enter, "taskset", "-c", str(self._core), *command],
                stdout=written,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env={**os.environ, **(env or {})},
                start_new_session=True,
            )

    def resolve(self, addresses: Mapping[str, Sequence[str]]) -> None:
        """What this host's resolver knows, in programs that run, too: names by address."""
        hosts = _ETC / self.namespace / "hosts"
        hosts.parent.mkdir(parents=True, exist_ok=True)
        # In place: programs that run hold this very file.
        with hosts.open("w") as written:
            print("127.0.0.1 localhost", file=written)
            for address, names in addresses.items():
                print(address, *names, file=written)

    def link_down(self) -> None:
        """Pull the cable: packets are lost without a word, connections stay open."""
        # At the switch's end: the host's own routes and addresses stay, as with a dead switch.
        _ip("-n", self._switch, "link", "set", self._port, "down")

    def link_up(self) -> None:
        _ip("-n", self._switch, "link", "set", self._port, "up")

    def give_up_after(self, *, tcp_retries: int) -> None:
        """How often TCP sends again to a peer that is silent: 15 at first, a quarter of an hour."""
        _ip(
            "netns", "exec", self.namespace, "sysctl", "-qw", f"net.ipv4.tcp_retries2={tcp_retries}"
        )

    def processes(self) -> list[int]:
        """Ids of all processes on this host."""
        found = subprocess.run(
            ["ip", "netns", "pids", self.namespace], capture_output=True, text=True, check=False
        )
        return [int(word) for word in found.stdout.split()]

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to each process on this host, such as SIGSTOP and SIGCONT."""
        for process in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, number)

    def kill(self) -> None:
        """SIGKILL everything on this host, and wait until it is gone."""

        def empty() -> bool:
            self.signal(signal.SIGKILL)
            return not self.processes()

        wait_until(empty, timeout_s=30, what=f"the end of the processes of {self.namespace}")


class Network:
    """`with Network(names) as network:` has a host, `network[name]`, for each name."""

    def __init__(self, names: Sequence[str]) -> None:
        self._tag = os.urandom(3).hex()
        # Of a range that is for testing networks, hence in nobody's way: RFC 2544.
        blocks = list(ipaddress.ip_network("198.18.0.0/15").subnets(new_prefix=24))
        self._block = blocks[int.from_bytes(os.urandom(2), "big") % len(blocks)]
        cores = sorted(os.sched_getaffinity(0))
        self._uplink = f"{_PREFIX}{self._tag}"
        self._switch = self._name("switch")
        self._hosts = {
            name: Host(
                namespace=self._name(name),
                address=str(self._block[10 + number]),
                port=f"port{number}",
                switch=self._switch,
                core=cores[number % len(cores)],
            )
            for number, name in enumerate(names)
        }

    def __getitem__(self, name: str) -> Host:
        return self._hosts[name]

    def __enter__(self) -> "Network":
        _remove_leftovers()
        try:
            self._build()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End every process and remove every namespace; harmless twice."""
        for namespace in [*(host.namespace for host in self._hosts.values()), self._switch]:
            _remove(namespace)
        # Goes with the switch, but not at once; and not at all where building was cut short.
        subprocess.run(["ip", "link", "del", self._uplink], capture_output=True, check=False)

    def _build(self) -> None:
        _ip("netns", "add", self._switch)
        on_switch = ("-n", self._switch, "link")
        _ip(*on_switch, "add", "bridge0", "type", "bridge")
        _ip(*on_switch, "set", "bridge0", "up")
        for host in self._hosts.values():
            _ip("netns", "add", host.namespace)
            on_host = ("-n", host.namespace)
            peer = ("type", "veth", "peer", "name", "eth0", "netns", host.namespace)
            _ip(*on_switch, "add", host._port, *peer)
            _ip(*on_switch, "set", host._port, "master", "bridge0", "up")
            _ip(*on_host, "addr", "add", f"{host.address}/24", "dev", "eth0")
            _ip(*on_host, "link", "set", "eth0", "up")
            _ip(*on_host, "link", "set", "lo", "up")
        peer = ("type", "veth", "peer", "name", self._uplink, "netns", str(os.getpid()))
        _ip(*on_switch, "add", "uplink", *peer)
        _ip(*on_switch, "set", "uplink", "master", "bridge0", "up")
        _ip("addr", "add", f"{self._block[1]}/24", "dev", self._uplink)
        _ip("link", "set", self._uplink, "up")

    def _name(self, part: str) -> str:
        return f"{_PREFIX}-{os.getpid()}-{self._tag}-{part}"


def wait_until(condition: Callable[[], bool], *, timeout_s: float, what: str) -> float:
    """Wait for a condition, and return how many seconds that took.

    Raises:
        TimeoutError: it did not come about.
    """
    begun = time.monotonic()
    while not condition():
        if time.monotonic() - begun > timeout_s:
            raise TimeoutError(f"waited {timeout_s:g} s in vain for {what}")
        time.sleep(0.1)
    return time.monotonic() - begun


def _remove_leftovers() -> None:
    """Namespaces whose owner is dead: it was killed before it could remove them."""
    for path in NAMESPACES.glob(f"{_PREFIX}-*-*-*"):
        owner = path.name.split("-")[1]
        if owner.isdecimal() and not Path(f"/proc/{owner}").exists():
            _remove(path.name)


def _remove(namespace: str) -> None:
    if not (NAMESPACES / namespace).exists():
        return
    Host(namespace=namespace, address="", port="", switch="", core=0).kill()
    subprocess.run(["ip", "netns", "del", namespace], capture_output=True, check=False)
    shutil.rmtree(_ETC / namespace, ignore_errors=True)


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
