"""What Open WebUI's own settings say of our models: written by the pipe, edited by people, taken back."""

from __future__ import annotations

import copy
import re
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any, Final

import pytest
from playwright.async_api import expect

from openrouter_responses_pipe.simulator import CATALOG, synthetic_catalog
from openrouter_responses_pipe.webui import FUNCTION_ID, PIPE_FILE, READ_BY_EVERYONE, WebUIClient
from tests.e2e.driver import Tab, error_text, unique, until
from tests.e2e.host import KEY, MODEL, Host
from tests.e2e.page import ChatPage
from tests.e2e.upstream import Upstream

Json = dict[str, Any]
Rows = dict[str, Json]

LLAMA: Final = f"{FUNCTION_ID}.meta-llama/llama-3.3-70b-instruct"  # does not see
DRAWER: Final = f"{FUNCTION_ID}.google/gemini-2.5-flash-image"  # takes no tools
DEEPSEEK: Final = f"{FUNCTION_ID}.deepseek/deepseek-r1-0528"
FLASH: Final = f"{FUNCTION_ID}.google/gemini-2.5-flash"
NAMES: Final = {f"{FUNCTION_ID}.{row['id']}": row["name"] for row in CATALOG}
TOOLS: Final = ("builtin_tools", "web_search", "image_generation", "code_interpreter", "terminal")
DESCRIPTION: Final = "Add a short description"
WRITTEN: Final = "have been brought up to date"
LOOKED: Final = "Only administrators see these models"
PATIENCE_S: Final = 90.0  # what failed is tried again after a minute
AS_INSTALLED: Final = {
    "API_KEY": KEY,
    **dict.fromkeys(
        ("SYNC_MODEL_METADATA", "NEW_MODEL_ACCESS", "MODEL_NAME_FORMAT", "MODEL_SORT", "ACCOUNT_MODELS_ONLY")
    ),
}


def ours(rows: Mapping[str, Json], function_id: str = FUNCTION_ID) -> Rows:
    """The rows of this function's models."""
    return {row_id: row for row_id, row in rows.items() if row_id.startswith(f"{function_id}.")}


def content(row: Mapping[str, Any]) -> Json:
    """A whole row but for what counts its versions."""
    grants = [
        {name: grant[name] for name in ("principal_type", "principal_id", "permission")}
        for grant in row["access_grants"]
    ]
    counters = ("version_id", "updated_at", "access_grants")
    return {**{name: value for name, value in row.items() if name not in counters}, "grants": grants}


def can(row: Mapping[str, Any]) -> Json:
    """The capabilities that a row names."""
    return row["meta"]["capabilities"] or {}


async def publish(host: Host, **valves: Any) -> Rows:
    """Set valves that change rows, wait until they are written, and return all rows."""
    before = host.log.count(WRITTEN)
    host.admin.set_valves(valves)

    def written() -> bool:
        host.admin.models(refresh=True)
        return host.log.count(WRITTEN) > before

    await until(written, f"rows written after {valves}", PATIENCE_S)
    return host.admin.model_rows()


async def settle(host: Host, holds: Callable[[Rows], bool], what: str) -> Rows:
    """Ask for the models until the rows are as they shall be; return all rows."""

    def look() -> Rows | None:
        host.admin.models(refresh=True)
        rows = host.admin.model_rows()
        return rows if holds(rows) else None

    await until(look, what, PATIENCE_S)
    host.admin.models(refresh=True)  # by now the last write has been logged too, and is not mistaken later
    return host.admin.model_rows()


def serve(upstream: Upstream, catalog: list[Json] | None) -> Json:
    """Let the simulator serve another list; return the valves that fetch it without waiting an hour.

    The list of an account is asked for once more with each key.
    """
    simulator = WebUIClient(upstream.base_url.removesuffix("/api/v1"))
    simulator.request("POST", "/_control/settings", {"catalog": catalog})
    return {"ACCOUNT_MODELS_ONLY": True, "API_KEY": f"sk-or-v1-{uuid.uuid4().hex}"}


def priced(catalog: list[Json], completion: str) -> list[Json]:
    """The catalog with another price for what every model writes."""
    rows = copy.deepcopy(catalog)
    for row in rows:
        row["pricing"]["completion"] = completion
    return rows


@pytest.fixture(autouse=True)
async def as_found(host: Host, upstream: Upstream) -> AsyncIterator[None]:
    """Leave valves, catalog and rows as they were for whoever comes next."""
    await settle(host, is_complete, "rows before the test")
    yield
    upstream.reset()
    host.admin.set_valves({**AS_INSTALLED, "SYNC_MODEL_METADATA": "off"})
    await settle(host, lambda rows: not any(map(is_marked, ours(rows).values())), "rows taken back")
    for row_id in ours(host.admin.model_rows()):
        if row_id != MODEL:
            host.admin.delete_model(row_id)
    host.admin.open_to_everyone(MODEL, "GPT-5 Mini")
    host.admin.set_valves(AS_INSTALLED)
    await settle(host, is_complete, "rows after the test")


def menu() -> list[str]:
    """The ids of the models that the simulator's own catalog puts into the menu."""
    return [
        f"{FUNCTION_ID}.{row['id']}" for row in CATALOG if "text" in row["architecture"]["output_modalities"]
    ]


def is_marked(row: Mapping[str, Any]) -> bool:
    """Whether the pipe has written into this row."""
    return "openrouter_responses_pipe" in row["meta"]


def is_complete(rows: Rows, function_id: str = FUNCTION_ID) -> bool:
    """Whether each model of the menu has a row, and the pipe has written into each."""
    found = ours(rows, function_id).values()
    return len(found) == len(menu()) and all(map(is_marked, found))


# Who sees what


async def test_only_granted_models_are_seen(host: Host) -> None:
    def seen() -> set[str]:
        return {model["id"] for model in host.user.models()}

    assert seen() == {MODEL}
    # An administrator's private row, from before the pipe wrote any:
    await publish(host, SYNC_MODEL_METADATA="off")
    host.admin.create_model({"id": LLAMA, "name": "Ours alone", "access_grants": []})
    await publish(host, SYNC_MODEL_METADATA="capabilities")
    assert seen() == {MODEL}

    await publish(host, NEW_MODEL_ACCESS="everyone")
    assert seen() == {*menu()} - {LLAMA}
    # and one that is made private now
    host.admin.set_access(DEEPSEEK, [])
    await publish(host, SYNC_MODEL_METADATA="all")
    assert seen() == {*menu()} - {LLAMA, DEEPSEEK}

    rows = await publish(host, NEW_MODEL_ACCESS="admins", SYNC_MODEL_METADATA="capabilities")
    assert seen() == {MODEL}
    assert rows[LLAMA]["name"] == "Ours alone"
    assert {model["id"] for model in host.admin.models()} >= {*menu()}


async def test_a_granted_model_answers_a_user(host: Host, user_tab: Tab) -> None:
    await publish(host, NEW_MODEL_ACCESS="everyone")
    message = await (await user_tab.ask("Hello", LLAMA)).done()
    assert (error_text(message), message["content"][:6]) == ("", "Hello!")


# What a model can do


async def test_what_a_model_cannot_do_is_off(host: Host) -> None:
    rows = host.admin.model_rows()
    assert can(rows[LLAMA]) == {"usage": True, "vision": False}
    assert can(rows[DRAWER]) == {"usage": True, **dict.fromkeys(TOOLS, False)}
    assert can(rows[FLASH]) == {"usage": True}
    assert all(rows[row_id]["name"] == NAMES[row_id] for row_id in (LLAMA, DRAWER, FLASH))
    assert not rows[FLASH]["meta"]["description"]


@pytest.mark.parametrize(
    ("model", "on", "off"),
    [
        (LLAMA, ("File Upload", "Usage", "Builtin Tools", "Code Interpreter"), ("Vision",)),
        (DRAWER, ("Vision", "File Upload", "Usage"), ("Builtin Tools", "Code Interpreter")),
    ],
    ids=["blind", "without tools"],
)
async def test_the_editor_shows_what_a_model_can(
    model: str, on: tuple[str, ...], off: tuple[str, ...], host: Host, folder: Path
) -> None:
    async with ChatPage.open(host.admin, folder / "screenshots") as chat:
        await chat.new_chat(MODEL)
        editor = await chat.open_model_editor(NAMES[model])
        for names, state in ((on, "true"), (off, "false")):
            for name in names:
                switch = editor.get_by_role("switch", name=name)
                await expect(switch).to_have_attribute("aria-checked", state)
        await chat.screenshot(f"capabilities-{model.rpartition('/')[2]}")


# Edits


async def test_edits_in_the_page_stay(host: Host, upstream: Upstream, folder: Path) -> None:
    """What an administrator changed stays through every refresh; all else goes on following the catalog."""
    await publish(host, SYNC_MODEL_METADATA="all")
    async with ChatPage.open(host.admin, folder / "screenshots") as chat:
        await chat.new_chat(MODEL)
        editor = await chat.open_model_editor(NAMES[LLAMA])
        await editor.get_by_role("switch", name="Vision").click()
        words = editor.get_by_placeholder(DESCRIPTION)
        await expect(words).to_have_value(re.compile("^131K context"))
        await words.fill("The one we like best.")
        await expect(editor.get_by_role("switch", name="Vision")).to_have_attribute("aria-checked", "true")
        await chat.screenshot("edited")
        await chat.save_model(editor)
    edited = host.admin.model_rows()[LLAMA]
    assert can(edited)["vision"] is True
    assert edited["meta"]["description"] == "The one we like best."

    catalog = [dict(row) for row in CATALOG]
    for number, sort in ((3, "newest"), (4, "price"), (5, "name")):
        renewed = priced(catalog, f"0.00000{number}")
        rename = next(row for row in renewed if LLAMA.endswith(row["id"]))
        rename["name"] = f"Meta: Llama, edition {number}"
        rows = await publish(host, **serve(upstream, renewed), MODEL_SORT=sort)
        row = rows[LLAMA]
        assert can(row) == can(edited)
        assert row["meta"]["description"] == "The one we like best."
        assert row["name"] == rename["name"]
        assert f"/ ${number} per million" in rows[DEEPSEEK]["meta"]["description"]
        assert row["meta"]["tags"] == edited["meta"]["tags"]

    async with ChatPage.open(host.admin, folder / "screenshots") as chat:
        await chat.new_chat(MODEL)
        editor = await chat.open_model_editor("Meta: Llama, edition 5")
        await expect(editor.get_by_placeholder(DESCRIPTION)).to_have_value("The one we like best.")
        await expect(editor.get_by_role("switch", name="Vision")).to_have_attribute("aria-checked", "true")
        await chat.screenshot("edited-after-refreshes")


async def test_off_takes_everything_back(host: Host) -> None:
    await publish(host, SYNC_MODEL_METADATA="off")
    host.admin.create_model(
        {
            "id": FLASH,
            "name": "Flash, our choice",
            "meta": {"description": "Ours.", "capabilities": {"citations": False}, "knowledge": None},
            "params": {"temperature": 0.5, "system": "Be brief."},
            "access_grants": [READ_BY_EVERYONE],
        }
    )
    before = host.admin.model_rows()
    assert {*ours(before)} - {MODEL} == {FLASH}

    rows = await publish(host, SYNC_MODEL_METADATA="all")
    assert {*ours(rows)} == {*menu()}
    assert (rows[FLASH]["name"], rows[FLASH]["params"]) == (before[FLASH]["name"], before[FLASH]["params"])
    assert rows[FLASH]["meta"]["description"] == "Ours."
    assert can(rows[FLASH]) == {"citations": False, "usage": True}
    assert rows[FLASH]["meta"]["tags"][0] == {"name": "Google"}
    host.admin.update_model({**rows[LLAMA], "meta": {**rows[LLAMA]["meta"], "description": "Edited."}})

    rows = await publish(host, SYNC_MODEL_METADATA="off")
    assert {*ours(rows)} - {MODEL} == {FLASH, LLAMA}
    assert content(rows[FLASH]) == content(before[FLASH])
    assert content(rows[MODEL]) == content(before[MODEL])
    left = {name: value for name, value in rows[LLAMA]["meta"].items() if value}
    assert left == {"description": "Edited."}


# Functions


async def test_two_functions_do_not_touch_each_other(host: Host, upstream: Upstream) -> None:
    source = PIPE_FILE.read_text(encoding="utf-8")
    host.admin.install_function(source, "second", "Second")
    try:
        valves = {"API_KEY": "sk-or-v1-second", "BASE_URL": upstream.base_url, "SYNC_MODEL_METADATA": "all"}
        host.admin.set_valves(valves, "second")

        def is_described(rows: Rows) -> bool:  # without a description there may be rows of an earlier test
            found = ours(rows, "second").values()
            return is_complete(rows, "second") and all(row["meta"]["description"] for row in found)

        rows = await settle(host, is_described, "rows of the second function")
        second = {row_id: content(row) for row_id, row in ours(rows, "second").items()}
        assert not rows[FLASH]["meta"]["description"]

        rows = await settle_off(host, FUNCTION_ID)
        assert {row_id: content(row) for row_id, row in ours(rows, "second").items()} == second

        host.admin.set_valves({"SYNC_MODEL_METADATA": "capabilities"})
        rows = await settle(host, is_complete, "rows of the first function")
        first = {row_id: content(row) for row_id, row in ours(rows).items()}
        rows = await settle_off(host, "second")
        assert ours(rows, "second") == {}
        assert {row_id: content(row) for row_id, row in ours(rows).items()} == first
    finally:
        await settle_off(host, "second")
        host.admin.request("DELETE", "/api/v1/functions/id/second/delete")


async def settle_off(host: Host, function_id: str) -> Rows:
    """Switch the sync of one function off, and wait until its rows are gone."""
    host.admin.set_valves({"SYNC_MODEL_METADATA": "off"}, function_id)
    return await settle(host, lambda rows: {*ours(rows, function_id)} <= {MODEL}, f"no rows of {function_id}")


async def test_saving_the_function_again_writes_nothing(host: Host) -> None:
    def versions() -> dict[str, tuple[str, int]]:
        return {key: (row["version_id"], row["updated_at"]) for key, row in host.admin.model_rows().items()}

    source = PIPE_FILE.read_text(encoding="utf-8")
    before, looked = versions(), host.log.count(LOOKED)
    time_of_rows = max(updated_at for _, updated_at in before.values())
    await until(lambda: time.time() > time_of_rows + 1, "another second")
    host.admin.install_function(f"{source}\n# saved again\n")
    try:

        def compared() -> bool:
            host.admin.models(refresh=True)
            return host.log.count(LOOKED) > looked

        await until(compared, "the rows have been looked at by the new code", PATIENCE_S)
        assert versions() == before
    finally:
        host.admin.install_function(source)


# The menu and the chat


async def test_the_menu_in_the_page(host: Host, folder: Path) -> None:
    await publish(host, SYNC_MODEL_METADATA="all", MODEL_NAME_FORMAT="{name} · {price}")
    async with ChatPage.open(host.admin, folder / "screenshots") as chat:
        await chat.new_chat(MODEL)
        entries = await chat.open_model_menu()
        await expect(entries.filter(has_text="Meta: Llama 3.3 70B Instruct · $0.10 / $0.32")).to_be_visible()
        await expect(entries.filter(has_text="OpenAI: gpt-oss-20b (free) · free")).to_be_attached()
        await chat.screenshot("model-menu")
        assert await entries.count() == len(menu())
        for entry in await entries.all():
            icon = entry.locator("img").first
            await icon.scroll_into_view_if_needed()
            handle = await icon.element_handle()
            await chat.page.wait_for_function("icon => icon.complete && icon.naturalWidth == 64", arg=handle)
        entry = entries.filter(has_text="Auto Router")
        await entry.locator('[id^="model-description-"] + *').hover()
        tooltip = chat.page.locator(".tippy-box").filter(has_text="2M context")
        await expect(tooltip).to_contain_text("as the simulator plays it")
        await expect(tooltip).to_have_css("opacity", "1")
        await chat.screenshot("model-menu-tooltip")


async def test_the_icons_are_pictures_of_ours(host: Host) -> None:
    rows = await publish(host, SYNC_MODEL_METADATA="all")
    icons = {row_id: rows[row_id]["meta"]["profile_image_url"] for row_id in menu()}
    assert all(icon.startswith("data:image/png;base64,") for icon in icons.values())
    assert icons[DRAWER] == icons[FLASH]
    assert len({*icons.values()}) == len(
        {row_id.partition(".")[2].partition("/")[0].lstrip("~") for row_id in icons}
    )


async def test_models_that_make_only_pictures_are_not_there(host: Host) -> None:
    painter = f"{FUNCTION_ID}.black-forest-labs/flux.2-pro"
    assert painter not in {model["id"] for model in host.admin.models(refresh=True)}
    assert painter not in host.admin.model_rows()


async def test_a_workspace_model_on_one_of_ours(host: Host, tab: Tab, upstream: Upstream) -> None:
    host.admin.create_model(
        {"id": "our-helper", "base_model_id": LLAMA, "name": "Our helper", "params": {"system": "Be kind."}}
    )
    try:
        host.admin.models(refresh=True)
        question, word = unique("Who are you?")
        message = await (await tab.ask(question, "our-helper")).done()
        assert not error_text(message)
        assert "Llama 3.3 70B Instruct" in message["content"]
        body = upstream.last(word)["body"]
        assert body["model"] == LLAMA.partition(".")[2]
        assert "Be kind." in str(body["instructions"])
    finally:
        host.admin.delete_model("our-helper")


# Size


async def test_a_thousand_models(host: Host, tab: Tab, upstream: Upstream) -> None:
    """All of them are published, and who chats meanwhile is answered."""
    catalog = synthetic_catalog(1000)
    wanted = {
        f"{FUNCTION_ID}.{row['id']}" for row in catalog if "text" in row["architecture"]["output_modalities"]
    }
    valves = serve(upstream, catalog) | {"SYNC_MODEL_METADATA": "all"}
    before = host.log.count(WRITTEN)
    host.admin.set_valves(valves)
    await until(lambda: len(host.admin.models(refresh=True)) >= len(wanted), "the long menu")
    started, longest, chats = time.monotonic(), 0.0, 0
    while host.log.count(WRITTEN) == before:
        asked = time.monotonic()
        message = await (await tab.ask("Hello in the meantime", MODEL)).done()
        assert not error_text(message)
        longest, chats = max(longest, time.monotonic() - asked), chats + 1
        assert time.monotonic() - started < 60
    print(f"{len(wanted)} rows in {time.monotonic() - started:.1f} s, {chats} chats of up to {longest:.2f} s")
    assert chats
    rows = ours(host.admin.model_rows())
    assert {*rows} == wanted
    assert all(row["meta"]["profile_image_url"] for row in rows.values())
