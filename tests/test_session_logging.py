"""Whose line is whose, how long it is kept, and that nobody ever waits for a log."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import itertools
import json
import logging
import re
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from openrouter_responses_pipe.openrouter_responses_pipe import (
    LOGGER,
    LogContext,
    Pipe,
    SessionLogger,
    UserValves,
)
from openrouter_responses_pipe.simulator import Simulator
from pytest_bootstrap import host_database
from tests import engines
from tests.bench.hosting import Loaded, forget, load, publish
from tests.recorded import Clock
from tests.support import (
    DIALECTS,
    MODEL,
    PATIENCE_S,
    STREAMING,
    Answer,
    Events,
    all_ended,
    arguments,
    ask,
    call,
    inferences,
    read_rest,
    read_until_text,
    running_pipe,
    set_valves,
    stream,
)

Json = dict[str, Any]
ROOT: Final = Path(__file__).parents[1]
NAME: Final = "openrouter_responses_pipe"
ANN: Final = LogContext("page-1", "ann", "aaaa1111")
BOB: Final = LogContext("page-2", "bob", "bbbb2222")
MOST: Final = 2_000
FAILS: Final = "[[http_error name=500_masked]]"
IN_A_CHAT: Final = ["browser", "browser_json"]
MARKS_RE: Final = re.compile(r" \[request ([0-9a-f]{8}), user (\S+), session (\S+)\]")


class ServersLog(logging.Handler):
    """What a server does with our lines: keep them, or hang or fail as long as a test wants it to."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[logging.LogRecord] = []
        self.goes_on = threading.Event()
        self.goes_on.set()
        self.hangs = threading.Event()
        self.fails = False
        self._awaited: tuple[str, Callable[[], Any]] = "nothing begins so", lambda: None

    async def has(self, beginning: str) -> None:
        """Wait until there is a line that begins so."""
        loop, found = asyncio.get_running_loop(), asyncio.Event()
        self._awaited = beginning, lambda: loop.call_soon_threadsafe(found.set)
        if not any(text.startswith(beginning) for text in _now(self)):
            await asyncio.wait_for(found.wait(), PATIENCE_S)

    def emit(self, record: logging.LogRecord) -> None:
        """Take one line."""
        if not self.goes_on.is_set():
            self.hangs.set()
            self.goes_on.wait()
            self.hangs.clear()
        if self.fails:
            raise OSError("no space is left on the device")
        self.lines.append(record)
        beginning, tell = self._awaited
        if record.getMessage().startswith(beginning):
            tell()

    def texts(self) -> list[str]:
        """What has been written, when everything that was logged before is."""
        written()
        return [record.getMessage() for record in self.lines]

    def hang(self) -> None:
        """Take the next line and no further one, until `go_on`; that line is taken before this returns."""
        self.goes_on.clear()
        LOGGER.error("this line hangs")
        assert self.hangs.wait(PATIENCE_S)

    def go_on(self) -> None:
        """Take lines again."""
        self.goes_on.set()


def written() -> None:
    """Wait until what has been logged is written; a second is not always enough for ten thousand lines."""
    for handler in tuple(LOGGER.handlers):
        for _ in range(10):
            started = time.monotonic()
            handler.flush()
            if time.monotonic() - started < 0.9:
                break


@pytest.fixture
def server_log() -> Iterator[ServersLog]:
    """The server's log, which shows everything."""
    public, log = logging.getLogger(NAME), ServersLog()
    before, propagates = public.level, public.propagate
    public.setLevel(logging.DEBUG)
    public.propagate = False
    public.addHandler(log)
    yield log
    log.fails = False
    log.go_on()
    public.removeHandler(log)
    public.propagate = propagates
    public.setLevel(before)


@pytest.fixture
def clock() -> Clock:
    """The clock of the logger."""
    return Clock()


@pytest.fixture
def logs(clock: Clock) -> Iterator[SessionLogger]:
    """A logger that takes all lines."""
    logger = SessionLogger(clock)
    logger.least = logging.DEBUG
    logger.start()
    yield logger
    logger.stop()
    logger.flush()


def shown(logs: SessionLogger, context: LogContext) -> list[str]:
    """The lines of a request as people read them, without the time."""
    lines = logs.flush_for_citation(context).splitlines()
    assert all(re.match(r"\d\d:\d\d:\d\d\.\d{3} [A-Z]+ ", line) for line in lines)
    return [line.partition(" ")[2] for line in lines]


def log_threads() -> set[threading.Thread]:
    """The threads that write logs of ours."""
    return {thread for thread in threading.enumerate() if thread.name == "openrouter log"}


# Whose line it is


@pytest.mark.parametrize(
    ("context", "marks"),
    [
        (ANN, " [request aaaa1111, user ann, session page-1]"),
        (ANN._replace(session=""), " [request aaaa1111, user ann]"),
        (ANN._replace(user=""), " [request aaaa1111, session page-1]"),
        (LogContext(request="aaaa1111"), " [request aaaa1111]"),
        (LogContext("page-1", "ann"), ""),
        (LogContext(), ""),
    ],
)
def test_a_line_carries_what_is_known_of_its_request(
    context: LogContext, marks: str, logs: SessionLogger, server_log: ServersLog
) -> None:
    with logs.bind(context, MOST):
        LOGGER.info("%d items", 3)
    LOGGER.info("nobody's")
    assert server_log.texts() == [f"3 items{marks}", "nobody's"]


async def test_lines_of_tasks_and_threads_that_are_made_inside(
    logs: SessionLogger, server_log: ServersLog
) -> None:
    gate = asyncio.Event()

    async def later() -> None:
        await gate.wait()
        LOGGER.info("after the end")

    with logs.bind(ANN, MOST):
        async with asyncio.TaskGroup() as group:
            group.create_task(asyncio.to_thread(LOGGER.info, "in a thread"))
        await asyncio.create_task(asyncio.sleep(0, LOGGER.info("in a coroutine")))
        thread = threading.Thread(target=contextvars.copy_context().run, args=(LOGGER.info, "with a copy"))
        thread.start()
        thread.join()
        outlives = asyncio.create_task(later())
    gate.set()
    await outlives
    expected = ["in a thread", "in a coroutine", "with a copy", "after the end"]
    assert server_log.texts() == [line + ANN.marks for line in expected]
    assert shown(logs, ANN) == [f"INFO {line}" for line in expected]


@pytest.mark.parametrize("sessions", ["one", "several"])
async def test_requests_at_once_never_mix(sessions: str, logs: SessionLogger, server_log: ServersLog) -> None:
    contexts = [
        LogContext("page" if sessions == "one" else f"page-{number}", f"user-{number}", f"{number:08x}")
        for number in range(20)
    ]
    everybody = asyncio.Barrier(len(contexts))

    async def request(context: LogContext) -> None:
        with logs.bind(context, MOST):
            for step in range(10):
                await everybody.wait()
                LOGGER.info("%s step %d", context.request, step)
                await asyncio.to_thread(LOGGER.info, "%s thread %d", context.request, step)

    async with asyncio.timeout(PATIENCE_S):
        await asyncio.gather(*map(request, contexts))
    texts = server_log.texts()
    assert len(texts) == 20 * len(contexts)
    for text in texts:
        match = MARKS_RE.search(text)
        assert match
        assert (text[:8], match[2]) == (match[1], f"user-{int(match[1], 16)}")
    for context in contexts:
        lines = shown(logs, context)
        assert len(lines) == 20
        assert {line.split()[1] for line in lines} == {context.request}


async def test_requests_of_a_pipe_at_once_never_mix(
    simulator: Simulator, server_log: ServersLog, pipe: Pipe
) -> None:
    """Each of sixty requests fails with a word of its own; nobody's log has another's."""
    set_valves(pipe, simulator.base_url, SHOW_ERROR_LOG_CITATION="everyone")
    givens = []
    for number in range(60):
        given = arguments(f"[[failed message=word{number}x after=1]]", IN_A_CHAT[number % 2])
        given["__user__"]["id"] = f"user-{number}"
        given["__metadata__"] |= {"session_id": f"page-{number % 7}", "chat_id": f"chat-{number}"}
        givens.append(given)
    answers = await asyncio.gather(*(call(pipe, given) for given in givens))
    texts = server_log.texts()
    for number, (given, answer) in enumerate(zip(givens, answers, strict=True)):
        own = [text for text in texts if f"user user-{number}," in text]
        assert {match[1] for text in own if (match := MARKS_RE.search(text))} == {answer.error_id}
        assert {match[3] for text in own if (match := MARKS_RE.search(text))} == {f"page-{number % 7}"}
        assert {word for text in own for word in re.findall(r"word\d+x", text)} == {f"word{number}x"}
        [source] = given["__event_emitter__"].of("source")
        assert set(re.findall(r"word\d+x", source["document"][0])) == {f"word{number}x"}


async def test_what_a_runtime_does_for_itself_is_nobodys(
    simulator: Simulator, server_log: ServersLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The catalog fails and so does the table: both are first wanted by somebody's request."""
    monkeypatch.setenv("WEBUI_SECRET_KEY", "the secret of this server")
    simulator.next("http_error", name="502_html", on="/models", times=3)
    (tmp_path / "webui.db").write_text("This is no database. " * 1_000)
    async with engines.host_engine(f"sqlite+aiosqlite:///{tmp_path / 'webui.db'}") as engine:
        host_database.use(engine)
        try:
            async with running_pipe(simulator.base_url, MODEL_CATALOG_REFRESH_SECONDS=60) as pipe:
                answer = await ask(pipe, {"messages": _hello(), "model": "openrouter.openai/gpt-5-mini"})
                assert answer.error == ""
                services = ("The model list could not be loaded", "Artifacts cannot be kept")
                for words in services:
                    await server_log.has(words)
        finally:
            host_database.reset()
    lines = [text for text in server_log.texts() if text.startswith(services)]
    assert len(lines) == 2
    assert [text for text in lines if "[request" in text] == []
    assert any("[request" in text for text in server_log.texts())


def _hello() -> list[Json]:
    return [{"role": "user", "content": "[[reasoning]]"}]


def _now(log: ServersLog) -> list[str]:
    return [record.getMessage() for record in tuple(log.lines)]


# What is kept


def test_a_session_keeps_its_latest_lines(logs: SessionLogger) -> None:
    with logs.bind(ANN, 100):
        for number in range(250):
            LOGGER.debug("line %d", number)
    assert shown(logs, ANN) == [f"DEBUG line {number}" for number in range(150, 250)]


def test_the_requests_of_a_session_share_its_lines(logs: SessionLogger) -> None:
    second = ANN._replace(request="cccc3333")
    with logs.bind(ANN, 100):
        for number in range(100):
            LOGGER.info("first %d", number)
    with logs.bind(second, 100):
        for number in range(30):
            LOGGER.info("second %d", number)
    with logs.bind(BOB, 100):
        LOGGER.info("elsewhere")
    assert shown(logs, ANN) == [f"INFO first {number}" for number in range(30, 100)]
    assert shown(logs, second) == [f"INFO second {number}" for number in range(30)]
    assert shown(logs, BOB) == ["INFO elsewhere"]


@pytest.mark.parametrize(("most", "left"), [(100, range(190, 290)), (20_000, range(290))])
def test_another_number_of_lines_counts_at_once(most: int, left: range, logs: SessionLogger) -> None:
    """A valve is changed while a request runs: the next one of the session brings it."""
    numbers = itertools.count()

    def write(count: int) -> None:
        for _ in range(count):
            LOGGER.info("line %d", next(numbers))

    with logs.bind(ANN, 500):
        write(200)
        with logs.bind(ANN, most):
            write(50)
        write(40)
    assert shown(logs, ANN) == [f"INFO line {number}" for number in left]


def test_a_session_is_forgotten_an_hour_after_its_last_request(logs: SessionLogger, clock: Clock) -> None:
    with logs.bind(ANN, MOST):
        LOGGER.info("hers")
    clock.now = 1_800.0
    with logs.bind(BOB, MOST):
        LOGGER.info("his")
    clock.now = 3_600.0
    logs.cleanup()
    assert (shown(logs, ANN), shown(logs, BOB)) == (["INFO hers"], ["INFO his"])
    clock.now = 3_601.0
    logs.cleanup()
    assert (shown(logs, ANN), shown(logs, BOB)) == ([], ["INFO his"])
    with logs.bind(BOB, MOST):
        LOGGER.info("again")
    clock.now = 6_000.0
    logs.cleanup()
    assert shown(logs, BOB) == ["INFO his", "INFO again"]
    clock.now = 7_202.0
    logs.cleanup()
    assert list(logs.logs) == []


def test_the_next_request_of_anybody_forgets_what_is_old(logs: SessionLogger, clock: Clock) -> None:
    with logs.bind(ANN, MOST):
        LOGGER.info("hers")
    clock.now = 3_601.0
    with logs.bind(BOB, MOST):
        assert list(logs.logs) == [("bob", "page-2")]


def test_a_request_of_more_than_an_hour_keeps_its_lines(logs: SessionLogger, clock: Clock) -> None:
    """An answer may take an hour, and it is at its end that its log is wanted."""
    with logs.bind(ANN, MOST):
        clock.now = 3_000.0
        LOGGER.info("still at work")
        clock.now = 3_700.0
        logs.cleanup()
        LOGGER.info("it failed")
        assert shown(logs, ANN) == ["INFO still at work", "INFO it failed"]


def test_the_number_of_sessions_is_bounded(logs: SessionLogger, server_log: ServersLog) -> None:
    for number in range(3_000):
        context = LogContext(f"page-{number}", "ann", f"{number:08x}")
        with logs.bind(context, MOST):
            LOGGER.info("line")
            assert shown(logs, context) == ["INFO line"]
    assert len(logs.logs) <= 1_501
    assert next(reversed(logs.logs)) == ("ann", "page-2999")
    assert len(server_log.texts()) == 3_000


def test_a_very_long_line_is_cut(logs: SessionLogger) -> None:
    with logs.bind(ANN, MOST):
        LOGGER.info("x" * 1_000_000)
    [line] = shown(logs, ANN)
    assert line.startswith("INFO xxx")
    assert len(line) < 4_100


# A log that is slow, hangs or fails


async def test_a_log_that_hangs_holds_up_no_chat(
    pipe: Pipe, simulator: Simulator, server_log: ServersLog
) -> None:
    """Lines wait, then they are dropped; both are none of the business of a hundred chats."""
    assert (await ask(pipe, "hello")).error == ""
    server_log.texts()
    server_log.lines.clear()
    server_log.hang()
    for number in range(9_990):
        LOGGER.error("line %d", number)
    started = time.monotonic()
    async with asyncio.timeout(60):
        answers = await asyncio.gather(*(ask(pipe, "[[plain text=fine]]") for _ in range(100)))
    assert {(answer.text, answer.error) for answer in answers} == {("fine", "")}
    assert time.monotonic() - started < 30
    assert server_log.hangs.is_set()
    assert len(server_log.lines) == 0
    server_log.go_on()
    texts = server_log.texts()
    assert texts[1:9_991] == [f"line {number}" for number in range(9_990)]
    LOGGER.error("it goes on")
    *others, last = server_log.texts()[9_991:]
    match = re.search(r"before this line (\d+) were dropped", last)
    assert match
    assert last.startswith("it goes on")
    assert len(others) == 10
    assert int(match[1]) >= 90


def test_lines_that_do_not_fit_are_dropped_and_counted(logs: SessionLogger, server_log: ServersLog) -> None:
    server_log.hang()
    with logs.bind(ANN, MOST):
        for number in range(10_123):
            LOGGER.info("line %d", number)
    assert len(shown(logs, ANN)) == MOST  # the session has them
    server_log.go_on()
    server_log.texts()
    LOGGER.info("first")
    LOGGER.info("second")
    texts = server_log.texts()
    assert texts[1:10_001] == [f"line {number}{ANN.marks}" for number in range(10_000)]
    assert re.fullmatch(r"first \(before this line 123 were dropped: .*\)", texts[10_001])
    assert texts[10_002:] == ["second"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_log_that_raises_gets_the_next_line_all_the_same(
    logs: SessionLogger, server_log: ServersLog
) -> None:
    LOGGER.info("one")
    assert server_log.texts() == ["one"]
    server_log.fails = True
    LOGGER.info("two")
    written()
    server_log.fails = False
    LOGGER.info("three")
    assert [text.partition(" ")[0] for text in server_log.texts()] == ["one", "three"]


class Unsayable:
    """Something that cannot be said in words."""

    def __str__(self) -> str:
        raise ValueError("no words")


def test_a_line_that_cannot_be_said_harms_nobody(logs: SessionLogger, server_log: ServersLog) -> None:
    with logs.bind(ANN, MOST):
        LOGGER.info("this is %s", Unsayable())
        LOGGER.info("that is fine")
    assert server_log.texts()[-1] == f"that is fine{ANN.marks}"
    assert shown(logs, ANN)[-1] == "INFO that is fine"


def test_to_wait_for_a_log_that_hangs_takes_two_seconds_at_most(
    logs: SessionLogger, server_log: ServersLog
) -> None:
    server_log.hang()
    for _ in range(10_100):
        LOGGER.info("line")
    started = time.monotonic()
    logs.flush()
    assert time.monotonic() - started < 3
    server_log.go_on()
    assert len(server_log.texts()) == 10_001


# Lines that somebody would like to forge

FORGED: Final = "fine\n12:00:00.000 ERROR forged\r\n\x1b[2Jcleared\x00\x85\u2028more"


def _is_one_line(text: str) -> bool:
    return len(text.splitlines()) == 1 and text.isprintable()


def test_a_message_cannot_begin_a_line_of_its_own(logs: SessionLogger, server_log: ServersLog) -> None:
    with logs.bind(ANN, MOST):
        LOGGER.info("it said: %s", FORGED)
        LOGGER.info(f"it said: {FORGED.replace('%', '%%')}")
    assert [_is_one_line(text) for text in server_log.texts()] == [True, True]
    assert [_is_one_line(line) for line in shown(logs, ANN)] == [True, True]


@pytest.mark.parametrize("name", ["session", "user"])
def test_the_name_of_a_session_cannot_begin_a_line_of_its_own(
    name: str, logs: SessionLogger, server_log: ServersLog
) -> None:
    with logs.bind(ANN._replace(**{name: FORGED}), MOST):
        LOGGER.info("a line")
    [text] = server_log.texts()
    assert _is_one_line(text)


async def test_a_client_that_names_its_session_badly(pipe: Pipe, server_log: ServersLog) -> None:
    given = arguments("hello")
    given["__metadata__"]["session_id"] = FORGED + "x" * 100_000
    assert (await call(pipe, given)).error == ""
    texts = server_log.texts()
    assert any(text.startswith("usage {") for text in texts)
    assert [text[:200] for text in texts if not _is_one_line(text) or len(text) > 2_000] == []


def test_an_exception_cannot_begin_a_line_of_its_own(logs: SessionLogger) -> None:
    with logs.bind(ANN, MOST):
        try:
            raise ValueError(FORGED)
        except ValueError:
            LOGGER.exception("it failed")
    first, *others = logs.flush_for_citation(ANN).split("\n")
    assert first.endswith("ERROR it failed")
    assert any("ValueError" in line for line in others)
    assert [line for line in others if line.strip() and not line.startswith(" ")] == []
    assert [line for line in others if not line.isprintable()] == []


# Taking over and ending


def test_starting_and_stopping_may_be_repeated(server_log: ServersLog) -> None:
    before = log_threads()
    logger = SessionLogger()
    for number in range(3):
        logger.start()
        logger.start()
        assert len(log_threads() - before) <= 2  # one may still be ending
        LOGGER.warning("round %d", number)
        written()
        logger.stop()
        logger.stop()
        assert logger not in LOGGER.handlers
    assert [record.getMessage() for record in server_log.lines] == ["round 0", "round 1", "round 2"]
    for thread in log_threads() - before:
        thread.join(PATIENCE_S)
    assert log_threads() <= before


def test_what_waits_is_written_when_it_is_stopped(server_log: ServersLog) -> None:
    before = log_threads()
    logger = SessionLogger()
    logger.start()
    server_log.hang()
    for number in range(100):
        LOGGER.info("line %d", number)
    logger.stop()
    server_log.go_on()
    for thread in log_threads() - before:
        thread.join(PATIENCE_S)
    assert _now(server_log)[1:] == [f"line {number}" for number in range(100)]


def test_the_thread_of_a_log_that_hung_ends_when_it_goes_on(server_log: ServersLog) -> None:
    before = log_threads()
    logger = SessionLogger()
    logger.start()
    server_log.hang()
    for _ in range(10_100):
        LOGGER.info("line")
    logger.stop()
    server_log.go_on()
    try:
        for thread in log_threads() - before:
            thread.join(3)
        assert log_threads() <= before
    finally:  # so that no later test sees it
        logger.start()
        logger.stop()
        logger.start()
        logger.stop()


def test_lines_go_to_the_servers_log_while_nobody_takes_them(server_log: ServersLog) -> None:
    assert LOGGER.handlers == []
    LOGGER.warning("nobody's")
    assert [record.getMessage() for record in server_log.lines] == ["nobody's"]
    logging.getLogger(NAME).setLevel(logging.ERROR)
    LOGGER.warning("not shown")
    assert not LOGGER.isEnabledFor(logging.WARNING)
    assert len(server_log.lines) == 1


EXIT: Final = """
import asyncio, logging, sys, threading, time
import pytest_bootstrap
from openrouter_responses_pipe.openrouter_responses_pipe import LOGGER, Pipe, SessionLogger

sink, owner, count = sys.argv[1], sys.argv[2], int(sys.argv[3])

class Log(logging.Handler):
    def handle(self, record):
        if sink == "hangs":
            threading.Event().wait()
        if sink == "slow":
            time.sleep(0.002)
        sys.stdout.write(record.getMessage() + "\\n")

logging.getLogger("openrouter_responses_pipe").addHandler(Log())

async def serve():
    pipe = Pipe()
    await pipe.pipes()
    return pipe

if owner == "pipe":
    kept = asyncio.run(serve())
else:
    kept = SessionLogger()
    kept.start()
for number in range(count):
    LOGGER.warning("line %d", number)
"""


def _exit(sink: str, owner: str, count: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", EXIT, sink, owner, str(count)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize(("sink", "count"), [("quick", 3_000), ("slow", 100)])
@pytest.mark.parametrize(
    "owner",
    [
        pytest.param(
            "pipe",
        ),
        "logger",
    ],
)
def test_a_process_that_ends_writes_what_waits(owner: str, sink: str, count: int) -> None:
    done = _exit(sink, owner, count)
    assert (done.returncode, done.stderr) == (0, "")
    expected = [f"line {number}" for number in range(count)]
    assert [line for line in done.stdout.splitlines() if line.startswith("line ")] == expected


@pytest.mark.parametrize("owner", ["pipe", "logger"])
def test_a_process_ends_also_while_its_log_hangs(owner: str) -> None:
    done = _exit("hangs", owner, 100)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


async def test_several_runtimes_of_one_load_write_each_line_once(
    simulator: Simulator, server_log: ServersLog
) -> None:
    """Of the handlers that LOGGER has then, one takes a line; the first to go takes nobody's with it."""
    before = asyncio.all_tasks()
    pipes = {name: Pipe() for name in ("first", "second", "third")}
    for pipe in pipes.values():
        set_valves(pipe, simulator.base_url)
    expected: dict[str, int] = {}
    for left in (["first", "second", "third"], ["second", "third"], ["third"]):
        await asyncio.gather(*(_ask_as(name, pipes[name], name) for name in left))
        LOGGER.warning("nobody's")
        expected |= {name: expected.get(name, 0) + 1 for name in left}
        assert _usage_lines(server_log) == expected
        assert len(LOGGER.handlers) == len(left)
        await pipes[left[0]].aclose()
    assert _now(server_log).count("nobody's") == 3
    await all_ended(before, services_too=True)


async def _ask_as(user_id: str, pipe: Any, function_id: str = "openrouter") -> Answer:
    given = arguments("hello", model=f"{function_id}.{MODEL}")
    given["__user__"]["id"] = user_id
    return await call(pipe, given)


def _usage_lines(log: ServersLog) -> dict[str, int]:
    counts: dict[str, int] = {}
    for text in log.texts():
        match = MARKS_RE.search(text)
        if match and text.startswith("usage {"):
            counts[match[2]] = counts.get(match[2], 0) + 1
    return counts


@pytest.fixture
def loads(simulator: Simulator) -> Iterator[Callable[[str], Loaded]]:
    """Loads the file as saving a function does."""
    ids: set[str] = set()

    def one(function_id: str) -> Loaded:
        ids.add(function_id)
        loaded = load(function_id)
        publish(loaded)
        set_valves(loaded.pipe, simulator.base_url)
        return loaded

    yield one
    for function_id in ids:
        forget(function_id)


@pytest.mark.parametrize("second_id", ["openrouter", "other"])
async def test_two_loads_of_the_file_write_each_line_once(
    second_id: str, loads: Callable[[str], Loaded], server_log: ServersLog
) -> None:
    """One that was replaced still ends its answers: with a logger of its own, into the same log."""
    before = log_threads()
    old, new = loads("openrouter"), loads(second_id)
    chunks = await stream(old.pipe, "[[drip rate=200 tokens=60]]")
    answer = await read_until_text(chunks, Answer())
    assert (await _ask_as("new", new.pipe)).error == ""
    await read_rest(chunks, answer)
    assert answer.error == ""
    for loaded in (old, new):
        loaded.module.LOGGER.warning("of one load")
        for handler in tuple(loaded.module.LOGGER.handlers):
            handler.flush()
    assert _usage_lines(server_log) == {"user": 1, "new": 1}
    assert _now(server_log).count("of one load") == 2
    await old.pipe.aclose()
    await new.pipe.aclose()
    for thread in log_threads() - before:
        thread.join(PATIENCE_S)
    assert log_threads() <= before


# What is shown of a log


SECRETS: Final[dict[str, str]] = {
    "key": "sk-or-v1-0123456789abcdef0123456789abcdef",
    "user": "ann-of-the-third-floor",
    "session": "Zq8_page-of-ann-AAAB",
    "chat": str(uuid.UUID(int=7)),
    "provider's user": "user_2AbCdEfGhIj",
    "organisation": "org_9XyZ01234",
}


def test_what_is_shown_has_no_key_and_no_id(logs: SessionLogger) -> None:
    context = LogContext(SECRETS["session"], SECRETS["user"], "aaaa1111")
    with logs.bind(context, MOST):
        for name, secret in SECRETS.items():
            LOGGER.info("%s: %s; %s", name, secret, {"it": [secret]})
        try:
            raise ValueError(" ".join(SECRETS.values()))
        except ValueError:
            LOGGER.exception("all of them")
    text = logs.flush_for_citation(context)
    assert [name for name, secret in SECRETS.items() if secret in text] == []
    assert [name for name in SECRETS if f"INFO {name}: […]; {{'it': ['[…]']}}" not in text] == []
    assert "ValueError: […]" in text


def test_only_the_lines_of_the_request_are_shown(logs: SessionLogger) -> None:
    second = ANN._replace(request="cccc3333")
    with logs.bind(ANN, MOST):
        LOGGER.info("one")
        with logs.bind(second, MOST):
            LOGGER.info("two")
        LOGGER.info("three")
    LOGGER.info("nobody's")
    assert shown(logs, ANN) == ["INFO one", "INFO three"]
    assert shown(logs, second) == ["INFO two"]
    assert logs.flush_for_citation(ANN._replace(request="dddd4444")) == ""
    assert logs.flush_for_citation(ANN._replace(session="page-9")) == ""


def test_a_log_can_be_read_while_threads_write_it(logs: SessionLogger) -> None:
    stop = threading.Event()

    def write() -> None:
        for number in itertools.count():
            LOGGER.debug("line %d", number)
            if stop.is_set():
                break

    logs.least = logging.ERROR
    with logs.bind(ANN._replace(level=logging.ERROR), 20_000):
        threads = [
            threading.Thread(target=contextvars.copy_context().run, args=(write,), daemon=True)
            for _ in range(2)
        ]
        for thread in threads:
            thread.start()
        try:
            for _ in range(100):
                logs.flush_for_citation(ANN)
        finally:
            stop.set()
            for thread in threads:
                thread.join()
    assert shown(logs, ANN)


class Journal(Events):
    """An emitter that also notes, between its events, when the answer named an error."""

    def kinds(self) -> list[str]:
        """What came, statuses aside."""
        return [event["type"] for event in self if event["type"] != "status"]


async def _failing(pipe: Pipe, dialect: str, role: str, prompt: str = FAILS) -> tuple[Answer, Journal]:
    journal = Journal()
    given: Json = arguments(prompt, dialect) | {"__event_emitter__": journal}
    given["__user__"] |= {"role": role, "id": SECRETS["user"]}
    given["__metadata__"]["session_id"] = SECRETS["session"]
    answer = Answer()
    result = await pipe.pipe(**given)
    if isinstance(result, dict):
        answer.add(result)
        journal.append({"type": "the error", "data": answer.error})
        return answer, journal
    async for chunk in result:
        answer.add(chunk)
        if chunk.get("error"):
            journal.append({"type": "the error", "data": answer.error})
    return answer, journal


READERS: Final = [
    ("off", "admin", False),
    ("off", "user", False),
    ("admins", "admin", True),
    ("admins", "user", False),
    ("everyone", "admin", True),
    ("everyone", "user", True),
]


@pytest.mark.parametrize("dialect", IN_A_CHAT)
@pytest.mark.parametrize(("readers", "role", "may_read"), READERS)
async def test_who_gets_the_log_of_a_request_that_failed(
    readers: str, role: str, may_read: bool, dialect: str, simulator: Simulator, pipe: Pipe
) -> None:
    set_valves(pipe, simulator.base_url, SHOW_ERROR_LOG_CITATION=readers, API_KEY=SECRETS["key"])
    answer, journal = await _failing(pipe, dialect, role)
    assert answer.error
    assert journal.kinds() == (["source"] if may_read else []) + ["the error"]
    for source in journal.of("source"):
        name = f"Log of request {answer.error_id}"
        assert (source["source"], source["metadata"]) == ({"name": name}, [{"source": name}])
        [text] = source["document"]
        lines = text.splitlines()
        assert all(re.match(r"\d\d:\d\d:\d\d\.\d{3} [A-Z]+ \S", line) for line in lines)
        assert any("INFO failed: " in line for line in lines)
        assert any("DEBUG asking /responses" in line for line in lines)
        assert [name for name, secret in SECRETS.items() if secret in text] == []


@pytest.mark.parametrize("dialect", sorted(set(DIALECTS) - set(IN_A_CHAT)))
async def test_a_program_gets_no_log(dialect: str, simulator: Simulator, pipe: Pipe) -> None:
    set_valves(pipe, simulator.base_url, SHOW_ERROR_LOG_CITATION="everyone")
    simulator.next("http_error", name="500_masked", tasks=True)
    answer, journal = await _failing(pipe, dialect, "admin")
    assert answer.error
    assert set(journal.kinds()) == {"the error"}
    assert "asking /responses" not in str(answer.chunks)


async def test_a_request_that_ends_well_shows_no_log(simulator: Simulator, pipe: Pipe) -> None:
    set_valves(pipe, simulator.base_url, SHOW_ERROR_LOG_CITATION="everyone")
    given = arguments("hello")
    assert (await call(pipe, given)).error == ""
    assert given["__event_emitter__"].of("source") == []


class Broken(dict[str, Any]):
    """Something of the host's that is not what it was."""

    def get(self, *_name: Any) -> Any:
        """Fail."""
        raise RuntimeError("the host has changed")


async def test_a_bug_is_shown_with_its_traceback(simulator: Simulator, pipe: Pipe) -> None:
    set_valves(pipe, simulator.base_url, SHOW_ERROR_LOG_CITATION="admins")
    given = arguments({"messages": [Broken(role="user", content="hello")]})
    given["__user__"]["role"] = "admin"
    answer = await call(pipe, given)
    [source] = given["__event_emitter__"].of("source")
    assert answer.error.startswith("Something went wrong inside this function.")
    assert source["source"]["name"] == f"Log of request {answer.error_id}"
    assert "Traceback (most recent call last)" in source["document"][0]
    assert "RuntimeError: the host has changed" in source["document"][0]


# The levels


LEVELS: Final = [
    ("INFO", None, False, {"INFO"}),
    ("DEBUG", None, False, {"DEBUG", "INFO"}),
    ("WARNING", None, True, set()),
    ("ERROR", "DEBUG", True, {"DEBUG", "INFO"}),
    ("ERROR", "DEBUG", False, set()),
    ("DEBUG", "ERROR", True, set()),
    ("DEBUG", "ERROR", False, {"DEBUG", "INFO"}),
    ("INFO", "inherit", True, {"INFO"}),
    ("LOUD", None, False, {"INFO"}),
]


@pytest.mark.parametrize(("stored", "own", "is_admin", "levels"), LEVELS)
async def test_the_level_of_a_request(
    stored: str, own: str | None, is_admin: bool, levels: set[str], simulator: Simulator,
    pipe: Pipe, server_log: ServersLog,
) -> None:  # fmt: skip
    set_valves(pipe, simulator.base_url, LOG_LEVEL=stored, SHOW_ERROR_LOG_CITATION="everyone")
    given = arguments(FAILS)
    given["__user__"]["role"] = "admin" if is_admin else "user"
    if own is not None:
        given["__user__"]["valves"] = UserValves.model_validate({"LOG_LEVEL": own})
    assert (await call(pipe, given)).error
    server_log.texts()
    found = {record.levelname for record in server_log.lines if MARKS_RE.search(record.getMessage())}
    assert found == levels
    [source] = given["__event_emitter__"].of("source")
    assert " DEBUG " in source["document"][0]  # what is kept does not depend on it


async def test_the_level_of_one_is_not_that_of_another(
    simulator: Simulator, pipe: Pipe, server_log: ServersLog
) -> None:
    set_valves(pipe, simulator.base_url, LOG_LEVEL="WARNING")

    async def one(number: int) -> None:
        given = arguments("hello")
        given["__user__"] |= {"id": f"user-{number}", "role": "admin"}
        if number % 2:
            given["__user__"]["valves"] = UserValves.model_validate({"LOG_LEVEL": "DEBUG"})
        assert (await call(pipe, given)).error == ""

    await asyncio.gather(*map(one, range(20)))
    users = {match[2] for text in server_log.texts() if (match := MARKS_RE.search(text))}
    assert users == {f"user-{number}" for number in range(1, 20, 2)}


async def test_the_level_of_what_is_nobodys(simulator: Simulator, pipe: Pipe, server_log: ServersLog) -> None:
    for level, seen in {"ERROR": [], "WARNING": ["careful"], "DEBUG": ["careful", "aside"]}.items():
        set_valves(pipe, simulator.base_url, LOG_LEVEL=level)
        assert (await ask(pipe, "hello")).error == ""
        server_log.texts()
        server_log.lines.clear()
        LOGGER.warning("careful")
        LOGGER.debug("aside")
        assert [text for text in server_log.texts() if text in ("careful", "aside")] == seen


# The console of the browser


class Page:
    """A page that is asked to run code; it may take as long as it likes."""

    def __init__(self, answers: bool = True, fails: bool = False) -> None:
        self.events: list[Json] = []
        self.asked = asyncio.Event()
        self.left = asyncio.Event()
        self._answers, self._fails = answers, fails

    async def __call__(self, event: Json) -> Any:
        """Take one event."""
        self.events.append(event)
        self.asked.set()
        try:
            if self._fails:
                raise ConnectionError("the page is gone")
            if not self._answers:
                await asyncio.Event().wait()
        finally:
            self.left.set()

    def printed(self) -> tuple[str, str]:
        """The two texts that are printed, of the one event that came."""
        [event] = self.events
        assert (event["type"], set(event["data"])) == ("execute", {"code"})
        code = event["data"]["code"]
        assert code.isascii()
        assert code.startswith("console.debug(")
        assert code.endswith(")")
        title, lines = json.loads(f"[{code.removeprefix('console.debug(').removesuffix(')')}]")
        return title, lines


def _asked_by(page: Page | None, prompt: str | Json = "hello", dialect: str = "browser") -> Json:
    return arguments(prompt, dialect) | {"__event_call__": page}


@pytest.mark.parametrize("dialect", IN_A_CHAT)
async def test_the_log_is_printed_to_the_console(dialect: str, simulator: Simulator, pipe: Pipe) -> None:
    set_valves(pipe, simulator.base_url, DEBUG=True)
    page = Page()
    given = _asked_by(page, dialect=dialect)
    given["__user__"]["id"] = SECRETS["user"]
    assert (await call(pipe, given)).error == ""
    await asyncio.wait_for(page.left.wait(), PATIENCE_S)
    title, lines = page.printed()
    assert re.fullmatch(r"OpenRouter, request [0-9a-f]{8}", title)
    assert "DEBUG asking /responses" in lines
    assert 'INFO usage {"outcome":"answered"' in lines
    assert SECRETS["user"] not in lines


HOSTILE: Final = (
    '"); alert(1); (" \'); `${alert(1)}` \\"); \\u0022 </script><script>alert(1)</script> '
    "<!-- \u2028alert(1)\u2029 \ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16")
)


@pytest.mark.parametrize("dialect", IN_A_CHAT)
async def test_what_is_printed_stays_a_text(dialect: str, simulator: Simulator, pipe: Pipe) -> None:
    set_valves(pipe, simulator.base_url, DEBUG=True)
    simulator.next("failed", message=HOSTILE)
    page = Page()
    assert (await call(pipe, _asked_by(page, dialect=dialect))).error
    await asyncio.wait_for(page.left.wait(), PATIENCE_S)
    _, lines = page.printed()
    assert re.sub("[\u2028\u2029]", " ", HOSTILE) in lines


@pytest.mark.parametrize(
    ("stored", "own", "role", "is_printed"),
    [
        (False, None, "admin", False),
        (False, "on", "admin", True),
        (False, "on", "user", False),
        (True, "off", "admin", False),
        (True, "off", "user", True),
        (True, None, "user", True),
    ],
)
async def test_whose_log_is_printed(
    stored: bool, own: str | None, role: str, is_printed: bool, simulator: Simulator, pipe: Pipe
) -> None:
    set_valves(pipe, simulator.base_url, DEBUG=stored)
    page = Page()
    given = _asked_by(page)
    given["__user__"]["role"] = role
    if own is not None:
        given["__user__"]["valves"] = UserValves.model_validate({"DEBUG": own})
    assert (await call(pipe, given)).error == ""
    await _settled()
    assert len(page.events) == is_printed


async def _settled() -> None:
    """Let what has been started for the page begin."""
    for _ in range(10):
        await asyncio.sleep(0)


@pytest.mark.parametrize("dialect", sorted(set(DIALECTS) - set(IN_A_CHAT)))
async def test_nothing_is_printed_where_no_page_asked(dialect: str, simulator: Simulator, pipe: Pipe) -> None:
    set_valves(pipe, simulator.base_url, DEBUG=True)
    page = Page()
    assert (await call(pipe, _asked_by(page, dialect=dialect))).error == ""
    assert (await call(pipe, _asked_by(None))).error == ""
    await _settled()
    assert page.events == []


@pytest.mark.parametrize("dialect", IN_A_CHAT)
async def test_a_page_that_never_answers_costs_nobody_anything(
    dialect: str, simulator: Simulator, pipe: Pipe
) -> None:
    set_valves(pipe, simulator.base_url, DEBUG=True)
    before = asyncio.all_tasks()
    page = Page(answers=False)
    started = time.monotonic()
    assert (await call(pipe, _asked_by(page, dialect=dialect))).error == ""
    await asyncio.wait_for(page.asked.wait(), PATIENCE_S)
    assert time.monotonic() - started < 1.5
    assert not page.left.is_set()
    asked = time.monotonic()
    await asyncio.wait_for(page.left.wait(), PATIENCE_S)
    assert time.monotonic() - asked < 3
    await all_ended(before)
    assert (await ask(pipe, "hello")).error == ""


async def test_a_page_that_fails_harms_nothing(
    simulator: Simulator, pipe: Pipe, server_log: ServersLog
) -> None:
    set_valves(pipe, simulator.base_url, DEBUG=True)
    before = asyncio.all_tasks()
    page = Page(fails=True)
    assert (await call(pipe, _asked_by(page))).error == ""
    await asyncio.wait_for(page.left.wait(), PATIENCE_S)
    await all_ended(before)
    assert any(text.startswith("the page takes no log: ConnectionError") for text in server_log.texts())


async def test_the_log_of_an_answer_that_was_stopped_is_printed_too(simulator: Simulator, pipe: Pipe) -> None:
    set_valves(pipe, simulator.base_url, DEBUG=True)
    simulator.next("stall", hang=12)
    page = Page()
    result = await pipe.pipe(**_asked_by(page))
    assert not isinstance(result, dict)
    await read_until_text(result, Answer())
    await result.aclose()
    await asyncio.wait_for(page.left.wait(), PATIENCE_S)
    assert '"outcome":"stopped"' in page.printed()[1]


# One line of what each request took


def _facts(log: ServersLog) -> list[Json]:
    lines = [text for text in log.texts() if text.startswith("usage ")]
    found = [re.fullmatch(r"usage (\{.*\}) \[request [0-9a-f]{8}(?:, [^\]]*)?\]", line) for line in lines]
    assert all(found)
    return [json.loads(match[1]) for match in found if match]


async def _stopped(pipe: Pipe, simulator: Simulator, dialect: str) -> None:
    simulator.next("stall", hang=12, tasks=True)
    task = asyncio.create_task(call(pipe, arguments("hello", dialect)))
    await simulator.wait_until(lambda sim: any(record.streaming for record in inferences(sim)))
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


@contextlib.asynccontextmanager
async def _locked_out(pipe: Pipe, simulator: Simulator, log: ServersLog) -> AsyncIterator[None]:
    """The check of the start has failed, so that requests are refused."""
    simulator.next("http_error", name="401_bad_key", on="/key", times=50)
    set_valves(pipe, simulator.base_url, LOG_LEVEL="DEBUG", ENABLE_STARTUP_CHECKS=True)
    await pipe.pipes()
    await log.has("The check at the start failed")
    yield


@pytest.mark.parametrize("outcome", ["answered", "failed", "stopped", "refused"])
@pytest.mark.parametrize("dialect", sorted(DIALECTS))
async def test_each_request_leaves_one_line_of_facts(
    dialect: str, outcome: str, simulator: Simulator, pipe: Pipe, server_log: ServersLog
) -> None:
    set_valves(pipe, simulator.base_url, LOG_LEVEL="DEBUG")
    before = asyncio.all_tasks()
    if outcome == "answered":
        assert (await ask(pipe, "hello", dialect)).error == ""
    elif outcome == "failed":
        simulator.next("http_error", name="500_masked", tasks=True)
        assert (await ask(pipe, "hello", dialect)).error
    elif outcome == "stopped":
        await _stopped(pipe, simulator, dialect)
    else:
        async with _locked_out(pipe, simulator, server_log):
            told = (await ask(pipe, "hello", dialect)).error
            assert told.startswith("Service unavailable due to startup issues: OpenRouter did not accept")
    await all_ended(before)
    [facts] = _facts(server_log)
    kind = "api_stream" if dialect == "task_stream" else dialect
    assert (facts.pop("outcome"), facts.pop("dialect"), facts.pop("model")) == (outcome, kind, MODEL)
    assert 0 <= facts.pop("seconds") < PATIENCE_S
    if outcome == "stopped":
        facts.pop("first_token_seconds", None)
    if outcome == "answered":
        assert 0 <= facts.pop("first_token_seconds") < PATIENCE_S
        assert facts.pop("cost") > 0
        assert facts.pop("input_tokens") > 0
        assert facts.pop("output_tokens") > 0
        facts.pop("cached_tokens", None)
    assert facts == {}


async def test_a_request_that_is_refused_is_a_line_for_those_who_look_closely(
    simulator: Simulator, pipe: Pipe, server_log: ServersLog
) -> None:
    """Thousands may be refused in a second: at the usual level they write nothing."""
    async with _locked_out(pipe, simulator, server_log):
        set_valves(pipe, simulator.base_url, ENABLE_STARTUP_CHECKS=True)
        assert (await ask(pipe, "hello")).error
    assert _facts(server_log) == []


@pytest.mark.parametrize("dialect", STREAMING)
async def test_a_stream_that_nobody_reads_is_no_request(
    dialect: str, pipe: Pipe, server_log: ServersLog
) -> None:
    chunks = await stream(pipe, "hello", dialect)
    await chunks.aclose()
    assert _facts(server_log) == []
