"""Tools of every kind that the real host has, called by a model: workspace, OpenAPI, MCP, built-in, page."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.e2e.driver import Tab, Turn, error_text, items, unique, until
from tests.e2e.host import MODEL, Host, valves
from tests.e2e.tool_servers import (
    MCP_ID,
    ToolServers,
    answering,
    call,
    chat_settings,
    direct_tools,
    page_tools,
    picture_of,
    resolve,
    saved,
    script,
)
from tests.e2e.upstream import Json, Upstream
from tests.e2e.workspace_tools import png

GREEN = png(0, 255, 0)
QUESTION: Json = {
    "id": "colour",
    "header": "Colour",
    "question": "Which colour?",
    "options": [{"label": "Red", "description": "Warm"}, {"label": "Blue", "description": "Cold"}],
}


async def play(tab: Tab, *rounds: Any, tool_ids: list[str], **fields: Any) -> tuple[Turn, str]:
    """Ask for these rounds; the last answer quotes the outputs. Returns the turn and a word of its own."""
    question, word = unique(script(*rounds, final="{outputs}"))
    return await tab.ask(question, MODEL, tool_ids=tool_ids, **fields), word


def outputs(message: Json) -> dict[str, Json]:
    """The output items by the name of the tool that was called."""
    by_id = {item["call_id"]: item for item in items(message, "function_call_output")}
    return {item["name"]: by_id[item["call_id"]] for item in items(message, "function_call")}


def text(item: Json) -> str:
    """What the model reads of an output."""
    return "".join(part.get("text", "") for part in item["output"])


async def test_tools_of_every_kind_answer(tab: Tab, servers: ToolServers, upstream: Upstream) -> None:
    batch = [
        call("greet", name="Eve"),
        call("multiply", a=6, b=7),
        call("add_numbers", a=1.5, b=2),
        call("big_output", chars=5000),
        call(f"{MCP_ID}_reverse", text="straight"),
    ]
    turn, word = await play(tab, batch, [call("answer_in_json", rows=2)], tool_ids=servers.ids)
    message = await turn.done()
    assert not error_text(message)
    said = {name: text(item) for name, item in outputs(message).items()}
    assert said["greet"] == "Good day, Eve!"
    assert said["multiply"] == "42"
    assert json.loads(said["add_numbers"]) == {"sum": 3.5}
    assert len(said["big_output"]) == 5000
    assert said[f"{MCP_ID}_reverse"] == "thgiarts"
    assert json.loads(said["answer_in_json"])["rows"][1]["name"] == "row 1"
    assert {item["status"] for item in outputs(message).values()} == {"completed"}
    assert [run.outcome for run in servers.journal.runs("Eve")] == ["finished"]

    asked = upstream.asked(word)
    assert len(asked) == 3
    offered = {tool.get("name") for tool in asked[0]["body"]["tools"]}
    assert offered >= {*said, "get_current_timestamp", "slow_echo", f"{MCP_ID}_slow_reverse"}


async def test_a_user_may_use_them_too(user_tab: Tab, servers: ToolServers) -> None:
    batch = [
        call("greet", name="Ursula"),
        call("add_numbers", a=1, b=1),
        call(f"{MCP_ID}_reverse", text="ab"),
    ]
    turn, _ = await play(user_tab, batch, tool_ids=servers.ids)
    said = [text(item) for item in outputs(await turn.done()).values()]
    assert said == ["Good day, Ursula!", '{\n  "sum": 2\n}', "ba"]


async def test_tools_that_fail(tab: Tab, servers: ToolServers) -> None:
    """The model reads why, the card is marked, and the answer goes on."""
    batch = [
        call("raise_error", message="no paper"),
        call("fail_always"),
        call(f"{MCP_ID}_fail", reason="no ink"),
    ]
    turn, _ = await play(tab, batch, tool_ids=servers.ids)
    message = await turn.done()
    assert not error_text(message)
    for (name, item), words in zip(
        outputs(message).items(), ("no paper", "broken on purpose", "no ink"), strict=True
    ):
        assert (name, item["status"]) == (name, "failed")
        assert words in text(item)
    assert {item["status"] for item in items(message, "function_call")} == {"failed"}
    assert "no paper" in message["content"]
    assert servers.journal.outcomes("no paper") == {"failed": 1}


async def test_pictures_and_cards(tab: Tab, servers: ToolServers, upstream: Upstream) -> None:
    """Pictures are kept as files and go to the model, a page of HTML goes to the person."""
    batch = [
        call("draw_square", colour="green"),
        call("paint", colour="green"),
        call(f"{MCP_ID}_paint", colour="green"),
        call("show_card", title="Hello"),
    ]
    turn, word = await play(tab, batch, tool_ids=servers.ids)
    message = await turn.done()
    found = outputs(message)
    assert found.pop("show_card")["embeds"] == ["<h1>Hello</h1>"]
    links = [part["image_url"] for item in found.values() for part in item["output"] if "image_url" in part]
    assert [link.startswith("/api/v1/files/") for link in links] == [True] * 3
    sent = [
        part["image_url"]
        for item in upstream.last(word)["body"]["input"]
        for part in (item.get("content") or [] if item.get("role") == "user" else [])
        if part["type"] == "input_image"
    ]
    assert [picture_of(url) for url in sent] == [GREEN] * 3
    assert message["content"].startswith("- draw_square")


async def test_a_tool_speaks_to_the_page_and_knows_where_it_is(tab: Tab, servers: ToolServers) -> None:
    turn, _ = await play(tab, [call("report_progress", steps=2), call("look_around")], tool_ids=servers.ids)
    message = await turn.done()
    said = [status["description"] for status in message["statusHistory"]]
    assert [words for words in said if words.startswith("Step")] == ["Step 1 of 2", "Step 2 of 2"]
    around = json.loads(text(outputs(message)["look_around"]))
    assert (around["user"], around["chat_id"], around["message_id"]) == (
        "Admin",
        turn.chat_id,
        turn.message_id,
    )
    assert around["roles"][-1] == "user"


async def test_the_host_runs_one_call_after_the_other(host: Host, tab: Tab, servers: ToolServers) -> None:
    batch = [call("work_slowly", key=f"row{number}", seconds=0.2) for number in range(3)]
    with valves(host, TOOL_EXECUTION_MODE="open_webui"):
        turn, _ = await play(tab, batch, tool_ids=servers.ids)
        message = await turn.done()
    assert [text(item) for item in items(message, "function_call_output")] == [
        f"row{number} took 0.2 s" for number in range(3)
    ]
    assert servers.journal.most_at_once("row") == 1
    assert [run.key for run in servers.journal.runs("row")] == ["row0", "row1", "row2"]


async def test_a_plain_function_does_not_hold_up_others(tab: Tab, servers: ToolServers) -> None:
    """Open WebUI itself would run it on its event loop, where nobody else is answered meanwhile."""
    batch = [call("block_thread", key=f"blocked{number}", seconds=0.3) for number in range(2)]
    turn, _ = await play(tab, batch, tool_ids=servers.ids)
    await turn.done()
    runs = servers.journal.runs("blocked")
    assert [(run.outcome, run.main_thread) for run in runs] == [("finished", False)] * 2
    assert servers.journal.most_at_once("blocked") == 2


@pytest.mark.parametrize("name", ["work_slowly", "slow_echo", f"{MCP_ID}_slow_reverse"])
async def test_stop_reaches_the_tool(tab: Tab, servers: ToolServers, name: str) -> None:
    """What runs in the host, over HTTP or over MCP is cancelled, and the journal says so."""
    key = f"stop-{name}"
    found = {"key": key} if name == "work_slowly" else {"text": key}
    turn, _ = await play(tab, [call(name, seconds=30, **found)], tool_ids=servers.ids)
    await until(lambda: servers.journal.runs(key), "the start of the tool")
    await turn.stop()
    message = await turn.done()
    await until(lambda: servers.journal.outcomes(key) == {"cancelled": 1}, "the end of the tool", 5)
    assert [item["status"] for item in items(message, "function_call")] == ["incomplete"]
    assert items(message, "function_call_output") == []


async def test_tools_of_the_page(host: Host, tab: Tab) -> None:
    where = page_tools(where_am_i={"type": "object", "properties": {"precise": {"type": "boolean"}}})
    question, _ = unique(script([call("where_am_i", precise=True, unknown=1)], final="{outputs}"))
    with direct_tools(host):
        async with answering(tab, execute_tool=lambda data: {"place": "Narvik"}) as questions:
            message = await (await tab.ask(question, MODEL, tool_servers=[where])).done()
    assert "Narvik" in message["content"]
    (asked,) = questions.of("execute:tool")
    assert (asked["name"], asked["params"]) == ("where_am_i", {"precise": True})


async def test_approval_is_asked_call_by_call(host: Host, tab: Tab, servers: ToolServers) -> None:
    batch = [call("greet", name="first"), call("greet", name="second")]
    with chat_settings(host, ENABLE_TOOL_PERMISSIONS=True):
        turn, _ = await play(tab, batch, tool_ids=servers.ids, params={"tool_approval_mode": "ask"})
        calls = items(await turn.done(), "function_call")
        assert [item["status"] for item in calls] == ["pending", "queued"]
        assert servers.journal.runs("first") == []
        await resolve(turn, calls[0]["call_id"], "approve")
        await saved(turn, lambda message: items(message, "function_call_output"), "the first output")
        await resolve(turn, calls[1]["call_id"], "reject")
        message = await saved(turn, lambda message: message["done"], "the end of the answer")
    assert [item["status"] for item in items(message, "function_call")] == ["completed", "rejected"]
    assert "Good day, first!" in message["content"]
    assert "rejected by user" in message["content"]
    assert servers.journal.runs("second") == []


async def test_a_question_to_the_person(tab: Tab) -> None:
    turn, _ = await play(tab, [call("ask_user", questions=[QUESTION])], tool_ids=[])
    (asked,) = items(await turn.done(), "function_call")
    assert asked["status"] == "pending"
    await resolve(turn, asked["call_id"], "answer", answers={"colour": "Blue"})
    message = await saved(turn, lambda message: message["done"], "the end of the answer")
    assert "Blue" in message["content"]


async def test_tools_that_must_be_searched_for(host: Host, tab: Tab, upstream: Upstream) -> None:
    rounds = (
        [call("search_tools", query="search_notes")],
        [call("call_tool", tool_name="search_notes", params='{"query": "nothing of the kind"}')],
    )
    with chat_settings(host, ENABLE_TOOL_SEARCH=True):
        turn, word = await play(tab, *rounds, tool_ids=[])
        message = await turn.done()
    offered = {tool.get("name") for tool in upstream.last(word)["body"]["tools"]}
    assert {"search_tools", "call_tool"} <= offered
    assert "search_notes" not in offered
    assert [item["name"] for item in items(message, "function_call")] == ["search_tools", "search_notes"]
    assert not error_text(message)
