"""The command line as a person uses it: a process, what it prints, how it ends."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any, Final

import pytest

from openrouter_responses_pipe.simulator import CATALOG, Simulator
from tests.support import MENU, free_port

ROOT: Final = Path(__file__).parents[1]
LISTED: Final = [
    row["id"] for row in CATALOG if {"text", "image"} & set(row["architecture"]["output_modalities"])
]
BY_ID: Final[dict[str, dict[str, Any]]] = {row["id"]: row for row in CATALOG}
FREE: Final = [
    model_id for model_id in LISTED if BY_ID[model_id]["pricing"]["completion"] == "0" and model_id in MENU
]
SEEING: Final = [
    model_id for model_id in LISTED if "image" in BY_ID[model_id]["architecture"]["input_modalities"]
]


async def models(base_url: str, *options: str) -> tuple[int, str, str]:
    """(exit status, what was printed, what was said of errors) of `models`."""
    command = (sys.executable, "-m", "openrouter_responses_pipe", "models", "--base-url", base_url, *options)
    environment = {name: value for name, value in os.environ.items() if name != "OPENROUTER_API_KEY"}
    process = await asyncio.create_subprocess_exec(
        *command,
        cwd=ROOT,
        env=environment,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate()
    return process.returncode or 0, out.decode(), err.decode()


def listed(table: str) -> list[str]:
    """The ids of a printed table."""
    return [line.split()[0] for line in table.splitlines()[1:-1]]


async def test_all_models_by_name_in_a_table(simulator: Simulator) -> None:
    status, out, err = await models(simulator.base_url)
    assert (status, err) == (0, "")
    names = [BY_ID[model_id]["name"].lower() for model_id in listed(out)]
    assert names == sorted(names)
    assert sorted(listed(out)) == sorted(LISTED)
    assert out.splitlines()[-1].startswith(f"{len(LISTED)} models")
    row = next(line for line in out.splitlines() if line.startswith("openai/gpt-5-mini "))
    assert row.split()[1:5] == ["200K", "$0.25", "/", "$2"]
    assert {"tools", "reasoning", "vision"} <= set(row.split())


@pytest.mark.parametrize(("option", "ids"), [("--free", FREE), ("--vision", SEEING)])
async def test_only_some_models(option: str, ids: list[str], simulator: Simulator) -> None:
    assert ids
    _, out, _ = await models(simulator.base_url, option)
    assert sorted(listed(out)) == sorted(ids)


async def test_the_cheapest_first_and_the_unknown_last(simulator: Simulator) -> None:
    _, out, _ = await models(simulator.base_url, "--sort", "price", "--tools")
    prices = [float(BY_ID[model_id]["pricing"]["completion"]) for model_id in listed(out)]
    known = [price for price in prices if price >= 0]
    assert known == sorted(known)
    assert prices[: len(known)] == known


async def test_all_that_is_known_as_json(simulator: Simulator) -> None:
    _, out, _ = await models(simulator.base_url, "--json", "--free")
    entries = json.loads(out)
    assert sorted(entry["id"] for entry in entries) == sorted(FREE)
    assert all(entry["prices"]["completion"] == 0 and "tools" in entry["can"] for entry in entries)


async def test_no_key_is_sent_unless_there_is_one(simulator: Simulator) -> None:
    await models(simulator.base_url)
    await models(simulator.base_url, "--key", "sk-or-v1-mine")
    keys = [record.headers.get("authorization") for record in simulator.requests]
    assert keys[0] is None
    assert keys[-1] != keys[0]


async def test_a_catalog_that_cannot_be_had_is_one_sentence() -> None:
    status, out, err = await models(f"http://127.0.0.1:{free_port()}/api/v1")
    assert (status, out) == (1, "")
    assert err.startswith("OpenRouter could not be reached.")
    assert len(err.splitlines()) == 1
