"""How long the event loop keeps everybody waiting, as seen by a task that only wants to run every 5 ms."""

from __future__ import annotations

import asyncio
import time
from types import TracebackType
from typing import Final, Self

PERIOD_S: Final = 0.005


class Ticker:
    """While entered, notes in `worst_s` by how much the latest tick of all came late."""

    def __init__(self) -> None:
        self.worst_s = 0.0
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
            self.worst_s = max(self.worst_s, time.perf_counter() - due)
