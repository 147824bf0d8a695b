"""One simulator and one Open WebUI for the whole session, with the pipe installed as an administrator would.

A second, larger Open WebUI (`big_host`) starts when a test asks for it.
Everything is kept in `.e2e/` until the next run: the server's log, its database, screenshots.
"""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from openrouter_responses_pipe.webui import SimulatorServer, WebUIServer
from tests.e2e.big_host import BigHost, running_big_host
from tests.e2e.driver import Tab
from tests.e2e.host import NO_PIP, ROOT, WEBUI_PYTHON, Host, set_up
from tests.e2e.tool_servers import ToolServers, tool_servers
from tests.e2e.upstream import Upstream
from tests.engines import PostgresServer


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give the first test time to start the server; run the demo before that.

    What the servers wrote is looked at when all others have run: first for secrets, then at the log.
    """
    for item in items:
        item.add_marker(pytest.mark.timeout(300))
    late = {"test_e2e_run": -1, "test_e2e_secrets": 1, "test_e2e_host_log": 2}
    items.sort(key=lambda item: late.get(item.path.stem, 0))


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
def webui_python() -> Path:
    """Return the interpreter that has Open WebUI."""
    if not WEBUI_PYTHON.exists():
        pytest.fail("Open WebUI is not installed: `make e2e` installs it.")
    return WEBUI_PYTHON


@pytest.fixture(scope="session")
def host(folder: Path, upstream: Upstream, webui_python: Path) -> Iterator[Host]:
    """Start Open WebUI where pip installs are disabled, with the pipe's file installed over HTTP."""
    server = WebUIServer(folder / "open-webui", python=webui_python)
    try:
        server.launch(NO_PIP)
        server.wait_ready()
        admin, user = set_up(server, upstream.base_url)
        yield Host(server, admin, user, upstream.base_url)
    finally:
        server.stop()


@pytest.fixture(scope="session")
def big_host(
    folder: Path, upstream: Upstream, webui_python: Path, postgres: PostgresServer
) -> Iterator[BigHost]:
    """Start Open WebUI with two workers on PostgreSQL and Redis, and the pipe in it."""
    with running_big_host(folder / "big-host", upstream.base_url, webui_python, postgres) as running:
        yield running


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
