"""Workers of servers, as far as artifacts go: in this process, or in one of their own that can be killed.

    async with serving(url, redis_url) as store: ...
    async with Worker.started(log) as worker: await worker.open(url, redis_url)

A process does what it is told and answers; told nothing more, it closes its store and ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import multiprocessing
import os
import resource
import signal
import sqlite3
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

import psycopg
import redis
from sqlalchemy import event
from sqlalchemy.engine import make_url
from sqlalchemy.ext.asyncio import AsyncEngine

import pytest_bootstrap  # noqa: F401 - the stand-in of the host, before anything of ours is imported
from openrouter_responses_pipe.openrouter_responses_pipe import (
    ArtifactCipher,
    ArtifactPayload,
    ArtifactSettings,
    ArtifactStore,
    Database,
    OpenWebUIHost,
    StorageError,
)
from pytest_bootstrap import HostRedis
from tests.engines import connected, create_host_engine, host_engine

Json = dict[str, Any]
ROOT: Final = Path(__file__).parents[1]
PIPE: Final = "openrouter"
TABLE: Final = f"pipe_{PIPE}_artifacts"
USER: Final = "user"
CHAT: Final = "chat"
SECRET: Final = "the secret of this server"
PATIENCE_S: Final = 20.0  # a wait that ends in a failure of the test


# What everybody can see


def stored(url: str) -> list[str]:
    """The ULIDs in the table, one for each row; none while there is no table."""
    statement = f"SELECT ulid FROM {TABLE}"
    with contextlib.suppress(sqlite3.OperationalError, psycopg.errors.UndefinedTable):
        if url.startswith("sqlite"):
            with contextlib.closing(sqlite3.connect(path_of(url), timeout=10)) as connection:
                return [row[0] for row in connection.execute(statement)]
        with connected(url) as connection:
            return [row[0] for row in connection.execute(statement.encode())]
    return []


def change(url: str, *statements: str) -> None:
    """Change a database behind everybody's back."""
    if url.startswith("sqlite"):
        with contextlib.closing(sqlite3.connect(path_of(url), timeout=10)) as connection, connection:
            for statement in statements:
                connection.execute(statement)
        return
    with connected(url) as connection:
        for statement in statements:
            connection.execute(statement.encode())


def path_of(url: str) -> str:
    """The file of a database of SQLite."""
    return str(make_url(url).database)


@contextlib.contextmanager
def held(url: str, *, from_readers: bool = False, table: str = TABLE) -> Iterator[Callable[[], None]]:
    """Keep everybody else from writing to the table, or also from reading it; what is yielded ends that."""
    if url.startswith("sqlite"):
        connection: Any = sqlite3.connect(
            path_of(url), timeout=10, isolation_level=None, check_same_thread=False
        )
        connection.execute("BEGIN EXCLUSIVE" if from_readers else "BEGIN IMMEDIATE")
    else:
        address = make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
        connection = psycopg.connect(address)
        mode = "ACCESS EXCLUSIVE" if from_readers else "SHARE"
        connection.execute(f"LOCK TABLE {table} IN {mode} MODE".encode())
    try:
        yield connection.close
    finally:
        connection.close()


@contextlib.asynccontextmanager
async def locking(url: str) -> AsyncIterator[None]:
    """Another process that keeps everybody else from writing; in a database without WAL also from reading."""
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-Sc", _LOCK, path_of(url), stdin=pipe, stdout=pipe
    )
    assert process.stdout
    try:
        async with asyncio.timeout(PATIENCE_S):
            assert await process.stdout.readline() == b"locked\n"
        yield
    finally:
        process.kill()
        await process.wait()


_LOCK: Final = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], timeout=10, isolation_level=None)
connection.execute("BEGIN EXCLUSIVE")
print("locked", flush=True)
sys.stdin.read()
"""


@contextlib.asynccontextmanager
async def impatient_engine(url: str) -> AsyncIterator[AsyncEngine]:
    """The host's engine, where an administrator has SQLite wait for 0.1 s where others write, not for 5."""
    async with host_engine(url) as engine:
        event.listen(engine.sync_engine, "connect", _wait_less)
        yield engine


def _wait_less(connection: Any, _record: object) -> None:
    cursor = connection.cursor()
    cursor.execute("PRAGMA busy_timeout=100")
    cursor.close()


@contextlib.asynccontextmanager
async def held_soon(url: str) -> AsyncIterator[None]:
    """The same, where this loop may have to end something first."""
    holding = held(url)
    await asyncio.to_thread(holding.__enter__)
    try:
        yield
    finally:
        holding.__exit__(None, None, None)


async def until(condition: Callable[[], Any], limit_s: float = PATIENCE_S, *, what: str = "") -> float:
    """Look until it is so; returns the seconds that took."""
    started = time.monotonic()
    while not condition():
        waited_s = time.monotonic() - started
        assert waited_s < limit_s, what or "it did not come to that"
        await asyncio.sleep(min(0.01 + waited_s / 10, 0.1))
    return time.monotonic() - started


# A worker in this process


class Server(OpenWebUIHost):
    """The seam to a host with an engine and a Redis of its own, so that several can stand side by side."""

    def __init__(self, engine: AsyncEngine, redis_client: Any = None) -> None:
        super().__init__()
        self._engine = engine
        self._client = redis_client

    def database(self) -> Database:
        """This server's."""
        return Database(self._engine)

    def redis(self) -> tuple[Any, str] | None:
        """This server's."""
        return None if self._client is None else (self._client, "open-webui")


def settings(**changes: Any) -> ArtifactSettings:
    """Settings as the valves make them."""
    return ArtifactSettings(ArtifactCipher(SECRET, PIPE))._replace(**changes)


def payload(text: str, chat_id: str = CHAT, user_id: str = USER, **more: Any) -> ArtifactPayload:
    """A thought to be kept."""
    given = {"user_id": user_id, "chat_id": chat_id, **more}
    return ArtifactPayload([{"reasoning": {"id": text}}], "turn", **given)


def texts(found: Any) -> list[str]:
    """The thoughts that were found."""
    return [entries[0]["reasoning"]["id"] for entries in found.values()]


@dataclass
class Here:
    """A store, and what a request asks of it."""

    store: ArtifactStore
    settings: ArtifactSettings

    async def save(self, *wanted: str, chat_id: str = CHAT, **more: Any) -> list[str]:
        """Keep thoughts, as the end of an answer does; their ULIDs."""
        self.store.open(self.settings)
        return await self.store.save([payload(text, chat_id, **more) for text in wanted])

    async def load(
        self, ulids: Sequence[str], chat_id: str = CHAT, user_id: str = USER
    ) -> tuple[list[str], int]:
        """(the thoughts that were found, the number of those that could not be read)."""
        self.store.open(self.settings)
        loaded = await self.store.load(ulids, user_id, chat_id)
        return texts(loaded.found), loaded.unreadable


@contextlib.asynccontextmanager
async def serving(
    url: str,
    redis_url: str = "",
    *,
    engine: AsyncEngine | None = None,
    clients: HostRedis | None = None,
    now: Callable[[], float] = time.time,
    **changes: Any,
) -> AsyncIterator[Here]:
    """The store of one worker, opened; afterwards it is closed, and so are connections of its own."""
    async with contextlib.AsyncExitStack() as ends:
        if clients is None:
            clients = HostRedis()
            ends.push_async_callback(clients.aclose)
        engine = engine or await ends.enter_async_context(host_engine(url))
        client = clients.get_redis_connection(redis_url, async_mode=True, decode_responses=False)
        store = ArtifactStore(Server(engine, client), PIPE, now=now)
        ends.push_async_callback(_ended, store)
        ends.push_async_callback(store.aclose)
        here = Here(store, settings(uses_redis=bool(redis_url), **changes))
        store.open(here.settings)
        yield here


async def _ended(store: ArtifactStore) -> None:
    """See to it that no task of a store is left that is closed: its loop would wait for it without an end.

    Up to Python 3.11 a cancellation can get lost in `asyncio.wait_for`, which clients of Redis use.
    """

    def is_left(task: asyncio.Task[Any]) -> bool:
        frame = getattr(task.get_coro(), "cr_frame", None)
        return frame is not None and frame.f_locals.get("self") is store

    async with asyncio.timeout(PATIENCE_S):
        while left := [task for task in asyncio.all_tasks() if is_left(task)]:
            for task in left:
                task.cancel()
            await asyncio.wait(left, timeout=0.02)


# A worker in a process of its own

# Processes are forked from one that has all modules and no threads.
_FORKS: Final = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload([__name__])


@dataclass
class Worker:
    """Its process, and what is said to it."""

    process: Any
    line: Connection
    log: Path

    @classmethod
    @contextlib.asynccontextmanager
    async def started(cls, log: Path) -> AsyncIterator[Worker]:
        """Start one; it ends with the block, if it has not been killed."""
        ours, theirs = _FORKS.Pipe()
        process = _FORKS.Process(target=_run, args=(theirs, log))
        process.start()
        theirs.close()
        worker = cls(process, ours, log)
        try:
            yield worker
            await worker.end()
        finally:
            ours.close()
            process.kill()
            process.join()
            process.close()

    async def do(self, what: str, **given: Any) -> Json:
        """Have it do something; what it answers."""
        self.line.send({"do": what, **given})
        async with asyncio.timeout(PATIENCE_S):
            try:
                return await asyncio.to_thread(self.line.recv)
            except EOFError:
                raise AssertionError(f"the worker has ended: {self.log.read_text('utf-8')}") from None

    async def open(self, database: str, redis: str = "") -> None:
        """Have it open its store."""
        await self.do("open", database=database, redis=redis)

    async def save(self, *wanted: str, chat_id: str = CHAT) -> list[str]:
        """Have it keep thoughts; their ULIDs.

        Raises:
            StorageError: as the store says.
        """
        answer = await self.do("save", texts=wanted, chat_id=chat_id)
        if "error" in answer:
            raise StorageError(answer["error"])
        return answer["ulids"]

    async def load(self, ulids: Sequence[str], chat_id: str = CHAT) -> tuple[list[str], int]:
        """(the thoughts that it has found, the number of those that could not be read)."""
        answer = await self.do("load", ulids=ulids, chat_id=chat_id)
        return answer["found"], answer["unreadable"]

    async def kill(self) -> None:
        """End it this moment."""
        self.process.kill()
        await self.died()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Stop it in the middle, for the block."""
        os.kill(self.process.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(self.process.pid, signal.SIGCONT)

    async def died(self) -> None:
        """Expect that it is killed."""
        await asyncio.to_thread(self.process.join, PATIENCE_S)
        assert self.process.exitcode == -signal.SIGKILL

    def logged(self, level: str) -> list[str]:
        """What its log has of one level."""
        lines = self.log.read_text("utf-8").splitlines()
        return [line for line in lines if line.startswith(level)]

    async def end(self) -> None:
        """Let it end by itself, unless it has ended."""
        if self.process.exitcode is None:
            self.line.send(None)
            await asyncio.to_thread(self.process.join, PATIENCE_S)
            assert self.process.exitcode == 0, self.log.read_text("utf-8")


def _run(line: Connection, log: Path) -> None:
    with log.open("wb") as out:
        os.dup2(out.fileno(), 2)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", stream=sys.stderr)
    asyncio.run(_work(line))


async def _work(line: Connection) -> None:
    here: Here | None = None
    async with contextlib.AsyncExitStack() as ends:
        while given := await asyncio.to_thread(line.recv):
            answer: Json = {}
            if given["do"] == "open":
                here = await _opened(given, ends)
            elif given["do"] == "limit":
                _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
                resource.setrlimit(resource.RLIMIT_FSIZE, (given["bytes"], most))
            elif here is not None and given["do"] == "save":
                try:
                    answer = {"ulids": await here.save(*given["texts"], chat_id=given["chat_id"])}
                except StorageError as exc:
                    answer = {"error": str(exc)}
            elif here is not None:
                found, unreadable = await here.load(given["ulids"], given["chat_id"])
                answer = {"found": found, "unreadable": unreadable}
            line.send(answer)


async def _opened(given: Json, ends: contextlib.AsyncExitStack) -> Here:
    url = given["database"]
    engine = await ends.enter_async_context(host_engine(url))
    return await ends.enter_async_context(serving(url, given["redis"], engine=engine))


async def _leave(url: str, redis_url: str) -> None:
    """Keep a thought, and end as a process does whose functions nobody closes."""
    client = HostRedis().get_redis_connection(redis_url, async_mode=True, decode_responses=False)
    store = ArtifactStore(Server(create_host_engine(url), client), PIPE)
    here = Here(store, settings(uses_redis=bool(redis_url)))
    await here.save("to open it")
    with redis.Redis.from_url(redis_url) as seen:
        await until(lambda: seen.pubsub_channels())
    print(*await here.save("left"), flush=True)


if __name__ == "__main__":
    asyncio.run(_leave(*sys.argv[1:]))
