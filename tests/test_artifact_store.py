"""What models need back is kept: the same in every world, which is SQLite or PostgreSQL, with Redis before
it or not, with LZ4 or without.

A `World` is one database with as many workers on it as a test wants; it looks at the tables from outside.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import fcntl
import itertools
import json
import logging
import os
import random
import re
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Final, TypeVar, cast

import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from sqlalchemy import event
from sqlalchemy.engine import make_url
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from openrouter_responses_pipe.openrouter_responses_pipe import (
    _MAX_ARTIFACT_BYTES,
    ArtifactCipher,
    ArtifactPayload,
    ArtifactRow,
    ArtifactSettings,
    ArtifactStore,
    ArtifactTable,
    ChatRequest,
    Database,
    EncryptedStr,
    HostEnvironment,
    IntakePlan,
    LoadedArtifacts,
    OpenWebUIHost,
    StorageError,
    TurnMemory,
    Valves,
    _artifact_settings,
    _json_dumps,
    _new_ulid,
    _packed,
    _readable,
    _unpacked,
)
from pytest_bootstrap import Chat, host_database, host_functions, host_redis
from tests.bench.ticker import Ticker
from tests.engines import RedisServer, connected, host_engine
from tests.recorded import Clock
from tests.support import PATIENCE_S

T = TypeVar("T")
PIPE: Final = "openrouter"
TABLE: Final = "pipe_openrouter_artifacts"
VERSIONS: Final = "pipe_openrouter_versions"
COLUMNS: Final = ", ".join(ArtifactRow._fields)
ROOT: Final = Path(__file__).parents[1]
NOON: Final = 1_750_000_000.0  # some time of day
DAY: Final = 86_400.0
KEY: Final = ArtifactCipher("the secret of this server", PIPE)
NOBODY: Final = "0" * 26  # an id that nothing has
ULID: Final = re.compile(r"[0-7][0-9A-HJKMNP-TV-Z]{25}")


async def until(found: Callable[[], T], patience_s: float = PATIENCE_S) -> T:
    """What `found` gives, as soon as that is something."""
    async with asyncio.timeout(patience_s):
        while True:  # nobody tells when a database changes
            if result := found():
                return result
            await asyncio.sleep(0.01)


def entry(data: Any, user: str = "ada", chat: str = "chat", **more: Any) -> ArtifactPayload:
    """Something to keep."""
    return ArtifactPayload(data, "turn", user, chat, "message", "a/mind")._replace(**more)


def settings_of(secret: str = "the secret of this server", **valves: Any) -> ArtifactSettings:
    """What valves mean for artifacts, on a server with this secret."""
    return _artifact_settings(Valves(**valves), HostEnvironment(secret), PIPE)


class World:
    """A database that several workers share, and what they say to it."""

    def __init__(self, url: str, engine: AsyncEngine, settings: ArtifactSettings) -> None:
        self.url = url
        self.settings = settings
        self.statements: list[str] = []  # of PostgreSQL one for each row, with COMMIT between transactions
        self._workers: list[ArtifactStore] = []
        if url.startswith("sqlite"):
            event.listen(engine.sync_engine, "connect", self._trace)
        else:
            event.listen(engine.sync_engine, "before_cursor_execute", self._note)
            event.listen(engine.sync_engine, "commit", lambda _: self.statements.append("COMMIT"))

    def _trace(self, connection: Any, _record: object) -> None:
        connection.run_async(lambda driver: driver.set_trace_callback(self.statements.append))

    def _note(self, _conn: Any, _cursor: Any, statement: str, rows: Any, _context: Any, many: bool) -> None:
        self.statements.extend([statement] * (len(rows) if many else 1))

    def begun(self, pipe_id: str = PIPE, **more: Any) -> ArtifactStore:
        """A store of another worker, which is about to be opened; `more` are clocks and other settings."""
        clocks = {name: more.pop(name) for name in ("clock", "now") if name in more}
        store = ArtifactStore(OpenWebUIHost(), pipe_id, **clocks)
        self._workers.append(store)
        store.open(self.settings._replace(**more))
        return store

    async def worker(self, pipe_id: str = PIPE, **more: Any) -> ArtifactStore:
        """A store of another worker, open."""
        settings = {name: value for name, value in more.items() if name not in ("clock", "now")}
        store = self.begun(pipe_id, **more)
        async with asyncio.timeout(PATIENCE_S):
            while (await store.load([NOBODY], "nobody", "nowhere")).unreadable:
                await asyncio.sleep(0.01)
                store.open(self.settings._replace(**settings))
        return store

    async def aclose(self, *stores: ArtifactStore) -> None:
        """Close these stores, or all."""
        closing: set[asyncio.Task[Any]] = {
            asyncio.create_task(store.aclose()) for store in stores or self._workers
        }
        async with asyncio.timeout(2 * PATIENCE_S):
            while closing:
                await asyncio.wait(closing, timeout=0.05)
                # Python 3.11 can lose a cancellation (asyncio.wait_for), as the client of Redis uses it.
                lost = {task for task in asyncio.all_tasks() if task.cancelling()}
                lost.discard(cast("asyncio.Task[Any]", asyncio.current_task()))
                for task in lost:
                    task.cancel()
                closing = {task for task in closing | lost if not task.done()}

    def run(self, statement: str, *values: Any) -> list[tuple[Any, ...]]:
        """What the database says when somebody else asks it; each `?` is a value.

        Not for what may have to wait for a worker: those are all in this thread.
        """
        if self.url.startswith("sqlite"):
            path = make_url(self.url).database or ""
            with contextlib.closing(sqlite3.connect(path, timeout=PATIENCE_S)) as file, file:
                return file.execute(statement, values).fetchall()
        with connected(self.url) as connection:
            cursor = connection.execute(statement.replace("?", "%s").encode(), values or None)
            return cursor.fetchall() if cursor.description else []

    async def change(self, statement: str, *values: Any) -> None:
        """Change what is in the database, as soon as nobody is in the way."""
        await asyncio.to_thread(self.run, statement, *values)

    def rows(self, table: str = TABLE) -> list[ArtifactRow]:
        """The rows of a pipe, oldest first."""
        found = self.run(f"SELECT {COLUMNS} FROM {table} ORDER BY created_at, ulid, chat_id")
        return [ArtifactRow(*row) for row in found]

    async def written(self, *ulids: str, patience_s: float = PATIENCE_S) -> list[ArtifactRow]:
        """The rows with these ids, as soon as all are in the table."""

        def there() -> list[ArtifactRow]:
            found = [row for row in self.rows() if row.ulid in ulids]
            return found if {row.ulid for row in found} == set(ulids) else []

        return await until(there, patience_s)

    async def drop(self) -> None:
        """Take the table away under everybody."""
        await self.change(f"DROP TABLE {TABLE}")

    async def refuse(self, column: str, value: str) -> None:
        """From now on the database takes no artifact that has this there."""
        if self.url.startswith("sqlite"):
            await self.change(
                f"CREATE TRIGGER refused BEFORE INSERT ON {TABLE} WHEN NEW.{column} = '{value}' "
                "BEGIN SELECT RAISE(ABORT, 'refused'); END"
            )
        else:
            check = f"CHECK ({column} <> '{value}') NOT VALID"  # what is there may stay
            await self.change(f"ALTER TABLE {TABLE} ADD CONSTRAINT refused {check}")

    async def allow(self) -> None:
        """Take back what `refuse` has said."""
        is_sqlite = self.url.startswith("sqlite")
        await self.change(
            "DROP TRIGGER refused" if is_sqlite else f"ALTER TABLE {TABLE} DROP CONSTRAINT refused"
        )

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep everybody else from writing into the file (SQLite)."""
        with contextlib.closing(sqlite3.connect(make_url(self.url).database or "")) as file:
            file.execute("BEGIN IMMEDIATE")
            yield
            file.rollback()

    def asked(self) -> list[str]:
        """The statements so far that read artifacts."""
        return [each for each in self.statements if each.startswith("SELECT") and TABLE in each]

    def batches(self) -> list[int]:
        """How many artifacts were written in each transaction so far that has written any."""
        if self.url.startswith("sqlite"):  # one statement each
            written = [each for each in self.statements if "INSERT" in each and TABLE in each]
            return [each.count("), (") + 1 for each in written]
        sizes = [0]
        for statement in self.statements:
            if statement == "COMMIT":
                sizes.append(0)
            sizes[-1] += statement.startswith("INSERT") and TABLE in statement
        return [size for size in sizes if size]


@pytest.fixture(params=["sql", "redis"])
def cache(request: pytest.FixtureRequest) -> RedisServer | None:
    """What rows go through: nothing, or a Redis of the host's."""
    return request.getfixturevalue("redis_server") if request.param == "redis" else None


@pytest.fixture(params=["lz4", "zlib"])
def codec(request: pytest.FixtureRequest) -> str:
    """What rows are compressed with."""
    return request.param


@pytest.fixture
async def world(
    database_url: str, cache: RedisServer | None, codec: str, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[World]:
    """One of the eight worlds, empty."""
    settings = ArtifactSettings(KEY, uses_lz4=codec == "lz4", uses_redis=cache is not None, cleanup_s=1e9)
    if cache is not None:
        monkeypatch.setattr("open_webui.env.REDIS_URL", cache.url)
    async with host_engine(database_url) as engine:
        host_database.use(engine)
        made = World(database_url, engine, settings)
        yield made
        await made.aclose()
        await host_redis.aclose()
        host_database.reset()


def only(**params: str) -> pytest.MarkDecorator:
    """Only the worlds that are like this; of the others nothing more can be learned."""
    return pytest.mark.parametrize(list(params), [tuple(params.values())], indirect=True)


DIRECT: Final = only(cache="sql", codec="lz4")  # what matters is the database
FILE: Final = only(database_url="sqlite", cache="sql", codec="lz4")
SERVER: Final = only(database_url="postgresql", cache="sql", codec="lz4")
CACHED: Final = only(cache="redis", codec="lz4")


# What is put in comes out

VALUES: Final[dict[str, Any]] = {
    "empty list": [],
    "empty object": {},
    "empty text": "",
    "false": False,
    "zero": 0,
    "numbers": [0, -1, 2**63 - 1, -(2**63), 2**64 - 1, 0.1, 1e308, 5e-324, -0.5],
    "record": [
        {"reasoning": {"type": "reasoning", "id": "rs_1", "encrypted_content": "gAAA=="}},
        {"call": "a"},
    ],
    "beyond ASCII": {"größe": "é 漢 👩‍👩‍👧 \u2028 \u0000 \x7f \ufeff", "": "\r\n\t\\\"'"},
    "half a key": {"%s ? :ulid {} $1": "'; DROP TABLE chat; --"},
    "nested": [[[[[{"a": [{"b": [[]]}]}]]]]],
    "many": [{"call": str(number)} for number in range(5_000)],
    "just compressed": "x" * 300,
    "hardly compressible": base64.b85encode(random.Random(1).randbytes(3_000)).decode(),
    "1 MB of words": "Thought and thought again. " * 40_000,
    "1 MB of noise": base64.b85encode(random.Random(2).randbytes(800_000)).decode(),
}


async def test_what_is_put_in_comes_out_of_another_worker(world: World) -> None:
    one, other = await world.worker(), await world.worker()
    ulids = await one.save([entry(value) for value in VALUES.values()])
    assert all(map(ULID.fullmatch, ulids))
    assert len(set(ulids)) == len(VALUES)
    for store in (other, one):
        loaded = await store.load(ulids, "ada", "chat")
        found = {name: loaded.found[ulid] for name, ulid in zip(VALUES, ulids, strict=True)}
        assert found == VALUES
        assert loaded.unreadable == 0
    rows = await world.written(*ulids)
    assert len(rows) == len(VALUES)
    (newest,) = [row for row in rows if row.ulid == ulids[-1]]
    assert (newest.user_id, newest.chat_id, newest.kind) == ("ada", "chat", "turn")
    assert (newest.message_id, newest.model) == ("message", "a/mind")
    assert abs(newest.created_at - time.time()) < 3_600
    assert newest.last_used_at == newest.created_at


@FILE
async def test_nothing_is_something(world: World) -> None:
    """As every other value of JSON."""
    store = await world.worker()
    (ulid,) = await store.save([entry(None)])
    assert await store.load([ulid], "ada", "chat") == LoadedArtifacts({ulid: None})


async def test_half_of_a_pair_is_the_same_for_everybody(world: World) -> None:
    """No database takes it: it becomes what it also becomes on its way to a provider."""
    one, other = await world.worker(), await world.worker()
    (ulid,) = await one.save([entry(["a\ud83d", "\ud83d\ude00", {"\udc80": 1}])])
    for store in (one, other):
        assert (await store.load([ulid], "ada", "chat")).found == {ulid: ["a\ufffd", "😀", {"\ufffd": 1}]}


async def test_the_database_has_it_in_the_end(world: World) -> None:
    """Whatever it went through, who comes later finds it in the database alone."""
    one = await world.worker()
    ulids = [ulid for number in range(5) for ulid in await one.save([entry({"turn": number})])]
    await world.written(*ulids)
    later = await world.worker(uses_redis=False)
    loaded = await later.load(ulids, "ada", "chat")
    assert [loaded.found[ulid] for ulid in ulids] == [{"turn": number} for number in range(5)]


async def test_a_store_that_is_closed_has_written_everything(world: World) -> None:
    one = await world.worker()
    saves = [asyncio.create_task(one.save([entry(number)])) for number in range(30)]
    ulids = [ulid for saved in await asyncio.gather(*saves) for ulid in saved]
    await world.aclose(one)
    assert {row.ulid for row in world.rows()} == set(ulids)
    await world.aclose(one)
    with pytest.raises(StorageError):
        await one.save([entry(1)])


async def test_what_is_loaded_belongs_to_who_has_asked(world: World) -> None:
    """Nobody changes what others get by changing what they got, or what they gave."""
    store, given_data = await world.worker(), [{"call": "a"}]
    (ulid,) = await store.save([entry(given_data)])
    given_data[0]["call"] = "changed"
    for _ in range(2):
        (found,) = (await store.load([ulid], "ada", "chat")).found.values()
        assert found == [{"call": "a"}]
        found[0]["call"] = "changed"


async def test_asked_for_twice(world: World) -> None:
    one, other = await world.worker(), await world.worker()
    (ulid,) = await one.save([entry("x")])
    loaded = await other.load([ulid, NOBODY, ulid, NOBODY], "ada", "chat")
    assert loaded == LoadedArtifacts({ulid: "x"}, 0)


@only(codec="lz4")
async def test_no_ids_are_no_question(world: World) -> None:
    store = await world.worker()
    before = len(world.asked())
    assert await store.load([], "ada", "chat") == LoadedArtifacts()
    assert len(world.asked()) == before


@SERVER
async def test_no_payloads_are_no_rows(world: World) -> None:
    store = await world.worker()
    assert await store.save([]) == []
    assert world.rows() == []


@DIRECT
async def test_what_is_saved_is_there(world: World) -> None:
    """For everybody who looks, from the moment on that `save` has returned."""
    store = await world.worker()
    for number in range(5):
        ulids = await store.save([entry(number)])
        assert [row.ulid for row in world.rows()][-1:] == ulids


async def test_many_workers_at_once(world: World) -> None:
    """Saving and loading, each what all others have; nothing gets lost, nothing is there twice."""
    workers = [await world.worker() for _ in range(4)]
    saves = [
        store.save([entry([number, n]), entry("x")])
        for n in range(10)
        for number, store in enumerate(workers)
    ]
    ulids = [ulid for saved in await asyncio.gather(*saves) for ulid in saved]
    loads = [store.load(ulids, "ada", "chat") for store in workers for _ in range(3)]
    assert [len(loaded.found) for loaded in await asyncio.gather(*loads)] == [80] * 12
    assert len(await world.written(*ulids)) == 80


@DIRECT
async def test_other_settings_count_from_then_on(world: World) -> None:
    """An administrator changes a valve while the server runs."""
    store = await world.worker()
    (first,) = await store.save([entry("x" * 1_000)])
    store.open(world.settings._replace(sealed_kinds=frozenset(), uses_lz4=False))
    (second,) = await store.save([entry("x" * 1_000)])
    rows = {row.ulid: row for row in world.rows()}
    assert (rows[first].codec, bool(rows[first].key_id)) == ("lz4", True)
    assert (rows[second].codec, bool(rows[second].key_id)) == ("zlib", False)
    assert len((await store.load([first, second], "ada", "chat")).found) == 2


@DIRECT
async def test_the_largest_that_is_kept(world: World) -> None:
    one, other = await world.worker(), await world.worker()
    text = "x" * (_MAX_ARTIFACT_BYTES - 2)  # with its quotes it is of the greatest size
    (ulid,) = await one.save([entry(text)])
    loaded = await other.load([ulid], "ada", "chat")
    assert loaded.found[ulid] == text
    for payloads in ([entry(text + "x")], [entry("a"), entry(text + "x"), entry("b")]):
        with pytest.raises(StorageError, match="16"):
            await one.save(payloads)
    assert [row.ulid for row in world.rows()] == [ulid], "a save that fails leaves nothing"
    assert len(await one.save([entry("a")])) == 1


DEEP: Final = 3_000


@FILE
async def test_what_is_nested_too_deeply_is_refused(world: World) -> None:
    store, deep = await world.worker(), []
    for _ in range(DEEP):
        deep = [deep]
    with pytest.raises(StorageError):
        await store.save([entry(deep)])


async def test_a_store_that_nobody_has_opened() -> None:
    store = ArtifactStore(OpenWebUIHost(), PIPE)
    with pytest.raises(StorageError):
        await store.save([entry("x")])
    assert await store.load([NOBODY], "ada", "chat") == LoadedArtifacts()
    assert await store.prune() == 0
    await store.aclose()


async def test_a_host_without_a_database(caplog: pytest.LogCaptureFixture) -> None:
    """Nothing is kept, nothing breaks, and the log has it once."""
    store = ArtifactStore(OpenWebUIHost(), PIPE)
    for _ in range(3):
        store.open(ArtifactSettings(KEY))
        with pytest.raises(StorageError):
            await store.save([entry("x")])
        assert await store.load([NOBODY], "ada", "chat") == LoadedArtifacts({}, 1)
    assert await store.prune() == 0
    await store.aclose()
    assert [record.levelname for record in caplog.records] == ["WARNING"]


# Whose it is


async def test_what_is_of_somebody_else_is_not_there(world: World) -> None:
    """Whatever the chat, and whether a worker has it at hand or not."""
    one, other = await world.worker(), await world.worker()
    theirs = await one.save([entry("secret"), entry("secret too")])
    (own,) = await one.save([entry("mine", "bob", "chat of bob")])
    for store, chat in itertools.product((one, other), ("chat", "chat of bob")):
        for user in ("bob", "", "ADA", "ada ", "%", "a_a", "ada' OR '1'='1"):
            assert await store.load(theirs, user, chat) == LoadedArtifacts()
        assert await store.load([*theirs, own], "bob", chat) == LoadedArtifacts({own: "mine"}, 0)
    await world.written(own, *theirs)
    await world.aclose(one, other)
    rows = {(row.ulid, row.user_id, row.chat_id) for row in world.rows()}
    assert {row for row in rows if row[1] == "ada"} == {(ulid, "ada", "chat") for ulid in theirs}
    assert {user for _, user, _ in rows} == {"ada", "bob"}


# ids of people and of chats, as no server gives them out
ODD: Final = (
    "a",
    "A",
    "a:b",
    "{a}",
    "é",
    "e\u0301",
    "'",
    '"',
    "%",
    "_",
    "?",
    "a b",
    " a",
    "a\n",
    "x" * 300,
    "👩‍👩‍👧",
)


@only(codec="lz4")
async def test_people_and_chats_with_odd_ids(world: World) -> None:
    one, other = await world.worker(), await world.worker()
    saves = [one.save([entry([user, chat], user, chat)]) for user, chat in zip(ODD, ODD[::-1], strict=True)]
    ulids = [ulid for saved in await asyncio.gather(*saves) for ulid in saved]
    for ulid, user, chat in zip(ulids, ODD, ODD[::-1], strict=True):
        assert await other.load(ulids, user, chat) == LoadedArtifacts({ulid: [user, chat]})


async def test_a_fork_has_rows_of_its_own(world: World) -> None:
    """A copy of a chat goes on when the chat is deleted with its rows."""
    one, other = await world.worker(), await world.worker()
    ulids = await one.save([entry("a"), entry("b"), entry("c")])
    forked = ulids[:2]
    assert (await other.load(forked, "ada", "fork")).found == dict(zip(forked, "ab", strict=True))
    await until(lambda: len(world.rows()) == 5)
    before = {(row.ulid, row.chat_id): row for row in world.rows()}
    for ulid in forked:
        first, second = before[ulid, "chat"], before[ulid, "fork"]
        assert second.created_at >= first.created_at
        fields = {"chat_id": "chat", "created_at": first.created_at, "last_used_at": first.last_used_at}
        assert second._replace(**fields) == first
    await world.change(f"DELETE FROM {TABLE} WHERE chat_id = 'chat'")
    later = await world.worker(uses_redis=False)
    assert (await later.load(ulids, "ada", "fork")).found == dict(zip(forked, "ab", strict=True))
    loads = [store.load(ulids, "ada", "fork of the fork") for store in (later, later, await world.worker())]
    for loaded in await asyncio.gather(*loads):
        assert loaded.found.keys() >= set(forked)
    await until(lambda: len([row for row in world.rows() if row.chat_id == "fork of the fork"]) >= 2)


async def test_a_fork_of_somebody_else_gets_nothing(world: World) -> None:
    """A shared chat that another person clones: their clone has text alone, and no rows."""
    one, other = await world.worker(), await world.worker()
    ulids = await one.save([entry("a"), entry("b")])
    await world.written(*ulids)
    assert await other.load(ulids, "bob", "clone") == LoadedArtifacts()
    await world.aclose(other)
    assert {(row.user_id, row.chat_id) for row in world.rows()} == {("ada", "chat")}


@DIRECT
async def test_a_chat_that_is_not_kept_gets_no_rows(world: World) -> None:
    """What is known is given back; it does not become something of the chat's."""
    one, other = await world.worker(), await world.worker()
    (ulid,) = await one.save([entry("a")])
    for chat in ("temporary:1", "local:1", "channel:1", ""):
        assert (await other.load([ulid], "ada", chat)).found == {ulid: "a"}
    await world.aclose(other)
    assert [row.chat_id for row in world.rows()] == ["chat"]


@DIRECT
async def test_a_copy_for_a_fork_that_failed_is_made_later(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    """A database that cannot write for a moment must not cost the fork its rows."""
    one, other = await world.worker(), await world.worker()
    (ulid,) = await one.save([entry("a")])
    await world.refuse("chat_id", "fork")
    assert (await other.load([ulid], "ada", "fork")).found == {ulid: "a"}
    await until(lambda: caplog.records)
    await world.allow()
    other.open(world.settings)
    assert (await other.load([ulid], "ada", "fork")).found == {ulid: "a"}
    await world.aclose(other)
    assert {row.chat_id for row in world.rows()} == {"chat", "fork"}


# How often the database is asked


@only(codec="lz4")
async def test_a_history_is_one_question(world: World) -> None:
    """However many ids there are; and none when they are at hand."""
    count = 300
    one, other = await world.worker(), await world.worker(uses_redis=False)
    ulids = await one.save([entry(number) for number in range(count)])
    await world.written(*ulids)
    before = len(world.asked())
    assert len((await other.load(ulids, "ada", "chat")).found) == count
    assert len(world.asked()) == before + 1
    assert len((await other.load(ulids, "ada", "chat")).found) == count
    assert len((await one.load(ulids, "ada", "chat")).found) == count
    assert len(world.asked()) == before + 1


@CACHED
async def test_what_another_has_just_written_is_no_question(world: World) -> None:
    """Redis has it, whether it is in the database already or not."""
    one, other = await world.worker(), await world.worker()
    ulids = await one.save([entry(number) for number in range(5)])
    before = len(world.asked())
    assert len((await other.load(ulids, "ada", "chat")).found) == 5
    assert len(world.asked()) == before


@DIRECT
async def test_ids_that_are_not_there_cost_one_question_more(world: World) -> None:
    """They may be of another chat; how many they are does not count."""
    one, other = await world.worker(), await world.worker()
    ulids = await one.save([entry(number) for number in range(50)])
    unknown = [_new_ulid(NOON) for _ in range(50)]
    before = len(world.asked())
    assert len((await other.load([*ulids, *unknown], "ada", "chat")).found) == 50
    assert len(world.asked()) <= before + 2
    before = len(world.asked())
    assert len((await other.load([*ulids, *unknown], "ada", "fork")).found) == 50
    assert len(world.asked()) <= before + 2


@DIRECT
async def test_a_history_longer_than_any(world: World) -> None:
    """The newest of it come, in one question."""
    one, other = await world.worker(), await world.worker()
    ulids = await one.save([entry(number) for number in range(10)])
    unknown = [_new_ulid(NOON) for _ in range(40_000)]
    assert len((await other.load([*ulids, *unknown], "ada", "chat")).found) == 10


# Batches


@pytest.mark.parametrize("batch", [1, 10])
@only(codec="lz4")
async def test_saves_that_come_together_are_written_together(world: World, batch: int) -> None:
    """In batches of the size that the valve says, and no larger."""
    store = await world.worker(batch=batch)
    saves = [store.save([entry(number, chat=f"chat {number}")]) for number in range(25)]
    ulids = [ulid for saved in await asyncio.gather(*saves) for ulid in saved]
    await world.written(*ulids)
    await world.aclose(store)
    sizes = world.batches()
    assert max(sizes) <= batch
    assert sum(sizes) >= 25
    assert len(sizes) <= 25 // batch + 3, "they were not gathered"


@DIRECT
async def test_many_payloads_at_once_are_written_in_batches_too(world: World) -> None:
    store = await world.worker(batch=10)
    ulids = await store.save([entry(number) for number in range(25)])
    await world.written(*ulids)
    assert max(world.batches()) <= 10


def texts_no_database_takes(world: World) -> list[str]:
    """What the driver refuses, or the server."""
    return ["\udc80", "\udc80"] if world.url.startswith("sqlite") else ["\udc80", "nul \x00 nul"]


@DIRECT
async def test_a_row_that_cannot_be_written_takes_no_others_with_it(world: World) -> None:
    """Wherever it stands among those of other chats."""
    store = await world.worker()
    bad = texts_no_database_takes(world)
    ids = [*(["fine"] * 2), bad[0], *(["fine"] * 3), bad[1], *(["fine"] * 2)]
    saves = [store.save([entry(number, message_id=text)]) for number, text in enumerate(ids)]
    results = await asyncio.gather(*saves, return_exceptions=True)
    assert [isinstance(result, list) for result in results] == [text == "fine" for text in ids]
    saved = [result[0] for result in results if isinstance(result, list)]
    assert {row.ulid for row in world.rows()} == set(saved)


@DIRECT
async def test_a_row_that_cannot_be_written_does_not_close_the_store(world: World) -> None:
    """The next answer of another chat is kept."""
    store = await world.worker()
    with pytest.raises(StorageError):
        await store.save([entry("bad", message_id=texts_no_database_takes(world)[1])])
    store.open(world.settings)
    (ulid,) = await store.save([entry("good")])
    assert [row.ulid for row in world.rows()] == [ulid]


@SERVER
async def test_a_question_that_is_refused_does_not_close_the_store(world: World) -> None:
    """The id of a chat comes from a browser, or a program."""
    one, other = await world.worker(), await world.worker()
    (ulid,) = await one.save([entry("x")])
    assert (await other.load([ulid], "bob", "nul \x00 nul")).found == {}
    assert (await other.load([ulid], "ada", "chat")).found == {ulid: "x"}


@FILE
async def test_a_failure_that_nobody_thought_of_is_told_at_once(world: World) -> None:
    """To those whose row it was; the others' rows are kept."""
    store = await world.worker()
    huge: Any = 2**70  # SQLite's driver raises an OverflowError
    saves = [store.save([entry(number, message_id=huge if number == 1 else "fine")]) for number in range(3)]
    async with asyncio.timeout(2.0):
        results = await asyncio.gather(*saves, return_exceptions=True)
    assert [type(result) for result in results] == [list, StorageError, list]


@only(database_url="sqlite", cache="redis", codec="lz4")
async def test_a_row_that_cannot_be_written_does_not_hold_up_others_in_redis(world: World) -> None:
    """One chat must not keep the rows of all others out of the database."""
    store = await world.worker()
    await world.written(*await store.save([entry("first")]))
    await world.refuse("message_id", "bad")
    ids = ["bad" if number == 4 else "fine" for number in range(25)]
    saves = [store.save([entry(number, message_id=text)]) for number, text in enumerate(ids)]
    ulids = [saved[0] for saved in await asyncio.gather(*saves)]
    await world.written(*ulids[:4], *ulids[5:], patience_s=5.0)


@only(database_url="sqlite", cache="redis", codec="lz4")
async def test_many_rows_that_cannot_be_written_do_not_hold_up_others_in_redis(world: World) -> None:
    """Also where a batch has no other rows."""
    store = await world.worker(batch=2)
    await world.written(*await store.save([entry("first")]))
    await world.refuse("message_id", "bad")
    for number in range(5):
        await store.save([entry(number, message_id="bad")])
    await world.written(*await store.save([entry("last")]), patience_s=5.0)


@SERVER
async def test_what_the_database_says_gives_nobody_away(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    """The log of a server is read by people who may not read chats."""
    store = await world.worker()
    await world.refuse("user_id", "ada@example.org")
    with pytest.raises(StorageError) as caught:
        await store.save([entry("x", "ada@example.org")])
    for said in (str(caught.value), caplog.text):
        assert "refused" in said
        assert "ada@example.org" not in said


# What is at hand


async def test_what_was_just_used_is_there_while_the_table_is_away(world: World) -> None:
    one, other = await world.worker(), await world.worker()
    ulids = await one.save([entry(number) for number in range(3)])
    await world.written(*ulids)
    await other.load(ulids[:2], "ada", "chat")
    await world.drop()
    assert (await one.load(ulids, "ada", "chat")) == LoadedArtifacts(dict(zip(ulids, range(3), strict=True)))
    assert (await one.load([*ulids, NOBODY], "ada", "chat")).found.keys() == set(ulids)
    assert (await other.load(ulids[:2], "ada", "chat")).found.keys() == set(ulids[:2])
    for store in (one, other):
        assert (await store.load(ulids, "bob", "chat")).found == {}


@DIRECT
async def test_what_is_at_hand_is_of_one_chat(world: World) -> None:
    """Else a fork would never get rows of its own."""
    one = await world.worker()
    ulids = await one.save([entry(number) for number in range(3)])
    await world.drop()
    assert await one.load(ulids, "ada", "fork") == LoadedArtifacts({}, 3)
    one.open(world.settings)
    assert (await one.load(ulids, "ada", "chat")).found.keys() == set(ulids)


@DIRECT
async def test_what_is_at_hand_is_bounded(world: World) -> None:
    """What was not used for longest goes first."""
    store, large = await world.worker(sealed_kinds=frozenset()), "x" * 7_000_000
    first, second = await store.save([entry(large), entry(large)])
    (tiny,) = await store.save([entry("tiny")])
    assert (await store.load([first], "ada", "chat")).found.keys() == {first}
    (third,) = await store.save([entry(large)])
    await world.drop()
    loaded = await store.load([first, second, tiny, third], "ada", "chat")
    assert loaded.found.keys() == {first, tiny, third}
    assert loaded.unreadable == 1


@DIRECT
async def test_a_table_that_was_dropped_is_there_again_with_the_next_request(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    store = await world.worker()
    await store.save([entry("before")])
    await world.drop()
    with pytest.raises(StorageError):
        await store.save([entry("lost")])
    assert [record.levelname for record in caplog.records] == ["WARNING"]

    ulids: list[str] = []
    async with asyncio.timeout(PATIENCE_S):
        while not ulids:
            store.open(world.settings)
            with contextlib.suppress(StorageError):
                ulids = await store.save([entry("after")])
            await asyncio.sleep(0.01)
    assert [row.ulid for row in world.rows()] == ulids
    assert [record.levelname for record in caplog.records if record.levelname != "INFO"] == ["WARNING"]


@CACHED
async def test_what_redis_has_is_there_while_the_table_is_away(world: World) -> None:
    """Redis took it, and has it: a worker whose database fails can still have it from there."""
    one, other = await world.worker(), await world.worker()
    await world.drop()
    await world.change(f"CREATE VIEW {TABLE} AS SELECT 1 AS one")  # and cannot be made anew
    assert (await other.load([NOBODY], "ada", "chat")).unreadable == 1
    (ulid,) = await one.save([entry("x")])
    other.open(world.settings)
    assert (await other.load([ulid], "ada", "chat")).found == {ulid: "x"}


# What rides with messages instead


async def test_nobody_waits_for_the_long_chat_of_another() -> None:
    """With the store off, and in channels, all thinking of a chat comes with each request."""
    words, noise = "the secret of this server", random.Random(5).randbytes
    cipher = settings_of(words).cipher
    records = [_json_dumps([{"reasoning": {"id": noise(20_000).hex()}}]) for _ in range(500)]
    plan = IntakePlan(tuple(cipher.seal(record, "ada") for record in records))
    memory = TurnMemory(ArtifactStore(OpenWebUIHost(), PIPE), HostEnvironment(words), PIPE)
    request = ChatRequest({}, "browser", "a/mind", chat_id="chat", user_id="ada")
    started = time.perf_counter()
    async with Ticker() as ticker:
        intake, _ = await memory.recall(
            plan, request, Valves.model_validate({"ENABLE_ARTIFACT_STORE": False})
        )
    assert len(intake.records) == len(records)
    assert ticker.worst_s < (time.perf_counter() - started) / 2


# How a row is made


def text_of(size: int) -> str:
    """A text that is so many bytes as JSON and can be compressed."""
    return "x" * (size - 2)


@only(cache="sql")
@pytest.mark.parametrize("least", [0, 256, 1_000])
async def test_what_is_compressed(world: World, codec: str, least: int) -> None:
    """From the given size on, where it makes it smaller; the row says what was done."""
    noise = base64.b85encode(random.Random(3).randbytes(2_000)).decode()
    data = ["", text_of(255), text_of(256), text_of(999), text_of(1_000), "Thought. " * 5_000, noise]
    one, other = await world.worker(least_compressed=least), await world.worker(uses_lz4=codec != "lz4")
    ulids = await one.save([entry(each) for each in data])
    loaded = await other.load(ulids, "ada", "chat")
    assert [loaded.found[ulid] for ulid in ulids] == data
    rows = {row.ulid: row for row in world.rows()}
    for ulid, each in zip(ulids, data, strict=True):
        row, raw = rows[ulid], len(each) + 2
        seal = 28 if row.key_id else 0  # a nonce and a tag
        assert row.raw_bytes == raw
        assert row.codec in ("json", codec if raw >= least else "json")
        assert (len(row.payload) - seal < raw) == (row.codec != "json")
        assert (row.codec != "json") == (raw >= least) or each in ("", noise)
    assert all(row.key_id for row in rows.values())


# what is sealed, by the valve
SEALED: Final[dict[str, set[str]]] = {
    "off": set(),
    "reasoning": {"turn"},
    "all": {"turn", "tool_output", "server_tool", "summary"},
}
KINDS: Final = ("turn", "tool_output", "server_tool", "summary")


@pytest.mark.parametrize("choice", SEALED)
@only(cache="sql")
async def test_what_is_sealed(world: World, choice: str) -> None:
    """By its kind; nothing can be read in what is."""
    kinds = settings_of(ENCRYPT_ARTIFACTS=choice).sealed_kinds
    one, other = await world.worker(sealed_kinds=kinds), await world.worker()
    words = "my secret thought"
    ulids = await one.save([entry(words, kind=kind) for kind in KINDS])
    loaded = await other.load(ulids, "ada", "chat")
    assert [loaded.found[ulid] for ulid in ulids] == [words] * len(KINDS)
    for row in world.rows():
        assert bool(row.key_id) == (row.kind in SEALED[choice])
        assert (words.encode() in row.payload) == (row.kind not in SEALED[choice])
        assert row.codec == "json"
    assert {row.kind for row in world.rows()} == set(KINDS)


@DIRECT
async def test_a_server_without_a_secret_seals_nothing(world: World) -> None:
    bare = ArtifactCipher("", PIPE)
    one, other = await world.worker(cipher=bare), await world.worker()
    (ulid,) = await one.save([entry("x")])
    assert (await other.load([ulid], "ada", "chat")).found == {ulid: "x"}
    assert [row.key_id for row in world.rows()] == [""]


# Keys


def with_keys(keys: str, secret: str = "the secret of this server") -> ArtifactSettings:
    return settings_of(ARTIFACT_ENCRYPTION_KEY=keys, secret=secret)


@DIRECT
async def test_keys_that_are_rotated(world: World) -> None:
    """The first seals; those behind it, and the server's secret, still open."""
    ulids = []
    ciphers = [with_keys(keys).cipher for keys in ("", "old", "new, old", "newest,new,old")]
    for number, cipher in enumerate(ciphers):
        store = await world.worker(cipher=cipher)
        ulids += await store.save([entry(number)])
        later = await world.worker(cipher=cipher)
        loaded = await later.load(ulids, "ada", "chat")
        assert loaded == LoadedArtifacts(dict(zip(ulids, range(number + 1), strict=True)))
    assert len({row.key_id for row in world.rows()}) == len(ciphers)


@DIRECT
async def test_a_key_that_is_gone_loses_only_what_it_has_sealed(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    """It is counted each time, and the log has it once, with what tells the keys apart."""
    old = await world.worker(cipher=with_keys("old", "").cipher)
    lost = await old.save([entry("a"), entry("b")])
    (plain,) = await old.save([entry("not sealed", kind="summary")])
    new = await world.worker(cipher=with_keys("new", "").cipher)
    (kept,) = await new.save([entry("c")])
    ulids = [*lost, plain, kept]
    for _ in range(3):
        loaded = await new.load(ulids, "ada", "chat")
        assert loaded == LoadedArtifacts({plain: "not sealed", kept: "c"}, 2)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    ids = {row.ulid: row.key_id for row in world.rows()}
    assert ids[lost[0]] in record.getMessage()
    assert len(world.rows()) == 4
    back = await world.worker(cipher=with_keys("new,old", "").cipher)
    assert len((await back.load(ulids, "ada", "chat")).found) == 4


# Rows that somebody has changed


async def swap(world: World, column: str, first: str, second: str) -> None:
    """Exchange what two rows have there."""
    values = {
        ulid: world.run(f"SELECT {column} FROM {TABLE} WHERE ulid = ?", ulid)[0] for ulid in (first, second)
    }
    marks = ", ".join(f"{name} = ?" for name in column.split(", "))
    if column == "ulid":
        steps = [("x", first), (first, second), (second, "x")]
    else:
        steps = [(*values[second], first), (*values[first], second)]
    for step in steps:
        await world.change(f"UPDATE {TABLE} SET {marks} WHERE ulid = ?", *step)


@DIRECT
async def test_rows_that_were_swapped_cannot_be_read(world: World) -> None:
    """They are never taken for each other, whatever was swapped with what is in them."""
    one, other = await world.worker(), await world.worker()
    swapped, kept = [], await one.save([entry("kept")])
    columns = ("payload", "ulid", "payload, codec, raw_bytes", "payload, key_id")
    for column, more in itertools.product(columns, ("", "x" * 1_000)):
        pair = await one.save([entry(letter + more) for letter in "ab"])
        await swap(world, column, *pair)
        swapped += pair
    assert len(world.rows()) == 17
    assert await other.load([*swapped, *kept], "ada", "chat") == LoadedArtifacts({kept[0]: "kept"}, 16)


@DIRECT
async def test_a_row_that_was_given_to_somebody_else_cannot_be_read(world: World) -> None:
    one, other = await world.worker(), await world.worker()
    (ulid,) = await one.save([entry("a")])
    await world.change(f"UPDATE {TABLE} SET user_id = 'bob'")
    assert await other.load([ulid], "bob", "chat") == LoadedArtifacts({}, 1)
    assert await other.load([ulid], "ada", "chat") == LoadedArtifacts()


@DIRECT
async def test_a_row_of_another_pipe_cannot_be_read(world: World) -> None:
    """Put into its table, it was still sealed by another key."""
    one = await world.worker("theirs", cipher=ArtifactCipher("the secret of this server", "theirs"))
    other = await world.worker()
    (ulid,) = await one.save([entry("a")])
    assert await other.load([ulid], "ada", "chat") == LoadedArtifacts()
    await world.change(f"INSERT INTO {TABLE} SELECT * FROM pipe_theirs_artifacts")
    assert await other.load([ulid], "ada", "chat") == LoadedArtifacts({}, 1)


# what has become of a row: the columns that were set
DAMAGE: Final[dict[str, dict[str, Any]]] = {
    "payload of nothing": {"payload": b""},
    "payload of noise": {"payload": random.Random(4).randbytes(500)},
    "payload cut to the nonce": {"payload": b"123456789012"},
    "no key": {"key_id": ""},
    "another key": {"key_id": "00000000"},
    "codec that is none": {"codec": "brotli"},
    "no codec": {"codec": ""},
    "another codec": {"codec": "json"},
    "compressed in another way": {"codec": "zlib"},
    "negative size": {"raw_bytes": -1},
    "very negative size": {"raw_bytes": -(2**31)},
    "larger": {"raw_bytes": 2_000},
    "2 GB": {"raw_bytes": 2**31 - 1},
}


@only(cache="sql")
async def test_damaged_rows_are_counted_and_nothing_else(world: World, codec: str) -> None:
    one, other = await world.worker(), await world.worker()
    *bad, good = await one.save([*[entry("x" * 1_000)] * len(DAMAGE), entry("good")])
    for ulid, (case, changes) in zip(bad, DAMAGE.items(), strict=True):
        changes = {"codec": "lz4"} if (case, codec) == ("compressed in another way", "zlib") else changes
        marks = ", ".join(f"{name} = ?" for name in changes)
        await world.change(f"UPDATE {TABLE} SET {marks} WHERE ulid = ?", *changes.values(), ulid)
    for ulid, case in zip(bad, DAMAGE, strict=True):
        assert await other.load([ulid], "ada", "chat") == LoadedArtifacts({}, 1), case
    assert await other.load([*bad, good], "ada", "chat") == LoadedArtifacts({good: "good"}, len(bad))
    await other.save([entry("and it goes on")])


@only(database_url="sqlite", cache="sql")
async def test_a_row_that_says_less_than_it_holds_is_counted(world: World) -> None:
    one, other = await world.worker(), await world.worker()
    (ulid,) = await one.save([entry("x" * 1_000)])
    for size in (0, 1, 5, 1_001):
        await world.change(f"UPDATE {TABLE} SET raw_bytes = ?", size)
        assert await other.load([ulid], "ada", "chat") == LoadedArtifacts({}, 1)


# what SQLite keeps in any column, whatever was declared
ODD_VALUES: Final[dict[str, dict[str, Any]]] = {
    "payload of text": {"payload": "x"},
    "payload of a number": {"payload": 5},
    "size of text": {"raw_bytes": "x"},
    "size of a broken number": {"raw_bytes": 1.5},
    "size beyond all memory": {"raw_bytes": 2**50},
    "time of text": {"last_used_at": "x"},
}


@pytest.mark.parametrize("case", ODD_VALUES)
@FILE
async def test_a_damaged_file_spoils_one_row(world: World, case: str) -> None:
    """Whatever fails, the rest is given back, and the chat goes on."""
    one, other = await world.worker(), await world.worker()
    bad, good = await one.save([entry("x" * 1_000), entry("good")])
    ((name, value),) = ODD_VALUES[case].items()
    await world.change(f"UPDATE {TABLE} SET {name} = ? WHERE ulid = ?", value, bad)
    loaded = await other.load([bad, good], "ada", "chat")
    assert loaded.found[good] == "good"


@DIRECT
async def test_what_is_not_sealed_and_damaged_is_counted(world: World) -> None:
    one, other = await world.worker(sealed_kinds=frozenset()), await world.worker()
    bad, good = await one.save([entry("thought"), entry("good")])
    await world.change(f"UPDATE {TABLE} SET payload = ? WHERE ulid = ?", b"[[[[[[[[[", bad)
    assert await other.load([bad, good], "ada", "chat") == LoadedArtifacts({good: "good"}, 1)


# The table

# ids of functions that are no names of tables as they stand
ODD_IDS: Final = (
    "UpperCase",
    "uppercase",
    "with.dots",
    "with-dots",
    "with dots",
    "größe_漢",
    "1",
    "",
    "x" * 40,
    "x" * 41,
    "x" * 255,
    "x" * 254 + "y",
    "a%s?:b",
    "quote\"'`;--",
    "select",
    "_",
    "__",
)


@DIRECT
async def test_each_function_has_a_table_of_its_own(world: World) -> None:
    """Whatever its id, on a database that has those of all others too."""
    saved = {}
    for pipe_id in ODD_IDS:
        store = await world.worker(pipe_id)
        (saved[pipe_id],) = await store.save([entry(pipe_id)])
    for pipe_id, ulid in saved.items():
        later = await world.worker(pipe_id)
        assert await later.load(list(saved.values()), "ada", "chat") == LoadedArtifacts({ulid: pipe_id})
    is_sqlite = world.url.startswith("sqlite")
    listing = "SELECT name, tbl_name FROM sqlite_master WHERE sql LIKE 'CREATE INDEX%'"
    if not is_sqlite:
        listing = "SELECT indexname, tablename FROM pg_indexes WHERE indexname LIKE 'ix_pipe%'"
    indexes: dict[str, list[str]] = {}
    for name, table in world.run(listing):
        assert len(name.encode()) <= 63
        indexes.setdefault(table, []).append(name)
    assert len(indexes) == len(ODD_IDS)
    assert all(len(names) == 2 for names in indexes.values())


def names_of(pipe_id: str) -> list[str]:
    """The name of the table of a function, and those of its indexes."""
    table = ArtifactTable(Database(create_async_engine("sqlite+aiosqlite://")), pipe_id).table
    return [table.name, *(str(index.name) for index in table.indexes)]


@examples(max_examples=150, deadline=None)
@given(st.sets(st.text(st.characters(codec="utf-8"), max_size=50), min_size=2, max_size=2))
def test_names_of_tables(pipe_ids: set[str]) -> None:
    """They fit into PostgreSQL's 63 bytes, and are of one function only."""
    first, second = map(names_of, pipe_ids)
    assert not set(first) & set(second)
    for name in (*first, *second):
        assert re.fullmatch(r"(ix_)?pipe_[a-z0-9_$]{0,60}", name)
        assert len(name) <= 63


def test_a_function_cannot_be_named_after_the_table_of_another() -> None:
    """Who may name a function must not come to the rows of another by it."""
    prefix = names_of("My-Function")[0].removesuffix("_artifacts").removeprefix("pipe_")
    assert not set(names_of(prefix)) & set(names_of("My-Function"))


@pytest.mark.parametrize("schema", ["chats", "Chats of Ours", "größe", 'a"b', "50%"])
async def test_the_schema_of_the_host(postgres_url: str, schema: str) -> None:
    """Everything lies in it, and nothing beside it."""
    quoted = '"' + schema.replace('"', '""') + '"'
    with connected(postgres_url) as connection:
        connection.execute(f"CREATE SCHEMA {quoted}".encode())
    async with host_engine(postgres_url) as engine:
        host_database.use(engine, schema)
        one, other = [ArtifactStore(OpenWebUIHost(), PIPE) for _ in range(2)]
        one.open(ArtifactSettings(KEY))
        (ulid,) = await one.save([entry("x")])
        other.open(ArtifactSettings(KEY))
        assert await other.save([entry("y")])
        assert (await other.load([ulid], "ada", "fork")).found == {ulid: "x"}
        assert await one.prune() == 0
        await one.aclose()
        await other.aclose()
        host_database.reset()
    with connected(postgres_url) as connection:
        found = connection.execute(
            "SELECT schemaname, tablename FROM pg_tables WHERE tablename LIKE 'pipe%' ORDER BY 2"
        ).fetchall()
        assert found == [(schema, TABLE), (schema, VERSIONS)]
        assert connection.execute(f"SELECT count(*) FROM {quoted}.{TABLE}".encode()).fetchall() == [(3,)]


async def test_a_schema_without_a_name_is_none(database_url: str) -> None:
    """`DATABASE_SCHEMA=` in a file of settings: for Open WebUI that is as good as no line."""
    async with host_engine(database_url) as engine:
        host_database.use(engine, "")
        store = ArtifactStore(OpenWebUIHost(), PIPE)
        store.open(ArtifactSettings(KEY))
        try:
            assert await store.save([entry("x")])
        finally:
            await store.aclose()
            host_database.reset()


async def old_row(world: World, dropped: Iterable[str], version: int | None) -> str:
    """Make the table as an older version left it, without some columns, with one row; its ULID."""
    store = await world.worker()
    (ulid,) = await store.save([entry("kept long ago")])
    await world.aclose(store)
    for column in dropped:
        await world.change(f"DROP INDEX IF EXISTS ix_pipe_openrouter_{column}")
        await world.change(f"ALTER TABLE {TABLE} DROP COLUMN {column}")
    if version is None:
        await world.change(f"DELETE FROM {VERSIONS}")
    else:
        await world.change(f"UPDATE {VERSIONS} SET version = ?", version)
    return ulid


@pytest.mark.parametrize(
    ("version", "dropped"),
    [(None, []), (0, ["model"]), (None, ["message_id", "model", "created_at", "last_used_at"])],
)
@DIRECT
async def test_an_older_table_is_brought_forward(
    world: World, version: int | None, dropped: list[str]
) -> None:
    """Its rows stay, with what they do not have left empty."""
    ulid = await old_row(world, dropped, version)
    store = await world.worker()
    assert (await store.load([ulid], "ada", "chat")).found == {ulid: "kept long ago"}
    (newer,) = await store.save([entry("new")])
    rows = {row.ulid: row for row in world.rows()}
    assert rows.keys() == {ulid, newer}
    assert (rows[newer].message_id, rows[newer].model) == ("message", "a/mind")
    assert rows[ulid].model == ("" if "model" in dropped else "a/mind")
    ((found,),) = world.run(f"SELECT version FROM {VERSIONS}")
    assert found >= 1


@DIRECT
async def test_what_was_brought_forward_is_not_cleaned_up_at_once(world: World) -> None:
    """Nobody knows when it was last used; that is no reason to lose it."""
    ulid = await old_row(world, ["created_at", "last_used_at"], None)
    store = await world.worker()
    await store.prune()
    assert [row.ulid for row in world.rows()] == [ulid]


@DIRECT
async def test_several_bring_an_older_table_forward_at_once(world: World) -> None:
    ulid = await old_row(world, ["message_id", "model", "last_used_at"], 0)
    for store in [world.begun() for _ in range(5)]:
        saved: list[str] = []
        async with asyncio.timeout(PATIENCE_S):
            while not saved:  # as one request after the other does
                store.open(world.settings)
                with contextlib.suppress(StorageError):
                    saved = await store.save([entry("new")])
                await asyncio.sleep(0.01)
        assert (await store.load([ulid], "ada", "chat")).found == {ulid: "kept long ago"}
    assert len(world.rows()) == 6
    assert world.run(f"SELECT count(*) FROM {VERSIONS}") == [(1,)]


@FILE
async def test_the_first_question_waits_until_the_table_was_brought_forward(world: World) -> None:
    """Which takes a moment, while others write."""
    ulid = await old_row(world, ["model"], 0)
    with world.locked():
        store = world.begun()
        loading = asyncio.create_task(store.load([ulid], "ada", "chat"))
        await asyncio.wait((loading,), timeout=0.3)
    assert (await loading).found == {ulid: "kept long ago"}


@DIRECT
async def test_a_table_of_a_newer_version_is_used_and_left_alone(world: World) -> None:
    """Two versions of this file may run at once, while servers are updated one by one."""
    ulid = await old_row(world, [], 99)
    await world.change(f"ALTER TABLE {TABLE} ADD COLUMN future VARCHAR NOT NULL DEFAULT 'x'")
    store = await world.worker()
    (newer,) = await store.save([entry("new")])
    other = await world.worker()
    loaded = await other.load([ulid, newer], "ada", "fork")
    assert loaded == LoadedArtifacts({ulid: "kept long ago", newer: "new"})
    await until(lambda: len(world.rows()) == 4)
    assert await store.prune() == 0
    assert world.run(f"SELECT version FROM {VERSIONS}") == [(99,)]
    assert world.run(f"SELECT DISTINCT future FROM {TABLE}") == [("x",)]


@only(codec="lz4")
async def test_five_create_it_at_once(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """Whoever is first, all of them have it."""
    stores = [world.begun() for _ in range(5)]
    saved = await asyncio.gather(*(store.save([entry(number)]) for number, store in enumerate(stores)))
    ulids = [ulid for (ulid,) in saved]
    for store in stores:
        assert len((await store.load(ulids, "ada", "chat")).found) == 5
    assert world.run(f"SELECT name FROM {VERSIONS}") == [("artifacts",)]
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


@DIRECT
async def test_five_start_at_once(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """On a table that is there: nothing has to be made, and nobody is in the way of another."""
    (ulid,) = await (await world.worker()).save([entry("x")])
    stores = [world.begun() for _ in range(5)]
    loaded = await asyncio.gather(*(store.load([ulid], "ada", "chat") for store in stores))
    await asyncio.gather(*(store.save([entry("y")]) for store in stores))
    assert [each.found for each in loaded] == [{ulid: "x"}] * 5
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


# a worker in a process of its own: (address, number); told "go" it opens the store, saves, and says the ULID
WORKER: Final = """
import asyncio, contextlib, sys
from pytest_bootstrap import host_database
from openrouter_responses_pipe.openrouter_responses_pipe import (
    ArtifactCipher, ArtifactPayload, ArtifactSettings, ArtifactStore, OpenWebUIHost, StorageError
)
from tests.engines import host_engine

async def main(url, number):
    async with host_engine(url) as engine:
        host_database.use(engine)
        store = ArtifactStore(OpenWebUIHost(), "openrouter")
        print("ready", flush=True)
        sys.stdin.readline()
        ulids = []
        while not ulids:  # as one request after the other does
            store.open(ArtifactSettings(ArtifactCipher("the secret of this server", "openrouter")))
            with contextlib.suppress(StorageError):
                ulids = await store.save([ArtifactPayload(int(number), "turn", "ada", "chat")])
            await asyncio.sleep(0.01)
        await store.aclose()
        print(*ulids)

asyncio.run(main(*sys.argv[1:]))
"""


@contextlib.asynccontextmanager
async def python(code: str, *argv: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """A program that talks over its input and output; it has ended when it is left."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", code, *argv),
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


@DIRECT
async def test_three_processes_create_it_at_once(world: World) -> None:
    async with contextlib.AsyncExitStack() as stack:
        workers = [
            await stack.enter_async_context(python(WORKER, world.url, str(number))) for number in range(3)
        ]
        for worker in workers:
            assert worker.stdout
            async with asyncio.timeout(3 * PATIENCE_S):
                assert await worker.stdout.readline() == b"ready\n"
        ended = await asyncio.gather(*(worker.communicate(b"go\n") for worker in workers))
    words = [out.decode().strip() for out, _ in ended]
    assert all(map(ULID.fullmatch, words)), [err.decode() for _, err in ended]
    store = await world.worker()
    loaded = await store.load(words, "ada", "chat")
    assert sorted(loaded.found.values()) == [0, 1, 2]


# A server where nothing of what may be missing is there: (address, ULIDs as JSON) → what it could do, as JSON
WITHOUT: Final = """
import asyncio, json, sys
import pytest_bootstrap
from pytest_bootstrap import host_database
from tests.engines import host_engine

MISSING = ("lz4", "ulid", "redis")
for name in list(sys.modules):
    if name.partition(".")[0] in MISSING:
        del sys.modules[name]

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in MISSING:
            raise ImportError(name)

sys.meta_path.insert(0, Missing())
from openrouter_responses_pipe.openrouter_responses_pipe import (
    ArtifactCipher, ArtifactPayload, ArtifactSettings, ArtifactStore, OpenWebUIHost, _new_ulid
)

async def main(url, ulids):
    async with host_engine(url) as engine:
        host_database.use(engine)
        store = ArtifactStore(OpenWebUIHost(), "openrouter")
        cipher = ArtifactCipher("the secret of this server", "openrouter")
        store.open(ArtifactSettings(cipher, uses_redis=True))
        loaded = await store.load(json.loads(ulids), "ada", "chat")
        saved = await store.save([ArtifactPayload("y" * 1000, "turn", "ada", "chat")])
        await store.aclose()
        made = [_new_ulid(now) for now in NOWS]
        there = [name for name in MISSING if name in sys.modules]
        print(json.dumps([dict(loaded.found), loaded.unreadable, saved, made, there]))

NOWS = %r
asyncio.run(main(*sys.argv[1:]))
"""
# times of day in seconds, in order
NOWS: Final = [0.0, 0.001, 1.0, 1_469_918_176.385, NOON, NOON + 0.001, NOON + 0.5, 4e9, 2**48 / 1000 - 1]


@DIRECT
async def test_a_server_without_lz4_ulid_and_redis(world: World) -> None:
    """It keeps and reads what it can; a row that needs LZ4 cannot be read there, and nothing else is lost."""
    store, zlib = await world.worker(), await world.worker(uses_lz4=False)
    (fast,), (plain,) = await store.save([entry("x" * 1_000)]), await store.save([entry("short")])
    (slow,) = await zlib.save([entry("z" * 1_000)])
    assert [row.codec for row in world.rows()] == ["lz4", "json", "zlib"]
    async with python(WITHOUT % NOWS, world.url, json.dumps([fast, plain, slow, NOBODY])) as other:
        out, err = await other.communicate()
    assert other.returncode == 0, err.decode()
    found, unreadable, saved, made, there = json.loads(out)
    assert there == [], "it was not without them"
    assert (found, unreadable) == ({plain: "short", slow: "z" * 1_000}, 1)
    assert (await store.load(saved, "ada", "chat")).found == {saved[0]: "y" * 1_000}
    assert {row.ulid: row.codec for row in world.rows()}[saved[0]] == "zlib"
    # its ids are like those of the library
    assert made == sorted(made)
    for now, ulid in zip(NOWS, made, strict=True):
        assert ULID.fullmatch(ulid)
        assert ulid[:10] == _new_ulid(now)[:10], f"another time for {now}"
    assert len({ulid[10:] for ulid in made}) == len(made)


# Ids


def test_ids_sort_by_time() -> None:
    made = [_new_ulid(now) for now in NOWS]
    assert made == sorted(made)
    assert all(map(ULID.fullmatch, made))
    same = {_new_ulid(NOON) for _ in range(1_000)}
    assert len(same) == 1_000
    assert len({ulid[:10] for ulid in same}) == 1


@DIRECT
async def test_a_clock_that_goes_back(world: World) -> None:
    """Ids stay different and everything can be read; nothing is cleaned up that is of the future."""
    now = Clock(NOON)
    store, other = await world.worker(now=now), await world.worker(now=now)
    ulids = await store.save([entry("late")])
    for moment in (NOON - 30 * DAY, 5.0, 0.0):
        now.now = moment
        ulids += await store.save([entry(moment)])
        assert (await other.load(ulids, "ada", "chat")).found.keys() == set(ulids)
        assert (await other.load(ulids, "ada", f"fork at {moment}")).found.keys() == set(ulids)
        assert await store.prune() == 0
    assert len(set(ulids)) == 4


# Cleaning up


@DIRECT
async def test_what_nobody_has_used_for_long_goes(world: World) -> None:
    """Use counts, and each day anew; the days are those of the valve."""
    now = Clock(NOON)
    first = await world.worker(now=now)
    used, unused, forked = [ulid for n in range(3) for ulid in await first.save([entry(n)])]
    now.now += 50 * DAY
    reader = await world.worker(now=now)
    await reader.load([used], "ada", "chat")
    await reader.load([forked], "ada", "fork")
    await until(lambda: len(world.rows()) == 4)
    await until(lambda: any(row.last_used_at > NOON for row in world.rows() if row.ulid == used))
    now.now = NOON + 89 * DAY
    assert await first.prune() == 0
    now.now = NOON + 93 * DAY
    assert await first.prune() == 2
    left = {(row.ulid, row.chat_id) for row in world.rows()}
    assert left == {(used, "chat"), (forked, "fork")}
    assert (unused, "chat") not in left
    now.now = NOON + 144 * DAY
    assert await first.prune() == 2
    assert world.rows() == []


@DIRECT
async def test_use_is_noted_where_a_worker_has_it_at_hand(world: World) -> None:
    """A chat that goes on in the same worker is in use, though it is rarely asked for."""
    now, clock = Clock(NOON), Clock(0.0)
    store = await world.worker(now=now, clock=clock)
    ulids = await store.save([entry("x")])
    for _ in range(60):
        now.now += 2 * DAY
        clock.now += 2 * DAY
        store.open(world.settings)
        assert len((await store.load(ulids, "ada", "chat")).found) == 1
        await until(lambda: world.rows()[0].last_used_at == now.now)
    assert await store.prune() == 0


@DIRECT
async def test_use_is_not_noted_each_time(world: World) -> None:
    now = Clock(NOON)
    first = await world.worker(now=now)
    (ulid,) = await first.save([entry("x")])
    now.now += DAY / 2
    for _ in range(3):
        later = await world.worker(now=now)
        await later.load([ulid], "ada", "chat")
        await world.aclose(later)
    assert [row.last_used_at for row in world.rows()] == [NOON]
    assert not any(each.startswith("UPDATE") and TABLE in each for each in world.statements)


@DIRECT
async def test_what_was_used_within_its_days_stays(world: World) -> None:
    """Also where they are few: a chat that somebody has just gone on with is in use."""
    now = Clock(NOON)
    keep_s = settings_of(ARTIFACT_CLEANUP_DAYS=1).keep_s
    store, other = [await world.worker(now=now, keep_s=keep_s) for _ in range(2)]
    (ulid,) = await store.save([entry("x")])
    now.now += DAY - 3_600
    assert (await other.load([ulid], "ada", "chat")).found == {ulid: "x"}
    await world.aclose(other)
    now.now += 2 * 3_600
    assert await store.prune() == 0


@DIRECT
async def test_zero_days_are_for_ever(world: World) -> None:
    now = Clock(0.0)
    store = await world.worker(now=now, keep_s=settings_of(ARTIFACT_CLEANUP_DAYS=0).keep_s)
    await store.save([entry("x")])
    now.now += 100 * 365 * DAY
    assert await store.prune() == 0
    assert len(world.rows()) == 1


async def chats(*chat_ids: str) -> None:
    """The host's table of chats, with these."""
    await host_database.create(Chat)
    async with host_database.session() as session:
        session.add_all([Chat(id=chat_id, user_id="ada") for chat_id in chat_ids])
        await session.commit()


@DIRECT
async def test_what_is_of_deleted_chats_goes(world: World) -> None:
    """Not what is fresh: the host may not have saved its chat yet. Nor what is of other functions."""
    await chats("kept", "other")
    now = Clock(NOON)
    store, theirs = await world.worker(now=now), await world.worker("theirs", now=now)
    old = await store.save(
        [entry(n, chat=chat) for n, chat in enumerate(("kept", "gone", "gone", "deleted"))]
    )
    await theirs.save([entry("x", chat="gone")])
    now.now += 3_500
    fresh = await store.save([entry("x", chat="gone")])
    assert await store.prune() == 0
    now.now += 200
    assert await store.prune() == 3
    assert {row.ulid for row in world.rows()} == {old[0], *fresh}
    assert len(world.rows("pipe_theirs_artifacts")) == 1
    now.now += 3_600
    assert await store.prune() == 1
    assert {row.ulid for row in world.rows()} == {old[0]}
    assert await theirs.prune() == 1


@DIRECT
async def test_where_chats_cannot_be_read_nothing_is_taken_for_deleted(world: World) -> None:
    now = Clock(NOON)
    store = await world.worker(now=now)
    await store.save([entry("x")])
    now.now += 10 * DAY
    assert await store.prune() == 0
    assert len(world.rows()) == 1


@DIRECT
async def test_many_chats_are_looked_up(world: World) -> None:
    """More than are asked for at once; those that are there stay, wherever they stand."""
    names = [f"{number:04d}" for number in range(450)]
    await chats(*names[::2])
    now = Clock(NOON)
    store = await world.worker(now=now, batch=500)
    await store.save([entry(name, chat=name) for name in names])
    now.now += 2 * DAY
    assert await store.prune() == 225
    assert {row.chat_id for row in world.rows()} == set(names[::2])


@DIRECT
async def test_rows_are_deleted_in_small_batches(world: World) -> None:
    """No chat has to wait for a long one."""
    now = Clock(NOON)
    store = await world.worker(now=now, batch=500)
    await store.save([entry(number, chat=f"{number % 7}") for number in range(1_000)])
    now.now += 93 * DAY
    before = len(world.statements)
    assert await store.prune() == 1_000
    assert world.rows() == []
    deletes = [each for each in world.statements[before:] if each.startswith("DELETE")]
    assert len(deletes) >= 1_000 // 250


@DIRECT
async def test_a_clean_up_that_fails_says_so(world: World) -> None:
    store = await world.worker()
    await world.drop()
    with pytest.raises(StorageError):
        await store.prune()


class Asked(dict[str, bool]):
    """The host's functions, which count how often they were looked up."""

    def __init__(self, **active: bool) -> None:
        super().__init__(active)
        self.times = 0

    def __contains__(self, name: object) -> bool:
        self.times += 1
        return super().__contains__(name)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    """The host's functions: ours, which is on."""
    found = Asked(**{PIPE: True})
    monkeypatch.setattr(host_functions, "active", found)
    return found


@pytest.fixture
async def littered(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Clock:
    """A table with a row that nobody needs, and the time of day."""
    monkeypatch.setattr("open_webui.env.DATA_DIR", str(tmp_path / "data"), raising=False)
    now = Clock(NOON)
    store = await world.worker(now=now)
    await store.save([entry("x")])
    now.now += 93 * DAY
    return now


@DIRECT
async def test_it_cleans_up_from_time_to_time(world: World, littered: Clock, asked: Asked) -> None:
    store = await world.worker(now=littered, cleanup_s=0.01)
    await until(lambda: world.rows() == [])
    await store.save([entry("again")])
    littered.now += 93 * DAY
    await until(lambda: world.rows() == [])
    assert asked.times >= 2


@pytest.mark.parametrize("is_there", [True, False])
@DIRECT
async def test_a_function_that_is_off_or_gone_cleans_nothing(
    world: World, littered: Clock, asked: Asked, is_there: bool
) -> None:
    """The host tells nobody; what was kept may be wanted again."""
    asked.clear()
    if is_there:
        asked[PIPE] = False
    await world.worker(now=littered, cleanup_s=0.01)
    await until(lambda: asked.times >= 5)
    assert len(world.rows()) == 1
    asked[PIPE] = True
    await until(lambda: world.rows() == [])


@DIRECT
async def test_one_worker_cleans_at_a_time(
    world: World, littered: Clock, asked: Asked, tmp_path: Path
) -> None:
    """Whoever has the lock; the others go on as if it had been done."""
    await world.worker(now=littered, cleanup_s=0.01)
    await until(lambda: world.rows() == [])
    (path,) = (tmp_path / "data").rglob("*.lock")
    with path.open("w") as lock:

        def taken() -> bool:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            return False

        await until(taken)
        store = await world.worker(now=littered)
        await store.save([entry("x")])
        littered.now += 93 * DAY
        times = asked.times
        await until(lambda: asked.times >= times + 5)
        assert len(world.rows()) == 1
    await until(lambda: world.rows() == [])


@DIRECT
async def test_a_clean_up_that_failed_is_tried_again(world: World, littered: Clock, asked: Asked) -> None:
    store = await world.worker(now=littered, cleanup_s=0.01)
    await until(lambda: world.rows() == [])
    await world.change(f"ALTER TABLE {TABLE} RENAME TO away")
    times = asked.times
    await until(lambda: asked.times >= times + 3)
    await world.change(f"ALTER TABLE away RENAME TO {TABLE}")
    await store.save([entry("x")])
    littered.now += 93 * DAY
    await until(lambda: world.rows() == [])


# Ending


@only(database_url="sqlite", cache="redis", codec="lz4")
async def test_a_store_ends_soon(world: World) -> None:
    """Many times over, with others at work; what goes on after that keeps the server from ending."""
    other = await world.worker()

    async def be_busy() -> None:
        while True:
            await other.save([entry("x")])
            await asyncio.sleep(0.005)

    busy = asyncio.create_task(be_busy())
    try:
        for number in range(8):
            before = asyncio.all_tasks()
            store = await world.worker()
            await store.save([entry(number)])
            async with asyncio.timeout(4.0):
                await store.aclose()
            left = asyncio.all_tasks() - before
            assert [task for task in left if "artifacts" in task.get_name() and task.cancelling()] == []
    finally:
        busy.cancel()
        await asyncio.wait((busy,))


def test_a_store_that_is_closed_while_it_opens(sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At any moment: what it has begun in the host's database ends before the server does."""
    told: list[str] = []
    monkeypatch.setattr(threading, "excepthook", lambda args: told.append(repr(args.exc_value)))

    async def open_and_close(delay: float) -> None:
        async with host_engine(sqlite_url) as engine:
            host_database.use(engine)
            store = ArtifactStore(OpenWebUIHost(), PIPE)
            store.open(ArtifactSettings(KEY))
            await asyncio.sleep(delay)
            await store.aclose()
            host_database.reset()

    before = threading.enumerate()
    for number in range(60):
        asyncio.run(open_and_close(number * 0.0002))
        for thread in threading.enumerate():
            if thread not in before:
                thread.join(PATIENCE_S)
    assert told == []


# What the valves say


def test_what_the_valves_say() -> None:
    plain = settings_of()
    assert plain == ArtifactSettings(plain.cipher)
    made = settings_of(
        ENABLE_ARTIFACT_STORE=False,
        PERSIST_TOOL_RESULTS=False,
        ENABLE_LZ4_COMPRESSION=False,
        MIN_COMPRESS_BYTES=1_000,
        DB_BATCH_SIZE=50,
        ARTIFACT_CLEANUP_DAYS=7,
        ARTIFACT_CLEANUP_INTERVAL_HOURS=2.5,
        REDIS_CACHE_TTL_SECONDS=60,
        REDIS_PENDING_WARN_THRESHOLD=5,
    )
    assert made == ArtifactSettings(
        made.cipher,
        is_on=False,
        keeps_tool_results=False,
        uses_lz4=False,
        least_compressed=1_000,
        batch=50,
        keep_s=7 * DAY,
        cleanup_s=9_000.0,
        redis_ttl_s=60,
        redis_warn_at=5,
    )


@pytest.mark.parametrize("choice", SEALED)
def test_which_kinds_are_sealed(choice: str) -> None:
    kinds = settings_of(ENCRYPT_ARTIFACTS=choice).sealed_kinds
    assert {kind for kind in KINDS if kind in kinds} == SEALED[choice]


# (valve, number of workers, what the environment says of a Redis) → whether rows go through it
REDIS_CHOICES: Final = [
    ("auto", 1, {}, False),
    ("auto", 4, {}, False),
    ("on", 4, {}, False),
    ("auto", 1, {"REDIS_URL": "redis://r:6379/0"}, False),
    ("auto", 2, {"REDIS_URL": "redis://r:6379/0"}, True),
    ("on", 1, {"REDIS_URL": "redis://r:6379/0"}, True),
    ("off", 4, {"REDIS_URL": "redis://r:6379/0"}, False),
    ("auto", 2, {"REDIS_SENTINEL_HOSTS": "a,b"}, True),
    ("on", 1, {"REDIS_SENTINEL_HOSTS": "a,b"}, True),
    ("auto", 2, {"REDIS_URL": "", "REDIS_SENTINEL_HOSTS": ""}, False),
]


@pytest.mark.parametrize(("valve", "workers", "environ", "expected"), REDIS_CHOICES)
def test_when_rows_go_through_redis(
    valve: str, workers: int, environ: dict[str, str], expected: bool
) -> None:
    env = HostEnvironment.read({**environ, "UVICORN_WORKERS": str(workers)})
    settings = _artifact_settings(Valves.model_validate({"ENABLE_REDIS_CACHE": valve}), env, PIPE)
    assert settings.uses_redis is expected


@pytest.mark.parametrize(
    ("keys", "secret", "opens"),
    [
        ("", "server", ["server"]),
        ("", "", []),
        ("own", "server", ["own", "server"]),
        ("own", "", ["own"]),
        (" new , old,,", "server", ["new", "old", "server"]),
        (" , ", "server", ["server"]),
        (" , ", "", []),
        ("server", "server", ["server"]),
    ],
)
def test_which_keys_there_are(
    keys: str, secret: str, opens: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first seals, all of them open."""
    monkeypatch.setenv("WEBUI_SECRET_KEY", secret)
    cipher = settings_of(secret, ARTIFACT_ENCRYPTION_KEY=keys).cipher
    assert cipher.can_seal == bool(opens)
    if not opens:
        return
    sealed = [ArtifactCipher(key, PIPE).encrypt(key.encode(), "ada") for key in opens]
    assert [cipher.decrypt(*each, "ada").decode() for each in sealed] == opens
    assert cipher.encrypt(b"x", "ada")[0] == sealed[0][0]
    with pytest.raises(StorageError):
        cipher.decrypt(*ArtifactCipher("another", PIPE).encrypt(b"x", "ada"), "ada")


def test_a_key_that_cannot_be_read_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server's secret is another one now: its own serves, as if no key had been set."""
    stored = EncryptedStr.encrypt("own", "the old secret")
    monkeypatch.setenv("WEBUI_SECRET_KEY", "the new secret")
    settings = settings_of("the new secret", ARTIFACT_ENCRYPTION_KEY=stored)
    assert settings.cipher.can_seal
    sealed = ArtifactCipher("the new secret", PIPE).encrypt(b"x", "ada")
    assert settings.cipher.decrypt(*sealed, "ada") == b"x"
    assert settings.cipher.encrypt(b"x", "ada")[0] == sealed[0]


# How rows are made, as values

ROWS: Final = st.builds(
    lambda data, kind, user, sealed, is_fast, least: (
        ArtifactPayload(data, kind, user, "chat"),
        ArtifactSettings(KEY, sealed_kinds=sealed, uses_lz4=is_fast, least_compressed=least),
    ),
    st.text(max_size=80) | st.lists(st.integers(0, 3), max_size=2_000) | st.binary(max_size=900).map(repr),
    st.sampled_from(KINDS),
    st.text(max_size=10),
    st.sets(st.sampled_from(KINDS)),
    st.booleans(),
    st.sampled_from([0, 1, 256, 1_000_000]),
)


@examples(max_examples=200, deadline=None)
@given(ROWS)
def test_a_row_gives_back_what_it_was_made_of(made: tuple[ArtifactPayload, ArtifactSettings]) -> None:
    payload, settings = made
    raw, ulid = _json_dumps(payload.data), _new_ulid(NOON)
    row = _packed(payload, raw, ulid, settings, NOON)
    assert _unpacked(row, KEY) == (raw, payload.data)
    assert (row.ulid, row.user_id, row.kind, row.raw_bytes) == (ulid, payload.user_id, payload.kind, len(raw))
    assert row.codec == "json" or len(raw) >= settings.least_compressed
    assert len(row.payload) <= len(raw) + 28 * bool(row.key_id)
    assert bool(row.key_id) == (payload.kind in settings.sealed_kinds)


SEALED_ROW: Final = _packed(
    entry("hello, " * 100), _json_dumps("hello, " * 100), _new_ulid(NOON), ArtifactSettings(KEY), NOON
)
PLAIN: Final = ArtifactSettings(KEY, sealed_kinds=())
PLAIN_ROW: Final = _packed(entry("x"), _json_dumps("hello, " * 100), _new_ulid(NOON), PLAIN, NOON)


@examples(max_examples=200, deadline=None)
@given(place=st.integers(0, len(SEALED_ROW.payload) - 1), bit=st.integers(0, 7))
def test_a_sealed_row_with_one_bit_changed(place: int, bit: int) -> None:
    changed = bytearray(SEALED_ROW.payload)
    changed[place] ^= 1 << bit
    with pytest.raises(StorageError):
        _unpacked(SEALED_ROW._replace(payload=bytes(changed)), KEY)


@pytest.mark.parametrize(
    "changes",
    [{"user_id": "bob"}, {"ulid": NOBODY}, {"user_id": ""}, {"key_id": "ffffffff"}, {"key_id": ""}],
)
def test_a_sealed_row_put_elsewhere(changes: dict[str, str]) -> None:
    with pytest.raises(StorageError):
        _unpacked(SEALED_ROW._replace(**changes), KEY)


def test_a_row_is_of_its_person_whatever_their_id() -> None:
    """No id of a row and of a person together read like those of another."""
    for user in ("a b", " ", "", "a", "a b c", "é", "\x00"):
        payload = entry("x", user)
        row = _packed(payload, b'"x"', _new_ulid(NOON), ArtifactSettings(KEY), NOON)
        assert _unpacked(row, KEY) == (b'"x"', "x")
        for other in (user + " ", " " + user, user + "b"):
            with pytest.raises(StorageError):
                _unpacked(row._replace(user_id=other), KEY)


@examples(max_examples=200, deadline=None)
@given(junk=st.binary(max_size=300), codec=st.sampled_from(["json", "lz4", "zlib"]), size=st.integers(0, 300))
def test_a_row_of_noise(junk: bytes, codec: str, size: int) -> None:
    """Not sealed, and not what it says: refused, or so many bytes as it says and no more."""
    row = PLAIN_ROW._replace(payload=junk, codec=codec, raw_bytes=size)
    with contextlib.suppress(StorageError):
        assert len(_unpacked(row, KEY)[0]) == size


@pytest.mark.parametrize("is_fast", [True, False])
def test_a_row_that_would_be_larger_than_it_says(is_fast: bool) -> None:
    """No more is opened than the row was made of."""
    bomb = _json_dumps("x" * 50_000_000)
    settings = ArtifactSettings(KEY, sealed_kinds=(), uses_lz4=is_fast)
    row = _packed(entry(""), bomb, _new_ulid(NOON), settings, NOON)
    assert len(row.payload) < 1_000_000
    started = time.process_time()
    with pytest.raises(StorageError):
        _unpacked(row._replace(raw_bytes=100), KEY)
    assert time.process_time() - started < 0.1


def test_rows_among_others_that_cannot_be_read() -> None:
    bad = SEALED_ROW._replace(payload=b"", ulid=NOBODY)
    found = _readable([bad, SEALED_ROW, PLAIN_ROW], KEY)
    assert found.keys() == {SEALED_ROW.ulid, PLAIN_ROW.ulid}
