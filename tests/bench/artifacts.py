"""What it costs to keep what models need back: writing, reading, and a table of a million rows.

The yardstick is the least that would do: the module sqlite3, one table, payloads sealed with Fernet, without
compression and without anybody else on the event loop. Both have the same payloads and the same pragmas, and
what is read was not read before by the same store. The file itself lies in the memory of the system, as far
as there is room.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import gc
import random
import shutil
import sqlite3
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any, Final, NamedTuple

import orjson
import sqlalchemy as sa
from cryptography.fernet import Fernet

from openrouter_responses_pipe import openrouter_responses_pipe as module
from pytest_bootstrap import Chat, ChatMessage, host_database
from tests.bench.report import Figure, Pair, compare
from tests.bench.ticker import Ticker
from tests.engines import SQLITE_PRAGMAS, connected, host_engine, postgres_server

PIPE_ID: Final = "openrouter"
BATCH: Final = 10
# turns of a chat -> what reading it may cost; a short one is mostly the way to the thread of SQLite and back
READS: Final[dict[int, float | None]] = {10: None, 20: 1.5, 40: 1.5}
WRITE_LIMIT: Final = 2.5
BATCHES, CHATS = 60, 20  # of a round
LOAD_MS, WAIT_MS = 5.0, 50.0
REST_S: Final = 0.002  # before each: what a store does after it has answered, nobody waits for

ROWS, QUICK_ROWS = 1_000_000, 100_000
TURNS, PEOPLE, DAYS = 20, 500, 100
LOADS: Final = 500
PRUNES: Final = 3
BUSY_CHATS: Final = 500
PAUSE_S: Final = 0.01  # of everybody who keeps the database busy
ROW_BYTES: Final = 4_000  # on the disk, at most
DAY_S: Final = 86_400.0
Say = Callable[[str], None]


async def figures(rounds: int, quick: bool, say: Say) -> list[Figure]:
    """All of them: medians of `rounds`, or of fewer where a round takes long."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        say("artifacts: writing and reading")
        found = await _beside_sqlite(folder, rounds)
        rows = QUICK_ROWS if quick else ROWS
        if shutil.disk_usage(folder).free < rows * ROW_BYTES:
            raise RuntimeError(f"{rows:,} rows need {rows * ROW_BYTES / 1e9:g} GB in {folder}")
        found += await Large(f"sqlite+aiosqlite:///{folder / 'large.db'}", rows, say).figures(rounds)
        if not quick:
            with postgres_server(folder) as server, server.database() as url:
                found += await Large(url, rows, say, limited=False).figures(rounds)
    return found


# payloads


TEXT: Final = (
    "the model thinks about what was asked and weighs each way that leads to an answer before it writes one "
    "down for people to read because nobody wants to be told what is not true or hear the same thing twice"
)
WORDS: Final = TEXT.split()


def _payload(user_id: str, chat_id: str) -> module.ArtifactPayload:
    """The record of a turn, 2 KB of JSON: words, and bytes that nothing compresses."""
    reasoning = {
        "id": f"rs_{random.getrandbits(96):024x}",
        "type": "reasoning",
        "summary": [{"type": "summary_text", "text": " ".join(random.choices(WORDS, k=130))[:600]}],
        "encrypted_content": base64.b64encode(random.randbytes(870)).decode(),
        "format": "openai-responses-v1",
    }
    answer = {"message": f"{random.getrandbits(128):032x}", "chars": 812, "phase": "final_answer"}
    data = [{"reasoning": reasoning}, answer]
    return module.ArtifactPayload(data, "turn", user_id, chat_id, str(uuid.uuid4()), "openai/gpt-5-mini")


def _settings() -> module.ArtifactSettings:
    """What the valves say when nobody has touched them: AES and LZ4."""
    environment = module.HostEnvironment(secret="a secret of this benchmark")
    return module._artifact_settings(module.Valves(), environment, PIPE_ID)


@contextlib.asynccontextmanager
async def _store(keep_s: float = 0.0) -> AsyncIterator[module.ArtifactStore]:
    """A store that is open and remembers nothing."""
    store = module.ArtifactStore(module.OpenWebUIHost(), PIPE_ID)
    store.open(_settings()._replace(keep_s=keep_s))
    await store.load([module._new_ulid(0)], "nobody", "none")
    yield store
    await store.aclose()


# beside plain sqlite3


class Plain:
    """The yardstick."""

    def __init__(self, file: Path) -> None:
        self._connection = sqlite3.connect(file)
        for name, value in SQLITE_PRAGMAS.items():
            self._connection.execute(f"PRAGMA {name}={value}")
        self._connection.execute("CREATE TABLE kept (id TEXT PRIMARY KEY, chat_id TEXT, payload BLOB)")
        self._fernet = Fernet(Fernet.generate_key())

    def save(self, payloads: Sequence[module.ArtifactPayload]) -> list[str]:
        """Seal, insert, commit."""
        ids = [uuid.uuid4().hex for _ in payloads]
        sealed = (self._fernet.encrypt(orjson.dumps(payload.data)) for payload in payloads)
        rows = [(*row[:1], row[1].chat_id, row[2]) for row in zip(ids, payloads, sealed, strict=True)]
        self._connection.executemany("INSERT INTO kept VALUES (?, ?, ?)", rows)
        self._connection.commit()
        return ids

    def load(self, ids: Sequence[str]) -> dict[str, Any]:
        """Select, open."""
        marks = ", ".join("?" * len(ids))
        rows = self._connection.execute(f"SELECT id, payload FROM kept WHERE id IN ({marks})", ids)
        return {name: orjson.loads(self._fernet.decrypt(sealed)) for name, sealed in rows.fetchall()}

    def close(self) -> None:
        """Close the file."""
        self._connection.close()


async def _beside_sqlite(folder: Path, rounds: int) -> list[Figure]:
    writes: list[Pair] = []
    reads: dict[int, list[Pair]] = {turns: [] for turns in READS}
    replayed: list[bool] = []
    plain = Plain(folder / "plain.db")
    async with host_engine(f"sqlite+aiosqlite:///{folder / 'ours.db'}") as engine:
        host_database.use(engine)
        async with _store() as store:
            await _write_both(store, plain, BATCHES // 6)  # to warm up
            for _ in range(rounds):
                gc.collect()
                writes += await _write_both(store, plain, BATCHES)
                for turns in READS:
                    pairs, right = await _read_both(store, plain, turns)
                    reads[turns] += pairs
                    replayed += right
        host_database.reset()
    plain.close()
    share = 100 * sum(replayed) / len(replayed)
    return [
        compare(f"artifacts of 2 KB, written {BATCH} at once: each", "µs", writes, WRITE_LIMIT, 1e6 / BATCH),
        *(
            compare(f"artifacts of a chat of {turns} turns, read", "µs", pairs, READS[turns], 1e6)
            for turns, pairs in reads.items()
        ),
        Figure("artifacts that came back as they were", share, "%", limit=100, at_least=True),
    ]


async def _write_both(store: module.ArtifactStore, plain: Plain, batches: int) -> list[Pair]:
    pairs = []
    for _ in range(batches):
        payloads = [_payload("user", "chat") for _ in range(BATCH)]
        await asyncio.sleep(REST_S)
        started = time.perf_counter()
        await store.save(payloads)
        between = time.perf_counter()
        plain.save(payloads)
        pairs.append(Pair(between - started, time.perf_counter() - between))
    return pairs


async def _read_both(
    writer: module.ArtifactStore, plain: Plain, turns: int
) -> tuple[list[Pair], list[bool]]:  # (seconds, whether each came back as it was)
    written = []
    for _ in range(CHATS):
        payloads = [_payload("user", str(uuid.uuid4())) for _ in range(1)]
        payloads += [_payload("user", payloads[0].chat_id) for _ in range(turns - 1)]
        written.append((payloads, await writer.save(payloads), plain.save(payloads)))
    pairs: list[Pair] = []
    right: list[bool] = []
    async with _store() as reader:
        gc.collect()
        for payloads, ulids, ids in written:
            await asyncio.sleep(REST_S)
            started = time.perf_counter()
            loaded = await reader.load(ulids, "user", payloads[0].chat_id)
            between = time.perf_counter()
            ours = plain.load(ids)
            pairs.append(Pair(between - started, time.perf_counter() - between))
            assert [ours[name] for name in ids] == [payload.data for payload in payloads]
            right += [
                loaded.found.get(ulid) == payload.data for ulid, payload in zip(ulids, payloads, strict=True)
            ]
    return pairs, right


# a table of a million rows


class Talk(NamedTuple):
    """A chat, and what is kept of it."""

    chat_id: str
    user_id: str
    last_used_at: float
    ulids: list[str]


@dataclass
class Traffic:
    """Keeps the database busy as people do, and notes how long each has waited."""

    store: module.ArtifactStore
    talks: Sequence[Talk]
    waits: dict[str, list[float]] = field(default_factory=dict)
    is_on: bool = True

    async def during(self, work: Any) -> tuple[Any, dict[str, float]]:
        """(the result of `work`, the longest wait of each in seconds)."""
        self.waits.clear()
        self.is_on = True
        workers = [asyncio.create_task(run()) for run in (self._chat, self._chat, self._host)]
        try:
            async with Ticker() as ticker:
                result = await work
        finally:
            self.is_on = False
            await asyncio.gather(*workers)
        return result, {**{name: max(waits) for name, waits in self.waits.items()}, "loop": ticker.worst_s}

    async def _chat(self) -> None:
        while self.is_on:
            talk = random.choice(self.talks)
            async with self._noted("load"):
                await self.store.load(talk.ulids, talk.user_id, talk.chat_id)
            async with self._noted("save"):
                await self.store.save([_payload(talk.user_id, talk.chat_id)])

    async def _host(self) -> None:
        while self.is_on:
            message = ChatMessage(id=str(uuid.uuid4()), chat_id=random.choice(self.talks).chat_id)
            message.usage = {"text": "words " * 500}
            async with self._noted("host"), host_database.session() as session:
                session.add(message)
                await session.commit()

    @contextlib.asynccontextmanager
    async def _noted(self, what: str) -> AsyncIterator[None]:
        started = time.perf_counter()
        yield
        self.waits.setdefault(what, []).append(time.perf_counter() - started)
        await asyncio.sleep(random.uniform(0.5, 1.5) * PAUSE_S)


class Large:
    """Measures with a table of many rows in a database that is empty before."""

    def __init__(self, url: str, rows: int, say: Say, *, limited: bool = True) -> None:
        self._url = url
        self._rows = rows
        self._say = say
        self._limited = limited
        self._kind = "SQLite" if url.startswith("sqlite") else "PostgreSQL"
        self._name = f"{rows:,} rows in {self._kind}"
        self._pruned = rows // 10
        self._table = ""

    async def figures(self, rounds: int) -> list[Figure]:
        """How long one chat takes, and whom pruning keeps waiting."""
        self._say(f"artifacts: {self._name}")
        rounds = min(rounds, 5)
        async with host_engine(self._url) as engine:
            host_database.use(engine)
            await host_database.create(Chat, ChatMessage)
            table = module.ArtifactTable(module.Database(engine), PIPE_ID)
            await table.create(time.time())
            self._table = table.table.name
        talks = await asyncio.to_thread(self._fill, rounds * LOADS + BUSY_CHATS)
        async with host_engine(self._url) as engine:  # without what the making has left in memory
            host_database.use(engine)
            loads = [await self._loads(talks[at * LOADS : (at + 1) * LOADS]) for at in range(rounds)]
            self._say(f"artifacts: pruning {self._name}")
            figures = [
                Figure(f"{self._name}: one chat of {TURNS} turns", median(map(median, loads)) * 1e3, "ms"),
                Figure(
                    f"{self._name}: 99 of 100 such chats",
                    median(quantiles(load, n=100)[98] for load in loads) * 1e3,
                    "ms",
                    limit=LOAD_MS if self._limited else None,
                ),
                *await self._prunes(talks[-BUSY_CHATS:]),
            ]
            host_database.reset()
        return figures

    async def _loads(self, talks: Sequence[Talk]) -> list[float]:
        times = []
        async with _store() as store:
            gc.collect()
            for talk in talks:
                started = time.perf_counter()
                loaded = await store.load(talk.ulids, talk.user_id, talk.chat_id)
                times.append(time.perf_counter() - started)
                assert len(loaded.found) == TURNS
                await asyncio.sleep(PAUSE_S)  # that they are in use again is noted meanwhile
        return times

    async def _prunes(self, talks: Sequence[Talk]) -> list[Figure]:
        calm: list[dict[str, float]] = []
        waits: list[dict[str, float]] = []
        seconds = []
        for _ in range(PRUNES):
            since = await asyncio.to_thread(self._ask, self._oldest())
            async with _store(keep_s=time.time() - since - module._UNNOTED_S) as store:
                traffic = Traffic(store, talks)
                gc.collect()
                started = time.perf_counter()
                deleted, waited = await traffic.during(store.prune())
                seconds.append(time.perf_counter() - started)
                waits.append(waited)
                assert 0.95 < deleted / self._pruned < 1.05
                calm.append((await traffic.during(asyncio.sleep(seconds[-1] / 2)))[1])
        limit = WAIT_MS if self._limited else None
        names = {
            "save": "to save",
            "load": "to load",
            "host": "of Open WebUI to write",
            "loop": "of the loop",
        }
        return [
            Figure(f"{self._name}: pruning {self._pruned:,}", median(seconds), "s"),
            *(
                Figure(
                    f"… the longest wait {words}",
                    median(wait[name] for wait in waits) * 1e3,
                    "ms",
                    None,
                    limit,
                )
                for name, words in names.items()
            ),
            Figure("… of all while nothing is pruned", median(max(one.values()) for one in calm) * 1e3, "ms"),
        ]

    def _oldest(self) -> str:
        return f"SELECT last_used_at FROM {self._table} ORDER BY last_used_at LIMIT 1 OFFSET {self._pruned}"

    def _ask(self, statement: str) -> Any:
        if self._kind == "SQLite":
            with contextlib.closing(sqlite3.connect(sa.make_url(self._url).database or "")) as connection:
                return connection.execute(statement).fetchone()[0]
        with connected(self._url) as connection:
            row = connection.execute(statement.encode()).fetchone()
            return row[0] if row else None

    def _fill(self, count: int) -> list[Talk]:
        """Make all rows, in the order of their time; returns `count` chats that are used to this day."""
        now = time.time()
        talks: list[Talk] = []
        turns: list[tuple[float, int]] = []
        for number in range(self._rows // TURNS):
            began = now - random.uniform(0.2, DAYS) * DAY_S
            times = [began + random.uniform(0, DAY_S / 6) for _ in range(TURNS)]
            turns += [(at, number) for at in times]
            talks.append(Talk(str(uuid.uuid4()), f"user-{random.randrange(PEOPLE)}", max(times), []))
        turns.sort()
        if self._kind == "SQLite":
            self._fill_sqlite(talks, self._made(talks, turns))
        else:
            self._fill_postgres(talks, self._made(talks, turns))
        young = [talk for talk in talks if talk.last_used_at > now - DAYS / 2 * DAY_S]
        return random.sample(young, count)

    def _made(self, talks: Sequence[Talk], turns: Sequence[tuple[float, int]]) -> Iterator[tuple[Any, ...]]:
        settings = _settings()
        samples = [_payload("", "") for _ in range(500)]
        raws = [module._json_dumps(sample.data) for sample in samples]
        for place, (at, number) in enumerate(turns):
            talk, sample = talks[number], place % len(samples)
            payload = samples[sample]._replace(user_id=talk.user_id, chat_id=talk.chat_id)
            row = module._packed(payload, raws[sample], module._new_ulid(at), settings, at)
            talk.ulids.append(row.ulid)
            yield row._replace(last_used_at=talk.last_used_at)

    def _fill_sqlite(self, talks: Sequence[Talk], rows: Iterator[tuple[Any, ...]]) -> None:
        marks = ", ".join("?" * len(module.ArtifactRow._fields))
        with contextlib.closing(sqlite3.connect(sa.make_url(self._url).database or "")) as connection:
            for pragma in ("journal_mode=OFF", "synchronous=OFF", "cache_size=-1000000"):
                connection.execute(f"PRAGMA {pragma}")
            connection.executemany("INSERT INTO chat VALUES (?, ?)", [talk[:2] for talk in talks])
            connection.executemany(f"INSERT INTO {self._table} VALUES ({marks})", rows)
            connection.commit()
            connection.execute("PRAGMA journal_mode=WAL")

    def _fill_postgres(self, talks: Sequence[Talk], rows: Iterator[tuple[Any, ...]]) -> None:
        with connected(self._url) as connection, connection.cursor() as cursor:
            for table, contents in (("chat", (talk[:2] for talk in talks)), (self._table, rows)):
                with cursor.copy(f"COPY {table} FROM STDIN".encode()) as copy:
                    for row in contents:
                        copy.write_row(row)
            connection.execute(b"VACUUM ANALYZE")
