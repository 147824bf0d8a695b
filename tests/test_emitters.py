"""What each kind of client is shown: buffer, outlet, the five dialects, and the host's own events."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openrouter_responses_pipe.openrouter_responses_pipe import (
    _OUTLET_MAX_CHARS,
    _OUTLET_MAX_ENTRIES,
    ChatRequest,
    CitationFound,
    DeltaBuffer,
    Dialect,
    Emission,
    Emitter,
    ErrorPage,
    Failed,
    ItemClosed,
    MediaProduced,
    Notice,
    Outlet,
    Piece,
    ReasoningDelta,
    RefusalDelta,
    ServerToolProgress,
    StatusUpdate,
    StreamError,
    TextDelta,
    ToolCall,
    ToolFinished,
    ToolRequested,
    ToolResult,
    ToolStarted,
    TurnEnded,
    UsageReported,
    Valves,
    _make_writer,
    _wrap_event_emitter,
)
from tests.recorded import COMPLETED, ENDED_WELL, EXPECTED, NAMES, Clock, events, joined_pairs, reduced
from tests.support import PATIENCE_S, Events

Json = dict[str, Any]
DIALECTS: Final = get_args(Dialect)
WITH_EVENTS: Final = ("browser", "browser_json")


def recorded(name: str) -> list[Emission]:
    """What a recorded stream means."""
    return reduced(events(name))


async def settle() -> None:
    """Let every task that can go on do so; nothing is waited for."""
    for _ in range(5):
        await asyncio.sleep(0)


# Delta buffer


@pytest.mark.parametrize(
    ("limit", "idle_s", "pushes", "now", "due"),
    [
        (0, 0.0, [], 0.0, None),
        (0, 0.0, [("a", 0.0)], 0.0, 0.0),
        (10, 0.25, [("a", 1.0)], 1.0, 0.25),
        (10, 0.25, [("a", 1.0)], 1.2, 0.05),
        (10, 0.25, [("a", 1.0)], 1.25, 0.0),
        (10, 0.25, [("a", 1.0)], 9.0, 0.0),
        (10, 0.25, [("a", 1.0), ("b", 1.2)], 1.2, 0.05),
        (10, 0.25, [("a" * 9, 1.0)], 1.0, 0.25),
        (10, 0.25, [("a" * 10, 1.0)], 1.0, 0.0),
        (10, 0.25, [("a" * 5, 1.0), ("b" * 5, 1.1)], 1.1, 0.0),
    ],
)
def test_when_text_is_due(
    limit: int, idle_s: float, pushes: list[tuple[str, float]], now: float, due: float | None
) -> None:
    buffer = DeltaBuffer(limit, idle_s)
    for text, at in pushes:
        buffer.push(text, at)
    assert buffer.due(now) == (None if due is None else pytest.approx(due))


def test_text_that_was_taken_is_not_due_again() -> None:
    buffer = DeltaBuffer(2, 1.0)
    buffer.push("abc", 0.0)
    assert buffer.flush() == "abc"
    assert buffer.due(50.0) is None
    assert buffer.flush() == ""
    buffer.push("d", 60.0)
    assert buffer.due(60.5) == pytest.approx(0.5)


@given(pieces=st.lists(st.tuples(st.text(max_size=6), st.booleans()), max_size=8))
def test_no_text_is_lost(pieces: list[tuple[str, bool]]) -> None:
    buffer = DeltaBuffer()
    found = ""
    for text, read in pieces:
        buffer.push(text, 0.0)
        found += buffer.flush() if read else ""
    assert found + buffer.flush() == "".join(text for text, _ in pieces)


# Outlet


def written_a(text: str) -> Json:
    return {"a": text}


def written_b(text: str) -> Json:
    return {"b": text}


def outlet_of(limit: int = 0, idle_s: float = 0.0, clock: Clock | None = None) -> Outlet:
    return Outlet((limit, idle_s), clock or Clock())


async def rest_of(chunks: AsyncGenerator[Json, None]) -> list[Json]:
    async with asyncio.timeout(PATIENCE_S):
        return [chunk async for chunk in chunks]


async def next_of(chunks: AsyncGenerator[Json, None]) -> Json:
    async with asyncio.timeout(PATIENCE_S):
        return await anext(chunks)


async def test_what_is_put_leaves_in_order() -> None:
    outlet = outlet_of()
    for entry in ({"n": 1}, Piece(written_a, "x"), {"n": 2}, Piece(written_b, "y"), Piece(written_a, "z")):
        outlet.put(entry)
    outlet.finish()
    expected = [{"n": 1}, {"a": "x"}, {"n": 2}, {"b": "y"}, {"a": "z"}]
    assert await rest_of(outlet.chunks()) == expected


async def test_what_waits_leaves_as_one() -> None:
    outlet = outlet_of()
    chunks = outlet.chunks()
    outlet.put(Piece(written_a, "a"))
    outlet.put(Piece(written_a, "b"))
    assert await next_of(chunks) == {"a": "ab"}
    outlet.put(Piece(written_a, "c"))
    assert await next_of(chunks) == {"a": "c"}
    for text in "def":
        outlet.put(Piece(written_a, text))
    outlet.finish()
    assert await rest_of(chunks) == [{"a": "def"}]


@pytest.mark.parametrize("before", [[], [{"n": 1}], [{"n": 1}, {"n": 2}]])
async def test_a_first_delta_never_waits(before: list[Json]) -> None:
    outlet = outlet_of(limit=500, idle_s=1000.0)
    for entry in before:
        outlet.put(entry)
    outlet.put(Piece(written_a, "H"))
    chunks = outlet.chunks()
    assert [await next_of(chunks) for _ in range(len(before) + 1)] == [*before, {"a": "H"}]


async def test_later_text_waits_for_company() -> None:
    outlet = outlet_of(limit=5, idle_s=1000.0)
    chunks = outlet.chunks()
    outlet.put(Piece(written_a, "first"))
    assert await next_of(chunks) == {"a": "first"}
    outlet.put(Piece(written_a, "1234"))
    coming = asyncio.ensure_future(anext(chunks))
    await settle()
    assert not coming.done()
    outlet.put(Piece(written_a, "5"))
    async with asyncio.timeout(PATIENCE_S):
        assert await coming == {"a": "12345"}


async def test_text_waits_no_longer_than_it_may() -> None:
    clock = Clock()
    outlet = outlet_of(limit=100, idle_s=0.25, clock=clock)
    chunks = outlet.chunks()
    outlet.put(Piece(written_a, "first"))
    await next_of(chunks)
    outlet.put(Piece(written_a, "x"))
    clock.now = 0.25
    assert await next_of(chunks) == {"a": "x"}


async def test_a_reader_that_waits_is_woken_when_the_time_has_come() -> None:
    loop = asyncio.get_running_loop()
    outlet = Outlet((100, 0.02), loop.time)
    chunks = outlet.chunks()
    outlet.put(Piece(written_a, "first"))
    await next_of(chunks)
    outlet.put(Piece(written_a, "x"))
    started = loop.time()
    assert await next_of(chunks) == {"a": "x"}
    assert loop.time() - started >= 0.015


@pytest.mark.parametrize("what", ["finish", "another entry", "another piece"])
async def test_text_does_not_wait_when_something_else_follows(what: str) -> None:
    outlet = outlet_of(limit=100, idle_s=1000.0)
    chunks = outlet.chunks()
    outlet.put(Piece(written_a, "first"))
    await next_of(chunks)
    outlet.put(Piece(written_a, "x"))
    coming = asyncio.ensure_future(anext(chunks))
    await settle()
    assert not coming.done()
    if what == "finish":
        outlet.finish()
    else:
        outlet.put({"n": 1} if what == "another entry" else Piece(written_b, "y"))
    async with asyncio.timeout(PATIENCE_S):
        assert await coming == {"a": "x"}


async def test_nothing_leaves_for_empty_text() -> None:
    outlet = outlet_of()
    outlet.put(Piece(written_a, ""))
    outlet.put({"n": 1})
    outlet.put(Piece(written_a, ""))
    outlet.finish()
    assert await rest_of(outlet.chunks()) == [{"n": 1}]


@pytest.mark.parametrize(
    "entries",
    [
        [Piece(written_a, "x" * (_OUTLET_MAX_CHARS + 1))],
        [Piece(written_a, "x")] * (_OUTLET_MAX_CHARS + 1),
        [{"n": 1}] * (_OUTLET_MAX_ENTRIES + 1),
        [Piece(written_a, "x"), Piece(written_b, "x")] * (_OUTLET_MAX_ENTRIES // 2 + 1),
    ],
    ids=["one long piece", "many pieces", "many entries", "many runs"],
)
async def test_back_pressure(entries: list[Any]) -> None:
    """Who writes waits once too much waits to be read, and goes on when it was read."""
    outlet = outlet_of()
    async with asyncio.timeout(PATIENCE_S):
        await outlet.room()
        for entry in entries:
            outlet.put(entry)
        waiting = asyncio.ensure_future(outlet.room())
        await settle()
        assert not waiting.done()
        chunks = outlet.chunks()
        while not waiting.done():
            await anext(chunks)
            await settle()
        outlet.finish()
        await rest_of(chunks)


async def test_finishing_lets_go_of_who_writes() -> None:
    outlet = outlet_of()
    outlet.put(Piece(written_a, "x" * (_OUTLET_MAX_CHARS + 1)))
    waiting = asyncio.ensure_future(outlet.room())
    await settle()
    outlet.finish()
    async with asyncio.timeout(PATIENCE_S):
        await waiting


async def test_the_result_comes_with_the_end() -> None:
    outlet = outlet_of()
    waiting = asyncio.ensure_future(outlet.result())
    await settle()
    assert not waiting.done()
    outlet.finish({"whole": True})
    outlet.finish({"whole": False})
    async with asyncio.timeout(PATIENCE_S):
        assert await waiting == {"whole": True}
        assert await outlet.result() == {"whole": True}
        assert await rest_of(outlet.chunks()) == []


async def test_no_result_is_empty() -> None:
    outlet = outlet_of()
    outlet.finish()
    assert await outlet.result() == {}


ENTRIES: Final = st.one_of(
    st.tuples(st.sampled_from([written_a, written_b]), st.text("ab\n é\N{GRINNING FACE}", max_size=12)),
    st.tuples(st.none(), st.integers(0, 3)),
    st.tuples(st.just("read"), st.none()),
)


async def _flow(operations: Sequence[tuple[Any, Any]], limit: int) -> list[Json]:
    outlet, found = outlet_of(limit, 0.0), []

    async def read() -> None:
        async for chunk in outlet.chunks():
            found.append(chunk)

    reader = asyncio.ensure_future(read())
    for kind, value in operations:
        if kind == "read":
            await settle()
        else:
            outlet.put({"n": value} if kind is None else Piece(kind, value))
    outlet.finish()
    async with asyncio.timeout(PATIENCE_S):
        await reader
    return found


def _runs(chunks: Iterable[Json]) -> list[tuple[str, Any]]:
    """Chunks with neighbouring text of one kind joined."""
    runs: list[tuple[str, Any]] = []
    for ((key, value),) in (chunk.items() for chunk in chunks):
        if value == "":
            continue
        if runs and runs[-1][0] == key != "n":
            runs[-1] = (key, runs[-1][1] + value)
        else:
            runs.append((key, value))
    return runs


@settings(max_examples=150, deadline=None)
@given(operations=st.lists(ENTRIES, max_size=14), limit=st.sampled_from([0, 3]))
def test_any_flow_arrives_whole_and_in_order(operations: list[tuple[Any, Any]], limit: int) -> None:
    found = asyncio.run(_flow(operations, limit))
    puts = [{"n": value} if kind is None else kind(value) for kind, value in operations if kind != "read"]
    assert _runs(found) == _runs(puts)


# Dialects


@dataclass
class Shown:
    """What a client, and the page beside it, have got."""

    chunks: list[Json] = field(default_factory=list)
    result: Json = field(default_factory=dict)
    events: Events = field(default_factory=Events)


async def show(
    emissions: Iterable[Emission],
    dialect: Dialect = "browser",
    *,
    eager: bool = False,
    clock: Clock | None = None,
    **valves: Any,
) -> Shown:
    """Send emissions to a client that reads at once (`eager`) or when all is over."""
    clock, shown = clock or Clock(), Shown()
    request = ChatRequest(body={"model": "openrouter.a/b"}, dialect=dialect, model="a/b")
    outlet = Outlet((0, 0.0), clock)
    emit = _wrap_event_emitter(shown.events, suppress_chat_messages=dialect not in WITH_EVENTS)
    emitter = Emitter(_make_writer(request, Valves(**valves), clock), outlet, emit, clock)

    async def read() -> None:
        async for chunk in outlet.chunks():
            shown.chunks.append(chunk)

    reader = asyncio.ensure_future(read())
    for emission in emissions:
        await emitter.send((emission,))
        if eager:
            await settle()
    emitter.aclose()
    async with asyncio.timeout(PATIENCE_S):
        await reader
        shown.result = await outlet.result()
    return shown


class HostPage:
    """What Open WebUI makes of the events of the browser dialect: the message as it is saved.

    A short model of its rules: an item is put at its index, or in the place of one with its id;
    deltas go by index; a finished item replaces what stands at its index.
    """

    def __init__(self) -> None:
        self.items: list[Json] = []
        self.usages: list[Json] = []
        self.error = ""

    def apply(self, event: Json) -> None:
        """Take one event; one of an unknown type changes nothing."""
        kind = event.get("type", "")
        index = event.get("output_index", -1)
        if kind == "response.output_item.added":
            self._add(json.loads(json.dumps(event["item"])), index)
        elif kind == "response.output_item.done":
            self.items[index : index + 1] = [event["item"]]
        elif kind == "response.output_text.delta":
            self.items[index]["content"][event["content_index"]]["text"] += event["delta"]
        elif kind == "response.reasoning_summary_text.delta":
            summary = self.items[index]["summary"]
            while len(summary) <= event["summary_index"]:
                summary.append({"type": "summary_text", "text": ""})
            summary[event["summary_index"]]["text"] += event["delta"]
        elif kind == "response.completed":
            self.usages += [event["response"]["usage"]] if event["response"].get("usage") else []
        elif "error" in event:
            self.error = event["error"]["message"]

    def _add(self, item: Json, index: int) -> None:
        known = [place for place, other in enumerate(self.items) if other["id"] == item["id"]]
        if known:
            self.items[known[0]] = item
        else:
            self.items.insert(index, item)

    def text(self) -> str:
        """The answer: the text of the parts that the model will be shown next time."""
        parts = [part for item in self.items if item["type"] == "message" for part in item["content"]]
        return "\n".join(part["text"] for part in parts if part["type"] == "output_text")

    def reasoning(self) -> str:
        """The text of the reasoning cards."""
        parts = [part for item in self.items if item["type"] == "reasoning" for part in item["summary"]]
        return "\n".join(part["text"] for part in parts)


def page_of(chunks: Iterable[Json]) -> HostPage:
    page = HostPage()
    for chunk in chunks:
        page.apply(chunk)
    return page


@dataclass
class Seen:
    """What a person, or a program, sees of an answer."""

    text: str = ""
    reasoning: str = ""
    calls: list[Json] = field(default_factory=list)
    usage: Any = None
    citations: list[str] = field(default_factory=list)
    finish: str | None = None
    error: str = ""


def _calls(functions: Iterable[Json]) -> list[Json]:
    return [
        {"call_id": call["call_id"], "name": call["name"], "arguments": json.loads(call["arguments"])}
        for call in functions
    ]


def _see_items(page: HostPage, shown: Shown) -> Seen:
    return Seen(
        text=page.text(),
        reasoning=page.reasoning(),
        calls=_calls(item for item in page.items if item["type"] == "function_call"),
        usage=page.usages[0] if page.usages else None,
        citations=[source["source"]["url"] for source in shown.events.of("source")],
        error=page.error,
    )


def see_browser(shown: Shown) -> Seen:
    page = page_of(shown.chunks)
    assert len(page.usages) <= 1
    assert shown.result == {}
    return _see_items(page, shown)


def see_browser_json(shown: Shown) -> Seen:
    assert shown.chunks == []
    page, result = HostPage(), shown.result
    page.items = result["output"]
    page.usages = [result["usage"]] if "usage" in result else []
    page.error = result.get("error", {}).get("message", "")
    (choice,) = result["choices"]
    assert choice["message"]["content"] == page.text()
    assert choice["message"]["role"] == "assistant"
    return _see_items(page, shown)


def _see_message(message: Json, choice: Json, usage: Any, error: Json) -> Seen:
    calls = [{"call_id": call["id"], **call["function"]} for call in message.get("tool_calls", ())]
    return Seen(
        text=message.get("content", ""),
        reasoning=message.get("reasoning_content", ""),
        calls=_calls(calls),
        usage=usage,
        citations=[source["url_citation"]["url"] for source in message.get("annotations", ())],
        finish=choice.get("finish_reason"),
        error=error.get("message", ""),
    )


def see_api_stream(shown: Shown) -> Seen:
    message: Json = {}
    finish, usages, error = None, [], {}
    for chunk in shown.chunks:
        if "error" in chunk:
            error = chunk["error"]
            continue
        assert chunk["object"] == "chat.completion.chunk"
        usages += [chunk["usage"]] if "usage" in chunk else []
        for choice in chunk["choices"]:
            finish = choice["finish_reason"] or finish
            for key, value in choice["delta"].items():
                message[key] = message[key] + value if key in message else value
    assert len(usages) <= 1
    assert shown.events == []
    usage = usages[0] if usages else None
    return _see_message(message, {"finish_reason": finish}, usage, error)


def see_api_json(shown: Shown) -> Seen:
    assert shown.chunks == []
    assert shown.events == []
    result = shown.result
    if "error" in result:
        assert set(result) == {"error"}
        return Seen(error=result["error"]["message"])
    assert result["object"] == "chat.completion"
    (choice,) = result["choices"]
    assert choice["message"]["role"] == "assistant"
    return _see_message(choice["message"], choice, result.get("usage"), {})


SEE: Final[dict[str, Callable[[Shown], Seen]]] = {
    "browser": see_browser,
    "browser_json": see_browser_json,
    "api_stream": see_api_stream,
    "api_json": see_api_json,
    "task": see_api_json,
}
# what each dialect can show of an answer, and whether what came before a failure is kept
CAN_SHOW: Final[dict[str, tuple[set[str], bool]]] = {
    "browser": ({"text", "reasoning", "calls", "usage", "citations"}, True),
    "browser_json": ({"text", "reasoning", "calls", "usage", "citations"}, True),
    "api_stream": ({"text", "reasoning", "calls", "usage", "citations", "finish"}, True),
    "api_json": ({"text", "reasoning", "calls", "usage", "citations", "finish"}, False),
    "task": ({"text", "usage"}, False),
}
_CHAT_NAMES: Final = {
    "input_tokens": "prompt_tokens",
    "output_tokens": "completion_tokens",
    "input_tokens_details": "prompt_tokens_details",
    "output_tokens_details": "completion_tokens_details",
}


def expected_of(name: str, dialect: str) -> Seen:
    """What the manifest promises of a stream, as far as this dialect has a place for it."""
    expected, (keys, keeps) = EXPECTED[name], CAN_SHOW[dialect]
    usage, error = expected.get("usage"), expected.get("error", {}).get("message", "")
    if usage and dialect not in WITH_EVENTS:
        usage = {_CHAT_NAMES.get(key, key): value for key, value in usage.items()}
    calls = expected.get("tool_calls", [])
    ends = {"incomplete": "length", "completed": "tool_calls" if calls else "stop"}
    everything = Seen(
        text=expected["text"] or expected.get("refusal", ""),
        reasoning="\n\n".join(expected.get("reasoning_summary", expected.get("reasoning_text", []))),
        calls=calls,
        usage=usage,
        citations=expected.get("citations", []),
        finish=ends.get(expected["terminal"]),
    )
    if error and not keeps:
        return Seen(error=error)
    return Seen(error=error, **{key: getattr(everything, key) for key in keys})


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("name", NAMES)
async def test_every_recorded_stream_in_every_dialect(name: str, dialect: Dialect, eager: bool) -> None:
    seen = SEE[dialect](await show(recorded(name), dialect, eager=eager))
    expected = expected_of(name, dialect)
    for key in CAN_SHOW[dialect][0]:
        assert getattr(seen, key) == getattr(expected, key), key
    failed = [emission for emission in recorded(name) if isinstance(emission, Failed)]
    assert seen.error == (failed[0].error.user_message if failed else "")
    if dialect == "task":
        assert (seen.reasoning, seen.calls, seen.citations) == ("", [], [])


@pytest.mark.parametrize("name", ENDED_WELL)
async def test_the_same_text_in_every_dialect(name: str) -> None:
    texts = {SEE[dialect](await show(recorded(name), dialect)).text for dialect in DIALECTS}
    assert len(texts) == 1


@pytest.mark.parametrize("name", NAMES)
async def test_without_streaming_the_host_gets_the_same_items(name: str) -> None:
    streamed = page_of((await show(recorded(name), "browser")).chunks)
    whole = (await show(recorded(name), "browser_json")).result
    expected = streamed.items if streamed.error else as_saved_at_once(streamed.items)
    assert without_ids(whole["output"]) == without_ids(expected)
    assert whole.get("usage") == (streamed.usages[0] if streamed.usages else None)
    assert whole.get("error", {}).get("message", "") == streamed.error


def as_saved_at_once(items: list[Json]) -> list[Json]:
    """What the host needs where nothing was written at all: with no item it would keep no usage either."""
    content = [{"type": "output_text", "text": "", "annotations": []}]
    nothing = {"type": "message", "status": "completed", "role": "assistant", "content": content}
    return items or [nothing]


def without_ids(items: Iterable[Json]) -> list[Json]:
    return [{key: value for key, value in item.items() if key != "id"} for item in items]


@pytest.mark.parametrize("dialect", DIALECTS)
async def test_two_messages_of_one_answer(dialect: Dialect) -> None:
    emissions = [
        TextDelta(0, "one"),
        ItemClosed(0, "message", {}),
        TextDelta(1, "tw"),
        TextDelta(1, "o"),
        ItemClosed(1, "message", {}),
        TurnEnded("completed"),
    ]
    for eager in (False, True):
        assert SEE[dialect](await show(emissions, dialect, eager=eager)).text == "one\ntwo"


@pytest.mark.parametrize("dialect", DIALECTS)
async def test_hidden_thinking(dialect: Dialect) -> None:
    shown = await show(recorded("02_reasoning_summary_encrypted"), dialect, SHOW_THINKING=False)
    seen = SEE[dialect](shown)
    assert seen.text == EXPECTED["02_reasoning_summary_encrypted"]["text"]
    assert seen.reasoning == ""
    if dialect == "browser":
        assert [item["type"] for item in page_of(shown.chunks).items] == ["reasoning", "message"]


# The rules of the browser dialect


class Rules:
    """What every stream of events for the host has to keep to."""

    def __init__(self) -> None:
        self.open: dict[str, tuple[int, str]] = {}
        self.ids: set[str] = set()
        self.call_ids: set[str] = set()
        self.call: Json | None = None  # added, and to be done at once
        self.calls_began = False
        self.over = False

    def take(self, chunk: Json) -> None:
        """Check one event after those before it."""
        json.dumps(chunk, ensure_ascii=False).encode()
        assert not self.over, "something follows a failure"
        checks: dict[str, Callable[[Json], None]] = {
            "response.output_item.added": self._added,
            "response.output_item.done": self._done,
            "response.output_text.delta": self._delta,
            "response.reasoning_summary_text.delta": self._delta,
            "response.completed": self._completed,
        }
        if "error" in chunk:
            assert not self.open
            assert set(chunk) == {"error"}
            assert set(chunk["error"]) == {"message"}
            assert chunk["error"]["message"]
            self.over = True
        else:
            checks[chunk["type"]](chunk)

    def _added(self, chunk: Json) -> None:
        item = chunk["item"]
        assert set(chunk) == {"type", "output_index", "item"}
        assert chunk["output_index"] == len(self.ids), "indices are dense"
        assert item["id"] not in self.ids, "ids are fresh"
        assert item["status"] == "in_progress"
        self.ids.add(item["id"])
        assert self.call is None
        if item["type"] == "function_call":
            assert not self.open
            assert item["call_id"] not in self.call_ids
            self.call_ids.add(item["call_id"])
            self.call, self.calls_began = item, True
            return
        assert not self.calls_began
        empty = {"content": [{"type": "output_text", "text": "", "annotations": []}], "role": "assistant"}
        rest = empty if item["type"] == "message" else {"summary": []}
        assert item == {"type": item["type"], "id": item["id"], "status": "in_progress", **rest}
        self.open[item["id"]] = (chunk["output_index"], item["type"])

    def _delta(self, chunk: Json) -> None:
        is_text = chunk["type"] == "response.output_text.delta"
        place = "content_index" if is_text else "summary_index"
        assert set(chunk) == {"type", "item_id", "output_index", place, "delta"}
        assert chunk[place] == 0
        assert chunk["delta"]
        assert self.open[chunk["item_id"]] == (
            chunk["output_index"],
            "message" if is_text else "reasoning",
        )

    def _done(self, chunk: Json) -> None:
        item = chunk["item"]
        assert set(chunk) == {"type", "output_index", "item"}
        if item["type"] == "function_call_output":
            assert chunk["output_index"] == len(self.ids), "indices are dense"
            assert item["call_id"] in self.call_ids
            self.ids.add(item["id"])
            return
        if item["type"] == "function_call" and self.call is None:
            assert (item["id"] in self.ids, item["status"]) == (True, "failed")
            return
        if item["type"] == "function_call":
            assert item == {**(self.call or {}), "status": "completed"}
            self.call = None
            return
        assert self.open.pop(item["id"]) == (chunk["output_index"], item["type"])
        assert item["status"] in ("completed", "incomplete")
        if item["type"] == "message":
            (part,) = item["content"]
            assert set(part) == {"type", "text", "annotations"}
            assert (part["type"], part["annotations"]) == ("output_text", [])
        else:
            assert isinstance(item["duration"], int)
            assert item["duration"] >= 0

    def _completed(self, chunk: Json) -> None:
        assert not self.open
        assert self.call is None
        assert set(chunk) == {"type", "response"}
        assert set(chunk["response"]) <= {"usage"}
        assert chunk["response"].get("usage", True)
        self.calls_began = False


def check_rules(chunks: Iterable[Json]) -> None:
    rules = Rules()
    for chunk in chunks:
        rules.take(chunk)
    assert not rules.open
    assert rules.call is None


@pytest.mark.parametrize("name", NAMES)
async def test_recorded_streams_keep_the_rules(name: str) -> None:
    for eager in (False, True):
        chunks = (await show(recorded(name), "browser", eager=eager)).chunks
        check_rules(chunks)
        kinds = [chunk.get("type") for chunk in chunks]
        assert kinds.count("response.completed") == (1 if name in ENDED_WELL else 0)
        last = {"type", "response"} if name in ENDED_WELL else {"error"}
        assert set(chunks[-1]) == last


@pytest.mark.parametrize("name", NAMES)
async def test_a_stop_at_any_moment_keeps_what_was_written(name: str) -> None:
    chunks = (await show(recorded(name), "browser", eager=True)).chunks
    full, page = page_of(chunks).text(), HostPage()
    for chunk in chunks:
        before = page.text()
        page.apply(chunk)
        assert full.startswith(page.text())
        assert len(page.text()) >= len(before)


@pytest.mark.parametrize("first", COMPLETED)
async def test_two_upstream_calls_of_one_answer(first: str) -> None:
    """All items stand one after the other, none takes the place of another."""
    single = page_of((await show(recorded(first), "browser")).chunks)
    second = renamed(recorded("04_function_call"), "second")
    again = renamed(recorded(first), "again")
    chunks = (await show([*recorded(first), *second, *again], "browser", eager=True)).chunks
    check_rules(chunks)
    page = page_of(chunks)
    (call,) = page_of((await show(second, "browser")).chunks).items
    names = [item["type"] for item in single.items]
    assert [item["type"] for item in page.items] == [*names, call["type"], *names]
    assert len({item["id"] for item in page.items}) == len(page.items)
    assert [usage["input_tokens"] for usage in page.usages] == [
        EXPECTED[name]["usage"]["input_tokens"] for name in (first, "04_function_call", first)
    ]


def renamed(emissions: list[Emission], suffix: str) -> list[Emission]:
    """The same with call ids of their own, as the turn loop sees to it."""
    return [
        emission._replace(call=emission.call._replace(call_id=f"{emission.call.call_id}_{suffix}"))
        if isinstance(emission, ToolRequested)
        else emission
        for emission in emissions
    ]


def requested(item: int, call_id: str) -> ToolRequested:
    return ToolRequested(ToolCall(call_id, "f", "{}"), item)


@pytest.mark.parametrize(
    "end",
    [
        TurnEnded("incomplete", "max_output_tokens"),
        Failed(StreamError("cut")),
    ],
)
@pytest.mark.parametrize("dialect", DIALECTS)
async def test_no_call_without_a_good_end(dialect: Dialect, end: Emission) -> None:
    emissions = [TextDelta(0, "a"), requested(1, "c"), end]
    shown = await show(emissions, dialect, eager=True)
    assert "function_call" not in json.dumps([shown.chunks, shown.result])
    assert "tool_calls" not in json.dumps([shown.chunks, shown.result])
    again = await show([*emissions[:2], TurnEnded("incomplete"), TurnEnded("completed")], "browser")
    assert "function_call" not in json.dumps(again.chunks)


@pytest.mark.parametrize("dialect", ["browser", "browser_json", "api_stream", "api_json"])
async def test_calls_stand_in_the_order_of_the_model(dialect: Dialect) -> None:
    emissions = [requested(2, "b"), requested(1, "a"), requested(3, "c"), TurnEnded("completed")]
    calls = SEE[dialect](await show(emissions, dialect)).calls
    assert [call["call_id"] for call in calls] == ["a", "b", "c"]


async def test_items_are_closed_before_calls_and_failures() -> None:
    open_items = [ReasoningDelta(0, "hm"), TextDelta(1, "a")]
    good = page_of((await show([*open_items, requested(2, "c"), TurnEnded("completed")])).chunks)
    assert [(item["type"], item["status"]) for item in good.items] == [
        ("reasoning", "completed"),
        ("message", "completed"),
        ("function_call", "completed"),
    ]
    bad = page_of((await show([*open_items, Failed(StreamError("cut"))])).chunks)
    assert [(item["type"], item["status"]) for item in bad.items] == [
        ("reasoning", "incomplete"),
        ("message", "incomplete"),
    ]
    assert (bad.text(), bad.reasoning()) == ("a", "hm")
    assert "Cut." in bad.error


async def test_a_failure_with_usage_reports_it_once() -> None:
    emissions = [TextDelta(0, "a"), UsageReported({"input_tokens": 3}), Failed(StreamError("cut"))]
    chunks = (await show(emissions)).chunks
    check_rules(chunks)
    assert page_of(chunks).usages == [{"input_tokens": 3}]
    assert "error" in chunks[-1]


async def test_a_failure_before_anything_is_one_chunk() -> None:
    (chunk,) = (await show([Failed(StreamError("cut"))])).chunks
    assert set(chunk) == {"error"}


async def test_a_refusal_is_shown_as_text() -> None:
    emissions = [RefusalDelta(0, "I "), RefusalDelta(0, "won't."), TurnEnded("completed")]
    (item,) = page_of((await show(emissions)).chunks).items
    assert item["content"] == [{"type": "output_text", "text": "I won't.", "annotations": []}]


@pytest.mark.parametrize(("seconds", "duration"), [(0.0, 0), (0.4, 0), (0.6, 1), (7.4, 7), (90.0, 90)])
async def test_reasoning_has_a_duration(seconds: float, duration: int) -> None:
    clock = Clock(100.0)

    def passing() -> Iterable[Emission]:
        yield ReasoningDelta(0, "")
        clock.now += seconds / 2
        yield ReasoningDelta(0, "hm")
        clock.now += seconds / 2
        yield ItemClosed(0, "reasoning", {})
        clock.now += 1000
        yield TurnEnded("completed")

    (item,) = page_of((await show(passing(), clock=clock, eager=True)).chunks).items
    assert item["duration"] == duration


async def test_parts_of_reasoning_stand_apart() -> None:
    emissions = [
        ReasoningDelta(0, "a", 0, "summary"),
        ReasoningDelta(0, "b", 0, "summary"),
        ReasoningDelta(0, "c", 1, "summary"),
        ReasoningDelta(0, "", 2, "summary"),
        ReasoningDelta(0, "d", 0, "text"),
        TurnEnded("completed"),
    ]
    for dialect in ("browser", "browser_json", "api_stream", "api_json"):
        assert SEE[dialect](await show(emissions, dialect)).reasoning == "ab\n\nc\n\nd"


# Any answer

SURROGATES: Final = st.text(st.sampled_from("ab\n é\N{GRINNING FACE}\ud83d\ude00\udfff\ud800"), max_size=12)
LAST: Final = 4  # items of one upstream call; even ones are reasoning


@st.composite
def upstream_calls(draw: st.DrawFn) -> list[Emission]:
    """What the reducer may say of one upstream call, up to its end."""
    emissions: list[Emission] = []
    closed: set[int] = set()
    for item in draw(st.lists(st.integers(0, LAST - 1), max_size=12)):
        if item in closed:
            continue
        if draw(st.integers(0, 4)) == 0:
            closed.add(item)
            emissions.append(ItemClosed(item, "message" if item % 2 else "reasoning", {}))
        elif item % 2 == 0:
            kinds: tuple[Literal["summary"], Literal["text"]] = ("summary", "text")
            part, kind = draw(st.integers(0, 1)), draw(st.sampled_from(kinds))
            emissions.append(ReasoningDelta(item, draw(SURROGATES), part, kind))
        elif text := draw(SURROGATES):
            delta = draw(st.sampled_from([TextDelta, RefusalDelta]))
            emissions.append(delta(item, text))
    for number, call_id in enumerate(draw(st.lists(st.sampled_from("ab"), max_size=2, unique=True))):
        emissions.append(requested(LAST + number, call_id))
    if draw(st.booleans()):
        emissions.append(UsageReported({"input_tokens": draw(st.integers(0, 9)), "cost": 0.5}))
    end = draw(st.sampled_from([TurnEnded("completed"), TurnEnded("incomplete", "max_output_tokens")]))
    return [*emissions, end]


def whole_answer(calls: list[list[Emission]], is_whole: bool) -> list[Emission]:
    emissions = [e for number, call in enumerate(calls) for e in renamed(call, str(number))]
    return emissions if is_whole else [*emissions[:-1], Failed(StreamError("cut"))]


ANSWERS: Final = st.builds(whole_answer, st.lists(upstream_calls(), min_size=1, max_size=3), st.booleans())


def repaired(text: str) -> str:
    """Pairs joined, halves alone replaced."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _messages(emissions: Iterable[Emission]) -> list[str]:
    """The text of each message, in the order in which they began."""
    calls: list[dict[int, str]] = [{}]
    for emission in emissions:
        if isinstance(emission, TextDelta | RefusalDelta):
            calls[-1][emission.item] = calls[-1].get(emission.item, "") + emission.text
        elif isinstance(emission, TurnEnded):
            calls.append({})
    return [repaired(text) for call in calls for text in call.values()]


@settings(max_examples=150, deadline=None)
@given(emissions=ANSWERS, eager=st.booleans())
def test_any_answer_keeps_the_rules(emissions: list[Emission], eager: bool) -> None:
    chunks = asyncio.run(show(emissions, "browser", eager=eager)).chunks
    check_rules(chunks)
    page = page_of(chunks)
    items = [item["content"][0]["text"] for item in page.items if item["type"] == "message"]
    assert items == _messages(emissions)
    whole = asyncio.run(show(emissions, "browser_json")).result
    expected = page.items if page.error else as_saved_at_once(page.items)
    assert without_ids(whole["output"]) == without_ids(expected)


@settings(max_examples=150, deadline=None)
@given(emissions=ANSWERS, eager=st.booleans(), dialect=st.sampled_from(DIALECTS))
def test_no_half_character_leaves(emissions: list[Emission], eager: bool, dialect: Dialect) -> None:
    shown = asyncio.run(show(emissions, dialect, eager=eager))
    for chunk in [*shown.chunks, shown.result]:
        json.dumps(chunk, ensure_ascii=False).encode()


@pytest.mark.parametrize(
    ("deltas", "contents"),
    [
        (["\ud83d", "\ude00"], ["\N{GRINNING FACE}"]),
        (["a\ud83d", "\ude00b"], ["a", "\N{GRINNING FACE}b"]),
        (["a\ud83d", "b"], ["a", "\ufffdb"]),
        (["a\ud83d"], ["a", "\ufffd"]),
        (["\ud83d", "\ud83d", "\ude00"], ["\ufffd", "\N{GRINNING FACE}"]),
        (["\ude00"], ["\ufffd"]),
        (["\ude00\ud83d", "\ude00"], ["\ufffd", "\N{GRINNING FACE}"]),
        (["a", ""], ["a"]),
    ],
    ids=ascii,
)
@pytest.mark.parametrize("end", [TurnEnded("completed"), Failed(StreamError("cut"))], ids=["well", "badly"])
async def test_half_a_pair_waits_for_its_other_half(
    deltas: list[str], contents: list[str], end: Emission
) -> None:
    shown = await show([*(TextDelta(0, delta) for delta in deltas), end], "api_stream", eager=True)
    choices = [choice for chunk in shown.chunks for choice in chunk.get("choices", ())]
    assert [text for choice in choices if (text := choice["delta"].get("content"))] == contents
    page = page_of((await show([*(TextDelta(0, delta) for delta in deltas), end], eager=True)).chunks)
    assert page.text() == "".join(contents)


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize(
    "between",
    [
        [ServerToolProgress("openrouter:datetime", "completed"), UsageReported({"input_tokens": 1})],
        [ReasoningDelta(1, "hm")],
        [ReasoningDelta(1, "hm\ud83d"), ReasoningDelta(1, "\ude00")],
        [CitationFound("https://a.example", "A")],
        [],
    ],
    ids=["progress", "reasoning", "a pair of its own", "source", "nothing"],
)
@pytest.mark.parametrize("dialect", DIALECTS)
async def test_a_split_pair_is_whole_in_every_dialect(
    dialect: Dialect, between: list[Emission], eager: bool
) -> None:
    emissions = [TextDelta(0, "a\ud83d"), *between, TextDelta(0, "\ude00b"), TurnEnded("completed")]
    shown = await show(emissions, dialect, eager=eager)
    seen = SEE[dialect](shown)
    assert seen.text == "a\N{GRINNING FACE}b" == joined_pairs("a\ud83d\ude00b")
    assert "\ufffd" not in json.dumps([shown.chunks, shown.result], ensure_ascii=False)


@pytest.mark.parametrize("dialect", ["browser_json", "api_json", "task"])
def test_an_answer_that_is_kept_to_its_end_takes_linear_time(dialect: Dialect) -> None:
    """Each emission for itself, as they come; text that is copied anew with each would be gigabytes."""

    def seconds_for(count: int) -> float:
        request = ChatRequest(body={}, dialect=dialect, model="a/b")
        writer, began = _make_writer(request, Valves(), Clock()), time.process_time()
        for _ in range(count):
            for _ in writer.write(TextDelta(0, "tök\N{GRINNING FACE} ")):
                pass
        for _ in writer.write(TurnEnded("completed")):
            pass
        result, seconds = writer.result() or {}, time.process_time() - began
        assert result["choices"][0]["message"]["content"].count("tök") == count
        return seconds

    short, long = (min(seconds_for(count) for _ in range(3)) for count in (8_000, 64_000))
    assert long < 24 * short, f"8 times the text took {long / short:.0f} times as long"


# What API clients get


async def test_the_chunks_of_an_api_client() -> None:
    emissions = [
        TextDelta(0, "Hi"),
        requested(1, "c1"),
        requested(2, "c2"),
        UsageReported({"input_tokens": 3, "output_tokens": 1, "total_tokens": 4}),
        TurnEnded("completed"),
    ]
    chunks = (await show(emissions, "api_stream")).chunks
    heads = {(chunk["id"], chunk["created"], chunk["model"], chunk["object"]) for chunk in chunks}
    ((completion_id, created, model, kind),) = heads
    assert completion_id.startswith("chatcmpl-")
    assert isinstance(created, int)
    assert (model, kind) == ("openrouter.a/b", "chat.completion.chunk")
    assert [chunk["choices"] for chunk in chunks] == [
        [{"index": 0, "delta": delta, "finish_reason": finish}]
        for delta, finish in (
            ({"role": "assistant", "content": ""}, None),
            ({"content": "Hi"}, None),
            (
                {
                    "tool_calls": [
                        {
                            "index": number,
                            "id": call_id,
                            "type": "function",
                            "function": {"name": "f", "arguments": "{}"},
                        }
                        for number, call_id in enumerate(("c1", "c2"))
                    ]
                },
                None,
            ),
            ({}, "tool_calls"),
        )
    ] + [[]]
    assert chunks[-1]["usage"] == {"prompt_tokens": 3, "completion_tokens": 1, "total_tokens": 4}


async def test_the_answer_of_an_api_client() -> None:
    emissions = [ReasoningDelta(0, "hm"), TextDelta(1, "Hi"), requested(2, "c"), TurnEnded("completed")]
    result = (await show(emissions, "api_json")).result
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    message = {"role": "assistant", "content": "Hi", "reasoning_content": "hm", "tool_calls": [call]}
    assert result["choices"] == [{"index": 0, "message": message, "finish_reason": "tool_calls"}]
    assert "usage" not in result


async def test_a_task_gets_text_only() -> None:
    emissions = [
        ReasoningDelta(0, "hm"),
        TextDelta(1, "A title"),
        CitationFound("https://a.example", "A"),
        requested(2, "c"),
        TurnEnded("completed"),
    ]
    (choice,) = (await show(emissions, "task")).result["choices"]
    message = {"role": "assistant", "content": "A title"}
    assert choice == {"index": 0, "message": message, "finish_reason": "stop"}


@pytest.mark.parametrize(
    ("end", "finish"),
    [
        (TurnEnded("completed"), "stop"),
        (TurnEnded("incomplete", "max_output_tokens"), "length"),
        (TurnEnded("incomplete", "content_filter"), "content_filter"),
        (TurnEnded("incomplete", "something new"), "length"),
    ],
)
async def test_finish_reasons(end: Emission, finish: str) -> None:
    for dialect in ("api_stream", "api_json"):
        assert SEE[dialect](await show([TextDelta(0, "a"), end], dialect)).finish == finish


@pytest.mark.parametrize("dialect", ["api_stream", "api_json", "task"])
async def test_an_error_as_api_clients_read_it(dialect: Dialect) -> None:
    error = StreamError("slow down", template="rate_limit", status=429)
    shown = await show([TextDelta(0, "a"), Failed(error)], dialect)
    found = (shown.chunks[-1] if shown.chunks else shown.result)["error"]
    assert found == {"message": error.user_message, "type": "rate_limit", "code": 429}


# The host's own events


@dataclass
class Desk:
    """An emitter, its clock, and what the host was told."""

    emitter: Emitter
    outlet: Outlet
    clock: Clock
    told: Events


def desk(dialect: Dialect = "browser", contact: str = "", emit: Any = None) -> Desk:
    told, clock = Events(), Clock(1000.0)
    outlet = Outlet((0, 0.0), clock)
    request = ChatRequest(body={}, dialect=dialect, model="a/b")
    host = _wrap_event_emitter(emit or told, suppress_chat_messages=dialect not in WITH_EVENTS)
    emitter = Emitter(_make_writer(request, Valves(), clock), outlet, host, clock, ErrorPage(contact=contact))
    return Desk(emitter, outlet, clock, told)


async def last_status(emissions: Sequence[Emission], elapsed_s: float = 3.2, show_usage: bool = True) -> str:
    """What stands under an answer that has ended."""
    at = desk()
    await at.emitter.send(emissions)
    await at.emitter.complete(elapsed_s, show_usage)
    assert [status["done"] for status in at.told.of("status")][-1:] in ([], [True])
    return at.told.statuses()[-1] if at.told.statuses() else ""


@pytest.mark.parametrize(
    ("progress", "text", "done"),
    [
        (ServerToolProgress("web_search_call", "in_progress"), "Searching the web", False),
        (ServerToolProgress("web_search_call", "completed", "towers"), "Searched the web: towers", True),
        (ServerToolProgress("openrouter:web_search", "in_progress"), "Searching the web", False),
        (ServerToolProgress("openrouter:web_fetch", "completed"), "Read a page", True),
        (ServerToolProgress("image_generation_call", "in_progress"), "Making a picture", False),
        (ServerToolProgress("openrouter:image_generation", "completed"), "Made a picture", True),
        (ServerToolProgress("file_search_call", "completed"), "Searched files", True),
        (ServerToolProgress("web_search_call", "in_progress", "cats"), "Searching the web: cats", False),
        (ServerToolProgress("web_search_call", "failed"), "The web search failed", True),
        (ServerToolProgress("openrouter:web_search", "failed"), "The web search failed", True),
        (ServerToolProgress("openrouter:web_fetch", "failed"), "The page could not be read", True),
        (ServerToolProgress("file_search_call", "failed"), "The file search failed", True),
        (ServerToolProgress("image_generation_call", "failed"), "The picture could not be made", True),
        (ServerToolProgress("code_interpreter_call", "failed"), "The code could not be run", True),
    ],
)
async def test_what_server_tools_do_is_told(progress: ServerToolProgress, text: str, done: bool) -> None:
    at = desk()
    await at.emitter.send([progress])
    assert at.told == [{"type": "status", "data": {"description": text, "done": done, "hidden": False}}]


@pytest.mark.parametrize("kind", ["fusion", "advisor", "subagent", "tool_search"])
async def test_no_tool_that_failed_is_told_as_done(kind: str) -> None:
    """But its line is ended."""
    told: dict[str, Json] = {}
    for status in ("completed", "failed"):
        at = desk()
        await at.emitter.send([ServerToolProgress(f"openrouter:{kind}", "in_progress")])
        await at.emitter.send([ServerToolProgress(f"openrouter:{kind}", status)])
        assert [one["done"] for one in at.told.of("status")] == [False, True]
        told[status] = at.told.of("status")[-1]
    assert told["failed"]["hidden"] or told["failed"]["description"] != told["completed"]["description"]


async def test_a_tool_without_words_is_not_told() -> None:
    at = desk()
    await at.emitter.send([ServerToolProgress("openrouter:datetime", "in_progress")])
    await at.emitter.send([ServerToolProgress("openrouter:datetime", "completed")])
    await at.emitter.send([ServerToolProgress("openrouter:datetime", "failed")])
    assert at.told == []


async def test_a_status_is_told_as_it_is() -> None:
    at = desk()
    await at.emitter.send([StatusUpdate("Working", done=False), StatusUpdate("Worked", True, True)])
    assert at.told.of("status") == [
        {"description": "Working", "done": False, "hidden": False},
        {"description": "Worked", "done": True, "hidden": True},
    ]


async def test_a_source_is_told_once() -> None:
    at = desk()
    citations = [
        CitationFound("https://a.example", "A", "the words"),
        CitationFound("https://b.example", "B"),
        CitationFound("https://a.example", "A again"),
    ]
    await at.emitter.send(citations)
    await at.emitter.send(citations)
    assert at.told == [
        {
            "type": "source",
            "data": {
                "source": {"name": "A", "url": "https://a.example"},
                "document": ["the words"],
                "metadata": [{"source": "https://a.example", "name": "A"}],
            },
        },
        {
            "type": "source",
            "data": {
                "source": {"name": "B", "url": "https://b.example"},
                "document": ["B"],
                "metadata": [{"source": "https://b.example", "name": "B"}],
            },
        },
    ]


async def test_a_notice_is_told_at_once_and_at_the_end() -> None:
    at = desk()
    await at.emitter.send([Notice("Not sent: 1 thing."), TextDelta(0, "a"), TurnEnded("completed")])
    data = {"type": "warning", "content": "Not sent: 1 thing."}
    assert at.told == [{"type": "notification", "data": data}]
    await at.emitter.complete(1.0, show_usage=False)
    assert at.told.statuses() == ["Not sent: 1 thing"]


USAGE: Final[Json] = {
    "input_tokens": 1225,
    "input_tokens_details": {"cached_tokens": 1024},
    "output_tokens": 148,
    "output_tokens_details": {"reasoning_tokens": 128},
    "cost": 0.001511,
}


@pytest.mark.parametrize(
    ("usages", "elapsed_s", "text"),
    [
        ([USAGE], 3.21, "3.2 s · 1,225 tokens in (1,024 cached) · 148 out (128 reasoning) · $0.0015"),
        ([{"input_tokens": 9, "output_tokens": 3}], 0.01, "0.1 s · 9 tokens in · 3 out"),
        ([{"input_tokens": 9, "output_tokens": 0, "cost": 0}], 61.0, "61.0 s · 9 tokens in · 0 out · $0"),
        (
            [{"input_tokens": 1, "output_tokens": 2, "cost": 0.5}] * 2,
            1.0,
            "1.0 s · 2 tokens in · 4 out · $1.00",
        ),
        ([], 1.0, "1.0 s"),
        ([{"input_tokens": None, "output_tokens": "3", "cost": None}], 1.0, "1.0 s"),
        (
            [{"input_tokens": 5, "input_tokens_details": {"cached_tokens": "3"}}, {}],
            1.0,
            "1.0 s · 5 tokens in",
        ),
        ([{"input_tokens": 5, "input_tokens_details": None}], 1.0, "1.0 s · 5 tokens in"),
    ],
)
async def test_what_an_answer_took(usages: list[Any], elapsed_s: float, text: str) -> None:
    emissions = [TextDelta(0, "a"), *map(UsageReported, usages), TurnEnded("completed")]
    assert await last_status(emissions, elapsed_s) == text


@pytest.mark.parametrize(
    ("writing_s", "rate"),
    [(2.0, " · 50 tokens/s"), (0.5, " · 200 tokens/s"), (0.4, ""), (0.0, "")],
)
@pytest.mark.parametrize("closing_s", [0.0, 2.0])
async def test_the_rate_is_that_of_the_writing(writing_s: float, rate: str, closing_s: float) -> None:
    at = desk()
    at.clock.now += 60.0
    await at.emitter.send([TextDelta(0, "a")])
    at.clock.now += writing_s
    await at.emitter.send([UsageReported({"output_tokens": 100}), TurnEnded("completed")])
    at.clock.now += closing_s
    await at.emitter.complete(60.0 + writing_s, show_usage=True)
    assert at.told.statuses() == [f"{60.0 + writing_s:.1f} s · 100 out{rate}"]


@pytest.mark.parametrize(
    ("cost", "text"),
    [
        (0, "$0"),
        (0.0, "$0"),
        (-0.5, "$0"),
        (1e-13, "$0"),
        (2.3e-7, "$0.00000023"),
        (1.15e-5, "$0.000012"),
        (0.00023, "$0.00023"),
        (0.001511, "$0.0015"),
        (0.001, "$0.001"),
        (0.0099, "$0.0099"),
        (0.01, "$0.01"),
        (0.0448, "$0.045"),
        (0.05, "$0.05"),
        (0.0999, "$0.10"),
        (0.1, "$0.10"),
        (0.126, "$0.13"),
        (1.2, "$1.20"),
        (1, "$1.00"),
        (12.345, "$12.35"),
        (1234.5, "$1234.50"),
    ],
)
async def test_costs(cost: float, text: str) -> None:
    emissions = [TextDelta(0, "a"), UsageReported({"cost": cost}), TurnEnded("completed")]
    assert await last_status(emissions) == f"3.2 s · {text}"


@pytest.mark.parametrize("cost", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("before", [0.0, 0.02])
async def test_a_cost_that_is_no_amount_is_not_told(cost: float, before: float) -> None:
    at = desk()
    await at.emitter.send([TextDelta(0, "a"), UsageReported({"cost": cost}), TurnEnded("completed")])
    await at.emitter.complete(3.2, True, before)
    assert at.told.statuses() == ["3.2 s"]


@pytest.mark.parametrize(
    ("usage", "before", "text"),
    [
        ({"cost": 0.0015}, 0.02, " · $0.0015 (chat $0.022)"),
        ({"cost": 0}, 0.02, " · $0 (chat $0.02)"),
        ({"cost": 0.0015}, 0.0, " · $0.0015"),
        ({}, 0.02, ""),
    ],
)
async def test_what_the_chat_has_cost(usage: Any, before: float, text: str) -> None:
    at = desk()
    await at.emitter.send([TextDelta(0, "a"), UsageReported(usage), TurnEnded("completed")])
    await at.emitter.complete(3.2, True, before)
    assert at.told.statuses() == [f"3.2 s{text}"]


@pytest.mark.parametrize("log", ["", "12:00:01 asked\n12:00:02 refused"])
async def test_the_log_of_a_failure(log: str) -> None:
    """It goes, as a source, to whom it was given for; the error itself is the same."""
    at = desk()
    await at.emitter.send([TextDelta(0, "a"), Failed(StreamError("cut"), log)])
    at.emitter.aclose()
    chunks = [chunk async for chunk in at.outlet.chunks()]
    assert "Cut." in chunks[-1]["error"]["message"]
    sources = at.told.of("source")
    assert [source["document"] for source in sources] == ([[log]] if log else [])
    assert all(source["source"]["name"].startswith("Log of request") for source in sources)


@pytest.mark.parametrize(
    ("emissions", "text"),
    [
        (
            [TextDelta(0, "a"), TurnEnded("incomplete", "max_output_tokens")],
            "Cut short: the output limit was reached",
        ),
        (
            [TextDelta(0, "a"), TurnEnded("incomplete", "content_filter")],
            "Cut short by the provider's content filter",
        ),
        ([TextDelta(0, "a"), TurnEnded("incomplete", "")], "The answer is not complete"),
        ([TurnEnded("completed")], "The model sent an empty answer"),
        ([ReasoningDelta(0, "hm"), TurnEnded("completed")], "The model sent an empty answer"),
        ([TextDelta(0, "a"), TurnEnded("completed")], ""),
        ([RefusalDelta(0, "no"), TurnEnded("completed")], ""),
        ([requested(0, "c"), TurnEnded("completed")], ""),
    ],
)
async def test_what_the_person_must_know(emissions: list[Emission], text: str) -> None:
    assert await last_status(emissions, show_usage=False) == text
    assert await last_status(emissions) == " · ".join(filter(None, [text, "3.2 s"]))


@pytest.mark.parametrize("dialect", DIALECTS)
async def test_no_picture_leaves_as_a_model_has_sent_it(dialect: Dialect) -> None:
    """They become texts of the answer before they come here."""
    picture = MediaProduced(1, "data:image/png;base64,AA==")
    shown = await show([TextDelta(0, "See:"), picture, TurnEnded("completed")], dialect)
    assert SEE[dialect](shown).text == "See:"
    assert "AA==" not in repr(shown)


async def test_an_open_status_is_closed() -> None:
    at = desk()
    await at.emitter.send([ServerToolProgress("web_search_call", "in_progress"), TextDelta(0, "a")])
    await at.emitter.complete(1.0, show_usage=False)
    assert at.told.of("status")[-1] == {"description": "Done", "done": True, "hidden": True}


@pytest.mark.parametrize("was_open", [True, False])
async def test_a_failure_closes_an_open_status(was_open: bool) -> None:
    at = desk()
    status = "in_progress" if was_open else "completed"
    await at.emitter.send([ServerToolProgress("web_search_call", status), Failed(StreamError("cut"))])
    last = at.told.of("status")[-1]
    assert last["done"] is True
    assert (last["description"] == "Failed") == was_open


async def test_complete_returns_the_usage_of_all_calls() -> None:
    at = desk()
    await at.emitter.send([UsageReported({"input_tokens": 3}), UsageReported({"input_tokens": 4})])
    assert at.emitter.usage() == {"input_tokens": 7}
    assert await at.emitter.complete(1.0, show_usage=True) == {"input_tokens": 7}


@pytest.mark.parametrize(
    "detail", ["It broke", "It broke.", "", "Please try again!", "Did it break?", "Broken…"]
)
@pytest.mark.parametrize("dialect", ["browser", "api_stream"])
async def test_whom_to_ask_stands_with_an_error(dialect: Dialect, detail: str) -> None:
    at = desk(dialect, contact="help@example.org")
    await at.emitter.send([Failed(StreamError(detail, status=502, retry_after=40.0))])
    at.emitter.aclose()
    (chunk,) = await rest_of(at.outlet.chunks())
    message = chunk["error"]["message"]
    assert "Contact: help@example.org" in message
    assert detail.rstrip(".") in message
    assert "in 40 seconds" in message
    for doubled in ("..", "!.", "?."):
        assert doubled not in message


# A host that takes no events

EVERYTHING: Final[list[Emission]] = [
    Notice("Careful."),
    StatusUpdate("Working"),
    ServerToolProgress("web_search_call", "in_progress"),
    CitationFound("https://a.example", "A"),
    TextDelta(0, "answer"),
    MediaProduced(1, "AA=="),
    UsageReported({"input_tokens": 3, "cost": 1}),
    TurnEnded("incomplete", "max_output_tokens"),
]


async def test_a_broken_emitter_is_survived(caplog: pytest.LogCaptureFixture) -> None:
    asked: list[Json] = []

    async def broken(event: Json) -> None:
        asked.append(event)
        raise ConnectionError("the socket of user@example.org is gone")

    at = desk(emit=broken)
    with caplog.at_level(logging.DEBUG):
        await at.emitter.send(EVERYTHING)
        await at.emitter.complete(1.0, show_usage=True)
    at.emitter.aclose()
    assert page_of(await rest_of(at.outlet.chunks())).text() == "answer"
    assert len(asked) == 1
    warnings = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == 1
    assert "user@example.org" not in caplog.text


async def test_a_cancellation_inside_the_emitter_is_passed_on() -> None:
    async def cancelled(event: Json) -> None:
        raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        await desk(emit=cancelled).emitter.send([StatusUpdate("Working")])


@pytest.mark.parametrize("dialect", ["api_stream", "api_json", "task"])
async def test_suppressed_dialects_are_silent(dialect: Dialect) -> None:
    at = desk(dialect)
    await at.emitter.send(EVERYTHING)
    await at.emitter.complete(1.0, show_usage=True)
    await at.emitter.send([Failed(StreamError("cut"))])
    assert at.told == []


@pytest.mark.parametrize("dialect", WITH_EVENTS)
async def test_the_others_are_not(dialect: Dialect) -> None:
    at = desk(dialect)
    await at.emitter.send(EVERYTHING)
    assert {event["type"] for event in at.told} == {"status", "source", "notification"}


async def test_no_emitter_at_all() -> None:
    emit: Callable[[Json], Awaitable[Any]] = _wrap_event_emitter(None)
    assert await emit({"type": "status"}) is None


async def test_who_sends_waits_for_the_reader() -> None:
    at = desk()
    sending = asyncio.ensure_future(at.emitter.send([TextDelta(0, "x" * (_OUTLET_MAX_CHARS + 1))]))
    await settle()
    assert not sending.done()
    chunks = at.outlet.chunks()
    async with asyncio.timeout(PATIENCE_S):
        while not sending.done():
            await anext(chunks)
            await settle()
    await chunks.aclose()


# Tools that are run here


def ran(call_id: str, text: str = "3", **more: Any) -> ToolFinished:
    return ToolFinished(ToolResult(ToolCall(call_id, "f", "{}"), text, **more))


def started(call_id: str) -> ToolStarted:
    return ToolStarted(ToolCall(call_id, "f", "{}"))


GOES_ON = TurnEnded("completed", goes_on=True)


def batch(*call_ids: str) -> list[Emission]:
    """A round whose calls are run here."""
    calls = [requested(number, call_id) for number, call_id in enumerate(call_ids)]
    return [*calls, GOES_ON, *map(started, call_ids)]


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("dialect", WITH_EVENTS)
async def test_a_call_that_was_run_here_has_its_output(dialect: Dialect, eager: bool) -> None:
    emissions = [*batch("a", "b"), ran("b", "two"), ran("a", "one", failed=True), TextDelta(0, "Done.")]
    shown = await show([*emissions, TurnEnded("completed")], dialect, eager=eager)
    items = shown.result["output"] if dialect == "browser_json" else page_of(shown.chunks).items
    assert [(item["type"], item.get("call_id"), item["status"]) for item in items] == [
        ("function_call", "a", "failed"),
        ("function_call", "b", "completed"),
        ("function_call_output", "b", "completed"),
        ("function_call_output", "a", "failed"),
        ("message", None, "completed"),
    ]
    assert items[2]["output"] == [{"type": "input_text", "text": "two"}]
    assert len({item["id"] for item in items}) == 5


async def test_pictures_files_and_embeds_go_with_the_output() -> None:
    files, embeds = ({"type": "image", "url": "/x"},), ("<b>x</b>",)
    finished = ran("a", "drawn", images=("/x",), files=files, embeds=embeds)
    item = page_of((await show([*batch("a"), finished, TurnEnded("completed")])).chunks).items[1]
    assert item["output"][1:] == [{"type": "input_image", "image_url": "/x"}]
    assert (item["files"], item["embeds"]) == ([*files], [*embeds])
    plain = page_of((await show([*batch("a"), ran("a"), TurnEnded("completed")])).chunks).items[1]
    assert plain.keys() == {"type", "id", "call_id", "output", "status"}


@pytest.mark.parametrize("dialect", WITH_EVENTS)
async def test_a_failure_answers_what_runs(dialect: Dialect) -> None:
    emissions = [*batch("a", "b", "c"), ran("b"), Failed(StreamError("cut"))]
    shown = await show(emissions, dialect)
    items = shown.result["output"] if dialect == "browser_json" else page_of(shown.chunks).items
    outputs = [(i["call_id"], i["status"]) for i in items if i["type"] == "function_call_output"]
    assert outputs == [("b", "completed"), ("a", "failed"), ("c", "failed")]
    assert [item["status"] for item in items[:3]] == ["failed", "completed", "failed"]


async def test_a_failure_answers_what_was_written_and_had_not_begun() -> None:
    """Between the end of the upstream call and the beginning of its tools there is time to fail, too."""
    page = page_of((await show([requested(0, "a"), GOES_ON, Failed(StreamError("cut"))])).chunks)
    assert [item["type"] for item in page.items] == ["function_call", "function_call_output"]


async def test_a_stop_leaves_no_call_running_in_what_is_returned() -> None:
    items = (await show([*batch("a", "b"), ran("b")], "browser_json")).result["output"]
    assert [(item["type"], item["status"]) for item in items] == [
        ("function_call", "incomplete"),
        ("function_call", "completed"),
        ("function_call_output", "completed"),
    ]


@pytest.mark.parametrize("dialect", ["api_stream", "api_json"])
async def test_programs_see_nothing_of_what_was_run_here(dialect: Dialect) -> None:
    emissions = [TextDelta(0, "See."), *batch("a"), ran("a"), TextDelta(0, "Done."), TurnEnded("completed")]
    seen = SEE[dialect](await show(emissions, dialect))
    assert (seen.text, seen.calls, seen.finish) == ("See.\nDone.", [], "stop")


@pytest.mark.parametrize("dialect", DIALECTS)
async def test_sources_of_a_tool_are_told(dialect: Dialect) -> None:
    source = {"source": {"name": "S"}, "document": ["x"], "metadata": [{"source": "s"}]}
    shown = await show([*batch("a"), ran("a", sources=(source,)), TurnEnded("completed")], dialect)
    assert shown.events.of("source") == ([source] if dialect in WITH_EVENTS else [])


async def test_what_runs_is_told_where_no_card_shows_it() -> None:
    emissions = [*batch("a"), ran("a"), TurnEnded("completed")]
    assert (await show(emissions, "browser")).events.of("status") == []
    told = (await show(emissions, "browser_json")).events.of("status")
    assert [(status["done"], status["hidden"]) for status in told] == [(False, False), (True, False)]


async def test_the_line_of_what_runs_stays_until_the_last_has_ended() -> None:
    """Several run at once: the first that ends must not take the line of the others away."""
    told = (await show([*batch("a", "b"), ran("a")], "browser_json")).events.of("status")
    assert told[-1]["done"] is False
