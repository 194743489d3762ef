"""Servers that tests share. Each is started once, on free ports, and only when a test asks for it."""

from __future__ import annotations

import pytest

from tests import servers


@pytest.fixture(scope="session")
def seaweed(tmp_path_factory: pytest.TempPathFactory):
    """A real S3 server: SeaweedFS, stopped and removed at the end."""
    server = servers.start_seaweed(tmp_path_factory.mktemp("seaweed"))
    yield server
    server.stop()


@pytest.fixture
def s3(seaweed, monkeypatch):
    """The server's address and credentials in the environment, and a fresh place on it: a URL."""
    for name, value in seaweed.environment().items():
        monkeypatch.setenv(name, value)
    return seaweed.place()
