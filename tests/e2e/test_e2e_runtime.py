"""What people see of the queue, of the log of an error and of the console, on the real server and page."""

from __future__ import annotations

from pathlib import Path

import pytest
from playwright.async_api import expect

from tests.e2e.driver import Tab, Turn, error_text, unique
from tests.e2e.host import KEY, MODEL, Host, valves
from tests.e2e.page import ChatPage
from tests.e2e.upstream import Upstream

WAITING = "Waiting for a free place: "


async def one_beside_another(tab: Tab, words: str) -> tuple[Turn, Turn, str]:
    """(an answer that is being written, one that waits for its end and says so, the word in its question)."""
    first = await tab.ask(unique("[[drip rate=20 tokens=100]]")[0], MODEL)
    await first.wait(lambda turn: turn.text, "text")
    question, word = unique(words)
    second = await tab.ask(question, MODEL)
    await second.wait(lambda turn: turn.data("status"), "the place in the queue")
    return first, second, word


async def test_who_waits_is_told_the_place(tab: Tab, host: Host, upstream: Upstream) -> None:
    """One answer at a time: the second waits, says so, and comes; its line of waiting does not stay."""
    with valves(host, MAX_CONCURRENT_REQUESTS=1):
        first, second, word = await one_beside_another(tab, "And now me")
        assert second.data("status")[0]["description"] == WAITING + "this request is the next"
        assert not upstream.asked(word)
        assert "word99" in (await first.done())["content"]
        message = await second.done()
    assert word in message["content"]
    assert WAITING not in message["statusHistory"][-1]["description"]
    assert message["statusHistory"][-1]["done"] is True


async def test_stop_leaves_the_queue(tab: Tab, host: Host, upstream: Upstream) -> None:
    with valves(host, MAX_CONCURRENT_REQUESTS=1):
        first, second, word = await one_beside_another(tab, "Not any more")
        await second.stop()
        message = await second.done()
        await first.done()
    assert (message["done"], message["content"], error_text(message)) == (True, "", "")
    assert not upstream.asked(word)


@pytest.mark.parametrize("readers", ["admins", "off"])
async def test_the_log_of_an_error(readers: str, tab: Tab, host: Host) -> None:
    """Saved with the message for administrators, without the key; switched off there is none."""
    with valves(host, SHOW_ERROR_LOG_CITATION=readers):
        message = await (await tab.ask("[[http_error name=402_credits]]", MODEL)).done()
    logs = [source for source in message.get("sources") or () if "url" not in source["source"]]
    assert len(logs) == (readers == "admins")
    for log in logs:
        assert log["source"]["name"].startswith("Log of request ")
        assert "failed: credits, HTTP 402" in log["document"][0]
        assert KEY not in log["document"][0]


async def test_the_log_in_the_page_and_in_its_console(host: Host, folder: Path) -> None:
    """A person clicks the source under an error; with DEBUG the console has the lines, too."""
    said: list[str] = []
    with valves(host, DEBUG=True):
        async with ChatPage.open(host.admin, folder / "screenshots") as chat:
            chat.page.on("console", lambda message: said.append(message.text))
            await chat.new_chat(MODEL)
            await chat.ask("[[http_error name=402_credits]]")
            await expect(chat.page.get_by_text("1 Source")).to_be_visible(timeout=30_000)
            await chat.screenshot("log-of-an-error")
            await chat.page.get_by_text("1 Source").click()
            await expect(chat.page.get_by_text("Log of request").first).to_be_visible()
            await chat.screenshot("log-of-an-error-open")
    [lines] = [text for text in said if text.startswith("OpenRouter, request ")]
    assert "failed: credits, HTTP 402" in lines
    assert KEY not in lines
