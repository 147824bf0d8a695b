"""
title: End-to-end tools
author: the project's tests
version: 1.0
description: What tools do: answer, fail, take their time, speak to the page.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import struct
import threading
import time
import uuid
import zlib
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

# The tests put the file here when they install this source, which is read by `tool_servers.Journal`.
JOURNAL = ""

Json = dict[str, Any]
Emit = Callable[[Json], Awaitable[None]]


# ── For every kind of tool: this file is pasted into Open WebUI and imported by the servers ──


@contextlib.contextmanager
def noted(journal: str, tool: str, key: str) -> Iterator[None]:
    """Write into the journal when a run begins and how it ends."""
    run = uuid.uuid4().hex

    def write(event: str) -> None:
        line = {"run": run, "event": event, "tool": tool, "key": key, "at": time.time(),
                "main_thread": threading.current_thread() is threading.main_thread()}  # fmt: skip
        with Path(journal).open("a", encoding="utf-8") as out:
            out.write(json.dumps(line) + "\n")

    write("began")
    try:
        yield
    except (asyncio.CancelledError, GeneratorExit):
        write("cancelled")
        raise
    except BaseException:
        write("failed")
        raise
    write("finished")


def png(red: int, green: int, blue: int, size: int = 16) -> bytes:
    """Paint a square PNG of one colour."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = (b"\0" + bytes((red, green, blue)) * size) * size
    header = struct.pack(">IIBBBBB", size, size, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


# ── The workspace tool ──


class Tools:
    """Each public method is a tool; Open WebUI reads its signature and its docstring."""

    async def greet(self, name: str) -> str:
        """
        Greet somebody.

        :param name: who is greeted
        """
        with noted(JOURNAL, "greet", name):
            return f"Good day, {name}!"

    def multiply(self, a: int, b: int) -> int:
        """
        Multiply two numbers, in a function that is not asynchronous.

        :param a: the first
        :param b: the second
        """
        with noted(JOURNAL, "multiply", f"{a}*{b}"):
            return a * b

    async def work_slowly(self, key: str, seconds: float) -> str:
        """
        Wait, and say so in the journal.

        :param key: what the run is found by
        :param seconds: how long
        """
        with noted(JOURNAL, "work_slowly", key):
            await asyncio.sleep(seconds)
        return f"{key} took {seconds} s"

    def block_thread(self, key: str, seconds: float) -> str:
        """
        Wait without giving way, in a function that is not asynchronous.

        :param key: what the run is found by
        :param seconds: how long
        """
        with noted(JOURNAL, "block_thread", key):
            time.sleep(seconds)
        return f"{key} blocked for {seconds} s"

    async def report_progress(self, steps: int, __event_emitter__: Emit | None = None) -> str:
        """
        Tell the page about each step.

        :param steps: how many
        """
        for step in range(1, steps + 1):
            if __event_emitter__:
                data = {"description": f"Step {step} of {steps}", "done": step == steps}
                await __event_emitter__({"type": "status", "data": data})
        return f"{steps} steps done"

    async def raise_error(self, message: str) -> str:
        """
        Fail.

        :param message: the words of the exception
        """
        with noted(JOURNAL, "raise_error", message):
            raise RuntimeError(message)

    async def say_nothing(self) -> None:
        """Return nothing at all."""

    async def answer_in_json(self, rows: int) -> Json:
        """
        Return an object.

        :param rows: how many rows it has
        """
        return {"rows": [{"number": number, "name": f"row {number}"} for number in range(rows)]}

    async def draw_square(self, colour: str) -> str:
        """
        Paint a small square; the answer is a picture.

        :param colour: red, green or blue
        """
        level = {"red": (255, 0, 0), "green": (0, 255, 0)}.get(colour, (0, 0, 255))
        return "data:image/png;base64," + base64.b64encode(png(*level)).decode()

    async def show_card(self, title: str) -> Any:
        """
        Show a card on the page.

        :param title: what it says
        """
        # only Open WebUI has it
        from fastapi.responses import HTMLResponse  # pyright: ignore[reportMissingImports]

        return HTMLResponse(f"<h1>{title}</h1>", headers={"Content-Disposition": "inline"})

    async def look_around(
        self,
        __user__: Json | None = None,
        __metadata__: Json | None = None,
        __messages__: list[Json] | None = None,
        __chat_id__: str | None = None,
        __message_id__: str | None = None,
    ) -> Json:
        """Say what a tool is told about where it runs."""
        return {
            "user": (__user__ or {}).get("name"),
            "chat_id": __chat_id__,
            "message_id": __message_id__,
            "metadata": sorted(__metadata__ or {}),
            "roles": [message["role"] for message in __messages__ or []],
        }
