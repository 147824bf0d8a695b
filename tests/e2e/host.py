"""The server under test, as the tests name it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from openrouter_responses_pipe.webui import FUNCTION_ID, WebUIClient, WebUIServer

ROOT: Final = Path(__file__).resolve().parents[2]
WEBUI_PYTHON: Final = ROOT / ".webui" / "venv" / "bin" / "python"
KEY: Final = "sk-or-v1-e2e"
MODEL: Final = f"{FUNCTION_ID}.openai/gpt-5-mini"


@dataclass(frozen=True)
class Host:
    """A running Open WebUI with the pipe in it, and its accounts."""

    server: WebUIServer
    admin: WebUIClient
    user: WebUIClient
    base_url: str

    @property
    def log(self) -> str:
        """What the server has written so far."""
        return self.server.log.read_text(encoding="utf-8", errors="replace")


@contextmanager
def valves(host: Host, **values: Any) -> Iterator[None]:
    """Change the administrator's settings for a while."""
    host.admin.set_valves(values)
    try:
        yield
    finally:
        host.admin.set_valves(dict.fromkeys(values) | {"API_KEY": KEY, "BASE_URL": host.base_url})
        host.admin.models(refresh=True)
