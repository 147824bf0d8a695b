"""The simulator over real HTTP: what it streams, what it refuses, what it records.

Every generated stream is checked against the API description (`StreamEvents`, `ChatStreamChunk`), so that
what the pipe is tested with is what OpenRouter documents. Page: docs/simulator.md.
"""

from __future__ import annotations

import asyncio
import base64
import copy
import json
import re
import signal
import struct
import sys
import time
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from jsonschema import Draft202012Validator
from referencing import Registry, Resource
from referencing.jsonschema import DRAFT202012

from openrouter_responses_pipe import simulator
from openrouter_responses_pipe.simulator import SCENARIOS, WORDS, Simulator

Json = dict[str, Any]
ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "tests" / "data" / "openrouter"
GOLDEN = ROOT / "tests" / "data" / "golden"
PAGE = ROOT / "docs" / "simulator.md"
MODEL = "openai/gpt-4o-mini"
REASONER = "openai/gpt-5-mini"
PAINTER = "black-forest-labs/flux.2-pro"  # makes images and no text
WEATHER: Json = {
    "type": "function",
    "name": "get_weather",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}, "unit": {"enum": ["c", "f"]}},
        "required": ["city", "days"],
    },
}
CLOCK: Json = {
    "type": "function",
    "name": "get_time",
    "parameters": {"properties": {"tz": {"type": "string"}}},
}
# Scenarios whose /responses stream never ends, is broken on purpose, or is no stream.
BROKEN = {"stall", "stall_headers", "abrupt", "eof", "http_error", "golden", "replay"}
UNDOCUMENTED = {"error_nested", "response_error", "error_untyped"}
RELAXED = {"or_search", "or_image", "datetime", "reasoning_text"}


# ── Helpers ──────────────────────────────────────────────────────────────────


@pytest.fixture
async def sim() -> AsyncIterator[Simulator]:
    async with Simulator() as server:
        yield server


def _load(name: str) -> Any:
    return json.loads((DATA / name).read_text(encoding="utf-8"))


def _bytes(path: Path) -> bytes:
    return path.read_bytes()


def _events(raw: bytes) -> list[Json]:
    """The JSON documents of an SSE body; comments and [DONE] left out."""
    documents = []
    for block in re.split(rb"\r?\n\r?\n", raw):
        lines = [line[5:].strip() for line in re.split(rb"\r?\n", block) if line.startswith(b"data:")]
        if lines and lines != [b"[DONE]"]:
            documents.append(json.loads(b"\n".join(lines)))
    return documents


def _body(text: str, **more: Any) -> Json:
    return {"model": MODEL, "stream": True, "input": text, **more}


def _chat_body(text: str, **more: Any) -> Json:
    return {"model": MODEL, "stream": True, "messages": [{"role": "user", "content": text}], **more}


async def _post(
    sim: Simulator, http: aiohttp.ClientSession, body: Json, path: str = "/responses"
) -> tuple[int, bytes]:
    async with http.post(sim.base_url + path, json=body) as answer:
        return answer.status, await answer.read()


async def _stream(sim: Simulator, http: aiohttp.ClientSession, text: str, **more: Any) -> list[Json]:
    status, raw = await _post(sim, http, _body(text, **more))
    assert status == 200, raw
    return _events(raw)


async def _chunks(sim: Simulator, http: aiohttp.ClientSession, text: str, **more: Any) -> list[Json]:
    status, raw = await _post(sim, http, _chat_body(text, **more), "/chat/completions")
    assert status == 200, raw
    return _events(raw)


def _types(events: list[Json]) -> list[str]:
    return [event.get("type", "") for event in events]


def _text(events: list[Json]) -> str:
    return "".join(event["delta"] for event in events if event.get("type") == "response.output_text.delta")


def _relax(document: Json) -> Json:
    """Open the closed item, tool and part lists of the base schemas, as the reference advises."""
    document = copy.deepcopy(document)
    schemas = document["components"]["schemas"]
    for name in ("OutputItemAddedEvent", "OutputItemDoneEvent"):
        schemas[name]["properties"]["item"] = {"type": "object"}
    for name in ("BaseContentPartAddedEvent", "BaseContentPartDoneEvent"):
        schemas[name]["properties"]["part"] = {"type": "object"}
    for name in ("output", "tools"):
        schemas["BaseResponsesResult"]["properties"][name] = {"type": "array"}
    return document


class Schema:
    """Validators for one reading of the API description, strict or relaxed."""

    def __init__(self, document: Json) -> None:
        resource = Resource.from_contents(document, default_specification=DRAFT202012)
        self._registry = Registry().with_resource("urn:d", resource)
        self._mapping = document["components"]["schemas"]["StreamEvents"]["discriminator"]["mapping"]

    def problems(self, name: str, value: Any) -> list[str]:
        reference = {"$ref": f"urn:d#/components/schemas/{name}"}
        found = Draft202012Validator(reference, registry=self._registry).iter_errors(value)
        return [error.message[:300] for error in found]

    def event_problems(self, event: Json) -> list[str]:
        """Check an event against its own member of the StreamEvents union: clearer than the union."""
        if event["type"] not in self._mapping:
            return [f"unknown event type {event['type']}"]
        return self.problems(self._mapping[event["type"]].rpartition("/")[2], event)


@pytest.fixture(scope="module")
def strict() -> Schema:
    return Schema(_load("openapi.trimmed.json"))


@pytest.fixture(scope="module")
def relaxed() -> Schema:
    return Schema(_relax(_load("openapi.trimmed.json")))


# ── What it streams ──────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", sorted(SCENARIOS.keys() - BROKEN - UNDOCUMENTED))
@pytest.mark.parametrize("model", [MODEL, REASONER])
async def test_generated_streams_follow_the_api_description(
    sim: Simulator, http: aiohttp.ClientSession, strict: Schema, relaxed: Schema, name: str, model: str
) -> None:
    fast = {"drip": "rate=0 tokens=5", "burst": "tokens=5"}.get(name, "")
    include = ["reasoning.encrypted_content"]
    events = await _stream(
        sim, http, f"Hello [[{name} {fast}]]", model=model, include=include, tools=[WEATHER, CLOCK]
    )
    schema = relaxed if name in RELAXED else strict
    assert [problem for event in events for problem in schema.event_problems(event)] == []
    assert [event["sequence_number"] for event in events] == list(range(len(events)))


@pytest.mark.parametrize("name", sorted(SCENARIOS.keys() - BROKEN))
async def test_generated_chat_chunks_follow_the_api_description(
    sim: Simulator, http: aiohttp.ClientSession, strict: Schema, name: str
) -> None:
    fast = {"drip": "rate=0 tokens=5", "burst": "tokens=5"}.get(name, "")
    chunks = await _chunks(sim, http, f"Hello [[{name} {fast}]]")
    assert [problem for chunk in chunks for problem in strict.problems("ChatStreamChunk", chunk)] == []


@pytest.mark.parametrize(
    "name", ["plain", "reasoning", "reasoning_text", "tools", "incomplete", "empty", "refusal"]
)
async def test_an_answer_without_stream_equals_the_terminal_event(
    sim: Simulator, http: aiohttp.ClientSession, relaxed: Schema, name: str
) -> None:
    text = f"Hello [[{name}]]"
    last = (await _stream(sim, http, text, tools=[WEATHER]))[-1]["response"]
    status, raw = await _post(sim, http, _body(text, tools=[WEATHER], stream=False))
    whole = json.loads(raw)
    assert status == 200
    assert relaxed.problems("OpenResponsesResult", whole) == []
    assert [item["type"] for item in last["output"]] == [item["type"] for item in whole["output"]]
    assert last["status"] == whole["status"]
    assert last["usage"]["output_tokens"] == whole["usage"]["output_tokens"]


async def test_the_default_answer_quotes_the_user_and_deltas_join_to_the_text(
    sim: Simulator, http: aiohttp.ClientSession
) -> None:
    events = await _stream(sim, http, "Where is Narvik?")
    final = events[-1]["response"]
    assert _types(events)[0] == "response.created"
    assert "Where is Narvik?" in _text(events)
    assert _text(events) == final["output"][0]["content"][0]["text"]
    assert final["id"].startswith("gen-")


async def test_reasoning_comes_by_default_only_where_the_catalog_or_the_body_says_so(
    sim: Simulator, http: aiohttp.ClientSession
) -> None:
    async def reasons(model: str, **body: Any) -> bool:
        events = await _stream(sim, http, "Hi", model=model, **body)
        return "response.reasoning_summary_text.delta" in _types(events)

    assert [await reasons(REASONER), await reasons(MODEL)] == [True, False]
    flash = "google/gemini-2.5-flash"
    assert [await reasons(flash), await reasons(flash, reasoning={"effort": "low"})] == [False, True]
    assert not await reasons(flash, reasoning={"effort": "none"})


async def test_encrypted_content_is_given_when_asked_for_and_checked_when_it_comes_back(
    sim: Simulator, http: aiohttp.ClientSession
) -> None:
    plain = await _stream(sim, http, "[[reasoning]]", model=REASONER)
    assert "encrypted_content" not in plain[-1]["response"]["output"][0]
    asked = await _stream(sim, http, "[[reasoning]]", model=REASONER, include=["reasoning.encrypted_content"])
    item = asked[-1]["response"]["output"][0]
    assert item["format"] == "openai-responses-v1"

    async def replay(model: str, reasoning: Json) -> tuple[int, bytes]:
        turn = [{"role": "user", "content": "a"}, reasoning, {"role": "assistant", "content": "b"},
                {"role": "user", "content": "c"}]  # fmt: skip
        return await _post(sim, http, {"model": model, "stream": True, "input": turn})

    assert (await replay(REASONER, item))[0] == 200
    status, raw = await replay(REASONER, item | {"summary": item["summary"][:1]})
    assert (status, b"invalid_encrypted_content" in raw) == (400, True)
    assert (await replay("google/gemini-2.5-pro", item))[0] == 400


async def test_a_changed_signature_is_refused(sim: Simulator, http: aiohttp.ClientSession) -> None:
    events = await _stream(sim, http, "[[reasoning_text]]", model="anthropic/claude-sonnet-4.6")
    item = events[-1]["response"]["output"][0]
    item["content"][0]["text"] += "!"
    turn = [{"role": "user", "content": "a"}, item, {"role": "user", "content": "c"}]
    status, raw = await _post(sim, http, {"model": "anthropic/claude-sonnet-4.6", "input": turn})
    assert (status, b"Invalid `signature` in `thinking` block" in raw) == (400, True)


async def test_a_call_uses_the_offered_tool_and_is_not_repeated_after_its_output(
    sim: Simulator, http: aiohttp.ClientSession
) -> None:
    events = await _stream(sim, http, "What is the weather?", tools=[WEATHER])
    call = events[-1]["response"]["output"][0]
    assert (call["name"], json.loads(call["arguments"])) == ("get_weather", {"city": "Oslo", "days": 1})
    deltas = [e["delta"] for e in events if e["type"] == "response.function_call_arguments.delta"]
    assert (len(deltas) > 1, "".join(deltas)) == (True, call["arguments"])
    output = {"type": "function_call_output", "call_id": call["call_id"], "output": "minus 12 and clear"}
    question = {"role": "user", "content": "What is the weather?"}
    _, raw = await _post(sim, http, _body("", tools=[WEATHER]) | {"input": [question, call, output]})
    assert "minus 12 and clear" in _text(_events(raw))
    assert "function_call" not in str(_events(raw)[-1]["response"]["output"])


async def test_without_tools_the_word_weather_gets_a_text(
    sim: Simulator, http: aiohttp.ClientSession
) -> None:
    assert "weather" in _text(await _stream(sim, http, "What is the weather?"))


async def test_rounds_repeat_calls_until_enough_outputs(sim: Simulator, http: aiohttp.ClientSession) -> None:
    items: list[Json] = [{"role": "user", "content": "[[tool rounds=3]]"}]
    for _ in range(3):
        _, raw = await _post(sim, http, _body("", tools=[WEATHER]) | {"input": items})
        call = _events(raw)[-1]["response"]["output"][-1]
        items += [call, {"type": "function_call_output", "call_id": call["call_id"], "output": "x"}]
        assert call["type"] == "function_call"
    _, raw = await _post(sim, http, _body("", tools=[WEATHER]) | {"input": items})
    assert _events(raw)[-1]["response"]["output"][-1]["type"] == "message"


async def test_then_names_the_scenario_after_the_tool(sim: Simulator, http: aiohttp.ClientSession) -> None:
    items: list[Json] = [{"role": "user", "content": "[[tool then=failed]]"}]
    _, raw = await _post(sim, http, _body("", tools=[WEATHER]) | {"input": items})
    call = _events(raw)[-1]["response"]["output"][-1]
    items += [call, {"type": "function_call_output", "call_id": call["call_id"], "output": "x"}]
    _, raw = await _post(sim, http, _body("", tools=[WEATHER]) | {"input": items})
    assert _types(_events(raw))[-1] == "response.failed"


async def test_parallel_calls_interleave_and_end_in_reverse(
    sim: Simulator, http: aiohttp.ClientSession
) -> None:
    events = await _stream(sim, http, "[[tools]]", tools=[WEATHER, CLOCK])
    places = [e["output_index"] for e in events if e["type"] == "response.function_call_arguments.delta"]
    assert places[:4] == [0, 1, 0, 1]
    assert [e["output_index"] for e in events if e["type"] == "response.output_item.done"] == [1, 0]
    assert [item["name"] for item in events[-1]["response"]["output"]] == ["get_weather", "get_time"]


async def test_a_whole_call_has_no_argument_events(sim: Simulator, http: aiohttp.ClientSession) -> None:
    arguments = '{"city":"Rome","deep":{"a":[1]}}'
    events = await _stream(sim, http, f"[[tool_whole name=get_weather args={arguments}]]", tools=[WEATHER])
    assert not [kind for kind in _types(events) if "arguments" in kind]
    assert json.loads(events[-1]["response"]["output"][0]["arguments"]) == json.loads(arguments)


async def test_the_picture_is_a_png_of_the_asked_size(sim: Simulator, http: aiohttp.ClientSession) -> None:
    events = await _stream(sim, http, "[[image size=40]]", model="openai/gpt-5-image")
    item = events[-1]["response"]["output"][0]
    png = base64.b64decode(item["result"].removeprefix("data:image/png;base64,"))
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    assert struct.unpack(">II", png[16:24]) == (40, 40)


@pytest.mark.parametrize("model", [PAINTER, "google/gemini-2.5-flash-image"])
async def test_who_is_asked_for_an_image_alone_gives_no_text(
    sim: Simulator, http: aiohttp.ClientSession, strict: Schema, model: str
) -> None:
    events = await _stream(sim, http, "A lighthouse", model=model, modalities=["image"])
    (item,) = events[-1]["response"]["output"]
    assert item["type"] == "image_generation_call"
    assert item["result"].startswith("data:image/png;base64,")
    assert [problem for event in events for problem in strict.event_problems(event)] == []
    chunks = await _chunks(sim, http, "A lighthouse", model=model, modalities=["image"])
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks if chunk["choices"]]
    assert [image["type"] for delta in deltas for image in delta.get("images", [])] == ["image_url"]
    assert not any(delta.get("content") for delta in deltas)


async def test_chat_refuses_tools_and_modalities_too(sim: Simulator, http: aiohttp.ClientSession) -> None:
    tool = {"type": "function", "function": {"name": "f"}}
    for change in ({"model": PAINTER}, {"model": "google/gemini-2.5-flash-image", "tools": [tool]}):
        status, raw = await _post(sim, http, _chat_body("hi", **change), "/chat/completions")
        assert (status, json.loads(raw)["error"]["code"]) == (404, 404)


async def test_citations_lie_where_they_say(sim: Simulator, http: aiohttp.ClientSession) -> None:
    part = (await _stream(sim, http, "[[web_search]]"))[-1]["response"]["output"][1]["content"][0]
    quoted = [part["text"][note["start_index"] : note["end_index"]] for note in part["annotations"]]
    assert [note["url"] in text for note, text in zip(part["annotations"], quoted, strict=True)] == [
        True,
        True,
    ]


@pytest.mark.parametrize(
    ("name", "last"),
    [
        ("failed", {"type": "response.failed"}),
        ("failed_first", {"type": "response.failed", "sequence_number": 0}),
        ("error_flat", {"type": "error", "code": "rate_limit_exceeded", "param": None}),
        ("error_nested", {"type": "error"}),
        ("response_error", {"type": "response.error"}),
        ("error_untyped", {"error": {
            "code": 502, "message": "Provider disconnected unexpectedly",
            "metadata": {"error_type": "provider_unavailable"}}}),
    ],
)  # fmt: skip
async def test_each_error_shape_ends_the_stream(
    sim: Simulator, http: aiohttp.ClientSession, name: str, last: Json
) -> None:
    events = await _stream(sim, http, f"[[{name}]]")
    assert {key: events[-1].get(key) for key in last} == last
    assert not {"response.completed", "response.output_item.done"} & set(_types(events))
    status, raw = await _post(sim, http, _body(f"[[{name}]]", stream=False))
    assert (status, list(json.loads(raw))) == (200, ["error"])


async def test_usage_counts_and_costs_by_the_catalog(sim: Simulator, http: aiohttp.ClientSession) -> None:
    usage = (await _stream(sim, http, "x" * 400))[-1]["response"]["usage"]
    assert usage["input_tokens"] == 100
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
    assert usage["cost"] == pytest.approx(100 * 1.5e-7 + usage["output_tokens"] * 6e-7)
    free = (await _stream(sim, http, "hi", model="openai/gpt-oss-20b:free"))[-1]["response"]["usage"]
    assert free["cost"] == 0
    chat = (await _chunks(sim, http, "x" * 400))[-1]["usage"]
    assert (chat["prompt_tokens"], chat["cost"] > 0) == (100, True)


@pytest.mark.parametrize(
    ("key", "kind"), [("title", str), ("tags", list), ("follow_ups", list), ("queries", list)]
)
async def test_task_prompts_get_json_whatever_words_the_history_holds(
    sim: Simulator, http: aiohttp.ClientSession, key: str, kind: type
) -> None:
    prompt = (
        f'### Task:\nGenerate.\n### Output:\nJSON format: {{ "{key}": "..." }}\n'
        "### Chat History:\n<chat_history>\nUSER: [[http_error]] cut-off\nASSISTANT: no\n</chat_history>"
    )
    sim.next("http_error")
    status, raw = await _post(sim, http, _body(prompt, stream=False))
    assert status == 200
    assert isinstance(json.loads(json.loads(raw)["output"][-1]["content"][0]["text"])[key], kind)
    assert (await _post(sim, http, _body("hi")))[0] == 429  # the queue was kept for the chat itself


async def test_chat_dialect_of_calls_reasoning_images_and_citations(
    sim: Simulator, http: aiohttp.ClientSession
) -> None:
    tools = [{"type": "function", "function": {k: v for k, v in WEATHER.items() if k != "type"}}]
    deltas = [
        c["choices"][0]["delta"] for c in await _chunks(sim, http, "[[tools]]", tools=tools) if c["choices"]
    ]
    fragments = [part for delta in deltas for part in delta.get("tool_calls", [])]
    for index in (0, 1):
        joined = "".join(f["function"]["arguments"] for f in fragments if f["index"] == index)
        assert json.loads(joined) == {"city": "Oslo", "days": 1}
    assert [f["id"] for f in fragments if "id" in f] == [f["id"] for f in fragments[:2]]
    chunks = await _chunks(sim, http, "[[reasoning_text]]")
    details = [
        d for c in chunks if c["choices"] for d in c["choices"][0]["delta"].get("reasoning_details", [])
    ]
    assert (details[-1]["text"], bool(details[-1]["signature"])) == (None, True)
    assert "image_url" in str(await _chunks(sim, http, "[[image]]"))
    assert "url_citation" in str(await _chunks(sim, http, "[[web_search]]"))


async def test_chat_errors_with_and_without_text(sim: Simulator, http: aiohttp.ClientSession) -> None:
    late = await _chunks(sim, http, "[[error_flat]]")
    assert (late[-1]["choices"][0]["finish_reason"], late[-1]["error"]["code"]) == ("error", 429)
    first = await _chunks(sim, http, "[[error_flat after=0]]")
    assert [(chunk["choices"], chunk["error"]["code"]) for chunk in first] == [([], 429)]


# ── How it delivers ──────────────────────────────────────────────────────────


async def test_drip_keeps_its_rate_and_loses_nothing(sim: Simulator, http: aiohttp.ClientSession) -> None:
    began = time.monotonic()
    events = await _stream(sim, http, "[[drip rate=200 tokens=60]]")
    took = time.monotonic() - began
    assert _text(events) == "".join(f"word{number} " for number in range(60))
    assert took >= 60 / 200


async def test_many_drips_at_once(sim: Simulator, http: aiohttp.ClientSession) -> None:
    streams = await asyncio.gather(*(_stream(sim, http, "[[drip rate=100 tokens=30]]") for _ in range(60)))
    assert {_text(events) for events in streams} == {"".join(f"word{number} " for number in range(30))}


async def test_burst_and_chat_burst_are_whole(sim: Simulator, http: aiohttp.ClientSession) -> None:
    expected = "".join(f"word{number} " for number in range(3000))
    assert _text(await _stream(sim, http, "[[burst tokens=3000]]")) == expected
    chunks = await _chunks(sim, http, "[[burst tokens=3000]]")
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks if c["choices"]) == expected


async def test_every_byte_alone(sim: Simulator, http: aiohttp.ClientSession) -> None:
    sizes = []
    async with http.post(f"{sim.base_url}/responses", json=_body("[[bytewise]]")) as answer:
        async for data, _ in answer.content.iter_chunks():
            sizes.append(len(data))
    assert (max(sizes), sum(sizes) > 3000) == (1, True)


async def test_comments_come_before_the_first_event(sim: Simulator, http: aiohttp.ClientSession) -> None:
    _, raw = await _post(sim, http, _body("[[keepalive comments=2 gap=0]]"))
    assert raw.startswith(b": OPENROUTER PROCESSING\n\n: OPENROUTER PROCESSING\n\ndata:")
    assert _types(_events(raw))[-1] == "response.completed"


async def test_eof_is_clean_and_abrupt_is_not(sim: Simulator, http: aiohttp.ClientSession) -> None:
    events = await _stream(sim, http, "[[eof]]")
    assert not {"response.completed"} & set(_types(events))
    assert len(_text(events).split()) == 3
    for text in ("[[abrupt]]", "[[abrupt how=reset]]"):
        with pytest.raises(aiohttp.ClientError):
            await _stream(sim, http, text)
        await sim.wait_until(lambda server: server.open == 0)
        assert sim.requests[-1].ended == "cut"


@pytest.mark.parametrize("text", ["[[stall]]", "[[stall_headers]]", "[[drip rate=5]]"])
async def test_a_client_that_goes_is_noticed_at_once(
    sim: Simulator, http: aiohttp.ClientSession, text: str
) -> None:
    reading = asyncio.create_task(_stream(sim, http, text))
    await sim.wait_until(lambda server: bool(server.requests) and server.requests[0].scenario != "")
    if text != "[[stall_headers]]":
        await sim.wait_until(lambda server: server.requests[0].streaming)
    assert sim.open == 1
    began = time.monotonic()
    reading.cancel()
    await sim.wait_until(lambda server: server.open == 0, timeout=1)
    assert time.monotonic() - began < 0.5
    assert sim.requests[0].ended == "client_disconnected"
    assert sim.requests[0].seconds is not None


async def test_aclose_ends_open_streams(http: aiohttp.ClientSession) -> None:
    sim = Simulator()
    await sim.start()
    reading = asyncio.create_task(_stream(sim, http, "[[stall]]"))
    await sim.wait_until(lambda server: bool(server.requests) and server.requests[0].streaming)
    await asyncio.wait_for(sim.aclose(), 3)
    with pytest.raises(aiohttp.ClientError):
        await asyncio.wait_for(reading, 3)
    assert sim.requests[0].ended == "server_stopped"


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.sse")), ids=lambda path: path.stem)
async def test_recordings_are_replayed_byte_for_byte(
    sim: Simulator, http: aiohttp.ClientSession, path: Path
) -> None:
    assert await _post(sim, http, _body(f"[[golden name={path.stem}]]")) == (200, _bytes(path))


async def test_any_bytes_can_be_replayed(sim: Simulator, http: aiohttp.ClientSession, tmp_path: Path) -> None:
    raw = b"data: not json\n\n: \xff\n\ndata: {}"
    file = tmp_path / "stream.sse"
    file.write_bytes(raw)
    for params in ({"base64": base64.b64encode(raw).decode()}, {"path": str(file)}):
        order = {"scenario": "replay", "params": params}
        async with http.post(f"{sim.root_url}/_control/next", json=order) as answer:
            assert answer.status == 200
        assert await _post(sim, http, _body("hi")) == (200, raw)
    sim.next("replay", body="data: é\n\n")
    assert await _post(sim, http, _body("hi")) == (200, "data: é\n\n".encode())
    status, answered = await _post(sim, http, _body(f"[[golden path={file}]]"))
    assert (status, raw in answered) == (200, False)  # a message may not name a file


async def test_router_metadata_on_request(
    sim: Simulator, http: aiohttp.ClientSession, strict: Schema
) -> None:
    headers = {"X-OpenRouter-Metadata": "enabled"}
    async with http.post(f"{sim.base_url}/responses", json=_body("hi"), headers=headers) as answer:
        last = _events(await answer.read())[-1]
        assert answer.headers["X-Generation-Id"] == last["response"]["id"]
    assert last["response"]["openrouter_metadata"]["requested"] == MODEL
    assert strict.event_problems(last) == []


# ── What it refuses ──────────────────────────────────────────────────────────


@pytest.mark.parametrize("case", _load("error_bodies.json")["cases"], ids=lambda case: case["name"])
async def test_every_error_body(sim: Simulator, http: aiohttp.ClientSession, case: Json) -> None:
    url, body = f"{sim.base_url}/responses", _body(f"[[http_error name={case['name']}]]")
    async with http.post(url, json=body) as answer:
        raw = await answer.text()
        assert answer.status == case["status"]
        for name, value in case["headers"].items():
            assert answer.headers[name].split(";")[0] == value
        assert (raw if isinstance(case["body"], str) else json.loads(raw)) == case["body"]


async def test_times_lets_a_retry_succeed(sim: Simulator, http: aiohttp.ClientSession) -> None:
    body = _body("[[http_error name=503_no_provider times=2 retry_after=0]] hello")
    assert [(await _post(sim, http, body))[0] for _ in range(4)] == [503, 503, 200, 200]


@pytest.mark.parametrize("case", _load("request_examples.json")["requests"], ids=lambda case: case["name"])
async def test_request_examples(sim: Simulator, http: aiohttp.ClientSession, case: Json) -> None:
    status, raw = await _post(sim, http, case["body"])
    assert status == (200 if case["valid"] else 400)
    if not case["valid"]:
        refusal = json.loads(raw)
        assert refusal["error"]["code"] == "invalid_prompt"
        assert "metadata" in refusal
        assert "metadata" not in refusal["error"]


CALL: Json = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
OUTPUT: Json = {"type": "function_call_output", "call_id": "c", "output": "x"}
SAID: Json = {"type": "output_text", "text": "x"}
USER: Json = {"role": "user", "content": "hi"}
PIXEL: Json = {"type": "input_image", "detail": "auto", "image_url": "data:image/png;base64,AA=="}


@pytest.mark.parametrize(
    ("status", "needle", "change"),
    [
        (400, "No tool output", {"input": [USER, CALL]}),
        (400, "No tool call", {"input": [USER, OUTPUT]}),
        (400, "No tool call", {"input": [USER, CALL, OUTPUT, OUTPUT]}),
        (400, "No tool call", {"input": [USER, OUTPUT, CALL]}),
        (400, "received null", {"tools": None}),
        (400, "received null", {"stream": None}),
        (400, "received null", {"input": [{"type": "reasoning", "id": "r", "summary": [], "content": None}]}),
        (400, "Input required", {"input": None, "_drop": "input"}),
        (400, "not a valid model ID", {"model": "acme/none-1"}),
        (400, "Required", {"text": {"format": {"type": "json_schema", "json_schema": {"name": "x"}}}}),
        (400, "At most 16", {"metadata": {str(number): "x" for number in range(17)}}),
        (400, "unique", {"tools": [WEATHER, WEATHER]}),
        (400, "function_name", {"tools": [WEATHER | {"name": "no spaces please"}]}),
        (400, "enum", {"reasoning": {"effort": "extreme"}}),
        (400, '\\"id\\"', {"input": [{"role": "assistant", "content": [SAID]}, USER]}),
        (400, "mandatory", {"model": REASONER, "reasoning": {"effort": "none"}}),
        (400, "greater", {"model": "anthropic/claude-sonnet-4.6", "reasoning": {"max_tokens": 2000},
                          "max_output_tokens": 2000}),
        (404, "image input", {"model": "deepseek/deepseek-r1-0528", "input": [USER | {"content": [PIXEL]}]}),
        (404, "output modalities: image, text", {"modalities": ["image", "text"]}),
        (404, "output modalities: image", {"modalities": ["image"]}),
        (404, "output modalities: text", {"model": PAINTER}),
        (404, "output modalities: text", {"model": PAINTER, "modalities": []}),
        (404, "output modalities: text", {"model": PAINTER, "modalities": ["text"]}),
        (404, "output modalities: image, text", {"model": PAINTER, "modalities": ["image", "text"]}),
        (404, "support tool use", {"model": "google/gemini-2.5-flash-image", "tools": [WEATHER]}),
        (404, "support tool use", {"model": "google/gemini-2.5-flash-image",
                                   "tools": [{"type": "openrouter:web_search"}]}),
        (400, "no scenario named", {"input": "[[nonsense]]"}),
    ],
)  # fmt: skip
async def test_refusals(
    sim: Simulator, http: aiohttp.ClientSession, status: int, needle: str, change: Json
) -> None:
    body = _body("hi") | change
    body.pop(body.pop("_drop", ""), None)
    answered, raw = await _post(sim, http, body)
    assert (answered, needle in raw.decode()) == (status, True), raw


@pytest.mark.parametrize(
    "change",
    [
        {"temperature": None, "metadata": None, "reasoning": None},
        {"model": "openai/gpt-4o-mini:nitro"},
        {"model": "@preset/mine"},
        {"model": "openai/gpt-4o-mini@preset/mine"},
        {"model": "nobody/x", "models": ["nobody/y", MODEL]},
        {"input": [USER, CALL, OUTPUT]},
        {"model": PAINTER, "modalities": ["image"]},
        {"model": "openai/gpt-5-image", "modalities": ["image", "text"], "tools": [WEATHER]},
        {"model": "google/gemini-2.5-flash-image", "tools": []},
        {"input": [USER, {"type": "openrouter:advisor", "id": "a", "status": "completed"}, USER]},
    ],
)
async def test_acceptances(sim: Simulator, http: aiohttp.ClientSession, change: Json) -> None:
    assert (await _post(sim, http, _body("hi") | change))[0] == 200


@pytest.mark.parametrize(
    "change",
    [
        {"modalities": 1.5},
        {"tools": {}},
        {"input": [None]},
        {"input": [{"type": []}]},
        {"input": [{"type": "reasoning", "id": "r", "summary": [], "content": [1]}, USER]},
        {"input": [{"role": [], "content": 3}]},
        {"reasoning": {"effort": {}}},
        {"plugins": [[]]},
        {"input": "[[drip rate=fast]]"},
        {"input": "[[tool]]", "tools": [WEATHER | {"parameters": {"required": [[]]}}]},
    ],
)
async def test_odd_bodies_are_refused_not_failed(
    sim: Simulator, http: aiohttp.ClientSession, change: Json
) -> None:
    status, raw = await _post(sim, http, _body("hi") | change)
    assert (status, "error" in json.loads(raw)) == (400, True)


async def test_an_unknown_path_is_recorded(sim: Simulator, http: aiohttp.ClientSession) -> None:
    assert (await _post(sim, http, {}, "/nowhere"))[0] == 404
    assert (sim.requests[0].status, sim.requests[0].ended) == (404, "completed")


async def test_an_alias_answers_with_the_name_of_its_target(
    sim: Simulator, http: aiohttp.ClientSession
) -> None:
    events = await _stream(sim, http, "hi", model="~anthropic/claude-sonnet-latest")
    assert events[-1]["response"]["model"] == "anthropic/claude-sonnet-4.6"


async def test_keys(http: aiohttp.ClientSession) -> None:
    async with Simulator(key="sk-right") as sim:
        found = {}
        for key in ("sk-right", "sk-wrong", "sk-bad-1", ""):
            headers = {"Authorization": f"Bearer {key}"}
            async with http.get(f"{sim.base_url}/key", headers=headers) as answer:
                found[key] = answer.status
        assert found == {"sk-right": 200, "sk-wrong": 401, "sk-bad-1": 401, "": 401}
    async with Simulator() as sim:
        headers = {"Authorization": "Bearer sk-bad"}
        async with http.post(f"{sim.base_url}/responses", json=_body("hi"), headers=headers) as answer:
            assert answer.status == 401
            assert await answer.json() == {"error": {"code": 401, "message": "User not found."}}


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [{"role": "tool", "tool_call_id": "x", "content": "y"}],
        [{"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": [{"id": "x"}]}],
        [{"role": "narrator", "content": "y"}],
    ],
)
async def test_chat_refusals(sim: Simulator, http: aiohttp.ClientSession, messages: list[Json]) -> None:
    status, raw = await _post(sim, http, {"model": MODEL, "messages": messages}, "/chat/completions")
    assert (status, json.loads(raw)["error"]["code"]) == (400, 400)


# ── The catalog and the account ──────────────────────────────────────────────


async def test_catalog_rows_are_models_and_filter_by_modality(
    http: aiohttp.ClientSession, strict: Schema
) -> None:
    async with Simulator() as sim:
        async with http.get(f"{sim.base_url}/models") as answer:
            shown = (await answer.json())["data"]
        async with http.get(f"{sim.base_url}/models", params={"output_modalities": "all"}) as answer:
            every = await answer.json()
    assert [problem for row in every["data"] for problem in strict.problems("Model", row)] == []
    assert every["total_count"] == len(simulator.CATALOG)
    hidden = {row["id"] for row in every["data"]} - {row["id"] for row in shown}
    assert hidden == {"black-forest-labs/flux.2-pro"}


async def test_an_own_catalog_and_the_small_endpoints(http: aiohttp.ClientSession) -> None:
    rows = _load("models_catalog.json")["data"]
    async with Simulator(catalog=rows) as sim:
        async with http.get(f"{sim.base_url}/models/user", params={"output_modalities": "all"}) as answer:
            assert (await answer.json())["data"] == rows
        async with http.get(f"{sim.base_url}/models/openai/gpt-5/endpoints") as answer:
            data = (await answer.json())["data"]
        assert data.keys() == _load("model_endpoints.json")["data"].keys()
        assert data["endpoints"][0].keys() == _load("model_endpoints.json")["data"]["endpoints"][0].keys()
        for name in ("key", "credits"):
            async with http.get(f"{sim.base_url}/{name}") as answer:
                known = _load(f"{name}.json")["data"].keys() - {"rate_limit"}
                assert (await answer.json())["data"].keys() == known
        assert (await _stream(sim, http, "hi", model="z-ai/glm-4.6"))[-1]["response"][
            "model"
        ] == "z-ai/glm-4.6"


async def _get(
    sim: Simulator, http: aiohttp.ClientSession, path: str, **headers: str
) -> tuple[int, Any, Mapping[str, str]]:
    """Status, JSON (None without a body) and headers of a GET; `_` in header names stands for `-`."""
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    async with http.get(sim.base_url + path, headers=sent) as answer:
        raw = await answer.read()
        return answer.status, json.loads(raw) if raw else None, answer.headers


async def _ids(sim: Simulator, http: aiohttp.ClientSession, path: str) -> list[str]:
    _, found, _ = await _get(sim, http, path)
    return [row["id"] for row in found["data"]]


async def _settings(sim: Simulator, http: aiohttp.ClientSession, body: Any) -> tuple[int, Json]:
    async with http.post(f"{sim.root_url}/_control/settings", json=body) as answer:
        return answer.status, await answer.json()


async def test_endpoints_with_zero_data_retention(
    sim: Simulator, http: aiohttp.ClientSession, strict: Schema
) -> None:
    status, found, _ = await _get(sim, http, "/endpoints/zdr")
    assert status == 200
    assert [problem for row in found["data"] for problem in strict.problems("PublicEndpoint", row)] == []
    listed = {row["model_id"] for row in found["data"]}
    assert {"anthropic/claude-sonnet-4.6", "google/gemini-2.5-pro"} <= listed
    assert listed.isdisjoint({MODEL, "openai/gpt-oss-20b:free", "~anthropic/claude-sonnet-latest"})
    assert len({row["tag"] for row in found["data"]}) == 2
    private = await _ids(sim, http, "/models?zdr=true&output_modalities=all")
    assert set(private) == listed | {"~anthropic/claude-sonnet-latest"}
    _, counted, _ = await _get(sim, http, "/models/count?zdr=true&output_modalities=all")
    assert counted["data"]["count"] == len(private)


async def test_the_models_with_zero_data_retention_can_be_set(http: aiohttp.ClientSession) -> None:
    async with Simulator(zdr_models=[MODEL, "acme/gone-2025-01-01"]) as sim:
        _, found, _ = await _get(sim, http, "/endpoints/zdr")
        assert [row["model_id"] for row in found["data"][::2]] == [MODEL, "acme/gone-2025-01-01"]
        assert await _ids(sim, http, "/models?zdr=true") == [MODEL]
        sim.configure(zdr_models=[simulator.CATALOG[0]["canonical_slug"]])
        assert await _ids(sim, http, "/models?zdr=true") == [simulator.CATALOG[0]["id"]]
        assert await _settings(sim, http, {"zdr_models": []}) == (200, {"models": len(simulator.CATALOG)})
        assert (await _get(sim, http, "/endpoints/zdr"))[1] == {"data": []}
        assert await _ids(sim, http, "/models?zdr=true") == []


async def test_the_models_of_the_key_can_be_fewer(sim: Simulator, http: aiohttp.ClientSession) -> None:
    every = await _ids(sim, http, "/models")
    assert await _ids(sim, http, "/models/user") == every
    sim.configure(user_models=[MODEL, PAINTER])
    assert await _ids(sim, http, "/models/user") == [MODEL]
    assert await _ids(sim, http, "/models/user?output_modalities=all") == [MODEL, PAINTER]
    assert await _ids(sim, http, "/models") == every
    for key in ("", "sk-bad"):
        assert (await _get(sim, http, "/models/user", Authorization=f"Bearer {key}"))[0] == 401


@pytest.mark.parametrize("path", ["/models", "/models/user"])
@pytest.mark.parametrize(("etag", "shape"), [("weak", r'W/"\w+"'), ("strong", r'"\w+"')])
async def test_a_known_list_is_not_sent_again(
    http: aiohttp.ClientSession, path: str, etag: str, shape: str
) -> None:
    async with Simulator(etag=etag) as sim:
        status, old, headers = await _get(sim, http, path)
        mark = headers["ETag"]
        assert (status, bool(re.fullmatch(shape, mark))) == (200, True)
        for known in (mark, f'"other", {mark}', "*", mark.removeprefix("W/")):
            status, body, headers = await _get(sim, http, path, If_None_Match=known)
            assert (status, body, headers["ETag"]) == (304, None, mark)
            assert "Cache-Control" in headers
        assert (await _get(sim, http, path, If_None_Match='"other"'))[0] == 200
        sim.configure(catalog=old["data"][:2])
        status, new, headers = await _get(sim, http, path, If_None_Match=mark)
        assert (status, new["data"]) == (200, old["data"][:2])
        assert headers["ETag"] != mark
        assert sim.statuses(path) == [200, 304, 304, 304, 304, 200, 200]
        assert sim.requests[1].headers["if-none-match"] == mark


async def test_a_server_without_etags(http: aiohttp.ClientSession) -> None:
    async with Simulator(etag="off") as sim:
        status, _, headers = await _get(sim, http, "/models", If_None_Match="*")
        assert (status, "ETag" in headers) == (200, False)


JUNK: list[Any] = [
    *(None, 5, "x", [], {}, {"id": None}, {"id": ["a"]}),
    {"id": "a/1", "architecture": "text"},
    {"id": "a/2", "architecture": {"output_modalities": [1, "text"]}, "pricing": {"prompt": "?"}},
    {"id": "a/2", "name": 3, "supported_parameters": [{}, None], "reasoning": True},
]


async def test_the_catalog_can_be_changed_while_it_runs(sim: Simulator, http: aiohttp.ClientSession) -> None:
    for rows in ([], JUNK, [simulator.CATALOG[1]]):
        assert await _settings(sim, http, {"catalog": rows}) == (200, {"models": len(rows)})
        for path in ("/models", "/models/user", "/models?output_modalities=all&zdr=false"):
            _, found, _ = await _get(sim, http, path)
            assert (found["data"], found["total_count"]) == (rows, len(rows))
        assert (await _get(sim, http, "/models?zdr=true&q=b"))[1]["data"] == []
    assert (await _post(sim, http, _body("hi")))[0] == 400
    sim.reset()
    assert list(sim.catalog) == [row["id"] for row in simulator.CATALOG]
    assert (await _post(sim, http, _body("hi")))[0] == 200


async def test_an_empty_catalog_has_no_first_model(http: aiohttp.ClientSession) -> None:
    async with Simulator(catalog=[]) as sim:
        for change in ({"_": 0}, {"model": "@preset/mine"}, {"model": "#0"}):
            body = {"input": "hi", **change}
            status, raw = await _post(sim, http, body)
            assert (status, "not a valid model ID" in raw.decode()) == (400, True)


@pytest.mark.parametrize("model", ["a/1", "a/2"])
async def test_a_garbled_model_with_an_id_answers(http: aiohttp.ClientSession, model: str) -> None:
    async with Simulator(catalog=JUNK) as sim:
        final = (await _stream(sim, http, "hi", model=model, tools=[WEATHER]))[-1]["response"]
        assert (final["model"], final["usage"]["cost"]) == (model, 0)
        assert (await _get(sim, http, f"/models/{model}/endpoints"))[0] == 200


async def test_the_account_can_be_set(http: aiohttp.ClientSession) -> None:
    async with Simulator(credits_need_management_key=True, key_info={"limit_remaining": None}) as sim:
        _, known, _ = await _get(sim, http, "/key")
        assert (known["data"]["limit_remaining"], known["data"]["limit"]) == (None, 25)
        status, refusal, _ = await _get(sim, http, "/credits")
        assert (status, refusal["error"]["code"]) == (403, 403)
        sim.configure(key_info={"is_management_key": True}, credits={"total_usage": 101})
        assert (await _get(sim, http, "/credits"))[:2] == (
            200,
            {"data": {"total_credits": 100.5, "total_usage": 101}},
        )
        assert (await _get(sim, http, "/key"))[1]["data"]["limit_remaining"] == 25
        sim.reset()
        assert (await _get(sim, http, "/credits"))[0] == 403


@pytest.mark.parametrize(
    "body",
    [
        [],
        5,
        {"nonsense": 1},
        {"catalog": {}},
        {"zdr_models": [1]},
        {"user_models": "a/1"},
        {"key_info": None},
        {"etag": "soft"},
        {"etag": None},
        {"etag": "off", "credits_need_management_key": 1},
    ],
)
async def test_unusable_settings_change_nothing(
    sim: Simulator, http: aiohttp.ClientSession, body: Any
) -> None:
    status, refusal = await _settings(sim, http, body)
    assert (status, "catalog" in refusal["settings"]) == (400, True)
    assert "ETag" in (await _get(sim, http, "/models"))[2]
    if isinstance(body, dict):
        with pytest.raises(ValueError, match=list(body)[-1]):
            Simulator(**body)


PATHS = ["/models", "/models/user", "/models/count", "/endpoints/zdr", "/key", "/credits"]


@pytest.mark.parametrize("path", PATHS)
async def test_every_list_can_fail_and_stall(sim: Simulator, http: aiohttp.ClientSession, path: str) -> None:
    sim.next("http_error", name="503_no_provider", on=path)
    sim.next("stall_headers", wait=0, on=path)
    sim.next("stall_headers", on=path)
    assert [(await _get(sim, http, path))[0] for _ in range(2)] == [503, 200]
    waiting = asyncio.create_task(_get(sim, http, path))
    await sim.wait_until(lambda server: len(server.requests) == 3)
    assert (sim.open, sim.statuses(path)) == (1, [503, 200])
    waiting.cancel()
    await sim.wait_until(lambda server: server.open == 0)
    assert sim.requests[-1].ended == "client_disconnected"


def test_a_synthetic_catalog_is_like_a_real_one(strict: Schema) -> None:
    rows = simulator.synthetic_catalog(1000)
    assert rows == simulator.synthetic_catalog(1000)
    assert rows[:50] == simulator.synthetic_catalog(50)
    assert [row["id"] for row in rows[: len(simulator.CATALOG)]] == [row["id"] for row in simulator.CATALOG]
    assert [problem for row in rows for problem in strict.problems("Model", row)] == []
    assert len({row["id"] for row in rows}) == len({row["name"] for row in rows}) == 1000
    assert len({row["id"].split("/")[0] for row in rows}) >= 20
    assert {300 <= len(row["description"]) <= 800 for row in rows} == {True}
    assert 1_500 < sum(len(json.dumps(row)) for row in rows) / 1000 < 3_000
    assert 200 < sum("reasoning" in row for row in rows) < 800
    assert [len(simulator.synthetic_catalog(count)) for count in (-1, 0, 3)] == [0, 0, 3]


def test_a_synthetic_catalog_is_the_callers_own() -> None:
    before = copy.deepcopy(simulator.CATALOG)
    for row in simulator.synthetic_catalog(40):
        row["architecture"]["input_modalities"].clear()
        row["pricing"].clear()
        row["top_provider"].clear()
    assert before == simulator.CATALOG


# ── The record and the controls ──────────────────────────────────────────────


async def test_the_record(sim: Simulator, http: aiohttp.ClientSession) -> None:
    body = _body("hi", stop=["x"])
    headers = {"X-OpenRouter-Title": "T", "X-Other": "no", "Authorization": "Bearer sk-secret"}
    async with http.post(f"{sim.base_url}/responses", json=body, headers=headers) as answer:
        await answer.read()
    async with http.get(f"{sim.root_url}/_control/requests") as answer:
        (record,) = (await answer.json())["requests"]
    assert (record["method"], record["path"], record["status"]) == ("POST", "/api/v1/responses", 200)
    assert (record["body"], record["unknown"], record["ended"]) == (body, ["stop"], "completed")
    assert (record["scenario"], record["length"] > 40, record["streaming"]) == ("plain", True, True)
    assert record["headers"]["x-openrouter-title"] == "T"
    assert "x-other" not in record["headers"]
    assert "sk-secret" not in str(record)
    assert record["headers"]["authorization"] == f"Bearer #{record['key']}"


async def test_connections_are_told_apart(sim: Simulator, http: aiohttp.ClientSession) -> None:
    await _stream(sim, http, "one")
    await _stream(sim, http, "two")
    await asyncio.gather(*(_stream(sim, http, "[[drip rate=50 tokens=5]]") for _ in range(2)))
    assert [record.connection for record in sim.requests[:2]] == [1, 1]
    assert {record.connection for record in sim.requests} == {1, 2}


async def test_the_queue_over_http(sim: Simulator, http: aiohttp.ClientSession) -> None:
    order = {"scenario": "http_error", "params": {"name": "529_overloaded"}, "times": 2}
    async with http.post(f"{sim.root_url}/_control/next", json=order) as answer:
        assert await answer.json() == {"queued": 1}
    sim.next("empty")
    assert [(await _post(sim, http, _body("hi")))[0] for _ in range(2)] == [529, 529]
    assert (await _stream(sim, http, "hi"))[-1]["response"]["output"] == []
    assert "hi" in _text(await _stream(sim, http, "hi"))
    async with http.post(f"{sim.root_url}/_control/next", json={"scenario": "nonsense"}) as answer:
        assert (answer.status, "plain" in (await answer.json())["scenarios"]) == (400, True)


async def test_reset_and_open(sim: Simulator, http: aiohttp.ClientSession) -> None:
    sim.next("stall")
    reading = asyncio.create_task(_stream(sim, http, "hi"))
    await sim.wait_until(lambda server: bool(server.requests) and server.requests[0].streaming)
    async with http.get(f"{sim.root_url}/_control/open") as answer:
        assert await answer.json() == {"open": 1}
    sim.next("http_error", times=9)
    async with http.post(f"{sim.root_url}/_control/reset") as answer:
        assert answer.status == 200
    assert [record.ended for record in sim.requests] == ["open"]
    assert (await _post(sim, http, _body("hi")))[0] == 200
    reading.cancel()
    await sim.wait_until(lambda server: server.open == 0)


async def test_the_queue_can_reach_the_catalog(sim: Simulator, http: aiohttp.ClientSession) -> None:
    sim.next("http_error", name="502_html", on="/models")
    assert (await _post(sim, http, _body("hi")))[0] == 200
    statuses = []
    for _ in range(2):
        async with http.get(f"{sim.base_url}/models") as answer:
            statuses.append(answer.status)
    assert statuses == [502, 200]


@pytest.mark.parametrize("word", sorted(WORDS))
async def test_plain_words_choose_scenarios(sim: Simulator, http: aiohttp.ClientSession, word: str) -> None:
    tools = [WEATHER, {"type": "openrouter:web_search"}, {"type": "openrouter:image_generation"}]
    request = asyncio.create_task(_post(sim, http, _body(f"Please {word.upper()}, now", tools=tools)))
    await sim.wait_until(lambda server: bool(server.requests) and server.requests[0].scenario != "")
    assert sim.requests[0].scenario == WORDS[word][0]
    request.cancel()
    await asyncio.wait([request])


def test_the_page_names_every_scenario_word_and_setting() -> None:
    page = PAGE.read_text(encoding="utf-8")
    names = [*SCENARIOS, *WORDS, *simulator.HTTP_ERRORS, *simulator.Settings.__annotations__]
    missing = [name for name in names if f"`{name}`" not in page]
    assert missing == []


async def test_a_large_catalog_from_the_command_line(http: aiohttp.ClientSession) -> None:
    server = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "openrouter_responses_pipe.simulator", "--models", "1000",
        cwd=ROOT, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert server.stdout is not None
    base_url = (await asyncio.wait_for(server.stdout.readline(), 20)).decode().split()[-1]
    async with http.get(f"{base_url}/models?output_modalities=all") as answer:
        assert (await answer.json())["data"] == simulator.synthetic_catalog(1000)
    server.send_signal(signal.SIGINT)
    assert await asyncio.wait_for(server.communicate(), 20) == (b"", b"")


async def test_the_command_line(http: aiohttp.ClientSession, tmp_path: Path) -> None:
    catalog = tmp_path / "catalog.json"
    catalog.write_text(json.dumps({"data": [simulator.CATALOG[0]]}), encoding="utf-8")
    command = [sys.executable, "-m", "openrouter_responses_pipe.simulator", "--catalog", str(catalog)]
    server = await asyncio.create_subprocess_exec(
        *command, cwd=ROOT, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    assert server.stdout is not None
    line = (await asyncio.wait_for(server.stdout.readline(), 20)).decode()
    base_url = line.split()[-1]
    async with http.get(f"{base_url}/models") as answer:
        assert [row["id"] for row in (await answer.json())["data"]] == [simulator.CATALOG[0]["id"]]
    port = base_url.split(":")[2].split("/")[0]
    second = await asyncio.create_subprocess_exec(
        *command, "--port", port, cwd=ROOT, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    _, complaint = await asyncio.wait_for(second.communicate(), 20)
    assert (second.returncode, complaint.decode().count("\n")) == (1, 1)
    server.send_signal(signal.SIGINT)
    rest, errors = await asyncio.wait_for(server.communicate(), 20)
    assert (server.returncode, rest, errors) == (0, b"", b"")
