"""Pictures that models make, on the real host: files of the person who asked, which the page shows."""

from __future__ import annotations

import asyncio
import base64
import json
import re
import sqlite3
import urllib.error
import uuid
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Final

import pytest
from playwright.async_api import Locator, expect

from openrouter_responses_pipe.webui import READ_BY_EVERYONE, WebUIClient
from tests.e2e.driver import Json, Tab, error_text, item_text, items, unique, until
from tests.e2e.host import MODEL, Host
from tests.e2e.page import ChatPage
from tests.e2e.test_e2e_media import data_url, http, pictures, told
from tests.e2e.upstream import Upstream

SHOWN: Final = re.compile(r"!\[Picture\]\((/api/v1/files/([0-9a-f-]{36})/content)\)")
PIXELS: Final = 317  # as large as no other picture of the tests
DRAW: Final = f"[[image size={PIXELS}]] A cat, please"


@pytest.fixture
def stranger(host: Host) -> WebUIClient:
    """Somebody else, who is no administrator."""
    name = f"otto-{uuid.uuid4().hex[:8]}"
    return host.admin.add_user("Otto", f"{name}@example.com", "yet another long password")


def rows(host: Host, table: str, column: str, value: str) -> list[Json]:
    """Rows of the server's own database."""
    path = host.server.folder / "data" / "webui.db"
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
        database.row_factory = sqlite3.Row
        found = database.execute(f"SELECT * FROM {table} WHERE {column} = ?", (value,)).fetchall()
    return [dict(row) for row in found]


def expect_no_base64(host: Host, chat_id: str, content: bytes) -> None:
    """Expect the picture nowhere in what is saved of a chat."""
    chats, messages = rows(host, "chat", "id", chat_id), rows(host, "chat_message", "chat_id", chat_id)
    assert (len(chats), len(messages) > 1) == (1, True)
    saved = repr([chats, messages])
    assert "base64," not in saved
    assert base64.b64encode(content).decode()[300:340] not in saved


def is_hidden_from(client: WebUIClient, path: str) -> bool:
    """Whether the server says that there is nothing."""
    try:
        http(client, path)
    except urllib.error.HTTPError as error:
        error.close()
        return error.code == 404
    return False


def share(client: WebUIClient, chat_id: str, person: WebUIClient) -> None:
    """Share a chat with one person."""
    client.request("POST", f"/api/v1/chats/{chat_id}/share", {})
    grant = {"principal_type": "user", "principal_id": person.whoami()["id"], "permission": "read"}
    client.request("POST", f"/api/v1/chats/shared/{chat_id}/access/update", {"access_grants": [grant]})


@pytest.mark.parametrize("streams", [True, False], ids=["streamed", "at once"])
async def test_a_picture_is_a_file_of_the_persons(
    streams: bool, host: Host, user_tab: Tab, upstream: Upstream, stranger: WebUIClient
) -> None:
    turn = await user_tab.ask(DRAW, MODEL, stream=streams)
    message = await turn.done()
    assert not error_text(message)
    assert "cannot be shown" not in told(message)
    match = SHOWN.search(message["content"])
    assert match
    path, file_id = match.groups()
    texts = [item_text(item) for item in items(message, "message")]
    assert texts == [match[0], "Here is your picture."]

    content = await asyncio.to_thread(http, host.user, path)
    assert content.startswith(b"\x89PNG")
    file = await user_tab.call("GET", f"/api/v1/files/{file_id}")
    assert (file["user_id"], file["filename"]) == (host.user.whoami()["id"], "picture.png")
    assert file["meta"] == {"name": "picture.png", "content_type": "image/png", "size": len(content)}
    [link] = rows(host, "chat_file", "file_id", file_id)
    assert (link["chat_id"], link["message_id"]) == (turn.chat_id, turn.message_id)
    expect_no_base64(host, turn.chat_id, content)

    assert is_hidden_from(stranger, path)
    await asyncio.to_thread(share, host.user, turn.chat_id, stranger)
    assert await asyncio.to_thread(http, stranger, path) == content

    question, word = unique("What is on it?")
    assert not error_text(await (await user_tab.ask(question, MODEL, after=turn)).done())
    body = upstream.last(word)["body"]
    assert pictures(body) == [(1, data_url(content, "image/png"))]
    assert match[0] in json.dumps(body)


async def is_shown(chat: ChatPage) -> Locator:
    """See the picture: the browser has fetched it whole."""
    drawn = chat.answer.locator("img[src*='/api/v1/files/']")
    await expect(drawn).to_have_count(1)
    await expect(drawn).to_be_visible()
    await expect(drawn).to_have_js_property("complete", True)
    await expect(drawn).to_have_js_property("naturalWidth", PIXELS)
    await expect(chat.answer).to_contain_text("Here is your picture.")
    return drawn


async def test_the_page_shows_it(host: Host, folder: Path) -> None:
    async with ChatPage.open(host.user, folder / "screenshots") as chat:
        await chat.new_chat(MODEL)
        await chat.ask(DRAW)
        await chat.finished()
        await is_shown(chat)
        await chat.screenshot("picture")
        await chat.reload()
        drawn = await is_shown(chat)
        await chat.screenshot("picture-reloaded")
        path = str(await drawn.get_attribute("src")).removeprefix(host.server.url)
        chat_id = chat.page.url.rpartition("/c/")[2]
        assert SHOWN.fullmatch(f"![Picture]({path})")
        expect_no_base64(host, chat_id, await asyncio.to_thread(http, host.user, path))


# A channel


@pytest.fixture
def channel(host: Host) -> Iterator[str]:
    """A channel that everybody may read."""
    settings = host.admin.request("GET", "/api/v1/auths/admin/config")
    host.admin.request("POST", "/api/v1/auths/admin/config", {**settings, "ENABLE_CHANNELS": True})
    form = {"name": f"art-{uuid.uuid4().hex[:8]}", "access_grants": [READ_BY_EVERYONE]}
    yield host.admin.request("POST", "/api/v1/channels/create", form)["id"]
    host.admin.request("POST", "/api/v1/auths/admin/config", settings)


async def drawn_in(host: Host, channel_id: str) -> Json:
    """The saved message of a model that was asked for a picture in a channel."""
    form = {"content": f"<@M:{MODEL}|GPT-5 Mini> {DRAW}"}
    path = f"/api/v1/channels/{channel_id}/messages/post"
    await asyncio.to_thread(host.admin.request, "POST", path, form)

    def answered() -> list[Json]:
        messages = rows(host, "message", "channel_id", channel_id)
        return [row for row in messages if json.loads(row["meta"] or "null") and "done" in row["meta"]]

    [message] = await until(answered, "the answer in the channel")
    return message


async def test_a_channel_holds_no_base64(host: Host, channel: str) -> None:
    message = await drawn_in(host, channel)
    match = SHOWN.search(message["content"])
    assert match
    assert (await asyncio.to_thread(http, host.admin, match[1])).startswith(b"\x89PNG")
    assert "base64," not in repr(rows(host, "message", "channel_id", channel))


async def test_who_reads_a_channel_sees_its_pictures(host: Host, channel: str) -> None:
    message = await drawn_in(host, channel)
    match = SHOWN.search(message["content"])
    assert match
    assert not await asyncio.to_thread(is_hidden_from, host.user, match[1])
