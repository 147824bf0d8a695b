"""Pasting the file into Open WebUI: loaded by `exec`, more than once, with packages missing, in use."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from openrouter_responses_pipe.simulator import Simulator
from tests.bench.hosting import (
    MODEL,
    MODULE,
    Loaded,
    ask,
    error_of,
    forget,
    load,
    publish,
    read,
    replace_imports,
    set_valves,
    text_of,
)

ROOT = Path(__file__).parents[1]
IDS = ("openrouter", "other_pipe")
DRIP = "[[drip rate=200 tokens=60]]"
DRIPPED = "".join(f"word{number} " for number in range(60))


@pytest.fixture(autouse=True)
def a_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A server has a secret key, and none of our functions before or after a test."""
    monkeypatch.setenv("WEBUI_SECRET_KEY", "a secret of this test")
    yield
    for function_id in IDS:
        forget(function_id)


def install(function_id: str, simulator: Simulator) -> Loaded:
    """Load, publish and set up a function as saving it in the admin page does."""
    loaded = load(function_id)
    publish(loaded)
    set_valves(loaded, API_KEY="sk-test", BASE_URL=simulator.base_url)
    return loaded


def live_runtime(loaded: Loaded) -> Any:
    """The runtime that answers for a function id now, whichever load of the file it came from."""
    key = loaded.module.__dict__["_RUNTIMES_KEY"]
    return sys.modules[key].__dict__["runtimes"].get(loaded.function_id)


def started_things() -> tuple[set[int], set[str]]:
    """The threads and the open sockets of this process."""
    links = (f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd"))
    sockets = {os.readlink(link) for link in links if os.path.islink(link)}
    threads = {thread.ident or 0 for thread in threading.enumerate()}
    return threads, {name for name in sockets if name.startswith("socket:")}


# Loading


def test_the_host_rewrites_nothing() -> None:
    source = MODULE.read_text("utf-8")
    assert replace_imports(source) == source


def test_loading_starts_nothing() -> None:
    before = started_things()
    first = load("openrouter")
    second = load("openrouter")
    assert started_things() == before
    with pytest.raises(RuntimeError):
        asyncio.get_running_loop()
    assert first.module.__name__ != second.module.__name__


async def test_constructing_starts_no_task() -> None:
    before = asyncio.all_tasks()
    load("openrouter")
    await asyncio.sleep(0)
    assert asyncio.all_tasks() == before


def test_what_the_host_looks_for_is_there() -> None:
    loaded = load("openrouter")
    assert not {"Filter", "Action", "Event", "Tools"} & set(vars(loaded.module))
    assert callable(loaded.pipe.pipes)
    assert loaded.pipe.valves == loaded.pipe.Valves()
    assert loaded.pipe.UserValves()


def test_valves_work_while_the_module_has_no_name() -> None:
    """Between loading and publishing the host has taken the module's name away again."""
    loaded = load("openrouter")
    assert loaded.module.__name__ not in sys.modules
    set_valves(loaded, API_KEY="sk-test", BASE_URL="http://127.0.0.1:9")
    assert loaded.pipe.valves.BASE_URL == "http://127.0.0.1:9"
    assert loaded.pipe.Valves.model_json_schema()["properties"]
    assert loaded.pipe.UserValves.model_json_schema()["properties"]


# Living side by side


async def test_a_chat_after_a_paste(simulator: Simulator) -> None:
    loaded = install("openrouter", simulator)
    assert MODEL in {model["id"] for model in await loaded.pipe.pipes()}
    assert await read(await ask(loaded, DRIP)) == (DRIPPED, "")
    await live_runtime(loaded).retire()


async def test_two_function_ids_live_side_by_side(simulator: Simulator) -> None:
    pair = [install(function_id, simulator) for function_id in IDS]
    answers = [await ask(loaded, DRIP) for loaded in pair]
    assert await asyncio.gather(*map(read, answers)) == [(DRIPPED, "")] * 2
    first, second = map(live_runtime, pair)
    assert first is not second
    await first.retire()
    assert not second.retired
    assert await read(await ask(pair[1], DRIP)) == (DRIPPED, "")
    await second.retire()


async def test_the_same_file_twice_without_publishing(simulator: Simulator) -> None:
    """Two workers' worth of loads, or a check of new code beside the running one."""
    running = install("openrouter", simulator)
    checked = load("openrouter")
    assert checked.pipe.valves is not running.pipe.valves
    assert await read(await ask(running, DRIP)) == (DRIPPED, "")
    await live_runtime(running).retire()


async def test_a_second_event_loop(simulator: Simulator) -> None:
    """A load that has served one event loop serves another one in another thread."""
    loaded = install("openrouter", simulator)
    assert await read(await ask(loaded, DRIP)) == (DRIPPED, "")
    first = live_runtime(loaded)

    async def elsewhere() -> tuple[str, str]:
        result = await read(await ask(loaded, DRIP))
        await live_runtime(loaded).retire()
        return result

    assert await asyncio.to_thread(asyncio.run, elsewhere()) == (DRIPPED, "")
    assert first.retired
    await first.retire()


# Saving new code while requests run


async def test_a_reload_while_a_request_runs(simulator: Simulator) -> None:
    tasks = asyncio.all_tasks()
    old = install("openrouter", simulator)
    answer = await ask(old, DRIP)
    text = ""
    while not text:
        text += text_of(await anext(answer))
    first = live_runtime(old)

    new = install("openrouter", simulator)
    other = await ask(new, DRIP)
    started = await anext(other)
    second = live_runtime(new)
    assert second is not first
    assert first.retired
    assert not second.retired

    rest, error = await read(answer)
    assert (text + rest, error) == (DRIPPED, "")
    rest, error = await read(other)
    assert (text_of(started) + rest, error) == (DRIPPED, "")
    await first.retire()
    await second.retire()
    await simulator.wait_until(lambda sim: sim.open == 0)
    assert {record.ended for record in simulator.requests} == {"completed"}
    assert not [task for task in asyncio.all_tasks() - tasks if not _of_simulator(task)]


def _of_simulator(task: asyncio.Task[Any]) -> bool:
    return getattr(task.get_coro(), "__qualname__", "").startswith("RequestHandler.")


async def test_a_reload_ends_what_outlasts_its_time(simulator: Simulator) -> None:
    """An answer that runs beyond the deadline keeps its text, says why it ended, and hangs up."""
    old = install("openrouter", simulator)
    answer = await ask(old, "[[stall hang=8]]")
    text = ""
    while not text:
        text += text_of(await anext(answer))
    await live_runtime(old).retire(deadline_s=0.05)
    rest, error = await read(answer)
    assert error
    assert text + rest
    await simulator.wait_until(lambda sim: sim.open == 0, timeout=1)
    assert [record.ended for record in simulator.requests if record.path.endswith("/responses")] == [
        "client_disconnected"
    ]


async def test_a_forgotten_load_is_freed(simulator: Simulator) -> None:
    old = install("openrouter", simulator)
    assert await read(await ask(old, DRIP)) == (DRIPPED, "")
    runtime = live_runtime(old)
    traces = [weakref.ref(old.pipe), weakref.ref(runtime)]
    new = install("openrouter", simulator)
    assert await read(await ask(new, DRIP)) == (DRIPPED, "")
    await runtime.retire()
    del old, runtime
    gc.collect()
    assert [trace() for trace in traces] == [None, None]
    await live_runtime(new).retire()


async def test_a_deleted_function_is_freed(simulator: Simulator) -> None:
    """Nobody says good-bye when an admin deletes the function; no registry may keep it alive."""
    loaded = install("openrouter", simulator)
    assert await read(await ask(loaded, DRIP)) == (DRIPPED, "")
    runtime = live_runtime(loaded)
    await runtime.retire()
    traces = [weakref.ref(loaded.pipe), weakref.ref(runtime)]
    forget("openrouter")
    del loaded, runtime
    gc.collect()
    assert [trace() for trace in traces] == [None, None]


async def test_the_new_load_answers_after_the_reload(simulator: Simulator) -> None:
    """Ten saves in a row, each used at once: always one live runtime, the last one."""
    runtimes: list[Any] = []
    for _ in range(10):
        loaded = install("openrouter", simulator)
        assert await read(await ask(loaded, DRIP)) == (DRIPPED, "")
        runtimes.append(live_runtime(loaded))
    assert [runtime.retired for runtime in runtimes] == [True] * 9 + [False]
    for runtime in runtimes:
        await runtime.retire()


# Packages that a server may not have

WITHOUT = """
import asyncio, importlib.abc, sys

class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

BLOCKED = set(sys.argv[1].split(","))
sys.meta_path.insert(0, Missing())

from openrouter_responses_pipe.simulator import Simulator
from tests.bench import hosting

async def main():
    async with Simulator() as simulator:
        loaded = hosting.load("openrouter")
        hosting.publish(loaded)
        hosting.set_valves(loaded, API_KEY="sk-test", BASE_URL=simulator.base_url)
        assert len(await loaded.pipe.pipes()) > 3
        print(await hosting.read(await hosting.ask(loaded, "[[drip rate=500 tokens=3]]")))
        print((await hosting.ask(loaded, "[[plain text=hi]]", stream=False, in_chat=False))["choices"])
        runtimes = sys.modules[loaded.module._RUNTIMES_KEY].runtimes
        await runtimes["openrouter"].retire()

asyncio.run(main())
assert not BLOCKED & {name.split(".")[0] for name in sys.modules}
"""


@pytest.mark.parametrize(
    "missing", ["open_webui", "lz4", "ulid", "redis", "orjson", "open_webui,lz4,ulid,redis,orjson"]
)
def test_without_packages(missing: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", WITHOUT, missing],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "('word0 word1 word2 ', '')" in done.stdout
    assert "'content': 'hi'" in done.stdout


PROBE = """
import sys, threading, os
import pytest_bootstrap
from tests.bench import hosting
before = len(os.listdir("/proc/self/fd")), threading.active_count()
hosting.load("openrouter")
assert (len(os.listdir("/proc/self/fd")), threading.active_count()) == before
import asyncio
assert asyncio.events._get_running_loop() is None
assert getattr(asyncio.get_event_loop_policy()._local, "_loop", None) is None
"""


def test_loading_in_a_fresh_process_starts_nothing_and_warns_of_nothing() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROBE],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_load_while_another_thread_loads() -> None:
    """Two requests of one worker may both find the file changed."""
    loaded: list[Loaded] = []
    threads = [threading.Thread(target=lambda: loaded.append(load("openrouter"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({id(item.module) for item in loaded}) == 4
    assert error_of({}) == ""
