"""Tools that Open WebUI offers and runs itself."""

from __future__ import annotations

import json

from tests.e2e.driver import Tab, error_text, items, unique
from tests.e2e.host import MODEL
from tests.e2e.upstream import Upstream


async def test_tool_round_run_by_the_host(tab: Tab, upstream: Upstream) -> None:
    """The model asks for the time; the host looks at its clock and asks us again with the result."""
    question, word = unique("[[tool name=get_current_timestamp args={}]] What time is it?")
    turn = await tab.ask(question, MODEL)
    message = await turn.done()
    assert not error_text(message)

    asked, answered = upstream.asked(word)
    assert "get_current_timestamp" in [tool.get("name") for tool in asked["body"]["tools"]]
    (call,) = items(message, "function_call")
    (output,) = items(message, "function_call_output")
    assert call["name"] == "get_current_timestamp"
    assert call["status"] == "completed"
    assert output["call_id"] == call["call_id"]
    result = "".join(part["text"] for part in output["output"])
    assert "current_timestamp" in json.loads(result)

    sent = {
        item["type"]: item
        for item in answered["body"]["input"]
        if item.get("type", "").startswith("function")
    }
    assert sent["function_call_output"]["call_id"] == sent["function_call"]["call_id"]
    assert "The tools returned" in message["content"]

    total = [upstream.usage(record)["total_tokens"] for record in (asked, answered)]
    assert message["usage"]["total_tokens"] == sum(total)


async def test_two_calls_in_one_answer(tab: Tab) -> None:
    turn = await tab.ask("[[tools name=get_current_timestamp args={} n=2]]", MODEL)
    message = await turn.done()
    assert not error_text(message)
    calls, outputs = items(message, "function_call"), items(message, "function_call_output")
    assert len(calls) == len(outputs) == 2
    assert {call["call_id"] for call in calls} == {output["call_id"] for output in outputs}
    assert len({call["call_id"] for call in calls}) == 2
    assert "The tools returned" in message["content"]
