"""Stopping an answer at its awkward moments, and what goes on although somebody left."""

from __future__ import annotations

import asyncio
import time
from typing import Any, Final

import pytest

from openrouter_responses_pipe.webui import PIPE_FILE
from tests.e2e.driver import Tab, Turn, error_text, item_text, items, unique, until
from tests.e2e.host import MODEL, Host
from tests.e2e.upstream import Json, Upstream
from tests.support import half_an_answer

SOON_S: Final = 1.0
RETRY_AFTER_S: Final = 2
LONGER_THAN_THAT: Final = "[[drip rate=25 tokens=75]]"


async def stop_and_read(turn: Turn, upstream: Upstream, word: str) -> Json:
    """Press Stop; the upstream connection must end within a second. Returns the message as saved."""
    pressed = time.time()
    await turn.stop()
    await until(lambda: upstream.last(word)["ended"] != "open", "the upstream connection's end", 10)
    record = upstream.last(word)
    assert record["at"] + record["seconds"] - pressed < SOON_S
    return await turn.done()


def check_at_rest(message: Json) -> None:
    """After a reload nothing of a stopped message moves or waits, and it is no error."""
    assert message["done"] is True
    assert not error_text(message)
    moving = [item["type"] for item in message.get("output") or () if item["status"] == "in_progress"]
    assert moving == []
    assert [status for status in (message.get("statusHistory") or [])[-1:] if not status["done"]] == []


async def check_next_turn(tab: Tab, turn: Turn) -> None:
    """The chat goes on."""
    question, word = unique("And now?")
    message = await (await tab.ask(question, MODEL, after=turn)).done()
    assert not error_text(message)
    assert word in message["content"]


async def test_stop_while_the_model_thinks(tab: Tab, upstream: Upstream) -> None:
    """The thoughts so far are kept, their card is closed, and nothing stands below."""
    question, word = unique("[[reasoning hang=6]] Think hard")
    turn = await tab.ask(question, MODEL)
    await turn.wait(lambda t: t.responses("response.reasoning_summary_text.delta"), "reasoning")
    seen = "".join(event["delta"] for event in turn.responses("response.reasoning_summary_text.delta"))
    message = await stop_and_read(turn, upstream, word)
    assert upstream.last(word)["ended"] == "client_disconnected"
    check_at_rest(message)
    (reasoning,) = items(message, "reasoning")
    assert item_text(reasoning).startswith(seen.rstrip())
    assert message["content"] == ""
    await check_next_turn(tab, turn)


async def test_stop_while_a_retry_waits(tab: Tab, upstream: Upstream) -> None:
    """The person is told of the wait; after Stop nothing is tried again and no status goes on."""
    question, word = unique("Hello")
    upstream.next("http_error", name="503_no_provider", retry_after=RETRY_AFTER_S)
    turn = await tab.ask(question, MODEL)
    await turn.wait(lambda t: t.data("status"), "status")
    (status,) = turn.data("status")
    assert f"{RETRY_AFTER_S} s" in status["description"]
    message = await stop_and_read(turn, upstream, word)
    check_at_rest(message)
    assert message["content"] == ""
    question, later = unique(LONGER_THAN_THAT)
    message = await (await tab.ask(question, MODEL, after=turn)).done()
    assert message["content"].split()[-1] == "word74"
    asked = [record for record in upstream.asked(word) if later not in str(record["body"])]
    assert [record["status"] for record in asked] == [503]


@pytest.mark.parametrize("stream", [True, False])
async def test_stop_before_the_first_byte(stream: bool, tab: Tab, upstream: Upstream) -> None:
    question, word = unique("[[stall_headers]] Hello")
    turn = await tab.ask(question, MODEL, stream=stream)
    await until(lambda: upstream.asked(word), "the request")
    message = await stop_and_read(turn, upstream, word)
    assert upstream.last(word)["ended"] == "client_disconnected"
    check_at_rest(message)
    assert message["content"] == ""
    await check_next_turn(tab, turn)


async def test_stop_without_streaming_keeps_the_text(tab: Tab, upstream: Upstream) -> None:
    """Nothing of it was on the page; after Stop the text so far is there, and stays."""
    upstream.next("replay", body=half_an_answer(), hang=3)
    question, word = unique("Hello")
    turn = await tab.ask(question, MODEL, stream=False)
    await turn.wait(lambda t: t.data("status"), "a status, which comes after the text")
    message = await stop_and_read(turn, upstream, word)
    assert upstream.last(word)["ended"] == "client_disconnected"
    check_at_rest(message)
    assert message["content"] == "Half an ans"
    assert message["statusHistory"][-1]["description"] == "Stopped"
    await check_next_turn(tab, turn)


async def test_stop_while_a_server_tool_works(tab: Tab, upstream: Upstream) -> None:
    """A search that was under way is no longer shown as under way."""
    question, word = unique("[[web_search hang=2]] What is new?")
    turn = await tab.ask(question, MODEL)
    await turn.wait(lambda t: t.data("status"), "status")
    assert turn.data("status")[-1]["done"] is False
    check_at_rest(await stop_and_read(turn, upstream, word))


async def test_stop_between_a_call_and_the_end_of_its_stream(tab: Tab, upstream: Upstream) -> None:
    """A call that is complete, in an answer that is not, is neither run nor shown."""
    question, word = unique("[[golden name=05_parallel_function_calls hang=23]]")
    turn = await tab.ask(question, MODEL)
    await turn.wait(lambda t: "for you." in t.text, "text")
    message = await stop_and_read(turn, upstream, word)
    assert upstream.last(word)["ended"] == "client_disconnected"
    check_at_rest(message)
    assert message["content"] == "Checking both for you."
    assert items(message, "function_call") == []
    assert len(upstream.asked(word)) == 1


async def test_closing_the_page_in_mid_answer(host: Host, upstream: Upstream) -> None:
    """The work goes on, and the whole answer is there when the chat is opened again."""
    question, word = unique("[[drip rate=40 tokens=80]]")
    async with Tab.open(host.admin) as page:
        turn = await page.ask(question, MODEL)
        await turn.wait(lambda t: "word9 " in t.text, "text")
    assert upstream.last(word)["ended"] == "open"

    def saved() -> Any:
        chat = host.admin.request("GET", f"/api/v1/chats/{turn.chat_id}")
        message = chat["chat"]["history"]["messages"][turn.message_id]
        return message if message.get("done") else None

    message = await until(saved, "the end of the answer")
    check_at_rest(message)
    assert message["content"].split() == [f"word{index}" for index in range(80)]
    assert message["usage"]["output_tokens"] > 0
    assert upstream.last(word)["ended"] == "completed"


async def test_saving_the_function_without_streaming(host: Host, tab: Tab, upstream: Upstream) -> None:
    """A running answer of a chat without streaming finishes in the old code."""
    source = PIPE_FILE.read_text(encoding="utf-8")
    question, word = unique("[[drip rate=40 tokens=120]]")
    running = await tab.ask(question, MODEL, stream=False)
    await until(lambda: upstream.asked(word), "the request")
    await asyncio.to_thread(host.admin.install_function, f"{source}\n# saved again\n")
    try:
        second = await (await tab.ask("Hello in the meantime", MODEL)).done()
        assert second["content"].startswith("Hello!")
        assert upstream.last(word)["ended"] == "open"
        message = await running.done()
    finally:
        await asyncio.to_thread(host.admin.install_function, source)
    check_at_rest(message)
    assert message["content"].split() == [f"word{index}" for index in range(120)]
    third = await (await tab.ask("And again", MODEL, stream=False)).done()
    assert third["content"].startswith("Hello!")
