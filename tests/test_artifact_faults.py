"""What fails under the artifacts, and what a person notices of it: a whole answer, in time, and a sentence.

Everything that fails is real: processes are killed, servers are stopped, files are full. "Acknowledged" is an
artifact whose ULID `save` has returned; none of those is lost but what `the_bound` names.

What takes long runs side by side, once (`side_by_side`); tests look at what has become of it.
"""

# ruff: noqa: ASYNC110, ASYNC240, B023, SIM117 - nobody tells when a database changes; files are small
from __future__ import annotations

import asyncio
import contextlib
import gc
import inspect
import json
import logging
import os
import random
import sqlite3
import sys
import threading
import time
import traceback
import tracemalloc
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import lz4.frame
import pytest
import redis
from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from openrouter_responses_pipe.openrouter_responses_pipe import ArtifactCipher, Pipe, StorageError
from openrouter_responses_pipe.simulator import Simulator
from pytest_bootstrap import HostRedis, host_database
from tests import engines
from tests.artifact_hosts import (
    FAULTS,
    LOG,
    PHASE,
    POSTGRES_FAULTS,
    SERVER_FAULTS,
    SQLITE_FAULTS,
    Chat,
    PhasedLog,
    Report,
    Turn,
    report,
    role_of,
    several_hosts,
)
from tests.artifact_worker import (
    PATIENCE_S,
    PIPE,
    ROOT,
    SECRET,
    TABLE,
    Here,
    Worker,
    change,
    held,
    held_soon,
    impatient_engine,
    locking,
    path_of,
    serving,
    stored,
    until,
)
from tests.engines import PostgresServer, RedisServer, host_engine, redis_server
from tests.support import Answer, all_ended, running_pipe, set_valves

pytestmark = [
    # of a connection whose making was cancelled while the server hung
    pytest.mark.filterwarnings("ignore:.*AsyncConnection.* was deleted while still open:ResourceWarning")
]
# drivers say so of connections that hang when their test ends
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
Json = dict[str, Any]
FIRST_S: Final = 3.6  # the longest to the first letter, where nothing is wrong upstream
END_S: Final = 7.0  # the longest to the end of an answer
NOTICED_S: Final = 1.2  # less than a database is waited for, more than a busy machine needs
NOT_READ: Final = "Some earlier thinking of this chat could not be read: the model goes on without it."


@pytest.fixture(autouse=True)
def quiet(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Iterator[None]:
    """Nothing that nobody has waited for is left behind, and nothing unexpected has come up."""
    monkeypatch.setenv("WEBUI_SECRET_KEY", SECRET)
    caplog.set_level(logging.INFO, logger=LOG)
    yield
    if inspect.iscoroutinefunction(request.function):
        gc.collect()  # what was never awaited or retrieved is said when it goes
    records = [*caplog.get_records("setup"), *caplog.get_records("call")]
    noise = [r.getMessage() for r in records if r.name == "asyncio" or r.levelno >= logging.ERROR]
    # SQLAlchemy itself leaves a connection that it could not close in time to the collector
    assert [words for words in noise if "AsyncAdapt_aiosqlite_connection" not in words] == []


def warnings(caplog: pytest.LogCaptureFixture, word: str = "") -> list[str]:
    """What the log warns of."""
    said = [record for record in caplog.records if record.levelno >= logging.WARNING]
    return [record.getMessage() for record in said if word in record.getMessage()]


def notes(caplog: pytest.LogCaptureFixture, word: str) -> list[str]:
    """What the log tells of besides."""
    said = [record for record in caplog.records if record.levelno == logging.INFO]
    return [record.getMessage() for record in said if word in record.getMessage()]


async def timed(work: Awaitable[Any]) -> tuple[Any, float]:
    """(what came of it, or the StorageError; the seconds it took)."""
    started = time.monotonic()
    try:
        result = await work
    except StorageError as exc:
        result = exc
    return result, time.monotonic() - started


async def all_stored(url: str, ulids: list[str], limit_s: float = PATIENCE_S) -> float:
    """Expect that these are in the table, each once; returns the seconds until then."""
    took_s = await until(lambda: set(stored(url)) >= set(ulids), limit_s, what="rows are missing")
    assert sorted(stored(url)) == sorted(ulids)
    return took_s


async def opened(here: Here) -> None:
    """Wait until the table can be written."""
    while isinstance((await timed(here.save()))[0], StorageError):
        await asyncio.sleep(0.1)


# Redis, as seen from outside


@contextlib.contextmanager
def asking(server: RedisServer) -> Iterator[Any]:
    """A client of a Redis."""
    client = redis.Redis.from_url(server.url, socket_timeout=5)
    try:
        yield client
    finally:
        client.close()


def keys(server: RedisServer, pattern: str) -> list[bytes]:
    """The keys in it."""
    with asking(server) as client:
        return sorted(client.keys(pattern))


def waiting(server: RedisServer) -> int:
    """How many rows wait for the database."""
    with asking(server) as client:
        return sum(client.llen(key) for key in client.keys("*:pending"))


def locks(server: RedisServer) -> int:
    """How many workers move rows."""
    return len(keys(server, "*:lock"))


def lose_lock(server: RedisServer) -> None:
    """End the lock of the worker that moves rows, as time does."""
    with asking(server) as client:
        assert client.delete(*client.keys("*:lock")) == 1


def listeners(server: RedisServer) -> int:
    """How many workers write through this Redis."""
    with asking(server) as client:
        channels = client.pubsub_channels()
        return sum(count for _, count in client.pubsub_numsub(*channels)) if channels else 0


async def at_rest(server: RedisServer, workers: int = 1) -> None:
    """Wait until so many workers listen and no row is on its way."""
    with asking(server) as client:

        def rests() -> bool:
            channels = client.pubsub_channels()
            listening = sum(count for _, count in client.pubsub_numsub(*channels)) if channels else 0
            return listening == workers and not client.keys("*:pending") and not client.keys("*:lock")

        await until(rests)


# What takes long


@dataclass
class Place:
    """Where a scenario may keep its things."""

    name: str
    folder: Path
    postgres: PostgresServer
    own: PostgresServer  # nobody else's

    def sqlite(self, name: str) -> str:
        """A database that is not there yet."""
        return f"sqlite+aiosqlite:///{self.folder / name}.db"


Scenario = Callable[[Place], Awaitable[Any]]
SLOW: Final[dict[str, Scenario]] = {}
AT_ONCE: Final = 12  # so many of them; they mostly wait, but all begin with work


def side_by_side(scenario: Scenario) -> Scenario:
    """Have a scenario run with the others."""
    SLOW[getattr(scenario, "__name__", "")] = scenario
    return scenario


@dataclass
class Failure:
    """What went wrong in a scenario."""

    words: str


@dataclass
class Outcomes:
    """What has become of the scenarios, by name, and what the log has of them."""

    results: Mapping[str, Any]
    log: PhasedLog

    def of(self, name: str) -> Any:
        """The result of a scenario; the test fails where it has none."""
        result = self.results[name]
        if isinstance(result, Failure):
            pytest.fail(result.words)
        return result


@contextlib.contextmanager
def _in_small_turns() -> Iterator[None]:
    """Threads that compute let those go first that have waited for a server: none of these takes long."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(before / 20)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


@pytest.fixture(scope="module")
def outcomes(postgres: PostgresServer, tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """Run the scenarios, each with a loop of its own: what blocks one does not hold up the others."""

    async def run(place: Place) -> Any:
        PHASE.set((place.name, ""))
        return await SLOW[place.name](place)

    def outcome(place: Place) -> Any:
        try:
            return asyncio.run(run(place))
        except BaseException:
            return Failure(traceback.format_exc())

    with (
        several_hosts() as log,
        _in_small_turns(),
        engines.postgres_server(tmp_path_factory.mktemp("postgres")) as own,
        ThreadPoolExecutor(AT_ONCE) as threads,
    ):
        places = [Place(name, tmp_path_factory.mktemp("slow"), postgres, own) for name in SLOW]
        return Outcomes(dict(zip(SLOW, threads.map(outcome, places), strict=True)), log)


@pytest.fixture
def outcome(outcomes: Outcomes, request: pytest.FixtureRequest) -> Any:
    """The result of the scenario that a test is named after."""
    return outcomes.of(request.node.originalname.removeprefix("test_"))


# Chats whose database fails


async def with_sqlite(place: Place) -> Report:
    """A chat of a host with SQLite."""
    return await report(place.name, place.sqlite("webui"))


async def with_postgres(place: Place) -> Report:
    """A chat of a host with PostgreSQL, as somebody who may not do everything where that counts."""
    with place.postgres.database() as url:
        if place.name != "pg connections used up":
            return await report(place.name, url)
        with role_of(url) as theirs:
            return await report(place.name, theirs)


@side_by_side
async def with_own_server(place: Place) -> dict[str, Report]:
    """Chats of hosts with a PostgreSQL that fails as a whole, one after the other."""
    found: dict[str, Report] = {}
    for name in SERVER_FAULTS:
        with place.own.database() as url:
            found[name] = await report(name, url, place.own)
    return found


SLOW.update(dict.fromkeys(SQLITE_FAULTS, with_sqlite))
SLOW.update(dict.fromkeys(POSTGRES_FAULTS, with_postgres))


@pytest.fixture
def failed(outcomes: Outcomes, name: str) -> Report:
    """One of these chats."""
    return outcomes.of("with_own_server")[name] if name in SERVER_FAULTS else outcomes.of(name)


def each_fault(*but: str) -> pytest.MarkDecorator:
    """All faults but these."""
    return pytest.mark.parametrize("name", [name for name in FAULTS if name not in but])


@each_fault()
def test_every_answer_is_whole(failed: Report, name: str) -> None:
    """And in time; that the text is whole has been looked at already."""
    for turn in failed.failing:
        assert turn.first_s < FIRST_S
        assert turn.end_s < END_S
        assert turn.kept in ("stored", "inline")
    assert failed.close_s < 12


@each_fault()
def test_what_cannot_be_stored_rides_along(failed: Report, name: str) -> None:
    """And comes back in every later turn, from any worker."""
    turns = [failed.before, *failed.failing, *failed.after]
    inline = {number for number, turn in enumerate(turns, 1) if turn.kept == "inline"}
    for number, turn in enumerate(turns, 1):
        assert {one for one in inline if one < number} <= set(turn.replayed)


@each_fault()
def test_the_worker_that_was_there_forgets_nothing(failed: Report, name: str) -> None:
    for number, turn in enumerate(failed.during, 2):
        assert turn.replayed == [*range(1, number)]
        assert turn.told == []


@each_fault()
def test_people_wait_once(failed: Report, name: str) -> None:
    """For each worker, until it knows."""
    for turns in (failed.during, failed.anew):
        assert sum(turn.end_s > NOTICED_S for turn in turns) <= 1


@each_fault("file deleted", "pg killed")
def test_it_is_said_once(failed: Report, name: str, outcomes: Outcomes) -> None:
    """By each worker; a file that goes and a process that comes again nobody can notice."""
    assert len(failed.during) >= 3
    assert len(outcomes.log.warnings(name, "during")) == 1
    assert len(outcomes.log.warnings(name, "anew")) <= 1


GONE: Final = ("table dropped", "pg table dropped", "column dropped", "pg column dropped", "file deleted")


@each_fault()
def test_it_is_used_again(failed: Report, name: str) -> None:
    last = failed.after[-1]
    assert last.kept == "stored"
    count = 1 + len(failed.failing) + len(failed.after)
    if name not in GONE:
        assert last.replayed == [*range(1, count)]


@each_fault()
def test_what_is_lost_is_told_once(failed: Report, name: str) -> None:
    turns = [*failed.anew, *failed.after]
    first = len(failed.during) + 2
    is_lost = any(turn.replayed != [*range(1, number)] for number, turn in enumerate(turns, first))
    assert [note for turn in turns for note in turn.told] == [NOT_READ] * is_lost


# Those who move rows die


async def killed_flusher(place: Place) -> float:
    """Dead before the rows were in the database, or after, when they were not yet out of Redis."""
    after = "after" in place.name
    with (
        place.postgres.database()
        if "postgresql" in place.name
        else contextlib.nullcontext(place.sqlite("webui")) as url,
        redis_server(place.folder / "redis") as server,
    ):
        async with Worker.started(place.folder / "worker.log") as worker:
            await worker.open(url, server.url)
            await until(lambda: listeners(server) == 1)
            with held(url) as let_go:
                ulids = await worker.save("a", "b", "c")
                await until(lambda: locks(server) == 1)
                if not after:
                    await worker.kill()
                with asking(server) as client:  # whoever has written them cannot take them out
                    client.acl_setuser("default", enabled=True, commands=["-lrem", "-eval", "-evalsha"])
                    let_go()
                    if after:
                        await until(lambda: stored(url))
                        await worker.kill()
                    client.acl_setuser("default", enabled=True, commands=["+lrem", "+eval", "+evalsha"])
        assert len(stored(url)) == 3 * after
        assert waiting(server) == 3
        async with serving(url, server.url) as here:
            assert sorted((await here.load(ulids))[0]) == ["a", "b", "c"], "before they are moved"
            took_s = await until(lambda: waiting(server) == 0)
            assert sorted(stored(url)) == sorted(ulids)
            return took_s


KILLED: Final = [
    f"{database}, killed {when}" for database in ("sqlite", "postgresql") for when in ("before", "after")
]
SLOW.update(dict.fromkeys(KILLED, killed_flusher))


@pytest.mark.parametrize("name", KILLED)
def test_a_killed_flusher_is_replaced(name: str, outcomes: Outcomes) -> None:
    """When its lock of 10 s has run out, by one that looks each second."""
    assert outcomes.of(name) < 13


async def test_rows_of_a_killed_worker_are_moved(
    database_url: str, redis_server: RedisServer, tmp_path: Path
) -> None:
    """It has put them into Redis and died; whoever moves rows moves these too."""
    async with (
        Worker.started(tmp_path / "worker.log") as worker,
        serving(database_url, redis_server.url) as here,
    ):
        await worker.open(database_url, redis_server.url)
        await at_rest(redis_server, 2)
        with held(database_url) as let_go:
            with worker.paused():
                ulids = await here.save("a")
                await until(lambda: locks(redis_server) == 1)  # of this process, which waits for the database
            ulids += await worker.save("b", "c")
            await worker.kill()
            assert waiting(redis_server) == 3
            let_go()
        await all_stored(database_url, ulids)
        await until(lambda: waiting(redis_server) == 0)


async def test_many_rows_that_wait_are_told_once(
    sqlite_url: str, redis_server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    """Each time that they become more than the valve says."""
    async with serving(sqlite_url, redis_server.url, redis_warn_at=3) as here:
        await at_rest(redis_server)
        pending = _pending(redis_server)
        for times in (1, 2):
            with asking(redis_server) as client:  # another worker is to move the rows
                client.set(pending.replace(b":pending", b":lock"), b"another's")
                ulids = await here.save("a", "b", "c")
                assert len(warnings(caplog, "wait in Redis")) == times - 1
                ulids += await here.save("d")
                await until(lambda: len(warnings(caplog, "4 rows wait in Redis")) == times)
                client.delete(pending.replace(b":pending", b":lock"))
            await until(lambda: set(stored(sqlite_url)) >= set(ulids))
            await at_rest(redis_server)
        assert len(warnings(caplog)) == 2


async def test_what_is_cached_goes_by_itself(sqlite_url: str, redis_server: RedisServer) -> None:
    """After the time that the valve says; the database has it for longer."""
    async with serving(sqlite_url, redis_server.url, redis_ttl_s=77) as here:
        await at_rest(redis_server)
        (ulid,) = await here.save("a")
        with asking(redis_server) as client:
            (key,) = client.keys(f"*{ulid}")
            assert 60 < client.ttl(key) <= 77
            client.delete(key)
        await all_stored(sqlite_url, [ulid])
        async with serving(sqlite_url, redis_server.url) as there:
            assert await there.load([ulid]) == (["a"], 0)


async def test_rows_are_moved_when_they_come(sqlite_url: str, redis_server: RedisServer) -> None:
    """Who moves them is told; otherwise each of these would wait for the second to end."""
    async with serving(sqlite_url, redis_server.url) as here:
        await at_rest(redis_server)
        waited_s = 0.0
        for number in range(6):
            waited_s += await all_stored(sqlite_url, [*stored(sqlite_url), *await here.save(f"{number}")])
    assert waited_s < 3


async def test_two_at_once(database_url: str, redis_server: RedisServer) -> None:
    """The lock of the first has run out while it was at work."""
    async with (
        serving(database_url, redis_server.url) as here,
        serving(database_url, redis_server.url) as there,
    ):
        await at_rest(redis_server, 2)
        with held(database_url) as let_go:
            ulids = await here.save("a", "b")
            await until(lambda: locks(redis_server) == 1)
            lose_lock(redis_server)
            ulids += await there.save("c")
            await until(lambda: locks(redis_server) == 1)
            ulids += await here.save("d")
            assert waiting(redis_server) == 4
            let_go()
        await all_stored(database_url, ulids)
        await until(lambda: waiting(redis_server) == 0)


# Redis dies


async def test_rows_survive_redis(
    database_url: str, redis_server: RedisServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is killed, and nothing of it is left: the workers that wrote the rows still have them."""
    async with (
        Worker.started(tmp_path / "worker.log") as worker,
        serving(database_url, redis_server.url) as here,
    ):
        await worker.open(database_url, redis_server.url)
        await at_rest(redis_server, 2)
        with held(database_url) as let_go:
            ulids = [*await here.save("a", "b"), *await worker.save("c")]
            assert waiting(redis_server) == 3
            redis_server.kill()
            let_go()
        assert await all_stored(database_url, ulids) < 5
        ulids += [*await here.save("d"), *await worker.save("e")]
        assert sorted(stored(database_url)) == sorted(ulids), "written at once"
        redis_server.launch()
        await until(lambda: listeners(redis_server) == 2)
        ulids += [*await here.save("f"), *await worker.save("g")]
        assert len(keys(redis_server, f"*{ulids[-1]}")) == 1, "used again"
        await all_stored(database_url, ulids)
        (warning,) = warnings(caplog)
        assert warning.startswith("Redis does not answer")
        assert len(notes(caplog, "Redis is back")) == 1
        assert len(worker.logged("WARNING")) == 1
        assert len([line for line in worker.logged("INFO") if "Redis is back" in line]) == 1
        await at_rest(redis_server, 2)


@side_by_side
async def redis_that_was_away_for_a_moment(place: Place) -> float:
    """Killed and started again at once, with nothing in it, before anybody has noticed."""
    url = place.sqlite("webui")
    with redis_server(place.folder) as server:
        async with serving(url, server.url) as here:
            await at_rest(server)
            with held(url) as let_go:
                ulids = await here.save("a", "b")
                server.kill()
                server.launch()
                let_go()
            return await all_stored(url, ulids, 30)


def test_redis_that_was_away_for_a_moment(outcome: float) -> None:
    """What nobody has confirmed after 20 s is written again."""
    assert outcome < 24


@side_by_side
async def the_bound(place: Place) -> tuple[list[str], int]:
    """Redis and a worker die, both before the row of this worker is in the database."""
    url = place.sqlite("webui")
    with redis_server(place.folder) as server:
        async with Worker.started(place.folder / "worker.log") as worker, serving(url, server.url) as here:
            await worker.open(url, server.url)
            await at_rest(server, 2)
            moved = await worker.save("moved")
            await all_stored(url, moved)
            with held(url) as let_go:
                with worker.paused():
                    mine = await here.save("mine")
                    await until(lambda: locks(server) == 1)  # of this process, which does not see the next
                lost = await worker.save("lost")
                server.kill()
                await worker.kill()
                let_go()
            await until(lambda: set(stored(url)) >= {*moved, *mine}, PATIENCE_S)
            found, unreadable = await here.load([*moved, *lost, *mine])
            return sorted(found), unreadable


def test_the_bound(outcome: tuple[list[str], int]) -> None:
    """Lost is at most what only Redis and the process that wrote it had, when both died."""
    assert set(outcome[0]) >= {"mine", "moved"}


@pytest.mark.parametrize("redis_dies", [False, True])
async def test_rows_reach_a_database_that_was_away(
    redis_dies: bool, sqlite_url: str, redis_server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    """What was acknowledged in the meantime is moved when the database is back, not when somebody chats."""
    async with (
        impatient_engine(sqlite_url) as engine,
        serving(sqlite_url, redis_server.url, engine=engine) as here,
    ):
        await at_rest(redis_server)
        with held(sqlite_url):
            ulids = await here.save("a", "b")
            await until(lambda: notes(caplog, "rows wait in Redis"))
            if redis_dies:
                redis_server.kill()
        await all_stored(sqlite_url, ulids, 4)


@pytest.mark.parametrize("is_closed", [False, True])
async def test_a_bad_row_does_not_cost_others_when_redis_dies(
    is_closed: bool, sqlite_url: str, redis_server: RedisServer
) -> None:
    """Redis took all of them; what the database refuses of them is nothing to the others."""
    refused = "CREATE TRIGGER refused BEFORE INSERT ON {} WHEN NEW.message_id = 'bad' BEGIN {}; END"
    async with serving(sqlite_url, redis_server.url) as here:
        await at_rest(redis_server)
        change(sqlite_url, refused.format(TABLE, "SELECT RAISE(ABORT, 'refused')"))
        with asking(redis_server) as client:  # another worker is to move the rows
            client.set(_pending(redis_server).replace(b":pending", b":lock"), b"another's")
        ulids = await here.save("a")
        await here.save("b", message_id="bad")
        ulids += await here.save("c")
        assert waiting(redis_server) == 3
        redis_server.kill()
        if is_closed:
            await here.store.aclose()
        await all_stored(sqlite_url, ulids, 6)


# Redis hangs, or refuses


async def test_redis_that_hangs(
    simulator: Simulator,
    sqlite_url: str,
    redis_of_host: RedisServer,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It takes connections and bytes and answers nothing: people wait once, for a moment."""
    monkeypatch.setenv("REDIS_URL", redis_of_host.url)
    chat = Chat(simulator)
    async with host_engine(sqlite_url) as engine:
        host_database.use(engine)
        async with running_pipe(simulator.base_url, ENABLE_REDIS_CACHE="on") as pipe:
            await chat.turn(pipe)
            await at_rest(redis_of_host)
        async with running_pipe(simulator.base_url, ENABLE_REDIS_CACHE="on") as pipe:
            turn = await chat.turn(pipe)
            assert (turn.kept, turn.replayed) == ("stored", [1])
            await at_rest(redis_of_host)
            await _hanging(redis_of_host, chat, pipe, caplog)
            await until(lambda: notes(caplog, "Redis is back"))
            cached = set(keys(redis_of_host, "*:user:*"))
            turn = await chat.turn(pipe)
            assert (turn.kept, len(turn.replayed)) == ("stored", chat.count - 1)
            assert set(keys(redis_of_host, "*:user:*")) > cached, "it is used again"
            assert len(notes(caplog, "Redis is back")) == 1
            await at_rest(redis_of_host)
        host_database.reset()


async def _hanging(
    server: RedisServer, chat: Chat, pipe: Pipe, caplog: pytest.LogCaptureFixture
) -> list[Turn]:
    caplog.clear()
    server.pause()
    try:
        turns = [await chat.turn(pipe) for _ in range(4)]
        await asyncio.sleep(2.1)  # until who moves rows has found out too
        turns += [await chat.turn(pipe) for _ in range(2)]
    finally:
        server.resume()
    assert max(turn.first_s for turn in turns) < 1.6
    assert max(turn.end_s for turn in turns) < 2.1
    assert sum(turn.end_s > 0.5 for turn in turns) <= 1
    assert [turn.kept for turn in turns] == ["stored"] * 6
    assert len(turns[-1].replayed) == chat.count - 1
    assert len(warnings(caplog)) == 1
    return turns


async def test_redis_that_hung_for_a_moment(
    sqlite_url: str, redis_server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    """So long that a request gave it up, and no longer: it is used again."""
    async with serving(sqlite_url, redis_server.url) as here:
        await at_rest(redis_server)
        await asyncio.sleep(0.3)  # who moves rows looks each second: not now
        redis_server.pause()
        await here.save("a")
        redis_server.resume()
        assert len(warnings(caplog)) == 1
        await until(lambda: notes(caplog, "Redis is back"), 5)
        ulids = await here.save("b")
        assert len(keys(redis_server, f"*{ulids[0]}")) == 1


async def test_a_store_is_closed_while_redis_hangs(sqlite_url: str, redis_server: RedisServer) -> None:
    async with serving(sqlite_url, redis_server.url) as here:
        await at_rest(redis_server)
        with held(sqlite_url) as let_go:
            ulids = await here.save("a")
            redis_server.pause()
            let_go()
        _, took_s = await timed(here.store.aclose())
        redis_server.resume()
    assert took_s < 6
    assert sorted(stored(sqlite_url)) == ulids


# name of what Redis says -> commands that make it say it
REFUSALS: Final[dict[str, tuple[str, ...]]] = {
    "OutOfMemoryError": ("CONFIG SET maxmemory 1",),
    "ReadOnlyError": ("REPLICAOF 127.0.0.1 1",),
    "NoPermissionError": ("ACL SETUSER default -@write",),
    "ResponseError": ("SET {pending} x",),
    "AuthenticationError": (
        "CONFIG SET requirepass other",
        "CLIENT KILL TYPE normal",
        "CLIENT KILL TYPE pubsub",
    ),
}


async def redis_that_refuses(place: Place) -> list[float]:
    """It is there, and takes nothing; how long each save takes."""
    url = place.sqlite("webui")
    with redis_server(place.folder) as server:
        async with serving(url, server.url) as here:
            await at_rest(server)
            ulids = await here.save("a")
            await at_rest(server)
            pending = _pending(server).decode()
            with asking(server) as client:
                for command in REFUSALS[place.name]:
                    client.execute_command(*command.format(pending=pending).split())
            took: list[float] = []
            for number in range(4):
                saved, took_s = await timed(here.save(f"{number}"))
                took.append(took_s)
                ulids += saved
                assert sorted(stored(url)) == sorted(ulids)
                await asyncio.sleep(1.1)  # longer than it takes to try Redis again
            return took


SLOW.update(dict.fromkeys(REFUSALS, redis_that_refuses))


def _channels(server: RedisServer) -> list[bytes]:
    with asking(server) as client:
        return client.pubsub_channels()


@pytest.mark.parametrize("name", REFUSALS)
def test_redis_that_refuses(name: str, outcomes: Outcomes) -> None:
    """Everything goes to the database, after a second at most."""
    assert max(outcomes.of(name)) < 1.5


@pytest.mark.parametrize("name", REFUSALS)
def test_a_refusal_is_said_once(name: str, outcomes: Outcomes) -> None:
    said = outcomes.log.warnings(name)
    assert len([words for words in said if f"({name})" in words]) == 1


# What others have left in Redis

NO_ROWS: Final = [
    b"",
    b"\xff\xfe",
    b"[]",
    b"5",
    b"null",
    b"[1, 2]",
    b"x" * 100_000,
    b"[" * 100_000,
]


async def test_what_is_no_row_is_removed(
    sqlite_url: str, redis_server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(sqlite_url, redis_server.url) as here:
        await at_rest(redis_server)
        ulids = await _behind(redis_server, here, *NO_ROWS)
        await all_stored(sqlite_url, ulids)
        await at_rest(redis_server)
        assert 1 <= len(warnings(caplog, "are no rows")) == len(warnings(caplog)) <= 2


async def _behind(server: RedisServer, here: Here, *entries: bytes) -> list[str]:
    """Put entries before rows that wait; the ULIDs of these."""
    with asking(server) as client:
        client.rpush(_pending(server), *entries)
    return await here.save("a", "b")


def _pending(server: RedisServer) -> bytes:
    """The list of rows that wait."""
    (channel,) = _channels(server)
    return channel.replace(b":news", b":pending")


def _row(**changes: Any) -> bytes:
    """An entry that is a row, at first sight."""
    row: Json = dict.fromkeys(("ulid", "chat_id", "message_id", "user_id", "model", "kind", "codec"), "x")
    row |= {"key_id": "", "raw_bytes": 1, "created_at": 0.0, "last_used_at": 0.0}
    return json.dumps([*(row | changes).values()]).encode() + b"\nx"


@pytest.mark.parametrize(
    "entry",
    [
        pytest.param(_row(user_id=None), id="null"),
        pytest.param(_row(model={"a": []}), id="object"),
        pytest.param(_row(raw_bytes=2**63), id="large number"),
        pytest.param(b'"eleven char"', id="text"),
    ],
)
async def test_a_row_that_the_database_refuses(
    entry: bytes, database_url: str, redis_server: RedisServer
) -> None:
    """Nothing that was acknowledged stays behind it."""
    async with serving(database_url, redis_server.url) as here:
        await at_rest(redis_server)
        ulids = await _behind(redis_server, here, entry)
        await all_stored(database_url, ulids, 2)


async def test_news_that_are_none(sqlite_url: str, redis_server: RedisServer) -> None:
    async with serving(sqlite_url, redis_server.url) as here:
        await at_rest(redis_server)
        (channel,) = _channels(redis_server)
        with asking(redis_server) as client:
            for news in (*NO_ROWS, b'{"ab": 1}', b'[["a"]]', b"[[[], {}]]", b"[5]"):
                client.publish(channel, news)
        await all_stored(sqlite_url, await here.save("a", "b"))
        await at_rest(redis_server)


DAMAGED_CACHE: Final[dict[str, Callable[[bytes], bytes]]] = {
    "no row": lambda _: b"garbage",
    "nothing": lambda _: b"",
    "a row of somebody else": lambda content: content.replace(b'"user"', b'"other"'),
    "a flipped bit": lambda content: content[:-1] + bytes([content[-1] ^ 1]),
    "a row of lists": lambda content: content.replace(b'"json"', b"[[]]"),
}


@pytest.mark.parametrize("damage", DAMAGED_CACHE)
async def test_a_damaged_cache(damage: str, sqlite_url: str, redis_server: RedisServer) -> None:
    """The database has it."""
    async with (
        serving(sqlite_url, redis_server.url) as here,
        serving(sqlite_url, redis_server.url) as there,
    ):
        await at_rest(redis_server, 2)
        ulids = await here.save("a")
        await at_rest(redis_server, 2)
        with asking(redis_server) as client:
            (key,) = client.keys(f"*{ulids[0]}")
            client.set(key, DAMAGED_CACHE[damage](client.get(key)))
        assert await there.load(ulids) == (["a"], 0)


# Redis and the database together


@contextlib.asynccontextmanager
async def without_wal(url: str, timeout_s: float = 0.1) -> AsyncIterator[AsyncEngine]:
    """The engine of a host where who writes keeps readers out, who wait for so long."""
    engine = create_async_engine(url, connect_args={"timeout": timeout_s})
    try:
        yield engine
    finally:
        await engine.dispose()


@pytest.mark.parametrize("is_cached", [True, False], ids=["in the cache", "waiting"])
async def test_rows_in_redis_are_read_while_the_database_is_away(
    is_cached: bool, sqlite_url: str, redis_server: RedisServer
) -> None:
    async with (
        without_wal(sqlite_url) as engine,
        serving(sqlite_url, redis_server.url, engine=engine) as here,
        serving(sqlite_url, redis_server.url, engine=engine) as there,
    ):
        await opened(here)
        await opened(there)
        await at_rest(redis_server, 2)
        with held(sqlite_url, from_readers=True):
            ulids = await here.save("a")
            with asking(redis_server) as client:
                if not is_cached:
                    client.delete(*client.keys(f"*{ulids[0]}"))
            await there.load(["0" * 26])  # which only the database could have
            assert (await there.load(ulids))[0] == ["a"]


async def test_the_rest_is_given_back(sqlite_url: str, redis_server: RedisServer) -> None:
    async with (
        without_wal(sqlite_url) as engine,
        serving(sqlite_url, redis_server.url, engine=engine) as here,
        serving(sqlite_url, redis_server.url, engine=engine) as there,
    ):
        await opened(here)
        await opened(there)
        await at_rest(redis_server, 2)
        with held(sqlite_url, from_readers=True):
            ulids = await here.save("a")
            assert await there.load([*ulids, "0" * 26]) == (["a"], 1)


async def test_neither_is_there(sqlite_url: str, redis_server: RedisServer) -> None:
    """Said at once, so that the record rides with the message."""
    async with (
        impatient_engine(sqlite_url) as engine,
        serving(sqlite_url, redis_server.url, engine=engine) as here,
    ):
        await at_rest(redis_server)
        with held(sqlite_url):
            redis_server.kill()
            for _ in range(3):
                result, took_s = await timed(here.save("a"))
                assert isinstance(result, StorageError)
                assert took_s < NOTICED_S


# Databases, looked at more closely


async def test_reading_goes_on_where_only_writing_fails(sqlite_url: str) -> None:
    """A full disk, a replica: what is there can be read."""
    async with (
        impatient_engine(sqlite_url) as engine,
        serving(sqlite_url, engine=engine) as here,
        serving(sqlite_url, engine=engine) as there,
    ):
        ulids = await here.save("a")
        await there.load(["0" * 26])
        with held(sqlite_url):
            assert isinstance((await timed(there.save("b")))[0], StorageError)
            assert await there.load(ulids) == (["a"], 0)


async def test_a_host_that_begins_transactions_itself(sqlite_url: str) -> None:
    """With the option `autocommit` of later Pythons, or an event: what was acknowledged is stored."""

    def begin(connection: Any, *_given: object) -> None:
        connection.cursor().execute("BEGIN")

    async with host_engine(sqlite_url) as engine, serving(sqlite_url, engine=engine) as here:
        await opened(here)
        event.listen(engine.sync_engine, "checkout", begin)
        ulids = await here.save("a")
        assert stored(sqlite_url) == ulids


@pytest.mark.parametrize("is_open", [False, True])
async def test_the_first_question_after_an_outage(is_open: bool, sqlite_url: str) -> None:
    """The database is well again, perhaps for hours: the model has its thinking."""
    before = asyncio.all_tasks()
    async with (
        without_wal(sqlite_url) as engine,
        serving(sqlite_url, engine=engine) as here,
        contextlib.AsyncExitStack() as ends,
    ):
        ulids = await here.save("a")
        with contextlib.ExitStack() as lock:
            if not is_open:
                lock.enter_context(held(sqlite_url, from_readers=True))
            there = await ends.enter_async_context(serving(sqlite_url, engine=engine))
            if is_open:
                await opened(there)
                lock.enter_context(held(sqlite_url, from_readers=True))
            assert await there.load(ulids) == ([], 1)
        await _nothing_runs(before, 2)  # but the two that clean up
        assert await there.load(ulids) == (["a"], 0)


async def _nothing_runs(before: set[asyncio.Task[Any]], but: int) -> None:
    def running() -> int:
        return len([t for t in asyncio.all_tasks() - before if t.get_name().startswith("artifacts of")])

    await until(lambda: running() == but)


async def test_a_bad_row_takes_no_others_with_it(database_url: str, caplog: pytest.LogCaptureFixture) -> None:
    async with serving(database_url) as here:
        ulids = await here.save("a")
        saving = (here.save("b"), here.save("c", model="\ud800"), here.save("d"))
        first, bad, second = await asyncio.gather(*saving, return_exceptions=True)
        assert isinstance(bad, StorageError)
        assert isinstance(first, list)
        assert isinstance(second, list)
        assert sorted(stored(database_url)) == sorted([*ulids, *first, *second])
        assert warnings(caplog) == [], "the database is well"


async def test_a_host_without_the_module(
    simulator: Simulator, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Of a database; the chat goes on as before there were artifacts."""
    monkeypatch.delattr("open_webui.internal.db.async_engine")
    async with running_pipe(simulator.base_url) as pipe:
        chat = Chat(simulator)
        turns = [await chat.turn(pipe) for _ in range(4)]
    assert [turn.kept for turn in turns] == ["inline"] * 4
    assert turns[-1].replayed == [1, 2, 3]
    assert max(turn.end_s for turn in turns) < NOTICED_S
    assert len(warnings(caplog)) == 1


# Another process has the file for 10 s

LOCKED_S: Final = 10.0


async def _until_it_saves(here: Here | Worker) -> float:
    started = time.monotonic()
    while not isinstance((await timed(here.save("later")))[0], list):
        assert time.monotonic() - started < PATIENCE_S
        await asyncio.sleep(0.1)
    return time.monotonic() - started


@side_by_side
async def locked_while_it_opens(place: Place) -> tuple[list[float], float]:
    """(how long saves took, how long after the lock one worked)."""
    url = place.sqlite("webui")
    change(url, "PRAGMA journal_mode=WAL", "CREATE TABLE somebodys (id)")
    async with contextlib.AsyncExitStack() as lock, host_engine(url) as engine:
        await lock.enter_async_context(locking(url))
        async with serving(url, engine=engine) as here:
            took = await _saves(here)
            await lock.aclose()
            return took, await _until_it_saves(here)


async def _saves(here: Here) -> list[float]:
    """How long saves take that fail, for as long as the file is locked."""
    took: list[float] = []
    started = time.monotonic()
    while time.monotonic() - started < LOCKED_S:
        result, took_s = await timed(here.save("a"))
        assert isinstance(result, StorageError)
        took.append(took_s)
        await asyncio.sleep(0.2)
    return took


@side_by_side
async def locked_while_it_saves(place: Place) -> tuple[list[float], float]:
    """The same."""
    url = place.sqlite("webui")
    async with contextlib.AsyncExitStack() as lock, serving(url) as here:
        await opened(here)
        await lock.enter_async_context(locking(url))
        took = await _saves(here)
        await lock.aclose()
        return took, await _until_it_saves(here)


LOCKED: Final = ["locked_while_it_opens", "locked_while_it_saves"]


@pytest.mark.parametrize("name", LOCKED)
def test_locked_for_long(name: str, outcomes: Outcomes) -> None:
    took, again_s = outcomes.of(name)
    assert max(took) < 3.6
    assert again_s < 6


@pytest.mark.parametrize("name", LOCKED)
def test_locked_for_long_is_waited_for_once(name: str, outcomes: Outcomes) -> None:
    took, _ = outcomes.of(name)
    assert sum(took_s > NOTICED_S for took_s in took) == 1


@side_by_side
async def locked_while_it_loads(place: Place) -> tuple[list[float], tuple[list[str], int]]:
    """(how long loads took that failed, what was found when the lock was gone)."""
    url = place.sqlite("webui")
    engine = create_async_engine(url)  # without WAL; SQLite waits for 5 s
    async with contextlib.AsyncExitStack() as lock, serving(url, engine=engine) as here:
        async with serving(url, engine=engine) as there:
            await opened(here)
            ulids = await here.save("a")
            await opened(there)
            await lock.enter_async_context(locking(url))
            PHASE.set((place.name, "locked"))
            took: list[float] = []
            started = time.monotonic()
            while time.monotonic() - started < LOCKED_S:
                result, took_s = await timed(there.load(ulids))
                assert result == ([], 1)
                took.append(took_s)
                await asyncio.sleep(0.2)
            await lock.aclose()
            while (found := await there.load(ulids)) != (["a"], 0):
                assert time.monotonic() - started < LOCKED_S + 6
                await asyncio.sleep(0.1)
    await engine.dispose()
    return took, found


def test_locked_while_it_loads(
    outcome: tuple[list[float], tuple[list[str], int]], outcomes: Outcomes
) -> None:
    took, found = outcome
    assert max(took) < 3.6
    assert sum(took_s > NOTICED_S for took_s in took) == 1
    assert found == (["a"], 0)
    assert len(outcomes.log.warnings("locked_while_it_loads", "locked")) == 1


@side_by_side
async def locked_while_it_prunes(place: Place) -> tuple[float, tuple[list[str], int], int]:
    """(how long it took to fail, what was read meanwhile, how many rows went when the lock was gone)."""
    url = place.sqlite("webui")
    async with contextlib.AsyncExitStack() as lock, serving(url) as here:
        await opened(here)
        ulids = await here.save(*"abc")
        days_later = time.time() + 92 * 86400
        async with serving(url, now=lambda: days_later) as there:
            await opened(there)
            await lock.enter_async_context(locking(url))
            result, took_s = await timed(there.store.prune())
            assert isinstance(result, StorageError)
            async with serving(url) as third:
                found = await third.load(ulids)
            await lock.aclose()
            return took_s, found, await there.store.prune()


def test_locked_while_it_prunes(outcome: tuple[float, tuple[list[str], int], int]) -> None:
    took_s, (found, unreadable), deleted = outcome
    assert took_s < 7
    assert (sorted(found), unreadable) == (["a", "b", "c"], 0)
    assert deleted == 3


@side_by_side
async def no_file_may_grow(place: Place) -> list[Any]:
    """The limit of a process (RLIMIT_FSIZE), as a quota has it."""
    url = place.sqlite("webui")
    async with Worker.started(place.folder / "worker.log") as worker:
        await worker.open(url)
        ulids = await worker.save("a")
        await worker.do("limit", bytes=os.path.getsize(path_of(url) + "-wal"))
        noise = random.Random(1).randbytes(100_000).hex()
        answers: list[Any] = [(await timed(worker.save(noise)))[0] for _ in range(3)]
        answers.append(await worker.load(ulids))
        await worker.do("limit", bytes=-1)
        await _until_it_saves(worker)
        await worker.end()
        assert worker.logged("Traceback") == []
        return answers


def test_no_file_may_grow(outcome: list[Any]) -> None:
    """What is there can be read, and when there is place again more is kept."""
    *saved, found = outcome
    assert [type(answer) for answer in saved] == [StorageError] * 3
    assert found == (["a"], 0)


# Damaged rows

BOMB: Final = b"[" + b" " * 100_000_000 + b"]"
# what is done to the row: SQL for SQLite, and whether it can still be read
DAMAGES: Final[dict[str, str]] = {
    "flipped bit": "payload = CAST(substr(payload, 1, 20) || x'00' || substr(payload, 22) AS BLOB)",
    "cut off": "payload = CAST(substr(payload, 1, 20) AS BLOB)",
    "shorter than a nonce": "payload = x'0102'",
    "empty": "payload = x''",
    "other size": "raw_bytes = raw_bytes + 1",
    "no size": "raw_bytes = 0",
    "less than nothing": "raw_bytes = -1",
    "huge": "raw_bytes = 9223372036854775807",
    "unknown codec": "codec = 'brotli'",
    "no codec": "codec = ''",
    "codec lies": "codec = CASE codec WHEN 'lz4' THEN 'zlib' ELSE 'lz4' END",
    "not compressed, it says": "codec = 'json'",
    "not sealed, it says": "key_id = ''",
    "other key": "key_id = 'ffffffff'",
    "payload is a text": "payload = 'text'",
    "payload is a number": "payload = 5",
    "size is a text": "raw_bytes = 'many'",
    "codec is a number": "codec = 5",
    "time is a text": "last_used_at = 'yesterday'",
}


@pytest.mark.parametrize("damage", DAMAGES)
async def test_a_damaged_row(damage: str, sqlite_url: str, caplog: pytest.LogCaptureFixture) -> None:
    """It is counted, the others are read, and the log has it once."""
    async with serving(sqlite_url) as here:
        ulids = [*await here.save("a" * 1000), *await here.save("good")]
    change(sqlite_url, f"UPDATE {TABLE} SET {DAMAGES[damage]} WHERE ulid = '{ulids[0]}'")
    async with serving(sqlite_url) as there:
        unreadable = 0
        for _ in range(3):
            found, unreadable = await there.load(ulids)
            assert found[-1] == "good"
            assert len(found) + unreadable == 2
        assert len(warnings(caplog)) == unreadable


@pytest.mark.parametrize("size", [1000, 0, -1, 2**40])
@pytest.mark.parametrize("codec", ["zlib", "lz4"])
async def test_a_row_that_is_a_bomb(
    codec: str, size: int, sqlite_url: str, request: pytest.FixtureRequest
) -> None:
    """No more is unpacked than a row may hold, whatever it says of itself."""
    bomb = zlib.compress(BOMB, 9) if codec == "zlib" else lz4.frame.compress(BOMB)
    async with serving(sqlite_url) as here:
        ulids = await here.save("a" * 1000)
    with contextlib.closing(sqlite3.connect(path_of(sqlite_url))) as connection, connection:
        values = f"codec = '{codec}', raw_bytes = {size}, key_id = '', payload = ?"
        connection.execute(f"UPDATE {TABLE} SET {values}", (bomb,))
    async with serving(sqlite_url) as there:
        tracemalloc.start()
        found, _ = await there.load(ulids)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 60_000_000
        assert found == []


async def test_damage_that_no_seal_shows(sqlite_url: str) -> None:
    """Where nothing is sealed (ENCRYPT_ARTIFACTS off)."""
    plain: Json = {"sealed_kinds": frozenset()}
    async with serving(sqlite_url, **plain) as here:
        ulids = await here.save("a")
    change(sqlite_url, f"UPDATE {TABLE} SET payload = CAST('?' || substr(payload, 2) AS BLOB)")
    async with serving(sqlite_url, **plain) as there:
        assert await there.load(ulids) == ([], 1)


async def test_another_key(sqlite_url: str, caplog: pytest.LogCaptureFixture) -> None:
    """Only what it has sealed is lost; the older one opens it again."""
    async with serving(sqlite_url) as here:
        ulids = await here.save("a", "b")
    async with serving(sqlite_url, cipher=ArtifactCipher("another", PIPE)) as there:
        ulids += await there.save("c")
        for _ in range(3):
            assert await there.load(ulids) == (["c"], 2)
        assert len(warnings(caplog)) == 1
    async with serving(sqlite_url, cipher=ArtifactCipher("another", PIPE, (SECRET,))) as there:
        assert sorted((await there.load(ulids))[0]) == ["a", "b", "c"]


@pytest.mark.parametrize("kept", ["stored", "inline"])
async def test_another_secret_of_the_server(
    kept: str, simulator: Simulator, sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The chat goes on, and the person is told once."""
    valves: Json = {"ENABLE_ARTIFACT_STORE": kept == "stored"}
    chat = Chat(simulator)
    async with host_engine(sqlite_url) as engine:
        host_database.use(engine)
        async with running_pipe(simulator.base_url, **valves) as pipe:
            assert (await chat.turn(pipe)).kept == kept
        monkeypatch.setenv("WEBUI_SECRET_KEY", "another secret")
        async with running_pipe(simulator.base_url, **valves) as pipe:
            turns = [await chat.turn(pipe) for _ in range(3)]
        host_database.reset()
    assert [turn.replayed for turn in turns] == [[], [2], [2, 3]]
    assert [turn.told for turn in turns] == [[NOT_READ], [], []]


# Clocks


async def test_clocks_that_jump(database_url: str) -> None:
    """Backwards and forwards: everything is found, and nothing is deleted that was used lately."""
    now = time.time()
    clock = now
    async with serving(database_url, now=lambda: clock) as here:
        ulids: list[str] = []
        for jump in (0, -10 * 365 * 86400, -now, -now - 86400, 80 * 86400, -5, 0):
            clock = now + jump
            ulids += await here.save(f"{jump}")
            async with serving(database_url, now=lambda: clock) as there:
                assert len((await there.load(ulids))[0]) == len(ulids)
        clock = 0.0
        assert await here.store.prune() == 0
        assert len(set(ulids)) == 7


# Stop, and the end


@pytest.mark.parametrize("is_open", [False, True])
async def test_stop_while_the_database_hangs(is_open: bool, simulator: Simulator, sqlite_url: str) -> None:
    """Whoever presses Stop does not wait for it; the chat goes on afterwards."""
    chat, other = Chat(simulator), Chat(simulator)
    async with without_wal(sqlite_url, 5) as engine:
        host_database.use(engine)
        async with running_pipe(simulator.base_url) as pipe:
            assert (await chat.turn(pipe)).kept == "stored"
        async with running_pipe(simulator.base_url) as pipe:
            if is_open:
                assert (await other.turn(pipe)).kept == "stored"
            with held(sqlite_url, from_readers=True):
                await _stopped(pipe, chat.question(), "")  # it loads
                simulator.reset()  # its answer was not asked for
                await _stopped(pipe, Chat(simulator).question(), "Answer 1.")  # it saves
            assert (await chat.turn(pipe)).replayed == [1]
        host_database.reset()


async def _stopped(pipe: Pipe, given: Json, text: str) -> None:
    """Stop an answer that waits, when so much of it was read."""
    chunks: Any = await pipe.pipe(**given)
    answer = Answer()

    async def read() -> None:
        async for chunk in chunks:
            answer.add(chunk)

    reading = asyncio.create_task(read())
    await until(lambda: answer.text == text)
    await asyncio.wait((reading,), timeout=0.3)
    assert not reading.done(), "it waits"
    assert answer.text == text
    started = time.monotonic()
    reading.cancel()
    await asyncio.wait((reading,))
    await chunks.aclose()
    assert time.monotonic() - started < 0.5


async def test_closed_twice(database_url: str) -> None:
    async with serving(database_url) as here:
        saved = await here.save("a")
        await asyncio.gather(here.store.aclose(), here.store.aclose())
        await here.store.aclose()
        assert isinstance((await timed(here.save("b")))[0], StorageError)
        assert await here.load(saved) == (["a"], 0), "what it remembers it still has"
        assert stored(database_url) == saved


@pytest.mark.parametrize("is_open", [True, False])
async def test_closed_while_something_is_saved(is_open: bool, sqlite_url: str) -> None:
    """It is stored, or the caller is told that it is not; nobody who was not stopped is stopped."""
    change(sqlite_url, "PRAGMA journal_mode=WAL", "CREATE TABLE somebodys (id)")
    async with host_engine(sqlite_url) as engine, contextlib.AsyncExitStack() as ends:
        let_go: Callable[[], Any] = bool
        if not is_open:
            let_go = ends.enter_context(held(sqlite_url))
        here = await ends.enter_async_context(serving(sqlite_url, engine=engine))
        ulids: list[str] = []
        if is_open:
            ulids += await here.save("a")
            let_go = ends.enter_context(held(sqlite_url))
        saving = asyncio.create_task(timed(here.save("b")))
        await asyncio.wait((saving,), timeout=0.2)
        closing = asyncio.create_task(timed(here.store.aclose()))
        await asyncio.wait((saving,), timeout=6)
        let_go()
        assert (await closing)[1] < 11
        assert not saving.cancelled()
        saved, _ = saving.result()
        ulids += saved if isinstance(saved, list) else []
        assert set(stored(sqlite_url)) >= set(ulids)


# One load of the file after the other


async def test_closed_at_any_step(sqlite_url: str, redis_server: RedisServer) -> None:
    """Nothing runs any more of stores that have just saved something."""
    async with host_engine(sqlite_url) as engine:
        for number in range(100):
            before = asyncio.all_tasks()
            async with serving(sqlite_url, redis_server.url, engine=engine) as here:
                await here.save("to open it")
                await at_rest(redis_server)
                await here.save("a")
                for _ in range(number):
                    await asyncio.sleep(0)  # so far that it is closed at another step each time
                closing = asyncio.create_task(here.store.aclose())
                await asyncio.wait((closing,), timeout=0.3)
                in_time = closing.done()
                for task in asyncio.all_tasks() - before - {closing}:
                    task.cancel()  # again, where once was not enough
                await closing
                assert in_time
            with asking(redis_server) as client:
                client.flushall()


async def test_fifty_loads_of_the_function(
    simulator: Simulator, database: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each retires the one before: no task, thread or connection is left of them."""
    tasks, threads = asyncio.all_tasks(), threading.active_count()
    pipe, chat = Pipe(), Chat(simulator)
    for number in range(50):
        chat = chat if number % 10 else Chat(simulator)
        pipe = Pipe()
        set_valves(pipe, simulator.base_url)
        turn = await chat.turn(pipe)
        assert (turn.kept, len(turn.replayed)) == ("stored", number % 10)
    await pipe.aclose()
    await all_ended(tasks)
    pool: Any = database.pool
    assert pool.checkedout() == 0
    assert pool.checkedin() <= 5
    await database.dispose()
    loop: Any = asyncio.get_running_loop()
    await loop.shutdown_default_executor()
    await until(lambda: threading.active_count() <= threads)


async def test_stores_leave_no_connections(sqlite_url: str, redis_server: RedisServer) -> None:
    """The host keeps its client of Redis, whatever becomes of its functions."""
    clients = HostRedis()
    async with host_engine(sqlite_url) as engine:
        ulids: list[str] = []
        for _ in range(10):
            async with serving(sqlite_url, redis_server.url, engine=engine, clients=clients) as here:
                ulids += await here.save("a")
                await at_rest(redis_server)
        with asking(redis_server) as client:
            assert len(client.client_list()) <= 5
        assert sorted(stored(sqlite_url)) == sorted(ulids)
    await clients.aclose()


@side_by_side
async def a_process_that_closes_nothing(place: Place) -> tuple[int, str]:
    """(its end, what it said)."""
    url, log = place.sqlite("webui"), place.folder / "log"
    with redis_server(place.folder) as server:
        with log.open("wb") as out:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "tests.artifact_worker", url, server.url),
                cwd=ROOT,
                stdout=asyncio.subprocess.PIPE,
                stderr=out,
            )
        told, _ = await process.communicate()
        async with serving(url, server.url) as here:
            await until(lambda: told.decode().strip() in stored(url))
            await at_rest(server)
            assert await here.load([told.decode().strip()]) == (["left"], 0)
        return await process.wait(), log.read_text()


def test_a_process_that_closes_nothing(outcome: tuple[int, str]) -> None:
    """As hosts end: without a word, and what it has acknowledged is moved by others."""
    assert outcome == (0, "")


def test_a_loop_that_ends(sqlite_url: str, tmp_path: Path) -> None:
    """The function is still there when there is another one."""
    pipe = Pipe()

    async def turn(chat: Chat, base_url: str) -> Turn:
        set_valves(pipe, base_url)
        async with host_engine(sqlite_url) as engine:
            host_database.use(engine)
            return await chat.turn(pipe)

    async def both() -> None:
        chat = Chat(simulator)
        assert (await turn(chat, simulator.base_url)).kept == "stored"
        other = threading.Thread(target=asyncio.run, args=(again(chat),))
        other.start()
        await asyncio.to_thread(other.join)

    async def again(chat: Chat) -> None:
        turns.append(await turn(chat, simulator.base_url))

    turns: list[Turn] = []
    simulator = Simulator()

    async def run() -> None:
        async with simulator:
            await both()

    asyncio.run(run())
    gc.collect()
    host_database.reset()
    assert [turn.replayed for turn in turns] == [[1]]


# Threads


@pytest.mark.parametrize("what", ["save", "load"])
async def test_the_threads_of_the_host_are_busy(what: str, sqlite_url: str) -> None:
    """Nobody waits for them for ever."""
    async with serving(sqlite_url) as here, serving(sqlite_url) as there:
        ulids = await here.save(random.Random(2).randbytes(50_000).hex())
        loop, free = asyncio.get_running_loop(), threading.Event()
        with ThreadPoolExecutor(1) as threads:
            loop.set_default_executor(threads)
            busy = asyncio.create_task(asyncio.to_thread(free.wait))
            work = there.save("b" * 100_000) if what == "save" else there.load(ulids)
            working = asyncio.create_task(timed(work))
            done, _ = await asyncio.wait((working,), timeout=4)
            free.set()
            await asyncio.wait((busy, working))
        assert done


# All of it


async def _chaos(place: Place, *, kills_redis: bool) -> int:
    """Save from three workers while things fail, and lose nothing acknowledged; returns how much."""
    url, dice = place.sqlite("webui"), random.Random(7)
    acknowledged: list[str] = []
    async with contextlib.AsyncExitStack() as ends:
        server = ends.enter_context(redis_server(place.folder))
        logs = [place.folder / f"{number}.log" for number in range(2 if kills_redis else 4)]
        workers = await asyncio.gather(*(ends.enter_async_context(Worker.started(log)) for log in logs))
        here = await ends.enter_async_context(serving(url, server.url))
        for worker in workers:
            await worker.open(url, server.url)
        await at_rest(server, 1 + len(workers))
        for number in range(12):
            async with held_soon(url) if dice.random() < 0.6 else contextlib.nullcontext():
                for saver in (here, *workers):
                    acknowledged += await _saved(saver)
                if kills_redis and number % 3 == 0:
                    server.kill()
                elif not kills_redis and number % 4 == 3 and len(workers) > 1:
                    await workers.pop().kill()
            await asyncio.sleep(dice.random() * 0.2)
            if kills_redis and not server.running:
                acknowledged += await _saved(here)
                server.launch()
        await until(lambda: set(stored(url)) >= set(acknowledged), 40)
        assert len(stored(url)) == len(set(stored(url)))
    return len(acknowledged)


async def _saved(saver: Here | Worker) -> list[str]:
    """What is acknowledged, if anything is."""
    result, _ = await timed(saver.save(*"abc"))
    return result if isinstance(result, list) else []


@side_by_side
async def redis_dies_again_and_again(place: Place) -> int:
    """While the workers live."""
    return await _chaos(place, kills_redis=True)


@side_by_side
async def workers_die_again_and_again(place: Place) -> int:
    """While Redis lives."""
    return await _chaos(place, kills_redis=False)


def test_redis_dies_again_and_again(outcome: int) -> None:
    assert outcome > 100


def test_workers_die_again_and_again(outcome: int) -> None:
    assert outcome > 100
