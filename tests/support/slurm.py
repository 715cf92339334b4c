"""A real Slurm of two nodes on this machine; needs root, and the packages slurm-wlm and munge.

    with Slurm() as slurm:
        done = slurm.run("srun", "-N2", "hostname")     # a CompletedProcess
        job = slurm.submit("--nodes=2", "deploy/slurm/pretrain.sbatch", "--preset", ..., log=path)
        slurm.state(job)                                # RUNNING

Both nodes are this machine: two slurmd on loopback, told apart by their ports. Each has a core of
its own, as far as they go round, and says that it has two GPUs, which are not there.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

from tests.support.hosts import wait_until
from tests.support.ports import free_ports

_HOSTNAME = socket.gethostname().split(".")[0]
NODES = (_HOSTNAME, f"{_HOSTNAME}-second")
"""The first resolves, as nodes' names do on a cluster; nobody asks for the second's address."""
_CREDENTIAL_S = 5
"""How long nodes take a job's credential for valid (Slurm: 120); so long a requeued job waits.

It must: a node refuses a start of the same second in which it ended the one before ("Job 1 already
killed, do not launch batch job"), and then the job has failed. So no StartTime=now.
"""
_DAEMONS = ("munged", "slurmctld", "slurmd")
_COMMANDS = ("srun", "sbatch", "scontrol", "scancel", "squeue", "sinfo")
_SYSTEM = ":/usr/sbin:/sbin"
"""Where Debian keeps the daemons, behind $PATH."""

_CONFIG = """\
ClusterName=moco
SlurmctldHost={hostname}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock,cred_expire={credential_s}
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
GresTypes=gpu
KillWait=20
{nodes}
PartitionName=all Nodes=ALL Default=YES State=UP
"""
_NODE = "NodeName={name} NodeHostname={hostname} NodeAddr=127.0.0.1 Port={port} CPUs=2 Gres=gpu:2"
_GPUS = "AutoDetect=off\nName=gpu File={folder}/gpu[0-1]\n"


def why_not() -> str:
    """Why this machine cannot run it; empty where it can."""
    if os.geteuid() != 0:
        return "needs root, for slurmd"
    path = os.environ["PATH"] + _SYSTEM
    missing = [name for name in (*_DAEMONS, *_COMMANDS) if shutil.which(name, path=path) is None]
    return f"needs {', '.join(missing)} (Debian: slurm-wlm, munge)" if missing else ""


class Slurm:
    """`with Slurm() as slurm:` starts the daemons, and ends them and all jobs with them."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="moco-slurm-"))
        self._daemons: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> "Slurm":
        try:
            self._start()
        except BaseException as err:
            err.add_note(self.logs())
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
        """Cancel all jobs and end the daemons; harmless twice."""
        if self._folder.exists():
            self.run("scancel", "--user=root", "--full", "--signal=KILL")
            self.run("scancel", "--user=root")
            # Jobs' processes belong to no daemon of ours: without slurmd nobody would end them.
            with contextlib.suppress(TimeoutError):
                wait_until(lambda: not self.run("squeue", "-h").stdout, timeout_s=30, what="jobs")
        for daemon in reversed(self._daemons):
            daemon.send_signal(signal.SIGTERM)
        for daemon in reversed(self._daemons):
            try:
                daemon.wait(timeout=15)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        self._daemons.clear()
        shutil.rmtree(self._folder, ignore_errors=True)

    def run(
        self, *command: str, timeout_s: float = 60, env: Mapping[str, str] | None = None
    ) -> "subprocess.CompletedProcess[str]":
        """Run one command, such as srun, to its end."""
        return subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            env=self._environment(env),
            stdin=subprocess.DEVNULL,
            check=False,
        )

    def submit(self, *arguments: str, log: Path, env: Mapping[str, str] | None = None) -> str:
        """Hand a job to sbatch and return its id.

        Args:
            arguments: of sbatch: options, the batch file, and what the file shall be given.
            log: each start appends its output.
            env: beside this process's environment.
        """
        done = self.run("sbatch", "--parsable", f"--output={log}", *arguments, env=env)
        if done.returncode:
            raise RuntimeError(f"sbatch: {done.stderr.strip()}")
        return done.stdout.strip()

    def state(self, job: str) -> str:
        """The job's state in Slurm's words: PENDING, RUNNING, COMPLETED, ..."""
        return self._show(job).get("JobState", "")

    def logs(self) -> str:
        """The end of each daemon's log."""
        return "\n".join(
            f"--- {path.name}\n{path.read_text(errors='replace')[-2000:]}"
            for path in sorted(self._folder.glob("*.log"))
        )

    def _environment(self, more: Mapping[str, str] | None) -> dict[str, str]:
        outer = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_"))}
        given = {**outer, "SLURM_CONF": str(self._folder / "slurm.conf"), **(more or {})}
        return {**given, "PATH": given["PATH"] + _SYSTEM}

    def _show(self, job: str) -> dict[str, str]:
        shown = self.run("scontrol", "--oneliner", "show", "job", job).stdout
        return dict(word.split("=", 1) for word in shown.split() if "=" in word)

    def _start(self) -> None:
        folder = self._folder
        controller_port, *node_ports = free_ports(1 + len(NODES))
        (folder / "slurm.conf").write_text(
            _CONFIG.format(
                folder=folder,
                hostname=_HOSTNAME,
                controller_port=controller_port,
                credential_s=_CREDENTIAL_S,
                nodes="\n".join(
                    _NODE.format(name=name, hostname=_HOSTNAME, port=port)
                    for name, port in zip(NODES, node_ports, strict=True)
                ),
            )
        )
        (folder / "gres.conf").write_text(_GPUS.format(folder=folder))
        for device in ("gpu0", "gpu1"):
            (folder / device).touch()
        for name in ("state", *NODES):
            (folder / name).mkdir()
        key = folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        files = {"socket": "sock", "key-file": "key", "pid-file": "pid", "log-file": "log"}
        places = [f"--{option}={folder}/munge.{end}" for option, end in files.items()]
        # --force: it is root's, in a folder of root's, where munged wants a user of its own.
        self._daemon("munged", "-F", "--force", f"--seed-file={folder}/munge.seed", *places)
        wait_until((folder / "munge.sock").exists, timeout_s=30, what="munged")
        self._daemon("slurmctld", "-D", "-c")
        # Threads of two nodes that spin on the same cores take ten times as long; see
        # `tests.support.hosts.Host.start`.
        cores = sorted(os.sched_getaffinity(0))
        for number, name in enumerate(NODES):
            core = str(cores[number % len(cores)])
            self._daemon("slurmd", "-D", "-N", name, before=("taskset", "-c", core))
        wait_until(self._all_idle, timeout_s=60, what="both nodes to be idle")

    def _all_idle(self) -> bool:
        states = self.run("sinfo", "-h", "-N", "-o", "%T").stdout.split()
        return states == ["idle"] * len(NODES)

    def _daemon(self, *command: str, before: Sequence[str] = ()) -> None:
        printed = (self._folder / f"{command[0]}-{len(self._daemons)}.out.log").open("wb")
        with printed:
            self._daemons.append(
                subprocess.Popen(
                    [*before, *command],
                    stdout=printed,
                    stderr=subprocess.STDOUT,
                    stdin=subprocess.DEVNULL,
                    env=self._environment(None),
                    start_new_session=True,
                )
            )
