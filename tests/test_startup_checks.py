"""Whether OpenRouter can be reached and takes the key, asked in the background; a chat is refused only late.

Refused is who meets what the check has met, after it has been asked once more.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from typing import Any, Final

import pytest

from openrouter_responses_pipe.simulator import Simulator
from tests import engines
from tests.people import Asked, People
from tests.support import SOON_S, inferences, running_pipe, set_valves

CHECKS: Final[dict[str, Any]] = {"ENABLE_STARTUP_CHECKS": True}
FINE: Final = "[[plain text=fine]]"
UNAVAILABLE: Final = "Service unavailable due to startup issues"
LONG_S: Final = 20.0  # within ten seconds it is not asked again


@pytest.fixture
async def people(simulator: Simulator, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[People]:
    """People before a pipe that has not been used yet."""
    monkeypatch.setenv("WEBUI_SECRET_KEY", "the secret of this server")
    async with running_pipe(simulator.base_url, **CHECKS) as pipe, People.of(pipe) as people:
        yield people


def keys_asked(simulator: Simulator) -> int:
    """How often it was asked whether the key is good."""
    return sum(record.path.endswith("/key") for record in simulator.requests)


async def until_refused(people: People, **given: Any) -> Asked:
    """Ask until the check has failed too."""
    async with asyncio.timeout(LONG_S):
        while True:
            asked = people.ask(FINE, **given)
            if (await asked.end()).error.startswith(UNAVAILABLE):
                return asked


async def test_the_first_use_asks_once(people: People, simulator: Simulator) -> None:
    answers = [people.ask(FINE) for _ in range(10)]
    assert [(await one.end()).text for one in answers] == ["fine"] * 10
    await simulator.wait_until(lambda sim: keys_asked(sim) == 1)
    await simulator.wait_until(lambda sim: any(record.query == {"limit": "1"} for record in sim.requests))
    probes = [record for record in simulator.requests if record.query == {"limit": "1"}]
    assert [(record.path, record.key) for record in probes] == [("/api/v1/models", "")]


async def test_switched_off_nothing_is_asked(people: People, simulator: Simulator) -> None:
    set_valves(people.pipe, simulator.base_url, ENABLE_STARTUP_CHECKS=False)
    assert (await people.ask("[[drip rate=20 tokens=20]]").end()).text  # takes longer than a check would wait
    assert keys_asked(simulator) == 0


async def test_a_check_that_hangs_holds_up_no_chat(people: People, simulator: Simulator) -> None:
    simulator.next("stall_headers", on="/key", times=math.inf)
    assert (await people.ask(FINE).end(SOON_S)).text == "fine"


@pytest.mark.parametrize("name", ["429_upstream", "500_masked", "502_html", "503_no_provider"])
async def test_what_passes_by_locks_nobody_out(name: str, people: People, simulator: Simulator) -> None:
    simulator.next("http_error", name=name, on="/key", times=math.inf)
    for _ in range(3):
        assert (await people.ask(FINE).end()).text == "fine"
    await simulator.wait_until(lambda sim: keys_asked(sim) >= 1)
    assert (await people.ask(FINE).end()).text == "fine"


async def test_a_proxy_that_knows_no_keys_is_no_failure(people: People, simulator: Simulator) -> None:
    simulator.next("http_error", name="404_no_providers", on="/key", times=math.inf)
    await people.pipe.pipes()
    await simulator.wait_until(lambda sim: keys_asked(sim) >= 1)
    assert (await people.ask(FINE).end()).text == "fine"


async def test_a_key_that_is_not_accepted(people: People, simulator: Simulator) -> None:
    set_valves(people.pipe, simulator.base_url, API_KEY="sk-bad-key", **CHECKS)
    asked = await until_refused(people)
    sent = len(inferences(simulator))
    assert "did not accept the API key" in asked.answer.error
    assert "sk-bad" not in asked.answer.error
    again = [people.ask(FINE) for _ in range(10)]
    assert all([(await one.end()).error.startswith(UNAVAILABLE) for one in again])
    assert len(inferences(simulator)) == sent
    set_valves(people.pipe, simulator.base_url, **CHECKS)
    async with asyncio.timeout(LONG_S):
        while (await people.ask(FINE).end()).text != "fine":
            pass


async def test_a_key_of_ones_own_is_not_that_of_the_administrator(
    people: People, simulator: Simulator
) -> None:
    set_valves(people.pipe, simulator.base_url, API_KEY="sk-bad-key", ALLOW_USER_API_KEYS=True, **CHECKS)
    await until_refused(people)
    valves = people.pipe.UserValves.model_validate({"API_KEY": "sk-or-v1-my-own"})
    person = {"id": "bob", "name": "bob", "email": "b@example.org", "role": "user", "valves": valves}
    assert (await people.ask(FINE, __user__=person).end()).text == "fine"


async def test_it_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEBUI_SECRET_KEY", "the secret of this server")
    port = engines.steady_port()
    async with running_pipe(f"http://127.0.0.1:{port}/api/v1", **CHECKS) as pipe, People.of(pipe) as people:
        asked = await until_refused(people)
        assert "could not be reached" in asked.answer.error
        async with Simulator(port=port), asyncio.timeout(LONG_S):
            while (await people.ask(FINE).end()).text != "fine":
                pass
