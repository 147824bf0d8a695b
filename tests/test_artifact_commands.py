"""`artifacts stats|prune|verify` as an administrator uses them: what is typed, what is printed, how it ends.

What is in the databases was put there by a real store.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine

from openrouter_responses_pipe.openrouter_responses_pipe import (
    ArtifactCipher,
    ArtifactPayload,
    ArtifactRow,
    ArtifactSettings,
    ArtifactStore,
    ArtifactTable,
    Database,
    OpenWebUIHost,
)
from pytest_bootstrap import Chat, host_database
from tests.commands import Command, shell
from tests.engines import host_engine
from tests.support import free_port

ROOT: Final = Path(__file__).parents[1]
DAY_S: Final = 86_400
SECRET: Final = "the secret of this server"
WORDS: Final = "what the model has thought " * 40


class Artifacts:
    """The command, given its arguments as from a shell; the environment is that of a server."""

    def __init__(self, command: Command, environment: pytest.MonkeyPatch) -> None:
        self._command = command
        self._environment = environment

    async def __call__(self, command: str, url: str, *options: str, **more: str) -> tuple[int, str, str]:
        """(exit status, what was printed, what was said of errors); `more` goes into the environment."""
        self._set(more)
        return await self._command(f"artifacts {command}", url, *options)

    async def facts(self, command: str, url: str, *options: str, **more: str) -> dict[str, Any]:
        """What is printed for machines."""
        self._set(more)
        return await self._command.facts(f"artifacts {command}", url, *options)

    def _set(self, more: Mapping[str, str]) -> None:
        for name, value in {"WEBUI_SECRET_KEY": SECRET, **more}.items():
            self._environment.setenv(name, value)


@pytest.fixture
def artifacts(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Artifacts]:
    """The command, in a shell where nothing of a server is set."""
    with shell(monkeypatch):
        yield Artifacts(Command(capsys), monkeypatch)


@asynccontextmanager
async def store_of(
    secret: str = SECRET, *, days_ago: float = 0.0, pipe_id: str = "openrouter", seals: bool = True
) -> AsyncIterator[ArtifactStore]:
    """A store in the host's database as a server with this secret has it; its clock is so many days late."""
    cipher = ArtifactCipher(secret, pipe_id)
    kinds = frozenset({"turn"}) if seals else frozenset[str]()
    store = ArtifactStore(OpenWebUIHost(), pipe_id, now=lambda: time.time() - days_ago * DAY_S)
    store.open(ArtifactSettings(cipher, sealed_kinds=kinds))
    yield store
    await store.aclose()


def thoughts(chat_id: str, count: int = 1, user_id: str = "ann", kind: Any = "turn") -> list[ArtifactPayload]:
    """Something to keep."""
    return [
        ArtifactPayload([{"reasoning": f"{WORDS}{number}"}], kind, user_id, chat_id)
        for number in range(count)
    ]


async def saved(chat_id: str, count: int = 1, *, days_ago: float = 0.0, **how: Any) -> list[str]:
    """The ULIDs of so many things, kept these days ago."""
    async with store_of(days_ago=days_ago, **how) as store:
        return await store.save(thoughts(chat_id, count))


async def kept(engine: AsyncEngine, schema: str | None = None) -> list[ArtifactRow]:
    """All that is in the table."""
    return await ArtifactTable(Database(engine, schema), "openrouter").rows(("", ""), 1_000)


async def changed(engine: AsyncEngine, ulid: str, **values: Any) -> None:
    """Spoil a row."""
    table = ArtifactTable(Database(engine), "openrouter").table
    async with engine.begin() as connection:
        await connection.execute(sa.update(table).where(table.c.ulid == ulid).values(**values))


async def host_has_chats(*chat_ids: str) -> None:
    """Give the host its table of chats, with these in it."""
    await host_database.create(Chat)
    async with host_database.session() as session:
        session.add_all([Chat(id=chat_id, user_id="ann") for chat_id in chat_ids])
        await session.commit()


@pytest.fixture
def url(database_url: str) -> str:
    """The address of the database as Open WebUI's DATABASE_URL has it."""
    return database_url.replace("+aiosqlite", "").replace("+psycopg", "")


# stats


async def test_what_is_kept_is_counted_by_kind_age_and_key(
    artifacts: Artifacts, database: AsyncEngine, url: str
) -> None:
    async with store_of() as store:
        await store.save(thoughts("one", 3))
        await store.save(thoughts("two", 2, "bob", "summary"))
    await saved("one", 4, days_ago=20)
    await saved("three", 1, days_ago=200, secret="another")
    rows = await kept(database)
    expected = {
        kind: {
            "rows": len(of_kind),
            "raw_bytes": sum(row.raw_bytes for row in of_kind),
            "stored_bytes": sum(len(row.payload) for row in of_kind),
        }
        for kind in ("turn", "summary")
        if (of_kind := [row for row in rows if row.kind == kind])
    }
    assert expected["turn"]["rows"] == 8
    assert 0 < expected["turn"]["stored_bytes"] < expected["turn"]["raw_bytes"]
    [ours] = {row.key_id for row in rows if row.chat_id == "one"}
    [theirs] = {row.key_id for row in rows if row.chat_id == "three"}
    assert await artifacts.facts("stats", url) == {
        "table": "pipe_openrouter_artifacts",
        "rows": 10,
        "chats": 3,
        "people": 2,
        "kinds": expected,
        "last_used": {
            "within a day": 5,
            "within a week": 0,
            "within 30 days": 4,
            "within 90 days": 0,
            "longer ago": 1,
        },
        "keys": {ours: 7, theirs: 1, "": 2},
    }
    status, out, err = await artifacts("stats", url)
    assert (status, err) == (0, "")
    assert out.startswith("pipe_openrouter_artifacts: 10 rows of 3 chats and 2 people\n")
    lines = [line.split() for line in out.splitlines()]
    assert ["not", "sealed", "2"] in lines
    assert [line[:2] for line in lines if line[:1] == ["turn"]] == [["turn", "8"]]


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
async def test_a_damaged_file_is_counted_too(artifacts: Artifacts, database: AsyncEngine, url: str) -> None:
    """SQLite keeps whatever it is given."""
    ulids = await saved("one", 5)
    odd: dict[str, Any] = {"kind": b"\xff", "key_id": b"\xfe", "raw_bytes": "many", "payload": 5}
    async with database.begin() as connection:
        for ulid, (name, value) in zip(ulids, odd.items(), strict=False):
            statement = sa.text(f"UPDATE pipe_openrouter_artifacts SET {name} = :value WHERE ulid = :ulid")
            await connection.execute(statement, {"value": value, "ulid": ulid})
    told = await artifacts.facts("stats", url)
    assert (told["rows"], told["kinds"]["turn"]["rows"]) == (5, 4)
    status, out, err = await artifacts("stats", url)
    assert (status, err) == (0, "")
    assert "5 rows of 1 chats" in out


async def test_an_empty_table_is_no_error(artifacts: Artifacts, database: AsyncEngine, url: str) -> None:
    await ArtifactTable(Database(database), "openrouter").create(time.time())
    assert (await artifacts.facts("stats", url))["rows"] == 0
    assert await artifacts("verify", url) == (0, "All 0 rows can be read.\n", "")


# prune


async def test_what_nobody_has_used_for_so_long_is_deleted_and_nothing_else(
    artifacts: Artifacts, database: AsyncEngine, url: str
) -> None:
    await saved("old", 450, days_ago=31)
    young = await saved("young", 3, days_ago=29)
    before = await kept(database)
    assert await artifacts.facts("prune", url, "--days", "30", "--dry-run") == {
        "dry_run": True,
        "unused_rows": 450,
    }
    assert await kept(database) == before
    status, out, _ = await artifacts("prune", url, "--days", "30")
    assert (status, out) == (0, "450 rows that nobody has used for 30 days: deleted\n")
    assert sorted(row.ulid for row in await kept(database)) == sorted(young)


async def test_what_is_of_deleted_chats_goes_unless_it_is_of_this_hour(
    artifacts: Artifacts, database: AsyncEngine, url: str
) -> None:
    await host_has_chats("there")
    there = await saved("there", 2, days_ago=1)
    await saved("gone", 3, days_ago=1)
    await saved("gone too", 1, days_ago=100)
    fresh = await saved("not there yet")  # a chat comes into the host's table after its first answer
    both = ("--days", "90", "--deleted-chats")
    told = await artifacts.facts("prune", url, *both, "--dry-run")
    assert told == {
        "dry_run": True,
        "unused_rows": 1,
        "deleted_chats": 1,
        "rows_of_deleted_chats": 3,
    }
    assert await artifacts.facts("prune", url, *both) == {**told, "dry_run": False}
    assert sorted(row.ulid for row in await kept(database)) == sorted(there + fresh)


async def test_without_the_table_of_chats_nothing_is_deleted(
    artifacts: Artifacts, database: AsyncEngine, url: str
) -> None:
    await saved("any", 2, days_ago=100)
    status, out, err = await artifacts("prune", url, "--days", "1", "--deleted-chats")
    assert (status, out) == (1, "")
    assert err == (
        "There is no table chat here, so nobody can tell which chats are deleted: nothing was deleted.\n"
    )
    assert len(await kept(database)) == 2


@pytest.mark.parametrize("options", [(), ("--days", "0"), ("--days", "-1"), ("--days", "soon")])
async def test_what_to_delete_has_to_be_said(artifacts: Artifacts, options: Sequence[str]) -> None:
    status, out, err = await artifacts("prune", "sqlite:////there/is/none.db", *options)
    assert (status, out) == (2, "")
    assert err


# verify


async def test_all_can_be_read_with_the_keys_that_have_sealed_it(
    artifacts: Artifacts, database: AsyncEngine, url: str
) -> None:
    await saved("one", 60)
    await saved("two", 2, secret="the key of the valve")
    await saved("three", 2, secret="the key before")
    await saved("four", 1, seals=False)
    keys = "the key of the valve, the key before"
    for options, environment in ((("--artifact-key", keys), {}), ((), {"ARTIFACT_ENCRYPTION_KEY": keys})):
        answer = await artifacts("verify", url, *options, **environment)
        assert answer == (0, "All 65 rows can be read.\n", "")
    secrets = ("--secret", SECRET, "--secret", "the key before", "--secret", "the key of the valve")
    told = await artifacts.facts("verify", url, *secrets, WEBUI_SECRET_KEY="")
    assert (told["readable"], told["unreadable"], len(told["keys"])) == (65, [], 3)


async def test_what_cannot_be_read_is_told_with_its_reason_and_key(
    artifacts: Artifacts, database: AsyncEngine, url: str
) -> None:
    ulids = await saved("one", 5)
    await saved("two", 2, secret="a lost one")
    plain = await saved("three", 1, seals=False)
    rows = {row.ulid: row for row in await kept(database)}
    await changed(database, ulids[0], payload=rows[ulids[1]].payload)  # as good as forged
    await changed(database, ulids[2], payload=b"")
    await changed(database, ulids[3], codec="brotli")
    await changed(database, plain[0], payload=b"\x00")
    ours = rows[ulids[0]].key_id
    [theirs] = {row.key_id for row in rows.values() if row.chat_id == "two"}
    told = await artifacts.facts("verify", url)
    assert told == {
        "rows": 8,
        "readable": 2,
        "unreadable": [
            {"reason": "a newer version has written it", "key": ours, "rows": 1},
            {"reason": "it is damaged", "key": "", "rows": 1},
            {"reason": "it is damaged", "key": ours, "rows": 2},
            {"reason": "its key was not given", "key": theirs, "rows": 2},
        ],
        "keys": [ours],
    }
    status, out, err = await artifacts("verify", url)
    assert (status, err) == (1, "")
    assert out.splitlines() == [
        "2 of 8 rows can be read. The others:",
        f"1 rows, sealed with key {ours}: a newer version has written it",
        "1 rows, not sealed: it is damaged",
        f"2 rows, sealed with key {ours}: it is damaged",
        f"2 rows, sealed with key {theirs}: its key was not given",
        f"Keys that were given: {ours}",
    ]
    assert SECRET not in out
    assert "thought" not in out


async def test_keys_are_those_of_one_function(artifacts: Artifacts, database: AsyncEngine, url: str) -> None:
    async with store_of(pipe_id="Other Pipe") as store:
        await store.save(thoughts("chat"))
    # the id belongs to the key and to the name of the table
    status, _, err = await artifacts("verify", url)
    assert status == 1
    assert err.startswith("There is no table pipe_openrouter_artifacts in this database. There is pipe_")


# where the database is


async def test_the_database_is_the_one_that_open_webui_is_told_of(
    artifacts: Artifacts, database: AsyncEngine, url: str
) -> None:
    await saved("one")
    assert (await artifacts.facts("stats", "", DATABASE_URL=url))["rows"] == 1


@pytest.mark.parametrize(
    ("prefix", "options"),
    [
        ("postgres://", ""),
        ("postgresql://", "?ssl=disable"),
        ("postgresql+psycopg2://", "?sslmode=disable"),
        ("postgresql+psycopg://", ""),
    ],
)
async def test_every_form_of_an_address_that_open_webui_takes(
    artifacts: Artifacts, prefix: str, options: str, postgres_url: str
) -> None:
    url = postgres_url.replace("postgresql+psycopg://", prefix) + options
    assert await artifacts("stats", url) == (
        1,
        "",
        "There is no table pipe_openrouter_artifacts in this database.\n",
    )


async def test_the_schema_that_open_webui_is_told_of(artifacts: Artifacts, postgres_url: str) -> None:
    async with host_engine(postgres_url) as engine:
        async with engine.begin() as connection:
            await connection.execute(sa.text("CREATE SCHEMA chats"))
        host_database.use(engine, "chats")
        await host_has_chats()
        await saved("gone", days_ago=1)
        host_database.reset()
        url = postgres_url.replace("+psycopg", "")
        assert (await artifacts("stats", url))[2].startswith("There is no table pipe_openrouter_artifacts in")
        assert (await artifacts.facts("stats", url, "--schema", "chats"))["rows"] == 1
        pruned = await artifacts.facts("prune", url, "--deleted-chats", DATABASE_SCHEMA="chats")
        assert pruned["rows_of_deleted_chats"] == 1
        assert await kept(engine, "chats") == []


async def test_a_database_that_is_not_there_is_not_made(artifacts: Artifacts, tmp_path: Path) -> None:
    missing = tmp_path / "webui.db"
    for command in (("stats",), ("verify",), ("prune", "--days", "1")):
        status, out, err = await artifacts(command[0], f"sqlite:///{missing}", *command[1:])
        assert (status, out) == (1, "")
        assert err.startswith(f"There is no database {missing}: ")
    assert os.listdir(tmp_path) == []


async def test_a_file_without_the_table_stays_as_it_is(artifacts: Artifacts, tmp_path: Path) -> None:
    file = tmp_path / "webui.db"
    file.touch()
    status, _, err = await artifacts("stats", f"sqlite:///{file}")
    assert (status, err) == (1, "There is no table pipe_openrouter_artifacts in this database.\n")
    assert file.stat().st_size == 0


NOWHERE: Final = f"postgresql://someone:hidden@127.0.0.1:{free_port()}/webui"


@pytest.mark.parametrize(
    ("url", "words"),
    [
        pytest.param(NOWHERE, "The database could not be used. ", id="nobody listens"),
        ("postgresql://someone:hidden@localhost:port/webui", "This is no address of a database: "),
        ("webui.db", "This is no address of a database: "),
        ("mysql://someone:hidden@localhost/webui", "Only SQLite and PostgreSQL can be used, not mysql."),
        ("sqlite+sqlcipher:///webui.db", "Only SQLite and PostgreSQL can be used, not sqlite+sqlcipher."),
        ("sqlite://", "There is no database in memory: "),
        (f"sqlite:///{__file__}", "The database could not be used. "),
    ],
)
async def test_a_database_that_cannot_be_used_is_one_sentence(
    artifacts: Artifacts, url: str, words: str
) -> None:
    status, out, err = await artifacts("stats", url)
    assert (status, out) == (1, "")
    assert err.startswith(words)
    assert len(err.splitlines()) == 1
    assert "hidden" not in err


async def test_no_database_is_wrong_usage(artifacts: Artifacts) -> None:
    status, _, err = await artifacts("stats", "")
    assert (status, err) == (2, "Name Open WebUI's database with --database or in DATABASE_URL.\n")


async def test_a_process_says_what_is_missing_and_reads_its_environment(
    tmp_path: Path, database: AsyncEngine, url: str
) -> None:
    await saved("one")
    command = (sys.executable, "-m", "openrouter_responses_pipe", "artifacts", "verify")
    drivers = tmp_path / "drivers"  # those that are found before the installed ones
    drivers.mkdir()
    for name in ("aiosqlite", "psycopg"):
        (drivers / f"{name}.py").write_text(f'raise ModuleNotFoundError("No module named {name!r}")')
    for path, expected in (
        (str(ROOT), (0, "All 1 rows can be read.\n", "")),
        (f"{ROOT}{os.pathsep}{drivers}", (1, "", "The driver of this database is not installed here: No ")),
    ):
        process = await asyncio.create_subprocess_exec(
            *command,
            cwd=tmp_path,
            env={**os.environ, "DATABASE_URL": url, "WEBUI_SECRET_KEY": SECRET, "PYTHONPATH": path},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        out, err = await process.communicate()
        status, words, problem = expected
        assert (process.returncode, out.decode()) == (status, words)
        assert err.decode().startswith(problem)
