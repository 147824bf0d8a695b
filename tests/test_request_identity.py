"""How long a model thinks, what its provider keeps, and who OpenRouter learns is asking."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from referencing import Registry, Resource
from referencing.jsonschema import DRAFT202012

from openrouter_responses_pipe.openrouter_responses_pipe import (
    ChatRequest,
    CompletionsBody,
    HostEnvironment,
    ModelSpec,
    OpenRouterModelRegistry,
    Pipe,
    ReasoningSpec,
    RequestSettings,
    ResponsesBody,
    UserValves,
    Valves,
    _model_spec,
    _request_settings,
)
from openrouter_responses_pipe.simulator import CATALOG, RecordedRequest, Simulator
from tests.support import DIALECTS, arguments, call, running_pipe, set_valves

Json = dict[str, Any]
DATA: Final = Path(__file__).parent / "data" / "openrouter"
MODELS: Final[dict[str, ModelSpec]] = {
    spec.id: spec for entry in CATALOG if (spec := _model_spec(entry)) is not None
}
EFFORTS: Final = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
SEALED: Final = ["reasoning.encrypted_content"]
CLAUDE: Final = "anthropic/claude-sonnet-4.6"
LATEST: Final = "~anthropic/claude-sonnet-latest"
MUST_THINK: Final = "openai/gpt-5-mini"
TOOL: Final[Json] = {"type": "function", "function": {"name": "now"}}


@pytest.fixture(autouse=True)
def a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """Open WebUI always has a secret."""
    monkeypatch.setenv("WEBUI_SECRET_KEY", "the secret of this server")


@functools.cache
def validator() -> Draft202012Validator:
    """OpenRouter's own description of a request."""
    document = json.loads((DATA / "openapi.trimmed.json").read_text("utf-8"))
    resource = Resource.from_contents(document, default_specification=DRAFT202012)
    registry = Registry().with_resource("urn:d", resource)
    return Draft202012Validator({"$ref": "urn:d#/components/schemas/ResponsesRequest"}, registry=registry)


async def no_catalog(*_: Any) -> Any:
    """A registry that is asked to fit only fetches nothing."""
    raise AssertionError


def leaving(spec: ModelSpec, request_settings: RequestSettings, **parameters: Any) -> Json:
    """The request as it leaves: translated, then made to fit its model; it is valid."""
    body = CompletionsBody.parse(
        {"model": spec.id, "messages": [{"role": "user", "content": "hello"}], **parameters}
    )
    payload = ResponsesBody.from_completions(body, spec, request_settings).payload
    fitted = OpenRouterModelRegistry(no_catalog, lambda: 0.0).fit(payload, spec)
    validator().validate(fitted)
    return fitted


# How long a model thinks


def thinker(*efforts: str, mandatory: bool = False, budget: bool = False, unknown: bool = False) -> ModelSpec:
    how = ReasoningSpec(mandatory=mandatory, efforts=None if unknown else efforts, takes_budget=budget)
    return ModelSpec("a/mind", "Mind", reasoning=how)


THREE: Final = ("high", "medium", "low")
MIND: Final = thinker(*THREE)
BUDGET: Final = thinker(*THREE, budget=True)
MANDATORY: Final = thinker(*THREE, "minimal", mandatory=True)
HIGH: Final = RequestSettings(effort="high")
PLAIN: Final = RequestSettings()
NO_SUMMARY: Final = RequestSettings(summary="off")
DETAILED: Final = RequestSettings(summary="detailed")

# model, settings, the chat's parameters, what is asked of the model
ASKED: Final[list[tuple[ModelSpec, RequestSettings, Json, Json]]] = [
    # The model's own default, unless a valve or the chat says otherwise
    (MIND, PLAIN, {}, {"summary": "auto"}),
    (MIND, HIGH, {}, {"summary": "auto", "effort": "high"}),
    (MIND, HIGH, {"reasoning_effort": "low"}, {"summary": "auto", "effort": "low"}),
    (MIND, HIGH, {"reasoning": {"effort": "low"}}, {"summary": "auto", "effort": "low"}),
    (
        MIND,
        HIGH,
        {"reasoning": {"effort": "medium"}, "reasoning_effort": "low"},
        {"summary": "auto", "effort": "low"},
    ),
    (MIND, PLAIN, {"reasoning_effort": None}, {"summary": "auto"}),
    # Summaries
    (MIND, NO_SUMMARY, {"reasoning_effort": "low"}, {"effort": "low"}),
    (MIND, DETAILED, {}, {"summary": "detailed"}),
    (
        MIND,
        RequestSettings(summary="detailed"),
        {"reasoning": {"summary": "concise"}},
        {"summary": "concise"},
    ),
    (MIND, NO_SUMMARY, {"reasoning": {"summary": "concise"}}, {"summary": "concise"}),
    # Only what the model has
    (MIND, RequestSettings(effort="max"), {}, {"summary": "auto", "effort": "high"}),
    (MIND, RequestSettings(effort="minimal"), {}, {"summary": "auto", "effort": "low"}),
    (MIND, RequestSettings(effort="none"), {}, {"enabled": False}),
    (thinker(), HIGH, {}, {"summary": "auto"}),
    (thinker(unknown=True), RequestSettings(effort="xhigh"), {}, {"summary": "auto", "effort": "xhigh"}),
    (MANDATORY, RequestSettings(effort="none"), {}, {"summary": "auto", "effort": "minimal"}),
    (MANDATORY, PLAIN, {"reasoning_effort": "none"}, {"summary": "auto", "effort": "minimal"}),
    # Budgets where they are known, efforts elsewhere, never both
    (BUDGET, HIGH, {"reasoning": {"max_tokens": 2000}}, {"summary": "auto", "max_tokens": 2000}),
    (
        BUDGET,
        PLAIN,
        {"reasoning": {"max_tokens": 2000, "effort": "low"}},
        {"summary": "auto", "max_tokens": 2000},
    ),
    (MIND, PLAIN, {"reasoning": {"max_tokens": 2000, "effort": "low"}}, {"summary": "auto", "effort": "low"}),
    (MIND, PLAIN, {"reasoning": {"max_tokens": 2000}}, {"summary": "auto"}),
]


@pytest.mark.parametrize(("spec", "request_settings", "parameters", "asked"), ASKED)
def test_what_is_asked_of_a_model_that_thinks(
    spec: ModelSpec, request_settings: RequestSettings, parameters: Json, asked: Json
) -> None:
    payload = leaving(spec, request_settings, **parameters)
    assert payload["reasoning"] == asked
    assert payload.get("include") == (None if asked == {"enabled": False} else SEALED)


def test_an_effort_beside_a_budget_that_is_not_sent_must_be_one_that_the_model_has() -> None:
    asked = leaving(MIND, PLAIN, reasoning={"max_tokens": 2000, "effort": "max"})["reasoning"]
    assert asked == {"summary": "auto", "effort": "high"}
    asked = leaving(MANDATORY, PLAIN, reasoning={"max_tokens": 2000, "effort": "none"})["reasoning"]
    assert asked == {"summary": "auto", "effort": "minimal"}


def test_a_valve_counts_where_a_budget_cannot_be_sent() -> None:
    asked = leaving(MIND, HIGH, reasoning={"max_tokens": 2000})["reasoning"]
    assert asked == {"summary": "auto", "effort": "high"}


def test_thinking_that_a_chat_switches_off_is_not_switched_on_by_a_valve() -> None:
    asked = leaving(MIND, HIGH, reasoning={"enabled": False})["reasoning"]
    assert asked.get("enabled") is False
    assert "effort" not in asked


@pytest.mark.parametrize("request_settings", [PLAIN, HIGH])
def test_who_must_think_is_not_told_not_to(request_settings: RequestSettings) -> None:
    """`enabled: false` is `effort: none` by another name."""
    asked = leaving(MANDATORY, request_settings, reasoning={"enabled": False})["reasoning"]
    assert asked.get("enabled") is not False


@pytest.mark.parametrize("request_settings", [PLAIN, HIGH, RequestSettings(is_task=True)])
@pytest.mark.parametrize("parameters", [{}, {"reasoning_effort": "high"}, {"reasoning": {"max_tokens": 9}}])
def test_a_model_that_does_not_think_is_not_asked_to(
    request_settings: RequestSettings, parameters: Json
) -> None:
    payload = leaving(ModelSpec("a/b", "B"), request_settings, **parameters)
    assert {"reasoning", "include"}.isdisjoint(payload)


@pytest.mark.parametrize(
    ("spec", "asked"),
    [
        (MIND, {"enabled": False}),
        (thinker(*THREE, "none"), {"effort": "none"}),
        (MANDATORY, {"effort": "minimal"}),
        (thinker(*THREE, mandatory=True), {"effort": "low"}),
        (thinker("max", "xhigh", mandatory=True), {"effort": "xhigh"}),
        (thinker(unknown=True, mandatory=True), {"effort": "minimal"}),
        (thinker(unknown=True), {"effort": "none"}),
        (thinker(), {"enabled": False}),
    ],
)
@pytest.mark.parametrize("parameters", [{}, {"reasoning_effort": "high"}, {"reasoning": {"max_tokens": 9}}])
def test_a_task_is_thought_about_as_little_as_possible(
    spec: ModelSpec, asked: Json, parameters: Json
) -> None:
    payload = leaving(spec, RequestSettings(is_task=True, effort="max"), **parameters)
    assert payload["reasoning"] == asked
    assert "include" not in payload


def test_a_task_of_a_model_that_must_think_and_has_no_choice() -> None:
    assert not leaving(thinker(mandatory=True), RequestSettings(is_task=True)).get("reasoning")


ANY_SETTINGS: Final = st.tuples(
    st.booleans(), st.sampled_from(["", *EFFORTS]), st.sampled_from(["auto", "concise", "detailed", "off"])
).map(lambda drawn: RequestSettings(is_task=drawn[0], effort=drawn[1], summary=drawn[2]))
ANY_REASONING: Final = st.fixed_dictionaries(
    {},
    optional={
        "reasoning_effort": st.sampled_from(EFFORTS),
        "reasoning": st.fixed_dictionaries(
            {},
            optional={
                "effort": st.sampled_from(EFFORTS),
                "max_tokens": st.integers(1, 5000),
                "enabled": st.booleans(),
                "summary": st.sampled_from(["auto", "concise"]),
                "exclude": st.booleans(),
            },
        ),
    },
)


@settings(max_examples=500, deadline=None)
@given(
    efforts=st.none() | st.lists(st.sampled_from(EFFORTS), unique=True),
    mandatory=st.booleans(),
    budget=st.booleans(),
    request_settings=ANY_SETTINGS,
    parameters=ANY_REASONING,
)
def test_nothing_is_asked_that_the_model_would_refuse(
    efforts: list[str] | None,
    mandatory: bool,
    budget: bool,
    request_settings: RequestSettings,
    parameters: Json,
) -> None:
    how = ReasoningSpec(mandatory, efforts=None if efforts is None else tuple(efforts), takes_budget=budget)
    spec = ModelSpec("a/mind", "Mind", reasoning=how)
    asked = leaving(spec, request_settings, **parameters)["reasoning"]
    assert not {"effort", "max_tokens"} <= asked.keys()
    assert budget or "max_tokens" not in asked
    options = (set(EFFORTS) if efforts is None else set(efforts)) - ({"none"} if mandatory else set())
    assert asked.get("effort") in {None, *options}
    assert not (mandatory and asked.get("enabled") is False)
    assert not (asked.get("enabled") is False and asked.keys() & {"effort", "max_tokens"})


# The same on its way


def posts(simulator: Simulator) -> list[RecordedRequest]:
    return [record for record in simulator.requests if record.method == "POST"]


async def record_of(
    pipe: Pipe,
    simulator: Simulator,
    model: str,
    dialect: str = "browser",
    *,
    user_valves: Json | None = None,
    ids: Json | None = None,
    user: Json | None = None,
    **body: Any,
) -> RecordedRequest:
    """The request that one answer took."""
    before = len(posts(simulator))
    given_values = arguments("hello", dialect, model=f"openrouter.{model}", **body)
    given_values["__user__"] |= user or {}
    given_values["__metadata__"] |= ids or {}
    if user_valves is not None:
        given_values["__user__"]["valves"] = UserValves.model_validate(user_valves)
    answer = await call(pipe, given_values)
    assert answer.error == ""
    (record,) = posts(simulator)[before:]
    return record


@pytest.mark.parametrize(
    ("valve", "user_valve", "chat", "effort"),
    [
        ("", None, None, None),
        ("low", None, None, "low"),
        ("low", "inherit", None, "low"),
        ("low", "high", None, "high"),
        ("", "high", None, "high"),
        ("high", "none", None, "none"),
        ("low", "high", "medium", "medium"),
        ("low", None, "medium", "medium"),
    ],
)
@pytest.mark.parametrize("dialect", ["browser", "api_json"])
async def test_whose_effort_counts(
    dialect: str,
    valve: str,
    user_valve: str | None,
    chat: str | None,
    effort: str | None,
    pipe: Pipe,
    simulator: Simulator,
) -> None:
    set_valves(pipe, simulator.base_url, REASONING_EFFORT=valve)
    user_valves = None if user_valve is None else {"REASONING_EFFORT": user_valve}
    record = await record_of(pipe, simulator, CLAUDE, dialect, user_valves=user_valves, reasoning_effort=chat)
    assert record.body["reasoning"].get("effort") == effort


@pytest.mark.parametrize("summary", ["auto", "concise", "detailed", "off"])
async def test_the_summary_that_a_valve_wants(summary: str, pipe: Pipe, simulator: Simulator) -> None:
    set_valves(pipe, simulator.base_url, REASONING_SUMMARY=summary)
    record = await record_of(pipe, simulator, MUST_THINK)
    assert record.body["reasoning"].get("summary", "off") == summary
    assert record.body["include"] == SEALED


@pytest.mark.parametrize(
    ("model", "asked"),
    [
        (CLAUDE, {"effort": "none"}),
        (LATEST, {"effort": "none"}),
        (MUST_THINK, {"effort": "minimal"}),
        ("openai/gpt-oss-20b:free", {"enabled": False}),
        ("openai/gpt-4o-mini", None),
        (f"{MUST_THINK}:nitro", {"effort": "minimal"}),
    ],
)
async def test_a_task_on_its_way(model: str, asked: Json | None, pipe: Pipe, simulator: Simulator) -> None:
    set_valves(pipe, simulator.base_url, REASONING_EFFORT="high", USE_MODEL_MAX_OUTPUT_TOKENS=True)
    body = (await record_of(pipe, simulator, model, "task", max_tokens=1000)).body
    assert body.get("reasoning") == asked
    assert body["max_output_tokens"] == 1000
    assert {"include", "tools", "cache_control"}.isdisjoint(body)


@pytest.mark.parametrize(
    ("on", "dialect", "parameters", "limit"),
    [
        (False, "browser", {}, None),
        (True, "browser", {}, 64_000),
        (True, "api_json", {}, 64_000),
        (True, "browser", {"max_tokens": 70}, 70),
        (True, "browser", {"num_predict": "70"}, 70),
        (True, "browser", {"max_tokens": None}, 64_000),
        (True, "task", {}, None),
    ],
)
async def test_as_many_tokens_as_a_model_can_write(
    on: bool, dialect: str, parameters: Json, limit: int | None, pipe: Pipe, simulator: Simulator
) -> None:
    set_valves(pipe, simulator.base_url, USE_MODEL_MAX_OUTPUT_TOKENS=on)
    record = await record_of(pipe, simulator, CLAUDE, dialect, **parameters)
    assert record.body.get("max_output_tokens") == limit


def test_where_the_catalog_has_no_limit_none_is_sent() -> None:
    spec = ModelSpec("a/b", "B", context_length=8000)
    assert "max_output_tokens" not in leaving(spec, RequestSettings(whole_output=True))


INTERLEAVED: Final = "interleaved-thinking-2025-05-14"


@pytest.mark.parametrize(
    ("model", "dialect", "parameters", "header"),
    [
        (CLAUDE, "browser", {"tools": [TOOL]}, INTERLEAVED),
        (LATEST, "browser", {"tools": [TOOL]}, INTERLEAVED),
        (f"{CLAUDE}:nitro", "browser", {"tools": [TOOL]}, INTERLEAVED),
        (CLAUDE, "api_json", {"tools": [TOOL]}, INTERLEAVED),
        (CLAUDE, "browser", {"tools": [TOOL], "reasoning_effort": "high"}, INTERLEAVED),
        (CLAUDE, "browser", {}, None),
        (CLAUDE, "task", {"tools": [TOOL]}, None),
        (CLAUDE, "browser_json", {"tools": [TOOL]}, None),
        (MUST_THINK, "browser", {"tools": [TOOL]}, None),
    ],
)
@pytest.mark.parametrize("over_chat", [False, True])
async def test_claude_is_asked_to_think_between_its_calls(
    over_chat: bool,
    model: str,
    dialect: str,
    parameters: Json,
    header: str | None,
    pipe: Pipe,
    simulator: Simulator,
) -> None:
    set_valves(pipe, simulator.base_url, FORCE_CHAT_COMPLETIONS_MODELS="*" if over_chat else "")
    record = await record_of(pipe, simulator, model, dialect, **parameters)
    assert record.path.endswith("/chat/completions") is over_chat
    assert record.headers.get("x-anthropic-beta") == header


async def test_the_header_of_one_request_is_not_the_next_ones(pipe: Pipe, simulator: Simulator) -> None:
    await record_of(pipe, simulator, CLAUDE, tools=[TOOL])
    assert "x-anthropic-beta" not in (await record_of(pipe, simulator, CLAUDE)).headers


# What Anthropic's models keep


@pytest.mark.parametrize(
    ("model", "keeps"),
    [
        (CLAUDE, True),
        (LATEST, True),
        (f"{CLAUDE}:nitro", True),
        (f"{CLAUDE}:thinking", True),
        (f"{CLAUDE}@preset/ours", True),
        (MUST_THINK, False),
        ("openrouter/auto", False),
        ("google/gemini-2.5-flash", False),
        ("acme/anthropic", False),
        ("anthropics/claude", False),
    ],
)
@pytest.mark.parametrize(
    ("caching", "ttl", "sent"),
    [
        ("auto", "5m", {"type": "ephemeral"}),
        ("auto", "1h", {"type": "ephemeral", "ttl": "1h"}),
        ("off", "1h", None),
    ],
)
def test_what_anthropics_models_keep(
    model: str, keeps: bool, caching: str, ttl: str, sent: Json | None
) -> None:
    spec = MODELS.get(model) or MODELS[CLAUDE]._replace(id=model)
    valves = Valves.model_validate({"PROMPT_CACHING": caching, "PROMPT_CACHE_TTL": ttl})
    for is_task in (False, True):
        request = ChatRequest(body={}, dialect="api_stream", model=model, is_task=is_task)
        made = _request_settings(valves, request, spec, HostEnvironment("secret"), offer_tools=False)
        expected = sent if keeps and not is_task else None
        assert leaving(spec, made).get("cache_control") == expected


@pytest.mark.parametrize("over_chat", [False, True])
@pytest.mark.parametrize(
    ("model", "dialect", "sent"),
    [
        (CLAUDE, "browser", {"type": "ephemeral", "ttl": "1h"}),
        (LATEST, "api_stream", {"type": "ephemeral", "ttl": "1h"}),
        (CLAUDE, "task", None),
        (MUST_THINK, "browser", None),
    ],
)
async def test_caching_on_its_way(
    model: str, dialect: str, sent: Json | None, over_chat: bool, pipe: Pipe, simulator: Simulator
) -> None:
    """Both endpoints know the field."""
    force = "*" if over_chat else ""
    set_valves(pipe, simulator.base_url, PROMPT_CACHE_TTL="1h", FORCE_CHAT_COMPLETIONS_MODELS=force)
    record = await record_of(pipe, simulator, model, dialect)
    assert record.body.get("cache_control") == sent


async def test_a_chats_own_caching_wins(pipe: Pipe, simulator: Simulator) -> None:
    set_valves(pipe, simulator.base_url, PROMPT_CACHE_TTL="1h")
    record = await record_of(pipe, simulator, CLAUDE, cache_control={"type": "ephemeral", "ttl": "5m"})
    assert record.body["cache_control"] == {"type": "ephemeral", "ttl": "5m"}


# Who is asking

USER: Final[Json] = {
    "id": "2f8d1c1e-user",
    "name": "Ada Lovelace",
    "email": "ada@example.org",
    "username": "countess",
}
IDS: Final[Json] = {
    "chat_id": "c0ffee-chat",
    "message_id": "facade-message",
    "session_id": "socket-session",
    "user_id": USER["id"],
    "folder_id": "folder-7",
}
NAMED: Final = ("session_id", "user", "safety_identifier", "metadata")
PSEUDONYM: Final = re.compile(r"[0-9a-f]{32}")


async def identity(
    simulator: Simulator,
    identifiers: str = "hashed",
    *,
    ids: Mapping[str, Any] = IDS,
    user: Mapping[str, Any] = USER,
    dialect: str = "browser",
    model: str = CLAUDE,
    **valves: Any,
) -> Json:
    """The fields of one request that say who asks, of a pipe of its own."""
    async with running_pipe(simulator.base_url, SEND_IDENTIFIERS=identifiers, **valves) as pipe:
        record = await record_of(pipe, simulator, model, dialect, ids=dict(ids), user=dict(user))
    return {name: record.body[name] for name in NAMED if name in record.body}


async def test_the_same_chat_has_the_same_ids(simulator: Simulator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also after a restart: providers keep what they have cached for a chat by its session."""
    first = await identity(simulator)
    assert await identity(simulator) == first
    assert await identity(simulator, model=MUST_THINK) == first
    assert await identity(simulator, dialect="browser_json") == first
    other = await identity(simulator, ids={**IDS, "chat_id": "another"})
    assert other["session_id"] != first["session_id"]
    assert other["metadata"] != first["metadata"]
    assert (other["user"], other["safety_identifier"]) == (first["user"], first["safety_identifier"])
    monkeypatch.setenv("WEBUI_SECRET_KEY", "another secret")
    elsewhere = await identity(simulator)
    assert all(elsewhere[name] != first[name] for name in NAMED)


async def test_people_have_ids_of_their_own(simulator: Simulator) -> None:
    first, second = await identity(simulator), await identity(simulator, user={**USER, "id": "another"})
    assert first["user"] != second["user"]
    assert first["session_id"] == second["session_id"]


@pytest.mark.parametrize(
    ("identifiers", "names"),
    [("none", {"session_id"}), ("hashed", set(NAMED)), ("plain", set(NAMED))],
)
async def test_what_is_said_of_who_asks(identifiers: str, names: set[str], simulator: Simulator) -> None:
    found = await identity(simulator, identifiers)
    assert found.keys() == names
    assert PSEUDONYM.fullmatch(found["session_id"])
    if identifiers == "plain":
        assert (found["user"], found["safety_identifier"]) == (USER["id"], USER["id"])
        assert found["metadata"] == {"chat_id": IDS["chat_id"]}
    if identifiers == "hashed":
        assert PSEUDONYM.fullmatch(found["user"])
        assert found["safety_identifier"] == found["user"]
        assert found["metadata"].keys() == {"chat_id"}
        assert PSEUDONYM.fullmatch(found["metadata"]["chat_id"])
        assert len({found["session_id"], found["user"], found["metadata"]["chat_id"]}) == 3


async def test_one_text_has_another_pseudonym_in_each_place(simulator: Simulator) -> None:
    """Else a person whose id is that of a chat could be found out."""
    found = await identity(simulator, ids={**IDS, "chat_id": "same"}, user={**USER, "id": "same"})
    assert len({found["session_id"], found["user"], found["metadata"]["chat_id"]}) == 3


@pytest.mark.parametrize("over_chat", [False, True])
@pytest.mark.parametrize("dialect", sorted(DIALECTS))
@pytest.mark.parametrize("identifiers", ["none", "hashed"])
async def test_nothing_that_names_anybody_leaves(
    identifiers: str, dialect: str, over_chat: bool, pipe: Pipe, simulator: Simulator
) -> None:
    """Neither in the body nor in a header."""
    force = "*" if over_chat else ""
    set_valves(pipe, simulator.base_url, SEND_IDENTIFIERS=identifiers, FORCE_CHAT_COMPLETIONS_MODELS=force)
    ids = IDS if DIALECTS[dialect][1] else {**IDS, "chat_id": "", "message_id": None, "session_id": None}
    await record_of(pipe, simulator, CLAUDE, dialect, ids=ids, user=USER, tools=[TOOL])
    told = "\n".join(f"{record.headers} {record.query} {record.body}" for record in simulator.requests)
    assert [text for text in (*USER.values(), *IDS.values()) if text in told] == []


@pytest.mark.parametrize("dialect", ["api_stream", "api_json", "task"])
@pytest.mark.parametrize("chat_id", ["", None])
async def test_without_a_chat_there_is_no_session(
    chat_id: str | None, dialect: str, simulator: Simulator
) -> None:
    ids = {**IDS, "chat_id": chat_id, "message_id": None, "session_id": None}
    found = await identity(simulator, "plain", ids=ids, dialect=dialect)
    assert found == {"user": USER["id"], "safety_identifier": USER["id"]}


async def test_a_task_belongs_to_its_chat(simulator: Simulator) -> None:
    assert await identity(simulator, dialect="task") == await identity(simulator)


@pytest.mark.parametrize("identifiers", ["none", "hashed", "plain"])
async def test_without_a_person_none_is_named(identifiers: str, pipe: Pipe, simulator: Simulator) -> None:
    set_valves(pipe, simulator.base_url, SEND_IDENTIFIERS=identifiers)
    body = arguments("hello", "api_json", model=f"openrouter.{CLAUDE}")["body"]
    result = await pipe.pipe(body)
    assert isinstance(result, dict)
    (record,) = posts(simulator)
    assert not record.body.keys() & set(NAMED)


@pytest.mark.parametrize(
    ("identifiers", "names"),
    [("none", {"session_id"}), ("hashed", {"session_id", "user", "metadata"})],
)
async def test_over_chat_the_same_is_said(identifiers: str, names: set[str], simulator: Simulator) -> None:
    """That endpoint has no `safety_identifier`; there `user` is what it is here."""
    found = await identity(simulator, identifiers)
    over_chat = await identity(simulator, identifiers, FORCE_CHAT_COMPLETIONS_MODELS="*")
    assert over_chat == {name: found[name] for name in names}


async def test_what_an_administrator_says_of_who_asks_wins(pipe: Pipe, simulator: Simulator) -> None:
    said: Json = {"session_id": "s", "user": "u", "safety_identifier": "t", "metadata": {"chat_id": "c"}}
    given_values = arguments("hello", **said)
    given_values["__user__"]["role"] = "admin"
    assert (await call(pipe, given_values)).error == ""
    (record,) = posts(simulator)
    assert {name: record.body[name] for name in NAMED} == said


@settings(max_examples=200, deadline=None)
@given(
    chat_id=st.text(max_size=300),
    user_id=st.text(max_size=300),
    secret=st.text(max_size=20),
    identifiers=st.sampled_from(["none", "hashed"]),
)
def test_any_ids_fit(chat_id: str, user_id: str, secret: str, identifiers: str) -> None:
    request = ChatRequest(body={}, dialect="browser", model="a/b", chat_id=chat_id, user_id=user_id)
    valves = Valves.model_validate({"SEND_IDENTIFIERS": identifiers})
    spec = ModelSpec("a/b", "B")
    made = _request_settings(valves, request, spec, HostEnvironment(secret), offer_tools=False)
    found = leaving(spec, made)
    texts = [found[name] for name in NAMED[:3] if name in found] + [*found.get("metadata", {}).values()]
    assert all(PSEUDONYM.fullmatch(text) for text in texts)
    assert len(texts) == bool(chat_id) + (identifiers == "hashed") * (2 * bool(user_id) + bool(chat_id))
