"""The host seam: which Open WebUI this is, and whether it will do."""

from __future__ import annotations

import asyncio
import base64
import importlib
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import pytest

from openrouter_responses_pipe.openrouter_responses_pipe import (
    ChatRequest,
    ConfigurationError,
    HostCall,
    InputError,
    MediaBlob,
    ModelRow,
    OpenWebUIHost,
    PayloadTooLargeError,
)
from pytest_bootstrap import ChatMessage, HostFiles, HostModels, host_database, host_models
from tests.engines import host_engine
from tests.media import OWNER, PNG, add, on_disk
from tests.support import arguments, call, hostile, read_request, running_pipe


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
async def chats(sqlite_url: str) -> AsyncIterator[None]:
    """The host's table of messages, in a real SQLite database."""
    async with host_engine(sqlite_url) as engine:
        host_database.use(engine)
        await host_database.create(ChatMessage)
        yield
        host_database.reset()


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


# Files of ours, and who is alone


@pytest.fixture
def data_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The host's data folder."""
    monkeypatch.setattr("open_webui.env.DATA_DIR", tmp_path, raising=False)
    return tmp_path


def test_files_lie_in_a_folder_of_their_own(data_dir: Path) -> None:
    assert OpenWebUIHost().data_folder() == data_dir / "openrouter_responses_pipe"
    assert OpenWebUIHost(None).data_folder() is None
    assert list(data_dir.iterdir()) == []


def test_a_host_that_names_no_data_folder() -> None:
    assert OpenWebUIHost().data_folder() is None


def test_only_one_does_the_same_at_a_time(data_dir: Path) -> None:
    with OpenWebUIHost().only_one("models-f") as first:
        with OpenWebUIHost().only_one("models-f") as second, OpenWebUIHost().only_one("models-g") as other:
            assert (first, second, other) == (True, False, True)
        with OpenWebUIHost().only_one("models-f") as third:  # the second's end has not let anybody in
            assert not third
    with OpenWebUIHost().only_one("models-f") as again:
        assert again


def test_who_fails_is_no_longer_alone(data_dir: Path) -> None:
    with pytest.raises(ValueError, match="broken"), OpenWebUIHost().only_one("models-f"):
        raise ValueError("broken")
    with OpenWebUIHost().only_one("models-f") as again:
        assert again


def test_without_a_folder_everybody_goes_on(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No host, no folder named, or one that cannot be made."""
    (data_dir / "file").touch()
    for host in (OpenWebUIHost(None), OpenWebUIHost()):
        with host.only_one("models-f") as first:
            assert first
    monkeypatch.setattr("open_webui.env.DATA_DIR", data_dir / "file")
    for _ in range(2):
        with OpenWebUIHost().only_one("models-f") as first, OpenWebUIHost().only_one("models-f") as second:
            assert (first, second) == (True, True)


# Model rows


@pytest.fixture
def table() -> Iterator[HostModels]:
    """The host's table of models, empty, and an administrator."""
    host_models.reset(admin_id="admin")
    yield host_models
    host_models.reset()


EVERYONE: Final = frozenset({("user", "*", "read")})
FULL: Final = ModelRow(
    "f.acme/one:free",
    "Acme: One",
    {
        "description": "Small.",
        "capabilities": {"vision": False},
        "tags": [{"name": "Acme"}],
        "ours": {"a": [1]},
    },
    {"temperature": 0.5},
    frozenset({("group", "g", "write"), *EVERYONE}),
    is_active=False,
)


def stated(row: ModelRow | None) -> ModelRow | None:
    """A row without the fields that the host fills with None."""
    kept = {name: value for name, value in row.meta.items() if value is not None} if row else {}
    return row and row._replace(meta=kept)


@pytest.mark.parametrize("row", [FULL, ModelRow("f.acme/one", "One")], ids=["full", "bare"])
async def test_a_row_comes_back_as_it_was_written(row: ModelRow, table: HostModels) -> None:
    host = OpenWebUIHost()
    assert await host.model_row(row.id) is None
    assert await host.insert_model_row(row)
    assert stated(await host.model_row(row.id)) == row
    assert [stated(found) for found in await host.model_rows("f.")] == [row]
    assert table.rows[row.id]["user_id"] == "admin"
    assert table.rows[row.id]["base_model_id"] is None


async def test_only_rows_with_the_prefix_are_listed(table: HostModels) -> None:
    host = OpenWebUIHost()
    for row_id in ("f.acme/one", "f.acme/two", "ff.acme/one", "F.acme/one", "g.f.acme/one"):
        await host.insert_model_row(ModelRow(row_id, "One"))
    table.rows["f.acme/two"]["base_model_id"] = "g.acme/one"  # a model of the workspace
    assert [row.id for row in await host.model_rows("f.")] == ["f.acme/one"]


async def test_without_an_administrator_no_row_is_added(table: HostModels) -> None:
    table.reset()
    assert not await OpenWebUIHost().insert_model_row(FULL)
    assert table.writes == []


@pytest.mark.parametrize("grants_too", [False, True])
async def test_grants_are_written_where_they_change(grants_too: bool, table: HostModels) -> None:
    host = OpenWebUIHost()
    await host.insert_model_row(FULL)
    changed = FULL._replace(
        name="Uno", meta={"description": "Large."}, params={}, grants=EVERYONE, is_active=True
    )
    assert await host.update_model_row(changed, grants_too=grants_too)
    grants = EVERYONE if grants_too else FULL.grants
    assert stated(await host.model_row(FULL.id)) == changed._replace(grants=grants)


async def test_a_row_that_is_gone_cannot_be_updated(table: HostModels) -> None:
    assert not await OpenWebUIHost().update_model_row(FULL, grants_too=False)
    assert table.rows == {}


async def test_a_row_is_removed(table: HostModels) -> None:
    host = OpenWebUIHost()
    await host.insert_model_row(FULL)
    await host.insert_model_row(FULL._replace(id="f.other"))
    assert await host.delete_model_row(FULL.id)
    assert [*table.rows] == ["f.other"]


async def test_a_write_that_fails_says_so(table: HostModels) -> None:
    async def fail(what: str, row_id: str) -> None:
        raise ConnectionError

    host = OpenWebUIHost()
    await host.insert_model_row(FULL)
    table.hook = fail
    writes = (
        host.model_rows("f."),
        host.insert_model_row(FULL._replace(id="f.new")),
        host.update_model_row(FULL, grants_too=False),
        host.delete_model_row(FULL.id),
    )
    for write in writes:
        with pytest.raises(ConnectionError):
            await write


async def test_what_lets_administrators_see_a_row(table: HostModels, monkeypatch: pytest.MonkeyPatch) -> None:
    host = OpenWebUIHost()
    assert await host.admin_grants() == frozenset()
    monkeypatch.setattr("open_webui.config.BYPASS_ADMIN_ACCESS_CONTROL", False)
    assert await host.admin_grants() == {("user", "admin", "read")}
    table.reset()
    assert await host.admin_grants() == frozenset()


# Files of people


async def test_a_file_by_its_address_or_id(files: HostFiles) -> None:
    file_id, address = add(files, PNG, "a.png")
    for form in (file_id, address, f"{address}?x=1"):
        blob = await OpenWebUIHost().inline_file(form, OWNER, 1_000)
        assert blob.url == f"data:image/png;base64,{base64.b64encode(PNG).decode()}"


@pytest.mark.parametrize(
    ("user_id", "most", "kind"), [("other", 1_000, InputError), (OWNER, 5, PayloadTooLargeError)]
)
async def test_a_file_that_is_not_handed_out(
    user_id: str, most: int, kind: type[InputError], files: HostFiles
) -> None:
    _, address = add(files, PNG)
    with pytest.raises(kind):
        await OpenWebUIHost().inline_file(address, user_id, most)
    with pytest.raises(InputError):
        await OpenWebUIHost(None).inline_file(address, OWNER, 1_000)


ASKING: Final = ChatRequest(
    body={}, dialect="browser", model="a/b", user_id=OWNER, chat_id="chat", message_id="message"
)


async def test_a_file_that_is_kept_comes_back(files: HostFiles) -> None:
    blob = MediaBlob("data:image/png;base64,", "../../a b/ü.png", "image/png", len(PNG))
    await OpenWebUIHost().save_file("id-1", blob, PNG, ASKING)
    row = files.rows["id-1"]
    assert (row.user_id, row.filename, on_disk(row)) == (OWNER, "../../a b/ü.png", PNG)
    assert row.meta == {"name": "../../a b/ü.png", "content_type": "image/png", "size": len(PNG)}
    assert Path(row.path).parent == files.folder
    found = await OpenWebUIHost().inline_file("id-1", OWNER, 1_000)
    assert found == blob._replace(url=f"data:image/png;base64,{base64.b64encode(PNG).decode()}")
    await OpenWebUIHost(None).save_file("id-2", blob, PNG, ASKING)
    assert [*files.rows] == ["id-1"]


# Where files were attached


def message(parent: str | None, role: str, content: Any, *file_ids: Any) -> dict[str, Any]:
    found = [{"type": "file", "id": file_id} for file_id in file_ids]
    return {"parentId": parent, "role": role, "content": content, "files": found}


BRANCHES: Final = {
    "a": message(None, "user", "one", "f", "g"),
    "b": message("a", "assistant", "ok", "made"),
    "c": message("b", "user", "two"),
    "other": message("b", "user", "another branch", "x"),
    "d": message("c", "assistant", "ok"),
    "e": message("d", "user", "three", "h", None, ["i"]),
}


@pytest.mark.parametrize(
    ("question_id", "texts"),
    [
        ("e", ["one", "two", "three"]),
        ("c", ["one", "two"]),
        ("other", ["one", "another branch"]),
        ("?", []),
        ("", []),
    ],
)
async def test_the_questions_of_a_branch(question_id: str, texts: list[str], files: HostFiles) -> None:
    files.messages["chat"] = BRANCHES
    found = await OpenWebUIHost().questions("chat", question_id)
    assert [text for text, _ in found] == texts
    if texts:
        assert found[0][1] == {"f", "g"}
    assert all({"made", "x"}.isdisjoint(ids) for text, ids in found if text != "another branch")


@pytest.mark.parametrize("chat_id", ["", "unknown", "temporary:x"])
async def test_a_chat_that_nobody_knows_has_no_questions(chat_id: str, files: HostFiles) -> None:
    files.messages["chat"] = BRANCHES
    assert await OpenWebUIHost().questions(chat_id, "e") == []
    assert await OpenWebUIHost(None).questions("chat", "e") == []


@pytest.mark.parametrize(
    "messages",
    [
        {"e": message("e", "user", "x", "f")},
        {"e": message("d", "user", "x", "f"), "d": message("e", "user", "y")},
        {"e": None},
        {"e": message(5, "user", ["x"])},  # type: ignore[arg-type]
        {"e": {"role": ["user"], "files": "f", "parentId": {}}},
        {},
    ],
)
async def test_chats_that_are_damaged(messages: Any, files: HostFiles) -> None:
    files.messages["chat"] = messages
    found = await OpenWebUIHost().questions("chat", "e")
    assert all(isinstance(text, str) for text, _ in found)


async def test_a_chat_that_does_not_come_is_not_waited_for(
    files: HostFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    began = asyncio.Event()

    async def hang(what: str, row_id: str) -> None:
        began.set()
        await asyncio.Event().wait()

    files.hook = hang
    asking = asyncio.create_task(OpenWebUIHost().questions("chat", "e"))
    await began.wait()
    loop = asyncio.get_running_loop()
    now = loop.time
    monkeypatch.setattr(loop, "time", lambda: now() + 3_600)
    assert await asking == []


# Who asks


PERSON: Final = {"id": "user-1", "name": " Zoë\r\nX-Evil: 1 ", "email": "zoe@example.org\n", "role": "user"}


async def headers(person: Any = PERSON, host_request: Any = None, **changes: Any) -> dict[str, str]:
    fields: dict[str, Any] = {
        "user_id": "user-1",
        "chat_id": "chat-1",
        "user": person,
        "host": HostCall(request=host_request),
    }
    request = ChatRequest(body={}, dialect="browser", model="a/b", **fields | changes)
    return await OpenWebUIHost().identity_headers(request)


@pytest.fixture
def forwarding(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host that tells others who asks."""
    monkeypatch.setattr("open_webui.env.ENABLE_FORWARD_USER_INFO_HEADERS", True)


async def test_nobody_is_told_who_asks_unless_the_host_says_so() -> None:
    assert await headers() == {}


@pytest.mark.usefixtures("forwarding")
async def test_who_asks() -> None:
    found = await headers(host_request=SimpleNamespace(state=SimpleNamespace(auth_type="api_key")))
    assert found == {
        "X-OpenWebUI-Auth-Type": "api_key",
        "X-OpenWebUI-User-Name": "Zo%C3%AB%0D%0AX-Evil%3A 1",
        "X-OpenWebUI-User-Id": "user-1",
        "X-OpenWebUI-User-Email": "zoe@example.org",
        "X-OpenWebUI-User-Role": "user",
        "X-OpenWebUI-Chat-Id": "chat-1",
    }
    assert await headers(user_id="") == {}
    assert "X-OpenWebUI-Chat-Id" not in await headers(chat_id="")


@pytest.mark.usefixtures("forwarding")
@pytest.mark.parametrize(
    "person", [{}, {"id": None, "name": 5, "email": ["x"], "role": {}}, {"name": "\x00ü\x7f"}]
)
async def test_people_of_whom_little_is_known(person: Any) -> None:
    found = await headers(person)
    assert all(text and text.isascii() and text.isprintable() for text in found.values())
    assert found["X-OpenWebUI-Chat-Id"] == "chat-1"


@pytest.mark.usefixtures("forwarding")
async def test_an_older_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not ask for the request, and its values are as they are."""

    def include(found: dict[str, str], user: Any) -> dict[str, str]:
        return {**found, "X-OpenWebUI-User-Name": user.name, "X-OpenWebUI-User-Email": user.email}

    monkeypatch.setattr("open_webui.utils.headers.include_user_info_headers", include)
    assert await headers() == {
        "X-OpenWebUI-User-Name": "ZoX-Evil: 1",
        "X-OpenWebUI-User-Email": "zoe@example.org",
        "X-OpenWebUI-Chat-Id": "chat-1",
    }


@pytest.mark.usefixtures("forwarding")
async def test_headers_that_cannot_be_made_spoil_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def include(found: dict[str, str], user: Any, request: Any = None) -> dict[str, str]:
        raise AttributeError("groups")

    monkeypatch.setattr("open_webui.utils.headers.include_user_info_headers", include)
    assert "X-OpenWebUI-User-Name" not in await headers()


@pytest.mark.parametrize("forwards", [False, True])
async def test_who_asks_over_the_pipe(forwards: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the upstream sees, catalog aside, of a name that would be a header of its own."""
    seen: list[dict[str, str]] = []

    async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        line, found, _ = await read_request(reader)
        if line.startswith("POST"):
            seen.append({name: text for name, text in found.items() if name.startswith("x-openwebui-")})
        writer.write(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}")
        await writer.drain()

    monkeypatch.setattr("open_webui.env.ENABLE_FORWARD_USER_INFO_HEADERS", forwards)
    given = arguments("hello")
    given["__user__"]["name"] = "Zoë\r\nAuthorization: Bearer x"
    given["__request__"] = SimpleNamespace(state=SimpleNamespace(auth_type="jwt"))
    async with hostile(listen) as base_url, running_pipe(base_url) as pipe:
        await call(pipe, given)
    named = {
        "x-openwebui-auth-type": "jwt",
        "x-openwebui-user-name": "Zo%C3%AB%0D%0AAuthorization%3A Bearer x",
        "x-openwebui-user-id": "user",
        "x-openwebui-user-email": "u@example.org",
        "x-openwebui-user-role": "user",
        "x-openwebui-chat-id": "chat",
    }
    assert seen
    assert all(found == (named if forwards else {}) for found in seen)
