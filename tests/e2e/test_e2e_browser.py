"""A chat in the browser: what the page is sent, and what is there after a reload."""

from __future__ import annotations

import asyncio
import re

import pytest

from tests.e2e.driver import Tab, Turn, error_text, item_text, items, unique, until
from tests.e2e.host import MODEL, Host
from tests.e2e.upstream import Json, Upstream


def check_saved(message: Json, turn: Turn, upstream: Upstream, word: str) -> None:
    """Compare a saved answer with what the page was sent and with what OpenRouter reported."""
    assert not error_text(message)
    assert message["done"] is True
    assert word in message["content"]
    (reasoning,) = items(message, "reasoning")
    assert "The user says" in item_text(reasoning)
    assert reasoning["duration"] >= 0
    assert [item["status"] for item in message["output"]] == ["completed", "completed"]
    sent = upstream.usage(upstream.last(word))
    saved = message["usage"]
    wanted = ("input_tokens", "output_tokens", "total_tokens", "cost")
    assert {key: saved.get(key) for key in wanted} == {key: sent[key] for key in wanted}
    assert saved["output_tokens_details"] == sent["output_tokens_details"]
    statuses = message.get("statusHistory") or []
    assert statuses, "no status was saved"
    assert statuses[-1]["done"] is True


async def test_answer_is_streamed_and_saved(tab: Tab, upstream: Upstream) -> None:
    question, word = unique("Hello there")
    turn = await tab.ask(question, MODEL)
    message = await turn.done()
    check_saved(message, turn, upstream, word)
    assert turn.text.strip() == message["content"].strip()
    assert len(turn.responses("response.completed")) == 1
    assert len(upstream.asked(word)) == 1


async def test_text_arrives_while_it_is_made(tab: Tab) -> None:
    turn = await tab.ask("[[drip rate=40 tokens=60]]", MODEL)
    await turn.done()
    at = [when for when, kind, data in turn.events if "output_text.delta" in str(data)]
    assert len(at) >= 10
    assert at[-1] - at[0] > 1.0
    assert turn.text.split() == [f"word{index}" for index in range(60)]


async def test_user_who_is_no_admin(user_tab: Tab, upstream: Upstream) -> None:
    question, word = unique("Hello from a user")
    turn = await user_tab.ask(question, MODEL)
    check_saved(await turn.done(), turn, upstream, word)


async def test_streaming_switched_off(tab: Tab, upstream: Upstream) -> None:
    question, word = unique("Hello at once")
    turn = await tab.ask(question, MODEL, stream=False)
    check_saved(await turn.done(), turn, upstream, word)
    assert turn.text == ""


async def test_next_turn_carries_the_first_answer(tab: Tab, upstream: Upstream) -> None:
    first = await tab.ask(unique("My name is Ada")[0], MODEL)
    answer = (await first.done())["content"]
    question, word = unique("What is my name?")
    second = await tab.ask(question, MODEL, after=first)
    await second.done()
    body = upstream.last(word)["body"]
    said = [(item.get("role"), item) for item in body["input"] if item.get("type", "message") == "message"]
    assert [role for role, _ in said][-3:] == ["user", "assistant", "user"]
    assert answer.strip() in str(said[-2][1]["content"])


async def test_the_chats_cost_is_told(tab: Tab) -> None:
    """From the second answer on, the status line tells what all saved answers together have cost."""
    first = await tab.ask(unique("Hello")[0], MODEL)
    spent = [(await first.done())["usage"]["cost"]]
    second = await tab.ask(unique("Hello again")[0], MODEL, after=first)
    message = await second.done()
    spent.append(message["usage"]["cost"])
    said = [turn.data("status")[-1]["description"] for turn in (first, second)]
    assert "(chat " not in said[0]
    (told,) = re.findall(r" · \$([\d.]+) \(chat \$([\d.]+)\)$", said[1])
    assert [float(part) for part in told] == [
        pytest.approx(sum(spent[-1:]), rel=0.05),
        pytest.approx(sum(spent), rel=0.05),
    ]
    assert message["statusHistory"][-1]["description"] == said[1]


async def test_two_chats_at_once_stay_apart(tab: Tab) -> None:
    words = [unique("[[drip rate=60 tokens=40]]") for _ in range(2)]
    turns = await asyncio.gather(*(tab.ask(question, MODEL) for question, _ in words))
    messages = await asyncio.gather(*(turn.done() for turn in turns))
    for turn, message in zip(turns, messages, strict=True):
        assert message["content"].split() == [f"word{index}" for index in range(40)]
        assert turn.text.strip() == message["content"].strip()


async def test_automation(tab: Tab, host: Host, upstream: Upstream) -> None:
    question, word = unique("Good morning")
    data = {
        "prompt": question,
        "model_id": MODEL,
        "rrule": "DTSTART:20990101T000000Z\nRRULE:FREQ=DAILY;COUNT=1",
    }
    made = await tab.call("POST", "/api/v1/automations/create", {"name": "Morning", "data": data})
    await tab.call("POST", f"/api/v1/automations/{made['id']}/run")

    def runs() -> list[Json]:
        return host.admin.request("GET", f"/api/v1/automations/{made['id']}/runs")

    (run,) = await until(runs, "the automation's run")
    assert run["status"] == "success", run
    chat = await tab.call("GET", f"/api/v1/chats/{run['chat_id']}")
    message = chat["chat"]["history"]["messages"][chat["chat"]["history"]["currentId"]]
    check_saved(message, Turn(tab, run["chat_id"], message["id"], ""), upstream, word)


async def test_turn_without_a_session(tab: Tab, upstream: Upstream) -> None:
    first = await tab.ask(unique("Hello")[0], MODEL)
    await first.done()
    question, word = unique("Still there?")
    turn = await tab.ask(question, MODEL, after=first, session=False)
    check_saved(await turn.saved(), turn, upstream, word)


async def test_temporary_chat(tab: Tab, upstream: Upstream) -> None:
    """Nothing is saved; the page alone holds the chat and sends its history."""
    question, word = unique("Forget this")
    turn = await tab.ask(question, MODEL, chat_id=f"temporary:{tab.socket.get_sid()}")
    await turn.wait(lambda t: t.ended, "end of turn")
    assert word in turn.text
    assert turn.data("status")[-1]["done"] is True
