"""The command line: `simulate`, `run`, `install`, `chat`, `models`, `artifacts` and `metrics`.

Needs the standard library only until a command is chosen: `install` works with any Python 3.11, and
`run` looks for Open WebUI before it loads anything.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.util
import json
import logging
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn, cast

from openrouter_responses_pipe import webui

if TYPE_CHECKING:
    from openrouter_responses_pipe.openrouter_responses_pipe import ModelSpec

OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130
DEMO_EMAIL: Final = "admin@example.com"
DEMO_PORTS: Final = range(8080, 8100)
# Asked for in this order when OPENROUTER_API_KEY leads to the real OpenRouter.
DEMO_MODELS: Final = ("openai/gpt-5-mini", "openai/gpt-4o-mini", "google/gemini-2.5-flash")
DEMO_RATE: Final = 50  # words per second of the simulator: about what a real model does
OPENROUTER_URL: Final = "https://openrouter.ai/api/v1"
MODEL_SORTS: Final = ("name", "newest", "price", "context")
# option -> (what it says of the models that are left, how it is known)
MODEL_FILTERS: Final[dict[str, tuple[str, Callable[[ModelSpec], bool]]]] = {
    "free": ("cost nothing", lambda spec: spec.is_free),
    "vision": ("see pictures", lambda spec: spec.takes_images),
    "tools": ("call tools", lambda spec: spec.takes_tools),
}
# what the table says of a model
MODEL_ABILITIES: Final[dict[str, Callable[[ModelSpec], bool]]] = {
    "tools": lambda spec: spec.takes_tools,
    "reasoning": lambda spec: spec.reasons,
    "vision": lambda spec: spec.takes_images,
    "files": lambda spec: spec.takes_files,
    "audio": lambda spec: spec.takes_audio,
    "video": lambda spec: spec.takes_video,
    "schemas": lambda spec: spec.takes_schemas,
    "web": lambda spec: spec.searches_web,
    "draws": lambda spec: spec.writes_images,
}
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status; a failure is one sentence on stderr."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["simulate"]:
        from openrouter_responses_pipe import simulator

        return simulator.main(argv[1:]) or OK
    args = _parser().parse_args(argv)
    try:
        return args.command(args)
    except webui.WebUIError as error:
        print(error, file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    """Return the parser of every command."""
    parser = argparse.ArgumentParser(
        prog="python -m openrouter_responses_pipe",
        description="OpenRouter's Responses API for Open WebUI, in one file.",
    )
    commands = parser.add_subparsers(required=True, metavar="command")
    commands.add_parser("simulate", help="imitate OpenRouter on a loopback port (see simulate --help)")

    run = commands.add_parser("run", help="start an Open WebUI with the pipe in it")
    run.add_argument("--port", type=int, help="the port to listen on (default: the first free one from 8080)")
    run.add_argument("--data", type=Path, default=Path(".webui/data"), help="where everything is kept")
    run.set_defaults(command=run_demo)

    install = commands.add_parser("install", help="install or update the pipe in a running Open WebUI")
    install.add_argument(
        "--url", required=True, help="the address of Open WebUI, such as http://localhost:8080"
    )
    install.add_argument(
        "--token",
        default=os.environ.get("OPEN_WEBUI_TOKEN", ""),
        help="an administrator's token or API key; `ps` shows it, better is $OPEN_WEBUI_TOKEN (the default)",
    )
    install.add_argument("--id", default=webui.FUNCTION_ID, help="the function's id (default: %(default)s)")
    install.add_argument(
        "--name", default=webui.FUNCTION_NAME, help="the function's name (default: %(default)s)"
    )
    install.set_defaults(command=install_pipe)

    chat = commands.add_parser("chat", help="ask one question in the terminal, without Open WebUI")
    chat.add_argument("question")
    chat.add_argument("--model", default=DEMO_MODELS[0], help="an OpenRouter model id (default: %(default)s)")
    chat.add_argument(
        "--key", default="", help="the API key; `ps` shows it, better is $OPENROUTER_API_KEY (the default)"
    )
    chat.add_argument("--base-url", default="", help=f"where the API is (default: {OPENROUTER_URL})")
    chat.set_defaults(command=chat_once)

    models = commands.add_parser("models", help="list OpenRouter's models: what they can do and cost")
    for name, (words, _) in MODEL_FILTERS.items():
        models.add_argument(f"--{name}", action="store_true", help=f"only models that {words}")
    models.add_argument(
        "--sort", choices=MODEL_SORTS, default="name", help="the order (default: %(default)s)"
    )
    models.add_argument("--json", action="store_true", help="print all that is known, as JSON")
    models.add_argument(
        "--key", default="", help="an API key; not needed; `ps` shows it (default: $OPENROUTER_API_KEY)"
    )
    models.add_argument("--base-url", default="", help=f"where the API is (default: {OPENROUTER_URL})")
    models.set_defaults(command=list_models)

    artifacts = commands.add_parser(
        "artifacts", help="look after what the pipe keeps in Open WebUI's database"
    )
    database = _database_options()
    _add_artifact_commands(artifacts.add_subparsers(required=True, metavar="command"), database)

    metrics = commands.add_parser(
        "metrics", parents=[database], help="add up what all workers have done and used"
    )
    metrics.add_argument(
        "--hours", type=_hours, default=24.0, help="how far to look back (default: %(default)g)"
    )
    metrics.set_defaults(command=sum_metrics)
    return parser


def _database_options() -> argparse.ArgumentParser:
    """Return the options of all commands that read Open WebUI's database."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--database",
        default=os.environ.get("DATABASE_URL", ""),
        metavar="URL",
        help="Open WebUI's database, such as sqlite:////path/to/webui.db (default: $DATABASE_URL)",
    )
    common.add_argument(
        "--schema",
        default=os.environ.get("DATABASE_SCHEMA", ""),
        help="where in it the tables are (default: $DATABASE_SCHEMA)",
    )
    common.add_argument("--id", default=webui.FUNCTION_ID, help="the function's id (default: %(default)s)")
    common.add_argument("--json", action="store_true", help="print JSON")
    return common


def _add_artifact_commands(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add `stats`, `prune` and `verify`, with what all of them take."""
    stats = commands.add_parser("stats", parents=[common], help="how much is kept, and how old it is")
    stats.set_defaults(command=manage_artifacts, what="stats")

    prune = commands.add_parser("prune", parents=[common], help="delete what nobody needs any more")
    prune.add_argument("--days", type=_days, help="what nobody has used for so many days (1 at least)")
    prune.add_argument(
        "--deleted-chats", action="store_true", help="what is of chats that Open WebUI does not have any more"
    )
    prune.add_argument("--dry-run", action="store_true", help="delete nothing, say what would be deleted")
    prune.set_defaults(command=manage_artifacts, what="prune")

    verify = commands.add_parser(
        "verify", parents=[common], help="open everything; ends with 1 if that fails"
    )
    verify.add_argument(
        "--secret",
        action="append",
        help="the server's secret key, also several times; `ps` shows it (default: $WEBUI_SECRET_KEY)",
    )
    verify.add_argument(
        "--artifact-key",
        default="",
        help="what the valve ARTIFACT_ENCRYPTION_KEY holds (default: $ARTIFACT_ENCRYPTION_KEY)",
    )
    verify.set_defaults(command=manage_artifacts, what="verify")


def _days(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError("a whole number of days, 1 at least, is expected")
    return int(text)


def _hours(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < (hours := float(text)) < float("inf"):
            return hours
    raise argparse.ArgumentTypeError("a number of hours, more than 0, is expected")


# ── install ───────────────────────────────────────────────────────────


def install_pipe(args: argparse.Namespace) -> int:
    """Put this checkout's pipe into a running Open WebUI, or update it there."""
    if not args.token:
        print("Give an administrator's token with --token or in OPEN_WEBUI_TOKEN.", file=sys.stderr)
        return USAGE
    function_id = args.id.lower()
    if not function_id.isidentifier():
        print(f"{args.id!r} cannot be a function id: use letters, digits and underscores.", file=sys.stderr)
        return USAGE
    client = webui.WebUIClient(args.url, args.token)
    client.require_admin()
    is_new = client.install_function(webui.PIPE_FILE.read_text(encoding="utf-8"), function_id, args.name)
    print(f"The function {function_id!r} has been {'installed and enabled' if is_new else 'updated'}.")
    if is_new:
        print(f"Next: set API_KEY at {client.url}/admin/functions, and choose who may use the models.")
    return OK


# ── run ───────────────────────────────────────────────────────────────


def run_demo(args: argparse.Namespace) -> int:
    """Start Open WebUI with the pipe in it, say how to use it, and stay until told to stop."""
    python = _webui_python()
    if args.port and not webui.port_is_free(args.port):
        raise webui.WebUIError(f"Port {args.port} is already in use: choose another one with PORT=….")
    port = args.port or webui.free_port(DEMO_PORTS)
    folder: Path = args.data
    for number in _STOP_SIGNALS:
        signal.signal(number, _interrupt)
    with _only_one(folder), contextlib.ExitStack() as stack:
        try:
            _serve(folder, port, python, stack)
        except KeyboardInterrupt:  # the way to stop it, at any time
            return OK
        finally:
            _ignore_signals()


def _serve(folder: Path, port: int, python: Path, stack: contextlib.ExitStack) -> NoReturn:
    """Start what the demo needs, each with its end on the stack, and wait."""
    key = os.environ.get("OPENROUTER_API_KEY", "")
    servers: list[webui.ServerProcess] = []
    base_url = None
    if not key:
        simulator = webui.SimulatorServer(folder / "simulator.log", python=python, rate=DEMO_RATE)
        stack.callback(simulator.stop)
        simulator.launch()
        servers.append(simulator)
        base_url = simulator.base_url
    server = webui.WebUIServer(folder, port=port, python=python)
    stack.callback(server.stop)
    with _progress("Starting Open WebUI") as progress:
        server.launch(proxies=bool(key))
        server.wait_ready(progress=progress)
    servers.append(server)
    with _progress("Installing the pipe and asking it a first question"):
        password = _prepare(server, key, base_url)
    _print_block(server, password, base_url)
    _stay(servers)


def _webui_python() -> Path:
    """Return an interpreter that has Open WebUI: this one, else the one `make run` has made."""
    if importlib.util.find_spec("open_webui"):
        return Path(sys.executable)
    made = Path(__file__).resolve().parent.parent / ".webui" / "venv" / "bin" / "python"
    if made.exists():
        return made
    raise webui.WebUIError(
        "Open WebUI is not installed in this Python: `make run` installs it and starts it."
    )


def _interrupt(_number: int, _frame: object) -> None:
    """Turn each of the signals that mean "stop" into the exception of Ctrl-C."""
    raise KeyboardInterrupt


def _ignore_signals() -> None:
    """Let nothing interrupt the clean-up: a second Ctrl-C must not leave a server behind."""
    for number in _STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    """Hold the data folder, so that two demos never share one database."""
    import fcntl

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise webui.WebUIError(f"The data in {folder} is in use: is the demo already running?") from None
        yield


@contextlib.contextmanager
def _progress(title: str) -> Iterator[Callable[[float], None]]:
    """Show a line while something takes time: rewritten in a terminal, now and then elsewhere."""
    terminal = sys.stdout.isatty()
    started = time.monotonic()
    print(f"{title} …", end="" if terminal else "\n", flush=True)

    def show(seconds: float) -> None:
        if terminal:
            print(f"\r{title} … {seconds:.0f} s", end="", flush=True)
        elif int(seconds) % 15 == 0:
            print(f"{title} … {seconds:.0f} s", flush=True)

    try:
        yield show
    except BaseException:
        if terminal:
            print()
        raise
    print(f"\r{title}: {time.monotonic() - started:.0f} s" if terminal else "… done", flush=True)


def _prepare(server: webui.WebUIServer, key: str, base_url: str | None) -> str:
    """Log in, install and configure the pipe, see a chat answered; return the demo's password."""
    password = webui.stored_secret(server.folder / "admin_password", 6)
    client = webui.WebUIClient(server.url)
    try:
        client.signin(DEMO_EMAIL, password)
    except webui.WebUIError:
        try:
            client.signup("Admin", DEMO_EMAIL, password)
        except webui.WebUIError as error:
            raise webui.WebUIError(
                f"The demo's login no longer works ({error}). Delete {server.folder} to start afresh."
            ) from None
    client.install_function(webui.PIPE_FILE.read_text(encoding="utf-8"))
    client.set_valves({"API_KEY": key or "sk-or-v1-demo", "BASE_URL": base_url})
    model_id, name = _choose_model(client)
    client.open_to_everyone(model_id, name)
    client.set_default_model(model_id)
    try:
        text = webui.answer_text(client.complete(model_id, "Say hello in one short sentence."))
    except webui.WebUIError as error:
        raise webui.WebUIError(f"The first chat failed: {error}") from None
    if not text.strip():
        raise webui.WebUIError(f"The first chat brought an empty answer.\n{server.tail()}")
    return password


def _choose_model(client: webui.WebUIClient) -> tuple[str, str]:
    """Return id and name of the model that the demo opens with."""
    prefix = f"{webui.FUNCTION_ID}."
    rows = [row for row in client.models(refresh=True) if row["id"].startswith(prefix)]
    # OpenRouter's ids have an author; an entry without one only says what is wrong
    offered = {row["id"]: row["name"] for row in rows if "/" in row["id"]}
    if not offered:
        words = rows[0]["name"] if rows else "see the log in the data folder"
        raise webui.WebUIError(f"The pipe lists no model: {words}")
    wanted = [prefix + model for model in DEMO_MODELS if prefix + model in offered]
    model_id = next(iter([*wanted, *offered]))
    return model_id, offered[model_id]


def _print_block(server: webui.WebUIServer, password: str, base_url: str | None) -> None:
    """Print what a person needs to know to use and to stop the demo."""
    if base_url:
        source = f"the OpenRouter simulator at {base_url}, no key needed\n" + " " * 10
        source += "(OPENROUTER_API_KEY=sk-or-… make run uses the real OpenRouter)"
    else:
        source = "OpenRouter, with the key in OPENROUTER_API_KEY"
    print(
        f"\n  Open    {server.url}\n"
        f"  Login   {DEMO_EMAIL}   password {password}\n"
        f"  Models  {source}\n"
        f"  Logs    {server.folder}\n"
        f"  Stop    Ctrl-C\n",
        flush=True,
    )


def _stay(servers: Sequence[webui.ServerProcess]) -> NoReturn:
    """Wait for ever; raise when a server ends by itself."""
    while True:
        for server in servers:
            if not server.running:
                raise webui.WebUIError(f"{server.name} has ended by itself.\n{server.tail()}")
        time.sleep(0.5)


# ── chat ──────────────────────────────────────────────────────────────


def chat_once(args: argparse.Namespace) -> int:
    """Stream one answer to the terminal through the same `Pipe` that Open WebUI calls."""
    key = args.key or os.environ.get("OPENROUTER_API_KEY", "")
    if not key and not args.base_url:
        print("Set OPENROUTER_API_KEY, or name a server with --base-url.", file=sys.stderr)
        return USAGE
    logging.disable(logging.WARNING)  # what it says is for a server's log
    try:
        return asyncio.run(_chat(args, key))
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return INTERRUPTED


async def _chat(args: argparse.Namespace, key: str) -> int:
    """Ask, print, and close the stream whatever happens."""
    _without_open_webui()
    from openrouter_responses_pipe.openrouter_responses_pipe import Pipe

    pipe = Pipe()
    settings = {"API_KEY": key or "none", "BASE_URL": args.base_url or OPENROUTER_URL}
    pipe.valves = pipe.Valves.model_validate(settings)
    body = {
        "model": f"{webui.FUNCTION_ID}.{args.model}",
        "messages": [{"role": "user", "content": args.question}],
        "stream": True,
    }
    user = {"id": "terminal", "name": "Terminal", "email": "", "role": "admin"}
    async with contextlib.aclosing(pipe):
        answer: Any = await pipe.pipe(body=body, __user__=user, __metadata__={})
        if hasattr(answer, "__aiter__"):
            async with contextlib.aclosing(answer) as chunks:
                error = await _print_chunks(chunks)
        else:
            error = _error_text(answer) or str(answer)
    if error:
        print(error, file=sys.stderr)
        return FAILED
    return OK


def _without_open_webui() -> None:
    """Keep an Open WebUI that happens to be installed from reading its settings and opening its database."""
    sys.modules.setdefault("open_webui", cast(Any, None))


async def _print_chunks(chunks: AsyncIterator[Any]) -> str:
    """Print text to stdout and reasoning, dimmed, to a terminal; return the error that ended it, if any."""
    dim = sys.stderr.isatty()
    thinking = answering = False
    error = ""
    async for chunk in chunks:
        if error := _error_text(chunk):
            break
        delta = _delta(chunk)
        if (reasoning := delta.get("reasoning_content")) and dim:
            thinking = True
            print(f"\x1b[2m{_harmless(reasoning)}\x1b[0m", end="", file=sys.stderr, flush=True)
        if content := delta.get("content"):
            if thinking:
                thinking = False
                print("\n", file=sys.stderr, flush=True)
            answering = True
            print(_harmless(content) if sys.stdout.isatty() else content, end="", flush=True)
    if thinking:
        print(file=sys.stderr)
    if answering:
        print(flush=True)
    return error


def _harmless(text: str) -> str:
    """Text of a model without what would steer a terminal: colours, titles, the clipboard."""
    return "".join(char for char in text if (char >= " " and not "\x7f" <= char <= "\x9f") or char in "\n\t")


def _delta(chunk: Any) -> dict[str, Any]:
    """Return the delta of a chat.completion.chunk, or a piece of plain text as one."""
    if isinstance(chunk, str):
        return {"content": chunk}
    choices = chunk.get("choices") if isinstance(chunk, dict) else None
    return (choices[0].get("delta") or {}) if choices else {}


def _error_text(chunk: Any) -> str:
    """Return the sentence of an error chunk, or nothing."""
    error = chunk.get("error") if isinstance(chunk, dict) else None
    if isinstance(error, dict):
        error = error.get("detail") or error.get("message") or json.dumps(error)
    return str(error) if error else ""


# ── models ────────────────────────────────────────────────────────────


def list_models(args: argparse.Namespace) -> int:
    """Print the catalog: a table, or JSON."""
    logging.disable(logging.WARNING)  # what it says is for a server's log
    specs = asyncio.run(_load_models(args))
    if isinstance(specs, str):
        print(specs, file=sys.stderr)
        return FAILED
    chosen = [has for name, (_, has) in MODEL_FILTERS.items() if getattr(args, name)]
    specs = [spec for spec in specs if all(has(spec) for has in chosen)]
    print(_models_as_json(specs) if args.json else _models_as_table(specs))
    return OK


async def _load_models(args: argparse.Namespace) -> list[ModelSpec] | str:
    """Return the models in their order, or why there are none."""
    _without_open_webui()
    from openrouter_responses_pipe import openrouter_responses_pipe as pipe

    key = args.key or os.environ.get("OPENROUTER_API_KEY", "")
    connection = pipe.Connection((args.base_url or OPENROUTER_URL).rstrip("/"), key)
    client = pipe.OpenRouterClient()
    try:
        registry = pipe.OpenRouterModelRegistry(client.get_json, time.monotonic)
        models = await registry.ensure_loaded(connection)
    except pipe.PipeError as error:
        return error.user_message
    finally:
        await client.aclose()
    return pipe.in_order(models.values(), args.sort)


def _models_as_table(specs: Sequence[ModelSpec]) -> str:
    """Return one line per model under a head; prices in US dollars per million tokens, in / out."""
    from openrouter_responses_pipe.openrouter_responses_pipe import format_price, format_tokens

    rows = [("model", "context", "price", "can")]
    for spec in specs:
        can = " ".join(name for name, has in MODEL_ABILITIES.items() if has(spec))
        rows.append((spec.id, format_tokens(spec.context_length) or "?", format_price(spec) or "?", can))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = ["  ".join([*map(str.ljust, row, widths), row[3]]).rstrip() for row in rows]
    return "\n".join([*lines, f"{len(specs)} models; prices in US dollars per million tokens, in / out"])


def _models_as_json(specs: Sequence[ModelSpec]) -> str:
    """Return a list of objects: the fields of `ModelSpec`, and what the model can."""
    entries: list[dict[str, Any]] = []
    for spec in specs:
        entry = spec._asdict()
        entry["reasoning"] = spec.reasoning and spec.reasoning._asdict()
        entry["overrides"] = [override._asdict() for override in spec.overrides]
        entry["can"] = [name for name, has in MODEL_ABILITIES.items() if has(spec)]
        entries.append(entry)
    return json.dumps(entries, indent=2, default=sorted, ensure_ascii=False)


# ── artifacts and metrics ────────────────────────────────────────────


def manage_artifacts(args: argparse.Namespace) -> int:
    """Look into the table of artifacts, or delete from it."""
    if args.database and args.what == "prune" and args.days is None and not args.deleted_chats:
        print("Say what to delete: --days, --deleted-chats or both.", file=sys.stderr)
        return USAGE
    return _on_database(args, "artifacts")


def sum_metrics(args: argparse.Namespace) -> int:
    """Say what all workers have done and used."""
    return _on_database(args, "metrics")


def _on_database(args: argparse.Namespace, module: str) -> int:
    """Run what a module does with Open WebUI's database."""
    if not args.database:
        print("Name Open WebUI's database with --database or in DATABASE_URL.", file=sys.stderr)
        return USAGE
    logging.disable(logging.WARNING)  # what it says is for a server's log
    _without_open_webui()
    from openrouter_responses_pipe import artifacts, metrics

    try:
        return OK if {"artifacts": artifacts, "metrics": metrics}[module].run(args) else FAILED
    except artifacts.CommandError as error:
        print(error, file=sys.stderr)
        return FAILED


if __name__ == "__main__":
    sys.exit(main())
