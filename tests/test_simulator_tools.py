"""Scripts of the simulator: tool rounds that a test writes down. Page: docs/simulator.md."""

from __future__ import annotations

import json
from typing import Any

import aiohttp
import pytest

from openrouter_responses_pipe.simulator import Simulator

Json = dict[str, Any]
MODEL = "openai/gpt-4o-mini"
REASONER = "openai/gpt-5-mini"
ADD: Json = {"type": "function", "name": "add", "parameters": {"properties": {"a": {"type": "integer"}}}}
WAIT: Json = {"type": "function", "name": "wait", "parameters": {"properties": {}}}
TOOLS = [ADD, WAIT]


class Conversation:
    """One user turn with a model that follows a script: each answer becomes part of the next request."""

    def __init__(self, simulator: Simulator, http: aiohttp.ClientSession, question: str, **body: Any) -> None:
        self.simulator, self.http = simulator, http
        self.items: list[Json] = [{"role": "user", "content": question}]
        self.body: Json = {"model": MODEL, "tools": TOOLS, **body}
        self.text = ""

    async def ask(self, **body: Any) -> tuple[int, bytes]:
        """Send what has been said so far."""
        asked = {**self.body, "stream": True, "input": self.items, **body}
        async with self.http.post(f"{self.simulator.base_url}/responses", json=asked) as answer:
            return answer.status, await answer.read()

    async def turn(self, *outputs: Any, **body: Any) -> list[Json]:
        """Ask, keep the items of the answer, and answer its calls with these outputs; return the items."""
        status, raw = await self.ask(**body)
        assert status == 200, raw
        events = [json.loads(line[6:]) for line in raw.splitlines() if line.startswith(b"data: {")]
        assert events[-1]["type"] == "response.completed"
        said: list[Json] = events[-1]["response"]["output"]
        self.text = "".join(e["delta"] for e in events if e["type"] == "response.output_text.delta")
        self.items += [item for item in said if item["type"] != "message"]
        calls = [item for item in said if item["type"] == "function_call"]
        self.items += [
            {"type": "function_call_output", "call_id": call["call_id"], "output": output}
            for call, output in zip(calls, outputs, strict=False)
        ]
        return said


def script(*rounds: Any, **more: Any) -> str:
    """Write a script into a message, with words on both sides."""
    return f"Please [[script {json.dumps({'rounds': rounds, **more})}]] now."


def calls(items: list[Json]) -> list[tuple[str, Any]]:
    """The calls of an answer: (name, arguments)."""
    return [(i["name"], json.loads(i["arguments"])) for i in items if i["type"] == "function_call"]


def kinds(items: list[Json]) -> list[str]:
    """The types of the items of an answer, in order."""
    return [item["type"] for item in items]


def call(name: str = "add", /, **arguments: Any) -> Json:
    """One call of a script."""
    return {"name": name, "arguments": arguments}


async def test_rounds_follow_one_another_and_the_end_quotes_the_outputs(
    simulator: Simulator, http: aiohttp.ClientSession
) -> None:
    said = script([call(a=1), call("wait")], [call(a=3)], final="{count} outputs:\n{outputs}")
    chat = Conversation(simulator, http, said)
    assert calls(await chat.turn("one", "two")) == [("add", {"a": 1}), ("wait", {})]
    assert calls(await chat.turn("three")) == [("add", {"a": 3})]
    assert kinds(await chat.turn()) == ["message"]
    assert chat.text == "3 outputs:\n- one\n- two\n- three"
    assert [record.scenario for record in simulator.requests] == ["script"] * 3


async def test_a_repeated_request_gets_the_same_round(
    simulator: Simulator, http: aiohttp.ClientSession
) -> None:
    chat = Conversation(simulator, http, script([call(a=1)], [call(a=2)]))
    assert [calls(await Conversation(simulator, http, script([call(a=1)])).turn()) for _ in range(2)] == [
        [("add", {"a": 1})]
    ] * 2
    await chat.turn("one")
    for _ in range(2):
        status, raw = await chat.ask()
        assert (status, b'"a\\":2' in raw.replace(b" ", b"")) == (200, True)


async def test_one_call_three_times_and_then_the_usual_text(
    simulator: Simulator, http: aiohttp.ClientSession
) -> None:
    chat = Conversation(simulator, http, script(*[[call("wait")]] * 3))
    assert [calls(await chat.turn("same")) for _ in range(3)] == [[("wait", {})]] * 3
    ids = [item["call_id"] for item in chat.items if item.get("type") == "function_call"]
    assert len(set(ids)) == 3
    await chat.turn()
    assert chat.text.startswith("The tools returned:")
    assert "rounds" not in chat.text


async def test_endless_calls_end_without_tools(simulator: Simulator, http: aiohttp.ClientSession) -> None:
    chat = Conversation(simulator, http, script([call(a=1)], [call("wait")], endless=True, final="Enough."))
    await chat.turn("x")
    assert [calls(await chat.turn("x")) for _ in range(4)] == [[("wait", {})]] * 4
    assert kinds(await chat.turn(tool_choice="none")) == ["message"]
    assert kinds(await chat.turn(tools=[])) == ["message"]
    assert chat.text == "Enough."


async def test_thoughts_and_words_stand_where_they_are_written(
    simulator: Simulator, http: aiohttp.ClientSession
) -> None:
    steps = [{"reasoning": ["First", "Second"]}, "Let me see.", call(a=1), {"reasoning": "And"}, call(a=2)]
    said = script(steps, [{"thinking": "Raw"}, call(a=3)], [{"reasoning": False}, call(a=4)])
    chat = Conversation(simulator, http, said, model=REASONER, include=["reasoning.encrypted_content"])
    items = await chat.turn("x", "y")
    expected = ["reasoning", "message", "function_call", "reasoning", "function_call"]
    assert kinds(items) == expected
    assert [part["text"] for part in items[0]["summary"]] == ["First", "Second"]
    assert (items[1]["phase"], chat.text) == ("commentary", "Let me see.")
    assert len({item["id"] for item in items}) == 5
    assert all(item["encrypted_content"] for item in items if item["type"] == "reasoning")
    thinking = await chat.turn("z")
    assert (kinds(thinking), bool(thinking[0]["signature"])) == (["reasoning", "function_call"], True)
    assert kinds(await chat.turn("z")) == ["function_call"]
    # what came back unchanged was accepted; one changed word is not
    chat.items[1]["summary"][0]["text"] = "Third"
    assert (await chat.ask())[0] == 400


async def test_a_model_that_reasons_does_so_unless_the_script_says_how(
    simulator: Simulator, http: aiohttp.ClientSession
) -> None:
    chat = Conversation(simulator, http, script([call(a=1)]), model=REASONER)
    assert kinds(await chat.turn("x")) == ["reasoning", "function_call"]


async def test_calls_that_no_schema_allows(simulator: Simulator, http: aiohttp.ClientSession) -> None:
    """A test can send what models send: broken JSON, tools that are not there, ids that were used before."""
    odd = {"name": "no_such_tool", "arguments": '{"a": ', "call_id": "call_again"}
    chat = Conversation(simulator, http, script([odd]))
    (item,) = await chat.turn()
    assert (item["name"], item["arguments"], item["call_id"]) == ("no_such_tool", '{"a": ', "call_again")


async def test_the_other_calls_of_a_round_with_some_outputs(
    simulator: Simulator, http: aiohttp.ClientSession
) -> None:
    chat = Conversation(simulator, http, script(["Both.", call(a=1), call(a=2)], [call(a=3)]))
    first, second = (item for item in await chat.turn("one") if item["type"] == "function_call")
    chat.items.remove(second)
    assert first in chat.items
    assert calls(await chat.turn("two")) == [("add", {"a": 2})]
    assert calls(await chat.turn()) == [("add", {"a": 3})]


async def test_pictures_of_tools_are_no_question(simulator: Simulator, http: aiohttp.ClientSession) -> None:
    chat = Conversation(simulator, http, script([call(a=1)], final="{count}"))
    await chat.turn("one")
    note = "Here are the images from the tool results above. Please analyze them."
    chat.items.append({"role": "user", "content": [{"type": "input_text", "text": note}]})
    assert kinds(await chat.turn()) == ["message"]
    assert chat.text == "1"


async def test_an_answer_has_parameters_of_its_own(simulator: Simulator, http: aiohttp.ClientSession) -> None:
    own = {"steps": [call(a=1)], "style": "whole"}
    chat = Conversation(simulator, http, script(own, final={"scenario": "burst", "tokens": 3}))
    _, raw = await chat.ask()
    assert b"function_call_arguments" not in raw
    await chat.turn("x")
    await chat.turn()
    assert chat.text == "word0 word1 word2 "
    chat = Conversation(simulator, http, script(final={"steps": "Said.", "cut": 1, "how": "eof"}))
    assert b"response.completed" not in (await chat.ask())[1]


async def test_a_script_in_the_queue(simulator: Simulator, http: aiohttp.ClientSession) -> None:
    simulator.next("script", times=2, rounds=[[call("wait")]], final="Over.")
    chat = Conversation(simulator, http, "Hello")
    assert calls(await chat.turn("x")) == [("wait", {})]
    await chat.turn()
    assert chat.text == "Over."


async def test_a_script_over_chat_completions(simulator: Simulator, http: aiohttp.ClientSession) -> None:
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    messages: list[Json] = [{"role": "user", "content": script([call(a=1)], final="{outputs}")}]
    body = {"model": MODEL, "tools": tools, "messages": messages}
    async with http.post(f"{simulator.base_url}/chat/completions", json=body) as answer:
        asked = (await answer.json())["choices"][0]["message"]
    (made,) = asked["tool_calls"]
    assert json.loads(made["function"]["arguments"]) == {"a": 1}
    messages += [asked, {"role": "tool", "tool_call_id": made["id"], "content": "42"}]
    async with http.post(f"{simulator.base_url}/chat/completions", json=body) as answer:
        assert (await answer.json())["choices"][0]["message"]["content"] == "- 42"


@pytest.mark.parametrize(
    "message",
    [
        '[[script {"rounds": [}]]',
        '[[script {"rounds": []} and no end',
        script(["only words"]),
        script([{"say": "a", "reasoning": "b"}]),
        script([{"dance": 1}]),
        script([7]),
        script("call"),
        script(final={"steps": 7}),
    ],
)
async def test_an_unusable_script_is_refused(
    simulator: Simulator, http: aiohttp.ClientSession, message: str
) -> None:
    status, raw = await Conversation(simulator, http, message).ask()
    assert (status, b"simulator: " in raw) == (400, True)


async def test_a_script_cannot_name_a_file(simulator: Simulator, http: aiohttp.ClientSession) -> None:
    """The call may have such an argument; the simulator itself reads nothing that a message names."""
    final = {"scenario": "replay", "path": __file__}
    chat = Conversation(simulator, http, script([call(path="/tmp")], final=final, path=__file__))
    assert calls(await chat.turn("x")) == [("add", {"path": "/tmp"})]
    assert b"cannot_name_a_file" not in (await chat.ask())[1]
