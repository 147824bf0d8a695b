"""Open WebUI's model rows: what is written, what is left alone, what is taken back, and when."""

from __future__ import annotations

import asyncio
import base64
import importlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from openrouter_responses_pipe.openrouter_responses_pipe import (
    _FAMILIES,
    ModelFamily,
    ModelPublisher,
    ModelRow,
    ModelSpec,
    OpenWebUIHost,
    PriceOverride,
    PublishChoice,
    Valves,
    _badge,
    _describe,
    _differing_rows,
    _menu,
    _model_spec,
    _plan_row,
    _row_fields,
)
from openrouter_responses_pipe.simulator import Simulator
from pytest_bootstrap import HostModels, host_models
from tests.recorded import Clock
from tests.support import MENU, PATIENCE_S, running_pipe, set_valves

Json = dict[str, Any]
Grants = frozenset[tuple[str, str, str]]

CATALOG: Final = Path(__file__).parent / "data" / "openrouter" / "models_catalog.json"
ENTRIES: Final[dict[str, Json]] = {row["id"]: row for row in json.loads(CATALOG.read_text("utf-8"))["data"]}
SPECS: Final = {key: spec for key, entry in ENTRIES.items() if (spec := _model_spec(entry))}
MENU_SPECS: Final = {key: spec for key, spec in SPECS.items() if spec.writes_text}
RECORD: Final = "openrouter_responses_pipe"
ROW: Final = "f.acme/one"
NOBODY: Final[Grants] = frozenset()
EVERYONE: Final[Grants] = frozenset({("user", "*", "read")})
GROUP: Final[Grants] = frozenset({("group", "g", "read")})
TOOLS: Final = ("builtin_tools", "web_search", "image_generation", "code_interpreter", "terminal")
WANTED: Final[Json] = {
    "name": "One",
    "access": NOBODY,
    "capabilities.usage": True,
    "capabilities.vision": False,
    "description": "Said of it.",
    "tags": [{"name": "Acme"}],
    "profile_image_url": "data:image/png;base64,AAAA",
}
# field -> what the catalog or the valves say of it later
NEWS: Final[Json] = {
    "name": "One, renewed",
    "access": EVERYONE,
    "capabilities.usage": False,
    "capabilities.vision": True,
    "description": "Said of it now.",
    "tags": [{"name": "Acme"}, {"name": "Free"}],
    "profile_image_url": "data:image/png;base64,BBBB",
}
LATER: Final = {**WANTED, **NEWS}


def plan(row: ModelRow | None, wanted: Mapping[str, Any]) -> ModelRow:
    """The row as planned, which there must be."""
    planned = _plan_row(row, ROW, wanted)
    assert planned is not None
    return planned


def said(row: ModelRow) -> Json:
    """A row field by field, with the names that plans have; what is unset is not there."""
    meta = {name: value for name, value in row.meta.items() if name not in (RECORD, "capabilities")}
    switches = {f"capabilities.{name}": on for name, on in (row.meta.get("capabilities") or {}).items()}
    fields = {**meta, **switches, "name": row.name}
    return {name: value for name, value in fields.items() if value or value is False} | {"access": row.grants}


def edited(row: ModelRow, field: str, value: Any) -> ModelRow:
    """A row after an administrator has set one field; None clears it, as the host does."""
    if field == "name":
        return row._replace(name=value)
    if field == "access":
        return row._replace(grants=value)
    name, _, part = field.partition(".")
    if part:
        switches = {**(row.meta.get(name) or {}), part: value}
        value = {key: on for key, on in switches.items() if on is not None}
    return row._replace(meta={**row.meta, name: value})


def own(**meta: Any) -> ModelRow:
    """A row that an administrator has made, as the host gives it back."""
    return ModelRow(
        ROW, "Mine", {"profile_image_url": None, "description": None, "capabilities": None} | meta
    )


OURS: Final = plan(None, WANTED)

# Planning: rows of ours


def test_a_new_row_says_what_is_wanted() -> None:
    assert said(OURS) == WANTED
    assert (OURS.id, OURS.params, OURS.is_active) == (ROW, {}, True)
    assert OURS.meta[RECORD]["created"] is True


def test_nothing_wanted_makes_no_row() -> None:
    assert _plan_row(None, ROW, {}) is None


def test_the_record_is_json_and_small() -> None:
    record = OURS.meta[RECORD]
    assert json.loads(json.dumps(record)) == record
    assert len(json.dumps(record)) < 400


def test_a_row_that_says_it_already_stays() -> None:
    assert plan(OURS, WANTED) == OURS


@pytest.mark.parametrize("field", NEWS)
def test_what_the_catalog_changes_is_changed(field: str) -> None:
    wanted = {**WANTED, field: NEWS[field]}
    row = plan(OURS, wanted)
    assert said(row) == wanted
    assert plan(row, WANTED) == OURS


@pytest.mark.parametrize("field", ["capabilities.vision", "description", "tags", "profile_image_url"])
def test_what_the_catalog_no_longer_says_is_taken_back(field: str) -> None:
    wanted = {name: value for name, value in WANTED.items() if name != field}
    row = plan(OURS, wanted)
    assert said(row) == wanted
    assert plan(row, WANTED) == OURS


EDITS: Final[list[tuple[str, Any]]] = [
    ("name", "My name for it"),
    ("access", GROUP),
    ("access", frozenset({*GROUP, *EVERYONE})),
    ("capabilities.usage", None),
    ("capabilities.vision", None),
    ("description", "My words."),
    ("description", ""),
    ("description", None),
    ("tags", [{"name": "Mine"}, {"name": "Acme"}]),
    ("tags", []),
    ("profile_image_url", "/static/favicon.png"),
    ("profile_image_url", None),
]


@pytest.mark.parametrize(("field", "value"), EDITS)
def test_what_an_administrator_changes_stays(field: str, value: Any) -> None:
    """Through any later catalog, while every other field follows it."""
    row = edited(OURS, field, value)
    kept = {name: text for name, text in said(row).items() if name == field}
    for wanted in (LATER, WANTED, LATER):
        row = plan(row, wanted)
        assert said(row) == {name: text for name, text in wanted.items() if name != field} | kept


def test_what_an_administrator_adds_stays() -> None:
    """Also settings that are none of ours, and those that are not ours to say now."""
    row = edited(edited(OURS, "capabilities.citations", False), "capabilities.file_upload", True)
    row = edited(row, "knowledge", [{"id": "k"}])._replace(params={"temperature": 1}, is_active=False)
    row = plan(row, {**LATER, "capabilities.file_upload": False})
    assert (row.params, row.is_active, row.meta["knowledge"]) == ({"temperature": 1}, False, [{"id": "k"}])
    assert row.meta["capabilities"] == {
        "usage": False,
        "vision": True,
        "citations": False,
        "file_upload": True,
    }


def test_a_switch_set_to_what_the_catalog_says_next_is_no_edit() -> None:
    row = plan(edited(OURS, "capabilities.vision", True), LATER)
    assert plan(row, WANTED) == OURS


# Planning: rows that an administrator made before


def test_in_a_row_from_before_only_gaps_are_filled() -> None:
    row = plan(own(description="My words.", capabilities={"vision": True, "citations": False}), WANTED)
    assert row.name == "Mine"
    assert row.meta["description"] == "My words."
    assert row.meta["capabilities"] == {"vision": True, "citations": False, "usage": True}
    assert row.meta["tags"] == [{"name": "Acme"}]
    assert row.meta[RECORD]["created"] is False


@pytest.mark.parametrize("grants", [NOBODY, GROUP, EVERYONE])
def test_the_access_of_a_row_from_before_is_not_ours(grants: Grants) -> None:
    row = own()._replace(grants=grants)
    for wanted in (WANTED, LATER, WANTED, {}):
        row = plan(row, wanted)
        assert row.grants == grants


@pytest.mark.parametrize("switch", ["usage", "vision"])
@pytest.mark.parametrize("set_to", [True, False])
def test_each_capability_is_looked_at_by_itself(switch: str, set_to: bool) -> None:
    row = plan(own(capabilities={switch: set_to}), WANTED)
    assert row.meta["capabilities"] == {"usage": True, "vision": False, switch: set_to}
    assert plan(row, {}).meta["capabilities"] == {switch: set_to}


GARBAGE: Final[list[Any]] = [
    *(None, "x", 5, True, [], [1], {}, {"created": "yes"}, {"created": 1}),
    *({"wrote": None}, {"wrote": [1]}, {"wrote": {"name": 5}}, {"wrote": {"name": None, "tags": []}}),
    *({"theirs": "name"}, {"theirs": [None, 4]}, {"theirs": {"name": 1}}),
    {"created": None, "wrote": {"": 1, ".": 2, "x.y": 3, "capabilities": "z"}, "theirs": []},
]


@pytest.mark.parametrize("record", GARBAGE, ids=str)
def test_a_record_that_is_garbage_claims_nothing(record: Any) -> None:
    before = own(description="My words.", tags=[{"name": "Mine"}])._replace(grants=GROUP)
    row = plan(edited(before, RECORD, record), WANTED)
    kept = {name: said(row)[name] for name in ("name", "access", "description", "tags")}
    assert kept == {name: said(before)[name] for name in kept}
    off = plan(row, {})
    assert RECORD not in off.meta
    assert said(off) == said(before)
    bare = edited(own(), RECORD, record)
    row = plan(bare, LATER)
    assert row.grants == NOBODY
    assert said(plan(row, {})) == said(own())


# Planning: modes, and back

SPEC: Final = ModelSpec("acme/one", "Acme: One", context_length=8192, description="Small.")


def fields(mode: Any, spec: ModelSpec = SPEC, access: Any = "admins", private: Grants = NOBODY) -> Json:
    """What a row shall say in one mode."""
    return _row_fields(spec, PublishChoice(mode, access), private)


def test_each_mode_takes_back_what_the_one_before_said() -> None:
    capabilities = plan(None, fields("capabilities"))
    row = plan(None, fields("all"))
    assert {*said(row)} - {*said(capabilities)} == {"description", "tags", "profile_image_url"}
    row = plan(row, fields("capabilities"))
    assert row == capabilities
    assert _plan_row(row, ROW, fields("off")) is None
    assert _plan_row(capabilities, ROW, fields("off")) is None


@pytest.mark.parametrize("mode", ["capabilities", "all"])
@pytest.mark.parametrize(
    "row",
    [
        own(),
        own(description="My words."),
        own(capabilities={"vision": True, "citations": False}, tags=[{"name": "Mine"}])._replace(
            grants=GROUP
        ),
        own()._replace(params={"temperature": 0.5}, is_active=False),
    ],
    ids=["bare", "described", "opened", "set"],
)
def test_off_leaves_a_row_from_before_as_it_was(row: ModelRow, mode: str) -> None:
    was = {name: value for name, value in row.meta.items() if value is not None}
    off = plan(plan(row, fields(mode)), {})
    assert {name: value for name, value in off.meta.items() if value is not None} == was
    assert off._replace(meta={}) == row._replace(meta={})


@pytest.mark.parametrize(("field", "value"), [edit for edit in EDITS if edit[1] and edit[0] != "access"])
def test_off_leaves_what_an_administrator_changed(field: str, value: Any) -> None:
    off = plan(edited(OURS, field, value), {})
    assert RECORD not in off.meta
    assert said(off) == {"name": "One", "access": NOBODY, field: value}


@pytest.mark.parametrize(
    "changes",
    [
        {"params": {"temperature": 1}},
        {"is_active": False},
        {"grants": GROUP},
        {"name": "Mine"},
        {"meta": {**OURS.meta, "knowledge": [{"id": "k"}]}},
        {"meta": {**OURS.meta, "hidden": True}},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_off_keeps_a_row_in_which_something_is_set(changes: Json) -> None:
    off = plan(OURS._replace(**changes), {})
    assert RECORD not in off.meta
    assert "tags" not in off.meta
    assert {name: getattr(off, name) for name in changes if name != "meta"} == {
        name: value for name, value in changes.items() if name != "meta"
    }


def test_off_closes_what_was_open_to_everyone() -> None:
    assert _plan_row(plan(None, LATER), ROW, {}) is None
    kept = plan(edited(plan(None, LATER), "description", "My words."), {})
    assert kept.grants == NOBODY


def test_a_model_made_private_is_not_opened_again() -> None:
    """Neither by switching off and on, nor because it was out of the menu for a while."""
    public = fields("capabilities", access="everyone")
    row = edited(plan(None, public), "access", NOBODY)
    assert plan(row, public).grants == NOBODY
    assert plan(_plan_row(row, ROW, {}), public).grants == NOBODY


def test_rows_that_differ() -> None:
    """Those of models that are no longer shown too, but nobody else's."""
    rows = {
        "f.same": plan(None, WANTED)._replace(id="f.same"),
        "f.changed": plan(None, LATER)._replace(id="f.changed"),
        "f.gone": plan(None, WANTED)._replace(id="f.gone"),
        "f.theirs": ModelRow("f.theirs", "Mine"),
    }
    wanted: dict[str, Json] = dict.fromkeys(("f.same", "f.changed", "f.new"), WANTED)
    assert _differing_rows(rows, wanted) == {"f.changed": WANTED, "f.new": WANTED, "f.gone": {}}
    assert _differing_rows(rows, {}) == {"f.same": {}, "f.changed": {}, "f.gone": {}}
    assert _differing_rows({}, {}) == {}


# Planning: any row

SWITCHES: Final = ("usage", "vision", "citations")
META: Final[dict[str, st.SearchStrategy[Any]]] = {
    "description": st.none() | st.sampled_from(["a", "b"]),
    "tags": st.lists(st.sampled_from(["a", "b"]).map(lambda name: {"name": name}), min_size=1, max_size=2),
    "profile_image_url": st.none() | st.sampled_from(["a", "b"]),
    "capabilities": st.none() | st.dictionaries(st.sampled_from(SWITCHES), st.booleans(), min_size=1),
    "knowledge": st.just([{"id": "k"}]),
}
GRANTS: Final = st.sampled_from([NOBODY, GROUP, EVERYONE])
ROWS: Final = st.builds(
    ModelRow,
    id=st.just(ROW),
    name=st.sampled_from(["a", "b"]),
    meta=st.fixed_dictionaries({}, optional=META),
    params=st.sampled_from([{}, {"temperature": 1}]),
    grants=GRANTS,
    is_active=st.booleans(),
)
WANTS: Final = st.fixed_dictionaries(
    {"name": st.sampled_from(["a", "b"]), "access": GRANTS},
    optional={
        "capabilities.usage": st.booleans(),
        "capabilities.vision": st.booleans(),
        "description": st.sampled_from(["a", "b"]),
        "tags": META["tags"],
        "profile_image_url": st.sampled_from(["a", "b"]),
    },
)
ANY_EDIT: Final = st.sampled_from([*EDITS, *NEWS.items(), ("access", NOBODY), ("capabilities.vision", False)])


@settings(max_examples=300, deadline=None)
@given(
    row=st.none() | ROWS, wants=st.lists(WANTS, min_size=1, max_size=3), edits=st.lists(ANY_EDIT, max_size=2)
)
def test_planning_again_changes_nothing(
    row: ModelRow | None, wants: list[Json], edits: list[tuple[str, Any]]
) -> None:
    for wanted in wants:
        row = plan(row, wanted)
        assert plan(row, wanted) == row
        for field, value in edits:
            row = edited(row, field, value)
    off = _plan_row(row, ROW, {})
    assert off is None or _plan_row(off, ROW, {}) == off


@settings(max_examples=300, deadline=None)
@given(
    row=st.none() | ROWS,
    wants=st.lists(WANTS, min_size=1, max_size=3),
    edit=ANY_EDIT,
    last=WANTS | st.just({}),
)
def test_a_field_that_holds_something_else_is_never_changed(
    row: ModelRow | None, wants: list[Json], edit: tuple[str, Any], last: Json
) -> None:
    """Something else than what was written, and than what would be written now."""
    for wanted in wants:
        row = plan(row, wanted)
    assert row is not None
    changed = edited(row, *edit)
    before, written, now = said(changed), said(row), last
    planned = _plan_row(changed, ROW, last)
    after = said(planned) if planned is not None else {}
    field = edit[0]
    if field in before and before[field] != written.get(field) and before[field] != now.get(field):
        assert after.get(field, NOBODY if field == "access" else None) == before[field]


@settings(max_examples=300, deadline=None)
@given(row=ROWS, wants=st.lists(WANTS, max_size=3), last=WANTS)
def test_what_a_person_has_set_before_is_never_changed(row: ModelRow, wants: list[Json], last: Json) -> None:
    before = said(row)
    for wanted in (*wants, last):
        row = plan(row, wanted)
        assert {name: said(row).get(name) for name in before} == before
        assert row.meta.get("knowledge") == before.get("knowledge")


@settings(max_examples=300, deadline=None)
@given(row=st.none() | ROWS, wants=st.lists(WANTS, min_size=1, max_size=3))
def test_off_restores_what_was_there(row: ModelRow | None, wants: list[Json]) -> None:
    """The same row, or none; a field that was None may be missing, which is the same to the host."""
    planned = row
    for wanted in wants:
        planned = plan(planned, wanted)
    off = _plan_row(planned, ROW, {})
    if row is None:
        assert off is None
        return
    assert off is not None
    assert said(off) == said(row)
    assert off._replace(meta={}) == row._replace(meta={})


# What a row shall say


@pytest.mark.parametrize("model_id", MENU_SPECS)
def test_what_is_said_of_the_recorded_models(model_id: str) -> None:
    entry, spec = ENTRIES[model_id], MENU_SPECS[model_id]
    sees = "image" in entry["architecture"]["input_modalities"]
    calls = "tools" in (entry.get("supported_parameters") or [])
    off = {name for name, can in (("vision", sees), *((tool, calls) for tool in TOOLS)) if not can}
    capabilities = {
        "capabilities.usage": True,
        **dict.fromkeys((f"capabilities.{name}" for name in off), False),
    }
    assert fields("off", spec) == {}
    assert fields("capabilities", spec) == {"name": spec.name, "access": NOBODY, **capabilities}
    more = fields("all", spec)
    tags = [tag["name"] for tag in more["tags"]]
    assert {name: more[name] for name in fields("capabilities", spec)} == fields("capabilities", spec)
    assert {*more} - {*fields("capabilities", spec)} == {"description", "tags", "profile_image_url"}
    assert ("Vision" in tags, "Tools" in tags) == (sees, calls)
    assert ("Free" in tags) == (entry["pricing"]["prompt"] == entry["pricing"]["completion"] == "0")
    assert len(tags) == len({*tags})
    assert all(tag.strip() == tag and tag for tag in tags)


@pytest.mark.parametrize(
    ("access", "private", "grants"),
    [
        ("admins", NOBODY, NOBODY),
        ("admins", GROUP, GROUP),
        ("everyone", NOBODY, EVERYONE),
        ("everyone", GROUP, EVERYONE),
    ],
)
def test_who_gets_access(access: str, private: Grants, grants: Grants) -> None:
    assert fields("capabilities", access=access, private=private)["access"] == grants


def test_a_model_that_writes_no_text_takes_no_files() -> None:
    painter = SPEC._replace(output_modalities=frozenset({"image"}))
    assert fields("capabilities", painter)["capabilities.file_upload"] is False
    assert "capabilities.file_upload" not in fields("capabilities", SPEC)


@pytest.mark.parametrize(
    ("native_files", "reads_files", "calls", "is_told"),
    [
        ("off", True, True, False),
        ("supported", True, True, True),
        ("supported", False, True, False),
        ("always", False, True, True),
        ("always", True, False, False),
        ("supported", True, False, False),
    ],
)
def test_a_model_that_gets_files_whole_is_not_searched_for(
    native_files: Any, reads_files: bool, calls: bool, is_told: bool
) -> None:
    """Unless it has no tools: then nothing else that is attached could be found."""
    spec = SPEC._replace(
        input_modalities=frozenset({"text", "file"} if reads_files else {"text"}),
        supported_parameters=frozenset({"tools"} if calls else ()),
    )
    for mode in ("capabilities", "all"):
        row = _row_fields(spec, PublishChoice(mode, "admins", native_files), NOBODY)
        assert row.get("capabilities.file_context") is (False if is_told else None)
    assert _row_fields(spec, PublishChoice("off", "admins", native_files), NOBODY) == {}


def test_files_are_searched_again_when_the_valve_is_turned_back() -> None:
    """What an administrator has set stays."""
    spec = SPEC._replace(
        input_modalities=frozenset({"text", "file"}), supported_parameters=frozenset({"tools"})
    )
    whole, off = (
        _row_fields(spec, PublishChoice("capabilities", "admins", choice), NOBODY)
        for choice in ("always", "off")
    )
    row = plan(None, whole)
    assert row.meta["capabilities"]["file_context"] is False
    assert "file_context" not in plan(row, off).meta["capabilities"]
    theirs = own(capabilities={"file_context": True})
    assert plan(theirs, whole).meta["capabilities"]["file_context"] is True


def shown(*specs: ModelSpec, **valves: Any) -> list[ModelSpec]:
    """The menu of these models."""
    return _menu({spec.id: spec for spec in specs}, Valves(**valves), "2026-08-21")


def test_a_preset_of_which_nothing_is_known_may_do_everything() -> None:
    """As in a request: what such a model cannot take, OpenRouter says."""
    (preset,) = shown(VARIANT_MODELS="@preset/brief")
    assert not [name for name, on in fields("capabilities", preset).items() if on is False]


@pytest.mark.parametrize("template", ["{name}", "{id}", "{price} {name}", "{vendor}: {context}"])
def test_tags_and_icon_do_not_depend_on_the_name_in_the_menu(template: str) -> None:
    spec = SPEC._replace(name="Acme Labs: One", prices={"prompt": 1e-6, "completion": 2e-6})
    (named,) = shown(spec, MODEL_NAME_FORMAT=template)
    plain = fields("all", spec)
    assert {name: fields("all", named)[name] for name in ("tags", "profile_image_url")} == {
        name: plain[name] for name in ("tags", "profile_image_url")
    }


PRICED: Final = {"prompt": 2.5e-7, "completion": 2e-6}


@pytest.mark.parametrize(
    ("said_of_it", "text"),
    [
        ({}, ""),
        ({"context_length": 400_000}, "400K context"),
        ({"prices": PRICED}, "$0.25 / $2 per million tokens in / out"),
        ({"prices": {"prompt": 0.0, "completion": 0.0}}, "free"),
        ({"prices": {"prompt": 1e-6}}, ""),
        ({"alias_of": "acme/two"}, "stands for acme/two"),
        ({"expires": "2026-12-31"}, "ends on 2026-12-31"),
        ({"expires": "2026-12-31T12:00:00Z"}, "ends on 2026-12-31"),
        ({"description": "  Two\n\nparagraphs.\r\nAnd more. "}, "Two paragraphs. And more."),
        ({"overrides": (PriceOverride(PRICED, 200_000),)}, "other prices above 200K tokens"),
        (
            {"context_length": 1_000_000, "prices": PRICED, "expires": "2026-12-31", "description": "Fine."},
            "1M context · $0.25 / $2 per million tokens in / out · ends on 2026-12-31\nFine.",
        ),
    ],
    ids=str,
)
def test_descriptions(said_of_it: Json, text: str) -> None:
    assert _describe(ModelSpec("acme/one", "Acme: One", **said_of_it)) == text


def test_a_long_description_ends_at_a_word() -> None:
    text = _describe(ModelSpec("acme/one", "Acme: One", description="word, " * 100))
    assert len(text) <= 302
    assert text.endswith("word …")


# Families and badges


@pytest.mark.parametrize(
    ("model_id", "name", "family", "letters"),
    [
        ("openai/gpt-5", "OpenAI: GPT-5", "OpenAI", "AI"),
        ("openai/gpt-5", "anything", "OpenAI", "AI"),
        ("~anthropic/claude-latest", "Anthropic: Claude Latest", "Anthropic", "A"),
        ("openrouter/auto", "Auto Router", "OpenRouter", "OR"),
        ("arcee-ai/trinity", "Arcee AI: Trinity", "Arcee AI", "A"),
        ("~arcee-ai/trinity", "Arcee AI: Trinity", "Arcee AI", "A"),
        ("arcee-ai/trinity", "Trinity", "Arcee Ai", "A"),
        ("arcee-ai/trinity", " : Trinity", "Arcee Ai", "A"),
        ("plain", "Plain", "Plain", "P"),
    ],
)
def test_families(model_id: str, name: str, family: str, letters: str) -> None:
    found = ModelFamily.of(ModelSpec(model_id, name))
    assert (found.name, found.letters) == (family, letters)
    assert found == ModelFamily.of(ModelSpec(f"{found.vendor}/another", name))


def pixels(url: str) -> Image.Image:
    """The picture in a data URL."""
    head, _, data = url.partition(",")
    assert head == "data:image/png;base64"
    picture = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
    assert picture.format == "PNG"
    return picture.convert("RGBA")


VENDORS: Final = [*_FAMILIES, "arcee-ai", "acme", "zeta"]


def test_badges_are_small_pictures_that_differ() -> None:
    families = [ModelFamily.of(ModelSpec(f"{vendor}/x", "X")) for vendor in VENDORS]
    urls = [_badge(family.letters, family.colour) for family in families]
    pictures = [pixels(url) for url in urls]
    assert {picture.size for picture in pictures} == {(64, 64)}
    assert len({picture.tobytes() for picture in pictures}) == len(VENDORS)
    assert max(map(len, urls)) < 4000


@pytest.mark.parametrize("vendor", VENDORS)
def test_a_badge_has_clear_corners_and_letters_that_can_be_read(vendor: str) -> None:
    family = ModelFamily.of(ModelSpec(f"{vendor}/x", "X"))
    picture = pixels(_badge(family.letters, family.colour))
    corner, ground = picture.getpixel((0, 0)), picture.getpixel((32, 4))
    assert isinstance(corner, tuple)
    assert isinstance(ground, tuple)
    assert corner[3] < 128
    assert ground[3] > 250
    red, green, blue = (channel / 255 for channel in ground[:3])
    assert 0.2126 * red**2.2 + 0.7152 * green**2.2 + 0.0722 * blue**2.2 < 0.35  # 2.6 : 1 against white


@pytest.mark.parametrize("letters", ["", "W", "WW", "漢", "@"])
def test_any_letters_make_a_badge(letters: str) -> None:
    assert pixels(_badge(letters, "#336699")).size == (64, 64)


# The publisher


@pytest.fixture
def table() -> Iterator[HostModels]:
    """The host's table of models, empty, and an administrator."""
    host_models.reset(admin_id="admin")
    yield host_models
    host_models.reset()


ONE: Final = ModelSpec("acme/one", "Acme: One", supported_parameters=frozenset({"tools"}))
TWO: Final = ModelSpec("acme/two", "Acme: Two", input_modalities=frozenset({"text", "image"}))
TELL: Final = PublishChoice("capabilities")
OPEN: Final = PublishChoice("capabilities", "everyone")


class Publisher(ModelPublisher):
    """A publisher for the function `f`, with a clock of its own."""

    def __init__(self, function_id: str = "f") -> None:
        self.clock = Clock()
        super().__init__(OpenWebUIHost(), function_id, self.clock)

    async def done(self, shown: Sequence[ModelSpec], choice: PublishChoice = TELL) -> None:
        """Publish, and wait for the end of it."""
        self.publish(shown, choice)
        await published()


async def published() -> None:
    """Wait until nobody publishes."""
    tasks = [task for task in asyncio.all_tasks() if task.get_name() == "publish models"]
    if tasks:
        _, late = await asyncio.wait(tasks, timeout=PATIENCE_S)
        assert not late


def names(table: HostModels) -> dict[str, str]:
    return {row_id: row["name"] for row_id, row in table.rows.items()}


async def test_a_list_is_published_once(table: HostModels) -> None:
    lists: list[str] = []

    async def count(what: str, row_id: str) -> None:
        if what == "list":
            lists.append(row_id)

    table.hook = count
    publisher, shown = Publisher(), [ONE, TWO]
    for _ in range(3):
        await publisher.done(shown)
    assert names(table) == {"f.acme/one": "Acme: One", "f.acme/two": "Acme: Two"}
    assert {row["user_id"] for row in table.rows.values()} == {"admin"}
    assert len(lists) == 1
    await publisher.done([ONE, TWO])  # the same in another list: looked at, not written
    assert len(lists) == 2
    assert table.writes == [("insert", "f.acme/one"), ("insert", "f.acme/two")]


async def test_another_list_or_choice_is_published(table: HostModels) -> None:
    publisher = Publisher()
    shown = [ONE, TWO]
    await publisher.done(shown)
    table.writes.clear()
    await publisher.done(shown, OPEN)
    assert sorted(table.writes) == [
        *(("grant", f"f.{spec.id}") for spec in shown),
        *(("update", f"f.{spec.id}") for spec in shown),
    ]
    assert all(row["access_grants"][0]["principal_id"] == "*" for row in table.rows.values())
    table.writes.clear()
    await publisher.done([ONE._replace(name="Acme: Uno")], OPEN)
    assert table.writes == [("update", "f.acme/one"), ("delete", "f.acme/two")]
    assert names(table) == {"f.acme/one": "Acme: Uno"}
    await publisher.done([ONE], PublishChoice("off", "everyone"))
    assert table.rows == {}


async def test_the_last_list_asked_for_wins(table: HostModels) -> None:
    begun, go_on = asyncio.Event(), asyncio.Event()
    written: list[str] = []

    async def hold(what: str, row_id: str) -> None:
        begun.set()
        await go_on.wait()
        if what == "insert":
            written.append(row_id)

    table.hook = hold
    publisher = Publisher()
    publisher.publish([ONE], TELL)
    await asyncio.wait_for(begun.wait(), PATIENCE_S)
    publisher.publish([ModelSpec("acme/never", "Never")], TELL)
    publisher.publish([TWO], TELL)
    go_on.set()
    await published()
    assert names(table) == {"f.acme/two": "Acme: Two"}
    assert "f.acme/never" not in written


async def test_without_an_administrator_it_waits_for_one(table: HostModels) -> None:
    table.reset()
    publisher, shown = Publisher(), [ONE]
    await publisher.done(shown)
    table.admin_id = "admin"
    publisher.clock.now += 59
    await publisher.done(shown)
    assert table.rows == {}
    publisher.clock.now += 1
    await publisher.done(shown)
    assert names(table) == {"f.acme/one": "Acme: One"}


async def test_off_needs_no_administrator_where_nothing_was_written(table: HostModels) -> None:
    table.reset()
    looked: list[str] = []

    async def look(what: str, row_id: str) -> None:
        looked.append(what)

    table.hook = look
    publisher = Publisher()
    shown = [ONE]
    for _ in range(2):
        publisher.clock.now += 60
        await publisher.done(shown, PublishChoice("off"))
    assert looked == ["list"]


@pytest.mark.parametrize("operation", ["list", "read", "insert", "update", "grant", "delete"])
async def test_a_failing_database_costs_one_warning(
    operation: str, table: HostModels, caplog: pytest.LogCaptureFixture
) -> None:
    """The change that follows needs each operation; whichever fails, the rows are right a minute later."""
    publisher, gone = Publisher(), ModelSpec("acme/gone", "Acme: Gone")
    await publisher.done([ONE, gone])

    async def fail(what: str, row_id: str) -> None:
        if what == operation:
            raise ConnectionError("postgresql://user:secret@db")

    table.hook = fail
    wanted = [ONE._replace(name="Acme: Uno"), TWO]
    caplog.clear()
    for _ in range(3):
        await publisher.done(wanted, OPEN)
        publisher.clock.now += 19
    assert [record.levelname for record in caplog.records].count("WARNING") == 1
    assert "secret" not in caplog.text
    table.hook = None
    publisher.clock.now += 60
    await publisher.done(wanted, OPEN)
    assert names(table) == {"f.acme/one": "Acme: Uno", "f.acme/two": "Acme: Two"}
    assert all(row["access_grants"] for row in table.rows.values())


async def test_a_row_changed_meanwhile_is_planned_anew(table: HostModels) -> None:
    """Between the look at all rows and the write of this one an administrator has changed it."""
    publisher = Publisher()
    await publisher.done([ONE, TWO])

    async def edit(what: str, row_id: str) -> None:
        if (what, row_id) == ("read", "f.acme/one"):
            table.rows[row_id]["name"] = "Our name"
        if (what, row_id) == ("read", "f.acme/two"):
            table.rows.pop(row_id, None)

    table.hook = edit
    renamed = [spec._replace(name=f"{spec.name}, renewed") for spec in (ONE, TWO)]
    await publisher.done(renamed)
    assert names(table) == {"f.acme/one": "Our name", "f.acme/two": "Acme: Two, renewed"}


async def test_a_workspace_model_with_the_id_of_ours_is_left_alone(table: HostModels) -> None:
    """The host lets an administrator give one that id."""
    await table.insert_new_model(_form("f.acme/one", base_model_id="other.model"), "admin")
    before = json.dumps(table.rows["f.acme/one"])
    await Publisher().done([ONE, TWO])
    assert json.dumps(table.rows["f.acme/one"]) == before
    assert "f.acme/two" in table.rows


def _form(row_id: str, **values: Any) -> Any:
    form = importlib.import_module("open_webui.models.models").ModelForm
    return form(**{"id": row_id, "name": "Theirs", "meta": {}, "params": {}, **values})


async def test_rows_of_others_are_not_touched(table: HostModels) -> None:
    """Nor those of the same code under an id that begins alike."""
    for row_id in ("f", "fx", "other.acme/one", "f2.acme/theirs"):
        await table.insert_new_model(_form(row_id), "admin")
    await Publisher("f2").done([ONE])
    before = json.dumps(table.rows)
    publisher = Publisher()
    await publisher.done([ONE])
    assert "f.acme/one" in table.rows
    await publisher.done([ONE], PublishChoice("off"))
    assert json.dumps(table.rows) == before


async def test_where_administrators_see_no_more_than_others_they_get_access(
    table: HostModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("open_webui.config.BYPASS_ADMIN_ACCESS_CONTROL", False)
    publisher = Publisher()
    await publisher.done([ONE])
    (grant,) = table.rows["f.acme/one"]["access_grants"]
    assert grant == {"principal_type": "user", "principal_id": "admin", "permission": "read"}
    await publisher.done([ONE], PublishChoice("off"))
    assert table.rows == {}


@pytest.fixture
def data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data folder of the host, which all its workers share."""
    monkeypatch.setattr("open_webui.env.DATA_DIR", tmp_path, raising=False)
    return tmp_path


@pytest.mark.usefixtures("data_folder")
async def test_only_one_worker_writes(table: HostModels) -> None:
    begun, go_on = asyncio.Event(), asyncio.Event()
    lists: list[str] = []

    async def hold(what: str, row_id: str) -> None:
        if what == "list":
            lists.append(what)
        if what == "insert" and row_id.startswith("f."):
            begun.set()
            await go_on.wait()

    table.hook = hold
    first, second, other = Publisher(), Publisher(), Publisher("g")
    shown = [ONE]
    first.publish(shown, TELL)
    await asyncio.wait_for(begun.wait(), PATIENCE_S)
    second.publish(shown, TELL)
    other.publish(shown, TELL)  # another function's rows are another matter
    for _ in range(50):
        await asyncio.sleep(0)
    go_on.set()
    await published()
    assert len(lists) == 2
    assert names(table) == {"f.acme/one": "Acme: One", "g.acme/one": "Acme: One"}
    second.clock.now += 60
    await second.done(shown)
    assert len(lists) == 3
    assert sorted(table.writes) == [("insert", "f.acme/one"), ("insert", "g.acme/one")]


@pytest.mark.usefixtures("data_folder")
async def test_a_closed_publisher_writes_no_more(table: HostModels) -> None:
    begun = asyncio.Event()

    async def hold(what: str, row_id: str) -> None:
        if what == "insert":
            begun.set()
            await asyncio.Event().wait()

    table.hook = hold
    publisher = Publisher()
    publisher.publish([ONE], TELL)
    await asyncio.wait_for(begun.wait(), PATIENCE_S)
    for _ in range(2):
        await publisher.aclose()
    await published()
    assert table.rows == {}
    table.hook = None
    await Publisher().done([ONE])  # the lock is free again
    assert names(table) == {"f.acme/one": "Acme: One"}


async def test_closing_a_publisher_that_never_wrote() -> None:
    await Publisher().aclose()


async def test_without_a_host_nothing_is_published(table: HostModels) -> None:
    publisher = ModelPublisher(OpenWebUIHost(None), "f", Clock())
    publisher.publish([ONE], TELL)
    await published()
    assert table.rows == {}


SEEN: Final = "Only administrators see these models"


@pytest.mark.parametrize(
    ("choices", "times"),
    [
        ([TELL, PublishChoice("all"), TELL], 1),
        ([PublishChoice("off"), TELL], 1),
        ([PublishChoice("off", "everyone")], 1),
        ([OPEN], 0),
        ([OPEN, TELL, OPEN, TELL], 1),
    ],
    ids=str,
)
async def test_who_sees_the_models_is_logged_once(
    choices: list[PublishChoice], times: int, table: HostModels, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    publisher = Publisher()
    for choice in choices:
        await publisher.done([ONE], choice)
    assert caplog.text.count(SEEN) == times


# Through the pipe


async def test_the_menu_is_published(table: HostModels, simulator: Simulator) -> None:
    async with running_pipe(simulator.base_url) as pipe:
        for _ in range(2):
            await pipe.pipes()
            await published()
        assert {row["name"] for row in table.rows.values()} == {*MENU.values()}
        assert len(table.writes) == len(MENU)
        written = {row_id: row["meta"]["capabilities"] for row_id, row in table.rows.items()}
        (blind,) = (on for row_id, on in written.items() if row_id.endswith("llama-3.3-70b-instruct"))
        assert blind == {"usage": True, "vision": False}

        set_valves(pipe, simulator.base_url, SYNC_MODEL_METADATA="all", NEW_MODEL_ACCESS="everyone")
        await pipe.pipes()
        await published()
        assert all(row["meta"]["description"] for row in table.rows.values())
        assert all(row["access_grants"] for row in table.rows.values())

        set_valves(pipe, simulator.base_url, MODEL_ID="openai/gpt-5-mini")
        await pipe.pipes()
        await published()
        assert [row_id.rpartition("/")[2] for row_id in table.rows] == ["gpt-5-mini"]

        set_valves(pipe, simulator.base_url, SYNC_MODEL_METADATA="off")
        await pipe.pipes()
        await published()
        assert table.rows == {}


async def test_a_list_that_failed_changes_no_row(table: HostModels, simulator: Simulator) -> None:
    async with running_pipe(simulator.base_url) as pipe:
        await pipe.pipes()
        await published()
        before = json.dumps(table.rows)
        for broken in ({"API_KEY": ""}, {"MODEL_ID": "nobody/*"}):
            set_valves(pipe, simulator.base_url, **broken)
            await pipe.pipes()
            await published()
            assert json.dumps(table.rows) == before
