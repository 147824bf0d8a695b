"""What Open WebUI finds: the menu, the answer in the form that each client reads, keys, and the log."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import re
import uuid
from collections.abc import Iterator
from typing import Any

import pytest

from openrouter_responses_pipe.openrouter_responses_pipe import Pipe, UserValves
from openrouter_responses_pipe.simulator import Simulator
from tests.support import (
    DIALECTS,
    KEY,
    MENU,
    MODEL,
    PATIENCE_S,
    STREAMING,
    Answer,
    Events,
    answering,
    arguments,
    ask,
    call,
    free_port,
    gone,
    hostile,
    inferences,
    read_until_text,
    running_pipe,
    set_valves,
    stream,
)

Json = dict[str, Any]
ALL = sorted(DIALECTS)
NO_KEY = "No OpenRouter API key is set."


@pytest.fixture(autouse=True)
def a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """Open WebUI always has a secret."""
    monkeypatch.setenv("WEBUI_SECRET_KEY", "the secret of this server")


# The menu


async def test_the_menu_is_the_catalog(pipe: Pipe) -> None:
    menu = await pipe.pipes()
    assert {entry["id"]: entry["name"] for entry in menu} == MENU
    assert [entry["name"].lower() for entry in menu] == sorted(name.lower() for name in MENU.values())


async def test_the_menu_follows_the_valves_at_once(simulator: Simulator) -> None:
    """Also after filters that left nothing."""

    async def ids(pipe: Pipe, **changes: Any) -> list[str]:
        set_valves(pipe, simulator.base_url, **changes)
        return [entry["id"] for entry in await pipe.pipes()]

    async with running_pipe(simulator.base_url) as pipe:
        all_ids = await ids(pipe)
        assert await ids(pipe) == all_ids
        assert await ids(pipe, MODEL_ID="openai/gpt-5-mini") == ["openai/gpt-5-mini"]
        assert await ids(pipe, MODEL_ID="nobody/*") == ["setup"]
        assert await ids(pipe, MODEL_ID="nobody/*") == ["setup"]
        assert await ids(pipe) == all_ids


async def test_without_a_key_the_menu_says_so(simulator: Simulator) -> None:
    async with running_pipe(simulator.base_url, API_KEY="") as pipe:
        (entry,) = await pipe.pipes()
    assert entry["id"] == "setup"
    assert "No OpenRouter API key is set" in entry["name"]
    assert simulator.requests == []


def one_entry_that_explains(menu: list[dict[str, str]]) -> None:
    (entry,) = menu
    assert entry["id"] == "setup"
    assert "OpenRouter" in entry["name"]
    assert 20 < len(entry["name"]) < 300
    assert KEY not in entry["name"]


@pytest.mark.parametrize(
    "name", ["500_masked", "502_html", "401_bad_key", "429_free_daily", "403_guardrail", "503_no_provider"]
)
async def test_a_menu_that_is_refused(name: str, pipe: Pipe, simulator: Simulator) -> None:
    simulator.next("http_error", name=name, on="/models")
    one_entry_that_explains(await pipe.pipes())


@pytest.mark.parametrize("retry_after", ["inf", "nan", "1e400", "soon"])
async def test_a_menu_that_is_refused_for_an_odd_time(
    retry_after: str, pipe: Pipe, simulator: Simulator
) -> None:
    simulator.next("http_error", name="503_no_provider", on="/models", retry_after=retry_after)
    one_entry_that_explains(await pipe.pipes())


NO_CATALOG: dict[str, bytes] = {
    "nothing": b"",
    "a page": b"<html>busy</html>",
    "null": b"null",
    "a number": b"7",
    "a list": b"[]",
    "no data": b"{}",
    "empty": b'{"data": []}',
    "data is text": b'{"data": "none"}',
    "data is a mapping": b'{"data": {"id": "a/b"}}',
    "rows without an id": b'{"data": [null, 7, "x", {}, {"id": ""}, {"id": 7}]}',
    "half of it": b'{"data": [{"id": "a/b"',
    "endless nesting": b"[" * 200_000,
}


@pytest.mark.parametrize("case", sorted(NO_CATALOG))
async def test_a_menu_that_cannot_be_read(case: str) -> None:
    async with hostile(answering(NO_CATALOG[case])) as url, running_pipe(url) as pipe:
        one_entry_that_explains(await pipe.pipes())


ODD_ROWS = b"""{"data": [
 {"id": "a/b"}, {"id": "a/c", "name": 7, "architecture": "x", "supported_parameters": {}},
 {"id": "a/d", "name": null, "architecture": {"output_modalities": [1, null]}, "context_length": "long"},
 {"id": "a/e", "architecture": {"output_modalities": "text"}, "pricing": [], "reasoning": true}]}"""


async def test_odd_rows_do_not_spoil_the_menu() -> None:
    async with hostile(answering(ODD_ROWS)) as url, running_pipe(url) as pipe:
        menu = await pipe.pipes()
    assert {entry["id"] for entry in menu} == {"a/b", "a/c", "a/d", "a/e"}
    assert all(isinstance(entry["name"], str) and entry["name"] for entry in menu)


@pytest.mark.parametrize(
    "url",
    [
        "http://nonexistent.invalid/api/v1",
        "nowhere",
        "",
        "ftp://127.0.0.1/",
        "http://[::1",
        "http://127.0.0.1:99999",
    ],
)
async def test_a_menu_from_nowhere(url: str) -> None:
    async with running_pipe(url) as pipe:
        one_entry_that_explains(await pipe.pipes())


async def test_a_menu_while_nobody_listens() -> None:
    async with running_pipe(f"http://127.0.0.1:{free_port()}/api/v1") as pipe:
        one_entry_that_explains(await pipe.pipes())


async def test_a_menu_comes_back_with_the_server(pipe: Pipe, simulator: Simulator) -> None:
    simulator.next("http_error", name="500_masked", on="/models")
    one_entry_that_explains(await pipe.pipes())
    set_valves(pipe, simulator.base_url, API_KEY=f"{KEY}-2")  # another key is asked for at once
    assert len(await pipe.pipes()) > 3


# What is wrong with the set-up is said where the answer would have been


@pytest.mark.parametrize("dialect", ALL)
async def test_without_a_key_a_chat_says_so(dialect: str, simulator: Simulator) -> None:
    async with running_pipe(simulator.base_url, API_KEY="") as pipe:
        answer = await ask(pipe, "hello", dialect)
    assert answer.error.startswith(NO_KEY)
    assert "API_KEY" in answer.error
    assert answer.text == ""
    assert simulator.requests == []


@pytest.mark.parametrize("dialect", ALL)
async def test_a_wrong_key(dialect: str, simulator: Simulator) -> None:
    async with running_pipe(simulator.base_url, API_KEY="sk-bad-key") as pipe:
        answer = await ask(pipe, "hello", dialect)
    assert answer.error.startswith("OpenRouter did not accept the API key.")
    assert "sk-bad-key" not in str(answer.chunks)


@pytest.mark.parametrize("url", ["nowhere", "", "ftp://127.0.0.1/", "http://[::1", "http://127.0.0.1:99999"])
@pytest.mark.parametrize("dialect", ALL)
async def test_a_wrong_address(dialect: str, url: str) -> None:
    async with running_pipe(url) as pipe:
        answer = await ask(pipe, "hello", dialect)
    assert "BASE_URL" in answer.error
    assert "Error id" not in answer.error


async def test_a_key_that_cannot_be_read_any_more(
    simulator: Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = Pipe.Valves.model_validate({"API_KEY": KEY}).model_dump(exclude_unset=True)
    assert KEY not in str(stored)
    monkeypatch.setenv("WEBUI_SECRET_KEY", "a new secret")
    async with running_pipe(simulator.base_url, **stored) as pipe:
        answer = await ask(pipe, "hello")
        (entry,) = await pipe.pipes()
    assert "can no longer be read" in answer.error
    assert "can no longer be read" in entry["name"]


async def test_the_entry_that_explains_can_be_chosen(pipe: Pipe, simulator: Simulator) -> None:
    answer = await ask(pipe, "hello", model="openrouter.setup")
    assert answer.error
    assert inferences(simulator) == []


async def test_a_model_that_nobody_has(pipe: Pipe) -> None:
    answer = await ask(pipe, "hello", model="openrouter.acme/none-1")
    assert "acme/none-1 is not a valid model ID" in answer.error


# Which client gets what


@pytest.mark.parametrize("dialect", ALL)
async def test_the_form_of_an_answer(dialect: str, pipe: Pipe) -> None:
    answer = await ask(pipe, "[[reasoning]]" if dialect != "task" else "hello", dialect)
    kinds = {
        "browser": {"response.output_item.added", "response.output_item.done", "response.completed"},
        "browser_json": {None},
        "api_stream": {"chat.completion.chunk"},
        "task_stream": {"chat.completion.chunk"},
        "api_json": {"chat.completion"},
        "task": {"chat.completion"},
    }
    told = {chunk.get("type") or chunk.get("object") for chunk in answer.chunks}
    assert kinds[dialect] <= told
    if dialect != "browser":
        assert told == kinds[dialect]
    assert ("output" in answer.chunks[0]) is (dialect == "browser_json")


@pytest.mark.parametrize(
    ("chat_id", "message_id", "session_id", "kind"),
    [
        ("c", "m", "s", "response.output_item.added"),
        ("c", "m", None, "response.output_item.added"),  # an automation has no session
        ("c", "m", "", "response.output_item.added"),
        ("", "m", "s", "chat.completion.chunk"),
        ("c", None, "s", "chat.completion.chunk"),
        (None, None, None, "chat.completion.chunk"),
    ],
)
async def test_chat_and_message_decide_and_not_the_session(
    chat_id: Any, message_id: Any, session_id: Any, kind: str, pipe: Pipe
) -> None:
    given = arguments("hello")
    given["__metadata__"] |= {"chat_id": chat_id, "message_id": message_id, "session_id": session_id}
    answer = await call(pipe, given)
    assert (answer.chunks[0].get("type") or answer.chunks[0].get("object")) == kind


async def test_calling_with_the_body_alone(pipe: Pipe) -> None:
    body = arguments("[[plain text=fine]]", "api_json")["body"]
    answer = Answer()
    result = await pipe.pipe(body)
    assert isinstance(result, dict)
    answer.add(result)
    assert answer.text == "fine"


async def test_the_pipe_itself_may_be_called(pipe: Pipe) -> None:
    result = await pipe(**arguments("[[plain text=fine]]", "api_json"))
    assert isinstance(result, dict)
    assert result["choices"][0]["message"]["content"] == "fine"


async def test_an_answer_begins_when_it_is_asked_for(pipe: Pipe, simulator: Simulator) -> None:
    """`pipe()` returns at once, so that the host can send its headers."""
    simulator.next("stall_headers", on="/models", times=math.inf)
    async with asyncio.timeout(PATIENCE_S):
        chunks = await stream(pipe, "hello")
    assert simulator.requests == []
    await chunks.aclose()


async def test_the_body_is_not_changed(pipe: Pipe) -> None:
    given = arguments("hello", temperature=0.5, tools=[])
    before = repr(given["body"])
    await call(pipe, given)
    assert repr(given["body"]) == before


async def test_parameters_and_the_model_reach_openrouter(pipe: Pipe, simulator: Simulator) -> None:
    await ask(pipe, "hello", temperature=0.25, max_tokens=77)
    body = inferences(simulator)[0].body
    assert (body["model"], body["temperature"], body["max_output_tokens"]) == (MODEL, 0.25, 77)
    assert body["store"] is False
    assert inferences(simulator)[0].unknown == []


async def test_the_application_introduces_itself(pipe: Pipe, simulator: Simulator) -> None:
    named = {
        "APP_URL": "https://chat.example.org",
        "APP_TITLE": "Our chat\r\nX-Evil: 1",
        "APP_CATEGORIES": "cli",
    }
    set_valves(pipe, simulator.base_url, **named)
    await ask(pipe, "hello")
    for record in simulator.requests:
        assert record.headers["http-referer"] == "https://chat.example.org"
        assert record.headers["x-openrouter-title"] == "Our chatX-Evil: 1"
        assert record.headers["x-openrouter-categories"] == "cli"


# Whose key


def of_user(key: str, dialect: str = "browser") -> Json:
    """What the host passes for a user who has entered a key."""
    given = arguments("hello", dialect)
    given["__user__"]["valves"] = UserValves.model_validate({"API_KEY": key})
    return given


@pytest.mark.parametrize(("allowed", "used"), [(True, "sk-of-the-user"), (False, KEY)])
@pytest.mark.parametrize("dialect", ALL)
async def test_a_users_own_key_counts_only_if_it_may(dialect: str, allowed: bool, used: str) -> None:
    async with (
        Simulator(keep_keys=True) as simulator,
        running_pipe(simulator.base_url, ALLOW_USER_API_KEYS=allowed) as pipe,
    ):
        assert (await call(pipe, of_user("sk-of-the-user", dialect))).error == ""
    assert {record.headers["authorization"] for record in inferences(simulator)} == {f"Bearer {used}"}


async def test_users_with_keys_of_their_own_at_once(simulator: Simulator) -> None:
    async with running_pipe(simulator.base_url, ALLOW_USER_API_KEYS=True) as pipe:
        await asyncio.gather(*(call(pipe, of_user(f"sk-user-{number}")) for number in range(20)))
        await ask(pipe, "hello")
    assert len({record.key for record in inferences(simulator)}) == 21


async def test_a_users_key_serves_where_there_is_no_other(simulator: Simulator) -> None:
    async with running_pipe(simulator.base_url, API_KEY="", ALLOW_USER_API_KEYS=True) as pipe:
        assert (await call(pipe, of_user("sk-of-the-user"))).error == ""
        assert (await ask(pipe, "hello")).error.startswith(NO_KEY)


async def test_a_user_decides_what_is_shown(pipe: Pipe) -> None:
    given = arguments("[[reasoning]]")
    given["__user__"]["valves"] = UserValves(SHOW_THINKING="off", SHOW_FINAL_USAGE_STATUS="off")
    answer = await call(pipe, given)
    assert (answer.reasoning, bool(answer.text)) == ("", True)
    assert not [status for status in given["__event_emitter__"].statuses() if "tokens" in status]


@pytest.mark.parametrize("valves", [None, {}, {"API_KEY": "sk-of-the-user"}, "nonsense", 7], ids=repr)
async def test_user_valves_of_any_kind_harm_nothing(valves: Any, pipe: Pipe) -> None:
    given = arguments("[[plain text=fine]]")
    given["__user__"]["valves"] = valves
    assert (await call(pipe, given)).text == "fine"


# What stands in the log


SECRETS = {
    "admin": "sk-or-v1-5ecre7-0f-7he-4dmin",
    "user": "sk-or-v1-5ecre7-0f-7he-u5er",
    "prompt": "my-5ecre7-que5tion",
    "answer": "my-5ecre7-4nswer",
    "system": "my-5ecre7-5ystem-prompt",
}


@pytest.fixture
def everything_logged(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """Every line of every logger; loggers that were quieter before are so again after the test."""
    before = {name: logging.getLogger(name).level for name in list(logging.root.manager.loggerDict)}
    caplog.set_level(logging.DEBUG)
    for name in before:
        logging.getLogger(name).setLevel(logging.NOTSET)
    yield caplog
    for name, level in before.items():
        logging.getLogger(name).setLevel(level)


ENDINGS: dict[str, Json] = {
    "plain": {},
    "reasoning": {},
    "tool": {},
    "or_search": {},
    "incomplete": {},
    "refusal": {},
    "failed": {},
    "error_flat": {},
    "abrupt": {},
    "eof": {},
    "http_error 400_provider_raw": {"name": "400_provider_raw"},
    "http_error 401_bad_key": {"name": "401_bad_key"},
    "http_error 403_moderation": {"name": "403_moderation"},
    "http_error 500_masked": {"name": "500_masked", "retry_after": 0},
}


@pytest.mark.parametrize("ending", sorted(ENDINGS))
async def test_no_secret_is_logged(
    ending: str, simulator: Simulator, everything_logged: pytest.LogCaptureFixture
) -> None:
    messages = [
        {"role": "system", "content": SECRETS["system"]},
        {"role": "user", "content": SECRETS["prompt"]},
    ]
    async with running_pipe(
        simulator.base_url, API_KEY=SECRETS["admin"], ALLOW_USER_API_KEYS=True, RETRY_ATTEMPTS=1
    ) as pipe:
        await pipe.pipes()
        for dialect in ALL:
            simulator.next(ending.split()[0], tasks=True, text=SECRETS["answer"], **ENDINGS[ending])
            given = arguments({"messages": messages}, dialect)
            given["__user__"]["valves"] = UserValves.model_validate({"API_KEY": SECRETS["user"]})
            await call(pipe, given)
    _nothing_told(everything_logged)


async def test_no_secret_is_logged_when_something_unexpected_happens(
    pipe: Pipe, simulator: Simulator, everything_logged: pytest.LogCaptureFixture
) -> None:
    set_valves(pipe, simulator.base_url, API_KEY=SECRETS["admin"])
    deep: Json = {}
    deep["again"] = deep
    messages = [{"role": "user", "content": SECRETS["prompt"]}]
    answer = await ask(pipe, {"messages": messages, "response_format": deep})
    assert answer.error
    _nothing_told(everything_logged)


async def test_no_secret_is_logged_at_a_stop(
    pipe: Pipe, simulator: Simulator, everything_logged: pytest.LogCaptureFixture
) -> None:
    set_valves(pipe, simulator.base_url, API_KEY=SECRETS["admin"])
    simulator.next("stall", hang=12, text=f"{SECRETS['answer']} " * 20)
    chunks = await stream(pipe, SECRETS["prompt"])
    await read_until_text(chunks, Answer())
    await chunks.aclose()
    await gone(simulator)
    _nothing_told(everything_logged)


def _nothing_told(log: pytest.LogCaptureFixture) -> None:
    assert log.text
    told = [name for name, secret in SECRETS.items() if secret in log.text]
    told += [name for name, secret in SECRETS.items() if any(secret in repr(r.args) for r in log.records)]
    assert told == []


async def test_one_line_for_each_request(pipe: Pipe, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "openrouter_responses_pipe")
    for dialect in ALL:
        await ask(pipe, "hello", dialect)
    lines = [record.getMessage() for record in caplog.records if "answered" in record.getMessage()]
    assert len(lines) == len(ALL)
    found = [
        re.fullmatch(r"usage (\{.*\}) \[request ([0-9a-f]{8}), user user, session \w+\]", line)
        for line in lines
    ]
    assert len({match[2] for match in found if match}) == len(ALL)
    facts = [json.loads(match[1]) for match in found if match]
    assert {fact["model"] for fact in facts} == {MODEL}
    assert all(fact["output_tokens"] and fact["cost"] and "first_token_seconds" in fact for fact in facts)


# Many requests through one object


async def test_requests_do_not_mix(pipe: Pipe, simulator: Simulator) -> None:
    """Every dialect at once, each with its own emitter, text and events."""
    givens = []
    for number in range(60):
        dialect = ALL[number % len(ALL)]
        name = f"unique{uuid.UUID(int=number).hex}"
        prompt = f"[[plain text={name}]]" if dialect != "task" else name
        givens.append((dialect, name, arguments(prompt, dialect)))
    answers = await asyncio.gather(*(call(pipe, given) for _, _, given in givens))
    for (dialect, name, given), answer in zip(givens, answers, strict=True):
        assert answer.error == ""
        assert name in answer.text
        others = [other for _, other, _ in givens if other != name and other in str(answer.chunks)]
        assert others == []
        events: Events = given["__event_emitter__"]
        assert bool(events) is dialect.startswith("browser")


@pytest.mark.parametrize("dialect", STREAMING)
async def test_valves_are_those_of_the_moment_of_asking(
    dialect: str, pipe: Pipe, simulator: Simulator
) -> None:
    """The host sets `valves` on the one object before each call, also while others run."""
    chunks = await stream(pipe, "[[drip rate=100 tokens=30]]", dialect)
    set_valves(pipe, "http://nonexistent.invalid/api/v1", API_KEY="")
    answer = Answer()
    async for chunk in chunks:
        answer.add(chunk)
    assert (len(answer.text.split()), answer.error) == (30, "")
