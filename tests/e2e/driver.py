"""A browser tab without a browser: the socket and the calls that Open WebUI's page makes.

`Tab.ask` sends a question as the page does and returns a `Turn`, which collects the events of its
answer and reads back what the server has saved. Everything waits for a condition with a bound.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import socketio

from openrouter_responses_pipe.webui import WebUIClient, WebUIError

WAIT_S = 60.0
FEATURES = {"voice": False, "image_generation": False, "code_interpreter": False, "web_search": False}

Json = dict[str, Any]


def unique(question: str) -> tuple[str, str]:
    """Return the question with a word of its own, and that word, to find its request by."""
    word = f"e2e{uuid.uuid4().hex[:10]}"
    return f"{question} {word}", word


async def until(condition: Callable[[], Any], what: str, timeout_s: float = WAIT_S) -> Any:
    """Return the first true value of `condition`, which may ask a server; fail by name when it is late."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if value := await asyncio.to_thread(condition):
            return value
        await asyncio.sleep(0.02)
    raise AssertionError(f"{what}: not within {timeout_s:.0f} s")


@dataclass
class Turn:
    """One question, the events of its answer, and the message as saved."""

    tab: Tab
    chat_id: str
    message_id: str
    user_message_id: str
    events: list[tuple[float, str, Any]] = field(default_factory=list)
    documents: list[Json] = field(default_factory=list)  # all files of the chat so far but its pictures

    def data(self, kind: str) -> list[Any]:
        """Return the data of every event of one type."""
        return [data for _, name, data in self.events if name == kind]

    def responses(self, kind: str) -> list[Json]:
        """Return the native Responses events of one type that reached the page."""
        return [
            event
            for data in self.data("response:completion")
            for event in _flatten(data)
            if event["type"] == kind
        ]

    @property
    def text(self) -> str:
        """The text that the page has been given so far."""
        return "".join(event["delta"] for event in self.responses("response.output_text.delta"))

    async def wait(self, condition: Callable[[Turn], Any], what: str, timeout_s: float = WAIT_S) -> Any:
        """Return the first true value of `condition`, looked at after each event."""
        async with asyncio.timeout(timeout_s):
            while not (value := condition(self)):
                await self.tab.changed()
            return value
        raise AssertionError(what)

    async def done(self, timeout_s: float = WAIT_S) -> Json:
        """Wait until the server says that nothing runs in this chat any more; return the saved message."""
        try:
            await self.wait(lambda turn: turn.ended, "end of turn", timeout_s)
        except TimeoutError:
            seen = [name for _, name, _ in self.events]
            raise AssertionError(f"the turn did not end within {timeout_s:.0f} s; events: {seen}") from None
        return await self.saved()

    @property
    def ended(self) -> bool:
        """Whether the chat has become inactive after this turn began."""
        return any(not data["active"] for data in self.data("chat:active"))

    async def saved(self) -> Json:
        """Return the assistant's message as a reload of the page would get it."""
        return await self.tab.saved_message(self.chat_id, self.message_id)

    async def stop(self) -> None:
        """Press the Stop button."""
        await self.tab.call("POST", f"/api/tasks/chat/{self.chat_id}/stop")


def _flatten(data: Any) -> list[Json]:
    """Return the events in one socket message: the server may join several into a list."""
    return data if isinstance(data, list) else [data]


class Tab:
    """A logged-in page with its socket."""

    def __init__(self, client: WebUIClient, socket: socketio.AsyncClient) -> None:
        self.client = client
        self.socket = socket
        self.turns: list[Turn] = []
        self._backlog: list[tuple[float, Json]] = []
        self._change = asyncio.Event()

    @classmethod
    @contextlib.asynccontextmanager
    async def open(cls, client: WebUIClient) -> AsyncIterator[Tab]:
        """Connect the socket as the page does, and close it at the end."""
        socket = socketio.AsyncClient(reconnection=False)
        tab = cls(client, socket)
        socket.on("events", tab._on_event)
        auth = {"token": client.token}
        await socket.connect(client.url, socketio_path="/ws/socket.io", transports=["websocket"], auth=auth)
        try:
            await socket.emit("user-join", {"auth": auth})
            yield tab
        finally:
            await socket.disconnect()
            await socket.shutdown()
            # the library leaves its aiohttp session's connector to the garbage collector
            await asyncio.sleep(0)

    def _on_event(self, message: Json) -> None:
        now = time.monotonic()
        self._backlog.append((now, message))
        for turn in self.turns:
            self._hand_over(turn, now, message)
        change, self._change = self._change, asyncio.Event()
        change.set()

    @staticmethod
    def _hand_over(turn: Turn, now: float, message: Json) -> None:
        data = message.get("data") or {}
        kind = data.get("type", "")
        of_chat = kind.startswith("chat:") and message.get("message_id") in (None, turn.message_id)
        if message.get("message_id") == turn.message_id or (
            of_chat and message.get("chat_id") == turn.chat_id
        ):
            turn.events.append((now, kind, data.get("data")))

    async def changed(self) -> None:
        """Wait for the next event of any chat."""
        await self._change.wait()

    async def call(self, method: str, path: str, body: Any = None, timeout: float = WAIT_S) -> Any:
        """Call the server's API without holding up the socket."""
        return await asyncio.to_thread(self.client.request, method, path, body, timeout)

    async def saved_message(self, chat_id: str, message_id: str) -> Json:
        """Read one message of a chat from the database."""
        chat = await self.call("GET", f"/api/v1/chats/{chat_id}")
        return chat["chat"]["history"]["messages"][message_id]

    async def ask(
        self,
        question: str | list[Json],
        model: str,
        *,
        after: Turn | None = None,
        session: bool = True,
        attached: Sequence[Json] = (),
        **fields: Any,
    ) -> Turn:
        """Send a question as the page does: into a new chat, or `after` an earlier turn.

        The files `attached` to it are kept with it; those that are no pictures go with each later one too.
        """
        user_id, message_id = str(uuid.uuid4()), str(uuid.uuid4())
        parent_id = after.message_id if after else None
        documents = [*(after.documents if after else ()), *filter(is_document, attached)]
        body: Json = {
            "stream": True,
            "model": model,
            "messages": [{"role": "user", "content": question}],
            "params": {},
            "features": FEATURES,
            "variables": {},
            "session_id": self.socket.get_sid() if session else None,
            "id": message_id,
            "parent_id": parent_id,
            "user_message": {
                "id": user_id,
                "parentId": parent_id,
                "childrenIds": [message_id],
                "role": "user",
                "content": question,
                **({"files": list(attached)} if attached else {}),
                "timestamp": int(time.time()),
                "models": [model],
            },
            **({"files": documents} if documents else {}),
            "message_ids": [{"model_id": model, "message_id": message_id}],
            "background_tasks": {},
            **fields,
        }
        if after:
            body["chat_id"] = after.chat_id
        sent = time.monotonic()
        reply = await self.call("POST", "/api/chat/completions", body) or {}
        chat_id = reply.get("chat_id") or body.get("chat_id")
        if not chat_id:
            raise WebUIError(f"the server did not take the question: {reply}")
        turn = Turn(self, chat_id, message_id, user_id, documents=documents)
        for when, message in self._backlog:
            if when >= sent:
                self._hand_over(turn, when, message)
        self.turns.append(turn)
        return turn


def is_document(attached: Mapping[str, Any]) -> bool:
    """Whether the page sends this as a file of the chat; a picture is part of its question."""
    is_picture = attached.get("type") == "image" or attached.get("content_type", "").startswith("image/")
    return not is_picture


def items(message: Mapping[str, Any], kind: str) -> list[Json]:
    """Return the saved output items of one type."""
    return [item for item in message.get("output") or [] if item.get("type") == kind]


def item_text(item: Mapping[str, Any]) -> str:
    """Return the text of a message or reasoning item."""
    parts = item.get("summary") or item.get("content") or []
    return "".join(part.get("text", "") for part in parts)


def error_text(message: Mapping[str, Any]) -> str:
    """Return the sentence that the page shows in the error box, or nothing."""
    content = (message.get("error") or {}).get("content")
    if isinstance(content, dict):
        content = content.get("detail") or content.get("message")
    return str(content or "")
