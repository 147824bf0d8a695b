"""One chat that several workers answer, on PostgreSQL and Redis: each knows what the others have thought."""

from __future__ import annotations

from collections import Counter
from typing import Final

import pytest

from tests.e2e.big_host import WORKERS, BigHost
from tests.e2e.driver import Tab, Turn, until
from tests.e2e.test_e2e_reasoning import ask, received, thinking
from tests.e2e.upstream import Json, Upstream
from tests.engines import connected
from tests.test_reasoning_replay import message, said

# Each request is a connection of its own, which the kernel gives to any worker. The least that one of
# two has got was every fifth: then sixty are too few once in ten thousand runs.
MOST_TURNS: Final = 60
TURNS_OF_EACH: Final = 2


async def turns_of_all_workers(tab: Tab, big_host: BigHost, upstream: Upstream) -> list[Turn]:
    """Ask in one chat until each worker has answered twice.

    Every request must be the one before and what was answered to it, whoever answered.
    """
    turns: list[Turn] = []
    answered: Counter[int] = Counter()
    past: list[Json] = []
    sent: list[Json] = []
    for number in range(MOST_TURNS):
        output = [thinking(number), message(f"Answer {number}.")]
        turns.append(await ask(tab, upstream, output, turns[-1] if turns else None))
        assert received(upstream) == past
        before, sent = sent, upstream.last()["body"]["input"]
        assert sent[: len(before)] == before
        past += [thinking(number), said(f"Answer {number}.")]
        answered[big_host.worker_of(turns[-1])] += 1
        if len(answered) == WORKERS and min(answered.values()) >= TURNS_OF_EACH:
            return turns
    pytest.fail(f"turns of each worker: {answered}")


async def test_workers_share_what_was_thought(big_host: BigHost, upstream: Upstream) -> None:
    async with Tab.open(big_host.admin) as tab:
        turns = await turns_of_all_workers(tab, big_host, upstream)
        with connected(big_host.database_url) as connection:
            chat = connection.execute("SELECT id FROM chat WHERE id = %s", [turns[0].chat_id])
            assert chat.fetchall(), "the chat lies in this database"
    rows = await until(lambda: rows_of_all(turns, big_host), "a row of each turn in PostgreSQL")
    with big_host.redis() as client:
        assert any(list(client.scan_iter(f"*{row['ulid']}")) for row in rows), "rows were in Redis first"


def rows_of_all(turns: list[Turn], big_host: BigHost) -> list[Json]:
    """The rows of these turns, when each has one."""
    wanted = {turn.message_id for turn in turns}
    rows = [row for row in big_host.artifacts() if row["message_id"] in wanted]
    return rows if {row["message_id"] for row in rows} == wanted else []
