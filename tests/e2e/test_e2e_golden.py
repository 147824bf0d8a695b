"""Every recorded stream through the real Open WebUI, in a chat and over its API.

What the manifest says of a stream must be in the message as it is saved and read back, with the chat's
streaming on and off, and in what a program gets that uses the server's API.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Final

import pytest

from openrouter_responses_pipe.webui import FUNCTION_ID
from tests.e2e.driver import Tab, error_text, item_text, items, unique
from tests.e2e.host import MODEL, Host
from tests.e2e.upstream import Json, Upstream
from tests.support import GOLDEN, TRANSCRIPTS, without_pictures

FORCED: Final = "openai/gpt-4o-mini"  # asked over /chat/completions while these tests run
MODELS: Final = {"responses": MODEL, "chat": f"{FUNCTION_ID}.{FORCED}"}
NAMES: Final = sorted(TRANSCRIPTS)
EXPECTED: Final[dict[str, Json]] = {name: TRANSCRIPTS[name]["expect"] for name in NAMES}
REASONS: Final = {
    "max_output_tokens": ("output limit", "length"),
    "content_filter": ("content filter", "content_filter"),
}
# words of a provider that say no more than our own sentence does -> that sentence
SAID_BY_US: Final = {"Rate limit exceeded": "Too many requests"}
CHAT_NAMES: Final = {
    "input_tokens": "prompt_tokens",
    "output_tokens": "completion_tokens",
    "input_tokens_details": "prompt_tokens_details",
    "output_tokens_details": "completion_tokens_details",
}
RESPONSES_NAMES: Final = {new: old for old, new in CHAT_NAMES.items()}


@dataclass
class Got:
    """What one kind of client has in the end."""

    text: str = ""
    reasoning: str = ""
    usage: Json | None = None
    sources: list[str] = field(default_factory=list)
    error: str = ""
    calls: list[Json] = field(default_factory=list)
    finish: str = ""
    message: Json = field(default_factory=dict)  # as saved
    asked: list[Json] = field(default_factory=list)  # what OpenRouter was asked


@pytest.fixture(scope="module", autouse=True)
def one_model_over_chat_completions(host: Host) -> Iterator[None]:
    """Ask one model over the other endpoint; a failure is final, so that nothing waits."""
    host.admin.set_valves({"FORCE_CHAT_COMPLETIONS_MODELS": FORCED, "RETRY_ATTEMPTS": 0})
    try:
        yield
    finally:
        host.admin.set_valves({"FORCE_CHAT_COMPLETIONS_MODELS": None, "RETRY_ATTEMPTS": None})


def model_for(name: str) -> str:
    """The model that is asked over the endpoint that a stream was recorded from."""
    return MODELS[TRANSCRIPTS[name].get("api", "responses")]


def call_of(call_id: str, name: str, arguments: str) -> Json:
    """A call as the manifest writes it."""
    return {"call_id": call_id, "name": name, "arguments": json.loads(arguments)}


def sources_of(message: Json) -> list[Json]:
    """What stands under a message as its sources."""
    return [source["source"] for source in message.get("sources") or ()]


# The four kinds of clients


async def in_chat(name: str, tab: Tab, host: Host, upstream: Upstream, *, stream: bool = True) -> Got:
    """Ask in a new chat and read the answer back from the server."""
    question, word = unique(f"[[golden name={name}]]")
    message = await (await tab.ask(question, model_for(name), stream=stream)).done()
    return Got(
        text=message["content"],
        reasoning="\n\n".join(item_text(item) for item in items(message, "reasoning")),
        usage=message.get("usage"),
        sources=[source["url"] for source in sources_of(message) if "url" in source],
        error=error_text(message),
        calls=[
            call_of(item["call_id"], item["name"], item["arguments"])
            for item in items(message, "function_call")
        ],
        message=message,
        asked=await asyncio.to_thread(upstream.asked, word),
    )


async def in_chat_at_once(name: str, tab: Tab, host: Host, upstream: Upstream) -> Got:
    """The same with the chat's streaming switched off."""
    return await in_chat(name, tab, host, upstream, stream=False)


async def over_api(name: str, tab: Tab, host: Host, upstream: Upstream) -> Got:
    """Ask as a program that does not stream."""
    question, word = unique(f"[[golden name={name}]]")
    answer = await asyncio.to_thread(host.admin.complete, model_for(name), question)
    asked = await asyncio.to_thread(upstream.asked, word)
    if "error" in answer:
        return Got(error=answer["error"]["message"], asked=asked)
    assert answer["object"] == "chat.completion"
    (choice,) = answer["choices"]
    got = Got(usage=answer.get("usage"), finish=choice["finish_reason"], asked=asked)
    take_delta(got, choice["message"])
    return got


async def over_api_in_chunks(name: str, tab: Tab, host: Host, upstream: Upstream) -> Got:
    """Ask as a program that streams."""
    question, word = unique(f"[[golden name={name}]]")
    body = {"model": model_for(name), "stream": True, "messages": [{"role": "user", "content": question}]}
    lines = await asyncio.to_thread(lambda: list(host.admin.stream("/api/chat/completions", body)))
    assert lines[-1] == "[DONE]"
    got = Got(asked=await asyncio.to_thread(upstream.asked, word))
    for chunk in map(json.loads, lines[:-1]):
        if "error" in chunk:
            assert not got.error
            got.error = chunk["error"]["message"]
            continue
        assert chunk["object"] == "chat.completion.chunk"
        if chunk.get("usage"):
            assert got.usage is None
            got.usage = chunk["usage"]
        for choice in chunk["choices"]:
            take_delta(got, choice["delta"])
            # the host ends every stream with a `stop` of its own
            got.finish = got.finish or choice["finish_reason"] or ""
    return got


def take_delta(got: Got, delta: Json) -> None:
    """Add a delta, or a whole message, which has the same fields."""
    got.text += delta.get("content") or ""
    got.reasoning += delta.get("reasoning_content") or ""
    for annotation in delta.get("annotations") or ():
        got.sources.append(annotation["url_citation"]["url"])
    for call in delta.get("tool_calls") or ():
        function = call["function"]
        got.calls.append(call_of(call["id"], function["name"], function["arguments"]))


# What each of them must have


def renamed(usage: Json | None, names: dict[str, str]) -> Json | None:
    """Usage as the other endpoint names it."""
    return usage and {names.get(key, key): value for key, value in usage.items()}


def check_error(got: Got, expected: Json) -> None:
    """The provider's words are told, or a sentence of ours that says the same."""
    words = expected["error"]["message"] if "error" in expected else ""
    assert bool(got.error) == bool(words), got.error
    assert SAID_BY_US.get(words, words) in got.error


def check_text(got: Got, expected: Json) -> None:
    """The text, with the pictures in it."""
    text, pictures = without_pictures(got.text)
    assert text == (expected["text"] or expected.get("refusal", ""))
    assert len(pictures) == len(expected.get("images", ()))


def check_rest(got: Got, expected: Json) -> None:
    """What does not depend on how calls are answered."""
    parts = expected.get("reasoning_summary", expected.get("reasoning_text", []))
    assert got.reasoning == "\n\n".join(parts)
    assert got.sources == expected.get("citations", [])


def check_saved(got: Got, expected: Json) -> None:
    """Nothing of a saved message is left open, and a reader is told why an answer is cut short or empty."""
    assert got.message["done"] is True
    statuses = got.message.get("statusHistory") or [{"done": True, "description": ""}]
    assert statuses[-1]["done"] is True
    assert [item["type"] for item in got.message.get("output") or () if item["status"] == "in_progress"] == []
    if expected["terminal"] == "incomplete":
        assert REASONS[expected["incomplete_reason"]][0] in statuses[-1]["description"]
    check_error(got, expected)
    logs = [source["name"] for source in sources_of(got.message) if "url" not in source]
    assert [name.startswith("Log of request ") for name in logs] == [True] * bool(got.error)
    check_rest(got, expected)
    assert got.calls == expected.get("tool_calls", [])


def check_chat(got: Got, expected: Json, upstream: Upstream) -> None:
    """A chat, streamed or not; a call of a tool that nobody has is answered with words."""
    check_saved(got, expected)
    calls, usage = expected.get("tool_calls"), renamed(expected.get("usage"), RESPONSES_NAMES)
    if calls:
        check_calls_were_answered(got, expected["text"], usage or {}, upstream)
        return
    assert len(got.asked) == 1
    check_text(got, expected)
    assert got.usage == usage


def check_calls_were_answered(got: Got, text: str, usage: Json, upstream: Upstream) -> None:
    """The reader sees a card of a call that failed, why it did, and the model's answer to that."""
    outputs = {item["call_id"]: item for item in items(got.message, "function_call_output")}
    for item in items(got.message, "function_call"):
        assert item["status"] == "failed"
        output = outputs.pop(item["call_id"])
        words = f"There is no tool called “{item['name']}”"
        assert item_text({"content": output["output"]}) == f"Error: {words}."
        assert words in got.text
    assert not outputs
    assert got.text.startswith(text)
    assert "The tools returned" in got.text
    _, second = got.asked
    answer = upstream.usage(second)
    answer = renamed(answer, RESPONSES_NAMES) or {}
    # the host adds up what both calls used
    for key in ("input_tokens", "output_tokens", "total_tokens", "cost"):
        assert (got.usage or {})[key] == pytest.approx(usage[key] + answer[key])


def check_api(got: Got, expected: Json, upstream: Upstream) -> None:
    """A program that does not stream gets an answer or an error."""
    check_error(got, expected)
    assert len(got.asked) == 1
    if "error" in expected:
        assert got == Got(error=got.error, asked=got.asked)
    else:
        check_api_answer(got, expected)


def check_api_in_chunks(got: Got, expected: Json, upstream: Upstream) -> None:
    """A program that streams gets what came before an error, too."""
    check_error(got, expected)
    assert len(got.asked) == 1
    check_api_answer(got, expected)


def check_api_answer(got: Got, expected: Json) -> None:
    """Text, reasoning, calls, sources, usage, and the reason for the end."""
    check_text(got, expected)
    assert got.calls == expected.get("tool_calls", [])
    assert got.usage == renamed(expected.get("usage"), CHAT_NAMES)
    check_rest(got, expected)
    if expected["terminal"] == "incomplete":
        assert got.finish == REASONS[expected["incomplete_reason"]][1]
    elif expected["terminal"] == "completed":
        assert got.finish == ("tool_calls" if got.calls else "stop")


Ask = Callable[[str, Tab, Host, Upstream], Awaitable[Got]]
Check = Callable[[Got, Json, Upstream], None]
CLIENTS: Final[dict[str, tuple[Ask, Check]]] = {
    "chat": (in_chat, check_chat),
    "chat at once": (in_chat_at_once, check_chat),
    "API": (over_api, check_api),
    "API in chunks": (over_api_in_chunks, check_api_in_chunks),
}


@pytest.mark.parametrize("name", NAMES)
async def test_recorded(name: str, tab: Tab, host: Host, upstream: Upstream) -> None:
    """All four clients ask at once; each gets all that it can show."""
    asks = [ask(name, tab, host, upstream) for ask, _ in CLIENTS.values()]
    for (client, (_, check)), got in zip(CLIENTS.items(), await asyncio.gather(*asks), strict=True):
        try:
            check(got, EXPECTED[name], upstream)
        except AssertionError as error:
            error.add_note(f"{client}: {got}")
            raise


WITH_CALLS: Final = [name for name in NAMES if EXPECTED[name].get("tool_calls")]
_LAST_WORD: Final = re.compile(rb'"type": ?"response\.completed"|"finish_reason": ?"tool_calls"')
AT_ONCE: Final = 12


def frames_before_the_last_word(name: str) -> int:
    """How many frames of a stream come before the one that says how it ended."""
    frames = re.split(rb"\r?\n\r?\n", (GOLDEN / f"{name}.sse").read_bytes())
    return next(number for number, frame in enumerate(frames) if _LAST_WORD.search(frame))


@pytest.mark.parametrize("name", WITH_CALLS)
async def test_a_call_in_a_stream_that_breaks_off(name: str, tab: Tab, upstream: Upstream) -> None:
    """Wherever the connection ends: the host runs nothing, and the reader sees an error."""
    gate = asyncio.Semaphore(AT_ONCE)

    async def check_cut(frames: int) -> None:
        how = "eof" if frames % 2 else "cut"
        question, word = unique(f"[[golden name={name} cut={frames} how={how}]]")
        async with gate:
            message = await (await tab.ask(question, model_for(name))).done()
        assert error_text(message), frames
        assert message["done"] is True
        assert not {"function_call", "function_call_output"} & {item["type"] for item in message["output"]}
        assert [item for item in message["output"] if item["status"] == "in_progress"] == []
        assert EXPECTED[name]["text"].startswith(message["content"])
        assert len(await asyncio.to_thread(upstream.asked, word)) == 1

    last = frames_before_the_last_word(name)
    assert last > 3
    await asyncio.gather(*map(check_cut, range(1, last + 1)))
