"""Files compared by their digests: of bytes that differ pytest shows the difference, for hours."""

import hashlib
from collections.abc import Iterable
from pathlib import Path


def digests(folder: Path, paths: Iterable[Path]) -> dict[str, str]:
    """SHA-256 of each file, by its path below the folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in paths
    }
