"""Calls of a round: run at once, within bounds, each answered whatever happens to it."""

from __future__ import annotations

import asyncio
import functools
import json
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Final, NoReturn

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openrouter_responses_pipe.openrouter_responses_pipe import (
    CircuitBreaker,
    ToolCall,
    ToolFinished,
    ToolInputError,
    ToolLimits,
    ToolOrchestrator,
    ToolResult,
    ToolStarted,
    _arguments_of,
    _problem_with,
    _Turnstile,
)
from tests.recorded import Clock
from tests.support import PATIENCE_S, SOON_S, all_ended
from tests.tools import (
    TEXT,
    WHOLE,
    Crowd,
    Sunk,
    call_of,
    entry,
    named,
    opened,
    orchestrator,
    request_with,
    result_of,
    run,
    schema,
)

Json = dict[str, Any]


async def say(**given: Any) -> str:
    """A tool that tells what it got."""
    return json.dumps(given, sort_keys=True)


# In parallel, within bounds, in order


async def test_the_calls_of_a_round_run_together_within_the_limit() -> None:
    crowd = Crowd()

    async def stay() -> str:
        async with crowd:
            await crowd.gate.wait()
        return "out"

    tools = {"f": entry(stay)}
    working = asyncio.create_task(run([call_of(n) for n in range(12)], tools, ToolLimits(at_once=3)))
    await crowd.full(3)
    crowd.gate.set()
    assert [result.text for result in await working] == ["out"] * 12
    assert (crowd.most, crowd.seen, crowd.inside) == (3, 12, 0)


async def test_calls_begin_in_the_order_of_the_model() -> None:
    begun: list[int] = []

    async def note(n: int) -> None:
        begun.append(n)
        await asyncio.sleep(0)

    tools = {"f": entry(note, parameters=schema({"n": WHOLE}))}
    calls = [call_of(n, arguments=json.dumps({"n": n})) for n in range(120)]
    await run(calls, tools, ToolLimits(at_once=4))
    assert begun == list(range(120))


async def test_results_stand_in_call_order_and_are_told_when_they_are_there() -> None:
    turns = [asyncio.Event() for _ in range(4)]
    turns[3].set()

    async def wait_for(n: int) -> str:
        await turns[n].wait()
        if n:
            turns[n - 1].set()
        return f"result {n}"

    tools = {"f": entry(wait_for, parameters=schema({"n": WHOLE}))}
    calls = [call_of(n, arguments=json.dumps({"n": n})) for n in range(4)]
    sink = Sunk()
    results = await run(calls, tools, sink=sink)
    assert [result.text for result in results] == [f"result {n}" for n in range(4)]
    assert [result.call for result in results] == calls
    assert sink.started() == [call.call_id for call in calls]
    assert sink.finished() == [call.call_id for call in reversed(calls)]
    assert [type(emission) for emission in sink[:4]] == [ToolStarted] * 4


async def test_a_thousand_calls_over_a_hundred_requests() -> None:
    """The bounds of all and of each are kept, nothing is lost or run twice, and nothing stays behind."""
    everywhere, runner = Crowd(), orchestrator()
    each = [Crowd() for _ in range(100)]
    ran: list[tuple[int, int]] = []

    async def work(request: int, n: int) -> str:
        async with everywhere, each[request]:
            ran.append((request, n))
            if everywhere.most < 20:
                await everywhere.full(20)
            for _ in range(n % 4):
                await asyncio.sleep(0)
        return f"{request}.{n}"

    tools = {"f": entry(work, parameters=schema({"request": WHOLE, "n": WHOLE}))}
    before = asyncio.all_tasks()

    def calls(number: int) -> list[ToolCall]:
        return [call_of(n, arguments=json.dumps({"request": number, "n": n})) for n in range(10)]

    limits = ToolLimits(at_once=3, at_once_everywhere=20)
    answers = await asyncio.gather(
        *(run(calls(number), tools, limits, runner, user_id=f"user {number}") for number in range(100))
    )
    assert [[result.text for result in results] for results in answers] == [
        [f"{number}.{n}" for n in range(10)] for number in range(100)
    ]
    assert sorted(ran) == [(number, n) for number in range(100) for n in range(10)]
    assert everywhere.most == 20
    assert max(crowd.most for crowd in each) == 3
    await all_ended(before)


async def test_the_bound_of_all_holds_when_requests_are_cancelled_at_any_moment() -> None:
    crowd, runner = Crowd(), orchestrator()
    before = asyncio.all_tasks()

    async def work() -> str:
        async with crowd:
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        return "done"

    tools, limits = {"f": entry(work)}, ToolLimits(at_once=4, at_once_everywhere=5)
    tasks = [
        asyncio.create_task(run([call_of(n) for n in range(6)], tools, limits, runner)) for _ in range(60)
    ]
    for number, task in enumerate(tasks):
        if number % 3 == 0:
            task.cancel()
        await asyncio.sleep(0)
    done = await asyncio.gather(*tasks, return_exceptions=True)
    whole = [results for results in done if isinstance(results, list)]
    assert len(whole) >= 40
    assert {result.text for results in whole for result in results} == {"done"}
    assert crowd.most <= 5
    assert crowd.inside == 0
    (after,) = await run([call_of(1)], tools, limits, runner)
    assert after.text == "done"
    await all_ended(before)


@settings(max_examples=60, deadline=None)
@given(steps=st.lists(st.tuples(st.integers(1, 3), st.booleans()), min_size=1, max_size=12))
def test_a_turnstile_lets_everybody_through_in_order(steps: list[tuple[int, bool]]) -> None:
    """Whoever is cancelled before his turn leaves no gap, and nobody is forgotten."""

    async def play() -> None:
        gate, let_in, out = _Turnstile(), [], asyncio.Event()

        async def visit(number: int, most: int) -> None:
            await gate.enter(most)
            let_in.append(number)
            try:
                await out.wait()
            finally:
                gate.leave()

        tasks = [asyncio.create_task(visit(number, most)) for number, (most, _) in enumerate(steps)]
        await asyncio.sleep(0)
        for task, (_, leaves) in zip(tasks, steps, strict=True):
            if leaves:
                task.cancel()
        out.set()
        async with asyncio.timeout(PATIENCE_S):
            await asyncio.gather(*tasks, return_exceptions=True)
        assert let_in == sorted(let_in)
        assert {number for number, (_, leaves) in enumerate(steps) if not leaves} <= set(let_in)
        assert gate.inside == 0

    asyncio.run(play())


async def test_who_waits_behind_somebody_who_gave_up_gets_in_when_there_is_room() -> None:
    gate, inside = _Turnstile(), asyncio.Event()

    async def visit(most: int, out: asyncio.Event) -> None:
        await gate.enter(most)
        inside.set()
        await out.wait()
        gate.leave()

    first_out, last_out = asyncio.Event(), asyncio.Event()
    first = asyncio.create_task(visit(1, first_out))
    await inside.wait()
    inside.clear()
    narrow = asyncio.create_task(visit(1, last_out))
    await asyncio.sleep(0)
    wide = asyncio.create_task(visit(5, last_out))
    await asyncio.sleep(0)
    narrow.cancel()
    async with asyncio.timeout(SOON_S):
        await inside.wait()  # there is room for five, and one is inside
        first_out.set()
        last_out.set()
        await asyncio.gather(first, wide)


async def test_the_workers_are_those_of_the_request_and_end_with_it() -> None:
    before = asyncio.all_tasks()
    runner = orchestrator()
    async with opened(runner, request_with({"f": entry(say)}), ToolLimits(at_once=4)) as context:
        assert asyncio.all_tasks() == before
        for _ in range(3):
            await runner.run(context, [call_of(n) for n in range(8)], Sunk())
        assert len(asyncio.all_tasks() - before) == 4
    assert asyncio.all_tasks() == before


async def test_sync_functions_run_in_threads_and_together() -> None:
    barrier, main = threading.Barrier(4, timeout=PATIENCE_S), threading.get_ident()

    def meet(n: int) -> bool:
        barrier.wait()
        return threading.get_ident() != main

    tools = {"f": entry(meet, parameters=schema({"n": WHOLE}))}
    calls = [call_of(n, arguments=json.dumps({"n": n})) for n in range(4)]
    assert [result.text for result in await run(calls, tools)] == ["true"] * 4


async def test_as_many_sync_functions_run_together_as_the_limit_says() -> None:
    """However few processors the machine has."""
    barrier = threading.Barrier(40, timeout=SOON_S)

    def meet() -> str:
        barrier.wait()
        return "met"

    results = await run([call_of(n) for n in range(40)], {"f": entry(meet)}, ToolLimits(at_once=40))
    assert {result.text for result in results} == {"met"}


async def test_sync_functions_that_hang_keep_nobody_from_looking_up_a_name() -> None:
    """The loop's own threads are for the whole server: its names are looked up there."""
    out = threading.Event()

    def hang() -> None:
        out.wait(PATIENCE_S)

    tools = {"f": entry(hang)}
    working = asyncio.create_task(run([call_of(n) for n in range(50)], tools, ToolLimits(at_once=50)))
    try:
        for _ in range(20):
            await asyncio.sleep(0)
        async with asyncio.timeout(2.0):
            await asyncio.get_running_loop().getaddrinfo("127.0.0.1", 80, type=socket.SOCK_STREAM)
    finally:
        out.set()
        await working


async def test_only_sync_functions_leave_the_thread_of_the_loop() -> None:
    async def of_thread() -> str:
        return threading.current_thread().name

    def name_of_thread() -> str:
        return threading.current_thread().name

    assert (await result_of(of_thread)).text == threading.current_thread().name
    assert (await result_of(name_of_thread)).text != threading.current_thread().name


# Time


async def test_a_call_that_takes_too_long_is_ended() -> None:
    ended = asyncio.Event()

    async def hang() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    result = await result_of(hang, timeout_s=0.05)
    assert ended.is_set()
    assert result.failed
    assert result.text.startswith("Error: ")
    assert "did not finish" in result.text


async def test_a_slow_call_does_not_touch_the_others() -> None:
    async def hang() -> None:
        await asyncio.Event().wait()

    tools = {"slow": entry(hang), "f": entry(say)}
    calls = [call_of(1, "slow"), call_of(2), call_of(3, "slow"), call_of(4)]
    results = await run(calls, tools, ToolLimits(at_once=2, timeout_s=0.05))
    assert [result.failed for result in results] == [True, False, True, False]


async def test_a_round_that_takes_too_long_answers_every_call() -> None:
    async def hang() -> None:
        await asyncio.Event().wait()

    calls = [call_of(n) for n in range(9)]
    limits = ToolLimits(at_once=2, batch_timeout_s=0.05)
    results = await run(calls, {"f": entry(hang)}, limits)
    assert [result.call for result in results] == calls
    assert all(result.failed and "together" in result.text for result in results[:2])


async def test_what_has_not_begun_when_the_time_of_the_round_is_over_does_not_begin() -> None:
    begun: list[int] = []

    async def hang(n: int) -> None:
        begun.append(n)
        await asyncio.Event().wait()

    tools = {"f": entry(hang, parameters=schema({"n": WHOLE}))}
    calls = [call_of(n, arguments=json.dumps({"n": n})) for n in range(4)]
    results = await run(calls, tools, ToolLimits(at_once=1, batch_timeout_s=0.05))
    assert all(result.failed for result in results)
    assert begun == [0]


async def test_no_thread_begins_when_the_time_of_the_round_is_over() -> None:
    begun: list[int] = []

    def note(n: int) -> None:
        begun.append(n)

    async def hang() -> None:
        await asyncio.Event().wait()

    tools = named(f=entry(note, parameters=schema({"n": WHOLE})), slow=entry(hang))
    calls = [call_of(0, "slow"), *(call_of(n, arguments=json.dumps({"n": n})) for n in range(1, 4))]
    results = await run(calls, tools, ToolLimits(at_once=1, batch_timeout_s=0.05))
    assert (begun, [result.failed for result in results]) == ([], [True] * 4)


async def test_waiting_for_others_is_no_failure_of_a_tool() -> None:
    """Who only stood in the queue until the time was over is not left alone for that."""

    async def hang() -> None:
        await asyncio.Event().wait()

    tools, runner = named(slow=entry(hang), good=entry(say)), orchestrator()
    limits = ToolLimits(at_once=1, batch_timeout_s=0.05, failures=2)
    await run([call_of(0, "slow"), *(call_of(n, "good") for n in range(1, 5))], tools, limits, runner)
    (result,) = await run([call_of(9, "good")], tools, limits, runner)
    assert result == ToolResult(call_of(9, "good"), "{}")


async def test_a_round_has_its_time_anew() -> None:
    async def hang() -> None:
        await asyncio.Event().wait()

    runner = orchestrator()
    tools = named(slow=entry(hang), f=entry(say))
    async with asyncio.timeout(PATIENCE_S):
        async with opened(runner, request_with(tools), ToolLimits(batch_timeout_s=0.05)) as context:
            (slow,) = await runner.run(context, [call_of(1, "slow")], Sunk())
            (quick,) = await runner.run(context, [call_of(2)], Sunk())
    assert (slow.failed, quick.failed) == (True, False)


async def test_a_tool_that_does_not_end_when_told_to_is_left_behind() -> None:
    release = asyncio.Event()

    async def stubborn() -> str:
        while not release.is_set():
            try:
                await release.wait()
            except asyncio.CancelledError:
                continue
        return "late"

    before = asyncio.all_tasks()
    tools = named(stubborn=entry(stubborn), f=entry(say))
    results = await run([call_of(1, "stubborn"), call_of(2)], tools, ToolLimits(timeout_s=0.05))
    assert [result.failed for result in results] == [True, False]
    release.set()
    await all_ended(before)


@pytest.mark.parametrize("kind", ["coroutine", "stubborn", "thread"])
async def test_leaving_ends_what_runs_within_a_second(kind: str) -> None:
    """A tool that refuses to end, or a thread, is left behind; the request is not."""
    inside, release, thread_out = asyncio.Event(), asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    async def coroutine() -> None:
        inside.set()
        await asyncio.Event().wait()

    async def stubborn() -> None:
        inside.set()
        while not release.is_set():
            try:
                await release.wait()
            except asyncio.CancelledError:
                continue

    def thread() -> None:
        loop.call_soon_threadsafe(inside.set)
        thread_out.wait(PATIENCE_S)

    before = asyncio.all_tasks()
    tool = {"coroutine": coroutine, "stubborn": stubborn, "thread": thread}[kind]
    working = asyncio.create_task(run([call_of(n) for n in range(5)], {"f": entry(tool)}))
    async with asyncio.timeout(PATIENCE_S):
        await inside.wait()
    working.cancel()
    done, _ = await asyncio.wait((working,), timeout=SOON_S + 0.5)
    assert done
    assert working.cancelled()
    release.set()
    thread_out.set()
    await all_ended(before)


async def test_tools_that_are_left_behind_still_count() -> None:
    """The limit is on what runs, not on what is waited for."""
    release, crowd = asyncio.Event(), Crowd()

    async def stubborn() -> None:
        async with crowd:
            while not release.is_set():
                try:
                    await release.wait()
                except asyncio.CancelledError:
                    continue

    runner, tools = orchestrator(), {"f": entry(stubborn)}
    before = asyncio.all_tasks()
    limits = ToolLimits(at_once=2, at_once_everywhere=2, timeout_s=0.02, batch_timeout_s=2.5, failures=100)
    await run([call_of(n) for n in range(4)], tools, limits, runner)
    release.set()
    await all_ended(before)
    assert crowd.most == 2


async def test_threads_that_are_left_behind_still_count() -> None:
    """Nobody can stop a thread; until it has ended its place is taken."""
    release, lock, inside, most = threading.Event(), threading.Lock(), 0, 0

    def hang() -> None:
        nonlocal inside, most
        with lock:
            inside += 1
            most = max(most, inside)
        release.wait(PATIENCE_S)
        with lock:
            inside -= 1

    runner, tools = orchestrator(), {"f": entry(hang)}
    before = asyncio.all_tasks()
    limits = ToolLimits(at_once=4, at_once_everywhere=2, timeout_s=0.02, batch_timeout_s=1.5, failures=100)
    results = await run([call_of(n) for n in range(6)], tools, limits, runner)
    release.set()
    await all_ended(before)
    assert (len(results), most) == (6, 2)


# What tools do


async def test_a_decorated_function_is_what_its_decorator_is() -> None:
    """Whoever wraps a plain function in an asynchronous one wants that one called."""

    def plain(a: int) -> str:
        return f"got {a}"

    @functools.wraps(plain)
    async def later(a: int) -> str:
        return await asyncio.to_thread(plain, a)

    result = await result_of(later, '{"a": 1}', schema({"a": WHOLE}))
    assert (result.text, result.failed) == ("got 1", False)


async def test_an_error_with_a_note_keeps_its_reason() -> None:
    async def fail() -> None:
        error = ValueError("the reason")
        error.add_note("a note")
        raise error

    assert "the reason" in (await result_of(fail)).text


@pytest.mark.parametrize("text", ['{"n": "5"}', '{"n": 5}', '{"n": null}'])
async def test_a_number_as_text_passes_where_it_may_be_one_of_several(text: str) -> None:
    optional = {"anyOf": [{"type": "integer"}, {"type": "null"}]}
    assert not (await result_of(say, text, schema({"n": optional}, "n"))).failed


class OddError(BaseException):
    """Nothing that anybody expects."""


class MuteError(Exception):
    """It cannot even say what it is."""

    def __str__(self) -> str:
        raise RuntimeError("no words")


RAISED: Final[dict[str, Callable[[], BaseException]]] = {
    "Exception": lambda: RuntimeError("the disk is full"),
    "without words": ValueError,
    "TimeoutError": lambda: TimeoutError("too slow"),
    "CancelledError": asyncio.CancelledError,
    "a group": lambda: ExceptionGroup("two", [ValueError("a"), OSError("b")]),
    "a group of anything": lambda: BaseExceptionGroup("two", [OddError("a"), OSError("b")]),
    "StopIteration": StopIteration,
    "StopAsyncIteration": StopAsyncIteration,
    "GeneratorExit": GeneratorExit,
    "BaseException": lambda: OddError("odd"),
    "mute": MuteError,
    "RecursionError": RecursionError,
    "MemoryError": MemoryError,
    "AssertionError": lambda: AssertionError("x" * 1_000_000),
    "surrogate": lambda: RuntimeError("half a character: \ud83d"),
}


def raising(case: str, *, is_sync: bool) -> Callable[..., Any]:
    """A tool that raises one of them."""

    def raise_now() -> NoReturn:
        raise RAISED[case]()

    async def raise_later() -> NoReturn:
        await asyncio.sleep(0)
        raise RAISED[case]()

    return raise_now if is_sync else raise_later


@pytest.mark.parametrize("is_sync", [False, True], ids=["async", "sync"])
@pytest.mark.parametrize("case", sorted(RAISED))
async def test_whatever_a_tool_raises_is_its_result(case: str, is_sync: bool) -> None:
    tools = named(f=entry(say), bad=entry(raising(case, is_sync=is_sync)))
    calls = [call_of(1), call_of(2, "bad"), call_of(3)]
    before = asyncio.all_tasks()
    async with asyncio.timeout(2 * SOON_S):
        results = await run(calls, tools, ToolLimits(at_once=1))
    assert [result.failed for result in results] == [False, True, False]
    assert results[1].text.startswith("Error: ")
    assert len(results[1].text) < 10_000
    await all_ended(before)


async def test_a_tool_that_waits_for_a_cancelled_task_of_its_own() -> None:
    """As libraries do: what ends with CancelledError is their own task, not the call."""

    async def give_up() -> None:
        inner = asyncio.ensure_future(asyncio.Event().wait())
        inner.cancel()
        await inner

    result = await result_of(give_up)
    assert (result.failed, result.text[:7]) == (True, "Error: ")


EXITING: Final = """
import asyncio, sys
import pytest_bootstrap
from tests.tools import call_of, entry, run

def leave(): sys.exit(3)
async def leave_later(): sys.exit(3)

async def main():
    results = await run([call_of(1)], {{"f": entry({tool})}})
    print("survived", results[0].failed)

asyncio.run(main())
"""


@pytest.mark.parametrize("tool", ["leave", "leave_later"])
def test_a_tool_that_calls_exit_does_not_end_the_server(tool: str) -> None:
    folder = Path(__file__).parent.parent
    ran = subprocess.run(
        [sys.executable, "-c", EXITING.format(tool=tool)],
        cwd=folder,
        env={"PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (ran.stdout.strip(), ran.returncode) == ("survived True", 0)


class Plain:
    """An object with words."""

    def __str__(self) -> str:
        return "a plain object"


CIRCLE: Final[list[Any]] = []
CIRCLE.append(CIRCLE)
RETURNED: Final[dict[str, tuple[Any, str | None]]] = {
    "text": ("naïve 漢字 👩‍👩‍👧", "naïve 漢字 👩‍👩‍👧"),
    "empty text": ("", ""),
    "nothing": (None, "(The tool gave no output.)"),
    "zero": (0, "0"),
    "false": (False, "false"),
    "a number": (1.5, "1.5"),
    "an object": ({"a": [1, None], "é": "漢"}, '{"a": [1, null], "é": "漢"}'),
    "an empty object": ({}, "{}"),
    "an empty list": ([], "[]"),
    "a tuple": (({"a": 1}, {"x": "y"}), '[{"a": 1}, {"x": "y"}]'),
    "something": (Plain(), '"a plain object"'),
    "something in a list": ([Plain()], '["a plain object"]'),
    "a set": ({1}, '"{1}"'),
    "bytes": (b"abc", None),
    "not a number": (float("nan"), "NaN"),
    "odd keys": ({(1, 2): 3}, None),
    "a circle": (CIRCLE, None),
    "a huge number": (10**5000, None),
}


@pytest.mark.parametrize("case", sorted(RETURNED))
async def test_whatever_a_tool_returns_is_a_text(case: str) -> None:
    value, text = RETURNED[case]

    async def give() -> Any:
        return value

    result = await result_of(give)
    assert isinstance(result.text, str)
    if text is not None:
        assert (result.text, result.failed) == (text, False)


async def test_a_function_that_gives_a_coroutine_is_awaited() -> None:
    """A decorator may hide that a tool is asynchronous."""

    def decorated(**given: Any) -> Any:
        return say(**given)

    tools = {"f": {**entry(say, parameters=schema({"a": WHOLE})), "callable": decorated}}
    (result,) = await run([call_of(1, arguments='{"a": 1}')], tools)
    assert result.text == '{"a": 1}'


async def test_a_partial_function_is_run() -> None:
    async def two(a: int, b: int) -> str:
        await asyncio.sleep(0)
        return f"partial {a} {b}"

    tool = {**entry(say, parameters=schema({"a": WHOLE})), "callable": partial(two, b=2)}
    (result,) = await run([call_of(1, arguments='{"a": 1}')], {"f": tool})
    assert result.text == "partial 1 2"


async def test_a_call_is_never_made_again() -> None:
    made: list[int] = []

    async def fail() -> None:
        made.append(1)
        raise ConnectionResetError

    await result_of(fail)
    assert made == [1]


# Long results


@pytest.mark.parametrize("length", [999, 1000, 1001, 5000, 1_000_000])
async def test_a_long_result_keeps_head_and_tail(length: int) -> None:
    text = "".join(chr(0x100 + n % 20_000) for n in range(length))

    async def write() -> str:
        return text

    result = await result_of(write, most_chars=1000)
    if length <= 1000:
        assert result.text == text
        return
    assert len(result.text) <= 1000
    head, _, rest = result.text.partition("\n[… ")
    count, _, tail = rest.partition(" characters left out …]\n")
    assert text.startswith(head)
    assert text.endswith(tail)
    assert len(head) + len(tail) + int(count.replace(",", "")) == length
    assert len(tail) > 250


async def test_a_long_error_is_short() -> None:
    async def fail() -> None:
        raise ValueError("x" * 1_000_000)

    result = await result_of(fail)
    assert len(result.text) < 2100


async def test_the_remark_on_a_repeated_call_stays_within_the_limit() -> None:
    async def write() -> str:
        return "x" * 5000

    runner, limits = orchestrator(), ToolLimits(most_chars=1000)
    async with opened(runner, request_with({"f": entry(write)}), limits) as context:
        for _ in range(2):
            await runner.run(context, [call_of(1)], Sunk())
        (result,) = await runner.run(context, [call_of(3)], Sunk())
    assert "3 times on end" in result.text
    assert len(result.text) <= 1000


# The same call over and over


async def rounds_of(rounds: list[list[ToolCall]], tools: dict[str, Json] | None = None) -> list[list[str]]:
    """The texts of the results of several rounds of one request."""
    runner = orchestrator()
    request = request_with(tools or named(f=entry(say), g=entry(say)))
    async with opened(runner, request, ToolLimits()) as context:
        return [[result.text for result in await runner.run(context, calls, Sunk())] for calls in rounds]


async def test_the_same_call_three_rounds_on_end_is_pointed_out() -> None:
    texts = await rounds_of([[call_of(n)] for n in range(5)])
    marked = ["same call" in text for (text,) in texts]
    assert marked == [False, False, True, True, True]
    assert texts[2][0].startswith("{}\n\n[")


async def test_a_call_that_was_not_made_in_between_is_no_repetition() -> None:
    same, other = call_of(1), call_of(2, "g")
    texts = await rounds_of([[same], [same], [other], [same], [same], [other, same]])
    assert ["same call" in text for round_ in texts for text in round_] == [False] * 6 + [True]


async def test_twice_in_one_round_is_no_repetition() -> None:
    texts = await rounds_of([[call_of(1), call_of(2), call_of(3)], [call_of(4)]])
    assert not any("same call" in text for round_ in texts for text in round_)


async def test_a_failing_call_is_pointed_out_too() -> None:
    async def fail() -> None:
        raise ValueError("no")

    texts = await rounds_of([[call_of(n), call_of(f"{n}b", "gone")] for n in range(3)], {"f": entry(fail)})
    assert all("same call" in text for text in texts[2])


async def test_arguments_written_differently_are_the_same_call() -> None:
    written = ['{"a": 1, "b": 2}', '{"a":1,"b":2}', '{ "b": 2, "a": 1 }']
    tools = named(f=entry(say, parameters=schema({"a": WHOLE, "b": WHOLE})))
    texts = await rounds_of([[call_of(n, arguments=text)] for n, text in enumerate(written)], tools)
    assert "same call" in texts[2][0]


# Arguments

ROW: Final = {"type": "object", "properties": {"a": WHOLE, "b": TEXT}, "required": ["a"]}
PARAMETERS: Final = schema(
    {"text": TEXT, "count": WHOLE, "rows": {"type": "array", "items": ROW}, "one": ROW}, "text"
)
TAKEN: Final[dict[str, tuple[str, Json]]] = {
    "as it is": ('{"text": "a", "count": 2}', {"text": "a", "count": 2}),
    "spaces": ('  \n{"text": "a"}\n ', {"text": "a"}),
    "extra is dropped": ('{"text": "a", "other": 1, "__user__": {"id": "x"}}', {"text": "a"}),
    "null of an optional one": ('{"text": "a", "count": null, "rows": null}', {"text": "a"}),
    "null deeper": ('{"text": "a", "one": {"a": 1, "b": null}}', {"text": "a", "one": {"a": 1}}),
    "null in rows": (
        '{"text": "a", "rows": [{"a": 1, "b": null}, {"a": 2, "b": "x"}]}',
        {"text": "a", "rows": [{"a": 1}, {"a": 2, "b": "x"}]},
    ),
    "a number as text": ('{"text": "a", "count": "2"}', {"text": "a", "count": "2"}),
    "a text as number": ('{"text": 5}', {"text": 5}),
    "a whole number as float": ('{"text": "a", "count": 2.0}', {"text": "a", "count": 2.0}),
}


@pytest.mark.parametrize("case", sorted(TAKEN))
async def test_arguments_that_a_tool_gets(case: str) -> None:
    written, given_ = TAKEN[case]
    result = await result_of(say, written, PARAMETERS)
    assert (result.text, result.failed) == (json.dumps(given_, sort_keys=True), False)


REFUSED: Final[dict[str, str]] = {
    "half": '{"text": "a"',
    "words": "look it up",
    "two": '{"text": "a"}{"text": "b"}',
    "a list": '["a"]',
    "null": "null",
    "a text": '"a"',
    "nothing": "",
    "blank": "  \n",
    "required is missing": '{"count": 1}',
    "required is null": '{"text": null}',
    "wrong type": '{"text": ["a"]}',
    "truth for a text": '{"text": true}',
    "words for a number": '{"text": "a", "count": "many"}',
    "broken number": '{"text": "a", "count": 1.5}',
    "deep": '{"text": "a", "rows": [{"a": 1}, {"b": "x"}]}',
    "endless": '{"text": ' + "[" * 100_000,
    "endless but whole": '{"text": ' + "[" * 50_000 + "]" * 50_000 + "}",
}


@pytest.mark.parametrize("case", sorted(REFUSED))
async def test_arguments_that_do_not_fit_are_said_to_the_model(case: str) -> None:
    made: list[Any] = []

    async def note(**given_: Any) -> None:
        made.append(given_)

    runner, limits = orchestrator(), ToolLimits(failures=2)
    tools = {"f": entry(note, parameters=PARAMETERS)}
    for number in range(4):
        call = call_of(number, arguments=REFUSED[case])
        (result,) = await run([call], tools, limits, runner)
        assert result.failed
        assert result.text.startswith("Error: ")
        assert "again" in result.text, "it is the model's own mistake, and no tool is left alone for it"
        assert len(result.text) < 1000
    assert made == []


@pytest.mark.parametrize("written", ["", "   ", "{}", "null"])
async def test_nothing_for_a_tool_that_takes_nothing(written: str) -> None:
    result = await result_of(say, written)
    assert result.failed is (written == "null")


@pytest.mark.parametrize("name", ["", "nobody", "F", "f ", "x" * 10_000])
async def test_a_tool_that_is_not_there(name: str) -> None:
    (result,) = await run([ToolCall("c", name, "{}")], {"f": entry(say)})
    assert result.failed
    assert "no tool" in result.text
    assert len(result.text) < 200


NULLABLE: Final[dict[str, Json]] = {
    "OpenAPI": {"type": "string", "nullable": True},
    "JSON Schema": {"type": ["string", "null"]},
    "anyOf": {"anyOf": [TEXT, {"type": "null"}]},
    "enum": {"type": "string", "enum": ["a", "b"], "nullable": True},
    "enum with null": {"type": "string", "enum": ["a", "b", None], "nullable": True},
    "reference": {"$ref": "#/$defs/maybe"},
    "wrapped": {"allOf": [{"$ref": "#/$defs/word"}], "nullable": True},
}


@pytest.mark.parametrize("is_required", [True, False])
@pytest.mark.parametrize("case", sorted(NULLABLE))
async def test_null_where_it_is_a_value(case: str, is_required: bool) -> None:
    definitions = {"maybe": {"type": ["string", "null"]}, "word": TEXT}
    parameters = schema({"x": NULLABLE[case]}, *(["x"] if is_required else []), **{"$defs": definitions})
    result = await result_of(say, '{"x": null}', parameters)
    assert not result.failed, result.text
    assert result.text in ('{"x": null}', "{}")
    if is_required:
        assert result.text == '{"x": null}'


async def test_servers_of_mcp_get_what_the_model_wrote() -> None:
    async def over_mcp(**given_: Any) -> str:
        return json.dumps(given_, sort_keys=True)

    tool: Json = {"spec": {"name": "f", "parameters": schema({"a": WHOLE})}, "callable": over_mcp}
    (result,) = await run([call_of(1, arguments='{"a": 1, "b": 2}')], {"f": {**tool, "type": "mcp"}})
    assert result.text == '{"a": 1, "b": 2}'


@pytest.mark.parametrize("root", [{"$ref": "#/$defs/all"}, {"allOf": [{"$ref": "#/$defs/all"}]}])
async def test_properties_behind_a_reference_are_not_dropped(root: Json) -> None:
    parameters = {**root, "$defs": {"all": schema({"a": WHOLE}, "a")}}
    result = await result_of(say, '{"a": 1}', parameters)
    assert result.text == '{"a": 1}'


BROKEN: Final[dict[str, Any]] = {
    "no schema": None,
    "a text": "string",
    "a list": [TEXT],
    "a number of a type": {"type": 7, "properties": {"a": TEXT}},
    "an unknown type": {"type": "object", "properties": {"a": {"type": "text"}}},
    "properties are a list": {"type": "object", "properties": [TEXT]},
    "a property is a text": {"type": "object", "properties": {"a": "string"}},
    "a property is null": {"type": "object", "properties": {"a": None}},
    "required is a text": {"type": "object", "properties": {"a": TEXT}, "required": "a"},
    "required is true": {"type": "object", "properties": {"a": TEXT}, "required": True},
    "required holds numbers": {"type": "object", "properties": {"a": TEXT}, "required": [1, None]},
    "a broken pattern": {"type": "object", "properties": {"a": {"type": "string", "pattern": "(["}}},
    "a pattern that is a number": {"type": "object", "properties": {"a": {"type": "string", "pattern": 7}}},
    "a reference to nothing": {"type": "object", "properties": {"a": {"$ref": "#/nowhere"}}},
    "a reference to itself": {"type": "object", "properties": {"a": {"$ref": "#/properties/a"}}},
    "enum is a text": {"type": "object", "properties": {"a": {"enum": "abc"}}},
    "minimum is a text": {"type": "object", "properties": {"a": {"minimum": "1", "type": "number"}}},
    "anyOf is an object": {"type": "object", "properties": {"a": {"anyOf": {}}}},
    "items of old": {"type": "object", "properties": {"a": {"type": "array", "items": [TEXT]}}},
    "an unknown dialect": {"$schema": "urn:nobody", "type": "object", "properties": {"a": TEXT}},
}


@pytest.mark.parametrize("case", sorted(BROKEN))
@pytest.mark.parametrize("written", ["{}", '{"a": "x"}', '{"a": null}', '{"a": [1]}'])
async def test_a_schema_that_cannot_be_read_stops_nobody(case: str, written: str) -> None:
    tool = entry(say)
    tool["spec"]["parameters"] = BROKEN[case]
    runner, limits = orchestrator(), ToolLimits(failures=1)
    await run([call_of(1, arguments=written)], {"f": tool}, limits, runner)
    (result,) = await run([call_of(2, arguments="{}")], {"f": tool}, limits, runner)
    assert not result.failed or "do not fit" in result.text or "missing" in result.text, result.text


@pytest.mark.parametrize("spec", [None, "f", {}, {"name": "f"}, {"name": "f", "parameters": {}}])
async def test_a_tool_without_a_schema_gets_no_arguments(spec: Any) -> None:
    tool = {**entry(say), "spec": spec}
    (result,) = await run([call_of(1)], {"f": tool})
    assert (result.text, result.failed) == ("{}", False)


@pytest.mark.parametrize("scheme", ["http", "https", "file"])
async def test_no_schema_is_fetched(scheme: str, unused_tcp_listener: list[str]) -> None:
    address = f"{scheme}://{unused_tcp_listener[0]}/schema.json"
    parameters = schema({"a": {"$ref": address}}, **{"$schema": address})
    result = await result_of(say, '{"a": 1}', parameters)
    assert result.text == '{"a": 1}'
    assert unused_tcp_listener[1:] == []


@pytest.fixture
def unused_tcp_listener() -> Any:
    """[its address, whoever connected …]; a thread accepts, because a fetch would block the loop."""
    listener = socket.create_server(("127.0.0.1", 0))
    seen = [f"127.0.0.1:{listener.getsockname()[1]}"]

    def accept() -> None:
        while True:
            try:
                connection, peer = listener.accept()
            except OSError:
                return
            seen.append(str(peer))
            connection.close()

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    yield seen
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join(PATIENCE_S)


OPENAPI_3_0: Final[list[tuple[Json, Any]]] = [
    ({"type": "integer", "minimum": 0, "exclusiveMinimum": False}, 0),
    ({"type": "integer", "minimum": 0, "exclusiveMinimum": True}, 1),
    ({"type": "integer", "maximum": 10, "exclusiveMaximum": False}, 10),
    ({"type": "number", "maximum": 10, "exclusiveMaximum": True}, 9.5),
]


@pytest.mark.parametrize(("part", "value"), OPENAPI_3_0)
async def test_bounds_as_openapi_3_0_says_them(part: Json, value: Any) -> None:
    """There they are true or false, beside the minimum."""
    result = await result_of(say, json.dumps({"n": value}), schema({"n": part}))
    assert not result.failed, result.text


def doubling(depth: int, keyword: str) -> Json:
    """A schema whose checking doubles with each step."""
    definitions: Json = {f"d{n}": {keyword: [{"$ref": f"#/$defs/d{n + 1}"}] * 2} for n in range(depth)}
    definitions[f"d{depth}"] = {"type": "string"}
    return schema({"a": {"$ref": "#/$defs/d0"}}, **{"$defs": definitions})


CODE_OF_BOMB: Final = """
import json, sys
from openrouter_responses_pipe.openrouter_responses_pipe import ToolCall, ToolError, _arguments_of
parameters, arguments = json.load(sys.stdin)
tool = {"spec": {"name": "f", "parameters": parameters}, "callable": print}
try:
    _arguments_of(ToolCall("c", "f", json.dumps(arguments)), tool)
except ToolError:
    pass
print("over")
"""
BOMBS: Final[dict[str, tuple[Json, Json]]] = {
    "doubling": (doubling(40, "anyOf"), {"a": 1}),
    "pattern": (schema({"a": {"type": "string", "pattern": "^(a+)+$"}}), {"a": "a" * 60 + "!"}),
}


@pytest.mark.parametrize("case", sorted(BOMBS))
def test_a_schema_cannot_occupy_the_server(case: str) -> None:
    """Servers of tools are of many hands, and arguments are checked where everybody's answers pass."""
    parameters, given_ = BOMBS[case]
    folder = Path(__file__).parent.parent
    ran = subprocess.run(
        [sys.executable, "-c", CODE_OF_BOMB],
        input=json.dumps([parameters, given_]),
        cwd=folder,
        env={"PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert ran.stdout == "over\n"


@given(
    arguments=st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=3),
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abcx"), inner, max_size=3)
        ),
        max_leaves=8,
    ),
    parameters=st.recursive(
        st.sampled_from([TEXT, WHOLE, {}, {"type": "null"}, {"nullable": True, "type": "string"}, None, 7]),
        lambda inner: st.fixed_dictionaries(
            {"type": st.sampled_from(["object", "array", "string", ["object", "null"], 3])},
            optional={
                "properties": st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
                "items": inner,
                "anyOf": st.lists(inner, max_size=2),
                "allOf": st.lists(inner, max_size=2),
                "$ref": st.sampled_from(["#", "#/properties/a", "#/nowhere", "http://127.0.0.1:1/x"]),
                "required": st.lists(st.sampled_from("abc"), max_size=2),
            },
        ),
        max_leaves=6,
    ),
)
@settings(max_examples=200, deadline=None)
def test_any_arguments_for_any_schema_are_taken_or_refused(arguments: Any, parameters: Any) -> None:
    tool = {"spec": {"name": "f", "parameters": parameters}, "callable": say}
    call = call_of(1, arguments=json.dumps(arguments))
    try:
        taken = _arguments_of(call, tool)
    except ToolInputError:
        return
    assert isinstance(arguments, dict)
    assert taken.keys() <= arguments.keys()


def test_a_problem_is_named_with_its_place() -> None:
    problem = _problem_with({"text": "a", "rows": [{"a": 1}, {"a": "x"}]}, PARAMETERS)
    assert problem.startswith("rows.1.a: ")
    assert "x" in problem


# Left alone after failures


def clocked(seconds: float = 60.0, failures: int = 3) -> tuple[CircuitBreaker, Clock, ToolLimits]:
    clock = Clock(1000.0)
    return CircuitBreaker(clock), clock, ToolLimits(failures=failures, window_s=seconds)


def test_a_breaker_opens_within_the_window_only() -> None:
    breaker, clock, limits = clocked()
    for _ in range(10):
        assert breaker.allow("u", "t", limits)
        assert not breaker.record("u", "t", limits, failed=True)
        clock.now += 30.1
    assert [breaker.record("u", "t", limits, failed=True) for _ in range(2)] == [False, True]
    assert not breaker.allow("u", "t", limits)


def test_a_success_forgets_the_failures_before_it() -> None:
    breaker, _, limits = clocked()
    for failed in (True, True, False, True, True):
        breaker.record("u", "t", limits, failed=failed)
    assert breaker.allow("u", "t", limits)


def test_after_the_window_one_call_tries() -> None:
    breaker, clock, limits = clocked()
    for _ in range(3):
        breaker.record("u", "t", limits, failed=True)
    clock.now += 59.9
    assert not breaker.allow("u", "t", limits)
    clock.now += 0.2
    assert [breaker.allow("u", "t", limits) for _ in range(3)] == [True, False, False]
    breaker.record("u", "t", limits, failed=True)
    clock.now += 59.9
    assert not breaker.allow("u", "t", limits)
    clock.now += 0.2
    assert breaker.allow("u", "t", limits)
    breaker.record("u", "t", limits, failed=False)
    assert [breaker.allow("u", "t", limits) for _ in range(3)] == [True] * 3


def test_a_probe_that_never_ends_is_not_the_last() -> None:
    breaker, clock, limits = clocked()
    for _ in range(3):
        breaker.record("u", "t", limits, failed=True)
    clock.now += 61
    assert breaker.allow("u", "t", limits)
    clock.now += 61
    assert breaker.allow("u", "t", limits)


def test_a_breaker_is_that_of_a_person_and_a_tool() -> None:
    breaker, _, limits = clocked()
    for _ in range(3):
        breaker.record("u", "t", limits, failed=True)
    assert breaker.allow("u", "other", limits)
    assert breaker.allow("other", "t", limits)
    assert not breaker.allow("u", "t", limits)


def test_what_a_breaker_remembers_is_bounded() -> None:
    breaker, _, limits = clocked(failures=1)
    sizes = []
    for count in (20_000, 40_000):
        for number in range(count):
            breaker.record(f"user {number}", "t", limits, failed=True)
        sizes.append(sum(sys.getsizeof(part) for part in vars(breaker).values()))
    assert sizes[1] <= sizes[0]
    assert not breaker.allow("user 39999", "t", limits)


async def fails(**_given: Any) -> None:
    """A tool that is out of order."""
    raise ConnectionError("no route")


async def test_a_tool_that_fails_again_and_again_is_left_alone() -> None:
    clock, sink = Clock(), Sunk()
    runner, limits = orchestrator(clock), ToolLimits(failures=3, window_s=60)
    tools = named(bad=entry(fails), good=entry(say))
    for number in range(3):
        (result,) = await run([call_of(number, "bad")], tools, limits, runner, sink)
        assert "no route" in result.text
    results = await run([call_of(4, "bad"), call_of(5, "good")], tools, limits, runner, sink)
    assert [result.failed for result in results] == [True, False]
    assert "temporarily disabled" in results[0].text
    assert len(sink.told()) == 1
    assert "bad" in sink.told()[0]
    (other,) = await run([call_of(6, "bad")], tools, limits, runner, user_id="another")
    assert "no route" in other.text
    clock.now += 61
    (probe,) = await run([call_of(7, "bad")], tools, limits, runner)
    assert "no route" in probe.text
    (again,) = await run([call_of(8, "bad")], tools, limits, runner)
    assert "temporarily disabled" in again.text


async def test_a_tool_comes_back_when_its_probe_is_well() -> None:
    clock, is_well = Clock(), False

    async def moody() -> str:
        if not is_well:
            raise ConnectionError
        return "well"

    runner, limits, tools = orchestrator(clock), ToolLimits(failures=1), {"f": entry(moody)}
    await run([call_of(1)], tools, limits, runner)
    is_well = True
    assert (await run([call_of(2)], tools, limits, runner))[0].failed
    clock.now += 61
    assert [result.text for result in await run([call_of(3)], tools, limits, runner)] == ["well"]
    results = await run([call_of(n) for n in range(4, 9)], tools, limits, runner)
    assert {result.text for result in results} == {"well"}


async def test_time_that_runs_out_is_a_failure_of_the_tool() -> None:
    async def hang() -> None:
        await asyncio.Event().wait()

    runner, limits = orchestrator(), ToolLimits(failures=2, timeout_s=0.02)
    tools = {"f": entry(hang)}
    await run([call_of(1), call_of(2)], tools, limits, runner)
    (result,) = await run([call_of(3)], tools, limits, runner)
    assert "temporarily disabled" in result.text


async def test_a_request_that_is_stopped_is_no_failure_of_the_tool() -> None:
    crowd, runner, limits = Crowd(), orchestrator(), ToolLimits(failures=1)

    async def stay() -> str:
        async with crowd:
            await crowd.gate.wait()
        return "out"

    tools = {"f": entry(stay)}
    working = asyncio.create_task(run([call_of(1)], tools, limits, runner))
    await crowd.full(1)
    working.cancel()
    await asyncio.wait((working,))
    crowd.gate.set()
    (result,) = await run([call_of(2)], tools, limits, runner)
    assert result.text == "out"


# Tools of the page


async def in_page(answer: Any, **host: Any) -> tuple[ToolResult, list[Json]]:
    """A call of a tool server of the browser's, and what the page was asked."""
    asked: list[Json] = []

    async def ask_page(event: Json) -> Any:
        asked.append(event)
        return answer

    tool: Json = {"spec": {"name": "f", "parameters": schema({"a": WHOLE})}, "direct": True}
    tool["server"] = {"url": "http://127.0.0.1:1"}
    host = {"event_call": ask_page, "metadata": {"session_id": "session"}} | host
    runner = orchestrator()
    async with opened(runner, request_with({"f": tool}, **host), ToolLimits()) as context:
        (result,) = await runner.run(context, [call_of(1, arguments='{"a": 1, "x": 2}')], Sunk())
    return result, asked


async def test_a_tool_of_the_page_is_called_there() -> None:
    result, (asked,) = await in_page({"sum": 1})
    assert asked["type"] == "execute:tool"
    assert asked["data"]["params"] == {"a": 1}
    assert asked["data"]["server"] == {"url": "http://127.0.0.1:1"}
    assert (asked["data"]["name"], asked["data"]["session_id"]) == ("f", "session")
    assert result.text == '{"sum": 1}'


async def test_a_page_that_is_not_there_is_a_failure() -> None:
    result, _ = await in_page(None, event_call=None)
    assert result.failed
    assert "browser" in result.text
    result, _ = await in_page({"error": "Client session disconnected."})
    assert result.failed, "it is how the host says that there is no page"


# The whole


@settings(max_examples=40, deadline=None)
@given(
    calls=st.lists(
        st.tuples(
            st.sampled_from(["good", "bad", "sync", "slow", "gone", "odd"]),
            st.sampled_from(["{}", "", "[", '{"a": 1}', "null"]),
        ),
        max_size=12,
    ),
    at_once=st.integers(1, 6),
)
def test_any_round_is_answered_call_by_call(calls: list[tuple[str, str]], at_once: int) -> None:
    async def slow() -> None:
        await asyncio.Event().wait()

    async def odd() -> Any:
        return Plain()

    def sync() -> str:
        return "sync"

    async def play() -> None:
        tools = named(good=entry(say), bad=entry(fails), sync=entry(sync), slow=entry(slow), odd=entry(odd))
        made = [call_of(n, name, arguments) for n, (name, arguments) in enumerate(calls)]
        sink, before = Sunk(), asyncio.all_tasks()
        limits = ToolLimits(at_once=at_once, timeout_s=0.01, failures=100)
        results = await run(made, tools, limits, sink=sink)
        assert [result.call for result in results] == made
        assert sink.started() == [call.call_id for call in made]
        assert sorted(sink.finished()) == sorted(call.call_id for call in made)
        told = {e.result.call.call_id: e.result for e in sink if isinstance(e, ToolFinished)}
        assert [told[call.call_id] for call in made] == results
        assert asyncio.all_tasks() == before

    asyncio.run(play())


async def test_no_calls_are_no_work() -> None:
    sink = Sunk()
    assert await run([], {}, sink=sink) == []
    assert not any(isinstance(emission, ToolFinished) for emission in sink)


def test_an_orchestrator_needs_no_loop() -> None:
    assert isinstance(orchestrator(), ToolOrchestrator)
