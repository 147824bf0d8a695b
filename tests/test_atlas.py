"""The valve atlas is what its generator writes, and the generator leaves nothing out."""

from __future__ import annotations

import re

import pytest

from openrouter_responses_pipe.openrouter_responses_pipe import UserValves, Valves, _resolve_valves
from tests.valves_atlas import BEGIN, CONDITIONS, END, PAGE, render, tables


def _names(text: str) -> list[str]:
    return re.findall(r"^\| `([A-Z0-9_]+)` \|", text, flags=re.MULTILINE)


def test_the_page_is_what_the_generator_writes() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert page == render(page), "run `python -m tests.valves_atlas`"


def test_every_valve_has_one_row_in_the_order_of_its_form() -> None:
    admin, _, users = tables().partition("## What each user may set")
    assert _names(admin) == list(Valves.model_fields)
    assert _names(users) == list(UserValves.model_fields)


def test_every_row_is_complete() -> None:
    for line in tables().splitlines():
        if line.startswith("| `"):
            cells = [cell.strip() for cell in line.strip("|").split(" | ")]
            assert cells[1], line
            assert cells[2], line
            assert cells[-1].endswith("."), f"{line}: a description is a sentence"


def test_the_condition_for_a_key_of_ones_own_is_true() -> None:
    assert list(CONDITIONS) == ["API_KEY"]
    mine = UserValves.model_validate({"API_KEY": "mine"})
    for allowed, used in ((False, False), (True, True)):
        valves = Valves.model_validate({"API_KEY": "ours", "ALLOW_USER_API_KEYS": allowed})
        assert (_resolve_valves(valves, mine).API_KEY == mine.API_KEY) is used


@pytest.mark.parametrize(
    "page", ["", BEGIN, f"{END} {BEGIN}", f"{BEGIN} {END} {END}", f"{BEGIN} {BEGIN} {END}"]
)
def test_a_page_without_its_markers_is_refused(page: str) -> None:
    with pytest.raises(ValueError, match="markers"):
        render(page)
