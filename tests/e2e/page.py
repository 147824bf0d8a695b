"""Open WebUI's page in the system's Chromium."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import quote, urlsplit

from playwright.async_api import Locator, Page, Route, async_playwright, expect

from openrouter_responses_pipe.webui import WebUIClient

_FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
_TYPING_PAUSE_MS = 250  # the editor hands its text over 200 ms after the last key
_WAIT_MS = 60_000


class ChatPage:
    """One logged-in page, seen as a person sees it."""

    def __init__(self, page: Page, url: str, screenshots: Path) -> None:
        self.page = page
        self.url = url
        self._screenshots = screenshots

    @classmethod
    @contextlib.asynccontextmanager
    async def open(cls, client: WebUIClient, screenshots: Path) -> AsyncIterator[ChatPage]:
        """Start Chromium with this account logged in; nothing may leave the machine."""
        chromium = shutil.which("chromium") or shutil.which("chromium-browser") or "/usr/bin/chromium"
        host = urlsplit(client.url).netloc

        async def only_here(route: Route) -> None:
            if urlsplit(route.request.url).netloc in (host, ""):
                await route.continue_()
            else:
                await route.abort()

        async with async_playwright() as playwright:
            browser = await playwright.chromium.launch(
                executable_path=chromium, headless=True, args=list(_FLAGS)
            )
            try:
                page = await browser.new_page(viewport={"width": 1280, "height": 900})
                page.set_default_timeout(_WAIT_MS)
                await page.route("**/*", only_here)
                await page.add_init_script(f"localStorage.token = {client.token!r}")
                yield cls(page, client.url, screenshots)
            finally:
                await browser.close()

    async def new_chat(self, model: str) -> None:
        """Open a new chat with this model."""
        await self.page.goto(f"{self.url}/?models={quote(model, safe='')}")
        await expect(self.page.locator("#chat-input")).to_be_visible(timeout=_WAIT_MS)
        await self.close_greeting()

    async def close_greeting(self) -> None:
        """Close what greets a first visit, if it does."""
        greeting = self.page.get_by_role("button", name="Okay, Let's Go!")
        with contextlib.suppress(AssertionError):
            await expect(greeting).to_be_visible(timeout=3_000)
            await greeting.click()
            await expect(greeting).to_be_hidden()

    async def open_model_menu(self) -> Locator:
        """Open the list of models of a new chat; return its entries."""
        await self.page.get_by_role("button", name="Selected model").click()
        entries = self.page.get_by_role("option")
        await expect(entries.first).to_be_visible()
        return entries

    async def open_model_editor(self, name: str) -> Locator:
        """Open Admin → Settings → Models → this model, with its capabilities unfolded; return the editor."""
        await self.page.goto(f"{self.url}/admin/settings/models")
        editor = self.page.get_by_role("dialog")
        await editor.get_by_role("button", name=name).first.click()
        await editor.get_by_text("Capabilities", exact=True).click()
        await expect(editor.get_by_role("switch", name="Vision")).to_be_visible()
        return editor

    async def save_model(self, editor: Locator) -> None:
        """Press "Save & Update" and wait until it has been saved."""
        await editor.get_by_role("button", name="Save & Update").click()
        await expect(self.page.get_by_text("Model updated successfully")).to_be_visible()

    async def ask(self, question: str) -> None:
        """Type a question and send it."""
        box = self.page.locator("#chat-input")
        await box.click()
        await box.press_sequentially(question)
        await self.page.wait_for_timeout(_TYPING_PAUSE_MS)
        await box.press("Enter")

    @property
    def answer(self) -> Locator:
        """The last assistant message with text in it."""
        return self.page.locator(".chat-assistant").last

    @property
    def message(self) -> Locator:
        """The last message with everything around it: status, reasoning card, buttons."""
        # by attribute, not by role: a list in an answer has items too
        return self.page.locator('[role="log"] [role="listitem"]').last

    @property
    def status(self) -> Locator:
        """The status line above the last answer."""
        return self.message.locator(".status-description")

    async def finished(self) -> None:
        """Wait until the answer is complete: only then does the page offer to ask for another one."""
        await expect(self.message.get_by_role("button", name="Regenerate")).to_be_attached(timeout=_WAIT_MS)

    async def reload(self) -> None:
        """Load the chat anew, as somebody who comes back does."""
        await self.page.wait_for_url("**/c/*")
        await self.page.reload()
        await expect(self.page.locator("#chat-input")).to_be_visible(timeout=_WAIT_MS)

    async def screenshot(self, name: str) -> None:
        """Keep what the page looks like now."""
        await self.page.screenshot(path=self._screenshots / f"{name}.png")
