"""Streams that end anywhere, or come in any order, shown in every dialect; and an API client's own tools.

What a cut stream means is tested with the reducer, and how emissions are written with the dialects;
here both stand one after the other, as a client meets them.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openrouter_responses_pipe.openrouter_responses_pipe import (
    ChatRequest,
    Dialect,
    Emission,
    Failed,
    Piece,
    Pipe,
    SSEDecoder,
    StreamEvent,
    StreamState,
    Valves,
    _make_writer,
    close_stream,
    parse_frames,
    reduce_event,
    reduce_events,
)
from openrouter_responses_pipe.simulator import Simulator
from tests.recorded import EXPECTED, NAMES, joined_pairs
from tests.recorded import events as recorded_events
from tests.support import (
    EVENT_STREAM,
    GOLDEN,
    Handler,
    arguments,
    hostile,
    inferences,
    read_request,
    running_pipe,
)

Json = dict[str, Any]
DIALECTS: Final = get_args(Dialect)
TERMINALS: Final = frozenset(
    {"response.completed", "response.incomplete", "response.failed", "response.error", "error"}
)
WITH_CALLS: Final = [name for name in NAMES if EXPECTED[name].get("tool_calls")]
API_NAMES: Final = ["api_stream", "api_json"]


@dataclass
class Got:
    """What a client has been given, whatever its dialect."""

    text: str = ""
    reasoning: str = ""
    calls: list[Json] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    ends: list[str] = field(default_factory=list)
    still_open: list[str] = field(default_factory=list)

    def outcomes(self) -> int:
        """How often this client was told how the answer ended."""
        return len(self.errors) or len(self.ends)


def _take_event(got: Got, event: Json) -> None:
    """One event of the browser dialect."""
    kind, item = event.get("type"), event.get("item", {})
    if "error" in event:
        got.errors.append(event["error"]["message"])
    elif kind == "response.output_item.added":
        got.still_open.append(item["id"])
    elif kind == "response.output_item.done" and item.get("reasoning_details"):
        assert item["id"] not in got.still_open  # its end has come; this is what the host keeps with it
    elif kind == "response.output_item.done":
        got.still_open.remove(item["id"])
        if item["type"] == "function_call":
            got.calls.append(item)
    elif kind == "response.output_text.delta":
        got.text += event["delta"]
    elif kind == "response.reasoning_summary_text.delta":
        got.reasoning += event["delta"]
    elif kind == "response.completed":
        got.ends.append("completed")
    else:
        raise AssertionError(f"an event that no client knows: {kind}")


def _take_chunk(got: Got, chunk: Json) -> None:
    """One chunk of a streaming API client."""
    if "error" in chunk:
        got.errors.append(chunk["error"]["message"])
    for choice in chunk.get("choices", ()):
        said = choice.get("delta") or choice.get("message") or {}
        got.text += said.get("content") or ""
        got.reasoning += said.get("reasoning_content") or ""
        got.calls += [{"call_id": call["id"], **call["function"]} for call in said.get("tool_calls", ())]
        got.ends += [choice["finish_reason"]] if choice["finish_reason"] else []


def _take_items(got: Got, result: Json) -> None:
    """The whole answer of the host without streaming."""
    got.errors += [result["error"]["message"]] if "error" in result else []
    (choice,) = result["choices"]
    got.ends.append(choice["finish_reason"])
    got.text = choice["message"]["content"]
    for item in result["output"]:
        got.still_open += [item["id"]] if item["status"] == "in_progress" else []
        if item["type"] == "function_call":
            got.calls.append(item)
        elif item["type"] == "reasoning":
            got.reasoning += "".join(part["text"] for part in item["summary"])


def read(dialect: Dialect, chunks: Iterable[Json], result: Json) -> Got:
    """What the client of a dialect makes of its chunks, or of the whole answer."""
    got = Got()
    for chunk in chunks:
        (_take_event if dialect == "browser" else _take_chunk)(got, chunk)
    if dialect == "browser_json":
        _take_items(got, result)
    elif dialect in ("api_json", "task"):
        _take_chunk(got, result)
    return got


def written(emissions: Iterable[Emission], dialect: Dialect) -> Got:
    """Emissions as a client of this dialect gets them."""
    request = ChatRequest(body={"model": "openrouter.a/b"}, dialect=dialect, model="a/b")
    writer = _make_writer(request, Valves(), lambda: 0.0)
    entries = [entry for emission in emissions for entry in writer.write(emission)]
    chunks = [entry.build(entry.text) if isinstance(entry, Piece) else entry for entry in entries]
    return read(dialect, chunks, writer.result() or {})


def meaning(stream: Sequence[StreamEvent], *, joined: bool) -> list[Emission]:
    """What events mean that came in one read, or one by one, before the connection ended."""
    state = StreamState()
    if joined:
        return [*reduce_events(state, stream), *close_stream(state)]
    return [*(e for one in stream for e in reduce_event(state, one)), *close_stream(state)]


# Cut at every byte


def prefixes(content: bytes) -> Iterator[tuple[int, list[StreamEvent]]]:
    """(bytes that arrived, their events) for every place at which a connection can end.

    Neighbours that say the same are left out: what follows depends on the events alone.
    """
    before: list[StreamEvent] | None = None
    decoder = SSEDecoder()
    events: list[StreamEvent] = []
    for size in range(len(content)):
        closing = copy.deepcopy(decoder)
        found = [*events, *parse_frames(closing.close())]
        if found != before:
            yield size, found
        before = found
        events += parse_frames(decoder.feed(content[size : size + 1]))
    yield len(content), [*events, *parse_frames(decoder.close())]


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("name", WITH_CALLS)
def test_no_call_before_the_stream_has_said_that_it_is_complete(name: str, dialect: Dialect) -> None:
    expected, cuts, complete = EXPECTED[name], 0, 0
    for size, stream in prefixes((GOLDEN / f"{name}.sse").read_bytes()):
        ended = any(one.get("type") in TERMINALS for one in stream)
        emissions = meaning(stream, joined=True)
        got = written(emissions, dialect)
        assert got.still_open == [], size
        assert got.outcomes() == 1, size
        cuts, complete = cuts + 1, complete + ended
        if ended:
            assert got.errors == []
            assert len(got.calls) == (0 if dialect == "task" else len(expected["tool_calls"]))
        else:
            assert got.calls == [], size
            assert len(got.errors) == 1, size
            assert isinstance(emissions[-1], Failed)
            assert expected["text"].startswith(got.text), size
    assert cuts > 10
    assert complete


def frame_ends(content: bytes) -> list[int]:
    """The places right after each frame."""
    parts = content.split(b"\n\n")
    return list(itertools.accumulate(len(part) + 2 for part in parts[:-1]))


def cutting(content: bytes) -> Handler:
    """Answers the nth request with as many bytes as its prompt says, and hangs up."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        line, _, body = await read_request(reader)
        if "/models" in line:
            raise ConnectionError
        prompt = json.loads(body)["input"][-1]["content"]
        size = int(prompt if isinstance(prompt, str) else prompt[-1]["text"])
        writer.write(EVENT_STREAM + content[:size])
        await writer.drain()

    return handle


async def whole(pipe: Pipe, prompt: str | Json, dialect: Dialect, **more: Any) -> Got:
    """One request through the pipe, as its client reads it."""
    result = await pipe.pipe(**arguments(prompt, dialect, **more))
    if isinstance(result, dict):
        return read(dialect, (), result)
    async with contextlib.aclosing(result) as stream:
        return read(dialect, [chunk async for chunk in stream], {})


@pytest.mark.parametrize("dialect", ["browser", "browser_json", "api_stream", "api_json"])
@pytest.mark.parametrize("name", WITH_CALLS)
async def test_a_connection_that_breaks_after_any_frame(name: str, dialect: Dialect) -> None:
    content = (GOLDEN / f"{name}.sse").read_bytes()
    end = content.index(b'data: {"type":"response.completed"')
    sizes = [size + more for size in frame_ends(content) for more in (-3, 0) if size <= end]
    async with hostile(cutting(content)) as base_url, running_pipe(base_url) as pipe:
        for got in await asyncio.gather(*(whole(pipe, str(size), dialect) for size in sizes)):
            assert (got.calls, got.still_open, len(got.errors)) == ([], [], 1)
        got = await whole(pipe, str(len(content)), dialect)
        assert (got.still_open, got.errors) == ([], [])
        assert len(got.calls) == len(EXPECTED[name]["tool_calls"])


# An API client with tools of its own


def _tool(name: str, *fields: str) -> Json:
    properties = {field: {"type": "string", "default": f"some {field}"} for field in fields}
    schema = {"type": "object", "properties": properties, "required": [*fields]}
    return {"type": "function", "function": {"name": name, "description": name, "parameters": schema}}


TOOLS: Final = [_tool("get_weather", "city", "unit"), _tool("get_time", "zone")]


@dataclass
class OpenAIClient:
    """Asks as programs with OpenAI's library do, and keeps the chat as they do."""

    pipe: Pipe
    dialect: str
    messages: list[Json]
    finish: str = ""
    usages: list[Json] = field(default_factory=list)

    async def complete(self) -> Json:
        """Send the chat, append the answer to it, return it."""
        body = {"messages": self.messages, "tools": TOOLS, "stream_options": {"include_usage": True}}
        result = await self.pipe.pipe(**arguments(body, self.dialect))
        if isinstance(result, dict):
            (choice,) = result["choices"]
            self.usages.append(result["usage"])
        else:
            choice = await self._accumulate(result)
        self.finish = choice["finish_reason"]
        self.messages.append(choice["message"])
        return choice["message"]

    async def _accumulate(self, chunks: Any) -> Json:
        message: Json = {"content": ""}
        calls: dict[int, Json] = {}
        finish = None
        async for chunk in chunks:
            assert chunk["object"] == "chat.completion.chunk"
            self.usages += [chunk["usage"]] if chunk.get("usage") else []
            for choice in chunk["choices"]:
                delta = choice["delta"]
                assert finish is None, "nothing of an answer follows its end"
                finish = choice["finish_reason"]
                message["role"] = delta.get("role", message.get("role"))
                message["content"] += delta.get("content") or ""
                for part in delta.get("tool_calls", ()):
                    function = calls.setdefault(part["index"], {**part, "function": {}})["function"]
                    for key, value in part["function"].items():
                        function[key] = function.get(key, "") + value
        assert sorted(calls) == list(range(len(calls)))
        found = [{key: call[key] for key in ("id", "type", "function")} for _, call in sorted(calls.items())]
        return {"message": message | ({"tool_calls": found} if found else {}), "finish_reason": finish}

    def run_tools(self) -> list[str]:
        """Append an output for every call of the last answer."""
        calls = self.messages[-1]["tool_calls"]
        for call in calls:
            output = f"{call['function']['name']} says {call['id']}"
            self.messages.append({"role": "tool", "tool_call_id": call["id"], "content": output})
        return [call["id"] for call in calls]


@pytest.mark.parametrize(
    ("prompt", "rounds"),
    [
        ("How is the weather?", [1]),
        ("[[tool say=Wait]] How is it?", [1]),
        ("[[tool_whole]] How is it?", [1]),
        ("[[tools n=3]] Look at all", [3]),
        ("[[tool rounds=3]] Look again", [1, 1, 1]),
    ],
)
@pytest.mark.parametrize("dialect", API_NAMES)
async def test_an_api_client_with_its_own_tools(
    dialect: str, prompt: str, rounds: list[int], pipe: Pipe, simulator: Simulator
) -> None:
    client = OpenAIClient(pipe, dialect, [{"role": "user", "content": prompt}])
    all_ids: list[str] = []
    for count in rounds:
        message = await client.complete()
        assert client.finish == "tool_calls"
        assert message["role"] == "assistant"
        ids = client.run_tools()
        assert len(ids) == count
        all_ids += ids
        for call in message["tool_calls"]:
            assert call["type"] == "function"
            assert call["function"]["name"] in ("get_weather", "get_time")
            assert isinstance(json.loads(call["function"]["arguments"]), dict)
    answer = await client.complete()
    assert client.finish == "stop"
    assert "tool_calls" not in answer
    assert all(call_id in answer["content"] for call_id in all_ids[-rounds[-1] :])
    assert len(client.usages) == len(rounds) + 1
    _compare_requests(inferences(simulator), all_ids, rounds)


def _compare_requests(records: Sequence[Any], ids: list[str], rounds: list[int]) -> None:
    """Every request offers the tools, and holds each call so far with its output behind it."""
    assert len(set(ids)) == len(ids)
    for number, record in enumerate(records):
        assert [tool["name"] for tool in record.body["tools"]] == ["get_weather", "get_time"]
        sent = [item for item in record.body["input"] if item["type"].startswith("function_call")]
        calls = [item["call_id"] for item in sent if item["type"] == "function_call"]
        outputs = {item["call_id"]: item["output"] for item in sent if item["type"] != "function_call"}
        assert calls == ids[: sum(rounds[:number])]
        assert [outputs[call_id].rpartition(" ")[2] for call_id in calls] == calls


@pytest.mark.parametrize("name", WITH_CALLS)
@pytest.mark.parametrize("dialect", API_NAMES)
async def test_recorded_calls_go_out_and_back(
    dialect: str, name: str, pipe: Pipe, simulator: Simulator
) -> None:
    client = OpenAIClient(pipe, dialect, [{"role": "user", "content": "Go"}])
    simulator.next("golden", name=name)
    message = await client.complete()
    assert client.finish == "tool_calls"
    assert (message.get("content") or "") == EXPECTED[name]["text"]
    expected = EXPECTED[name]["tool_calls"]
    assert [(call["id"], json.loads(call["function"]["arguments"])) for call in message["tool_calls"]] == [
        (call["call_id"], call["arguments"]) for call in expected
    ]
    client.run_tools()
    answer = await client.complete()
    assert client.finish == "stop"
    assert all(call["call_id"] in answer["content"] for call in expected)


# Events in any order, twice, or not at all


@dataclass
class Story:
    """A stream and what it has to amount to."""

    events: list[StreamEvent]
    texts: dict[str, str]  # kind -> all characters of it, each of which exists once
    call_ids: list[str]  # those that can be known
    outcome: str


def event(kind: str, **payload: Any) -> StreamEvent:
    return {"type": kind, **payload}


# kind -> (type of the item, its parts, type of a part, delta event, key of the part's number)
_KINDS: Final[dict[str, tuple[str, str, str, str, str]]] = {
    "text": ("message", "content", "output_text", "response.output_text", "content_index"),
    "refusal": ("message", "content", "refusal", "response.refusal", "content_index"),
    "summary": (
        "reasoning",
        "summary",
        "summary_text",
        "response.reasoning_summary_text",
        "summary_index",
    ),
    "reasoning": ("reasoning", "content", "reasoning_text", "response.reasoning_text", "content_index"),
}


class _Author:
    """Draws a stream; every character it writes is a new one, so that a doubled one is seen."""

    def __init__(self, draw: st.DrawFn) -> None:
        self._draw = draw
        self._next_character = 0x4E00
        self.texts = {"text": "", "refusal": "", "summary": "", "reasoning": ""}
        self.call_ids: list[str] = []
        self.finals: list[Json] = []

    def fresh(self, count: int) -> str:
        start, self._next_character = self._next_character, self._next_character + count
        return "".join(map(chr, range(start, start + count)))

    def item(self, index: int) -> list[StreamEvent]:
        """The events of one item, in order."""
        kind = self._draw(st.sampled_from([*_KINDS, "text", "call", "server tool"]))
        if kind == "call":
            return self._call(index)
        if kind == "server tool":
            item = {"type": "openrouter:datetime", "id": f"i{index}", "status": "completed"}
            self.finals.append(item)
            return self._frame(index, item, item, [])
        return self._written(index, kind)

    def _written(self, index: int, kind: str) -> list[StreamEvent]:
        type_, list_key, part_type, name, number_key = _KINDS[kind]
        text_key = "refusal" if kind == "refusal" else "text"
        parts = []
        inner: list[StreamEvent] = []
        for number in range(self._draw(st.integers(0, 2))):
            place = {"output_index": index, "item_id": f"i{index}", number_key: number}
            pieces = [self.fresh(size) for size in self._draw(st.lists(st.integers(1, 3), max_size=3))]
            full = "".join(pieces)
            self.texts[kind] += full
            parts.append({"type": part_type, text_key: full})
            inner += [event(f"{name}.delta", **place, delta=piece) for piece in pieces]
            inner.append(event(f"{name}.done", **place, **{text_key: full}))
        final = {"type": type_, "id": f"i{index}", "status": "completed", list_key: parts}
        self.finals.append(final)
        return self._frame(index, {**final, list_key: []}, final, inner)

    def _call(self, index: int) -> list[StreamEvent]:
        call_id = f"call_{index}"
        self.call_ids.append(call_id)
        final = {
            "type": "function_call",
            "id": f"i{index}",
            "call_id": call_id,
            "name": "f",
            "arguments": '{"a": 1}',
        }
        self.finals.append(final)
        place = {"output_index": index, "item_id": f"i{index}"}
        deltas = [
            event("response.function_call_arguments.delta", **place, delta=part) for part in ('{"a"', ": 1}")
        ]
        done = event("response.function_call_arguments.done", **place, name="f", arguments='{"a": 1}')
        return self._frame(index, {**final, "arguments": ""}, final, [*deltas, done])

    @staticmethod
    def _frame(index: int, begun: Json, final: Json, inner: list[StreamEvent]) -> list[StreamEvent]:
        return [
            event("response.output_item.added", output_index=index, item=begun),
            *inner,
            event("response.output_item.done", output_index=index, item=final),
        ]


def _interleaved(draw: st.DrawFn, streams: list[list[StreamEvent]]) -> list[StreamEvent]:
    """All events, those of one item in their order."""
    turns = draw(st.permutations([number for number, one in enumerate(streams) for _ in one]))
    iterators = [iter(one) for one in streams]
    return [next(iterators[number]) for number in turns]


_ERROR: Final = {"code": "server_error", "message": "It broke"}
_OUTCOMES: Final = {
    "response.completed": "completed",
    "response.done": "completed",
    "response.incomplete": "incomplete",
    "response.failed": "failed",
    "response.error": "failed",
    "error": "failed",
    "": "failed",
}


def _terminal(kind: str, output: list[Json]) -> StreamEvent:
    usage = {"input_tokens": 3, "output_tokens": 2, "cost": 0.5}
    response: Json = {"output": output, "usage": usage}
    if kind == "response.incomplete":
        response["incomplete_details"] = {"reason": "max_output_tokens"}
    if kind == "response.failed":
        response |= {"error": _ERROR, "output": []}
    if _OUTCOMES[kind] == "failed" and kind != "response.failed":
        return {"error": _ERROR} | ({"type": kind} if kind else {})
    return event(kind, response=response)


_LIFECYCLE: Final = ("response.created", "response.queued", "response.in_progress", "response.debug")
_UNKNOWN: Final = ("response.future.delta", "response.future.done", "ping", "response.audio")


@st.composite
def stories(draw: st.DrawFn) -> Story:
    """Items in any interleaving; beginnings and ends missing; strangers between; ends that come twice."""
    author = _Author(draw)
    items = [author.item(index) for index in range(draw(st.integers(0, 4)))]
    stream = _interleaved(draw, items)
    missing = draw(st.sampled_from(["", "added", "done", "both", "deltas"]))
    names = {
        "added": ("output_item.added",),
        "done": (".done",),
        "both": ("output_item.added", ".done"),
        "deltas": (".delta",),
    }.get(missing, ())
    stream = [one for one in stream if not one.get("type", "").endswith(names or "-")]
    for kind in draw(st.lists(st.sampled_from([*_LIFECYCLE, *_UNKNOWN]), max_size=4)):
        stranger = event(kind, response={"output": []}, output_index=0, item_id="i0", delta="DOUBLED")
        stream.insert(draw(st.integers(0, len(stream))), stranger)
    stream = [same for one in stream for same in [one] * (1 + _may_double(one) * draw(st.integers(0, 1)))]
    ends = draw(st.lists(st.sampled_from(sorted(_OUTCOMES)), max_size=3))
    with_output = draw(st.booleans())
    stream += [_terminal(kind, author.finals if with_output else []) for kind in ends]
    late = draw(st.lists(st.sampled_from(stream), max_size=3)) if ends else []
    outcome = _OUTCOMES[ends[0]] if ends else "failed"
    # deltas alone do not tell the name of a call
    known = author.call_ids if outcome == "completed" and (missing != "both" or with_output) else []
    return Story([*stream, *late], author.texts, known, outcome)


def _may_double(one: StreamEvent) -> bool:
    return not one.get("type", "").endswith(".delta")


def _in_reads(draw: st.DrawFn, stream: Sequence[StreamEvent]) -> list[Emission]:
    """What events mean that came in some reads."""
    state, start = StreamState(), 0
    emissions: list[Emission] = []
    for end in [*sorted(draw(st.lists(st.integers(0, len(stream)), max_size=4))), len(stream)]:
        emissions += reduce_events(state, stream[start:end])
        start = end
    return [*emissions, *close_stream(state)]


def _characters(*texts: str) -> list[str]:
    return sorted(character for text in texts for character in text if character >= "\u4e00")


def _check(got: Got, story: Story, dialect: Dialect) -> None:
    failed = story.outcome == "failed"
    assert len(got.errors) == failed
    assert got.outcomes() == 1
    assert got.still_open == []
    assert sorted(call["call_id"] for call in got.calls) == ([] if dialect == "task" else story.call_ids)
    if failed and dialect in ("api_stream", "api_json", "task"):
        assert got.ends == []
    if failed and dialect in ("api_json", "task"):
        return
    texts = story.texts
    assert "DOUBLED" not in got.text + got.reasoning
    assert _characters(got.text) == _characters(texts["text"], texts["refusal"])
    thoughts = () if dialect == "task" else (texts["summary"], texts["reasoning"])
    assert _characters(got.reasoning) == _characters(*thoughts)
    if dialect in ("api_stream", "api_json"):
        calls = bool(got.calls)
        good = {"incomplete": "length", "completed": "tool_calls" if calls else "stop"}
        assert got.ends == ([] if failed else [good[story.outcome]])


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_story_is_told_once_in_every_dialect(data: st.DataObject) -> None:
    story = data.draw(stories())
    emissions = data.draw(st.composite(_in_reads)(story.events))
    for dialect in DIALECTS:
        _check(written(emissions, dialect), story, dialect)


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_ends_that_come_again_change_nothing(name: str, dialect: Dialect, data: st.DataObject) -> None:
    """A second terminal event, of any kind and anywhere after the first, is not heard."""
    stream = recorded_events(name)
    end = next(number for number, one in enumerate(stream) if one.get("type") in TERMINALS)
    kinds = data.draw(st.lists(st.sampled_from(sorted(_OUTCOMES)), min_size=1, max_size=3))
    again = [_terminal(kind, [{"type": "message", "content": _SECOND}]) for kind in kinds]
    before = written(meaning(stream, joined=True), dialect)
    for joined in (True, False):
        after = written(meaning([*stream[: end + 1], *again, *stream[end:]], joined=joined), dialect)
        assert comparable(after) == comparable(before)


_SECOND: Final = [{"type": "output_text", "text": "A second answer"}]


def comparable(got: Got) -> tuple[Any, ...]:
    """What was said, without what is new each time."""
    calls = [(call["call_id"], call["name"], call["arguments"]) for call in got.calls]
    text, reasoning = joined_pairs(got.text), joined_pairs(got.reasoning)
    return text, reasoning, calls, got.errors, got.ends, got.still_open
