"""Tools for the model: an OpenAPI server, an MCP server and a workspace tool, and the page's own part.

`tool_servers(host, folder)` starts and registers all three; what it yields names them:

    with tool_servers(host, folder) as servers:
        turn = await tab.ask(question, MODEL, tool_ids=servers.ids)
        runs = servers.journal.runs("key")

Open WebUI names the tools of the OpenAPI server and of the workspace tool as they are, those of the MCP
server with `MCP_ID` and an underscore before them. Every run of a tool leaves lines in a journal.
The servers are processes of their own on free loopback ports, ended by their process id.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import importlib
import json
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from openrouter_responses_pipe.webui import READ_BY_EVERYONE, ServerProcess, child_environment, free_port
from tests.e2e import workspace_tools
from tests.e2e.workspace_tools import noted, png

if TYPE_CHECKING:  # the MCP server's interpreter has Open WebUI's packages and not the tests'
    from tests.e2e.driver import Tab, Turn
    from tests.e2e.host import Host

Json = dict[str, Any]

ROOT: Final = Path(__file__).resolve().parents[2]
OPENAPI_ID: Final = "e2e_openapi"
MCP_ID: Final = "e2e_mcp"
WORKSPACE_ID: Final = "e2e_workspace"
_START_S: Final = 30.0
_BROKEN: Final = "The tool server is broken on purpose."


# ── The journal ───────────────────────────────────────────────────────


@dataclass(frozen=True)
class Run:
    """One run of a tool; its outcome is `running`, `finished`, `failed` or `cancelled`."""

    tool: str
    key: str
    began: float
    ended: float
    outcome: str
    main_thread: bool


@dataclass(frozen=True)
class Journal:
    """What the tools wrote about their runs; `key` is an argument of the call."""

    path: Path

    def runs(self, key: str = "") -> list[Run]:
        """Return the runs whose key contains these words, in the order in which they began."""
        runs: dict[str, Run] = {}
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        for line in map(json.loads, lines):
            began = runs.get(line["run"])
            runs[line["run"]] = Run(
                tool=line["tool"],
                key=line["key"],
                began=began.began if began else line["at"],
                ended=line["at"] if began else float("inf"),
                outcome=line["event"] if began else "running",
                main_thread=line["main_thread"],
            )
        return sorted((run for run in runs.values() if key in run.key), key=lambda run: run.began)

    def outcomes(self, key: str = "") -> Counter[str]:
        """Count how these runs ended."""
        return Counter(run.outcome for run in self.runs(key))

    def most_at_once(self, key: str = "") -> int:
        """Return how many of these runs went on at the same moment at most."""
        runs = self.runs(key)
        return max((sum(other.began <= run.began < other.ended for other in runs) for run in runs), default=0)


# ── The OpenAPI server ────────────────────────────────────────────────


def _operation(name: str, about: str, **properties: str) -> Json:
    """Describe one operation: POST, with a JSON object of required properties."""
    schema = {
        "type": "object",
        "properties": {key: {"type": kind} for key, kind in properties.items()},
        "required": list(properties),
    }
    body = {"required": True, "content": {"application/json": {"schema": schema}}} if properties else None
    return {
        "post": {
            "operationId": name,
            "summary": about,
            **({"requestBody": body} if body else {}),
            "responses": {"200": {"description": "What the tool says"}},
        }
    }


OPENAPI: Final[Json] = {
    "openapi": "3.1.0",
    "info": {"title": "End-to-end server", "version": "1.0"},
    "paths": {
        "/add_numbers": _operation("add_numbers", "Add two numbers.", a="number", b="number"),
        "/slow_echo": _operation("slow_echo", "Wait, then repeat.", text="string", seconds="number"),
        "/fail_always": _operation("fail_always", "Fail with status 500."),
        "/big_output": _operation("big_output", "Return a long text.", chars="integer"),
        "/paint": _operation("paint", "Return a picture.", colour="string"),
    },
}


def serve_openapi(argv: Sequence[str]) -> None:
    """Run the OpenAPI server: port, journal."""
    from aiohttp import web

    port, journal = int(argv[0]), argv[1]

    async def add_numbers(request: web.Request) -> web.Response:
        given = await request.json()
        with noted(journal, "add_numbers", f"{given['a']}+{given['b']}"):
            return web.json_response({"sum": given["a"] + given["b"]})

    async def slow_echo(request: web.Request) -> web.Response:
        given = await request.json()
        with noted(journal, "slow_echo", given["text"]):
            await asyncio.sleep(given["seconds"])
        return web.json_response({"text": given["text"]})

    async def fail_always(request: web.Request) -> web.Response:
        with noted(journal, "fail_always", ""):
            return web.Response(status=500, text=_BROKEN)

    async def big_output(request: web.Request) -> web.Response:
        chars = (await request.json())["chars"]
        numbers = "".join(f"{number} " for number in range(chars // 2))
        return web.Response(text=numbers[:chars])

    async def paint(request: web.Request) -> web.Response:
        colour = (await request.json())["colour"]
        level = (0, 255, 0) if colour == "green" else (255, 0, 0)
        return web.Response(body=png(*level), content_type="image/png")

    async def description(request: web.Request) -> web.Response:
        return web.json_response(OPENAPI)

    app = web.Application()
    app.add_routes([web.get("/openapi.json", description)])
    app.add_routes(
        [
            web.post(f"/{run.__name__}", run)
            for run in (add_numbers, slow_echo, fail_always, big_output, paint)
        ]
    )
    # a client that goes away ends the handler, so that the journal says so
    web.run_app(app, host="127.0.0.1", port=port, print=lambda *words: None, handler_cancellation=True)


# ── The MCP server ────────────────────────────────────────────────────


def serve_mcp(argv: Sequence[str]) -> None:
    """Run the MCP server over streamable HTTP, with the packages of Open WebUI: port, journal."""
    server_class = importlib.import_module("mcp.server").MCPServer
    image_class = importlib.import_module("mcp.server.mcpserver").Image
    tool_error = importlib.import_module("mcp.server.mcpserver.exceptions").ToolError
    plain_text = importlib.import_module("starlette.responses").PlainTextResponse
    port, journal = int(argv[0]), argv[1]
    server = server_class("End-to-end MCP")

    @server.tool()
    async def reverse(text: str) -> str:
        """Reverse a text."""
        with noted(journal, "reverse", text):
            return text[::-1]

    @server.tool()
    async def slow_reverse(text: str, seconds: float) -> str:
        """Wait, then reverse a text."""
        with noted(journal, "slow_reverse", text):
            await asyncio.sleep(seconds)
        return text[::-1]

    async def paint(colour: str) -> Any:
        """Paint a small square."""
        level = (0, 255, 0) if colour == "green" else (255, 0, 0)
        return image_class(data=png(*level), format="png")

    server.tool(structured_output=False)(paint)

    @server.tool()
    async def fail(reason: str) -> str:
        """Fail with a reason."""
        with noted(journal, "fail", reason):
            raise tool_error(reason)  # the words of any other exception stay in the server

    async def health(request: Any) -> Any:
        return plain_text("well")

    server.custom_route("/health", methods=["GET"])(health)
    server.run("streamable-http", host="127.0.0.1", port=port)


# ── Starting and registering ──────────────────────────────────────────


class ToolServer(ServerProcess):
    """One of the two servers, in a process of its own."""

    def __init__(self, kind: str, folder: Path, journal: Path, *, python: Path) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        health = {"openapi": "/openapi.json", "mcp": "/health"}[kind]
        super().__init__(
            f"The {kind} tool server",
            f"import sys\nfrom tests.e2e.tool_servers import serve_{kind}\nserve_{kind}(sys.argv[1:])",
            [str(self.port), str(journal)],
            python=python,
            log=folder / f"{kind}-tools.log",
            health=self.url + health,
        )

    def launch(self) -> None:
        """Start the server; `wait_ready` returns when it answers."""
        self.start(child_environment({"PYTHONPATH": str(ROOT)}), cwd=ROOT)


def connection(kind: str, server_id: str, url: str, **config: Any) -> Json:
    """Describe a tool server as the administrator's form does; everybody may use it."""
    return {
        "type": kind,
        "url": url,
        "path": "openapi.json" if kind == "openapi" else "",
        "auth_type": "none",
        "key": "",
        "config": {"enable": True, "access_grants": [READ_BY_EVERYONE], **config},
        "info": {"id": server_id, "name": server_id, "description": "Made for the tests."},
    }


@contextlib.contextmanager
def registered(host: Host, *connections: Json) -> Iterator[None]:
    """Add tool servers to the administrator's settings for a while."""
    path = "/api/v1/configs/tool_servers"
    before = host.admin.request("GET", path)["TOOL_SERVER_CONNECTIONS"] or []
    save = partial(host.admin.request, "POST", path)
    save({"TOOL_SERVER_CONNECTIONS": [*before, *connections]})
    try:
        yield
    finally:
        save({"TOOL_SERVER_CONNECTIONS": before})


@contextlib.contextmanager
def workspace_tool(host: Host, journal: Journal, tool_id: str = WORKSPACE_ID) -> Iterator[str]:
    """Install the workspace tool for everybody; yield its id, which is what `tool_ids` takes."""
    source = Path(workspace_tools.__file__).read_text(encoding="utf-8")
    content = source.replace('JOURNAL = ""', f"JOURNAL = {str(journal.path)!r}")
    form = {
        "id": tool_id,
        "name": tool_id,
        "content": content,
        "meta": {"description": "Made for the tests."},
        "access_grants": [READ_BY_EVERYONE],
    }
    host.admin.request("POST", "/api/v1/tools/create", form)
    try:
        yield tool_id
    finally:
        host.admin.request("DELETE", f"/api/v1/tools/id/{tool_id}/delete")


@dataclass(frozen=True)
class ToolServers:
    """The running tools, by what `tool_ids` of a question takes, and the journal of their runs."""

    openapi: str
    mcp: str
    workspace: str
    journal: Journal
    openapi_url: str
    mcp_url: str

    @property
    def ids(self) -> list[str]:
        """All three."""
        return [self.workspace, self.openapi, self.mcp]


@contextlib.contextmanager
def tool_servers(host: Host, folder: Path) -> Iterator[ToolServers]:
    """Start both servers, register them with the host and install the workspace tool."""
    from tests.e2e.host import WEBUI_PYTHON

    journal = Journal(folder / "tool-runs.jsonl")
    openapi = ToolServer("openapi", folder, journal.path, python=Path(sys.executable))
    mcp = ToolServer("mcp", folder, journal.path, python=WEBUI_PYTHON)
    with contextlib.ExitStack() as stack:
        for server in (openapi, mcp):
            stack.callback(server.stop)
            server.launch()
        for server in (openapi, mcp):
            server.wait_ready(_START_S)
        both = (
            connection("openapi", OPENAPI_ID, openapi.url),
            connection("mcp", MCP_ID, f"{mcp.url}/mcp"),
        )
        stack.enter_context(registered(host, *both))
        workspace = stack.enter_context(workspace_tool(host, journal))
        yield ToolServers(
            openapi=f"server:{OPENAPI_ID}",
            mcp=f"server:mcp:{MCP_ID}",
            workspace=workspace,
            journal=journal,
            openapi_url=openapi.url,
            mcp_url=f"{mcp.url}/mcp",
        )


# ── The page's part: tools that run in it, approval, questions ────────


@contextlib.contextmanager
def chat_settings(host: Host, **values: Any) -> Iterator[None]:
    """Change the administrator's chat settings for a while.

    `ENABLE_TOOL_PERMISSIONS=True` makes the host heed `params={"tool_approval_mode": "ask"}`;
    `ENABLE_TOOL_SEARCH=True` defers tools with long descriptions.
    """
    with _settings(host, "/api/v1/chats/config", values):
        yield


@contextlib.contextmanager
def direct_tools(host: Host) -> Iterator[None]:
    """Let questions bring tools that run in the page: `tool_servers=[page_tools(…)]`."""
    with _settings(host, "/api/v1/configs/connections", {"ENABLE_DIRECT_INTEGRATIONS": True}):
        yield


@contextlib.contextmanager
def _settings(host: Host, path: str, values: Mapping[str, Any]) -> Iterator[None]:
    before = host.admin.request("GET", path)
    host.admin.request("POST", path, {**before, **values})
    try:
        yield
    finally:
        host.admin.request("POST", path, before)


def page_tools(**tools: Json) -> Json:
    """Describe a tool server of the page: each tool with the JSON schema of its parameters."""
    specs = [
        {"name": name, "description": f"{name}, in the page.", "parameters": parameters}
        for name, parameters in tools.items()
    ]
    return {"url": "http://page.invalid", "info": {"title": "Page"}, "openapi": {}, "specs": specs}


@dataclass
class Questions:
    """What the server asked the page, in order: (type, data)."""

    asked: list[tuple[str, Json]] = field(default_factory=list)

    def of(self, kind: str) -> list[Json]:
        """Return the data of the questions of one type."""
        return [data for name, data in self.asked if name == kind]


@contextlib.asynccontextmanager
async def answering(tab: Tab, **answers: Callable[[Json], Any]) -> AsyncIterator[Questions]:
    """Answer what the server asks this page, as its script would do.

    The names are those of `__event_call__` with an underscore for each colon: `execute_tool`,
    `confirmation`, `input`, `request_user_input`. An answer may be a coroutine function's.
    """
    questions = Questions()
    usual = tab.socket.handlers["/"]["events"]

    async def on_event(message: Json) -> Any:
        usual(message)
        data = message.get("data") or {}
        kind = str(data.get("type", ""))
        answer = answers.get(kind.replace(":", "_"))
        if answer is None:
            return None
        questions.asked.append((kind, data.get("data") or {}))
        given = answer(data.get("data") or {})
        return await given if asyncio.iscoroutine(given) else given

    tab.socket.on("events", on_event)
    try:
        yield questions
    finally:
        tab.socket.on("events", usual)


async def resolve(turn: Turn, call_id: str, action: str, **fields: Any) -> Json:
    """Press Allow (`approve`), Deny (`reject`) or send the answers of `ask_user` (`answer`, `answers=…`)."""
    path = f"/api/v1/chats/{turn.chat_id}/messages/{turn.message_id}/resolve"
    return await turn.tab.call("POST", path, {"call_id": call_id, "action": action, **fields})


async def saved(turn: Turn, condition: Callable[[Json], Any], what: str) -> Json:
    """Return the message as saved once it is as wanted: a turn that waits for a person ends several times."""
    from tests.e2e.driver import until

    def read() -> Json | None:
        chat = turn.tab.client.request("GET", f"/api/v1/chats/{turn.chat_id}")
        message = chat["chat"]["history"]["messages"][turn.message_id]
        return message if condition(message) else None

    return await until(read, what)


def script(*rounds: Any, **more: Any) -> str:
    """Write tool rounds into a question, as the simulator reads them: docs/simulator.md, Scripts."""
    return f"[[script {json.dumps({'rounds': rounds, **more}, ensure_ascii=False)}]]"


def call(name: str, /, **arguments: Any) -> Json:
    """One call of a round."""
    return {"name": name, "arguments": arguments}


def picture_of(data_url: str) -> bytes:
    """Return the bytes of a data URL."""
    return base64.b64decode(data_url.partition(",")[2])
