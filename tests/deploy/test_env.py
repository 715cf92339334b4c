"""Files of variables for the network between nodes: `deploy/env`."""

import re
import subprocess
from pathlib import Path

import pytest

FILES = sorted((Path(__file__).parents[2] / "deploy/env").glob("*.env"))
ASSIGNMENT = re.compile(r"([A-Z][A-Z0-9_]*)=(\S+)")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_sh_takes_every_variable_of_a_file_and_each_has_a_reason(path: Path) -> None:
    lines = path.read_text().splitlines()
    found = {number: ASSIGNMENT.fullmatch(line) for number, line in enumerate(lines)}
    variables = {match[1]: match[2] for match in found.values() if match}

    sourced = subprocess.run(
        ["sh", "-euc", f"set -a; . '{path}'; env -0"],
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin"},
        timeout=20,
        check=True,
    )

    assert variables
    taken = dict(word.split("=", 1) for word in sourced.stdout.split("\0") if word)
    assert {name: taken.get(name) for name in variables} == variables
    for number, line in enumerate(lines):
        if found[number]:
            assert lines[number - 1].startswith("# "), f"{line} has no reason"
        else:
            assert not line or line.startswith("#"), line
