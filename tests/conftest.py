"""What every test stands on: the stand-in for the host, before anything of ours is imported."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from sqlalchemy.ext.asyncio import AsyncEngine

import pytest_bootstrap  # noqa: F401 - importing it is what puts the stubs in place
from openrouter_responses_pipe.openrouter_responses_pipe import LOGGER, Pipe
from openrouter_responses_pipe.simulator import Simulator
from pytest_bootstrap import HostFiles, host_database, host_files, host_functions, host_models, host_redis
from tests import engines
from tests.media import Site, serving_site
from tests.support import running_pipe


class WrittenLog:
    """`caplog`, read only when what has been logged is written: a thread does that."""

    def __init__(self, caplog: pytest.LogCaptureFixture) -> None:
        self._caplog = caplog

    def __getattr__(self, name: str) -> Any:
        for handler in tuple(LOGGER.handlers):
            handler.flush()
        return getattr(self._caplog, name)


@pytest.fixture
def caplog(caplog: pytest.LogCaptureFixture) -> Any:
    """The log, as soon as it is written."""
    return WrittenLog(caplog)


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


@pytest.fixture(scope="session")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[engines.PostgresServer]:
    """PostgreSQL, started when the first test asks for it."""
    with engines.postgres_server(tmp_path_factory.mktemp("postgres")) as server:
        yield server


@pytest.fixture
def postgres_url(postgres: engines.PostgresServer) -> Iterator[str]:
    """An empty database of PostgreSQL."""
    with postgres.database() as url:
        yield url


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    """A database of SQLite in a file, not made yet."""
    return f"sqlite+aiosqlite:///{tmp_path / 'webui.db'}"


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest) -> str:
    """An empty database of each kind that Open WebUI runs on."""
    return request.getfixturevalue({"sqlite": "sqlite_url", "postgresql": "postgres_url"}[request.param])


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[AsyncEngine]:
    """The host's engine, on an empty database of each kind."""
    async with engines.host_engine(database_url) as engine:
        host_database.use(engine)
        yield engine
        host_database.reset()


@pytest.fixture
def redis_server(tmp_path: Path) -> Iterator[engines.RedisServer]:
    """An empty Redis that keeps nothing when it is killed."""
    with engines.redis_server(tmp_path / "redis") as server:
        yield server


@pytest.fixture
async def redis_of_host(
    redis_server: engines.RedisServer, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[engines.RedisServer]:
    """An empty Redis that the host has been told of."""
    monkeypatch.setattr("open_webui.env.REDIS_URL", redis_server.url)
    yield redis_server
    await host_redis.aclose()


@pytest.fixture
def functions() -> Iterator[dict[str, bool]]:
    """The host's functions, none yet: id → whether it is switched on."""
    host_functions.reset()
    yield host_functions.active
    host_functions.reset()


@pytest.fixture
async def site() -> AsyncIterator[Site]:
    """A server on loopback that a chat may name."""
    async with serving_site() as running:
        yield running
