"""The second endpoint, `/chat/completions`: its bodies, its chunks, and when it is asked instead."""

from __future__ import annotations

import asyncio
import functools
import json
import math
import re
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from referencing import Registry, Resource
from referencing.jsonschema import DRAFT202012
from test_emitters import CAN_SHOW, SEE, WITH_EVENTS, Seen, Shown
from test_request_models import (
    CHATS,
    FLAT,
    HELLO,
    PLAIN,
    PNG,
    SEEING,
    THINKING,
    TOOL,
    assistant,
    call,
    chat,
    image,
    output,
    translate,
    translate_or_refuse,
    user,
)

from openrouter_responses_pipe.openrouter_responses_pipe import (
    _CHAT_REDUCERS,
    CHAT,
    RESPONSES,
    CitationFound,
    CompletionsBody,
    Dialect,
    Emission,
    Failed,
    InputError,
    ItemClosed,
    MediaProduced,
    ModelSpec,
    Notice,
    OpenRouterClient,
    PipeError,
    ReasoningDelta,
    RefusalDelta,
    ResponsesBody,
    RetryPolicy,
    SSEDecoder,
    StatusUpdate,
    StreamingEngine,
    StreamState,
    TextDelta,
    ToolCall,
    ToolRequested,
    TurnEnded,
    UpstreamAPI,
    UpstreamRequest,
    UsageReported,
    Valves,
    _to_chat_body,
    _upstream_request,
    close_chat_stream,
    parse_frames,
    reduce_chat_chunks,
)
from openrouter_responses_pipe.simulator import Simulator
from pytest_bootstrap import HostFiles
from tests.recorded import Said, said
from tests.support import (
    EVENT_STREAM,
    GOLDEN,
    MODEL,
    PATIENCE_S,
    SOON_S,
    TRANSCRIPTS,
    Sleeps,
    arguments,
    ask,
    connection_to,
    delta,
    hostile,
    read_request,
    running_pipe,
    without_pictures,
)

Json = dict[str, Any]
NAMES: Final = sorted(name for name, entry in TRANSCRIPTS.items() if entry.get("api") == "chat")
STREAMING_PAGE: Final = Path(__file__).parents[1] / "docs" / "streaming_pipeline_and_emitters.md"
# usage of this endpoint -> its name inside, which is that of `/responses`
INSIDE: Final = {
    "prompt_tokens": "input_tokens",
    "completion_tokens": "output_tokens",
    "prompt_tokens_details": "input_tokens_details",
    "completion_tokens_details": "output_tokens_details",
}
ENDS: Final = (TurnEnded, Failed)


def expectation(name: str) -> Json:
    """What the manifest says of a recorded stream, its usage named as inside."""
    expect = dict(TRANSCRIPTS[name]["expect"])
    if "usage" in expect:
        expect["usage"] = {INSIDE.get(key, key): value for key, value in expect["usage"].items()}
    return expect


def recording(name: str) -> bytes:
    return (GOLDEN / f"{name}.sse").read_bytes()


def reduced_bytes(pieces: Iterable[bytes]) -> list[Emission]:
    """What a stream means that comes in some reads and is then closed."""
    decoder, state = SSEDecoder(), StreamState()
    emissions: list[Emission] = []
    for piece in pieces:
        emissions += reduce_chat_chunks(state, parse_frames(decoder.feed(piece)))
    emissions += reduce_chat_chunks(state, parse_frames(decoder.close()))
    return [*emissions, *close_chat_stream(state)]


def reduced(*chunks: Json) -> list[Emission]:
    """What chunks mean that come in one read, after which the connection ends."""
    state = StreamState()
    return [*reduce_chat_chunks(state, chunks), *close_chat_stream(state)]


def singly(*chunks: Json) -> list[Emission]:
    """What chunks mean that come one by one."""
    state = StreamState()
    emissions = [one for chunk in chunks for one in reduce_chat_chunks(state, [chunk])]
    return [*emissions, *close_chat_stream(state)]


def chunk(finish: str | None = None, usage: Json | None = None, **delta: Any) -> Json:
    found: Json = {
        "object": "chat.completion.chunk",
        "choices": [{"index": 0, "delta": delta, "finish_reason": finish}],
    }
    return found if usage is None else found | {"usage": usage}


STOP: Final = chunk("stop")


def closed(emissions: Iterable[Emission], kind: str) -> list[Json]:
    """The payloads of the closed items of one kind."""
    return [
        emission.payload
        for emission in emissions
        if isinstance(emission, ItemClosed) and emission.kind == kind
    ]


def calls_of(emissions: Iterable[Emission]) -> list[ToolCall]:
    return [emission.call for emission in emissions if isinstance(emission, ToolRequested)]


def kinds(emissions: Iterable[Emission]) -> list[str]:
    return [type(emission).__name__ for emission in emissions]


# Every recorded stream


def expect(found: Said, name: str) -> None:
    """Compare all that the manifest says of a stream."""
    expected = expectation(name)
    assert found.text == expected["text"]
    assert found.parts("text") == expected.get("reasoning_text", [])
    assert found.parts("summary") == []
    assert found.refusal == ""
    assert found.calls == expected.get("tool_calls", [])
    assert found.citations == expected.get("citations", [])
    assert found.images == expected.get("images", [])
    assert found.usages == ([expected["usage"]] if "usage" in expected else [])
    if expected["terminal"] == "completed":
        assert found.ends == [TurnEnded("completed")]
        assert found.errors == []
        return
    (error,) = found.errors
    assert found.ends == []
    assert error.detail == expected["error"]["message"]
    assert (error.template, error.retryable, error.status) == ("provider", True, 502)


def bytewise(name: str) -> list[bytes]:
    return [bytes([byte]) for byte in recording(name)]


@pytest.mark.parametrize("pieces", [lambda name: [recording(name)], bytewise], ids=["whole", "bytewise"])
@pytest.mark.parametrize("name", NAMES)
def test_recorded(name: str, pieces: Callable[[str], list[bytes]]) -> None:
    emissions = reduced_bytes(pieces(name))
    expect(said(emissions), name)
    assert [isinstance(emission, ENDS) for emission in emissions].index(True) == len(emissions) - 1


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_recorded_with_any_cuts(name: str, data: st.DataObject) -> None:
    raw = recording(name)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(raw)), max_size=12)))
    pieces = [raw[start:end] for start, end in zip([0, *cuts], [*cuts, len(raw)], strict=True)]
    expect(said(reduced_bytes(pieces)), name)


@pytest.mark.parametrize("name", NAMES)
def test_a_recorded_stream_that_stops_anywhere(name: str) -> None:
    """Text is only what had come, no call is given out before the end, and the end is said once."""
    raw, text = recording(name), TRANSCRIPTS[name]["expect"]["text"]
    for end in range(len(raw)):
        found = said(reduced_bytes([raw[:end]]))
        assert text.startswith(found.text)
        assert len(found.ends) + len(found.errors) == 1
        finished = b'"finish_reason":"stop"' in raw[:end] or b'"finish_reason":"tool_calls"' in raw[:end]
        assert finished or (found.ends, found.calls) == ([], [])


def test_the_signature_is_kept_with_the_reasoning_it_signs() -> None:
    (payload,) = closed(reduced_bytes([recording("c2_chat_reasoning_details")]), "reasoning")
    (detail,) = payload["reasoning_details"]
    assert detail.pop("signature").startswith("EvcBCkgIPD0")
    assert detail == {
        "type": "reasoning.text",
        "text": "Adding two.",
        "id": "r1",
        "format": "anthropic-claude-v1",
        "index": 0,
    }


# Every recorded stream over a socket


@dataclass
class Kept:
    """A sink that keeps what it is given."""

    emissions: list[Emission] = field(default_factory=list)

    async def __call__(self, emissions: Sequence[Emission]) -> None:
        self.emissions += emissions

    def said(self) -> Said:
        return said(self.emissions)

    def statuses(self) -> list[str]:
        """The lines that a person reads; not the one that ends the last."""
        statuses = [one for one in self.emissions if isinstance(one, StatusUpdate)]
        return [one.description for one in statuses if not one.hidden]


@pytest.fixture
def sleeps() -> Sleeps:
    return Sleeps()


@pytest.fixture
async def engine(sleeps: Sleeps) -> AsyncIterator[StreamingEngine]:
    client = OpenRouterClient()
    yield StreamingEngine(client, sleeps)
    await client.aclose()


ONCE: Final = RetryPolicy(attempts=0)
POLICY: Final = RetryPolicy(attempts=3, longest_wait_s=30.0)


def request_for(body: Json, spec: ModelSpec = PLAIN, **valves: Any) -> UpstreamRequest:
    """The request that a chat becomes."""
    parsed = CompletionsBody.parse(body)
    payload = ResponsesBody.from_completions(parsed, spec).payload
    return _upstream_request(payload, parsed, Valves(**valves))


def chat_request(body: Json | None = None) -> UpstreamRequest:
    """A request that goes to the second endpoint at once."""
    return request_for(body or chat(HELLO), FORCE_CHAT_COMPLETIONS_MODELS="*")


async def run(
    engine: StreamingEngine, base_url: str, request: UpstreamRequest, policy: RetryPolicy = ONCE
) -> Kept:
    """One call that ends well."""
    kept = Kept()
    async with asyncio.timeout(PATIENCE_S):
        await engine.stream(connection_to(base_url), request, kept, policy)
    return kept


async def fail(
    engine: StreamingEngine, base_url: str, request: UpstreamRequest, policy: RetryPolicy = ONCE
) -> tuple[PipeError, Kept]:
    """One call that ends in an error."""
    kept = Kept()
    async with asyncio.timeout(PATIENCE_S):
        with pytest.raises(PipeError) as caught:
            await engine.stream(connection_to(base_url), request, kept, policy)
    return caught.value, kept


def asked(simulator: Simulator) -> list[str]:
    """The endpoints that were asked for an answer, in order."""
    return [record.path.removeprefix("/api/v1") for record in simulator.requests if record.method == "POST"]


def bodies(simulator: Simulator) -> list[Json]:
    return [record.body for record in simulator.requests if record.method == "POST"]


@pytest.mark.parametrize("params", [{}, {"bytes": 1}], ids=["whole", "bytewise"])
@pytest.mark.parametrize("name", NAMES)
async def test_recorded_over_a_socket(
    name: str, params: Json, engine: StreamingEngine, simulator: Simulator
) -> None:
    simulator.next("golden", name=name, **params)
    if TRANSCRIPTS[name]["expect"]["terminal"] == "completed":
        kept = await run(engine, simulator.base_url, chat_request())
    else:
        error, kept = await fail(engine, simulator.base_url, chat_request())
        kept.emissions.append(Failed(error))
    expect(kept.said(), name)
    assert asked(simulator) == ["/chat/completions"]


async def test_an_answer_ends_although_the_connection_does_not(
    engine: StreamingEngine, simulator: Simulator
) -> None:
    simulator.next("plain", text="all said", hang=9_999)
    async with asyncio.timeout(SOON_S):
        kept = await run(engine, simulator.base_url, chat_request())
    assert kept.said().text == "all said"
    await simulator.wait_until(lambda sim: sim.open == 0, timeout=SOON_S)


async def test_an_answer_without_usage_ends_with_the_connection(
    engine: StreamingEngine, simulator: Simulator
) -> None:
    simulator.next("replay", body=as_stream(TEXT, STOP))
    kept = await run(engine, simulator.base_url, chat_request())
    assert (kept.said().text, kept.said().ends) == ("t", [TurnEnded("completed")])
    simulator.next("replay", body=as_stream(TEXT))
    error, kept = await fail(engine, simulator.base_url, chat_request(), POLICY)
    assert (kept.said().text, error.template) == ("t", "broken")


async def test_a_connection_is_used_again(engine: StreamingEngine, simulator: Simulator) -> None:
    for scenario in ("plain", "reasoning", "incomplete", "burst", "plain"):
        simulator.next(scenario)
        await run(engine, simulator.base_url, chat_request())
    assert {record.connection for record in simulator.requests} == {1}


# what the simulator says -> what is made of it
SCENARIOS: Final[dict[str, tuple[Json, Callable[[Said], Any], Any]]] = {
    "plain": ({"text": "fine"}, lambda found: found.text, "fine"),
    "incomplete": ({}, lambda found: found.ends, [TurnEnded("incomplete", "max_output_tokens")]),
    "content_filter": ({}, lambda found: found.ends, [TurnEnded("incomplete", "content_filter")]),
    "empty": ({}, lambda found: (found.text, found.ends), ("", [TurnEnded("completed")])),
    "tool": ({}, lambda found: [call["name"] for call in found.calls], ["get_weather"]),
    "tools": ({}, lambda found: [call["name"] for call in found.calls], ["get_weather"] * 2),
    "burst": ({"tokens": 3}, lambda found: found.text, "word0 word1 word2 "),
}


@pytest.mark.parametrize("scenario", sorted(SCENARIOS))
async def test_what_the_simulator_says(scenario: str, engine: StreamingEngine, simulator: Simulator) -> None:
    params, read, expected = SCENARIOS[scenario]
    simulator.next(scenario, **params)
    found = (await run(engine, simulator.base_url, chat_request())).said()
    assert read(found) == expected
    (usage,) = found.usages
    assert usage["input_tokens"] > 0
    assert "prompt_tokens" not in usage


# Every recorded stream in every dialect


async def show(base_url: str, dialect: str) -> Shown:
    """What a client, and the page beside it, get of an answer from the second endpoint."""
    given_by_host = arguments("hello", dialect)
    shown = Shown(events=given_by_host["__event_emitter__"])
    async with (
        running_pipe(base_url, FORCE_CHAT_COMPLETIONS_MODELS=MODEL) as pipe,
        asyncio.timeout(PATIENCE_S),
    ):
        result = await pipe.pipe(**given_by_host)
        if isinstance(result, dict):
            shown.result = result
        else:
            shown.chunks += [chunk async for chunk in result]
    return shown


ERRORS: Final = {
    "c4_chat_midstream_error": "Provider disconnected unexpectedly.",
    "c6_chat_error_first_chunk": "Upstream worker limit reached.",
}


def expected_of(name: str, dialect: str) -> Seen:
    """What the manifest promises of a stream, as far as this dialect has a place for it."""
    expected, keeps = TRANSCRIPTS[name]["expect"], CAN_SHOW[dialect][1]
    error = ""
    if name in ERRORS:
        advice = "Please try again, or choose another model."
        error = f"The model's provider reported an error. {ERRORS[name]} {advice}"
    if error and not keeps:
        return Seen(error=error)
    usage = expectation(name).get("usage") if dialect in WITH_EVENTS else expected.get("usage")
    calls = expected.get("tool_calls", [])
    finish = "tool_calls" if calls else "stop"
    return Seen(
        text=expected["text"],
        reasoning="\n\n".join(expected.get("reasoning_text", [])),
        calls=calls,
        usage=usage,
        citations=expected.get("citations", []),
        finish=None if error else finish,
        error=error,
    )


@pytest.mark.parametrize("dialect", sorted(CAN_SHOW))
@pytest.mark.parametrize("name", NAMES)
async def test_recorded_in_every_dialect(
    name: str, dialect: Dialect, simulator: Simulator, files: HostFiles
) -> None:
    simulator.next("golden", name=name, tasks=True)
    shown = await show(simulator.base_url, dialect)
    seen, expected = SEE[dialect](shown), expected_of(name, dialect)
    seen.text, pictures = without_pictures(seen.text)
    assert len(pictures) == (0 if dialect == "task" else len(TRANSCRIPTS[name]["expect"].get("images", ())))
    seen.error = re.sub(r" \(Error [0-9a-f]{8}\)$", "", seen.error)
    for key in ("error", *CAN_SHOW[dialect][0]):
        assert getattr(seen, key) == getattr(expected, key), key
    assert shown.events.of("notification") == []
    assert asked(simulator) == ["/chat/completions"]


# Reasoning


def detail(kind: str = "text", **more: Any) -> Json:
    return {"type": f"reasoning.{kind}", **more}


# deltas -> the reasoning that is shown, and the details that are kept
REASONING: Final[dict[str, tuple[list[Json], str, list[Json]]]] = {
    "without details": ([{"reasoning": "a"}, {"reasoning": "b"}], "ab", []),
    "said twice": (
        [
            {"reasoning": "a", "reasoning_details": [detail(text="a", index=0)]},
            {"reasoning": "b", "reasoning_details": [detail(text="b", index=0)]},
        ],
        "ab",
        [detail(text="ab", index=0)],
    ),
    "details alone": (
        [
            {"reasoning_details": [detail(text="a", index=0)]},
            {"reasoning_details": [detail(text="b", index=0)]},
        ],
        "ab",
        [detail(text="ab", index=0)],
    ),
    "an empty string beside them": (
        [{"reasoning": "", "reasoning_details": [detail(text="a", index=0)]}],
        "a",
        [detail(text="a", index=0)],
    ),
    "summaries": (
        [
            {"reasoning_details": [detail("summary", summary="a", index=0)]},
            {"reasoning_details": [detail("summary", summary="b", index=0)]},
        ],
        "ab",
        [detail("summary", summary="ab", index=0)],
    ),
    "a signature alone": (
        [
            {"reasoning_details": [detail(text="a", signature=None, id="r", format="f", index=0)]},
            {"reasoning_details": [detail(text=None, signature="s", id="r", format="f", index=0)]},
        ],
        "a",
        [detail(text="a", signature="s", id="r", format="f", index=0)],
    ),
    "only sealed": (
        [{"reasoning_details": [detail("encrypted", data="x", index=0)]}],
        "",
        [detail("encrypted", data="x", index=0)],
    ),
    "fragments by index": (
        [
            {
                "reasoning": "ac",
                "reasoning_details": [detail(text="a", index=0), detail("encrypted", data="c", index=1)],
            },
            {
                "reasoning": "b",
                "reasoning_details": [detail("encrypted", data="d", index=1), detail(text="b", index=0)],
            },
        ],
        "acb",
        [detail(text="ab", index=0), detail("encrypted", data="cd", index=1)],
    ),
    "kinds of one index": (
        [
            {"reasoning": "a", "reasoning_details": [detail(text="a", index=0)]},
            {"reasoning_details": [detail("encrypted", data="x", index=0)]},
        ],
        "a",
        [detail(text="a", index=0), detail("encrypted", data="x", index=0)],
    ),
    "what is no fragment": ([{"reasoning": "a", "reasoning_details": [5, None, "x"]}], "a", []),
    "no list": ([{"reasoning": "a", "reasoning_details": 5}], "a", []),
    "a tool of the provider": (
        [{"reasoning_details": [detail("server_tool_call", name="n", arguments="{}", index=0)]}],
        "",
        [detail("server_tool_call", name="n", arguments="{}", index=0)],
    ),
}


@pytest.mark.parametrize("case", sorted(REASONING))
def test_reasoning(case: str) -> None:
    deltas, shown, kept = REASONING[case]
    chunks = [*(chunk(**delta) for delta in deltas), chunk(content="t"), STOP]
    for emissions in (reduced(*chunks), singly(*chunks)):
        assert "".join(said(emissions).parts("text")) == shown
        (payload,) = closed(emissions, "reasoning")
        assert payload.get("reasoning_details", []) == kept
        assert said(emissions).text == "t"


@pytest.mark.parametrize(
    ("follows", "kind"),
    [
        ({"content": "t"}, "TextDelta"),
        ({"refusal": "no"}, "RefusalDelta"),
        ({"tool_calls": [{"index": 0, "id": "c", "function": {"name": "f", "arguments": "{}"}}]}, None),
    ],
)
def test_the_answer_ends_the_reasoning(follows: Json, kind: str | None) -> None:
    state = StreamState()
    reduce_chat_chunks(state, [chunk(reasoning="hm")])
    emissions = reduce_chat_chunks(state, [chunk(**follows)])
    assert kinds(emissions) == ["ItemClosed", *([kind] if kind else [])]
    assert closed(emissions, "reasoning")


def test_a_model_that_thinks_again() -> None:
    chunks = [chunk(reasoning="a"), chunk(content="b"), chunk(reasoning="c"), chunk(content="d"), STOP]
    emissions = reduced(*chunks)
    assert said(emissions).parts("text") == ["a", "c"]
    assert said(emissions).text == "bd"
    assert len(closed(emissions, "reasoning")) == 2


def test_reasoning_that_comes_with_the_text_stands_before_it() -> None:
    emissions = reduced(chunk(content="t", reasoning="hm"), STOP)
    assert kinds(emissions) == ["ReasoningDelta", "ItemClosed", "TextDelta", "ItemClosed", "TurnEnded"]


def test_a_signature_that_comes_after_the_text() -> None:
    """It belongs to what was thought before; nobody is shown a second, empty thought."""
    emissions = reduced(
        chunk(reasoning="r", reasoning_details=[detail(text="r", index=0)]),
        chunk(content="t"),
        chunk(reasoning_details=[detail(signature="s", index=0)]),
        STOP,
    )
    assert said(emissions).parts("text") == ["r"]
    (payload,) = closed(emissions, "reasoning")
    assert payload["reasoning_details"] == [detail(text="r", index=0, signature="s")]


def test_a_long_thought_takes_linear_time() -> None:
    """40 MB in 2,000 fragments; copied anew with each of them it would be 40 GB."""
    text = "x" * 20_000
    one = chunk(reasoning=text, reasoning_details=[detail(text=text, index=0)])
    state, began = StreamState(), time.process_time()
    for _ in range(2_000):
        reduce_chat_chunks(state, [one])
    emissions = reduce_chat_chunks(state, [chunk("stop", USAGE)])
    assert time.process_time() - began < 2.0
    (payload,) = closed(emissions, "reasoning")
    assert payload["reasoning_details"] == [detail(text=text * 2_000, index=0)]


def test_a_thought_in_many_details_takes_linear_time() -> None:
    """Some providers give every fragment an index of its own."""

    def seconds_for(count: int) -> float:
        state, began = StreamState(), time.process_time()
        for number in range(count):
            fragments = [detail(text="x ", index=number)]
            reduce_chat_chunks(state, [chunk(reasoning="x ", reasoning_details=fragments)])
        emissions = reduce_chat_chunks(state, [chunk("stop", USAGE)])
        seconds = time.process_time() - began
        (payload,) = closed(emissions, "reasoning")
        assert len(payload["reasoning_details"]) == count
        return seconds

    short, long = (min(seconds_for(count) for _ in range(2)) for count in (1_000, 8_000))
    assert long < 24 * short, f"8 times the fragments took {long / short:.0f} times as long"


# Calls


def fragment(index: Any = ..., call_id: Any = None, name: Any = None, text: Any = None) -> Json:
    function = {key: value for key, value in (("name", name), ("arguments", text)) if value is not None}
    found: Json = {"type": "function", "function": function}
    if index is not ...:
        found["index"] = index
    return found | ({"id": call_id} if call_id is not None else {})


A: Final = ToolCall("a", "f", '{"n":1}')
B: Final = ToolCall("b", "g", '{"n":2}')
WHOLE: Final = {"a": ("a", "f", '{"n":1}'), "b": ("b", "g", '{"n":2}')}
# the fragments of each chunk -> the calls
CALLS: Final[dict[str, tuple[list[list[Any]], list[ToolCall]]]] = {
    "whole": ([[fragment(0, "a", "f", '{"n":1}')]], [A]),
    "in pieces": ([[fragment(0, "a", "f", "")], [fragment(0, text='{"n"')], [fragment(0, text=":1}")]], [A]),
    "interleaved": (
        [
            [fragment(0, "a", "f", '{"n"'), fragment(1, "b", "g")],
            [fragment(1, text='{"n":2')],
            [fragment(0, text=":1}"), fragment(1, text="}")],
        ],
        [A, B],
    ),
    "the second first": ([[fragment(1, *WHOLE["b"])], [fragment(0, *WHOLE["a"])]], [B, A]),
    "id and name again": ([[fragment(0, "a", "f", '{"n":')], [fragment(0, "a", "f", "1}")]], [A]),
    "id and name empty": ([[fragment(0, "a", "f", '{"n":')], [fragment(0, "", "", "1}")]], [A]),
    "name after the arguments": ([[fragment(0, "a", text='{"n":1}')], [fragment(0, name="f")]], [A]),
    "no arguments": ([[fragment(0, "a", "f")]], [ToolCall("a", "f", "{}")]),
    "empty arguments": ([[fragment(0, "a", "f", "")]], [ToolCall("a", "f", "{}")]),
    "no name": ([[fragment(0, "a", None, "{}")]], []),
    "no index, one chunk": ([[fragment(..., *WHOLE["a"]), fragment(..., *WHOLE["b"])]], [A, B]),
    "no index, a chunk each": ([[fragment(..., *WHOLE["a"])], [fragment(..., *WHOLE["b"])]], [A, B]),
    "no index, in pieces": (
        [[fragment(..., "a", "f", '{"n":')], [fragment(..., text="1}")], [fragment(..., *WHOLE["b"])]],
        [A, B],
    ),
    "index null": ([[fragment(None, *WHOLE["a"]), fragment(None, *WHOLE["b"])]], [A, B]),
    "one index for all": ([[fragment(0, *WHOLE["a"])], [fragment(0, *WHOLE["b"])]], [A, B]),
    "one index for all, one chunk": ([[fragment(0, *WHOLE["a"]), fragment(0, *WHOLE["b"])]], [A, B]),
    "what is no fragment": ([[5, None, "x", fragment(0, *WHOLE["a"])]], [A]),
    "no function": ([[{"index": 0, "id": "a"}], [fragment(1, *WHOLE["b"])]], [B]),
}


@pytest.mark.parametrize("finish", ["tool_calls", "stop"])
@pytest.mark.parametrize("case", sorted(CALLS))
def test_calls(case: str, finish: str) -> None:
    """Some providers end a call with `stop`: what was collected counts, whatever they say."""
    fragments, expected = CALLS[case]
    chunks = [*(chunk(tool_calls=some) for some in fragments), chunk(finish)]
    for emissions in (reduced(*chunks), singly(*chunks)):
        assert calls_of(emissions) == expected
        assert emissions[-1] == TurnEnded("completed")


@pytest.mark.parametrize("tool_calls", [5, "x", {"index": 0}, True, [[]]])
def test_calls_that_are_none(tool_calls: Any) -> None:
    assert reduced(chunk(tool_calls=tool_calls), STOP)[-1:] == [TurnEnded("completed")]
    assert calls_of(reduced(chunk(tool_calls=tool_calls), STOP)) == []


def test_a_call_without_id_gets_one_that_providers_take() -> None:
    made = calls_of(reduced(chunk(tool_calls=[fragment(0, None, "f"), fragment(1, None, "g")]), STOP))
    ids = [call.call_id for call in made]
    assert len(set(ids)) == len(ids) == 2
    assert all(re.fullmatch(r"[A-Za-z0-9_-]{1,64}", call_id) for call_id in ids)


def test_calls_without_index_and_id() -> None:
    chunks = [chunk(tool_calls=[fragment(..., None, name, '{"n":1}')]) for name in "fg"]
    made = calls_of(reduced(*chunks, STOP))
    assert [(call.name, call.arguments) for call in made] == [("f", '{"n":1}'), ("g", '{"n":1}')]
    assert len({call.call_id for call in made}) == 2


def test_an_id_that_changes_between_fragments() -> None:
    fragments = [fragment(0, "a", "f", '{"n"'), fragment(0, "x", text=":1"), fragment(0, "y", text="}")]
    (made,) = calls_of(reduced(*(chunk(tool_calls=[one]) for one in fragments), STOP))
    assert (made.name, made.arguments) == ("f", '{"n":1}')


def test_no_call_before_the_end() -> None:
    state = StreamState()
    emissions = reduce_chat_chunks(state, [chunk(tool_calls=[fragment(0, *WHOLE["a"])])])
    assert emissions == []
    assert calls_of(close_chat_stream(state)) == []


@pytest.mark.parametrize("dialect", ["browser", "api_stream", "api_json"])
async def test_a_call_that_was_cut_short_is_not_run(dialect: Dialect, simulator: Simulator) -> None:
    chunks = [chunk(tool_calls=[fragment(0, "a", "f", '{"n":')]), chunk("length", {"prompt_tokens": 1})]
    simulator.next("replay", body=as_stream(*chunks))
    seen = SEE[dialect](await show(simulator.base_url, dialect))
    assert (seen.calls, seen.error) == ([], "")
    assert seen.usage


def as_stream(*chunks: Any) -> str:
    """Chunks as they travel."""
    return "".join(f"data: {json.dumps(one)}\n\n" for one in chunks)


# Pictures and sources


@pytest.mark.parametrize(
    ("images", "sources"),
    [
        ([{"type": "image_url", "image_url": {"url": PNG}}], [PNG]),
        ([{"image_url": {"url": PNG}}, {"image_url": {"url": "https://a.example/x.png"}}], None),
        ([{"image_url": {"url": ""}}, {"image_url": {}}, {}, 5, {"image_url": 5}], []),
        (5, []),
        (True, []),
        ("x", []),
        ({"image_url": {"url": PNG}}, []),
    ],
)
def test_pictures(images: Any, sources: list[str] | None) -> None:
    wanted = [PNG, "https://a.example/x.png"] if sources is None else sources
    emissions = reduced(chunk(images=images), STOP)
    assert [one.source for one in emissions if isinstance(one, MediaProduced)] == wanted
    assert emissions[-1] == TurnEnded("completed")


def cited(url: Any, **more: Any) -> Json:
    return {"type": "url_citation", "url_citation": {"url": url, **more}}


@pytest.mark.parametrize(
    ("annotations", "found"),
    [
        (
            [cited("https://a.example/x", title="T", content="c")],
            [CitationFound("https://a.example/x", "T", "c")],
        ),
        ([cited("https://a.example/x")], [CitationFound("https://a.example/x", "a.example", "")]),
        ([cited("https://a.example/x"), cited("https://a.example/x")], None),
        ([cited(""), cited(None), cited(5), {"type": "url_citation"}, 5, {}], []),
        ([{"type": "file", "file": {"hash": "h"}}], []),
        (5, []),
        (True, []),
        ("x", []),
    ],
)
def test_sources(annotations: Any, found: list[CitationFound] | None) -> None:
    wanted = [CitationFound("https://a.example/x", "a.example", "")] if found is None else found
    emissions = reduced(chunk(annotations=annotations), chunk(annotations=annotations), STOP)
    assert [one for one in emissions if isinstance(one, CitationFound)] == wanted
    assert emissions[-1] == TurnEnded("completed")


# Ends


USAGE: Final[Json] = {
    "prompt_tokens": 3,
    "completion_tokens": 2,
    "total_tokens": 5,
    "cost": 0.5,
    "prompt_tokens_details": {"cached_tokens": 1},
    "completion_tokens_details": {"reasoning_tokens": 1},
}
COUNTED: Final[Json] = {
    "input_tokens": 3,
    "output_tokens": 2,
    "total_tokens": 5,
    "cost": 0.5,
    "input_tokens_details": {"cached_tokens": 1},
    "output_tokens_details": {"reasoning_tokens": 1},
}
TEXT: Final = chunk(content="t")
AFTER: Final[Json] = {"choices": [], "usage": USAGE}
# chunks -> the usages that are reported
USAGES: Final[dict[str, tuple[list[Json], list[Json]]]] = {
    "with the finish": ([TEXT, chunk("stop", USAGE)], [COUNTED]),
    "after the finish": ([TEXT, STOP, AFTER], [COUNTED]),
    "after the finish, twice": ([TEXT, STOP, AFTER, AFTER], [COUNTED]),
    "with the finish and after": ([TEXT, chunk("stop", USAGE), AFTER], [COUNTED]),
    "before the finish": ([TEXT, AFTER, STOP], [COUNTED]),
    "growing": ([chunk(content="t", usage={"prompt_tokens": 3}), STOP, AFTER], [COUNTED]),
    "null at first": ([TEXT | {"usage": None}, STOP | {"usage": None}, AFTER], [COUNTED]),
    "in a chunk that has no choices": ([TEXT, STOP, {"usage": USAGE}], [COUNTED]),
    "never": ([TEXT, STOP], []),
    "no object": ([TEXT, STOP | {"usage": 5}], []),
}


@pytest.mark.parametrize("case", sorted(USAGES))
def test_usage(case: str) -> None:
    chunks, reported = USAGES[case]
    for emissions in (reduced(*chunks), singly(*chunks)):
        assert [one.usage for one in emissions if isinstance(one, UsageReported)] == reported
        assert said(emissions).text == "t"
        assert emissions[-1] == TurnEnded("completed")


def test_the_end_is_not_waited_for_once_finish_and_usage_are_known() -> None:
    for last in ([chunk("stop", USAGE)], [STOP, AFTER]):
        state = StreamState()
        emissions = reduce_chat_chunks(state, [TEXT, *last])
        assert emissions[-1] == TurnEnded("completed")
        assert state.ended
        assert close_chat_stream(state) == []


@pytest.mark.parametrize("chunks", [[], [TEXT], [AFTER], [TEXT, AFTER], [chunk(reasoning="r")]])
def test_a_stream_without_finish_broke_off(chunks: list[Json]) -> None:
    (error,) = said(reduced(*chunks)).errors
    assert (error.template, error.retryable) == ("broken", True)
    assert said(reduced(*chunks)).ends == []


@pytest.mark.parametrize(
    ("finish", "end"),
    [
        ("stop", TurnEnded("completed")),
        ("tool_calls", TurnEnded("completed")),
        ("length", TurnEnded("incomplete", "max_output_tokens")),
        ("content_filter", TurnEnded("incomplete", "content_filter")),
        ("something new", TurnEnded("completed")),
    ],
)
def test_finish_reasons(finish: str, end: TurnEnded) -> None:
    for last in ([chunk(finish)], [chunk(finish, USAGE)], [chunk(finish), AFTER]):
        assert reduced(TEXT, *last)[-1] == end


def test_nothing_counts_after_the_end() -> None:
    state = StreamState()
    reduce_chat_chunks(state, [TEXT, STOP, AFTER])
    late = [TEXT, STOP, AFTER, {"error": {"message": "late"}}]
    assert reduce_chat_chunks(state, late) == []
    assert kinds(close_chat_stream(state)) == []


def failing(message: Any = "Lost", *, code: Any = 502, choices: Any = (), **metadata: Any) -> Json:
    error: Json = {"code": code, "message": message} | ({"metadata": metadata} if metadata else {})
    return {"choices": list(choices), "error": error}


# the failing chunk -> (words, template, whether another try may help)
FAILURES: Final[dict[str, tuple[Json, tuple[str, str, bool]]]] = {
    "by status": (failing(), ("Lost", "provider", True)),
    "by type": (failing(error_type="authentication"), ("Lost", "authentication", False)),
    "rate limit": (failing(code=429), ("Lost", "rate_limit", True)),
    "final": (failing(code=400), ("Lost", "refused", False)),
    "with the provider's words": (
        failing("Provider returned error", raw='{"error":{"message":"Too hot"}}'),
        ("Too hot", "provider", True),
    ),
    "with choices": (
        {**STOP, "choices": [{"index": 0, "delta": {"content": ""}, "finish_reason": "error"}]}
        | {"error": {"code": 502, "message": "Lost"}},
        ("Lost", "provider", True),
    ),
    "without choices": ({"error": {"code": 502, "message": "Lost"}}, ("Lost", "provider", True)),
    "in a word": ({"error": "Lost"}, ("Lost", "provider", False)),
    "code as text": (failing(code="rate_limit_exceeded"), ("Lost", "rate_limit", True)),
    "status as text": (failing(code="429"), ("Lost", "rate_limit", True)),
    "limit of the day": (
        failing("Rate limit exceeded: free-models-per-day", code=429),
        ("Rate limit exceeded: free-models-per-day", "daily_limit", False),
    ),
    "no words": ({"error": {"code": 502}}, ("", "provider", True)),
    "finish only": (chunk("error"), ("", "provider", False)),
}


@pytest.mark.parametrize("before", [[], [TEXT], [TEXT, STOP], [chunk(reasoning="r")]])
@pytest.mark.parametrize("case", sorted(FAILURES))
def test_failures(case: str, before: list[Json]) -> None:
    broken, expected = FAILURES[case]
    found = said(reduced(*before, broken, TEXT, STOP) if case != "finish only" else reduced(*before, broken))
    (error,) = found.errors
    assert (error.detail, error.template, error.retryable) == expected
    assert found.ends == []
    assert found.text == ("t" if TEXT in before else "")
    assert error.user_message.endswith(".")


@pytest.mark.parametrize("error", [None, {}, "", False])
def test_an_empty_error_is_none(error: Any) -> None:
    assert reduced(TEXT | {"error": error}, STOP | {"error": error})[-1] == TurnEnded("completed")


def test_text_that_comes_with_a_failure_is_kept() -> None:
    last = chunk("error", content="tial") | {"error": {"code": 502, "message": "Lost"}}
    found = said(reduced(chunk(content="par"), last))
    assert found.text == "partial"
    assert [error.detail for error in found.errors] == ["Lost"]


def test_usage_before_a_failure_is_reported() -> None:
    last = failing() | {"usage": USAGE}
    found = said(reduced(TEXT, last))
    assert found.usages == [COUNTED]
    assert [error.detail for error in found.errors] == ["Lost"]


# Odd chunks


@pytest.mark.parametrize(
    "odd",
    [
        {},
        {"choices": None},
        {"choices": []},
        {"choices": 5},
        {"choices": [5]},
        {"choices": [None]},
        {"choices": [{}]},
        {"choices": [{"delta": None}]},
        {"choices": [{"delta": 5}]},
        {"choices": [{"delta": {"content": None}}]},
        {"choices": [{"delta": {"content": 5}}]},
        {"choices": [{"delta": {"content": ["x"]}}]},
        {"choices": [{"delta": {"role": "assistant", "new": {"a": 1}, "audio": {"data": "x"}}}]},
        {"choices": [{"delta": {}, "finish_reason": None, "logprobs": None, "new": 1}], "new": [1]},
        {"debug": {"echo_upstream_body": {}}, "choices": []},
        {"id": "x", "type": "response.completed", "response": {"output": []}},
        chunk(reasoning=5, refusal=5),
    ],
)
def test_odd_chunks_say_nothing(odd: Json) -> None:
    emissions = reduced(odd, TEXT, odd, TEXT, odd, STOP, odd, AFTER)
    found = said(emissions)
    assert (found.text, found.refusal) == ("tt", "")
    assert found.parts("text") == []
    assert found.usages == [COUNTED]
    assert found.ends == [TurnEnded("completed")]


@pytest.mark.parametrize("data", ["5", "[]", '"x"', "null", "{broken", "[DONE]", ""])
def test_what_is_no_object_says_nothing(data: str) -> None:
    odd = f"data: {data}\n\n"
    found = said(reduced_bytes([f"{odd}{as_stream(TEXT)}{odd}{as_stream(STOP)}{odd}".encode()]))
    assert (found.text, found.ends, found.errors) == ("t", [TurnEnded("completed")], [])


def test_a_whole_message_in_one_chunk() -> None:
    message = {"role": "assistant", "content": "t", "tool_calls": [fragment(..., *WHOLE["a"])]}
    emissions = reduced({"choices": [{"message": message, "finish_reason": "stop"}], "usage": USAGE})
    assert said(emissions).text == "t"
    assert calls_of(emissions) == [A]
    assert emissions[-1] == TurnEnded("completed")


LAST_MESSAGES: Final[dict[str, tuple[Json, Json]]] = {
    "text": ({"content": "t"}, {"content": "t"}),
    "refusal": ({"refusal": "no"}, {"refusal": "no"}),
    "reasoning": ({"reasoning": "r"}, {"reasoning": "r", "content": ""}),
    "details": (
        {"reasoning": "r", "reasoning_details": [detail(text="r", index=0)]},
        {"reasoning": "r", "reasoning_details": [detail(text="r", index=0)]},
    ),
    "calls": (
        {"tool_calls": [fragment(0, *WHOLE["a"])]},
        {"tool_calls": [fragment(..., *WHOLE["a"])]},
    ),
    "pictures": ({"images": [{"image_url": {"url": PNG}}]}, {"images": [{"image_url": {"url": PNG}}]}),
    "all at once": (
        {"content": "t", "reasoning": "r", "tool_calls": [fragment(0, *WHOLE["a"])]},
        {"content": "t", "reasoning": "r", "tool_calls": [fragment(0, *WHOLE["a"])]},
    ),
}


@pytest.mark.parametrize("empty", [{}, {"delta": None}, {"delta": {}}], ids=str)
@pytest.mark.parametrize("case", sorted(LAST_MESSAGES))
def test_a_last_chunk_that_says_everything_again_adds_nothing(case: str, empty: Json) -> None:
    delta, message = LAST_MESSAGES[case]
    last = {"choices": [{"index": 0, **empty, "message": message, "finish_reason": "stop"}]}
    for reduce in (reduced, singly):
        assert reduce(chunk(**delta), last) == reduce(chunk(**delta), STOP)


def test_a_pair_that_is_split_between_two_fragments_of_a_call() -> None:
    chunks = [
        chunk(tool_calls=[fragment(0, "a", "f", '{"q":"\ud83d')]),
        chunk(tool_calls=[fragment(0, text='\ude00"}')]),
        STOP,
    ]
    for emissions in (reduced(*chunks), singly(*chunks)):
        (call,) = calls_of(emissions)
        assert ascii(call.arguments) == ascii('{"q":"\N{GRINNING FACE}"}')


def test_a_refusal() -> None:
    found = said(reduced(chunk(refusal="I "), chunk(refusal="won't."), STOP))
    assert (found.refusal, found.text) == ("I won't.", "")


# Any chunks

SCALARS: Final = st.none() | st.booleans() | st.integers(-2, 3) | st.text(max_size=3)
JSON: Final = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
DETAIL: Final = st.fixed_dictionaries(
    {},
    optional={
        "type": st.sampled_from(["reasoning.text", "reasoning.summary", "reasoning.encrypted"]) | JSON,
        "index": st.integers(0, 1) | JSON,
        **dict.fromkeys(("text", "summary", "data", "signature"), st.text(max_size=3) | JSON),
    },
)
FRAGMENT: Final = st.fixed_dictionaries(
    {},
    optional={
        "index": st.integers(0, 2) | JSON,
        "id": st.sampled_from(["a", "b"]) | JSON,
        "function": st.fixed_dictionaries(
            {}, optional={"name": st.sampled_from(["f", ""]) | JSON, "arguments": st.text(max_size=3) | JSON}
        )
        | JSON,
    },
)
DELTA: Final = st.fixed_dictionaries(
    {},
    optional={
        "content": st.text(max_size=3) | JSON,
        "reasoning": st.text(max_size=3) | JSON,
        "refusal": st.text(max_size=3) | JSON,
        "reasoning_details": st.lists(DETAIL | JSON, max_size=3) | JSON,
        "tool_calls": st.lists(FRAGMENT | JSON, max_size=3) | JSON,
        "images": st.lists(st.fixed_dictionaries({"image_url": JSON}), max_size=2) | JSON,
        "annotations": st.lists(st.fixed_dictionaries({"url_citation": JSON}), max_size=2) | JSON,
        "new": JSON,
    },
)
FINISH: Final = st.sampled_from([None, None, "stop", "length", "tool_calls", "error"]) | JSON
CHOICE: Final = st.fixed_dictionaries({}, optional={"delta": DELTA | JSON, "finish_reason": FINISH})
CHUNK: Final = st.fixed_dictionaries(
    {},
    optional={
        "choices": st.lists(CHOICE | JSON, max_size=2) | JSON,
        "usage": st.just(USAGE) | JSON,
        "error": st.none() | JSON,
    },
)


def _without_deltas(emissions: Iterable[Emission]) -> list[str]:
    return kinds(one for one in emissions if not isinstance(one, TextDelta | ReasoningDelta | RefusalDelta))


def _texts(emissions: Iterable[Emission]) -> dict[tuple[str, int], str]:
    found: dict[tuple[str, int], str] = {}
    for one in emissions:
        if isinstance(one, TextDelta | ReasoningDelta | RefusalDelta):
            place = (type(one).__name__, one.item)
            found[place] = found.get(place, "") + one.text
    return found


@settings(max_examples=400, deadline=None)
@given(chunks=st.lists(CHUNK, max_size=8))
def test_no_chunks_raise_and_every_stream_ends_once(chunks: list[Json]) -> None:
    before = json.dumps(chunks)
    whole, single = reduced(*chunks), singly(*chunks)
    for emissions in (whole, single):
        assert [isinstance(one, ENDS) for one in emissions].count(True) == 1
        assert isinstance(emissions[-1], ENDS)
    assert _texts(whole) == _texts(single)
    assert _without_deltas(whole) == _without_deltas(single)
    assert json.dumps(chunks) == before, "the chunks are left alone"


SAID: Final = st.sampled_from(
    [
        chunk(content="a"),
        chunk(content="bc", reasoning="x"),
        chunk(content=None),
        chunk(content=""),
        chunk(reasoning="y"),
        chunk(reasoning="z", reasoning_details=[detail(text="z", index=0)]),
        chunk(reasoning_details=[detail(text="w", index=0)]),
        chunk(tool_calls=[fragment(0, "a", "f", "{}")]),
        chunk(refusal="no"),
        {"choices": []},
        AFTER,
        STOP,
        chunk("length", content="d"),
        failing(),
    ]
)


@settings(max_examples=300, deadline=None)
@given(chunks=st.lists(SAID, max_size=12))
def test_no_text_is_lost_or_doubled(chunks: list[Json]) -> None:
    """All text up to the end, in its order, and nothing else."""
    state = StreamState()
    text = thought = ""
    emissions: list[Emission] = []
    for one in chunks:
        if not state.ended and one["choices"]:
            delta = one["choices"][0]["delta"]
            text += delta.get("content") or ""
            details = delta.get("reasoning_details", ())
            thought += delta.get("reasoning") or "".join(part["text"] for part in details)
        emissions += reduce_chat_chunks(state, [one])
    emissions += close_chat_stream(state)
    assert "".join(one.text for one in emissions if isinstance(one, TextDelta)) == text
    assert "".join(one.text for one in emissions if isinstance(one, ReasoningDelta)) == thought


# The body


@functools.cache
def validator() -> Draft202012Validator:
    """OpenRouter's own description of a request to this endpoint."""
    data = Path(__file__).parent / "data" / "openrouter" / "openapi.trimmed.json"
    resource = Resource.from_contents(json.loads(data.read_text("utf-8")), default_specification=DRAFT202012)
    registry = Registry().with_resource("urn:d", resource)
    return Draft202012Validator({"$ref": "urn:d#/components/schemas/ChatRequest"}, registry=registry)


def chat_body(body: Json, spec: ModelSpec = PLAIN) -> Json:
    """What a chat becomes for this endpoint; it is valid."""
    parsed = CompletionsBody.parse(body)
    found = _to_chat_body(translate(body, spec).payload, parsed.parameters)
    validator().validate(found)
    return found


def system(text: str, role: str = "system") -> Json:
    return {"role": role, "content": text}


def sent_image(url: str = PNG, detail: str = "auto") -> Json:
    return {"type": "image_url", "image_url": {"url": url, "detail": detail}}


def text_block(text: str) -> Json:
    return {"type": "text", "text": text}


CALLED: Final = [call("c1", "f", '{"a":1}'), call("c2", "g")]
# messages -> the messages that are sent
MESSAGES: Final[dict[str, tuple[list[Json], list[Json]]]] = {
    "the plainest": ([user("a")], [user("a")]),
    "instructions": ([system("S"), system("D", "developer"), user("a")], [system("S\n\nD"), user("a")]),
    "a later system message": ([user("a"), system("S")], [user("a"), system("S")]),
    "a later developer message": (
        [user("a"), system("S", "developer")],
        [user("a"), system("S", "developer")],
    ),
    "turns": ([user("a"), assistant("b"), user("c")], [user("a"), assistant("b"), user("c")]),
    "blocks of text": ([user([text_block("a"), text_block("b")])], [user("a\nb")]),
    "a picture": (
        [user([text_block("a"), image(PNG)])],
        [user([text_block("a"), sent_image()])],
    ),
    "pictures alone": (
        [user([image(PNG, detail="high"), image("https://a.example/x.png", detail="original")])],
        [user([sent_image(detail="high"), sent_image("https://a.example/x.png", "original")])],
    ),
    "calls": (
        [user("a"), assistant("", *CALLED), output("c1", "1"), output("c2", "2")],
        [user("a"), assistant(None, *CALLED), output("c1", "1"), output("c2", "2")],
    ),
    "calls after text": (
        [user("a"), assistant("look", *CALLED), output("c1", "1"), output("c2", "2"), assistant("b")],
        [user("a"), assistant("look", *CALLED), output("c1", "1"), output("c2", "2"), assistant("b")],
    ),
    "two rounds": (
        [assistant("", CALLED[0]), output("c1", "1"), assistant("", CALLED[1]), output("c2", "2"), user("a")],
        [
            assistant(None, CALLED[0]),
            output("c1", "1"),
            assistant(None, CALLED[1]),
            output("c2", "2"),
            user("a"),
        ],
    ),
    "an id that is used twice": (
        [assistant("", call("c")), output("c", "1"), assistant("", call("c")), output("c", "2")],
        [assistant(None, call("c")), output("c", "1"), assistant(None, call("c_2")), output("c_2", "2")],
    ),
    "an output of nothing": (
        [user("a"), assistant("", call("c")), output("c", "")],
        [user("a"), assistant(None, call("c")), output("c", "")],
    ),
    "a call without output": ([user("a"), assistant("b", call("c"))], [user("a"), assistant("b")]),
}


STREAMED: Final[Json] = {"stream": True, "stream_options": {"include_usage": True}}


@pytest.mark.parametrize("case", sorted(MESSAGES))
def test_messages(case: str) -> None:
    given_messages, expected = MESSAGES[case]
    assert chat_body(chat(*given_messages), SEEING) == {
        "model": "a/eyes",
        "messages": expected,
        **STREAMED,
    }


SCHEMA_FORMAT: Final[Json] = {
    "type": "json_schema",
    "json_schema": {"name": "n", "schema": {"type": "object"}, "strict": True, "description": "d"},
}
# parameters -> what is sent for them
PARAMETERS: Final[list[tuple[Json, Json]]] = [
    ({"temperature": 0.5, "top_p": 0.9, "top_k": 40}, {"temperature": 0.5, "top_p": 0.9, "top_k": 40}),
    ({"temperature": 0}, {"temperature": 0}),
    (
        {"frequency_penalty": -2, "presence_penalty": "1.5"},
        {"frequency_penalty": -2, "presence_penalty": 1.5},
    ),
    ({"max_tokens": 100}, {"max_completion_tokens": 100}),
    ({"max_completion_tokens": 100}, {"max_completion_tokens": 100}),
    ({"num_predict": "100"}, {"max_completion_tokens": 100}),
    ({"stop": ["a", "b"]}, {"stop": ["a", "b"]}),
    ({"stop": "a"}, {"stop": "a"}),
    ({"seed": 0}, {"seed": 0}),
    (
        {"min_p": 0.1, "top_a": 0.2, "repetition_penalty": 1.1},
        {"min_p": 0.1, "top_a": 0.2, "repetition_penalty": 1.1},
    ),
    (
        {"logit_bias": {"50256": -100}, "logprobs": True, "top_logprobs": 3},
        {"logit_bias": {"50256": -100}, "logprobs": True, "top_logprobs": 3},
    ),
    ({"response_format": {"type": "json_object"}}, {"response_format": {"type": "json_object"}}),
    ({"response_format": {"type": "text"}}, {"response_format": {"type": "text"}}),
    ({"response_format": SCHEMA_FORMAT}, {"response_format": SCHEMA_FORMAT}),
    ({"verbosity": "low"}, {"verbosity": "low"}),
    ({"tool_choice": "required", "parallel_tool_calls": True}, {}),
    ({"reasoning_effort": "high"}, {}),
    (dict.fromkeys(("temperature", "max_tokens", "stop", "seed", "logit_bias", "response_format")), {}),
    ({"provider": {}, "store": True, "chat_id": "c", "new": 1}, {}),
]


@pytest.mark.parametrize(("parameters", "expected"), PARAMETERS)
def test_parameters(parameters: Json, expected: Json) -> None:
    found = chat_body(chat(HELLO, **parameters))
    assert found == {"model": PLAIN.id, "messages": [HELLO], **STREAMED} | expected


def test_what_only_responses_knows_is_not_sent() -> None:
    payload = translate(chat(HELLO), THINKING).payload
    assert {"input", "store", "include"} < set(payload)
    assert set(chat_body(chat(HELLO), THINKING)) == {"model", "messages", "stream", "stream_options"}


def test_effort() -> None:
    found = chat_body(chat(HELLO, reasoning_effort="low"), THINKING)
    assert found["reasoning"] == {"effort": "low"}


@pytest.mark.parametrize("choice", ["auto", "none", "required"])
def test_tools(choice: str) -> None:
    bare = {"type": "function", "function": {"name": "now"}}
    found = chat_body(chat(HELLO, tools=[TOOL, bare], tool_choice=choice, parallel_tool_calls=False))
    empty = {"type": "object", "properties": {}}
    assert found["tools"] == [
        TOOL,
        {"type": "function", "function": {"name": "now", "parameters": empty}},
    ]
    assert (found["tool_choice"], found["parallel_tool_calls"]) == (choice, False)


def test_the_choice_of_one_tool() -> None:
    choice = {"type": "function", "function": {"name": "get_weather"}}
    assert translate(chat(HELLO, tools=[TOOL], tool_choice=choice)).payload["tools"] == [FLAT]
    assert chat_body(chat(HELLO, tools=[TOOL], tool_choice=choice))["tool_choice"] == choice


def test_the_first_body_is_left_alone() -> None:
    payload = translate(chat(*MESSAGES["calls after text"][0], tools=[TOOL])).payload
    before = json.dumps(payload)
    _to_chat_body(payload, {})
    _to_chat_body(payload, {})
    assert json.dumps(payload) == before


def test_items_that_this_endpoint_does_not_know_are_left_out() -> None:
    payload = translate(chat(HELLO)).payload
    with_others = {**payload, "input": [*payload["input"], {"type": "web_search_call"}]}
    assert _to_chat_body(with_others, {}) == chat_body(chat(HELLO))


def test_reasoning_goes_back_with_the_answer_that_it_led_to() -> None:
    payload = translate(chat(HELLO)).payload
    secret = {"type": "reasoning", "id": "rs", "summary": [], "encrypted_content": "x"}
    said = {"type": "reasoning_text", "text": "Adding two."}
    open_text = {"type": "reasoning", "summary": [], "content": [said], "signature": "s", "format": "f"}
    call_item = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
    answer = {"type": "message", "role": "assistant", "content": "Four."}
    output = {"type": "function_call_output", "call_id": "c", "output": "4"}
    history = [*payload["input"], secret, call_item, output, open_text, answer]
    messages = _to_chat_body({**payload, "input": history}, {})["messages"]
    assert messages[1]["reasoning_details"] == [
        {"type": "reasoning.encrypted", "data": "x", "id": "rs", "index": 0}
    ]
    assert [call["id"] for call in messages[1]["tool_calls"]] == ["c"]
    assert messages[3]["content"] == "Four."
    assert messages[3]["reasoning_details"] == [
        {"type": "reasoning.text", "text": "Adding two.", "signature": "s", "format": "f", "index": 0}
    ]
    assert len(messages) == 4


VALID: Final = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.floats(0, 2),
        "top_p": st.floats(0, 1),
        "top_k": st.integers(0, 100),
        "max_tokens": st.integers(1, 10_000),
        "stop": st.text(max_size=3) | st.lists(st.text(max_size=3), max_size=4),
        "seed": st.integers(),
        "min_p": st.floats(0, 1),
        "repetition_penalty": st.floats(0, 2),
        "logit_bias": st.dictionaries(st.sampled_from(["1", "2"]), st.integers(-100, 100), max_size=2),
        "logprobs": st.booleans(),
        "response_format": st.sampled_from([{"type": "json_object"}, {"type": "text"}, SCHEMA_FORMAT, None]),
        "reasoning_effort": st.sampled_from(["low", "high", "none", None]),
        "verbosity": st.sampled_from(["low", "high"]),
        "tools": st.sampled_from([[TOOL], [], None]),
        "tool_choice": st.sampled_from(["auto", "required", {"type": "function", "function": {"name": "f"}}]),
        "parallel_tool_calls": st.booleans(),
    },
)


@settings(max_examples=200, deadline=None)
@given(messages=CHATS, parameters=VALID, spec=st.sampled_from([PLAIN, SEEING, THINKING]))
def test_any_chat_becomes_a_valid_body(messages: list[Json], parameters: Json, spec: ModelSpec) -> None:
    body = {"model": "m", "messages": messages, **parameters}
    translated = translate_or_refuse(body, spec)
    if isinstance(translated, InputError):
        return
    found = _to_chat_body(translated.payload, CompletionsBody.parse(body).parameters)
    validator().validate(found)
    _check_rounds(found["messages"])
    kept = [entry for entry in translated.payload["input"] if entry["type"] == "function_call"]
    made = [one for message in found["messages"] for one in message.get("tool_calls", ())]
    assert [one["id"] for one in made] == [entry["call_id"] for entry in kept]


def _check_rounds(messages: list[Json]) -> None:
    """Every call is answered right after the message that holds it."""
    waiting: set[str] = set()
    for message in messages:
        if message["role"] == "tool":
            waiting.remove(message["tool_call_id"])
            continue
        assert not waiting
        waiting = {one["id"] for one in message.get("tool_calls", ())}
    assert not waiting


# When it is asked instead


def refuse_responses(simulator: Simulator, name: str = "400_wrong_endpoint", **more: Any) -> None:
    simulator.next("http_error", name=name, on="/responses", **more)


async def test_a_model_of_the_other_endpoint(engine: StreamingEngine, simulator: Simulator) -> None:
    refuse_responses(simulator)
    simulator.next("plain", text="from there")
    body = chat(*MESSAGES["calls after text"][0], tools=[TOOL], stop=["x"], temperature=1)
    kept = await run(engine, simulator.base_url, request_for(body))
    assert kept.said().text == "from there"
    assert kept.said().ends == [TurnEnded("completed")]
    assert kept.statuses() == []
    assert asked(simulator) == ["/responses", "/chat/completions"]
    assert bodies(simulator)[1] == chat_body(body)


@pytest.mark.parametrize("dialect", sorted(CAN_SHOW))
async def test_a_model_of_the_other_endpoint_in_every_dialect(dialect: Dialect, simulator: Simulator) -> None:
    refuse_responses(simulator, tasks=True)
    simulator.next("plain", text="from there", tasks=True)
    async with running_pipe(simulator.base_url) as pipe:
        answer = await ask(pipe, "hello", dialect)
    assert (answer.text or answer.saved_text(), answer.error) == ("from there", "")
    assert asked(simulator) == ["/responses", "/chat/completions"]
    validator().validate(bodies(simulator)[1])


@dataclass
class OneEndpoint:
    """A server that knows only `/chat/completions`, and what it was asked."""

    status: int
    content: bytes
    kind: str
    asked: list[tuple[str, Json]] = field(default_factory=list)

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        line, _, body = await read_request(reader)
        path = line.split()[1].removeprefix("/api/v1")
        self.asked.append((path, json.loads(body)))
        if path == "/chat/completions":
            writer.write(EVENT_STREAM + recording("c1_chat_text"))
        else:
            head = f"HTTP/1.1 {self.status} No\r\nContent-Type: {self.kind}\r\nConnection: close\r\n"
            writer.write(f"{head}Content-Length: {len(self.content)}\r\n\r\n".encode() + self.content)
        await writer.drain()


UNKNOWN_PATHS: Final[dict[str, tuple[int, bytes, str]]] = {
    "405": (405, b"", "text/plain"),
    "405 in words": (405, b'{"detail":"Method Not Allowed"}', "application/json"),
    "405 with an error": (405, b'{"error":{"message":"no","code":405}}', "application/json"),
    "404": (404, b"", "text/plain"),
    "404 in words": (404, b"404 page not found", "text/plain"),
    "404 as a page": (404, b"<html>nginx</html>", "text/html"),
    "404 in JSON": (404, b'{"detail":"Not Found"}', "application/json"),
    "404 in a list": (404, b"[]", "application/json"),
}


@pytest.mark.parametrize("case", sorted(UNKNOWN_PATHS))
async def test_a_server_that_knows_one_endpoint(case: str, engine: StreamingEngine) -> None:
    server = OneEndpoint(*UNKNOWN_PATHS[case])
    async with hostile(server) as url:
        kept = await run(engine, url, request_for(chat(HELLO)))
    expect(kept.said(), "c1_chat_text")
    assert [path for path, _ in server.asked] == ["/responses", "/chat/completions"]
    validator().validate(server.asked[1][1])


@pytest.mark.parametrize(
    "name",
    [
        "404_privacy",
        "404_no_providers",
        "400_bad_request_int_code",
        "400_model_not_found",
        "400_provider_raw",
        "401_bad_key",
        "402_credits",
        "403_moderation",
        "413_too_large",
        "429_free_daily",
        "500_masked",
        "502_html",
        "200_error_body",
    ],
)
async def test_other_refusals_are_final(name: str, engine: StreamingEngine, simulator: Simulator) -> None:
    simulator.next("http_error", name=name, times=math.inf)
    _, kept = await fail(engine, simulator.base_url, request_for(chat(HELLO)))
    assert asked(simulator) == ["/responses"]
    assert kept.emissions == []


async def test_nothing_is_switched_once_something_was_shown(
    engine: StreamingEngine, simulator: Simulator
) -> None:
    error = {
        "code": "wrong_endpoint",
        "message": "Not available on this endpoint",
        "availability": {"code": "wrong_endpoint", "retryable": False},
    }
    failed = {"type": "response.failed", "response": {"error": error}}
    simulator.next("replay", body=delta("so far").decode() + as_stream(failed))
    found, kept = await fail(engine, simulator.base_url, request_for(chat(HELLO)), POLICY)
    assert "Not available on this endpoint" in found.detail
    assert kept.said().text == "so far"
    assert asked(simulator) == ["/responses"]


@pytest.mark.parametrize("forced", [False, True])
async def test_no_endpoint_takes_the_model(
    forced: bool, engine: StreamingEngine, simulator: Simulator
) -> None:
    simulator.next("http_error", name="400_wrong_endpoint", times=math.inf)
    request = chat_request() if forced else request_for(chat(HELLO))
    error, kept = await fail(engine, simulator.base_url, request, POLICY)
    assert "not available on this endpoint" in error.user_message
    assert kept.emissions == []
    assert asked(simulator) == ["/responses", "/chat/completions"][forced:]


async def test_the_failure_of_the_second_endpoint_is_the_one_that_is_told(
    engine: StreamingEngine, simulator: Simulator
) -> None:
    refuse_responses(simulator)
    simulator.next("http_error", name="402_credits")
    error, _ = await fail(engine, simulator.base_url, request_for(chat(HELLO)), POLICY)
    assert error.template == "credits"
    assert asked(simulator) == ["/responses", "/chat/completions"]


# Trying again at the second endpoint


@pytest.mark.parametrize("name", ["429_capacity_exhausted", "503_no_provider", "500_masked"])
async def test_a_passing_refusal_is_tried_again(
    name: str, engine: StreamingEngine, simulator: Simulator, sleeps: Sleeps
) -> None:
    simulator.next("http_error", name=name, retry_after=4)
    simulator.next("plain", text="fine now")
    kept = await run(engine, simulator.base_url, chat_request(), POLICY)
    assert kept.said().text == "fine now"
    assert asked(simulator) == ["/chat/completions"] * 2
    assert sleeps.seconds == [4.0]
    (status,) = kept.statuses()
    assert "again in 4 s" in status


async def test_every_endpoint_has_its_tries(
    engine: StreamingEngine, simulator: Simulator, sleeps: Sleeps
) -> None:
    simulator.next("http_error", name="503_no_provider", retry_after=1)
    refuse_responses(simulator)
    simulator.next("http_error", name="429_upstream", retry_after=2, times=3)
    simulator.next("plain", text="at last")
    kept = await run(engine, simulator.base_url, request_for(chat(HELLO)), POLICY)
    assert kept.said().text == "at last"
    assert asked(simulator) == ["/responses"] * 2 + ["/chat/completions"] * 4
    assert sleeps.seconds == [1.0, 2.0, 2.0, 2.0]


async def test_so_many_tries_and_no_more(engine: StreamingEngine, simulator: Simulator) -> None:
    simulator.next("http_error", name="503_no_provider", times=math.inf)
    await fail(engine, simulator.base_url, chat_request(), RetryPolicy(2, 30.0))
    assert asked(simulator) == ["/chat/completions"] * 3


async def test_an_error_chunk_before_anything_was_shown_is_tried_again(
    engine: StreamingEngine, simulator: Simulator
) -> None:
    simulator.next("golden", name="c6_chat_error_first_chunk")
    simulator.next("golden", name="c1_chat_text")
    kept = await run(engine, simulator.base_url, chat_request(), POLICY)
    assert kept.said().text == TRANSCRIPTS["c1_chat_text"]["expect"]["text"]
    assert asked(simulator) == ["/chat/completions"] * 2


@pytest.mark.parametrize(
    ("scenario", "params"),
    [
        ("golden", {"name": "c4_chat_midstream_error"}),
        ("abrupt", {"cut": 4}),
        ("eof", {"cut": 4}),
        ("failed", {}),
    ],
)
async def test_nothing_is_tried_again_after_text(
    scenario: str, params: Json, engine: StreamingEngine, simulator: Simulator, sleeps: Sleeps
) -> None:
    simulator.next(scenario, **params)
    _, kept = await fail(engine, simulator.base_url, chat_request(), POLICY)
    assert kept.said().text
    assert asked(simulator) == ["/chat/completions"]
    assert sleeps.seconds == []


# The valve


@pytest.mark.parametrize(
    ("globs", "forced"),
    [
        ("", False),
        (" ", False),
        (",", False),
        (" , ,", False),
        ("openai/gpt-4o-mini", True),
        ("OpenAI/GPT-4o-Mini", True),
        ("openai/*", True),
        ("*mini", True),
        ("*", True),
        ("  openai/gpt-4o-mini  ", True),
        ("anthropic/*,openai/*", True),
        ("anthropic/* , , openai/gpt-4o-????", True),
        ("anthropic/*", False),
        ("gpt-4o-mini", False),
        ("openai/gpt-4o", False),
        ("openai/gpt-4o-mini:free", False),
    ],
)
def test_models_that_the_valve_names(globs: str, forced: bool) -> None:
    request = request_for(chat(HELLO), FORCE_CHAT_COMPLETIONS_MODELS=globs)
    assert request.api is (CHAT if forced else RESPONSES)
    assert ("messages" in request.body) is forced


def test_letter_case_does_not_matter() -> None:
    request = request_for(
        chat(HELLO) | {"model": "openrouter.Acme/Big-1"},
        ModelSpec("Acme/Big-1", "Big"),
        FORCE_CHAT_COMPLETIONS_MODELS="acme/*",
    )
    assert (request.api, request.body["model"]) == (CHAT, "Acme/Big-1")


@pytest.mark.parametrize(
    ("globs", "path"), [("openai/*", "/chat/completions"), ("anthropic/*", "/responses"), ("", "/responses")]
)
async def test_the_valve_in_a_pipe(globs: str, path: str, simulator: Simulator) -> None:
    async with running_pipe(simulator.base_url, FORCE_CHAT_COMPLETIONS_MODELS=globs) as pipe:
        answer = await ask(pipe, "[[plain text=heard]]", stop=["never"])
    assert (answer.text, answer.error) == ("heard", "")
    assert asked(simulator) == [path]
    assert ("stop" in bodies(simulator)[0]) is (path == "/chat/completions")


async def test_a_tool_turn_at_the_second_endpoint(simulator: Simulator) -> None:
    """The client runs the call and asks again; the answer knows the output."""
    async with running_pipe(simulator.base_url, FORCE_CHAT_COMPLETIONS_MODELS="*") as pipe:
        question = user("what is the weather?")
        first = await ask(pipe, {"messages": [question]}, "api_json", tools=[TOOL])
        (asked_for,) = first.calls
        told = [
            question,
            assistant("", call("c1", asked_for["name"], asked_for["arguments"])),
            output("c1", "minus 12 and clear"),
        ]
        second = await ask(pipe, {"messages": told}, "api_json", tools=[TOOL])
    assert (asked_for["name"], first.finish) == ("get_weather", "tool_calls")
    assert "minus 12 and clear" in second.text
    assert (second.calls, second.finish) == ([], "stop")
    for body in bodies(simulator):
        validator().validate(body)


# Reasoning that the provider cannot read

THOUGHT: Final[Json] = {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "sealed"}
UNREADABLE: Final = ["400_thinking_signature", "400_encrypted_content"]


def with_thoughts(*thoughts: Json) -> UpstreamRequest:
    request = request_for(chat(HELLO, assistant("hi"), user("and?")))
    entries = request.body["input"]
    return request._replace(body={**request.body, "input": [entries[0], *thoughts, *entries[1:]]})


@pytest.mark.parametrize("name", UNREADABLE)
async def test_reasoning_that_cannot_be_read_is_left_out(
    name: str, engine: StreamingEngine, simulator: Simulator
) -> None:
    simulator.next("http_error", name=name)
    simulator.next("plain", text="fine now")
    kept = await run(engine, simulator.base_url, with_thoughts(THOUGHT, THOUGHT | {"id": "rs_2"}))
    assert kept.said().text == "fine now"
    assert kept.statuses() == []
    assert asked(simulator) == ["/responses"] * 2
    first, second = bodies(simulator)
    assert first == with_thoughts(THOUGHT, THOUGHT | {"id": "rs_2"}).body
    assert second == with_thoughts().body


@pytest.mark.parametrize("name", UNREADABLE)
async def test_reasoning_is_left_out_once(name: str, engine: StreamingEngine, simulator: Simulator) -> None:
    simulator.next("http_error", name=name, times=math.inf)
    error, kept = await fail(engine, simulator.base_url, with_thoughts(THOUGHT), POLICY)
    assert error.status == 400
    assert asked(simulator) == ["/responses"] * 2
    assert kept.emissions == []


@pytest.mark.parametrize(
    ("name", "request_"),
    [
        *((name, with_thoughts()) for name in UNREADABLE),
        *((name, chat_request()) for name in UNREADABLE),
        ("400_context_too_long", with_thoughts(THOUGHT)),
        ("400_provider_raw", with_thoughts(THOUGHT)),
        ("400_store_true", with_thoughts(THOUGHT)),
    ],
)
async def test_no_second_request_where_nothing_would_change(
    name: str, request_: UpstreamRequest, engine: StreamingEngine, simulator: Simulator
) -> None:
    simulator.next("http_error", name=name, times=math.inf)
    await fail(engine, simulator.base_url, request_, POLICY)
    assert asked(simulator) == [request_.api.path]


async def test_only_a_bad_request_is_repaired(engine: StreamingEngine) -> None:
    refusal = b'{"error":{"code":403,"message":"Invalid `signature` of the webhook"}}'
    server = OneEndpoint(403, refusal, "application/json")
    async with hostile(server) as url:
        error, _ = await fail(engine, url, with_thoughts(THOUGHT), POLICY)
    assert error.status == 403
    assert [path for path, _ in server.asked] == ["/responses"]


async def test_tries_go_on_after_the_repair(
    engine: StreamingEngine, simulator: Simulator, sleeps: Sleeps
) -> None:
    simulator.next("http_error", name="503_no_provider", retry_after=1)
    simulator.next("http_error", name="400_thinking_signature")
    simulator.next("http_error", name="503_no_provider", retry_after=2)
    simulator.next("plain", text="fine now")
    kept = await run(engine, simulator.base_url, with_thoughts(THOUGHT), POLICY)
    assert kept.said().text == "fine now"
    assert asked(simulator) == ["/responses"] * 4
    assert sleeps.seconds == [1.0, 2.0]


async def test_another_model_cannot_read_the_reasoning_of_the_first(
    engine: StreamingEngine, simulator: Simulator
) -> None:
    """The refusal is the simulator's own: it seals reasoning for one author's models."""
    first = with_thoughts()
    first.body["model"] = "openai/gpt-5-mini"
    first.body["include"] = ["reasoning.encrypted_content"]
    simulator.next("reasoning")
    (thought,) = closed((await run(engine, simulator.base_url, first)).emissions, "reasoning")
    second = with_thoughts(thought)
    second.body["model"] = "google/gemini-2.5-pro"
    kept = await run(engine, simulator.base_url, second)
    assert kept.said().ends == [TurnEnded("completed")]
    assert [record.status for record in simulator.requests] == [200, 400, 200]
    assert bodies(simulator)[2] == {**second.body, "input": with_thoughts().body["input"]}


# Tools that no provider takes


@pytest.mark.parametrize("api", [RESPONSES, CHAT])
async def test_tools_that_no_provider_takes_are_left_out(
    api: UpstreamAPI, engine: StreamingEngine, simulator: Simulator
) -> None:
    """The person is told, because something is missing from the answer."""
    asked_for = chat(HELLO, tools=[TOOL], tool_choice="auto")
    request = request_for(asked_for) if api is RESPONSES else chat_request(asked_for)
    assert request.body["tools"]
    simulator.next("http_error", name="404_no_tool_use")
    simulator.next("plain", text="by hand")
    kept = await run(engine, simulator.base_url, request)
    assert kept.said().text == "by hand"
    (notice,) = [emission for emission in kept.emissions if isinstance(emission, Notice)]
    assert "without" in notice.text
    first, second = bodies(simulator)
    assert first == request.body
    assert second == {key: value for key, value in first.items() if key not in ("tools", "tool_choice")}


async def test_a_refusal_of_tools_where_there_are_none_is_final(
    engine: StreamingEngine, simulator: Simulator
) -> None:
    simulator.next("http_error", name="404_no_tool_use", times=math.inf)
    error, kept = await fail(engine, simulator.base_url, request_for(chat(HELLO)), POLICY)
    assert error.status == 404
    assert len(asked(simulator)) == 1
    assert kept.emissions == []


# The page


def test_every_key_of_a_delta_has_a_row() -> None:
    rows = [line for line in STREAMING_PAGE.read_text("utf-8").splitlines() if line.startswith("| `")]
    named = {name for line in rows for name in re.findall(r"`(\w+)`", line.split("|")[1])}
    assert set(_CHAT_REDUCERS) <= named


@pytest.mark.parametrize(
    "done",
    [
        b"data: [DONE]\n\n",
        b"data: [DONE]\r\n\r\n",
        b"data: [DONE]\n",
        b"data: [DONE]\r\n",
        b"data: [DONE] \n\n",
        b"data:[DONE]\n\n: bye\n\n",
    ],
)
async def test_done_ends_a_stream_whose_connection_stays_open(done: bytes) -> None:
    """A proxy that sends no usage, and keeps the connection: what came is the answer."""
    body = b"".join(
        b"data: " + json.dumps(chunk).encode() + b"\n\n"
        for chunk in (
            {"choices": [{"index": 0, "delta": {"content": "fine"}}]},
            {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]},
        )
    )
    kept: list[Emission] = []

    async def sink(emissions: Sequence[Emission]) -> None:
        kept.extend(emissions)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n" + body + done)
        await reader.read(-1)  # until the client has closed
        writer.close()

    async with hostile(answer) as url:
        client = OpenRouterClient()
        try:
            request = UpstreamRequest({"model": PLAIN.id, "messages": [HELLO], "stream": True}, CHAT)
            async with asyncio.timeout(SOON_S):
                await StreamingEngine(client).stream(connection_to(url), request, sink, RetryPolicy(0))
        finally:
            await client.aclose()
    assert [emission.text for emission in kept if isinstance(emission, TextDelta)] == ["fine"]
    assert isinstance(kept[-1], TurnEnded)
