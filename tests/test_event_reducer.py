"""The event reducer: recorded streams, whole and with pieces missing, against what they say."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openrouter_responses_pipe.openrouter_responses_pipe import (
    _REDUCERS,
    CitationFound,
    Emission,
    Failed,
    ItemClosed,
    MediaProduced,
    ReasoningDelta,
    RefusalDelta,
    ServerToolProgress,
    StreamEvent,
    StreamState,
    TextDelta,
    ToolCall,
    ToolRequested,
    TurnEnded,
    UsageReported,
    _merge_usage_stats,
    close_stream,
    reduce_event,
    reduce_events,
)
from tests.recorded import ENDED_WELL, EXPECTED, NAMES, Said, events, reduced, said

Json = dict[str, Any]
Events = list[StreamEvent]

TERMINAL: Final = frozenset(
    {"response.completed", "response.incomplete", "response.failed", "response.error", "error"}
)
ENDS: Final = (TurnEnded, Failed)


def event(kind: str, **payload: Any) -> StreamEvent:
    return {"type": kind, **payload}


def singly(stream: Iterable[StreamEvent]) -> list[Emission]:
    """What a stream means when every event comes alone."""
    state = StreamState()
    emissions = [emission for one in stream for emission in reduce_event(state, one)]
    return [*emissions, *close_stream(state)]


def in_batches(stream: Sequence[StreamEvent], cuts: Iterable[int]) -> list[Emission]:
    """What a stream means when it comes in some reads."""
    state, start = StreamState(), 0
    emissions: list[Emission] = []
    for end in [*sorted(cuts), len(stream)]:
        emissions += reduce_events(state, stream[start:end])
        start = end
    return [*emissions, *close_stream(state)]


def in_threes(stream: Sequence[StreamEvent]) -> list[Emission]:
    return in_batches(stream, range(3, len(stream), 3))


# What the manifest says of a stream, read from the emissions
_READ: Final[dict[str, Callable[[Said], Any]]] = {
    "text": lambda found: found.text,
    "refusal": lambda found: found.refusal,
    "reasoning_summary": lambda found: found.parts("summary"),
    "reasoning_text": lambda found: found.parts("text"),
    # in the order in which they became final, which need not be that of the output
    "tool_calls": lambda found: sorted(found.calls, key=lambda call: call["call_id"]),
    "citations": lambda found: found.citations,
    "server_tools": lambda found: found.tools,
    "usage": lambda found: found.usages[0] if len(found.usages) == 1 else found.usages,
    "incomplete_reason": lambda found: found.ends[0].reason,
}
# code or exact type of a recorded failure -> (template, whether another try may help)
_FAILURES: Final[dict[str, tuple[str, bool]]] = {
    "rate_limit_exceeded": ("rate_limit", True),
    "provider_overloaded": ("provider", True),
    "server_error": ("provider", False),
    "invalid_request": ("refused", False),
}


def expect(found: Said, expected: Json, *, without: Iterable[str] = ()) -> None:
    """Compare everything that the manifest says, and nothing else."""
    for key in expected.keys() & _READ.keys() - set(without):
        assert _READ[key](found) == expected[key], key
    images = [{key: image[key] for key in ("mime", "bytes")} for image in expected.get("images", ())]
    assert found.images == images
    if "replay_items" not in without:
        for fields in expected.get("replay_items", ()):
            assert any(fields.items() <= payload.items() for payload in found.closed), fields
    _expect_end(found, expected)


def _expect_end(found: Said, expected: Json) -> None:
    if expected["terminal"] in ("completed", "incomplete"):
        assert [end.outcome for end in found.ends] == [expected["terminal"]]
        assert found.errors == []
        return
    assert found.ends == []
    (error,) = found.errors
    code = expected["error"]
    assert expected["error"]["message"] in error.detail
    assert (error.template, error.retryable) == _FAILURES[code.get("error_type", code["code"])]


@pytest.mark.parametrize("reduce", [reduced, singly, in_threes])
@pytest.mark.parametrize("name", NAMES)
def test_recorded(name: str, reduce: Callable[[Events], list[Emission]]) -> None:
    expect(said(reduce(events(name))), EXPECTED[name])


@pytest.mark.parametrize("name", NAMES)
def test_the_end_is_last(name: str) -> None:
    for reduce in (reduced, singly):
        emissions = reduce(events(name))
        assert [isinstance(emission, ENDS) for emission in emissions] == [False] * (len(emissions) - 1) + [
            True
        ]


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_batches(name: str, data: st.DataObject) -> None:
    stream = events(name)
    cuts = data.draw(st.lists(st.integers(0, len(stream)), max_size=10))
    assert said(in_batches(stream, cuts)).text == said(singly(stream)).text
    expect(said(in_batches(stream, cuts)), EXPECTED[name])


@pytest.mark.parametrize("name", NAMES)
def test_reducing_leaves_the_events_alone(name: str) -> None:
    stream = events(name)
    before = copy.deepcopy(stream)
    reduced(stream)
    assert stream == before


# The same said with less: every row is a way in which providers leave things out


def _dropping(*kinds: str) -> Callable[[Events], Events]:
    return lambda stream: [one for one in stream if one["type"] not in kinds]


def _without_deltas(stream: Events) -> Events:
    return [one for one in stream if not one["type"].endswith(".delta")]


def _without_part_ends(stream: Events) -> Events:
    kept = ("response.output_item.done", "response.done")
    return [one for one in stream if not one["type"].endswith(".done") or one["type"] in kept]


def _only_the_end(stream: Events) -> Events:
    return [one for one in stream if one["type"] in TERMINAL]


def _with_an_empty_final_output(stream: Events) -> Events:
    def emptied(one: StreamEvent) -> StreamEvent:
        response = {**one["response"], "output": []}
        return {**one, "response": response}

    return [emptied(one) if one["type"] in TERMINAL else one for one in stream]


def _without_key(key: str) -> Callable[[Events], Events]:
    def strip(stream: Events) -> Events:
        return [{k: v for k, v in one.items() if k != key} for one in stream]

    return strip


def _renamed(value: Any, new_id: Callable[[], str]) -> Any:
    if isinstance(value, list):
        return [_renamed(entry, new_id) for entry in value]
    if not isinstance(value, dict):
        return value
    names = {"id", "item_id"}
    return {
        key: new_id() if key in names and isinstance(old, str) else _renamed(old, new_id)
        for key, old in value.items()
    }


def _with_one_id_for_all(stream: Events) -> Events:
    return [_renamed(one, lambda: "msg_tmp") for one in stream]


def _with_ever_new_ids(stream: Events) -> Events:
    chance = random.Random(7)
    return [_renamed(one, lambda: f"x{chance.random()}") for one in stream]


def _with_all_but_deltas_twice(stream: Events) -> Events:
    return [same for one in stream for same in [one] * (1 if one["type"].endswith(".delta") else 2)]


def _as_response_done(stream: Events) -> Events:
    ends = ("response.completed", "response.incomplete", "response.failed")
    return [{**one, "type": "response.done"} if one["type"] in ends else one for one in stream]


# change -> (function, streams that cannot survive it, whether the ids of items stay)
CHANGES: Final[dict[str, tuple[Callable[[Events], Events], set[str], bool]]] = {
    "no lifecycle": (_dropping("response.created", "response.in_progress"), set(), True),
    "no deltas": (_without_deltas, set(), True),
    "no ends of parts": (_without_part_ends, set(), True),
    "no ends of items": (_dropping("response.output_item.done"), set(), True),
    "no ends at all": (
        lambda stream: _dropping("response.output_item.done")(_without_part_ends(stream)),
        set(),
        True,
    ),
    # An advisor's own words are told from an answer only by the item they belong to.
    "no beginnings of items": (
        _dropping("response.output_item.added"),
        {"24_advisor_streaming_text_delta_on_tool_item"},
        True,
    ),
    "no annotations": (_dropping("response.output_text.annotation.added"), set(), True),
    "only the end": (_only_the_end, set(), True),
    "an empty final output": (_with_an_empty_final_output, {"26_completed_only"}, True),
    "no item_id": (_without_key("item_id"), set(), True),
    "no output_index": (_without_key("output_index"), set(), True),
    "no sequence_number": (_without_key("sequence_number"), set(), True),
    "one id for all": (_with_one_id_for_all, set(), False),
    "ever new ids": (_with_ever_new_ids, set(), False),
    "all but deltas twice": (_with_all_but_deltas_twice, set(), True),
    "response.done instead": (_as_response_done, set(), True),
}


@pytest.mark.parametrize("name", ENDED_WELL)
@pytest.mark.parametrize("change", CHANGES)
def test_recorded_with_less(name: str, change: str) -> None:
    function, exceptions, keeps_ids = CHANGES[change]
    if name in exceptions:
        return
    stream = function(events(name))
    for reduce in (reduced, singly, in_threes):
        found = said(reduce(stream))
        expect(found, EXPECTED[name], without=() if keeps_ids else ("replay_items",))


@pytest.mark.parametrize("name", ["01_plain_text", "02_reasoning_summary_encrypted", "04_function_call"])
def test_events_that_name_no_item_belong_to_the_one_that_is_open(name: str) -> None:
    stream = _without_key("item_id")(_without_key("output_index")(events(name)))
    for reduce in (reduced, singly):
        expect(said(reduce(stream)), EXPECTED[name])


@pytest.mark.parametrize("name", NAMES)
def test_any_prefix_without_its_end_fails_once(name: str) -> None:
    stream = events(name)
    length = next(number for number, one in enumerate(stream) if one["type"] in TERMINAL)
    full = EXPECTED[name]["text"]
    for end in range(length + 1):
        for reduce in (reduced, singly):
            emissions = reduce(stream[:end])
            found = said([emission for emission in emissions if not isinstance(emission, ToolRequested)])
            assert [isinstance(emission, ENDS) for emission in emissions].count(True) == 1
            assert isinstance(emissions[-1], Failed)
            assert emissions[-1].error.retryable
            assert full.startswith(found.text.rstrip("\ud83d"))


@pytest.mark.parametrize("name", NAMES)
def test_nothing_counts_after_the_end(name: str) -> None:
    state = StreamState()
    reduce_events(state, events(name))
    assert state.ended
    assert [emission for one in events(name) for emission in reduce_event(state, one)] == []
    assert reduce_events(state, [event("error", message="late")]) == []
    assert close_stream(state) == []


def _is_subsequence(part: str, whole: str) -> bool:
    rest = iter(whole)
    return all(char in rest for char in part)


@pytest.mark.parametrize("name", [name for name in NAMES if "advisor" not in name])
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_no_text_is_given_out_twice_whatever_is_missing(name: str, data: st.DataObject) -> None:
    stream = events(name)
    kept = data.draw(st.lists(st.booleans(), min_size=len(stream), max_size=len(stream)))
    emissions = reduced([one for one, keep in zip(stream, kept, strict=True) if keep])
    found, expected = said(emissions), EXPECTED[name]
    assert _is_subsequence(found.text.replace("\ud83d", "").replace("\ude00", ""), expected["text"])
    assert _is_subsequence(found.refusal, expected.get("refusal", ""))
    assert len(found.ends) + len(found.errors) == 1
    assert len(found.usages) <= 1
    calls = [call["call_id"] for call in found.calls]
    assert len(set(calls)) == len(calls)
    assert len(set(found.citations)) == len(found.citations)


# By hand


def test_reused_item_ids() -> None:
    """A provider that calls every message `msg_tmp`, without telling places in its final object."""

    def message(index: int, text: str) -> Events:
        item = {"type": "message", "id": "msg_tmp", "content": []}
        done = {**item, "content": [{"type": "output_text", "text": text, "annotations": []}]}
        return [
            event("response.output_item.added", output_index=index, item=item),
            event("response.output_text.delta", output_index=index, item_id="msg_tmp", delta=text[:2]),
            event("response.output_item.done", output_index=index, item=done),
        ]

    first, second = message(0, "first"), message(1, "second")
    output = [first[-1]["item"], second[-1]["item"]]
    end = event("response.completed", response={"output": output})
    for stream in ([*first, *second, end], [*first[:2], *second[:2], end]):
        for reduce in (reduced, singly):
            texts: dict[int, str] = {}
            for emission in reduce(stream):
                if isinstance(emission, TextDelta):
                    texts[emission.item] = texts.get(emission.item, "") + emission.text
            assert texts == {0: "first", 1: "second"}


def test_reused_item_ids_without_places() -> None:
    stream = [
        event("response.output_item.added", item={"type": "message", "id": "msg_tmp"}),
        event("response.output_text.delta", item_id="msg_tmp", delta="one"),
        event("response.output_item.done", item={"type": "message", "id": "msg_tmp"}),
        event("response.output_item.added", item={"type": "message", "id": "msg_tmp"}),
        event("response.output_text.delta", item_id="msg_tmp", delta="two"),
        event("response.completed", response={}),
    ]
    texts = [(emission.item, emission.text) for emission in reduced(stream) if type(emission) is TextDelta]
    assert texts == [(0, "one"), (1, "two")]


def test_two_messages_whose_deltas_interleave() -> None:
    def text(index: int, delta: str) -> StreamEvent:
        return event("response.output_text.delta", output_index=index, item_id=f"m{index}", delta=delta)

    stream = [text(0, "a"), text(0, "b"), text(1, "x"), text(0, "c"), text(1, "y"), text(1, "z")]
    expected = [TextDelta(0, "ab"), TextDelta(1, "x"), TextDelta(0, "c"), TextDelta(1, "yz")]
    assert reduced(stream)[:-1] == expected
    assert "".join(e.text for e in singly(stream) if type(e) is TextDelta and e.item == 0) == "abc"


@pytest.mark.parametrize(
    ("events_of_the_call", "arguments"),
    [
        (["added", "delta", "delta", "args_done", "done"], '{"a":1}'),
        (["added", "args_done", "done"], '{"a":1}'),
        (["added", "done"], '{"a":1}'),
        (["done"], '{"a":1}'),
        (["delta", "delta", "done"], '{"a":1}'),
        (["added", "delta", "delta"], '{"a":1}'),
        (["added", "args_done"], '{"a":1}'),
        (["added", "empty"], "{}"),
        (["added", "delta", "delta", "empty"], '{"a":1}'),
        (["added"], "{}"),
    ],
)
def test_a_function_call(events_of_the_call: list[str], arguments: str) -> None:
    item = {"type": "function_call", "id": "fc", "call_id": "call", "name": "f", "arguments": ""}
    deltas = iter(['{"a"', ":1}"])
    build: dict[str, Callable[[], StreamEvent]] = {
        "added": lambda: event("response.output_item.added", output_index=0, item=item),
        "delta": lambda: event(
            "response.function_call_arguments.delta", output_index=0, item_id="fc", delta=next(deltas)
        ),
        "args_done": lambda: event(
            "response.function_call_arguments.done",
            output_index=0,
            item_id="fc",
            name="f",
            arguments=arguments,
        ),
        "done": lambda: event(
            "response.output_item.done", output_index=0, item={**item, "arguments": arguments}
        ),
        "empty": lambda: event("response.output_item.done", output_index=0, item=item),
    }
    stream = [build[kind]() for kind in events_of_the_call]
    emissions = reduced([*stream, event("response.completed", response={"output": []})])
    (requested,) = [emission for emission in emissions if isinstance(emission, ToolRequested)]
    assert (requested.call.call_id, requested.call.name) == ("call", "f")
    assert requested.call.arguments == arguments


def test_arguments_that_are_not_json_are_passed_on() -> None:
    (call,) = calls_of(reduced([done(call_item('{"a":')), finished()]))
    assert call.arguments == '{"a":'


# What comes later may know more than the end of the item


def added(item: Json, index: int = 0) -> StreamEvent:
    return event("response.output_item.added", output_index=index, item=item)


def done(item: Json, index: int = 0) -> StreamEvent:
    return event("response.output_item.done", output_index=index, item=item)


def finished(*output: Json, **response: Any) -> StreamEvent:
    return event("response.completed", response={"status": "completed", "output": [*output], **response})


def message(text: str = "", *annotations: Json) -> Json:
    part = {"type": "output_text", "text": text, "annotations": [*annotations]}
    return {"type": "message", "id": "m", "role": "assistant", "content": [part] if text else []}


def hello(text: str) -> StreamEvent:
    return event("response.output_text.delta", output_index=0, item_id="m", content_index=0, delta=text)


def call_item(arguments: str = "", **more: Any) -> Json:
    return {"type": "function_call", "id": "f", "call_id": "c", "name": "f", "arguments": arguments, **more}


def calls_of(emissions: Iterable[Emission]) -> list[ToolCall]:
    return [emission.call for emission in emissions if isinstance(emission, ToolRequested)]


ALL_WAYS: Final = pytest.mark.parametrize("reduce", [reduced, singly, in_threes])


@ALL_WAYS
@pytest.mark.parametrize(
    "stream",
    [
        [added(message()), hello("Hel"), done(message())],
        [added(message()), hello("Hel"), done(message("Hel"))],
        [added(message()), hello("Hel")],
        [added(message()), done(message())],
        [done(message())],
        [],
    ],
)
def test_text_that_only_the_final_object_has(
    stream: Events, reduce: Callable[[Events], list[Emission]]
) -> None:
    found = said(reduce([*stream, finished(message("Hello world"))]))
    assert (found.text, found.ends) == ("Hello world", [TurnEnded("completed")])


ARGUMENTS: Final = '{"city":"Bonn"}'
ARGUMENTS_DONE: Final = event(
    "response.function_call_arguments.done", output_index=0, item_id="f", name="f", arguments=ARGUMENTS
)
HALF_OF_THEM: Final = event(
    "response.function_call_arguments.delta", output_index=0, item_id="f", delta='{"city"'
)
WHOLE_CALL: Final = call_item(ARGUMENTS)
CUSTOM: Final[Json] = {"type": "custom_tool_call", "id": "f", "call_id": "c", "name": "sql"}
INPUT_DONE: Final = event(
    "response.custom_tool_call_input.done", output_index=0, item_id="f", input="select 1"
)
WANTED: Final = ToolCall("c", "f", ARGUMENTS)
WANTED_CUSTOM: Final = ToolCall("c", "sql", '{"input":"select 1"}')


@ALL_WAYS
@pytest.mark.parametrize(
    ("stream", "call"),
    [
        ([added(call_item()), ARGUMENTS_DONE, finished()], WANTED),
        ([added(call_item()), ARGUMENTS_DONE, done(call_item()), finished()], WANTED),
        ([added(call_item()), ARGUMENTS_DONE, done(call_item()), finished(call_item())], WANTED),
        ([added(call_item()), done(call_item()), finished(call_item(ARGUMENTS))], WANTED),
        ([added(call_item()), HALF_OF_THEM, done(call_item()), finished(call_item(ARGUMENTS))], WANTED),
        ([added(call_item()), done(call_item(ARGUMENTS, name=None)), finished()], WANTED),
        (
            [added(call_item()), done(call_item(name=None)), finished(call_item(ARGUMENTS, name=None))],
            WANTED,
        ),
        (
            [added(call_item()), ARGUMENTS_DONE, done(WHOLE_CALL), finished(WHOLE_CALL)],
            WANTED,
        ),
        ([added(CUSTOM), INPUT_DONE, finished()], WANTED_CUSTOM),
        ([added(CUSTOM), INPUT_DONE, done({**CUSTOM, "input": ""}), finished()], WANTED_CUSTOM),
        ([added(CUSTOM), done(CUSTOM), finished({**CUSTOM, "input": "select 1"})], WANTED_CUSTOM),
    ],
)
def test_a_call_is_requested_once_and_with_all_that_is_known(
    stream: Events, call: ToolCall, reduce: Callable[[Events], list[Emission]]
) -> None:
    assert calls_of(reduce(stream)) == [call]


@ALL_WAYS
def test_sources_that_only_the_final_object_has(reduce: Callable[[Events], list[Emission]]) -> None:
    source = {"type": "url_citation", "url": "https://a.example/x", "title": "A"}
    stream = [added(message()), hello("Hi"), done(message("Hi")), finished(message("Hi", source, source))]
    found = said(reduce(stream))
    assert (found.text, found.citations) == ("Hi", ["https://a.example/x"])


@ALL_WAYS
@pytest.mark.parametrize("kind", ["image_generation_call", "openrouter:image_generation"])
def test_a_picture_that_only_the_final_object_has(
    kind: str, reduce: Callable[[Events], list[Emission]]
) -> None:
    item = {"type": kind, "id": "i", "status": "completed"}
    whole = {**item, "result": "iVBORw0K"}
    for stream in ([added(item), done(item), finished(whole)], [added(item), done(whole), finished(whole)]):
        pictures = [one.source for one in reduce(stream) if isinstance(one, MediaProduced)]
        assert pictures == ["iVBORw0K"]


@ALL_WAYS
def test_a_pair_that_is_split_between_two_deltas_of_arguments(
    reduce: Callable[[Events], list[Emission]],
) -> None:
    halves = [
        event("response.function_call_arguments.delta", output_index=0, delta=half)
        for half in ('{"q":"\ud83d', '\ude00"}')
    ]
    for end in ([], [done(call_item())]):
        (call,) = calls_of(reduce([added(call_item()), *halves, *end, finished()]))
        assert ascii(call.arguments) == ascii('{"q":"\N{GRINNING FACE}"}')


@pytest.mark.parametrize(
    "item",
    [call_item('{"q":"\ud83d"}'), {**CUSTOM, "input": "\ud83d"}],
    ids=["arguments", "input"],
)
def test_half_a_pair_in_a_call_is_replaced(item: Json) -> None:
    (call,) = calls_of(reduced([added(item), done(item), finished(item)]))
    assert (call.arguments.count("\ufffd"), "\ud83d" in call.arguments) == (1, False)


def _thought(summary: str, content: str) -> Json:
    """A reasoning item with both forms; an empty one is not there."""
    return {
        "type": "reasoning",
        "id": "r",
        "summary": [{"type": "summary_text", "text": summary}] if summary else [],
        "content": [{"type": "reasoning_text", "text": content}] if content else [],
    }


def _thinking(kind: str, end: str, text: str = "Think") -> StreamEvent:
    key = "delta" if end == "delta" else "text"
    number = "summary_index" if "summary" in kind else "content_index"
    return event(f"response.{kind}.{end}", output_index=0, item_id="r", **{number: 0, key: text})


BOTH: Final = _thought("Think", "Think")


@ALL_WAYS
@pytest.mark.parametrize(
    ("stream", "forms"),
    [
        ([_thinking("reasoning_text", "delta"), done(BOTH)], ["text"]),
        ([_thinking("reasoning_summary_text", "delta"), done(BOTH)], ["summary"]),
        (
            [_thinking("reasoning_summary_text", "delta"), _thinking("reasoning", "delta"), done(BOTH)],
            ["summary"],
        ),
        (
            [_thinking("reasoning_text", "delta"), _thinking("reasoning_summary_text", "delta"), done(BOTH)],
            ["text"],
        ),
        (
            [_thinking("reasoning_summary_text", "done"), _thinking("reasoning_text", "done"), done(BOTH)],
            ["summary"],
        ),
        ([_thinking("reasoning_text", "delta"), done(_thought("In short", "Think"))], ["text"]),
        ([_thinking("reasoning_text", "delta"), done(_thought("Think", ""))], ["text"]),
        ([done(BOTH)], ["summary", "text"]),
        ([], ["summary", "text"]),
    ],
)
def test_reasoning_that_comes_in_two_forms_is_shown_in_the_first(
    stream: Events, forms: list[str], reduce: Callable[[Events], list[Emission]]
) -> None:
    found = said(reduce([added(_thought("", "")), *stream, finished(BOTH)]))
    ((place, text),) = found.reasoning.items()
    assert (place[1] in forms, text) == (True, "Think")


# The end that is said inside


@pytest.mark.parametrize("kind", ["response.done", "response.completed"])
@pytest.mark.parametrize(
    ("response", "end"),
    [
        ({"status": "completed"}, TurnEnded("completed")),
        ({"status": "cancelled"}, TurnEnded("incomplete", "cancelled")),
        (
            {"status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}},
            TurnEnded("incomplete", "max_output_tokens"),
        ),
        ({"status": "incomplete"}, TurnEnded("incomplete", "")),
        ({"status": "failed", "error": {"code": "server_error", "message": "boom"}}, "boom"),
    ],
)
def test_an_end_is_what_its_status_says(kind: str, response: Json, end: TurnEnded | str) -> None:
    usage = {"input_tokens": 1}
    for reduce in (reduced, singly):
        found = said(reduce([hello("so far"), event(kind, response={**response, "usage": usage})]))
        assert (found.text, found.usages) == ("so far", [usage])
        if isinstance(end, str):
            assert (found.ends, [error.detail for error in found.errors]) == ([], [end])
        else:
            assert (found.ends, found.errors) == ([end], [])


def test_reasoning_begins_before_its_text() -> None:
    item = {"type": "reasoning", "id": "rs", "summary": []}
    emissions = reduce_event(StreamState(), event("response.output_item.added", output_index=0, item=item))
    assert [(type(emission), emission) for emission in emissions] == [(ReasoningDelta, ReasoningDelta(0, ""))]


def test_reasoning_under_its_older_name() -> None:
    stream = [
        event("response.reasoning.delta", output_index=0, item_id="rs", content_index=0, delta="hm"),
        event("response.completed", response={}),
    ]
    assert said(reduced(stream)).parts("text") == ["hm"]


@pytest.mark.parametrize(
    ("payload", "words", "template", "retryable"),
    [
        ({"type": "error", "code": "server_error", "message": "boom"}, "boom", "provider", False),
        ({"type": "error", "error": {"code": 429, "message": "slow"}}, "slow", "rate_limit", True),
        ({"type": "error", "error": {"code": 401, "message": "key"}}, "key", "authentication", False),
        ({"type": "error", "code": "429", "message": "slow"}, "slow", "rate_limit", True),
        (
            {"type": "error", "error": {"code": 429, "message": "Over: free-models-per-day"}},
            "free-models",
            "daily_limit",
            False,
        ),
        ({"type": "error", "error": "only words"}, "only words", "provider", False),
        ({"type": "error", "code": "rate_limit_exceeded", "message": None}, "", "rate_limit", True),
        ({"type": "error"}, "", "provider", False),
        ({"type": "response.error", "error": {"code": 502, "message": "down"}}, "down", "provider", True),
        (
            {"error": {"code": 503, "message": "Provider returned error", "metadata": {"raw": "busy"}}},
            "busy",
            "provider",
            True,
        ),
        ({"error": {"message": "x", "metadata": {"error_type": "timeout"}}}, "x", "timeout", True),
        (
            {"type": "response.failed", "response": {"error": {"message": "no"}, "error_type": "not_found"}},
            "no",
            "not_found",
            False,
        ),
        ({"type": "response.failed", "response": {"error": None}}, "", "provider", False),
        ({"type": "response.failed", "response": None}, "", "provider", False),
        ({"type": "response.done", "response": {"status": "failed", "error": {"message": "m"}}}, "m", "", 0),
    ],
)
def test_failures(payload: Json, words: str, template: str, retryable: bool) -> None:
    state = StreamState()
    emissions = reduce_event(state, payload)
    assert state.ended
    assert isinstance(emissions[-1], Failed)
    error = emissions[-1].error
    assert words in error.detail
    assert error.user_message
    assert error.template == (template or "provider")
    assert error.retryable == bool(retryable)


def test_usage_of_a_failed_call_is_reported() -> None:
    payload = {"response": {"error": {"message": "late"}, "usage": {"input_tokens": 3}}}
    emissions = reduce_event(StreamState(), event("response.failed", **payload))
    assert [type(emission) for emission in emissions] == [UsageReported, Failed]


@pytest.mark.parametrize("usage", [None, [], "5", 5])
def test_usage_that_is_none(usage: Any) -> None:
    emissions = reduced([event("response.completed", response={"output": [], "usage": usage})])
    assert [type(emission) for emission in emissions] == [TurnEnded]


@pytest.mark.parametrize(
    ("annotation", "title"),
    [
        ({"type": "url_citation", "url": "https://a.example/x", "title": "A"}, "A"),
        ({"type": "url_citation", "url": "https://a.example/x"}, "a.example"),
        ({"type": "url_citation", "url": "https://a.example/x", "title": ""}, "a.example"),
        ({"type": "url_citation", "url": "http://[broken", "title": None}, "http://[broken"),
        ({"type": "url_citation", "url": ""}, None),
        ({"type": "url_citation"}, None),
        ({"type": "file_citation", "file_id": "f", "url": "https://a.example/x"}, None),
        ("text", None),
    ],
)
def test_citations(annotation: Any, title: str | None) -> None:
    stream = [event("response.output_text.annotation.added", output_index=0, annotation=annotation)] * 2
    titles = [emission.title for emission in reduced(stream) if isinstance(emission, CitationFound)]
    assert titles == ([title] if title else [])


def test_unknown_types_are_counted() -> None:
    state = StreamState()
    for kind in ("response.future.thing", "response.future_call.began", "response.future.thing", ""):
        assert reduce_event(state, event(kind)) == []
    assert state.unknown["response.future.thing"] == 2
    assert state.unknown["response.future_call.began"] == 1
    assert sum(state.unknown.values()) == 4
    assert not state.ended


@pytest.mark.parametrize("name", NAMES)
def test_nothing_recorded_is_unknown(name: str) -> None:
    state = StreamState()
    reduce_events(state, events(name))
    assert not state.unknown


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        (
            {"type": "web_search_call", "status": "completed", "action": {"query": "q"}},
            ServerToolProgress("web_search_call", "completed", "q"),
        ),
        (
            {"type": "openrouter:web_search", "status": "failed"},
            ServerToolProgress("openrouter:web_search", "failed"),
        ),
        ({"type": "openrouter:new", "action": "none"}, ServerToolProgress("openrouter:new", "completed")),
    ],
)
def test_server_tools(item: Json, expected: ServerToolProgress) -> None:
    state = StreamState()
    added = event("response.output_item.added", output_index=0, item={"type": item["type"], "id": "i"})
    done = event("response.output_item.done", output_index=0, item=item)
    assert reduce_event(state, added) == [ServerToolProgress(item["type"], "in_progress")]
    assert reduce_event(state, done) == [expected]
    assert reduce_event(state, done) == []


@pytest.mark.parametrize("kind", ["web_search_call", "openrouter:web_search"])
def test_what_a_server_tool_looks_for_is_known_while_it_runs(kind: str) -> None:
    item = {"type": kind, "id": "w", "status": "in_progress", "action": {"type": "search", "query": "cats"}}
    assert reduce_event(StreamState(), added(item)) == [ServerToolProgress(kind, "in_progress", "cats")]


def test_the_payload_of_a_closed_item_is_the_providers_own() -> None:
    item = {"type": "reasoning", "id": "rs", "summary": [], "signature": "s", "format": "f", "new": [1]}
    added = {"type": "reasoning", "id": "rs", "summary": [], "status": "in_progress"}
    stream = [
        event("response.output_item.added", output_index=0, item=added),
        event("response.output_item.done", output_index=0, item=item),
    ]
    (closed,) = [emission for emission in reduced(stream) if isinstance(emission, ItemClosed)]
    assert closed.kind == "reasoning"
    assert closed.payload.items() >= item.items()


# Anything at all

SCALARS: Final = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 3), st.floats(allow_nan=False), st.text(max_size=4)
)
JSON: Final = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
TYPES: Final = st.sampled_from(
    [
        "message",
        "reasoning",
        "function_call",
        "image_generation_call",
        "output_text",
        "refusal",
        "url_citation",
        "summary_text",
        "reasoning_text",
        "openrouter:image_generation",
        "openrouter:x",
        "web_search_call",
    ]
)
PART: Final = st.fixed_dictionaries(
    {},
    optional={"type": TYPES | JSON, "text": JSON, "refusal": JSON, "annotations": JSON, "url": JSON},
)
ITEM: Final = st.fixed_dictionaries(
    {},
    optional={
        "type": TYPES | JSON,
        "id": st.sampled_from(["a", "b"]) | JSON,
        "content": st.lists(PART, max_size=2) | JSON,
        "summary": st.lists(PART | st.text(max_size=3), max_size=2) | JSON,
        "arguments": JSON,
        "name": JSON,
        "call_id": JSON,
        "result": JSON,
        "action": JSON,
        "status": JSON,
    },
)
RESPONSE: Final = st.fixed_dictionaries(
    {},
    optional={
        "output": st.lists(ITEM | JSON, max_size=3) | JSON,
        "usage": JSON,
        "error": JSON,
        "error_type": JSON,
        "status": JSON,
        "incomplete_details": JSON,
    },
)
PAYLOAD: Final = st.fixed_dictionaries(
    {},
    optional={
        "output_index": st.integers(0, 2) | JSON,
        "item_id": st.sampled_from(["a", "b"]) | JSON,
        "content_index": st.integers(0, 1) | JSON,
        "summary_index": st.integers(0, 1) | JSON,
        "delta": st.text(max_size=3) | JSON,
        "text": JSON,
        "arguments": JSON,
        "item": ITEM | JSON,
        "part": PART | JSON,
        "annotation": PART | JSON,
        "response": RESPONSE | JSON,
        "error": JSON,
        "code": JSON,
        "message": JSON,
    },
)
KINDS: Final = st.sampled_from([*sorted(_REDUCERS), "", "response.unknown.delta"])
STREAM: Final = st.lists(
    st.builds(lambda kind, payload: {"type": kind, **payload}, KINDS, PAYLOAD), max_size=12
)


@settings(max_examples=300, deadline=None)
@given(stream=STREAM)
def test_no_stream_raises_and_every_stream_ends_once(stream: Events) -> None:
    for reduce in (reduced, singly):
        emissions = reduce(stream)
        assert [isinstance(emission, ENDS) for emission in emissions].count(True) == 1
        assert isinstance(emissions[-1], ENDS)


TEXTS: Final = (TextDelta, RefusalDelta, ReasoningDelta)


def _texts(emissions: Iterable[Emission]) -> dict[tuple[type, int, int], str]:
    found: dict[tuple[type, int, int], str] = {}
    for emission in emissions:
        if isinstance(emission, TEXTS):
            place = (type(emission), emission.item, getattr(emission, "part", 0))
            found[place] = found.get(place, "") + emission.text
    return {place: text for place, text in found.items() if text}


@settings(max_examples=300, deadline=None)
@given(stream=STREAM)
def test_joined_and_single_reductions_agree(stream: Events) -> None:
    whole, single = reduced(stream), singly(stream)
    assert _texts(whole) == _texts(single)
    rest = [[e for e in es if not isinstance(e, TEXTS)] for es in (whole, single)]
    assert [type(emission) for emission in rest[0]] == [type(emission) for emission in rest[1]]


# Usage

NUMBERS: Final = st.integers(-(10**6), 10**6)
USAGE: Final = st.fixed_dictionaries(
    {},
    optional={
        "input_tokens": NUMBERS,
        "output_tokens": NUMBERS,
        "input_tokens_details": st.fixed_dictionaries({}, optional={"cached_tokens": NUMBERS}),
        "cost_details": st.fixed_dictionaries(
            {}, optional={"a": NUMBERS, "b": st.fixed_dictionaries({}, optional={"c": NUMBERS})}
        ),
    },
)


@given(first=USAGE, second=USAGE, third=USAGE)
def test_usage_adds_up_in_any_order(first: Json, second: Json, third: Json) -> None:
    merge = _merge_usage_stats
    assert merge(merge(first, second), third) == merge(first, merge(second, third))
    assert merge(first, second) == merge(second, first)
    assert merge(first, {}) == merge({}, first) == first


@given(first=USAGE, second=USAGE)
def test_usage_is_not_changed_by_adding(first: Json, second: Json) -> None:
    before = copy.deepcopy((first, second))
    merged = _merge_usage_stats(first, second)
    _merge_usage_stats(merged, second)
    assert (first, second) == before


@pytest.mark.parametrize(
    ("first", "second", "merged"),
    [
        ({"cost": None}, {"cost": 2}, {"cost": 2}),
        ({"cost": 2}, {"cost": None}, {"cost": 2}),
        ({"cost": None}, {"cost": None}, {"cost": None}),
        ({}, {"cost": None}, {"cost": None}),
        ({"cost": 0.5}, {"cost": 0.25}, {"cost": 0.75}),
        ({"is_byok": False}, {"is_byok": True}, {"is_byok": True}),
        ({"is_byok": True}, {"is_byok": True}, {"is_byok": True}),
        ({"n": True}, {"n": 2}, {"n": 2}),
        ({"d": {"a": 1}}, {"d": None}, {"d": {"a": 1}}),
        ({"d": None}, {"d": {"a": 1}}, {"d": {"a": 1}}),
        ({"d": 3}, {"d": {"a": 1}}, {"d": {"a": 1}}),
        ({"d": {"a": 1, "b": 2}}, {"d": {"b": 3, "c": 4}}, {"d": {"a": 1, "b": 5, "c": 4}}),
        ({"tier": "a"}, {"tier": "b"}, {"tier": "b"}),
    ],
)
def test_usage_that_does_not_fit(first: Json, second: Json, merged: Json) -> None:
    result = _merge_usage_stats(first, second)
    assert result == merged
    assert [type(value) for value in result.values()] == [type(value) for value in merged.values()]


def test_usage_of_two_recorded_calls() -> None:
    first, second = (said(reduced(events(name))).usages[0] for name in ("04_function_call", "01_plain_text"))
    merged = _merge_usage_stats(first, second)
    assert merged["input_tokens"] == 96 + 18
    assert merged["output_tokens_details"] == {"reasoning_tokens": 0}
    assert merged["cost"] == pytest.approx(7.2e-05 + 4.65e-05)
    assert merged["cost_details"]["upstream_inference_cost"] is None
    assert merged["is_byok"] is False


@pytest.mark.parametrize("parts", [["Hello world"], ["Hello ", "world"], ["Hel", "lo wor", "ld"]])
@pytest.mark.parametrize("done", [True, False])
def test_text_is_not_said_again_however_its_parts_are_numbered(parts: list[str], done: bool) -> None:
    """Deltas all in part 0, the finished item and the final object in several parts."""
    place = {"output_index": 0, "item_id": "m", "content_index": 0}
    content = [{"type": "output_text", "text": text, "annotations": []} for text in parts]
    item = {"type": "message", "id": "m", "status": "completed", "content": content}
    stream = [
        event("response.output_item.added", output_index=0, item={**item, "content": []}),
        event("response.output_text.delta", **place, delta="Hello "),
        event("response.output_text.delta", **place, delta="world"),
        *([event("response.output_item.done", output_index=0, item=item)] if done else []),
        event("response.completed", response={"output": [item]}),
    ]
    texts = [one.text for one in singly(stream) if isinstance(one, TextDelta)]
    assert "".join(texts) == "Hello world"
