"""Authorised HTTP, against the simulator and against servers that misbehave."""

from __future__ import annotations

import asyncio
import contextlib
import math
import re
import socket
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

from openrouter_responses_pipe.openrouter_responses_pipe import (
    Connection,
    OpenRouterAPIError,
    OpenRouterClient,
    PipeError,
    StreamError,
    _RetryWait,
    render_error,
)
from openrouter_responses_pipe.simulator import HTTP_ERRORS, Simulator
from tests.support import (
    EVENT_STREAM,
    KEY,
    MODEL,
    PATIENCE_S,
    SOON_S,
    answering,
    connection_to,
    delta,
    free_port,
    gone,
    hostile,
    inferences,
    read_request,
)

Json = dict[str, Any]


@pytest.fixture
async def client() -> AsyncIterator[OpenRouterClient]:
    client = OpenRouterClient()
    yield client
    await client.aclose()


def asking(prompt: str) -> Json:
    message = {"role": "user", "content": [{"type": "input_text", "text": prompt}]}
    return {"model": MODEL, "input": [message], "stream": True, "store": False}


async def post(client: OpenRouterClient, connection: Connection, payload: Json | str = "hello") -> bytes:
    """The whole stream that answers one request."""
    payload = asking(payload) if isinstance(payload, str) else payload
    async with client.open_stream(connection, "/responses", payload) as reads:
        return b"".join([chunk async for chunk in reads])


async def failure(
    client: OpenRouterClient, connection: Connection, prompt: Json | str = "hello"
) -> PipeError:
    """The error that one request ends in."""
    async with asyncio.timeout(PATIENCE_S):
        with pytest.raises(PipeError) as caught:
            await post(client, connection, prompt)
    return caught.value


# What is sent


async def test_a_stream_is_asked_for_with_these_headers(client: OpenRouterClient) -> None:
    names = {
        "HTTP-Referer": "https://chat.example.org",
        "X-OpenRouter-Title": "Our chat",
        "X-OpenRouter-Categories": "general-chat",
    }
    async with Simulator(keep_keys=True) as simulator:
        await post(client, connection_to(simulator.base_url, headers=tuple(names.items())))
    sent = simulator.requests[0].headers
    assert sent["authorization"] == f"Bearer {KEY}"
    assert sent["content-type"] == "application/json"
    assert sent["accept"] == "text/event-stream"
    assert sent["accept-encoding"] == "identity"
    assert {name: sent[name.lower()] for name in names} == names


async def test_a_read_carries_the_key_and_no_content_type(client: OpenRouterClient) -> None:
    async with Simulator(keep_keys=True) as simulator:
        assert "data" in (await client.get_json(connection_to(simulator.base_url), "/models")).content
    sent = simulator.requests[0].headers
    assert sent["authorization"] == f"Bearer {KEY}"
    assert "content-type" not in sent


async def test_the_payload_arrives_as_it_was(client: OpenRouterClient, simulator: Simulator) -> None:
    payload = asking("naïve 漢字 👩‍👩‍👧 \u2028 \x00 end")
    await post(client, connection_to(simulator.base_url), payload)
    assert simulator.requests[0].body == payload


async def test_a_lone_surrogate_is_sent_as_a_replacement(
    client: OpenRouterClient, simulator: Simulator
) -> None:
    await post(client, connection_to(simulator.base_url), asking("half \ud83d of it"))
    assert simulator.requests[0].body["input"][0]["content"][0]["text"] == "half \ufffd of it"


async def test_the_key_does_not_follow_a_redirect_to_another_server(
    client: OpenRouterClient, simulator: Simulator
) -> None:
    where = simulator.base_url.replace("127.0.0.1", "localhost")
    head = f"HTTP/1.1 307 Moved\r\nLocation: {where}/responses\r\nContent-Length: 0\r\n\r\n"

    async def redirect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(head.encode())
        await writer.drain()

    async with hostile(redirect) as url:
        await failure(client, connection_to(url))
    assert [record.key for record in simulator.requests] in ([], [""])


async def test_no_cookie_is_carried_from_one_user_to_the_next(client: OpenRouterClient) -> None:
    seen: list[str] = []
    head = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nSet-Cookie: who=first; Path=/\r\n"

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        _, headers, _ = await read_request(reader)
        seen.append(headers.get("cookie", ""))
        writer.write(f"{head}Content-Length: 2\r\nConnection: close\r\n\r\n{{}}".encode())
        await writer.drain()

    async with hostile(handle) as url:
        url = url.replace("127.0.0.1", "localhost")  # cookies are kept for names only
        await client.get_json(connection_to(url), "/models")
        await client.get_json(connection_to(url, key="sk-or-v1-of-another-user"), "/models")
    assert seen == ["", ""]


async def test_the_key_is_that_of_the_connection_whatever_netrc_says(
    client: OpenRouterClient, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("default login someone password else\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    async with Simulator(keep_keys=True) as simulator:
        await client.get_json(connection_to(simulator.base_url), "/models")
    assert simulator.requests[0].headers["authorization"] == f"Bearer {KEY}"


async def test_a_proxy_of_the_environment_is_used(
    client: OpenRouterClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    async def proxy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        line, _, _ = await read_request(reader)
        asked.append(line)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}")
        await writer.drain()

    async with hostile(proxy) as url:
        monkeypatch.setenv("http_proxy", url.removesuffix("/api/v1"))
        monkeypatch.setenv("no_proxy", "localhost,.internal.example")
        answer = await client.get_json(connection_to("http://far.example/api/v1"), "/models")
        assert answer.content == {}
    assert asked == ["GET http://far.example/api/v1/models HTTP/1.1"]
    error = await failure(client, connection_to(f"http://localhost:{free_port()}/api/v1"))
    assert "refused" in error.detail


@pytest.mark.parametrize("megabytes", [2, 12])
async def test_a_large_payload(megabytes: int, client: OpenRouterClient, simulator: Simulator) -> None:
    """Pictures ride in the body."""
    payload = asking("x" * (megabytes << 20))
    assert b"response.completed" in await post(client, connection_to(simulator.base_url), payload)
    assert simulator.requests[0].body == payload


async def test_a_refusal_before_the_payload_was_sent(client: OpenRouterClient) -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 413 Too Large\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        await writer.drain()

    async with hostile(handle) as url:
        error = await failure(client, connection_to(url), asking("x" * (20 << 20)))
    one_sentence_without_secrets(error)


# What OpenRouter refuses: name -> (template, retryable, seconds to wait, words)

REFUSALS: dict[str, tuple[str, bool, float | None, str]] = {
    "400_bad_request_int_code": ("refused", False, None, 'Input required: specify "input"'),
    "400_responses_validation_string_code": ("refused", False, None, "Invalid input"),
    "400_provider_raw": ("provider_refused", False, None, "Invalid value for temperature: at most 1"),
    "400_thinking_signature": ("provider_refused", False, None, "Invalid `signature` in `thinking` block"),
    "400_encrypted_content": (
        "provider_refused",
        False,
        None,
        "The encrypted content could not be verified.",
    ),
    "400_context_too_long": ("too_long", False, None, "maximum context length is 8192 tokens"),
    "400_store_true": ("refused", False, None, "store must be false"),
    "400_model_not_found": ("unknown_model", False, None, "acme/none-1 is not a valid model ID"),
    "400_wrong_endpoint": ("refused", False, None, "This model is not available on this endpoint."),
    "401_bad_key": ("authentication", False, None, "User not found."),
    "401_no_key": ("authentication", False, None, "No auth credentials found"),
    "402_credits": ("credits", False, None, "can only afford 2666"),
    "403_moderation": ("moderation", False, None, "Your input was flagged (harassment, violence)"),
    "403_guardrail": ("guardrail", False, None, "prompt injection patterns detected"),
    "404_privacy": ("not_found", False, None, "match your data policy"),
    "404_no_providers": ("not_found", False, None, "No allowed providers are available"),
    "404_no_tool_use": ("not_found", False, None, "No endpoints found that support tool use"),
    "408_timeout": ("timeout", True, None, "Request timed out"),
    "413_too_large": ("too_large", False, None, "Request body too large"),
    "422_unprocessable": ("refused", False, None, "Unprocessable request"),
    "429_free_daily": ("daily_limit", False, 52_807.0, "free-models-per-day"),
    "429_capacity_exhausted": ("rate_limit", True, 2.0, "are at capacity"),
    "429_upstream": ("rate_limit", True, None, "temporarily rate-limited upstream"),
    "429_http_date": ("rate_limit", True, 7.0, "Rate limit exceeded"),
    "500_masked": ("server", True, None, "Internal Server Error"),
    "502_provider": ("provider", True, None, "Provider returned an error"),
    "502_html": ("server", True, None, "HTTP 502"),
    "503_no_provider": ("provider", True, 5.0, "No instances available"),
    "524_edge_timeout": ("timeout", True, None, "Request timed out."),
    "529_overloaded": ("provider", True, None, "Provider returned error"),
    "200_error_body": ("provider", True, None, "Provider returned error"),
}
BEFORE_THE_DATE = 1_787_303_993.0  # seven seconds before the date of 429_http_date


def test_every_refusal_that_the_simulator_knows_is_in_the_table() -> None:
    assert set(HTTP_ERRORS) == set(REFUSALS)


@pytest.mark.parametrize("name", sorted(REFUSALS))
async def test_a_refusal_is_an_error_with_data(name: str, simulator: Simulator) -> None:
    simulator.next("http_error", name=name)
    client = OpenRouterClient(now=lambda: BEFORE_THE_DATE)
    try:
        error = await failure(client, connection_to(simulator.base_url))
    finally:
        await client.aclose()
    template, retryable, retry_after, words = REFUSALS[name]
    assert isinstance(error, OpenRouterAPIError)
    assert (error.template, error.retryable, error.retry_after) == (template, retryable, retry_after)
    assert words in error.detail
    assert "<" not in error.user_message
    assert KEY not in error.user_message


@pytest.mark.parametrize("name", ["401_bad_key", "429_capacity_exhausted", "500_masked", "502_html"])
async def test_a_refused_read_is_the_same_error(
    name: str, client: OpenRouterClient, simulator: Simulator
) -> None:
    simulator.next("http_error", name=name, on="/models")
    with pytest.raises(OpenRouterAPIError) as caught:
        await client.get_json(connection_to(simulator.base_url), "/models")
    template, retryable, _, words = REFUSALS[name]
    assert (caught.value.template, caught.value.retryable) == (template, retryable)
    assert words in caught.value.detail


@pytest.mark.parametrize(
    ("said", "seconds"),
    [
        ("7", 7.0),
        (" 0.5 ", 0.5),
        ("0", 0.0),
        ("-3", 0.0),
        ("Fri, 21 Aug 2026 09:20:00 GMT", 7.0),
        ("Fri, 21 Aug 2020 09:20:00 GMT", 0.0),
        ("soon", None),
        ("Fri, 99 Zzz", None),
        ("Fri, 21 Aug 99999999 09:20:00 GMT", None),
        ("", None),
    ],
)
async def test_how_long_to_wait(said: str, seconds: float | None, simulator: Simulator) -> None:
    simulator.next("http_error", name="500_masked", retry_after=said)
    client = OpenRouterClient(now=lambda: BEFORE_THE_DATE)
    try:
        error = await failure(client, connection_to(simulator.base_url))
    finally:
        await client.aclose()
    assert error.retry_after == seconds
    assert error.user_message


@pytest.mark.parametrize("said", ["inf", "-inf", "nan", "1e400", "1e18", "9" * 400])
async def test_a_wait_that_is_no_time_is_still_told_in_words(
    said: str, client: OpenRouterClient, simulator: Simulator
) -> None:
    simulator.next("http_error", name="500_masked", retry_after=said)
    error = await failure(client, connection_to(simulator.base_url))
    one_sentence_without_secrets(error)
    assert len(error.user_message) < 200


@pytest.mark.parametrize("status", ["401 No", "200 OK"])
async def test_a_key_that_a_server_repeats_is_not_told(status: str, client: OpenRouterClient) -> None:
    """Neither to the person nor to the log: some providers quote the key that they refuse."""
    body = b'{"error": {"code": 401, "message": "Incorrect API key provided: %s"}}' % KEY.encode()
    head = f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(head.encode() + body)
        await writer.drain()

    async with hostile(handle) as url:
        error = await failure(client, connection_to(url))
    assert "Incorrect API key provided" in error.user_message
    assert KEY not in error.user_message
    assert KEY not in f"{error!r} {error} {error.detail}"


async def test_an_endless_message_is_cut(client: OpenRouterClient) -> None:
    body = b'{"error": {"code": 500, "message": "%s"}}' % (b"on and on " * 10_000)
    async with hostile(answering(body)) as url:
        error = await failure(client, connection_to(url))
    assert "on and on" in error.user_message
    assert len(error.user_message) < 2_000


# Answers that are no stream


async def test_an_answer_in_one_piece_is_no_stream(client: OpenRouterClient, simulator: Simulator) -> None:
    error = await failure(client, connection_to(simulator.base_url), asking("hello") | {"stream": False})
    assert isinstance(error, OpenRouterAPIError)
    assert len(simulator.requests) == 1


@pytest.mark.parametrize(
    "content", [b"", b"null", b"[1, 2]", b'{"error": "no"}', b"<html>busy</html>", b"\xff"]
)
async def test_any_json_in_place_of_a_stream_is_an_error(content: bytes, client: OpenRouterClient) -> None:
    async with hostile(answering(content)) as url:
        error = await failure(client, connection_to(url))
    assert isinstance(error, OpenRouterAPIError)
    assert error.user_message


@pytest.mark.parametrize(
    "content", [b"", b"<html>maintenance</html>", b'{"data": [', b"\xff\xfe", b"[" * 100_000]
)
async def test_a_read_of_something_else_is_an_error(content: bytes, client: OpenRouterClient) -> None:
    async with hostile(answering(content)) as url:
        with pytest.raises(OpenRouterAPIError, match="not JSON"):
            await client.get_json(connection_to(url), "/models")


# What cannot be reached


def one_sentence_without_secrets(error: PipeError, *secrets: str) -> None:
    told = error.user_message
    assert told.endswith(".")
    assert not [secret for secret in (KEY, *secrets) if secret in told]
    assert not re.search(r"[a-z]Error\b|Exception\b", told)  # words, not names of classes


async def test_a_refused_connection(client: OpenRouterClient) -> None:
    port = free_port()
    error = await failure(client, connection_to(f"http://127.0.0.1:{port}/api/v1"))
    assert (type(error), error.template, error.retryable) == (StreamError, "network", True)
    one_sentence_without_secrets(error, str(port), "127.0.0.1")


async def test_a_name_that_does_not_resolve(client: OpenRouterClient) -> None:
    error = await failure(client, connection_to("http://nonexistent.invalid/api/v1"))
    assert (type(error), error.template, error.retryable) == (StreamError, "network", True)
    one_sentence_without_secrets(error, "nonexistent.invalid")


async def test_a_server_that_never_accepts(client: OpenRouterClient) -> None:
    with socket.socket() as listener, contextlib.ExitStack() as full:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(4):  # nobody accepts, so that the queue is full after the first of them
            waiting = full.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(listener.getsockname())
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/api/v1"
        error = await failure(client, connection_to(url, connect_timeout_s=0.1))
    assert (error.template, error.retryable) == ("timeout", True)


@pytest.mark.parametrize(
    "url", ["http://[::1", "http://127.0.0.1:99999", "http://", "no address", "http://a b/"]
)
async def test_an_address_that_is_none(url: str, client: OpenRouterClient) -> None:
    error = await failure(client, connection_to(url))
    assert isinstance(error, StreamError)
    one_sentence_without_secrets(error)


async def test_a_server_that_hangs_up_without_a_word(client: OpenRouterClient) -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)

    async with hostile(handle) as url:
        error = await failure(client, connection_to(url))
    assert (type(error), error.template, error.retryable) == (StreamError, "network", True)


async def test_a_server_that_does_not_speak_http(client: OpenRouterClient) -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(b"SSH-2.0-OpenSSH_9.6\r\n\r\n")
        await writer.drain()

    async with hostile(handle) as url:
        error = await failure(client, connection_to(url))
    assert isinstance(error, StreamError)
    one_sentence_without_secrets(error)


# What breaks off


@pytest.mark.parametrize(("scenario", "template"), [("stall", "broken"), ("stall_headers", "timeout")])
async def test_silence_is_not_waited_out(
    scenario: str, template: str, client: OpenRouterClient, simulator: Simulator
) -> None:
    simulator.next(scenario)
    error = await failure(client, connection_to(simulator.base_url, idle_timeout_s=0.2))
    assert (type(error), error.template, error.retryable) == (StreamError, template, True)
    await gone(simulator)


async def test_comments_keep_a_slow_answer_alive(client: OpenRouterClient, simulator: Simulator) -> None:
    simulator.next("keepalive", comments=6, gap=0.15)
    assert b"response.completed" in await post(client, connection_to(simulator.base_url, idle_timeout_s=0.5))


@pytest.mark.parametrize("how", ["cut", "reset"])
async def test_a_cut_in_the_middle(how: str, client: OpenRouterClient, simulator: Simulator) -> None:
    simulator.next("abrupt", how=how)
    error = await failure(client, connection_to(simulator.base_url))
    assert (type(error), error.template, error.retryable) == (StreamError, "broken", True)
    one_sentence_without_secrets(error)


async def test_a_cut_in_the_middle_of_json(client: OpenRouterClient) -> None:
    async with hostile(answering(b'{"data": [', length=500)) as url:
        with pytest.raises(StreamError) as caught:
            await client.get_json(connection_to(url), "/models")
    assert (caught.value.template, caught.value.retryable) == ("broken", True)


# Sizes


@pytest.mark.parametrize(("status", "most"), [("200 OK", 48), ("500 Oops", 16)])
async def test_an_endless_body_is_not_read_to_its_end(
    status: str, most: int, client: OpenRouterClient
) -> None:
    sent = 0
    over = asyncio.Event()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        await read_request(reader)
        writer.write(f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\n\r\n".encode())
        with contextlib.suppress(ConnectionError):
            while sent < 200 << 20:
                writer.write(b" " * 65536)
                await writer.drain()
                sent += 65536
        over.set()

    async with hostile(handle) as url:
        with pytest.raises(OpenRouterAPIError):
            await client.get_json(connection_to(url), "/models")
        async with asyncio.timeout(PATIENCE_S):
            await over.wait()
    assert sent < most << 20


# Connections


async def test_a_warm_connection_is_used_again(client: OpenRouterClient, simulator: Simulator) -> None:
    connection = connection_to(simulator.base_url)
    await client.get_json(connection, "/models")
    for _ in range(3):
        await post(client, connection)
    with pytest.raises(PipeError):
        await client.get_json(connection, "/nowhere")
    await post(client, connection)
    assert {record.connection for record in simulator.requests} == {1}


async def test_many_streams_at_once(client: OpenRouterClient, simulator: Simulator) -> None:
    connection = connection_to(simulator.base_url)
    prompts = [f"[[plain text=answer{number}]]" for number in range(50)]
    answers = await asyncio.gather(*(post(client, connection, prompt) for prompt in prompts))
    assert [f"answer{number}".encode() in answer for number, answer in enumerate(answers)] == [True] * 50


async def test_leaving_early_closes_the_socket(client: OpenRouterClient, simulator: Simulator) -> None:
    simulator.next("drip", tokens=10_000)
    async with client.open_stream(connection_to(simulator.base_url), "/responses", asking("go")) as reads:
        assert await anext(reads)
    await gone(simulator)
    await post(client, connection_to(simulator.base_url))
    assert simulator.requests[0].connection != simulator.requests[1].connection


@pytest.mark.parametrize("scenario", ["stall", "stall_headers"])
async def test_cancelling_closes_the_socket(
    scenario: str, client: OpenRouterClient, simulator: Simulator
) -> None:
    simulator.next(scenario)
    task = asyncio.create_task(post(client, connection_to(simulator.base_url)))
    await simulator.wait_until(lambda sim: len(inferences(sim)) == 1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await gone(simulator)


async def test_cancelling_before_any_header(client: OpenRouterClient) -> None:
    reached = asyncio.Event()
    left = asyncio.Event()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        reached.set()
        await reader.read()
        left.set()

    async with hostile(handle) as url:
        task = asyncio.create_task(post(client, connection_to(url)))
        await reached.wait()
        task.cancel()
        async with asyncio.timeout(SOON_S):
            await left.wait()
        with pytest.raises(asyncio.CancelledError):
            await task


async def test_closing_ends_what_is_open_and_is_final(client: OpenRouterClient, simulator: Simulator) -> None:
    simulator.next("stall")
    connection = connection_to(simulator.base_url)
    task = asyncio.create_task(failure(client, connection))
    await simulator.wait_until(lambda sim: any(record.streaming for record in inferences(sim)))
    await client.aclose()
    await client.aclose()
    one_sentence_without_secrets(await task)
    await gone(simulator)
    one_sentence_without_secrets(await failure(client, connection))
    assert len(simulator.requests) == 1


async def test_closing_what_was_never_used() -> None:
    client = OpenRouterClient()
    await client.aclose()
    await client.aclose()


async def test_a_slow_reader_loses_nothing(client: OpenRouterClient) -> None:
    frames = [delta(f"{number} ") * 50 for number in range(200)]

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(EVENT_STREAM)
        for frame in frames:
            writer.write(frame)
            await writer.drain()

    async with (
        hostile(handle) as url,
        client.open_stream(connection_to(url), "/responses", asking("go")) as reads,
    ):
        received = bytearray()
        async for chunk in reads:
            received += chunk
            await asyncio.sleep(0)  # let the server run ahead
    assert bytes(received) == b"".join(frames)


# Waiting before another try


def waited(error: BaseException | None, attempt: int, chance: float, longest_s: float = 30.0) -> float:
    outcome = SimpleNamespace(exception=lambda: error)
    state: Any = SimpleNamespace(outcome=outcome, attempt_number=attempt)
    return _RetryWait(longest_s, chance=lambda: chance)(state)


@pytest.mark.parametrize(
    ("attempt", "chance", "seconds"),
    [
        (1, 0.0, 0.5),
        (1, 0.5, 1.0),
        (1, 1.0, 1.5),
        (2, 0.5, 2.0),
        (3, 0.5, 4.0),
        (4, 1.0, 12.0),
        (9, 0.5, 30.0),
    ],
)
def test_waits_grow_and_vary(attempt: int, chance: float, seconds: float) -> None:
    assert waited(StreamError("x", retryable=True), attempt, chance) == seconds


@pytest.mark.parametrize(
    ("named", "seconds"), [(0.0, 0.0), (0.2, 0.2), (7.0, 7.0), (30.0, 30.0), (31.0, 30.0)]
)
def test_a_named_wait_is_kept(named: float, seconds: float) -> None:
    assert waited(OpenRouterAPIError("x", retryable=True, retry_after=named), 5, 0.5) == seconds


@pytest.mark.parametrize(
    ("error", "allowed"),
    [
        (StreamError("x", retryable=True), True),
        (StreamError("x"), False),
        (OpenRouterAPIError("x", retryable=True, retry_after=30.0), True),
        (OpenRouterAPIError("x", retryable=True, retry_after=30.1), False),
        (OpenRouterAPIError("x", retry_after=1.0), False),
        (OpenRouterAPIError("x", retryable=True, retry_after=math.inf), False),
        (ValueError("x"), False),
        (asyncio.CancelledError(), False),
    ],
)
def test_what_another_try_may_cure(error: BaseException, allowed: bool) -> None:
    assert _RetryWait(30.0).allows(error) is allowed


@pytest.mark.parametrize(
    ("seconds", "words"), [(31.0, "in 31 seconds"), (300.0, "in 5 minutes"), (7200.0, "in 2 hours")]
)
def test_a_wait_that_is_too_long_is_told(seconds: float, words: str) -> None:
    error = OpenRouterAPIError("Busy", template="rate_limit", retryable=True, retry_after=seconds)
    assert words in render_error(error)
