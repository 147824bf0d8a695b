"""One chat request from start to end, in every dialect: what is answered, told, and sent upstream."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import re
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any

import pytest
from test_emitters import check_rules

from openrouter_responses_pipe.openrouter_responses_pipe import (
    ChatRequest,
    HostCall,
    HostEnvironment,
    Pipe,
    Runtime,
    Valves,
)
from openrouter_responses_pipe.simulator import CATALOG, HTTP_ERRORS, Simulator
from pytest_bootstrap import HostFiles
from tests.support import (
    DIALECTS,
    EVENT_STREAM,
    KEY,
    MODEL,
    PATIENCE_S,
    STREAMS,
    TRANSCRIPTS,
    Answer,
    Events,
    Handler,
    arguments,
    ask,
    call,
    completed,
    delta,
    frame,
    hostile,
    inferences,
    read_request,
    read_until_text,
    running_pipe,
    set_valves,
    without_pictures,
)

Json = dict[str, Any]
ALL = sorted(DIALECTS)
IN_A_CHAT = ["browser", "browser_json"]
TASKS = ["task", "task_stream"]
WITH_CALLS = ["api_json", "api_stream", "browser", "task_stream"]
WITH_REASONING = ["api_json", "api_stream", "browser", "browser_json", "task_stream"]


def serving(answer: bytes) -> Handler:
    """A handler that knows the catalog and answers everything else with these bytes."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        line, _, _ = await read_request(reader)
        if "/models" in line:
            head = EVENT_STREAM.replace(b"text/event-stream", b"application/json")
            writer.write(head + json.dumps({"data": CATALOG}).encode())
        else:
            writer.write(answer)
        await writer.drain()

    return handle


# The same answer in every dialect


@pytest.mark.parametrize("dialect", ALL)
async def test_an_answer(dialect: str, pipe: Pipe, simulator: Simulator) -> None:
    answer = await ask(pipe, '[[plain text="Naïve 漢字 👩‍👩‍👧\\n\\n**bold**"]]', dialect)
    assert answer.text == "Naïve 漢字 👩‍👩‍👧\n\n**bold**"
    assert answer.error == ""
    assert answer.finish == ("completed" if dialect == "browser" else "stop")
    assert inferences(simulator)[0].body["stream"] is True


def whole_text(expect: Json) -> str:
    """The text of a recorded stream as a person sees it; a refusal is part of it."""
    return expect["text"] + expect.get("refusal", "")


@pytest.mark.parametrize("dialect", ALL)
@pytest.mark.parametrize("name", STREAMS)
async def test_a_recorded_stream(
    name: str, dialect: str, pipe: Pipe, simulator: Simulator, files: HostFiles
) -> None:
    simulator.next("golden", name=name, tasks=True)
    expect = TRANSCRIPTS[name]["expect"]
    answer = await ask(pipe, "hello", dialect)
    failed = expect["terminal"] not in ("completed", "incomplete")
    if not failed or dialect not in ("api_json", "task"):
        text, pictures = without_pictures(answer.text)
        assert text == whole_text(expect)
        assert len(pictures) == (0 if dialect in TASKS else len(expect.get("images", ())))
    assert bool(answer.error) is failed
    if failed:
        one_sentence(answer.error)
    if dialect in WITH_REASONING and (not failed or dialect != "api_json"):
        reasoning = [*expect.get("reasoning_summary", ()), *expect.get("reasoning_text", ())]
        assert answer.reasoning == "\n\n".join(reasoning)
    _compare_calls(answer, expect, dialect)
    _compare_usage(answer, expect.get("usage"), dialect)


def _compare_calls(answer: Answer, expect: Json, dialect: str) -> None:
    expected = [(call["name"], call["arguments"]) for call in expect.get("tool_calls", ())]
    told = [(call["name"], json.loads(call["arguments"])) for call in answer.calls]
    assert sorted(told, key=str) == (sorted(expected, key=str) if dialect != "task" else [])


def _compare_usage(answer: Answer, usage: Json | None, dialect: str) -> None:
    if usage is None:
        assert answer.usage is None
        return
    assert answer.usage is not None
    if dialect in IN_A_CHAT:
        assert answer.usage == usage
    else:
        assert answer.usage["prompt_tokens"] == usage["input_tokens"]
        assert answer.usage["completion_tokens"] == usage["output_tokens"]
        assert answer.usage["cost"] == usage["cost"]


@pytest.mark.parametrize("dialect", IN_A_CHAT)
@pytest.mark.parametrize("name", STREAMS)
async def test_what_is_saved_is_what_was_shown(
    name: str, dialect: str, pipe: Pipe, simulator: Simulator, files: HostFiles
) -> None:
    simulator.next("golden", name=name)
    expect = TRANSCRIPTS[name]["expect"]
    answer = await ask(pipe, "hello", dialect)
    text, pictures = without_pictures(answer.saved_text())
    assert (text, pictures) == (whole_text(expect), without_pictures(answer.text)[1])
    assert len(pictures) == len(expect.get("images", ()))
    saved = json.dumps(answer.chunks, ensure_ascii=False)
    assert not re.search("[\ud800-\udfff]", saved)


@pytest.mark.parametrize("scenario", ["tool", "tools", "tool_whole"])
async def test_the_dialects_tell_the_same_calls(scenario: str, pipe: Pipe, simulator: Simulator) -> None:
    tools = [{"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}]
    told = []
    for dialect in WITH_CALLS:
        simulator.next(scenario)
        answer = await ask(pipe, "hello", dialect, tools=tools)
        told.append(answer.calls)
        if dialect != "browser":
            assert answer.finish == "tool_calls"
    assert told[0]
    assert told == [told[0]] * len(told)


@pytest.mark.parametrize(
    ("scenario", "finish"), [("incomplete", "length"), ("content_filter", "content_filter")]
)
@pytest.mark.parametrize("dialect", ["api_json", "api_stream", "task", "task_stream"])
async def test_an_answer_that_was_cut_short_says_so_to_a_program(
    scenario: str, finish: str, dialect: str, pipe: Pipe, simulator: Simulator
) -> None:
    simulator.next(scenario, tasks=True)
    answer = await ask(pipe, "hello", dialect)
    assert (bool(answer.text), answer.finish, answer.error) == (True, finish, "")


# What the person is told beside the answer


@pytest.mark.parametrize("dialect", IN_A_CHAT)
@pytest.mark.parametrize(
    ("scenario", "words"),
    [
        ("incomplete", "output limit"),
        ("content_filter", "content filter"),
        ("empty", "empty answer"),
        ("plain", "tokens in"),
    ],
)
async def test_the_last_status(
    scenario: str, words: str, dialect: str, pipe: Pipe, simulator: Simulator
) -> None:
    simulator.next(scenario)
    given = arguments("hello", dialect)
    await call(pipe, given)
    status = given["__event_emitter__"].of("status")[-1]
    assert words in status["description"]
    assert status["done"] is True


@pytest.mark.parametrize("scenario", ["web_search", "or_search"])
async def test_sources_are_told_once_and_to_the_client_that_reads_them(
    scenario: str, pipe: Pipe, simulator: Simulator
) -> None:
    urls = {}
    for dialect in ("browser", "browser_json", "api_stream", "api_json"):
        simulator.next(scenario)
        given = arguments("hello", dialect)
        answer = await call(pipe, given)
        sources = given["__event_emitter__"].of("source")
        if dialect in IN_A_CHAT:
            urls[dialect] = [source["source"]["url"] for source in sources]
        else:
            assert sources == []
            urls[dialect] = _cited(answer)
    assert urls["browser"]
    assert len(set(urls["browser"])) == len(urls["browser"])
    assert list(urls.values()) == [urls["browser"]] * 4


def _cited(answer: Answer) -> list[str]:
    choices = [choice for chunk in answer.chunks for choice in chunk.get("choices", ())]
    said = [choice.get("delta") or choice.get("message") or {} for choice in choices]
    notes = [note for part in said for note in part.get("annotations", ())]
    return [note["url_citation"]["url"] for note in notes]


@pytest.mark.parametrize("dialect", IN_A_CHAT)
async def test_what_was_left_out_is_told(dialect: str, pipe: Pipe, simulator: Simulator) -> None:
    blocks = [{"type": "text", "text": "What is this?"}, {"type": "hologram", "hologram": {}}]
    given = arguments({"messages": [{"role": "user", "content": blocks}]}, dialect)
    answer = await call(pipe, given)
    assert answer.text
    (notification,) = given["__event_emitter__"].of("notification")
    told = notification["content"]
    assert "Not sent to the model" in told
    assert told.rstrip(".") in given["__event_emitter__"].statuses()[-1]


@pytest.mark.parametrize("dialect", sorted(set(DIALECTS) - set(IN_A_CHAT)))
async def test_a_program_is_told_nothing_by_events(dialect: str, pipe: Pipe, simulator: Simulator) -> None:
    simulator.next("or_search", tasks=True)
    given = arguments("hello", dialect)
    assert (await call(pipe, given)).text
    assert given["__event_emitter__"] == []


async def test_the_line_of_another_try_is_ended_when_its_answer_begins(
    pipe: Pipe, simulator: Simulator
) -> None:
    set_valves(pipe, simulator.base_url, RETRY_ATTEMPTS=1)
    simulator.next("http_error", name="503_no_provider", retry_after=0)
    simulator.next("drip", rate=50, tokens=10_000)
    given = arguments("hello")
    chunks = await pipe.pipe(**given)
    assert not isinstance(chunks, dict)
    async with contextlib.aclosing(chunks):
        await read_until_text(chunks, Answer())
        begun, ended = given["__event_emitter__"].of("status")
    assert (begun["done"], "again in 1 s" in begun["description"]) == (False, True)
    assert (ended["done"], ended["hidden"]) == (True, True)


@pytest.mark.parametrize(
    ("status", "told"),
    [
        ("completed", ["Searching the web: cats", "Searched the web: cats"]),
        ("failed", ["Searching the web: cats", "The web search failed: cats"]),
    ],
)
async def test_a_search_of_the_server_is_told(
    status: str, told: list[str], pipe: Pipe, simulator: Simulator
) -> None:
    item = {"type": "web_search_call", "id": "w", "action": {"type": "search", "query": "cats"}}
    added = frame("response.output_item.added", output_index=1, item={**item, "status": "in_progress"})
    done = frame("response.output_item.done", output_index=1, item={**item, "status": status})
    simulator.next("replay", body=(added + done + delta("fine") + completed()).decode())
    given = arguments("hello")
    assert (await call(pipe, given)).text == "fine"
    assert [words.partition(" · ")[0] for words in given["__event_emitter__"].statuses()[:2]] == told


async def test_waiting_for_another_try_is_told(pipe: Pipe, simulator: Simulator) -> None:
    set_valves(pipe, simulator.base_url, RETRY_ATTEMPTS=1)
    simulator.next("http_error", name="503_no_provider", retry_after=0)
    given = arguments("hello")
    answer = await call(pipe, given)
    assert (bool(answer.text), answer.error) == (True, "")
    assert "again in 1 s" in given["__event_emitter__"].statuses()[0]
    assert given["__event_emitter__"].of("status")[-1]["done"] is True


async def test_no_status_stays_open_after_a_failure(pipe: Pipe, simulator: Simulator) -> None:
    set_valves(pipe, simulator.base_url, RETRY_ATTEMPTS=1)
    simulator.next("http_error", name="503_no_provider", retry_after=0, times=math.inf)
    given = arguments("hello")
    assert (await call(pipe, given)).error
    assert given["__event_emitter__"].of("status")[-1]["done"] is True


@pytest.mark.parametrize(
    "usage",
    [
        {"input_tokens": "many", "output_tokens": None, "cost": "free"},
        {"input_tokens": 1, "input_tokens_details": {"cached_tokens": "3"}, "output_tokens": 2},
        {"output_tokens": 2, "output_tokens_details": {"reasoning_tokens": [1]}},
        {"input_tokens_details": 7, "output_tokens_details": "x", "cost": -1},
        {"input_tokens": -5, "output_tokens": 1e300, "cost": 1e-300},
        {"input_tokens": True, "output_tokens": {}, "cost": True},
        {"input_tokens": math.inf, "output_tokens": 2, "cost": math.inf},
        {"input_tokens": 1, "output_tokens": math.nan, "cost": math.nan},
        {"input_tokens": 1, "output_tokens": 2, "cost": -math.inf},
    ],
    ids=str,
)
@pytest.mark.parametrize("dialect", ALL)
async def test_odd_usage_harms_nothing(usage: Json, dialect: str, pipe: Pipe, simulator: Simulator) -> None:
    simulator.next("replay", body=(delta("fine") + completed(usage=usage)).decode(), tasks=True)
    answer = await ask(pipe, "hello", dialect)
    assert (answer.text, answer.error) == ("fine", "")


@pytest.mark.parametrize("dialect", IN_A_CHAT)
@pytest.mark.parametrize("cost", ["1e400", "Infinity", "NaN"])
async def test_a_cost_without_measure_is_not_shown(
    cost: str, dialect: str, pipe: Pipe, simulator: Simulator
) -> None:
    end = completed(usage={"output_tokens": 2, "cost": 0.125}).decode().replace("0.125", cost)
    simulator.next("replay", body=delta("fine").decode() + end)
    given = arguments("hello", dialect)
    assert (await call(pipe, given)).text == "fine"
    last = given["__event_emitter__"].statuses()[-1]
    assert "2 out" in last
    assert not re.search(r"\$|inf|nan", last)


# Failures: one sentence, and what was shown stays


def one_sentence(told: str) -> None:
    """Something to read for a person: no markup, no traceback, no key."""
    assert told
    assert told[-1] in ".!?"
    assert not re.search(r"<\w|Traceback|\n|user_2abc", told)
    assert KEY not in told


# `400_wrong_endpoint` is no refusal in the end: the other endpoint answers (test_chat_fallback.py).
@pytest.mark.parametrize("name", sorted(set(HTTP_ERRORS) - {"400_wrong_endpoint"}))
async def test_every_refusal_becomes_words(name: str, pipe: Pipe, simulator: Simulator) -> None:
    told = set()
    for dialect in ALL:
        simulator.next("http_error", name=name, tasks=True)
        answer = await ask(pipe, "hello", dialect)
        assert answer.text == ""
        told.add(re.sub(r"\d+ (second|minute|hour)s", "a while", answer.error))
    assert len(told) == 1
    one_sentence(told.pop())


REFUSED_KEY: Json = {"code": 401, "message": f"Incorrect API key provided: {KEY}. Of user_2abcDEF"}


@pytest.mark.parametrize("dialect", ALL)
@pytest.mark.parametrize("place", ["status 401", "status 200", "error", "response.failed"])
async def test_no_error_shows_the_key(place: str, dialect: str) -> None:
    failed = {"status": "failed", "error": {**REFUSED_KEY, "code": "server_error"}}
    inside = {
        "error": frame("error", error=REFUSED_KEY),
        "response.failed": frame("response.failed", response=failed),
    }
    body = inside.get(place) or json.dumps({"error": REFUSED_KEY, "user_id": "user_2abcDEF"}).encode()
    kind = "text/event-stream" if place in inside else "application/json"
    status = "401 No" if place == "status 401" else "200 OK"
    head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nConnection: close\r\n\r\n"
    async with hostile(serving(head.encode() + body)) as url, running_pipe(url) as pipe:
        given = arguments("hello", dialect)
        answer = await call(pipe, given)
    one_sentence(answer.error)
    assert "Incorrect API key provided: [" in answer.error
    everything = json.dumps([answer.chunks, given["__event_emitter__"]])
    assert KEY not in everything
    assert "user_2abc" not in everything


REASONING = frame("response.reasoning_summary_text.delta", output_index=1, summary_index=0, delta="hm")
SOURCE = frame(
    "response.output_text.annotation.added",
    output_index=0,
    annotation={"type": "url_citation", "url": "https://a.example", "title": "A \ud83d", "content": "\ude00"},
)
BAD_ERROR = frame("error", error={"code": 500, "message": "bad \ud83d half"})


@pytest.mark.parametrize("dialect", ALL)
@pytest.mark.parametrize("between", [b"", REASONING, SOURCE], ids=["nothing", "reasoning", "source"])
@pytest.mark.parametrize("end", [completed(), BAD_ERROR], ids=["completed", "error"])
async def test_no_half_character_leaves(
    end: bytes, between: bytes, dialect: str, pipe: Pipe, simulator: Simulator
) -> None:
    stream = delta("a \ud83d") + between + delta("\ude00 b") + end
    simulator.next("replay", body=stream.decode(), tasks=True)
    given = arguments("hello", dialect)
    answer = await call(pipe, given)
    json.dumps([answer.chunks, given["__event_emitter__"]], ensure_ascii=False).encode()
    failed = end == BAD_ERROR
    assert bool(answer.error) is failed
    if not failed or dialect not in ("api_json", "task"):
        assert answer.text == "a \N{GRINNING FACE} b"
    if dialect in IN_A_CHAT:
        assert answer.saved_text() == "a \N{GRINNING FACE} b"


@pytest.mark.parametrize("dialect", ["browser", "browser_json", "api_stream", "task_stream"])
@pytest.mark.parametrize(
    "scenario", ["failed", "error_flat", "error_nested", "error_untyped", "abrupt", "eof"]
)
async def test_text_before_a_failure_is_kept(
    scenario: str, dialect: str, pipe: Pipe, simulator: Simulator
) -> None:
    more = {"cut": 8} if scenario in ("abrupt", "eof") else {}
    simulator.next(scenario, text="one two three four five six seven eight", tasks=True, **more)
    answer = await ask(pipe, "hello", dialect)
    assert answer.text.startswith("one two")
    one_sentence(answer.error)
    if dialect in IN_A_CHAT:
        assert answer.saved_text() == answer.text
    if dialect != "browser_json":
        assert "error" in answer.chunks[-1]


async def test_half_a_call_is_never_told(pipe: Pipe, simulator: Simulator) -> None:
    """The host runs every call that it has seen, also that of an answer that broke off later."""
    for dialect in WITH_CALLS:
        simulator.next("golden", name="05_parallel_function_calls", cut=22, how="eof", tasks=True)
        answer = await ask(pipe, "hello", dialect)
        one_sentence(answer.error)
        assert answer.calls == []
        assert "function_call" not in json.dumps(answer.chunks)


async def test_whom_to_ask_is_said_with_an_error(pipe: Pipe, simulator: Simulator) -> None:
    set_valves(pipe, simulator.base_url, SUPPORT_CONTACT="help@example.org")
    simulator.next("http_error", name="402_credits")
    assert "help@example.org" in (await ask(pipe, "hello")).error


@pytest.mark.parametrize("dialect", ALL)
async def test_the_deadline(dialect: str, pipe: Pipe, simulator: Simulator) -> None:
    set_valves(pipe, simulator.base_url, REQUEST_DEADLINE_SECONDS=1)
    simulator.next("drip", rate=20, tokens=1_000, tasks=True)
    answer = await ask(pipe, "hello", dialect)
    one_sentence(answer.error)
    assert "longer than" in answer.error
    if dialect not in ("api_json", "task"):
        assert answer.text.startswith("word0 word1")
    await simulator.wait_until(lambda sim: sim.open == 0, timeout=1)


async def test_the_deadline_counts_the_waits_between_tries(pipe: Pipe, simulator: Simulator) -> None:
    set_valves(pipe, simulator.base_url, REQUEST_DEADLINE_SECONDS=1, RETRY_ATTEMPTS=5)
    simulator.next("http_error", name="503_no_provider", retry_after=25, times=math.inf)
    async with asyncio.timeout(5):
        answer = await ask(pipe, "hello")
    assert "longer than" in answer.error
    assert len(inferences(simulator)) == 1


# What cannot be sent


BAD_BODIES: dict[str, Json] = {
    "no messages": {"messages": []},
    "messages are none": {"messages": None},
    "messages are text": {"messages": "hello"},
    "a message is text": {"messages": ["hello"]},
    "nothing to answer": {"messages": [{"role": "user", "content": ""}]},
    "a role nobody knows": {"messages": [{"role": "oracle", "content": "hello"}]},
    "content is a number": {"messages": [{"role": "user", "content": 7}]},
}


@pytest.mark.parametrize("case", sorted(BAD_BODIES))
@pytest.mark.parametrize("dialect", ALL)
async def test_a_chat_that_cannot_be_sent(case: str, dialect: str, pipe: Pipe, simulator: Simulator) -> None:
    answer = await ask(pipe, BAD_BODIES[case], dialect)
    one_sentence(answer.error)
    assert "id" not in answer.error.split()
    assert inferences(simulator) == []


class Breaks(Mapping[str, Any]):
    """A message that breaks when it is read."""

    def __getitem__(self, key: str) -> Any:
        raise ZeroDivisionError

    def __iter__(self) -> Iterator[str]:
        raise ZeroDivisionError

    def __len__(self) -> int:
        return 1


def _endless() -> Json:
    loop: Json = {"type": "object"}
    loop["properties"] = {"again": loop}
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "loop", "schema": loop}}}


UNEXPECTED: dict[str, Json] = {
    "a message that breaks": {"messages": [Breaks()]},
    "a parameter that is no JSON": {"temperature": {1}, "stop": {"x"}, "custom": {1}},
    "a schema without an end": _endless(),
}


@pytest.mark.parametrize("case", sorted(UNEXPECTED))
@pytest.mark.parametrize("dialect", ALL)
async def test_the_unexpected_is_one_sentence(
    case: str, dialect: str, pipe: Pipe, simulator: Simulator
) -> None:
    messages = {"messages": [{"role": "user", "content": "hello"}]}
    answer = await ask(pipe, messages | UNEXPECTED[case], dialect)
    one_sentence(answer.error)
    assert inferences(simulator) == []


async def test_the_id_of_an_error_stands_in_the_log(pipe: Pipe, caplog: pytest.LogCaptureFixture) -> None:
    answer = await ask(pipe, {"messages": [Breaks()]})
    assert answer.error_id
    (record,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert answer.error_id in record.getMessage()
    assert record.exc_info


@pytest.mark.parametrize("dialect", IN_A_CHAT)
async def test_an_emitter_that_raises_is_survived(
    dialect: str, pipe: Pipe, simulator: Simulator, caplog: pytest.LogCaptureFixture
) -> None:
    async def emit(event: Json) -> None:
        raise ConnectionResetError

    simulator.next("or_search")
    given = arguments("hello", dialect) | {"__event_emitter__": emit}
    answer = await call(pipe, given)
    assert (bool(answer.text), answer.error) == (True, "")
    assert caplog.text.count("ConnectionResetError") == 1


@pytest.mark.parametrize("dialect", IN_A_CHAT)
async def test_an_emitter_that_never_returns_is_survived(
    dialect: str, pipe: Pipe, simulator: Simulator
) -> None:
    async def emit(event: Json) -> None:
        await asyncio.Event().wait()

    simulator.next("or_search")
    given = arguments("hello", dialect) | {"__event_emitter__": emit}
    async with asyncio.timeout(PATIENCE_S):
        answer = await call(pipe, given)
    assert (bool(answer.text), answer.error) == (True, "")


@pytest.mark.parametrize("dialect", ALL)
async def test_without_an_emitter(dialect: str, pipe: Pipe, simulator: Simulator) -> None:
    simulator.next("or_search", tasks=True)
    answer = await call(pipe, arguments("hello", dialect) | {"__event_emitter__": None})
    assert (bool(answer.text), answer.error) == (True, "")


# Waits that take no time


@pytest.fixture
async def runtime() -> AsyncIterator[Runtime]:
    async def at_once(seconds: float) -> None:
        return None

    runtime = Runtime("turn_loop", HostEnvironment(secret="s"), sleep=at_once)
    runtime.start()
    yield runtime
    await runtime.retire(0)


async def test_a_person_sees_every_try(runtime: Runtime, simulator: Simulator) -> None:
    simulator.next("http_error", name="503_no_provider", times=2)
    simulator.next("plain", text="third time lucky")
    events = Events()
    body = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}], "stream": True}
    request = ChatRequest(body=body, dialect="browser", model=MODEL, host=HostCall(event_emitter=events))
    answer, valves = Answer(), Valves.model_validate({"API_KEY": KEY, "BASE_URL": simulator.base_url})
    async for chunk in runtime.stream(runtime.job(request, valves)):
        answer.add(chunk)
    assert (answer.text, answer.error) == ("third time lucky", "")
    assert [status for status in events.statuses() if "again in 5 s" in status] == events.statuses()[:2]


@pytest.mark.parametrize("dialect", ALL)
async def test_an_answer_after_reasoning_that_only_began(
    dialect: str, pipe: Pipe, simulator: Simulator
) -> None:
    """The failed try has shown at most an empty thought: the second answer follows as if it were alone."""
    set_valves(pipe, simulator.base_url, RETRY_ATTEMPTS=1)
    item = {"type": "reasoning", "id": "r", "summary": []}
    added = frame("response.output_item.added", output_index=0, item=item)
    busy = {"status": "failed", "error": {"message": "Overloaded"}, "error_type": "provider_overloaded"}
    body = (added + frame("response.failed", response=busy)).decode()
    simulator.next("replay", body=body, tasks=True)
    simulator.next("reasoning", text="fine", tasks=True)
    async with asyncio.timeout(PATIENCE_S):
        answer = await ask(pipe, "hello", dialect)
    assert (answer.text, answer.error) == ("fine", "")
    assert len(inferences(simulator)) == 2
    if dialect == "browser":
        check_rules(answer.chunks)


async def test_what_a_failed_try_cost_is_added(pipe: Pipe, simulator: Simulator) -> None:
    """`response.failed` may carry usage; where the request is then sent again, both were paid."""
    pipe.valves = pipe.valves.model_copy(update={"RETRY_ATTEMPTS": 1})
    spent = {"input_tokens": 3, "output_tokens": 4, "total_tokens": 7, "cost": 0.5}
    failed = {
        "status": "failed",
        "usage": spent,
        "error_type": "provider_overloaded",
        "error": {"code": "server_error"},
    }
    frame = b"data: " + json.dumps({"type": "response.failed", "response": failed}).encode() + b"\n\n"
    simulator.next("replay", body=frame.decode())
    answer = await ask(pipe, "[[plain text=fine]]")
    assert (answer.text, answer.error) == ("fine", "")
    assert answer.usage is not None
    assert answer.usage["cost"] > 0.5
