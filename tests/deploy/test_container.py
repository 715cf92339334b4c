"""The image: its Dockerfile's own steps on a fresh Debian, and the whole line inside of it."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.integration.conftest import photo
from tests.support.command import TINY
from tests.support.dockerfile import (
    Image,
    Mount,
    build,
    copy_context,
    parse,
    substitute,
    why_not,
)

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "deploy" / "Dockerfile"
STEP_S = 1500
"""Longest that one step of the Dockerfile may take; most of it is the wheels of torch and CUDA."""


def built(test: Callable[..., None]) -> Callable[..., None]:
    """A test of the image itself, which the first of them builds."""
    skip = pytest.mark.skipif(bool(why_not()), reason=why_not())
    return pytest.mark.slow(pytest.mark.timeout(3600)(skip(test)))


def test_labels_tell_the_version_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

    labels = dict(pair.split("=", 1) for pair in shlex.split(_values("LABEL")[0]))

    told = {name: labels[f"org.opencontainers.image.{name}"] for name in ("version", "licenses")}
    assert told == {"version": project["version"], "licenses": project["license"]}


def test_the_context_is_the_packages_and_what_installs_them(tmp_path: Path) -> None:
    copy_context(ROOT, tmp_path)

    files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert {path.name for path in tmp_path.iterdir()} == {
        *("LICENSE", "README.md", "constraints.txt", "pyproject.toml"),
        *("moco_scale", "pipelines", "shards"),
    }
    assert "moco_scale/templates/report.html" in files
    assert not any("__pycache__" in name for name in files)


def test_a_build_refuses_what_it_does_not_know() -> None:
    for text in ("ADD a b", "RUN --mount=type=secret,id=a true", "COPY --chown=1 a b"):
        with pytest.raises(ValueError, match="not known here"):
            parse(f"FROM debian\n{text}\n")


@built
def test_the_whole_line_runs_as_a_user_on_a_read_only_root(image: Image, data: Path) -> None:
    assert image.entrypoint == ["moco-scale"]  # before the arguments of `docker run`
    for command in (
        "moco-scale pack raw shards --shard-bytes 200000 --engine ray --ray-address local",
        "moco-scale info shards",
        "python -m moco_scale.launch --standalone --nproc-per-node 2 -m moco_scale pretrain"
        " --preset tiny.toml --data shards --out run",
        "moco-scale evaluate run --labels folder --seeds 0",
        "moco-scale embed shards --run run --to features --report",
        "moco-scale export run --format onnx --to onnx",
        "moco-scale report run --out report.html",
        "python -c 'import nvidia.dali, ray'",
    ):
        started = time.monotonic()

        done = contained(image, data, shlex.split(command))

        print(f"$ {command}\n{done.stdout}({time.monotonic() - started:.0f} s)", flush=True)
        assert done.returncode == 0, done.stdout
    owners = {path.stat().st_uid for path in (data / "run").rglob("*")}
    assert owners == {10001}


@built
def test_a_compiled_run_needs_no_known_user(image: Image, data: Path) -> None:
    command = "moco-scale pretrain --preset tiny.toml --data.mode synthetic --out compiled"

    done = contained(
        image, data, shlex.split(f"{command} --run.max-steps 2 --run.compile"), user="54321:54321"
    )

    assert done.returncode == 0, done.stdout
    assert "done after 2 steps" in done.stdout


@built
def test_only_scratch_space_can_be_written_and_nothing_installs(image: Image) -> None:
    find = "find / -xdev -writable -not -type l 2> /dev/null"
    writable = image.run(["sh", "-c", find], timeout_s=300).stdout.split()
    pip = image.run(["python", "-m", "pip", "--version"], timeout_s=60)

    assert sorted(writable) == ["/run/lock", "/tmp", "/var/tmp"]
    assert "No module named pip" in pip.stdout
    assert not list((image.root / "var/lib/apt/lists").iterdir())


@built
def test_it_is_healthy_until_its_scratch_space_is_full(image: Image) -> None:
    def check(size: str) -> subprocess.CompletedProcess[str]:
        scratch = Mount(source="tmpfs", target="/tmp", options=f"size={size},mode=1777")
        return image.run(image.healthcheck, timeout_s=60, mounts=[scratch], read_only=True)

    assert check("1m").returncode == 0
    full = check("32k")
    assert full.returncode != 0
    assert "No space left on device" in full.stdout


def contained(
    image: Image, data: Path, command: list[str], *, user: str = ""
) -> subprocess.CompletedProcess[str]:
    """A command as `docker run --read-only --tmpfs /tmp:exec -v DATA:/data -w /data` gives it."""
    return replace(image, workdir="/data").run(
        command,
        timeout_s=600,
        user=user,
        read_only=True,
        mounts=[
            Mount(source="tmpfs", target="/tmp", options="mode=1777"),
            Mount(source=str(data), target="/data", options="rw"),
        ],
    )


@pytest.fixture(scope="module")
def image() -> Iterator[Image]:
    with tempfile.TemporaryDirectory(prefix="moco-image-") as name:
        folder = Path(name)
        started = time.monotonic()
        base = debian(folder / "base")
        mounts, env = package_clients()
        made = build(
            DOCKERFILE,
            context=ROOT,
            base=base,
            folder=folder,
            mounts=mounts,
            env=env,
            timeout_s=STEP_S,
        )
        print(
            f"image: {size_gb(made.root):.2f} GB on {size_gb(base.root):.2f} GB of base, ", end=""
        )
        print(f"built in {time.monotonic() - started:.0f} s")
        yield made


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the container's user may write, with images and a preset."""
    folder = tmp_path_factory.mktemp("data")
    for number in range(96):
        path = folder / "raw" / f"class{number % 2}" / f"{number:03}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(photo(seed=number))
    (folder / "tiny.toml").write_text(TINY)
    folder.chmod(0o777)
    return folder


def debian(root: Path) -> Image:
    """The Dockerfile's base image, as debootstrap makes it.

    The official one is made by the same program of the same packages; it was made earlier, so some
    of them may be older, and its slim variant has no documentation, which is left out here as well.
    """
    base = substitute("$BASE", dict(arg.split("=", 1) for arg in _values("ARG") if "=" in arg))
    asked = re.fullmatch(r"debian:(\d+)\.\d+-slim", base)
    assert asked is not None, f"{base} cannot be imitated here"
    suite = {"12": "bookworm", "13": "trixie"}[asked[1]]
    sites = subprocess.run(
        ["apt-get", "indextargets", "--format", "$(REPO_URI)", f"Codename: {suite}"],
        capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    made = subprocess.run(
        ["debootstrap", "--variant=minbase", suite, root, *sites[:1]],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, timeout=STEP_S,
    )  # fmt: skip
    assert made.returncode == 0, made.stdout[-4000:]
    left_out = ("doc", "info", "locale", "man")
    (root / "etc/dpkg/dpkg.cfg.d/docker").write_text(
        "".join(f"path-exclude /usr/share/{name}/*\n" for name in left_out)
    )
    for name in left_out:
        shutil.rmtree(root / "usr/share" / name)
    print(f"base: Debian {(root / 'etc/debian_version').read_text().strip()}, for {base}")
    path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    return Image(root=root, env={"PATH": path})


def package_clients() -> tuple[list[Mount], dict[str, str]]:
    """How apt and pip reach their registries on this machine, for the steps alone.

    The files that pip's settings name are mounted below /run, which no image keeps.
    """
    proxies = ("http_proxy", "https_proxy", "no_proxy")
    env = {name: value for name, value in os.environ.items() if name.lower() in proxies}
    env["DEBIAN_FRONTEND"] = "noninteractive"
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    ).stdout
    mounts = [Mount(source="tmpfs", target="/run", options="mode=755")]
    for name in ("/etc/apt", "/etc/resolv.conf", "/etc/hosts"):
        mounts += [Mount(source=name, target=name)]
    for name, value in re.findall(r"^[\w:]+\.([\w-]+)='(.*)'$", listed, re.MULTILINE):
        words = []
        for word in value.replace("\\n", " ").split():
            path = Path(word.removeprefix("file://"))
            if path.is_absolute() and path.exists():
                # Links of an index lead to files beside it.
                source = path.parent if word.startswith("file://") else path
                mounts.append(Mount(source=str(source), target=f"/run/clients{source}"))
                word = word.replace(str(path), f"/run/clients{path}")
            words.append(word)
        env[f"PIP_{name.upper().replace('-', '_')}"] = " ".join(words)
    return list(dict.fromkeys(mounts)), env


def size_gb(root: Path) -> float:
    """As it is on disk, with no file counted twice."""
    kib = subprocess.run(
        ["du", "--summarize", "--one-file-system", root], capture_output=True, text=True, check=True
    ).stdout.split()[0]
    return int(kib) * 1024 / 1e9


def _values(name: str) -> list[str]:
    return [rest for found, _, rest in parse(DOCKERFILE.read_text()) if found == name]
