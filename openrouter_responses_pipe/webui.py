"""Start a real Open WebUI and drive it through its own HTTP API.

`make run`, the `install` command and the end-to-end tests share this module. It needs the standard
library only: Open WebUI itself runs in a process of its own, made by the interpreter that has it
installed. Every failure that a person can do something about is a `WebUIError` whose text is one
plain sentence.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Final

FUNCTION_ID: Final = "openrouter"
FUNCTION_NAME: Final = "OpenRouter"
PIPE_FILE: Final = Path(__file__).with_name("openrouter_responses_pipe.py")
READ_BY_EVERYONE: Final = {"principal_type": "user", "principal_id": "*", "permission": "read"}

_LOOPBACK = "127.0.0.1"
_START_SECONDS = 300.0
_STOP_SECONDS = 10.0
_TAIL_LINES = 20
# What a child may see of our environment: a DATABASE_URL or REDIS_URL of the person who starts the
# demo must not lead it to their production data.
_INHERITED = (
    "PATH", "HOME", "USER", "LANG", "LC_ALL", "TZ", "TMPDIR", "SSL_CERT_FILE", "SSL_CERT_DIR",
    "REQUESTS_CA_BUNDLE", "SYSTEMROOT",
)  # fmt: skip
_PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")
# The kernel ends the child when we die without saying good-bye (Linux; elsewhere nothing happens).
_DIE_WITH_PARENT = (
    "import ctypes, signal\n"
    "try: ctypes.CDLL(None).prctl(1, signal.SIGTERM)\n"
    "except (OSError, AttributeError): pass\n"
)

# How long something has been awaited, in seconds; called about once a second.
Progress = Callable[[float], None]


class WebUIError(Exception):
    """Open WebUI could not be started, reached or persuaded; `status` is the HTTP status if there was one."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


# ── Processes ─────────────────────────────────────────────────────────


def port_is_free(port: int) -> bool:
    """Tell whether a server could listen on this loopback port now."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((_LOOPBACK, port))
        except OSError:
            return False
    return True


def free_port(preferred: Sequence[int] = ()) -> int:
    """Return the first free port of `preferred`, or any free one."""
    for port in preferred:
        if port_is_free(port):
            return port
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind((_LOOPBACK, 0))
        return probe.getsockname()[1]


def child_environment(extra: Mapping[str, str], *, proxies: bool = False) -> dict[str, str]:
    """Return the small environment a child process gets; proxies only where it must leave this machine."""
    names = [*_INHERITED, *_PROXIES, *(name.lower() for name in _PROXIES)] if proxies else _INHERITED
    kept = {name: os.environ[name] for name in names if name in os.environ}
    if proxies:
        kept["NO_PROXY"] = ",".join(filter(None, [kept.get("NO_PROXY"), _LOOPBACK, "localhost"]))
    return {**kept, "PYTHONUNBUFFERED": "1", **extra}


class ServerProcess:
    """A server in a process group of its own, with its output in a log file."""

    poll_s: ClassVar[float] = 0.1  # how often `wait_ready` looks

    def __init__(
        self, name: str, code: str, argv: Sequence[str], *, python: Path, log: Path, health: str
    ) -> None:
        self.name = name
        self.log = log
        self.health = health
        self._command = [str(python), "-c", _DIE_WITH_PARENT + code, *argv]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, env: Mapping[str, str], cwd: Path) -> None:
        """Start the process; it reads no input and its output goes to the log."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as out:
            self._process = subprocess.Popen(
                self._command,
                env=dict(env),
                cwd=cwd,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def running(self) -> bool:
        """Whether the process has been started and has not ended."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        """The process id, which is also its group's; raises before `start`."""
        if self._process is None:
            raise WebUIError(f"{self.name} has not been started.")
        return self._process.pid

    def wait_ready(self, timeout_s: float = _START_SECONDS, progress: Progress | None = None) -> None:
        """Return when the server answers; a dead or late server raises with its log's tail."""
        started = time.monotonic()
        shown = 0.0
        while (waited := time.monotonic() - started) < timeout_s:
            if not self.running:
                raise WebUIError(f"{self.name} ended while it was starting.\n{self.tail()}")
            if self.answers():
                return
            if progress and waited - shown >= 1.0:
                shown = waited
                progress(waited)
            time.sleep(self.poll_s)
        raise WebUIError(f"{self.name} did not answer within {timeout_s:.0f} seconds.\n{self.tail()}")

    def answers(self) -> bool:
        """Tell whether the server takes requests: here, whether a GET of its health address succeeds."""
        return _answers(self.health)

    def tail(self, lines: int = _TAIL_LINES) -> str:
        """Return the last lines of the log, headed by its path."""
        try:
            text = self.log.read_text(encoding="utf-8", errors="replace")
        except OSError:
            text = ""
        return "\n".join([f"The end of {self.log}:", *(f"  {line}" for line in text.splitlines()[-lines:])])

    def stop(self) -> None:
        """End the process and everything in its group; safe to call at any time and twice."""
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_STOP_SECONDS)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _answers(url: str) -> bool:
    """Tell whether a GET of this loopback address succeeds."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=5) as response:
            return response.status == 200
    except (OSError, http.client.HTTPException):
        return False


class SimulatorServer(ServerProcess):
    """The project's OpenRouter simulator on a loopback port."""

    def __init__(
        self, log: Path, *, port: int | None = None, python: Path | None = None, rate: float = 0
    ) -> None:
        self.port = port or free_port()
        self.base_url = f"http://{_LOOPBACK}:{self.port}/api/v1"
        super().__init__(
            "The OpenRouter simulator",
            "import sys\nfrom openrouter_responses_pipe.__main__ import main\nsys.exit(main(sys.argv[1:]))",
            ["simulate", "--port", str(self.port), "--rate", str(rate)],
            python=python or Path(sys.executable),
            log=log,
            health=f"{self.base_url}/models",
        )

    def launch(self) -> None:
        """Start the simulator from this checkout and wait until it answers."""
        root = Path(__file__).resolve().parent.parent
        self.start(child_environment({"PYTHONPATH": str(root)}), cwd=root)
        self.wait_ready(60)


class WebUIServer(ServerProcess):
    """Open WebUI with a data folder of its own: database, static files, secret key and log all lie in it."""

    code: ClassVar[str] = "from open_webui import app\napp()"

    def __init__(self, folder: Path, *, port: int | None = None, python: Path | None = None) -> None:
        self.folder = folder.resolve()
        self.port = port or free_port()
        self.url = f"http://{_LOOPBACK}:{self.port}"
        super().__init__(
            "Open WebUI",
            self.code,
            ["serve", "--host", _LOOPBACK, "--port", str(self.port)],
            python=python or Path(sys.executable),
            log=self.folder / "open-webui.log",
            health=f"{self.url}/health",
        )

    def launch(self, extra: Mapping[str, str] | None = None, *, proxies: bool = False) -> None:
        """Start the server (it takes half a minute until `wait_ready` returns)."""
        data, static = self.folder / "data", self.folder / "static"
        for folder in (data, static):
            folder.mkdir(parents=True, exist_ok=True)
        settings = {
            "DATA_DIR": str(data),
            "STATIC_DIR": str(static),
            "WEBUI_SECRET_KEY": stored_secret(self.folder / "secret_key"),
            "WEBUI_URL": self.url,
            "CORS_ALLOW_ORIGIN": self.url,
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_OFFLINE": "1",
            "RAG_EMBEDDING_ENGINE": "openai",
            "ENABLE_VERSION_UPDATE_CHECK": "false",
            "ENABLE_OLLAMA_API": "false",
            "ENABLE_OPENAI_API": "false",
            "ANONYMIZED_TELEMETRY": "false",
            "DO_NOT_TRACK": "true",
            **(extra or {}),
        }
        self.start(child_environment(settings, proxies=proxies), cwd=data)


def stored_secret(path: Path, size: int = 24) -> str:
    """Return the secret kept in this file, made of `size` bytes (owner-readable only) on first use."""
    with contextlib.suppress(FileNotFoundError):
        return path.read_text(encoding="utf-8").strip()
    path.parent.mkdir(parents=True, exist_ok=True)
    secret = secrets.token_hex(size)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as out:
        out.write(secret)
    return secret


# ── HTTP client ───────────────────────────────────────────────────────


class WebUIClient:
    """One account's view of a running Open WebUI."""

    def __init__(self, url: str, token: str = "") -> None:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise WebUIError(f"{url!r} is not an address like http://localhost:8080.")
        self.url = url.rstrip("/")
        self.token = token
        loopback = parts.hostname in (_LOOPBACK, "localhost", "::1")
        handlers = [urllib.request.ProxyHandler({})] if loopback else []
        self._opener = urllib.request.build_opener(*handlers)

    def request(self, method: str, path: str, body: Any = None, timeout: float = 60.0) -> Any:
        """Send JSON, return JSON; an HTTP error raises with the server's own words."""
        with self._open(method, path, body, timeout) as response:
            raw = response.read()
        try:
            return json.loads(raw)
        except ValueError:
            raise WebUIError(
                f"{self.url} answered {path} with something that is not JSON: no Open WebUI?"
            ) from None

    def _open(self, method: str, path: str, body: Any, timeout: float) -> http.client.HTTPResponse:
        headers = {"Accept": "application/json"}
        if self.token:
            headers["Authorization"] = f"Bearer {self.token}"
        data = None
        if body is not None:
            headers["Content-Type"] = "application/json"
            data = json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, headers, method=method)
        try:
            return self._opener.open(request, timeout=timeout)
        except urllib.error.HTTPError as error:
            with error:
                raise WebUIError(_server_words(error), error.code) from None
        except urllib.error.URLError as error:
            raise WebUIError(f"Open WebUI cannot be reached at {self.url} ({error.reason}).") from None
        except (OSError, http.client.HTTPException) as error:
            raise WebUIError(
                f"The connection to {self.url} broke ({error or type(error).__name__})."
            ) from None

    # Accounts

    def signup(self, name: str, email: str, password: str) -> None:
        """Create the first account, which becomes the administrator, and act as it."""
        form = {"name": name, "email": email, "password": password}
        self.token = self.request("POST", "/api/v1/auths/signup", form)["token"]

    def signin(self, email: str, password: str) -> None:
        """Act as this account from now on."""
        self.token = self.request("POST", "/api/v1/auths/signin", {"email": email, "password": password})[
            "token"
        ]

    def add_user(self, name: str, email: str, password: str, role: str = "user") -> WebUIClient:
        """Create another account (as administrator) and return a client for it."""
        form = {"name": name, "email": email, "password": password, "role": role}
        return WebUIClient(self.url, self.request("POST", "/api/v1/auths/add", form)["token"])

    def whoami(self) -> dict[str, Any]:
        """Return the account behind the token."""
        return self.request("GET", "/api/v1/auths/")

    def require_admin(self) -> None:
        """Raise a plain sentence unless the token belongs to an administrator."""
        try:
            role = self.whoami().get("role")
        except WebUIError as error:
            if error.status in (401, 403):
                raise WebUIError(
                    "Open WebUI does not accept this token; copy a fresh one from Settings > Account.",
                    error.status,
                ) from None
            raise
        if role != "admin":
            raise WebUIError("This token belongs to an account that is not an administrator.")

    # Functions

    def install_function(
        self, source: str, function_id: str = FUNCTION_ID, name: str = FUNCTION_NAME
    ) -> bool:
        """Create the function or replace its code, and enable it; True when it was new."""
        manifest = read_frontmatter(source)
        form = {
            "id": function_id,
            "name": name,
            "content": source,
            "meta": {"description": manifest.get("description", name), "manifest": manifest},
        }
        known = {row["id"]: row for row in self.request("GET", "/api/v1/functions/")}
        row = known.get(function_id)
        path = f"/api/v1/functions/id/{function_id}/update" if row else "/api/v1/functions/create"
        saved = self.request("POST", path, form)
        if not (row or saved).get("is_active"):
            self.request("POST", f"/api/v1/functions/id/{function_id}/toggle")
        return row is None

    def set_valves(self, values: Mapping[str, Any], function_id: str = FUNCTION_ID) -> None:
        """Change these valves and keep the others; None puts a valve back to its default."""
        path = f"/api/v1/functions/id/{function_id}/valves"
        stored = self.request("GET", path) or {}
        self.request("POST", f"{path}/update", {**stored, **values})

    # Models and chats

    def models(self, *, refresh: bool = False) -> list[dict[str, Any]]:
        """Return the models this account may use."""
        return self.request("GET", f"/api/models{'?refresh=true' if refresh else ''}")["data"]

    def model_rows(self) -> dict[str, dict[str, Any]]:
        """Return by id what Open WebUI itself keeps of models: names, capabilities, access."""
        return {row["id"]: row for row in self.request("GET", "/api/v1/models/base")}

    def create_model(self, row: Mapping[str, Any]) -> None:
        """Add what Open WebUI keeps of a model; with `base_model_id` it is a model of the workspace."""
        self.request("POST", "/api/v1/models/create", {"meta": {}, "params": {}, **row})

    def update_model(self, row: Mapping[str, Any]) -> None:
        """Write anew, whole but for the access, what Open WebUI keeps of a model."""
        self.request("POST", "/api/v1/models/model/update", row)

    def delete_model(self, model_id: str) -> None:
        """Remove what Open WebUI keeps of a model, and its access."""
        self.request("POST", "/api/v1/models/model/delete", {"id": model_id})

    def set_access(self, model_id: str, grants: Sequence[Mapping[str, str]]) -> None:
        """Say who may use a model besides the administrators."""
        form = {"id": model_id, "access_grants": list(grants)}
        self.request("POST", "/api/v1/models/model/access/update", form)

    def open_to_everyone(self, model_id: str, name: str) -> None:
        """Let every account use this model; until then a pipe's models are the administrators' own."""
        form = {"id": model_id, "name": name, "access_grants": [READ_BY_EVERYONE]}
        self.request("POST", "/api/v1/models/model/access/update", form)

    def set_default_model(self, model_id: str) -> None:
        """Make this the model that a new chat starts with."""
        config = self.request("GET", "/api/v1/configs/models")
        self.request("POST", "/api/v1/configs/models", {**config, "DEFAULT_MODELS": model_id})

    def complete(self, model_id: str, question: str, timeout: float = 120.0, **fields: Any) -> dict[str, Any]:
        """Ask one question outside any chat and return the whole answer."""
        body = {
            "model": model_id,
            "messages": [{"role": "user", "content": question}],
            "stream": False,
            **fields,
        }
        return self.request("POST", "/api/chat/completions", body, timeout)

    def stream(self, path: str, body: Any, timeout: float = 120.0) -> Iterator[str]:
        """Send JSON and yield the `data:` payloads of the answer as they arrive, `[DONE]` included."""
        with self._open("POST", path, body, timeout) as response:
            for raw in response:
                line = raw.decode().rstrip("\r\n")
                if line.startswith("data:"):
                    yield line[5:].strip()


def _server_words(error: urllib.error.HTTPError) -> str:
    """Return what the server says about an HTTP error, else its status line."""
    try:
        body = json.loads(error.read())
    except (ValueError, OSError, http.client.HTTPException):
        body = None
    words: Any = body
    for key in ("detail", "error", "message"):
        if isinstance(words, dict) and key in words:
            words = words[key]
    return str(words) if words else f"HTTP {error.code} {error.reason}"


def read_frontmatter(source: str) -> dict[str, str]:
    """Return the `key: value` lines that open a function's file, as Open WebUI reads them."""
    lines = source.splitlines()
    if not lines or lines[0].strip() != '"""':
        return {}
    found: dict[str, str] = {}
    for line in lines[1:]:
        if '"""' in line:
            break
        if match := re.match(r"\s*([a-z_]+):\s*(.*)\s*$", line, re.IGNORECASE):
            found[match[1].lower()] = match[2].strip()
    return found


def answer_text(completion: Mapping[str, Any]) -> str:
    """Return the text of a chat completion, or raise with the error it carries."""
    error = completion.get("error") or (None if completion.get("choices") else completion.get("detail"))
    if error:
        words = error
        for key in ("detail", "message"):
            if isinstance(words, dict) and key in words:
                words = words[key]
        raise WebUIError(str(words))
    choices = completion.get("choices") or [{}]
    return str((choices[0].get("message") or {}).get("content") or "")
