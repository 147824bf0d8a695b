"""What translating a long chat costs, until the bytes of the request are there."""

from __future__ import annotations

import base64
import gc
import time
from collections.abc import Callable, Mapping
from typing import Any, Final

import orjson

from openrouter_responses_pipe import openrouter_responses_pipe as module
from tests.bench.report import Figure, Pair, compare

Json = dict[str, Any]
MESSAGES, TOOL_PAIRS, PICTURES, PICTURE_BYTES = 200, 50, 10, 300_000
LIMIT: Final = 2.5
SPEC: Final = module.ModelSpec(
    "a/all",
    "All",
    input_modalities=frozenset({"text", "image"}),
    supported_parameters=frozenset({"tools", "temperature"}),
    reasoning=module.ReasoningSpec(),
)


def figures(rounds: int, say: Callable[[str], None]) -> list[Figure]:
    """The pipe's translation beside the least that would do."""
    say("a long history")
    chat = _chat()
    assert orjson.loads(_by_hand(chat))["input"] == orjson.loads(_by_pipe(chat))["input"]
    pairs = [Pair(_seconds(_by_pipe, chat), _seconds(_by_hand, chat)) for _ in range(max(rounds, 5) * 3)]
    name = f"{MESSAGES} messages, {TOOL_PAIRS} tool pairs, {PICTURES} pictures: CPU until the bytes are there"
    return [compare(name, "ms", pairs, LIMIT, scale=1e3)]


def _chat() -> Json:
    picture = "data:image/png;base64," + base64.b64encode(bytes(PICTURE_BYTES)).decode()
    messages: list[Json] = [{"role": "system", "content": "Be brief."}]
    for number in range(TOOL_PAIRS):
        question: list[Json] = [{"type": "text", "text": f"question {number} " + "word " * 100}]
        if number < PICTURES:
            question.append({"type": "image_url", "image_url": {"url": picture}})
        call = {"id": f"call_{number}", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}}
        messages += [
            {"role": "user", "content": question},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": f"call_{number}", "content": "result " * 50},
            {"role": "assistant", "content": "answer " * 100},
        ]
    return {
        "model": "openrouter.a/all",
        "messages": [*messages[:MESSAGES], {"role": "user", "content": "go"}],
    }


def _by_pipe(chat: Mapping[str, Any]) -> bytes:
    body = module.CompletionsBody.parse(chat)
    plan = module.plan_intake(body.messages, SPEC)
    assert not plan.media  # all is there already
    intake = module.Intake(shown=plan.shown)
    payload = module.ResponsesBody.from_completions(body, SPEC, intake=intake).payload
    payload, _ = module._inject_model_capabilities(payload, SPEC)
    data = module._request_data(payload)
    return data if isinstance(data, bytes) else data.getvalue()


def _by_hand(chat: Mapping[str, Any]) -> bytes:
    """The shortest loop that makes the same input."""
    items: list[Json] = []
    for message in chat["messages"]:
        role, content = message["role"], message.get("content")
        if role == "user":
            blocks: list[Any] = [{"type": "text", "text": content}] if isinstance(content, str) else content
            parts: list[Json] = []
            for block in blocks:
                if block["type"] == "text":
                    parts.append({"type": "input_text", "text": block["text"]})
                else:
                    url = block["image_url"]["url"]
                    parts.append({"type": "input_image", "image_url": url, "detail": "auto"})
            items.append({"type": "message", "role": "user", "content": parts})
        elif role == "tool":
            items.append(
                {"type": "function_call_output", "call_id": message["tool_call_id"], "output": content}
            )
        elif role == "assistant":
            if content:
                items.append({"type": "message", "role": "assistant", "content": content})
            for call in message.get("tool_calls", ()):
                items.append({"type": "function_call", "call_id": call["id"], **call["function"]})
    return orjson.dumps({"model": "a/all", "input": items, "instructions": "Be brief.", "stream": True})


def _seconds(make: Callable[[Mapping[str, Any]], bytes], chat: Mapping[str, Any]) -> float:
    gc.collect()
    started = time.process_time()
    make(chat)
    return time.process_time() - started
