"""Shared by the tests of media: files as they are in real life, a site that has some, and a host with them.

The site is an aiohttp server on loopback, which a test lets in by naming it among the trusted hosts.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import time
import uuid
import wave
import zipfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

from aiohttp import web
from PIL import Image

from openrouter_responses_pipe.openrouter_responses_pipe import (
    ChatRequest,
    CompletionsBody,
    Intake,
    MediaBlob,
    MediaIntake,
    MediaRef,
    ModelSpec,
    OpenWebUIHost,
    RequestSettings,
    ResponsesBody,
    plan_intake,
)
from pytest_bootstrap import HostFiles
from tests.support import all_ended
from tests.test_request_models import validator

Json = dict[str, Any]
LOOPBACK: Final = "127.0.0.1"
OWNER: Final = "user"
ALL: Final = frozenset({"text", "image", "file", "audio", "video"})
EVERYTHING: Final = ModelSpec("a/all", "All", input_modalities=ALL, context_length=100_000)
SEEING: Final = ModelSpec("a/eyes", "Eyes", input_modalities=frozenset({"text", "image"}))
TEXT_ONLY: Final = ModelSpec("a/text", "Text", context_length=100_000)
WEBUI: Final = "https://chat.example"
PLAIN: Final = RequestSettings()


def picture(kind: str = "PNG", colour: int = 0) -> bytes:
    """A small picture of some format; another colour is another picture."""
    made = io.BytesIO()
    Image.new("RGB", (8, 8), (colour % 256, colour // 256, 7)).save(made, kind)
    return made.getvalue()


def sound() -> bytes:
    """A tenth of a second of silence."""
    made = io.BytesIO()
    with wave.open(made, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8_000)
        file.writeframes(bytes(1_600))
    return made.getvalue()


def packed() -> bytes:
    """A ZIP file, as Word and Excel make them."""
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as file:
        file.writestr("word/document.xml", "<w:document/>" * 50)
    return made.getvalue()


PNG: Final = picture()
WAV: Final = sound()
ZIP: Final = packed()
PDF: Final = b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n1 0 obj\n<<>>\nendobj\ntrailer\n<<>>\n%%EOF\n"
MP3: Final = b"ID3\x04\x00\x00\x00\x00\x00\x0a" + bytes(10) + b"\xff\xfb\x90\x64" + bytes(100)
MP4: Final = b"\x00\x00\x00\x20ftypisom\x00\x00\x02\x00isomiso2avc1mp41" + bytes(100)
SVG: Final = b'<svg xmlns="http://www.w3.org/2000/svg"><path d="M0 0"/></svg>'
# kind -> a file of it, what it is, and a name for it
SAMPLES: Final[dict[str, tuple[bytes, str, str]]] = {
    "image": (PNG, "image/png", "a.png"),
    "file": (PDF, "application/pdf", "a.pdf"),
    "audio": (WAV, "audio/wav", "a.wav"),
    "video": (MP4, "video/mp4", "a.mp4"),
}


def block(kind: str, address: Any) -> Json:
    """A block of a message that names a medium by its address."""
    if kind == "file":
        return {"type": "file", "file": {"file_url": address}}
    if kind == "audio":
        return {"type": "input_audio", "input_audio": {"url": address}}
    return {"type": f"{kind}_url", f"{kind}_url": {"url": address}}


def user(*blocks: Any) -> Json:
    """A question with these blocks; texts may be given as such."""
    return {
        "role": "user",
        "content": [{"type": "text", "text": part} if isinstance(part, str) else part for part in blocks],
    }


def answer(text: Any) -> Json:
    """An earlier answer."""
    return {"role": "assistant", "content": text}


# The host


def add(
    files: HostFiles, content: bytes, name: str = "a.png", owner: str = OWNER, **meta: Any
) -> tuple[str, str]:
    """(id, address) of a file that the host has from now on; `meta` changes what it says of it."""
    assert files.folder is not None
    file_id = str(uuid.uuid4())
    path = files.folder / f"{file_id}_{Path(name).name[:40]}"
    path.write_bytes(content)
    add_row(files, file_id, str(path), name, owner, {"name": name, "size": len(content), **meta})
    return file_id, f"/api/v1/files/{file_id}/content"


def add_row(files: HostFiles, file_id: str, path: Any, name: Any, owner: str, meta: Any) -> None:
    """A row of the host's file table, whatever it says."""
    files.rows[file_id] = SimpleNamespace(
        id=file_id, user_id=owner, hash=None, filename=name, path=path, data={}, meta=meta
    )


def on_disk(row: Any) -> bytes:
    """What the storage holds of a file."""
    return Path(row.path).read_bytes()


def remove(row: Any) -> None:
    """Take a file from the disk, not from the table."""
    Path(row.path).unlink()


# A site


@dataclass
class Site:
    """A server on loopback: what it has by path, as that is quoted, and what it was asked for.

    `before` is awaited before each answer, and cancelled when whoever asked has hung up; a path that it does
    not have is a 404.
    """

    base: str = ""
    has: dict[str, bytes] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    before: Callable[[str], Awaitable[None]] | None = None

    @property
    def trusted(self) -> frozenset[str]:
        """Itself, for `trusted_hosts`."""
        return frozenset({self.base.removeprefix("http://")})

    def put(self, content: bytes, path: str = "/a.png") -> str:
        """The address at which this can be had from now on."""
        self.has[path.partition("?")[0]] = content
        return self.base + path

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        path = request.raw_path.partition("?")[0]
        self.asked.append(path)
        if self.before is not None:
            await self.before(path)
        content = self.has.get(path)
        return web.Response(status=404) if content is None else web.Response(body=content)


@contextlib.asynccontextmanager
async def serving_site() -> AsyncIterator[Site]:
    """A site while it runs."""
    site = Site()
    runner = web.ServerRunner(web.Server(site._answer, handler_cancellation=True), shutdown_timeout=0.1)
    await runner.setup()
    try:
        await web.TCPSite(runner, LOOPBACK, 0).start()
        site.base = f"http://{LOOPBACK}:{runner.addresses[0][1]}"
        yield site
    finally:
        await runner.cleanup()


# What is had, and what is sent


def request_of(user_id: str = OWNER, chat_id: str = "chat") -> ChatRequest:
    """A request of somebody's in a chat."""
    return ChatRequest(
        body={}, dialect="browser", model="a/all", user_id=user_id, chat_id=chat_id, message_id="message"
    )


async def have(
    refs: Sequence[MediaRef],
    settings: RequestSettings,
    request: ChatRequest | None = None,
    taking: MediaIntake | None = None,
) -> list[MediaBlob]:
    """What has become of each reference; nothing is left running."""
    before = asyncio.all_tasks()
    intake = taking or MediaIntake(OpenWebUIHost(), time.monotonic)
    try:
        found = await intake.resolve(refs, request or request_of(), settings)
    finally:
        if taking is None:
            await intake.aclose()
        await all_ended(before)
    assert set(found) == set(refs)
    return [found[ref] for ref in refs]


async def send(
    messages: Sequence[Json],
    settings: RequestSettings,
    spec: ModelSpec = EVERYTHING,
    taking: MediaIntake | None = None,
    request: ChatRequest | None = None,
) -> ResponsesBody:
    """The whole way of a chat to a body, which is valid."""
    plan = plan_intake(messages, spec, settings)
    blobs = await have(plan.media, settings, request, taking)
    return translate(messages, settings, spec, dict(zip(plan.media, blobs, strict=True)))


def translate(
    messages: Sequence[Mapping[str, Any]],
    settings: RequestSettings = PLAIN,
    spec: ModelSpec = EVERYTHING,
    media: Mapping[MediaRef, MediaBlob] | None = None,
) -> ResponsesBody:
    """The translation with what could be had; it is valid."""
    body = CompletionsBody.parse({"model": spec.id, "messages": list(messages)})
    result = ResponsesBody.from_completions(body, spec, settings, Intake(media=media or {}))
    validator().validate(result.payload)
    return result


def parts(result: ResponsesBody) -> list[Json]:
    """Every part of every question that is sent, texts aside."""
    return [
        part
        for item in result.payload["input"]
        if item.get("role") == "user"
        for part in item["content"]
        if part["type"] != "input_text"
    ]


def pictures(result: ResponsesBody) -> list[str]:
    """The addresses of the pictures that are sent, in their order."""
    return [part["image_url"] for part in parts(result) if part["type"] == "input_image"]


def texts(result: ResponsesBody) -> list[str]:
    """Every text of every question that is sent."""
    items: Iterable[Json] = result.payload["input"]
    return [
        part["text"]
        for item in items
        if item.get("role") == "user"
        for part in item["content"]
        if part["type"] == "input_text"
    ]
