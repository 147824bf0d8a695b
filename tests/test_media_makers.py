"""Pictures that models make: files of the person who asked, shown in the answer, no base64 in a saved chat.

Through the whole pipe, with the simulator above and the stand-in of the host's files below.
"""

from __future__ import annotations

import asyncio
import base64
import json
import mimetypes
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from sqlalchemy.ext.asyncio import AsyncEngine

from openrouter_responses_pipe.openrouter_responses_pipe import (
    ImageResults,
    ItemClosed,
    MediaIntake,
    MediaProduced,
    Notice,
    OpenWebUIHost,
    Pipe,
    RequestSettings,
    TextDelta,
)
from openrouter_responses_pipe.simulator import Simulator
from pytest_bootstrap import HostFiles
from tests.media import PDF, PNG, SVG, ZIP, Site, on_disk, picture, remove, request_of
from tests.support import (
    PATIENCE_S,
    SOON_S,
    Answer,
    Events,
    arguments,
    call,
    inferences,
    read_rest,
    read_until_text,
    set_valves,
    without_pictures,
)
from tests.test_reasoning_replay import (
    HELLO,
    as_body,
    as_frames,
    as_host_returns,
    called,
    carriers,
    chat_chunks,
    events_of,
    function_call,
    message,
    output_of,
    reasoning_in,
    said,
    signed,
    thought,
    with_outputs,
)
from tests.tools import TEXT, entry, named, offered, schema

Json = dict[str, Any]
PAINTER: Final = "openrouter.openai/gpt-5-image"  # thinks, sees, draws and calls
BLIND: Final = "openrouter.deepseek/deepseek-r1-0528"
# a format -> what it is, and the names that a file of it may have
KINDS: Final[dict[str, tuple[str, tuple[str, ...]]]] = {
    "PNG": ("image/png", ("picture.png",)),
    "JPEG": ("image/jpeg", ("picture.jpg", "picture.jpeg")),
    "WEBP": ("image/webp", ("picture.webp",)),
    "GIF": ("image/gif", ("picture.gif",)),
}
IN_A_CHAT: Final = ["browser", "browser_json"]
WITHOUT_CHAT: Final = ["api_stream", "api_json"]
TASKS: Final = ["task", "task_stream"]
SHOWN_ABOVE: Final = "(Pictures that your answers above show:)"
UNSAVED: Final = "The model made a picture that cannot be shown. Open WebUI could not save it."


# What a model draws, and what comes of it


def in_base64(content: bytes) -> str:
    """Bytes as they stand in JSON."""
    return base64.b64encode(content).decode()


def data_url(content: bytes, mime: str = "image/png") -> str:
    """A picture as most providers send it."""
    return f"data:{mime};base64,{in_base64(content)}"


DRAWING: Final = data_url(PNG)


def drawn(source: str = DRAWING, number: int = 1, key: str = "result", kind: str = "") -> Json:
    """The item of an answer that is a picture."""
    kind = kind or "image_generation_call"
    return {"type": kind, "id": f"ig_{number}", "status": "completed", key: source}


def as_chat(*deltas: Json) -> str:
    """The stream of an answer of `/chat/completions`."""
    return as_frames(chat_chunks(*deltas))


def images(*sources: str) -> Json:
    """Pictures as they stand in a delta of `/chat/completions`."""
    return {"images": [{"type": "image_url", "image_url": {"url": source}} for source in sources]}


class Got(NamedTuple):
    """What an answer has come to, and what was told beside it."""

    answer: Answer
    told: Events

    @property
    def text(self) -> str:
        """What a person reads, the pictures aside."""
        return without_pictures(self.answer.text)[0]

    @property
    def pictures(self) -> list[str]:
        """The addresses that the answer shows."""
        return without_pictures(self.answer.text)[1]

    @property
    def notices(self) -> list[str]:
        """What the person was told of."""
        return [note["content"] for note in self.told.of("notification")]

    def everything(self) -> str:
        """All that has left the pipe."""
        return json.dumps([self.answer.chunks, list(self.told)])

    def saved_texts(self) -> list[str]:
        """The texts of the items that the host saves, in their order."""
        items = [item for item in self.answer.items() if item["type"] == "message"]
        return ["".join(part["text"] for part in item["content"]) for item in items]


async def ask(pipe: Pipe, prompt: str | Json = "A cat, please", dialect: str = "browser", **ids: str) -> Got:
    """One request to a model that draws; `ids` change whose chat it is."""
    asked = arguments(prompt, dialect, model=PAINTER)
    asked["__metadata__"] |= ids
    async with asyncio.timeout(PATIENCE_S):
        return Got(await call(pipe, asked), asked["__event_emitter__"])


async def draw(
    pipe: Pipe, simulator: Simulator, body: str | Sequence[Json], dialect: str = "browser", **ids: str
) -> Got:
    """The answer that a stream, or one of these items, comes to."""
    body = body if isinstance(body, str) else as_body(*body)
    simulator.next("replay", body=body, tasks=True)
    return await ask(pipe, dialect=dialect, **ids)


def addresses(files: HostFiles) -> list[str]:
    """Where the host's files are to be had, in the order in which they came."""
    return [f"/api/v1/files/{file_id}/content" for file_id in files.rows]


def shown(address: str) -> str:
    """A picture in an answer."""
    return f"![Picture]({address})"


def expect_no_base64(got: Got, *contents: bytes) -> None:
    """Expect that nothing of a picture's own has left the pipe."""
    everything = got.everything()
    assert "base64," not in everything
    for content in contents:
        middle = len(content) // 6 * 3  # whole groups of three
        assert in_base64(content[middle : middle + 30]) not in everything


def expect_kept(got: Got, files: HostFiles, *contents: bytes) -> None:
    """Expect exactly these pictures, shown from the host's files, and no word of trouble."""
    assert got.answer.error == ""
    assert got.notices == []
    assert got.pictures == addresses(files)
    assert [on_disk(row) for row in files.rows.values()] == list(contents)
    expect_no_base64(got, *contents)


def expect_refused(
    got: Got, files: HostFiles, words: str, texts: Sequence[str] = ("Before.", "After.")
) -> None:
    """Expect the answer without its picture, and a sentence about it."""
    assert (got.answer.error, got.saved_texts()) == ("", list(texts))
    assert got.answer.text.replace("\n", "") == "".join(texts)
    (notice,) = got.notices
    assert words in notice
    assert notice.startswith("The model made a picture that cannot be shown. ")
    assert files.rows == {}
    expect_no_base64(got)


# What is kept

# how a picture comes -> the stream of an answer with nothing else in it
WIRES: Final[dict[str, Callable[[str], str]]] = {
    "result": lambda source: as_body(drawn(source)),
    "imageB64": lambda source: as_body(drawn(source, key="imageB64", kind="openrouter:image_generation")),
    "imageUrl": lambda source: as_body(drawn(source, key="imageUrl", kind="openrouter:image_generation")),
    "server tool": lambda source: as_body(drawn(source, kind="openrouter:image_generation")),
    "only in the end": lambda source: as_frames(events_of(drawn(source))[-1:]),
    "not announced": lambda source: as_frames(events_of(drawn(source))[1:]),
    "chat": lambda source: as_chat(images(source)),
}
FORMS: Final = ("data URL", "base64", "address")


def use(pipe: Pipe, simulator: Simulator, wire: str = "", site: Site | None = None, **valves: Any) -> None:
    """Set the valves that a wire and a site need."""
    if wire == "chat":
        valves |= {"FORCE_CHAT_COMPLETIONS_MODELS": "*"}
    if site is not None:
        valves |= {"ALLOW_HTTP_HOSTS": ",".join(site.trusted)}
    set_valves(pipe, simulator.base_url, **valves)


def source_of(form: str, content: bytes, mime: str, site: Site) -> str:
    """A picture as a provider sends it."""
    if form == "address":
        return site.put(content, "/of/the/provider?key=1")
    return in_base64(content) if form == "base64" else data_url(content, mime)


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
async def test_a_picture_is_kept(
    wire: str, form: str, kind: str, pipe: Pipe, simulator: Simulator, files: HostFiles, site: Site
) -> None:
    content, (mime, names) = picture(kind), KINDS[kind]
    use(pipe, simulator, wire, site)
    got = await draw(pipe, simulator, WIRES[wire](source_of(form, content, mime, site)))
    expect_kept(got, files, content)
    ((file_id, row),) = files.rows.items()
    assert got.answer.text == shown(f"/api/v1/files/{file_id}/content")
    assert row.user_id == "user"
    assert row.filename in names
    assert row.meta == {"name": row.filename, "content_type": mime, "size": len(content)}
    assert files.links == [("chat", "message", file_id, "user")]
    assert files.tags == {
        Path(row.path).name: {"OpenWebUI-File-Id": file_id, "OpenWebUI-User-Id": "user"},
    }
    assert Path(row.path).name == f"{file_id}_{row.filename}"
    assert site.asked == (["/of/the/provider"] if form == "address" else [])


@pytest.mark.parametrize("dialect", IN_A_CHAT)
@pytest.mark.parametrize("params", [{}, {"bytes": 1}], ids=["whole", "bytewise"])
@pytest.mark.parametrize(
    ("scenario", "text"),
    [
        ("15_image_generation_call", "Here is your single pixel."),
        ("16_image_generation_server_tool", "Done."),
        ("c5_chat_image_and_annotations", "See this."),
    ],
)
async def test_recorded_streams(
    scenario: str, text: str, params: Json, dialect: str, pipe: Pipe, simulator: Simulator, files: HostFiles
) -> None:
    use(pipe, simulator, "chat" if scenario.startswith("c") else "")
    simulator.next("golden", name=scenario, **params)
    got = await ask(pipe, dialect=dialect)
    (row,) = files.rows.values()
    expect_kept(got, files, on_disk(row))
    assert on_disk(row).startswith(b"\x89PNG")
    assert got.text == text


@pytest.mark.parametrize("wire", ["responses", "chat"])
@pytest.mark.parametrize("prompt", ["draw a cat", "[[image size=300]] A cat", "[[or_image]] A cat"])
async def test_what_the_simulator_draws(
    prompt: str, wire: str, pipe: Pipe, simulator: Simulator, files: HostFiles
) -> None:
    use(pipe, simulator, wire)
    got = await ask(pipe, prompt)
    (row,) = files.rows.values()
    expect_kept(got, files, on_disk(row))
    assert got.text == "Here is your picture."


async def test_a_model_that_writes_nothing(pipe: Pipe, simulator: Simulator, files: HostFiles) -> None:
    asked = arguments("A cat, please", model="openrouter.black-forest-labs/flux.2-pro")
    got = Got(await call(pipe, asked), asked["__event_emitter__"])
    (row,) = files.rows.values()
    expect_kept(got, files, on_disk(row))
    assert (got.text, got.saved_texts()) == ("", [shown(*addresses(files))])
    assert "empty" not in got.told.statuses()[-1]


async def test_what_a_picture_is_its_bytes_say(pipe: Pipe, simulator: Simulator, files: HostFiles) -> None:
    content = picture("GIF")
    got = await draw(pipe, simulator, [drawn(data_url(content, "image/svg+xml"))])
    expect_kept(got, files, content)
    (row,) = files.rows.values()
    assert (row.filename, row.meta["content_type"]) == ("picture.gif", "image/gif")


@pytest.fixture
def bare_machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine without /etc/mime.types, as many containers are."""
    with monkeypatch.context() as changed:
        changed.setattr(mimetypes, "knownfiles", [])
        mimetypes.init()
        yield
    mimetypes.init()


@pytest.mark.parametrize("kind", KINDS)
async def test_names_need_no_help_of_the_machine(
    kind: str, bare_machine: None, pipe: Pipe, simulator: Simulator, files: HostFiles
) -> None:
    await draw(pipe, simulator, [drawn(data_url(picture(kind)))])
    (row,) = files.rows.values()
    assert row.filename in KINDS[kind][1]


async def test_a_picture_of_the_web_is_kept_whatever_the_valve_for_others_says(
    pipe: Pipe, simulator: Simulator, files: HostFiles, site: Site
) -> None:
    """The address of a provider's is good for an hour."""
    use(pipe, simulator, site=site, SAVE_REMOTE_MEDIA=False)
    got = await draw(pipe, simulator, [drawn(site.put(PNG))])
    expect_kept(got, files, PNG)


async def test_the_same_address_twice_is_two_pictures(
    pipe: Pipe, simulator: Simulator, files: HostFiles, site: Site
) -> None:
    """What is at an address may change; a chat that was deleted takes no picture of another one's along."""
    use(pipe, simulator, site=site)
    await draw(pipe, simulator, [drawn(site.put(PNG))])
    other = picture(colour=5)
    await draw(pipe, simulator, [drawn(site.put(other))], chat_id="another", message_id="other")
    assert [on_disk(row) for row in files.rows.values()] == [PNG, other]
    assert [link[:2] for link in files.links] == [("chat", "message"), ("another", "other")]


async def test_a_picture_of_the_web_needs_no_room_among_those_that_are_sent(
    pipe: Pipe, simulator: Simulator, files: HostFiles, site: Site
) -> None:
    """How many pictures a request may hold has nothing to do with those that an answer makes."""
    use(pipe, simulator, site=site, MAX_INPUT_IMAGES_PER_REQUEST=0)
    got = await draw(pipe, simulator, [drawn(site.put(PNG))])
    expect_kept(got, files, PNG)


# What cannot be kept


def padded(size: int) -> bytes:
    """A picture of so many bytes."""
    return PNG + bytes(size - len(PNG))


MEGABYTE: Final = 1024 * 1024
NO_PICTURE: Final = "It is not a picture."
NO_BASE64: Final = "A file in it is damaged: it is not in base64."
LATIN_SVG: Final = '<svg xmlns="http://www.w3.org/2000/svg"><text>Größe</text></svg>'.encode("latin-1")
# what comes instead of a picture -> what the person is told
REFUSED: Final[dict[str, tuple[str, str]]] = {
    "SVG": (data_url(SVG, "image/svg+xml"), NO_PICTURE),
    "SVG that says PNG": (data_url(SVG), NO_PICTURE),
    "SVG in UTF-16": (data_url(SVG.decode().encode("utf-16")), NO_PICTURE),
    "SVG in Latin-1": (data_url(LATIN_SVG), NO_PICTURE),
    "SVG with a zero": (data_url(SVG + b"\0"), NO_PICTURE),
    "HTML": (data_url(b"<!doctype html><script>alert(1)</script>"), NO_PICTURE),
    "text": (data_url(b"I cannot draw that."), NO_PICTURE),
    "PDF": (data_url(PDF), NO_PICTURE),
    "ZIP": (data_url(ZIP), NO_PICTURE),
    "no kind of file": (data_url(bytes(range(256))), NO_PICTURE),
    "empty": ("data:image/png;base64,", NO_PICTURE),
    "no head and no content": (",", NO_PICTURE),
    "broken": (DRAWING[:40] + "§" + DRAWING[40:], NO_BASE64),
    "with a percent sign": ("data:image/svg+xml,%3Csvg/%3E", NO_BASE64),
    "line breaks": (DRAWING[:60] + "\n" + DRAWING[60:], NO_BASE64),
    "blanks": (DRAWING[:60] + " " + DRAWING[60:], NO_BASE64),
    "a sentence": ("The picture could not be made", NO_BASE64),
    "one letter too many": (DRAWING.rstrip("=") + "A" * (1 + DRAWING.count("=")), NO_BASE64),
    "half of a pair": ("data:image/png;base64,\ud800", NO_BASE64),
    "too large": (data_url(padded(MEGABYTE + 1)), "larger than 1 MB, which is the limit."),
}


@pytest.mark.parametrize("dialect", IN_A_CHAT)
@pytest.mark.parametrize("case", REFUSED)
async def test_what_is_no_picture_is_told(
    case: str, dialect: str, pipe: Pipe, simulator: Simulator, files: HostFiles
) -> None:
    use(pipe, simulator, BASE64_MAX_SIZE_MB=1)
    source, words = REFUSED[case]
    output = [message("Before."), drawn(source), message("After.")]
    got = await draw(pipe, simulator, output, dialect)
    expect_refused(got, files, words)
    assert list(files.tags) == []
    assert words.rstrip(".") in got.told.statuses()[-1]


@pytest.mark.parametrize("dialect", WITHOUT_CHAT)
@pytest.mark.parametrize("case", REFUSED)
async def test_a_program_gets_nothing_that_is_no_picture(
    case: str, dialect: str, pipe: Pipe, simulator: Simulator, files: HostFiles
) -> None:
    use(pipe, simulator, BASE64_MAX_SIZE_MB=1)
    output = [message("Before."), drawn(REFUSED[case][0]), message("After.")]
    got = await draw(pipe, simulator, output, dialect)
    assert (got.answer.error, got.answer.text, got.answer.finish) == ("", "Before.\nAfter.", "stop")


async def test_nothing_but_a_picture_that_cannot_be_shown(
    pipe: Pipe, simulator: Simulator, files: HostFiles
) -> None:
    got = await draw(pipe, simulator, [drawn(REFUSED["text"][0])])
    expect_refused(got, files, NO_PICTURE, texts=())
    assert "empty answer" in got.told.statuses()[-1]


@pytest.mark.parametrize("chat_id", ["chat", "temporary:1"])
@pytest.mark.parametrize("more", range(3))
async def test_base64_without_its_padding(
    more: int, chat_id: str, pipe: Pipe, simulator: Simulator, files: HostFiles
) -> None:
    """Some leave it out, and everybody can read it without."""
    content = PNG + bytes(more)
    unpadded = data_url(content).rstrip("=")
    output = [message("Before."), drawn(unpadded), message("After.")]
    got = await draw(pipe, simulator, output, chat_id=chat_id)
    assert (got.answer.error, got.notices, got.text) == ("", [], "Before.After.")
    kept = [on_disk(row) for row in files.rows.values()]
    assert (kept, got.pictures) in [([content], addresses(files)), ([], [data_url(content)])]


async def test_as_large_as_may_be(pipe: Pipe, simulator: Simulator, files: HostFiles) -> None:
    use(pipe, simulator, BASE64_MAX_SIZE_MB=1)
    got = await draw(pipe, simulator, [drawn(data_url(padded(MEGABYTE)))])
    expect_kept(got, files, padded(MEGABYTE))


# what is at an address -> what the person is told
ADDRESSES: Final[dict[str, tuple[bytes | None, str]]] = {
    "nothing": (None, "The file could not be downloaded: its server answered 404."),
    "an empty file": (b"", "The file could not be downloaded: it is empty."),
    "SVG": (SVG, NO_PICTURE),
    "SVG in Latin-1": (LATIN_SVG, NO_PICTURE),
    "HTML": (b"<html><body>Your picture</body></html>", NO_PICTURE),
    "text": (b"come back later", NO_PICTURE),
    "PDF": (PDF, NO_PICTURE),
    "too large": (padded(MEGABYTE + 1), "The file is larger than 1 MB, which is the limit."),
}


@pytest.mark.parametrize("valve", ["BASE64_MAX_SIZE_MB", "REMOTE_FILE_MAX_SIZE_MB"])
@pytest.mark.parametrize("case", ADDRESSES)
async def test_an_address_with_no_picture(
    case: str, valve: str, pipe: Pipe, simulator: Simulator, files: HostFiles, site: Site
) -> None:
    limit: Json = {valve: 1}
    use(pipe, simulator, site=site, **limit)
    content, words = ADDRESSES[case]
    address = f"{site.base}/gone.png" if content is None else site.put(content)
    got = await draw(pipe, simulator, [message("Before."), drawn(address), message("After.")])
    expect_refused(got, files, words)


@pytest.mark.parametrize(
    "address",
    [
        "http://127.0.0.1:9/a.png",
        "https://127.0.0.1/a.png",
        "https://169.254.169.254/latest/meta-data",
        "http://[::1]/a.png",
        "https://user:secret@cdn.example/a.png",
    ],
)
async def test_an_address_that_nobody_may_ask(
    address: str, pipe: Pipe, simulator: Simulator, files: HostFiles
) -> None:
    got = await draw(pipe, simulator, [message("Before."), drawn(address), message("After.")])
    expect_refused(got, files, "The file was not downloaded: ")
    assert address not in got.everything()


async def test_a_file_of_somebody_elses_is_not_had_through_a_model(
    pipe: Pipe, simulator: Simulator, files: HostFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A provider that names an address of this server is no way to what others keep here."""
    monkeypatch.setenv("WEBUI_URL", "https://chat.example")
    await draw(pipe, simulator, [drawn()], chat_id="theirs")
    ((file_id, row),) = files.rows.items()
    row.user_id = "somebody else"
    address = f"https://chat.example/api/v1/files/{file_id}/content"
    got = await draw(pipe, simulator, [message("Before."), drawn(address), message("After.")])
    assert (got.answer.error, got.answer.text) == ("", "Before.After.")
    assert len(got.notices) == 1
    assert list(files.rows) == [file_id]


# The host's storage


async def test_a_host_that_can_store_nothing(pipe: Pipe, simulator: Simulator, files: HostFiles) -> None:
    files.reset(None)
    got = await draw(pipe, simulator, [message("Before."), drawn(), message("After.")])
    expect_refused(got, files, UNSAVED)


@pytest.mark.parametrize("dialect", IN_A_CHAT)
@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), RuntimeError("s3: AccessDenied"), ValueError("empty")]
)
async def test_a_storage_that_fails(
    error: Exception, dialect: str, pipe: Pipe, simulator: Simulator, files: HostFiles
) -> None:
    def fail(what: str, path: str) -> None:
        raise error

    files.storage_hook = fail
    got = await draw(pipe, simulator, [message("Before."), drawn(), message("After.")], dialect)
    expect_refused(got, files, UNSAVED)
    assert str(error) not in got.everything()


@pytest.mark.parametrize("dialect", IN_A_CHAT)
async def test_a_table_of_files_that_fails(
    dialect: str, pipe: Pipe, simulator: Simulator, files: HostFiles
) -> None:
    async def fail(what: str, row_id: str) -> None:
        raise OSError("database is locked")

    files.hook = fail
    got = await draw(pipe, simulator, [message("Before."), drawn(), message("After.")], dialect)
    expect_refused(got, files, UNSAVED)


async def test_a_picture_that_can_be_stored_but_not_linked(
    pipe: Pipe, simulator: Simulator, files: HostFiles
) -> None:
    """It is there, and it is theirs: they see it."""

    async def fail(what: str, row_id: str) -> None:
        if what == "link":
            raise OSError("database is locked")

    files.hook = fail
    got = await draw(pipe, simulator, [message("Before."), drawn(), message("After.")])
    expect_kept(got, files, PNG)


async def test_only_the_picture_that_fails_is_missing(
    pipe: Pipe, simulator: Simulator, files: HostFiles
) -> None:
    asked = 0

    def fail(what: str, path: str) -> None:
        nonlocal asked
        asked += what == "put"
        if asked == 2:
            raise OSError("no room")

    files.storage_hook = fail
    colours = [picture(colour=number) for number in range(3)]
    output = [drawn(data_url(content), number) for number, content in enumerate(colours)]
    got = await draw(pipe, simulator, output)
    assert got.notices == [UNSAVED]
    assert got.pictures == addresses(files)
    assert [on_disk(row) for row in files.rows.values()] == [colours[0], colours[2]]


class Slow:
    """A storage that takes a file only when a test says so."""

    def __init__(self, files: HostFiles) -> None:
        self._came, self._go = threading.Event(), threading.Event()
        self.left = threading.Event()
        files.storage_hook = self._hold

    def _hold(self, what: str, path: str) -> None:
        self._came.set()
        self._go.wait(3 * PATIENCE_S)
        self.left.set()

    async def begun(self) -> None:
        """Wait until something is being stored."""
        assert await asyncio.to_thread(self._came.wait, PATIENCE_S)

    def go_on(self) -> None:
        """Store it."""
        self._go.set()


@pytest.fixture
def slow(files: HostFiles) -> Iterator[Slow]:
    """A storage that takes nothing yet."""
    storage = Slow(files)
    yield storage
    storage.go_on()


async def reading(pipe: Pipe, simulator: Simulator, body: str, **params: Any) -> tuple[Any, Events]:
    """(the chunks of an answer, what is told beside it)."""
    simulator.next("replay", body=body, **params)
    asked = arguments("A cat, please", model=PAINTER)
    chunks = await pipe.pipe(**asked)
    assert not isinstance(chunks, dict)
    return chunks, asked["__event_emitter__"]


async def test_a_slow_storage_is_waited_for(
    pipe: Pipe, simulator: Simulator, files: HostFiles, slow: Slow
) -> None:
    body = as_body(message("Before."), drawn(), message("After."))
    chunks, told = await reading(pipe, simulator, body)
    answering = asyncio.create_task(read_rest(chunks, Answer()))
    await slow.begun()
    assert not answering.done()
    slow.go_on()
    got = Got(await answering, told)
    expect_kept(got, files, PNG)
    assert got.saved_texts() == ["Before.", shown(*addresses(files)), "After."]


async def test_what_was_written_before_need_not_wait(
    pipe: Pipe, simulator: Simulator, files: HostFiles, slow: Slow
) -> None:
    """Text that came with the picture, in one piece, is there to be read while the picture is stored."""
    body = as_body(message("Before."), drawn(), message("After."))
    chunks, told = await reading(pipe, simulator, body)
    answer = Answer()
    answering = asyncio.create_task(read_until_text(chunks, answer))
    await slow.begun()
    done, _ = await asyncio.wait([answering], timeout=SOON_S)
    slow.go_on()
    await answering
    got = Got(await read_rest(chunks, answer), told)
    expect_kept(got, files, PNG)
    assert done


async def test_a_storage_that_hangs_is_given_up(
    pipe: Pipe, simulator: Simulator, files: HostFiles, slow: Slow, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half a minute passes, on the clock of the loop."""
    body = as_body(message("Before."), drawn(), message("After."))
    simulator.next("replay", body=body)
    asked = arguments("A cat, please", model=PAINTER)
    answering = asyncio.create_task(call(pipe, asked))
    await slow.begun()
    loop = asyncio.get_running_loop()
    now = loop.time
    monkeypatch.setattr(loop, "time", lambda: now() + 31)
    done, _ = await asyncio.wait([answering], timeout=PATIENCE_S)
    monkeypatch.setattr(loop, "time", now)
    assert done
    expect_refused(Got(answering.result(), asked["__event_emitter__"]), files, UNSAVED)
    slow.go_on()
    assert await asyncio.to_thread(slow.left.wait, PATIENCE_S)
    assert files.rows == {}


async def test_others_are_answered_while_a_picture_is_stored(
    pipe: Pipe, simulator: Simulator, files: HostFiles, slow: Slow
) -> None:
    chunks, _ = await reading(pipe, simulator, as_body(drawn()))
    answering = asyncio.create_task(read_rest(chunks, Answer()))
    await slow.begun()
    simulator.next("plain", text="hello")
    assert (await ask(pipe, "Hello")).text == "hello"
    assert not answering.done()
    slow.go_on()
    await answering


async def test_stop_while_a_picture_is_stored(
    pipe: Pipe, simulator: Simulator, files: HostFiles, slow: Slow
) -> None:
    """The answer ends at once, and no file is listed that nobody has been shown."""
    body = as_body(message("Before."), drawn(), message("After."))
    chunks, _ = await reading(pipe, simulator, body)
    answer = Answer()

    async def read() -> None:
        async for chunk in chunks:
            answer.add(chunk)

    answering = asyncio.create_task(read())
    await slow.begun()
    started = time.monotonic()
    answering.cancel()
    with pytest.raises(asyncio.CancelledError):
        await answering
    await chunks.aclose()
    assert time.monotonic() - started < SOON_S
    slow.go_on()
    assert await asyncio.to_thread(slow.left.wait, PATIENCE_S)
    simulator.next("plain", text="hello")
    assert (await ask(pipe, "Hello")).text == "hello"
    assert (files.rows, files.links) == ({}, [])
    assert "Picture" not in answer.text


# Where nothing is saved


@pytest.mark.parametrize("wire", ["result", "chat"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("dialect", "ids"),
    [
        ("browser", {"chat_id": "temporary:session"}),
        ("browser_json", {"chat_id": "temporary:session"}),
        ("browser", {"chat_id": "local:session"}),
        *((dialect, {}) for dialect in WITHOUT_CHAT),
    ],
)
async def test_where_nothing_is_saved_the_picture_is_in_the_text(
    dialect: str,
    ids: dict[str, str],
    form: str,
    wire: str,
    pipe: Pipe,
    simulator: Simulator,
    files: HostFiles,
    site: Site,
) -> None:
    use(pipe, simulator, wire, site)
    body = WIRES[wire](source_of(form, picture("WEBP"), "image/webp", site))
    got = await draw(pipe, simulator, body, dialect, **ids)
    assert got.answer.error == ""
    assert got.answer.text == shown(data_url(picture("WEBP"), "image/webp"))
    assert (got.notices, files.rows, files.tags) == ([], {}, {})


HEADS: Final = [
    "data:image/svg+xml;base64",
    "data:text/html;base64",
    "data:image/png;name=a (1).png;base64",
    "PNG",
]


@pytest.mark.parametrize("dialect", WITHOUT_CHAT)
@pytest.mark.parametrize("head", [*HEADS, ""])
async def test_what_the_text_says_of_the_picture_is_what_it_is(
    head: str, dialect: str, pipe: Pipe, simulator: Simulator, files: HostFiles
) -> None:
    """What a provider says of it could break the text around it, or lie."""
    got = await draw(pipe, simulator, [drawn(f"{head},{in_base64(PNG)}")], dialect)
    assert got.answer.text == shown(DRAWING)


async def test_a_temporary_chat_goes_on_with_its_picture(
    pipe: Pipe, simulator: Simulator, files: HostFiles
) -> None:
    """The page hands back what it has; the model sees the picture, and reads no base64."""
    got = await draw(pipe, simulator, [thought(1), drawn(), message("There.")], chat_id="temporary:1")
    await ask(pipe, next_turn(got), chat_id="temporary:1")
    entries = received(simulator)
    assert entries[1:-1] == [thought(1), said("![Picture](data)"), said("There.")]
    assert pictures_in(entries[-1]) == [DRAWING]


async def test_the_messages_of_a_channel_are_saved(
    pipe: Pipe, simulator: Simulator, files: HostFiles
) -> None:
    """Open WebUI writes what is answered there into its table of messages."""
    got = await draw(pipe, simulator, [drawn()], chat_id="channel:1")
    assert got.answer.error == ""
    expect_no_base64(got, PNG)


@pytest.mark.parametrize("dialect", TASKS)
@pytest.mark.parametrize("wire", ["result", "chat"])
async def test_tasks_get_no_picture(
    wire: str, dialect: str, pipe: Pipe, simulator: Simulator, files: HostFiles
) -> None:
    use(pipe, simulator, wire)
    body = as_body(drawn(), message("Cats"))
    if wire == "chat":
        body = as_chat(images(DRAWING), {"content": "Cats"})
    got = await draw(pipe, simulator, body, dialect)
    assert (got.answer.error, got.answer.text) == ("", "Cats")
    assert (files.rows, files.tags, files.links) == ({}, {}, [])
    expect_no_base64(got, PNG)


async def test_tasks_do_not_even_ask_for_it(
    pipe: Pipe, simulator: Simulator, files: HostFiles, site: Site
) -> None:
    use(pipe, simulator, site=site)
    await draw(pipe, simulator, [drawn(site.put(PNG)), message("Cats")], "task")
    assert site.asked == []


# Several, and their order


@pytest.mark.parametrize("dialect", IN_A_CHAT)
async def test_several_pictures_stand_where_they_came(
    dialect: str, pipe: Pipe, simulator: Simulator, files: HostFiles
) -> None:
    colours = [picture(colour=number) for number in range(4)]
    first, second, third, fourth = (drawn(data_url(c), number) for number, c in enumerate(colours))
    output = [first, message("A."), second, third, message("B."), thought(1), message("C."), fourth]
    got = await draw(pipe, simulator, output, dialect)
    expect_kept(got, files, *colours)
    one, two, three, four = map(shown, addresses(files))
    assert got.saved_texts() == [one, "A.", two, three, "B.", "C.", four]
    kinds = [item["type"] for item in got.answer.items()]
    assert kinds == ["message"] * 5 + ["reasoning"] + ["message"] * 2
    assert [link[2] for link in files.links] == list(files.rows)


async def test_a_program_gets_each_on_a_line_of_its_own(
    pipe: Pipe, simulator: Simulator, files: HostFiles
) -> None:
    for dialect in WITHOUT_CHAT:
        output = [message("A."), drawn(), message("B."), drawn(number=2), drawn(number=3)]
        got = await draw(pipe, simulator, output, dialect)
        picture = shown(DRAWING)
        assert got.answer.text == f"A.\n{picture}\nB.\n{picture}\n{picture}"


async def test_a_picture_is_kept_once(pipe: Pipe, simulator: Simulator, files: HostFiles) -> None:
    """It comes with its own end, and again with that of the answer."""
    output = [drawn(), message("There.")]
    got = await draw(pipe, simulator, as_frames([*events_of(*output)[:-1], *events_of(*output)]))
    expect_kept(got, files, PNG)


async def test_a_picture_that_only_the_end_of_the_answer_has(
    pipe: Pipe, simulator: Simulator, files: HostFiles
) -> None:
    *stream, end = events_of({**drawn(), "result": None}, message("There."))
    end = {**end, "response": {"output": [drawn(), message("There.")]}}
    got = await draw(pipe, simulator, as_frames([*stream, end]))
    expect_kept(got, files, PNG)
    assert sorted(got.saved_texts()) == sorted([shown(*addresses(files)), "There."])


CHAT_DIALECTS: Final = [*IN_A_CHAT, *WITHOUT_CHAT]
# deltas of the other endpoint, "0" and "1" for pictures -> the texts that are saved
CHAT_ORDERS: Final[dict[str, tuple[list[Json], list[str]]]] = {
    "one": ([images("0")], ["0"]),
    "before the text": ([images("0"), {"content": "A."}], ["0", "A."]),
    "after the text": ([{"content": "A."}, images("0")], ["A.", "0"]),
    "with the text": ([{"content": "A.", **images("0")}], ["A.", "0"]),
    "within the text": ([{"content": "A"}, images("0"), {"content": "."}], ["A.", "0"]),
    "two at once": ([images("0", "1"), {"content": "A."}], ["0", "1", "A."]),
    "two one by one": ([{"content": "A."}, images("0"), images("1")], ["A.", "0", "1"]),
    "said again": ([images("0"), images("0", "1"), {"content": "A."}], ["0", "1", "A."]),
}


@pytest.mark.parametrize("dialect", IN_A_CHAT)
@pytest.mark.parametrize("case", CHAT_ORDERS)
async def test_the_other_endpoint(
    case: str, dialect: str, pipe: Pipe, simulator: Simulator, files: HostFiles
) -> None:
    use(pipe, simulator, "chat")
    deltas, texts = CHAT_ORDERS[case]
    colours = [picture(colour=number) for number in range(2)]
    got = await draw(pipe, simulator, as_chat(*(with_colours(delta, colours) for delta in deltas)), dialect)
    count = sum(text.isdigit() for text in texts)
    expect_kept(got, files, *colours[:count])
    pictures = list(map(shown, addresses(files)))
    assert got.saved_texts() == [pictures[int(text)] if text.isdigit() else text for text in texts]


def with_colours(delta: Json, colours: Sequence[bytes]) -> Json:
    """A delta with real pictures in place of their numbers."""
    if "images" not in delta:
        return delta
    numbers = [int(image["image_url"]["url"]) for image in delta["images"]]
    return delta | images(*(data_url(colours[number]) for number in numbers))


@pytest.mark.parametrize("dialect", WITHOUT_CHAT)
@pytest.mark.parametrize("case", [c for c in CHAT_ORDERS if c != "within the text"])
async def test_the_other_endpoint_for_programs(
    case: str, dialect: str, pipe: Pipe, simulator: Simulator, files: HostFiles
) -> None:
    use(pipe, simulator, "chat")
    deltas, texts = CHAT_ORDERS[case]
    colours = [picture(colour=number) for number in range(2)]
    got = await draw(pipe, simulator, as_chat(*(with_colours(delta, colours) for delta in deltas)), dialect)
    pictures = [shown(data_url(colour)) for colour in colours]
    expected = [pictures[int(text)] if text.isdigit() else text for text in texts]
    assert got.answer.text == "\n".join(expected)


@pytest.mark.parametrize("ending", ["response.failed", "cut"])
async def test_what_was_drawn_before_a_failure_stays(
    ending: str, pipe: Pipe, simulator: Simulator, files: HostFiles
) -> None:
    stream = events_of(message("Before."), drawn())[:-1]
    if ending == "response.failed":
        error = {"code": "server_error", "message": "Provider is overloaded"}
        stream.append({"type": "response.failed", "response": {"status": "failed", "error": error}})
    got = await draw(pipe, simulator, as_frames(stream))
    assert got.answer.error
    assert got.pictures == addresses(files)
    assert [on_disk(row) for row in files.rows.values()] == [PNG]
    assert got.saved_texts() == ["Before.", shown(*addresses(files))]
    assert len(inferences(simulator)) == 1


# What is remembered, and sent with the next turn


def received(simulator: Simulator) -> list[Json]:
    """The input of the newest request for an answer."""
    return inferences(simulator)[-1].body["input"]


def next_turn(got: Got) -> Json:
    """The chat after an answer, as the host hands it over."""
    return {"messages": [HELLO, *as_host_returns(with_outputs(got.answer.items())), HELLO]}


def pictures_in(entry: Json) -> list[str]:
    """The pictures that go with a question."""
    return [part["image_url"] for part in entry["content"] if part["type"] == "input_image"]


COLOURS: Final = [picture(colour=number) for number in range(3)]
P0, P1, P2 = (drawn(data_url(content), number) for number, content in enumerate(COLOURS))
BROKEN: Final = drawn("no base64", 9)
# answers with pictures and thinking; what comes back is the same in the same order
REPLAYED: Final[dict[str, list[Json]]] = {
    "thought, picture": [thought(1), P0],
    "picture, thought": [P0, thought(1)],
    "thought, picture, text": [thought(1), P0, message("a")],
    "thought, text, picture": [thought(1), message("a"), P0],
    "thought, text, picture, text": [thought(1), message("a"), P0, message("b")],
    "picture, thought, text": [P0, thought(1), message("a")],
    "picture, text, thought": [P0, message("a"), thought(1)],
    "text, thought, picture": [message("a"), thought(1), P0],
    "text, picture, thought": [message("a"), P0, thought(1)],
    "thoughts around": [thought(1), P0, thought(2), P1, signed(3), message("a")],
    "two pictures": [thought(1), message("a"), P0, P1],
    "three pictures": [thought(1), P0, P1, P2, message("a")],
    "phases": [thought(1), message("a", phase="commentary"), P0, message("b", phase="final_answer")],
    "a picture that cannot be shown": [thought(1), message("a"), BROKEN, message("b")],
    "one that can and one that cannot": [thought(1), BROKEN, message("a"), P0],
    "spaces around the texts": [thought(1), message("a\n\n"), P0, message("\n\nb\n")],
}


def as_sent(output: Iterable[Json], files: HostFiles) -> list[Json]:
    """An answer as it is to come back."""
    pictures = iter(addresses(files))
    found: list[Json] = []
    for item in output:
        if item["type"] == "reasoning":
            found.append(item)
        elif item["type"] == "message":
            phase = {"phase": item["phase"]} if "phase" in item else {}
            found.append(said(item["content"][0]["text"].strip(), **phase))
        elif item["type"] == "function_call":
            found.append(called(item["call_id"]))
        elif item is not BROKEN:
            found.append(said(shown(next(pictures))))
    return found


def bare(entries: Iterable[Json]) -> list[Json]:
    """The same without the spaces around the model's texts."""
    return [
        {**item, "content": item["content"].strip()} if item.get("role") == "assistant" else item
        for item in entries
    ]


@pytest.mark.parametrize("dialect", IN_A_CHAT)
@pytest.mark.parametrize("case", REPLAYED)
async def test_thinking_comes_back_where_it_stood(
    case: str, dialect: str, pipe: Pipe, simulator: Simulator, files: HostFiles
) -> None:
    output = REPLAYED[case]
    got = await draw(pipe, simulator, output, dialect)
    assert len(carriers(got.answer)) == 1
    assert not (await ask(pipe, next_turn(got), dialect)).answer.error
    assert bare(received(simulator))[1:-1] == as_sent(output, files)
    assert pictures_in(received(simulator)[-1]) == [data_url(on_disk(row)) for row in files.rows.values()]


# streams in which a picture is complete only after something that was announced later
OVERTAKEN: Final[dict[str, list[Json]]] = {
    "by a text": [
        *events_of(thought(1))[:-1],
        {**events_of(drawn())[0], "output_index": 1},
        *({**event, "output_index": 2} for event in events_of(message("a"))[:-1]),
        {**events_of(drawn())[1], "output_index": 1},
        {"type": "response.completed", "response": {"output": [thought(1), drawn(), message("a")]}},
    ],
    "and in the last event only": [
        *events_of(thought(1), {**drawn(), "result": None}, message("a"))[:-1],
        {"type": "response.completed", "response": {"output": [thought(1), drawn(), message("a")]}},
    ],
}


@pytest.mark.parametrize("case", OVERTAKEN)
async def test_thinking_comes_back_with_a_picture_that_was_overtaken(
    case: str, pipe: Pipe, simulator: Simulator, files: HostFiles
) -> None:
    got = await draw(pipe, simulator, as_frames(OVERTAKEN[case]))
    expect_kept(got, files, PNG)
    await ask(pipe, next_turn(got))
    entries = received(simulator)[1:-1]
    assert entries[0] == thought(1)
    assert sorted(entry["content"] for entry in entries[1:]) == sorted(got.saved_texts())


DETAIL: Final[Json] = {"type": "reasoning.encrypted", "data": "gAAA", "id": "rs_1", "index": 0}
THINKING: Final[Json] = {"reasoning_details": [DETAIL]}
CALL: Final[Json] = {
    "tool_calls": [{"index": 0, "id": "a", "function": {"name": "f", "arguments": '{"of": "a"}'}}]
}
# deltas after a thought, "0" and "1" for pictures -> what comes back after that thought
CHAT_REPLAYED: Final[dict[str, tuple[list[Json], list[str]]]] = {
    "picture": ([images("0")], ["0"]),
    "picture, text": ([images("0"), {"content": "A."}], ["0", "A."]),
    "text, picture": ([{"content": "A."}, images("0")], ["A.", "0"]),
    "text, picture, text": ([{"content": "A"}, images("0"), {"content": "."}], ["A.", "0"]),
    "text, two pictures": ([{"content": "A."}, images("0", "1")], ["A.", "0", "1"]),
    "picture, text, picture": ([images("0"), {"content": "A."}, images("1")], ["0", "A.", "1"]),
    "text, picture, call": ([{"content": "A."}, images("0"), CALL], ["A.", "0", "call"]),
}


@pytest.mark.parametrize("case", CHAT_REPLAYED)
async def test_thinking_comes_back_from_the_other_endpoint(
    case: str, pipe: Pipe, simulator: Simulator, files: HostFiles
) -> None:
    use(pipe, simulator, "chat")
    deltas, expected = CHAT_REPLAYED[case]
    body = as_chat(THINKING, *(with_colours(delta, COLOURS) for delta in deltas))
    got = await draw(pipe, simulator, body)
    use(pipe, simulator)
    await ask(pipe, next_turn(got))
    pictures = list(map(shown, addresses(files)))
    texts = [said(pictures[int(text)] if text.isdigit() else text) for text in expected if text != "call"]
    calls = [called("a"), output_of("a")] if "call" in expected else []
    entries = received(simulator)[1:-1]
    assert reasoning_in(entries) == entries[:1]
    assert entries[0]["encrypted_content"] == "gAAA"
    assert entries[1:] == [*texts, *calls]


# Tools in the same answer


@pytest.mark.parametrize("wire", ["responses", "chat"])
async def test_a_picture_thinking_and_a_call_in_one_answer(
    wire: str, pipe: Pipe, simulator: Simulator, files: HostFiles
) -> None:
    """The pipe runs the call; the model gets all of it back, at once and with the next question."""

    async def f(of: str) -> str:
        return f"output of {of}"

    use(pipe, simulator, wire)
    body = as_body(thought(1), message("Look:"), P0, function_call("a"))
    if wire == "chat":
        body = as_chat(THINKING, {"content": "Look:"}, with_colours(images("0"), COLOURS), CALL)
    tools = named(f=entry(f, parameters=schema({"of": TEXT})))
    simulator.next("replay", body=body)
    simulator.next("plain", text="Done.")
    asked = arguments("A cat, please", model=PAINTER, tools=offered(tools))
    asked["__tools__"] = tools
    got = Got(await call(pipe, asked), asked["__event_emitter__"])
    expect_kept(got, files, COLOURS[0])
    (address,) = addresses(files)
    assert got.saved_texts() == ["Look:", shown(address), "Done."]
    kinds = [item["type"] for item in got.answer.items()]
    assert kinds == ["reasoning", "message", "message", "function_call", "function_call_output", "message"]
    if wire == "chat":
        first, second, _ = inferences_of(simulator)[-1].body["messages"][1:]
        assert first["reasoning_details"] == [DETAIL]
        assert (first["content"], second["content"]) == ("Look:", shown(address))
        assert [call["id"] for call in second["tool_calls"]] == ["a"]
        return
    once = received(simulator)
    assert once[1:] == [thought(1), said("Look:"), said(shown(address)), called("a"), output_of("a")]
    await ask(pipe, next_turn(got) | {"tools": offered(tools)})
    again = received(simulator)
    assert again[1 : len(once)] == once[1:]
    assert pictures_in(again[-1]) == [data_url(COLOURS[0])]


def inferences_of(simulator: Simulator) -> list[Any]:
    """The requests for an answer, of either endpoint."""
    return [record for record in simulator.requests if record.method == "POST"]


async def test_a_picture_beside_a_call_that_the_host_runs(
    pipe: Pipe, simulator: Simulator, files: HostFiles
) -> None:
    use(pipe, simulator, TOOL_EXECUTION_MODE="open_webui")
    tools = named(f=entry(lambda of: of, parameters=schema({"of": TEXT})))
    simulator.next("replay", body=as_body(thought(1), P0, function_call("a")))
    asked = arguments("A cat, please", model=PAINTER, tools=offered(tools))
    asked["__tools__"] = tools
    got = Got(await call(pipe, asked), asked["__event_emitter__"])
    expect_kept(got, files, COLOURS[0])
    history = [HELLO, *as_host_returns(with_outputs(got.answer.items()))]
    await ask(pipe, {"messages": history, "tools": offered(tools)})
    expected = [thought(1), said(shown(*addresses(files))), called("a"), output_of("a")]
    assert received(simulator)[1:] == expected


# The next turn


async def test_the_next_question_brings_the_picture_to_who_sees(
    pipe: Pipe, simulator: Simulator, files: HostFiles
) -> None:
    got = await draw(pipe, simulator, [drawn(), message("There.")])
    await ask(pipe, next_turn(got))
    _, past, question = received(simulator)
    assert past == said(f"{shown(*addresses(files))}\nThere.")
    assert pictures_in(question) == [DRAWING]
    assert question["content"][0]["text"] == SHOWN_ABOVE
    assert len(files.rows) == 1


async def test_a_blind_model_gets_no_picture(pipe: Pipe, simulator: Simulator, files: HostFiles) -> None:
    got = await draw(pipe, simulator, [drawn(), message("There.")])
    asked = arguments(next_turn(got), model=BLIND)
    answer = await call(pipe, asked)
    assert answer.error == ""
    assert asked["__event_emitter__"].of("notification") == []
    _, past, question = received(simulator)
    assert past == said(f"{shown(*addresses(files))}\nThere.")
    assert question["content"] == [{"type": "input_text", "text": "hello"}]


async def test_who_wants_only_pictures_of_people(pipe: Pipe, simulator: Simulator, files: HostFiles) -> None:
    use(pipe, simulator, IMAGE_INPUT_SELECTION="user_only")
    got = await draw(pipe, simulator, [drawn(), message("There.")])
    await ask(pipe, next_turn(got))
    assert pictures_in(received(simulator)[-1]) == []


@pytest.mark.parametrize("how", ["deleted", "somebody else's", "gone from the disk"])
async def test_a_picture_that_cannot_be_had_any_more(
    how: str, pipe: Pipe, simulator: Simulator, files: HostFiles
) -> None:
    """The chat goes on without it, and nobody is told twice."""
    got = await draw(pipe, simulator, [thought(1), drawn(), message("There.")])
    ((file_id, row),) = files.rows.items()
    if how == "deleted":
        files.rows.clear()
    elif how == "somebody else's":
        row.user_id = "other"
    else:
        remove(row)
    again = await ask(pipe, next_turn(got))
    assert (again.answer.error, again.notices) == ("", [])
    address = f"/api/v1/files/{file_id}/content"
    assert received(simulator)[1:-1] == [thought(1), said(shown(address)), said("There.")]
    assert pictures_in(received(simulator)[-1]) == []


async def test_the_copy_of_somebody_elses_chat(pipe: Pipe, simulator: Simulator, files: HostFiles) -> None:
    """They read that there was a picture; it is not theirs to send."""
    got = await draw(pipe, simulator, [drawn(), message("There.")])
    asked = arguments(next_turn(got), model=PAINTER)
    asked["__user__"]["id"] = "somebody else"
    assert (await call(pipe, asked)).error == ""
    assert pictures_in(received(simulator)[-1]) == []


# What is kept of the turn


def rows_of(connection: sa.Connection) -> list[bytes]:
    """What the pipe's own table holds, all of it."""
    name = next(name for name in sa.inspect(connection).get_table_names() if name.endswith("_artifacts"))
    table = sa.Table(name, sa.MetaData(), autoload_with=connection)
    return [repr(tuple(row)).encode() for row in connection.execute(sa.select(table))]


async def test_no_picture_in_the_table_of_records(
    pipe: Pipe, simulator: Simulator, files: HostFiles, database: AsyncEngine
) -> None:
    use(pipe, simulator, ENCRYPT_ARTIFACTS="off", MIN_COMPRESS_BYTES=1_000_000)
    content = padded(30_000)
    got = await draw(pipe, simulator, [thought(1), drawn(data_url(content)), message("There.")])
    expect_kept(got, files, content)
    ((_, (detail,)),) = carriers(got.answer)
    assert "turn" in detail
    async with database.connect() as connection:
        (row,) = await connection.run_sync(rows_of)
    assert thought(1)["encrypted_content"].encode() in row
    assert in_base64(content[:60]).encode() not in row
    assert len(row) < 2_000
    await ask(pipe, next_turn(got))
    assert received(simulator)[1:-1] == [thought(1), said(shown(*addresses(files))), said("There.")]


# Whatever comes

BEGINNINGS: Final = st.sampled_from(["data:image/png;base64,", "data:,", ",", ""])
SOURCES: Final = st.one_of(
    st.text(max_size=40),
    st.binary(max_size=40).map(in_base64),
    st.binary(max_size=40).map(data_url),
    st.sampled_from([PNG, SVG, LATIN_SVG, PDF]).map(data_url),
    st.tuples(BEGINNINGS, st.text("AB+/=- \n", max_size=9)).map("".join),
)


@example(source="AAA", chat_id="chat")
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(source=SOURCES, chat_id=st.sampled_from(["chat", "temporary:1", ""]))
async def test_whatever_a_provider_sends(source: str, chat_id: str, files: HostFiles) -> None:
    """It is a picture, in one line, or one sentence; nothing is raised."""
    media = MediaIntake(OpenWebUIHost(), time.monotonic)
    made = await ImageResults(OpenWebUIHost(), media).keep(
        MediaProduced(3, source), request_of(chat_id=chat_id), RequestSettings()
    )
    await media.aclose()
    if isinstance(made[0], Notice):
        assert len(made) == 1
        assert made[0].text.startswith("The model made a picture that cannot be shown. ")
        assert made[0].text.endswith(".")
        return
    text, closed = made
    assert isinstance(text, TextDelta)
    assert isinstance(closed, ItemClosed)
    assert without_pictures(text.text)[0] == ""
    (address,) = without_pictures(text.text)[1]
    assert address in addresses(files) if chat_id == "chat" else address.startswith("data:image/")
