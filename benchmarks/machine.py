"""What a figure was measured on, for the head of a result."""

import os
import platform
from importlib import metadata
from pathlib import Path


def machine(*packages: str) -> str:
    """Cores, processor, Python and the versions of packages, in one phrase."""
    models = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    versions = [f"{name} {metadata.version(name)}" for name in packages]
    return ", ".join(
        [
            f"{os.cpu_count()} cores of {models[0] if models else platform.machine()}",
            f"Python {platform.python_version()}",
            *versions,
        ]
    )
