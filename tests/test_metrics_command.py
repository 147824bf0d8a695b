"""`metrics` as an administrator uses it: what is typed, what is printed, how it ends.

The rows were written by real workers.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any, Final

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine

from openrouter_responses_pipe.metrics import quantile
from openrouter_responses_pipe.openrouter_responses_pipe import Metrics, OpenWebUIHost
from openrouter_responses_pipe.simulator import Simulator
from pytest_bootstrap import host_database
from tests.commands import Command, shell
from tests.engines import host_engine
from tests.support import ask, running_pipe

Json = dict[str, Any]
HOUR_S: Final = 3_600
NOTHING: Final = {"count": 0, "median": None, "p95": None}


class MetricsCommand:
    """The command, given its arguments as from a shell."""

    def __init__(self, command: Command) -> None:
        self._command = command

    async def __call__(self, url: str, *options: str) -> tuple[int, str, str]:
        """(exit status, what was printed, what was said of errors)."""
        return await self._command("metrics", url, *options)

    async def facts(self, url: str, *options: str) -> Json:
        """What is printed for machines."""
        return await self._command.facts("metrics", url, *options)


@pytest.fixture
def metrics(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[MetricsCommand]:
    """The command, in a shell where nothing of a server is set."""
    with shell(monkeypatch):
        yield MetricsCommand(Command(capsys))


@pytest.fixture
def url(database_url: str) -> str:
    """The address of the database as Open WebUI's DATABASE_URL has it."""
    return database_url.replace("+aiosqlite", "").replace("+psycopg", "")


async def worked(
    counts: Json, spreads: dict[str, list[float]] | None = None, *, hours_ago: float = 0.0
) -> None:
    """A worker leaves a row."""
    worker = Metrics(OpenWebUIHost(), "openrouter", now=lambda: time.time() - hours_ago * HOUR_S)
    for name, amount in counts.items():
        worker.count(name, amount)
    for name, values in (spreads or {}).items():
        for value in values:
            worker.observe(name, value)
    await worker.write()


async def test_the_rows_of_all_workers_are_added_up(
    metrics: MetricsCommand, database: AsyncEngine, url: str
) -> None:
    seconds = {"seconds": [0.2] * 10, "first_token_seconds": [0.05] * 10}
    await worked({"requests.answered": 1_200, "input_tokens": 5_000, "cost": 0.125, "tools": 4}, seconds)
    await worked({"requests.answered": 34, "requests.failed": 3, "errors.network": 2, "errors.server": 1})
    more = {"output_tokens": 70, "cached_tokens": 9, "reasoning_tokens": 8, "cost": 0.25}
    await worked({"requests.stopped": 5, "requests.refused": 6, "errors.credits": 2, **more}, hours_ago=23)
    await worked({"tools": 1, "tools_failed": 1, "retries": 7}, {"seconds": [1e9] * 30}, hours_ago=1)
    await worked({"requests.answered": 99, "cost": 99.0}, {"seconds": [1.0]}, hours_ago=25)
    assert await metrics.facts(url) == {
        "table": "pipe_openrouter_metrics",
        "hours": 24.0,
        "rows": 4,
        "workers": 4,
        "requests": {"answered": 1_234, "failed": 3, "stopped": 5, "refused": 6},
        "errors": {"credits": 2, "network": 2, "server": 1},
        "tokens": {
            "input_tokens": 5_000,
            "cached_tokens": 9,
            "output_tokens": 70,
            "reasoning_tokens": 8,
        },
        "cost": 0.375,
        "tools": {"calls": 5, "failed": 1},
        "retries": 7,
        "spreads": {
            "first_token_seconds": {"count": 10, "median": 0.05, "p95": 0.095},
            "seconds": {"count": 40, "median": None, "p95": None},
            "waiting_requests": NOTHING,
        },
    }
    status, out, err = await metrics(url)
    assert (status, err) == (0, "")
    assert out.startswith("pipe_openrouter_metrics: 1,248 requests in the last 24 hours, 4 workers\n")
    lines = [line.split() for line in out.splitlines()]
    for line in (
        "answered 1,234",
        "network 2",
        "of these cached 9",
        "calls of tools 5",
        "cost $0.3750",
        "to the first token 10 0.05 s 0.10 s",
        "to the end 40 over 250 s over 250 s",
        "waiting requests 0 - -",
    ):
        assert line.split() in lines
    assert await metrics.facts(url, "--hours", "0.5") != await metrics.facts(url)
    assert (await metrics.facts(url, "--hours", "25.5"))["requests"]["answered"] == 1_333


async def test_what_a_pipe_has_counted(
    metrics: MetricsCommand, database: AsyncEngine, url: str, simulator: Simulator
) -> None:
    async with running_pipe(simulator.base_url, RETRY_ATTEMPTS=1) as pipe:
        usage = (await ask(pipe, "hello")).usage or {}
        simulator.next("http_error", name="429_upstream", retry_after=0)
        await ask(pipe, "[[http_error name=402_credits]]")
    facts = await metrics.facts(url)
    assert facts["requests"] == {"answered": 1, "failed": 1, "stopped": 0, "refused": 0}
    assert (facts["errors"], facts["retries"]) == ({"credits": 1}, 1)
    assert facts["tokens"]["input_tokens"] == usage["input_tokens"]
    assert facts["cost"] == pytest.approx(usage["cost"])
    assert facts["spreads"]["seconds"]["count"] == 1
    assert facts["spreads"]["waiting_requests"]["count"] == 2


async def test_no_rows_are_no_error(metrics: MetricsCommand, database: AsyncEngine, url: str) -> None:
    await worked({"tools": 1}, hours_ago=48)
    facts = await metrics.facts(url)
    assert (facts["rows"], facts["workers"], sum(facts["requests"].values())) == (0, 0, 0)
    assert facts["spreads"]["seconds"] == NOTHING
    assert (await metrics(url))[1].startswith("pipe_openrouter_metrics: 0 requests in the last 24 hours")


async def test_rows_that_nobody_understands_count_nothing(
    metrics: MetricsCommand, database: AsyncEngine, url: str
) -> None:
    await worked({"requests.answered": 1})
    odd = {
        "counts": {"requests.answered": "many", "cost": None, "tools": [1], "requests.failed": 2},
        "spreads": {"seconds": [1, 2], "first_token_seconds": ["x"] * 12, "waiting_requests": 5},
    }
    async with database.begin() as connection:
        for number, data in enumerate((json.dumps(odd), "no json", "[]", "null")):
            values = f"('odd-{number}', {time.time()}, 60, '{data}')"
            await connection.execute(sa.text(f"INSERT INTO pipe_openrouter_metrics VALUES {values}"))
    facts = await metrics.facts(url)
    assert facts["requests"] == {"answered": 1, "failed": 2, "stopped": 0, "refused": 0}
    assert (facts["cost"], facts["tools"]["calls"]) == (0, 0)
    assert set(map(str, facts["spreads"].values())) == {str(NOTHING)}


async def test_a_schema_and_another_function(metrics: MetricsCommand, postgres_url: str) -> None:
    address = postgres_url.replace("+psycopg", "")
    async with host_engine(postgres_url) as engine:
        async with engine.begin() as connection:
            await connection.execute(sa.text("CREATE SCHEMA apart"))
        host_database.use(engine, "apart")
        try:
            await worked({"requests.answered": 7})
        finally:
            host_database.reset()
    assert (await metrics.facts(address, "--schema", "apart"))["requests"]["answered"] == 7
    assert await metrics(address, "--schema", "apart", "--id", "other") == (
        1,
        "",
        "There is no table pipe_other_metrics in the schema apart. "
        "There is pipe_openrouter_metrics: --id names the function.\n",
    )
    assert (await metrics(address))[2] == "There is no table pipe_openrouter_metrics in this database.\n"


async def test_nothing_is_made(metrics: MetricsCommand, database: AsyncEngine, url: str) -> None:
    async with database.begin() as connection:
        await connection.execute(sa.text("CREATE TABLE other (id INTEGER)"))
    assert (await metrics(url))[0] == 1
    async with database.connect() as connection:
        names = await connection.run_sync(lambda sync: sa.inspect(sync).get_table_names())
    assert names == ["other"]


@pytest.mark.parametrize("hours", ["0", "-1", "nan", "inf", "a day"])
async def test_hours_that_are_none(hours: str, metrics: MetricsCommand) -> None:
    status, out, err = await metrics("sqlite:///x.db", f"--hours={hours}")
    assert (status, out) == (2, "")
    assert "a number of hours, more than 0, is expected" in err


async def test_no_database_is_wrong_usage(metrics: MetricsCommand) -> None:
    assert await metrics("") == (2, "", "Name Open WebUI's database with --database or in DATABASE_URL.\n")


@pytest.mark.parametrize(
    ("spread", "share", "value"),
    [
        ([0] * 12, 0.5, None),
        ([4, *[0] * 11], 0.5, 0.05),
        ([4, *[0] * 11], 1.0, 0.1),
        ([0, 0, 0, 0, 10, *[0] * 7], 0.5, 1.75),
        ([5, 5, *[0] * 10], 0.5, 0.1),
        ([5, 0, 0, 5, *[0] * 8], 0.6, 0.6),
        ([*[0] * 10, 1, 0], 0.5, 175.0),
        ([1, *[0] * 10, 19], 0.95, None),
        ([19, *[0] * 10, 1], 0.95, 0.1),
    ],
)
def test_an_estimate_lies_in_its_bucket(spread: list[int], share: float, value: float | None) -> None:
    assert quantile(spread, share) == value
