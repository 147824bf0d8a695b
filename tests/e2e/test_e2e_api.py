"""Programs that use Open WebUI's API get chat completions, whatever the pipe speaks upstream."""

from __future__ import annotations

import json
import uuid

from openrouter_responses_pipe.webui import WebUIClient
from tests.e2e.host import MODEL, Host
from tests.e2e.upstream import Json, Upstream


def question(words: str = "Hello") -> str:
    """Return a question with a word of its own at the end."""
    return f"{words} e2e{uuid.uuid4().hex[:10]}"


def stream(client: WebUIClient, text: str) -> list[Json]:
    """Ask with `stream` and return the chunks; the last line must be [DONE]."""
    body = {"model": MODEL, "stream": True, "messages": [{"role": "user", "content": text}]}
    lines = list(client.stream("/api/chat/completions", body))
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def joined(chunks: list[Json], key: str) -> str:
    """Join one field of the deltas."""
    return "".join(
        choice["delta"].get(key) or "" for chunk in chunks for choice in chunk.get("choices") or []
    )


def test_stream(host: Host, upstream: Upstream) -> None:
    text = question()
    chunks = stream(host.admin, text)
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert text in joined(chunks, "content")
    assert "The user says" in joined(chunks, "reasoning_content")
    reasons = [choice.get("finish_reason") for chunk in chunks for choice in chunk.get("choices") or []]
    assert [reason for reason in reasons if reason] == ["stop"]
    (usage,) = [chunk["usage"] for chunk in chunks if chunk.get("usage")]
    assert usage["total_tokens"] == upstream.usage(upstream.last(text))["total_tokens"]
    assert usage["prompt_tokens"] + usage["completion_tokens"] == usage["total_tokens"]


def test_stream_that_is_cut_short_says_so(host: Host) -> None:
    """OpenAI's clients keep the last `finish_reason`: nothing may come after ours."""
    chunks = stream(host.admin, "[[incomplete]]")
    reasons = [choice.get("finish_reason") for chunk in chunks for choice in chunk.get("choices") or []]
    assert [reason for reason in reasons if reason] == ["length"]


def test_stream_comes_in_deltas(host: Host) -> None:
    chunks = stream(host.admin, "[[drip rate=60 tokens=40]]")
    assert joined(chunks, "content").split() == [f"word{index}" for index in range(40)]
    assert sum(bool(joined([chunk], "content")) for chunk in chunks) >= 10


def test_json(host: Host, upstream: Upstream) -> None:
    text = question()
    answer = host.admin.complete(MODEL, text)
    assert answer["object"] == "chat.completion"
    (choice,) = answer["choices"]
    assert choice["finish_reason"] == "stop"
    assert choice["message"]["role"] == "assistant"
    assert text in choice["message"]["content"]
    assert "The user says" in choice["message"]["reasoning_content"]
    assert answer["usage"]["total_tokens"] == upstream.usage(upstream.last(text))["total_tokens"]


def test_user_who_is_no_admin(host: Host) -> None:
    assert [row["id"] for row in host.user.models()] == [MODEL]
    text = question()
    assert text in host.user.complete(MODEL, text)["choices"][0]["message"]["content"]


def test_history_and_parameters_reach_openrouter(host: Host, upstream: Upstream) -> None:
    text = question("And now?")
    body = {
        "model": MODEL,
        "stream": False,
        "max_tokens": 777,
        "messages": [
            {"role": "system", "content": "Answer like a pirate."},
            {"role": "user", "content": "First question"},
            {"role": "assistant", "content": "First answer"},
            {"role": "user", "content": text},
        ],
    }
    host.admin.request("POST", "/api/chat/completions", body)
    record = upstream.last(text)
    assert record["path"].endswith("/responses")
    assert record["body"]["model"] == "openai/gpt-5-mini"
    assert record["body"]["max_output_tokens"] == 777
    assert "pirate" in json.dumps([record["body"].get("instructions"), record["body"]["input"]])
    assert "First answer" in json.dumps(record["body"]["input"])
    assert record["unknown"] == []


def test_task(host: Host) -> None:
    """The host asks for a title: it gets text only, in a form that it can read."""
    form = {"model": MODEL, "messages": [{"role": "user", "content": "How do tides work?"}]}
    answer = host.admin.request("POST", "/api/v1/tasks/title/completions", form)
    (choice,) = answer["choices"]
    assert choice["message"].keys() <= {"role", "content"}
    assert "tides" in json.loads(choice["message"]["content"])["title"]


def test_models_are_listed_with_their_names(host: Host) -> None:
    names = {row["id"]: row["name"] for row in host.admin.models()}
    assert names["openrouter.openai/gpt-5"] == "OpenAI: GPT-5"
    assert "openrouter.anthropic/claude-sonnet-4.6" in names
