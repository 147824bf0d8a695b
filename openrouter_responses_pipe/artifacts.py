"""The commands of `python -m openrouter_responses_pipe artifacts`: what is kept in the table of artifacts,
deleting what nobody needs any more, and whether it can be read.

They work on the database of Open WebUI, also while Open WebUI runs. They make neither a database nor a table.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

import sqlalchemy as sa
from sqlalchemy.engine import make_url
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from openrouter_responses_pipe import openrouter_responses_pipe as pipe

DAY_S: Final = 86400.0
# what is said of a row -> days since it was last used, at most
AGES: Final = {"within a day": 1, "within a week": 7, "within 30 days": 30, "within 90 days": 90}
OLDER: Final = "longer ago"
# the drivers that Open WebUI itself takes in place of those of its DATABASE_URL
DRIVERS: Final = {
    "sqlite": "sqlite+aiosqlite",
    "postgres": "postgresql+psycopg",
    "postgresql": "postgresql+psycopg",
    "postgresql+psycopg2": "postgresql+psycopg",
}
_SHAPES: Final = "sqlite:////path/to/webui.db or postgresql://user:password@host/name"
_ROWS_AT_ONCE: Final = 50  # each may have some megabytes


class CommandError(Exception):
    """One sentence for whoever has typed the command; never with a secret in it."""


class Artifacts(NamedTuple):
    """The table of artifacts in an open database."""

    engine: AsyncEngine
    schema: str | None
    table: pipe.ArtifactTable

    async def ask(self, statement: sa.Executable) -> Sequence[Any]:
        """Return the rows of the answer.

        Raises:
            StorageError: the database fails.
        """
        with pipe._storage_errors():
            async with self.engine.connect() as connection:
                return (await connection.execute(statement)).all()

    async def tables(self) -> list[str]:
        """Return the names of the tables that are there.

        Raises:
            StorageError: the database fails.
        """
        return await _tables(pipe.Database(self.engine, self.schema))


def run(args: argparse.Namespace) -> bool:
    """Run one of the commands; return whether all is well.

    Raises:
        CommandError: it cannot be done.
    """
    return in_database(_run, args)


def in_database(
    work: Callable[[pipe.Database, argparse.Namespace], Awaitable[bool]], args: argparse.Namespace
) -> bool:
    """Do `work` with the database that the arguments name; return what it returns.

    Raises:
        CommandError: it cannot be done.
    """
    # psycopg cannot work with the loop that is the usual one on Windows
    with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:
        try:
            return runner.run(_opened(work, args))
        except pipe.StorageError as exc:
            raise CommandError(f"The database could not be used. {_one_line(exc)}") from None


async def _opened(
    work: Callable[[pipe.Database, argparse.Namespace], Awaitable[bool]], args: argparse.Namespace
) -> bool:
    engine = _engine(args.database)
    try:
        return await work(pipe.Database(engine, args.schema or None), args)
    finally:
        await engine.dispose()


async def _run(database: pipe.Database, args: argparse.Namespace) -> bool:
    found = Artifacts(*database, pipe.ArtifactTable(database, args.id.lower()))
    await require(database, found.table.table.name)
    return await COMMANDS[args.what](found, args)


def _engine(address: str) -> AsyncEngine:
    try:
        url = make_url(address)
    except (SQLAlchemyError, ValueError):  # whose words would show the password
        raise CommandError(f"This is no address of a database: it has to look like {_SHAPES}.") from None
    url = url.set(drivername=DRIVERS.get(url.drivername, url.drivername))
    if url.drivername.startswith("postgresql+"):
        ssl = url.query.get("ssl")  # Open WebUI takes this word too, the driver does not
        url = url.difference_update_query(["ssl"])
        url = url.update_query_dict({"sslmode": ssl, **url.query}) if ssl else url
    elif url.drivername != "sqlite+aiosqlite":
        raise CommandError(f"Only SQLite and PostgreSQL can be used, not {url.drivername}.")
    elif not url.database or not Path(url.database).is_file():  # SQLite would make it
        raise CommandError(f"There is no database {url.database or 'in memory'}: {_SHAPES} is expected.")
    try:
        return create_async_engine(url)
    except ImportError as exc:
        raise CommandError(f"The driver of this database is not installed here: {_one_line(exc)}.") from None


def _one_line(exc: BaseException) -> str:
    return " ".join(str(exc).split())


async def _tables(database: pipe.Database) -> list[str]:
    with pipe._storage_errors():
        async with database.engine.connect() as connection:
            names = await connection.run_sync(lambda sync: sa.inspect(sync).get_table_names(database.schema))
    return sorted(names)


async def require(database: pipe.Database, wanted: str) -> None:
    """Make sure that a table of the pipe's is there.

    Raises:
        CommandError: it is not.
        StorageError: the database fails.
    """
    tables = await _tables(database)
    if wanted in tables:
        return
    kind = wanted[wanted.rindex("_") :]
    like = [name for name in tables if name.startswith("pipe_") and name.endswith(kind)]
    where = f"the schema {database.schema}" if database.schema else "this database"
    others = f" There is {', '.join(like)}: --id names the function." if like else ""
    raise CommandError(f"There is no table {wanted} in {where}.{others}")


# ── stats ─────────────────────────────────────────────────────────────


async def _stats(found: Artifacts, args: argparse.Namespace) -> bool:
    """Print how much is kept, of what kind, how old, and sealed with which keys."""
    columns = found.table.table.c
    now = time.time()
    ages = [(columns.last_used_at >= now - days * DAY_S, name) for name, days in AGES.items()]
    groups = await found.ask(
        sa.select(
            columns.kind,
            sa.case(*ages, else_=OLDER).label("age"),
            columns.key_id,
            sa.func.count(),
            sa.func.sum(columns.raw_bytes),
            sa.func.sum(sa.func.length(columns.payload)),
        ).group_by(columns.kind, "age", columns.key_id)
    )
    distinct = [sa.func.count(sa.distinct(columns[name])) for name in ("chat_id", "user_id")]
    [(chats, people)] = await found.ask(sa.select(*distinct))
    kinds: dict[str, Counter[str]] = {}
    used, keys = Counter(dict.fromkeys((*AGES, OLDER), 0)), Counter[str]()
    for kind, age, key_id, rows, made_of, stored in groups:
        sizes = {"rows": int(rows), "raw_bytes": int(made_of), "stored_bytes": int(stored)}
        kinds.setdefault(str(kind), Counter()).update(sizes)  # in a damaged file it may be anything
        used[age] += int(rows)
        keys[str(key_id)] += int(rows)
    facts: dict[str, Any] = {
        "table": found.table.table.name,
        "rows": used.total(),
        "chats": chats,
        "people": people,
        "kinds": kinds,
        "last_used": used,
        "keys": keys,
    }
    print(json.dumps(facts, indent=2) if args.json else _stats_text(facts))
    return True


def _stats_text(facts: Mapping[str, Any]) -> str:
    kinds: Mapping[str, Counter[str]] = facts["kinds"]
    whole: Counter[str] = sum(kinds.values(), Counter())
    sizes = [
        (kind, f"{sums['rows']:,}", _size(sums["raw_bytes"]), _size(sums["stored_bytes"]))
        for kind, sums in (*sorted(kinds.items()), ("all", whole))
    ]
    used = [(name, f"{rows:,}") for name, rows in facts["last_used"].items()]
    keys = [(key_id or "not sealed", f"{rows:,}") for key_id, rows in sorted(facts["keys"].items())]
    return "\n\n".join(
        (
            f"{facts['table']}: {facts['rows']:,} rows of {facts['chats']:,} chats and "
            f"{facts['people']:,} people",
            _table(("kind", "rows", "before", "stored"), sizes),
            _table(("last used", "rows"), used),
            _table(("sealed with key", "rows"), keys),
        )
    )


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """Return lines of columns: words to the left, numbers to the right."""
    widths = [max(map(len, cells)) for cells in zip(head, *rows, strict=True)]
    lines = []
    for first, *numbers in (head, *rows):
        cells = [number.rjust(width) for number, width in zip(numbers, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]))
    return "\n".join(lines)


def _size(count: float) -> str:
    """Return a number of bytes as people read it."""
    unit = "B"
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            break
        count /= 1000
    return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"


# ── prune ─────────────────────────────────────────────────────────────


async def _prune(found: Artifacts, args: argparse.Namespace) -> bool:
    """Delete as the pipe's own clean-up does, in its batches; or say what that would delete."""
    if args.deleted_chats and "chat" not in await found.tables():
        raise CommandError(
            "There is no table chat here, so nobody can tell which chats are deleted: nothing was deleted."
        )
    now = time.time()
    facts: dict[str, Any] = {"dry_run": args.dry_run}
    since = 0.0
    if args.days is not None:
        since = now - args.days * DAY_S
        facts["unused_rows"] = await _delete_unused(found, since, dry=args.dry_run)
    if args.deleted_chats:
        rows = chats = 0
        async for gone in _deleted_chats(found):
            counts = await _delete_chats(found, gone, now - pipe._FRESH_S, since, dry=args.dry_run)
            rows, chats = rows + counts[0], chats + counts[1]
        facts |= {"rows_of_deleted_chats": rows, "deleted_chats": chats}
    print(json.dumps(facts, indent=2) if args.json else _prune_text(facts, args.days))
    return True


def _prune_text(facts: Mapping[str, Any], days: int | None) -> str:
    verb = "would be deleted" if facts["dry_run"] else "deleted"
    lines = []
    if days is not None:
        lines.append(f"{facts['unused_rows']:,} rows that nobody has used for {days} days: {verb}")
    if "deleted_chats" in facts:
        rows, chats = facts["rows_of_deleted_chats"], facts["deleted_chats"]
        lines.append(f"{rows:,} rows of {chats:,} chats that Open WebUI does not have any more: {verb}")
    return "\n".join(lines)


async def _delete_unused(found: Artifacts, since: float, *, dry: bool) -> int:
    if dry:
        return (await _count(found, found.table.table.c.last_used_at < since))[0]
    return await pipe._in_batches(partial(found.table.delete_unused, since, pipe._PRUNE_BATCH))


async def _delete_chats(
    found: Artifacts, gone: Sequence[str], before: float, since: float, *, dry: bool
) -> tuple[int, int]:  # (rows, chats that they are of), without rows that are unused since then
    columns = found.table.table.c
    rows, chats = await _count(
        found, columns.chat_id.in_(gone), columns.created_at < before, columns.last_used_at >= since
    )
    if rows and not dry:
        rows = await pipe._in_batches(partial(found.table.delete_chats, gone, before, pipe._PRUNE_BATCH))
    return rows, chats


async def _count(found: Artifacts, *conditions: sa.ColumnElement[bool]) -> tuple[int, int]:
    """Return the number of rows, and of the chats that they are of."""
    chats = sa.func.count(sa.distinct(found.table.table.c.chat_id))
    [(rows, of)] = await found.ask(sa.select(sa.func.count(), chats).where(*conditions))
    return rows, of


async def _deleted_chats(found: Artifacts) -> AsyncIterator[list[str]]:
    """Yield the chats that rows are of and that Open WebUI does not have any more, some at a time."""
    known = sa.table("chat", sa.column("id"), schema=found.schema)
    last = ""
    while chats := await found.table.chats(last, pipe._MOST_CHATS):
        last = chats[-1]
        there = {row[0] for row in await found.ask(sa.select(known.c.id).where(known.c.id.in_(chats)))}
        if gone := [chat_id for chat_id in chats if chat_id not in there]:
            yield gone


# ── verify ────────────────────────────────────────────────────────────


async def _verify(found: Artifacts, args: argparse.Namespace) -> bool:
    """Open every row and say how many cannot be opened, and why; return whether all can."""
    ciphers = _ciphers(args)
    rows = 0
    problems: Counter[tuple[str, str]] = Counter()
    last = ("", "")
    while page := await found.table.rows(last, _ROWS_AT_ONCE):
        last = page[-1].ulid, page[-1].chat_id
        rows += len(page)
        problems.update((problem, str(row.key_id)) for row in page if (problem := _problem(row, ciphers)))
    bad = [
        {"reason": reason, "key": key_id, "rows": count}
        for (reason, key_id), count in sorted(problems.items())
    ]
    facts = {"rows": rows, "readable": rows - problems.total(), "unreadable": bad, "keys": sorted(ciphers)}
    print(json.dumps(facts, indent=2) if args.json else _verify_text(facts))
    return not bad


def _ciphers(args: argparse.Namespace) -> dict[str, pipe.ArtifactCipher]:
    """Return the key of each secret that was given, by its id."""
    own = args.artifact_key or os.environ.get("ARTIFACT_ENCRYPTION_KEY", "")
    secrets = [*map(str.strip, own.split(",")), *(args.secret or [pipe.HostEnvironment.read().secret])]
    ciphers = [pipe.ArtifactCipher(secret, args.id.lower()) for secret in secrets if secret]
    return {cipher.encrypt(b"", "")[0]: cipher for cipher in ciphers}


def _problem(row: pipe.ArtifactRow, ciphers: Mapping[str, pipe.ArtifactCipher]) -> str:
    """Return why a row cannot be read; empty: it can."""
    if row.key_id and row.key_id not in ciphers:
        return "its key was not given"
    if row.codec == "lz4" and pipe.lz4_frame is None:
        return "the Python package lz4 is not installed here"
    if row.codec not in ("json", *pipe._DECOMPRESS):
        return "a newer version has written it"
    try:
        pipe._unpacked(row, ciphers.get(row.key_id) or pipe.ArtifactCipher("", ""))
    except pipe.StorageError:
        return "it is damaged"
    return ""


def _verify_text(facts: Mapping[str, Any]) -> str:
    if not facts["unreadable"]:
        return f"All {facts['rows']:,} rows can be read."
    lines = [f"{facts['readable']:,} of {facts['rows']:,} rows can be read. The others:"]
    for problem in facts["unreadable"]:
        key = f"sealed with key {problem['key']}" if problem["key"] else "not sealed"
        lines.append(f"{problem['rows']:,} rows, {key}: {problem['reason']}")
    return "\n".join([*lines, f"Keys that were given: {', '.join(facts['keys']) or 'none'}"])


COMMANDS: Final = {"stats": _stats, "prune": _prune, "verify": _verify}
