"""Stands in for Open WebUI where it is not installed, and takes the waiting out of tenacity.

Only what the module's host seam (floor 7) asks for is here, and everything answers "nothing there";
its table of models (`host_models`) keeps what is written, once a test has named an administrator, its
files (`host_files`), once a test has named a folder, and its database is the one that a test names
(`host_database`); of the functions (`host_functions`) there are those that a test names, and Redis
(`host_redis`) is a real one.
Nothing of this project is replaced. The real host is met in `tests/e2e`.

`tests/conftest.py` imports this file; importing it again changes nothing, and where the real
`open_webui` can be imported, the real one is left in place.
"""

from __future__ import annotations

import importlib.util
import inspect
import io
import json
import shutil
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from copy import deepcopy
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from urllib.parse import quote

import tenacity
from pydantic import BaseModel, Field, model_validator
from redis import asyncio as redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from sqlalchemy import JSON
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.pool import NullPool

HOST_VERSION = "0.12.4"

# module → object → its async methods, each of which answers None
TABLES: dict[str, dict[str, tuple[str, ...]]] = {
    "models.chats": {
        "Chats": ("get_chat_by_id", "get_message_by_id_and_message_id", "update_chat_title_by_id")
    },
    "models.config": {"Config": ("get",)},
    "models.files": {"Files": ("update_file_metadata_by_id",)},
    "models.functions": {"Functions": ("get_function_by_id", "get_function_valves_by_id")},
}
FUNCTIONS: dict[str, tuple[str, ...]] = {
    "routers.images": ("upload_image",),
    "utils.files": ("get_image_url_from_base64",),
    "utils.access_control": ("has_access",),
    "utils.tool_search": ("resolve_tool_call",),
    "utils.models": ("check_model_access",),
}


def _answers_none(name: str) -> Callable[..., Awaitable[None]]:
    async def stub(*_args: object, **_named: object) -> None:
        return None

    stub.__name__ = name
    return stub


def _module(path: str) -> ModuleType:
    """The stub module `open_webui.<path>`, made with its parents when it is not there yet."""
    name = f"open_webui.{path}" if path else "open_webui"
    if name not in sys.modules:
        module = ModuleType(name)
        module.__path__ = []  # a package: what is not stubbed is a ModuleNotFoundError
        sys.modules[name] = module
        parent, _, last = path.rpartition(".")
        if path:
            setattr(_module(parent), last, module)
    return sys.modules[name]


def _fill(module: ModuleType, members: Iterable[tuple[str, object]]) -> None:
    for name, member in members:
        setattr(module, name, member)


class HostBase(DeclarativeBase):
    """The tables that are asked for with SQL; a test that wants them creates them."""


class ChatMessage(HostBase):
    """`chat_message`, as far as it is read."""

    __tablename__ = "chat_message"
    id: Mapped[str] = mapped_column(primary_key=True)
    chat_id: Mapped[str]
    usage: Mapped[dict[str, object] | None] = mapped_column(JSON)


class Chat(HostBase):
    """`chat`, as far as it is read."""

    __tablename__ = "chat"
    id: Mapped[str] = mapped_column(primary_key=True)
    user_id: Mapped[str | None]


class HostDatabase:
    """The host's engine and its sessions: one SQLite database in memory, which lives as long as somebody is
    connected, until a test puts another in its place.
    """

    def __init__(self) -> None:
        address = "sqlite+aiosqlite:///file:host?mode=memory&cache=shared&uri=true"
        self._own = create_async_engine(address, poolclass=NullPool)
        self._sessions = self._sessions_of(self._own, None)

    @staticmethod
    def _sessions_of(engine: AsyncEngine, schema: str | None) -> async_sessionmaker[AsyncSession]:
        tables: dict[str, Any] = {"schema_translate_map": {None: schema}} if schema else {}
        bind = engine.execution_options(**tables)
        return async_sessionmaker(bind=bind, autoflush=False, expire_on_commit=False)

    def use(self, engine: AsyncEngine, schema: str | None = None) -> None:
        """Make this the host's engine, with the host's tables in this schema of it (PostgreSQL)."""
        self._sessions = self._sessions_of(engine, schema)
        names = {"async_engine": engine, "AsyncSessionLocal": self._sessions}
        _fill(_module("internal.db"), names.items())
        _fill(_module("env"), [("DATABASE_SCHEMA", schema)])

    def reset(self) -> None:
        """Go back to the database in memory, which nobody can make tables in that stay: no engine."""
        self.use(self._own)
        _fill(_module("internal.db"), [("async_engine", None)])

    async def create(self, *tables: type[HostBase]) -> None:
        """Create these tables of the host."""
        async with self._sessions() as session:
            connection = await session.connection()
            wanted = [HostBase.metadata.tables[table.__tablename__] for table in tables]
            await connection.run_sync(HostBase.metadata.create_all, wanted)
            await session.commit()

    @asynccontextmanager
    async def session(self, db: AsyncSession | None = None) -> AsyncIterator[AsyncSession]:
        """A session of the engine in use (`get_async_db_context`)."""
        if db is not None:
            yield db
            return
        async with self._sessions() as session:
            yield session


host_database = HostDatabase()


def _stub_database() -> None:
    host_database.reset()
    _fill(_module("internal.db"), [("get_async_db_context", host_database.session)])


class HostRedis:
    """Open WebUI 0.12's connections to Redis: real clients, one for each address and kind, kept for ever."""

    def __init__(self) -> None:
        self._clients: dict[tuple[object, ...], Any] = {}

    def get_redis_connection(
        self,
        redis_url: str | None,
        redis_sentinels: list[tuple[str, int]] | None = None,
        redis_cluster: bool = False,
        async_mode: bool = False,
        decode_responses: bool = True,
    ) -> Any | None:
        """The client of one server. Sentinels and clusters, and clients that block, are not for tests."""
        if redis_sentinels or redis_cluster or not async_mode:
            raise NotImplementedError("only asynchronous clients of one server are stubbed")
        if not redis_url:
            return None
        key = (redis_url, decode_responses)
        if key not in self._clients:
            # as there: again once, when the server has closed a connection of the pool
            retry = Retry(NoBackoff(), 1, supported_errors=(redis.ConnectionError,))
            self._clients[key] = redis.Redis.from_url(
                redis_url, decode_responses=decode_responses, retry=retry
            )
        return self._clients[key]

    async def aclose(self) -> None:
        """Close and forget every client."""
        clients, self._clients = self._clients, {}
        for client in clients.values():
            await client.aclose()


def _sentinels_from_env(hosts_csv: str | None, port: str | int | None) -> list[tuple[str, int]]:
    hosts = [host.strip() for host in (hosts_csv or "").split(",")]
    return [(host, int(port or 26379)) for host in hosts if host]


host_redis = HostRedis()


def _stub_redis() -> None:
    members = {
        "get_redis_connection": host_redis.get_redis_connection,
        "get_sentinels_from_env": _sentinels_from_env,
    }
    _fill(_module("utils.redis"), members.items())


class HostFunctions:
    """The host's functions: those that a test has named in `active`, each switched on or off."""

    def __init__(self) -> None:
        self.active: dict[str, bool] = {}
        self.content: dict[str, str] = {}  # their code, where it matters

    def reset(self) -> None:
        """Forget them."""
        self.active.clear()
        self.content.clear()

    async def get_function_by_id(self, id: str, db: object = None) -> SimpleNamespace | None:
        """The row of a function, or None."""
        if id not in self.active:
            return None
        return SimpleNamespace(id=id, is_active=self.active[id], content=self.content.get(id, ""))


host_functions = HostFunctions()


def _stub_functions() -> None:
    _module("models.functions").Functions.get_function_by_id = host_functions.get_function_by_id


class ModelParams(BaseModel, extra="allow"):
    """What a model is asked with."""


class ModelMeta(BaseModel, extra="allow"):
    """What is said of a model; of a tag only its name is kept."""

    profile_image_url: str | None = None
    background_image_url: str | None = None
    description: str | None = None
    i18n: dict[str, Any] | None = None
    capabilities: dict[str, Any] | None = None
    knowledge: list[Any] | None = None
    voice: Any = None
    voice_avatar: Any = None

    @model_validator(mode="before")
    @classmethod
    def plain_tags(cls, data: dict[str, Any]) -> dict[str, Any]:
        names = [tag["name"].strip() for tag in data.get("tags") or []]
        return {**data, "tags": [{"name": name} for name in names if name]} if "tags" in data else data


class ModelForm(BaseModel):
    """A row of the model table, as it is handed in."""

    id: str = Field(pattern=r"^\S+$")
    base_model_id: str | None = None
    name: str
    meta: ModelMeta
    params: ModelParams
    access_grants: list[dict[str, Any]] | None = None
    is_active: bool = True


# Called with what is about to be done ("list", "read", "insert", "update", "grant", "delete") and the
# id of the row: it may wait, change the table, or raise what the database shall answer.
HostHook = Callable[[str, str], Awaitable[None]]


class HostModels:
    """Open WebUI 0.12's table of models with their grants, in memory.

    As there: a row comes back with every field of `ModelMeta`, those never set as None; an update leaves
    the grants alone; and a read of one row that fails answers that there is none.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self, admin_id: str = "", hook: HostHook | None = None) -> None:
        """Begin anew. Without an administrator nobody can own a row; `user_ids` are the other people."""
        self.admin_id, self.hook = admin_id, hook
        self.user_ids: set[str] = set()
        self.rows: dict[str, dict[str, Any]] = {}  # as JSON
        self.writes: list[tuple[str, str]] = []  # (what, row id), in order

    async def _begin(self, what: str, row_id: str = "") -> None:
        if self.hook is not None:
            await self.hook(what, row_id)
        if what not in ("list", "read"):
            self.writes.append((what, row_id))

    def _answer(self, row_id: str) -> SimpleNamespace | None:
        if (row := self.rows.get(row_id)) is None:
            return None
        grants = [SimpleNamespace(**grant) for grant in row["access_grants"]]
        meta, params = ModelMeta(**deepcopy(row["meta"])), ModelParams(**deepcopy(row["params"]))
        return SimpleNamespace(**{**row, "meta": meta, "params": params, "access_grants": grants})

    async def get_base_models(self) -> list[SimpleNamespace | None]:
        await self._begin("list")
        return [self._answer(row_id) for row_id, row in self.rows.items() if row["base_model_id"] is None]

    async def get_model_by_id(self, row_id: str) -> SimpleNamespace | None:
        try:
            await self._begin("read", row_id)
        except Exception:
            return None
        return self._answer(row_id)

    async def insert_new_model(self, form: ModelForm, user_id: str) -> SimpleNamespace | None:
        await self._begin("insert", form.id)
        if form.id in self.rows:
            raise ValueError(f"UNIQUE constraint failed: {form.id}")
        grants = form.access_grants or []
        self.rows[form.id] = {**form.model_dump(mode="json"), "user_id": user_id, "access_grants": grants}
        return self._answer(form.id)

    async def update_model_by_id(self, row_id: str, form: ModelForm) -> SimpleNamespace | None:
        await self._begin("update", row_id)
        if row_id in self.rows:
            self.rows[row_id] |= form.model_dump(mode="json", exclude={"id", "access_grants"})
        return self._answer(row_id)

    async def delete_model_by_id(self, row_id: str) -> bool:
        await self._begin("delete", row_id)
        self.rows.pop(row_id, None)
        return True

    async def set_access_grants(self, kind: str, row_id: str, grants: list[dict[str, Any]] | None) -> None:
        await self._begin("grant", row_id)
        if row_id in self.rows:
            self.rows[row_id]["access_grants"] = grants or []

    async def get_user_by_id(self, user_id: str) -> SimpleNamespace | None:
        return SimpleNamespace(id=user_id, role="user") if user_id in self.user_ids else None

    async def get_super_admin_user(self) -> SimpleNamespace | None:
        return SimpleNamespace(id=self.admin_id) if self.admin_id else None

    async def get_users(self, filter: dict[str, Any] | None = None) -> dict[str, Any]:
        return {"users": [SimpleNamespace(id=self.admin_id)] if self.admin_id else []}


host_models = HostModels()


def _stub_models() -> None:
    forms = {"ModelForm": ModelForm, "ModelMeta": ModelMeta, "ModelParams": ModelParams}
    _fill(_module("models.models"), {"Models": host_models, **forms}.items())
    _fill(_module("models.access_grants"), [("AccessGrants", host_models)])
    _fill(_module("models.users"), [("Users", host_models)])
    _fill(_module("config"), [("BYPASS_ADMIN_ACCESS_CONTROL", True)])


class FileForm(BaseModel):
    """A row of the file table, as it is handed in."""

    id: str
    hash: str | None = None
    filename: str
    path: str
    data: dict[str, Any] = {}
    meta: dict[str, Any] = {}


class HostFiles:
    """Open WebUI 0.12's files: their rows, their storage, who may read them, and the chats they are in.

    As there: a read or an insert that fails answers that there is none; local storage hands out the path it
    is given, whether or not something is there, and storage elsewhere ("s3://…", here the folder `bucket`)
    copies the file; to its owner a file need not be opened, and whose grants let them read is in `readers`.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self, folder: Path | None = None, hook: HostHook | None = None) -> None:
        """Begin anew. Without a folder nothing can be stored.

        The hook is called with "read", "insert", "access", "messages" or "link".
        """
        self.folder, self.hook = folder, hook
        self.storage_hook: Callable[[str, str], None] | None = None  # ("get" or "put", path), in a thread
        self.rows: dict[str, SimpleNamespace] = {}
        self.readers: set[tuple[str, str]] = set()  # (file id, user id)
        self.messages: dict[str, dict[str, dict[str, Any]]] = {}  # chat id → message id → message
        self.links: list[tuple[str, str, str, str]] = []  # (chat id, message id, file id, user id)
        self.tags: dict[str, dict[str, str]] = {}  # file name → what the storage was told of it

    async def _begin(self, what: str, row_id: str) -> None:
        if self.hook is not None:
            await self.hook(what, row_id)

    async def get_file_by_id(self, file_id: str) -> SimpleNamespace | None:
        try:
            await self._begin("read", file_id)
        except Exception:
            return None
        return deepcopy(self.rows.get(file_id))

    async def insert_new_file(self, user_id: str, form: FileForm) -> SimpleNamespace | None:
        try:
            await self._begin("insert", form.id)
        except Exception:
            return None
        if form.id in self.rows:
            return None
        self.rows[form.id] = SimpleNamespace(**form.model_dump(), user_id=user_id)
        return deepcopy(self.rows[form.id])

    async def has_access_to_file(self, file_id: str, access_type: str, user: SimpleNamespace) -> bool:
        await self._begin("access", file_id)
        row = self.rows.get(file_id)
        may_read = access_type == "read" and (file_id, user.id) in self.readers
        return row is not None and (row.user_id == user.id or may_read)

    async def get_messages_map_by_chat_id(self, chat_id: str) -> dict[str, dict[str, Any]] | None:
        await self._begin("messages", chat_id)
        return deepcopy(self.messages.get(chat_id))

    async def insert_chat_files(
        self, chat_id: str, message_id: str, file_ids: list[str], user_id: str
    ) -> list[SimpleNamespace] | None:
        linked = {file_id for chat, _, file_id, _ in self.links if chat == chat_id}
        fresh = [
            file_id
            for file_id in dict.fromkeys(file_ids)
            if file_id not in linked and file_id in self.rows and self.rows[file_id].user_id == user_id
        ]
        if not fresh:
            return None
        await self._begin("link", chat_id)
        self.links += [(chat_id, message_id, file_id, user_id) for file_id in fresh]
        return [SimpleNamespace(chat_id=chat_id, file_id=file_id) for file_id in fresh]

    def upload_file(self, file: io.BytesIO, filename: str, tags: dict[str, str]) -> tuple[bytes, str]:
        if self.storage_hook is not None:
            self.storage_hook("put", filename)
        content = file.read()
        if not content or self.folder is None:
            raise ValueError("The content provided is empty.")
        path = self.folder / filename
        path.write_bytes(content)
        self.tags[filename] = tags
        return content, str(path)

    def get_file(self, path: str) -> str:
        if self.storage_hook is not None:
            self.storage_hook("get", path)
        if self.folder is None:
            raise FileNotFoundError(path)
        if not str(path).startswith("s3://"):  # of a row without a path there is none here either
            return path
        name = path.split("/")[-1]
        try:
            shutil.copy(self.folder / "bucket" / name, self.folder / name)
        except OSError as exc:
            raise RuntimeError(f"Error downloading file from S3: {exc}") from exc
        return str(self.folder / name)


host_files = HostFiles()


def _stub_files() -> None:
    for table in (_module("models.files").Files, _module("models.chats").Chats):
        table.get_file_by_id, table.insert_new_file = host_files.get_file_by_id, host_files.insert_new_file
        table.get_messages_map_by_chat_id = host_files.get_messages_map_by_chat_id
        table.insert_chat_files = host_files.insert_chat_files
    _fill(_module("models.files"), [("FileForm", FileForm)])
    _fill(_module("storage.provider"), [("Storage", host_files)])
    _fill(_module("utils.access_control.files"), [("has_access_to_file", host_files.has_access_to_file)])


def include_user_info_headers(
    headers: dict[str, str], user: Any = None, *, request: Any = None
) -> dict[str, str]:
    """Who asks, as Open WebUI 0.12 tells others where no key is set to sign it with."""
    if user is None:
        return headers
    auth_type = getattr(getattr(request, "state", None), "auth_type", None)
    if auth_type in ("api_key", "jwt"):
        headers = {**headers, "X-OpenWebUI-Auth-Type": auth_type}
    return {
        **headers,
        "X-OpenWebUI-User-Name": quote(user.name.strip(), safe=" "),
        "X-OpenWebUI-User-Id": user.id,
        "X-OpenWebUI-User-Email": user.email.strip(),
        "X-OpenWebUI-User-Role": user.role,
    }


def bound(function: Callable[..., Any], **extra: Any) -> Callable[..., Awaitable[Any]]:
    """A tool as Open WebUI hands it over: asynchronous in any case, what it asks for bound to it."""
    names = inspect.signature(function).parameters
    given = {name: value for name, value in extra.items() if name in names}
    if inspect.iscoroutinefunction(function):

        async def run(**arguments: Any) -> Any:
            return await function(**given, **arguments)

    else:

        async def run(**arguments: Any) -> Any:
            return function(**given, **arguments)

    run.__function__ = function  # type: ignore[attr-defined]  # as the host marks it
    run.__extra_params__ = given  # type: ignore[attr-defined]  # as the host marks it
    return run


async def _updated_tool_function(function: Any, extra_params: dict[str, Any]) -> Any:
    inner = getattr(function, "__function__", None)
    return function if inner is None else bound(inner, **{**function.__extra_params__, **extra_params})


async def _process_tool_result(
    _request: object, name: str, result: Any, kind: str, is_direct: bool, *_rest: object
) -> tuple[str | None, list[dict[str, str]], list[Any]]:
    """(text, files, embeds), for texts, pictures as data URLs, and what is JSON."""
    if (kind == "external" and isinstance(result, tuple)) or (is_direct and isinstance(result, list)):
        result = result[0]
    if isinstance(result, str) and result.startswith("data:image/"):
        return f"{name}: Image file read successfully.", [{"type": "image", "url": result}], []
    if isinstance(result, list):
        result = {"results": result}
    text = json.dumps(result, indent=2) if isinstance(result, dict) else result
    return None if text is None else str(text), [], []


def _says_error(text: str) -> bool:
    return text.lower().startswith("error:") or '"error":' in text


def _stub_tools() -> None:
    _fill(_module("utils.tools"), [("get_updated_tool_function", _updated_tool_function)])
    middleware: dict[str, object] = {
        "process_tool_result": _process_tool_result,
        "build_terminal_file_tool_result": lambda *_given: None,
        "terminal_event_handler": _answers_none("terminal_event_handler"),
        "get_citation_source_from_tool_result": lambda **_given: [],
        "_is_tool_result_error": _says_error,
    }
    _fill(_module("utils.middleware"), middleware.items())


def _stub_host() -> None:
    env = {
        "VERSION": HOST_VERSION,
        "WEBUI_SECRET_KEY": "",
        "REDIS_URL": "",
        "REDIS_CLUSTER": False,
        "REDIS_SENTINEL_HOSTS": "",
        "REDIS_SENTINEL_PORT": "26379",
        "REDIS_KEY_PREFIX": "open-webui",
        "ENABLE_FORWARD_USER_INFO_HEADERS": False,
        "FORWARD_SESSION_INFO_HEADER_CHAT_ID": "X-OpenWebUI-Chat-Id",
    }
    _fill(_module("env"), env.items())
    for path, tables in TABLES.items():
        for name, methods in tables.items():
            table = SimpleNamespace(**{method: _answers_none(method) for method in methods})
            setattr(_module(path), name, table)
    for path, names in FUNCTIONS.items():
        _fill(_module(path), ((name, _answers_none(name)) for name in names))
    _fill(_module("utils.headers"), [("include_user_info_headers", include_user_info_headers)])
    _stub_files()
    _fill(_module("models.chat_messages"), [("ChatMessage", ChatMessage)])
    _fill(_module("models.chats"), [("Chat", Chat)])
    _stub_models()
    _stub_functions()
    _stub_tools()
    _stub_database()
    _stub_redis()


def _no_waiting_in_tenacity() -> None:
    """Retries follow at once; the waits that were computed are still on the retry state."""

    async def no_wait(_seconds: float) -> None:
        return None

    def no_pause(_seconds: float) -> None:
        return None

    for kind, nothing in ((tenacity.AsyncRetrying, no_wait), (tenacity.BaseRetrying, no_pause)):
        start = kind.__init__
        start.__defaults__ = (nothing, *(start.__defaults__ or ())[1:])


def activate() -> None:
    """Put the stubs in place, once."""
    _no_waiting_in_tenacity()
    if "open_webui" not in sys.modules and importlib.util.find_spec("open_webui") is None:
        _stub_host()


activate()
