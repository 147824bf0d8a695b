"""The host seam: which Open WebUI this is, and whether it will do."""

from __future__ import annotations

import importlib
from collections.abc import AsyncIterator, Mapping
from typing import Any

import pytest

from openrouter_responses_pipe.openrouter_responses_pipe import ConfigurationError, OpenWebUIHost
from pytest_bootstrap import ChatMessage


@pytest.mark.parametrize(
    "version",
    [
        "0.11.2",
        "0.11.3",
        "0.11.4",
        "0.12.0",
        "0.12.4",
        "0.100.0",
        "1.0",
        "1.0.0",
        "v0.12.4",
        "0.12.4-dev",
        "0.12.4.dev1",
        "0.11.10",
        "",
        "dev",
        None,
    ],
)
def test_hosts_that_will_do(version: str | None) -> None:
    OpenWebUIHost(version).check_version()


@pytest.mark.parametrize(
    "version", ["0.11.1", "0.11.0", "0.10.99", "0.9.6", "0.6.43", "v0.6.5", "0.11.1-dev1"]
)
def test_hosts_that_are_too_old(version: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        OpenWebUIHost(version).check_version()
    message = caught.value.user_message
    assert "0.11.2 or newer" in message
    assert version in message
    assert not caught.value.retryable


def test_it_knows_the_host_that_runs() -> None:
    """The version comes from the host's own module (here its stand-in)."""
    assert OpenWebUIHost().version is not None
    OpenWebUIHost().check_version()


# What a chat has cost

DATABASE = importlib.import_module("open_webui.internal.db")  # the stand-in, which no type checker sees


@pytest.fixture
async def chats() -> AsyncIterator[None]:
    """The host's table of messages, in a real SQLite database."""
    table = ChatMessage.metadata.tables["chat_message"]
    async with DATABASE.async_engine.connect() as connection:
        await connection.run_sync(table.create)
        await connection.commit()
        yield


async def save(chat_id: str, *usages: Mapping[str, Any] | None) -> None:
    async with DATABASE.get_async_db_context() as session:
        rows = [
            ChatMessage(id=f"{chat_id}-{number}", chat_id=chat_id, usage=usage)
            for number, usage in enumerate(usages)
        ]
        session.add_all(rows)
        await session.commit()


@pytest.mark.usefixtures("chats")
async def test_what_a_chat_has_cost() -> None:
    """Costs of one chat only; messages without usage, and values that are no price, count nothing."""
    await save(
        "a", None, {"cost": 0.25}, {"cost": 1}, {"cost": None}, {"cost": "9"}, {"tokens": 3}, {"cost": -4}
    )
    await save("b", {"cost": 64.0})
    host = OpenWebUIHost()
    assert await host.chat_cost("a") == 1.25
    assert await host.chat_cost("nobody's") == 0.0


@pytest.mark.usefixtures("chats")
async def test_a_chat_that_is_not_saved_has_no_cost() -> None:
    await save("", {"cost": 1.0})
    assert await OpenWebUIHost().chat_cost("") == 0.0
    await save("a", {"cost": 1.0})
    assert await OpenWebUIHost(None).chat_cost("a") == 0.0


async def test_a_host_that_cannot_be_asked_spoils_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """Here: it has no such table."""
    caplog.set_level("INFO")
    assert await OpenWebUIHost().chat_cost("a") == 0.0
    assert "could not be read" in caplog.text
