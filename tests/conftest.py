"""What every test stands on: the stand-in for the host, before anything of ours is imported."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import aiohttp
import pytest

import pytest_bootstrap  # noqa: F401 - importing it is what puts the stubs in place
from openrouter_responses_pipe.openrouter_responses_pipe import Pipe
from openrouter_responses_pipe.simulator import Simulator
from pytest_bootstrap import HostFiles, host_files, host_models
from tests.media import Site, serving_site
from tests.support import running_pipe


@pytest.fixture
async def simulator() -> AsyncIterator[Simulator]:
    """OpenRouter on a loopback port of its own."""
    async with Simulator() as running:
        yield running


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    """A client that asks the simulator with a key."""
    async with aiohttp.ClientSession(headers={"Authorization": "Bearer sk-or-test"}) as session:
        yield session


@pytest.fixture
async def pipe(simulator: Simulator, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Pipe]:
    """A pipe that talks to the simulator and does not try again."""
    monkeypatch.setenv("WEBUI_SECRET_KEY", "the secret of this server")
    async with running_pipe(simulator.base_url) as running:
        yield running


@pytest.fixture
def files(tmp_path: Path) -> Iterator[HostFiles]:
    """The host's files, none yet, in a folder."""
    host_files.reset(tmp_path)
    yield host_files
    host_files.reset()
    host_models.reset()


@pytest.fixture
async def site() -> AsyncIterator[Site]:
    """A server on loopback that a chat may name."""
    async with serving_site() as running:
        yield running
