"""Valves: whatever was stored loads, stays as it was, and is used only where it fits."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, Final, NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from openrouter_responses_pipe.openrouter_responses_pipe import (
    ConfigurationError,
    EncryptedStr,
    HostEnvironment,
    Pipe,
    UserValves,
    Valves,
    _connection,
    _merge_user_valves,
    _resolve_valves,
    _update_limits,
)

Json = dict[str, Any]
SECRET: Final = "the secret of this server"
KEY: Final = "sk-or-v1-0123456789"
ENV: Final = HostEnvironment(secret=SECRET)


@pytest.fixture(autouse=True)
def _secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEBUI_SECRET_KEY", SECRET)


class Row(NamedTuple):
    """One valve: kind, default, bounds, and choices for words."""

    kind: str
    default: Any
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()


PROFILES: Final = ("auto", "quick", "normal", "slow", "custom")
LEVELS: Final = ("DEBUG", "INFO", "WARNING", "ERROR")
ROWS: Final[dict[str, Row]] = {
    "API_KEY": Row("string", ""),
    "BASE_URL": Row("string", "https://openrouter.ai/api/v1"),
    "ALLOW_USER_API_KEYS": Row("boolean", False),
    "CONNECT_TIMEOUT_SECONDS": Row("integer", 10, 1, 60),
    "TIMEOUT": Row("integer", 300, 10, 3600),
    "REQUEST_DEADLINE_SECONDS": Row("integer", 3600, 0),
    "RETRY_ATTEMPTS": Row("integer", 3, 0, 10),
    "RETRY_MAX_WAIT_SECONDS": Row("integer", 30, 1, 300),
    "APP_URL": Row("string", ""),
    "APP_TITLE": Row("string", "Open WebUI"),
    "APP_CATEGORIES": Row("string", "general-chat"),
    "SUPPORT_CONTACT": Row("string", ""),
    "MODEL_ID": Row("string", "auto"),
    "EXCLUDE_KEYWORDS": Row("string", ""),
    "FREE_MODEL_FILTER": Row("string", "all", choices=("all", "only", "exclude")),
    "TOOL_CALLING_FILTER": Row("string", "all", choices=("all", "only", "exclude")),
    "ZDR_MODELS_ONLY": Row("boolean", False),
    "MIN_CONTEXT": Row("integer", 0, 0, 100_000_000),
    "MAX_PRICE": Row("number", 0.0, 0.0, 1_000_000.0),
    "HIDE_EXPIRING_DAYS": Row("integer", 0, 0, 365),
    "VARIANT_MODELS": Row("string", ""),
    "MODEL_SORT": Row("string", "name", choices=("name", "newest", "price", "context")),
    "MODEL_NAME_FORMAT": Row("string", "{name}"),
    "MODEL_CATALOG_REFRESH_SECONDS": Row("integer", 3600, 60, 86_400),
    "ACCOUNT_MODELS_ONLY": Row("boolean", False),
    "SYNC_MODEL_METADATA": Row("string", "capabilities", choices=("off", "capabilities", "all")),
    "NEW_MODEL_ACCESS": Row("string", "admins", choices=("admins", "everyone")),
    "STREAMING_UPDATE_PROFILE": Row("string", "auto", choices=PROFILES),
    "STREAMING_UPDATE_CHAR_LIMIT": Row("integer", 20, 10, 500),
    "STREAMING_IDLE_FLUSH_MS": Row("integer", 250, 0, 2000),
    "SHOW_THINKING": Row("boolean", True),
    "SHOW_FINAL_USAGE_STATUS": Row("boolean", True),
    "STREAMING_CHUNK_QUEUE_MAXSIZE": Row("integer", 100, 1, 10_000),
    "STREAMING_EVENT_QUEUE_MAXSIZE": Row("integer", 100, 1, 10_000),
    "SSE_WORKERS_PER_REQUEST": Row("integer", 2, 1, 8),
    "FORCE_CHAT_COMPLETIONS_MODELS": Row("string", ""),
    "ERROR_TEMPLATES": Row("string", ""),
    "REASONING_EFFORT": Row(
        "string", "", choices=("", "none", "minimal", "low", "medium", "high", "xhigh", "max")
    ),
    "REASONING_SUMMARY": Row("string", "auto", choices=("auto", "concise", "detailed", "off")),
    "PERSIST_REASONING": Row("string", "conversation", choices=("off", "next_reply", "conversation")),
    "USE_MODEL_MAX_OUTPUT_TOKENS": Row("boolean", False),
    "UNSUPPORTED_PARAMETERS": Row("string", "drop", choices=("drop", "use_chat_completions")),
    "MAX_INPUT_IMAGES_PER_REQUEST": Row("integer", 20, 0, 100),
    "IMAGE_INPUT_SELECTION": Row(
        "string", "user_then_assistant", choices=("user_only", "user_then_assistant")
    ),
    "NATIVE_FILES": Row("string", "off", choices=("off", "supported", "always")),
    "PDF_ENGINE": Row("string", "auto", choices=("auto", "native", "mistral-ocr", "cloudflare-ai")),
    "BASE64_MAX_SIZE_MB": Row("integer", 50, 1, 500),
    "VIDEO_MAX_SIZE_MB": Row("integer", 100, 1, 500),
    "SAVE_REMOTE_MEDIA": Row("boolean", True),
    "REMOTE_FILE_MAX_SIZE_MB": Row("integer", 50, 1, 500),
    "ALLOW_HTTP_HOSTS": Row("string", ""),
    "USER_REQUEST_FIELDS": Row("string", ""),
    "PROMPT_CACHING": Row("string", "auto", choices=("auto", "off")),
    "PROMPT_CACHE_TTL": Row("string", "5m", choices=("5m", "1h")),
    "SEND_IDENTIFIERS": Row("string", "hashed", choices=("none", "hashed", "plain")),
    "ENABLE_TOOLS": Row("boolean", True),
    "AVAILABLE_TOOLS": Row("string", "all"),
    "TOOL_EXECUTION_MODE": Row("string", "auto", choices=("auto", "pipe", "open_webui")),
    "STRICT_TOOL_SCHEMAS": Row("boolean", False),
    "MAX_FUNCTION_CALL_LOOPS": Row("integer", 25, 1, 200),
    "MAX_PARALLEL_TOOLS_GLOBAL": Row("integer", 200, 1, 2000),
    "MAX_PARALLEL_TOOLS_PER_REQUEST": Row("integer", 5, 1, 50),
    "TOOL_TIMEOUT_SECONDS": Row("integer", 60, 1, 3600),
    "TOOL_BATCH_TIMEOUT_SECONDS": Row("integer", 120, 1, 3600),
    "TOOL_BREAKER_FAILURES": Row("integer", 5, 1, 100),
    "TOOL_BREAKER_WINDOW_SECONDS": Row("integer", 60, 1, 3600),
    "MAX_TOOL_OUTPUT_CHARS": Row("integer", 100_000, 1000, 2_000_000),
    "TOOL_OUTPUT_RETENTION_TURNS": Row("integer", 10, 0, 1000),
    "ENABLE_ARTIFACT_STORE": Row("boolean", True),
    "PERSIST_TOOL_RESULTS": Row("boolean", True),
    "ARTIFACT_ENCRYPTION_KEY": Row("string", ""),
    "ENCRYPT_ARTIFACTS": Row("string", "reasoning", choices=("off", "reasoning", "all")),
    "ENABLE_LZ4_COMPRESSION": Row("boolean", True),
    "MIN_COMPRESS_BYTES": Row("integer", 256, 0, 1_000_000),
    "DB_BATCH_SIZE": Row("integer", 10, 1, 500),
    "ARTIFACT_CLEANUP_DAYS": Row("integer", 90, 0, 3650),
    "ARTIFACT_CLEANUP_INTERVAL_HOURS": Row("number", 1.0, 0.1, 168.0),
    "ENABLE_REDIS_CACHE": Row("string", "auto", choices=("auto", "on", "off")),
    "REDIS_CACHE_TTL_SECONDS": Row("integer", 600, 1, 86_400),
    "REDIS_PENDING_WARN_THRESHOLD": Row("integer", 100, 1, 1_000_000),
    "MAX_CONCURRENT_REQUESTS": Row("integer", 500, 1, 5000),
    "MAX_CONCURRENT_REQUESTS_PER_USER": Row("integer", 0, 0, 5000),
    "MAX_CONCURRENT_TASKS": Row("integer", 20, 1, 500),
    "ENABLE_STARTUP_CHECKS": Row("boolean", True),
    "LOG_LEVEL": Row("string", "INFO", choices=LEVELS),
    "SESSION_LOG_MAX_LINES": Row("integer", 2000, 100, 20_000),
    "SHOW_ERROR_LOG_CITATION": Row("string", "admins", choices=("off", "admins", "everyone")),
    "DEBUG": Row("boolean", False),
}
USER_ROWS: Final[dict[str, tuple[str, ...]]] = {
    "API_KEY": (),
    "STREAMING_UPDATE_PROFILE": ("inherit", *PROFILES),
    "STREAMING_UPDATE_CHAR_LIMIT": (),
    "STREAMING_IDLE_FLUSH_MS": (),
    "REASONING_EFFORT": ("inherit", "none", "minimal", "low", "medium", "high", "xhigh", "max"),
    "PERSIST_REASONING": ("inherit", "off", "next_reply"),
    "ENABLE_TOOLS": ("inherit", "off"),
    "SHOW_THINKING": ("inherit", "on", "off"),
    "SHOW_FINAL_USAGE_STATUS": ("inherit", "on", "off"),
    "LOG_LEVEL": ("inherit", *LEVELS),
    "DEBUG": ("inherit", "on", "off"),
}
NUMBERS: Final = [name for name, row in ROWS.items() if row.kind == "integer"]
SWITCHES: Final = [name for name, row in ROWS.items() if row.kind == "boolean"]
FRACTIONS: Final = [name for name, row in ROWS.items() if row.kind == "number"]
TEXTS: Final = [name for name, row in ROWS.items() if row.kind == "string"]


def of_admin(**values: Any) -> Valves:
    """The valves as the host loads them from what it has stored, of whatever kind."""
    return Valves(**values)


def of_user(**values: Any) -> UserValves:
    """The same for a user's."""
    return UserValves(**values)


SECRETS: Final = [(of_admin, "API_KEY"), (of_admin, "ARTIFACT_ENCRYPTION_KEY"), (of_user, "API_KEY")]


def stored(valves: Valves | UserValves) -> Json:
    """What the host writes to its database."""
    return valves.model_dump(exclude_unset=True)


def setting(valves: Valves, name: str) -> Any:
    """What a request uses."""
    return getattr(_resolve_valves(valves), name)


# The list


def test_the_module_has_these_valves_in_this_order() -> None:
    assert list(Valves.model_fields) == list(ROWS)
    assert list(UserValves.model_fields) == list(USER_ROWS)
    assert Pipe.Valves is Valves
    assert Pipe.UserValves is UserValves


@pytest.mark.parametrize("name", ROWS)
def test_kind_default_and_bounds(name: str) -> None:
    row = ROWS[name]
    schema = Valves.model_json_schema()["properties"][name]
    assert schema["type"] == row.kind
    assert schema["default"] == row.default
    assert getattr(Valves(), name) == row.default
    assert schema.get("minimum") == row.low
    if row.high is not None:
        assert schema.get("maximum") == row.high
    assert tuple(schema.get("enum", ())) == row.choices
    assert schema["description"]


@pytest.mark.parametrize("name", USER_ROWS)
def test_user_valves_inherit_by_default(name: str) -> None:
    schema = UserValves.model_json_schema()["properties"][name]
    assert schema["default"] == ("" if name == "API_KEY" else "inherit")
    assert tuple(schema.get("enum", ())) == USER_ROWS[name]
    assert schema["description"]


@pytest.mark.parametrize(
    ("model", "names"), [(Valves, ["API_KEY", "ARTIFACT_ENCRYPTION_KEY"]), (UserValves, ["API_KEY"])]
)
def test_secrets_have_a_password_input(model: type[Valves] | type[UserValves], names: list[str]) -> None:
    properties = model.model_json_schema()["properties"]
    secret = [name for name, schema in properties.items() if schema.get("input") == {"type": "password"}]
    assert secret == names
    json.dumps(model.model_json_schema())


# Stored values that fit


def test_what_was_set_is_stored_and_loads_again() -> None:
    given_values: Json = {"BASE_URL": "https://proxy.example/v1", "TIMEOUT": 60, "SHOW_THINKING": False}
    valves = of_admin(**given_values)
    assert stored(valves) == given_values
    assert stored(of_admin(**stored(valves))) == given_values
    assert json.loads(valves.model_dump_json(exclude_unset=True)) == given_values
    assert valves.problems() == []


def test_defaults_are_not_stored() -> None:
    assert stored(Valves()) == {}
    assert stored(UserValves()) == {}
    assert set(Valves().model_dump()) == set(ROWS)


def test_an_unknown_name_does_no_harm() -> None:
    assert of_admin(NO_SUCH_VALVE=5, TIMEOUT=60).TIMEOUT == 60


# Numbers out of range


@pytest.mark.parametrize("name", [name for name in NUMBERS if ROWS[name].high is not None])
def test_numbers_are_moved_inside_their_bounds(name: str) -> None:
    row = ROWS[name]
    assert row.low is not None
    assert row.high is not None
    cases = {
        row.low - 1: row.low,
        -(10**6): row.low,
        -(10**400): row.low,
        row.high + 1: row.high,
        10**400: row.high,
        float("inf"): row.high,
        float("-inf"): row.low,
        str(row.high + 5): row.high,
        "1e400": row.high,
        row.low: row.low,
        row.high: row.high,
        str(row.low): row.low,
    }
    for value, used in cases.items():
        valves = of_admin(**{name: value})
        assert setting(valves, name) == used, value
        assert type(setting(valves, name)) is int
        assert stored(valves) == {name: used}
        assert stored(of_admin(**stored(valves))) == {name: used}
        assert valves.problems() == []


@pytest.mark.parametrize("name", FRACTIONS)
@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        *((2.5, 2.5), ("2.5", 2.5), (2, 2.0), (0, 0.0), ("0", 0.0), (168.5, 168.5)),
        *((-1, -math.inf), ("1e400", math.inf), (10**400, math.inf), (-math.inf, -math.inf)),
    ],
)
def test_prices_and_hours_may_have_a_fraction(name: str, value: Any, wanted: float) -> None:
    row = ROWS[name]
    assert row.low is not None
    assert row.high is not None
    used = min(max(wanted, row.low), row.high)
    valves = of_admin(**{name: value})
    assert setting(valves, name) == used
    assert type(setting(valves, name)) is float
    assert stored(of_admin(**stored(valves))) == {name: used}
    assert valves.problems() == []


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", [12.7, "12.7", 12.0, "12"])
def test_a_fraction_becomes_a_whole_number(name: str, value: Any) -> None:
    used = setting(of_admin(**{name: value}), name)
    assert type(used) is int
    assert used in (12, 13, ROWS[name].low, ROWS[name].high)


# Values of the wrong kind

WRONG: Final[list[Any]] = [None, [1], {"a": 1}, "many", "", float("nan")]


@pytest.mark.parametrize("name", [*NUMBERS, *FRACTIONS, *SWITCHES])
@pytest.mark.parametrize("value", WRONG, ids=repr)
def test_a_wrong_kind_is_set_aside(name: str, value: Any) -> None:
    valves = of_admin(**{name: value, "APP_TITLE": "Ours"})
    assert valves.problems() == [name]
    assert setting(valves, name) == ROWS[name].default
    assert setting(valves, "APP_TITLE") == "Ours"
    for kept in (stored(valves), stored(of_admin(**stored(valves))), valves.model_dump()):
        assert kept["APP_TITLE"] == "Ours"
        assert kept[name] == value or kept[name] != kept[name]
        assert type(kept[name]) is type(value)


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("value", [None, 5, True, [1], {"a": 1}], ids=repr)
def test_a_text_that_is_none_is_set_aside(name: str, value: Any) -> None:
    valves = of_admin(**{name: value})
    assert valves.problems() == [name]
    assert setting(valves, name) == ROWS[name].default
    assert stored(valves) == stored(of_admin(**stored(valves))) == {name: value}


def test_a_switch_is_not_moved_inside_the_bounds_of_a_number() -> None:
    valves = of_admin(TIMEOUT=True)
    assert setting(valves, "TIMEOUT") == 300
    assert stored(valves)["TIMEOUT"] is True


@pytest.mark.parametrize("value", ["fast", "AUTO", "", 1, None, ["auto"], "inherit"])
def test_a_choice_that_does_not_exist_is_set_aside(value: Any) -> None:
    valves = of_admin(STREAMING_UPDATE_PROFILE=value)
    assert setting(valves, "STREAMING_UPDATE_PROFILE") == "auto"
    assert stored(valves) == {"STREAMING_UPDATE_PROFILE": value}


def test_a_valve_that_is_corrected_is_used_again() -> None:
    broken = stored(of_admin(TIMEOUT="many", RETRY_ATTEMPTS=None))
    valves = of_admin(**{**broken, "TIMEOUT": 60})
    assert valves.problems() == ["RETRY_ATTEMPTS"]
    assert setting(valves, "TIMEOUT") == 60


def test_a_valve_that_is_set_aside_says_so_in_the_open() -> None:
    """Resolving repairs a copy; the valves themselves keep what was stored."""
    valves = of_admin(TIMEOUT="many")
    _resolve_valves(valves)
    assert valves.problems() == ["TIMEOUT"]
    assert stored(valves) == {"TIMEOUT": "many"}


ANYTHING: Final = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.just(10**400)
    | st.floats()
    | st.text(max_size=6)
    | st.sampled_from(["inherit", "on", "off", "auto", "custom", "\ud800", "1e999", "encrypted:x"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


def shown(values: Json) -> dict[str, str]:
    """Values of any kind made comparable: a number that is none is not equal to itself."""
    return {name: str(value) if isinstance(value, str) else repr(value) for name, value in values.items()}


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=st.dictionaries(st.sampled_from(list(ROWS)), ANYTHING, max_size=6))
def test_nothing_that_is_stored_raises(values: Json) -> None:
    valves = of_admin(**values)
    first = stored(valves)
    assert set(first) == set(values)
    assert shown(stored(of_admin(**first))) == shown(first)
    resolved = _resolve_valves(valves)
    for name, row in ROWS.items():
        value = getattr(resolved, name)
        if row.kind == "integer":
            assert type(value) is int
            assert row.low is None or value >= row.low
            assert row.high is None or value <= row.high
        elif row.kind == "boolean":
            assert type(value) is bool
        elif row.kind == "number":
            assert row.low is not None
            assert row.high is not None
            assert row.low <= value <= row.high
        else:
            assert isinstance(value, str)
            assert not row.choices or value in row.choices


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=st.dictionaries(st.sampled_from(list(USER_ROWS)), ANYTHING, max_size=6))
def test_nothing_that_a_user_stored_raises(values: Json) -> None:
    user_valves = of_user(**values)
    first = stored(user_valves)
    assert set(first) == set(values)
    assert shown(stored(of_user(**first))) == shown(first)
    resolved = _resolve_valves(Valves(), user_valves)
    chars, wait_s = _update_limits(resolved)
    assert (chars, wait_s) in ((0, 0.0), (10, 0.1), (80, 0.6)) or (10 <= chars <= 500 and 0 <= wait_s <= 2)
    assert type(resolved.SHOW_THINKING) is type(resolved.SHOW_FINAL_USAGE_STATUS) is bool
    assert resolved.API_KEY == ""


# Secrets


@pytest.mark.parametrize(("model", "name"), SECRETS)
def test_a_secret_is_sealed_when_it_is_saved(model: Callable[..., Valves | UserValves], name: str) -> None:
    valves = model(**{name: KEY})
    for dumped in (stored(valves), valves.model_dump(), json.loads(valves.model_dump_json())):
        assert dumped[name].startswith("encrypted:")
        assert KEY not in json.dumps(dumped)
    assert KEY not in repr(valves)
    assert EncryptedStr(stored(valves)[name]).decrypt(SECRET) == KEY


@pytest.mark.parametrize(("model", "name"), SECRETS)
def test_saving_again_changes_nothing(model: Callable[..., Valves | UserValves], name: str) -> None:
    first = stored(model(**{name: KEY}))
    again = stored(model(**json.loads(json.dumps(first))))
    assert again == first
    assert type(getattr(model(**first), name)) is EncryptedStr


def test_without_a_secret_secrets_stay_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WEBUI_SECRET_KEY")
    monkeypatch.delenv("WEBUI_JWT_SECRET_KEY", raising=False)
    valves = of_admin(API_KEY=KEY, ARTIFACT_ENCRYPTION_KEY="a, b")
    assert stored(valves) == {"API_KEY": KEY, "ARTIFACT_ENCRYPTION_KEY": "a, b"}
    assert _connection(valves, HostEnvironment()).key == KEY


@pytest.mark.parametrize(
    ("environ", "secret", "url"),
    [
        ({}, "", ""),
        ({"WEBUI_SECRET_KEY": "a", "WEBUI_JWT_SECRET_KEY": "b"}, "a", ""),
        ({"WEBUI_SECRET_KEY": "", "WEBUI_JWT_SECRET_KEY": "b"}, "b", ""),
        ({"WEBUI_URL": "https://chat.example/"}, "", "https://chat.example"),
    ],
)
def test_what_the_environment_decides(environ: dict[str, str], secret: str, url: str) -> None:
    env = HostEnvironment.read(environ)
    assert (env.secret, env.webui_url) == (secret, url)
    assert not secret or f"'{secret}'" not in repr(env)


# Users


@pytest.mark.parametrize(
    ("name", "value", "used"),
    [
        ("SHOW_THINKING", "off", False),
        ("SHOW_THINKING", "on", True),
        ("SHOW_THINKING", "inherit", False),
        ("SHOW_FINAL_USAGE_STATUS", "off", False),
        ("SHOW_FINAL_USAGE_STATUS", "inherit", True),
        ("STREAMING_UPDATE_PROFILE", "slow", "slow"),
        ("STREAMING_UPDATE_PROFILE", "inherit", "custom"),
        ("STREAMING_UPDATE_CHAR_LIMIT", 77, 77),
        ("STREAMING_UPDATE_CHAR_LIMIT", "77", 77),
        ("STREAMING_UPDATE_CHAR_LIMIT", 5, 10),
        ("STREAMING_UPDATE_CHAR_LIMIT", 9999, 500),
        ("STREAMING_UPDATE_CHAR_LIMIT", "inherit", 30),
        ("STREAMING_UPDATE_CHAR_LIMIT", "many", 30),
        ("STREAMING_IDLE_FLUSH_MS", 0, 0),
        ("STREAMING_IDLE_FLUSH_MS", -1, 0),
        ("STREAMING_IDLE_FLUSH_MS", 10**400, 2000),
    ],
)
def test_what_a_user_may_override(name: str, value: Any, used: Any) -> None:
    admin = of_admin(SHOW_THINKING=False, STREAMING_UPDATE_PROFILE="custom", STREAMING_UPDATE_CHAR_LIMIT=30)
    before = stored(admin)
    resolved = _resolve_valves(admin, of_user(**{name: value}))
    assert getattr(resolved, name) == used
    assert type(getattr(resolved, name)) is type(used)
    unchanged = set(ROWS) - {name}
    assert {n: getattr(resolved, n) for n in unchanged} == {n: getattr(admin, n) for n in unchanged}
    assert stored(admin) == before


@pytest.mark.parametrize("user_valves", [None, {}, {"SHOW_THINKING": "off"}, SimpleNamespace()])
def test_users_without_valves(user_valves: Any) -> None:
    assert _merge_user_valves(Valves(), user_valves).model_dump() == Valves().model_dump()


def test_valves_of_another_load_of_the_file_count_too() -> None:
    other = SimpleNamespace(SHOW_THINKING="off", STREAMING_UPDATE_CHAR_LIMIT=5, NEW_VALVE="x")
    resolved = _merge_user_valves(Valves(), other)
    assert resolved.SHOW_THINKING is False
    assert resolved.STREAMING_UPDATE_CHAR_LIMIT == 10


@pytest.mark.parametrize(
    ("allowed", "own", "used"),
    [(False, "own key", KEY), (True, "own key", "own key"), (True, "", KEY), (False, "", KEY)],
)
def test_a_users_own_key(allowed: bool, own: str, used: str) -> None:
    admin = of_admin(API_KEY=KEY, ALLOW_USER_API_KEYS=allowed)
    resolved = _resolve_valves(admin, of_user(API_KEY=own))
    assert _connection(resolved, ENV).key == used


@pytest.mark.parametrize(
    ("profile", "limits"),
    [
        ("auto", (0, 0.0)),
        ("quick", (10, 0.1)),
        ("normal", (20, 0.25)),
        ("slow", (80, 0.6)),
        ("custom", (33, 0.044)),
    ],
)
def test_streaming_profiles(profile: str, limits: tuple[int, float]) -> None:
    custom: Json = {"STREAMING_UPDATE_CHAR_LIMIT": 33, "STREAMING_IDLE_FLUSH_MS": 44}
    assert _update_limits(of_admin(STREAMING_UPDATE_PROFILE=profile, **custom)) == limits


# The connection


def test_a_connection() -> None:
    valves = of_admin(API_KEY=f"  {KEY}\n", BASE_URL=" https://proxy.example/v1/ ", TIMEOUT=60)
    connection = _connection(valves, HostEnvironment(SECRET, "https://chat.example"))
    assert (connection.base_url, connection.key) == ("https://proxy.example/v1", KEY)
    assert (connection.connect_timeout_s, connection.idle_timeout_s) == (10.0, 60.0)
    assert dict(connection.headers) == {
        "HTTP-Referer": "https://chat.example",
        "X-OpenRouter-Title": "Open WebUI",
        "X-OpenRouter-Categories": "general-chat",
    }


@pytest.mark.parametrize(
    ("changes", "headers"),
    [
        ({"APP_URL": "https://ours.example"}, {"HTTP-Referer": "https://ours.example"}),
        ({"APP_TITLE": "Café\r\nX: 1"}, {"X-OpenRouter-Title": "CafX: 1"}),
        ({"APP_TITLE": "漢字", "APP_CATEGORIES": ""}, {}),
    ],
)
def test_attribution(changes: Json, headers: dict[str, str]) -> None:
    empty = {"APP_URL": "", "APP_TITLE": "", "APP_CATEGORIES": ""}
    assert dict(_connection(of_admin(API_KEY=KEY, **(empty | changes)), ENV).headers) == headers


@pytest.mark.parametrize("key", ["", "   ", "\n", None, 5])
def test_no_key(key: Any) -> None:
    with pytest.raises(ConfigurationError) as caught:
        _connection(_resolve_valves(of_admin(API_KEY=key)), ENV)
    assert "API_KEY" in caught.value.user_message


@pytest.mark.parametrize(
    "address",
    ["", "openrouter.ai/api/v1", "ftp://openrouter.ai", "https://", "https:///v1", "http://[::1", "\ud800"],
)
def test_no_address(address: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        _connection(of_admin(API_KEY=KEY, BASE_URL=address), ENV)
    assert "BASE_URL" in caught.value.user_message


def test_a_key_of_another_server() -> None:
    with pytest.raises(ConfigurationError) as caught:
        _connection(of_admin(API_KEY=KEY), HostEnvironment("another secret"))
    assert "entered again" in caught.value.user_message
