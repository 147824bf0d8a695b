"""What a chat may say beside its messages, where it goes, and who may say it."""

from __future__ import annotations

import copy
import functools
import importlib
import json
import logging
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Final, TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from referencing import Registry, Resource
from referencing.jsonschema import DRAFT202012

from openrouter_responses_pipe.openrouter_responses_pipe import (
    _CHAT_ONLY_PARAMETERS,
    _GUARDED_PARAMETERS,
    _PARAMETERS,
    _PROVIDER_FIELDS,
    CompletionsBody,
    InputError,
    ModelSpec,
    Pipe,
    ReasoningSpec,
    RequestRights,
    RequestSettings,
    ResponsesBody,
    _to_chat_body,
)
from openrouter_responses_pipe.simulator import RecordedRequest, Simulator
from tests.support import MODEL, Answer, arguments, ask, call, inferences, running_pipe, set_valves

Json = dict[str, Any]
T = TypeVar("T")
DATA: Final = Path(__file__).parent / "data" / "openrouter"
MIND: Final = ModelSpec(
    "a/mind",
    "Mind",
    input_modalities=frozenset({"text", "image"}),
    output_modalities=frozenset({"text", "image"}),
    supported_parameters=frozenset({"tools"}),
    reasoning=ReasoningSpec(),
)
TOOL: Final[Json] = {"type": "function", "function": {"name": "now"}}
WITH_TOOLS: Final = ("tool_choice", "parallel_tool_calls")
QUIET: Final = RequestSettings(summary="off")


@functools.cache
def validator(schema: str = "ResponsesRequest") -> Draft202012Validator:
    """OpenRouter's own description of a request."""
    document = json.loads((DATA / "openapi.trimmed.json").read_text("utf-8"))
    resource = Resource.from_contents(document, default_specification=DRAFT202012)
    registry = Registry().with_resource("urn:d", resource)
    return Draft202012Validator({"$ref": f"urn:d#/components/schemas/{schema}"}, registry=registry)


def chat(**parameters: Any) -> Json:
    return {"model": "openrouter.a/mind", "messages": [{"role": "user", "content": "hello"}], **parameters}


def translate(body: Json, spec: ModelSpec = MIND, request_settings: RequestSettings = QUIET) -> Json:
    return ResponsesBody.from_completions(CompletionsBody.parse(body), spec, request_settings).payload


def added(**parameters: Any) -> Json:
    """What a request has because of some parameters; it is valid."""
    tools = {"tools": [TOOL]} if set(WITH_TOOLS) & parameters.keys() else {}
    plain, payload = translate(chat(**tools)), translate(chat(**tools, **parameters))
    validator().validate(payload)
    assert nulls(payload) == []
    return {name: value for name, value in payload.items() if plain.get(name) != value}


def or_refused(work: Callable[[], T]) -> T | str:
    """What comes of it, or the sentence that refuses it; whatever else is raised is a failure."""
    try:
        return work()
    except InputError as told:
        return told.user_message


def nulls(value: Any, path: str = "") -> list[str]:
    """Where there is a null."""
    if value is None:
        return [path]
    parts: Any = ()
    if isinstance(value, Mapping):
        parts = value.items()
    elif isinstance(value, list):
        parts = enumerate(value)
    return [found for key, part in parts for found in nulls(part, f"{path}/{key}")]


# Each parameter, where it goes

COST_LIMIT: Final[Json] = {"type": "max_cost", "max_cost_in_dollars": 0.5}
LONG_CACHE: Final[Json] = {"type": "ephemeral", "ttl": "1h"}
SCHEMA: Final[Json] = {"type": "object", "properties": {"name": {"type": "string"}}}
PROVIDER: Final[Json] = {
    "order": ["openai", "google-vertex"],
    "only": ["openai", "azure", "google-vertex"],
    "ignore": ["deepinfra"],
    "allow_fallbacks": True,
    "require_parameters": True,
    "data_collection": "deny",
    "zdr": True,
    "enforce_distillable_text": False,
    "quantizations": ["fp8", "bf16"],
    "sort": {"by": "throughput", "partition": "none"},
    "max_price": {"prompt": "1", "completion": "3.5"},
    "preferred_max_latency": 2.5,
    "preferred_min_throughput": {"p50": 40},
}
PLACES: Final[list[tuple[Json, Json]]] = [
    ({"temperature": 0.5}, {"temperature": 0.5}),
    ({"temperature": "0.5"}, {"temperature": 0.5}),
    ({"top_p": 1}, {"top_p": 1}),
    ({"top_k": "40"}, {"top_k": 40}),
    ({"frequency_penalty": -2}, {"frequency_penalty": -2}),
    ({"presence_penalty": "1.5"}, {"presence_penalty": 1.5}),
    ({"top_logprobs": 5}, {"top_logprobs": 5}),
    ({"max_tokens": 7}, {"max_output_tokens": 7}),
    ({"max_completion_tokens": 7}, {"max_output_tokens": 7}),
    ({"num_predict": 7}, {"max_output_tokens": 7}),
    ({"max_output_tokens": 7}, {"max_output_tokens": 7}),
    ({"max_output_tokens": 8, "max_tokens": 7}, {"max_output_tokens": 8}),
    ({"reasoning": {"effort": "low"}}, {"reasoning": {"effort": "low"}}),
    (
        {"reasoning": {"max_tokens": 2000, "exclude": True, "summary": "detailed"}},
        {"reasoning": {"max_tokens": 2000, "summary": "detailed"}},
    ),
    (
        {"reasoning": {"effort": "high", "mode": "pro", "context": "all_turns"}},
        {"reasoning": {"effort": "high", "mode": "pro", "context": "all_turns"}},
    ),
    ({"reasoning_effort": "high"}, {"reasoning": {"effort": "high"}}),
    ({"reasoning": {"effort": "low"}, "reasoning_effort": "high"}, {"reasoning": {"effort": "high"}}),
    ({"verbosity": "low"}, {"text": {"verbosity": "low"}}),
    ({"response_format": {"type": "json_object"}}, {"text": {"format": {"type": "json_object"}}}),
    (
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "p", "schema": SCHEMA, "strict": None},
            }
        },
        {"text": {"format": {"type": "json_schema", "name": "p", "schema": SCHEMA}}},
    ),
    ({"tool_choice": "required"}, {"tool_choice": "required"}),
    (
        {"tool_choice": {"type": "function", "function": {"name": "now"}}},
        {"tool_choice": {"type": "function", "name": "now"}},
    ),
    ({"parallel_tool_calls": False}, {"parallel_tool_calls": False}),
    ({"max_tool_calls": 3}, {"max_tool_calls": 3}),
    ({"stop_server_tools_when": [COST_LIMIT]}, {"stop_server_tools_when": [COST_LIMIT]}),
    ({"models": ["a/b", "c/d"]}, {"models": ["a/b", "c/d"]}),
    ({"models": "a/b, c/d"}, {"models": ["a/b", "c/d"]}),
    ({"models": "a/b, , "}, {"models": ["a/b"]}),
    ({"models": ""}, {}),
    ({"provider": PROVIDER}, {"provider": PROVIDER}),
    ({"provider": {"sort": "price", "zdr": None}}, {"provider": {"sort": "price"}}),
    (
        {"provider": {"max_price": {"prompt": 1, "completion": 2.5}}},
        {"provider": {"max_price": {"prompt": "1", "completion": "2.5"}}},
    ),
    ({"plugins": [{"id": "web", "max_results": 3}]}, {"plugins": [{"id": "web", "max_results": 3}]}),
    ({"plugins": [{"id": "web", "engine": None}]}, {"plugins": [{"id": "web"}]}),
    ({"transforms": ["middle-out"]}, {"plugins": [{"id": "context-compression"}]}),
    ({"transforms": "middle-out"}, {"plugins": [{"id": "context-compression"}]}),
    (
        {"plugins": [{"id": "web"}], "transforms": ["middle-out"]},
        {"plugins": [{"id": "web"}, {"id": "context-compression"}]},
    ),
    ({"modalities": ["image", "text"]}, {"modalities": ["image", "text"]}),
    ({"modalities": "image"}, {"modalities": ["image"]}),
    ({"image_config": {"aspect_ratio": "1:1", "n": 2}}, {"image_config": {"aspect_ratio": "1:1", "n": 2}}),
    ({"service_tier": "flex"}, {"service_tier": "flex"}),
    ({"truncation": "auto"}, {"truncation": "auto"}),
    ({"cache_control": LONG_CACHE}, {"cache_control": LONG_CACHE}),
    ({"prompt_cache_key": " key "}, {"prompt_cache_key": "key"}),
    ({"prompt_cache_options": {"mode": "explicit"}}, {"prompt_cache_options": {"mode": "explicit"}}),
    ({"session_id": "s" * 256}, {"session_id": "s" * 256}),
    ({"user": "u"}, {"user": "u"}),
    ({"safety_identifier": "u"}, {"safety_identifier": "u"}),
    ({"metadata": {"team": "x" * 512, "k" * 64: ""}}, {"metadata": {"team": "x" * 512, "k" * 64: ""}}),
    ({"trace": {"trace_id": "t", "mine": [1]}}, {"trace": {"trace_id": "t", "mine": [1]}}),
]  # fmt: skip


@pytest.mark.parametrize(("parameters", "expected"), PLACES, ids=str)
def test_where_a_parameter_goes(parameters: Json, expected: Json) -> None:
    assert added(**parameters) == expected


def test_every_parameter_has_its_row_here() -> None:
    assert {name for parameters, _ in PLACES for name in parameters} == set(_PARAMETERS)


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        row
        for row in PLACES
        if any(isinstance(value, dict | list) for value in row[0].values()) and "tool_choice" not in row[0]
    ],
    ids=str,
)
def test_objects_and_lists_may_come_as_json_text(parameters: Json, expected: Json) -> None:
    written = {
        name: f" {json.dumps(value)} " if isinstance(value, dict | list) else value
        for name, value in parameters.items()
    }
    assert added(**written) == expected


@pytest.mark.parametrize("name", [*sorted(_PARAMETERS), *_CHAT_ONLY_PARAMETERS])
def test_null_is_not_sent(name: str) -> None:
    assert added(**{name: None}) == {}


@pytest.mark.parametrize(
    "name",
    [
        *("plugins", "provider", "modalities", "metadata", "trace", "image_config"),
        *("stop_server_tools_when", "cache_control", "prompt_cache_options", "transforms", "reasoning"),
    ],
)
@pytest.mark.parametrize("empty", ["[]", "{}", [], {}], ids=repr)
def test_what_is_empty_is_not_sent(name: str, empty: Any) -> None:
    found = or_refused(lambda: added(**{name: empty}))
    assert name in found if isinstance(found, str) else found == {}


WORDS: Final[list[tuple[str, Any]]] = [
    *(
        (name, value)
        for name in ("temperature", "top_p", "top_k", "top_logprobs", "max_output_tokens", "max_tool_calls")
        for value in ("much", True, [1], {}, "", float("nan"))
    ),
    *(
        (name, value)
        for name in ("provider", "image_config", "cache_control", "prompt_cache_options", "metadata", "trace")
        for value in ("fast", "{broken", "null", [{}], "[{}]", 5, True)
    ),
    *(("reasoning", value) for value in ("high", ["effort"], 5, {"budget": 5}, {"efort": "low"})),
    *(("plugins", value) for value in ("web", {}, {"id": "web"}, ["web"], [{}], [{"id": 5}], "[5]", 5)),
    *(("stop_server_tools_when", value) for value in ("never", {}, ["never"], [[]], 5)),
    *(("models", value) for value in ({}, 5, [5], [["a/b"]], '["a/b", {}]', "[broken")),
    *(("modalities", value) for value in ("audio", ["text", "audio"], [5], {}, 5)),
    *(("transforms", value) for value in (5, {}, [5])),
    *(
        (name, value)
        for name in (
            "service_tier",
            "truncation",
            "prompt_cache_key",
            "session_id",
            "user",
            "safety_identifier",
        )
        for value in ("", "  ", "x" * 257, 5, True, [], {}, ["x"])
    ),
    *(
        ("metadata", value)
        for value in (
            {"a": 1},
            {"a": {}},
            {"a": "x" * 513},
            {"k" * 65: "x"},
            {"a[0]": "x"},
            {str(number): "x" for number in range(17)},
        )
    ),
    *(
        ("provider", {field: value})
        for field, values in {
            "zdr": ("true", 1, []),
            "allow_fallbacks": ("no", 0),
            "require_parameters": ("no", {}),
            "enforce_distillable_text": ("no", 1),
            "order": ("openai", {"a": 1}, 5),
            "only": ("openai", True),
            "ignore": ("openai",),
            "quantizations": ("fp8",),
            "data_collection": (True, ["deny"]),
            "sort": (True, ["price"], 5),
            "max_price": (5, "5", [5]),
            "preferred_max_latency": ("soon", [5]),
            "preferred_min_throughput": ("fast", [5]),
        }.items()
        for value in values
    ),
    *(("provider", {field: True}) for field in ("orders", "order ", "ORDER", "", "__proto__", "x" * 500)),
]


@pytest.mark.parametrize(("name", "value"), WORDS, ids=lambda value: str(value)[:40])
def test_a_value_of_the_wrong_kind_is_refused_in_words(name: str, value: Any) -> None:
    with pytest.raises(InputError) as caught:
        translate(chat(**{name: value}))
    told = caught.value.user_message
    assert told.startswith("This chat could not be sent. ")
    assert name in told
    assert len(told) < 200
    assert told.isprintable()


def test_an_unknown_field_of_provider_is_named() -> None:
    with pytest.raises(InputError, match="provider has no field “orders”"):
        translate(chat(provider={"orders": ["openai"]}))


# Any values at all

ODD: Final[list[Any]] = [
    *(True, False, 0, 5, -1, 1.5, 10**30, 1e308, "", " ", "word", "5", "null", "[]", "{}", "{broken", "\x00"),
    *([], [1], ["x"], [None], [[]], [{}], [[["x"]]]),
    *({}, {"a": None}, {"a": 1}, {"type": None}, {"effort": 5}, {"effort": "low"}),
    *({"max_tokens": "5"}, {"max_tokens": 5}, {"enabled": "yes"}, {"summary": 1}, {"order": [5]}),
    *({"only": [None]}, {"max_price": {"prompt": []}}, {"sort": {"by": 5}}, {"ttl": "1h"}),
    *({"preferred_max_latency": {"p50": "x"}}, {"quantizations": [8]}, {"mode": 5}, {"trace_id": 5}),
    *({"type": "function"}, {"type": "function", "function": {"name": 5}}, {"type": "json_schema"}),
    *({"type": "json_schema", "json_schema": {}}, {"type": "json_schema", "json_schema": {"name": 5}}),
    *('["a", null]', '{"a": null}', '{"a": {"b": [null]}}'),
]  # fmt: skip
GOOD: Final[dict[str, list[Any]]] = {
    name: [parameters[name] for parameters, _ in PLACES if name in parameters] for name in _PARAMETERS
}


def outcome(body: Json) -> Json | str:
    """The request, or the sentence that refuses it; whatever else is raised is a failure."""
    return or_refused(lambda: translate(body))


def faults(payload: Json | str) -> list[str]:
    """What is wrong with a request."""
    if isinstance(payload, str):
        return []
    wrong = [f"null at {path}" for path in nulls(payload)]
    return wrong + [f"{error.json_path}: {error.message[:80]}" for error in validator().iter_errors(payload)]


@pytest.mark.parametrize("name", sorted(_PARAMETERS.keys() - {"image_config"}))  # that one is free
def test_an_odd_value_is_refused_or_becomes_a_valid_one(name: str) -> None:
    tools = {"tools": [TOOL]} if name in WITH_TOOLS else {}
    # A word that OpenRouter alone can judge is left to it.
    odd = [value for value in ODD if not (name in WORDS_OF_OPENROUTER and isinstance(value, str))]
    wrong = {
        repr(value): found for value in odd if (found := faults(outcome(chat(**tools, **{name: value}))))
    }
    assert wrong == {}


# New ones come with new models: https://openrouter.ai/docs
WORDS_OF_OPENROUTER: Final = frozenset(
    {"reasoning_effort", "verbosity", "service_tier", "truncation", "tool_choice"}
)


@settings(max_examples=300, deadline=None)
@given(
    parameters=st.fixed_dictionaries(
        {}, optional={name: st.sampled_from([*GOOD[name], None]) for name in sorted(_PARAMETERS)}
    ),
    with_tools=st.booleans(),
    thinks=st.booleans(),
)
def test_any_good_values_together_are_valid(parameters: Json, with_tools: bool, thinks: bool) -> None:
    body = chat(**parameters, **({"tools": [TOOL]} if with_tools else {}))
    before = copy.deepcopy(body)
    spec = MIND if thinks else MIND._replace(reasoning=None)
    request_settings = RequestSettings(
        effort="low", session_id="s", user="u", metadata={"chat_id": "c"}, cache_ttl="1h"
    )
    payload = translate(body, spec, request_settings)
    assert faults(payload) == []
    assert body == before
    assert translate(body, spec, request_settings) == payload
    assert faults(translate(chat(**parameters), spec)) == []


@settings(max_examples=300, deadline=None)
@given(
    parameters=st.dictionaries(
        st.sampled_from(sorted(_PARAMETERS)),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats(allow_nan=True) | st.text(max_size=8),
            lambda parts: (
                st.lists(parts, max_size=3) | st.dictionaries(st.text(max_size=6), parts, max_size=3)
            ),
            max_leaves=6,
        ),
        max_size=5,
    )
)
def test_any_values_at_all_are_refused_in_words_or_sent_without_nulls(parameters: Json) -> None:
    body = chat(**parameters, tools=[TOOL])
    first, second = outcome(copy.deepcopy(body)), outcome(body)
    assert repr(first) == repr(second)
    if isinstance(first, str):
        assert any(name in first for name in parameters)
    else:
        assert nulls(first) == []
        assert (first["model"], first["store"], first["stream"]) == ("a/mind", False, True)


@pytest.mark.parametrize("depth", [50, 400, 900, 100_000])
@pytest.mark.parametrize("as_text", [False, True])
def test_what_is_nested_very_deeply_is_refused_or_sent(depth: int, as_text: bool) -> None:
    """A parser may have let it through; it may not end the request without words."""
    nested: Any = "[" * depth + "]" * depth
    if not as_text:
        nested = []
        for _ in range(depth):
            nested = [nested]
    value = '{"a":' + nested + "}" if as_text else {"a": nested}
    assert "image_config" in outcome(chat(image_config=value))  # the sentence or the request


# Who may set what

VALUES: Final[dict[str, tuple[Any, Any]]] = {  # a value, and another one
    "models": (["a/b"], ["a/b", "c/d"]),
    "plugins": ([{"id": "web"}], [{"id": "web", "max_results": 25}]),
    "service_tier": ("flex", "priority"),
    "session_id": ("s", "t"),
    "user": ("u", "v"),
    "safety_identifier": ("u", "v"),
    "metadata": ({"a": "b"}, {"a": "b", "c": "d"}),
    "trace": ({"trace_id": "t"}, {"trace_id": "u"}),
    "stop_server_tools_when": ([COST_LIMIT], [{**COST_LIMIT, "max_cost_in_dollars": 500}]),
}
FIELDS: Final = sorted(VALUES)


def within(parameters: Json, rights: RequestRights) -> Mapping[str, Any]:
    return CompletionsBody.parse(chat(**parameters)).within(rights).parameters


def test_every_guarded_field_has_its_values_here() -> None:
    assert {*VALUES, "provider"} == _GUARDED_PARAMETERS


@pytest.mark.parametrize("name", FIELDS)
def test_people_may_not_set_a_guarded_field(name: str) -> None:
    for value in VALUES[name]:
        for approved in ({}, {name: []}, {"temperature": [1], "user_id": ["u"]}):
            with pytest.raises(InputError, match=f"{name} can only be set by an administrator"):
                within({name: value}, RequestRights(approved=approved))


@pytest.mark.parametrize("name", FIELDS)
def test_administrators_may(name: str) -> None:
    for value in VALUES[name]:
        assert within({name: value}, RequestRights(is_admin=True)) == {name: value}


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("given_as_text", [False, True])
@pytest.mark.parametrize("approved_as_text", [False, True])
def test_what_an_administrator_has_set_is_not_a_persons(
    name: str, given_as_text: bool, approved_as_text: bool
) -> None:
    value, other = VALUES[name]
    if isinstance(value, str):
        sent, approved, foreign = value, value, other
    else:
        sent, approved, foreign = (
            json.dumps(entry) if as_text else entry
            for entry, as_text in ((value, given_as_text), (value, approved_as_text), (other, given_as_text))
        )
    rights = RequestRights(approved={name: ["another", approved]})
    assert within({name: sent}, rights) == {name: sent}
    with pytest.raises(InputError, match=name):
        within({name: foreign}, rights)


@pytest.mark.parametrize(
    ("opened", "names"),
    [
        ("*", FIELDS),
        ("service_tier", ["service_tier"]),
        (" trace , USER ", ["trace", "user"]),
        ("m*", ["metadata", "models"]),
        ("*_id*", ["safety_identifier", "session_id"]),
        ("service", []),
        ("temperature", []),
        (" , ", []),
    ],
)
def test_what_an_administrator_has_opened(opened: str, names: list[str]) -> None:
    rights = RequestRights(opened=opened)
    found = {name: or_refused(lambda name=name: within({name: VALUES[name][0]}, rights)) for name in FIELDS}
    assert [name for name, allowed in found.items() if not isinstance(allowed, str)] == names


def test_all_other_parameters_are_everybodys() -> None:
    parameters = {name: GOOD[name][0] for name in sorted(_PARAMETERS) if name not in _GUARDED_PARAMETERS}
    body = CompletionsBody.parse(chat(**parameters))
    assert not body.is_guarded
    assert body.within(RequestRights()) == body


@pytest.mark.parametrize("name", sorted(_GUARDED_PARAMETERS))
def test_a_guarded_field_is_seen(name: str) -> None:
    assert CompletionsBody.parse(chat(**{name: "x"})).is_guarded


# Of `provider`, what narrows

DISTILLABLE: Final = {"enforce_distillable_text": True}
NARROWINGS: Final[list[tuple[Json, Json, Json]]] = [  # the administrators', a person's, what is sent
    ({}, PROVIDER, {k: v for k, v in PROVIDER.items() if v is not False}),
    (PROVIDER, {}, PROVIDER),
    ({"zdr": True}, {"zdr": False}, {"zdr": True}),
    ({"zdr": False}, {"zdr": True}, {"zdr": True}),
    ({}, {"zdr": True}, {"zdr": True}),
    ({"require_parameters": True}, {"require_parameters": False}, {"require_parameters": True}),
    ({"enforce_distillable_text": True}, {"enforce_distillable_text": False}, DISTILLABLE),
    ({"allow_fallbacks": False}, {"allow_fallbacks": True}, {"allow_fallbacks": False}),
    ({"allow_fallbacks": True}, {"allow_fallbacks": False}, {"allow_fallbacks": False}),
    ({}, {"allow_fallbacks": False}, {"allow_fallbacks": False}),
    ({"data_collection": "deny"}, {"data_collection": "allow"}, {"data_collection": "deny"}),
    ({"data_collection": "allow"}, {"data_collection": "deny"}, {"data_collection": "deny"}),
    ({}, {"data_collection": "deny"}, {"data_collection": "deny"}),
    ({"only": ["a", "b"]}, {"only": ["b", "c"]}, {"only": ["b"]}),
    ({}, {"only": ["c"]}, {"only": ["c"]}),
    ({"ignore": ["a"]}, {"ignore": ["b", "a"]}, {"ignore": ["a", "b"]}),
    ({"ignore": ["a"]}, {"ignore": []}, {"ignore": ["a"]}),
    ({"quantizations": ["fp8", "fp16"]}, {"quantizations": ["fp16", "int4"]}, {"quantizations": ["fp16"]}),
    (
        {"max_price": {"prompt": "2", "image": "1"}},
        {"max_price": {"prompt": 1, "completion": 9}},
        {"max_price": {"prompt": "1", "completion": "9", "image": "1"}},
    ),
    ({"max_price": {"prompt": "2"}}, {"max_price": {"prompt": "10"}}, {"max_price": {"prompt": "2"}}),
    ({"max_price": {"prompt": 2}}, {"max_price": {"prompt": "much"}}, {"max_price": {"prompt": "2"}}),
    ({"order": ["a"]}, {"order": ["b"]}, {"order": ["a"]}),
    ({}, {"order": ["b"]}, {"order": ["b"]}),
    ({"sort": "price"}, {"sort": "throughput"}, {"sort": "price"}),
    ({"preferred_max_latency": 1}, {"preferred_max_latency": 9}, {"preferred_max_latency": 1}),
    ({"preferred_min_throughput": 9}, {"preferred_min_throughput": 1}, {"preferred_min_throughput": 9}),
    ({"zdr": True, "only": None}, {"only": ["a"]}, {"zdr": True, "only": ["a"]}),
]  # fmt: skip


@pytest.mark.parametrize(("admins", "wanted", "sent"), NARROWINGS, ids=str)
@pytest.mark.parametrize("as_text", [False, True])
def test_of_provider_a_person_may_set_what_narrows(
    admins: Json, wanted: Json, sent: Json, as_text: bool
) -> None:
    approved, given_value = (json.dumps(entry) if as_text else entry for entry in (admins, wanted))
    for opened in ("", "*", "provider"):
        rights = RequestRights(opened=opened, approved={"provider": [approved]})
        assert added(**within({"provider": given_value}, rights)) == {"provider": sent}


def test_every_field_of_provider_is_tried() -> None:
    assert {field for _, wanted, _ in NARROWINGS for field in wanted} == set(_PROVIDER_FIELDS)


@pytest.mark.parametrize(
    ("admins", "wanted"),
    [
        ({"only": ["a"]}, {"only": ["b"]}),
        ({"only": ["a"]}, {"only": []}),
        ({"quantizations": ["fp8"]}, {"quantizations": ["int4"]}),
    ],
)
def test_who_leaves_nobody_to_choose_from_is_told(admins: Json, wanted: Json) -> None:
    with pytest.raises(InputError, match="provider"):
        within({"provider": wanted}, RequestRights(approved={"provider": [admins]}))


def test_an_order_of_a_persons_does_not_undo_the_sorting_by_price() -> None:
    """With an `order` OpenRouter sorts no more."""
    rights = RequestRights(approved={"provider": [{"sort": "price"}]})
    assert within({"provider": {"order": ["dear"]}}, rights) == {"provider": {"sort": "price"}}


@pytest.mark.parametrize("wanted", [{"only": ["openai/priority"]}, {"order": ["openai/priority", "azure"]}])
def test_a_dearer_tier_is_not_reached_by_the_name_of_a_provider(wanted: Json) -> None:
    """`openai/priority` is `service_tier: priority` by another name."""
    found = or_refused(lambda: within({"provider": wanted}, RequestRights()))
    assert isinstance(found, str) or "priority" not in str(found)


NAMES: Final = st.lists(st.sampled_from(["a", "b", "c", "a/x"]), max_size=3, unique=True)
PRICES: Final = st.sampled_from(["0", "1", "2.5", "10", "1e3", "-1", "nan", "inf", "much"])
SETTINGS_OF_PROVIDER: Final = st.fixed_dictionaries(
    {},
    optional={
        **dict.fromkeys(
            ("zdr", "require_parameters", "enforce_distillable_text", "allow_fallbacks"), st.booleans()
        ),
        **dict.fromkeys(("order", "only", "ignore"), NAMES),
        "quantizations": st.lists(st.sampled_from(["int4", "fp8", "bf16"]), max_size=3, unique=True),
        "data_collection": st.sampled_from(["allow", "deny"]),
        "sort": st.sampled_from(["price", "latency", {"by": "throughput"}]),
        "max_price": st.dictionaries(st.sampled_from(["prompt", "completion"]), PRICES, max_size=2),
        **dict.fromkeys(("preferred_max_latency", "preferred_min_throughput"), st.integers(1, 9)),
    },
)


def _is_price(text: str) -> bool:
    return text not in ("nan", "inf", "much")


# field -> whether the second value is no looser than the first, which administrators have set
NO_LOOSER: Final[dict[str, Callable[[Any, Any], bool]]] = {
    **dict.fromkeys(
        ("zdr", "require_parameters", "enforce_distillable_text"), lambda admins, sent: sent or not admins
    ),
    "allow_fallbacks": lambda admins, sent: admins or sent is False,
    "data_collection": lambda admins, sent: "deny" in (sent, *({"deny"} if admins == "allow" else ())),
    **dict.fromkeys(("only", "quantizations"), lambda admins, sent: set(sent) <= set(admins)),
    "ignore": lambda admins, sent: set(sent) >= set(admins),
    "max_price": lambda admins, sent: all(
        unit in sent and float(sent[unit]) <= float(price)
        for unit, price in admins.items()
        if _is_price(price)
    ),
    **dict.fromkeys(
        ("order", "sort", "preferred_max_latency", "preferred_min_throughput"),
        lambda admins, sent: admins == sent,
    ),
}


@settings(max_examples=500, deadline=None)
@given(admins=SETTINGS_OF_PROVIDER, wanted=SETTINGS_OF_PROVIDER)
def test_nothing_is_ever_looser_than_the_administrators_choice(admins: Json, wanted: Json) -> None:
    rights = RequestRights(approved={"provider": [admins]})
    found = or_refused(lambda: within({"provider": wanted}, rights)["provider"])
    if isinstance(found, str):
        assert "provider" in found
        return
    looser = [
        field
        for field, value in admins.items()
        if field not in found or not NO_LOOSER[field](value, found[field])
    ]
    assert looser == []


# What the host says, and hostile bodies on their way


class _Record(SimpleNamespace):
    """A record as Open WebUI's own classes hold it."""

    def model_dump(self, **_: Any) -> Json:
        return copy.deepcopy(vars(self))


class HostRows:
    """What stands in Open WebUI's database."""

    def __init__(self) -> None:
        self.defaults: Json = {}
        self.rows: dict[str, Any] = {}
        self.usable: set[str] = set()
        self.asked: list[str] = []

    def add(self, row_id: str, params: Json, *, owner: str = "admin", base: str | None = None) -> None:
        """A row of the models' table."""
        self.rows[row_id] = SimpleNamespace(
            id=row_id,
            name=row_id,
            user_id=owner,
            base_model_id=base,
            meta=_Record(),
            params=_Record(**params),
            access_grants=[],
            is_active=True,
        )

    async def get(self, key: str, default: Any = None) -> Any:
        """`Config.get`."""
        return self.defaults if key == "models.default_params" else default

    async def get_model_by_id(self, row_id: str, **_: Any) -> Any:
        """`Models.get_model_by_id`."""
        return self.rows.get(row_id)

    async def get_user_by_id(self, user_id: str, **_: Any) -> Any:
        """`Users.get_user_by_id`."""
        return SimpleNamespace(id=user_id, role="admin" if user_id == "admin" else "user")

    async def check_model_access(self, user: Any, model: Json, *_: Any, **__: Any) -> None:
        """`check_model_access`, which says no like this."""
        self.asked.append(model["id"])
        if model["id"] not in self.usable:
            raise Exception("Model not found")


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> HostRows:
    """Open WebUI as it answers with some rows; the stand-in of `pytest_bootstrap` has none."""
    rows = HostRows()
    members: dict[str, Json] = {
        "open_webui.models.config": {"Config": rows},
        "open_webui.models.models": {"Models": rows},
        "open_webui.models.users": {"Users": rows},
        "open_webui.utils.models": {"check_model_access": rows.check_model_access},
    }
    for name, values in members.items():
        module = ModuleType(name)
        vars(module).update(values)
        package, _, last = name.rpartition(".")
        monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.setattr(importlib.import_module(package), last, module, raising=False)
    return rows


PICKED: Final = f"openrouter.{MODEL}"


def asking(dialect: str = "browser", *, role: str = "user", picked: Json | None = None, **body: Any) -> Json:
    """What the host passes for a person who has picked a model and says so."""
    given_values = arguments("hello", dialect, **body)
    given_values["__user__"]["role"] = role
    given_values["__metadata__"]["model"] = {"id": PICKED} if picked is None else picked
    return given_values


async def sent(pipe: Pipe, simulator: Simulator, given_values: Json) -> Json:
    """The request that went out, which was answered."""
    before = len(simulator.requests)
    answer = await call(pipe, given_values)
    assert answer.error == ""
    (record,) = [record for record in simulator.requests[before:] if record.method == "POST"]
    return record.body


async def refused(pipe: Pipe, simulator: Simulator, given_values: Json) -> Answer:
    """The answer, before which nothing was sent."""
    answer = await call(pipe, given_values)
    assert answer.error.startswith("This chat could not be sent. ")
    assert answer.text == ""
    assert [record for record in simulator.requests if record.method == "POST"] == []
    return answer


@pytest.mark.parametrize("dialect", ["browser", "api_stream", "api_json"])
@pytest.mark.parametrize("name", FIELDS)
async def test_a_guarded_field_is_refused_before_anything_is_sent(
    name: str, dialect: str, pipe: Pipe, simulator: Simulator, host: HostRows
) -> None:
    answer = await refused(pipe, simulator, asking(dialect, **{name: VALUES[name][0]}))
    assert f"The parameter {name} can only be set by an administrator" in answer.error


@pytest.mark.parametrize("name", [name for name in FIELDS if name not in ("models", "metadata")])
async def test_an_opened_field_is_sent(name: str, pipe: Pipe, simulator: Simulator, host: HostRows) -> None:
    set_valves(pipe, simulator.base_url, USER_REQUEST_FIELDS=f"other, {name}")
    parameters: Json = {name: VALUES[name][0]}
    body = await sent(pipe, simulator, asking(**parameters))
    assert body[name] == parameters[name]


@pytest.mark.parametrize("name", [name for name in FIELDS if name != "metadata"])
async def test_administrators_set_what_they_like(
    name: str, pipe: Pipe, simulator: Simulator, host: HostRows
) -> None:
    value = [MODEL, "openai/gpt-5"] if name == "models" else VALUES[name][0]
    parameters: Json = {name: value}
    body = await sent(pipe, simulator, asking(role="admin", **parameters))
    assert body[name] == parameters[name]


async def test_metadata_of_ours_and_of_a_persons_go_together(
    pipe: Pipe, simulator: Simulator, host: HostRows
) -> None:
    set_valves(pipe, simulator.base_url, USER_REQUEST_FIELDS="metadata", SEND_IDENTIFIERS="plain")
    body = await sent(pipe, simulator, asking(metadata={"team": "red"}))
    assert body["metadata"] == {"chat_id": "chat", "team": "red"}


async def test_no_more_metadata_than_openrouter_takes(
    pipe: Pipe, simulator: Simulator, host: HostRows
) -> None:
    """Sixteen pairs are allowed, and one of ours would be the next."""
    pairs = {f"key{number}": "x" for number in range(16)}
    body = await sent(pipe, simulator, asking(role="admin", metadata=pairs))
    assert len(body["metadata"]) <= 16
    assert body["metadata"].items() >= pairs.items()


def custom(**params: Any) -> Json:
    """Custom parameters as the host keeps them."""
    return {"custom_params": params}


def menu(**params: Any) -> Json:
    """A control of a model with one option."""
    option = {"label": "Yes", "params": params}
    return {"model_controls": {"tier": {"label": "Tier", "options": {"yes": option}}}}


@pytest.mark.parametrize("form", [dict, custom, menu])
@pytest.mark.parametrize("where", ["defaults", "model", "workspace model", "base of it"])
async def test_what_administrators_have_set_for_a_model_is_sent_for_everybody(
    where: str, form: Callable[..., Json], pipe: Pipe, simulator: Simulator, host: HostRows
) -> None:
    params = form(service_tier="flex", trace='{"trace_id": "t"}')
    workspace = {"id": "ours", "info": {"base_model_id": PICKED}}
    picked = workspace if where in ("workspace model", "base of it") else {"id": PICKED}
    if where == "defaults":
        host.defaults = params
    else:
        host.add("ours" if where == "workspace model" else PICKED, params)
    body = await sent(pipe, simulator, asking(picked=picked, service_tier="flex", trace={"trace_id": "t"}))
    assert (body["service_tier"], body["trace"]) == ("flex", {"trace_id": "t"})
    answer = await call(pipe, asking(picked=picked, service_tier="priority"))
    assert "service_tier" in answer.error


async def test_a_workspace_model_of_a_persons_own_approves_nothing(
    pipe: Pipe, simulator: Simulator, host: HostRows
) -> None:
    """Whoever may make workspace models would else set every field through one."""
    host.add("mine", custom(service_tier="priority"), owner="user", base=PICKED)
    picked = {"id": "mine", "info": {"base_model_id": PICKED}}
    await refused(pipe, simulator, asking(picked=picked, service_tier="priority"))


async def test_a_workspace_model_of_a_persons_own_loosens_no_privacy(
    pipe: Pipe, simulator: Simulator, host: HostRows
) -> None:
    host.defaults = custom(provider={"data_collection": "deny", "zdr": True})
    host.add("mine", custom(provider={"data_collection": "allow"}), owner="user", base=PICKED)
    picked = {"id": "mine", "info": {"base_model_id": PICKED}}
    body = await sent(pipe, simulator, asking(picked=picked, provider={"data_collection": "allow"}))
    assert body["provider"] == {"data_collection": "deny", "zdr": True}


async def test_the_choice_for_the_model_counts_before_that_for_all(
    pipe: Pipe, simulator: Simulator, host: HostRows
) -> None:
    """As in Open WebUI: of a custom parameter the model's own value is sent."""
    host.defaults = custom(provider={"sort": "price"})
    host.add(PICKED, custom(provider={"zdr": True}))
    body = await sent(pipe, simulator, asking(provider={"order": ["openai"]}))
    assert body["provider"]["zdr"] is True


async def test_the_choice_for_all_does_not_loosen_that_for_the_model(
    pipe: Pipe, simulator: Simulator, host: HostRows
) -> None:
    """A person may repeat what stands in the defaults, which the model's own value has replaced."""
    host.defaults = custom(provider={"sort": "price"})
    host.add(PICKED, custom(provider={"zdr": True}))
    body = await sent(pipe, simulator, asking(provider={"sort": "price"}))
    assert body["provider"]["zdr"] is True


@pytest.mark.parametrize("empty", [None, {}, "{}"], ids=repr)
async def test_privacy_is_not_loosened_by_a_null(
    empty: Any, pipe: Pipe, simulator: Simulator, host: HostRows
) -> None:
    """What stands in the body of an API client, a null too, keeps Open WebUI from filling in the model's."""
    host.add(PICKED, custom(provider={"zdr": True}))
    body = await sent(pipe, simulator, asking("api_json", provider=empty))
    assert body["provider"] == {"zdr": True}


@pytest.mark.parametrize("name", [name for name in FIELDS if name != "models"])
async def test_no_guarded_field_is_undone_by_a_null(
    name: str, pipe: Pipe, simulator: Simulator, host: HostRows
) -> None:
    value = VALUES[name][0]
    host.add(PICKED, custom(**{name: value}))
    parameters: Json = {name: None}
    answer = await call(pipe, asking("api_json", **parameters))
    bodies = [record.body for record in inferences(simulator)]
    kept = [body[name] for body in bodies if name in body]
    assert answer.error or kept == [
        {**bodies[0].get("metadata", {}), **value} if name == "metadata" else value
    ]


@pytest.mark.parametrize(
    ("usable", "models", "error"),
    [
        ({"openai/gpt-5"}, ["openai/gpt-5"], ""),
        ({"openai/gpt-5"}, "openai/gpt-5", ""),
        ({"openai/gpt-5"}, '["openai/gpt-5"]', ""),
        ({"openai/gpt-5"}, ["openai/gpt-5", "hidden/one"], "hidden/one"),
        (set(), ["hidden/one"], "hidden/one"),
        ({"openai/gpt-5"}, ["openai/gpt-5:online"], "openai/gpt-5:online"),
        ({"openai/gpt-5"}, ["openai/gpt-5@preset/free"], "@preset"),
        ({"openai/gpt-5"}, [5], "models"),
        ({"openai/gpt-5"}, {"a": "b"}, "models"),
        ({"openai/gpt-5"}, ["openai/gpt-5", None], ""),
        ({"openai/gpt-5"}, [["openai/gpt-5"]], "models"),
    ],
    ids=str,
)
async def test_other_models_only_if_they_are_ones_own(
    usable: set[str], models: Any, error: str, pipe: Pipe, simulator: Simulator, host: HostRows
) -> None:
    set_valves(pipe, simulator.base_url, USER_REQUEST_FIELDS="models")
    host.usable = {f"openrouter.{model}" for model in usable}
    answer = await call(pipe, asking(models=models))
    assert error in answer.error
    assert bool(answer.error) == bool(error)
    assert [record.body["models"] for record in inferences(simulator)] == (
        [] if error else [["openai/gpt-5"]]
    )


@pytest.mark.parametrize("stored", [["hidden/one"], '["hidden/one"]', "hidden/one"], ids=repr)
async def test_fallbacks_that_an_administrator_chose_need_no_access(
    stored: Any, pipe: Pipe, simulator: Simulator, host: HostRows
) -> None:
    """However they are kept: Open WebUI decodes JSON text before it hands a parameter over."""
    host.add(PICKED, custom(models=stored))
    given_value = ["hidden/one"] if stored != "hidden/one" else stored
    body = await sent(pipe, simulator, asking(models=given_value))
    assert body["models"] == ["hidden/one"]


async def test_a_huge_list_of_models_does_not_keep_the_host_busy(
    pipe: Pipe, simulator: Simulator, host: HostRows
) -> None:
    set_valves(pipe, simulator.base_url, USER_REQUEST_FIELDS="models")
    models = [f"a/m{number}" for number in range(5000)]
    host.usable = {f"openrouter.{model}" for model in models}
    await call(pipe, asking(models=models))
    assert len(host.asked) <= 100


OTHER: Final = "openrouter.openai/gpt-5"


async def test_a_model_that_the_host_has_put_in_place_of_an_arena(
    pipe: Pipe, simulator: Simulator, host: HostRows
) -> None:
    """Open WebUI draws one of the models behind an arena; what it says of the picked one is the arena's."""
    host.usable = {OTHER}
    arena = {
        "id": "arena-model",
        "owned_by": "arena",
        "arena": True,
        "info": {"meta": {"model_ids": [OTHER]}},
    }
    assert (await sent(pipe, simulator, asking(picked=arena, model=OTHER)))["model"] == "openai/gpt-5"


async def test_parameters_of_the_task_model_are_an_administrators(
    pipe: Pipe, simulator: Simulator, host: HostRows
) -> None:
    """Nobody else can put any into a task: Open WebUI makes its body, with `task.model.params`."""
    body = await sent(pipe, simulator, asking("task", service_tier="flex"))
    assert body["service_tier"] == "flex"


HOSTILE: Final[list[Json]] = [
    {"models": ["hidden/one"] * 20_000},
    {"models": "hidden/one," * 20_000},
    {"plugins": [{"id": "web", "max_results": 25}] * 1000},
    {"plugins": '[{"id": "fusion", "analysis_models": ["a/b"]}]'},
    {"service_tier": "priority"},
    {"metadata": {"chat_id": "another's", "user_id": "admin"}},
    {"metadata": "forged"},
    {"user": "admin", "safety_identifier": "admin"},
    {"session_id": "another's"},
    {"trace": {"trace_id": "x" * 100_000}},
    {"stop_server_tools_when": [{"type": "max_cost", "max_cost_in_dollars": 1e9}]},
    {"provider": {"data_collection": "allow", "zdr": False, "spy": True}},
    {"provider": ["allow"]},
    {"provider": "x" * 100_000},
    {"provider": {"x" * 100_000: 1}},
    {"provider": {"only": "openai"}},
    {"reasoning": {"effort": "low", "admin": True}},
    {"response_format": [[[[]]]]},
    {"temperature": {"$gt": 0}},
    {"max_tokens": "9" * 5000},
    {"top_k": [1] * 100_000},
    {"modalities": ["text", "audio"]},
    {"image_config": "[" * 100_000},
]


@pytest.mark.parametrize("parameters", HOSTILE, ids=lambda body: str(body)[:50])
async def test_hostile_bodies_are_refused_in_words(
    parameters: Json, pipe: Pipe, simulator: Simulator, host: HostRows
) -> None:
    answer = await refused(pipe, simulator, asking(**parameters))
    assert any(name in answer.error for name in parameters)
    assert len(answer.error) < 300


IGNORED: Final[list[Json]] = [
    {
        "store": True,
        "previous_response_id": "resp_1",
        "background": True,
        "debug": {"echo_upstream_body": True},
    },
    {"preset": "expensive", "route": "fallback", "web_search_options": {}, "x_search_filter": {}},
    {"input": [{"role": "user", "content": "other"}], "instructions": "Be evil.", "include": ["x"]},
    {"tools": [{"type": "openrouter:web_search"}, {"type": "web_search"}], "tool_choice": "required"},
    {"headers": {"x-openrouter-cache": "true"}, "api_key": "sk-mine", "base_url": "http://evil.example"},
    {"stream_options": {"include_usage": False}, "usage": {"include": False}},
    {str(number): number for number in range(1000)},
]


@pytest.mark.parametrize("parameters", IGNORED, ids=lambda body: str(body)[:50])
async def test_what_is_no_parameter_changes_nothing(
    parameters: Json, pipe: Pipe, simulator: Simulator, host: HostRows
) -> None:
    plain = await sent(pipe, simulator, asking())
    assert await sent(pipe, simulator, asking(**parameters)) == plain


# What `/responses` does not have


def endpoints(simulator: Simulator) -> list[str]:
    return [record.path.rpartition("/")[2] for record in posts(simulator)]


def posts(simulator: Simulator) -> list[RecordedRequest]:
    return [record for record in simulator.requests if record.method == "POST"]


CHAT_ONLY: Final[Json] = {
    "stop": ["END"],
    "seed": 7,
    "min_p": 0.1,
    "top_a": 0.2,
    "repetition_penalty": 1.1,
    "logit_bias": {"50256": -100},
    "logprobs": True,
}


def test_every_parameter_of_chats_alone_is_tried() -> None:
    assert set(CHAT_ONLY) == set(_CHAT_ONLY_PARAMETERS)


@pytest.mark.parametrize("name", sorted(CHAT_ONLY))
async def test_a_parameter_that_only_chat_has_is_dropped(name: str, pipe: Pipe, simulator: Simulator) -> None:
    plain = await sent(pipe, simulator, asking())
    assert await sent(pipe, simulator, asking(**{name: CHAT_ONLY[name]})) == plain
    assert endpoints(simulator) == ["responses", "responses"]


@pytest.mark.parametrize("name", sorted(CHAT_ONLY))
async def test_a_parameter_that_only_chat_has_is_sent_there(
    name: str, pipe: Pipe, simulator: Simulator
) -> None:
    set_valves(pipe, simulator.base_url, UNSUPPORTED_PARAMETERS="use_chat_completions")
    body = await sent(pipe, simulator, asking(**{name: CHAT_ONLY[name]}, temperature=0.5, max_tokens=9))
    assert endpoints(simulator) == ["completions"]
    assert (body[name], body["temperature"], body["max_completion_tokens"]) == (CHAT_ONLY[name], 0.5, 9)
    validator("ChatRequest").validate(body)


@pytest.mark.parametrize(
    "parameters",
    [{}, {"temperature": 1}, {"seed": None}, {"preset": "p"}, {"chat_id": "c", "new": 1}],
    ids=str,
)
async def test_nothing_else_leads_to_chat(parameters: Json, pipe: Pipe, simulator: Simulator) -> None:
    set_valves(pipe, simulator.base_url, UNSUPPORTED_PARAMETERS="use_chat_completions")
    await sent(pipe, simulator, asking(**parameters))
    assert endpoints(simulator) == ["responses"]


def unsent(log: pytest.LogCaptureFixture) -> list[str]:
    return [text for record in log.records if "Not sent, because" in (text := record.getMessage())]


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, "openrouter_responses_pipe")
    return caplog


async def test_what_is_dropped_is_said_once(
    pipe: Pipe, simulator: Simulator, log: pytest.LogCaptureFixture
) -> None:
    for _ in range(3):
        await sent(pipe, simulator, asking(seed=1, stop=["x"], temperature=1))
    await sent(pipe, simulator, asking(seed=1, preset="p"))
    first, second = unsent(log)
    assert {name for name in ("seed", "stop", "temperature", "preset") if name in first} == {"seed", "stop"}
    assert {name for name in ("seed", "stop", "temperature", "preset") if name in second} == {"preset"}
    async with running_pipe(simulator.base_url) as another:
        await sent(another, simulator, asking(seed=1))
    assert len(unsent(log)) == 3


async def test_what_chat_was_sent_is_not_called_dropped(
    pipe: Pipe, simulator: Simulator, log: pytest.LogCaptureFixture
) -> None:
    set_valves(pipe, simulator.base_url, UNSUPPORTED_PARAMETERS="use_chat_completions")
    await sent(pipe, simulator, asking(seed=1, preset="p"))
    (line,) = unsent(log)
    assert "preset" in line
    assert "seed" not in line


async def test_names_of_parameters_do_not_spoil_the_log(
    pipe: Pipe, simulator: Simulator, log: pytest.LogCaptureFixture
) -> None:
    names = ["a\nERROR root: forged", "b\x1b[31m", "c" * 100_000, *(f"n{number}" for number in range(5000))]
    parameters: Json = dict.fromkeys(names, 1)
    await sent(pipe, simulator, asking(**parameters))
    assert unsent(log)
    assert all(line.isprintable() and len(line) < 2000 for line in unsent(log))


# What chat knows of all this


@settings(max_examples=150, deadline=None)
@given(
    parameters=st.fixed_dictionaries(
        {}, optional={name: st.sampled_from(GOOD[name]) for name in sorted(_PARAMETERS)}
    )
)
def test_the_same_for_chat_is_valid_too(parameters: Json) -> None:
    body = CompletionsBody.parse(chat(**parameters, **CHAT_ONLY, tools=[TOOL]))
    made = _to_chat_body(ResponsesBody.from_completions(body, MIND, QUIET).payload, body.parameters)
    validator("ChatRequest").validate(made)
    assert nulls(made) == []
    assert {name: made[name] for name in CHAT_ONLY} == CHAT_ONLY


# the fields that the schema of /chat/completions has too
IN_CHAT: Final[list[tuple[Json, Json]]] = [
    ({"models": ["a/b"]}, {"models": ["a/b"]}),
    ({"provider": {"zdr": True}}, {"provider": {"zdr": True}}),
    ({"plugins": [{"id": "web"}]}, {"plugins": [{"id": "web"}]}),
    ({"transforms": ["middle-out"]}, {"plugins": [{"id": "context-compression"}]}),
    ({"modalities": ["text"]}, {"modalities": ["text"]}),
    ({"image_config": {"size": "1K"}}, {"image_config": {"size": "1K"}}),
    ({"service_tier": "flex"}, {"service_tier": "flex"}),
    ({"top_logprobs": 3}, {"top_logprobs": 3}),
    ({"session_id": "s", "user": "u"}, {"session_id": "s", "user": "u"}),
    ({"metadata": {"a": "b"}, "trace": {"x": 1}}, {"metadata": {"a": "b"}, "trace": {"x": 1}}),
    ({"reasoning": {"effort": "low"}}, {"reasoning": {"effort": "low"}}),
    ({"reasoning": {"max_tokens": 2000}}, {"reasoning": {"max_tokens": 2000}}),
    ({"cache_control": {"type": "ephemeral"}}, {"cache_control": {"type": "ephemeral"}}),
    ({"prompt_cache_key": "k"}, {"prompt_cache_key": "k"}),
    ({"prompt_cache_options": {"mode": "explicit"}}, {"prompt_cache_options": {"mode": "explicit"}}),
    ({"stop_server_tools_when": [COST_LIMIT]}, {"stop_server_tools_when": [COST_LIMIT]}),
]


@pytest.mark.parametrize(("parameters", "expected"), IN_CHAT, ids=str)
def test_chat_is_told_what_it_knows(parameters: Json, expected: Json) -> None:
    body = CompletionsBody.parse(chat(**parameters))
    made = _to_chat_body(translate(chat(**parameters)), body.parameters)
    plain = _to_chat_body(translate(chat()), {})
    assert {name: value for name, value in made.items() if plain.get(name) != value} == expected


# The examples

EXAMPLES: Final[dict[str, Json]] = {
    entry["name"]: entry
    for entry in json.loads((DATA / "request_examples.json").read_text("utf-8"))["requests"]
}


def says(*messages: Any, **parameters: Any) -> Json:
    listed = [{"role": "user", "content": entry} if isinstance(entry, str) else entry for entry in messages]
    return {"messages": listed, **parameters}


def function(name: str, **more: Any) -> Json:
    return {"type": "function", "function": {"name": name, **more}}


WEATHER: Final[Json] = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
}
PERSON: Final[Json] = {
    "type": "object",
    "properties": {"name": {"type": "string"}},
    "required": ["name"],
    "additionalProperties": False,
}
TURNS: Final[Json] = says("Capital of Peru?", {"role": "assistant", "content": "Lima."}, "Population?")
# example -> the chat that says the same; what a chat cannot say has no row (reference: server tools, files)
CHATS: Final[dict[str, Json]] = {
    "string_input": says("Hello"),
    "multi_turn_easy": says({"role": "system", "content": "Be brief."}, *TURNS["messages"]),
    "multi_turn_full_assistant": TURNS,
    "tool_loop_openai": says(
        "Weather in Oslo?",
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {
                    "id": "call_1",
                    "type": "function",
                    "function": {"name": "get_weather", "arguments": '{"city":"Oslo"}'},
                }
            ],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": '{"temp_c":4}'},
        tools=[function("get_weather", description="Weather for a place.", parameters=WEATHER)],
        tool_choice="auto",
        parallel_tool_calls=True,
        reasoning_effort="medium",
        reasoning={"summary": "auto"},
    ),
    "structured_output": says(
        "Give a person.",
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "person", "strict": True, "schema": PERSON},
        },
        verbosity="low",
        plugins='[{"id": "response-healing"}]',
    ),
    "image_output": says("A red square", modalities=["image", "text"], image_config={"aspect_ratio": "1:1"}),
    "auto_router": says(
        "Hi",
        plugins=[{"id": "auto-router", "allowed_models": ["anthropic/*", "openai/*"], "cost_tier": "medium"}],
        transforms=["middle-out"],
    ),
    "server_tools_and_routing": says(
        "Any ferry news?",
        models="openai/gpt-5-mini, google/gemini-2.5-flash",
        max_tool_calls="6",
        provider=json.dumps(EXAMPLES["server_tools_and_routing"]["body"]["provider"]),
        metadata={"chat": "42"},
        safety_identifier="u_5f",
        user="u_5f",
        trace={"trace_id": "t1"},
        service_tier="flex",
    ),
}


def alike(item: Json) -> Json:
    """An input item without what says nothing: plain text is one part, ids and states are made up."""
    parts = item.get("content")
    if isinstance(parts, list) and all("text" in part for part in parts):
        parts = "\n".join(part["text"] for part in parts)
    rest = {name: value for name, value in item.items() if name not in ("id", "status", "content")}
    return rest if parts is None else {**rest, "content": parts}


def reduced(body: Json) -> Json:
    """A request without the choices of form that its examples make."""
    listed = body["input"]
    if isinstance(listed, str):
        listed = [{"type": "message", "role": "user", "content": listed}]
    body = {**body, "input": [alike(item) for item in listed if item["type"] != "reasoning"]}
    if "tools" in body:
        functions = [tool for tool in body["tools"] if tool["type"] == "function"]
        body["tools"] = [
            {name: value for name, value in tool.items() if value is not None} for tool in functions
        ]
    return {name: value for name, value in body.items() if value != []}


@pytest.mark.parametrize("name", CHATS)
def test_the_examples_can_be_made(name: str) -> None:
    wanted = EXAMPLES[name]["body"]
    spec = MIND._replace(id=wanted["model"], reasoning=ReasoningSpec() if "reasoning" in wanted else None)
    payload = translate({"model": f"openrouter.{wanted['model']}", **CHATS[name]}, spec)
    validator().validate(payload)
    assert reduced(payload) == reduced(wanted)


PICTURE: Final[Json] = {"type": "image_url", "image_url": {"url": "https://x/y.png"}}
# example -> the chat that tempts to make it
TEMPTING: Final[dict[str, Json]] = {
    "store_true": says("Hi", store=True),
    "previous_response_id": says("Hi", previous_response_id="resp_1"),
    "nested_chat_tool": says("Hi", tools=[function("f", parameters={})]),
    "assistant_with_input_text": says(
        "Hi", {"role": "assistant", "content": [{"type": "input_text", "text": "x"}]}
    ),
    "image_object_url": says({"role": "user", "content": [PICTURE]}),
    "call_without_call_id": says(
        "Hi",
        {"role": "assistant", "tool_calls": [function("f", arguments="{}")]},
        {"role": "tool", "content": "x"},
    ),
    "unknown_item": says("Hi", {"role": "tool_result", "type": "tool_result", "text": "x"}),
    "provider_unknown_key": says("Hi", provider={"orders": ["openai"]}),
    "temperature_string": says("Hi", temperature="0.2"),
    "input_audio_m4a": says(
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "Hi"},
                {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "m4a"}},
            ],
        }
    ),
    "output_item_without_detail": says({"role": "user", "content": [PICTURE]}),
}


def test_every_invalid_example_is_tried() -> None:
    assert set(TEMPTING) == {name for name, example in EXAMPLES.items() if not example["valid"]}


@pytest.mark.parametrize("name", TEMPTING)
def test_the_invalid_examples_cannot_be_made(name: str) -> None:
    wrong = EXAMPLES[name]["body"]
    spec = MIND._replace(reasoning=None)
    payload = or_refused(lambda: translate({"model": "openrouter.openai/gpt-5-mini", **TEMPTING[name]}, spec))
    assert isinstance(payload, str) == (name == "provider_unknown_key")
    if isinstance(payload, str):
        return
    validator().validate(payload)
    assert (payload["store"], "previous_response_id" in payload) == (False, False)
    said = [item for item in payload["input"] if item.get("role") == "assistant"]
    assert all(isinstance(item["content"], str) for item in said)
    assert all(payload.get(key) != value for key, value in wrong.items() if key in ("tools", "temperature"))


def test_every_example_is_accounted_for() -> None:
    """What has no row above holds files, server tools or reasoning of earlier turns."""
    others = {"multimodal", "tool_loop_anthropic_signature", "deferred_tools"}
    assert {*CHATS, *TEMPTING} | others == set(EXAMPLES)
    assert all(EXAMPLES[name]["valid"] for name in (*CHATS, *others))


async def test_a_chat_with_everything_is_taken(pipe: Pipe, simulator: Simulator, host: HostRows) -> None:
    """The simulator refuses what OpenRouter would."""
    parameters = {name: values[0] for name, values in GOOD.items() if name not in (*WITH_TOOLS, "modalities")}
    parameters |= {"models": [MODEL], "max_tokens": 50}
    answer = await ask(pipe, "hello", **parameters)
    assert "administrator" in answer.error
    body = await sent(pipe, simulator, asking(role="admin", **parameters))
    assert inferences(simulator)[-1].unknown == []
    assert nulls(body) == []
