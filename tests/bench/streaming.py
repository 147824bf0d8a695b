"""What a stream costs in the pipe, beside the barest reader that could do the job.

The simulator runs in a process of its own; CPU is that of this process alone. Both readers take turns
in every round, and a ratio is taken within its round.
"""

from __future__ import annotations

import asyncio
import gc
import json
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Final

import aiohttp
import orjson

from tests.bench.hosting import MODEL, Loaded, ask, load, publish, set_valves, text_of
from tests.bench.report import Figure, Pair, compare
from tests.bench.ticker import Ticker

ROOT: Final = Path(__file__).parents[2]
FUNCTION_ID: Final = "bench_pipe"
TOKENS_PER_SECOND: Final = 50
STREAMS: Final = 100
SHORT: Final = "[[burst tokens=1]]"


@dataclass
class Meter:
    """Counts what `streams` concurrent streams bring, and their CPU from the moment all have begun."""

    streams: int = 1
    tokens: int = 0
    events: int = 0
    begun: int = 0
    cpu: float = 0.0
    first_s: float = 0.0

    def begin(self) -> None:
        """One more stream has given its first text; with the last of them the measurement starts."""
        self.begun += 1
        if self.begun == self.streams:
            self.tokens = self.events = 0
            self.cpu = time.process_time()

    def add(self, tokens: int, events: int) -> None:
        """Text has arrived."""
        self.tokens += tokens
        self.events += events

    def end(self) -> None:
        """All streams are over."""
        self.cpu = time.process_time() - self.cpu

    @property
    def cpu_per_token(self) -> float:
        """Seconds of CPU per delta that the model sent."""
        return self.cpu / self.tokens

    @property
    def events_per_token(self) -> float:
        """Events given to the host per delta that the model sent."""
        return self.events / self.tokens


class BareReader:
    """aiohttp, a split at blank lines, orjson: nothing that could be left out.

    It is a hard yardstick. A reader that goes line by line (`async for line in response.content`) takes
    four times as much for a delta at full speed; at 50 tokens per second there is no difference.
    """

    def __init__(self, base_url: str) -> None:
        self._url = f"{base_url}/responses"
        connector = aiohttp.TCPConnector(limit=0)  # else the streams after the hundredth would wait
        headers = {"Authorization": "Bearer sk-bench"}
        self._session = aiohttp.ClientSession(headers=headers, connector=connector)

    async def read(self, prompt: str, meter: Meter) -> None:
        """Stream one answer."""
        message = {"type": "message", "role": "user", "content": prompt}
        body = {"model": MODEL, "input": [message], "stream": True}
        waiting, begun = b"", False
        async with self._session.post(self._url, json=body) as response:
            response.raise_for_status()
            async for chunk in response.content.iter_any():
                *frames, waiting = (waiting + chunk).split(b"\n\n")
                deltas = []
                for frame in frames:
                    if frame.startswith(b"data: {"):
                        event = orjson.loads(frame[6:])
                        if event["type"] == "response.output_text.delta":
                            deltas.append(event["delta"])
                if deltas:
                    if not begun:
                        begun = True
                        meter.begin()
                    meter.add(len(deltas), len(deltas))

    async def aclose(self) -> None:
        """Close the connections."""
        await self._session.close()


class PipeReader:
    """The pipe, loaded and called as the host does it for a saved browser chat."""

    def __init__(self, loaded: Loaded) -> None:
        self.loaded = loaded

    async def read(self, prompt: str, meter: Meter) -> None:
        """Stream one answer."""
        begun, event = False, None
        async for event in await ask(self.loaded, prompt):
            if text := text_of(event):
                if not begun:
                    begun = True
                    meter.begin()
                meter.add(text.count(" "), 1)
        if not begun:
            raise RuntimeError(f"the pipe gave no text: {event}")

    async def aclose(self) -> None:
        """Retire the runtime behind the pipe."""
        key = self.loaded.module.__dict__["_RUNTIMES_KEY"]
        await sys.modules[key].__dict__["runtimes"][FUNCTION_ID].retire()


def installed(base_url: str) -> Loaded:
    """The function, loaded and with its valves set."""
    loaded = load(FUNCTION_ID)
    publish(loaded)
    set_valves(loaded, API_KEY="sk-bench", BASE_URL=base_url)
    return loaded


Reader = BareReader | PipeReader
Readers = tuple[PipeReader, BareReader]


async def run(reader: Reader, prompt: str, streams: int = 1) -> Meter:
    """`streams` answers to `prompt` at once."""
    meter = Meter(streams)
    gc.collect()
    await asyncio.gather(*(reader.read(prompt, meter) for _ in range(streams)))
    meter.end()
    return meter


@dataclass
class _First(Meter):
    """Notes when the first text of a single stream came."""

    def begin(self) -> None:
        self.first_s = time.perf_counter()


async def _first_deltas(reader: Reader, requests: int) -> tuple[float, float]:
    """The median time to a first delta and the CPU per request, of one short request after the other."""
    gc.collect()
    times: list[float] = []
    cpu = time.process_time()
    for _ in range(requests):
        meter = _First()
        started = time.perf_counter()
        await reader.read(SHORT, meter)
        times.append(meter.first_s - started)
    return median(times), (time.process_time() - cpu) / requests


class Rounds:
    """Measurements in which both readers take turns, round by round, against one simulator."""

    def __init__(self, base_url: str, rounds: int, quick: bool, say: Callable[[str], None]) -> None:
        self._base_url, self._rounds, self._quick, self._say = base_url, rounds, quick, say

    async def figures(self) -> list[Figure]:
        """Measure everything that needs no fresh process."""
        readers = (PipeReader(installed(self._base_url)), BareReader(self._base_url))
        try:
            for reader in readers:  # a connection, a catalog, warm code
                await run(reader, "[[burst tokens=2000]]")
                await _first_deltas(reader, 5)
            return await self.measure(readers)
        finally:
            for reader in readers:
                await reader.aclose()

    async def measure(self, readers: Readers) -> list[Figure]:
        """The figures of warm readers."""
        raise NotImplementedError

    async def rounds_of(
        self, what: str, measure: Callable[[Reader], Awaitable[Any]], readers: Readers
    ) -> list[tuple[Any, Any]]:
        """The measurements of both readers, round by round; who begins changes."""
        found: list[tuple[Any, Any]] = []
        for number in range(self._rounds):
            self._say(f"{what}: round {number + 1} of {self._rounds}")
            order = readers if number % 2 else readers[::-1]
            results = {type(reader): await measure(reader) for reader in order}
            found.append((results[PipeReader], results[BareReader]))
        return found

    async def control(self, call: str, order: dict[str, Any] | None = None) -> Any:
        """One call of the simulator's own interface; an order is posted."""
        root = self._base_url.removesuffix("/api/v1")
        method = "GET" if order is None else "POST"
        async with (
            aiohttp.ClientSession(raise_for_status=True) as session,
            session.request(method, f"{root}/_control/{call}", json=order) as response,
        ):
            return await response.json()


class Bench(Rounds):
    """What a delta and a request cost."""

    def __init__(self, base_url: str, rounds: int, quick: bool, say: Callable[[str], None]) -> None:
        super().__init__(base_url, rounds, quick, say)
        self._burst = 8_000 if quick else 30_000
        self._seconds = 2 if quick else 3
        self._requests = 20 if quick else 60

    async def measure(self, readers: Readers) -> list[Figure]:
        """One stream, many streams, and one short request after the other."""
        return [
            *await self._full_speed(readers),
            *await self._paced(readers, 1, 1.4),
            *await self._paced(readers, STREAMS, 1.7),
            *await self._short(readers),
        ]

    async def _full_speed(self, readers: Readers) -> list[Figure]:
        prompt = f"[[burst tokens={self._burst}]]"
        found = await self.rounds_of("full speed", lambda reader: run(reader, prompt), readers)
        pairs = [Pair(pipe.cpu_per_token, bare.cpu_per_token) for pipe, bare in found]
        events = median(pipe.events_per_token for pipe, _ in found)
        return [
            compare("one stream at full speed: CPU per delta", "µs", pairs, 2.0, scale=1e6),
            Figure("one stream at full speed: events per delta", events, "", limit=0.05),
        ]

    async def _paced(self, readers: Readers, streams: int, limit: float) -> list[Figure]:
        tokens = TOKENS_PER_SECOND * self._seconds
        prompt = f"[[drip rate={TOKENS_PER_SECOND} tokens={tokens}]]"
        name = f"{streams} streams" if streams > 1 else "one stream"
        name = f"{name} at {TOKENS_PER_SECOND} tokens/s"
        found = await self.rounds_of(name, lambda reader: run(reader, prompt, streams), readers)
        pairs = [Pair(pipe.cpu_per_token, bare.cpu_per_token) for pipe, bare in found]
        rows = [compare(f"{name}: CPU per delta", "µs", pairs, limit, scale=1e6)]
        if streams == 1:
            events = median(pipe.events_per_token for pipe, _ in found)
            rows.append(Figure(f"{name}: events per delta", events, "", limit=0.97, at_least=True))
        return rows

    async def _short(self, readers: Readers) -> list[Figure]:
        async def measure(reader: Reader) -> tuple[float, float, float]:
            await _first_deltas(reader, 1)
            before = await self._newest_connection()
            first_s, cpu = await _first_deltas(reader, self._requests)
            opened = await self._newest_connection() - before
            return first_s, cpu, opened / self._requests

        found = await self.rounds_of("first delta", measure, readers)
        firsts = [Pair(pipe[0], bare[0]) for pipe, bare in found]
        cpus = [Pair(pipe[1], bare[1]) for pipe, bare in found]
        return [
            compare("time to first delta, warm", "ms", firsts, 3.0, scale=1e3),
            compare("CPU per short request", "ms", cpus, 4.0, scale=1e3),
            Figure("new connections per request", max(pipe[2] for pipe, _ in found), "", limit=0.05),
        ]

    async def _newest_connection(self) -> int:
        """The simulator numbers connections as they are opened; old ones, left idle, are used again."""
        records = (await self.control("requests"))["requests"]
        return max(record["connection"] for record in records)


# The first request of a process: `python -m tests.bench.streaming bare|chat|menu BASE_URL`


async def first_request(who: str, base_url: str) -> tuple[float, float]:
    """Seconds from the first request of this process to its first delta, and the longest stall in it.

    `menu`: after the model list.
    """
    loaded = installed(base_url)
    reader = BareReader(base_url) if who == "bare" else PipeReader(loaded)
    await asyncio.sleep(0)
    if who == "menu":
        await loaded.pipe.pipes()
    gc.collect()
    meter = _First()
    async with Ticker() as ticker:
        started = time.perf_counter()
        await reader.read(SHORT, meter)
    await reader.aclose()
    return meter.first_s - started, ticker.worst_s


def _in_fresh_process(who: str, base_url: str) -> tuple[float, float]:
    command = [sys.executable, "-m", "tests.bench.streaming", who, base_url]
    return json.loads(subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout)


def first_request_figures(base_url: str, rounds: int, say: Callable[[str], None]) -> list[Figure]:
    """The first request after a fresh start, with and without the model list before it."""
    found: list[dict[str, tuple[float, float]]] = []
    for number in range(rounds):
        say(f"first request of a process: round {number + 1} of {rounds}")
        found.append({who: _in_fresh_process(who, base_url) for who in ("bare", "chat", "menu")})
    names = {"menu": "the model list was read before", "chat": "nothing was read before"}
    rows: list[Figure] = []
    for who, name in names.items():
        value = median(times[who][0] for times in found) * 1e3
        rows.append(Figure(f"first request after a start, {name}", value, "ms", limit=10))
    bare = median(times["bare"][0] for times in found) * 1e3
    stall = median(max(times[who][1] for who in names) for times in found) * 1e3
    return [
        *rows,
        Figure("first request of the bare reader (for comparison)", bare, "ms"),
        Figure("event loop stalled by the first request after a start", stall, "ms", limit=50),
    ]


if __name__ == "__main__":
    import pytest_bootstrap  # noqa: F401 - the stand-in for the host
    from tests.bench import loading

    for package in loading.HOST_PACKAGES:
        __import__(package)
    print(json.dumps(asyncio.run(first_request(sys.argv[1], sys.argv[2]))))
