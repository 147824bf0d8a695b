"""Tools as a model is offered them: their names, which of them, and schemas that it must keep to."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from openrouter_responses_pipe.openrouter_responses_pipe import (
    _STRICT_KEYWORDS,
    CompletionsBody,
    ModelSpec,
    OfferedTool,
    RequestSettings,
    ResponsesBody,
    ToolCall,
    ToolInputError,
    _arguments_of,
    _cut_text,
    _plain_schema,
    _safe_tool_name,
    _strictify_schema,
    _to_response_tools,
    _tool_names,
    _without_nulls_of,
)
from tests.tools import TEXT, WHOLE, entry, schema

Json = dict[str, Any]
PLAIN: Final = RequestSettings()
CALLS: Final = ModelSpec("a/b", "B", supported_parameters=frozenset({"tools", "tool_choice"}))
NAME_RE: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")


def function(name: Any, parameters: Any = None, **more: Any) -> Json:
    """A tool of a chat body."""
    found = {"name": name, "description": f"Do {name}."} | more
    return {
        "type": "function",
        "function": found | ({} if parameters is None else {"parameters": parameters}),
    }


def flat(*tools: Json, **changes: Any) -> dict[OfferedTool, Json]:
    """What is offered of them."""
    return _to_response_tools(tools, PLAIN._replace(**changes))


def names_of(*names: str, **changes: Any) -> list[str]:
    """The names that a model sees."""
    return [tool.name for tool in flat(*map(function, names), **changes)]


def request_of(tools: Iterable[Json], messages: Sequence[Json] = (), **body: Any) -> ResponsesBody:
    """The request for a chat that offers these tools."""
    said = [*messages] or [{"role": "user", "content": "hello"}]
    parsed = CompletionsBody.parse({"model": "a/b", "messages": said, "tools": list(tools), **body})
    return ResponsesBody.from_completions(parsed, CALLS, PLAIN)


# Names


@pytest.mark.parametrize(
    ("name", "safe"),
    [
        ("add", "add"),
        ("get.user/x", "get_user_x"),
        ("a b", "a_b"),
        ("-_-", "-_-"),
        ("x" * 64, "x" * 64),
        ("x" * 65, "x" * 64),
        ("погода", "______"),
        ("👩‍👩‍👧", "_____"),
        ("\x00\n", "__"),
        ("", "tool"),
    ],
)
def test_a_name_that_every_provider_takes(name: str, safe: str) -> None:
    assert _safe_tool_name(name) == safe


@given(name=st.text(max_size=200))
def test_any_name_becomes_one_that_is_taken(name: str) -> None:
    safe = _safe_tool_name(name)
    assert NAME_RE.fullmatch(safe)
    assert _safe_tool_name(safe) == safe


def test_names_that_become_one_are_told_apart() -> None:
    assert len(set(names_of("a.b", "a/b", "a b", "a_b"))) == 4


def test_who_has_a_good_name_keeps_it() -> None:
    """Another tool, whose name has to be changed, must not take it."""
    offered = {tool.host_name: tool.name for tool in flat(function("a.b"), function("a_b"))}
    assert offered["a_b"] == "a_b"


def test_names_do_not_depend_on_the_tools_beside_them_in_the_chat() -> None:
    """A chat goes on with one tool more: those that were called must still be what they were."""
    before = {tool.host_name: tool.name for tool in flat(function("a/b"), function("c"))}
    after = {tool.host_name: tool.name for tool in flat(function("c"), function("a/b"), function("d"))}
    assert before.items() <= after.items()


def cleaned_of(value: Any, original: Json) -> Any:
    """Arguments of a strict tool as its original gets them."""
    return _without_nulls_of(value, _plain_schema(original) or original)


@pytest.mark.timeout(10)
@pytest.mark.parametrize(
    "names",
    [
        ["x" * 62 + "_1", "x" * 62 + ".1"],
        ["x" * 62 + "_1" + "a", "x" * 62 + "_1" + "b"],
        ["a", "x" * 62 + "_2", "x" * 62 + "_2 and more"],
    ],
    ids=["odd", "long", "third"],
)
def test_a_number_at_the_end_of_a_long_name_is_no_trap(names: list[str]) -> None:
    """In a process of its own, because it may not come back."""
    folder = Path(__file__).parent.parent
    code = (
        "import json, sys\n"
        "from openrouter_responses_pipe.openrouter_responses_pipe import _tool_names\n"
        "print(json.dumps([*_tool_names(json.loads(sys.argv[1])).values()]))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, json.dumps(names)],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert len(set(json.loads(ran.stdout))) == len(names)


@given(names=st.lists(st.text(alphabet="ab._ é", min_size=1, max_size=4), max_size=30, unique=True))
def test_any_names_are_told_apart(names: list[str]) -> None:
    tools = flat(*map(function, names))
    assert [tool.host_name for tool in tools] == names
    assert len({tool.name for tool in tools}) == len(names)
    assert all(NAME_RE.fullmatch(tool.name) for tool in tools)
    assert [entry["name"] for entry in tools.values()] == [tool.name for tool in tools]


def test_of_two_tools_with_one_name_the_first_is_offered() -> None:
    tools = flat(function("a", schema({"x": TEXT})), function("a", schema({"y": TEXT})), function("b"))
    assert [tool.host_name for tool in tools] == ["a", "b"]
    assert next(iter(tools.values()))["parameters"]["properties"] == {"x": TEXT}


@pytest.mark.parametrize(
    "tool",
    [
        {},
        {"type": "function"},
        {"type": "function", "function": None},
        {"type": "mcp"},
        function(""),
        function(7),
    ],
    ids=str,
)
def test_what_is_no_function_is_not_offered(tool: Json) -> None:
    assert [tool.name for tool in flat(tool, function("a"))] == ["a"]


@pytest.mark.parametrize("parameters", [None, {}, [], "x"], ids=str)
def test_a_tool_without_parameters_takes_none(parameters: Any) -> None:
    (tool,) = flat(function("a", parameters)).values()
    assert tool["parameters"] == {"type": "object", "properties": {}}


def test_a_tool_is_offered_as_it_is() -> None:
    parameters = schema({"a": TEXT}, "a", **{"$defs": {"x": {}}})
    before = json.dumps(parameters)
    (tool,) = flat(function("a", parameters)).values()
    assert tool == {"type": "function", "name": "a", "description": "Do a.", "parameters": parameters}
    assert json.dumps(parameters) == before


# Which of them


@pytest.mark.parametrize(
    ("available", "offered"),
    [
        ("all", ["get_a", "get_b", "Search", "x.y"]),
        ("", ["get_a", "get_b", "Search", "x.y"]),
        (" all ", ["get_a", "get_b", "Search", "x.y"]),
        ("*", ["get_a", "get_b", "Search", "x.y"]),
        ("get_*", ["get_a", "get_b"]),
        ("get_b, search", ["get_b", "Search"]),
        ("get_?, nobody", ["get_a", "get_b"]),
        ("x.y", ["x.y"]),
        ("nobody", []),
        (",", []),
    ],
)
def test_available_tools(available: str, offered: list[str]) -> None:
    tools = flat(*map(function, ["get_a", "get_b", "Search", "x.y"]), available_tools=available)
    assert [tool.host_name for tool in tools] == offered


def test_only_what_somebody_can_run_is_offered() -> None:
    tools = [function("a"), function("b")]
    assert [tool.name for tool in flat(*tools, only_tools=frozenset({"b"}))] == ["b"]
    assert flat(*tools, only_tools=frozenset()) == {}


# Names elsewhere in the request


@pytest.mark.parametrize("form", ["chat", "flat"])
def test_a_choice_names_what_is_offered(form: str) -> None:
    choice: Json = {"type": "function", "function": {"name": "get.user/x"}}
    if form == "flat":
        choice = {"type": "function", "name": "get.user/x"}
    payload = request_of([function("get.user/x")], tool_choice=choice).payload
    assert payload["tools"][0]["name"] == "get_user_x"
    assert payload["tool_choice"] == {"type": "function", "name": "get_user_x"}


def test_a_choice_of_what_is_not_offered_is_not_sent() -> None:
    """A provider refuses the whole request for it."""
    body = CompletionsBody.parse(
        {
            "model": "a/b",
            "messages": [{"role": "user", "content": "hello"}],
            "tools": [function("a"), function("b")],
            "tool_choice": {"type": "function", "function": {"name": "a"}},
        }
    )
    made = ResponsesBody.from_completions(body, CALLS, PLAIN._replace(available_tools="b"))
    assert [tool["name"] for tool in made.payload["tools"]] == ["b"]
    assert "tool_choice" not in made.payload


def called(name: str, call_id: str = "c1") -> list[Json]:
    """An answer that has called a tool."""
    made = {"id": call_id, "type": "function", "function": {"name": name, "arguments": "{}"}}
    return [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "", "tool_calls": [made]},
        {"role": "tool", "tool_call_id": call_id, "content": "x"},
        {"role": "user", "content": "and?"},
    ]


@pytest.mark.parametrize("name", ["get.user/x", "x" * 80, "é"])
def test_a_call_in_the_history_has_the_name_that_is_offered(name: str) -> None:
    made = request_of([function(name)], called(name))
    (call,) = [item for item in made.payload["input"] if item["type"] == "function_call"]
    assert call["name"] == made.payload["tools"][0]["name"]


def test_a_call_in_the_history_of_a_tool_that_had_to_be_told_apart() -> None:
    made = request_of([function("a_b"), function("a.b")], called("a.b"))
    names = {tool.host_name: tool.name for tool in made.tools}
    (call,) = [item for item in made.payload["input"] if item["type"] == "function_call"]
    assert call["name"] == names["a.b"] != "a_b"


def test_a_call_in_the_history_of_a_tool_that_is_gone() -> None:
    (call,) = [i for i in request_of([], called("a.b")).payload["input"] if i["type"] == "function_call"]
    assert call["name"] == "a_b"


# Schemas that a model must keep to

NESTED: Final = {"type": "object", "properties": {"x": TEXT, "y": WHOLE}, "required": ["x"]}
SAID: Final[dict[str, tuple[Json, Json]]] = {
    "no properties": ({"type": "object"}, {}),
    "required": (schema({"a": TEXT}, "a"), {"a": TEXT}),
    "optional": (schema({"a": TEXT}), {"a": {"type": ["string", "null"]}}),
    "optional words": (
        schema({"a": {"enum": ["x"], "description": "One."}}),
        {"a": {"description": "One.", "anyOf": [{"enum": ["x"]}, {"type": "null"}]}},
    ),
    "optional and nullable": (schema({"a": {**TEXT, "nullable": True}}), {"a": {"type": ["string", "null"]}}),
    "required and nullable": (
        schema({"a": {**TEXT, "nullable": True}}, "a"),
        {"a": {"type": ["string", "null"]}},
    ),
    "what nobody needs": (
        schema({"a": {**TEXT, "title": "A", "default": "x", "format": "date"}}, "a"),
        {"a": TEXT},
    ),
    "a reference": (schema({"a": {"$ref": "#/$defs/t"}}, "a", **{"$defs": {"t": TEXT}}), {"a": TEXT}),
    "an old reference": (
        schema({"a": {"$ref": "#/definitions/t"}}, "a", definitions={"t": TEXT}),
        {"a": TEXT},
    ),
    "odd names": (schema({"a": {"$ref": "#/$defs/x~1y~0z"}}, "a", **{"$defs": {"x/y~z": TEXT}}), {"a": TEXT}),
    "a reference with words": (
        schema({"a": {"$ref": "#/$defs/t", "description": "A."}}, "a", **{"$defs": {"t": TEXT}}),
        {"a": {**TEXT, "description": "A."}},
    ),
    "allOf": (
        schema({"a": {"allOf": [{"$ref": "#/$defs/t"}], "description": "A."}}, "a", **{"$defs": {"t": TEXT}}),
        {"a": {**TEXT, "description": "A."}},
    ),
    "anyOf": (
        schema({"a": {"anyOf": [TEXT, {"type": "null"}]}}, "a"),
        {"a": {"anyOf": [TEXT, {"type": "null"}]}},
    ),
    "an object": (
        schema({"a": NESTED}, "a"),
        {
            "a": {
                "type": "object",
                "properties": {"x": TEXT, "y": {"type": ["integer", "null"]}},
                "required": ["x", "y"],
                "additionalProperties": False,
            }
        },
    ),
    "a list": (schema({"a": {"type": "array", "items": TEXT}}, "a"), {"a": {"type": "array", "items": TEXT}}),
}


@pytest.mark.parametrize("case", sorted(SAID))
def test_what_can_be_said_strictly(case: str) -> None:
    original, properties = SAID[case]
    before = json.dumps(original)
    strict = _strictify_schema(original)
    assert strict == {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }
    assert json.dumps(original) == before


UNSAID: Final[dict[str, Any]] = {
    "any names": {"type": "object", "additionalProperties": True},
    "names by pattern": schema({"a": {"type": "object", "patternProperties": {"^x": TEXT}}}),
    "a map": schema({"a": {"type": "object", "additionalProperties": TEXT}}),
    "an object of anything": schema({"a": {"type": "object"}}),
    "a list of anything": schema({"a": {"type": "array"}}),
    "a property of anything": schema({"a": {}}),
    "truth": schema({"a": True}),
    "one of": schema({"a": {"oneOf": [TEXT, WHOLE]}}),
    "not": schema({"a": {"not": TEXT}}),
    "if": schema({"a": {"if": TEXT, "then": WHOLE}}),
    "required elsewhere": schema({"a": TEXT}, "b"),
    "length": schema({"a": {**TEXT, "minLength": 1}}),
    "of the web": schema({"a": {"$ref": "http://127.0.0.1:1/x"}}),
    "of nothing": schema({"a": {"$ref": "#/$defs/nobody"}}),
    "itself": schema({"a": {"$ref": "#"}}, "a"),
    "round and round": schema({"a": {"$ref": "#/$defs/x"}}, **{"$defs": {"x": {"$ref": "#/$defs/x"}}}),
    "both": schema({"a": {"allOf": [TEXT, WHOLE]}}),
    "nothing to choose": schema({"a": {"anyOf": []}}),
    "no object": {"type": "string"},
    "maybe an object": {"type": ["object", "null"], "properties": {}},
    "properties are a list": {"type": "object", "properties": [TEXT]},
    "required is a text": {"type": "object", "properties": {"a": TEXT}, "required": "a"},
    "deep": json.loads('{"type": "array", "items": ' * 500 + '{"type": "string"}' + "}" * 500),
}


@pytest.mark.parametrize("case", sorted(UNSAID))
def test_what_cannot_be_said_strictly_is_offered_as_it_is(case: str) -> None:
    assert _strictify_schema(UNSAID[case]) is None
    (tool,) = flat(function("a", UNSAID[case]), strict_tools=True).values()
    assert "strict" not in tool


def test_strict_tools_are_marked() -> None:
    (tool,) = flat(function("a", schema({"a": TEXT})), strict_tools=True).values()
    assert (tool["strict"], tool["parameters"]["required"]) == (True, ["a"])


def obeys(part: Any) -> None:
    """Expect that a strict schema is one by OpenAI's rules."""
    assert isinstance(part, dict)
    assert part.keys() <= _STRICT_KEYWORDS - {"$ref", "$defs", "allOf", "nullable", "default", "definitions"}
    assert part.keys() & {"type", "anyOf", "enum", "const"}
    kinds = part.get("type")
    kinds = kinds if isinstance(kinds, list) else [kinds]
    assert len(kinds) == len(set(kinds))
    if "object" in kinds:
        assert part["additionalProperties"] is False
        assert sorted(part["required"]) == sorted(part["properties"])
    if "array" in kinds:
        obeys(part["items"])
    assert part.get("anyOf", True)
    for inner in (*part.get("properties", {}).values(), *part.get("anyOf", ())):
        obeys(inner)


LEAVES: Final[list[Json]] = [
    TEXT,
    WHOLE,
    {"type": "integer", "minimum": 0, "maximum": 3},
    {"type": "boolean"},
    {"type": "null"},
    {"enum": ["a", "b"]},
    {"enum": ["a", None]},
    {"type": "string", "enum": ["a"]},
    {"const": "c"},
    {"type": ["string", "null"]},
    {"type": "string", "default": "x", "title": "T", "format": "date", "description": "D"},
    {"$ref": "#/$defs/A"},
    {"$ref": "#/$defs/B"},
    {"$ref": "#/$defs/A", "description": "A."},
]
ODD_LEAVES: Final[list[Json]] = [
    {},
    {"$ref": "#"},
    {"$ref": "#/$defs/nobody"},
    {"type": "object"},
    {"type": "array"},
    {"oneOf": [TEXT]},
    {"type": "string", "minLength": 1},
]


@st.composite
def _objects(draw: st.DrawFn, inner: st.SearchStrategy[Json]) -> Json:
    properties = draw(st.dictionaries(st.sampled_from("abc"), inner, max_size=3))
    made: Json = {"type": draw(st.sampled_from(["object", "object", ["object", "null"]]))}
    made["properties"] = properties
    if properties and draw(st.booleans()):
        made["required"] = draw(st.lists(st.sampled_from(sorted(properties)), unique=True))
    if draw(st.booleans()):
        made["additionalProperties"] = False
    return made


def _siblings(keyword: str, inner: st.SearchStrategy[Json]) -> st.SearchStrategy[Json]:
    some = st.lists(inner, min_size=1, max_size=2)
    beside = {
        "description": st.just("D"),
        "required": st.just(["a"]),
        "additionalProperties": st.just(False),
        "properties": st.just({"c": TEXT}),
        "type": st.just("object"),
    }
    return st.fixed_dictionaries({keyword: some}, optional=beside)


def _parts(leaves: list[Json]) -> st.SearchStrategy[Json]:
    return st.recursive(
        st.sampled_from(leaves),
        lambda inner: st.one_of(
            _objects(inner),
            _objects(inner),
            st.fixed_dictionaries({"type": st.just("array"), "items": inner}),
            _siblings("anyOf", inner),
            _siblings("allOf", inner),
        ),
        max_leaves=5,
    )


def schemas(leaves: list[Json]) -> st.SearchStrategy[Json]:
    """The schema of a tool's arguments, with two definitions in it."""
    parts = _parts(leaves)
    objects = _objects(parts)
    root = objects.map(lambda made: {**made, "type": "object"})
    halves = st.tuples(root, objects).map(lambda pair: {"allOf": [*pair]})
    definitions = st.fixed_dictionaries({"A": parts, "B": objects})
    return st.tuples(st.one_of(root, root, root, halves), definitions).map(
        lambda pair: {**pair[0], "$defs": pair[1]}
    )


MAYBE: Final[list[Json]] = [TEXT, WHOLE, {**TEXT, "nullable": True}, {"enum": ["a"], "nullable": True}]
SCHEMAS: Final = schemas(LEAVES)
ODD_SCHEMAS: Final = schemas([*LEAVES, *ODD_LEAVES])
MAYBE_SCHEMAS: Final = schemas(MAYBE)


@st.composite
def instances(draw: st.DrawFn, part: Json) -> Any:
    """A value that a strict schema allows."""
    if "anyOf" in part:
        return draw(instances(draw(st.sampled_from(part["anyOf"]))))
    if "const" in part:
        return part["const"]
    if "enum" in part:
        return draw(st.sampled_from(part["enum"]))
    kinds = part["type"] if isinstance(part["type"], list) else [part["type"]]
    kind = draw(st.sampled_from(kinds))
    if kind == "object":
        return {name: draw(instances(inner)) for name, inner in part["properties"].items()}
    if kind == "array":
        return [draw(instances(part["items"])) for _ in range(draw(st.integers(0, 2)))]
    simple: dict[str, st.SearchStrategy[Any]] = {
        "string": st.sampled_from(["", "a", "b"]),
        "integer": st.integers(part.get("minimum", -2), part.get("maximum", 3)),
        "boolean": st.booleans(),
        "null": st.none(),
    }
    return draw(simple[kind])


def is_valid(original: Mapping[str, Any], value: Any) -> bool:
    """By a validator that knows nothing of us."""
    return Draft202012Validator(dict(original)).is_valid(value)


SLOW: Final = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]


@settings(max_examples=200, deadline=None, suppress_health_check=SLOW)
@given(original=SCHEMAS, data=st.data())
def test_what_is_valid_strictly_is_valid(original: Json, data: st.DataObject) -> None:
    """The nulls that stand for “not given” aside, which are taken away before a tool is called."""
    strict = _strictify_schema(original)
    assume(strict is not None)
    assert strict is not None
    obeys(strict)
    value = data.draw(instances(strict))
    assume(is_valid(strict, value))  # two halves of an allOf may leave nothing
    cleaned = cleaned_of(value, original)
    assert is_valid(original, cleaned), (strict, value, cleaned)


@settings(max_examples=200, deadline=None, suppress_health_check=SLOW)
@given(original=ODD_SCHEMAS)
def test_any_schema_is_said_strictly_or_not_at_all(original: Json) -> None:
    before = json.dumps(original)
    strict = _strictify_schema(original)
    if strict is not None:
        obeys(strict)
    assert json.dumps(original) == before


@settings(max_examples=100, deadline=None, suppress_health_check=SLOW)
@given(original=MAYBE_SCHEMAS, data=st.data())
def test_what_a_strict_model_writes_is_taken(original: Json, data: st.DataObject) -> None:
    strict = _strictify_schema(original)
    assume(strict is not None and "allOf" not in original)
    assert strict is not None
    value = data.draw(instances(strict))
    assume(is_valid(strict, value))  # two halves of an allOf may leave nothing
    tool = entry(test_what_a_strict_model_writes_is_taken, parameters=original)
    try:
        _arguments_of(ToolCall("c", "f", json.dumps(value)), tool)
    except ToolInputError as error:
        raise AssertionError((error.detail, original, value)) from error


# Found by the above, said singly

KEPT: Final[dict[str, tuple[Json, Any]]] = {
    "in an object that may be null": (
        schema({"a": {"anyOf": [NESTED, {"type": "null"}]}}, "a"),
        {"a": {"x": "1", "y": None}},
    ),
    "in one of two": (
        schema({"a": {"anyOf": [TEXT, NESTED]}}, "a"),
        {"a": {"x": "1", "y": None}},
    ),
    "in rows that may be null": (
        schema({"a": {"anyOf": [{"type": "array", "items": NESTED}, {"type": "null"}]}}, "a"),
        {"a": [{"x": "1", "y": None}]},
    ),
    "behind a reference": (
        schema({"a": {"anyOf": [{"$ref": "#/$defs/n"}, {"type": "null"}]}}, "a", **{"$defs": {"n": NESTED}}),
        {"a": {"x": "1", "y": None}},
    ),
    "in many rows": (
        schema({"a": {"type": "array", "items": {"$ref": "#/$defs/n"}}}, "a", **{"$defs": {"n": NESTED}}),
        {"a": [{"x": "1", "y": None}] * 3000},
    ),
}


@pytest.mark.parametrize("case", sorted(KEPT))
def test_nulls_that_stand_for_nothing_are_taken_away_everywhere(case: str) -> None:
    original, value = KEPT[case]
    strict = _strictify_schema(original)
    assert strict is not None
    assert is_valid(strict, value)
    cleaned = cleaned_of(value, original)
    assert is_valid(original, cleaned)


WIDER: Final[dict[str, tuple[Json, Any]]] = {
    "required beside anyOf": (
        schema({"p": {"anyOf": [{"type": "object", "properties": {"a": TEXT}}], "required": ["a"]}}, "p"),
        {"p": {"a": None}},
    ),
    "nothing more, beside anyOf": (
        schema(
            {"p": {"anyOf": [{"type": "object", "properties": {"a": TEXT}}], "additionalProperties": False}},
            "p",
        ),
        {"p": {"a": "x"}},
    ),
    "nothing more, in a half": (
        schema(
            {
                "p": {
                    "allOf": [
                        {"type": "object", "properties": {"a": TEXT}, "additionalProperties": False},
                        {"properties": {"b": TEXT}},
                    ]
                }
            },
            "p",
        ),
        {"p": {"a": "x", "b": "y"}},
    ),
}


@pytest.mark.parametrize("case", sorted(WIDER))
def test_a_strict_schema_allows_no_more(case: str) -> None:
    original, value = WIDER[case]
    strict = _strictify_schema(original)
    if strict is not None and is_valid(strict, value):
        assert is_valid(original, cleaned_of(value, original))


# Schemas made to do harm


def doubled(depth: int, keyword: str) -> Json:
    definitions: Json = {f"d{n}": {keyword: [{"$ref": f"#/$defs/d{n + 1}"}] * 2} for n in range(depth)}
    return schema({"a": {"$ref": "#/$defs/d0"}}, "a", **{"$defs": definitions | {f"d{depth}": TEXT}})


def doubled_objects(depth: int) -> Json:
    definitions = {
        f"d{n}": schema({name: {"$ref": f"#/$defs/d{n + 1}"} for name in "xy"}, "x", "y")
        for n in range(depth)
    }
    return schema({"a": {"$ref": "#/$defs/d0"}}, "a", **{"$defs": definitions | {f"d{depth}": TEXT}})


def chain(length: int) -> Json:
    definitions: Json = {f"d{n}": {"$ref": f"#/$defs/d{n + 1}"} for n in range(length)}
    return schema({"a": {"$ref": "#/$defs/d0"}}, "a", **{"$defs": definitions | {f"d{length}": TEXT}})


HOSTILE: Final[dict[str, Json]] = {
    "doubling anyOf": doubled(60, "anyOf"),
    "doubling allOf": doubled(60, "allOf"),
    "doubling objects": doubled_objects(60),
    "a long chain": chain(100_000),
    "a long pointer": schema({"a": {"$ref": "#" + "/x" * 500_000}}),
    "wide": schema({f"p{n}": TEXT for n in range(20_000)}),
    "wide pieces": {"allOf": [schema({f"p{n}": TEXT}) for n in range(3000)]},
    "many words": schema({"a": {"enum": [str(n) for n in range(200_000)]}}),
    "rounds": schema({"a": {"allOf": [{"$ref": "#"}, {"$ref": "#"}]}}),
    "a tree": schema(
        {"a": {"$ref": "#/$defs/t"}}, **{"$defs": {"t": schema({n: {"$ref": "#/$defs/t"} for n in "xyz"})}}
    ),
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("case", sorted(HOSTILE))
def test_a_schema_made_to_do_harm_does_none(case: str) -> None:
    strict = _strictify_schema(HOSTILE[case])
    if strict is not None:
        obeys(strict)
        assert len(json.dumps(strict)) < 10_000_000


@pytest.mark.timeout(20)
@pytest.mark.parametrize("case", sorted(HOSTILE))
def test_nulls_are_looked_for_in_bounded_time(case: str) -> None:
    thin: Any = None
    for _ in range(200):
        thin = {"a": thin, "x": 1}
    assert isinstance(cleaned_of(thin, HOSTILE[case]), dict)


# Texts that are cut


@given(text=st.text(max_size=300), most=st.integers(60, 200))
def test_a_cut_text_is_short_and_cut_once(text: str, most: int) -> None:
    cut = _cut_text(text, most)
    assert len(cut) <= most or cut == text
    assert _cut_text(cut, most) == cut
    if len(text) <= most:
        assert cut == text


@given(names=st.lists(st.text(max_size=5), max_size=6, unique=True))
def test_every_tool_has_a_name_of_its_own(names: list[str]) -> None:
    made = _tool_names(names)
    assert list(made) and set(made) == set(names) if names else made == {}
    assert len(set(made.values())) == len(names)
