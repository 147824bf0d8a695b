"""The recorded streams of `/responses`: their events, and what a list of emissions amounts to."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from openrouter_responses_pipe.openrouter_responses_pipe import (
    CitationFound,
    Emission,
    Failed,
    ItemClosed,
    MediaProduced,
    PipeError,
    ReasoningDelta,
    RefusalDelta,
    ServerToolProgress,
    SSEDecoder,
    StreamEvent,
    StreamState,
    TextDelta,
    ToolRequested,
    TurnEnded,
    UsageReported,
    close_stream,
    parse_frames,
    reduce_events,
)
from tests.support import GOLDEN, TRANSCRIPTS

Json = dict[str, Any]
EXPECTED: Final[dict[str, Json]] = {
    name: entry["expect"] for name, entry in TRANSCRIPTS.items() if entry.get("api") != "chat"
}
NAMES: Final = sorted(EXPECTED)
ENDED_WELL: Final = [name for name in NAMES if EXPECTED[name]["terminal"] in ("completed", "incomplete")]
COMPLETED: Final = [name for name in NAMES if EXPECTED[name]["terminal"] == "completed"]


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self, now: float = 0.0) -> None:
        self.now = now

    def __call__(self) -> float:
        """The time."""
        return self.now


def events(name: str) -> list[StreamEvent]:
    """The events of one recorded stream, each with a payload of its own."""
    decoder = SSEDecoder()
    frames = [*decoder.feed((GOLDEN / f"{name}.sse").read_bytes()), *decoder.close()]
    return list(parse_frames(frames))


def reduced(stream: Iterable[StreamEvent]) -> list[Emission]:
    """What a stream means when it arrives in one read and is then closed."""
    state = StreamState()
    return [*reduce_events(state, stream), *close_stream(state)]


@dataclass
class Said:
    """Everything that emissions say, put together."""

    text: str = ""
    refusal: str = ""
    reasoning: dict[tuple[int, str, int], str] = field(default_factory=dict)  # item, kind, part
    calls: list[Json] = field(default_factory=list)
    citations: list[str] = field(default_factory=list)
    tools: list[str] = field(default_factory=list)
    images: list[Json] = field(default_factory=list)
    usages: list[Json] = field(default_factory=list)
    closed: list[Json] = field(default_factory=list)
    ends: list[TurnEnded] = field(default_factory=list)
    errors: list[PipeError] = field(default_factory=list)

    def parts(self, kind: str) -> list[str]:
        """The reasoning of one kind, part by part."""
        return [text for (_, of, _), text in sorted(self.reasoning.items()) if of == kind]


def said(emissions: Sequence[Emission]) -> Said:
    """Put emissions together."""
    whole = Said()
    for emission in emissions:
        take = _TAKERS.get(type(emission))
        if take is not None:
            take(whole, emission)
    whole.text, whole.refusal = joined_pairs(whole.text), joined_pairs(whole.refusal)
    return whole


def joined_pairs(text: str) -> str:
    """`text` with split UTF-16 pairs joined; a half alone stays one."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")


def _take_text(whole: Said, emission: TextDelta) -> None:
    whole.text += emission.text


def _take_refusal(whole: Said, emission: RefusalDelta) -> None:
    whole.refusal += emission.text


def _take_reasoning(whole: Said, emission: ReasoningDelta) -> None:
    place = (emission.item, emission.kind, emission.part)
    if emission.text:
        whole.reasoning[place] = whole.reasoning.get(place, "") + emission.text


def _take_call(whole: Said, emission: ToolRequested) -> None:
    call = emission.call
    arguments = json.loads(call.arguments)
    whole.calls.append({"call_id": call.call_id, "name": call.name, "arguments": arguments})


def _take_tool(whole: Said, emission: ServerToolProgress) -> None:
    if emission.type not in whole.tools:
        whole.tools.append(emission.type)


def _take_image(whole: Said, emission: MediaProduced) -> None:
    head, comma, data = emission.source.rpartition(",")
    content = base64.b64decode(data, validate=True)
    mime = head.removeprefix("data:").removesuffix(";base64") if comma else ""
    assert content.startswith(b"\x89PNG"), "all recorded pictures are PNG"
    whole.images.append({"mime": mime or "image/png", "bytes": len(content)})


_TAKERS: Final[dict[type, Any]] = {
    TextDelta: _take_text,
    RefusalDelta: _take_refusal,
    ReasoningDelta: _take_reasoning,
    ToolRequested: _take_call,
    ServerToolProgress: _take_tool,
    MediaProduced: _take_image,
    CitationFound: lambda whole, emission: whole.citations.append(emission.url),
    UsageReported: lambda whole, emission: whole.usages.append(dict(emission.usage)),
    ItemClosed: lambda whole, emission: whole.closed.append(emission.payload),
    TurnEnded: lambda whole, emission: whole.ends.append(emission),
    Failed: lambda whole, emission: whole.errors.append(emission.error),
}
