"""What happens when there is much: five hundred streams, long streams, and single frames of megabytes.

A delta's delay is how much later it came than the earliest of its stream would have it, the deltas of
a stream being sent at even distances; counted are those that came when all streams had begun.
Memory is what `tracemalloc` counts, so buffers of the kernel and of C libraries are left out.
"""

from __future__ import annotations

import asyncio
import gc
import json
import math
import tempfile
import time
import tracemalloc
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any, Final

from tests.bench.report import Figure
from tests.bench.streaming import TOKENS_PER_SECOND, Meter, Reader, Readers, Rounds
from tests.bench.ticker import Ticker

STREAMS: Final = 500
LENGTHS: Final = (16_000, 32_000, 64_000)
QUICK_LENGTHS: Final = (4_000, 8_000, 16_000)
LARGE_DELTA_CHARS: Final = 200 * 1024
IMAGE_CHARS: Final = 20 * 1024 * 1024


@dataclass
class Arrivals(Meter):
    """Notes when the deltas of one stream came, and tells the meter of all streams."""

    total: Meter = field(default_factory=Meter)
    times: list[float] = field(default_factory=list)

    def begin(self) -> None:
        """The first text of this stream."""
        self.total.begin()

    def add(self, tokens: int, events: int) -> None:
        """Text of so many deltas has arrived at once."""
        self.times += [time.perf_counter()] * tokens
        self.total.add(tokens, events)

    def delays(self, since: float) -> list[float]:
        """Seconds that each delta came late, of those that came after `since`."""
        starts = [at - number / TOKENS_PER_SECOND for number, at in enumerate(self.times)]
        first = min(starts)
        return [start - first for start, at in zip(starts, self.times, strict=True) if at > since]


@dataclass(frozen=True)
class Crowd:
    """How many streams at once went: all done after `seconds`, 99 of 100 deltas within `p99_s`."""

    seconds: float
    p99_s: float
    failures: int


class ScaleBench(Rounds):
    """One run of all measurements of size against one simulator."""

    async def measure(self, readers: Readers) -> list[Figure]:
        """Many streams, long streams, large frames."""
        return [
            *await self._crowd(readers),
            *await self._memory(readers),
            *await self._growth(readers),
            *await self._stalls(readers),
        ]

    async def _crowd(self, readers: Readers) -> list[Figure]:
        tokens = TOKENS_PER_SECOND * (3 if self._quick else 8)
        name = f"{STREAMS} streams at {TOKENS_PER_SECOND} tokens/s"
        found = await self.rounds_of(name, lambda reader: _crowd(reader, tokens), readers)
        added = median(pipe.p99_s - bare.p99_s for pipe, bare in found) * 1e3
        later = median(pipe.seconds - bare.seconds for pipe, bare in found)
        return [
            Figure(f"{name}: p99 delay added", added, "ms", limit=15),
            Figure(f"{name}: done later than the bare reader", later, "s", limit=0.3),
            Figure(f"{name}: failures", sum(pipe.failures for pipe, _ in found), "", limit=0),
        ]

    async def _memory(self, readers: Readers) -> list[Figure]:
        self._say("memory of open streams")
        pipe, bare = [await _kb_per_stream(reader, 100 if self._quick else STREAMS) for reader in readers]
        return [
            Figure("memory per open stream (tracemalloc)", pipe, "KB", limit=65),
            Figure("memory per open stream of the bare reader", bare, "KB"),
        ]

    async def _growth(self, readers: Readers) -> list[Figure]:
        lengths = QUICK_LENGTHS if self._quick else LENGTHS

        async def measure(reader: Reader) -> list[float]:
            return [await _cpu_of(reader, length) for length in lengths]

        found = await self.rounds_of("growth with length", measure, readers)
        pipe = [median(times) for times in zip(*(pipe for pipe, _ in found), strict=True)]
        bare = [median(times) for times in zip(*(bare for _, bare in found), strict=True)]
        span = f"{lengths[0]:,} to {lengths[-1]:,} deltas"
        return [
            Figure(f"growth of CPU from {span}: exponent", exponent(lengths, pipe), "", limit=1.05),
            Figure("growth of the bare reader: exponent", exponent(lengths, bare), ""),
        ]

    async def _stalls(self, readers: Readers) -> list[Figure]:
        length = (QUICK_LENGTHS if self._quick else LENGTHS)[-1]
        rows = [await self._stall(f"{length:,} deltas at full speed", f"[[burst tokens={length}]]", readers)]
        with tempfile.TemporaryDirectory() as folder:
            for name, events in (("a delta of 200 KB", _large_delta()), ("an image of 20 MB", _image())):
                path = Path(folder) / "large.sse"
                path.write_bytes(b"".join(events))
                rows.append(await self._stall(name, str(path), readers))
        return rows

    async def _stall(self, name: str, source: str, readers: Readers) -> Figure:
        """`source` is a prompt, or the path of a stream to replay."""
        worst: list[float] = []
        for number in range(self._rounds):
            self._say(f"stalls, {name}: round {number + 1} of {self._rounds}")
            if source.endswith(".sse"):
                await self.control("next", {"scenario": "replay", "params": {"path": source}})
            gc.collect()
            async with Ticker() as ticker:
                await readers[0].read(source, Meter())
            worst.append(ticker.worst_s)
        return Figure(f"event loop stalled by {name}", median(worst) * 1e3, "ms", limit=50)


def exponent(lengths: Sequence[int], seconds: Sequence[float]) -> float:
    """The slope of a straight line through the logarithms: 1 is linear growth."""
    across, up = [math.log(length) for length in lengths], [math.log(time_s) for time_s in seconds]
    middle, level = sum(across) / len(across), sum(up) / len(up)
    rise = sum((x - middle) * (y - level) for x, y in zip(across, up, strict=True))
    return rise / sum((x - middle) ** 2 for x in across)


async def _cpu_of(reader: Reader, length: int) -> float:
    """Seconds of CPU for one stream, its request included: its first read may hold many deltas."""
    gc.collect()
    cpu = time.process_time()
    await reader.read(f"[[burst tokens={length}]]", Meter())
    return time.process_time() - cpu


async def _crowd(reader: Reader, tokens: int) -> Crowd:
    prompt = f"[[drip rate={TOKENS_PER_SECOND} tokens={tokens}]]"
    total = Meter(STREAMS)
    streams = [Arrivals(total=total) for _ in range(STREAMS)]
    gc.collect()
    started = time.perf_counter()
    ends = await asyncio.gather(*(reader.read(prompt, stream) for stream in streams), return_exceptions=True)
    seconds = time.perf_counter() - started
    complete = [
        stream
        for stream, end in zip(streams, ends, strict=True)
        if end is None and len(stream.times) == tokens
    ]
    all_begun = max((stream.times[0] for stream in complete), default=0.0)
    delays = [delay for stream in complete for delay in stream.delays(all_begun)]
    p99_s = quantiles(delays, n=100)[-1] if delays else math.inf
    return Crowd(seconds, p99_s, STREAMS - len(complete))


async def _kb_per_stream(reader: Reader, streams: int) -> float:
    """What each open stream holds after its first text, beyond what an idle reader holds."""
    everyone = asyncio.Event()

    class Opened(Meter):
        def begin(self) -> None:
            super().begin()
            if self.begun == streams:
                everyone.set()

    async with _traced() as held:
        opened = Opened(streams)
        reading = [
            asyncio.create_task(reader.read("[[drip rate=1 tokens=1000]]", opened)) for _ in range(streams)
        ]
        await everyone.wait()
        kept = held()
        for task in reading:
            task.cancel()
        await asyncio.gather(*reading, return_exceptions=True)
    return kept / streams / 1e3


@asynccontextmanager
async def _traced() -> AsyncIterator[Any]:
    """Gives a function that says by how many bytes this process has grown since."""
    gc.collect()
    tracemalloc.start()

    def grown() -> int:
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    try:
        yield grown
    finally:
        tracemalloc.stop()


# Streams with one large frame


def _frame(kind: str, **fields: Any) -> bytes:
    return b"data: " + json.dumps({"type": f"response.{kind}", **fields}).encode() + b"\n\n"


def _answer(index: int, text: str) -> list[bytes]:
    """A message that comes in one delta, and the end of the response."""
    message = {"type": "message", "id": "msg_1", "role": "assistant", "content": []}
    return [
        _frame("output_item.added", output_index=index, item=message),
        _frame(
            "output_text.delta", output_index=index, content_index=0, item_id="msg_1", delta=text, logprobs=[]
        ),
        _frame("completed", response={"id": "resp_1", "status": "completed", "output": []}),
        b"data: [DONE]\n\n",
    ]


def _large_delta() -> list[bytes]:
    return _answer(0, "word " * (LARGE_DELTA_CHARS // 5))


def _image() -> list[bytes]:
    item = {"type": "image_generation_call", "id": "ig_1", "status": "in_progress"}
    picture = "data:image/png;base64," + "A" * IMAGE_CHARS
    done = {**item, "status": "completed", "result": picture}
    return [
        _frame("output_item.added", output_index=0, item=item),
        _frame("output_item.done", output_index=0, item=done),
        *_answer(1, "there it is "),
    ]
