"""The environment in which commands and stores find a test's S3 server."""

import os
from collections.abc import Mapping

import pytest


def only_s3(patch: pytest.MonkeyPatch, environment: Mapping[str, str]) -> None:
    """Let `environment` be all that this process's says to clients of S3."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        patch.delenv(name)
    for name, value in environment.items():
        patch.setenv(name, value)
