"""Shared by the tests of the edge floors: prompts, clients of every dialect, and servers that misbehave.

Nothing here replaces code of the project. The upstream is the project's simulator over loopback, or a
bare socket server where the simulator is too well-behaved.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from openrouter_responses_pipe.openrouter_responses_pipe import Connection, Pipe
from openrouter_responses_pipe.simulator import CATALOG, RecordedRequest, Simulator

Json = dict[str, Any]
KEY: Final = "sk-or-v1-key-of-the-administrator"
MODEL: Final = "openai/gpt-4o-mini"  # writes text, does not reason
GOLDEN: Final = Path(__file__).parent / "data" / "golden"
TRANSCRIPTS: Final[dict[str, Json]] = json.loads((GOLDEN / "manifest.json").read_text("utf-8"))["transcripts"]
# the recorded streams of `/responses`; the others are of `/chat/completions`
STREAMS: Final = sorted(name for name in TRANSCRIPTS if not name.startswith("c"))
SOON_S: Final = 1.0  # what must have happened after a stop
PATIENCE_S: Final = 10.0  # a wait that ends in a failure of the test

# dialect -> (streams, in a chat, task)
DIALECTS: Final[dict[str, tuple[bool, bool, str | None]]] = {
    "browser": (True, True, None),
    "browser_json": (False, True, None),
    "api_stream": (True, False, None),
    "api_json": (False, False, None),
    "task": (False, True, "title_generation"),
    "task_stream": (True, True, "moa_response_generation"),
}
# the menu that the simulator's catalog makes: id -> name
MENU: Final[dict[str, str]] = {
    row["id"]: row["name"] for row in CATALOG if "text" in row["architecture"]["output_modalities"]
}
STREAMING: Final = [name for name, (streams, _, _) in DIALECTS.items() if streams]


def without_pictures(text: str) -> tuple[str, list[str]]:
    """(a text without the pictures that the pipe put into it, and the lines of theirs; their addresses)."""
    return _PICTURE_RE.sub("", text), [match[1] for match in _PICTURE_RE.finditer(text)]


_PICTURE_RE: Final = re.compile(r"\n?!\[Picture\]\(([^()\s]*)\)\n?")


def without_id(told: str) -> tuple[str, str]:
    """(an error as it is told, without the id at its end; that id)."""
    match = re.fullmatch(r"(.*?)(?: \(Error ([0-9a-f]{8})\))?", told, flags=re.DOTALL)
    assert match
    return match[1], match[2] or ""


class Events(list[Json]):
    """An event emitter that keeps what it is given."""

    async def __call__(self, event: Json) -> None:
        """Take one event."""
        self.append(event)

    def of(self, kind: str) -> list[Json]:
        """The data of the events of one type."""
        return [event["data"] for event in self if event["type"] == kind]

    def statuses(self) -> list[str]:
        """What the person was told, line by line."""
        return [status["description"] for status in self.of("status")]


@dataclass
class Answer:
    """What a client has got: the chunks as they came, and what they amount to."""

    text: str = ""
    reasoning: str = ""
    error: str = ""
    error_id: str = ""
    usage: Json | None = None
    finish: str | None = None
    calls: list[Json] = field(default_factory=list)
    chunks: list[Json] = field(default_factory=list)

    def add(self, chunk: Json) -> None:
        """Take one streamed chunk of any dialect, or the whole answer of one that does not stream."""
        self.chunks.append(chunk)
        if chunk.get("error"):
            self.error, self.error_id = without_id(chunk["error"]["message"])
        if str(chunk.get("type", "")).startswith("response."):
            self._add_event(chunk)
            return
        if chunk.get("usage"):
            self.usage = chunk["usage"]
        for item in chunk.get("output", ()):
            self._add_item(item, whole=True)
        for choice in chunk.get("choices", ()):
            said = choice.get("delta") or choice.get("message") or {}
            self.text += said.get("content") or ""
            self.reasoning += said.get("reasoning_content") or ""
            self.finish = choice.get("finish_reason") or self.finish
            self.calls += [call["function"] for call in said.get("tool_calls") or ()]

    def _add_event(self, event: Json) -> None:
        if event["type"] == "response.output_text.delta":
            self.text += event["delta"]
        elif event["type"] == "response.reasoning_summary_text.delta":
            self.reasoning += event["delta"]
        elif event["type"] == "response.output_item.done":
            self._add_item(event["item"], whole=False)
        elif event["type"] == "response.completed":
            self.finish = "completed"
            self.usage = event["response"].get("usage") or self.usage

    def _add_item(self, item: Json, *, whole: bool) -> None:
        if item["type"] == "function_call":
            self.calls.append({"name": item["name"], "arguments": item["arguments"]})
        elif item["type"] == "reasoning" and whole:
            self.reasoning += "".join(part["text"] for part in item["summary"])

    def items(self) -> list[Json]:
        """The output items as the host saves them: the last word on each, in order."""
        done = {
            chunk["output_index"]: chunk["item"]
            for chunk in self.chunks
            if chunk.get("type") == "response.output_item.done"
        }
        whole = [item for chunk in self.chunks for item in chunk.get("output", ())]
        return whole or [done[index] for index in sorted(done)]

    def saved_text(self) -> str:
        """The text of the message items, which is what the model will be shown next time."""
        parts = [part for item in self.items() if item["type"] == "message" for part in item["content"]]
        return "".join(part["text"] for part in parts)


def arguments(prompt: str | Json, dialect: str = "browser", **more: Any) -> Json:
    """What the host passes to `pipe()` for a request; `more` goes into the body, `prompt` may be one."""
    streams, in_chat, task = DIALECTS[dialect]
    ids: Json = {"chat_id": "chat", "message_id": "message", "session_id": "session"}
    if not in_chat:
        ids = {"chat_id": "", "message_id": None, "session_id": None}
    body: Json = {"model": f"openrouter.{MODEL}", "stream": streams}
    body |= {"messages": [{"role": "user", "content": prompt}]} if isinstance(prompt, str) else prompt
    return {
        "body": body | more,
        "__user__": {"id": "user", "name": "U", "email": "u@example.org", "role": "user"},
        "__metadata__": {**ids, "user_id": "user", "params": {}, "features": {}, "files": None},
        "__event_emitter__": Events(),
        "__task__": task,
    }


async def ask(pipe: Pipe, prompt: str | Json, dialect: str = "browser", **more: Any) -> Answer:
    """One request from start to end."""
    return await call(pipe, arguments(prompt, dialect, **more))


async def call(pipe: Pipe, given: Json) -> Answer:
    """`pipe()` with these arguments, and everything that it answers."""
    answer = Answer()
    result = await pipe.pipe(**given)
    if isinstance(result, dict):
        answer.add(result)
        return answer
    async for chunk in result:
        answer.add(chunk)
    return answer


async def stream(pipe: Pipe, prompt: str | Json, dialect: str = "browser") -> AsyncGenerator[Json, None]:
    """The generator that `pipe()` returns."""
    result = await pipe.pipe(**arguments(prompt, dialect))
    assert not isinstance(result, dict)
    return result


async def read_until_text(chunks: AsyncIterator[Json], answer: Answer) -> Answer:
    """Read until the first text has come."""
    async with asyncio.timeout(PATIENCE_S):
        while not answer.text:
            answer.add(await anext(chunks))
    return answer


async def read_rest(chunks: AsyncIterator[Json], answer: Answer) -> Answer:
    """Read to the end."""
    async with asyncio.timeout(PATIENCE_S):
        async for chunk in chunks:
            answer.add(chunk)
    return answer


_WRITTEN_S: Final = 0.2  # that of another pipe does not end


@contextlib.asynccontextmanager
async def running_pipe(base_url: str, **valves: Any) -> AsyncIterator[Pipe]:
    """A pipe that is set up for one test; every task of it has ended when it is left."""
    pipe = Pipe()
    set_valves(pipe, base_url, **valves)
    before = asyncio.all_tasks()
    try:
        yield pipe
    finally:
        await pipe.aclose(deadline_s=0)
        for thread in threading.enumerate():  # what was logged is written before another test looks
            if thread.name == "openrouter log":
                thread.join(_WRITTEN_S)
    await all_ended(before, services_too=True)


def set_valves(pipe: Pipe, base_url: str, **valves: Any) -> None:
    """Give a pipe its valves the way the host does. A failure is final, and what OpenRouter is asked is
    asked for a chat, unless the test says otherwise.
    """
    usual: Json = {"API_KEY": KEY, "BASE_URL": base_url, "RETRY_ATTEMPTS": 0, "ENABLE_STARTUP_CHECKS": False}
    pipe.valves = pipe.Valves(**(usual | valves))


def connection_to(base_url: str, **changes: Any) -> Connection:
    """A connection as the valves make it, with short times."""
    return Connection(**({"base_url": base_url, "key": KEY, "idle_timeout_s": PATIENCE_S} | changes))


async def all_ended(before: set[asyncio.Task[Any]], *, services_too: bool = False) -> None:
    """Expect that all tasks that came after `before`, the simulator's aside, end soon.

    With `services_too` also what a runtime does for itself, as long as it lives.
    """
    tasks = [task for task in asyncio.all_tasks() - before if not _is_a_servers(task)]
    tasks = [task for task in tasks if services_too or task.get_name() != "housekeeping"]
    tasks = [task for task in tasks if task is not asyncio.current_task()]
    if tasks:
        _, left = await asyncio.wait(tasks, timeout=SOON_S)
        assert not left


def _is_a_servers(task: asyncio.Task[Any]) -> bool:
    name = getattr(task.get_coro(), "__qualname__", "")
    return name.startswith(("RequestHandler.", "hostile."))


async def gone(simulator: Simulator) -> None:
    """Expect that no answer is being written a second from now, because we hung up."""
    await simulator.wait_until(lambda sim: sim.open == 0, timeout=SOON_S)
    assert [record.ended for record in inferences(simulator)][-1:] == ["client_disconnected"]


def inferences(simulator: Simulator) -> list[RecordedRequest]:
    """The requests for an answer, without those for the catalog."""
    return [record for record in simulator.requests if record.path.endswith("/responses")]


# Servers that misbehave

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
EVENT_STREAM: Final = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"


@contextlib.asynccontextmanager
async def hostile(handler: Handler) -> AsyncIterator[str]:
    """A socket server on loopback that reads a request and then does as it likes; its base URL."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            try:
                await handler(reader, writer)
            finally:
                writer.close()
                with contextlib.suppress(ConnectionError):
                    await writer.wait_closed()

    serve.__qualname__ = "hostile.serve"
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/api/v1"
    finally:
        server.close()
        serving = [task for task in asyncio.all_tasks() if _is_a_servers(task) and _serves(task)]
        for task in serving:
            task.cancel()
        await asyncio.gather(*serving, return_exceptions=True)


def _serves(task: asyncio.Task[Any]) -> bool:
    return getattr(task.get_coro(), "__qualname__", "") == "hostile.serve"


async def read_request(reader: asyncio.StreamReader) -> tuple[str, dict[str, str], bytes]:
    """(request line, headers by lower-case name, body) of one request."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:])}
    return head[0], headers, await reader.readexactly(int(headers.get("content-length", 0)))


def answering(content: bytes, kind: str = "application/json", *, length: int | None = None) -> Handler:
    """A handler that answers each request with `content`, and may lie about its length."""
    size = len(content) if length is None else length
    head = f"HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\nContent-Length: {size}\r\nConnection: close\r\n\r\n"

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(head.encode() + content)
        await writer.drain()

    return handle


def frame(kind: str, **fields: Any) -> bytes:
    """One event of a stream."""
    return b"data: " + json.dumps({"type": kind, **fields}).encode() + b"\n\n"


def delta(text: str) -> bytes:
    """A frame with more text of the first message."""
    return frame("response.output_text.delta", output_index=0, content_index=0, delta=text)


def half_an_answer() -> str:
    """A stream that stops after some text, which a status follows: who sees that has read the text."""
    search = {"type": "web_search_call", "id": "ws_1", "status": "in_progress"}
    frames = [
        frame("response.output_item.added", output_index=0, item={"type": "message", "id": "msg_1"}),
        delta("Half an ans"),
        frame("response.output_item.added", output_index=1, item=search),
    ]
    return b"".join(frames).decode()


@dataclass
class Sleeps:
    """Waits that are over at once, and how long they would have been."""

    seconds: list[float] = field(default_factory=list)

    async def __call__(self, seconds: float) -> None:
        """Note a wait."""
        self.seconds.append(seconds)


def completed(**response: Any) -> bytes:
    """The frame that ends an answer well."""
    return frame("response.completed", response=response)


def free_port() -> int:
    """A port of loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_alone(code: str, *arguments: Path) -> subprocess.CompletedProcess[str]:
    """What a program says and ends with that runs in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "WEBUI_SECRET_KEY": "the secret of this server"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
