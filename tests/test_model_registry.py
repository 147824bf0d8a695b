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
    ConfigurationError,
    Connection,
    ModelSpec,
    OpenRouterAPIError,
    OpenRouterModelRegistry,
    PipeError,
    StreamError,
    _menu,
    _model_spec,
    _setup_entry,
)
from tests.recorded import Clock

Json = dict[str, Any]
DATA: Final = Path(__file__).parent / "data" / "openrouter"
CATALOG: Final[Json] = json.loads((DATA / "models_catalog.json").read_text("utf-8"))
ENTRIES: Final[dict[str, Json]] = {entry["id"]: entry for entry in CATALOG["data"]}
SPECS: Final = {model_id: _model_spec(entry) for model_id, entry in ENTRIES.items()}
ONE: Final[Json] = {"data": [{"id": "a/one", "name": "One"}]}
TWO: Final[Json] = {"data": [{"id": "a/one", "name": "One"}, {"id": "a/two", "name": "Two"}]}
DOWN: Final = StreamError("down", template="network", retryable=True)
HERE: Final = Connection("https://openrouter.ai/api/v1", "key")


class Catalogs:
    """What `GET /models` answers, one after another; the last one again and again."""

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)
        self.asked: list[Connection] = []

    async def __call__(self, connection: Connection) -> Any:
        """Answer or fail."""
        self.asked.append(connection)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        await asyncio.sleep(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


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
    assert spec.reasoning == (bool(entry.get("reasoning")) or "reasoning" in parameters)


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
KEYS: Final = ("id", "name", "architecture", "context_length", "supported_parameters", "reasoning")


@settings(max_examples=200, deadline=None)
@given(entry=st.dictionaries(st.sampled_from(KEYS), JSON))
def test_any_entry_can_be_read(entry: Json) -> None:
    spec = _model_spec(entry)
    usable = isinstance(entry.get("id"), str) and bool(entry["id"])
    assert (spec is not None) == usable
    if spec is not None:
        assert isinstance(spec.name, str)
        assert spec.name
        assert spec.context_length is None or isinstance(spec.context_length, int)


# The menu


def test_the_menu_shows_what_can_answer_a_chat_by_name() -> None:
    models = {model_id: spec for model_id, spec in SPECS.items() if spec is not None}
    menu = _menu(models)
    ids = [row["id"] for row in menu]
    assert set(ids) == {
        model_id
        for model_id, entry in ENTRIES.items()
        if "text" in entry["architecture"]["output_modalities"]
    }
    assert "openai/text-embedding-3-small" not in ids
    assert "black-forest-labs/flux.2-pro" not in ids
    assert "~anthropic/claude-sonnet-latest" in ids
    names = [row["name"] for row in menu]
    assert names == sorted(names, key=str.lower)
    assert all(set(row) == {"id", "name"} for row in menu)


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
    clock.now += 15
    assert await ask() == (["a/one"], 4)
    assert await ask() == (["a/one", "a/two"], 4)


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


async def test_each_key_and_address_has_its_own_catalog() -> None:
    registry, fetch, _ = registry_of(ONE, TWO, DOWN)
    other_key = Connection(HERE.base_url, "another key")
    other_address = Connection("https://proxy.example/v1", HERE.key)
    assert len(await registry.ensure_loaded(HERE)) == 1
    assert len(await registry.ensure_loaded(other_key)) == 2
    with pytest.raises(PipeError):
        await registry.ensure_loaded(other_address)
    assert len(await registry.ensure_loaded(HERE)) == 1
    assert fetch.asked == [HERE, other_key, other_address]


class SlowCatalog(Catalogs):
    """A catalog that comes when it is let go."""

    def __init__(self, answer: Any) -> None:
        super().__init__(answer)
        self.let_go = asyncio.Event()
        self.given_up = False

    async def __call__(self, connection: Connection) -> Any:
        """Answer in the end."""
        try:
            await self.let_go.wait()
        except asyncio.CancelledError:
            self.given_up = True
            raise
        return await super().__call__(connection)


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
