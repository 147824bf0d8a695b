"""Saving the function again and again while people chat: everybody gets a whole answer, nothing is left.

The function is loaded as Open WebUI does it (`tests/bench/hosting.py`). The simulator runs in a process of
its own where it matters that what this process holds is the pipe's.
"""

from __future__ import annotations

import asyncio
import gc
import selectors
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import pytest

from openrouter_responses_pipe.simulator import Simulator
from openrouter_responses_pipe.webui import SimulatorServer
from pytest_bootstrap import host_functions
from tests.bench.hosting import (
    MODULE,
    Loaded,
    ask,
    forget,
    load,
    publish,
    read,
    set_valves,
    text_of,
)
from tests.footprint import held, more, resident_mb
from tests.people import soon
from tests.support import run_alone

Json = dict[str, Any]
ROOT: Final = Path(__file__).parents[1]
IDS: Final = ("openrouter", "second", "third", "fourth")
SAVES, PEOPLE = 50, 20
WARM_SAVES: Final = 20  # by then the memory that loading takes for a while has been taken
TOKENS: Final = 40
DRIP: Final = f"[[drip rate=100 tokens={TOKENS}]]"
DRIPPED: Final = "".join(f"word{number} " for number in range(TOKENS))
GROWTH: Final = 1.05


@pytest.fixture(autouse=True)
def a_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A server has a secret key, and none of our functions before or after a test."""
    monkeypatch.setenv("WEBUI_SECRET_KEY", "a secret of this test")
    host_functions.reset()
    yield
    host_functions.reset()
    for function_id in IDS:
        forget(function_id)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimulatorServer]:
    """OpenRouter in a process of its own."""
    server = SimulatorServer(tmp_path_factory.mktemp("simulator") / "simulator.log")
    try:
        server.launch()
        yield server
    finally:
        server.stop()


def save(function_id: str, base_url: str, **valves: object) -> Loaded:
    """Load, publish and set up a function as saving it in the admin page does."""
    loaded = load(function_id)
    publish(loaded)
    set_valves(loaded, API_KEY="sk-test", BASE_URL=base_url, **valves)
    host_functions.active[function_id] = True
    host_functions.content[function_id] = MODULE.read_text("utf-8")
    return loaded


def live_runtime(function_id: str) -> Any:
    """The runtime that answers for a function id now."""
    return sys.modules["_openrouter_responses_pipe_runtimes"].__dict__["runtimes"].get(function_id)


# What a process holds


def loads_alive() -> int:
    """How many loads of the file there are."""
    gc.collect()
    return sum(type(thing).__name__ == "Runtime" and hasattr(thing, "pipe_id") for thing in gc.get_objects())


# People who chat all the time


@dataclass
class Town:
    """People who ask whatever was saved last, one question after the other."""

    loaded: Loaded
    answers: int = 0
    wrong: list[tuple[str, str]] = field(default_factory=list)
    leaving: bool = False

    async def person(self) -> None:
        """Ask until it is time to go."""
        while not self.leaving:
            got = await read(await ask(self.loaded, DRIP))
            self.answers += 1
            if got != (DRIPPED, ""):
                self.wrong.append(got)

    async def round(self) -> None:
        """Everybody asks once, at the same time."""
        answers = [read(await ask(self.loaded, DRIP)) for _ in range(PEOPLE)]
        for got in await asyncio.gather(*answers):
            self.answers += 1
            if got != (DRIPPED, ""):
                self.wrong.append(got)


async def _steady(what: Callable[[], bool]) -> None:
    """Wait for what retired loads still do: the answers that were running, then the closing."""
    await soon(what, 30)


async def test_fifty_saves_under_load(server: SimulatorServer) -> None:
    empty = held()
    town = Town(save("openrouter", server.base_url))
    await town.round()
    first, warm_mb = held(), 0.0
    async with asyncio.TaskGroup() as group:
        people = [group.create_task(town.person()) for _ in range(PEOPLE)]
        for number in range(SAVES):
            if number == WARM_SAVES:
                warm_mb = resident_mb()
            town.loaded = save("openrouter", server.base_url)
            await _some_answers(town, town.answers + 3)
        town.leaving = True
        await asyncio.wait(people)
    await _steady(lambda: sum("retire" in task.get_name() for task in asyncio.all_tasks()) == 0)
    await town.round()
    await _steady(lambda: not more(held(), first))
    assert town.wrong == []
    assert town.answers > SAVES * 3
    assert loads_alive() <= 1
    assert resident_mb() <= warm_mb * GROWTH
    await town.loaded.pipe.aclose()
    await _steady(lambda: not more(held(), empty))


async def _some_answers(town: Town, count: int) -> None:
    """Go on when people have been answered, by this load or the one before."""
    async with asyncio.timeout(30):
        while town.answers < count:  # noqa: ASYNC110 - they count, and tell nobody
            await asyncio.sleep(0.01)


async def test_an_answer_spans_many_saves(server: SimulatorServer) -> None:
    """It was begun by a load that was replaced ten times meanwhile."""
    town = Town(save("openrouter", server.base_url))
    long = await ask(town.loaded, "[[drip rate=20 tokens=60]]")
    text = ""
    while not text:
        text += text_of(await anext(long))
    for _ in range(10):
        town.loaded = save("openrouter", server.base_url)
        await town.round()
    rest, error = await read(long)
    assert (text + rest, error) == ("".join(f"word{number} " for number in range(60)), "")
    assert town.wrong == []
    await town.loaded.pipe.aclose()


async def test_who_waits_is_answered_by_the_load_that_was_asked(simulator: Simulator) -> None:
    """Saving ends the queue of the old load as it ends its answers: within their time."""
    old = save("openrouter", simulator.base_url, MAX_CONCURRENT_REQUESTS=1)
    running = await ask(old, "[[drip rate=100 tokens=60]]")
    begun = text_of(await anext(running))
    waiting = [asyncio.create_task(_whole(old, f"[[plain text=number{number}]]")) for number in range(5)]
    for _ in range(20):
        await asyncio.sleep(0)
    new = save("openrouter", simulator.base_url, MAX_CONCURRENT_REQUESTS=1)
    assert await _whole(new, "[[plain text=new]]") == ("new", "")
    rest, error = await read(running)
    assert ((begun + rest).split()[-1], error) == ("word59", "")
    assert await asyncio.gather(*waiting) == [(f"number{number}", "") for number in range(5)]
    await new.pipe.aclose()


async def test_who_still_waits_at_the_end_of_the_time_is_told_so(simulator: Simulator) -> None:
    old = save("openrouter", simulator.base_url, MAX_CONCURRENT_REQUESTS=1)
    running = await ask(old, "[[stall]]")
    begun = ""
    while not begun:
        begun += text_of(await anext(running))
    waiting = asyncio.create_task(_whole(old, "[[plain text=never]]"))
    for _ in range(20):
        await asyncio.sleep(0)
    await live_runtime("openrouter").retire(deadline_s=0.05)
    for text, error in (await read(running), await asyncio.wait_for(waiting, 2)):
        assert "send the message again" in error
        assert "never" not in text
    await simulator.wait_until(lambda sim: sim.open == 0, timeout=1)
    assert [record.path for record in simulator.requests].count("/api/v1/responses") == 1


async def _whole(loaded: Loaded, question: str) -> tuple[str, str]:
    return await read(await ask(loaded, question))


# A load that the host has forgotten


class HastyLoop(asyncio.SelectorEventLoop):
    """An event loop whose waits pass `speed` times as fast: what looks once a minute has looked soon."""

    def __init__(self) -> None:
        self.speed = 1.0
        self._since = self._now = time.monotonic()
        super().__init__(_Hasty(self))

    def time(self) -> float:
        """Seconds, of which there are many."""
        now = time.monotonic()
        self._now += (now - self._since) * self.speed
        self._since = now
        return self._now


class _Hasty(selectors.DefaultSelector):
    def __init__(self, loop: HastyLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """Wait for less than is asked for."""
        return super().select(timeout and timeout / self._loop.speed)


def _gone(function_id: str) -> None:
    del host_functions.active[function_id]


def _switched_off(function_id: str) -> None:
    host_functions.active[function_id] = False


def _changed(function_id: str) -> None:
    host_functions.content[function_id] += "\n# saved by another worker\n"


STALE: Final = {"gone": _gone, "switched off": _switched_off, "changed": _changed}


@pytest.mark.parametrize("how", STALE)
def test_a_stale_load_retires_itself_and_comes_back(how: str) -> None:
    """Another worker has saved the function; this one is asked nothing any more, and is told nothing."""

    async def scene() -> None:
        loop: Any = asyncio.get_running_loop()
        async with Simulator() as simulator:
            empty = held()
            loaded = save("openrouter", simulator.base_url)
            assert await _whole(loaded, "[[plain text=fine]]") == ("fine", "")
            runtime = live_runtime("openrouter")
            loop.speed = 300.0
            await asyncio.sleep(1_200)
            assert not runtime.retired, "all is well"
            STALE[how]("openrouter")
            async with asyncio.timeout(2_400):
                while not runtime.retired:  # noqa: ASYNC110 - it tells nobody
                    await asyncio.sleep(10)
            loop.speed = 1.0
            await _steady(lambda: not more(held(), empty))
            assert await _whole(loaded, "[[plain text=back]]") == ("back", "")
            assert live_runtime("openrouter") is not runtime
            await loaded.pipe.aclose()

    with asyncio.Runner(loop_factory=HastyLoop) as runner:
        runner.run(scene())


def test_a_load_that_is_up_to_date_stays() -> None:
    """A host that cannot say, or has been asked in vain, ends nothing."""

    async def scene() -> None:
        loop: Any = asyncio.get_running_loop()
        async with Simulator() as simulator:
            loaded = save("openrouter", simulator.base_url)
            assert await _whole(loaded, "[[plain text=fine]]") == ("fine", "")
            runtime, lookup = live_runtime("openrouter"), host_functions.get_function_by_id
            asked = asyncio.Event()

            async def fail(_id: str, db: object = None) -> None:
                asked.set()
                raise ConnectionError("the database is away")

            functions = sys.modules["open_webui.models.functions"].__dict__["Functions"]
            functions.get_function_by_id = fail
            try:
                loop.speed = 300.0
                async with asyncio.timeout(2_400):
                    await asked.wait()
                await asyncio.sleep(100)
            finally:
                functions.get_function_by_id = lookup
                loop.speed = 1.0
            assert not runtime.retired
            await loaded.pipe.aclose()

    with asyncio.Runner(loop_factory=HastyLoop) as runner:
        runner.run(scene())


# Silence at the end

PROGRAM: Final = """
import asyncio, gc, sys
from pathlib import Path
import pytest_bootstrap
from openrouter_responses_pipe.webui import SimulatorServer
from tests.bench.hosting import ask, load, publish, read, set_valves, text_of

server = SimulatorServer(Path(sys.argv[1]))
server.launch()
loads = []

def save():
    loads.append(load("openrouter"))
    publish(loads[-1])
    set_valves(loads[-1], API_KEY="sk-test", BASE_URL=server.base_url)
    return loads[-1]

async def chat(loaded, question="[[plain text=fine]]"):
    return await read(await ask(loaded, question))

async def some(loaded, count):
    return await asyncio.gather(*[chat(loaded, f"[[plain text=fine{n}]]") for n in range(count)])

BODY
server.stop()
"""
ENDS: Final = {
    "after a chat": "asyncio.run(chat(save()))",
    "after the list of models": "asyncio.run(save().pipe.pipes())",
    "after many chats": "asyncio.run(some(save(), 20))",
    "after a loop change": "loaded = save(); asyncio.run(some(loaded, 5)); asyncio.run(some(loaded, 5))",
    "after a save": "asyncio.run(some(save(), 5)); asyncio.run(some(save(), 5))",
    "after it was closed": """
async def main():
    loaded = save()
    await some(loaded, 5)
    await loaded.pipe.aclose()
asyncio.run(main())
""",
    "after it was forgotten while the loop runs": """
async def main():
    await some(save(), 5)
    loads.clear()
    for name in [name for name in sys.modules if name.startswith("function_openrouter")]:
        del sys.modules[name]
    gc.collect()
asyncio.run(main())
""",
    "in mid-answer": """
async def main():
    chunks = await ask(save(), "[[drip rate=50 tokens=5000]]")
    while not text_of(await anext(chunks)):
        pass
asyncio.run(main())
""",
    "in mid-answer, from a running loop": """
async def main():
    chunks = await ask(save(), "[[drip rate=50 tokens=5000]]")
    while not text_of(await anext(chunks)):
        pass
    server.stop()
    sys.exit(0)
asyncio.run(main())
""",
}


@pytest.mark.parametrize("how", ENDS)
def test_the_interpreter_exits_in_silence(how: str, tmp_path: Path) -> None:
    code = PROGRAM.replace("BODY", ENDS[how].strip())
    done = run_alone(code, tmp_path / "simulator.log")
    assert (done.returncode, done.stderr) == (0, "")
