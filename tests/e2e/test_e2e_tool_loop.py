"""Rounds of tools that the pipe runs itself, through the real host: shown, saved, and remembered."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import pytest
from playwright.async_api import expect

from tests.e2e.driver import Tab, Turn, error_text, item_text, items, unique, until
from tests.e2e.host import MODEL, Host, valves
from tests.e2e.page import ChatPage
from tests.e2e.tool_servers import ToolServers, call, script
from tests.e2e.upstream import Json, Upstream

TWO: Final = [call("slow_echo", text="patience", seconds=0.5), call("fail_always")]


def sent(upstream: Upstream, word: str) -> list[list[Json]]:
    """The input items of every request with this word in it."""
    return [record["body"]["input"] for record in upstream.asked(word)]


def kinds(message: Json) -> list[str]:
    return [item["type"] for item in message["output"]]


async def ask(tab: Tab, *rounds: Any, after: Turn | None = None, **fields: Any) -> tuple[Turn, str]:
    question, word = unique(script(*rounds, final="So: {outputs}"))
    return await tab.ask(question, MODEL, after=after, **fields), word


async def test_a_slow_tool_and_one_that_fails(tab: Tab, servers: ToolServers, upstream: Upstream) -> None:
    """Both cards are saved with their results, the model reads both, and usage is that of both calls."""
    turn, word = await ask(tab, TWO, tool_ids=servers.ids)
    message = await turn.done()
    assert not error_text(message)
    assert kinds(message) == [
        *("reasoning", "function_call", "function_call", "function_call_output", "function_call_output"),
        *("reasoning", "message"),
    ]
    statuses = {item["name"]: item["status"] for item in items(message, "function_call")}
    assert statuses == {"slow_echo": "completed", "fail_always": "failed"}
    asked, answered = upstream.asked(word)
    outputs = [i["output"] for i in answered["body"]["input"] if i["type"] == "function_call_output"]
    assert "patience" in outputs[0]  # as they were called
    assert "broken on purpose" in outputs[1]
    totals = [upstream.usage(record)["total_tokens"] for record in (asked, answered)]
    assert message["usage"]["total_tokens"] == sum(totals)
    (last,) = [status["description"] for status in message["statusHistory"]][-1:]
    assert re.search(r"tokens in.*out", last)


async def test_a_round_takes_as_long_as_its_slowest_tool(tab: Tab, servers: ToolServers) -> None:
    batch = [call("work_slowly", key=f"side{number}", seconds=0.5) for number in range(8)]
    turn, _ = await ask(tab, batch, tool_ids=servers.ids)
    await turn.done()
    assert servers.journal.outcomes("side") == {"finished": 8}
    assert servers.journal.most_at_once("side") == 5


async def test_what_a_later_turn_sends_is_what_was_sent(
    tab: Tab, servers: ToolServers, upstream: Upstream
) -> None:
    """Ten turns with two rounds each: each request begins with all that the one before it held."""
    turn: Turn | None = None
    word = ""
    for number in range(10):
        add = call("add_numbers", a=number, b=1)
        rounds = (
            [{"reasoning": f"First {number}."}, "One moment.", add, call("multiply", a=number, b=2)],
            [{"reasoning": f"Then {number}."}, call("greet", name=f"guest {number}")],
        )
        question, fresh = unique(script(*rounds, final="So: {outputs}"))
        if not word:
            word = fresh
        turn = await tab.ask(question, MODEL, after=turn, tool_ids=servers.ids)
        message = await turn.done()
        assert not error_text(message)
    requests = sent(upstream, word)
    assert len(requests) == 30
    for before, after in pairwise(requests):
        assert after[: len(before)] == before
    sealed = [i["encrypted_content"] for i in requests[-1] if i["type"] == "reasoning"]
    assert len(sealed) == len(set(sealed)) == 29


async def test_a_chat_without_streaming(tab: Tab, servers: ToolServers, upstream: Upstream) -> None:
    """Open WebUI runs no tools there; the pipe does."""
    turn, word = await ask(tab, [call("greet", name="Nils"), *TWO], tool_ids=servers.ids, stream=False)
    message = await turn.done()
    assert "Good day, Nils!" in message["content"]
    assert [i["status"] for i in items(message, "function_call")] == ["completed", "completed", "failed"]
    assert len(items(message, "function_call_output")) == 3
    offered = {tool["name"] for tool in upstream.asked(word)[0]["body"]["tools"]}
    assert "greet" in offered
    assert "ask_user" not in offered
    said = [status["description"] for status in message["statusHistory"]]
    assert "Running greet" in said
    assert message["statusHistory"][-1]["done"]


def test_a_program_that_names_tools_of_the_server(
    host: Host, servers: ToolServers, upstream: Upstream
) -> None:
    question, word = unique(script([call("greet", name="API")], final="{outputs}"))
    answer = host.admin.complete(MODEL, question, tool_ids=[servers.workspace])
    assert "Good day, API!" in answer["choices"][0]["message"]["content"]
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert len(upstream.asked(word)) == 2


async def test_stop_in_the_middle_of_a_round(tab: Tab, servers: ToolServers, upstream: Upstream) -> None:
    """What was ready is kept, what ran is ended, and the chat goes on without it."""
    batch = [call("greet", name="early"), call("work_slowly", key="stopped", seconds=60)]
    turn, _ = await ask(tab, batch, tool_ids=servers.ids)
    await turn.wait(
        lambda turn: any(
            event["item"]["type"] == "function_call_output"
            for event in turn.responses("response.output_item.done")
        ),
        "the first result",
    )
    await turn.stop()
    message = await turn.done()
    await until(lambda: servers.journal.outcomes("stopped") == {"cancelled": 1}, "the end of the tool", 2)
    assert {i["name"]: i["status"] for i in items(message, "function_call")} == {
        "greet": "completed",
        "work_slowly": "incomplete",
    }
    question, word = unique("Hello again")
    following = await (await tab.ask(question, MODEL, after=turn, tool_ids=servers.ids)).done()
    assert not error_text(following)
    names = [i["name"] for i in sent(upstream, word)[-1] if i["type"] == "function_call"]
    assert names == ["greet"]


async def test_rounds_have_an_end(host: Host, tab: Tab, servers: ToolServers, upstream: Upstream) -> None:
    spec = {"rounds": [[call("greet", name="again")]], "endless": True, "final": "Enough."}
    question, word = unique(f"[[script {json.dumps(spec)}]]")
    with valves(host, MAX_FUNCTION_CALL_LOOPS=3):
        turn = await tab.ask(question, MODEL, tool_ids=servers.ids)
        message = await turn.done()
    assert message["content"].strip().endswith("Enough.")
    outputs = items(message, "function_call_output")
    assert len(outputs) == 4
    assert "too many rounds" in item_text({"content": outputs[-1]["output"]})
    assert "times on end" not in item_text({"content": outputs[0]["output"]})
    assert any("Stopped after 3 rounds" in s["description"] for s in message["statusHistory"])
    assert upstream.asked(word)[-1]["body"]["tool_choice"] == "none"


async def test_one_call_for_the_person_and_one_for_the_pipe(tab: Tab, servers: ToolServers) -> None:
    """What the pipe can run is run at once; the question waits for its answer."""
    options = [{"label": "Red", "description": "Warm"}, {"label": "Blue", "description": "Cold"}]
    question = {"id": "colour", "header": "Colour", "question": "Which colour?", "options": options}
    ask_user = call("ask_user", questions=[question])
    turn, _ = await ask(tab, [call("greet", name="meanwhile"), ask_user], tool_ids=servers.ids)
    message = await turn.done()
    assert {i["name"]: i["status"] for i in items(message, "function_call")} == {
        "greet": "completed",
        "ask_user": "pending",
    }
    assert servers.journal.outcomes("meanwhile") == {"finished": 1}


@pytest.mark.parametrize("switch", ["admin", "user"])
async def test_no_tools(
    switch: str, host: Host, user_tab: Tab, servers: ToolServers, upstream: Upstream
) -> None:
    path = "/api/v1/functions/id/openrouter/valves/user/update"
    with valves(host, **({"ENABLE_TOOLS": False} if switch == "admin" else {})):
        if switch == "user":
            await user_tab.call("POST", path, {"ENABLE_TOOLS": "off"})
        try:
            question, word = unique("Hello")
            await (await user_tab.ask(question, MODEL, tool_ids=servers.ids)).done()
        finally:
            await user_tab.call("POST", path, {})
    assert "tools" not in upstream.last(word)["body"]


async def test_cards_in_the_page(host: Host, folder: Path, servers: ToolServers, upstream: Upstream) -> None:
    """The calls are shown with their results, and the same after a reload."""
    rounds = [[call("get_current_timestamp"), call("calculate_timestamp", days_ago=1), call("no_such_tool")]]
    async with ChatPage.open(host.admin, folder / "screenshots") as chat:
        await chat.new_chat(MODEL)
        upstream.next("script", times=2, rounds=rounds, final="All of them are here.")
        await chat.ask("Look at the clock.")
        await chat.finished()
        await expect(chat.message).to_contain_text("All of them are here.")
        await chat.screenshot("tools-answered")
        await chat.reload()
        await expect(chat.message).to_contain_text("All of them are here.")
        await chat.message.get_by_text("calculate_timestamp").first.click()
        for name in ("get_current_timestamp", "calculate_timestamp", "no_such_tool"):
            await expect(chat.message.get_by_text(f"View Result from {name}")).to_be_in_viewport()
        await chat.message.get_by_text("View Result from no_such_tool").click()
        await expect(chat.message).to_contain_text("There is no tool called")
        await chat.screenshot("tools-reloaded")
