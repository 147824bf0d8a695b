"""Answers of a size that few have: complete, in order, in bounded memory, however slowly they are read.

What it costs is measured by `make bench`; here only what arrives counts.
"""

from __future__ import annotations

import asyncio
import base64
import json
import tracemalloc
from typing import Any, Final

import pytest

from openrouter_responses_pipe.openrouter_responses_pipe import Pipe
from openrouter_responses_pipe.simulator import CATALOG, Simulator
from pytest_bootstrap import HostFiles
from tests.media import PNG, on_disk
from tests.support import (
    EVENT_STREAM,
    Answer,
    arguments,
    call,
    completed,
    delta,
    hostile,
    read_request,
    running_pipe,
    without_pictures,
)

Json = dict[str, Any]
PATIENCE_S: Final = 20.0
CHATS: Final = ["browser", "api_stream"]
DELTAS: Final = 64_000
LARGE_DELTA: Final = "".join(f"{number:09d} " for number in range(20 * 1024))  # 200 KB
PICTURE: Final = "data:image/png;base64," + base64.b64encode(PNG + bytes(15 * 1024 * 1024)).decode()  # 20 MB
FLOOD_BYTES: Final = 48 * 1024 * 1024  # more than any bound in the pipe, and than the kernel's buffers
BOUND_BYTES: Final = 24 * 1024 * 1024


@pytest.fixture(autouse=True)
def a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """Open WebUI always has a secret."""
    monkeypatch.setenv("WEBUI_SECRET_KEY", "the secret of this server")


def frame(kind: str, **fields: Any) -> bytes:
    """One event of a stream."""
    return b"data: " + json.dumps({"type": f"response.{kind}", **fields}).encode() + b"\n\n"


def picture(index: int) -> bytes:
    """An image of 20 MB, in one frame."""
    item = {"type": "image_generation_call", "id": "ig_1", "status": "in_progress"}
    done = {**item, "status": "completed", "result": PICTURE}
    return frame("output_item.added", output_index=index, item=item) + frame(
        "output_item.done", output_index=index, item=done
    )


COMPLETED: Final = completed()


async def replayed(pipe: Pipe, simulator: Simulator, stream: bytes, dialect: str) -> tuple[Answer, Json]:
    """The answer to a request that is answered with `stream`, and what the request was given."""
    simulator.next("replay", body=stream.decode())
    given = arguments("please", dialect)
    async with asyncio.timeout(PATIENCE_S):
        return await call(pipe, given), given


def expect_whole(answer: Answer, text: str, dialect: str) -> list[str]:
    """Expect `text`, nothing else but pictures, and a good end; returns their addresses."""
    shown, pictures = without_pictures(answer.text)
    assert (answer.error, len(shown)) == ("", len(text))
    assert shown == text
    assert answer.finish == ("completed" if dialect == "browser" else "stop")
    if dialect == "browser":
        assert without_pictures(answer.saved_text()) == (text, pictures)
    return pictures


@pytest.mark.parametrize("dialect", CHATS)
async def test_a_delta_of_200_kb(dialect: str, pipe: Pipe, simulator: Simulator) -> None:
    stream = delta("before ") + delta(LARGE_DELTA) + delta(" after") + COMPLETED
    answer, _ = await replayed(pipe, simulator, stream, dialect)
    expect_whole(answer, f"before {LARGE_DELTA} after", dialect)


@pytest.mark.parametrize("dialect", CHATS)
async def test_an_image_of_20_mb_between_texts(
    dialect: str, pipe: Pipe, simulator: Simulator, files: HostFiles
) -> None:
    stream = delta("before ") + picture(1) + delta("after") + COMPLETED
    answer, given = await replayed(pipe, simulator, stream, dialect)
    (address,) = expect_whole(answer, "before after", dialect)
    assert given["__event_emitter__"].of("notification") == []
    if dialect == "api_stream":
        assert address == PICTURE
        return
    ((file_id, row),) = files.rows.items()
    assert address == f"/api/v1/files/{file_id}/content"
    assert on_disk(row) == base64.b64decode(PICTURE.partition(",")[2])
    assert len(json.dumps(answer.chunks)) < 10_000


@pytest.mark.parametrize("dialect", CHATS)
async def test_64000_deltas_at_full_speed(dialect: str, pipe: Pipe, simulator: Simulator) -> None:
    numbered = b"".join(delta(f"{number} ") for number in range(DELTAS))
    answer, _ = await replayed(pipe, simulator, numbered + COMPLETED, dialect)
    expect_whole(answer, "".join(f"{number} " for number in range(DELTAS)), dialect)
    assert len(answer.chunks) < DELTAS / 10


class Flood:
    """Sends numbered deltas, and a picture in their midst, as fast as they are taken."""

    def __init__(self, size: int, *, with_picture: bool = False) -> None:
        self._parts = [f"{number:06d} " + "x" * 8_000 for number in range(size // 8_200)]
        self._with_picture = with_picture
        self.text = "".join(self._parts)
        self.sent = 0
        self.finished = False

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one request; also the one for the catalog."""
        line, _, _ = await read_request(reader)
        if "/models" in line:
            writer.write(EVENT_STREAM.replace(b"text/event-stream", b"application/json"))
            writer.write(json.dumps({"data": CATALOG}).encode())
            return
        writer.write(EVENT_STREAM)
        for number, part in enumerate(self._parts):
            if self._with_picture and number == len(self._parts) // 2:
                writer.write(picture(1))
            writer.write(delta(part))
            self.sent += len(part)
            await writer.drain()
        writer.write(COMPLETED)
        await writer.drain()
        self.finished = True


async def until_it_stands(flood: Flood) -> int:
    """What the sender has got rid of when it can send no more."""
    async with asyncio.timeout(PATIENCE_S):
        before = -1
        while flood.sent != before:
            before = flood.sent
            await asyncio.sleep(0.25)
    return before


@pytest.mark.parametrize("dialect", CHATS)
async def test_a_reader_that_pauses_stops_the_sender(dialect: str) -> None:
    flood, answer = Flood(FLOOD_BYTES), Answer()
    async with hostile(flood) as url, running_pipe(url) as pipe:
        chunks = await pipe.pipe(**arguments("please", dialect))
        assert not isinstance(chunks, dict)
        tracemalloc.start()
        try:
            while not answer.text:
                answer.add(await anext(chunks))
            assert await until_it_stands(flood) < FLOOD_BYTES / 2
            assert tracemalloc.get_traced_memory()[0] < BOUND_BYTES
        finally:
            tracemalloc.stop()
        async with asyncio.timeout(PATIENCE_S):
            async for chunk in chunks:
                answer.add(chunk)
    assert flood.finished
    expect_whole(answer, flood.text, dialect)


@pytest.mark.parametrize("dialect", CHATS)
async def test_a_reader_that_is_slow_gets_what_came_before_and_after_a_picture(
    dialect: str, files: HostFiles
) -> None:
    flood, answer = Flood(6 * 1024 * 1024, with_picture=True), Answer()
    async with hostile(flood) as url, running_pipe(url) as pipe:
        chunks = await pipe.pipe(**arguments("please", dialect))
        assert not isinstance(chunks, dict)
        async with asyncio.timeout(PATIENCE_S):
            async for chunk in chunks:
                answer.add(chunk)
                await asyncio.sleep(0.005)
    assert len(expect_whole(answer, flood.text, dialect)) == 1
