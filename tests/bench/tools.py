"""What a round of tools takes, run by the pipe and one after the other."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from statistics import median
from typing import Any, Final

from openrouter_responses_pipe import openrouter_responses_pipe as module
from openrouter_responses_pipe.simulator import Simulator
from tests.bench.report import Figure

TOOLS, SECONDS, AT_ONCE, LIMIT_S = 8, 1.0, 5, 2.5
_MODEL: Final = "openai/gpt-4o-mini"


async def figures(rounds: int, say: Callable[[str], None]) -> list[Figure]:
    """A whole answer with such a round, beside the loop that Open WebUI runs calls in."""
    say("a round of tools")
    async with Simulator() as simulator:
        pipe = module.Pipe()
        valves = {
            "API_KEY": "sk-or-v1-bench",
            "BASE_URL": simulator.base_url,
            "MAX_PARALLEL_TOOLS_PER_REQUEST": AT_ONCE,
        }
        pipe.valves = module.Valves.model_validate(valves)
        await _answer(pipe, "warm up", {})
        times = [await _round(pipe) for _ in range(min(rounds, 3))]
        await pipe.aclose()
    alone = await _one_after_the_other()
    what = f"{TOOLS} tools of {SECONDS:g} s each"
    return [
        Figure(f"{what}, {AT_ONCE} at a time: the whole answer", median(times), "s", limit=LIMIT_S),
        Figure(f"{what}, one after the other, as Open WebUI runs them", alone, "s"),
    ]


async def _wait(number: int) -> str:
    await asyncio.sleep(SECONDS)
    return f"{number} is done"


async def _round(pipe: module.Pipe) -> float:
    calls = [{"name": "wait", "arguments": {"number": number}} for number in range(TOOLS)]
    script = json.dumps({"rounds": [calls], "final": "{outputs}"})
    schema = {"type": "object", "properties": {"number": {"type": "integer"}}, "required": ["number"]}
    spec = {"name": "wait", "description": "Wait.", "parameters": schema}
    started = time.perf_counter()
    text = await _answer(pipe, f"[[script {script}]]", {"wait": {"spec": spec, "callable": _wait}})
    seconds = time.perf_counter() - started
    assert text.count("is done") == TOOLS
    return seconds


async def _answer(pipe: module.Pipe, question: str, tools: dict[str, Any]) -> str:
    """The text of an answer in a chat."""
    body = {
        "model": f"openrouter.{_MODEL}",
        "stream": True,
        "messages": [{"role": "user", "content": question}],
        "tools": [{"type": "function", "function": tool["spec"]} for tool in tools.values()],
    }
    metadata = {"chat_id": "c", "message_id": "m"}
    events = await pipe.pipe(body, {"id": "u"}, metadata, __tools__=tools)
    assert not isinstance(events, dict)
    text = [event.get("delta", "") async for event in events if event.get("type", "").endswith("text.delta")]
    return "".join(text)


async def _one_after_the_other() -> float:
    started = time.perf_counter()
    for number in range(TOOLS):
        await _wait(number)
    return time.perf_counter() - started
