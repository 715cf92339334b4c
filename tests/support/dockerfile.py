"""Builds what a Dockerfile says where no container engine runs: stages are folders, RUN is chroot.

    image = build(Path("deploy/Dockerfile"), context=Path("."), base=debian, folder=scratch)
    image.run(["moco-scale", "--help"])

It knows the instructions of `_KNOWN` with the flags --from and --mount=type=cache, and refuses
others. It differs from an engine in that stages are whole folders instead of layers, labels go
nowhere, RUN has this machine's network and kernel, and what COPY takes out of a stage is
hard-linked. Mounts are made in a namespace of each command's own and are gone with it. Needs root.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

_KNOWN = (
    *("FROM", "ARG", "ENV", "LABEL", "WORKDIR", "USER", "COPY", "RUN"),
    *("HEALTHCHECK", "ENTRYPOINT", "CMD"),
)

_ENTER = """\
set -eu
root=$1 read_only=$2 network=$3 user=$4 workdir=$5
shift 5
mount --bind "$root" "$root"
mount -t proc proc "$root/proc"
mount -t sysfs -o ro sysfs "$root/sys"
mount -t tmpfs -o mode=755 tmpfs "$root/dev"
for device in null zero full random urandom; do
    touch "$root/dev/$device"
    mount --bind "/dev/$device" "$root/dev/$device"
done
ln -s /proc/self/fd "$root/dev/fd"
mkdir "$root/dev/shm"
mount -t tmpfs tmpfs "$root/dev/shm"
while [ "$1" != -- ]; do
    options=$1 source=$2 target=$root$3
    shift 3
    if [ -f "$source" ]; then mkdir -p "$(dirname "$target")"; touch "$target"
    else mkdir -p "$target"; fi
    if [ "$source" = tmpfs ]; then mount -t tmpfs -o "$options" tmpfs "$target"
    else mount --bind "$source" "$target"; mount -o "remount,bind,$options" "$target"; fi
done
shift
if [ "$network" = 0 ]; then
    ip link set lo up
    hostname container
    echo "127.0.0.1 localhost container" > "$root/dev/hosts"
    touch "$root/etc/hosts"
    mount --bind "$root/dev/hosts" "$root/etc/hosts"
fi
if [ "$read_only" = 1 ]; then mount -o remount,bind,ro "$root"; fi
exec chroot --userspec="$user" --groups= "$root" sh -c 'cd "$0" && exec "$@"' "$workdir" "$@"
"""
"""Mounts what an engine gives a container, then `OPTIONS SOURCE TARGET` as often as there are any,
then enters."""


@dataclass(frozen=True, kw_only=True)
class Mount:
    """A folder or file of this machine, or a new tmpfs, inside of a container."""

    source: str
    """Absolute path; `tmpfs`."""
    target: str
    options: str = "ro"


@dataclass(kw_only=True)
class Image:
    """A root file system, and how its commands run."""

    root: Path
    env: dict[str, str] = field(default_factory=dict)
    user: str = "0:0"
    workdir: str = "/"
    entrypoint: list[str] = field(default_factory=list)
    healthcheck: list[str] = field(default_factory=list)

    def run(
        self,
        command: Sequence[str],
        *,
        timeout_s: float,
        env: Mapping[str, str] | None = None,
        mounts: Sequence[Mount] = (),
        user: str = "",
        read_only: bool = False,
        network: bool = False,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command to its end, with nothing of this process's environment.

        Args:
            read_only: the root file system; mounts have options of their own.
            network: this machine's, instead of loopback alone.
            user: numeric uid:gid, instead of the image's.
        """
        namespaces = ["--mount", "--pid", "--ipc", "--uts", *([] if network else ["--net"])]
        flags = [str(int(read_only)), str(int(network)), user or self.user, self.workdir]
        listed = [part for m in mounts for part in (m.options, m.source, m.target)]
        variables = [f"{name}={value}" for name, value in {**self.env, **(env or {})}.items()]
        return subprocess.run(
            ["unshare", *namespaces, "--fork", "--kill-child", "sh", "-c", _ENTER, "enter",
             str(self.root), *flags, *listed, "--", "env", "-i", *variables, *command],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            timeout=timeout_s, check=False,
        )  # fmt: skip

    def copy(self, root: Path) -> "Image":
        """Another stage that begins with this one; nothing of it is shared."""
        subprocess.run(["cp", "-a", "--reflink=auto", self.root, root], check=True)
        return Image(root=root, env=dict(self.env), user=self.user, workdir=self.workdir)


def why_not() -> str:
    """Why this machine cannot build; empty where it can."""
    if os.geteuid() != 0:
        return "needs root, for chroot"
    missing = [name for name in ("debootstrap", "unshare", "ip") if shutil.which(name) is None]
    return f"needs the commands {', '.join(missing)}" if missing else ""


def build(
    path: Path,
    *,
    context: Path,
    base: Image,
    folder: Path,
    mounts: Sequence[Mount] = (),
    env: Mapping[str, str] | None = None,
    timeout_s: float,
) -> Image:
    """Follow a Dockerfile and return its last stage.

    Args:
        base: stands for every image that is not a stage of the file.
        folder: where stages and caches go; nothing is there yet.
            mounts, env: what RUN has besides, such as the configuration of package clients.
        timeout_s: longest that one RUN may take.
    """
    sources = folder / "context"
    copy_context(context, sources)
    stages: dict[str, Image] = {}
    stage = base
    given: dict[str, str] = {}  # ARG, of the stage; before the first FROM, of the FROM lines
    for name, flags, rest in parse(path.read_text()):
        if name == "FROM":
            image, as_, alias = [*substitute(rest, given).split(), "", ""][:3]
            assert not alias or as_.upper() == "AS", rest
            stage = stages.get(image, base).copy(folder / f"stage-{len(stages)}")
            stages[alias or image] = stage
            given = {}
        elif name == "ARG":
            key, _, default = rest.partition("=")
            given[key] = substitute(default, given)
        elif name == "ENV":
            pairs = shlex.split(substitute(rest, {**given, **stage.env}))
            stage.env.update(pair.partition("=")[::2] for pair in pairs)
        elif name == "WORKDIR":
            stage.workdir = rest
            _inside(stage.root, rest).mkdir(parents=True, exist_ok=True)
        elif name == "USER":
            stage.user = rest
        elif name == "COPY":
            *paths, target = shlex.split(rest)
            origin = next((stages[f.partition("=")[2]].root for f in flags), sources)
            _copy(
                [_inside(origin, part) for part in paths],
                _inside(stage.root, str(Path(stage.workdir) / target)),
                is_folder=target.endswith("/") or len(paths) > 1,
                linked=origin != sources,
            )
        elif name == "RUN":
            caches = [_cache(flag, folder / "cache") for flag in flags]
            print(f"RUN {rest}", flush=True)
            done = stage.run(
                ["sh", "-c", rest],
                timeout_s=timeout_s,
                env={**given, **(env or {})},
                mounts=[*mounts, *caches],
                network=True,
            )
            assert done.returncode == 0, f"RUN {rest}\n{done.stdout[-4000:]}"
        elif name == "HEALTHCHECK":
            stage.healthcheck = json.loads(rest.partition("CMD ")[2])
        elif name == "ENTRYPOINT":
            stage.entrypoint = json.loads(rest)
    return stage


def parse(text: str) -> list[tuple[str, list[str], str]]:
    """Name, flags and the rest of each instruction, continued lines joined.

    Raises:
        ValueError: an instruction or a flag that this module does not know.
    """
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    found = []
    for instruction in re.sub(r"\\\n", " ", "\n".join(lines)).splitlines():
        name, _, rest = instruction.strip().partition(" ")
        if not name:
            continue
        flags = []
        while name in ("RUN", "COPY", "FROM") and rest.lstrip().startswith("--"):
            flag, _, rest = rest.lstrip().partition(" ")
            flags.append(flag)
        allowed = {"COPY": "--from=", "RUN": "--mount=type=cache,target="}.get(name)
        for flag in flags:
            if allowed is None or not flag.startswith(allowed):
                raise ValueError(f"{name} {flag}: not known here")
        if name not in _KNOWN:
            raise ValueError(f"{name}: not known here")
        found.append((name, flags, re.sub(r"\s+", " ", rest.strip())))
    return found


def substitute(text: str, values: Mapping[str, str]) -> str:
    """`$NAME` and `${NAME}` replaced; empty where there is no such value."""
    return re.sub(r"\$(?:(\w+)|\{(\w+)\})", lambda m: values.get(m[1] or m[2], ""), text)


def copy_context(context: Path, target: Path) -> None:
    """The files that .dockerignore lets through: the last pattern that fits a path decides."""
    written = (context / ".dockerignore").read_text().splitlines()
    patterns = [line for line in written if line and not line.startswith("#")]

    def is_ignored(path: Path) -> bool:
        parts = [str(part) for part in (path, *path.parents)]
        fitting = [p for p in patterns if any(_fits(part, p.removeprefix("!")) for part in parts)]
        return bool(fitting) and not fitting[-1].startswith("!")

    def copy(folder: Path) -> None:
        for path in sorted((context / folder).iterdir()):
            inside = folder / path.name
            if is_ignored(inside):
                continue  # with all that is in it: no pattern of ours lets a part in again
            if path.is_dir():
                copy(inside)
            else:
                (target / folder).mkdir(parents=True, exist_ok=True)
                shutil.copy(path, target / inside)

    copy(Path())


def _fits(path: str, pattern: str) -> bool:
    """** is any number of folders, * anything but a slash."""
    regex = re.escape(pattern).replace(r"\*\*/", "(.*/)?").replace(r"\*", "[^/]*")
    return re.fullmatch(regex, path) is not None


def _copy(paths: Sequence[Path], target: Path, *, is_folder: bool, linked: bool) -> None:
    command = ["cp", "--archive", "--force", *(["--link"] if linked else [])]
    for path in paths:
        if path.is_dir():  # of a folder, COPY takes what is in it
            target.mkdir(parents=True, exist_ok=True)
            subprocess.run([*command, f"{path}/.", target], check=True)
        else:
            to = target / path.name if is_folder or target.is_dir() else target
            to.parent.mkdir(parents=True, exist_ok=True)
            subprocess.run([*command, path, to], check=True)


def _cache(flag: str, folder: Path) -> Mount:
    target = flag.removeprefix("--mount=type=cache,target=")
    source = folder / target.replace("/", "_")
    source.mkdir(parents=True, exist_ok=True)
    return Mount(source=str(source), target=target, options="rw")


def _inside(root: Path, path: str) -> Path:
    return root / os.path.normpath(path).lstrip("/")
