"""Fixtures that every test folder shares."""

from collections.abc import Iterator

import pytest

from demo.local_s3 import LocalS3
from tests.support.s3_environment import only_s3


@pytest.fixture(scope="session")
def s3_server() -> Iterator[LocalS3]:
    """One real S3 server for the whole session."""
    with LocalS3() as server:
        yield server


@pytest.fixture
def s3(s3_server: LocalS3, monkeypatch: pytest.MonkeyPatch) -> LocalS3:
    """The S3 server, with its credentials and endpoint in this test's environment."""
    only_s3(monkeypatch, s3_server.environment)
    return s3_server
