"""Hosts whose database fails while people chat: each with an engine of its own, in a thread of its own.

    with several_hosts():
        found = asyncio.run(report("disk full", url))

A chat is begun, its database fails, the worker is replaced by another, and the database is well again.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import logging
import os
import random
import re
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import pytest
from sqlalchemy import event
from sqlalchemy.engine import make_url
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from openrouter_responses_pipe.openrouter_responses_pipe import LOGGER, Pipe
from openrouter_responses_pipe.simulator import Simulator
from tests import engines
from tests.artifact_worker import PIPE, SECRET, change, held, path_of
from tests.engines import PostgresServer
from tests.support import Answer, arguments, set_valves
from tests.test_reasoning_replay import as_body, as_host_returns, message, reasoning_in, received, thought

Json = dict[str, Any]
LOG: Final = "openrouter_responses_pipe"


# A chat


@dataclass
class Turn:
    """What a person gets, and when; what the model got of its own; what was left with the message."""

    text: str
    first_s: float  # to the first letter
    end_s: float
    told: list[str]
    replayed: list[int]
    kept: str  # "stored", "inline", or ""


class Chat:
    """A chat with a model that thinks, whose answers the host keeps and gives back."""

    def __init__(self, simulator: Simulator, pipe_id: str = PIPE, *, secret_bytes: int = 8) -> None:
        self._simulator = simulator
        self._model = f"{pipe_id}.openai/gpt-5-mini"
        self._secret_bytes = secret_bytes  # of each thought
        self._messages: list[Json] = []
        self.count = 0

    async def turn(self, pipe: Pipe) -> Turn:
        """One question and its answer, which ends well and has reasoning that came back as it was."""
        answer, given, times = Answer(), self.question(), [time.monotonic()]
        async for chunk in await pipe.pipe(**given):  # type: ignore[union-attr]  # it streams
            answer.add(chunk)
            if answer.text and len(times) == 1:
                times.append(time.monotonic())
        times.append(time.monotonic())
        assert answer.text == f"Answer {self.count}.", answer
        assert answer.error == ""
        self._messages += as_host_returns(answer.items())
        entries = reasoning_in(received(self._simulator))
        numbers = [int(entry["id"].removeprefix("rs_")) for entry in entries]
        assert entries == [self._thought(number) for number in numbers]
        told = [note["content"] for note in given["__event_emitter__"].of("notification")]
        started, first, end = times
        return Turn(answer.text, first - started, end - started, told, numbers, _kept(answer))

    def question(self) -> Json:
        """What `pipe()` is given for the next question, whose answer lies ready."""
        self.count += 1
        body = as_body(self._thought(self.count), message(f"Answer {self.count}."))
        self._simulator.next("replay", body=body)
        self._messages.append({"role": "user", "content": f"Question {self.count}?"})
        return arguments({"messages": list(self._messages)}, model=self._model)

    def _thought(self, number: int) -> Json:
        noise = random.Random(number).randbytes(self._secret_bytes)
        return thought(number, encrypted_content=base64.b64encode(noise).decode())


def _kept(answer: Answer) -> str:
    details = [detail for item in answer.items() for detail in item.get("reasoning_details", ())]
    kinds = {"turn": "stored", "sealed": "inline"}
    return "".join(kind for name, kind in kinds.items() for detail in details if name in detail)


# Hosts

ENGINE: Final[ContextVar[AsyncEngine]] = ContextVar("ENGINE")  # of the host that is at work
PHASE: Final[ContextVar[tuple[str, str]]] = ContextVar("PHASE", default=("", ""))


@dataclass
class Host:
    """A host, as far as its database goes."""

    name: str
    url: str
    engine: AsyncEngine
    server: PostgresServer | None = None  # where it is this host's own

    @property
    def pipe_id(self) -> str:
        """A function of its own: of one and the same only the newest load works."""
        return re.sub(r"\W", "_", self.name)

    @property
    def table(self) -> str:
        """Its artifacts."""
        return f"pipe_{self.pipe_id}_artifacts"

    @property
    def admin_url(self) -> str:
        """Its database, for somebody who may do everything."""
        return make_url(self.url).set(username="postgres").render_as_string(hide_password=False)


Fault = Callable[[Host], AbstractContextManager[Any] | AbstractAsyncContextManager[Any]]


def _locked(host: Host) -> AbstractContextManager[Any]:
    """Somebody writes, and does not end."""
    return held(host.url, table=host.table)


def _locked_for_all(host: Host) -> AbstractContextManager[Any]:
    """Somebody keeps everybody out."""
    return held(host.url, table=host.table, from_readers=True)


@contextlib.contextmanager
def _refusing(host: Host, pragma: str, healthy: str) -> Iterator[None]:
    value = pragma

    def set_value(connection: Any, *_given: object) -> None:
        cursor = connection.cursor()
        cursor.execute(f"PRAGMA {value}")
        cursor.close()

    event.listen(host.engine.sync_engine, "checkout", set_value)
    yield
    value = healthy


def _disk_full(host: Host) -> AbstractContextManager[Any]:
    """There is no place for one page more."""
    return _refusing(host, "max_page_count=1", "max_page_count=1073741823")


def _read_only(host: Host) -> AbstractContextManager[Any]:
    """Nobody may write."""
    return _refusing(host, "query_only=ON", "query_only=OFF")


_CUT_OFF: Final = (
    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
    " WHERE datname = current_database() AND pid <> pg_backend_pid()"
)


@contextlib.contextmanager
def _configured(host: Host, name: str, value: str) -> Iterator[None]:
    database = make_url(host.url).database
    change(host.admin_url, f"ALTER DATABASE {database} SET {name} = {value}", _CUT_OFF)
    yield
    reset = f"ALTER DATABASE {database} RESET {name}"
    change(host.admin_url, "SET default_transaction_read_only = off", reset, _CUT_OFF)


def _pg_read_only(host: Host) -> AbstractContextManager[Any]:
    """Nobody may write, as on a replica."""
    return _configured(host, "default_transaction_read_only", "on")


@contextlib.contextmanager
def _short_statements(host: Host) -> Iterator[None]:
    """What takes long is given up, and everything takes long."""
    with _configured(host, "statement_timeout", "200"), _locked_for_all(host):
        yield


@contextlib.contextmanager
def _table_dropped(host: Host) -> Iterator[None]:
    """Somebody has cleaned up."""
    change(host.url, f"DROP TABLE {host.table}")
    yield


@contextlib.contextmanager
def _column_dropped(host: Host) -> Iterator[None]:
    """Somebody has cleaned up, but not all."""
    change(host.url, f"ALTER TABLE {host.table} DROP COLUMN raw_bytes")
    yield


@contextlib.contextmanager
def _file_deleted(host: Host) -> Iterator[None]:
    """Somebody has cleaned up thoroughly."""
    for suffix in ("", "-wal", "-shm"):
        Path(path_of(host.url) + suffix).unlink(missing_ok=True)
    yield


@contextlib.contextmanager
def _no_more_connections(host: Host) -> Iterator[None]:
    """PostgreSQL takes none."""
    role = make_url(host.url).username
    change(host.admin_url, f"ALTER ROLE {role} CONNECTION LIMIT 0", _CUT_OFF)
    yield
    change(host.admin_url, f"ALTER ROLE {role} CONNECTION LIMIT -1")


@contextlib.asynccontextmanager
async def _pool_used_up(host: Host) -> AsyncIterator[None]:
    """The host itself needs all the connections that it allows itself."""
    async with host.engine.connect():
        yield


@contextlib.contextmanager
def _server_stopped(host: Host) -> Iterator[None]:
    """PostgreSQL is not there."""
    assert host.server
    host.server.stop()
    yield
    host.server.launch()


def _processes(server: PostgresServer) -> list[int]:
    children = Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text()
    return [server.pid, *map(int, children.split())]


@contextlib.contextmanager
def _server_hangs(host: Host) -> Iterator[None]:
    """PostgreSQL takes connections and answers nothing."""
    assert host.server
    pids = _processes(host.server)
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


@contextlib.contextmanager
def _backend_killed(host: Host) -> Iterator[None]:
    """One process of PostgreSQL is killed; it ends the others and recovers."""
    assert host.server
    with engines.connected(host.url) as connection:
        asked = "SELECT pid FROM pg_stat_activity WHERE datname = current_database()"
        pids = [
            row[0] for row in connection.execute(asked).fetchall() if row[0] != connection.info.backend_pid
        ]
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
    yield


SQLITE_FAULTS: Final[dict[str, Fault]] = {
    "locked": _locked,
    "locked for all": _locked_for_all,
    "disk full": _disk_full,
    "read-only": _read_only,
    "table dropped": _table_dropped,
    "column dropped": _column_dropped,
    "file deleted": _file_deleted,
}
POSTGRES_FAULTS: Final[dict[str, Fault]] = {
    "pg locked": _locked,
    "pg locked for all": _locked_for_all,
    "pg read-only": _pg_read_only,
    "pg table dropped": _table_dropped,
    "pg column dropped": _column_dropped,
    "pg connections used up": _no_more_connections,
    "pg pool used up": _pool_used_up,
    "pg statement timeout": _short_statements,
}
# one after the other, with a server of their own
SERVER_FAULTS: Final[dict[str, Fault]] = {
    "pg stopped": _server_stopped,
    "pg hangs": _server_hangs,
    "pg killed": _backend_killed,
}
FAULTS: Final = {**SQLITE_FAULTS, **POSTGRES_FAULTS, **SERVER_FAULTS}


# Chats with them


class Entry(NamedTuple):
    """Something that was said, with the host and the phase in which it was said."""

    host: str
    phase: str
    level: int
    words: str


class PhasedLog(logging.Handler):
    """What is said."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[Entry] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Take one record."""
        self.said.append(Entry(*PHASE.get(), record.levelno, record.getMessage()))

    def warnings(self, host: str, phase: str = "") -> list[str]:
        """What a host warned of."""
        said = [entry for entry in self.said if (entry.host, entry.phase) == (host, phase)]
        return [entry.words for entry in said if entry.level >= logging.WARNING]


_PAUSE_S: Final = 0.3  # the longest between an answer and the next question; people take longer


@dataclass
class Report:
    """A chat before, while and after its database fails; meanwhile the worker is replaced by another."""

    before: Turn
    during: list[Turn]
    close_s: float
    anew: list[Turn]
    after: list[Turn]

    @property
    def failing(self) -> list[Turn]:
        """All turns with a database that fails."""
        return [*self.during, *self.anew]


async def _report(host: Host) -> Report:
    ENGINE.set(host.engine)
    async with contextlib.AsyncExitStack() as ends:
        simulator = await ends.enter_async_context(Simulator())
        chat = Chat(simulator, host.pipe_id, secret_bytes=6000)
        pipe = Pipe()

        def start(phase: str) -> None:
            nonlocal pipe
            PHASE.set((host.name, phase))
            pipe = Pipe()
            set_valves(pipe, simulator.base_url)
            ends.push_async_callback(pipe.aclose, deadline_s=0)

        async def turn() -> Turn:
            await _has_settled(host)
            return await chat.turn(pipe)

        start("before")
        while (await Chat(simulator, host.pipe_id).turn(pipe)).kept != "stored":
            await _has_settled(host)  # until the table is open
        before = await turn()
        assert before.kept == "stored", f"{host.name}: {before}"
        PHASE.set((host.name, "during"))
        fault = FAULTS[host.name](host)
        async with fault if isinstance(fault, AbstractAsyncContextManager) else _as_async(fault):
            started, during = time.monotonic(), [await turn()]
            while len(during) < 3 or (len(during) < 6 and time.monotonic() - started < 8):
                during.append(await turn())
            started = time.monotonic()
            await pipe.aclose(deadline_s=0)
            close_s = time.monotonic() - started
            if host.name != "pg pool used up":  # a new pool would not be
                await host.engine.dispose()
            start("anew")
            anew = [await turn(), await turn()]
        PHASE.set((host.name, "after"))
        after = [await turn() for _ in range(4)]
        while after[-1].kept != "stored" and len(after) < 20:  # until it is opened again
            after.append(await turn())
        return Report(before, during, close_s, anew, after)


async def _has_settled(host: Host) -> None:
    """Wait until the store has ended what it does besides cleaning up; not for long, where it cannot."""
    started = time.monotonic()
    name = f"artifacts of {host.pipe_id}"
    while time.monotonic() - started < _PAUSE_S:
        await asyncio.sleep(0.02)
        if sum(task.get_name() == name for task in asyncio.all_tasks()) <= 1:
            return


@contextlib.asynccontextmanager
async def _as_async(fault: AbstractContextManager[Any]) -> AsyncIterator[None]:
    with fault:
        yield


async def report(name: str, url: str, server: PostgresServer | None = None) -> Report:
    """What comes of a chat whose database, an empty one, fails; `server` is its own, where that fails."""
    async with _engine(name, url) as engine:
        return await _report(Host(name, url, engine, server))


@contextlib.contextmanager
def role_of(url: str) -> Iterator[str]:
    """The address of a database of PostgreSQL for somebody who may not do everything."""
    change(url, f"CREATE ROLE {PIPE} LOGIN", f"GRANT ALL ON SCHEMA public TO {PIPE}")
    try:
        yield url.replace("postgres@", f"{PIPE}@")
    finally:
        change(url, f"DROP OWNED BY {PIPE}", f"DROP ROLE {PIPE}")


@contextlib.contextmanager
def several_hosts() -> Iterator[PhasedLog]:
    """Have each context of this process be at home in a host of its own; what the log has of all."""
    seen = PhasedLog()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WEBUI_SECRET_KEY", SECRET)
        patch.delattr("open_webui.internal.db.async_engine")
        patch.setattr("open_webui.internal.db.__getattr__", _engine_here, raising=False)
        LOGGER.addHandler(seen)
        try:
            yield seen
        finally:
            LOGGER.removeHandler(seen)


@contextlib.asynccontextmanager
async def _engine(name: str, url: str) -> AsyncIterator[AsyncEngine]:
    if name not in _ENGINES:
        async with engines.host_engine(url) as engine:
            yield engine
        return
    engine = create_async_engine(url, **_ENGINES[name])
    yield engine
    await engine.dispose()


# where the host is not as it usually is: without WAL, so that writers keep readers out; with few connections
_ENGINES: Final[dict[str, Json]] = {
    "locked for all": {},
    "pg pool used up": {"pool_size": 1, "max_overflow": 0, "pool_pre_ping": True},
}


def _engine_here(name: str) -> AsyncEngine:
    """What a host says its engine is: that of the host which is at work."""
    if name != "async_engine":
        raise AttributeError(name)
    return ENGINE.get()
