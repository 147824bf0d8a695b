"""The page itself, read as a person reads it, in the system's Chromium."""

from __future__ import annotations

import re
from pathlib import Path

from playwright.async_api import expect

from openrouter_responses_pipe.webui import FUNCTION_ID
from tests.e2e.host import KEY, MODEL, Host
from tests.e2e.page import ChatPage

THOUGHT = re.compile(r"Thought for \d+ seconds?")


async def check_answer(chat: ChatPage) -> None:
    """See the answer, its reasoning card and its final status."""
    await expect(chat.answer).to_contain_text("Hello! This is OpenAI: GPT-5 Mini")
    await expect(chat.answer).to_contain_text("the weather on Mars")
    card = chat.message.get_by_role("button", name=THOUGHT)
    await expect(card).to_be_visible()
    await expect(chat.status.last).to_be_visible()
    assert (await chat.status.last.inner_text()).strip()


async def test_chat(host: Host, folder: Path) -> None:
    async with ChatPage.open(host.admin, folder / "screenshots") as chat:
        await chat.new_chat(MODEL)
        await chat.ask("Tell me about the skies on Mars, not the weather on Mars. [[reasoning rate=15]]")
        await expect(chat.message).to_contain_text("Thinking")
        await chat.screenshot("thinking")
        await chat.finished()
        await check_answer(chat)
        await chat.screenshot("answer")
        await chat.message.get_by_role("button", name=THOUGHT).click()
        for part in ("Reading the message", "A short answer will do."):
            await expect(chat.message.get_by_text(part)).to_be_in_viewport()
        await chat.screenshot("reasoning")
        await chat.reload()
        await check_answer(chat)
        await chat.screenshot("reloaded")


async def test_markdown_while_it_streams(host: Host, folder: Path) -> None:
    async with ChatPage.open(host.admin, folder / "screenshots") as chat:
        await chat.new_chat(MODEL)
        await chat.ask("[[markdown rate=60 parts=2]]")
        await expect(chat.answer).to_contain_text("A tour of Markdown")
        await chat.screenshot("markdown-streaming")
        await chat.finished()
        await expect(chat.answer.locator("table")).to_have_count(2)
        await expect(chat.answer).to_contain_text("naïve café, 漢字, 👩‍👩‍👧, 🇳🇴")
        await chat.screenshot("markdown")


async def test_tool_card(host: Host, folder: Path) -> None:
    async with ChatPage.open(host.admin, folder / "screenshots") as chat:
        await chat.new_chat(MODEL)
        await chat.ask("[[tool name=get_current_timestamp args={}]] What time is it?")
        await chat.finished()
        await expect(chat.message).to_contain_text("The tools returned")
        await expect(chat.message).to_contain_text("get_current_timestamp")
        await chat.screenshot("tool")


async def test_error_after_text(host: Host, folder: Path) -> None:
    async with ChatPage.open(host.admin, folder / "screenshots") as chat:
        await chat.new_chat(MODEL)
        await chat.ask("[[failed after=6]] Hello")
        await expect(chat.message).to_contain_text("Hello! This is OpenAI: GPT-5")
        await expect(chat.message).to_contain_text("overloaded")
        await chat.screenshot("error-after-text")
        await chat.reload()
        await expect(chat.message).to_contain_text("Hello! This is OpenAI: GPT-5")
        await expect(chat.message).to_contain_text("overloaded")


async def test_no_key(host: Host, folder: Path) -> None:
    host.admin.set_valves({"API_KEY": None})
    try:
        async with ChatPage.open(host.admin, folder / "screenshots") as chat:
            await chat.new_chat(MODEL)
            await chat.ask("Hello")
            await expect(chat.message).to_contain_text("API_KEY")
            await chat.screenshot("no-key")
    finally:
        host.admin.set_valves({"API_KEY": KEY})


async def test_settings_form(host: Host, folder: Path) -> None:
    """The administrator's form opens, and the key is not shown."""
    async with ChatPage.open(host.admin, folder / "screenshots") as chat:
        await chat.page.goto(f"{host.server.url}/admin/functions")
        await chat.close_greeting()
        await chat.page.get_by_role("button", name="Valves").first.click()
        await expect(chat.page.get_by_text("Api Key").first).to_be_visible()
        await chat.screenshot("settings")
        assert KEY not in await chat.page.content()
        assert FUNCTION_ID in await chat.page.content()
