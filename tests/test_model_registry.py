"""The catalog: read, kept fresh, and there even when OpenRouter is not."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any, Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openrouter_responses_pipe.openrouter_responses_pipe import (
    CatalogChoice,
    ConfigurationError,
    Connection,
    Fetched,
    ModelRef,
    ModelSpec,
    OpenRouterAPIError,
    OpenRouterModelRegistry,
    PipeError,
    StreamError,
    Valves,
    _menu,
    _model_spec,
    _parse_model_id,
    _setup_entry,
    _spec_of,
    _unmatched,
    format_price,
    format_tokens,
)
from tests.recorded import Clock

Json = dict[str, Any]
DATA: Final = Path(__file__).parent / "data" / "openrouter"
CATALOG: Final[Json] = json.loads((DATA / "models_catalog.json").read_text("utf-8"))
ENTRIES: Final[dict[str, Json]] = {entry["id"]: entry for entry in CATALOG["data"]}
SPECS: Final = {model_id: _model_spec(entry) for model_id, entry in ENTRIES.items()}
TODAY: Final = "2026-08-21"
ONE: Final[Json] = {"data": [{"id": "a/one", "name": "One"}]}
TWO: Final[Json] = {"data": [{"id": "a/one", "name": "One"}, {"id": "a/two", "name": "Two"}]}
DOWN: Final = StreamError("down", template="network", retryable=True)
HERE: Final = Connection("https://openrouter.ai/api/v1", "key")
OTHER_KEY: Final = HERE._replace(key="another key")
ACCOUNT: Final = CatalogChoice(account_only=True)


class Catalogs:
    """What `GET /models` answers, one after another; the last one again and again."""

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)
        self.asked: list[Connection] = []

    async def __call__(self, connection: Connection, path: str, etag: str) -> Fetched:
        """Answer or fail."""
        self.asked.append(connection)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        await asyncio.sleep(0)
        if isinstance(answer, Exception):
            raise answer
        return answer if isinstance(answer, Fetched) else Fetched(answer)


def registry_of(*answers: Any) -> tuple[OpenRouterModelRegistry, Catalogs, Clock]:
    fetch, clock = Catalogs(*answers), Clock(1000.0)
    return OpenRouterModelRegistry(fetch, clock), fetch, clock


# Entries


@pytest.mark.parametrize("model_id", ENTRIES)
def test_every_entry_of_the_catalog_is_read(model_id: str) -> None:
    entry, spec = ENTRIES[model_id], SPECS[model_id]
    assert spec is not None
    assert (spec.id, spec.name) == (model_id, entry["name"])
    assert spec.context_length == entry["context_length"]
    assert spec.writes_text == ("text" in entry["architecture"]["output_modalities"])
    assert spec.takes_images == ("image" in entry["architecture"]["input_modalities"])
    parameters = entry.get("supported_parameters") or []
    assert spec.takes_tools == ("tools" in parameters)
    assert spec.reasons == (bool(entry.get("reasoning")) or "reasoning" in parameters)


@pytest.mark.parametrize("entry", [{}, {"id": ""}, {"id": None}, {"id": 5}, {"name": "nameless"}])
def test_an_entry_without_an_id(entry: Json) -> None:
    assert _model_spec(entry) is None


@pytest.mark.parametrize(
    "entry",
    [
        {"id": "a/b"},
        {"id": "a/b", "name": None, "architecture": None, "supported_parameters": None, "reasoning": None},
        {"id": "a/b", "name": "", "architecture": "x", "supported_parameters": {}, "context_length": "8192"},
        {"id": "a/b", "architecture": {"input_modalities": [None, 5], "output_modalities": []}},
    ],
)
def test_an_entry_that_says_nothing_is_a_text_model(entry: Json) -> None:
    assert _model_spec(entry) == ModelSpec("a/b", "a/b")


JSON: Final = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=5,
)
KEYS: Final = (
    *("id", "name", "architecture", "context_length", "supported_parameters", "reasoning"),
    *("pricing", "created", "expiration_date"),
)


@settings(max_examples=200, deadline=None)
@given(entry=st.dictionaries(st.sampled_from(KEYS), JSON))
def test_any_entry_can_be_read(entry: Json) -> None:
    spec = _model_spec(entry)
    usable = isinstance(entry.get("id"), str) and bool(entry["id"]) and entry["id"].isprintable()
    assert (spec is not None) == usable
    if spec is not None:
        assert isinstance(spec.name, str)
        assert spec.name
        assert spec.context_length is None or isinstance(spec.context_length, int)


# The menu


def test_the_menu_shows_what_can_answer_a_chat_by_name() -> None:
    models = {model_id: spec for model_id, spec in SPECS.items() if spec is not None}
    menu = _menu(models, Valves(), TODAY)
    ids = [shown.id for shown in menu]
    assert set(ids) == {
        model_id
        for model_id, entry in ENTRIES.items()
        if "text" in entry["architecture"]["output_modalities"]
    }
    assert "openai/text-embedding-3-small" not in ids
    assert "black-forest-labs/flux.2-pro" not in ids
    assert "~anthropic/claude-sonnet-latest" in ids
    names = [shown.title for shown in menu]
    assert names == sorted(names, key=str.lower)


def spec(model_id: str, name: str = "", **known: Any) -> ModelSpec:
    """A model; prices as `price_in` and `price_out`, in dollars per token."""
    named = {"prompt": known.pop("price_in", None), "completion": known.pop("price_out", None)}
    prices = {name: price for name, price in named.items() if price is not None}
    return ModelSpec(model_id, name or model_id, prices=prices, **known)


TOOLS: Final = frozenset({"tools"})
SHELF: Final = {
    one.id: one
    for one in (
        spec("acme/big", "Acme: Big", context_length=1_000_000, price_in=2e-6, price_out=1e-5, created=30),
        spec("acme/small", "Acme: Small", context_length=8192, price_in=1e-7, price_out=4e-7, created=20),
        spec("zeta/gift:free", "Zeta: Gift (free)", price_in=0.0, price_out=0.0, supported_parameters=TOOLS),
        spec("zeta/old", "Zeta: Old", price_in=1e-6, price_out=1e-6, expires="2026-08-31", created=10),
        spec("openrouter/auto", "Auto Router", context_length=2_000_000, created=40),
        spec("zeta/speaker", "Zeta: Speaker", output_modalities=frozenset({"speech"})),
    )
}


def with_valves(**valves: Any) -> Valves:
    return Valves(**valves)


def listed(**valves: Any) -> list[dict[str, str]]:
    menu = _menu(SHELF, with_valves(**valves), TODAY)
    return [{"id": shown.id, "name": shown.title} for shown in menu]


def listed_with(extra: list[str]) -> list[dict[str, str]]:
    return listed(VARIANT_MODELS=",".join(extra))


def shown(**valves: Any) -> list[str]:
    return [row["id"] for row in listed(**valves)]


ALL: Final = ["acme/big", "acme/small", "openrouter/auto", "zeta/gift:free", "zeta/old"]


@pytest.mark.parametrize(
    ("valves", "ids"),
    [
        ({}, ALL),
        ({"MODEL_ID": ""}, ALL),
        ({"MODEL_ID": " Auto "}, ALL),
        ({"MODEL_ID": "ACME/*, zeta/old"}, ["acme/big", "acme/small", "zeta/old"]),
        ({"MODEL_ID": "zeta/*"}, ["zeta/gift:free", "zeta/old"]),
        ({"EXCLUDE_KEYWORDS": "router, BIG,,"}, ["acme/small", "zeta/gift:free", "zeta/old"]),
        ({"FREE_MODEL_FILTER": "only"}, ["zeta/gift:free"]),
        ({"FREE_MODEL_FILTER": "exclude"}, ["acme/big", "acme/small", "openrouter/auto", "zeta/old"]),
        ({"TOOL_CALLING_FILTER": "only"}, ["zeta/gift:free"]),
        ({"TOOL_CALLING_FILTER": "exclude"}, ["acme/big", "acme/small", "openrouter/auto", "zeta/old"]),
        ({"MIN_CONTEXT": 8192}, ["acme/big", "acme/small", "openrouter/auto"]),
        ({"MIN_CONTEXT": 8193}, ["acme/big", "openrouter/auto"]),
        ({"MAX_PRICE": 1.0}, ["acme/small", "zeta/gift:free", "zeta/old"]),
        ({"MAX_PRICE": 0.4}, ["acme/small", "zeta/gift:free"]),
        ({"MAX_PRICE": 0.3}, ["zeta/gift:free"]),
        ({"HIDE_EXPIRING_DAYS": 10}, ["acme/big", "acme/small", "openrouter/auto", "zeta/gift:free"]),
        ({"HIDE_EXPIRING_DAYS": 9}, ALL),
        (
            {"MODEL_SORT": "newest"},
            ["openrouter/auto", "acme/big", "acme/small", "zeta/old", "zeta/gift:free"],
        ),
        (
            {"MODEL_SORT": "price"},
            ["zeta/gift:free", "acme/small", "zeta/old", "acme/big", "openrouter/auto"],
        ),
        (
            {"MODEL_SORT": "context"},
            ["openrouter/auto", "acme/big", "acme/small", "zeta/gift:free", "zeta/old"],
        ),
        ({"MODEL_ID": "acme/*", "MODEL_SORT": "price", "MAX_PRICE": 10}, ["acme/small", "acme/big"]),
    ],
    ids=str,
)
def test_what_the_valves_choose(valves: Json, ids: list[str]) -> None:
    assert shown(**valves) == ids


def test_filters_that_leave_nothing_say_so() -> None:
    with pytest.raises(ConfigurationError) as caught:
        shown(MODEL_ID="nobody/*")
    (row,) = _setup_entry(caught.value)
    assert "no model passes the filters" in row["name"]


@pytest.mark.parametrize(
    ("globs", "names"),
    [
        ("auto", []),
        ("", []),
        ("acme/big, ZETA/*", []),
        ("acme/bigger, acme/*, [", ["acme/bigger", "["]),
        ("auto, nobody/*", ["nobody/*"]),
    ],
)
def test_ids_that_the_catalog_does_not_have(globs: str, names: list[str]) -> None:
    assert _unmatched(SHELF, with_valves(MODEL_ID=globs)) == names


@pytest.mark.parametrize(
    ("listed", "names"),
    [
        ("", {}),
        ("acme/big:nitro", {"acme/big:nitro": "Acme: Big (nitro)"}),
        (" acme/big:floor:online , ", {"acme/big:floor:online": "Acme: Big (floor, online)"}),
        ("acme/big@preset/brief", {"acme/big@preset/brief": "Acme: Big (preset brief)"}),
        ("@preset/brief", {"@preset/brief": "OpenRouter (preset brief)"}),
        ("zeta/gift:free:nitro", {"zeta/gift:free:nitro": "Zeta: Gift (free) (nitro)"}),
        ("acme/big, nobody/x:nitro", {"acme/big": "Acme: Big"}),
    ],
)
def test_entries_that_the_administrator_adds(listed: str, names: dict[str, str]) -> None:
    """They are there although a filter leaves all others out."""
    menu = _menu({**SHELF}, with_valves(MODEL_ID="zeta/old", VARIANT_MODELS=listed), TODAY)
    assert {spec.id: spec.name for spec in menu} == {"zeta/old": "Zeta: Old", **names}
    assert _unmatched(SHELF, with_valves(VARIANT_MODELS=listed)) == [
        ref for ref in ("nobody/x:nitro",) if ref in listed
    ]


def test_an_added_entry_that_is_there_already_is_there_once() -> None:
    assert shown(VARIANT_MODELS="acme/big,acme/big:nitro,acme/big:nitro").count("acme/big") == 1
    assert shown(VARIANT_MODELS="acme/big,acme/big:nitro,acme/big:nitro").count("acme/big:nitro") == 1


@pytest.mark.parametrize(
    ("model_id", "ref"),
    [
        ("a/b", ModelRef("a/b", "a/b")),
        ("a/b.5-c", ModelRef("a/b.5-c", "a/b.5-c")),
        ("a/b:free", ModelRef("a/b:free", "a/b:free")),
        ("a/b:nitro", ModelRef("a/b:nitro", "a/b", ("nitro",))),
        ("a/b:free:online", ModelRef("a/b:free:online", "a/b:free", ("online",))),
        ("~a/b-latest:floor", ModelRef("~a/b-latest:floor", "~a/b-latest", ("floor",))),
        ("openrouter/auto", ModelRef("openrouter/auto", "openrouter/auto")),
        ("@preset/x.y", ModelRef("@preset/x.y", "", (), "x.y")),
        ("a/b:exacto@preset/x", ModelRef("a/b:exacto@preset/x", "a/b", ("exacto",), "x")),
        ("", ModelRef("", "")),
        (":nitro", ModelRef(":nitro", "", ("nitro",))),
    ],
)
def test_an_id_taken_apart(model_id: str, ref: ModelRef) -> None:
    assert _parse_model_id(model_id) == ref
    assert _parse_model_id(f" {model_id} ") == ref


@settings(max_examples=100, deadline=None)
@given(
    ids=st.lists(st.sampled_from(sorted(SHELF)), max_size=3),
    tails=st.lists(st.sampled_from(["", ":nitro", ":floor:online", "@preset/x", ":free", ":thinking"])),
)
def test_what_the_menu_shows_has_a_spec(ids: list[str], tails: list[str]) -> None:
    listed = [model_id + tail for model_id in ids for tail in tails]
    for row in listed_with(listed):
        found = _spec_of(SHELF, _parse_model_id(row["id"]))
        assert found is not None
        assert found.id == row["id"]


@pytest.mark.parametrize(
    ("template", "names"),
    [
        ("{name}", ["Acme: Big", "Acme: Small", "Auto Router"]),
        ("{id}", ["acme/big", "acme/small", "openrouter/auto"]),
        ("{vendor}: {context} {price}", ["acme: 1M $2 / $10", "acme: 8.2K $0.10 / $0.40", "openrouter: 2M"]),
        ("{other} {name} {", ["{other} Acme: Big {", "{other} Acme: Small {", "{other} Auto Router {"]),
        ("{price}", ["$2 / $10", "$0.10 / $0.40", "Auto Router"]),
        (" ", ["Acme: Big", "Acme: Small", "Auto Router"]),
    ],
)
def test_names_as_the_valve_forms_them(template: str, names: list[str]) -> None:
    assert [row["name"] for row in listed(MODEL_NAME_FORMAT=template, MIN_CONTEXT=1)] == names


@pytest.mark.parametrize(
    ("price_in", "price_out", "text"),
    [
        (0.0, 0.0, "free"),
        (0.0, 1e-6, "$0 / $1"),
        (None, 1e-6, ""),
        (2.5e-7, 2e-6, "$0.25 / $2"),
        (1.25e-6, 1e-5, "$1.25 / $10"),
        (3.75e-8, 1.5e-7, "$0.0375 / $0.15"),
        (1.5e-5, 6e-4, "$15 / $600"),
        (1e-12, 5e-7, "$0 / $0.50"),
    ],
)
def test_prices_for_people(price_in: float | None, price_out: float | None, text: str) -> None:
    assert format_price(spec("a/b", price_in=price_in, price_out=price_out)) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (None, ""),
        (0, ""),
        (512, "512"),
        (8192, "8.2K"),
        (128_000, "128K"),
        (400_000, "400K"),
        (1_048_576, "1M"),
    ],
)
def test_limits_for_people(count: int | None, text: str) -> None:
    assert format_tokens(count) == text


def test_prices_dates_and_ages_of_the_recorded_catalog() -> None:
    """Every price is one, or unknown; a router's is unknown."""
    for model_id, entry in ENTRIES.items():
        found, pricing = SPECS[model_id], entry["pricing"]
        assert found is not None
        wanted = [float(pricing[key]) for key in ("prompt", "completion")]
        if not found.writes_text and wanted == [0, 0]:
            wanted = [-1.0, -1.0]  # pictures are paid for, at a price that stands elsewhere
        assert [found.price_in, found.price_out] == [None if price < 0 else price for price in wanted]
        assert found.created == entry["created"]
        assert found.expires == (entry.get("expiration_date") or "")
    auto = SPECS["openrouter/auto"]
    assert auto is not None
    assert auto.price_out is None


def test_an_entry_that_says_what_is_missing() -> None:
    (row,) = _setup_entry(ConfigurationError("No OpenRouter API key is set. An administrator can enter one."))
    assert row == {"id": "setup", "name": "No OpenRouter API key is set"}
    (row,) = _setup_entry(StreamError("", template="timeout"))
    assert row["name"] == "OpenRouter did not answer in time"
    (row,) = _setup_entry(StreamError("", template="rate_limit"))
    assert row["name"] == "OpenRouter: Too many requests at the moment"


# Fresh enough


async def settle() -> None:
    """Let what runs in the background come to its end; nothing here waits for anything outside."""
    for _ in range(10):
        await asyncio.sleep(0)


async def test_the_catalog_is_fetched_once_and_kept() -> None:
    registry, fetch, clock = registry_of(ONE, TWO)
    assert list(await registry.ensure_loaded(HERE)) == ["a/one"]
    clock.now += 3599
    assert list(await registry.ensure_loaded(HERE)) == ["a/one"]
    await settle()
    assert len(fetch.asked) == 1


async def test_an_old_catalog_serves_while_the_new_one_is_fetched() -> None:
    registry, fetch, clock = registry_of(ONE, TWO)
    await registry.ensure_loaded(HERE)
    clock.now += 3600
    old = await asyncio.gather(*(registry.ensure_loaded(HERE) for _ in range(5)))
    assert [list(models) for models in old] == [["a/one"]] * 5
    await settle()
    assert list(await registry.ensure_loaded(HERE)) == ["a/one", "a/two"]
    await settle()
    assert len(fetch.asked) == 2


async def test_requests_at_the_same_time_cause_one_fetch() -> None:
    registry, fetch, _ = registry_of(ONE, TWO)
    loaded = await asyncio.gather(*(registry.ensure_loaded(HERE) for _ in range(20)))
    assert all(list(models) == ["a/one"] for models in loaded)
    assert len(fetch.asked) == 1


async def test_requests_at_the_same_time_fail_together_after_one_fetch() -> None:
    registry, fetch, _ = registry_of(DOWN)
    results = await asyncio.gather(*(registry.ensure_loaded(HERE) for _ in range(20)), return_exceptions=True)
    assert {type(result) for result in results} == {StreamError}
    assert len(fetch.asked) == 1


async def test_an_old_catalog_serves_while_no_new_one_can_be_had() -> None:
    registry, fetch, clock = registry_of(ONE, DOWN, DOWN, TWO)

    async def ask() -> tuple[list[str], int]:
        models = list(await registry.ensure_loaded(HERE))
        await settle()
        return models, len(fetch.asked)

    assert await ask() == (["a/one"], 1)
    clock.now += 4000
    assert await ask() == (["a/one"], 2)
    clock.now += 14
    assert await ask() == (["a/one"], 2), "not asked for again within 15 seconds"
    clock.now += 1
    assert await ask() == (["a/one"], 3)
    clock.now += 29
    assert await ask() == (["a/one"], 3), "after the second failure twice as long"
    clock.now += 1
    assert await ask() == (["a/one"], 4)
    assert await ask() == (["a/one", "a/two"], 4)


async def test_an_hour_without_the_catalog_is_told_once_and_asked_for_seldom(
    caplog: pytest.LogCaptureFixture,
) -> None:
    registry, fetch, clock = registry_of(ONE, DOWN)
    caplog.set_level("INFO")
    await registry.ensure_loaded(HERE)
    clock.now += 3600
    for _ in range(3600):
        clock.now += 1
        assert list(await registry.ensure_loaded(HERE)) == ["a/one"]
        await settle()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert len(fetch.asked) <= 20
    fetch.answers = [TWO]
    clock.now += 300
    await registry.ensure_loaded(HERE)
    await settle()
    assert list(await registry.ensure_loaded(HERE)) == ["a/one", "a/two"]
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]


@pytest.mark.parametrize("refresh_s", [60.0, 86_400.0])
async def test_the_valve_says_how_long_it_is_fresh(refresh_s: float) -> None:
    registry, fetch, clock = registry_of(ONE, TWO)
    await registry.ensure_loaded(HERE, CatalogChoice(refresh_s))
    clock.now += refresh_s - 1
    await registry.get(HERE, "a/one", CatalogChoice(refresh_s))
    await settle()
    assert len(fetch.asked) == 1
    clock.now += 1
    await registry.get(HERE, "a/one", CatalogChoice(refresh_s))
    await settle()
    assert len(fetch.asked) == 2


async def test_without_any_catalog_the_failure_is_told_and_repeated_for_a_while() -> None:
    registry, fetch, clock = registry_of(DOWN, ONE)
    for _ in range(3):
        with pytest.raises(PipeError, match="down"):
            await registry.ensure_loaded(HERE)
    assert len(fetch.asked) == 1
    clock.now += 15
    assert list(await registry.ensure_loaded(HERE)) == ["a/one"]
    assert len(fetch.asked) == 2


@pytest.mark.parametrize(
    "answer", [{}, {"data": []}, {"data": None}, {"data": {"id": "a/b"}}, [], None, "text", {"data": [5, {}]}]
)
async def test_an_empty_catalog_is_a_failure(answer: Any) -> None:
    registry, _, _ = registry_of(answer)
    with pytest.raises(OpenRouterAPIError):
        await registry.ensure_loaded(HERE)


async def test_an_empty_catalog_does_not_replace_a_full_one() -> None:
    registry, _, clock = registry_of(ONE, {"data": []})
    await registry.ensure_loaded(HERE)
    clock.now += 4000
    for _ in range(2):
        assert list(await registry.ensure_loaded(HERE)) == ["a/one"]
        await settle()


async def test_keys_share_a_catalog_and_addresses_do_not() -> None:
    registry, fetch, _ = registry_of(ONE, DOWN)
    other_address = Connection("https://proxy.example/v1", HERE.key)
    assert len(await registry.ensure_loaded(HERE)) == 1
    assert len(await registry.ensure_loaded(OTHER_KEY)) == 1
    with pytest.raises(PipeError):
        await registry.ensure_loaded(other_address)
    assert len(await registry.ensure_loaded(HERE)) == 1
    assert fetch.asked == [HERE, other_address]


async def test_what_an_account_allows_is_known_of_each_key() -> None:
    registry, fetch, _ = registry_of(ONE, TWO)
    assert len(await registry.ensure_loaded(HERE, ACCOUNT)) == 1
    assert len(await registry.ensure_loaded(OTHER_KEY, ACCOUNT)) == 2
    assert len(await registry.ensure_loaded(HERE, ACCOUNT)) == 1
    assert fetch.asked == [HERE, OTHER_KEY]


async def test_a_key_that_is_mended_does_not_wait_for_the_wrong_one() -> None:
    registry, _, _ = registry_of(OpenRouterAPIError("No auth", template="authentication"), ONE)
    with pytest.raises(OpenRouterAPIError):
        await registry.ensure_loaded(OTHER_KEY)
    assert list(await registry.ensure_loaded(HERE)) == ["a/one"]
    assert list(await registry.ensure_loaded(OTHER_KEY)) == ["a/one"]


class SlowCatalog(Catalogs):
    """A catalog that comes when it is let go."""

    def __init__(self, answer: Any) -> None:
        super().__init__(answer)
        self.let_go = asyncio.Event()
        self.given_up = False

    async def __call__(self, connection: Connection, path: str, etag: str) -> Fetched:
        """Answer in the end."""
        try:
            await self.let_go.wait()
        except asyncio.CancelledError:
            self.given_up = True
            raise
        return await super().__call__(connection, path, etag)


async def test_who_asks_first_and_goes_away_hinders_nobody() -> None:
    fetch = SlowCatalog(ONE)
    registry = OpenRouterModelRegistry(fetch, Clock())
    first = asyncio.create_task(registry.ensure_loaded(HERE))
    second = asyncio.create_task(registry.ensure_loaded(HERE))
    await settle()
    first.cancel()
    await settle()
    fetch.let_go.set()
    async with asyncio.timeout(2):
        assert list(await second) == ["a/one"]
    assert first.cancelled()
    assert len(fetch.asked) == 1


async def test_closing_ends_what_is_being_fetched() -> None:
    fetch = SlowCatalog(ONE)
    registry = OpenRouterModelRegistry(fetch, Clock())
    waiting = asyncio.create_task(registry.ensure_loaded(HERE))
    await settle()
    async with asyncio.timeout(2):
        await registry.aclose()
        assert fetch.given_up
        with pytest.raises(PipeError):
            await waiting
        await registry.aclose()


# One model


@pytest.mark.parametrize(
    ("asked", "name"),
    [
        ("a/one", "One"),
        ("a/one:nitro", "One"),
        ("a/free:free", "Free"),
        ("a/none", "a/none"),
        ("a/none:nitro", "a/none:nitro"),
        ("@preset/support", "@preset/support"),
        ("", ""),
    ],
)
async def test_one_model(asked: str, name: str) -> None:
    registry, _, _ = registry_of(
        {"data": [{"id": "a/one", "name": "One"}, {"id": "a/free:free", "name": "Free"}]}
    )
    spec = await registry.get(HERE, asked)
    assert (spec.id, spec.name) == (asked, name)
    assert spec.writes_text


@pytest.mark.parametrize("answer", [DOWN, ONE])
async def test_a_model_that_no_catalog_knows_is_sent_everything(answer: Any) -> None:
    """OpenRouter says itself what the model cannot take."""
    registry, _, _ = registry_of(answer)
    spec = await registry.get(HERE, "a/none")
    assert (spec.id, spec.name) == ("a/none", "a/none")
    assert spec.writes_text
    assert spec.takes_tools
    assert spec.takes_images


async def test_a_variant_can_what_its_model_can() -> None:
    registry, _, _ = registry_of(CATALOG)
    base = await registry.get(HERE, "openai/gpt-5-mini")
    variant = await registry.get(HERE, "openai/gpt-5-mini:floor")
    assert (variant.reasoning, variant.takes_tools, variant.takes_images) == (
        base.reasoning,
        base.takes_tools,
        base.takes_images,
    )
    assert base.reasoning
    assert base.takes_tools
