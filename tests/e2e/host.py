"""The server under test, as the tests name it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from openrouter_responses_pipe.webui import FUNCTION_ID, PIPE_FILE, WebUIClient, WebUIServer

ROOT: Final = Path(__file__).resolve().parents[2]
WEBUI_PYTHON: Final = ROOT / ".webui" / "venv" / "bin" / "python"
KEY: Final = "sk-or-v1-e2e"
MODEL: Final = f"{FUNCTION_ID}.openai/gpt-5-mini"
NO_PIP: Final = {"ENABLE_PIP_INSTALL_FRONTMATTER_REQUIREMENTS": "false"}


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


def set_up(server: WebUIServer, base_url: str) -> tuple[WebUIClient, WebUIClient]:
    """Give a new server its administrator and a user, and install the pipe's file over HTTP."""
    admin = WebUIClient(server.url)
    admin.signup("Admin", "admin@example.com", "a long enough password")
    user = admin.add_user("Ursula", "user@example.com", "another long password")
    admin.install_function(PIPE_FILE.read_text(encoding="utf-8"))
    admin.set_valves({"API_KEY": KEY, "BASE_URL": base_url})
    admin.models(refresh=True)
    admin.open_to_everyone(MODEL, "GPT-5 Mini")
    return admin, user


@contextmanager
def valves(host: Host, **values: Any) -> Iterator[None]:
    """Change the administrator's settings for a while."""
    host.admin.set_valves(values)
    try:
        yield
    finally:
        host.admin.set_valves(dict.fromkeys(values) | {"API_KEY": KEY, "BASE_URL": host.base_url})
        host.admin.models(refresh=True)
