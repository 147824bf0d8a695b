"""One simulator and one Open WebUI for the whole session, with the pipe installed as an administrator would.

Everything is kept in `.e2e/` until the next run: the server's log, its database, screenshots.
"""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from openrouter_responses_pipe.webui import PIPE_FILE, SimulatorServer, WebUIClient, WebUIServer
from tests.e2e.driver import Tab
from tests.e2e.host import KEY, MODEL, ROOT, WEBUI_PYTHON, Host
from tests.e2e.tool_servers import ToolServers, tool_servers
from tests.e2e.upstream import Upstream


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give the first test time to start the server; run the demo before that, and look at the log last."""
    for item in items:
        item.add_marker(pytest.mark.timeout(300))
    items.sort(key=lambda item: ("e2e_host_log" in item.nodeid) - ("e2e_run" in item.nodeid))


@pytest.fixture(scope="session")
def folder() -> Path:
    """Return the session's folder, emptied."""
    path = ROOT / ".e2e"
    shutil.rmtree(path, ignore_errors=True)
    (path / "screenshots").mkdir(parents=True)
    return path


@pytest.fixture(scope="session")
def upstream(folder: Path) -> Iterator[Upstream]:
    """Start the OpenRouter simulator in a process of its own."""
    server = SimulatorServer(folder / "simulator.log")
    try:
        server.launch()
        yield Upstream(server.base_url)
    finally:
        server.stop()


@pytest.fixture(scope="session")
def host(folder: Path, upstream: Upstream) -> Iterator[Host]:
    """Start Open WebUI where pip installs are disabled, with the pipe's file installed over HTTP."""
    if not WEBUI_PYTHON.exists():
        pytest.fail("Open WebUI is not installed: `make e2e` installs it.")
    server = WebUIServer(folder / "open-webui", python=WEBUI_PYTHON)
    try:
        server.launch({"ENABLE_PIP_INSTALL_FRONTMATTER_REQUIREMENTS": "false"})
        server.wait_ready()
        admin = WebUIClient(server.url)
        admin.signup("Admin", "admin@example.com", "a long enough password")
        user = admin.add_user("Ursula", "user@example.com", "another long password")
        admin.install_function(PIPE_FILE.read_text(encoding="utf-8"))
        admin.set_valves({"API_KEY": KEY, "BASE_URL": upstream.base_url})
        admin.models(refresh=True)
        admin.open_to_everyone(MODEL, "GPT-5 Mini")
        yield Host(server, admin, user, upstream.base_url)
    finally:
        server.stop()


@pytest.fixture(scope="session")
def servers(host: Host, folder: Path) -> Iterator[ToolServers]:
    """Start every kind of tool once."""
    with tool_servers(host, folder) as running:
        yield running


@pytest.fixture
async def tab(host: Host) -> AsyncIterator[Tab]:
    """Return the administrator's page."""
    async with Tab.open(host.admin) as page:
        yield page


@pytest.fixture
async def user_tab(host: Host) -> AsyncIterator[Tab]:
    """Return the page of a user who is not an administrator."""
    async with Tab.open(host.user) as page:
        yield page
