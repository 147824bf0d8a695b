"""One table: what fails around the pipe, and exactly what a person sees of it.

Everything that fails is real: processes are killed, sockets stay silent, certificates are made by nobody,
files have no room. A row that asks twice shows the second answer: by then there is something to lose.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import datetime
import ipaddress
import os
import signal
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, Final, NamedTuple

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from redis import Redis as SyncRedis
from sqlalchemy import event

from openrouter_responses_pipe.simulator import Simulator
from openrouter_responses_pipe.webui import SimulatorServer
from pytest_bootstrap import host_database, host_redis
from tests import engines
from tests.people import Asked, People, Told, soon
from tests.support import (
    EVENT_STREAM,
    Answer,
    completed,
    delta,
    frame,
    hostile,
    read_request,
    run_alone,
    running_pipe,
)
from tests.test_reasoning_replay import as_body, message, thought
from tests.tools import entry, named, offered

Json = dict[str, Any]
ROOT: Final = Path(__file__).parents[1]
FINE: Final = "[[plain text=fine]]"
THINKS: Final = "[[reasoning text=fine]]"
THINKER: Final = "openrouter.openai/gpt-5-mini"
STALLED: Final = "[[stall hang=4]]"  # some words, and then nothing
PATIENCE_S: Final = 40.0


class Seen(NamedTuple):
    """What a person has before them in the end."""

    text: str
    error: str = ""
    statuses: tuple[str, ...] = ()
    notices: tuple[str, ...] = ()


class World:
    """A place where things fail; whatever is started in it ends with the test."""

    def __init__(self, folder: Path, ends: contextlib.AsyncExitStack, patch: pytest.MonkeyPatch) -> None:
        self.folder, self.ends, self.patch = folder, ends, patch

    async def simulator(self) -> Simulator:
        """OpenRouter, as it should be."""
        return await self.ends.enter_async_context(Simulator())

    def server(self) -> SimulatorServer:
        """OpenRouter in a process of its own, at an address that stays free while it is down."""
        server = SimulatorServer(self.folder / "simulator.log", port=engines.steady_port())
        self.ends.callback(server.stop)
        server.launch()
        return server

    async def people(self, base_url: str, **valves: Any) -> People:
        """People before a pipe; what an answer took is not said, because it differs."""
        valves = {"SHOW_FINAL_USAGE_STATUS": False, "ENABLE_STARTUP_CHECKS": False} | valves
        pipe = await self.ends.enter_async_context(running_pipe(base_url, **valves))
        return await self.ends.enter_async_context(People.of(pipe))

    async def database(self, url: str) -> Any:
        """The engine of a host with this database."""
        engine = await self.ends.enter_async_context(engines.host_engine(url))
        host_database.use(engine)
        self.ends.callback(host_database.reset)
        return engine

    def sqlite_url(self) -> str:
        """A database in a file."""
        return f"sqlite+aiosqlite:///{self.folder / 'webui.db'}"


async def seen(asked: Asked) -> Seen:
    """What there is to see at the end."""
    answer = await asked.end(PATIENCE_S)
    notices = tuple(note["content"] for note in asked.told.of("notification"))
    return Seen(answer.text, answer.error, tuple(asked.told.statuses()), notices)


async def ask(people: People, prompt: str | Json = FINE, **more: Any) -> Seen:
    """One question, from start to end."""
    return await seen(people.ask(prompt, **more))


def thinking(number: int) -> Json:
    """A question to a model whose thinking is kept."""
    return {"messages": [{"role": "user", "content": f"{THINKS} {number}"}], "model": THINKER}


def kill(server: SimulatorServer) -> None:
    """End it this moment; the system breaks its connections."""
    os.kill(server.pid, signal.SIGKILL)
    server.stop()


# OpenRouter


async def _killed_before(world: World) -> Seen:
    server = world.server()
    people = await world.people(server.base_url)
    await ask(people)
    kill(server)
    return await ask(people)


async def _killed_within(world: World) -> Seen:
    server = world.server()
    people = await world.people(server.base_url)
    asked = people.ask(STALLED)
    await soon(lambda: asked.answer.text)
    kill(server)
    return await seen(asked)


class _Restarts(Told):
    """Starts a server again when the person is told that there will be another try."""

    def __init__(self, server: SimulatorServer) -> None:
        super().__init__()
        self._server = server

    async def __call__(self, event: Json) -> None:
        """Take one event."""
        if not self._server.running:
            self._server.launch()
        await super().__call__(event)


async def _restarted(world: World) -> Seen:
    server = world.server()
    people = await world.people(server.base_url, RETRY_ATTEMPTS=2)
    await ask(people)
    kill(server)
    told = _Restarts(server)
    answer = await people.ask(FINE, __event_emitter__=told).end(PATIENCE_S)
    again = [text.partition(" in ")[0] for text in told.statuses()[:1]]  # how soon is a matter of chance
    return Seen(answer.text, answer.error, (*again, *told.statuses()[1:]))


async def _never_back(world: World) -> Seen:
    server = world.server()
    people = await world.people(server.base_url, RETRY_ATTEMPTS=1, RETRY_MAX_WAIT_SECONDS=1)
    await ask(people)
    kill(server)
    found = await ask(people)
    return found._replace(statuses=tuple(text.partition(" in ")[0] for text in found.statuses))


async def _slow(world: World) -> Seen:
    """Longer than TIMEOUT in all, and never silent for long."""

    async def trickle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(EVENT_STREAM)
        words = [delta(f"{number} ") for number in range(3)]
        stream = frame("response.created", response={}) + b"".join(words) + completed()
        step = -(-len(stream) // 24)
        for start in range(0, len(stream), step):
            writer.write(stream[start : start + step])
            await writer.drain()
            await asyncio.sleep(0.5)

    people = await world.people(await world.ends.enter_async_context(hostile(trickle)), TIMEOUT=10)
    return await ask(people)


async def _silent(reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
    await reader.read()  # until the client hangs up


async def _half_open(world: World) -> Seen:
    people = await world.people(await world.ends.enter_async_context(hostile(_silent)), TIMEOUT=10)
    return await ask(people)


async def _falls_silent(world: World) -> Seen:
    people = await world.people((await world.simulator()).base_url, TIMEOUT=10)
    return await ask(people, STALLED)


async def _self_signed(world: World) -> Seen:
    """A certificate that nobody vouches for."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(_certificate(world.folder))
    server = await asyncio.start_server(_silent, "127.0.0.1", 0, ssl=context)
    world.ends.callback(server.close)
    people = await world.people(f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}/api/v1")
    return await ask(people)


def _certificate(folder: Path) -> Path:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)
    address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(now).not_valid_after(now + datetime.timedelta(days=1))
    signed = builder.add_extension(address, critical=False).sign(key, hashes.SHA256())
    pem, kind = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    path = folder / "server.pem"
    secret = key.private_bytes(pem, kind, serialization.NoEncryption())
    path.write_bytes(secret + signed.public_bytes(pem))
    return path


async def _no_tls(world: World) -> Seen:
    """An https address where somebody speaks plain HTTP."""
    base_url = (await world.simulator()).base_url
    return await ask(await world.people(base_url.replace("http:", "https:")))


async def _no_name(world: World) -> Seen:
    return await ask(await world.people("http://no-such-host.invalid/api/v1"))


# What is kept


async def _kept(people: People) -> None:
    """Have a first answer whose thinking lies in the database."""
    for number in range(20):
        asked = people.ask(thinking(number))
        answer = await asked.end(PATIENCE_S)
        if _carriers(answer) == ["turn"]:
            return
    raise AssertionError("nothing is stored")


def _carriers(answer: Answer) -> list[str]:
    """Where thinking has gone: into a row ("turn"), or along with the message ("sealed")."""
    details = [detail for item in answer.items() for detail in item.get("reasoning_details", ())]
    return [name for detail in details for name in ("turn", "sealed") if name in detail]


async def _ask_where(carrier: str, people: People, question: Json) -> Seen:
    """A question whose thinking goes there."""
    asked = people.ask(question)
    found = await seen(asked)
    assert _carriers(asked.answer) == [carrier]
    return found


async def _redis_gone(world: World) -> Seen:
    redis = world.ends.enter_context(engines.redis_server(world.folder / "redis"))
    world.patch.setattr("open_webui.env.REDIS_URL", redis.url)
    world.patch.setenv("REDIS_URL", redis.url)
    world.ends.push_async_callback(host_redis.aclose)
    await world.database(world.sqlite_url())
    people = await world.people((await world.simulator()).base_url, ENABLE_REDIS_CACHE="on")
    await _kept(people)
    with contextlib.closing(SyncRedis.from_url(redis.url)) as client:
        await soon(lambda: len(client.client_list()) > 1)  # the pipe is there too
    redis.kill()
    return await _ask_where("turn", people, thinking(99))


async def _database_gone(world: World) -> Seen:
    postgres = world.ends.enter_context(engines.postgres_server(world.folder))
    await world.database(postgres.url("postgres"))
    people = await world.people((await world.simulator()).base_url)
    await _kept(people)
    postgres.stop()
    return await _ask_where("sealed", people, thinking(99))


async def _disk_full(world: World) -> Seen:
    engine = await world.database(world.sqlite_url())
    simulator = await world.simulator()
    people = await world.people(simulator.base_url)
    await _kept(people)

    def no_room(connection: Any, *_given: object) -> None:
        cursor = connection.cursor()
        cursor.execute("PRAGMA max_page_count=1")
        cursor.close()

    event.listen(engine.sync_engine, "checkout", no_room)
    noise = base64.b64encode(os.urandom(20_000)).decode()  # more than fits into the last page
    simulator.next("replay", body=as_body(thought(1, encrypted_content=noise), message("fine")))
    return await _ask_where("sealed", people, thinking(99))


# Open WebUI, and what it brings along


async def _emitter_raises(world: World) -> Seen:
    people = await world.people((await world.simulator()).base_url, SHOW_FINAL_USAGE_STATUS=True)

    async def emit(_event: Json) -> None:
        raise ConnectionResetError("the page is gone")

    return await ask(people, "[[or_search text=fine]]", __event_emitter__=emit)


async def _emitter_hangs(world: World) -> Seen:
    people = await world.people((await world.simulator()).base_url, SHOW_FINAL_USAGE_STATUS=True)

    async def emit(_event: Json) -> None:
        await asyncio.Event().wait()

    return await ask(people, "[[or_search text=fine]]", __event_emitter__=emit)


async def _tool_hangs(world: World) -> Seen:
    people = await world.people((await world.simulator()).base_url, TOOL_TIMEOUT_SECONDS=1)

    async def hang() -> str:
        await asyncio.Event().wait()
        return "never"

    return await _with_tool(people, hang)


async def _tool_does_not_end(world: World) -> Seen:
    people = await world.people((await world.simulator()).base_url, TOOL_TIMEOUT_SECONDS=1)
    over = asyncio.Event()
    world.ends.callback(over.set)

    async def stubborn() -> str:
        while not over.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await over.wait()
        return "never"

    return await _with_tool(people, stubborn)


async def _tool_raises(world: World) -> Seen:
    people = await world.people((await world.simulator()).base_url)

    async def fail() -> str:
        raise ZeroDivisionError("division by zero")

    return await _with_tool(people, fail)


async def _with_tool(people: People, function: Any) -> Seen:
    tools = named(f=entry(function))
    question: Json = {"messages": [{"role": "user", "content": "[[tool name=f]]"}], "tools": offered(tools)}
    return await ask(people, question, __tools__=tools)


class Row(NamedTuple):
    """How something fails, and what a person sees of it."""

    fault: Callable[[World], Awaitable[Seen]]
    sees: Seen


UNREACHABLE: Final = "OpenRouter could not be reached."
REFUSED: Final = f"{UNREACHABLE} The connection was refused or failed. Please try again."
AGAIN: Final = f"{UNREACHABLE} Trying again"
SOURCES: Final = (
    "Two sources agree: [World towers](https://example.org/towers) [Height list](https://example.net/list)."
)
LATE: Final = "Error: The tool did not finish within 1 second."


def quoted(output: str) -> str:
    """What the simulator says when it is given this output of a tool."""
    return f"The tools returned:\n\n- {output}\n\nThat answers “”."


TABLE: Final[dict[str, Row]] = {
    "simulator killed before the request": Row(_killed_before, Seen("", REFUSED)),
    "simulator killed in mid-answer": Row(
        _killed_within,
        Seen("Hello! This is ", "The answer broke off. The connection was cut. Please try again."),
    ),
    "simulator killed and restarted between tries": Row(_restarted, Seen("fine", "", (AGAIN, "Answering"))),
    "simulator killed and not restarted": Row(_never_back, Seen("", REFUSED, (AGAIN, "Failed"))),
    "slow": Row(_slow, Seen("0 1 2 ")),
    "half-open": Row(_half_open, Seen("", "OpenRouter did not answer in time. Please try again.")),
    "silent in mid-answer": Row(
        _falls_silent,
        Seen(
            "Hello! This is ",
            "The answer broke off. Nothing more came for too long. Please try again.",
        ),
    ),
    "TLS: nobody vouches for the certificate": Row(
        _self_signed,
        Seen("", f"{UNREACHABLE} Its certificate could not be verified. Please try again."),
    ),
    "TLS: plain HTTP": Row(_no_tls, Seen("", REFUSED)),
    "DNS": Row(_no_name, Seen("", f"{UNREACHABLE} Its name could not be resolved. Please try again.")),
    "Redis gone": Row(_redis_gone, Seen("fine")),
    "database gone": Row(_database_gone, Seen("fine")),
    "disk full": Row(_disk_full, Seen("fine")),
    "emitter raises": Row(_emitter_raises, Seen(SOURCES)),
    "emitter hangs": Row(_emitter_hangs, Seen(SOURCES)),
    "tool hangs": Row(_tool_hangs, Seen(quoted(LATE))),
    "tool does not end when it is told to": Row(_tool_does_not_end, Seen(quoted(LATE))),
    "tool raises": Row(_tool_raises, Seen(quoted("Error: ZeroDivisionError: division by zero"))),
}


@pytest.fixture
async def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    """An empty world."""
    monkeypatch.setenv("WEBUI_SECRET_KEY", "the secret of this server")
    async with contextlib.AsyncExitStack() as ends:
        yield World(tmp_path, ends, monkeypatch)


@pytest.mark.parametrize("name", TABLE)
async def test_what_a_person_sees(name: str, world: World) -> None:
    row = TABLE[name]
    assert await row.fault(world) == row.sees


# An event loop that closes in mid-answer: in a process of its own, whose last words count

CLOSING: Final = """
import asyncio, gc, sys
import pytest_bootstrap
from openrouter_responses_pipe.openrouter_responses_pipe import Pipe
from openrouter_responses_pipe.webui import SimulatorServer
from pathlib import Path
from tests.support import Answer, ask, read_until_text, set_valves, stream

server = SimulatorServer(Path(sys.argv[1]))
server.launch()
pipe = Pipe()
set_valves(pipe, server.base_url)
loop = asyncio.new_event_loop()
asyncio.set_event_loop(loop)
chunks = loop.run_until_complete(stream(pipe, "[[drip rate=50 tokens=2000]]"))
loop.run_until_complete(read_until_text(chunks, Answer()))
END
asyncio.set_event_loop(None)
gc.collect()
answer = asyncio.run(ask(pipe, "[[plain text=fine]]"))
print(repr((answer.text, answer.error)))
server.stop()
"""
# how a server ends its loop: as asyncio.run does, or not at all
ENDINGS: Final = {
    "all tasks are cancelled first": """
for task in asyncio.all_tasks(loop): task.cancel()
loop.run_until_complete(asyncio.sleep(0.05))
loop.run_until_complete(loop.shutdown_asyncgens())
loop.close()
""",
    "the reader has gone": """
del chunks
gc.collect()
loop.run_until_complete(asyncio.sleep(0.1))
loop.close()
""",
    "closed": "loop.close()",
}


@pytest.mark.parametrize("how", ENDINGS)
def test_an_event_loop_that_closes_in_mid_answer(how: str, tmp_path: Path) -> None:
    code = CLOSING.replace("END", ENDINGS[how].strip())
    done = run_alone(code, tmp_path / "simulator.log")
    assert (done.returncode, done.stdout, done.stderr) == (0, "('fine', '')\n", "")
