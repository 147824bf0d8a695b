"""Strings from outside, and the places they go to: what goes in, and what comes out there.

What does not hold yet is marked as a bug, with what is wrong with it.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, Final

import pytest

from openrouter_responses_pipe.openrouter_responses_pipe import (
    ArtifactPayload,
    ArtifactStore,
    ChatRequest,
    Connection,
    ErrorPage,
    HostCall,
    HostEnvironment,
    MediaBlob,
    MediaIntake,
    MediaProduced,
    MediaRef,
    ModelSpec,
    OpenRouterAPIError,
    OpenRouterClient,
    OpenWebUIHost,
    Pipe,
    PipeError,
    RequestSettings,
    RetryPolicy,
    StorageError,
    StreamingEngine,
    ToolCall,
    ToolLimits,
    ToolOrchestrator,
    UpstreamRequest,
    UserValves,
    Valves,
    _arguments_of,
    _artifact_settings,
    _clean_answer,
    _describe,
    _model_spec,
    _row_of_bytes,
    _shown_name,
    _table_prefix,
    _tool_names,
    _transform_messages_to_input,
    render_error,
)
from openrouter_responses_pipe.simulator import Simulator
from pytest_bootstrap import HostFiles, host_database
from tests.engines import host_engine
from tests.media import picture
from tests.support import (
    KEY,
    MODEL,
    SOON_S,
    Events,
    Handler,
    answering,
    arguments,
    ask,
    call,
    connection_to,
    hostile,
    read_request,
    running_pipe,
)

Json = dict[str, Any]
# a line that looks like one of the log's own, and what clears a terminal
FORGED: Final = "x\r\n2026-01-01 00:00:00 | CRITICAL | all is lost\x1b[2J\u2028\x85y"


@pytest.fixture
async def client() -> AsyncIterator[OpenRouterClient]:
    """A client of its own."""
    client = OpenRouterClient()
    yield client
    await client.aclose()


# A line of the log


def refusing(message: str, status: str = "400 Bad Request", head: str = "") -> Handler:
    """A handler that refuses each request with these words."""
    body = json.dumps({"error": {"message": message, "code": int(status[:3])}}).encode()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        lines = f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nConnection: close\r\n{head}"
        writer.write(f"{lines}Content-Length: {len(body)}\r\n\r\n".encode("latin-1") + body)
        await writer.drain()

    return handle


async def _words_of_the_provider(simulator: Simulator) -> None:
    async with hostile(refusing(FORGED)) as url, running_pipe(url) as pipe:
        await pipe.pipes()


async def _a_model(simulator: Simulator) -> None:
    async with running_pipe(simulator.base_url) as pipe:
        await ask(pipe, "Hello", model=f"openrouter.a/{FORGED}")


async def _a_type_of_event(simulator: Simulator) -> None:
    events = [{"type": FORGED}, {"type": "response.completed", "response": {}}]
    simulator.next("golden", body="".join(f"data: {json.dumps(event)}\n\n" for event in events))
    async with running_pipe(simulator.base_url) as pipe:
        await ask(pipe, "Hello")


async def _a_tool(simulator: Simulator) -> None:
    async def fails() -> None:
        raise RuntimeError("it is out of order")

    tools = {FORGED: {"callable": fails, "spec": {"parameters": {"type": "object", "properties": {}}}}}
    request = ChatRequest(body={}, dialect="browser", model=MODEL, user_id="ada", host=HostCall(tools=tools))
    orchestrator = ToolOrchestrator(OpenWebUIHost(None), time.monotonic)

    async def sink(emissions: Any) -> None:
        pass

    try:
        async with orchestrator.open_context(request, {FORGED}, ToolLimits(failures=1)) as context:
            await orchestrator.run(context, [ToolCall("call_1", FORGED, "{}")], sink)
    finally:
        orchestrator.aclose()


async def _a_parameter(simulator: Simulator) -> None:
    async with running_pipe(simulator.base_url) as pipe:
        given = arguments("Hello")
        given["body"][FORGED] = 1
        await call(pipe, given)


async def _a_file(simulator: Simulator) -> None:
    async with running_pipe(simulator.base_url) as pipe:
        picture = {"type": "image_url", "image_url": {"url": "http://127.0.0.1/a%0Ab.png"}}
        text = {"type": "text", "text": "Hello"}
        message = {"role": "user", "content": [text, picture]}
        await ask(pipe, {"messages": [message]}, model="openrouter.openai/gpt-4o")


async def _a_key(simulator: Simulator) -> None:
    async with hostile(refusing(f"The key {KEY} is not known")) as url, running_pipe(url) as pipe:
        await pipe.pipes()
        await ask(pipe, "Hello")


@pytest.mark.parametrize(
    "goes_in",
    [
        pytest.param(_words_of_the_provider),
        pytest.param(_a_model),
        pytest.param(_a_type_of_event),
        pytest.param(_a_tool),
        _a_parameter,
        _a_file,
        _a_key,
    ],
)
async def test_a_line_of_the_log_stays_one(
    goes_in: Callable[[Simulator], Awaitable[None]], simulator: Simulator, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, logger="openrouter_responses_pipe")
    await goes_in(simulator)
    lines = [record.getMessage() for record in caplog.records if record.name == "openrouter_responses_pipe"]
    assert lines
    assert [line for line in lines if not line.isprintable()] == []
    assert not any(KEY in line for line in lines)


# What a page shows


@pytest.mark.parametrize(
    ("url", "is_shown"),
    [
        ("https://example.org/a?b=c#d", True),
        ("http://example.org/", True),
        pytest.param("javascript:alert(document.cookie)//http", False),
        pytest.param("JAVASCRIPT:alert(1)", False),
        pytest.param("data:text/html,<script>alert(1)</script>", False),
        pytest.param(" https://example.org", False),
        pytest.param("file:///etc/passwd", False),
    ],
)
@pytest.mark.parametrize("dialect", ["browser", "api_stream"])
async def test_a_source_is_an_address_of_the_web(
    dialect: str, url: str, is_shown: bool, simulator: Simulator
) -> None:
    annotation = {"type": "url_citation", "url": url, "title": "A page", "start_index": 0, "end_index": 1}
    part = {"type": "output_text", "text": "Hello", "annotations": [annotation]}
    item = {"type": "message", "id": "msg_1", "role": "assistant", "content": [part]}
    response = {"status": "completed", "output": [item]}
    event = {"type": "response.completed", "response": response}
    simulator.next("golden", body=f"data: {json.dumps(event)}\n\n")
    given = arguments("Hello", dialect)
    async with running_pipe(simulator.base_url) as pipe:
        answer = await call(pipe, given)
    events: Events = given["__event_emitter__"]
    shown = json.dumps([events.of("source"), answer.chunks])
    assert answer.text == "Hello"
    assert (json.dumps(url)[1:-1] in shown) is is_shown


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("<img src=x onerror=alert(1)>", "The model's provider reported an error. <img"),  # shown as text
        (f"Bad key {KEY}", "[the key]"),
        (f"Bad key {KEY[:12]}…{KEY[-4:]}", "[…]"),
        ("One\r\n\r\nData: two", "One Data: two."),
        pytest.param("One\x00\x1b[2J two", "One[2J two."),
        ("{contact} {id}", "{contact} {id}"),
        ("x" * 100_000, " …"),
        ("user_2aBcDeFgHiJ of org_2aBcDeFgHiJ", "[…] of […]"),
    ],
    ids=range(8),
)
async def test_an_error_is_one_sentence_without_secrets(words: str, said: str, simulator: Simulator) -> None:
    event = {"type": "error", "error": {"message": words, "code": 502}}
    simulator.next("golden", body=f"data: {json.dumps(event)}\n\n")
    async with running_pipe(simulator.base_url) as pipe:
        error = (await ask(pipe, "Hello")).error
    if not words.startswith("<"):  # what looks like a page of an edge says nothing
        assert said in error
    assert KEY not in error
    assert "\n" not in error
    assert len(error) < 1_000


@pytest.mark.parametrize(
    ("field", "text"),
    [
        pytest.param("name", f"Model {FORGED}"),
        pytest.param("name", "M" * 100_000),
        pytest.param("id", f"a/{FORGED}"),
    ],
)
def test_an_entry_of_the_menu_is_one_short_line(field: str, text: str) -> None:
    spec = _model_spec({"id": "a/b", "name": "B", "architecture": {}, field: text})
    if spec is not None:
        assert spec.id.isprintable()
        assert spec.name.isprintable()
        assert len(spec.name) <= 300


@pytest.mark.parametrize(
    ("description", "shown"),
    [
        ("[click](javascript:alert(1))", "click)"),
        ("![](https://evil.example/pixel.png)", ""),
        ("two\r\n\r\nlines", "two lines"),
        ("`code` and **more**", "code and more"),
    ],
)
def test_a_description_has_no_links_and_no_pictures(description: str, shown: str) -> None:
    assert _describe(ModelSpec("a/b", "B", description=description)) == shown


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("a\r\nb\x1b[2J.png", "a b[2J.png"),
        ("\u202egnp.exe", "gnp.exe"),  # which would be shown backwards
        ("x" * 500, "x" * 80),
        ("../../etc/passwd", "../../etc/passwd"),  # a name to look at, never a path
    ],
)
def test_a_name_of_a_file_is_one_short_line(name: str, shown: str) -> None:
    assert _shown_name(name) == shown


# A header of a request


@pytest.mark.parametrize(
    ("valve", "header", "sent"),
    [
        ("APP_TITLE", "x-openrouter-title", "AX-Evil: 1B"),
        ("APP_URL", "http-referer", "AX-Evil: 1B"),
        ("APP_CATEGORIES", "x-openrouter-categories", "AX-Evil: 1B"),
    ],
)
async def test_a_valve_adds_no_header(valve: str, header: str, sent: str, simulator: Simulator) -> None:
    async with running_pipe(simulator.base_url, **{valve: "A\r\nX-Evil: 1\x00\u0416\ud800B"}) as pipe:
        assert (await ask(pipe, "Hello")).text
    assert {record.headers[header] for record in simulator.requests} == {sent}


async def test_a_key_adds_no_header(client: OpenRouterClient) -> None:
    seen: list[dict[str, str]] = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append((await read_request(reader))[1])
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}")
        await writer.drain()

    async with hostile(handle) as url, running_pipe(url, API_KEY=f"{KEY}\r\nX-Evil: 1") as pipe:
        await pipe.pipes()
    assert [headers["authorization"] for headers in seen] == [f"Bearer {KEY}X-Evil: 1"]
    assert not any("x-evil" in headers for headers in seen)


async def test_an_etag_that_nobody_can_send(client: OpenRouterClient) -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        head = b'HTTP/1.1 200 OK\r\nETag: "\xff\x80"\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}'
        writer.write(head)
        await writer.drain()

    async with hostile(handle) as url:
        first = await client.get_json(connection_to(url), "/models")
        again = await client.get_json(connection_to(url), "/models", first.etag)
    assert (first.content, again.content) == ({}, {})


@pytest.mark.parametrize("status", ["307 Moved", "308 Moved"])
async def test_a_chat_follows_no_redirect(
    status: str, client: OpenRouterClient, simulator: Simulator
) -> None:
    where = simulator.base_url.replace("127.0.0.1", "localhost")

    async def redirect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(
            f"HTTP/1.1 {status}\r\nLocation: {where}/responses\r\nContent-Length: 0\r\n\r\n".encode()
        )
        await writer.drain()

    who = (("X-OpenWebUI-User-Email", "ada@example.org"),)
    async with hostile(redirect) as url:
        with pytest.raises(PipeError):
            async with client.open_stream(connection_to(url, headers=who), "/responses", {"input": "secret"}):
                pass
    assert simulator.requests == []


async def test_without_a_key_an_error_says_what_it_says(client: OpenRouterClient) -> None:
    async with hostile(refusing("There is no such thing")) as url:
        with pytest.raises(OpenRouterAPIError) as caught:
            await client.get_json(connection_to(url, key=""), "/models")
    assert caught.value.detail == "There is no such thing"


@pytest.mark.parametrize(
    "when",
    [
        pytest.param("Mon, 01 Jan 99999999999999999999 00:00:00 GMT"),
        pytest.param("Mon, 01 Jan 2020 00:00:00 +9999999999999999"),
        "-1e999",
        "nan",
        "x" * 5_000,
    ],
)
async def test_a_time_to_wait_that_is_none(when: str, client: OpenRouterClient) -> None:
    async with hostile(refusing("Slow down", "429 Slow", f"Retry-After: {when}\r\n")) as url:
        with pytest.raises(OpenRouterAPIError) as caught:
            await client.get_json(connection_to(url), "/models")
    assert caught.value.template == "rate_limit"
    assert caught.value.retry_after is None


# A path, a table, a row


@pytest.mark.parametrize(
    "name", ["../../../etc/passwd", "/etc/passwd", "a\x00b", "..", "", "ä" * 300, "a/b\\c"]
)
async def test_a_name_of_a_file_leads_nowhere(name: str, files: HostFiles, tmp_path: Path) -> None:
    content = picture()
    blob = MediaBlob(name=name, mime="image/png", size=len(content))
    request = ChatRequest(body={}, dialect="browser", model=MODEL, user_id="ada")
    file_id = "0b7b3c0e-8f5d-4a55-9d0f-2f6a3c1f0e11"
    assert await OpenWebUIHost().save_file(file_id, blob, content, request)
    found = [(folder, name) for folder, _, names in os.walk(tmp_path) for name in names]
    ((folder, name),) = found
    assert folder == str(tmp_path)
    assert name.startswith(file_id + "_")
    assert len(name.encode()) < 200


_INJECTED: Final = ["o'brien", '"; DROP TABLE chat; --', "a%_b", "\x00", "x' OR '1'='1", "ä\n" * 50]


@pytest.mark.parametrize("who", _INJECTED)
async def test_whoever_asks_gets_only_their_own(who: str, sqlite_url: str) -> None:
    async with host_engine(sqlite_url) as engine:
        host_database.use(engine)
        store = ArtifactStore(OpenWebUIHost(), "o'pipe\"; --")
        try:
            store.open(_artifact_settings(Valves(), HostEnvironment("secret"), "openrouter"))
            theirs = (await store.save([ArtifactPayload([{"theirs": 1}], "turn", "ada", "chat")]))[0]
            mine = (await store.save([ArtifactPayload([{"mine": 1}], "turn", who, who)]))[0]
            loaded = await store.load([theirs, mine, "x' OR '1'='1"], who, who)
            assert loaded.found == {mine: [{"mine": 1}]}
            assert (await store.load([theirs], "ada", who)).found == {theirs: [{"theirs": 1}]}
        finally:
            await store.aclose()
            host_database.reset()


@pytest.mark.parametrize("pipe_id", ["a", "A", "a-b", "a'b", 'a"b', "a b", "a;b", "ä", "x" * 200, ""])
def test_a_name_of_a_table_is_a_plain_one(pipe_id: str) -> None:
    name = _table_prefix(pipe_id)
    assert name.replace("$", "_").isidentifier()
    assert name.isascii()
    assert len(name) < 50
    assert pipe_id == "a" or name != _table_prefix("a")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"null\n",
        b"[]\nx",
        b"[" * 100_000,
        b'["a"]\n',
        json.dumps([*["a"] * 8, -1, 1.0, 1.0]).encode() + b"\nx",
        json.dumps([*["a"] * 8, True, 1.0, 1.0]).encode() + b"\nx",
        json.dumps([*["a"] * 8, 2**40, 1.0, 1.0]).encode() + b"\nx",
        json.dumps([*["a"] * 7, None, 1, 1.0, 1.0]).encode() + b"\nx",
        b'["a","a","a","a","a","a","a","a",1,NaN,1]\nx',
        b"\xff\xfe\n\x00",
    ],
    ids=range(11),
)
def test_what_somebody_else_has_put_into_redis_is_no_row(content: bytes) -> None:
    assert _row_of_bytes(content) is None


# Who is who


@pytest.mark.parametrize("own", ["", "inherit", "encrypted:inherit"])
@pytest.mark.parametrize("secret", ["", "the secret of this server"])
async def test_nobody_is_told_what_the_key_of_the_administrators_has_left(
    own: str, secret: str, simulator: Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WEBUI_SECRET_KEY", secret)
    given = arguments("Hello")
    given["__user__"]["valves"] = UserValves.model_validate({"API_KEY": own})
    simulator.next("http_error", name="402_credits")
    async with running_pipe(simulator.base_url, ALLOW_USER_API_KEYS=True) as pipe:
        await pipe.pipes()
        error = (await call(pipe, given)).error
    administrators = next(record.key for record in simulator.requests if record.path.endswith("/models"))
    asked = [record.key for record in simulator.requests if record.path.endswith(("/key", "/credits"))]
    assert error
    assert administrators not in asked


def valves_with(**values: Any) -> Valves:
    """Valves as the host makes them of what it has stored."""
    return Valves.model_validate(values)


_SECRET_THINGS: Final[dict[str, Callable[[], Any]]] = {
    "connection": lambda: Connection("https://x.example", KEY, (("X-OpenWebUI-User-Email", KEY),)),
    "environment": lambda: HostEnvironment(secret=KEY),
    "valves": lambda: valves_with(API_KEY=KEY, ARTIFACT_ENCRYPTION_KEY=KEY),
    "valves of a person": lambda: UserValves.model_validate({"API_KEY": KEY}),
    "artifacts": lambda: _artifact_settings(
        valves_with(ARTIFACT_ENCRYPTION_KEY=KEY), HostEnvironment(KEY), "p"
    ),
    "pipe": Pipe,
    "picture": lambda: MediaProduced(0, KEY),
    "file": lambda: MediaBlob(url=KEY, text=KEY),
    "page": lambda: ErrorPage(error_id="1"),
}


async def test_no_error_holds_the_key(client: OpenRouterClient, simulator: Simulator) -> None:
    event = {"type": "error", "error": {"message": f"Bad key {KEY}", "code": 401}}
    simulator.next("golden", body=f"data: {json.dumps(event)}\n\n")

    async def sink(emissions: Any) -> None:
        pass

    message = {"role": "user", "content": [{"type": "input_text", "text": "Hello"}]}
    request = UpstreamRequest({"model": MODEL, "input": [message], "stream": True})
    with pytest.raises(PipeError) as caught:
        await StreamingEngine(client).stream(
            connection_to(simulator.base_url), request, sink, RetryPolicy(attempts=0)
        )
    assert KEY not in f"{caught.value!r} {caught.value} {caught.value.detail}"


@pytest.mark.parametrize("secret", ["", KEY])
@pytest.mark.parametrize("thing", _SECRET_THINGS)
def test_no_repr_holds_a_secret(thing: str, secret: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEBUI_SECRET_KEY", secret)
    made = _SECRET_THINGS[thing]()
    assert KEY not in f"{made!r} {made} {[made]}"


# What one person can make of the time and the memory of all


def _seconds(work: Callable[[], Any]) -> float:
    best = 10.0
    for _ in range(2):
        started = time.process_time()
        work()
        best = min(best, time.process_time() - started)
    return best


def _rounds(count: int, *, same_id: bool) -> list[Json]:
    """A history of rounds of two calls each."""
    messages: list[Json] = [{"role": "user", "content": "Hello"}]
    for number in range(count):
        ids = ("a", "b") if same_id else (f"a{number}", f"b{number}")
        calls = [{"id": one, "function": {"name": "f", "arguments": "{}"}} for one in ids]
        messages.append({"role": "assistant", "content": "", "tool_calls": calls})
        messages += [{"role": "tool", "tool_call_id": one, "content": "x"} for one in ids]
    return messages


def _names(count: int) -> list[str]:
    """Names that all become the same: none of their letters may stand in one."""
    return ["".join("éüöäñ"[number // 5**place % 5] for place in range(7)) for number in range(count)]


def _check(count: int) -> None:
    options = [{"type": "object", "properties": {"k": {"const": n}}, "required": ["k"]} for n in range(count)]
    schema = {"type": "object", "properties": {"v": {"type": "array", "items": {"anyOf": options}}}}
    made = json.dumps({"v": [{"k": -1}] * count})
    try:
        _arguments_of(ToolCall("call_1", "f", made), {"callable": print, "spec": {"parameters": schema}})
    except PipeError:
        return


SPEC: Final = ModelSpec("a/b", "B")
# what grows -> (work of a size, a size at which one that grows with the square takes long)
_WORK: Final[dict[str, tuple[Callable[[int], Any], int]]] = {
    "spaces in an error": (lambda n: render_error(PipeError(" " * n, template="provider")), 1_200),
    "marks in an answer": (lambda n: _clean_answer("<details " + 'type="reasoning" ' * n), 400),
    "brackets in a description": (lambda n: _describe(SPEC._replace(description="[" * n)), 1_500),
    "calls of one id": (lambda n: _transform_messages_to_input(_rounds(n, same_id=True), SPEC), 250),
    "rounds of calls": (lambda n: _transform_messages_to_input(_rounds(n, same_id=False), SPEC), 250),
    "tools of one name": (lambda n: _tool_names(_names(n)), 250),
    "options of a schema": (_check, 30),
    "thoughts in an answer": (lambda n: _clean_answer("<think>\n" * n), 20_000),
    "pictures in an answer": (lambda n: _clean_answer("![a](data:" * n), 20_000),
    "messages of a chat": (
        lambda n: _transform_messages_to_input([{"role": "user", "content": "Hello"}] * n, SPEC),
        4_000,
    ),
}


@pytest.mark.parametrize("what", _WORK)
def test_work_grows_with_the_size_not_with_its_square(what: str) -> None:
    work, size = _WORK[what]
    small, large = _seconds(lambda: work(size)), _seconds(lambda: work(4 * size))
    assert large < 0.05 or large < 8 * small, f"{small:.3f} s, and {large:.3f} s for four times as much"


async def test_slow_servers_of_one_person_hold_up_nobody_else() -> None:
    waiting = asyncio.Semaphore(0)

    async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        waiting.release()
        await reader.read()

    def errand(url: str, who: str) -> tuple[ChatRequest, RequestSettings]:
        hosts = frozenset({url.removeprefix("http://").partition("/")[0]})
        request = ChatRequest(body={}, dialect="browser", model=MODEL, user_id=who)
        return request, RequestSettings(trusted_hosts=hosts)

    intake = MediaIntake(OpenWebUIHost(None), time.monotonic)
    async with hostile(hang) as slow, hostile(answering(picture(), "image/png")) as quick:
        chats = [
            asyncio.create_task(
                intake.resolve([MediaRef("image", f"{slow}/{n}/{m}") for m in range(4)], *errand(slow, "eve"))
            )
            for n in range(5)
        ]
        try:
            for _ in range(6):
                await waiting.acquire()
            ref = MediaRef("image", f"{quick}/a.png")
            async with asyncio.timeout(SOON_S):
                found = await intake.resolve([ref], *errand(quick, "ada"))
            assert found[ref].mime == "image/png"
        finally:
            await intake.aclose()
            await asyncio.gather(*chats, return_exceptions=True)


def test_a_store_that_is_not_open_says_so() -> None:
    """The words of a failure name neither a person nor what was to be kept."""
    store = ArtifactStore(OpenWebUIHost(), "openrouter")
    with pytest.raises(StorageError) as caught:
        asyncio.run(store.save([ArtifactPayload([KEY], "turn", "ada", "chat")]))
    assert KEY not in str(caught.value)
    assert "ada" not in str(caught.value)
