"""What is counted, in which rows it is written, and that nothing of it is lost."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable
from types import ModuleType, SimpleNamespace
from typing import Any, Final

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine
from test_tool_loop import given_for, script, step

from openrouter_responses_pipe.openrouter_responses_pipe import (
    METRIC_BOUNDS,
    Database,
    Metrics,
    MetricsRow,
    MetricsTable,
    OpenWebUIHost,
    Pipe,
)
from openrouter_responses_pipe.simulator import Simulator
from pytest_bootstrap import host_database
from tests.engines import host_engine
from tests.recorded import Clock
from tests.support import (
    DIALECTS,
    PATIENCE_S,
    Answer,
    arguments,
    ask,
    call,
    inferences,
    read_until_text,
    running_pipe,
    set_valves,
    stream,
)

Json = dict[str, Any]
DAY_S: Final = 86_400.0
NAME: Final = "pipe_openrouter_metrics"
NOON: Final = 1_800_000_000.0
CACHED: Final = "03_reasoning_text_signature_then_tool"  # a stream whose input was partly cached


class Worker:
    """One that counts, with clocks of its own: seconds since it began, and the time of day."""

    def __init__(self, pipe_id: str = "openrouter") -> None:
        self.clock = Clock()
        self.metrics = Metrics(OpenWebUIHost(), pipe_id, self.clock, lambda: NOON + self.clock.now)

    async def write(self, after_s: float = 60.0) -> None:
        """Write, so many seconds later."""
        self.clock.now += after_s
        await self.metrics.write()


async def rows(engine: AsyncEngine, since: float = 0.0, pipe_id: str = "openrouter") -> list[MetricsRow]:
    """What is in the table."""
    return await MetricsTable(Database(engine), pipe_id).rows(since)


async def execute(engine: AsyncEngine, *statements: str) -> None:
    """Do something else with the database."""
    async with engine.begin() as connection:
        for statement in statements:
            await connection.execute(sa.text(statement))


async def tables(engine: AsyncEngine) -> list[str]:
    """The names of the tables."""
    async with engine.connect() as connection:
        return await connection.run_sync(lambda sync: sa.inspect(sync).get_table_names())


def sums(found: list[MetricsRow]) -> dict[str, float]:
    """The counts of several rows together."""
    names = {name for row in found for name in row.counts}
    return {name: math.fsum(row.counts.get(name, 0.0) for row in found) for name in names}


def seen(found: list[MetricsRow]) -> dict[str, int]:
    """How many values the spreads of several rows have together."""
    counts: Counter[str] = Counter()
    for row in found:
        counts.update({name: sum(spread) for name, spread in row.spreads.items()})
    return dict(counts)


@pytest.fixture
async def sqlite(sqlite_url: str) -> AsyncIterator[AsyncEngine]:
    """The host's database, of one kind: for what does not depend on it."""
    async with host_engine(sqlite_url) as engine:
        host_database.use(engine)
        yield engine
        host_database.reset()


# Rows


async def test_a_row_has_what_was_counted(database: AsyncEngine) -> None:
    worker = Worker()
    worker.metrics.count("requests.answered")
    worker.metrics.count("requests.answered")
    worker.metrics.count("cost", 0.25)
    worker.metrics.count("cost", 0.5)
    worker.metrics.observe("seconds", 0.3)
    await worker.write()
    [row] = await rows(database)
    assert (row.at, row.seconds) == (NOON + 60, 60.0)
    assert row.counts == {"requests.answered": 2.0, "cost": 0.75}
    assert row.spreads == {"seconds": [0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0]}
    assert row.worker


@pytest.mark.parametrize(
    ("value", "bucket"),
    [
        (0, 0),
        (0.1, 0),
        (0.10001, 1),
        (0.25, 1),
        (1, 3),
        (1.5, 4),
        (249.9, 10),
        (250, 10),
        (250.1, 11),
        (1e9, 11),
    ],
)
async def test_a_value_is_in_the_first_bucket_that_holds_it(
    value: float, bucket: int, sqlite: AsyncEngine
) -> None:
    worker = Worker()
    worker.metrics.observe("seconds", value)
    await worker.write()
    [row] = await rows(sqlite)
    assert len(row.spreads["seconds"]) == len(METRIC_BOUNDS) + 1
    assert row.spreads["seconds"][bucket] == sum(row.spreads["seconds"]) == 1


async def test_each_row_has_only_what_is_new(database: AsyncEngine) -> None:
    worker = Worker()
    for number in (1, 2, 3):
        worker.metrics.count("tools", number)
        worker.metrics.observe("seconds", number)
        await worker.write(10.0 * number)
    found = await rows(database)
    assert [(row.at, row.seconds, row.counts["tools"]) for row in found] == [
        (NOON + 10, 10, 1),
        (NOON + 30, 20, 2),
        (NOON + 60, 30, 3),
    ]
    assert seen(found) == {"seconds": 3}
    assert len({row.worker for row in found}) == 1


async def test_a_quiet_minute_leaves_no_row(database: AsyncEngine) -> None:
    worker = Worker()
    await worker.write()
    assert await tables(database) == []
    worker.metrics.count("tools")
    await worker.write()
    await worker.write()
    assert [row.at for row in await rows(database)] == [NOON + 120]


async def test_rows_can_be_asked_for_from_a_time_on(database: AsyncEngine) -> None:
    worker = Worker()
    for number in range(5):
        worker.metrics.count("tools", number)
        await worker.write()
    assert [row.counts["tools"] for row in await rows(database, NOON + 180)] == [2, 3, 4]


async def test_a_row_that_cannot_be_read_is_passed_over(database: AsyncEngine) -> None:
    worker = Worker()
    for number in (1, 2, 3, 4):
        worker.metrics.count("tools", number)
        await worker.write()
    await execute(
        database,
        f"UPDATE {NAME} SET data = 'no json' WHERE at = {NOON + 60}",
        f"UPDATE {NAME} SET data = '[1]' WHERE at = {NOON + 120}",
        f'UPDATE {NAME} SET data = \'{{"counts": 7, "more": 8}}\' WHERE at = {NOON + 180}',
    )
    assert [dict(row.counts) for row in await rows(database)] == [{}, {}, {"tools": 4}]


async def test_each_function_has_a_table_of_its_own(database: AsyncEngine) -> None:
    for number, pipe_id in enumerate(("openrouter", "other", "Öther pipe"), 1):
        worker = Worker(pipe_id)
        worker.metrics.count("tools", number)
        await worker.write()
    assert len(await tables(database)) == 3
    for number, pipe_id in enumerate(("openrouter", "other", "Öther pipe"), 1):
        assert [row.counts for row in await rows(database, pipe_id=pipe_id)] == [{"tools": number}]


async def test_the_table_is_in_the_schema_of_the_host(postgres_url: str) -> None:
    async with host_engine(postgres_url) as engine:
        await execute(engine, "CREATE SCHEMA apart")
        host_database.use(engine, "apart")
        try:
            worker = Worker()
            worker.metrics.count("tools")
            await worker.write()
        finally:
            host_database.reset()
        [row] = await MetricsTable(Database(engine, "apart"), "openrouter").rows(0)
        assert row.counts == {"tools": 1}
        assert await tables(engine) == []


async def test_old_rows_go(database: AsyncEngine) -> None:
    young, old = Worker(), Worker()
    old.metrics.count("tools")
    await old.write(0.0)
    old.metrics.count("tools")
    await old.write(DAY_S)
    young.metrics.count("tools")
    await young.write(30 * DAY_S)
    assert [row.at - NOON for row in await rows(database)] == [0, DAY_S, 30 * DAY_S]
    young.metrics.count("tools")
    await young.write(DAY_S)
    assert [row.at - NOON for row in await rows(database)] == [DAY_S, 30 * DAY_S, 31 * DAY_S]
    young.metrics.count("tools")
    await young.write(1)
    assert [row.at - NOON for row in await rows(database)] == [30 * DAY_S, 31 * DAY_S, 31 * DAY_S + 1]


async def test_several_workers_write_side_by_side(sqlite: AsyncEngine) -> None:
    """The very first rows meet while the table is made: who fails then says it all with the next row."""
    await _written_by_eight(sqlite)


async def test_several_workers_write_side_by_side_into_postgresql(postgres_url: str) -> None:
    async with host_engine(postgres_url) as engine:
        host_database.use(engine)
        try:
            await _written_by_eight(engine)
        finally:
            host_database.reset()


async def _written_by_eight(engine: AsyncEngine) -> None:
    workers = [Worker() for _ in range(8)]
    for minute in range(4):
        for number, worker in enumerate(workers):
            worker.metrics.count("tools", number + 1)
            worker.metrics.observe("seconds", minute)
        await asyncio.gather(*(worker.write() for worker in workers))
    found = await rows(engine)
    assert {row.worker for row in found if row.at == NOON + 240} == {row.worker for row in found}
    assert len({row.worker for row in found}) == len(workers)
    assert sums(found) == {"tools": 4 * 36}
    assert seen(found) == {"seconds": 4 * len(workers)}


# A database that fails


async def test_what_cannot_be_written_is_in_the_next_row(database: AsyncEngine) -> None:
    worker = Worker()
    await execute(database, f"CREATE VIEW {NAME} AS SELECT 1 AS one")
    for number in (1, 2, 3):
        worker.metrics.count("tools", number)
        worker.metrics.count(f"errors.{number}")
        worker.metrics.observe("seconds", number)
        await worker.write()
    await execute(database, f"DROP VIEW {NAME}")
    worker.metrics.count("tools", 4)
    await worker.write()
    [row] = await rows(database)
    assert row.seconds == 240
    assert row.counts == {"tools": 10, "errors.1": 1, "errors.2": 1, "errors.3": 1}
    assert seen([row]) == {"seconds": 3}
    await worker.write()
    assert len(await rows(database)) == 1


@pytest.fixture
def locked(database_url: str) -> Callable[[], contextlib.AbstractAsyncContextManager[None]]:
    """Keeps everybody else from writing into the table."""
    statement = f"LOCK TABLE {NAME} IN ACCESS EXCLUSIVE MODE"
    if database_url.startswith("sqlite"):
        statement = "BEGIN IMMEDIATE"

    @contextlib.asynccontextmanager
    async def lock() -> AsyncIterator[None]:
        async with host_engine(database_url) as engine, engine.connect() as connection:
            await connection.exec_driver_sql(statement)
            yield
            await connection.rollback()

    return lock


async def worker_that_has_counted() -> Worker:
    """One tool is in a row already, two more and two seconds are not."""
    worker = Worker()
    worker.metrics.count("tools")
    await worker.write()
    worker.metrics.count("tools", 2)
    worker.metrics.observe("seconds", 2)
    return worker


async def test_a_database_that_hangs_loses_nothing(database: AsyncEngine, locked: Any) -> None:
    worker = await worker_that_has_counted()
    async with locked():
        async with asyncio.timeout(PATIENCE_S):
            writing = asyncio.create_task(worker.write())
            await asyncio.sleep(0)
            worker.metrics.count("tools", 4)  # counting goes on meanwhile
            worker.metrics.observe("seconds", 4)
            await writing
    assert [row.counts for row in await rows(database)] == [{"tools": 1}]
    await worker.write()
    _, row = await rows(database)
    assert (row.counts, row.seconds, seen([row])) == ({"tools": 6}, 120, {"seconds": 2})


async def test_a_write_that_is_called_off_loses_nothing(database: AsyncEngine, locked: Any) -> None:
    """So it goes when a function is saved while its housekeeping waits for the database."""
    worker = await worker_that_has_counted()
    async with locked():
        writing = asyncio.create_task(worker.write())
        await asyncio.sleep(0)
        writing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await writing
    await worker.write()
    found = await rows(database)
    assert (sums(found), seen(found)) == ({"tools": 3}, {"seconds": 1})


async def test_a_table_that_is_dropped_comes_back(database: AsyncEngine) -> None:
    worker = Worker()
    for number in (1, 2):
        worker.metrics.count("tools", number)
        await worker.write()
        found = await rows(database)
        assert sums(found) == {"tools": number}
        await execute(database, f"DROP TABLE {NAME}")


async def test_without_a_database_counting_goes_on(sqlite_url: str) -> None:
    worker = Worker()
    for number in range(3):
        worker.metrics.count("tools", number)
        await worker.write()
    terminal = Metrics(OpenWebUIHost(version=None), "openrouter")
    terminal.count("tools")
    await terminal.write()
    async with host_engine(sqlite_url) as engine:
        host_database.use(engine)
        try:
            await worker.write()
            [row] = await rows(engine)
        finally:
            host_database.reset()
    assert (row.counts, row.seconds) == ({"tools": 3}, 240)


# OpenTelemetry, of which Open WebUI brings the package: here something with the same two instruments


class Meter:
    """A meter that keeps what it is told."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.made: list[str] = []
        self.told: list[tuple[str, float]] = []

    def create_counter(self, name: str) -> Any:
        """An instrument for sums."""
        self.made.append(f"counter {name}")
        return SimpleNamespace(add=lambda amount: self.told.append((name, amount)))

    def create_histogram(self, name: str) -> Any:
        """An instrument for values."""
        self.made.append(f"histogram {name}")
        return SimpleNamespace(record=lambda value: self.told.append((name, value)))


@pytest.fixture
def meters(monkeypatch: pytest.MonkeyPatch) -> list[Meter]:
    """The meters that have been asked for, where the server has OpenTelemetry."""
    made: list[Meter] = []

    def get_meter(name: str) -> Meter:
        made.append(Meter(name))
        return made[-1]

    package, module = ModuleType("opentelemetry"), ModuleType("opentelemetry.metrics")
    package.__dict__["metrics"], module.__dict__["get_meter"] = module, get_meter
    monkeypatch.setitem(sys.modules, "opentelemetry", package)
    monkeypatch.setitem(sys.modules, "opentelemetry.metrics", module)
    return made


@pytest.mark.parametrize("is_on", [True, False])
def test_the_servers_meter_gets_it_where_the_server_exports_metrics(
    is_on: bool, meters: list[Meter], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("open_webui.env.ENABLE_OTEL_METRICS", is_on, raising=False)
    worker = Worker()
    for number in (1, 2):
        worker.metrics.count("tools", number)
        worker.metrics.observe("seconds", number / 2)
    if not is_on:
        assert meters == []
        return
    [meter] = meters
    assert meter.name == "openrouter_responses_pipe"
    assert meter.made == ["counter openrouter.tools", "histogram openrouter.seconds"]
    assert meter.told == [
        ("openrouter.tools", 1),
        ("openrouter.seconds", 0.5),
        ("openrouter.tools", 2),
        ("openrouter.seconds", 1.0),
    ]


async def test_a_request_tells_the_servers_meter(
    meters: list[Meter], simulator: Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("open_webui.env.ENABLE_OTEL_METRICS", True, raising=False)
    async with running_pipe(simulator.base_url) as pipe:
        assert (await ask(pipe, "hello")).error == ""
    [meter] = meters
    told = dict(meter.told)
    assert told["openrouter.requests.answered"] == 1
    assert told["openrouter.cost"] > 0
    assert {"openrouter.seconds", "openrouter.first_token_seconds"} <= told.keys()


# What a request adds


@contextlib.asynccontextmanager
async def counting(
    simulator: Simulator, engine: AsyncEngine, **valves: Any
) -> AsyncIterator[tuple[Pipe, list[MetricsRow]]]:
    """A pipe, and what it has counted when it has ended."""
    found: list[MetricsRow] = []
    async with running_pipe(simulator.base_url, **valves) as pipe:
        yield pipe, found
    found += await rows(engine)


@pytest.mark.parametrize("dialect", sorted(DIALECTS))
async def test_an_answer_adds_its_tokens_cost_and_times(
    dialect: str, simulator: Simulator, sqlite: AsyncEngine
) -> None:
    async with counting(simulator, sqlite) as (pipe, found):
        answers = [await ask(pipe, "hello", dialect) for _ in range(3)]
    counts = sums(found)
    assert counts.pop("requests.answered") == 3
    usages = [answer.usage or {} for answer in answers]
    for name, other in (("input_tokens", "prompt_tokens"), ("output_tokens", "completion_tokens")):
        assert counts.pop(name) == sum(usage.get(name) or usage[other] for usage in usages)
    assert counts.pop("cost") == pytest.approx(sum(usage["cost"] for usage in usages))
    details = [usage.get("input_tokens_details") or usage["prompt_tokens_details"] for usage in usages]
    cached = sum(detail["cached_tokens"] for detail in details)
    assert counts.pop("cached_tokens", 0) == cached
    assert counts == {}
    assert seen(found) == {"seconds": 3, "first_token_seconds": 3, "waiting_requests": 3}


async def test_cached_and_reasoning_tokens(simulator: Simulator, sqlite: AsyncEngine) -> None:
    async with counting(simulator, sqlite) as (pipe, found):
        simulator.next("golden", name=CACHED)
        answer = await ask(pipe, "hello", model="openrouter.openai/gpt-5-mini")
    usage = answer.usage or {}
    assert usage["input_tokens_details"]["cached_tokens"] > 0
    counts = sums(found)
    assert counts["cached_tokens"] == usage["input_tokens_details"]["cached_tokens"]
    assert counts["reasoning_tokens"] == usage["output_tokens_details"]["reasoning_tokens"] > 0


async def test_tools_and_those_that_fail(simulator: Simulator, sqlite: AsyncEngine) -> None:
    """Over all rounds: two calls, one of which fails, then one more."""
    async with counting(simulator, sqlite) as (pipe, found):
        prompt = script([step(a=1, b=2), step("fail")], [step(a=3, b=4)])
        answer = await call(pipe, given_for(prompt))
    assert answer.error == ""
    counts = sums(found)
    assert (counts["tools"], counts["tools_failed"], counts["requests.answered"]) == (3, 1, 1)
    assert counts["input_tokens"] > 0
    assert len(inferences(simulator)) == 3


@pytest.mark.parametrize("dialect", ["browser", "browser_json", "api_stream", "api_json"])
async def test_further_tries(dialect: str, simulator: Simulator, sqlite: AsyncEngine) -> None:
    async with counting(simulator, sqlite, RETRY_ATTEMPTS=3) as (pipe, found):
        simulator.next("http_error", name="529_overloaded", retry_after=0, times=2)
        assert (await ask(pipe, "hello", dialect)).error == ""
    assert len(inferences(simulator)) == 3
    counts = sums(found)
    assert (counts["retries"], counts["requests.answered"]) == (2, 1)
    assert [name for name in counts if name.startswith("errors.")] == []


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("401_bad_key", "authentication"),
        ("402_credits", "credits"),
        ("403_moderation", "moderation"),
        ("429_free_daily", "daily_limit"),
        ("502_provider", "provider"),
    ],
)
async def test_a_failure_adds_its_kind(
    name: str, kind: str, simulator: Simulator, sqlite: AsyncEngine
) -> None:
    async with counting(simulator, sqlite) as (pipe, found):
        for _ in range(2):
            simulator.next("http_error", name=name)
            assert (await ask(pipe, "hello")).error
    assert sums(found) == {"requests.failed": 2, f"errors.{kind}": 2}
    assert seen(found) == {"waiting_requests": 2}  # times of answers only


class Broken(dict[str, Any]):
    """Something of the host's that is not what it was."""

    def get(self, *_name: Any) -> Any:
        """Fail."""
        raise RuntimeError("the host has changed")


async def test_a_bug_is_a_failure(simulator: Simulator, sqlite: AsyncEngine) -> None:
    async with counting(simulator, sqlite) as (pipe, found):
        answer = await ask(pipe, {"messages": [Broken(role="user", content="hello")]})
        assert answer.error.startswith("Something went wrong inside")
    assert sums(found)["requests.failed"] == 1


async def test_the_kinds_of_errors_are_as_many_as_the_failures(
    simulator: Simulator, sqlite: AsyncEngine
) -> None:
    async with counting(simulator, sqlite) as (pipe, found):
        await ask(pipe, {"messages": [Broken(role="user", content="hello")]})
        await ask(pipe, "[[http_error name=500_masked]]")
    counts = sums(found)
    assert counts["requests.failed"] == 2
    assert sum(amount for name, amount in counts.items() if name.startswith("errors.")) == 2
    assert counts["errors.internal"] == 1


async def test_a_stop(simulator: Simulator, sqlite: AsyncEngine) -> None:
    async with counting(simulator, sqlite) as (pipe, found):
        simulator.next("stall", hang=12)
        chunks = await stream(pipe, "hello")
        await read_until_text(chunks, Answer())
        await chunks.aclose()
        await simulator.wait_until(lambda sim: sim.open == 0)
    assert sums(found) == {"requests.stopped": 1}
    assert seen(found) == {"waiting_requests": 1}


async def test_a_refusal(simulator: Simulator, sqlite: AsyncEngine) -> None:
    """What the check of the start keeps out; the check itself is no request."""
    valves: Json = {"ENABLE_STARTUP_CHECKS": True, "API_KEY": "sk-bad-key"}
    async with counting(simulator, sqlite, **valves) as (pipe, found):
        async with asyncio.timeout(PATIENCE_S):
            while not (await ask(pipe, "hello")).error.startswith("Service unavailable"):
                pass
        assert (await ask(pipe, "hello")).error.startswith("Service unavailable")
    counts = sums(found)
    assert counts["requests.refused"] == 2
    assert set(counts) <= {"requests.refused", "requests.failed", "errors.authentication"}


async def test_what_was_replaced_writes_what_it_has_counted(
    simulator: Simulator, sqlite: AsyncEngine
) -> None:
    """Two instances one after the other: each leaves a row, none is counted twice."""
    for _ in range(2):
        async with running_pipe(simulator.base_url) as pipe:
            assert (await ask(pipe, "[[plain text=fine]]")).text == "fine"
    found = await rows(sqlite)
    assert sums(found)["requests.answered"] == 2
    assert len({row.worker for row in found if row.counts.get("requests.answered")}) == 2


async def test_counting_waits_for_nothing(
    simulator: Simulator, database: AsyncEngine, locked: Any, pipe: Pipe
) -> None:
    """A chat is answered while the table is locked."""
    worker = Worker()
    worker.metrics.count("tools")
    await worker.write()
    set_valves(pipe, simulator.base_url, ENABLE_ARTIFACT_STORE=False)
    async with locked(), asyncio.timeout(4):
        assert (await call(pipe, arguments("hello"))).error == ""
    await pipe.aclose()
    assert sums(await rows(database))["requests.answered"] == 1


async def test_what_is_written_is_json_for_anybody(sqlite: AsyncEngine) -> None:
    worker = Worker()
    worker.metrics.count("cost", 0.1)
    worker.metrics.observe("seconds", 1)
    await worker.write()
    async with sqlite.connect() as connection:
        [text] = (await connection.execute(sa.text(f"SELECT data FROM {NAME}"))).scalars()
    assert json.loads(text) == {
        "counts": {"cost": 0.1},
        "spreads": {"seconds": [0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0]},
    }
