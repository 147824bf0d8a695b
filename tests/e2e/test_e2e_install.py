"""Installing, saving again, and what a person at a terminal is told."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping

from openrouter_responses_pipe.webui import FUNCTION_ID, PIPE_FILE
from tests.e2e.driver import Tab, error_text
from tests.e2e.host import MODEL, ROOT, Host
from tests.e2e.upstream import Upstream


def run(*arguments: str, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run one command of ours."""
    environment = {
        key: value for key, value in os.environ.items() if not key.startswith(("OPENROUTER", "OPEN_WEBUI"))
    }
    return subprocess.run(
        [sys.executable, "-m", "openrouter_responses_pipe", *arguments],
        cwd=ROOT,
        env={**environment, **(env or {})},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


async def test_saving_the_function_while_it_answers(host: Host, tab: Tab, upstream: Upstream) -> None:
    """A running answer finishes in the old code while new questions go to the new one."""
    source = PIPE_FILE.read_text(encoding="utf-8")
    running = await tab.ask("[[drip rate=40 tokens=160]]", MODEL)
    await running.wait(lambda turn: "word9 " in turn.text, "text")
    host.admin.install_function(f"{source}\n# saved again\n")
    try:
        second = await tab.ask("Hello in the meantime", MODEL)
        message = await second.done()
        assert not error_text(message)
        assert message["content"].startswith("Hello!")
        assert not running.ended
        message = await running.done()
    finally:
        host.admin.install_function(source)
    assert not error_text(message)
    assert message["content"].split() == [f"word{index}" for index in range(160)]
    assert (await (await tab.ask("And again", MODEL)).done())["content"].startswith("Hello!")


def test_two_function_ids_live_side_by_side(host: Host, upstream: Upstream) -> None:
    source = PIPE_FILE.read_text(encoding="utf-8")
    host.admin.install_function(source, "second", "Second")
    try:
        host.admin.set_valves({"API_KEY": "sk-or-v1-second", "BASE_URL": upstream.base_url}, "second")
        ids = {row["id"] for row in host.admin.models(refresh=True)}
        assert {MODEL, "second.openai/gpt-5-mini"} <= ids
        for model in (MODEL, "second.openai/gpt-5-mini"):
            answer = host.admin.complete(model, "Hello")
            assert "GPT-5 Mini" in answer["choices"][0]["message"]["content"]
    finally:
        host.admin.request("DELETE", "/api/v1/functions/id/second/delete")
        host.admin.models(refresh=True)


def test_valves_as_the_editor_shows_them(host: Host) -> None:
    spec = host.admin.request("GET", f"/api/v1/functions/id/{FUNCTION_ID}/valves/spec")
    assert {"API_KEY", "BASE_URL"} <= spec["properties"].keys()
    assert spec["properties"]["API_KEY"]["input"]["type"] == "password"
    stored = host.admin.request("GET", f"/api/v1/functions/id/{FUNCTION_ID}/valves")
    assert not str(stored["API_KEY"]).startswith("sk-")


def test_install_command_updates(host: Host) -> None:
    done = run("install", "--url", host.server.url, env={"OPEN_WEBUI_TOKEN": host.admin.token})
    assert (done.returncode, done.stderr) == (0, "")
    assert "updated" in done.stdout


def test_install_command_says_what_is_wrong(host: Host) -> None:
    cases = {
        "does not accept this token": (host.server.url, "wrong"),
        "not an administrator": (host.server.url, host.user.token),
        "cannot be reached": ("http://127.0.0.1:9", "any"),
    }
    for words, (url, token) in cases.items():
        done = run("install", "--url", url, "--token", token)
        assert done.returncode == 1
        assert words in done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_chat_command(upstream: Upstream) -> None:
    done = run("chat", "Hello terminal", "--base-url", upstream.base_url)
    assert (done.returncode, done.stderr) == (0, "")
    assert "Hello terminal" in done.stdout


def test_chat_command_without_a_key() -> None:
    done = run("chat", "Hello")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "OPENROUTER_API_KEY" in done.stderr


def test_chat_command_with_a_wrong_key(upstream: Upstream) -> None:
    done = run("chat", "Hello", "--base-url", upstream.base_url, "--key", "sk-bad-key")
    assert done.returncode == 1
    assert done.stdout.strip() == ""
    assert "key" in done.stderr.lower()
    assert "Traceback" not in done.stderr
