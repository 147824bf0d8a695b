"""People who ask beside each other, and what each of them is told while they wait.

    async with People.of(pipe) as people:
        first = people.ask("[[plain text=fine]]", user="ann")
        await first.until_told("Waiting")

Nothing here looks into the pipe: that somebody waits is known from the status that says so.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import re
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any, Final

from openrouter_responses_pipe.openrouter_responses_pipe import Pipe
from openrouter_responses_pipe.simulator import Simulator
from tests.support import PATIENCE_S, Answer, Events, arguments, inferences

Json = dict[str, Any]
BUSY: Final = "The server is busy"
HELD: Final = "[[stall]]"  # an answer that begins and then says nothing until somebody presses Stop
_PLACE_RE: Final = re.compile(
    r"Waiting for a free place: (?:(this request is the next)|(1) request is before this one"
    r"|([2-9]|\d\d+) requests are before this one)"
)
_NUMBERS: Final = itertools.count(1)


def place_in(description: str) -> int | None:
    """How many requests are before this one, if the status says so."""
    match = _PLACE_RE.fullmatch(description)
    if match is None:
        return None
    return 0 if match[1] else int(match[2] or match[3])


class Told(Events):
    """An event emitter that can be waited for."""

    def __init__(self) -> None:
        super().__init__()
        self._changed = asyncio.Event()

    async def __call__(self, event: Json) -> None:
        """Take one event."""
        self.append(event)
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def until(self, condition: Callable[[Told], Any], limit_s: float = PATIENCE_S) -> None:
        """Wait until it is so."""
        async with asyncio.timeout(limit_s):
            while not condition(self):
                await self._changed.wait()

    def places(self) -> list[int]:
        """The places in the queue that this person was shown, in order."""
        lines = [status for status in self.of("status") if not status["done"]]
        return [place for line in lines if (place := place_in(line["description"])) is not None]


@dataclass
class Asked:
    """One request that is under way."""

    prompt: str
    user: str
    told: Told = field(default_factory=Told)
    answer: Answer = field(default_factory=Answer)
    task: asyncio.Task[None] | None = None

    @property
    def done(self) -> bool:
        """Whether it has ended."""
        return self.task is not None and self.task.done()

    @property
    def refused(self) -> bool:
        """Whether it was told that there is no place for it."""
        return self.done and self.answer.error.startswith(BUSY)

    async def until_waits(self, limit_s: float = PATIENCE_S) -> int:
        """Wait until the person is told the place in the queue; the newest one."""
        await self.told.until(Told.places, limit_s)
        return self.told.places()[-1]

    async def end(self, limit_s: float = PATIENCE_S) -> Answer:
        """Wait for the end of the answer."""
        assert self.task is not None
        await asyncio.wait_for(asyncio.shield(self.task), limit_s)
        return self.answer

    async def stop(self) -> None:
        """Press Stop."""
        assert self.task is not None
        self.task.cancel()
        await asyncio.wait([self.task], timeout=PATIENCE_S)
        assert self.task.done()


class People:
    """Requests to one pipe; none of them outlives the block."""

    def __init__(self, pipe: Pipe) -> None:
        self.pipe = pipe
        self.asked: list[Asked] = []
        self.ended = 0
        self._changed = asyncio.Event()

    @classmethod
    @contextlib.asynccontextmanager
    async def of(cls, pipe: Pipe) -> AsyncIterator[People]:
        """People who have all gone when the block is left."""
        people = cls(pipe)
        try:
            yield people
        finally:
            await people.stop()

    def ask(self, prompt: str | Json, user: str = "ann", dialect: str = "browser", **more: Any) -> Asked:
        """Begin a request; `more` goes into what `pipe()` is given."""
        asked = Asked(prompt if isinstance(prompt, str) else "", user)
        given = arguments(prompt, dialect)
        number = next(_NUMBERS)
        if given["__metadata__"]["chat_id"]:
            given["__metadata__"] |= {"chat_id": f"chat-{number}", "message_id": f"message-{number}"}
        given["__metadata__"]["user_id"] = user
        given["__user__"] = {"id": user, "name": user, "email": f"{user}@example.org", "role": "user"}
        given["__event_emitter__"] = asked.told
        asked.task = asyncio.create_task(_read(self.pipe, given | more, asked.answer))
        asked.task.add_done_callback(self._note)
        self.asked.append(asked)
        return asked

    def _note(self, _task: asyncio.Task[None]) -> None:
        self.ended += 1
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def until_ended(self, count: int, limit_s: float = PATIENCE_S) -> None:
        """Wait until so many requests have ended."""
        async with asyncio.timeout(limit_s):
            while self.ended < count:
                await self._changed.wait()

    async def hold(
        self, simulator: Simulator, count: int = 1, dialect: str = "browser", user: str = "holder"
    ) -> list[Asked]:
        """Take this many places with answers that do not end."""
        before = sum(record.streaming for record in inferences(simulator))
        held = [self.ask(HELD, user, dialect) for _ in range(count)]
        await simulator.wait_until(
            lambda sim: sum(record.streaming for record in inferences(sim)) == before + count, PATIENCE_S
        )
        return held

    async def stop(self) -> None:
        """Everybody presses Stop."""
        tasks = [asked.task for asked in self.asked if asked.task is not None]
        for task in tasks:
            task.cancel()
        ends = await asyncio.gather(*tasks, return_exceptions=True)
        failed = [end for end in ends if isinstance(end, Exception)]
        assert failed == [], "an error came out of the pipe"


async def _read(pipe: Pipe, given: Json, answer: Answer) -> None:
    result: Any = await pipe.pipe(**given)
    if isinstance(result, dict):
        answer.add(result)
        return
    async for chunk in result:
        answer.add(chunk)


def prompts(simulator: Simulator) -> list[str]:
    """What OpenRouter has been asked, in the order in which it came."""
    return [_prompt(record.body) for record in inferences(simulator)]


def _prompt(body: Json) -> str:
    content = [item for item in body["input"] if item.get("role") == "user"][-1]["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


async def soon(condition: Callable[[], Any], limit_s: float = PATIENCE_S) -> None:
    """Look until it is so: for what nobody announces."""
    async with asyncio.timeout(limit_s):
        while not condition():  # noqa: ASYNC110 - the operating system tells nobody
            await asyncio.sleep(0.01)
