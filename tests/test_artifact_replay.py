"""Chats whose thinking is kept in the database, seen through the whole pipe: what the model gets back, what
the host keeps with the message, and what there is in the table.

The upstream is the simulator; `as_host_returns` does what the host does with an answer before the next
request.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any, Final

import pytest
import redis
from sqlalchemy.ext.asyncio import AsyncEngine

from openrouter_responses_pipe.openrouter_responses_pipe import (
    _CARRIER,
    _MAX_ARTIFACT_BYTES,
    ArtifactRow,
    ArtifactSettings,
    Pipe,
)
from openrouter_responses_pipe.simulator import Simulator
from tests.engines import RedisServer
from tests.support import Answer, arguments, call, inferences, running_pipe, set_valves
from tests.test_artifact_store import KEY, TABLE, ULID, World, until
from tests.test_reasoning_replay import (
    HELLO,
    MIND,
    NOISE,
    as_body,
    as_host_returns,
    carriers,
    function_call,
    message,
    provider_output,
    reasoning_in,
    received,
    said,
    signed,
    thought,
    with_outputs,
)

Json = dict[str, Any]
ADVISOR: Final = "24_advisor_streaming_text_delta_on_tool_item"
FORGED: Final = "made by hand"


@pytest.fixture
async def world(database_url: str, database: AsyncEngine) -> World:
    """The host's database, looked at from outside."""
    return World(database_url, database, ArtifactSettings(KEY))


@pytest.fixture
async def pipe(world: World, simulator: Simulator, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Pipe]:
    """A pipe on a host with a database."""
    monkeypatch.setenv("WEBUI_SECRET_KEY", "the secret of this server")
    async with running_pipe(simulator.base_url) as running:
        yield running


class Talk:
    """A chat as the host keeps it, in the page or as another client holds it."""

    def __init__(
        self, simulator: Simulator, chat_id: str = "chat", user_id: str = "user", dialect: str = "browser"
    ) -> None:
        self.messages: list[Json] = []
        self.notices: list[str] = []
        self._simulator = simulator
        self._ids = {"chat_id": chat_id}
        self._user_id = user_id
        self._dialect = dialect

    def fork(self, chat_id: str, user_id: str = "user") -> Talk:
        """The same messages in another chat."""
        forked = Talk(self._simulator, chat_id, user_id)
        forked.messages = [*self.messages]
        return forked

    async def ask(self, pipe: Pipe, *output: Json, prompt: str = "Hello") -> Answer:
        """One more answer: these items, or what the simulator makes of the prompt."""
        if output:
            self._simulator.next("replay", body=as_body(*output))
        if not self.messages or self.messages[-1]["role"] != "tool":
            self.messages.append({"role": "user", "content": prompt})
        given = arguments({"messages": self.messages}, self._dialect, model=MIND)
        given["__metadata__"] |= self._ids | {"message_id": f"message-{len(self.messages)}"}
        given["__user__"]["id"] = self._user_id
        got = await call(pipe, given)
        assert not got.error
        self.notices += [each["content"] for each in given["__event_emitter__"].of("notification")]
        self.messages += as_host_returns(with_outputs(got.items()))
        return got


def tables_of(world: World) -> set[str]:
    """The names of the tables of this function."""
    listing = "SELECT tablename FROM pg_tables"
    if world.url.startswith("sqlite"):
        listing = "SELECT name FROM sqlite_master WHERE type = 'table'"
    return {name for (name,) in world.run(listing) if name.startswith("pipe_")}


def kept(world: World) -> list[ArtifactRow]:
    """What there is in the table; nothing if there is none."""
    return world.rows() if TABLE in tables_of(world) else []


def carried(got: Answer) -> Json:
    """What rides with an answer."""
    ((_, (detail,)),) = carriers(got)
    assert (detail["type"], detail["v"]) == (_CARRIER, 1)
    return {name: value for name, value in detail.items() if name not in ("type", "v")}


def ulid_in(got: Answer) -> str:
    """The id of the row that an answer names; nothing else rides with it."""
    detail = carried(got)
    assert detail.keys() == {"turn"}
    assert ULID.fullmatch(detail["turn"])
    return detail["turn"]


def sent_back(simulator: Simulator) -> list[Json]:
    """The reasoning that the model has got back with the newest request."""
    return reasoning_in(received(simulator))


async def test_a_chat_of_several_turns(pipe: Pipe, simulator: Simulator, world: World) -> None:
    """Each answer has its record; each request has all of them, byte for byte and in their places."""
    talk, thoughts, ulids = Talk(simulator), list[Json](), list[str]()
    for number in range(1, 6):
        item = (thought if number % 2 else signed)(number)
        got = await talk.ask(pipe, item, message(f"Answer {number}."))
        assert sent_back(simulator) == thoughts
        thoughts.append(item)
        ulids.append(ulid_in(got))
        assert (item.get("signature") or item["encrypted_content"]) not in json.dumps(got.chunks)
    await talk.ask(pipe, message("Bye."))
    texts = [said(f"Answer {number}.") for number in range(1, 6)]
    pairs = [entry for pair in zip(thoughts, texts, strict=True) for entry in pair]
    assert [entry for entry in received(simulator) if entry.get("role") != "user"] == pairs
    rows = world.rows()
    assert [row.ulid for row in rows] == ulids
    assert {(row.user_id, row.chat_id, row.kind) for row in rows} == {("user", "chat", "turn")}
    assert [row.message_id for row in rows] == [f"message-{2 * number + 1}" for number in range(5)]
    assert all(row.key_id and MIND.endswith(row.model) and row.model for row in rows)
    assert not any(b"gAAA" in row.payload for row in rows)


async def test_recorded_reasoning_is_kept_as_it_came(pipe: Pipe, simulator: Simulator, world: World) -> None:
    """The simulator refuses what was changed, as providers do."""
    name, talk = "02_reasoning_summary_encrypted", Talk(simulator)
    ulid_in(await talk.ask(pipe, prompt=f"[[golden name={name}]]"))
    for _ in range(2):
        await talk.ask(pipe, prompt="And now?")
        (wanted,) = reasoning_in(provider_output(name))
        found = sent_back(simulator)[0]
        assert found == {key: wanted[key] for key in found}
        assert found["encrypted_content"] == wanted["encrypted_content"]
    assert [record.status for record in inferences(simulator)] == [200] * 3
    assert len(world.rows()) == 3


async def test_the_carrier_leaves_when_the_row_is_there(
    pipe: Pipe, simulator: Simulator, world: World
) -> None:
    """Else a message might name what nobody has."""
    simulator.next("replay", body=as_body(thought(1), message("a")))
    chunks = await pipe.pipe(**arguments({"messages": [HELLO]}, model=MIND))
    assert not isinstance(chunks, dict)
    seen = []
    async for chunk in chunks:
        for detail in chunk.get("item", {}).get("reasoning_details", ()):
            seen.append(detail["turn"])
            assert [row.ulid for row in world.rows()] == seen
    assert len(seen) == 1


async def test_rounds_of_tools_have_a_row_each(pipe: Pipe, simulator: Simulator, world: World) -> None:
    talk = Talk(simulator)
    await talk.ask(pipe, thought(1), message("Let me see."), function_call("x"))
    await talk.ask(pipe, signed(2), function_call("y"))
    await talk.ask(pipe, thought(3), message("Done."))
    await talk.ask(pipe, message("Bye."))
    kinds = [entry["type"] for entry in received(simulator)]
    assert sent_back(simulator) == [thought(1), signed(2), thought(3)]
    call_and_output = ["function_call", "function_call_output"]
    asked = ["message", "reasoning", "message", *call_and_output, "reasoning", *call_and_output]
    assert kinds == [*asked, "reasoning", "message", "message"]
    assert len(world.rows()) == 3


async def test_another_worker_replays(
    world: World, simulator: Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever answers next: what one has kept, the others give back."""
    monkeypatch.setenv("WEBUI_SECRET_KEY", "the secret of this server")
    talk = Talk(simulator)
    for number in range(1, 4):
        async with running_pipe(simulator.base_url) as worker:
            ulid_in(await talk.ask(worker, thought(number), message(str(number))))
        assert sent_back(simulator) == [thought(earlier) for earlier in range(1, number)]
    assert len(world.rows()) == 3
    assert talk.notices == []


async def test_another_worker_replays_through_redis(
    world: World, simulator: Simulator, redis_of_host: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server with two workers and a Redis; nobody has to switch anything on."""
    for name, value in {"REDIS_URL": redis_of_host.url, "UVICORN_WORKERS": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("WEBUI_SECRET_KEY", "the secret of this server")
    talk, ulids = Talk(simulator), list[str]()
    async with running_pipe(simulator.base_url) as worker:
        for number in (1, 2, 3):
            ulids.append(ulid_in(await talk.ask(worker, thought(number), message(str(number)))))
        with redis.Redis.from_url(redis_of_host.url) as client:
            assert [key for key in client.scan_iter() if ulids[-1] in str(key)], "it did not go through Redis"
        async with running_pipe(simulator.base_url) as other:
            ulids.append(ulid_in(await talk.ask(other, thought(4), message("4"))))
    assert sent_back(simulator) == [thought(number) for number in (1, 2, 3)]
    assert [row.ulid for row in await world.written(*ulids)] == ulids


@pytest.mark.parametrize("dialect", ["browser", "browser_json"])
async def test_in_the_page_the_table_keeps_it(
    dialect: str, pipe: Pipe, simulator: Simulator, world: World
) -> None:
    talk = Talk(simulator, dialect=dialect)
    ulid = ulid_in(await talk.ask(pipe, thought(1), message("a")))
    await talk.ask(pipe, message("b"))
    assert sent_back(simulator) == [thought(1)]
    assert [row.ulid for row in world.rows()] == [ulid]


@pytest.mark.parametrize("dialect", ["api_json", "api_stream"])
async def test_programs_keep_it_themselves(
    dialect: str, pipe: Pipe, simulator: Simulator, world: World
) -> None:
    """They have no chat here: nobody would ever clean up after them."""
    simulator.next("replay", body=as_body(thought(1), message("a")))
    got = await call(pipe, arguments({"messages": [HELLO]}, dialect, model=MIND))
    detail = carried(got)
    assert detail.keys() == {"sealed"}
    past = {"role": "assistant", "content": "a", "reasoning_details": [{"type": _CARRIER, "v": 1, **detail}]}
    assert not (await call(pipe, arguments({"messages": [HELLO, past, HELLO]}, dialect, model=MIND))).error
    assert sent_back(simulator) == [thought(1)]
    await pipe.aclose()
    assert kept(world) == []


@pytest.mark.parametrize("chat_id", ["temporary:1", "local:1", "channel:1"])
async def test_chats_that_are_not_kept_leave_no_rows(
    chat_id: str, pipe: Pipe, simulator: Simulator, world: World
) -> None:
    """It rides with the messages, as long as the page has them."""
    talk = Talk(simulator, chat_id)
    assert carried(await talk.ask(pipe, thought(1), message("a"))).keys() == {"sealed"}
    await talk.ask(pipe, thought(2), message("b"))
    assert sent_back(simulator) == [thought(1)]
    kept = Talk(simulator)
    ulid_in(await kept.ask(pipe, thought(3), message("c")))
    await kept.fork(chat_id).ask(pipe, message("d"))
    assert sent_back(simulator) == [thought(3)]
    await pipe.aclose()
    assert [row.chat_id for row in world.rows()] == ["chat"]


async def test_nothing_is_kept_of_tasks_and_of_those_who_want_none(
    pipe: Pipe, simulator: Simulator, world: World
) -> None:
    simulator.next("replay", body=as_body(thought(1), message("a")))
    await call(pipe, arguments({"messages": [HELLO]}, "task", model=MIND))
    given = arguments({"messages": [HELLO]}, model=MIND)
    given["__user__"]["valves"] = pipe.UserValves(PERSIST_REASONING="off")
    simulator.next("replay", body=as_body(thought(2), message("b")))
    assert carriers(await call(pipe, given)) == []
    await Talk(simulator).ask(pipe, message("no thought"))
    await pipe.aclose()
    assert kept(world) == []


# Switched off, and on again


async def test_switched_off_from_the_start(pipe: Pipe, simulator: Simulator, world: World) -> None:
    """There is not even a table of it; little things ride with the messages."""
    set_valves(pipe, simulator.base_url, ENABLE_ARTIFACT_STORE=False)
    talk = Talk(simulator)
    assert carried(await talk.ask(pipe, thought(1), message("a"))).keys() == {"sealed"}
    await talk.ask(pipe, message("b"))
    assert sent_back(simulator) == [thought(1)]
    await pipe.aclose()
    assert {name for name in tables_of(world) if not name.endswith("_metrics")} == set()


async def test_switched_off_later_and_on_again(pipe: Pipe, simulator: Simulator, world: World) -> None:
    """Nothing breaks; what rides with messages is read for ever, and what was stored when it is on again."""
    talk = Talk(simulator)
    ulid_in(await talk.ask(pipe, thought(1), message("a")))
    set_valves(pipe, simulator.base_url, ENABLE_ARTIFACT_STORE=False)
    assert carried(await talk.ask(pipe, thought(2), message("b"))).keys() == {"sealed"}
    assert sent_back(simulator) == []
    await talk.ask(pipe, message("c"))
    assert sent_back(simulator) == [thought(2)]
    set_valves(pipe, simulator.base_url)
    ulid_in(await talk.ask(pipe, thought(3), message("d")))
    assert sent_back(simulator) == [thought(1), thought(2)]
    assert len(world.rows()) == 2


# Whose it is


async def test_a_fork_of_ones_own(pipe: Pipe, simulator: Simulator, world: World) -> None:
    """It replays, also when the first chat is gone with its rows."""
    talk = Talk(simulator)
    for number in (1, 2):
        await talk.ask(pipe, thought(number), message(str(number)))
    fork = talk.fork("fork")
    await fork.ask(pipe, thought(3), message("3"))
    assert sent_back(simulator) == [thought(1), thought(2)]
    await until(lambda: len(world.rows()) == 5)
    await world.change(f"DELETE FROM {TABLE} WHERE chat_id = 'chat'")
    async with running_pipe(simulator.base_url) as other:
        await fork.ask(other, message("4"))
    assert sent_back(simulator) == [thought(1), thought(2), thought(3)]
    assert fork.notices == []


async def test_a_clone_of_somebody_elses(pipe: Pipe, simulator: Simulator, world: World) -> None:
    """Texts alone, and no rows but those of their own answers."""
    talk = Talk(simulator)
    await talk.ask(pipe, thought(1), message("a"))
    clone = talk.fork("clone", "somebody else")
    await clone.ask(pipe, thought(2), message("b"))
    assert sent_back(simulator) == []
    assert [entry["role"] for entry in received(simulator)] == ["user", "assistant", "user"]
    await clone.ask(pipe, message("c"))
    assert sent_back(simulator) == [thought(2)]
    await pipe.aclose()
    assert [(row.user_id, row.chat_id) for row in world.rows()] == [
        ("user", "chat"),
        ("somebody else", "clone"),
    ]


# What fits


async def test_more_than_fits_into_a_message(pipe: Pipe, simulator: Simulator, world: World) -> None:
    """Without a table it could not be kept, and the person was told so."""
    talk, item = Talk(simulator), thought(1, encrypted_content=NOISE)
    ulid_in(await talk.ask(pipe, item, message("a")))
    async with running_pipe(simulator.base_url) as other:
        await talk.ask(other, message("b"))
    assert sent_back(simulator) == [item]
    assert talk.notices == []
    (row,) = world.rows()
    assert row.raw_bytes > len(NOISE) > 64 * 1024


async def test_more_than_fits_into_a_row(pipe: Pipe, simulator: Simulator, world: World) -> None:
    """The answer comes, and the person is told."""
    talk = Talk(simulator)
    large = thought(1, encrypted_content="x" * _MAX_ARTIFACT_BYTES)
    assert carriers(await talk.ask(pipe, large, message("a"))) == []
    (notice,) = talk.notices
    assert "too long" in notice
    await talk.ask(pipe, message("b"))
    assert sent_back(simulator) == []
    await pipe.aclose()
    assert kept(world) == []


# What a tool of OpenRouter's own needs back


@pytest.mark.parametrize("is_kept", [True, False])
async def test_what_an_advisor_said(is_kept: bool, pipe: Pipe, simulator: Simulator, world: World) -> None:
    """It remembers by it; whether it is kept, a valve says."""
    set_valves(pipe, simulator.base_url, PERSIST_TOOL_RESULTS=is_kept)
    (wanted,) = [item for item in provider_output(ADVISOR) if item["type"] == "openrouter:advisor"]
    talk = Talk(simulator)
    got = await talk.ask(pipe, prompt=f"[[golden name={ADVISOR}]]")
    assert got.saved_text() == "A bounded queue fits best."
    assert bool(carriers(got)) == is_kept
    async with running_pipe(simulator.base_url) as other:
        await talk.ask(other, message("b"))
    found = [entry for entry in received(simulator) if entry["type"] == "openrouter:advisor"]
    assert found == [wanted] * is_kept
    kinds = [entry.get("role", entry["type"]) for entry in received(simulator)]
    assert kinds == ["user", *["openrouter:advisor"] * is_kept, "assistant", "user"]
    assert len(kept(world)) == is_kept


@pytest.mark.parametrize("is_kept", [True, False])
async def test_an_advisor_among_thoughts(
    is_kept: bool, pipe: Pipe, simulator: Simulator, world: World
) -> None:
    """Without it the thinking is kept all the same."""
    set_valves(pipe, simulator.base_url, PERSIST_TOOL_RESULTS=is_kept)
    advice: Json = {"type": "openrouter:advisor", "id": "adv", "status": "completed", "advice": "Wait."}
    talk = Talk(simulator)
    ulid_in(await talk.ask(pipe, advice, thought(1), message("a")))
    await talk.ask(pipe, message("b"))
    entries = [entry for entry in received(simulator) if entry.get("role") != "user"]
    assert entries == [*[advice] * is_kept, thought(1), said("a")]
    assert len(world.rows()) == 1


# When something fails


async def test_a_row_that_the_database_refuses_rides_along(
    pipe: Pipe, simulator: Simulator, world: World
) -> None:
    talk = Talk(simulator)
    ulid_in(await talk.ask(pipe, thought(1), message("a")))
    await world.refuse("chat_id", "chat")
    assert carried(await talk.ask(pipe, thought(2), message("b"))).keys() == {"sealed"}
    await world.allow()
    await talk.ask(pipe, message("c"))
    assert sent_back(simulator) == [thought(1), thought(2)]
    assert talk.notices == []


async def test_a_table_that_is_dropped_costs_no_answer(
    pipe: Pipe, simulator: Simulator, world: World
) -> None:
    """What was just used is still at hand; from then on the rows of new answers are kept again."""
    talk = Talk(simulator)
    await talk.ask(pipe, thought(1), message("a"))
    await world.drop()
    await talk.ask(pipe, thought(2), message("b"))
    await talk.ask(pipe, thought(3), message("c"))
    assert sent_back(simulator) == [thought(1), thought(2)]
    async with running_pipe(simulator.base_url) as other:
        await talk.ask(other, message("d"))
    assert sent_back(simulator)[-1:] == [thought(3)]
    assert len(talk.notices) == 1, "what is gone is said"


async def test_a_secret_that_has_changed(
    world: World, simulator: Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The chat goes on without its earlier thinking, which is said once; what is new is kept."""
    talk = Talk(simulator)
    monkeypatch.setenv("WEBUI_SECRET_KEY", "an older secret")
    async with running_pipe(simulator.base_url) as pipe:
        await talk.ask(pipe, thought(1), message("a"))
    monkeypatch.setenv("WEBUI_SECRET_KEY", "the secret of this server")
    async with running_pipe(simulator.base_url) as pipe:
        ulid_in(await talk.ask(pipe, thought(2), message("b")))
        assert sent_back(simulator) == []
        await talk.ask(pipe, message("c"))
    assert sent_back(simulator) == [thought(2)]
    assert len(talk.notices) == 1
    assert len(world.rows()) == 2


async def test_a_record_that_somebody_has_put_into_the_table(
    pipe: Pipe, simulator: Simulator, world: World
) -> None:
    """Of a newer version, or of none: no words are put into the model's mouth."""
    talk = Talk(simulator)
    ulid = ulid_in(await talk.ask(pipe, thought(1), message("a")))
    odd: list[Any] = [
        "text",
        5,
        None,
        {},
        [5, "x"],
        [{"future": 1}],
        [{"message_text": FORGED}],
        {"reasoning": FORGED},
    ]
    for value in odd:
        raw = json.dumps(value).encode()
        changes = f"payload = ?, codec = 'json', key_id = '', raw_bytes = {len(raw)}"
        await world.change(f"UPDATE {TABLE} SET {changes} WHERE ulid = ?", raw, ulid)
        async with running_pipe(simulator.base_url) as other:
            await talk.fork("chat").ask(other, message("b"))
        assert sent_back(simulator) == []
        assert FORGED not in json.dumps(inferences(simulator)[-1].body)
        assert [entry for entry in received(simulator) if entry.get("role") == "assistant"] == [said("a")]


async def test_a_carrier_made_by_hand(pipe: Pipe, simulator: Simulator, world: World) -> None:
    """Ids that nobody has given out, in any number and of any kind."""
    talk = Talk(simulator)
    ulid = ulid_in(await talk.ask(pipe, thought(1), message("a")))
    made: list[Any] = [
        ulid.lower(),
        ulid + "0",
        ulid[:-1],
        "0" * 26,
        "'; DROP TABLE chat; --",
        "\x00" * 26,
        5,
        None,
        [ulid],
    ]
    details = [{"type": _CARRIER, "v": 1, "turn": turn} for turn in made]
    past = {"role": "assistant", "content": "a", "reasoning_details": details}
    got = await call(pipe, arguments({"messages": [HELLO, past, HELLO]}, model=MIND))
    assert not got.error
    assert sent_back(simulator) == []
    many = [{"type": _CARRIER, "v": 1, "turn": f"{number:026d}"} for number in range(6_000)]
    past = {"role": "assistant", "content": "a", "reasoning_details": [*many, {**details[0], "turn": ulid}]}
    got = await call(pipe, arguments({"messages": [HELLO, past, HELLO]}, model=MIND))
    assert not got.error
    assert sent_back(simulator) in ([], [thought(1)]), "of a history that long only a part is looked for"
