"""Open WebUI as many people use it: two workers, PostgreSQL and Redis.

async def test_…(big_host: BigHost) -> None:
    async with Tab.open(big_host.admin) as tab:
        turn = await tab.ask(question, MODEL)
        await turn.done()
    big_host.worker_of(turn)  # the process that answered
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import redis
from psycopg.rows import dict_row

from openrouter_responses_pipe.webui import WebUIClient, WebUIServer
from tests.e2e import which_worker
from tests.e2e.driver import Json, Turn
from tests.e2e.host import NO_PIP, Host, set_up
from tests.engines import PostgresServer, RedisServer, connected, redis_server

WORKERS: Final = 2
_FILTER_ID: Final = "which_worker"
_ARTIFACTS: Final = "pipe_openrouter_artifacts"
# As in Open WebUI's slim image, which makes no embeddings itself: loading these is half of the start and
# half of the memory of each worker. Nor has it a vector database, which two workers cannot make at once.
_SLIM: Final = {"USE_SLIM_DOCKER": "true"}
_LEFT_OUT: Final = ("torch", "transformers", "sentence_transformers")


class BigServer(WebUIServer):
    """Open WebUI with its workers, on a database that is made ready before they start.

    Left to themselves, on an empty database, all of them write the defaults at once, and all but one fail.
    """

    code = """
import asyncio, os, sys
os.environ["FROM_INIT_PY"] = "true"  # as its own command does: its pages are where pip puts them
import uvicorn
from open_webui import config
from open_webui.env import UVICORN_WORKERS
from open_webui.internal.db import async_engine

async def make_ready():
    await config.seed_registered_defaults()
    await async_engine.dispose()

asyncio.run(make_ready())
uvicorn.run("open_webui.main:app", host=sys.argv[3], port=int(sys.argv[5]), workers=UVICORN_WORKERS,
            forwarded_allow_ips="*", timeout_worker_healthcheck=60)
"""

    def answers(self) -> bool:
        """Tell whether all workers take requests: one that is late would get none."""
        started = self.log.read_text(encoding="utf-8", errors="replace").count("Scheduler worker started")
        return started >= WORKERS and super().answers()


@dataclass(frozen=True)
class BigHost(Host):
    """A running Open WebUI with two workers, and what it stands on."""

    database_url: str
    redis_server: RedisServer
    journal: Path

    def worker_of(self, turn: Turn) -> int:
        """The process that answered this turn."""
        lines = map(json.loads, self.journal.read_text(encoding="utf-8").splitlines())
        (worker,) = {line["worker"] for line in lines if line["message_id"] == turn.message_id}
        return worker

    def artifacts(self) -> list[Json]:
        """The rows that the pipe has stored in PostgreSQL, by column."""
        with connected(self.database_url) as connection:
            cursor = connection.cursor(row_factory=dict_row)
            return cursor.execute(f"SELECT * FROM {_ARTIFACTS}".encode()).fetchall()

    @contextlib.contextmanager
    def redis(self) -> Iterator[redis.Redis]:
        """A client of its Redis that reads bytes."""
        with redis.Redis.from_url(self.redis_server.url) as client:
            yield client


@contextlib.contextmanager
def running_big_host(
    folder: Path, base_url: str, python: Path, postgres: PostgresServer
) -> Iterator[BigHost]:
    """Start it (it takes twenty seconds) with the pipe installed; logs and journal lie in `folder`."""
    server = BigServer(folder / "open-webui", python=python)
    with redis_server(folder / "redis") as redis, postgres.database() as database_url:
        try:
            server.launch(_settings(folder, database_url, redis.url))
            server.wait_ready()
            admin, user = set_up(server, base_url)
            journal = folder / "workers.jsonl"
            _install_filter(admin, journal)
            yield BigHost(server, admin, user, base_url, database_url, redis, journal)
        finally:
            server.stop()


def _settings(folder: Path, database_url: str, redis_url: str) -> dict[str, str]:
    left_out = folder / "left-out"
    left_out.mkdir(parents=True)
    for package in _LEFT_OUT:
        (left_out / f"{package}.py").write_text("raise ImportError('left out')\n", encoding="utf-8")
    return {
        **NO_PIP,
        **_SLIM,
        "PYTHONPATH": str(left_out),
        "UVICORN_WORKERS": str(WORKERS),
        "DATABASE_URL": database_url,
        "REDIS_URL": redis_url,
        "WEBSOCKET_MANAGER": "redis",
        "WEBSOCKET_REDIS_URL": redis_url,
    }


def _install_filter(admin: WebUIClient, journal: Path) -> None:
    source = Path(which_worker.__file__).read_text(encoding="utf-8")
    admin.install_function(source.replace('JOURNAL = ""', f"JOURNAL = {str(journal)!r}"), _FILTER_ID)
    admin.request("POST", f"/api/v1/functions/id/{_FILTER_ID}/toggle/global")
