"""From Open WebUI's chat body to the body of `POST /responses`."""

from __future__ import annotations

import copy
import functools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from referencing import Registry, Resource
from referencing.jsonschema import DRAFT202012

from openrouter_responses_pipe.openrouter_responses_pipe import (
    ChatContext,
    CompletionsBody,
    InputError,
    ModelSpec,
    ReasoningSpec,
    RequestSettings,
    ResponsesBody,
    _get_chat_context,
)

Json = dict[str, Any]
DATA: Final = Path(__file__).parent / "data" / "openrouter"
PLAIN: Final = ModelSpec("openai/gpt-4o-mini", "GPT-4o mini", supported_parameters=frozenset({"tools"}))
TEXT_ONLY: Final = ModelSpec("a/text", "Text")
SEEING: Final = ModelSpec("a/eyes", "Eyes", input_modalities=frozenset({"text", "image"}))
THINKING: Final = ModelSpec(
    "a/mind", "Mind", supported_parameters=frozenset({"tools"}), reasoning=ReasoningSpec()
)
PNG: Final = "data:image/png;base64,iVBORw0KGgo="


@functools.cache
def validator() -> Draft202012Validator:
    """OpenRouter's own description of a request."""
    document = json.loads((DATA / "openapi.trimmed.json").read_text("utf-8"))
    resource = Resource.from_contents(document, default_specification=DRAFT202012)
    registry = Registry().with_resource("urn:d", resource)
    return Draft202012Validator({"$ref": "urn:d#/components/schemas/ResponsesRequest"}, registry=registry)


def translate(body: Json, spec: ModelSpec = PLAIN, *, offer_tools: bool = True) -> ResponsesBody:
    settings = RequestSettings(offer_tools=offer_tools)
    return ResponsesBody.from_completions(CompletionsBody.parse(body), spec, settings)


def translate_or_refuse(body: Json, spec: ModelSpec) -> ResponsesBody | InputError:
    """The translation, or the sentence that refuses it; anything else that is raised is a failure."""
    try:
        return translate(body, spec)
    except InputError as refused:
        return refused


def chat(*messages: Json, **parameters: Any) -> Json:
    return {"model": "openrouter.openai/gpt-4o-mini", "messages": list(messages), **parameters}


def items(*messages: Json, spec: ModelSpec = PLAIN) -> list[Json]:
    """The input that some messages become; it is valid."""
    payload = translate(chat(*messages), spec).payload
    validator().validate(payload)
    return payload["input"]


def user(content: Any) -> Json:
    return {"role": "user", "content": content}


def assistant(content: Any = "", *calls: Json) -> Json:
    message: Json = {"role": "assistant", "content": content}
    return message | {"tool_calls": list(calls)} if calls else message


def call(call_id: Any, name: Any = "f", arguments: Any = "{}") -> Json:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def output(call_id: Any, content: Any = "out") -> Json:
    return {"role": "tool", "tool_call_id": call_id, "content": content}


def item(role: str, text: str) -> Json:
    return {"type": "message", "role": role, "content": [{"type": "input_text", "text": text}]}


HELLO: Final = user("hello")


# The outline


def test_the_plainest_chat() -> None:
    result = translate(chat(HELLO))
    assert result.payload == {
        "model": "openai/gpt-4o-mini",
        "input": [item("user", "hello")],
        "stream": True,
        "store": False,
    }
    assert result.notices == ()


def test_the_body_is_left_alone() -> None:
    body = chat(
        user([{"type": "text", "text": "a"}]), assistant("b", call("c")), output("c"), temperature="1"
    )
    before = copy.deepcopy(body)
    translate(body, THINKING)
    assert body == before


@pytest.mark.parametrize("messages", [None, [], {}, "hello", 5, ["hello"], [None], [HELLO, 5]])
def test_no_chat(messages: Any) -> None:
    with pytest.raises(InputError) as caught:
        translate({"model": "m", "messages": messages})
    assert caught.value.user_message.startswith("This chat could not be sent. ")


@pytest.mark.parametrize(
    "messages",
    [
        [user("")],
        [user([])],
        [user(None)],
        [user([{"type": "text", "text": ""}])],
        [{"role": "system", "content": "Be brief."}],
        [assistant("  ")],
        [output("orphan")],
        [{"role": "critic", "content": "x"}],
        [{}],
    ],
)
def test_nothing_to_answer(messages: list[Json]) -> None:
    with pytest.raises(InputError, match="nothing"):
        translate(chat(*messages))


@pytest.mark.parametrize(
    ("model", "upstream"),
    [
        ("openrouter.openai/gpt-4.1", "openai/gpt-4.1"),
        ("openai/gpt-4.1", "openai/gpt-4.1"),
        (None, ""),
    ],
)
def test_the_model_as_the_host_names_it(model: Any, upstream: str) -> None:
    assert CompletionsBody.parse({"model": model, "messages": [HELLO]}).model == upstream


def test_what_is_no_parameter_stays_behind() -> None:
    body = chat(HELLO, stream=True, stream_options={"include_usage": True}, tools=[], seed=None, top_p=1)
    assert CompletionsBody.parse(body).parameters == {"top_p": 1}


# Instructions


@pytest.mark.parametrize(
    ("leading", "instructions"),
    [
        ([], None),
        ([{"role": "system", "content": "A"}], "A"),
        ([{"role": "system", "content": "A"}, {"role": "developer", "content": "B"}], "A\n\nB"),
        (
            [{"role": "system", "content": [{"type": "text", "text": "A"}, {"type": "text", "text": "B"}]}],
            "A\nB",
        ),
        ([{"role": "system", "content": " "}, {"role": "system", "content": None}], None),
        ([{"role": "system", "content": {"text": "no"}}, {"role": "system", "content": "A"}], "A"),
    ],
)
def test_leading_system_messages_are_the_instructions(leading: list[Json], instructions: str | None) -> None:
    payload = translate(chat(*leading, HELLO)).payload
    assert payload.get("instructions") == instructions
    assert payload["input"] == [item("user", "hello")]
    validator().validate(payload)


@pytest.mark.parametrize(
    ("fields", "instructions"),
    [
        ({"system": "Own."}, "Own.\n\nBe brief."),
        ({"params": {"system": "Own."}}, "Own.\n\nBe brief."),
        ({"system": "Be brief."}, "Be brief."),
        ({"system": " brief "}, "Be brief."),
        ({"system": ""}, "Be brief."),
        ({"system": 5, "params": ["x"]}, "Be brief."),
    ],
)
def test_a_system_prompt_beside_the_messages(fields: Json, instructions: str) -> None:
    payload = translate(chat({"role": "system", "content": "Be brief."}, HELLO, **fields)).payload
    assert payload["instructions"] == instructions
    assert "system" not in payload


@pytest.mark.parametrize(
    ("metadata", "body", "context"),
    [
        ({"chat_id": "c", "message_id": "m"}, {"chat_id": "other"}, ChatContext("c", "m")),
        ({}, {"chat_id": "c", "metadata": {"chat_id": "x", "message_id": "m"}}, ChatContext("c", "m")),
        ({"chat_id": "temporary:a-b_c.d"}, {}, ChatContext("temporary:a-b_c.d", "")),
        ({"chat_id": "two words", "message_id": 5}, {"chat_id": "c"}, ChatContext("c", "")),
        ({"chat_id": "c" * 201}, {"chat_id": "a\nb", "metadata": "x"}, ChatContext("", "")),
        ({}, {}, ChatContext("", "")),
    ],
)
def test_the_ids_of_a_request(metadata: Json, body: Json, context: ChatContext) -> None:
    assert _get_chat_context(metadata, body) == context


def test_later_system_messages_keep_their_place() -> None:
    found = items(
        HELLO, {"role": "system", "content": "now in French"}, {"role": "developer", "content": " "}
    )
    assert found == [item("user", "hello"), item("system", "now in French")]


# Messages


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (user("a\n\nb"), [item("user", "a\n\nb")]),
        (user([{"type": "input_text", "text": "a"}]), [item("user", "a")]),
        (assistant("Lima."), [{"type": "message", "role": "assistant", "content": "Lima."}]),
        (
            assistant([{"type": "text", "text": "a"}, {"type": "output_text", "text": "b"}, "c", {"x": 1}]),
            [{"type": "message", "role": "assistant", "content": "a\nb"}],
        ),
        (assistant(None), []),
        (assistant(""), []),
    ],
)
def test_messages(message: Json, expected: list[Json]) -> None:
    assert items(HELLO, message)[1:] == expected


def test_the_order_of_a_chat_stays() -> None:
    found = items(user("1"), assistant("2"), user("3"), assistant("4"), user("5"))
    texts = [
        entry["content"] if entry["role"] == "assistant" else entry["content"][0]["text"] for entry in found
    ]
    assert texts == ["1", "2", "3", "4", "5"]


def image(url: Any, **more: Any) -> Json:
    return {"type": "image_url", "image_url": {"url": url, **more}}


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        (image(PNG), {"type": "input_image", "image_url": PNG, "detail": "auto"}),
        (image("https://a.example/x.png"), {"image_url": "https://a.example/x.png"}),
        (image(PNG, detail="high"), {"detail": "high"}),
        (image(PNG, detail="original"), {"detail": "original"}),
        (image(PNG, detail="ultra"), {"detail": "auto"}),
        (image(PNG, detail=5), {"detail": "auto"}),
        (image(PNG, detail=["low"]), {"detail": "auto"}),
        ({"type": "image_url", "image_url": PNG}, {"image_url": PNG, "detail": "auto"}),
    ],
)
def test_pictures(block: Json, expected: Json) -> None:
    ((found,),) = [entry["content"] for entry in items(user([block]), spec=SEEING)]
    assert found.items() >= expected.items()
    assert set(found) == {"type", "image_url", "detail"}


# message, model -> what is counted, and the words for one and for two of it (none: only the log need know)
LEFT_OUT: Final[list[tuple[Json, ModelSpec, str, tuple[str, str] | None]]] = [
    *(
        (user([block]), SEEING, "unreadable picture", ("a picture that could not be read", "2 pictures that"))
        for block in (
            image("http://a.example/x.png"),
            image("/api/v1/files/1/content"),
            image(None),
            {"type": "image_url"},
            image("data:text/html;base64,PGI+"),
        )
    ),
    (
        user([image(PNG)]),
        TEXT_ONLY,
        "picture",
        ("a picture, because this model cannot see", "2 pictures, because"),
    ),
    (user([{"type": "hologram"}]), SEEING, "block", ("a part of a message", "2 parts of messages")),
    (user(["text"]), SEEING, "block", ("a part of a message", "2 parts of messages")),
    ({"role": "critic", "content": "x"}, PLAIN, "role", ("a message of an unknown kind", "2 messages of an")),
    (output("x"), PLAIN, "output without call", None),
    (assistant("", call("x")), PLAIN, "unanswered call", None),
]


@pytest.mark.parametrize(("message", "spec", "what", "words"), LEFT_OUT)
def test_what_is_left_out_is_told(
    message: Json, spec: ModelSpec, what: str, words: tuple[str, str] | None
) -> None:
    for count in (1, 2):
        result = translate(chat(HELLO, *[message] * count), spec)
        assert result.payload["input"] == [item("user", "hello")]
        assert result.left_out == {what: count}
        if words is None:
            assert result.notices == ()
            continue
        (notice,) = result.notices
        assert notice.startswith(f"Not sent to the model: {words[count - 1]}")


def test_a_chat_of_nothing_but_what_cannot_be_sent_says_so() -> None:
    with pytest.raises(InputError) as caught:
        translate(chat(user([image(PNG)])), TEXT_ONLY)
    assert "a picture, because this model cannot see" in caught.value.user_message


def test_the_rest_of_a_message_is_sent() -> None:
    blocks = [{"type": "text", "text": "a"}, {"type": "video"}, image(PNG), {"type": "text", "text": "b"}]
    result = translate(chat(user(blocks)), TEXT_ONLY)
    texts = [{"type": "input_text", "text": text} for text in "ab"]
    assert result.payload["input"] == [{"type": "message", "role": "user", "content": texts}]
    assert len(result.notices) == 2


# Calls and their outputs


def sent(call_id: str, name: str = "f", arguments: str = "{}") -> Json:
    return {"type": "function_call", "call_id": call_id, "name": name, "arguments": arguments}


def answered(call_id: str, text: str = "out") -> Json:
    return {"type": "function_call_output", "call_id": call_id, "output": text}


SAID: Final[Json] = {"type": "message", "role": "assistant", "content": "hm"}
PAIRS: Final[dict[str, tuple[list[Json], list[Json]]]] = {
    "one": ([assistant("", call("a")), output("a")], [sent("a"), answered("a")]),
    "text before": ([assistant("hm", call("a")), output("a")], [SAID, sent("a"), answered("a")]),
    "two at once": (
        [assistant("", call("a"), call("b", "g")), output("b", "2"), output("a", "1")],
        [sent("a"), sent("b", "g"), answered("a", "1"), answered("b", "2")],  # as they were called
    ),
    "two after another": (
        [assistant("", call("a")), output("a"), assistant("", call("b")), output("b")],
        [sent("a"), answered("a"), sent("b"), answered("b")],
    ),
    "id used again later": (
        [assistant("", call("a")), output("a", "1"), assistant("", call("a")), output("a", "2")],
        [sent("a"), answered("a", "1"), sent("a_2"), answered("a_2", "2")],
    ),
    "id used three times": (
        [
            *(assistant("", call("a")), output("a")),
            *(assistant("", call("a_2")), output("a_2")),
            *(assistant("", call("a")), output("a")),
        ],
        [sent("a"), answered("a"), sent("a_2"), answered("a_2"), sent("a_3"), answered("a_3")],
    ),
    "same id twice in one message": (
        [assistant("", call("a"), call("a", "g")), output("a"), output("a", "again")],
        [sent("a"), answered("a")],
    ),
    "a call without output": ([assistant("", call("a"), call("b")), output("b")], [sent("b"), answered("b")]),
    "an output without call": (
        [assistant("", call("a")), output("z"), output("a")],
        [sent("a"), answered("a")],
    ),
    "an output twice": (
        [assistant("", call("a")), output("a", "1"), output("a", "2")],
        [sent("a"), answered("a", "1")],
    ),
    "an output too late": (
        [assistant("", call("a")), user("stop"), output("a")],
        [item("user", "stop")],
    ),
    "an output before its call": ([output("a"), assistant("", call("a"))], []),
    "no output at all": ([assistant("hm", call("a"))], [SAID]),
    "empty ids": ([assistant("", call("")), output("")], []),
    "no ids": ([assistant("", call(None)), output(None)], []),
    "no name": ([assistant("", call("a", "")), output("a")], []),
    "calls that are none": (
        [{"role": "assistant", "tool_calls": "x"}, {"role": "assistant", "tool_calls": [5]}],
        [],
    ),
    "empty output": ([assistant("", call("a")), output("a", None)], [sent("a"), answered("a", "")]),
    "output in blocks": (
        [
            assistant("", call("a")),
            output("a", [{"type": "text", "text": "x"}, {"type": "text", "text": "y"}]),
        ],
        [sent("a"), answered("a", "x\ny")],
    ),
    "numbers as ids": ([assistant("", call(7)), output("7")], [sent("7"), answered("7")]),
}


@pytest.mark.parametrize("case", PAIRS)
def test_calls_and_outputs(case: str) -> None:
    messages, expected = PAIRS[case]
    assert items(HELLO, *messages)[1:] == expected


@pytest.mark.parametrize(
    ("arguments", "written"),
    [
        ('{"a":1}', '{"a":1}'),
        ("", "{}"),
        (None, "{}"),
        ("{broken", "{broken"),
        ({"a": "é"}, '{"a":"é"}'),
        ({}, "{}"),
    ],
)
def test_arguments(arguments: Any, written: str) -> None:
    found = items(HELLO, assistant("", call("a", "f", arguments)), output("a"))
    assert found[1] == sent("a", "f", written)


def check_pairs(entries: Sequence[Json]) -> None:
    """Every call has one id of its own and one output after it; no output has none."""
    open_calls: set[str] = set()
    used: set[str] = set()
    for entry in entries:
        if entry["type"] == "function_call":
            assert entry["call_id"] not in used
            used.add(entry["call_id"])
            open_calls.add(entry["call_id"])
        elif entry["type"] == "function_call_output":
            assert entry["call_id"] in open_calls
            open_calls.remove(entry["call_id"])
        else:
            assert not open_calls, "something stands between a call and its output"
    assert not open_calls


# Any chat

SCALARS: Final = st.none() | st.booleans() | st.integers(-3, 3) | st.floats() | st.text(max_size=5)
JSON: Final = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=5,
)
IDS: Final = st.sampled_from(["a", "b", "a_2", "", None]) | JSON
BLOCKS: Final = st.fixed_dictionaries(
    {"type": st.sampled_from(["text", "input_text", "image_url", "file", "video_url"]) | JSON},
    optional={
        "text": st.text(max_size=5) | JSON,
        "image_url": st.sampled_from([PNG, "https://a.example/x"])
        | st.fixed_dictionaries(
            {"url": st.sampled_from([PNG, "http://a", ""]) | JSON},
            optional={"detail": st.sampled_from(["low", "x"]) | JSON},
        )
        | JSON,
    },
)
CALLS: Final = st.fixed_dictionaries(
    {},
    optional={
        "id": IDS,
        "function": st.fixed_dictionaries(
            {}, optional={"name": st.sampled_from(["f", "g"]) | JSON, "arguments": st.just("{}") | JSON}
        )
        | JSON,
    },
)
CONTENT: Final = st.text(max_size=6) | st.lists(BLOCKS | JSON, max_size=3) | JSON
MESSAGES: Final = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "tool", "system", "developer"]) | JSON},
    optional={
        "content": CONTENT,
        "tool_calls": st.lists(CALLS | JSON, max_size=3) | JSON,
        "tool_call_id": IDS,
    },
)
# rounds of tools as they come, so that pairs are not left to luck
ROUNDS: Final = st.builds(
    lambda call_ids, output_ids: [
        assistant("", *(call(call_id) for call_id in call_ids)),
        *(output(output_id) for output_id in output_ids),
    ],
    st.lists(st.sampled_from("abc"), min_size=1, max_size=3),
    st.lists(st.sampled_from("abc"), max_size=4),
)
CHATS: Final = st.lists(MESSAGES.map(lambda message: [message]) | ROUNDS, max_size=5).map(
    lambda groups: [message for group in groups for message in group]
)


@settings(max_examples=150, deadline=None)
@given(messages=CHATS, spec=st.sampled_from([PLAIN, SEEING, THINKING]))
def test_any_chat_is_refused_or_valid(messages: list[Json], spec: ModelSpec) -> None:
    result = translate_or_refuse({"model": "m", "messages": messages}, spec)
    if isinstance(result, InputError):
        assert result.user_message
        return
    validator().validate(result.payload)
    check_pairs(result.payload["input"])
    assert all(isinstance(notice, str) for notice in result.notices)


@settings(max_examples=300, deadline=None)
@given(groups=st.lists(ROUNDS, max_size=4))
def test_pairs_of_any_tool_rounds(groups: list[list[Json]]) -> None:
    messages = [message for group in groups for message in group]
    found = translate(chat(HELLO, *messages)).payload["input"]
    check_pairs(found)
    expected = 0
    for group in groups:
        calls = {entry["id"] for entry in group[0]["tool_calls"]}
        expected += len(calls & {message["tool_call_id"] for message in group[1:]})
    assert sum(entry["type"] == "function_call" for entry in found) == expected


# Parameters

FORMAT: Final[Json] = {"name": "n", "schema": {"type": "object"}, "strict": True, "description": "d", "x": 1}
# parameter of chat, its value -> what is sent
PARAMETERS: Final[list[tuple[Json, Json]]] = [
    ({"temperature": 0.5}, {"temperature": 0.5}),
    ({"temperature": 0}, {"temperature": 0}),
    ({"temperature": "0.5"}, {"temperature": 0.5}),
    ({"top_p": 0.9}, {"top_p": 0.9}),
    ({"top_k": 40}, {"top_k": 40}),
    ({"top_k": "40"}, {"top_k": 40}),
    ({"frequency_penalty": -2}, {"frequency_penalty": -2}),
    ({"presence_penalty": 1.5}, {"presence_penalty": 1.5}),
    ({"max_tokens": 100}, {"max_output_tokens": 100}),
    ({"max_completion_tokens": 100}, {"max_output_tokens": 100}),
    ({"num_predict": 100}, {"max_output_tokens": 100}),
    ({"max_tokens": 50, "max_completion_tokens": 100}, {"max_output_tokens": 100}),
    ({"verbosity": "low"}, {"text": {"verbosity": "low"}}),
    ({"response_format": {"type": "json_object"}}, {"text": {"format": {"type": "json_object"}}}),
    ({"response_format": {"type": "text"}}, {"text": {"format": {"type": "text"}}}),
    (
        {"response_format": {"type": "json_schema", "json_schema": FORMAT}, "verbosity": "high"},
        {
            "text": {
                "format": {"type": "json_schema", **{k: v for k, v in FORMAT.items() if k != "x"}},
                "verbosity": "high",
            }
        },
    ),
    (dict.fromkeys(("temperature", "max_tokens", "response_format", "reasoning_effort")), {}),
    ({"reasoning_effort": "high"}, {}),
    ({"tool_choice": "auto", "parallel_tool_calls": True}, {}),
    ({"stop": ["x"], "seed": 1, "min_p": 0.1, "logit_bias": {}, "repetition_penalty": 1}, {}),
    ({"provider": {}, "plugins": [], "transforms": [], "preset": "p", "store": True}, {}),
    ({"previous_response_id": "r", "background": True, "debug": {}, "chat_id": "c"}, {}),
]


@pytest.mark.parametrize(("given_values", "expected"), PARAMETERS)
def test_parameters(given_values: Json, expected: Json) -> None:
    payload = translate(chat(HELLO, **given_values)).payload
    assert payload == translate(chat(HELLO)).payload | expected
    validator().validate(payload)


def test_whole_numbers_are_sent_as_such() -> None:
    payload = translate(chat(HELLO, max_tokens="100.0", top_k=40.0)).payload
    assert (type(payload["max_output_tokens"]), type(payload["top_k"])) == (int, int)


NUMBERS: Final = ["temperature", "top_p", "top_k", "frequency_penalty", "presence_penalty", "max_tokens"]


@pytest.mark.parametrize("name", [*NUMBERS, "max_completion_tokens", "num_predict"])
@pytest.mark.parametrize("value", ["much", "", True, [1], {}, float("nan"), float("inf"), "inf", 10**400])
def test_no_number(name: str, value: Any) -> None:
    with pytest.raises(InputError) as caught:
        translate(chat(HELLO, **{name: value}))
    assert name in caught.value.user_message
    assert len(caught.value.user_message) < 200


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("verbosity", 5),
        ("verbosity", ["low"]),
        ("response_format", "json"),
        ("response_format", [1]),
        ("reasoning_effort", 3),
        ("parallel_tool_calls", "yes"),
        ("parallel_tool_calls", 1),
    ],
)
def test_parameters_of_the_wrong_kind(name: str, value: Any) -> None:
    with pytest.raises(InputError) as caught:
        translate(chat(HELLO, tools=[TOOL], **{name: value}), THINKING)
    assert name in caught.value.user_message


def test_thinking_models_are_asked_for_their_reasoning() -> None:
    payload = translate(chat(HELLO), THINKING).payload
    assert payload["include"] == ["reasoning.encrypted_content"]
    assert payload["reasoning"] == {"summary": "auto"}
    payload = translate(chat(HELLO, reasoning_effort="low"), THINKING).payload
    assert payload["reasoning"] == {"summary": "auto", "effort": "low"}
    validator().validate(payload)
    assert {"include", "reasoning"}.isdisjoint(translate(chat(HELLO, reasoning_effort="low")).payload)


@settings(max_examples=300, deadline=None)
@given(
    parameters=st.dictionaries(
        st.sampled_from(
            ["tools", "tool_choice", "response_format", "verbosity", "reasoning_effort", "stream", *NUMBERS]
        ),
        JSON,
        max_size=4,
    ),
    spec=st.sampled_from([PLAIN, THINKING]),
)
def test_any_parameters_are_refused_in_words_or_taken(parameters: Json, spec: ModelSpec) -> None:
    result = translate_or_refuse(chat(HELLO, **parameters), spec)
    if isinstance(result, InputError):
        assert any(name in result.user_message for name in parameters)
        return
    payload = result.payload
    assert payload["stream"] is True
    assert payload["store"] is False
    assert None not in payload.values()
    numbers = [payload[name] for name in (*NUMBERS, "max_output_tokens") if name in payload]
    assert all(math.isfinite(number) for number in numbers)


# Tools

SCHEMA: Final[Json] = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL: Final[Json] = {
    "type": "function",
    "function": {"name": "get_weather", "description": "Weather.", "parameters": SCHEMA},
}
FLAT: Final[Json] = {
    "type": "function",
    "name": "get_weather",
    "description": "Weather.",
    "parameters": SCHEMA,
}


@pytest.mark.parametrize(
    ("tools", "expected"),
    [
        ([TOOL], [FLAT]),
        ([TOOL, {"type": "function", "function": {"name": "now"}}], [FLAT, {"name": "now"}]),
        ([{"type": "function", "function": {"name": "now", "parameters": None}}], [{"name": "now"}]),
        (
            [{"type": "retrieval"}, {"type": "function"}, {"type": "function", "function": {"name": ""}}, 5],
            None,
        ),
        ([], None),
        (None, None),
        ({"type": "function"}, None),
    ],
)
def test_tools(tools: Any, expected: list[Json] | None) -> None:
    payload = translate(chat(HELLO, tools=tools)).payload
    validator().validate(payload)
    empty = {"type": "object", "properties": {}}
    wanted = [{"type": "function", "parameters": empty} | tool for tool in expected or ()]
    assert payload.get("tools") == (wanted or None)


@pytest.mark.parametrize(
    ("choice", "sent_choice"),
    [
        ("auto", "auto"),
        ("none", "none"),
        ("required", "required"),
        (
            {"type": "function", "function": {"name": "get_weather"}},
            {"type": "function", "name": "get_weather"},
        ),
        ({"type": "function", "name": "get_weather"}, {"type": "function", "name": "get_weather"}),
    ],
)
def test_tool_choice(choice: Any, sent_choice: Any) -> None:
    payload = translate(chat(HELLO, tools=[TOOL], tool_choice=choice, parallel_tool_calls=False)).payload
    assert payload["tool_choice"] == sent_choice
    assert payload["parallel_tool_calls"] is False
    validator().validate(payload)


@pytest.mark.parametrize(("spec", "offer_tools"), [(PLAIN, False), (TEXT_ONLY, True), (TEXT_ONLY, False)])
def test_no_tools_no_choice(spec: ModelSpec, offer_tools: bool) -> None:
    body = chat(HELLO, tools=[TOOL], tool_choice="required", parallel_tool_calls=True)
    payload = translate(body, spec, offer_tools=offer_tools).payload
    assert {"tools", "tool_choice", "parallel_tool_calls"}.isdisjoint(payload)
    validator().validate(payload)
