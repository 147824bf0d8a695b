"""What the catalog says a model can take, and what therefore leaves for it."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openrouter_responses_pipe.openrouter_responses_pipe import (
    ConfigurationError,
    ModelSpec,
    OpenRouterModelRegistry,
    Pipe,
    PriceOverride,
    ReasoningSpec,
    Valves,
    _inject_model_capabilities,
    _menu,
    _model_spec,
    _parse_model_id,
    _pick_model,
    format_price,
)
from openrouter_responses_pipe.simulator import RecordedRequest, Simulator
from tests.recorded import Clock
from tests.support import DIALECTS, arguments, ask, call, inferences, set_valves

Json = dict[str, Any]
DATA: Final = Path(__file__).parent / "data" / "openrouter" / "models_catalog.json"
ENTRIES: Final[dict[str, Json]] = {
    entry["id"]: entry for entry in json.loads(DATA.read_text("utf-8"))["data"]
}
MODELS: Final = {
    model_id: spec for model_id, entry in ENTRIES.items() if (spec := _model_spec(entry)) is not None
}
EFFORTS: Final = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
SAMPLING: Final = ("temperature", "top_p", "top_k", "frequency_penalty", "presence_penalty")
SEALED: Final = ["reasoning.encrypted_content"]
TODAY: Final = "2026-08-21"
PICTURES_ONLY: Final = "black-forest-labs/flux.2-pro"
WITHOUT_TOOLS: Final = "google/gemini-2.5-flash-image"


@pytest.fixture(autouse=True)
def a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """Open WebUI always has a secret."""
    monkeypatch.setenv("WEBUI_SECRET_KEY", "the secret of this server")


def fitted(payload: Json, spec: ModelSpec) -> Json:
    return _inject_model_capabilities(payload, spec)[0]


# What an entry says


def test_the_whole_catalog_is_here() -> None:
    assert len(ENTRIES) == len(MODELS) == 49


@pytest.mark.parametrize("model_id", ENTRIES)
def test_how_a_model_reasons(model_id: str) -> None:
    entry, found = ENTRIES[model_id], MODELS[model_id].reasoning
    raw = entry.get("reasoning")
    if raw is None:
        listed = "reasoning" in (entry.get("supported_parameters") or [])
        assert found == (ReasoningSpec() if listed else None)
        return
    assert found is not None
    if "supported_efforts" not in raw:
        assert found.efforts == ()
    elif raw["supported_efforts"] is None:
        assert found.efforts is None
    else:
        assert list(found.efforts or ()) == raw["supported_efforts"], "in the order of the list"
    assert (found.mandatory, found.by_default) == (raw["mandatory"], raw.get("default_enabled", False))
    assert found.default_effort == raw.get("default_effort", "")
    assert found.takes_budget == raw.get("supports_max_tokens", False)


@pytest.mark.parametrize(
    ("model_id", "reasoning"),
    [
        ("openai/gpt-4o", None),
        ("openrouter/auto", ReasoningSpec()),
        ("openai/gpt-5", ReasoningSpec(True, True, ("high", "medium", "low", "minimal"), "medium")),
        ("openai/gpt-5.4", ReasoningSpec(False, False, ("xhigh", "high", "medium", "low", "none"), "none")),
        (
            "anthropic/claude-sonnet-4.6",
            ReasoningSpec(False, False, ("max", "high", "medium", "low"), "medium", True),
        ),
        ("anthropic/claude-3.7-sonnet:thinking", ReasoningSpec(False, True, None, "", True)),
        ("deepseek/deepseek-r1-0528", ReasoningSpec(True, True, ())),
        ("deepseek/deepseek-v3.2-speciale", ReasoningSpec(True, True, None)),
    ],
)
def test_the_kinds_of_reasoning(model_id: str, reasoning: ReasoningSpec | None) -> None:
    assert MODELS[model_id].reasoning == reasoning


@pytest.mark.parametrize("model_id", ENTRIES)
def test_limits_slugs_and_texts(model_id: str) -> None:
    entry, spec = ENTRIES[model_id], MODELS[model_id]
    assert spec.max_output == entry["top_provider"].get("max_completion_tokens")
    assert spec.context_length == entry["context_length"]
    assert spec.canonical == entry["canonical_slug"]
    assert spec.alias_of == (entry.get("alias_target") or {}).get("slug", "")
    assert spec.description == (entry.get("description") or "")
    assert spec.supported_parameters == set(entry["supported_parameters"] or ())
    assert spec.is_known
    assert not spec.zdr, "nobody asked"


@pytest.mark.parametrize("model_id", ENTRIES)
def test_every_price(model_id: str) -> None:
    entry, spec = ENTRIES[model_id], MODELS[model_id]
    wanted = {
        name: float(text) for name, text in entry["pricing"].items() if name not in ("overrides", "discount")
    }
    if not spec.writes_text and not model_id.endswith(":free") and wanted["prompt"] == 0:
        del wanted["prompt"], wanted["completion"]
    assert spec.prices == {name: price for name, price in wanted.items() if price >= 0}
    assert spec.is_free == (spec.prices.get("prompt") == spec.prices.get("completion") == 0)
    assert len(spec.overrides) == len(entry["pricing"].get("overrides", ()))


def test_the_price_of_a_cache() -> None:
    prices = MODELS["anthropic/claude-opus-4.7"].prices
    assert (prices["input_cache_read"], prices["input_cache_write"]) == (5e-7, 6.25e-6)
    assert "input_cache_write" not in MODELS["openai/gpt-5"].prices


@pytest.mark.parametrize(
    ("model_id", "overrides"),
    [
        (
            "anthropic/claude-sonnet-4.5",
            (PriceOverride({"prompt": 6e-6, "completion": 2.25e-5}, above_tokens=200_000),),
        ),
        (
            "google/gemini-2.5-pro",
            (PriceOverride({"prompt": 2.5e-6, "completion": 1.5e-5}, above_tokens=200_000),),
        ),
        (
            "deepseek/deepseek-v3.2",
            (
                PriceOverride({"prompt": 2.6e-7, "completion": 3.8e-7}, hours=(30, 1630)),
                PriceOverride({"prompt": 1.3e-7, "completion": 1.9e-7}, hours=(1630, 30)),
            ),
        ),
        ("openai/gpt-5", ()),
    ],
)
def test_prices_that_hold_sometimes(model_id: str, overrides: tuple[PriceOverride, ...]) -> None:
    assert MODELS[model_id].overrides == overrides


@pytest.mark.parametrize("model_id", ["black-forest-labs/flux.2-pro", "recraft/recraft-v3"])
def test_a_model_that_only_makes_pictures_is_not_called_free(model_id: str) -> None:
    spec = MODELS[model_id]
    assert (spec.price_in, spec.price_out, spec.is_free, format_price(spec)) == (None, None, False, "")


def test_a_model_that_only_makes_pictures_keeps_a_price_that_is_one() -> None:
    spec = MODELS["openai/gpt-image-2"]
    assert (spec.price_in, spec.price_out) == (8e-6, 8e-6)


@pytest.mark.parametrize("model_id", ENTRIES)
def test_what_a_model_takes_and_gives(model_id: str) -> None:
    entry, spec = ENTRIES[model_id], MODELS[model_id]
    inputs, outputs = (entry["architecture"][f"{side}_modalities"] for side in ("input", "output"))
    parameters = entry["supported_parameters"] or []
    assert (spec.takes_images, spec.takes_files) == ("image" in inputs, "file" in inputs)
    assert (spec.takes_audio, spec.takes_video) == ("audio" in inputs, "video" in inputs)
    assert (spec.writes_text, spec.writes_images) == ("text" in outputs, "image" in outputs)
    assert spec.takes_tools == ("tools" in parameters)
    assert spec.takes_schemas == ("structured_outputs" in parameters)
    assert spec.takes_plugins == ("text" in outputs)
    assert spec.searches_web == ("web_search_options" in parameters or "web_search" in entry["pricing"])
    assert spec.vendor == model_id.lstrip("~").split("/")[0]


def test_the_routers() -> None:
    routers = {model_id for model_id, spec in MODELS.items() if spec.vendor == "openrouter"}
    assert routers == {"openrouter/auto", "openrouter/bodybuilder", "openrouter/free"}
    assert MODELS["openrouter/auto"].price_in is None


ODD_PARTS: Final[list[Json]] = [
    {"reasoning": {}},
    {"reasoning": {"supported_efforts": "high", "mandatory": "yes", "default_effort": 3}},
    {"reasoning": {"supported_efforts": [None, 5, {}, "high"]}},
    {"reasoning": [], "supported_parameters": ["reasoning"]},
    {"top_provider": {"max_completion_tokens": -1}},
    {"top_provider": {"max_completion_tokens": "many"}},
    {"top_provider": [], "alias_target": "x", "canonical_slug": 7, "description": None},
    {"pricing": {"prompt": None, "completion": {}, "overrides": {"prompt": "1"}}},
    {"pricing": {"prompt": "nan", "completion": "inf", "overrides": [None, {"utc_start": "now"}]}},
    {"pricing": {"prompt": 10**400, "completion": -(10**400)}},
    {"created": 10**400, "context_length": 10**400},
    {"created": 1e308, "context_length": 0},
]


@pytest.mark.parametrize("part", ODD_PARTS, ids=lambda part: str(part)[:60])
def test_an_odd_part_spoils_nothing(part: Json) -> None:
    spec = _model_spec({"id": "a/b", "name": "B"} | part)
    assert spec is not None
    assert (spec.id, spec.name, spec.writes_text, spec.max_output) == ("a/b", "B", True, None)
    assert (spec.price_in, spec.is_free) == (None, False)
    asked = {"reasoning": {"effort": "high"}, "max_output_tokens": 5}
    assert fitted(asked, spec)["max_output_tokens"] == 5


# Efforts


def reasoner(efforts: Iterable[str] | None, *, mandatory: bool = False) -> ModelSpec:
    listed = None if efforts is None else tuple(efforts)
    return ModelSpec("a/b", "B", reasoning=ReasoningSpec(mandatory=mandatory, efforts=listed))


def thinking(effort: str) -> Json:
    return {"model": "a/b", "include": SEALED, "reasoning": {"summary": "auto", "effort": effort}}


FIVE: Final = ("high", "medium", "low", "minimal", "none")
THREE: Final = ("high", "medium", "low")


@pytest.mark.parametrize(
    ("efforts", "wanted", "sent"),
    [
        (THREE, "high", "high"),
        (THREE, "low", "low"),
        (THREE, "max", "high"),
        (THREE, "xhigh", "high"),
        (THREE, "minimal", "low"),
        (FIVE, "minimal", "minimal"),
        (FIVE, "none", "none"),
        (("max", "low"), "high", "low"),
        (("low", "max"), "xhigh", "low"),
        (("max", "high"), "minimal", "high"),
        (("none", "high"), "low", "high"),
        (None, "none", "none"),
        (None, "max", "max"),
        (THREE, "gigantic", "gigantic"),
        ((), "gigantic", "gigantic"),
    ],
    ids=str,
)
def test_an_effort_that_the_model_lacks_becomes_the_nearest(
    efforts: tuple[str, ...] | None, wanted: str, sent: str
) -> None:
    """Rather less than more; a word that nobody knows is left to OpenRouter."""
    found = fitted(thinking(wanted), reasoner(efforts))
    assert found["reasoning"] == {"summary": "auto", "effort": sent}
    assert found["include"] == SEALED


@pytest.mark.parametrize("wanted", EFFORTS[1:])
@pytest.mark.parametrize("mandatory", [True, False])
def test_without_a_choice_no_effort_is_sent(wanted: str, mandatory: bool) -> None:
    found = fitted(thinking(wanted), reasoner((), mandatory=mandatory))
    assert (found["reasoning"], found["include"]) == ({"summary": "auto"}, SEALED)


@pytest.mark.parametrize(
    ("efforts", "sent"),
    [(THREE, "low"), (FIVE, "minimal"), (("low", "max", "medium"), "low"), (None, "minimal")],
    ids=str,
)
def test_who_must_think_does_so_as_little_as_possible(efforts: tuple[str, ...] | None, sent: str) -> None:
    found = fitted(thinking("none"), reasoner(efforts, mandatory=True))
    assert found["reasoning"] == {"summary": "auto", "effort": sent}


@pytest.mark.parametrize("efforts", [(), ("none",)])
def test_who_must_think_and_has_no_choice_is_sent_no_effort(efforts: tuple[str, ...]) -> None:
    found = fitted(thinking("none"), reasoner(efforts, mandatory=True))
    assert found["reasoning"] == {"summary": "auto"}


@pytest.mark.parametrize("efforts", [THREE, (), ("max",)])
def test_thinking_can_be_switched_off_where_there_is_no_such_effort(efforts: tuple[str, ...]) -> None:
    found = fitted(thinking("none"), reasoner(efforts))
    assert found["reasoning"] == {"enabled": False}
    assert "include" not in found


def test_without_a_wish_nothing_changes() -> None:
    payload = {"model": "a/b", "include": SEALED, "reasoning": {"summary": "auto"}}
    for efforts in (THREE, (), None):
        assert _inject_model_capabilities(payload, reasoner(efforts, mandatory=True)) == (payload, ())


ANY_EFFORTS: Final = st.none() | st.lists(st.sampled_from(EFFORTS), unique=True)


@settings(max_examples=300, deadline=None)
@given(efforts=ANY_EFFORTS, wanted=st.sampled_from(EFFORTS), mandatory=st.booleans())
def test_only_efforts_of_the_model_leave(efforts: list[str] | None, wanted: str, mandatory: bool) -> None:
    spec = reasoner(efforts, mandatory=mandatory)
    found, told = _inject_model_capabilities(thinking(wanted), spec)
    options = set(EFFORTS if efforts is None else efforts) - ({"none"} if mandatory else set())
    if found["reasoning"] == {"enabled": False}:
        assert (wanted, mandatory, "none" in options) == ("none", False, False)
        assert "include" not in found
        return
    assert (found["include"], found["reasoning"]["summary"]) == (SEALED, "auto")
    sent = found["reasoning"].get("effort")
    if wanted in options:
        assert (sent, told) == (wanted, ())
    elif not options - {"none"}:
        assert sent is None
    else:
        assert sent in options - {"none"}
        rank = EFFORTS.index(wanted)
        lower = [EFFORTS.index(option) for option in options - {"none"} if EFFORTS.index(option) < rank]
        assert EFFORTS.index(sent) == (max(lower) if lower else min(map(EFFORTS.index, options - {"none"})))
    assert bool(told) == (sent != wanted)


@pytest.mark.parametrize(
    ("model", "wanted", "sent"),
    [
        ("anthropic/claude-sonnet-4.6", "minimal", "low"),
        ("anthropic/claude-sonnet-4.6", "max", "high"),
        ("anthropic/claude-sonnet-4.6", "none", "none"),
        ("openai/gpt-5", "none", "minimal"),
        ("openai/gpt-5:nitro", "xhigh", "high"),
        ("deepseek/deepseek-r1-0528", "low", None),
        ("openai/gpt-4o-mini", "low", None),
    ],
)
async def test_an_effort_on_its_way(
    model: str, wanted: str, sent: str | None, pipe: Pipe, simulator: Simulator
) -> None:
    answer = await ask(pipe, "hello", model=f"openrouter.{model}", reasoning_effort=wanted)
    assert (answer.error, bool(answer.text)) == ("", True)
    assert inferences(simulator)[0].body.get("reasoning", {}).get("effort") == sent


def chats(simulator: Simulator) -> list[RecordedRequest]:
    return [record for record in simulator.requests if record.path.endswith("/chat/completions")]


@pytest.mark.parametrize("over_chat", [False, True])
async def test_thinking_that_is_switched_off_stays_off(
    over_chat: bool, pipe: Pipe, simulator: Simulator
) -> None:
    """Also where the model is asked over the other endpoint."""
    model = "openai/gpt-oss-20b:free"  # thinks unless told not to, and has no effort `none`
    set_valves(pipe, simulator.base_url, FORCE_CHAT_COMPLETIONS_MODELS=model if over_chat else "")
    answer = await ask(pipe, "hello", model=f"openrouter.{model}", reasoning_effort="none")
    assert (answer.error, answer.reasoning) == ("", "")
    (record,) = chats(simulator) if over_chat else inferences(simulator)
    assert record.body["reasoning"] == {"enabled": False}


# Limits


@pytest.mark.parametrize(
    ("max_output", "context", "wanted", "sent"),
    [
        (1000, 8000, 1001, 1000),
        (1000, 8000, 1000, 1000),
        (1000, 8000, 1, 1),
        (1000, 8000, 0, None),
        (1000, 8000, -1, None),
        (1000, None, 5000, 1000),
        (None, 8000, 8001, 8000),
        (None, 8000, 8000, 8000),
        (None, None, 10**9, 10**9),
        (None, None, 0, None),
    ],
)
def test_the_limit_of_an_answer(
    max_output: int | None, context: int | None, wanted: int, sent: int | None
) -> None:
    spec = ModelSpec("a/b", "B", context_length=context, max_output=max_output)
    payload = {"model": "a/b", "max_output_tokens": wanted}
    found, told = _inject_model_capabilities(payload, spec)
    assert found == {"model": "a/b"} | ({} if sent is None else {"max_output_tokens": sent})
    assert told == (() if sent == wanted else ("max_output_tokens",))


@settings(max_examples=200, deadline=None)
@given(spec=st.sampled_from(sorted(MODELS.values(), key=lambda spec: spec.id)), wanted=st.integers())
def test_no_limit_excludes_the_providers_of_a_model(spec: ModelSpec, wanted: int) -> None:
    sent = fitted({"max_output_tokens": wanted}, spec).get("max_output_tokens")
    limit = spec.max_output or spec.context_length
    if wanted < 1:
        assert sent is None
    else:
        assert sent == (wanted if limit is None else min(wanted, limit))


async def test_a_limit_on_its_way(pipe: Pipe, simulator: Simulator) -> None:
    for wanted in (500, 64_000, 64_001, 0, -1):
        assert (await ask(pipe, "hello", max_tokens=wanted)).error == ""
    sent = [record.body.get("max_output_tokens") for record in inferences(simulator)]
    assert sent == [500, 64_000, 64_000, None, None]


# Sampling


@pytest.mark.parametrize("model_id", ENTRIES)
def test_only_the_parameters_of_a_model_leave(model_id: str) -> None:
    payload = {"model": model_id} | dict.fromkeys(SAMPLING, 1)
    found, told = _inject_model_capabilities(payload, MODELS[model_id])
    listed = ENTRIES[model_id]["supported_parameters"] or SAMPLING
    assert {name for name in SAMPLING if name in found} == set(SAMPLING) & set(listed)
    assert set(told) == set(SAMPLING) - set(listed)


def test_who_lists_no_parameters_is_sent_all() -> None:
    payload = {"model": "a/b"} | dict.fromkeys(SAMPLING, 1)
    for spec in (ModelSpec("a/b", "B"), _pick_model({}, "a/b"), MODELS["openrouter/bodybuilder"]):
        assert _inject_model_capabilities(payload, spec) == (payload, ())


def test_what_nobody_knows_is_sent_as_it_is() -> None:
    payload = thinking("max") | {"max_output_tokens": -7, "tools": [], "top_k": 3}
    assert _inject_model_capabilities(payload, _pick_model(MODELS, "nobody/none")) == (payload, ())


async def test_parameters_on_their_way(pipe: Pipe, simulator: Simulator) -> None:
    assert (await ask(pipe, "hello", temperature=0.5, top_k=3, presence_penalty=1)).error == ""
    body = inferences(simulator)[0].body
    assert {name: body[name] for name in SAMPLING if name in body} == {"temperature": 0.5}


# Pictures


@pytest.mark.parametrize("model_id", ENTRIES)
def test_pictures_are_asked_for_where_nothing_else_comes(model_id: str) -> None:
    """Without being asked, a model that writes as well answers in words."""
    outputs = ENTRIES[model_id]["architecture"]["output_modalities"]
    wanted: Json = {"modalities": ["image"]} if outputs == ["image"] else {}
    assert _inject_model_capabilities({}, MODELS[model_id]) == (wanted, ())


@pytest.mark.parametrize("model_id", [PICTURES_ONLY, WITHOUT_TOOLS, "openai/gpt-4o", "openrouter/auto"])
def test_modalities_that_somebody_chose_stay(model_id: str) -> None:
    assert fitted({"modalities": ["text"]}, MODELS[model_id]) == {"modalities": ["text"]}


@pytest.mark.parametrize("dialect", sorted(DIALECTS))
async def test_a_model_that_only_makes_pictures_answers(
    dialect: str, pipe: Pipe, simulator: Simulator
) -> None:
    given = arguments("a lighthouse", dialect, model=f"openrouter.{PICTURES_ONLY}")
    answer = await call(pipe, given)
    assert answer.error == ""
    (record,) = inferences(simulator)
    assert (record.status, record.body["modalities"]) == (200, ["image"])
    if dialect.startswith("browser"):
        assert "Made a picture" in given["__event_emitter__"].statuses()


@pytest.mark.parametrize(
    ("model", "modalities"),
    [
        ("openai/gpt-5-image", None),
        ("openai/gpt-4o-mini", None),
        ("openrouter/auto", None),
        (PICTURES_ONLY, ["image"]),
        (f"{PICTURES_ONLY}:nitro", ["image"]),
    ],
)
@pytest.mark.parametrize("over_chat", [False, True])
async def test_modalities_on_their_way(
    over_chat: bool, model: str, modalities: list[str] | None, pipe: Pipe, simulator: Simulator
) -> None:
    set_valves(pipe, simulator.base_url, FORCE_CHAT_COMPLETIONS_MODELS="*" if over_chat else "")
    assert (await ask(pipe, "hello", model=f"openrouter.{model}")).error == ""
    (record,) = chats(simulator) if over_chat else inferences(simulator)
    assert record.body.get("modalities") == modalities


# All gates together

ANY_REASONING: Final = st.builds(
    ReasoningSpec,
    mandatory=st.booleans(),
    efforts=st.none() | st.lists(st.sampled_from(EFFORTS)).map(tuple),
)
ANY_SPEC: Final = st.sampled_from(sorted(MODELS.values(), key=lambda spec: spec.id)) | st.builds(
    ModelSpec,
    id=st.sampled_from(["a/b", "openrouter/x", "~a/b-latest"]),
    name=st.just("B"),
    context_length=st.none() | st.integers(1, 10**7),
    output_modalities=st.frozensets(st.sampled_from(["text", "image", "audio"]), min_size=1),
    supported_parameters=st.frozensets(st.sampled_from([*SAMPLING, "tools", "reasoning"])),
    reasoning=st.none() | ANY_REASONING,
    max_output=st.none() | st.integers(1, 10**6),
    is_known=st.booleans(),
)
ANY_PAYLOAD: Final = st.fixed_dictionaries(
    {"model": st.just("a/b"), "input": st.just([{"type": "message"}])},
    optional={
        "include": st.just(SEALED),
        "reasoning": st.fixed_dictionaries(
            {"summary": st.just("auto")}, optional={"effort": st.sampled_from([*EFFORTS, "gigantic"])}
        ),
        "max_output_tokens": st.integers(),
        "tools": st.just([{"type": "function", "name": "f"}]),
        "modalities": st.sampled_from([["text"], ["image"], ["image", "text"]]),
        **{name: st.floats(0, 2) for name in SAMPLING},
    },
)


@settings(max_examples=500, deadline=None)
@given(spec=ANY_SPEC, payload=ANY_PAYLOAD)
def test_a_body_is_fitted_once_and_for_all(spec: ModelSpec, payload: Json) -> None:
    before = copy.deepcopy(payload)
    found, told = _inject_model_capabilities(payload, spec)
    assert payload == before, "the argument is not changed"
    assert found.keys() - payload.keys() <= {"modalities"}
    assert found.get("tools") == payload.get("tools")
    assert found["input"] == payload["input"]
    left_out = payload.keys() - found.keys()
    told_of = {name.split()[0] for name in told}
    assert left_out - {"include"} <= told_of, "what goes is named"
    assert _inject_model_capabilities(found, spec) == (found, ())


# Ids

TAILS: Final = ["", ":nitro", ":floor:online", "@preset/brief", ":exacto@preset/x.y", ":free", ":thinking"]
PREFIXES: Final = ["", "some_function.", " ", "openrouter."]
BASES: Final = [*ENTRIES, *(spec.canonical for spec in MODELS.values()), "nobody/none", "GPT", "a.b/c"]
ADDED: Final = st.builds(
    "{}{}{}".format, st.sampled_from(PREFIXES), st.sampled_from(BASES), st.sampled_from(TAILS)
) | st.sampled_from(["@preset/brief", "some_function.@preset/x.y"])
ANY_VALVES: Final = st.fixed_dictionaries(
    {},
    optional={
        "VARIANT_MODELS": st.lists(ADDED, max_size=6).map(",".join),
        "MODEL_ID": st.sampled_from(["auto", "openai/*", "some_function.openai/gpt-5", "*:free, ~*", ""]),
        "EXCLUDE_KEYWORDS": st.sampled_from(["", "gpt", "claude, gemini"]),
        "FREE_MODEL_FILTER": st.sampled_from(["all", "only", "exclude"]),
        "TOOL_CALLING_FILTER": st.sampled_from(["all", "only", "exclude"]),
        "MIN_CONTEXT": st.sampled_from([0, 8193, 1_000_000]),
        "MAX_PRICE": st.sampled_from([0.0, 0.5, 10.0]),
        "MODEL_SORT": st.sampled_from(["name", "newest", "price", "context"]),
        "MODEL_NAME_FORMAT": st.sampled_from(["{name}", "{id} {price}", ""]),
    },
)


@settings(max_examples=300, deadline=None)
@given(valves=ANY_VALVES)
def test_what_the_menu_shows_can_be_chosen(valves: Json) -> None:
    try:
        rows = _menu(MODELS, Valves(**valves), TODAY)
    except ConfigurationError:
        return
    assert len({row.id for row in rows}) == len(rows)
    for row in rows:
        found = _pick_model(MODELS, row.id)
        assert found.id == row.id
        assert found.is_known != row.id.startswith("@preset/")
        if found.is_known:
            assert _pick_model(MODELS, f"some_function.{row.id}") == found
            assert found._replace(name=row.name, title=row.title) == row
            assert found.writes_text or row.id in valves["VARIANT_MODELS"]


@pytest.mark.parametrize("listed", [":nitro", ":floor:online", "@preset/", "some_function.@preset/", ":"])
def test_an_added_entry_that_names_nothing_is_not_shown(listed: str) -> None:
    valves: Json = {"MODEL_ID": "openai/gpt-5", "VARIANT_MODELS": listed}
    assert [row.id for row in _menu(MODELS, Valves(**valves), TODAY)] == ["openai/gpt-5"]


@settings(max_examples=500, deadline=None)
@given(
    asked=st.text()
    | st.builds("{}{}{}".format, st.sampled_from(PREFIXES), st.sampled_from(BASES), st.text(max_size=8))
    | st.text(alphabet="ab/:.@~ presnitoflu", max_size=20)
)
def test_any_text_means_a_known_model_or_an_honest_unknown_one(asked: str) -> None:
    found = _pick_model(MODELS, asked)
    assert found.id in (asked, _parse_model_id(asked).id)
    if found.is_known:
        assert any(found == spec._replace(id=found.id) for spec in MODELS.values())
    else:
        assert (found.name, found.reasons, found.takes_tools, found.takes_images) == (
            found.id, True, True, True,
        )  # fmt: skip
        assert _inject_model_capabilities(thinking("max"), found) == (thinking("max"), ())
        assert asked not in MODELS


@pytest.mark.parametrize("prefix", ["", "some_function.", "openrouter."])
async def test_the_prefix_of_the_host_in_valves_means_nothing(
    prefix: str, pipe: Pipe, simulator: Simulator
) -> None:
    set_valves(
        pipe,
        simulator.base_url,
        MODEL_ID=f"{prefix}openai/gpt-5-mini, {prefix}google/*image",
        VARIANT_MODELS=f"{prefix}openai/gpt-5:nitro,{prefix}@preset/brief",
        FORCE_CHAT_COMPLETIONS_MODELS=f"{prefix}openai/gpt-5-mini",
    )
    ids = {row["id"] for row in await pipe.pipes()}
    assert ids == {
        *("openai/gpt-5-mini", "google/gemini-2.5-flash-image"),
        *("openai/gpt-5:nitro", "@preset/brief"),
    }
    await ask(pipe, "hello", model="openrouter.openai/gpt-5-mini")
    await ask(pipe, "hello", model="openrouter.openai/gpt-5:nitro")
    assert [record.body["model"] for record in chats(simulator)] == ["openai/gpt-5-mini"]
    assert [record.body["model"] for record in inferences(simulator)] == ["openai/gpt-5:nitro"]


@pytest.mark.parametrize("model_id", ENTRIES)
@pytest.mark.parametrize("tail", ["", ":nitro", "@preset/brief"])
def test_the_permanent_slug_of_a_model_is_known(model_id: str, tail: str) -> None:
    slug = ENTRIES[model_id]["canonical_slug"]
    found = _pick_model(MODELS, slug + tail)
    assert (found.is_known, found.id) == (True, slug + tail)
    plain = [spec for spec in MODELS.values() if spec.canonical == slug and ":" not in spec.id]
    if slug not in MODELS and plain:
        assert found._replace(id=plain[0].id) == plain[0]


VARIANTS: Final = [
    ModelSpec(model_id, model_id, canonical="a/b-2026-01-01", context_length=number)
    for number, model_id in enumerate(["a/b:extended", "a/b", "a/b:free"])
]


@pytest.mark.parametrize("order", list(itertools.permutations(VARIANTS)))
def test_the_slug_of_several_variants_means_the_plain_model(order: tuple[ModelSpec, ...]) -> None:
    found = _pick_model({spec.id: spec for spec in order}, "a/b-2026-01-01")
    assert found.name == "a/b"


@pytest.mark.parametrize("tail", ["", ":floor", "@preset/brief"])
def test_a_model_that_is_always_the_latest(tail: str) -> None:
    found = _pick_model(MODELS, f"~anthropic/claude-sonnet-latest{tail}")
    assert (found.is_known, found.alias_of) == (True, "anthropic/claude-sonnet-4.6")
    assert found.takes_tools
    assert found.reasons


async def test_a_slug_is_sent_as_it_was_chosen(pipe: Pipe, simulator: Simulator) -> None:
    """OpenRouter is told the id of the menu; what the model takes is that of the catalog's entry."""
    for model in ("openai/gpt-5-mini-2026-01-01", "~anthropic/claude-sonnet-latest"):
        await ask(pipe, "hello", model=f"openrouter.{model}", reasoning_effort="max")
    sent = [(record.body["model"], record.body["reasoning"]["effort"]) for record in inferences(simulator)]
    assert sent == [("openai/gpt-5-mini-2026-01-01", "high"), ("~anthropic/claude-sonnet-latest", "high")]


# What is told


async def nothing(*_asked: object) -> Any:
    raise AssertionError("no list is asked for")


def test_what_is_left_out_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    registry = OpenRouterModelRegistry(nothing, Clock())
    first, second = MODELS["openai/gpt-5"], MODELS["openai/o4-mini"]

    def lines(payload: Json, spec: ModelSpec) -> list[str]:
        caplog.clear()
        assert registry.fit(payload, spec) == fitted(payload, spec)
        return [record.getMessage() for record in caplog.records]

    (line,) = lines({"top_k": 3}, first)
    assert "openai/gpt-5" in line
    assert "top_k" in line
    assert lines({"top_k": 4}, first) == []
    (line,) = lines({"top_k": 3, "temperature": 1}, first)
    assert "temperature" in line
    assert "top_k" not in line
    (line,) = lines({"top_k": 3}, second)
    assert second.id in line
    assert lines({"max_output_tokens": 9}, first) == []
    (line,) = lines({"max_output_tokens": 500_000}, first)
    assert "max_output_tokens" in line
    assert lines({"max_output_tokens": 600_000}, first) == []
    (line,) = lines(thinking("max"), first)
    assert "max" in line
    assert lines(thinking("max"), first) == []


WEATHER: Final[Json] = {
    "type": "function",
    "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {}}},
}


@pytest.mark.parametrize("chosen", [{}, {"tool_ids": []}, {"tool_ids": None}, {"tool_ids": ["weather"]}])
@pytest.mark.parametrize("dialect", sorted(DIALECTS))
async def test_a_model_without_tools_is_offered_none(
    dialect: str, chosen: Json, pipe: Pipe, simulator: Simulator
) -> None:
    """The person is told only of tools that a person has chosen, and where somebody looks at it."""
    given = arguments(
        "hello", dialect, model=f"openrouter.{WITHOUT_TOOLS}", tools=[WEATHER], tool_choice="auto"
    )
    given["__metadata__"] |= chosen
    answer = await call(pipe, given)
    assert (answer.error, bool(answer.text)) == ("", True)
    (record,) = inferences(simulator)
    assert record.body.keys().isdisjoint({"tools", "tool_choice", "parallel_tool_calls"})
    told = [note["content"] for note in given["__event_emitter__"].of("notification")]
    is_told = dialect == "browser" and bool(chosen.get("tool_ids"))
    assert [text for text in told if "cannot use tools" in text] == told
    assert len(told) == is_told


@pytest.mark.parametrize("model", ["openai/gpt-4o-mini", "openai/gpt-4o-mini:nitro", "@preset/brief"])
async def test_tools_that_are_offered_are_no_news(model: str, pipe: Pipe, simulator: Simulator) -> None:
    given = arguments("[[plain text=fine]]", model=f"openrouter.{model}", tools=[WEATHER])
    given["__metadata__"]["tool_ids"] = ["weather"]
    assert (await call(pipe, given)).text == "fine"
    assert [tool["name"] for tool in inferences(simulator)[0].body["tools"]] == ["get_weather"]
    assert given["__event_emitter__"].of("notification") == []
