"""Tools in an answer, from the question to the last word: what is run, shown, sent, saved and sent again."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from typing import Any, Final

import pytest
from test_emitters import HostPage, page_of

from openrouter_responses_pipe.openrouter_responses_pipe import Pipe
from openrouter_responses_pipe.simulator import Simulator
from tests.support import (
    DIALECTS,
    PATIENCE_S,
    SOON_S,
    Answer,
    Events,
    all_ended,
    arguments,
    call,
    completed,
    delta,
    frame,
    inferences,
    set_valves,
)
from tests.test_reasoning_replay import as_host_returns
from tests.tools import WHOLE, Crowd, entry, named, offered, schema

Json = dict[str, Any]
REASONER: Final = "openai/gpt-5-mini"
WITH_TOOLS: Final = ["browser", "browser_json", "api_stream", "api_json"]
IN_A_CHAT: Final = ["browser", "browser_json"]
SEES: Final = "openai/gpt-4o-mini"


def script(*rounds: Any, **more: Any) -> str:
    """A question that plays these rounds."""
    return f"Please [[script {json.dumps({'rounds': rounds, **more})}]] now."


def step(name: str = "add", /, **given: Any) -> Json:
    """A call in a round."""
    return {"name": name, "arguments": given}


async def add(a: int, b: int) -> str:
    """A tool."""
    return str(a + b)


async def fail() -> None:
    """A tool that is out of order."""
    raise RuntimeError("the disk is full")


def basket() -> dict[str, Json]:
    """The tools of most tests."""
    return named(
        add=entry(add, parameters=schema({"a": WHOLE, "b": WHOLE}, "a", "b")),
        fail=entry(fail),
    )


def given_for(
    prompt: str | Json, dialect: str = "browser", tools: dict[str, Json] | None = None, **more: Any
) -> Json:
    """The arguments of `pipe()` for a question with tools."""
    tools = basket() if tools is None else tools
    given = arguments(prompt, dialect, **({"tools": offered(tools)} | more))
    given["__metadata__"]["tools"] = tools
    return given | {"__tools__": tools}


async def ask(pipe: Pipe, prompt: str | Json, dialect: str = "browser", *rest: Any, **more: Any) -> Answer:
    """One question with tools, from start to end."""
    async with asyncio.timeout(PATIENCE_S):
        return await call(pipe, given_for(prompt, dialect, *rest, **more))


def items_of(answer: Answer) -> list[Json]:
    """The items as the host saves them."""
    whole = [item for chunk in answer.chunks for item in chunk.get("output", ())]
    return whole or page_of(answer.chunks).items


def kinds(items: Sequence[Json]) -> list[str]:
    """The types of items."""
    return [item["type"] for item in items]


def sent(simulator: Simulator) -> list[list[Json]]:
    """The input of every upstream call."""
    return [record.body["input"] for record in inferences(simulator)]


def answered(items: Sequence[Json]) -> dict[str, str]:
    """The text of every output, by its call."""
    return {
        item["call_id"]: "".join(part.get("text", "") for part in item["output"])
        for item in items
        if item["type"] == "function_call_output"
    }


def well_formed(items: Sequence[Json]) -> None:
    """Expect what the host needs: batches whole, ids unique, every call answered, nothing in progress."""
    ids = [item["call_id"] for item in items if item["type"] == "function_call"]
    assert len(set(ids)) == len(ids)
    assert Counter(ids) == Counter(
        item["call_id"] for item in items if item["type"] == "function_call_output"
    )
    assert len({item["id"] for item in items}) == len(items)
    waiting: list[str] = []
    outputs_began = False
    for item in items:
        if item["type"] == "function_call":
            assert not (waiting and outputs_began), "a call between the outputs of a batch"
            waiting.append(item["call_id"])
            outputs_began = False
            assert item["status"] in ("completed", "failed")
        elif item["type"] == "function_call_output":
            waiting.remove(item["call_id"])
            outputs_began = True
            assert isinstance(item["output"], list)
            assert item["status"] in ("completed", "failed")
        else:
            assert not waiting, "something stands between calls and their outputs"


# What is run and shown


@pytest.mark.parametrize("dialect", WITH_TOOLS)
async def test_a_round_of_tools(dialect: str, pipe: Pipe, simulator: Simulator) -> None:
    prompt = script([step(a=1, b=2), step("fail"), step(a=3, b=4)], final="{count}:\n{outputs}")
    answer = await ask(pipe, prompt, dialect)
    assert answer.error == ""
    assert answer.text.startswith("3:\n- 3\n- Error: RuntimeError: the disk is full\n- 7")
    assert answer.finish == ("completed" if dialect == "browser" else "stop")
    assert len(inferences(simulator)) == 2
    if dialect in IN_A_CHAT:
        items = items_of(answer)
        well_formed(items)
        expected = ["function_call"] * 3 + ["function_call_output"] * 3 + ["message"]
        assert kinds(items) == expected
        assert [item["status"] for item in items[:3]] == ["completed", "failed", "completed"]
        assert sorted(answered(items).values()) == ["3", "7", "Error: RuntimeError: the disk is full"]
    else:
        assert answer.calls == []


@pytest.mark.parametrize("dialect", WITH_TOOLS)
async def test_rounds_follow_one_another(dialect: str, pipe: Pipe, simulator: Simulator) -> None:
    rounds = [["First.", step(a=n, b=n)] for n in range(4)]
    answer = await ask(pipe, script(*rounds, final="Done: {outputs}"), dialect)
    assert (answer.error, len(inferences(simulator))) == ("", 5)
    assert answer.text.endswith("Done: - 0\n- 2\n- 4\n- 6")
    assert answer.text.count("First.") == 4
    if dialect in IN_A_CHAT:
        well_formed(items_of(answer))
        assert kinds(items_of(answer)) == ["message", "function_call", "function_call_output"] * 4 + [
            "message"
        ]


async def test_outputs_come_when_they_are_there(pipe: Pipe) -> None:
    """The second card is done while the first still runs."""
    go = asyncio.Event()

    async def slow() -> str:
        await go.wait()
        return "slow"

    async def quick() -> str:
        return "quick"

    given = given_for(
        script([step("slow"), step("quick")]), tools=named(slow=entry(slow), quick=entry(quick))
    )
    chunks = await pipe.pipe(**given)
    assert not isinstance(chunks, dict)
    page = HostPage()
    async with asyncio.timeout(PATIENCE_S):
        async for chunk in chunks:
            page.apply(chunk)
            if "quick" in answered(page.items).values() and not go.is_set():
                assert "slow" not in answered(page.items).values()
                go.set()
    assert sorted(answered(page.items).values()) == ["quick", "slow"]
    well_formed(page.items)


def usage(number: int) -> Json:
    """What an upstream call has used."""
    return {"input_tokens": 1000 * number, "output_tokens": 10 * number, "cost": 0.25 * number}


def stream_of(*calls: Json, usage: Json | None = None, ends: bool = True) -> str:
    """A stream that makes calls, whatever is offered, and may break off after them."""
    frames: list[bytes] = []
    for index, wanted in enumerate(calls):
        item: Json = {"type": "function_call", "id": f"fc_{index}", "call_id": f"call_{index}"} | wanted
        item["arguments"] = json.dumps(item["arguments"])
        begun = {**item, "arguments": "", "status": "in_progress"}
        frames.append(frame("response.output_item.added", output_index=index, item=begun))
        frames.append(frame("response.output_item.done", output_index=index, item=item))
    return b"".join([*frames, *([completed(usage=usage or {})] if ends else [])]).decode()


@pytest.mark.parametrize("dialect", WITH_TOOLS)
async def test_usage_of_every_upstream_call_counts_once(
    dialect: str, pipe: Pipe, simulator: Simulator
) -> None:
    for number in (1, 2):
        simulator.next("replay", body=stream_of(step(a=1, b=2), usage=usage(number)))
    simulator.next("replay", body=(delta("Done.") + completed(usage=usage(3))).decode())
    given = given_for("hello", dialect)
    answer = await call(pipe, given)
    assert (answer.text, answer.error) == ("Done.", "")
    if dialect == "browser":
        reported = [
            chunk["response"]["usage"] for chunk in answer.chunks if chunk.get("type") == "response.completed"
        ]
        assert reported == [usage(1), usage(2), usage(3)]
    else:
        assert answer.usage is not None
        names = ("prompt_tokens", "completion_tokens")
        if dialect in IN_A_CHAT:
            names = ("input_tokens", "output_tokens")
        assert [answer.usage[name] for name in (*names, "cost")] == [6000, 60, 1.5]
    if dialect in IN_A_CHAT:
        last = given["__event_emitter__"].statuses()[-1]
        assert "6,000 tokens in" in last
        assert "60 out" in last
        assert "$1.50" in last


@pytest.mark.parametrize("dialect", WITH_TOOLS)
async def test_ids_that_a_provider_uses_again_are_renamed(
    dialect: str, pipe: Pipe, simulator: Simulator
) -> None:
    same = {**step(a=1, b=1), "call_id": "call_0"}
    for calls in ([same, same], [same]):
        simulator.next("replay", body=stream_of(*calls))
    simulator.next("plain", text="Done.")
    answer = await ask(pipe, "hello", dialect)
    assert (answer.error, answer.text) == ("", "Done.")
    last = sent(simulator)[-1]
    ids = [item["call_id"] for item in last if item["type"] == "function_call"]
    assert len(ids) == len(set(ids)) == 3
    assert ids == [item["call_id"] for item in last if item["type"] == "function_call_output"]
    if dialect in IN_A_CHAT:
        well_formed(items_of(answer))
        assert [item["call_id"] for item in items_of(answer) if item["type"] == "function_call"] == ids


async def test_an_id_of_an_earlier_answer_is_renamed(pipe: Pipe, simulator: Simulator) -> None:
    earlier = {"id": "call_0", "type": "function", "function": {"name": "add", "arguments": '{"a":1,"b":1}'}}
    messages = [
        {"role": "user", "content": "add"},
        {"role": "assistant", "content": "", "tool_calls": [earlier]},
        {"role": "tool", "tool_call_id": "call_0", "content": "2"},
        {"role": "assistant", "content": "Two."},
        {"role": "user", "content": script([{**step(a=2, b=2), "call_id": "call_0"}])},
    ]
    answer = await ask(pipe, {"messages": messages})
    (item,) = [item for item in items_of(answer) if item["type"] == "function_call"]
    assert item["call_id"] != "call_0"
    outputs = {i["call_id"]: i["output"] for i in sent(simulator)[-1] if i["type"] == "function_call_output"}
    assert outputs == {"call_0": "2", item["call_id"]: "4"}


# What is sent


async def test_the_second_request_holds_everything_in_order(pipe: Pipe, simulator: Simulator) -> None:
    first = [{"reasoning": ["One", "Two"]}, "Let me see.", step(a=1, b=2), step("fail")]
    second = [{"thinking": "Raw"}, step(a=3, b=4)]
    answer = await ask(pipe, script(first, second, final="Done."), model=f"openrouter.{REASONER}")
    assert answer.error == ""
    one, two, three = sent(simulator)
    assert two[: len(one)] == one
    assert three[: len(two)] == two
    expected = ["reasoning", "message", "function_call", "function_call", *["function_call_output"] * 2]
    assert kinds(two[len(one) :]) == expected
    reasoning, message = two[len(one) : len(one) + 2]
    assert [part["text"] for part in reasoning["summary"]] == ["One", "Two"]
    assert reasoning["encrypted_content"]
    assert message["content"] == "Let me see."
    assert [item["output"][:9] for item in two[-2:]] == ["3", "Error: Ru"]
    assert [item["call_id"] for item in two[-2:]] == [item["call_id"] for item in two[-4:-2]]
    assert kinds(three[len(two) :]) == ["reasoning", "function_call", "function_call_output"]
    assert three[len(two)]["content"][0]["text"] == "Raw"
    assert three[len(two)]["signature"]


async def test_outputs_are_sent_in_the_order_of_their_calls(pipe: Pipe, simulator: Simulator) -> None:
    done = [asyncio.Event() for _ in range(5)]
    done[4].set()

    async def in_turn(n: int) -> str:
        await done[n].wait()
        if n:
            done[n - 1].set()
        return f"output {n}"

    tools = named(in_turn=entry(in_turn, parameters=schema({"n": WHOLE})))
    await ask(pipe, script([step("in_turn", n=n) for n in range(5)]), "browser", tools)
    assert [item["output"] for item in sent(simulator)[1][-5:]] == [f"output {n}" for n in range(5)]


SECOND: Final = "What else?"
REPLAYED: Final[dict[str, list[Any]]] = {
    "one call": [[step(a=1, b=2)]],
    "several": [[step(a=1, b=2), step("fail"), step(a=3, b=4)]],
    "rounds": [[step(a=1, b=2)], [step("fail"), step(a=1, b=1)], [step(a=5, b=5)]],
    "words before": [["Let me see.", step(a=1, b=2)], ["And now.", step(a=1, b=2)]],
    "words with spaces": [["  Let me see.\n\n", step(a=1, b=2)]],
    "several words": [["One.", "Two.", step(a=1, b=2)]],
    "words after a call": [[step(a=1, b=2), "That was that.", step(a=2, b=2)]],
    "thoughts": [[{"reasoning": "Hm"}, step(a=1, b=2)], [{"thinking": "Raw"}, "So.", step(a=1, b=3)]],
    "thoughts between": [[{"reasoning": "Hm"}, step(a=1, b=2), {"reasoning": "Or"}, step(a=2, b=2)]],
    "no thoughts": [[{"reasoning": False}, step(a=1, b=2)], [{"reasoning": False}, step(a=1, b=3)]],
    "empty arguments": [[{"name": "fail", "arguments": ""}]],
    "spaces in arguments": [[{"name": "add", "arguments": ' {"b": 1,\n "a": 2} '}]],
    "broken arguments": [[{"name": "add", "arguments": '{"a": 1'}]],
    "nobody's": [[step("nobody"), step(a=1, b=2)]],
    "the same again": [[step(a=1, b=2)], [step(a=1, b=2)], [step(a=1, b=2)], [step(a=1, b=2)]],
    "nothing": [[step("nothing")]],
    "long": [[step("write", length=5000)]],
    "at the limit, repeated": [[step("write", length=1000)]] * 4,
    "over the limit, repeated": [[step("write", length=3000)]] * 4,
    "spaces": [[step("space")]],
    "half a character": [[step("half")]],
    "odd name": [[step("get_user_x", a=1, b=1)]],
}


async def nothing() -> None:
    """A tool without an output."""


async def write(length: int) -> str:
    """A tool with a long output."""
    return "".join(chr(97 + n % 26) for n in range(length))


async def space() -> str:
    """A tool whose output begins and ends with spaces."""
    return "\n  spaces \t\n"


async def half() -> str:
    """A tool whose output was cut in an emoji."""
    return "half a character: \ud83d"


@pytest.mark.parametrize("dialect", IN_A_CHAT)
@pytest.mark.parametrize(
    ("model", "case"),
    # a model that does not reason gets its thoughts back within its round only
    [
        (model, case)
        for model in (SEES, REASONER)
        for case in sorted(REPLAYED)
        if (model, case) != (SEES, "thoughts")
    ],
)
async def test_the_next_turn_sends_the_same_again(
    case: str, model: str, dialect: str, pipe: Pipe, simulator: Simulator
) -> None:
    """Byte for byte, so that a provider's cache of the chat is of use."""
    set_valves(pipe, simulator.base_url, MAX_TOOL_OUTPUT_CHARS=1000)
    tools = basket() | named(
        nothing=entry(nothing),
        write=entry(write, parameters=schema({"length": WHOLE})),
        space=entry(space),
        half=entry(half),
        **{"get.user/x": entry(add, parameters=schema({"a": WHOLE, "b": WHOLE}))},
    )
    question = {"role": "user", "content": script(*REPLAYED[case], final="Done.")}
    more = {"model": f"openrouter.{model}"}
    answer = await ask(pipe, {"messages": [question]}, dialect, tools, **more)
    assert (answer.error, answer.text.endswith("Done.")) == ("", True)
    last = sent(simulator)[-1]
    items = items_of(answer)
    well_formed(items)
    messages = [question, *as_host_returns(items), {"role": "user", "content": SECOND}]
    await ask(pipe, {"messages": messages}, dialect, tools, **more)
    again = sent(simulator)[-1]
    assert [json.dumps(item) for item in again[: len(last)]] == [json.dumps(item) for item in last]
    assert again[-1]["content"][0]["text"] == SECOND
    assert [item["type"] for item in again[len(last) : -1]][-1:] == ["message"]


async def test_the_next_turn_of_ten_is_the_same(pipe: Pipe, simulator: Simulator) -> None:
    """Ten turns with tools: each request begins with the one before it."""
    messages: list[Json] = []
    before: list[str] = []
    for number in range(10):
        rounds = [[{"reasoning": f"Thought {number}"}, "So.", step(a=number, b=1), step("fail")]] * 2
        messages.append({"role": "user", "content": script(*rounds, final=f"Answer {number}")})
        answer = await ask(pipe, {"messages": messages}, model=f"openrouter.{REASONER}")
        messages += as_host_returns(items_of(answer))
        for items in sent(simulator)[-3:]:
            now = [json.dumps(item) for item in items]
            assert now[: len(before)] == before
            before = now


# Rounds without end


@pytest.mark.parametrize("dialect", WITH_TOOLS)
async def test_there_are_only_so_many_rounds(dialect: str, pipe: Pipe, simulator: Simulator) -> None:
    set_valves(pipe, simulator.base_url, MAX_FUNCTION_CALL_LOOPS=3)
    given = given_for(script([step(a=1, b=2)], endless=True, final="Enough."), dialect)
    answer = await call(pipe, given)
    assert (answer.text, answer.error) == ("Enough.", "")
    bodies = [record.body for record in inferences(simulator)]
    assert [body.get("tool_choice") for body in bodies] == [None] * 4 + ["none"]
    outputs = [item["output"] for item in bodies[-1]["input"] if item["type"] == "function_call_output"]
    assert outputs[:2] == ["3", "3"]
    assert len(outputs) == 4
    assert outputs[3].startswith("Error: this call was not run")
    if dialect in IN_A_CHAT:
        well_formed(items_of(answer))
        statuses = given["__event_emitter__"].statuses()
        assert "Stopped after 3 rounds of tools" in statuses[-1]
        assert given["__event_emitter__"].of("notification")


@pytest.mark.parametrize("dialect", WITH_TOOLS)
async def test_a_model_that_calls_all_the_same_gets_no_more(
    dialect: str, pipe: Pipe, simulator: Simulator
) -> None:
    set_valves(pipe, simulator.base_url, MAX_FUNCTION_CALL_LOOPS=2)
    simulator.next("tool", times=math.inf, rounds=math.inf, name="add", args={"a": 1, "b": 2})
    answer = await ask(pipe, "hello", dialect)
    assert len(inferences(simulator)) == 4
    assert answer.error == ""
    if dialect in IN_A_CHAT:
        well_formed(items_of(answer))
        assert len(answered(items_of(answer))) == 3
    else:
        assert (answer.calls, answer.finish) == ([], "stop")


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "add"}}], ids=str)
async def test_a_forced_call_is_forced_once(choice: Any, pipe: Pipe, simulator: Simulator) -> None:
    answer = await ask(pipe, script([step(a=1, b=2)], final="Done."), tool_choice=choice)
    assert answer.text == "Done."
    first, second = [record.body.get("tool_choice") for record in inferences(simulator)]
    assert first == ("required" if choice == "required" else {"type": "function", "name": "add"})
    assert second in (None, "auto")


async def test_no_choice_stays_no_choice(pipe: Pipe, simulator: Simulator) -> None:
    answer = await ask(pipe, script([step(a=1, b=2)], final="Done."), tool_choice="none")
    assert answer.text == "Done."
    assert len(inferences(simulator)) == 1


async def test_over_chat_completions_the_last_turn_has_no_choice(pipe: Pipe, simulator: Simulator) -> None:
    set_valves(pipe, simulator.base_url, MAX_FUNCTION_CALL_LOOPS=1, FORCE_CHAT_COMPLETIONS_MODELS="*")
    answer = await ask(pipe, script([step(a=1, b=2)], endless=True, final="Enough."))
    bodies = [r.body for r in simulator.requests if r.path.endswith("/chat/completions")]
    assert [body.get("tool_choice") for body in bodies] == [None, None, "none"]
    assert (answer.text, answer.error) == ("Enough.", "")
    well_formed(items_of(answer))


# Who runs what


def host_tools() -> dict[str, Json]:
    """Tools that only the host can run, beside one that is run here."""

    async def never() -> None:
        raise AssertionError("it must not be called here")

    tools = basket() | named(
        ask_user={**entry(never), "tool_id": "builtin:ask_user", "type": "builtin"},
        delegate_task={**entry(never), "tool_id": "builtin:delegate_task", "type": "builtin"},
        call_tool={**entry(never), "tool_id": "builtin:call_tool", "type": "builtin"},
        of_page={**entry(never), "direct": True, "server": {"url": "http://127.0.0.1:1"}},
    )
    for name in ("call_tool", "of_page"):
        del tools[name]["callable"]
    return tools


FOR_THE_HOST: Final = ["ask_user", "delegate_task", "call_tool", "of_page"]


@pytest.mark.parametrize("name", FOR_THE_HOST)
async def test_of_a_mixed_batch_the_hosts_calls_stay_open(
    name: str, pipe: Pipe, simulator: Simulator
) -> None:
    answer = await ask(pipe, script([step(a=1, b=2), step(name), step("fail")]), "browser", host_tools())
    items = items_of(answer)
    assert (kinds(items)[:3], len(inferences(simulator))) == (["function_call"] * 3, 1)
    names = {item["call_id"]: item["name"] for item in items if item["type"] == "function_call"}
    assert sorted(names[call_id] for call_id in answered(items)) == ["add", "fail"]
    (still_open,) = [i for i in items if i.get("name") == name]
    assert still_open["status"] == "completed"
    assert answer.error == ""


@pytest.mark.parametrize("name", FOR_THE_HOST)
async def test_where_nobody_runs_them_they_are_not_offered(
    name: str, pipe: Pipe, simulator: Simulator
) -> None:
    answer = await ask(pipe, script([step(a=1, b=2)]), "browser_json", host_tools())
    offered_names = [tool["name"] for tool in inferences(simulator)[0].body["tools"]]
    assert offered_names == ["add", "fail"]
    assert answer.error == ""


@pytest.mark.parametrize("name", [*FOR_THE_HOST, "nobody"])
async def test_no_call_stays_open_where_nobody_runs_it(name: str, pipe: Pipe, simulator: Simulator) -> None:
    """A model may call what it was not offered; a chat without streaming has no host behind it."""
    answer = await ask(
        pipe, script([step(a=1, b=2), step(name)], final="Done."), "browser_json", host_tools()
    )
    well_formed(items_of(answer))
    assert answer.text.endswith("Done.")


async def test_a_tool_that_nobody_has(pipe: Pipe, simulator: Simulator) -> None:
    answer = await ask(pipe, script([step("nobody"), step(a=1, b=2)], final="{outputs}"))
    well_formed(items_of(answer))
    assert "no tool called “nobody”" in answer.text
    assert "- 3" in answer.text


@pytest.mark.parametrize("dialect", ["api_stream", "api_json"])
async def test_a_program_that_has_the_servers_tools_is_told_of_none_that_nobody_has(
    dialect: str, pipe: Pipe
) -> None:
    """It gave no tools of its own, so there is nothing that it could run."""
    answer = await ask(pipe, script([step("nobody"), step(a=1, b=2)], final="{outputs}"), dialect)
    assert answer.calls == []
    assert "no tool called" in answer.text


@pytest.mark.parametrize("dialect", ["api_stream", "api_json"])
async def test_a_programs_own_tools_are_handed_back(dialect: str, pipe: Pipe, simulator: Simulator) -> None:
    given = given_for(script([step(a=1, b=2), step("fail")]), dialect, {})
    given["body"]["tools"] = offered(basket())
    answer = await call(pipe, given)
    assert [item["name"] for item in answer.calls] == ["add", "fail"]
    assert (answer.finish, len(inferences(simulator))) == ("tool_calls", 1)


@pytest.mark.parametrize("mode", ["auto", "pipe", "open_webui"])
async def test_a_person_who_wants_to_be_asked_is_asked(mode: str, pipe: Pipe, simulator: Simulator) -> None:
    set_valves(pipe, simulator.base_url, TOOL_EXECUTION_MODE=mode)
    given = given_for(script([step(a=1, b=2), step("fail"), step("nobody")]))
    given["__metadata__"]["params"] = {"tool_approval_mode": "ask"}
    answer = await call(pipe, given)
    # what nobody has is answered at once
    assert kinds(items_of(answer)) == [*["function_call"] * 3, "function_call_output"]
    assert len(inferences(simulator)) == 1


async def test_without_a_page_to_ask_nothing_is_offered(pipe: Pipe, simulator: Simulator) -> None:
    given = given_for(script([step(a=1, b=2)], final="Done."), "browser_json")
    given["__metadata__"]["params"] = {"tool_approval_mode": "ask"}
    answer = await call(pipe, given)
    assert (answer.text, "tools" in inferences(simulator)[0].body) == ("Done.", False)


async def test_open_webui_runs_them_if_it_shall(pipe: Pipe, simulator: Simulator) -> None:
    set_valves(pipe, simulator.base_url, TOOL_EXECUTION_MODE="open_webui")
    question = {"role": "user", "content": script(["So.", step(a=1, b=2), step("fail")], final="Done.")}
    more = {"model": f"openrouter.{REASONER}"}
    items = items_of(await ask(pipe, {"messages": [question]}, **more))
    assert kinds(items) == ["reasoning", "message", "function_call", "function_call"]
    outputs = [
        {"type": "function_call_output", "call_id": item["call_id"], "output": [{"text": item["name"]}]}
        for item in items[2:]
    ]
    answer = await ask(pipe, {"messages": [question, *as_host_returns([*items, *outputs])]}, **more)
    assert answer.text == "Done."
    last = sent(simulator)[-1]
    assert kinds(last)[1:] == kinds(items) + ["function_call_output"] * 2
    assert last[1]["encrypted_content"]


@pytest.mark.parametrize("dialect", ["api_stream", "api_json"])
async def test_for_a_program_they_are_run_here_whatever_the_mode(
    dialect: str, pipe: Pipe, simulator: Simulator
) -> None:
    set_valves(pipe, simulator.base_url, TOOL_EXECUTION_MODE="open_webui")
    assert (await ask(pipe, script([step(a=1, b=2)], final="{outputs}"), dialect)).text == "- 3"


async def test_the_pipe_asks_the_page_if_it_shall(pipe: Pipe, simulator: Simulator) -> None:
    set_valves(pipe, simulator.base_url, TOOL_EXECUTION_MODE="pipe")
    asked: list[Json] = []

    async def page(event: Json) -> Any:
        asked.append(event)
        return [{"from": "the page"}, {}]

    given = given_for(script([step("of_page"), step(a=1, b=2)], final="{outputs}"), tools=host_tools())
    answer = await call(pipe, given | {"__event_call__": page})
    assert [event["type"] for event in asked] == ["execute:tool"]
    assert "the page" in answer.text
    well_formed(items_of(answer))


@pytest.mark.parametrize("dialect", ["task", "task_stream"])
async def test_a_task_runs_no_tools(dialect: str, pipe: Pipe, simulator: Simulator) -> None:
    ran: list[int] = []

    async def note() -> str:
        ran.append(1)
        return "ran"

    tools = named(note=entry(note))
    simulator.next("replay", body=stream_of(step("note")), tasks=True)
    simulator.next("plain", text="A title", tasks=True)
    await ask(pipe, "Name this chat", dialect, tools)
    assert ran == []


SWITCHES: Final[dict[str, Json]] = {
    "off": {"ENABLE_TOOLS": False},
    "others only": {"AVAILABLE_TOOLS": "get_*, add"},
}


@pytest.mark.parametrize("dialect", WITH_TOOLS)
@pytest.mark.parametrize("case", sorted(SWITCHES))
async def test_what_may_not_be_offered_is_not_run(
    case: str, dialect: str, pipe: Pipe, simulator: Simulator
) -> None:
    """A model may call what it was not offered: it saw it in the chat, or a page told it to."""
    ran: list[int] = []

    async def delete_all() -> str:
        ran.append(1)
        return "gone"

    set_valves(pipe, simulator.base_url, **SWITCHES[case])
    simulator.next("replay", body=stream_of(step("delete_all")))
    await ask(pipe, "hello", dialect, basket() | named(delete_all=entry(delete_all)))
    names = [tool["name"] for tool in inferences(simulator)[0].body.get("tools", [])]
    assert "delete_all" not in names
    assert ran == []


async def test_a_person_can_switch_tools_off(pipe: Pipe, simulator: Simulator) -> None:
    given = given_for("hello")
    given["__user__"]["valves"] = pipe.UserValves(ENABLE_TOOLS="off")
    await call(pipe, given)
    assert "tools" not in inferences(simulator)[0].body


async def test_a_model_that_takes_no_tools_gets_none(pipe: Pipe, simulator: Simulator) -> None:
    simulator.configure(catalog=[{"id": "a/b", "name": "B", "supported_parameters": ["temperature"]}])
    answer = await ask(pipe, "hello", model="openrouter.a/b")
    assert (answer.error, "tools" in inferences(simulator)[0].body) == ("", False)


async def test_tools_of_two_names_that_become_one(pipe: Pipe, simulator: Simulator) -> None:
    """Each is called by its own name, in the loop and when the chat goes on."""
    ran: list[str] = []

    def note(name: str) -> Any:
        async def run() -> str:
            ran.append(name)
            return name

        return run

    names = ["get.user", "get_user", "get/user"]
    tools = named(**{name: entry(note(name)) for name in names})
    first = given_for("hello", tools=tools)
    await call(pipe, first)
    sent_names = [tool["name"] for tool in inferences(simulator)[0].body["tools"]]
    assert len(set(sent_names)) == 3
    question = {"role": "user", "content": script([step(name) for name in sent_names], final="Done.")}
    answer = await ask(pipe, {"messages": [question]}, "browser", tools)
    items = items_of(answer)
    assert sorted(ran) == sorted(names)
    assert [item["name"] for item in items if item["type"] == "function_call"] == names
    in_loop = [item["name"] for item in sent(simulator)[-1] if item["type"] == "function_call"]
    assert in_loop == sent_names
    messages = [question, *as_host_returns(items), {"role": "user", "content": SECOND}]
    await ask(pipe, {"messages": messages}, "browser", tools)
    later = [item["name"] for item in sent(simulator)[-1] if item["type"] == "function_call"]
    assert later == sent_names


# Failures


FAILURES: Final = ["http_error", "failed", "abrupt", "eof", "failed_first"]


@pytest.mark.parametrize("dialect", IN_A_CHAT)
@pytest.mark.parametrize("scenario", FAILURES)
async def test_what_was_done_stays_when_the_next_upstream_call_fails(
    scenario: str, dialect: str, pipe: Pipe, simulator: Simulator
) -> None:
    simulator.next("script", times=1, rounds=[["Let me see.", step(a=1, b=2), step("fail")]])
    simulator.next(scenario)
    answer = await ask(pipe, "hello", dialect)
    items = items_of(answer)
    well_formed(items)
    assert answer.error
    assert kinds(items)[:5] == ["message", *["function_call"] * 2, *["function_call_output"] * 2]
    assert items[0]["content"][0]["text"] == "Let me see."


@pytest.mark.parametrize("dialect", WITH_TOOLS)
async def test_another_try_within_a_turn_runs_nothing_twice(
    dialect: str, pipe: Pipe, simulator: Simulator
) -> None:
    set_valves(pipe, simulator.base_url, RETRY_ATTEMPTS=2)
    ran: list[int] = []

    async def note() -> str:
        ran.append(1)
        return "ran"

    simulator.next("script", times=1, rounds=[[step("note")]])
    simulator.next("http_error", name="503_no_provider", retry_after=0)
    simulator.next("failed_first")
    simulator.next("script", times=1, rounds=[[step("note")], [step("note")]])
    simulator.next("plain", text="Done.")
    answer = await ask(pipe, "hello", dialect, named(note=entry(note)))
    assert (answer.error, answer.text, ran) == ("", "Done.", [1, 1])
    if dialect in IN_A_CHAT:
        well_formed(items_of(answer))


async def test_calls_of_a_try_that_failed_are_not_run(pipe: Pipe, simulator: Simulator) -> None:
    set_valves(pipe, simulator.base_url, RETRY_ATTEMPTS=2)
    ran: list[str] = []

    async def note(n: int) -> str:
        ran.append(str(n))
        return "ran"

    simulator.next("replay", body=stream_of(step("note", n=1), step("note", n=2), ends=False))
    simulator.next("replay", body=stream_of(step("note", n=3)))
    simulator.next("plain", text="Done.")
    answer = await ask(pipe, "hello", "browser", named(note=entry(note, parameters=schema({"n": WHOLE}))))
    assert ran in (["3"], [])
    well_formed(items_of(answer))
    assert len(answered(items_of(answer))) == len(ran)


class Stage:
    """A tool that waits until the test lets it go, and how it ended."""

    def __init__(self) -> None:
        self.begun, self.go, self.ended = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self.answered = asyncio.Event()  # another call of the round
        self.cancelled = False

    async def __call__(self) -> str:
        """Wait."""
        self.begun.set()
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            self.cancelled = True
            raise
        finally:
            self.ended.set()
        return "went"

    @property
    def tools(self) -> dict[str, Json]:
        """The tool, beside others."""

        async def wait() -> str:
            return await self()

        return basket() | named(wait=entry(wait))


async def begun(
    pipe: Pipe, stage: Stage, given: Json
) -> tuple[AsyncIterator[Json], HostPage, asyncio.Task[Any]]:
    """An answer whose tool runs: its chunks, what the page has of it, and the reader."""
    chunks = await pipe.pipe(**given)
    assert not isinstance(chunks, dict)
    page = HostPage()

    async def read() -> None:
        async for chunk in chunks:
            page.apply(chunk)
            if answered(page.items):
                stage.answered.set()

    reader = asyncio.create_task(read())
    async with asyncio.timeout(PATIENCE_S):
        await stage.begun.wait()
    return chunks, page, reader


async def test_stop_ends_the_tools(pipe: Pipe, simulator: Simulator) -> None:
    stage, before = Stage(), asyncio.all_tasks()
    given = given_for(script(["So.", step("wait"), step(a=1, b=2)]), tools=stage.tools)
    _, page, reader = await begun(pipe, stage, given)
    reader.cancel()
    async with asyncio.timeout(SOON_S):
        await stage.ended.wait()
        await asyncio.wait((reader,))
    assert stage.cancelled
    assert page.text() == "So."
    await all_ended(before)
    assert len(inferences(simulator)) == 1


async def test_stop_without_streaming_leaves_no_card_running(pipe: Pipe) -> None:
    """The host saves what is returned: a call without output would say “Executing” for ever."""
    stage = Stage()
    given = given_for(script(["So.", step("wait"), step(a=1, b=2)]), "browser_json", stage.tools)
    asking = asyncio.create_task(call(pipe, given))
    async with asyncio.timeout(PATIENCE_S):
        await stage.begun.wait()
    asking.cancel()
    answer = await asking
    items = items_of(answer)
    done = answered(items)
    assert stage.cancelled
    assert "So." in answer.text
    for item in items:
        if item["type"] == "function_call" and item["call_id"] not in done:
            assert item["status"] == "incomplete"


@pytest.mark.parametrize("dialect", IN_A_CHAT)
async def test_a_deadline_answers_every_call(dialect: str, pipe: Pipe, simulator: Simulator) -> None:
    set_valves(pipe, simulator.base_url, REQUEST_DEADLINE_SECONDS=1)
    stage = Stage()
    prompt = script(["So.", step("wait"), step(a=1, b=2), step("wait")])
    answer = await ask(pipe, prompt, dialect, stage.tools)
    items = items_of(answer)
    assert stage.cancelled
    assert answer.error
    well_formed(items)
    assert sorted(text[:6] for text in answered(items).values()) == ["3", "Error:", "Error:"]


async def test_a_deadline_leaves_no_call_for_the_host_either(pipe: Pipe, simulator: Simulator) -> None:
    """It runs every open call, also after an error: the answer would go on although it has failed."""
    set_valves(pipe, simulator.base_url, REQUEST_DEADLINE_SECONDS=1)
    stage = Stage()
    answer = await ask(pipe, script([step("wait"), step("ask_user")]), "browser", host_tools() | stage.tools)
    assert answer.error
    well_formed(items_of(answer))


async def test_an_update_of_the_function_answers_every_call(pipe: Pipe) -> None:
    stage = Stage()
    given = given_for(script([step("wait"), step(a=1, b=2)]), tools=stage.tools)
    _, page, reader = await begun(pipe, stage, given)
    await pipe.aclose(deadline_s=0)
    async with asyncio.timeout(PATIENCE_S):
        await reader
    assert page.error
    well_formed(page.items)


async def test_the_chat_goes_on_after_a_stop(pipe: Pipe, simulator: Simulator) -> None:
    """What was answered stays, what was not is gone."""
    stage = Stage()
    prompt = script(["So.", step(a=1, b=2), step("wait")])
    given = given_for(prompt, tools=stage.tools, model=f"openrouter.{REASONER}")
    _, page, reader = await begun(pipe, stage, given)
    async with asyncio.timeout(PATIENCE_S):
        await stage.answered.wait()
    reader.cancel()
    await asyncio.wait((reader,))
    messages = [
        {"role": "user", "content": prompt},
        *as_host_returns(page.items),
        {"role": "user", "content": SECOND},
    ]
    answer = await ask(pipe, {"messages": messages}, model=f"openrouter.{REASONER}")
    assert answer.error == ""
    items = sent(simulator)[-1]
    assert kinds([i for i in items if i["type"].startswith("function")]) == [
        "function_call",
        "function_call_output",
    ]


async def test_one_answer_at_a_time_keeps_to_the_limit(pipe: Pipe, simulator: Simulator) -> None:
    set_valves(pipe, simulator.base_url, MAX_PARALLEL_TOOLS_PER_REQUEST=2)
    crowd = Crowd()

    async def stay() -> str:
        async with crowd:
            await crowd.gate.wait()
        return "out"

    asking = asyncio.create_task(ask(pipe, script([step("stay")] * 6), "browser", named(stay=entry(stay))))
    await crowd.full(2)
    crowd.gate.set()
    answer = await asking
    assert (crowd.most, crowd.seen) == (2, 6)
    well_formed(items_of(answer))


async def test_all_answers_together_keep_to_theirs(pipe: Pipe, simulator: Simulator) -> None:
    set_valves(pipe, simulator.base_url, MAX_PARALLEL_TOOLS_GLOBAL=3)
    crowd = Crowd()

    async def stay() -> str:
        async with crowd:
            await crowd.gate.wait()
        return "out"

    tools = named(stay=entry(stay))
    asking = [asyncio.create_task(ask(pipe, script([step("stay")] * 4), "browser", tools)) for _ in range(8)]
    await crowd.full(3)
    crowd.gate.set()
    for answer in await asyncio.gather(*asking):
        well_formed(items_of(answer))
    assert (crowd.most, crowd.seen) == (3, 32)


# Pictures

PIXEL: Final = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5E"
    "rkJggg=="
)
HERE_ARE: Final = "Here are the images from the tool results above. Please analyze them."


async def draw() -> str:
    """A tool that gives a picture."""
    return PIXEL


async def test_a_picture_of_a_tool_goes_to_a_model_that_sees(pipe: Pipe, simulator: Simulator) -> None:
    tools = basket() | named(draw=entry(draw))
    question = {"role": "user", "content": script([step("draw"), step(a=1, b=2)], final="Done.")}
    given = given_for({"messages": [question]}, tools=tools) | {"__request__": object()}
    answer = await call(pipe, given)
    items = items_of(answer)
    well_formed(items)
    assert answer.error == ""
    last = sent(simulator)[-1]
    assert kinds(last)[-3:] == ["function_call_output", "function_call_output", "message"]
    text, picture = last[-1]["content"]
    assert (text["text"], picture["type"]) == (HERE_ARE, "input_image")
    assert picture["image_url"] == PIXEL
    assert "read successfully" in last[-3]["output"]
    (output,) = [item for item in items if item["type"] == "function_call_output" and len(item["output"]) > 1]
    assert output["output"][1] == {"type": "input_image", "image_url": PIXEL}
    pictures = [{"type": "text", "text": HERE_ARE}, {"type": "image_url", "image_url": {"url": PIXEL}}]
    back = [*as_texts(items)]
    place = max(place for place, message in enumerate(back) if message["role"] == "tool") + 1
    back.insert(place, {"role": "user", "content": pictures})
    await call(
        pipe, given_for({"messages": [question, *back, {"role": "user", "content": SECOND}]}, tools=tools)
    )
    again = sent(simulator)[-1]
    assert [json.dumps(item) for item in again[: len(last)]] == [json.dumps(item) for item in last]


def as_texts(items: Sequence[Json]) -> list[Json]:
    """What the host hands back of items; pictures are no text."""
    bare = [
        {**item, "output": [part for part in item["output"] if part["type"] == "input_text"]}
        if item["type"] == "function_call_output"
        else item
        for item in items
    ]
    return as_host_returns(bare)


async def test_a_model_that_sees_nothing_gets_words_only(pipe: Pipe, simulator: Simulator) -> None:
    row = {"id": "a/b", "name": "B", "supported_parameters": ["tools"]}
    row["architecture"] = {"input_modalities": ["text"], "output_modalities": ["text"]}
    simulator.configure(catalog=[row])
    given = given_for(
        script([step("draw")], final="Done."), tools=named(draw=entry(draw)), model="openrouter.a/b"
    )
    answer = await call(pipe, given | {"__request__": object()})
    assert (answer.error, answer.text) == ("", "Done.")
    assert "input_image" not in json.dumps(sent(simulator))


# Old outputs


def chat_of(turns: int, length: int = 5000) -> list[Json]:
    """A chat with a long output in every turn."""
    messages: list[Json] = []
    for number in range(turns):
        function = {"name": "add", "arguments": "{}"}
        asked = {"id": f"call_{number}", "type": "function", "function": function}
        messages += [
            {"role": "user", "content": f"question {number}"},
            {"role": "assistant", "content": "", "tool_calls": [asked]},
            {"role": "tool", "tool_call_id": f"call_{number}", "content": f"{number} " + "x" * length},
            {"role": "assistant", "content": f"answer {number}"},
        ]
    return messages


@pytest.mark.parametrize("retain", [0, 1, 3, 10])
async def test_old_outputs_are_shortened_in_steps(retain: int, pipe: Pipe, simulator: Simulator) -> None:
    set_valves(pipe, simulator.base_url, TOOL_OUTPUT_RETENTION_TURNS=retain)
    moves = 0
    before: list[str] = []
    for turns in range(25):
        messages = [*chat_of(turns), {"role": "user", "content": SECOND}]
        await ask(pipe, {"messages": messages})
        items = sent(simulator)[-1]
        outputs = [item["output"] for item in items if item["type"] == "function_call_output"]
        ids = [item["call_id"] for item in items if item["type"] == "function_call"]
        assert ids == [item["call_id"] for item in items if item["type"] == "function_call_output"]
        whole = [len(output) > 5000 for output in outputs]
        assert whole == sorted(whole), "the latest are whole"
        kept = sum(whole)
        if retain == 0 or turns < retain:
            assert kept == turns
        else:
            assert retain - 1 <= kept <= 2 * retain
        assert all(
            len(output) <= 1000 for output, is_whole in zip(outputs, whole, strict=True) if not is_whole
        )
        now = [json.dumps(item) for item in items[:-1]]
        moves += now[: len(before)] != before
        before = now
    assert moves <= (0 if retain == 0 else math.ceil(25 / max(1, retain // 2)))


async def test_a_shortened_output_says_how_much_is_gone(pipe: Pipe, simulator: Simulator) -> None:
    set_valves(pipe, simulator.base_url, TOOL_OUTPUT_RETENTION_TURNS=1)
    await ask(pipe, {"messages": [*chat_of(3), {"role": "user", "content": SECOND}]})
    first = next(i["output"] for i in sent(simulator)[-1] if i["type"] == "function_call_output")
    head, _, rest = first.partition("\n[… ")
    count, _, tail = rest.partition(" characters left out …]\n")
    assert head.startswith("0 xxx")
    assert len(head) + len(tail) + int(count.replace(",", "")) == 5002


# Said to the person


async def test_without_streaming_the_person_sees_what_runs(pipe: Pipe) -> None:
    given = given_for(script([step(a=1, b=2)], final="Done."), "browser_json")
    await call(pipe, given)
    events: Events = given["__event_emitter__"]
    assert "Running add" in events.statuses()
    assert events.of("status")[-1]["done"]


async def test_a_tool_that_is_left_alone_is_named(pipe: Pipe, simulator: Simulator) -> None:
    set_valves(pipe, simulator.base_url, TOOL_BREAKER_FAILURES=2)
    given = given_for(script([step("fail")], [step("fail")], [step("fail")], final="Done."))
    answer = await call(pipe, given)
    assert answer.text == "Done."
    assert any("fail" in words and "disabled" in words for words in given["__event_emitter__"].statuses())
    assert "temporarily disabled" in list(answered(items_of(answer)).values())[2]


async def test_words_before_calls_are_no_answer(pipe: Pipe, simulator: Simulator) -> None:
    simulator.next("script", times=1, rounds=[["Let me see.", step(a=1, b=2)]])
    simulator.next("empty")
    given = given_for("hello")
    await call(pipe, given)
    assert "empty answer" in given["__event_emitter__"].statuses()[-1]


async def test_tools_take_nothing_from_the_time_of_writing(pipe: Pipe) -> None:
    """A rate of tokens is that of the model, not of its tools."""
    given = given_for(script([step(a=1, b=2)], final="Done."))
    await call(pipe, given)
    assert "tokens/s" not in given["__event_emitter__"].statuses()[-1]


@pytest.mark.parametrize("dialect", sorted(DIALECTS))
async def test_odd_tools_of_a_host_harm_nothing(dialect: str, pipe: Pipe) -> None:
    odd: Any = {
        "add": None,
        "b": {},
        "c": {"callable": 7, "spec": 3},
        "d": "tool",
        "e": {"spec": {"name": []}},
    }
    given = arguments(script([step("b"), step("c"), step("d")], final="Done."), dialect)
    body = [{"type": "function", "function": {"name": name}} for name in odd]
    given["body"]["tools"] = [*body, None, 7, {}, {"type": "function"}, {"type": "function", "function": "x"}]
    answer = await call(pipe, given | {"__tools__": odd})
    assert answer.error == ""


async def test_programs_get_one_answer(pipe: Pipe) -> None:
    """No call of ours, and every text once, in one completion."""
    answer = await ask(pipe, script(["Let me see.", step(a=1, b=2)], final="Done."), "api_stream")
    assert answer.text == "Let me see.\nDone."
    roles = [c for chunk in answer.chunks for c in chunk.get("choices", ()) if c["delta"].get("role")]
    ends = [c for chunk in answer.chunks for c in chunk.get("choices", ()) if c.get("finish_reason")]
    assert (len(roles), len(ends)) == (1, 1)
    assert len({chunk["id"] for chunk in answer.chunks if "id" in chunk}) == 1


@pytest.mark.parametrize("dialect", ["api_stream", "api_json"])
async def test_a_program_may_hand_the_thinking_back(dialect: str, pipe: Pipe, simulator: Simulator) -> None:
    """Its answer has no calls in it: thoughts that led to them must not stand before something else."""
    prompt = script([{"reasoning": "A"}, step(a=1, b=2)], [{"reasoning": "B"}, step(a=1, b=2)], final="Done.")
    answer = await ask(pipe, prompt, dialect, model=f"openrouter.{REASONER}")
    said = [
        part
        for chunk in answer.chunks
        for choice in chunk.get("choices", ())
        for part in [choice.get("delta") or choice.get("message") or {}]
    ]
    details = [detail for part in said for detail in part.get("reasoning_details", ())]
    messages = [
        {"role": "user", "content": prompt},
        {"role": "assistant", "content": answer.text, "reasoning_details": details},
        {"role": "user", "content": SECOND},
    ]
    again = await ask(pipe, {"messages": messages}, dialect, model=f"openrouter.{REASONER}")
    assert again.error == ""
    items = sent(simulator)[-1]
    for item, following in itertools.pairwise(items):
        assert (item["type"], following.get("role")) != ("reasoning", "user")
        assert not (item["type"] == following["type"] == "reasoning"), "a thought that led to a call"


def after_rounds(rounds: int) -> list[Json]:
    """A question, and rounds behind it that somebody else has run."""
    messages: list[Json] = [{"role": "user", "content": script(*[[step(a=1, b=2)]] * 30, endless=True)}]
    for number in range(rounds):
        function = {"name": "add", "arguments": '{"a": 1, "b": 2}'}
        calls = [{"id": f"c{number}", "type": "function", "function": function}]
        messages += [
            {"role": "assistant", "content": "", "tool_calls": calls},
            {"role": "tool", "tool_call_id": f"c{number}", "content": "3"},
        ]
    return messages


@pytest.mark.parametrize(
    ("rounds", "items"),
    [
        (1, ["function_call"]),
        (2, ["function_call", "function_call_output", "message"]),
        (3, ["message"]),
    ],
)
async def test_rounds_that_the_host_has_run_count(
    rounds: int, items: list[str], pipe: Pipe, simulator: Simulator
) -> None:
    """Two are allowed: the calls of the third are answered, and the model has to write."""
    set_valves(pipe, simulator.base_url, TOOL_EXECUTION_MODE="open_webui", MAX_FUNCTION_CALL_LOOPS=2)
    answer = await ask(pipe, {"messages": after_rounds(rounds)}, "browser")
    assert kinds(items_of(answer)) == items
    assert (inferences(simulator)[-1].body.get("tool_choice") == "none") == (rounds > 1)


@pytest.mark.parametrize("dialect", ["api_stream", "api_json"])
async def test_rounds_of_a_program_are_its_own(dialect: str, pipe: Pipe, simulator: Simulator) -> None:
    """However many: its tools stay, and its choice."""
    set_valves(pipe, simulator.base_url, MAX_FUNCTION_CALL_LOOPS=2)
    given = given_for({"messages": after_rounds(5)}, dialect, {}, tool_choice="required")
    given["body"]["tools"] = offered(basket())
    answer = await call(pipe, given)
    assert [item["name"] for item in answer.calls] == ["add"]
    assert inferences(simulator)[-1].body["tool_choice"] == "required"


async def test_a_choice_is_not_forced_again_by_the_hosts_rounds(pipe: Pipe, simulator: Simulator) -> None:
    set_valves(pipe, simulator.base_url, TOOL_EXECUTION_MODE="open_webui")
    more = {"tool_choice": "required"}
    await ask(pipe, {"messages": after_rounds(0)}, "browser", None, **more)
    await ask(pipe, {"messages": after_rounds(1)}, "browser", None, **more)
    assert [record.body.get("tool_choice") for record in inferences(simulator)] == ["required", None]


@pytest.mark.parametrize("how", ["by its name", "by call_tool"])
async def test_what_may_be_searched_for_is_bounded_too(how: str, pipe: Pipe, simulator: Simulator) -> None:
    """A tool that is not in AVAILABLE_TOOLS is not run because the model could have found it."""
    set_valves(pipe, simulator.base_url, AVAILABLE_TOOLS="add,call_tool")
    ran: list[str] = []

    async def secret() -> None:
        ran.append("secret")

    search = {"tool_id": "builtin:call_tool", "type": "builtin", "spec": {"parameters": schema()}}
    tools = basket() | named(secret=entry(secret), call_tool=search)
    given_step = (
        step("secret") if how == "by its name" else step("call_tool", tool_name="secret", params="{}")
    )
    given = given_for(script([given_step], final="{outputs}"), "browser", tools)
    given["__metadata__"]["deferred_tools"] = ["secret"]
    answer = await call(pipe, given)
    well_formed(items_of(answer))
    assert ran == []
    assert "no tool called" in answer.text
