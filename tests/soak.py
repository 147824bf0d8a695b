"""`python -m tests.soak [--seconds 600]`: people come, ask, press Stop and go; nothing may fail or grow.

Meanwhile an administrator saves the function and changes its valves. From time to time everybody rests, and
what the process holds is compared with the rests before: tasks, threads, open files, memory. Ends with 1
when an answer was wrong or something has grown.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import pytest_bootstrap  # the stand-in for the host
from openrouter_responses_pipe.webui import SimulatorServer
from tests.bench.hosting import MODULE, Loaded, forget, load, publish, set_valves
from tests.footprint import held, more, resident_mb
from tests.people import Told, soon
from tests.support import DIALECTS, Answer, arguments
from tests.tools import entry, named, offered

Json = dict[str, Any]
FUNCTION_ID: Final = "openrouter"
PEOPLE: Final = 16
RESTS: Final = 6
SAVE_EVERY_S: Final = 3.0
VALVES_EVERY_S: Final = 0.7
GROWTH: Final = 1.05
LONGEST_S: Final = 60.0  # an answer that takes longer hangs
_WORDS: Final = "".join(f"word{number} " for number in range(15))


@dataclass
class Rest:
    """What the process holds while everybody rests."""

    held: Counter[str]
    resident_mb: float


@dataclass
class Soak:
    """The town, its function, and what has gone wrong in it."""

    base_url: str
    seconds: float
    growth: float = GROWTH
    chance: random.Random = field(default_factory=lambda: random.Random(8))
    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    rests: list[Rest] = field(default_factory=list)

    async def run(self) -> list[str]:
        """Everything that has gone wrong."""
        self._open, self._leaving = asyncio.Event(), False
        self._busy = 0
        self._save()
        self._open.set()
        people = [asyncio.create_task(self._person(f"user{number}")) for number in range(PEOPLE)]
        admin = asyncio.create_task(self._admin())
        for _ in range(RESTS):
            await asyncio.sleep(self.seconds / RESTS)
            await self._rest()
        self._leaving = True
        admin.cancel()
        await asyncio.wait([*people, admin])
        self.wrong += [repr(task.exception()) for task in people if task.exception()]
        await self._loaded.pipe.aclose()
        forget(FUNCTION_ID)
        return self.wrong + self._grown()

    # The administrator

    def _save(self) -> None:
        self._loaded: Loaded = load(FUNCTION_ID)
        publish(self._loaded)
        pytest_bootstrap.host_functions.active[FUNCTION_ID] = True
        pytest_bootstrap.host_functions.content[FUNCTION_ID] = MODULE.read_text("utf-8")
        self._change_valves()
        self.counts["saves"] += 1

    def _change_valves(self) -> None:
        valves = {
            "MAX_CONCURRENT_REQUESTS": self.chance.choice([2, 5, 500]),
            "MAX_CONCURRENT_REQUESTS_PER_USER": self.chance.choice([0, 0, 1]),
            "MAX_CONCURRENT_TASKS": self.chance.choice([1, 20]),
            "STREAMING_UPDATE_PROFILE": self.chance.choice(["auto", "quick", "slow"]),
            "SSE_WORKERS_PER_REQUEST": self.chance.choice([1, 2, 4]),
        }
        set_valves(self._loaded, API_KEY="sk-soak", BASE_URL=self.base_url, RETRY_ATTEMPTS=0, **valves)
        self.counts["changed valves"] += 1

    async def _admin(self) -> None:
        saved = time.monotonic()
        while True:
            await asyncio.sleep(VALVES_EVERY_S)
            await self._open.wait()
            if time.monotonic() - saved > SAVE_EVERY_S:
                saved = time.monotonic()
                self._save()
            else:
                self._change_valves()

    # People

    async def _person(self, name: str) -> None:
        deeds: list[Callable[[str], Awaitable[None]]] = [
            *[self._asks] * 4,
            self._stops,
            self._hangs_up,
            self._calls_tools,
            self._fails,
            self._looks,
        ]
        while not self._leaving:
            await self._open.wait()
            self._busy += 1
            deed = self.chance.choice(deeds)
            try:
                async with asyncio.timeout(LONGEST_S):
                    await deed(name)
            except TimeoutError:
                self.wrong.append(f"{deed.__name__}: no end after {LONGEST_S:.0f} s")
            finally:
                self._busy -= 1
            self.counts[deed.__name__.strip("_")] += 1
            await asyncio.sleep(self.chance.uniform(0, 0.1))

    def _given(self, name: str, prompt: str | Json, dialect: str) -> Json:
        given = arguments(prompt, dialect)
        number = self.counts.total()
        if given["__metadata__"]["chat_id"]:
            given["__metadata__"] |= {"chat_id": f"chat{number}", "message_id": f"message{number}"}
        person = {"id": name, "name": name, "email": f"{name}@example.org", "role": "user"}
        return given | {"__user__": person, "__event_emitter__": Told()}

    async def _answer(self, given: Json) -> Answer:
        answer, result = Answer(), await self._loaded.pipe.pipe(**given)
        if isinstance(result, dict):
            answer.add(result)
        else:
            async for chunk in result:
                answer.add(chunk)
        return answer

    def _expect(self, what: str, answer: Answer, text: str, error: str = "") -> None:
        is_told = error in answer.error if error else not answer.error
        if answer.text != text or not is_told:
            self.wrong.append(f"{what}: {answer.text[-200:]!r}, {answer.error!r}")

    async def _asks(self, name: str) -> None:
        dialect = self.chance.choice(sorted(DIALECTS))
        answer = await self._answer(self._given(name, "[[drip rate=100 tokens=15]]", dialect))
        self._expect(dialect, answer, _WORDS)

    async def _stops(self, name: str) -> None:
        dialect = self.chance.choice(sorted(DIALECTS))
        asking = asyncio.create_task(self._answer(self._given(name, "[[drip rate=20 tokens=900]]", dialect)))
        await asyncio.wait([asking], timeout=self.chance.uniform(0, 1.5))
        asking.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            answer = await asking
            if answer.error:
                self.wrong.append(f"Stop in {dialect}: {answer.error}")

    async def _hangs_up(self, name: str) -> None:
        chunks = await self._loaded.pipe.pipe(
            **self._given(name, "[[drip rate=20 tokens=900]]", "api_stream")
        )
        for _ in range(self.chance.randrange(4)):
            await anext(chunks, None)
        await chunks.aclose()

    async def _calls_tools(self, name: str) -> None:
        async def add(a: int = 1) -> str:
            await asyncio.sleep(0.02)
            if a == 2:
                raise ValueError("two is too many")
            return f"sum {a}"

        tools = named(add=entry(add))
        calls = [{"name": "add", "arguments": {"a": number}} for number in (1, 2, 3)]
        script = json.dumps({"rounds": [calls, calls[:1]], "final": "{count} calls"})
        body = {"messages": [{"role": "user", "content": f"[[script {script}]]"}], "tools": offered(tools)}
        answer = await self._answer(self._given(name, body, "browser") | {"__tools__": tools})
        self._expect("tools", answer, "4 calls")

    async def _fails(self, name: str) -> None:
        fault, told = self.chance.choice(
            [
                ("[[http_error name=402_credits]]", "too little credit"),
                ("[[http_error name=429_upstream]]", ""),
                ("[[abrupt]]", "broke off"),
                ("[[failed_first]]", ""),
            ]
        )
        answer = await self._answer(self._given(name, fault, self.chance.choice(sorted(DIALECTS))))
        if not answer.error or told not in answer.error:
            self.wrong.append(f"{fault}: {answer.error!r}")

    async def _looks(self, _name: str) -> None:
        if len(await self._loaded.pipe.pipes()) < 3:
            self.wrong.append("the list of models is empty")

    # Growth

    async def _rest(self) -> None:
        self._open.clear()
        try:
            await soon(lambda: self._busy == 0, LONGEST_S)
            await soon(
                lambda: not any("retire" in task.get_name() for task in asyncio.all_tasks()), LONGEST_S
            )
            await self._all_ask_at_once()
            rest = Rest(held(), resident_mb())
            with contextlib.suppress(TimeoutError):  # then it is said at the end
                await soon(lambda: not (self.rests and more(held(), self.rests[0].held)), 5)
            self.rests.append(Rest(held(), rest.resident_mb))
        except TimeoutError:
            self.wrong.append(f"no rest: {self._busy} are still busy")
        self._open.set()

    async def _all_ask_at_once(self) -> None:
        """As many connections as there can be, at every rest the same."""
        self._change_valves()
        valves = {"API_KEY": "sk-soak", "BASE_URL": self.base_url}
        set_valves(self._loaded, **valves, MAX_CONCURRENT_REQUESTS=500)
        asking = (
            self._answer(self._given(f"user{n}", "[[stall_headers wait=0.2]]", "browser"))
            for n in range(PEOPLE)
        )
        await asyncio.gather(*asking)

    def _grown(self) -> list[str]:
        if len(self.rests) < RESTS:
            return []
        found = []
        if grown := more(self.rests[-1].held, self.rests[0].held):
            found.append(f"there are more of these than at the first rest: {grown}")
        before = max(rest.resident_mb for rest in self.rests[1 : RESTS // 2])
        if (now := self.rests[-1].resident_mb) > before * self.growth:
            found.append(f"memory has grown from {before:.0f} to {now:.0f} MB")
        return found


def main() -> int:
    """Run it, and say what came of it."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--seconds", type=float, default=600.0)
    args = parser.parse_args()
    os.environ.setdefault("WEBUI_SECRET_KEY", "a secret of this soak")
    logging.getLogger("openrouter_responses_pipe").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        simulator = SimulatorServer(Path(folder) / "simulator.log")
        try:
            simulator.launch()
            soak = Soak(simulator.base_url, args.seconds)
            wrong = asyncio.run(soak.run())
        finally:
            simulator.stop()
    print(*(f"{name:<20}{count:>8}" for name, count in sorted(soak.counts.items())), sep="\n")
    print("memory, MB:", *(f"{rest.resident_mb:.0f}" for rest in soak.rests))
    print(*wrong, sep="\n")
    print(f"{len(wrong)} things went wrong" if wrong else "nothing failed, nothing has grown")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
