"""Who may start, who waits, and who is sent away: order, fairness, limits, and what each person is told.

Places are taken by answers that do not end until somebody presses Stop; that somebody waits is known from
the status that says so. What it costs, and how soon a refusal comes, is measured by `make bench`.
"""

from __future__ import annotations

import asyncio
import gc
import math
import re
from collections.abc import AsyncIterator
from typing import Any, Final

import anyio
import pytest

from openrouter_responses_pipe.openrouter_responses_pipe import Pipe
from openrouter_responses_pipe.simulator import Simulator
from tests.people import BUSY, HELD, Asked, People, place_in, prompts
from tests.support import (
    DIALECTS,
    MODEL,
    PATIENCE_S,
    SOON_S,
    Answer,
    inferences,
    read_rest,
    read_until_text,
    running_pipe,
    set_valves,
    stream,
)
from tests.tools import Crowd, entry, named, offered

Json = dict[str, Any]
QUEUE: Final = 500
CHATS: Final = ["browser", "browser_json", "api_stream", "api_json"]
LONG_S: Final = 60.0  # for what hundreds of answers take on a busy machine


@pytest.fixture
async def people(simulator: Simulator, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[People]:
    """People in front of a pipe that answers one chat at a time, and one task."""
    monkeypatch.setenv("WEBUI_SECRET_KEY", "the secret of this server")
    async with running_pipe(simulator.base_url) as pipe, People.of(pipe) as people:
        limit(people, simulator, MAX_CONCURRENT_REQUESTS=1, MAX_CONCURRENT_TASKS=1)
        yield people


def limit(people: People, simulator: Simulator, **valves: Any) -> None:
    """Save the valves anew, as an administrator does."""
    set_valves(people.pipe, simulator.base_url, **valves)


def say(text: object) -> str:
    """A question that is answered with `text`."""
    return f"[[plain text={text}]]"


async def queue(people: People, *names: str, **more: Any) -> list[Asked]:
    """Have people wait who are named by their letter and a number: `a1` is asked by `a`."""
    asked = [people.ask(say(name), user=name[0], **more) for name in names]
    for one in asked:
        await one.until_waits()
    return asked


def begun(simulator: Simulator) -> list[str]:
    """The texts that were asked for, in the order in which their requests were let in."""
    return [re.sub(r"^\[\[plain text=(.*)\]\]$", r"\1", prompt) for prompt in prompts(simulator)]


async def answers_of(asked: list[Asked], limit_s: float = PATIENCE_S) -> list[str]:
    """The texts that these people have got, who all were answered well."""
    answers = [await one.end(limit_s) for one in asked]
    assert [answer.error for answer in answers] == [""] * len(asked)
    return [answer.text for answer in answers]


# Order


async def test_who_comes_first_is_let_in_first(people: People, simulator: Simulator) -> None:
    (holder,) = await people.hold(simulator)
    names = ["a1", "a2", "a3", "a4"]
    waiting = await queue(people, *names)
    assert begun(simulator) == [HELD]
    await holder.stop()
    assert await answers_of(waiting) == names
    assert begun(simulator) == [HELD, *names]


async def test_people_take_turns(people: People, simulator: Simulator) -> None:
    """However many requests one of them has."""
    (holder,) = await people.hold(simulator)
    waiting = await queue(people, "a1", "a2", "a3", "a4", "b1", "b2", "c1")
    await holder.stop()
    await answers_of(waiting)
    assert begun(simulator) == [HELD, "a1", "b1", "c1", "a2", "b2", "a3", "a4"]


async def test_who_comes_later_does_not_wait_for_all_of_somebody_else(
    people: People, simulator: Simulator
) -> None:
    (holder,) = await people.hold(simulator)
    waiting = await queue(people, "a1", "a2")
    second = people.ask(HELD, user="a")
    waiting += await queue(people, *(f"a{number}" for number in range(4, 10)))
    await holder.stop()
    await simulator.wait_until(lambda sim: prompts(sim)[-1] == HELD and len(prompts(sim)) == 4)
    waiting += await queue(people, "b1")
    assert waiting[-1].told.places()[0] <= 1
    await second.stop()
    await answers_of(waiting)
    assert "b1" in begun(simulator)[4:6]


async def test_nobody_waits_while_there_is_a_place(people: People, simulator: Simulator) -> None:
    limit(people, simulator, MAX_CONCURRENT_REQUESTS=3)
    await people.hold(simulator, 2)
    last = people.ask(say("fine"))
    assert await answers_of([last]) == ["fine"]
    assert last.told.places() == []


async def test_no_more_run_than_may(people: People, simulator: Simulator) -> None:
    """Seen from inside: each of them calls a tool, which counts who is there."""
    limit(people, simulator, MAX_CONCURRENT_REQUESTS=3)
    crowd = Crowd()

    async def meet() -> str:
        async with crowd:
            await crowd.gate.wait()
            return "met"

    tools = named(meet=entry(meet))
    question: Json = {"messages": [{"role": "user", "content": "[[tool name=meet]]"}]}
    question["tools"] = offered(tools)
    asked = [people.ask(question, user=f"user{number % 4}", __tools__=tools) for number in range(10)]
    await crowd.full(3)
    for one in asked[3:]:
        await one.until_waits()
    assert crowd.seen == 3
    crowd.gate.set()
    answers = [await one.end() for one in asked]
    assert all("met" in answer.text and not answer.error for answer in answers)
    assert (crowd.most, crowd.seen) == (3, 10)


# Ways in which a place becomes free


ENDS: Final = {
    "answered": "[[plain text=x wait=1.4]]",
    "failed": "[[failed wait=1.4]]",
    "cut off": "[[abrupt wait=1.4]]",
}


@pytest.mark.parametrize("how", sorted(ENDS))
async def test_an_answer_that_ends_makes_one_place(how: str, people: People, simulator: Simulator) -> None:
    first = people.ask(ENDS[how], user="holder")
    await simulator.wait_until(lambda sim: len(inferences(sim)) == 1)
    next_one = people.ask(HELD, user="b")
    last = people.ask(say("c1"), user="c")
    assert (await next_one.until_waits(), await last.until_waits()) == (0, 1)
    await first.end()
    await simulator.wait_until(lambda sim: len(inferences(sim)) == 2)
    await last.told.until(lambda told: told.places()[-1] == 0)  # it goes on waiting
    assert begun(simulator)[1:] == [HELD]
    await next_one.stop()
    assert await answers_of([last]) == ["c1"]


@pytest.mark.parametrize("how", ["closed", "collected as garbage", "its client went away"])
async def test_an_answer_that_nobody_reads_any_more_makes_one_place(
    how: str, people: People, simulator: Simulator
) -> None:
    chunks, answer = await stream(people.pipe, HELD), Answer()
    await read_until_text(chunks, answer)
    next_one = people.ask(HELD, user="b")
    last = people.ask(say("c1"), user="c")
    assert (await next_one.until_waits(), await last.until_waits()) == (0, 1)
    if how == "closed":
        await chunks.aclose()
    elif how == "its client went away":
        scope = anyio.CancelScope()
        with scope:
            scope.cancel()
            await read_rest(chunks, answer)
    del chunks
    gc.collect()
    await simulator.wait_until(lambda sim: len(inferences(sim)) == 2)
    await last.told.until(lambda told: told.places()[-1] == 0)
    assert len(inferences(simulator)) == 2
    await next_one.stop()
    assert await answers_of([last]) == ["c1"]


async def test_an_answer_that_nobody_ever_reads_takes_no_place(people: People) -> None:
    kept = [await stream(people.pipe, say("never")) for _ in range(3)]
    assert await answers_of([people.ask(say("fine"))]) == ["fine"]
    for chunks in kept:
        await chunks.aclose()


async def test_the_list_of_models_does_not_wait(people: People, simulator: Simulator) -> None:
    await people.hold(simulator)
    await queue(people, "a1")
    assert MODEL in {row["id"] for row in await asyncio.wait_for(people.pipe.pipes(), SOON_S)}


# Limits that are changed while people wait


async def test_a_higher_limit_counts_from_the_next_request_on(people: People, simulator: Simulator) -> None:
    await people.hold(simulator)
    waiting = [people.ask(HELD, user=name) for name in ("a", "b", "c")]
    for one in waiting:
        await one.until_waits()
    assert len(inferences(simulator)) == 1
    limit(people, simulator, MAX_CONCURRENT_REQUESTS=3)
    last = people.ask(say("d1"), user="d")
    await simulator.wait_until(lambda sim: len(inferences(sim)) == 3)
    assert await last.until_waits() == 1  # behind c
    assert len(inferences(simulator)) == 3


async def test_a_lower_limit_ends_nothing_and_lets_nobody_in(people: People, simulator: Simulator) -> None:
    limit(people, simulator, MAX_CONCURRENT_REQUESTS=3)
    held = await people.hold(simulator, 3)
    limit(people, simulator, MAX_CONCURRENT_REQUESTS=1)
    first, second = people.ask(say("a1"), user="a"), people.ask(say("b1"), user="b")
    await first.until_waits()
    await second.until_waits()
    for one in held[:2]:
        await one.stop()
    third = people.ask(say("c1"), user="c")  # by the time that it is told its place, the others could be in
    assert await third.until_waits() == 2
    assert len(inferences(simulator)) == 3
    assert not held[2].done
    await held[2].stop()
    assert await answers_of([first, second, third]) == ["a1", "b1", "c1"]
    assert begun(simulator)[3:] == ["a1", "b1", "c1"]


async def test_a_limit_that_makes_no_sense_is_clamped(people: People, simulator: Simulator) -> None:
    limit(people, simulator, MAX_CONCURRENT_REQUESTS=0)
    assert people.pipe.valves.MAX_CONCURRENT_REQUESTS == 1
    assert await answers_of([people.ask(say("fine"))]) == ["fine"]


# A limit for each person


async def test_who_has_as_many_as_a_person_may_waits_alone(people: People, simulator: Simulator) -> None:
    limit(people, simulator, MAX_CONCURRENT_REQUESTS=10, MAX_CONCURRENT_REQUESTS_PER_USER=2)
    held = await people.hold(simulator, 2, user="a")
    third = people.ask(say("a3"), user="a")
    await third.until_waits()
    assert await answers_of([people.ask(say(f"{name}1"), user=name) for name in "bcd"]) == ["b1", "c1", "d1"]
    assert not third.done
    await held[0].stop()
    assert await answers_of([third]) == ["a3"]


async def test_who_may_not_yet_does_not_stand_in_the_way(people: People, simulator: Simulator) -> None:
    limit(people, simulator, MAX_CONCURRENT_REQUESTS=2, MAX_CONCURRENT_REQUESTS_PER_USER=1)
    (of_a,) = await people.hold(simulator, user="a")
    (of_b,) = await people.hold(simulator, user="b")
    more_of_a, of_c = await queue(people, "a2", "c1")
    await of_b.stop()
    assert await answers_of([of_c]) == ["c1"]
    assert not more_of_a.done
    await of_a.stop()
    assert await answers_of([more_of_a]) == ["a2"]


async def test_the_limit_of_a_person_counts_from_the_next_request_on(
    people: People, simulator: Simulator
) -> None:
    limit(people, simulator, MAX_CONCURRENT_REQUESTS=10, MAX_CONCURRENT_REQUESTS_PER_USER=1)
    await people.hold(simulator, user="a")
    second = people.ask(say("a2"), user="a")
    await second.until_waits()
    limit(people, simulator, MAX_CONCURRENT_REQUESTS=10, MAX_CONCURRENT_REQUESTS_PER_USER=0)
    third = people.ask(say("a3"), user="a")
    assert await answers_of([second, third]) == ["a2", "a3"]


# When the queue is full


@pytest.mark.parametrize("running", [1, 2])
async def test_what_is_beyond_the_queue_is_refused_at_once(
    running: int, people: People, simulator: Simulator
) -> None:
    limit(people, simulator, MAX_CONCURRENT_REQUESTS=running)
    await people.hold(simulator, running)
    asked = [people.ask(say(number), user="a") for number in range(QUEUE + 8)]
    await people.until_ended(8)
    for one in asked[:QUEUE]:
        await one.until_waits()
    assert [number for number, one in enumerate(asked) if one.done] == [*range(QUEUE, QUEUE + 8)]
    assert all(one.refused and one.answer.text == "" for one in asked[QUEUE:])
    assert len(inferences(simulator)) == running
    assert not any(one.told.places() for one in asked[QUEUE:])


async def test_of_people_with_one_request_each_the_last_are_refused(
    people: People, simulator: Simulator
) -> None:
    await people.hold(simulator)
    asked = [people.ask(say(number), user=f"user{number}") for number in range(QUEUE + 5)]
    await people.until_ended(5)
    assert [number for number, one in enumerate(asked) if one.refused] == [*range(QUEUE, QUEUE + 5)]


async def test_five_thousand_at_once(people: People, simulator: Simulator) -> None:
    """Exactly those that neither run nor find a place in the queue are refused; all others are answered."""
    running, offered_at_once = 200, 5_000
    limit(people, simulator, MAX_CONCURRENT_REQUESTS=running)
    await people.pipe.pipes()
    texts = [HELD if number < running else say(number) for number in range(offered_at_once)]
    asked = [people.ask(text, user=f"user{number % 50}") for number, text in enumerate(texts)]
    beyond = offered_at_once - running - QUEUE
    await people.until_ended(beyond, LONG_S)
    await simulator.wait_until(lambda sim: sum(r.streaming for r in inferences(sim)) == running, LONG_S)
    assert sum(one.refused for one in asked) == beyond == 4_300
    assert people.ended == beyond
    for one in asked[:running]:
        assert one.task is not None
        one.task.cancel()
    rest = [one for one in asked[running:] if not one.refused]
    await answers_of(rest, LONG_S)
    assert len(rest) == QUEUE
    assert sum(one.refused for one in asked) == beyond
    assert len(inferences(simulator)) == running + QUEUE


async def test_a_flood_of_one_person_sends_nobody_else_away(people: People, simulator: Simulator) -> None:
    """The newest of the flood makes room, for as long as it is more than what others have."""
    (holder,) = await people.hold(simulator)
    flood = [people.ask(say(f"a{number}"), user="a") for number in range(QUEUE)]
    for one in flood:
        await one.until_waits()
    late = await queue(people, "b1", "b2", "c1")
    assert [number for number, one in enumerate(flood) if one.done] == [*range(QUEUE - 3, QUEUE)]
    assert all(one.refused for one in flood[-3:])
    more = people.ask(say("a"), user="a")  # who floods displaces nobody
    await people.until_ended(4)
    assert more.refused
    await holder.stop()
    assert await answers_of(late) == ["b1", "b2", "c1"]
    assert begun(simulator)[1:6] == ["a0", "b1", "c1", "a1", "b2"]


async def test_two_floods_share_the_queue(people: People, simulator: Simulator) -> None:
    await people.hold(simulator)
    first = [people.ask(say("a"), user="a") for _ in range(QUEUE)]
    for one in first:
        await one.until_waits()
    second = [people.ask(say("b"), user="b") for _ in range(QUEUE)]
    await people.until_ended(QUEUE)
    half = QUEUE // 2
    assert [one.refused for one in first] == [False] * half + [True] * half
    assert [one.refused for one in second] == [False] * half + [True] * half


async def test_who_makes_room_has_a_status_that_ends(people: People, simulator: Simulator) -> None:
    await people.hold(simulator)
    flood = [people.ask(say("a"), user="a") for _ in range(QUEUE)]
    for one in flood:
        await one.until_waits()
    people.ask(say("b"), user="b")
    await people.until_ended(1)
    assert flood[-1].refused
    assert flood[-1].told.of("status")[-1]["done"]


@pytest.mark.parametrize("dialect", sorted(DIALECTS))
@pytest.mark.parametrize("how", ["at once", "later"])
async def test_every_client_is_told_that_the_server_is_busy(
    how: str, dialect: str, people: People, simulator: Simulator
) -> None:
    """Those who find no place, and those who lose it to somebody else."""
    lane = dialect if DIALECTS[dialect][2] else "browser"
    (holder,) = await people.hold(simulator, dialect=lane)
    flood = [people.ask(say("a"), user="a", dialect=lane) for _ in range(QUEUE - (how == "later"))]
    await _all_have_come(flood if lane == "browser" else [])
    asked = people.ask(say("b"), user="a", dialect=dialect)
    await _all_have_come(flood if lane == "browser" else [])
    if how == "later":
        assert not asked.done
        people.ask(say("c"), user="c", dialect=lane)
    answer = await asked.end(SOON_S)
    assert answer.text == ""
    assert answer.error.startswith(BUSY)
    assert len(answer.error) < 120
    assert people.ended == 1
    assert not holder.done
    assert not any(one.done for one in flood)
    assert len(inferences(simulator)) == 1


async def _all_have_come(flood: list[Asked]) -> None:
    """See to it that who has asked stands in the queue: who is not told so takes but a few steps to it."""
    for one in flood:
        await one.told.until(lambda told, one=one: told.places() or one.done)
    for _ in range(50):
        await asyncio.sleep(0)


# Tasks


@pytest.mark.parametrize("task", ["task", "task_stream"])
async def test_tasks_do_not_wait_for_chats(task: str, people: People, simulator: Simulator) -> None:
    await people.hold(simulator)
    await queue(people, "a1")
    assert await answers_of([people.ask(say("title"), user="a", dialect=task)]) == ["title"]


@pytest.mark.parametrize("task", ["task", "task_stream"])
async def test_chats_do_not_wait_for_tasks(task: str, people: People, simulator: Simulator) -> None:
    await people.hold(simulator, dialect=task)
    waiting = people.ask(say("title"), dialect=task)
    assert await answers_of([people.ask(say("fine"))]) == ["fine"]
    assert not waiting.done


async def test_only_so_many_tasks_run_at_once(people: People, simulator: Simulator) -> None:
    limit(people, simulator, MAX_CONCURRENT_TASKS=2)
    held = await people.hold(simulator, 2, dialect="task")
    waiting = [people.ask(say(number), dialect="task") for number in range(3)]
    assert await answers_of([people.ask(say("fine"))]) == ["fine"]  # a chat, and with it some time
    assert prompts(simulator) == [HELD, HELD, say("fine")]
    await held[0].stop()
    assert await answers_of(waiting) == ["0", "1", "2"]
    assert begun(simulator)[3:] == ["0", "1", "2"]
    assert not held[1].done


async def test_tasks_beyond_their_queue_are_refused(people: People, simulator: Simulator) -> None:
    await people.hold(simulator, dialect="task")
    tasks = [people.ask(say("title"), dialect="task") for _ in range(QUEUE + 3)]
    await people.until_ended(3)
    assert [one.refused for one in tasks] == [False] * QUEUE + [True] * 3
    assert await answers_of([people.ask(say("fine"))]) == ["fine"]


async def test_a_full_queue_of_chats_refuses_no_task(people: People, simulator: Simulator) -> None:
    await people.hold(simulator)
    asked = [people.ask(say("a"), user="a") for _ in range(QUEUE + 1)]
    await people.until_ended(1)
    assert asked[-1].refused
    assert await answers_of([people.ask(say("title"), user="a", dialect="task")]) == ["title"]


# What is said to who waits


def lines(asked: Asked) -> list[tuple[str, bool, bool]]:
    """The statuses: what is said, whether it is over, whether it is out of sight."""
    return [(line["description"], line["done"], bool(line.get("hidden"))) for line in asked.told.of("status")]


async def test_who_waits_is_told_the_place(people: People, simulator: Simulator) -> None:
    (holder,) = await people.hold(simulator)
    waiting = await queue(people, "a1", "a2", "a3", "a4")
    assert [lines(one) for one in waiting] == [
        [(f"Waiting for a free place: {place}", False, False)]
        for place in (
            "this request is the next",
            "1 request is before this one",
            "2 requests are before this one",
            "3 requests are before this one",
        )
    ]
    await holder.stop()
    await answers_of(waiting)
    for one in waiting:
        said = lines(one)
        told = len(one.told.places())
        assert [place_in(text) is not None and not over for text, over, _ in said[:told]] == [True] * told
        assert said[told][1:] == (True, True)  # the line is over, and out of sight
        assert all(over for _, over, _ in said[told:])


async def test_the_place_is_that_of_the_turn(people: People, simulator: Simulator) -> None:
    """Not that of the arrival: who has one request is before the many of somebody else."""
    (holder,) = await people.hold(simulator)
    *others, b1 = await queue(people, "a1", "a2", "a3", "b1")
    assert b1.told.places() == [1]
    await holder.stop()
    await answers_of([*others, b1])
    assert begun(simulator)[1:3] == ["a1", "b1"]


async def test_without_streaming_who_waits_is_told_the_place_too(
    people: People, simulator: Simulator
) -> None:
    (holder,) = await people.hold(simulator)
    (waiting,) = await queue(people, "a1", dialect="browser_json")
    await holder.stop()
    assert await answers_of([waiting]) == ["a1"]
    assert lines(waiting)[0] == ("Waiting for a free place: this request is the next", False, False)
    assert lines(waiting)[1][1:] == (True, True)


async def test_a_short_wait_is_not_worth_a_word(people: People) -> None:
    people.ask("[[plain wait=0.2 text=x]]")
    waiting = [people.ask(say(number)) for number in range(3)]
    assert await answers_of(waiting) == ["0", "1", "2"]
    assert [place_in(text) for one in waiting for text, *_ in lines(one)] == [None] * 3  # but what it took


@pytest.mark.parametrize("dialect", ["api_stream", "api_json", "task"])
async def test_a_program_that_waits_is_told_nothing(
    dialect: str, people: People, simulator: Simulator
) -> None:
    (holder,) = await people.hold(simulator, dialect="task" if dialect == "task" else "browser")
    waiting = people.ask(say("fine"), dialect=dialect)
    (witness,) = [people.ask(say("b1"), user="b")]
    if dialect != "task":
        await witness.until_waits()
    await holder.stop()
    assert await answers_of([waiting]) == ["fine"]
    assert waiting.told == []


async def test_a_place_that_changes_is_said_ever_less_often(people: People, simulator: Simulator) -> None:
    (holder,) = await people.hold(simulator)
    for number in range(80):
        people.ask(f"[[plain wait=0.05 text={number}]]", user="a")
    last = people.ask(say("last"), user="a")
    assert await last.until_waits() == 80
    await holder.stop()
    assert await answers_of([last], LONG_S) == ["last"]
    places = last.told.places()
    assert places == sorted(set(places), reverse=True)
    assert 2 <= len(places) <= 6


async def test_a_place_that_stays_is_not_said_again(people: People, simulator: Simulator) -> None:
    await people.hold(simulator)
    first, second = await queue(people, "a1", "b1")
    late = people.ask(say("c1"), user="c")
    await late.until_waits()
    later = people.ask(say("d1"), user="d")
    await later.until_waits()
    assert [one.told.places() for one in (first, second, late, later)] == [[0], [1], [2], [3]]


# Stop


@pytest.mark.parametrize("dialect", CHATS)
async def test_stop_while_waiting(dialect: str, people: People, simulator: Simulator) -> None:
    (holder,) = await people.hold(simulator)
    stopped = people.ask(say("never"), user="a", dialect=dialect)
    (witness,) = await queue(people, "b1")
    assert witness.told.places() == [1]
    await stopped.stop()
    assert (stopped.answer.text, stopped.answer.error) == ("", "")
    (late,) = await queue(people, "c1")
    assert late.told.places() == [1]  # only the witness is before it
    await holder.stop()
    assert await answers_of([witness, late]) == ["b1", "c1"]
    assert begun(simulator) == [HELD, "b1", "c1"]
    assert all(over for _, over, _ in lines(stopped)[-1:])


@pytest.mark.parametrize("lane", ["browser", "task"])
async def test_who_stops_makes_room_in_a_full_queue(lane: str, people: People, simulator: Simulator) -> None:
    await people.hold(simulator, dialect=lane)
    asked = [people.ask(say("a"), user="a", dialect=lane) for _ in range(QUEUE + 1)]
    await people.until_ended(1)
    assert asked[-1].refused
    await asked[7].stop()
    late = [people.ask(say("a"), user="a", dialect=lane) for _ in range(2)]
    await people.until_ended(3)
    assert [one.refused for one in late] == [False, True]
    assert len(inferences(simulator)) == 1


async def test_stop_of_who_has_just_been_let_in(people: People, simulator: Simulator) -> None:
    """After each number of steps of the event loop: the place is not lost."""
    for steps in range(40):
        (holder,) = await people.hold(simulator)
        first = people.ask(say("a1"), user="a")
        for _ in range(20):
            await asyncio.sleep(0)
        assert holder.task is not None
        assert first.task is not None
        holder.task.cancel()
        for _ in range(steps):
            await asyncio.sleep(0)
        first.task.cancel()
        await asyncio.wait([holder.task, first.task], timeout=SOON_S)
        assert await answers_of([people.ask(say("fine"))]) == ["fine"]


async def test_an_api_client_that_goes_away_while_it_waits(people: People, simulator: Simulator) -> None:
    (holder,) = await people.hold(simulator)
    scope = anyio.CancelScope()

    async def serve() -> None:
        with scope:
            await read_rest(await stream(people.pipe, say("never"), "api_stream"), Answer())

    task = asyncio.create_task(serve())
    (witness,) = await queue(people, "b1")
    assert witness.told.places() == [1]
    scope.cancel()
    await asyncio.wait_for(task, SOON_S)
    await holder.stop()
    assert await answers_of([witness]) == ["b1"]
    assert begun(simulator) == [HELD, "b1"]


# Others


async def test_each_function_has_places_of_its_own(people: People, simulator: Simulator) -> None:
    await people.hold(simulator)
    async with running_pipe(simulator.base_url, MAX_CONCURRENT_REQUESTS=1) as other, People.of(other) as more:
        first = more.ask({"messages": [{"role": "user", "content": say("fine")}], "model": f"other.{MODEL}"})
        assert await answers_of([first]) == ["fine"]


async def test_waiting_for_another_try_keeps_the_place(people: People, simulator: Simulator) -> None:
    limit(people, simulator, MAX_CONCURRENT_REQUESTS=1, RETRY_ATTEMPTS=3)
    simulator.next("http_error", name="503_no_provider", retry_after=25, times=math.inf)
    first = people.ask(say("a1"), user="a")
    await first.told.until(lambda told: told.statuses())
    simulator.reset()
    (second,) = await queue(people, "b1")
    assert inferences(simulator) == []
    await first.stop()
    assert await answers_of([second]) == ["b1"]


def test_the_pipe_has_no_queue_before_it_is_used() -> None:
    """Constructing it needs no event loop."""
    assert Pipe().valves.MAX_CONCURRENT_REQUESTS == 500
