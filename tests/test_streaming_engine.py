"""One upstream call with its retries: through the real client, over a socket, into a sink."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from openrouter_responses_pipe.openrouter_responses_pipe import (
    CitationFound,
    Connection,
    Emission,
    MediaProduced,
    OpenRouterClient,
    PipeError,
    ReasoningDelta,
    RefusalDelta,
    RetryPolicy,
    StatusUpdate,
    StreamError,
    StreamingEngine,
    TextDelta,
    ToolRequested,
    TurnEnded,
    UpstreamRequest,
    UsageReported,
)
from openrouter_responses_pipe.simulator import Simulator
from tests.support import (
    EVENT_STREAM,
    MODEL,
    PATIENCE_S,
    SOON_S,
    STREAMS,
    TRANSCRIPTS,
    Sleeps,
    all_ended,
    completed,
    connection_to,
    delta,
    frame,
    gone,
    hostile,
    inferences,
    read_request,
)

Json = dict[str, Any]
ENDS_WELL = ("completed", "incomplete")


@dataclass
class Kept:
    """A sink that keeps what it is given."""

    emissions: list[Emission] = field(default_factory=list)
    first: asyncio.Event = field(default_factory=asyncio.Event)

    async def __call__(self, emissions: Sequence[Emission]) -> None:
        self.emissions += emissions
        self.first.set()

    def of(self, kind: type) -> list[Any]:
        return [emission for emission in self.emissions if type(emission) is kind]

    def text(self) -> str:
        """The answer, pairs that came in two halves joined."""
        text = "".join(piece.text for piece in self.of(TextDelta))
        return text.encode("utf-16", "surrogatepass").decode("utf-16")

    def statuses(self) -> list[str]:
        """The lines that a person reads; not the one that ends the last."""
        return [status.description for status in self.of(StatusUpdate) if not status.hidden]


@pytest.fixture
async def client() -> AsyncIterator[OpenRouterClient]:
    client = OpenRouterClient()
    yield client
    await client.aclose()


@pytest.fixture
def sleeps() -> Sleeps:
    return Sleeps()


@pytest.fixture
def engine(client: OpenRouterClient, sleeps: Sleeps) -> StreamingEngine:
    return StreamingEngine(client, sleeps)


@pytest.fixture
def connection(simulator: Simulator) -> Connection:
    return connection_to(simulator.base_url)


CHUNKED = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def in_a_chunk(content: bytes) -> bytes:
    """A chunk of an HTTP body; without an empty one at its end the body was cut."""
    return b"%x\r\n%b\r\n" % (len(content), content)


def asking(prompt: str = "hello") -> Json:
    message = {"role": "user", "content": [{"type": "input_text", "text": prompt}]}
    return {"model": MODEL, "input": [message], "stream": True, "store": False}


ONCE = RetryPolicy(attempts=0)


async def run(engine: StreamingEngine, connection: Connection, policy: RetryPolicy = ONCE) -> Kept:
    """One call that ends well."""
    kept = Kept()
    async with asyncio.timeout(PATIENCE_S):
        await engine.stream(connection, UpstreamRequest(asking()), kept, policy)
    return kept


async def fail(
    engine: StreamingEngine, connection: Connection, policy: RetryPolicy = ONCE
) -> tuple[PipeError, Kept]:
    """One call that ends in an error."""
    kept = Kept()
    async with asyncio.timeout(PATIENCE_S):
        with pytest.raises(PipeError) as caught:
            await engine.stream(connection, UpstreamRequest(asking()), kept, policy)
    return caught.value, kept


# Every recorded stream


@pytest.mark.parametrize("how", ["whole", "bytewise"])
@pytest.mark.parametrize("name", STREAMS)
async def test_a_recorded_stream(
    name: str, how: str, engine: StreamingEngine, connection: Connection, simulator: Simulator
) -> None:
    simulator.next("golden", name=name, **({"bytes": 1} if how == "bytewise" else {}))
    expect = TRANSCRIPTS[name]["expect"]
    if expect["terminal"] in ENDS_WELL:
        kept = await run(engine, connection)
        ended = TurnEnded(expect["terminal"], expect.get("incomplete_reason", ""))
        assert kept.of(TurnEnded) == [ended]
        assert [report.usage for report in kept.of(UsageReported)] == [expect["usage"]]
    else:
        error, kept = await fail(engine, connection)
        assert expect["error"]["message"] in error.detail
        assert not kept.of(TurnEnded)
    assert kept.text() == expect["text"]
    assert len(kept.of(MediaProduced)) == len(expect.get("images", ()))
    assert len(inferences(simulator)) == 1
    _compare_the_rest(kept, expect)


def _compare_the_rest(kept: Kept, expect: Json) -> None:
    reasoning = expect.get("reasoning_summary", []) + expect.get("reasoning_text", [])
    assert "".join(piece.text for piece in kept.of(ReasoningDelta)) == "".join(reasoning)
    assert "".join(piece.text for piece in kept.of(RefusalDelta)) == expect.get("refusal", "")
    assert [found.url for found in kept.of(CitationFound)] == expect.get("citations", [])
    calls = [requested.call for requested in kept.of(ToolRequested)]
    told = [
        {"call_id": call.call_id, "name": call.name, "arguments": json.loads(call.arguments)}
        for call in calls
    ]
    assert sorted(told, key=str) == sorted(expect.get("tool_calls", []), key=str)


FRAMES_BEFORE_THE_LAST_WORD = {"02_reasoning_summary_encrypted": 42, "05_parallel_function_calls": 24}


@pytest.mark.parametrize("name", sorted(FRAMES_BEFORE_THE_LAST_WORD))
async def test_a_recorded_stream_that_stops_anywhere_is_an_error(
    name: str, engine: StreamingEngine, connection: Connection, simulator: Simulator
) -> None:
    """Cut after each frame: nothing counts as an answer before the frame that says so."""
    frames = 0
    async with asyncio.timeout(60):
        while frames < 400:
            simulator.next("golden", name=name, cut=frames, how="eof")
            kept = Kept()
            with contextlib.suppress(StreamError):
                await engine.stream(connection, UpstreamRequest(asking()), kept, ONCE)
            if kept.of(TurnEnded):
                break
            frames += 1
    assert frames == FRAMES_BEFORE_THE_LAST_WORD[name]


# Trying again


POLICY = RetryPolicy(attempts=3, longest_wait_s=30.0)
PASSING: dict[str, tuple[Json, list[float]]] = {
    "named by the header": ({"name": "429_capacity_exhausted"}, [2.0]),
    "named by the test": ({"name": "503_no_provider", "retry_after": 7}, [7.0]),
    "at once": ({"name": "500_masked", "retry_after": 0}, [0.0]),
    "in a body under 200": ({"name": "200_error_body", "retry_after": 3}, [3.0]),
}


@pytest.mark.parametrize("case", sorted(PASSING))
async def test_a_passing_refusal_is_tried_again(
    case: str, engine: StreamingEngine, connection: Connection, simulator: Simulator, sleeps: Sleeps
) -> None:
    params, waits = PASSING[case]
    simulator.next("http_error", **params)
    simulator.next("plain", text="fine now")
    kept = await run(engine, connection, POLICY)
    assert kept.text() == "fine now"
    assert len(inferences(simulator)) == 2
    assert sleeps.seconds == waits
    (status,) = kept.statuses()
    assert f"again in {max(1, round(waits[0]))} s" in status


async def test_a_wait_until_a_date(simulator: Simulator, connection: Connection, sleeps: Sleeps) -> None:
    seven_seconds_before = 1_787_303_993.0
    client = OpenRouterClient(now=lambda: seven_seconds_before)
    simulator.next("http_error", name="429_http_date")
    try:
        await run(StreamingEngine(client, sleeps), connection, POLICY)
    finally:
        await client.aclose()
    assert sleeps.seconds == [7.0]


async def test_waits_grow_when_nobody_names_one(
    engine: StreamingEngine, connection: Connection, simulator: Simulator, sleeps: Sleeps
) -> None:
    simulator.next("http_error", name="500_masked", times=3)
    kept = await run(engine, connection, POLICY)
    assert [low <= wait <= 3 * low for low, wait in zip((0.5, 1.0, 2.0), sleeps.seconds, strict=True)] == [
        True
    ] * 3
    assert len(kept.statuses()) == 3
    assert len(inferences(simulator)) == 4


SILENT_FAILURES: dict[str, Json] = {
    "failed_first": {},
    "error_flat": {"after": 0},
    "error_nested": {"after": 0, "code": "rate_limit_exceeded"},
    "response_error": {"after": 0},
    "error_untyped": {"after": 0},
    "abrupt": {"cut": 1},
    "eof": {"cut": 1},
    "stall_headers": {},
    "stall": {"hang": 1},
}


@pytest.mark.parametrize("scenario", sorted(SILENT_FAILURES))
async def test_a_failure_before_anything_was_shown_is_tried_again(
    scenario: str, engine: StreamingEngine, simulator: Simulator
) -> None:
    simulator.next(scenario, **SILENT_FAILURES[scenario])
    simulator.next("plain", text="second try")
    kept = await run(engine, connection_to(simulator.base_url, idle_timeout_s=0.2), POLICY)
    assert kept.text() == "second try"
    assert len(kept.of(TurnEnded)) == 1
    assert len(inferences(simulator)) == 2
    assert len(kept.statuses()) == 1


async def test_reasoning_that_has_only_begun_does_not_stop_another_try(
    engine: StreamingEngine, connection: Connection, simulator: Simulator
) -> None:
    added = frame(
        "response.output_item.added", output_index=0, item={"type": "reasoning", "id": "r", "summary": []}
    )
    busy = {"status": "failed", "error": {"message": "Overloaded"}, "error_type": "provider_overloaded"}
    simulator.next("replay", body=(added + frame("response.failed", response=busy)).decode())
    simulator.next("reasoning")
    kept = await run(engine, connection, POLICY)
    assert kept.text()
    assert len(kept.of(TurnEnded)) == 1
    assert len(inferences(simulator)) == 2


# an `error` in a stream -> the waits before another try
ERRORS_INSIDE: dict[str, tuple[Json, list[float]]] = {
    "a wait": ({"code": 429, "message": "Slow", "metadata": {"headers": {"Retry-After": "2"}}}, [2.0]),
    "a wait, code as text": (
        {"code": "429", "message": "Slow", "metadata": {"headers": {"Retry-After": "3"}}},
        [3.0],
    ),
    "limit of the day": ({"code": 429, "message": "Rate limit exceeded: free-models-per-day. Add"}, []),
    "limit of the day, code as text": (
        {"code": "429", "message": "Rate limit exceeded: free-models-per-day"},
        [],
    ),
    "status as text": ({"code": "401", "message": "No"}, []),
}


@pytest.mark.parametrize("case", sorted(ERRORS_INSIDE))
async def test_an_error_inside_a_stream_says_whether_and_when_to_try_again(
    case: str, engine: StreamingEngine, connection: Connection, simulator: Simulator, sleeps: Sleeps
) -> None:
    error, waits = ERRORS_INSIDE[case]
    simulator.next("replay", body=frame("error", error=error).decode())
    simulator.next("plain", text="fine now")
    if waits:
        assert (await run(engine, connection, POLICY)).text() == "fine now"
    else:
        await fail(engine, connection, POLICY)
    assert len(inferences(simulator)) == 1 + len(waits)
    assert sleeps.seconds == waits


async def test_the_end_of_the_day_is_told_inside_a_stream_too(
    engine: StreamingEngine, connection: Connection, simulator: Simulator
) -> None:
    reset = {"X-RateLimit-Reset": str(round((time.time() + 7_200) * 1000))}
    error = {"code": 429, "message": "Over: free-models-per-day", "metadata": {"headers": reset}}
    simulator.next("replay", body=frame("error", error=error).decode())
    failed, _ = await fail(engine, connection, POLICY)
    assert failed.template == "daily_limit"
    assert failed.retry_after == pytest.approx(7_200, abs=60)


async def test_a_server_error_that_says_no_more_is_final(
    engine: StreamingEngine, connection: Connection, simulator: Simulator
) -> None:
    """A bad key, a refusal and a broken provider all look like this."""
    simulator.next("error_nested", after=0, code="server_error", times=math.inf)
    await fail(engine, connection, POLICY)
    assert len(inferences(simulator)) == 1


LOUD_FAILURES: dict[str, Json] = {
    "failed": {},
    "error_flat": {},
    "error_nested": {},
    "response_error": {},
    "error_untyped": {},
    "abrupt": {"cut": 8},
    "eof": {"cut": 8},
    "stall": {"hang": 8},
}


@pytest.mark.parametrize("scenario", sorted(LOUD_FAILURES))
async def test_nothing_is_tried_again_after_text(
    scenario: str, engine: StreamingEngine, simulator: Simulator, sleeps: Sleeps
) -> None:
    simulator.next(scenario, **LOUD_FAILURES[scenario])
    error, kept = await fail(engine, connection_to(simulator.base_url, idle_timeout_s=0.2), POLICY)
    assert kept.text()
    assert error.user_message.endswith(".")
    assert len(inferences(simulator)) == 1
    assert sleeps.seconds == []
    assert kept.statuses() == []


@pytest.mark.parametrize(
    "name",
    [
        "401_bad_key",
        "401_no_key",
        "402_credits",
        "403_moderation",
        "404_privacy",
        "400_provider_raw",
        "413_too_large",
        "429_free_daily",
    ],
)
async def test_a_final_refusal_is_not_tried_again(
    name: str, engine: StreamingEngine, connection: Connection, simulator: Simulator, sleeps: Sleeps
) -> None:
    simulator.next("http_error", name=name, times=math.inf)
    _, kept = await fail(engine, connection, POLICY)
    assert len(inferences(simulator)) == 1
    assert (sleeps.seconds, kept.emissions) == ([], [])


@pytest.mark.parametrize("attempts", [0, 1, 4])
async def test_so_many_tries_and_no_more(
    attempts: int, engine: StreamingEngine, connection: Connection, simulator: Simulator, sleeps: Sleeps
) -> None:
    simulator.next("http_error", name="503_no_provider", times=math.inf)
    error, kept = await fail(engine, connection, RetryPolicy(attempts, 30.0))
    assert "No instances available" in error.detail
    assert len(inferences(simulator)) == attempts + 1
    assert sleeps.seconds == [5.0] * attempts
    assert len(kept.statuses()) == attempts


@pytest.mark.parametrize(("named", "requests"), [(30, 2), (31, 1), (86_400, 1)])
async def test_a_wait_beyond_the_longest_is_told_instead(
    named: int, requests: int, engine: StreamingEngine, connection: Connection, simulator: Simulator
) -> None:
    simulator.next("http_error", name="429_upstream", times=math.inf, retry_after=named)
    error, _ = await fail(engine, connection, RetryPolicy(1, 30.0))
    assert len(inferences(simulator)) == requests
    assert error.retry_after == named
    assert ("24 hours" if named == 86_400 else f"{named} seconds") in error.user_message


async def test_the_same_body_is_sent_again(
    engine: StreamingEngine, connection: Connection, simulator: Simulator
) -> None:
    simulator.next("http_error", name="500_masked")
    await run(engine, connection, POLICY)
    first, second = inferences(simulator)
    assert first.body == second.body == asking()


# Ends of a stream


async def test_an_answer_ends_although_the_connection_does_not(
    engine: StreamingEngine, connection: Connection, simulator: Simulator
) -> None:
    simulator.next("plain", text="all said", hang=9_999)
    async with asyncio.timeout(SOON_S):
        kept = await run(engine, connection)
    assert kept.text() == "all said"
    await gone(simulator)


async def test_a_connection_is_used_again_after_a_stream(
    engine: StreamingEngine, connection: Connection, simulator: Simulator
) -> None:
    for scenario in ("plain", "reasoning", "incomplete", "burst", "failed_first", "plain"):
        simulator.next(scenario)
        with contextlib.suppress(PipeError):
            await run(engine, connection)
    assert {record.connection for record in simulator.requests} == {1}


async def test_the_end_of_a_stream_may_follow_a_little_later(engine: StreamingEngine) -> None:
    """`[DONE]` in a packet of its own: it is waited for, so that the connection stays warm."""
    connections = requests = 0

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections, requests
        connections += 1
        while True:
            await read_request(reader)
            requests += 1
            writer.write(CHUNKED + in_a_chunk(delta("fine") + completed()))
            await writer.drain()
            await asyncio.sleep(0.03)  # the pace of this server
            writer.write(in_a_chunk(b"data: [DONE]\n\n") + in_a_chunk(b""))
            await writer.drain()

    async with hostile(handle) as url:
        for _ in range(3):
            assert (await run(engine, connection_to(url))).text() == "fine"
    assert (connections, requests) == (1, 3)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\n\n\n",
        b"data: [DONE]\n\n",
        b": only a comment\n\n",
        b"<html>busy</html>",
        b"data: {broken\n\n",
    ],
)
async def test_a_stream_that_says_nothing_is_an_error(
    content: bytes, engine: StreamingEngine, connection: Connection
) -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(EVENT_STREAM + content)
        await writer.drain()

    async with hostile(handle) as url:
        error, kept = await fail(engine, connection_to(url))
    assert error.user_message.endswith(".")
    assert kept.emissions == []


async def test_terminal_events_count_once(
    engine: StreamingEngine, connection: Connection, simulator: Simulator
) -> None:
    usage = {"input_tokens": 1, "output_tokens": 2, "total_tokens": 3}
    frames = delta("once") + completed(usage=usage) * 3 + delta("late") + b"data: [DONE]\n\n" * 2
    simulator.next("replay", body=frames.decode())
    kept = await run(engine, connection)
    assert kept.text() == "once"
    assert len(kept.of(TurnEnded)) == len(kept.of(UsageReported)) == 1


# What had come before the connection broke


@dataclass
class Held(Kept):
    """A sink that is busy with the first emissions until the connection is gone."""

    gone: asyncio.Event = field(default_factory=asyncio.Event)

    async def __call__(self, emissions: Sequence[Emission]) -> None:
        await super().__call__(emissions)
        await self.gone.wait()
        for _ in range(100):  # the end is on loopback, the client has to notice it
            await asyncio.sleep(0)


PICTURE = frame(
    "response.output_item.done",
    output_index=1,
    item={"type": "image_generation_call", "id": "i", "status": "completed", "result": "A" * 600_000},
)


@pytest.mark.parametrize("rest", [delta("two "), delta("two ") + delta("three")], ids=["one", "two"])
@pytest.mark.parametrize("first", [delta("one "), PICTURE], ids=["text", "picture"])
@pytest.mark.parametrize("ended", [True, False], ids=["ended", "not ended"])
async def test_what_came_before_a_cut_is_handed_over(
    first: bytes, rest: bytes, ended: bool, engine: StreamingEngine, sleeps: Sleeps
) -> None:
    """Also while the sink was busy; and a stream that has said its end is complete."""
    kept, requests = Held(), 0

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal requests
        requests += 1
        await read_request(reader)
        writer.write(CHUNKED + in_a_chunk(first))
        await writer.drain()
        await kept.first.wait()
        writer.write(in_a_chunk(rest + (completed() if ended else b"")))
        await writer.drain()
        writer.close()
        kept.gone.set()

    error: PipeError | None = None
    async with hostile(handle) as url, asyncio.timeout(PATIENCE_S):
        try:
            await engine.stream(connection_to(url), UpstreamRequest(asking()), kept, POLICY)
        except PipeError as caught:
            error = caught
    said = (b"one " if first != PICTURE else b"") + b"two " + (b"three" if b"three" in rest else b"")
    assert kept.text() == said.decode()
    assert len(kept.of(MediaProduced)) == (1 if first == PICTURE else 0)
    assert (requests, sleeps.seconds) == (1, [])
    assert kept.of(TurnEnded) == ([TurnEnded("completed")] if ended else [])
    assert (error and error.template) == (None if ended else "broken")


@pytest.mark.parametrize(
    ("scenario", "params"),
    [
        ("abrupt", {"cut": 8}),
        ("abrupt", {"cut": 8, "how": "reset"}),
        ("eof", {"cut": 8}),
        ("stall", {"hang": 8}),
    ],
)
async def test_an_answer_that_broke_off_is_not_called_unreachable(
    scenario: str, params: Json, engine: StreamingEngine, simulator: Simulator
) -> None:
    simulator.next(scenario, **params)
    error, kept = await fail(engine, connection_to(simulator.base_url, idle_timeout_s=0.2))
    assert kept.text()
    assert (type(error), error.template) == (StreamError, "broken")
    told = error.user_message.lower()
    assert "could not be reached" not in told
    for words in ("in time", "answer", "connection", "broke", "cut"):
        assert told.count(words) <= 1, told


# Ways out


class BrokenSinkError(Exception):
    """What a sink of a test raises."""


async def test_a_sink_that_raises_closes_the_socket(
    engine: StreamingEngine, connection: Connection, simulator: Simulator, sleeps: Sleeps
) -> None:
    async def sink(emissions: Sequence[Emission]) -> None:
        raise BrokenSinkError

    before = asyncio.all_tasks()
    simulator.next("drip", tokens=10_000)
    with pytest.raises(BrokenSinkError):
        await engine.stream(connection, UpstreamRequest(asking()), sink, POLICY)
    await gone(simulator)
    assert (len(inferences(simulator)), sleeps.seconds) == (1, [])
    await all_ended(before)


@pytest.mark.parametrize("scenario", ["drip", "stall", "stall_headers", "burst"])
async def test_cancelling_closes_the_socket(
    scenario: str, engine: StreamingEngine, connection: Connection, simulator: Simulator
) -> None:
    before = asyncio.all_tasks()
    reached, never = asyncio.Event(), asyncio.Event()

    async def sink(emissions: Sequence[Emission]) -> None:
        reached.set()
        if scenario == "burst":
            await never.wait()

    tokens = {"tokens": 300_000} if scenario in ("drip", "burst") else {}
    simulator.next(scenario, **tokens)
    task = asyncio.create_task(engine.stream(connection, UpstreamRequest(asking()), sink, POLICY))
    async with asyncio.timeout(PATIENCE_S):
        await simulator.wait_until(lambda sim: bool(inferences(sim)))
        if scenario != "stall_headers":
            await reached.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await gone(simulator)
    await all_ended(before)


async def test_cancelling_while_waiting_for_the_next_try(
    client: OpenRouterClient, connection: Connection, simulator: Simulator
) -> None:
    waiting, never = asyncio.Event(), asyncio.Event()

    async def sleep(seconds: float) -> None:
        waiting.set()
        await never.wait()

    simulator.next("http_error", name="500_masked", times=math.inf)
    engine = StreamingEngine(client, sleep)
    task = asyncio.create_task(engine.stream(connection, UpstreamRequest(asking()), Kept(), POLICY))
    await asyncio.wait_for(waiting.wait(), PATIENCE_S)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert len(inferences(simulator)) == 1
    assert simulator.open == 0


# Back-pressure


@dataclass
class Flood:
    """A server that writes more than anybody holds in memory, and notices when it has to stop."""

    frames: int = 2_000
    size: int = 30_000
    sent: int = 0
    blocked: asyncio.Event = field(default_factory=asyncio.Event)

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(EVENT_STREAM)
        for number in range(self.frames):
            writer.write(delta(self.text(number)))
            await self._drain(writer)
            self.sent += self.size
        writer.write(completed())
        await writer.drain()

    async def _drain(self, writer: asyncio.StreamWriter) -> None:
        drained = asyncio.ensure_future(writer.drain())
        done, _ = await asyncio.wait([drained], timeout=0.3)
        if not done:
            self.blocked.set()
        await drained

    def text(self, number: int) -> str:
        return f"<{number}>".ljust(self.size, ".")


async def test_a_sink_that_takes_no_more_stops_the_sender(engine: StreamingEngine) -> None:
    flood, go_on = Flood(), asyncio.Event()
    received: list[str] = []

    async def sink(emissions: Sequence[Emission]) -> None:
        received.extend(emission.text for emission in emissions if isinstance(emission, TextDelta))
        await go_on.wait()

    async with hostile(flood) as url:
        task = asyncio.create_task(engine.stream(connection_to(url), UpstreamRequest(asking()), sink, ONCE))
        async with asyncio.timeout(30):
            await flood.blocked.wait()
            held = flood.sent
            go_on.set()
            await task
    assert held < flood.frames * flood.size / 2
    assert "".join(received) == "".join(map(flood.text, range(flood.frames)))


async def test_many_calls_at_once(
    engine: StreamingEngine, connection: Connection, simulator: Simulator
) -> None:
    async def one(number: int) -> str:
        kept = Kept()
        await engine.stream(connection, UpstreamRequest(asking(f"[[plain text=answer{number}]]")), kept, ONCE)
        return kept.text()

    answers = await asyncio.gather(*map(one, range(100)))
    assert answers == [f"answer{number}" for number in range(100)]


async def test_a_long_answer_arrives_whole(
    engine: StreamingEngine, connection: Connection, simulator: Simulator
) -> None:
    simulator.next("burst", tokens=20_000)
    kept = await run(engine, connection)
    assert kept.text() == "".join(f"word{number} " for number in range(20_000))


def _names(emissions: Sequence[Emission], keep: Callable[[Emission], bool]) -> list[str]:
    return [type(emission).__name__ for emission in emissions if keep(emission)]


async def test_what_comes_with_a_failure_comes_before_it(
    engine: StreamingEngine, connection: Connection, simulator: Simulator
) -> None:
    """Text and failure in one read: the sink has the text by the time the failure is raised."""
    error = {"type": "response.failed", "response": {"error": {"code": "server_error", "message": "Lost"}}}
    frames = delta("so far") + b"data: " + json.dumps(error).encode() + b"\n\n"
    simulator.next("replay", body=frames.decode())
    failed, kept = await fail(engine, connection)
    assert "Lost" in failed.detail
    assert _names(kept.emissions, lambda emission: not isinstance(emission, UsageReported)) == ["TextDelta"]
