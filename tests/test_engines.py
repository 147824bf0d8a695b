"""The engines that other tests stand on: real, fresh, gone with the tests; the host's stand-in on them."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
import redis
import sqlalchemy as sa
from sqlalchemy.exc import OperationalError
from sqlalchemy.ext.asyncio import AsyncEngine

from pytest_bootstrap import Chat, ChatMessage, host_database
from tests.engines import PostgresServer, RedisServer, connected, host_engine, redis_server

ROOT: Final = Path(__file__).parents[1]
# the stand-in, which no type checker sees
ENV: Final = importlib.import_module("open_webui.env")
DATABASE: Final = importlib.import_module("open_webui.internal.db")
FUNCTIONS: Final = importlib.import_module("open_webui.models.functions").Functions
HOST_REDIS: Final = importlib.import_module("open_webui.utils.redis")
SOON_S: Final = 10.0


# Databases


async def test_a_database_of_the_host(database: AsyncEngine) -> None:
    """What one connection has committed another reads, through the names that the pipe imports."""
    assert DATABASE.async_engine is database
    await host_database.create(Chat, ChatMessage)
    async with DATABASE.get_async_db_context() as session:
        session.add_all([Chat(id="a", user_id="u"), Chat(id="b", user_id=None)])
        session.add(ChatMessage(id="a-1", chat_id="a", usage={"words": "größer"}))
        await session.commit()
    async with DATABASE.get_async_db_context() as session:
        found = await session.scalars(sa.select(Chat.id).where(Chat.id.in_(["b", "c", "a"])))
        assert sorted(found) == ["a", "b"]
        assert (await session.scalar(sa.select(ChatMessage.usage))) == {"words": "größer"}


async def test_each_test_has_a_database_of_its_own(postgres: PostgresServer) -> None:
    with postgres.database() as first, postgres.database() as second:
        with connected(first) as connection:
            connection.execute("CREATE TABLE only_here (id int)")
        with connected(second) as connection:
            assert connection.execute("SELECT to_regclass('only_here')").fetchone() == (None,)


async def test_a_database_goes_while_it_is_in_use(postgres: PostgresServer) -> None:
    with contextlib.ExitStack() as stack:
        url = stack.enter_context(postgres.database())
        async with host_engine(url) as engine, engine.connect() as connection:
            await connection.execute(sa.text("SELECT 1"))
            stack.close()
            with pytest.raises(OperationalError):
                await connection.execute(sa.text("SELECT 1"))


async def test_after_a_test_the_host_has_its_own_database_again(sqlite_url: str) -> None:
    own = DATABASE.async_engine
    async with host_engine(sqlite_url) as engine:
        host_database.use(engine, "elsewhere")
        assert (DATABASE.async_engine, ENV.DATABASE_SCHEMA) == (engine, "elsewhere")
        host_database.reset()
    assert (DATABASE.async_engine, ENV.DATABASE_SCHEMA) == (own, None)


async def test_a_schema(postgres_url: str) -> None:
    """The host's tables lie in it, and are found there."""
    with connected(postgres_url) as connection:
        connection.execute("CREATE SCHEMA chats_of_ours")
    async with host_engine(postgres_url) as engine:
        host_database.use(engine, "chats_of_ours")
        try:
            await host_database.create(Chat)
            async with DATABASE.get_async_db_context() as session:
                session.add(Chat(id="a"))
                await session.commit()
                assert list(await session.scalars(sa.select(Chat.id))) == ["a"]
        finally:
            host_database.reset()
    with connected(postgres_url) as connection:
        assert connection.execute("SELECT id FROM chats_of_ours.chat").fetchall() == [("a",)]


async def test_sqlite_is_opened_as_the_host_opens_it(sqlite_url: str) -> None:
    expected = {"journal_mode": "wal", "synchronous": 1, "busy_timeout": 5000, "temp_store": 2}
    async with host_engine(sqlite_url) as engine, engine.connect() as connection:
        found = {name: await connection.scalar(sa.text(f"PRAGMA {name}")) for name in expected}
    assert found == expected


# Redis


def client(server: RedisServer, **options: float) -> redis.Redis:
    """A client that blocks, and does not try again."""
    return redis.Redis.from_url(server.url, retry=None, decode_responses=True, **options)


async def test_the_redis_of_the_host(redis_of_host: RedisServer) -> None:
    """One client for all who ask, in text or in bytes."""
    assert redis_of_host.url == ENV.REDIS_URL
    assert HOST_REDIS.get_sentinels_from_env(ENV.REDIS_SENTINEL_HOSTS, ENV.REDIS_SENTINEL_PORT) == []
    text = HOST_REDIS.get_redis_connection(ENV.REDIS_URL, async_mode=True)
    raw = HOST_REDIS.get_redis_connection(ENV.REDIS_URL, [], False, async_mode=True, decode_responses=False)
    await text.set("key", "größer")
    assert (await text.get("key"), await raw.get("key")) == ("größer", "größer".encode())
    assert HOST_REDIS.get_redis_connection(ENV.REDIS_URL, async_mode=True) is text


@pytest.mark.parametrize("appendonly", [False, True])
def test_a_redis_that_is_killed(appendonly: bool, tmp_path: Path) -> None:
    """It is back at its address, with what it held if it keeps a file."""
    with redis_server(tmp_path, appendonly=appendonly) as server, client(server) as connection:
        connection.set("key", "value")
        pid, url = server.pid, server.url
        server.kill()
        with pytest.raises(redis.ConnectionError):
            connection.ping()
        server.launch()
        assert (server.url, server.pid == pid) == (url, False)
        assert connection.get("key") == ("value" if appendonly else None)


def test_a_redis_that_is_paused(redis_server: RedisServer) -> None:
    with client(redis_server, socket_timeout=0.2) as hasty, client(redis_server) as patient:
        redis_server.pause()
        with pytest.raises(redis.TimeoutError):
            hasty.set("key", "value")
        redis_server.resume()
        assert patient.ping()


def test_a_redis_ends_while_it_is_paused(tmp_path: Path) -> None:
    with redis_server(tmp_path) as server, ended(server.pid):
        server.pause()
        server.stop()


# The host's functions


async def test_functions_that_a_test_names(functions: dict[str, bool]) -> None:
    functions["here"] = False
    assert not (await FUNCTIONS.get_function_by_id("here")).is_active
    functions["here"] = True
    assert (await FUNCTIONS.get_function_by_id("here")).is_active
    assert await FUNCTIONS.get_function_by_id("elsewhere") is None


# Nothing is left

STARTS_BOTH: Final = """
import sys
from pathlib import Path
from tests.engines import postgres_server, redis_server
folder = Path(sys.argv[1])
with postgres_server(folder) as postgres, redis_server(folder / "redis") as redis:
    if sys.argv[2] == "paused":
        redis.pause()
    print(postgres.pid, redis.pid, flush=True)
    sys.stdin.read()
"""


@contextlib.contextmanager
def ended(*pids: int) -> Iterator[None]:
    """Expect that what is done ends these processes, whosesoever children they are."""
    handles = [os.pidfd_open(pid) for pid in pids]
    try:
        yield
        for handle in handles:
            assert select.select([handle], [], [], SOON_S)[0], "a server has outlived the tests"
    finally:
        for handle in handles:
            os.close(handle)


@pytest.fixture
def temporary() -> Iterator[Path]:
    """A folder for temporary files that every user may enter."""
    path = Path(tempfile.mkdtemp())
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@pytest.mark.parametrize("how", ["running", "paused"])
async def test_servers_die_with_the_tests(how: str, temporary: Path) -> None:
    """Killed, the tests can end nothing themselves."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", STARTS_BOTH, str(temporary), how),
        env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(temporary)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdout
    pids = [int(word) for word in (await process.stdout.readline()).split()]
    assert len(pids) == 2
    with ended(*pids):
        process.send_signal(signal.SIGKILL)
        await process.wait()
