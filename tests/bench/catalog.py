"""What the list of models costs: reading it, showing it, having it at once after a restart."""

from __future__ import annotations

import asyncio
import gc
import json
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, Final

from openrouter_responses_pipe import openrouter_responses_pipe as module
from openrouter_responses_pipe.simulator import Simulator, synthetic_catalog
from openrouter_responses_pipe.webui import SimulatorServer
from tests.bench.report import Figure
from tests.bench.ticker import Ticker

RECORDED: Final = Path(__file__).parents[1] / "data" / "openrouter" / "models_catalog.json"
LARGE: Final = 1000
PAGES: Final = 50
WARM_CALLS: Final = 200
KEY: Final = "sk-or-v1-bench"
_WARM_MS, _READ_MS, _RESTART_MS, _STALL_MS = 2.0, 40.0, 100.0, 50.0


async def figures(rounds: int, say: Callable[[str], None]) -> list[Figure]:
    """All of them, medians of `rounds`."""
    recorded = json.loads(RECORDED.read_text("utf-8"))["data"]
    large = synthetic_catalog(LARGE)
    say("the model list")
    return [
        _reading(large[:500], rounds),
        *[await _warm(catalog, rounds) for catalog in (recorded, large)],
        *await _first_pages(large, rounds),
        await _stall(large, rounds),
        await _restart(large, rounds),
    ]


def _reading(entries: list[Any], rounds: int) -> Figure:
    times = [_timed(lambda: module._read_models(entries, None)) for _ in range(rounds)]
    return Figure(f"reading a list of {len(entries)} models", median(times) * 1e3, "ms", limit=_READ_MS)


def _timed(run: Callable[[], object]) -> float:
    gc.collect()
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def _pipe(base_url: str) -> module.Pipe:
    pipe = module.Pipe()
    pipe.valves = module.Valves.model_validate({"API_KEY": KEY, "BASE_URL": base_url})
    return pipe


async def _warm(catalog: list[Any], rounds: int) -> Figure:
    """`pipes()` as each page load calls it: the list is there, the host makes the valves anew."""
    async with Simulator(catalog=catalog) as simulator:
        pipe = _pipe(simulator.base_url)
        shown = await pipe.pipes()
        times = []
        for _ in range(rounds):
            stored = pipe.valves.model_dump(exclude_unset=True)
            started = time.perf_counter()
            for _ in range(WARM_CALLS):
                pipe.valves = module.Valves(**stored)
                await pipe.pipes()
            times.append((time.perf_counter() - started) / WARM_CALLS)
        await pipe.aclose()
    name = f"pipes() of {len(shown)} models, warm, valves loaded"
    return Figure(name, median(times) * 1e3, "ms", limit=_WARM_MS)


async def _first_pages(catalog: list[Any], rounds: int) -> list[Figure]:
    fetches = []
    for _ in range(rounds):
        async with Simulator(catalog=catalog) as simulator:
            await _load_pages(simulator.base_url)
            fetches.append(len(simulator.statuses("/models")))
    return [Figure(f"requests for {PAGES} first page loads at once", max(fetches), "", limit=1)]


async def _stall(catalog: list[Any], rounds: int) -> Figure:
    """With the upstream in a process of its own, so that it stalls only itself."""
    worst = []
    with tempfile.TemporaryDirectory() as folder:
        server = SimulatorServer(Path(folder) / "simulator.log")
        try:
            await asyncio.to_thread(server.launch)
            await asyncio.to_thread(_serve, server.base_url, catalog)
            for _ in range(rounds):
                gc.collect()
                async with Ticker() as ticker:
                    await _load_pages(server.base_url)
                worst.append(ticker.worst_s)
        finally:
            server.stop()
    return Figure(
        f"event loop stalled by a first list of {LARGE:,}", median(worst) * 1e3, "ms", limit=_STALL_MS
    )


def _serve(base_url: str, catalog: list[Any]) -> None:
    body = json.dumps({"catalog": catalog}).encode()
    request = urllib.request.Request(base_url.removesuffix("/api/v1") + "/_control/settings", data=body)
    request.add_header("Content-Type", "application/json")
    urllib.request.urlopen(request, timeout=30).close()


async def _load_pages(base_url: str) -> None:
    pipe = _pipe(base_url)
    await asyncio.gather(*(pipe.pipes() for _ in range(PAGES)))
    await pipe.aclose()


async def _restart(catalog: list[Any], rounds: int) -> Figure:
    """The first menu of a new process while OpenRouter does not answer at all."""
    connection = module.Connection("https://far.example/api/v1", KEY)

    async def answers(_connection: object, _path: str, _etag: str) -> module.Fetched:
        return module.Fetched({"data": catalog})

    async def hangs(_connection: object, _path: str, _etag: str) -> module.Fetched:
        await asyncio.Event().wait()
        raise AssertionError

    times = []
    with tempfile.TemporaryDirectory() as folder:
        copies = module.CatalogCopies(Path(folder))
        before = module.OpenRouterModelRegistry(answers, time.monotonic, copies)
        await before.ensure_loaded(connection)
        others = asyncio.all_tasks() - {asyncio.current_task()}
        await asyncio.wait(others)  # the copy is written behind the scenes
        for _ in range(rounds):
            registry = module.OpenRouterModelRegistry(hangs, time.monotonic, copies)
            gc.collect()
            started = time.perf_counter()
            await registry.ensure_loaded(connection)
            times.append(time.perf_counter() - started)
            await registry.aclose()
        await before.aclose()
    return Figure(f"list of {LARGE:,} after a restart", median(times) * 1e3, "ms", limit=_RESTART_MS)
