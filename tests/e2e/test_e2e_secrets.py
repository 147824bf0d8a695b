"""No secret lies where it does not have to: everything that the run wrote is searched; collected last of all.

Each secret is looked for as it is and in the forms in which it could hide (base64 at every alignment, in
hexadecimal, URL-encoded, escaped for JSON), in every file, in every row of the databases with what is packed
in them unpacked, in Redis, in the simulator's records, in what the browser got, and in what `ps` shows.
"""

from __future__ import annotations

import base64
import fnmatch
import json
import sqlite3
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

import pytest

from openrouter_responses_pipe import openrouter_responses_pipe as pipe
from openrouter_responses_pipe.webui import WebUIClient
from tests.e2e.big_host import BigHost
from tests.e2e.driver import Tab, Turn, error_text, unique
from tests.e2e.host import KEY, MODEL, Host, valves
from tests.e2e.upstream import Upstream
from tests.engines import connected

# with characters that look different in a URL and in JSON
USERS_KEY: Final = 'sk-or-v1-of/ursula+"4711"=='
REFUSED_KEY: Final = "sk-bad+key/of=ursula"
ARTIFACT_KEY: Final = 'what seals/the "artifacts"+of=this run'
THINKER: Final = MODEL  # it reasons, so something is stored
VALVES_OF_A_PERSON: Final = "/api/v1/functions/id/openrouter/valves/user"
# (secret, place) -> why it may be there; everything else is a leak
ALLOWED: Final[Mapping[tuple[str, str], str]] = {
    ("server", "file */secret_key"): "where the one who starts the server keeps it, readable for the owner",
}
# What each account's page may ask for: all that says something of functions, chats, people and settings.
PAGES: Final = (
    "/api/config",
    "/api/models",
    "/api/v1/auths/",
    "/api/v1/chats/",
    "/api/v1/chats/all",
    "/api/v1/users/user/settings",
    VALVES_OF_A_PERSON,
    f"{VALVES_OF_A_PERSON}/spec",
)
PAGES_OF_ADMINS: Final = (
    "/api/v1/functions/",
    "/api/v1/functions/export",
    "/api/v1/functions/id/openrouter",
    "/api/v1/functions/id/openrouter/valves",
    "/api/v1/functions/id/openrouter/valves/spec",
    "/api/v1/models/base",
    "/api/v1/models/export",
    "/api/v1/configs/export",
    "/api/v1/users/",
    "/api/v1/users/all",
    "/api/v1/chats/all/db",
)


def forms(secret: str) -> set[bytes]:
    """A secret as it is, and as it looks in what somebody has encoded."""
    raw = secret.encode()
    found = {raw, raw.hex().encode(), json.dumps(secret)[1:-1].encode()}
    found |= {urllib.parse.quote(secret, safe="").encode(), urllib.parse.quote_plus(secret).encode()}
    for before in range(3):  # in the middle of something longer all but its ends is the same each time
        encoded = base64.b64encode(b"\0" * before + raw)
        inner = encoded[-(-before * 4 // 3) : len(raw + b"\0" * before) // 3 * 4]
        found |= {inner, inner.translate(bytes.maketrans(b"+/", b"-_"))}
    return found


@pytest.mark.parametrize("around", ["", "x", "xy", "Bearer "])
@pytest.mark.parametrize("secret", [KEY, USERS_KEY, REFUSED_KEY, ARTIFACT_KEY])
def test_a_secret_is_found_in_every_form(secret: str, around: str) -> None:
    whole = f"{around}{secret}{around}"
    hidden = [
        whole.encode(),
        json.dumps({"key": whole}).encode(),
        base64.b64encode(whole.encode()),
        base64.urlsafe_b64encode(whole.encode()),
        urllib.parse.urlencode({"key": whole}).encode(),
        whole.encode().hex().encode(),
    ]
    for content in hidden:
        assert any(form in content for form in forms(secret)), content
    assert not any(form in b"sk-or-v1-somebody-else's" for form in forms(secret))


@dataclass(frozen=True)
class Place:
    """Something that the run has left behind, under a name that `ALLOWED` may have."""

    name: str
    content: bytes


def _row_places(where: str, table: str, rows: Iterator[Mapping[str, Any]], secret: str) -> Iterator[Place]:
    """Every value of every row, and what is packed in the pipe's own table."""
    cipher = pipe.ArtifactCipher(ARTIFACT_KEY, "openrouter", (secret,))
    for row in rows:
        for column, value in row.items():
            content = value if isinstance(value, bytes) else str(value).encode("utf-8", "replace")
            yield Place(f"{where} {table}.{column}", content)
        if table == "pipe_openrouter_artifacts":
            whole = pipe.ArtifactRow._make(row[name] for name in pipe.ArtifactRow._fields)
            yield Place(f"{where} {table} opened", pipe._unpacked(whole, cipher)[0])


def _of_sqlite(file: Path, secret: str) -> Iterator[Place]:
    with closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True)) as connection:
        connection.row_factory = sqlite3.Row
        tables = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
        for (table,) in tables:
            rows = map(dict, connection.execute(f'SELECT * FROM "{table}"'))
            yield from _row_places("sqlite", table, rows, secret)


def _of_postgres(host: BigHost, secret: str) -> Iterator[Place]:
    from psycopg.rows import dict_row

    with connected(host.database_url) as connection:
        named = "SELECT table_name FROM information_schema.tables WHERE table_schema = 'public'"
        for (table,) in connection.execute(named).fetchall():
            cursor = connection.cursor(row_factory=dict_row)
            rows = iter(cursor.execute(f'SELECT * FROM "{table}"'.encode()).fetchall())
            yield from _row_places("postgresql", table, rows, secret)


def _of_redis(host: BigHost) -> Iterator[Place]:
    read: dict[str, Callable[[Any, bytes], Any]] = {
        "string": lambda client, key: client.get(key),
        "list": lambda client, key: client.lrange(key, 0, -1),
        "set": lambda client, key: client.smembers(key),
        "hash": lambda client, key: client.hgetall(key),
        "zset": lambda client, key: client.zrange(key, 0, -1),
        "stream": lambda client, key: client.xrange(key),
    }
    with host.redis() as client:
        for key in client.scan_iter():
            kind = cast(bytes, client.type(key)).decode()
            content = read[kind](client, key) if kind in read else b""  # it may have run out just now
            whole = content if isinstance(content, bytes) else repr(content).encode()
            yield Place(f"redis {key.decode()}", key + b" " + whole)


def _of_processes(host: Host) -> Iterator[Place]:
    """What everybody on the machine can read of the server: the command lines of its process group."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            group = int((folder / "stat").read_text().rpartition(")")[2].split()[2])
            if group == host.server.pid:
                yield Place("ps", (folder / "cmdline").read_bytes())
        except (OSError, IndexError, ValueError):
            continue


def _of_files(folder: Path) -> Iterator[Place]:
    """Every file as it lies there: of a database also the pages that nothing points to any more."""
    for file in sorted(folder.rglob("*")):
        if file.is_file() and not file.is_symlink():
            yield Place(f"file {file.relative_to(folder)}", file.read_bytes())


def _of_pages(client: WebUIClient, who: str, pages: tuple[str, ...]) -> Iterator[Place]:
    for page in pages:
        with client._open("GET", page, None, 60.0) as response:
            yield Place(f"{who} GET {page}", response.read())


def _of_turns(turns: list[tuple[Turn, Any]]) -> Iterator[Place]:
    for turn, saved in turns:
        yield Place("events of a chat", json.dumps(turn.events, default=str).encode())
        yield Place("saved chat", json.dumps(saved).encode())


@contextmanager
def _own_key(client: WebUIClient, key: str) -> Iterator[None]:
    client.request("POST", f"{VALVES_OF_A_PERSON}/update", {"API_KEY": key})
    try:
        yield
    finally:
        client.request("POST", f"{VALVES_OF_A_PERSON}/update", {})


async def _used(host: Host, upstream: Upstream) -> list[tuple[Turn, Any]]:
    """Use every secret, also where it is refused; returns what the page has of it."""
    turns: list[tuple[Turn, Any]] = []
    with valves(host, ALLOW_USER_API_KEYS=True, ARTIFACT_ENCRYPTION_KEY=ARTIFACT_KEY):
        for key, client in (("", host.admin), (USERS_KEY, host.user), (REFUSED_KEY, host.user)):
            async with Tab.open(client) as tab:
                with _own_key(client, key):
                    question, word = unique("Think about it, then say hello")
                    turn = await tab.ask(question, THINKER)
                    turns.append((turn, await turn.done()))
                    if key == REFUSED_KEY:
                        assert "did not accept the API key" in error_text(turns[-1][1])
                    else:
                        sent = upstream.last(word)["headers"]["authorization"]
                        assert sent.startswith("Bearer #")  # the record keeps a digest
    return turns


@pytest.fixture(params=["host", "big_host"])
def used_host(request: pytest.FixtureRequest) -> Host:
    """One of the servers, started."""
    return request.getfixturevalue(request.param)


async def test_no_secret_lies_around(used_host: Host, upstream: Upstream, folder: Path) -> None:
    host = used_host
    server_secret = (host.server.folder / "secret_key").read_text("utf-8").strip()
    secrets = {
        "administrator": KEY,
        "person": USERS_KEY,
        "refused": REFUSED_KEY,
        "artifacts": ARTIFACT_KEY,
        "server": server_secret,
    }
    turns = await _used(host, upstream)
    stored = host.admin.request("GET", "/api/v1/functions/id/openrouter/valves")
    assert stored["API_KEY"].startswith("encrypted:")

    def places() -> Iterator[Place]:
        yield from _of_turns(turns)
        yield from _of_pages(host.admin, "administrator", (*PAGES, *PAGES_OF_ADMINS))
        yield from _of_pages(host.user, "person", PAGES)
        yield Place("simulator", json.dumps(upstream._ask("/_control/requests")).encode())
        yield from _of_processes(host)
        yield from _of_files(folder)
        if isinstance(host, BigHost):
            yield from _of_postgres(host, server_secret)
            yield from _of_redis(host)
        else:
            yield from _of_sqlite(host.server.folder / "data" / "webui.db", server_secret)

    searched: dict[str, int] = {}
    leaks: set[tuple[str, str]] = set()
    hidden = {name: forms(secret) for name, secret in secrets.items()}
    for place in places():
        kind = place.name.partition(" ")[0]
        searched[kind] = searched.get(kind, 0) + 1
        leaks |= {
            (name, place.name)
            for name, found in hidden.items()
            if any(form in place.content for form in found) and not _is_allowed(name, place.name)
        }
    assert not leaks
    assert searched["file"] > 5
    assert searched["ps"] >= 1
    assert searched["postgresql" if isinstance(host, BigHost) else "sqlite"] > 100


def _is_allowed(secret: str, place: str) -> bool:
    return any(secret == name and fnmatch.fnmatchcase(place, glob) for name, glob in ALLOWED)


def test_the_secret_of_a_server_is_its_owners_alone(host: Host) -> None:
    assert (host.server.folder / "secret_key").stat().st_mode & 0o077 == 0
