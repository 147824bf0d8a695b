"""Lifetimes: stopping, hanging up, abandoning, reloading, retiring, and many at once."""

from __future__ import annotations

import asyncio
import gc
import logging
import math
import sys
import weakref
from collections.abc import AsyncIterator, Iterator
from typing import Any

import anyio
import pytest

from openrouter_responses_pipe.openrouter_responses_pipe import (
    ChatRequest,
    HostEnvironment,
    Pipe,
    Runtime,
    Valves,
)
from openrouter_responses_pipe.simulator import Simulator
from tests.bench.hosting import Loaded, forget, load, publish
from tests.support import (
    DIALECTS,
    KEY,
    MENU,
    MODEL,
    PATIENCE_S,
    SOON_S,
    STREAMING,
    Answer,
    all_ended,
    arguments,
    ask,
    call,
    delta,
    gone,
    half_an_answer,
    hostile,
    inferences,
    read_request,
    read_rest,
    read_until_text,
    running_pipe,
    set_valves,
    stream,
)

Json = dict[str, Any]
SLOW = "[[drip rate=50 tokens=2000]]"
COLLECTED = sorted(set(DIALECTS) - set(STREAMING))


@pytest.fixture(autouse=True)
async def no_task_left(simulator: Simulator) -> AsyncIterator[None]:
    """Whatever a test does, nothing of ours runs on after it."""
    before = asyncio.all_tasks()
    yield
    await all_ended(before)


# Stopping


@pytest.mark.parametrize("dialect", STREAMING)
async def test_stop_while_waiting_for_the_next_chunk(dialect: str, pipe: Pipe, simulator: Simulator) -> None:
    before = asyncio.all_tasks()
    answer, has_text = Answer(), asyncio.Event()

    async def consume() -> None:
        async for chunk in await stream(pipe, "hello", dialect):
            answer.add(chunk)
            if answer.text:
                has_text.set()

    simulator.next("stall", hang=12, tasks=True)
    task = asyncio.create_task(consume())
    await asyncio.wait_for(has_text.wait(), PATIENCE_S)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await gone(simulator)
    await all_ended(before)
    assert (bool(answer.text), answer.error) == (True, "")


@pytest.mark.parametrize("dialect", sorted({*COLLECTED} - {"browser_json"}))
async def test_stop_while_an_answer_is_collected(dialect: str, pipe: Pipe, simulator: Simulator) -> None:
    before = asyncio.all_tasks()
    simulator.next("stall", tasks=True)
    task = asyncio.create_task(ask(pipe, "hello", dialect))
    await simulator.wait_until(lambda sim: any(record.streaming for record in inferences(sim)))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await gone(simulator)
    await all_ended(before)


async def test_stop_without_streaming_keeps_the_text_so_far(pipe: Pipe, simulator: Simulator) -> None:
    """The host saves what is returned, and of a cancelled answer nothing: so it is returned."""
    before, told = asyncio.all_tasks(), asyncio.Event()
    statuses: list[Json] = []

    async def emit(event: Json) -> None:
        statuses.append(event["data"])
        told.set()

    simulator.next("replay", body=half_an_answer(), hang=3)
    given: Json = {**arguments("hello", "browser_json"), "__event_emitter__": emit}
    task = asyncio.create_task(pipe.pipe(**given))
    await asyncio.wait_for(told.wait(), PATIENCE_S)
    task.cancel()
    result = await task
    assert isinstance(result, dict)
    assert result["choices"][0]["message"]["content"] == "Half an ans"
    assert [item["status"] for item in result["output"]] == ["incomplete"]
    assert "error" not in result
    assert [(status["description"], status["done"]) for status in statuses] == [
        ("Searching the web", False),
        ("Stopped", True),
    ]
    assert not task.cancelling()
    await gone(simulator)
    await all_ended(before)


async def test_stop_without_streaming_before_anything_came(pipe: Pipe, simulator: Simulator) -> None:
    simulator.next("stall_headers")
    task = asyncio.create_task(pipe.pipe(**arguments("hello", "browser_json")))
    await simulator.wait_until(lambda sim: len(inferences(sim)) == 1)
    task.cancel()
    result = await task
    assert isinstance(result, dict)
    assert result["choices"][0]["message"]["content"] == ""
    await gone(simulator)


async def test_stop_before_the_answer_has_begun(pipe: Pipe, simulator: Simulator) -> None:
    simulator.next("stall_headers")
    task = asyncio.create_task(ask(pipe, "hello"))
    await simulator.wait_until(lambda sim: len(inferences(sim)) == 1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await gone(simulator)


async def test_stop_while_waiting_for_another_try(pipe: Pipe, simulator: Simulator) -> None:
    set_valves(pipe, simulator.base_url, RETRY_ATTEMPTS=3)
    simulator.next("http_error", name="503_no_provider", retry_after=25, times=math.inf)
    before, told = asyncio.all_tasks(), asyncio.Event()

    async def emit(event: Json) -> None:
        told.set()

    task = asyncio.create_task(call(pipe, arguments("hello") | {"__event_emitter__": emit}))
    await asyncio.wait_for(told.wait(), PATIENCE_S)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await all_ended(before)
    assert len(inferences(simulator)) == 1


@pytest.mark.parametrize("dialect", sorted(DIALECTS))
async def test_stop_at_any_moment(dialect: str, pipe: Pipe, simulator: Simulator) -> None:
    """After each number of steps of the event loop: nothing hangs, nothing is left, the next chat works."""
    before = asyncio.all_tasks()
    for steps in range(120):
        task = asyncio.create_task(ask(pipe, "[[reasoning text=fine]]", dialect))
        for _ in range(steps):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task], timeout=SOON_S)
        assert task.done()
        assert task.cancelled() or task.result().error == ""
    await simulator.wait_until(lambda sim: sim.open == 0, timeout=SOON_S)
    await all_ended(before)
    assert (await ask(pipe, "[[plain text=fine]]", dialect)).error == ""


async def test_what_was_used_is_logged_at_a_stop(
    pipe: Pipe, simulator: Simulator, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    chunks = await stream(pipe, SLOW)
    await read_until_text(chunks, Answer())
    before = asyncio.all_tasks()
    await chunks.aclose()
    await gone(simulator)
    await all_ended(before)
    assert "stopped" in caplog.text


async def test_a_stop_concerns_one_chat(pipe: Pipe, simulator: Simulator) -> None:
    stopped = await stream(pipe, SLOW)
    await read_until_text(stopped, Answer())
    other = await stream(pipe, "[[drip rate=200 tokens=60]]")
    answer = await read_until_text(other, Answer())
    await stopped.aclose()
    await read_rest(other, answer)
    assert (answer.text, answer.error) == ("".join(f"word{number} " for number in range(60)), "")


# An API client that goes away: from then on every await raises again


@pytest.mark.parametrize("dialect", sorted(DIALECTS))
async def test_a_client_that_goes_away(dialect: str, pipe: Pipe, simulator: Simulator) -> None:
    before, scope = asyncio.all_tasks(), anyio.CancelScope()
    simulator.next("drip", rate=50, tokens=2_000, tasks=True)

    async def serve() -> None:
        with scope:
            await call(pipe, arguments("hello", dialect))

    task = asyncio.create_task(serve())
    await simulator.wait_until(lambda sim: any(record.streaming for record in inferences(sim)))
    scope.cancel()
    await task
    assert scope.cancelled_caught
    await gone(simulator)
    await all_ended(before)


async def test_a_client_that_goes_away_while_a_chunk_is_sent(pipe: Pipe, simulator: Simulator) -> None:
    """The generator rests at its `yield`, and is dropped there."""
    before, scope, never = asyncio.all_tasks(), anyio.CancelScope(), asyncio.Event()
    sending = asyncio.Event()

    async def serve() -> None:
        with scope:
            async for _ in await stream(pipe, SLOW, "api_stream"):
                sending.set()
                await never.wait()

    task = asyncio.create_task(serve())
    await asyncio.wait_for(sending.wait(), PATIENCE_S)
    scope.cancel()
    await task
    gc.collect()
    await gone(simulator)
    await all_ended(before)


# A generator that nobody reads to its end


@pytest.mark.parametrize("dialect", STREAMING)
@pytest.mark.parametrize("how", ["closed", "collected as garbage", "thrown into"])
async def test_an_abandoned_answer(how: str, dialect: str, pipe: Pipe, simulator: Simulator) -> None:
    before = asyncio.all_tasks()
    simulator.next("drip", rate=50, tokens=2_000, tasks=True)
    chunks = await stream(pipe, "hello", dialect)
    await read_until_text(chunks, Answer())
    if how == "closed":
        await chunks.aclose()
    elif how == "thrown into":
        with pytest.raises(ZeroDivisionError):
            await chunks.athrow(ZeroDivisionError())
    del chunks
    gc.collect()
    await gone(simulator)
    await all_ended(before)


@pytest.mark.parametrize("how", ["closed", "collected as garbage"])
async def test_an_answer_that_nobody_ever_reads(how: str, pipe: Pipe, simulator: Simulator) -> None:
    before = asyncio.all_tasks()
    chunks = await stream(pipe, "hello")
    if how == "closed":
        await chunks.aclose()
    del chunks
    gc.collect()
    await all_ended(before)
    assert simulator.requests == []
    assert (await ask(pipe, "hello")).text


async def test_a_finished_chat_is_forgotten(pipe: Pipe) -> None:
    given = arguments("hello")
    trace = weakref.ref(given["__event_emitter__"])
    await call(pipe, given)
    del given
    await asyncio.sleep(0)  # the task that has just ended leaves the loop
    gc.collect()
    assert trace() is None


# A reader that does not keep up


async def test_a_reader_that_pauses_loses_nothing() -> None:
    frames, size, sent, blocked = 1_500, 20_000, 0, asyncio.Event()

    def text(number: int) -> str:
        return f"<{number}>".ljust(size, ".")

    async def flood(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        request, _, _ = await read_request(reader)
        kind = b"application/json" if request.startswith("GET") else b"text/event-stream"
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: %b\r\nConnection: close\r\n\r\n" % kind)
        for number in range(0 if request.startswith("GET") else frames):
            writer.write(delta(text(number)))
            drained = asyncio.ensure_future(writer.drain())
            done, _ = await asyncio.wait([drained], timeout=0.3)
            if not done:
                blocked.set()
            await drained
            sent += size

    async with hostile(flood) as url, running_pipe(url) as pipe:
        chunks = await stream(pipe, "hello")
        answer = await read_until_text(chunks, Answer())
        async with asyncio.timeout(30):
            await blocked.wait()
            held = sent
            rest = [chunk async for chunk in chunks]
    assert held < frames * size / 2
    shown = answer.text + "".join(chunk.get("delta", "") for chunk in rest)
    assert shown == "".join(map(text, range(frames)))
    assert rest[-1]["error"]["message"]  # it ended without a last word


# Saving new code while answers run


@pytest.fixture
def reloads(simulator: Simulator) -> Iterator[Any]:
    """Loads a function as saving it does; both ids are free again after the test."""

    def reload(function_id: str = "openrouter", **valves: Any) -> Loaded:
        loaded = load(function_id)
        publish(loaded)
        set_valves(loaded.pipe, simulator.base_url, **valves)
        return loaded

    yield reload
    forget("openrouter")
    forget("other")


@pytest.mark.parametrize("dialect", STREAMING)
async def test_an_answer_outlives_the_code_that_writes_it(
    dialect: str, simulator: Simulator, reloads: Any
) -> None:
    old, new = reloads(), reloads()
    simulator.next("drip", rate=200, tokens=60, tasks=True)
    chunks = await stream(old.pipe, "hello", dialect)
    answer = await read_until_text(chunks, Answer())
    assert await new.pipe.pipes()
    await read_rest(chunks, answer)
    assert (answer.text, answer.error) == ("".join(f"word{number} " for number in range(60)), "")
    await old.pipe.aclose()
    await new.pipe.aclose()


@pytest.mark.parametrize("dialect", sorted(DIALECTS))
async def test_a_request_to_replaced_code_gets_one_sentence(dialect: str, reloads: Any) -> None:
    old, new = reloads(), reloads()
    assert (await ask(old.pipe, "hello")).text
    late = arguments("hello", dialect)
    begun = await old.pipe.pipe(**late) if dialect in STREAMING else None
    assert (await ask(new.pipe, "hello")).text
    told = [await call(old.pipe, arguments("hello", dialect))]
    if begun is not None:  # asked for before the change, read after it
        told.append(await read_rest(begun, Answer()))
    for answer in told:
        assert answer.text == ""
        assert answer.error.startswith("This function has just been updated.")
        assert len(answer.error) < 120
    assert (await ask(new.pipe, "hello", dialect)).text
    await old.pipe.aclose()
    await new.pipe.aclose()


async def test_replaced_code_opens_nothing_any_more(
    simulator: Simulator, reloads: Any, caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder
) -> None:
    old, new = reloads(), reloads()
    assert (await ask(old.pipe, "hello")).text
    assert (await ask(new.pipe, "hello")).text
    set_valves(old.pipe, simulator.base_url, API_KEY="sk-or-v1-one-whose-models-it-does-not-know")
    assert await old.pipe.pipes()
    del old
    await _collect_garbage()
    assert "Unclosed" not in caplog.text
    assert [str(warning.message) for warning in recwarn] == []
    await new.pipe.aclose()


async def test_a_deleted_function_leaves_no_socket_behind(
    reloads: Any, caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder
) -> None:
    """The host tells nobody; what is collected as garbage has to close without a complaint in the log."""
    loaded = reloads()
    assert (await ask(loaded.pipe, "hello")).text
    runtimes = sys.modules[loaded.module._RUNTIMES_KEY].__dict__["runtimes"]
    assert "openrouter" in runtimes
    forget("openrouter")
    del loaded
    await _collect_garbage()
    assert "openrouter" not in runtimes
    assert "Unclosed" not in caplog.text
    assert [str(warning.message) for warning in recwarn] == []


async def _collect_garbage() -> None:
    """Let what has just ended leave the loop, then collect everything that nothing leads to."""
    for _ in range(3):
        await asyncio.sleep(0)
        gc.collect()


async def test_two_functions_live_side_by_side(simulator: Simulator, reloads: Any) -> None:
    first, second = reloads("openrouter", API_KEY="sk-first"), reloads("other", API_KEY="sk-second")
    chunks = await stream(second.pipe, "[[drip rate=200 tokens=60]]")
    answer = await read_until_text(chunks, Answer())
    assert (await ask(first.pipe, "hello")).text
    await first.pipe.aclose(deadline_s=0)
    await read_rest(chunks, answer)
    assert (len(answer.text.split()), answer.error) == (60, "")
    assert (await ask(second.pipe, "hello")).text
    assert len({record.key for record in inferences(simulator)}) == 2
    await second.pipe.aclose()


# Retiring


@pytest.mark.parametrize("dialect", STREAMING)
async def test_the_end_of_its_time_keeps_the_text(dialect: str, pipe: Pipe, simulator: Simulator) -> None:
    simulator.next("stall", hang=12, tasks=True)
    chunks = await stream(pipe, "hello", dialect)
    answer = await read_until_text(chunks, Answer())
    await pipe.aclose(deadline_s=0)
    await read_rest(chunks, answer)
    assert answer.text
    assert answer.error.endswith("Please send the message again.")
    if dialect == "browser":
        assert answer.saved_text() == answer.text
    await gone(simulator)


@pytest.mark.parametrize("dialect", COLLECTED)
async def test_the_end_of_its_time_is_told_to_who_waits(
    dialect: str, pipe: Pipe, simulator: Simulator
) -> None:
    simulator.next("stall", hang=12, tasks=True)
    task = asyncio.create_task(ask(pipe, "hello", dialect))
    await simulator.wait_until(lambda sim: any(record.streaming for record in inferences(sim)))
    await pipe.aclose(deadline_s=0)
    answer = await asyncio.wait_for(task, SOON_S)
    assert answer.error.endswith("Please send the message again.")
    await gone(simulator)


async def test_retiring_waits_for_an_answer_that_ends_in_time(pipe: Pipe) -> None:
    chunks = await stream(pipe, "[[drip rate=100 tokens=40]]")
    answer = await read_until_text(chunks, Answer())
    retiring = asyncio.create_task(pipe.aclose(deadline_s=PATIENCE_S))
    await read_rest(chunks, answer)
    await asyncio.wait_for(retiring, SOON_S)
    assert (len(answer.text.split()), answer.error) == (40, "")


@pytest.mark.parametrize("dialect", sorted(DIALECTS))
async def test_retiring_at_any_moment(dialect: str, pipe: Pipe, simulator: Simulator) -> None:
    """Whoever waits gets the whole answer or one sentence, and gets it soon."""
    for steps in range(100):
        task = asyncio.create_task(ask(pipe, "[[plain text=fine]]", dialect))
        for _ in range(steps):
            await asyncio.sleep(0)
        await pipe.aclose(deadline_s=0)
        answer = await asyncio.wait_for(task, SOON_S)
        assert answer.error or answer.text
        assert not answer.error or "send the message again" in answer.error
    await simulator.wait_until(lambda sim: sim.open == 0, timeout=SOON_S)


async def test_retiring_closes_the_connections_that_were_kept_warm() -> None:
    closed = asyncio.Event()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(b"HTTP/1.1 500 Oops\r\nContent-Length: 0\r\n\r\n")
        await writer.drain()
        await reader.read()  # until the client hangs up
        closed.set()

    async with hostile(handle) as url, running_pipe(url) as pipe:
        await pipe.pipes()
        assert not closed.is_set()
        await pipe.aclose()
        await asyncio.wait_for(closed.wait(), SOON_S)


async def test_retiring_does_not_wait_for_a_reader_that_sleeps(pipe: Pipe, simulator: Simulator) -> None:
    simulator.next("burst", tokens=400_000)
    chunks = await stream(pipe, "hello")
    answer = await read_until_text(chunks, Answer())
    retiring = asyncio.create_task(pipe.aclose(deadline_s=0))
    await gone(simulator)
    await asyncio.wait_for(retiring, 2 * PATIENCE_S)
    await read_rest(chunks, answer)
    assert answer.error


@pytest.fixture
def now() -> list[float]:
    """A clock: the time is its only element."""
    return [0.0]


@pytest.fixture
async def runtime(now: list[float]) -> AsyncIterator[Runtime]:
    runtime = Runtime("runtime_of_a_test", HostEnvironment(secret="s"), clock=lambda: now[0])
    yield runtime
    await runtime.retire(0)


def valves_for(base_url: str) -> Valves:
    return Valves.model_validate({"API_KEY": KEY, "BASE_URL": base_url, "RETRY_ATTEMPTS": 0})


def request_of(prompt: str) -> ChatRequest:
    body = {"model": MODEL, "messages": [{"role": "user", "content": prompt}], "stream": True}
    return ChatRequest(body=body, dialect="browser", model=MODEL)


async def test_retiring_may_be_repeated(runtime: Runtime, simulator: Simulator) -> None:
    await runtime.retire()
    runtime.start()
    await asyncio.gather(runtime.retire(), runtime.retire(0), runtime.retire(1))
    runtime.retire_soon()
    chunks = runtime.stream(runtime.job(request_of("hello"), valves_for(simulator.base_url)))
    answer = await read_rest(chunks, Answer())
    assert answer.error
    assert simulator.requests == []


async def test_starting_takes_over_once(simulator: Simulator) -> None:
    env = HostEnvironment(secret="s")
    first, second = Runtime("takes_over", env), Runtime("takes_over", env)
    first.start()
    first.start()
    assert (first.retired, second.retired) == (False, False)
    second.start()
    first.start()
    assert (first.retired, second.retired) == (True, False)
    await first.retire()
    await second.retire()


# One event loop after the other


@pytest.mark.filterwarnings("ignore:Unclosed:ResourceWarning")  # a loop that was closed under a session
@pytest.mark.parametrize("tidy", [True, False], ids=["closed in between", "left as it was"])
def test_two_event_loops_one_after_the_other(tidy: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEBUI_SECRET_KEY", "the secret of this server")
    pipe = Pipe()

    async def once() -> tuple[int, str]:
        async with Simulator() as simulator:
            set_valves(pipe, simulator.base_url)
            listed = len(await pipe.pipes())
            answer = await ask(pipe, "[[plain text=fine]]")
            if tidy:
                await pipe.aclose()
        return listed, answer.text

    async def last() -> tuple[int, str]:
        result = await once()
        await pipe.aclose()
        return result

    assert asyncio.run(once()) == asyncio.run(last()) == (len(MENU), "fine")
    gc.collect()


# Many at once


@pytest.mark.parametrize("dialect", sorted(set(DIALECTS) - {"task", "task_stream"}))
async def test_a_hundred_chats_at_once(dialect: str, pipe: Pipe, simulator: Simulator) -> None:
    prompts = [f"[[plain text=answer{number}]]" for number in range(100)]
    answers = await asyncio.gather(*(ask(pipe, prompt, dialect) for prompt in prompts))
    assert [answer.text for answer in answers] == [f"answer{number}" for number in range(100)]
    assert [answer.error for answer in answers] == [""] * 100
    assert len(inferences(simulator)) == 100


async def test_a_hundred_slow_chats_do_not_wait_for_each_other(pipe: Pipe, simulator: Simulator) -> None:
    tasks = [asyncio.create_task(ask(pipe, "[[stall]]", "api_stream")) for _ in range(100)]
    await simulator.wait_until(lambda sim: sum(record.streaming for record in inferences(sim)) == 100)
    assert (await ask(pipe, "[[plain text=quick]]")).text == "quick"
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    await simulator.wait_until(lambda sim: sim.open == 0, timeout=SOON_S)


# The catalog


def catalog_requests(simulator: Simulator) -> int:
    return sum(record.path.endswith("/models") for record in simulator.requests)


async def test_fifty_page_loads_cause_one_fetch(pipe: Pipe, simulator: Simulator) -> None:
    simulator.next("stall_headers", on="/models", wait=0.2)
    menus = await asyncio.gather(*(pipe.pipes() for _ in range(50)))
    assert catalog_requests(simulator) == 1
    assert menus == [menus[0]] * 50
    assert MODEL in {entry["id"] for entry in menus[0]}


async def test_page_loads_and_chats_share_one_fetch(pipe: Pipe, simulator: Simulator) -> None:
    simulator.next("stall_headers", on="/models", wait=0.2)
    await asyncio.gather(*(pipe.pipes() for _ in range(10)), *(ask(pipe, "hello") for _ in range(10)))
    assert catalog_requests(simulator) == 1


async def test_a_page_load_that_is_given_up_harms_no_other(pipe: Pipe, simulator: Simulator) -> None:
    simulator.next("stall_headers", on="/models", wait=0.3)
    first = asyncio.create_task(pipe.pipes())
    await simulator.wait_until(lambda sim: catalog_requests(sim) == 1)
    second = asyncio.create_task(pipe.pipes())
    first.cancel()
    menu = await asyncio.wait_for(second, PATIENCE_S)
    assert MODEL in {entry["id"] for entry in menu}


async def test_the_last_good_catalog_serves_while_there_is_no_new_one(
    runtime: Runtime, now: list[float]
) -> None:
    runtime.start()
    before = asyncio.all_tasks()
    async with Simulator() as simulator:
        valves = valves_for(simulator.base_url)
        good = await runtime.models(valves)
        now[0] += 3_601
        simulator.next("http_error", name="500_masked", on="/models")
        assert await runtime.models(valves) == good
        await all_ended(before)
        assert catalog_requests(simulator) == 2
        assert await runtime.models(valves) == good
        await all_ended(before)
        assert catalog_requests(simulator) == 2  # not asked again at once
        now[0] += 16
    for _ in range(2):  # now nobody listens there
        assert await runtime.models(valves) == good
        await all_ended(before)


async def test_a_new_catalog_follows_when_the_old_one_is_an_hour_old(
    runtime: Runtime, simulator: Simulator, now: list[float]
) -> None:
    """Nobody waits for it: the old one serves once more."""
    runtime.start()
    before, valves = asyncio.all_tasks(), valves_for(simulator.base_url)
    old = await runtime.models(valves)
    now[0] += 3_599
    assert await runtime.models(valves) == old
    await all_ended(before)
    assert catalog_requests(simulator) == 1
    del simulator.catalog[MODEL]
    now[0] += 2
    assert await runtime.models(valves) == old
    await all_ended(before)
    new = await runtime.models(valves)
    assert [entry for entry in old if entry not in new] == [entry for entry in old if entry["id"] == MODEL]
    assert catalog_requests(simulator) == 2


@pytest.mark.parametrize("name", ["500_masked", "502_html", "401_bad_key"])
async def test_a_chat_needs_no_catalog(name: str, pipe: Pipe, simulator: Simulator) -> None:
    simulator.next("http_error", name=name, on="/models", times=math.inf)
    assert (await ask(pipe, "[[plain text=fine]]")).text == "fine"


async def test_a_catalog_that_never_comes_does_not_hold_up_a_chat(pipe: Pipe, simulator: Simulator) -> None:
    """TIMEOUT is the patience with a model that thinks: five minutes. A list of models is no such thing."""
    simulator.next("stall_headers", on="/models", times=math.inf)
    async with asyncio.timeout(8):
        assert (await ask(pipe, "[[plain text=fine]]")).text == "fine"


async def test_an_old_catalog_serves_while_the_new_one_never_comes(
    runtime: Runtime, simulator: Simulator, now: list[float]
) -> None:
    runtime.start()
    valves = valves_for(simulator.base_url)
    good = await runtime.models(valves)
    now[0] += 3_601
    simulator.next("stall_headers", on="/models", times=math.inf)
    async with asyncio.timeout(8):
        assert await runtime.models(valves) == good
