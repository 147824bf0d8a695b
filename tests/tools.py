"""Tools for the tests: entries as Open WebUI hands them over, and places where they meet."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Any, Final

from openrouter_responses_pipe.openrouter_responses_pipe import (
    ChatRequest,
    Emission,
    HostCall,
    OpenWebUIHost,
    StatusUpdate,
    ToolCall,
    ToolFinished,
    ToolLimits,
    ToolOrchestrator,
    ToolResult,
    ToolStarted,
)
from pytest_bootstrap import bound
from tests.recorded import Clock
from tests.support import PATIENCE_S

Json = dict[str, Any]
TEXT: Final[Json] = {"type": "string"}
WHOLE: Final[Json] = {"type": "integer"}


def schema(properties: Json | None = None, *required: str, **more: Any) -> Json:
    """The parameters of a tool."""
    return {"type": "object", "properties": properties or {}, "required": list(required), **more}


def entry(function: Any, name: str = "f", parameters: Json | None = None, **more: Any) -> Json:
    """One of the host's tools: a workspace tool, unless `more` says what else."""
    spec = {"name": name, "description": f"Do {name}.", "parameters": parameters or schema()}
    return {"tool_id": "mine", "callable": bound(function), "spec": spec, **more}


def named(**entries: Json) -> dict[str, Json]:
    """The host's tools by name, each with its name in its spec."""
    return {name: {**tool, "spec": {**tool["spec"], "name": name}} for name, tool in entries.items()}


def offered(tools: dict[str, Json]) -> list[Json]:
    """The same as they stand in the body of a request."""
    return [{"type": "function", "function": tool["spec"]} for tool in tools.values()]


def call_of(number: int | str, name: str = "f", arguments: str = "{}") -> ToolCall:
    """A call of a model's."""
    return ToolCall(f"call_{number}", name, arguments)


@dataclass
class Crowd:
    """Counts who is inside, and how many were at most; `gate` lets them out."""

    inside: int = 0
    most: int = 0
    seen: int = 0
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)

    async def __aenter__(self) -> Crowd:
        """Come in."""
        self.inside += 1
        self.seen += 1
        self.most = max(self.most, self.inside)
        async with self.changed:
            self.changed.notify_all()
        return self

    async def __aexit__(self, *_exc: object) -> None:
        """Go out."""
        self.inside -= 1

    async def full(self, count: int) -> None:
        """Wait until so many were inside at once."""
        async with asyncio.timeout(PATIENCE_S), self.changed:
            await self.changed.wait_for(lambda: self.most >= count)


class Sunk(list[Emission]):
    """A sink that keeps what it is given."""

    async def __call__(self, emissions: Sequence[Emission]) -> None:
        """Take emissions."""
        self.extend(emissions)

    def started(self) -> list[str]:
        """The ids of the calls that were announced."""
        return [emission.call.call_id for emission in self if isinstance(emission, ToolStarted)]

    def finished(self) -> list[str]:
        """The ids of the calls that have ended, in the order of their ends."""
        return [emission.result.call.call_id for emission in self if isinstance(emission, ToolFinished)]

    def told(self) -> list[str]:
        """What the person was told."""
        return [emission.description for emission in self if isinstance(emission, StatusUpdate)]


def request_with(tools: dict[str, Json], user_id: str = "user", **host: Any) -> ChatRequest:
    """A request of a person who has these tools."""
    call = HostCall(tools=tools, **host)
    return ChatRequest(body={}, dialect="browser", model="a/b", user_id=user_id, host=call)


def orchestrator(clock: Callable[[], float] | None = None) -> ToolOrchestrator:
    """One that reads results without a host."""
    return ToolOrchestrator(OpenWebUIHost(version=None), clock or Clock())


def opened(
    runner: ToolOrchestrator, request: ChatRequest, limits: ToolLimits
) -> AbstractAsyncContextManager[Any]:
    """A context in which every tool of the request may be called."""
    return runner.open_context(request, request.host.tools, limits)


async def run(
    calls: Iterable[ToolCall],
    tools: dict[str, Json],
    limits: ToolLimits | None = None,
    runner: ToolOrchestrator | None = None,
    sink: Sunk | None = None,
    user_id: str = "user",
) -> list[ToolResult]:
    """One round of a request from start to end, with a generous bound on its time."""
    runner = runner or orchestrator()
    request = request_with(tools, user_id)
    async with asyncio.timeout(PATIENCE_S):
        async with opened(runner, request, limits or ToolLimits()) as context:
            return await runner.run(context, list(calls), sink if sink is not None else Sunk())


async def result_of(
    tool: Any, arguments: str = "{}", parameters: Json | None = None, **limits: Any
) -> ToolResult:
    """What one call of one function comes to."""
    tools = {"f": entry(tool, parameters=parameters)}
    (result,) = await run([call_of(1, arguments=arguments)], tools, ToolLimits(**limits))
    return result
