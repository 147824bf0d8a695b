"""The pages and the code say the same: valves, events, floors, names, links and commands."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Final

import pytest
from test_shape import MODULE, Source, words

from openrouter_responses_pipe import openrouter_responses_pipe as module

ROOT: Final = Path(__file__).parents[1]
DOCS: Final = ROOT / "docs"
README: Final = ROOT / "README.md"
INDEX: Final = DOCS / "documentation_index.md"
ATLAS: Final = DOCS / "valves_and_configuration_atlas.md"
STREAMING: Final = DOCS / "streaming_pipeline_and_emitters.md"
NAMED_FLOORS: Final = re.compile(r"\b[Ff]loors? (\d+[a-z]?)(?:\s*(?:–|-|to|and)\s*(\d+[a-z]?))?")
PAGES: Final = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md")])

# Names that were given with the specification, and the floor that is the home of each.
GIVEN_NAMES: Final[dict[int, str]] = {
    1: "_STREAMING_PRESETS _REMOTE_FILE_MAX_SIZE_DEFAULT_MB _MARKDOWN_IMAGE_RE _QUEUE_MAXSIZE",
    2: """StatusMessages FunctionCall ToolCall Message UsageStats ArtifactPayload _PipeJob _QueuedToolCall
        _ToolExecutionContext""",
    3: "_RetryableHTTPStatusError OpenRouterAPIError",
    4: "EncryptedStr _is_safe_url _validate_base64_size",
    5: """SessionLogger SessionLogger.logs SessionLogger._enqueue SessionLogger.cleanup
        SessionLogger.flush_for_citation""",
    6: "Valves UserValves _merge_user_valves _resolve_valves HostEnvironment ServiceEnvironment",
    7: "OpenWebUIHost _inline_internal_file_url",
    8: """ModelFamily OpenRouterModelRegistry OpenRouterModelRegistry.ensure_loaded _pick_model
        _inject_model_capabilities""",
    9: """CompletionsBody ResponsesBody _transform_messages_to_input _to_input_image _to_input_file
        _to_input_audio _to_input_video _strictify_schema _get_chat_context _extract_system_prompt""",
    10: "SSEDecoder parse_frames",
    11: "StreamState _REDUCERS _CHAT_REDUCERS reduce_event _merge_usage_stats",
    12: "OpenRouterClient _RetryWait",
    13: """DeltaBuffer Emitter Outlet _wrap_event_emitter _emit_update _emit_status _emit_citation
        _emit_notification _emit_tool_prompt _emit_completion _emit_error _emit_templated_error
        _flush_pending""",
    14: "SafeFetcher MediaIntake",
    15: """ArtifactStore RedisWriteBehind _ensure_db_initialized _persist_artifacts _redis_enqueue_rows
        _artifact_cleanup_worker""",
    16: "Metrics CostLedger JobTable",
    17: """CircuitBreaker ToolOrchestrator _get_tool_context _tool_worker_loop _execute_tool_batch
        _shutdown_tool_context""",
    18: """StreamingEngine StreamingEngine._stream_responses StreamingEngine._consume_sse
        StreamingEngine._drain_event_queue""",
    19: "ContextKeeper",
    20: "ImageResults VideoJobs",
    21: "TurnLoop",
    22: """Runtime AdmissionScheduler Runtime._ensure_concurrency_controls Runtime._maybe_start_log_worker
        Runtime._maybe_start_startup_checks Runtime._maybe_start_redis Runtime._maybe_start_cleanup
        Runtime._request_worker_loop Runtime._stop_request_worker Runtime._stop_log_worker
        Runtime._warmup_failed""",
    23: """send_to_openrouter send_to_openrouter_no_stream get_available_models
        get_openrouter_headers""",
    24: "Pipe Pipe.Valves Pipe.UserValves Pipe.pipes Pipe.pipe Pipe.__call__ Pipe._emit_debug_log",
}

# Given names whose work has not come yet. A name leaves this list with its work.
PENDING: Final = words(
    """
    StatusMessages ServiceEnvironment CostLedger JobTable ContextKeeper VideoJobs
    send_to_openrouter send_to_openrouter_no_stream get_available_models get_openrouter_headers
    """
)


@pytest.fixture(scope="module")
def source() -> Source:
    return Source(MODULE.read_text(encoding="utf-8"))


def _names_on_floors(source: Source) -> dict[str, set[int]]:
    """Every definition, attribute of `self` and top-level name, plain and qualified, with its floors."""
    found: dict[str, set[int]] = {}

    def note(name: str, line: int) -> None:
        found.setdefault(name, set()).add(source.floor_number(line))

    for statement in source.tree.body:
        owner = f"{statement.name}." if isinstance(statement, ast.ClassDef) else ""
        for node in ast.walk(statement):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                name = node.name
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                name = node.id
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                name = node.attr
            else:
                continue
            note(name, node.lineno)
            note(f"{owner}{name}", node.lineno)
    return found


def _rows(page: Path) -> str:
    """The table rows of a page."""
    return "\n".join(line for line in page.read_text("utf-8").splitlines() if line.lstrip().startswith("|"))


def _rows_of_tables(page: Path, first_heading: str) -> list[str]:
    """The first cells of the tables of a page whose first column has this heading."""
    cells: list[str] = []
    inside = False
    previous = ""
    for line in page.read_text("utf-8").splitlines():
        if not line.startswith("|"):
            inside = False
        elif not previous.startswith("|"):
            inside = line.split("|")[1].strip() == first_heading
        elif inside:
            cells.append(line.split("|")[1].strip())
        previous = line
    return cells


def _prose(page: Path) -> str:
    """A page without its fenced code."""
    return re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)


def _anchors(page: Path) -> set[str]:
    """The anchors that a page's headings get."""
    headings = re.findall(r"^#+ +(.+?)\s*$", _prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_valve_has_a_row_in_the_atlas() -> None:
    rows = _rows(ATLAS)
    valves = [*module.Valves.model_fields, *module.UserValves.model_fields]
    missing = [name for name in dict.fromkeys(valves) if f"`{name}`" not in rows]
    assert not missing, f"{ATLAS.name} has no row for {missing}"


def test_the_atlas_names_no_valve_that_is_gone() -> None:
    named = re.findall(r"`(\w+)`", " ".join(_rows_of_tables(ATLAS, "Valve")))
    assert named, f"{ATLAS.name} has no table whose first column is headed Valve"
    gone = sorted(set(named) - set(module.Valves.model_fields) - set(module.UserValves.model_fields))
    assert not gone, f"{ATLAS.name} has rows for valves that do not exist: {gone}"


def test_every_event_has_a_row_in_the_streaming_page() -> None:
    rows = _rows(STREAMING)
    missing = [event for event in module._REDUCERS if f"`{event}`" not in rows]
    assert not missing, f"{STREAMING.name} has no row for {missing}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_floors_exist(page: Path, source: Source) -> None:
    known = {floor.label for floor in source.floors}
    named: set[str] = set()
    for first, last in re.findall(
        r"\b[Ff]loors? (\d+[a-z]?)(?:\s*(?:–|-|to|and)\s*(\d+[a-z]?))?", _prose(page)
    ):
        named |= {first, last} - {""}
    assert not named - known, f"{page.name} names floors that do not exist: {sorted(named - known)}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_resolve(page: Path) -> None:
    broken: list[str] = []
    for target in re.findall(r"\]\(([^)\s]+)\)", _prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path) if path else page
        if not there.exists() or (anchor and there.suffix == ".md" and anchor not in _anchors(there)):
            broken.append(target)
    assert not broken, f"{page.name} links to nothing: {broken}"


def test_the_index_lists_every_page() -> None:
    linked = {(INDEX.parent / target.partition("#")[0]).resolve() for target in _links(INDEX)}
    missing = [page.name for page in DOCS.rglob("*.md") if page != INDEX and page.resolve() not in linked]
    assert not missing, f"{INDEX.name} does not link to {missing}"


def _links(page: Path) -> list[str]:
    return [target for target in re.findall(r"\]\(([^)\s]+)\)", _prose(page)) if ":" not in target]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_make_targets_exist(page: Path) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text("utf-8"), flags=re.MULTILINE))
    text = page.read_text("utf-8")
    named = set(re.findall(r"(?:`|^\s*\$?\s*|&& )make ([a-z][\w-]*)", text, flags=re.MULTILINE))
    assert not named - targets, f"{page.name} names make targets that do not exist: {sorted(named - targets)}"


@pytest.mark.parametrize("floor", GIVEN_NAMES)
def test_given_names_are_at_home(floor: int, source: Source) -> None:
    homes = _names_on_floors(source)
    wrong = [
        f"{name} is on {sorted(homes.get(name, ())) or 'no floor'}, its home is {floor}"
        for name in GIVEN_NAMES[floor].split()
        if floor not in homes.get(name, ()) and not (name in PENDING and name not in homes)
    ]
    assert not wrong, "\n".join(wrong)


def test_pending_names_are_really_missing(source: Source) -> None:
    homes = _names_on_floors(source)
    assert not [name for name in PENDING if name in homes], "done: take them out of PENDING"
    given = {name for names in GIVEN_NAMES.values() for name in names.split()}
    assert given >= PENDING


def test_the_errors_page_has_every_kind() -> None:
    rows = _rows(DOCS / "errors_and_user_messages.md")
    for kind, (happened, advice) in module._ADVICE.items():
        words = happened or "(the words say it)"
        group = module._TEMPLATE_CLASSES.get(kind)
        assert f"| `{kind}` | {words} | {advice} | {f'`{group}`' if group else ''} |" in rows
