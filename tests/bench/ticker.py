"""How long the event loop keeps everybody waiting, as seen by a task that only wants to run every 5 ms."""

from __future__ import annotations

import asyncio
import time
from statistics import quantiles
from types import TracebackType
from typing import Final, Self

PERIOD_S: Final = 0.005


class Ticker:
    """While entered, notes by how much each tick comes late."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._tick())
        await asyncio.sleep(0)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.sleep(PERIOD_S)  # what the last callback took counts too
        assert self._task is not None
        self._task.cancel()
        await asyncio.wait([self._task])

    async def _tick(self) -> None:
        while True:
            due = time.perf_counter() + PERIOD_S
            await asyncio.sleep(PERIOD_S)
            self.seconds.append(time.perf_counter() - due)

    @property
    def worst_s(self) -> float:
        """The latest of all."""
        return max(self.seconds, default=0.0)

    @property
    def p99_s(self) -> float:
        """What 99 of 100 ticks kept below."""
        return quantiles(self.seconds, n=100)[-1]
