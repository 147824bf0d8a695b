"""What a person sees and keeps when something stops an answer: the Stop button, OpenRouter, a wrong key."""

from __future__ import annotations

import time
from typing import Any

import pytest

from openrouter_responses_pipe.webui import WebUIError
from tests.e2e.driver import Tab, error_text, unique, until
from tests.e2e.host import KEY, MODEL, Host, valves
from tests.e2e.upstream import Upstream


async def test_the_menu_as_the_administrator_wants_it(tab: Tab, host: Host, upstream: Upstream) -> None:
    """Filters, order and names reach Open WebUI's own list; what is not in it cannot be chosen."""
    before = {entry["id"]: entry["name"] for entry in host.admin.models(refresh=True) if "." in entry["id"]}
    function_id, _, shown = MODEL.partition(".")
    hidden = next(model for model in before if "/" in model and shown.partition("/")[0] not in model)
    chosen = {
        "MODEL_ID": shown.partition("/")[0] + "/*",
        "MODEL_NAME_FORMAT": "{name} | {price}",
        "MODEL_SORT": "price",
    }
    with valves(host, **chosen):
        listed = [
            entry for entry in host.admin.models(refresh=True) if entry["id"].startswith(function_id + ".")
        ]
        assert listed
        assert all(entry["id"].startswith(f"{function_id}.{shown.partition('/')[0]}/") for entry in listed)
        assert {entry["name"].partition(" | ")[0] for entry in listed} <= set(before.values())
        assert any(" | $" in entry["name"] for entry in listed)
        question, word = unique("Hello")
        await (await tab.ask(question, MODEL)).done()
        assert upstream.asked(word)
        question, word = unique("Hello")
        with pytest.raises(WebUIError, match="not found"):
            await tab.ask(question, hidden)
        assert not upstream.asked(word)
    assert {entry["id"] for entry in host.admin.models(refresh=True)} >= set(before)


async def test_models_that_the_administrator_adds(tab: Tab, host: Host, upstream: Upstream) -> None:
    """A shortcut and a preset are models of the menu, and go to OpenRouter as they were written."""
    function_id, _, model = MODEL.partition(".")
    added = [f"{model}:nitro", f"{model}@preset/brief", "@preset/brief"]
    with valves(host, VARIANT_MODELS=", ".join(added)):
        listed = {entry["id"] for entry in host.admin.models(refresh=True)}
        assert {f"{function_id}.{one}" for one in added} <= listed
        for one in added:
            question, word = unique("Hello")
            message = await (await tab.ask(question, f"{function_id}.{one}")).done()
            assert upstream.last(word)["body"]["model"] == one
            assert word in message["content"]
            assert not error_text(message)


async def test_an_answer_without_tools_says_so(tab: Tab, upstream: Upstream) -> None:
    upstream.next("http_error", name="404_no_tool_use")
    question, word = unique("Hello")
    turn = await tab.ask(question, MODEL)
    message = await turn.done()
    assert word in message["content"]
    first, second = upstream.asked(word)
    assert first["body"]["tools"]
    assert "tools" not in second["body"]
    assert "without" in turn.data("notification")[0]["content"]
    assert "without" in message["statusHistory"][-1]["description"]


def check_sentence(text: str) -> None:
    """A person reads this: words, no traceback, no internals, no key."""
    assert text
    assert len(text) < 1500
    for fragment in ("Traceback", 'File "', "Exception(", "aiohttp", "NoneType", KEY, "sk-bad"):
        assert fragment not in text


async def test_stop(tab: Tab, upstream: Upstream) -> None:
    """The upstream connection is closed within a second, and the text so far is part of the next question."""
    question, word = unique("[[drip rate=40 tokens=4000]]")
    turn = await tab.ask(question, MODEL)
    await turn.wait(lambda t: "word9 " in t.text, "text")
    pressed = time.monotonic()
    await turn.stop()
    await until(lambda: upstream.last(word)["ended"] != "open", "the upstream connection's end", 5)
    assert time.monotonic() - pressed < 1.0
    assert upstream.last(word)["ended"] == "client_disconnected"
    message = await turn.done()
    assert message["done"] is True
    assert "word9" in message["content"]
    assert not error_text(message)

    question, word = unique("Where did you stop?")
    await (await tab.ask(question, MODEL, after=turn)).done()
    assert "word9" in str(upstream.last(word)["body"]["input"][-2])


async def test_api_client_that_hangs_up(host: Host, upstream: Upstream) -> None:
    question, word = unique("[[drip rate=40 tokens=4000]]")
    body = {"model": MODEL, "stream": True, "messages": [{"role": "user", "content": question}]}
    lines = host.admin.stream("/api/chat/completions", body)
    assert next(lines)
    lines.close()  # type: ignore[attr-defined]  # a generator: closing it closes the connection
    await until(
        lambda: upstream.last(word)["ended"] == "client_disconnected", "the upstream connection's end", 10
    )


@pytest.mark.parametrize(
    "shape", ["failed", "error_flat", "error_nested", "response_error", "error_untyped", "abrupt"]
)
async def test_error_after_text_keeps_both(tab: Tab, shape: str) -> None:
    turn = await tab.ask(
        f"[[{shape} {'cut=12 reason=false' if shape == 'abrupt' else 'after=4'}]] Hello", MODEL
    )
    message = await turn.done()
    assert message["done"] is True
    assert message["content"].startswith("Hello!")
    check_sentence(error_text(message))


async def test_error_before_any_text(tab: Tab, upstream: Upstream) -> None:
    turn = await tab.ask("[[http_error name=402_credits]]", MODEL)
    message = await turn.done()
    assert message["content"] == ""
    check_sentence(error_text(message))
    assert "credit" in error_text(message).lower()


async def test_rate_limit_is_waited_out(tab: Tab, upstream: Upstream) -> None:
    question, word = unique("Hello")
    upstream.next("http_error", name="429_upstream", retry_after=1)
    message = await (await tab.ask(question, MODEL)).done()
    assert not error_text(message)
    assert word in message["content"]
    assert [record["status"] for record in upstream.asked(word)] == [429, 200]


@pytest.mark.parametrize("streaming", [True, False])
async def test_wrong_key(host: Host, tab: Tab, streaming: bool) -> None:
    with valves(host, API_KEY="sk-bad-key"):
        message = await (await tab.ask("Hello", MODEL, stream=streaming)).done()
    check_sentence(error_text(message))
    assert "key" in error_text(message).lower()


@pytest.mark.parametrize("streaming", [True, False])
async def test_no_key(host: Host, tab: Tab, user_tab: Tab, streaming: bool) -> None:
    """Everybody is told what an administrator has to set; the models stay listed."""
    with valves(host, API_KEY=None):
        for page in (tab, user_tab):
            message = await (await page.ask("Hello", MODEL, stream=streaming)).done()
            check_sentence(error_text(message))
            assert "API_KEY" in error_text(message)
        assert host.admin.models(refresh=True)


async def test_wrong_key_for_an_api_client(host: Host) -> None:
    with valves(host, API_KEY="sk-bad-key"):
        try:
            answer: Any = host.admin.complete(MODEL, "Hello")
        except WebUIError as error:
            answer = str(error)
    check_sentence(str(answer))
    assert "key" in str(answer).lower()


async def test_openrouter_cannot_be_reached(host: Host, tab: Tab) -> None:
    with valves(host, BASE_URL="http://127.0.0.1:9/api/v1", RETRY_ATTEMPTS=0):
        message = await (await tab.ask("Hello", MODEL)).done()
    check_sentence(error_text(message))
