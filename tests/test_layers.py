"""Imports point one way, and every heavy thing has one door."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ALLOWED = {
    "shards": set(),
    "pipelines": {"shards"},
    "moco_scale": {"shards", "pipelines"},
}
FIRST_LEVEL = {*ALLOWED, "tests", "demo", "deploy", "benchmarks", "examples"}
DOORS = {
    "nvidia": "pipelines/dali_",
    "obstore": "shards/store.py",
    "fsspec": ("shards/store.py", "shards/fsspec_store.py"),
    "boto3": ("shards/store.py", "shards/boto_s3.py"),
    "prometheus_client": "moco_scale/exporter.py",
    "tyro": ("moco_scale/cli", "moco_scale/settings.py"),
    "torch.distributed": ("moco_scale/distributed.py", "moco_scale/launch.py"),
}


def imports_of(path: Path) -> set[str]:
    """Full names of the modules that a file imports, deferred imports included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("package", ALLOWED)
def test_a_package_imports_only_what_lies_below_it(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files

    for path in files:
        ours = {name.partition(".")[0] for name in imports_of(path)} & FIRST_LEVEL
        assert ours <= ALLOWED[package] | {package}, path


def test_each_heavy_thing_has_one_door() -> None:
    for package in ALLOWED:
        for path in sorted((ROOT / package).rglob("*.py")):
            name = path.relative_to(ROOT).as_posix()
            for heavy, door in DOORS.items():
                if any(f"{used}.".startswith(f"{heavy}.") for used in imports_of(path)):
                    assert name.startswith(door), f"{name} imports {heavy}"


def test_shards_needs_neither_torch_nor_dali() -> None:
    for path in sorted((ROOT / "shards").rglob("*.py")):
        first = {name.partition(".")[0] for name in imports_of(path)}
        assert not first & {"torch", "torchvision", "nvidia"}, path
