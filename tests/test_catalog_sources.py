"""Where the catalog comes from: asked for again with its mark, kept through restarts, chosen by privacy."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import math
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

import pytest

from openrouter_responses_pipe.openrouter_responses_pipe import (
    AccountReader,
    Balance,
    CatalogChoice,
    CatalogCopies,
    CatalogFetcher,
    Connection,
    Fetched,
    HostEnvironment,
    ModelSpec,
    OpenRouterClient,
    OpenRouterModelRegistry,
    Pipe,
    PipeError,
    Runtime,
    StreamError,
    UserValves,
    Valves,
)
from openrouter_responses_pipe.simulator import CATALOG, Simulator
from tests.recorded import Clock
from tests.support import (
    DIALECTS,
    KEY,
    PATIENCE_S,
    SOON_S,
    all_ended,
    answering,
    arguments,
    call,
    connection_to,
    hostile,
    running_pipe,
    set_valves,
)

Json = dict[str, Any]
ROOT: Final = Path(__file__).parent.parent
DATA: Final = Path(__file__).parent / "data" / "openrouter" / "models_catalog.json"
RECORDED: Final[list[Json]] = json.loads(DATA.read_text("utf-8"))["data"]
IDS: Final = {row["id"] for row in CATALOG}
IN_THE_MENU: Final = {row["id"] for row in CATALOG if "text" in row["architecture"]["output_modalities"]}
HERE: Final = Connection("https://openrouter.ai/api/v1", KEY)
NOON: Final = 1_800_000_000.0
HOUR: Final = 3600.0
ACCOUNT: Final = CatalogChoice(account_only=True)
ZDR: Final = CatalogChoice(zdr=True)
DOWN: Final = StreamError("down", template="network", retryable=True)


@pytest.fixture(autouse=True)
def a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """Open WebUI always has a secret."""
    monkeypatch.setenv("WEBUI_SECRET_KEY", "the secret of this server")


class Lists:
    """An OpenRouter whose list has these ids; it counts who asks."""

    def __init__(self, *ids: Any) -> None:
        self.ids = ids
        self.asked: list[Connection] = []

    async def __call__(self, connection: Connection, path: str, etag: str) -> Fetched:
        """Answer, whatever is asked."""
        self.asked.append(connection)
        return Fetched({"data": [{"id": model_id, "model_id": model_id} for model_id in self.ids]})


class OutOfReach:
    """An OpenRouter that fails, or never answers."""

    def __init__(self, *, hangs: bool) -> None:
        self.hangs = hangs
        self.asked = 0

    async def __call__(self, connection: Connection, path: str, etag: str) -> Fetched:
        """Give nothing."""
        self.asked += 1
        if self.hangs:
            await asyncio.Event().wait()
        raise DOWN


@contextlib.asynccontextmanager
async def client() -> AsyncIterator[OpenRouterClient]:
    """A client that is closed in the end."""
    opened = OpenRouterClient()
    try:
        yield opened
    finally:
        await opened.aclose()


@contextlib.asynccontextmanager
async def registry_of(
    fetch: CatalogFetcher, folder: Path | None = None, clock: Clock | None = None, now: float = NOON
) -> AsyncIterator[OpenRouterModelRegistry]:
    """A registry that is closed in the end."""
    registry = OpenRouterModelRegistry(fetch, clock or Clock(50.0), CatalogCopies(folder), Clock(now))
    try:
        yield registry
    finally:
        await registry.aclose()


async def settled(
    registry: OpenRouterModelRegistry, connection: Connection = HERE, choice: CatalogChoice | None = None
) -> dict[str, ModelSpec]:
    """The models as they are served at once; what that has begun in the background has then ended."""
    before = asyncio.all_tasks()
    models = await registry.ensure_loaded(connection, choice or CatalogChoice())
    await all_ended(before)  # the list is there, and then it is kept
    await all_ended(before)
    return models


def kept(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


# Asked for again


@pytest.mark.parametrize(
    ("etag", "statuses"), [("weak", [200, 304]), ("strong", [200, 304]), ("off", [200, 200])]
)
async def test_a_list_that_is_the_same_leaves_the_same_models(
    etag: str, statuses: list[int], simulator: Simulator
) -> None:
    simulator.configure(etag=etag)
    here, clock = connection_to(simulator.base_url), Clock()
    async with client() as opened, registry_of(opened.get_json, clock=clock) as registry:
        first = await settled(registry, here)
        clock.now += HOUR
        await settled(registry, here)
        again = await settled(registry, here)
        assert simulator.statuses("/models") == statuses
        assert again is first
        clock.now += HOUR - 1
        await settled(registry, here)
        assert len(simulator.statuses("/models")) == 2, "fresh again"
    assert set(first) == IDS


@pytest.mark.parametrize("etag", ["weak", "strong", "off"])
async def test_a_list_that_has_changed_is_taken(etag: str, simulator: Simulator) -> None:
    simulator.configure(etag=etag)
    here, clock = connection_to(simulator.base_url), Clock()
    async with client() as opened, registry_of(opened.get_json, clock=clock) as registry:
        first = await settled(registry, here)
        simulator.configure(catalog=CATALOG[:3])
        clock.now += HOUR
        assert await settled(registry, here) is first, "the old one serves meanwhile"
        assert list(await settled(registry, here)) == [row["id"] for row in CATALOG[:3]]
        clock.now += HOUR
        await settled(registry, here)
    assert simulator.statuses("/models") == [200, 200, 200 if etag == "off" else 304]


async def test_a_list_that_changed_back_is_asked_for_with_the_newest_mark(simulator: Simulator) -> None:
    here, clock = connection_to(simulator.base_url), Clock()
    async with client() as opened, registry_of(opened.get_json, clock=clock) as registry:
        for catalog in (CATALOG, CATALOG[:3], CATALOG, CATALOG):
            simulator.configure(catalog=catalog)
            await settled(registry, here)
            assert list(await settled(registry, here)) == [row["id"] for row in catalog]
            clock.now += HOUR
    assert simulator.statuses("/models") == [200, 200, 200, 304]


async def test_marks_are_of_one_list_and_one_address(simulator: Simulator) -> None:
    here, clock = connection_to(simulator.base_url), Clock()
    async with (
        Simulator() as other,
        client() as opened,
        registry_of(opened.get_json, clock=clock) as registry,
    ):
        for choice in (CatalogChoice(), ACCOUNT, ZDR):
            await settled(registry, here, choice)
        await settled(registry, connection_to(other.base_url))
        assert other.statuses("/models") == [200]
    assert (simulator.statuses("/models"), simulator.statuses("/models/user")) == ([200, 200], [200])


# Kept through restarts


@pytest.mark.parametrize("age_s", [0.0, HOUR - 1, HOUR, 1e6])
@pytest.mark.parametrize("hangs", [False, True])
async def test_a_copy_serves_at_once_after_a_restart(hangs: bool, age_s: float, tmp_path: Path) -> None:
    async with registry_of(Lists("a/one", "a/two"), tmp_path) as registry:
        first = await settled(registry)
    async with (
        registry_of(OutOfReach(hangs=hangs), tmp_path, now=NOON + age_s) as registry,
        asyncio.timeout(SOON_S),
    ):
        for _ in range(3):
            assert await registry.ensure_loaded(HERE) == first
        assert (await registry.get(HERE, "a/two:nitro")).is_known


@pytest.mark.parametrize(
    ("age_s", "clock_s", "asked"),
    [
        (0.0, 0.0, 0),
        (HOUR - 1, 0.0, 0),
        (HOUR, 0.0, 1),
        (1e9, 0.0, 1),
        (1800.0, 1799.0, 0),
        (1800.0, 1800.0, 1),
        (-1e9, 0.0, 0),  # the clock of the server was set back
        (-1e9, HOUR - 1, 0),
        (-1e9, HOUR, 1),
    ],
)
async def test_only_an_old_copy_is_renewed(age_s: float, clock_s: float, asked: int, tmp_path: Path) -> None:
    async with registry_of(Lists("a/one"), tmp_path) as registry:
        await settled(registry)
    newer, clock = Lists("a/one", "a/two"), Clock(7.0)
    async with registry_of(newer, tmp_path, clock, NOON + age_s) as registry:
        assert list(await settled(registry)) == ["a/one"]
        clock.now += clock_s
        await settled(registry)
        assert len(newer.asked) == asked
        assert len(await settled(registry)) == 1 + asked


async def test_the_mark_of_a_list_is_kept_with_it(simulator: Simulator, tmp_path: Path) -> None:
    here = connection_to(simulator.base_url)
    async with client() as opened:
        async with registry_of(opened.get_json, tmp_path) as registry:
            await settled(registry, here)
        async with registry_of(opened.get_json, tmp_path, now=NOON + HOUR) as registry:
            first = await settled(registry, here)
            assert await settled(registry, here) is first
    assert simulator.statuses("/models") == [200, 304]
    assert set(first) == IDS


async def test_odd_rows_do_not_keep_a_list_from_being_kept(tmp_path: Path) -> None:
    async with registry_of(Lists("a/one", [], {}, None, 7, "", "a/two"), tmp_path) as registry:
        first = await settled(registry)
    assert list(first) == ["a/one", "a/two"]
    async with registry_of(OutOfReach(hangs=False), tmp_path) as registry:
        assert await registry.ensure_loaded(HERE) == first


def as_copy(**parts: Any) -> bytes:
    whole = {"fetched_at": NOON, "etag": "", "data": [{"id": "evil/one"}], "zdr": None}
    return json.dumps(whole | parts).encode()


BAD_COPIES: Final[dict[str, bytes]] = {
    "nothing": b"",
    "half": as_copy()[:-9],
    "null": b"null",
    "a list": b'[{"id": "evil/one"}]',
    "a text": b'"fetched_at"',
    "noise": bytes(range(256)) * 9,
    "deep": b"[" * 200_000,
    "of another program": b'{"version": 3, "models": ["evil/one"]}',
    "no models": as_copy(data=[]),
    "junk for models": as_copy(data=[None, 7, {}, {"id": ""}]),
    "only embeddings": as_copy(data=[{"id": "a/e", "architecture": {"output_modalities": ["embeddings"]}}]),
    "models as a mapping": as_copy(data={"id": "evil/one"}),
    "no time": as_copy(fetched_at=None),
    "a time in words": as_copy(fetched_at="yesterday"),
    "a time that is true": as_copy(fetched_at=True),
    "a time that is none": as_copy(fetched_at=math.nan),
    "a time without end": as_copy(fetched_at=math.inf),
}


@pytest.mark.parametrize("case", sorted(BAD_COPIES))
async def test_a_copy_that_is_none_is_not_used(
    case: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with registry_of(Lists("a/one"), tmp_path) as registry:
        await settled(registry)
    (file,) = kept(tmp_path)
    good = file.read_bytes()
    file.write_bytes(BAD_COPIES[case])
    async with registry_of(Lists("a/one"), tmp_path) as registry:
        assert list(await settled(registry)) == ["a/one"]
    assert file.read_bytes() == good, "a good one has taken its place"
    assert [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")] == []


async def test_a_folder_in_the_place_of_a_copy_harms_nothing(tmp_path: Path) -> None:
    async with registry_of(Lists("a/one"), tmp_path) as registry:
        await settled(registry)
    (file,) = kept(tmp_path)
    file.unlink()
    file.mkdir()
    async with registry_of(Lists("a/one"), tmp_path) as registry:
        assert list(await settled(registry)) == ["a/one"]
    assert kept(tmp_path) == [file], "nothing half-done is left lying about"


@pytest.mark.parametrize("place", ["file", "file/below"])
async def test_a_folder_that_cannot_be_written_costs_nothing(
    place: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("mine")
    clock, fetch = Clock(), Lists("a/one")
    async with registry_of(fetch, tmp_path / place, clock) as registry:
        for _ in range(3):
            assert list(await settled(registry)) == ["a/one"]
            clock.now += HOUR
    assert (tmp_path / "file").read_text() == "mine"
    assert len(fetch.asked) == 3
    assert [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")] == []


WRITER: Final = """
import sys
from pathlib import Path
from openrouter_responses_pipe.openrouter_responses_pipe import CatalogCopies
folder, letter = sys.argv[1:]
copies = CatalogCopies(Path(folder))
for _ in range(100):
    copies.save("models.json", {"data": [letter * 1000] * 300})
"""


async def test_processes_that_write_at_once_leave_a_whole_copy(tmp_path: Path) -> None:
    whole: list[Json] = [{"data": [letter * 1000] * 300} for letter in "AB"]
    copies = CatalogCopies(tmp_path / "models")
    writers = [
        await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", WRITER, str(tmp_path / "models"), letter),
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        for letter in "AB"
    ]
    ends = asyncio.gather(*(writer.wait() for writer in writers))
    seen: list[Any] = []
    async with asyncio.timeout(6 * PATIENCE_S):
        while not ends.done():
            copy = await asyncio.to_thread(copies.load, "models.json")
            assert copy in whole or (copy == {} and not seen)
            seen += [copy] if copy else []
        assert await ends == [0, 0]
    assert seen
    assert copies.load("models.json") in whole
    assert [file.name for file in kept(tmp_path / "models")] == ["models.json"]


async def test_each_address_and_choice_has_its_own_copy(tmp_path: Path) -> None:
    places: list[tuple[Connection, CatalogChoice]] = [
        (HERE, CatalogChoice()),
        (HERE, ACCOUNT),
        (HERE._replace(key="another key"), ACCOUNT),
        (HERE, ZDR),
        (HERE, CatalogChoice(account_only=True, zdr=True)),
        (Connection("https://proxy.example/v1", KEY), CatalogChoice()),
    ]
    for number, (connection, choice) in enumerate(places):
        async with registry_of(Lists(f"a/{number}"), tmp_path) as registry:
            assert list(await settled(registry, connection, choice)) == [f"a/{number}"]
        assert len(kept(tmp_path)) == number + 1
    async with registry_of(OutOfReach(hangs=False), tmp_path) as registry:
        for number, (connection, choice) in enumerate(places):
            assert list(await registry.ensure_loaded(connection, choice)) == [f"a/{number}"]
        assert list(await registry.ensure_loaded(HERE._replace(key="any key"))) == ["a/0"]
        with pytest.raises(PipeError):
            await registry.ensure_loaded(HERE._replace(key="any key"), ACCOUNT)
        with pytest.raises(PipeError):
            await registry.ensure_loaded(Connection("https://elsewhere.example/v1", KEY))


async def test_a_restart_does_not_bring_back_what_retains_data_by_now(tmp_path: Path) -> None:
    """The list itself had not changed; who keeps nothing had."""
    async with Simulator(zdr_models=["openai/gpt-5", "openai/gpt-5-mini"]) as simulator, client() as opened:
        here, clock = connection_to(simulator.base_url), Clock()
        async with registry_of(opened.get_json, tmp_path, clock) as registry:
            await settled(registry, here, ZDR)
            simulator.configure(zdr_models=["openai/gpt-5"])
            clock.now += HOUR
            await settled(registry, here, ZDR)
            assert marked(await settled(registry, here, ZDR)) == {"openai/gpt-5"}
        async with registry_of(OutOfReach(hangs=False), tmp_path) as registry:
            assert marked(await settled(registry, here, ZDR)) == {"openai/gpt-5"}


def marked(models: dict[str, ModelSpec]) -> set[str]:
    return {spec.id for spec in models.values() if spec.zdr}


@pytest.fixture
def data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the host keeps its data."""
    monkeypatch.setattr("open_webui.env.DATA_DIR", str(tmp_path), raising=False)
    return tmp_path


@pytest.mark.parametrize("valves", [{}, {"ACCOUNT_MODELS_ONLY": True}, {"ZDR_MODELS_ONLY": True}], ids=str)
async def test_the_menu_survives_a_restart_and_names_nobody(
    valves: Json, data_folder: Path, simulator: Simulator
) -> None:
    before = asyncio.all_tasks()
    async with running_pipe(simulator.base_url, **valves) as pipe:
        menu = await pipe.pipes()
        await call(pipe, arguments("hello"))
        await all_ended(before)
    simulator.next("http_error", name="502_html", on="/models", times=math.inf)
    simulator.next("http_error", name="502_html", on="/models/user", times=math.inf)
    simulator.next("http_error", name="502_html", on="/endpoints/zdr", times=math.inf)
    async with running_pipe(simulator.base_url, **valves) as pipe:
        assert await pipe.pipes() == menu
    assert len(menu) > 3
    files = [file for folder in kept(data_folder) for file in kept(folder)]
    written = b"".join(file.name.encode() + file.read_bytes() for file in files)
    secrets = (KEY, hashlib.sha256(KEY.encode()).hexdigest(), "u@example.org", "the secret of this server")
    assert [secret for secret in secrets if secret.encode() in written] == []
    assert len([file for file in files if b"openai/gpt-5" in file.read_bytes()]) == 1


# What the account allows


async def test_the_menu_of_an_account(simulator: Simulator) -> None:
    allowed = {"openai/gpt-5", "openai/gpt-4o-mini", "~anthropic/claude-sonnet-latest"}
    simulator.configure(user_models=sorted(allowed))
    async with running_pipe(simulator.base_url, ACCOUNT_MODELS_ONLY=True) as pipe:
        assert await ids(pipe) == allowed
        set_valves(pipe, simulator.base_url)
        assert await ids(pipe) == IN_THE_MENU
        set_valves(pipe, simulator.base_url, ACCOUNT_MODELS_ONLY=True, MODEL_ID="openai/*")
        assert await ids(pipe) == {"openai/gpt-5", "openai/gpt-4o-mini"}
    assert (simulator.statuses("/models/user"), simulator.statuses("/models")) == ([200], [200])


async def test_an_account_that_allows_nothing(simulator: Simulator) -> None:
    simulator.configure(user_models=[])
    async with running_pipe(simulator.base_url, ACCOUNT_MODELS_ONLY=True) as pipe:
        assert await ids(pipe) == {"setup"}


async def ids(pipe: Pipe) -> set[str]:
    return {row["id"] for row in await pipe.pipes()}


# Who keeps no data


@pytest.mark.parametrize(
    ("zdr", "rows"),
    [
        (["openai/gpt-5-mini"], ["openai/gpt-5-mini"]),
        (["openai/gpt-5-2026-01-01"], ["openai/gpt-5"]),
        (
            ["anthropic/claude-sonnet-4.6"],
            ["anthropic/claude-sonnet-4.6", "~anthropic/claude-sonnet-latest"],
        ),
        (["~anthropic/claude-sonnet-latest"], ["~anthropic/claude-sonnet-latest"]),
        (["openai/gpt-oss-20b:free"], ["openai/gpt-oss-20b:free"]),
        (["nobody/none", "openai/gpt-5", "openai/gpt-5-mini"], ["openai/gpt-5", "openai/gpt-5-mini"]),
        (["nobody/none"], ["setup"]),
        ([], ["setup"]),
    ],
    ids=str,
)
async def test_the_menu_of_those_who_keep_nothing(
    zdr: list[str], rows: list[str], simulator: Simulator
) -> None:
    simulator.configure(zdr_models=zdr)
    async with running_pipe(simulator.base_url, ZDR_MODELS_ONLY=True) as pipe:
        assert await ids(pipe) == set(rows)


@pytest.mark.parametrize("named", ["openai/gpt-oss-20b", "openai/gpt-oss-20b-2026-01-01"])
async def test_a_free_variant_is_not_taken_for_its_paid_model(named: str, simulator: Simulator) -> None:
    """Both have the same permanent slug, but other providers serve them."""
    row = next(row for row in CATALOG if row["id"] == "openai/gpt-oss-20b:free")
    paid = row | {"id": "openai/gpt-oss-20b", "name": "OpenAI: gpt-oss-20b"}
    simulator.configure(catalog=[*CATALOG, paid], zdr_models=[named])
    async with running_pipe(simulator.base_url, ZDR_MODELS_ONLY=True) as pipe:
        assert await ids(pipe) == {"openai/gpt-oss-20b"}


async def test_no_variant_of_the_recorded_catalog_is_taken_for_another(simulator: Simulator) -> None:
    slugs = {row["canonical_slug"] for row in RECORDED}
    plain = sorted({row["id"] for row in RECORDED if ":" not in row["id"]} | slugs)
    simulator.configure(catalog=RECORDED, zdr_models=plain)
    async with running_pipe(simulator.base_url, ZDR_MODELS_ONLY=True) as pipe:
        shown = await ids(pipe)
    assert [model_id for model_id in sorted(shown) if ":" in model_id] == []
    assert len(shown) > 20


@pytest.mark.parametrize("was_shown", [False, True])
@pytest.mark.parametrize("failure", ["500_masked", "502_html", "403_guardrail", "no endpoints"])
async def test_without_the_endpoints_nothing_is_shown(
    failure: str, was_shown: bool, simulator: Simulator
) -> None:
    """Also not the menu of all models that was there before the valve was set."""
    async with running_pipe(simulator.base_url) as pipe:
        if was_shown:
            assert await ids(pipe) == IN_THE_MENU
        if failure == "no endpoints":
            simulator.configure(zdr_models=[])
        else:
            simulator.next("http_error", name=failure, on="/endpoints/zdr", times=math.inf)
        set_valves(pipe, simulator.base_url, ZDR_MODELS_ONLY=True)
        for _ in range(2):
            assert await ids(pipe) == {"setup"}


@contextlib.asynccontextmanager
async def running_runtime(clock: Clock) -> AsyncIterator[Runtime]:
    runtime = Runtime("catalog_sources", HostEnvironment.read(), clock=clock)
    try:
        yield runtime
    finally:
        await runtime.retire(0)


async def shown(runtime: Runtime, simulator: Simulator, **valves: Any) -> set[str]:
    """The menu once everything that asking for it has begun is over."""
    chosen = Valves.model_validate({"API_KEY": KEY, "BASE_URL": simulator.base_url} | valves)
    before = asyncio.all_tasks()
    await runtime.models(chosen)
    await all_ended(before)
    return {row["id"] for row in await runtime.models(chosen)}


async def test_an_outage_keeps_the_marks_that_are_known(simulator: Simulator) -> None:
    clock = Clock()
    simulator.configure(zdr_models=["openai/gpt-5", "openai/gpt-5-mini"])
    async with running_runtime(clock) as runtime:
        known = await shown(runtime, simulator, ZDR_MODELS_ONLY=True)
        assert known == {"openai/gpt-5", "openai/gpt-5-mini"}
        for name in ("500_masked", "502_html", ""):
            if name:
                simulator.next("http_error", name=name, on="/endpoints/zdr", times=1)
            else:
                simulator.configure(zdr_models=[])
            clock.now += HOUR
            assert await shown(runtime, simulator, ZDR_MODELS_ONLY=True) == known
        simulator.configure(zdr_models=["openai/gpt-5"])
        clock.now += HOUR
        assert await shown(runtime, simulator, ZDR_MODELS_ONLY=True) == {"openai/gpt-5"}
    assert simulator.statuses("/endpoints/zdr") == [200, 500, 502, 200, 200]


# The menu of many pages, and of odd lists


async def test_many_pages_at_once_cause_one_request(simulator: Simulator) -> None:
    async with running_pipe(simulator.base_url) as pipe:
        menus = await asyncio.gather(*(pipe.pipes() for _ in range(50)))
    assert simulator.statuses("/models") == [200]
    assert all(menu == menus[0] for menu in menus)
    assert len(menus[0]) == len(IN_THE_MENU)


SHRUNK: Final[dict[str, list[Any]]] = {
    "nothing": [],
    "junk": [None, 7, "x", [], {}, {"id": ""}, {"id": 7}, {"id": []}, {"id": {}}],
    "no chat model": [{"id": "a/e", "architecture": {"output_modalities": ["embeddings"]}}],
}


@pytest.mark.parametrize("case", sorted(SHRUNK))
async def test_a_list_that_shrinks_to_nothing_is_refused(case: str, simulator: Simulator) -> None:
    clock = Clock()
    async with running_runtime(clock) as runtime:
        assert await shown(runtime, simulator) == IN_THE_MENU
        simulator.configure(catalog=SHRUNK[case])
        clock.now += HOUR
        assert await shown(runtime, simulator) == IN_THE_MENU
        simulator.configure(catalog=CATALOG[:3])
        clock.now += HOUR
        assert await shown(runtime, simulator) == {row["id"] for row in CATALOG[:3]}
    assert simulator.statuses("/models") == [200, 200, 200]


ODD_ROWS: Final[list[Json]] = [
    {"pricing": {"prompt": "-1", "completion": "-1"}},
    {"pricing": {"prompt": -1, "completion": None, "discount": "much", "image": "free"}},
    {"pricing": {"prompt": 1e300, "completion": "1e999"}},
    {"pricing": {"overrides": [None, 5, {"min_prompt_tokens": "x"}, {"utc_start": 10**400, "utc_end": 0}]}},
    {"supported_parameters": None, "architecture": {"input_modalities": None, "output_modalities": None}},
    {"reasoning": {"supported_efforts": [None, 1, {}], "mandatory": None}},
    {"top_provider": None, "alias_target": [], "canonical_slug": None, "description": {}, "created": "now"},
    {"expiration_date": "soon", "context_length": -5, "created": 10**400},
    {"brand_new": {"keys": [1, 2, 3]}, "pricing": {"per_thought": "0.01"}, "architecture": {"smells": True}},
]


@pytest.mark.parametrize("row", ODD_ROWS, ids=lambda row: str(row)[:60])
@pytest.mark.parametrize(
    "valves",
    [{}, {"MODEL_SORT": "price", "MODEL_NAME_FORMAT": "{id} {price} {context}", "HIDE_EXPIRING_DAYS": 3}],
    ids=["plain", "all shown"],
)
async def test_an_odd_row_is_shown_with_the_others(row: Json, valves: Json) -> None:
    body = json.dumps({"data": [{"id": "odd/one", "name": "Odd"} | row, {"id": "a/b"}]}).encode()
    async with hostile(answering(body)) as url, running_pipe(url, **valves) as pipe:
        menu = await pipe.pipes()
    assert {entry["id"] for entry in menu} == {"odd/one", "a/b"}
    assert not [entry["name"] for entry in menu if "free" in entry["name"] or "-" in entry["name"]]


# What an account may still spend


@pytest.mark.parametrize(
    ("balance", "words"),
    [
        (Balance(), ""),
        (Balance(key_limit=25.0, resets="monthly"), ""),
        (Balance(key_left=0.5), "The key may still spend $0.50."),
        (Balance(0.5, 25.0), "The key may still spend $0.50 of $25.00."),
        (Balance(0.5, 25.0, "monthly"), "The key may still spend $0.50 of $25.00 (monthly)."),
        (Balance(0.0, 25.0), "The key may still spend $0 of $25.00."),
        (Balance(0.004, 0.0), "The key may still spend $0.004."),
        (Balance(credit=74.75), "The account has $74.75 left."),
        (Balance(credit=0.0), "The account has $0 left."),
        (
            Balance(1.0, 2.0, "daily", 3.0),
            "The key may still spend $1.00 of $2.00 (daily), the account has $3.00 left.",
        ),
    ],
    ids=str,
)
def test_a_balance_in_words(balance: Balance, words: str) -> None:
    assert balance.words() == words


WHOLE: Final = Balance(25.0, 25.0, "monthly", 74.75)


async def test_an_account_is_asked_once_a_minute(simulator: Simulator) -> None:
    here, clock = connection_to(simulator.base_url), Clock()
    async with client() as opened:
        reader = AccountReader(opened.get_json, clock)
        assert await reader.balance(here) == WHOLE
        simulator.configure(key_info={"limit_remaining": 0.5}, credits={"total_usage": 101})
        clock.now += 59.9
        assert await reader.balance(here) == WHOLE
        assert simulator.statuses("/key") == simulator.statuses("/credits") == [200]
        other = here._replace(key="another key")
        assert await reader.balance(other) == Balance(0.5, 25.0, "monthly", 0.0)
        clock.now += 0.1
        assert await reader.balance(here) == Balance(0.5, 25.0, "monthly", 0.0)
    assert simulator.statuses("/key") == simulator.statuses("/credits") == [200] * 3


@pytest.mark.parametrize(
    ("info", "part"),
    [
        ({}, Balance(25.0, 25.0, "monthly")),
        ({"limit": None, "limit_remaining": None, "limit_reset": None}, Balance()),
        ({"limit_remaining": -3}, Balance(0.0, 25.0, "monthly")),
        ({"limit_remaining": "much", "limit": True, "limit_reset": 7}, Balance()),
        ({"is_management_key": True}, WHOLE),
    ],
    ids=str,
)
async def test_credits_may_need_another_kind_of_key(info: Json, part: Balance, simulator: Simulator) -> None:
    simulator.configure(credits_need_management_key=True, key_info=info)
    async with client() as opened:
        assert (
            await AccountReader(opened.get_json, Clock()).balance(connection_to(simulator.base_url)) == part
        )
    assert simulator.statuses("/credits") == [200 if part == WHOLE else 403]


@pytest.mark.parametrize("name", ["500_masked", "502_html", "401_bad_key"])
async def test_what_cannot_be_asked_is_not_known(name: str, simulator: Simulator) -> None:
    here = connection_to(simulator.base_url)
    simulator.next("http_error", name=name, on="/key", times=2)
    simulator.next("http_error", name=name, on="/credits", times=1)
    async with client() as opened:
        clock = Clock()
        reader = AccountReader(opened.get_json, clock)
        assert await reader.balance(here) == Balance()
        clock.now += 60
        assert await reader.balance(here) == Balance(credit=74.75)
        clock.now += 60
        assert await reader.balance(here) == WHOLE


@pytest.mark.parametrize(
    "body", [b"null", b"[]", b'{"data": []}', b'{"data": {"limit_remaining": "x"}}', b"x"]
)
async def test_an_odd_account_is_not_known(body: bytes) -> None:
    async with hostile(answering(body)) as url, client() as opened:
        assert await AccountReader(opened.get_json, Clock()).balance(connection_to(url)) == Balance()


# Told to whom it concerns

LEFT: Final = "The key may still spend $25.00 of $25.00 (monthly), the account has $74.75 left."
TOO_LITTLE: Final = "The OpenRouter account has too little credit for this request."


def of(role: str, key: str, dialect: str) -> Json:
    given = arguments("hello", dialect)
    given["__user__"] |= {"role": role, "valves": UserValves.model_validate({"API_KEY": key})}
    return given


@pytest.mark.parametrize(
    ("role", "key", "allowed", "told"),
    [
        ("admin", "", False, True),
        ("admin", "", True, True),
        ("user", "sk-of-the-user", True, True),
        ("user", "sk-of-the-user", False, False),
        ("user", "", True, False),
        ("user", "", False, False),
        ("pending", "", False, False),
    ],
)
@pytest.mark.parametrize("dialect", sorted(DIALECTS))
async def test_what_is_left_is_told_to_whom_it_belongs(
    dialect: str, role: str, key: str, allowed: bool, told: bool, simulator: Simulator
) -> None:
    simulator.next("http_error", name="402_credits", tasks=True)
    async with running_pipe(simulator.base_url, ALLOW_USER_API_KEYS=allowed) as pipe:
        error = (await call(pipe, of(role, key, dialect))).error
    assert error.startswith(TOO_LITTLE)
    assert error.endswith(LEFT) is told
    assert ("$" in error) is told
    asked = [record.key for record in simulator.requests if record.path.endswith(("/key", "/credits"))]
    assert len(asked) == 2 * told
    used = {record.key for record in simulator.requests if record.path.endswith("/responses")}
    assert set(asked) <= used, "of the key that has paid"


@pytest.mark.parametrize(
    ("refused", "told"),
    [
        (["/key", "/credits"], ""),
        (["/credits"], "The key may still spend $25.00 of $25.00 (monthly)."),
        (["/key"], "The account has $74.75 left."),
    ],
    ids=str,
)
async def test_what_is_not_known_is_not_told(refused: list[str], told: str, simulator: Simulator) -> None:
    simulator.next("http_error", name="402_credits")
    for path in refused:
        simulator.next("http_error", name="500_masked", on=path, times=math.inf)
    async with running_pipe(simulator.base_url) as pipe:
        error = (await call(pipe, of("admin", "", "browser"))).error
    assert error.startswith(TOO_LITTLE)
    assert error.endswith(told)
    assert ("$" in error) is bool(told)


@pytest.mark.parametrize("name", ["429_upstream", "403_guardrail", "500_masked", "401_bad_key"])
async def test_no_other_error_tells_what_is_left(name: str, simulator: Simulator) -> None:
    simulator.next("http_error", name=name)
    async with running_pipe(simulator.base_url) as pipe:
        error = (await call(pipe, of("admin", "", "browser"))).error
    assert error
    assert "$" not in error
    assert simulator.statuses("/key") == []


async def test_an_account_that_never_answers_does_not_keep_the_error_back(simulator: Simulator) -> None:
    simulator.next("http_error", name="402_credits")
    for path in ("/key", "/credits"):
        simulator.next("stall_headers", on=path)
    async with running_pipe(simulator.base_url) as pipe, asyncio.timeout(PATIENCE_S):
        error = (await call(pipe, of("admin", "", "api_json"))).error
    assert error.startswith(TOO_LITTLE)
    assert "$" not in error


# Not more than can be kept

MOST: Final = 32


@pytest.mark.parametrize("by", ["key", "address"])
async def test_not_more_lists_are_kept_than_there_is_room_for(by: str) -> None:
    places = [
        HERE._replace(key=f"key-{number}") if by == "key" else HERE._replace(base_url=f"http://{number}/v1")
        for number in range(MOST + 8)
    ]
    fetch = Lists("a/one")
    async with registry_of(fetch) as registry:
        for place in places:
            await settled(registry, place, ACCOUNT)
        for place in places[8:]:
            await settled(registry, place, ACCOUNT)
        assert fetch.asked == places, "the newest are all there"
        for place in places[:8]:
            await settled(registry, place, ACCOUNT)
        assert fetch.asked == [*places, *places[:8]], "the oldest had to go"


async def test_not_more_balances_are_kept_than_there_is_room_for(simulator: Simulator) -> None:
    places = [connection_to(simulator.base_url, key=f"key-{number}") for number in range(MOST + 1)]
    async with client() as opened:
        reader = AccountReader(opened.get_json, Clock())
        for place in [*places, *places[1:], places[0]]:
            assert await reader.balance(place) == WHOLE
    assert len(simulator.statuses("/key")) == len(places) + 1
