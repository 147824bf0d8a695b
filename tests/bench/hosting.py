"""Loading and calling a function file the way Open WebUI does it, step by step.

The steps and their order are those of Open WebUI 0.12.4 (`utils/plugin.py`, `functions.py`); the tests
of pasting and the benchmarks both stand on them.
"""

from __future__ import annotations

import inspect
import sys
import tempfile
import types
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

MODULE: Final = Path(__file__).parents[2] / "openrouter_responses_pipe" / "openrouter_responses_pipe.py"
MODEL: Final = "openai/gpt-4o-mini"
REWRITES: Final = {
    "from utils": "from open_webui.utils",
    "from apps": "from open_webui.apps",
    "from main": "from open_webui.main",
    "from config": "from open_webui.config",
}


@dataclass(frozen=True)
class Loaded:
    """One load of a function file: its id, its module and the `Pipe` made from it."""

    function_id: str
    module: types.ModuleType
    pipe: Any


def replace_imports(content: str) -> str:
    """The text as the host stores and runs it."""
    for old, new in REWRITES.items():
        content = content.replace(old, new)
    return content


def load(function_id: str, content: str | None = None) -> Loaded:
    """Run the file in a module of its own and make its `Pipe`; the module's name is free again after it."""
    content = replace_imports(MODULE.read_text("utf-8") if content is None else content)
    name = f"function_{function_id}_{uuid.uuid4().hex}"
    module = types.ModuleType(name)
    sys.modules[name] = module
    with tempfile.NamedTemporaryFile("w", encoding="utf-8") as file:
        file.write(content)
        module.__dict__["__file__"] = file.name
        try:
            exec(content, module.__dict__)
            return Loaded(function_id, module, module.__dict__["Pipe"]())
        finally:
            sys.modules.pop(name, None)


def publish(loaded: Loaded) -> None:
    """Make a load the one that requests reach; the previous one is forgotten without a word."""
    previous = sys.modules.get(f"function_{loaded.function_id}")
    if previous is not None:
        sys.modules.pop(previous.__name__, None)
    sys.modules[loaded.module.__name__] = loaded.module
    sys.modules[f"function_{loaded.function_id}"] = loaded.module


def forget(function_id: str) -> None:
    """Take a function out of `sys.modules`, as if it had never been installed."""
    module = sys.modules.pop(f"function_{function_id}", None)
    if module is not None:
        sys.modules.pop(module.__name__, None)


def set_valves(loaded: Loaded, **stored: object) -> None:
    """Give the instance its stored valves, as the host does before each call."""
    loaded.pipe.valves = loaded.pipe.Valves(**stored)


async def ask(loaded: Loaded, text: str, *, stream: bool = True, in_chat: bool = True) -> Any:
    """One request of a person: a saved browser chat, or a call of the API."""
    body = {
        "model": f"{loaded.function_id}.{MODEL}",
        "messages": [{"role": "user", "content": text}],
        "stream": stream,
    }
    return await call(loaded, body, in_chat=in_chat)


async def call(loaded: Loaded, body: dict[str, Any], *, in_chat: bool = True) -> Any:
    """Call `pipe` with what its signature names, and nothing else."""
    ids = {"chat_id": str(uuid.uuid4()), "message_id": str(uuid.uuid4()), "session_id": "s"}
    if not in_chat:
        ids = {"chat_id": "", "message_id": None, "session_id": None}
    offered: dict[str, Any] = {
        "body": body,
        "__user__": {"id": "u1", "email": "u@example.org", "name": "U", "role": "user"},
        "__metadata__": {**ids, "user_id": "u1", "features": {}, "params": {}, "files": None, "tools": {}},
        "__event_emitter__": _no_event,
        "__event_call__": _no_event,
        "__chat_id__": ids["chat_id"],
        "__session_id__": ids["session_id"],
        "__message_id__": ids["message_id"],
        "__task__": None,
        "__task_body__": None,
        "__files__": [],
        "__tools__": {},
        "__oauth_token__": None,
        "__request__": None,
    }
    named = inspect.signature(loaded.pipe.pipe).parameters
    answer = loaded.pipe.pipe(**{name: value for name, value in offered.items() if name in named})
    return await answer if inspect.isawaitable(answer) else answer


async def _no_event(_event: dict[str, Any]) -> None:
    return None


def text_of(event: Any) -> str:
    """The answer text that one yielded event adds."""
    if event.get("type") == "response.output_text.delta":
        return event["delta"]
    return "".join(choice.get("delta", {}).get("content") or "" for choice in event.get("choices") or ())


def error_of(event: Any) -> str:
    """The error that one yielded event shows, or nothing."""
    if event.get("type") in ("response.failed", "error") or event.get("error"):
        return str(event)
    return ""


async def read(answer: AsyncIterator[Any]) -> tuple[str, str]:
    """The whole text of a streamed answer, and the error that it ended in (or nothing)."""
    text, error = "", ""
    async for event in answer:
        text += text_of(event)
        error = error or error_of(event)
    return text, error
