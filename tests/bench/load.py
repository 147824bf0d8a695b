"""More chats than may run: what waiting costs, who is let in first, and how soon the others are sent away.

The simulator runs in a process of its own; this one, with the pipe, is kept on one core.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any, Final

from tests.bench.hosting import MODEL, Loaded, error_of, set_valves, text_of
from tests.bench.report import Figure
from tests.bench.streaming import TOKENS_PER_SECOND, PipeReader, Rounds, installed
from tests.bench.ticker import Ticker
from tests.footprint import resident_mb

CHATS: Final = 500
USERS: Final = 50
RUNNING: Final = 200
OFFERED: Final = 5_000
QUEUE: Final = 500
REFUSED: Final = OFFERED - RUNNING - QUEUE
HELD: Final = "[[stall]]"


@dataclass
class Visit:
    """One chat of one person, and what came of it."""

    user: str
    text: str = ""
    error: str = ""
    seconds: float = 0.0  # from the call to the end

    async def make(self, loaded: Loaded, question: str) -> None:
        """Ask, and read to the end."""
        body = {
            "model": f"{loaded.function_id}.{MODEL}",
            "messages": [{"role": "user", "content": question}],
            "stream": True,
        }
        ids = {"chat_id": f"chat {id(self)}", "message_id": "m", "session_id": "s", "user_id": self.user}
        user = {"id": self.user, "name": self.user, "email": "u@example.org", "role": "user"}
        started = time.perf_counter()
        pieces: list[str] = []
        async for event in await loaded.pipe.pipe(body, user, ids, _ignore):
            pieces.append(text_of(event))
            self.error = self.error or error_of(event)
        self.seconds = time.perf_counter() - started
        self.text = "".join(pieces)


async def _ignore(_event: dict[str, Any]) -> None:
    return None


@contextlib.contextmanager
def one_core() -> Iterator[None]:
    """Keep this process on one core; servers that were started before stay where they are."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(cores)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


@dataclass(frozen=True)
class Crowd:
    """What came of one crowd."""

    failures: int
    lag_p99_s: float
    spread: int
    resident_mb: float


class LoadBench(Rounds):
    """Both measurements against one simulator."""

    def __init__(self, base_url: str, rounds: int, quick: bool, say: Callable[[str], None]) -> None:
        super().__init__(base_url, min(rounds, 3), quick, say)
        self._tokens = TOKENS_PER_SECOND * (2 if quick else 6)

    async def figures(self) -> list[Figure]:
        """Measure."""
        loaded = installed(self._base_url)
        valves = {"API_KEY": "sk-bench", "BASE_URL": self._base_url}
        set_valves(loaded, **valves, MAX_CONCURRENT_REQUESTS=RUNNING)
        reader = PipeReader(loaded)
        try:
            with one_core():
                await Visit("warm").make(loaded, "[[plain text=warm]]")
                crowds: list[Crowd] = []
                for number in range(self._rounds + 1):  # the first one only takes its memory
                    self._say(f"{CHATS} chats, {RUNNING} at a time: round {number} of {self._rounds}")
                    crowds.append(await self._crowd(loaded))
                floods: list[list[Visit]] = []
                for number in range(self._rounds):
                    self._say(f"{OFFERED} chats at once: round {number + 1} of {self._rounds}")
                    floods.append(await self._flood(loaded))
            return [*_crowd_figures(crowds), *_flood_figures(floods)]
        finally:
            await reader.aclose()

    async def _crowd(self, loaded: Loaded) -> Crowd:
        """Each person comes with all of their chats at once."""
        await self.control("reset", {})
        drip = f"[[drip rate={TOKENS_PER_SECOND} tokens={self._tokens}]]"
        visits = [Visit(f"user{number * USERS // CHATS}") for number in range(CHATS)]
        async with Ticker() as lags:
            await asyncio.gather(*(visit.make(loaded, f"{drip} {visit.user}") for visit in visits))
        whole = "".join(f"word{number} " for number in range(self._tokens))
        failures = sum(visit.text != whole or bool(visit.error) for visit in visits)
        spread = _spread([record["body"] for record in (await self.control("requests"))["requests"]])
        del visits
        return Crowd(failures, lags.p99_s, spread, resident_mb())

    async def _flood(self, loaded: Loaded) -> list[Visit]:
        visits = [Visit(f"user{number % USERS}") for number in range(OFFERED)]
        tasks = [asyncio.create_task(visit.make(loaded, HELD)) for visit in visits]
        with contextlib.suppress(TimeoutError):  # then there are fewer than there should be
            async with asyncio.timeout(20):
                while sum(map(asyncio.Task.done, tasks)) < REFUSED:  # noqa: ASYNC110 - looked at from aside
                    await asyncio.sleep(0.05)
        await asyncio.sleep(0.5)  # nor may there be more
        refused = [visit for visit, task in zip(visits, tasks, strict=True) if task.done()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return refused


def _spread(bodies: list[Any]) -> int:
    """By how many chats those who had to wait differ, when two thirds of what waited has been let in."""
    users = [body["input"][-1]["content"] for body in bodies if body and "input" in body]
    names = [
        (text if isinstance(text, str) else "".join(part.get("text", "") for part in text)).split()[-1]
        for text in users
    ]
    waited = {f"user{number}" for number in range(RUNNING * USERS // CHATS, USERS)}
    let_in = Counter(name for name in names[: 2 * RUNNING] if name in waited)
    counts = [let_in[name] for name in waited]
    return max(counts) - min(counts)


def _crowd_figures(crowds: list[Crowd]) -> list[Figure]:
    name = f"{CHATS} chats at {TOKENS_PER_SECOND} tokens/s, {RUNNING} at a time"
    warm, *measured = crowds
    grown = measured[-1].resident_mb / warm.resident_mb
    lag = median(crowd.lag_p99_s for crowd in measured) * 1e3
    return [
        Figure(f"{name}: failures", sum(crowd.failures for crowd in crowds), "", limit=0),
        Figure(f"{name}: event loop lag p99", lag, "ms", limit=25),
        Figure(f"{name}: unfairness", max(crowd.spread for crowd in crowds), "chats", limit=2),
        Figure(f"{name}: memory at the end", measured[-1].resident_mb, "MB", grown, 1.05),
    ]


def _flood_figures(floods: list[list[Visit]]) -> list[Figure]:
    name = f"{OFFERED:,} chats at once, {RUNNING} at a time"
    off = max(abs(len(refused) - REFUSED) for refused in floods)
    unkind = sum("The server is busy" not in visit.error for refused in floods for visit in refused)
    slowest = median(max((visit.seconds for visit in refused), default=0.0) for refused in floods)
    return [
        Figure(f"{name}: refused, less {REFUSED:,}", off, "", limit=0),
        Figure(f"{name}: refused in other words", unkind, "", limit=0),
        Figure(f"{name}: slowest refusal", slowest * 1e3, "ms", limit=100),
    ]
