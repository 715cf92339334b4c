"""What users are shown as code runs, does what it says, and uses public names alone."""

import ast
import importlib
import runpy
from pathlib import Path

import pytest
import torch

from tests.support.shard_sets import make_shard_set

pytestmark = pytest.mark.timeout(120)

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))
OURS = {"shards", "pipelines", "moco_scale"}


def test_a_loop_of_ones_own_that_was_stopped_ends_as_one_that_was_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (own_loop,) = (path for path in EXAMPLES if path.name == "own_loop.py")
    shards = make_shard_set(tmp_path, count=20, shard_samples=12).url
    settings = ["--batch-size", "8", "--view-size", "32", "--save-every", "2"]

    def losses(to: str, steps: int) -> list[str]:
        command = [str(own_loop), shards, "--to", str(tmp_path / to), "--steps", str(steps)]
        monkeypatch.setattr("sys.argv", [*command, *settings])
        runpy.run_path(str(own_loop), run_name="__main__")
        return capsys.readouterr().out.splitlines()

    whole = losses("whole.pt", 5)
    first, rest = losses("stopped.pt", 3), losses("stopped.pt", 5)

    assert len(whole) == 5  # over two ends of an epoch
    assert first + rest == whole
    one, other = (
        torch.load(tmp_path / name, weights_only=True) for name in ("whole.pt", "stopped.pt")
    )
    assert one["loader"] == other["loader"]
    assert all(torch.equal(w, other["encoder"][name]) for name, w in one["encoder"].items())
    assert not list(tmp_path.glob("*.unfinished"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_imports_public_names_alone(path: Path) -> None:
    imported = [
        (node.module, alias.name)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
        if node.module.partition(".")[0] in OURS
    ]

    assert imported
    for module, name in imported:
        assert name in importlib.import_module(module).__all__
