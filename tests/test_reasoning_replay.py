"""A model gets its own earlier thinking back: as it came, where it stood, and only if it is its own.

`as_host_returns` does with the items of an answer what Open WebUI 0.12.4 does with them before the next
request (`convert_output_to_messages`): texts are joined by line breaks, calls and details gathered. The
spaces around texts are not compared: the host takes those of an answer's last text away.
"""

from __future__ import annotations

import base64
import contextlib
import copy
import json
import random
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from typing import Any, Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openrouter_responses_pipe.openrouter_responses_pipe import (
    _CARRIER,
    _MAX_CARRIER_CHARS,
    _MAX_RECORD_BYTES,
    ArtifactCipher,
    CarrierReady,
    CompletionsBody,
    Emission,
    InputError,
    Intake,
    ModelSpec,
    Pipe,
    ReasoningSpec,
    RequestSettings,
    ResponsesBody,
    StorageError,
    StreamState,
    TurnEnded,
    TurnRecord,
    _BrowserWriter,
    _json_dumps,
    _to_chat_body,
    close_chat_stream,
    plan_intake,
    reduce_chat_chunks,
)
from openrouter_responses_pipe.simulator import Simulator
from tests.recorded import ENDED_WELL, EXPECTED, Clock, events, reduced
from tests.support import (
    TRANSCRIPTS,
    Answer,
    arguments,
    call,
    inferences,
    read_until_text,
    running_pipe,
    set_valves,
    stream,
)
from tests.test_request_models import CHATS, JSON, validator

Json = dict[str, Any]
OWNER: Final = "user"
CIPHER: Final = ArtifactCipher("the secret of this server", "openrouter")
THINKING: Final = ModelSpec(
    "a/mind", "Mind", supported_parameters=frozenset({"tools"}), reasoning=ReasoningSpec()
)
PLAIN: Final = ModelSpec("a/plain", "Plain", supported_parameters=frozenset({"tools"}))
HELLO: Final[Json] = {"role": "user", "content": "hello"}
FORGED: Final = "made by hand"
FIELDS: Final = ("id", "status", "summary", "content", "encrypted_content", "signature", "format")
SECRETS: Final = ("encrypted_content", "signature", "content")


# What a provider writes


def thought(number: int, **more: Any) -> Json:
    """A reasoning item as OpenAI's models write it."""
    summary = [{"type": "summary_text", "text": f"Thought {number}."}]
    return {
        "type": "reasoning",
        "id": f"rs_{number}",
        "status": "completed",
        "summary": summary,
        "encrypted_content": f"gAAA{number}==",
        "format": "openai-responses-v1",
        **more,
    }


def signed(number: int) -> Json:
    """A reasoning item as Claude writes it."""
    content = [{"type": "reasoning_text", "text": f"Thought\n{number} é 漢."}]
    item: Json = {"type": "reasoning", "id": f"rs_{number}", "status": "completed", "summary": []}
    return item | {"content": content, "signature": f"Evc{number}==", "format": "anthropic-claude-v1"}


def message(text: str, kind: str = "output_text", **more: Any) -> Json:
    """A message of an answer."""
    part = {"type": kind, "refusal" if kind == "refusal" else "text": text}
    return {"type": "message", "id": f"msg_{text}", "role": "assistant", "content": [part], **more}


def function_call(call_id: str) -> Json:
    """A call, complete."""
    return {
        "type": "function_call",
        "id": f"fc_{call_id}",
        "call_id": call_id,
        "name": "f",
        "arguments": f'{{"of": "{call_id}"}}',
        "status": "completed",
    }


BEGUN: Final = ("type", "id", "role", "call_id", "name")  # what an item has when it is announced


def events_of(*output: Json) -> list[Json]:
    """The events of an answer that consists of these items."""
    found: list[Json] = []
    for index, item in enumerate(output):
        begun = {"status": "in_progress"} | {key: item[key] for key in BEGUN if key in item}
        begun |= {"summary": []} if item["type"] == "reasoning" else {}
        found.append({"type": "response.output_item.added", "output_index": index, "item": begun})
        found.append({"type": "response.output_item.done", "output_index": index, "item": item})
    return [*found, {"type": "response.completed", "response": {"output": list(output)}}]


def answer(*output: Json) -> list[Json]:
    """The items that the host has saved of such an answer."""
    return as_saved(reduced(copy.deepcopy(events_of(*output))))


# What the host keeps, and hands back


def carrier_of(record: TurnRecord, cipher: ArtifactCipher = CIPHER, owner: str = OWNER) -> Json:
    """A record as it rides with an answer."""
    return {"type": _CARRIER, "v": 1, "sealed": cipher.seal(_json_dumps(record.dump()), owner)}


def as_saved(emissions: Iterable[Emission]) -> list[Json]:
    """The items of one upstream call after it, as the host has them: the last word on each."""
    writer, record, items = _BrowserWriter(Clock(), True), TurnRecord(), {}

    def write(emission: Emission) -> None:
        for entry in writer.write(emission):
            if isinstance(entry, dict) and entry["type"] == "response.output_item.done":
                items[entry["output_index"]] = entry["item"]

    for emission in emissions:
        record.note(emission)
        if isinstance(emission, TurnEnded) and record.carrier_item is not None:
            write(CarrierReady(record.carrier_item, [carrier_of(record)]))
        write(emission)
    return stripped([items[index] for index in sorted(items)])


def stripped(saved: list[Json]) -> list[Json]:
    """What the host does at the end of a stream: the last text loses its spaces, or goes."""
    if not saved or saved[-1]["type"] != "message":
        return saved
    (part,) = saved[-1]["content"]
    text = part["text"].strip()
    return [*saved[:-1], {**saved[-1], "content": [{**part, "text": text}]}] if text else saved[:-1]


def with_outputs(saved: Sequence[Json]) -> list[Json]:
    """The items after the host has run the calls."""
    outputs = [
        {"type": "function_call_output", "call_id": item["call_id"], "output": [text_part(item["call_id"])]}
        for item in saved
        if item["type"] == "function_call"
    ]
    return [*saved, *outputs]


def text_part(text: str) -> Json:
    return {"type": "input_text", "text": f"output of {text}"}


def continued(prior: Sequence[Json], output: Sequence[Json]) -> list[Json]:
    """What the host makes of an answer and what came when somebody pressed Continue."""
    if not (prior and output and prior[-1]["type"] == output[0]["type"] == "message"):
        return [*prior, *output]
    content = [*prior[-1]["content"], *output[0]["content"]]
    return [*prior[:-1], {**prior[-1], **output[0], "content": content}, *output[1:]]


def as_host_returns(saved: Sequence[Json]) -> list[Json]:
    """Saved items as the chat messages of the next request."""
    messages: list[Json] = []
    texts: list[str] = []
    calls: list[Json] = []
    details: list[Json] = []
    outputs: list[Json] = []

    def flush() -> None:
        if texts or calls or details:
            found: Json = {"role": "assistant", "content": "\n".join(texts)}
            found |= {"tool_calls": [*calls]} if calls else {}
            messages.append(found | ({"reasoning_details": [*details]} if details else {}))
        for item in outputs:
            content = "".join(part["text"] for part in item["output"])
            messages.append({"role": "tool", "tool_call_id": item["call_id"], "content": content})
        for pending in (texts, calls, details, outputs):
            pending.clear()

    answered = {item["call_id"] for item in saved if item["type"] == "function_call_output"}
    for item in saved:
        if item["type"] != "function_call_output" and outputs:
            flush()
        if item["type"] == "message":
            text = "".join(part["text"] for part in item["content"] if part["type"] == "output_text")
            texts += [text] if text else []
        elif item["type"] == "function_call" and item["call_id"] in answered:
            function = {"name": item["name"], "arguments": item["arguments"]}
            calls.append({"id": item["call_id"], "type": "function", "function": function})
        elif item["type"] == "function_call_output":
            outputs.append(item)
        elif item["type"] == "reasoning":
            details += [
                detail
                for detail in item.get("reasoning_details", ())
                if detail.get("format") != "anthropic-claude-v1" or detail.get("signature")
            ]
    flush()
    return messages


# What the model is sent


def taken_in(messages: Sequence[Json], cipher: ArtifactCipher = CIPHER) -> Intake:
    """The records of a history, opened."""
    plan = plan_intake(messages, THINKING)
    return Intake({sealed: json.loads(cipher.open(sealed, OWNER)) for sealed in plan.sealed})


def with_known_words(payload: Json) -> Json:
    """The same for OpenRouter's own description, which lists the formats of its day."""
    reasoning = [entry | WORDS for entry in payload["input"] if entry["type"] == "reasoning"]
    return {
        **payload,
        "input": [reasoning.pop(0) if e["type"] == "reasoning" else e for e in payload["input"]],
    }


WORDS: Final[Json] = {"format": "unknown", "status": "completed"}


def translate(
    messages: Sequence[Json],
    intake: Intake | None = None,
    spec: ModelSpec = THINKING,
    replay: Any = "conversation",
) -> ResponsesBody:
    """The request that messages become. It is valid, made the same twice, and changes nothing."""
    body = CompletionsBody.parse({"model": "m", "messages": list(messages)})
    intake = taken_in(messages) if intake is None else intake
    before = repr((body, intake))
    result = ResponsesBody.from_completions(body, spec, RequestSettings(replay=replay), intake)
    made = repr(result.payload)
    validator().validate(with_known_words(result.payload))
    _json_dumps(_to_chat_body(result.payload, {}))
    again = ResponsesBody.from_completions(body, spec, RequestSettings(replay=replay), intake)
    assert (repr(again.payload), repr(result.payload), repr((body, intake))) == (made, made, before)
    return result


def sent(messages: Sequence[Json], intake: Intake | None = None, **more: Any) -> list[Json]:
    """The input of that request."""
    return translate(messages, intake, **more).payload["input"]


def said(text: str, **more: Any) -> Json:
    """A text of the model's in a request."""
    return {"type": "message", "role": "assistant", "content": text, **more}


def called(call_id: str) -> Json:
    """A call of the model's in a request."""
    item = function_call(call_id)
    return {key: item[key] for key in ("type", "call_id", "name", "arguments")}


def output_of(call_id: str) -> Json:
    """Its output in a request."""
    return {"type": "function_call_output", "call_id": call_id, "output": f"output of {call_id}"}


def bare(entries: Iterable[Json]) -> list[Json]:
    """The same without the spaces around the model's texts, and without those that are nothing else."""
    found = [
        {**entry, "content": entry["content"].strip()} if entry.get("role") == "assistant" else entry
        for entry in entries
    ]
    return [entry for entry in found if entry.get("content") != ""]


def reasoning_in(entries: Iterable[Json]) -> list[Json]:
    """The reasoning items of a request."""
    return [entry for entry in entries if entry["type"] == "reasoning"]


ASKED: Final = sent([HELLO])[0]


# Recorded streams


def provider_output(name: str) -> list[Json]:
    """The items of a recorded answer, as its last event has them."""
    (last,) = [
        event for event in events(name) if event["type"] in ("response.completed", "response.incomplete")
    ]
    return last["response"]["output"]


def as_sent(item: Json) -> Json:
    """An item of a provider's as it is to come back."""
    if item["type"] == "reasoning":
        kept = {field: item[field] for field in FIELDS if item.get(field) is not None}
        return {"type": "reasoning", **kept}
    if item["type"] == "message":
        return said("".join(part.get("text") or part.get("refusal") or "" for part in item["content"]))
    return {key: item[key] for key in ("type", "call_id", "name", "arguments")}


THOUGHTFUL: Final = [
    name
    for name in ENDED_WELL
    if any(item["type"] == "reasoning" and any(map(item.get, SECRETS)) for item in provider_output(name))
]


def test_there_are_recordings() -> None:
    assert len(THOUGHTFUL) >= 3


@pytest.mark.parametrize("name", THOUGHTFUL)
def test_recorded_reasoning_comes_back(name: str) -> None:
    saved = with_outputs(as_saved(reduced(events(name))))
    entries = sent([HELLO, *as_host_returns(saved), HELLO])
    expected = [as_sent(item) for item in provider_output(name) if item["type"] in KINDS]
    found = [entry for entry in entries[1:-1] if entry["type"] != "function_call_output"]
    assert bare(found) == bare(expected)
    for wanted, item in zip(EXPECTED[name].get("replay_items", ()), reasoning_in(entries), strict=False):
        assert wanted.items() <= item.items()


KINDS: Final = ("reasoning", "message", "function_call")


# the stream of a tool of OpenRouter's own that has to find its own words again
ADVISED: Final = "24_advisor_streaming_text_delta_on_tool_item"


def test_a_recorded_item_of_the_advisor_comes_back() -> None:
    """It has no place in the chat; the record finds it again, as it was and where it stood."""
    advice, answered = provider_output(ADVISED)
    saved = as_saved(reduced(events(ADVISED)))
    assert advice["advice"] not in json.dumps(saved)
    entries = sent([HELLO, *as_host_returns(saved), HELLO])
    assert entries[1:-1] == [advice, as_sent(answered)]


@pytest.mark.parametrize("name", [name for name in ENDED_WELL if name not in (*THOUGHTFUL, ADVISED)])
def test_other_recordings_leave_nothing_behind(name: str) -> None:
    saved = as_saved(reduced(events(name)))
    assert [item for item in saved if "reasoning_details" in item] == []


def chat_emissions(name: str) -> list[Emission]:
    """What a recorded stream of `/chat/completions` means."""
    state = StreamState()
    return [*reduce_chat_chunks(state, events(name)), *close_chat_stream(state)]


def test_reasoning_recorded_from_chat_comes_back() -> None:
    saved = as_saved(chat_emissions("c2_chat_reasoning_details"))
    messages = [HELLO, *as_host_returns(saved), HELLO]
    _, item, text, _ = sent(messages)
    assert item["type"] == "reasoning"
    assert item["content"] == [{"type": "reasoning_text", "text": "Adding two."}]
    assert (item["id"], item["format"]) == ("r1", "anthropic-claude-v1")
    assert item["signature"].startswith("EvcBCkgI")
    assert text == said("4")
    back = _to_chat_body(translate(messages).payload, {})["messages"][1]
    assert back["content"] == "4"
    (detail,) = back["reasoning_details"]
    assert detail == {
        "type": "reasoning.text",
        "text": "Adding two.",
        "id": "r1",
        "index": 0,
        "format": "anthropic-claude-v1",
        "signature": item["signature"],
    }


CHAT_NAMES: Final = [
    name
    for name, entry in TRANSCRIPTS.items()
    if entry.get("api") == "chat" and entry["expect"]["terminal"] == "completed"
]


@pytest.mark.parametrize("name", CHAT_NAMES)
def test_recordings_of_chat_keep_their_text_and_calls(name: str) -> None:
    entries = sent([HELLO, *as_host_returns(with_outputs(as_saved(chat_emissions(name)))), HELLO])[1:-1]
    expected = TRANSCRIPTS[name]["expect"]
    texts = [entry["content"] for entry in entries if entry["type"] == "message"]
    assert texts == [expected["text"]] * bool(expected["text"])
    calls = [entry["call_id"] for entry in entries if entry["type"] == "function_call"]
    assert calls == [entry["call_id"] for entry in expected.get("tool_calls", ())]
    assert bool(reasoning_in(entries)) == ("reasoning_text" in expected)
    assert not reasoning_in(entries[1:])


def chat_chunks(*deltas: Json) -> list[Json]:
    """The chunks of an answer of `/chat/completions`."""
    chunks = [{"choices": [{"index": 0, "delta": delta}]} for delta in deltas]
    return [*chunks, {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}], "usage": {}}]


SECRET_DETAIL: Final[Json] = {"type": "reasoning.encrypted", "data": "gAAA", "id": "rs_1", "index": 0}


def test_secret_reasoning_of_chat_without_a_visible_word_comes_back() -> None:
    state = StreamState()
    chunks = chat_chunks({"reasoning_details": [dict(SECRET_DETAIL)]}, {"content": "4"})
    saved = as_saved([*reduce_chat_chunks(state, chunks), *close_chat_stream(state)])
    _, item, text, _ = sent([HELLO, *as_host_returns(saved), HELLO])
    assert item == {"type": "reasoning", "summary": [], "id": "rs_1", "encrypted_content": "gAAA"}
    assert text == said("4")


# streams of a provider that says less than others: events -> what is sent back
SPARSE: Final[dict[str, Callable[[Json, Json], list[Json]]]] = {
    "only the end": lambda item, text: events_of(item, text)[-1:],
    "items are not announced": lambda item, text: [
        event for event in events_of(item, text) if event["type"] != "response.output_item.added"
    ],
    "the end has no output": lambda item, text: [
        *events_of(item, text)[:-1],
        {"type": "response.completed", "response": {}},
    ],
    "text in deltas, and nothing more of it": lambda item, text: [
        *events_of(item)[:-1],
        {"type": "response.output_item.added", "output_index": 1, "item": {"type": "message", "id": "m"}},
        {"type": "response.output_text.delta", "output_index": 1, "delta": text["content"][0]["text"]},
        {"type": "response.completed", "response": {}},
    ],
}


@pytest.mark.parametrize("case", SPARSE)
@pytest.mark.parametrize("item", [thought(1), thought(1, summary=[]), signed(1)])
def test_sparse_streams(case: str, item: Json) -> None:
    saved = as_saved(reduced(copy.deepcopy(SPARSE[case](item, message("a")))))
    assert sent([HELLO, *as_host_returns(saved), HELLO])[1:-1] == [item, said("a")]


# Order

# an answer as the provider wrote it -> the same in the next request, without the outputs of calls
ORDERS: Final[dict[str, tuple[list[Json], list[Json]]]] = {
    "thought, text": ([thought(1), message("a")], [thought(1), said("a")]),
    "signed": ([signed(1), message("a")], [signed(1), said("a")]),
    "several messages": (
        [thought(1), message("a"), message("b"), message("c")],
        [thought(1), said("a"), said("b"), said("c")],
    ),
    "message before": ([message("a"), thought(1), message("b")], [said("a"), thought(1), said("b")]),
    "message before, nothing after": ([message("a"), thought(1)], [said("a"), thought(1)]),
    "thoughts in a row": ([thought(1), signed(2), message("a")], [thought(1), signed(2), said("a")]),
    "thoughts between": (
        [thought(1), message("a"), thought(2), message("b")],
        [thought(1), said("a"), thought(2), said("b")],
    ),
    "nothing but a thought": ([thought(1)], [thought(1)]),
    "call": ([thought(1), function_call("a")], [thought(1), called("a")]),
    "text, call": (
        [thought(1), message("a"), function_call("a")],
        [thought(1), said("a"), called("a")],
    ),
    "thought between calls": (
        [signed(1), function_call("a"), signed(2), function_call("b")],
        [signed(1), called("a"), signed(2), called("b")],
    ),
    "text between calls": (
        [thought(1), function_call("a"), message("x"), function_call("b")],
        [thought(1), called("a"), said("x"), called("b")],
    ),
    "text after a call": (
        [thought(1), function_call("a"), message("x")],
        [thought(1), called("a"), said("x")],
    ),
    "phases": (
        [thought(1), message("a", phase="commentary"), thought(2), message("b", phase="final_answer")],
        [thought(1), said("a", phase="commentary"), thought(2), said("b", phase="final_answer")],
    ),
    "phase of null": ([thought(1), message("a", phase=None)], [thought(1), said("a")]),
    "refusal": ([thought(1), message("I will not.", "refusal")], [thought(1), said("I will not.")]),
    "empty message": ([thought(1), message(""), message("a")], [thought(1), said("a")]),
    "empty message between": (
        [thought(1), message("a"), message(""), thought(2), message("b")],
        [thought(1), said("a"), thought(2), said("b")],
    ),
    "line breaks at the joints": (
        [thought(1), message("a\n"), thought(2), message("\nb"), message("\n\nc\n")],
        [thought(1), said("a\n"), thought(2), said("\nb"), said("\n\nc\n")],
    ),
    "nothing but line breaks between thoughts": (
        [signed(1), message("a"), signed(2), message("\n\n"), signed(3), message("b")],
        [signed(1), said("a"), signed(2), signed(3), said("b")],
    ),
    "spaces around": ([thought(1), message("\n\nFour.\n")], [thought(1), said("Four.")]),
    "spaces before": ([signed(1), message(" Four.")], [signed(1), said("Four.")]),
    "spaces after a thought between": (
        [thought(1), message("\n\na\n\n"), thought(2), message("\n\nb\n\n")],
        [thought(1), said("a"), thought(2), said("b")],
    ),
    "nothing but a line break at the end": (
        [thought(1), message("a"), message("\n")],
        [thought(1), said("a")],
    ),
    "spaces and a call": (
        [thought(1), message("\n\na\n"), function_call("x")],
        [thought(1), said("a"), called("x")],
    ),
    "the same text twice": (
        [thought(1), message("a"), thought(2), message("a")],
        [thought(1), said("a"), thought(2), said("a")],
    ),
    "beyond ASCII": (
        [thought(1), message("é 漢 👩‍👩‍👧"), thought(2), message("\u2028x\r\n")],
        [thought(1), said("é 漢 👩‍👩‍👧"), thought(2), said("\u2028x\r\n")],
    ),
    "half of a pair": ([thought(1), message("a\ud83d")], [thought(1), said("a\ufffd")]),
    "nulls": (
        [thought(1, signature=None, content=None), message("a")],
        [thought(1), said("a")],
    ),
    "words of the future": (
        [thought(1, status="paused", format="new-v9"), message("a")],
        [thought(1, status="paused", format="new-v9"), said("a")],
    ),
    "fields of the future": ([thought(1, mood="good"), message("a")], [thought(1), said("a")]),
    "open text without a seal": (
        [thought(1, encrypted_content=None, content=signed(1)["content"]), message("a")],
        [
            {
                **{key: value for key, value in thought(1).items() if key != "encrypted_content"},
                "content": signed(1)["content"],
            },
            said("a"),
        ],
    ),
    "nothing that a provider would read": (
        [thought(1, encrypted_content=None), message("a")],
        [said("a")],
    ),
}


@pytest.mark.parametrize("case", ORDERS)
def test_order(case: str) -> None:
    output, expected = ORDERS[case]
    saved = with_outputs(answer(*output))
    calls = [output_of(item["call_id"]) for item in output if item["type"] == "function_call"]
    found = sent([HELLO, *as_host_returns(saved), HELLO])
    assert bare(found) == bare([ASKED, *expected, *calls, ASKED])


@pytest.mark.parametrize("case", ORDERS)
def test_an_answer_that_ends_the_history(case: str) -> None:
    output, expected = ORDERS[case]
    entries = sent([HELLO, *as_host_returns(with_outputs(answer(*output)))])
    found = [entry for entry in entries[1:] if entry["type"] != "function_call_output"]
    assert bare(found) == bare(expected)


ITEMS: Final = st.lists(
    st.integers(1, 3).map(thought)
    | st.integers(4, 6).map(signed)
    | st.sampled_from(["a", "b\n", "\nb", "", "a\nb", "\n"]).map(message)
    | st.sampled_from("xyz").map(function_call),
    max_size=6,
    unique_by=lambda item: item.get("call_id") or id(item),
)


@settings(max_examples=200, deadline=None)
@given(outputs=st.lists(ITEMS, min_size=1, max_size=3))
def test_any_answers_come_back_in_their_order(outputs: list[list[Json]]) -> None:
    messages: list[Json] = []
    expected: list[Json] = []
    for number, output in enumerate(outputs):
        output = [
            {**item, "call_id": f"{item['call_id']}{number}"} if "call_id" in item else item
            for item in output
        ]
        messages += [HELLO, *as_host_returns(with_outputs(answer(*output)))]
        expected += [ASKED, *map(as_sent, output)]
        expected += [output_of(item["call_id"]) for item in output if "call_id" in item]
    found = sent([*messages, HELLO])[:-1]
    if any("reasoning" not in {item["type"] for item in output} for output in outputs):
        # without reasoning there is no record, and the order is the host's
        assert reasoning_in(found) == reasoning_in(expected)
        return
    assert bare(found) == bare(expected)


# Rounds of tools, and several turns


def test_each_round_of_tools_has_its_own_reasoning() -> None:
    saved = [
        *with_outputs(answer(thought(1), message("Let me see."), function_call("a"))),
        *with_outputs(answer(signed(2), function_call("b"))),
        *answer(thought(3), message("Done.")),
    ]
    rounds: list[Json] = [thought(1), said("Let me see."), called("a"), output_of("a")]
    rounds += [signed(2), called("b"), output_of("b")]
    assert sent([HELLO, *as_host_returns(saved), HELLO])[1:-1] == [*rounds, thought(3), said("Done.")]
    assert sent([HELLO, *as_host_returns(saved[:-2])])[1:] == rounds


def test_a_round_without_reasoning_is_as_it_is() -> None:
    saved = [*with_outputs(answer(thought(1), function_call("a"))), *answer(message("Done."))]
    expected = [thought(1), called("a"), output_of("a"), said("Done.")]
    assert sent([HELLO, *as_host_returns(saved), HELLO])[1:-1] == expected


def test_ids_that_come_again_are_renamed_with_their_reasoning_in_place() -> None:
    saved = [
        *with_outputs(answer(thought(1), function_call("a"))),
        *with_outputs(answer(thought(2), function_call("a"))),
    ]
    entries = sent([HELLO, *as_host_returns(saved)])[1:]
    assert [entry.get("call_id") for entry in entries] == [None, "a", "a", None, "a_2", "a_2"]
    assert reasoning_in(entries) == [thought(1), thought(2)]


def three_turns() -> list[Json]:
    turns: list[Json] = []
    for number in (1, 2):
        saved = [
            *with_outputs(answer(thought(number * 10), function_call(f"c{number}"))),
            *answer(thought(number * 10 + 1), message(f"Answer {number}.")),
        ]
        turns += [HELLO, *as_host_returns(saved)]
    return [*turns, HELLO, *as_host_returns(with_outputs(answer(thought(30), function_call("c3"))))]


@pytest.mark.parametrize(
    ("replay", "spec", "kept"),
    [
        ("conversation", THINKING, [10, 11, 20, 21, 30]),
        ("next_reply", THINKING, [20, 21, 30]),
        ("off", THINKING, []),
        *((replay, PLAIN, []) for replay in ("conversation", "next_reply", "off")),
    ],
)
def test_how_long_reasoning_is_given_back(replay: str, spec: ModelSpec, kept: list[int]) -> None:
    entries = sent(three_turns(), replay=replay, spec=spec)
    assert reasoning_in(entries) == [thought(number) for number in kept]
    rest = [entry for entry in entries if entry["type"] != "reasoning"]
    assert rest == [entry for entry in sent(three_turns()) if entry["type"] != "reasoning"]


@pytest.mark.parametrize("replay", ["conversation", "next_reply"])
def test_the_first_reply_and_continue_have_what_there_is(replay: str) -> None:
    messages = [HELLO, *as_host_returns(answer(thought(1), message("a")))]
    assert sent(messages, replay=replay)[1:] == [thought(1), said("a")]


def test_pictures_that_the_host_moves_out_of_an_output_end_no_turn() -> None:
    """The host puts pictures of a tool into a message of the user's."""
    first = as_host_returns(with_outputs(answer(thought(1), function_call("a"))))
    second = as_host_returns(with_outputs(answer(thought(2), function_call("b"))))
    moved = {
        "role": "user",
        "content": [{"type": "text", "text": "Here are the images from the tool results"}],
    }
    messages = [HELLO, *first, moved, *second, moved]
    assert reasoning_in(sent(messages, replay="conversation")) == [thought(1), thought(2)]
    assert reasoning_in(sent(messages, replay="next_reply"))[-1:] == [thought(2)]


# Continue


def stopped(text: str, number: int = 9) -> list[Json]:
    """What the host has of an answer that was stopped: no record of the call."""
    items = answer(thought(number), message(text))
    return [{key: value for key, value in item.items() if key != "reasoning_details"} for item in items]


# what was saved, what Continue brought -> what is sent then
CONTINUED: Final[dict[str, tuple[list[Json], list[Json], list[Json]]]] = {
    "with a line break": (
        answer(thought(1), message("a")),
        answer(thought(2), message("b")),
        [thought(1), said("a"), thought(2), said("b")],
    ),
    "merged into one message": (
        answer(thought(1), message("a")),
        answer(message("b"), thought(2), message("c")),
        [thought(1), said("a"), said("b"), thought(2), said("c")],
    ),
    "twice": (
        continued(answer(thought(1), message("a")), answer(thought(2), message("b"))),
        answer(thought(3), message("c")),
        [thought(1), said("a"), thought(2), said("b"), thought(3), said("c")],
    ),
    "after Stop": (
        stopped("Half an ans"),
        answer(thought(2), message("wer")),
        [said("Half an ans"), thought(2), said("wer")],
    ),
    "after Stop, merged": (
        stopped("Half an ans"),
        answer(message("wer"), thought(2), message("!")),
        [said("Half an ans"), said("wer"), thought(2), said("!")],
    ),
    "after Stop in thought": (
        stopped("")[:1],
        answer(thought(2), message("a")),
        [thought(2), said("a")],
    ),
    "by a call that did not think": (
        answer(thought(1), message("a")),
        answer(message("b")),
        [thought(1), said("a"), said("b")],
    ),
    "and stopped": (
        answer(thought(1), message("a")),
        stopped("b"),
        [thought(1), said("a"), said("b")],
    ),
    "with a call": (
        answer(thought(1), message("a")),
        with_outputs(answer(thought(2), message("b"), function_call("x"))),
        [thought(1), said("a"), thought(2), said("b"), called("x"), output_of("x")],
    ),
    "after a round of tools": (
        [*with_outputs(answer(thought(1), function_call("x"))), *answer(thought(2), message("a"))],
        answer(thought(3), message("b")),
        [thought(1), called("x"), output_of("x"), thought(2), said("a"), thought(3), said("b")],
    ),
}


@pytest.mark.parametrize("case", CONTINUED)
def test_continue(case: str) -> None:
    prior, output, expected = CONTINUED[case]
    entries = sent([HELLO, *as_host_returns(continued(prior, output)), HELLO])[1:-1]
    # line breaks at a joint that nobody recorded may stay with either text
    found = [
        {**entry, "content": entry["content"].strip("\n")} if entry["type"] == "message" else entry
        for entry in entries
    ]
    assert joined(found) == joined(expected)


def joined(entries: Iterable[Json]) -> list[Json]:
    """The same with texts that follow each other made one, and without the line breaks between them."""
    found: list[Json] = []
    for entry in entries:
        if entry["type"] == "message" and found and found[-1]["type"] == "message":
            found[-1] = {**found[-1], "content": found[-1]["content"] + entry["content"]}
        else:
            found.append(entry)
    return [
        {**entry, "content": entry["content"].replace("\n", "")} if entry["type"] == "message" else entry
        for entry in found
    ]


# Answers that somebody has changed


def edited(changes: Json, messages: Sequence[Json]) -> list[Json]:
    """Messages with the first one of the assistant changed."""
    return [{**messages[0], **changes}, *messages[1:]]


BOTH: Final = as_host_returns(
    with_outputs(answer(thought(1), message("a"), function_call("x"), function_call("y")))
)
TOLD: Final = as_host_returns(answer(thought(1), message("Four."), thought(2), message("Sure.")))
# what has become of an answer -> what of it is sent
EDITED: Final[dict[str, tuple[list[Json], list[Json]]]] = {
    "another text": (edited({"content": "Five."}, TOLD), [said("Five.")]),
    "a word of it": (edited({"content": "Four!\nSure."}, TOLD), [said("Four!\nSure.")]),
    "of the same length": (edited({"content": "Fuor.\nSure."}, TOLD), [said("Fuor.\nSure.")]),
    "in another order": (edited({"content": "Sure.\nFour."}, TOLD), [said("Sure.\nFour.")]),
    "part of it": (edited({"content": "Sure."}, TOLD), [said("Sure.")]),
    "no text": (edited({"content": ""}, TOLD), []),
    "null": (edited({"content": None}, TOLD), []),
    "call removed": (
        [{**BOTH[0], "tool_calls": BOTH[0]["tool_calls"][:1]}, BOTH[1]],
        [said("a"), called("x"), output_of("x")],
    ),
    "output removed": (BOTH[:2], [said("a"), called("x"), output_of("x")]),
    "calls removed": (
        [{"role": "assistant", **{k: BOTH[0][k] for k in ("content", "reasoning_details")}}],
        [said("a")],
    ),
    "text of a call changed": (
        edited({"content": "b"}, BOTH),
        [said("b"), called("x"), called("y"), output_of("x"), output_of("y")],
    ),
    "another call in its place": (
        as_host_returns(
            with_outputs(
                [*answer(thought(1), message("a"), function_call("x"))[:2], *answer(function_call("z"))]
            )
        ),
        [said("a"), called("z"), output_of("z")],
    ),
}


@pytest.mark.parametrize("case", EDITED)
def test_an_edited_answer_is_sent_without_its_reasoning(case: str) -> None:
    messages, expected = EDITED[case]
    assert sent([HELLO, *messages, HELLO])[1:-1] == expected


def test_only_the_edited_answer_loses_its_reasoning() -> None:
    messages = [HELLO, *edited({"content": "Five."}, TOLD), HELLO, *TOLD, HELLO]
    assert reasoning_in(sent(messages)) == [thought(1), thought(2)]


def test_marks_of_others_do_not_stand_between_an_answer_and_its_reasoning() -> None:
    shown = "<think>\nhm\n</think>\nFour."
    saved = answer(thought(1), message(shown))
    assert sent([HELLO, *as_host_returns(saved), HELLO])[1:-1] == [thought(1), said("Four.")]


# OpenRouter's own kinds, from chats that were held over another connection

TEXT: Final[Json] = {"type": "reasoning.text", "format": "anthropic-claude-v1", "index": 0}


def native(*details: Json, **more: Any) -> list[Json]:
    """A history with an answer that brings such details."""
    return [
        HELLO,
        {"role": "assistant", "content": "Four.", "reasoning_details": list(details), **more},
        HELLO,
    ]


def open_text(text: str, **more: Any) -> Json:
    """A reasoning item of a text."""
    return {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": text}], **more}


CLAUDE: Final[Json] = {"format": "anthropic-claude-v1"}
# details -> the reasoning items they become, without ids where there are none
NATIVE: Final[dict[str, tuple[list[Json], list[Json]]]] = {
    "text and signature": (
        [{**TEXT, "text": "Hm.", "signature": "Evc", "id": "r1"}],
        [open_text("Hm.", signature="Evc", id="r1", **CLAUDE)],
    ),
    "text alone": ([{"type": "reasoning.text", "text": "Hm."}], [open_text("Hm.")]),
    "summary and secret of one id": (
        [
            {"type": "reasoning.summary", "summary": "One.", "id": "rs", "index": 0},
            {"type": "reasoning.summary", "summary": "Two.", "id": "rs", "index": 1},
            {"type": "reasoning.encrypted", "data": "gAA", "id": "rs", "index": 2},
        ],
        [
            {
                "type": "reasoning",
                "id": "rs",
                "encrypted_content": "gAA",
                "summary": [{"type": "summary_text", "text": text} for text in ("One.", "Two.")],
            }
        ],
    ),
    "secret alone": (
        [{"type": "reasoning.encrypted", "data": "gAA", "id": "rs", "format": "openai-responses-v1"}],
        [
            {
                "type": "reasoning",
                "id": "rs",
                "summary": [],
                "encrypted_content": "gAA",
                "format": "openai-responses-v1",
            }
        ],
    ),
    "summary alone": ([{"type": "reasoning.summary", "summary": "One.", "id": "rs"}], []),
    "fragments of one index": (
        [{**TEXT, "text": "Adding "}, {**TEXT, "text": "two."}, {**TEXT, "text": None, "signature": "Evc"}],
        [open_text("Adding two.", signature="Evc", **CLAUDE)],
    ),
    "fragments, the id in the first": (
        [
            {**TEXT, "text": "Adding ", "id": "r1"},
            {**TEXT, "text": "two.", "id": None},
            {**TEXT, "signature": "Evc"},
        ],
        [open_text("Adding two.", signature="Evc", id="r1", **CLAUDE)],
    ),
    "two of different index": (
        [
            {**TEXT, "text": "One.", "signature": "E1"},
            {**TEXT, "text": "Two.", "signature": "E2", "index": 1},
        ],
        [open_text("One.", signature="E1", **CLAUDE), open_text("Two.", signature="E2", **CLAUDE)],
    ),
    "kinds that are not reasoning": (
        [{"type": "reasoning.server_tool_call", "tool_name": "x", "arguments": "{}", "result": FORGED}],
        [],
    ),
    "nothing": ([], []),
}


@pytest.mark.parametrize("case", NATIVE)
def test_details_of_a_native_connection(case: str) -> None:
    details, expected = NATIVE[case]
    entries = sent(native(*details))[1:-1]
    assert entries[-1] == said("Four.")
    found = entries[:-1]
    assert all(item["id"] for item in found)
    assert len({item["id"] for item in found}) == len(found)
    assert [
        item | ({} if "id" in wanted else {"id": None}) for item, wanted in zip(found, expected, strict=True)
    ] == [{"id": None} | wanted for wanted in expected]


def test_native_reasoning_stands_before_text_and_calls() -> None:
    function = {"name": "f", "arguments": "{}"}
    calls = [{"id": "x", "type": "function", "function": function}]
    first, answered, last = native({**TEXT, "text": "Hm.", "signature": "E"}, tool_calls=calls)
    output = {"role": "tool", "tool_call_id": "x", "content": "out"}
    kinds = [entry["type"] for entry in sent([first, answered, output, last])]
    assert kinds == ["message", "reasoning", "message", "function_call", "function_call_output", "message"]


@pytest.mark.parametrize(("replay", "spec"), [("off", THINKING), ("conversation", PLAIN)])
def test_native_reasoning_obeys_the_same_rules(replay: str, spec: ModelSpec) -> None:
    messages = native({**TEXT, "text": "Hm.", "signature": "E"})
    assert reasoning_in(sent(messages, replay=replay, spec=spec)) == []


# Through /chat/completions


def chat_messages(*output: Json) -> list[Json]:
    """The messages of the next request over the other endpoint."""
    messages = [HELLO, *as_host_returns(with_outputs(answer(*output))), HELLO]
    return _to_chat_body(translate(messages).payload, {})["messages"]


@pytest.mark.parametrize("case", ORDERS)
def test_chat_history_is_well_formed(case: str) -> None:
    """Each call has its output right after its message; nothing is said twice or lost."""
    output, expected = ORDERS[case]
    messages = chat_messages(*output)
    open_calls: list[str] = []
    for entry in messages:
        if entry["role"] == "tool":
            open_calls.remove(entry["tool_call_id"])
            continue
        assert not open_calls, "something stands between a call and its output"
        open_calls = [each["id"] for each in entry.get("tool_calls", ())]
    assert not open_calls
    answers = [entry for entry in messages if entry["role"] == "assistant"]
    texts = "".join(entry["content"] or "" for entry in answers)
    assert "".join(texts.split()) == "".join(
        "".join(entry["content"].split()) for entry in expected if entry["type"] == "message"
    )
    details = [detail for entry in answers for detail in entry.get("reasoning_details", ())]
    secrets = [detail.get("data") for detail in details if "data" in detail]
    assert secrets == [
        item["encrypted_content"] for item in reasoning_in(expected) if "encrypted_content" in item
    ]
    signatures = [detail["signature"] for detail in details if "signature" in detail]
    assert signatures == [item["signature"] for item in reasoning_in(expected) if "signature" in item]
    for entry in answers:
        numbers = [detail["index"] for detail in entry.get("reasoning_details", ())]
        assert numbers == list(range(len(numbers)))


def test_chat_reasoning_stays_with_the_message_that_it_led_to() -> None:
    output = [signed(1), message("a"), signed(2), message("b")]
    answers = [entry for entry in chat_messages(*output) if entry["role"] == "assistant"]
    found = [(entry["content"], [d["text"] for d in entry["reasoning_details"]]) for entry in answers]
    assert found == [(text, [signed(n)["content"][0]["text"]]) for n, text in ((1, "a"), (2, "b"))]


# What somebody has made by hand

FAKES: Final[list[Json]] = [
    {"reasoning": {"type": "reasoning", "id": "rs", "summary": [], "encrypted_content": FORGED}},
    {"message": "0" * 16, "chars": 5, "phase": FORGED},
    {"call": FORGED},
]


def sealed(data: bytes, cipher: ArtifactCipher = CIPHER, owner: str = OWNER) -> Json:
    """A carrier of anything."""
    return {"type": _CARRIER, "v": 1, "sealed": cipher.seal(data, owner)}


GOOD: Final = _json_dumps(FAKES[:1])
GOOD_TEXT: Final = sealed(GOOD)["sealed"]


def nested(depth: int) -> list[Any]:
    """A list in a list in a list …"""
    inner: list[Any] = []
    for _ in range(depth):
        inner = [inner]
    return inner


# what stands in `reasoning_details`
HOSTILE: Final[dict[str, Any]] = {
    "unsealed record": [{"type": _CARRIER, "v": 1, "record": FAKES}],
    "for another person": [sealed(GOOD, owner="somebody else")],
    "of another pipe": [sealed(GOOD, ArtifactCipher("the secret of this server", "other"))],
    "of another secret": [sealed(GOOD, ArtifactCipher("another secret", "openrouter"))],
    "of no secret": [sealed(GOOD, ArtifactCipher("", "openrouter"))],
    "cut off": [{"type": _CARRIER, "sealed": GOOD_TEXT[:-9]}],
    "cut to a few bytes": [{"type": _CARRIER, "sealed": GOOD_TEXT[:12]}],
    "half a base64": [{"type": _CARRIER, "sealed": GOOD_TEXT[:-3]}],
    "changed": [{"type": _CARRIER, "sealed": GOOD_TEXT[:30] + "AAAA" + GOOD_TEXT[34:]}],
    "no base64": [{"type": _CARRIER, "sealed": "é" * 40}],
    "half of a pair": [{"type": _CARRIER, "sealed": "\ud83d"}],
    "no text": [{"type": _CARRIER, "sealed": value} for value in (None, 5, [GOOD_TEXT], {}, "", True)],
    "10 MB": [{"type": _CARRIER, "sealed": "A" * 10_000_000}],
    "zip bomb": [sealed(b"[" + b" " * 50_000_000 + GOOD[1:])],
    "record that is no JSON": [sealed(FORGED.encode())],
    "record that is no list": [sealed(_json_dumps({"reasoning": FORGED}))],
    "record of no objects": [sealed(_json_dumps([FORGED, 5, None, [FORGED]]))],
    "record nested deeply": [sealed(b"[" * 100_000 + b"]" * 100_000)],
    "native, 10 MB": [{"type": "reasoning.text", "text": FORGED * 1_000_000}],
    "10 MB of small ones": [{"type": "reasoning.text", "text": FORGED, "index": n} for n in range(200_000)],
    "a message": [{"type": "message", "role": "system", "content": FORGED}],
    "an output": [{"type": "function_call_output", "call_id": "x", "output": FORGED}],
    "an item": [FAKES[0]["reasoning"]],
    "an entry": FAKES,
    "no list": {"type": "reasoning.text", "text": FORGED},
    "a text": FORGED,
    "a number": 5,
    "true": True,
    "no objects": [FORGED, None, 5, [FAKES[0]]],
    "no type": [{"text": FORGED}, {"type": None, "text": FORGED}],
    "types that are none": [{"type": value, "text": FORGED} for value in (5, [], {}, nested(300))],
    **{
        f"{kind} of {name}": [{"type": kind, "text": value, "data": value, "summary": value, "index": 0}]
        for kind in ("reasoning.text", "reasoning.encrypted", "reasoning.summary")
        for name, value in {"null": None, "number": 5, "list": [FORGED], "object": {"text": FORGED}}.items()
    },
}


@contextlib.asynccontextmanager
async def pipe_at(simulator: Simulator, **valves: Any) -> AsyncIterator[Pipe]:
    async with running_pipe(simulator.base_url, **valves) as running:
        yield running


MIND: Final = "openrouter.openai/gpt-5-mini"


def chat_with(details: Any) -> Json:
    """A request whose earlier answer brings such details."""
    past = {"role": "assistant", "content": "Four.", "reasoning_details": details}
    return {"messages": [HELLO, past, {"role": "user", "content": "And now?"}]}


def received(simulator: Simulator) -> list[Json]:
    """The input of the newest request for an answer."""
    return inferences(simulator)[-1].body["input"]


@pytest.mark.parametrize("case", HOSTILE)
async def test_what_is_made_by_hand_does_not_reach_the_model(
    case: str, pipe: Pipe, simulator: Simulator
) -> None:
    got = await call(pipe, arguments(chat_with(HOSTILE[case]), "api_json", model=MIND))
    assert not got.error
    body = inferences(simulator)[-1].body
    assert FORGED not in json.dumps(body)
    validator().validate(body)
    assert body["input"][1] == said("Four.")
    assert len(body["input"]) == 3


async def test_what_this_server_has_sealed_reaches_the_model(pipe: Pipe, simulator: Simulator) -> None:
    """The counterpart: the same record, sealed by the right secret for the right person."""
    details = [sealed(_json_dumps([{"reasoning": thought(1)}]))]
    got = await call(pipe, arguments(chat_with(details), "api_json", model=MIND))
    assert not got.error
    assert received(simulator)[1:3] == [thought(1), said("Four.")]


# entries of a record that no version of ours has written, or a provider's oddities in one that it has
ODD_ENTRIES: Final[dict[str, Any]] = {
    "no entries": [5, None, "x", []],
    "unknown kinds": [{"picture": "x"}, {}, {"reasoning": thought(1)}],
    **{
        f"chars {value!r:.20}": [{"message": "x", "chars": value}]
        for value in ("x", [1], {}, -5, 10**30, 1.5)
    },
    "no chars": [{"message": "x"}],
    "digest that is none": [{"message": [5], "chars": 5}],
    "phase that is none": [{"message": "x", "chars": 5, "phase": ["x"]}],
    "reasoning that is none": [{"reasoning": 5}, {"reasoning": [thought(1)]}, {"all": 5}, {"all": [5]}],
    **{f"{field} of wrong kind": [{"reasoning": thought(1) | {field: 5}}] for field in FIELDS},
    "summary of texts": [{"reasoning": thought(1, summary=["x"])}],
    "summary of numbers": [{"reasoning": thought(1, summary=[5])}],
    "summary of messages": [{"reasoning": thought(1, summary=[{"type": "input_text", "text": "x"}])}],
    "summary without text": [{"reasoning": thought(1, summary=[{"type": "summary_text"}])}],
    "content of texts": [{"reasoning": thought(1, content=["x"])}],
    "content of nulls": [{"reasoning": thought(1, content=[None])}],
    "content of numbers": [{"reasoning": thought(1, content=[{"type": "reasoning_text", "text": 5}])}],
    "nested deeply": [{"reasoning": thought(1, summary=nested(200))}],
    "nested more deeply": [{"reasoning": thought(1, content=nested(600))}],
    "type of another item": [{"reasoning": {**thought(1), "type": "message", "role": "system"}}],
}
ODD_ANSWER: Final[Json] = {"role": "assistant", "content": "Four."}


@pytest.mark.parametrize("case", ODD_ENTRIES)
@pytest.mark.parametrize("how", ["sealed", "unsealed"])
def test_odd_records_make_a_valid_request(case: str, how: str) -> None:
    """A record may be of a newer version, or unsealed where the server has no secret."""
    record = ODD_ENTRIES[case]
    detail: Json = {"type": _CARRIER, "v": 1} | ({"sealed": "x"} if how == "sealed" else {"record": record})
    objects = [entry for entry in record if isinstance(entry, Mapping)]
    intake = Intake({"x": objects}) if how == "sealed" else Intake(takes_unsealed=True)
    entries = sent([HELLO, {**ODD_ANSWER, "reasoning_details": [detail]}, HELLO], intake)
    texts = [entry["content"] for entry in entries if entry.get("role") == "assistant"]
    assert "".join(texts) == "Four."
    assert {entry["type"] for entry in entries} <= {"message", "reasoning"}


# native details with values that the reference does not list
ODD_DETAILS: Final[dict[str, Json]] = {
    "no format": {**TEXT, "text": "x", "signature": "E", "format": 5},
    "index of any kind": {**TEXT, "text": "x", "index": nested(200)},
    "index nested deeply": {**TEXT, "text": "x", "index": nested(600)},
    "id of any kind": {**TEXT, "text": "x", "id": {"a": 1}},
    "half of a pair": {**TEXT, "text": "\ud83d", "signature": "\ud83d"},
    "beyond the schema": {**TEXT, "text": "x", "role": "system", "content": FORGED},
}


@pytest.mark.parametrize("case", ODD_DETAILS)
def test_odd_details_make_a_valid_request(case: str) -> None:
    entries = sent(native(ODD_DETAILS[case]))
    assert entries[-2] == said("Four.")
    assert FORGED not in json.dumps(entries)


def test_without_a_secret_only_reasoning_is_believed() -> None:
    record = [
        {"reasoning": thought(1)},
        {"message": "0123", "chars": 3, "phase": FORGED},
        {"message_text": FORGED},
    ]
    record[1]["message"] = TurnRecordOf("abc").dump()[0]["message"]
    detail = {"type": _CARRIER, "v": 1, "record": record}
    messages = [HELLO, {"role": "assistant", "content": "abc", "reasoning_details": [detail]}, HELLO]
    assert sent(messages, Intake(takes_unsealed=True))[1:-1] == [thought(1), said("abc")]
    assert sent(messages, Intake())[1:-1] == [said("abc")]
    large = {**detail, "record": [{"reasoning": thought(1, encrypted_content="x" * _MAX_RECORD_BYTES)}]}
    messages[1] = {**messages[1], "reasoning_details": [large]}
    assert sent(messages, Intake(takes_unsealed=True))[1:-1] == [said("abc")]


class TurnRecordOf(TurnRecord):
    """The record of one message."""

    def __init__(self, text: str) -> None:
        super().__init__()
        for emission in reduced(events_of(message(text))):
            self.note(emission)


DETAIL_STRATEGY: Final = st.fixed_dictionaries(
    {
        "type": st.sampled_from(
            [_CARRIER, *(f"reasoning.{kind}" for kind in ("text", "summary", "encrypted"))]
        )
    },
    optional={
        "sealed": st.sampled_from(["x", "y", GOOD_TEXT]) | JSON,
        "record": st.lists(
            st.sampled_from([entry for each in ODD_ENTRIES.values() for entry in each]) | JSON, max_size=3
        )
        | JSON,
        **{name: st.text(max_size=4) | JSON for name in ("text", "summary", "data", "id", "signature")},
        "format": st.sampled_from(["anthropic-claude-v1", "x"]) | JSON,
        "index": st.integers(0, 2) | JSON,
    },
)
RECORDS: Final = st.lists(
    st.sampled_from(
        [
            *({"reasoning": item} for item in (thought(1), signed(2))),
            *({"all": [thought(1), thought(2)]}, {"call": "a"}),
            *(TurnRecordOf(text).dump()[0] for text in ("a", "b", "")),
        ]
    ),
    max_size=4,
)
HISTORIES: Final = st.lists(
    CHATS
    | st.builds(
        lambda content, details: [{"role": "assistant", "content": content, "reasoning_details": details}],
        st.sampled_from(["a", "b", "a\nb", "ab", "", None]),
        st.lists(DETAIL_STRATEGY | JSON, max_size=3) | JSON,
    ),
    max_size=4,
).map(lambda groups: [entry for group in groups for entry in group])


@settings(max_examples=300, deadline=None)
@given(
    messages=HISTORIES,
    records=RECORDS,
    takes_unsealed=st.booleans(),
    replay=st.sampled_from(["off", "next_reply", "conversation"]),
)
def test_any_details_are_refused_or_valid(
    messages: list[Json], records: list[Json], takes_unsealed: bool, replay: str
) -> None:
    intake = Intake({"x": records, "y": records[::-1]}, takes_unsealed)
    plan_intake(messages, THINKING)
    try:
        entries = sent([HELLO, *messages], intake, replay=replay)
    except InputError:
        return
    for entry in reasoning_in(entries):
        assert entry["id"]
        assert any(entry.get(key) for key in SECRETS)
        assert replay != "off"


# The seal


@settings(max_examples=50, deadline=None)
@given(data=st.binary(max_size=300), owner=st.text(st.characters(codec="utf-8"), max_size=8))
def test_what_is_sealed_can_be_opened_by_its_owner(data: bytes, owner: str) -> None:
    text = CIPHER.seal(data, owner)
    assert CIPHER.open(text, owner) == data
    assert ArtifactCipher("the secret of this server", "openrouter").open(text, owner) == data
    with pytest.raises(StorageError):
        CIPHER.open(text, owner + "x")


def test_nothing_can_be_read_in_a_sealed_text() -> None:
    data = b"The person asked for the recipe of a cake. " * 3
    text = CIPHER.seal(data, "ada@example.org")
    assert text.isascii()
    raw = base64.urlsafe_b64decode(text)
    assert data[:8] not in raw
    assert b"ada" not in raw
    assert CIPHER.seal(data, "ada@example.org") != text, "the same text twice cannot be told"
    assert len(CIPHER.seal(b"x" * 100_000, "a")) < 10_000


@pytest.mark.parametrize(
    "cipher",
    [
        ArtifactCipher("another secret", "openrouter"),
        ArtifactCipher("the secret of this server", "another_pipe"),
        ArtifactCipher("the secret of this server", ""),
        ArtifactCipher("", "openrouter"),
    ],
)
def test_a_text_of_another_seal(cipher: ArtifactCipher) -> None:
    with pytest.raises(StorageError):
        CIPHER.open(cipher.seal(b"x", OWNER), OWNER)


@settings(max_examples=200, deadline=None)
@given(
    text=st.text(max_size=40) | st.binary(max_size=60).map(lambda raw: base64.urlsafe_b64encode(raw).decode())
)
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(StorageError):
        CIPHER.open(text, OWNER)


@pytest.mark.parametrize("extra", ["!", "\n", " ", "é", "=", "\x00"])
def test_a_sealed_text_has_one_form(extra: str) -> None:
    """Else one record could be sent a thousand times under a thousand names, and be opened each time."""
    text = CIPHER.seal(b"hello, hello", OWNER)
    assert CIPHER.open(text, OWNER) == b"hello, hello"
    for changed in (text + extra, extra + text, text[:20] + extra + text[20:]):
        with pytest.raises(StorageError):
            CIPHER.open(changed, OWNER)


@pytest.mark.parametrize("place", [0, 5, 12, 20, -1])
def test_a_changed_byte_is_noticed(place: int) -> None:
    raw = bytearray(base64.urlsafe_b64decode(CIPHER.seal(b"hello, hello", OWNER)))
    raw[place] ^= 1
    with pytest.raises(StorageError):
        CIPHER.open(base64.urlsafe_b64encode(bytes(raw)).decode(), OWNER)


def test_no_more_is_opened_than_a_record_may_have() -> None:
    assert len(CIPHER.open(CIPHER.seal(b"x" * (3 * _MAX_RECORD_BYTES), OWNER), OWNER)) <= _MAX_RECORD_BYTES


def test_without_a_secret_nothing_can_be_sealed() -> None:
    assert not ArtifactCipher("", "openrouter").can_seal
    assert CIPHER.can_seal


# The whole pipe


def carriers(got: Answer) -> list[tuple[int, list[Json]]]:
    """(number of the chunk, details) of every time that details were given out."""
    found = []
    for number, chunk in enumerate(got.chunks):
        items = [chunk["item"]] if "item" in chunk else chunk.get("output", [])
        parts = [choice.get("delta") or choice.get("message") or {} for choice in chunk.get("choices", ())]
        found += [
            (number, each["reasoning_details"]) for each in (*items, *parts) if "reasoning_details" in each
        ]
    return found


async def thoughtful(
    pipe: Pipe, prompt: str | Json = "Hello", dialect: str = "browser", *, own: Json | None = None
) -> tuple[Answer, Json]:
    """An answer of a model that thinks, and what `pipe()` was given."""
    arguments_given = arguments(prompt, dialect, model=MIND)
    if own is not None:
        arguments_given["__user__"]["valves"] = pipe.UserValves(**own)
    return await call(pipe, arguments_given), arguments_given


async def test_the_carrier_in_a_chat(pipe: Pipe) -> None:
    got, _ = await thoughtful(pipe)
    ((number, (detail,)),) = carriers(got)
    assert detail["type"] == _CARRIER
    assert detail.keys() == {"type", "v", "sealed"}
    assert len(detail["sealed"]) <= _MAX_CARRIER_CHARS
    kinds = [chunk["type"] for chunk in got.chunks]
    again = got.chunks[number]
    assert (again["type"], again["item"]["type"]) == ("response.output_item.done", "reasoning")
    ends = [
        place
        for place, chunk in enumerate(got.chunks)
        if chunk["type"] == "response.output_item.done" and chunk["item"]["id"] == again["item"]["id"]
    ]
    assert len(ends) == 2
    assert ends[1] == number < kinds.index("response.completed")
    first = got.chunks[ends[0]]["item"]
    assert again["item"] == {**first, "reasoning_details": again["item"]["reasoning_details"]}
    assert again["output_index"] == got.chunks[ends[0]]["output_index"]
    (entry, *_) = json.loads(CIPHER.open(detail["sealed"], OWNER))
    assert entry["reasoning"]["encrypted_content"]
    assert entry["reasoning"]["encrypted_content"] not in json.dumps(got.chunks)


@pytest.mark.parametrize("dialect", ["browser_json", "api_json", "api_stream"])
async def test_the_carrier_elsewhere(dialect: str, pipe: Pipe) -> None:
    got, _ = await thoughtful(pipe, dialect=dialect)
    ((number, (detail,)),) = carriers(got)
    assert json.loads(CIPHER.open(detail["sealed"], OWNER))[0]["reasoning"]["encrypted_content"]
    if dialect == "api_stream":
        ends = [
            place for place, c in enumerate(got.chunks) if c["choices"] and c["choices"][0]["finish_reason"]
        ]
        assert number < ends[0]


async def test_the_carrier_rides_with_the_first_of_several(pipe: Pipe, simulator: Simulator) -> None:
    output = [message("a"), thought(1), message("b"), thought(2), message("c")]
    simulator.next("replay", body=as_body(*output))
    got, _ = await thoughtful(pipe)
    assert ["reasoning_details" in item for item in got.items()] == [False, True, False, False, False]
    messages = [HELLO, *as_host_returns(got.items()), HELLO]
    assert sent(messages)[1:-1] == [said("a"), thought(1), said("b"), thought(2), said("c")]


@pytest.mark.parametrize("dialect", ["task", "task_stream"])
async def test_tasks_have_no_carrier(dialect: str, pipe: Pipe) -> None:
    got, _ = await thoughtful(pipe, "[[reasoning]] Hello", dialect=dialect)
    assert got.chunks
    assert carriers(got) == []


# administrator's choice, the person's -> what counts
CHOICES: Final = [
    ("conversation", None, "conversation"),
    ("conversation", "inherit", "conversation"),
    ("conversation", "next_reply", "next_reply"),
    ("conversation", "off", "off"),
    ("next_reply", None, "next_reply"),
    ("next_reply", "next_reply", "next_reply"),
    ("next_reply", "off", "off"),
    ("off", None, "off"),
    ("off", "next_reply", "off"),
    ("off", "off", "off"),
    ("next_reply", "conversation", "next_reply"),
    ("off", "conversation", "off"),
]


@pytest.mark.parametrize(("admins", "persons", "counts"), CHOICES)
async def test_who_decides_how_long_reasoning_is_kept(
    admins: str, persons: str | None, counts: str, simulator: Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WEBUI_SECRET_KEY", "the secret of this server")
    own = None if persons is None else {"PERSIST_REASONING": persons}
    messages = three_turns()[:-2]
    async with pipe_at(simulator, PERSIST_REASONING=admins) as pipe:
        got, _ = await thoughtful(pipe, {"messages": messages}, own=own)
    assert not got.error
    assert bool(carriers(got)) == (counts != "off")
    kept = {"conversation": [10, 11, 20, 21], "next_reply": [20, 21], "off": []}[counts]
    assert reasoning_in(received(simulator)) == [thought(number) for number in kept]


@pytest.mark.parametrize("dialect", ["browser", "browser_json", "api_json", "api_stream"])
@pytest.mark.parametrize(
    "prompt", ["[[failed after=6]] Hello", "[[error_flat]] Hello", "[[eof cut=14]] Hello"]
)
async def test_a_call_that_fails_leaves_no_carrier(dialect: str, prompt: str, pipe: Pipe) -> None:
    got, _ = await thoughtful(pipe, prompt, dialect)
    assert got.error
    assert carriers(got) == []


async def test_a_call_that_is_stopped_leaves_no_carrier(pipe: Pipe) -> None:
    chunks = await stream(
        pipe, {"messages": [{"role": "user", "content": "[[reasoning rate=20]]"}], "model": MIND}
    )
    got = await read_until_text(chunks, Answer())
    await chunks.aclose()
    assert got.reasoning
    assert carriers(got) == []


async def test_a_try_that_failed_leaves_nothing_in_the_record(pipe: Pipe, simulator: Simulator) -> None:
    """Thoughts without a visible word may come before a failure that is cured by another try."""
    set_valves(pipe, simulator.base_url, RETRY_ATTEMPTS=1)
    failed = events_of(*(thought(number, summary=[]) for number in (7, 8, 9)))[:-1]
    simulator.next("replay", body=as_frames(failed))  # and no end
    simulator.next("replay", body=as_body(thought(1), message("a")))
    got, _ = await thoughtful(pipe)
    assert (got.text, got.error, len(inferences(simulator))) == ("a", "", 2)
    await thoughtful(pipe, next_request(got, "Hello", "browser"))
    assert received(simulator)[1:-1] == [thought(1), said("a")]


@pytest.mark.parametrize("dialect", ["browser", "api_stream"])
async def test_an_answer_that_is_cut_short_keeps_its_reasoning(dialect: str, pipe: Pipe) -> None:
    got, _ = await thoughtful(pipe, "[[incomplete]] Hello", dialect)
    assert len(carriers(got)) == 1


def as_frames(stream_events: Iterable[Json]) -> str:
    """Events as they stand in a stream."""
    return "".join(f"data: {json.dumps(event)}\n\n" for event in stream_events)


def as_body(*output: Json) -> str:
    """The stream of such an answer."""
    return as_frames(events_of(*output))


NOISE: Final = base64.b64encode(random.Random(5).randbytes(100_000)).decode()
# what is too long to be kept: by itself, or only when it is opened again
TOO_LONG: Final[dict[str, Json]] = {
    "secret": thought(1, encrypted_content=NOISE),
    "text that is small when compressed": signed(1)
    | {"content": [{"type": "reasoning_text", "text": "hm " * _MAX_RECORD_BYTES}]},
}


@pytest.mark.parametrize("case", TOO_LONG)
async def test_too_long_to_be_kept(case: str, pipe: Pipe, simulator: Simulator) -> None:
    simulator.next("replay", body=as_body(TOO_LONG[case], message("a")))
    got, given_arguments = await thoughtful(pipe)
    assert (got.text, got.error) == ("a", "")
    assert carriers(got) == []
    (notice,) = given_arguments["__event_emitter__"].of("notification")
    assert "too long" in notice["content"]
    await thoughtful(pipe, {"messages": [HELLO, *as_host_returns(got.items()), HELLO]})
    assert received(simulator)[1] == said("a")


async def test_long_but_not_too_long(pipe: Pipe, simulator: Simulator) -> None:
    item = thought(1, encrypted_content=NOISE[:40_000])
    simulator.next("replay", body=as_body(item, message("a")))
    got, given_arguments = await thoughtful(pipe)
    assert given_arguments["__event_emitter__"].of("notification") == []
    await thoughtful(pipe, {"messages": [HELLO, *as_host_returns(got.items()), HELLO]})
    assert received(simulator)[1:3] == [item, said("a")]


PROMPTS: Final = [
    "[[reasoning]] Hello",
    "[[reasoning_text]] Hello",
    "[[refusal]] Hello",
    "[[golden name=02_reasoning_summary_encrypted]]",
    "[[incomplete text=0]] Hello",
]


def next_request(got: Answer, prompt: str, dialect: str) -> Json:
    """The chat after an answer, as the host or an API client sends it."""
    asked = {"role": "user", "content": prompt}
    if dialect.startswith("browser"):
        past = as_host_returns(got.items())
    else:
        details = [detail for _, each in carriers(got) for detail in each]
        past = [{"role": "assistant", "content": got.text, "reasoning_details": details}]
    return {"messages": [asked, *past, {"role": "user", "content": "And now?"}]}


@pytest.mark.parametrize("dialect", ["browser", "browser_json", "api_stream", "api_json"])
@pytest.mark.parametrize("prompt", PROMPTS)
async def test_two_turns(prompt: str, dialect: str, pipe: Pipe, simulator: Simulator) -> None:
    """The simulator refuses reasoning that was changed, as providers do."""
    got, _ = await thoughtful(pipe, prompt, dialect)
    assert not got.error
    again, _ = await thoughtful(pipe, next_request(got, prompt, dialect), dialect)
    assert not again.error
    statuses = [record.status for record in inferences(simulator)]
    assert statuses == [200, 200]
    entries = received(simulator)
    expected: list[Json] = []
    if carriers(got):
        (_, (detail,)) = carriers(got)[0]
        expected = [
            e["reasoning"] for e in json.loads(CIPHER.open(detail["sealed"], OWNER)) if "reasoning" in e
        ]
        assert entries[1] == expected[0]
    assert reasoning_in(entries) == expected
    assert bool(expected) == (prompt != "[[refusal]] Hello" or bool(got.reasoning))


async def test_two_turns_over_the_other_endpoint(
    simulator: Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WEBUI_SECRET_KEY", "the secret of this server")
    async with pipe_at(simulator, FORCE_CHAT_COMPLETIONS_MODELS="openai/gpt-5-mini") as pipe:
        got, _ = await thoughtful(pipe, "[[golden name=c2_chat_reasoning_details]]")
        assert got.text == "4"
        await thoughtful(pipe, next_request(got, "2 + 2?", "browser"))
    record = simulator.requests[-1]
    assert record.path.endswith("/chat/completions")
    _, past, _ = record.body["messages"]
    assert past["content"] == "4"
    (detail,) = past["reasoning_details"]
    assert (detail["type"], detail["text"], detail["id"]) == ("reasoning.text", "Adding two.", "r1")
    assert detail["signature"].startswith("EvcBCkgI")


async def test_a_chat_of_somebody_else_is_read_without_its_reasoning(
    pipe: Pipe, simulator: Simulator
) -> None:
    got, _ = await thoughtful(pipe)
    theirs = arguments(next_request(got, "Hello", "browser"), model=MIND)
    theirs["__user__"]["id"] = "somebody else"
    assert not (await call(pipe, theirs)).error
    entries = received(simulator)
    assert reasoning_in(entries) == []
    assert [entry["role"] for entry in entries] == ["user", "assistant", "user"]


async def test_a_server_without_a_secret(simulator: Simulator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WEBUI_SECRET_KEY", raising=False)
    async with pipe_at(simulator) as pipe:
        got, _ = await thoughtful(pipe)
        ((_, (detail,)),) = carriers(got)
        assert detail.keys() == {"type", "v", "record"}
        again, _ = await thoughtful(pipe, next_request(got, "Hello", "browser"))
    assert not again.error
    assert received(simulator)[1] == detail["record"][0]["reasoning"]


async def test_reasoning_that_was_sealed_before_the_secret_changed(
    simulator: Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WEBUI_SECRET_KEY", "an older secret")
    async with pipe_at(simulator) as pipe:
        got, _ = await thoughtful(pipe)
    monkeypatch.setenv("WEBUI_SECRET_KEY", "the secret of this server")
    async with pipe_at(simulator) as pipe:
        again, _ = await thoughtful(pipe, next_request(got, "Hello", "browser"))
    assert not again.error
    assert reasoning_in(received(simulator)) == []


async def test_a_round_of_tools_through_the_pipe(pipe: Pipe, simulator: Simulator) -> None:
    output = [signed(1), message("Let me see."), function_call("x")]
    simulator.next("replay", body=as_body(*output))
    got, _ = await thoughtful(pipe)
    messages = [HELLO, *as_host_returns(with_outputs(got.items()))]
    again, _ = await thoughtful(pipe, {"messages": messages})
    assert not again.error
    assert received(simulator)[1:] == [signed(1), said("Let me see."), called("x"), output_of("x")]
