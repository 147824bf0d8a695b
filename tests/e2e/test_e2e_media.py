"""Files, pictures, recordings and films through the real host, attached as the page does it."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import struct
import threading
import urllib.parse
import urllib.request
import uuid
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final

import pytest
from playwright.async_api import expect

from openrouter_responses_pipe.simulator import CATALOG
from openrouter_responses_pipe.webui import (
    FUNCTION_ID,
    PIPE_FILE,
    READ_BY_EVERYONE,
    WebUIClient,
    WebUIError,
    WebUIServer,
)
from tests.e2e.driver import Json, Tab, Turn, error_text, is_document, unique, until
from tests.e2e.host import KEY, MODEL, WEBUI_PYTHON, Host, valves
from tests.e2e.page import ChatPage
from tests.e2e.test_e2e_models import can, is_marked, ours, publish, settle
from tests.e2e.test_e2e_reasoning import press
from tests.e2e.upstream import Upstream

BLIND: Final = f"{FUNCTION_ID}.meta-llama/llama-3.3-70b-instruct"  # text only
WATCHER: Final = f"{FUNCTION_ID}.google/gemini-2.5-flash"  # hears and watches too
SOURCE: Final = "<source id="
NOT_YOURS: Final = "There is no such file, or it is not yours"
WORD_MIME: Final = "application/vnd.openxmlformats-officedocument.wordprocessingml.document"


# Files


def pdf(text: str) -> bytes:
    """A PDF of one page that says this."""
    drawn = f"BT /F1 12 Tf 20 100 Td ({text}) Tj ET".encode()
    objects = [
        b"<</Type/Catalog/Pages 2 0 R>>",
        b"<</Type/Pages/Kids[3 0 R]/Count 1>>",
        b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 300 200]/Contents 4 0 R/Resources<</Font<</F1 5 0 R>>>>>>",
        b"<</Length %d>>stream\n%s\nendstream" % (len(drawn), drawn),
        b"<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>",
    ]
    made, places = b"%PDF-1.4\n", []
    for number, content in enumerate(objects, 1):
        places.append(len(made))
        made += b"%d 0 obj%s endobj\n" % (number, content)
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    head = b"xref\n0 6\n0000000000 65535 f \n"
    return made + head + table + b"trailer<</Size 6/Root 1 0 R>>\nstartxref\n%d\n%%%%EOF\n" % len(made)


def docx(text: str) -> bytes:
    """The least that is a Word document."""
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        namespace = "http://schemas.openxmlformats.org/wordprocessingml/2006/main"
        archive.writestr(
            "word/document.xml",
            f'<w:document xmlns:w="{namespace}"><w:body><w:p><w:r><w:t>{text}</w:t></w:r></w:p></w:body>'
            "</w:document>",
        )
    return made.getvalue()


def png() -> bytes:
    """A picture of one pixel that is like no other."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        check = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check)

    header = struct.pack(">IIBBBBB", 1, 1, 8, 2, 0, 0, 0)
    pixel = zlib.compress(b"\0\x10\x20\x30")
    parts = [(b"IHDR", header), (b"tEXt", uuid.uuid4().hex.encode()), (b"IDAT", pixel), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(kind, content) for kind, content in parts)


WAV: Final = b"RIFF\x24\0\0\0WAVEfmt " + bytes(28)
MP4: Final = b"\0\0\0\x18ftypmp42" + bytes(28)


def fact() -> str:
    """A word that stands in one file only."""
    return f"fact{uuid.uuid4().hex[:10]}"


def data_url(content: bytes, mime: str) -> str:
    return f"data:{mime};base64,{base64.b64encode(content).decode()}"


def http(client: WebUIClient, path: str, body: bytes | None = None, kind: str = "") -> bytes:
    """Send bytes, get bytes."""
    headers = {"Authorization": f"Bearer {client.token}", **({"Content-Type": kind} if kind else {})}
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(urllib.request.Request(client.url + path, body, headers), timeout=30) as response:
        return response.read()


def upload(client: WebUIClient, name: str, content: bytes, mime: str, *, process: bool = True) -> Json:
    """Upload a file as the page does, wait until the host has looked into it; return it."""
    boundary = uuid.uuid4().hex
    head = f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="{name}"\r\n'
    head += f"Content-Type: {mime}\r\n\r\n"
    form = head.encode() + content + f"\r\n--{boundary}--\r\n".encode()
    path = f"/api/v1/files/?process={str(process).lower()}"
    file = json.loads(http(client, path, form, f"multipart/form-data; boundary={boundary}"))
    while process and file["data"]["status"] in ("pending", "processing"):
        file = client.request("GET", f"/api/v1/files/{file['id']}")
    assert not process or file["data"]["status"] == "completed", file["data"]
    return file


def attach(client: WebUIClient, name: str, content: bytes, mime: str) -> Json:
    """Upload a file; return what the page then sends of it with a question."""
    is_picture = mime.startswith("image/")
    file = upload(client, name, content, mime, process=not is_picture)
    file = {**file, "data": {"status": "completed"}, "status": True} if not is_picture else file
    return {
        "type": "file",
        "file": file,
        "id": file["id"],
        "url": file["id"],
        "name": name,
        "status": "uploaded",
        "size": len(content),
        "error": "",
        "itemId": str(uuid.uuid4()),
        "content_type": mime,
    }


def a_pdf(client: WebUIClient, word: str, name: str = "report.pdf") -> Json:
    return attach(client, name, pdf(f"The word is {word}."), "application/pdf")


# What was sent, and what was said


def dumped(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def parts(body: Json, kind: str) -> list[tuple[int, Json]]:
    """The parts of one type in the messages of people, each with the number of its message."""
    asked = [entry for entry in body["input"] if entry.get("role") == "user"]
    return [
        (number, part)
        for number, entry in enumerate(asked)
        for part in entry["content"]
        if part["type"] == kind
    ]


def file_part(name: str, content: bytes) -> Json:
    return {"type": "input_file", "filename": name, "file_data": data_url(content, "application/pdf")}


def pictures(body: Json) -> list[tuple[int, str]]:
    """The pictures of a request, each with the number of the question that it stands in."""
    return [(number, part["image_url"]) for number, part in parts(body, "input_image")]


def told(message: Json) -> str:
    """What stays to be read above an answer."""
    return " | ".join(str(line.get("description")) for line in message.get("statusHistory") or [])


class Asker:
    """Somebody at a page, who asks and then looks at what OpenRouter got."""

    def __init__(self, tab: Tab, upstream: Upstream) -> None:
        self.tab = tab
        self.client = tab.client
        self._upstream = upstream

    async def __call__(
        self, question: str = "What does it say?", model: str = MODEL, **fields: Any
    ) -> tuple[Turn, Json, Json]:
        """Ask; return the turn, the saved answer and the body that OpenRouter got."""
        question, word = unique(question)
        turn = await self.tab.ask(question, model, **fields)
        message = await turn.done()
        assert not error_text(message)
        body = await asyncio.to_thread(lambda: self._upstream.last(word)["body"])
        return turn, message, body

    async def attach(self, name: str, content: bytes, mime: str) -> Json:
        return await asyncio.to_thread(attach, self.client, name, content, mime)


@pytest.fixture
def ask(tab: Tab, upstream: Upstream) -> Asker:
    """The administrator, who may use every model."""
    return Asker(tab, upstream)


@pytest.fixture
def user_ask(user_tab: Tab, upstream: Upstream) -> Asker:
    """Ursula, who may use one."""
    return Asker(user_tab, upstream)


# Servers


class Web:
    """A server of this machine with files on it, which counts who comes.

    `services` are what the host needs to look into files: it gives every text the same vector, and
    hears the same words in every recording.
    """

    SPOKEN: Final = "spoken words"

    def __init__(self) -> None:
        self.files: dict[str, tuple[bytes, str]] = {}
        self.hits: list[str] = []
        self.gate = threading.Event()
        self.gate.set()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, self))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    @property
    def netloc(self) -> str:
        return f"127.0.0.1:{self._server.server_port}"

    def serve(self, name: str, content: bytes, mime: str) -> str:
        """Put a file there; return its address."""
        self.files[f"/{name}"] = (content, mime)
        return f"http://{self.netloc}/{name}"

    def close(self) -> None:
        """Take the server from the net."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._server.server_close()
            self._thread.join()


class _Handler(BaseHTTPRequestHandler):
    def __init__(self, web: Web, *args: Any) -> None:
        self.web = web
        super().__init__(*args)

    def do_GET(self) -> None:
        self.web.hits.append(self.path)
        self.web.gate.wait(30)
        content, mime = self.web.files.get(self.path, (b"", ""))
        self._answer(200 if content else 404, content, mime or "text/plain")

    def do_POST(self) -> None:
        raw = self._read()
        answer: Json = {"text": Web.SPOKEN}
        if self.path == "/embeddings":
            texts = json.loads(raw)["input"]
            count = len(texts) if isinstance(texts, list) else 1
            answer = {"data": [{"embedding": [0.5] * 8, "index": index} for index in range(count)]}
        self._answer(200, json.dumps(answer).encode(), "application/json")

    def _read(self) -> bytes:
        if "Content-Length" in self.headers:
            return self.rfile.read(int(self.headers["Content-Length"]))
        raw = b""
        while size := int(self.rfile.readline(), 16):
            raw += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return raw

    def _answer(self, status: int, content: bytes, mime: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", mime)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


@pytest.fixture
def web() -> Iterator[Web]:
    """A server of the web, as far as this machine has one."""
    server = Web()
    yield server
    server.close()


def let_it_search(admin: WebUIClient, services: Web) -> None:
    """Give a host what it needs to look into files without leaving the machine."""
    url = f"http://{services.netloc}"
    account = {"url": url, "key": "k"}
    embedding = {
        "RAG_EMBEDDING_ENGINE": "openai", "RAG_EMBEDDING_MODEL": "same", "openai_config": account
    }  # fmt: skip
    admin.request("POST", "/api/v1/retrieval/embedding/update", embedding)
    audio = admin.request("GET", "/api/v1/audio/config")
    audio["stt"] |= {"ENGINE": "openai", "OPENAI_API_BASE_URL": url, "OPENAI_API_KEY": "k", "MODEL": "same"}
    admin.request("POST", "/api/v1/audio/config/update", audio)


@pytest.fixture(scope="module")
def services() -> Iterator[Web]:
    """What the hosts of these tests look into files with."""
    server = Web()
    yield server
    server.close()


@pytest.fixture(scope="module", autouse=True)
def prepared(host: Host, services: Web) -> Iterator[None]:
    """Let the host find passages, and leave its model rows alone unless a test is about them."""
    before = host.admin.request("GET", "/api/v1/retrieval/embedding")
    let_it_search(host.admin, services)
    host.admin.set_valves({"SYNC_MODEL_METADATA": "off"})
    asyncio.run(settle(host, lambda rows: not any(map(is_marked, ours(rows).values())), "rows taken back"))
    yield
    # what hears recordings stays: to put it back, the host would have to load a model
    host.admin.request("POST", "/api/v1/retrieval/embedding/update", before)
    host.admin.set_valves({"SYNC_MODEL_METADATA": None})
    host.admin.models(refresh=True)


@pytest.fixture(scope="module", autouse=True)
def second_server(folder: Path, prepared: None) -> Iterator[WebUIServer]:
    """Another host, which starts while the first tests run.

    It tells OpenRouter who asks, and puts passages into the system prompt.
    """
    server = WebUIServer(folder / "open-webui-2", python=WEBUI_PYTHON)
    settings = ("ENABLE_FORWARD_USER_INFO_HEADERS", "RAG_SYSTEM_CONTEXT")
    try:
        server.launch(
            {"ENABLE_PIP_INSTALL_FRONTMATTER_REQUIREMENTS": "false", **dict.fromkeys(settings, "true")}
        )
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="module")
def second_host(second_server: WebUIServer, upstream: Upstream, services: Web) -> Host:
    """The other host with the pipe in it; its administrator is its only account."""
    second_server.wait_ready()
    admin = WebUIClient(second_server.url)
    admin.signup("Ägnes Ådmin", "agnes@example.com", "a long enough password")
    admin.install_function(PIPE_FILE.read_text(encoding="utf-8"))
    account = {"API_KEY": KEY, "BASE_URL": upstream.base_url}
    admin.set_valves({**account, "SYNC_MODEL_METADATA": "off", "NATIVE_FILES": "supported"})
    let_it_search(admin, services)
    admin.models(refresh=True)
    return Host(second_server, admin, admin, upstream.base_url)


@contextmanager
def capabilities(host: Host, **values: bool) -> Iterator[None]:
    """Switch capabilities of the model on or off for a while, as an administrator does."""
    path = f"/api/v1/models/model?id={MODEL}"
    row = host.admin.request("GET", path)
    host.admin.update_model({**row, "meta": {**row["meta"], "capabilities": {"usage": True, **values}}})
    host.admin.models(refresh=True)
    try:
        yield
    finally:
        host.admin.update_model(row)
        host.admin.models(refresh=True)


@contextmanager
def parameters(host: Host, **values: Any) -> Iterator[None]:
    """Give the model parameters of the administrator's for a while."""
    row = {"id": MODEL, "name": "GPT-5 Mini", "access_grants": [READ_BY_EVERYONE]}
    if MODEL not in host.admin.model_rows():
        host.admin.create_model(row)
    row = host.admin.request("GET", f"/api/v1/models/model?id={MODEL}")
    host.admin.update_model({**row, "params": values})
    host.admin.models(refresh=True)
    try:
        yield
    finally:
        host.admin.update_model({**row, "params": {}})
        host.admin.models(refresh=True)


@contextmanager
def whole_texts(host: Host) -> Iterator[None]:
    """Let the host put files into the prompt whole, without vectors, for a while."""
    path, name = "/api/v1/retrieval/config/update", "BYPASS_EMBEDDING_AND_RETRIEVAL"
    host.admin.request("POST", path, {name: True})
    try:
        yield
    finally:
        host.admin.request("POST", path, {name: False})


# A file whole


@pytest.mark.parametrize("file_context", [True, False], ids=["searched", "not searched"])
@pytest.mark.parametrize("native_files", ["supported", "always"])
async def test_a_pdf_goes_whole(host: Host, ask: Asker, native_files: str, file_context: bool) -> None:
    """Before its question, without passages, and in the same place for ever."""
    word, name = fact(), "Ätna report.pdf"
    report = await ask.attach(name, pdf(f"The word is {word}."), "application/pdf")
    with capabilities(host, file_context=file_context), valves(host, NATIVE_FILES=native_files):
        turn, message, first = await ask(attached=[report])
        again, _, second = await ask("And then?", after=turn)
        chat = await ask.tab.call("GET", f"/api/v1/chats/{turn.chat_id}")
        async with Tab.open(ask.client) as reloaded:
            reload = Turn(reloaded, turn.chat_id, again.message_id, "", documents=chat["chat"]["files"])
            _, _, third = await Asker(reloaded, ask._upstream)("And last?", after=reload)
    assert "Not sent" not in told(message)
    [question] = first["input"]
    assert question["content"][0] == file_part(name, pdf(f"The word is {word}."))
    assert question["content"][-1]["text"].endswith(turn_question(message, chat))
    for body in (first, second, third):
        assert [number for number, _ in parts(body, "input_file")] == [0]
        assert dumped(body["input"][0]) == dumped(question)
        assert word not in dumped(body)
        assert SOURCE not in dumped([body["input"], body.get("instructions")])
        assert (body.get("instructions"), body.get("tools")) == (
            first.get("instructions"),
            first.get("tools"),
        )
    assert dumped(third["input"][: len(second["input"])]) == dumped(second["input"])


def turn_question(message: Json, chat: Json) -> str:
    """The question as it was saved."""
    return chat["chat"]["history"]["messages"][message["parentId"]]["content"]


async def test_a_tool_in_between(host: Host, ask: Asker, upstream: Upstream) -> None:
    """The host asks once more with what the tool said, and puts the passages in again."""
    word = fact()
    report = await asyncio.to_thread(a_pdf, ask.client, word)
    question, mark = unique("[[tool name=get_current_timestamp args={}]] What does it say?")
    with valves(host, NATIVE_FILES="supported"):
        turn = await ask.tab.ask(question, MODEL, attached=[report])
        assert not error_text(await turn.done())
    first, second = (
        record["body"] for record in upstream.asked(mark) if "reasoning.encrypted_content" in dumped(record)
    )
    assert dumped(second["input"][: len(first["input"])]) == dumped(first["input"])
    for body in (first, second):
        assert [number for number, _ in parts(body, "input_file")] == [0]
        assert word not in dumped(body)
        assert SOURCE not in dumped(body["input"])


async def test_off_leaves_it_to_the_host(ask: Asker) -> None:
    word = fact()
    report = await asyncio.to_thread(a_pdf, ask.client, word)
    _, message, body = await ask(attached=[report])
    assert word in dumped(body["input"][-1])
    assert SOURCE in dumped(body["input"][-1])
    assert not parts(body, "input_file")
    assert message["sources"]


async def test_a_model_that_reads_no_files(host: Host, ask: Asker) -> None:
    word = fact()
    report = await asyncio.to_thread(a_pdf, ask.client, word)
    with valves(host, NATIVE_FILES="supported"):
        _, _, body = await ask(model=BLIND, attached=[report])
        assert word in dumped(body)
        assert not parts(body, "input_file")
    with valves(host, NATIVE_FILES="always", PDF_ENGINE="mistral-ocr"):
        _, _, body = await ask(model=BLIND, attached=[report])
        assert word not in dumped(body)
        assert len(parts(body, "input_file")) == 1
        assert body["plugins"] == [{"id": "file-parser", "pdf": {"engine": "mistral-ocr"}}]


async def test_each_file_stays_at_its_question(host: Host, ask: Asker) -> None:
    """Also where people ask the same twice, or nothing at all."""
    names = ["one.pdf", "two.pdf", "three.pdf"]
    files = [await asyncio.to_thread(a_pdf, ask.client, fact(), name) for name in names]
    same = {"user": "Sum it up", "model": MODEL}
    with valves(host, NATIVE_FILES="supported"):
        first = await ask.tab.ask(same["user"], MODEL, attached=files[:1])
        await first.done()
        second = await ask.tab.ask(same["user"], MODEL, attached=files[1:2], after=first)
        await second.done()
        third = await ask.tab.ask("", MODEL, attached=files[2:], after=second)
        await third.done()
        _, _, body = await ask("And now?", after=third)
    placed = [(number, part["filename"]) for number, part in parts(body, "input_file")]
    assert placed == [(0, "one.pdf"), (1, "two.pdf"), (2, "three.pdf")]


async def test_a_file_without_a_word(host: Host, ask: Asker) -> None:
    """A model that the host offers no tools for: nothing in the history says that a file was there."""
    report = await asyncio.to_thread(a_pdf, ask.client, fact())
    with capabilities(host, builtin_tools=False, file_context=False), valves(host, NATIVE_FILES="supported"):
        first = await ask.tab.ask("", MODEL, attached=[report])
        assert not error_text(await first.done())
        _, _, second = await ask("And now?", after=first)
        _, _, third = await ask("And then?", after=first)
    assert [number for number, _ in parts(second, "input_file")] == [0]
    assert len([entry for entry in second["input"] if entry.get("role") == "user"]) == 2
    assert dumped(second["input"][0]) == dumped(third["input"][0])


async def test_the_same_file_twice(host: Host, ask: Asker) -> None:
    report = await asyncio.to_thread(a_pdf, ask.client, fact())
    with valves(host, NATIVE_FILES="supported"):
        turn, _, first = await ask(attached=[report])
        _, _, second = await ask("And once more?", after=turn, attached=[report])
    assert [number for number, _ in parts(second, "input_file")] == [0]
    assert dumped(second["input"][0]) == dumped(first["input"][0])


async def test_another_answer_to_an_earlier_question(host: Host, ask: Asker, upstream: Upstream) -> None:
    """It is asked for in the same words as the first."""
    early = await asyncio.to_thread(a_pdf, ask.client, fact(), "early.pdf")
    late = await asyncio.to_thread(a_pdf, ask.client, fact(), "late.pdf")
    with valves(host, NATIVE_FILES="supported"):
        first, _, before = await ask(attached=[early])
        await ask("And this?", after=first, attached=[late])
        again = str(uuid.uuid4())
        chosen = [{"model_id": MODEL, "message_id": again}]
        # the page goes through the files that are attached up to the question
        await press(first, new_id=again, message_ids=chosen, files=[early])
    assert dumped(last_answer(upstream)["input"]) == dumped(before["input"])


async def test_the_rest_of_an_answer(host: Host, ask: Asker, upstream: Upstream) -> None:
    """Of passages the host then makes a question of their own."""
    report = await asyncio.to_thread(a_pdf, ask.client, fact())
    with valves(host, NATIVE_FILES="supported"):
        turn, _, before = await ask(attached=[report])
        await press(turn, assistant_message_id=turn.message_id, files=[report])
    continued = last_answer(upstream)
    assert dumped(continued["input"][: len(before["input"])]) == dumped(before["input"])
    assert [number for number, _ in parts(continued, "input_file")] == [0]
    assert SOURCE not in dumped(continued["input"])


def last_answer(upstream: Upstream) -> Json:
    """The last request that was not a task of the host's."""
    return [record["body"] for record in upstream.asked() if record["scenario"] != "task"][-1]


async def test_a_file_that_is_gone(host: Host, ask: Asker) -> None:
    """The chat goes on, and says what is missing."""
    report = await asyncio.to_thread(a_pdf, ask.client, fact(), "gone.pdf")
    with valves(host, NATIVE_FILES="supported"):
        turn, _, _ = await ask(attached=[report])
        await ask.tab.call("DELETE", f"/api/v1/files/{report['id']}")
        _, message, body = await ask("And now?", after=turn)
    assert not parts(body, "input_file")
    assert f"gone.pdf. {NOT_YOURS}" in told(message)


async def test_a_file_that_is_too_large(host: Host, ask: Asker) -> None:
    report = await ask.attach("large.pdf", pdf(fact()) + b"%" * 1_100_000, "application/pdf")
    with valves(host, NATIVE_FILES="supported", BASE64_MAX_SIZE_MB=1):
        turn, message, body = await ask(attached=[report])
    assert not parts(body, "input_file")
    words = "Not sent to the model: large.pdf. It is larger than 1 MB, which is the limit"
    assert words in told(message)
    assert words in turn.data("notification")[0]["content"]
    assert SOURCE in dumped(body["input"])  # what the host has found stays


# Other kinds


@pytest.mark.parametrize(
    ("name", "mime", "content"),
    [
        ("notes.txt", "text/plain", "Grüße, {}\n"),
        ("table.csv", "text/csv", "word;count\n{};1\n"),
        ("data.json", "application/json", '{{"word": "{}"}}'),
        ("page.html", "text/html", "<!doctype html><p>{}</p>"),
    ],
)
async def test_a_text_goes_whole(host: Host, ask: Asker, name: str, mime: str, content: str) -> None:
    content = content.format(fact())
    file = await ask.attach(name, content.encode(), mime)
    with valves(host, NATIVE_FILES="supported"):
        _, _, body = await ask(attached=[file])
    assert body["input"][-1]["content"][0] == {
        "type": "input_text",
        "text": f'<file name="{name}">\n{content}\n</file>',
    }
    assert SOURCE not in dumped(body["input"])


async def test_a_word_document_stays_with_the_host(host: Host, ask: Asker) -> None:
    word = fact()
    file = await ask.attach("letter.docx", docx(f"The word is {word}."), WORD_MIME)
    with valves(host, NATIVE_FILES="always"):
        _, message, body = await ask(attached=[file])
        assert word in dumped(body["input"][-1])
        assert not parts(body, "input_file")
        assert "letter.docx" not in told(message)
        with capabilities(host, file_context=False):
            _, message, body = await ask(attached=[file])
            assert "view_file" in dumped(body["tools"])
            assert file["id"] in dumped(body["input"])
        with capabilities(host, file_context=False, builtin_tools=False):
            _, message, body = await ask(attached=[file])
            assert word not in dumped(body)
            assert "Not sent to the model: letter.docx" in told(message)


async def test_recordings_and_films(host: Host, ask: Asker) -> None:
    """To models that take them; the others get what the host has heard."""
    wav = await ask.attach("talk.wav", WAV, "audio/wav")
    mp4 = await ask.attach("clip.mp4", MP4, "video/mp4")
    sound = {"type": "input_audio", "input_audio": {"data": base64.b64encode(WAV).decode(), "format": "wav"}}
    film = {"type": "input_video", "video_url": data_url(MP4, "video/mp4")}
    with valves(host, NATIVE_FILES="supported"):
        turn, message, body = await ask(model=WATCHER, attached=[wav, mp4])
        assert body["input"][-1]["content"][:2] == [sound, film]
        assert "Not sent" not in told(message)
        _, _, later = await ask("And then?", WATCHER, after=turn)
        assert dumped(later["input"][0]) == dumped(body["input"][0])
        _, message, body = await ask(attached=[wav])
        assert Web.SPOKEN in dumped(body["input"])
        assert not parts(body, "input_audio")


# Whose file


def secret(client: WebUIClient) -> tuple[Json, Json, tuple[str, ...]]:
    """A file and a picture of this person's, and what must not be seen of them."""
    word, pixel = fact(), png()
    report = a_pdf(client, word, "salaries.pdf")
    picture = attach(client, "private.png", pixel, "image/png")
    encoded = (pdf(f"The word is {word}."), pixel)
    return report, picture, (word, *(base64.b64encode(content).decode()[24:] for content in encoded))


def forged(report: Json, picture: Json) -> dict[str, Json]:
    """Ways to ask for what is somebody else's: the fields of a question."""
    at = "/api/v1/files/{}/content".format
    text = {"type": "text", "text": "Read this"}

    def block(**part: Any) -> Json:
        return {"question": [text, part]}

    return {
        "attached": {"attached": [report]},
        "attached in few words": {"attached": [{"type": "file", "id": report["id"], "name": "salaries.pdf"}]},
        "only in the chat": {"files": [report]},
        "a path for an id": {"files": [{**report, "id": f"../{report['id']}"}]},
        "file_id": block(type="file", file={"file_id": report["id"]}),
        "file_url": block(type="file", file={"file_url": at(report["id"]), "filename": "a.pdf"}),
        "file_data": block(type="file", file={"file_data": at(report["id"]), "filename": "a.pdf"}),
        "input_file": block(type="input_file", file_url=at(report["id"]), filename="a.pdf"),
        "image_url": block(type="image_url", image_url={"url": at(picture["id"])}),
        "input_image": block(type="input_image", image_url=at(picture["id"])),
        "bare id": block(type="image_url", image_url={"url": picture["id"]}),
        "a picture attached": {"attached": [picture]},
        "a picture by its address": {"attached": [{"type": "image", "url": at(picture["id"])}]},
        "audio": block(type="input_audio", input_audio={"url": at(report["id"]), "format": "wav"}),
        "video": block(type="video_url", video_url={"url": at(report["id"])}),
    }


# What this model does not take is not looked at, what is no id is nothing that could be attached, and
# of a picture the host leaves only the id, which says nothing.
UNREAD: Final = "a picture that could not be read"
SAID: Final = {
    "audio": "recording",
    "video": "film",
    "a path for an id": "",
    "bare id": UNREAD,
    "a picture attached": UNREAD,
}


@pytest.fixture(scope="module")
def theirs(host: Host, prepared: None) -> tuple[Json, Json, tuple[str, ...]]:
    """What the administrator has and Ursula must not see."""
    return secret(host.admin)


async def test_a_file_of_somebody_else(
    host: Host, user_ask: Asker, upstream: Upstream, theirs: tuple[Json, Json, tuple[str, ...]]
) -> None:
    """However it is asked for: nothing of it leaves, and the person is told."""
    report, picture, hidden = theirs

    async def outcome(fields: Json) -> tuple[bool, str, list[str]]:
        question, word = unique("Read this")
        if blocks := fields.pop("question", None):
            blocks = [{"type": "text", "text": question}, *blocks[1:]]
        turn = await user_ask.tab.ask(blocks or question, MODEL, **fields)
        message = await turn.done()
        asked = await asyncio.to_thread(upstream.asked, word)
        seen = dumped([asked, message, turn.events])
        return bool(asked), told(message), [text for text in hidden if text in seen]

    ways = forged(report, picture)
    with valves(host, NATIVE_FILES="always"):
        outcomes = await asyncio.gather(*(outcome(dict(fields)) for fields in ways.values()))
    for way, (was_asked, words, leaked) in zip(ways, outcomes, strict=True):
        assert (way, was_asked, leaked) == (way, True, [])
        said = SAID.get(way, NOT_YOURS)
        assert said in words, (way, words)


@pytest.mark.parametrize("file_context", [True, False], ids=["searched", "not searched"])
async def test_a_program_attaches_a_file(host: Host, upstream: Upstream, file_context: bool) -> None:
    """As Open WebUI's documentation has it, the id is enough: the file is sent, or what is found in it."""
    word = fact()
    content = pdf(f"The word is {word}.")
    file = upload(host.user, "of-a-program.pdf", content, "application/pdf")
    question, mark = unique("Read this")
    with capabilities(host, file_context=file_context), valves(host, NATIVE_FILES="supported"):
        host.user.complete(MODEL, question, files=[{"type": "file", "id": file["id"]}])
    body = upstream.last(mark)["body"]
    whole = [part for _, part in parts(body, "input_file")]
    assert whole == [file_part("of-a-program.pdf", content)] or word in dumped(body)


@pytest.mark.parametrize("way", ["file_id", "file_url", "input_file", "image_url"])
async def test_a_program_asks_for_a_file_of_somebody_else(
    host: Host, upstream: Upstream, theirs: tuple[Json, Json, tuple[str, ...]], way: str
) -> None:
    report, picture, hidden = theirs
    question, word = unique("Read this")
    content = [{"type": "text", "text": question}, *forged(report, picture)[way]["question"][1:]]
    body = {"model": MODEL, "stream": False, "messages": [{"role": "user", "content": content}]}
    with valves(host, NATIVE_FILES="always"):
        answer = host.user.request("POST", "/api/chat/completions", body)
    seen = dumped([upstream.asked(word), answer])
    assert not [text for text in hidden if text in seen]


async def test_a_picture_of_somebody_else_in_an_answer(
    host: Host, user_ask: Asker, upstream: Upstream, theirs: tuple[Json, Json, tuple[str, ...]]
) -> None:
    _, picture, hidden = theirs
    chat_id, answer_id = save_chat(host.user, f"![x](/api/v1/files/{picture['id']}/content)")
    _, _, body = await user_ask(after=Turn(user_ask.tab, chat_id, answer_id, ""))
    assert picture["id"] in dumped(body)
    assert not pictures(body)
    assert not [text for text in hidden if text in dumped(body)]


def of_knowledge(file: Json) -> Json:
    """What the page sends of a file that was picked from a knowledge base."""
    return {**file, "data": None, "type": "file", "name": file["filename"], "status": "processed"}


async def test_shared_knowledge(host: Host, user_ask: Asker) -> None:
    """A file of a knowledge base, as the page names it; without the share it is nobody else's."""
    word = fact()
    content = pdf(f"The word is {word}.")
    file = upload(host.admin, "handbook.pdf", content, "application/pdf")
    form = {"name": "Handbooks", "description": "", "access_grants": [READ_BY_EVERYONE]}
    base = host.admin.request("POST", "/api/v1/knowledge/create", form)
    host.admin.request("POST", f"/api/v1/knowledge/{base['id']}/file/add", {"file_id": file["id"]})
    entry = of_knowledge(file)
    with valves(host, NATIVE_FILES="supported"):
        _, message, body = await user_ask(attached=[entry])
        assert [part for _, part in parts(body, "input_file")] == [file_part("handbook.pdf", content)]
        assert word not in dumped(body)
        assert "Not sent" not in told(message)
        grants = {"access_grants": []}
        host.admin.request("POST", f"/api/v1/knowledge/{base['id']}/access/update", grants)
        _, message, body = await user_ask(attached=[entry])
        assert not parts(body, "input_file")
        assert NOT_YOURS in told(message)


@pytest.mark.parametrize("place", ["chat", "knowledge base"])
async def test_a_long_text_stays_with_the_host(host: Host, ask: Asker, place: str) -> None:
    """One that fills more than half of the context; of a knowledge base the page names the size elsewhere."""
    long = "All work and no play. " * 30_000
    with whole_texts(host), valves(host, NATIVE_FILES="supported"):
        uploaded = await ask.attach("long.txt", long.encode(), "text/plain")
        entry = uploaded if place == "chat" else of_knowledge(uploaded["file"])
        _, _, body = await ask(attached=[entry])
    texts = [part["text"] for _, part in parts(body, "input_text")]
    assert not [text[:40] for text in texts if text.startswith("<file ")]
    assert SOURCE in "".join(texts)


# Pictures


async def test_a_picture_of_a_question(ask: Asker) -> None:
    pixel = png()
    picture = await ask.attach("a.png", pixel, "image/png")
    assert not is_document(picture)
    turn, message, first = await ask("What is on it?", attached=[picture])
    assert pictures(first) == [(0, data_url(pixel, "image/png"))]
    _, _, second = await ask("And then?", after=turn)
    assert pictures(second) == pictures(first)
    assert dumped(second["input"][0]) == dumped(first["input"][0])
    assert "Not sent" not in told(message)
    _, message, blind = await ask("What is on it?", BLIND, attached=[picture])
    assert "input_image" not in dumped(blind)
    assert "a picture" in told(message)


def save_chat(client: WebUIClient, answer: str, model: str = MODEL) -> tuple[str, str]:
    """Save a chat of one question and this answer, as an import does; return their ids."""
    question_id, answer_id = str(uuid.uuid4()), str(uuid.uuid4())
    question = {
        "id": question_id, "parentId": None, "childrenIds": [answer_id], "role": "user",
        "content": "Draw something", "timestamp": 1, "models": [model],
    }  # fmt: skip
    answered = {
        "id": answer_id, "parentId": question_id, "childrenIds": [], "role": "assistant",
        "content": answer, "model": model, "timestamp": 2, "done": True,
    }  # fmt: skip
    chat = {
        "title": "Drawn",
        "models": [model],
        "history": {"currentId": answer_id, "messages": {question_id: question, answer_id: answered}},
        "messages": [question, answered],
    }
    return client.request("POST", "/api/v1/chats/new", {"chat": chat})["id"], answer_id


async def test_a_picture_that_an_answer_shows(host: Host, user_ask: Asker, ask: Asker) -> None:
    pixel = png()
    picture = await user_ask.attach("drawn.png", pixel, "image/png")
    path = f"/api/v1/files/{picture['id']}/content"
    expected = [(1, data_url(pixel, "image/png"))]
    for address in (path, host.server.url + path):
        chat_id, answer_id = save_chat(host.user, f"Here it is: ![a drawing]({address})")
        drawn = Turn(user_ask.tab, chat_id, answer_id, "")
        turn, _, first = await user_ask("What is on it?", after=drawn)
        assert pictures(first) == expected
        _, _, second = await user_ask("And then?", after=turn)
        assert pictures(second) == expected
        assert dumped(second["input"][: len(first["input"])]) == dumped(first["input"])
    with valves(host, IMAGE_INPUT_SELECTION="user_only"):
        _, message, body = await user_ask("What is on it?", after=drawn)
        assert not pictures(body)
        assert "Not sent" not in told(message)
    own = await ask.attach("drawn.png", pixel, "image/png")
    chat_id, answer_id = save_chat(host.admin, f"![x](/api/v1/files/{own['id']}/content)")
    _, message, body = await ask("What is on it?", BLIND, after=Turn(ask.tab, chat_id, answer_id, ""))
    assert "input_image" not in dumped(body)
    assert "Not sent" not in told(message)


async def test_a_picture_that_the_model_answers_with(user_ask: Asker, upstream: Upstream) -> None:
    pixel = png()
    picture = await user_ask.attach("answered.png", pixel, "image/png")
    upstream.next("plain", text=f"Look: ![x](/api/v1/files/{picture['id']}/content)")
    turn, message, _ = await user_ask("Draw")
    assert picture["id"] in message["content"]
    _, _, body = await user_ask("And?", after=turn)
    assert pictures(body) == [(1, data_url(pixel, "image/png"))]


# What is elsewhere


def named(client: WebUIClient, name: str) -> list[Json]:
    """This person's files of this name."""
    quoted = urllib.parse.quote(name)
    return client.request("GET", f"/api/v1/files/user/search?filename={quoted}")


def blocks_of(kind: str, address: str) -> list[Json]:
    """A question with something at an address, as content blocks."""
    part: Json = {"type": "image_url", "image_url": {"url": address}}
    if kind == "pdf":
        part = {"type": "file", "file": {"file_url": address}}
    return [{"type": "text", "text": f"What is it? {unique('')[1]}"}, part]


def media(body: Json) -> list[tuple[int, str]]:
    """Pictures and files of a request, each with the number of its question."""
    return [*pictures(body), *((number, part["file_data"]) for number, part in parts(body, "input_file"))]


async def ask_blocks(
    ask: Asker, upstream: Upstream, blocks: Sequence[Json], **fields: Any
) -> tuple[Turn, Json, Json]:
    """Ask with content blocks."""
    turn = await ask.tab.ask(list(blocks), MODEL, **fields)
    message = await turn.done()
    assert not error_text(message)
    return turn, message, upstream.last(blocks[0]["text"].rpartition(" ")[2])["body"]


@pytest.mark.parametrize(("kind", "mime"), [("png", "image/png"), ("pdf", "application/pdf")])
async def test_what_is_elsewhere_is_kept(
    host: Host, user_ask: Asker, upstream: Upstream, web: Web, kind: str, mime: str
) -> None:
    """Fetched once, kept with the person, and the chat goes on when the server is gone."""
    content = png() if kind == "png" else pdf(fact())
    name = f"remote-{uuid.uuid4().hex[:8]}.{kind}"
    address = web.serve(name, content, mime)
    with valves(host, ALLOW_HTTP_HOSTS=web.netloc):
        turn, message, first = await ask_blocks(user_ask, upstream, blocks_of(kind, address))
        assert media(first) == [(0, data_url(content, mime))]
        assert "Not sent" not in told(message)
        web.close()
        _, message, second = await user_ask("And then?", after=turn)
    assert web.hits == [f"/{name}"]
    assert dumped(second["input"][: len(first["input"])]) == dumped(first["input"])
    assert "Not sent" not in told(message)
    [kept] = named(host.user, name)
    assert kept["user_id"] == host.user.whoami()["id"]
    assert kept["meta"]["content_type"] == mime
    assert http(host.user, f"/api/v1/files/{kept['id']}/content") == content
    listed = host.user.request("GET", "/api/v1/files/?content=false")["items"]
    assert kept["id"] in [file["id"] for file in listed]


async def test_what_is_elsewhere_goes_with_its_kept_file(
    host: Host, user_ask: Asker, upstream: Upstream, web: Web
) -> None:
    """The person may delete what was kept; then it is fetched again, or missing."""
    name = f"remote-{uuid.uuid4().hex[:8]}.png"
    address = web.serve(name, png(), "image/png")
    with valves(host, ALLOW_HTTP_HOSTS=web.netloc):
        turn, _, _ = await ask_blocks(user_ask, upstream, blocks_of("png", address))
        [kept] = named(host.user, name)
        host.user.request("DELETE", f"/api/v1/files/{kept['id']}")
        web.close()
        _, message, body = await user_ask("And then?", after=turn)
    assert not media(body)
    assert f"Not sent to the model: {name}. The file could not be downloaded" in told(message)


async def test_nobody_else_sees_what_was_kept(
    host: Host, user_ask: Asker, ask: Asker, upstream: Upstream, web: Web
) -> None:
    """Each person has a file of their own."""
    name = f"remote-{uuid.uuid4().hex[:8]}.png"
    address = web.serve(name, png(), "image/png")
    with valves(host, ALLOW_HTTP_HOSTS=web.netloc):
        await ask_blocks(ask, upstream, blocks_of("png", address))
        [kept] = named(host.admin, name)
        with pytest.raises(WebUIError, match=r"could not find|not found"):
            host.user.request("GET", f"/api/v1/files/{kept['id']}")
        await ask_blocks(user_ask, upstream, blocks_of("png", address))
    assert len(web.hits) == 2
    assert kept["id"] not in [file["id"] for file in named(host.user, name)]


async def test_two_questions_at_once(host: Host, user_ask: Asker, upstream: Upstream, web: Web) -> None:
    """Both are answered, one file is kept, and nobody reads of an error."""
    pixel = png()
    name = f"remote-{uuid.uuid4().hex[:8]}.png"
    address = web.serve(name, pixel, "image/png")
    web.gate.clear()
    questions = [blocks_of("png", address) for _ in range(2)]
    errors = host.log.count("Error inserting a new file")
    with valves(host, ALLOW_HTTP_HOSTS=web.netloc):
        turns = [await user_ask.tab.ask(blocks, MODEL) for blocks in questions]
        await until(lambda: web.hits, "the download")
        web.gate.set()
        messages = [await turn.done() for turn in turns]
    assert "Not sent" not in " ".join(map(told, messages))
    for blocks in questions:
        body = upstream.last(blocks[0]["text"].rpartition(" ")[2])["body"]
        assert media(body) == [(0, data_url(pixel, "image/png"))]
    assert len(named(host.user, name)) == 1
    assert host.log.count("Error inserting a new file") == errors


async def test_a_name_that_means_mischief(host: Host, user_ask: Asker, upstream: Upstream, web: Web) -> None:
    """What an address calls a file is no path and no header."""
    name = f"..%2F..%2F{uuid.uuid4().hex[:8]}%22%0D%0AX-Evil:%201%0D%0A.png"
    pixel = png()
    address = web.serve(name, pixel, "image/png")
    with valves(host, ALLOW_HTTP_HOSTS=web.netloc):
        _, _, body = await ask_blocks(user_ask, upstream, blocks_of("png", address))
    assert media(body) == [(0, data_url(pixel, "image/png"))]
    newest = max(host.user.request("GET", "/api/v1/files/user/search"), key=lambda file: file["created_at"])
    assert http(host.user, f"/api/v1/files/{newest['id']}/content") == pixel
    assert not set("\r\n/\\") & set(newest["filename"])


@pytest.mark.parametrize("kind", ["png", "pdf"])
async def test_what_is_elsewhere_is_refused(
    host: Host, user_ask: Asker, upstream: Upstream, web: Web, kind: str
) -> None:
    address = web.serve(f"inside.{kind}", png() if kind == "png" else pdf(fact()), "")
    turn, message, body = await ask_blocks(user_ask, upstream, blocks_of(kind, address))
    assert not media(body)
    assert f"Not sent to the model: inside.{kind}. The file was not downloaded" in told(message)
    assert any("was not downloaded" in note["content"] for note in turn.data("notification"))
    assert not web.hits
    assert not named(host.user, f"inside.{kind}")


@pytest.mark.parametrize("how", ["not kept", "a temporary chat"])
async def test_nothing_is_kept(host: Host, user_ask: Asker, upstream: Upstream, web: Web, how: str) -> None:
    pixel = png()
    name = f"remote-{uuid.uuid4().hex[:8]}.png"
    address = web.serve(name, pixel, "image/png")
    blocks = blocks_of("png", address)
    keeps = how != "not kept"
    fields: Json = {"messages": [{"role": "user", "content": blocks}]}
    fields["chat_id"] = f"temporary:{user_ask.tab.socket.get_sid()}"
    before = host.user.request("GET", "/api/v1/files/user/count")
    with valves(host, ALLOW_HTTP_HOSTS=web.netloc, SAVE_REMOTE_MEDIA=keeps):
        await user_ask.tab.ask(blocks, MODEL, **(fields if keeps else {}))
        await until(lambda: upstream.asked(blocks[0]["text"].rpartition(" ")[2]), "the request")
    body = upstream.last(blocks[0]["text"].rpartition(" ")[2])["body"]
    assert media(body) == [(0, data_url(pixel, "image/png"))]
    assert host.user.request("GET", "/api/v1/files/user/count") == before
    assert not named(host.user, name)


async def test_who_waits_for_a_file_is_told(
    host: Host, user_ask: Asker, upstream: Upstream, web: Web
) -> None:
    address = web.serve("slow.png", png(), "image/png")
    web.gate.clear()

    def statuses(turn: Turn) -> list[Json]:
        return [data for data in turn.data("status") if "the files of this chat" in data["description"]]

    blocks = blocks_of("png", address)
    with valves(host, ALLOW_HTTP_HOSTS=web.netloc):
        turn = await user_ask.tab.ask(blocks, MODEL)
        await turn.wait(statuses, "words for who waits")
        assert not upstream.asked(blocks[0]["text"].rpartition(" ")[2])
        web.gate.set()
        message = await turn.done()
    assert [(data["description"].split()[0], data["done"]) for data in statuses(turn)] == [
        ("Fetching", False),
        ("Fetched", True),
    ]
    assert "Fetching" not in message["statusHistory"][-1]["description"]


async def test_stop_while_a_file_is_fetched(
    host: Host, user_ask: Asker, upstream: Upstream, web: Web
) -> None:
    address = web.serve("stopped.png", png(), "image/png")
    web.gate.clear()
    blocks = blocks_of("png", address)
    with valves(host, ALLOW_HTTP_HOSTS=web.netloc):
        turn = await user_ask.tab.ask(blocks, MODEL)
        await until(lambda: web.hits, "the download")
        await turn.stop()
        await turn.done()
        web.gate.set()
    assert not upstream.asked(blocks[0]["text"].rpartition(" ")[2])


# What must not be lost without a word


LOST: Final[dict[str, Any]] = {
    # as the page sends what is attached in a temporary chat: it reads the files itself
    "a PDF of a temporary chat": lambda word: {
        "type": "text", "file": "", "id": str(uuid.uuid4()), "url": "", "name": "report.pdf",
        "collection_name": "", "status": "uploaded", "size": 99, "error": "", "content": f"It is {word}.",
    },
    # and a page of the web
    "a page of the web": lambda word: {
        "type": "text", "name": "https://example.com/", "collection_name": "web-1", "status": "uploaded",
        "context": "full", "url": "https://example.com/", "error": "",
        "file": {"data": {"content": f"It is {word}."}, "meta": {"name": "https://example.com/"}},
    },
}  # fmt: skip


@pytest.mark.parametrize("what", LOST)
async def test_a_text_that_the_page_has_read(host: Host, ask: Asker, what: str) -> None:
    """With the capability as the pipe publishes it: the text reaches the model, or the person is told."""
    word = fact()
    entry = LOST[what](word)
    with capabilities(host, file_context=False), valves(host, NATIVE_FILES="supported"):
        _, message, body = await ask(attached=[entry])
    assert word in dumped(body) or entry["name"] in told(message)


async def test_a_knowledge_base_that_nobody_looks_into(host: Host, user_ask: Asker) -> None:
    """The same of a whole knowledge base: a tool can look into it, or the person is told."""
    form = {"name": "Atlases", "description": "", "access_grants": [READ_BY_EVERYONE]}
    base = host.admin.request("POST", "/api/v1/knowledge/create", form)
    entry = {**base, "type": "collection", "status": "processed"}
    with capabilities(host, file_context=False), valves(host, NATIVE_FILES="supported"):
        _, message, body = await user_ask(attached=[entry])
    assert "query_knowledge_files" in dumped(body.get("tools")) or "Atlases" in told(message)


# Who asks


def identity(record: Json) -> Json:
    """What a request says of who asks."""
    return {name: text for name, text in record["headers"].items() if name.startswith("x-openwebui-")}


async def test_who_asks_is_told_where_the_server_forwards_it(
    ask: Asker, upstream: Upstream, second_host: Host
) -> None:
    question, word = unique("Hello")
    async with Tab.open(second_host.admin) as tab:
        turn = await tab.ask(question, MODEL)
        assert not error_text(await turn.done())
    assert identity(upstream.last(word)) == {
        "x-openwebui-user-id": second_host.admin.whoami()["id"],
        "x-openwebui-user-email": "agnes@example.com",
        "x-openwebui-user-role": "admin",
        "x-openwebui-user-name": urllib.parse.quote("Ägnes Ådmin", safe=" "),
        "x-openwebui-auth-type": "jwt",
        "x-openwebui-chat-id": turn.chat_id,
    }
    question, word = unique("Hello")
    second_host.admin.complete(MODEL, question)
    assert "x-openwebui-user-id" in identity(upstream.last(word))
    assert "x-openwebui-chat-id" not in identity(upstream.last(word))
    question, word = unique("Hello")
    await (await ask.tab.ask(question, MODEL)).done()
    assert not identity(upstream.last(word))


BRIEF: Final = "Be brief."
SYSTEM: Final[dict[str, Json]] = {
    "none": {},
    "of the person": {"messages": [{"role": "system", "content": BRIEF}]},
    # as the page sends that of a chat: twice
    "of the chat": {"messages": [{"role": "system", "content": BRIEF}], "params": {"system": BRIEF}},
    "of the model": {},
}


@pytest.mark.parametrize("whose", SYSTEM)
async def test_passages_in_the_system_prompt(upstream: Upstream, second_host: Host, whose: str) -> None:
    admin, fields = second_host.admin, SYSTEM[whose]
    word = fact()
    report = a_pdf(admin, word)
    letter = attach(admin, "letter.docx", docx(f"The word is {word}."), WORD_MIME)
    system = {"system": BRIEF} if whose == "of the model" else {}
    with parameters(second_host, **system):
        async with Tab.open(admin) as tab:
            asker = Asker(tab, upstream)
            turn, _, first = await asker(attached=[report], **fields)
            _, _, second = await asker("And then?", after=turn, **fields)
            _, _, left = await asker(attached=[letter], **fields)
    assert word in left["instructions"]
    for body in (first, second):
        assert [number for number, _ in parts(body, "input_file")] == [0]
        assert word not in dumped(body)
        assert (body.get("instructions") or "").strip() == ("" if whose == "none" else BRIEF)


# What the host is told of the models


async def test_no_search_where_files_go_whole(host: Host) -> None:
    reads = {
        f"{FUNCTION_ID}.{row['id']}"
        for row in CATALOG
        if "file" in row["architecture"]["input_modalities"] and "tools" in row["supported_parameters"]
    }
    try:
        rows = await publish(host, SYNC_MODEL_METADATA="all", NATIVE_FILES="supported")
        unsearched = {row_id for row_id, row in ours(rows).items() if can(row).get("file_context") is False}
        assert unsearched == reads
        rows = await publish(host, NATIVE_FILES=None)
        assert not [row_id for row_id, row in ours(rows).items() if "file_context" in can(row)]
    finally:
        host.admin.set_valves({"SYNC_MODEL_METADATA": "off", "NATIVE_FILES": None})
        await settle(host, lambda rows: not any(map(is_marked, ours(rows).values())), "rows taken back")


# The page


async def test_the_page(host: Host, folder: Path, upstream: Upstream) -> None:
    """A PDF and a picture by the page's own button: what it sends is what these tests send."""
    pixel, report, word = png(), pdf("The word is tuff."), unique("")[1]
    chosen = [
        {"name": "Ätna report.pdf", "mimeType": "application/pdf", "buffer": report},
        {"name": "crater.png", "mimeType": "image/png", "buffer": pixel},
    ]
    with capabilities(host, file_context=False), valves(host, NATIVE_FILES="supported"):
        async with ChatPage.open(host.admin, folder / "screenshots") as chat:
            await chat.new_chat(MODEL)
            await chat.page.locator("input[type=file]").first.set_input_files(chosen)  # pyright: ignore[reportArgumentType]
            button = chat.page.get_by_role("button", name="Ätna report.pdf")
            await expect(button.first).to_be_visible()
            await chat.screenshot("media-attached")
            async with chat.page.expect_request("**/api/chat/completions") as asked:
                await chat.ask(f"What do they say? {word}")
            await chat.finished()
            await chat.screenshot("media-answered")
            body = json.loads((await asked.value).post_data or "{}")
            await chat.ask("And then?")
            await until(lambda: upstream.asked("And then?"), "the second question")
            await chat.finished()
            await chat.reload()
            await expect(chat.page.get_by_text("Ätna report.pdf").first).to_be_visible()
            await chat.screenshot("media-reloaded")
    ours_ = attach(host.admin, "Ätna report.pdf", report, "application/pdf")
    [theirs_] = body["files"]
    assert theirs_.keys() == ours_.keys()
    assert (theirs_["type"], theirs_["url"]) == (ours_["type"], theirs_["id"])
    assert [file["name"] for file in body["user_message"]["files"]] == ["Ätna report.pdf", "crater.png"]
    records = [record for record in upstream.asked(word) if record["scenario"] != "task"]
    sent, later = (record["body"] for record in records)
    assert [part for _, part in parts(sent, "input_file")] == [file_part("Ätna report.pdf", report)]
    assert pictures(sent) == [(0, data_url(pixel, "image/png"))]
    assert dumped(later["input"][0]) == dumped(sent["input"][0])
